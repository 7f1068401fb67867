"""``python -m benchmarks orders``: declared and measured order of every sampler, with its error constant and its cost.

For every row of SOLVERS and every kind of error that applies to it (``Entry.theory`` says which):

    ode        root mean square distance of the end point to the exact flow of a 1-D mixture, which keeps quantiles
    weak       2-Wasserstein distance of the end point's law to the exact marginal, on Gaussian data, started from the exact law
    strong     root mean square distance to the exact solution driven by the same Brownian path, on Gaussian data
    tolerance  the slope of log error over log tolerance of a solver that controls its own steps (declared: 1)
    floor      the excess variance at which a Langevin sampler settles, in units of what theory says (declared: 1)
    exact      2-Wasserstein distance to the exact marginal after 1, 2 and 5 steps on Gaussian data whose exact consistency
               (trajectory) function is the network (declared: 0)

Solvers that draw the area of the Brownian path beside its increment have their strong order measured on the mixture, where
coarse runs are coupled to a fine one.

The measured order is the slope of the last pair of grids. Grids are smooth warps of uniform ones in lambda. The constant is
error * steps^declared on Gaussian data at the finest grid, in one number: a solver that skips its last step keeps its order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scores import Gaussian
from sde import EDM, VP, Cosine, Linear
from sde.errors import InputError, PathError, nearest
from sde.path import Path
from solvers.catalogue import SOLVERS, Entry
from solvers.convergence import KINDS, convergence, kinds_of, warped_grid
from solvers.exact import flow_error
from solvers.plan import Call, Lin, Plan, trace_solver

from . import probing
from .truth import Mixture1D

Array = NDArray[np.float64]

PATHS: dict[str, Path] = {type(p).__name__: p for p in (VP(), EDM(), Linear(), Cosine())}
TOLERANCE = 0.15
#: Steps of the two grids by declared order; rows that are asymptotic later than others are given finer ones.
STEPS = {1: (80, 160), 2: (80, 160), 3: (80, 160), 4: (80, 160), 5: (60, 90), 8: (20, 30)}
LATE = frozenset(
    [
        "edm_sde",
        "deis_rho_3",
        "deis_rho_3_started",
        "deis_t_3",
        "lms_3",
        "ipndm_v_3",
        "adams_3",
        "adams_3_started",
        "dpmpp_3m_published_started",
    ]
)
CONSTANTS = File(__file__).parent / "error_constants.json"
LOW, HIGH = -1.0, 1.5  # lambda at the ends of the grids

MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
VARIANCE = torch.tensor([0.04, 1.0, 0.3], dtype=torch.float64)


@dataclass(frozen=True)
class Orders:
    """Declared and measured order, error constant and cost of every sampler."""

    names: tuple[str, ...] = ()
    """Samplers to measure (default: all)."""
    path: str | None = None
    """One of VP, EDM, Linear, Cosine (default: all four)."""
    json: bool = False
    """One JSON line a row."""
    write: bool = False
    """Store the error constants that the tests compare with."""


@dataclass(frozen=True)
class Row:
    """One measurement. ``constant`` is error * steps^declared on Gaussian data; ``nfe`` calls of the network a full step."""

    name: str
    kind: str
    path: str
    declared: float
    measured: float
    constant: float | None
    nfe: float
    start: str
    end: str
    reference: str

    @property
    def deviation(self) -> float:
        return abs(self.measured - self.declared)


def gaussian(path: Path) -> Gaussian:
    """The Gaussian data of all constants: mean (.5, -1, 2), variance (.04, 1, .3)."""
    return Gaussian(path, MEAN, var=VARIANCE)


def kinds(name: str) -> tuple[str, ...]:
    """The kinds of error by which a row of SOLVERS is measured; at least one, or it has no theory."""
    theory = SOLVERS[name].theory
    if theory == "order":
        return kinds_of(name) or probing.kinds_of(name)
    return (theory,)


def paths_of(name: str, kind: str) -> tuple[str, ...]:
    """The paths on which a row is measured: those it accepts; one where the measurement is a run of its own."""
    if kind not in KINDS or not SOLVERS[name].solver.linear or probing.by_coupling(name, kind):
        return ("VP",)
    return tuple(label for label in PATHS if _accepts(name, PATHS[label]))


def _accepts(name: str, path: Path) -> bool:
    entry = SOLVERS[name]
    try:
        trace_solver(entry.solver, path, warped_grid(path, 8, LOW, HIGH), entry.eta, name)  # pyright: ignore[reportArgumentType]
    except PathError:
        return False
    return True


@cache
def measure(name: str, kind: str, label: str) -> Row:
    """One row of the table."""
    entry, path = SOLVERS[name], PATHS[label]
    if kind == "ode":
        declared, (measured, constant) = float(entry.solver.order or 0.0), _ode(entry, name, path)
    elif kind in ("weak", "strong") and entry.solver.linear and not probing.by_coupling(name, kind):
        result = convergence(name, kind, gaussian(path), _steps(name, kind), LOW, HIGH)
        declared, measured, constant = result.declared, result.measured, result.constant
    else:
        declared, measured, constant = probing.measure(name, kind)
    solver = entry.solver
    start, end = getattr(solver, "start_rule", "as any step"), getattr(solver, "end_rule", "as any step")
    return Row(name, kind, label, declared, measured, constant, solver.stages, start, end, entry.reference)


def _steps(name: str, kind: str) -> tuple[int, ...]:
    solver: Any = SOLVERS[name].solver
    declared = solver.order if kind == "ode" else getattr(solver, kind)
    return (160, 320) if name in LATE else STEPS.get(math.ceil(float(declared or 0.0)), (20, 40))


def _ode(entry: Entry, name: str, path: Path) -> tuple[float, float]:
    """(slope on the mixture, constant on the Gaussian), from the same plans."""
    declared = float(entry.solver.order or 0.0)
    steps = _steps(name, "ode")
    solver: Any = entry.solver
    plans = [trace_solver(solver, path, warped_grid(path, n, LOW, HIGH), entry.eta, name) for n in steps]
    coarse, fine = (mixture_error(plan, path) for plan in plans)
    slope = math.log(coarse / fine) / math.log(steps[-1] / steps[-2])
    return slope, flow_error(plans[-1], gaussian(path)) * steps[-1] ** declared


@cache
def _mixture(path: Path) -> tuple[Mixture1D, Array, Array]:
    """(mixture, starts, their exact end points) between the ends of every grid."""
    mixture, x = Mixture1D(path), torch.linspace(-2.0, 2.0, 24, dtype=torch.float64)
    s, t = path.knots(path.time(torch.tensor([LOW, HIGH], dtype=torch.float64)).tolist())
    return mixture, x.numpy(), mixture.flow(x, s, t).numpy()


def mixture_error(plan: Plan, path: Path) -> float:
    """Root mean square error of a deterministic plan's end points, 24 starts, against the mixture's exact flow.

    The table is read row by row in numpy, which for 24 numbers is far faster than a run; that a run gives what its table says
    is tested elsewhere.
    """
    mixture, x, exact = _mixture(path)
    registers = {0: x}
    for row in plan.rows:
        if isinstance(row, Lin):
            registers[row.out] = sum((c * registers[r] for r, c in row.terms), np.zeros_like(x))
        elif isinstance(row, Call):
            x0, eps = mixture.predict(registers[row.state], plan.knots[row.knot])
            registers[row.out] = x0 if row.target == "x0" else eps
    return float(np.sqrt(np.mean((registers[plan.states[-1]] - exact) ** 2)))


def rows(names: Sequence[str] = (), path: str | None = None) -> Iterator[Row]:
    """All measurements of the named samplers (default: all), in the catalogue's order."""
    for name in names or SOLVERS:
        if name not in SOLVERS:
            raise InputError(f"{name!r} is unknown: {nearest(name, SOLVERS)}")
        for kind in kinds(name):
            for label in paths_of(name, kind):
                if path in (None, label):
                    yield measure(name, kind, label)


