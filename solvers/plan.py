"""A sampler is a table of numbers: tracing a solver to its table, and running the table.

``trace`` hands a solver symbolic linear forms instead of tensors. What comes out is a ``Plan``: rows that either call the
network at a known register and time, draw unit normals, or form a linear combination of registers. ``Plan.run`` lowers the
rows for the row (a, b) that the network predicts and executes them in place; ``Plan.iterate`` yields one network call at a
time for callers that own the network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sde.errors import InputError
from sde.path import Path
from sde.prediction import Knot, Prediction, Predictor, affine

from .base import Solver, march

FORMAT = 1


class Form:
    """A linear combination of registers, the symbolic state of a trace."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[int, float]) -> None:
        self.terms = {r: c for r, c in terms.items() if c != 0.0}

    def __add__(self, other: Any) -> Form:
        if isinstance(other, Form):
            terms = dict(self.terms)
            for r, c in other.terms.items():
                terms[r] = total = terms.get(r, 0.0) + c
                if total == 0.0:
                    del terms[r]
            return _form(terms)
        if isinstance(other, (int, float)) and other == 0:
            return self
        return NotImplemented

    __radd__ = __add__

    def __mul__(self, factor: float) -> Form:
        factor = float(factor)
        return _form({r: p for r, c in self.terms.items() if (p := c * factor) != 0.0})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Form:
        return self * (1.0 / float(divisor))

    def __neg__(self) -> Form:
        return self * -1.0

    def __sub__(self, other: Any) -> Form:
        return self + (-other)

    def __rsub__(self, other: Any) -> Form:
        return (-self) + other


def _form(terms: dict[int, float]) -> Form:
    """The form of these terms, none of them 0: a trace makes millions."""
    form = object.__new__(Form)
    form.terms = terms
    return form


class Call(NamedTuple):
    """out = x0 or eps (``target``) predicted at register ``state`` and the plan's knot number ``knot``."""

    out: int
    state: int
    knot: int
    target: str


class Normal(NamedTuple):
    """out = the draw-th unit normals of the run, of the step from time s to time t (s = t: of no Brownian path)."""

    out: int
    draw: int
    s: Knot
    t: Knot


class Lin(NamedTuple):
    """out = sum of coefficient * register."""

    out: int
    terms: tuple[tuple[int, float], ...]


PlanRow = Call | Normal | Lin


class _Symbolic(Prediction):
    """The prediction of a traced call: one register, x0 or eps, whichever the solver asks for first."""

    def __init__(self, tracer: _Tracer, state: int, knot: Knot) -> None:
        self._tracer, self._state, self._knot = tracer, state, knot
        self._at = tracer.reserve_call()
        self._target, self._out = "", -1

    def _fix(self, target: str) -> int:
        if not self._target:
            self._target = target
            self._out = self._tracer.place_call(self._at, self._state, self._knot, target)
        return self._out

    @property
    def x0(self) -> Form:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._of(1.0, 0.0)

    @property
    def eps(self) -> Form:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._of(0.0, 1.0)

    def combine(self, a: float, b: float) -> Form:
        return self._of(a, b)

    def _of(self, a: float, b: float) -> Form:
        # The better conditioned of the two when the solver asks for both: x0 above sigma = alpha, eps below.
        either = "x0" if self._knot.sigma >= self._knot.alpha else "eps"
        out = self._fix("x0" if b == 0.0 else "eps" if a == 0.0 else either)
        u, v = affine((1.0, 0.0) if self._target == "x0" else (0.0, 1.0), self._knot, a, b)  # pyright: ignore[reportArgumentType]
        return Form({self._state: u, out: v})


