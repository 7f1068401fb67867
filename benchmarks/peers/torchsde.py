"""torchsde: sdeint on the reverse SDE of noise level eta, in the variable in which the grid is uniform.

    uniform  dx of the path's own state in -t
    log_snr  dy of y = x / alpha in -log(rho):   dy = -(1 + eta^2) rho eps dtau + sqrt(2) eta rho dw

Its fixed steps are equal, so these two are its grids. States are rows (B, d). Brownian motion is its own BrownianInterval, the
one that sdeint would make, but with an entropy drawn from torch's generator: sdeint itself seeds it from numpy's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import Library, Sampler, importing, with_eta
from .task import Task

#: method -> (the calculus it needs, the area that its noise must know). The diffusion does not depend on x: both are one SDE.
METHODS = {
    "euler": ("ito", "none"),
    "milstein": ("ito", "none"),
    "srk": ("ito", "space-time"),
    "heun": ("stratonovich", "none"),
    "midpoint": ("stratonovich", "none"),
    "reversible_heun": ("stratonovich", "none"),
}


class _Reverse:
    """The SDE in a time that grows: -t, or -log(rho)."""

    noise_type = "diagonal"

    def __init__(self, task: Task, calculus: str) -> None:
        self.task, self.sde_type, self.by_t = task, calculus, task.grid == "uniform"
        self.eta = float(task.options["eta"])

    def f(self, tau: Tensor, y: Tensor) -> Tensor:
        network = self.task.network
        return -(network.drift(y, -tau, self.eta) if self.by_t else network.log_drift(y, (-tau).exp(), self.eta))

    def g(self, tau: Tensor, y: Tensor) -> Tensor:
        if self.by_t:
            size = self.eta * self.task.path.g(min(max(-float(tau), 0.0), self.task.path.T))
        else:
            size = math.sqrt(2.0) * self.eta * math.exp(-float(tau))
        return torch.full_like(y, float(size))


def _run(module: Any, task: Task, method: str) -> Tensor:
    calculus, area = METHODS[method]
    by_t = task.grid == "uniform"
    ends = (task.start.t, task.stop.t) if by_t else (math.log(task.top), math.log(task.bottom))
    y = (task.x if by_t else task.y).reshape(len(task.x), -1)
    ts = torch.tensor([-ends[0], -ends[1]], dtype=y.dtype, device=y.device)
    motion = module.BrownianInterval(
        t0=ts[0],
        t1=ts[1],
        size=y.shape,
        dtype=y.dtype,
        device=y.device,
        entropy=int(torch.randint(1 << 31, ())),
        levy_area_approximation=area,
    )
    # a hair more than a step: rounding would otherwise leave a sliver of one to take at the end
    dt = float(ts[1] - ts[0]) / task.n * (1.0 + 1e-5)
    out = module.sdeint(_Reverse(task, calculus), y, ts, bm=motion, method=method, dt=dt)[-1].reshape(task.x.shape)
    return out if by_t else task.back(out)


def _sampler(method: str) -> Sampler:
    return Sampler(
        lambda module, task: _run(module, task, method),
        options={"eta": 1.0},
        grids=("uniform", "log_snr"),
        noisy=with_eta,
        takes_eta=True,
    )


LIBRARY = Library(
    name="torchsde",
    distribution="torchsde",
    install="pip install torchsde",
    load=importing("torchsde"),
    how="f(t, y) and g(t, y) of the reverse SDE, in -t or -log(sigma/alpha); one call more than steps, to check shapes",
    samplers={name: _sampler(name) for name in METHODS},
)
