"""The only loop. A solver is a frozen dataclass with one pure ``step``; ``march`` applies it along a grid.

``march`` never looks inside the state: with tensors it integrates, with the symbolic forms of ``plan.py`` it traces the
solver to its table of numbers. Scalars are Python floats made on the host; tensors only meet ``scalar * tensor + scalar *
tensor``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from sde.errors import NetworkError
from sde.path import Path
from sde.prediction import Knot, Prediction, Predictor, Row, Tally, affine

Call = Callable[[Tensor], Tensor]  # state -> raw network output
Form = Any  # a tensor, or a symbolic linear form while tracing


class Step(NamedTuple):
    """What a step returns: the state at t and whatever the next step wants handed back."""

    x: Form
    carry: Any = None


class Declared(Protocol):
    """What every solver says of itself.

    ``order`` is the order of the end point's error for eta = 0, ``weak`` that of its law and ``strong`` that of its path for
    eta > 0 (None where it does not apply). Declared numbers count the starting and the last step; the tests measure every one.
    ``stages`` is the number of network calls of a full step; ``stochastic`` says that it may draw normals, ``takes_eta``
    that it
    solves the reverse SDE of any noise level eta >= 0 (else only the probability flow, eta = 0), ``linear`` that a step is a
    linear combination with coefficients known beforehand, so that it can be traced.
    """

    @property
    def order(self) -> float | None: ...
    @property
    def weak(self) -> float | None: ...
    @property
    def strong(self) -> float | None: ...
    @property
    def stages(self) -> int: ...
    @property
    def stochastic(self) -> bool: ...
    @property
    def takes_eta(self) -> bool: ...
    @property
    def linear(self) -> bool: ...


@runtime_checkable
class Solver(Declared, Protocol):
    """A rule for one step s -> t. Frozen and pure: arguments in, ``Step`` out, nothing kept on ``self``."""

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step: ...


@runtime_checkable
class BackEnd(Declared, Protocol):
    """A solver that chooses its own times between the grid's ends: another library's integrator, without a table."""

    @property
    def adaptive(self) -> bool: ...

    def solve(self, evaluator: Any, x: Tensor, grid: list[Knot], draw: Any, /) -> tuple[Any, ...]:
        """(the last state, accepted steps, rejected steps)."""
        ...


class Problem(Protocol):
    """The reverse SDE (or, with eta = 0, the probability flow) as a step sees it."""

    @property
    def path(self) -> Path: ...

    def predict(self, x: Form, knot: Knot, /) -> Prediction:
        """One network evaluation: the pair (x0, eps) at (x, knot)."""
        ...

    def eta(self, knot: Knot, /) -> float:
        """The noise level: diffusion / g at this knot."""
        ...

    def keep(self, x: Form, /) -> Form:
        """x itself, said of an intermediate state that later steps build on: a tracer gives it a register, so that forms
        stay short.
        """
        ...


Noise = Callable[[Knot, Knot], Form]
"""noise(s, t): unit normals of the step from s to t, that is (W_t - W_s) / sqrt|t - s| in the clock of ``sde.noise``; with s
is t, normals that belong to no Brownian path (a corrector's)."""


def march(
    solver: Solver,
    problem: Problem,
    x: Form,
    knots: Sequence[Knot],
    noise: Noise,
    after: Callable[[int, Form], Form] | None = None,
    carry: Any = None,
) -> Step:
    """Apply ``solver`` along ``knots``: the last state and what its step hands on. ``after(i, x)`` may replace the state after
    step i (the tracer names it, a recorder copies it); ``carry`` goes on from an earlier run.
    """
    for i in range(len(knots) - 1):
        x, carry = solver.step(problem, x, knots[i], knots[i + 1], carry, noise)
        if after is not None:
            x = after(i, x)
    return Step(x, carry)


class Affine(Prediction):
    """A prediction from a network's raw output, computed only as far as it is asked for."""

    def __init__(self, x: Tensor, y: Tensor, row: Row, knot: Knot) -> None:
        self._x, self._y, self._row, self._knot = x, y, row, knot

    @property
    def x0(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.combine(1.0, 0.0)

    @property
    def eps(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.combine(0.0, 1.0)

    def combine(self, a: float, b: float) -> Tensor:
        u, v = affine(self._row, self._knot, a, b)
        return v * self._y if u == 0.0 else u * self._x + v * self._y


@dataclass
class Evaluator:
    """One run's view of a score: functions prepared for all knots at once, calls counted at the network, errors told where
    they happened.
    """

    score: Predictor
    x: Tensor
    conditions: Mapping[str, Any] = field(default_factory=dict)
    eta_of: Callable[[Knot], float] = field(default=lambda knot: 0.0)
    tally: Tally = field(default_factory=Tally)
    _calls: dict[float, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    _wide: dict[float, Callable[[Tensor], tuple[Tensor, Tensor]]] = field(default_factory=dict)
    _knots: Sequence[Knot] = ()  # what was prepared last

    @property
    def path(self) -> Path:
        return self.score.path

    def eta(self, knot: Knot) -> float:
        return self.eta_of(knot)

    def keep(self, x: Tensor) -> Tensor:
        return x

    def prepare(self, knots: Sequence[Knot]) -> list[Callable[[Tensor], Tensor]]:
        """The calls at these knots, prepared in one go so that the loop never waits for a device."""
        calls = self.score.at(knots, self.x, self.conditions, self.tally)
        self._calls.update((k.t, call) for k, call in zip(knots, calls, strict=True))
        self._knots = knots
        return calls

    def output(self, x: Tensor, knot: Knot) -> Tensor:
        """The network's raw output."""
        call = self._calls.get(knot.t) or self.prepare([knot])[0]
        return call(x)

    def predict(self, x: Tensor, knot: Knot) -> Prediction:
        return Affine(x, self.output(x, knot), self.score.row(knot), knot)

    def predict_with_variance(self, x: Tensor, knot: Knot) -> tuple[Prediction, Tensor]:
        """The prediction and the learned variance's v, from one call; InputError where the score has none."""
        if knot.t not in self._wide:
            knots = self._knots if knot in self._knots else [knot]
            calls = self.score.with_variance(knots, self.x, self.conditions, self.tally)
            self._wide.update((k.t, call) for k, call in zip(knots, calls, strict=True))
        y, v = self._wide[knot.t](x)
        return Affine(x, y, self.score.row(knot), knot), v


@dataclass(frozen=True)
class Carry:
    """The second half of a reversible solver's state at time ``t``, whose first half is ``Solution.x``."""

    solver: Any
    t: float
    shape: tuple[int, ...]
    dtype: Any
    value: Any = field(repr=False)


@dataclass
class Solution:
    """What every solver returns.

    ``x`` is the state at ``times[-1]``; ``nfe`` counts calls of the network on the batch and ``net_evals`` batches through
    it, both counted where the network is called; ``times`` are the grid's; ``seconds`` is wall time. ``trajectory`` (steps +
    1, B, ...) where asked for; ``accepted`` and ``rejected`` count the steps of adaptive solvers. ``carry``, of reversible
    solvers only, is what a run in the other direction must be given beside x to give the start back.
    """

    x: Tensor
    nfe: int
    net_evals: int
    times: Tensor
    seconds: float
    solver: str = ""
    trajectory: Tensor | None = None
    accepted: int | None = None
    rejected: int | None = None
    carry: Carry | None = None


def non_finite(x: Tensor) -> tuple[int, ...]:
    """Indices of the samples that hold a NaN or an infinity (one device sync)."""
    total = x.detach().sum()
    if math.isfinite(float(total)):
        return ()
    bad = ~x.detach().isfinite().reshape(len(x), -1).all(dim=1)
    return tuple(bad.nonzero().flatten().tolist())


def describe(bad: tuple[int, ...], batch: int) -> str:
    return f"{len(bad)} of {batch} samples (first: {bad[0]})"


def bad_output(y: Tensor, knot: Knot, place: str, call: int, bad: tuple[int, ...], batch: int) -> NetworkError:
    """The error of a network whose output y is not finite for the samples ``bad``, though its input is."""
    kind = "NaN" if bool(y.isnan().any()) else "inf"
    return NetworkError(
        f"non-finite network output ({kind}) at {place}t={knot.t:.6g} (sigma {knot.sigma:.4g}), call {call}: "
        f"{describe(bad, batch)}; its input was finite: check the network there",
        t=knot.t,
        samples=bad,
    )


class FiniteCheck(Predictor):
    """The score of a failed run's replay: stops at the first network output or state that is not finite.

    ``steps`` is 0 for solvers that choose their own.
    """

    def __init__(self, score: Predictor, solver: str, steps: int) -> None:
        self.score, self.solver, self.steps = score, solver, steps
        self.path, self.step, self.made = score.path, 0, 0

    def row(self, knot: Knot) -> Row:
        return self.score.row(knot)

    def calls(self, *knots: Knot) -> int:
        return self.score.calls(*knots)

    def at(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> list[Call]:
        def checked(call: Call, knot: Knot) -> Call:
            def run(x: Tensor) -> Tensor:
                y = call(x)
                self.check(x, y, knot)
                return y

            return run

        return [checked(call, k) for call, k in zip(self.score.at(knots, x, conditions, tally), knots, strict=True)]

    def each(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> Call:
        return self.score.each(knots, x, conditions, tally)  # step control looks at what it computes itself

    def with_variance(
        self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally
    ) -> list[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        def checked(call: Callable[[Tensor], tuple[Tensor, Tensor]], knot: Knot) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
            def run(x: Tensor) -> tuple[Tensor, Tensor]:
                y, v = call(x)
                self.check(x, y + v, knot)
                return y, v

            return run

        calls = self.score.with_variance(knots, x, conditions, tally)
        return [checked(call, k) for call, k in zip(calls, knots, strict=True)]

    def predict(self, x: Tensor, t: Any, **conditions: Any) -> Prediction:
        return self.score.predict(x, t, **conditions)

    def __call__(self, x: Tensor, t: Any, **conditions: Any) -> Tensor:
        return self.score(x, t, **conditions)

    def check(self, x: Tensor, y: Tensor, knot: Knot) -> None:
        """One network call: its input, a state or a stage of a step, then its output."""
        self.made += 1
        self._overflow(x, knot, self.step)
        bad = non_finite(y)
        if bad:
            error = bad_output(y, knot, self._place(self.step), self.made, bad, len(y))
            error.step, error.args = self.step, (f"{self.solver}: {error}",)
            raise error

    def after(self, i: int, x: Tensor, knot: Knot) -> None:
        self._overflow(x, knot, i)
        self.step = i + 1

    def _overflow(self, x: Tensor, knot: Knot, step: int) -> None:
        bad = non_finite(x)
        if bad:
            raise NetworkError(
                f"{self.solver}: the state overflowed at {self._place(step)}t={knot.t:.6g}: {describe(bad, len(x))}; "
                "the network's outputs were finite, so the step is too large: use more steps or another grid",
                step=step,
                t=knot.t,
                samples=bad,
            )

    def _place(self, step: int) -> str:
        return f"step {step + 1}/{self.steps}, " if self.steps else ""
