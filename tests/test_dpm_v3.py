"""DPM-Solver-v3: exact where its statistics are, equal to the methods it contains and to the paper's formula, its statistics to
closed ones.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path as File

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks import orders
from scores import Gaussian, GaussianMixture, Score
from sde import EDM, VP, Linear
from sde.errors import InputError, NetworkError
from solvers import SOLVERS, integrate, sample, trace
from solvers.base import Evaluator
from solvers.convergence import warped_grid
from solvers.dpm_v3 import DPMSolverV3, GaussianStatistics, ModelStatistics, statistics
from solvers.exact import flow_error
from solvers.exponential import AdamsMoulton, Multistep, UniPC
from solvers.exponential_rk import ExponentialRK
from solvers.exponential_tableaux import two_stage
from solvers.model_statistics import Curve
from solvers.plan import Lin, trace_solver
from solvers.starts import GradedStart, Started
from solvers.testing import paths

LEVELS = np.linspace(-6.0, 7.0, 40)
ROWS = {n: e.solver for n, e in SOLVERS.items() if isinstance(e.solver, DPMSolverV3)}
UNEVEN = [-2.0, -1.5, -0.7, 0.1, 0.6, 1.7, 2.1]


def table(slope, rate):
    return ModelStatistics(LEVELS, np.full(40, slope), np.full(40, rate))


def times(path, lams):
    return path.time(torch.tensor(lams, dtype=torch.float64)).tolist()


def mixture(path):
    """Three dimensions of unlike spread, two modes."""
    means = torch.tensor([[0.6, -0.2, 0.3], [-0.5, 0.4, 0.1]], dtype=torch.float64)
    variances = torch.tensor([[0.2, 0.05, 0.4], [0.1, 0.15, 0.3]], dtype=torch.float64)
    return GaussianMixture(path, torch.tensor([0.4, 0.6], dtype=torch.float64), means, variances)


def drawn(score, n, seed=0):
    return score.sample(n, t=0.0, seed=seed, dtype=torch.float64)


def start(path, lam=-2.0, n=5):
    k = path.knot_at(lam)
    size = math.hypot(k.alpha, k.sigma)
    return size * torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- exact on Gaussian data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=6)
@given(path=paths(), std=st.floats(0.05, 5.0), n=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_step_is_exact_on_isotropic_data_of_its_statistics(name, path, std, n, seed):
    """f = -l mu is carried exactly by s = l'/l, whatever the mean, the path and the number of nodes."""
    lams = np.sort(np.random.default_rng(seed).uniform(-2.5, 3.5, n + 1))
    ends = path.knots([path.T, 0.0])
    assume(ends[0].lam < lams[0] and ends[1].lam > lams[-1] and np.diff(lams).min() > 1e-3)
    mu = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    score = Gaussian(path, mu, std=std)
    grid = times(path, lams)
    x = start(path, lams[0]) + path.knot(grid[0]).alpha * mu
    solver = replace(ROWS[name], statistics=GaussianStatistics(std))
    exact = score.flow(x, grid[0], grid[-1])
    size = float(exact.abs().max()) + float(x.abs().max()) * path.knot(grid[-1]).alpha / path.knot(grid[0]).alpha
    assert float((integrate(solver, score, x, grid).x - exact).abs().max()) <= 1e-9 * size
    back = integrate(solver, score, exact, grid[::-1]).x  # towards noise
    assert float((back - x).abs().max()) <= 1e-9 * (float(x.abs().max()) + size * path.knot(grid[0]).alpha)


def test_the_rows_are_those_of_standard_deviation_one_half():
    assert {solver.statistics for solver in ROWS.values()} == {GaussianStatistics(0.5)}
    assert set(ROWS) >= {"dpm_v3_1_gaussian", "dpm_v3_2_gaussian", "dpm_v3_3_gaussian"}


def test_with_another_scale_it_is_not_exact():
    """The law above is one of the statistics, not of the formula: a factor two in std leaves an error of order one."""
    path = VP()
    score = Gaussian(path, torch.zeros(3), std=1.0)
    grid = times(path, [-2.0, 2.0])
    x = start(path)
    error = integrate("dpm_v3_1_gaussian", score, x, grid).x - score.flow(x, grid[0], grid[1])
    assert float(error.abs().max()) > 0.05


