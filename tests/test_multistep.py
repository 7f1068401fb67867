"""Multistep methods: their weights against integrals by mpmath, their starts, and what released code does and gets wrong.

The orders of the rows themselves are measured by test_orders.py; here are those that take finer grids, and those of
combinations that are no rows.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_parity import (
    EDM_SCORE,
    NORMALS,
    SINGLE,
    START,
    TO_MIN,
    TO_ZERO,
    Stored,
    denoise,
    distance,
    index_times,
    indexed_network,
    looked_up,
    network,
    ours,
    path_of,
    run_diffusers,
    sigma_times,
)

from benchmarks import orders
from scores import Gaussian, Score
from sde import EDM, VP, Linear, ReverseSDE, Tabulated
from sde.errors import InputError, PathError
from sde.prediction import Prediction
from solvers import SOLVERS, exact_law, integrate, trace
from solvers.convergence import convergence, warped_grid
from solvers.exact import flow_error
from solvers.exponential import AdamsMoulton, FixedWeights, Multistep, UniPC, exact_weights, phi
from solvers.exponential_rk import ExponentialRK
from solvers.exponential_tableaux import EXPONENTIAL_EULER, KROGSTAD, three_stage, two_stage
from solvers.multistep import ADAMS_BASHFORTH
from solvers.plan import Lin, trace_solver
from solvers.runge_kutta import RungeKutta
from solvers.starts import First, GradedStart, PseudoRungeKutta, Started
from solvers.tableaux import HEUN, KUTTA3, RK4
from solvers.testing import paths

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LADDER3 = [1.0, 0.86, 0.7, 0.61, 0.4, 0.33, 0.2, 0.1]  # times of Linear, uneven


# --- weights ----------------------------------------------------------------------------------------------------------

EXACT_TIME = {"lam": lambda lam: lam, "rho": lambda lam: mpmath.exp(-lam), "t": lambda lam: 1 / (1 + mpmath.exp(lam))}


def by_mpmath(s, t, nodes, target, basis, r):
    """The integrals of the definition, on the path Linear, where t = 1/(1 + e^lambda)."""
    with mpmath.workdps(20):
        if target == "velocity":
            a, b, at = mpmath.mpf(s.t), mpmath.mpf(t.t), [mpmath.mpf(k.t) for k in nodes]
            kernel, variable = (lambda u: 1), (lambda u: u)
        else:
            a, b = mpmath.mpf(s.lam), mpmath.mpf(t.lam)
            variable = EXACT_TIME[basis]
            at = [mpmath.mpf(k.t) if basis == "t" else variable(mpmath.mpf(k.lam)) for k in nodes]
            kernel = lambda u: r * mpmath.exp(-r * (b - u) if target == "x0" else b - u)  # noqa: E731

        def weight(j):
            others = [v for i, v in enumerate(at) if i != j]

            def integrand(u):
                return kernel(u) * mpmath.fprod((variable(u) - v) / (at[j] - v) for v in others)

            return mpmath.quad(integrand, mpmath.linspace(a, b, 3))

        return [float(weight(j)) for j in range(len(nodes))]


@pytest.mark.parametrize(
    ("target", "basis"), [(target, basis) for target in ("x0", "eps") for basis in EXACT_TIME] + [("velocity", "t")]
)
@settings(max_examples=8, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # mpmath is too slow to shrink with
@given(
    start=st.floats(-2.0, 2.0),
    h=st.floats(1e-3, 3.0),
    back=st.lists(st.floats(0.3, 0.9), min_size=0, max_size=4),
    eta=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    encode=st.booleans(),
)
def test_weights_are_the_integrals_of_the_lagrange_polynomials(target, basis, start, h, back, eta, encode):
    path, sign = Linear(), -1.0 if encode else 1.0
    eta = 0.0 if encode or target == "velocity" else eta
    places = itertools.accumulate([start, *(-sign * h * b for b in back)])
    nodes = [path.knot_at(lam) for lam in places]
    s, t = nodes[0], path.knot_at(start + sign * h)
    r = 1.0 + eta * eta
    exact = by_mpmath(s, t, nodes, target, basis, r)
    weights = exact_weights(path, s, t, nodes, target, basis, r)
    # nodes of t are given by t and lambda, which agree to rounding: relative to the distances of the nodes
    slack = 1e-16 / min([abs(a.t - b.t) / max(a.t, 1e-3) for a, b in itertools.pairwise(nodes)], default=1.0)
    assert np.abs(np.array(weights) - exact).max() <= (1e-11 + 50 * slack) * np.abs(exact).max()
    total = {"x0": -math.expm1(-r * sign * h), "eps": r * math.expm1(sign * h), "velocity": t.t - s.t}[target]
    assert math.fsum(weights) == pytest.approx(total, rel=1e-10, abs=1e-12 * np.abs(exact).sum())


@pytest.mark.parametrize(("eta", "h"), [(0.0, 1e-6), (0.0, 14.0), (1.0, 12.0), (3.0, 10.0), (5.0, 12.0)])
def test_weights_of_very_long_and_very_short_steps(eta, h):
    """The kernel e^{-r(h-u)} falls by up to e^312 over the step: a line's weights in closed form."""
    path, r = EDM(), 1.0 + eta * eta
    s, before = path.knot_at(-4.0), path.knot_at(-4.3)
    t = path.knot_at(-4.0 + h)
    length = t.lam - s.lam
    slope = (length + math.expm1(-r * length) / r if r * length > 1e-3 else r * length**2 * phi(2, -r * length)) / 0.3
    exact = [-math.expm1(-r * length) + slope, -slope]
    assert exact_weights(path, s, t, [s, before], "x0", "lam", r) == pytest.approx(exact, rel=1e-11)


@given(z=st.floats(-40.0, 40.0), k=st.integers(0, 5))
def test_phi(z, k):
    with mpmath.workdps(60):
        exact = mpmath.nsum(lambda i: mpmath.mpf(z) ** i / mpmath.factorial(i + k), [0, 300]) if k else mpmath.exp(z)
        assert phi(k, z) == pytest.approx(float(exact), rel=1e-11)


def test_the_weights_of_equal_steps_are_adams_and_bashforths():
    """int_0^1 L_j over the nodes 0, -1, -2, ..., in fractions; and so are the exact weights of equal steps in the variable."""
    for k, row in enumerate(ADAMS_BASHFORTH, 1):
        for j, b in enumerate(row):
            poly = [Fraction(1)]  # ascending
            for i in range(k):
                if i != j:
                    scale = Fraction(1, i - j)  # the nodes are -i and -j: (v + i) / (i - j)
                    shifted = [Fraction(0), *poly]
                    poly = [scale * (c + i * d) for c, d in zip(shifted, [*poly, Fraction(0)], strict=True)]
            assert Fraction(b).limit_denominator(100) == sum(c / (n + 1) for n, c in enumerate(poly))
        path = EDM()
        nodes = path.knots([5.0 + i for i in range(k)])
        t = path.knot(4.0)
        weights = exact_weights(path, nodes[0], t, nodes, "velocity", "t", 1.0)
        assert weights == pytest.approx([-b for b in row], rel=1e-13)
        rho = exact_weights(path, nodes[0], t, nodes, "eps", "rho", 1.0)  # sigma_t w_j = (rho_s - rho_t) b_j alpha_t
        assert [4.0 * w for w in rho] == pytest.approx(list(row), rel=1e-12)


