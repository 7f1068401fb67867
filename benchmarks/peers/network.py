"""The harness's score in the forms that other libraries want.

With rho = sigma / alpha, y = x / alpha = x0 + rho eps and z = y / sqrt(1 + rho^2), a network is asked for

    x0(x, t), eps(x, t), slope(x, t)     in the path's own coordinates and time; slope = dx/dt = alpha' x0 + sigma' eps
    denoised(y, rho)                     E[x0 | y]: k-diffusion, EDM, diff-sampler
    noise(z, rho)                        eps from the variance-preserving state: diffusers
    edm(y, rho)                          the network of EDM's preconditioning (Karras et al. 2022, eq. 7)
    flow(w, rho)                         x0 - eps from w = y / (1 + rho) = s x0 + (1 - s) eps: dw/ds, s = 1 / (1 + rho)
    drift(x, t, eta)                     the reverse SDE's drift, alpha' x0 + (sigma' + eta^2 g^2 / (2 sigma)) eps
    log_drift(y, rho, eta)               the same of y in log rho, (1 + eta^2) rho eps

at the very level that the library itself uses. The whole of a call, its change of coordinates too, is counted and timed as the
network, by the harness's meter: what is left is the library's own. No step is computed here.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError
from sde.path import Path
from sde.prediction import Knot, Tally, affine

from ..lines import Meter

Level = float | Tensor
"""A time or a rho: a number, a tensor () or (B,)."""

Ask = tuple[float, float, float]
"""(gain, a, b): x = gain * the library's state; wanted is a x0 + b eps."""


def _edm(k: Knot) -> Ask:
    rho = k.sigma / k.alpha
    norm = math.hypot(rho, SIGMA_DATA)
    return k.alpha, rho / (SIGMA_DATA * norm), -SIGMA_DATA / norm


SIGMA_DATA = 0.5

#: form -> (whether its level is rho, the gain and the row at a knot)
FORMS: Mapping[str, tuple[bool, Callable[[Knot], Ask]]] = {
    "x0": (False, lambda k: (1.0, 1.0, 0.0)),
    "eps": (False, lambda k: (1.0, 0.0, 1.0)),
    "slope": (False, lambda k: (1.0, k.dalpha, k.dsigma)),
    "denoised": (True, lambda k: (k.alpha, 1.0, 0.0)),
    "noise": (True, lambda k: (math.hypot(k.alpha, k.sigma), 0.0, 1.0)),
    "edm": (True, _edm),
    "flow": (True, lambda k: (k.alpha + k.sigma, 1.0, -1.0)),
    "log_drift": (True, lambda k: (k.alpha, 0.0, k.sigma / k.alpha)),
}


class BudgetError(InputError):
    """A library has called the network more often than it may. Not an error of the library."""


class Network(ABC):
    """What a library is given to call."""

    @abstractmethod
    def ask(self, form: str, x: Tensor, level: Level, eta: float = 0.0) -> Tensor:
        """The network's answer in one of FORMS (or "drift"), shaped like x."""

    def x0(self, x: Tensor, t: Level) -> Tensor:
        return self.ask("x0", x, t)

    def eps(self, x: Tensor, t: Level) -> Tensor:
        return self.ask("eps", x, t)

    def slope(self, x: Tensor, t: Level) -> Tensor:
        return self.ask("slope", x, t)

    def drift(self, x: Tensor, t: Level, eta: float) -> Tensor:
        return self.ask("drift", x, t, eta)

    def log_drift(self, y: Tensor, rho: Level, eta: float = 0.0) -> Tensor:
        return self.ask("log_drift", y, rho, eta)

    def denoised(self, y: Tensor, rho: Level) -> Tensor:
        return self.ask("denoised", y, rho)

    def noise(self, z: Tensor, rho: Level) -> Tensor:
        return self.ask("noise", z, rho)

    def edm(self, y: Tensor, rho: Level) -> Tensor:
        return self.ask("edm", y, rho)

    def flow(self, w: Tensor, rho: Level) -> Tensor:
        return self.ask("flow", w, rho)


