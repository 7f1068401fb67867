"""Plans replayed call by call: the same numbers as a run, states that are the caller's, and a state that the caller changed."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import one_of_each_kind
from torch import Tensor

from scores import Score
from sde import EDM, VP, Linear, Tabulated
from sde.errors import InputError, ToolkitError
from sde.noise import Brownian, White
from solvers import SOLVERS, integrate, trace
from solvers.base import Step
from solvers.bridges.replay import (
    Output,
    Replay,
    check_traceable,
    drawer,
    first_calls,
    source,
    starts_at_state,
    traced,
)

TABLE = Tabulated.scaled_linear()
TIMES = {TABLE: [1.0, 0.75, 0.4, 0.1, 0.03], Linear(): [0.95, 0.75, 0.4, 0.1, 0.02], EDM(T=10.0): [10.0, 5.0, 1.0, 0.3, 0.05]}
WEIGHT = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(x: Tensor, t: float | Tensor) -> Tensor:
    """Smooth, without structure, different at every time."""
    t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
    return torch.tanh(x @ WEIGHT.to(x.dtype) + t) + 0.3 * x


def finish(replay: Replay) -> Tensor:
    while not replay.done:
        replay.send(network(replay.state, replay.knot.t))
    return replay.state


TRACEABLE = [n for n in one_of_each_kind() if SOLVERS[n].solver.linear]


@pytest.mark.parametrize("path", TIMES, ids=str)
@pytest.mark.parametrize("name", TRACEABLE)
def test_a_replay_is_the_run(name: str, path) -> None:
    """The bits differ (other order of sums), the numbers do not; the calls come in the plan's order."""
    if name == "ddpm_discrete" and path != TABLE:
        pytest.skip("a VP sampler")
    times = TIMES[path]
    plan = traced(name, Output(path, "eps"), times)
    replay = Replay(plan, Output(path, "eps"), X, drawer(White(3)))
    calls = []
    while not replay.done:
        calls.append(replay.call)
        replay.send(network(replay.state, replay.knot.t))
    assert calls == list(range(plan.nfe))
    wanted = integrate(name, Score(network, path), X, times, seed=3).x
    torch.testing.assert_close(replay.state, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["edm_heun", "dpmpp_3m", "unipc_3", "euler_ancestral"])
def test_the_states_are_the_callers(name: str) -> None:
    """Neither x, nor a state handed out, nor an output sent is written to."""
    start = X.clone()
    replay = Replay(trace(name, TABLE, TIMES[TABLE]), Output(TABLE, "v"), start, drawer(White(0)))
    seen: list[tuple[Tensor, Tensor]] = []
    while not replay.done:
        y = network(replay.state, replay.knot.t)
        seen += [(replay.state, replay.state.clone()), (y, y.clone())]
        replay.send(y)
    assert torch.equal(start, X)
    assert all(torch.equal(kept, copy) for kept, copy in seen)


def test_a_changed_state_goes_on_as_the_textbook_says() -> None:
    """DDIM and Heun written out, with half of the state overwritten before every call."""
    path, times = TABLE, TIMES[TABLE]
    knots = path.knots(times)

    def changed(x: Tensor, i: int) -> Tensor:
        x = x.clone()
        x[:, 0] = 0.1 * i
        return x

    x = X
    for i, (s, t) in enumerate(itertools.pairwise(knots)):
        x = changed(x, i)
        eps = network(x, s.t)
        x = t.alpha * (x - s.sigma * eps) / s.alpha + t.sigma * eps
    ddim = x
    x = X / knots[0].alpha  # Heun in rho on x/alpha
    for i, (s, t) in enumerate(itertools.pairwise(knots)):
        a, b = s.sigma / s.alpha, t.sigma / t.alpha
        x = changed(x * s.alpha, 2 * i) / s.alpha
        d = network(x * s.alpha, s.t)
        stage = changed((x + (b - a) * d) * t.alpha, 2 * i + 1)
        x = x + (b - a) * 0.5 * (d + network(stage, t.t))
    for name, wanted in (("ddim", ddim), ("edm_heun", x * knots[-1].alpha)):
        replay = Replay(trace(name, path, times), Output(path, "eps"), X)
        while not replay.done:
            state = changed(replay.state, replay.call)
            replay.send(network(state, replay.knot.t), state)
        torch.testing.assert_close(replay.state, wanted, rtol=1e-10, atol=1e-10)


