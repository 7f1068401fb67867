"""What other libraries call our samplers: ``sample(score, solver="k_diffusion:sample_dpmpp_2m", ...)``.

``ALIASES[library][name]`` is an ``Alias``: a name of SOLVERS, with what else that library does by default (grid, noise level,
options), or no name and the reason why not. Names are the step rules alone: thresholding, clipping, guidance and rounding of
times to integers belong to those libraries' pipelines, not to a solver, and are not imitated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Alias(NamedTuple):
    """``solver`` is a name of SOLVERS, or "" where there is none; ``note`` says what else to set, or why there is none."""

    solver: str
    note: str = ""


def _library(ours: Mapping[str, str], notes: Mapping[str, str], without: Mapping[str, str]) -> dict[str, Alias]:
    """From {our name: their names}, {their name: a note} and {a reason: their names that have no counterpart}."""
    table = {theirs: Alias(name, notes.get(theirs, "")) for name, many in ours.items() for theirs in many.split()}
    table.update({theirs: Alias("", reason) for reason, many in without.items() for theirs in many.split()})
    return table


_DISCRETE = "a sampler of discrete tokens, not of a Gaussian path"
_CFG_PP = (
    "CFG++ is a guidance (the renoising takes the unconditional prediction), not a step rule: solvers.guided.cfg_pp(plan, w) "
    "gives the one that makes it of a plan of one-call steps"
)
_GUIDED = (
    "conditioning on an observation is a guidance, not a step rule: scores.guidance has dps, pigdm and inpaint, for any sampler"
)
_HIGH = "a Runge-Kutta method of more than 8 stages: fewer than two steps at 16 calls; use edm_rk8 or dopri8 for that accuracy"
_DIRK = (
    "diagonally implicit: each stage solves an equation; fixed-point sweeps do not keep its stability, use gauss4 or radau_iia3"
)
_IMPLICIT = "use gauss4 or radau_iia3; RungeKutta(fixed_point(tableau, sweeps)) makes any other of the family"
_HYBRID = (
    "a hybrid of multistep and exponential Runge-Kutta: use dpmpp_3m_started, or unipc_3, of the same order for fewer calls"
)
_VARIANT = "another tableau of the same order and cost: use etdrk4, krogstad, strehmel_weiner or friedli"
_SSP = "strong stability preserving at large steps, which a smooth flow does not ask for: use ssprk3 or ssprk43"
_OVERDAMPED = "a solver of Langevin dynamics in position and momentum with its own noise; see pc_ddpm_underdamped"

_SQUARED = "its eta is our eta squared"

ALIASES: dict[str, dict[str, Alias]] = {
    "diffusers": _library(
        {
            "ddim": "DDIMScheduler DDIMInverseScheduler DDIMParallelScheduler CogVideoXDDIMScheduler",
            "ddpm": "DDPMScheduler DDPMParallelScheduler DDPMWuerstchenScheduler UnCLIPScheduler",
            "dpmpp_2m_lower_final": "DPMSolverMultistepScheduler DPMSolverMultistepInverseScheduler "
            "EDMDPMSolverMultistepScheduler",
            "dpmpp_2m_sde": "CogVideoXDPMScheduler CosineDPMSolverMultistepScheduler",
            "dpmpp_sde_published": "DPMSolverSDEScheduler",
            "dpmpp_2s": "DPMSolverSinglestepScheduler",
            "deis_lam_2": "DEISMultistepScheduler",
            "edm_euler": "EulerDiscreteScheduler EDMEulerScheduler",
            "edm_heun": "HeunDiscreteScheduler",
            "euler": "FlowMatchEulerDiscreteScheduler",
            "heun": "FlowMatchHeunDiscreteScheduler",
            "euler_ancestral": "EulerAncestralDiscreteScheduler",
            "euler_ancestral_rf": "LTXEulerAncestralRFScheduler",
            "dpm_solver_2": "KDPM2DiscreteScheduler",
            "dpm_2_ancestral": "KDPM2AncestralDiscreteScheduler",
            "ipndm_4": "IPNDMScheduler",
            "pndm": "PNDMScheduler",
            "lms_4": "LMSDiscreteScheduler",
            "sa_solver": "SASolverScheduler",
            "unipc_2": "UniPCMultistepScheduler",
            "edm_sde": "KarrasVeScheduler",
            "euler_maruyama": "ScoreSdeVpScheduler",
            "pc_exponential_integrator": "ScoreSdeVeScheduler",
            "consistency": "CMStochasticIterativeScheduler ConsistencyDecoderScheduler SCMScheduler",
            "lcm": "LCMScheduler FlowMatchLCMScheduler",
            "tcd": "TCDScheduler",
        },
        {
            "DDIMScheduler": "its eta is ddim_eta's",
            "DDIMInverseScheduler": "encode(score, x, solver='ddim', ...)",
            "DPMSolverMultistepInverseScheduler": "encode with dpmpp_2m",
            "DPMSolverMultistepScheduler": "solver_order=3: dpmpp_3m_published; solver_type heun: dpmpp_2m_heun; "
            "dpmsolver: dpm_2m; "
            "sde-dpmsolver++: dpmpp_2m_sde",
            "DPMSolverSinglestepScheduler": "solver_order=3: dpmpp_3s; algorithm_type dpmsolver: dpm_solver_2, dpm_solver_3",
            "DEISMultistepScheduler": "its logrho weights are those of a polynomial in lambda",
            "FlowMatchEulerDiscreteScheduler": "on the Linear path, where euler, edm_euler in sigma/alpha and ddim differ",
            "PNDMScheduler": "skip_prk_steps=True: plms",
            "UniPCMultistepScheduler": "solver_type bh1: unipc_2_bh1; solver_order=3: unipc_3",
            "SCMScheduler": "on the Trigonometric path",
            "FlowMatchLCMScheduler": "on the Linear path",
            "SASolverScheduler": "unless told otherwise AdamsMoulton(2, 2), and eta 1 at time steps 200 to 800, else 0",
        },
        {
            _DISCRETE: "AmusedScheduler BlockRefinementScheduler DiscreteDDIMScheduler EntropyBoundScheduler "
            "VQDiffusionScheduler",
            "needs a flow-map network u(x, s, t) of two times": "FlowMapEulerDiscreteScheduler",
            "needs a network that predicts a policy, not a point": "PiflowScheduler",
            "changes the resolution between stages: a pipeline, not a step rule": "HeliosScheduler HeliosDMDScheduler",
            "inpainting: scores.guidance.inpaint around the score, solvers.guided.Resample around the solver for its jumps": ""
            "RePaintScheduler",
            "protein frames: the rotations are not on a Gaussian path": "RFD4ProteinaScheduler",
            "tied to one model's own stages and caches": "MiniMaxH3Scheduler",
        },
    ),
    "k_diffusion": _library(
        {
            "edm_euler": "sample_euler",
            "euler_ancestral": "sample_euler_ancestral",
            "edm_heun": "sample_heun",
            "dpm_solver_2": "sample_dpm_2",
            "dpm_2_ancestral": "sample_dpm_2_ancestral",
            "lms_4": "sample_lms",
            "dpm_fast": "sample_dpm_fast",
            "dpm_adaptive": "sample_dpm_adaptive",
            "dpmpp_2s_ancestral": "sample_dpmpp_2s_ancestral",
            "dpmpp_sde_published": "sample_dpmpp_sde",
            "dpmpp_2m": "sample_dpmpp_2m",
            "dpmpp_2m_sde": "sample_dpmpp_2m_sde",
            "dpmpp_3m_sde_published": "sample_dpmpp_3m_sde",
        },
        {
            "sample_euler": "s_churn > 0: Churn(RungeKutta(EULER, 'rho'), s_churn)",
            "sample_heun": "s_churn > 0: edm_sde",
            "sample_dpmpp_2m_sde": "solver_type heun: dpmpp_2m_sde_heun; its eta is our eta squared",
            "sample_dpmpp_3m_sde": "D2 at half its weight: order two; dpmpp_3m_sde has it right; its eta is our eta squared",
            "sample_euler_ancestral": "its eta is ours, and DDIM's",
            "sample_dpm_2_ancestral": "its eta is ours",
            "sample_dpmpp_2s_ancestral": "its eta is ours",
            "sample_dpmpp_sde": "its eta is another parameter, which agrees with ours at 0 and 1",
        },
        {"a likelihood, not a sampler: sde.log_likelihood's work": "log_likelihood"},
    ),
    "comfyui": _library(
        {
            "edm_euler": "euler",
            "euler_ancestral": "euler_ancestral",
            "edm_heun": "heun",
            "exp_heun_2_x0": "exp_heun_2_x0",
            "exp_heun_2_x0_sde": "exp_heun_2_x0_sde",
            "dpm_solver_2": "dpm_2",
            "dpm_2_ancestral": "dpm_2_ancestral",
            "lms_4": "lms",
            "dpm_fast": "dpm_fast",
            "dpm_adaptive": "dpm_adaptive",
            "dpmpp_2s_ancestral": "dpmpp_2s_ancestral",
            "dpmpp_sde_published": "dpmpp_sde dpmpp_sde_gpu",
            "dpmpp_2m": "dpmpp_2m",
            "dpmpp_2m_sde": "dpmpp_2m_sde dpmpp_2m_sde_gpu",
            "dpmpp_2m_sde_heun": "dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu",
            "dpmpp_3m_sde_published": "dpmpp_3m_sde dpmpp_3m_sde_gpu",
            "ddpm": "ddpm",
            "lcm": "lcm",
            "ipndm_4": "ipndm",
            "ipndm_v_4": "ipndm_v",
            "deis_t_3": "deis",
            "res_2m": "res_multistep",
            "gradient_estimation": "gradient_estimation",
            "er_sde_3_published": "er_sde",
            "seeds_2": "seeds_2",
            "seeds_3": "seeds_3",
            "sa_solver": "sa_solver",
            "sa_solver_pece": "sa_solver_pece",
            "ddim": "ddim",
            "unipc_3_bh1": "uni_pc",
            "unipc_3": "uni_pc_bh2",
            "euler_ancestral_rf": "euler_ancestral_RF",
            "dpm_2_ancestral_rf": "dpm_2_ancestral_RF",
            "dpmpp_2s_ancestral_rf": "dpmpp_2s_ancestral_RF",
        },
        {
            "ipndm_v": "with the right weights: the released ones have a misplaced parenthesis",
            "deis": "max_order=3, mode tab",
            **dict.fromkeys(["dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"], _SQUARED),
            **dict.fromkeys(["seeds_2", "seeds_3", "exp_heun_2_x0_sde"], _SQUARED),
            **dict.fromkeys(["dpmpp_3m_sde", "dpmpp_3m_sde_gpu"], "D2 at half its weight; " + _SQUARED),
            **dict.fromkeys(["euler_ancestral_RF", "dpm_2_ancestral_RF", "dpmpp_2s_ancestral_RF"], _SQUARED),
        },
        {
            _CFG_PP: "euler_cfg_pp euler_ancestral_cfg_pp dpmpp_2s_ancestral_cfg_pp dpmpp_2m_cfg_pp res_multistep_cfg_pp "
            "res_multistep_ancestral_cfg_pp gradient_estimation_cfg_pp cfgpp_ud10_ab",
            "an average of slopes at the end points of two steps, of order two like edm_heun": "heunpp2",
            "a multistep history across freshly drawn noise, which is not one trajectory's: of order one, use "
            "dpmpp_2m_sde": "res_multistep_ancestral",
            "autoregressive over video frames: a pipeline": "ar_video",
        },
    ),
    "res4lyf": _library(
        {
            "res_2m": "res_2m abnorsett_2m",
            "res_3m": "res_3m abnorsett_3m",
            "dpmpp_2m": "dpmpp_2m",
            "dpmpp_3m_published": "dpmpp_3m",
            "dpmpp_4m": "abnorsett_4m",
            "deis_t_2": "deis_2m",
            "deis_t_3": "deis_3m",
            "deis_t_4": "deis_4m",
            "res_2s": "res_2s res_2s_rkmk2e res_2s_stable rk_beta",
            "res_3s": "res_3s res_3s_alt",
            "etdrk3": "res_3s_cox_matthews etdrk3_a_3s etdrk3_b_3s",
            "krogstad": "res_4s_krogstad res_4s_krogstad_alt",
            "strehmel_weiner": "res_4s_strehmel_weiner res_4s_strehmel_weiner_alt",
            "etdrk4": "res_4s_cox_matthews etdrk4_4s etdrk4_4s_alt",
            "friedli": "res_4s_friedli",
            "hochbruck_ostermann": "res_5s res_5s_hochbruck-ostermann",
            "etdrk2": "etdrk2_2s",
            "dpmpp_2s": "dpmpp_2s",
            "dpmpp_2s_sde": "dpmpp_sde_2s",
            "dpmpp_3s": "dpmpp_3s",
            "lawson2a": "lawson2a_2s",
            "lawson2b": "lawson2b_2s",
            "lawson4": "lawson4_4s",
            "generalised_lawson4": "lawson41-gen_4s",
            "ddim": "ddim",
            "ralston2": "ralston_2s",
            "ralston3": "ralston_3s",
            "ralston4": "ralston_4s",
            "midpoint": "midpoint_2s",
            "heun": "heun_2s",
            "heun3": "heun_3s",
            "houwen_wray3": "houwen-wray_3s",
            "kutta3": "kutta_3s",
            "ssprk3": "ssprk3_3s",
            "ssprk43": "ssprk4_4s",
            "rk38": "rk38_4s",
            "rk4": "rk4_4s",
            "rk5_butcher": "rk5_7s",
            "rk6_butcher": "rk6_7s",
            "rk_bosh3": "bogacki-shampine_4s",
            "chi_dopri5": "dormand-prince_6s",
            "chi_tsit5": "tsi_7s",
            "euler": "euler",
            "gauss4": "gauss-legendre_2s",
            "radau_iia3": "radau_iia_2s",
            "trapezoid": "lobatto_iiia_2s",
        },
        {
            "dpmpp_3m": "D2 at half its weight as released; dpmpp_3m has it right",
            **dict.fromkeys(
                ["abnorsett_2m", "abnorsett_3m", "abnorsett_4m"],
                "theirs has the weights of equal steps in lambda whatever the grid",
            ),
            "euler": "its linear samplers step in sigma, which is t on EDM and Linear; on VP, those named edm_",
        },
        {
            "a variant of res_3s with other nodes": "res_3s_non-monotonic res_3s_lie res_3s_sunstar res_3s_strehmel_weiner",
            _VARIANT: "res_4s_cfree4 res_4s_minchev res_4s_munthe-kaas res_6s lawson41-gen-mod_4s",
            _HIGH: "res_8s res_8s_alt res_10s res_15s res_16s dormand-prince_13s bogacki-shampine_7s",
            _HYBRID: "pec423_2h2s pec433_2h3s abnorsett2_1h2s abnorsett3_2h2s abnorsett4_3h2s lawson42-gen-mod_1h4s "
            "lawson43-gen-mod_2h4s lawson44-gen-mod_3h4s lawson45-gen-mod_4h4s",
            _DIRK: "irk_exp_diag_2s kraaijevanger_spijker_2s qin_zhang_2s pareschi_russo_2s pareschi_russo_alt_2s crouzeix_2s "
            "crouzeix_3s crouzeix_3s_alt",
            _IMPLICIT: "gauss-legendre_3s radau_iia_3s radau_iia_3s_alt gauss-legendre_4s gauss-legendre_4s_alternating_a "
            "gauss-legendre_4s_ascending_a gauss-legendre_4s_alt "
            "gauss-legendre_5s gauss-legendre_5s_ascending radau_ia_2s radau_ia_3s radau_iia_5s radau_iia_7s radau_iia_9s "
            "radau_iia_11s lobatto_iiia_3s lobatto_iiia_4s lobatto_iiib_2s lobatto_iiib_3s lobatto_iiib_4s lobatto_iiic_2s "
            "lobatto_iiic_3s lobatto_iiic_4s lobatto_iiic_star_2s lobatto_iiic_star_3s lobatto_iiid_2s lobatto_iiid_3s",
        },
    ),
    "skrample": _library(
        {
            "ddim": "Euler DPM1 UniP1 RK1.Euler",
            "dpmpp_2m": "DPM2",
            "dpmpp_3m_published": "DPM3",
            "lms_1": "Adams1",
            "lms_2": "Adams2",
            "lms_3": "Adams3",
            "lms_4": "Adams4",
            "unip_2": "UniP2",
            "unip_3": "UniP3",
            "unip_4": "UniP4",
            "unipc_1": "UniPC1",
            "unipc_2": "UniPC2",
            "unipc_3": "UniPC3",
            "unipc_4": "UniPC4",
            "unipc_5": "UniPC5",
            "unipc_6": "UniPC6",
            "edm_midpoint": "RK2.Mid",
            "edm_ralston2": "RK2.Ralston",
            "edm_kutta3": "RK3.Kutta",
            "edm_heun3": "RK3.Heun",
            "edm_ralston3": "RK3.Ralston",
            "edm_rk4": "RK4.Kutta Shanks1965.RK4_4",
            "edm_rk38": "RK4.Eighth",
            "edm_ralston4": "RK4.Ralston",
            "houwen_wray3": "RK3.Wray",
            "rk5_nystrom": "RKZ.Nystrom5",
            "edm_rk6": "RKZ.Butcher6",
            "edm_rk8": "RKZ.CV8",
            "ees25": "RK2.EES5_SYM RK2.EES5_MIN",
            "ees27": "RK2.EES7_SYM RK2.EES7_MIN",
            "edm_heun": "RKE2.Heun",
            "rk_bosh3": "RKE3.BogackiShampine",
            "ssprk43": "RKE3.SSPRK3_4",
            "rk_fehlberg5": "RKE5.Fehlberg",
            "edm_cash_karp5": "RKE5.CashKarp",
            "chi_dopri5": "RKE5.DormandPrince",
            "edm_ssprk3": "SSP.RK3_3",
        },
        {
            "RK3.Wray": "in t here; RungeKutta(tableau, 'rho') is the same in sigma/alpha",
            "DPM3": "D2 at half its weight as released; dpmpp_3m has it right",
        },
        {
            "beyond order four a multistep of first-order starts gains nothing: lms_4, or dpmpp_5m_started": ""
            "Adams5 Adams6 Adams7 "
            "Adams8 Adams9",
            "beyond order six the released weights lose their digits; use unipc_6": "UniP5 UniP6 UniP7 UniP8 "
            "UniP9 UniPC7 UniPC8 "
            "UniPC9",
            "a random blend of a predictor and a corrector; use unipc_3": "SPC",
            "a frame for tableaux: RungeKutta(Tableau(...), variable)": "RKUltra DynasauRK RKMoire RK2Custom "
            "RK3Custom RK4Custom",
            "another two-stage tableau of order two: RungeKutta(Tableau(...), 'rho')": "RK2.Golden",
            "order one or two of its pair; use adaptive_heun": "RKE2.Fehlberg",
            _HIGH: "RKZ.Stepanov10 RKZ.Ono10 RKZ.Harrier10 RKZ.Zhang10 RKZ.Feagin10 RKZ.Feagin12 RKZ.Feagin14 "
            "Shanks1965.RK8_10 "
            "Shanks1965.RK8_12",
            _SSP: "SSP.RK3_5 SSP.RK3_6 SSP.RK3_7 SSP.RK3_8 SSP.RK4_5 SSP.RK5_10",
            "weak stage order, for stiff boundary terms that the flow does not have: use the classical method of its order": ""
            "WSO.RK_3_2_2 WSO.RK_4_3_2 WSO.RK_5_3_3 WSO.RK_6_4_3 WSO.RK_7_4_4 WSO.RK_8_5_4 WSO.RK_9_5_5",
            "its order conditions hold approximately (Shanks): use rk5_butcher, rk6_butcher or edm_rk8": ""
            ""
            "Shanks1965.RK5_5 Shanks1965.RK6_6 Shanks1965.RK7_7 Shanks1965.RK7_9",
        },
    ),
    "azula": _library(
        {
            "ddpm": "DDPMSampler",
            "ddim": "DDIMSampler",
            "edm_euler": "EulerSampler",
            "edm_heun": "HeunSampler",
            "exponential_euler_sde": "ItoSampler",
            "lms_3": "zABSampler",
            "adams_3": "vABSampler",
            "dpm_3m": "zEABSampler",
            "dpmpp_3m": "xEABSampler",
            "pc_ddpm_sigma": "PCSampler",
        },
        {
            "DDIMSampler": "its eta is the square of ddim_eta's",
            "xEABSampler": "order=3",
            "zABSampler": "order=3",
            "zEABSampler": "order=3",
            "vABSampler": "order=3; theirs is in sigma/(alpha + sigma), which is t on Linear alone",
            "PCSampler": "eta=0 (its predictor is ddim), snr = sqrt(delta)/2, to first order in delta",
        },
        {
            _GUIDED: "DPSSampler PGDMSampler TDSSampler RePaintSampler",
            "of order one as released (alpha_s^2 + sigma_t^2 for alpha_s^2 + sigma_s^2): use dpmpp_3m": "REABSampler",
        },
    ),
    "diff_sampler": _library(
        {
            "edm_euler": "euler",
            "edm_heun": "heun",
            "dpm_solver_2": "dpm_2",
            "ipndm_4": "ipndm",
            "ipndm_v_4": "ipndm_v",
            "deis_t_4": "deis",
            "dpmpp_3m_published": "dpm_pp",
            "unipc_3": "unipc",
        },
        {
            "ipndm_v": "with the right weights: the released ones have a misplaced parenthesis",
            "deis": "deis_alg rhoab: deis_rho_4",
        },
        {"a trained network that places the points": "amed", "a grid, not a sampler": "GITS"},
    ),
    "edm": _library(
        {
            "edm_sde": "edm_sampler",
            "edm_euler": "ablation_sampler.euler",
            "edm_heun": "ablation_sampler.heun",
        },
        {"edm_sampler": "S_churn=0: edm_heun"},
        {},
    ),
    "score_sde": _library(
        {
            "euler_maruyama": "euler_maruyama",
            "exponential_integrator": "reverse_diffusion",
            "ddpm": "ancestral_sampling",
            "pc_ddpm": "pc langevin",
            "annealed_langevin": "none ald",
            "dopri5": "ode",
        },
        {
            "reverse_diffusion": "the same on VE; on VP theirs discretises the linear part too",
            "ancestral_sampling": "on VE; on VP, where its noise has the variance beta_k, ddpm_discrete",
            "none": "as predictor: Langevin steps alone",
            "ode": "scipy's RK45 is the same pair",
        },
        {
            _GUIDED: "inpainter colorizer",
            "step control for the SDE by an embedded pair: torchsde_adaptive": "adaptive_em",
        },
    ),
    "dpm_solver": _library(
        {
            "ddim": "multistep_dpmsolver++_1 singlestep_dpmsolver++_1",
            "dpm_solver_1": "multistep_dpmsolver_1 singlestep_dpmsolver_1",
            "dpmpp_2m_lower_final": "multistep_dpmsolver++_2",
            "dpmpp_3m_published": "multistep_dpmsolver++_3",
            "dpm_2m": "multistep_dpmsolver_2",
            "dpm_3m_published": "multistep_dpmsolver_3",
            "dpmpp_2s": "singlestep_dpmsolver++_2",
            "dpmpp_3s": "singlestep_dpmsolver++_3",
            "dpm_solver_2": "singlestep_dpmsolver_2",
            "dpm_solver_3": "singlestep_dpmsolver_3 singlestep_fixed",
            "dpm_adaptive": "adaptive_3",
            "dpm_adaptive_12": "adaptive_2",
            "unipc_3_bh1": "UniPC_bh1",
            "unipc_3": "UniPC_bh2",
            "unipc_3_exact": "UniPC_vary_coeff",
            "dpm_v3_3_gaussian_published": "DPM-Solver-v3",
        },
        {
            "DPM-Solver-v3": "this row has the statistics of a Gaussian; with those of your model: "
            "DPMSolverV3(3, statistics(score, data), ...), see docs/dpm_v3.md",
            "UniPC_vary_coeff": "with exact weights: the published ones are of order one",
            "singlestep_dpmsolver++_3": "solver_type taylor: dpmpp_3s_taylor",
            "singlestep_dpmsolver_3": "the schedule of orders that spends the budget exactly: dpm_fast",
        },
        {},
    ),
    "flow_matching": _library(
        {"euler": "euler", "midpoint": "midpoint", "rk38": "rk4", "heun3": "heun3", "dopri5": "dopri5"},
        {"rk4": "torchdiffeq's rk4 is the 3/8 rule"},
        {
            "a flow on a manifold, not on a Gaussian path": "riemannian_euler riemannian_midpoint riemannian_rk4",
            _DISCRETE: "MixtureDiscreteEulerSolver",
        },
    ),
    "torchdiffeq": _library(
        {
            "dopri8": "dopri8",
            "dopri5": "dopri5",
            "bosh3": "bosh3",
            "adaptive_heun": "adaptive_heun",
            "euler": "euler",
            "midpoint": "midpoint",
            "heun": "heun2",
            "heun3": "heun3",
            "rk38": "rk4",
            "adams_4": "explicit_adams fixed_adams",
            "abm_4": "implicit_adams",
            "adaptive_tsit5": "tsit5",
            "implicit_midpoint": "implicit_midpoint",
            "trapezoid": "trapezoid",
            "radau_iia3": "radauIIA3",
            "gauss4": "gl4",
        },
        {"rk4": "the 3/8 rule", "explicit_adams": "fixed order four here", "implicit_adams": "one correction a step"},
        {
            "its error runs to 200 times its tolerance on this flow": "fehlberg2",
            "scipy on the host, one call a sample at a time: use dopri5": "scipy_solver",
            "of order one: an implicit Euler by sweeps is no more stable than euler; use implicit_midpoint": "implicit_euler",
            _DIRK: "sdirk2 trbdf2",
            _IMPLICIT: "radauIIA5 gl6",
        },
    ),
    "torchode": _library(
        {"euler": "euler", "heun": "heun", "adaptive_dopri5": "dopri5", "adaptive_tsit5": "tsit5"},
        {"dopri5": "step control a sample, as theirs", "tsit5": "step control a sample, as theirs"},
        {},
    ),
    "torchsde": _library(
        {
            "torchsde_euler": "euler",
            "torchsde_milstein": "milstein",
            "torchsde_srk": "srk",
            "stochastic_heun": "heun euler_heun midpoint",
            "reversible_heun": "reversible_heun adjoint_reversible_heun",
        },
        {
            "heun": "Stratonovich and Ito are one here, the noise being additive",
            "midpoint": "another stage, half-way, of the same orders",
            "reversible_heun": "eta = 0",
        },
        {
            "its terms beyond Euler vanish for additive noise: torchsde_euler": "log_ode",
        },
    ),
    "diffrax": _library(
        {
            "euler": "Euler",
            "heun": "Heun",
            "midpoint": "Midpoint",
            "ralston2": "Ralston",
            "adaptive_bosh3": "Bosh3",
            "adaptive_tsit5": "Tsit5",
            "adaptive_dopri5": "Dopri5",
            "dopri8": "Dopri8",
            "stochastic_heun": "EulerHeun",
            "milstein": "ItoMilstein StratonovichMilstein",
            "sra1": "SRA1",
            "reversible_heun": "ReversibleHeun",
            "belm": "LeapfrogMidpoint",
        },
        {
            "LeapfrogMidpoint": "with the weights of unequal steps, in sigma/alpha",
            "EulerHeun": "one predictor and one corrector, the noise being additive",
        },
        {
            "of order one: an implicit Euler by sweeps is no more stable than euler; use implicit_midpoint": "ImplicitEuler",
            _DIRK: "Kvaerno3 Kvaerno4 Kvaerno5 KenCarp3 KenCarp4 KenCarp5 Sil3",
            "for systems in position and momentum": "SemiImplicitEuler",
            "additive noise of strong order 1.5 like sra1, by other stages": "SEA ShARK GeneralShARK SlowRK SPaRK",
            "step doubling around another solver: an adaptive pair does it for fewer calls": "HalfSolver",
            _OVERDAMPED: "ALIGN ShOULD QUICSORT",
        },
    ),
    "sbi": _library(
        {"euler_maruyama": "euler_maruyama", "pc_ddpm": "langevin", "dopri5": "ode"},
        {"langevin": "as corrector"},
        {"a resampling of x_t given x_0 between steps: consistency does it where x_0 is a sample": "gibbs"},
    ),
    "papers": _library(
        {
            "deis_t_3": "deis.t_ab",
            "deis_rho_3": "deis.rho_ab",
            "edm_heun3": "deis.rho_rk",
            "ipndm_4": "deis.ipndm",
            "er_sde_1": "ER-SDE.ve_1 ER-SDE.vp_1",
            "er_sde_2": "ER-SDE.ve_2 ER-SDE.vp_2",
            "er_sde_3_published": "ER-SDE.ve_3 ER-SDE.vp_3",
            "sa_solver": "SA-Solver.few_steps SA-Solver.more_steps",
            "edm_heun": "consistency_models.heun physicsnemo.heun deepinv.Heun",
            "dpm_solver_2": "consistency_models.dpm",
            "euler_ancestral": "consistency_models.ancestral",
            "consistency": "consistency_models.onestep consistency_models.multistep",
            "ddim": "consistency_models.progdist DDP.ddim_sample",
            "edm_euler": "consistency_models.euler physicsnemo.euler deepinv.Euler",
            "dopri5": "SiT.ode",
            "euler_maruyama": "SiT.sde_euler",
            "stochastic_heun": "SiT.sde_heun",
            "ddpm": "DDP.p_sample",
            "edm_sde": "DDP.edm_sample physicsnemo.edm_stochastic_heun",
            "dpmpp_2m": "DDP.sample_using_dpmpp",
            "gddim": "gDDIM",
            "seeds_3": "SEEDS",
            "restart": "Restart",
            "belm": "BELM",
            "bdia": "BDIA",
        },
        {
            "SiT.sde_euler": "its forms of the diffusion are eta as a function of t, or ReverseSDE(diffusion=...)",
            "gDDIM": "isotropic noise; on other noise there is no scalar (alpha, sigma)",
        },
        {
            "EDM's churn around Euler: Churn(RungeKutta(EULER, 'rho'))": "physicsnemo.edm_stochastic_euler",
            "two coupled states whose mixing loses the order: belm and bdia are reversible at order two": "EDICT",
        },
    ),
}


def find(name: str) -> list[str]:
    """All "library:name" under which ``name`` is known elsewhere."""
    return [f"{library}:{name}" for library, names in ALIASES.items() if name in names]


def markdown_table() -> str:
    """One table a library: their name, ours or the reason why not, what else to set."""
    parts = []
    for library, names in ALIASES.items():
        rows = [f"| `{name}` | {f'`{a.solver}`' if a.solver else 'not offered'} | {a.note} |" for name, a in names.items()]
        parts.append("\n".join([f"### {library}", "", "| there | here | note |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)
