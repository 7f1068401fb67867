"""Exponential Runge-Kutta solvers: one class for every tableau, deterministic and with the exact noise.

With h = lambda_t - lambda_s, r = 1 + eta^2 and the weights a_ij(z), b_j(z) of a tableau,

    in x0 :  x_t = (sigma_t/sigma_s) e^{-eta^2 h} x_s + alpha_t r h sum_j b_j(-r h) x0_j + N_t
    in eps:  x_t = (alpha_t/alpha_s) x_s - sigma_t r h sum_j b_j(h) eps_j + N_t

and stage i is the same at lambda_s + c_i h with a_ij for b_j. N is one Ornstein-Uhlenbeck path per step: between consecutive
nodes fresh normals are drawn, and carried on by the exact decay, so every stage and the end see the same Brownian path.

Orders. eta = 0: the tableau's. eta > 0: weak order min(order, 2) and strong order 1, whatever the stages. With additive noise
the error is that of Q = sum_j b_j W(c_j) for I = int W(c) dc. Weakly, sum_j b_j c_j = 1/2 (covariance with W(1)) suffices
for order 2; order 3 would need Var Q = Var I = 1/3, but with the classical conditions of order 3 cov(Q, I) = 1/3, hence
Var Q - 1/3 = E (Q - I)^2 > 0: no tableau has it (DPM-Solver-3: 3/8, Simpson's weights: 13/36). Strongly, Q - I has mean
zero and is of size one: h^{3/2} a step.

h is infinite where sigma_t = 0 or alpha_s = 0: such a step is the exact first-order one and costs one call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sde.errors import InputError
from sde.prediction import Knot

from .base import Form, Noise, Problem, Step
from .exponential_tableaux import EXPONENTIAL_EULER, ExponentialTableau, Weight, three_stage, two_stage
from .formula import exponential_step, one_node, value_of


@dataclass(frozen=True)
class ExponentialRK:
    """An exponential Runge-Kutta method on the reverse SDE of any noise level; ``stages`` network calls a step.

    target : "x0" or "eps", the prediction that the weights act on. The step is exact where it is constant.

    eta = 0: DPM-Solver(++) single-step, ETD-RK, RES. eta = 1: SEEDS (Gonzalez et al. 2023), SDE-DPM-Solver++(2S). Not what
    k-diffusion's dpmpp_sde does: see ``PublishedSDE``.
    """

    tableau: ExponentialTableau
    target: str

    stochastic = takes_eta = linear = invariant = True
    strong = 1.0

    def __post_init__(self) -> None:
        if self.target not in ("x0", "eps"):
            raise InputError(f"target={self.target!r}: use 'x0' or 'eps'")

    @property
    def order(self) -> float:
        return float(self.tableau.order)

    @property
    def weak(self) -> float:
        return float(min(self.tableau.order, 2))

    @property
    def stages(self) -> int:
        return len(self.tableau.b)

    @property
    def end_rule(self) -> str:
        return "as any step" if self.stages == 1 else "order 1 to sigma = 0"

    @property
    def reduced(self) -> ExponentialRK:
        """The exponential Euler step: DDIM at eta = 0, DDPM at eta = 1."""
        return ExponentialRK(EXPONENTIAL_EULER, self.target)

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        tableau, eta, h = self.tableau, problem.eta(s), t.lam - s.lam
        first = self._value(problem, x, s)
        if self.stages == 1 or not math.isfinite(h):
            return Step(one_node(s, t, eta, self.target, x, first, noise))
        knots = {c: t if c == 1.0 else problem.path.knot_at(s.lam + c * h) for c in sorted({*tableau.c[1:], 1.0})}
        normals = path_normals(eta, self.target, [s, *knots.values()], noise) if eta != 0.0 else [None] * len(knots)
        along = dict(zip(knots, normals, strict=True))
        rate = 1.0 + eta * eta
        z = -rate * h if self.target == "x0" else h

        def reach(c: float, row: tuple[Weight, ...]) -> Form:
            parts = [(rate * h * w(z), v) for w, v in zip(row, values, strict=True) if w.terms]
            return exponential_step(s, knots[c], eta, self.target, x, parts, lambda a, b: along[c])

        values = [first]
        for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
            values.append(self._value(problem, reach(c, row), knots[c]))
        return Step(reach(1.0, tableau.b))

    def _value(self, problem: Problem, x: Form, k: Knot) -> Form:
        return value_of(problem.predict(x, k), k, self.target)


def path_normals(eta: float, target: str, knots: list[Knot], noise: Noise) -> list[Form]:
    """For every knot after the first, the unit normal of the noise from the first knot to it, all of one Brownian path.

    N is a Brownian motion in the clock v, times a factor: v = e^{2 eta^2 u} - 1 in x0, 1 - e^{-2u} in eps, u the way in
    lambda. So N_i / std N_i = sum over the stretches k up to i of sqrt((v_k - v_{k-1}) / v_i) z_k.
    """
    rate = 2.0 * eta * eta if target == "x0" else -2.0
    ways = [k.lam - knots[0].lam for k in knots]
    draws = [noise(a, b) for a, b in pairwise(knots)]

    def part(k: int, i: int) -> Form:
        grown = math.exp(rate * (ways[k] - ways[i]))  # written so that a wide step does not overflow
        share = grown * math.expm1(rate * (ways[k - 1] - ways[k])) / math.expm1(-rate * ways[i])
        return math.sqrt(share) * draws[k - 1]

    return [sum((part(k, i) for k in range(2, i + 1)), part(1, i)) for i in range(1, len(knots))]


@dataclass(frozen=True)
class SinglestepSchedule:
    """DPM-Solver-fast (Lu et al. 2022, section 3.4): steps of three calls, the last ones shorter, as the grid's end needs.

    tail : calls of the last steps, (2, 1), (1,) or (2,): with K steps a run costs 3 K - 3, 3 K - 2 or 3 K - 1 calls, so
           ``spending(nfe)`` is the schedule that spends a budget exactly, in K = nfe // 3 + 1 steps (the released rule).

    Order 2, and 3 with the tail (2,): a last step of order q leaves an error of h^{q+1}, once. eta > 0 (k-diffusion's
    ``dpm_fast`` at its eta = 1 or 0): weak order 2, strong order 1.
    """

    target: str = "eps"
    tail: tuple[int, ...] = (2, 1)

    stages = 3
    stochastic = takes_eta = linear = invariant = uneven = True
    strong = 1.0
    weak = 2.0

    def __post_init__(self) -> None:
        if self.target not in ("x0", "eps") or self.tail not in ((2, 1), (1,), (2,)):
            raise InputError(f"{self}: target 'x0' or 'eps', tail (2, 1), (1,) or (2,)")

    @staticmethod
    def spending(nfe: int, target: str = "eps") -> SinglestepSchedule:
        """The schedule that spends exactly ``nfe`` calls in nfe // 3 + 1 steps."""
        if nfe < 1:
            raise InputError(f"nfe={nfe}: at least one call")
        return SinglestepSchedule(target, ((2, 1), (1,), (2,))[nfe % 3])

    @property
    def order(self) -> float:
        return float(min(self.tail[-1] + 1, 3))

    @property
    def end_rule(self) -> str:
        return "last steps of order " + ", ".join(map(str, self.tail))

    @property
    def reduced(self) -> ExponentialRK:
        return ExponentialRK(EXPONENTIAL_EULER, self.target)

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        left = s.count - s.index  # steps still to go, this one included
        calls = self.tail[-left] if 0 < left <= len(self.tail) else 3
        tableau = {1: EXPONENTIAL_EULER, 2: two_stage(0.5, exact=False), 3: three_stage()}[calls]
        return ExponentialRK(tableau, self.target).step(problem, x, s, t, carry, noise)


