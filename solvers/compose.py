"""Solvers made of solvers: correctors at one noise level, and noise that is added back (ancestral, churn, restart).

Everything here is written in rho = sigma/alpha, the noise level of x/alpha, so that it holds on any path: noise of variance
rho_t^2 - rho_d^2 added to x_d/alpha_d takes the exact law at level d to the exact law at level t. Hence a method that adds
noise so keeps the weak order of the solver that it wraps.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sde.errors import InputError, PathError, check_counts, check_numbers
from sde.path import Path
from sde.prediction import Knot, Prediction

from .base import Form, Noise, Problem, Solver, Step


def rho(k: Knot) -> float:
    """sigma / alpha, infinite where alpha = 0."""
    return k.sigma / k.alpha if k.alpha > 0.0 else math.inf


def renoise(x: Form, low: Knot, high: Knot, noise: Form) -> Form:
    """The exact law at ``low`` to the exact law at ``high``: x/alpha gains noise of variance rho_high^2 - rho_low^2."""
    if high.alpha == 0.0:
        return high.sigma * noise
    spread = high.alpha * math.sqrt(max(rho(high) ** 2 - rho(low) ** 2, 0.0))
    return (high.alpha / low.alpha) * x + spread * noise


def _check_inner(inner: Solver) -> None:
    if inner.order is None:
        raise InputError(f"inner={inner}: give a single-step solver of the probability flow, such as Multistep(1, 'x0')")


def _check_single(inner: Solver) -> None:
    """Noise at every step ends the trajectory that a multistep method interpolates along: it would be of order one unsaid."""
    long = hasattr(inner, "remember") and (getattr(inner, "steps", 1) > 1 or (inner.order or 0.0) > 1.0)
    if long or hasattr(inner, "main") or getattr(inner, "reversible", False):
        raise InputError(
            f"inner={inner!s:.100}: a method that goes on from earlier steps; noise at every step ends its trajectory: give a "
            "single-step one, such as RungeKutta(HEUN, 'rho') or ExponentialRK(two_stage(), 'x0')"
        )


@dataclass(frozen=True)
class Flow:
    """A problem without its noise: what a wrapped solver sees, so that one that takes eta follows the probability flow."""

    problem: Problem

    @property
    def path(self) -> Path:
        return self.problem.path

    def predict(self, x: Form, knot: Knot, /) -> Prediction:
        return self.problem.predict(x, knot)

    def eta(self, knot: Knot, /) -> float:
        return 0.0

    def keep(self, x: Form, /) -> Form:
        return self.problem.keep(x)


class Corrector(Protocol):
    """Moves x at one noise level so that p_t is (nearly) left alone. ``inner`` network calls."""

    @property
    def inner(self) -> int: ...
    @property
    def linear(self) -> bool: ...
    @property
    def floor(self) -> float:
        """The excess variance it settles at, in units of sigma_t^2, to leading order."""
        ...

    @property
    def linearised(self) -> Corrector:
        """A corrector of the same floor that is linear."""
        ...

    def correct(self, problem: Problem, x: Form, at: Knot, noise: Noise) -> Form: ...


@dataclass(frozen=True)
class Langevin:
    """``inner`` Langevin steps at one time: x <- x + e score(x) + sqrt(2 e) z. One network call each.

    Leaves p_t invariant to O(e).

    rule "snr"   e = 2 (snr |z| / |score(x)|)^2 with the norms of each sample (Song et al. 2021, algorithm 4; algorithm 5
                 multiplies e by alpha_i = 1 - beta_i). Released code takes the mean over the batch, so that a sample depends
                 on its batch mates. Not linear in x.
    rule "sigma" e = 2 (snr sigma_t)^2, what the former tends to in high dimension; also the annealed Langevin corrector of
                 Song & Ermon (2019), whose step is size/2 sigma_t^2: snr = sqrt(size)/2. Linear.
    """

    snr: float = 0.16
    inner: int = 1
    rule: str = "snr"

    def __post_init__(self) -> None:
        check_numbers(snr=self.snr)
        check_counts(inner=self.inner)
        if not 0.0 < self.snr < math.inf:
            raise InputError(f"snr={self.snr}: must be > 0 and finite")
        if self.inner < 1 or self.rule not in ("snr", "sigma"):
            raise InputError(f"{self}: inner >= 1 and rule 'snr' or 'sigma'")

    @property
    def linear(self) -> bool:
        return self.rule == "sigma"

    @property
    def floor(self) -> float:
        """The excess variance it settles at, in units of sigma_t^2, to leading order."""
        return self.snr**2

    @property
    def linearised(self) -> Langevin:
        """The same with a step that does not look at the state."""
        return replace(self, rule="sigma")

    def correct(self, problem: Problem, x: Form, at: Knot, noise: Noise) -> Form:
        if at.sigma == 0.0:
            raise PathError(f"sigma({at.t:g}) = 0: there is nothing to correct")
        for _ in range(self.inner):
            eps, z = problem.predict(x, at).eps, noise(at, at)
            if self.rule == "sigma":
                x = x - (2.0 * self.snr**2 * at.sigma) * eps + (2.0 * self.snr * at.sigma) * z
            else:
                size = 2.0 * (self.snr * _norm(z) * at.sigma / _norm(eps)) ** 2
                size = torch.where(size.isfinite(), size, 0.0)  # score 0 says nothing: no correction
                x = x - (size / at.sigma) * eps + torch.sqrt(2.0 * size) * z
            x = problem.keep(x)
        return x


def _norm(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample, shaped (B, 1, ...): summed by halving, elementwise, so the bits ignore the batch."""
    total = x.reshape(len(x), -1).square()
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        odd = total[:, 2 * half :]
        total = torch.cat([total[:, :half] + total[:, half : 2 * half], odd], dim=1)
    return total.sqrt().reshape(-1, *[1] * (x.dim() - 1))


