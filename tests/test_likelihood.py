"""The likelihood of the flow against closed forms, densities that must integrate to one, and the laws of its estimators."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from scores import Gaussian, GaussianMixture, Score, as_network
from scores.guidance import classifier_free
from sde import EDM, VE, VP, Cosine, Linear, SubVP, Tabulated, Trigonometric, bits_per_dim, dequantise, log_likelihood
from sde.errors import InputError, NetworkError, PathError, StepLimitError, TrainModeWarning
from sde.noise import Brownian, White
from sde.prediction import OUTPUTS
from solvers import encode, sample
from solvers.backends import TorchDiffEq

DOUBLE = torch.float64
PATHS = {
    "VP": VP(),
    "SubVP": SubVP(),
    "Cosine": Cosine(),
    "VE": VE(),
    "EDM": EDM(),
    "Linear": Linear(),
    "Trigonometric": Trigonometric(),
    "table": Tabulated.linear(50, 0.002, 0.4),
    "zero SNR": Tabulated.linear(50, 0.002, 0.4, zero_terminal_snr=True),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def stiff(path, d=8, condition=3e3):
    q = rotation(d)
    values = torch.logspace(0.3, 0.3 - math.log10(condition), d, dtype=DOUBLE)
    return Gaussian(path, normal(d, seed=1), q @ values.diag() @ q.T)


def mixture(path, d=3):
    return GaussianMixture(path, [0.5, 0.3, 0.2], normal(3, d, seed=2), torch.tensor([0.3, 0.05, 0.004], dtype=DOUBLE))


def small_network(d, seed=0, dtype=DOUBLE):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(d + 1, 16), nn.Tanh(), nn.Linear(16, d)).to(dtype)
    return lambda x, t: net(torch.cat([x.flatten(1), t[:, None].to(x.dtype)], 1)).reshape(x.shape)


# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("name", "t_min"), [*((n, None) for n in PATHS), *((n, 0.0) for n in ("VP", "Linear"))])
def test_gaussians_of_condition_3000(name, t_min):
    """P7: within 1e-6 nats at tolerance 1e-8, on every path, from its t_min and from the exact end."""
    path = PATHS[name]
    law = stiff(path)
    x = law.sample(3, seed=1, dtype=DOUBLE)
    out = log_likelihood(law, x, rtol=1e-8, atol=1e-8, t_min=t_min, prior=lambda z: law.log_prob(z, path.T))
    t_min = path.t_min if t_min is None else t_min
    assert (out.t_min, out.t_max) == (t_min, path.T)
    assert float((out.log_prob - law.log_prob(x, t_min)).abs().max()) < 1e-6
    torch.testing.assert_close(out.z, law.flow(x, t_min, path.T), rtol=1e-6, atol=1e-6)
    assert out.standard_error is None
    bits = -(law.log_prob(x, t_min) / math.log(2) + 8 * math.log2(2 / 256)) / 8
    assert float((out.bits_per_dim(scale=2.0, bins=256) - bits).abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["VP", "Linear"])
def test_mixtures(name):
    path = PATHS[name]
    law = mixture(path, d=2)
    x = law.sample(8, seed=3, dtype=DOUBLE)
    out = log_likelihood(law, x, rtol=1e-8, atol=1e-8, t_min=0.0, prior=lambda z: law.log_prob(z, path.T))
    assert float((out.log_prob - law.log_prob(x)).abs().max()) < 1e-6


def test_the_prior_is_the_law_that_sampling_starts_from():
    """log p of the law that the flow makes of N(0, prior_std^2), which for Gaussian data is Gaussian itself."""
    for path, t_max in ((VP(), None), (EDM(T=3.0), None), (EDM(), 2.0), (Linear(), 0.7)):
        var = torch.tensor([0.5, 2.0], dtype=DOUBLE)
        law = Gaussian(path, torch.zeros(2), var=var)
        x = law.sample(4, seed=0, dtype=DOUBLE)
        end = path.T if t_max is None else t_max
        alpha, sigma = float(path.alpha(end)), float(path.sigma(end))
        std = 1.0 if isinstance(path, VP) else sigma
        made = var * std**2 / (alpha**2 * var + sigma**2)  # x = z sqrt(var / S_T)
        expected = -0.5 * (x**2 / made + (2 * math.pi * made).log()).sum(1)
        out = log_likelihood(law, x, t_min=0.0, t_max=t_max)
        torch.testing.assert_close(out.log_prob, expected, rtol=0, atol=5e-4)
        assert out.t_max == end


@pytest.mark.parametrize(
    "trace", [{}, {"probes": 64}, {"probes": 64, "trace": "hutch++"}], ids=["exact", "hutchinson", "hutch++"]
)
@pytest.mark.parametrize("name", ["VP", "VE", "EDM", "Linear", "Cosine"])
def test_the_cut_is_what_t_min_costs(name, trace):
    """cut = log p_0 - log p_{t_min} to leading order: what is left falls by at least 3 where cut itself falls by 2."""
    path = PATHS[name]
    law = Gaussian(path, normal(4, seed=1), factor=normal(4, 4, seed=5) * 0.3, diag=0.05)
    x = law.sample(5, seed=2, dtype=DOUBLE)
    left, size = [], []
    for sigma in (0.04, 0.02):
        t = float(path.time(math.log(float(path.alpha(path.t_min)) / sigma)))
        out = log_likelihood(law, x, t_min=t, method="rk4", steps=1, **trace)
        true = law.log_prob(x, 0.0) - law.log_prob(x, t)
        if name == "VE":  # its sigma is never 0
            true = law.on(EDM()).log_prob(x, 0.0) - law.log_prob(x, t)
        size.append(float(true.norm()))
        left.append(float((out.cut - true).norm()))
    if not trace:
        assert left[0] < 0.2 * size[0]
        assert left[1] < left[0] / 3 < size[1]
    else:
        assert left[1] < 0.35 * size[1]
    zero = log_likelihood(law.on(EDM()), x, t_min=0.0, method="rk4", steps=1)
    assert torch.equal(zero.cut, torch.zeros(5, dtype=DOUBLE))


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("name", ["VP", "EDM", "Linear"])
def test_the_density_of_any_network_integrates_to_one(name):
    """In one dimension the flow is a monotone map z(x): p(x) = N(z) z'(x), whatever the network; and int p dx = 1."""
    path = {"VP": VP(), "EDM": EDM(T=4.0), "Linear": Linear()}[name]
    score = Score(small_network(1, seed=3), path, "v")
    x = torch.linspace(-7.0, 7.0, 701, dtype=DOUBLE)[:, None]
    out = log_likelihood(score, x, rtol=1e-7, atol=1e-7)
    h = x[1, 0] - x[0, 0]
    z, std = out.z[:, 0], path.prior_std()
    slope = (z[:-4] - 8 * z[1:-3] + 8 * z[3:-1] - z[4:]) / (12 * h)
    assert float(slope.min()) > 0
    p = slope * torch.exp(-0.5 * (z[2:-2] / std) ** 2) / (std * math.sqrt(2 * math.pi))
    torch.testing.assert_close(out.log_prob.exp()[2:-2], p, rtol=1e-5, atol=1e-9)
    assert abs(float(out.log_prob.exp().sum() * h) - 1.0) < 1e-6


