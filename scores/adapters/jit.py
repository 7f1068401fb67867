"""JiT ("just image transformers"): x0-prediction in pixels.

Call    net(x, t, y=labels); t (B,).
Time    u = 1 - t: u = 0 is NOISE, u = 1 data.
Output  x0 itself (the flow is (x0 - x) / (1 - u), made outside the network).
Input   x = u x1 + (1 - u) noise, the path Linear(); images in [-1, 1].
Labels  y integers; the null class is num_classes.
Traps   checkpoints hold ``model_ema1`` with a prefix ``net.``. The name of the output is not that of the training loss.

Source: azula 0.11.1 azula/plugins/jit (MIT), which wraps LTH14/JiT. Li & He 2025, arXiv:2511.13720.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sde.path import Linear

from ..network import Score
from ._flows import rising
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_jit(net: Any, **options: Unpack[Options]) -> Score:
    """The score of a JiT."""
    return Score(net, Linear(), "x0", label=rising, **options)