class Polynomial:
    """A problem whose predictions do not see the state: x0 and eps are polynomials of ``variable(knot)``."""

    def __init__(self, path, coefficients, variable):
        self.path, self.coefficients, self.variable, self.calls = path, coefficients, variable, 0

    def at(self, v):
        return sum(c * v**i for i, c in enumerate(self.coefficients))

    def predict(self, x, knot):
        self.calls += 1
        value = self.at(self.variable(knot))
        return _Same(value, value)

    def eta(self, knot):
        return 0.0

    def keep(self, x):
        return x


class _Same(Prediction):
    def combine(self, a, b):
        return self.x0  # the velocity is the polynomial


VARIABLE = {"lam": lambda k: k.lam, "rho": lambda k: math.exp(-k.lam), "t": lambda k: k.t}
POLYNOMIAL = [
    (kind, target, basis, n)
    for kind in ("multistep", "pece", "pec")
    for target, bases in (("x0", "lam rho t"), ("eps", "lam rho t"), ("velocity", "t"))
    for basis in bases.split()
    for n in (1, 2, 3, 4)
] + [(kind, target, "lam", n) for kind in ("unip", "unipc") for target in ("x0", "eps") for n in (1, 2, 3, 4, 5, 6)]


GAUSS = np.polynomial.legendre.leggauss(48)


def quadrature(f, a, b):
    """int_a^b f(u) du of a smooth f of an array, to rounding."""
    nodes, weights = GAUSS
    return float(0.5 * (b - a) * np.dot(weights, f(0.5 * (b - a) * (1.0 + nodes) + a)))


def integral(path, s, t, target, value):
    """What a step adds to its linear part; ``value`` is a function of a time (velocity), or of a knot."""
    if target == "velocity":
        return quadrature(value, s.t, t.t)
    at = lambda u: np.array([value(k) for k in path.knots(path.time(torch.from_numpy(u)))])  # noqa: E731
    if target == "x0":
        return t.alpha * quadrature(lambda u: np.exp(u - t.lam) * at(u), s.lam, t.lam)
    return -t.sigma * quadrature(lambda u: np.exp(t.lam - u) * at(u), s.lam, t.lam)


@pytest.mark.parametrize(("kind", "target", "basis", "n"), POLYNOMIAL)
def test_polynomials_of_the_degree_are_integrated_exactly(kind, target, basis, n):
    """n predictions know a polynomial of degree n - 1; the corrector, which knows the arrived one too, of degree n."""
    path, degree = Linear(), n - 1 if kind in ("multistep", "unip") else n
    problem: Any = Polynomial(path, [0.7, -1.3, 0.4, 0.9, -0.2, 0.3, -0.1][: degree + 1], VARIABLE[basis])
    lams = [-1.1, -0.8, -0.6, -0.1, 0.1, 0.3, 0.8, 1.0][-n - 2 :]
    knots = path.knots(path.time(torch.tensor(lams, dtype=torch.float64)), grid=True)
    solver: Any = {
        "multistep": lambda: Multistep(n, target, basis),
        "pece": lambda: AdamsMoulton(n, n + 1, target, basis, "PECE"),
        "pec": lambda: AdamsMoulton(n, n + 1, target, basis),
        "unip": lambda: UniPC(n, "exact", target, lower_final=False, corrector=False),
        "unipc": lambda: UniPC(n, "exact", target, lower_final=False),
    }[kind]()
    carry = None
    for k in knots[: n - 1]:
        carry = solver.remember(problem.predict(0.0, k), k, carry)
    s, t, end = knots[n - 1 : n + 2] if kind in ("pec", "unipc") else [*knots[n - 1 : n + 1], None]
    x, carry = solver.step(problem, 0.3, s, t, carry, None)
    gain = {"x0": lambda a, b: b.sigma / a.sigma, "eps": lambda a, b: b.alpha / a.alpha, "velocity": lambda a, b: 1.0}[target]
    variable = problem.at if target == "velocity" else (lambda k: problem.at(VARIABLE[basis](k)))
    exact = gain(s, t) * 0.3 + integral(path, s, t, target, variable)
    if end is None:
        assert x == pytest.approx(exact, rel=1e-7, abs=1e-8)  # path.time is good to 1e-9
        return
    # the corrected state shows in what the next step starts from
    used = solver.step(problem, x, t, end, carry, None).x
    nodes = knots[: n + 1][::-1][:n]
    weights = exact_weights(path, t, end, nodes, target, basis, 1.0)
    scale = {"x0": end.alpha, "eps": -end.sigma, "velocity": 1.0}[target]
    predicted = scale * sum(w * problem.at(VARIABLE[basis](k)) for w, k in zip(weights, nodes, strict=True))
    assert used == pytest.approx(gain(t, end) * exact + predicted, rel=1e-7, abs=1e-8)
    assert problem.calls == n + 1


# --- relations between methods ----------------------------------------------------------------------------------------


def table(solver, path, times, eta=0.0):
    return trace_solver(solver, path, tuple(times), eta, "x")


def same(a, b, path=None, times=LADDER3, tolerance=1e-10, eta=0.0):
    path = path or Linear()
    score = Score(network, path, "velocity", label=lambda t: t)
    one, two = (ours(solver, score, START, times, eta=eta)[0] for solver in (a, b))
    return float((one - two).abs().max()) <= tolerance * float(one.abs().max())


@pytest.mark.parametrize(("a", "b"), [("res_2m", "dpmpp_2m_heun"), ("res_3m", "dpmpp_3m"), ("deis_lam_3", "dpm_3m"),
                                      ("unip_2", "dpmpp_2m_lower_final"), ("adams_1", "euler"), ("lms_1", "ddim"),
                                      ("lms_4", "deis_rho_4"), ("ipndm_v_3", "lms_3")])  # fmt: skip
def test_rows_said_to_be_the_same_are(a, b):
    times = LADDER3[1:]
    assert same(SOLVERS[a].solver, SOLVERS[b].solver, times=times)


