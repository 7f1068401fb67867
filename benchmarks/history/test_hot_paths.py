"""The hot paths, timed by pytest-benchmark, each beside what other libraries and a hand-written loop take for the same work.

    python -m pytest benchmarks/history --benchmark-autosave --benchmark-storage=file://out/history      measure and keep
    python -m pytest benchmarks/history --benchmark-compare --benchmark-storage=file://out/history       beside the last one
    python -m pytest benchmarks/history --benchmark-compare-fail=median:25% --benchmark-compare ...      fail where 25 % slower

It needs ``pip install pytest-benchmark``, and is no part of the tests. A group is one piece of work; the number in brackets
after a time is its ratio to the fastest of the group, so ours can be read against theirs. Times are the process's own, on one
thread.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import costs, peers, problems, speed_steps
from benchmarks.peers.impulses import exact_w2
from scores import Score
from sde import VP
from sde.noise import Brownian, White
from sde.prediction import Knot
from solvers import exact_law, trace
from solvers.grids import log_snr

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

STEPS = 20
SHAPES = ((4096, 2), (16, 3, 32, 32))
DETERMINISTIC = (
    ("ddim", "log_snr"),
    ("dpmpp_2m", "log_snr"),
    ("unipc_2", "log_snr"),
    ("k_diffusion/euler", "log_snr"),
    ("k_diffusion/dpmpp_2m", "log_snr"),
    ("diffusers/DDIM", "uniform"),
    ("diffusers/DPMSolverMultistep2", "log_snr"),
    ("diffusers/UniPC2", "log_snr"),
    ("azula/zAB2", "log_snr"),
    ("flow_matching/euler", "log_snr"),
    ("torchdiffeq/euler", "uniform"),
)
STOCHASTIC = (
    ("ddpm", "log_snr"),
    ("dpmpp_2m_sde", "log_snr"),
    ("k_diffusion/euler_ancestral", "log_snr"),
    ("k_diffusion/dpmpp_2m_sde:noise=white", "log_snr"),
    ("k_diffusion/dpmpp_2m_sde", "log_snr"),
    ("diffusers/DDPM", "uniform"),
    ("azula/DDPM", "log_snr"),
    ("torchsde/euler", "uniform"),
)


FRESH = (20.0 + 1e-9 * n for n in itertools.count())


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """No gradients, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def measure(benchmark: Any, group: str, run: Callable[[], object], per: int = 1) -> None:
    """``per``: how many steps a run has, kept beside the times."""
    benchmark.group = group
    benchmark.extra_info["steps"] = per
    benchmark(run)


def shape_name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.mark.benchmark(timer=time.process_time, max_time=0.5, min_rounds=5)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize(("line", "grid"), DETERMINISTIC + STOCHASTIC, ids=lambda text: text)
def test_step(benchmark: Any, line: str, grid: str, shape: tuple[int, ...]) -> None:
    """20 steps on a network of one multiplication."""
    library = line.partition("/")[0]
    if "/" in line and peers.library(library).missing():
        pytest.skip(str(peers.library(library).missing()))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ready = costs.contender(line, grid, VP(), x, STEPS)
    kind = "flow" if (line, grid) in DETERMINISTIC else "noise"
    measure(benchmark, f"step: {kind}, {shape_name(shape)}", ready.run, STEPS)


@pytest.mark.benchmark(timer=time.process_time, max_time=0.5, min_rounds=5)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("how", ["plan", "by hand"])
def test_plan(benchmark: Any, how: str, name: str, shape: tuple[int, ...]) -> None:
    """A traced plan beside the loop that one would write by hand."""
    path = VP()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    times = log_snr(path, STEPS)
    plan, score = trace(name, path, times), Score(lambda x, t: 0.5 * x, path, predicts="eps")
    loop = {"ddim": speed_steps.ddim, "dpmpp_2m": speed_steps.dpmpp_2m}[name]
    hand = loop(path.knots(times), lambda x, t: 0.5 * x, len(x))
    run = {"plan": lambda: plan.run(score, x), "by hand": lambda: hand(x)}[how]
    measure(benchmark, f"plan: {name}, {shape_name(shape)}", run, STEPS)


@pytest.mark.benchmark(group="tracing", timer=time.process_time, max_time=0.5, min_rounds=3)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m", "unipc_3", "deis_t_3", "rk4", "seeds_3"])
def test_trace(benchmark: Any, name: str) -> None:
    """A sampler to its table, on a path that no earlier trace has seen."""

    def run() -> None:
        path = VP(beta_max=next(FRESH))  # tables are kept: another path each time
        trace(name, path, log_snr(path, STEPS))

    measure(benchmark, "tracing", run, STEPS)


@pytest.mark.benchmark(timer=time.process_time, max_time=0.5, min_rounds=3)
@pytest.mark.parametrize("line", ["dpmpp_2m_sde", "k_diffusion/dpmpp_2m_sde:noise=white", "azula/DDPM"])
def test_exact_law(benchmark: Any, line: str) -> None:
    """The law of a sampler's output on gauss64: of our table, and of other libraries' loops by impulses."""
    problem = problems.get("gauss64:vp")
    if "/" not in line:
        gaussian: Any = problem.exact
        plan = trace(line, problem.path, log_snr(problem.path, STEPS, problem.start, problem.stop))
        measure(benchmark, "exact law", lambda: exact_law(plan, gaussian).w2(problem.stop))
        return
    library = peers.library(line.partition("/")[0])
    if library.missing():
        pytest.skip(str(library.missing()))
    ready = peers.resolve_line(line)
    measure(benchmark, "exact law", lambda: exact_w2(ready, problem, STEPS, "log_snr"))


@pytest.mark.benchmark(timer=time.process_time, max_time=0.5, min_rounds=5)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("source", ["torch.randn", "White", "Brownian", "torchsde tree"])
def test_noise(benchmark: Any, source: str, shape: tuple[int, ...]) -> None:
    """20 draws of a state's normals, or increments of one Brownian path."""
    out = torch.empty(shape)
    knots = [Knot(5.0 - 0.475 * n, 1.0, 1.0, -5.0 + 0.475 * n, 0.0, 0.0, 0.0) for n in range(STEPS + 1)]

    def ours(made: Any) -> Callable[[], object]:
        def run() -> None:
            draws = made.open(shape)
            for k in range(STEPS):
                draws.normal(k, knots[k], knots[k + 1], out=out)

        return run

    def plain() -> None:
        for _ in range(STEPS):
            torch.randn(shape, out=out)

    def tree() -> None:
        import torchsde

        path = torchsde.BrownianTree(0.0, torch.zeros(shape), 1.0, entropy=0)
        for k in range(STEPS):
            path(k / STEPS, (k + 1) / STEPS)

    runs = {"torch.randn": plain, "White": ours(White(0)), "Brownian": ours(Brownian(0)), "torchsde tree": tree}
    measure(benchmark, f"noise: {shape_name(shape)}", runs[source], STEPS)
