"""Adapters of other libraries' networks against closed forms, through networks that speak each library's convention."""

from __future__ import annotations

import pytest
import torch
from fake_backbones import EVENT, FAMILIES, D, Law
from hypothesis import given, settings
from hypothesis import strategies as st

from scores import Gaussian
from sde.prediction import Tally
from solvers import sample

seeds = st.integers(0, 2**31 - 1)
shares = st.floats(0.0, 1.0)


def time_of(family, u):
    if family.whole:
        return family.whole[round(u * (len(family.whole) - 1))]
    return family.low + u * (family.high - family.low)


def tolerance(family, dtype):
    return 1e-5 if dtype is torch.float32 or family.single else 2e-12


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12)
@given(seed=seeds, u=shares, batch=st.sampled_from([1, 3]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_adapter_gives_the_closed_form(name, seed, u, batch, dtype):
    family, law = FAMILIES[name], Law(seed)
    score, t = family.score(law), time_of(FAMILIES[name], u)
    a, s = (float(v) for v in family.levels(torch.tensor(t, dtype=torch.float64)))
    # the path is the family's
    assert abs(float(score.path.alpha(t)) - a) <= 1e-12 * a
    assert abs(float(score.path.sigma(t)) - s) <= 1e-11 * s
    x = law.draw(batch, a, s, dtype)
    x0, eps = law.posterior(x, a, s)
    # An output knows x0 to its own rounding times sigma/alpha, or eps to its own times alpha/sigma: errors are relative to x.
    tol = tolerance(family, dtype) * float(x.abs().max())
    pair = score.predict(x, t)
    assert pair.x0.dtype is pair.eps.dtype is dtype
    assert float((pair.x0 - x0).abs().max()) <= tol / a
    assert float((pair.eps - eps).abs().max()) <= tol / s
    assert float((score(x, t) + eps / s).abs().max()) <= tol / s**2
    # the same as solvers call it, and one time a sample
    knot = score.path.knot(t)
    y = score.at([knot], x, {}, Tally())[0](x)
    row = score.row(knot)
    assert float((y - row.a * x0 - row.b * eps).abs().max()) <= tol * (abs(row.a) / a + abs(row.b) / s)
    each = score.each([knot] * batch, x, {}, Tally())(x)
    assert float((each - y).abs().max()) <= 1e-6 * float(y.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_with_different_times_get_their_own(name):
    family, law = FAMILIES[name], Law(3)
    score = family.score(law)
    times = [time_of(family, u) for u in (0.2, 0.5, 0.9)]
    x = torch.cat([law.draw(1, *(float(v) for v in family.levels(torch.tensor(t).double())), torch.float64) for t in times])
    pair = score.predict(x, torch.tensor(times, dtype=torch.float64))
    for i, t in enumerate(times):
        a, s = (float(v) for v in family.levels(torch.tensor(t, dtype=torch.float64)))
        x0, eps = law.posterior(x[i : i + 1], a, s)
        tol = tolerance(family, torch.float64) * float(x[i].abs().max())
        assert float((pair.x0[i] - x0[0]).abs().max()) <= tol / a
        assert float((pair.eps[i] - eps[0]).abs().max()) <= tol / s


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if not f.whole])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "ddpm"])
def test_every_sampler_runs_on_it(name, solver):
    """The whole loop is that of the exact score on the same path: one-step, multistep, two-stage, stochastic."""
    family, law = FAMILIES[name], Law(11)
    score = family.score(law)
    exact = Gaussian(score.path, law.mean.reshape(EVENT), law.cov.reshape(D, D))
    start, stop = family.high, max(family.low, 0.02 * family.high)
    x = law.draw(2, *(float(v) for v in family.levels(torch.tensor(start, dtype=torch.float64))), torch.float64)
    runs = [sample(s, x=x, solver=solver, nfe=6, grid="uniform", start=start, stop=stop, seed=5) for s in (score, exact)]
    assert runs[0].nfe == runs[1].nfe == 6
    error = float((runs[0].x - runs[1].x).abs().max()) / float(runs[1].x.abs().max())
    assert error <= (1e-5 if family.single else 1e-9)
