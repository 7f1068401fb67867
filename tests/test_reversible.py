"""Exactly reversible solvers: there and back to rounding, their published formulas, and the carry at the boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.orders import HIGH, LOW, PATHS, mixture_error
from benchmarks.truth import Mixture1D
from scores import GaussianMixture, Score
from sde import EDM, VP, Linear
from sde.errors import BudgetWarning, InputError, NetworkError, PathError
from solvers import encode, integrate, sample, trace
from solvers.base import Carry, Evaluator
from solvers.convergence import warped_grid
from solvers.exponential import Multistep
from solvers.plan import trace_solver
from solvers.reversible import BELM, ReversibleHeun
from solvers.testing import paths, times

SOLVERS = [
    ReversibleHeun(),
    ReversibleHeun("rho"),
    ReversibleHeun("chi"),
    ReversibleHeun("lawson_x0"),
    BELM(),
    BELM(1.0),
    BELM(0.96),
]


def mixture(path):
    means = torch.tensor([[1.0, 0.5], [-0.8, 0.1]], dtype=torch.float64)
    return GaussianMixture(path, [0.4, 0.6], means, torch.tensor([0.1, 0.02], dtype=torch.float64))


def span(path):
    """start= where the path's own is at alpha = 0."""
    return {"start": 0.99} if float(path.alpha(path.T)) == 0.0 else {}


def gap(a, b):
    return float((a - b).abs().max())


def network(x, t):
    """Not the score of any law, and far from linear."""
    return torch.sin(3.0 * x) + 0.2 * x * x / (1.0 + x * x)


def no_noise(s, t):
    raise AssertionError("a normal was drawn")


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_encoding_and_decoding_gives_the_data_back(solver, path):
    score, ends = mixture(path), span(path)
    x = score.sample(8, seed=3).double()
    there = encode(score, x, solver=solver, steps=20, **ends)
    back = sample(score, x=there.x, carry=there.carry, solver=solver, steps=20, **ends)
    assert gap(back.x, x) <= 1e-9
    again = encode(score, back.x, carry=back.carry, solver=solver, steps=20, **ends)
    assert gap(again.x, there.x) <= 1e-9 * (1.0 + float(there.x.abs().max()))
    assert there.nfe == there.net_evals == (21 if isinstance(solver, ReversibleHeun) else 20)
    assert back.nfe == again.nfe == (20 if isinstance(solver, ReversibleHeun) else 19)
    without = sample(score, x=there.x, solver=solver, steps=20, **ends)
    assert gap(without.x, x) > 1e-7  # the other half of the state is what makes it exact


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("solver", [ReversibleHeun(), BELM(), BELM(1.0)], ids=str)
def test_sampling_and_encoding_gives_the_noise_back(solver, path):
    score, ends = mixture(path), span(path)
    out = sample(score, (8, 2), solver=solver, steps=20, dtype=torch.float64, trajectory=True, **ends)
    there = encode(score, out.x, carry=out.carry, solver=solver, steps=20, trajectory=True, **ends)
    size = float(out.trajectory[0].abs().max())
    assert gap(there.x, out.trajectory[0]) <= 1e-9 * size
    assert gap(there.trajectory.flip(0), out.trajectory) <= 1e-9 * size  # every state on the way


@settings(max_examples=25)
@given(data=st.data(), path=paths(user_made=False), which=st.integers(0, len(SOLVERS) - 1), n=st.integers(1, 6))
def test_any_path_any_grid_any_network(data, path, which, n):
    low, high = path.knots([path.t_min, 0.6 * path.T])
    assume(low.alpha > 0.0 and low.sigma > 0.0 and high.alpha > 1e-2)
    grid = [0.6 * t for t in data.draw(times(path, n, end=path.t_min / 0.6))]
    assume(all(a - b > 1e-3 * path.T for a, b in pairwise(grid)))
    score, solver = Score(network, path, "x0"), SOLVERS[which]
    x = torch.linspace(-2.0, 2.0, 5, dtype=torch.float64)[:, None]
    out = integrate(solver, score, x, grid, trajectory=True)
    back = integrate(solver, score, out.x, grid[::-1], carry=out.carry)
    size = 1.0 + float(out.trajectory.abs().max())
    rho = [k.sigma / k.alpha for k in path.knots(grid)]
    steps = [abs(b - a) for a, b in pairwise(rho)]
    growth = (max(steps) / min(steps)) ** 2 * max(rho) / min(rho)
    assert gap(back.x, x) <= 1e-13 * size * (1.0 + growth) * 10.0**n


