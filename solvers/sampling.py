"""The boundary: every input is checked once, then a plan is run or the solver is marched, then the end is checked once.

``sample`` makes samples from a score, ``encode`` takes data to noise, ``integrate`` runs any solver between given times,
``trace`` makes the table.
"""

from __future__ import annotations

import itertools
import math
import numbers
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sde.errors import BudgetWarning, CallbackError, InputError, NetworkError, PathError, ToolkitError
from sde.noise import Brownian, Source, White
from sde.path import Path
from sde.prediction import Knot, Predictor
from sde.problem import ProbabilityFlow, ReverseSDE

from .backends import Outcome
from .base import Carry, Evaluator, FiniteCheck, Solution, Solver, Step, march, non_finite
from .catalogue import resolve
from .grids import make_grid
from .plan import Call, Plan, _eta_function, execute, trace_solver


@dataclass(frozen=True)
class StepInfo:
    """What a callback sees after step i of n: the state (its own copy), its time and noise level, and the network calls so
    far.
    """

    i: int
    n: int
    t: float
    sigma: float
    x: Tensor
    nfe: int


def trace(solver: Any, path: Path, times: Any, eta: Any = None) -> Plan:
    """The solver's table of numbers on this path and these times (decreasing to sample, increasing to encode).

    solver : a name of SOLVERS or a solver object;  eta : noise level, a number or a function of t (default: the name's own)
    """
    name, solver, eta = resolve(solver, eta)
    if not isinstance(path, Path):
        raise InputError(f"path is a {type(path).__name__}: give a sde.Path, for example VP()")
    times = _check_times(times, path)
    eta = _check_eta(solver, name, eta)
    _check_direction(solver, name, eta, times)
    return trace_solver(solver, path, times, eta, name)


def plan_of(
    score: Predictor,
    solver: Any,
    *,
    nfe: int | None = None,
    steps: int | None = None,
    grid: Any = "log_snr",
    start: float | None = None,
    stop: float | None = None,
    eta: Any = None,
) -> Plan:
    """The table that ``sample`` runs for these arguments. InputError for solvers that have none."""
    _check_score(score)
    name, solver, eta = resolve(solver, eta)
    if (nfe is None) == (steps is None):
        raise InputError(f"give exactly one of nfe= and steps=, got nfe={nfe!r} and steps={steps!r}")
    eta = _check_eta(solver, name, eta)
    solver, times = _plan_times(solver, name, score, nfe, steps, grid, start, stop, eta)
    return trace_solver(solver, score.path, times, eta, name)


def sample(
    score: Predictor,
    shape: Sequence[int] | None = None,
    *,
    x: Tensor | None = None,
    solver: Any = "dpmpp_2m",
    nfe: int | None = None,
    steps: int | None = None,
    grid: Any = "log_snr",
    start: float | None = None,
    stop: float | None = None,
    eta: Any = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    noise: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    callback: Callable[[StepInfo], Any] | None = None,
    trajectory: bool = False,
    conditions: Mapping[str, Any] | None = None,
    grad: bool = False,
    progress: bool = False,
    carry: Carry | None = None,
) -> Solution:
    """Samples: the score's reverse SDE or probability flow, integrated from noise at ``start`` to ``stop``.

    shape   : (B, ...), or x=, the noise to start from (its dtype and device are kept)
    solver  : a name of SOLVERS or a solver object;  eta: its noise level (default: the name's own)
    nfe     : spend at most this many network calls; or steps=, the number of steps. Exactly one of the two
    grid    : a name of GRIDS or a function (path, n, start, stop) -> n + 1 times
    start, stop : first and last time, default T and the path's t_min;  stop=0 ends at the data
    seed    : sample i is a function of (seed, i) alone; seeds= gives one seed a sample
    noise   : "white" (independent), "brownian" (a path that all grids share; for the strong error of more than 16 steps
              Brownian(seed, cells) with four cells a step), or a source of sde.noise
    dtype   : of the state (default float32, or float64 where the network's parameters are);  device: of the state
    callback, trajectory, conditions, grad, progress, carry: as for ``integrate``
    """
    _check_score(score)
    name, solver, eta = resolve(solver, eta)
    path = score.path
    if (nfe is None) == (steps is None):
        raise InputError(f"give exactly one of nfe= and steps=, got nfe={nfe!r} and steps={steps!r}")
    if (shape is None) == (x is None):
        raise InputError("give exactly one of shape= and x=, the noise to start from")
    if x is None and carry is not None:
        raise InputError("carry is given without a state: give x=out.x of the run that it is from")
    eta = _check_eta(solver, name, eta)
    solver, times = _plan_times(solver, name, score, nfe, steps, grid, start, stop, eta)
    source = _source(noise, seed, seeds)
    if x is None:
        size = _check_shape(shape)
        x = source.initial(size, dtype or getattr(score, "native_dtype", torch.float32), device or "cpu")
        x = x * path.prior_std(times[0])
    else:
        _check_state(x)
        if dtype is not None or device is not None:
            x = x.to(device=device or x.device, dtype=dtype or x.dtype)
    extras = _Extras(callback, trajectory, conditions, grad, progress, carry)
    return _run(solver, name, score, eta, x, times, source, extras)