def test_in_edm_coordinates_deis_in_t_and_adams_are_lms():
    """There t = rho and the velocity is eps."""
    times = [40.0, 31.0, 17.0, 9.0, 4.0, 2.5, 1.0, 0.3]
    assert same(Multistep(3, "eps", "t"), Multistep(3, "eps", "rho"), EDM(), times)
    assert same(Multistep(3, "velocity", "t"), Multistep(3, "eps", "rho"), EDM(), times)
    assert same(FixedWeights(ADAMS_BASHFORTH), Multistep(4, "eps", "rho"), EDM(), np.linspace(9.0, 1.0, 9).tolist())
    assert not same(FixedWeights(ADAMS_BASHFORTH), Multistep(4, "eps", "rho"), EDM(), times, 1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("target", ["x0", "eps"])
def test_unipc_exact_is_adams_moulton_without_noise(steps, target):
    """And unip is the multistep method. Steps of two and more nodes do not depend on B(h)."""
    times = LADDER3[1:]
    unipc = UniPC(steps, "exact", target, lower_final=False)
    assert same(unipc, AdamsMoulton(steps, steps + 1, target), times=times)
    assert same(UniPC(steps, "exact", target, False, corrector=False), Multistep(steps, target), times=times)
    lowered = UniPC(steps, "exact", target, lower_final=True)
    assert same(lowered, AdamsMoulton(steps, steps + 1, target, lower_final=True), times=times)
    assert same(UniPC(steps, "exact", target, True, corrector=False), Multistep(steps, target, lower_final=True), times=times)
    assert not same(unipc, UniPC(steps, "bh2", target, lower_final=False), times=times, tolerance=1e-6)  # the first corrections


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_b_of_h_matters_where_one_difference_is_known_alone(variant):
    """With a full history, steps of three and more nodes have the exact weights whatever B(h)."""
    path = Linear()
    problem: Any = Polynomial(path, [0.7, -1.3, 0.4], VARIABLE["lam"])
    knots = path.knots([0.8, 0.7, 0.5, 0.35], grid=True)
    states = []
    for v in (variant, "exact"):
        solver, carry = UniPC(3, v, lower_final=False), None
        for k in knots[:2]:
            carry = solver.remember(problem.predict(0.0, k), k, carry)
        states.append(solver.step(problem, 0.3, knots[2], knots[3], carry, None).x)
    assert states[0] == pytest.approx(states[1], rel=1e-12)


# --- k-diffusion, dpm-solver, ComfyUI and diff-sampler, transcribed ----------------------------------------------------


def kd_multistep_sde(x, sigmas, normals, eta, order, factor=1.0, denoised_at=denoise):
    """sample_dpmpp_3m_sde (order 3) and sample_dpmpp_2m_sde, solver_type "heun" (order 2); ``factor`` 2 corrects the former."""
    old, widths, normals = [], [], iter(normals)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = denoised_at(x, sigma)
        if sigma_next == 0.0:
            return denoised
        h = math.log(sigma / sigma_next)
        h_eta = h * (eta + 1.0)
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        phi_2 = math.expm1(-h_eta) / h_eta + 1.0
        if len(old) >= 2 and order == 3:
            r0, r1 = widths[-1] / h, widths[-2] / h
            d1_0, d1_1 = (denoised - old[-1]) / r0, (old[-1] - old[-2]) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            x = x + phi_2 * d1 - factor * (phi_2 / h_eta - 0.5) * (d1_0 - d1_1) / (r0 + r1)
        elif old:
            x = x + phi_2 * (denoised - old[-1]) * (h / widths[-1])
        if eta > 0.0:
            x = x + sigma_next * math.sqrt(-math.expm1(-2.0 * h * eta)) * next(normals)
        old.append(denoised)
        widths.append(h)
    return x


@pytest.mark.parametrize("eta", [0.0, 1.0, 0.6])
@pytest.mark.parametrize("sigmas", [TO_ZERO, TO_MIN], ids=["to_zero", "to_min"])
def test_k_diffusion_3m_sde_and_its_correction(eta, sigmas):
    """Their eta is our eta squared. The published weights are theirs; with the factor two they are the polynomial's."""
    x = sigmas[0] * START
    for factor, name in ((1.0, "dpmpp_3m_sde_published"), (2.0, "dpmpp_3m_sde")):
        theirs = kd_multistep_sde(x, sigmas, NORMALS, eta, 3, factor)
        assert distance(ours(name, EDM_SCORE, x, sigmas, eta=math.sqrt(eta)), theirs) <= 1e-12
        if eta == 0.0:
            assert distance(ours(name.replace("_sde", ""), EDM_SCORE, x, sigmas), theirs) <= 1e-12
    theirs = kd_multistep_sde(x, sigmas, NORMALS, eta, 2)
    assert distance(ours("dpmpp_2m_sde_heun", EDM_SCORE, x, sigmas, eta=math.sqrt(eta)), theirs) <= 1e-12
    if eta == 0.0:
        assert distance(ours("dpmpp_2m_heun", EDM_SCORE, x, sigmas), theirs) <= 1e-12


def test_the_corrected_3m_is_of_order_three_and_the_published_of_order_two_from_the_same_start():
    gaussian = orders.gaussian(VP())
    start = ExponentialRK(two_stage(), "x0")
    for rule, order in (("exact", 3.0), ("published_3m", 2.0)):
        for target in ("x0", "eps"):
            solver = Started(Multistep(3, target, rule=rule), start)
            assert solver.order == order
            result = convergence(solver, "ode", gaussian, (160, 320, 640), orders.LOW, orders.HIGH)
            assert abs(result.measured - order) <= 0.1, result


def comfy_gradient_estimation(x, sigmas, gamma):
    """sample_gradient_estimation: Euler, plus (gamma - 1) times the change of the slope."""
    old = None
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = denoise(x, sigma)
        d = (x - denoised) / sigma
        if sigma_next == 0.0:
            return denoised
        x = x + d * (sigma_next - sigma)
        if old is not None:
            x = x + (gamma - 1.0) * (d - old) * (sigma_next - sigma)
        old = d
    return x


@pytest.mark.parametrize("sigmas", [TO_ZERO, TO_MIN], ids=["to_zero", "to_min"])
def test_comfyui_gradient_estimation(sigmas):
    x = sigmas[0] * START
    assert distance(ours("gradient_estimation", EDM_SCORE, x, sigmas), comfy_gradient_estimation(x, sigmas, 2.0)) <= 1e-12
    theirs = comfy_gradient_estimation(x, sigmas, 1.5)
    assert distance(ours("ipndm_2", EDM_SCORE, x, sigmas), theirs) <= 1e-12


def ds_ipndm(x, sigmas, order):
    """diff-sampler's ipndm_sampler: rows of equal steps."""
    rows = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    slopes: list[Any] = []
    for sigma, sigma_next in itertools.pairwise(sigmas):
        slopes = [(x - denoise(x, sigma)) / sigma, *slopes][:order]
        x = x + (sigma_next - sigma) * sum(b * d for b, d in zip(rows[len(slopes)], slopes, strict=True))
    return x


@pytest.mark.parametrize("order", [2, 3, 4])
def test_diff_sampler_ipndm(order):
    x = TO_MIN[0] * START
    assert distance(ours(f"ipndm_{order}", EDM_SCORE, x, TO_MIN), ds_ipndm(x, TO_MIN, order)) <= 1e-12


def ds_ipndm_v(h, h1, h2, h3, order, repaired=False):
    """The coefficients of diff-sampler's and ComfyUI's ipndm_v at a step h after steps h1, h2, h3, in units of h.

    ``repaired`` closes the parenthesis of ``temp`` where the derivation does.
    """

    def first():
        if repaired:
            return (1 - h / (3 * (h + h1))) / 2 * (h * (h + h1)) / (h1 * (h1 + h2))
        return (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2

    if order == 3:
        temp = first()
        return [(2 + h / h1) / 2 + temp, -(h / h1) / 2 - (1 + h1 / h2) * temp, temp * h1 / h2]
    one = first()
    two = ((1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))) * (
        h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
    )
    far = h1 * (h1 + h2) / (h2 * (h2 + h3))
    return [
        (2 + h / h1) / 2 + one + two,
        -(h / h1) / 2 - (1 + h1 / h2) * one - (1 + h1 / h2 + far) * two,
        one * h1 / h2 + (h1 / h2 + far * (1 + h2 / h3)) * two,
        -two * far * h1 / h2,
    ]


def right_ipndm_v(h, widths):
    path = EDM()
    nodes = path.knots(list(itertools.accumulate([20.0, *widths])))
    t = path.knot(20.0 - h)
    return [-w / h for w in exact_weights(path, nodes[0], t, nodes, "velocity", "t", 1.0)]


def test_released_ipndm_v_has_a_misplaced_parenthesis():
    """With it closed, order 3 is what ours has on any grid. As released, equal steps give 2.375 where 23/12 + 3/8 = 55/24 is
    right, and on unequal steps the coefficients of order 4 do not even sum to one.
    """
    for widths in ((1.0, 1.0), (0.7, 1.3), (2.0, 0.4)):
        assert ds_ipndm_v(0.9, *widths, 1.0, 3, repaired=True) == pytest.approx(right_ipndm_v(0.9, widths), rel=1e-12)
        assert abs(ds_ipndm_v(0.9, *widths, 1.0, 3)[0] - right_ipndm_v(0.9, widths)[0]) > 1e-2 or widths == (1.0, 1.0)
    equal = ds_ipndm_v(1.0, 1.0, 1.0, 1.0, 4)
    assert equal[0] == pytest.approx(2.375)
    assert right_ipndm_v(1.0, (1.0, 1.0, 1.0)) == pytest.approx(list(ADAMS_BASHFORTH[3]), rel=1e-12)
    assert equal[0] - 55 / 24 == pytest.approx(1 / 12)
    sums = [math.fsum(ds_ipndm_v(0.9, *w, 4)) for w in ((0.7, 1.3, 0.5), (2.0, 0.4, 1.0))]
    assert max(abs(v - 1.0) for v in sums) > 0.05
    for w in ((0.7, 1.3, 0.5), (2.0, 0.4, 1.0)):
        assert math.fsum(right_ipndm_v(0.9, w)) == pytest.approx(1.0, abs=1e-12)


# --- UniPC's varying coefficients ------------------------------------------------------------------------------------


def up_vary(x0_at, x, levels, order, complete=False):
    """uni_pc.py, multistep_uni_pc_vary_update, data prediction: (alpha, sigma) levels; the last state is corrected too.

    ``complete`` puts in the terms of the corrector that the released loop leaves out.
    """
    lam = [math.log(a / s) for a, s in levels]
    models = [x0_at(x, 0)]
    for i in range(len(levels) - 1):
        n = min(order, i + 1)
        (_, sigma_s), (alpha, sigma) = levels[i], levels[i + 1]
        h, m0 = lam[i + 1] - lam[i], models[-1]
        ratios = [(lam[i - j] - lam[i]) / h for j in range(1, n)] + [1.0]
        differences = [(models[-1 - j] - m0) / ratios[j - 1] for j in range(1, n)]
        c = np.array([[r**k / math.factorial(k + 1) for k in range(n)] for r in ratios])
        corrector = np.linalg.inv(c)
        hh = -h
        h_phi, value, factorial = [], math.expm1(hh), 1.0
        for k in range(1, n + 2):
            h_phi.append(value)
            value, factorial = value / hh - 1.0 / factorial, factorial * (k + 1)
        base = sigma / sigma_s * x - alpha * h_phi[0] * m0
        x = base
        if n > 1:
            predictor = np.linalg.inv(c[:-1, :-1])
            for k in range(n - 1):
                x = x - alpha * h_phi[k + 1] * sum(predictor[k, j] * d for j, d in enumerate(differences))
        arrived = x0_at(x, i + 1)
        x = base
        last = 0
        for k in range(n if complete else n - 1):
            last = k
            x = x - alpha * h_phi[k + 1] * sum((corrector[k, j] * d for j, d in enumerate(differences)), 0.0 * m0)
            if complete:
                x = x - alpha * h_phi[k + 1] * corrector[k, n - 1] * (arrived - m0)
        if not complete:
            x = x - alpha * h_phi[n] * corrector[last, n - 1] * (arrived - m0)
        models.append(arrived)
    return x


def gaussian_run(order, n, complete, path=None):
    """Error of the transcription at the exact flow of N(.5, .3)."""
    path = path or VP()
    knots = path.knots(list(warped_grid(path, n, orders.LOW, orders.HIGH)))
    spread = [k.alpha**2 * 0.3 + k.sigma**2 for k in knots]
    x0_at = lambda x, i: 0.5 + knots[i].alpha * 0.3 / spread[i] * (x - knots[i].alpha * 0.5)  # noqa: E731
    s, t = knots[0], knots[-1]
    start = s.alpha * 0.5 + math.sqrt(spread[0])
    exact = t.alpha * 0.5 + math.sqrt(spread[-1])
    return abs(float(up_vary(x0_at, np.float64(start), [(k.alpha, k.sigma) for k in knots], order, complete)) - exact)


def test_vary_coeff_as_released_is_of_order_one_and_with_its_missing_terms_exact():
    """The corrector's loop ends a row early, and the arrived difference enters one row alone. UniPC(p, "exact") has all."""
    for order in (2, 3):
        errors = [gaussian_run(order, n, complete=False) for n in (80, 160, 320)]
        assert abs(math.log2(errors[1] / errors[2]) - 1.0) < 0.15, errors
        repaired = [gaussian_run(order, n, complete=True) for n in (80, 160, 320)]
        assert math.log2(repaired[1] / repaired[2]) > 2.7, repaired
        assert repaired[2] < 1e-3 * errors[2]
    path, times = VP(), LADDER3[1:]
    levels = [(k.alpha, k.sigma) for k in path.knots(times)]
    score = Score(network, path, "x0", label=lambda t: t)
    for order in (1, 2, 3, 4):
        # theirs corrects the last state too; so does ours with one more step, whose start is that state
        theirs = up_vary(lambda x, i: network(x, times[i]), START, levels, order, complete=True)
        solver = UniPC(order, "exact", lower_final=False)
        seen: list[Any] = []

        class Watch(First):
            def keep(self, x, seen=seen):
                seen.append(x)
                return x

        problem: Any = Watch(_Bare(score))
        carry, x = None, START
        knots = path.knots([*times, 0.05], grid=True)
        for a, b in itertools.pairwise(knots):
            x, carry = solver.step(problem, x, a, b, carry, None)
        assert float((seen[-1] - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max())


class _Bare:
    """A score as a problem of the flow."""

    def __init__(self, score):
        self.score, self.path = score, score.path

    def predict(self, x, knot):
        return self.score.predict(x, knot.t)

    def eta(self, knot):
        return 0.0

    def keep(self, x):
        return x


# --- diffusers, as released ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize(("algorithm", "target", "eta"), [("dpmsolver++", "x0", 0.0), ("dpmsolver", "eps", 0.0)])
def test_diffusers_order_three_is_the_published_rule(diffusers, algorithm, target, eta):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type=algorithm,
        solver_order=3,
        solver_type="heun",
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(20)
    path = path_of(scheduler)
    times = index_times(path, scheduler, 1.0 / 1000.0)
    score = Score(indexed_network, path, "eps", label=looked_up(times, scheduler))
    x = START.float()
    theirs = run_diffusers(scheduler, indexed_network, x)
    assert distance(ours(Multistep(3, target, rule="published_3m"), score, x, times), theirs) <= SINGLE
    assert distance(ours(Multistep(3, target), score, x, times), theirs) > 1e-3


def sde_order_three(x0_at, x, knots, normals, half):
    """diffusers' sde-dpmsolver++ of order 3 in its words; ``half`` is -0.5 as released, +0.5 as k-diffusion has it."""
    old: list[Any] = []
    for i, (s, t) in enumerate(itertools.pairwise(knots)):
        m0, h = x0_at(x, i), t.lam - s.lam
        x = (t.sigma / s.sigma * math.exp(-h)) * x + (t.alpha * (1.0 - math.exp(-2.0 * h))) * m0
        d1_weight = t.alpha * ((1.0 - math.exp(-2.0 * h)) / (-2.0 * h) + 1.0)
        if i >= 2:
            h0, h1 = s.lam - knots[i - 1].lam, knots[i - 1].lam - knots[i - 2].lam
            r0, r1 = h0 / h, h1 / h
            a, b = (m0 - old[-1]) / r0, (old[-1] - old[-2]) / r1
            x = x + d1_weight * (a + (r0 / (r0 + r1)) * (a - b))
            x = x + t.alpha * ((1.0 - math.exp(-2.0 * h) - 2.0 * h) / (2.0 * h) ** 2 + half) * (a - b) / (r0 + r1)
        elif i == 1:
            x = x + d1_weight * (m0 - old[-1]) * h / (s.lam - knots[i - 1].lam)
        x = x + t.sigma * math.sqrt(1.0 - math.exp(-2.0 * h)) * normals[i]
        old.append(m0)
    return x


def variance_error(loop, knots, data=0.3):
    """(error of the mean, error of the variance) of an affine loop on N(.5, data), started from the exact law, exactly."""
    n = len(knots) - 1
    spread = [k.alpha**2 * data + k.sigma**2 for k in knots]
    x0_at = lambda x, i: 0.5 + knots[i].alpha * data / spread[i] * (x - knots[i].alpha * 0.5)  # noqa: E731
    x = np.zeros(n + 2)
    x[1] = 1.0
    normals = np.zeros((n, n + 2))
    normals[np.arange(n), 2 + np.arange(n)] = 1.0
    end = loop(x0_at, x, knots, normals)
    gain, noise = end[1] - end[0], end[2:] - end[0]
    mean = end[0] + gain * knots[0].alpha * 0.5
    return mean - knots[-1].alpha * 0.5, gain**2 * spread[0] + float(noise @ noise) - spread[-1]


def test_diffusers_sde_order_three_has_the_wrong_sign(diffusers):
    """The weight of the second difference is -phi_3 = (1 - e^{-2h} - 2h)/(2h)^2 + 1/2, of size h/3. As released it has - 1/2
    and tends to -1. Ours is the one that k-diffusion has, and, with the factor two, the integral.
    """
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        solver_order=3,
        solver_type="heun",
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(20)
    path = path_of(scheduler)
    times = index_times(path, scheduler, 1.0 / 1000.0)
    score = Score(indexed_network, path, "eps", label=looked_up(times, scheduler))
    x, knots = START.float(), path.knots(times)
    theirs = run_diffusers(scheduler, indexed_network, x, lambda k: {"variance_noise": NORMALS[k].float()})

    def x0_at(x, i):
        label = torch.full((len(x),), 1000.0 * knots[i].t - 1.0, dtype=torch.float64)
        return (x - knots[i].sigma * indexed_network(x, label)) / knots[i].alpha

    released, repaired = (sde_order_three(x0_at, x.double(), knots, NORMALS, half) for half in (-0.5, 0.5))
    assert float((released - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())
    mine = ours("dpmpp_3m_sde_published", score, x, times, eta=1.0)
    assert distance(mine, repaired) <= 1e-4
    assert distance(mine, theirs) > 1e-2
    vp = VP()
    for n in (20, 40, 80):
        knots = vp.knots(warped_grid(vp, n, -3.0, 3.0))
        wrong, right = (variance_error(lambda *a, half=half: sde_order_three(*a, half), knots)[1] for half in (-0.5, 0.5))
        assert abs(wrong) > 5 * abs(right), (n, wrong, right)


@pytest.mark.parametrize("order", [2, 3])
def test_diffusers_deis(diffusers, order):
    """Its "logrho" is the polynomial in lambda."""
    scheduler = diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=False)
    scheduler.set_timesteps(10)
    path = path_of(scheduler)
    times = index_times(path, scheduler, 1.0 / 1000.0)
    score = Score(indexed_network, path, "eps", label=looked_up(times, scheduler))
    x = START.float()
    theirs = run_diffusers(scheduler, indexed_network, x)
    assert distance(ours(f"deis_lam_{order}", score, x, times), theirs) <= 5e-5
    assert distance(ours(f"deis_rho_{order}", score, x, times), theirs) > 1e-3


@pytest.mark.parametrize("order", [2, 3, 4])
def test_diffusers_lms(diffusers, order):
    """Up to the last step, which ends at sigma = 0. Its quadrature keeps four digits."""
    scheduler = diffusers.LMSDiscreteScheduler()
    scheduler.set_timesteps(10)
    path = path_of(scheduler)
    times = sigma_times(path, scheduler)
    score = Score(indexed_network, path, "eps", label=looked_up(times, scheduler))
    x = START.float()
    scale = float(path.alpha(times[0]))
    y = x / scale
    for t in scheduler.timesteps[:-1]:
        label = torch.full((len(x),), float(t))
        y = scheduler.step(indexed_network(scheduler.scale_model_input(y, t), label), t, y, order=order).prev_sample
    mine = ours(f"lms_{order}", score, x, times[:-1])
    assert distance([m / float(path.alpha(times[-2])) for m in mine], y) <= 1e-4


@pytest.mark.parametrize("order", [2, 3])
def test_diffusers_unip(diffusers, order):
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order, disable_corrector=list(range(20)), final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(10)
    path = path_of(scheduler)
    times = index_times(path, scheduler, 1.0 / 1000.0)
    score = Score(indexed_network, path, "eps", label=looked_up(times, scheduler))
    x = START.float()
    assert distance(ours(f"unip_{order}", score, x, times), run_diffusers(scheduler, indexed_network, x)) <= SINGLE


@pytest.mark.parametrize("skip", [False, True], ids=["pndm", "plms"])
def test_diffusers_pndm(diffusers, skip):
    """Up to the last step but one: the last ones do not move, as both times are the table's first entry."""
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=skip)
    scheduler.set_timesteps(10)
    path = path_of(scheduler)
    times = path.time_of(torch.arange(900.0, -1.0, -100.0, dtype=torch.float64)).tolist()
    score = Score(indexed_network, path, "eps", label=lambda t: 1000.0 * t - 1.0)
    x = y = START.float()
    for t in scheduler.timesteps[:-1]:
        y = scheduler.step(indexed_network(y, torch.full((len(y),), float(t))), t, y).prev_sample
    name = "plms" if skip else "pndm"
    assert trace(name, path, times).nfe == len(scheduler.timesteps) - 1
    assert distance(ours(name, score, x, times), y) <= 5e-5


@pytest.mark.parametrize("n", [3, 9])
def test_diffusers_ipndm(diffusers, n):
    """On levels of our choice, up to the last step, which ends at sigma = 0. Its model output is v."""
    path = VP()
    times = np.linspace(0.9, 0.1, n + 1).tolist()
    sigmas = path.sigma(times).tolist()
    scheduler = diffusers.IPNDMScheduler(trained_betas=[*sigmas, 0.0])
    scheduler.set_timesteps(n + 1)
    labels = scheduler.timesteps.double()

    def look(t):
        return labels[(t.reshape(-1, 1) - torch.tensor(times, dtype=torch.float64)).abs().argmin(1)].reshape(t.shape)

    score = Score(network, path, "v", label=look)
    x = y = START.float()
    for t in scheduler.timesteps[:n]:
        y = scheduler.step(network(y, torch.full((len(y),), float(t))), t, y).prev_sample
    assert distance(ours("ipndm_4", score, x, times), y) <= 5e-5


# --- SA-Solver --------------------------------------------------------------------------------------------------------


def sa_solver(x0_at, x, knots, normals, predictor, corrector, tau, shortcut):
    """Xue et al. (2023), data prediction, PEC, in the words of the released code; ``shortcut`` is its change of two-node
    weights: h^2/2 for the integral (r h - 1 + e^{-r h}) / r^2. tau is a function of a knot.
    """

    def moment(order, a, b, r):
        """int_a^b e^{r u} u^order du."""
        return quadrature(lambda u: np.exp(r * (u - b)) * u**order, a, b)

    def coefficients(s, t, nodes, r):
        lams = [k.lam - s.lam for k in nodes]
        h = t.lam - s.lam
        out = []
        for j, at in enumerate(lams):
            poly = np.poly1d([1.0])
            for i, other in enumerate(lams):
                if i != j:
                    poly = poly * np.poly1d([1.0, -other]) / (at - other)
            out.append(sum(c * moment(m, 0.0, h, r) for m, c in enumerate(poly.coeffs[::-1])))
        return out

    def update(x, s, t, nodes, values, z, arrived):
        r, h = 1.0 + tau(s) ** 2, t.lam - s.lam
        weights = coefficients(s, t, nodes, r)
        if shortcut and len(nodes) == 2:
            extra = h * h / 2.0 - (h * r - 1.0 + math.exp(-r * h)) / r**2
            extra = extra / h if arrived else extra / (s.lam - nodes[1].lam)
            weights = [weights[0] + extra, weights[1] - extra]
        x = math.exp(-(tau(s) ** 2) * h) * (t.sigma / s.sigma) * x
        x = x + sum(r * t.alpha * w * v for w, v in zip(weights, values, strict=True))
        return x + t.sigma * math.sqrt(1.0 - math.exp(-2.0 * tau(s) ** 2 * h)) * z

    values: list[Any] = []
    before = None
    for i, (s, t) in enumerate(itertools.pairwise(knots)):
        m0 = x0_at(x, i)
        if i:
            n = min(corrector, i + 1)
            x = update(before, knots[i - 1], s, knots[i : i - n : -1] if i >= n else knots[i::-1], [m0, *values][:n],
                       normals[i - 1], True)  # fmt: skip
        values = [m0, *values]
        n = min(predictor, i + 1)
        before = x
        x = update(x, s, t, [knots[i - j] for j in range(n)], values[:n], normals[i], False)
    return x


SA = [(3, 4), (2, 2), (1, 2), (2, 3)]


@pytest.mark.parametrize(("predictor", "corrector"), SA)
@pytest.mark.parametrize("tau", [0.0, 1.0, 0.5, "interval"])
def test_sa_solver_is_its_formula(predictor, corrector, tau):
    """Also with tau a function of time: one on a stretch and zero elsewhere, as the paper uses."""
    path, times = VP(), LADDER3[1:]
    eta = (lambda t: torch.where((t > 0.3) & (t < 0.65), 1.0, 0.0)) if tau == "interval" else tau
    level = lambda k: float(eta(torch.tensor(k.t, dtype=torch.float64))) if callable(eta) else eta  # noqa: E731
    score = Score(network, path, "x0", label=lambda t: t)
    knots = path.knots(times)
    normals = NORMALS if tau != "interval" else None
    if normals is None:  # ours asks for a normal only where there is noise
        stored = iter(NORMALS)
        normals = [next(stored) if level(k) else torch.zeros_like(START) for k in knots]
    loop = lambda shortcut: sa_solver(  # noqa: E731
        lambda x, i: network(x, times[i]), START, knots, normals, predictor, corrector, level, shortcut
    )
    mine = ours(AdamsMoulton(predictor, corrector), score, START, times, eta=eta)
    assert distance(mine, loop(False)) <= 1e-11
    assert distance(mine, loop(True)) > 1e-4


@pytest.mark.parametrize(("predictor", "corrector"), SA)
def test_diffusers_sa_solver(diffusers, monkeypatch, predictor, corrector):
    """SASolverScheduler is that formula with its change of the two-node weights."""
    stored = iter(NORMALS)
    monkeypatch.setattr("diffusers.schedulers.scheduling_sasolver.randn_tensor", lambda *a, **k: next(stored).float())
    scheduler = diffusers.SASolverScheduler(
        predictor_order=predictor, corrector_order=corrector, lower_order_final=False, tau_func=lambda t: torch.tensor(1.0)
    )
    scheduler.set_timesteps(10)
    path = path_of(scheduler)
    times = index_times(path, scheduler, 1.0 / 1000.0)
    knots = path.knots(times)
    x = START.float()
    theirs = run_diffusers(scheduler, indexed_network, x)

    def x0_at(x, i):
        label = torch.full((len(x),), 1000.0 * knots[i].t - 1.0, dtype=torch.float64)
        return (x - knots[i].sigma * indexed_network(x, label)) / knots[i].alpha

    loop = sa_solver(x0_at, x.double(), knots, NORMALS, predictor, corrector, lambda k: 1.0, True)
    assert float((loop - theirs).abs().max()) <= 5e-3 * float(theirs.abs().max())  # their float32 integrals of e^{2 lambda}


def test_the_shortcut_of_released_sa_solver_spoils_the_variance_at_few_steps():
    """Orders 2 and 2, tau = 1, ten Karras steps: the changed weights put more on the new prediction than the whole step weighs.
    Ours are the integrals; both are of weak order two, so that the difference goes away on fine grids.
    """
    path = VP()

    def errors(n):
        ramp = np.linspace(0.0, 1.0, n + 1)
        rho = (80.0 ** (1 / 7) + ramp * (0.02 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
        knots = [path.knot_at(-math.log(v)) for v in rho]
        loops = (lambda *a, cut=cut: sa_solver(*a, 2, 2, lambda k: 1.0, cut) for cut in (True, False))
        return [variance_error(loop, knots)[1] for loop in loops]

    shortcut, exact = errors(10)
    assert abs(shortcut) > 0.3
    assert abs(exact) < 0.1 * abs(shortcut)
    fine = [abs(v) for v in errors(80)]
    assert max(fine) < 0.02


@pytest.mark.parametrize("mode", ["PEC", "PECE"])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 2), (2, 2), (2, 3), (3, 4)])
def test_weak_order_of_sa_solver(mode, predictor, corrector):
    solver = AdamsMoulton(predictor, corrector, mode=mode)
    result = convergence(solver, "weak", orders.gaussian(VP()), (320, 640, 1280), orders.LOW, orders.HIGH, eta=1.0)
    assert abs(result.measured - 2.0) <= 0.1, result


