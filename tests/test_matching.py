"""Denoising losses: each weight against its paper's formula, and the exact score as the minimiser of all of them."""

import math

import pytest
import torch
from torch import nn

from scores import Gaussian, GaussianMixture, Score, as_network, denoising_loss
from scores.matching import TIMES, WEIGHTS, Weight, draw_noise, draw_times, min_snr
from sde import EDM, VP, Linear
from sde.errors import InputError, PathError
from sde.prediction import OUTPUTS

DOUBLE = torch.float64
PATHS = {"VP": VP(), "EDM": EDM(T=10.0), "Linear": Linear()}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(path, n):
    """A law, x0, noise and times well inside the path."""
    law = GaussianMixture(path, [0.3, 0.7], [[0.5, -0.4], [-0.3, 0.2]], [[0.02, 0.2], [0.1, 0.05]])
    x0 = law.sample(n, 0.0, seed=0, dtype=DOUBLE)
    ends = path.lam(torch.tensor([0.05, 0.95], dtype=DOUBLE) * path.T)
    t = path.time(ends[0] + torch.rand(n, generator=generator(1), dtype=DOUBLE) * (ends[1] - ends[0]))
    return law, x0, draw_noise(x0, generator=generator(2)), t


def state(path, x0, noise, t):
    return path.alpha(t)[:, None] * x0 + path.sigma(t)[:, None] * noise


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("predicts", OUTPUTS)
def test_the_exact_score_minimises_every_weight(predicts, path):
    """d/dtheta E loss(exact + theta h) is 0 at theta = 0, |z| < 4.5, and not for an output off by half its spread."""
    n = 20000
    law, x0, noise, t = batch(path, n)
    x = state(path, x0, noise, t)
    exact = as_network(law, path, predicts)(x, t)
    for h in (torch.ones_like(x), x, torch.cos(3 * x) * path.alpha(t)[:, None]):
        for start in (0.0, 0.5 * float(exact.std())):
            for weight in (*WEIGHTS, None, lambda t: 1 + t):
                theta = torch.full((n, 1), start, dtype=DOUBLE, requires_grad=True)
                score = Score(lambda x, label, theta=theta, h=h: exact + theta * h, path, predicts)
                loss = denoising_loss(score, x0, noise=noise, t=t, weight=weight)
                (slopes,) = torch.autograd.grad(loss.sum(), theta)
                z = float(slopes.mean() / (slopes.std() / math.sqrt(n)))
                assert abs(z) < 4.5 if start == 0.0 else z > 4.5, (weight, start, z)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("predicts", OUTPUTS)
def test_weights_are_the_formulas_of_the_papers(predicts, path):
    """With any network: its prediction of x0 and eps, put into each paper's loss."""
    _, x0, noise, t = batch(path, 50)
    x = state(path, x0, noise, t)
    score = Score(lambda x, t: x.sin() + 0.1 * t[:, None], path, predicts, sigma_data=0.7)
    pair = score.predict(x, t)
    a, s, da, ds = (fn(t)[:, None] for fn in (path.alpha, path.sigma, path.dalpha, path.dsigma))
    e_x0, e_eps = pair.x0 - x0, pair.eps - noise
    h = 1e-5
    dlam = ((path.lam(t + h) - path.lam(t - h)) / (2 * h))[:, None]  # not from g^2
    sig, sd = s / a, 0.7
    expected = {
        "eps": e_eps**2,
        "x0": e_x0**2,
        "v": ((a * e_eps - s * e_x0) ** 2) / (a**2 + s**2),
        "velocity": (da * e_x0 + ds * e_eps) ** 2,
        "score": s**2 * ((pair.eps - noise) / s) ** 2,
        "edm": (sig**2 + sd**2) / (sig * sd) ** 2 * e_x0**2,
        "min_snr": ((a / s) ** 2).clamp(max=5.0) * e_x0**2,
        "vdm": -dlam * e_eps**2,
    }
    assert expected.keys() == WEIGHTS.keys()
    for name, value in expected.items():
        loss = denoising_loss(score, x0, noise=noise, t=t, weight=name)
        assert loss.shape == (50,)
        torch.testing.assert_close(loss, value.sum(1), rtol=1e-6 if name == "vdm" else 1e-9, atol=1e-12)
    own = denoising_loss(score, x0, noise=noise, t=t, weight=None)
    target = {"eps": noise, "x0": x0, "score": -noise / s, "velocity": da * x0 + ds * noise}
    target |= {"v": (a * noise - s * x0) / (a**2 + s**2).sqrt(), "F": (x0 - sd**2 / (sig**2 + sd**2) * x / a)}
    target["F"] = target["F"] * (sig**2 + sd**2).sqrt() / (sig * sd)
    torch.testing.assert_close(own, ((x.sin() + 0.1 * t[:, None] - target[predicts]) ** 2).sum(1), rtol=1e-9, atol=1e-9)
    weight = t + 1
    torch.testing.assert_close(denoising_loss(score, x0, noise=noise, t=t, weight=weight), own * weight)
    torch.testing.assert_close(denoising_loss(score, x0, noise=noise, t=t, weight=lambda t: t + 1), own * weight)


