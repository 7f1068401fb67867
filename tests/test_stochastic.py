"""Stochastic, composed and few-step samplers against formulas written out here from the papers, and against their exact laws.

Formulas of released code are transcribed in their own coordinates (k-diffusion's x/alpha and sigma, rectified flow's time,
diffusers' cumulative products), so that an error of ours in going from one to the other would show.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks import probing
from scores import Gaussian, Score
from sde import EDM, VE, VP, Cosine, FromFunctions, Linear, ReverseSDE, SubVP
from sde.errors import InputError, PathError
from sde.noise import Draws, Source
from sde.prediction import Prediction
from solvers import SOLVERS, exact_law, integrate, sample, trace
from solvers.base import Step
from solvers.compose import Ancestral, Flow, Langevin, PredictorCorrector, Restart, Underdamped
from solvers.convergence import warped_grid
from solvers.er_sde import ERSDE, NOISE_SCALES
from solvers.exponential import Multistep
from solvers.few_step import Consistency, TrajectoryConsistency
from solvers.plan import Call
from solvers.runge_kutta import RungeKutta
from solvers.stochastic import (
    SRA1,
    SRA2,
    SRA3,
    STOCHASTIC_HEUN,
    AdditiveTableau,
    DiscreteDDPM,
    EulerMaruyama,
    StochasticRungeKutta,
)
from solvers.tableaux import EULER, HEUN
from solvers.testing import paths

DDIM = Multistep(1, "x0")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NORMALS = randn(400, 3, 2, seed=1)
START = randn(3, 2, seed=2)


class Stored(Source):
    """Draw k of a run is the k-th of NORMALS."""

    def open(self, shape, dtype=torch.float32, device="cpu"):
        return _Stored()


class _Stored(Draws):
    def initial(self, out=None):
        return START.clone()

    def normal(self, k, s, t, like=None, out=None):
        return NORMALS[k].clone()


def denoiser(y, sigma):
    """E[x0] in EDM's coordinates: smooth, nonlinear, dependent on the level."""
    return torch.tanh(y / math.hypot(1.0, sigma)) * (1.0 + 0.3 * math.log1p(sigma))


def score_on(path):
    """The same denoiser on any path."""

    def network(x, t):
        k = path.knot(float(t[0]))
        return denoiser(x / k.alpha, k.sigma / k.alpha)

    return Score(network, path, "x0")


def run(solver, path, times, eta=0.0, x=START):
    """The end by the table, which must be that of the plain loop."""
    problem = ReverseSDE(path, score_on(path), eta)
    ends = [integrate(solver, problem, x, times, noise=Stored(), traced=traced).x for traced in (True, False)]
    assert close(*ends, 1e-10)
    return ends[0]


def close(a, b, tolerance=1e-9):
    return float((a - b).abs().max()) <= tolerance * (1.0 + float(b.abs().max()))


levels = st.lists(st.floats(0.05, 1.5), min_size=1, max_size=4).map(
    lambda logs: [20.0 * math.exp(-v) for v in itertools.accumulate([0.0, *logs])]
)


class ExactFlow:
    """The exact flow of N(0, variance) data: what is left of a composed method's error is its own."""

    order, weak, strong, stages = 1.0, None, None, 1
    stochastic = takes_eta = False
    linear = True

    def __init__(self, variance):
        self.variance = variance

    def step(self, problem, x, s, t, carry, noise):
        a, b = (k.alpha**2 * self.variance + k.sigma**2 for k in (s, t))
        return Step(math.sqrt(b / a) * x)


# --- ancestral --------------------------------------------------------------------------------------------------------


def k_split(sigma_from, sigma_to, eta):
    """k-diffusion's get_ancestral_step."""
    up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - up**2) ** 0.5, up


def k_ancestral(kind, sigmas, eta, y):
    """k-diffusion's loops in its own coordinates: Euler, DPM-2 with the geometric midpoint, DPM-Solver++(2S), Heun."""
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        down, up = k_split(s, t, eta)
        x0 = denoiser(y, s)
        d = (y - x0) / s
        if kind == "euler":
            y = y + d * (down - s)
        elif kind == "heun":
            z = y + d * (down - s)
            y = y + 0.5 * (down - s) * (d + (z - denoiser(z, down)) / down)
        else:
            middle = math.sqrt(s * down)
            z = y + d * (middle - s)
            if kind == "dpm_2":
                y = y + (z - denoiser(z, middle)) / middle * (down - s)
            else:
                y = down / s * y + (1.0 - down / s) * denoiser(z, middle)
        y = y + up * NORMALS[i]
    return y


@pytest.mark.parametrize("kind", ["euler", "heun", "dpm_2", "dpmpp_2s"])
@settings(max_examples=15)
@given(sigmas=levels, eta=st.sampled_from([0.0, 0.3, 1.0]))
def test_ancestral_steps_are_k_diffusion_s(kind, sigmas, eta):
    mine = run(f"{kind}_ancestral", EDM(), sigmas, eta)
    assert close(mine, k_ancestral(kind, sigmas, eta, START), 1e-8)


@settings(max_examples=15)
@given(sigmas=levels, eta=st.sampled_from([0.3, 1.0]))
def test_ancestral_steps_are_the_same_on_every_path(sigmas, eta):
    lams = [-math.log(v) for v in sigmas]
    for path in (VP(), Linear(), Cosine()):
        times = path.time(torch.tensor(lams, dtype=torch.float64)).tolist()
        ks = path.knots(times)
        mine = run("heun_ancestral", path, times, eta, ks[0].alpha * START) / ks[-1].alpha
        assert close(mine, k_ancestral("heun", sigmas, eta, START), 1e-6)


