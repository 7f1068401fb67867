"""Every declared order is measured, for every row of SOLVERS, two-sided: a solver may neither overstate nor understate
itself.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path as File

import numpy as np
import pytest
import torch
from laws import Mixture1D, Probe, probe

from scores import Gaussian
from sde import EDM, VP, Cosine, Linear, ReverseSDE, SubVP, Trigonometric
from sde.noise import Draws, Source
from solvers import SOLVERS, integrate, sample, trace
from solvers.backends import TorchDiffEq, TorchSDE
from solvers.convergence import convergence, kinds_of, warped_grid

TOLERANCE = 0.15
PATHS = {p.__class__.__name__: p for p in (VP(), EDM(), Linear(), Cosine(), SubVP(), Trigonometric())}
CONSTANTS = json.loads((File(__file__).parent / "error_constants.json").read_text())

MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
VARIANCE = torch.tensor([0.04, 1.0, 0.3], dtype=torch.float64)

# Solvers whose law converges to a slightly wrong one: Langevin steps of fixed relative size. Declared weak order 1, down to
# this floor.
BIASED = {"pc_euler_maruyama", "pc_ddpm", "pc_ddpm_sigma", "annealed_langevin"}

TRACED = [(name, kind) for name in SOLVERS for kind in kinds_of(name) if name not in BIASED]
VARIANCE_PRESERVING_ONLY = {"ddpm_discrete"}


def gaussian(path):
    return Gaussian(path, MEAN, var=VARIANCE)


def test_every_solver_has_a_theory():
    """A row of SOLVERS is measured by its table, by probing, by tolerance, or by its floor: no row escapes."""
    probed = {n for n, e in SOLVERS.items() if isinstance(e.solver, TorchSDE) and not e.solver.adaptive}
    toleranced = {n for n, e in SOLVERS.items() if getattr(e.solver, "adaptive", False)}
    assert set(SOLVERS) == {n for n, _ in TRACED} | probed | toleranced | BIASED


# The midpoint rule is of order three on Gaussian data wherever alpha and sigma are linear in its variable. With x' = a x the
# flow of a Gaussian
# has x^2 quadratic, and the h^3 term of the midpoint's local error, a''/24 + a a'/4 + a^3/6, vanishes. Its order is measured
# on the mixture below.
SUPERCONVERGENT = {("edm_midpoint", None), ("midpoint", "EDM"), ("midpoint", "Linear")}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(("name", "kind"), TRACED)
def test_order_and_error_constant_by_exact_law(name, kind, path):
    label = type(path).__name__
    if name in VARIANCE_PRESERVING_ONLY and label not in ("VP", "Cosine", "Trigonometric"):
        return  # refused there: see test_discrete_ddpm_needs_a_variance_preserving_path
    result = convergence(name, kind, gaussian(path), low=-1.0, high=1.5)
    bonus = 1.0 if {(name, None), (name, label)} & SUPERCONVERGENT else 0.0
    assert abs(result.measured - (result.declared + bonus)) <= TOLERANCE, result
    stored = CONSTANTS[name][kind][label]
    constant = result.constant * result.steps[-1] ** bonus
    assert abs(constant / stored - 1.0) <= 0.05, (constant, stored)


def test_error_constants_are_stored_for_exactly_the_solvers_there_are():
    assert {(n, k) for n, kinds in CONSTANTS.items() for k in kinds} == set(TRACED)


DETERMINISTIC = [name for name, kind in TRACED if kind == "ode"]


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("path", [VP(), Linear()], ids=["VP", "Linear"])
def test_order_on_a_mixture_by_its_closed_flow(name, path):
    """The same orders where the score is not affine: a 1-D mixture's flow keeps quantiles, which gives the exact end point."""
    mixture = Mixture1D(path)
    declared = SOLVERS[name].solver.order
    x = torch.linspace(-2.0, 2.0, 24, dtype=torch.float64)
    errors = []
    steps = (80, 160, 320) if declared >= 3 else (160, 320, 640)
    for n in steps:
        plan = trace(name, path, warped_grid(path, n, -1.0, 1.0))
        exact = mixture.flow(x, plan.grid[0], plan.grid[-1])
        errors.append(float((plan.run(mixture.score, x[:, None])[:, 0] - exact).square().mean().sqrt()))
    measured = math.log2(errors[-2] / errors[-1])
    assert abs(measured - declared) <= TOLERANCE, (measured, errors)


