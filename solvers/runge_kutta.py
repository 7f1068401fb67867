"""Runge-Kutta methods on the probability flow, in five variables. Tableaux are data (``tableaux.py``).

The flow of x, divided by a scale and told by a clock, has a slope that is one row of the prediction, with no linear term left:

    variable      y         clock        dy/dclock
    "t"           x         t            alpha' x0 + sigma' eps     (the velocity; finite also where alpha = 0)
    "rho"         x/alpha   sigma/alpha  eps                        (Karras et al. 2022)
    "chi"         x/sigma   alpha/sigma  x0                         (its mirror image; finite also where alpha = 0)
    "lawson_x0"   x/sigma   lambda       e^lambda x0                (Lawson 1967: the linear term as integrating factor)
    "lawson_eps"  x/alpha   lambda       -e^-lambda eps

Constant eps is integrated exactly in rho, constant x0 in chi, constant velocity in t; Lawson's forms approximate e^lambda
by a polynomial, so they are exact on none: the price of equal steps in lambda without exponential weights.

Where a clock or a slope is infinite (sigma'(0) of VP, eps at sigma = 0 where no network defines it, chi and lambda at sigma
= 0) a stage cannot be evaluated: such a first or last step is one of order one, an Euler step of t, rho or chi, as the last
step of EDM's sampler is; its network calls are counted like all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sde.errors import InputError, PathError
from sde.path import Path
from sde.prediction import Knot

from .base import Form, Noise, Problem, Step
from .tableaux import EULER as EULER
from .tableaux import HEUN as HEUN
from .tableaux import MIDPOINT as MIDPOINT
from .tableaux import RK4 as RK4
from .tableaux import Tableau as Tableau


@dataclass(frozen=True)
class Variable:
    """One row of the table above. ``slope`` is (a, b) of a x0 + b eps; ``lam`` gives lambda from the clock (None: it is t).

    ``whole`` is the variable whose Euler step replaces a step to or from a place that the clock or the slope does not reach.
    """

    name: str
    scale: str
    clock: Callable[[Knot], float]
    slope: Callable[[Knot], tuple[float, float]]
    lam: Callable[[float], float] | None
    target: str | None
    whole: str

    def size(self, k: Knot) -> float:
        """The scale's value."""
        return getattr(k, self.scale) if self.scale else 1.0

    def reaches(self, k: Knot) -> bool:
        """Whether a stage at this knot has a finite slope, whatever the network predicts."""
        return math.isfinite(k.dalpha) and math.isfinite(k.dsigma) if self.lam is None else math.isfinite(k.lam)

    def check(self, s: Knot, t: Knot) -> None:
        """Refuse the steps that have no limit: PathError."""
        if self.lam is None and not self.reaches(s):
            raise PathError(
                f"the slope of x in t is infinite at t = {s.t:g} (sigma' = {s.dsigma:g}): start elsewhere, such as the "
                "path's t_min"
            )
        if self.scale == "alpha" and s.alpha * t.alpha == 0.0:
            raise PathError(
                f"alpha({(t if s.alpha else s).t:g}) = 0: a method in {self.name} cannot reach it; "
                "start just below (start=...), or use the same method in t or chi"
            )
        if self.scale == "sigma" and s.sigma == 0.0:
            raise PathError(
                f"sigma({s.t:g}) = 0: a method in {self.name} cannot start there; start (or, to encode, stop) at a time "
                "with sigma > 0, such as the path's t_min"
            )


def _chi(k: Knot) -> float:
    return k.alpha / k.sigma if k.sigma else math.inf


VARIABLES = {
    v.name: v
    for v in (
        Variable("t", "", lambda k: k.t, lambda k: (k.dalpha, k.dsigma), None, "velocity", "t"),
        Variable("rho", "alpha", lambda k: k.sigma / k.alpha, lambda k: (0.0, 1.0), lambda rho: -math.log(rho), "eps", "rho"),
        Variable("chi", "sigma", _chi, lambda k: (1.0, 0.0), math.log, "x0", "chi"),
        Variable("lawson_x0", "sigma", lambda k: k.lam, lambda k: (_chi(k), 0.0), lambda lam: lam, None, "chi"),
        Variable("lawson_eps", "alpha", lambda k: k.lam, lambda k: (0.0, -k.sigma / k.alpha), lambda lam: lam, None, "rho"),
    )
}