# --- starts ---------------------------------------------------------------------------------------------------------------

FINE = [
    (Started(UniPC(4, lower_final=False), ExponentialRK(KROGSTAD, "x0")), 5, (160, 320)),
    (Started(Multistep(4, "velocity", "t"), RungeKutta(KUTTA3)), 4, (160, 320)),
    (Started(Multistep(4, "eps", "rho"), RungeKutta(KUTTA3, "rho")), 4, (320, 640)),
    (Started(Multistep(4, "x0"), ExponentialRK(two_stage(), "x0")), 3, (160, 320)),  # one order too few
    (Started(Multistep(3, "x0"), ExponentialRK(EXPONENTIAL_EULER, "x0")), 2, (160, 320)),
    (Started(Multistep(4, "x0"), RungeKutta(RK4, "chi"), 2), 4, (160, 320)),  # two steps: the third has three nodes
    (Started(Multistep(4, "x0"), RungeKutta(RK4, "chi"), 1), 3, (160, 320)),
    (Started(Multistep(3, "x0", lower_final=True), RungeKutta(RK4, "chi")), 2, (160, 320)),
    (Started(UniPC(3), ExponentialRK(three_stage(), "x0")), 2, (160, 320)),
    (Started(AdamsMoulton(3, 4), ExponentialRK(three_stage(), "x0")), 4, (80, 160)),
    (GradedStart(Multistep(4, "x0")), 4, (80, 160)),
    (GradedStart(Multistep(3, "x0"), levels=2), 2, (320, 640)),
]


