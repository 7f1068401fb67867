"""Guidance that edits what is denoised: x0 is replaced by a function of it, sample by sample.

    x0' = edit(x0),    eps' = (x - alpha x0') / sigma

The pair keeps alpha x0' + sigma eps' = x, so every sampler can take it. The output is in the row x0: it holds at alpha = 0
where the network's does (v, x0, velocity), and at sigma = 0 it says nothing of eps, so runs may end there but not start there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError
from sde.prediction import Knot, Predictor, Row, Tally, affine

from .base import X0, Call, Guided, Level, Request, check_number, check_score, deferred, per_level

Edit = Callable[[Tensor], Tensor]  # x0 (B, *event) -> x0', sample by sample


@dataclass(frozen=True, eq=False)
class Edited(Guided):
    """``score`` with its x0 edited; ``edit`` makes the function for a batch like the given one."""

    score: Predictor
    edit: Callable[[Tensor], Edit]

    def row(self, knot: Knot) -> Row:
        """x0."""
        return X0

    def _make(self, request: Request, x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> list[Call]:
        calls, edit = request.of(self.score, x, conditions, tally), self.edit(x)
        parts = zip(request.levels, calls, strict=True)
        return [deferred(partial(self._level, level, call, edit, x)) for level, call in parts]

    def _level(self, level: Level, call: Call, edit: Edit, x: Tensor) -> Call:
        u, v = per_level(lambda k: affine(self.score.row(k), k, 1.0, 0.0), level, x)
        return lambda x: edit(u * x + v * call(x))


def static_threshold(score: Predictor, bound: float = 1.0) -> Edited:
    """x0 clipped to [-bound, bound], elementwise (Ho et al. 2020)."""
    check_score("score", score)
    c = check_number("bound", bound, 0.0, open_low=True)
    return Edited(score, lambda x: lambda x0: x0.clamp(-c, c))


def dynamic_threshold(score: Predictor, quantile: float = 0.995, bound: float = 1.0, ceiling: float | None = None) -> Edited:
    """x0 clipped to [-s, s] and multiplied by bound/s, where s >= bound is the quantile of |x0| in each sample (Saharia et al.
    2022, Imagen). ``ceiling`` limits s. A sample whose quantile is below ``bound`` is only clipped.
    """
    check_score("score", score)
    q = check_number("quantile", quantile, 0.0, 1.0, open_low=True)
    low = check_number("bound", bound, 0.0, open_low=True)
    high = None if ceiling is None else check_number("ceiling", ceiling, low)

    def edit(x0: Tensor) -> Tensor:
        s = quantile_of(x0.abs(), q).clamp(low, high)
        return torch.minimum(torch.maximum(x0, -s), s) * (low / s)

    return Edited(score, lambda x: edit)


def quantile_of(v: Tensor, q: float) -> Tensor:
    """The q-quantile of each sample's elements, linear between order statistics, (B, 1, ...)."""
    ordered = v.reshape(len(v), -1).sort(1).values
    place = q * (ordered.shape[1] - 1)
    low = min(int(place), max(ordered.shape[1] - 2, 0))
    high = min(low + 1, ordered.shape[1] - 1)
    out = torch.lerp(ordered[:, low], ordered[:, high], place - low)
    return out.reshape(-1, *(1,) * (v.dim() - 1))


def inpaint(score: Predictor, known: Tensor, mask: Tensor) -> Edited:
    """x0 replaced by ``known`` where ``mask`` is true: inpainting by replacement, for any sampler.

    known, mask  one sample, (*event), or one a row, (B, *event); the mask is bool and may broadcast.

    Along the probability flow the known part of the state is alpha known + sigma eps with the eps of its start, and under
    'ddpm' an exact draw of q(x_t | x_s, x0 = known) at each step: at the right noise level throughout, and ``known`` to the bit
    at sigma = 0. RePaint (Lugmayr et al. 2022) draws that part afresh at each level, of the same law; its resampling, which
    makes the unknown part agree with the known one, is the solver ``solvers.guided.Resample``:

        sample(inpaint(score, known, mask), shape, solver=Resample(SOLVERS["ddpm"].solver), eta=1.0, ...)

    Without it the unknown part is drawn given the known part's noisy state only, not given ``known``.
    """
    check_score("score", score)
    for name, value in (("known", known), ("mask", mask)):
        if not isinstance(value, Tensor):
            raise InputError(f"{name} is a {type(value).__name__}: give a tensor (B, *event) or (*event)")
    if mask.dtype is not torch.bool:
        raise InputError(f"mask has dtype {mask.dtype}: give a bool tensor, true where x0 is known, e.g. mask > 0.5")
    try:
        m, k = torch.broadcast_tensors(mask, known)
    except RuntimeError:
        raise InputError(f"mask has shape {tuple(mask.shape)}, known {tuple(known.shape)}: they must broadcast") from None
    if not known.is_floating_point() or not bool(k[m].isfinite().all()):
        raise InputError(f"known has dtype {known.dtype} or is not finite where mask is true: give finite floating numbers")
    return Edited(score, Inpainting(known.detach(), mask))


@dataclass(frozen=True)
class Inpainting:
    """The edit of ``inpaint``."""

    known: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)

    def __call__(self, x: Tensor) -> Edit:
        for name, value in (("known", self.known), ("mask", self.mask)):
            if not _fits(value, x):
                raise InputError(
                    f"{name} has shape {tuple(value.shape)} for a state of shape {tuple(x.shape)}: give one sample, "
                    f"{tuple(x.shape[1:])}, or {len(x)} of them"
                )
        known, mask = self.known.to(x), self.mask.to(x.device)
        return lambda x0: torch.where(mask, known, x0)


def _fits(value: Tensor, x: Tensor) -> bool:
    """Whether a tensor broadcasts to x."""
    shape = (1,) * (x.dim() - value.dim()) + tuple(value.shape)
    return value.dim() <= x.dim() and all(n in (1, m) for n, m in zip(shape, x.shape, strict=True))
