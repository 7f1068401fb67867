"""Networks of ``score_sde_pytorch`` (NCSN++, DDPM++), continuous and discrete.

Call    model(x, labels); labels (B,).
Time    their t is ours: t = 1 is noise. The label is
            VP, sub-VP continuous   999 t                    VE continuous   sigma(t)
            VP discrete             index of the table       VE discrete     round((1 - t)(N - 1)), an integer: their
                                                                             sigmas are stored in falling order
Output  VP, sub-VP: score = -out / sigma(t), so y = eps. VE: the score itself, y = -eps / sigma; the network has divided by its
        own sigma (``scale_by_sigma``).
Input   native x, no scaling. Configs with ``centered=False`` (all VE ones) have data in [0, 1], the rest in [-1, 1].
Traps   sigma of sub-VP is 1 - alpha^2, not its root. Their t = k/(N - 1) is entry k of a VP table, at t = (k + 1)/N here.
        Between the entries, where their samplers' times are, their discrete VP gives the network the index as it is but divides
        by the sigma of the index *truncated*, too small by up to a quarter at the last steps; here it is sigma(t). Their runs
        stop at 1e-3 (VP) and 1e-5 (VE). Sub-VP is never discrete: it takes 999 t.

Source: yang-song/score_sde_pytorch models/utils.py, sde_lib.py (Apache 2.0). Song et al. 2021, arXiv:2011.13456.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sde.errors import InputError
from sde.path import VE, VP, Path, SubVP, Tabulated

from ..network import Score
from ._labels import table_label
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_score_sde(
    model: Any, sde: Any, *, discrete: int | None = None, rule: str = "linear", **options: Unpack[Options]
) -> Score:
    """The score of a score_sde network.

    sde      : VP, SubVP or VE of ``sde``, or their ``VPSDE``, ``subVPSDE``, ``VESDE``
    discrete : the number N of noise levels of a network trained on a table (``training.continuous=False``), else None
    rule     : the label between the entries of a discrete VP table, see ``_labels``; their own is "linear" (VE rounds always)
    """
    path = _path(sde)
    if discrete is not None and (isinstance(discrete, bool) or not isinstance(discrete, int) or discrete < 2):
        raise InputError(f"discrete={discrete!r}: give the number of noise levels the network was trained on, e.g. 1000")
    if isinstance(path, VE):
        if discrete is None:
            return Score(model, path, "score", label=path.sigma, **options)
        last = discrete - 1
        return Score(model, path, "score", label=lambda t: torch.round((1.0 - t) * last).long(), **options)
    if discrete is None:
        return Score(model, path, "eps", label=lambda t: 999.0 * t, **options)
    if not isinstance(path, VP):
        raise InputError(
            f"discrete={discrete} with {path}: score_sde has no discrete sub-VP; its labels are 999 t: leave discrete out"
        )
    table = Tabulated.linear(discrete, path.beta_min / discrete, path.beta_max / discrete)
    return Score(model, table, "eps", label=table_label(table, rule), **options)


def _path(sde: Any) -> Path:
    if isinstance(sde, (VP, SubVP, VE)):
        return sde
    name = type(sde).__name__
    if name in ("VPSDE", "subVPSDE"):
        return (VP if name == "VPSDE" else SubVP)(float(sde.beta_0), float(sde.beta_1))
    if name == "VESDE":
        return VE(float(sde.sigma_min), float(sde.sigma_max))
    raise InputError(f"sde is {sde!r:.80}: give VP(), SubVP() or VE(), or the VPSDE, subVPSDE or VESDE of score_sde")
