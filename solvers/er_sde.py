"""ER-SDE-Solvers (Cui et al. 2023): the reverse SDE whose noise level is a function of lambda, solved in x0.

With rho = sigma/alpha and a noise-scale function phi, the extended reverse SDE is solved exactly by

    x_t = (sigma_t/sigma_s) q x_s + alpha_t int_{rho_t}^{rho_s} phi_t phi'(v)/phi(v)^2 x0(v) dv + sigma_t sqrt(1 - q^2) z

where q = psi_t/psi_s, psi = phi/rho. One formula for every path: the paper's VE and VP solvers are alpha = 1 and alpha^2 +
sigma^2 = 1. Its noise level is eta^2 = d log phi/d log rho - 1: constant eta is phi = rho^(1 + eta^2), the formula at the top
of ``exponential.py``; psi must not decrease. The step to sigma_t = 0 gives alpha_t x0, the one from alpha_s = 0 drops x_s
where psi grows without bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sde.errors import InputError, PathError, check_counts
from sde.prediction import Knot

from .base import Form, Noise, Problem, Step

#: psi = phi/rho of the published noise scales (the paper's appendix A.8 and its code), with psi(inf) where the path has one.
NOISE_SCALES: dict[str, Callable[[float], float]] = {
    "ode": lambda rho: 1.0,
    "sde": lambda rho: rho,
    "sde_1": lambda rho: (math.exp(-1.0 / rho) if rho > 0.0 else 0.0) + 10.0,
    "sde_2": lambda rho: rho**0.5,
    "sde_3": lambda rho: rho**1.5,
    "sde_4": lambda rho: rho**-0.1 * math.log10(1.0 + 100.0 * rho**1.5),  # falls beyond rho = 1000 or so
    "sde_5": lambda rho: math.exp(min(rho**0.3, 700.0)) + 10.0,
}
_NODES, _WEIGHTS = (v.tolist() for v in np.polynomial.legendre.leggauss(32))


@dataclass(frozen=True)
class ERSDE:
    """x0(v) replaced by its Taylor polynomial of degree ``steps`` - 1 about rho_s, from the last predictions. One call a step.

    rule "exact"      the derivatives of the polynomial through the last ``steps`` predictions
    rule "published"  the first derivative is the last difference quotient, without the second's part: of three steps it makes
                      a two-step method, with another error constant

    Weak order min(steps, 2): the first step is of order one (its error, once, is second order), and the published third
    member is of order two inside as well. The noise level is the scale's own, not the problem's eta. Strong order is not
    declared: a step's noise stands for a level that changes inside the step. Weights by 32-point Gauss-Legendre quadrature in
    lambda of forms that do not cancel:

        int phi_t phi'/phi^2 (v - rho_s) dv     = -int (1 - phi_t/phi) dv
        int phi_t phi'/phi^2 (v - rho_s)^2/2 dv =  int (1 - phi_t/phi) (rho_s - v) dv
    """

    steps: int
    scale: str = "sde_5"
    rule: str = "exact"

    stages = 1
    order = strong = None
    linear = True
    takes_eta = False
    target = "x0"

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        if self.steps not in (1, 2, 3) or self.scale not in NOISE_SCALES or self.rule not in ("exact", "published"):
            raise InputError(f"{self}: steps 1, 2 or 3, scale one of {sorted(NOISE_SCALES)}, rule 'exact' or 'published'")

    @property
    def stochastic(self) -> bool:
        return self.scale != "ode"

    @property
    def weak(self) -> float:
        return float(min(self.steps, 2))

    @property
    def start_rule(self) -> str:
        return "as any step" if self.steps == 1 else "order 1 first step"

    @property
    def invariant(self) -> bool:
        """Every scale sees lambda alone; only powers of rho are also blind to the scale of the data."""
        return self.scale in ("ode", "sde", "sde_2", "sde_3")

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        if s.sigma == 0.0:
            raise PathError(f"sigma({s.t:g}) = 0: a method in x0 cannot start there; start at a time with sigma > 0")
        value = problem.predict(x, s).x0
        history = [(_rho(s), value), *(carry or [])][: self.steps]
        psi = NOISE_SCALES[self.scale]
        q = 0.0 if t.sigma == 0.0 else psi(_rho(t)) / psi(_rho(s))
        if not q <= 1.0:
            raise PathError(
                f"the noise scale {self.scale!r} asks for a negative variance from t = {s.t:g} to {t.t:g}: steps go towards "
                "data and psi must not decrease in sigma/alpha; use a decreasing grid, scale 'sde_5', or start below"
            )
        decay = t.sigma / s.sigma * q
        out = decay * x + (t.alpha - s.alpha * decay) * value
        usable = [item for item in history if math.isfinite(item[0])]
        if len(usable) > 1 and math.isfinite(t.lam):
            out = out + t.alpha * self._correction(psi, _rho(s), _rho(t), usable)
        spread = t.sigma * math.sqrt(max(1.0 - q * q, 0.0))
        return Step(out if spread == 0.0 else out + spread * noise(s, t), history)

    def _correction(self, psi: Callable[[float], float], s: float, t: float, history: list[tuple[float, Form]]) -> Form:
        """The integrals of the first and second Taylor terms, times the derivatives of x0 in rho."""
        first, second = _moments(psi, s, t)
        (a, x), (b, y) = history[:2]
        slope = (1.0 / (a - b)) * (x - y)
        if len(history) == 2:
            return first * slope
        c, z = history[2]
        curve = (2.0 / (a - c)) * (slope - (1.0 / (b - c)) * (y - z))
        if self.rule == "exact":
            slope = slope + (0.5 * (a - b)) * curve
        return first * slope + second * curve


def _moments(psi: Callable[[float], float], s: float, t: float) -> tuple[float, float]:
    """-int (1 - phi_t/phi) dv and int (1 - phi_t/phi) (s - v) dv over [t, s], by quadrature in log v."""
    width = math.log(s / t)
    first, second, top = 0.0, 0.0, t * psi(t)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        v = t * math.exp(0.5 * width * (1.0 + node))
        part = 0.5 * width * weight * v * (1.0 - top / (v * psi(v)))
        first -= part
        second += part * (s - v)
    return first, second


def _rho(k: Knot) -> float:
    return k.sigma / k.alpha if k.alpha > 0.0 else math.inf
