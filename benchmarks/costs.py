"""What samplers cost beside each other, ours and other libraries': calls, time, what of it is their own, memory.

Two measurements, each with the contenders taking turns and each number with its spread:

    overhead   on a network of one multiplication, which is asked directly: what is left is the loop. A step is one of the
               sampler's own, which may hold several calls; their cost, timed beside, is subtracted
    on a model the same calls on a real network, counted and timed at the meter. What a library's coordinates cost (x / alpha,
               its levels) counts as network there

On a CPU the clock is the process's own time, on one thread; on CUDA wall time up to the end of the device's work, and the
network's time by events. Memory is the peak of what a run allocates beyond its start noise, in units of the state: on a CPU of
tensors (what a library keeps outside of torch is not seen), on CUDA of the allocator.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scores import Score
from sde import VP
from sde.errors import InputError
from sde.path import Path
from sde.prediction import Predictor

from .lines import Line, Meter, resolve_line
from .peers.line import PeerLine
from .peers.network import Bare
from .speed_noise import timings
from .speed_steps import peak_buffers


class Spread(NamedTuple):
    """The median of repeated measurements, with the quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return Spread(*[float(values[0])] * 3)
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(middle, low, high)

    def each(self, factor: float, less: float = 0.0) -> Spread:
        """factor * (value - less), of all three."""
        return Spread(*(factor * (v - less) for v in self))


@dataclass(frozen=True)
class Overhead:
    """A line on a network that does nothing: microseconds a step beyond the calls, and memory in units of the state."""

    line: str
    grid: str
    steps: int
    nfe: int
    micros: Spread
    memory: float


@dataclass(frozen=True)
class Cost:
    """A line on a model: seconds of a run, what of them is the network's, what is left, and memory in units of the state.

    ``device``: the network's seconds on a CUDA device, None on a CPU.
    """

    line: str
    grid: str
    nfe: int
    net_evals: int
    wall: Spread
    network: Spread
    overhead: Spread
    device: Spread | None
    memory: float


def own_clock(device: torch.device) -> Callable[[], float]:
    """The process's time on a CPU, where other processes then do not count; wall time where a device is waited for."""
    if device.type != "cuda":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


@contextmanager
def one_thread_on_cpu(device: torch.device) -> Iterator[None]:
    before = torch.get_num_threads()
    if device.type != "cuda":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_of(run: Callable[[], object], x: Tensor) -> float:
    """Peak of what a run allocates, in units of x."""
    if x.device.type != "cuda":
        return peak_buffers(run, x)
    torch.cuda.synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    run()
    torch.cuda.synchronize(x.device)
    return (torch.cuda.max_memory_allocated(x.device) - before) / (x.numel() * x.element_size())


# --- overhead -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Contender:
    """A run on the network of one multiplication, and its calls and steps."""

    line: str
    grid: str
    run: Callable[[], Any]
    nfe: int
    steps: int


def overhead(
    lines: Sequence[tuple[str, str]],
    shape: tuple[int, ...],
    steps: int,
    seconds: float = 5.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Overhead]:
    """Rows of ``lines``, pairs (line, grid), at ``steps`` of their own steps from states of this shape. Not of adaptive lines.

    seconds: to measure for, over all lines.
    """
    device, path = torch.device(device), VP()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    found = [contender(text, grid, path, x, steps) for text, grid in lines]
    multiply = Bare(0.5)
    runs: dict[str, Callable[[], Any]] = {f"{i}": c.run for i, c in enumerate(found)}
    runs["call"] = lambda: [multiply.noise(x, 1.0) for _ in range(steps)]
    with torch.no_grad(), one_thread_on_cpu(device):
        times = timings(runs, seconds, own_clock(device))
        call = statistics.median(times["call"]) / steps
        return [
            Overhead(
                c.line,
                c.grid,
                c.steps,
                c.nfe,
                Spread.of(times[f"{i}"]).each(1e6 / c.steps, less=c.nfe * call),
                memory_of(c.run, x),
            )
            for i, c in enumerate(found)
        ]


def contender(text: str, grid: str, path: Path, x: Tensor, steps: int) -> Contender:
    """A line made ready. Ours run as ``sample`` runs them, labels and checks included."""
    line = resolve_line(text)
    if isinstance(line, PeerLine):
        if line.sampler.adaptive:
            raise InputError(f"{line.name} chooses its own steps: overhead is of a number of steps; leave it out")
        line.check(grid, None)
        ends = path.knot(path.T), path.knot(path.t_min)
        counted = Bare(0.5)
        line.loop(counted, x, path, *ends, steps, grid)
        return Contender(
            line.name, grid, lambda: line.loop(Bare(0.5), x, path, *ends, steps, grid), nfe=counted.calls, steps=steps
        )
    from solvers import sample

    score = Score(lambda x, t: x * 0.5, path, predicts="eps")
    first = sample(score, x=x, solver=line.name, steps=steps, grid=grid)
    return Contender(
        line.name, grid, lambda: sample(score, x=x, solver=line.name, steps=steps, grid=grid), nfe=first.nfe, steps=steps
    )


# --- on a model ---------------------------------------------------------------------------------------------------------------


def on_model(
    score: Predictor,
    lines: Sequence[tuple[str, str]],
    x: Tensor,
    nfe: int,
    start: float,
    stop: float,
    seconds: float = 10.0,
) -> list[Cost]:
    """Rows of ``lines``, pairs (line, grid), at ``nfe`` calls from the start noise x."""
    device = x.device
    meter = Meter(score, device)
    found = [(resolve_line(text), grid) for text, grid in lines]
    logs: dict[str, list[tuple[int, int, float, float | None]]] = {f"{i}": [] for i in range(len(found))}

    def run(i: int, line: Line, grid: str) -> None:
        meter.reset()
        began = time.perf_counter()
        line.run(meter, x, nfe=nfe, grid=grid, seed=0, indices=range(len(x)), eta=None, start=start, stop=stop)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        logs[f"{i}"].append((meter.nfe, meter.net_evals, time.perf_counter() - began, meter.device_seconds))
        networks[f"{i}"].append(meter.seconds if meter.device_seconds is None else meter.device_seconds)

    networks: dict[str, list[float]] = {name: [] for name in logs}
    runs = {f"{i}": lambda i=i, line=line, grid=grid: run(i, line, grid) for i, (line, grid) in enumerate(found)}
    with torch.no_grad(), one_thread_on_cpu(device):
        timings(runs, seconds, least=3)
        rows = []
        for i, (line, grid) in enumerate(found):
            kept, inside = logs[f"{i}"][1:], networks[f"{i}"][1:]  # the first warms up: plans are traced, counts are made
            walls = [wall for _, _, wall, _ in kept]
            on_device = [d for *_, d in kept if d is not None]
            rows.append(
                Cost(
                    line.name,
                    grid,
                    kept[0][0],
                    kept[0][1],
                    Spread.of(walls),
                    Spread.of(inside),
                    Spread.of([w - n for w, n in zip(walls, inside, strict=True)]),
                    Spread.of(on_device) if on_device else None,
                    memory_of(runs[f"{i}"], x),
                )
            )
    return rows
