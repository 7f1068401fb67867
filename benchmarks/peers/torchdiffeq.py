"""torchdiffeq: odeint on the probability flow, in one of two variables.

    variable=t        dx/dt of the path's own state, over the grid's times
    variable=log_rho  dy/dlog(rho) = rho eps of y = x / alpha, over the grid's levels

Fixed-step methods step from knot to knot of the grid. Adaptive ones choose their steps between the ends, and how many calls
that takes is theirs to say: a budget only bounds it. They are told where the end is (``step_t``), past which they would
otherwise evaluate the network and interpolate back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Library, Sampler, importing
from .task import Task

VARIABLES = ("t", "log_rho")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


def _solve(module: Any, task: Task, method: str, options: Any, control: dict[str, float]) -> Tensor:
    network = task.network
    if task.options["variable"] == "t":
        at, x = task.times, task.x

        def flow(t: Tensor, x: Tensor) -> Tensor:
            return network.slope(x, t)
    else:
        at, x = task.rhos.log(), task.y

        def flow(t: Tensor, x: Tensor) -> Tensor:
            return network.log_drift(x, t.exp())

    ends = torch.stack([at[0], at[-1]])
    out = module.odeint(flow, x, ends, method=method, options=options(at), **control)[-1]
    return out if task.options["variable"] == "t" else task.back(out)


def _fixed(method: str) -> Sampler:
    def run(module: Any, task: Task) -> Tensor:
        # the grid as steps between two ends, and not as outputs, all of which would be kept
        return _solve(module, task, method, lambda at: {"grid_constructor": lambda func, y0, t: at.to(t)}, {})

    return Sampler(run, options={"variable": "t"}, choices={"variable": VARIABLES})


def _adaptive(method: str) -> Sampler:
    def run(module: Any, task: Task) -> Tensor:
        control = {"rtol": task.options["rtol"], "atol": task.options["atol"]}
        return _solve(module, task, method, lambda at: {"step_t": at[-1:], "dtype": torch.float64}, control)

    options = {"rtol": 1e-3, "atol": 1e-3, "variable": "t"}
    return Sampler(run, options=options, choices={"variable": VARIABLES}, adaptive=True)


LIBRARY = Library(
    name="torchdiffeq",
    distribution="torchdiffeq",
    install="pip install torchdiffeq",
    load=importing("torchdiffeq"),
    how="f(t, x) is the probability flow's dx/dt, or dy/dlog(sigma/alpha)",
    samplers={**{name: _fixed(name) for name in FIXED}, **{name: _adaptive(name) for name in ADAPTIVE}},
)
