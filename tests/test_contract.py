"""What every sampler of SOLVERS promises, whatever its method: counts, times, independence of samples, purity, dtypes, memory.

All tests run over SOLVERS, so a new sampler is covered by its row. The network is elementwise and made of correctly rounded
operations only: then rows of a batch cannot depend on one another, and promises about samples hold to the bit.
"""

from __future__ import annotations

import gc
import json
import math
import random
import re
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from rows import one_of_each_kind
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scores import Gaussian, Score, as_network
from sde import EDM, VE, VP, Cosine, Linear, Path, ProbabilityFlow, ReverseSDE, SubVP, Tabulated
from sde.errors import BudgetWarning, InputError, StepLimitError
from sde.noise import Brownian, White
from sde.prediction import OUTPUTS
from solvers import GRIDS, SOLVERS, Plan, encode, exact_law, integrate, sample, trace
from solvers.backends import TorchDiffEq

PATHS: dict[str, Path] = {
    "vp": VP(),
    "edm": EDM(),
    "linear": Linear(),
    "cosine": Cosine(),
    "ve": VE(),
    "subvp": SubVP(),
    "tabulated": Tabulated.linear(1000),
    "zero_snr": Tabulated.scaled_linear(1000, zero_terminal_snr=True),
}

EVERY = list(SOLVERS)  # for what constants could break: counts
ALL = one_of_each_kind()
LINEAR = [name for name in ALL if SOLVERS[name].solver.linear]
ADAPTIVE = [name for name in EVERY if getattr(SOLVERS[name].solver, "adaptive", False)]
FIXED = [name for name in ALL if name not in ADAPTIVE]
DIFFEQ = [name for name in ALL if isinstance(SOLVERS[name].solver, TorchDiffEq)]
DETERMINISTIC = [n for n, e in SOLVERS.items() if e.eta == 0.0 and not (e.solver.stochastic and not e.solver.takes_eta)]
STOCHASTIC = [name for name in ALL if name not in DETERMINISTIC]


def budget(name: str, nfe: int) -> dict[str, Any]:
    """Arguments of ``sample`` that spend about nfe calls; an easy stretch where the solver chooses its steps."""
    return {"nfe": 1000, "start": 0.5, "stop": 0.2} if name in ADAPTIVE else {"nfe": nfe}


