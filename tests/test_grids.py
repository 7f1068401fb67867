"""Grids against their published formulas, tables and code, independent quantiles, and closed forms.

What holds for every grid is parametrised from GRIDS. Formulas of released code are transcribed here, with what is
wrong in them.
"""

from __future__ import annotations

import inspect
import math
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scores import Gaussian, Score
from sde import EDM, VE, VP, Cosine, FromFunctions, Linear, SubVP, Tabulated, Trigonometric
from sde.errors import InputError
from solvers import GRIDS, exact_law, sample, trace
from solvers.grids import (
    AYS_TABLES,
    GITS_TABLE,
    beta_sigma,
    bong_tangent,
    flow_shift,
    from_sigmas,
    gaussian_optimal,
    hyper,
    karras,
    laplace,
    linear_quadratic,
    make_grid,
    poly_exponential,
    probit,
    vp,
)
from solvers.grids_fitted import (
    FittedGrid,
    denoising_error,
    dmn,
    dmn_bound,
    entropic,
    rescaled_entropic,
    score_optimal,
)
from solvers.grids_published import beta, beta_quantiles, leading, linspace, trailing, turbo
from solvers.testing import paths

PATHS = {
    "vp": VP(),
    "sub_vp": SubVP(),
    "ve": VE(),
    "edm": EDM(),
    "linear": Linear(),
    "cosine": Cosine(),
    "trigonometric": Trigonometric(),
    "tabulated": Tabulated.linear(1000),
    "short_table": Tabulated.scaled_linear(12),
    "zero_snr": Tabulated.scaled_linear(1000, zero_terminal_snr=True),
    "functions": FromFunctions(lambda t: (1.0 - 0.05 * t) ** 2, lambda t: t, T=8.0),
}
SD = Tabulated.scaled_linear()


def rho(path, times):
    return torch.exp(-path.lam(times)).numpy()


def entries(path, times):
    return path.index(times).numpy()


def is_a_grid(times, n):
    assert times.dtype == torch.float64
    assert times.shape == (n + 1,)
    assert bool((times[1:] < times[:-1]).all())
    assert bool(times.isfinite().all())


# --- every grid -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", PATHS)
@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_falls_strictly_between_exact_ends(name, label):
    path = PATHS[label]
    no_data = float(path.alpha(path.T)) == 0.0
    starts, stops = [None, *[path.T][no_data:], 0.8 * path.T], [None, 0.0, path.t_min, 0.1 * path.T]
    for n in (1, 2, 3, 10, 50):
        for start in starts if n in (1, 10) else [None]:
            for stop in stops if n in (1, 10) else [None, 0.0]:
                times = make_grid(name, path, n, start, stop)
                is_a_grid(times, n)
                if start is not None:
                    assert float(times[0]) == start
                if stop is not None:
                    assert float(times[-1]) == stop
                if name not in AYS_TABLES:
                    assert stop is not None or float(times[-1]) == path.t_min
                    assert start is not None or no_data or float(times[0]) == path.T
                    assert float(times[0]) >= 0.8 * path.T


@given(paths(), st.sampled_from(sorted(GRIDS)), st.integers(1, 40))
@settings(max_examples=100)
def test_every_grid_on_every_path_is_strict_and_in_the_domain(path, name, n):
    if name in AYS_TABLES and float(path.lam(path.T)) >= -math.log(AYS_TABLES[name][-1]):
        with pytest.raises(InputError, match="does not reach"):
            make_grid(name, path, n)
        return
    times = make_grid(name, path, n)
    is_a_grid(times, n)
    assert float(times[-1]) >= 0.0
    assert float(times[0]) <= path.T


@given(
    paths(),
    st.sampled_from(sorted(set(GRIDS) - set(AYS_TABLES))),
    st.integers(1, 30),
    st.floats(0.5, 0.95),
    st.floats(0.05, 0.4) | st.just(0.0),
)
@settings(max_examples=100)
def test_ends_are_exact(path, name, n, high, low):
    start, stop = high * path.T, low * path.T
    assume(stop > 0.0 or path.t_min < start)  # or there is nowhere for the last step to 0 to begin
    times = make_grid(name, path, n, start, stop)
    is_a_grid(times, n)
    assert float(times[0]) == start
    assert float(times[-1]) == stop


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_is_usable_by_name(name):
    score = Score(lambda x, t: 0.5 * x, VP(), "eps")
    out = sample(score, (2, 3), solver="ddim", steps=4, grid=name, seed=1)
    assert torch.equal(out.times, make_grid(name, VP(), 4))
    assert bool(out.x.isfinite().all())


@pytest.mark.parametrize("name", GRIDS)
def test_parameters_are_keywords_after_the_four_of_all_grids(name):
    grid = GRIDS[name]
    names = list(inspect.signature(grid).parameters)
    assert names[:4] == ["path", "n", "start", "stop"]
    assert (grid.func if isinstance(grid, partial) else grid).__doc__


@pytest.mark.parametrize("name", sorted(set(GRIDS) - {"ays_sd15", "ays_sdxl", "ays_svd"}))
def test_every_grid_is_pure(name):
    first = make_grid(name, VP(), 7)
    kept = first.clone()
    first += 1.0  # a caller may write to what it got
    assert torch.equal(make_grid(name, VP(), 7), kept)


SAME_ON_EVERY_PATH = [
    "karras", "log_snr", "cosine", "poly_exponential", "gaussian_optimal", "vp", "laplace", "probit", "beta_sigma", "gits"
]  # fmt: skip


@pytest.mark.parametrize("name", SAME_ON_EVERY_PATH)
def test_grids_of_the_noise_level_are_the_same_on_every_path(name):
    """Between the same noise levels; none of the others may be in the list."""
    home, high, low = EDM(), 5.0, 0.05
    levels = rho(home, make_grid(name, home, 9, high, low))
    for path in (VP(), Linear(), SubVP(), PATHS["functions"]):
        start, stop = (float(path.time(-math.log(level))) for level in (high, low))
        np.testing.assert_allclose(rho(path, make_grid(name, path, 9, start, stop)), levels, rtol=1e-8)


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 18])
def test_karras_is_the_published_formula(n):
    i = np.arange(n + 1)
    expected = (80 ** (1 / 7) + i / n * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(make_grid("karras", EDM(), n).numpy(), expected, rtol=1e-12)


def k_diffusion(name, n, low, high, power):
    """The n noise levels and the 0 of get_sigmas_karras, _exponential, _polyexponential, _vp."""
    r = np.linspace(0, 1, n)
    if name == "karras":
        levels = (high ** (1 / power) + r * (low ** (1 / power) - high ** (1 / power))) ** power
    elif name == "vp":
        t = np.linspace(1, 1e-3, n)
        levels = np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)
    else:
        bent = np.linspace(1, 0, n) ** (power if name == "poly_exponential" else 1.0)
        levels = np.exp(bent * (math.log(high) - math.log(low)) + math.log(low))
    return np.append(levels, 0.0)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 50])
