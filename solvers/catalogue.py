"""SOLVERS: the one table that the tests, the documentation and the command line read.

A new sampler is one row here (and, where no existing class says it, one small dataclass). Its declared orders are measured
for every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sde.errors import InputError, nearest

from . import exponential_tableaux as erk
from . import tableaux as rk
from .adaptive import Adaptive, Pair
from .aliases import ALIASES, find
from .backends import TorchDiffEq, TorchSDE
from .base import BackEnd, Solver
from .compose import Ancestral, Churn, Langevin, PredictorCorrector, Restart, Underdamped
from .dpm_v3 import DPMSolverV3
from .er_sde import ERSDE
from .exponential import AdamsMoulton, FixedWeights, FrozenScore, Multistep, UniPC
from .exponential_rk import ExponentialRK, PublishedSDE, SinglestepSchedule
from .few_step import Consistency, TrajectoryConsistency
from .multistep import ADAMS_BASHFORTH
from .reversible import BELM, ReversibleHeun
from .runge_kutta import RungeKutta
from .starts import GradedStart, PseudoRungeKutta, Started
from .stochastic import (
    SRA1,
    SRA2,
    SRA3,
    STOCHASTIC_HEUN,
    AnnealedLangevin,
    DiscreteDDPM,
    EulerMaruyama,
    StochasticRungeKutta,
)


@dataclass(frozen=True)
class Entry:
    """A named sampler: the solver, the noise level eta it runs at unless told otherwise, and where it comes from.

    ``theory`` says what is measured of it (``python -m benchmarks orders``): its declared "order", or, where it has none, that
    its error follows the "tolerance", the "floor" at which it settles, or that it is "exact" with an exact distilled network.
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


def _runge_kutta(what: str, tableau: rk.Tableau, variable: str = "t") -> Entry:
    """The row of a tableau in one variable; an embedded pair is marked with both orders."""
    pair = f", of the pair {tableau.order}({tableau.low_order})" if tableau.low else ""
    clock = {"t": "t", "rho": "sigma/alpha", "chi": "alpha/sigma", "lawson_x0": "lambda, x0", "lawson_eps": "lambda, eps"}
    return Entry(RungeKutta(tableau, variable), f"{what} in {clock[variable]}{pair}", tableau.source)


def _exponential(what: str, tableau: erk.ExponentialTableau, target: str = "x0", eta: float = 0.0, by: str = "") -> Entry:
    """The row of an exponential Runge-Kutta method."""
    noise = " with exact noise" if eta else ""
    return Entry(ExponentialRK(tableau, target), f"{what}{noise}, in {target}", by or tableau.source, eta)


def _adaptive(tableau: rk.Tableau) -> Entry:
    """The row of an embedded pair in t with step control per sample."""
    pair = Pair(RungeKutta(tableau), RungeKutta(tableau.embedded))
    what = f"the pair {tableau.order}({tableau.low_order}) in t, steps per sample"
    return Entry(Adaptive(pair), what, tableau.source, theory="tolerance")


_KARRAS = "Karras et al. 2022 (EDM)"
_SONG = "Song et al. 2021 (score SDE)"
_LU = "Lu et al. 2022 (DPM-Solver++)"
_DPM = "Lu et al. 2022 (DPM-Solver)"
_RES = "Zhang et al. 2023 (RES); Hochbruck & Ostermann 2005"
_SEEDS = "Gonzalez et al. 2023 (SEEDS)"
_KD = "Crowson 2022 (k-diffusion)"
_ZHAO = "Zhao et al. 2023 (UniPC)"
_CHEN = "Chen 2018 (torchdiffeq)"
_KIDGER = "Kidger et al. 2021 (reversible Heun)"
_LI = "Li et al. 2020 (torchsde)"
_ROESSLER = "Roessler 2010 (SRA)"
_DPM_2, _DPMPP_2S = ExponentialRK(erk.two_stage(exact=False), "eps"), ExponentialRK(erk.two_stage(exact=False), "x0")
_DPM_3 = ExponentialRK(erk.three_stage(), "eps")
_RF = "ComfyUI's rectified-flow ancestral split"
_CUI = "Cui et al. 2023 (ER-SDE-Solver)"
_DEIS = "Zhang & Chen 2022 (DEIS)"
_LIU = "Liu et al. 2022 (PNDM)"
_XUE = "Xue et al. 2023 (SA-Solver)"
_KDIFF = "Crowson 2022 (k-diffusion)"
_ZHENG = "Zheng et al. 2023 (DPM-Solver-v3)"
_ADAMS = "Bashforth & Adams 1883; Moulton 1926"

#: Starts of order two and three, exact where x0 is constant.
_STAGES_2, _STAGES_3 = ExponentialRK(erk.two_stage(), "x0"), ExponentialRK(erk.three_stage(), "x0")


