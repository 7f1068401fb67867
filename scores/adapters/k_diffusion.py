"""k-diffusion denoisers: ``VDenoiser``, ``OpenAIDenoiser``, ``CompVisDenoiser``, ``layers.Denoiser``, ComfyUI's models.

Call    model(x, sigma, **extra_args); sigma (B,).
Time    sigma of x = x0 + sigma eps: the path EDM(), t = sigma, 0 is data. What the network inside gets is the wrapper's affair:
        tables log-interpolate the index (``quantize=True``: the nearest entry in log sigma), VDenoiser gives atan(sigma) 2/pi.
Output  D = E[x0 | x], so y = x0.
Input   as it is; the wrapper scales. Images in [-1, 1], or latents.
Labels  ``extra_args`` are conditions, cond= for CompVis models.
Traps   ``layers.Denoiser`` has sigma_data 1 unless told, and gives its network the raw sigma. Wrappers of a table state
        sigma_min and sigma_max, beyond which they extrapolate nothing: the path ends there. ComfyUI's flow models (CONST) take
        x = sigma eps + (1 - sigma) x0 and are no such denoisers: ``Score(model, Linear(), "x0")`` is theirs.

Source: crowsonkb/k-diffusion k_diffusion/external.py, layers.py (MIT).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sde.path import EDM

from ..network import Score
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_k_diffusion(
    model: Any, *, sigma_min: float | None = None, sigma_max: float | None = None, **options: Unpack[Options]
) -> Score:
    """The score of a k-diffusion denoiser on EDM(); the ends are the wrapper's own, or 0.002 and 80 where it has none."""
    low = getattr(model, "sigma_min", 0.002) if sigma_min is None else sigma_min
    high = getattr(model, "sigma_max", 80.0) if sigma_max is None else sigma_max
    return Score(model, EDM(T=float(high), t_min=float(low)), "x0", **options)