@pytest.mark.parametrize(("name", "power"), [("karras", 7.0), ("karras", 3.0), ("exponential", 1.0), ("poly_exponential", 2.5)])
def test_k_diffusion_lists_are_ours_with_a_last_step_to_zero(name, power, n):
    path = EDM(T=14.6, t_min=0.03)
    options = {} if name == "exponential" else {"rho": power}
    times = partial(GRIDS[name], **options)(path, n, None, 0.0)
    np.testing.assert_allclose(times.numpy(), k_diffusion(name, n, 0.03, 14.6, power), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 10, 50])
def test_vp_is_k_diffusions_and_uniform_on_its_own_path(n):
    levels = k_diffusion("vp", n, None, None, None)
    np.testing.assert_allclose(rho(VP(), vp(VP(), n, None, 0.0)[:-1]), levels[:-1], rtol=1e-9)
    np.testing.assert_allclose(vp(VP(), n).numpy(), make_grid("uniform", VP(), n).numpy(), rtol=1e-9)
    if n > 1:
        edm = EDM(T=levels[0], t_min=levels[-2])
        np.testing.assert_allclose(vp(edm, n, None, 0.0).numpy(), levels, rtol=1e-9)
    other = VP(0.5, 7.0)
    np.testing.assert_allclose(
        vp(other, 8, beta_min=0.5, beta_max=7.0).numpy(), make_grid("uniform", other, 8).numpy(), rtol=1e-9
    )
    np.testing.assert_allclose(
        np.diff(vp(EDM(T=1e20), 4).log().numpy())[0], np.diff(vp(EDM(T=1e19), 4).log().numpy())[0], rtol=0.2
    )


def test_log_snr_has_equal_steps_in_lambda_and_quadratic_in_the_root():
    path = VP()
    lam = path.lam(make_grid("log_snr", path, 12))
    np.testing.assert_allclose(np.diff(lam.numpy()), float(lam[-1] - lam[0]) / 12, rtol=1e-9)
    root = make_grid("quadratic", path, 12).sqrt()
    np.testing.assert_allclose(np.diff(root.numpy()), float(root[-1] - root[0]) / 12, rtol=1e-9)
    np.testing.assert_allclose(make_grid("uniform", path, 7).numpy(), np.linspace(1.0, 1e-3, 8), rtol=1e-14)


def test_names_of_one_grid():
    for one, others in {
        "uniform": ["time_uniform"],
        "quadratic": ["time_quadratic"],
        "karras": ["polynomial"],
        "log_snr": ["exponential"],
        "cosine": ["kl_optimal"],
    }.items():
        assert all(GRIDS[other] is GRIDS[one] for other in others)
    assert torch.allclose(GRIDS["poly_exponential"](VP(), 9), GRIDS["log_snr"](VP(), 9), rtol=1e-12, atol=0)


def test_cosine_has_equal_angles_and_reaches_both_ends():
    times = make_grid("cosine", Linear(), 9, 1.0, 0.0)
    angle = torch.atan2(Linear().sigma(times), Linear().alpha(times))
    np.testing.assert_allclose(angle.numpy(), np.linspace(math.pi / 2, 0.0, 10), atol=1e-12)
    assert times[0] == 1.0
    assert times[-1] == 0.0


def test_kl_optimal_is_comfyuis_list_which_divides_by_zero_at_one_step():
    def comfyui(n, low, high):
        r = torch.arange(n, dtype=torch.float64) / (n - 1)
        return torch.cat([torch.tan(r * math.atan(low) + (1 - r) * math.atan(high)), torch.zeros(1)])

    path = EDM(T=14.6, t_min=0.03)
    for n in (2, 3, 10):
        np.testing.assert_allclose(GRIDS["kl_optimal"](path, n - 1).numpy(), comfyui(n, 0.03, 14.6)[:-1].numpy(), rtol=1e-12)
    assert bool(comfyui(1, 0.03, 14.6).isnan().any())
    np.testing.assert_array_equal(GRIDS["kl_optimal"](path, 1).numpy(), [14.6, 0.03])


@pytest.mark.parametrize(
    ("n", "ratio"), [(1, None), (2, 0.505125), (5, 0.780680), (10, 0.884916), (20, 0.940875), (50, 0.975937)]
)
def test_the_gaussian_optimal_grid_has_the_cosine_law(n, ratio):
    """DDIM's final standard deviation over the true one is cos^n(angle / n); the third column is published."""
    c = 0.5
    angle = math.atan(80.0 / c) - math.atan(0.002 / c)
    law = exact_law(trace("ddim", EDM(), gaussian_optimal(EDM(), n, c=c)), Gaussian(EDM(), torch.zeros(1), std=c))
    found = float(law.variance.sqrt()) / math.hypot(c, 0.002)
    assert found == pytest.approx(math.cos(angle / n) ** n, rel=1e-12)
    if ratio is not None:
        assert found == pytest.approx(ratio, abs=6e-7)


@pytest.mark.parametrize("path", [VP(), Linear()])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_no_other_grid_serves_ddim_better_on_gaussian_data(path, n):
    """Of all in GRIDS and of random changes of the best one, between its ends."""
    c, start, stop = 0.7, 0.95 * path.T, 0.01 * path.T
    data = Gaussian(path, torch.zeros(1), std=c)

    def error(times):
        return exact_law(trace("ddim", path, times), data).w2(stop)

    best = gaussian_optimal(path, n, start, stop, c=c)
    assert all(error(make_grid(name, path, n, start, stop)) > error(best) for name in GRIDS)
    normal = np.random.default_rng(0)
    for _ in range(20):
        moved = best.clone()
        moved[1:-1] *= torch.from_numpy(1.0 + 1e-3 * normal.standard_normal(n - 1))
        assert error(moved) > error(best)


