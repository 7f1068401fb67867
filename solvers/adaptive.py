"""Step control for any pair of solvers, a step size of its own for every sample.

A step of a solver is a table of numbers (``plan.py``), and for one pair of solvers the tables of all steps have the same
shape. So every sample has its own time s_i and step size; the pair is traced from s_i to t_i once a sample, the tables are
stacked to coefficients (B, rows, columns), and each row is executed once for the whole batch. The network is called on the
whole batch too, at a time a sample (``Predictor.each``). Control is per sample, work is batched.

The error of a step is high - low of the pair, measured as in DPM-Solver (Lu et al. 2022, algorithm 2):

    E = rms(|high - low| / delta),   delta = max(atol, rtol max(|low|, |x|))

with states taken at unit scale, divided by sqrt(alpha^2 + sigma^2), so that a tolerance means the same on every path;
and the next step is h (1 + atan(F - 1)), a PID controller with Soederlind's limiter (2003),

    F = E_n^-(P + I + D)/q E_{n-1}^(P + 2 D)/q E_{n-2}^-D/q,   q = one more than the lower order;

a step is accepted where that factor is at least ``accept``. The high solution is kept, so the error at the end is
proportional to the tolerance where the pair's orders are p and p - 1.

Step sizes are measured on a clock. The steps that a flow towards data wants are those of the "soft" half log-SNR

    u = log((alpha + sigma) / (sigma + 0.001 alpha)),

which is alpha / sigma near pure noise, lambda in between, and ends where sigma is 0.001 alpha: it is finite at both ends. A
controller lets a step grow to 2.6 times the last one. Measured in t or sigma / alpha the steps must shrink all the way to the
data, in lambda they must shrink after the noise, and a step that grew instead can be too long for its own error estimate:
errors of hundreds of tolerances and more rejected steps, where the soft clock stays within ten.

Everything that decides a step is computed in an order that does not depend on the batch: sample i's steps, and its bits up to
the network's own, are those it has alone. One decision a step needs the host (E, a number a sample); labels and coefficients of
the whole step are moved right after it, while the device is idle, so nothing else waits.

On the host a step costs some tenths of a millisecond a sample: for thousands of samples of a few numbers each the shared step
of torchdiffeq is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sde.errors import InputError, NetworkError, PathError, StepLimitError
from sde.path import Path
from sde.prediction import Knot, Prediction, Row

from .backends import After, Draw, Outcome, check_control, only_step, out_of_calls
from .base import Affine, Evaluator, Solver, bad_output, non_finite


@dataclass(frozen=True)
class Pair:
    """Two solvers of the probability flow whose difference estimates the error of a step of the lower one.

    They share network calls: a prediction at the same state and knot is made once, so an embedded Runge-Kutta pair costs the
    stages of one of its members, and DPM-Solver-2 and -3 of the same first node cost three calls together. Each step is a
    fresh one: multistep methods, which need a history, are not for this.
    """

    high: Solver
    low: Solver

    def __post_init__(self) -> None:
        for name in ("high", "low"):
            solver = getattr(self, name)
            if not isinstance(solver, Solver) or not solver.linear or (solver.stochastic and not solver.takes_eta):
                raise InputError(f"{name}={solver!r:.80}: a pair takes solvers of the probability flow with a table")
        if self.high == self.low:
            raise InputError("high and low are the same solver, so they estimate no error: give two of different order")

    @property
    def order(self) -> float:
        """The power of h with which the estimated error falls: one more than the lower order of the two."""
        return 1.0 + min(float(s.order or 0.0) for s in (self.high, self.low))


# --- tracing ----------------------------------------------------------------------------------------------------------


Form = npt.NDArray[np.float64]  # coefficients of x and of the network's outputs in the order of the calls
_UNITS = np.eye(64)


class Trial(NamedTuple):
    """One step of a pair: what the network is called with, and what comes out."""

    states: list[Form]
    knots: list[Knot]
    high: Form
    error: Form

    def kept(self, t: Knot) -> int | None:
        """The call that is made at the very state the step ends in: the first one of the next step (FSAL)."""
        same = [j for j, f in enumerate(self.states) if self.knots[j].t == t.t and np.array_equal(f, self.high)]
        return same[0] if same else None


Ask = tuple[str, float]  # a knot at ("t", time) or ("lam", lambda)


class _Asked(Exception):
    """A traced step needs knots that are not known yet; its arguments are the asks."""


class _KnownPath:
    """A path of which only some knots are known; for others it raises _Asked."""

    def __init__(self, path: Path, known: Mapping[Ask, Knot]) -> None:
        self._path, self._known = path, known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path, name)

    def knot(self, t: Any) -> Knot:
        return self._all("t", [float(t)])[0]

    def knot_at(self, lam: float) -> Knot:
        return self._all("lam", [float(lam)])[0]

    def knots(self, times: Any) -> list[Knot]:
        return self._all("t", times.tolist() if isinstance(times, Tensor) else list(times))

    def time(self, lam: Any) -> Tensor:
        lam = torch.as_tensor(lam, dtype=torch.float64)
        found = self._all("lam", lam.flatten().tolist())
        return torch.tensor([k.t for k in found], dtype=torch.float64).reshape(lam.shape)

    def _all(self, kind: str, values: list[float]) -> list[Knot]:
        unknown = [(kind, v) for v in values if (kind, v) not in self._known]
        if unknown:
            raise _Asked(*unknown)
        return [self._known[kind, v] for v in values]


class _Trace:
    """A symbolic problem, whose predictions are remembered by state and knot."""

    def __init__(self, path: Any, row: Callable[[Knot], Row]) -> None:
        self.path, self.row = path, row
        self.states, self.knots = list[Form](), list[Knot]()
        self._made: dict[Any, Prediction] = {}

    def predict(self, x: Form, knot: Knot) -> Prediction:
        key = (x.tobytes(), knot.t)
        if key not in self._made:
            self.states.append(x)
            self.knots.append(knot)
            if len(self.states) == len(_UNITS):
                raise InputError(f"a pair may make {len(_UNITS) - 1} network calls a step: take solvers of fewer stages")
            self._made[key] = Affine(x, _UNITS[len(self.states)], self.row(knot), knot)  # pyright: ignore[reportArgumentType]
        return self._made[key]

    def eta(self, knot: Knot) -> float:
        return 0.0

    def keep(self, x: Form) -> Form:
        return x


def _no_noise(s: Knot, t: Knot) -> Any:
    raise InputError("step control follows the probability flow: a pair draws no normals")


def trace_steps(pair: Pair, path: Path, row: Callable[[Knot], Row], steps: Sequence[tuple[Knot, Knot]]) -> list[Trial]:
    """One step of the pair from s to t, for every (s, t).

    The path is asked for the knots of all samples at once: a trace stops at a knot that it does not know yet, and starts again
    when all are known, which is much cheaper than a sample at a time.
    """
    known: dict[Ask, Knot] = {}
    trials: dict[int, Trial] = {}
    while len(trials) < len(steps):
        asked: list[Ask] = []
        for i, (s, t) in enumerate(steps):
            if i in trials:
                continue
            problem = _Trace(_KnownPath(path, known), row)
            try:
                # path and predictions are stand-ins: a step only asks them for knots and linear forms
                ends = [m.step(problem, _UNITS[0], s, t, None, _no_noise).x for m in (pair.high, pair.low)]  # pyright: ignore[reportArgumentType]
            except _Asked as ask:
                asked.extend(ask.args)
            else:
                trials[i] = Trial(problem.states, problem.knots, ends[0], ends[0] - ends[1])
        for ask, knot in zip(asked, knots_at(path, asked), strict=True):
            known[ask] = known["t", knot.t] = knot
    return [trials[i] for i in range(len(steps))]


_WIDE = 16  # torch's vector kernels may round the rest of a tensor otherwise than its whole vectors, so every number is a
# whole vector here: a knot must not depend on those asked for beside it


def knots_at(path: Path, asked: Sequence[Ask]) -> list[Knot]:
    """The knots at ("t", time) or ("lam", lambda), each with the bits it has alone."""
    if not asked:
        return []
    value = torch.tensor([v for _, v in asked], dtype=torch.float64).repeat_interleave(_WIDE)
    by_lam = torch.tensor([kind == "lam" for kind, _ in asked]).repeat_interleave(_WIDE)
    t = torch.where(by_lam, path.time(value), value) if bool(by_lam.any()) else value
    columns = (t, *(f(t) for f in (path.alpha, path.sigma, path.lam, path.dalpha, path.dsigma, path.g2)))
    return [Knot(*values) for values in zip(*(c[::_WIDE].tolist() for c in columns), strict=True)]


# --- the clock of the control -----------------------------------------------------------------------------------------

_FINE = 1e-3  # the noise level sigma / alpha below which the soft clock is linear in it

#: What step sizes are measured in: (position of a knot, the knot at a position)
CLOCKS: dict[str, tuple[Callable[[Knot], float], Callable[[float], Ask]]] = {
    "t": (lambda k: k.t, lambda v: ("t", v)),
    "lam": (lambda k: k.lam, lambda v: ("lam", v)),
    "rho": (lambda k: k.sigma / k.alpha if k.alpha > 0.0 else math.inf, lambda v: ("lam", -math.log(v))),
    "soft": (
        lambda k: math.log((k.alpha + k.sigma) / (k.sigma + _FINE * k.alpha)),
        lambda v: ("lam", math.log(math.expm1(v) / -math.expm1(v + math.log(_FINE)))),
    ),
}


@dataclass
class _Sample:
    """Where a sample is, the knot its last step came from, its step size, and 1 / E of its last two accepted steps."""

    at: Knot
    before: Knot
    h: float
    past: tuple[float, float] | None = None


@dataclass(frozen=True)
class Adaptive:
    """A pair of solvers with step control, a step size a sample, from the first to the last time of the grid.

    pair        the two solvers, and with them the order and the calls a step
    clock       what step sizes are measured in: "soft", "lam" (half log-SNR), "t", or "rho" (sigma / alpha)
    rtol, atol  the tolerance of a step, for each sample by itself
    unit        the tolerance is of the state at unit scale (False: of the state as it is)
    max_nfe     bound of network calls on the batch; what is reached then is the ``partial`` of a StepLimitError
    pcoeff, icoeff, dcoeff, accept
                the controller; k-diffusion's dpm_adaptive has 0, 1, 0, 0.81 (and clock "lam", unit False)
    first       the first step, as a part of the whole way on the clock: short, since nothing else keeps the first error
                estimate from being fooled; steps grow fast

    The network always sees the whole batch in its place, since it may hold something for every row (labels, guidance): a
    sample that has arrived stays, unchanged, and a run costs the calls of its slowest sample. ``accepted`` and ``rejected`` are
    sums over the samples. Where every sample's last step was rejected, or ended in an evaluation that the next one starts
    with (FSAL), that call is saved. Fails where the pair gives no error estimate: at a last time where the slope is
    infinite (sigma'(0) of VP), or at a start or end that is infinite on the clock.
    """

    pair: Pair
    clock: str = "soft"
    rtol: float = 1e-3
    atol: float = 1e-3
    max_nfe: int = 10_000
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    accept: float = 0.9
    first: float = 0.002
    unit: bool = True

    order = weak = strong = None
    stages = 1
    stochastic = takes_eta = False
    linear = False
    adaptive = True
    target = None

    def __post_init__(self) -> None:
        if not isinstance(self.pair, Pair):
            raise InputError(f"pair is a {type(self.pair).__name__}: give Pair(high, low)")
        if self.clock not in CLOCKS:
            raise InputError(f"clock={self.clock!r}: use one of {', '.join(CLOCKS)}")
        check_control(self)
        for name, low, high in (("accept", 0.0, 1.0), ("first", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
                raise InputError(f"{name}={value!r}: must be a number in (0, 1]")
        if not isinstance(self.unit, bool):
            raise InputError(f"unit={self.unit!r}: must be True or False")
        gains = (self.pcoeff, self.icoeff, self.dcoeff)
        if not all(isinstance(g, (int, float)) and math.isfinite(g) for g in gains) or sum(gains) <= 0.0:
            raise InputError(f"pcoeff, icoeff, dcoeff={gains!r:.80}: must be finite numbers with a sum > 0, such as 0, 1, 0")

    def __str__(self) -> str:
        return f"Adaptive of orders {self.pair.high.order:g} and {self.pair.low.order:g}"

    @property
    def invariant(self) -> bool:
        return self.unit and self.clock != "t" and all(getattr(s, "invariant", False) for s in (self.pair.high, self.pair.low))

    def solve(self, evaluator: Evaluator, x: Tensor, grid: list[Knot], draw: Draw, after: After = None) -> Outcome:
        run = _Run(self, evaluator, x.contiguous(), grid[0], grid[-1])
        try:
            while any(run.moving):
                run.round()
        except NetworkError as error:
            error.step = run.accepted
            raise
        only_step(after, grid, run.x, "step control")
        return Outcome(run.x, run.accepted, run.rejected)

    def factor(self, error: float, past: tuple[float, float] | None) -> tuple[float, float]:
        """(the factor of the step size, 1 / E) after a step of this error; ``past`` the 1 / E of the two steps before."""
        inverse = 1.0 / (error + 1e-8)  # 0 where the error is infinite
        one, two = past or (inverse, inverse)
        order, p, i, d = self.pair.order, self.pcoeff, self.icoeff, self.dcoeff
        product = inverse ** ((p + i + d) / order)
        if p or d:
            product *= one ** (-(p + 2.0 * d) / order) * two ** (d / order) if inverse else 0.0
        return 1.0 + math.atan(product - 1.0), inverse


class _Run:
    """One run: the batch on its way from ``start`` to ``stop``."""

    def __init__(self, solver: Adaptive, evaluator: Evaluator, x: Tensor, start: Knot, stop: Knot) -> None:
        self.solver, self.evaluator, self.stop, self.x = solver, evaluator, stop, x
        self.path, self.score = evaluator.path, evaluator.score
        self.position, self.ask = CLOCKS[solver.clock]
        self.way = self._way(start)
        self.samples = [_Sample(start, start, solver.first * abs(self.way)) for _ in x]
        self.kept: Tensor | None = None  # the network's outputs at x, where all that are on their way know them
        self.first = evaluator.tally.nfe
        self.accepted = self.rejected = 0

    @property
    def moving(self) -> list[bool]:
        """Which samples have not arrived yet."""
        return [s.at is not self.stop for s in self.samples]

    def _way(self, start: Knot) -> float:
        """From start to stop on the clock; refused before the first call where the pair cannot make it."""
        for k in (start, self.stop):
            if not math.isfinite(self.position(k)):
                raise PathError(
                    f"{self.solver.clock} is infinite at t = {k.t:g} (alpha = {k.alpha:g}, sigma = {k.sigma:g}): give start or "
                    "stop off it, such as t_min, or the clock 'soft'"
                )
        (whole,) = trace_steps(self.solver.pair, self.path, self.score.row, [(start, self.stop)])
        if not whole.error.any():
            raise PathError(
                f"the pair gives no error estimate on a step from t = {start.t:g} to t = {self.stop.t:g}, since its slope is "
                "infinite there: give start or stop off it, such as t_min"
            )
        return self.position(self.stop) - self.position(start)

    def round(self) -> None:
        """One step of every sample on its way, accepted or not."""
        solver, moving, ends = self.solver, self.moving, self._ends()
        going = [i for i, on in enumerate(moving) if on]
        made = trace_steps(solver.pair, self.path, self.score.row, [(self.samples[i].at, ends[i]) for i in going])
        calls = max(len(trial.states) for trial in made)
        trials = [_idle(s.before, calls) for s in self.samples]
        for i, trial in zip(going, made, strict=True):
            trials[i] = trial
        states, outputs, high, errors = self._execute(trials, ends, calls)
        if not all(map(math.isfinite, errors)):
            errors = self._explain(trials, states, outputs, errors)
        kept = {trial.kept(ends[i]) for i, trial in zip(going, made, strict=True)}
        took = [False] * len(ends)
        for i in going:
            sample = self.samples[i]
            factor, inverse = solver.factor(errors[i], sample.past)
            sample.h *= factor
            if factor >= solver.accept:
                took[i] = True
                sample.at, sample.before = ends[i], sample.at
                sample.past = inverse, (sample.past or (inverse,))[0]
        self.accepted += sum(took)
        self.rejected += len(going) - sum(took)
        self._move(took, high, outputs, kept.pop() if len(kept) == 1 else None)

    def _ends(self) -> list[Knot]:
        """Where the samples' steps lead: the last time is hit exactly."""
        places, asked = list[float | None](), list[Ask]()
        for s in self.samples:
            here = self.position(s.at)
            lands = s.h >= abs(self.position(self.stop) - here) * (1.0 - 1e-9)
            places.append(None if lands else here + math.copysign(s.h, self.way))
            asked += [] if lands else [self.ask(places[-1] or 0.0)]
        knots = iter(knots_at(self.path, asked))
        ends = [self.stop if place is None else next(knots) for place in places]
        for i, (s, end) in enumerate(zip(self.samples, ends, strict=True)):
            ahead = (self.position(end) - self.position(s.at)) / self.way
            if end is not self.stop and ahead < 1e-12:  # lost in rounding
                raise StepLimitError(
                    f"the step size vanished at t = {s.at.t:g} (sample {i}): the field is too steep there; raise the "
                    f"tolerances (rtol={self.solver.rtol:g}) or stop earlier",
                    t=s.at.t,
                    rejected=self.rejected,
                    partial=self.x,
                )
        return ends

    def _execute(
        self, trials: list[Trial], ends: list[Knot], calls: int
    ) -> tuple[list[Tensor], list[Tensor], Tensor, list[float]]:
        """(the states of the calls, their outputs, the high solution, E a sample): every row once for the whole batch."""
        x, score, conditions, tally = self.x, self.score, self.evaluator.conditions, self.evaluator.tally
        rest = [_UNITS[0]] * calls  # a trial with fewer calls sees its own start again
        tables = [[*(trial.states + rest)[:calls], trial.high, trial.error] for trial in trials]
        table = torch.from_numpy(np.array(tables)[:, :, : calls + 1])
        used = (table != 0.0).any(0).tolist()
        table = table.to(device=x.device, dtype=x.dtype).reshape(*table.shape, *(1,) * (x.dim() - 1))
        knots = [
            [(trial.knots + [s.before] * calls)[j] for trial, s in zip(trials, self.samples, strict=True)] for j in range(calls)
        ]
        known = 0 if self.kept is None else 1
        network = [score.each(at, x, conditions, tally) for at in knots[known:]]
        registers, states = [x, *([] if self.kept is None else [self.kept])], [x]
        for j, call in enumerate(network, known):
            states += [_combine(table[:, j], used[j], registers)] if j else []
            registers.append(self._call(call, knots[j], states[j]))
        high = _combine(table[:, calls], used[calls], registers)
        with torch.no_grad():
            error = _combine(table[:, calls + 1], used[calls + 1], registers)
            errors = self._norms(x, high, error, ends).tolist()
        return states, registers[1:], high, errors

    def _call(self, call: Callable[[Tensor], Tensor], knots: list[Knot], state: Tensor) -> Tensor:
        solver = self.solver
        if self.evaluator.tally.nfe - self.first + self.score.calls(*knots) > solver.max_nfe:
            left = {s.at.t: abs(self.position(self.stop) - self.position(s.at)) for s in self.samples}
            t = max(left, key=left.__getitem__)
            raise out_of_calls(solver.max_nfe, t, self.x, self.rejected)
        try:
            y = call(state)
        except NetworkError as error:
            error.t = knots[0].t if error.t is None else error.t
            raise
        return y.clone()  # a network may reuse its own output, or hand its input back

    def _norms(self, x: Tensor, high: Tensor, error: Tensor, ends: list[Knot]) -> Tensor:
        """E of every sample, (B,)."""
        if self.solver.unit:
            scales = [[1.0 / math.hypot(k.alpha, k.sigma) for k in (s.at, t)] for s, t in zip(self.samples, ends, strict=True)]
            before, after = torch.tensor(scales, dtype=torch.float64).to(x).T.reshape(2, -1, *(1,) * (x.dim() - 1))
            x, high, error = before * x, after * high, after * error
        size = torch.maximum((high - error).abs(), x.abs())
        delta = (self.solver.rtol * size).clamp_min(self.solver.atol)
        ratio = error / delta + (high - high)  # NaN where the state overflowed and delta with it
        return (sum_of_rows((ratio * ratio).reshape(len(x), -1)) / x[0].numel()).sqrt()

    def _explain(self, trials: list[Trial], states: list[Tensor], outputs: list[Tensor], errors: list[float]) -> list[float]:
        """A step that is not finite: an output of the network that is not, for a state that is, is an error; an overflow of the
        state alone is a step too long, of infinite error.
        """
        failed = {i for i, e in enumerate(errors) if not math.isfinite(e)}
        for j, (state, y) in enumerate(zip(states, outputs, strict=True)):
            bad = tuple(sorted(failed & set(non_finite(y)) - set(non_finite(state))))
            if bad:
                calls = self.evaluator.tally.nfe - self.first - len(outputs) + 1 + j
                raise bad_output(y[list(bad)], trials[bad[0]].knots[j], "", calls, bad, len(y))
        return [e if math.isfinite(e) else math.inf for e in errors]

    def _move(self, took: list[bool], high: Tensor, outputs: list[Tensor], kept: int | None) -> None:
        """The accepted steps are made."""
        mask = torch.tensor(took).to(high.device).reshape(-1, *(1,) * (high.dim() - 1))
        self.x = torch.where(mask, high, self.x)
        if not any(took):
            self.kept = outputs[0]
        else:
            self.kept = None if kept is None else torch.where(mask, outputs[kept], outputs[0])


def _idle(at: Knot, calls: int) -> Trial:
    """A sample that has arrived: it stays as it is, and the network sees it at a time where it has seen it before."""
    return Trial([_UNITS[0]] * calls, [at] * calls, _UNITS[0], 0.0 * _UNITS[0])


def _combine(coefficients: Tensor, used: list[bool], registers: list[Tensor]) -> Tensor:
    """sum_r c_r register_r, in the order of the registers; c_r (B, 1, ...). Products and sums are rounded one by one, so that
    bits do not depend on the shape.
    """
    out: Tensor | None = None
    for r, register in enumerate(registers):
        if used[r]:
            term = coefficients[:, r] * register
            out = term if out is None else out + term
    return torch.zeros_like(registers[0]) if out is None else out


def sum_of_rows(v: Tensor) -> Tensor:
    """(B, n) -> (B,), by halves: torch's own sum of a row may round otherwise when the batch has another size."""
    while v.shape[1] > 1:
        half = v.shape[1] // 2
        pairs = v[:, :half] + v[:, half : 2 * half]
        v = pairs if v.shape[1] == 2 * half else torch.cat([pairs, v[:, 2 * half :]], 1)
    return v.squeeze(1) if v.shape[1] else v.sum(1)