@pytest.mark.parametrize("name", ["euler", "ddim", "edm_heun"])
def test_error_constant_from_theory(name):
    """The constants of three one-step methods from the classical formula, with no solver run: int Phi(T, u) d(u) du.

    d is the leading local error per unit of grid parameter: for x' = a x in the method's variable v, Euler's is -(a' +
    a^2)/2 v'^2 and Heun's (a''/12 - a^3/6) v'^3 (v' = dv/du of the grid). Phi x = x_T since the flow is linear.
    """
    path, low, high = VP(), -1.0, 1.5
    u = np.polynomial.legendre.leggauss(200)
    nodes, weights = 0.5 * (u[0] + 1.0), 0.5 * u[1]
    lam = low + (high - low) * (nodes + 0.3 * nodes * (1 - nodes) * (1.5 - nodes))
    dlam = (high - low) * (1.0 + 0.3 * (1.5 - 5.0 * nodes + 3.0 * nodes**2))
    k = path.knots(path.time([low, high]))
    total = np.zeros(3)
    for i, l in enumerate(VARIANCE.tolist()):
        if name == "euler":  # in t: a = S'/(2S) with S = 1 + (l - 1) alpha^2 on a variance-preserving path
            t = path.time(lam).numpy()
            beta, slope = 0.1 + 19.9 * t, 19.9
            alpha2 = np.exp(-(0.1 * t + 0.5 * 19.9 * t**2))
            s = 1.0 + (l - 1.0) * alpha2
            s1 = -(l - 1.0) * alpha2 * beta
            s2 = (l - 1.0) * alpha2 * (beta**2 - slope)
            a, da = s1 / (2 * s), s2 / (2 * s) - s1**2 / (2 * s**2)
            dv = dlam / path.dlam(path.time(lam)).numpy()
            density = -0.5 * (da + a**2) * dv**2
        else:  # in rho = sigma/alpha, y = x/alpha: a = rho/(rho^2 + l)
            rho = np.exp(-lam)
            q = rho**2 + l
            a, da = rho / q, (l - rho**2) / q**2
            dda = -2 * rho / q**2 - 4 * rho * (l - rho**2) / q**3
            dv = -rho * dlam
            density = -0.5 * (da + a**2) * dv**2 if name == "ddim" else (dda / 12 - a**3 / 6) * dv**3
        relative = float(np.sum(weights * density))
        end = k[1].alpha ** 2 * l + k[1].sigma ** 2  # E|x_T - alpha mu|^2; the mean of the flow carries no error in rho
        total[i] = relative**2 * end
        if name == "euler":
            # the mean alpha mu is a solution in t too, of x' = f x: Euler errs on it at the same rate with a = f
            f, df = -0.5 * beta, -0.5 * slope
            drift = _mean_error_of_euler(nodes, weights, dv, f, df, a, da, path, lam, k, l, float(MEAN[i]))
            total[i] += drift**2
    predicted = math.sqrt(total.mean())
    stored = CONSTANTS[name]["ode"]["VP"]
    assert abs(predicted / stored - 1.0) < 0.02, (predicted, stored)


def _mean_error_of_euler(nodes, weights, dv, f, df, a, da, path, lam, k, l, mu):
    """Leading error of Euler in t at the mean of p_T: local error -(m'')/2 with m = alpha mu, transported by the flow's
    linear map.
    """
    at = path.time(lam)
    alpha = path.alpha(at).numpy()
    spread = np.sqrt(alpha**2 * l + path.sigma(at).numpy() ** 2)
    end = math.sqrt(k[1].alpha ** 2 * l + k[1].sigma ** 2)
    return float(np.sum(weights * -0.5 * (df + f**2) * alpha * mu * dv**2 * end / spread))


# --- the rows without a table
# --------------------------------------------------------------------------------------------------------