def test_flow_matching_is_the_velocity_row():
    _, x0, noise, t = batch(Linear(), 20)
    net = nn.Linear(2, 2).double()
    loss = denoising_loss(Score(lambda x, t: net(x), Linear(), "velocity"), x0, noise=noise, t=t, weight=None)
    x = (1 - t[:, None]) * x0 + t[:, None] * noise
    torch.testing.assert_close(loss, (net(x) - (noise - x0)).square().sum(1))
    loss.mean().backward()
    assert net.weight.grad is not None


def test_other_gammas_and_rows():
    path = VP()
    _, x0, noise, t = batch(path, 20)
    score = Score(lambda x, t: x, path, "v")
    snr = (path.alpha(t) / path.sigma(t)) ** 2
    x0_loss = denoising_loss(score, x0, noise=noise, t=t, weight="x0")
    loss = denoising_loss(score, x0, noise=noise, t=t, weight=min_snr(2.0))
    torch.testing.assert_close(loss, x0_loss * snr.clamp(max=2.0))
    cubed = denoising_loss(score, x0, noise=noise, t=t, weight=Weight("x0", lambda knot: knot.t**3))
    torch.testing.assert_close(cubed, x0_loss * t**3)
    pair = Score(lambda x, t: 2 * x, path, (lambda t: 1 + t, -2.0))
    target = (1 + t[:, None]) * x0 - 2 * noise
    own = denoising_loss(pair, x0, noise=noise, t=t, weight=None)
    torch.testing.assert_close(own, (2 * state(path, x0, noise, t) - target).square().sum(1))
    a, s = path.alpha(t), path.sigma(t)
    loss = denoising_loss(pair, x0, noise=noise, t=t, weight="x0")
    torch.testing.assert_close(loss, own * (s / (a * -2.0 - s * (1 + t))) ** 2)


def test_the_vdm_loss_is_mutual_information_in_nats():
    """int -dlam/dt E|eps - E[eps|x]|^2 dt = I(x0; x_a) - I(x0; x_b), I = 1/2 sum log(1 + SNR variance) for Gaussians."""
    path, n = VP(), 200000
    variances = torch.tensor([0.5, 0.1, 1.5], dtype=DOUBLE)
    law = Gaussian(path, torch.zeros(3), var=variances)
    x0 = law.sample(n, seed=0, dtype=DOUBLE)
    low = 0.05  # the integrand grows towards t = 0
    u = draw_times(path, n, generator=generator(3), stratified=True)
    t = low + (u - path.t_min) * (path.T - low) / (path.T - path.t_min)
    for score in (Score(as_network(law, path, "v"), path, "v"), law):
        noise = draw_noise(x0, generator=generator(4))
        loss = denoising_loss(score, x0, noise=noise, t=t, weight="vdm") * (path.T - low)
        information = [0.5 * (1 + (path.alpha(u) / path.sigma(u)) ** 2 * variances).log().sum() for u in (low, path.T)]
        exact = float(information[0] - information[1])
        assert abs(float(loss.mean()) - exact) < 4.5 * float(loss.std()) / math.sqrt(n)
        assert float(loss.std()) / math.sqrt(n) < 0.006 * exact