class Spy:
    """An elementwise network that remembers the times it was called at."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @property
    def calls(self) -> int:
        return len(self.times)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(float(t[0]))
        return elementwise(x, t)


def elementwise(x: Tensor, t: Tensor) -> Tensor:
    return x / (x * x + 1.0) * 0.8 + 0.1


def spied(path: Path) -> tuple[Score, Spy]:
    spy = Spy()
    return Score(spy, path, "x0"), spy


@cache
def home(name: str) -> Path:
    """VP, or, for methods that need small steps on it, a gentle VP on which one step will do."""
    try:
        trace(name, VP(), [1.0, 0.5, 0.1])
    except InputError:
        if SOLVERS[name].solver.linear:
            return VP(0.1, 0.9)
    return VP()


@cache
def plain(path: Path) -> Score:
    return Score(elementwise, path, "x0")


def marches(name: str) -> bool:
    """Whether a run goes step by step though there is a table, to hand a carry on."""
    return getattr(SOLVERS[name].solver, "reversible", False)


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_calls_are_counted_at_the_network_and_never_exceed_the_budget(name):
    solver = SOLVERS[name].solver
    if name in ("ddim", "ddpm", "dpmpp_2m", "edm_heun"):
        budgets = [*range(1, 65)]
    else:
        budgets = [1, 2, 3, 5, 7, 14, 30] if name in ADAPTIVE or not solver.linear else [1, 2, 3, 4, 6, 9, 16]
    for budget in budgets:
        score, spy = spied(home(name))
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                out = sample(score, (2, 3), solver=name, nfe=budget, seed=1)
        except (StepLimitError, InputError) as error:
            refused = error
        else:
            refused = None
        if isinstance(refused, StepLimitError):
            assert name in ADAPTIVE
            assert spy.calls <= budget
            assert refused.t is not None
            assert refused.partial is not None
            continue
        if refused is not None:
            assert budget < solver.stages
            assert spy.calls == 0
            assert "nfe=" in str(refused)
            continue
        assert out.nfe == out.net_evals == spy.calls <= budget
        extra = getattr(solver, "extra", 0)  # calls of a start beyond ``stages`` a step
        assert extra or [w.category for w in seen] == ([BudgetWarning] if budget < solver.stages else []), (budget, seen)
        if solver.linear and not seen:  # as much of the budget is used as whole steps allow
            assert spy.calls > budget - solver.stages or extra
            longer = GRIDS["log_snr"](home(name), len(out.times))
            if budget >= solver.stages:
                assert trace(name, home(name), longer).nfe > budget


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ADAPTIVE])
def test_calls_are_counted_at_the_network_for_given_steps(name):
    for steps, stop in [(steps, stop) for steps in (1, 2, 3, 6) for stop in (None, 0.0)]:  # at 0 last steps are shorter
        score, spy = spied(home(name))
        try:
            out = sample(score, (2, 3), solver=name, steps=steps, seed=1, stop=stop)
        except InputError:  # this end is refused
            if stop is None:
                raise
            continue
        assert out.nfe == out.net_evals == spy.calls
        assert len(out.times) == steps + 1
        least = 0 if getattr(SOLVERS[name].solver, "uneven", False) else (steps - 1) * SOLVERS[name].solver.stages
        assert least < out.nfe <= steps * SOLVERS[name].solver.stages + getattr(SOLVERS[name].solver, "extra", 0)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("grid", ["uniform"])
def test_the_network_sees_the_times_of_the_table_in_order(name, grid):
    for label in ("vp", "edm", "linear"):
        if name == "ddpm_discrete" and label != "vp":
            continue
        path = PATHS[label]
        times = GRIDS[grid](path, 9, 0.9 * path.T)
        plan = trace(name, path, times)
        score, spy = spied(path)
        out = plan.run(score, torch.ones(2, 3, dtype=torch.float64))
        assert spy.times == [k.t for k in plan.knots]
        assert torch.isfinite(out).all()
        assert spy.times[0] == plan.times[0] or name in ("edm_sde", "annealed_langevin")
        solution = integrate(name, score, torch.ones(2, 3, dtype=torch.float64), times)
        assert equal(solution.x, out) or (marches(name) and torch.allclose(solution.x, out, rtol=1e-12, atol=1e-12))
        assert equal(solution.times, times)
        inner = [k.t for k in plan.knots if k.index >= 0]
        assert set(inner) <= set(plan.times)


@pytest.mark.parametrize("name", [n for n in FIXED if n not in LINEAR])
def test_solvers_without_a_table_see_the_times_of_the_grid(name):
    score, spy = spied(home(name))
    out = sample(score, x=torch.ones(2, 3, dtype=torch.float64), solver=name, steps=7)
    solver = SOLVERS[name].solver
    if solver.stages * 7 == spy.calls and not hasattr(solver, "solve"):
        assert spy.times == [t for t in out.times[:-1].tolist() for _ in range(solver.stages)]
    assert spy.times[0] == float(out.times[0])
    assert all(a >= b for a, b in zip(spy.times, spy.times[1:], strict=False))


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", PATHS)
@pytest.mark.parametrize("grid", GRIDS)
def test_grids_have_exact_ends_and_decrease_strictly(grid, label):
    path = PATHS[label]
    starts = [None, 0.7 * path.T] if float(path.alpha(path.T)) == 0.0 else [None, path.T, 0.7 * path.T]
    assert trace("ddim", path, GRIDS[grid](path, 7)).times == tuple(GRIDS[grid](path, 7).tolist())
    for n in [*(range(1, 21) if label == "vp" else (1, 2, 10)), 333]:
        for start in starts if n in (1, 2, 10, 333) else starts[:1]:
            for stop in [None, path.t_min, 0.01 * path.T] if n in (1, 2, 10, 333) else [None]:
                times = GRIDS[grid](path, n, start, stop)
                assert times.dtype == torch.float64
                assert times.shape == (n + 1,)
                assert bool((times[1:] < times[:-1]).all()), (n, start, stop, times)
                if start is not None:
                    assert float(times[0]) == start
                if stop is not None:
                    assert float(times[-1]) == stop
                if not grid.startswith("ays"):
                    if stop is None:
                        assert float(times[-1]) == path.t_min
                    if start is None and (float(path.alpha(path.T)) > 0.0 or grid in ("uniform", "quadratic", "cosine")):
                        assert float(times[0]) == path.T


#: What a refusal of an end says to write instead.
_FIX = r"start( \(to encode, stop\))?(=| elsewhere| just| off| below)|stop(=| at| off| elsewhere)|use |give |more steps"


@pytest.mark.parametrize("label", PATHS)
@pytest.mark.parametrize("name", ALL)
def test_both_ends_of_every_path_are_reached_or_refused(name, label):
    path = PATHS[label]
    score = Gaussian(path, torch.full((2,), 0.3, dtype=torch.float64), std=0.5)
    x = torch.ones(3, 2, dtype=torch.float64)
    reached, refusals = 0, []
    ends = [("uniform", path.T, None, 5), ("uniform", None, 0.0, 1), ("uniform", path.T, 0.0, 5), ("log_snr", path.T, 0.0, 4)]
    for grid, start, stop, n in ends:
        size = {"nfe": 30} if name in ADAPTIVE else {"steps": n}
        try:
            out = sample(score, x=x, solver=name, grid=grid, start=start, stop=stop, **size)
        except InputError as error:  # PathError is one
            refusals.append(str(error))
            continue
        except StepLimitError:
            assert name in ADAPTIVE
            reached += 1
            continue
        assert out.x.isfinite().all()
        assert start is None or float(out.times[0]) == start
        assert stop is None or float(out.times[-1]) == stop
        reached += 1
    for text in refusals:
        assert len(text) < 400
        assert re.search(_FIX, text), text
    assert reached or name == "ddpm_discrete" or label in ("linear", "cosine", "zero_snr")


# --- samples are independent of their batch ---------------------------------------------------------------------------


def run_rows(name: str, indices: list[int], shape: tuple[int, ...], dtype: torch.dtype, source: type = White) -> Tensor:
    noise = source(5, indices=indices)
    return sample(plain(home(name)), (len(indices), *shape), solver=name, steps=4, noise=noise, dtype=dtype).x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", FIXED)
def test_a_sample_does_not_depend_on_its_batch(name, dtype):
    for shape in ((2,), (3,), (3, 4, 4), (17,))[:: 1 if dtype == torch.float32 else 3]:
        whole = run_rows(name, list(range(64)), shape, dtype)
        assert equal(run_rows(name, list(range(7)), shape, dtype), whole[:7])
        for i in (0, 1, 5, 63):
            assert equal(run_rows(name, [i], shape, dtype), whole[i : i + 1])
        order = random.Random(0).sample(range(64), 64)
        assert equal(run_rows(name, order, shape, dtype), whole[order])
    assert equal(sample(plain(home(name)), (64, 17), solver=name, steps=4, seed=5, dtype=dtype).x, whole)
    seeds = [3, 9, 2**64 - 1, 4]
    together = sample(plain(home(name)), (4, 3), solver=name, steps=4, seeds=seeds, dtype=dtype).x
    for i, seed in enumerate(seeds):
        assert equal(sample(plain(home(name)), (1, 3), solver=name, steps=4, seed=seed, dtype=dtype).x, together[i : i + 1])


@pytest.mark.parametrize("name", [n for n in STOCHASTIC if n in LINEAR])
def test_a_sample_does_not_depend_on_its_batch_with_a_brownian_path(name):
    whole = run_rows(name, list(range(9)), (3, 2), torch.float32, Brownian)
    assert equal(run_rows(name, [4], (3, 2), torch.float32, Brownian), whole[4:5])
    assert equal(run_rows(name, [8, 2], (3, 2), torch.float32, Brownian), whole[[8, 2]])


@pytest.mark.parametrize("name", DIFFEQ)
def test_adaptive_steps_of_a_sample_can_be_its_own(name):
    from dataclasses import replace

    solver = replace(SOLVERS[name].solver, per_sample=True)
    x = White(1).initial((5, 3), torch.float64) * torch.tensor([0.1, 1.0, 3.0, 0.5, 2.0], dtype=torch.float64)[:, None]
    whole = integrate(solver, plain(home(name)), x, [1.0, 1e-3])
    for i in (0, 3):
        alone = integrate(SOLVERS[name].solver, plain(home(name)), x[i : i + 1], [1.0, 1e-3])
        assert equal(alone.x, whole.x[i : i + 1])
    assert whole.accepted is not None
    assert whole.accepted > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", ALL)
def test_memory_layout_does_not_matter(name, dtype):
    x = White(2).initial((6, 3, 4, 4), dtype)
    big = torch.zeros(12, 3, 4, 8, dtype=dtype)
    big[::2, :, :, 1::2] = x
    layouts = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": big[::2, :, :, 1::2],
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "offset": torch.cat([torch.zeros(1, dtype=dtype), x.flatten()])[1:].view(x.shape),
    }

    times = [0.5, 0.4] if name in ADAPTIVE else [0.99, 0.5, 0.2, 0.01]

    def run(x: Tensor) -> Tensor:
        return integrate(name, plain(home(name)), x, times, seed=3).x

    reference = run(x)
    for label, given in layouts.items():
        assert equal(given, x)
        assert equal(run(given), reference), label
    row = x[:1].expand(6, 3, 4, 4)
    assert equal(run(row), run(row.contiguous()))
    assert equal(row, x[:1].expand(6, 3, 4, 4))


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "edm_sde", "pc_ddpm", "torchsde_euler", "dopri5"])
def test_threads_of_torch_do_not_change_bits(name):
    before = torch.get_num_threads()
    shapes = ((8, 3, 48, 48), (2, 3, 128, 128))
    try:
        for shape in shapes if name == "pc_ddpm" else shapes[:1]:
            out = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                out.append(sample(plain(home(name)), shape, solver=name, **budget(name, 6), seed=3).x)
            assert equal(*out), shape
    finally:
        torch.set_num_threads(before)


# --- purity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_replays(name):
    a, b, other = (sample(plain(home(name)), (3, 4), solver=name, **budget(name, 12), seed=s) for s in (7, 7, 8))
    assert equal(a.x, b.x)
    assert a.nfe == b.nfe
    assert not torch.equal(a.x, other.x)
    if name in STOCHASTIC:  # the seed drives the steps too, not only the start
        x = torch.ones(3, 4)
        c, d = (sample(plain(home(name)), x=x, solver=name, **budget(name, 12), seed=s) for s in (7, 8))
        assert not torch.equal(c.x, d.x)


@pytest.mark.parametrize("name", LINEAR)
def test_threads_share_a_plan_and_a_score(name):
    plan = trace(name, home(name), GRIDS["log_snr"](home(name), 12))
    score = Score(elementwise, home(name), "x0")
    x = White(0).initial((4, 50))
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda seed: plan.run(score, x, seed=seed), [seed for seed in range(4) for _ in range(4)]))
    for seed in range(4):
        alone = plan.run(score, x, seed=seed)
        assert all(equal(run, alone) for run in runs[4 * seed : 4 * seed + 4])


@pytest.mark.parametrize("name", [n for n in ALL if n not in LINEAR])
def test_threads_share_solvers_without_a_table(name):
    def run(seed: int) -> Tensor:
        return sample(plain(home(name)), (2, 3), solver=name, **budget(name, 12), seed=seed).x

    filters = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(run, [1, 2] * 3))
    assert all(equal(out, runs[i % 2]) for i, out in enumerate(runs))
    assert list(warnings.filters) == filters


class Module(torch.nn.Module):
    """An elementwise network with parameters and a dropout layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7))
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.drop(self.scale * x)


