"""Training losses: each weight against its paper's formula, and the exact score as the minimiser of all of them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from scores import Gaussian, GaussianMixture, Score, as_network, denoising_loss
from scores.matching import (
    TIMES,
    WEIGHTS,
    Weight,
    diffuse,
    draw_noise,
    draw_probes,
    draw_times,
    flow_matching_loss,
    implicit_loss,
    min_snr,
    ncsn_loss,
    sliced_loss,
    sure_loss,
    uncertainty_weighted,
)
from sde import EDM, VE, VP, Linear, Tabulated
from sde.errors import InputError, NetworkError, PathError
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
        "ncsn": 0.5 * s**2 * (-pair.eps / s + noise / s) ** 2,
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
    named = flow_matching_loss(Score(lambda x, t: net(x), Linear(), "velocity"), x0, noise=noise, t=t)
    torch.testing.assert_close(named, loss)
    other = Score(lambda x, t: net(x), VP(), "eps")  # measured as a velocity all the same
    pair = other.predict(diffuse(VP(), x0, noise=noise, t=t), t)
    slopes = [fn(t)[:, None] for fn in (VP().dalpha, VP().dsigma)]
    expected = (slopes[0] * (pair.x0 - x0) + slopes[1] * (pair.eps - noise)).square().sum(1)
    torch.testing.assert_close(flow_matching_loss(other, x0, noise=noise, t=t), expected)


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


# ------------------------------------------------- expectations by quadrature, to rounding: no Monte Carlo from here on


def hermite(n):
    """Nodes and weights of E f(z), z unit normal: exact for polynomials up to degree 2 n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes, dtype=DOUBLE), torch.tensor(weights / weights.sum(), dtype=DOUBLE)


def plane(n=7):
    """Nodes (n^2, 2) and weights (n^2,) of two independent unit normals."""
    z, w = hermite(n)
    return torch.cartesian_prod(z, z), torch.cartesian_prod(w, w).prod(1)


COV = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=DOUBLE)


def gaussian(path):
    return Gaussian(path, [0.4, -0.3], COV)


def states(path, t):
    """Nodes and weights for x_t of correlated Gaussian data."""
    z, w = plane()
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    factor = torch.linalg.cholesky(alpha**2 * COV + sigma**2 * torch.eye(2, dtype=DOUBLE))
    return alpha * torch.tensor([0.4, -0.3], dtype=DOUBLE) + z @ factor.T, w


def swirl(x):
    """A perturbation that is no gradient, with cross derivatives, of degree two."""
    return torch.stack([0.3 + x[:, 1] ** 2, x[:, 0] * x[:, 1] - 0.5 * x[:, 0]], 1)


SIGNS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=DOUBLE)] * 2)[:, None]  # all Rademacher probes, (4, 1, 2)


@pytest.mark.parametrize("path", [*PATHS.values(), Tabulated.linear(10, 0.05, 0.5)], ids=[*PATHS, "table"])
@pytest.mark.parametrize("predicts", OUTPUTS)
def test_an_error_of_the_network_costs_its_square(predicts, path):
    """E loss(exact + e h) - E loss(exact) = e^2 E w |h'|^2 exactly, h' the error in the weight's row: no slope, all rise."""
    law, t = Gaussian(path, [0.4], var=0.3), float(path.time_of(4)) if isinstance(path, Tabulated) else 0.3 * path.T
    x0, noise = (column[:, None] for column in plane(6)[0].unbind(1))
    x0, w = 0.4 + math.sqrt(0.3) * x0, plane(6)[1]
    x = diffuse(path, x0, noise=noise, t=t)
    network, h = as_network(law, path, predicts), lambda x: 0.2 - x + 0.3 * x**2

    def score(e):
        return Score(lambda x, label: network(x, label) + e * h(x), path, predicts)

    exact, moved = law.predict(x, t), score(1.0).predict(x, t)
    for weight in WEIGHTS:
        values = [float(w @ denoising_loss(score(e), x0, noise=noise, t=t, weight=weight)) for e in (-0.7, 0.0, 0.7)]
        row = WEIGHTS[weight].row
        a, b = OUTPUTS[row](*(float(fn(t)) for fn in (path.alpha, path.sigma, path.dalpha, path.dsigma)), 0.5)
        error = (a * (moved.x0 - exact.x0) + b * (moved.eps - exact.eps))[:, 0]
        unit = denoising_loss(score(0.0), x0, noise=noise, t=t, weight=Weight(row))
        ratio = denoising_loss(score(0.0), x0, noise=noise, t=t, weight=weight) / unit  # the weight's own factor
        rise = 0.49 * float(w @ (ratio * error**2))
        assert rise > 1e-4
        for value in (values[0], values[2]):
            assert abs(value - values[1] - rise) < 1e-9 * (value + 1), weight