def test_any_predictor_can_be_measured():
    path = VP()
    law, x0, noise, t = batch(path, 30)
    for weight in WEIGHTS:
        direct = denoising_loss(law, x0, noise=noise, t=t, weight=weight)
        wrapped = denoising_loss(Score(as_network(law, path, "eps"), path, "eps"), x0, noise=noise, t=t, weight=weight)
        torch.testing.assert_close(direct, wrapped, rtol=1e-8, atol=1e-10)


def test_scalings_labels_conditions_shapes_and_mode():
    seen = []

    def network(x, label, y=None):
        seen.append((x, label, y))
        return torch.zeros_like(x)

    path = EDM()
    score = Score(network, path, "F", label=lambda t: t.log() / 4, scale=lambda t: (t * t + 0.25) ** -0.5)
    x0, noise = torch.randn(4, 1, 2, 3, generator=generator()), torch.randn(4, 1, 2, 3, generator=generator(1))
    t = torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=DOUBLE)
    y = torch.tensor([1, 2, 3, 4])
    loss = denoising_loss(score, x0, noise=noise, t=t, weight="edm", conditions={"y": y})
    assert loss.shape == (4,)
    assert loss.dtype is torch.float32
    x, label, given = seen[0]
    s = t.float().reshape(4, 1, 1, 1)
    torch.testing.assert_close(x, (x0 + s * noise) / (s * s + 0.25).sqrt())
    torch.testing.assert_close(label, (t.log() / 4).float())
    assert torch.equal(given, y)
    one = denoising_loss(score, x0, noise=noise, t=1.0, weight="edm", conditions={"y": y})
    torch.testing.assert_close(one[1], loss[1])
    assert denoising_loss(Score(lambda x, t: x, path), x0[:, 0, 0, 0], noise=noise[:, 0, 0, 0], t=t).shape == (4,)
    assert denoising_loss(Score(lambda x, t: x, path), x0[:0], noise=noise[:0], t=1.0).shape == (0,)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Unflatten(1, (1, 2, 3)))
    training = Score(lambda x, t: net(x), path, mode=None)
    state = torch.get_rng_state()
    denoising_loss(Score(_Train(net), path), x0, noise=noise, t=t)  # no warning: training is what the mode is for
    denoising_loss(training, x0, noise=noise, t=t)
    assert net.training
    torch.set_rng_state(state)


class _Train(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x)


def test_ends_of_the_path():
    path = Linear()
    x0, noise = torch.ones(2, 3), torch.full((2, 3), 2.0)
    t = torch.tensor([0.5, 1.0])
    eps, velocity = Score(lambda x, t: x, path, "eps"), Score(lambda x, t: x, path, "velocity")
    assert denoising_loss(eps, x0, noise=noise, t=t, weight="eps").isfinite().all()
    assert denoising_loss(eps, x0, noise=noise, t=t, weight="score").isfinite().all()
    assert denoising_loss(velocity, x0, noise=noise, t=t, weight="x0").isfinite().all()
    with pytest.raises(PathError, match="weight is not finite at t=1"):
        denoising_loss(eps, x0, noise=noise, t=t, weight="x0")
    with pytest.raises(PathError, match="target is not finite at t=0"):
        denoising_loss(Score(lambda x, t: x, path, "score"), x0, noise=noise, t=torch.tensor([0.5, 0.0]), weight=None)


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", TIMES)
def test_times_are_increasing_quantiles_in_the_domain(kind, path):
    u = torch.linspace(1e-12, 1 - 1e-12, 1001, dtype=DOUBLE)
    t = TIMES[kind](path, u)
    if kind == "log_normal":
        assert t[0] <= t[-1]
    assert (t.diff() >= 0).all()
    assert t.min() >= path.t_min * (1 - 1e-9)
    assert t.max() <= path.T
    drawn = draw_times(path, 200, kind, generator=generator(5))
    assert drawn.dtype is DOUBLE
    assert torch.equal(drawn, draw_times(path, 200, kind, generator=generator(5)))
    assert not torch.equal(drawn, draw_times(path, 200, kind, generator=generator(6)))


