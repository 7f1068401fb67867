"""Where the probability flow ends: exact, or solved so finely that its own error is known and small.

With r = hypot(alpha, sigma), th = atan2(sigma, alpha) and u = x / r, the flow of every path is

    du/dth = cos(th) eps - sin(th) x0,

finite on all of [0, pi/2], also where alpha = 0 and where sigma = 0. Two ways to solve it, each with a second, cheaper solution
that says how far to trust the first:

    tight   torchdiffeq's dopri8, the tolerance held in every sample; again at ten times the tolerance
    fine    classical Runge-Kutta, steps equal in the clock of ``sde.noise``; again in half the steps

``denoise``: not the flow's end but alpha x0 that the score predicts there, a last step to sigma = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sde.errors import InputError
from sde.noise import clock
from sde.path import Path
from sde.prediction import Knot, Predictor, Tally, affine


class End(NamedTuple):
    """End points x (B, *shape), and how far each may be from the truth, (B,) float64: root mean square over its numbers."""

    x: Tensor
    error: Tensor


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample's numbers: (B, *shape) -> (B,) float64."""
    return x.double().reshape(len(x), -1).square().mean(1).sqrt()


def tight(score: Predictor, x: Tensor, start: float, stop: float, tolerance: float = 1e-10, denoise: bool = False) -> End:
    """End points by dopri8 at rtol = atol = tolerance (of u, whose size is that of a unit normal); x in float64."""
    from torchdiffeq import odeint

    flow = _Flow(score, start, stop)
    ends = torch.tensor([flow.first, flow.last], dtype=torch.float64, device=x.device)
    found = []
    with flow.running():
        for factor in (10.0, 1.0):
            # step_t: not past the end, where a path may not be defined
            options = {"step_t": ends[-1:], "norm": _worst, "dtype": torch.float64}
            control = {"rtol": factor * tolerance, "atol": factor * tolerance, "method": "dopri8", "options": options}
            u = torch.as_tensor(odeint(lambda th, u: flow(float(th), u), x / flow.radius(flow.start), ends, **control)[-1])
            found.append(flow.end(u, denoise))
    return End(found[1], rms(found[1] - found[0]))


def fine(score: Predictor, x: Tensor, start: float, stop: float, steps: int = 128, denoise: bool = False) -> End:
    """End points by classical Runge-Kutta in ``steps`` steps, 4 calls each, in x's dtype."""
    if steps < 2:
        raise InputError(f"steps={steps}: the error is told by half the steps; give at least 2")
    flow = _Flow(score, start, stop)
    with flow.running():
        half, full = (flow.end(_runge_kutta(flow, x, n), denoise) for n in (steps // 2, steps))
    return End(full, rms(full - half))


def _runge_kutta(flow: _Flow, x: Tensor, steps: int) -> Tensor:
    """u at the last time."""
    angles = flow.angles(steps)
    u = x / flow.radius(flow.start)
    for a, b in pairwise(angles):
        h, middle = b - a, 0.5 * (a + b)
        k1 = flow(a, u)
        k2 = flow(middle, u + 0.5 * h * k1)
        k3 = flow(middle, u + 0.5 * h * k2)
        k4 = flow(b, u + h * k3)
        u = u + (h / 6.0) * (k1 + 2.0 * (k2 + k3) + k4)
    return u


def _worst(error: Tensor) -> Tensor:
    """The worst sample's error, so that no step depends on how many easy samples there are."""
    return rms(error).max()


class _Flow:
    """du/dth at an angle, between two times of a score's path."""

    def __init__(self, score: Predictor, start: float, stop: float) -> None:
        self.score, self.path, self.tally = score, score.path, Tally()
        self.start, self.stop = self.path.knots([start, stop])
        self.first, self.last = (math.atan2(k.sigma, k.alpha) for k in (self.start, self.stop))

    @contextmanager
    def running(self) -> Iterator[None]:
        """No gradients, and a network in the mode that its score asks for."""
        with torch.no_grad(), getattr(self.score, "running", nullcontext)():
            yield

    @staticmethod
    def radius(k: Knot) -> float:
        return math.hypot(k.alpha, k.sigma)

    def knot(self, angle: float) -> Knot:
        # solvers round times, and ask just inside the ends
        close = 1e-15 * max(self.first, self.last)
        for end, k in ((self.first, self.start), (self.last, self.stop)):
            if abs(angle - end) <= close:
                return k
        return self.path.knot_at(-math.log(math.tan(angle)))

    def angles(self, steps: int) -> list[float]:
        """steps + 1 angles, equally spaced in the clock of lambda."""
        a, b = clock(self.start.lam), clock(self.stop.lam)
        inner = [a + (b - a) * i / steps for i in range(1, steps)]
        lams = [4.0 * w / math.sqrt(1.0 - w * w) for w in (2.0 * c - 1.0 for c in inner)]  # the clock's inverse
        return [self.first, *(math.atan(math.exp(-lam)) for lam in lams), self.last]

    def end(self, u: Tensor, denoise: bool) -> Tensor:
        """x at the last time, or alpha x0 predicted there."""
        k = self.stop
        x = u * self.radius(k)
        if not denoise:
            return x
        (call,) = self.score.at([k], x, {}, self.tally)
        a, b = affine(self.score.row(k), k, k.alpha, 0.0)
        return a * x + b * call(x)

    def __call__(self, angle: float, u: Tensor) -> Tensor:
        k = self.knot(angle)
        r = self.radius(k)
        x = r * u
        (call,) = self.score.at([k], x, {}, self.tally)
        a, b = affine(self.score.row(k), k, -k.sigma / r, k.alpha / r)
        return a * x + b * call(x)


def between(path: Path, start: float | None, stop: float | None, default: tuple[float, float]) -> tuple[float, float]:
    """The times to use, checked: 0 <= stop < start <= T."""
    a, b = (default[i] if v is None else float(v) for i, v in enumerate((start, stop)))
    if not 0.0 <= b < a <= path.T:
        raise InputError(f"start={a:g}, stop={b:g}: sampling runs down from start to stop, both in [0, {path.T:g}]")
    return a, b