def encode(
    score: Predictor,
    x: Tensor,
    *,
    solver: Any = "dpmpp_2m",
    nfe: int | None = None,
    steps: int | None = None,
    grid: Any = "log_snr",
    start: float | None = None,
    stop: float | None = None,
    callback: Callable[[StepInfo], Any] | None = None,
    trajectory: bool = False,
    conditions: Mapping[str, Any] | None = None,
    grad: bool = False,
    progress: bool = False,
    carry: Carry | None = None,
) -> Solution:
    """Data (at time ``stop``) to noise (at ``start``) along the probability flow: ``sample`` on the reversed grid, same
    names, same solvers.
    """
    _check_score(score)
    name, solver, eta = resolve(solver, None)
    if (nfe is None) == (steps is None):
        raise InputError(f"give exactly one of nfe= and steps=, got nfe={nfe!r} and steps={steps!r}")
    if eta != 0.0 or (solver.stochastic and not solver.takes_eta):
        raise InputError(
            f"solver={name!r} is stochastic: encoding follows the probability flow; use an ODE solver such as 'dpmpp_2m'"
        )
    solver, times = _plan_times(solver, name, score, nfe, steps, grid, start, stop, eta, backwards=True)
    _check_state(x)
    return _run(solver, name, score, 0.0, x, times, White(), _Extras(callback, trajectory, conditions, grad, progress, carry))


def integrate(
    solver: Any,
    problem: Any,
    x: Tensor,
    times: Any,
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    noise: Any = None,
    traced: bool = True,
    callback: Callable[[StepInfo], Any] | None = None,
    trajectory: bool = False,
    conditions: Mapping[str, Any] | None = None,
    grad: bool = False,
    progress: bool = False,
    carry: Carry | None = None,
) -> Solution:
    """Any solver on any problem between given times.

    problem : ReverseSDE, ProbabilityFlow, or a score (then its probability flow, or the reverse SDE at the name's own eta)
    times   : n + 1 strictly monotone times in the path's domain, decreasing towards data
    traced  : run the solver's table where it has one (the same numbers, less overhead); False marches step by step

    callback(StepInfo) is called after each step;  trajectory=True keeps the states, (n + 1, B, ...)
    conditions : mapping of keyword arguments for the network
    grad       : build the autograd graph (default: no gradient)
    progress   : a progress bar
    carry      : the ``carry`` of an earlier run with the same reversible solver, whose x and last time this one starts from
    """
    if isinstance(problem, (ReverseSDE, ProbabilityFlow)):
        if problem.score is None:
            raise InputError(f"{type(problem).__name__} has no score: give one to integrate it")
        own = problem.eta if isinstance(problem, ReverseSDE) else 0.0
        score, (name, solver, eta) = problem.score, resolve(solver, own)
        if isinstance(problem, ReverseSDE) and (callable(own) or problem.given_diffusion is not None):
            eta = _OwnEta(problem.path, own, problem.given_diffusion)
    else:
        _check_score(problem)
        score, (name, solver, eta) = problem, resolve(solver)
    eta = _check_eta(solver, name, eta)
    _check_state(x)
    times, source = _check_times(times, score.path), _source(noise, seed, seeds)
    _check_direction(solver, name, eta, times)
    extras = _Extras(callback, trajectory, conditions, grad, progress, carry)
    return _run(solver, name, score, eta, x, times, source, extras, traced=traced)