@pytest.mark.parametrize(
    ("path", "start", "stop"), [(EDM(), 80.0, 0.002), (EDM(), 5.0, 3.0), (EDM(), 0.1, 0.01), (VP(), 1.0, 1e-3)]
)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_laplace_and_probit_are_truncated_quantiles(path, start, stop, n):
    high, low = (-float(path.lam(t)) for t in (start, stop))
    share = 1.0 - np.arange(n + 1) / n
    for mu, scale in ((0.0, 3.0), (-1.2, 1.2), (0.0, 0.4)):
        law = scipy.stats.truncnorm((low - mu) / scale, (high - mu) / scale, mu, scale)
        found = np.log(rho(path, probit(path, n, start, stop, mu=mu, scale=scale)))
        np.testing.assert_allclose(found, law.ppf(share), rtol=1e-7, atol=1e-8)
    for mu, scale in ((0.0, 0.5), (-1.0, 1.5)):
        law = scipy.stats.laplace(mu, scale)
        if low >= mu:
            quantiles = law.isf(law.sf(low) + share * (law.sf(high) - law.sf(low)))
        else:
            quantiles = law.ppf(law.cdf(low) + share * (law.cdf(high) - law.cdf(low)))
        found = np.log(rho(path, laplace(path, n, start, stop, mu=mu, scale=scale)))
        np.testing.assert_allclose(found, quantiles, rtol=1e-7, atol=1e-7)


def test_quantiles_far_out_in_a_tail():
    """60 standard deviations out all CDFs are 0 or 1 in float64; the law there is nearly exponential, at z + log(...) / z."""
    path = FromFunctions(lambda t: torch.exp(-100.0 * t), lambda t: torch.exp(100.0 * t), t_min=0.3)
    up = np.log(rho(path, probit(path, 4, 0.5, 0.3, scale=1.0)))
    down = np.log(rho(path, probit(path, 4, 0.5, 0.3, mu=160.0, scale=1.0)))
    z = [math.hypot(60.0, math.sqrt(-2.0 * math.log(s))) for s in (0.75, 0.5, 0.25)]
    np.testing.assert_allclose(up[1:-1][::-1], z, rtol=1e-5)
    np.testing.assert_allclose(160.0 - down[1:-1], z, rtol=1e-5)


def test_laplace_is_the_published_law_which_comfyui_takes_for_log_sigma_and_clamps():
    def comfyui(n, low, high, mu=0.0, beta=0.5):
        x = np.linspace(0, 1, n)
        return np.clip(np.exp(mu - beta * np.sign(0.5 - x) * np.log(1 - 2 * np.abs(0.5 - x) + 1e-5)), low, high)

    assert not np.all(np.diff(comfyui(430, 0.0291675, 14.614642)) < 0)  # repeats a level
    assert np.all(np.diff(comfyui(429, 0.0291675, 14.614642)) < 0)
    levels = comfyui(21, 1e-12, 1e12)[1:-1]  # unclamped, between two of its own levels:
    path = EDM(T=levels[0], t_min=levels[-1])
    np.testing.assert_allclose(laplace(path, 18).numpy(), levels, rtol=2e-4)  # its 1e-5 inside the logarithm
    # Hang et al.: log SNR = mu - b sgn(1/2 - t) log(1 - 2 |t - 1/2|), b = 0.5; log sigma = -log SNR / 2
    t = np.arange(1, 20) / 20
    log_snr = 0.5 * np.sign(0.5 - t) * -np.log(1 - 2 * np.abs(0.5 - t))
    path = EDM(T=math.exp(-log_snr[-1] / 2), t_min=math.exp(-log_snr[0] / 2))
    np.testing.assert_allclose(-2.0 * np.log(laplace(path, 18, scale=0.25).numpy()), log_snr[::-1], atol=1e-9)


def test_probit_on_the_flow_path_is_skramples_curve():
    """sigmoid of normal quantiles with standard deviation 3."""
    p = np.arange(1, 30)[::-1] / 30
    t = scipy.special.expit(scipy.stats.norm.ppf(p, scale=3.0))
    np.testing.assert_allclose(probit(Linear(), 28, t[0], t[-1]).numpy(), t, rtol=1e-9)


@pytest.mark.parametrize(
    ("a", "b"), [(0.6, 0.6), (0.5, 0.7), (0.2, 0.2), (20.0, 20.0), (20.0, 0.2), (0.2, 20.0), (1.0, 1.0), (3.0, 7.0)]
)
def test_beta_quantiles_are_scipys(a, b):
    share = np.linspace(0.0, 1.0, 201)
    np.testing.assert_allclose(beta_quantiles(200, a, b).numpy(), scipy.stats.beta.ppf(share, a, b), rtol=1e-11, atol=1e-300)


def mochi(n, threshold=0.025):
    """The list of Mochi, LTX-Video and ComfyUI, which divides by 0 at one step (ComfyUI writes [1, 0] there)."""
    half = n // 2
    line = [i * threshold / half for i in range(half)]
    lack, rest = half - threshold * n, n - half
    square = lack / (half * rest**2)
    slope = threshold / half - 2 * lack / rest**2
    const = square * half**2
    return 1.0 - np.array([*line, *(square * i**2 + slope * i + const for i in range(half, n)), 1.0])


@pytest.mark.parametrize("n", [2, 3, 4, 9, 10, 50, 64])
@pytest.mark.parametrize("threshold", [0.025, 0.1, 0.49])
def test_linear_quadratic_is_mochis(n, threshold):
    times = linear_quadratic(Linear(), n, 1.0, 0.0, threshold=threshold)
    np.testing.assert_allclose(times.numpy(), mochi(n, threshold), atol=1e-14)
    np.testing.assert_allclose(
        linear_quadratic(EDM(T=14.6), n, None, 0.0, threshold).numpy(), 14.6 * mochi(n, threshold), atol=1e-13
    )


def test_linear_quadratic_is_a_line_at_one_step():
    with pytest.raises(ZeroDivisionError):
        mochi(1)
    np.testing.assert_array_equal(linear_quadratic(Linear(), 1, 1.0, 0.0).numpy(), [1.0, 0.0])


def res4lyf(steps, pivot=0.6, slope=0.2, middle=0.5):
    """bong_tangent of RES4LYF: steps + 1 levels from 1 to 0, whatever the model's."""

    def tangent(steps, slope, pivot, start, end):
        high = ((2 / math.pi) * math.atan(-slope * (0 - pivot)) + 1) / 2
        low = ((2 / math.pi) * math.atan(-slope * ((steps - 1) - pivot)) + 1) / 2
        curve = [((2 / math.pi) * math.atan(-slope * (x - pivot)) + 1) / 2 for x in range(steps)]
        return [(y - low) * (1 / (high - low)) * (start - end) + end for y in curve]

    steps += 2
    split = int((steps * pivot + steps * pivot) / 2)
    knee, slope = int(steps * pivot), slope / (steps / 40)
    first = tangent(split, slope, knee, 1.0, middle)
    return first[:-1] + tangent(steps - split, slope, knee - split, middle, 0.0)