def flow_ancestral(sigmas, eta, x):
    """ComfyUI's euler_ancestral_RF, whose eta is the square of ours."""
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        down = t * (1.0 + (t / s - 1.0) * eta)
        x0 = denoiser(x / (1.0 - s), s / (1.0 - s))
        x = down / s * x + (1.0 - down / s) * x0
        above, below = 1.0 - t, 1.0 - down
        x = above / below * x + NORMALS[i] * (t**2 - down**2 * above**2 / below**2) ** 0.5
    return x


@settings(max_examples=15)
@given(steps=st.lists(st.floats(0.05, 0.9), min_size=1, max_size=4), eta=st.sampled_from([0.2, 0.7, 1.0]))
def test_the_rectified_flow_split_is_comfyui_s(steps, eta):
    times = [0.95 * v for v in itertools.accumulate([1.0, *steps], lambda a, b: a * b)]
    assert close(run("euler_ancestral_rf", Linear(), times, eta), flow_ancestral(times, eta * eta, START), 1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_ddim_eta_is_the_formula_of_the_paper_and_ddpm_only_at_its_ends(eta):
    """Song, Meng & Ermon (2021), eqs. 12 and 16, with cumulative products abar = alpha^2."""
    path, times = VP(), [0.8, 0.5, 0.3, 0.1]
    score, x = score_on(path), START
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        here, there = float(path.alpha(s)) ** 2, float(path.alpha(t)) ** 2
        p = score.predict(x, s)
        std = eta * math.sqrt((1.0 - there) / (1.0 - here)) * math.sqrt(1.0 - here / there)
        x = math.sqrt(there) * p.x0 + math.sqrt(1.0 - there - std**2) * p.eps + std * NORMALS[i]
    assert close(run("ddim_eta", path, times, eta), x)
    assert close(run("ddpm", path, times, eta), x) == (eta in (0.0, 1.0))


def test_both_etas_are_the_noise_level_of_the_reverse_sde_in_small_steps():
    """The variance of the added noise over eta^2 times the growth of rho^2 tends to 1 for both rules."""
    path = EDM()
    for rule in ("k", "rf"):
        for eta in (0.3, 1.0, 1.4):
            plan = trace(Ancestral(ExactFlow(0.0), rule), path, [1.001, 1.0], eta)
            law = exact_law(plan, Gaussian(path, torch.zeros(1, dtype=torch.float64), var=1.0), start=(0.0, 0.0))
            assert float(law.variance) / (eta**2 * (1.001**2 - 1.0)) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize("rule", ["k", "rf"])
@settings(max_examples=15)
@given(path=paths(), variance=st.floats(0.05, 4.0), lams=st.lists(st.floats(0.1, 1.5), min_size=1, max_size=5))
def test_ancestral_noise_keeps_every_marginal(rule, eta, path, variance, lams):
    ends = path.knots([path.T, 0.0])
    lams = list(itertools.accumulate([-2.0, *lams]))
    assume(ends[0].lam < lams[0] and ends[1].lam > lams[-1])
    data = Gaussian(path, torch.zeros(1, dtype=torch.float64), var=variance)
    times = path.time(torch.tensor(lams, dtype=torch.float64)).tolist()
    law = exact_law(trace(Ancestral(ExactFlow(variance), rule), path, times, eta), data)
    assert law.w2(times[-1]) <= 1e-10 * (1.0 + math.sqrt(float(law.variance)))


def test_ancestral_limits():
    """From alpha = 0 and to sigma = 0 by DDIM; the level below t is never below the path's; towards noise only eta = 0."""
    for name in ("euler_ancestral", "euler_ancestral_rf"):
        for eta in (0.3, 1.0, 2.0):
            for times in ([1.0, 0.5, 0.0], [1.0, 0.0]):
                score = Score(lambda x, t: 0.5 * torch.tanh(x), Linear(), "velocity")
                assert integrate(name, ReverseSDE(Linear(), score, eta), START, times).x.isfinite().all()
    for name, low in (("euler_ancestral", 0.0), ("euler_ancestral_rf", 1.0 / 3.0)):  # tau_d = tau_t^2 from tau_s = 1
        data = Gaussian(Linear(), torch.zeros(1, dtype=torch.float64), var=0.0)
        law = exact_law(trace(name, Linear(), [1.0, 0.5], 1.0), data, start=(0.0, 0.0))
        assert float(law.variance) == pytest.approx(0.25 * (1.0 - low**2), rel=1e-9)
    path = VE(0.5, 50.0)
    plan = trace("euler_ancestral", path, [0.9, 0.4, 0.02], 1.5)
    assert min(k.t for k in plan.knots) >= 0.0
    point = Gaussian(path, torch.full((1,), 0.3, dtype=torch.float64), var=0.0)
    assert exact_law(plan, point).w2(0.02) < 1e-12
    with pytest.raises(InputError, match="towards data"):
        trace("euler_ancestral", VP(), [0.2, 0.6], 1.0)
    assert close(run("euler_ancestral", VP(), [0.2, 0.6], 0.0), run("ddim", VP(), [0.2, 0.6]))


def test_wrapped_solvers_follow_the_flow():
    """A solver that takes eta adds no noise of its own inside another."""
    path, times = VP(), [0.8, 0.5, 0.2]
    plan = trace("euler_ancestral", path, times, 1.0)
    assert plan.draws == 2
    assert close(run(Ancestral(DDIM), path, times, 0.7), run(Ancestral(RungeKutta(EULER, "rho")), path, times, 0.7), 1e-8)

    class Problem:
        path = VP()
        predict = staticmethod(lambda x, k: Prediction(x, x))
        keep = staticmethod(lambda x: ("kept", x))
        eta = staticmethod(lambda k: 1.0)

    flow = Flow(Problem())
    assert flow.eta(path.knot(0.5)) == 0.0
    assert flow.keep(1.0) == ("kept", 1.0)


# --- restart ----------------------------------------------------------------------------------------------------------


def restart_by_hand(sigmas, low, high, repeats, between, y):
    """Euler in EDM's coordinates; ``between`` are the levels inside the interval on the way down again."""
    draws = iter(NORMALS)

    def euler(y, s, t):
        return y + (t - s) / s * (y - denoiser(y, s))

    for s, t in itertools.pairwise(sigmas):
        y = euler(y, s, t)
        if t <= low < s:
            for _ in range(repeats):
                y = y + math.sqrt(high**2 - t**2) * next(draws)
                for a, b in itertools.pairwise([high, *between, t]):
                    y = euler(y, a, b)
    return y


def test_restart_goes_up_by_noise_and_down_the_grid_again():
    sigmas = [5.0, 2.0, 1.2, 0.7, 0.45, 0.2]
    solver = Restart(RungeKutta(EULER, "rho"), ((0.5, 1.5, 3),))
    expected = restart_by_hand(sigmas, 0.5, 1.5, 3, [1.2, 0.7], START)
    assert close(run(solver, EDM(), sigmas), expected, 1e-8)
    assert trace(solver, EDM(), sigmas).nfe == 5 + 3 * 3


def test_restart_with_steps_of_its_own_is_even_in_the_seventh_root():
    sigmas = [5.0, 2.0, 1.2, 0.45, 0.2]
    solver = Restart(RungeKutta(EULER, "rho"), ((0.5, 1.5, 2),), steps=3)
    a, b = 1.5 ** (1 / 7), 0.45 ** (1 / 7)
    between = [(a + (b - a) * i / 3) ** 7 for i in (1, 2)]
    assert close(run(solver, EDM(), sigmas), restart_by_hand(sigmas, 0.5, 1.5, 2, between, START), 1e-8)
    assert solver.stages == 1 + 3 * 2
    assert trace(solver, EDM(), sigmas).nfe == 4 + 3 * 2
    assert solver.weak is None


def test_restart_without_a_passage_is_its_inner_solver():
    heun = RungeKutta(HEUN, "rho")
    for interval, sigmas in (((0.5, 1.5, 3), [5.0, 2.0, 0.6]), ((0.5, 1.5, 3), [0.4, 0.3, 0.2])):
        assert close(run(Restart(heun, (interval,)), EDM(), sigmas), run(heun, EDM(), sigmas), 1e-12)


def test_restart_does_not_rise_above_where_the_run_began():
    sigmas = [1.0, 0.7, 0.4]
    plan = trace(Restart(RungeKutta(EULER, "rho"), ((0.5, 3.0, 1),)), EDM(), sigmas)
    assert [k.t for k in plan.knots] == [1.0, 0.7, 1.0, 0.7]


def test_restart_at_the_very_end_of_an_interval():
    """A grid level at low itself counts as arrived, once."""
    sigmas = [2.0, 1.0, 0.5, 0.25]
    plan = trace(Restart(RungeKutta(EULER, "rho"), ((0.5, 1.0, 1),)), EDM(), sigmas)
    assert [k.t for k in plan.knots] == pytest.approx([2.0, 1.0, 1.0, 0.5], rel=1e-9)


@pytest.mark.parametrize("steps", [None, 2])
@settings(max_examples=15)
@given(path=paths(), variance=st.floats(0.05, 4.0))
def test_restart_keeps_every_marginal(steps, path, variance):
    ends = path.knots([path.T, 0.0])
    assume(ends[0].lam < -1.5 and ends[1].lam > 2.0)
    data = Gaussian(path, torch.zeros(1, dtype=torch.float64), var=variance)
    times = path.time(torch.linspace(-1.5, 2.0, 7, dtype=torch.float64)).tolist()
    plan = trace(Restart(ExactFlow(variance), ((0.3, 0.6, 1), (0.15, 3.0, 2)), steps), path, times)
    assert plan.draws == 3
    assert exact_law(plan, data).w2(times[-1]) <= 1e-9


@given(n=st.integers(1, 60), low=st.floats(0.02, 1.0), width=st.floats(1.1, 20.0), repeats=st.integers(1, 4))
@settings(max_examples=40)
def test_restart_spends_at_most_stages_a_step(n, low, width, repeats):
    solver = Restart(RungeKutta(HEUN, "rho"), ((low, low * width, repeats), (0.3, 0.6, 1)))
    lams = torch.linspace(-2.0, 4.0, n + 1, dtype=torch.float64)
    plan = trace(solver, VP(), VP().time(lams).tolist())
    assert plan.nfe <= n * solver.stages


# --- stochastic Runge-Kutta -------------------------------------------------------------------------------------------

#: Roessler 2010, tables 6.1 and 6.2, as printed: (alpha, beta1, beta2, A0, B0, c0, c1).
ROESSLER = {
    "sra1": ([1 / 3, 2 / 3], [1, 0], [-1, 1], [[0, 0], [3 / 4, 0]], [[0, 0], [3 / 2, 0]], [0, 3 / 4], [1, 0]),
    "sra2": ([1 / 3, 2 / 3], [0, 1], [3 / 2, -3 / 2], [[0, 0], [3 / 4, 0]], [[0, 0], [3 / 2, 0]], [0, 3 / 4], [1 / 3, 1]),
    "sra3": (
        [1 / 6, 1 / 6, 2 / 3],
        [1, 0, 0],
        [-1, 1, 0],
        [[0, 0, 0], [1, 0, 0], [1 / 4, 1 / 4, 0]],
        [[0, 0, 0], [0, 0, 0], [1, 1 / 2, 0]],
        [0, 1, 1 / 2],
        [1, 0, 0],
    ),
}


def roessler(name, problem, x, times):
    """The scheme of section 6 in the clock tau = T - t, from the problem's drift and diffusion."""
    alpha, beta1, beta2, a, b, c0, c1 = ROESSLER[name]
    n = range(len(alpha))
    for j, (s, t) in enumerate(itertools.pairwise(times)):
        h = s - t
        i1 = math.sqrt(h) * NORMALS[2 * j]
        i10 = 0.5 * h * (i1 + math.sqrt(h / 3.0) * NORMALS[2 * j + 1])
        g = [float(problem.diffusion(s - c * h)) for c in c1]
        f, out = [], x
        for i in n:
            stage = x + sum(h * a[i][k] * f[k] + b[i][k] * g[k] * i10 / h for k in n if k < i)
            f.append(-problem.drift(stage, s - c0[i] * h))
            out = out + h * alpha[i] * f[i] + (beta1[i] * i1 + beta2[i] * i10 / h) * g[i]
        x = out
    return x


@pytest.mark.parametrize("path", [VP(), EDM(), SubVP()], ids=["VP", "EDM", "SubVP"])
@pytest.mark.parametrize("eta", [0.5, 1.0, lambda t: 0.3 + 0.5 * t])
@pytest.mark.parametrize("name", ROESSLER)
def test_sra_is_roessler_s_scheme(name, eta, path):
    problem = ReverseSDE(path, score_on(path), eta)
    times = [0.8, 0.6, 0.5, 0.25]
    assert close(run(name, path, times, eta), roessler(name, problem, START, times), 1e-10)


def test_sra1_takes_the_steps_and_the_noise_of_torchsde_s_srk():
    pytest.importorskip("torchsde")
    path, times = VP(), [0.9, 0.6, 0.5, 0.2]
    problem = ReverseSDE(path, score_on(path), 0.8)
    ours, theirs = (integrate(name, problem, START, times, noise=Stored()).x for name in ("sra1", "torchsde_srk"))
    assert close(ours, theirs, 1e-10)


@pytest.mark.parametrize("eta", [1.0, lambda t: 0.3 + 0.5 * t])
def test_stochastic_heun_by_hand(eta):
    path, times = VP(), [0.8, 0.6, 0.5]
    problem, x = ReverseSDE(path, score_on(path), eta), START
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        h, z = s - t, math.sqrt(s - t) * NORMALS[i]
        first = problem.drift(x, s)
        second = problem.drift(x - h * first + problem.diffusion(s) * z, t)
        x = x - 0.5 * h * (first + second) + 0.5 * (problem.diffusion(s) + problem.diffusion(t)) * z
    assert close(run("stochastic_heun", path, times, eta), x, 1e-10)


def test_stochastic_runge_kutta_without_noise_is_the_flow_s():
    path, times = VP(), [0.8, 0.6, 0.5]
    assert close(run("stochastic_heun", path, times), run("heun", path, times), 1e-12)
    assert trace("sra3", path, times, 0.0).draws == 0
    orders = [(2, SRA1), (2, SRA2), (3, SRA3), (2, STOCHASTIC_HEUN)]
    data = Gaussian(path, torch.tensor([0.5, -1.0], dtype=torch.float64), var=torch.tensor([0.04, 0.3]).double())
    for order, tableau in orders:
        errors = []
        for n in (40, 80):
            plan = trace(StochasticRungeKutta(tableau), path, warped_grid(path, n, -1.0, 1.5), 0.0)
            errors.append(exact_law(plan, data).w2(plan.times[-1]))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
        assert StochasticRungeKutta(tableau).order == order


@pytest.mark.parametrize("tableau", [SRA1, SRA2, SRA3, STOCHASTIC_HEUN], ids=lambda t: t.name)
def test_a_mistyped_coefficient_cannot_be_imported(tableau):
    """Every number of the tableau, moved by a thousandth, is refused; but for those that no condition of this order sees."""
    for name in ("c", "b", "p", "q", "d"):
        values = list(getattr(tableau, name))
        for i in range(len(values)):
            wrong = [v + 1e-3 * (j == i) for j, v in enumerate(values)]
            unseen = name == "d" and tableau.p[i] == tableau.q[i] == 0.0
            if not unseen:
                with pytest.raises(InputError, match=tableau.name):
                    dataclasses.replace(tableau, **{name: tuple(wrong)})
    for name in ("a", "u", "v"):
        rows = getattr(tableau, name)
        for i, row in enumerate(rows):
            for j in range(len(row)):
                wrong = tuple(tuple(v + 1e-3 * ((k, m) == (i, j)) for m, v in enumerate(r)) for k, r in enumerate(rows))
                with pytest.raises(InputError, match=tableau.name):
                    dataclasses.replace(tableau, **{name: wrong})
    with pytest.raises(InputError, match="strictly lower"):
        dataclasses.replace(tableau, b=(1.0,))


def test_a_last_step_to_clean_data_is_euler_maruyama_s():
    for name in ("stochastic_heun", "sra3"):
        for times in ([0.5, 0.0], [0.5, 0.2, 0.0]):
            before = START if len(times) == 2 else run(name, VP(), times[:-1], 1.0)
            drawn = 0 if len(times) == 2 else trace(name, VP(), times[:-1], 1.0).draws
            last = ReverseSDE(VP(), score_on(VP()), 1.0)
            h = times[-2]
            hand = before - h * last.drift(before, h) + float(VP().g(h)) * math.sqrt(h) * NORMALS[drawn]
            assert close(run(name, VP(), times, 1.0), hand, 1e-9)
    with pytest.raises(PathError, match="start elsewhere"):
        trace("sra1", Linear(), [1.0, 0.5], 1.0)


def test_milstein_is_euler_maruyama():
    assert SOLVERS["milstein"].solver == SOLVERS["euler_maruyama"].solver == EulerMaruyama()


# --- discrete DDPM ----------------------------------------------------------------------------------------------------


def test_discrete_ddpm_clips_beta_and_takes_any_number_of_steps():
    """Nichol & Dhariwal (2021): beta is at most 0.999."""
    path, score = VP(), score_on(VP())
    x = START
    for i, (s, t) in enumerate(itertools.pairwise([1.0, 0.5, 0.01])):
        beta = min(float(path.g2(s)) * (s - t), 0.999)
        assert beta == 0.999
        x = (x - beta / float(path.sigma(s)) * score.predict(x, s).eps) / math.sqrt(1.0 - beta) + math.sqrt(beta) * NORMALS[i]
    assert close(run("ddpm_discrete", path, [1.0, 0.5, 0.01], 1.0), x)
    for n in (1, 2, 3):
        assert sample(score_on(path), (4, 2), solver="ddpm_discrete", steps=n).x.isfinite().all()
    zero = Cosine()  # g is infinite at its end
    score = Score(lambda x, t: torch.tanh(x), zero, "v")
    assert integrate("ddpm_discrete", ReverseSDE(zero, score, 1.0), START, [1.0, 0.5]).x.isfinite().all()
    with pytest.raises(InputError, match="towards data"):
        trace(DiscreteDDPM(), path, [0.2, 0.5], 1.0)


# --- ER-SDE -----------------------------------------------------------------------------------------------------------


@cache
def er_sde_areas(scale, s, t):
    """int_t^s dv / phi(v) and int_t^s (v - s) / phi(v) dv."""
    phi = PHI[scale]
    return float(mpmath.quad(lambda v: 1.0 / phi(v), [t, s])), float(mpmath.quad(lambda v: (v - s) / phi(v), [t, s]))


def er_sde_published(steps, sigmas, scale, y):
    """The released VE loop with its integrals by mpmath in place of sums of 200 points."""
    phi = lambda v: float(PHI[scale](v))  # noqa: E731
    x0s, slopes = [], []
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        r = phi(t) / phi(s)
        x0s.append(denoiser(y, s))
        new = r * y + (1.0 - r) * x0s[-1]
        if steps >= 2 and i >= 1:
            slopes.append((x0s[-1] - x0s[-2]) / (s - sigmas[i - 1]))
            area = er_sde_areas(scale, s, t)[0]
            new = new + (t - s + area * phi(t)) * slopes[-1]
            if steps >= 3 and i >= 2:
                area = er_sde_areas(scale, s, t)[1]
                curve = (slopes[-1] - slopes[-2]) / ((s - sigmas[i - 2]) / 2.0)
                new = new + ((t - s) ** 2 / 2.0 + area * phi(t)) * curve
        variance = t**2 - s**2 * r**2
        y = new + (math.sqrt(variance) if variance > 1e-12 * t**2 else 0.0) * NORMALS[i]  # 0 for "ode", but for rounding
    return y


PHI = {
    "ode": lambda v: v,
    "sde": lambda v: v**2,
    "sde_1": lambda v: v * (mpmath.exp(-1.0 / v) + 10.0),
    "sde_2": lambda v: v**1.5,
    "sde_3": lambda v: v**2.5,
    "sde_4": lambda v: v**0.9 * mpmath.log10(1.0 + 100.0 * v**1.5),
    "sde_5": lambda v: v * (mpmath.exp(v**0.3) + 10.0),
}


@pytest.mark.parametrize("scale", PHI)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_er_sde_is_the_released_formula(steps, scale):
    assert set(PHI) == set(NOISE_SCALES)
    sigmas = [9.0, 5.0, 3.5, 1.0, 0.4, 0.05]
    assert close(run(ERSDE(steps, scale, "published"), EDM(), sigmas), er_sde_published(steps, sigmas, scale, START), 1e-8)
    for path in (VP(), Linear()):
        times = path.time(-torch.tensor(sigmas, dtype=torch.float64).log()).tolist()
        ks = path.knots(times)
        on_path = run(ERSDE(steps, scale, "published"), path, times, x=ks[0].alpha * START) / ks[-1].alpha
        assert close(on_path, er_sde_published(steps, sigmas, scale, START), 1e-6)


@pytest.mark.parametrize(("scale", "eta"), [("ode", 0.0), ("sde", 1.0), ("sde_2", math.sqrt(0.5)), ("sde_3", math.sqrt(1.5))])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_er_sde_of_a_power_is_the_exponential_method_in_rho(steps, scale, eta):
    """phi = rho^(1 + eta^2) is the reverse SDE of constant eta, and the Taylor polynomial the one through the predictions."""
    for path, times in ((VP(), [0.9, 0.7, 0.5, 0.45, 0.2, 0.01]), (Linear(), [0.95, 0.5, 0.3, 0.25, 0.02])):
        assert close(run(ERSDE(steps, scale), path, times), run(Multistep(steps, "x0", "rho"), path, times, eta), 1e-9)


def test_published_third_member_is_of_the_second_order_inside():
    """On a prediction that is quadratic in rho the polynomial is exact and the published form is not."""
    path, sigmas = EDM(), [4.0, 3.0, 2.2, 1.5, 1.0]
    score = Score(lambda x, t: (0.3 + 0.2 * t + 0.1 * t * t).reshape(-1, 1).expand_as(x), path, "x0")

    def end(rule, n):
        return integrate(ERSDE(3, "ode", rule), score, START, sigmas[:n], traced=False).x

    for rule, exact in (("exact", True), ("published", False)):
        before, after = end(rule, 4), end(rule, 5)
        s, t = 1.5, 1.0  # y' = (y - x0)/rho: y_t/t - y_s/s = -int_s^t x0/v^2 dv
        area = 0.3 * (1 / s - 1 / t) + 0.2 * math.log(t / s) + 0.1 * (t - s)
        assert close(after, t * (before / s - area), 1e-10) == exact


def test_er_sde_limits():
    for scale in ("sde_5", "sde", "sde_1", "ode"):
        for steps in (1, 2, 3):
            score = Score(lambda x, t: 0.5 * torch.tanh(x), Linear(), "velocity")
            for times in ([1.0, 0.5, 0.0], [1.0, 0.0], [1.0, 0.9, 0.5, 0.2]):
                assert integrate(ERSDE(steps, scale), score, START, times).x.isfinite().all()
    with pytest.raises(InputError, match="goes towards data"):
        trace(ERSDE(1), VP(), [0.2, 0.6])
    with pytest.raises(PathError, match="negative variance"):
        trace(ERSDE(1, "sde_4"), EDM(T=1e6), [1e6, 1e4])
    assert close(run(ERSDE(1, "ode"), VP(), [0.2, 0.6]), run("ddim", VP(), [0.2, 0.6]))


def test_er_sde_follows_the_sde_of_its_own_noise_level():
    """eta^2 = d log phi/d log rho - 1: with this function of time Euler-Maruyama has the same transition in small steps."""
    path, s, t = EDM(), 1.0, 0.9995
    for scale in ("sde", "sde_1", "sde_2", "sde_3", "sde_4", "sde_5"):
        slope = float(mpmath.diff(lambda v, scale=scale: mpmath.log(PHI[scale](mpmath.exp(v))), 0.0))
        data = Gaussian(path, torch.zeros(1, dtype=torch.float64), var=0.5)
        laws = [
            exact_law(trace(solver, path, [s, t], eta), data, start=(1.0, 0.0))
            for solver, eta in ((ERSDE(1, scale), 0.0), (EulerMaruyama(), math.sqrt(slope - 1.0)))
        ]
        assert float(laws[0].variance / laws[1].variance) == pytest.approx(1.0, abs=3e-3)
        assert float((laws[0].mean - 1.0) / (laws[1].mean - 1.0)) == pytest.approx(1.0, abs=3e-3)


# --- gDDIM ------------------------------------------------------------------------------------------------------------


def test_gddim_for_isotropic_noise_is_ddpm_s_step_at_another_eta():
    """Zhang, Tao & Chen (2023), the stochastic gDDIM of DDPM with their lambda = eta, in abar = alpha^2."""
    path, times, eta = VP(), [0.8, 0.5, 0.3], SOLVERS["gddim"].eta
    score, x = score_on(path), START
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        here, there = float(path.alpha(s)) ** 2, float(path.alpha(t)) ** 2
        ratio = (1.0 - there) / (1.0 - here) * here / there
        var = (1.0 - there) * (1.0 - ratio ** (eta * eta))
        eps = score.predict(x, s).eps
        scale = math.sqrt(there / here)
        x = scale * x + (math.sqrt(1.0 - there - var) - scale * math.sqrt(1.0 - here)) * eps + math.sqrt(var) * NORMALS[i]
    assert close(run("gddim", path, times, eta), x)


def test_gddim_s_other_noises_are_refused_where_a_path_is_made():
    """Noise that differs from direction to direction is no path."""
    with pytest.raises(PathError, match="shaped like t"):
        FromFunctions(lambda t: torch.stack([1.0 - t, 1.0 - t * t], -1), lambda t: torch.stack([t, t * t], -1))


# --- correctors -------------------------------------------------------------------------------------------------------


class Linearised:
    """A problem on N(0, data) at one knot whose states are rows of coefficients: x0 and every normal a unit vector."""

    def __init__(self, path, data, size=64):
        self.path, self.data, self.size, self.drawn, self.calls = path, data, size, 1, 0

    def predict(self, x, k):
        self.calls += 1
        total = k.alpha**2 * self.data + k.sigma**2
        return Prediction(k.alpha * self.data / total * x, k.sigma / total * x)

    def keep(self, x):
        return x

    def noise(self, s, t):
        assert s == t
        self.drawn += 1
        return np.eye(self.size)[self.drawn - 1]

    def correct(self, corrector, k):
        """(gain of the start, variance of what the normals add)."""
        row = corrector.correct(self, np.eye(self.size)[0], k, self.noise)
        return row[0], float(np.sum(row[1:] ** 2))


@pytest.mark.parametrize("friction", [0.0, 0.7, math.inf])
@pytest.mark.parametrize("inner", [1, 2, 5])
@pytest.mark.parametrize("size", [0.05, 0.4, 1.5])
def test_underdamped_langevin_keeps_the_law_that_it_says(size, inner, friction):
    k = VP().knot(0.4)
    problem = Linearised(VP(), 0.3)
    gain, added = problem.correct(Underdamped(size, friction, inner), k)
    total = k.alpha**2 * 0.3 + k.sigma**2
    kept = total / (1.0 - (size * k.sigma) ** 2 / (4.0 * total))
    assert gain**2 * kept + added == pytest.approx(kept, rel=1e-12)
    assert abs(gain) < 1.0
    assert problem.calls == inner
    assert problem.drawn - 1 == inner
    assert Underdamped(size).floor == pytest.approx(size**2 / 4)


def test_underdamped_momentum_persists_only_without_friction():
    """Two Hamiltonian half-steps go further than two overdamped ones; the first step alone is Langevin's."""
    k = VP().knot(0.4)
    gains = [Linearised(VP(), 0.3).correct(Underdamped(0.2, f, 8), k)[0] for f in (0.0, 1.0, math.inf)]
    assert gains[0] < gains[1] < gains[2]
    one = Linearised(VP(), 0.3).correct(Underdamped(0.2, 1.0, 1), k)
    assert one == pytest.approx(Linearised(VP(), 0.3).correct(Langevin(0.1, rule="sigma"), k), rel=1e-12)
    many = Linearised(VP(), 0.3).correct(Underdamped(0.2, math.inf, 3), k)
    assert many == pytest.approx(Linearised(VP(), 0.3).correct(Langevin(0.1, 3, "sigma"), k), rel=1e-12)


def test_underdamped_friction_is_an_exact_ornstein_uhlenbeck_step():
    """Two steps by hand: kick, drift, kick, friction, kick, drift."""
    k = VP().knot(0.4)
    omega = k.sigma**2 / (k.alpha**2 * 0.3 + k.sigma**2)
    d, c = 0.3, math.exp(-0.8 * 0.3)
    q, p = np.eye(4)[0], np.eye(4)[1]  # in units of sigma
    p = p - 0.5 * d * omega * q
    q = q + d * p
    p = p - 0.5 * d * omega * q
    p = c * p + math.sqrt(1.0 - c * c) * np.eye(4)[2]
    p = p - 0.5 * d * omega * q
    q = q + d * p
    gain, added = Linearised(VP(), 0.3).correct(Underdamped(d, 0.8, 2), k)
    assert gain == pytest.approx(q[0], rel=1e-12)
    assert added == pytest.approx(k.sigma**2 * float(np.sum(q[1:] ** 2)), rel=1e-12)


def test_annealed_langevin_is_a_corrector_with_its_own_step():
    """size/2 sigma^2 score + sqrt(size) sigma z is Langevin's rule "sigma" with snr = sqrt(size)/2."""
    k, size = VP().knot(0.4), 0.2
    score_step = 0.5 * size * k.sigma / (k.alpha**2 * 0.3 + k.sigma**2) * k.sigma
    gain, added = Linearised(VP(), 0.3).correct(Langevin(math.sqrt(size) / 2.0, rule="sigma"), k)
    assert gain == pytest.approx(1.0 - score_step, rel=1e-12)
    assert added == pytest.approx(size * k.sigma**2, rel=1e-12)


# --- few steps --------------------------------------------------------------------------------------------------------

FEW_STEP = [name for name, entry in SOLVERS.items() if entry.theory == "exact"]


@pytest.mark.parametrize("name", FEW_STEP)
def test_exact_distilled_networks_give_the_exact_law_in_any_number_of_steps(name):
    declared, measured, _ = probing.exactness(name)
    assert declared == 0.0
    assert measured < 1e-12


def test_the_measure_of_exactness_sees_a_wrong_sampler(monkeypatch):
    wrong = {"too little noise": Consistency(0.1), "another level": TrajectoryConsistency(0.5)}
    for solver, landing in ((wrong["too little noise"], Consistency()), (wrong["another level"], TrajectoryConsistency(0.3))):

        class Mixed:
            """The network of one sampler in another."""

            def __init__(self, solver, landing):
                self.solver, self.landing = solver, landing.landing

            def __getattr__(self, name):
                return getattr(self.solver, name)

            def step(self, *arguments):
                return self.solver.step(*arguments)

        mixed = Mixed(solver, landing)
        monkeypatch.setitem(SOLVERS, "mixed", dataclasses.replace(SOLVERS["lcm"], solver=mixed))
        assert probing.exactness("mixed")[1] > 1e-3


def test_consistency_sampling_is_the_paper_s_algorithm():
    """Song et al. (2023), algorithm 1, in EDM's coordinates: x = f(x_hat); x_hat = x + sqrt(tau^2 - eps^2) z."""
    sigmas, eps = [10.0, 3.0, 0.8, 0.002], 0.002
    y = START
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        y = denoiser(y, s) + math.sqrt(max(t**2 - eps**2, 0.0)) * NORMALS[i]
    assert close(run("consistency", EDM(), sigmas), y, 1e-12)
    assert trace("consistency", EDM(), sigmas).draws == 2  # the last value is returned as it is
    assert trace("consistency", EDM(), [10.0, 3.0, 0.0]).draws == 1


def test_lcm_and_tcd_are_diffusers_formulas():
    """In cumulative products: LCM renoises x0, TCD the state at (1 - gamma) t."""
    path, times = VP(), [0.9, 0.5, 0.2, 0.0]
    for name, gamma in (("lcm", None), ("tcd", 0.3)):
        score, x = score_on(path), START
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            p, abar = score.predict(x, s), float(path.alpha(t)) ** 2
            if gamma is None:
                x = math.sqrt(abar) * p.x0 + math.sqrt(1.0 - abar) * NORMALS[i]
                continue
            low = float(path.alpha((1.0 - gamma) * t)) ** 2
            x = math.sqrt(low) * p.x0 + math.sqrt(1.0 - low) * p.eps
            x = math.sqrt(abar / low) * x + math.sqrt(1.0 - abar / low) * NORMALS[i]
        assert close(run(name, path, times), x, 1e-12)


def test_tcd_between_ddim_and_consistency():
    times = [0.9, 0.5, 0.2]
    assert close(run(TrajectoryConsistency(0.0), VP(), times), run("ddim", VP(), times), 1e-12)
    assert trace(TrajectoryConsistency(0.0), VP(), times).draws == 0
    assert close(run(TrajectoryConsistency(1.0), VP(), times), run("lcm", VP(), times), 1e-12)


# --- noise levels that are functions of time --------------------------------------------------------------------------

TAKES_ETA = [
    n for n, e in SOLVERS.items() if e.solver.linear and e.solver.takes_eta and e.theory == "order" and n != "ddpm_discrete"
]


@pytest.mark.parametrize("name", TAKES_ETA)
def test_noise_levels_may_be_functions_of_time(name):
    """Every eta(t) keeps the marginals, also one that is zero in a part of the run: no noise is drawn there."""
    path = VP()
    data = Gaussian(path, torch.tensor([0.5], dtype=torch.float64), var=0.3)
    grid = warped_grid(path, 60, -1.0, 1.5)

    def eta(t):
        return 0.0 if 0.2 < t < 0.3 else 0.4 + 2.0 * t

    plan = trace(name, path, grid, eta)
    assert 0 < plan.draws < trace(name, path, grid, 1.0).draws
    assert plan.eta == tuple(eta(t) for t in grid)
    assert exact_law(plan, data).w2(grid[-1]) < 0.04


@pytest.mark.parametrize("name", ["euler_maruyama", "euler_ancestral", "heun_ancestral", "ddpm"])
def test_a_function_counts_at_the_start_of_each_step(name):
    """A run of three steps is three runs of one step at their own constant levels."""
    path, times, x = VP(), [0.8, 0.6, 0.5, 0.2], START
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        x = integrate(name, ReverseSDE(path, score_on(path), 0.3 + s), x, [s, t], noise=Later(i)).x
    assert close(run(name, path, times, lambda t: 0.3 + t), x, 1e-10)


class Later(Source):
    """Draw 0 is the i-th of NORMALS."""

    def __init__(self, i):
        self.i = i

    def open(self, shape, dtype=torch.float32, device="cpu"):
        return _Later(self.i)


class _Later(_Stored):
    def __init__(self, i):
        self.i = i

    def normal(self, k, s, t, like=None, out=None):
        return NORMALS[self.i + k].clone()


# --- the drawing of noise ---------------------------------------------------------------------------------------------

STOCHASTIC = [
    name for name, e in SOLVERS.items() if e.solver.linear and e.solver.stochastic and (e.eta > 0.0 or not e.solver.takes_eta)
]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_samples_have_the_exact_law_of_their_table(name):
    """20000 samples, few steps: mean and variance within five standard errors, for the noise that ``sample`` draws itself."""
    path, n = VP(), 20_000
    data = Gaussian(path, torch.tensor([0.7], dtype=torch.float64), var=0.16)
    out = sample(data, (n, 1), solver=name, steps=5, start=0.9, stop=0.02, seed=3, dtype=torch.float64)
    plan = trace(name, path, out.times)
    assert plan.draws > 0
    law = exact_law(plan, data, start="prior")
    assert abs(float(out.x.mean() - law.mean)) < 5.0 * math.sqrt(float(law.variance) / n)
    assert abs(float(out.x.var() / law.variance) - 1.0) < 5.0 * math.sqrt(2.0 / n)


# --- constructors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Ancestral(DDIM, "flow"), "rule='flow'"),
        (lambda: Ancestral(EulerMaruyama.__new__(DiscreteDDPM)), "inner="),
        (lambda: Restart(DDIM, ()), "intervals"),
        (lambda: Restart(DDIM, ((0.5, 0.3, 1),)), "low < high"),
        (lambda: Restart(DDIM, ((0.0, 0.3, 1),)), "low < high"),
        (lambda: Restart(DDIM, ((0.1, 0.3, 0),)), "repeats"),
        (lambda: Restart(DDIM, steps=0), "steps=0"),
        (lambda: Restart(DiscreteDDPM()), "inner="),
        (lambda: Underdamped(2.0), "size"),
        (lambda: Underdamped(0.0), "size"),
        (lambda: Underdamped(friction=-1.0), "friction"),
        (lambda: Underdamped(inner=0), "inner"),
        (lambda: ERSDE(4), "steps"),
        (lambda: ERSDE(2, "sde_9"), "scale"),
        (lambda: ERSDE(2, rule="best"), "rule"),
        (lambda: Consistency(-1.0), "origin=-1"),
        (lambda: TrajectoryConsistency(1.5), "gamma=1.5"),
        (lambda: AdditiveTableau("x", 1, 1.0, (0.0,), ((),), (1.0,), ((),), ((),), (1.0,), (0.0,), (0.5, 0.0)), "tableau x"),
    ],
)
def test_bad_arguments_are_named(make, word):
    with pytest.raises(InputError, match=word):
        make()


def test_correctors_are_solvers_parts():
    solver = PredictorCorrector(DDIM, Underdamped(0.3, inner=3))
    assert solver.stages == 4
    assert solver.linear
    assert solver.linearised == solver
    assert solver.floor == pytest.approx(0.09 / 4)
    plan = trace(solver, VP(), [0.5, 0.4], 1.0)
    assert sum(isinstance(row, Call) for row in plan.rows) == 4
    with pytest.raises(PathError, match="nothing to correct"):
        Underdamped().correct(Linearised(VP(), 0.3), START, VP().knot(0.0), None)
