"""Strong error: the distance of a sample to where the exact flow takes the same start, in units of the data's deviation.

For sample i of d numbers  e_i = |x_i - end_i| / (sqrt(d) std).  Its floor is the stated error of the end points themselves,
and the rounding of the samples' own dtype: no sampling noise is in it, so two samplers are told apart by a handful of samples.
The slope of its logarithm against log NFE is minus the order that is seen; the mean of squares is dominated by samples near a
border between modes, the median is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.errors import InputError

from ..endpoints import End, rms
from ..problems import Problem
from .base import Block, Metric
from .levels import Floor
from .statistics import Summary

TRUST = 3.0  # a perfect sampler is as far from the computed end points as they are from the truth


@dataclass(frozen=True)
class Errors:
    """Each sample's error, and that of its end point: two lists in units of std."""

    @property
    def name(self) -> str:
        return "errors"

    def measure(self, problem: Problem, x: Tensor, start: Tensor | None, end: End | None) -> Summary:
        if end is None:
            if start is None:
                raise InputError("a strong error compares with the end point of the same start: give start=")
            end = problem.end(start)
        exact = end.x.double().cpu().reshape(x.shape)
        known = end.error.double().cpu() + torch.finfo(x.dtype).eps * rms(exact)
        return {"errors/sample": rms(x.double().cpu() - exact) / problem.std, "errors/end": known / problem.std}


@dataclass(frozen=True)
class StrongError(Metric):
    """kind: "rms" over all samples and numbers; "median" of the samples' errors; "max", the mean over blocks of the largest."""

    kind: str = "rms"

    needs: ClassVar[str] = "statistics"
    unit: ClassVar[str] = "std"
    flow_only: ClassVar[bool] = True
    wants_end: ClassVar[bool] = True

    @property
    def pooled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.kind != "max"

    @property
    def statistic(self) -> Errors:
        return Errors()

    def available(self, problem: Problem) -> str | None:
        return None

    def value(self, problem: Problem, block: Block) -> float:
        return self._reduce(block.list("errors/sample"))

    def own_floor(self, problem: Problem, blocks: Sequence[Block]) -> Floor:
        each = torch.tensor([self._reduce(b.list("errors/end")) for b in blocks], dtype=torch.float64)
        mean = self._reduce(torch.cat([b.list("errors/end") for b in blocks])) if self.pooled else float(each.mean())
        return Floor(mean, float(each.std()) / len(each) ** 0.5, 0.0, TRUST * max(mean, float(each.max())), 0)

    def enough(self, problem: Problem, worse: float, blocks: int) -> int:
        return 2 * blocks

    def _reduce(self, errors: Tensor) -> float:
        if self.kind == "median":
            return float(errors.median())
        return float(errors.max()) if self.kind == "max" else float(errors.square().mean().sqrt())
