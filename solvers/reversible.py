"""Exactly reversible solvers of the probability flow: run backwards on the same grid they give the start back, to rounding.

An explicit one-step method is not its own inverse: x_s is recovered from x_t up to its local error only. These carry a second
state, and from the two each step can be undone by solving it for what it started from, with the same network calls:

    out = encode(score, x, solver="belm", steps=20)
    back = sample(score, x=out.x, carry=out.carry, solver="belm", steps=20)       # back.x is x to rounding

The carry is half of the state: without it the way back is as good as the method's order. Nothing is ever solved iteratively.
Rounding is the limit: an undone step divides by what the step multiplied with, so parts that decay one way grow the other way
(in ``BELM`` by the square of the ratio of the first to the last step).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sde.errors import InputError, PathError
from sde.prediction import Knot

from .base import Form, Noise, Problem, Step
from .formula import one_node
from .runge_kutta import EULER, VARIABLES, RungeKutta


@dataclass(frozen=True)
class ReversibleHeun:
    """Reversible Heun (Kidger et al. 2021) on the flow, with y, clock and slope f of one of ``runge_kutta.VARIABLES``.

        v_t = 2 y_s - v_s + h f(v_s, s)
        y_t = y_s + h/2 (f(v_s, s) + f(v_t, t))          v_0 = y_0, h = clock(t) - clock(s)

    Order 2 in y. The step from t to s, h < 0, of (y_t, v_t) is (y_s, v_s): put the first line's v_t into 2 y_t - v_t - h
    f(v_t, t), with y_t from the second. The carry is v and f(v), so a step costs one call, and a run one more for f(v_0).

    What it is not: damped. v alternates around y, and its distance to y neither falls nor, where f is contracting, stays
    small: on f = -k y it grows unless h is small (no negative real number lies in the region of stability). Use more steps than
    for Heun.
    """

    variable: str = "t"

    order = 2.0
    weak = strong = None
    stages = 1
    stochastic = takes_eta = False
    linear = reversible = True
    extra = 1
    start_rule = "one call more"

    def __post_init__(self) -> None:
        if self.variable not in VARIABLES:
            raise InputError(f"variable={self.variable!r}: use one of {', '.join(map(repr, VARIABLES))}")

    @property
    def target(self) -> str | None:
        return VARIABLES[self.variable].target

    @property
    def invariant(self) -> bool:
        return self.variable != "t"

    @property
    def reduced(self) -> RungeKutta:
        """Euler's method in the same variable; not reversible."""
        return RungeKutta(EULER, VARIABLES[self.variable].whole)

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        v = VARIABLES[self.variable]
        v.check(s, t)
        for k in (s, t):
            if not v.reaches(k):
                raise PathError(
                    f"the slope in {self.variable} is infinite at t = {k.t:g}, and this method needs it at both ends: start "
                    "and stop off it, such as at the path's t_min"
                )
        h = v.clock(t) - v.clock(s)

        def slope(at: Form, k: Knot) -> Form:
            return problem.predict(v.size(k) * at, k).combine(*v.slope(k))

        y = (1.0 / v.size(s)) * x
        other, before = (y, slope(y, s)) if carry is None else carry
        other = problem.keep(2.0 * y - other + h * before)
        after = slope(other, t)
        out = y + (0.5 * h) * before + (0.5 * h) * after
        return Step(v.size(t) * out, (other, after))


@dataclass(frozen=True)
class BELM:
    """Two-step explicit methods that are solved for their oldest state: O-BELM (Wang et al. 2024) and BDIA (Zhang et al. 2023).

        x_t = D(s -> t) + w (x_r - D(s -> r)),   D(s -> u) = alpha_u/alpha_s x_s + (sigma_u - alpha_u sigma_s/alpha_s) eps(x_s)

    r is the knot before s, D the DDIM step from s, forwards or backwards. One call a step. The step from s to r of the same
    form with weight 1/w gives x_r back from x_t: the method is its own inverse where w(s, r, t) = 1 / w(s, t, r).

    gamma None : w = (alpha_t/alpha_r) (h/k)^2, h = rho_t - rho_s, k = rho_s - rho_r, rho = sigma/alpha: O-BELM, the only w of
                 local order 3 whatever h/k. With y = x/alpha, y' = eps, D is a Taylor polynomial of degree one, so its errors
                 in y are h^2/2 y'' and k^2/2 y'', and w must turn the second into the first.
    gamma > 0  : w = gamma towards data, 1/gamma towards noise: BDIA. gamma = 1 is of local order 3 where neighbouring steps
                 and alphas differ by O(h), since w differs from O-BELM's by O(h) there; any other is of local order 2.

    Orders, on grids whose neighbouring steps tend to equal ones: 2 for O-BELM and gamma = 1, else 1 (for gamma near 1 after
    very many steps only: the two parts of the error are of size 1 - gamma and h). On grids whose steps alternate between two
    sizes both fall to order 1: over two steps the parasitic root becomes 1, a double one with the principal root.

    The carry is (r, x_r). The first step is DDIM, D(s -> t), of local order 2, once. The first step of the way back has the
    knot of the carry as its aim, and its state as result, without a call; so a run costs its steps, its reverse one less.

    w is minus the parasitic root: its product over a grid, (last step / first step)^2 in rho for O-BELM, says how rounding
    grows. That is decay from noise to data on the usual grids, and growth on the way to noise, which the way back undoes.
    """

    gamma: float | None = None

    weak = strong = None
    stages = 1
    stochastic = takes_eta = False
    linear = reversible = True
    target = "eps"
    start_rule = "started by ddim"

    def __post_init__(self) -> None:
        g = self.gamma
        if g is not None and (isinstance(g, bool) or not isinstance(g, (int, float)) or not 0.0 < g <= 1.0):
            raise InputError(f"gamma={g!r}: must be a number in (0, 1], or None for O-BELM")

    @property
    def invariant(self) -> bool:
        return self.gamma is None  # gamma weighs x itself, whatever its scale

    @property
    def order(self) -> float:
        return 2.0 if self.gamma in (None, 1.0) else 1.0

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        for k in (s, t):
            if k.alpha == 0.0:
                raise PathError(f"alpha({k.t:g}) = 0: sigma/alpha is infinite there; start (to encode, stop) just below")
        before, old = carry or (None, None)
        if before is not None and before.t == t.t:  # the way back: the step that led here started from the carried state
            return Step(old, (s, x))
        eps = problem.predict(x, s).eps
        out = one_node(s, t, 0.0, "eps", x, eps, _no_noise)
        if before is not None:
            if (before.t > s.t) == (t.t > s.t):
                raise InputError(
                    f"carry is of t = {before.t:g}, which this run would reach after t = {s.t:g}, but its grid goes to "
                    f"t = {t.t:g}: run the same times in reverse"
                )
            out = out + self._weight(before, s, t) * (old - one_node(s, before, 0.0, "eps", x, eps, _no_noise))
        return Step(out, (s, x))

    def _weight(self, r: Knot, s: Knot, t: Knot) -> float:
        if self.gamma is not None:
            return self.gamma if t.t < s.t else 1.0 / self.gamma
        rho = [k.sigma / k.alpha for k in (r, s, t)]
        return t.alpha / r.alpha * ((rho[2] - rho[1]) / (rho[1] - rho[0])) ** 2


def _no_noise(s: Knot, t: Knot) -> Form:
    raise InputError("this method is deterministic")
