"""UniPC's repository (wl-zhao/UniPC): one file, ``uni_pc.py`` of its score_sde_pytorch example, to be importable.

It is written for pictures, (B, C, H, W), and prints at every step; what it prints is dropped.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Library, Sampler, importing
from .line import default_dtype
from .schedule import SKIP, of_file, pictures, quietly, schedule, times_inside
from .task import Task


def _run(module: Any, task: Task, variant: str, order: int) -> Tensor:
    network = task.network
    with default_dtype(task.x.dtype), quietly():
        solver = module.UniPC(
            lambda x, t: network.eps(x, times_inside(t)),
            schedule(module, task),
            algorithm_type=task.options["algorithm_type"],
            variant=variant,
        )
        out = solver.sample(
            pictures(task.x),
            steps=task.n,
            t_start=task.start.t,
            t_end=task.stop.t,
            order=order,
            skip_type=SKIP[task.grid],
            lower_order_final=task.options["lower_order_final"],
        )
    return out.reshape(task.x.shape)


def _sampler(variant: str, order: int) -> Sampler:
    return Sampler(
        lambda module, task: _run(module, task, variant, order),
        options={"algorithm_type": "data_prediction", "lower_order_final": True},
        choices={"algorithm_type": ("data_prediction", "noise_prediction")},
        grids=tuple(SKIP),
    )


LIBRARY = Library(
    name="uni_pc",
    distribution="",
    install="git clone https://github.com/wl-zhao/UniPC, and put its example/score_sde_pytorch on PYTHONPATH",
    load=importing("uni_pc"),
    how="eps-network at (x, t) of the path, on (B, 1, 1, d); its own NoiseScheduleVP where the path is the linear VP",
    version_of=of_file,
    samplers={
        f"{variant}_{order}": _sampler(variant, order) for variant in ("bh1", "bh2", "vary_coeff") for order in (1, 2, 3)
    },
)