class _Tracer:
    """A symbolic problem: records what a solver does to it. Register 0 is the initial state."""

    def __init__(self, path: Path, eta: Callable[[Knot], float]) -> None:
        self.path, self.eta = path, eta
        self.rows: list[PlanRow | None] = []
        self.knots: list[Knot] = []
        self.registers, self.draws = 1, 0
        self._known: dict[tuple[tuple[int, float], ...], int] = {}

    def _new(self) -> int:
        self.registers += 1
        return self.registers - 1

    def register(self, form: Form) -> int:
        """The register that holds this form, made by a row if there is none."""
        terms = tuple(sorted(form.terms.items()))
        if len(terms) == 1 and terms[0][1] == 1.0:
            return terms[0][0]
        if terms not in self._known:
            self._known[terms] = out = self._new()
            self.rows.append(Lin(out, terms))
        return self._known[terms]

    def keep(self, x: Form) -> Form:
        return Form({self.register(x): 1.0})

    def predict(self, x: Form, knot: Knot) -> Prediction:
        return _Symbolic(self, self.register(x), knot)

    def reserve_call(self) -> int:
        self.rows.append(None)
        return len(self.rows) - 1

    def place_call(self, at: int, state: int, knot: Knot, target: str) -> int:
        out = self._new()
        self.knots.append(knot)
        self.rows[at] = Call(out, state, len(self.knots) - 1, target)
        return out

    def noise(self, s: Knot, t: Knot) -> Form:
        out = self._new()
        self.rows.append(Normal(out, self.draws, s, t))
        self.draws += 1
        return Form({out: 1.0})