class Bare(Network):
    """x -> weight * x whatever is asked: for counting a library's calls, and for timing its loop."""

    def __init__(self, weight: float | Tensor, most: int | None = None) -> None:
        self.weight, self.most, self.calls = weight, most, 0

    def ask(self, form: str, x: Tensor, level: Level, eta: float = 0.0) -> Tensor:
        self.calls += 1
        if self.most is not None and self.calls > self.most:
            raise BudgetError(f"more than {self.most} network calls")
        return x * self.weight


class Wrapped(Network):
    """The metered score of one run. States of another dtype than the run's are cast to it for the network, and back.

    A level that a library hands over on a CUDA device is read back, which waits for the device: its loop's overhead is measured
    with ``Bare``, which does not look at levels.
    """

    def __init__(self, meter: Meter, dtype: torch.dtype, shape: torch.Size, budget: int | None = None) -> None:
        self.meter, self.dtype, self.shape, self.budget = meter, dtype, shape, budget
        self.path, self.tally = meter.path, Tally()
        self._known: dict[Any, Any] = {}

    def ask(self, form: str, x: Tensor, level: Level, eta: float = 0.0) -> Tensor:
        if self.budget is not None and self.tally.nfe >= self.budget:
            raise BudgetError(f"more than {self.budget} network calls")
        return self.meter.metered(lambda x: self._answer(form, x, level, eta), self.tally)(x)

    def _answer(self, form: str, x: Tensor, level: Level, eta: float) -> Tensor:
        if isinstance(level, Tensor) and level.numel() > 1:
            return self._each(form, x, level, eta)
        level = float(level)
        key = form, level, eta
        if key not in self._known:
            k = _knot(self.path, _by_rho(form), level)
            gain, a, b = _ask(form, k, eta)
            like = x.reshape(self.shape).to(self.dtype)
            (call,) = self.meter.score.at([k], like, {}, self.tally)
            u, v = affine(self.meter.score.row(k), k, a, b)
            self._known[key] = gain, gain * u, v, call
        gain, u, v, call = self._known[key]
        state = x if gain == 1.0 else gain * x
        y = call(state.reshape(self.shape).to(self.dtype)).to(x.dtype).reshape(x.shape)
        return v * y if u == 0.0 else (u * x).add_(y, alpha=v)

    def _each(self, form: str, x: Tensor, level: Tensor, eta: float) -> Tensor:
        """Samples at levels of their own."""
        levels = level.detach().double().cpu().tolist()
        if all(one == levels[0] for one in levels):
            return self._answer(form, x, levels[0], eta)
        knots = [_knot(self.path, _by_rho(form), one) for one in levels]
        rows = []
        for k in knots:
            gain, a, b = _ask(form, k, eta)
            u, v = affine(self.meter.score.row(k), k, a, b)
            rows.append((gain, gain * u, v))
        table = torch.tensor(rows, dtype=x.dtype).to(x.device)
        gain, u, v = (table[:, i].reshape(-1, *(1,) * (x.dim() - 1)) for i in range(3))
        state = (gain * x).reshape(self.shape).to(self.dtype)
        y = self.meter.score.each(knots, state, {}, self.tally)(state)
        return u * x + v * y.to(x.dtype).reshape(x.shape)


@functools.lru_cache(maxsize=4096)
def _knot(path: Path, by_rho: bool, level: float) -> Knot:
    """Kept from run to run: a library's own code would not look it up, and is not to be charged for it."""
    return knots_of(path, [level])[0] if by_rho else path.knot(min(max(level, 0.0), path.T))


def knots_of(path: Path, rhos: Sequence[float]) -> list[Knot]:
    """The knots where sigma / alpha is rho; the path's end where a level lies past it, by rounding, or by churn in the first
    steps: a network knows no level beyond.
    """
    return path.knots(path.time(torch.tensor([-math.log(rho) if rho > 0.0 else math.inf for rho in rhos], dtype=torch.float64)))


def _by_rho(form: str) -> bool:
    return FORMS.get(form, (False,))[0]


def _ask(form: str, k: Knot, eta: float) -> Ask:
    if form == "drift":
        return 1.0, k.dalpha, k.dsigma + (0.5 * eta * eta * k.g2 / k.sigma if eta else 0.0)
    gain, a, b = FORMS[form][1](k)
    return gain, a, (1.0 + eta * eta) * b