@pytest.mark.parametrize("predicts", OUTPUTS)
def test_what_the_network_predicts_makes_no_difference(predicts):
    """All rows are one flow with one divergence, Gaussian probes included; conditions, labels and scalings go through."""
    for path in (VP(), EDM(T=5.0)):
        law = mixture(path, d=2)
        x = law.sample(3, seed=3, dtype=DOUBLE)
        network = as_network(law, path, predicts, time=lambda label: label / 7, scale=lambda t: 1 / (1 + t))
        score = Score(network, path, predicts, label=lambda t: 7 * t, scale=lambda t: 1 / (1 + t))
        options = {"method": "midpoint", "steps": 2, "t_min": 0.05, "t_max": 0.9 * path.T}
        for extra in ({}, {"probes": 3, "probe_law": "gaussian"}, {"probes": 7, "trace": "hutch++"}):
            expected = log_likelihood(law, x, **options, **extra)
            out = log_likelihood(score, x, **options, **extra)
            torch.testing.assert_close(out.log_prob, expected.log_prob, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(out.cut, expected.cut, rtol=1e-9, atol=1e-9)


def test_guided_scores_have_a_likelihood():
    """Two Gaussians of equal covariance: guidance of scale w is the Gaussian with the mean m0 + w (m1 - m0)."""
    path, cov = VP(), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=DOUBLE)
    means = torch.tensor([[0.3, -0.2], [-0.5, 0.4]], dtype=DOUBLE)
    score = classifier_free(Gaussian(path, means[1], cov), 2.0, unconditional=Gaussian(path, means[0], cov))
    law = Gaussian(path, 2.0 * means[1] - means[0], cov)
    x = law.sample(3, seed=1, dtype=DOUBLE)
    for options in ({}, {"probes": 2}):
        out, expected = (log_likelihood(s, x, method="rk4", steps=8, **options) for s in (score, law))
        torch.testing.assert_close(out.log_prob, expected.log_prob, rtol=1e-9, atol=1e-9)
        assert (out.nfe, out.net_evals) == (2 * expected.nfe, 2 * expected.net_evals)


def test_any_event_shape_is_its_flat_self():
    path = Linear()
    net = small_network(12, seed=5)
    x = normal(3, 3, 2, 2, seed=1)
    options = {"method": "heun3", "steps": 5, "seed": 4}
    for extra in ({}, {"probes": 4}, {"probes": 6, "trace": "hutch++", "probe_law": "gaussian"}):
        out = log_likelihood(Score(net, path, "velocity"), x, **options, **extra)
        flat = log_likelihood(Score(net, path, "velocity"), x.flatten(1), **options, **extra)
        assert out.z.shape == x.shape
        torch.testing.assert_close(out.log_prob, flat.log_prob, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out.z.flatten(1), flat.z, rtol=1e-12, atol=1e-12)
    lone = log_likelihood(Score(lambda x, t: (x * t).sin(), path, "velocity"), x[:, 0, 0, 0], **options)
    column = log_likelihood(Score(lambda x, t: (x * t[:, None]).sin(), path, "velocity"), x[:, 0, 0, :1], **options)
    torch.testing.assert_close(lone.log_prob, column.log_prob)