def test_times_have_the_laws_they_claim():
    n = 20000
    path = EDM()
    logs = draw_times(path, n, "log_normal", generator=generator(0)).log()
    assert abs(float(logs.mean()) + 1.2) < 4.5 * 1.2 / math.sqrt(n)
    assert abs(float(logs.std()) - 1.2) < 4.5 * 1.2 / math.sqrt(2 * n)
    lam = VP().lam(draw_times(VP(), n, "uniform_lam", generator=generator(1)))
    ends = VP().lam(torch.tensor([VP().T, VP().t_min], dtype=DOUBLE))
    assert abs(float(((lam - ends[0]) / (ends[1] - ends[0])).mean()) - 0.5) < 4.5 / math.sqrt(12 * n)
    logits = torch.logit(draw_times(Linear(), n, "logit_normal", generator=generator(2)))
    assert abs(float(logits.mean())) < 4.5 / math.sqrt(n)
    assert abs(float(logits.std()) - 1) < 4.5 / math.sqrt(2 * n)
    uniform = draw_times(Linear(), n, "uniform", generator=generator(3))
    assert abs(float(uniform.mean()) - 0.5005) < 4.5 * 0.999 / math.sqrt(12 * n)


def test_stratified_times_fill_every_bin_once():
    path = Linear()
    t = draw_times(path, 64, generator=generator(0), stratified=True)
    bins = ((t - path.t_min) / (path.T - path.t_min) * 64).floor().long()
    assert sorted(bins.tolist()) == list(range(64))
    assert len(draw_times(path, 0, generator=generator(0), stratified=True)) == 0


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    x = draw_noise(torch.zeros(3, 2), generator=generator(0))
    draw_times(VP(), 4, generator=generator(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert x.shape == (3, 2)
    assert x.dtype is torch.float32


GOOD = {"noise": torch.zeros(3, 2), "t": 0.5}
SCORE = Score(lambda x, t: x, VP())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: denoising_loss(SCORE, torch.zeros(3, 2), **{**GOOD, "noise": torch.zeros(3, 1)}), ["(3, 1)", "(3, 2)"]),
        (lambda: denoising_loss(SCORE, torch.zeros(3, 2).long(), **GOOD), ["int64"]),
        (lambda: denoising_loss(SCORE, torch.zeros(3, 2), **{**GOOD, "t": torch.zeros(2)}), ["(2,)", "3"]),
        (lambda: denoising_loss(SCORE, torch.zeros(3, 2), **{**GOOD, "t": 1.5}), ["domain"]),
        (lambda: denoising_loss(SCORE, torch.zeros(3, 2), **GOOD, weight="snr"), ["'snr'", "min_snr"]),
        (lambda: denoising_loss(SCORE, torch.zeros(3, 2), **GOOD, weight=2.0), ["float"]),
        (lambda: denoising_loss(SCORE, torch.zeros(3, 2), **GOOD, weight=torch.ones(2)), ["(2,)", "(3,)"]),
        (lambda: denoising_loss(SCORE, torch.zeros(3, 2), **GOOD, conditions={"y": 1}), ["y"]),
        (lambda: Weight("epsilon"), ["'eps'"]),
        (lambda: min_snr(0.0), ["gamma"]),
        (lambda: draw_times(VP(), 3, "lognormal", generator=generator()), ["log_normal"]),
        (lambda: draw_times(VP(), 3, generator=None), ["NoneType"]),
        (lambda: draw_times(VP(), -3, generator=generator()), ["-3"]),
        (lambda: draw_noise(torch.zeros(3), generator=0), ["int"]),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(InputError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)