@pytest.mark.parametrize("n", [2, 3, 4, 8, 9, 20, 50, 63])
def test_bong_tangent_is_res4lyfs(n):
    np.testing.assert_allclose(bong_tangent(Linear(), n, 1.0, 0.0).numpy(), res4lyf(n), atol=1e-13)
    other = bong_tangent(Linear(), n, 1.0, 0.0, pivot=0.5, slope=0.7, middle=0.3)
    np.testing.assert_allclose(other.numpy(), res4lyf(n, 0.5, 0.7, 0.3), atol=1e-13)


def test_bong_tangent_as_released_divides_by_zero_at_one_step():
    with pytest.raises(ZeroDivisionError):
        res4lyf(1)
    np.testing.assert_array_equal(bong_tangent(Linear(), 1, 1.0, 0.0).numpy(), [1.0, 0.0])
    for pivot in (0.1, 0.95):  # one of the pieces is a single point
        times = bong_tangent(Linear(), 9, 1.0, 0.0, pivot=pivot)
        np.testing.assert_allclose(times.numpy(), make_grid("uniform", Linear(), 9, 1.0, 0.0).numpy(), atol=1e-14)


def test_hyper_is_skramples():
    def skrample(t, scale):
        points = scale + (np.concatenate([[1], t]) - 1) * (2 * scale)
        points = np.sinh(points) if scale < 0 else np.tanh(points / math.sqrt(2))
        return (points[1:] + points[0]) / (2 * points[0])

    for scale in (2.0, -2.0, 0.3):
        expected = skrample(1.0 - np.arange(10) / 9, scale)
        np.testing.assert_allclose(hyper(Linear(), 9, 1.0, 0.0, scale=scale).numpy(), expected, atol=1e-14)


# --- tables of noise levels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AYS_TABLES)
def test_align_your_steps_tables_come_back_at_ten_steps(name):
    path = EDM(T=1000.0)
    np.testing.assert_allclose(make_grid(name, path, 10).numpy(), AYS_TABLES[name], rtol=1e-12)
    np.testing.assert_allclose(make_grid(name, path, 20)[::2].numpy(), AYS_TABLES[name], rtol=1e-12)
    middle = make_grid(name, path, 20)[1]
    assert float(middle) == pytest.approx(math.sqrt(AYS_TABLES[name][0] * AYS_TABLES[name][1]))


def test_align_your_steps_keeps_its_levels_on_another_path():
    np.testing.assert_allclose(rho(VP(), make_grid("ays_sd15", VP(), 10)), AYS_TABLES["ays_sd15"], rtol=1e-9)


def test_released_align_your_steps_lists_skip_the_last_level():
    utils = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    for ours, theirs in (
        ("ays_sd15", "StableDiffusion"),
        ("ays_sdxl", "StableDiffusionXL"),
        ("ays_svd", "StableDiffusionVideo"),
    ):
        levels = utils.AysSchedules[f"{theirs}Sigmas"]
        assert tuple(levels[:-1]) == AYS_TABLES[ours][:-1]
        assert levels[-1] == 0.0 < AYS_TABLES[ours][-1]
        times = make_grid(ours, EDM(T=1000.0), 11, None, 0.0)  # all eleven levels, then 0
        np.testing.assert_allclose(times.numpy(), [*AYS_TABLES[ours], 0.0], rtol=1e-12)


def test_gits_is_its_table_on_the_path_it_was_made_for_and_stretched_on_others():
    assert GITS_TABLE == (80.0, 10.9836, 3.8811, 1.584, 0.5666, 0.1698, 0.002)
    np.testing.assert_allclose(make_grid("gits", EDM(), 6).numpy(), GITS_TABLE, rtol=1e-12)
    lam, table = VP().lam(make_grid("gits", VP(), 6)).numpy(), -np.log(GITS_TABLE)
    np.testing.assert_allclose((lam - lam[0]) / (lam[-1] - lam[0]), (table - table[0]) / (table[-1] - table[0]), rtol=1e-9)


def test_from_sigmas():
    grid = from_sigmas([10.0, 1.0, 0.1])
    np.testing.assert_allclose(grid(EDM(), 2).numpy(), [10.0, 1.0, 0.1], rtol=1e-12)
    np.testing.assert_allclose(grid(EDM(), 4).numpy(), 10.0 ** np.linspace(1, -1, 5), rtol=1e-12)
    np.testing.assert_allclose(grid(EDM(), 2, 10.0, 0.001).numpy(), [10.0, 0.1, 0.001], rtol=1e-12)
    np.testing.assert_allclose(grid(EDM(), 3, None, 0.0).numpy(), [10.0, 1.0, 0.1, 0.0], rtol=1e-12)
    np.testing.assert_allclose(grid(EDM(T=3.0), 2).numpy(), [3.0, math.sqrt(0.3), 0.1], rtol=1e-12)
    assert grid.__name__ == "from_sigmas"
    levels = torch.tensor([2.0, 1.0], dtype=torch.float64)
    grid = from_sigmas(levels)
    levels[0] = 9.0  # the caller's own from now on
    np.testing.assert_allclose(grid(EDM(), 1).numpy(), [2.0, 1.0])


# --- flow shift -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
@pytest.mark.parametrize("n", [1, 4, 25])
def test_flow_shift_is_diffusers(shift, n):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / n, n))
    times = flow_shift(Linear(), n, 1.0, 0.0, shift=shift)
    np.testing.assert_allclose(times.numpy(), scheduler.sigmas.numpy(), rtol=1e-6)


def test_diffusers_shifts_twice_when_it_makes_the_levels_itself():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    move = lambda t: 3.0 * t / (1.0 + 2.0 * t)  # noqa: E731
    twice = move(move(0.001))  # its last level is shifted before the levels are
    np.testing.assert_allclose(scheduler.sigmas.numpy()[:-1], flow_shift(Linear(), 3, 1.0, twice).numpy(), rtol=1e-6)
    assert float(scheduler.sigmas[-2]) == pytest.approx(0.00893, abs=1e-5)
    assert float(flow_shift(Linear(), 3, 1.0, move(0.001))[-1]) == pytest.approx(0.002994, abs=1e-6)


