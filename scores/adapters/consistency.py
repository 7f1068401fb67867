"""Networks of ``consistency_models``: students (consistency functions) and their EDM teachers.

Call    model(c_in x, rescaled_t, y=None); rescaled_t (B,) = 250 ln(sigma + 1e-44).
Time    sigma of x = x0 + sigma eps: the path EDM(), t = sigma, 0 is data.
Output  F. A teacher's D = c_skip x + c_out F is EDM's, sigma_data 0.5: y = F. A student (``distillation=True``) has
            c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2),  c_out = (sigma - sigma_min) sd / sqrt(sigma^2 + sd^2)
        shifted by sigma_min so that f(x, sigma_min) = x; f(x, sigma) is the point of x's own trajectory at sigma_min, and is
        given here as y = x0, which is what the sampler 'consistency' jumps to.
Input   c_in = 1 / sqrt(sigma^2 + sd^2), inside. Images in [-1, 1].
Labels  y integers for class-conditional networks.
Traps   the label has a factor 1000/4 that EDM's ln(sigma)/4 has not. A student is no denoiser: only samplers made for it
        ('consistency', origin sigma_min = 0.002) mean something. Published samplers clip f to [-1, 1] (``clip_denoised``).

Source: openai/consistency_models cm/karras_diffusion.py (MIT). Song et al. 2023, arXiv:2303.01469.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sde.path import EDM

from ..network import Score, per_sample
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_consistency(
    model: Any,
    *,
    distillation: bool = True,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    **options: Unpack[Options],
) -> Score:
    """The score of a consistency_models network: a student's f as x0, or (``distillation=False``) a teacher."""
    path = EDM(T=sigma_max, t_min=sigma_min)

    def label(sigma: Tensor) -> Tensor:
        return 250.0 * torch.log(sigma + 1e-44)

    def c_in(sigma: Tensor) -> Tensor:
        return (sigma**2 + sigma_data**2) ** -0.5

    if not distillation:
        return Score(model, path, "F", label=label, scale=c_in, sigma_data=sigma_data, **options)

    def network(x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        s = per_sample(sigma, x)
        past = s - sigma_min
        y = model(c_in(s) * x, label(sigma), **conditions)
        return (sigma_data**2 / (past**2 + sigma_data**2)) * x + (past * sigma_data * c_in(s)) * y

    return Score(network, path, "x0", **options)