@dataclass(frozen=True)
class _OwnEta:
    """A reverse SDE's own noise level as a function of t, without its network."""

    path: Path
    eta: Any
    diffusion: Any

    def __call__(self, t: float) -> float:
        return ReverseSDE(self.path, None, self.eta, self.diffusion).eta_at(self.path.knot(t))


def run_plan(
    plan: Plan,
    score: Predictor,
    x: Tensor,
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    noise: Any = None,
    callback: Callable[[StepInfo], Any] | None = None,
    trajectory: bool = False,
    conditions: Mapping[str, Any] | None = None,
    grad: bool = False,
    progress: bool = False,
) -> Solution:
    """``Plan.run``: the same boundary as ``integrate``, for a table that exists already."""
    _check_score(score)
    _check_state(x)
    extras = _Extras(callback, trajectory, conditions, grad, progress)
    return _run(None, plan.solver, score, plan.eta, x, plan.times, _source(noise, seed, seeds), extras, plan=plan)


@dataclass(frozen=True)
class _Extras:
    """What a run does beside integrating."""

    callback: Callable[[StepInfo], Any] | None
    trajectory: bool
    conditions: Mapping[str, Any] | None
    grad: bool
    progress: bool
    carry: Carry | None = None

    def __post_init__(self) -> None:
        for name in ("trajectory", "grad", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r}: must be True or False")
        if self.conditions is not None and not isinstance(self.conditions, Mapping):
            kind = type(self.conditions).__name__
            raise InputError(f"conditions is a {kind}: give a dict of keyword arguments of the network")
        if self.callback is not None and not callable(self.callback):
            raise InputError(f"callback={self.callback!r}: give a function of one StepInfo")


# --- the run ----------------------------------------------------------------------------------------------------------


def _run(
    solver: Solver | None,
    name: str,
    score: Predictor,
    eta: Any,
    x: Tensor,
    times: tuple[float, ...],
    source: Source,
    extras: _Extras,
    *,
    plan: Plan | None = None,
    traced: bool = True,
) -> Solution:
    began = time.perf_counter()
    trajectory, grad = extras.trajectory, extras.grad
    reversible = getattr(solver, "reversible", False)
    state = _working(x)
    _check_carry(extras.carry, solver if reversible else None, name, state, times[0])
    if plan is None and traced and solver is not None and solver.linear and not reversible:  # its march hands the carry on
        plan = trace_solver(solver, score.path, times, eta, name)
    grid = list(plan.grid) if plan is not None else score.path.knots(times, grid=True)
    evaluator = Evaluator(score, state, extras.conditions or {}, _eta_function(eta) if not isinstance(eta, tuple) else _no_eta)
    if x.numel() == 0:
        states = x.detach().clone().expand(len(times), *x.shape) if trajectory else None
        seconds = time.perf_counter() - began
        return Solution(x.detach().clone(), 0, 0, torch.tensor(times, dtype=torch.float64), seconds, name, states)
    recorder = _Recorder(
        grid, evaluator, extras.callback, [(state if grad else state.detach()).clone()] if trajectory else None, extras.progress
    )
    with torch.set_grad_enabled(grad), _running(score), recorder:
        draw = _drawer(source, state)
        after = recorder.after if recorder.active else None
        start = None if extras.carry is None else extras.carry.value
        out, accepted, rejected, last = _advance(solver, name, plan, evaluator, state, grid, draw, after, not grad, start)
        if non_finite(out):
            _explain(solver, name, plan, evaluator, state, grid, _drawer(source, state), start)
    states = None if recorder.states is None else torch.stack(recorder.states)
    seconds = time.perf_counter() - began
    return Solution(
        x=out if out.dtype == x.dtype else out.to(x.dtype),
        nfe=evaluator.tally.nfe,
        net_evals=evaluator.tally.net_evals,
        times=_tensor(times).clone(),
        seconds=seconds,
        solver=name,
        trajectory=states,
        accepted=accepted,
        rejected=rejected,
        carry=Carry(solver, times[-1], tuple(out.shape), out.dtype, last) if reversible else None,
    )