def test_flow_shift_moves_lambda_on_the_flow_path_and_wraps_any_grid():
    lam = Linear().lam(flow_shift(Linear(), 6, 0.99, 0.01, shift=5.0, grid="log_snr"))
    np.testing.assert_allclose(np.diff(lam.numpy()), float(lam[-1] - lam[0]) / 6, rtol=1e-9)  # a shift keeps equal steps
    for grid in ("karras", partial(karras, rho=3.0), flow_shift):
        is_a_grid(flow_shift(VP(), 9, grid=grid), 9)
    inner = make_grid("quadratic", EDM(), 5, EDM().T, 1.0)
    moved = flow_shift(EDM(), 5, None, 80.0 * 2.0 * (1 / 80) / (1 + 1 / 80), shift=2.0, grid="quadratic").numpy()
    u = inner.numpy() / 80.0
    np.testing.assert_allclose(moved, 80.0 * 2.0 * u / (1.0 + u), rtol=1e-12)


# --- integer steps ----------------------------------------------------------------------------------------------------


def diffusers_steps(kind, n, spacing, **options):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, kind)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing=spacing, **options
    )
    scheduler.set_timesteps(n)
    return scheduler


def sigmas_of(path):
    return rho(path, path.time_of(torch.arange(len(path.betas), dtype=torch.float64)))


@pytest.mark.parametrize("n", [2, 3, 7, 10, 30, 50, 100, 333, 999])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_spacings_are_diffusers(spacing, n):
    theirs = diffusers_steps("DDIMScheduler", n, spacing, clip_sample=False).timesteps.numpy().astype(float)
    ours = entries(SD, make_grid(spacing, SD, n, None, 0.0)[:-1])
    np.testing.assert_allclose(ours[1:], theirs[1:], atol=1e-9)
    if spacing == "leading":
        start = entries(SD, leading(SD, n, None, 0.0, published=True)[:1])
        np.testing.assert_allclose([ours[0], *start], [999, theirs[0]], atol=1e-9)
    else:
        assert ours[0] == pytest.approx(theirs[0])


@pytest.mark.parametrize("n", [2, 3, 7, 10, 30, 50, 100])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_spacings_that_end_at_the_first_entry_are_those_of_multistep_diffusers(spacing, n):
    scheduler = diffusers_steps("DPMSolverMultistepScheduler", n, spacing, final_sigmas_type="sigma_min")
    ours = make_grid(spacing, SD, n)
    np.testing.assert_allclose(entries(SD, ours)[1:-1], scheduler.timesteps.numpy()[1:].astype(float), atol=1e-9)
    np.testing.assert_allclose(rho(SD, ours)[1:], scheduler.sigmas.numpy()[1:], rtol=1e-4)


def test_released_trailing_has_an_entry_too_many_for_62_numbers_of_steps():
    wrong = [n for n in range(1, 1001) if len(np.arange(1000, 0, -1000 / n)) != n]
    assert (len(wrong), wrong[:6]) == (62, [61, 103, 121, 122, 201, 206])
    released = diffusers_steps("DDIMScheduler", 61, "trailing").timesteps.tolist()
    assert (len(released), released[-2:]) == (62, [15, -1])
    ours = entries(SD, trailing(SD, 61, None, 0.0)[:-1])
    np.testing.assert_allclose(ours, released[:-1], atol=1e-9)
    is_a_grid(trailing(SD, 1000), 1000)


def test_released_leading_and_linspace_at_one_step_and_at_a_thousand():
    assert diffusers_steps("DDIMScheduler", 1, "linspace").timesteps.tolist() == [0]  # pure noise as entry 0
    assert diffusers_steps("DDIMScheduler", 1, "leading").timesteps.tolist() == [0]
    assert diffusers_steps("DDIMScheduler", 1000, "leading", steps_offset=1).timesteps[0] == 1000  # beyond the table
    assert set(diffusers_steps("DPMSolverMultistepScheduler", 1000, "leading").timesteps.tolist()) == {0}
    for grid in (linspace, leading, partial(leading, offset=1)):
        np.testing.assert_array_equal(grid(SD, 1, None, 0.0).numpy(), [1.0, 0.0])
        is_a_grid(grid(SD, 1000), 1000)
    np.testing.assert_allclose(leading(SD, 1, None, 0.0, published=True).numpy(), [0.001, 0.0])
    np.testing.assert_allclose(leading(SD, 4, 0.9, 0.0, published=True)[0], 0.9)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("n", [2, 10, 30])
def test_noise_levels_of_diffusers(option, n):
    theirs = diffusers_steps("EulerDiscreteScheduler", n, "linspace", **{option: True}).sigmas.numpy()
    name = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta_sigma"}[option]
    times = make_grid(name, SD, n, None, 0.0)
    np.testing.assert_allclose(rho(SD, times[:-1]), theirs[:-1], rtol=2e-5)
    assert theirs[-1] == float(times[-1]) == 0.0


def test_beta_on_noise_levels_is_not_beta_on_time_steps():
    """What diffusers and ComfyUI call beta: of ten steps, those above sigma = 1."""
    on_levels, on_steps = (rho(SD, make_grid(name, SD, 10)) for name in ("beta_sigma", "beta"))
    assert (int((on_levels > 1.0).sum()), int((on_steps > 1.0).sum())) == (9, 7)