def test_integer_times_of_a_table():
    """A network with whole labels, at its own entries: the label is the index, and the state has that entry's level."""
    path, seen = Tabulated.linear(10, 0.05, 0.5), []

    def network(x, k):
        seen.append(k)
        return 0.1 * x

    score = Score(network, path, "eps", label=lambda t: path.index(t).round().long())
    t = draw_times(path, 50, "table", generator=generator(2))
    x0, noise = (torch.randn(50, 2, generator=generator(i), dtype=DOUBLE) for i in (3, 4))
    loss = denoising_loss(score, x0, noise=noise, t=t)
    (k,) = seen
    assert k.dtype is torch.int64
    assert (int(k.min()), int(k.max())) == (0, 9)
    cumulated = torch.cumprod(1 - torch.linspace(0.05, 0.5, 10, dtype=DOUBLE), 0)[k][:, None]  # Ho et al.'s own words
    x = cumulated.sqrt() * x0 + (1 - cumulated).sqrt() * noise
    torch.testing.assert_close(loss, (0.1 * x - noise).square().sum(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("wrapped", ["exact", "eps", "x0", "v", "score", "F"])
def test_losses_without_data_are_minimised_by_the_exact_score(wrapped, path):
    """implicit and sliced: E loss(s + e h) = -E|s|^2/2 + e^2 E|h|^2/2. SURE: tr Cov[x0 | x] + e^2 E|h'|^2. Exactly."""
    t = 0.4 * path.T
    law, (x, w) = gaussian(path), states(path, t)
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    fisher = float(w @ law(x, t).square().sum(1))
    spread = float(law.posterior_cov(x[:1], t)[0].trace())
    size = float(w @ swirl(x).square().sum(1))
    all_signs = SIGNS.expand(4, len(x), 2)
    for e in (0.0, -0.3, 0.3):
        score = _Bent(law, e)
        if wrapped != "exact":
            score = Score(as_network_of(score, path, wrapped), path, wrapped)
        for value in (
            implicit_loss(score, x, t=t),
            implicit_loss(score, x, t=t, probes=all_signs),
            sliced_loss(score, x, t=t, probes=all_signs),
            implicit_loss(score, x, t=torch.full((len(x),), t, dtype=DOUBLE), weight=lambda t: 0 * t + 2) / 2,
        ):
            expected = -0.5 * fisher + 0.5 * e**2 * size
            assert abs(float(w @ value.detach()) - expected) < 1e-9 * (1 + fisher), (e, wrapped)
        expected = spread + e**2 * size * (sigma**2 / alpha) ** 2
        for probes in (None, all_signs):
            value = sure_loss(score, x, t=t, probes=probes)
            assert abs(float(w @ value.detach()) - expected) < 1e-8 * (1 + sigma**2), (e, wrapped)


class _Bent(Gaussian):
    """A law whose score is off by e ``swirl``."""

    def __init__(self, law, e):
        super().__init__(law.path, [0.4, -0.3], COV)
        self.e = e

    def __call__(self, x, t):
        return super().__call__(x, t) + self.e * swirl(x)

    def predict(self, x, t):
        knot = self.path.knot(t if isinstance(t, float) else float(t.reshape(-1)[0]))
        pair = super().predict(x, t)
        pair.eps = pair.eps - knot.sigma * self.e * swirl(x)
        pair.x0 = pair.x0 + knot.sigma**2 / knot.alpha * self.e * swirl(x)
        return pair


def as_network_of(law, path, predicts):
    def network(x, label):
        knot = path.knot(float(label[0]))
        a, b = OUTPUTS[predicts](knot.alpha, knot.sigma, knot.dalpha, knot.dsigma, 0.5)
        pair = law.predict(x, float(label[0]))
        return pair.combine(a, b)

    return network


def test_losses_without_data_on_a_mixture():
    """On a grid in one dimension, for a law that is not Gaussian and an error that is no polynomial."""
    path, t = VP(), 0.25
    law = GaussianMixture(path, [0.3, 0.7], [[-1.0], [0.6]], [[0.02], [0.1]])
    x = torch.linspace(-7.0, 7.0, 1401, dtype=DOUBLE)[:, None]
    w = law.log_prob(x, t).exp() * 0.01
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    fisher = float(w @ law(x, t).square()[:, 0])
    spread = float(w @ law.posterior_cov(x, t)[:, 0, 0])
    size = float(w @ torch.cos(3 * x).square()[:, 0])

    def score(e):
        def network(x, label):
            return law(x, t) + e * torch.cos(3 * x)

        return Score(network, path, "score")

    for e in (-0.5, 0.0, 0.5):
        values = {
            "implicit": float(w @ implicit_loss(score(e), x, t=t).detach()),
            "sliced": float(w @ sliced_loss(score(e), x, t=t, probes=torch.ones(1, len(x), 1, dtype=DOUBLE)).detach()),
            "sure": float(w @ sure_loss(score(e), x, t=t).detach()),
        }
        assert abs(values["implicit"] - 0.5 * (e**2 * size - fisher)) < 1e-8
        assert abs(values["sliced"] - values["implicit"]) < 1e-12
        assert abs(values["sure"] - spread - e**2 * size * (sigma**2 / alpha) ** 2) < 1e-8


def test_sure_is_unbiased_for_each_clean_sample():
    """E over the noise alone, at a fixed x0 and for a denoiser that is wrong: SURE is E|x0' - x0|^2."""
    for path in (VP(), EDM(T=3.0), Linear()):
        t, x0 = 0.3 * path.T, torch.tensor([[0.7, -0.2]], dtype=DOUBLE)
        noise, w = plane(8)
        x = diffuse(path, x0.expand(len(noise), 2), noise=noise, t=t)
        score = Score(lambda x, t: swirl(x) * 0.5, path, "x0")
        truth = float(w @ (score.predict(x, t).x0 - x0).square().sum(1))
        assert abs(float(w @ sure_loss(score, x, t=t).detach()) - truth) < 1e-9
        for weight in (torch.full((len(x),), 3.0), lambda t: 3.0 + 0 * t):
            assert abs(float(w @ sure_loss(score, x, t=t, weight=weight).detach()) - 3 * truth) < 1e-8


def test_the_probes_of_sliced_losses():
    """Gaussian and Rademacher probes have the mean and the covariance they need; more of them are averaged."""
    x = torch.zeros(4000, 3, dtype=DOUBLE)
    for law in ("rademacher", "gaussian"):
        v = draw_probes(x, 2, law, generator=generator(1))
        assert v.shape == (2, 4000, 3)
        flat = v.reshape(-1, 3)
        assert float(flat.mean(0).abs().max()) < 4.5 / math.sqrt(8000)
        second = flat.T @ flat / 8000 - torch.eye(3, dtype=DOUBLE)
        assert float(second.abs().max()) < 4.5 * math.sqrt(2 / 8000)
        assert (float(flat.abs().max()) == 1.0) == (law == "rademacher")
    path, states_ = VP(), torch.randn(5, 3, generator=generator(), dtype=DOUBLE)
    v = draw_probes(states_, 3, "gaussian", generator=generator(2))
    score = Score(lambda x, t: x.sin() * x.roll(1, 1), path, "eps")
    for loss in (implicit_loss, sliced_loss, sure_loss):
        each = [loss(score, states_, t=0.5, probes=v[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(loss(score, states_, t=0.5, probes=v), torch.stack(each).mean(0))
    jacobian = torch.autograd.functional.jacobian(lambda x: score(x[None], 0.5)[0], states_[0])
    s = score(states_[:1], 0.5)[0]
    expected = 0.5 * (s @ s) + torch.stack([u @ jacobian @ u for u in v[:, 0]]).mean()
    torch.testing.assert_close(implicit_loss(score, states_, t=0.5, probes=v)[0], expected)
    expected = torch.stack([0.5 * (u @ s) ** 2 + u @ jacobian @ u for u in v[:, 0]]).mean()
    torch.testing.assert_close(sliced_loss(score, states_, t=0.5, probes=v)[0], expected)
    exact = 0.5 * (s @ s) + jacobian.trace()
    torch.testing.assert_close(implicit_loss(score, states_, t=0.5)[0], exact)
    image = states_.reshape(5, 1, 3, 1)
    shaped = Score(lambda x, t: x.sin() * x.roll(1, 2), path, "eps")
    torch.testing.assert_close(implicit_loss(shaped, image, t=0.5), implicit_loss(score, states_, t=0.5))


def test_losses_without_data_train_the_parameters():
    """Their gradients reach the parameters through the network's derivative, and vanish for the linear filter that is right."""
    path, t = VP(), 0.3
    law, (x, w) = Gaussian(path, [0.0, 0.0], COV), states(path, t)
    x = x - float(path.alpha(t)) * torch.tensor([0.4, -0.3], dtype=DOUBLE)
    right = law(torch.eye(2, dtype=DOUBLE), t)  # the score is linear
    for loss in (
        lambda score: implicit_loss(score, x, t=t),
        lambda score: implicit_loss(score, x, t=t, probes=SIGNS.expand(4, len(x), 2)),
        lambda score: sliced_loss(score, x, t=t, probes=SIGNS.expand(4, len(x), 2)),
        lambda score: sure_loss(score, x, t=t),
    ):
        for shift in (0.0, 0.2):
            weight = (right + shift).requires_grad_()
            score = Score(lambda x, label, weight=weight: x @ weight, path, "score")
            (slope,) = torch.autograd.grad(w @ loss(score), weight)
            assert (float(slope.abs().max()) < 1e-9) == (shift == 0.0)
        with torch.no_grad():
            assert not loss(score).requires_grad
    weight = torch.randn(2, 2, generator=generator(), dtype=DOUBLE).requires_grad_()

    def value(weight):
        return sure_loss(Score(lambda x, label: (x @ weight).tanh(), path, "v"), x[:3], t=t)

    assert torch.autograd.gradcheck(value, (weight,))


def test_ends_and_networks_without_a_derivative():
    x, probes = torch.zeros(3, 2), torch.ones(1, 3, 2)
    for loss in (implicit_loss, sliced_loss, sure_loss):
        for network in (torch.no_grad()(lambda x, t: 2 * x), lambda x, t: x.detach() + torch.zeros(1, requires_grad=True)):
            with pytest.raises(NetworkError, match="no gradient reaches x"):
                loss(Score(network, VP(), "x0" if loss is sure_loss else "score"), x, t=0.5, probes=probes)
    with pytest.raises(PathError, match="sigma=0"):
        implicit_loss(Score(lambda x, t: x, VP()), x, t=0.0)
    with pytest.raises(PathError, match="alpha = 0"):
        sure_loss(Score(lambda x, t: x, Linear(), "velocity"), x, t=1.0)
    assert implicit_loss(Score(lambda x, t: x, Linear(), "eps"), x, t=1.0).isfinite().all()  # eps needs no alpha
    assert implicit_loss(Score(lambda x, t: x, VP()), x[:0], t=0.5).shape == (0,)
    net = nn.Dropout(0.5)
    wrapped = Score(lambda x, t: net(x), VP())  # training is what the mode is for: no warning
    assert sliced_loss(wrapped, x, t=0.5, probes=probes).shape == (3,)


def test_ncsn_is_the_mean_over_its_levels():
    """Song & Ermon (2019), eq. 6, in their own words, and minimised by the exact score."""
    path, sigmas = VE(0.01, 50.0), torch.logspace(1, -2, 4, dtype=DOUBLE)
    x0 = torch.randn(5, 2, generator=generator(), dtype=DOUBLE)
    noise = torch.randn(4, 5, 2, generator=generator(1), dtype=DOUBLE)
    seen = []

    def network(x, label):
        seen.append(label)
        return x.sin() / (1 + label[:, None])

    score = Score(network, path, "score", label=path.sigma)
    loss = ncsn_loss(score, x0, noise=noise, sigmas=sigmas)
    expected = torch.zeros(5, dtype=DOUBLE)
    for sigma, z in zip(sigmas, noise, strict=True):
        x = x0 + sigma * z
        expected += sigma**2 * 0.5 * (x.sin() / (1 + sigma) + (x - x0) / sigma**2).square().sum(1) / 4
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.stack([label[0] for label in seen]), sigmas, rtol=1e-9, atol=0)
    law = Gaussian(path, [0.4], var=0.3)
    nodes, w = plane(6)
    data, z = 0.4 + math.sqrt(0.3) * nodes[:, :1], nodes[:, 1:]
    values = []
    for e in (-0.3, 0.0, 0.3):
        bent = Score(lambda x, label, e=e: law(x, float(label[0])) + e * x, path, "score")
        values.append(float(w @ ncsn_loss(bent, data, noise=z.expand(2, -1, 1), sigmas=[1.0, 0.1])))
    rise = [0.5 * s**2 * 0.09 * (0.3 + s**2 + 0.16) for s in (1.0, 0.1)]
    assert abs(values[0] - values[1] - sum(rise) / 2) < 1e-9
    assert abs(values[2] - values[1] - sum(rise) / 2) < 1e-9


def test_uncertainty_finds_the_size_of_the_loss():
    loss = torch.tensor([3.0, 0.5, 8.0], dtype=DOUBLE)
    u = (loss / 4).log().requires_grad_()
    value = uncertainty_weighted(loss, u, 4)
    torch.testing.assert_close(value, 4 + 4 * (loss / 4).log())
    (slope,) = torch.autograd.grad(value.sum(), u)
    torch.testing.assert_close(slope, torch.zeros(3, dtype=DOUBLE), rtol=0, atol=1e-12)
    assert bool((uncertainty_weighted(loss, u.detach() + 0.1, 4) > value).all())


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", TIMES)
def test_times_are_increasing_quantiles_in_the_domain(kind, path):
    if kind == "table":
        with pytest.raises(InputError, match="entries of a table"):
            draw_times(path, 3, kind, generator=generator())
        path = Tabulated.linear(20)
    u = torch.linspace(1e-12, 1 - 1e-12, 1001, dtype=DOUBLE)
    t = TIMES[kind](path, u)
    if kind == "log_normal":
        assert t[0] <= t[-1]
    assert (t.diff() >= 0).all()
    assert t.min() >= path.t_min * (1 - 1e-9)
    assert t.max() <= path.T
    drawn = draw_times(path, 200, kind, generator=generator(5))
    if kind == "table":
        index = path.index(drawn)
        torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-12)
        assert sorted(set(index.round().tolist())) == list(range(20))
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
X = torch.zeros(3, 2)


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
        (lambda: draw_probes(X, 0, generator=generator()), ["n=0"]),
        (lambda: draw_probes(X, 2, "normal", generator=generator()), ["gaussian"]),
        (lambda: implicit_loss(SCORE, X, t=0.5, probes=torch.ones(3, 2)), ["(3, 2)", "draw_probes"]),
        (lambda: sliced_loss(SCORE, X, t=0.5, probes=None), ["NoneType"]),
        (lambda: sliced_loss(SCORE, X, t=0.5, probes=torch.ones(2, 3, 1)), ["(2, 3, 1)"]),
        (lambda: sure_loss(SCORE, X, t=0.5, weight=torch.ones(2)), ["(2,)", "(3,)"]),
        (lambda: implicit_loss(SCORE, X.long(), t=0.5), ["int64"]),
        (lambda: diffuse(VP(), X, noise=X[:2], t=0.5), ["(2, 2)"]),
        (lambda: ncsn_loss(SCORE, X, noise=X[None], sigmas=[1.0, 0.1]), ["2 levels", "(1, 3, 2)"]),
        (lambda: ncsn_loss(SCORE, X, noise=X[None], sigmas=[-1.0]), ["-1.0"]),
        (lambda: ncsn_loss(SCORE, X, noise=X[None], sigmas=[1e6]), ["1e+06", "does not reach"]),
        (lambda: uncertainty_weighted(X[:, 0], X[:2, 0], 3), ["(2,)"]),
        (lambda: uncertainty_weighted(X[:, 0], X[:, 0], 0), ["numbers=0"]),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(InputError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)
