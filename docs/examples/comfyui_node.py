"""A ComfyUI custom node. Copy this file to ComfyUI/custom_nodes and install score-solvers in ComfyUI's environment.

LISTED are added to the samplers of every KSampler; the node "Solver sampler" makes a SAMPLER of any name, for SamplerCustom.
Flow models (SD3, Flux, Wan, ...) are recognised by their model_sampling.
"""

import comfy.k_diffusion.sampling  # pyright: ignore[reportMissingImports]
import comfy.samplers  # pyright: ignore[reportMissingImports]

from solvers.bridges import k_diffusion

LISTED = ("unipc_3", "dpmpp_3m", "res_3s", "seeds_2", "er_sde_3", "dpmpp_3m_sde", "rk4")

for name in LISTED:
    setattr(comfy.k_diffusion.sampling, f"sample_solvers_{name}", k_diffusion.sampler(name))
    comfy.samplers.KSampler.SAMPLERS.append(f"solvers_{name}")


class SolverSampler:
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "make"
    CATEGORY = "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        number = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01}
        own = {"default": True, "tooltip": "use the solver's own noise level instead of eta"}
        return {
            "required": {
                "solver": (k_diffusion.names(),),
                "own_eta": ("BOOLEAN", own),
                "eta": ("FLOAT", number),
                "s_noise": ("FLOAT", number),
            }
        }

    def make(self, solver, own_eta, eta, s_noise):
        options = {"eta": None if own_eta else eta, "s_noise": s_noise}
        return (comfy.samplers.KSAMPLER(k_diffusion.sampler(solver), options),)


NODE_CLASS_MAPPINGS = {"SolverSampler": SolverSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"SolverSampler": "Solver sampler"}
