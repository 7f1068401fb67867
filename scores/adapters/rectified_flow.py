"""Networks of RectifiedFlow (gnobitab), which are score_sde's architectures with another meaning.

Call    model(x, labels); labels (B,) = 999 u.
Time    u = 1 - t: u = 0 is noise, u = 1 data. Trained on u in [0.001, 1], so smaller u are given as 0.001.
Output  dx/du = x1 - x0 with x1 data and x0 noise of deviation ``noise_scale``: the row (1, -noise_scale).
Input   native x = u x1 + (1 - u) x0; images in [-1, 1].
Traps   its Euler loop evaluates at u_i = 0.001 + 0.999 i/N but takes steps of 1/N: its last point is u = 1 only if the first is
        taken for 0. After reflow noise and data are coupled: every deterministic solver stands, but -eps / sigma is not the
        score of the marginals, so no SDE and no corrector.

Source: gnobitab/RectifiedFlow ImageGeneration/sampling.py, sde_lib.py (no licence file: called, not copied). Liu et al. 2023,
arXiv:2209.03003.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sde.errors import InputError
from sde.path import FromFunctions, Linear, Path

from ..network import Score
from ._flows import rising
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_rectified_flow(model: Any, *, noise_scale: float = 1.0, **options: Unpack[Options]) -> Score:
    """The score of a rectified flow; ``noise_scale`` is the deviation of its noise."""
    if not noise_scale > 0.0:
        raise InputError(f"noise_scale={noise_scale!r}: must be > 0, the deviation of the noise, 1.0 unless configured")
    path: Path = Linear() if noise_scale == 1.0 else FromFunctions(rising, lambda t: noise_scale * t)
    return Score(model, path, (1.0, -float(noise_scale)), label=lambda t: 999.0 * (1.0 - t).clamp(min=1e-3), **options)