def _moulton(order: int) -> AdamsMoulton:
    """Adams-Bashforth-Moulton in t, the corrected state evaluated again."""
    return AdamsMoulton(order, order, "velocity", "t", "PECE")


SOLVERS: dict[str, Entry] = {
    # Runge-Kutta on the probability flow. Any other tableau in any other variable is RungeKutta(tableau, variable): DOPRI5,
    # TSIT5 and COOPER_VERNER8 in t have errors so small that rounding hides their order on some path, so they are no rows.
    "euler": Entry(RungeKutta(rk.EULER), "Euler in t", "Euler 1768"),
    "midpoint": Entry(RungeKutta(rk.MIDPOINT), "midpoint in t", "Runge 1895"),
    "heun": Entry(RungeKutta(rk.HEUN), "Heun in t", "Heun 1900"),
    "rk4": Entry(RungeKutta(rk.RK4), "classical Runge-Kutta in t", "Kutta 1901"),
    "heun3": _runge_kutta("Heun's third-order method", rk.HEUN3),
    "ralston2": _runge_kutta("Ralston's second-order method", rk.RALSTON2),
    "ralston3": _runge_kutta("Ralston's third-order method", rk.RALSTON3),
    "ralston4": _runge_kutta("Ralston's fourth-order method", rk.RALSTON4),
    "kutta3": _runge_kutta("Kutta's third-order method", rk.KUTTA3),
    "houwen_wray3": _runge_kutta("van der Houwen and Wray's method of two registers", rk.HOUWEN_WRAY3),
    "ssprk3": _runge_kutta("strong-stability-preserving method of three stages", rk.SSPRK3),
    "ssprk43": _runge_kutta("strong-stability-preserving method of four stages", rk.SSPRK43),
    "rk38": _runge_kutta("the 3/8 rule", rk.RK38),
    "rk_bosh3": _runge_kutta("Bogacki and Shampine's method", rk.BOSH3),
    "rk_fehlberg4": _runge_kutta("Fehlberg's fourth-order method", rk.FEHLBERG5.embedded),
    "rk_fehlberg5": _runge_kutta("Fehlberg's fifth-order method", rk.FEHLBERG5),
    "rk_cash_karp5": _runge_kutta("Cash and Karp's method", rk.CASH_KARP5),
    "rk5_nystrom": _runge_kutta("Kutta and Nystrom's fifth-order method", rk.NYSTROM5),
    "rk5_butcher": _runge_kutta("Butcher's fifth-order method", rk.BUTCHER5),
    "rk6_butcher": _runge_kutta("Butcher's sixth-order method", rk.BUTCHER6),
    "ees25": _runge_kutta("explicit method that its backward step undoes to order five,", rk.EES25),
    "ees27": _runge_kutta("explicit method that its backward step undoes to order seven,", rk.EES27),
    "implicit_midpoint": _runge_kutta("implicit midpoint, three sweeps,", rk.fixed_point(rk.IMPLICIT_MIDPOINT, 3)),
    "trapezoid": _runge_kutta("trapezoidal rule, three sweeps,", rk.fixed_point(rk.TRAPEZOID, 3)),
    "radau_iia3": _runge_kutta("Radau IIA of two stages, three sweeps,", rk.fixed_point(rk.RADAU_IIA3, 3)),
    "gauss4": _runge_kutta("Gauss of two stages, three sweeps,", rk.fixed_point(rk.GAUSS4, 3)),
    "edm_euler": Entry(RungeKutta(rk.EULER, "rho"), "Euler in sigma/alpha; the same step as ddim", _KARRAS),
    "edm_midpoint": Entry(RungeKutta(rk.MIDPOINT, "rho"), "midpoint in sigma/alpha", _KARRAS),
    "edm_heun": Entry(RungeKutta(rk.HEUN, "rho"), "Heun in sigma/alpha, EDM's deterministic sampler", _KARRAS),
    "edm_rk4": Entry(RungeKutta(rk.RK4, "rho"), "classical Runge-Kutta in sigma/alpha", _KARRAS),
    "edm_ralston2": _runge_kutta("Ralston's second-order method", rk.RALSTON2, "rho"),
    "edm_heun3": _runge_kutta("Heun's third-order method", rk.HEUN3, "rho"),
    "edm_kutta3": _runge_kutta("Kutta's third-order method", rk.KUTTA3, "rho"),
    "edm_ralston3": _runge_kutta("Ralston's third-order method", rk.RALSTON3, "rho"),
    "edm_ssprk3": _runge_kutta("strong-stability-preserving method of three stages", rk.SSPRK3, "rho"),
    "edm_rk38": _runge_kutta("the 3/8 rule", rk.RK38, "rho"),
    "edm_ralston4": _runge_kutta("Ralston's fourth-order method", rk.RALSTON4, "rho"),
    "edm_cash_karp5": _runge_kutta("Cash and Karp's method", rk.CASH_KARP5, "rho"),
    "edm_rk6": _runge_kutta("Butcher's sixth-order method", rk.BUTCHER6, "rho"),
    "edm_rk8": _runge_kutta("Cooper and Verner's eighth-order method", rk.COOPER_VERNER8, "rho"),
    "edm_implicit_midpoint": _runge_kutta("implicit midpoint, three sweeps,", rk.fixed_point(rk.IMPLICIT_MIDPOINT, 3), "rho"),
    "edm_gauss4": _runge_kutta("Gauss of two stages, three sweeps,", rk.fixed_point(rk.GAUSS4, 3), "rho"),
    "chi_midpoint": _runge_kutta("midpoint", rk.MIDPOINT, "chi"),
    "chi_heun": _runge_kutta("Heun", rk.HEUN, "chi"),
    "chi_ralston3": _runge_kutta("Ralston's third-order method", rk.RALSTON3, "chi"),
    "chi_rk4": _runge_kutta("classical Runge-Kutta", rk.RK4, "chi"),
    "chi_dopri5": _runge_kutta("Dormand and Prince's method", rk.DOPRI5, "chi"),
    "chi_tsit5": _runge_kutta("Tsitouras's method", rk.TSIT5, "chi"),
    "lawson2a": _runge_kutta("Lawson's method on midpoint", rk.MIDPOINT, "lawson_x0"),
    "lawson2b": _runge_kutta("Lawson's method on Heun", rk.HEUN, "lawson_x0"),
    "lawson4": _runge_kutta("Lawson's method on classical Runge-Kutta", rk.RK4, "lawson_x0"),
    "lawson2b_eps": _runge_kutta("Lawson's method on Heun", rk.HEUN, "lawson_eps"),
    "lawson4_eps": _runge_kutta("Lawson's method on classical Runge-Kutta", rk.RK4, "lawson_eps"),
    # exponential, deterministic
    "ddim": Entry(Multistep(1, "x0"), "exponential Euler", "Song, Meng & Ermon 2021 (DDIM)"),
    "dpmpp_2m": Entry(Multistep(2, "x0", rule="midpoint"), "two-step in x0, published weights", _LU),
    "dpmpp_2m_lower_final": Entry(
        Multistep(2, "x0", rule="midpoint", lower_final=True),
        "the same with a first-order last step, as released for few steps",
        _LU,
    ),
    # exponential Runge-Kutta
    "dpm_solver_1": _exponential("exponential Euler, the same step as ddim", erk.EXPONENTIAL_EULER, "eps", by=_DPM),
    "dpm_solver_2": _exponential("midpoint in lambda; k-diffusion's dpm_2", erk.two_stage(0.5, exact=False), "eps", by=_DPM),
    "dpm_solver_2_taylor": _exponential("two stages, exact weights", erk.two_stage(0.5), "eps", by=_DPM),
    "dpm_solver_3": _exponential("three stages", erk.three_stage(), "eps", by=_DPM),
    "dpm_solver_3_taylor": _exponential("three stages, the parabola's weights", erk.three_stage(exact=True), "eps", by=_DPM),
    "dpm_fast": Entry(SinglestepSchedule(), "dpm_solver_3 ending with one of order 2 and one of order 1", _DPM),
    "dpmpp_2s": _exponential("midpoint in lambda", erk.two_stage(0.5, exact=False), by=_LU),
    "dpmpp_3s": _exponential("three stages", erk.three_stage(), by=_LU),
    "dpmpp_3s_taylor": _exponential("three stages, the parabola's weights", erk.three_stage(exact=True), by=_LU),
    "exp_heun_2_x0": _exponential("exponential Heun, the same step as etdrk2", erk.two_stage(1.0), by="ComfyUI"),
    "etdrk2": _exponential("exponential Heun", erk.two_stage(1.0), by="Cox & Matthews 2002, (22)"),
    "etdrk2_eps": _exponential("exponential Heun", erk.two_stage(1.0), "eps", by="Cox & Matthews 2002, (22)"),
    "etdrk3": _exponential("Cox and Matthews's three stages", erk.ETD3RK),
    "etdrk4": _exponential("Cox and Matthews's four stages", erk.ETD4RK),
    "etdrk4_eps": _exponential("Cox and Matthews's four stages", erk.ETD4RK, "eps"),
    "krogstad": _exponential("Krogstad's four stages", erk.KROGSTAD),
    "krogstad_eps": _exponential("Krogstad's four stages", erk.KROGSTAD, "eps"),
    "strehmel_weiner": _exponential("Strehmel and Weiner's four stages", erk.STREHMEL_WEINER),
    "friedli": _exponential("Friedli's four stages", erk.FRIEDLI),
    "hochbruck_ostermann": _exponential("five stages, stiff order four", erk.HOCHBRUCK_OSTERMANN),
    "hochbruck_ostermann_eps": _exponential("five stages, stiff order four", erk.HOCHBRUCK_OSTERMANN, "eps"),
    "generalised_lawson4": _exponential("Lawson's method, exact on constants", erk.GENERALISED_LAWSON4),
    "res_2s": _exponential("two stages, exact weights", erk.two_stage(0.5), by=_RES),
    "res_3s": _exponential("three stages, c = 0, 1/2, 1", erk.refined(), by=_RES),
    "res_3s_eps": _exponential("three stages, c = 0, 1/2, 1", erk.refined(), "eps", by=_RES),
    # multistep: exact weights
    "dpmpp_2m_heun": Entry(Multistep(2, "x0"), "two-step in x0, the slope's exact weight", _LU),
    "dpmpp_3m": Entry(Multistep(3, "x0"), "three-step in x0, exact weights", _LU),
    "dpmpp_3m_published": Entry(
        Multistep(3, "x0", rule="published_3m"), "as released: half the weight of the second difference", _LU
    ),
    "dpmpp_4m": Entry(Multistep(4, "x0"), "four-step in x0, exact weights", _LU),
    "dpmpp_3m_started": Entry(Started(Multistep(3, "x0"), _STAGES_2), "dpmpp_3m that keeps its order from the start", _LU),
    "dpmpp_4m_started": Entry(Started(Multistep(4, "x0"), _STAGES_3), "dpmpp_4m that keeps its order from the start", _LU),
    "dpmpp_5m_started": Entry(
        Started(Multistep(5, "x0"), ExponentialRK(erk.KROGSTAD, "x0")), "five-step in x0, of order five from the start", _LU
    ),
    "dpmpp_3m_published_started": Entry(
        Started(Multistep(3, "x0", rule="published_3m"), _STAGES_2), "the released weights: of order two from any start", _LU
    ),
    "dpmpp_3m_graded": Entry(GradedStart(Multistep(3, "x0")), "dpmpp_3m whose first step is divided", _LU),
    "dpm_2m": Entry(Multistep(2, "eps", rule="midpoint"), "two-step in eps, published weights", _LU),
    "dpm_3m": Entry(Multistep(3, "eps"), "three-step in eps, exact weights", _LU),
    "dpm_3m_published": Entry(
        Multistep(3, "eps", rule="published_3m"), "as released: half the weight of the second difference", _LU
    ),
    "res_2m": Entry(Multistep(2, "x0"), "two-step in x0, exact weights; the same as dpmpp_2m_heun", _RES),
    "res_3m": Entry(Multistep(3, "x0"), "three-step in x0, exact weights; the same as dpmpp_3m", _RES),
    "deis_t_2": Entry(Multistep(2, "eps", "t"), "two-step in eps, a line in t", _DEIS),
    "deis_t_3": Entry(Multistep(3, "eps", "t"), "three-step in eps, a parabola in t", _DEIS),
    "deis_t_4": Entry(Multistep(4, "eps", "t"), "four-step in eps, a cubic in t", _DEIS),
    "deis_t_3_started": Entry(
        Started(Multistep(3, "eps", "t"), ExponentialRK(erk.two_stage(), "eps")), "deis_t_3 that keeps its order", _DEIS
    ),
    "deis_rho_2": Entry(Multistep(2, "eps", "rho"), "two-step in eps, a line in sigma/alpha", _DEIS),
    "deis_rho_3": Entry(Multistep(3, "eps", "rho"), "three-step in eps, a parabola in sigma/alpha", _DEIS),
    "deis_rho_4": Entry(Multistep(4, "eps", "rho"), "four-step in eps, a cubic in sigma/alpha", _DEIS),
    "deis_rho_3_started": Entry(
        Started(Multistep(3, "eps", "rho"), RungeKutta(rk.HEUN, "rho")), "deis_rho_3 that keeps its order", _DEIS
    ),
    "deis_lam_2": Entry(Multistep(2, "eps"), "two-step in eps, a line in lambda", _DEIS),
    "deis_lam_3": Entry(Multistep(3, "eps"), "three-step in eps, a parabola in lambda; the same as dpm_3m", _DEIS),
    "deis_lam_4": Entry(Multistep(4, "eps"), "four-step in eps, a cubic in lambda", _DEIS),
    "deis_lam_4_started": Entry(
        Started(Multistep(4, "eps"), ExponentialRK(erk.three_stage(), "eps")), "deis_lam_4 that keeps its order", _DEIS
    ),
    "lms_1": Entry(Multistep(1, "eps", "rho"), "k-diffusion's lms of order 1; the same step as ddim", _KDIFF),
    "lms_2": Entry(Multistep(2, "eps", "rho"), "k-diffusion's lms of order 2; the same as deis_rho_2", _KDIFF),
    "lms_3": Entry(Multistep(3, "eps", "rho"), "k-diffusion's lms of order 3; the same as deis_rho_3", _KDIFF),
    "lms_4": Entry(Multistep(4, "eps", "rho"), "k-diffusion's lms; the same as deis_rho_4", _KDIFF),
    "ipndm_v_2": Entry(Multistep(2, "eps", "rho"), "variable-step iPNDM with right weights: deis_rho_2", _DEIS),
    "ipndm_v_3": Entry(Multistep(3, "eps", "rho"), "variable-step iPNDM with right weights: deis_rho_3", _DEIS),
    "ipndm_v_4": Entry(Multistep(4, "eps", "rho"), "variable-step iPNDM with right weights: deis_rho_4", _DEIS),
    "adams_1": Entry(Multistep(1, "velocity", "t"), "Adams-Bashforth in t; the same step as euler", _ADAMS),
    "adams_2": Entry(Multistep(2, "velocity", "t"), "two-step Adams-Bashforth in t, right on any grid", _ADAMS),
    "adams_3": Entry(Multistep(3, "velocity", "t"), "three-step Adams-Bashforth in t, right on any grid", _ADAMS),
    "adams_4": Entry(Multistep(4, "velocity", "t"), "four-step Adams-Bashforth in t, right on any grid", _ADAMS),
    "adams_3_started": Entry(
        Started(Multistep(3, "velocity", "t"), RungeKutta(rk.HEUN)), "adams_3 that keeps its order from the start", _ADAMS
    ),
    "abm_2": Entry(_moulton(2), "adams_2 corrected by the trapezium rule, PECE", _ADAMS),
    "abm_3": Entry(_moulton(3), "adams_3 corrected by Moulton's method of order three, PECE", _ADAMS),
    "abm_4": Entry(_moulton(4), "adams_4 corrected by Moulton's method of order four, PECE", _ADAMS),
    "abm_4_started": Entry(Started(_moulton(4), RungeKutta(rk.KUTTA3)), "abm_4 that keeps its order from the start", _ADAMS),
    # multistep: fixed weights
    "ipndm_2": Entry(FixedWeights(ADAMS_BASHFORTH[:2]), "two-step in sigma/alpha, weights of equal steps", _LIU),
    "ipndm_3": Entry(FixedWeights(ADAMS_BASHFORTH[:3]), "three-step in sigma/alpha, weights of equal steps", _LIU),
    "ipndm_4": Entry(FixedWeights(ADAMS_BASHFORTH), "four-step in sigma/alpha, weights of equal steps", _LIU),
    "pndm": Entry(
        Started(FixedWeights(ADAMS_BASHFORTH), PseudoRungeKutta()), "ipndm_4 after three pseudo Runge-Kutta steps", _LIU
    ),
    "plms": Entry(Started(FixedWeights(ADAMS_BASHFORTH), RungeKutta(rk.HEUN, "rho"), 1), "ipndm_4 after one Heun step", _LIU),
    "gradient_estimation": Entry(
        FixedWeights(((1.0,), (2.0, -1.0))), "d + (gamma - 1)(d - d_prev) in sigma/alpha, gamma = 2", "Permenter & Yuan 2024"
    ),
    # multistep: predictor-correctors
    "unip_2": Entry(UniPC(2, corrector=False), "UniPC's predictor alone; the same as dpmpp_2m_lower_final", _ZHAO),
    "unip_3": Entry(UniPC(3, corrector=False), "UniPC's predictor alone, bh2", _ZHAO),
    "unip_4": Entry(UniPC(4, corrector=False), "UniPC's predictor alone, bh2", _ZHAO),
    "unipc_1": Entry(UniPC(1), "predictor-corrector in x0, bh2", _ZHAO),
    "unipc_2": Entry(UniPC(2), "predictor-corrector in x0, bh2", _ZHAO),
    "unipc_3": Entry(UniPC(3), "predictor-corrector in x0, bh2", _ZHAO),
    "unipc_2_bh1": Entry(UniPC(2, "bh1"), "predictor-corrector in x0, bh1", _ZHAO),
    "unipc_3_bh1": Entry(UniPC(3, "bh1"), "predictor-corrector in x0, bh1", _ZHAO),
    "unipc_2_full": Entry(UniPC(2, lower_final=False), "unipc_2 that keeps its order to the last step", _ZHAO),
    "unipc_3_full": Entry(UniPC(3, lower_final=False), "unipc_3 that keeps its order to the last step", _ZHAO),
    "unipc_4": Entry(UniPC(4), "predictor-corrector in x0, bh2", _ZHAO),
    "unipc_5": Entry(UniPC(5), "predictor-corrector in x0, bh2", _ZHAO),
    "unipc_6": Entry(UniPC(6), "predictor-corrector in x0, bh2", _ZHAO),
    "unipc_2_exact": Entry(
        UniPC(2, "exact", lower_final=False), "unipc_2_full with exact weights: what vary_coeff means", _ZHAO
    ),
    "unipc_3_exact": Entry(
        UniPC(3, "exact", lower_final=False), "unipc_3_full with exact weights: what vary_coeff means", _ZHAO
    ),
    "unipc_3_started": Entry(
        Started(UniPC(3, lower_final=False), _STAGES_3), "unipc_3_full that keeps its order from the start", _ZHAO
    ),
    # between data and noise prediction, here with the statistics of N(mu, 1/4); with a model's own: docs/dpm_v3.md
    "dpm_v3_1_gaussian": Entry(DPMSolverV3(1), "one node in f, exact on data N(mu, 1/4) in one step", _ZHENG),
    "dpm_v3_2_gaussian": Entry(DPMSolverV3(2), "two-step in f, statistics of N(mu, 1/4)", _ZHENG),
    "dpm_v3_3_gaussian": Entry(DPMSolverV3(3), "three-step in f, statistics of N(mu, 1/4)", _ZHENG),
    "dpm_v3_3_gaussian_started": Entry(
        Started(DPMSolverV3(3), _STAGES_2), "dpm_v3_3_gaussian that keeps its order from the start", _ZHENG
    ),
    "dpm_v3_2_gaussian_corrected": Entry(DPMSolverV3(2, corrector=1), "dpm_v3_2_gaussian and a corrector", _ZHENG),
    "dpm_v3_3_gaussian_corrected": Entry(DPMSolverV3(3, corrector=1), "dpm_v3_3_gaussian and a corrector", _ZHENG),
    "dpm_v3_3_gaussian_published": Entry(
        DPMSolverV3(3, corrector=0, pseudo="predictor", lower_final=True),
        "as released for five calls: pseudo-order weights, corrected, lowered at the end; statistics of N(mu, 1/4)",
        _ZHENG,
    ),
    # stochastic
    "euler_maruyama": Entry(EulerMaruyama(), "Euler-Maruyama of the reverse SDE", "Maruyama 1955; " + _SONG, eta=1.0),
    "milstein": Entry(EulerMaruyama(), "the same as euler_maruyama, the noise being additive", "Milstein 1974", eta=1.0),
    "stochastic_heun": Entry(
        StochasticRungeKutta(STOCHASTIC_HEUN), "Heun in t with one normal a step", STOCHASTIC_HEUN.source, eta=1.0
    ),
    "sra1": Entry(StochasticRungeKutta(SRA1), "stochastic Runge-Kutta with areas, two stages", _ROESSLER, eta=1.0),
    "sra2": Entry(StochasticRungeKutta(SRA2), "the same, diffusion at other times", _ROESSLER, eta=1.0),
    "sra3": Entry(StochasticRungeKutta(SRA3), "stochastic Runge-Kutta with areas, three stages", _ROESSLER, eta=1.0),
    "exponential_integrator": Entry(FrozenScore(), "linear part exact, score frozen", "Zhang & Chen 2023", eta=1.0),
    "exponential_euler_sde": Entry(
        Multistep(1, "eps"), "exponential Euler in eps with noise: azula's ItoSampler", "Zhang & Chen 2023", eta=1.0
    ),
    "ddpm": Entry(
        Multistep(1, "x0"), "exact posterior of x_t given x_s and x0: ancestral sampling", "Ho et al. 2020 (DDPM)", eta=1.0
    ),
    "ddpm_discrete": Entry(DiscreteDDPM(), "DDPM with beta_k = beta(t_k) h; eta = 1 only", "Pierret & Galerne 2025", eta=1.0),
    "dpmpp_2m_sde": Entry(Multistep(2, "x0", rule="midpoint"), "two-step in x0 with noise, published weights", _LU, eta=1.0),
    "gddim": Entry(
        Multistep(1, "x0"),
        "gDDIM for isotropic noise, half its noise: the step of ddpm and ddim at another eta",
        "Zhang, Tao & Chen 2023 (gDDIM)",
        eta=0.5,
    ),
    "ddim_eta": Entry(
        Ancestral(Multistep(1, "x0")),
        "DDIM with its own eta, which is euler_ancestral's",
        "Song, Meng & Ermon 2021 (DDIM)",
        eta=0.5,
    ),
    "euler_ancestral": Entry(Ancestral(Multistep(1, "x0")), "Euler in sigma/alpha to a lower level, then noise", _KDIFF, 1.0),
    "heun_ancestral": Entry(
        Ancestral(RungeKutta(rk.HEUN, "rho")), "Heun in sigma/alpha to a lower level, then noise", _KDIFF, eta=1.0
    ),
    "dpm_2_ancestral": Entry(Ancestral(_DPM_2), "DPM-Solver-2 to a lower level, then noise", _KDIFF, eta=1.0),
    "dpmpp_2s_ancestral": Entry(Ancestral(_DPMPP_2S), "DPM-Solver++(2S) to a lower level, then noise", _KDIFF, eta=1.0),
    "euler_ancestral_rf": Entry(
        Ancestral(Multistep(1, "x0"), "rf"), "the same as euler_ancestral, split in rectified flow's time", _RF, eta=1.0
    ),
    "dpm_2_ancestral_rf": Entry(Ancestral(_DPM_2, "rf"), "dpm_2_ancestral, split in rectified flow's time", _RF, eta=1.0),
    "dpmpp_2s_ancestral_rf": Entry(Ancestral(_DPMPP_2S, "rf"), "dpmpp_2s_ancestral, split in rectified flow's time", _RF, 1.0),
    "er_sde_1": Entry(ERSDE(1), "noise level a function of lambda, first order in x0", _CUI),
    "er_sde_2": Entry(ERSDE(2), "the same with the slope of x0", _CUI),
    "er_sde_3": Entry(ERSDE(3), "the same with slope and curvature of x0", _CUI),
    "er_sde_3_published": Entry(ERSDE(3, rule="published"), "the same with the slope of the two-step method", _CUI),
    "restart": Entry(Restart(RungeKutta(rk.HEUN, "rho")), "Heun in sigma/alpha with restarts", "Xu et al. 2023 (Restart)"),
    "dpmpp_2m_sde_heun": Entry(Multistep(2, "x0"), "two-step in x0 with noise, the slope's exact weight", _LU, eta=1.0),
    "dpmpp_3m_sde": Entry(Multistep(3, "x0"), "three-step in x0 with noise, exact weights", _LU, eta=1.0),
    "dpmpp_3m_sde_published": Entry(
        Multistep(3, "x0", rule="published_3m"), "as released: half the weight of the second difference", _KDIFF, eta=1.0
    ),
    "sa_solver": Entry(AdamsMoulton(3, 4), "Adams-Moulton in x0 with noise: predictor 3, corrector 4", _XUE, eta=1.0),
    "sa_solver_pece": Entry(
        AdamsMoulton(3, 4, mode="PECE"), "the same as sa_solver, corrected states evaluated again", _XUE, eta=1.0
    ),
    "seeds_1": _exponential("exponential Euler, the same step as ddpm", erk.EXPONENTIAL_EULER, eta=1.0, by=_SEEDS),
    "seeds_2": _exponential("midpoint in lambda, one Brownian path", erk.two_stage(0.5, exact=False), eta=1.0, by=_SEEDS),
    "seeds_3": _exponential("three stages, one Brownian path", erk.three_stage(), eta=1.0, by=_SEEDS),
    "seeds_2_eps": _exponential("midpoint in lambda", erk.two_stage(0.5, exact=False), "eps", 1.0, _SEEDS),
    "seeds_3_eps": _exponential("three stages", erk.three_stage(), "eps", 1.0, _SEEDS),
    "dpmpp_2s_sde": _exponential("midpoint in lambda, as seeds_2", erk.two_stage(0.5, exact=False), "x0", 1.0, _LU),
    "exp_heun_2_x0_sde": _exponential("exponential Heun", erk.two_stage(1.0), "x0", 1.0, "ComfyUI; " + _SEEDS),
    "dpmpp_sde_published": Entry(
        PublishedSDE(), "k-diffusion's dpmpp_sde: stage and end share a path in sigma only; use dpmpp_2s_sde", _KD, eta=1.0
    ),
    "dpmpp_sde_published_white": Entry(
        PublishedSDE(tree=False), "the same with independent normals for stage and end: weak order 1", _KD, eta=1.0
    ),
    "edm_sde": Entry(Churn(RungeKutta(rk.HEUN, "rho")), "EDM's stochastic Heun with churn 40", _KARRAS),
    "pc_euler_maruyama": Entry(
        PredictorCorrector(EulerMaruyama()), "Euler-Maruyama with Langevin corrector", _SONG, 1.0, "floor"
    ),
    "pc_ddpm": Entry(PredictorCorrector(Multistep(1, "x0")), "ancestral with Langevin corrector", _SONG, 1.0, "floor"),
    "pc_exponential_integrator": Entry(
        PredictorCorrector(FrozenScore()), "score_sde's reverse diffusion predictor and Langevin, on VE", _SONG, 1.0, "floor"
    ),
    "pc_ddpm_sigma": Entry(
        PredictorCorrector(Multistep(1, "x0"), Langevin(rule="sigma")),
        "the same with the corrector's step from sigma_t",
        _SONG,
        eta=1.0,
        theory="floor",
    ),
    "pc_ddpm_underdamped": Entry(
        PredictorCorrector(Multistep(1, "x0"), Underdamped()),
        "ancestral with underdamped Langevin corrector",
        "Bussi & Parrinello 2007; " + _SONG,
        eta=1.0,
        theory="floor",
    ),
    "annealed_langevin": Entry(
        AnnealedLangevin(), "Langevin dynamics at each noise level", "Song & Ermon 2019 (NCSN)", theory="floor"
    ),
    # few-step, for distilled networks
    "consistency": Entry(
        Consistency(0.002), "multistep consistency sampling", "Song et al. 2023 (consistency models)", theory="exact"
    ),
    "lcm": Entry(Consistency(), "multistep consistency sampling from level 0", "Luo et al. 2023 (LCM)", theory="exact"),
    "tcd": Entry(
        TrajectoryConsistency(0.3), "jump below t, then exact noise, gamma 0.3", "Zheng et al. 2024 (TCD)", theory="exact"
    ),
    # exactly reversible: encode and decode with the carry
    "reversible_heun": Entry(ReversibleHeun(), "Heun's reversible form in t, one call a step", _KIDGER),
    "belm": Entry(BELM(), "two-step, its own inverse in sigma/alpha", "Wang et al. 2024 (O-BELM)"),
    "bdia": Entry(BELM(1.0), "two DDIM steps, forwards and backwards, with gamma = 1", "Zhang et al. 2023 (BDIA)"),
    # adaptive and library back ends
    "dopri5": Entry(TorchDiffEq("dopri5"), "adaptive order 5, steps of the batch", _CHEN, theory="tolerance"),
    "dopri8": Entry(TorchDiffEq("dopri8"), "adaptive order 8, steps of the batch", _CHEN, theory="tolerance"),
    "bosh3": Entry(TorchDiffEq("bosh3"), "adaptive order 3, steps of the batch", _CHEN, theory="tolerance"),
    "adaptive_heun": Entry(TorchDiffEq("adaptive_heun"), "adaptive order 2, steps of the batch", _CHEN, theory="tolerance"),
    "adaptive_bosh3": _adaptive(rk.BOSH3),
    "adaptive_dopri5": _adaptive(rk.DOPRI5),
    "adaptive_tsit5": _adaptive(rk.TSIT5),
    "dpm_adaptive": Entry(
        Adaptive(Pair(_DPM_3, ExponentialRK(erk.two_stage(1 / 3, exact=False), "eps")), rtol=0.05, atol=0.0078),
        "DPM-Solver-2 and -3, steps per sample, the published tolerances",
        _DPM,
        theory="tolerance",
    ),
    "dpm_adaptive_12": Entry(
        Adaptive(Pair(_DPM_2, Multistep(1, "eps"))),
        "DPM-Solver-1 and -2, steps per sample",
        _DPM,
        theory="tolerance",
    ),
    "torchsde_euler": Entry(TorchSDE("euler"), "Euler-Maruyama by torchsde", _LI, eta=1.0),
    "torchsde_milstein": Entry(
        TorchSDE("milstein"), "Milstein by torchsde; the same here, the noise being additive", _LI, eta=1.0
    ),
    "torchsde_srk": Entry(TorchSDE("srk"), "stochastic Runge-Kutta SRA by torchsde", "Roessler 2010; " + _LI, eta=1.0),
    "torchsde_adaptive": Entry(
        TorchSDE("srk", adaptive=True), "the same with step control, steps of the batch", _LI, 1.0, "tolerance"
    ),
}


