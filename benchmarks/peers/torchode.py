"""torchode: every sample has its own step control; samples that have arrived ride along until the last one has.

States are rows (B, d), and the network is asked at a time of its own for each row. Only its adaptive methods are here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError

from .base import Library, Sampler, importing
from .task import Task

METHODS = {"dopri5": "Dopri5", "tsit5": "Tsit5", "heun": "Heun"}


def _solve(module: Any, task: Task, method: str) -> Tensor:
    network, x = task.network, task.x.reshape(len(task.x), -1)
    term = module.ODETerm(lambda t, x: network.slope(x, t))
    controller = module.IntegralController(task.options["atol"], task.options["rtol"], term=term)
    solver = module.AutoDiffAdjoint(getattr(module, METHODS[method])(term), controller)
    first, last = (torch.full((len(x),), k.t, dtype=x.dtype, device=x.device) for k in (task.start, task.stop))
    found = solver.solve(module.InitialValueProblem(x, first, last, last[:, None]))
    if bool((found.status != module.Status.SUCCESS.value).any()):
        bad = int((found.status != module.Status.SUCCESS.value).nonzero()[0, 0])
        raise InputError(f"torchode stopped early in sample {bad} with status {module.Status(int(found.status[bad])).name}")
    return found.ys[:, -1].reshape(task.x.shape)


def _sampler(method: str) -> Sampler:
    return Sampler(lambda module, task: _solve(module, task, method), options={"rtol": 1e-3, "atol": 1e-3}, adaptive=True)


LIBRARY = Library(
    name="torchode",
    distribution="torchode",
    install="pip install --no-deps torchode torchtyping typeguard",
    load=importing("torchode"),
    how="f(t, x) is the probability flow's dx/dt, at a time for every row of x",
    samplers={name: _sampler(name) for name in METHODS},
)
