"""Measurements of samplers that have no table, and of laws that are not an order.

Each returns (declared, measured, constant); ``PROBES`` holds those that a row of SOLVERS names as its theory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scores import Gaussian
from sde import VP, ReverseSDE
from sde.noise import Draws, Source
from sde.path import Path
from sde.prediction import Knot
from solvers import exact_law, integrate, sample, trace
from solvers.catalogue import SOLVERS
from solvers.convergence import warped_grid

from .truth import Mixture1D, Probe, consistent_gaussian, probe

Measured = tuple[float, float, float | None]


def kinds_of(name: str) -> tuple[str, ...]:
    """The orders of a solver without a table that integrates the reverse SDE in t: read off by probing."""
    solver = SOLVERS[name].solver
    if solver.linear or getattr(solver, "adaptive", False):
        return ()
    return tuple(kind for kind in ("weak", "strong") if getattr(solver, kind) is not None)


def by_coupling(name: str, kind: str) -> bool:
    """Whether this is the strong order of a solver that draws the area of the Brownian path, which no table tells of."""
    return kind == "strong" and getattr(SOLVERS[name].solver, "areas", False)


def measure(name: str, kind: str) -> Measured:
    if by_coupling(name, kind):
        return strong_order_by_coupling(name)
    if kind in ("weak", "strong"):
        return order_by_probing(name, kind)
    return PROBES[kind](name)


# --- weak and strong order by probing ---------------------------------------------------------------------------------


def order_by_probing(name: str, kind: str, steps: tuple[int, ...] = (20, 40, 80)) -> Measured:
    """An affine sampler without a table: its exact map is read off by probing, hence its errors, with no Monte Carlo.

    A solver that draws two normals a step (W and the area H) is compared with the exact solution's parts along both.
    """
    entry = SOLVERS[name]
    two = getattr(entry.solver, "areas", False)
    path, mean, variance = VP(), 0.7, 0.3
    score = Gaussian(path, torch.tensor([mean], dtype=torch.float64), var=variance)
    errors = []
    for n in steps:
        grid = np.linspace(0.6, 0.2, n + 1).tolist()
        run = lambda start, grid=grid: integrate(name, ReverseSDE(path, score, 1.0), start, grid, noise=Probe()).x  # noqa: E731
        const, gain, noise = (v.squeeze(-1).numpy() for v in probe(run, 1, (2 if two else 1) * n))
        s, t = path.knot(grid[0]), path.knot(grid[-1])
        start = s.alpha**2 * variance + s.sigma**2
        end = t.alpha**2 * variance + t.sigma**2
        bias = const + gain * s.alpha * mean - t.alpha * mean
        if kind == "weak":
            errors.append(math.hypot(bias, math.sqrt(gain**2 * start + np.sum(noise**2)) - math.sqrt(end)))
            continue
        first, second, rest = reverse_constants(path, variance, grid)
        phi = (s.alpha / t.alpha) * end / start
        missed = (noise[0::2] - first, noise[1::2] - second) if two else (noise - first, -second)
        errors.append(math.sqrt((gain - phi) ** 2 * start + sum(np.sum(m**2) for m in missed) + rest + bias**2))
    declared = float(getattr(entry.solver, kind))
    return declared, math.log2(errors[-2] / errors[-1]), errors[-1] * steps[-1] ** declared


def reverse_constants(path: Path, variance: float, grid: list[float]) -> tuple[Any, Any, float]:
    """kappa of z = dW/sqrt(h) and of the normalised H for every step in t, and the exact law's remainder; eta = 1, one
    direction.

    Phi(T, u) = (alpha_u/alpha_T) S_T/S_u on Gaussian data; quadrature in t, independent of the engine's (which works in
    lambda).
    """
    nodes, weights = np.polynomial.legendre.leggauss(20)
    spread = lambda t: (path.alpha(t) ** 2 * variance + path.sigma(t) ** 2).numpy()  # noqa: E731
    end = grid[-1]
    first, second, total = [], [], 0.0
    for a, b in itertools.pairwise(grid):
        h = a - b
        u = 0.5 * (a + b) - 0.5 * h * nodes  # tau = a - u runs from 0 to h
        w = 0.5 * h * weights
        phi = (path.alpha(u).numpy() / float(path.alpha(end))) * float(spread(end)) / spread(u)
        g = path.g(u).numpy()
        psi = ((h - (a - u)) / h - 0.5) / math.sqrt(h / 12.0)
        first.append(np.sum(w * phi * g) / math.sqrt(h))
        second.append(np.sum(w * phi * g * psi))
        total += np.sum(w * (phi * g) ** 2)
    explained = sum(x**2 for x in first) + sum(x**2 for x in second)
    return np.array(first), np.array(second), max(total - explained, 0.0)


class _Coarse(Source):
    """Normals of coarse steps made from one fine path: increments W and areas U of N steps h, m of them to a coarse step."""

    def __init__(self, w: Tensor, u: Tensor, h: float, m: int) -> None:
        self.w, self.u, self.h, self.m = w, u, h, m

    def open(self, shape: Sequence[int], dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Draws:
        return _CoarseDraws(self)


class _CoarseDraws(Draws):
    def __init__(self, path: _Coarse) -> None:
        self.path = path

    def initial(self, out: Tensor | None = None) -> Tensor:
        return torch.zeros_like(self.path.w[0])

    def normal(self, k: int, s: Knot, t: Knot, like: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        j, second = divmod(k, 2)
        m, h = self.path.m, self.path.h * self.path.m
        w, u = self.path.w[j * m : (j + 1) * m], self.path.u[j * m : (j + 1) * m]
        total = w.sum(0)
        if not second:
            return total / math.sqrt(h)
        area = (u + self.path.h * (w.cumsum(0) - w)).sum(0)
        return (area / h - 0.5 * total) / math.sqrt(h / 12.0)


def strong_order_by_coupling(name: str, fine: int = 640, batch: int = 1500) -> Measured:
    """A solver that draws W and the area H a step, on the mixture: coarse runs and a fine one on the same Brownian paths.

    On Gaussian data, where the drift is affine, the leading term of its strong error vanishes.
    """
    path = VP()
    mixture = Mixture1D(path)
    h = 0.2 / fine
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(fine, batch, 1, generator=generator, dtype=torch.float64) * math.sqrt(h)
    u = h * (0.5 * w + torch.randn(fine, batch, 1, generator=generator, dtype=torch.float64) * math.sqrt(h / 12.0))
    x = mixture.score.sample(batch, t=0.3, seed=1).double()

    def run(steps: int) -> Tensor:
        times = np.linspace(0.3, 0.1, steps + 1).tolist()
        return integrate(name, ReverseSDE(path, mixture.score, 1.0), x, times, noise=_Coarse(w, u, h, fine // steps)).x

    reference = run(fine)
    steps = (20, 40, 80)
    errors = [float((run(n) - reference).square().mean().sqrt()) for n in steps]
    declared = float(SOLVERS[name].solver.strong or 0.0)
    return declared, math.log2(errors[-2] / errors[-1]), errors[-1] * steps[-1] ** declared


# --- step control -----------------------------------------------------------------------------------------------------


def tolerance_slope(name: str) -> Measured:
    """The slope of log error over log tolerance of an adaptive ODE solver, over the last two decades of tolerances that are
    cheap, on 32 samples: 16 of Gaussian data and 16 of the mixture, whose log errors are averaged (one run in a single
    problem may be lucky by half a decade). For an SDE the ratio of its variance to the exact one.

    A pair of orders p and p - 1 that advances by the higher one has steps h ~ tol^(1/p) and an error ~ h^p: slope 1.
    """
    solver: Any = SOLVERS[name].solver
    path = VP()
    if solver.takes_eta:
        return 1.0, _adaptive_variance(name, path), None
    law, mixture = (
        Gaussian(path, torch.tensor([0.5, -1.0, 2.0]).double(), var=torch.tensor([0.04, 1.0, 0.3]).double()),
        Mixture1D(path),
    )
    s, t = path.knots(path.time([-1.0, 3.0]).tolist())
    starts = [score.sample(16, t=s.t, seed=1).double() for score in (law, mixture.score)]
    ends = [law.flow(starts[0], s.t, t.t), mixture.flow(starts[1][:, 0], s, t)[:, None]]
    tolerances, errors, calls = list[float](), list[float](), 0
    while calls < 480 and len(errors) < 11:  # a decade at a time, as far as it is cheap: a control is asymptotic late
        tolerance, total, calls = 10.0 ** (-3 - len(errors)), 0.0, 0
        for score, x, exact in zip((law, mixture.score), starts, ends, strict=True):
            out = integrate(replace(solver, rtol=tolerance, atol=tolerance, max_nfe=100_000), score, x, [s.t, t.t])
            total += 0.5 * math.log((out.x - exact).square().mean().sqrt())
            calls = max(calls, out.nfe)
        tolerances.append(math.log(tolerance))
        errors.append(total)
    return 1.0, float(np.polyfit(tolerances[-3:], errors[-3:], 1)[0]), None


def _adaptive_variance(name: str, path: Path, n: int = 4000) -> float:
    solver: Any = SOLVERS[name].solver
    score = Gaussian(path, torch.zeros(1, dtype=torch.float64), var=0.3)
    out = sample(score, (n, 1), solver=replace(solver, rtol=1e-2, atol=1e-2), eta=1.0, steps=10, start=0.6, stop=0.1)
    k = path.knot(0.1)
    return float(out.x.var()) / (k.alpha**2 * 0.3 + k.sigma**2)


# --- Langevin samplers ------------------------------------------------------------------------------------------------


def langevin_floor(name: str) -> Measured:
    """The excess variance over the exact one, in units of ``solver.floor`` sigma^2, with many levels.

    The stationary variance of v -> (1 - c/S)^2 v + 2c is S/(1 - c/(2S)) = S + c/2 + ..., c/sigma^2 = size/2 or 2 snr^2. A
    rule that looks at norms tends to the linear one in high dimension: the two are run on the same noise there.
    """
    solver: Any = SOLVERS[name].solver
    path = VP()
    score = Gaussian(path, torch.zeros(1, dtype=torch.float64), var=1.0)
    linear = solver.linearised
    plan = trace(linear, path, warped_grid(path, 4000, -1.0, 0.5), eta=SOLVERS[name].eta)
    k = plan.grid[-1]
    excess = float(exact_law(plan, score).variance) - (k.alpha**2 + k.sigma**2)
    if solver is not linear:
        grid = warped_grid(path, 200, -1.0, 0.5)
        wide = Gaussian(path, torch.zeros(60_000, dtype=torch.float64), var=1e-6)  # so that |score| is sqrt(d) / sigma_t
        start = wide.sample(1, t=grid[0], seed=0).double()
        problem = ReverseSDE(path, wide, SOLVERS[name].eta)
        pair = [float(integrate(s, problem, start, grid, seed=0).x.var()) for s in (solver, linear)]
        excess += pair[0] - pair[1]
    return 1.0, excess / (solver.floor * k.sigma**2), None


# --- few-step samplers ------------------------------------------------------------------------------------------------


def exactness(name: str) -> Measured:
    """2-Wasserstein distance to the exact marginal, over 1, 2 and 5 steps, with the exact jumps of Gaussian data as network.

    The run is affine in its start and its normals, so its law is read off by probing: no Monte Carlo.
    """
    solver: Any = SOLVERS[name].solver
    path, mean, variance = VP(), 0.7, 0.3
    worst = 0.0
    for n in (1, 2, 5):
        grid = np.linspace(0.9, 0.1, n + 1).tolist()
        knots = path.knots(grid)
        score = consistent_gaussian(path, mean, variance, {s.t: solver.landing(path, t) for s, t in itertools.pairwise(knots)})
        run = lambda x, score=score, grid=grid: integrate(name, score, x, grid, noise=Probe()).x  # noqa: E731
        const, gain, noise = (v.squeeze(-1) for v in probe(run, 1, n))
        s, t = knots[0], knots[-1]
        start, end = (k.alpha**2 * variance + k.sigma**2 for k in (s, t))
        bias = float(const + gain * s.alpha * mean) - t.alpha * mean
        spread = math.sqrt(float(gain**2 * start + (noise**2).sum()))
        worst = max(worst, math.hypot(bias, spread - math.sqrt(end)))
    return 0.0, worst, None


PROBES: dict[str, Callable[[str], Measured]] = {
    "tolerance": tolerance_slope,
    "floor": langevin_floor,
    "exact": exactness,
}
