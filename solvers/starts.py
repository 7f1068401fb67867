"""Starts that keep the order of a multistep method.

A method of k steps has too short a history for its first k - 1 steps. Left to itself it takes the first with order one and is
of order two in the end. Two remedies, both counted honestly:

    Started(main, starter)   a single-step method takes the first k - 1 steps; order k - 1 suffices, since a local error of
                             order k made a fixed number of times is a global one of order k
    GradedStart(main)        the first step is taken in small ones, doubling in lambda, by the method itself

There is no rule for the end but ``lower_final`` of the methods themselves: a final denoising step is a grid that ends at
sigma = 0 (``stop=0.0``), which costs the one call it always costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sde.errors import InputError
from sde.path import Path
from sde.prediction import Knot, Prediction

from .base import Form, Noise, Problem, Solver, Step
from .formula import interpolable, one_node


class First:
    """A problem that remembers its first prediction: the one a single-step method makes at the knot it starts from."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.prediction: Prediction | None = None

    @property
    def path(self) -> Path:
        return self._problem.path

    def predict(self, x: Form, knot: Knot, /) -> Prediction:
        prediction = self._problem.predict(x, knot)
        self.prediction = self.prediction or prediction
        return prediction

    def eta(self, knot: Knot, /) -> float:
        return self._problem.eta(knot)

    def keep(self, x: Form, /) -> Form:
        return self._problem.keep(x)


@dataclass(frozen=True)
class Started:
    """A multistep method whose first steps are taken by a single-step one. The starter's first prediction of each step joins
    the history, so nothing is called twice.

    main    : ``Multistep``, ``FixedWeights``, ``UniPC`` or ``AdamsMoulton``
    starter : any solver without memory whose first call is at the state it starts from
    first   : the number of steps it takes (default: main.steps - 1, until the history is full)

    Order min(order of main inside, order of starter + 1, first + 2 where ``first`` leaves the history short). A step is
    main's, of ``stages`` calls; the start costs ``extra`` calls beyond (fewer on grids of fewer steps). Steps from or to an
    infinite lambda are main's: they are of order one by nature.
    """

    main: Any
    starter: Solver
    first: int | None = None

    linear = True

    def __post_init__(self) -> None:
        if not hasattr(self.main, "remember"):
            raise InputError(f"main={self.main}: give a multistep method, one with a history, such as Multistep(3, 'x0')")
        if self.first is not None and self.first < 0:
            raise InputError(f"first={self.first}: must be >= 0")

    @property
    def steps(self) -> int:
        """Steps taken by the starter."""
        return self.main.steps - 1 if self.first is None else self.first

    @property
    def order(self) -> float:
        inside = min(self.main.inner_order, 2.0) if self.main.lower_final else self.main.inner_order
        growing = self.steps + 2.0 if self.steps < self.main.steps - 1 else math.inf
        return min(inside, (self.starter.order or 0.0) + 1.0 if self.steps else math.inf, growing)

    @property
    def weak(self) -> float | None:
        return self.main.weak if self.takes_eta else None

    @property
    def strong(self) -> float | None:
        return self.main.strong if self.takes_eta else None

    @property
    def stages(self) -> int:
        return self.main.stages

    @property
    def extra(self) -> int:
        """Network calls of the start beyond ``stages`` a step."""
        return self.steps * (self.starter.stages - self.main.stages)

    @property
    def takes_eta(self) -> bool:
        return self.main.takes_eta and self.starter.takes_eta

    @property
    def stochastic(self) -> bool:
        return self.takes_eta

    @property
    def target(self) -> str | None:
        return self.main.target if getattr(self.starter, "target", None) == self.main.target else None

    @property
    def invariant(self) -> bool:
        return self.main.invariant and getattr(self.starter, "invariant", False)

    @property
    def reduced(self) -> Any:
        """main without its start."""
        return self.main

    @property
    def rewrites(self) -> bool:
        return getattr(self.main, "rewrites", False)

    @property
    def start_rule(self) -> str:
        return f"{self.steps} steps of order {self.starter.order:g}, {self.starter.stages} calls each"

    @property
    def end_rule(self) -> str:
        return getattr(self.main, "end_rule", "as any step")

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        done, inner = carry or (0, None)
        if done >= self.steps or not (interpolable(s, self.main.target) and interpolable(t, self.main.target)):
            x, inner = self.main.step(problem, x, s, t, inner, noise)
            return Step(x, (done, inner))
        seen = First(problem)
        x, _ = self.starter.step(seen, x, s, t, None, noise)
        if seen.prediction is None:
            raise InputError(f"starter={self.starter} made no prediction where it started: give another")
        return Step(x, (done + 1, self.main.remember(seen.prediction, s, inner)))