def test_a_run_in_two_parts_is_a_run():
    """The carry goes on in the same direction too."""
    path = VP()
    grid = warped_grid(path, 12)
    x = torch.linspace(-2.0, 2.0, 6, dtype=torch.float64)[:, None]
    score = Score(network, path, "x0")
    for solver in SOLVERS:
        whole = integrate(solver, score, x, grid)
        first = integrate(solver, score, x, grid[:6])
        rest = integrate(solver, score, first.x, grid[5:], carry=first.carry)
        assert torch.equal(rest.x, whole.x)
        assert first.nfe + rest.nfe == whole.nfe


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_table_is_the_march(solver):
    path = VP()
    grid, x = warped_grid(path, 15), torch.linspace(-2.0, 2.0, 6, dtype=torch.float64)[:, None]
    score = Score(network, path, "v")
    out = integrate(solver, score, x, grid, trajectory=True)
    plan = trace(solver, path, grid)
    assert plan.nfe == out.nfe
    assert gap(plan.run(score, x), out.x) <= 1e-12 * (1.0 + float(out.trajectory.abs().max()))


def test_half_precision_and_gradients():
    path = VP()
    score = Score(network, path, "x0")
    x = torch.linspace(-2.0, 2.0, 6)[:, None]
    out = integrate("belm", score, x.half(), [0.9, 0.6, 0.3, 0.1])
    assert out.x.dtype == torch.float16
    assert out.carry.dtype == torch.float32
    out = integrate("belm", score, x, [0.9, 0.6, 0.3, 0.1])
    back = integrate("belm", score, out.x, [0.1, 0.3, 0.6, 0.9], carry=out.carry)
    assert gap(back.x, x) <= 1e-4
    y = x.double().requires_grad_()
    out = integrate("reversible_heun", score, y, [0.9, 0.6, 0.3], grad=True)
    (slope,) = torch.autograd.grad(out.x.sum(), y)
    run = lambda v: integrate("reversible_heun", score, v, [0.9, 0.6, 0.3]).x  # noqa: E731
    assert gap(slope, (run(y + 1e-6) - run(y - 1e-6)) / 2e-6) <= 1e-6 * (1.0 + float(slope.abs().max()))


# --- published formulas -----------------------------------------------------------------------------------------------


def test_reversible_heun_is_the_published_algorithm():
    """Kidger et al. 2021, algorithms 1 and 2 without noise, on dx/dt of the probability flow."""
    path = Linear()
    score = Score(network, path, "velocity")
    grid = [0.9, 0.7, 0.4, 0.35, 0.1]
    x = torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)[:, None]
    z, other, drift = x, x, network(x, None)
    for t, u in pairwise(grid):
        h = u - t
        other = 2 * z - other + drift * h
        new = network(other, None)
        z, drift = z + 0.5 * (drift + new) * h, new
    out = integrate("reversible_heun", score, x, grid)
    assert gap(out.x, z) <= 1e-14
    for u, t in zip(grid[::-1], grid[-2::-1], strict=False):  # algorithm 2
        h = u - t
        before = 2 * z - other - drift * h
        old = network(before, None)
        z, other, drift = z - 0.5 * (old + drift) * h, before, old
    assert gap(z, x) <= 1e-13


@pytest.mark.parametrize("path", [VP(), EDM()], ids=["VP", "EDM"])
def test_belm_is_the_published_formula(path):
    """O-BELM (Wang et al. 2024): with y = x/alpha, s = sigma/alpha, steps h_i = s_i - s_{i-1} of the sampling index,

    y_{i-1} = h_i^2/h_{i+1}^2 y_{i+1} + (h_{i+1}^2 - h_i^2)/h_{i+1}^2 y_i - h_i (h_i + h_{i+1})/h_{i+1} eps(x_i, i)
    """
    score = Score(network, path, "eps")
    knots = path.knots([0.9, 0.7, 0.4, 0.35, 0.1])
    s = [k.sigma / k.alpha for k in knots]
    x = torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)[:, None]
    y = [x / knots[0].alpha]
    y.append(y[0] + (s[1] - s[0]) * network(x, None))  # DDIM
    for n in range(1, 4):
        h, k = s[n] - s[n + 1], s[n - 1] - s[n]
        eps = network(knots[n].alpha * y[n], None)
        y.append(h**2 / k**2 * y[n - 1] + (k**2 - h**2) / k**2 * y[n] - h * (h + k) / k * eps)
    out = integrate("belm", score, x, [k.t for k in knots])
    assert gap(out.x, knots[-1].alpha * y[-1]) <= 1e-12 * (1.0 + float(out.x.abs().max()))


