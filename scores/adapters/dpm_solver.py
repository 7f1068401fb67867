"""Noise functions made by dpm-solver's ``model_wrapper`` (also UniPC's and DPM-Solver-v3's).

Call    model_fn(x, t); t (B,), continuous in (0, 1].
Time    'discrete': entry k of N sits at (k + 1)/N, which is the time of ``Tabulated``; the wrapper gives its network
        (t - 1/N) 1000, piecewise linear in log alpha between entries. 'linear': the time of VP(). 1 is noise.
Output  eps, whatever the network inside predicts (noise, x_start, v, score).
Input   native x.
Labels  bound inside the wrapper (``condition``, ``model_kwargs``). With classifier-free guidance it batches [uncond, cond]: two
        networks a call, ``evals=2``.
Traps   'discrete' drops the entries with lambda < -5.1 and spreads time over the N' that are left, but gives the network
        (t - 1/N') 1000: on a cosine table of 1000 (N' = 996) entry k is asked for as 1000/996 k. That is inside the
        wrapper and stays as it is; the path here has its N' entries. Below 1/N it extends the first interval's line, where our
        path bends to alpha = 1 at t = 0.

Source: LuChengTHU/dpm-solver dpm_solver_pytorch.py (MIT). Lu et al. 2022, arXiv:2206.00927.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sde.errors import InputError
from sde.path import VP, Cosine, FromFunctions, Path, Tabulated

from ..network import Score
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_dpm_solver_wrapper(model_fn: Any, noise_schedule: Any, **options: Unpack[Options]) -> Score:
    """The score of a wrapped noise function.

    noise_schedule : its ``NoiseScheduleVP``, or the path it stands for
    evals          : 2 with classifier-free guidance, as it batches both networks
    """
    return Score(model_fn, _path(noise_schedule), "eps", **options)


def _path(schedule: Any) -> Path:
    if isinstance(schedule, Path):
        return schedule
    kind = getattr(schedule, "schedule", None)
    if kind == "discrete":
        log_alpha = torch.as_tensor(schedule.log_alpha_array, dtype=torch.float64).reshape(-1)
        return Tabulated.from_alphas_cumprod(torch.exp(2.0 * log_alpha))
    if kind == "linear":
        return VP(float(schedule.beta_0), float(schedule.beta_1))
    if kind == "cosine":  # of older releases; it ends before alpha = 0
        path = Cosine(float(getattr(schedule, "cosine_s", 0.008)))
        return FromFunctions(path.alpha, path.sigma, path.dalpha, path.dsigma, T=float(schedule.T))
    raise InputError(f"noise_schedule is {schedule!r:.80}: give a NoiseScheduleVP or a path such as Tabulated.linear()")