def _reverse_constants(path, variance, grid):
    """kappa of z = dW/sqrt(h) and of the normalised H for every step in t, and the exact law's remainder, for eta = 1, one
    direction.

    Phi(T, u) = (alpha_u/alpha_T) S_T/S_u on Gaussian data; quadrature in t, independent of the engine's (which works in
    lambda).
    """
    nodes, weights = np.polynomial.legendre.leggauss(20)
    spread = lambda t: (path.alpha(t) ** 2 * variance + path.sigma(t) ** 2).numpy()  # noqa: E731
    end = grid[-1]
    first, second, total = [], [], 0.0
    for a, b in itertools.pairwise(grid):
        h = a - b
        u = 0.5 * (a + b) - 0.5 * h * nodes  # tau = a - u runs from 0 to h
        w = 0.5 * h * weights
        phi = (path.alpha(u).numpy() / float(path.alpha(end))) * float(spread(end)) / spread(u)
        g = path.g(u).numpy()
        psi = ((h - (a - u)) / h - 0.5) / math.sqrt(h / 12.0)
        first.append(np.sum(w * phi * g) / math.sqrt(h))
        second.append(np.sum(w * phi * g * psi))
        total += np.sum(w * (phi * g) ** 2)
    explained = sum(x**2 for x in first) + sum(x**2 for x in second)
    return np.array(first), np.array(second), max(total - explained, 0.0)


@pytest.mark.parametrize("name", [n for n, e in SOLVERS.items() if isinstance(e.solver, TorchSDE) and not e.solver.adaptive])
def test_orders_of_torchsde_by_probing(name):
    """torchsde's methods have no table, but they are affine: probing reads off their exact map, hence weak and strong
    errors.
    """
    solver = SOLVERS[name].solver
    two = solver.method == "srk"
    path, mean, variance = VP(), 0.7, 0.3
    score = Gaussian(path, torch.tensor([mean], dtype=torch.float64), var=variance)
    weak, strong = [], []
    for n in (20, 40, 80):
        grid = np.linspace(0.6, 0.2, n + 1).tolist()
        run = lambda start, grid=grid: integrate(name, ReverseSDE(path, score, 1.0), start, grid, noise=Probe()).x  # noqa: E731
        const, gain, noise = (v.squeeze(-1).numpy() for v in probe(run, 1, (2 if two else 1) * n))
        s, t = path.knot(grid[0]), path.knot(grid[-1])
        start = s.alpha**2 * variance + s.sigma**2
        end = t.alpha**2 * variance + t.sigma**2
        bias = const + gain * s.alpha * mean - t.alpha * mean
        std = math.sqrt(gain**2 * start + np.sum(noise**2))
        weak.append(math.hypot(bias, std - math.sqrt(end)))
        first, second, rest = _reverse_constants(path, variance, grid)
        phi = (s.alpha / t.alpha) * end / start
        missed = (noise[0::2] - first, noise[1::2] - second) if two else (noise - first, -second)
        strong.append(math.sqrt((gain - phi) ** 2 * start + sum(np.sum(m**2) for m in missed) + rest + bias**2))
    # srk's random local error of order two is f'' g^2 times an integral of W^2: nothing on Gaussian data, where f is affine
    # (see the next test)
    for kind, errors, bonus in (("weak", weak, 0.0), ("strong", strong, 0.5 if two else 0.0)):
        measured = math.log2(errors[-2] / errors[-1])
        assert abs(measured - getattr(solver, kind) - bonus) <= TOLERANCE, (kind, measured, errors)


class _Coarse(Source):
    """Normals of coarse steps made from one fine path: increments W and areas U of N steps h, m of them to a coarse step."""

    def __init__(self, w, u, h, m):
        self.w, self.u, self.h, self.m = w, u, h, m

    def open(self, shape, dtype=torch.float64, device="cpu"):
        return _CoarseDraws(self)


class _CoarseDraws(Draws):
    def __init__(self, path):
        self.path = path

    def initial(self, out=None):
        return torch.zeros_like(self.path.w[0])

    def normal(self, k, s, t, like=None, out=None):
        j, second = divmod(k, 2)
        m, h = self.path.m, self.path.h * self.path.m
        w, u = self.path.w[j * m : (j + 1) * m], self.path.u[j * m : (j + 1) * m]
        total = w.sum(0)
        if not second:
            return total / math.sqrt(h)
        area = (u + self.path.h * (w.cumsum(0) - w)).sum(0)
        return (area / h - 0.5 * total) / math.sqrt(h / 12.0)