# --- the methods it contains ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize(("slope", "rate", "target"), [(1.0, 0.0, "x0"), (0.0, -1.0, "eps")])
def test_constant_statistics_are_data_and_noise_prediction(steps, slope, rate, target):
    path = VP()
    score, grid = mixture(path), times(path, UNEVEN)
    ours = integrate(DPMSolverV3(steps, table(slope, rate)), score, start(path), grid).x
    theirs = integrate(Multistep(steps, target), score, start(path), grid).x
    assert float((ours - theirs).abs().max()) < 1e-12
    corrected = integrate(DPMSolverV3(steps, table(slope, rate), corrector=1), score, start(path), grid).x
    moulton = integrate(AdamsMoulton(steps, steps + 1, target), score, start(path), grid).x
    assert float((corrected - moulton).abs().max()) < 1e-12
    assert float((corrected - ours).abs().max()) > 1e-6


@pytest.mark.parametrize("steps", [2, 3])
def test_lowered_at_the_end_it_is_unipc_with_exact_weights(steps):
    path = VP()
    score, x = mixture(path), start(path)
    for n in range(2, len(UNEVEN) + 1):
        grid = times(path, UNEVEN[:n])
        solver = DPMSolverV3(steps, table(1.0, 0.0), corrector=1, lower_final=True)
        other = integrate(UniPC(steps, "exact"), score, x, grid).x
        assert float((integrate(solver, score, x, grid).x - other).abs().max()) < 1e-12, n
        solver = DPMSolverV3(steps, table(1.0, 0.0), lower_final=True)
        other = integrate(Multistep(steps, "x0", lower_final=True), score, x, grid).x
        assert float((integrate(solver, score, x, grid).x - other).abs().max()) < 1e-12, n


# --- the paper's own form ---------------------------------------------------------------------------------------------


class Published:
    """The method as its paper and its release state it: one l, s and b a dimension, cumulative integrals on a fine grid of
    lambda, derivatives of g by Taylor's formula. Written from the paper's equations (8) to (11) and appendix; numpy alone.

        g_i = e^{-S_i} (sigma_i eps_i - l_i x_i)/alpha_i - B_i         B = int e^{-S} b,  S from lambda_s
        x_t = alpha_t (e^{-(L_t - L_s)} x_s/alpha_s - e^{-(L_t - L_s)} sum_k g^(k) int e^{L + S} (lambda - lambda_s)^k/k!
              - e^{-(L_t - L_s)} int e^{L + S} B)
    """

    def __init__(self, lam, slope, rate, b):
        self.lam, self.slope, self.rate, self.b = lam, slope, rate, b

    def _cumulative(self, y, x):
        return np.concatenate([0.0 * y[:1], np.cumsum(0.5 * np.diff(x)[:, None] * (y[1:] + y[:-1]), 0)])

    def update(self, x, s, t, f, nodes, pseudo):
        low = min([s, *nodes])
        at = np.unique(np.concatenate([np.linspace(low, max(t, *nodes), 6001), [s, t, *nodes]]))
        l, r, b = (np.stack([np.interp(at, self.lam, v) for v in c.T], 1) for c in (self.slope, self.rate, self.b))
        where = {v: int(np.searchsorted(at, v)) for v in (s, t, *nodes)}
        L, S = self._cumulative(l, at), self._cumulative(r, at)
        L, S = L - L[where[s]], S - S[where[s]]
        B = self._cumulative(np.exp(-S) * b, at)
        B = B - B[where[s]]
        g = [np.exp(-S[where[v]]) * fi - B[where[v]] for v, fi in zip(nodes, f, strict=True)]
        inside = slice(where[s], where[t] + 1)
        v = at[inside]
        integral = lambda y: self._cumulative(y, v)[-1]  # noqa: E731
        grown = np.exp(L + S)[inside]
        total = integral(grown * B[inside])
        for k, derivative in enumerate(self.derivatives(g, nodes, pseudo)):
            total = total + derivative * integral(grown * ((v - s) ** k)[:, None] / math.factorial(k))
        return np.exp(-L[where[t]]) * (x - total)

    def derivatives(self, g, nodes, pseudo):
        n = len(g)
        if pseudo:  # divided differences alone
            rows = [g]
            for i in range(1, n):
                last = rows[-1]
                rows.append([(last[j] - last[j + 1]) / (nodes[j] - nodes[i + j]) for j in range(n - i)])
            return [row[0] * math.factorial(i) for i, row in enumerate(rows)]
        powers = np.array([[(v - nodes[0]) ** i / math.factorial(i) for i in range(n)] for v in nodes])
        return list(np.einsum("ij,j...->i...", np.linalg.inv(powers), np.stack(g)))

    def run(self, score, x, path, grid, order, corrector, p_pseudo, c_pseudo, half=False):
        knots = path.knots(grid)
        y, history, previous = x / knots[0].alpha, [], None
        for i, (s, t) in enumerate(pairwise(knots)):
            eps = score.predict(torch.from_numpy(y) * s.alpha, s.t).eps.numpy()
            l = np.array([np.interp(s.lam, self.lam, c) for c in self.slope.T])
            history = [(s.lam, s.sigma / s.alpha * eps - l * y), *history]
            if corrector and previous is not None and (not half or s.t > 0.5):
                before, used = previous
                count = used + c_pseudo
                if count > 1:
                    chosen = [history[1], history[0], *history[2:count]]
                    lams, values = [v for v, _ in chosen], [f for _, f in chosen]
                    y = self.update(before, lams[0], s.lam, values, lams, c_pseudo)
            used = min(order, i + 1, len(knots) - 1 - i)
            lams, values = [v for v, _ in history[:used]], [f for _, f in history[:used]]
            previous = y, used
            y = self.update(y, s.lam, t.lam, values, lams, p_pseudo)
        return y * knots[-1].alpha


