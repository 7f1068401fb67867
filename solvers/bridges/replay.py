"""A plan replayed one network call at a time: what all bridges share.

Elsewhere the loop, and the network call in it, belong to someone else. A plan is a list of rows, so it can stop at each call,
say which state the network wants at which knot, and go on with the answer:

    replay = Replay(plan, Output(path, "eps"), x)
    while not replay.done:
        y = network(replay.state, label(replay.knot))    # theirs
        replay.send(y)                                   # send(y, state) where they changed the state in between
    replay.state                                         # at plan.times[-1]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, ToolkitError
from sde.noise import Brownian, Source, White
from sde.path import Path
from sde.prediction import OUTPUTS, Knot, Prediction, Predictor, Row, Tally, affine

from ..base import Step
from ..catalogue import resolve
from ..plan import Call, Plan, execute, trace_solver
from ..sampling import trace

Noise = Callable[[int, Knot, Knot, Tensor], Tensor]
"""noise(k, s, t, like): the k-th unit normals of the run, of the step from s to t, like the state."""


class Output(Predictor):
    """What the output of a network means that its caller owns: the path, and the row y = a x0 + b eps. It is never called.

    predicts : a name of ``sde.prediction.OUTPUTS``, or a function of the knot to (a, b)
    """

    def __init__(self, path: Path, predicts: str | Callable[[Knot], Row]) -> None:
        self.path, self.predicts = path, predicts

    def row(self, knot: Knot) -> Row:
        if callable(self.predicts):
            return self.predicts(knot)
        return OUTPUTS[self.predicts](knot.alpha, knot.sigma, knot.dalpha, knot.dsigma, 0.5)

    def at(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> list[Any]:
        raise ToolkitError("this network belongs to its caller: Replay only says what it wants")

    def predict(self, x: Tensor, t: Any, **conditions: Any) -> Prediction:
        raise ToolkitError("this network belongs to its caller: Replay only says what it wants")

    def __call__(self, x: Tensor, t: Any, **conditions: Any) -> Tensor:
        raise ToolkitError("this network belongs to its caller: Replay only says what it wants")


class Replay:
    """One run of a plan, stopped before each network call.

    ``call`` is the number of the call that is wanted, ``knot`` where, ``state`` on what; at the end ``done`` is True and
    ``state`` the result. The states are the caller's to keep: neither they nor x nor what is sent is ever written to, and a
    gradient flows through. ``after(i, x)`` sees the state after step i.
    """

    def __init__(
        self,
        plan: Plan,
        output: Output,
        x: Tensor,
        noise: Noise | None = None,
        after: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.plan, self.output, self.done = plan, output, False
        self._run = execute(plan.program(output, in_place=False), x, noise, after)
        self.call, self.state = next(self._run)

    @property
    def knot(self) -> Knot:
        return self.plan.knots[self.call]

    def send(self, y: Tensor, state: Tensor | None = None) -> None:
        """The raw output of the network, and the state that it saw if that is not ``self.state``."""
        try:
            self.call, self.state = self._run.send((y, self.state if state is None else state))  # pyright: ignore[reportArgumentType]
        except StopIteration as stop:
            self.call, self.state, self.done = self.call + 1, stop.value, True

    def x0(self, y: Tensor, state: Tensor | None = None) -> Tensor:
        """E[x0] from the raw output wanted now."""
        u, v = affine(self.output.row(self.knot), self.knot, 1.0, 0.0)
        return v * y + u * (self.state if state is None else state)


@dataclass(frozen=True)
class _EndsOnX0:
    """``inner``, but a step to sigma = 0 is alpha x0: for networks that say nothing at sigma = 0 itself."""

    inner: Any

    linear = True

    def step(self, problem: Any, x: Any, s: Knot, t: Knot, carry: Any, noise: Any) -> Step:
        if t.sigma == 0.0:
            return Step(t.alpha * problem.predict(x, s).x0)
        return self.inner.step(problem, x, s, t, carry, noise)


def traced(solver: Any, output: Output, times: Any, eta: Any = None) -> Plan:
    """The table of a solver at times on the network's path.

    Where the solver would ask the network at sigma = 0 and its output determines no eps there (x0 = x, whatever it says), the
    last step is Euler's, as in EDM's and k-diffusion's Heun.
    """
    plan = trace(solver, output.path, times, eta)
    if not any(k.sigma == 0.0 and output.row(k).b == 0.0 for k in plan.knots):
        return plan
    name, solver, eta = resolve(solver, eta)
    return trace_solver(_EndsOnX0(solver), output.path, plan.times, eta, name)  # pyright: ignore[reportArgumentType]


def first_calls(plan: Plan) -> tuple[int, ...]:
    """The number of the first network call of each step."""
    calls, before = 0, {0: 0}
    for row in plan.rows:
        calls += isinstance(row, Call)
        before[row.out] = calls
    return tuple(before[register] for register in plan.states[:-1])


def starts_at_state(plan: Plan) -> bool:
    """Whether the first network call is on the caller's state itself, at the first time."""
    first = next(row for row in plan.rows if isinstance(row, Call))
    return first.state == 0 and plan.knots[0].t == plan.times[0]


def check_traceable(solver: Any, where: str) -> tuple[str, Any, Any]:
    """(name, solver, eta) as ``resolve`` gives them, of a solver that has a table; else one error."""
    name, solver, eta = resolve(solver)
    if getattr(solver, "adaptive", False):
        raise InputError(
            f"solver={name!r} chooses its steps while it runs, but {where} asks for them beforehand: use a solver of fixed "
            "steps, such as 'dpmpp_2m' or 'edm_heun', or wrap the network as a score and call solvers.sample"
        )
    if not solver.linear:
        raise InputError(
            f"solver={name!r} has no table that {where} could replay (its coefficients depend on the state, or it is another "
            "library's): use one that has, such as 'dpmpp_2m_sde', or wrap the network as a score and call solvers.sample"
        )
    return name, solver, eta


def source(kind: str, generator: Any, batch: int) -> Source:
    """A source of ``sde.noise`` whose seeds are drawn here from what torch users seed with.

    generator : a torch.Generator: sample i of the run is (its next number, i), whatever the batch size; a list with one a
                sample: each has the next number of its own; None: torch's global generator
    """
    if kind not in KINDS:
        raise InputError(f"noise={kind!r}: give one of {', '.join(map(repr, KINDS))}")
    make = KINDS[kind]
    if isinstance(generator, (list, tuple)):
        if len(generator) != batch:
            raise InputError(f"generator: a list of {len(generator)} for {batch} samples; give one a sample, or a single one")
        return make(seeds=[_draw_seed(g) for g in generator])
    return make(_draw_seed(generator))


KINDS: dict[str, Callable[..., Source]] = {"white": White, "brownian": Brownian}


def _draw_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, (1 << 63) - 1, (), generator=generator, device=device))


def drawer(origin: Source) -> Noise:
    """The draws of one run of a source, opened at the first one."""
    draws: Any = None

    def draw(k: int, s: Knot, t: Knot, like: Tensor) -> Tensor:
        nonlocal draws
        if draws is None:
            draws = origin.open(tuple(like.shape), like.dtype, like.device)
        return draws.normal(k, s, t, like)

    return draw
