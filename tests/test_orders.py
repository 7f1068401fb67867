"""Every declared order is measured, for every row of SOLVERS, two-sided: a solver may neither overstate nor understate
itself.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks import orders
from scores import Gaussian
from sde import EDM, VP, Cosine, Linear, SubVP, Trigonometric
from solvers import SOLVERS, integrate, sample, trace
from solvers.backends import TorchDiffEq, TorchSDE
from solvers.convergence import KINDS, convergence, warped_grid

MEASUREMENTS = [(name, kind, label) for name in SOLVERS for kind in orders.kinds(name) for label in orders.paths_of(name, kind)]
CONSTANTS = orders.stored()
#: In the coordinates (x/alpha, lambda) an invariant row does not see the path, which test_laws shows of each: to measure it
#: on a second path is to measure it twice.
AGAIN = {m for m in MEASUREMENTS if getattr(SOLVERS[m[0]].solver, "invariant", False) and m[1] in KINDS and m[2] != "VP"}


def test_every_solver_has_a_theory():
    """A row of SOLVERS is measured by its table, by probing, by tolerance, or by its floor: no row escapes."""
    assert {name for name, _, _ in MEASUREMENTS} == set(SOLVERS)


@pytest.mark.parametrize(
    ("name", "kind", "label"),
    [pytest.param(*m, marks=pytest.mark.slow if m in AGAIN else ()) for m in MEASUREMENTS],
)
def test_declared_is_measured(name, kind, label):
    row = orders.measure(name, kind, label)
    assert row.deviation <= orders.TOLERANCE, row
    assert (row.constant is not None) == (kind in KINDS)
    if row.constant is not None:
        stored = CONSTANTS[name][kind][label]
        assert abs(row.constant / stored - 1.0) <= 0.05, (row.constant, stored)


def test_error_constants_are_stored_for_exactly_the_solvers_there_are():
    stored = {(name, kind, label) for name, kinds in CONSTANTS.items() for kind, at in kinds.items() for label in at}
    assert stored == {m for m in MEASUREMENTS if m[1] in KINDS}


def gaussian(path):
    return orders.gaussian(path)


@pytest.mark.parametrize("path", [SubVP(), Trigonometric()], ids=["SubVP", "Trigonometric"])
@pytest.mark.parametrize("name", ["euler", "heun", "edm_rk4", "dpmpp_2m", "unipc_3_full", "euler_maruyama", "ddpm"])
def test_orders_hold_on_other_paths(name, path):
    for kind in orders.kinds(name):
        result = convergence(name, kind, gaussian(path), low=orders.LOW, high=orders.HIGH)
        assert abs(result.measured - result.declared) <= orders.TOLERANCE, result


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
    for i, l in enumerate(orders.VARIANCE.tolist()):
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
            drift = _mean_error_of_euler(nodes, weights, dv, f, df, a, da, path, lam, k, l, float(orders.MEAN[i]))
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


# --- step control and floors ---


@pytest.mark.parametrize("name", [n for n, e in SOLVERS.items() if isinstance(e.solver, TorchDiffEq)])
@pytest.mark.parametrize("path", [VP(), EDM(), Linear(), Cosine()], ids=["VP", "EDM", "Linear", "Cosine"])
def test_adaptive_solvers_keep_their_tolerance(name, path):
    """Error at most ten times the tolerance atol + rtol |x|, and falling with it."""
    score = gaussian(path)
    start = float(path.time(-1.0))
    x = score.sample(64, t=start, seed=1).double()
    exact = score.flow(x, start, float(path.time(3.0)))
    errors = []
    for tolerance in (1e-3, 1e-4, 1e-5) if SOLVERS[name].solver.method == "adaptive_heun" else (1e-3, 1e-5, 1e-7):
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


def test_langevin_solvers_converge_at_order_one_above_their_floor():
    from solvers import exact_law

    path = VP()
    score = gaussian(path)
    errors = [
        exact_law(trace("annealed_langevin", path, warped_grid(path, n, -1.0, 3.0)), score).w2(path.time(3.0))
        for n in (80, 160, 320)
    ]
    assert abs(math.log2(errors[-2] / errors[-1]) - 1.0) <= orders.TOLERANCE


def test_discrete_ddpm_needs_a_variance_preserving_path():
    from sde.errors import PathError

    with pytest.raises(PathError, match="variance-preserving"):
        trace("ddpm_discrete", EDM(), [10.0, 1.0])
