"""What ``sample`` promises beyond the solvers: where it starts, what the seed means, what a budget buys."""

from __future__ import annotations

import pytest
import torch
from sde import EDM, VE, VP, Linear
from sde.errors import BudgetWarning
from sde.noise import Brownian, White

from scores import Gaussian
from solvers import sample
from solvers.sampling import StepInfo


def score(path):
    return Gaussian(path, torch.zeros(3, dtype=torch.float64), var=0.5)


@pytest.mark.parametrize(
    ("path", "start", "std"),
    [(VP(), None, 1.0), (VP(), 0.3, 1.0), (EDM(), None, 80.0), (EDM(), 10.0, 10.0), (VE(), None, 50.0), (Linear(), 0.9, 0.9)],
)
def test_it_starts_from_the_prior_at_its_first_time(path, start, std):
    out = sample(score(path), (5, 3), solver="ddim", steps=3, start=start, stop=0.1, seed=4, trajectory=True, dtype=torch.float64)
    expected = std * White(4).initial((5, 3), torch.float64)
    torch.testing.assert_close(out.trajectory[0], expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(out.trajectory[-1], out.x, rtol=0, atol=0)
    assert len(out.trajectory) == len(out.times) == 4


def test_one_seed_a_sample_is_sample_zero_of_that_seed():
    both = sample(score(VP()), (2, 3), solver="ddpm", steps=4, seeds=[7, 9])
    for row, seed in enumerate((7, 9)):
        alone = sample(score(VP()), (1, 3), solver="ddpm", steps=4, seed=seed)
        torch.testing.assert_close(both.x[row], alone.x[0], rtol=0, atol=0)


def test_a_budget_below_one_step_buys_a_step_of_lower_order():
    with pytest.warns(BudgetWarning, match="lower order"):
        out = sample(score(EDM()), (2, 3), solver="edm_heun", nfe=1)
    assert out.nfe == 1
    torch.testing.assert_close(out.x, sample(score(EDM()), (2, 3), solver="edm_euler", nfe=1).x, rtol=0, atol=0)


@pytest.mark.parametrize(("solver", "nfe", "spent"), [("edm_heun", 7, 6), ("rk4", 15, 12), ("ddim", 15, 15), ("pc_ddpm", 9, 8)])
def test_a_budget_is_spent_and_not_exceeded(solver, nfe, spent):
    assert sample(score(VP()), (2, 3), solver=solver, nfe=nfe).nfe == spent


def test_the_last_euler_step_at_zero_buys_another_step():
    """EDM's sampler costs 2 n - 1 calls where it ends at sigma = 0: a budget of 9 is 5 steps."""
    out = sample(score(EDM()), (2, 3), solver="edm_heun", nfe=9, grid="karras", stop=0.0)
    assert out.nfe == 9
    assert len(out.times) == 6


def test_callbacks_see_every_step():
    seen: list[StepInfo] = []
    out = sample(score(VP()), (2, 3), solver="edm_heun", steps=4, callback=seen.append)
    assert [s.i for s in seen] == [0, 1, 2, 3]
    assert [s.nfe for s in seen] == [2, 4, 6, 8]
    assert [s.t for s in seen] == out.times[1:].tolist()
    torch.testing.assert_close(seen[-1].x, out.x, rtol=0, atol=0)


def test_one_brownian_path_on_two_grids():
    """Refining the grid under one Brownian path moves the samples far less than another path does."""

    def run(steps, seed):
        noise = Brownian(seed, cells=1024)
        return sample(score(VP()), (256, 3), solver="ddpm", steps=steps, noise=noise, dtype=torch.float64).x

    coarse, fine, other = run(60, 0), run(120, 0), run(120, 1)
    assert float((coarse - fine).norm()) < 0.2 * float((fine - other).norm())
