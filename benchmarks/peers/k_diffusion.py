"""k-diffusion: functions of (denoiser, x, sigmas), in EDM's coordinates y = x / alpha at sigma / alpha.

``sampling.py`` is loaded without the rest of the package, which wants trackers, augmentation libraries and a compiled CLIP to
sample with none of them. By default a grid ends at 0, one step after its last level, as the library's own grids do:
end=zero; end=stop leaves that step out.

Stochastic samplers draw from the library's Brownian tree (noise=tree), or from torch's generator (noise=white).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .base import Library, Sampler, never, with_eta
from .task import Task

END = {"end": ("zero", "stop")}
NOISE = {"noise": ("tree", "white")}


class _Denoiser:
    """What the functions call: denoised(y, sigma of shape (B,))."""

    def __init__(self, task: Task) -> None:
        self.network = task.network

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.network.denoised(x, sigma)


def _levels(task: Task) -> Tensor:
    """The grid as the library has it: n steps, the last of them to 0 where asked for."""
    if task.options.get("end") != "zero":
        return task.rhos
    levels = task.over(task.n - 1).rhos if task.n > 1 else task.rhos[:1]
    return torch.cat([levels, levels.new_zeros(1)])


def _run(module: Any, task: Task, name: str) -> Tensor:
    levels = _levels(task).to(task.x.dtype)
    given = {key: value for key, value in task.options.items() if key not in ("end", "noise") and value is not None}
    if task.options.get("noise") == "white":
        given["noise_sampler"] = lambda sigma, sigma_next: torch.randn_like(task.x)
    return task.back(getattr(module, f"sample_{name}")(_Denoiser(task), task.y, levels, disable=True, **given))


def _between(module: Any, task: Task, name: str) -> Tensor:
    """dpm_fast and dpm_adaptive choose their own levels."""
    given = {"n": task.n} if name == "dpm_fast" else {}
    options = {**task.options, **given}
    out = getattr(module, f"sample_{name}")(_Denoiser(task), task.y, task.bottom, task.top, disable=True, **options)
    return task.back(out)


def _sampler(name: str, noisy: Any = never, tree: bool = False, **options: Any) -> Sampler:
    more: Mapping[str, Any] = {"noise": "tree"} if tree else {}
    return Sampler(
        lambda module, task: _run(module, task, name),
        options={"end": "zero", **more, **options},
        choices={**END, **(NOISE if tree else {})},
        noisy=noisy,
        takes_eta=tree and "eta" in options,
        to_zero=lambda options: options["end"] == "zero",
    )


def _churn(options: Mapping[str, Any]) -> bool:
    return options["s_churn"] > 0.0


CHURN: dict[str, Any] = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": float("inf"), "s_noise": 1.0}


# --- loading ------------------------------------------------------------------------------------------------------------------


def _load() -> Any:
    """``k_diffusion.sampling``, by itself where the package is not already imported."""
    if "k_diffusion.sampling" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'k_diffusion'", name="k_diffusion")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = importlib.machinery.ModuleSpec("k_diffusion", None, is_package=True)
    sys.modules["k_diffusion"] = package
    try:
        with _without_pictures():
            return importlib.import_module("k_diffusion.sampling")
    finally:  # whoever imports the package itself gets the whole of it
        for name in ("k_diffusion", "k_diffusion.sampling", "k_diffusion.utils"):
            sys.modules.pop(name, None)


@contextmanager
def _without_pictures() -> Iterator[None]:
    """torchvision is imported by ``k_diffusion.utils`` to show pictures, and is not needed to sample: inside, where it cannot
    be imported, an empty module stands for it.
    """
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    try:
        importlib.import_module(names[-1])
        missing = False
    except Exception:  # torchvision beside another build of torch raises RuntimeError
        missing = True
    made = {name: types.ModuleType(name) for name in names} if missing else {}
    before = {name: sys.modules.pop(name) for name in list(made) if name in sys.modules}
    for name, module in made.items():
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(made[parent], leaf, module)
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name, None)
        sys.modules.update(before)


_MODULE: list[Any] = []


def _loaded() -> Any:
    if not _MODULE:
        _MODULE.append(_load())
    return _MODULE[0]


LIBRARY = Library(
    name="k_diffusion",
    distribution="k-diffusion",
    install="pip install --no-deps k-diffusion (and torchdiffeq, torchsde, scipy, pillow, safetensors, tqdm)",
    load=_loaded,
    how="denoiser(y, sigma) with y = x / alpha, sigma / alpha; levels in the state's dtype",
    affixes=("sample_", ""),
    samplers={
        "euler": _sampler("euler", _churn, **CHURN),
        "euler_ancestral": _sampler("euler_ancestral", with_eta, eta=1.0, s_noise=1.0),
        "heun": _sampler("heun", _churn, **CHURN),
        "dpm_2": _sampler("dpm_2", _churn, **CHURN),
        "dpm_2_ancestral": _sampler("dpm_2_ancestral", with_eta, eta=1.0, s_noise=1.0),
        "lms": _sampler("lms", order=4),
        "dpmpp_2s_ancestral": _sampler("dpmpp_2s_ancestral", with_eta, eta=1.0, s_noise=1.0),
        "dpmpp_sde": _sampler("dpmpp_sde", with_eta, tree=True, eta=1.0, s_noise=1.0, r=0.5),
        "dpmpp_2m": _sampler("dpmpp_2m"),
        "dpmpp_2m_sde": _sampler("dpmpp_2m_sde", with_eta, tree=True, eta=1.0, s_noise=1.0, solver_type="midpoint"),
        "dpmpp_3m_sde": _sampler("dpmpp_3m_sde", with_eta, tree=True, eta=1.0, s_noise=1.0),
        "dpm_fast": Sampler(
            lambda module, task: _between(module, task, "dpm_fast"),
            options={"eta": 0.0, "s_noise": 1.0},
            grids=("log_snr",),
            noisy=with_eta,
        ),
        "dpm_adaptive": Sampler(
            lambda module, task: _between(module, task, "dpm_adaptive"),
            options={"order": 3, "rtol": 0.05, "atol": 0.0078, "eta": 0.0, "s_noise": 1.0},
            adaptive=True,
            noisy=with_eta,
        ),
    },
)