def test_a_gradient_flows_through() -> None:
    path, times = VP(), [1.0, 0.6, 0.2, 0.01]

    def by_replay(x: Tensor) -> Tensor:
        return finish(Replay(trace("dpmpp_2m", path, times), Output(path, "eps"), x))

    ours, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    by_replay(ours).square().sum().backward()
    integrate("dpmpp_2m", Score(network, path), theirs, times, grad=True).x.square().sum().backward()
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_old_states_are_let_go() -> None:
    """A long run holds a few states, not all of them."""
    times = torch.linspace(1.0, 0.01, 31).tolist()
    for name in ("edm_heun", "dpmpp_2m", "unipc_3"):
        replay, most = Replay(trace(name, TABLE, times), Output(TABLE, "eps"), X), 0
        while not replay.done:
            replay.send(network(replay.state, replay.knot.t))
            if not replay.done:
                frame: Any = replay._run.gi_frame  # pyright: ignore[reportAttributeAccessIssue]
                most = max(most, sum(slot is not None for slot in frame.f_locals["slots"]))
        assert 2 <= most <= 7


def test_after_sees_every_state() -> None:
    plan, states = trace("dpmpp_2m", TABLE, TIMES[TABLE]), []
    finish(Replay(plan, Output(TABLE, "eps"), X, after=lambda i, x: states.append((i, x))))
    wanted = integrate("dpmpp_2m", Score(network, TABLE), X, TIMES[TABLE], trajectory=True).trajectory
    assert wanted is not None
    assert [i for i, _ in states] == [0, 1, 2, 3]
    torch.testing.assert_close(torch.stack([x for _, x in states]), wanted[1:], rtol=1e-9, atol=1e-9)


def test_first_calls_and_where_they_are() -> None:
    times = [1.0, 0.7, 0.4, 0.2, 0.1, 0.0]
    for name, wanted in {
        "dpmpp_2m": (0, 1, 2, 3, 4),
        "edm_heun": (0, 2, 4, 6, 8),  # the last step has one call
        "unipc_3": (0, 1, 2, 3, 4),
        "pndm": (0, 4, 8, 12, 13),
        "sa_solver_pece": (0, 2, 4, 6, 8),
    }.items():
        plan = trace(name, TABLE, times)
        assert first_calls(plan) == wanted
        assert [plan.knots[i].t for i in wanted] == times[:-1]
        assert starts_at_state(plan)
    assert not starts_at_state(trace("edm_sde", TABLE, [0.8, 0.5, 0.2]))  # churn comes before the first call
    assert starts_at_state(trace("edm_sde", TABLE, [1.0, 0.5, 0.2]))  # capped at the path's end
    assert not starts_at_state(trace(Shaken(), TABLE, [0.8, 0.5, 0.2]))


@dataclass(frozen=True)
class Shaken:
    """DDIM after a little noise at the same level."""

    order = weak = strong = None
    stages, stochastic, takes_eta, linear = 1, True, False, True

    def step(self, problem: Any, x: Any, s: Any, t: Any, carry: Any, noise: Any) -> Step:
        return SOLVERS["ddim"].solver.step(problem, x + 0.1 * noise(s, s), s, t, carry, noise)  # pyright: ignore[reportAttributeAccessIssue]


