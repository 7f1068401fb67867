"""A plan as one CUDA graph: all of its network calls and all of its arithmetic, recorded once, replayed in one launch.

A plan is a fixed sequence of rows with fixed coefficients, and a score prepares everything that needs the host before the first
call: nothing in between looks at a value. Only plans without normals are recorded, whose streams are counted on the host.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError
from sde.prediction import Predictor, Tally
from solvers.plan import Plan

from .costs import own_clock
from .peers.line import running
from .speed_noise import timings

WARM_UP = 3
"""Runs before the recording: libraries choose their kernels and allocate what they keep."""


class Prepared:
    """A plan made ready for one score and one shape: ``run(x)`` calls the network and does the arithmetic, nothing else."""

    def __init__(self, plan: Plan, score: Predictor, x: Tensor) -> None:
        if plan.draws:
            raise InputError(f"{plan.solver} draws {plan.draws} normals: a graph holds none; take a deterministic sampler")
        self.plan, self.score = plan, score
        with running(score):
            self.calls = score.at(plan.knots, x, {}, Tally())

    def run(self, x: Tensor) -> Tensor:
        """The state at the last time from x, which is overwritten."""
        states = self.plan.iterate(self.score, x)
        try:
            state, _ = next(states)
            for call in self.calls[:-1]:
                state, _ = states.send(call(state))
            states.send(self.calls[-1](state))
        except StopIteration as stop:
            return stop.value
        raise RuntimeError("the plan asked for more calls than it has knots")


class Captured:
    """``Prepared`` as a CUDA graph. Its result is overwritten by the next run: clone it to keep it."""

    def __init__(self, prepared: Prepared, x: Tensor) -> None:
        if x.device.type != "cuda":
            raise InputError(f"a CUDA graph needs a state on a CUDA device, this one is on {x.device}")
        self.x = x.clone()
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                prepared.run(self.x.clone())
        torch.cuda.current_stream(x.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = prepared.run(self.x.clone())

    def run(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.graph.replay()
        return self.out


@dataclass(frozen=True)
class Graphed:
    """Seconds a run of a plan: as ``Plan.run`` has it, prepared, and as one graph (None without a CUDA device), and how far
    the graph's result is from the plan's, in units of its largest number.
    """

    solver: str
    nfe: int
    plan: float
    prepared: float
    graph: float | None
    difference: float


def measure(plan: Plan, score: Predictor, x: Tensor, seconds: float = 3.0) -> Graphed:
    """Medians of interleaved runs from the state x."""
    with torch.no_grad(), running(score):
        ready = Prepared(plan, score, x)
        runs: dict[str, Callable[[], Any]] = {"plan": lambda: plan.run(score, x), "prepared": lambda: ready.run(x.clone())}
        last = ready.run(x.clone())
        if x.device.type == "cuda":
            captured = Captured(ready, x)
            runs["graph"] = lambda: captured.run(x)
            last = captured.run(x).clone()
        truth = plan.run(score, x)
        off = float((last - truth).abs().max() / truth.abs().max())
        found = {name: statistics.median(v) for name, v in timings(runs, seconds, own_clock(x.device)).items()}
    return Graphed(plan.solver, plan.nfe, found["plan"], found["prepared"], found.get("graph"), off)
