"""Exponential integrators: one exact formula, of which DDIM, DDPM, DPM-Solver++ and UniPC are lines.

With h = lambda_t - lambda_s, eta the noise level and r = 1 + eta^2, the reverse SDE is solved exactly by

    in x0 :  x_t = (sigma_t/sigma_s) e^{-eta^2 h} x_s + alpha_t int_0^h r e^{-r(h-u)} x0(u) du
                   + sigma_t sqrt(1 - e^{-2 eta^2 h}) z
    in eps:  x_t = (alpha_t/alpha_s) x_s - sigma_t r int_0^h e^{h-u} eps(u) du + sigma_t eta sqrt(e^{2h} - 1) z

A method replaces x0(u) or eps(u) by a polynomial through the predictions at past knots; its weights are integrals of that
polynomial. Limits are written out: sigma_t = 0 gives alpha_t x0, alpha_s = 0 leaves sigma_t/sigma_s x + alpha_t x0 (h is
infinite; the polynomial is then a constant). eta is constant over a step, taken at its start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sde.errors import InputError, PathError
from sde.path import Path
from sde.prediction import Knot

from .base import Form, Noise, Problem, Step

_NODES, _WEIGHTS = (v.tolist() for v in np.polynomial.legendre.leggauss(32))

#: The variable in which the predictions are interpolated, as a function of (path, lambda).
BASES = {
    "lam": lambda path, lam: lam,
    "rho": lambda path, lam: math.exp(-lam),
    "t": lambda path, lam: float(path.time(lam)),
}


def lagrange(v: float, nodes: list[float], j: int) -> float:
    """The j-th Lagrange polynomial of the nodes at v."""
    return math.prod((v - nodes[i]) / (nodes[j] - nodes[i]) for i in range(len(nodes)) if i != j)


def exact_weights(path: Path, s: Knot, t: Knot, nodes: list[Knot], target: str, basis: str, r: float) -> list[float]:
    """w_j = int_0^h k(u) L_j(u) du, with k = r e^{-r(h-u)} in x0 and r e^{h-u} in eps, by 32-point Gauss-Legendre quadrature.

    For one node the integral is closed: 1 - e^{-rh} and r (e^h - 1).
    """
    h = t.lam - s.lam
    if len(nodes) == 1:
        return [-math.expm1(-r * h) if target == "x0" else r * math.expm1(h)]
    variable = BASES[basis]
    at = [variable(path, k.lam) for k in nodes]
    weights = [0.0] * len(nodes)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        u = 0.5 * h * (1.0 + node)
        kernel = r * math.exp(-r * (h - u)) if target == "x0" else r * math.exp(h - u)
        v = variable(path, s.lam + u)
        for j in range(len(nodes)):
            weights[j] += 0.5 * h * weight * kernel * lagrange(v, at, j)
    return weights


def exponential_step(s: Knot, t: Knot, eta: float, target: str, x: Form, parts: list[tuple[float, Form]], noise: Noise) -> Form:
    """x_t from x_s and the weighted predictions, with the exact linear and noise terms.

    ``parts`` are (w, value) with sum w = 1 - e^{-rh} in x0, r (e^h - 1) in eps.
    """
    if target == "x0":
        if s.sigma == 0.0:
            raise PathError(
                f"sigma({s.t:g}) = 0: a method in x0 cannot start there; start (or, to encode, stop) at a time with sigma > 0, "
                "such as the path's t_min"
            )
        decay = 1.0 if eta == 0.0 else math.exp(-eta * eta * (t.lam - s.lam))
        out = (t.sigma / s.sigma * decay) * x
        for w, value in parts:
            out = out + (t.alpha * w) * value
        spread = 0.0 if eta == 0.0 else t.sigma * math.sqrt(-math.expm1(-2.0 * eta * eta * (t.lam - s.lam)))
    else:
        if s.alpha == 0.0:
            raise PathError(f"alpha({s.t:g}) = 0: a method in eps cannot start there; start just below, or use target 'x0'")
        out = (t.alpha / s.alpha) * x
        for w, value in parts:
            out = out - (t.sigma * w) * value
        # sigma_t^2 (e^{2h} - 1) = (alpha_t sigma_s / alpha_s)^2 - sigma_t^2, finite also at sigma_t = 0
        spread = 0.0 if eta == 0.0 else eta * math.sqrt(max((t.alpha * s.sigma / s.alpha) ** 2 - t.sigma**2, 0.0))
    return out if spread == 0.0 else out + spread * noise(s, t)


def one_node(s: Knot, t: Knot, eta: float, target: str, x: Form, value: Form, noise: Noise) -> Form:
    """The first-order step, exact where the prediction is constant, and its limits at infinite h."""
    r = 1.0 + eta * eta
    if target == "x0":
        w = -math.expm1(-r * (t.lam - s.lam))  # 1 where h is infinite
        return exponential_step(s, t, eta, target, x, [(w, value)], noise)
    if t.sigma == 0.0:  # sigma_t (e^h - 1) -> alpha_t sigma_s / alpha_s
        out = (t.alpha / s.alpha) * x - (r * t.alpha * s.sigma / s.alpha) * value
        return out if eta == 0.0 else out + (eta * t.alpha * s.sigma / s.alpha) * noise(s, t)
    return exponential_step(s, t, eta, target, x, [(r * math.expm1(t.lam - s.lam), value)], noise)


@dataclass(frozen=True)
class Multistep:
    """Adams-type exponential method: the polynomial goes through the last ``steps`` predictions. One network call a step.

    target : "x0" or "eps", what is interpolated
    basis  : the variable of the polynomial, "lam", "t" or "rho"
    rule   : "exact" weights, or "midpoint", DPM-Solver++(2M)'s published weights (Lu et al. 2022): half the constant's
             weight times the slope
    lower_final : lower the order towards the last step, as released code does for few steps

    Order min(steps, 2): the first step is of order one (its error, once, is second order); exact on constant predictions.
    """

    steps: int
    target: str
    basis: str = "lam"
    rule: str = "exact"
    lower_final: bool = False

    stages = 1
    stochastic = takes_eta = True
    linear = True
    strong = 1.0

    def __post_init__(self) -> None:
        if (
            self.steps < 1
            or self.target not in ("x0", "eps")
            or self.basis not in BASES
            or self.rule not in ("exact", "midpoint")
        ):
            raise InputError(
                f"{self}: steps >= 1, target 'x0' or 'eps', basis one of {sorted(BASES)}, rule 'exact' or 'midpoint'"
            )
        if self.rule == "midpoint" and (self.steps, self.basis) != (2, "lam"):
            raise InputError(f"{self}: the midpoint rule is the published two-step method in lambda")

    @property
    def order(self) -> float:
        return float(min(self.steps, 2))

    @property
    def weak(self) -> float:
        return float(min(self.steps, 2))

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        prediction = problem.predict(x, s)
        value = prediction.x0 if self.target == "x0" else prediction.eps
        history = [(s, value), *(carry or [])][: self.steps]
        usable = history if math.isfinite(t.lam) and math.isfinite(s.lam) else history[:1]
        if self.lower_final and t.count >= 0:
            usable = usable[: t.count - s.index]
        usable = [item for item in usable if math.isfinite(item[0].lam)] or history[:1]
        eta = problem.eta(s)
        if len(usable) == 1:
            return Step(one_node(s, t, eta, self.target, x, value, noise), history)
        nodes, values = [k for k, _ in usable], [v for _, v in usable]
        if self.rule == "midpoint":
            total = exact_weights(problem.path, s, t, nodes[:1], self.target, self.basis, 1.0 + eta * eta)[0]
            slope = 0.5 * total * (t.lam - s.lam) / (s.lam - nodes[1].lam)
            weights = [total + slope, -slope]
        else:
            weights = exact_weights(problem.path, s, t, nodes, self.target, self.basis, 1.0 + eta * eta)
        return Step(exponential_step(s, t, eta, self.target, x, list(zip(weights, values, strict=True)), noise), history)


@dataclass(frozen=True)
class UniPC:
    """Unified predictor-corrector (Zhao et al. 2023), B(h) = h (bh1) or e^h - 1 (bh2). One network call a step.

    Each step corrects the state it starts from with the prediction made there, then predicts the next; the last state is not
    corrected, as in the released code. ``lower_final`` lowers the order towards the last step (the released default).

    Order: inside, steps + 1. The corrected first step has a local error of order 3, so the whole has order min(steps + 1,
    3); with ``lower_final`` the last step is an uncorrected first-order one and the whole has order 2, whatever ``steps``.
    """

    steps: int
    variant: str = "bh2"
    target: str = "x0"
    lower_final: bool = True

    stages = 1
    weak = strong = None
    stochastic = takes_eta = False
    linear = True

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 6 or self.variant not in ("bh1", "bh2") or self.target not in ("x0", "eps"):
            raise InputError(f"{self}: 1 <= steps <= 6, variant 'bh1' or 'bh2', target 'x0' or 'eps'")

    @property
    def order(self) -> float:
        return 2.0 if self.lower_final else float(min(self.steps + 1, 3))

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        prediction = problem.predict(x, s)
        value = prediction.x0 if self.target == "x0" else prediction.eps
        history: list[tuple[Knot, Form]] = []
        if carry is not None:
            before, history, order = carry
            x = problem.keep(self._update(before, history[0][0], s, history, order, value))
        history = [(s, value), *history][: self.steps]
        order = len([k for k, _ in history if math.isfinite(k.lam)])
        if self.lower_final and t.count >= 0:
            order = min(order, t.count - s.index)
        if not (math.isfinite(t.lam) and math.isfinite(s.lam)):
            order = 1
        return Step(self._update(x, s, t, history, max(order, 1), None), (x, history, max(order, 1)))

    def _update(self, x: Form, s: Knot, t: Knot, history: list[tuple[Knot, Form]], order: int, arrived: Form | None) -> Form:
        """s -> t by the predictor, or by the corrector where ``arrived``, the prediction at t, is known."""
        sign = -1.0 if self.target == "x0" else 1.0
        m0 = history[0][1]
        h = t.lam - s.lam
        if not math.isfinite(h):
            return one_node(s, t, 0.0, self.target, x, m0, _no_noise)
        hh = sign * h
        base = one_node(s, t, 0.0, self.target, x, m0, _no_noise)
        ratios = [(k.lam - s.lam) / h for k, _ in history[1:order]] + [1.0]
        differences = [(v - m0) / q for (_, v), q in zip(history[1:order], ratios, strict=False)]
        scale = -(t.alpha if self.target == "x0" else t.sigma) * (hh if self.variant == "bh1" else math.expm1(hh))
        if arrived is not None:
            differences.append(arrived - m0)
        weights = self._weights(hh, ratios[: len(differences)])
        for w, d in zip(weights, differences, strict=True):
            base = base + (scale * w) * d
        return base

    def _weights(self, hh: float, ratios: list[float]) -> list[float]:
        """The solution of sum_m rho_m ratio_m^(i-1) = i! phi_{i+1}(hh) hh / B(h), i = 1 .. len(ratios); 1/2 for a single
        equation.
        """
        n = len(ratios)
        if n == 0:
            return []
        if n == 1:
            return [0.5]  # the degenerate case of the paper, exact to its order
        b = hh if self.variant == "bh1" else math.expm1(hh)
        right = [math.factorial(i) * phi(i + 1, hh) * hh / b for i in range(1, n + 1)]
        matrix = [[q ** (i - 1) for q in ratios] for i in range(1, n + 1)]
        return np.linalg.solve(np.array(matrix), np.array(right)).tolist()


def phi(k: int, z: float) -> float:
    """phi_k(z) = (phi_{k-1}(z) - 1/(k-1)!) / z, phi_0 = exp; by its series where the recursion would cancel."""
    if abs(z) < 2.0:
        return math.fsum(z**i / math.factorial(i + k) for i in range(30))
    value = math.exp(z)
    for i in range(1, k + 1):
        value = (value - 1.0 / math.factorial(i - 1)) / z
    return value


def _no_noise(s: Knot, t: Knot) -> Form:
    raise InputError("this method is deterministic")


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

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        if s.alpha == 0.0 or s.sigma == 0.0:
            raise PathError(
                f"at t = {s.t:g} alpha = {s.alpha:g} and sigma = {s.sigma:g}: the frozen score needs both > 0 at the start "
                "of a step"
            )
        eta = problem.eta(s)
        times = [s.t + 0.5 * (t.t - s.t) * (1.0 + node) for node in _NODES]
        values = (problem.path.g2(times) / problem.path.alpha(times)).tolist()
        mean = 0.5 * (s.t - t.t) * math.fsum(w * v for w, v in zip(_WEIGHTS, values, strict=True))
        out = (t.alpha / s.alpha) * x - (0.5 * (1.0 + eta * eta) * t.alpha * mean / s.sigma) * problem.predict(x, s).eps
        spread = eta * t.alpha * math.sqrt(max((s.sigma / s.alpha) ** 2 - (t.sigma / t.alpha) ** 2, 0.0))
        return Step(out if spread == 0.0 else out + spread * noise(s, t))