def _working(x: Tensor) -> Tensor:
    """The state as solvers see it: float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_carry(carry: Any, solver: Any, name: str, x: Tensor, t: float) -> None:
    """A carry belongs to the state and time where its own reversible solver left it."""
    if carry is None:
        return
    if not isinstance(carry, Carry):
        raise InputError(f"carry is a {type(carry).__name__}: give the .carry of an earlier run, out.carry")
    if solver is None:
        raise InputError(f"carry is given, but {name!r} is not reversible: leave it out, or use 'reversible_heun' or 'belm'")
    if carry.solver != solver:
        raise InputError(f"carry is one of {carry.solver!s:.100}, not of {name!r}: use the solver that made it")
    if carry.shape != tuple(x.shape) or carry.dtype != x.dtype:
        raise InputError(
            f"carry is of a state {carry.shape} in {carry.dtype}, but x is {tuple(x.shape)} in {x.dtype}: give the x and the "
            "carry of one run"
        )
    if carry.t != t:
        raise InputError(f"carry is of t = {carry.t:g}, but this run starts at t = {t:g}: run the same times in reverse")


def _advance(
    solver: Any,
    name: str,
    plan: Plan | None,
    evaluator: Evaluator,
    x: Tensor,
    grid: list[Knot],
    draw: Any,
    after: Any,
    in_place: bool,
    carry: Any = None,
) -> Outcome:
    """From the first knot to the last: by the table, by the library's own loop, or step by step."""
    if plan is not None:
        return Outcome(_run_plan(plan, evaluator, x, draw, after, in_place), None, None)
    if hasattr(solver, "solve"):
        return Outcome(*_solve(solver, name, evaluator, x, grid, draw, after))
    out, last = _march(solver, name, evaluator, x, grid, draw, after, carry)
    return Outcome(out, None, None, last)


def _run_plan(plan: Plan, evaluator: Evaluator, x: Tensor, draw: Any, after: Any, in_place: bool) -> Tensor:
    program = plan.program(evaluator.score, in_place, x.dtype)
    calls = evaluator.score.at(plan.knots, evaluator.x, evaluator.conditions, evaluator.tally)
    gen = execute(program, x, draw, after)
    k = 0
    try:
        k, state = next(gen)
        while True:
            k, state = gen.send(calls[k](state))
    except StopIteration as stop:
        return stop.value
    except NetworkError as error:
        _locate(error, plan.solver, _step_of(plan, k), plan.steps)
        raise


def _step_of(plan: Plan, k: int) -> int:
    """The step that makes the plan's network call at knot k."""
    at = next(i for i, row in enumerate(plan.rows) if isinstance(row, Call) and row.knot == k)
    done = {row.out for row in plan.rows[:at]}
    return sum(register in done for register in plan.states[1:])


def _march(
    solver: Solver, name: str, evaluator: Evaluator, x: Tensor, grid: list[Knot], draw: Any, after: Any, carry: Any
) -> Step:
    evaluator.prepare(grid)
    count = iter(range(1 << 62))

    def noise(s: Knot, t: Knot) -> Tensor:
        return draw(next(count), s, t, x)

    step = 0

    def keep(i: int, state: Tensor) -> Tensor:
        nonlocal step
        step = i + 1
        if after is not None:
            after(i, state)
        return state

    try:
        return march(solver, evaluator, x, grid, noise, keep, carry)
    except NetworkError as error:
        _locate(error, name, step, len(grid) - 1)
        raise


def _solve(solver: Any, name: str, evaluator: Evaluator, x: Tensor, grid: list[Knot], draw: Any, after: Any) -> Any:
    """A back end of a library, which has its own loop and says in which step it was."""
    try:
        return solver.solve(evaluator, x, grid, draw, after)
    except NetworkError as error:
        _locate(error, name, error.step or 0, 0 if solver.adaptive else len(grid) - 1)
        raise


def _locate(error: NetworkError, name: str, step: int, steps: int) -> None:
    """Add the step to an error of the network, kept short whatever it said; ``steps`` is 0 for those not of the grid."""
    if str(error).startswith(name):  # a replay's check has said it all
        return
    text = str(error) if len(str(error)) <= 250 else f"{str(error)[:250]}..."
    error.step = step
    error.args = (f"{name}, step {step + 1}/{steps}: {text}" if steps else f"{name}: {text}",)