def resolve(solver: Any, eta: Any = None) -> tuple[str, Any, Any]:
    """(name, solver, eta) of a name of SOLVERS or a solver object; eta None is the entry's own (0 for an object)."""
    if isinstance(solver, str):
        name = solver if solver in SOLVERS else _ours(solver)
        entry = SOLVERS[name]
        return name, entry.solver, entry.eta if eta is None else eta
    if isinstance(solver, Entry):
        return type(solver.solver).__name__, solver.solver, solver.eta if eta is None else eta
    if not isinstance(solver, type) and isinstance(solver, (Solver, BackEnd)):
        return str(solver), solver, 0.0 if eta is None else eta
    raise InputError(f"solver={solver!r}: give a name of SOLVERS or a solver object such as Multistep(2, 'x0')")


def _ours(name: str) -> str:
    """Our name of "library:name", another library's name of a sampler."""
    library, _, theirs = name.partition(":")
    if theirs and library in ALIASES:
        alias = ALIASES[library].get(theirs)
        if alias is None:
            raise InputError(f"solver={name!r} is unknown: {nearest(theirs, ALIASES[library])}")
        if not alias.solver:
            raise InputError(f"solver={name!r} is not offered: {alias.note}")
        return alias.solver
    if theirs:
        raise InputError(f"solver={name!r}: no library of that name; {nearest(library, ALIASES)}")
    known = find(name)
    hint = f"another library's name, write solver={known[0]!r}" if known else nearest(name, SOLVERS)
    raise InputError(f"solver={name!r} is unknown: {hint}")


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
