"""The exact-law engine against independent truth: published tables, hand recursions, probing, and closed forms."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path as File

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.truth import Probe, probe
from scores import Gaussian, GaussianMixture
from sde import EDM, VP, Linear, ReverseSDE
from sde.errors import InputError
from solvers import SOLVERS, exact_law, integrate, trace
from solvers.convergence import kinds_of, warped_grid
from solvers.exact import flow_error, strong_error
from solvers.grids import make_grid
from solvers.testing import paths, times

ROOT = File(__file__).resolve().parents[1]
EIGENVALUES = ROOT.parent / "shared" / "data" / "cifar10_eigenvalues.npy"
TRACEABLE = [name for name, entry in SOLVERS.items() if entry.solver.linear]

# Pierret & Galerne 2025 (arXiv 2405.14250), W2 to the data; N points of a uniform grid from 1 to 1e-3; start p_T / N(0, I).
# The published table labels
# Heun's columns NFE, but they are points (twice as many evaluations, less two), and RK4's NFE = 4 N.
PUBLISHED = {
    "euler_maruyama": {50: ("4.68", "4.68"), 250: (".70", ".70"), 500: (".40", ".40"), 1000: (".27", ".27")},
    "exponential_integrator": {50: ("2.91", None), 250: (".67", None), 500: (".41", None), 1000: (".29", None)},
    "ddpm_discrete": {50: ("6.74", None), 250: ("1.00", None), 500: (".53", None), 1000: (".32", None)},
    "euler": {50: ("1.73", "1.79"), 250: (".42", ".48"), 500: (".27", ".32"), 1000: (".21", ".25")},
    "heun": {50: (".58", ".59"), 250: (".13", ".15"), 500: (".16", ".18"), 1000: (".17", ".19")},
    "rk4": {12: ("2.60", "2.60"), 62: (".09", ".12"), 125: (".15", ".17"), 250: (".17", ".19")},
}
FOUR_DIGITS = {
    "euler_maruyama": 4.6755,
    "exponential_integrator": 2.9148,
    "ddpm_discrete": 6.7413,
    "euler": 1.7855,
    "heun": 0.5918,
}

needs_spectrum = pytest.mark.skipif(
    not EIGENVALUES.exists(), reason="the CIFAR-10 spectrum has no licence and is not in the repository"
)


def cifar() -> Gaussian:
    values = torch.from_numpy(np.load(EIGENVALUES).astype(np.float64)).clamp(min=0.0)
    return Gaussian(VP(0.1, 20.0), torch.zeros_like(values), var=values)


def w2(name, points, start, data, stop=1e-3, grid="uniform"):
    return exact_law(trace(name, data.path, make_grid(grid, data.path, points - 1, None, stop)), data, start=start).w2()


@needs_spectrum
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table(name):
    data = cifar()
    for points, cells in PUBLISHED[name].items():
        for start, cell in zip(("marginal", "prior"), cells, strict=True):
            if cell is not None:
                assert f"{w2(name, points, start, data):.2f}" == f"{float(cell):.2f}", (name, points, start)
    if name in FOUR_DIGITS:
        assert f"{w2(name, 50, 'prior', data):.4f}" == f"{FOUR_DIGITS[name]:.4f}"


@needs_spectrum
def test_true_heun_at_48_evaluations():
    """The number that the published label hides: 25 points are 48 evaluations."""
    data = cifar()
    plan = trace("heun", data.path, make_grid("uniform", data.path, 24, None, 1e-3))
    assert plan.nfe == 48
    assert (
        f"{exact_law(plan, data).w2():.3f}" in ("2.044", "2.046")
        or f"{exact_law(plan, data, start='prior').w2():.3f}" == "2.044"
    )


@needs_spectrum
@pytest.mark.parametrize(
    ("name", "grid", "cells"),
    [
        ("ddim", "karras", {5: 9.88, 6: 8.55, 8: 6.71, 10: 5.52, 15: 3.83, 20: 2.93, 30: 1.99, 50: 1.22}),
        ("unipc_3", "log_snr", {5: 4.18, 6: 6.64, 8: 3.23, 10: 1.07, 15: 0.204, 20: 0.170, 30: 0.173, 50: 0.176}),
        ("edm_heun", "karras", {3: 49.5, 4: 25.4, 5: 15.2, 7: 7.09, 10: 3.24, 15: 1.37, 25: 0.507}),
    ],
)
def test_low_nfe_cells(name, grid, cells):
    """Exact values computed independently for the same data (steps -> W2, stop at 1e-3)."""
    data = cifar()
    for steps, value in cells.items():
        assert w2(name, steps + 1, "marginal", data, grid=grid) == pytest.approx(value, rel=6e-3), steps


@given(st.lists(st.floats(0.01, 50.0), min_size=2, max_size=5), st.integers(30, 80), st.sampled_from(["marginal", "prior"]))
@settings(max_examples=40)
def test_hand_recursions(values, points, start):
    """The paper's per-eigenvalue recursions, written out here, for random spectra."""
    path = VP(0.1, 20.0)
    lam = np.array(values)
    grid = np.linspace(1.0, 1e-3, points)
    b = lambda t: 0.05 + 9.95 * t  # noqa: E731
    big = lambda t: 0.05 * t + 9.95 * t**2 / 2  # noqa: E731
    s = lambda t: np.exp(-2 * big(t)) * lam + (1 - np.exp(-2 * big(t)))  # noqa: E731
    em = ei = dd = eu = s(1.0) if start == "marginal" else np.ones_like(lam)
    for t0, t1 in itertools.pairwise(grid):
        h, db = t0 - t1, big(t0) - big(t1)
        em = (1 + h * b(t0) * (1 - 2 / s(t0))) ** 2 * em + 2 * h * b(t0)
        g1 = np.expm1(db)
        ei = (1 + g1 * (1 - 2 / s(t0))) ** 2 * ei + np.expm1(2 * db)
        bd = 2 * h * b(t0)
        dd = (1 - bd / s(t0)) ** 2 * dd / (1 - bd) + bd
        eu = (1 + h * b(t0) * (1 - 1 / s(t0))) ** 2 * eu
    data = Gaussian(path, torch.zeros(len(values), dtype=torch.float64), var=torch.tensor(values, dtype=torch.float64))
    for name, variance in (("euler_maruyama", em), ("exponential_integrator", ei), ("ddpm_discrete", dd), ("euler", eu)):
        law = exact_law(trace(name, path, grid.tolist()), data, start=start)
        np.testing.assert_allclose(law.variance.numpy(), variance, rtol=1e-9)


