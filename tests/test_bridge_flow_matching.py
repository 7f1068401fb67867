"""Our samplers on flow_matching's velocities: torchdiffeq's steps, and flow_matching itself where it is installed."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torchdiffeq
from torch import Tensor

from sde import EDM, Trigonometric
from sde.errors import InputError, PathError
from solvers.bridges.flow_matching import ODESolver


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, START = randn(3, 3, seed=0), randn(4, 3, seed=1)


def velocity(x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
    assert t.dim() == 0
    return torch.tanh(x @ WEIGHT.to(x.dtype) + t + shift) * (1.0 - 0.5 * t) - 0.3 * x


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def torchdiffeq_states(grid: Tensor, method: str, shift: float = 0.0, options: dict[str, float] | None = None) -> Tensor:
    states = torchdiffeq.odeint(lambda t, x: velocity(x, t, shift), START, grid, method=method, options=options)
    assert isinstance(states, Tensor)
    return states


@pytest.mark.parametrize(
    ("solver", "method"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun3", "heun3"), ("rk38", "rk4")]
)
@pytest.mark.parametrize("step_size", [0.125, 0.15])
def test_parity_with_torchdiffeq(solver: str, method: str, step_size: float) -> None:
    """The same steps as theirs, of which the last may be shorter; and back to noise."""
    for ends in ((0.0, 1.0), (1.0, 0.0), (0.2, 0.7)):
        grid = torch.tensor(ends, dtype=torch.float64)
        theirs = torchdiffeq_states(grid, method, 0.3, {"step_size": step_size})[-1]
        ours = ODESolver(velocity, solver).sample(START, step_size=step_size, time_grid=grid, shift=0.3)
        close(ours, theirs)


def test_the_grid_itself_and_equal_steps() -> None:
    grid = [0.0, 0.1, 0.3, 0.6, 1.0]
    theirs = torchdiffeq_states(torch.tensor(grid, dtype=torch.float64), "euler")
    solver = ODESolver(velocity, "euler")
    close(solver.sample(START, time_grid=grid), theirs[-1])
    states = solver.sample(START, time_grid=grid, return_intermediates=True)
    close(states, theirs)
    assert torch.equal(states[0], START)
    close(solver.sample(START, steps=8), solver.sample(START, step_size=0.125))
    fine = solver.sample(START, time_grid=grid, steps=3, return_intermediates=True)
    assert fine.shape == (5, 4, 3)
    close(fine[1], solver.sample(START, time_grid=(0.0, 0.1), steps=3))
    close(fine[-1], solver.sample(START, time_grid=grid, steps=3))


def test_exponential_steps_on_the_right_path() -> None:
    """DDIM's step in their time, on CondOT and on a cosine path: x0 and eps solved from the velocity by hand."""
    times = [0.0, 0.3, 0.7, 0.95]
    for path, levels in (
        (None, lambda t: (t, 1.0 - t, 1.0, -1.0)),
        (
            Trigonometric(),
            lambda t: (
                math.sin(math.pi * t / 2),
                math.cos(math.pi * t / 2),
                math.pi / 2 * math.cos(math.pi * t / 2),
                -math.pi / 2 * math.sin(math.pi * t / 2),
            ),
        ),
    ):
        x = START
        for s, t in itertools.pairwise(times):
            a, b, da, db = levels(s)
            u = velocity(x, torch.tensor(s, dtype=torch.float64))
            det = a * db - b * da
            x0, eps = (db * x - b * u) / det, (a * u - da * x) / det
            alpha, sigma, *_ = levels(t)
            x = alpha * x0 + sigma * eps
        close(ODESolver(velocity, "ddim", path=path).sample(START, time_grid=times), x)


class Levels(NamedTuple):
    alpha_t: Tensor
    sigma_t: Tensor