def _explain(
    solver: Any, name: str, plan: Plan | None, evaluator: Evaluator, x: Tensor, grid: list[Knot], draw: Any, carry: Any
) -> None:
    """The end is not finite: runs are deterministic, so a replay with checks finds the step, the time and the samples."""
    steps = 0 if getattr(solver, "adaptive", False) else len(grid) - 1
    check = FiniteCheck(evaluator.score, name, steps)
    replay = Evaluator(check, evaluator.x, evaluator.conditions, evaluator.eta_of)

    def after(i: int, state: Tensor) -> None:
        check.after(i, state, grid[i + 1])

    out = _advance(solver, name, plan, replay, x, grid, draw, after if steps else None, True, carry).x
    check.after(len(grid) - 2, out, grid[-1])
    raise NetworkError(
        f"{name}: the result is not finite, but a replay was: the network is not deterministic; check dropout and its buffers"
    )


def _no_eta(knot: Knot) -> float:
    raise ToolkitError("a plan's noise levels are in its table")


class _Recorder:
    """Callbacks, the kept trajectory and the progress bar: all that happens after a step."""

    def __init__(
        self,
        grid: list[Knot],
        evaluator: Evaluator,
        callback: Callable[[StepInfo], Any] | None,
        states: list[Tensor] | None,
        progress: bool,
    ) -> None:
        if callback is not None and not callable(callback):
            raise InputError(f"callback={callback!r}: give a function of one StepInfo")
        if not isinstance(progress, bool):
            raise InputError(f"progress={progress!r}: give True for a progress bar, or False")
        self.grid, self.evaluator, self.callback, self.states, self.progress = grid, evaluator, callback, states, progress
        self.active = callback is not None or states is not None or progress
        self.bar: Any = None

    def __enter__(self) -> _Recorder:
        if self.progress:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=len(self.grid) - 1, desc="sampling")
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def after(self, i: int, x: Tensor) -> None:
        if self.states is not None:
            self.states.append(x.clone())
        if self.bar is not None:
            self.bar.update()
        if self.callback is not None:
            k = self.grid[i + 1]
            info = StepInfo(i, len(self.grid) - 1, k.t, k.sigma, x.detach().clone(), self.evaluator.tally.nfe)
            try:
                self.callback(info)
            except Exception as error:
                raise CallbackError(
                    f"callback raised {type(error).__name__} after step {i + 1}/{info.n}, t={k.t:g}: {str(error)[:200]}",
                    step=i,
                    x=info.x,
                ) from error


def _running(score: Predictor) -> AbstractContextManager[Any]:
    """The score's own context for a run (train mode), where it has one."""
    return score.running() if hasattr(score, "running") else nullcontext()  # pyright: ignore[reportAttributeAccessIssue]


def _drawer(source: Source, x: Tensor) -> Callable[[int, Knot, Knot, Tensor], Tensor]:
    """The draws of one run, opened at the first one."""
    draws: Any = None

    def draw(k: int, s: Knot, t: Knot, like: Tensor) -> Tensor:
        nonlocal draws
        if draws is None:
            draws = source.open(tuple(x.shape), x.dtype, x.device)
        return draws.normal(k, s, t)

    return draw


# --- the boundary check -----------------------------------------------------------------------------------------------


