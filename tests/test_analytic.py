"""Exact scores against independent truth: densities by mpmath and torch.distributions, identities, an ODE solver."""

import itertools
import math
import threading

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as dist
from torchdiffeq import odeint

import sde
from scores import Empirical, Gaussian, GaussianMixture, Score, as_network
from scores import analytic as module
from sde import EDM, VP, Linear
from sde.errors import InputError, PathError
from sde.prediction import OUTPUTS, Tally

DOUBLE = torch.float64
PATHS = {
    name: make()
    for name, make in {
        "VP": VP,
        "EDM": EDM,
        "Linear": Linear,
        **{name: getattr(sde, name) for name in ("VE", "Cosine", "SubVP", "Trigonometric") if hasattr(sde, name)},
    }.items()
}
D = 4


def _random():
    g = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=DOUBLE)  # noqa: E731
    a = draw(2, D, D)
    covs = a @ a.transpose(1, 2) / D + 0.05 * torch.eye(D, dtype=DOUBLE)
    return draw(2, D), covs, draw(D, 2), draw(2, D).square() / 4 + 0.01, draw(9, D)


MEANS, COVS, FACTOR, VARS, DATA = _random()
WEIGHTS = [0.3, 0.7]
LAWS = {
    "full": lambda path: Gaussian(path, MEANS[0], COVS[0]),
    "diagonal": lambda path: Gaussian(path, MEANS[0], var=VARS[0]),
    "isotropic": lambda path: Gaussian(path, MEANS[0], std=0.6),
    "low rank": lambda path: Gaussian(path, MEANS[0], factor=FACTOR, diag=0.1),
    "mixture full": lambda path: GaussianMixture(path, WEIGHTS, MEANS, COVS),
    "mixture diagonal": lambda path: GaussianMixture(path, WEIGHTS, MEANS, VARS),
    "mixture isotropic": lambda path: GaussianMixture(path, WEIGHTS, MEANS, [0.02, 0.3]),
    "empirical": lambda path: Empirical(path, DATA),
}
DENSE = {  # weights, means and covariances of the same laws, by hand
    "full": ([1.0], MEANS[:1], COVS[:1]),
    "diagonal": ([1.0], MEANS[:1], torch.diag(VARS[0])[None]),
    "isotropic": ([1.0], MEANS[:1], 0.36 * torch.eye(D, dtype=DOUBLE)[None]),
    "low rank": ([1.0], MEANS[:1], (FACTOR @ FACTOR.T + 0.1 * torch.eye(D, dtype=DOUBLE))[None]),
    "mixture full": (WEIGHTS, MEANS, COVS),
    "mixture diagonal": (WEIGHTS, MEANS, torch.diag_embed(VARS)),
    "mixture isotropic": (WEIGHTS, MEANS, torch.stack([c * torch.eye(D, dtype=DOUBLE) for c in (0.02, 0.3)])),
    "empirical": ([1 / 9] * 9, DATA, torch.zeros(9, D, D, dtype=DOUBLE)),
}


def density(name, path, t):
    """log p_t as torch.distributions writes it (Cholesky factors, no eigenbasis): its gradient is the truth for the score."""
    weights, means, covs = DENSE[name]
    a, s = float(path.alpha(t)), float(path.sigma(t))
    component = dist.MultivariateNormal(a * means, covariance_matrix=a * a * covs + s * s * torch.eye(D, dtype=DOUBLE))
    weights = torch.tensor(weights, dtype=DOUBLE)
    return lambda x: torch.logsumexp(component.log_prob(x[:, None]) + weights.log(), 1)


def hessian_of(log_p, row):
    return torch.autograd.functional.hessian(lambda z: log_p(z[None])[0], row)


def times(path, *fractions):
    return [path.t_min + u * (path.T - path.t_min) for u in fractions]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", LAWS)
def test_score_and_pair_are_the_gradient_of_the_log_density(name, path):
    law = LAWS[name](path)
    for t in times(path, 0.02, 0.3, 0.98):
        a, s = float(path.alpha(t)), float(path.sigma(t))
        x = law.sample(5, t, seed=1, dtype=DOUBLE)
        x[0] *= 3  # off the bulk
        x.requires_grad_()
        log_p = density(name, path, t)(x)
        (grad,) = torch.autograd.grad(log_p.sum(), x)
        x = x.detach()
        near = 1e-12 * (1 + grad.abs().max()) * (1 + 1 / s)
        assert (law.log_prob(x, t) - log_p).abs().max() < 1e-11 * (1 + log_p.abs().max())
        assert (law(x, t) - grad).abs().max() < 10 * near
        pair = law.predict(x, t)
        assert (pair.eps + s * grad).abs().max() < 10 * near * s
        assert (pair.x0 - (x + s * s * grad) / a).abs().max() < 10 * near * s * s / a + 1e-13 * s / a
        assert (a * pair.x0 + s * pair.eps - x).abs().max() < 1e-12 * (1 + x.abs().max())
        assert torch.equal(law.posterior_mean(x, t), pair.x0)