@dataclass(frozen=True)
class Plan:
    """A solver traced on a path and a grid.

    ``rows`` are executed in order; ``states[i]`` is the register that holds the state at ``times[i]`` (register 0 is the
    caller's start); ``knots`` are where the network is called. Run it on any score whose path has the same values at these
    knots.
    """

    solver: str
    path: str
    times: tuple[float, ...]
    grid: tuple[Knot, ...]
    knots: tuple[Knot, ...]
    rows: tuple[PlanRow, ...]
    states: tuple[int, ...]
    eta: tuple[float, ...]
    _programs: Any = field(default_factory=WeakKeyDictionary, compare=False, repr=False)

    @property
    def nfe(self) -> int:
        """Network calls of one run."""
        return len(self.knots)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def draws(self) -> int:
        """Normals drawn in one run, each shaped like the state."""
        return sum(isinstance(row, Normal) for row in self.rows)

    def run(self, score: Predictor, x: Tensor, **options: Any) -> Tensor:
        """The state at times[-1] from x at times[0]. Options as for ``integrate``: seed, noise, callback, conditions, grad."""
        from .sampling import run_plan

        return run_plan(self, score, x, **options).x

    def program(self, score: Predictor, in_place: bool = True, dtype: torch.dtype | None = None) -> Program:
        """The rows lowered for this score's output, cached as long as the score lives.

        For states of ``dtype`` the factors of in-place products are scalars of it, ready made: torch would make each anew.
        """
        programs = self._programs.setdefault(score, {})
        if (in_place, dtype) not in programs:
            program = lower(self, score, in_place)
            if dtype is not None:
                with torch.inference_mode(False):
                    code = tuple(
                        (*op[:3], torch.tensor(op[3], dtype=dtype, device="cpu")) if op[0] == MUL_ else op
                        for op in program.code
                    )
                program = program._replace(code=code)
            programs[in_place, dtype] = program
        return programs[in_place, dtype]

    def iterate(
        self, score: Predictor, x: Tensor, noise: Callable[[int, Knot, Knot, Tensor], Tensor] | None = None
    ) -> Generator[tuple[Tensor, Knot], Tensor, Tensor]:
        """Step by step, for callers that own the network: yields (state, knot), wants the raw output sent back, returns the
        last state.

        ``score`` only says what the output means (its ``row``); it is not called. A state is valid until the next one is asked
        for: clone it to keep it.
        """
        gen = execute(self.program(score), x, noise)
        try:
            k, state = next(gen)
            while True:
                k, state = gen.send((yield state, self.knots[k]))
        except StopIteration as stop:
            return stop.value

    def to_json(self) -> str:
        """The whole table as JSON; numbers survive exactly."""
        return json.dumps(
            {
                "format": FORMAT,
                "solver": self.solver,
                "path": self.path,
                "times": self.times,
                "eta": self.eta,
                "grid": [_write_knot(k) for k in self.grid],
                "knots": [_write_knot(k) for k in self.knots],
                "rows": [[type(row).__name__.lower(), *map(_write_knot, row)] for row in self.rows],
                "states": self.states,
            },
            allow_nan=False,
        )

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that ``to_json`` wrote; anything else is an InputError."""
        try:
            d = json.loads(text)
            if d["format"] != FORMAT:
                raise InputError(f"the plan has format {d['format']!r}, this version reads format {FORMAT}")
            kinds = {"call": _read_call, "normal": _read_normal, "lin": _read_lin}
            plan = Plan(
                solver=str(d["solver"]),
                path=str(d["path"]),
                times=tuple(map(float, d["times"])),
                grid=tuple(_read_knot(k) for k in d["grid"]),
                knots=tuple(_read_knot(k) for k in d["knots"]),
                rows=tuple(kinds[row[0]](row[1:]) for row in d["rows"]),
                states=tuple(map(int, d["states"])),
                eta=tuple(map(float, d["eta"])),
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"this is not a plan written by Plan.to_json: {type(error).__name__}: {error}") from error
        _validate(plan)
        return plan


def _write_knot(item: Any) -> Any:
    """A knot with its infinities as strings, which JSON lacks; anything else as it is."""
    return [v if math.isfinite(v) else str(v) for v in item] if isinstance(item, Knot) else item


def _read_knot(k: Sequence[Any]) -> Knot:
    t, alpha, sigma, lam, dalpha, dsigma, g2 = map(float, k[:7])
    index, count = map(int, k[7:])
    return Knot(t, alpha, sigma, lam, dalpha, dsigma, g2, index, count)


def _read_call(row: Sequence[Any]) -> Call:
    return Call(int(row[0]), int(row[1]), int(row[2]), str(row[3]))


def _read_normal(row: Sequence[Any]) -> Normal:
    return Normal(int(row[0]), int(row[1]), _read_knot(row[2]), _read_knot(row[3]))


def _read_lin(row: Sequence[Any]) -> Lin:
    return Lin(int(row[0]), tuple((int(r), float(c)) for r, c in row[1]))


def _validate(plan: Plan) -> None:
    """Every register is written before it is read, and nothing else: a damaged table cannot run."""
    known = {0}
    for i, row in enumerate(plan.rows):
        read = {row.state} if isinstance(row, Call) else {r for r, _ in row.terms} if isinstance(row, Lin) else set()
        numbers = [c for _, c in row.terms] if isinstance(row, Lin) else []
        bad_call = isinstance(row, Call) and not (0 <= row.knot < len(plan.knots) and row.target in ("x0", "eps"))
        if not read <= known or row.out in known or bad_call or not all(map(math.isfinite, numbers)):
            raise InputError(f"row {i} of the plan is damaged: {row}")
        known.add(row.out)
    if len(plan.states) != len(plan.times) or [k.t for k in plan.grid] != list(plan.times) or not set(plan.states) <= known:
        raise InputError(f"the plan has {len(plan.times)} times but {len(plan.states)} states and {len(plan.grid)} grid knots")


def trace_solver(solver: Solver, path: Path, times: tuple[float, ...], eta: Any, name: str) -> Plan:
    """Run ``march`` on symbolic forms. Kept for the next call, but not where eta is a function: its answers may change."""
    if callable(eta):
        return _trace(solver, path, times, eta, name)
    try:
        return _kept_trace(solver, path, times, eta, name)
    except TypeError as error:
        if "unhashable" in str(error):
            raise InputError(f"{name}: a solver and its path must be hashable values: make them frozen dataclasses") from error
        raise


def _trace(solver: Solver, path: Path, times: tuple[float, ...], eta: Any, name: str) -> Plan:
    if not solver.linear:
        raise InputError(
            f"{name!r} is not linear (its coefficients depend on the state), so it has no table: use integrate or sample"
        )
    eta_of = _eta_function(eta)
    tracer = _Tracer(path, eta_of)
    grid = path.knots(times, grid=True)
    states = [0]

    def after(i: int, x: Form) -> Form:
        states.append(tracer.register(x))
        return Form({states[-1]: 1.0})

    march(solver, tracer, Form({0: 1.0}), grid, tracer.noise, after)
    rows = tuple(row for row in tracer.rows if row is not None)
    etas = tuple(eta_of(k) for k in grid)
    return Plan(name, str(path), times, tuple(grid), tuple(tracer.knots), rows, tuple(states), etas)


_kept_trace = lru_cache(maxsize=256)(_trace)


def _eta_function(eta: Any) -> Callable[[Knot], float]:
    def level(knot: Knot) -> float:
        return float(eta(knot.t) if callable(eta) else eta)  # pyright: ignore[reportArgumentType]

    return level


# --- lowering: from rows to in-place operations -----------------------------------------------------------------------

CALL, NORMAL, MUL, MUL_, ADD, ADD_, FREE, STATE = range(8)


class Program(NamedTuple):
    """What the interpreter executes: (op, out, source, argument) with slots for registers.

    Slot 0 is the caller's start, never written. Slots that a linear combination writes are the program's own and reused;
    network outputs and normals are other people's buffers, read only.
    """

    code: tuple[tuple[int, int, int, Any], ...]
    slots: int
    normals: tuple[Normal, ...]
    result: int


def check_path(plan: Plan, path: Path, what: str, fix: str) -> None:
    """The plan's knots are those of this path, which is ``what``."""
    for knot, own in zip(plan.knots, path.knots([k.t for k in plan.knots]), strict=True):
        if not (math.isclose(knot.alpha, own.alpha, rel_tol=1e-9) and math.isclose(knot.sigma, own.sigma, rel_tol=1e-9)):
            raise InputError(
                f"the plan was traced on {plan.path} but {what} is {path}: at t = {knot.t:g} "
                f"(alpha, sigma) is ({knot.alpha:.6g}, {knot.sigma:.6g}) there and ({own.alpha:.6g}, {own.sigma:.6g}) here; "
                f"trace on {fix}"
            )