def surroundings(network: torch.nn.Module) -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),  # pyright: ignore[reportArgumentType]
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        list(warnings.filters),
        [m.training for m in network.modules()],
        [p.grad for p in network.parameters()],
        np.geterr(),
    )


@pytest.mark.parametrize("name", ALL)
def test_runs_leave_no_traces(name):
    path = home(name)
    network = Module().train()
    score = Score(network, path, "x0", mode="eval")
    times = torch.tensor([0.99, 0.6, 0.3, 0.1, 0.01], dtype=torch.float64)
    x = White(0).initial((3, 4))
    kept = x.clone(), times.clone(), x._version, times._version
    before = surroundings(network)
    sample(score, (3, 4), solver=name, **budget(name, 20))
    sample(score, x=x, solver=name, **budget(name, 20), seed=4)
    out = integrate(name, score, x, times, trajectory=name not in ADAPTIVE and not hasattr(SOLVERS[name].solver, "solve"))
    assert out.x.data_ptr() != x.data_ptr()
    if name in LINEAR:
        plan = trace(name, path, times)
        plan.run(score, x)
        Plan.from_json(plan.to_json()).run(score, x)
        exact_law(plan, Gaussian(path, torch.zeros(2), std=0.5))
    if name in DETERMINISTIC:
        encode(score, x, solver=name, **budget(name, 20))
    assert surroundings(network) == before
    assert equal(x, kept[0])
    assert equal(times, kept[1])
    assert (x._version, times._version) == kept[2:]


