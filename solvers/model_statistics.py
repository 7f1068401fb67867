"""Statistics of a model over lambda, from which DPM-Solver-v3 takes its coefficients (``dpm_v3``): measured, or a Gaussian's.

In y = x/alpha, with rho = sigma/alpha, the probability flow is dy/dlambda = -rho eps = -l y - f, whatever l(lambda), with

    f = rho eps - l y = (1 - l) rho eps - l x0        l = 1: data prediction, l = 0: noise prediction

Zheng et al. (2023) take the l for which f depends least on x, and describe what is left of f along the flow by its mean m and
a rate s. Expectations are over data with noise:

    l = E diag(sigma d eps/dx)                    least E ||df/dy||_F^2
    m = E f                                       (the paper keeps b = m' - s m, the constant of its regression)
    s = E (f - m) f' / E (f - m)^2                least squares of f', the total derivative along the flow, on f

The paper has one l, s and m for every dimension of the data. A sampler that is a table of numbers has one number a level: then
l is the mean over dimensions, m = 0, and s is the regression through the origin over all dimensions at once. On data
N(mu, c^2 I) that loses nothing, whatever mu: l = rho^2/(rho^2 + c^2), f = -l mu, s = l'/l = -2 (1 - l).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sde.errors import InputError, check_numbers
from sde.prediction import Knot, Predictor

from .base import affine
from .grids_fitted import Measurement

Array = Any  # float64 numpy


class Statistics(Protocol):
    """What DPM-Solver-v3 asks: values are (*event), or (N, *event) for an array (N,) of lambdas; event is () for numbers."""

    @property
    def event(self) -> tuple[int, ...]: ...
    @property
    def breaks(self) -> Array:
        """The lambdas where the curves are less smooth: quadrature stops there."""
        ...

    def slope_at(self, lam: float) -> Array:
        """l."""
        ...

    def growth(self, lam: Array) -> tuple[Array, Array]:
        """(L, S): integrals of l and s from wherever."""
        ...

    def mean_at(self, lam: Array) -> Array | None:
        """m, None where it is 0."""
        ...


@dataclass(frozen=True)
class GaussianStatistics:
    """Those of N(mu, std^2 I), any mu, in closed form: with them one step of any length is exact on such data.

    0.5 is the standard deviation of images in [-1, 1]; no network is asked.
    """

    std: float = 0.5

    event = ()
    breaks = np.empty(0)

    def __post_init__(self) -> None:
        check_numbers(std=self.std)
        if not 0.0 < self.std < math.inf:
            raise InputError(f"std={self.std!r}: must be a standard deviation > 0 (0.5 for images in [-1, 1])")

    def slope_at(self, lam: float) -> Array:
        return np.exp(-np.logaddexp(0.0, 2.0 * (lam + math.log(self.std))))

    def growth(self, lam: Array) -> tuple[Array, Array]:
        log = np.logaddexp(0.0, 2.0 * (lam + math.log(self.std)))
        return lam - 0.5 * log, -log

    def mean_at(self, lam: Array) -> Array | None:
        return None


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """Tables of statistics: cubic splines between the levels, constant beyond them.

    lam   : (M,) rising half log-SNRs, M >= 2
    slope : l, (M,) for a sampler that has a table, or (M, *event), one a dimension, shaped like a sample
    rate  : s, of the same shape
    mean  : m, (M, *event), or None for 0; only with one a dimension
    nfe, net_evals : what measuring them has cost
    """

    lam: Array
    slope: Array
    rate: Array
    mean: Array | None = None
    nfe: int = 0
    net_evals: int = 0
    _curves: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("lam", "slope", "rate", "mean")}
        arrays = {name: np.array(v, dtype=np.float64) for name, v in given.items() if v is not None}
        lam, shape = arrays["lam"], arrays["slope"].shape
        if lam.ndim != 1 or len(lam) < 2 or not bool((np.diff(lam) > 0.0).all()):
            raise InputError("lam: give at least two half log-SNRs that rise strictly, from noise to data")
        for name, value in arrays.items():
            if name != "lam" and (value.shape != shape or shape[:1] != lam.shape):
                raise InputError(f"{name} has shape {value.shape}: give all of them ({len(lam)},), or ({len(lam)}, *event)")
            if not bool(np.isfinite(value).all()):
                raise InputError(f"{name} is not finite: statistics are finite numbers")
            object.__setattr__(self, name, value)
        if self.mean is not None and not self.event:
            raise InputError(
                "mean: a table of numbers cannot add a vector: leave it out, or give slope and rate one a dimension"
            )
        object.__setattr__(self, "_curves", {name: Curve(lam, v) for name, v in arrays.items() if name != "lam"})

    def __repr__(self) -> str:
        what = f"of samples {self.event}" if self.event else "one number each"
        return f"ModelStatistics({len(self.lam)} levels, {what})"

    @property
    def event(self) -> tuple[int, ...]:
        return self.slope.shape[1:]

    @property
    def breaks(self) -> Array:
        return self.lam

    def slope_at(self, lam: float) -> Array:
        return self._curves["slope"](lam)

    def growth(self, lam: Array) -> tuple[Array, Array]:
        return self._curves["slope"].integral(lam), self._curves["rate"].integral(lam)

    def mean_at(self, lam: Array) -> Array | None:
        return None if self.mean is None else self._curves["mean"](lam)


class Curve:
    """The cubic spline with parabolic ends through y (M, *event) at rising x (M,), constant outside; its integral from x[0].

    Twice continuously differentiable inside, so that methods of order three keep their order.
    """

    def __init__(self, x: Array, y: Array) -> None:
        h = np.diff(x)
        up = h.reshape(-1, *(1,) * (y.ndim - 1))
        rise = np.diff(y, axis=0) / up
        bend = np.zeros_like(y)  # second derivatives
        if len(x) > 2:
            matrix = np.diag(2.0 * (h[:-1] + h[1:])) + np.diag(h[1:-1], 1) + np.diag(h[1:-1], -1)
            matrix[0, 0] += h[0]
            matrix[-1, -1] += h[-1]
            right = 6.0 * np.diff(rise, axis=0)
            bend[1:-1] = np.linalg.solve(matrix, right.reshape(len(h) - 1, -1)).reshape(right.shape)
            bend[0], bend[-1] = bend[1], bend[-2]
        a, b = y[:-1], rise - up * (2.0 * bend[:-1] + bend[1:]) / 6.0
        c, d = bend[:-1] / 2.0, np.diff(bend, axis=0) / (6.0 * up)
        areas = up * (a + up * (b / 2.0 + up * (c / 3.0 + up * d / 4.0)))
        self.x, self.terms = x, (a, b, c, d)
        self.areas = np.concatenate([np.zeros_like(y[:1]), np.cumsum(areas, axis=0)[:-1]])

    def __call__(self, v: Array) -> Array:
        _, u, (a, b, c, d) = self._at(v)
        return a + u * (b + u * (c + u * d))

    def integral(self, v: Array) -> Array:
        area, u, (a, b, c, d) = self._at(v)
        outside = np.asarray(v - np.clip(v, self.x[0], self.x[-1])).reshape(u.shape)
        return area + u * (a + u * (b / 2.0 + u * (c / 3.0 + u * d / 4.0))) + outside * (a + u * (b + u * (c + u * d)))

    def _at(self, v: Array) -> tuple[Array, Array, list[Array]]:
        """(integral up to the piece that holds v, the way into it, the piece's coefficients); ends where x ends."""
        i = np.clip(np.searchsorted(self.x, v, side="right") - 1, 0, len(self.x) - 2)
        u = np.asarray(np.clip(v, self.x[0], self.x[-1]) - self.x[i])
        return self.areas[i], u.reshape((*u.shape, *(1,) * (self.areas.ndim - 1))), [term[i] for term in self.terms]


def remainder(prediction: Any, k: Knot, slope: Any) -> Any:
    """f at the knot k from its prediction; the slope l is a float, or a tensor that broadcasts against the state."""
    rho = k.sigma / k.alpha
    if isinstance(slope, float):
        return prediction.combine(-slope, (1.0 - slope) * rho)
    return ((1.0 - slope) * rho) * prediction.eps - slope * prediction.x0


def statistics(
    score: Predictor,
    x0: Tensor,
    *,
    levels: int = 48,
    per_dimension: bool = False,
    repeats: int = 1,
    seed: int = 0,
    start: float | None = None,
    stop: float | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> ModelStatistics:
    """l and s (and m) of a model, measured on data at ``levels`` equal steps of lambda.

    x0      : (B, *event) data, as the network was trained on; some hundreds
    per_dimension : the paper's statistics, one a dimension; the sampler has no table then, and is bound to this event shape
    repeats : noises (and signs) a sample. All levels share them, so that the curves are smooth
    start, stop : the times it is measured between (default T and t_min), where lambda is finite

    l from one vector v of random signs a sample: the mean of v sigma d(eps v)/dx is the diagonal. f' by the central difference
    over half a level along the flow, one-sided at the ends. Costs 4 levels repeats network calls, one in four with its
    gradient in x: the network must be differentiable there.
    """
    measured = Measurement(score, x0, levels, repeats, seed, start, stop, conditions)
    evaluator, lam = measured.evaluator, measured.lam.numpy()
    signs, v = torch.Generator(device="cpu").manual_seed(seed), x0

    def mean(v: Tensor) -> Tensor:
        return v.detach().double().mean(0) if per_dimension else v.detach().double().mean()

    def slopes(knots: list[Knot], i: int, eps: Tensor) -> Tensor:
        nonlocal v
        k = knots[i]
        if i == 0:
            v = torch.randint(0, 2, x0.shape, generator=signs).mul_(2).sub_(1).to(x0)
        with torch.inference_mode(False), torch.enable_grad():
            x = (k.alpha * x0.detach() + k.sigma * eps).requires_grad_()
            y = evaluator.output(x, k)
            gradient = torch.autograd.grad(y, x, v, allow_unused=True)[0] if y.requires_grad else None
        if gradient is None:
            raise InputError("the network's output has no gradient in x: it must not detach x or run under no_grad here")
        of_x, of_y = affine(score.row(k), k, 0.0, 1.0)  # eps = of_x x + of_y y
        return mean(k.sigma * (of_x + of_y * gradient * v))

    slope = measured.average(slopes, levels).numpy()
    curve, width = Curve(lam, slope), (lam[1] - lam[0]) / 4.0

    def at(x: Tensor, k: Knot) -> tuple[Tensor, Tensor]:
        value, prediction = curve(k.lam), evaluator.predict(x, k)
        f = remainder(prediction, k, torch.from_numpy(value).to(x) if value.ndim else float(value))
        return f.double(), prediction.eps

    def moments(knots: list[Knot], i: int, eps: Tensor) -> Tensor:
        k = knots[i]
        x = k.alpha * x0 + k.sigma * eps
        f, predicted = at(x, k)
        y, noise = x / k.alpha, (k.sigma / k.alpha) * predicted  # y' = -noise
        ends = [score.path.knot_at(float(np.clip(k.lam + d, lam[0], lam[-1]))) for d in (-width, width)]
        low, high = (at(q.alpha * (y - (q.lam - k.lam) * noise), q)[0] for q in ends)
        rate = (high - low) / (ends[1].lam - ends[0].lam)
        return torch.stack([mean(v) for v in (f, rate, f * f, f * rate, noise.double() ** 2)])

    m, dm, ff, fr, size = measured.average(moments, levels).unbind(1)
    spread, together = (ff - m * m, fr - m * dm) if per_dimension else (ff, fr)
    rate = together / (spread + 1e-8 * size)  # 0 where f is rounding: then it does not matter
    tally = evaluator.tally
    return ModelStatistics(lam, slope, rate.numpy(), m.numpy() if per_dimension else None, tally.nfe, tally.net_evals)