@pytest.mark.parametrize("gamma", [1.0, 0.96, 0.5])
def test_bdia_is_the_published_formula(gamma):
    """BDIA-DDIM (Zhang et al. 2023): z_{i-1} = gamma z_{i+1} - gamma (D_i z_i + B_i eps) + (a_i z_i + b_i eps), with DDIM's a,
    b down and D, B up from z_i; and the way up is its solution for z_{i+1}.
    """
    path = VP()
    score = Score(network, path, "eps")
    knots = path.knots([0.9, 0.7, 0.4, 0.35, 0.1])

    def ddim(z, a, b):
        return b.alpha / a.alpha * z + (b.sigma - a.sigma * b.alpha / a.alpha) * network(z, None)

    z = [torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)[:, None]]
    z.append(ddim(z[0], knots[0], knots[1]))
    for n in range(1, 4):
        z.append(gamma * (z[n - 1] - ddim(z[n], knots[n], knots[n - 1])) + ddim(z[n], knots[n], knots[n + 1]))
    out = integrate(BELM(gamma), score, z[0], [k.t for k in knots])
    assert gap(out.x, z[-1]) <= 1e-12
    w = [z[4], z[3]]
    for n in (3, 2, 1):
        w.append((w[-2] - ddim(w[-1], knots[n], knots[n + 1])) / gamma + ddim(w[-1], knots[n], knots[n - 1]))
    back = integrate(BELM(gamma), score, out.x, [k.t for k in knots][::-1], carry=out.carry)
    assert gap(back.x, w[-1]) <= 1e-11


def test_the_first_step_and_its_order():
    path = VP()
    x = torch.ones(2, 1, dtype=torch.float64)
    score = Score(network, path, "x0")
    for solver in (BELM(), BELM(0.5)):
        assert gap(integrate(solver, score, x, [0.9, 0.5]).x, integrate(Multistep(1, "eps"), score, x, [0.9, 0.5]).x) <= 1e-14


@pytest.mark.parametrize(
    ("solver", "order"),
    [(ReversibleHeun("rho"), 2.0), (ReversibleHeun("chi"), 2.0), (BELM(), 2.0), (BELM(1.0), 2.0), (BELM(0.5), 1.0)],
)
@pytest.mark.parametrize("label", PATHS)
def test_orders_of_those_that_are_no_rows_too(solver, order, label):
    path = PATHS[label]
    assert solver.order == order
    errors = [mixture_error(trace_solver(solver, path, warped_grid(path, n, LOW, HIGH), 0.0, "it"), path) for n in (160, 320)]
    assert abs(math.log2(errors[0] / errors[1]) - order) <= 0.15


@dataclass(frozen=True)
class Weighted(BELM):
    """BELM with a wrong weight."""

    factor: float = 1.0

    def _weight(self, r, s, t):
        return self.factor * super()._weight(r, s, t)


def test_where_the_two_step_methods_are_of_order_one():
    """With any other weight, and on grids whose steps alternate, where the parasitic root meets the principal one."""
    path = VP()

    def slope(solver, uneven=0.0):
        errors = []
        for n in (160, 320):
            lams = [LOW + (HIGH - LOW) * (i + uneven * (i % 2)) / n for i in range(n + 1)]
            errors.append(mixture_error(trace_solver(solver, path, tuple(path.time(lams).tolist()), 0.0, "it"), path))
        return math.log2(errors[0] / errors[1])

    assert abs(slope(BELM()) - 2.0) <= 0.15
    assert abs(slope(Weighted(factor=0.5)) - 1.0) <= 0.15
    for solver in (BELM(), BELM(1.0)):
        assert abs(slope(solver, 0.3) - 1.0) <= 0.15


# --- the boundary -----------------------------------------------------------------------------------------------------