@pytest.mark.parametrize("name", ALL)
def test_a_failed_run_leaves_no_traces_either(name):
    network = Module().train()
    network.register_forward_hook(lambda *_: 1 / 0)
    score = Score(network, home(name), "x0", mode="eval")
    before = surroundings(network)
    from sde.errors import NetworkError

    with pytest.raises(NetworkError):
        sample(score, (3, 4), solver=name, nfe=20)
    assert surroundings(network) == before


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_dtypes(name):
    x = White(3).initial((5, 3), torch.float64)
    times = [0.5, 0.4] if name in ADAPTIVE else [0.99, 0.7, 0.5, 0.3, 0.1, 0.01]
    out = {}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        result = integrate(name, plain(home(name)), x.to(dtype), times, seed=2)
        assert result.x.dtype == dtype
        assert result.times.dtype == torch.float64
        out[dtype] = result.x
    if name not in ADAPTIVE:
        reference = out[torch.float64]
        assert (out[torch.float32].double() - reference).norm() < 1e-4 * reference.norm()
        for half in (torch.float16, torch.bfloat16):  # the state is float32 inside: only the start and the end are rounded
            inside = integrate(name, plain(home(name)), x.to(half).float(), times, seed=2)
            assert equal(inside.x.to(half), out[half])


@pytest.mark.parametrize("name", ALL)
def test_global_modes_of_torch_do_not_matter(name):
    def run() -> Tensor:
        return sample(Score(elementwise, home(name), "x0"), (4, 3), solver=name, **budget(name, 12), seed=2).x

    expected = run()
    torch.set_default_dtype(torch.float64)
    try:
        assert equal(run(), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert equal(run(), expected)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(run(), expected)
    torch.use_deterministic_algorithms(True)
    try:
        assert equal(run(), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(run(), expected)


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label"),
    [(n, "vp") for n in LINEAR] + [(n, ("edm", "linear")[i % 2]) for i, n in enumerate(LINEAR) if n != "ddpm_discrete"],
)
def test_what_the_network_predicts_does_not_matter(name, label):
    path = home(name) if label == "vp" else PATHS[label]
    gaussian = Gaussian(path, torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64), std=0.6)
    times = GRIDS["log_snr"](path, 5, 0.98 * path.T, 0.01 * path.T)
    x = White(1).initial((4, 3), torch.float64) * path.prior_std()
    expected = integrate(name, gaussian, x, times, seed=6, trajectory=True).trajectory
    for predicts in OUTPUTS:
        score = Score(as_network(gaussian, path, predicts), path, predicts)
        got = integrate(name, score, x, times, seed=6, trajectory=True).trajectory
        assert (got - expected).abs().max() <= 1e-10 * expected.abs().max(), predicts