@pytest.mark.parametrize(("solver", "order", "steps"), FINE)
def test_order_of_starts(solver, order, steps):
    """The starter's order plus one, the method's inside, or what a short or lowered history leaves: the least of them."""
    assert solver.order == order
    path = VP()
    errors = [orders.mixture_error(table(solver, path, warped_grid(path, n, orders.LOW, orders.HIGH)), path) for n in steps]
    assert abs(math.log2(errors[0] / errors[1]) - order) <= 0.15, errors


def test_a_graded_start_of_fixed_levels_has_a_smaller_constant():
    path = VP()
    error = lambda s: flow_error(table(s, path, warped_grid(path, 640, orders.LOW, orders.HIGH)), orders.gaussian(path))  # noqa: E731
    plain, two = error(Multistep(3, "x0")), error(GradedStart(Multistep(3, "x0"), 2))
    assert 10.0 < plain / two < 22.0  # 4^2 = 16


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 11, 12, 13])
def test_network_calls_of_starts_are_counted(n):
    path = VP()
    times = path.time(torch.linspace(-1.0, 2.1, n + 1, dtype=torch.float64)).tolist()
    for name, calls in (("dpmpp_3m_started", 2), ("dpmpp_4m_started", 3), ("pndm", 4), ("unipc_3_started", 3)):
        solver: Any = SOLVERS[name].solver
        first = min(solver.steps, n)
        assert trace(name, path, times).nfe == n - first + calls * first
        if n >= solver.steps:
            assert trace(name, path, times).nfe == n + solver.extra
    assert trace("plms", path, times).nfe == n + 1
    assert trace("abm_4_started", path, times).nfe == 2 * n + min(n, 3)
    graded: Any = GradedStart(Multistep(3, "x0"), levels=3)
    assert table(graded, path, times).nfe == n + graded.extra == n + 3
    lowered = table(GradedStart(Multistep(3, "x0", lower_final=True), 3), path, times)
    made = {row.out: row for row in lowered.rows if isinstance(row, Lin)}
    used = [len(made[r].terms) - 1 for r in lowered.states[1:]]
    assert used == [min(3, n - i) for i in range(n)]
    levels = SOLVERS["dpmpp_3m_graded"].solver.divisions(3.1 / n)  # pyright: ignore
    assert trace("dpmpp_3m_graded", path, times).nfe == n + levels
    assert levels == 3 + max(0, math.ceil(0.5 * math.log2(n / 3.1)))


