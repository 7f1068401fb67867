"""Every sampler of other libraries either resolves to a name of SOLVERS or is listed with the reason why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from scores import Gaussian
from sde import VP
from sde.errors import InputError
from solvers import GRIDS, SOLVERS, sample
from solvers.aliases import ALIASES, markdown_table
from solvers.catalogue import resolve

# What the libraries themselves call their samplers (November 2026), written down from their source.
NAMES = {
    "diffusers": """AmusedScheduler BlockRefinementScheduler CMStochasticIterativeScheduler CogVideoXDDIMScheduler
        CogVideoXDPMScheduler ConsistencyDecoderScheduler CosineDPMSolverMultistepScheduler DDIMScheduler DDIMInverseScheduler
        DDIMParallelScheduler DDPMScheduler DDPMParallelScheduler DDPMWuerstchenScheduler DEISMultistepScheduler
        DiscreteDDIMScheduler DPMSolverMultistepScheduler DPMSolverMultistepInverseScheduler DPMSolverSDEScheduler
        DPMSolverSinglestepScheduler EDMDPMSolverMultistepScheduler EDMEulerScheduler EntropyBoundScheduler
        EulerAncestralDiscreteScheduler EulerDiscreteScheduler FlowMapEulerDiscreteScheduler FlowMatchEulerDiscreteScheduler
        FlowMatchHeunDiscreteScheduler FlowMatchLCMScheduler HeliosScheduler HeliosDMDScheduler HeunDiscreteScheduler
        IPNDMScheduler KDPM2AncestralDiscreteScheduler KDPM2DiscreteScheduler LCMScheduler LMSDiscreteScheduler
        LTXEulerAncestralRFScheduler MiniMaxH3Scheduler PiflowScheduler PNDMScheduler RePaintScheduler RFD4ProteinaScheduler
        SASolverScheduler SCMScheduler ScoreSdeVeScheduler TCDScheduler UnCLIPScheduler UniPCMultistepScheduler
        VQDiffusionScheduler KarrasVeScheduler ScoreSdeVpScheduler""",
    "k_diffusion": """sample_euler sample_euler_ancestral sample_heun sample_dpm_2 sample_dpm_2_ancestral sample_lms
        sample_dpm_fast sample_dpm_adaptive sample_dpmpp_2s_ancestral sample_dpmpp_sde sample_dpmpp_2m sample_dpmpp_2m_sde
        sample_dpmpp_3m_sde log_likelihood""",
    "comfyui": """euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 exp_heun_2_x0 exp_heun_2_x0_sde dpm_2
        dpm_2_ancestral lms dpm_fast dpm_adaptive dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_sde_gpu dpmpp_2m
        dpmpp_2m_cfg_pp dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde dpmpp_3m_sde_gpu
        ddpm lcm ipndm ipndm_v deis res_multistep res_multistep_cfg_pp res_multistep_ancestral res_multistep_ancestral_cfg_pp
        gradient_estimation gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver sa_solver_pece ddim uni_pc uni_pc_bh2
        euler_ancestral_RF dpm_2_ancestral_RF dpmpp_2s_ancestral_RF ar_video cfgpp_ud10_ab""",
    "res4lyf": """res_2m res_3m dpmpp_2m dpmpp_3m abnorsett_2m abnorsett_3m abnorsett_4m deis_2m deis_3m deis_4m res_2s_rkmk2e
        res_2s res_2s_stable res_3s res_3s_non-monotonic res_3s_alt res_3s_cox_matthews res_3s_lie res_3s_sunstar
        res_3s_strehmel_weiner res_4s_krogstad res_4s_krogstad_alt res_4s_strehmel_weiner res_4s_strehmel_weiner_alt
        res_4s_cox_matthews res_4s_cfree4 res_4s_friedli res_4s_minchev res_4s_munthe-kaas res_5s res_5s_hochbruck-ostermann
        res_6s res_8s res_8s_alt res_10s res_15s res_16s etdrk2_2s etdrk3_a_3s etdrk3_b_3s etdrk4_4s etdrk4_4s_alt dpmpp_2s
        dpmpp_sde_2s dpmpp_3s lawson2a_2s lawson2b_2s lawson4_4s lawson41-gen_4s lawson41-gen-mod_4s ddim pec423_2h2s
        pec433_2h3s abnorsett2_1h2s abnorsett3_2h2s abnorsett4_3h2s lawson42-gen-mod_1h4s lawson43-gen-mod_2h4s
        lawson44-gen-mod_3h4s lawson45-gen-mod_4h4s ralston_2s ralston_3s ralston_4s midpoint_2s heun_2s heun_3s
        houwen-wray_3s kutta_3s ssprk3_3s ssprk4_4s rk38_4s rk4_4s rk5_7s rk6_7s bogacki-shampine_4s bogacki-shampine_7s
        dormand-prince_6s dormand-prince_13s tsi_7s euler irk_exp_diag_2s kraaijevanger_spijker_2s qin_zhang_2s
        pareschi_russo_2s pareschi_russo_alt_2s crouzeix_2s crouzeix_3s crouzeix_3s_alt gauss-legendre_2s gauss-legendre_3s
        gauss-legendre_4s gauss-legendre_4s_alternating_a gauss-legendre_4s_ascending_a gauss-legendre_4s_alt gauss-legendre_5s
        gauss-legendre_5s_ascending radau_ia_2s radau_ia_3s radau_iia_2s radau_iia_3s radau_iia_3s_alt radau_iia_5s
        radau_iia_7s radau_iia_9s radau_iia_11s lobatto_iiia_2s lobatto_iiia_3s lobatto_iiia_4s lobatto_iiib_2s lobatto_iiib_3s
        lobatto_iiib_4s lobatto_iiic_2s lobatto_iiic_3s lobatto_iiic_4s lobatto_iiic_star_2s lobatto_iiic_star_3s
        lobatto_iiid_2s lobatto_iiid_3s rk_beta""",
    "skrample": """Euler DPM1 DPM2 DPM3 Adams1 Adams2 Adams3 Adams4 Adams5 Adams6 Adams7 Adams8 Adams9 UniP1 UniP2 UniP3 UniP4
        UniP5 UniP6 UniP7 UniP8 UniP9 UniPC1 UniPC2 UniPC3 UniPC4 UniPC5 UniPC6 UniPC7 UniPC8 UniPC9 SPC RKUltra DynasauRK
        RKMoire RK1.Euler RK2.Mid RK2.Ralston RK2.Golden RK2.EES5_SYM RK2.EES5_MIN RK2.EES7_SYM RK2.EES7_MIN RK3.Kutta RK3.Heun
        RK3.Ralston RK3.Wray RK4.Kutta RK4.Eighth RK4.Ralston RKZ.Nystrom5 RKZ.Butcher6 RKZ.CV8 RKZ.Stepanov10 RKZ.Ono10
        RKZ.Harrier10 RKZ.Zhang10 RKZ.Feagin10 RKZ.Feagin12 RKZ.Feagin14 RKE2.Heun RKE2.Fehlberg RKE3.BogackiShampine
        RKE3.SSPRK3_4 RKE5.Fehlberg RKE5.CashKarp RKE5.DormandPrince SSP.RK3_3 SSP.RK3_5 SSP.RK3_6 SSP.RK3_7 SSP.RK3_8 SSP.RK4_5
        SSP.RK5_10 WSO.RK_3_2_2 WSO.RK_4_3_2 WSO.RK_5_3_3 WSO.RK_6_4_3 WSO.RK_7_4_4 WSO.RK_8_5_4 WSO.RK_9_5_5 Shanks1965.RK4_4
        Shanks1965.RK5_5 Shanks1965.RK6_6 Shanks1965.RK7_7 Shanks1965.RK7_9 Shanks1965.RK8_10 Shanks1965.RK8_12 RK2Custom
        RK3Custom RK4Custom""",
    "azula": """DDPMSampler DDIMSampler EulerSampler HeunSampler ItoSampler zABSampler vABSampler zEABSampler xEABSampler
        REABSampler PCSampler DPSSampler PGDMSampler RePaintSampler TDSSampler""",
    "diff_sampler": "euler heun dpm_2 ipndm ipndm_v deis dpm_pp unipc amed GITS",
    "edm": "edm_sampler ablation_sampler.euler ablation_sampler.heun",
    "score_sde": """euler_maruyama reverse_diffusion ancestral_sampling none langevin ald pc ode inpainter colorizer
        adaptive_em""",
    "dpm_solver": """multistep_dpmsolver++_1 multistep_dpmsolver++_2 multistep_dpmsolver++_3 multistep_dpmsolver_1
        multistep_dpmsolver_2 multistep_dpmsolver_3 singlestep_dpmsolver++_1 singlestep_dpmsolver++_2 singlestep_dpmsolver++_3
        singlestep_dpmsolver_1 singlestep_dpmsolver_2 singlestep_dpmsolver_3 singlestep_fixed adaptive_2 adaptive_3
        UniPC_bh1 UniPC_bh2 UniPC_vary_coeff DPM-Solver-v3""",
    "flow_matching": """euler midpoint rk4 heun3 dopri5 riemannian_euler riemannian_midpoint riemannian_rk4
        MixtureDiscreteEulerSolver""",
    "torchdiffeq": """dopri8 dopri5 bosh3 fehlberg2 adaptive_heun euler midpoint heun2 heun3 rk4 explicit_adams implicit_adams
        fixed_adams scipy_solver tsit5 implicit_euler implicit_midpoint trapezoid radauIIA3 gl4 radauIIA5 gl6 sdirk2 trbdf2""",
    "torchode": "euler heun dopri5 tsit5",
    "torchsde": "euler milstein srk midpoint heun euler_heun log_ode reversible_heun adjoint_reversible_heun",
    "diffrax": """Euler EulerHeun Heun Midpoint Ralston Bosh3 Tsit5 Dopri5 Dopri8 ImplicitEuler Kvaerno3 Kvaerno4 Kvaerno5
        KenCarp3 KenCarp4 KenCarp5 Sil3 LeapfrogMidpoint ReversibleHeun SemiImplicitEuler ItoMilstein StratonovichMilstein SEA
        SRA1 ShARK GeneralShARK SlowRK SPaRK HalfSolver ALIGN ShOULD QUICSORT""",
    "sbi": "euler_maruyama langevin gibbs ode",
    "papers": """deis.t_ab deis.rho_ab deis.rho_rk deis.ipndm ER-SDE.ve_1 ER-SDE.ve_2 ER-SDE.ve_3 ER-SDE.vp_1 ER-SDE.vp_2
        ER-SDE.vp_3 SA-Solver.few_steps SA-Solver.more_steps consistency_models.heun consistency_models.dpm
        consistency_models.ancestral consistency_models.onestep consistency_models.progdist consistency_models.euler
        consistency_models.multistep SiT.ode SiT.sde_euler SiT.sde_heun DDP.p_sample DDP.ddim_sample DDP.edm_sample
        DDP.sample_using_dpmpp physicsnemo.euler physicsnemo.heun physicsnemo.edm_stochastic_euler
        physicsnemo.edm_stochastic_heun deepinv.Euler deepinv.Heun gDDIM SEEDS Restart EDICT BDIA BELM""",
}
ALL = [(library, name) for library, names in NAMES.items() for name in names.split()]


@pytest.mark.parametrize("library", NAMES)
def test_every_name_is_resolved_or_explained(library):
    missing = [name for name in NAMES[library].split() if name not in ALIASES[library]]
    assert not missing
    for name, alias in ALIASES[library].items():
        assert alias.solver in SOLVERS or (not alias.solver and len(alias.note) > 10), (name, alias)


def test_the_samplers_that_a_note_advises_exist():
    for names in ALIASES.values():
        for name, alias in names.items():
            for word in re.findall(r"\b(?:use|or|see) ([a-z]\w*\d\w*|[a-z]+_\w+)", alias.note):
                assert word in SOLVERS, (name, alias.note)


def test_most_names_resolve():
    resolved = sum(bool(ALIASES[library][name].solver) for library, name in ALL)
    assert resolved >= 0.6 * len(ALL), (resolved, len(ALL))


def test_a_foreign_name_runs_and_says_what_it_is():
    score = Gaussian(VP(), torch.zeros(2), std=0.5)
    ours = sample(score, shape=(2, 2), solver="dpmpp_2m", nfe=6)
    theirs = sample(score, shape=(2, 2), solver="k_diffusion:sample_dpmpp_2m", nfe=6)
    assert torch.equal(ours.x, theirs.x)
    assert theirs.solver == "dpmpp_2m"


def test_a_name_that_has_no_counterpart_says_why():
    library, name = next((lib, n) for lib, n in ALL if not ALIASES[lib][n].solver)
    with pytest.raises(InputError, match="not offered"):
        resolve(f"{library}:{name}")


def test_unknown_libraries_and_names_are_told():
    with pytest.raises(InputError, match="k_diffusion"):
        resolve("kdiffusion:sample_euler")
    with pytest.raises(InputError, match="sample_euler"):
        resolve("k_diffusion:sample_eulr")


def test_a_foreign_name_without_its_library_is_recognised():
    with pytest.raises(InputError, match="diffusers:UniPCMultistepScheduler"):
        resolve("UniPCMultistepScheduler")


def test_the_grids_of_the_documentation_exist():
    """Every grid of GRIDS has its row, and what other libraries' names point to is one."""
    text = (Path(__file__).parents[1] / "docs" / "grids.md").read_text(encoding="utf-8")
    own, other = text.split("| name |")[1].split("\n\n")[0], text.split("| there |")[1].split("\n\n")[0]
    rows = [line.split("|") for line in own.splitlines()[2:]]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[1])} == set(GRIDS)
    for line in other.splitlines()[2:]:
        named = re.findall(r"`(\w+)`", line.split("|")[2])
        assert named
        assert set(named) <= {*GRIDS, "rho", "Cosine"}, line


def test_the_table_of_the_documentation_is_this_one():
    text = (Path(__file__).parents[1] / "docs" / "names.md").read_text(encoding="utf-8")
    assert markdown_table() in text, "run: python -m benchmarks samplers --write"
