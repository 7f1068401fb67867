"""The bounds of DDPM and VDM against closed forms on Gaussian data, their error bars, and the likelihood they bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from scores import Gaussian, Score, as_network, ddpm_elbo, vdm_elbo
from sde import EDM, VE, VP, ForwardSDE, Linear, Tabulated, bits_per_dim
from sde.errors import InputError, PathError, TrainModeWarning
from sde.noise import White
from solvers.grids import make_grid

DOUBLE = torch.float64
VAR = torch.tensor([0.3, 1.4, 0.02], dtype=DOUBLE)
MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=DOUBLE)
PATHS = {"VP": VP(), "EDM": EDM(), "Linear": Linear(), "VE": VE(), "table": Tabulated.linear(8, 0.02, 0.7)}


def law_on(path):
    return Gaussian(path, MEAN, var=VAR)


def points(n=6):
    return MEAN + VAR.sqrt() * torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


def x0_error(path, x0, t):
    """E |x0 - E[x0 | x_t]|^2 over the noise, for given x0: bias and spread of the linear filter, (..., d)."""
    alpha, sigma = (fn(torch.as_tensor(t, dtype=DOUBLE))[..., None, None] for fn in (path.alpha, path.sigma))
    total = alpha**2 * VAR + sigma**2
    return (sigma**2 / total * (x0 - MEAN)) ** 2 + (alpha * VAR * sigma / total) ** 2


def gaussian_kl(mean_q, var_q, mean_p, var_p):
    """From torch's own distributions."""
    q, p = (
        torch.distributions.Normal(m, torch.as_tensor(v, dtype=DOUBLE).sqrt()) for m, v in ((mean_q, var_q), (mean_p, var_p))
    )
    return torch.distributions.kl_divergence(q, p).sum(-1)


def chain(path):
    if isinstance(path, Tabulated):
        return [(k + 1) / 8 for k in range(7, -1, -1)]
    return make_grid("log_snr", path, 6).tolist()


@pytest.mark.parametrize("variance", ["posterior", "forward"])
@pytest.mark.parametrize("name", PATHS)
def test_a_chain_of_steps_has_its_closed_form(name, variance):
    """Each part of the bound at given x0: expectations of exact Gaussian KLs, by moments; |z| < 4 of the mean over draws."""
    path, x0, draws = PATHS[name], points(), 60
    times = chain(path)
    out = ddpm_elbo(law_on(path), x0, None if name == "table" else times, variance=variance, draws=draws, decoder_std=0.3)
    forward = ForwardSDE(path)
    expected = torch.zeros(6, dtype=DOUBLE)
    for s, t in itertools.pairwise(times):
        zero, unit = torch.zeros(6, 3, dtype=DOUBLE), torch.ones(6, 3, dtype=DOUBLE)
        gain = forward.posterior(unit, zero, t=t, s=s)[0]  # of x0 in the mean of q
        var_q = float(forward.posterior(unit, zero, t=t, s=s)[1]) ** 2
        var_p = var_q if variance == "posterior" else float(forward.transition(t, s)[1]) ** 2
        expected += gaussian_kl(torch.sqrt(gain**2 * x0_error(path, x0, s)), var_q, zero, var_p)
    decoder = 1.5 * math.log(2 * math.pi * 0.3**2) + x0_error(path, x0, times[-1]).sum(-1) / (2 * 0.3**2)
    alpha, sigma = float(path.alpha(times[0])), float(path.sigma(times[0]))
    prior = gaussian_kl(alpha * x0, sigma**2, torch.zeros_like(x0), path.prior_std(times[0]) ** 2)
    torch.testing.assert_close(out.prior, prior, rtol=1e-9, atol=1e-9)
    z = (out.diffusion + out.decoder - expected - decoder) / out.standard_error
    assert float(z.abs().max()) < 4.0, z
    assert float((out.diffusion - expected).abs().max()) < 4.5 * float(out.standard_error.max())
    assert float(out.standard_error.max()) < 0.3 * float(expected.mean())
    torch.testing.assert_close(out.log_prob, -(out.prior + out.diffusion + out.decoder))
    assert out.nfe == out.net_evals == draws * len(times)


