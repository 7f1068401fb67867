"""Distances from averages over pairs: energy distance, MMD with a Gaussian kernel, KID, CMMD.

For x_1 ... x_m of the sampler and y_1 ... y_m true, with a kernel k,

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

over pairs of different samples (without bias: 0 on average for equal laws, and sometimes negative), or over all pairs (biased:
never negative). Gretton et al. 2012.

    energy  k(x, y) = -|x - y|                          in units of sqrt(d) std of the data (Szekely and Rizzo 2013)
    mmd     k(x, y) = exp(-|x - y|^2 / (2 width^2))     width: the median distance between true draws, fixed by the problem
    cmmd    the same with width 10 on CLIP embeddings, biased, times 1000 (Jayasumana et al. 2024)
    kid     k(x, y) = (x.y / k + 1)^3                   on features of k numbers, without bias (Binkowski et al. 2018)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sde.errors import InputError

from ..problems import FIXED, REFERENCE, Problem
from . import features as extractors
from .base import Block, Metric, no_data
from .statistics import check_rows

Kernel = Callable[[Tensor, Tensor], Tensor]


def distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|, (n, m), of rows (n, d), (m, d): by a matrix product, and pair by pair where that would leave no digits."""
    centre = y.mean(0)
    x, y = x - centre, y - centre
    size = (x * x).sum(1)[:, None] + (y * y).sum(1)
    squares = size - 2.0 * (x @ y.T)
    i, j = (squares < 1e-9 * size).nonzero(as_tuple=True)
    squares[i, j] = (x[i] - y[j]).square().sum(1)
    return squares.clamp_min_(0.0).sqrt_()


def discrepancy(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool = True) -> float:
    """MMD^2 of two sets of rows (n, d), (m, d). The kernel maps (n, d), (m, d) -> (n, m)."""
    x, y = check_rows(x), check_rows(y)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"samples of {x.shape[1]} and of {y.shape[1]} dimensions cannot be compared")
    if min(len(x), len(y)) < 2:
        raise InputError(f"{min(len(x), len(y))} samples: a distance between sets needs at least 2")

    def within(z: Tensor) -> float:
        table, n = kernel(z, z), len(z)
        if not unbiased:
            return float(table.mean())
        return float((table.sum() - table.diagonal().sum()) / (n * (n - 1)))

    return within(x) + within(y) - 2.0 * float(kernel(x, y).mean())


def minus_distance(x: Tensor, y: Tensor) -> Tensor:
    return -distances(x, y)


def cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def gaussian(width: float) -> Kernel:
    return lambda x, y: torch.exp(-0.5 * (distances(x, y) / width) ** 2)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| without bias: 0 on average for equal laws, and may be negative."""
    return discrepancy(x.flatten(1), y.flatten(1), minus_distance)


@lru_cache(maxsize=16)
def median_width(features: str, problem: Problem, draws: int = 512) -> float:
    """The median distance between features of true draws, the same in every run."""
    z = extractors.extract(features, problem, problem.truth(0, range(draws), FIXED))
    width = float(torch.pdist(z).median())
    if width <= 0.0:
        raise InputError(f"{problem.name}: half of all pairs of true draws coincide, so a median width is 0; give width=")
    return width


@dataclass(frozen=True)
class Kernelled(Metric):
    """kernel    "energy", "gaussian" or "cubic"
    features  see ``metrics.features``
    width     of the Gaussian kernel; 0: the median distance between true draws
    scale     a factor of the value;  unbiased: without the pairs of a sample with itself
    """

    kernel: str = "energy"
    features: str = "raw"
    width: float = 0.0
    scale: float = 1.0
    unbiased: bool = True

    least: ClassVar[float] = -math.inf

    @property
    def limit(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A matrix product is cheaper than distances, and less is seen by it."""
        return 4096 if self.kernel == "cubic" else 2048

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "std" if self.kernel == "energy" else ""

    def available(self, problem: Problem) -> str | None:
        return extractors.missing(self.features, problem) or no_data(problem)

    def check(self, problem: Problem) -> None:
        extractors.check(self.features, problem)

    def value(self, problem: Problem, block: Block) -> float:
        x = block.first(self.limit).reshape(-1, *problem.shape)
        truth = problem.truth(block.seed, range(len(x)), REFERENCE)
        a, b = (extractors.extract(self.features, problem, z.to(x.device)) for z in (x, truth))
        return self.scale * discrepancy(a, b, self._kernel(problem), self.unbiased) / self._unit(problem)

    def _kernel(self, problem: Problem) -> Kernel:
        if self.kernel == "gaussian":
            return gaussian(self.width or median_width(self.features, problem))
        return {"energy": minus_distance, "cubic": cubic}[self.kernel]

    def _unit(self, problem: Problem) -> float:
        return math.sqrt(problem.dim) * problem.std if self.kernel == "energy" and self.features == "raw" else 1.0
