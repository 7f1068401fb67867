"""Calls of a network under any wiring, counted: the same normals at the same level, whatever the wiring."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sde.errors import ToolkitError
from sde.noise import White
from sde.prediction import Knot, Tally, rows_of

from ..network import Score
from .levels import COUNT, Level, at_ratios, coefficients, moments, reach, times, whole
from .wirings import Reading, Wiring

Call = Callable[[Tensor], Tensor]

STREAM = 0x5EED_C4EC  # normals that no run of the user's draws
TOP, BOTTOM = 80.0, 0.01  # sigma / alpha between which samples are made where nothing is known of the data


def rewired(s: Score, **changes: Any) -> Score:
    """The score with other arguments."""
    names = ("network", "path", "predicts", "label", "scale", "sigma_data", "output", "split", "mode", "conditions", "dtype")
    return Score(**{**{name: getattr(s, name) for name in names}, "evals": s.evals, **changes})


class Bench:
    """A network, the states it is asked at, and the count of its calls."""

    def __init__(self, score: Score, like: Tensor, seed: int, conditions: Mapping[str, Any]) -> None:
        self.score, self.conditions, self.tally = score, conditions, Tally()
        self._draws = White(STREAM + seed).open(like.shape, like.dtype, like.device)
        self._knot = score.path.knot(score.path.T)
        self._normals: dict[int, Tensor] = {}

    def normal(self, k: int) -> Tensor:
        if k not in self._normals:
            self._normals[k] = self._draws.normal(k, self._knot, self._knot).clone()
        return self._normals[k]

    @contextmanager
    def calls(self, w: Wiring, knots: Sequence[Knot], x: Tensor, mode: str = "eval") -> Generator[list[Call], None, None]:
        """One function a knot, state like x -> raw output. ToolkitError where the network cannot be called so."""
        made = rewired(self.score, path=w.path, predicts="eps", label=w.label, scale=w.scale, mode=mode)
        given = {**self.conditions, **w.conditions}
        with made.running():
            yield made.at(tuple(knots), x, rows_of(given, slice(len(x)), len(self.normal(0))), self.tally)

    def answers(self, w: Wiring, knots: Sequence[Knot], states: Sequence[Tensor], mode: str = "eval") -> list[Tensor]:
        """The raw outputs at these states, one a knot."""
        with self.calls(w, knots, states[0], mode) as calls:
            return [call(x) for call, x in zip(calls, states, strict=True)]

    def look(self, w: Wiring, data: Tensor, picks: Sequence[int] = range(COUNT)) -> list[Level] | None:
        """The levels of a wiring; None where the network cannot be called so, or answers inf or nan."""
        x0 = w.gain * data + w.shift
        try:
            at = times(w.path, float(x0.double().std()))
            knots = [w.path.knot(whole(w, at[i])) for i in picks]
            states = [k.alpha * x0 + k.sigma * self.normal(i) for i, k in zip(picks, knots, strict=True)]
            outputs = self.answers(w, knots, states)
        except ToolkitError:
            return None
        if not all(bool(y.isfinite().all()) for y in outputs):
            return None
        return [Level(k, moments(x0, x / k.alpha, y)) for k, x, y in zip(knots, states, outputs, strict=True)]

    def samples(self, w: Wiring, reading: Reading, steps: int) -> Tensor | None:
        """x0 from noise: DPM-Solver++(2M) of Lu et al. 2022, evenly in lambda, then the prediction at the last level."""
        least, most = reach(w.path)
        logs = torch.linspace(math.log(min(most, TOP)), math.log(max(least, BOTTOM)), steps, dtype=torch.float64)
        knots = [w.path.knot(whole(w, t)) for t in at_ratios(w.path, logs)]
        u = (knots[0].sigma / knots[0].alpha) * self.normal(100)
        x0, before, h_before = None, None, 1.0
        try:
            with self.calls(w, knots, u) as calls:
                for here, there, call in zip(knots, [*knots[1:], None], calls, strict=True):
                    p, q = coefficients(reading, here)
                    x0 = p * u + q * call(here.alpha * u)
                    h = 0.0 if there is None else there.lam - here.lam
                    if h > 0.0:  # two entries of a short table may be one
                        ahead = x0 if before is None else x0 + 0.5 * h / h_before * (x0 - before)
                        u = math.exp(-h) * u - math.expm1(-h) * ahead
                        before, h_before = x0, h
        except ToolkitError:
            return None
        return x0 if x0 is not None and bool(x0.isfinite().all()) else None