PUBLISHED = [  # order, corrector, p_pseudo, c_pseudo, half; ours
    (2, False, False, False, False, DPMSolverV3(2, lower_final=True)),
    (3, True, True, False, False, DPMSolverV3(3, corrector=0, pseudo="predictor", lower_final=True)),
    (3, True, False, False, False, DPMSolverV3(3, corrector=0, lower_final=True)),
    (2, True, False, True, False, DPMSolverV3(2, corrector=1, pseudo="corrector", lower_final=True)),
    (3, True, True, True, True, DPMSolverV3(3, corrector=1, pseudo="both", half=True, lower_final=True)),
]


@pytest.mark.parametrize(("order", "corrector", "p_pseudo", "c_pseudo", "half", "solver"), PUBLISHED)
def test_one_statistic_a_dimension_is_the_papers_method(order, corrector, p_pseudo, c_pseudo, half, solver):
    """Curves of our own, unlike in every dimension; the mean and the paper's b are tied by b = m' - s m."""
    path = VP()
    score = mixture(path)
    wave = np.array([0.3, 1.0, 1.7])
    fine = np.linspace(-3.0, 3.0, 1201)

    def curves(lam):
        u = lam[:, None] * 0.7 + wave
        return 0.5 + 0.4 * np.cos(u), -0.8 + 0.6 * np.sin(u), 0.3 * np.sin(u + 1.0), 0.21 * np.cos(u + 1.0)

    slope, rate, mean, _ = curves(fine[::10])
    found = ModelStatistics(fine[::10], slope, rate, mean)
    slope, rate, mean, change = curves(fine)
    published = Published(fine, slope, rate, change - rate * mean)
    grid, x = times(path, [-1.9, -1.3, -0.6, 0.3, 0.9, 1.5, 2.4]), start(path, -1.9)
    ours = integrate(replace(solver, statistics=found), score, x, grid)
    theirs = published.run(score, x.numpy(), path, grid, order, corrector, p_pseudo, c_pseudo, half)
    assert float(np.abs(ours.x.numpy() - theirs).max()) < 2e-5
    assert ours.nfe == len(grid) - 1


