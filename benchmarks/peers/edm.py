"""EDM's repository (NVlabs/edm): ``edm_sampler`` of its ``generate.py``, Algorithm 2 of Karras et al. 2022.

Its levels are those of the paper (karras, rho 7) and end with a step to 0; its state is float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Library, Sampler, always, importing
from .schedule import of_file
from .task import Task


class _Net:
    """A network of EDM: D(x, sigma, class_labels), and what levels it takes."""

    def __init__(self, task: Task) -> None:
        self.network, self.sigma_min, self.sigma_max = task.network, task.bottom, task.top

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma)

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Any = None) -> Tensor:
        return self.network.denoised(x, sigma)


def _run(module: Any, task: Task) -> Tensor:
    # one step, to 0: its levels (i / (n - 1)) are then 0 / 0
    out = module.edm_sampler(
        _Net(task), task.y / task.top, num_steps=task.n, sigma_min=task.bottom, sigma_max=task.top, **task.options
    )
    return task.back(out)


LIBRARY = Library(
    name="edm",
    distribution="",
    install="git clone https://github.com/NVlabs/edm, put that folder on PYTHONPATH, and pip install click requests",
    load=importing("generate"),
    how="D(y, sigma) with y = x / alpha, sigma / alpha; float64 state, last step to 0",
    affixes=("", "_sampler"),
    version_of=of_file,
    samplers={
        "edm": Sampler(
            _run,
            options={"S_churn": 0.0, "S_min": 0.0, "S_max": float("inf"), "S_noise": 1.0},
            grids=("karras",),
            noisy=lambda options: options["S_churn"] > 0.0,
            to_zero=always,
        )
    },
)
