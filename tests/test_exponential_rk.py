"""Exponential Runge-Kutta methods against mpmath, closed forms, transcribed papers and installed diffusers."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from benchmarks import orders
from scores import Gaussian
from sde import EDM, VP, Cosine, Linear
from sde.errors import BudgetWarning, InputError, PathError
from sde.prediction import Prediction
from solvers import SOLVERS, exact_law, integrate, sample, trace
from solvers import exponential_tableaux as erk
from solvers.convergence import convergence
from solvers.exact import flow_error
from solvers.exponential import Multistep
from solvers.exponential_rk import ExponentialRK, PublishedSDE, SinglestepSchedule, path_normals
from solvers.exponential_tableaux import ExponentialTableau, Weight, p
from solvers.formula import phi
from solvers.plan import Form
from solvers.testing import paths

mp: Any = mpmath

TABLEAUX = (
    erk.EXPONENTIAL_EULER,
    erk.two_stage(0.5),
    erk.two_stage(1.0),
    erk.two_stage(0.3, exact=False),
    erk.three_stage(),
    erk.three_stage(exact=True),
    erk.three_stage(0.25, 0.8),
    erk.refined(),
    erk.refined(0.9, 0.4),
    erk.ETD3RK,
    erk.ETD4RK,
    erk.KROGSTAD,
    erk.STREHMEL_WEINER,
    erk.FRIEDLI,
    erk.HOCHBRUCK_OSTERMANN,
    erk.GENERALISED_LAWSON4,
)
named = pytest.mark.parametrize("tableau", TABLEAUX, ids=lambda t: t.name)
both = pytest.mark.parametrize("target", ["x0", "eps"])


def solver_of(name: str) -> Any:
    return SOLVERS[name].solver


ROWS = [n for n, e in SOLVERS.items() if isinstance(e.solver, (ExponentialRK, SinglestepSchedule, PublishedSDE))]


def toy(x: Any, lam: float) -> Any:
    """An eps-network, smooth and not linear, of a number, an array or a tensor, in float64 or mpmath."""
    if isinstance(x, mp.mpf):
        return mp.sin(x + mp.mpf(lam)) + x / 3
    return (torch.sin if isinstance(x, torch.Tensor) else np.sin)(x + lam) + x / 3


@dataclass
class Toy:
    """A problem made of a function eps(x, lambda)."""

    path: Any
    level: float = 0.0
    eps: Any = toy
    calls: int = 0

    def eta(self, knot):
        return self.level

    def keep(self, x):
        return x

    def predict(self, x, k):
        self.calls += 1
        e = self.eps(x, k.lam)
        return Prediction((x - k.sigma * e) / k.alpha, e)


def no_noise(s, t):
    raise AssertionError("no noise at eta = 0")


def knots(path, *lams):
    return [path.knot_at(lam) for lam in lams]


# --- phi and the weights ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(k=st.integers(0, 4), z=st.floats(-30.0, 30.0))
def test_phi_is_its_integral(k, z):
    with mp.workdps(40):
        if k == 0:
            exact = mp.exp(mp.mpf(z))
        else:
            exact = mp.quad(lambda v: mp.exp((1 - v) * mp.mpf(z)) * v ** (k - 1) / mp.factorial(k - 1), [0, 0.5, 1])
    assert abs(phi(k, z) - float(exact)) <= 2e-13 * abs(float(exact))


@given(k=st.integers(0, 4), c=st.floats(0.0, 1.0), z=st.floats(-1.5, 1.5))
def test_the_series_of_a_weight_sums_to_it(k, c, z):
    weight = 2.0 * p(k, c) - p(1)
    total = math.fsum(weight.series(m) * z**m for m in range(40))
    assert abs(total - weight(z)) <= 1e-14 * (1.0 + abs(total))


@given(z=st.floats(-4.0, 4.0))
def test_products_of_the_papers_are_the_sums_written_here(z):
    """Cox and Matthews's a_41 = phi_1(z/2) (e^{z/2} - 1)/2; DPM-Solver-3's ((e^{c z} - 1)/(c z) - 1) = c z phi_2(c z)."""
    assert erk.ETD4RK.a[3][0](z) == pytest.approx(0.5 * phi(1, z / 2) * math.expm1(z / 2), abs=1e-14)
    if abs(z) > 0.1:
        a32 = z * erk.three_stage().a[2][1](z)
        assert a32 == pytest.approx(2.0 * (math.expm1(2 / 3 * z) / (2 / 3 * z) - 1.0), rel=1e-11)


# --- conditions ---------------------------------------------------------------------------------------------------------


def most(conditions, tableau):
    """The largest order (up to 5, stiff 4) whose conditions hold."""
    top = 5 if conditions is erk.order_conditions else 4
    return max(q for q in range(top + 1) if max(map(abs, conditions(tableau, q)), default=0.0) < 1e-11)


@named
def test_claimed_orders_are_the_highest(tableau):
    assert most(erk.order_conditions, tableau) == tableau.order
    assert most(erk.stiff_conditions, tableau) == tableau.stiff


def test_the_trees_are_counted():
    """Rooted trees with g of any arity and A of one child: by hand 1, 2 (g[g], g[A u]) and 7."""
    assert [len(erk.trees(n)) for n in (1, 2, 3)] == [1, 2, 7]
    # without nodes A, the rooted trees: 1, 1, 2, 4, 9
    plain = lambda tree: all(m == 0 and plain(child) for m, child in tree)  # noqa: E731
    assert [sum(map(plain, erk.trees(n))) for n in range(1, 6)] == [1, 1, 2, 4, 9]


def test_conditions_at_z_0_are_not_enough():
    """Weights of RK4 with b frozen at z = 0 but for the row sum keep the classical conditions and lose the order."""
    half = 0.5 * p(1, 0.5)
    rk4 = ((), (half,), (erk.ZERO, half), (p(1) - p(1, 0.5), erk.ZERO, p(1, 0.5)))
    b = (1 / 6 * p(1), 1 / 3 * p(1), 1 / 3 * p(1), 1 / 6 * p(1))
    tableau = ExponentialTableau("phi_1 throughout", 2, 2, (0.0, 0.5, 0.5, 1.0), rk4, b)
    assert most(erk.order_conditions, tableau) == 2
    with pytest.raises(InputError, match="conditions of order 4"):
        replace(tableau, order=4)


def test_a_misread_convention_lowers_the_order():
    """phi_2(c z) read for c^2 phi_2(c z) (both are written phi_{2,i}), and a node of 1/3 for 1/2: order 2, as measured."""
    half = 0.5 * p(1, 0.5)
    last = (p(1) - 3 * p(2) + 4 * p(3), erk.ZERO, 4 * p(2) - 8 * p(3), 4 * p(3) - p(2))
    with pytest.raises(InputError, match="conditions of order 4"):
        replace(
            erk.STREHMEL_WEINER,
            a=((), (half,), (half - 2 * p(2, 0.5), 2 * p(2, 0.5)), (p(1) - 2 * p(2), -2 * p(2), 4 * p(2))),
            b=last,
        )
    eight_ninths = lambda c2, order: ExponentialTableau(  # noqa: E731
        "sunstar",
        order,
        2,
        (0.0, c2, 2 / 3),
        ((), (c2 * p(1, c2),), (2 / 3 * p(1, 2 / 3) - 8 / 9 * p(2, 2 / 3), 8 / 9 * p(2, 2 / 3))),
        (p(1) - 1.5 * p(2), erk.ZERO, 1.5 * p(2)),
    )
    assert most(erk.order_conditions, eight_ninths(1 / 3, 2)) == 2
    assert most(erk.order_conditions, eight_ninths(1 / 2, 3)) == 3


@pytest.mark.parametrize("tableau", TABLEAUX[1:], ids=lambda t: t.name)
def test_every_coefficient_is_checked(tableau):
    """Any one weight changed, wherever it stands, is refused."""
    places = [("b", len(tableau.b) - 1, j) for j in range(len(tableau.b))]
    places += [("a", i, j) for i in range(1, len(tableau.c)) for j in range(i)]
    for kind, i, j in places:
        row = list(tableau.b if kind == "b" else tableau.a[i])
        row[j] = row[j] + 0.01 * p(3)
        a = tuple(tuple(row) if kind == "a" and k == i else given for k, given in enumerate(tableau.a))
        with pytest.raises(InputError, match=tableau.name.split("(")[0]):
            replace(tableau, a=a, b=tuple(row) if kind == "b" else tableau.b)
    with pytest.raises(InputError):
        replace(tableau, order=tableau.order + 1)


def test_bad_arguments():
    for call in (
        lambda: erk.two_stage(0.0),
        lambda: erk.two_stage(1.5),
        lambda: erk.three_stage(0.5, 0.5),
        lambda: erk.refined(2 / 3, 1.0),
        lambda: ExponentialRK(erk.KROGSTAD, "velocity"),
        lambda: SinglestepSchedule("v"),
        lambda: SinglestepSchedule("eps", (3,)),
        lambda: SinglestepSchedule.spending(0),
        lambda: ExponentialTableau("x", 1, 1, (0.0, 0.5), ((), ()), (p(1), erk.ZERO)),
        lambda: ExponentialTableau("x", 1, 1, (0.5,), ((),), (p(1),)),
        lambda: ExponentialTableau("x", 1, 1, (), (), ()),
    ):
        with pytest.raises(InputError):
            call()


# --- the step against mpmath ------------------------------------------------------------------------------------------


def mp_weight(weight: Weight, z):
    def value(k, z):
        if k == 0:
            return mp.exp(z)
        return mp.quad(lambda v: mp.exp((1 - v) * z) * v ** (k - 1) / mp.factorial(k - 1), [0, 1])

    return sum((mp.mpf(w) * value(k, mp.mpf(c) * z) for w, k, c in weight.terms), mp.mpf(0))


def mp_step(tableau, target, path, low, high, x, eta=0.0, noises=None):
    """The step of the module's head, with 30 digits; ``noises`` maps c to the noise term there."""
    with mp.workdps(30):
        s, h, r = path.knot_at(low), mp.mpf(high) - mp.mpf(low), 1 + mp.mpf(eta) ** 2
        z = -r * h if target == "x0" else h
        values = []

        def reach(c, row):
            k = path.knot_at(low + c * (high - low))
            linear = (
                mp.mpf(k.sigma) / s.sigma * mp.exp(-(mp.mpf(eta) ** 2) * c * h) if target == "x0" else mp.mpf(k.alpha) / s.alpha
            )
            total = sum((mp_weight(w, z) * v for w, v in zip(row, values, strict=True)), mp.mpf(0))
            sign = k.alpha if target == "x0" else -k.sigma
            return k, linear * mp.mpf(x) + sign * r * h * total + (noises[c] if noises else 0)

        for c, row in zip(tableau.c, tableau.a, strict=True):
            k, state = (s, mp.mpf(x)) if c == 0.0 else reach(c, row)
            e = toy(state, k.lam)
            values.append((state - k.sigma * e) / k.alpha if target == "x0" else e)
        return float(reach(1.0, tableau.b)[1])


