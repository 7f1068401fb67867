"""Grids fitted to a model, or to a solver: functions that return a grid, to be given to ``sample(grid=...)``.

``entropic``, ``rescaled_entropic`` and ``score_optimal`` measure a network on data, once for all numbers of steps, and
count its calls (``.nfe``). ``dmn`` is itself a grid, and asks no network. None of them is a row of GRIDS, which need no
model and no seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sde.errors import InputError
from sde.path import Path
from sde.prediction import Knot, Predictor

from .base import Evaluator
from .grids_base import ends, equal, need


@dataclass(frozen=True, eq=False)
class FittedGrid:
    """Equal steps of phi, the integral of a density over lambda; called like any grid, on any path.

    lam     : (M,) rising half log-SNRs
    density : (M,) d phi / d lambda > 0 there. Its logarithm is linear in between, and goes on with its last slopes outside.
    nfe, net_evals : what measuring it has cost
    """

    lam: Tensor
    density: Tensor
    nfe: int = 0
    net_evals: int = 0
    _slope: Tensor = field(init=False, repr=False)
    _phi: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lam, density = (torch.as_tensor(v, dtype=torch.float64).detach().cpu() for v in (self.lam, self.density))
        if lam.dim() != 1 or lam.shape != density.shape or len(lam) < 2:
            raise InputError(f"lam and density have shapes {tuple(lam.shape)}, {tuple(density.shape)}: give (M,) each, M >= 2")
        if not bool((lam[1:] > lam[:-1]).all()):
            raise InputError("lam must rise strictly, from noise to data")
        bad = ~((density > 0.0) & density.isfinite())
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise InputError(
                f"density[{i}]={float(density[i]):g} at lambda={float(lam[i]):g}: must be finite and > 0 for steps to go there"
            )
        step = lam[1:] - lam[:-1]
        slope = (density[1:] / density[:-1]).log() / step
        object.__setattr__(self, "lam", lam)
        object.__setattr__(self, "density", density)
        object.__setattr__(self, "_slope", slope)
        area = density[:-1] * _growth(slope, step)
        object.__setattr__(self, "_phi", torch.cat([torch.zeros(1, dtype=torch.float64), area.cumsum(0)]))

    def phi(self, lam: Tensor) -> Tensor:
        i = self._piece(self.lam, lam)
        return self._phi[i] + self.density[i] * _growth(self._slope[i], lam - self.lam[i])

    def lam_at(self, phi: Tensor) -> Tensor:
        """The inverse of ``phi``."""
        i = self._piece(self._phi, phi)
        y, k = (phi - self._phi[i]) / self.density[i], self._slope[i]
        flat = (k * y).abs() < 1e-12
        return self.lam[i] + torch.where(flat, y, torch.log1p(k * y) / torch.where(flat, 1.0, k))

    def _piece(self, edges: Tensor, value: Tensor) -> Tensor:
        return (torch.searchsorted(edges, value.contiguous(), right=True) - 1).clamp(0, len(edges) - 2)

    def __call__(self, path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
        return equal(path, n, start, stop, lambda t: self.phi(path.lam(t)), lambda u: path.time(self.lam_at(u)))


def _growth(k: Tensor, x: Tensor) -> Tensor:
    """(exp(k x) - 1) / k."""
    flat = (k * x).abs() < 1e-12
    return torch.where(flat, x, torch.expm1(k * x) / torch.where(flat, 1.0, k))


# --- from a model's error ---------------------------------------------------------------------------------------------


def rescaled_entropic(score: Predictor, x0: Tensor, **measure: Any) -> FittedGrid:
    """Equal steps of int eps^2 / rho^2 d rho, where eps^2(t) = E ||D(x_t) - x_0||^2 is the network's own denoising error and
    rho = sigma/alpha (Stancevic et al. 2025, "Entropic time schedulers", rescaled).

    On Gaussian data N(0, c^2) it is ``gaussian_optimal`` with that c: eps^2 = c^2 rho^2 / (c^2 + rho^2). Keyword arguments
    are those of ``denoising_error``; costs ``levels * repeats`` network calls, once.
    """
    return _entropic(1.0, *denoising_error(score, x0, **measure))


def entropic(score: Predictor, x0: Tensor, **measure: Any) -> FittedGrid:
    """Equal steps of int eps^2 / rho^3 d rho, the entropy of x_0 given x_t (up to a constant: the I-MMSE relation), with eps^2
    as in ``rescaled_entropic``. Near data eps is about proportional to rho, so that the integral grows like log rho and the
    grid is ``log_snr`` there.
    """
    return _entropic(2.0, *denoising_error(score, x0, **measure))


def _entropic(power: float, lam: Tensor, error: Tensor, nfe: int, net_evals: int) -> FittedGrid:
    return FittedGrid(lam, error * torch.exp(power * (lam - lam.mean())), nfe, net_evals)


def denoising_error(
    score: Predictor,
    x0: Tensor,
    *,
    levels: int = 64,
    repeats: int = 1,
    seed: int = 0,
    start: float | None = None,
    stop: float | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor, int, int]:
    """(lambda, mean of ||D(x_t) - x_0||^2 per number of x, network calls, evaluations) at ``levels`` equal steps of lambda.

    x0      : (B, *event) data, as the network was trained on; a few hundred are enough for a grid
    repeats : noises a sample. All levels share them, so that the curve is smooth
    start, stop : the times it is measured between (default T and t_min), where lambda is finite
    """
    measured = Measurement(score, x0, levels, repeats, seed, start, stop, conditions)

    def square(knots: list[Knot], i: int, eps: Tensor) -> Tensor:
        k = knots[i]
        return (measured.evaluator.predict(k.alpha * x0 + k.sigma * eps, k).x0 - x0).double().square().mean()

    error = measured.average(square, levels)
    return measured.lam, error, measured.evaluator.tally.nfe, measured.evaluator.tally.net_evals


def score_optimal(score: Predictor, x0: Tensor, *, levels: int = 64, **measure: Any) -> FittedGrid:
    """Equal steps of int rho (E ||d score / d rho||^2)^(1/2) d rho at fixed x/alpha, by differences between neighbouring
    levels (Williams et al. 2024, "Score-optimal diffusion schedules", the corrector's cost with velocity sigma).

    In the coordinates x/alpha and rho = sigma/alpha, where the paper's image models live, so that it is the same grid on every
    path. Costs 2 (levels - 1) repeats network calls, once; the other arguments are those of ``denoising_error``.
    """
    measured = Measurement(
        score, x0, levels, **{"repeats": 1, "seed": 0, "start": None, "stop": None, "conditions": None} | measure
    )

    def speed(knots: list[Knot], i: int, eps: Tensor) -> Tensor:
        # both scores at one x of the level half-way: an error of second order, where x of either end leaves one of first
        pair = knots[i : i + 2]
        middle = math.sqrt(math.prod(k.sigma / k.alpha for k in pair))
        x = x0 + middle * eps
        here, there = (measured.evaluator.predict(k.alpha * x, k).eps * (k.alpha / k.sigma) for k in pair)
        return (middle * (there - here)).double().square().mean()

    cost = measured.average(speed, levels - 1).sqrt()
    lam, tally = measured.lam, measured.evaluator.tally
    return FittedGrid(0.5 * (lam[1:] + lam[:-1]), cost / (lam[1:] - lam[:-1]), tally.nfe, tally.net_evals)


class Measurement:
    """Means over noisy data at levels of equal steps in lambda."""

    def __init__(
        self,
        score: Predictor,
        x0: Tensor,
        levels: int,
        repeats: int,
        seed: int,
        start: float | None,
        stop: float | None,
        conditions: Mapping[str, Any] | None,
    ) -> None:
        if not isinstance(score, Predictor):
            raise InputError(f"score is a {type(score).__name__}: wrap the network first, Score(network, path, predicts='eps')")
        if not (isinstance(x0, Tensor) and x0.dim() >= 2 and len(x0) > 0 and x0.dtype.is_floating_point):
            raise InputError(f"x0: give a floating tensor (B, *event) of data, got {getattr(x0, 'shape', type(x0).__name__)}")
        need(isinstance(levels, int) and levels >= 3, "levels", levels, "must be an int >= 3, e.g. 64")
        need(isinstance(repeats, int) and repeats >= 1, "repeats", repeats, "must be an int >= 1")
        times = equal(score.path, levels - 1, start, stop, score.path.lam, score.path.time)
        self.knots, self.lam = score.path.knots(times), score.path.lam(times)
        if not bool(self.lam.isfinite().all()):
            raise InputError(f"stop={stop}: lambda is infinite there; measure between times where it is finite")
        self.score, self.x0, self.repeats, self.seed = score, x0, repeats, seed
        self.evaluator = Evaluator(score, x0, conditions or {})

    def average(self, measure: Callable[[list[Knot], int, Tensor], Tensor], count: int) -> Tensor:
        """The mean over ``repeats`` noises of ``measure(knots, i, eps)``, a float64 number or array, for every i < count."""
        total: Any = 0.0
        # data may have been drawn from a generator of the same seed: noise that equals them would be no noise
        normal = torch.Generator(device="cpu").manual_seed((0x5DEECE66D * (2 * self.seed + 1)) % 2**63)
        running = getattr(self.score, "running", nullcontext)
        with torch.no_grad(), running():
            for _ in range(self.repeats):
                eps = torch.randn(self.x0.shape, generator=normal, dtype=torch.float64).to(self.x0)
                total = total + torch.stack([measure(self.knots, i, eps).cpu() for i in range(count)])
        good = total.reshape(count, -1).isfinite().all(1)
        if not bool(good.all()):
            i = int((~good).nonzero()[0])
            raise InputError(f"the network's output is not finite at t={self.knots[i].t:g}: measure between other times")
        return total / self.repeats


# --- from a solver's error bound --------------------------------------------------------------------------------------


def dmn(
    path: Path,
    n: int,
    start: float | None = None,
    stop: float | None = None,
    order: int = 3,
    power: float = 1.0,
) -> Tensor:
    """The grid that minimises a bound of the error of an x0-predicting multistep solver (DM-NonUniform, Xue et al. 2024), for
    this number of steps. No network calls; some 0.1 s at 5 steps, 1 s at 20.

    With w_sj = int e^lambda L_j d lambda the weights of step s (L_j of degree order - 1, lower in the first and last steps)
    and e_i = sigma_i^power / alpha_i the error of a prediction at knot i, it minimises

        sum_i e_i |sum_s w_si|  +  sum over the first three steps and the last (sum_j (e_j w_sj)^2)^(1/2)

    in which the first sum has the other steps only. sigma and alpha are those of the VP form of the noise level,
    sigma^2 + alpha^2 = 1. power is 1 for pixels and 2 for latents in the paper. The bound knows nothing of the data; grids
    that are tuned to a model serve better where they can be had.
    """
    need(order in (1, 2, 3), "order", order, "must be 1, 2 or 3, the order of the multistep solver")
    need(math.isfinite(power), "power", power, "must be finite: 1 for pixels, 2 for latents")

    def law(a: float, b: float, m: int) -> Tensor:
        return path.time(torch.tensor(_dmn_knots(float(path.lam(a)), float(path.lam(b)), m, order, power), dtype=torch.float64))

    return ends(path, n, start, stop, law)


def dmn_bound(lam: Any, order: int = 3, power: float = 1.0) -> Tensor:
    """The bound that ``dmn`` minimises, for rising knots lam (n + 1,); differentiable."""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    n = len(lam) - 1
    error = torch.sigmoid(-2.0 * lam) ** (0.5 * power) / torch.sigmoid(2.0 * lam).sqrt()
    step = torch.arange(n)
    points = torch.minimum(step + 1, n - step).clamp(max=order)
    shared, alone = torch.zeros_like(lam), torch.zeros((), dtype=torch.float64)
    for k in range(1, order + 1):
        steps = step[points == k]
        index = steps[:, None] + torch.arange(1 - k, 1)
        terms = error[index] * _weights(lam[steps], lam[steps + 1], lam[index])
        own = (steps < 3) | (steps == n - 1)
        alone = alone + terms[own].square().sum(1).sqrt().sum()
        shared = shared.index_add(0, index[~own].flatten(), terms[~own].flatten())
    return shared.abs().sum() + alone


_NODES, _GAUSS = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(10))


def _weights(low: Tensor, high: Tensor, nodes: Tensor) -> Tensor:
    """int_low^high e^u L_j(u) du for the Lagrange polynomials of ``nodes``: (S,), (S,), (S, k) -> (S, k)."""
    half = 0.5 * (high - low)[:, None]
    u = low[:, None] + half * (_NODES + 1.0)
    measure = half * torch.exp(u) * _GAUSS
    basis = []
    for j in range(nodes.shape[1]):
        others = [m for m in range(nodes.shape[1]) if m != j]
        ratios = [(u - nodes[:, m : m + 1]) / (nodes[:, j : j + 1] - nodes[:, m : m + 1]) for m in others]
        basis.append(math.prod(ratios, start=measure).sum(1))
    return torch.stack(basis, 1)


@lru_cache(maxsize=64)
def _dmn_knots(first: float, last: float, n: int, order: int, power: float) -> tuple[float, ...]:
    """The best of descents from three grids: knots are shares of the way, softmax of free numbers."""
    ramp = torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)
    roots = [torch.exp(torch.tensor(-lam / 7.0, dtype=torch.float64)) for lam in (first, last)]
    karras = -7.0 * torch.log(roots[0] + ramp * (roots[1] - roots[0]))
    starts = [first + (last - first) * ramp, karras]
    found = [
        _descend(knots, first, last, order, power)
        for knots in ([*starts, 0.5 * (starts[0] + starts[1])] if n > 1 else starts[:1])
    ]
    return tuple(min(found, key=lambda knots: float(dmn_bound(knots, order, power))).tolist())


def _descend(knots: Tensor, first: float, last: float, order: int, power: float) -> Tensor:
    if len(knots) == 2:
        return knots
    free = (knots[1:] - knots[:-1]).log().requires_grad_()

    def at(free: Tensor) -> Tensor:
        way = torch.cat([torch.zeros(1, dtype=torch.float64), torch.softmax(free, 0).cumsum(0)])
        return first + (last - first) * way

    best, value = knots, float(dmn_bound(knots, order, power))
    for _ in range(6):  # the bound has kinks: each descent starts anew from where the last one got stuck
        search = torch.optim.LBFGS([free], max_iter=60, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def closure(search: torch.optim.LBFGS = search) -> Tensor:
            search.zero_grad()
            loss = dmn_bound(at(free), order, power).log()
            loss.backward()
            return loss

        search.step(closure)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            now = at(free)
            bound = float(dmn_bound(now, order, power))
        if not bound < value * (1.0 - 1e-9):
            break
        best, value = now.clone(), bound
    return best
