"""Explicit Runge-Kutta methods on the probability flow: tableaux as data, two variables to apply them in.

    in t    dx/dt = alpha' x0 + sigma' eps                      (the velocity; any path, finite also where alpha = 0)
    in rho  d(x/alpha)/d rho = eps,  rho = sigma / alpha        (the variable of Karras et al. 2022)

Orders are those of the tableau. A stage at a time where the slope is infinite (sigma'(0) of VP, eps at sigma = 0 where no
network defines it) cannot be evaluated: such a last step is an Euler step, as in EDM's sampler; its network calls are counted
like all others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sde.errors import InputError, PathError
from sde.prediction import Knot

from .base import Form, Noise, Problem, Step


@dataclass(frozen=True)
class Tableau:
    """A Butcher tableau: strictly lower a, weights b, nodes c, and the order it claims, checked at construction up to order
    four.
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    source: str = ""

    def __post_init__(self) -> None:
        n = len(self.c)
        if len(self.b) != n or len(self.a) != n or any(len(row) != i for i, row in enumerate(self.a)):
            raise InputError(f"tableau {self.name}: a must be strictly lower triangular with {n} rows, b and c of length {n}")
        for residual in self._order_conditions():
            if abs(residual) > 1e-12:
                raise InputError(
                    f"tableau {self.name} does not satisfy the conditions of order {self.order} (residual {residual:.2e})"
                )

    def _order_conditions(self) -> list[float]:
        a = [[*row, *[0.0] * (len(self.c) - len(row))] for row in self.a]
        b, c, n = self.b, self.c, range(len(self.c))

        def apply(v: list[float]) -> list[float]:
            return [sum(a[i][j] * v[j] for j in n) for i in n]

        def weigh(v: list[float]) -> float:
            return sum(b[i] * v[i] for i in n)

        one, cc = [1.0] * len(c), list(c)
        c2, c3 = [x * x for x in c], [x**3 for x in c]
        ac = apply(cc)
        conditions = [(0, s - t) for s, t in zip(apply(one), c, strict=True)]
        conditions += [(1, weigh(one) - 1), (2, weigh(cc) - 1 / 2), (3, weigh(c2) - 1 / 3), (3, weigh(ac) - 1 / 6)]
        conditions += [(4, weigh(c3) - 1 / 4), (4, weigh([x * y for x, y in zip(c, ac, strict=True)]) - 1 / 8)]
        conditions += [(4, weigh(apply(c2)) - 1 / 12), (4, weigh(apply(ac)) - 1 / 24)]
        return [residual for order, residual in conditions if order <= self.order]


EULER = Tableau("euler", 1, (0.0,), ((),), (1.0,), "Euler 1768")
MIDPOINT = Tableau("midpoint", 2, (0.0, 0.5), ((), (0.5,)), (0.0, 1.0), "Runge 1895")
HEUN = Tableau("heun", 2, (0.0, 1.0), ((), (1.0,)), (0.5, 0.5), "Heun 1900; Karras et al. 2022, algorithm 1")
RK4 = Tableau(
    "rk4", 4, (0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), "Kutta 1901"
)


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method in the variable "t" or "rho". ``stages`` network calls a step."""

    tableau: Tableau
    variable: str = "t"

    weak = strong = None
    stochastic = takes_eta = False
    linear = True

    def __post_init__(self) -> None:
        if self.variable not in ("t", "rho"):
            raise InputError(f"variable={self.variable!r}: use 't' or 'rho'")

    @property
    def order(self) -> float:
        return float(self.tableau.order)

    @property
    def stages(self) -> int:
        return len(self.tableau.b)

    @property
    def reduced(self) -> RungeKutta:
        """The one-stage method in the same variable."""
        return RungeKutta(EULER, self.variable)

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        field = _in_t if self.variable == "t" else _in_rho
        tableau = self.tableau
        if self.variable == "t" and not field.finite(s):
            raise PathError(
                f"the slope of x in t is infinite at t = {s.t:g} (sigma' = {s.dsigma:g}): start elsewhere, such as the "
                "path's t_min"
            )
        if 1.0 in tableau.c and not field.finite(t):
            tableau = EULER
        at_s = field.knot(problem, s, t, 0.0)
        h, y = field.clock(t) - field.clock(s), field.enter(x, at_s)
        slopes: list[Form] = []
        for c, row in zip(tableau.c, tableau.a, strict=True):
            stage = _combine(y, h, row, slopes)
            knot = field.knot(problem, s, t, c)
            slopes.append(field.slope(problem, field.leave(stage, knot), knot))
        return Step(field.leave(_combine(y, h, tableau.b, slopes), t))


def _combine(y: Form, h: float, weights: tuple[float, ...], slopes: list[Form]) -> Form:
    for w, k in zip(weights, slopes, strict=True):
        if w != 0.0:
            y = y + (h * w) * k
    return y


class _in_t:  # noqa: N801
    """x in t: the slope is the velocity alpha' x0 + sigma' eps."""

    @staticmethod
    def clock(k: Knot) -> float:
        return k.t

    @staticmethod
    def finite(k: Knot) -> bool:
        return math.isfinite(k.dalpha) and math.isfinite(k.dsigma)

    @staticmethod
    def knot(problem: Problem, s: Knot, t: Knot, c: float) -> Knot:
        return s if c == 0.0 else t if c == 1.0 else problem.path.knot(s.t + c * (t.t - s.t))

    @staticmethod
    def enter(x: Form, k: Knot) -> Form:
        return x

    @staticmethod
    def leave(x: Form, k: Knot) -> Form:
        return x

    @staticmethod
    def slope(problem: Problem, x: Form, k: Knot) -> Form:
        return problem.predict(x, k).combine(k.dalpha, k.dsigma)


class _in_rho:  # noqa: N801
    """x/alpha in rho = sigma/alpha: the slope is eps."""

    @staticmethod
    def clock(k: Knot) -> float:
        return k.sigma / k.alpha

    @staticmethod
    def finite(k: Knot) -> bool:
        return k.sigma > 0.0 and k.alpha > 0.0

    @staticmethod
    def knot(problem: Problem, s: Knot, t: Knot, c: float) -> Knot:
        if s.alpha == 0.0 or t.alpha == 0.0:
            k = s if s.alpha == 0.0 else t
            raise InputError(
                f"alpha({k.t:g}) = 0: sigma/alpha is infinite there, so a method in rho cannot reach it; "
                "start just below (start=...), or use the same method in t"
            )
        if c in (0.0, 1.0):
            return t if c else s
        rho = _in_rho.clock(s) + c * (_in_rho.clock(t) - _in_rho.clock(s))
        return problem.path.knot_at(-math.log(rho))

    @staticmethod
    def enter(x: Form, k: Knot) -> Form:
        return x / k.alpha

    @staticmethod
    def leave(x: Form, k: Knot) -> Form:
        return k.alpha * x

    @staticmethod
    def slope(problem: Problem, x: Form, k: Knot) -> Form:
        return problem.predict(x, k).eps
