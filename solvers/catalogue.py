"""SOLVERS: the one table that the tests, the documentation and the command line read.

A new sampler is one row here (and, where no existing class says it, one small dataclass). Its declared orders are measured
for every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sde.errors import InputError, nearest

from .backends import TorchDiffEq, TorchSDE
from .base import BackEnd, Solver
from .compose import Churn, Langevin, PredictorCorrector
from .exponential import FrozenScore, Multistep, UniPC
from .runge_kutta import EULER, HEUN, MIDPOINT, RK4, RungeKutta
from .stochastic import AnnealedLangevin, DiscreteDDPM, EulerMaruyama


@dataclass(frozen=True)
class Entry:
    """A named sampler: the solver, the noise level eta it runs at unless told otherwise, and where it comes from.

    ``theory`` says what is measured of it (``python -m benchmarks orders``): its declared "order", or, where it has none, that
    its error follows the "tolerance", or the "floor" at which it settles.
    """

    solver: Solver | BackEnd
    summary: str
    reference: str
    eta: float = 0.0
    theory: str = "order"

    @property
    def deterministic(self) -> bool:
        """Whether the name, run at its own eta, follows the probability flow."""
        return self.eta == 0.0 if self.solver.takes_eta else not self.solver.stochastic


_KARRAS = "Karras et al. 2022 (EDM)"
_SONG = "Song et al. 2021 (score SDE)"
_LU = "Lu et al. 2022 (DPM-Solver++)"
_ZHAO = "Zhao et al. 2023 (UniPC)"
_CHEN = "Chen 2018 (torchdiffeq)"
_LI = "Li et al. 2020 (torchsde)"

SOLVERS: dict[str, Entry] = {
    # Runge-Kutta on the probability flow
    "euler": Entry(RungeKutta(EULER), "Euler in t", "Euler 1768"),
    "midpoint": Entry(RungeKutta(MIDPOINT), "midpoint in t", "Runge 1895"),
    "heun": Entry(RungeKutta(HEUN), "Heun in t", "Heun 1900"),
    "rk4": Entry(RungeKutta(RK4), "classical Runge-Kutta in t", "Kutta 1901"),
    "edm_euler": Entry(RungeKutta(EULER, "rho"), "Euler in sigma/alpha; the same step as ddim", _KARRAS),
    "edm_midpoint": Entry(RungeKutta(MIDPOINT, "rho"), "midpoint in sigma/alpha", _KARRAS),
    "edm_heun": Entry(RungeKutta(HEUN, "rho"), "Heun in sigma/alpha, EDM's deterministic sampler", _KARRAS),
    "edm_rk4": Entry(RungeKutta(RK4, "rho"), "classical Runge-Kutta in sigma/alpha", _KARRAS),
    # exponential, deterministic
    "ddim": Entry(Multistep(1, "x0"), "exponential Euler", "Song, Meng & Ermon 2021 (DDIM)"),
    "dpmpp_2m": Entry(Multistep(2, "x0", rule="midpoint"), "two-step in x0, published weights", _LU),
    "dpmpp_2m_lower_final": Entry(
        Multistep(2, "x0", rule="midpoint", lower_final=True),
        "the same with a first-order last step, as released for few steps",
        _LU,
    ),
    "unipc_2": Entry(UniPC(2), "predictor-corrector in x0, bh2", _ZHAO),
    "unipc_3": Entry(UniPC(3), "predictor-corrector in x0, bh2", _ZHAO),
    "unipc_2_bh1": Entry(UniPC(2, "bh1"), "predictor-corrector in x0, bh1", _ZHAO),
    "unipc_3_bh1": Entry(UniPC(3, "bh1"), "predictor-corrector in x0, bh1", _ZHAO),
    "unipc_2_full": Entry(UniPC(2, lower_final=False), "unipc_2 that keeps its order to the last step", _ZHAO),
    "unipc_3_full": Entry(UniPC(3, lower_final=False), "unipc_3 that keeps its order to the last step", _ZHAO),
    # stochastic
    "euler_maruyama": Entry(EulerMaruyama(), "Euler-Maruyama of the reverse SDE", "Maruyama 1955; " + _SONG, eta=1.0),
    "exponential_integrator": Entry(FrozenScore(), "linear part exact, score frozen", "Zhang & Chen 2023", eta=1.0),
    "ddpm": Entry(
        Multistep(1, "x0"), "exact posterior of x_t given x_s and x0: ancestral sampling", "Ho et al. 2020 (DDPM)", eta=1.0
    ),
    "ddpm_discrete": Entry(DiscreteDDPM(), "DDPM with beta_k = beta(t_k) h; eta = 1 only", "Pierret & Galerne 2025", eta=1.0),
    "dpmpp_2m_sde": Entry(Multistep(2, "x0", rule="midpoint"), "two-step in x0 with noise, published weights", _LU, eta=1.0),
    "edm_sde": Entry(Churn(RungeKutta(HEUN, "rho")), "EDM's stochastic Heun with churn 40", _KARRAS),
    "pc_euler_maruyama": Entry(
        PredictorCorrector(EulerMaruyama()), "Euler-Maruyama with Langevin corrector", _SONG, 1.0, "floor"
    ),
    "pc_ddpm": Entry(PredictorCorrector(Multistep(1, "x0")), "ancestral with Langevin corrector", _SONG, 1.0, "floor"),
    "pc_ddpm_sigma": Entry(
        PredictorCorrector(Multistep(1, "x0"), Langevin(rule="sigma")),
        "the same with the corrector's step from sigma_t",
        _SONG,
        eta=1.0,
        theory="floor",
    ),
    "annealed_langevin": Entry(
        AnnealedLangevin(), "Langevin dynamics at each noise level", "Song & Ermon 2019 (NCSN)", theory="floor"
    ),
    # adaptive and library back ends
    "dopri5": Entry(TorchDiffEq("dopri5"), "adaptive order 5", _CHEN, theory="tolerance"),
    "dopri8": Entry(TorchDiffEq("dopri8"), "adaptive order 8", _CHEN, theory="tolerance"),
    "bosh3": Entry(TorchDiffEq("bosh3"), "adaptive order 3", _CHEN, theory="tolerance"),
    "adaptive_heun": Entry(TorchDiffEq("adaptive_heun"), "adaptive order 2", _CHEN, theory="tolerance"),
    "torchsde_euler": Entry(TorchSDE("euler"), "Euler-Maruyama by torchsde", _LI, eta=1.0),
    "torchsde_milstein": Entry(
        TorchSDE("milstein"), "Milstein by torchsde; the same here, the noise being additive", _LI, eta=1.0
    ),
    "torchsde_srk": Entry(TorchSDE("srk"), "stochastic Runge-Kutta SRA by torchsde", "Roessler 2010; " + _LI, eta=1.0),
    "torchsde_adaptive": Entry(TorchSDE("srk", adaptive=True), "the same with step control", _LI, 1.0, "tolerance"),
}


def resolve(solver: Any, eta: Any = None) -> tuple[str, Any, Any]:
    """(name, solver, eta) of a name of SOLVERS or a solver object; eta None is the entry's own (0 for an object)."""
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise InputError(f"solver={solver!r} is unknown: {nearest(solver, SOLVERS)}")
        entry = SOLVERS[solver]
        return solver, entry.solver, entry.eta if eta is None else eta
    if isinstance(solver, Entry):
        return type(solver.solver).__name__, solver.solver, solver.eta if eta is None else eta
    if not isinstance(solver, type) and isinstance(solver, (Solver, BackEnd)):
        return str(solver), solver, 0.0 if eta is None else eta
    raise InputError(f"solver={solver!r}: give a name of SOLVERS or a solver object such as Multistep(2, 'x0')")


def markdown_table() -> str:
    """The table of samplers in the README: one row an entry, orders as declared and measured."""
    head = "| name | what it is | order | calls a step | eta | reference |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(_markdown_row(name, entry) for name, entry in SOLVERS.items())])


def _markdown_row(name: str, entry: Entry) -> str:
    solver = entry.solver
    adaptive = getattr(solver, "adaptive", False)
    pairs = (("", solver.order),) if entry.deterministic else (("weak", solver.weak), ("strong", solver.strong))
    order = "by tolerance" if adaptive else ", ".join(f"{kind} {value:g}".strip() for kind, value in pairs if value is not None)
    calls = "adaptive" if adaptive else f"{solver.stages:g}"
    eta = f"{entry.eta:g}" if solver.takes_eta else "-"
    return f"| `{name}` | {entry.summary} | {order} | {calls} | {eta} | {entry.reference} |"