# --- orders -----------------------------------------------------------------------------------------------------------

STAGES = ExponentialRK(two_stage(), "x0")
TYPES = {
    "half": DPMSolverV3(2, corrector=1, half=True),
    "pseudo corrector": DPMSolverV3(3, corrector=1, pseudo="corrector"),
    "pseudo predictor, corrected": GradedStart(DPMSolverV3(3, corrector=1, pseudo="predictor")),
    "pseudo predictor": Started(DPMSolverV3(3, pseudo="predictor"), STAGES),
    "published corrector": Started(DPMSolverV3(3, corrector=0), STAGES),
    "published corrector, not started": DPMSolverV3(3, corrector=0),
    "corrected, lowered": DPMSolverV3(2, corrector=1, lower_final=True),
}


def slope_of(solver):
    path = VP()
    errors = [
        orders.mixture_error(trace_solver(solver, path, warped_grid(path, n, orders.LOW, orders.HIGH), 0.0, "v3"), path)
        for n in (80, 160)
    ]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("which", TYPES)
def test_declared_is_measured_of_those_that_are_no_rows(which):
    assert abs(slope_of(TYPES[which]) - TYPES[which].order) <= orders.TOLERANCE


def test_measured_statistics_keep_the_order():
    """Splines through few levels are smooth enough for order three."""
    path = VP()
    truth = orders._mixture(path)[0]
    ends = times(path, [orders.LOW, orders.HIGH])
    data = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5 - 0.1
    found = statistics(truth.score, data, levels=9, start=ends[0], stop=ends[1])
    for solver in (DPMSolverV3(3, found, corrector=1), Started(DPMSolverV3(3, found), STAGES)):
        assert abs(slope_of(solver) - 3.0) <= orders.TOLERANCE


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [VP(), EDM(), Linear()], ids=["VP", "EDM", "Linear"])
def test_statistics_of_isotropic_data_are_the_closed_ones(path):
    score, closed = Gaussian(path, torch.tensor([0.5, -1.0, 2.0]), std=0.7), GaussianStatistics(0.7)
    found = statistics(score, drawn(score, 16), levels=64)
    assert found.event == ()
    assert np.abs(found.slope - closed.slope_at(found.lam)).max() < 1e-9
    error = np.abs(found.rate - -2.0 * (1.0 - closed.slope_at(found.lam)))
    assert error[1:-2].max() < 0.02
    assert error.max() < 0.15  # one-sided differences at the ends
    grid = [float(path.time(found.lam[0])), float(path.time(found.lam[-1]))]
    x = start(path, found.lam[0])
    step = integrate(DPMSolverV3(1, found), score, x, grid).x - score.flow(x, *grid)
    assert float(step.abs().max()) < 2e-4 * 0.7  # one step over the whole path


def test_statistics_of_one_dimension_each():
    path, mu, std = VP(), torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    score = Gaussian(path, mu, std=std)
    found = statistics(score, drawn(score, 16), levels=24, per_dimension=True)
    slope = 1.0 / (1.0 + std.numpy() ** 2 * np.exp(2.0 * found.lam[:, None]))
    assert found.event == (3,)
    assert np.abs(found.slope - slope).max() < 1e-9
    assert np.abs(found.mean + slope * mu.numpy()).max() < 1e-6
    assert np.abs(found.rate).max() < 1e-3  # nothing is left but the mean
    grid, x = times(path, [-2.0, 2.0]), start(path)
    out = integrate(DPMSolverV3(1, found), score, x, grid).x
    assert float((out - score.flow(x, *grid)).abs().max()) < 2e-3  # anisotropic data in one step


