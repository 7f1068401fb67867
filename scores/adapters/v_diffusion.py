"""v-diffusion networks (Crowson).

Call    model(x, t, **extra_args); t (B,).
Time    t = 2/pi atan2(sigma, alpha), 1 is noise: the path Trigonometric(), whose time it is.
Output  v = alpha eps - sigma x0.
Input   native x, alpha^2 + sigma^2 = 1; images in [-1, 1].
Labels  clip_embed= of the text-conditional ones.
Traps   at other paths with alpha^2 + sigma^2 = 1 the label is the angle, not that path's time.

Source: crowsonkb/v-diffusion-pytorch diffusion/sampling.py, utils.py (MIT). Salimans & Ho 2022, arXiv:2202.00512.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sde.path import Trigonometric

from ..network import Score
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_v_diffusion(model: Any, **options: Unpack[Options]) -> Score:
    """The score of a v-diffusion network."""
    return Score(model, Trigonometric(), "v", **options)