def comfyui(name, n, sigmas):
    """The entries of ComfyUI's schedulers on a table of increasing ``sigmas``, and the 0 that follows them."""
    size = len(sigmas)
    if name == "simple":
        return [size - (1 + int(x * (size / n))) for x in range(n)]
    if name == "ddim_uniform":
        return list(range(1, size, max(size // n, 1)))[::-1]
    if name == "normal":
        return np.linspace(size - 1, 0, n)
    if name == "sgm_uniform":
        return np.linspace(size - 1, 0, n + 1)[:-1]
    a, b = {"beta": (0.6, 0.6), "beta57": (0.5, 0.7)}[name]
    found = np.rint(scipy.stats.beta.ppf(1 - np.linspace(0, 1, n, endpoint=False), a, b) * (size - 1))
    return [k for i, k in enumerate(found) if i == 0 or k != found[i - 1]]


@pytest.mark.parametrize("name", ["simple", "normal", "sgm_uniform", "beta", "beta57"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 30, 50, 96])
def test_entries_of_comfyui(name, n):
    sigmas = sigmas_of(SD)
    theirs = np.asarray(comfyui(name, n, sigmas), dtype=float)
    np.testing.assert_allclose(entries(SD, make_grid(name, SD, n, None, 0.0)[:-1]), theirs, atol=1e-9)


def test_comfyuis_ddim_uniform_takes_however_many_steps_fit():
    sigmas = sigmas_of(SD)
    assert [len(comfyui("ddim_uniform", n, sigmas)) for n in (1, 2, 10, 30, 60, 300, 600)] == [1, 2, 10, 31, 63, 333, 999]
    for n in (2, 10, 50):  # where they are n, ours but for the start
        ours = entries(SD, make_grid("ddim_uniform", SD, n, None, 0.0)[:-1])
        np.testing.assert_allclose(ours[1:], comfyui("ddim_uniform", n, sigmas)[1:], atol=1e-9)
        assert ours[0] == 999
    ours = entries(SD, make_grid("ddim_uniform", SD, 30, None, 0.0)[:-1])
    np.testing.assert_allclose(ours[1:], comfyui("ddim_uniform", 30, sigmas)[2:], atol=1e-9)


def test_comfyuis_beta_takes_fewer_steps_where_entries_repeat():
    sigmas = sigmas_of(SD)
    fewer = [next(n for n in range(1, 999) if len(comfyui(name, n, sigmas)) < n) for name in ("beta", "beta57")]
    assert fewer == [139, 97]
    times = beta(SD, 139, None, 0.0)
    is_a_grid(times, 139)
    expected = np.rint(scipy.stats.beta.ppf(1 - np.arange(139) / 139, 0.6, 0.6) * 1999)  # of a table with twice the entries
    np.testing.assert_allclose(2000.0 * times[:-1].numpy() - 1.0, expected, atol=1e-9)


@pytest.mark.parametrize("n", [1, 4, 10])
def test_turbo_is_comfyuis_and_far_from_data_after_few_steps(n):
    theirs = (np.arange(1, 11) * 100 - 1)[::-1][:n]
    np.testing.assert_allclose(entries(SD, turbo(SD, n, None, 0.0)[:-1]), theirs, atol=1e-9)


def test_turbo_of_more_than_ten_steps_is_trailing():
    for n in (10, 11, 25):
        assert torch.equal(turbo(SD, n), trailing(SD, n))
    assert not torch.equal(turbo(SD, 9), trailing(SD, 9))


@pytest.mark.parametrize(
    "name", ["trailing", "leading", "linspace", "normal", "simple", "sgm_uniform", "turbo", "beta", "ddim_uniform"]
)
def test_tables_of_other_sizes_and_other_ends(name):
    vp_path, grid = VP(), GRIDS[name]
    same = grid(SD, 20, None, 0.0)
    assert torch.equal(grid(vp_path, 20, None, 0.0), same)  # entry k at (k + 1) / 1000 there too
    np.testing.assert_allclose(grid(EDM(), 20, None, 0.0).numpy(), 80.0 * same.numpy(), rtol=1e-13)
    np.testing.assert_allclose(grid(vp_path, 20, 0.6, 0.0).numpy(), 0.6 * same.numpy(), rtol=1e-13)
    np.testing.assert_allclose(grid(vp_path, 20, 0.6, 0.1).numpy(), 0.1 + 0.5 * same.numpy(), rtol=1e-13)
    small = Tabulated.scaled_linear(50)
    found = entries(small, grid(small, 7, None, 0.0)[:-1])
    np.testing.assert_allclose(entries(SD, grid(vp_path, 7, None, 0.0, table=50)[:-1]) * 0.05 - 0.95, found, atol=1e-9)
    if name not in ("normal", "sgm_uniform"):
        np.testing.assert_allclose(found, found.round(), atol=1e-9)
    is_a_grid(grid(Tabulated((0.1, 0.2)), 30), 30)


# --- fitted -----------------------------------------------------------------------------------------------------------


def exact_error(c, levels=2049, low=-5.0, high=7.0):
    """lambda and E ||D - x_0||^2 of N(0, c^2)."""
    lam = torch.linspace(low, high, levels, dtype=torch.float64)
    square = torch.exp(-2.0 * lam)
    return lam, c * c * square / (c * c + square)


@pytest.mark.parametrize("c", [0.5, 2.0])
def test_on_gaussian_data_the_rescaled_entropic_grid_is_the_gaussian_optimal_one(c):
    errors = []
    for levels in (513, 1025):
        lam, square = exact_error(c, levels)
        grid = FittedGrid(lam, square * torch.exp(lam))
        errors.append(float((grid(EDM(), 10) / gaussian_optimal(EDM(), 10, c=c) - 1.0).abs().max()))
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)  # the only error is that of interpolation


def test_on_gaussian_data_the_entropic_grid_has_its_closed_form():
    """int c^2 / (rho (c^2 + rho^2)) d rho = -log(1 + c^2 / rho^2) / 2."""
    lam, square = exact_error(0.5)
    times = FittedGrid(lam, square * torch.exp(2.0 * lam))(EDM(), 12)
    entropy = torch.log1p(0.25 / times**2)
    np.testing.assert_allclose(np.diff(entropy.numpy()), float(entropy[-1] - entropy[0]) / 12, rtol=1e-4)


class Counted:
    """The exact x0-predicting network of N(0, c^2) on a path, counting its calls."""

    def __init__(self, path, c):
        self.path, self.c, self.calls = path, c, 0

    def __call__(self, x, t):
        self.calls += 1
        k = self.path.knot(float(t[0]))
        return k.alpha * self.c**2 / (k.alpha**2 * self.c**2 + k.sigma**2) * x


@pytest.mark.parametrize("path", [EDM(), VP()])
def test_fitted_grids_from_a_network_and_their_calls(path):
    c, generator = 0.5, torch.Generator().manual_seed(0)
    x0 = c * torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    network = Counted(path, c)
    score = Score(network, path, "x0")
    state = torch.get_rng_state()
    lam, error, nfe, _ = denoising_error(score, x0, levels=30)
    assert (nfe, network.calls) == (30, 30)
    square = torch.exp(-2.0 * lam)
    np.testing.assert_allclose(error.numpy(), (c * c * square / (c * c + square)).numpy(), rtol=0.05)
    np.testing.assert_allclose(denoising_error(score, x0, levels=30, repeats=3)[1].numpy(), error.numpy(), rtol=0.1)
    assert float(lam[0]) == float(path.lam(path.T))
    assert float(lam[-1]) == float(path.lam(path.t_min))

    network.calls = 0
    grid = rescaled_entropic(score, x0, levels=100, repeats=2, seed=3)
    assert (grid.nfe, grid.net_evals, network.calls) == (200, 200, 200)
    np.testing.assert_allclose(rho(path, grid(path, 8)), rho(path, gaussian_optimal(path, 8, c=c)), rtol=0.04)
    np.testing.assert_allclose(
        rho(Linear(), grid(Linear(), 8, 0.98, 0.003)), rho(Linear(), gaussian_optimal(Linear(), 8, 0.98, 0.003)), rtol=0.04
    )
    assert torch.equal(torch.get_rng_state(), state)

    entropy = torch.log1p(c * c * torch.exp(2.0 * path.lam(entropic(score, x0, levels=100)(path, 8))))
    np.testing.assert_allclose(np.diff(entropy.numpy()), float(entropy[-1] - entropy[0]) / 8, rtol=0.04)

    network.calls = 0
    grid = score_optimal(score, x0, levels=60)
    assert grid.nfe == network.calls == 2 * 59
    # E ||d score / d rho||^2 = 4 rho^2 / (c^2 + rho^2)^3; int of rho times its root: 2 (asinh(u) - u / sqrt(1 + u^2))
    u = torch.exp(-path.lam(grid(path, 8))) / c
    done = torch.asinh(u) - u / torch.sqrt(1.0 + u * u)
    np.testing.assert_allclose(np.diff(done.numpy()), float(done[-1] - done[0]) / 8, rtol=0.03)

    out = sample(score, (3, 4), solver="ddim", steps=5, grid=grid, seed=0)
    assert bool(out.x.isfinite().all())
    is_a_grid(grid(path, 6, None, 0.0), 6)


def test_a_fitted_grid_goes_on_beyond_what_was_measured():
    lam = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    flat = FittedGrid(lam, torch.ones(5))
    np.testing.assert_allclose(flat(EDM(), 7).numpy(), make_grid("log_snr", EDM(), 7).numpy(), rtol=1e-12)
    steep = FittedGrid(lam, torch.exp(-lam / 3.0))  # equal steps of rho^(1/3)
    np.testing.assert_allclose(steep(EDM(), 7).numpy(), karras(EDM(), 7, rho=3.0).numpy(), rtol=1e-9)


def xue(inner, first, last):
    """The objective of DM-NonUniform's released code (order 3, errors sigma^2 / alpha), from its three cases of steps."""
    lam = np.concatenate([[first], inner, [last]])
    n, h = len(lam) - 1, np.diff(lam)
    e, alpha, sigma = np.exp(lam), 1 / np.sqrt(1 + np.exp(-2 * lam)), 1 / np.sqrt(1 + np.exp(2 * lam))
    err = sigma**2 / alpha
    h0 = lambda h: np.exp(h) - 1  # noqa: E731
    h1 = lambda h: np.exp(h) * h - h0(h)  # noqa: E731
    h2 = lambda h: np.exp(h) * h * h - 2 * h1(h)  # noqa: E731
    total, c = 0.0, np.zeros(n)
    for s in range(n):
        if s in (0, n - 1):
            total += abs((e[s + 1] - e[s]) * err[s])
            continue
        if s in (1, n - 2):
            i = s - 1
            weights = [-e[s] * h1(h[s]) / h[i], e[s] * (h1(h[s]) + h[i] * h0(h[s])) / h[i]]
        else:
            i, a, b, k = s - 2, h[s - 2], h[s - 1], h[s]
            weights = [
                e[s] * (h2(k) + b * h1(k)) / (a * (a + b)),
                -e[s] * (h2(k) + (a + b) * h1(k)) / (a * b),
                e[s] * (h2(k) + (2 * b + a) * h1(k) + b * (a + b) * h0(k)) / (b * (a + b)),
            ]
        terms = err[i : s + 1] * np.array(weights)
        if s >= 3:
            c[i : s + 1] += terms
        else:
            total += np.sqrt((terms**2).sum())
    return total + np.abs(c).sum()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 9, 15])