def test_statistics_of_correlated_data():
    """l = tr K / d with K = rho^2 (C + rho^2)^-1, and the regression of f = (K - l)(y - mu) - l mu on its derivative along
    y' = -K (y - mu), K' = -2 K (1 - K), in the eigenbasis of C.
    """
    path, mu = VP(), torch.tensor([0.5, 1.0, 0.3], dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64))[0]
    variances = np.array([0.05, 0.4, 1.5])
    score = Gaussian(path, mu, cov=(q * torch.from_numpy(variances)) @ q.T)
    found = statistics(score, drawn(score, 4000, seed=2), levels=25, start=float(path.time(-2.5)), stop=float(path.time(2.5)))
    rho2 = np.exp(-2.0 * found.lam)[:, None]
    K = rho2 / (variances + rho2)
    K1 = -2.0 * K * (1.0 - K)
    l, l1, square = K.mean(1, keepdims=True), K1.mean(1, keepdims=True), float(mu.square().sum())
    total = variances + rho2
    size = ((K - l) ** 2 * total).sum(1) + l[:, 0] ** 2 * square
    rate = (((K - l) * (K1 - l1 - (K - l) * K)) * total).sum(1) + l[:, 0] * l1[:, 0] * square
    assert np.abs(found.slope - l[:, 0]).max() < 0.01
    assert np.abs(found.rate - rate / size)[1:-1].max() < 0.02


def test_the_slope_is_measured_where_the_gradient_depends_on_the_state():
    """l = E sigma d eps / dx, averaged over x_t: by autograd on other draws of a mixture, whose gradient is no constant."""
    path = VP()
    score = mixture(path)
    found = statistics(score, drawn(score, 4000), levels=7, start=float(path.time(-1.5)), stop=float(path.time(1.5)))
    x0, k = drawn(score, 20000, seed=5), path.knot(float(path.time(found.lam[3])))
    x = k.alpha * x0 + k.sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(6), dtype=x0.dtype)
    x.requires_grad_()
    eps = score.predict(x, k.t).eps
    trace = sum(torch.autograd.grad(eps[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1]))
    slopes = k.sigma * trace / x.shape[1]
    assert float(slopes.std()) > 0.02
    assert abs(found.slope[3] - float(slopes.mean())) < 5.0 * float(slopes.std()) * math.sqrt(1 / 4000 + 1 / 20000)


def test_statistics_count_their_calls_and_leave_no_traces():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.calls = torch.nn.Parameter(torch.tensor(0.7)), 0

        def forward(self, x, t):
            self.calls += 1
            return self.scale * x

    network = Network().train()
    score = Score(network, VP(), "eps", mode="eval")
    data, before = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.get_rng_state()
    with torch.inference_mode():
        found = statistics(score, data, levels=5, repeats=2)
    assert found.nfe == found.net_evals == network.calls == 4 * 5 * 2
    assert network.training
    assert network.scale.grad is None
    assert not data.requires_grad
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    sigma = VP().sigma(VP().time(torch.from_numpy(found.lam))).numpy()
    assert np.abs(found.slope - 0.7 * sigma).max() < 1e-6  # d eps/dx = .7
    again = statistics(score, data, levels=5, repeats=2)
    assert np.array_equal(again.rate, found.rate)
    once = statistics(score, data, levels=5)
    assert once.nfe == 20


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "velocity"])
def test_statistics_do_not_depend_on_what_the_network_predicts(predicts):
    path = VP()
    exact = mixture(path)

    def network(x, t):
        k = path.knot(float(t[0]))
        pair = exact.predict(x, k.t)
        a, b = Score(lambda x, t: x, path, predicts).row(k)
        return a * pair.x0 + b * pair.eps

    data = drawn(exact, 40)
    one, other = (statistics(s, data, levels=8) for s in (exact, Score(network, path, predicts)))
    assert np.abs(one.slope - other.slope).max() < 1e-9
    assert np.abs(one.rate - other.rate).max() < 1e-7


@pytest.mark.parametrize(
    "network", [lambda x, t: x.detach(), lambda x, t: torch.zeros_like(x), torch.no_grad()(lambda x, t: 0.9 * x)]
)
def test_a_network_without_a_gradient_is_refused(network):
    """Through eps = (x - alpha x0)/sigma the gradient of x alone would pass for the network's: l = 1 everywhere."""
    with pytest.raises(InputError, match="gradient"):
        statistics(Score(network, VP(), "x0"), torch.ones(4, 2))