def test_the_starters_prediction_joins_the_history_and_is_not_repeated():
    """A started two-step method by hand: midpoint in lambda, then the line through both predictions."""
    path, times = VP(), [0.8, 0.6, 0.45]
    score = Score(network, path, "x0", label=lambda t: t)
    a, b, c = path.knots(times)
    h = b.lam - a.lam
    m = path.knot_at(a.lam + 0.5 * h)
    d0 = network(START, a.t)
    mid = m.sigma / a.sigma * START - m.alpha * math.expm1(-0.5 * h) * d0
    d1 = network(mid, m.t)
    x = b.sigma / a.sigma * START - b.alpha * math.expm1(-h) * d0 + b.alpha * h * phi(2, -h) * 2.0 * (d1 - d0)
    e, k = network(x, b.t), c.lam - b.lam
    x = c.sigma / b.sigma * x - c.alpha * math.expm1(-k) * e + c.alpha * k * phi(2, -k) * (k / h) * (e - d0)
    solver = Started(Multistep(2, "x0"), ExponentialRK(two_stage(), "x0"))
    assert distance(ours(solver, score, START, times), x) <= 1e-9
    assert table(solver, path, times).nfe == 3


def test_a_start_from_pure_noise_is_the_methods_own():
    """At alpha = 0 lambda is infinite: no starter could do better than the first-order step there, which costs one call."""
    for name in ("dpmpp_3m_started", "dpmpp_3m_graded", "unipc_3_started", "dpmpp_3m", "unipc_3_exact"):
        for n in (1, 2, 3, 7):
            times = np.linspace(1.0, 0.0, n + 1).tolist()
            score = Score(network, Linear(), "velocity", label=lambda t: t)
            for out in ours(name, score, START, times):
                assert bool(out.isfinite().all())
    plan = trace("dpmpp_3m_started", Linear(), np.linspace(1.0, 0.1, 9).tolist())
    assert plan.nfe == 8 + 2
    assert [k.t for k in plan.knots][:2] == list(plan.times[:2])