def lower(plan: Plan, score: Predictor, in_place: bool) -> Program:
    """Express every row in states, raw outputs and normals, then give registers to slots by their last use.

    A call's target is u * state + v * output. Used before the next call only, it is folded into the combinations that use it
    and never computed; needed later (a multistep history), it is computed once into a slot of its own.
    """
    check_path(plan, score.path, "the score's path", "score.path")
    rows, states = _fold(plan, score)
    return _assign(rows, _last_uses(rows, states), states, states[-1], in_place)


def _fold(plan: Plan, score: Predictor) -> tuple[list[PlanRow], list[int]]:
    """(rows in which ``Call.out`` is the raw output, registers of the states); targets folded or made by an extra Lin row."""
    last_use = {r: i for i, row in enumerate(plan.rows) for r in _reads(row)}
    calls = [i for i, row in enumerate(plan.rows) if isinstance(row, Call)]
    next_call = dict(zip(calls, [*calls[1:], len(plan.rows)], strict=True))
    substitute: dict[int, tuple[tuple[int, float], ...]] = {}
    rows: list[PlanRow] = []
    # A state that is a prediction itself (x0 at sigma = 0) is read by no row, and its register will hold the raw output.
    kept, moved = set(plan.states), dict[int, int]()
    fresh = max((row.out for row in plan.rows), default=0) + 1
    for i, row in enumerate(plan.rows):
        if isinstance(row, Call):
            knot = plan.knots[row.knot]
            u, v = affine(score.row(knot), knot, *((1.0, 0.0) if row.target == "x0" else (0.0, 1.0)))
            rows.append(row)
            terms = ((row.state, u), (row.out, v)) if u != 0.0 else ((row.out, v),)
            if last_use.get(row.out, i) < next_call[i] and row.out not in kept:
                substitute[row.out] = terms
            else:  # kept past the next call, so it needs a buffer of ours: a network may reuse its own output
                substitute[row.out] = ((fresh, 1.0),)
                moved[row.out] = fresh
                rows.append(Lin(fresh, terms))
                fresh += 1
        elif isinstance(row, Lin):
            total: dict[int, float] = {}
            for r, c in row.terms:
                for q, w in substitute.get(r, ((r, 1.0),)):
                    total[q] = total.get(q, 0.0) + c * w
            rows.append(Lin(row.out, tuple((r, c) for r, c in total.items() if c != 0.0)))
        else:
            rows.append(row)
    return rows, [moved.get(register, register) for register in plan.states]


def _reads(row: PlanRow) -> tuple[int, ...]:
    if isinstance(row, Lin):
        return tuple(r for r, _ in row.terms)
    return (row.state,) if isinstance(row, Call) else ()


def _last_uses(rows: Sequence[PlanRow], states: Sequence[int]) -> dict[int, int]:
    last = {row.out: i for i, row in enumerate(rows)}
    for i, row in enumerate(rows):
        last.update((r, i) for r in _reads(row))
    last[states[-1]] = len(rows)
    return last