@named
@both
def test_one_step_is_the_formula(tableau, target):
    path = VP()
    for low, high in ((-0.7, 0.4), (1.1, 0.2)):  # towards data and towards noise
        s, t = knots(path, low, high)
        problem = Toy(path)
        mine = ExponentialRK(tableau, target).step(problem, 0.8, s, t, None, no_noise).x
        assert problem.calls == len(tableau.b)
        assert mine == pytest.approx(mp_step(tableau, target, path, low, high, 0.8), rel=2e-12)


@named
@both
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_one_noisy_step_is_the_formula_on_one_path(tableau, target, eta):
    """The noise at the nodes is made here from the Brownian increments between them, by the exact decay."""
    path, low, high = VP(), -0.7, 0.4
    s, t = knots(path, low, high)
    drawn = [0.3, -1.1, 0.7, 0.2]
    normals = iter(drawn)
    mine = ExponentialRK(tableau, target).step(Toy(path, eta), 0.8, s, t, None, lambda a, b: next(normals)).x
    noises, before, noise = {}, s, 0.0
    for c, z in zip(sorted({*tableau.c[1:], 1.0}), drawn, strict=False):
        k = path.knot_at(low + c * (high - low))
        h = k.lam - before.lam
        if target == "x0":
            noise = (
                k.sigma / before.sigma * math.exp(-(eta**2) * h) * noise
                + k.sigma * math.sqrt(1 - math.exp(-2 * eta**2 * h)) * z
            )
        else:
            noise = k.alpha / before.alpha * noise + k.sigma * eta * math.sqrt(math.exp(2 * h) - 1) * z
        noises[c], before = noise, k
    assert mine == pytest.approx(mp_step(tableau, target, path, low, high, 0.8, eta, noises), rel=2e-12)