@pytest.mark.parametrize("name", LINEAR)
def test_the_table_equals_the_march_and_survives_json(name):
    path = home(name)
    times = GRIDS["uniform"](path, 12)
    x = White(1).initial((4, 3), torch.float64)
    for score in (plain(home(name)), Score(elementwise, path, "eps"), Score(elementwise, path, "v")):
        march = integrate(name, score, x, times, seed=6, traced=False, trajectory=True)
        table = integrate(name, score, x, times, seed=6, trajectory=True)
        assert table.nfe == march.nfe
        scale = march.trajectory.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1.0)
        assert ((table.trajectory - march.trajectory).abs() / scale).max() <= 1e-12
        plan = trace(name, path, times)
        again = Plan.from_json(plan.to_json())
        assert again == plan
        assert json.loads(again.to_json()) == json.loads(plan.to_json())
        run = plan.run(score, x, seed=6)
        assert equal(run, table.x) or (marches(name) and torch.allclose(run, table.x, rtol=1e-12, atol=1e-12))
        assert equal(again.run(score, x, seed=6), run)
        assert equal(by_hand(plan, score, x, White(6)), run)


def by_hand(plan: Plan, score: Score, x: Tensor, source: White) -> Tensor:
    """The plan step by step, for callers that own the network."""
    draws = source.open(x.shape, x.dtype, x.device)
    steps = plan.iterate(score, x, lambda k, s, t, like: draws.normal(k, s, t))
    try:
        state, knot = next(steps)
        while True:
            state, knot = steps.send(elementwise(state, torch.tensor(knot.t)))
    except StopIteration as stop:
        return stop.value