@dataclass(frozen=True)
class PublishedSDE:
    """k-diffusion's ``sample_dpmpp_sde``: the two-stage step of SDE-DPM-Solver++(2S), midpoint in lambda, with other noise.

    Its two ancestral splits, s -> midpoint and s -> t, are the exact mean and variance of the process at eta = 1; what is
    off is how the noise at the end, N_t, hangs together with that of the stage, N_m. On one path
    corr(N_m, N_t)^2 = e^{-h}/(1 + e^{-h}). Here

    tree      one Brownian path in sigma/alpha (the released default): corr^2 = 1/(1 + e^{-h/2}), right in the limit h -> 0.
              The covariance of N_t with the prediction at m is off by h^3 a step, so weak order 2 is kept
    not tree  independent normals (released code given another noise sampler, such as torch.randn_like): corr = 0. That
              covariance, h^2 a step, is lost: weak order 1, with the error constant of 'ddpm' at twice its cost

    Use 'dpmpp_2s_sde'. The released eta is another parameter; it agrees with ours at 0 and 1. Two calls a step.
    """

    tree: bool = True

    target = "x0"
    stages = 2
    order = 2.0
    strong = 1.0
    stochastic = takes_eta = linear = invariant = True
    end_rule = "order 1 to sigma = 0"

    @property
    def weak(self) -> float:
        return 2.0 if self.tree else 1.0

    @property
    def reduced(self) -> ExponentialRK:
        return ExponentialRK(EXPONENTIAL_EULER, "x0")

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        eta, h = problem.eta(s), t.lam - s.lam
        first = problem.predict(x, s).x0
        if not math.isfinite(h):
            return Step(one_node(s, t, eta, "x0", x, first, noise))
        m = problem.path.knot_at(s.lam + 0.5 * h)

        def end(a: Knot, b: Knot) -> Form:
            if not self.tree:
                return noise(s, t)
            share = math.expm1(-0.5 * h) / math.expm1(-h)  # of the path in sigma/alpha from s to t, up to m
            return math.sqrt(share) * drawn[0] + math.sqrt(1.0 - share) * noise(m, t)

        drawn: list[Form] = []

        def stage(a: Knot, b: Knot) -> Form:
            drawn.append(noise(s, m) if self.tree else noise(s, s))
            return drawn[0]

        second = problem.predict(one_node(s, m, eta, "x0", x, first, stage), m).x0
        return Step(one_node(s, t, eta, "x0", x, second, end))
