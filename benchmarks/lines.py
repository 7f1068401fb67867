"""A line of a sweep: a sampler by name, ours or another library's, called in one way; and the meter at its network.

Calls are counted and timed in one place, at the score, for every library alike: ``Meter`` is a score around a score. What a
sampler spends outside of it is its overhead.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sde.errors import BudgetWarning, ToolkitError
from sde.noise import White
from sde.prediction import Knot, Prediction, Predictor, Row, Tally, affine
from solvers import SOLVERS, sample
from solvers.backends import TorchDiffEq, TorchSDE
from solvers.catalogue import Entry, resolve

Call = Callable[[Tensor], Any]


class Made(NamedTuple):
    """What a line makes: the samples, and the steps that took, where it knows. Network calls are counted at the network."""

    x: Tensor
    steps: int | None = None


class Line(Protocol):
    """A sampler as a sweep sees it."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Of the library whose sampler it is; "" for ours. Other versions are other results."""
        ...

    @property
    def joint(self) -> bool:
        """Whether a sample depends on its batch mates: then a part is always one batch."""
        ...

    @property
    def to_zero(self) -> bool:
        """Whether its last step goes on to sigma = 0, past the end it is given: then its exact end point is the one there."""
        ...

    def flow(self, eta: float | None) -> bool:
        """Whether it follows the probability flow, so that it has an exact end point."""
        ...

    def refuses(
        self, score: Meter, *, nfe: int, grid: str, eta: float | None, start: float | None, stop: float | None
    ) -> str | None:
        """Why it cannot be run so, as far as that is known without a call of the network; None: nothing speaks against it."""
        ...

    def run(
        self,
        score: Meter,
        x: Tensor,
        *,
        nfe: int,
        grid: str,
        seed: int,
        indices: Sequence[int],
        eta: float | None,
        start: float | None,
        stop: float | None,
    ) -> Made:
        """Samples ``indices`` of the stream ``seed``, from their start noise x; x is not changed."""
        ...


@dataclass(frozen=True)
class Ours:
    """A name of SOLVERS."""

    name: str
    entry: Entry

    version = ""
    to_zero = False

    @property
    def joint(self) -> bool:
        return isinstance(self.entry.solver, (TorchDiffEq, TorchSDE)) and self.entry.solver.adaptive

    def flow(self, eta: float | None) -> bool:
        return self.entry.deterministic if eta is None or not self.entry.solver.takes_eta else eta == 0.0

    def refuses(
        self, score: Predictor, *, nfe: int, grid: str, eta: float | None, start: float | None, stop: float | None
    ) -> str | None:
        none = torch.empty(0, 1)  # of no samples all is checked and planned, and nothing is run
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)
            try:
                sample(score, x=none, solver=self.name, nfe=nfe, grid=grid, eta=eta, start=start, stop=stop)
            except ToolkitError as error:
                return str(error)
        return None

    def run(
        self,
        score: Predictor,
        x: Tensor,
        *,
        nfe: int,
        grid: str,
        seed: int,
        indices: Sequence[int],
        eta: float | None,
        start: float | None,
        stop: float | None,
    ) -> Made:
        noise = White(seed, indices=indices)
        given = {"nfe": nfe, "grid": grid, "eta": eta, "start": start, "stop": stop}
        out = sample(score, x=x, solver=self.name, noise=noise, **given)
        return Made(out.x, len(out.times) - 1 if out.accepted is None else None)  # adaptive steps are each sample's own


def resolve_line(text: str) -> Line:
    """The line of a name: ours, or ``library/name`` of a peer. InputError: unknown, with the nearest names."""
    if "/" in text:
        from .peers import resolve_line as peer

        return peer(text)
    name = resolve(text)[0]
    return Ours(name, SOLVERS[name])


class Meter(Predictor):
    """A score that counts and times its calls. On CUDA the time is that of the device, by events, without waiting for it.

    One a model: plans keep what they prepared for a score as long as it lives. Not for two threads at once.
    """

    def __init__(self, score: Predictor, device: torch.device) -> None:
        self.score, self.path, self.device = score, score.path, device
        self.reset()

    def reset(self) -> None:
        """Count from 0."""
        self.nfe = self.net_evals = 0
        self.seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @property
    def device_seconds(self) -> float | None:
        """Time of the device inside the calls; None without one. After the device is done."""
        return 1e-3 * sum(a.elapsed_time(b) for a, b in self._events) if self.device.type == "cuda" else None

    def __getattr__(self, name: str) -> Any:
        if name == "score":  # not yet there: a copy is being made
            raise AttributeError(name)
        return getattr(self.score, name)

    def row(self, knot: Knot) -> Row:
        return self.score.row(knot)

    def calls(self, *knots: Knot) -> int:
        return self.score.calls(*knots)

    def at(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> list[Call]:
        return [self.metered(call, tally) for call in self.score.at(knots, x, conditions, tally)]

    def with_variance(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> list[Call]:
        return [self.metered(call, tally) for call in self.score.with_variance(knots, x, conditions, tally)]

    def each(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> Call:
        return self.metered(self.score.each(knots, x, conditions, tally), tally)

    def predict(self, x: Tensor, t: Any, **conditions: Any) -> Prediction:
        """The pair (x0, eps), by way of ``at`` or ``each``: whoever asks is counted."""
        state = x if torch.finfo(x.dtype).bits >= 32 else x.float()
        tally = Tally()
        if isinstance(t, Tensor) and t.numel() > 1:
            knots = self.path.knots(t.detach().double().cpu().expand(len(x)))
            y = self.each(knots, state, conditions, tally)(state)
            tail = (1,) * (x.dim() - 1)
            pairs = [(affine(self.row(k), k, 1.0, 0.0), affine(self.row(k), k, 0.0, 1.0)) for k in knots]
            table = torch.tensor(pairs, dtype=state.dtype).to(x.device)  # (B, 2, 2)
            p, q, r, s = table.reshape(-1, 4, *tail).unbind(1)
        else:
            knot = self.path.knot(float(t))
            y = self.at([knot], state, conditions, tally)[0](state)
            (p, q), (r, s) = (affine(self.row(knot), knot, *pick) for pick in ((1.0, 0.0), (0.0, 1.0)))
        return Prediction((p * state + q * y).to(x.dtype), (r * state + s * y).to(x.dtype))

    def __call__(self, x: Tensor, t: Any, **conditions: Any) -> Tensor:
        """The score -eps / sigma."""
        times = torch.as_tensor(t).detach().double().cpu().reshape(-1)
        sigma = torch.tensor([k.sigma for k in self.path.knots(times)], dtype=torch.float64)
        return -self.predict(x, t, **conditions).eps / sigma.to(x).reshape(-1, *(1,) * (x.dim() - 1))

    def metered(self, call: Call, tally: Tally) -> Call:
        """``call``, whose network calls ``tally`` counts, counted and timed here as well."""

        def run(x: Tensor) -> Any:
            nfe, net_evals, began = tally.nfe, tally.net_evals, self._now()
            y = call(x)
            self._add(began)
            self.nfe += tally.nfe - nfe
            self.net_evals += tally.net_evals - net_evals
            return y

        return run

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, began: Any) -> None:
        if self.device.type == "cuda":
            self._events.append((began, self._now()))
        else:
            self.seconds += time.perf_counter() - began