def _plan_times(
    solver: Solver,
    name: str,
    score: Predictor,
    nfe: Any,
    steps: Any,
    grid: Any,
    start: Any,
    stop: Any,
    eta: Any,
    backwards: bool = False,
) -> tuple[Solver, tuple[float, ...]]:
    """The solver and the times that ``steps`` or the budget ``nfe`` buys; ``backwards`` from data to noise."""
    path = score.path
    if isinstance(grid, (Tensor, list, tuple)):
        raise InputError("grid holds times: for explicit times use integrate(solver, problem, x, times)")
    for label, value in (("start", start), ("stop", stop)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value)):
            raise InputError(f"{label}={value!r}: must be a finite number in [0, {path.T:g}]")

    def times(n: int) -> tuple[float, ...]:
        if isinstance(grid, str):
            found = _named_times(grid, path, n, start, stop)
        else:
            found = _check_times(make_grid(grid, path, n, start, stop), path)
        return found[::-1] if backwards else found

    if steps is not None:
        return solver, times(_count("steps", steps))
    budget = _count("nfe", nfe)
    if getattr(solver, "adaptive", False):
        from dataclasses import replace

        return replace(solver, max_nfe=min(budget, solver.max_nfe)), times(1)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType, reportCallIssue]
    if hasattr(solver, "spending"):
        solver = solver.spending(max(1, budget // score.calls()), solver.target)  # pyright: ignore[reportAttributeAccessIssue]

    def cost(n: int, solver: Solver) -> int:
        """Calls of n steps: a start or an end may cost more or less than ``stages`` a step, an evaluation several calls."""
        if not solver.linear:
            return n * solver.stages * score.calls()
        return sum(map(score.calls, trace_solver(solver, path, times(n), eta, name).knots))

    if budget < solver.stages or cost(1, solver) > budget:
        low, least = getattr(solver, "reduced", None), max(solver.stages, cost(1, solver))
        if low is None or low.stages > budget or cost(1, low) > budget:
            raise InputError(f"nfe={budget}: a step of {name!r} costs {least} network calls; give at least that")
        warnings.warn(
            f"nfe={budget}: a step of {name!r} costs {least} network calls; one step of its lower order is used",
            BudgetWarning,
            4,
        )
        solver = low
    n = max(1, budget // solver.stages)
    n = max(1, n * budget // max(budget, cost(n, solver)))  # guidance makes several calls an evaluation
    while n > 1 and cost(n, solver) > budget:
        n -= 1
    while cost(n + 1, solver) <= budget:
        n += 1
    return solver, times(n)


@lru_cache(maxsize=256)
def _named_times(grid: str, path: Path, n: int, start: float | None, stop: float | None) -> tuple[float, ...]:
    """A grid of GRIDS, checked; sampling in a loop asks for the same one again and again."""
    return _check_times(make_grid(grid, path, n, start, stop), path)


def _count(label: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputError(f"{label} must be an int, got {value!r}")
    if value < 1:
        raise InputError(f"{label} must be >= 1, got {value}")
    return int(value)


def _check_score(score: Any) -> None:
    if not isinstance(score, Predictor):
        kind = score.__name__ if isinstance(score, type) else type(score).__name__
        raise InputError(f"score is a {kind}: wrap the network first, score = Score(network, path, predicts='eps')")


@dataclass(frozen=True)
class _CheckedEta:
    """A caller's noise level as a function of t, a float64 tensor () as ``ReverseSDE`` gives it, checked where it is used."""

    given: Callable[[Tensor], Any]

    def __call__(self, t: float) -> float:
        try:
            value = float(self.given(torch.tensor(t, dtype=torch.float64)))
        except Exception as error:
            raise InputError(
                f"eta({t:g}) raised {type(error).__name__}: {str(error)[:150]}; give a function of t to a number >= 0"
            ) from error
        if not 0.0 <= value < math.inf:
            raise InputError(f"eta({t:g}) = {value:g}: must be finite and >= 0")
        return value


def _check_eta(solver: Solver, name: str, eta: Any) -> Any:
    """eta, a function checked at every call."""
    number = isinstance(eta, numbers.Real) and not isinstance(eta, bool)
    if not callable(eta) and not (number and 0.0 <= float(eta) < math.inf):
        raise InputError(f"eta={eta!r}: must be a number >= 0, or a function of t")
    if not solver.takes_eta and (callable(eta) or eta != 0.0):
        raise InputError(
            f"eta={eta!r:.80}: that is a reverse SDE, but {name!r} does not take a noise level (eta = 0); "
            "use a solver that does, such as 'euler_maruyama' or 'dpmpp_2m_sde'"
        )
    if callable(eta):
        return eta if isinstance(eta, _OwnEta) else _CheckedEta(eta)
    return float(eta)


def _check_direction(solver: Solver, name: str, eta: Any, times: tuple[float, ...]) -> None:
    """A reverse SDE keeps the marginals towards data only; increasing times are for the probability flow."""
    noisy = callable(eta) or eta != 0.0 if solver.takes_eta else solver.stochastic
    if noisy and times[0] < times[-1]:
        raise InputError(
            f"times increase from {times[0]:g} to {times[-1]:g}, but {name!r} is stochastic here and goes towards data: give "
            "decreasing times, or follow the probability flow (to encode) by an ODE solver such as 'ddim'"
        )


def _check_times(times: Any, path: Path) -> tuple[float, ...]:
    """Strictly monotone float64 times in the path's domain, as a tuple."""
    if isinstance(times, Tensor) and times.dtype in (torch.float16, torch.bfloat16):
        raise InputError(f"times has dtype {times.dtype}: too coarse for a grid; give float64 (or float32)")
    try:
        # a list of Python floats must not pass through torch's default float32
        t = times.detach() if isinstance(times, Tensor) else torch.as_tensor(times, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"times={times!r:.80}: give a 1-D sequence of numbers") from error
    if t.device.type == "meta":
        raise InputError("times is on the device meta, where it holds no numbers: give a list, or a tensor on the CPU")
    if t.dim() != 1 or len(t) < 2 or t.dtype == torch.bool or t.is_complex():
        raise InputError(f"times has shape {tuple(t.shape)} and dtype {t.dtype}: give at least two numbers in one dimension")
    values: list[float] = t.to(torch.float64).tolist()
    down = values[0] > values[1]
    for i, (a, b) in enumerate(itertools.pairwise(values)):
        if not (math.isfinite(a) and math.isfinite(b)):
            raise InputError(
                f"times[{i if not math.isfinite(a) else i + 1}] is {a if not math.isfinite(a) else b}: times must be finite"
            )
        if a == b or (a > b) != down:
            raise InputError(
                f"times[{i + 1}]={b:g} after times[{i}]={a:g}: times must be strictly decreasing (or increasing, to encode)"
            )
    low, high = min(values), max(values)
    if low < 0.0 or high > path.T:
        raise InputError(f"times reach from {low:g} to {high:g}, outside the domain [0, {path.T:g}] of {path}")
    lams = path.lam(torch.tensor(values, dtype=torch.float64)).tolist()
    for i, (a, b) in enumerate(itertools.pairwise(lams)):
        if not (a < b if down else a > b):
            path.knots(values)  # says so where alpha or sigma is negative or NaN
            raise PathError(
                f"lambda is not monotone on {path}: lambda({values[i]:g}) = {a:g}, lambda({values[i + 1]:g}) = {b:g}"
            )
    return tuple(values)


def _check_shape(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, (int, str)):
        raise InputError(f"shape={shape!r}: give a tuple (batch, ...) such as (64, 3, 32, 32)")
    size = tuple(shape)
    if len(size) < 1 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in size):
        raise InputError(f"shape={shape!r}: give a tuple (batch, ...) of ints >= 0")
    return size


def _check_state(x: Any) -> None:
    if not isinstance(x, Tensor):
        hint = "torch.from_numpy(x)" if type(x).__module__ == "numpy" else "torch.as_tensor(x)"
        raise InputError(f"x is a {type(x).__name__}: give a floating-point tensor, {hint}")
    if x.is_complex():
        raise InputError("x is complex: complex not supported")
    if not x.dtype.is_floating_point or x.is_quantized or x.layout is not torch.strided:
        raise InputError(f"x has dtype {x.dtype} and layout {x.layout}: give a dense floating-point tensor, x.float()")
    if x.dim() == 0:
        raise InputError("x has no batch dimension: give shape (batch, ...)")
    bad = non_finite(x) if x.numel() and x.device.type != "meta" else ()
    if bad:
        raise InputError(f"x is not finite in {len(bad)} of {len(x)} samples (first: {bad[0]})")


@lru_cache(maxsize=256)
def _tensor(times: tuple[float, ...]) -> Tensor:
    return torch.tensor(times, dtype=torch.float64, device="cpu")


@lru_cache(maxsize=64, typed=True)  # typed: a seed of True is not a seed of 1
def _white(seed: int) -> White:
    return White(seed)


def _source(noise: Any, seed: int, seeds: Sequence[int] | None) -> Source:
    if isinstance(noise, Source):
        if seeds is not None or seed != 0:
            given = f"seed={seed!r}" if seeds is None else "seeds"
            raise InputError(
                f"{given} and noise={type(noise).__name__}(...) are both given: seed the source, or leave noise out"
            )
        return noise
    if noise in (None, "white"):
        return _white(seed) if seeds is None and isinstance(seed, int) else White(seed, seeds=seeds)
    if noise == "brownian":
        return Brownian(seed, seeds=seeds)
    raise InputError(f"noise={noise!r}: use 'white', 'brownian', or a source of sde.noise such as Brownian(seed=0, cells=256)")