def test_srk_has_strong_order_three_halves_where_the_score_is_not_affine():
    path, batch, n = VP(), 1500, 640
    mixture = Mixture1D(path)
    h = 0.2 / n
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, batch, 1, generator=generator, dtype=torch.float64) * math.sqrt(h)
    u = h * (0.5 * w + torch.randn(n, batch, 1, generator=generator, dtype=torch.float64) * math.sqrt(h / 12.0))
    x = mixture.score.sample(batch, t=0.3, seed=1).double()

    def run(steps):
        times = np.linspace(0.3, 0.1, steps + 1).tolist()
        return integrate("torchsde_srk", ReverseSDE(path, mixture.score, 1.0), x, times, noise=_Coarse(w, u, h, n // steps)).x

    reference = run(n)
    errors = [float((run(k) - reference).square().mean().sqrt()) for k in (20, 40, 80)]
    assert abs(math.log2(errors[-2] / errors[-1]) - 1.5) <= TOLERANCE, errors


@pytest.mark.parametrize("name", [n for n, e in SOLVERS.items() if isinstance(e.solver, TorchDiffEq)])
@pytest.mark.parametrize("path", [VP(), EDM(), Linear(), Cosine()], ids=["VP", "EDM", "Linear", "Cosine"])
def test_adaptive_solvers_keep_their_tolerance(name, path):
    """Error at most ten times the tolerance atol + rtol |x|, and falling with it."""
    score = gaussian(path)
    start = float(path.time(-1.0))
    x = score.sample(64, t=start, seed=1).double()
    exact = score.flow(x, start, float(path.time(3.0)))
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        solver = TorchDiffEq(SOLVERS[name].solver.method, rtol=tolerance, atol=tolerance)
        out = integrate(solver, score, x, [start, float(path.time(3.0))])
        errors.append(float((out.x - exact).abs().max()))
        assert errors[-1] <= 10 * tolerance * (1.0 + float(x.abs().max())), (tolerance, errors)
        assert out.accepted > 0
    assert errors[2] < errors[0]


def test_adaptive_sde_keeps_the_law():
    """torchsde's step control on the reverse SDE: mean and variance within five standard errors of the exact marginal plus
    its tolerance.
    """
    path, n = VP(), 4000
    score = Gaussian(path, torch.zeros(1, dtype=torch.float64), var=0.3)
    out = sample(
        score, (n, 1), solver=TorchSDE("srk", adaptive=True, rtol=1e-2, atol=1e-2), eta=1.0, steps=10, start=0.6, stop=0.1
    )
    k = path.knot(0.1)
    variance = k.alpha**2 * 0.3 + k.sigma**2
    assert abs(float(out.x.mean())) < 5 * math.sqrt(variance / n) + 1e-2
    assert abs(float(out.x.var()) / variance - 1.0) < 5 * math.sqrt(2 / n) + 2e-2


@pytest.mark.parametrize(("name", "relative"), [("annealed_langevin", 0.2 / 4), ("pc_ddpm_sigma", 0.16**2)])
def test_langevin_floor(name, relative):
    """With many levels a Langevin sampler settles where its fixed relative step leaves it: variance S + relative sigma^2 to
    leading order.

    The stationary variance of v -> (1 - c/S)^2 v + 2c is S/(1 - c/(2S)) = S + c/2 + ..., c = size/2 sigma^2 or snr^2 2 sigma^2.
    """
    from solvers import exact_law

    path = VP()
    score = Gaussian(path, torch.zeros(1, dtype=torch.float64), var=1.0)
    plan = trace(name, path, warped_grid(path, 4000, -1.0, 0.5))
    law = exact_law(plan, score)
    k = plan.grid[-1]
    total = k.alpha**2 + k.sigma**2
    excess = (float(law.variance) - total) / (relative * k.sigma**2)
    assert 0.85 < excess < 1.15, excess


def test_langevin_solvers_converge_at_order_one_above_their_floor():
    from solvers import exact_law

    path = VP()
    score = gaussian(path)
    errors = [
        exact_law(trace("annealed_langevin", path, warped_grid(path, n, -1.0, 3.0)), score).w2(path.time(3.0))
        for n in (80, 160, 320)
    ]
    assert abs(math.log2(errors[-2] / errors[-1]) - 1.0) <= TOLERANCE


def test_discrete_ddpm_needs_a_variance_preserving_path():
    from sde.errors import PathError

    with pytest.raises(PathError, match="variance-preserving"):
        trace("ddpm_discrete", EDM(), [10.0, 1.0])
