"""The built-in problems: their laws, their draws, their exact end points."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import endpoints, laws, problems
from scores import Gaussian, GaussianMixture, Score
from sde import EDM, VE, VP
from sde.errors import InputError

F64 = torch.float64
NAMES = [f"{name}:{noise}" for name, entry in problems.PROBLEMS.items() for noise in entry.noises if noise in ("ve", "vp")]
EXACT = [name for name in NAMES if not name.startswith("digits_network")]
WIDE = {"gmm256", "lowrank", "digits64", "digits_exact"}  # fewer draws

#: What an independent implementation of the definitions gives: standard deviation a dimension, sum of the means, and with
#: y = linspace(-1, 1, d) at sigma/alpha = .7 and w = (1 ... d) / d the numbers w.E[x0 | y] and w.grad log p(y).
PEERS = {
    "gauss64": (0.5, -0.8951337244185453, 2.121139775803081, -17.77998685210256),
    "ring2": (0.49750488551481686, 0.0, 0.10556311294254628, -0.804973238892763),
    "gmm256": (0.4782469659704994, 13.874687551499093, 8.20500017205006, -70.67006767608831),
    "digits64": (0.5428447066091149, -249.17140340085803, -8.686836669306691, -39.837081638040885),
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("noise", ["vp", "ve"])
def test_laws_of_the_peers_comparison(name: str, noise: str) -> None:
    """To 1e-12, on both noises, in coordinates y = x / alpha."""
    problem = problems.get(f"{name}:{noise}")
    std, total, denoised, score = PEERS[name]
    law = problem.data
    assert isinstance(law, laws.Mixture)
    assert float(law.cov.diag().mean().sqrt()) == pytest.approx(std, rel=1e-12)
    assert float(law.means.sum()) == pytest.approx(total, rel=1e-12, abs=1e-12)
    k = problem.path.knot_at(-math.log(0.7))
    assert k.sigma / k.alpha == pytest.approx(0.7, rel=1e-14)
    d = problem.dim
    x, w = k.alpha * torch.linspace(-1.0, 1.0, d, dtype=F64)[None], torch.arange(1, d + 1, dtype=F64) / d
    exact = problem.score()
    assert float(exact.predict(x, k.t).x0[0] @ w) == pytest.approx(denoised, rel=1e-12)
    assert float(exact(x, k.t)[0] @ w) * k.alpha == pytest.approx(score, rel=1e-12)
    assert (problem.start, problem.stop) == ((1.0, 1e-3) if noise == "vp" else (80.0, 0.002))


def test_vp_is_the_linear_one() -> None:
    path = problems.get("ring2:vp").path
    assert float(path.alpha(torch.tensor(1.0, dtype=F64))) == pytest.approx(math.exp(-0.25 * 19.9 - 0.05), rel=1e-13)


# --- draws ------------------------------------------------------------------------------------------------------------------


def z_scores(values: torch.Tensor, expected: torch.Tensor | float) -> torch.Tensor:
    """How many standard errors means over rows are from what is expected."""
    return (values.mean(0) - expected).abs() / (values.std(0) / math.sqrt(len(values)) + 1e-300)


@pytest.mark.parametrize("name", EXACT)
def test_draws_have_the_moments_that_the_problem_states(name: str) -> None:
    problem = problems.get(name)
    x = problem.truth(0, range(600 if name.partition(":")[0] in WIDE else 3000)).flatten(1)
    spread = problem.cov.diag() > 1e-12 * float(problem.cov.diag().max())
    off = x - problem.mean
    # the stated variance, not that of the draws: a pixel that few images have may be missing from all of them
    assert float((off.mean(0) / (problem.cov.diag() / len(x)).sqrt())[spread].abs().max()) < 5.0
    along = torch.randn(problem.dim, 8, generator=torch.Generator().manual_seed(1), dtype=F64)
    wanted = ((problem.cov @ along) * along).sum(0)
    assert float(z_scores((off @ along).square(), wanted).max()) < 5.0
    assert problem.std == pytest.approx(math.sqrt(float(problem.cov.trace()) / problem.dim), rel=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_the_score_is_that_of_the_draws(name: str) -> None:
    """Stein: over draws of p, E grad log p = 0 and E (x - m).grad log p = -d."""
    problem = problems.get(name)
    x = problem.truth(1, range(300 if name.partition(":")[0] in WIDE else 2000))
    score = problem.score()(x, problem.stop).flatten(1)
    assert float(z_scores(score, 0.0).max()) < 5.0
    assert float(z_scores(((x.flatten(1) - problem.mean) * score).sum(1, keepdim=True), -float(problem.dim)).max()) < 5.0


@pytest.mark.parametrize("name", NAMES)
def test_draw_i_is_a_function_of_seed_and_i(name: str) -> None:
    """The same bits alone, in another order, and beside others; other seeds and streams are other draws."""
    problem = problems.get(name)
    draws = {
        "truth": lambda seed, i: problem.truth(seed, i),
        "reference": lambda seed, i: problem.truth(seed, i, problems.REFERENCE),
        "marginal": lambda seed, i: problem.starts(seed, i, "marginal"),
        "prior": lambda seed, i: problem.starts(seed, i),
        "unseen": lambda seed, i: problem.unseen(seed, i),
    }
    whole = {}
    for label, draw in draws.items():
        whole[label] = draw(3, range(40))
        assert whole[label].shape == (40, *problem.shape)
        assert whole[label].dtype == F64
        assert torch.equal(draw(3, [17]), whole[label][17:18])
        assert torch.equal(draw(3, range(39, 2, -1)), whole[label].flip(0)[:37])
        assert not torch.equal(draw(4, range(40)), whole[label])
    kinds = list(whole.values())[:4]
    assert not any(torch.equal(a, b) for i, a in enumerate(kinds) for b in kinds[:i])


def test_streams_are_independent() -> None:
    white = Gaussian(EDM(), torch.zeros(32, dtype=F64), var=torch.ones(32, dtype=F64))
    problem = problems.wrap(white, (32,), stop=1.0)  # as much noise as data: all of a stream's normals show
    sets = [problem.truth(0, range(500), stream) for stream in range(4)] + [problem.starts(0, range(500))]
    flat = torch.stack([(x - x.mean(0)).flatten() for x in sets])
    correlation = torch.corrcoef(flat) - torch.eye(5, dtype=F64)
    assert float(correlation.abs().max()) < 0.05


def test_weights_are_those_of_the_draws() -> None:
    """Each of eight modes gets its share, to five standard errors, and its own centre."""
    law = problems.get("ring2").data
    assert isinstance(law, laws.Mixture)
    x = problems.get("ring2").truth(5, range(4000))
    mode = torch.cdist(x, law.means).argmin(1)
    share = torch.bincount(mode, minlength=8).double() / 4000
    assert bool(((share - law.weights).abs() < 5.0 * (law.weights * (1 - law.weights) / 4000).sqrt()).all())


def test_start_laws() -> None:
    problem = problems.get("gmm256:vp")
    prior, marginal = (problem.starts(0, range(4), law) for law in ("prior", "marginal"))
    k = problem.path.knot(problem.start)
    off = marginal - k.sigma / problem.path.prior_std(problem.start) * prior  # the same normals, and alpha times data
    assert 0.5 < float((off / k.alpha).std()) / problem.std < 2.0
    assert problem.starts(0, range(4), dtype=torch.float32).dtype == torch.float32
    with pytest.raises(InputError, match="'prior' or 'marginal'"):
        problem.starts(0, range(4), "posterior")


def test_unseen_data_are_held_out() -> None:
    problem = problems.get("digits_network")
    training, held_out = problems.split()
    x = problem.unseen(0, range(200)).flatten(1)
    to_held, to_training = (torch.cdist(x, z.double().flatten(1)).min(1).values for z in (held_out, training))
    assert float(to_held.max()) < 0.002 * 8 * 2  # the noise where sampling stops
    assert float((to_training > to_held).double().mean()) > 0.99
    assert torch.equal(problems.get("ring2").unseen(1, range(3)), problems.get("ring2").truth(1, range(3), problems.REFERENCE))


# --- what the others are ----------------------------------------------------------------------------------------------------


def test_low_rank_heavy_tailed_and_multiscale_are_what_they_are_called() -> None:
    values = torch.linalg.eigvalsh(laws.low_rank().cov)
    assert torch.allclose(values[-8:].flip(0), 1.0 / torch.arange(1, 9, dtype=F64), atol=1e-12)
    assert float(values[:-8].abs().max()) < 1e-12
    heavy = laws.heavy_tailed()
    variance = heavy.covs[:, 0]
    assert float(heavy.cov[0, 0]) == pytest.approx(0.25, rel=1e-12)
    kurtosis = 3.0 * float(heavy.weights @ variance**2) / float(heavy.weights @ variance) ** 2
    assert kurtosis == pytest.approx(53.15, abs=0.01)
    gaps = torch.cdist(laws.multiscale().means, laws.multiscale().means).sort(1).values
    assert gaps[0, 1] == pytest.approx(0.04 * math.sqrt(2), rel=1e-9)  # inside a group of four
    assert gaps[0, 4] > 2.0 * gaps[0, 3]  # to the next group
    assert gaps[0, 16] > 2.0 * gaps[0, 15]  # to the next group of groups
    radius = laws.rings().means.norm(dim=1)
    assert set(radius.mul(1e6).round().tolist()) == {4e5, 1e6}


def test_digits_exact_ends_on_digits() -> None:
    problem = problems.get("digits_exact")
    x = problem.score().predict(problem.truth(0, range(4)), problem.stop).x0.flatten(1)
    assert float(torch.cdist(x, problems.digits().double().flatten(1)).min(1).values.max()) < 1e-9


def test_digit_features() -> None:
    x = problems.get("digits_network").truth(0, range(6))
    features = problems.digit_features(x)
    assert features.shape == (6, 288)
    assert torch.equal(features, problems.digit_features(x.flatten(1)))
    assert torch.allclose(features[2:3], problems.digit_features(x[2:3]), atol=1e-12)
    assert float(features.std(0).max()) > 0.1


# --- end points ---------------------------------------------------------------------------------------------------------


def test_closed_form_and_dopri8_agree_on_a_gaussian() -> None:
    problem = problems.get("gauss64:vp")
    x = problem.starts(0, range(4), "marginal")
    exact, solved = problem.end(x), endpoints.tight(problem.score(), x, problem.start, problem.stop, 1e-9)
    assert float((exact.x - solved.x).abs().max()) < 1e-7
    assert float(exact.error.max()) < 1e-12


def test_the_stated_error_bounds_the_error() -> None:
    """Against a solution a thousand times as accurate: for dopri8 and for Runge-Kutta, whose order shows in it."""
    problem = problems.get("mixture")
    x, score = problem.starts(0, range(4)), problem.score()
    best = endpoints.tight(score, x, problem.start, problem.stop, 1e-10).x
    loose = endpoints.tight(score, x, problem.start, problem.stop, 1e-7)
    assert float((endpoints.rms(loose.x - best) / loose.error.clamp_min(1e-9)).max()) < 3.0
    coarse, fine = (endpoints.fine(score, x, problem.start, problem.stop, steps) for steps in (48, 96))
    for end in (coarse, fine):
        assert bool((endpoints.rms(end.x - best) <= end.error + 1e-12).all())
    errors = [float(endpoints.rms(end.x - best).median()) for end in (coarse, fine)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4.0, abs=0.5)


def test_networks_are_solved_by_runge_kutta_in_their_own_dtype() -> None:
    problem = replace(problems.get("digits_network"), fineness=8)
    end = problem.end(problem.starts(0, range(3), dtype=torch.float32))
    assert end.x.dtype == torch.float32
    assert end.x.shape == (3, 1, 8, 8)
    assert end.error.shape == (3,)
    with pytest.raises(InputError, match="at least 2"):
        endpoints.fine(problem.score(), problem.starts(0, range(3)), 80.0, 0.002, 1)


def test_end_points_to_the_data_are_finite() -> None:
    problem = problems.get("ring2:vp").between(stop=0.0)
    end = replace(problem, tolerance=1e-6).end(problem.starts(0, range(8)))
    assert bool(end.x.isfinite().all())
    law = problem.data
    assert isinstance(law, laws.Mixture)
    assert float(torch.cdist(end.x, law.means).min(1).values.max()) < 0.4


@pytest.mark.parametrize("path", [VP(), VE()], ids=str)
def test_end_points_of_samplers_that_go_on_to_zero(path: VP | VE) -> None:
    """On a Gaussian in closed form: an exact score flows to sigma = 0 where the path does; a network predicts at the end."""
    stop, mean, var = 0.3, 0.2, 0.25
    exact = problems.wrap(
        Gaussian(path, torch.full((3,), mean, dtype=F64), var=torch.full((3,), var, dtype=F64)), (3,), stop=stop
    )
    x, law = exact.starts(0, range(5)), exact.exact
    a, s = (float(f(torch.tensor(stop, dtype=F64))) for f in (path.alpha, path.sigma))
    flowed = law.flow(x, path.T, stop)
    predicted = a * (mean + a * var / (a * a * var + s * s) * (flowed - a * mean))
    wanted = a * law.flow(x, path.T, 0.0) if isinstance(path, VP) else predicted
    torch.testing.assert_close(exact.end(x, to_zero=True).x, wanted, rtol=1e-9, atol=1e-9)
    network = problems.wrap(Score(lambda x, t: law.predict(x, t[0]).eps, path, "eps"), (3,), stop=stop)
    end = network.end(x, to_zero=True)
    assert float((endpoints.rms(end.x - predicted) - end.error).max()) < 1e-12
    assert float(end.error.max()) < 1e-3 < float((predicted - flowed).abs().max())


# --- names and wrapping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rng2", "did you mean 'ring2'"),
        ("ring2:vq", "did you mean 'vp'"),
        ("gauss", "gauss64"),
        ("digits_network:vp", "trained on ve"),
        ("gaussian:/nowhere/file.npy", "--model gaussian:/nowhere/file.npy: cannot be read"),
        (":ve", "unknown"),
    ],
)
def test_names_that_do_not_exist(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        problems.get(name)


def test_a_name_without_noise_is_ve() -> None:
    assert problems.get("ring2").name == "ring2:ve"
    assert problems.get("ring2").path == EDM()
    assert {problems.get(f"ring2:{noise}").name for noise in problems.NOISES} == {f"ring2:{n}" for n in problems.NOISES}


@pytest.mark.parametrize("square", [False, True])
def test_a_gaussian_from_a_file(tmp_path: Path, square: bool) -> None:
    values = np.array([4.0, 1.0, 0.25])
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    cov = q * values @ q.T if square else np.diag(values)
    np.save(tmp_path / "c.npy", cov if square else values)
    problem = problems.get(f"gaussian:{tmp_path / 'c.npy'}:vp")
    k = problem.path.knot(problem.stop)
    assert problem.cov.numpy() == pytest.approx(k.alpha**2 * cov + k.sigma**2 * np.eye(3), abs=1e-12)
    assert isinstance(problem.exact, Gaussian)
    x = problem.truth(0, range(3000))
    assert torch.cov(x.T).numpy() == pytest.approx(problem.cov.numpy(), abs=0.35)


def test_between() -> None:
    problem = problems.get("ring2:vp")
    assert problem.between() is problem
    cut = problem.between(stop=0.5)
    assert (cut.start, cut.stop) == (1.0, 0.5)
    assert cut.std > problem.std
    for start, stop in ((0.1, 0.5), (2.0, 0.0), (1.0, -0.1), (1.0, 1.0), (math.nan, 0.0)):
        with pytest.raises(InputError, match="run"):
            problem.between(start, stop)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.0 * x


def test_wrap_a_network() -> None:
    data = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    problem = problems.wrap(Score(network, VP(), "eps"), (1, 2, 2), data=data, held_out=data[:5])
    assert (problem.start, problem.stop) == (VP().T, VP().t_min)
    assert problem.exact is None
    assert torch.allclose(problem.mean, problem.path.knot(problem.stop).alpha * data.double().mean(0).flatten())
    assert problem.truth(0, range(3)).shape == (3, 1, 2, 2)
    bare = problems.wrap(Score(network, VP(), "eps"), (2,))
    assert (bare.data, bare.std) == (None, 1.0)
    with pytest.raises(InputError, match="true draws and moments are unknown"):
        bare.truth(0, range(2))
    with pytest.raises(InputError, match="true draws and moments are unknown"):
        _ = bare.mean


def test_wrap_an_exact_score() -> None:
    mixture = GaussianMixture(VP(), [0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], [0.1, 0.2])
    problem = problems.wrap(mixture, (2,), start=0.9, stop=0.01)
    assert problem.exact is not None
    assert (problem.start, problem.stop) == (0.9, 0.01)
    x = torch.randn(5, 2, dtype=F64)
    assert torch.allclose(problem.score()(x, 0.3), mixture(x, 0.3), rtol=1e-12)
    assert problem.cov.diag().tolist() == pytest.approx(
        [problem.path.knot(0.01).alpha ** 2 * v + problem.path.knot(0.01).sigma ** 2 for v in (1.15, 0.15)], rel=1e-12
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": torch.zeros(5, 3)}, r"give \(N, 2\)"),
        ({"data": torch.zeros(1, 2)}, "N >= 2"),
        ({"held_out": torch.tensor([[0.0, math.nan], [0.0, 0.0]])}, "not finite"),
        ({"start": 0.1, "stop": 0.5}, "run"),
    ],
)
def test_wrap_refuses(change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        problems.wrap(Score(network, VP(), "eps"), (2,), **change)


def test_wrap_wants_a_score() -> None:
    with pytest.raises(InputError, match="wrap the network first"):
        problems.wrap(network, (2,))  # pyright: ignore[reportArgumentType]


# --- pictures -----------------------------------------------------------------------------------------------------------


def test_previews() -> None:
    sheet = problems.get("digits_network").preview(problems.digits()[:5])
    assert (sheet.shape, sheet.dtype) == ((17, 26), np.uint8)  # two rows of three, with a line between
    assert sheet[:8, :8].tolist() == problems.to_bytes(problems.digits()[0, 0]).tolist()
    assert set(sheet[8]) == {255}
    assert problems.get("digits64").preview(problems.digits()[:4].flatten(1)).shape == (17, 17)
    plane = problems.get("ring2").preview(problems.get("ring2").truth(0, range(500)))
    assert plane.shape == (96, 96)
    assert plane.min() == 0
    rows = problems.get("gauss64").preview(problems.get("gauss64").truth(0, range(100)))
    assert rows.shape == (64, 64)
    assert 100 < rows.mean() < 155
    colour = problems.wrap(Score(network, VP(), "eps"), (3, 4, 4)).preview(torch.zeros(2, 3, 4, 4))
    assert colour.shape == (4, 9, 3)


def test_points_of_the_plane_lie_where_they_are() -> None:
    """Up is up: a point high on the right is in the upper right corner."""
    problem = problems.get("ring2")
    x = (problem.mean + torch.tensor([3.01, 2.01], dtype=F64) * problem.cov.diag().sqrt())[None]
    assert np.argwhere(problem.preview(x) == 0).tolist() == [[23, 84]]  # of 96 cells in 8 deviations, 12 a deviation


def test_bytes() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 0.3])
    assert problems.to_bytes(x).tolist() == [0, 0, 128, 255, 255, 166]
