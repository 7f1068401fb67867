"""What all guidance shares: a prediction made of other predictions, and the scale.

A guided score is a ``Predictor`` around predictors. Solvers meet it through ``at`` (one time a call) and ``each`` (a time a
sample); both are one thing here, a list of levels, each of one knot or of a knot a sample. A guidance says once how a level is
evaluated (``_make``), with coefficients that are floats for one knot and tensors (B, 1, ...) for a knot a sample; ``predict``
and the score follow from the raw output and its row, and where only one network is asked they are that network's own.

Coefficients are made on the host in float64, before the run; a call does not wait for a device. Reductions are over one
sample, never over the batch, and in an order that does not depend on it.
"""

from __future__ import annotations

import math
import numbers
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, PathError
from sde.path import Path
from sde.prediction import Knot, Prediction, Predictor, Row, Scalar, Tally, affine

from ..network import levels, needs_sigma, working

Call = Callable[[Tensor], Tensor]
Level = Sequence[Knot]  # one knot of the whole batch, or one a sample
X0 = Row(1.0, 0.0)


@dataclass(frozen=True)
class Request:
    """What ``at`` asks, several levels of one knot, or ``each``, one level of a knot a sample; with ``seen``, what
    ``with_variance`` asks: the learned variances of the calls are put there.
    """

    knots: Sequence[Knot]
    each: bool
    seen: list[Tensor] | None = None

    @property
    def levels(self) -> list[Level]:
        return [self.knots] if self.each else [(k,) for k in self.knots]

    @property
    def narrow(self) -> Request:
        """The same without variances."""
        return replace(self, seen=None)

    def of(self, score: Predictor, x: Tensor, conditions: Mapping[str, Any], tally: Tally, copies: int = 1) -> list[Call]:
        """A score's calls, one a level, for a batch that is ``copies`` times the asked one."""
        if self.each:
            return [score.each([*self.knots] * copies, x, conditions, tally)]
        if self.seen is None:
            return score.at(self.knots, x, conditions, tally)
        return [_keeping(call, self.seen) for call in score.with_variance(self.knots, x, conditions, tally)]


def _keeping(call: Callable[[Tensor], tuple[Tensor, Tensor]], seen: list[Tensor]) -> Call:
    def run(x: Tensor) -> Tensor:
        y, v = call(x)
        seen.append(v.clone())  # of the network's memory, which its next call may reuse
        return y

    return run