def test_the_bound_of_dmn_is_that_of_its_released_code(n):
    normal = np.random.default_rng(n)
    knots = np.sort(normal.uniform(-5.0, 4.6, n + 1)) + 0.3 * np.arange(n + 1)
    assert float(dmn_bound(knots, 3, 2.0)) == pytest.approx(xue(knots[1:-1], knots[0], knots[-1]), rel=1e-7)
    moved = torch.tensor(knots).requires_grad_()
    dmn_bound(moved).backward()
    slopes = scipy.optimize.approx_fprime(knots, lambda k: float(dmn_bound(k)), 1e-7)
    np.testing.assert_allclose(moved.grad.numpy(), slopes, rtol=1e-4, atol=1e-4 * np.abs(slopes).max())


@pytest.mark.parametrize("n", [2, 6])
def test_dmn_finds_at_least_what_its_released_optimiser_finds(n):
    """scipy's trust-constr from equal steps of lambda, as released."""
    path = VP()
    first, last = float(path.lam(1.0)), float(path.lam(1e-3))
    rise = np.zeros((n, n - 1))
    for i in range(n - 1):
        rise[i, i], rise[i + 1, i] = 1.0, -1.0
    bounds = np.zeros(n)
    bounds[0], bounds[-1] = first, -last
    start = np.linspace(first, last, n + 1)[1:-1]
    constraint = scipy.optimize.LinearConstraint(rise, bounds, np.inf)
    theirs = scipy.optimize.minimize(lambda v: xue(v, first, last), start, method="trust-constr", constraints=[constraint])
    times = dmn(path, n, power=2.0)
    is_a_grid(times, n)
    ours = xue(path.lam(times).numpy()[1:-1], first, last)
    assert ours <= theirs.fun * (1.0 + 1e-6)
    assert ours < xue(start, first, last)


def test_dmn_is_a_grid():
    for path, sizes in ((VP(), (1, 2, 5)), (EDM(), (2,)), (Linear(), (2,))):
        for n in sizes:
            times = dmn(path, n, 0.8 * path.T, 0.02 * path.T)
            is_a_grid(times, n)
            assert (float(times[0]), float(times[-1])) == (0.8 * path.T, 0.02 * path.T)
    is_a_grid(make_grid(dmn, VP(), 4, None, 0.0), 4)
    assert float(dmn_bound(VP().lam(dmn(VP(), 10)))) < 18.95  # one descent alone ends at 19.03, scipy's trust-constr at 19.4
    assert not torch.equal(dmn(VP(), 5, order=1), dmn(VP(), 5))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_grid_in_lambda_ends_at_zero_by_one_last_step():
    times = make_grid("log_snr", VP(), 6, None, 0.0)
    assert float(times[-1]) == 0.0
    assert float(times[-2]) == VP().t_min
    np.testing.assert_allclose(times[:-1].numpy(), make_grid("log_snr", VP(), 5).numpy())