@dataclass(frozen=True)
class GradedStart:
    """A multistep method whose first step is divided in lambda at h 2^-L, ..., h/4, h/2: L more calls, by the method itself.

    The first of these, of order one, errs by (h 2^-L)^2. ``levels`` None takes as many as keep the order k of the
    method, (h 2^-L)^2 <= h^k / 64: about (k - 2)/2 log2(1/h) + 3. A fixed L leaves the order two, with a constant 4^L smaller.
    Takes any eta. Nothing is divided where lambda is infinite.
    """

    main: Any
    levels: int | None = None

    linear = True

    def __post_init__(self) -> None:
        if not hasattr(self.main, "remember"):
            raise InputError(f"main={self.main}: give a multistep method, one with a history, such as Multistep(3, 'x0')")
        if self.levels is not None and self.levels < 0:
            raise InputError(f"levels={self.levels}: must be >= 0, or None for as many as keep the order")

    @property
    def order(self) -> float:
        inside = min(self.main.inner_order, 2.0) if self.main.lower_final else self.main.inner_order
        return inside if self.levels is None else self.main.order

    @property
    def weak(self) -> float | None:
        return self.main.weak

    @property
    def strong(self) -> float | None:
        return self.main.strong

    @property
    def stages(self) -> int:
        return self.main.stages

    @property
    def extra(self) -> float:
        """Network calls of the start beyond ``stages`` a step; infinite where the grid decides, so that only a trace tells."""
        return math.inf if self.levels is None else self.levels * self.main.stages

    @property
    def takes_eta(self) -> bool:
        return self.main.takes_eta

    @property
    def stochastic(self) -> bool:
        return self.main.stochastic

    @property
    def target(self) -> str | None:
        return self.main.target

    @property
    def invariant(self) -> bool:
        return self.main.invariant

    @property
    def reduced(self) -> Any:
        """main without its start."""
        return self.main

    @property
    def rewrites(self) -> bool:
        return getattr(self.main, "rewrites", False)

    @property
    def start_rule(self) -> str:
        return f"first step in {'as many' if self.levels is None else self.levels + 1} parts, doubling in lambda" + (
            " as keep the order" if self.levels is None else ""
        )

    @property
    def end_rule(self) -> str:
        return getattr(self.main, "end_rule", "as any step")

    def divisions(self, h: float) -> int:
        """The number of levels of a first step of length h."""
        if self.levels is not None:
            return self.levels
        return 3 + math.ceil(max(0.0, 0.5 * (self.main.inner_order - 2.0) * -math.log2(min(abs(h), 1.0))))

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        h = t.lam - s.lam
        if carry is not None or not math.isfinite(h):
            return self.main.step(problem, x, s, t, carry, noise)
        levels = self.divisions(h)
        inner = [problem.path.knot_at(s.lam + h * 2.0**-i) for i in range(levels, 0, -1)]
        # the last part starts at a knot of index -1: with a count less by s.index + 1 the same number of steps is left
        last = t if t.count < 0 else t._replace(count=t.count - s.index - 1)
        knots = [s, *inner, last if levels else t]
        for a, b in pairwise(knots):
            x, carry = self.main.step(problem, x, a, b, carry, noise)
            x = problem.keep(x)
        return Step(x, carry)


@dataclass(frozen=True)
class PseudoRungeKutta:
    """PNDM's pseudo Runge-Kutta step (Liu et al. 2022): the classical method on eps, each of its four stages moved by the exact
    transfer of constant eps, with its two middle stages at the middle in t.

    In rho = sigma/alpha, where the transfer is an Euler step, the middle is not the middle: the step is of order two. Four
    calls. A step to sigma = 0, where eps says nothing, is the first-order one.
    """

    stages = 4
    order = 2.0
    weak = strong = None
    stochastic = takes_eta = False
    linear = True
    target = "eps"
    invariant = False

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        def move(value: Form, k: Knot) -> Form:
            return one_node(s, k, 0.0, "eps", x, value, noise)

        e1 = problem.predict(x, s).eps
        if t.sigma == 0.0:
            return Step(move(e1, t))
        middle = problem.path.knot(0.5 * (s.t + t.t))
        e2 = problem.predict(move(e1, middle), middle).eps
        e3 = problem.predict(move(e2, middle), middle).eps
        e4 = problem.predict(move(e3, t), t).eps
        return Step(move((1 / 6) * e1 + (1 / 3) * e2 + (1 / 3) * e3 + (1 / 6) * e4, t))