class Guided(Predictor):
    """Base of the guided scores. ``score`` is what is guided; its path is this one's."""

    score: Predictor

    @abstractmethod
    def _make(self, request: Request, x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> list[Call]:
        """One call a level: state -> raw output in ``row``'s row (of each sample's knot)."""

    def _plain(
        self, knots: Sequence[Knot]
    ) -> Callable[[Mapping[str, Any], Tensor], tuple[Predictor, Mapping[str, Any]]] | None:
        """Where all these knots ask the same one network: (conditions, x) -> (it, its conditions)."""
        return None

    def _scores(self) -> Iterable[Predictor]:
        """The predictors inside."""
        return (self.score,)

    @property
    def path(self) -> Path:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.score.path

    @property
    def native_dtype(self) -> torch.dtype:
        """The dtype a state has unless told otherwise: that of the score inside."""
        return getattr(self.score, "native_dtype", torch.float32)

    @contextmanager
    def running(self) -> Generator[None, None, None]:
        """Around a run: the networks inside in the mode that they are to run in."""
        with ExitStack() as stack:
            for score in self._scores():
                if hasattr(score, "running"):
                    stack.enter_context(score.running())  # pyright: ignore[reportAttributeAccessIssue]
            yield

    def calls(self, *knots: Knot) -> int:
        return self.score.calls(*knots)

    def at(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> list[Call]:
        return self._make(Request(knots, False), x, conditions, tally)

    def each(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> Call:
        return self._make(Request(knots, True), x, conditions, tally)[0]

    def with_variance(
        self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally
    ) -> list[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """The guided output, and the learned variance of the network that is guided (of the conditional branch)."""
        seen: list[Tensor] = []

        def both(call: Call) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
            def run(x: Tensor) -> tuple[Tensor, Tensor]:
                seen.clear()
                y, v = call(x), seen[0][: len(x)]
                return y, v if torch.is_grad_enabled() else v.detach()

            return run

        return [both(call) for call in self._make(Request(knots, False, seen), x, conditions, tally)]

    def predict(self, x: Tensor, t: Any, **conditions: Any) -> Prediction:
        """The guided pair (x0, eps) at x (B, *event) and time t, a number or a tensor () or (B,).

        PathError where the networks, or the guidance, say nothing about the pair.
        """
        state, back = working(x)
        knots = knots_of(self.path, t, state)
        plain = self._plain(knots)
        if plain is not None:
            score, conditions = plain(conditions, state)  # pyright: ignore[reportAssignmentType]
            return score.predict(x, t, **conditions)
        pair = [per_level(lambda k, c=c: affine(self.row(k), k, *c), knots, state) for c in ((1.0, 0.0), (0.0, 1.0))]
        y = self._ask(state, knots, conditions)
        x0, eps = (back(u * state + v * y) for u, v in pair)
        return Prediction(x0, eps)

    def __call__(self, x: Tensor, t: Any, **conditions: Any) -> Tensor:
        """The guided score -eps / sigma, shaped like x. PathError at sigma = 0."""
        state, back = working(x)
        knots = knots_of(self.path, t, state)
        plain = self._plain(knots)
        if plain is not None:
            score, conditions = plain(conditions, state)  # pyright: ignore[reportAssignmentType]
            return score(x, t, **conditions)

        def in_score(k: Knot) -> tuple[float, float]:
            needs_sigma(k.sigma, self.path)
            u, v = affine(self.row(k), k, 0.0, -1.0 / k.sigma)
            return u, v

        u, v = per_level(in_score, knots, state)
        return back(u * state + v * self._ask(state, knots, conditions))

    def _ask(self, x: Tensor, knots: Sequence[Knot], conditions: Mapping[str, Any]) -> Tensor:
        with self.running():
            return self._make(Request(knots, len(knots) > 1), x, conditions, Tally())[0](x)


def knots_of(path: Path, t: Any, x: Tensor) -> list[Knot]:
    """The knot at t, or those of a time a sample."""
    knot = levels(path, t, x)
    return path.knots(knot.t) if isinstance(knot.t, Tensor) else [knot]


def per_level(fn: Callable[[Knot], Sequence[float]], level: Level, x: Tensor) -> list[Scalar]:
    """What ``fn`` says of a knot: floats, or for a knot a sample tensors (B, 1, ...) in x's dtype."""
    columns = zip(*map(fn, level), strict=True)
    return [per_row(list(column), x) for column in columns]


def per_row(values: Sequence[float], x: Tensor) -> Scalar:
    """A float where all are the same, else a tensor (B, 1, ...) in x's dtype and device."""
    if len(set(values)) == 1:
        return values[0]
    return torch.tensor(values, dtype=torch.float64).to(device=x.device, dtype=x.dtype).reshape(-1, *(1,) * (x.dim() - 1))


def deferred(make: Callable[[], Call]) -> Call:
    """The call, or one that raises what its preparation did: a run prepares all knots of a grid and may never ask at some."""
    try:
        return make()
    except PathError as error:
        message = str(error)

        def call(x: Tensor) -> Tensor:
            raise PathError(message)

        return call


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample, shaped (B, 1, ...). Summed by halves, so that the bits do not depend on the batch."""
    v = (a * b).reshape(len(a), -1)
    while v.shape[1] > 1:
        half = v.shape[1] // 2
        v = torch.cat([v[:, :half] + v[:, half : 2 * half], v[:, 2 * half :]], 1)
    return v.sum(1).reshape(-1, *(1,) * (a.dim() - 1))


def ratio(a: Tensor, b: Tensor, otherwise: float = 0.0) -> Tensor:
    """a / b for b >= 0, ``otherwise`` where b = 0."""
    return torch.where(b > 0.0, a / torch.where(b > 0.0, b, 1.0), otherwise)


@dataclass(frozen=True, eq=False)
class Scale:
    """A guidance scale: a number, a tensor (B,) of one a sample, or a function of t, a float64 tensor (), to either.

    It is ``neutral``, the value at which nothing is guided, outside ``windows``: intervals low < sigma/alpha <= high. Carries
    no gradient.
    """

    given: tuple[float, ...] | Callable[[Tensor], Any]
    neutral: float
    windows: tuple[tuple[float, float], ...] = ()

    def __repr__(self) -> str:
        shown = self.given if callable(self.given) else self.given[0] if len(self.given) == 1 else f"({len(self.given)},)"
        return f"{shown}{''.join(f' within {w}' for w in self.windows)}"

    def within(self, low: float, high: float) -> Scale:
        """The same scale with one more window."""
        return replace(self, windows=(*self.windows, (low, high)))

    def at(self, knot: Knot) -> tuple[float, ...]:
        """The scale at a knot: one value, or one a sample."""
        level = knot.sigma / knot.alpha if knot.alpha > 0.0 else math.inf
        if not all(low < level <= high for low, high in self.windows):
            return (self.neutral,)
        if not callable(self.given):
            return self.given
        t = torch.tensor(knot.t, dtype=torch.float64)
        try:
            value = self.given(t)
        except Exception as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"scale({knot.t:g}) raised {type(error).__name__}: {str(error)[:150]}; give a function of t to a number"
            ) from error
        return _values(value, f"scale({knot.t:g})")

    def of(self, level: Level, batch: int) -> list[float]:
        """The scales of a level: one, or one a sample."""
        found = [self.at(k) for k in level]
        for values in found:
            if len(values) not in (1, batch):
                raise InputError(f"scale has {len(values)} values for a batch of {batch}: give one number, or one a sample")
        if len(level) == 1:
            return list(found[0])
        return [values[i if len(values) > 1 else 0] for i, values in enumerate(found)]


def scale_of(given: Any, neutral: float) -> Scale:
    """A scale as a caller gives it, checked."""
    return Scale(given if callable(given) else _values(given, "scale"), neutral)


def _values(value: Any, name: str) -> tuple[float, ...]:
    """Finite numbers, one or one a sample, as floats."""
    fix = "give a finite number, or a tensor (B,) of one a sample"
    if isinstance(value, Tensor):
        if value.dim() > 1 or value.is_complex() or value.dtype is torch.bool or value.numel() == 0:
            raise InputError(f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: {fix}")
        values = tuple(value.detach().double().reshape(-1).tolist())
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        values = (float(value),)
    else:
        raise InputError(f"{name}={value!r:.80}: {fix}")
    bad = [v for v in values if not math.isfinite(v)]
    if bad:
        raise InputError(f"{name} is {bad[0]}{'' if len(values) == 1 else f', among {len(values)} values'}: {fix}")
    return values


def interval(guided: Any, low: float, high: float = math.inf) -> Any:
    """``guided`` only where low < sigma/alpha <= high (Kynkaanniemi et al. 2024); elsewhere its scale is the one that guides
    nothing, so that only the plain (for classifier-free guidance, the conditional) call is made and counted.

    guided    : any guidance with a scale: not thresholds and inpainting, which go around
    low, high : noise levels sigma/alpha >= 0, EDM's sigma, so they mean the same on every path; high = inf includes alpha = 0
    """
    if not isinstance(guided, Guided) or not hasattr(guided, "scale"):
        raise InputError(
            f"guided is a {type(guided).__name__}: interval takes guidance that has a scale, such as classifier_free"
        )
    low = check_number("low", low, 0.0)
    high = math.inf if high == math.inf else check_number("high", high, low, open_low=True)
    return replace(guided, scale=guided.scale.within(low, high))  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def check_score(name: str, score: Any, path: Path | None = None) -> None:
    """A predictor, on this path where one is given."""
    if not isinstance(score, Predictor):
        kind = score.__name__ if isinstance(score, type) else type(score).__name__
        raise InputError(f"{name} is a {kind}: wrap the network first, Score(network, path, predicts='eps')")
    if path is not None and score.path != path:
        raise InputError(f"{name} is on {score.path}, but the score on {path}: guidance mixes predictions of one path")


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """A finite number in [low, high], or above low."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (low < value if open_low else low <= value) or value > high:
        wanted = f"> {low:g}" if open_low else f">= {low:g}"
        raise InputError(
            f"{name}={value!r:.80}: must be a finite number {wanted}{'' if high == math.inf else f', <= {high:g}'}"
        )
    return float(value)