@pytest.mark.parametrize("name", ["VP", "EDM", "Linear", "VE"])
def test_continuous_time_has_its_closed_form(name):
    """int E|eps - eps'|^2 dlam by Simpson's rule at given x0; the decoder and the prior exactly; |z| < 4."""
    path, x0, t_min = PATHS[name], points(), {"VP": 0.01, "EDM": 0.05, "Linear": 0.05, "VE": 0.2}[name]
    out = vdm_elbo(law_on(path), x0, t_min=t_min, draws=120, seed=1)
    last = path.T if name != "Linear" else 1.0 - 1e-9  # lambda is finite, and the rest of the integral below 1e-15
    lam = torch.linspace(float(path.lam(last)), float(path.lam(t_min)), 4001, dtype=DOUBLE)
    t = path.time(lam)
    snr = torch.exp(2 * lam)[:, None]
    values = snr * x0_error(path, x0, t).sum(-1)
    weights = torch.full((4001,), 2.0, dtype=DOUBLE)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    expected = (weights[:, None] * values).sum(0) * (lam[1] - lam[0]) / 3
    z = (out.diffusion - expected) / out.standard_error
    assert float(z.abs().max()) < 4.0, z
    assert float(out.standard_error.max()) < 0.1 * float(expected.mean())
    std = float(path.sigma(t_min) / path.alpha(t_min))
    torch.testing.assert_close(out.decoder, torch.full((6,), 3 * (0.5 * math.log(2 * math.pi * std**2) + 0.5), dtype=DOUBLE))
    prior = gaussian_kl(
        float(path.alpha(path.T)) * x0, float(path.sigma(path.T)) ** 2, torch.zeros_like(x0), path.prior_std() ** 2
    )
    torch.testing.assert_close(out.prior, prior, rtol=1e-9, atol=1e-9)
    assert out.nfe == 120


def test_error_bars_are_those_of_repetitions():
    """600 copies of one sample, each with its own stream: the mean square error is the mean square of the bars; coverage."""
    path, n = VP(), 600
    x0 = points(1).expand(n, 3).contiguous()
    for make in (
        lambda: ddpm_elbo(law_on(path), x0, chain(path), draws=6, decoder_std=0.3),
        lambda: vdm_elbo(law_on(path), x0, draws=24),
        lambda: vdm_elbo(law_on(path), x0 - x0, draws=24, levels=(-1.0, 1.0, 3)),
    ):
        out = make()
        error = out.log_prob - out.log_prob.mean()
        excess = error.square() * n / (n - 1) - out.standard_error.square()
        assert abs(float(excess.mean() / excess.std())) * math.sqrt(n) < 3.5
        covered = float((error.abs() < 2.5706 * out.standard_error).double().mean())  # Student's t of 5 degrees, or more
        assert 0.9 < covered <= 1.0
    assert ddpm_elbo(law_on(path), x0[:2], chain(path)).standard_error is None


def test_the_bounds_are_below_the_likelihood_and_tighten():
    """For the exact score, in the mean over the data: many steps are better than few, continuous time better still."""
    path = VP()
    law = law_on(path)
    x0 = law.sample(800, seed=5, dtype=DOUBLE)
    exact = law.log_prob(x0)
    bounds = [ddpm_elbo(law, x0, make_grid("log_snr", path, n)).log_prob.mean() for n in (4, 16, 64)]
    bounds.append(vdm_elbo(law, x0, draws=32).log_prob.mean())
    gaps = [float(exact.mean() - b) for b in bounds]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0
    # E[-ELBO] - H(x0) of the continuous bound is KL(q(x_T)|p) + sum of log(1 + 1/SNR_data) / 2, the width of the decoder
    sigma, alpha = float(path.sigma(path.t_min)), float(path.alpha(path.t_min))
    a, s = float(path.alpha(path.T)), float(path.sigma(path.T))
    prior_gap = gaussian_kl(a * MEAN, a**2 * VAR + s**2, torch.zeros(3, dtype=DOUBLE), 1.0)
    width = 0.5 * torch.log1p((sigma / alpha) ** 2 / VAR).sum()
    out = vdm_elbo(law, x0, draws=32)
    difference = exact - out.log_prob
    assert abs(float(difference.mean() - prior_gap - width)) < 4 * float(difference.std()) / math.sqrt(800)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "velocity", "F", "score"])