def test_their_scheduler_is_a_path() -> None:
    """A scheduler, called with their time, gives the same as our path."""

    def cosine(t: Tensor) -> Levels:
        return Levels(torch.sin(0.5 * math.pi * t), torch.cos(0.5 * math.pi * t))

    ours = ODESolver(velocity, "dpmpp_2m", path=Trigonometric()).sample(START, step_size=0.1)
    close(ODESolver(velocity, "dpmpp_2m", path=cosine).sample(START, step_size=0.1), ours, 1e-9)
    apart = (ours - ODESolver(velocity, "dpmpp_2m").sample(START, step_size=0.1)).abs().max()
    assert float(apart) > 1e-3

    def mirrored(t: Tensor) -> Levels:  # no signal at all at noise, but for rounding
        return Levels(torch.cos(0.5 * math.pi * (1.0 - t)), torch.cos(0.5 * math.pi * t))

    close(ODESolver(velocity, "dpmpp_2m", path=mirrored).sample(START, step_size=0.1), ours, 1e-9)
    with pytest.raises(PathError, match=r"alpha\(1\) = 0"):
        ODESolver(velocity, "edm_heun", path=mirrored).sample(START, step_size=0.1)


def test_gradients_dtypes_and_noise() -> None:
    x = START.clone().requires_grad_()
    assert not ODESolver(velocity, "heun").sample(x, steps=3).requires_grad
    out = ODESolver(velocity, "heun").sample(x, steps=3, enable_grad=True)
    (slope,) = torch.autograd.grad(out.sum(), x)
    bumped = START.clone()
    bumped[1, 2] += 1e-6
    with torch.no_grad():
        change = ODESolver(velocity, "heun").sample(bumped, steps=3).sum() - out.sum()
    assert abs(float(change) / 1e-6 - float(slope[1, 2])) < 1e-5
    assert ODESolver(velocity, "dpmpp_2m").sample(START.bfloat16(), steps=3).dtype == torch.bfloat16

    def noisy(seed: int, batch: int = 4) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return ODESolver(velocity, "ddpm", generator=generator).sample(START[:batch], steps=5)

    assert torch.equal(noisy(1), noisy(1))
    assert not torch.equal(noisy(1), noisy(2))
    close(noisy(1, 2), noisy(1)[:2])
    state = torch.get_rng_state()
    ODESolver(velocity, "dpmpp_2m").sample(START, steps=2)
    assert torch.equal(state, torch.get_rng_state())


def test_refusals() -> None:
    solver = ODESolver(velocity)
    for error, call in (
        (r"'adaptive_dopri5' chooses its steps.*flow_matching", lambda: ODESolver(velocity, "adaptive_dopri5")),
        (r"time is in \[0, 1\]", lambda: ODESolver(velocity, path=EDM())),
        ("both given", lambda: solver.sample(START, step_size=0.1, steps=10)),
        ("step_size=0", lambda: solver.sample(START, step_size=0.0)),
        ("steps=0", lambda: solver.sample(START, steps=0)),
        ("steps=True", lambda: solver.sample(START, steps=True)),
        ("at least two", lambda: solver.sample(START, time_grid=[0.0])),
        ("outside the domain", lambda: solver.sample(START, time_grid=[0.0, 1.5])),
    ):
        with pytest.raises(InputError, match=error):
            call()


@pytest.mark.parametrize("name", ["CondOTScheduler", "CosineScheduler", "VPScheduler", "LinearVPScheduler"])
def test_parity_with_flow_matching(name: str) -> None:
    """Their ODESolver on a velocity, and their schedulers as paths: alpha and sigma at other times than the grid's."""
    schedulers = pytest.importorskip("flow_matching.path.scheduler")
    solver = pytest.importorskip("flow_matching.solver")
    scheduler = getattr(schedulers, name)()
    grid = torch.tensor([0.0, 1.0], dtype=torch.float64)
    finite = not name.endswith("VPScheduler")  # else sigma' is infinite at data, where only the 3/8 rule asks
    for ours, theirs in (("euler", "euler"), ("midpoint", "midpoint"), ("rk38", "rk4"))[: 3 if finite else 2]:
        wanted = solver.ODESolver(velocity).sample(START, step_size=0.1, method=theirs, time_grid=grid, shift=0.2)
        close(ODESolver(velocity, ours, path=scheduler).sample(START, step_size=0.1, shift=0.2), wanted, 1e-9)
    path = ODESolver(velocity, path=scheduler).path
    t = torch.tensor([0.1, 0.37, 0.8], dtype=torch.float64)
    close(path.alpha(t), scheduler(1.0 - t).alpha_t)
    close(path.sigma(t), scheduler(1.0 - t).sigma_t)
