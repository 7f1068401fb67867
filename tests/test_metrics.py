"""Metrics against closed forms, other libraries and brute force; their floors, intervals and refusals."""

from __future__ import annotations

import dataclasses
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor

from benchmarks import metrics, problems
from benchmarks.endpoints import End
from benchmarks.metrics import Block, features, kernel, levels, likelihood, neighbours, sliced, statistics, transport
from benchmarks.metrics.floors import spoil
from benchmarks.metrics.gaussian import kl
from scores import Gaussian, Score
from sde import EDM
from sde.errors import InputError
from solvers import sample

F64 = torch.float64
PRESETS = {"fid": "inception", "fd_dinov2": "dinov2", "cmmd": "clip"}  # of networks that are not here
SAMPLED = [name for name, m in metrics.METRICS.items() if m.needs in ("statistics", "samples") and name not in PRESETS]
BY_DRAWS = [name for name in SAMPLED if not name.startswith("strong")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def covariance(d: int, seed: int, rank: int | None = None) -> Tensor:
    a = normal(d, rank or 2 * d, seed=seed)
    return a @ a.T / (rank or 2 * d)


def block(name: str, problem: problems.Problem, x: Tensor, seed: int = 0, start: Tensor | None = None, asked: int = 0) -> Block:
    """Samples as one block of a metric, of one part."""
    metric = metrics.metric(name)
    summary = metric.part(problem, x, start, range(len(x)))
    return Block(asked or len(x), seed, summary, x)


def value(name: str, problem: problems.Problem, x: Tensor, **more: Any) -> float:
    return metrics.metric(name).value(problem, block(name, problem, x, **more))


# --- Gaussians --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 16, 64])
def test_frechet_is_the_closed_formula(d: int) -> None:
    m, mu, a, b = normal(d, seed=1), normal(d, seed=2), covariance(d, 3), covariance(d, 4)
    root = np.atleast_2d(scipy.linalg.sqrtm((a @ b).numpy()))
    wanted = float((m - mu).square().sum() + a.trace() + b.trace()) - 2.0 * float(np.trace(root).real)
    assert metrics.frechet(m, a, mu, b) == pytest.approx(wanted, rel=1e-10)
    assert metrics.frechet(mu, b, m, a) == pytest.approx(wanted, rel=1e-10)
    assert metrics.frechet(m, a, m, a) == pytest.approx(0.0, abs=1e-12 * d)


def test_frechet_is_torchmetrics_s() -> None:
    """Its FID on features of our own, accumulated in float64, from the same samples."""
    image = pytest.importorskip("torchmetrics.image.fid")

    class Features(torch.nn.Module):
        num_features = 6

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    theirs = image.FrechetInceptionDistance(feature=Features(), normalize=True, input_img_size=(1, 2, 3)).set_dtype(F64)
    real, fake = (torch.rand(400, 1, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    fake = fake**2
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    (m, a), (mu, b) = ((x.flatten(1).mean(0), torch.cov(x.flatten(1).T)) for x in (real, fake))
    assert metrics.frechet(m, a, mu, b) == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_frechet_of_singular_covariances() -> None:
    """Of commuting ones: the sum of squared differences of standard deviations, also where they are 0."""
    q = torch.linalg.qr(normal(5, 5))[0]
    s, t = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0], dtype=F64), torch.tensor([1.0, 0.0, 0.5, 3.0, 0.0], dtype=F64)
    zero = torch.zeros(5, dtype=F64)
    found = metrics.frechet(zero, (q * s**2) @ q.T, zero, (q * t**2) @ q.T)
    assert found == pytest.approx(float((s - t).square().sum()), rel=1e-7)
    thin = covariance(30, 5, rank=4)
    assert metrics.frechet(zero.new_zeros(30), thin, zero.new_zeros(30), thin) == pytest.approx(0.0, abs=1e-7)
    assert metrics.frechet(zero, 0 * torch.eye(5, dtype=F64), zero, torch.eye(5, dtype=F64)) == pytest.approx(5.0, rel=1e-12)


@pytest.mark.parametrize(
    ("mean", "cov", "words"),
    [
        (torch.zeros(3), torch.eye(3), "3 and of 2 dimensions"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (torch.zeros(2), torch.diag(torch.tensor([1.0, -0.1])), "not positive"),
        (torch.tensor([0.0, math.nan]), torch.eye(2), "not finite"),
        (torch.zeros(2), torch.eye(3), r"give \(d,\), \(d, d\)"),
    ],
)
def test_frechet_refuses(mean: Tensor, cov: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        metrics.frechet(mean, cov, torch.zeros(2), torch.eye(2))


def test_kl_is_that_of_torch() -> None:
    m, mu, a, b = normal(6, seed=1), normal(6, seed=2), covariance(6, 3), covariance(6, 4)
    p, q = (torch.distributions.MultivariateNormal(x, c) for x, c in ((m, a), (mu, b)))
    assert kl(m, a, mu, b) == pytest.approx(float(torch.distributions.kl_divergence(p, q)), rel=1e-10)
    with pytest.raises(InputError, match="second covariance is singular"):
        kl(m, a, mu, torch.zeros(6, 6, dtype=F64))


def test_fitted_distances_are_their_formulas() -> None:
    problem = problems.get("gauss64:vp")
    x = problem.truth(0, range(200)) + 0.1
    mean, cov, d = x.mean(0), torch.cov(x.T), problem.dim
    fd = metrics.frechet(mean, cov, problem.mean, problem.cov)
    assert value("fd", problem, x) == pytest.approx(fd, rel=1e-9)
    assert value("w2_gaussian", problem, x) == pytest.approx(math.sqrt(fd / d) / problem.std, rel=1e-9)
    assert value("kl_gaussian", problem, x) == pytest.approx(kl(mean, cov, problem.mean, problem.cov) / d, rel=1e-9)
    assert value("mean_error", problem, x) == pytest.approx(float((mean - problem.mean).norm()) / 8 / problem.std, rel=1e-12)
    assert value("cov_error", problem, x) == pytest.approx(float((cov - problem.cov).norm() / problem.cov.norm()), rel=1e-12)
    with pytest.raises(InputError, match="give more than 64"):
        value("kl_gaussian", problem, x[:64])


@pytest.mark.parametrize(
    ("name", "m", "words"),
    [
        ("kl_gaussian", 18, "n = 72 in 4 blocks without any one block leave 54, and kl_gaussian takes 65: give -n 88 or more"),
        ("precision", 2, "n = 8 in 4 blocks are 2 a block, and precision takes 4: give -n 16 or more"),
        ("coverage:k=7", 7, "give -n 32 or more"),
    ],
)
def test_too_few_samples_are_told_how_many_it_takes(name: str, m: int, words: str) -> None:
    problem, metric = problems.get("gauss64:vp"), metrics.metric(name)

    def measured(m: int) -> metrics.Measured:
        return metrics.measure(metric, problem, [block(name, problem, problem.truth(s, range(m)), s) for s in range(4)])

    with pytest.raises(InputError, match=words):
        measured(m)
    enough = int(words.split()[-3]) // 4
    assert math.isfinite(measured(enough).value)
    with pytest.raises(InputError, match=f"give -n {4 * enough} or more"):
        measured(enough - 1)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_the_exact_law_is_where_samples_go(solver: str) -> None:
    """w2_exact, kl_exact and mean_error_exact without samples; of 4000 samples the same within their own spread."""
    problem = problems.get("gauss64:vp")
    out = sample(problem.score(), x=problem.starts(0, range(4000)), solver=solver, nfe=5, start=1.0, stop=1e-3, seed=1)
    exactly = {k: metrics.metric(k) for k in ("w2_exact", "kl_exact", "mean_error_exact")}
    found = {k: m.exact(problem, solver, nfe=5) for k, m in exactly.items()}  # pyright: ignore[reportAttributeAccessIssue]
    assert found["w2_exact"] == pytest.approx(value("w2_gaussian", problem, out.x), rel=0.03)
    assert found["kl_exact"] == pytest.approx(value("kl_gaussian", problem, out.x), rel=0.05)
    assert found["mean_error_exact"] == pytest.approx(value("mean_error", problem, out.x), abs=0.02)
    assert metrics.within(found["w2_exact"], exactly["w2_exact"].own_floor(problem, [])) is False  # pyright: ignore[reportArgumentType]


def test_the_exact_law_is_of_gaussian_data_and_tables() -> None:
    metric: Any = metrics.metric("w2_exact")
    assert "not Gaussian data" in metric.available(problems.get("ring2"))
    with pytest.raises(InputError, match="not Gaussian data"):
        metric.exact(problems.get("ring2"), "ddim", nfe=4)
    with pytest.raises(InputError, match="table"):
        metric.value(problems.get("gauss64"), Block(4, 0))


# --- parts and blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 64])
def test_statistics_of_parts_merge_to_those_of_the_whole(d: int) -> None:
    x = normal(150, d) * 3.0 + 100.0
    for cuts in ([150], [1, 149], [50, 50, 50], [7] * 21 + [3], [75, 1, 74]):
        total = statistics.unpack(statistics.merge(statistics.pack("m", part) for part in x.split(cuts)), "m")
        assert total.count == 150
        assert torch.allclose(total.mean, x.mean(0), rtol=1e-13)
        assert torch.allclose(total.cov, torch.cov(x.T), rtol=1e-10, atol=1e-11)


def test_merging_is_a_fold_from_the_left() -> None:
    """Whoever merges, in however many sittings, has the same bits."""
    parts = [statistics.pack("m", part) for part in normal(64, 3).split(8)]
    whole = statistics.merge(parts)
    sittings = statistics.merge([statistics.merge(parts[:5]), *parts[5:]])
    assert all(torch.equal(whole[k], sittings[k]) for k in whole)
    with pytest.raises(InputError, match="no summaries"):
        statistics.merge([])
    with pytest.raises(InputError, match="other is not in both"):
        statistics.merge([parts[0], parts[1] | statistics.pack("other", normal(3, 1))])


def test_lists_are_joined_in_order() -> None:
    problem = problems.get("gauss64")
    start = problem.starts(0, range(10))
    x = problem.end(start).x + 0.01 * normal(10, 64)
    metric = metrics.metric("strong_error")
    whole = metric.part(problem, x, start, range(10))
    parts = [metric.part(problem, x[a:b], start[a:b], range(a, b)) for a, b in ((0, 3), (3, 4), (4, 10))]
    assert torch.allclose(statistics.merge(parts)["errors/sample"], whole["errors/sample"], rtol=1e-13)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_count_that_is_not_the_one_asked_for_is_refused(name: str) -> None:
    problem = problems.get("gauss64")
    start = problem.starts(0, range(80))
    x = problem.end(start).x
    metric = metrics.metric(name)
    assert math.isfinite(metric.value(problem, block(name, problem, x, start=start)))
    for asked in (81, 79):
        with pytest.raises(InputError, match=f"{asked} were asked for"):
            metric.value(problem, block(name, problem, x, start=start, asked=asked))
    with pytest.raises(InputError, match=r"was not measured|holds no samples"):
        metric.value(problem, Block(80, 0))


@pytest.mark.parametrize("name", SAMPLED)
def test_parts_are_checked(name: str) -> None:
    problem, metric = problems.get("gauss64"), metrics.metric(name)
    x = problem.truth(0, range(5))
    with pytest.raises(InputError, match="5 samples for 4 indices"):
        metric.part(problem, x, x, range(4))
    with pytest.raises(InputError, match="wants"):
        metric.part(problem, x[:, :3], None, range(5))
    x[3, 2] = math.nan
    with pytest.raises(InputError, match=r"1 of 5 \(first: number 13\)"):
        metric.part(problem, x, x, range(10, 15))


def test_samples_are_checked() -> None:
    problem = problems.get("ring2")
    x = problem.truth(0, range(6))
    with pytest.raises(InputError, match="at least 2"):
        metrics.metric("sliced_w2").value(problem, Block(1, 0, samples=x[:1]))
    x[1, 0] = math.inf
    with pytest.raises(InputError, match="not finite in 1 of 6"):
        metrics.metric("sliced_w2").value(problem, Block(6, 0, samples=x))
    many = problem.truth(0, range(5000))  # more than are looked at at once
    many[4500] = math.nan
    with pytest.raises(InputError, match=r"first: number 4500\)"):
        metrics.metric("sliced_w2").value(problem, Block(5000, 0, samples=many))
    with pytest.raises(InputError, match="at least 2 are needed"):
        _ = statistics.moments(x[:1]).cov
    with pytest.raises(InputError, match="not finite"):
        statistics.moments(x)
    with pytest.raises(InputError, match="no samples"):
        statistics.moments(x[:0])
    with pytest.raises(InputError, match=r"give \(n, d\)"):
        statistics.moments(x[:, 0])
    with pytest.raises(InputError, match="2 and of 3 dimensions"):
        statistics.combine(statistics.moments(x[2:]), statistics.moments(normal(4, 3)))


def test_only_the_first_samples_are_looked_at() -> None:
    problem, metric = problems.get("ring2"), metrics.metric("w2")
    x = problem.truth(0, range(40))
    short = type("Short", (type(metric),), {"limit": 10})("w2", 2)
    assert short.value(problem, Block(40, 0, samples=x)) == metric.value(problem, Block(10, 0, samples=x[:10]))
    assert short.value(problem, Block(40, 0, samples=x[:15])) == metric.value(problem, Block(10, 0, samples=x[:10]))
    assert short.used(Block(40, 0)) == 10
    with pytest.raises(InputError, match="9 samples where 40 were asked for"):
        short.value(problem, Block(40, 0, samples=x[:9]))


def test_the_interval_of_a_mean_over_blocks() -> None:
    problem = problems.get("ring2")
    blocks = [block("nll", problem, problem.truth(seed, range(30)), seed) for seed in range(4)]
    found = metrics.measure(metrics.metric("nll"), problem, blocks)
    each = np.array([metrics.metric("nll").value(problem, b) for b in blocks])
    reach = scipy.stats.t.ppf(0.975, 3) * each.std(ddof=1) / 2.0
    assert found.value == pytest.approx(each.mean(), rel=1e-12)
    assert (found.low, found.high) == (pytest.approx(each.mean() - reach), pytest.approx(each.mean() + reach))
    assert (found.n, found.values) == (120, tuple(each.tolist()))


def test_the_interval_of_a_pooled_value_is_the_jackknife() -> None:
    problem, metric = problems.get("ring2"), metrics.metric("fd")
    x = [problem.truth(seed, range(30)) * 1.2 for seed in range(3)]
    found = metrics.measure(metric, problem, [block("fd", problem, part, seed) for seed, part in enumerate(x)])
    whole = value("fd", problem, torch.cat(x))
    without = np.array([value("fd", problem, torch.cat([*x[:i], *x[i + 1 :]])) for i in range(3)])
    pseudo = 3 * whole - 2 * without
    reach = scipy.stats.t.ppf(0.975, 2) * pseudo.std(ddof=1) / math.sqrt(3)
    assert found.value == pytest.approx(whole, rel=1e-9)
    assert found.high == pytest.approx(whole + reach, rel=1e-8)
    assert found.low == pytest.approx(max(0.0, whole - reach), abs=1e-9)
    assert found.values == pytest.approx(without, rel=1e-8)


def test_intervals_hold_what_they_say() -> None:
    """Of 200 intervals of 95 % about 190 hold the true value: the mean of -log p, known from many draws."""
    problem, metric = problems.get("ring2"), metrics.metric("nll")
    truth = float(likelihood.surprise(problem, problem.truth(10**6, range(100_000))).mean())
    each = torch.stack([likelihood.surprise(problem, problem.truth(seed, range(200))) for seed in range(100)])
    hits = 0
    for run in each.reshape(200, 4, 25):
        blocks = [Block(25, seed, statistics.pack("nll", part[:, None])) for seed, part in enumerate(run)]
        found = metrics.measure(metric, problem, blocks)
        hits += found.low <= truth <= found.high
    assert 180 <= hits <= 198


def test_blocks_are_checked() -> None:
    problem, metric = problems.get("ring2"), metrics.metric("nll")
    blocks = [block("nll", problem, problem.truth(seed, range(5)), seed) for seed in range(3)]
    for wrong, words in (
        (blocks[:2], "at least 3"),
        ([*blocks[:2], replace(blocks[2], seed=0)], "each its seed"),
        ([*blocks[:2], replace(blocks[2], asked=6)], "of one size"),
    ):
        with pytest.raises(InputError, match=words):
            metrics.measure(metric, problem, wrong)


# --- distances between sets ---------------------------------------------------------------------------------------------------


def test_sliced_w2_by_hand() -> None:
    x, y, along = normal(9, 3), normal(9, 3, seed=1), metrics.directions(3, 5)
    assert along.norm(dim=0).numpy() == pytest.approx(1.0)
    squares = [np.mean((np.sort(x.numpy() @ v) - np.sort(y.numpy() @ v)) ** 2) for v in along.T.numpy()]
    assert metrics.sliced_w2(x, y, along) == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-12)
    problem = problems.get("gauss64")
    along = metrics.directions(64, 128)
    assert sliced.MOST < 128 * 9000
    for n in (9000, 20):  # more than come into memory at once, and fewer
        z, truth = problem.truth(5, range(n)) + 0.1, problem.truth(0, range(n), problems.REFERENCE)
        wanted = metrics.sliced_w2(z, truth, along) / problem.std
        assert value("sliced_w2", problem, z) == pytest.approx(wanted, rel=1e-12)
    worst = max(metrics.sliced_w2(z, truth, along[:, i : i + 1]) for i in range(128)) / problem.std
    assert value("max_sliced_w2", problem, z) == pytest.approx(worst, rel=1e-12)
    assert value("sliced_w2:count=16", problem, z) != value("sliced_w2", problem, z)


@pytest.mark.parametrize("p", [1, 2])
def test_transport_is_the_best_assignment(p: int) -> None:
    """Against scipy's assignment, POT itself, and sorting in one dimension; sets of unequal sizes by repeating points."""
    ot = pytest.importorskip("ot")
    x, y = normal(40, 3), normal(40, 3, seed=1) + 0.5
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").numpy() ** p
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    found = metrics.wasserstein(x, y, p)
    assert found == pytest.approx(cost[rows, columns].mean() ** (1 / p), rel=1e-10)
    assert found == pytest.approx(ot.emd2([], [], cost) ** (1 / p), rel=1e-10)
    line, other = x[:, :1].sort(0).values, y[:, :1].sort(0).values
    assert metrics.wasserstein(x[:, :1], y[:, :1], p) == pytest.approx(
        float((line - other).abs().pow(p).mean() ** (1 / p)), rel=1e-10
    )
    assert metrics.wasserstein(x[:20], y, p) == pytest.approx(metrics.wasserstein(x[:20].repeat(2, 1), y, p), rel=1e-10)
    assert metrics.wasserstein(x, x, p) == pytest.approx(0.0, abs=1e-6)


def test_transport_in_units_of_the_data() -> None:
    """Moved by s in every coordinate, far beyond the spread, the distance to true draws is s / std."""
    problem = problems.get("ring2")
    x = problem.truth(0, range(16))
    for name in ("w1", "w2"):
        assert value(name, problem, x + 1000.0) == pytest.approx(1000.0 / problem.std, rel=2e-3)
    with pytest.raises(InputError, match="give 1 or 2"):
        metrics.wasserstein(x, x, 3)
    with pytest.raises(InputError, match="2 and of 1 dimensions"):
        metrics.wasserstein(x, x[:, :1])


def test_without_pot_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'score-solvers[metrics]'" in (metrics.metric("w2").available(problems.get("ring2")) or "")
    monkeypatch.setitem(__import__("sys").modules, "ot", None)
    with pytest.raises(InputError, match="needs POT"):
        metrics.wasserstein(normal(3, 2), normal(3, 2))


def test_a_transport_that_is_not_solved_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from sde.errors import ToolkitError

    pytest.importorskip("ot")
    monkeypatch.setattr(transport, "ITERATIONS", 1)
    with pytest.raises(ToolkitError, match="was not solved"):
        metrics.wasserstein(normal(30, 2), normal(30, 2, seed=1))


def test_distances_keep_their_digits() -> None:
    """Far from the origin and for pairs that nearly coincide, where a matrix product alone would leave none."""
    x = normal(30, 4) + 1e4
    y = torch.cat([x[:10] + 1e-6 * normal(10, 4, seed=1), normal(20, 4, seed=2) + 1e4])
    exact = (x[:, None] - y).square().sum(-1).sqrt()
    assert torch.allclose(kernel.distances(x, y), exact, rtol=1e-6, atol=1e-12)
    assert torch.equal(kernel.distances(x, x).diagonal(), torch.zeros(30, dtype=F64))


def pairs(x: Tensor, y: Tensor, k: Any, unbiased: bool) -> float:
    """MMD^2 by loops."""

    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        values = [k(u, v) for i, u in enumerate(a) for j, v in enumerate(b) if not (same and unbiased and i == j)]
        return sum(values) / len(values)

    return mean(x, x, True) + mean(y, y, True) - 2.0 * mean(x, y, False)


def test_kernel_distances_by_loops() -> None:
    x, y = normal(7, 3), normal(8, 3, seed=1) + 0.3
    energy = pairs(x, y, lambda u, v: -float((u - v).norm()), True)
    assert metrics.energy_distance(x, y) == pytest.approx(energy, rel=1e-10)
    for unbiased in (True, False):
        cubic = pairs(x, y, lambda u, v: float(u @ v / 3 + 1) ** 3, unbiased)
        assert kernel.discrepancy(x, y, kernel.cubic, unbiased) == pytest.approx(cubic, rel=1e-10)
        rbf = pairs(x, y, lambda u, v: math.exp(-float((u - v).square().sum()) / (2 * 0.7**2)), unbiased)
        assert kernel.discrepancy(x, y, kernel.gaussian(0.7), unbiased) == pytest.approx(rbf, rel=1e-10)
    with pytest.raises(InputError, match="at least 2"):
        kernel.discrepancy(x[:1], y, kernel.cubic)
    with pytest.raises(InputError, match="3 and of 2 dimensions"):
        kernel.discrepancy(x, y[:, :2], kernel.cubic)


def test_kernel_metrics_are_their_distances_to_the_reference_draws() -> None:
    problem = problems.get("digits64")
    x, truth = problem.truth(0, range(30)), problem.truth(0, range(30), problems.REFERENCE)
    a, b = problems.digit_features(x), problems.digit_features(truth)
    assert value("kid", problem, x) == pytest.approx(kernel.discrepancy(a, b, kernel.cubic), rel=1e-10)
    unit = 8.0 * problem.std
    assert value("energy", problem, x) == pytest.approx(metrics.energy_distance(x, truth) / unit, rel=1e-10)
    width = kernel.median_width("own", problem)
    z = problems.digit_features(problem.truth(0, range(512), problems.FIXED))
    assert width == pytest.approx(float(torch.pdist(z).median()), rel=1e-12)
    assert value("mmd", problem, x) == pytest.approx(kernel.discrepancy(a, b, kernel.gaussian(width)), rel=1e-10)
    wide = value("mmd:width=3,scale=10,unbiased=false,features=raw", problem, x)
    assert wide == pytest.approx(10 * kernel.discrepancy(x, truth, kernel.gaussian(3.0), False), rel=1e-10)


def test_presets_of_published_metrics() -> None:
    assert {name: metrics.METRICS[name].features for name in PRESETS} == PRESETS  # pyright: ignore[reportAttributeAccessIssue]
    assert all(metrics.METRICS[name].kind == "fd" for name in ("fid", "fd_dinov2"))  # pyright: ignore[reportAttributeAccessIssue]
    cmmd: Any = metrics.METRICS["cmmd"]
    assert (cmmd.kernel, cmmd.features, cmmd.width, cmmd.scale, cmmd.unbiased) == ("gaussian", "clip", 10.0, 1000.0, False)


def test_neighbourhoods_by_loops() -> None:
    x, y, k = normal(25, 2), normal(20, 2, seed=1) * 0.7, 3
    apart = {
        name: np.linalg.norm(a[:, None].numpy() - b[None].numpy(), axis=-1)
        for name, a, b in (("xy", x, y), ("xx", x, x), ("yy", y, y))
    }
    of_x, of_y = (np.sort(apart[name], 1)[:, k] for name in ("xx", "yy"))  # the first is the point itself
    wanted = {
        "precision": np.mean([(apart["xy"][i] <= of_y).any() for i in range(25)]),
        "recall": np.mean([(apart["xy"][:, j] <= of_x).any() for j in range(20)]),
        "density": np.mean([(apart["xy"][i] <= of_y).sum() / k for i in range(25)]),
        "coverage": np.mean([(apart["xy"][:, j] <= of_y[j]).any() for j in range(20)]),
    }
    found = {kind: neighbours.neighbourhood(x, y, kind, k) for kind in wanted}
    assert found == pytest.approx(wanted, rel=1e-12)
    assert neighbours.neighbourhood(x, x + 100.0, "precision", k) == neighbours.neighbourhood(x, x + 100.0, "recall", k) == 0.0
    assert neighbours.neighbourhood(x, x, "coverage", k) == neighbours.neighbourhood(x, x, "recall", k) == 1.0
    with pytest.raises(InputError, match="give more than 25 samples"):
        neighbours.neighbourhood(x, x, "recall", 25)
    with pytest.raises(InputError, match="2 and of 1 dimensions"):
        neighbours.neighbourhood(x, x[:, :1], "recall", 3)


# --- strong error -------------------------------------------------------------------------------------------------------------


def test_strong_error_by_hand() -> None:
    problem = problems.get("gauss64:vp")
    start = problem.starts(0, range(5))
    end = problem.end(start).x
    size = torch.tensor([1.0, 2.0, 3.0, 4.0, 50.0], dtype=F64)
    x = end + size[:, None] * problem.std * torch.ones(64, dtype=F64)
    assert value("strong_error", problem, x, start=start) == pytest.approx(math.sqrt(2530 / 5), rel=1e-10)
    assert value("strong_error_median", problem, x, start=start) == pytest.approx(3.0, rel=1e-10)
    assert value("strong_error_max", problem, x, start=start) == pytest.approx(50.0, rel=1e-10)
    given = metrics.metric("strong_error").part(problem, x, None, range(5), End(end, torch.zeros(5)))
    assert torch.allclose(given["errors/sample"], size, rtol=1e-10)
    with pytest.raises(InputError, match="give start="):
        metrics.metric("strong_error").part(problem, x, None, range(5))


@pytest.fixture(scope="module")
def solved() -> tuple[problems.Problem, Tensor, End, Tensor]:
    """A problem, starts, the end points it computes, and those of ten times the accuracy."""
    problem = replace(problems.get("mixture"), tolerance=1e-9)
    start = problem.starts(0, range(12))
    return problem, start, problem.end(start), replace(problem, tolerance=1e-10).end(start).x


@pytest.mark.parametrize("name", ["strong_error", "strong_error_median", "strong_error_max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_floor_of_a_strong_error(name: str, dtype: torch.dtype, solved: Any) -> None:
    """End points solved more finely, and rounded to the dtype, are within it; 1e-5 of the spread is not."""
    problem, start, end, best = solved
    metric = metrics.metric(name)
    for off, inside in ((0.0, True), (1e-5, False)):
        x, blocks = (best + off * problem.std).to(dtype), []
        for seed in range(3):
            k = slice(4 * seed, 4 * seed + 4)
            summary = metric.part(problem, x[k], start[k], range(4), End(end.x[k], end.error[k]))
            blocks.append(Block(4, seed, summary))
        floor = metrics.floor(metric, problem, blocks)
        assert floor is not None
        assert metrics.within(metrics.measure(metric, problem, blocks), floor) is inside
        assert floor.high < (1e-6 if dtype == torch.float32 else 1e-7)


# --- likelihood ---------------------------------------------------------------------------------------------------------------


def test_nll_is_the_closed_form() -> None:
    problem = problems.get("gauss64:vp")
    x = problem.truth(0, range(50))
    law = scipy.stats.multivariate_normal(problem.mean.numpy(), problem.cov.numpy())
    assert value("nll", problem, x) == pytest.approx(-law.logpdf(x.numpy()).mean() / 64, rel=1e-10)
    mixture = problems.get("ring2")
    z = mixture.truth(0, range(20))
    data: Any = mixture.data
    parts = [
        scipy.stats.multivariate_normal(m.numpy(), np.diag(v.numpy() + 0.002**2)).pdf(z.numpy())
        for m, v in zip(data.means, data.covs, strict=True)
    ]
    density = data.weights.numpy() @ np.array(parts)
    assert value("nll", mixture, z) == pytest.approx(-np.log(density).mean() / 2, rel=1e-10)
    assert "exact density" in (metrics.metric("nll").available(problems.get("digits_network")) or "")


def test_nll_of_a_model_is_the_closed_form() -> None:
    """The flow of a Gaussian is affine, so the density that it makes of the prior is a Gaussian too: to 1e-6 relative."""
    problem = problems.get("gauss64:vp")
    law: Any = problem.exact
    a, b = (problem.path.knot(t) for t in (problem.start, problem.stop))
    values, vectors = law.eigenvalues, law.eigenvectors
    shrink = ((b.alpha**2 * values + b.sigma**2) / (a.alpha**2 * values + a.sigma**2)).sqrt() * problem.path.prior_std(
        problem.start
    )
    first = b.alpha * law.mean - vectors @ (
        (shrink / problem.path.prior_std(problem.start)) * (vectors.T @ (a.alpha * law.mean))
    )
    x = problem.unseen(0, range(8))
    made = torch.distributions.MultivariateNormal(first, (vectors * shrink**2) @ vectors.T)
    found = metrics.metric("nll_model:tolerance=1e-8").value(problem, Block(8, 0))
    assert found == pytest.approx(-float(made.log_prob(x).mean()) / 64, rel=1e-6)


def test_nll_of_models_and_their_floor() -> None:
    """The exact score is within the floor of its own density, and a score of data 20 % wider is not."""
    small = problems.wrap(Gaussian(EDM(), torch.zeros(2, dtype=F64), var=torch.tensor([1.0, 0.3], dtype=F64)), (2,))
    wide = Gaussian(EDM(), torch.zeros(2, dtype=F64), var=1.44 * torch.tensor([1.0, 0.3], dtype=F64))
    metric = metrics.metric("nll_model")
    n = metric.enough(small, 0.2, 4)
    assert n is not None
    # log p - log q is a - b chi^2_2 / 2 with b = 1 - 1/1.44, so its mean is 2 log 1.2 - b and its deviation b
    b = 1.0 - 1.0 / 1.44
    assert n == pytest.approx((1.1 * (2.58 + 2.33) * b / (2.0 * math.log(1.2) - b)) ** 2, rel=0.2)
    blocks = [Block(n // 4, seed) for seed in range(4)]
    for problem, inside in ((small, True), (replace(small, network=lambda device, dtype: wide), False)):
        floor = metrics.floor(metric, problem, blocks)
        assert floor is not None
        assert metrics.within(metrics.measure(metric, problem, blocks), floor) is inside
    assert metrics.recommend(metric, small, 0.2).n == n
    assert "the 256 samples a block" in metrics.recommend(metric, small, 0.05).reason
    assert "takes too long" in (metrics.metric("nll_model:largest=1").available(small) or "")
    assert metrics.floor(metric, problems.get("digits_network"), blocks) is None
    assert "no true data" in (metric.available(problems.wrap(Score(zero, EDM(), "F"), (2,))) or "")


def zero(x: Tensor, t: Tensor) -> Tensor:
    return 0.0 * x


# --- floors -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perfect_runs() -> list[list[Block]]:
    """40 runs of a perfect sampler on ring2, each of 4 blocks of 32, for all metrics."""
    problem, every = problems.get("ring2"), [metrics.metric(name) for name in BY_DRAWS]
    return [[metrics.perfect(every, problem, 4 * run + b, 32) for b in range(4)] for run in range(40)]


@pytest.mark.parametrize("name", BY_DRAWS)
def test_perfect_samplers_are_within_the_floor(name: str, perfect_runs: list[list[Block]]) -> None:
    """At least 38 of 40; and runs spread as the floor says, about its mean."""
    problem, metric = problems.get("ring2"), metrics.metric(name)
    floor = metrics.floor(metric, problem, perfect_runs[0])
    assert floor is not None
    found = [metrics.measure(metric, problem, blocks) for blocks in perfect_runs]
    assert sum(metrics.within(f, floor) for f in found) >= 38
    values = np.array([f.value for f in found])
    assert abs(values.mean() - floor.mean) < 4.0 * floor.sd * math.sqrt(1 / 40 + 1 / 16)
    assert 0.5 < values.std() / floor.sd < 2.0


@pytest.mark.parametrize("name", BY_DRAWS)
def test_a_worse_sampler_is_told_apart_at_the_recommended_number(name: str) -> None:
    """Deviations twice as large, or the mean a standard deviation off: told from perfect in each of 5 runs."""
    problem, metric = problems.get("gauss64"), metrics.metric(name)
    found = metrics.recommend(metric, problem, worse=1.0, replicates=6)
    assert found.n is not None, found.reason
    m = found.n // 4
    told, floor = 0, None
    for run in range(5):
        blocks = [metrics.perfect([metric], problem, 4 * run + b, m, 1.0) for b in range(4)]
        floor = floor or metrics.floor(metric, problem, blocks, 16)
        assert floor is not None
        told += not metrics.within(metrics.measure(metric, problem, blocks), floor)
    assert told == 5


@pytest.mark.parametrize("name", ["nll", "mean_error"])
def test_five_per_cent_is_told_apart_at_the_recommended_number(name: str) -> None:
    problem, metric = problems.get("gauss64"), metrics.metric(name)
    found = metrics.recommend(metric, problem, replicates=8)
    assert found.n is not None
    told, floor = 0, None
    for run in range(5):
        blocks = [metrics.perfect([metric], problem, 4 * run + b, found.n // 4, 0.05) for b in range(4)]
        floor = floor or metrics.floor(metric, problem, blocks, 16)
        assert floor is not None
        told += not metrics.within(metrics.measure(metric, problem, blocks), floor)
    assert told == 5


class Capped(metrics.Metric):
    """Higher is better, and a perfect sampler's mean is the largest value that there is: the floor ends there."""

    lower_is_better, most = False, 1.0

    def available(self, problem: problems.Problem) -> None:
        return None

    def value(self, problem: problems.Problem, block: Block) -> float:
        return 2.0 - float(((block.first(self.limit) - problem.mean) / problem.std).square().mean())


def test_a_recommendation_looks_at_the_bad_side_of_the_floor() -> None:
    """The effect is beyond the floor's 2.58 deviations by another 2.33 and a tenth, however near the good side ends."""
    found = metrics.recommend(Capped("capped"), problems.get("ring2"), replicates=8)
    assert found.n is not None
    assert -found.effect > 1.1 * (2.58 + 2.33) * found.sd
    blind = type("Blind", (Capped,), {"lower_is_better": True})("blind")
    assert metrics.recommend(blind, problems.get("ring2"), most=1 << 10, replicates=4).n is None


def test_what_cannot_be_recommended_says_why() -> None:
    problem = problems.get("ring2")
    found = metrics.recommend(metrics.metric("fd"), problem, worse=0.01, most=64, replicates=4)
    assert (found.n, "1 % worse is not told" in found.reason) == (None, True)
    short = type("Short", (type(metrics.metric("w2")),), {"limit": 16})("w2", 2)
    found = metrics.recommend(short, problem, worse=0.01, replicates=4)
    assert (found.n, "16 samples a block" in found.reason) == (None, True)
    bare = problems.wrap(Score(zero, EDM(), "F"), (2,))
    assert "no true data" in metrics.recommend(metrics.metric("fd"), bare).reason
    assert metrics.floor(metrics.metric("fd"), bare, [Block(4, s) for s in range(3)]) is None
    assert metrics.recommend(metrics.metric("strong_error"), problem).n == 8
    assert metrics.recommend(metrics.metric("w2_exact"), problems.get("gauss64")).n == 0


def test_what_is_worse_is_worse_by_that_much() -> None:
    problem = problems.get("gauss64")
    x = problem.truth(0, range(50))
    wide, thin, moved = (spoil(problem, x, 0.2, what) - problem.mean for what in ("spread", "narrow", "mean"))
    assert torch.allclose(wide, 1.2 * (x - problem.mean))
    assert torch.allclose(thin, 0.8 * (x - problem.mean))
    assert torch.allclose(moved, x - problem.mean + 0.2 * problem.cov.diag().sqrt())


def test_either_side_of_the_floor_is_outside() -> None:
    floor = metrics.Floor(1.0, 0.1, 0.9, 1.1, 8)
    assert [metrics.within(v, floor) for v in (0.8, 0.9, 1.0, 1.1, 1.2)] == [False, True, True, True, False]
    assert metrics.Floor(**floor.to_dict()) == floor  # pyright: ignore[reportArgumentType]


def test_what_a_floor_is_a_function_of() -> None:
    problem, blocks = problems.get("ring2"), [Block(10, s) for s in range(3)]
    key = metrics.floor_key(metrics.metric("sliced_w2"), problem, blocks)
    others = [
        metrics.floor_key(metrics.metric("sliced_w2:count=16"), problem, blocks),
        metrics.floor_key(metrics.metric("sliced_w2"), problems.get("ring2:vp"), blocks),
        metrics.floor_key(metrics.metric("sliced_w2"), problem.between(stop=0.1), blocks),
        metrics.floor_key(metrics.metric("sliced_w2"), problem, [Block(11, s) for s in range(3)]),
        metrics.floor_key(metrics.metric("sliced_w2"), problem, [Block(10, s) for s in range(4)]),
        metrics.floor_key(metrics.metric("sliced_w2"), problem, blocks, replicates=3),
    ]
    assert len({key, *others}) == 7
    assert key == metrics.floor_key(metrics.metric("sliced_w2"), problem, [Block(10, s + 5) for s in range(3)])
    assert all(metrics.floor_key(metrics.metric(n), problem, blocks) is None for n in ("strong_error", "nll_model", "w2_exact"))


@pytest.mark.parametrize("dof", [1, 2, 3, 31, 511])
def test_quantiles_of_t(dof: int) -> None:
    for p in (0.025, 0.5, 0.975, 0.995):
        assert levels.t_quantile(p, dof) == pytest.approx(scipy.stats.t.ppf(p, dof), rel=1e-9, abs=1e-9)
    with pytest.raises(InputError, match="dof >= 1"):
        levels.t_quantile(0.5, 0)


def test_floors_are_prediction_intervals() -> None:
    """mean +- t sd sqrt(1 + B/R), further on the side of the tail: of a row of B blocks, from R single blocks (5 rows: 8)."""
    problem, metric = problems.get("ring2"), metrics.metric("energy")
    blocks = [Block(12, s) for s in range(3)]
    floor = metrics.floor(metric, problem, blocks, replicates=5)
    assert floor is not None
    each = np.array([metric.value(problem, metrics.perfect([metric], problem, (1 << 62) + r, 12)) for r in range(8)])
    sd, skew = each.std(ddof=1) / math.sqrt(3), np.mean((each - each.mean()) ** 3) / each.std(ddof=1) ** 3 / math.sqrt(3)
    unit, tail = sd * math.sqrt(1 + 3 / 8), (scipy.stats.norm.ppf(0.995) ** 2 - 1) / 6
    low, high = (unit * (scipy.stats.t.ppf(0.995, 7) + tail * max(0.0, side * skew)) for side in (-1, 1))
    assert (floor.mean, floor.sd, floor.replicates) == (pytest.approx(each.mean()), pytest.approx(sd), 8)
    assert (floor.low, floor.high) == (pytest.approx(each.mean() - low), pytest.approx(each.mean() + high))


# --- names --------------------------------------------------------------------------------------------------------------------


def test_names_and_fields() -> None:
    assert all(metric.name == name for name, metric in metrics.METRICS.items())
    found: Any = metrics.metric("mmd:width=2.5,unbiased=false,features=raw")
    assert (found.name, found.width, found.unbiased, found.features) == (
        "mmd:width=2.5,unbiased=false,features=raw",
        2.5,
        False,
        "raw",
    )
    assert dataclasses.replace(found, name="mmd", width=0.0, unbiased=True, features="own") == metrics.METRICS["mmd"]
    for text, words in (
        ("slicedw2", "did you mean 'sliced_w2'"),
        ("sliced_w2:counts=3", "did you mean 'count'"),
        ("sliced_w2:count=many", "not a whole number"),
        ("mmd:width=x", "not a number"),
        ("mmd:unbiased=1", "not true or false"),
        ("precision:kind=recall", "no field 'kind'"),
        ("nll:x=1", "it has none"),
    ):
        with pytest.raises(InputError, match=words):
            metrics.metric(text)


# --- features and reference statistics ----------------------------------------------------------------------------------------


def test_features_that_are_not_here_say_what_is_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    features._load.cache_clear()
    problem = problems.get("digits_network")
    for text, words in (
        ("fd:features=inception", "weights-inception|torch-fidelity"),
        (f"fd:features=inception={tmp_path / 'none.pth'}", "no weights at"),
        (f"fd:features=dinov2={tmp_path / 'none'}", "no weights in|transformers"),
        (f"cmmd:features=clip={tmp_path / 'none'}", "no weights in|transformers"),
    ):
        reason = metrics.metric(text).available(problem)
        assert reason is not None
        assert __import__("re").search(words, reason), reason
        with pytest.raises(InputError):
            features.extract(text.partition("features=")[2], problem, problem.truth(0, range(2)))
    assert "of pictures" in (metrics.metric("fd:features=inception").available(problems.get("ring2")) or "")
    with pytest.raises(InputError, match="did you mean 'inception'"):
        metrics.metric("fd:features=inceptoin").available(problem)
    features._load.cache_clear()


def test_networks_of_others_see_bytes_in_three_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(pictures: Tensor) -> Tensor:
        seen.append(pictures)
        return pictures.float().flatten(1)[:, :5]

    monkeypatch.setitem(features.LOADERS, "inception", lambda place: run)
    features._load.cache_clear()
    problem = problems.get("digits_network")
    x = problem.truth(0, range(70))
    found = features.extract("inception", problem, x)
    assert (found.shape, found.dtype) == ((70, 5), F64)
    assert [p.shape for p in seen] == [(64, 3, 8, 8), (6, 3, 8, 8)]
    assert seen[0].dtype == torch.uint8
    assert torch.equal(seen[0][:, 0], seen[0][:, 2])
    assert metrics.metric("fd:features=inception").available(problem) is None
    assert math.isfinite(value("fd:features=inception", problem, x))
    features._load.cache_clear()


def test_clip_and_dinov2_from_a_folder(tmp_path: Path) -> None:
    """Tiny networks of the same kind, saved by transformers: loaded from their folder, and CLIP's features of length 1."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
    clip = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**small, image_size=28, projection_dim=6))
    clip.save_pretrained(tmp_path / "clip")
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**small, image_size=28, mlp_ratio=1))
    dino.save_pretrained(tmp_path / "dino")
    problem = problems.get("digits_network")
    x = problem.truth(0, range(12))
    found = features.extract(f"clip={tmp_path / 'clip'}", problem, x)
    assert found.shape == (12, 6)
    assert found.norm(dim=1).numpy() == pytest.approx(1.0, abs=1e-6)
    assert features.extract(f"dinov2={tmp_path / 'dino'}", problem, x).shape == (12, 8)
    assert value(f"cmmd:features=clip={tmp_path / 'clip'}", problem, x) >= 0.0


def test_own_features_are_checked() -> None:
    problem = replace(problems.get("digits_network"), features=lambda x: x)
    with pytest.raises(InputError, match=r"give \(B, k\)"):
        features.extract("own", problem, problem.truth(0, range(2)))


def test_reference_of_a_finite_set_has_every_point_once() -> None:
    problem = problems.get("digits_network")
    found = features.of_truth("raw", problem)
    assert found.shape == (1797, 64)
    assert float((found - problems.digits().double().flatten(1)).abs().max()) < 0.02  # the noise where sampling stops


def test_reference_statistics_of_a_file(tmp_path: Path) -> None:
    """Files as EDM publishes them, mu and sigma alone, and our own, which say more and are held to it."""
    problem = problems.get("gauss64")
    x = problem.truth(0, range(100)) * 1.1
    np.savez(tmp_path / "edm.npz", mu=problem.mean.numpy(), sigma=problem.cov.numpy())
    text = f"fd:reference={tmp_path / 'edm.npz'}"
    assert value(text, problem, x) == pytest.approx(value("fd", problem, x), rel=1e-12)
    assert metrics.metric(text).available(problems.wrap(Score(zero, EDM(), "F"), (64,))) is None  # needs no data
    saved = statistics.moments(problem.truth(1, range(90)))
    metrics.save_reference(tmp_path / "own.npz", saved, "raw", (64,))
    found = metrics.load_reference(tmp_path / "own.npz")
    assert (found.count, found.features, found.shape) == (90, "raw", (64,))
    assert torch.equal(found.mean, saved.mean)
    assert torch.equal(found.cov, saved.cov)
    own = f"reference={tmp_path / 'own.npz'}"
    assert value(f"fd:features=raw,{own},count=90", problem, x) > 0.0
    for text, words in (
        (f"fd:features=raw,{own},count=91", "is of 90 samples, where count=91"),
        (f"fd:reference={tmp_path / 'edm.npz'},count=91", "does not say of how many"),
        (f"fd:features=own,{own}", "'raw' features, not of 'own'"),
    ):
        with pytest.raises(InputError, match=words):
            value(text, problem, x)
    digits = problems.get("digits64")
    with pytest.raises(InputError, match=r"is of samples \(64,\)"):
        value(f"fd:features=raw,{own}", digits, digits.truth(0, range(70)))
    with pytest.raises(InputError, match="has 64 dimensions"):
        value(f"fd:features=raw,{own}", problems.get("ring2"), problems.get("ring2").truth(0, range(9)))


class Evil:
    def __reduce__(self) -> Any:
        return (Path("evil").touch, ())


def test_reference_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    np.save(tmp_path / "one.npy", np.zeros(2))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(2), sigma=np.zeros((3, 3)))
    np.savez(tmp_path / "object.npz", mu=np.array([Evil()], dtype=object), sigma=np.zeros((1, 1)))
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"fid": {"mu": Evil()}}))
    (tmp_path / "text.npz").write_text("PK nothing")
    for name, words in (
        ("other.npz", "holds a; give"),
        ("one.npy", "one array"),
        ("shape.npz", "covariance"),
        ("object.npz", "cannot be read"),
        ("p.pkl", "cannot be read"),
        ("text.npz", "cannot be read"),
        ("none.npz", "cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            metrics.load_reference(tmp_path / name)
    assert not (tmp_path / "evil").exists()