@pytest.mark.parametrize("name", LINEAR)
def test_a_network_may_reuse_its_output_buffer(name):
    buffer = torch.empty(4, 3)

    def reusing(x: Tensor, t: Tensor) -> Tensor:
        buffer.copy_(elementwise(x, t))
        return buffer

    for predicts in ("x0", "eps", "v"):
        a, b = (
            sample(Score(net, home(name), predicts), (4, 3), solver=name, nfe=12, seed=1).x for net in (reusing, elementwise)
        )
        assert equal(a, b)


@pytest.mark.parametrize("name", FIXED)
def test_trajectories_and_callbacks_do_not_change_the_result(name):
    if hasattr(SOLVERS[name].solver, "solve"):
        pytest.skip("a back end of a library")
    seen = []

    def callback(info):
        seen.append(info)
        info.x.zero_()  # its own copy

    expected = sample(plain(home(name)), (3, 2), solver=name, steps=5, seed=1)
    out = sample(plain(home(name)), (3, 2), solver=name, steps=5, seed=1, trajectory=True, callback=callback)
    assert equal(out.x, expected.x)
    assert equal(out.trajectory[-1], expected.x)
    assert out.trajectory.shape == (6, 3, 2)
    assert [i.i for i in seen] == [0, 1, 2, 3, 4]
    assert {i.n for i in seen} == {5}
    assert [i.t for i in seen] == out.times[1:].tolist()
    assert [i.nfe for i in seen] == sorted(i.nfe for i in seen)
    assert seen[-1].nfe == out.nfe
    start = sample(plain(home(name)), x=out.trajectory[0].clone(), solver=name, steps=5, seed=1)
    assert equal(start.x, expected.x)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
def test_gradients_in_the_start_are_those_of_finite_differences(name):
    if name.startswith("torchsde"):
        pytest.skip("a back end of a library")
    x = White(1).initial((2, 2), torch.float64).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return integrate(name, plain(home(name)), x, [0.9, 0.5, 0.2, 0.05], seed=1, grad=True).x

    assert torch.autograd.gradcheck(run, (x,))


