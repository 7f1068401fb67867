"""flow_matching: ODESolver on a velocity model, whose time s runs from 0 (noise) to 1 (data).

With rho = sigma / alpha, w = x / (alpha + sigma) = s x0 + (1 - s) eps at s = 1 / (1 + rho): every path is this one, rescaled.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Library, Sampler, importing
from .task import Task

FIXED = ("euler", "midpoint", "heun3", "rk4")
ADAPTIVE = ("dopri5", "bosh3")


def _run(module: Any, task: Task, method: str) -> Tensor:
    network, rhos = task.network, task.rhos

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return network.flow(x, (1.0 - t) / t)

    s = 1.0 / (1.0 + rhos)
    grid = s[[0, -1]] if method in ADAPTIVE else s
    control = {key: task.options[key] for key in ("rtol", "atol") if key in task.options}
    start = task.y / (1.0 + float(rhos[0]))
    out = module.ODESolver(velocity).sample(start, step_size=None, method=method, time_grid=grid, **control)
    return task.back(out * (1.0 + float(rhos[-1])))


def _sampler(method: str, **more: Any) -> Sampler:
    return Sampler(lambda module, task: _run(module, task, method), **more)


LIBRARY = Library(
    name="flow_matching",
    distribution="flow_matching",
    install="pip install --no-deps flow_matching",
    load=importing("flow_matching.solver"),
    how="velocity(x, s) = x0 - eps at w = s x0 + (1 - s) eps, s = alpha / (alpha + sigma)",
    samplers={
        **{name: _sampler(name) for name in FIXED},
        **{name: _sampler(name, options={"rtol": 1e-3, "atol": 1e-3}, adaptive=True) for name in ADAPTIVE},
    },
)