@both
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_one_stage_is_ddim(target, eta):
    path, score = VP(), Gaussian(VP(), torch.tensor([0.4, -1.0], dtype=torch.float64), var=0.3)
    grid = path.time([-2.0, -0.4, 0.3, 2.0]).tolist()
    one = trace(ExponentialRK(erk.EXPONENTIAL_EULER, target), path, grid, eta=eta)
    other = trace(Multistep(1, target), path, grid, eta=eta)
    assert one.rows == other.rows
    x = torch.ones(1, 2, dtype=torch.float64)
    assert torch.equal(one.run(score, x, seed=1), other.run(score, x, seed=1))


# --- exactness ----------------------------------------------------------------------------------------------------------


def linear_target(path, target, v0, v1):
    """A problem whose prediction is v0 + v1 lambda, whatever x."""

    def eps(x, lam):
        k = path.knot_at(lam)
        return v0 + v1 * lam if target == "eps" else (x - k.alpha * (v0 + v1 * lam)) / k.sigma

    return Toy(path, 0.0, eps)


@named
@both
def test_targets_linear_in_lambda_are_exact_where_sum_b_c_is_phi_2(tableau, target):
    path, low, high, x = VP(), -0.5, 0.7, 0.3
    s, t = knots(path, low, high)
    mine = ExponentialRK(tableau, target).step(linear_target(path, target, 0.9, -1.3), x, s, t, None, no_noise).x
    h, f = high - low, lambda u: 0.9 - 1.3 * (low + u)
    if target == "x0":
        exact = t.sigma / s.sigma * x + t.alpha * quad(lambda u: math.exp(-(h - u)) * f(u), 0, h, epsabs=1e-14)[0]
    else:
        exact = t.alpha / s.alpha * x - t.sigma * quad(lambda u: math.exp(h - u) * f(u), 0, h, epsabs=1e-14)[0]
    z = -h if target == "x0" else h
    second = math.fsum(w(z) * c for w, c in zip(tableau.b, tableau.c, strict=True))
    is_exact = tableau not in (erk.EXPONENTIAL_EULER, erk.two_stage(0.3, exact=False), erk.GENERALISED_LAWSON4)
    assert (abs(second - phi(2, z)) < 1e-13) == is_exact
    assert (abs(mine - exact) < 1e-12) == is_exact, (mine, exact)


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=5)
@given(path=paths(), low=st.floats(-1.0, 0.0), width=st.floats(0.1, 2.0), value=st.floats(-2.0, 2.0))
def test_constant_targets_keep_mean_and_law(name, path, low, width, value):
    """One step of any noise level on a constant prediction: mean and variance of the exact process."""
    s, t = path.knots([path.T, 0.0])
    if not (s.lam < low and t.lam > low + width):
        return
    solver, eta = solver_of(name), SOLVERS[name].eta
    s, t = path.knot_at(low), path.knot_at(low + width)
    draws = itertools.count(1)

    @dataclass
    class Constant(Toy):
        def predict(self, x, k):
            v = Form({-1: value})
            return (
                Prediction(v, (x - k.alpha * v) / k.sigma)
                if solver.target == "x0"
                else Prediction((x - k.sigma * v) / k.alpha, v)
            )

    form = solver.step(Constant(path, eta), Form({0: 1.0}), s, t, None, lambda a, b: Form({next(draws): 1.0})).x
    h = t.lam - s.lam
    variance = math.fsum(c * c for r, c in form.terms.items() if r > 0)
    if solver.target == "x0":
        gain = t.sigma / s.sigma * math.exp(-(eta**2) * h)
        mean = t.alpha * -math.expm1(-(1 + eta**2) * h) * value
        exact = -(t.sigma**2) * math.expm1(-2 * eta**2 * h)
    else:
        gain, mean = t.alpha / s.alpha, -t.sigma * (1 + eta**2) * math.expm1(h) * value
        exact = (t.sigma * eta) ** 2 * math.expm1(2 * h)
    assert form.terms[0] == pytest.approx(gain, rel=1e-9)
    # the prediction is a register whose coefficient may vanish with the value
    assert form.terms.get(-1, 0.0) * 1.0 == pytest.approx(mean, rel=1e-8, abs=1e-12)
    assert variance == pytest.approx(exact, rel=1e-8, abs=1e-14)


