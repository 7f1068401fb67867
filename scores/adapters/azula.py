"""azula's ``Denoiser``: SimpleDenoiser, KarrasDenoiser, and those of its plugins.

Call    denoiser(x, t, **kwargs) -> a posterior with .mean (and, of some, .var).
Time    t in [0, 1], 1 is noise, as here. Of shape () where the batch shares it, as its samplers give it, else (B,).
Output  .mean = E[x0 | x], so y = x0.
Path    the denoiser's ``schedule``: any function t -> (alpha, sigma). Its schedules keep sigma(0) > 0, so t = 0 is a level of
        noise like any other (0.001), and lambda is finite on all of [0, 1].
Input   native x of the schedule; denoisers scale inside. The data range is the plugin's, [-1, 1] for images.
Labels  label= (integers), prompt_*=, as the plugin says.
Traps   its ADM plugin looks the index up by ``searchsorted``, which rounds up to the noisier entry. GaussianDenoiser takes
        times of shape () only.

Source: azula 0.11.1 azula/denoise.py, noise.py, plugins/ (MIT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sde.errors import InputError
from sde.path import FromFunctions, Path

from ..network import Score
from ._calls import one_time
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_azula(denoiser: Any, **options: Unpack[Options]) -> Score:
    """The score of a denoiser, on the path of its own schedule."""
    schedule = getattr(denoiser, "schedule", None)
    if not callable(schedule):
        raise InputError(f"denoiser is a {type(denoiser).__name__} without a schedule: give an azula Denoiser")

    def network(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        return denoiser(x, one_time(t), **conditions).mean

    return Score(network, _path(schedule), "x0", **options)


def _path(schedule: Callable[[Tensor], Any]) -> Path:
    return FromFunctions(lambda t: schedule(t)[0], lambda t: schedule(t)[1], t_min=0.0)