@pytest.mark.parametrize("name", LAWS)
def test_tweedie_second_order(name):
    """Cov[x_0 | x] = sigma^2/alpha^2 (I + sigma^2 grad^2 log p_t), with the Hessian of the independent density."""
    path = VP()
    law = LAWS[name](path)
    for t in (0.2, 0.5):
        a, s = float(path.alpha(t)), float(path.sigma(t))
        x = law.sample(3, t, seed=3, dtype=DOUBLE)
        log_p = density(name, path, t)
        hessian = torch.stack([hessian_of(log_p, row) for row in x])
        expected = s * s / a / a * (torch.eye(D, dtype=DOUBLE) + s * s * hessian)
        cov = law.posterior_cov(x, t)
        assert (cov - expected).abs().max() < 1e-11
        v = torch.randn(3, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        assert (law.posterior_cov(x, t, v) - (cov @ v[..., None])[..., 0]).abs().max() < 1e-13


@pytest.mark.parametrize("name", LAWS)
def test_a_time_a_sample(name):
    law = LAWS[name](VP())
    t = torch.tensor([0.05, 0.4, 0.9], dtype=DOUBLE)
    x = law.sample(3, 0.4, seed=2, dtype=DOUBLE)
    v = x.cos()
    pair, grad, cov, cov_v, log_p = (
        law.predict(x, t),
        law(x, t),
        law.posterior_cov(x, t),
        law.posterior_cov(x, t, v),
        law.log_prob(x, t),
    )
    for i in range(3):
        row, u = x[i : i + 1], float(t[i])
        one = law.predict(row, u)
        pairs = [(pair.x0, one.x0), (pair.eps, one.eps), (grad, law(row, u)), (cov, law.posterior_cov(row, u))]
        pairs += [(cov_v, law.posterior_cov(row, u, v[i : i + 1])), (log_p, law.log_prob(row, u))]
        for many, single in pairs:
            assert (many[i] - single[0]).abs().max() < 1e-12 * (1 + single.abs().max())


def test_mixture_against_mpmath():
    """60 digits, a float32-hostile mixture: narrow components far from the origin, at noise levels over eight decades."""
    mpmath.mp.dps = 60
    weights, means, variances = (
        [0.2, 0.5, 0.3],
        [[30.0, -1.0], [30.5, -1.2], [29.0, 2.0]],
        [[1e-4, 0.01], [0.25, 1e-6], [0.04, 1.0]],
    )
    law = GaussianMixture(EDM(), weights, means, variances)
    for s in (1e-6, 1e-3, 0.1, 1.0, 60.0):
        for point in ([30.1, -1.05], [30.0, -1.0], [28.0, 5.0]):
            logs, slopes, shrunk = [], [], []
            for w, m, v in zip(weights, means, variances, strict=True):
                var = [mpmath.mpf(c) + mpmath.mpf(s) ** 2 for c in v]
                apart = [mpmath.mpf(p) - mpmath.mpf(c) for p, c in zip(point, m, strict=True)]
                logs.append(
                    mpmath.log(w) - sum(d * d / c + mpmath.log(2 * mpmath.pi * c) for d, c in zip(apart, var, strict=True)) / 2
                )
                slopes.append([-d / c for d, c in zip(apart, var, strict=True)])
                shrunk.append([mpmath.mpf(c) + mpmath.mpf(e) / f * d for c, e, f, d in zip(m, v, var, apart, strict=True)])
            top = max(logs)
            r = [mpmath.exp(g - top) for g in logs]
            total = sum(r)
            score = [float(sum(a * b[i] for a, b in zip(r, slopes, strict=True)) / total) for i in range(2)]
            x0 = [float(sum(a * b[i] for a, b in zip(r, shrunk, strict=True)) / total) for i in range(2)]
            x = torch.tensor([point], dtype=DOUBLE)
            assert float(law.log_prob(x, s)) == pytest.approx(float(top + mpmath.log(total)), rel=1e-12, abs=1e-9)
            torch.testing.assert_close(law(x, s)[0], torch.tensor(score, dtype=DOUBLE), rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(law.predict(x, s).x0[0], torch.tensor(x0, dtype=DOUBLE), rtol=1e-12, atol=1e-9)
            single = law.predict(x.float(), s)  # the state itself is rounded: compare where that is benign
            assert single.x0.isfinite().all()
            assert single.eps.isfinite().all()
            if s >= 0.1:
                torch.testing.assert_close(single.x0[0].double(), torch.tensor(x0, dtype=DOUBLE), rtol=1e-5, atol=1e-4)


def test_float32_mixtures_keep_their_precision_where_squares_would_lose_it():
    g = torch.Generator().manual_seed(0)
    means = 5.0 + 0.003 * torch.randn(20, 16, generator=g, dtype=DOUBLE)  # overlapping, far from the origin
    for covs in (torch.full((20, 16), 1e-5, dtype=DOUBLE), torch.diag_embed(torch.full((20, 16), 1e-5, dtype=DOUBLE))):
        law = GaussianMixture(EDM(), torch.full((20,), 0.05), means, covs)
        for s in (0.002, 0.01, 0.05, 1.0, 80.0):
            x = law.sample(64, s, seed=1)
            error = (law.predict(x, s).x0 - law.predict(x.double(), s).x0).abs().max()
            assert error < 1e-5


def test_expanded_and_direct_forms_agree():
    law = LAWS["mixture diagonal"](VP())
    x = law.sample(6, 0.5, seed=1, dtype=DOUBLE)
    expected = law.predict(x, 0.5)
    full = GaussianMixture(VP(), WEIGHTS, MEANS, torch.diag_embed(VARS)).predict(x, 0.5)
    a = law.predict(x, torch.full((6,), 0.5, dtype=DOUBLE))  # a time a sample: the direct form
    for one, other in itertools.product((expected,), (full, a)):
        assert (one.x0 - other.x0).abs().max() < 1e-13
        assert (one.eps - other.eps).abs().max() < 1e-13


# ---------------------------------------------------------------- Gaussians


GAUSSIANS = ["full", "diagonal", "isotropic", "low rank"]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", GAUSSIANS)
def test_flow_solves_the_probability_flow(name, path):
    """dx/dt = alpha' x0 + sigma' eps, against an 8th-order solver on the independent density."""
    law = LAWS[name](path)
    s, t = times(path, 0.6, 0.05)
    x = law.sample(4, s, seed=0, dtype=DOUBLE)
    _, means, covs = DENSE[name]

    def slope(u, x):
        a, b, da, db = (float(fn(u)) for fn in (path.alpha, path.sigma, path.dalpha, path.dsigma))
        score = -torch.linalg.solve(a * a * covs[0] + b * b * torch.eye(D, dtype=DOUBLE), (x - a * means[0]).T).T
        return da / a * x - (b * db - da / a * b * b) * score

    ends = torch.tensor([s, t], dtype=DOUBLE)
    options = {"step_t": ends[1:]}  # land on the end: dopri8's interpolation is of lower order
    end = odeint(slope, x, ends, rtol=1e-12, atol=1e-12, method="dopri8", options=options)[-1]
    assert (law.flow(x, s, t) - end).abs().max() < 1e-10 * (1 + x.abs().max())


@pytest.mark.parametrize("name", GAUSSIANS)
@settings(max_examples=20, deadline=None)
@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_flow_is_a_semigroup_and_carries_the_law(name, s, u, t):
    law = LAWS[name](VP())
    x = law.sample(3, s, seed=0, dtype=DOUBLE)
    end = law.flow(x, s, t)
    assert (law.flow(law.flow(x, s, u), u, t) - end).abs().max() < 1e-12 * (1 + end.abs().max()) * 10
    assert (law.flow(end, t, s) - x).abs().max() < 1e-12 * (1 + x.abs().max()) * 10
    # a density carried by a linear map changes by its determinant
    jacobian = law.flow(torch.eye(D, dtype=DOUBLE), s, t) - law.flow(torch.zeros(D, D, dtype=DOUBLE), s, t)
    assert (law.log_prob(end, t) + torch.linalg.slogdet(jacobian)[1] - law.log_prob(x, s)).abs().max() < 1e-9


@pytest.mark.parametrize("diag", [0.0, 0.1, VARS[0]])
def test_low_rank_equals_full(diag):
    path = VP()
    cov = FACTOR @ FACTOR.T + torch.diag(torch.as_tensor(diag, dtype=DOUBLE).expand(D))
    low, full = Gaussian(path, MEANS[0], factor=FACTOR, diag=diag), Gaussian(path, MEANS[0], cov)
    thin = low.eigenvectors
    assert (thin.T @ thin - torch.eye(thin.shape[1], dtype=DOUBLE)).abs().max() < 1e-12
    x = low.sample(5, 0.3, seed=0, dtype=DOUBLE)
    for t in (0.01, 0.3, 1.0):
        a, b = low.predict(x, t), full.predict(x, t)
        assert (a.x0 - b.x0).abs().max() < 1e-11
        assert (a.eps - b.eps).abs().max() < 1e-11
        assert (low(x, t) - full(x, t)).abs().max() < 1e-9
        assert (low.posterior_cov(x, t) - full.posterior_cov(x, t)).abs().max() < 1e-12
        assert (low.log_prob(x, t) - full.log_prob(x, t)).abs().max() < 1e-9
        assert (low.flow(x, 0.3, t) - full.flow(x, 0.3, t)).abs().max() < 1e-11
    torch.testing.assert_close(low.eigenvalues.sort().values, full.eigenvalues, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [300, (2, 2, 75)])
def test_many_dimensions_use_thin_products_and_agree(shape):
    g = torch.Generator().manual_seed(1)
    mean = torch.randn(shape, generator=g, dtype=DOUBLE)
    factor = torch.randn(300, 5, generator=g, dtype=DOUBLE)
    low = Gaussian(VP(), mean, factor=factor, diag=0.2)
    full = Gaussian(VP(), mean, factor @ factor.T + 0.2 * torch.eye(300, dtype=DOUBLE))
    x = low.sample(3, 0.2, seed=1, dtype=DOUBLE)
    assert x.shape == (3, *mean.shape)
    assert low.eigenvectors.shape == (300, 5)
    t = torch.tensor([0.1, 0.2, 0.9], dtype=DOUBLE)
    for when in (0.2, t):
        a, b = low.predict(x, when), full.predict(x, when)
        assert (a.x0 - b.x0).abs().max() < 1e-10
        assert (a.eps - b.eps).abs().max() < 1e-10
    assert torch.equal(low.predict(x.reshape(3, 300), 0.2).x0.reshape(x.shape), low.predict(x, 0.2).x0)


def test_gaussian_attributes():
    law = Gaussian(VP(), MEANS[0], COVS[0])
    rebuilt = law.eigenvectors @ torch.diag(law.eigenvalues) @ law.eigenvectors.T
    assert (rebuilt - COVS[0]).abs().max() < 1e-13
    assert torch.equal(law.mean, MEANS[0])
    law = Gaussian(VP(), torch.zeros(2, 3), std=torch.full((2, 3), 0.5))
    assert law.eigenvectors is None
    assert law.eigenvalues.tolist() == [0.25] * 6
    assert law.mean.shape == (2, 3)
    assert Gaussian(VP(), 0.0, std=2.0).sample(5).shape == (5,)


def test_diagonal_gaussians_do_not_mix_rows_to_the_bit():
    for law in (LAWS["diagonal"](VP()), LAWS["isotropic"](VP())):
        x = law.sample(64, 0.4, seed=0)
        for knot in VP().knots([1.0, 0.4, 0.01]):
            fn = lambda x, knot=knot, law=law: law.at([knot], x, {}, Tally())[0](x)  # noqa: E731
            whole = fn(x)
            for pieces in (x.split(1), x.split(7)):
                assert torch.equal(torch.cat([fn(p) for p in pieces]), whole)
            order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
            assert torch.equal(fn(x[order]), whole[order])


# ---------------------------------------------------------------- the ends


@pytest.mark.parametrize("name", LAWS)
def test_pure_noise_says_the_mean_of_the_data(name):
    law = LAWS[name](Linear())
    x = torch.randn(4, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    weights, means, _ = DENSE[name]
    mean = torch.tensor(weights, dtype=DOUBLE) @ means
    pair = law.predict(x, 1.0)
    assert (pair.x0 - mean).abs().max() < 1e-14
    assert (pair.eps - x).abs().max() < 1e-14
    assert (law(x, 1.0) + x).abs().max() < 1e-14


@pytest.mark.parametrize("name", [n for n in LAWS if n != "empirical"])
def test_no_noise_says_the_state(name):
    law = LAWS[name](VP())
    x = law.sample(4, 0.0, seed=0, dtype=DOUBLE)
    pair = law.predict(x, 0.0)
    assert (pair.x0 - x).abs().max() < 1e-13
    assert pair.eps.abs().max() == 0.0
    y = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(density(name, VP(), 0.0)(y).sum(), y)
    assert (law(x, 0.0) - grad).abs().max() < 1e-10 * grad.abs().max()
    assert law.posterior_cov(x, 0.0).abs().max() < 1e-28


@pytest.mark.parametrize("name", LAWS)
def test_predictions_are_continuous_at_the_ends(name):
    """No cancellation: tiny noise and tiny signal give the limits to rounding."""
    path = EDM(T=1e9, t_min=1e-9)
    law = LAWS[name](path)
    x0 = law.sample(4, 0.0, seed=0, dtype=DOUBLE)
    z = torch.randn(4, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    near = law.predict(x0 + 1e-9 * z, 1e-9)
    assert (near.x0 - x0).abs().max() < 1e-8
    if name != "empirical":
        assert near.eps.abs().max() < 1e-5
    else:
        assert (near.eps - z).abs().max() < 1e-5
    weights, means, _ = DENSE[name]
    far = law.predict(1e9 * z, 1e9)
    assert (far.x0 - torch.tensor(weights, dtype=DOUBLE) @ means).abs().max() < 1e-6
    assert (far.eps - z).abs().max() < 1e-8


def test_degenerate_laws_at_and_near_sigma_zero():
    x = torch.tensor([[1.0, 2.0]], dtype=DOUBLE)
    flat = Gaussian(EDM(), [0.5, 2.0], var=[1.0, 0.0])
    pair = flat.predict(x, 0.0)
    assert pair.x0.tolist() == [[1.0, 2.0]]
    assert pair.eps.tolist() == [[0.0, 0.0]]
    for law in (flat, GaussianMixture(EDM(), [1.0], [[0.5, 2.0]], [[1.0, 0.0]]), Empirical(EDM(), [[1.0, 2.0]])):
        for attempt in (law, law.log_prob):
            with pytest.raises(PathError, match="sigma=0"):
                attempt(x, 0.0)
            assert attempt(x, 1e-8).isfinite().all()
    with pytest.raises(PathError, match="sigma=0"):
        flat.flow(x, 0.0, 1.0)
    assert flat.flow(x, 1.0, 0.0).isfinite().all()
    assert float(flat.flow(x, 1.0, 0.0)[0, 1]) == 2.0


def test_low_rank_without_a_diagonal_flows_onto_its_plane():
    law = Gaussian(VP(), MEANS[0], factor=FACTOR)
    x = law.sample(4, 1.0, seed=0, dtype=DOUBLE)
    data = law.flow(x, 1.0, 0.0) - MEANS[0]
    outside = data.T - FACTOR @ torch.linalg.lstsq(FACTOR, data.T).solution
    assert outside.abs().max() < 1e-13
    assert (law.predict(x, 0.0).x0 - law.predict(law.predict(x, 0.0).x0, 0.0).x0).abs().max() < 1e-13  # a projection


# ---------------------------------------------------------------- finite data


@pytest.mark.parametrize("path", [VP(), EDM(), Linear()])
def test_empirical_equals_a_mixture_of_points(path):
    law, points = Empirical(path, DATA), GaussianMixture(path, torch.full((9,), 1 / 9), DATA, torch.zeros(9))
    for t in times(path, 0.0, 0.01, 0.4, 0.99):
        x = law.sample(6, t, seed=4, dtype=DOUBLE)
        a, b = law.predict(x, t), points.predict(x, t)
        s = float(path.sigma(t))
        assert (a.x0 - b.x0).abs().max() < 1e-9
        assert (a.eps - b.eps).abs().max() < 1e-9 / min(s, 1.0)
        assert (law.log_prob(x, t) - points.log_prob(x, t)).abs().max() < 1e-9 / min(s, 1.0)
        assert (law.posterior_cov(x, t) - points.posterior_cov(x, t)).abs().max() < 1e-10


@pytest.mark.parametrize("path", [Linear(), sde.Cosine(), sde.Tabulated.linear(zero_terminal_snr=True)])
def test_empirical_log_prob_where_alpha_is_zero(path):
    law, x = Empirical(path, DATA), DATA[:3] + 2.0
    normal = -0.5 * (x.square().sum(1) + D * math.log(2.0 * math.pi))  # the law of the noise alone
    assert (law.log_prob(x, path.T) - normal).abs().max() < 1e-11
    mixed = law.log_prob(x, torch.tensor([path.T, 0.4 * path.T, path.T], dtype=DOUBLE))
    assert (mixed[[0, 2]] - normal[[0, 2]]).abs().max() < 1e-11
    assert (law.posterior_cov(x, path.T) - torch.cov(DATA.T, correction=0)).abs().max() < 1e-11


def test_sigma_zero_picks_the_nearest_point():
    path = VP()
    x = DATA + 0.05 * torch.randn(9, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    nearest = DATA[torch.cdist(x, DATA).argmin(1)]
    for law in (Empirical(path, DATA), GaussianMixture(path, torch.full((9,), 1 / 9), DATA, torch.zeros(9))):
        for dtype in (DOUBLE, torch.float32):
            pair = law.predict(x.to(dtype), 0.0)
            assert torch.equal(pair.x0, nearest.to(dtype))
            assert pair.eps.abs().max() == 0.0


def test_empirical_streams_its_data(monkeypatch):
    law = Empirical(VP(), torch.randn(500, D, generator=torch.Generator().manual_seed(0), dtype=DOUBLE))
    x = law.sample(16, 0.3, seed=1, dtype=DOUBLE)
    v = x.sin()

    def everything():
        return [fn(x, t) for t in (0.02, 0.3, 0.9) for fn in (law.posterior_mean, law, law.log_prob, law.posterior_cov)] + [
            law.posterior_cov(x, 0.3, v)
        ]

    whole = everything()
    monkeypatch.setattr(module, "CHUNK", 16 * 37)
    for a, b in zip(whole, everything(), strict=True):
        assert (a - b).abs().max() < 1e-12 * (1 + a.abs().max())


def test_empirical_float32_is_safe_at_low_noise():
    """Triples of points 0.005 apart, far from each other: expanded squares would lose every digit within a triple."""
    g = torch.Generator().manual_seed(0)
    data = (10.0 * torch.randn(20, 1, 8, generator=g) + 0.005 * torch.randn(20, 3, 8, generator=g)).reshape(60, 8)
    law = Empirical(EDM(), data)
    for s in (0.002, 0.005, 0.02, 1.0, 80.0):
        x = law.sample(32, s, seed=0)
        reference = law.predict(x.double(), s)
        assert (law.predict(x, s).x0 - reference.x0).abs().max() < 2e-5
    assert law.data.dtype is torch.float32
    assert law.predict(x, s).x0.dtype is torch.float32


def test_empirical_owns_its_data():
    data = DATA.clone()
    law = Empirical(VP(), data)
    expected = law.posterior_mean(DATA, 0.5)
    data.zero_()
    assert torch.equal(Empirical(VP(), DATA).posterior_mean(DATA, 0.5), expected)
    law._cache.clear()
    assert torch.equal(law.posterior_mean(DATA, 0.5), expected)


# ---------------------------------------------------------------- as solvers see them


@pytest.mark.parametrize("name", LAWS)
def test_raw_outputs_follow_the_contract(name):
    for path in PATHS.values():
        law, tally = LAWS[name](path), Tally()
        knots = path.knots([path.T, *times(path, 0.5, 0.1, 0.0), 0.0 if name != "empirical" else path.t_min])
        x = law.sample(4, path.T / 2, seed=0, dtype=DOUBLE)
        for k, f in zip(knots, law.at(knots, x, {}, tally), strict=True):
            y, (a, b), pair = f(x), law.row(k), law.predict(x, k.t)
            assert torch.equal(y, pair.combine(a, b))
            assert isinstance(a, float)
            assert isinstance(b, float)
            det = k.alpha * b - k.sigma * a
            if k.sigma:  # the pair follows from the raw output without loss
                assert ((b * x - k.sigma * y) / det - pair.x0).abs().max() < 1e-12 * (1 + x.abs().max() / max(k.alpha, k.sigma))
                assert ((k.alpha * y - a * x) / det - pair.eps).abs().max() < 1e-12 * (
                    1 + x.abs().max() / max(k.alpha, k.sigma)
                )
        assert (tally.nfe, tally.net_evals) == (5, 5)


@pytest.mark.parametrize("name", LAWS)
def test_dtypes_shapes_and_devices(name):
    path = VP()
    law = LAWS[name](path)
    x = law.sample(4, 0.4, seed=0, dtype=DOUBLE)
    reference = law.predict(x, 0.4)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        pair, grad = law.predict(x.to(dtype), 0.4), law(x.to(dtype), 0.4)
        assert pair.x0.dtype is pair.eps.dtype is grad.dtype is dtype
        for a, b in ((pair.x0, reference.x0), (pair.eps, reference.eps), (grad, law(x, 0.4))):
            assert (a.double() - b).abs().max() < tolerance * (1 + b.abs().max())
    image = x.reshape(4, 1, 2, 2)
    assert torch.equal(law.predict(image, 0.4).x0, reference.x0.reshape(4, 1, 2, 2))
    knots = path.knots([0.9, 0.1])
    for f, g in zip(law.at(knots, image, {}, Tally()), law.at(knots, x, {}, Tally()), strict=True):
        assert torch.equal(f(image), g(x).reshape(4, 1, 2, 2))
    wide = torch.zeros(4, 2 * D, dtype=DOUBLE)
    wide[:, ::2] = x
    torch.testing.assert_close(law.predict(wide[:, ::2], 0.4).x0, reference.x0, rtol=0, atol=1e-14)
    assert law.predict(x[:0], 0.4).x0.shape == (0, D)
    assert law.sample(0).shape == (0, D)


def test_prepared_late_is_the_same(monkeypatch):
    law, knots = LAWS["mixture diagonal"](VP()), VP().knots([0.9, 0.5, 0.1])
    x = law.sample(4, 0.4, seed=0, dtype=DOUBLE)
    early = [f(x) for f in law.at(knots, x, {}, Tally())]
    monkeypatch.setattr(module, "EAGER", 0)
    tally = Tally()
    assert all(torch.equal(f(x), y) for f, y in zip(law.at(knots, x, {}, tally), early, strict=True))
    assert tally.nfe == 3


def test_threads_share_one_copy_of_the_parameters():
    law = Gaussian(VP(), torch.zeros(300), torch.eye(300))
    x, out = torch.randn(2, 300), []
    threads = [threading.Thread(target=lambda: out.append(law.predict(x, 0.3).x0)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(out) == 8
    assert all(torch.equal(a, out[0]) for a in out)
    assert sum(key[0] == "V" and key[1] is torch.float32 for key in law._cache) == 1


@pytest.mark.parametrize("name", LAWS)
def test_jacobian_of_the_score_is_the_hessian(name):
    law = LAWS[name](VP())
    x = law.sample(2, 0.3, seed=0, dtype=DOUBLE)
    log_p = density(name, VP(), 0.3)
    for row in x:
        hessian = hessian_of(log_p, row)
        jacobian = torch.autograd.functional.jacobian(lambda z: law(z[None], 0.3)[0], row)
        assert (jacobian - hessian).abs().max() < 1e-9 * (1 + hessian.abs().max())


@pytest.mark.parametrize("name", LAWS)
def test_samples_have_the_right_moments_and_their_own_randomness(name):
    law, n, path = LAWS[name](VP()), 20000, VP()
    state = torch.get_rng_state()
    weights, means, covs = DENSE[name]
    w = torch.tensor(weights, dtype=DOUBLE)
    mean = w @ means
    cov = torch.einsum("k,kde->de", w, covs + means[:, :, None] * means[:, None]) - torch.outer(mean, mean)
    for t in (0.0, 0.5):
        a, s = float(path.alpha(t)), float(path.sigma(t))
        x = law.sample(n, t, seed=5, dtype=DOUBLE)
        total = a * a * cov + s * s * torch.eye(D, dtype=DOUBLE)
        assert ((x.mean(0) - a * mean) / (total.diag() / n).sqrt()).abs().max() < 4.5
        z = (torch.cov(x.T) - total) / ((total.diag()[:, None] * total.diag() + total**2) / n).sqrt()
        assert z.abs().max() < 6
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(law.sample(3, 0.5, seed=1), law.sample(3, 0.5, seed=1))
    assert not torch.equal(law.sample(3, 0.5, seed=1), law.sample(3, 0.5, seed=2))
    g = torch.Generator().manual_seed(1)
    assert torch.equal(law.sample(3, 0.5, g), law.sample(3, 0.5, seed=1))
    assert not torch.equal(law.sample(3, 0.5, g), law.sample(3, 0.5, 1))


# ---------------------------------------------------------------- disguised as networks


CONVENTIONS = {
    "t": (None, None, None),
    "999 t": (lambda t: 999 * t, lambda c: c / 999, None),
    "log sigma / 4": (lambda t: t.log() / 4, lambda c: (4 * c).exp(), lambda t: (t * t + 0.25) ** -0.5),
    "reversed": (lambda t: 80 - t, lambda c: 80 - c, lambda t: 1 + t),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@settings(max_examples=15, deadline=None)
@given(u=st.floats(0.02, 0.98), predicts=st.sampled_from(sorted(OUTPUTS)), convention=st.sampled_from(sorted(CONVENTIONS)))
def test_every_row_and_label_around_an_exact_score_predicts_the_same(path, u, predicts, convention):
    (t,) = times(path, u)
    exact = LAWS["mixture diagonal"](path)
    label, time, scale = CONVENTIONS[convention]
    network = as_network(exact, path, predicts, time=time, scale=scale, sigma_data=0.7)
    score = Score(network, path, predicts, label=label, scale=scale, sigma_data=0.7)
    x = exact.sample(3, t, seed=0, dtype=DOUBLE)
    expected, grad = exact.predict(x, t), exact(x, t)
    size = 1e-10 * (1 + x.abs().max())
    for when in (t, torch.full((3,), t, dtype=DOUBLE)):
        pair = score.predict(x, when)
        assert (pair.x0 - expected.x0).abs().max() < size
        assert (pair.eps - expected.eps).abs().max() < size / min(1, path.sigma(t))
        assert (score(x, when) - grad).abs().max() < size * (1 + grad.abs().max()) / min(1, path.sigma(t))


def test_as_network_takes_pairs_times_a_sample_and_another_path():
    exact = LAWS["mixture diagonal"](VP())
    network = as_network(exact, Linear(), (lambda t: 1 + t, -2.0))
    score = Score(network, Linear(), (lambda t: 1 + t, -2.0))
    x, t = exact.sample(3, 0.5, dtype=DOUBLE), torch.tensor([0.1, 0.5, 0.9], dtype=DOUBLE)
    assert (score.predict(x, t).x0 - exact.on(Linear()).predict(x, t).x0).abs().max() < 1e-12
    with pytest.raises(InputError, match="did you mean"):
        as_network(exact, VP(), "epss")


# ---------------------------------------------------------------- bad arguments


SKEW = [[1.0, 0.5], [0.0, 1.0]]
INDEFINITE = [[1.0, 2.0], [2.0, 1.0]]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Gaussian("VP", [0.0], std=1.0), ["path", "str"]),
        (lambda: Gaussian(VP(), [0.0, 0.0]), ["no covariance", "cov, std, var, factor"]),
        (lambda: Gaussian(VP(), [0.0, 0.0], std=1.0, var=1.0), ["std and var"]),
        (lambda: Gaussian(VP(), [0.0, 0.0], std=1.0, diag=1.0), ["diag"]),
        (lambda: Gaussian(VP(), [0.0, 0.0], std=-1.0), ["std", "-1", ">= 0"]),
        (lambda: Gaussian(VP(), [0.0, 0.0], var=[1.0, -0.5]), ["var", "-0.5"]),
        (lambda: Gaussian(VP(), [0.0, 0.0], var=[1.0, 1.0, 1.0]), ["var", "(3,)", "2"]),
        (lambda: Gaussian(VP(), [0.0, 0.0], SKEW), ["cov", "not symmetric", "[0, 1] = 0.5"]),
        (lambda: Gaussian(VP(), [0.0, 0.0], INDEFINITE), ["cov", "semi-definite", "-1"]),
        (lambda: Gaussian(VP(), [0.0, 0.0], torch.eye(3)), ["cov", "(3, 3)"]),
        (lambda: Gaussian(VP(), [0.0, 0.0], [1.0, -1.0]), ["cov", "-1"]),
        (lambda: Gaussian(VP(), [0.0, math.nan], std=1.0), ["mean", "nan"]),
        (lambda: Gaussian(VP(), "mean", std=1.0), ["mean", "str"]),
        (lambda: Gaussian(VP(), torch.tensor([1j, 0]), std=1.0), ["mean", "complex"]),
        (lambda: Gaussian(VP(), [0.0, 0.0], factor=torch.zeros(3, 1)), ["factor", "(3, 1)", "(2, r)"]),
        (lambda: Gaussian(VP(), [0.0, 0.0], factor=torch.zeros(2)), ["factor"]),
        (lambda: Gaussian(VP(), [0.0, 0.0], factor=torch.ones(2, 1), diag=-0.1), ["diag", "-0.1"]),
        (lambda: GaussianMixture(VP(), [0.5, 0.6], [[0.0], [1.0]], [1.0, 1.0]), ["weights", "1.1", "sum to 1"]),
        (lambda: GaussianMixture(VP(), [1.5, -0.5], [[0.0], [1.0]], [1.0, 1.0]), ["weights", "-0.5"]),
        (lambda: GaussianMixture(VP(), [], [], []), ["weights", "(0,)"]),
        (lambda: GaussianMixture(VP(), 1.0, [[0.0]], [1.0]), ["weights", "()"]),
        (lambda: GaussianMixture(VP(), [1.0], [[0.0], [1.0]], [1.0]), ["means", "(2, 1)"]),
        (lambda: GaussianMixture(VP(), [0.5, 0.5], [[0.0, 0.0]] * 2, torch.ones(3)), ["covs", "(3,)"]),
        (lambda: GaussianMixture(VP(), [0.5, 0.5], [[0.0, 0.0]] * 2, [SKEW] * 2), ["covs[0]", "not symmetric"]),
        (
            lambda: GaussianMixture(VP(), [0.5, 0.5], [[0.0, 0.0]] * 2, [np.eye(2).tolist(), INDEFINITE]),
            ["covs[1]", "semi-definite"],
        ),
        (lambda: GaussianMixture(VP(), [0.5, 0.5], [[0.0, 0.0]] * 2, [1.0, -1.0]), ["covs", "-1"]),
        (lambda: Empirical(VP(), torch.zeros(0, 2)), ["data", "(0, 2)"]),
        (lambda: Empirical(VP(), 1.0), ["data", "()"]),
        (lambda: Empirical(VP(), [[math.inf]]), ["data", "inf"]),
        (lambda: Empirical(VP(), torch.tensor([[math.nan]])), ["data", "finite"]),
        (lambda: Gaussian(VP(), [0.0], std=1.0).on("VP"), ["path", "str"]),
        (lambda: GaussianMixture(VP(), [0.5, 0.5], [[0.0], [1.0]], 0.02), ["covs", "()", "(2,)"]),
        (lambda: Gaussian(VP(), [0.0], std=1.0).sample(-1), ["n=-1"]),
        (lambda: Gaussian(VP(), [0.0], std=1.0).sample(2.0), ["n=2.0"]),
        (lambda: Gaussian(VP(), [0.0], std=1.0).sample(2, 3.0), ["domain"]),
        (lambda: Gaussian(VP(), [0.0], std=1.0)(torch.zeros(3, 2), 0.5), ["(3, 2)", "(B, 1)"]),
        (lambda: Gaussian(VP(), [0.0], std=1.0)(torch.zeros(3, 1), 2.0), ["domain"]),
        (lambda: Gaussian(VP(), [0.0], std=1.0)(np.zeros((3, 1)), 0.5), ["from_numpy"]),
        (lambda: Gaussian(VP(), [0.0], std=1.0)(torch.zeros(3, 1), 0.5, y=1), ["conditions y"]),
        (lambda: Gaussian(VP(), [0.0], std=1.0).at([VP().knot(0.5)], torch.zeros(3, 1), {"y": 1}, Tally()), ["conditions y"]),
        (lambda: Gaussian(VP(), [0.0], std=1.0).at([VP().knot(0.5)], torch.zeros(3, 2), {}, Tally()), ["(3, 2)"]),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(InputError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_zero_weights_are_allowed():
    law = GaussianMixture(VP(), [1.0, 0.0], MEANS, VARS)
    alone = Gaussian(VP(), MEANS[0], var=VARS[0])
    x = alone.sample(4, 0.3, dtype=DOUBLE)
    for t in (0.0, 0.3, 1.0):
        assert (law(x, t) - alone(x, t)).abs().max() < 1e-12 * (1 + alone(x, t).abs().max())
    assert (law.log_prob(x, 0.3) - alone.log_prob(x, 0.3)).abs().max() < 1e-12