def test_what_the_network_predicts_makes_no_difference(predicts):
    for path in (VP(), EDM(T=4.0)):
        law, x0, times = law_on(path), points(3), [0.9 * path.T, 0.5, 0.1]
        score = Score(as_network(law, path, predicts, sigma_data=0.7), path, predicts, sigma_data=0.7)
        for make in (lambda s, x=x0, t=times: ddpm_elbo(s, x, t, draws=2), lambda s, x=x0: vdm_elbo(s, x, draws=4)):
            expected, out = make(law), make(score)
            torch.testing.assert_close(out.log_prob, expected.log_prob, rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(out.standard_error, expected.standard_error, rtol=1e-6, atol=1e-7)


def test_an_untrained_network_pays_what_it_is_wrong_by():
    """x0' = c for every input: each KL is known without an expectation, whatever the noise."""
    path, x0 = Tabulated.linear(5, 0.1, 0.5, zero_terminal_snr=True), points(4)
    score = Score(lambda x, t: torch.full_like(x, 0.2), path, "x0")
    out = ddpm_elbo(score, x0, draws=3)
    snr = [float(torch.exp(2 * path.lam(t))) for t in (1.0, 0.8, 0.6, 0.4, 0.2)]
    assert snr[0] == 0.0
    square = (x0 - 0.2).square().sum(1)
    torch.testing.assert_close(out.diffusion, 0.5 * (snr[-1] - snr[0]) * square, rtol=1e-9, atol=1e-9)  # it telescopes
    assert float(out.prior.abs().max()) == 0.0
    std = float(ForwardSDE(path).posterior(x0, x0, t=0.2, s=0.4)[1])
    torch.testing.assert_close(out.decoder, 1.5 * math.log(2 * math.pi * std**2) + square / (2 * std**2))
    torch.testing.assert_close(out.standard_error, torch.zeros(4, dtype=DOUBLE), rtol=0, atol=1e-9)
    with pytest.raises(PathError, match="alpha = 0"):
        ddpm_elbo(Score(lambda x, t: x, path, "eps"), x0)


def test_the_times_of_continuous_time_are_fair():
    """x0' = c leaves the time as the only chance: the integral of its error is (SNR_0 - SNR_T) |x0 - c|^2 / 2."""
    path, n = VP(), 2000
    x0 = points(1).expand(n, 3).contiguous()
    expected = 0.5 * float((torch.exp(2 * path.lam(0.4)) - torch.exp(2 * path.lam(1.0))) * (x0[0] - 0.2).square().sum())
    for draws in (2, 8):
        out = vdm_elbo(Score(lambda x, t: torch.full_like(x, 0.2), path, "x0"), x0, t_min=0.4, draws=draws)
        error = out.diffusion - expected
        assert abs(float(error.mean() / error.std())) * math.sqrt(n) < 4.0
        excess = error.square() - out.standard_error.square()
        assert abs(float(excess.mean() / excess.std())) * math.sqrt(n) < 4.0
        assert float(out.standard_error.median()) > 0.0
    assert float(error.std()) < 0.3 * expected


def test_learned_variances_lie_between_their_bounds():
    """v = -1 is "posterior", v = +1 "forward"; in between, torch's own KL with the geometric mean."""
    path = Tabulated.linear(4, 0.1, 0.5)
    x0 = points(3).reshape(3, 3, 1)
    kl = {}
    for v in (-1.0, 0.0, 1.0):
        score = Score(lambda x, t, v=v: torch.cat([0.3 * x, torch.full_like(x, v)], 1), path, "eps", split="learned_var")
        kl[v] = ddpm_elbo(score, x0, variance="learned").diffusion
    for v, variance in ((-1.0, "posterior"), (1.0, "forward")):
        fixed = ddpm_elbo(Score(lambda x, t: 0.3 * x, path, "eps"), x0, variance=variance).diffusion
        torch.testing.assert_close(kl[v], fixed)
    (s, t), forward = (0.5, 0.25), ForwardSDE(path)
    score = Score(lambda x, t: torch.cat([0.3 * x, torch.zeros_like(x)], 1), path, "eps", split="learned_var")
    out = ddpm_elbo(score, x0, [s, t], variance="learned", seed=3)
    z = White(3).open((3, 3, 1), DOUBLE)
    first, second = (z.normal((1 << 34) + i, path.knot(s), path.knot(t)) for i in (0, 1))
    xs = path.alpha(s) * x0 + path.sigma(s) * first
    guess = (xs - path.sigma(s) * 0.3 * xs) / path.alpha(s)
    (mean_q, std_q), (mean_p, _) = (forward.posterior(x, xs, t=t, s=s) for x in (x0, guess))
    small, large = float(std_q) ** 2, float(forward.transition(t, s)[1]) ** 2
    expected = gaussian_kl(mean_q.flatten(1), small, mean_p.flatten(1), math.sqrt(small * large))
    torch.testing.assert_close(out.diffusion, expected, rtol=1e-9, atol=1e-9)
    xt = path.alpha(t) * x0 + path.sigma(t) * second
    guess = ((xt - path.sigma(t) * 0.3 * xt) / path.alpha(t)).flatten(1)
    spread = (small * float(path.sigma(t)) ** 2) ** 0.25
    decoder = -torch.distributions.Normal(guess, spread).log_prob(x0.flatten(1)).sum(1)
    torch.testing.assert_close(out.decoder, decoder, rtol=1e-9, atol=1e-9)


def test_a_decoder_of_levels_is_a_probability():
    """Over all levels the decoder's masses sum to one, and the outer ones take the tails; bits need no scale."""
    path, n = Tabulated.linear(4, 0.1, 0.5), 5
    values = torch.linspace(-1.0, 1.0, n, dtype=DOUBLE)[:, None]
    for centre, std in ((0.3, 0.4), (5.0, 0.1), (-0.2, 1e-3), (0.0, 30.0)):
        score = Score(lambda x, t, c=centre: torch.full_like(x, c), path, "x0")
        out = ddpm_elbo(score, values, levels=(-1.0, 1.0, n), decoder_std=std)
        assert out.decoder.isfinite().all()
        assert abs(float(torch.exp(-out.decoder).sum()) - 1.0) < 1e-9
        if std < 1.0:
            assert int(out.decoder.argmin()) == int((values[:, 0] - centre).abs().argmin())
    middle = torch.special.ndtr(torch.tensor([(0.25 - 0.3) / 0.4, (-0.25 - 0.3) / 0.4], dtype=DOUBLE))
    score = Score(lambda x, t: torch.full_like(x, 0.3), path, "x0")
    out = ddpm_elbo(score, values, levels=(-1.0, 1.0, n), decoder_std=0.4)
    torch.testing.assert_close(out.decoder[2], -(middle[0] - middle[1]).log())
    torch.testing.assert_close(out.bits_per_dim(), -out.log_prob / math.log(2))
    far = ddpm_elbo(score, values, levels=(-1.0, 1.0, n), decoder_std=0.01)
    assert far.decoder.isfinite().all()  # 125 standard deviations away
    assert float(far.decoder[0]) > 1000
    with pytest.raises(InputError, match="already"):
        out.bits_per_dim(scale=2.0, bins=5)
    density = ddpm_elbo(score, values, decoder_std=0.4)
    torch.testing.assert_close(
        density.bits_per_dim(scale=2.0, bins=256), bits_per_dim(density.log_prob, (5, 1), scale=2.0, bins=256)
    )
    with pytest.raises(InputError, match="say what the data are"):
        density.bits_per_dim()
    continuous = vdm_elbo(score, values, levels=(-1.0, 1.0, n), t_min=0.25, draws=4)
    assert float(continuous.decoder.min()) > 0.0


def test_sample_i_depends_on_seed_and_i_alone():
    law, x0 = law_on(Linear()), points(5)
    for make in (
        lambda x, **k: ddpm_elbo(law, x, [0.9, 0.5, 0.1], draws=2, **k),
        lambda x, **k: vdm_elbo(law, x, draws=4, **k),
    ):
        whole = make(x0, seed=2)
        part = make(x0[[3, 1]], noise=White(2, indices=[3, 1]))
        torch.testing.assert_close(part.log_prob, whole.log_prob[[3, 1]], rtol=1e-12, atol=1e-12)
        lone = make(x0[1:2], seed=9)
        torch.testing.assert_close(make(x0[:2], seeds=[4, 9]).log_prob[1:], lone.log_prob, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(make(x0, seed=3).log_prob, whole.log_prob)
        empty = make(x0[:0])
        assert empty.log_prob.shape == (0,)
        assert empty.nfe == 0
        single = make(x0.float(), seed=2)
        torch.testing.assert_close(single.log_prob, whole.log_prob, rtol=1e-4, atol=1e-4)
    image = Gaussian(Linear(), torch.zeros(1, 3, 1), std=0.5)
    flat = Gaussian(Linear(), torch.zeros(3), std=0.5)
    torch.testing.assert_close(vdm_elbo(image, x0.reshape(5, 1, 3, 1)).log_prob, vdm_elbo(flat, x0).log_prob)


def test_conditions_and_modes_reach_the_network():
    def network(x, t, y):
        return 0 * x + y[:, None]

    score, x0, y = Score(network, VP(), "x0"), points(2), torch.tensor([0.1, 0.4], dtype=DOUBLE)
    out = ddpm_elbo(score, x0, [0.9, 0.4], conditions={"y": y})
    snr = [float(torch.exp(2 * VP().lam(t))) for t in (0.9, 0.4)]
    torch.testing.assert_close(out.diffusion, 0.5 * (snr[1] - snr[0]) * (x0 - y[:, None]).square().sum(1))
    assert vdm_elbo(score, x0, conditions={"y": y}).log_prob.isfinite().all()

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x, t):
            return self.drop(x)

    net = Net()
    for make in (lambda s: ddpm_elbo(s, x0, [0.9, 0.4]), lambda s: vdm_elbo(s, x0)):
        with pytest.warns(TrainModeWarning):
            make(Score(net, VP()))
        evaluated = make(Score(net, VP(), mode="eval"))
        torch.testing.assert_close(evaluated.log_prob, make(Score(lambda x, t: x, VP())).log_prob)
        assert not evaluated.log_prob.requires_grad


X, LAW = torch.zeros(2, 3), Gaussian(VP(), torch.zeros(3), std=1.0)
BAD = {
    "no score": (lambda: vdm_elbo(None, X), "wrap the network"),
    "no times": (lambda: ddpm_elbo(LAW, X), "only a table"),
    "increasing times": (lambda: ddpm_elbo(LAW, X, [0.1, 0.5]), "strictly decreasing"),
    "one time": (lambda: ddpm_elbo(LAW, X, [0.1]), "at least two"),
    "an end without noise": (lambda: ddpm_elbo(LAW, X, [0.5, 0.0]), "the bound is infinite"),
    "a start without noise": (lambda: vdm_elbo(LAW, X, t_min=0.0), "the bound is infinite"),
    "times swapped": (lambda: vdm_elbo(LAW, X, t_min=0.5, t_max=0.2), "t_min < t_max"),
    "t_min": (lambda: vdm_elbo(LAW, X, t_min=-1.0), "t_min=-1.0"),
    "variance": (lambda: ddpm_elbo(LAW, X, [0.5, 0.1], variance="fixed_small"), "posterior"),
    "no learned variance": (lambda: ddpm_elbo(LAW, X, [0.5, 0.1], variance="learned"), "no learned variance"),
    "decoder of a learned variance": (lambda: ddpm_elbo(LAW, X, [0.5, 0.1], variance="learned", decoder_std=1.0), "its own"),
    "decoder_std": (lambda: ddpm_elbo(LAW, X, [0.5, 0.1], decoder_std=0.0), "decoder_std=0.0"),
    "prior_std": (lambda: vdm_elbo(LAW, X, prior_std=-1.0), "prior_std=-1.0"),
    "draws": (lambda: ddpm_elbo(LAW, X, [0.5, 0.1], draws=0), "draws=0"),
    "odd draws": (lambda: vdm_elbo(LAW, X, draws=3), "even int"),
    "levels": (lambda: vdm_elbo(LAW, X, levels=256), "-1.0, 1.0, 256"),
    "few levels": (lambda: vdm_elbo(LAW, X, levels=(-1.0, 1.0, 1)), "-1.0, 1.0, 256"),
    "off the levels": (lambda: vdm_elbo(LAW, X + 0.1, levels=(-1.0, 1.0, 3)), "0.1, not one of 3 levels"),
    "beyond the levels": (lambda: vdm_elbo(LAW, X + 2.0, levels=(-1.0, 1.0, 3)), "2, not one of 3 levels"),
    "nan": (lambda: vdm_elbo(LAW, X / 0), "not finite in 2 of 2"),
    "noise": (lambda: vdm_elbo(LAW, X, noise=3), "White"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, words = BAD[name]
    with pytest.raises(InputError, match=words) as error:
        make()
    assert len(str(error.value)) < 400