class Square(torch.autograd.Function):
    """A layer without a batching rule, that counts its backward passes."""

    backward_shapes: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 0.1 * x * x.roll(1, 1)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        assert math.isfinite(float(g.sum()))  # a number of a batched tensor: torch refuses
        Square.backward_shapes.append(tuple(g.shape))
        return 0.1 * (g * x.roll(1, 1) + (g * x).roll(-1, 1))


def test_chunks_and_layers_without_a_batching_rule_change_nothing():
    path = VP()
    x = normal(2, 5, seed=1)
    expected = log_likelihood(Score(lambda x, t: 0.1 * x * x.roll(1, 1), path, "v"), x, method="rk4", steps=3)
    for chunk in (1, 2, 5, 99):
        plain = Score(lambda x, t: 0.1 * x * x.roll(1, 1), path, "v")
        torch.testing.assert_close(
            log_likelihood(plain, x, method="rk4", steps=3, chunk=chunk).log_prob, expected.log_prob, rtol=1e-12, atol=1e-12
        )
    Square.backward_shapes.clear()
    out = log_likelihood(Score(lambda x, t: Square.apply(x), path, "v"), x, method="rk4", steps=3)
    torch.testing.assert_close(out.log_prob, expected.log_prob, rtol=1e-12, atol=1e-12)
    assert out.products == 5 * out.nfe
    assert Square.backward_shapes == [(2, 5)] * out.products  # one row of every sample's Jacobian at a time


def test_no_more_rows_of_the_jacobian_than_asked(monkeypatch):
    rows, grad = [], torch.autograd.grad

    def watched(y, x, w, is_grads_batched=False, **options):
        rows.append(len(w) if is_grads_batched else 1)
        return grad(y, x, w, is_grads_batched=is_grads_batched, **options)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    score, x = Score(small_network(7), Linear(), "velocity"), normal(3, 7)
    for options in ({}, {"probes": 7}, {"probes": 7, "trace": "hutch++"}):
        for chunk in (1, 2, 3):
            rows.clear()
            log_likelihood(score, x, method="euler", steps=1, chunk=chunk, **options)
            assert max(rows) == chunk, options
            assert sum(rows) == 7
    rows.clear()
    big = normal(2, 200)
    log_likelihood(
        Score(lambda x, t: x.sin(), Linear(), "velocity"), big.expand(5, 2, 200).reshape(10, 200), method="euler", steps=1
    )
    assert max(rows) == 65536 // 2000
    assert sum(rows) == 200


def test_evaluations_are_counted_at_the_network():
    calls = []

    def network(x, t):
        calls.append(len(x))
        return 0.3 * x

    score, x = Score(network, Linear(), "velocity"), normal(4, 6)
    for options, products in (
        ({}, 6),
        ({"probes": 2}, 2),
        ({"probes": 7, "trace": "hutch++"}, 7),
        ({"method": "midpoint", "steps": 4}, 6),
        ({"per_sample": True}, 6),
    ):
        calls.clear()
        out = log_likelihood(score, x, rtol=1e-2, atol=1e-2, **options)
        assert out.nfe == out.net_evals == len(calls) > 0
        assert out.products == products * out.nfe
        if options.get("steps"):
            assert out.nfe == 8
    assert set(calls) == {1}  # per_sample


def test_fixed_steps_have_their_order():
    law = Gaussian(Linear(), normal(2, seed=1), std=[0.3, 1.5])
    x = law.sample(2, seed=0, dtype=DOUBLE)
    for method, order, steps in (("euler", 1, 32), ("midpoint", 2, 24), ("heun3", 3, 16), ("rk4", 4, 16)):
        errors = []
        for n in (steps, 2 * steps):
            out = log_likelihood(law, x, method=method, steps=n, t_min=0.0, prior=lambda z: law.log_prob(z, 1.0))
            errors.append(float((out.log_prob - law.log_prob(x)).norm()))
        assert order - 0.4 < math.log2(errors[0] / errors[1]) < order + 1.2, (method, errors)


def test_forty_steps_of_rk4():
    """What the module's docstring says of its clocks."""
    law = stiff(VP())
    x = law.sample(3, seed=1, dtype=DOUBLE)
    out = log_likelihood(law, x, method="rk4", steps=40, prior=lambda z: law.log_prob(z, 1.0))
    assert float((out.log_prob - law.log_prob(x, 1e-3)).abs().max()) < 2e-4
    assert out.nfe == 160


def test_adaptive_methods_keep_their_tolerance():
    law = stiff(VP(), d=2, condition=100.0)
    x = law.sample(2, seed=1, dtype=DOUBLE)
    for method, tight in (("dopri5", 1e-6), ("dopri8", 1e-5), ("bosh3", 1e-4), ("adaptive_heun", 1e-2)):
        nfe = []
        for tol in (30 * tight, tight):
            out = log_likelihood(law, x, method=method, rtol=tol, atol=tol, prior=lambda z: law.log_prob(z, 1.0))
            assert float((out.log_prob - law.log_prob(x, 1e-3)).abs().max()) < 30 * tol, method
            nfe.append(out.nfe)
        assert nfe[0] < nfe[1]