@dataclass(frozen=True)
class Underdamped:
    """``inner`` steps of underdamped (kinetic) Langevin dynamics at one time, from a fresh momentum. One network call each.

    In units of sigma_t, x = sigma_t q:  dq = p du,  dp = -eps du - friction p du + sqrt(2 friction) dB, split as OBABO with
    step ``size``: kick by half (B), drift (A), kick by half (B), and the friction with its noise exact (O). The momentum
    starts as unit normals and is dropped at the end, so the last half kick is never made and the next kick's network call
    serves both halves: ``inner`` calls in all. friction 0 is Hamiltonian dynamics, infinite friction or inner = 1 the
    overdamped Langevin step with snr = size/2.

    Leaves p_t invariant to O(size^2): on Gaussian data of variance S at that level the law that it keeps has variance
    S / (1 - (size sigma_t)^2 / (4 S)), whatever the friction and ``inner`` (a harmonic oscillator's leapfrog conserves a
    modified energy exactly). Stable for size < 2 there, as S >= sigma_t^2.

    Reference: Bussi & Parrinello 2007 (OBABO); Dockhorn, Vahdat & Kreis 2022 for such dynamics in diffusion models.
    """

    size: float = 0.4
    friction: float = 1.0
    inner: int = 2

    linear = True

    def __post_init__(self) -> None:
        check_numbers(size=self.size, friction=self.friction)
        check_counts(inner=self.inner)
        if not (0.0 < self.size < 2.0 and self.friction >= 0.0 and self.inner >= 1):
            raise InputError(f"{self}: 0 < size < 2 (stability), friction >= 0 and inner >= 1")

    @property
    def floor(self) -> float:
        """The excess variance it settles at, in units of sigma_t^2, to leading order."""
        return 0.25 * self.size**2

    @property
    def linearised(self) -> Underdamped:
        """Itself."""
        return self

    def correct(self, problem: Problem, x: Form, at: Knot, noise: Noise) -> Form:
        if at.sigma == 0.0:
            raise PathError(f"sigma({at.t:g}) = 0: there is nothing to correct; stop at a time with sigma > 0")
        keep = math.exp(-self.friction * self.size)
        p = noise(at, at)
        for i in range(self.inner):
            kick = (0.5 * self.size) * problem.predict(x, at).eps
            if i > 0:  # the half kick left over from the step before, then friction and its noise
                p = keep * (p - kick) + math.sqrt(1.0 - keep * keep) * noise(at, at)
            p = problem.keep(p - kick)
            x = problem.keep(x + (at.sigma * self.size) * p)
        return x


