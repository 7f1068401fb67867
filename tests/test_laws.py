"""Laws that hold for every row of SOLVERS, whatever the path, the grid and the target: drawn by hypothesis.

What a row must obey follows from what its solver says of itself: ``target`` (the prediction that one step integrates exactly
where it is constant), ``invariant`` (in the coordinates (x/alpha, lambda) it does not see the path), ``linear``.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks import orders
from scores import GaussianMixture, Score
from sde import VP, Cosine, Linear, ReverseSDE
from sde.noise import Draws, Source, White
from solvers import SOLVERS, integrate, trace
from solvers.exponential import Multistep
from solvers.plan import Call, trace_solver
from solvers.testing import paths

LINEAR = [n for n, e in SOLVERS.items() if e.solver.linear]
FLOW = [n for n in LINEAR if SOLVERS[n].deterministic]
TARGETED = [n for n in FLOW if getattr(SOLVERS[n].solver, "target", None) in ("x0", "eps")]
INVARIANT = [n for n in LINEAR if getattr(SOLVERS[n].solver, "invariant", False)]
FIXED = [n for n, e in SOLVERS.items() if not getattr(e.solver, "adaptive", False)]

MEANS = torch.tensor([[1.0, 0.5, -0.3], [-0.8, 0.1, 0.9]], dtype=torch.float64)
VARIANCES = torch.tensor([[0.3, 0.1, 0.5], [0.2, 0.4, 0.1]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.4, 0.6], dtype=torch.float64)


def mixture(path, rotation=None, shift=0.0, scale=1.0):
    rotation = torch.eye(3, dtype=torch.float64) if rotation is None else rotation
    covs = torch.stack([scale**2 * (rotation * v) @ rotation.T for v in VARIANCES])
    return GaussianMixture(path, WEIGHTS, scale * MEANS @ rotation.T + shift, covs)


@st.composite
def grids(draw, low=-2.0, high=2.5, most=7):
    """Increasing half log-SNRs, unevenly spaced (ratios of steps up to five)."""
    widths = draw(st.lists(st.floats(0.2, 1.0), min_size=1, max_size=most))
    start = draw(st.floats(low, low + 1.0))
    total = math.fsum(widths)
    out = [start]
    for w in widths:
        out.append(out[-1] + w * (high - start) / total)
    return out


def reaches(path, lams):
    k = path.knots([path.T, 0.0])
    return k[0].lam < lams[0] and k[1].lam > lams[-1]


def times(path, lams):
    return path.time(torch.tensor(lams, dtype=torch.float64)).tolist()


def constant(path, target, value):
    return Score(lambda x, t: value.expand_as(x), path, predicts=target)


@pytest.mark.parametrize("name", TARGETED)
@settings(max_examples=3)
@given(path=paths(), lams=grids(), seed=st.integers(0, 1000))
def test_constant_predictions_are_integrated_exactly_in_any_number_of_steps(name, path, lams, seed):
    """x_t = alpha_t x0 + sigma_t/sigma_s (x_s - alpha_s x0), or sigma_t eps + alpha_t/alpha_s (x_s - sigma_s eps): so steps of
    such a method compose exactly.
    """
    assume(reaches(path, lams))
    target = SOLVERS[name].solver.target
    x, value = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plan = trace(name, path, times(path, lams))
    s, t = plan.grid[0], plan.grid[-1]
    if target == "x0":
        exact = t.alpha * value + (t.sigma / s.sigma) * (x - s.alpha * value)
    else:
        exact = t.sigma * value + (t.alpha / s.alpha) * (x - s.sigma * value)
    size = float(exact.abs().max()) + max(t.alpha, t.sigma, t.alpha / s.alpha * s.sigma)
    assert float((plan.run(constant(path, target, value), x) - exact).abs().max()) <= 1e-9 * size


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_constant_eps_is_exact_down_to_sigma_zero(eta):
    """x_0 = (x_s - sigma_s eps)/alpha_s at eta = 0; at any eta what noise is left is sigma_s/alpha_s eta z. From a start where
    alpha is far from one, so that no power of it is taken for another.
    """
    path = VP()
    x, value = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = trace_solver(Multistep(1, "eps"), path, (0.6, 0.0), eta, "ddim")
    s = plan.grid[0]
    z = White(3).open(tuple(x.shape), x.dtype).normal(0, *plan.grid)
    gain = 1.0 + eta**2
    exact = (x - gain * s.sigma * value + eta * s.sigma * z) / s.alpha
    assert s.alpha < 0.5
    out = plan.run(constant(path, "eps", value), x, noise=White(3))
    assert float((out - exact).abs().max()) <= 1e-12 * float(exact.abs().max())


@pytest.mark.parametrize("name", [n for n in LINEAR if SOLVERS[n].solver.takes_eta and SOLVERS[n].solver.order])
def test_the_probability_flow_draws_no_noise(name):
    assert trace(name, VP(), [0.8, 0.5, 0.2], eta=0.0).draws == 0
    assert trace(name, VP(), [0.8, 0.5, 0.2], eta=1.0).draws > 0


@pytest.mark.parametrize("name", INVARIANT)
@settings(max_examples=2)
@given(one=paths(), other=paths(), lams=grids(), seed=st.integers(0, 1000))
def test_the_same_log_snr_grid_gives_the_same_samples_on_every_path(name, one, other, lams, seed):
    assume(one != other and reaches(one, lams) and reaches(other, lams))
    same_samples(name, (one, other), lams, seed)


@pytest.mark.parametrize("name", INVARIANT)
def test_rows_that_are_measured_on_one_path_do_not_see_which(name):
    """What lets test_orders measure them on the first of its paths alone."""
    same_samples(name, tuple(orders.PATHS.values()), [-1.0, -0.7, -0.1, 0.2, 0.9, 1.5], 7)


def same_samples(name, paths, lams, seed):
    y = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = y * math.hypot(1.0, math.exp(-lams[0]))
    ends = []
    for path in paths:
        plan = trace(name, path, times(path, lams))
        out = plan.run(mixture(path), plan.grid[0].alpha * y, noise=White(seed))
        ends.append(out / plan.grid[-1].alpha)
    for other in ends[1:]:
        assert float((ends[0] - other).abs().max()) <= 1e-6 * float(y.abs().max())  # path.time(lambda) is good to about 1e-9


class Turned(Source):
    """White noise, turned by an orthogonal matrix and drawn for the same samples."""

    def __init__(self, rotation, seed):
        self.rotation, self.white = rotation, White(seed)

    def open(self, shape, dtype=torch.float32, device="cpu"):
        return _TurnedDraws(self.rotation, self.white.open(shape, dtype, device))


class _TurnedDraws(Draws):
    def __init__(self, rotation, draws):
        self.rotation, self.draws = rotation, draws

    def initial(self, out=None):
        return self.draws.initial() @ self.rotation.T

    def normal(self, k, s, t, like=None, out=None):
        return self.draws.normal(k, s, t) @ self.rotation.T


@pytest.mark.parametrize("name", FIXED)
def test_samples_turn_with_the_data_and_the_noise(name):
    path, g = VP(), torch.Generator().manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
    grid = times(path, [-1.5, -0.9, -0.5, 0.1, 0.9, 1.2])
    x = torch.randn(4, 3, generator=g, dtype=torch.float64)
    eta = SOLVERS[name].eta
    plain = integrate(name, ReverseSDE(path, mixture(path), eta), x, grid, noise=White(3)).x
    score = mixture(path, rotation)
    turned = integrate(name, ReverseSDE(path, score, eta), x @ rotation.T, grid, noise=Turned(rotation, 3)).x
    assert float((turned - plain @ rotation.T).abs().max()) <= 1e-9 * float(plain.abs().max())


@pytest.mark.parametrize("name", TARGETED)
@settings(max_examples=3)
@given(lams=grids(), shift=st.floats(-3.0, 3.0))
def test_samples_shift_with_the_data(name, lams, shift):
    """Data moved by m: a sampler exact on constant predictions moves its samples by alpha m."""
    path = Linear()
    plan = trace(name, path, times(path, lams))
    s, t = plan.grid[0], plan.grid[-1]
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = plan.run(mixture(path), x)
    moved = plan.run(mixture(path, shift=shift), x + s.alpha * shift)
    assert float((moved - plain - t.alpha * shift).abs().max()) <= 1e-9 * (1.0 + abs(shift)) * (1.0 + float(plain.abs().max()))


@pytest.mark.parametrize("name", INVARIANT)
@settings(max_examples=3)
@given(lams=grids(), factor=st.floats(0.1, 10.0))
def test_samples_scale_with_the_data(name, lams, factor):
    """Data and noise levels scaled by c: the table sees ratios of sigma/alpha alone, so samples scale by c. On a grid moved by
    -log c.
    """
    shifted = [lam - math.log(factor) for lam in lams]
    path = Linear()
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, two = trace(name, path, times(path, lams)), trace(name, path, times(path, shifted))
    plain = one.run(mixture(path), one.grid[0].alpha * x, noise=White(1)) / one.grid[-1].alpha
    scaled = two.run(mixture(path, scale=factor), two.grid[0].alpha * factor * x, noise=White(1)) / two.grid[-1].alpha
    assert float((scaled / factor - plain).abs().max()) <= 1e-6 * (1.0 + float(plain.abs().max()))


@pytest.mark.parametrize("name", LINEAR)
def test_no_time_is_skipped_or_asked_twice_at_the_same_state(name):
    """On 1, 2, 3, 5, 7 steps: a flow's every time but the last is asked for (churn and the like go to other times); no (state,
    time) is asked for twice.
    """
    for path in (VP(), Linear() if name != "ddpm_discrete" else Cosine()):  # a variance-preserving path is all it takes
        for n in (1, 2, 3, 5, 7):
            grid = times(path, [-1.5 + 3.0 * i / n for i in range(n + 1)])
            plan = trace(name, path, grid)
            calls = [row for row in plan.rows if isinstance(row, Call)]
            counted = Counter((row.state, plan.knots[row.knot].t) for row in calls)
            assert max(counted.values()) == 1, counted
            if name in FLOW:
                assert {row[1] for row in counted} >= set(plan.times[:-1])
            assert plan.nfe == len(calls)
