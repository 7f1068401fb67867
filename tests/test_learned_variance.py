"""The ancestral step with a learned variance: against the published formulas, and exact where the variance is the true one."""

from __future__ import annotations

import math

import pytest
import torch
from fake_backbones import Given, Smooth, relative

from scores import Gaussian, Score
from scores.adapters import from_guided_diffusion
from scores.adapters.guided_diffusion import respaced, space_timesteps
from sde import EDM, Tabulated
from sde.errors import InputError, NetworkError, PathError
from solvers import encode, integrate, sample, trace
from solvers.base import Evaluator
from solvers.learned_variance import LearnedVariance

BETAS = torch.linspace(1e-3, 0.2, 40, dtype=torch.float64)
TABLE = Tabulated(tuple(BETAS.tolist()))


def published(network, x, entries, normals):
    """p_sample_loop of guided_diffusion with LEARNED_RANGE, without clipping, on the respaced table of ``entries``."""
    acp = torch.cumprod(1 - BETAS, 0)[list(entries)]
    before = torch.cat([torch.ones(1, dtype=torch.float64), acp[:-1]])
    betas = 1 - acp / before
    variance = betas * (1 - before) / (1 - acp)
    log_small = torch.log(torch.cat([variance[1:2], variance[1:]]))
    for i in reversed(range(len(entries))):
        out = network(x, torch.full((len(x),), entries[i], dtype=x.dtype))
        eps, v = out.chunk(2, 1)
        x0 = (x - (1 - acp[i]).sqrt() * eps) / acp[i].sqrt()
        mean = betas[i] * before[i].sqrt() / (1 - acp[i]) * x0 + (1 - before[i]) * (1 - betas[i]).sqrt() / (1 - acp[i]) * x
        share = (v + 1) / 2
        log_variance = share * torch.log(betas[i]) + (1 - share) * log_small[i]
        x = mean + (torch.exp(0.5 * log_variance) * normals[len(entries) - 1 - i] if i > 0 else 0.0)
    return x


