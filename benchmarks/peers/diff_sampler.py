"""diff-sampler's repository (zju-pi/diff-sampler): ``solvers.py`` and ``solver_utils.py`` of its diff-solvers-main.

The first of the two has the name of a package of this project, so it is found beside the second, which is to be importable.
Run from this project's folder with ``python -m``: then the other one does not hide ours. EDM's coordinates, any levels. Its
dpm_pp and unipc clip predictions to a quantile, whatever the data: here only with threshold=true. (Its ipndm and ipndm_v of
order 1 raise IndexError, and are left out.)
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from .base import Library, Sampler
from .schedule import of_file, pictures
from .task import Task

_LOADED: dict[str, Any] = {}


def _load() -> Any:
    beside = importlib.import_module("solver_utils")
    file = File(str(beside.__file__)).with_name("solvers.py")
    if str(file) not in _LOADED:
        spec = importlib.util.spec_from_file_location("benchmarks_diff_sampler_solvers", file)
        if spec is None or spec.loader is None or not file.is_file():
            raise ModuleNotFoundError(f"no solvers.py beside {beside.__file__}", name="solvers.py of diff-sampler")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _LOADED[str(file)] = module
    return _LOADED[str(file)]


class _Net:
    """D(y, sigma), called with the class labels that it does not have."""

    def __init__(self, task: Task) -> None:
        self.network = task.network

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Any = None) -> Tensor:
        return self.network.denoised(x, sigma)


@contextmanager
def _thresholding(module: Any, on: bool) -> Iterator[None]:
    """Its quantile clipping is a function of the module, always called: inside it does nothing, unless it is asked for."""
    utils: Any = importlib.import_module("solver_utils")
    before = module.dynamic_thresholding_fn
    if not on:
        module.dynamic_thresholding_fn = utils.dynamic_thresholding_fn = lambda x0: x0
    try:
        yield
    finally:
        module.dynamic_thresholding_fn = utils.dynamic_thresholding_fn = before


def _run(module: Any, task: Task, name: str, given: dict[str, Any]) -> Tensor:
    levels = task.rhos.to(task.x.dtype)
    options = {key: value for key, value in task.options.items() if key not in ("threshold", "deis_mode")}
    if "deis_mode" in task.options:
        # its table of the Adams-Bashforth kind counts nodes behind the present one, the sampler counts all of them
        order = given["max_order"] - (task.options["deis_mode"] == "rhoab")
        given = {**given, "coeff_list": module.get_deis_coeff_list(levels, order, deis_mode=task.options["deis_mode"])}
    start = pictures(task.y) / levels[0]
    with _thresholding(module, bool(task.options.get("threshold", False))), torch.no_grad():
        out = getattr(module, f"{name}_sampler")(_Net(task), start, num_steps=len(levels), t_steps=levels, **given, **options)
    return task.back(out.reshape(task.x.shape))


def _sampler(name: str, options: dict[str, Any] | None = None, choices: Any = None, **given: Any) -> Sampler:
    return Sampler(lambda module, task: _run(module, task, name, given), options=options or {}, choices=choices or {})


CLIPPED = {"threshold": False, "predict_x0": True, "lower_order_final": True}

LIBRARY = Library(
    name="diff_sampler",
    distribution="",
    install="git clone https://github.com/zju-pi/diff-sampler, and put its diff-solvers-main on PYTHONPATH",
    load=_load,
    how="D(y, sigma) with y = x / alpha, on (B, 1, 1, d); levels in the state's dtype",
    affixes=("", "_sampler"),
    version_of=of_file,
    samplers={
        "euler": _sampler("euler"),
        "heun": _sampler("heun"),
        "dpm_2": _sampler("dpm_2", {"r": 0.5}),
        **{f"ipndm{order}": _sampler("ipndm", max_order=order) for order in (2, 3, 4)},
        **{f"ipndm_v{order}": _sampler("ipndm_v", max_order=order) for order in (2, 3, 4)},
        **{
            f"deis{order}": _sampler("deis", {"deis_mode": "tab"}, {"deis_mode": ("tab", "rhoab")}, max_order=order)
            for order in (2, 3, 4)
        },
        **{f"dpm_pp{order}": _sampler("dpm_pp", dict(CLIPPED), max_order=order) for order in (1, 2, 3)},
        **{
            f"unipc{order}": _sampler("unipc", {**CLIPPED, "variant": "bh2"}, {"variant": ("bh1", "bh2")}, max_order=order)
            for order in (1, 2, 3)
        },
    },
)
