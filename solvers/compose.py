"""Solvers made of solvers: Langevin correctors (predictor-corrector sampling) and EDM's churn, around any solver."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, PathError
from sde.prediction import Knot

from .base import Form, Noise, Problem, Solver, Step


@dataclass(frozen=True)
class Langevin:
    """``inner`` Langevin steps at one time: x <- x + e score(x) + sqrt(2 e) z. One network call each.

    Leaves p_t invariant to O(e).

    rule "snr"   e = 2 (snr |z| / |score(x)|)^2 with the norms of each sample (Song et al. 2021, algorithm 4; algorithm 5
                 multiplies e by alpha_i = 1 - beta_i). Released code takes the mean over the batch, so that a sample depends
                 on its batch mates. Not linear in x.
    rule "sigma" e = 2 (snr sigma_t)^2, what the former tends to in high dimension. Linear.
    """

    snr: float = 0.16
    inner: int = 1
    rule: str = "snr"

    def __post_init__(self) -> None:
        if not 0.0 < self.snr < math.inf:
            raise InputError(f"snr={self.snr}: must be > 0 and finite")
        if self.inner < 1 or self.rule not in ("snr", "sigma"):
            raise InputError(f"{self}: inner >= 1 and rule 'snr' or 'sigma'")

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
class PredictorCorrector:
    """Song et al. (2021), algorithm 1: at each time first the corrector, then the predictor's step to the next. stages of
    both a step.

    Weak order that of the predictor, but at most 1, down to a floor: Langevin steps at fixed snr leave the variance too
    large by about snr^2 sigma_t^2.
    """

    predictor: Solver
    corrector: Langevin = Langevin()

    order = strong = None
    weak = 1.0
    stochastic = True

    @property
    def takes_eta(self) -> bool:
        return self.predictor.takes_eta

    @property
    def stages(self) -> int:
        return self.predictor.stages + self.corrector.inner

    @property
    def linear(self) -> bool:
        return self.corrector.rule == "sigma" and self.predictor.linear

    @property
    def floor(self) -> float:
        """The excess variance it settles at, in units of sigma_t^2, to leading order."""
        return self.corrector.snr**2

    @property
    def linearised(self) -> PredictorCorrector:
        """A solver of the same floor that has a table."""
        return self if self.linear else PredictorCorrector(self.predictor, replace(self.corrector, rule="sigma"))

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

    stochastic = True
    takes_eta = False
    strong = None

    def __post_init__(self) -> None:
        if not (0.0 <= self.s_churn < math.inf and 0.0 < self.s_noise < math.inf and 0.0 <= self.s_min <= self.s_max):
            raise InputError(f"{self}: s_churn >= 0, s_noise > 0 and 0 <= s_min <= s_max")

    @property
    def order(self) -> float | None:
        return None

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
        rho = s.sigma / s.alpha
        if self.s_min <= rho <= self.s_max and self.s_churn > 0.0:
            gamma = min(self.s_churn / max(s.count, 1), math.sqrt(2.0) - 1.0)
            end = problem.path.knot(problem.path.T)
            highest = math.inf if end.alpha == 0.0 else end.sigma / end.alpha
            rho_hat = min(rho * (1.0 + gamma), highest)
            if rho_hat > rho:
                up = problem.path.knot_at(-math.log(rho_hat))
                spread = self.s_noise * up.alpha * math.sqrt(rho_hat**2 - rho**2)
                x = (up.alpha / s.alpha) * x + spread * noise(s, s)
                s = up
        return self.inner.step(problem, x, s, t, None, noise)
