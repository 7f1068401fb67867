"""Sliced Wasserstein distance: W2 of one-dimensional projections, exact by sorting (Bonneel et al. 2015).

Along unit vectors v_1 ... v_k, fixed by a seed, of two sets of m points:

    sliced_w2      sqrt of the mean over directions and ranks of the squared difference of the sorted projections
    max_sliced_w2  the same of the worst of these directions (a lower bound of the maximum over all)

in units of the data's deviation a dimension, as every distance here. Two sets of true draws are at a distance of about
m^-1/2 (m^-1/4 where the data have gaps): below the floor nothing can be told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sde.errors import InputError

from ..problems import REFERENCE, Problem
from .base import Block, Metric, no_data


def directions(d: int, count: int = 64, seed: int = 0) -> Tensor:
    """Unit vectors, (d, count)."""
    v = torch.randn(d, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v / v.norm(dim=0)


def _squares(x: Tensor, y: Tensor, along: Tensor) -> Tensor:
    """W2^2 along each direction, (count,)."""
    if x.shape != y.shape:
        raise InputError(f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: sliced_w2 wants two sets of the same size")
    a, b = (torch.sort(z.flatten(1).double().to(x.device) @ along.to(x.device), dim=0).values for z in (x, y))
    return (a - b).square().mean(0)


def sliced_w2(x: Tensor, y: Tensor, along: Tensor) -> float:
    """Sliced 2-Wasserstein distance of two sets of n points (n, ...) along the unit vectors (d, m).

    sqrt of the mean, over directions and ranks, of the squared difference of the sorted projections.
    """
    return math.sqrt(float(_squares(x, y, along).mean()))


_directions = lru_cache(maxsize=8)(directions)


@dataclass(frozen=True)
class Sliced(Metric):
    """Along ``count`` directions; worst: of the worst one instead of the mean."""

    count: int = 128
    worst: bool = False

    unit: ClassVar[str] = "std"
    limit: ClassVar[int] = 1 << 14

    def available(self, problem: Problem) -> str | None:
        return no_data(problem)

    def value(self, problem: Problem, block: Block) -> float:
        x = block.first(self.limit)
        truth = problem.truth(block.seed, range(len(x)), REFERENCE).flatten(1)
        squares = _squares(x, truth, _directions(problem.dim, self.count))
        return math.sqrt(float(squares.max() if self.worst else squares.mean())) / problem.std
