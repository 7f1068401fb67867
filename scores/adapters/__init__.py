"""Trained networks of other libraries as scores: one function a family, each a few lines on ``Score``.

Every adapter takes the library's object (never a file name), imports no library, and states at its top how the network is
called, what its time label is, what it returns, and what goes wrong. Their ``**options`` are those of ``Score``: ``conditions``
(keyword arguments of the network, here or per call), ``mode``, ``dtype``, ``evals``.
"""

from .azula import from_azula as from_azula
from .consistency import from_consistency as from_consistency
from .diffusers import from_diffusers as from_diffusers
from .dit import from_dit as from_dit
from .dpm_solver import from_dpm_solver_wrapper as from_dpm_solver_wrapper
from .edm import from_edm as from_edm
from .flow_matching import from_flow_matching as from_flow_matching
from .guided_diffusion import from_guided_diffusion as from_guided_diffusion
from .guided_diffusion import from_improved_diffusion as from_improved_diffusion
from .jit import from_jit as from_jit
from .k_diffusion import from_k_diffusion as from_k_diffusion
from .latent_diffusion import LatentScore as LatentScore
from .latent_diffusion import from_latent_diffusion as from_latent_diffusion
from .lucidrains import from_lucidrains as from_lucidrains
from .onnx import from_onnx as from_onnx
from .rectified_flow import from_rectified_flow as from_rectified_flow
from .score_sde import from_score_sde as from_score_sde
from .sit import from_sit as from_sit
from .torchcfm import from_torchcfm as from_torchcfm
from .v_diffusion import from_v_diffusion as from_v_diffusion
