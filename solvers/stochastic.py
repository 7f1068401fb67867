"""Solvers of the reverse SDE that are not exponential: Euler-Maruyama, the discrete DDPM step, annealed Langevin dynamics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sde.errors import InputError, PathError
from sde.prediction import Knot

from .base import Form, Noise, Problem, Step


@dataclass(frozen=True)
class EulerMaruyama:
    """x_t = x_s + (t - s) [f x_s - (1 + eta^2)/2 g^2 score(x_s)] + eta g sqrt|t - s| z, everything at s. Milstein's method
    is the same here.

    Weak order 1, strong order 1 (the noise is additive), order 1 for eta = 0, where it is Euler's method. One network call a
    step.
    """

    stages = 1
    order = weak = strong = 1.0
    stochastic = takes_eta = True
    linear = True

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        eta, h = problem.eta(s), t.t - s.t
        # drift = velocity + eta^2 g^2/(2 sigma) eps: the velocity alone is finite where alpha = 0
        extra = 0.0 if eta == 0.0 else 0.5 * eta * eta * s.g2 / s.sigma if s.sigma > 0.0 else math.inf
        if not math.isfinite(s.dsigma + extra):
            raise PathError(
                f"the drift is infinite at t = {s.t:g} (sigma' = {s.dsigma:g}, g^2 = {s.g2:g}, eta = {eta:g}): "
                "start elsewhere, or use 'ddpm', whose step is finite there"
            )
        out = x + h * problem.predict(x, s).combine(s.dalpha, s.dsigma + extra)
        return Step(out if eta == 0.0 else out + (eta * math.sqrt(s.g2 * abs(h))) * noise(s, t))


@dataclass(frozen=True)
class DiscreteDDPM:
    """DDPM with a table beta_k = g(s)^2 (s - t), as Pierret & Galerne (2025) discretise it; variance-preserving paths only,
    eta = 1.

        x_t = (x_s + beta score(x_s)) / sqrt(1 - beta) + sqrt(beta) z

    Order one in every sense. The exact posterior step is 'ddpm'.
    """

    stages = 1
    order = None
    weak = strong = 1.0
    stochastic = takes_eta = True
    linear = True

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        if abs(s.alpha**2 + s.sigma**2 - 1.0) > 1e-9:
            raise PathError(
                f"alpha^2 + sigma^2 = {s.alpha**2 + s.sigma**2:.4g} at t = {s.t:g}: ddpm_discrete needs a "
                "variance-preserving path; use 'ddpm'"
            )
        if problem.eta(s) != 1.0:
            raise InputError(
                f"eta = {problem.eta(s):g}: ddpm_discrete is defined for eta = 1; use 'ddpm' for other noise levels"
            )
        beta = s.g2 * (s.t - t.t)
        if not 0.0 < beta < 1.0:
            raise InputError(
                f"beta = g^2 h = {beta:.4g} at t = {s.t:g}: ddpm_discrete needs 0 < beta < 1, so more steps, or 'ddpm'"
            )
        mean = (1.0 / math.sqrt(1.0 - beta)) * (x - (beta / s.sigma) * problem.predict(x, s).eps)
        return Step(mean + math.sqrt(beta) * noise(s, t))


@dataclass(frozen=True)
class AnnealedLangevin:
    """Annealed Langevin dynamics (Song & Ermon 2019): at each new level ``inner`` unadjusted Langevin steps, no predictor.

        x <- (alpha_t/alpha_s) x,   then ``inner`` times   x <- x + size/2 sigma_t^2 score(x) + sqrt(size) sigma_t z

    ``size`` is NCSN's epsilon / sigma_L^2 (0.2 there). At sigma_t = 0 the state becomes alpha_t x0 (NCSNv2's final
    denoising). ``inner`` calls a step. Weak order 1 in the number of levels, down to a floor: Langevin steps of fixed
    relative size leave the variance too large by size/4 sigma_t^2.
    """

    inner: int = 5
    size: float = 0.2

    order = strong = None
    weak = 1.0
    stochastic = True
    takes_eta = False
    linear = True

    def __post_init__(self) -> None:
        if self.inner < 1 or not 0.0 < self.size < math.inf:
            raise InputError(f"{self}: inner >= 1 and size > 0")

    @property
    def stages(self) -> int:
        return self.inner

    @property
    def floor(self) -> float:
        """The excess variance it settles at, in units of sigma_t^2, to leading order."""
        return self.size / 4.0

    @property
    def linearised(self) -> AnnealedLangevin:
        """A solver of the same floor that has a table."""
        return self

    @property
    def reduced(self) -> AnnealedLangevin:
        """One Langevin step a level."""
        return AnnealedLangevin(1, self.size)

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        if s.alpha == 0.0:
            raise PathError(f"alpha({s.t:g}) = 0: the levels cannot be rescaled from there; start just below")
        if t.sigma == 0.0:
            return Step(t.alpha * problem.predict(x, s).x0)
        x = (t.alpha / s.alpha) * x
        for _ in range(self.inner):
            drift = problem.predict(x, t).eps
            x = problem.keep(x - (0.5 * self.size * t.sigma) * drift + (math.sqrt(self.size) * t.sigma) * noise(t, t))
        return Step(x)