# --- the noise and the law ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("eta", [0.3, 1.0, 1.7])
def test_normals_of_one_path_have_the_covariance_of_the_process(target, eta):
    """N_u is the stochastic integral of the exact solution, its covariance by quadrature."""
    path = Cosine()
    ks = knots(path, -1.0, -0.6, -0.1, 0.9)
    draws = iter(np.eye(3))
    units = path_normals(eta, target, ks, lambda a, b: next(draws))
    for (i, k), (j, l) in itertools.combinations_with_replacement(enumerate(ks[1:]), 2):
        # N_k = int sqrt(2) eta d_k(v) dB_v over lambda, d_k = sigma_k e^{-eta^2 (lam_k - v)} in x0, alpha_k e^{-v} in eps
        def decay(k, v):
            return k.sigma * math.exp(-(eta**2) * (k.lam - v)) if target == "x0" else k.alpha * math.exp(-v)

        def std(k):
            way = k.lam - ks[0].lam
            return k.sigma * (
                math.sqrt(-math.expm1(-2 * eta**2 * way)) if target == "x0" else eta * math.sqrt(math.expm1(2 * way))
            )

        covariance = quad(lambda v, k=k, l=l: 2 * eta**2 * decay(k, v) * decay(l, v), ks[0].lam, k.lam, epsabs=1e-14)[0]
        assert units[i] @ units[j] * std(k) * std(l) == pytest.approx(covariance, rel=1e-11)


def seeds_map(path, low, h, mean, var, eta, c2, c3):
    """One SEEDS step in x0 on N(mean, var): (constant, linear map of (x_s, N_c2, [N_c3,] N_t), covariance of the N's)."""
    s, r = path.knot_at(low), 1 + eta**2
    nodes = [c for c in (c2, c3, 1.0) if c > 0.0]
    ks = [path.knot_at(low + c * h) for c in nodes]
    cov = np.empty((len(nodes), len(nodes)))
    for (i, a), (j, b) in itertools.product(enumerate(nodes), repeat=2):
        first = min(a, b) * h
        decay = math.exp(-(eta**2) * (a * h + b * h - 2 * first))
        cov[i, j] = ks[i].sigma * ks[j].sigma * decay * -math.expm1(-2 * eta**2 * first)
    unit = np.eye(1 + len(nodes))

    def x0(state, k):
        gain = k.alpha * var / (k.alpha**2 * var + k.sigma**2)
        return mean + gain * (state[0] - k.alpha * mean), gain * state[1]

    def move(i, parts):
        k = ks[i]
        linear = k.sigma / s.sigma * math.exp(-(eta**2) * (k.lam - low))
        const = math.fsum(k.alpha * w * a for w, (a, _) in parts)
        return const, linear * unit[0] + sum(k.alpha * w * b for w, (_, b) in parts) + unit[1 + i]

    def psi(c):  # int of the kernel up to c h
        return -math.expm1(-r * c * h)

    def slope(c):  # int_0^{ch} r e^{-r(ch-u)} u/(ch) du
        return 1.0 - psi(c) / (r * c * h)

    m0 = x0((0.0, unit[0]), s)
    m1 = x0(move(0, [(psi(c2), m0)]), ks[0])
    if c3 == 0.0:
        return *move(1, [(psi(1.0), m1)]), cov  # c2 = 1/2: the midpoint alone
    m2 = x0(move(1, [(psi(c3) - c3 / c2 * slope(c3), m0), (c3 / c2 * slope(c3), m1)]), ks[1])
    return *move(2, [(psi(1.0) - slope(1.0) / c3, m0), (slope(1.0) / c3, m2)]), cov