def test_infinite_starts_are_refused_with_the_fix():
    with pytest.raises(InputError, match="cosine"):
        make_grid("log_snr", Linear(), 5, 1.0)
    assert float(make_grid("log_snr", Linear(), 5)[0]) == pytest.approx(0.999)
    assert float(make_grid("log_snr", Cosine(), 5)[0]) < 1.0


def test_a_path_that_misses_alpha_0_by_rounding_alone_starts_like_one_that_does_not():
    rounded = FromFunctions(lambda t: torch.cos(0.5 * math.pi * t), lambda t: torch.sin(0.5 * math.pi * t))
    assert 0.0 < float(rounded.alpha(1.0)) < 1e-15
    for name in GRIDS:
        np.testing.assert_allclose(make_grid(name, rounded, 9), make_grid(name, Trigonometric(), 9), rtol=1e-7, atol=1e-9)


def test_a_last_step_to_zero_needs_room():
    with pytest.raises(InputError, match=r"stop=0.*raise stop"):
        make_grid("karras", VP(), 3, 5e-4, 0.0)
    with pytest.raises(InputError, match=r"stop=0.*raise stop"):
        make_grid("log_snr", EDM(T=1.0, t_min=0.0), 3)
    np.testing.assert_array_equal(make_grid("karras", VP(), 1, 5e-4, 0.0), [5e-4, 0.0])  # one step needs none
    two = Tabulated((0.5, 1.0))  # t_min is half of all, and so would be T - t_min T
    np.testing.assert_array_equal(make_grid("log_snr", two, 1), [0.75, 0.5])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((0,), "steps must be >= 1"), ((2.5,), "int"), ((True,), "int"), ((3, 0.1, 0.5), "above"), ((3, 2.0), "domain")],
)
@pytest.mark.parametrize("name", GRIDS)
def test_wrong_arguments(name, arguments, match):
    with pytest.raises(InputError, match=match):
        make_grid(name, VP(), *arguments)


X0 = torch.zeros(4, 2)
SCORE = Score(lambda x, t: x, VP(), "eps")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: karras(VP(), 3, rho=0.0), r"rho=0.0: .*> 0.*7"),
        (lambda: poly_exponential(VP(), 3, rho=-1.0), r"rho=-1.0: .*> 0"),
        (lambda: gaussian_optimal(VP(), 3, c=0.0), r"c=0.0: .*0\.5"),
        (lambda: gaussian_optimal(VP(), 3, c=math.inf), r"c=inf"),
        (lambda: vp(VP(), 3, beta_min=0.0), r"beta_min=0.0: .*0\.1"),
        (lambda: vp(VP(), 3, beta_max=0.01), r"beta_max=0.01: .*beta_min=0\.1"),
        (lambda: laplace(VP(), 3, scale=0.0), r"scale=0.0: .*> 0"),
        (lambda: probit(VP(), 3, mu=math.nan), r"mu=nan: .*finite"),
        (lambda: beta(VP(), 3, alpha=0.1), r"alpha=0.1: .*\[0.2, 20\].*0\.6"),
        (lambda: beta_sigma(VP(), 3, beta=21.0), r"beta=21.0: .*\[0.2, 20\]"),
        (lambda: linear_quadratic(VP(), 3, threshold=0.5), r"threshold=0.5: .*0\.025"),
        (lambda: bong_tangent(VP(), 3, pivot=1.0), r"pivot=1.0: .*0\.6"),
        (lambda: bong_tangent(VP(), 3, slope=0.0), r"slope=0.0: .*0\.2"),
        (lambda: bong_tangent(VP(), 3, middle=1.0), r"middle=1.0: .*0\.5"),
        (lambda: hyper(VP(), 3, scale=0.0), r"scale=0.0: .*2"),
        (lambda: flow_shift(VP(), 3, shift=0.0), r"shift=0.0: .*SD3 uses 3"),
        (lambda: flow_shift(VP(), 3, grid="karas"), r"karas.*karras"),
        (lambda: trailing(VP(), 3, table=0), r"table=0: .*1000"),
        (lambda: leading(VP(), 3, offset=-1), r"offset=-1: .*0, or 1"),
        (lambda: from_sigmas([1.0]), r"levels=.*at least 2"),
        (lambda: from_sigmas([1.0, 0.0]), r"levels\[1\]=0: .*stop=0\.0"),
        (lambda: from_sigmas([2.0, 1.0, 1.0]), r"levels\[2\]=1 after levels\[1\]=1"),
        (lambda: make_grid("ays_sd15", VE(0.01, 0.02), 3), r"does not reach"),
        (lambda: make_grid("ays_sd15", Linear(), 3, 1.0), r"start=1"),
        (lambda: dmn(VP(), 3, order=4), r"order=4: .*1, 2 or 3"),
        (lambda: dmn(VP(), 3, power=math.nan), r"power=nan"),
        (lambda: FittedGrid(torch.zeros(1), torch.zeros(1)), r"M >= 2"),
        (lambda: FittedGrid(torch.tensor([1.0, 0.0]), torch.ones(2)), r"rise strictly"),
        (lambda: FittedGrid(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])), r"density\[1\]=0"),
        (lambda: entropic(lambda x, t: x, X0), r"score is a function"),
        (lambda: entropic(SCORE, torch.zeros(3)), r"x0.*\(B, \*event\)"),
        (lambda: entropic(SCORE, X0, levels=2), r"levels=2"),
        (lambda: score_optimal(SCORE, X0, repeats=0), r"repeats=0"),
        (lambda: entropic(SCORE, X0, stop=0.0), r"stop=0\.0.*infinite"),
        (lambda: entropic(Score(lambda x, t: x / 0.0, VP(), "eps"), X0), r"not finite at t=1"),
    ],
)
def test_wrong_parameters_are_named_with_the_fix(call, match):
    with pytest.raises(InputError, match=match):
        call()


def test_times_too_close_for_float64_are_refused_not_repeated():
    with pytest.raises(InputError, match=r"steps=1000: times \d+ and \d+.*fewer steps"):
        make_grid("uniform", VP(), 1000, 0.5, math.nextafter(0.5, 0.0))


def test_unknown_names_get_the_nearest():
    with pytest.raises(InputError, match="karras"):
        make_grid("karas", VP(), 3)