def test_the_tolerance_holds_in_the_worst_sample():
    """Batch mates on which the flow is easy do not buy a sample a larger error."""
    path = VP()
    score = Score(lambda x, t: torch.where(x[:, :1] > 0.0, 0 * x, (5 * x).sin() / 3), path, "v")
    hard = torch.full((1, 2), -0.7, dtype=DOUBLE)
    mixed = torch.cat([hard, torch.ones(60, 2, dtype=DOUBLE)])
    alone, beside = (log_likelihood(score, x, rtol=1e-4, atol=1e-4) for x in (hard, mixed))
    torch.testing.assert_close(beside.log_prob[:1], alone.log_prob, rtol=0, atol=1e-9)
    assert beside.nfe == alone.nfe


# ---------------------------------------------------------------------------------------------------------- estimators


def integrated_jacobian(law, t_min):
    """int J dth of a Gaussian law's flow: C^1/2 log(S_T / S_0) / 2 in its basis, the same for every sample."""
    path = law.path
    (a, s), (b, r) = ((float(path.alpha(t)), float(path.sigma(t))) for t in (t_min, path.T))
    lengths = math.hypot(a, s), math.hypot(b, r)
    values = law.eigenvalues
    growth = 0.5 * ((b**2 * values + r**2) / lengths[1] ** 2).log() - 0.5 * ((a**2 * values + s**2) / lengths[0] ** 2).log()
    return law.eigenvectors @ growth.diag() @ law.eigenvectors.T


@pytest.mark.parametrize("probe_law", ["rademacher", "gaussian"])
def test_hutchinson_has_its_mean_its_variance_and_its_error_bar(probe_law):
    """Unbiased (|z| < 4); variance 2 (|M|^2 - what Rademacher probes do without) / m of the integral M, falling as 1 / m; error
    bars that cover as often as Student's t says.
    """
    path, n = VP(), 1500
    law = stiff(path, d=6, condition=50.0)
    x = law.sample(1, seed=1, dtype=DOUBLE).expand(n, 6).contiguous()
    exact = log_likelihood(law, x[:1], method="rk4", steps=8).log_prob
    m = integrated_jacobian(law, path.t_min)
    expected = 2.0 * float(m.square().sum() - (m.diagonal().square().sum() if probe_law == "rademacher" else 0.0))
    for probes in (2, 8, 32):
        out = log_likelihood(law, x, probes=probes, probe_law=probe_law, method="rk4", steps=8, seed=probes)
        error = out.log_prob - exact
        assert abs(float(error.mean() / error.std())) * math.sqrt(n) < 4.0
        for square in (error.square(), out.standard_error.square()):
            z = float((square.mean() * probes - expected) / (square.std() * probes)) * math.sqrt(n)
            assert abs(z) < 4.0, (probes, z)
    covered = float((error.abs() < 2.0395 * out.standard_error).double().mean())  # Student's t, 31 degrees of freedom
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / n), covered


def test_hutch_plus_plus_is_unbiased_with_an_error_bar():
    path, n = Linear(), 1500
    law = stiff(path, d=12, condition=50.0)
    x = law.sample(1, seed=1, dtype=DOUBLE).expand(n, 12).contiguous()
    options = {"method": "rk4", "steps": 4, "t_min": 0.01, "t_max": 0.95}
    exact = log_likelihood(law, x[:1], **options).log_prob
    for probe_law in ("rademacher", "gaussian"):
        out = log_likelihood(law, x, probes=18, trace="hutch++", probe_law=probe_law, seed=3, **options)
        error = out.log_prob - exact
        assert abs(float(error.mean() / error.std())) * math.sqrt(n) < 4.0
        excess = error.square() - out.standard_error.square()
        assert abs(float(excess.mean() / excess.std())) * math.sqrt(n) < 4.0
        covered = float((error.abs() < 2.5706 * out.standard_error).double().mean())  # 5 degrees of freedom
        assert 0.95 - 0.05 < covered < 0.95 + 4 * math.sqrt(0.95 * 0.05 / n), covered


def test_hutch_plus_plus_is_better_on_low_rank_plus_small():
    """In 24 dimensions, J of rank two and three plus something small, and of data near a plane: cot(th) I plus that."""
    path = VP()
    near_plane = Gaussian(path, torch.zeros(24), factor=rotation(24)[:, :2] * torch.tensor([1.5, 0.7]), diag=1e-3)
    low_rank = Gaussian(path, torch.zeros(24), factor=rotation(24)[:, :3] * torch.tensor([9.0, 5.0, 3.0]), diag=0.9)
    for law in (near_plane, low_rank):
        x = law.sample(60, seed=1, dtype=DOUBLE)
        exact = log_likelihood(law, x, method="rk4", steps=3).log_prob
        for probe_law in ("rademacher", "gaussian"):
            size = {}
            for trace in ("hutchinson", "hutch++"):
                out = log_likelihood(law, x, trace=trace, probe_law=probe_law, probes=24, method="rk4", steps=3, seed=1)
                size[trace] = float((out.log_prob - exact).square().mean().sqrt())
            assert size["hutch++"] < 0.4 * size["hutchinson"], (probe_law, size)
    full = log_likelihood(law, x[:3], trace="hutch++", probes=80, method="rk4", steps=3)  # the sketch spans everything
    torch.testing.assert_close(full.log_prob, exact[:3], rtol=0, atol=1e-9)