@pytest.mark.parametrize("name", ALL)
def test_gradients_flow_to_parameters_only_when_asked(name):
    network = Module().eval()
    score = Score(network, home(name), "x0")
    x = torch.ones(2, 3, requires_grad=True)
    out = integrate(name, score, x, [0.9, 0.5, 0.05], trajectory=not hasattr(SOLVERS[name].solver, "solve"))
    for tensor in (out.x, out.trajectory):
        assert tensor is None or (tensor.grad_fn is None and not tensor.requires_grad)
    out = integrate(name, score, x, [0.9, 0.5, 0.05], grad=True)
    out.x.sum().backward()
    for tensor in (x, network.scale):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0
    with torch.no_grad():
        out = integrate(name, score, x.detach(), [0.9, 0.5, 0.05], grad=True)
    assert out.x.requires_grad


# --- encode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_encode_inverts_sample_or_refuses(name):
    path = EDM(T=10.0, t_min=0.01)
    gaussian = Gaussian(path, torch.tensor([0.4, -0.2], dtype=torch.float64), std=0.6)
    data = gaussian.sample(5, path.t_min, 0, dtype=torch.float64)
    budget = {"nfe": 1000} if name in ADAPTIVE else {"steps": 100}
    if name in STOCHASTIC:
        with pytest.raises(InputError, match=f"{name!r} is stochastic"):
            encode(gaussian, data, solver=name, **budget)
        return
    latent = encode(gaussian, data, solver=name, **budget)
    assert latent.times[0] == path.t_min
    assert latent.times[-1] == path.T
    back = sample(gaussian, x=latent.x, solver=name, **budget)
    error = float((back.x - data).abs().max())
    order = SOLVERS[name].solver.order or 2.0
    in_rho = name.startswith("edm") or name in ADAPTIVE or order == 1.0 or "unipc" in name or "dpm" in name
    assert error < (1e-5 if name == "edm_rk4" else {1.0: 0.2, 2.0: 0.02, 3.0: 0.02}.get(order, 1e-3) if in_rho else 0.3), error


# --- memory -----------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts live storages of at least ``size`` bytes that are born inside, and their peak."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.live, self.peak = size, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if storage.nbytes() >= self.size and key not in self.live:
                    self.live[key] = weakref.finalize(storage, self.live.pop, key, None)
                    self.peak = max(self.peak, len(self.live))
        return out


@pytest.mark.parametrize(
    ("name", "most"), [("ddim", 2), ("ddpm", 3), ("dpmpp_2m", 4), ("edm_heun", 4), ("unipc_3", 7), ("rk4", 8)]
)
def test_live_buffers_of_the_size_of_the_state(name, most):
    x = torch.zeros(4, 3, 160, 160)
    size = x.numel() * 4

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(x)

    peaks = []
    for steps in (6, 24):
        with Live(size) as watch:
            watch.live[x.untyped_storage().data_ptr()] = None
            base = len(watch.live)
            integrate(name, Score(network, VP(), "eps"), x, GRIDS["uniform"](VP(), steps))
        peaks.append(watch.peak - base)
    assert peaks[0] == peaks[1] <= most, peaks


class Syncs(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n in FIXED if not hasattr(SOLVERS[n].solver, "solve")])
def test_the_loop_does_not_wait_for_the_device(name):
    counts = []
    for steps in (3, 12):
        x, times = torch.ones(2, 3), GRIDS["uniform"](home(name), steps).tolist()
        integrate(name, plain(home(name)), x, times)  # traced and lowered before
        with Syncs() as watch:
            integrate(name, plain(home(name)), x, times)
        counts.append(watch.count)
    assert counts[0] == counts[1]


# --- the law ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in STOCHASTIC if n in LINEAR])
def test_sampled_law_is_the_exact_law(name):
    path = VP()
    gaussian = Gaussian(path, torch.tensor([0.7], dtype=torch.float64), std=0.4)
    times = GRIDS["uniform" if name == "ddpm_discrete" else "cosine"](path, 25 if name == "ddpm_discrete" else 4, 0.95, 0.05)
    plan = trace(name, path, times)
    law = exact_law(plan, gaussian, start=(0.2, 1.3))
    n = 20_000
    x = 0.2 + math.sqrt(1.3) * White(11).initial((n, 1), torch.float64)
    for source in (White(12), Brownian(12)):
        out = plan.run(gaussian, x, noise=source)
        z_mean = float((out.mean() - law.mean) / (law.variance / n).sqrt())
        z_var = float((out.var() / law.variance - 1.0) / math.sqrt(2.0 / (n - 1)))
        assert max(abs(z_mean), abs(z_var)) < 5, (source, z_mean, z_var)