@pytest.mark.parametrize(("name", "c2", "c3"), [("seeds_3", 1 / 3, 2 / 3), ("seeds_2", 0.5, 0.0)])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_law_of_seeds_by_the_joint_covariance_of_state_and_noise(name, c2, c3, eta):
    path, mean, var, lams = VP(), 0.7, 0.3, [-1.2, -0.3, 0.5, 1.4]
    s = path.knot_at(lams[0])
    m, v = s.alpha * mean, s.alpha**2 * var + s.sigma**2
    for low, high in itertools.pairwise(lams):
        const, gain, cov = seeds_map(path, low, high - low, mean, var, eta, c2, c3)
        m, v = const + gain[0] * m, gain[0] ** 2 * v + float(gain[1:] @ cov @ gain[1:])
    plan = trace(name, path, path.time(lams).tolist(), eta=eta)
    law = exact_law(plan, Gaussian(path, torch.tensor([mean], dtype=torch.float64), var=var))
    assert float(law.mean) == pytest.approx(m, rel=1e-10)
    assert float(law.variance) == pytest.approx(v, rel=1e-10)


@pytest.mark.parametrize(
    ("tableau", "target"),
    [(erk.refined(), "eps"), (erk.ETD4RK, "x0"), (erk.HOCHBRUCK_OSTERMANN, "eps")],
    ids=["refined", "etd4rk", "hochbruck_ostermann"],
)
def test_more_stages_do_not_raise_weak_and_strong_orders(tableau, target):
    """Weak 2, strong 1, of tableaux that the catalogue has only without noise."""
    path, solver = VP(), ExponentialRK(tableau, target)
    for kind in ("weak", "strong"):
        row = convergence(solver, kind, orders.gaussian(path), (40, 80), low=orders.LOW, high=orders.HIGH, eta=1.0)
        assert row.declared == {"weak": 2.0, "strong": 1.0}[kind]
        assert abs(row.measured - row.declared) <= orders.TOLERANCE, row


def test_no_weak_order_three():
    """var sum_j b_j W(c_j) - 1/3 = E (sum b_j W(c_j) - int W)^2 > 0 wherever the conditions of order 3 hold."""
    for tableau in TABLEAUX:
        b, c = [w(0.0) for w in tableau.b], tableau.c
        variance = math.fsum(v * w * min(x, y) for v, x in zip(b, c, strict=True) for w, y in zip(b, c, strict=True))
        cross = math.fsum(v * (x - x * x / 2) for v, x in zip(b, c, strict=True))
        if tableau.order >= 3:
            assert cross == pytest.approx(1 / 3)
            assert variance - 1 / 3 > 0.02
    three = [w(0.0) for w in erk.three_stage().b]
    assert three[2] ** 2 * 2 / 3 == pytest.approx(3 / 8)


# --- schedules and limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", range(1, 12))
def test_dpm_fast_spends_its_calls_as_released(nfe):
    """Orders of k-diffusion's dpm_solver_fast and of DPM-Solver's repository: m = nfe // 3 + 1 steps."""
    m = nfe // 3 + 1
    released = [3] * (m - 2) + [2, 1] if nfe % 3 == 0 else [3] * (m - 1) + [nfe % 3]
    path = VP()
    plan = trace(SinglestepSchedule.spending(nfe), path, path.time(np.linspace(-1.0, 1.5, m + 1).tolist()).tolist())
    assert plan.nfe == nfe
    lams = [k.lam for k in plan.knots]
    ends = [k.lam for k in plan.grid]
    found = [sum(a - 1e-9 <= lam < b - 1e-9 for lam in lams) for a, b in itertools.pairwise(ends)]
    assert found == released


@pytest.mark.parametrize(("tail", "order"), [((2, 1), 2), ((1,), 2), ((2,), 3)])
@both
def test_orders_of_the_schedules(tail, order, target):
    solver = SinglestepSchedule(target, tail)
    assert solver.order == order
    result = convergence(solver, "ode", orders.gaussian(VP()), low=orders.LOW, high=orders.HIGH)
    assert abs(result.measured - order) <= orders.TOLERANCE, result


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_few_steps_between_the_true_ends(name, n):
    """alpha = 0 at the start (refused in eps with the way out) and sigma = 0 at the end; h is infinite in both, one call."""
    path, solver, eta = Linear(), solver_of(name), SOLVERS[name].eta
    score = Gaussian(path, torch.tensor([0.5, -1.0], dtype=torch.float64), var=0.2)
    if solver.target == "eps":
        with pytest.raises(PathError, match="alpha"):
            trace(name, path, np.linspace(1.0, 0.0, n + 1).tolist())
        start = 0.97
    else:
        start = 1.0
    plan = trace(name, path, np.linspace(start, 0.0, n + 1).tolist(), eta=eta)
    out = plan.run(score, torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), seed=0)
    assert out.isfinite().all()
    # tail steps of dpm_fast have their own cost
    full = solver.stages
    wide = n - 1 if start < 1.0 else max(n - 2, 0)
    if not isinstance(solver, SinglestepSchedule):
        assert plan.nfe == full * wide + (n - wide)


