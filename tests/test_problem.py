"""Problems against independent truth: moment equations, Fokker-Planck, Bayes' rule, and other people's integrators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mpmath as mp
import pytest
import torch
import torchdiffeq
import torchsde
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor

from sde import (
    EDM,
    VE,
    VP,
    Cosine,
    ForwardSDE,
    FromFunctions,
    Knot,
    Linear,
    Path,
    Prediction,
    ProbabilityFlow,
    ReverseSDE,
    SubVP,
    Tabulated,
    Trigonometric,
)
from sde.errors import InputError, PrecisionWarning
from sde.prediction import Predictor, Row, Tally
from solvers.testing import paths


class Mixture(Predictor):
    """The exact prediction for sum_k w_k N(mean_k, var_k I) on (B, d), from the density alone: eps = -sigma grad log p."""

    def __init__(self, path: Path, weights: Sequence[float], means: Sequence[Sequence[float]], var: Sequence[float]) -> None:
        self.path = path
        self.weights, self.means, self.var = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, var))
        self.calls = 0

    def log_p(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        var = alpha[..., None] ** 2 * self.var + sigma[..., None] ** 2
        square = (x[:, None] - alpha.reshape(-1, 1, 1) * self.means).square().sum(-1)
        log_normal = -0.5 * square / var - 0.5 * x.shape[1] * torch.log(2 * math.pi * var)
        return torch.logsumexp(torch.log(self.weights) + log_normal, -1)

    def __call__(self, x: Tensor, t: Any, **conditions: Any) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        self.calls += 1
        with torch.enable_grad():
            u = x.double() if x.requires_grad else x.detach().double().requires_grad_()
            score = torch.autograd.grad(self.log_p(u, t).sum(), u, create_graph=x.requires_grad)[0]
        return score.to(x)

    def predict(self, x: Tensor, t: Any, **conditions: Any) -> Prediction:
        t = torch.as_tensor(t, dtype=torch.float64)
        alpha, sigma = (v.reshape(-1, 1).to(x) for v in (self.path.alpha(t), self.path.sigma(t)))
        score = self(x, t)
        if bool((alpha == 0).any()):  # x_0 is independent of x there
            return Prediction((self.weights @ self.means).expand_as(x).to(x), -sigma * score)
        return Prediction((x + sigma**2 * score) / alpha, -sigma * score)

    def row(self, knot: Knot) -> Row:
        return Row(0.0, -1.0)

    def at(
        self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally
    ) -> list[Callable[[Tensor], Tensor]]:
        return [lambda x, k=k: self(x, k.t) for k in knots]


def gaussian(path: Path, mean: float = 0.7, var: float = 0.3, d: int = 1) -> Mixture:
    return Mixture(path, [1.0], [[mean] * d], [var])


def moments(path: Path, t: Tensor, mean: float, var: float) -> tuple[Tensor, Tensor]:
    return path.alpha(t) * mean, path.alpha(t) ** 2 * var + path.sigma(t) ** 2


def slope(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    u = t.clone().requires_grad_()
    y = fn(u)
    return torch.autograd.grad(y.sum(), u)[0] if y.requires_grad else torch.zeros_like(t)


# Marginals


@settings(max_examples=60)
@given(paths(), st.floats(0.0, 3.0), st.booleans())
def test_any_eta_keeps_gaussian_marginals(path: Path, eta: float, as_diffusion: bool) -> None:
    """drift = A x + B with M' = A M + B and V' = 2 A V - (eta g)^2: noise is taken out as t falls. Forward: + g^2."""
    mean, var = 0.7, 0.3
    score = gaussian(path, mean, var)
    t = torch.tensor([1e-5, 0.013, 0.11, 0.37, 0.72, 0.983], dtype=torch.float64) * path.T
    if as_diffusion:
        reverse = ReverseSDE(path, score, diffusion=lambda u: eta * path.g(u))
    else:
        reverse = ReverseSDE(path, score, eta=eta)
    M, V = moments(path, t, mean, var)
    dM, dV = (slope(lambda u, i=i: moments(path, u, mean, var)[i], t) for i in (0, 1))
    # Relative to the terms of the drift: near stationarity they cancel, whatever the form.
    scale = 2 * path.f(t).abs() + path.g2(t) / V
    problems = [(reverse, -1.0), (ProbabilityFlow(path, score), -1.0), (ForwardSDE(path), 1.0)]
    for problem, sign in problems:
        at_mean = problem.drift(M[:, None], t)[:, 0]
        width = V.sqrt()
        A = (problem.drift((M + width)[:, None], t)[:, 0] - problem.drift((M - width)[:, None], t)[:, 0]) / (2 * width)
        noise = problem.diffusion(t) ** 2
        assert ((dM - at_mean).abs() / (scale * width)).max() <= 1e-10, problem
        assert ((dV - 2 * A * V - sign * noise).abs() / (scale * V + noise)).max() <= 1e-10, problem


MIXTURE_PATHS = [VP(), SubVP(), Cosine(), VE(), EDM(T=10.0), Linear(), Tabulated.linear(zero_terminal_snr=True)]


@pytest.mark.parametrize("path", MIXTURE_PATHS, ids=str)
@pytest.mark.parametrize("d", [1, 2])
def test_fokker_planck_on_a_mixture(path: Path, d: int) -> None:
    """Divided by p:  d log p / dt = -(div b + b . s) + sign (c/2) (div s + |s|^2), c = diffusion^2, at 64 points."""
    score = Mixture(path, [0.3, 0.7], [[-1.0] * d, [1.5] * d], [0.2, 0.05])
    generator = torch.Generator().manual_seed(0)
    t = (0.05 + 0.9 * torch.rand(64, generator=generator, dtype=torch.float64)) * path.T
    component = torch.arange(64) % 2
    spread = torch.randn(64, d, generator=generator, dtype=torch.float64)
    width = (path.alpha(t) ** 2 * score.var[component] + path.sigma(t) ** 2).sqrt()
    x = path.alpha(t)[:, None] * score.means[component] + width[:, None] * spread

    def divergence(fn: Callable[[Tensor], Tensor]) -> Tensor:
        u = x.clone().requires_grad_()
        v = fn(u)
        parts = [torch.autograd.grad(v[:, i].sum(), u, retain_graph=True)[0][:, i] for i in range(d)]
        return torch.stack(parts).sum(0)

    dlogp = slope(lambda u: score.log_p(x, u), t)
    s = score(x, t)
    spreading = divergence(lambda u: score(u, t)) + s.square().sum(1)
    problems = [
        (ForwardSDE(path), 1.0),
        (ProbabilityFlow(path, score), -1.0),
        (ReverseSDE(path, score), -1.0),
        (ReverseSDE(path, score, eta=0.5), -1.0),
        (ReverseSDE(path, score, eta=lambda u: 1.0 + math.sin(3 * u)), -1.0),
        (ReverseSDE(path, score, diffusion=lambda u: 0.3 + u), -1.0),
    ]
    for problem, sign in problems:
        b = problem.drift(x, t)
        transport = divergence(lambda u, p=problem: p.drift(u, t)) + (b * s).sum(1)
        noise = problem.diffusion(t) ** 2
        residual = dlogp + transport - sign * 0.5 * noise * spreading
        scale = 1 + transport.abs() + 0.5 * noise * spreading.abs()
        assert (residual.abs() / scale).max() <= 1e-8, problem


def test_reverse_drift_as_the_papers_write_it() -> None:
    path = VP()
    score = gaussian(path)
    x, t, eta = torch.tensor([[0.3], [-1.2]], dtype=torch.float64), 0.4, 0.6
    f, g2, s = path.f(t), path.g2(t), score(x, t)
    assert torch.allclose(ReverseSDE(path, score, eta).drift(x, t), f * x - 0.5 * (1 + eta**2) * g2 * s, rtol=1e-12)
    assert torch.allclose(ReverseSDE(path, score).drift(x, t), f * x - g2 * s, rtol=1e-12)  # Anderson 1982
    assert torch.allclose(ProbabilityFlow(path, score).drift(x, t), f * x - 0.5 * g2 * s, rtol=1e-12)
    assert torch.allclose(ReverseSDE(path, score, eta).diffusion(t), eta * path.g(t))
    assert torch.allclose(ForwardSDE(path).drift(x, t), f * x)
    assert float(ForwardSDE(path).diffusion(t)) == float(path.g(t))
    churn = eta**2 * g2 / (2 * path.sigma(t)) * score.predict(x, t).eps
    flow = ProbabilityFlow(path, score).drift(x, t)
    assert torch.allclose(ReverseSDE(path, score, eta).drift(x, t), flow + churn, rtol=1e-12)


def test_drift_at_the_ends() -> None:
    x = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    for path in (Linear(), Cosine(), Trigonometric()):  # alpha = 0: f is infinite, the flow is not
        score = gaussian(path)
        flow = ProbabilityFlow(path, score).drift(x, 1.0)
        near = ProbabilityFlow(path, score).drift(x, 1.0 - 1e-7)
        assert torch.allclose(flow, near, atol=1e-5)
        assert torch.equal(ReverseSDE(path, score, eta=0.0).drift(x, 1.0), flow)
        assert ReverseSDE(path, score, eta=0.0).diffusion(1.0) == 0.0
    paths_to_zero: list[Path] = [VP(), SubVP(), Linear(), EDM(), Cosine(), Tabulated.linear()]
    paths_to_zero += [
        FromFunctions(VP().alpha, VP().sigma),
        FromFunctions(VP().alpha, lambda t: (1 - VP().alpha(t) ** 2).sqrt()),
    ]
    for path in paths_to_zero:  # sigma = 0, and sigma' infinite for VP, Cosine, tables
        score = gaussian(path)
        for problem in (
            ProbabilityFlow(path, score),
            ReverseSDE(path, score, eta=0.7),
            ReverseSDE(path, score, diffusion=lambda t: 0.4 + 0 * t),
        ):
            at, near = problem.drift(x, 0.0), problem.drift(x, 1e-9 * path.T)
            assert torch.allclose(at, near, rtol=1e-5, atol=1e-6), (path, problem)
            mixed = problem.drift(x, torch.tensor([0.0, 0.3 * path.T]))
            assert torch.allclose(mixed[0], at[0])
            assert torch.allclose(mixed[1], problem.drift(x, 0.3 * path.T)[1], rtol=1e-6)


# Exact Gaussian laws of the forward SDE


@pytest.mark.parametrize("path", [VP(), SubVP(), Cosine(), VE(), EDM(T=5.0), Linear(), Trigonometric()], ids=str)
def test_transition_solves_the_sde(path: Path) -> None:
    """scale = exp int f, var = int g^2 exp(2 int f): by quadrature of f and g alone."""
    for s, t in ((0.1, 0.2), (0.05, 0.9), (0.6, 0.61)):
        s, t = s * path.T, t * path.T
        scale, std = ForwardSDE(path).transition(s, t)

        def log_scale(a: float, b: float) -> float:
            return quad(lambda u: float(path.f(u)), a, b, epsabs=1e-13, epsrel=1e-12)[0]

        def integrand(u: float, t: float = t) -> float:
            return float(path.g2(u)) * math.exp(2 * log_scale(u, t))

        assert float(scale) == pytest.approx(math.exp(log_scale(s, t)), rel=1e-10)
        assert float(std) ** 2 == pytest.approx(quad(integrand, s, t, epsabs=1e-13, epsrel=1e-11)[0], rel=1e-9)


@settings(max_examples=60)
@given(paths(), st.floats(1e-4, 0.97), st.floats(0.005, 0.98), st.floats(0.01, 0.99))
def test_semigroup_and_bayes(path: Path, r: float, gap: float, cut: float) -> None:
    r, t = r * path.T, (r + gap * (1 - r)) * path.T
    s = r + cut * (t - r)
    sde = ForwardSDE(path)
    (a1, b1), (a2, b2), (a, b) = sde.transition(r, s), sde.transition(s, t), sde.transition(r, t)
    assert float(a1 * a2) == pytest.approx(float(a), rel=1e-12)
    assert float((a2 * b1) ** 2 + b2**2) == pytest.approx(float(b) ** 2, rel=1e-8)
    # marginals follow: sigma_t^2 = scale^2 sigma_r^2 + std^2
    assert float((a * path.sigma(r)) ** 2 + b**2) == pytest.approx(float(path.sigma(t)) ** 2, rel=1e-9)
    # q(x_r | x_t, x_0) by conditioning the joint Gaussian of (x_r, x_t) given x_0, in 50 digits
    x0, xt = 0.8, -1.3
    mean, std = sde.posterior(torch.tensor([x0], dtype=torch.float64), torch.tensor([xt], dtype=torch.float64), s=t, t=r)
    with mp.workdps(50):
        ar, sr, at, s_t = (mp.mpf(float(v)) for v in (path.alpha(r), path.sigma(r), path.alpha(t), path.sigma(t)))
        cov = at / ar * sr**2
        want_mean = ar * x0 + cov / s_t**2 * (xt - at * x0)
        want_var = sr**2 - cov**2 / s_t**2
    scale = float(abs(ar * x0) + abs(cov / s_t**2 * xt))
    assert float(mean) == pytest.approx(float(want_mean), abs=1e-12 * scale)
    slack = 1e-12 * float(sr**2)  # of the rounding of alpha and sigma
    assert float(std) ** 2 == pytest.approx(float(want_var), abs=slack)


def test_posterior_composes_to_the_marginal() -> None:
    """Averaging q(x_t | x_s, x_0) over q(x_s | x_0) gives q(x_t | x_0)."""
    sde = ForwardSDE(Cosine())
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    s, t = 0.8, 0.45
    of_x0, std = sde.posterior(one, zero, s, t)
    of_xs, _ = sde.posterior(zero, one, s, t)
    (mean_s, std_s), (mean_t, std_t) = sde.marginal(one, s), sde.marginal(one, t)
    assert torch.allclose(of_x0 + of_xs * mean_s, mean_t, rtol=1e-13)
    assert torch.allclose(of_xs**2 * std_s**2 + std**2, std_t**2, rtol=1e-13)


def test_laws_at_the_ends() -> None:
    x0, xs = torch.tensor([0.8, 1.0], dtype=torch.float64), torch.tensor([-1.3, 0.1], dtype=torch.float64)
    for path in (Linear(), Cosine(), Trigonometric(), Tabulated.linear(zero_terminal_snr=True)):
        sde = ForwardSDE(path)
        mean, std = sde.posterior(x0, xs, s=1.0, t=0.4)  # alpha_s = 0: x_s says nothing
        assert torch.allclose(mean, path.alpha(0.4) * x0, rtol=1e-14)
        assert float(std) == pytest.approx(float(path.sigma(0.4)), rel=1e-14)
        mean, std = sde.posterior(x0, xs, s=0.5, t=0.0)  # sigma_t = 0: it is x_0
        assert torch.equal(mean, path.alpha(0.0) * x0)
        assert std == 0.0
        mean, std = sde.posterior(x0, xs, s=1.0, t=0.0)
        assert torch.equal(mean, path.alpha(0.0) * x0)
        scale, std = sde.transition(0.0, 0.3)
        assert (float(scale), float(std)) == pytest.approx((float(path.alpha(0.3)), float(path.sigma(0.3))), rel=1e-14)
        scale, std = sde.transition(0.3, 1.0)
        assert (float(scale), float(std)) == pytest.approx((0.0, 1.0), rel=1e-14)


def test_times_per_sample_and_shapes() -> None:
    path = VP()
    sde = ForwardSDE(path)
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.2, 0.5, 0.9])
    mean, std = sde.marginal(x, t)
    assert mean.shape == x.shape
    assert std.shape == (3, 1, 1, 1)
    assert mean.dtype == std.dtype == torch.float32
    for i in range(3):
        assert torch.allclose(mean[i], sde.marginal(x[i : i + 1], float(t[i]))[0][0])
        assert torch.allclose(sde.drift(x, t)[i], sde.drift(x[i : i + 1], float(t[i]))[0])
    mean, std = sde.posterior(x, 2 * x, s=torch.tensor([0.5, 0.6, 1.0]), t=t * 0.9)
    assert mean.shape == x.shape
    assert std.shape == (3, 1, 1, 1)
    scale, _ = sde.transition(t, 1.0)
    assert scale.shape == (3,)


# Other people's integrators


def test_torchsde_runs_the_forward_sde() -> None:
    path = VP(1.0, 6.0)
    ts = torch.linspace(0.0, 1.0, 5)
    torch.manual_seed(0)
    x = torchsde.sdeint(ForwardSDE(path), torch.full((4000, 2), 1.5), ts, dt=0.02, method="milstein")
    for t, state in zip(ts[1:], x[1:], strict=True):
        assert state.mean() == pytest.approx(1.5 * float(path.alpha(t)), abs=0.05)
        assert state.std() == pytest.approx(float(path.sigma(t)), abs=0.03)


@pytest.mark.parametrize("method", ["euler", "srk"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_torchsde_runs_the_reverse_sde(method: str, eta: float) -> None:
    path = Linear()
    score = gaussian(path, 0.7, 0.3, d=2)
    problem = ReverseSDE(path, score, eta)
    times = [0.98, 0.5, 0.02]
    (m0, v0), *laws = (moments(path, torch.tensor(t), 0.7, 0.3) for t in times)
    torch.manual_seed(0)
    x = m0 + v0.sqrt() * torch.randn(2000, 2)
    ts = problem.tau(times).float()
    assert torch.allclose(problem.t(ts), torch.tensor(times, dtype=torch.float64))
    out = torchsde.sdeint(problem, x, ts, dt=0.02, method=method)
    for state, (mean, var) in zip(out[1:], laws, strict=True):
        assert state.mean() == pytest.approx(float(mean), abs=0.05)
        assert state.std() == pytest.approx(float(var.sqrt()), abs=0.04)


def test_torchsde_with_samples_of_another_shape() -> None:
    path = EDM(T=5.0)

    class Image(Mixture):
        def predict(self, x: Tensor, t: Any, **conditions: Any) -> Prediction:
            assert x.shape[1:] == (3, 2, 2)
            return Prediction(x / (1 + self.path.sigma(t) ** 2), self.path.sigma(t) * x / (1 + self.path.sigma(t) ** 2))

    problem = ReverseSDE(path, Image(path, [1.0], [[0.0]], [1.0]), shape=(3, 2, 2))
    torch.manual_seed(0)
    x = 26**0.5 * torch.randn(500, 3, 2, 2, dtype=torch.float64)
    ts = problem.tau([5.0, 0.01])
    out = torchsde.sdeint(problem, x.flatten(1), ts, dt=0.05, method="euler")[-1].reshape(x.shape)
    assert out.std() == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("path", [VP(), Cosine(), Linear(), EDM(T=10.0), VE(), SubVP()], ids=str)
def test_torchdiffeq_runs_the_flow(path: Path) -> None:
    """From T, alpha = 0 included, down to t = 0, sigma = 0 included, against the exact flow of a Gaussian, and back."""
    score = gaussian(path, 0.7, 0.3)
    x = torch.tensor([[0.4], [-2.0], [1.0]], dtype=torch.float64) * path.prior_std()
    ts = torch.tensor([path.T, 0.5 * path.T, 0.0], dtype=torch.float64)
    means, variances = moments(path, ts, 0.7, 0.3)
    flow = ProbabilityFlow(path, score)
    out = torchdiffeq.odeint(flow, x, ts, rtol=1e-8, atol=1e-8)
    for k in (1, 2):
        exact = means[k] + (variances[k] / variances[0]).sqrt() * (x - means[0])
        assert torch.allclose(out[k], exact, atol=1e-6)
    back = torchdiffeq.odeint(flow, out[-1], ts.flip(0), rtol=1e-8, atol=1e-8)[-1]
    assert torch.allclose(back, x, rtol=1e-5, atol=1e-5)


def test_flow_in_float32() -> None:
    path = VP()
    flow = ProbabilityFlow(path, gaussian(path))
    out = torchdiffeq.odeint(flow, torch.tensor([[0.4], [-2.0]]), torch.tensor([1.0, 1e-3]), rtol=1e-5, atol=1e-5)
    assert out.dtype == torch.float32
    means, variances = moments(path, torch.tensor([1.0, 1e-3]), 0.7, 0.3)
    exact = means[1] + (variances[1] / variances[0]).sqrt() * (torch.tensor([[0.4], [-2.0]]) - means[0])
    assert torch.allclose(out[1], exact, atol=5e-3)  # alpha is 0.007 at T


# Noise levels


def test_eta_at() -> None:
    path = EDM()
    knot = path.knot(2.0)
    score = gaussian(path)
    assert ReverseSDE(path, score).eta_at(knot) == 1.0
    assert ReverseSDE(path, score, eta=0).eta_at(knot) == 0.0
    assert ProbabilityFlow(path, score).eta_at(knot) == 0.0
    interval = ReverseSDE(path, score, eta=lambda t: 0.8 if 0.05 < t < 50 else 0.0)
    assert [interval.eta_at(path.knot(t)) for t in (60.0, 2.0, 0.01)] == [0.0, 0.8, 0.0]
    given_g = ReverseSDE(path, score, diffusion=lambda t: 3.0 * t)
    assert given_g.eta_at(knot) == pytest.approx(6.0 / 2.0)  # g = sqrt(2 t)
    assert isinstance(given_g.eta_at(knot), float)
    assert given_g.eta_at(path.knot(0.0)) == 0.0
    assert torch.equal(interval.diffusion(torch.tensor([60.0, 2.0])), torch.tensor([0.0, 1.6]))
    with pytest.raises(InputError, match="where g = 0"):
        ReverseSDE(path, score, diffusion=lambda t: 1.0).eta_at(path.knot(0.0))


@pytest.mark.parametrize("bad", [None, "high", torch.ones(2)])
def test_noise_levels_that_are_no_numbers(bad: Any) -> None:
    with pytest.raises(InputError, match=r"eta = .*: give a number"):
        ReverseSDE(VP(), eta=bad)
    for problem in (ReverseSDE(VP(), eta=lambda t: bad), ReverseSDE(VP(), diffusion=lambda t: bad)):
        for call in (lambda p: p.eta_at(VP().knot(0.5)), lambda p: p.diffusion(0.5)):
            with pytest.raises(InputError, match=r"(eta|diffusion)\(0.5\) = .*: give a number"):
                call(problem)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_bad_noise_levels(bad: float) -> None:
    path = VP()
    score = gaussian(path)
    x = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(InputError, match=r"eta = .*must be finite and not negative"):
        ReverseSDE(path, score, eta=bad)
    for problem in (ReverseSDE(path, score, eta=lambda t: bad), ReverseSDE(path, score, diffusion=lambda t: bad)):
        for call in (lambda p: p.eta_at(path.knot(0.5)), lambda p: p.diffusion(0.5), lambda p: p.drift(x, 0.5)):
            with pytest.raises(InputError, match=r"(eta|diffusion)\(0.5\) = "):
                call(problem)


def test_bad_problems() -> None:
    path = VP()
    score = gaussian(path)
    for kind in (ReverseSDE, ProbabilityFlow):
        with pytest.raises(InputError, match=r"path is VP\(beta_min=0.2.*score is for VP\(beta_min=0.1.*path=score.path"):
            kind(VP(0.2), score)
        assert kind(VP(), score).path == path  # an equal path is the same path
        assert kind(path, None).path is path
        with pytest.raises(InputError, match="score is None"):
            kind(path, None).drift(torch.zeros(2, 1), 0.5)
        with pytest.raises(InputError, match="noise path"):
            kind("vp", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="noise path"):
        ForwardSDE("vp")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give one, eta or diffusion"):
        ReverseSDE(path, score, eta=0.5, diffusion=lambda t: t)
    with pytest.raises(InputError, match=r"diffusion = 2\.0: give a function"):
        ReverseSDE(path, score, diffusion=2.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="floating point"):
        ForwardSDE(path).drift(torch.zeros(2, dtype=torch.long), 0.5)
    with pytest.raises(InputError, match=r"t has shape \(3,\) for a state of shape \(2, 1\)"):
        ForwardSDE(path).drift(torch.zeros(2, 1), torch.ones(3))
    with pytest.warns(PrecisionWarning):
        ForwardSDE(path).drift(torch.zeros(2, 1), torch.tensor(0.5, dtype=torch.float16))


@pytest.mark.parametrize(("s", "t"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (math.nan, 0.5)])
def test_laws_need_ordered_times_in_the_domain(s: float, t: float) -> None:
    sde = ForwardSDE(VP())
    x = torch.zeros(2, 1)
    with pytest.raises(InputError, match=r"give 0 <= s < t <= T = 1"):
        sde.transition(s, t)
    with pytest.raises(InputError, match=r"give 0 <= t < s <= T = 1"):
        sde.posterior(x, x, s=t, t=s)


def test_problems_have_no_side_effects() -> None:
    path = VP()
    score = gaussian(path)
    x, t = torch.randn(4, 1, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.3)
    x_before, t_before, rng = x.clone(), t.clone(), torch.get_rng_state()
    for problem in (ForwardSDE(path), ProbabilityFlow(path, score), ReverseSDE(path, score)):
        problem.drift(x, t).zero_()
        problem.diffusion(t).zero_()
    for value in (
        *ForwardSDE(path).marginal(x, t),
        *ForwardSDE(path).posterior(x, x, t, 0.5 * t),
        *ForwardSDE(path).transition(t, 1),
    ):
        value.zero_()
    assert torch.equal(x, x_before)
    assert torch.equal(t, t_before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert ReverseSDE(path, score) == ReverseSDE(path, score)
    assert hash(ForwardSDE(path)) == hash(ForwardSDE(VP()))