@pytest.mark.parametrize("label", ["vp", "edm", "linear", "subvp"])
@pytest.mark.parametrize("name", [n for n, e in SOLVERS.items() if getattr(e.solver, "target", None) == "x0"])
def test_constant_predictions_give_the_exact_law_in_any_number_of_steps(name, label):
    path = PATHS[label]
    point = Gaussian(path, torch.tensor([0.7, -0.3], dtype=torch.float64), std=0.0)
    for n in (1, 2, 5):
        times = GRIDS["log_snr"](path, n, 0.95 * path.T, 0.02 * path.T)
        for eta in [None, 0.5, 1.0] if SOLVERS[name].solver.takes_eta else [None]:
            law = exact_law(trace(name, path, times, eta), point)
            assert law.w2(float(times[-1])) < 1e-12 * path.T


def test_reverse_sde_and_flow_problems_choose_the_noise_level():
    x = torch.ones(2, 3, dtype=torch.float64)
    times = [0.9, 0.5, 0.1]
    assert equal(integrate("ddim", plain(VP()), x, times).x, integrate("ddpm", ProbabilityFlow(VP(), plain(VP())), x, times).x)
    assert equal(integrate("ddim", ReverseSDE(VP(), plain(VP())), x, times).x, integrate("ddpm", plain(VP()), x, times).x)
    half = sample(plain(VP()), x=x, solver="ddpm", steps=4, eta=0.5)
    for own in ({"eta": 0.5}, {"eta": lambda t: 0.5}, {"diffusion": lambda t: 0.5 * VP().g(t)}):
        problem = ReverseSDE(VP(), plain(VP()), **own)
        for name in ("ddpm", "ddim"):
            assert torch.allclose(integrate(name, problem, x, half.times).x, half.x, rtol=1e-12, atol=1e-12)
        for name in ("torchsde_euler", "euler_maruyama"):
            assert not torch.allclose(integrate(name, problem, x, times).x, integrate(name, plain(VP()), x, times).x)
    assert not torch.allclose(sample(plain(VP()), x=x, solver="ddpm", steps=4, eta=lambda t: t).x, half.x)


def test_nothing_keeps_a_network_alive_after_a_run():
    x, times = torch.ones(3, 2), [0.9, 0.5, 0.1]
    runs = [
        lambda s: sample(s, (3, 2), nfe=5),
        lambda s: trace("ddim", VP(), times).run(s, x),
        lambda s: integrate("ddpm", ReverseSDE(VP(), s, eta=lambda t: 0.5), x, times),
        lambda s: integrate("heun", ProbabilityFlow(VP(), s), x, times, grad=True),
        lambda s: integrate("pc_ddpm", s, x, times),
        lambda s: integrate("dopri5", s, x, times[:2]),
        lambda s: integrate("torchsde_euler", s, x, times),
    ]
    for run in runs:
        network = Module().eval()
        alive = weakref.ref(network)
        run(Score(network, VP(), "x0"))
        del network
        gc.collect()
        assert alive() is None


def test_torchsde_takes_the_steps_and_the_noise_of_our_own_euler_maruyama():
    x = White(1).initial((4, 3), torch.float64)
    for noise in (White(2), Brownian(2)):
        ours, theirs = (
            sample(plain(VP()), x=x, solver=name, steps=9, noise=noise, trajectory=True)
            for name in ("euler_maruyama", "torchsde_euler")
        )
        assert torch.allclose(ours.trajectory, theirs.trajectory, rtol=1e-12, atol=1e-12)
        assert equal(ours.times, theirs.times)
