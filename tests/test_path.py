"""Noise paths against autograd, 50-digit closed forms, the moment equations and their own inverses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from sde import EDM, VE, VP, Cosine, FromCoefficients, FromFunctions, Linear, Path, SubVP, Tabulated, Trigonometric
from sde.errors import InputError, PathError, PrecisionWarning
from solvers.testing import paths, times

METHODS = ("alpha", "sigma", "lam", "f", "g", "g2", "dalpha", "dsigma", "dlam")


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def interior(path: Path, near_end: float = 1e-5) -> Tensor:
    """Times from 1e-6 T to (1 - near_end) T, dense towards both ends, off the entries of any table."""
    low = torch.logspace(-6, math.log10(0.503), 25, dtype=torch.float64)
    high = 1.0 - torch.logspace(math.log10(near_end), math.log10(0.501), 25, dtype=torch.float64)
    return torch.cat([low, high]) * path.T


def autograd(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    u = t.clone().requires_grad_()
    y = fn(u)
    return torch.autograd.grad(y.sum(), u)[0] if y.requires_grad else torch.zeros_like(t)


def close(got: Tensor, want: Tensor, scale: Tensor, tol: float) -> None:
    worst = ((got - want).abs() / scale).max()
    assert worst <= tol, f"worst relative difference {float(worst):.2e}"


BUILT_IN = [
    VP(),
    VP(2.0, 2.0),
    SubVP(),
    Cosine(),
    Trigonometric(),
    VE(),
    EDM(),
    Linear(),
    Tabulated.linear(),
    Tabulated.scaled_linear(zero_terminal_snr=True),
    Tabulated.squared_cosine(50),
]
named = pytest.mark.parametrize("path", BUILT_IN, ids=str)


# The promise: every quantity agrees with autograd and with each other, for every path.


@settings(max_examples=120)
@given(paths())
def test_slopes_coefficients_and_inverse_agree(path: Path) -> None:
    t = interior(path)
    alpha, sigma, f, g2 = path.alpha(t), path.sigma(t), path.f(t), path.g2(t)
    dalpha, dvariance = autograd(path.alpha, t), autograd(lambda u: path.sigma(u) ** 2, t)
    close(path.dalpha(t), dalpha, dalpha.abs() + alpha, 1e-10)
    dsigma = 0.5 * dvariance / sigma
    close(path.dsigma(t), dsigma, dsigma.abs() + f.abs() * sigma, 1e-10)
    # alpha' = f alpha and (sigma^2)' = 2 f sigma^2 + g^2
    close(f * alpha, dalpha, dalpha.abs() + alpha, 1e-10)
    close(2 * f * sigma**2 + g2, dvariance, dvariance.abs() + 2 * f.abs() * sigma**2 + g2, 1e-10)
    close(path.g(t) ** 2, g2, g2, 1e-14)
    close(path.dlam(t), -0.5 * g2 / sigma**2, 0.5 * g2 / sigma**2 + f.abs(), 1e-10)
    lam = path.lam(t)
    assert torch.equal(lam, torch.log(alpha) - torch.log(sigma))
    assert (path.lam(path.time(lam)) - lam).abs().max() <= 1e-9
    assert (lam.sort(descending=True).indices == t.sort().indices).all()


@settings(max_examples=60)
@given(paths())
def test_ends(path: Path) -> None:
    ends = f64(0.0, path.T)
    for name in METHODS:
        value = getattr(path, name)(ends)
        assert not value.isnan().any(), f"{name} = {value}"
    assert torch.equal(path.time(f64(math.inf, -math.inf)), ends)
    assert torch.equal(path.time(path.lam(ends)), ends) or (path.time(path.lam(ends)) - ends).abs().max() < 1e-12 * path.T
    assert (path.alpha(ends) >= 0).all()
    assert (path.sigma(ends) >= 0).all()
    assert path.alpha(0.0) == pytest.approx(1.0, abs=1e-14) or isinstance(path, FromFunctions)
    # g^2 is continuous at t = 0: where it has settled, it is there what it tends to.
    far, near, at = (float(path.g2(t * path.T)) for t in (1e-6, 1e-9, 0.0))
    assert abs(near / far - 1) > 1e-3 or at == pytest.approx(near, rel=1e-5)
    assert math.isnan(float(path.time(math.nan)))


def moment_forms() -> dict[str, tuple[Path, Callable[[Any], Any], Callable[[Any], Any]]]:
    half_pi = mp.pi / 2

    def vp(t: Any) -> Any:
        return mp.exp(-(mp.mpf("0.1") * t + mp.mpf("19.9") * t * t / 2) / 2)

    def cosine(t: Any) -> Any:
        s = mp.mpf(0.008)
        return mp.cos(half_pi * (t + s) / (1 + s)) / mp.cos(half_pi * s / (1 + s))

    return {
        "VP": (VP(), vp, lambda t: mp.sqrt(1 - vp(t) ** 2)),
        "SubVP": (SubVP(), vp, lambda t: 1 - vp(t) ** 2),
        "Cosine": (Cosine(), cosine, lambda t: mp.sqrt(1 - cosine(t) ** 2)),
        "Trigonometric": (Trigonometric(), lambda t: mp.cos(half_pi * t), lambda t: mp.sin(half_pi * t)),
        "VE": (VE(), lambda t: mp.mpf(1), lambda t: mp.mpf("0.01") * mp.mpf(5000) ** t),
        "EDM": (EDM(T=1.0), lambda t: mp.mpf(1), lambda t: t),
        "Linear": (Linear(), lambda t: 1 - t, lambda t: t),
    }


@pytest.mark.parametrize("name", sorted(moment_forms()))
def test_values_to_fifty_digits(name: str) -> None:
    """Closed forms as the papers write them, in 50 digits, so that no cancellation hides: every value to 1e-12."""
    path, alpha, sigma = moment_forms()[name]
    with mp.workdps(50):
        for t in (1e-9, 1e-5, 0.003, 0.2, 0.5, 0.77, 0.999, 1 - 1e-7):
            u = mp.mpf(t)
            a, s = alpha(u), sigma(u)
            da, ds = mp.diff(alpha, u, h=mp.mpf(10) ** -22), mp.diff(sigma, u, h=mp.mpf(10) ** -22)
            truth = {
                "alpha": a,
                "sigma": s,
                "lam": mp.log(a / s),
                "dalpha": da,
                "dsigma": ds,
                "f": da / a,
                "g2": 2 * s * ds - 2 * da / a * s * s,
                "dlam": da / a - ds / s,
            }
            for quantity, want in truth.items():
                got = float(getattr(path, quantity)(t))
                slack = (
                    1e-12 * abs(want) + mp.mpf(1e-15) + (mp.mpf(1e-16) / (1 - u)) * abs(want)
                )  # 1 - t is known to an ulp of 1
                assert abs(mp.mpf(got) - want) <= slack, f"{name}.{quantity}({t}) = {got}, not {mp.nstr(want, 17)}"


def test_limits_at_the_ends_by_hand() -> None:
    inf = math.inf
    table = {
        (VP(), "g2", 0): 0.1,
        (VP(), "dsigma", 0): inf,
        (VP(), "f", 1): -10.0,
        (VP(), "g2", 1): 20.0,
        (SubVP(), "g2", 0): 0.0,
        (SubVP(), "dsigma", 0): 0.1,
        (Cosine(), "alpha", 1): 0.0,
        (Cosine(), "g2", 1): inf,
        (Cosine(), "g2", 0): 2 * (math.pi / 2 / 1.008) * math.tan(math.pi / 2 * 0.008 / 1.008),
        (Trigonometric(), "alpha", 1): 0.0,
        (Trigonometric(), "dsigma", 1): 0.0,
        (Trigonometric(), "dsigma", 0): math.pi / 2,
        (Trigonometric(), "g2", 0): 0.0,
        (Linear(), "f", 1): -inf,
        (Linear(), "dlam", 0): -inf,
        (Linear(), "dlam", 1): -inf,
        (VE(), "sigma", 0): 0.01,
        (VE(), "sigma", 1): 50.0,
        (EDM(), "lam", 0): inf,
        (Tabulated.linear(zero_terminal_snr=True), "alpha", 1): 0.0,
        (Tabulated.linear(zero_terminal_snr=True), "lam", 1): -inf,
        (Tabulated.linear(), "g2", 0): -1000 * math.log1p(-1e-4),
    }
    for (path, name, end), want in table.items():
        assert float(getattr(path, name)(float(end))) == pytest.approx(want, rel=1e-12), (path, name, end)


@named
def test_arguments_are_left_alone_and_shapes_kept(path: Path) -> None:
    rng = torch.get_rng_state()
    for dtype in (torch.float64, torch.float32):
        t = torch.linspace(0.1, 0.9, 6, dtype=dtype).reshape(2, 3) * path.T
        before = t.clone()
        for name in METHODS:
            value = getattr(path, name)(t)
            assert value.shape == t.shape
            assert value.dtype == dtype
            value.zero_()
            assert torch.equal(t, before), f"{name} gives out its argument"
        path.time(path.lam(t)).zero_()
        assert torch.equal(t, before)
    assert path.alpha(0.5).dtype == torch.float64
    assert path.sigma(torch.tensor(1)).dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), rng)


@settings(max_examples=40)
@given(paths())
def test_gradients_flow(path: Path) -> None:
    t = f64(0.3031, 0.6017) * path.T
    for name in ("alpha", "sigma", "lam"):
        slope = autograd(getattr(path, name), t)
        want = getattr(path, f"d{name}")(t)
        assert torch.allclose(slope, want, rtol=1e-9, atol=1e-12)
    lam = path.lam(t)
    assert torch.allclose(autograd(path.time, lam), 1.0 / path.dlam(t), rtol=1e-8)


@named
def test_frozen_equal_hashable_short(path: Path) -> None:
    for twin in (copy.deepcopy(path), dataclasses.replace(path)):  # type: ignore[type-var]
        assert twin == path
        assert hash(twin) == hash(path)
    assert len(repr(path)) < 80
    with pytest.raises(AttributeError):
        path.T = 2.0  # type: ignore[misc]


@named
def test_half_precision_times_warn(path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        t = torch.tensor([0.25, 0.5], dtype=dtype)
        with pytest.warns(PrecisionWarning, match="float32 or float64"):
            value = path.sigma(t)
        assert value.dtype == torch.float32
        assert torch.equal(value, path.sigma(t.double()).float())
    with pytest.warns(PrecisionWarning):
        path.knots(torch.tensor([0.5, 0.25], dtype=torch.float16))


def test_knots() -> None:
    path = VP()
    first, last = path.knots([1.0, 0.5], grid=True)
    assert (first.index, first.count, last.index) == (0, 1, 1)
    assert path.knot(0.5)[:7] == last[:7]
    assert path.knot(0.5).index == -1
    assert path.knot_at(path.knot(0.5).lam).t == pytest.approx(0.5, rel=1e-14)
    assert path.prior_std() == 1.0
    assert VE().prior_std() == pytest.approx(50.0)
    for bad in ([1.5, 0.5], [-0.1], [math.nan]):
        with pytest.raises(InputError, match=r"outside the domain \[0, 1\]"):
            path.knots(bad)
    with pytest.raises(InputError, match="1-D"):
        path.knots(torch.ones(2, 2))


@settings(max_examples=30)
@given(paths(user_made=False).flatmap(lambda path: times(path, 7)))
def test_drawn_grids_decrease(grid: list[float]) -> None:
    assert len(grid) == 8
    assert all(a > b for a, b in itertools.pairwise(grid))


# Tables


def test_tables_known_from_the_literature() -> None:
    ddpm, sd = Tabulated.linear(), Tabulated.scaled_linear()
    assert float(ddpm.alphas_cumprod[-1]) == pytest.approx(4.0358e-5, rel=1e-4)  # Ho et al. 2020
    assert float(sd.alphas_cumprod[-1]) == pytest.approx(0.0046600, rel=1e-4)  # Stable Diffusion
    assert float(sd.alphas_cumprod[0]) == pytest.approx(0.99915, rel=1e-9)
    cosine = Tabulated.squared_cosine(1000)
    assert cosine.betas[-1] == 0.999
    assert cosine.betas[0] == pytest.approx(4.1284e-5, rel=1e-3)


@pytest.mark.parametrize("path", [Tabulated.linear(), Tabulated.scaled_linear(), Tabulated.squared_cosine(100)], ids=str)
def test_table_is_exact_at_entries_and_log_linear_between(path: Tabulated) -> None:
    n = len(path.betas)
    k = np.arange(n)
    table = np.cumprod(1 - np.array(path.betas))
    t = path.time_of(torch.arange(n))
    assert np.allclose(path.alpha(t).numpy() ** 2, table, rtol=1e-12, atol=0)
    assert np.allclose(path.alphas_cumprod.numpy(), table, rtol=1e-12, atol=0)
    assert np.allclose(path.sigma(t).numpy() ** 2 + table, 1.0, atol=1e-14)
    assert torch.allclose(path.index(t), torch.arange(n, dtype=torch.float64), atol=1e-12)
    assert t[0] == 1 / n == path.t_min
    assert t[-1] == 1.0
    u = np.linspace(0.0, 1.0, 777)
    want = np.interp(u, np.concatenate([[0.0], (k + 1) / n]), np.concatenate([[0.0], 0.5 * np.log(table)]))
    assert np.allclose(np.log(path.alpha(torch.from_numpy(u)).numpy()), want, rtol=0, atol=1e-12)
    # at an entry g^2 is that of the interval above, whatever way the entry's time rounds
    above = path.g2(t[:-1] + 0.4 / n)
    assert torch.equal(path.g2(t[:-1]), above)


def test_zero_terminal_snr_is_the_published_rescaling() -> None:
    plain = Tabulated.scaled_linear(1000)
    path = Tabulated.scaled_linear(1000, zero_terminal_snr=True)
    root = np.sqrt(np.cumprod(1 - np.array(plain.betas)))
    first, last = root[0], root[-1]
    want = (root - last) * first / (first - last)
    assert path.alphas_cumprod[-1] == 0.0
    assert path.betas[-1] == 1.0
    assert path.zero_terminal_snr
    assert np.allclose(np.sqrt(path.alphas_cumprod.numpy()), want, rtol=1e-10, atol=0)
    assert float(path.alphas_cumprod[0]) == pytest.approx(float(plain.alphas_cumprod[0]), rel=1e-14)
    assert path == Tabulated(path.betas)
    # the last interval: alpha is linear down to exactly 0
    a = float(path.alpha(0.999))
    assert torch.allclose(path.alpha(f64(0.9992, 0.99975, 1.0)), f64(0.8 * a, 0.25 * a, 0.0), rtol=1e-9, atol=0)
    assert path.alpha(1.0) == 0.0
    assert path.sigma(1.0) == 1.0


def test_from_alphas_cumprod_round_trip() -> None:
    for path in (Tabulated.linear(), Tabulated.squared_cosine(40), Tabulated.linear(zero_terminal_snr=True)):
        again = Tabulated.from_alphas_cumprod(path.alphas_cumprod)
        assert torch.allclose(again.alphas_cumprod, path.alphas_cumprod, rtol=1e-12, atol=0)
        assert again.zero_terminal_snr == path.zero_terminal_snr
    rescaled = Tabulated.from_alphas_cumprod(Tabulated.linear().alphas_cumprod, zero_terminal_snr=True)
    want = Tabulated.linear(zero_terminal_snr=True).alphas_cumprod
    assert torch.allclose(rescaled.alphas_cumprod, want, rtol=1e-9, atol=0)


# Paths made of functions


def test_from_functions_is_the_built_in_path() -> None:
    for base in (VP(), SubVP(), Trigonometric(), Linear(), VE(), Cosine()):
        path = FromFunctions(base.alpha, base.sigma)
        t = interior(base)
        for name in METHODS:
            got, want = getattr(path, name)(t), getattr(base, name)(t)
            close(got, want, want.abs() + 1e-9 * base.alpha(t), 1e-9)
        assert float(path.g2(0.0)) == pytest.approx(float(base.g2(0.0)), rel=1e-9, abs=1e-9)
        assert (path.time(path.lam(t)) - t).abs().div(t).max() <= 1e-12 or isinstance(base, VE)
        assert path.time(path.lam(t)).sub(t).abs().max() <= 1e-12


def test_from_functions_with_naive_formulas() -> None:
    """What people write: cancellation in sigma near 0 does not spoil g^2(0), and sigma'(0) is infinite."""
    base = VP()
    path = FromFunctions(base.alpha, lambda t: torch.sqrt(1 - base.alpha(t) ** 2))
    assert float(path.g2(0.0)) == pytest.approx(0.1, rel=1e-9)
    assert float(path.dsigma(0.0)) == math.inf
    assert float(path.f(0.0)) == pytest.approx(-0.05)
    path = FromFunctions(lambda t: torch.cos(t * math.pi / 2), lambda t: torch.sin(t * math.pi / 2))
    assert float(path.dsigma(0.0)) == pytest.approx(math.pi / 2)