def test_a_carry_belongs_to_its_solver_state_and_time():
    path = VP()
    score = Score(network, path, "x0")
    x = torch.ones(3, 2, dtype=torch.float64)
    there = encode(score, x, solver="belm", steps=5)
    assert isinstance(there.carry, Carry)
    assert "tensor" not in repr(there.carry)
    good = {"solver": "belm", "steps": 5}
    for change, says in (
        ({"solver": "reversible_heun"}, "carry is one of BELM"),
        ({"solver": BELM(1.0)}, "carry is one of BELM"),
        ({"solver": "ddim"}, "'ddim' is not reversible"),
        ({"solver": "ddpm"}, "'ddpm' is not reversible"),
        ({"solver": "dopri5"}, "'dopri5' is not reversible"),
        ({"x": there.x[:2]}, r"a state \(3, 2\)"),
        ({"x": there.x.float()}, "float32"),
        ({"start": 0.9}, "carry is of t = 1, but this run starts at t = 0.9"),
        ({"steps": 6}, "run the same times in reverse"),
        ({"carry": there}, "give the .carry"),
        ({"carry": x}, "carry is a Tensor"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            sample(score, **{"x": there.x, "carry": there.carry, **good, **change})
        assert len(str(caught.value)) < 400
    with pytest.raises(InputError, match="carry is given without a state"):
        sample(score, (3, 2), carry=there.carry, **good)
    with pytest.raises(InputError, match="carry is of t"):
        encode(score, there.x, carry=there.carry, **good)
    assert integrate("ddim", score, x, [0.9, 0.5]).carry is None
    assert sample(score, (0, 2), **good).carry is None


@pytest.mark.parametrize("solver", ["reversible_heun", "belm", "bdia"])
def test_what_has_no_limit_is_refused(solver):
    score = Score(network, Linear(), "velocity")
    x = torch.ones(2, 1, dtype=torch.float64)
    if solver == "reversible_heun":
        out = integrate(solver, score, x, [1.0, 0.5, 0.0])  # a velocity is finite at both ends
        back = integrate(solver, score, out.x, [0.0, 0.5, 1.0], carry=out.carry)
        assert gap(back.x, x) <= 1e-12
        with pytest.raises(PathError, match="start and stop off it"):
            integrate(solver, Score(network, VP(), "eps"), x, [0.5, 0.0])
        with pytest.raises(PathError, match="start elsewhere"):
            integrate(solver, Score(network, VP(), "eps"), x, [0.0, 0.5])
    else:
        for grid in ([1.0, 0.5], [0.5, 1.0]):
            with pytest.raises(PathError, match="just below"):
                integrate(solver, score, x, grid)
        end = integrate(solver, Score(network, VP(), "eps"), x, [0.9, 0.5, 0.0])  # sigma = 0 is a limit like any other
        near = integrate(solver, Score(network, VP(), "eps"), x, [0.9, 0.5, 1e-12])
        assert gap(end.x, near.x) <= 1e-4
        back = integrate(solver, Score(network, VP(), "eps"), end.x, [0.0, 0.5, 0.9], carry=end.carry)
        assert gap(back.x, x) <= 1e-12


def test_few_steps_and_small_budgets():
    path = VP()
    score = Score(network, path, "x0")
    for solver in ("belm", "bdia", "reversible_heun"):
        for steps in (1, 2, 3):
            x = torch.ones(2, 1, dtype=torch.float64)
            there = encode(score, x, solver=solver, steps=steps)
            back = sample(score, x=there.x, carry=there.carry, solver=solver, steps=steps)
            assert gap(back.x, x) <= 1e-9
        assert sample(score, (2, 1), solver=solver, nfe=9).nfe == 9
    with pytest.warns(BudgetWarning):
        out = sample(score, (2, 1), solver="reversible_heun", nfe=1)
    assert (out.nfe, out.carry) == (1, None)


def test_a_step_is_pure_and_a_carry_is_not_used_up():
    path = VP()
    score = Score(network, path, "x0")
    x = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)[:, None]
    for solver in SOLVERS:
        there = encode(score, x, solver=solver, steps=6)
        runs = [sample(score, x=there.x, carry=there.carry, solver=solver, steps=6).x for _ in range(2)]
        assert torch.equal(runs[0], runs[1])
        s, t = path.knots([0.5, 0.4])
        evaluator = Evaluator(score, x)
        first, again = (solver.step(evaluator, x, s, t, None, no_noise) for _ in range(2))
        assert torch.equal(first.x, again.x)


def test_a_network_that_is_not_finite_is_located_with_a_carry():
    path = VP()
    x = torch.ones(3, 1, dtype=torch.float64)

    def bad(x, t):
        return torch.where(t[:, None] < 0.3, math.nan, network(x, t))

    there = encode(Score(network, path, "x0"), x, solver="belm", steps=6, start=0.9, grid="uniform")
    with pytest.raises(NetworkError, match=r"belm: non-finite network output \(NaN\) at step 6/6, .* call 5:") as caught:
        sample(Score(bad, path, "x0"), x=there.x, carry=there.carry, solver="belm", steps=6, start=0.9, grid="uniform")
    assert caught.value.samples == (0, 1, 2)
    assert caught.value.t < 0.3


def test_the_score_of_a_mixture_in_one_dimension_goes_there_and_back_in_many_steps():
    path = EDM()
    score = Mixture1D(path).score
    x = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]
    for solver in ("reversible_heun", "belm", "bdia"):
        there = encode(score, x, solver=solver, steps=200)
        assert gap(sample(score, x=there.x, carry=there.carry, solver=solver, steps=200).x, x) <= 1e-9


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ReversibleHeun("sigma"), "variable='sigma'"),
        (lambda: BELM(0.0), "gamma=0.0"),
        (lambda: BELM(1.5), "gamma=1.5"),
        (lambda: BELM(True), "gamma=True"),
    ],
)
def test_bad_arguments(make, says):
    with pytest.raises(InputError, match=says):
        make()