@pytest.mark.parametrize("sections", ["40", "ddim10", "3,2,5", [7]])
def test_the_published_loop(sections):
    network = Smooth(out=4, scale=0.05).double()
    entries = space_timesteps(40, sections)
    normals = list(torch.randn(len(entries), 3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    score = from_guided_diffusion(network, TABLE)
    with torch.no_grad():
        theirs = published(network, x, entries, normals)
    ours = sample(score, x=x, solver=LearnedVariance(), grid=respaced(sections), steps=len(entries), noise=Given(normals))
    assert ours.nfe == len(entries)
    assert float(ours.times[-1]) == 0.0
    assert relative(ours.x, theirs) < 1e-12


def test_the_true_variance_samples_the_true_law_in_any_number_of_steps():
    """For Gaussian data the reverse kernel is normal with variance beta_tilde + c^2 Cov[x0 | x]; told so, the chain is exact.

    The chain is affine in its normals, so its law is measured by giving it one normal at a time.
    """
    variances = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)  # from beta_tilde to beta itself
    data = Gaussian(TABLE, torch.tensor([0.7, -1.0, 0.2]), var=variances)
    acp = torch.cumprod(1 - BETAS, 0)

    def network(x, k):
        k = int(k[0])
        before = acp[k - 1] if k else torch.tensor(1.0, dtype=torch.float64)
        beta = BETAS[k]
        small = beta * (1 - before) / (1 - acp[k])
        c = beta * before.sqrt() / (1 - acp[k])
        true = small + c**2 * variances * (1 - acp[k]) / (acp[k] * variances + 1 - acp[k])
        share = (torch.log(true) - torch.log(small)) / (torch.log(beta) - torch.log(small)) if k else torch.zeros(3)
        eps = data.predict(x, float(TABLE.time_of(k))).eps
        return torch.cat([eps, (2 * share - 1).expand_as(x)], 1)

    steps = 39
    score = from_guided_diffusion(network, TABLE)
    gains = torch.cat(
        [torch.zeros(1, steps + 1), torch.eye(steps + 1)]
    ).double()  # no normal at all, then one each, first the start
    start, end = 1.0, float(TABLE.time_of(0))
    mean, std = data.mean * float(TABLE.alpha(start)), torch.sqrt(variances * acp[-1] + 1 - acp[-1])
    x = mean + gains[:, :1] * std
    normals = [gains[:, 1 + i : 2 + i].expand(-1, 3) for i in range(steps)]
    times = TABLE.time_of(torch.arange(39, -1, -1)).tolist()
    out = integrate(LearnedVariance(), score, x, times, noise=Given(normals)).x
    assert times[-1] == end
    reached = (out[1:] - out[0]).square().sum(0)
    assert relative(out[0], data.mean * acp[0].sqrt()) < 1e-12
    assert relative(reached, variances * acp[0] + 1 - acp[0]) < 1e-10
    # and the fixed variance of 'ddpm' is not the law's
    ddpm = integrate("ddpm", score, x, times, noise=Given(normals)).x
    assert float(((ddpm[1:] - ddpm[0]).square().sum(0) / reached - 1).abs().max()) > 0.05


def constant(share):
    data = Gaussian(TABLE, torch.zeros(2, 2, 2), var=0.4)

    def network(x, t):
        return torch.cat([data.predict(x, (t + 1) / len(BETAS)).eps, torch.full_like(x, 2 * share - 1)], 1)

    return from_guided_diffusion(network, TABLE)


def test_the_lower_bound_is_ddpm_and_the_upper_is_beta():
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ddpm = sample(constant(0.0), x=x, solver="ddpm", steps=9, grid="uniform", stop=0.0, seed=4)
    mine = sample(constant(0.0), x=x, solver=LearnedVariance(), steps=9, grid="uniform", stop=0.0, seed=4)
    assert relative(mine.x, ddpm.x) < 1e-12
    z = torch.ones_like(x)
    s, t = 0.8, 0.45
    low, high = (integrate(LearnedVariance(), constant(0.5), x, [s, t], noise=Given([f * z])).x for f in (0.0, 1.0))
    ratio = float((TABLE.alpha(s) / TABLE.alpha(t)) ** 2)
    small = (1 - ratio) * float((TABLE.sigma(t) / TABLE.sigma(s)) ** 2)
    assert relative(high - low, z * ((1 - ratio) * small) ** 0.25) < 1e-12  # half way in the logarithm
    one = integrate(LearnedVariance(), constant(1.0), x, [s, t], noise=Given([z])).x
    zero = integrate(LearnedVariance(), constant(1.0), x, [s, t], noise=Given([0 * z])).x
    assert relative(one - zero, z * math.sqrt(1 - ratio)) < 1e-12


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_law_converges_with_order_one(share):
    path = Tabulated.linear(1000)
    data = Gaussian(path, torch.zeros(1), var=0.4)
    score = from_guided_diffusion(lambda x, t: torch.cat([data.predict(x, (t + 1) / 1000).eps, 0 * x + 2 * share - 1], 1), path)
    errors = []
    for n in (50, 100):
        gains = torch.eye(n + 1, dtype=torch.float64)
        x = gains[:, :1] * math.sqrt(0.4 * float(path.alpha(1.0)) ** 2 + float(path.sigma(1.0)) ** 2)
        normals = [gains[:, i + 1 : i + 2] for i in range(n)]
        out = sample(score, x=x, solver=LearnedVariance(), steps=n, grid="log_snr", stop=0.01, noise=Given(normals)).x
        truth = 0.4 * float(path.alpha(0.01)) ** 2 + float(path.sigma(0.01)) ** 2
        errors.append(float(out.square().sum()) / truth - 1.0)
    assert 0.9 < math.log2(errors[0] / errors[1]) < 1.15


def test_what_cannot_be_done_is_said():
    x = torch.randn(2, 2, 2, 2)
    plain = Score(lambda x, t: x, TABLE)
    with pytest.raises(InputError, match="Score has no learned variance: use solver='ddpm'"):
        sample(plain, x=x, solver=LearnedVariance(), steps=2)
    with pytest.raises(InputError, match="Gaussian has no learned variance"):
        sample(Gaussian(TABLE, torch.zeros(2, 2, 2), var=1.0), x=x, solver=LearnedVariance(), steps=2)
    fixed = from_guided_diffusion(lambda x, t: x, TABLE)  # C channels: eps alone
    assert sample(fixed, x=x, solver="ddpm", steps=2).x.isfinite().all()
    with pytest.raises(NetworkError, match=r"\(2, 2, 2, 2\) for a state \(2, 2, 2, 2\) has no learned variance"):
        sample(fixed, x=x, solver=LearnedVariance(), steps=2)
    score = from_guided_diffusion(lambda x, t: torch.cat([x, x], 1), TABLE)
    with pytest.raises(InputError, match="stochastic"):
        encode(score, x, solver=LearnedVariance(), steps=2)
    with pytest.raises(InputError, match="towards data"):
        integrate(LearnedVariance(), score, x, [0.2, 0.5])
    with pytest.raises(PathError, match="variance-preserving"):
        sample(Score(lambda x, t: torch.cat([x, x], 1), EDM(), split="learned_var"), x=x, solver=LearnedVariance(), steps=2)
    with pytest.raises(InputError, match="not linear"):
        trace(LearnedVariance(), TABLE, [1.0, 0.5])


def test_a_run_prepares_its_network_once():
    """All labels are made and moved before the loop, which then never waits for a device."""
    prepared = []

    class Counting(Score):
        def with_variance(self, knots, *rest):
            prepared.append(len(knots))
            return super().with_variance(knots, *rest)

    score = Counting(lambda x, t: torch.cat([x, x], 1), TABLE, label=TABLE.index, split="learned_var")
    sample(score, shape=(2, 2, 2, 2), solver=LearnedVariance(), steps=5)
    assert prepared == [6]
    start, stop = TABLE.knot(0.9), TABLE.knot(0.4)
    alone = Evaluator(score, torch.ones(2, 2, 2, 2))  # a loop that prepares nothing
    for knot in (start, stop, start):
        alone.predict_with_variance(alone.x, knot)
    assert prepared == [6, 1, 1]


def test_a_network_that_fails_in_its_second_half_is_located():
    def network(x, t):
        return torch.cat([x, x / 0 if float(t[0]) < 20 else x], 1)

    score = from_guided_diffusion(network, TABLE)
    with pytest.raises(NetworkError, match="non-finite network output") as error:
        sample(score, x=torch.randn(2, 2, 2, 2), solver=LearnedVariance(), steps=4, grid="uniform", stop=0.0)
    assert error.value.step == 3 - 1
    assert error.value.t == pytest.approx(0.5)
