"""Runge-Kutta tableaux and the variables they are applied in, against independent tables, exact flows, torchdiffeq and hand
formulas.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.integrate import RK23, RK45
from scipy.integrate._ivp import dop853_coefficients as dop853

from benchmarks.truth import Mixture1D
from scores import Gaussian, Score
from sde import EDM, VP, Cosine, Linear
from sde.errors import InputError, PathError
from solvers import SOLVERS, encode, integrate, sample, tableaux, trace
from solvers.runge_kutta import VARIABLES, RungeKutta
from solvers.tableaux import Tableau, fixed_point, residuals, rooted_trees
from solvers.testing import paths

ALL = {name: t for name, t in vars(tableaux).items() if isinstance(t, Tableau)}
EXPLICIT = {name: t for name, t in ALL.items() if t.explicit}
START = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def network(x, t):
    return torch.sin(1.3 * x) + 0.4 * x * torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)


# --- the conditions ---------------------------------------------------------------------------------------------------


def test_rooted_trees_are_counted_as_known():
    """1, 1, 2, 4, 9, ... (OEIS A000081), and the densities gamma of the smaller ones as tabulated by Butcher."""
    trees = rooted_trees(9)
    assert [1, *(len(t.gamma) for t in trees)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]
    assert [sorted(t.gamma.tolist()) for t in trees[:4]] == [
        [2],
        [3, 6],
        [4, 8, 12, 24],
        [5, 10, 15, 20, 20, 30, 40, 60, 120],
    ]


def of_scipy(name, order, a, b, c):
    n = len(b)
    return Tableau(name, order, tuple(c[:n]), tuple(tuple(a[i][:i]) for i in range(n)), tuple(b))


def test_tables_of_scipy_are_accepted_and_ours_are_the_same():
    """RK23 and RK45 hold our Bogacki-Shampine and Dormand-Prince without the stage that is for the embedded solution;
    DOP853 has order 8 by our trees, and not 9.
    """
    for theirs, ours, order in ((RK23, tableaux.BOSH3, 3), (RK45, tableaux.DOPRI5, 5)):
        table = of_scipy("scipy", order, theirs.A, theirs.B, theirs.C)
        n = table.stages
        assert ours.stages == n == len(ours.b) - 1
        assert np.allclose(ours.matrix[:n, :n], table.matrix, rtol=1e-15, atol=0)
        assert np.allclose(ours.b[:n], table.b, rtol=1e-15, atol=0)
        assert np.allclose(np.array(ours.low) - ours.b, np.sign(ours.low[-1] * theirs.E[-1]) * theirs.E, rtol=0, atol=1e-15)
    a, b, c = dop853.A[:12, :12], dop853.B, dop853.C[:12]
    assert of_scipy("dop853", 8, a, b, c).order == 8
    with pytest.raises(InputError, match="order 8 too: declare that"):
        of_scipy("dop853", 7, a, b, c)
    with pytest.raises(InputError, match="conditions of order 9"):
        of_scipy("dop853", 9, a, b, c)


def test_the_embedded_weights_of_tsitouras_have_their_sign():
    """No order condition sees the sign of b - low; the last embedded weight is 1/66 in the paper, where b has 0."""
    assert tableaux.TSIT5.b[6] == 0.0
    assert abs(tableaux.TSIT5.low[6] - 1 / 66) < 1e-16


def test_table_of_torchdiffeq_dopri8_is_accepted():
    module = pytest.importorskip("torchdiffeq._impl.dopri8")
    table = module._DOPRI8_TABLEAU
    a = [(), *(tuple(row.tolist()) for row in table.beta)]
    b = tuple(table.c_sol.tolist())
    assert Tableau("dopri8", 8, (0.0, *table.alpha.tolist()), tuple(a), b).stages == 13


@pytest.mark.parametrize("name", ALL)
def test_no_coefficient_can_be_mistyped(name):
    """Any entry of a (with its node), b or low off by 1e-6 is refused. A change that keeps the row sums of a method of order
    two is no misprint that its order knows of: see the round trips for those.
    """
    t = ALL[name]
    n = len(t.c)

    def bump(values, i):
        return tuple(v + (1e-6 if k == i else 0.0) for k, v in enumerate(values))

    for i in range(n):
        with pytest.raises(InputError):
            replace(t, b=bump(t.b, i))
        with pytest.raises(InputError):
            replace(t, c=bump(t.c, i))
        for j in range(len(t.a[i])):
            a = tuple(bump(row, j) if k == i else row for k, row in enumerate(t.a))
            with pytest.raises(InputError):
                replace(t, a=a)
            if t.order > 1 and i < t.stages and (t.order > 2 or t.b[i] != 0.0):
                with pytest.raises(InputError):
                    replace(t, a=a, c=bump(t.c, i))
        if t.low:
            with pytest.raises(InputError):
                replace(t, low=bump(t.low, i))


@pytest.mark.parametrize("name", ALL)
def test_declared_order_is_neither_more_nor_less(name):
    t = ALL[name]
    with pytest.raises(InputError, match=f"conditions of order {t.order + 1}"):
        replace(t, order=t.order + 1)
    with pytest.raises(InputError, match="must be >= 1" if t.order == 1 else f"order {t.order} too: declare that"):
        replace(t, order=t.order - 1)
    if t.low:
        assert t.embedded == Tableau(f"{t.name}_low", t.low_order, t.c, t.a, t.low, t.source)
        with pytest.raises(InputError, match="low"):
            replace(t, low_order=t.low_order + 1)
    else:
        with pytest.raises(InputError, match="no embedded solution"):
            t.embedded  # noqa: B018


def hopf(t, y):
    """r' = r (1 - r^2), angle' = r^2 + cos(t), in the complex plane."""
    r2 = np.abs(y) ** 2
    return (1.0 - r2 + 1j * (r2 + math.cos(t))) * y


RADII = np.linspace(0.2, 1.2, 11)


def hopf_exact(t):
    grown = RADII**2 * math.exp(2 * t) + 1.0 - RADII**2
    return RADII * math.exp(t) / np.sqrt(grown) * np.exp(1j * (0.5 * np.log(grown) + math.sin(t)))


def textbook(t, y, start, h):
    """One step in numpy that knows nothing of trees."""
    slopes: list[np.ndarray] = []
    for c, row in zip(t.c, t.a, strict=True):
        slopes.append(hopf(start + c * h, y + h * sum(w * s for w, s in zip(row, slopes, strict=True))))
    return y + h * sum(w * s for w, s in zip(t.b, slopes, strict=True))


@pytest.mark.parametrize("name", [*EXPLICIT, *(f"{n}.low" for n, t in EXPLICIT.items() if t.low)])
def test_order_on_a_plane_system_with_a_closed_solution(name):
    """At least the declared order (that it is no more is the trees' word: small leading terms show late here)."""
    t = EXPLICIT[name] if name in EXPLICIT else EXPLICIT[name.removesuffix(".low")].embedded
    n = {5: 160, 8: 20}.get(t.order, 80)
    errors = []
    for steps in (n, 2 * n):
        y, h = RADII + 0j, 2.0 / steps
        for k in range(steps):
            y = textbook(t, y, k * h, h)
        errors.append(float(np.linalg.norm(y - hopf_exact(2.0))))
    assert errors[1] < 0.1
    assert math.log2(errors[0] / errors[1]) > t.order - 0.15, errors


# --- the variables ----------------------------------------------------------------------------------------------------


def velocity(k, x, predict):
    p = predict(x, k)
    return k.dalpha * p.x0 + k.dsigma * p.eps


TIMES = [0.9, 0.7, 0.45, 0.2, 0.08]


@pytest.mark.parametrize("path", [VP(), Linear(), Cosine(), EDM(T=1.0, t_min=0.01)], ids=["VP", "Linear", "Cosine", "EDM"])
def test_two_stage_methods_by_hand(path):
    """Midpoint and Heun in every variable, written out."""
    score = Score(network, path, "x0")

    def p(x, k):
        return score.predict(x, k.t)

    def rho(k):
        return k.sigma / k.alpha

    def heun_t(x, s, t):
        h, v = t.t - s.t, velocity(s, x, p)
        return x + 0.5 * h * (v + velocity(t, x + h * v, p))

    def midpoint_rho(x, s, t):
        m = path.knot_at(-math.log(0.5 * (rho(s) + rho(t))))
        half = x / s.alpha + (rho(m) - rho(s)) * p(x, s).eps
        return t.alpha * (x / s.alpha + (rho(t) - rho(s)) * p(m.alpha * half, m).eps)

    def heun_chi(x, s, t):
        h = 1.0 / rho(t) - 1.0 / rho(s)
        first = p(x, s).x0
        second = p(t.sigma * (x / s.sigma + h * first), t).x0
        return t.sigma * (x / s.sigma + 0.5 * h * (first + second))

    def midpoint_chi(x, s, t):
        m = path.knot_at(math.log(0.5 * (1.0 / rho(t) + 1.0 / rho(s))))
        half = m.sigma * (x / s.sigma + (1.0 / rho(m) - 1.0 / rho(s)) * p(x, s).x0)
        return t.sigma * (x / s.sigma + (1.0 / rho(t) - 1.0 / rho(s)) * p(half, m).x0)

    def lawson_midpoint_x0(x, s, t):
        """x_t = e^{log sigma} (x_s / sigma_s + h e^{lam_m} x0(m)), the stage by half a step."""
        h = t.lam - s.lam
        m = path.knot_at(s.lam + 0.5 * h)
        stage = m.sigma / s.sigma * x + 0.5 * h * m.sigma * s.alpha / s.sigma * p(x, s).x0
        return t.sigma / s.sigma * x + h * t.sigma * m.alpha / m.sigma * p(stage, m).x0

    def lawson_heun_eps(x, s, t):
        h = t.lam - s.lam
        first = p(x, s).eps
        stage = t.alpha / s.alpha * x - h * t.alpha * s.sigma / s.alpha * first
        return t.alpha / s.alpha * x - 0.5 * h * (t.alpha * s.sigma / s.alpha * first + t.sigma * p(stage, t).eps)

    hands = [
        (tableaux.HEUN, "t", heun_t),
        (tableaux.MIDPOINT, "rho", midpoint_rho),
        (tableaux.HEUN, "chi", heun_chi),
        (tableaux.MIDPOINT, "chi", midpoint_chi),
        (tableaux.MIDPOINT, "lawson_x0", lawson_midpoint_x0),
        (tableaux.HEUN, "lawson_eps", lawson_heun_eps),
    ]
    for tableau, variable, hand in hands:
        x = START
        knots = path.knots(TIMES)
        for s, t in itertools.pairwise(knots):
            x = hand(x, s, t)
        ours = integrate(RungeKutta(tableau, variable), score, START, TIMES).x
        assert torch.allclose(ours, x, rtol=1e-11, atol=1e-11), (tableau.name, variable)


@pytest.mark.parametrize(
    ("method", "name"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun2", "heun"), ("heun3", "heun3"), ("rk4", "rk38")]
)
def test_parity_with_torchdiffeq_on_the_same_velocity(method, name):
    """Its "rk4" is the 3/8 rule."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    times = torch.tensor([1.0, 0.85, 0.6, 0.42, 0.2, 0.0], dtype=torch.float64)
    theirs = torchdiffeq.odeint(lambda t, x: network(x, t), START, times, method=method)[-1]
    ours = integrate(name, Score(network, Linear(), "velocity"), START, times).x
    assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-13)
    others = {"rk4": "rk4", "heun3": "kutta3", "heun2": "midpoint", "midpoint": "heun", "euler": "heun"}[method]
    assert float((integrate(others, Score(network, Linear(), "velocity"), START, times).x - theirs).abs().max()) > 1e-6


@settings(max_examples=25)
@given(path=paths(), name=st.sampled_from(sorted(EXPLICIT)), low=st.floats(-2.0, 0.0), high=st.floats(0.2, 2.5))
def test_constant_targets_are_integrated_exactly_by_every_tableau(path, name, low, high):
    """Constant eps in rho, x0 in chi, velocity in t; Lawson's forms are exact on none."""
    ends = path.knots([path.T, 0.0])
    assume(ends[0].lam < low - 0.1 and ends[1].lam > high + 0.1)
    s, t = path.knots(path.time(torch.tensor([low, high], dtype=torch.float64)))
    assume(math.isfinite(s.dalpha) and math.isfinite(t.dalpha) and math.isfinite(s.dsigma) and math.isfinite(t.dsigma))
    value = torch.full((1, 2), 0.7, dtype=torch.float64)
    x = torch.tensor([[0.3, -1.1]], dtype=torch.float64)
    exact = {
        "eps": (t.alpha / s.alpha) * (x - s.sigma * value) + t.sigma * value,
        "x0": (t.sigma / s.sigma) * (x - s.alpha * value) + t.alpha * value,
        "velocity": x + (t.t - s.t) * value,
    }
    for variable, v in VARIABLES.items():
        solver = RungeKutta(EXPLICIT[name], variable)
        assert solver.target == v.target == {"t": "velocity", "rho": "eps", "chi": "x0"}.get(variable)
        assert solver.invariant == (variable != "t")
        target = v.target or ("x0" if variable == "lawson_x0" else "eps")
        out = integrate(solver, Score(lambda x, t: value.expand_as(x), path, predicts=target), x, [s.t, t.t]).x
        error = float((out - exact[target]).abs().max())
        size = max(1.0, *(float(e.abs().max()) for e in exact.values()), t.sigma / s.sigma, t.alpha / s.alpha)
        if v.target:
            assert error < 1e-10 * size * max(1.0, max(abs(w) for row in EXPLICIT[name].a for w in (*row, 1.0))), variable
        elif name == "EULER":
            assert error > 1e-6 * (high - low), variable


class Watched(VP):
    """VP that counts the calls of ``knots``."""

    made = 0

    def knots(self, times, *, grid=False):
        Watched.made += 1
        return super().knots(times, grid=grid)


@pytest.mark.parametrize("variable", VARIABLES)
def test_stage_knots_are_made_in_one_call_a_step_and_are_those_of_single_calls(variable):
    path, v, nodes = Watched(), VARIABLES[variable], tableaux.BUTCHER6.c
    s, t = path.knots(path.time(torch.tensor([-1.0, 0.7], dtype=torch.float64)))
    Watched.made = 0
    plan = trace(RungeKutta(tableaux.BUTCHER6, variable), path, [s.t, 0.5 * (s.t + t.t), t.t])
    assert Watched.made == 1 + 2  # the grid's and those of two steps
    middle = plan.grid[1]
    for i, (c, found) in enumerate(zip(nodes, plan.knots, strict=False)):
        u = v.clock(plan.grid[0]) + c * (v.clock(middle) - v.clock(plan.grid[0]))
        one = path.knot(u) if v.lam is None else path.knot_at(v.lam(u))
        assert found == (plan.grid[0] if c == 0.0 else middle if c == 1.0 else one), i


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", [v for v in VARIABLES if v != "t"])
@pytest.mark.parametrize("name", ["EULER", "MIDPOINT", "HEUN3", "RK4", "COOPER_VERNER8"])
def test_a_step_to_sigma_zero_is_finite_and_of_the_declared_rule(variable, name):
    """Where the clock, or a stage at t, is out of reach the step is one call that gives x0; else (rho, no stage at t) a full
    one.
    """
    solver = RungeKutta(EXPLICIT[name], variable)
    for path, times in ((VP(), [0.5, 0.2, 0.0]), (Linear(), [0.9, 0.0])):
        score = Score(network, path, "x0")
        plan = trace(solver, path, times)
        full = variable == "rho" and name in ("EULER", "MIDPOINT", "HEUN3")
        assert plan.nfe == solver.stages * (len(times) - 2) + (solver.stages if full else 1)
        assert solver.end_rule == ("as any step" if full else "order 1 at sigma = 0")
        out = plan.run(score, START)
        assert out.isfinite().all()
        if not full:
            before = trace(solver, path, times[:-1]).run(score, START) if len(times) > 2 else START
            assert torch.allclose(out, score.predict(before, times[-2]).x0, rtol=1e-12, atol=1e-12)


def test_starts_at_alpha_zero_are_exact_or_refused():
    path, score = Linear(), Score(network, Linear(), "x0")
    for variable in VARIABLES:
        solver = RungeKutta(tableaux.RK4, variable)
        if variable in ("rho", "lawson_eps"):
            with pytest.raises(PathError, match=r"alpha\(1\) = 0"):
                trace(solver, path, [1.0, 0.5])
            with pytest.raises(PathError, match=r"alpha\(1\) = 0"):
                trace(solver, path, [0.5, 1.0])
            continue
        out = integrate(solver, score, START, [1.0, 0.6, 0.2]).x
        assert out.isfinite().all()
        if variable == "lawson_x0":  # one DDIM step, then Lawson's
            first = 0.6 * START + 0.4 * score.predict(START, 1.0).x0
            assert torch.allclose(out, integrate(solver, score, first, [0.6, 0.2]).x, rtol=1e-12, atol=1e-12)
        if variable != "t":  # a stage at alpha = 0 says nothing of x0 to an eps network, so the last step is Euler's in chi
            eps = Score(network, path, "eps")
            before = integrate(solver, eps, START, [0.2, 0.6]).x
            back = integrate(solver, eps, START, [0.2, 0.6, 1.0]).x
            exact = before / 0.6 - (0.4 / 0.6) * eps.predict(before, 0.6).x0
            assert torch.allclose(back, exact, rtol=1e-12, atol=1e-12)
    chi = integrate(RungeKutta(tableaux.HEUN, "chi"), score, START, [1.0, 0.5]).x
    a = score.predict(START, 1.0).x0
    b = score.predict(0.5 * (START + a), 0.5).x0
    assert torch.allclose(chi, 0.5 * (START + 0.5 * (a + b)), rtol=1e-13, atol=1e-13)


def test_starts_at_sigma_zero_are_refused_where_they_have_no_limit():
    for variable in ("chi", "lawson_x0"):
        with pytest.raises(PathError, match=r"sigma\(0\) = 0.*t_min"):
            trace(RungeKutta(tableaux.RK4, variable), Linear(), [0.0, 0.5])
    with pytest.raises(PathError, match="slope of x in t is infinite at t = 0"):
        trace(RungeKutta(tableaux.RK4), VP(), [0.0, 0.5])
    eps = Score(network, VP(), "eps")
    out = integrate(RungeKutta(tableaux.EULER, "lawson_eps"), eps, START, [0.0, 0.5]).x
    k = VP().knot(0.5)
    assert torch.allclose(out, k.alpha * START + k.sigma * network(START, 0.0), rtol=1e-12, atol=1e-12)
    last = trace(RungeKutta(tableaux.HEUN), VP(), [0.5, 0.0])  # sigma'(0) is infinite: Euler
    assert last.nfe == 1
    assert trace(RungeKutta(tableaux.HEUN), Linear(), [0.5, 0.0]).nfe == 2


def test_a_budget_below_a_step_takes_the_first_order_step_of_the_same_scale():
    kept = {"t": "t", "rho": "rho", "chi": "chi", "lawson_x0": "chi", "lawson_eps": "rho"}
    for variable, whole in kept.items():
        assert RungeKutta(tableaux.RK4, variable).reduced == RungeKutta(tableaux.EULER, whole)


# --- implicit methods by sweeps ---------------------------------------------------------------------------------------

IMPLICIT = {name: t for name, t in ALL.items() if not t.explicit}
SYMMETRIC = ["IMPLICIT_MIDPOINT", "TRAPEZOID", "GAUSS4", "GAUSS6"]


@pytest.mark.parametrize("name", IMPLICIT)
def test_sweeps_raise_the_order_by_one_each(name):
    t = IMPLICIT[name]
    explicit_rows = sum(not any(row) for row in t.a)
    for sweeps in range(1, 8):
        swept = fixed_point(t, sweeps)
        assert swept.explicit
        assert swept.order == min(t.order, sweeps + 1)
        assert swept.stages == 1 + sweeps * (len(t.c) - explicit_rows)
        *_, last = residuals(swept.matrix, np.array(swept.b), swept.order + 1)
        assert last > 1e-3


@pytest.mark.parametrize("name", IMPLICIT)
def test_sweeps_converge_to_the_implicit_step(name):
    """Gaussian data in rho, y' = a(rho) y + f(rho): the implicit stages solved as a linear system in numpy."""
    t, path = IMPLICIT[name], EDM()
    mean, variance = 0.7, 0.3
    score = Gaussian(path, torch.tensor([mean], dtype=torch.float64), var=variance)
    y, times = 1.9, [1.0, 0.7, 0.5]
    for s, end in itertools.pairwise(times):
        h = end - s
        rho = s + h * np.array(t.c)
        slope = rho / (rho**2 + variance)  # eps = rho (y - mean) / (rho^2 + variance)
        k = np.linalg.solve(np.eye(len(rho)) - h * slope[:, None] * t.matrix, slope * (y - mean))
        y = y + h * float(np.dot(t.b, k))
    start = torch.tensor([[1.9]], dtype=torch.float64)
    found = [float(integrate(RungeKutta(fixed_point(t, m), "rho"), score, start, times).x) for m in (2, 25)]
    assert abs(found[1] - y) < 1e-12 < abs(found[0] - y)


@pytest.mark.parametrize("variable", ["t", "rho", "chi"])
@pytest.mark.parametrize("name", IMPLICIT)
def test_symmetric_methods_are_reversed_by_their_own_steps(name, variable):
    """Encode, then decode on the same grid, with thirty sweeps: to 1e-9; Radau IIA is not symmetric and comes back only to its
    order.
    """
    path = VP()
    mixture = Mixture1D(path)
    grid = path.time(torch.linspace(1.5, -1.0, 9, dtype=torch.float64)).tolist()
    x = torch.linspace(-1.2, 1.4, 4, dtype=torch.float64)[:, None]
    solver = RungeKutta(fixed_point(IMPLICIT[name], 30), variable)
    latent = integrate(solver, mixture.score, x, grid).x
    back = integrate(solver, mixture.score, latent, grid[::-1]).x
    error = float((back - x).abs().max())
    assert error < 1e-9 if name in SYMMETRIC else error > 1e-7, error


def test_round_trip_by_encode_and_sample():
    path = EDM(T=10.0, t_min=0.05)
    gaussian = Gaussian(path, torch.tensor([0.4, -0.2], dtype=torch.float64), std=0.6)
    data = gaussian.sample(5, path.t_min, 0, dtype=torch.float64)
    for name in SYMMETRIC:
        solver = RungeKutta(fixed_point(ALL[name], 40), "rho")
        latent = encode(gaussian, data, solver=solver, steps=20)
        assert float((sample(gaussian, x=latent.x, solver=solver, steps=20).x - data).abs().max()) < 1e-9


@pytest.mark.parametrize(("name", "order"), [("EES25", 5), ("EES27", 7), ("HEUN3", 3), ("RK4", 5)])
def test_order_of_the_round_trip(name, order):
    """EES(2,5) and EES(2,7), of order two, come back as methods of order five and seven do. An order p method comes back at
    order p if p is odd, p + 1 if even.
    """
    t = EXPLICIT[name]
    errors = []
    for n in (40, 80) if order == 7 else (80, 160):
        y, h = RADII + 0j, 2.0 / n
        for k in range(n):
            y = textbook(t, y, k * h, h)
        for k in range(n, 0, -1):
            y = textbook(t, y, k * h, -h)
        errors.append(float(np.linalg.norm(y - RADII)))
    assert errors[1] > 1e-14
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.25, errors


# --- arguments --------------------------------------------------------------------------------------------------------


def test_bad_tableaux_and_variables_are_refused():
    half = ((), (0.5,))
    for bad, match in [
        (lambda: Tableau("x", 1, (), (), ()), "length 0 > 0"),
        (lambda: Tableau("x", 2, (0.0, 0.5), ((), (0.5, 0.0)), (0.0, 1.0)), "strictly lower triangular"),
        (lambda: Tableau("x", 2, (0.0, 0.5), half, (1.0,)), "b and c of length 2"),
        (lambda: Tableau("x", 2, (0.0, 0.4), half, (0.0, 1.0)), "sum to c"),
        (lambda: Tableau("x", 2, (0.0, math.nan), half, (0.0, 1.0)), "sum to c"),
        (lambda: Tableau("x", 2, (0.0, 0.5), half, (0.0, math.nan)), "order 2"),
        (lambda: Tableau("x", 2, (0.0, 0.5), half, (0.0, 1.0), low=(1.0, 0.0)), "low_order together"),
        (lambda: Tableau("x", 2, (0.0, 0.5), half, (0.0, 1.0), low_order=1), "low_order together"),
        (lambda: Tableau("x", 2, (0.0, 0.5), half, (0.0, 1.0), low=(1.0,), low_order=1), "low, of length 2"),
        (lambda: fixed_point(tableaux.GAUSS4, 0), "sweeps=0"),
        (lambda: RungeKutta(tableaux.GAUSS4), r"'gauss4' is implicit: give fixed_point\(GAUSS4"),
        (lambda: RungeKutta(tableaux.RK4, "lambda"), "variable='lambda'"),
    ]:
        with pytest.raises(InputError, match=match):
            bad()


def test_rows_of_the_catalogue_say_which_are_embedded_pairs():
    rows = {n: (e, e.solver.tableau) for n, e in SOLVERS.items() if isinstance(e.solver, RungeKutta)}
    pairs = {n for n, (entry, _) in rows.items() if "pair" in entry.summary}
    assert pairs >= {"rk_bosh3", "rk_fehlberg5", "rk_cash_karp5", "chi_dopri5", "chi_tsit5", "ssprk43", "chi_heun"}
    for name in pairs:
        entry, t = rows[name]
        assert f"pair {t.order}({t.low_order})" in entry.summary
        assert t.low
        assert entry.reference == t.source
