"""From a noise level to the time label of a network that was trained on a table: the one place for that rule.

A table of N noise levels sits on a ``Tabulated`` path at t_k = (k + 1)/N, and the network knows level k by a label, k itself
unless the family says otherwise. At the entries all rules agree: the label of k. Between k and k + 1 they are

    linear   k + (log alpha - log alpha_k) / (log alpha_{k+1} - log alpha_k)    dpm-solver; the path's own index
    log      the same in log(sigma / alpha)                                     k-diffusion, diffusers
    nearest  the entry nearer in log(sigma / alpha)                             k-diffusion's ``quantize``, ComfyUI
    ceil     k + 1                                                              azula's ``searchsorted``
    floor    k                                                                  score_sde's ``labels.long()``

so that "linear" and "log" give labels that are not whole, which sinusoidal embeddings take, and the others whole ones as
integers, which embedding tables need. Below the first entry every label is the first. (EDM's iDDPM networks round inside, to
the nearest sigma; see ``edm.rounded``.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, nearest
from sde.path import Tabulated

from ..network import TimeFunction

RULES = ("linear", "log", "nearest", "ceil", "floor")


def table_label(path: Tabulated, rule: str = "linear", entries: Any = None, factor: float = 1.0) -> TimeFunction:
    """t -> the label: ``entries[k]`` (default k) at table entry k, by ``rule`` in between, times ``factor``.

    ``entries`` are the labels of a respaced table. Integers stay integers where the rule keeps them whole and ``factor`` is 1.
    """
    if rule not in RULES:
        raise InputError(f"rule={rule!r} is unknown: {nearest(rule, RULES)}")
    size = len(path.betas)
    known = torch.arange(size) if entries is None else torch.as_tensor(entries)
    if known.shape != (size,):
        raise InputError(f"entries has shape {tuple(known.shape)}: give one label for each of the {size} entries of {path}")
    levels = -path.lam(path.time_of(torch.arange(size)))  # log(sigma / alpha)

    def label(t: Tensor) -> Tensor:
        index = path.index(t).clamp(0.0, size - 1.0)
        whole = index.round()
        index = torch.where((index - whole).abs() < 1e-9, whole, index)  # N ((k + 1)/N) - 1 may be an ulp off k
        low, high = index.floor().long(), index.ceil().long()
        if rule in ("log", "nearest"):
            below, above = levels.to(t.device)[low], levels.to(t.device)[high]
            # 0 in the last interval of a table that ends at alpha = 0, where the level above is infinite
            share = torch.where(low == high, 0.0, (-path.lam(t) - below) / (above - below))
        else:
            share = index - low
        if rule in ("linear", "log"):
            at = known.to(t.device, torch.float64)
            return factor * (at[low] + share * (at[high] - at[low]))
        up = {"nearest": share > 0.5, "ceil": high > low, "floor": torch.zeros_like(low, dtype=torch.bool)}[rule]
        chosen = known.to(t.device)[torch.where(up, high, low)]
        return chosen if factor == 1.0 else factor * chosen.to(torch.float64)

    return label
