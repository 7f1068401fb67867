"""DiT: diffusion transformers.

Call    model(x, t, y); t and y (B,).
Time    index 0 ... 999 of the table of 1000 linear betas from 1e-4 to 0.02, 0 the least noise.
Output  2C channels: eps, then the learned variance (see ``guided_diffusion``).
Input   native x. Latents of Stable Diffusion's autoencoder times 0.18215.
Labels  y integers; the null class is num_classes, 1000.
Traps   ``forward_with_cfg`` guides three of the four channels and gives the fourth, and the variance, as the labels say
        (``cfg_scale`` here uses it, and costs two networks a call). scores.guidance and diffusers' pipeline guide all four.

Source: facebookresearch/DiT models.py, diffusion/ (CC BY-NC 4.0: called, not copied). Peebles & Xie 2023, arXiv:2212.09748.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..network import Score
from ._calls import guided
from ._options import Options
from .guided_diffusion import from_guided_diffusion

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_dit(
    model: Any,
    diffusion: Any = None,
    *,
    cfg_scale: float | None = None,
    null: int = 1000,
    rule: str = "linear",
    **options: Unpack[Options],
) -> Score:
    """The score of a DiT.

    diffusion : a ``Tabulated`` path (default: 1000 linear betas), or the object of its ``create_diffusion``
    cfg_scale : guide by the model's own ``forward_with_cfg``, on three channels;  null: the class of no label
    rule      : the label between two entries of the table, see ``_labels``
    """
    network, options = guided(model, cfg_scale, null, options)
    return from_guided_diffusion(network, diffusion, rule=rule, **options)