@pytest.mark.parametrize("name", ["dpm_solver_2", "etdrk4", "hochbruck_ostermann_eps", "dpm_solver_3"])
def test_orders_hold_towards_noise(name):
    path, solver = VP(), solver_of(name)
    gaussian = orders.gaussian(path)
    grid = lambda n: path.time([1.5 - 2.5 * (i / n) ** 1.2 for i in range(n + 1)]).tolist()  # noqa: E731
    coarse, fine = (flow_error(trace(name, path, grid(n)), gaussian) for n in (20, 40))
    assert math.log2(coarse / fine) > solver.order - 0.3
    assert fine < 1e-3


@pytest.mark.parametrize("nfe", [1, 2, 3, 5, 7, 9, 10])
@pytest.mark.parametrize("name", ["dpmpp_2s", "seeds_3", "dpm_fast", "dpmpp_sde_published", "hochbruck_ostermann"])
def test_budgets_are_kept(name, nfe):
    score = Gaussian(VP(), torch.zeros(2, dtype=torch.float64), var=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        out = sample(score, (3, 2), solver=name, nfe=nfe, stop=1e-3)
    assert 0 < out.nfe <= nfe
    assert nfe - out.nfe < solver_of(name).stages
    assert out.x.isfinite().all()


# --- parity -------------------------------------------------------------------------------------------------------------


def edm_levels(n=7):
    return [float(v) for v in np.exp(np.linspace(1.4, -1.2, n) + 0.1 * np.sin(np.arange(n)))]


def denoised(x, sigma):
    return x - sigma * toy(x, -math.log(sigma))


def by_ours(solver, sigmas, x, eta=0.0, noise=no_noise):
    path = EDM()
    problem = Toy(path, eta)
    for a, b in itertools.pairwise(sigmas):
        x = solver.step(problem, x, path.knot(a), path.knot(b) if b else path.knot(0.0), None, noise).x
    return x


@pytest.mark.parametrize("last", [[], [0.0]])
def test_k_diffusion_dpm_2_is_dpm_solver_2(last):
    """sample_dpm_2: Euler in sigma to the midpoint of log sigma, then with its slope from the start: c2 = 1/2, b = (0, phi_1)
    in eps. A step to sigma = 0 is an Euler step.
    """
    sigmas = edm_levels() + last
    x = np.array([0.3, -1.0])
    for a, b in itertools.pairwise(sigmas):
        d = (x - denoised(x, a)) / a
        if b == 0.0:
            x = x + d * (b - a)
        else:
            middle = math.exp(0.5 * (math.log(a) + math.log(b)))
            x_2 = x + d * (middle - a)
            x = x + (x_2 - denoised(x_2, middle)) / middle * (b - a)
    mine = by_ours(solver_of("dpm_solver_2"), sigmas, np.array([0.3, -1.0]))
    assert np.abs(mine - x).max() < 1e-12


def test_k_diffusion_dpmpp_2s():
    """The deterministic part of sample_dpmpp_2s_ancestral."""
    sigmas = edm_levels()
    x = np.array([0.3, -1.0])
    for a, b in itertools.pairwise(sigmas):
        t, t_next = -math.log(a), -math.log(b)
        h = t_next - t
        middle = math.exp(-(t + 0.5 * h))
        x_2 = middle / a * x - math.expm1(-0.5 * h) * denoised(x, a)
        x = b / a * x - math.expm1(-h) * denoised(x_2, middle)
    mine = by_ours(solver_of("dpmpp_2s"), sigmas, np.array([0.3, -1.0]))
    assert np.abs(mine - x).max() < 1e-12


def ancestral(a, b):
    """(sigma_down, sigma_up) at k-diffusion's eta = 1."""
    up = min(b, math.sqrt(b**2 * (a**2 - b**2) / a**2))
    return math.sqrt(b**2 - up**2), up


@pytest.mark.parametrize("tree", [True, False])
def test_k_diffusion_dpmpp_sde(tree):
    """sample_dpmpp_sde at eta = 1, r = 1/2: with its Brownian tree in sigma and with independent normals."""
    sigmas = edm_levels()
    rng = np.random.default_rng(0)
    x, stored = np.array([0.3, -1.0]), []
    for a, b in itertools.pairwise(sigmas):
        t, t_next = -math.log(a), -math.log(b)
        s = t + 0.5 * (t_next - t)
        middle = math.exp(-s)
        first, second = rng.normal(size=(2, 2))
        stored += [first, second]
        z_middle = first
        if tree:  # increments of one path over (a, middle) and (middle, b), divided by the root of the interval
            z_end = (math.sqrt(a - middle) * first + math.sqrt(middle - b) * second) / math.sqrt(a - b)
        else:
            z_end = second
        down, up = ancestral(a, middle)
        x_2 = down / a * x - math.expm1(t + math.log(down)) * denoised(x, a) + up * z_middle
        down, up = ancestral(a, b)
        x = down / a * x - math.expm1(t + math.log(down)) * denoised(x_2, middle) + up * z_end
    normals = iter(stored)
    mine = by_ours(PublishedSDE(tree), sigmas, np.array([0.3, -1.0]), 1.0, lambda s, t: next(normals))
    assert np.abs(mine - x).max() < 1e-12


def test_where_k_diffusion_dpmpp_sde_loses_its_order():
    """N(.5, .3) on 80 steps of a Karras grid. With independent normals the variance is off by as much as one-call ancestral
    sampling's, for twice the calls; with the released Brownian tree it is not.
    """
    path = EDM()
    gaussian = Gaussian(path, torch.tensor([0.5], dtype=torch.float64), var=0.3)

    def error(name, n):
        sigmas = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)] + [0.0]
        return float(exact_law(trace(name, path, sigmas, eta=1.0), gaussian).variance) - 0.3

    names = ("dpmpp_sde_published_white", "dpmpp_sde_published", "dpmpp_2s_sde", "ddpm")
    found = [[error(name, n) for n in (20, 40, 80)] for name in names]
    expected = [
        [-0.1021, -0.0643, -0.0374],
        [-0.0237, -0.0057, -0.0012],
        [-0.041, -0.0123, -0.0033],
        [-0.1272, -0.0751, -0.0411],
    ]
    assert np.allclose(found, expected, rtol=0.01, atol=5e-5)
    rates = -np.diff(np.log2(np.abs(found)), axis=1)
    assert np.all((rates[0] > 0.6) & (rates[0] < 0.85)), rates  # .63-.83 by Monte Carlo, elsewhere
    assert np.all(rates[1:3] > 1.7), rates