def test_x0_of_every_output() -> None:
    """x0 from eps, v, velocity and x0 itself, of a known pair."""
    x0, eps = X, X.flip(0)
    for path in (TABLE, Linear()):
        k = path.knot(0.6)
        x, norm = k.alpha * x0 + k.sigma * eps, math.hypot(k.alpha, k.sigma)
        outputs = {
            "eps": eps,
            "x0": x0,
            "v": (k.alpha * eps - k.sigma * x0) / norm,
            "velocity": k.dalpha * x0 + k.dsigma * eps,
        }
        for predicts, y in outputs.items():
            replay = Replay(trace("ddim", path, [0.6, 0.1]), Output(path, predicts), x)
            torch.testing.assert_close(replay.x0(y), x0, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(replay.x0(y, 2.0 * x), replay.x0(y) + replay.x0(0.0 * y), rtol=1e-9, atol=1e-9)


def test_the_last_step_of_networks_that_know_nothing_at_zero() -> None:
    """Heun in t asks at sigma = 0: a velocity network answers, an x0 network cannot, and gets Euler's step."""
    path, times = Linear(), [1.0, 0.5, 0.2, 0.0]
    assert traced("heun", Output(path, "velocity"), times).nfe == 6
    plan = traced("heun", Output(path, "x0"), times)
    assert [k.t for k in plan.knots] == [1.0, 0.5, 0.5, 0.2, 0.2]
    x = X
    for s, t in ((1.0, 0.5), (0.5, 0.2)):
        d = (x - network(x, s)) / s
        stage = x + (t - s) * d
        x = x + (t - s) * 0.5 * (d + (stage - network(stage, t)) / t)
    out = finish(Replay(plan, Output(path, "x0"), X))
    torch.testing.assert_close(out, network(x, 0.2), rtol=1e-10, atol=1e-10)


def test_solvers_without_a_table_are_refused() -> None:
    """All of SOLVERS: each has a table, or is refused for the right reason."""
    for name, entry in SOLVERS.items():
        if getattr(entry.solver, "adaptive", False):
            with pytest.raises(InputError, match=rf"'{name}' chooses its steps.*somewhere"):
                check_traceable(name, "somewhere")
        elif not entry.solver.linear:
            with pytest.raises(InputError, match=rf"'{name}' has no table.*somewhere"):
                check_traceable(name, "somewhere")
        else:
            assert check_traceable(name, "somewhere")[0] == name
    with pytest.raises(InputError, match="unknown"):
        check_traceable("dpmpp_2n", "somewhere")


def test_the_network_is_not_ours_to_call() -> None:
    output = Output(TABLE, "eps")
    for call in (lambda: output(X, 0.5), lambda: output.predict(X, 0.5), lambda: output.at([], X, {}, None)):  # pyright: ignore[reportArgumentType]
        with pytest.raises(ToolkitError, match="belongs to its caller"):
            call()


def test_seeds_from_generators() -> None:
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert source("white", generator(3), 4) == source("white", generator(3), 9)
    assert source("white", generator(3), 4) != source("white", generator(4), 4)
    assert isinstance(source("brownian", generator(3), 4), Brownian)
    one = generator(3)
    assert source("white", one, 4) != source("white", one, 4)  # the next run of the same generator has other noise
    many = source("white", [generator(3), generator(4)], 2)
    assert isinstance(many, White)
    assert many.seeds == tuple(source("white", generator(s), 1).seed for s in (3, 4))  # pyright: ignore[reportAttributeAccessIssue]
    torch.manual_seed(5)
    first = source("white", None, 4)
    assert first != source("white", None, 4)
    torch.manual_seed(5)
    assert first == source("white", None, 4)
    with pytest.raises(InputError, match="a list of 2 for 3 samples"):
        source("white", [generator(3), generator(4)], 3)
    with pytest.raises(InputError, match="noise='pink'"):
        source("pink", None, 3)


def test_importing_the_bridges_imports_nothing_heavy() -> None:
    code = (
        "import sys, solvers.bridges.diffusers, solvers.bridges.k_diffusion, solvers.bridges.azula, "
        "solvers.bridges.flow_matching\n"
        "heavy = ('diffusers', 'transformers', 'azula', 'flow_matching', 'scores', 'torchsde', 'torchdiffeq')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert out.stdout.strip() == "[]"