ENCODE = ["adams_3_started", "abm_4", "dpmpp_4m_started", "deis_t_3_started", "unipc_3_exact", "pndm", "ipndm_4"]


@pytest.mark.parametrize("name", ENCODE)
def test_orders_hold_in_the_encode_direction(name):
    path, solver = VP(), SOLVERS[name].solver
    errors = []
    for n in (80, 160):
        plan = table(solver, path, warped_grid(path, n, orders.LOW, orders.HIGH)[::-1])
        errors.append(flow_error(plan, orders.gaussian(path)))
    assert abs(math.log2(errors[0] / errors[1]) - float(solver.order or 0)) <= 0.3, errors  # pyright: ignore


@pytest.mark.parametrize(
    "name", ["dpmpp_3m", "dpmpp_4m", "deis_rho_4", "unipc_5", "ipndm_4", "adams_4", "sa_solver", "dpmpp_3m_graded"]
)
@settings(max_examples=10)
@given(path=paths(), n=st.sampled_from([1, 2, 3, 5, 6, 7]), data=st.data())
def test_any_path_and_number_of_steps_is_finite(name, path, n, data):
    from solvers.testing import times

    grid = [0.97 * t for t in data.draw(times(path, n, end=0.02 * path.T))]
    score = Score(network, path, "x0", label=lambda t: t / path.T)
    x = START * float(path.sigma(grid[0]))
    for out in ours(name, score, x, grid, eta=SOLVERS[name].eta):
        assert bool(out.isfinite().all())