@pytest.mark.parametrize("name", TRACEABLE)
@pytest.mark.parametrize("path", [VP(), EDM(), Linear()], ids=["VP", "EDM", "Linear"])
def test_law_equals_what_probing_the_run_reads_off(name, path):
    """The engine's mean and variance against the real run on tensors, whose affine map is read off column by column."""
    if name == "ddpm_discrete" and not isinstance(path, VP):
        return
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    variance = torch.tensor([0.04, 1.0, 0.3], dtype=torch.float64)
    data = Gaussian(path, mean, var=variance)
    grid = warped_grid(path, 60 if name == "ddpm_discrete" else 12)
    plan = trace(name, path, grid)
    const, gain, noise = probe(lambda x: plan.run(data, x, noise=Probe()), 3, plan.draws)
    law = exact_law(plan, data)
    s = plan.grid[0]
    start = s.alpha**2 * variance + s.sigma**2
    torch.testing.assert_close(law.mean, const + gain * s.alpha * mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(law.variance, gain**2 * start + (noise**2).sum(0), rtol=1e-9, atol=1e-13)
    assert law.nfe == plan.nfe


@pytest.mark.parametrize("name", ["ddpm", "euler_maruyama", "dpmpp_2m_sde"])
def test_strong_error_equals_probing_with_the_exact_solution(name):
    """The joint law with the exact solution, against the probed run and an independent quadrature in t."""
    from sde.noise import clock

    path, mean, variance = VP(), 0.7, 0.3
    data = Gaussian(path, torch.tensor([mean], dtype=torch.float64), var=variance)
    plan = trace(name, path, warped_grid(path, 10))
    const, gain, noise = (v.squeeze(-1).numpy() for v in probe(lambda x: plan.run(data, x, noise=Probe()), 1, plan.draws))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    spread = lambda t: (path.alpha(t) ** 2 * variance + path.sigma(t) ** 2).numpy()  # noqa: E731
    s, t = plan.grid[0], plan.grid[-1]
    kappas, total = [], 0.0
    for a, b in zip(plan.grid, plan.grid[1:], strict=False):
        u = 0.5 * (a.t + b.t) + 0.5 * (a.t - b.t) * nodes
        w = 0.5 * (a.t - b.t) * weights
        phi = (path.alpha(u).numpy() / t.alpha) * float(spread(t.t)) / spread(u)
        g = path.g(u).numpy()
        lam = path.lam(u)
        step = 1e-5
        rate = np.array([(clock(v + step) - clock(v - step)) / (2 * step) for v in lam.tolist()]) * np.abs(path.dlam(u).numpy())
        kappas.append(np.sum(w * phi * g * np.sqrt(rate / (clock(b.lam) - clock(a.lam)))))
        total += np.sum(w * (phi * g) ** 2)
    kappa = np.array(kappas)
    start = s.alpha**2 * variance + s.sigma**2
    exact = (s.alpha / t.alpha) * float(spread(t.t)) / start
    bias = const + gain * s.alpha * mean - t.alpha * mean
    error = math.sqrt((gain - exact) ** 2 * start + np.sum((noise - kappa) ** 2) + max(total - np.sum(kappa**2), 0.0) + bias**2)
    assert strong_error(plan, data) == pytest.approx(error, rel=1e-5)


@given(st.data())
@settings(max_examples=30)
def test_isotropic_ddim_law_on_any_path(data):
    """Closed form on any path and grid: DDIM multiplies the deviation by (l + rho_s rho_t)/(l + rho_s^2) a step, in x/alpha."""
    path = data.draw(paths())
    grid = data.draw(times(path, 4))
    start = min(grid[0], path.T * 0.999)
    grid = [start, *[t for t in grid[1:] if t < start]]
    if len(grid) < 2 or path.knot(grid[-1]).sigma <= 0:
        return
    value = data.draw(st.floats(0.05, 4.0))
    knots = path.knots(grid)
    if any(k.alpha < 1e-8 for k in knots):
        return
    factor = 1.0
    for a, b in itertools.pairwise(knots):
        p, q = a.sigma / a.alpha, b.sigma / b.alpha
        factor *= (value + p * q) / (value + p * p)
    s, t = knots[0], knots[-1]
    expected = (t.alpha / s.alpha) ** 2 * factor**2 * (s.alpha**2 * value + s.sigma**2)
    law = exact_law(trace("ddim", path, grid), Gaussian(path, torch.zeros(1, dtype=torch.float64), var=value))
    assert float(law.variance) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("n", [2, 5, 10, 20, 50])
def test_the_cosine_law_of_the_gaussian_grid(n):
    """On equal steps of the angle arctan(rho/c), DDIM on N(0, c^2) shrinks the standard deviation by cos^N(da/N): (c^2 +
    ab)/(c^2 + a^2) a step.
    """
    path, c = EDM(), 0.5
    first, last = math.atan(80.0 / c), math.atan(0.002 / c)
    grid = [c * math.tan(first + (last - first) * i / n) for i in range(n + 1)]
    grid[0], grid[-1] = 80.0, 0.002
    data = Gaussian(path, torch.zeros(1, dtype=torch.float64), var=c * c)
    law = exact_law(trace("ddim", path, grid), data)
    ratio = math.sqrt(float(law.variance) / (c * c + 0.002**2))
    assert ratio == pytest.approx(math.cos((first - last) / n) ** n, rel=1e-12)


def test_full_covariance_is_the_diagonal_one_rotated():
    path = VP()
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    values = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    mean = torch.tensor([1.0, -0.5, 0.2, 0.0], dtype=torch.float64)
    plan = trace("dpmpp_2m_sde", path, warped_grid(path, 8))
    diagonal = exact_law(plan, Gaussian(path, mean, var=values))
    full = exact_law(plan, Gaussian(path, rotation @ mean, cov=(rotation * values) @ rotation.T))
    assert full.w2() == pytest.approx(diagonal.w2(), rel=1e-9)
    torch.testing.assert_close(full.mean, rotation @ diagonal.mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(full.covariance, (rotation * diagonal.variance) @ rotation.T, rtol=1e-8, atol=1e-10)


def test_low_rank_equals_full():
    path = VP()
    factor = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean = torch.arange(6.0, dtype=torch.float64) / 5
    plan = trace("heun", path, warped_grid(path, 8))
    low = exact_law(plan, Gaussian(path, mean, factor=factor, diag=0.1))
    full = exact_law(plan, Gaussian(path, mean, cov=factor @ factor.T + 0.1 * torch.eye(6, dtype=torch.float64)))
    assert low.w2() == pytest.approx(full.w2(), rel=1e-9)
    assert low.mean_error() == pytest.approx(full.mean_error(), rel=1e-9)
    torch.testing.assert_close(low.mean, full.mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(low.covariance, full.covariance, rtol=1e-8, atol=1e-10)


def test_w2_and_kl_closed_forms():
    data = Gaussian(VP(), torch.tensor([1.0, 0.0], dtype=torch.float64), var=torch.tensor([4.0, 1.0], dtype=torch.float64))
    plan = trace("ddim", data.path, [0.5, 1e-3])
    law = exact_law(plan, data, start=(torch.zeros(2), torch.ones(2)))
    m, v = law.mean.numpy(), law.variance.numpy()
    assert law.w2() == pytest.approx(math.sqrt((m[0] - 1) ** 2 + m[1] ** 2 + (v[0] ** 0.5 - 2) ** 2 + (v[1] ** 0.5 - 1) ** 2))
    kl = 0.5 * sum(a / b - 1 - math.log(a / b) + d**2 / b for a, b, d in zip(v, (4.0, 1.0), (m[0] - 1, m[1]), strict=True))
    assert law.kl() == pytest.approx(kl)
    assert law.mean_error() == pytest.approx(math.hypot(m[0] - 1, m[1]))


def test_kl_to_data_on_a_line():
    """Data without spread in one direction: a law with some, or with another mean there, is infinitely far."""
    data = Gaussian(VP(), torch.tensor([1.3, 2.7], dtype=torch.float64), var=torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert exact_law(trace("euler", data.path, [0.9, 0.5, 0.1, 1e-3]), data).kl() == math.inf
    exact = exact_law(trace("ddim", data.path, [0.9, 0.5, 0.1, 0.0]), data)
    ratio = float(exact.variance[1])
    assert float(exact.variance[0]) == 0.0
    assert exact.kl() == pytest.approx(0.5 * (ratio - 1.0 - math.log(ratio)))
    assert replace(exact, center=exact.center + 0.1).kl() == math.inf


def test_the_exact_solution_has_no_error():
    """One DDPM step is exact on a point mass, and the engine says so for law and path."""
    path = VP()
    data = Gaussian(path, torch.tensor([0.3], dtype=torch.float64), var=0.0)
    plan = trace("ddpm", path, [0.6, 0.3])
    assert exact_law(plan, data).w2(0.3) < 1e-12
    ode = trace("ddim", path, [0.6, 0.3])
    assert flow_error(ode, data) < 1e-12


def test_wrong_questions_are_refused():
    data = Gaussian(VP(), torch.zeros(1, dtype=torch.float64), var=1.0)
    with pytest.raises(InputError, match="start="):
        exact_law(trace("ddim", VP(), [0.5, 0.1]), data, start="nowhere")
    with pytest.raises(InputError, match="draws noise"):
        flow_error(trace("ddpm", VP(), [0.5, 0.1]), data)
    with pytest.raises(InputError, match="no table"):
        trace("pc_ddpm", VP(), [0.5, 0.1])
    plan = trace("ddim", VP(), [0.5, 0.1])
    with pytest.raises(InputError, match=r"traced on VP.* but the Gaussian's path is EDM"):
        exact_law(plan, data.on(EDM()))
    with pytest.raises(InputError, match="GaussianMixture: exact laws are those of Gaussian data"):
        exact_law(plan, GaussianMixture(VP(), [1.0], [[0.0]], [1.0]))


def test_reverse_sde_levels_are_the_plan_s():
    """trace(eta=) and integrate(ReverseSDE(eta)) are the same sampler."""
    path = VP()
    data = Gaussian(path, torch.zeros(2, dtype=torch.float64), var=0.5)
    grid = warped_grid(path, 6)
    x = torch.ones(3, 2, dtype=torch.float64)
    plan = trace("dpmpp_2m_sde", path, grid, eta=0.7)
    a = plan.run(data, x, seed=5)
    b = integrate("dpmpp_2m_sde", ReverseSDE(path, data, 0.7), x, grid, seed=5, traced=False).x
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "exact", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )


def test_the_command_line_prints_one_json_line(tmp_path):
    file = tmp_path / "values.npy"
    values = np.array([4.0, 1.0, 0.25, -0.0], dtype=np.float32)
    np.save(file, values)
    out = command(
        *("--eigenvalues", str(file), "--path", "vp", "--beta-min", "0.1", "--beta-max", "20"),
        *(
            "--solver",
            "euler_maruyama",
            "--grid",
            "uniform",
            "--points",
            "50",
            "--stop",
            "1e-3",
            "--start",
            "marginal",
            "--json",
        ),
    )
    assert out.returncode == 0, out.stderr
    (line,) = out.stdout.strip().splitlines()
    row = json.loads(line)
    assert row["nfe"] == 49
    assert row["points"] == 50
    data = Gaussian(VP(), torch.zeros(4, dtype=torch.float64), var=torch.from_numpy(values.astype(np.float64)))
    assert row["w2"] == pytest.approx(w2("euler_maruyama", 50, "marginal", data), rel=1e-12)


def test_the_command_line_says_what_is_wrong(tmp_path):
    np.save(tmp_path / "one.npy", np.ones(1))
    out = command("--eigenvalues", str(tmp_path / "one.npy"), "--points", "1")
    assert out.returncode == 2
    assert "--points 1" in out.stderr
    out = command("--eigenvalues", str(tmp_path / "missing.npy"), "--points", "5")
    assert out.returncode == 2
    assert "missing.npy" in out.stderr
    assert "Traceback" not in out.stderr


for _kind_check in TRACEABLE:  # a traceable solver without a declared order would escape test_orders
    if not kinds_of(_kind_check) and SOLVERS[_kind_check].theory == "order":
        raise RuntimeError(f"{_kind_check} declares no order")