def comfy_seeds(sigmas, x, normals, r1, r2, eta=1.0):
    """ComfyUI's seeds_2 (r2 = 0) and seeds_3 in EDM coordinates; its eta is the square of ours."""
    for a, b in itertools.pairwise(sigmas):
        t, t_next = -math.log(a), -math.log(b)
        h = t_next - t
        h_eta = h * (eta + 1.0)
        nodes = [r1, r2] if r2 else [r1]
        levels = [math.exp(-(t + r * h)) for r in nodes]
        d = [denoised(x, a)]
        noise, before = 0.0, 0.0
        for i, (r, level) in enumerate(zip(nodes, levels, strict=True)):
            noise = math.exp(-eta * (r - before) * h) * noise + math.sqrt(-math.expm1(-2 * eta * (r - before) * h)) * next(
                normals
            )
            before = r
            state = level / a * math.exp(-r * h * eta) * x - math.expm1(-r * h_eta) * d[0]
            if i == 1:
                state = state - r2 / r1 * (math.expm1(-r2 * h_eta) / (r2 * h_eta) + 1.0) * (d[0] - d[1])
            d.append(denoised(state + level * noise, level))
        noise = math.exp(-eta * (1 - before) * h) * noise + math.sqrt(-math.expm1(-2 * eta * (1 - before) * h)) * next(normals)
        x = b / a * math.exp(-h * eta) * x + b * noise
        if r2 == 0.0:
            x = x - math.expm1(-h_eta) * ((1 - 1 / (2 * r1)) * d[0] + d[1] / (2 * r1))
        else:
            x = x - math.expm1(-h_eta) * d[0] + (math.expm1(-h_eta) / h_eta + 1.0) / r2 * (d[2] - d[0])
    return x


@pytest.mark.parametrize("eta", [0.36, 1.0])
@pytest.mark.parametrize(("solver", "r1", "r2"), [("seeds_2", 0.5, 0.0), ("seeds_3", 1 / 3, 2 / 3)])
def test_comfyui_seeds(solver, r1, r2, eta):
    sigmas = edm_levels()
    stored = np.random.default_rng(1).normal(size=(40, 2))
    theirs = comfy_seeds(sigmas, np.array([0.3, -1.0]), iter(stored), r1, r2, eta)
    normals = iter(stored)
    mine = by_ours(solver_of(solver), sigmas, np.array([0.3, -1.0]), math.sqrt(eta), lambda s, t: next(normals))
    assert np.abs(mine - theirs).max() < 1e-12


def diffusers_stage(c2, c3):
    """DPM-Solver-3 as diffusers' singlestep runs it with solver_type "midpoint": its second stage is the second-order update,
    with weights c3^2/(2 c2) phi_1(c3 z), where the paper has c3^2/c2 phi_2(c3 z).
    """
    a32 = (c3 * c3 / (2 * c2)) * p(1, c3)
    b3 = (1 / c3) * p(2)
    order = 3 if abs(c3 - 2 / 3) < 1e-12 else 2
    a = ((), (c2 * p(1, c2),), (c3 * p(1, c3) - a32, a32))
    return ExponentialTableau("diffusers", order, 2, (0.0, c2, c3), a, (p(1) - b3, erk.ZERO, b3))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("n", [6, 12, 13])