@dataclass(frozen=True)
class PredictorCorrector:
    """Song et al. (2021), algorithm 1: at each time first the corrector, then the predictor's step to the next. stages of
    both a step.

    Weak order that of the predictor, but at most 1, down to a floor: a corrector with steps of fixed relative size leaves
    the variance too large by ``corrector.floor`` sigma_t^2 (snr^2 for Langevin).
    """

    predictor: Solver
    corrector: Corrector = Langevin()

    order = strong = target = None
    weak = 1.0
    stochastic = True

    def __post_init__(self) -> None:
        if getattr(self.predictor, "rewrites", False):
            raise InputError(
                f"predictor={self.predictor!s:.100}: it makes the state that a step starts from anew, and would undo the "
                "corrector: give one that does not, such as Multistep(2, 'x0') or AdamsMoulton(2, 3)"
            )

    @property
    def invariant(self) -> bool:
        return getattr(self.predictor, "invariant", False)

    @property
    def takes_eta(self) -> bool:
        return self.predictor.takes_eta

    @property
    def stages(self) -> int:
        return self.predictor.stages + self.corrector.inner

    @property
    def linear(self) -> bool:
        return self.corrector.linear and self.predictor.linear

    @property
    def floor(self) -> float:
        """The excess variance it settles at, in units of sigma_t^2, to leading order."""
        return self.corrector.floor

    @property
    def linearised(self) -> PredictorCorrector:
        """A solver of the same floor that has a table."""
        return self if self.linear else PredictorCorrector(self.predictor, self.corrector.linearised)

    @property
    def reduced(self) -> Solver:
        return self.predictor

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        return self.predictor.step(problem, self.corrector.correct(problem, x, s, noise), s, t, carry, noise)


