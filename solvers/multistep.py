"""Multistep methods that predict only: Adams-type with exact weights, and with fixed ones.

    Multistep(k, "x0")               DPM-Solver++ kM, res_km            Multistep(k, "eps", "rho")     LMS, DEIS rho, iPNDM-v
    Multistep(k, "eps", "t")         DEIS t (tAB)                       Multistep(k, "velocity", "t")  Adams-Bashforth
    FixedWeights(IPNDM[k])           iPNDM: Adams-Bashforth's weights of equal steps, whatever the grid

A method of k steps has local errors h^{k+1} once its history is full, but its first step is of order one: its error, made once,
is h^2, so the end point has order min(k, 2) whatever the label. ``starts.Started`` and ``starts.GradedStart`` keep the order.
With noise the weak order is min(k, 2) and the strong order 1 whatever k and the start: one normal a step does not say more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sde.errors import InputError, PathError, check_counts
from sde.path import Path
from sde.prediction import Knot, Prediction

from .base import Form, Noise, Problem, Step
from .formula import BASES, TARGETS, exact_weights, exponential_step, interpolable, one_node, phi, value_of

History = list[tuple[Knot, Form]]
RULES = ("exact", "midpoint", "published_3m")


@dataclass(frozen=True)
class Multistep:
    """Adams-type method: the polynomial goes through the last ``steps`` predictions. One network call a step.

    target : "x0", "eps" or "velocity", what is interpolated
    basis  : the variable of the polynomial, "lam", "t" or "rho"; "t" for the velocity: Adams-Bashforth on any grid
    rule   : "exact" weights. "midpoint", DPM-Solver++(2M)'s published weights (Lu et al. 2022): half the constant's weight
             times the slope; of order two too. "published_3m", the three-step formula of released code (dpm-solver,
             k-diffusion dpmpp_3m_sde, diffusers order 3): the weight of the second difference is phi_3 where the polynomial's
             integral is 2 phi_3, so that it is of order two even with exact starting values. Its second step is exact.
    lower_final : lower the order towards the last step, as released code does for few steps

    Order min(steps, 2): the first step is of order one (its error, once, is second order); exact on constant predictions.
    ``inner_order`` is what a start of enough order brings out.
    """

    steps: int
    target: str
    basis: str = "lam"
    rule: str = "exact"
    lower_final: bool = False

    stages = 1
    linear = True

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        if self.steps < 1 or self.target not in TARGETS or self.basis not in BASES or self.rule not in RULES:
            raise InputError(
                f"{self}: steps >= 1, target 'x0', 'eps' or 'velocity', basis one of {sorted(BASES)}, rule one of {RULES}"
            )
        if self.target == "velocity" and (self.basis != "t" or self.rule != "exact"):
            raise InputError(f"{self}: a method in the velocity interpolates in t with exact weights: give basis='t'")
        if self.rule == "midpoint" and (self.steps, self.basis) != (2, "lam"):
            raise InputError(f"{self}: the midpoint rule is the published two-step method in lambda")
        if self.rule == "published_3m" and (self.steps, self.basis) != (3, "lam"):
            raise InputError(f"{self}: the rule 'published_3m' is the published three-step method in lambda")

    @property
    def order(self) -> float:
        return float(min(self.steps, 2))

    @property
    def weak(self) -> float | None:
        return float(min(self.steps, 2)) if self.takes_eta else None

    @property
    def strong(self) -> float | None:
        return 1.0 if self.takes_eta else None

    @property
    def stochastic(self) -> bool:
        return self.takes_eta

    @property
    def takes_eta(self) -> bool:
        return self.target != "velocity"

    @property
    def inner_order(self) -> float:
        return 2.0 if self.rule == "published_3m" else float(self.steps)

    @property
    def invariant(self) -> bool:
        return self.basis != "t"

    @property
    def start_rule(self) -> str:
        return "as any step" if self.steps == 1 else "order 1 first step, then growing"

    @property
    def end_rule(self) -> str:
        return "lowered to order 1 at the end" if self.lower_final and self.steps > 1 else "as any step"

    def remember(self, prediction: Prediction, k: Knot, carry: Any) -> Any:
        """The carry with the prediction at k put in front."""
        return [(k, value_of(prediction, k, self.target)), *(carry or [])][: self.steps]

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        history = self.remember(problem.predict(x, s), s, carry)
        usable = usable_history(history, s, t, self.target, self.steps, self.lower_final)
        eta = problem.eta(s)
        if len(usable) == 1:
            return Step(one_node(s, t, eta, self.target, x, history[0][1], noise), history)
        nodes, values = [k for k, _ in usable], [v for _, v in usable]
        weights = self._weights(problem.path, s, t, nodes, 1.0 + eta * eta)
        return Step(exponential_step(s, t, eta, self.target, x, list(zip(weights, values, strict=True)), noise), history)

    def _weights(self, path: Path, s: Knot, t: Knot, nodes: list[Knot], r: float) -> list[float]:
        h = t.lam - s.lam
        if self.rule == "midpoint":
            total = exact_weights(path, s, t, nodes[:1], self.target, self.basis, r)[0]
            slope = 0.5 * total * h / (s.lam - nodes[1].lam)
            return [total + slope, -slope]
        weights = exact_weights(path, s, t, nodes, self.target, self.basis, r)
        if self.rule == "published_3m" and len(nodes) == 3:
            # int k(u) (u/h)^2 du = 2 r h phi_3: the published formula has half of it, times h^2 [f; s, s', s'']
            excess = r * h * phi(3, -r * h if self.target == "x0" else h)
            weights = [w - excess * h * h * d for w, d in zip(weights, divided_difference(nodes), strict=True)]
        return weights


def usable_history(history: History, s: Knot, t: Knot, target: str, most: int, lower_final: bool) -> History:
    """The part of the history, s first, that a step s -> t may interpolate; only s where lambda is infinite at either end."""
    if not (interpolable(s, target) and interpolable(t, target)):
        return history[:1]
    if lower_final and t.count >= 0:
        most = min(most, t.count - s.index)
    return [item for item in history[: max(most, 1)] if interpolable(item[0], target)]


def divided_difference(nodes: list[Knot]) -> list[float]:
    """The coefficients of the highest divided difference in lambda."""
    return [1.0 / math.prod(k.lam - other.lam for other in nodes if other is not k) for k in nodes]


#: Adams-Bashforth's weights of equal steps, newest first (Bashforth & Adams 1883).
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True)
class FixedWeights:
    """x/alpha in rho = sigma/alpha by fixed weights: x_t/alpha_t = x_s/alpha_s + (rho_t - rho_s) sum_j b_j eps_j.

    ``weights[n - 1]`` are the b_j, newest first, where n predictions are known. One network call a step. With rows of
    ``ADAMS_BASHFORTH`` it is iPNDM (Liu et al. 2022, Zhang & Chen 2022): the weights are right for equal steps in rho alone,
    and on any other grid the error is of order two however many steps (its constant is small where steps change slowly).
    With (gamma, 1 - gamma) it is gradient estimation (Permenter & Yuan 2024): d + (gamma - 1)(d - d_prev), of order one
    unless gamma = 3/2. ``Multistep(k, "eps", "rho")`` has the right weights of any grid; where the grid is coarse and its
    steps shrink fast, the fixed ones are the better damped. A step to sigma = 0 is of order one and gives alpha x0.
    """

    weights: tuple[tuple[float, ...], ...]

    stages = 1
    weak = strong = None
    stochastic = takes_eta = False
    linear = True
    target = "eps"
    invariant = True
    lower_final = False
    start_rule = "order 1 first step, then growing"

    def __post_init__(self) -> None:
        for n, row in enumerate(self.weights, 1):
            if len(row) != n or abs(math.fsum(row) - 1.0) > 1e-12:
                raise InputError(f"weights[{n - 1}]={row}: give {n} numbers whose sum is 1")
        if not self.weights:
            raise InputError("weights=(): give at least ((1.0,),)")

    @property
    def steps(self) -> int:
        return len(self.weights)

    @property
    def order(self) -> float:
        """Two if the last row integrates a slope on equal steps, sum_j j b_j = -1/2: no more on grids of unequal ones."""
        return 2.0 if abs(math.fsum(j * b for j, b in enumerate(self.weights[-1])) + 0.5) < 1e-12 else 1.0

    @property
    def inner_order(self) -> float:
        return self.order

    def remember(self, prediction: Prediction, k: Knot, carry: Any) -> Any:
        return [(k, prediction.eps), *(carry or [])][: self.steps]

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        if s.alpha == 0.0:
            raise PathError(f"alpha({s.t:g}) = 0: a method in eps cannot start there; start just below, or use target 'x0'")
        history = self.remember(problem.predict(x, s), s, carry)
        used = history if math.isfinite(t.lam) and math.isfinite(s.lam) else history[:1]
        value: Form = 0.0
        for (_, v), b in zip(used, self.weights[len(used) - 1], strict=True):
            value = b * v + value
        return Step(one_node(s, t, 0.0, "eps", x, value, noise), history)
