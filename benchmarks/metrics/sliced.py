"""Sliced Wasserstein distance: W2 of one-dimensional projections, exact by sorting (Bonneel et al. 2015).

Along unit vectors v_1 ... v_k, fixed by a seed, of two sets of m points:

    sliced_w2      sqrt of the mean over directions and ranks of the squared difference of the sorted projections
    max_sliced_w2  the same of the worst of these directions (a lower bound of the maximum over all)

in units of the data's deviation a dimension, as every distance here. Two sets of true draws are at a distance of about
m^-1/2 (m^-1/4 where the data have gaps): below the floor nothing can be told.

Points come a few at a time, and what is kept of them are projections, along so many directions at once as fit ``MOST``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sde.errors import InputError

from ..problems import REFERENCE, Problem
from .base import Block, Metric, chunks, no_data

MOST = 1 << 20  # projections of a set at once


def directions(d: int, count: int = 64, seed: int = 0) -> Tensor:
    """Unit vectors, (d, count)."""
    v = torch.randn(d, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v / v.norm(dim=0)


def _projected(points: Iterable[Tensor], n: int, along: Tensor) -> Tensor:
    """The projections of n points, which come as rows (B, d) float64, (count, n): those along each direction sorted."""
    found = torch.empty(along.shape[1], n, dtype=torch.float64)
    low = 0
    for z in points:
        found[:, low : low + len(z)] = along.T @ z.T.cpu()
        low += len(z)
    found.numpy().sort(axis=1)  # in place, and many times faster than torch's, which finds an order as well
    return found


def _squares(x: Iterable[Tensor], y: Iterable[Tensor], n: int, along: Tensor) -> Tensor:
    """W2^2 of two sets of n points along each direction, (count,)."""
    apart = _projected(x, n, along).sub_(_projected(y, n, along))
    return apart.square_().mean(1)


def sliced_w2(x: Tensor, y: Tensor, along: Tensor) -> float:
    """Sliced 2-Wasserstein distance of two sets of n points (n, ...) along the unit vectors (d, m).

    sqrt of the mean, over directions and ranks, of the squared difference of the sorted projections.
    """
    if x.shape != y.shape:
        raise InputError(f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: sliced_w2 wants two sets of the same size")
    a, b = (z.detach().flatten(1).double() for z in (x, y))
    return math.sqrt(float(_squares([a], [b], len(x), along.cpu()).mean()))


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
        n = self.used(block)
        found = []
        for along in _directions(problem.dim, self.count).split(max(1, MOST // n), dim=1):
            truth = (problem.truth(block.seed, span, REFERENCE).flatten(1) for span in chunks(n, problem.dim))
            found.append(_squares(block.rows(self.limit), truth, n, along))
        squares = torch.cat(found)
        return math.sqrt(float(squares.max() if self.worst else squares.mean())) / problem.std