@dataclass(frozen=True)
class Churn:
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2) around any single-step solver, on any path (rho =
    sigma/alpha).

    Where s_min <= rho_s <= s_max, noise is added up to rho_hat = rho_s (1 + gamma), gamma = min(s_churn / N, sqrt 2 - 1),
    then the inner solver steps from there. rho_hat is capped at the path's end, beyond which no network was trained. With
    s_noise = 1 the added noise is exact, so the law keeps the inner solver's order; s_noise != 1 is a tuned bias.
    """

    inner: Solver
    s_churn: float = 40.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    stochastic = wanders = True
    takes_eta = False
    strong = None  # the noise belongs to no Brownian path of the reverse SDE
    invariant = False  # the cap is where the path ends

    def __post_init__(self) -> None:
        check_numbers(s_churn=self.s_churn, s_min=self.s_min, s_max=self.s_max, s_noise=self.s_noise)
        if not (0.0 <= self.s_churn < math.inf and 0.0 < self.s_noise < math.inf and 0.0 <= self.s_min <= self.s_max):
            raise InputError(f"{self}: s_churn >= 0, s_noise > 0 and 0 <= s_min <= s_max")
        _check_single(self.inner)

    @property
    def order(self) -> float | None:
        return None

    @property
    def target(self) -> str | None:
        return getattr(self.inner, "target", None)

    @property
    def weak(self) -> float | None:
        return self.inner.order

    @property
    def stages(self) -> int:
        return self.inner.stages

    @property
    def linear(self) -> bool:
        return self.inner.linear

    @property
    def reduced(self) -> Solver:
        low = getattr(self.inner, "reduced", self.inner)
        return Churn(low, self.s_churn, self.s_min, self.s_max, self.s_noise)

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        if s.alpha == 0.0:
            raise PathError(f"alpha({s.t:g}) = 0: no noise can be added there; start just below")
        here = rho(s)
        if self.s_min <= here <= self.s_max and self.s_churn > 0.0:
            gamma = min(self.s_churn / max(s.count, 1), math.sqrt(2.0) - 1.0)
            above = min(here * (1.0 + gamma), rho(problem.path.knot(problem.path.T)))
            if above > here:
                up = problem.path.knot_at(-math.log(above))
                spread = self.s_noise * up.alpha * math.sqrt(above**2 - here**2)
                x = (up.alpha / s.alpha) * x + spread * noise(s, s)
                s = up
        return self.inner.step(Flow(problem), x, s, t, None, noise)


def _split_k(s: float, t: float, eta: float) -> float:
    return t * math.sqrt(max(1.0 - eta**2 * (1.0 - (t / s) ** 2), 0.0))


def _split_rf(s: float, t: float, eta: float) -> float:
    tau_s, tau_t = 1.0 / (1.0 + 1.0 / s), t / (1.0 + t)
    tau_d = tau_t * max(1.0 - eta**2 * (1.0 - tau_t / tau_s), 0.0)
    return tau_d / (1.0 - tau_d)


#: The lower level rho_d of an ancestral step from (rho_s, rho_t, eta); rho_s may be infinite.
SPLITS = {"k": _split_k, "rf": _split_rf}


@dataclass(frozen=True)
class Ancestral:
    """k-diffusion's ancestral sampling around any single-step solver of the flow, on any path (rho = sigma/alpha).

    ``inner`` steps from rho_s to a level rho_d below rho_t, then exact noise takes x up to t. The split of rho_t^2 = rho_d^2 +
    up^2 is

        rule "k"    up^2 = eta^2 rho_t^2 (rho_s^2 - rho_t^2) / rho_s^2, at most rho_t^2                  (k-diffusion)
        rule "rf"   tau_d = tau_t (1 - eta^2 (1 - tau_t/tau_s)), tau = rho/(1 + rho), rectified flow's time  (ComfyUI's *_RF)

    with eta the problem's noise level. In small steps up^2 = eta^2 (rho_s^2 - rho_t^2) for both, so eta is the noise level of
    the reverse SDE that the method follows. For rule "k" it is also k-diffusion's ancestral eta, and DDIM's: with DDIM inside
    the step is Song, Meng & Ermon's x_t = alpha_t x0 + sqrt(sigma_t^2 - s^2) eps + s z, s^2 = eta^2 (sigma_t/sigma_s)^2
    (sigma_s^2 - (alpha_s/alpha_t)^2 sigma_t^2); 'ddpm' at the same eta differs from it unless eta is 0 or 1. ComfyUI's eta of
    the "rf" rule is the square of ours, as is k-diffusion's eta in its SDE samplers.

    The noise is exact, so an exact inner step keeps every marginal: weak order that of ``inner``, for every eta. Strong order
    1, as one normal a step cannot do better; eta = 0 is ``inner`` itself. rho_d is at least the path's own lowest level, below
    which no network was trained. Calls and limits as ``inner``'s, whose stages may lie below t.
    """

    inner: Solver
    rule: str = "k"

    stochastic = takes_eta = wanders = True
    strong = 1.0
    invariant = False  # where rho_d is capped by the end of the path

    def __post_init__(self) -> None:
        if self.rule not in SPLITS:
            raise InputError(f"rule={self.rule!r}: use one of {sorted(SPLITS)}")
        _check_inner(self.inner)
        _check_single(self.inner)

    @property
    def order(self) -> float | None:
        return self.inner.order

    @property
    def weak(self) -> float | None:
        return self.inner.order

    @property
    def stages(self) -> int:
        return self.inner.stages

    @property
    def linear(self) -> bool:
        return self.inner.linear

    @property
    def target(self) -> str | None:
        return getattr(self.inner, "target", None)

    @property
    def reduced(self) -> Solver:
        return Ancestral(getattr(self.inner, "reduced", self.inner), self.rule)

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        eta, flow = problem.eta(s), Flow(problem)
        if eta == 0.0 or t.sigma == 0.0:
            return Step(self.inner.step(flow, x, s, t, None, noise).x)
        below = SPLITS[self.rule](rho(s), rho(t), eta)
        d = problem.path.knot_at(-math.log(below) if below > 0.0 else math.inf)  # at most the time of the path's lowest level
        return Step(renoise(self.inner.step(flow, x, s, d, None, noise).x, d, t, noise(s, t)))


@dataclass(frozen=True)
class Restart:
    """Restart sampling (Xu et al. 2023) around any solver of the flow, on any path (rho = sigma/alpha).

    ``intervals`` holds (low, high, repeats): when a step first arrives at or below rho = low, ``repeats`` times exact noise
    lifts the state from there to rho = high and ``inner`` integrates it down again. high is at most where the run began.

    ``steps`` None: down through the levels of the grid itself, so that everything is refined with it: weak order that of
    ``inner``, since the noise is exact. ``steps`` m: m steps even in rho^(1/7), as published (their N_Restart counts m + 1
    points); the error of those m steps is then a floor that no finer grid lowers.

    A multistep ``inner`` begins every passage anew and goes on from the last one.

    A passage through an interval with v levels of the grid inside costs ``repeats`` (v + 1) inner steps, or ``repeats`` m; all
    are counted. ``stages`` bounds the calls of a run: at most ``stages`` a step.
    """

    inner: Solver
    intervals: tuple[tuple[float, float, int], ...] = ((0.30, 0.59, 1), (0.06, 0.30, 2))
    steps: int | None = None

    stochastic = wanders = uneven = True
    takes_eta = False
    order = strong = None  # the noise belongs to no Brownian path of the reverse SDE
    invariant = False  # it sees lambda alone, but its intervals do not move when the data are scaled

    def __post_init__(self) -> None:
        good = all(len(i) == 3 and 0.0 < i[0] < i[1] < math.inf and i[2] >= 1 for i in self.intervals)
        if not self.intervals or not good:
            raise InputError(f"intervals={self.intervals}: give (low, high, repeats) with 0 < low < high in rho, repeats >= 1")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps={self.steps}: give steps >= 1, or None for the grid's own")
        _check_inner(self.inner)

    @property
    def weak(self) -> float | None:
        return self.inner.order if self.steps is None else None

    @property
    def stages(self) -> int:
        return self.inner.stages * (1 + (self.steps or 1) * sum(repeats for _, _, repeats in self.intervals))

    @property
    def linear(self) -> bool:
        return self.inner.linear

    @property
    def target(self) -> str | None:
        return getattr(self.inner, "target", None)

    @property
    def reduced(self) -> Solver:
        """Without restarts."""
        return getattr(self.inner, "reduced", self.inner)

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        visited, memory = carry or ((), None)
        flow, visited = Flow(problem), (*visited, s)
        x, memory = self.inner.step(flow, x, s, t, memory, noise)
        for low, high, repeats in self.intervals:
            if rho(t) <= low < rho(s) and t.sigma > 0.0:
                levels = self._levels(problem.path, visited, high, t)
                for _ in range(repeats):
                    x, memory = problem.keep(renoise(x, t, levels[0], noise(t, t))), None
                    for a, b in itertools.pairwise(levels):
                        x, memory = self.inner.step(flow, x, a, b, memory, noise)
                        x = problem.keep(x)
        return Step(x, (visited, memory))

    def _levels(self, path: Path, visited: tuple[Knot, ...], high: float, t: Knot) -> list[Knot]:
        """The knots from ``high`` down to t: the grid's own in between, or ``steps`` even in rho^(1/7)."""
        first = visited[0] if rho(visited[0]) <= high else path.knot_at(-math.log(high))
        if self.steps is None:
            return [first, *(k for k in visited if rho(t) < rho(k) < rho(first) * (1.0 - 1e-9)), t]
        a, b = rho(first) ** (1.0 / 7.0), rho(t) ** (1.0 / 7.0)
        between = [(a + (b - a) * i / self.steps) ** 7.0 for i in range(1, self.steps)]
        return [first, *(path.knot_at(-math.log(v)) for v in between), t]