@dataclass(frozen=True)
class RungeKutta:
    """A Runge-Kutta method in one of the variables above. ``tableau.stages`` network calls a step, order that of the tableau.

        k_i = slope(y + h sum_j a_ij k_j at s + c_i h),    y + h sum_i b_i k_i,    h = clock(t) - clock(s)

    Implicit methods run as ``RungeKutta(fixed_point(GAUSS4, sweeps))``.
    """

    tableau: Tableau
    variable: str = "t"

    weak = strong = None
    stochastic = takes_eta = False
    linear = True

    def __post_init__(self) -> None:
        if self.variable not in VARIABLES:
            raise InputError(f"variable={self.variable!r}: use one of {', '.join(map(repr, VARIABLES))}")
        if not self.tableau.explicit:
            name = self.tableau.name
            raise InputError(f"tableau={name!r} is implicit: give fixed_point({name.upper()}, sweeps), an explicit method")

    @property
    def order(self) -> float:
        return float(self.tableau.order)

    @property
    def stages(self) -> int:
        return self.tableau.stages

    @property
    def target(self) -> str | None:
        return VARIABLES[self.variable].target

    @property
    def invariant(self) -> bool:
        return self.variable != "t"

    @property
    def end_rule(self) -> str:
        if self.variable in ("t", "rho") and 1.0 not in self.tableau.c[: self.stages]:
            return "as any step"
        return "order 1 where the velocity is infinite" if self.variable == "t" else "order 1 at sigma = 0"

    @property
    def reduced(self) -> RungeKutta:
        """The one-stage method of order one."""
        return RungeKutta(EULER, VARIABLES[self.variable].whole)

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        v, nodes = VARIABLES[self.variable], self.tableau.c[: self.stages]
        v.check(s, t)
        h = v.clock(t) - v.clock(s)
        if not math.isfinite(h) or (1.0 in nodes and not v.reaches(t)):
            return Step(_first_order(problem, x, s, t, v.whole))
        knots = _stage_knots(problem.path, v, s, t, nodes)
        slopes: list[Form] = []

        def at(k: Knot, weights: tuple[float, ...]) -> Form:
            out = (v.size(k) / v.size(s)) * x
            for w, slope in zip(weights, slopes, strict=False):
                if w != 0.0:
                    out = out + (v.size(k) * h * w) * slope
            return out

        for j, (knot, row) in enumerate(zip(knots, self.tableau.a, strict=False)):
            slope = problem.predict(at(knot, row), knot).combine(*v.slope(knot))
            slopes.append(problem.keep(slope) if self.tableau.uses[j] > 1 else slope)
        return Step(at(t, self.tableau.b))


def _stage_knots(path: Path, v: Variable, s: Knot, t: Knot, nodes: tuple[float, ...]) -> list[Knot]:
    """The knots of all stages of a step, made in one call."""
    start, end = v.clock(s), v.clock(t)
    inner = sorted({c for c in nodes if c not in (0.0, 1.0)})
    clocks = [start + c * (end - start) for c in inner]
    times = clocks if v.lam is None else path.time(torch.tensor([v.lam(u) for u in clocks], dtype=torch.float64))
    at = dict(zip(inner, path.knots(times), strict=True)) if inner else {}
    return [{0.0: s, 1.0: t, **at}[c] for c in nodes]


def _first_order(problem: Problem, x: Form, s: Knot, t: Knot, variable: str) -> Form:
    """The Euler step in t, rho or chi, also where the clock is infinite."""
    if variable == "t":
        return x + (t.t - s.t) * problem.predict(x, s).combine(s.dalpha, s.dsigma)
    if variable == "rho":
        return (t.alpha / s.alpha) * x + (t.sigma - t.alpha * s.sigma / s.alpha) * problem.predict(x, s).eps
    return (t.sigma / s.sigma) * x + (t.alpha - t.sigma * s.alpha / s.sigma) * problem.predict(x, s).x0