def test_diffusers_singlestep(order, algorithm, kind, n):
    """Their calls sit on the grid itself, so that c2 and c3 change from step to step. "heun" is the paper's "taylor"."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        algorithm_type=algorithm, solver_order=order, solver_type=kind, lower_order_final=True, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(n)
    sigmas = [float(v) for v in scheduler.sigmas]
    lams = [-math.log(v) for v in sigmas]
    theirs = x = torch.tensor([[0.3, -1.0, 0.8]])
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(toy(theirs, lams[i]), t, theirs).prev_sample
    path, target = VP(0.1, 25.0), "x0" if algorithm == "dpmsolver++" else "eps"
    mine, i = x.double(), 0
    order_list = scheduler.get_order_list(n)
    while i < n:
        calls = 1
        while i + calls < n and order_list[i + calls] == calls + 1:
            calls += 1
        h = lams[i + calls] - lams[i]
        c = [(lams[i + j] - lams[i]) / h for j in range(1, calls)]
        if calls == 1:
            tableau = erk.EXPONENTIAL_EULER
        elif calls == 2:
            tableau = erk.two_stage(c[0], exact=kind == "heun")
        else:
            tableau = erk.three_stage(c[0], c[1], exact=True) if kind == "heun" else diffusers_stage(*c)
        s, t = knots(path, lams[i], lams[i + calls])
        mine = ExponentialRK(tableau, target).step(Toy(path), mine, s, t, None, no_noise).x
        i += calls
    assert float((mine - theirs.double()).abs().max()) < 2e-5 * float(theirs.abs().max())


def test_dpm_solver_3_as_written_in_the_paper():
    """Lu et al. 2022, algorithm 2, and its ++ form, transcribed; r1 = 1/3, r2 = 2/3."""
    path = VP()
    s, k1, k2, t = knots(path, -0.4, -0.4 + 0.9 / 3, -0.4 + 0.6, 0.5)
    h, x = 0.9, 0.7
    eps = lambda x, k: toy(x, k.lam)  # noqa: E731
    e0 = eps(x, s)
    u1 = k1.alpha / s.alpha * x - k1.sigma * math.expm1(h / 3) * e0
    d1 = eps(u1, k1) - e0
    u2 = k2.alpha / s.alpha * x - k2.sigma * math.expm1(2 * h / 3) * e0
    u2 -= k2.sigma * 2.0 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * d1
    d2 = eps(u2, k2) - e0
    end = t.alpha / s.alpha * x - t.sigma * math.expm1(h) * e0 - t.sigma * 1.5 * (math.expm1(h) / h - 1) * d2
    mine = solver_of("dpm_solver_3").step(Toy(path), x, s, t, None, no_noise).x
    assert mine == pytest.approx(end, rel=1e-12)


def test_comfyui_exp_heun_is_etdrk2():
    assert solver_of("exp_heun_2_x0") == solver_of("etdrk2") == solver_of("exp_heun_2_x0_sde")
    path = VP()
    s, t = knots(path, -0.3, 0.8)
    h, x, problem = 1.1, 0.4, Toy(path)
    first = problem.predict(x, s).x0
    end = t.sigma / s.sigma * x - t.alpha * math.expm1(-h) * first
    second = problem.predict(end, t).x0
    end += t.alpha * (1 + math.expm1(-h) / h) * (second - first)  # h phi_2(-h) = 1 - (1 - e^{-h})/h
    assert solver_of("etdrk2").step(Toy(path), x, s, t, None, no_noise).x == pytest.approx(end, rel=1e-12)


def test_reduced_solvers_cost_one_call():
    for name in ROWS:
        assert solver_of(name).reduced.stages == 1
        assert solver_of(name).reduced.target == solver_of(name).target


def test_a_run_draws_its_noise_and_keeps_its_table():
    """z-scores of the real draws of seeds_3 against its exact law; table and loop agree bit for bit."""
    path, n = VP(), 20_000
    score = Gaussian(path, torch.tensor([0.4], dtype=torch.float64), var=0.3)
    grid = path.time([-1.0, -0.2, 0.5, 1.3]).tolist()
    x = score.sample(n, t=grid[0], seed=3).double()
    runs = [integrate("seeds_3", score, x, grid, seed=5, traced=traced).x for traced in (True, False)]
    assert float((runs[0] - runs[1]).abs().max()) < 1e-12
    law = exact_law(trace("seeds_3", path, grid, eta=1.0), score)
    out = runs[0].squeeze(1)
    variance = float(law.variance)
    assert abs(float(out.mean() - law.mean)) < 5 * math.sqrt(variance / n)
    assert abs(float(out.var()) / variance - 1.0) < 5 * math.sqrt(2 / n)