def test_statistics_tell_what_is_wrong():
    score = Gaussian(VP(), torch.zeros(2), std=0.5)
    with pytest.raises(InputError, match="levels"):
        statistics(score, torch.ones(4, 2), levels=2)
    with pytest.raises(InputError, match="Score"):
        statistics(lambda x, t: x, torch.ones(4, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(NetworkError, match="boom"):
        statistics(Score(lambda x, t: exec_error(), VP(), "eps"), torch.ones(4, 2))


def exec_error():
    raise ValueError("boom")


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_curves_pass_through_their_points_and_know_their_integral(shape):
    x = np.array([-1.0, -0.4, 0.1, 1.0, 1.3])
    y = np.random.default_rng(0).normal(size=(5, *shape))
    curve = Curve(x, y)
    assert np.abs(curve(x) - y).max() < 1e-12
    assert np.abs(curve(np.array([-3.0, 9.0])) - y[[0, -1]]).max() < 1e-12
    d = 1e-4  # continuous with two derivatives across the inner knots
    for v in x[1:-1]:
        outer = [curve(v + s) for s in (-2 * d, -d, 0.0, d, 2 * d)]
        assert np.abs(outer[1] - outer[3]).max() < 1e-2
        left, right = (outer[0] - 2 * outer[1] + outer[2]) / d**2, (outer[2] - 2 * outer[3] + outer[4]) / d**2
        assert np.abs(left - right).max() < 0.05
    points, weights = np.polynomial.legendre.leggauss(4)
    pieces = [-2.0, *x, 2.5]
    total = 0.0
    for a, b in pairwise(pieces):  # exact on every cubic piece
        total = total + sum(
            0.5 * (b - a) * w * curve(0.5 * (a + b) + 0.5 * (b - a) * p) for p, w in zip(points, weights, strict=True)
        )
        assert np.abs(curve.integral(b) - curve.integral(-2.0) - total).max() < 1e-12
    assert np.abs(curve.integral(x[0])).max() == 0.0
    straight = Curve(x[:2], np.array([1.0, 2.0]))
    assert abs(float(straight(-0.7)) - 1.5) < 1e-12


@pytest.mark.parametrize("pseudo", [False, True])
@pytest.mark.parametrize(("a", "b"), [(-2.6, 2.2), (2.2, -2.6)])
def test_weights_are_integrals_however_rough_the_statistics(a, b, pseudo):
    """Against Simpson's rule on forty thousand points: one step over all levels of splines that bend hard at each."""
    found = ModelStatistics([-3.0, -1.1, -0.9, 0.3, 3.0], [0.9, 0.2, 0.8, 0.1, 0.6], [0.5, -2.0, 1.0, -1.5, 0.0])
    nodes = [a, a - 0.4 * (b - a), a - 0.9 * (b - a)]
    decay, weights, shift = DPMSolverV3(3, found)._weights(a, b, nodes, pseudo)
    edges = [a, *(v for v in (found.lam if b > a else found.lam[::-1]) if min(a, b) < v < max(a, b)), b]
    total = np.zeros(3)
    (_, s), (end, _) = found.growth(np.array(nodes)), found.growth(np.array(b))
    for low, high in pairwise(edges):
        u = np.linspace(low, high, 8001)
        simpson = np.array([1.0, *[4.0, 2.0] * 3999, 4.0, 1.0]) * (high - low) / 24000.0
        inside, grown = found.growth(u)
        first, second = u - nodes[0], (u - nodes[0] if pseudo else u - nodes[1])
        x, y, z = nodes
        rest = [
            1.0 + first / (x - y) + first * second / ((x - y) * (x - z)),
            first / (y - x) + first * second / ((y - x) * (y - z)),
        ]
        for j, q in enumerate([*rest, first * second / ((z - x) * (z - y))]):
            total[j] += float((simpson * np.exp(inside - end + grown - s[j]) * q).sum())
    assert np.abs(total - weights).max() < 1e-10 * np.abs(total).max()
    assert abs(float(decay) - math.exp(float(found.growth(np.array(a))[0] - end))) < 1e-14
    assert shift is None


def test_a_parabola_is_a_curve():
    x = np.array([-1.0, -0.4, 0.1, 1.0, 1.3])
    v = np.linspace(-1.0, 1.3, 50)
    assert np.abs(Curve(x, x**2 - x)(v) - (v**2 - v)).max() < 1e-12


# --- what a solver of it is -------------------------------------------------------------------------------------------


def test_the_same_samples_on_every_path_and_the_scale_of_the_data():
    """In (x/alpha, lambda) the path does not show; data c times as large, on levels c times as high, want c times the std."""
    y, ends = start(VP()), []
    for path in (VP(), EDM(), Linear()):
        plan = trace("dpm_v3_3_gaussian_corrected", path, times(path, UNEVEN))
        ends.append(plan.run(mixture(path), plan.grid[0].alpha * y) / plan.grid[-1].alpha)
    assert float((ends[0] - ends[1]).abs().max()) < 1e-7
    assert float((ends[0] - ends[2]).abs().max()) < 1e-7
    path, c = EDM(), 3.0
    score = Gaussian(path, torch.tensor([0.3, -0.1, 0.2]), std=torch.tensor([0.2, 0.5, 1.0]))
    large = Gaussian(path, c * torch.tensor([0.3, -0.1, 0.2]), std=c * torch.tensor([0.2, 0.5, 1.0]))
    shifted = [lam - math.log(c) for lam in UNEVEN]
    plain = integrate(DPMSolverV3(2), score, y, times(path, UNEVEN)).x
    scaled = integrate(DPMSolverV3(2, GaussianStatistics(0.5 * c)), large, c * y, times(path, shifted)).x
    assert float((scaled / c - plain).abs().max()) < 1e-8
    assert float((integrate(DPMSolverV3(2), large, c * y, times(path, shifted)).x / c - plain).abs().max()) > 1e-3


def test_one_number_a_level_is_a_table_and_one_a_dimension_is_not():
    path = VP()
    score, grid = mixture(path), times(path, UNEVEN)
    numbers = ModelStatistics([-3.0, 0.0, 3.0], [0.9, 0.5, 0.1], [0.0, -0.5, -1.0])
    flat = [np.repeat(v[:, None], 3, 1) for v in (numbers.slope, numbers.rate)]
    arrays = ModelStatistics(numbers.lam, flat[0], flat[1], np.zeros((3, 3)))
    solver = DPMSolverV3(3, numbers, corrector=1)
    wide = replace(solver, statistics=arrays)
    assert solver.linear
    assert not wide.linear
    plan = trace(solver, path, grid)
    x = start(path)
    assert float((plan.run(score, x) - integrate(wide, score, x, grid).x).abs().max()) < 1e-12
    assert float((integrate(solver, score, x, grid, traced=False).x - plan.run(score, x)).abs().max()) < 1e-12
    with pytest.raises(InputError, match="no table"):
        trace(wide, path, grid)
    with pytest.raises(InputError, match=r"\(3,\)"):
        integrate(wide, Gaussian(path, torch.zeros(2), std=0.5), torch.ones(4, 2, dtype=torch.float64), grid)
    out = sample(score, (4, 3), solver=wide, nfe=6, seed=3)
    assert out.nfe == 6
    assert out.x.dtype is torch.float32
    alone = sample(score, (1, 3), solver=wide, nfe=6, seed=3)
    assert float((alone.x - out.x[:1]).abs().max()) < 1e-5
    assert sample(score, (2, 3), solver=wide, nfe=4, stop=0.0).x.isfinite().all()


def test_statistics_help_where_dimensions_differ():
    """Spectrum 1/k in sixteen dimensions, six calls, exact errors: a third of DPM-Solver++'s and of UniPC's."""
    path, variances = VP(), 0.8 / torch.arange(1, 17, dtype=torch.float64)
    score = Gaussian(path, torch.zeros(16, dtype=torch.float64), var=variances)
    found = statistics(score, drawn(score, 200), levels=24, start=float(path.time(-4.0)), stop=float(path.time(3.5)))
    grid = times(path, np.linspace(-4.0, 3.5, 7))
    errors = {
        str(solver): flow_error(trace(solver, path, grid), score)
        for solver in ("dpmpp_2m", "unipc_3", "dpm_v3_2_gaussian_corrected")
    }
    ours = flow_error(trace(DPMSolverV3(2, found, corrector=1), path, grid), score)
    assert ours < min(errors.values()) / 3.0, (ours, errors)


def test_its_memory_is_one_buffer_a_prediction():
    """The value that is kept has a register of its own: no step refers to the states it was made from."""
    path = VP()
    plan = trace("dpm_v3_3_gaussian", path, times(path, UNEVEN))
    longest = max(len(row.terms) for row in plan.rows if isinstance(row, Lin))
    assert longest <= 4  # the state and three values


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DPMSolverV3(0), "steps >= 1"),
        (lambda: DPMSolverV3(2, corrector=2), "corrector"),
        (lambda: DPMSolverV3(1, corrector=0), "corrector=1"),
        (lambda: DPMSolverV3(2, pseudo="all"), "pseudo"),
        (lambda: DPMSolverV3(2, 0.5), "GaussianStatistics"),  # pyright: ignore[reportArgumentType]
        (lambda: GaussianStatistics(0.0), "std"),
        (lambda: GaussianStatistics(math.inf), "std"),
        (lambda: ModelStatistics([0.0], [1.0], [0.0]), "lam"),
        (lambda: ModelStatistics([0.0, 0.0], [1.0, 1.0], [0.0, 0.0]), "rise"),
        (lambda: ModelStatistics([0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0]), "slope"),
        (lambda: ModelStatistics([0.0, 1.0], [1.0, 1.0], [[0.0], [0.0]]), "rate"),
        (lambda: ModelStatistics([0.0, 1.0], [1.0, math.nan], [0.0, 0.0]), "finite"),
        (lambda: ModelStatistics([0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]), "vector"),
    ],
)
def test_bad_input_is_told(make, match):
    with pytest.raises(InputError, match=match):
        make()