def _assign(rows: Sequence[PlanRow], last: Mapping[int, int], states: Sequence[int], final: int, in_place: bool) -> Program:
    code: list[tuple[int, int, int, Any]] = []
    slot: dict[int, int] = {0: 0}
    owned: set[int] = set()  # slots this program may write
    free: list[int] = []
    normals: list[Normal] = []
    count = 1
    marks: dict[int, list[int]] = {}
    for step, register in enumerate(states[1:]):
        marks.setdefault(register, []).append(step)

    def take() -> int:
        nonlocal count
        count += 1
        return count - 1

    def release(register: int) -> None:
        if register in slot and slot[register] != 0:
            s = slot.pop(register)
            (free.append(s) if s in owned and in_place else code.append((FREE, s, 0, None)))

    for i, row in enumerate(rows):
        if isinstance(row, Call):
            slot[row.out] = take()
            code.append((CALL, slot[row.out], slot[row.state], row.knot))
        elif isinstance(row, Normal):
            slot[row.out] = take()
            normals.append(row)
            code.append((NORMAL, slot[row.out], 0, len(normals) - 1))
        else:
            _emit(row, i, last, slot, owned, free, take, code, in_place)
        for step in marks.get(row.out, ()):
            code.append((STATE, slot[row.out], 0, step))
        for register in {row.out, *_reads(row)}:
            if last[register] <= i:
                release(register)
    return Program(tuple(code), count, tuple(normals), slot[final])


def _emit(
    row: Lin,
    i: int,
    last: Mapping[int, int],
    slot: dict[int, int],
    owned: set[int],
    free: list[int],
    take: Callable[[], int],
    code: list[tuple[int, int, int, Any]],
    in_place: bool,
) -> None:
    """One linear combination: in place in a dying slot of our own where there is one, else into a free or new slot."""
    terms = list(row.terms) or [(0, 0.0)]
    dying = [t for t in terms if last[t[0]] <= i and slot[t[0]] in owned] if in_place else []
    if dying:
        first = dying[0]
        out = slot.pop(first[0])
        if first[1] != 1.0:
            code.append((MUL_, out, out, first[1]))
    else:
        first = terms[0]
        out = free.pop() if free and in_place else take()
        owned.add(out)
        code.append((MUL, out, slot[first[0]], first[1]))
    terms.remove(first)
    for r, c in terms:
        if in_place:
            code.append((ADD_, out, slot[r], c))
        else:
            code.append((ADD, out, slot[r], c))
    slot[row.out] = out


def execute(
    program: Program,
    x: Tensor,
    noise: Callable[[int, Knot, Knot, Tensor], Tensor] | None = None,
    after: Callable[[int, Tensor], None] | None = None,
) -> Generator[tuple[int, Tensor], Tensor, Tensor]:
    """The interpreter: yields (call number, state), is sent the raw output, returns the last state.

    A program lowered with ``in_place=False`` writes to no tensor twice, so its states stay valid; there the caller may send
    (output, state), the state that it gave to the network in place of the one yielded.
    """
    slots: list[Any] = [None] * program.slots
    slots[0] = x
    for op, out, source, argument in program.code:
        if op == CALL:
            y = yield argument, slots[source]
            if isinstance(y, tuple):  # (output, state): the caller changed the state; it is read here, never written
                y, slots[source] = y
            # the network may hand its input back, or a view of it: the program writes to x while it still needs y
            slots[out] = y.clone() if y.data_ptr() == slots[source].data_ptr() else y
            y = None  # a name would keep the output alive
        elif op == ADD_:
            slots[out].add_(slots[source], alpha=argument)
        elif op == MUL_:
            slots[out].mul_(argument)
        elif op == MUL:
            buffer = slots[out]
            slots[out] = slots[source] * argument if buffer is None else torch.mul(slots[source], argument, out=buffer)
        elif op == ADD:
            slots[out] = torch.add(slots[out], slots[source], alpha=argument)
        elif op == NORMAL:
            row = program.normals[argument]
            if noise is None:
                raise InputError("this plan draws normals: give noise (a source of sde.noise, or seed=) to run it")
            slots[out] = noise(row.draw, row.s, row.t, x)
        elif op == FREE:
            slots[out] = None
        elif after is not None:
            after(argument, slots[out])
    return slots[program.result]
