"""Measured orders: the error of a traced solver on Gaussian data, without Monte Carlo, as its grid is refined.

    ode     root mean square distance of the end point to the exact flow of the same start      (eta = 0)
    weak    2-Wasserstein distance of the end point's law to the exact marginal                 (started from the exact law)
    strong  root mean square distance to the exact solution driven by the same Brownian path

The grid is a smooth warp of a uniform one in lambda, since on a uniform grid leading errors can cancel. Gaussian data can
flatter a method on every grid: the midpoint rule in sigma/alpha is of order three on them. The tests measure on a mixture too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from sde.errors import InputError
from sde.path import Path

from .catalogue import resolve
from .exact import GaussianData, exact_law, flow_error, strong_error
from .plan import trace_solver

KINDS = ("ode", "weak", "strong")

#: Steps of the grids by declared order: fine enough to be asymptotic, coarse enough to stay above rounding. From order five on
#: the window between the two is narrow (errors of 1e-11 to 1e-13), hence last pairs closer than a halving.
LADDER = {1: (80, 160, 320), 2: (80, 160, 320), 3: (80, 160, 320), 4: (40, 80, 160), 5: (30, 60, 90), 8: (10, 20, 30)}


@dataclass(frozen=True)
class Convergence:
    """Errors over step counts, the order of the last pair, and the constant error * steps^declared at the finest grid."""

    name: str
    kind: str
    path: str
    declared: float
    steps: tuple[int, ...]
    errors: tuple[float, ...]

    @property
    def measured(self) -> float:
        (n, m), (a, b) = self.steps[-2:], self.errors[-2:]
        return math.log(a / b) / math.log(m / n) if b > 0.0 else math.inf

    @property
    def constant(self) -> float:
        return self.errors[-1] * self.steps[-1] ** self.declared


def declared_order(solver: Any, kind: str) -> float | None:
    """The order a solver declares for a kind of error, None where the kind does not apply."""
    return {"ode": solver.order, "weak": solver.weak, "strong": solver.strong}[kind]


def kinds_of(name: Any) -> tuple[str, ...]:
    """The kinds of error that apply to a name of SOLVERS at its own eta, with a table."""
    _, solver, eta = resolve(name)
    if not solver.linear:
        return ()
    noisy = solver.stochastic and (eta != 0.0 or not solver.takes_eta)
    return tuple(k for k in (("weak", "strong") if noisy else ("ode",)) if declared_order(solver, k) is not None)


def warped_grid(path: Path, n: int, low: float = -2.5, high: float = 3.0) -> tuple[float, ...]:
    """n steps in lambda from low to high, smoothly uneven: lambda = low + (high - low) (u + 0.3 u (1 - u) (1.5 - u))."""
    u = torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)
    return tuple(path.time(low + (high - low) * (u + 0.3 * u * (1.0 - u) * (1.5 - u))).tolist())


def convergence(
    name: Any,
    kind: str,
    gaussian: GaussianData,
    steps: tuple[int, ...] | None = None,
    low: float = -2.5,
    high: float = 3.0,
    eta: Any = None,
) -> Convergence:
    """Refine a solver's grid and measure one kind of error on Gaussian data (its path is the path)."""
    label, solver, eta = resolve(name, eta)
    declared = declared_order(solver, kind)
    if declared is None:
        raise InputError(f"{label!r} declares no {kind} order")
    steps = steps or LADDER.get(math.ceil(declared), (10, 20, 40))
    path = gaussian.path
    errors = []
    for n in steps:
        plan = trace_solver(solver, path, warped_grid(path, n, low, high), eta, label)
        if kind == "ode":
            errors.append(flow_error(plan, gaussian))
        elif kind == "weak":
            errors.append(exact_law(plan, gaussian).w2(plan.times[-1]))
        elif kind == "strong":
            errors.append(strong_error(plan, gaussian))
        else:
            raise InputError(f"kind={kind!r}: use one of {KINDS}")
    return Convergence(label, kind, str(path), declared, steps, tuple(errors))