def test_the_page_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    text = (File(__file__).parents[1] / "docs" / "dpm_v3.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    names: dict = {}
    for block in blocks:
        exec(compile(block, "dpm_v3.md", "exec"), names)  # noqa: S102
    assert capsys.readouterr().out == "ModelStatistics(48 levels, one number each) 192\n"
    assert np.array_equal(names["again"].mean, names["wide"].mean)


@pytest.mark.parametrize(
    ("solver", "says"),
    [
        (DPMSolverV3(1), "as any step"),
        (DPMSolverV3(2), "order 1 first step, then growing"),
        (DPMSolverV3(3, corrector=0), "order 1 first step, then growing"),
        (DPMSolverV3(2, corrector=1), "order 2 first step, then growing"),
    ],
)
def test_the_first_step_is_said_to_be_what_it_is(solver, says):
    """A first step of order k errs by h^(k+1), told from the state after it, corrected on arrival where that is done."""
    assert solver.start_rule == says
    path, score = VP(), mixture(VP())
    errors = []
    for h in (0.04, 0.02):
        grid, x = times(path, [-0.5, -0.5 + h, -0.5 + 2.0 * h]), start(path, -0.5)
        truth = integrate("rk4", score, x, times(path, np.linspace(-0.5, -0.5 + h, 9).tolist())).x
        if solver.corrector == 1:  # what the second step sets out from: the two runs differ by its own share alone
            pending = solver.step(Evaluator(score, x), x, *path.knots(grid)[:2], None, lambda s, t: None)
            _, history = pending.carry
            arrived = path.knots(grid)[1]
            value = solver._value(score.predict(pending.x, arrived.t), arrived)
            state = solver._corrected(pending.carry[0], history, (arrived, value))
        else:
            state = integrate(solver, score, x, grid[:2]).x
        errors.append(float((state - truth).abs().max()))
    first = 1 + (solver.corrector == 1)
    assert abs(math.log2(errors[0] / errors[1]) - (first + 1)) < 0.15
