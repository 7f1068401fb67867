"""Exponential integrators: the exact formula (``formula``), the methods that are lines of it, and the frozen score.

This is the one place to import them from; ``formula`` has the equations, ``multistep`` and ``unipc`` the methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sde.errors import PathError
from sde.prediction import Knot

from .base import Form, Noise, Problem, Step
from .formula import BASES, NODES, TARGETS, WEIGHTS, exact_weights, exponential_step, lagrange, one_node, phi
from .multistep import FixedWeights, Multistep
from .unipc import AdamsMoulton, UniPC

__all__ = [
    "BASES",
    "TARGETS",
    "AdamsMoulton",
    "FixedWeights",
    "FrozenScore",
    "Multistep",
    "UniPC",
    "exact_weights",
    "exponential_step",
    "lagrange",
    "one_node",
    "phi",
]


@dataclass(frozen=True)
class FrozenScore:
    """Exponential integrator with the score frozen over the step (Zhang & Chen 2023; Pierret & Galerne 2025 call it EI).
    Order one.

        x_t = (alpha_t/alpha_s) x_s + (1 + eta^2)/2 int_t^s (alpha_t/alpha_u) g_u^2 du score(x_s)
              + eta sqrt(int_t^s (alpha_t/alpha_u)^2 g_u^2 du) z

    The last integral is alpha_t^2 (rho_s^2 - rho_t^2), rho = sigma/alpha; the other is a 32-point Gauss-Legendre quadrature
    in t.
    """

    stages = 1
    order = weak = strong = 1.0
    stochastic = takes_eta = True
    linear = True
    target = None
    invariant = False

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        if s.alpha == 0.0 or s.sigma == 0.0:
            raise PathError(
                f"at t = {s.t:g} alpha = {s.alpha:g} and sigma = {s.sigma:g}: the frozen score needs both > 0 at the start "
                "of a step; start just off it (start=...), or use 'ddpm' (to encode, 'ddim')"
            )
        eta = problem.eta(s)
        times = (s.t + 0.5 * (t.t - s.t) * (1.0 + NODES)).tolist()
        values = (problem.path.g2(times) / problem.path.alpha(times)).tolist()
        mean = 0.5 * (s.t - t.t) * math.fsum(w * v for w, v in zip(WEIGHTS.tolist(), values, strict=True))
        out = (t.alpha / s.alpha) * x - (0.5 * (1.0 + eta * eta) * t.alpha * mean / s.sigma) * problem.predict(x, s).eps
        spread = eta * t.alpha * math.sqrt(max((s.sigma / s.alpha) ** 2 - (t.sigma / t.alpha) ** 2, 0.0))
        return Step(out if spread == 0.0 else out + spread * noise(s, t))