def test_one_probe_has_no_error_bar():
    out = log_likelihood(stiff(VP(), 3), normal(2, 3), probes=1, method="rk4", steps=2)
    assert out.standard_error is None
    assert log_likelihood(stiff(VP(), 3), normal(2, 3), probes=2, method="rk4", steps=2).standard_error.shape == (2,)


# ------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("trace", ["hutchinson", "hutch++"])
def test_sample_i_depends_on_seed_and_i_alone(trace):
    law = mixture(VP(), d=4)
    x = law.sample(6, seed=1, dtype=DOUBLE)
    options = {"probes": 5, "trace": trace, "method": "midpoint", "steps": 4}
    whole = log_likelihood(law, x, seed=7, **options)
    for rows in ([4], [5, 0, 2]):
        part = log_likelihood(law, x[rows], noise=White(7, indices=rows), **options)
        torch.testing.assert_close(part.log_prob, whole.log_prob[rows], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part.standard_error, whole.standard_error[rows], rtol=1e-9, atol=1e-12)
    seeds = log_likelihood(law, x[:2], seeds=[3, 9], **options)
    lone = log_likelihood(law, x[1:2], seed=9, **options)
    torch.testing.assert_close(seeds.log_prob[1:], lone.log_prob, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(log_likelihood(law, x, seed=8, **options).log_prob, whole.log_prob, atol=1e-3)
    brownian = log_likelihood(law, x, noise=Brownian(7), **options)  # its white draws are the same streams
    torch.testing.assert_close(brownian.log_prob, whole.log_prob, rtol=0, atol=0)
    single = log_likelihood(Gaussian(VP(), torch.zeros(4), std=1.2), x.float(), probes=5, method="rk4", steps=4)
    double = log_likelihood(Gaussian(VP(), torch.zeros(4), std=1.2), x, probes=5, method="rk4", steps=4)
    torch.testing.assert_close(single.log_prob.double(), double.log_prob, rtol=1e-5, atol=1e-5)


def test_more_probes_keep_the_first_ones():
    law, x = mixture(VP(), d=4), normal(3, 4)
    one, two = (log_likelihood(law, x, probes=m, method="rk4", steps=2).log_prob for m in (1, 2))
    other = 2 * two - one  # the second probe's own estimate
    assert not torch.allclose(other, one, atol=1e-3)
    three = log_likelihood(law, x, probes=3, method="rk4", steps=2)
    third = 3 * three.log_prob - 2 * two
    estimates = torch.stack([one, other, third])
    torch.testing.assert_close(three.standard_error, estimates.std(0) / math.sqrt(3), rtol=1e-9, atol=1e-9)


def test_samples_one_by_one_do_not_feel_their_batch():
    law = mixture(EDM(), d=2)
    x = law.sample(4, seed=1, dtype=DOUBLE)
    options = {"probes": 2, "rtol": 1e-3, "atol": 1e-3}
    whole = log_likelihood(law, x, per_sample=True, **options)
    for i in range(4):
        alone = log_likelihood(law, x[i : i + 1], noise=White(0, indices=[i]), per_sample=True, **options)
        assert torch.equal(alone.log_prob, whole.log_prob[i : i + 1])
        assert torch.equal(alone.z, whole.z[i : i + 1])
    together = log_likelihood(law, x, **options)
    torch.testing.assert_close(together.log_prob, whole.log_prob, rtol=0, atol=2e-2)
    assert together.nfe < whole.nfe


def test_conditions_follow_their_samples():
    path, x = Linear(), normal(3, 2)
    y = torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE)

    def network(x, t, y, shift):
        return 0.2 * x * y["scale"][:, None] + shift

    score = Score(network, path, "velocity")
    given = {"y": {"scale": y}, "shift": torch.tensor(0.5)}
    whole = log_likelihood(score, x, conditions=given, rtol=1e-7, atol=1e-7)
    split = log_likelihood(score, x, conditions=given, per_sample=True, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(split.log_prob, whole.log_prob, rtol=0, atol=1e-5)
    for i in range(3):  # div v = 0.4 y in two dimensions
        z = whole.z[i]
        expected = -0.5 * (z @ z) - math.log(2 * math.pi) + 0.4 * y[i] * (1.0 - path.t_min)
        torch.testing.assert_close(whole.log_prob[i], expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ encode, decode


@pytest.mark.parametrize("path", [VP(), Linear()], ids=["VP", "Linear"])
def test_the_latent_is_that_of_encode_and_decodes_to_the_data(path):
    """P10: encode and sample undo each other within 1e-6 at tolerance 1e-8, and meet the likelihood's z."""
    law = stiff(path)
    x = law.sample(3, seed=1, dtype=DOUBLE)
    solver = TorchDiffEq("dopri5", rtol=1e-8, atol=1e-8)
    ends = {"steps": 1, "start": path.T, "grid": "uniform"}
    latent = encode(law, x, solver=solver, **ends)
    back = sample(law, x=latent.x, solver=solver, **ends)
    assert float((back.x - x).abs().max()) < 1e-6
    z = log_likelihood(law, x, rtol=1e-8, atol=1e-8).z
    torch.testing.assert_close(z, latent.x, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- gradients


def test_gradients_reach_the_data_and_the_network():
    """d log p / dx is the model's own score; gradcheck for the parameters, through every trace."""
    law = stiff(VP(), d=3, condition=20.0)
    x = law.sample(2, seed=1, dtype=DOUBLE).requires_grad_()
    out = log_likelihood(law, x, rtol=1e-6, atol=1e-6, prior=lambda z: law.log_prob(z, 1.0), grad=True)
    (slope,) = torch.autograd.grad(out.log_prob.sum(), x)
    torch.testing.assert_close(slope, law(x.detach(), 1e-3), rtol=1e-4, atol=1e-4)

    data = normal(2, 3, seed=2).requires_grad_()
    weight = (0.3 * normal(3, 3, seed=4)).requires_grad_()

    def value(data, weight, **options):
        score = Score(lambda x, t: (x @ weight).tanh(), Linear(), "velocity")
        return log_likelihood(score, data, method="midpoint", steps=1, grad=True, **options).log_prob

    assert torch.autograd.gradcheck(value, (data, weight))
    assert torch.autograd.gradcheck(lambda *a: value(*a, probes=2), (data, weight))
    assert torch.autograd.gradcheck(lambda *a: value(*a, probes=9, trace="hutch++"), (data, weight))  # k = d: Q is everything
    plain = log_likelihood(Score(lambda x, t: (x @ weight).tanh(), Linear(), "velocity"), data, method="midpoint", steps=1)
    assert not plain.log_prob.requires_grad
    assert not plain.z.requires_grad
    torch.testing.assert_close(plain.log_prob, value(data, weight).detach(), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------- dtypes, modes, ends


def test_dtypes_and_modes_of_torch():
    law = Gaussian(VP(), torch.zeros(3), std=0.8)
    x = law.sample(3, seed=1, dtype=DOUBLE)
    truth = law.log_prob(x, 1e-3)
    for dtype, tol in ((torch.float32, 5e-4), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)):
        out = log_likelihood(law, x.to(dtype))
        assert out.log_prob.dtype is torch.float32
        assert out.z.dtype is dtype
        torch.testing.assert_close(out.log_prob.double(), truth, rtol=0, atol=tol)
    before = torch.get_rng_state()
    with torch.inference_mode():
        inside = log_likelihood(law, x.clone(), probes=2)
    outside = log_likelihood(law, x, probes=2)
    assert torch.equal(inside.log_prob, outside.log_prob)
    with torch.no_grad():
        assert torch.equal(log_likelihood(law, x, probes=2).log_prob, outside.log_prob)
    plain = log_likelihood(law, x.float(), probes=6, trace="hutch++", method="rk4", steps=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = log_likelihood(law, x.float(), probes=6, trace="hutch++", method="rk4", steps=4)
    assert torch.equal(cast.log_prob, plain.log_prob)
    assert torch.equal(torch.get_rng_state(), before)
    twice = log_likelihood(law, x, probes=2)
    assert torch.equal(twice.log_prob, outside.log_prob)


def test_an_empty_batch_never_reaches_the_network():
    def network(x, t):
        raise AssertionError

    for options in ({}, {"probes": 3}, {"probes": 4, "trace": "hutch++"}, {"per_sample": True}):
        out = log_likelihood(Score(network, VP()), torch.zeros(0, 3), **options)
        assert out.log_prob.shape == out.cut.shape == (0,)
        assert out.z.shape == (0, 3)
        assert out.nfe == 0


def test_train_mode_is_seen_and_eval_mode_is_restored():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x, t):
            return 0.1 * self.drop(x)

    net, x = Net(), normal(2, 3)
    with pytest.warns(TrainModeWarning, match="Dropout"):
        log_likelihood(Score(net, VP(), "v"), x, method="euler", steps=1)
    out = log_likelihood(Score(net, VP(), "v", mode="eval"), x, rtol=1e-3, atol=1e-3)
    plain = log_likelihood(Score(lambda x, t: 0.1 * x, VP(), "v"), x, rtol=1e-3, atol=1e-3)
    assert torch.equal(out.log_prob, plain.log_prob)
    assert net.training


def test_ends_where_the_network_says_nothing():
    x = normal(2, 3)
    with pytest.raises(PathError, match="alpha = 0"):
        log_likelihood(Score(lambda x, t: x, Linear(), "eps"), x)
    with pytest.raises(PathError, match="sigma = 0"):
        log_likelihood(Score(lambda x, t: x, VP(), "x0"), x, t_min=0.0)
    for path in (VP(), EDM(T=3.0)):  # a score at sigma = 0, where the flow starts flat
        law = Gaussian(path, torch.zeros(3), std=0.7)
        score = Score(lambda x, t, law=law: law(x, float(t[0])), path, "score")
        out = log_likelihood(score, x, t_min=0.0, rtol=1e-8, atol=1e-8, prior=lambda z, law=law: law.log_prob(z, law.path.T))
        torch.testing.assert_close(out.log_prob, law.log_prob(x), rtol=0, atol=1e-6)
    with pytest.raises(PathError, match="label"):
        log_likelihood(Score(lambda x, t: x, EDM(), "F", label=lambda t: t.log()), x, t_min=0.0)


# -------------------------------------------------------------------------------------------------------------- errors


def test_failures_of_the_network_say_where():
    def broken(x, t):
        return torch.where((x[:, :1] > 2.0) & (t[:, None] > 0.5), math.nan, 0.1 * x)

    x = torch.tensor([[0.1, 0.2], [3.0, 0.1], [4.0, 1.0]], dtype=DOUBLE)
    for options in ({}, {"method": "rk4", "steps": 6}, {"per_sample": True}):
        with pytest.raises(NetworkError, match=r"output is not finite at t=0\.[5-9]") as error:
            log_likelihood(Score(broken, VP(), "v"), x, **options)
        assert error.value.samples == ((1,) if options.get("per_sample") else (1, 2))
        assert 0.5 < error.value.t <= 1.0
    with pytest.raises(NetworkError, match=r"derivative is not finite.*first: 0"):  # sqrt at 0
        log_likelihood(Score(lambda x, t: (x - x.detach()).abs().sqrt(), VP(), "v"), x)
    with pytest.raises(NetworkError, match=r"the state overflowed, though.* in 2 samples") as error:
        log_likelihood(Score(lambda x, t: 3e37 * (x > 1.0) + 0 * x, EDM(), "v"), x.float(), method="euler", steps=20)
    assert error.value.samples == (1, 2)
    calls = []

    def fickle(x, t):
        calls.append(1)
        return 0.1 * x / (0.0 if len(calls) == 3 else 1.0)

    with pytest.raises(NetworkError, match="not deterministic"):
        log_likelihood(Score(fickle, VP(), "v"), x, method="euler", steps=5)
    with pytest.raises(StepLimitError, match=r"max_nfe network calls used at t = 0\.") as limit:
        log_likelihood(Score(lambda x, t: -1e5 * x, Linear(), "velocity"), x, max_nfe=50)
    assert limit.value.partial.shape == x.shape
    assert 0 < limit.value.t < 1
    assert limit.value.rejected > 0
    with pytest.raises(StepLimitError, match="vanished") as limit:
        log_likelihood(Score(lambda x, t: 3 * x * x, Linear(), "velocity"), x[2:], rtol=0.1, atol=0.1)
    assert 0.05 < limit.value.t < 0.12  # 1 / (3 x0) after t_min
    with pytest.raises(NetworkError, match="raised RuntimeError"):
        log_likelihood(Score(lambda x, t: x @ x, VP()), x)


def test_no_gradient_reaches_x():
    """B45: a network under no_grad, one that detaches, one through numpy, one that ignores x."""
    weight = torch.ones(1, dtype=DOUBLE, requires_grad=True)
    networks = {
        "no_grad": torch.no_grad()(lambda x, t: 0.1 * x),
        "detach": lambda x, t: 0.1 * x.detach() * weight,
        "numpy": lambda x, t: torch.from_numpy(0.1 * x.detach().numpy()),
        "constant": lambda x, t: torch.zeros_like(x),
    }
    for network in networks.values():
        for options in ({}, {"probes": 2}):
            with pytest.raises(NetworkError, match=r"no gradient reaches x: at t=0\.001"):
                log_likelihood(Score(network, VP(), "v"), normal(2, 3), **options)
    flat = log_likelihood(Score(lambda x, t: 0 * x, VP(), "v"), normal(2, 3))
    torch.testing.assert_close(flat.z, normal(2, 3) * 1.0, rtol=1e-9, atol=1e-9)


LAW = Gaussian(VP(), torch.zeros(3), std=1.0)
X = torch.zeros(2, 3)
BAD = {
    "too large for the exact trace": (lambda: log_likelihood(LAW, X, limit=2), "3 backward passes.*limit=2.*probes=16"),
    "no score": (lambda: log_likelihood(lambda x, t: x, X), "wrap the network"),
    "numpy": (lambda: log_likelihood(LAW, X.numpy()), "from_numpy"),
    "integers": (lambda: log_likelihood(LAW, X.long()), "dequantise"),
    "a scalar": (lambda: log_likelihood(LAW, torch.tensor(1.0)), "batch"),
    "nan": (lambda: log_likelihood(LAW, X / 0), "not finite in 2 of 2"),
    "another event": (lambda: log_likelihood(LAW, torch.zeros(2, 4)), "(2, 4)|3"),
    "trace": (lambda: log_likelihood(LAW, X, trace="hutchplusplus", probes=4), "hutch\\+\\+"),
    "exact with probes": (lambda: log_likelihood(LAW, X, trace="exact", probes=4), "takes none"),
    "no probes": (lambda: log_likelihood(LAW, X, trace="hutchinson"), "at least 1"),
    "few probes": (lambda: log_likelihood(LAW, X, trace="hutch++", probes=3), "at least 4"),
    "probes": (lambda: log_likelihood(LAW, X, probes=2.5), "probes=2.5"),
    "probe law": (lambda: log_likelihood(LAW, X, probes=2, probe_law="normal"), "gaussian"),
    "method": (lambda: log_likelihood(LAW, X, method="dopri"), "dopri5"),
    "fixed without steps": (lambda: log_likelihood(LAW, X, method="rk4"), "give steps="),
    "adaptive with steps": (lambda: log_likelihood(LAW, X, steps=5), "leave steps out"),
    "steps": (lambda: log_likelihood(LAW, X, method="rk4", steps=0), "steps=0"),
    "rtol": (lambda: log_likelihood(LAW, X, rtol=0.0), "rtol=0.0"),
    "rtol below rounding": (lambda: log_likelihood(LAW, X, rtol=1e-8), "x0.double"),
    "max_nfe": (lambda: log_likelihood(LAW, X, max_nfe=0), "max_nfe=0"),
    "t_min": (lambda: log_likelihood(LAW, X, t_min=-0.1), "t_min=-0.1"),
    "t_max": (lambda: log_likelihood(LAW, X, t_max=2.0), "t_max=2.0"),
    "times swapped": (lambda: log_likelihood(LAW, X, t_min=0.5, t_max=0.4), "t_min < t_max"),
    "prior": (lambda: log_likelihood(LAW, X, prior=1.0), "function of z"),
    "prior's shape": (lambda: log_likelihood(LAW, X, prior=lambda z: z), r"\(2,\)"),
    "chunk": (lambda: log_likelihood(LAW, X, chunk=0), "chunk=0"),
    "noise": (lambda: log_likelihood(LAW, X, probes=2, noise="white"), "White"),
    "seeds": (lambda: log_likelihood(LAW, X, probes=2, seeds=[1]), "batch of 2"),
    "conditions": (lambda: log_likelihood(LAW, X, conditions=3), "dict"),
    "no scale": (lambda: log_likelihood(LAW, X).bits_per_dim(), "scale=None.*say what the data are"),
    "no bins": (lambda: bits_per_dim(X[:, 0], (2, 3), scale=2.0), "bins=None"),
    "scale": (lambda: bits_per_dim(X[:, 0], (2, 3), scale=-1.0, bins=256), "scale=-1.0"),
    "bins": (lambda: bits_per_dim(X[:, 0], (2, 3), scale=1.0, bins=2.5), "bins=2.5"),
    "shape": (lambda: bits_per_dim(X[:, 0], 3, scale=1.0, bins=1), "shape=3"),
    "levels": (lambda: dequantise(X + 0.5, low=0.0, high=1.0, bins=4), "0.5"),
    "levels beyond": (lambda: dequantise(X + 4, low=0.0, high=1.0, bins=4), "4.*= 3"),
    "ends": (lambda: dequantise(X, low=1.0, high=0.0, bins=4), "low < high"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, words = BAD[name]
    with pytest.raises(InputError, match=words) as error:
        make()
    assert len(str(error.value)) < 400


# ------------------------------------------------------------------------------------------------------------ bits/dim


def test_bits_per_dim_states_the_scale():
    """A density that is flat on its range gives log2(bins) whatever the range: every level is equally likely."""
    d = 12
    for low, high, bins in ((-1.0, 1.0, 256), (0.0, 1.0, 256), (0.0, 255.0, 256), (-3.0, 5.0, 10)):
        log_prob = torch.full((3,), -d * math.log(high - low), dtype=DOUBLE)
        bits = bits_per_dim(log_prob, (3, 3, 2, 2), scale=high - low, bins=bins)
        torch.testing.assert_close(bits, torch.full((3,), math.log2(bins), dtype=DOUBLE))
    log_prob = torch.tensor([-5.0, 3.0], dtype=DOUBLE)
    seven = bits_per_dim(log_prob, (2, d), scale=2.0, bins=256) - bits_per_dim(log_prob, (2, d), scale=1.0, bins=1)
    torch.testing.assert_close(seven, torch.full((2,), 7.0, dtype=DOUBLE))
    continuous = bits_per_dim(log_prob, (2, d), scale=1.0, bins=1)
    torch.testing.assert_close(continuous, -log_prob / (d * math.log(2)))


def test_dequantised_levels_are_uniform_in_their_bins():
    k = torch.randint(0, 8, (4000, 3), generator=generator())
    x = dequantise(k, low=-1.0, high=1.0, bins=8, seed=3, dtype=DOUBLE)
    u = (x + 1) * 4 - k
    assert 0 < float(u.min()) < float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 / math.sqrt(12 * u.numel())
    assert abs(float(u.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / u.numel())
    part = dequantise(k[[7, 2]], low=-1.0, high=1.0, bins=8, noise=White(3, indices=[7, 2]), dtype=DOUBLE)
    assert torch.equal(part, x[[7, 2]])
    assert dequantise(k, low=0.0, high=1.0, bins=8).dtype is torch.float32
    assert not torch.equal(dequantise(k, low=-1.0, high=1.0, bins=8, seed=4, dtype=DOUBLE), x)


def test_dequantised_bits_bound_those_of_the_levels():
    """Jensen: the mean over u is above -log2 P of the bin, and close to it where the density hardly changes across one."""
    law = Gaussian(EDM(), torch.zeros(1), std=0.3)
    bins, low, high = 16, -1.0, 1.0
    for k in (3, 8, 12):
        edges = low + (high - low) * torch.tensor([[k / bins], [(k + 1) / bins]], dtype=DOUBLE)
        mass = float((torch.special.ndtr(edges[1] / 0.3) - torch.special.ndtr(edges[0] / 0.3))[0])
        x = dequantise(torch.full((4000, 1), k), low=low, high=high, bins=bins, dtype=DOUBLE)
        bits = bits_per_dim(law.log_prob(x), x.shape, scale=high - low, bins=bins)
        gap = float(bits.mean()) + math.log2(mass)
        assert -4 * float(bits.std()) / math.sqrt(4000) < gap < 0.1