def test_from_functions_inverse_at_tiny_times() -> None:
    path = FromFunctions(lambda t: 1 - t, lambda t: t.clone())
    t = torch.logspace(-25, -0.01, 60, dtype=torch.float64)
    assert (path.time(path.lam(t)) / t - 1).abs().max() <= 1e-12


def test_from_functions_given_slopes() -> None:
    def opaque(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: fn(t).detach()

    base = Linear()
    slopes = {"dalpha": base.dalpha, "dsigma": base.dsigma}
    path = FromFunctions(opaque(base.alpha), opaque(base.sigma), **slopes)
    t = interior(path)
    assert torch.allclose(path.g2(t), base.g2(t), rtol=1e-12)
    with pytest.raises(PathError, match="give dalpha, dsigma"):
        FromFunctions(opaque(base.alpha), base.sigma)
    with pytest.raises(PathError, match="give dalpha, dsigma"):
        FromFunctions(lambda t: torch.as_tensor(1 - t.numpy()), base.sigma)
    with pytest.raises(PathError, match=r"dsigma\(.*\) = -1, but sigma changes at the rate 1: correct it"):
        FromFunctions(base.alpha, base.sigma, dsigma=lambda t: -torch.ones_like(t))


def test_from_functions_under_inference_mode() -> None:
    path = FromFunctions(VP().alpha, VP().sigma)
    want = path.knot(0.5)
    with torch.inference_mode():
        assert path.knot(0.5) == want
        assert FromFunctions(VP().alpha, VP().sigma).knot(0.5) == want
    with torch.no_grad():
        assert path.knot(0.5) == want
        assert float(path.time(want.lam)) == pytest.approx(0.5, rel=1e-13)


def _mutates(t: Tensor) -> Tensor:
    return t.mul_(0.5)


BAD_FUNCTIONS: list[tuple[Callable[[Tensor], Any], Callable[[Tensor], Any], str]] = [
    (lambda t: 1 - t, lambda t: t - 0.31, r"sigma\(.*\) = -0.3.*must be positive"),  # B20
    (lambda t: 0.5 - t, lambda t: t, r"alpha\(0.50.*\) = -0.00.*must be positive"),
    (lambda t: 1 - t, lambda t: 0.1 + (t - 0.3) ** 2, r"does not decrease between t = 0.* and t = 0"),  # B23
    (lambda t: t, lambda t: 1 - t, "t = 0 is data"),
    (lambda t: 1 - t, lambda t: torch.where(t > 0.5, math.nan, t), r"sigma\(0.50.*\) = nan"),  # B24
    (lambda t: 1 - t, lambda t: torch.ones(3, dtype=torch.float64), r"returned shape \(3,\)"),
    (lambda t: 1.0, lambda t: t, "alpha.* returned a float"),
    (lambda t: 1 - t, lambda t: t.long(), "returned torch.int64"),
    (lambda t: 1 - t, lambda t: t.float(), "returned torch.float32"),
    (lambda t: 1 - t, _mutates, "writes to its argument"),
    (lambda t: 1 - t, lambda t: math.sin(t), "raised .*; use torch functions"),
    (lambda t: 1 - t, 3.0, "must be a function"),  # type: ignore[list-item]
    (lambda t: -torch.ones_like(t), lambda t: t.clone(), "alpha.* = -1"),
]


@pytest.mark.parametrize(("alpha", "sigma", "message"), BAD_FUNCTIONS)
def test_bad_functions(alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        FromFunctions(alpha, sigma)
    assert isinstance(caught.value, PathError) or not callable(sigma)


def test_a_path_written_by_hand_is_checked_at_its_knots() -> None:
    class Broken(Linear):
        def _sigma(self, t: Tensor) -> Tensor:
            return t - 0.5

    with pytest.raises(PathError, match=r"sigma\(0.25\) = -0.25"):
        Broken().knots([1.0, 0.25])


# Paths made of coefficients


ROUND_TRIPS = [
    (VP(), 1.0, 0.0),
    (VP(3.0, 3.0), 1.0, 0.0),
    (SubVP(), 1.0, 0.0),
    (VE(), 1.0, 0.01),
    (EDM(), 80.0, 0.0),
    (Cosine(), 0.99, 0.0),
    (Linear(), 0.999, 0.0),
    (Trigonometric(), 0.9, 0.0),
]


@pytest.mark.parametrize(("base", "T", "sigma0"), ROUND_TRIPS, ids=lambda v: str(v))
def test_from_coefficients_round_trip(base: Path, T: float, sigma0: float) -> None:
    path = FromCoefficients(base.f, base.g, T=T, sigma0=sigma0)
    t = torch.cat([torch.logspace(-9, 0, 80, dtype=torch.float64), torch.linspace(0, 1, 53, dtype=torch.float64)[1:]]) * T
    assert path.error <= 1e-11
    for name in ("alpha", "sigma", "f", "g2"):
        got, want = getattr(path, name)(t), getattr(base, name)(t)
        assert (got / want - 1).nan_to_num(0.0).abs().max() <= 1e-10, name
    lam = base.lam(t[t < 0.999 * T])
    assert (path.lam(path.time(lam)) - lam).abs().max() <= 1e-9
    for name in METHODS:
        assert float(getattr(path, name)(0.0)) == pytest.approx(float(getattr(base, name)(0.0)), rel=1e-6, abs=1e-9), name


def test_from_coefficients_estimates_its_error() -> None:
    """A kink at an odd place cannot be resolved by polynomials: the estimate sees it, and is about right."""
    rough = FromCoefficients(lambda t: -torch.sqrt((t - 0.3).abs()), lambda t: 1 + t)
    log_alpha = -2 / 3 * (0.3**1.5 + 0.7**1.5)
    actual = abs(float(torch.log(rough.alpha(1.0))) / log_alpha - 1)
    assert actual <= 1e-9
    assert 1e-16 < rough.error < 1e-8


BAD_COEFFICIENTS: list[tuple[Callable[[], Path], str]] = [
    (lambda: FromCoefficients(Linear().f, Linear().g), r"f\(1\) = -inf.*smaller T"),
    (lambda: FromCoefficients(lambda t: 0 * t, lambda t: 0 * t), r"sigma\(.*\) = 0"),
    (lambda: FromCoefficients(lambda t: -t, lambda t: (t - 0.5).clamp(min=0.0), sigma0=0.1), "does not decrease between"),
    (lambda: FromCoefficients(lambda t: 0.0, lambda t: t), "f.* returned a float"),
    (lambda: FromCoefficients(VP().f, VP().g, sigma0=-1.0), "sigma0 = -1.0"),
    (lambda: FromCoefficients(VP().f, VP().g, T=0.0), "T = 0.0"),
]


@pytest.mark.parametrize(("make", "message"), BAD_COEFFICIENTS)
def test_bad_coefficients(make: Callable[[], Path], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


BAD_CONSTANTS: list[tuple[Callable[[], Path], str]] = [
    (lambda: VP(0.0), "beta_min = 0.0: must be positive"),
    (lambda: VP(-0.1), "beta_min = -0.1"),
    (lambda: VP(math.nan), "beta_min = nan"),
    (lambda: VP(1.0, 0.5), "beta_max = 0.5: must be finite and at least beta_min = 1.0"),
    (lambda: VP(1.0, math.inf), "beta_max = inf"),
    (lambda: SubVP(0.0), "beta_min = 0.0"),
    (lambda: Cosine(0.0), "s = 0.0: .*Trigonometric"),
    (lambda: VE(0.0), "sigma_min = 0.0"),
    (lambda: VE(1.0, 1.0), "sigma_max = 1.0: must be finite and above sigma_min"),
    (lambda: EDM(T=0.0), "T = 0.0: .*positive"),
    (lambda: EDM(T=math.inf), "T = inf"),
    (lambda: EDM(t_min=80.0), r"t_min = 80.0: must be in \[0, T\)"),
    (lambda: EDM(t_min=-1.0), "t_min = -1.0"),
    (lambda: FromFunctions(lambda t: 1 - t, lambda t: t, t_min=2.0), "t_min = 2.0"),
    (lambda: Tabulated((0.1, 0.0)), r"betas\[1\] = 0"),
    (lambda: Tabulated((0.1, 1.0, 0.1)), r"betas\[1\] = 1: .*only the last may be 1"),
    (lambda: Tabulated((0.1, 1.1)), r"betas\[1\] = 1.1"),
    (lambda: Tabulated((0.1, math.nan)), r"betas\[1\] = nan"),
    (lambda: Tabulated((0.1,)), "at least 2"),
    (lambda: Tabulated((0.99999,) * 1000), "underflows"),
    (lambda: Tabulated.linear(1), "n = 1"),
    (lambda: Tabulated.scaled_linear(10, -1.0), "beta_start = -1.0"),
    (lambda: Tabulated.squared_cosine(10, 2.0), "max_beta = 2.0"),
    (lambda: Tabulated.from_alphas_cumprod([0.9, 0.95]), r"alphas_cumprod\[1\] = 0.95 after 0.9"),
    (lambda: Tabulated.from_alphas_cumprod([1.0, 0.5]), r"alphas_cumprod\[0\] = 1 after 1"),
]


@pytest.mark.parametrize(("make", "message"), BAD_CONSTANTS)
def test_bad_constants(make: Callable[[], Path], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_half_precision_table_warns() -> None:
    with pytest.warns(PrecisionWarning):
        Tabulated(torch.tensor([0.1, 0.2], dtype=torch.float16))  # type: ignore[arg-type]