def stored() -> dict[str, dict[str, dict[str, float]]]:
    """name -> kind -> path -> error constant, as last written."""
    return json.loads(CONSTANTS.read_text(encoding="utf-8"))


def run(config: Orders) -> int:
    if config.path is not None and config.path not in PATHS:
        raise InputError(f"--path {config.path!r} is unknown: {nearest(config.path, PATHS)}")
    found: list[Row] = []
    if not config.json:
        print(
            f"{'name':28}{'kind':10}{'path':8}{'declared':>9}{'measured':>9}{'constant':>11}{'nfe':>5}  start, end; reference"
        )
    for row in rows(config.names, config.path):
        found.append(row)
        print(json.dumps(asdict(row)) if config.json else _line(row), flush=True)
    worst = max(found, key=lambda row: row.deviation)
    if not config.json:
        print(
            f"\n{len({row.name for row in found})} samplers, {len(found)} rows; largest deviation {worst.deviation:.3f} "
            f"({worst.name}, {worst.kind}, {worst.path})"
        )
    if config.write:
        write(found)
    return 0 if worst.deviation <= TOLERANCE else 1


def _line(row: Row) -> str:
    constant = "" if row.constant is None else f"{row.constant:.4g}"
    rules = f"{row.start}, {row.end}; {row.reference}"
    mark = "" if row.deviation <= TOLERANCE else "  <-- off"
    return (
        f"{row.name:28}{row.kind:10}{row.path:8}{row.declared:9.3g}{row.measured:9.3f}{constant:>11}{row.nfe:5g}  {rules}{mark}"
    )


def write(found: Sequence[Row]) -> None:
    """Store the constants of these rows; those of other samplers are kept, those of samplers that are gone are dropped."""
    table = {name: kinds for name, kinds in stored().items() if name in SOLVERS} if CONSTANTS.exists() else {}
    for name in {row.name for row in found}:
        table[name] = {}
    for row in found:
        if row.constant is not None:
            table[row.name].setdefault(row.kind, {})[row.path] = float(f"{row.constant:.6g}")
    ordered = {name: table[name] for name in SOLVERS if table.get(name)}
    CONSTANTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
