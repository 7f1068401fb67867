"""SiT: scalable interpolant transformers.

Call    model(x, t, y); t and y (B,).
Time    u = 1 - t, raw: u = 0 is NOISE, u = 1 DATA.
Output  velocity dx/du (the default: minus our velocity), noise, or score. The half of 2C channels that ``learn_sigma`` adds is
        dropped inside forward.
Paths   Linear alpha = u, sigma = 1 - u;  GVP sin, cos of pi u/2;  VP the linear-beta path with 0.1 and 20.
Input   native x. Latents of Stable Diffusion's autoencoder times 0.18215.
Labels  y integers; the null class is num_classes, 1000.
Traps   time runs against DiT's. ``forward_with_cfg`` guides three of the four channels (``cfg_scale`` here uses it, and costs
        two networks a call); scores.guidance guides all. ``num_steps`` of its samplers counts the points of a linspace: N
        points are N - 1 steps. Its SDE has g^2 = 2 w: with a form w of its table it is ReverseSDE(path, score,
        diffusion=lambda t: sqrt(2 w(1 - t))).

Source: willisma/SiT models.py, transport/path.py, transport.py, integrators.py (MIT). Ma et al. 2024, arXiv:2401.08740.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sde.errors import InputError, nearest
from sde.path import VP, Linear, Path, Trigonometric

from ..network import Score
from ._calls import guided
from ._flows import rising
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

PATHS = {"Linear": Linear, "GVP": Trigonometric, "VP": VP}


def from_sit(
    model: Any,
    path_type: str = "Linear",
    prediction: str = "velocity",
    *,
    cfg_scale: float | None = None,
    null: int = 1000,
    **options: Unpack[Options],
) -> Score:
    """The score of a SiT.

    path_type, prediction : as for its ``create_transport``: "Linear", "GVP", "VP"; "velocity", "noise", "score"
    cfg_scale : guide by the model's own ``forward_with_cfg``, on three channels;  null: the class of no label
    """
    if path_type not in PATHS:
        raise InputError(f"path_type={path_type!r} is unknown: {nearest(path_type, PATHS)}")
    path: Path = PATHS[path_type]()
    outputs = {
        "velocity": (lambda t: -path.dalpha(t), lambda t: -path.dsigma(t)),
        "noise": "eps",
        "score": "score",
    }
    if prediction not in outputs:
        raise InputError(f"prediction={prediction!r} is unknown: {nearest(prediction, outputs)}")
    network, options = guided(model, cfg_scale, null, options)
    return Score(network, path, outputs[prediction], label=rising, **options)
