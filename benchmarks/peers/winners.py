"""The best configuration of all libraries in each cell of a published comparison, as lines of a sweep.

391 configurations were run on four problems and two noises (``benchmarks/peers.json`` holds the errors): the rows below are the
winners by root mean square error at a number of network calls. No library wins everywhere.
"""

from __future__ import annotations

from typing import NamedTuple


class Winner(NamedTuple):
    """A line and its grid."""

    line: str
    grid: str


_DS3, _DS4 = "diff_sampler/ipndm3", "diff_sampler/ipndm4"
_ZEAB3, _XEAB4 = "azula/zEAB3", "azula/xEAB4"
_PLUS2, _PLAIN2 = "dpm_solver/multistep2", "dpm_solver/multistep2:algorithm_type=dpmsolver"

#: problem:noise -> the winners at 5, 8, 10, 15, 20 and 50 calls
PEER_WINNERS: dict[str, tuple[Winner, ...]] = {
    "gauss64:vp": (
        Winner(_DS3, "log_snr"),
        Winner(_DS3, "log_snr"),
        Winner(_ZEAB3, "karras"),
        Winner(_ZEAB3, "karras"),
        Winner("uni_pc/bh2_3", "log_snr"),
        Winner("diffusers/UniPC3:final_sigmas_type=sigma_min", "log_snr"),
    ),
    "gauss64:ve": (
        Winner(_DS4, "log_snr"),
        Winner(_DS3, "log_snr"),
        Winner(_ZEAB3, "karras"),
        Winner("uni_pc/vary_coeff_2", "log_snr"),
        Winner("diff_sampler/unipc3", "log_snr"),
        Winner("uni_pc/bh1_3", "log_snr"),
    ),
    "ring2:vp": (
        Winner(_PLUS2, "quadratic"),
        Winner(_PLAIN2, "quadratic"),
        Winner(_DS4, "log_snr"),
        Winner(_PLAIN2, "quadratic"),
        Winner(_DS4, "log_snr"),
        Winner(_XEAB4, "log_snr"),
    ),
    "ring2:ve": (
        Winner("diffusers/Heun:timestep_spacing=trailing", "uniform"),
        Winner("dpm_solver/singlestep3", "log_snr"),
        Winner("diffusers/DEIS3", "log_snr"),
        Winner(_DS4, "karras"),
        Winner(_DS4, "log_snr"),
        Winner(_XEAB4, "log_snr"),
    ),
    "gmm256:vp": (
        Winner(_DS3, "log_snr"),
        Winner(_PLUS2, "quadratic"),
        Winner(_DS4, "log_snr"),
        Winner("uni_pc/bh2_3", "log_snr"),
        Winner("uni_pc/bh2_3", "log_snr"),
        Winner("diff_sampler/deis4", "uniform"),
    ),
    "gmm256:ve": (
        Winner("diffusers/PNDM", "uniform"),
        Winner(_DS3, "karras"),
        Winner("diff_sampler/deis4", "karras"),
        Winner("diff_sampler/unipc3", "log_snr"),
        Winner(_XEAB4, "log_snr"),
        Winner(_XEAB4, "karras"),
    ),
    "digits64:vp": (
        Winner(_PLUS2, "quadratic"),
        Winner(_DS4, "log_snr"),
        Winner(_DS4, "log_snr"),
        Winner(_DS4, "log_snr"),
        Winner(_DS4, "log_snr"),
        Winner("uni_pc/bh1_3", "log_snr"),
    ),
    "digits64:ve": (
        Winner(_DS3, "karras"),
        Winner(_DS4, "karras"),
        Winner(_DS4, "karras"),
        Winner(_DS4, "karras"),
        Winner("diff_sampler/unipc3", "log_snr"),
        Winner(_XEAB4, "karras"),
    ),
}

#: One configuration everywhere: what a user of each library would compare with.
POPULAR: tuple[Winner, ...] = (
    Winner(_DS3, "log_snr"),
    Winner(_DS4, "karras"),
    Winner(_ZEAB3, "karras"),
    Winner(_XEAB4, "log_snr"),
    Winner("uni_pc/bh2_3", "log_snr"),
    Winner("diffusers/UniPC3:final_sigmas_type=sigma_min", "log_snr"),
    Winner("diffusers/UniPC2", "karras"),
    Winner("diffusers/DEIS3", "karras"),
    Winner("diffusers/DPMSolverMultistep2", "karras"),
    Winner("diffusers/DPMSolverMultistep2", "log_snr"),
    Winner("k_diffusion/dpmpp_2m:end=stop", "log_snr"),
    Winner("k_diffusion/lms", "karras"),
    Winner("dpm_solver/singlestep3", "log_snr"),
    Winner("edm/edm", "karras"),
    Winner("torchdiffeq/rk4", "karras"),
    Winner("flow_matching/midpoint", "log_snr"),
    Winner("diffusers/DDIM", "uniform"),
)


def lines() -> list[Winner]:
    """POPULAR and all winners, each once: what one command compares with."""
    found = [winner for row in PEER_WINNERS.values() for winner in row]
    return list(dict.fromkeys([*POPULAR, *found]))
