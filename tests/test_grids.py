"""Grids against their published formulas and tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sde import EDM, VP, Cosine, Linear
from sde.errors import InputError
from solvers import GRIDS
from solvers.grids import AYS_TABLES, make_grid
from solvers.testing import paths


def rho(path, times):
    return torch.exp(-path.lam(times))


@pytest.mark.parametrize("n", [1, 5, 18])
def test_karras_is_the_published_formula(n):
    i = np.arange(n + 1)
    expected = (80 ** (1 / 7) + i / n * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(make_grid("karras", EDM(), n).numpy(), expected, rtol=1e-12)


def test_log_snr_has_equal_steps_in_lambda_and_quadratic_in_the_root():
    path = VP()
    lam = path.lam(make_grid("log_snr", path, 12))
    np.testing.assert_allclose(np.diff(lam.numpy()), float(lam[-1] - lam[0]) / 12, rtol=1e-9)
    root = make_grid("quadratic", path, 12).sqrt()
    np.testing.assert_allclose(np.diff(root.numpy()), float(root[-1] - root[0]) / 12, rtol=1e-9)


def test_cosine_has_equal_angles_and_reaches_both_ends():
    times = make_grid("cosine", Linear(), 9, 1.0, 0.0)
    angle = torch.atan2(Linear().sigma(times), Linear().alpha(times))
    np.testing.assert_allclose(angle.numpy(), np.linspace(math.pi / 2, 0.0, 10), atol=1e-12)
    assert times[0] == 1.0
    assert times[-1] == 0.0


@pytest.mark.parametrize("name", AYS_TABLES)
def test_align_your_steps_tables_come_back_at_ten_steps(name):
    path = EDM(T=1000.0)
    np.testing.assert_allclose(make_grid(name, path, 10).numpy(), AYS_TABLES[name], rtol=1e-12)
    np.testing.assert_allclose(make_grid(name, path, 20)[::2].numpy(), AYS_TABLES[name], rtol=1e-12)
    middle = make_grid(name, path, 20)[1]
    assert float(middle) == pytest.approx(math.sqrt(AYS_TABLES[name][0] * AYS_TABLES[name][1]))


def test_align_your_steps_keeps_its_levels_on_another_path():
    np.testing.assert_allclose(rho(VP(), make_grid("ays_sd15", VP(), 10)).numpy(), AYS_TABLES["ays_sd15"], rtol=1e-9)


@given(paths(), st.sampled_from(sorted(GRIDS)), st.integers(1, 40))
@settings(max_examples=120)
def test_every_grid_on_every_path_is_strict_and_in_the_domain(path, name, n):
    if name in AYS_TABLES and float(path.lam(path.T)) >= -math.log(AYS_TABLES[name][-1]):
        with pytest.raises(InputError, match="does not reach"):
            make_grid(name, path, n)
        return
    times = make_grid(name, path, n)
    assert times.dtype == torch.float64
    assert len(times) == n + 1
    assert bool((times[1:] < times[:-1]).all())
    assert float(times[-1]) >= 0.0
    assert float(times[0]) <= path.T


@given(
    paths(),
    st.sampled_from(sorted(set(GRIDS) - set(AYS_TABLES))),
    st.integers(1, 30),
    st.floats(0.5, 0.95),
    st.floats(0.05, 0.4),
)
@settings(max_examples=80)
def test_ends_are_exact(path, name, n, high, low):
    start, stop = high * path.T, low * path.T
    times = make_grid(name, path, n, start, stop)
    assert float(times[0]) == start
    assert float(times[-1]) == stop


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


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((0,), "steps must be >= 1"), ((2.5,), "int"), ((True,), "int"), ((3, 0.1, 0.5), "above"), ((3, 2.0), "domain")],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(InputError, match=match):
        make_grid("uniform", VP(), *arguments)


def test_unknown_names_get_the_nearest():
    with pytest.raises(InputError, match="karras"):
        make_grid("karas", VP(), 3)
