"""What ``sample`` promises beyond the solvers: where it starts, what the seed means, what a budget buys."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from scores import Gaussian, Score
from sde import EDM, VE, VP, Linear, ReverseSDE
from sde.errors import BudgetWarning, NetworkError, PathError, TrainModeWarning
from sde.noise import Brownian, White
from solvers import encode, integrate, sample
from solvers.sampling import StepInfo


def score(path):
    return Gaussian(path, torch.zeros(3, dtype=torch.float64), var=0.5)


@pytest.mark.parametrize(
    ("path", "start", "std"),
    [(VP(), None, 1.0), (VP(), 0.3, 1.0), (EDM(), None, 80.0), (EDM(), 10.0, 10.0), (VE(), None, 50.0), (Linear(), 0.9, 0.9)],
)
def test_it_starts_from_the_prior_at_its_first_time(path, start, std):
    out = sample(
        score(path), (5, 3), solver="ddim", steps=3, start=start, stop=0.1, seed=4, trajectory=True, dtype=torch.float64
    )
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


GRID = [1.0, 0.7, 0.4, 0.1, 0.01]


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m", "unipc_3", "euler_maruyama", "edm_rk4"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score"])
@pytest.mark.parametrize(
    "same", [lambda x, t: x, lambda x, t: x.view(x.shape), lambda x, t: x.detach()], ids=["x", "view", "detach"]
)
def test_a_network_that_returns_its_input(solver, predicts, same):
    """The state is updated in place: an output that shares its memory must be copied first."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    ours = integrate(solver, Score(same, VP(), predicts), x, GRID).x
    copied = integrate(solver, Score(lambda x, t: x.clone(), VP(), predicts), x, GRID).x
    torch.testing.assert_close(ours, copied, rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc_3", "heun", "edm_rk4"])
def test_a_network_that_reuses_one_output_buffer(solver):
    """As CUDA graphs do: what a solver keeps of an output past the next call must be its own."""
    buffer = torch.empty(4, 3)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    reused = Score(lambda x, t: buffer.copy_(torch.tanh(x)), VP())
    fresh = Score(lambda x, t: torch.tanh(x), VP())
    torch.testing.assert_close(integrate(solver, reused, x, GRID).x, integrate(solver, fresh, x, GRID).x, rtol=0, atol=0)


def test_a_reverse_sde_given_by_its_diffusion_is_that_one():
    path = VP()
    x = torch.ones(4, 3, dtype=torch.float64)
    given = ReverseSDE(path, score(path), diffusion=lambda t: 0.7 * path.g(t))
    a = integrate("ddpm", given, x, GRID, seed=1).x
    torch.testing.assert_close(
        a, integrate("ddpm", ReverseSDE(path, score(path), 0.7), x, GRID, seed=1).x, rtol=1e-12, atol=0.0
    )
    none = ReverseSDE(path, score(path), diffusion=lambda t: 0.0 * t)
    torch.testing.assert_close(integrate("ddpm", none, x, GRID, seed=1).x, integrate("ddpm", none, x, GRID, seed=2).x)


def test_a_level_that_changes_its_mind_is_asked_again():
    level = [1.0]
    eta = lambda t: level[0]  # noqa: E731
    first = sample(score(VP()), (2, 3), solver="ddpm", steps=3, eta=eta)
    level[0] = 0.0
    second = sample(score(VP()), (2, 3), solver="ddpm", steps=3, eta=eta)
    torch.testing.assert_close(second.x, sample(score(VP()), (2, 3), solver="ddim", steps=3).x, rtol=0, atol=0)
    assert not torch.equal(first.x, second.x)


def test_no_run_keeps_a_network_alive():
    network = torch.nn.Linear(3, 3)
    gone = weakref.ref(network)
    problem = ReverseSDE(VP(), Score(lambda x, t, net=network: net(x), VP()), eta=lambda t: 0.5)
    integrate("ddpm", problem, torch.ones(2, 3), GRID)
    sample(problem.score, (2, 3), solver="dpmpp_2m", steps=3)
    del network, problem
    gc.collect()
    assert gone() is None


def test_a_network_that_writes_to_its_label_is_told():
    def network(x, t):
        t *= 1000
        return x

    for batch in (1, 2):
        with pytest.raises(NetworkError):
            integrate("ddim", Score(network, VP()), torch.ones(batch, 3), GRID)


@pytest.mark.parametrize("solver", ["edm_heun", "edm_rk4"])
def test_encoding_spends_no_more_than_asked(solver):
    calls = []
    network = Score(lambda x, t: calls.append(1) or 0.1 * x, EDM())
    out = encode(network, torch.ones(2, 3), solver=solver, nfe=7, stop=0.0)
    assert out.nfe == len(calls) <= 7


def test_train_mode_is_seen_through_a_lambda():
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    with pytest.warns(TrainModeWarning, match="Dropout"):
        sample(Score(lambda x, t: network(x), VP()), (2, 3), nfe=2)
    quiet = Score(lambda x, t: network(x), VP(), mode="eval")
    torch.testing.assert_close(sample(quiet, (2, 3), nfe=2).x, sample(quiet, (2, 3), nfe=2).x, rtol=0, atol=0)
    assert network.training


def test_a_float64_network_gets_a_float64_state():
    network = torch.nn.Linear(3, 3).double()
    assert sample(Score(lambda x, t: network(x), VP()), (2, 3), nfe=2).x.dtype is torch.float64


def test_exact_scores_are_not_rounded_by_autocast():
    path = VP()
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    exact = Gaussian(path, torch.zeros(3), cov=rotation @ torch.diag(torch.tensor([0.1, 1.0, 2.0])) @ rotation.T)
    plain = sample(exact, (4, 3), nfe=5).x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sample(exact, (4, 3), nfe=5).x, plain, rtol=0, atol=0)


def test_adaptive_solvers_ask_at_the_end_itself():
    with pytest.raises(PathError, match="t = 0"):
        integrate("dopri5", Score(lambda x, t: 0.1 * x, Linear(), "x0"), torch.ones(2, 3), [0.9, 0.0])


def test_a_corrector_without_a_score_does_nothing():
    silent = Score(lambda x, t: torch.zeros_like(x), VP())
    assert bool(sample(silent, (2, 3), solver="pc_ddpm", nfe=8).x.isfinite().all())


@pytest.mark.parametrize("options", [{"plan": None}, {"traced": False}, {"callbck": print}])
def test_options_of_the_inside_are_not_options(options):
    with pytest.raises(TypeError, match=r"sample\(\)"):
        sample(score(VP()), (2, 3), nfe=2, **options)