@pytest.mark.parametrize("name", ["dpmpp_3m_lower", "dpmpp_4m_lower", "sa_lower", "unip_4", "unipc_6"])
def test_lower_final_lowers_step_by_step(name):
    """The last step uses one prediction, the one before it two, and so on: read off the table."""
    solver: Any = {
        "dpmpp_3m_lower": Multistep(3, "x0", lower_final=True),
        "dpmpp_4m_lower": Multistep(4, "x0", lower_final=True),
        "sa_lower": AdamsMoulton(4, 4, lower_final=True),
        "unip_4": SOLVERS["unip_4"].solver,
        "unipc_6": SOLVERS["unipc_6"].solver,
    }[name]
    plan = table(solver, VP(), np.linspace(0.9, 0.1, 10).tolist())
    made = {row.out: row for row in plan.rows if isinstance(row, Lin)}
    last = made[plan.states[-1]]
    assert len(last.terms) == 2  # the state and one prediction
    if isinstance(solver, Multistep):
        before = made[plan.states[-2]]
        assert len(before.terms) == 3


# --- arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (lambda: Multistep(3, "velocity"), "basis='t'"),
        (lambda: Multistep(3, "velocity", "lam"), "basis='t'"),
        (lambda: Multistep(3, "x0", rule="midpoint"), "two-step"),
        (lambda: Multistep(2, "x0", rule="published_3m"), "three-step"),
        (lambda: Multistep(3, "x0", "rho", "published_3m"), "three-step"),
        (lambda: Multistep(3, "x0", rule="fixed"), "rule"),
        (lambda: FixedWeights(()), "at least"),
        (lambda: FixedWeights(((1.0,), (1.5, -0.4))), "sum is 1"),
        (lambda: FixedWeights(((1.0,), (1.5, -0.5, 0.0))), "2 numbers"),
        (lambda: UniPC(0), "steps"),
        (lambda: UniPC(3, "vary_coeff"), "'exact'"),
        (lambda: AdamsMoulton(0, 2), "predictor"),
        (lambda: AdamsMoulton(1, 1), "corrector"),
        (lambda: AdamsMoulton(2, 2, "velocity"), "basis='t'"),
        (lambda: AdamsMoulton(2, 2, mode="PE"), "PECE"),
        (lambda: Started(RungeKutta(HEUN), RungeKutta(HEUN)), "multistep"),
        (lambda: Started(Multistep(2, "x0"), RungeKutta(HEUN), -1), "first"),
        (lambda: GradedStart(RungeKutta(HEUN)), "multistep"),
        (lambda: GradedStart(Multistep(2, "x0"), -1), "levels"),
    ],
)
def test_wrong_arguments_are_named(wrong, word):
    with pytest.raises(InputError, match=word.replace("(", r"\(")):
        wrong()


def test_steps_that_have_no_limit_are_refused():
    with pytest.raises(PathError, match="alpha"):
        trace("ipndm_4", Linear(), [1.0, 0.5])
    with pytest.raises(PathError, match="infinite"):
        trace("adams_4", VP(), [0.0, 0.5])
    with pytest.raises(PathError, match="sigma"):
        trace("dpmpp_3m", VP(), [0.0, 0.5])
    with pytest.raises(PathError, match="alpha"):
        trace("deis_rho_3", Linear(), [1.0, 0.0])


def test_declared_orders_of_fixed_weights_follow_from_the_weights():
    assert [FixedWeights(ADAMS_BASHFORTH[:k]).order for k in (1, 2, 3, 4)] == [1.0, 2.0, 2.0, 2.0]
    assert FixedWeights(((1.0,), (2.0, -1.0))).order == 1.0
    assert PseudoRungeKutta().order == 2.0


def test_noise_of_a_corrected_step_is_drawn_once():
    for name, calls in (("sa_solver", 1), ("sa_solver_pece", 2)):
        plan = trace(name, VP(), np.linspace(0.9, 0.1, 9).tolist())
        assert plan.draws == 8
        assert plan.nfe == 8 * calls
    plan = trace("sa_solver", VP(), warped_grid(VP(), 40, -2.0, 2.0))
    law = exact_law(plan, Gaussian(VP(), torch.zeros(1, dtype=torch.float64), var=0.3))
    assert law.w2(plan.times[-1]) < 2e-3


def test_plain_loop_and_table_agree_for_wrapped_problems():
    score = Score(network, VP(), "x0", label=lambda t: t)
    times = np.linspace(0.9, 0.1, 8).tolist()
    problem = ReverseSDE(VP(), score, 1.0)
    a, b = (integrate("sa_solver_pece", problem, START, times, noise=Stored(NORMALS), traced=t).x for t in (True, False))
    assert float((a - b).abs().max()) <= 1e-12 * float(a.abs().max())


def test_tabulated_paths_interpolate_in_their_own_time():
    """DEIS in t on a table of betas: the weights of a full step against the plain sum of quadrature over the table's t."""
    path = Tabulated.linear(100)
    times = [0.9, 0.77, 0.6, 0.41]
    s, t = path.knots(times[2:])
    nodes = path.knots(times[:3])[::-1]
    weights = exact_weights(path, s, t, nodes, "eps", "t", 1.0)
    fine = np.linspace(s.t, t.t, 200_001)
    lam = path.lam(fine.tolist()).numpy()
    middle, width = 0.5 * (fine[1:] + fine[:-1]), np.diff(lam)
    kernel = np.exp(t.lam - 0.5 * (lam[1:] + lam[:-1])) * width
    at = [k.t for k in nodes]
    for j in range(3):
        value = np.prod([(middle - at[i]) / (at[j] - at[i]) for i in range(3) if i != j], axis=0)
        assert weights[j] == pytest.approx(float(np.sum(kernel * value)), rel=1e-4, abs=1e-5)
