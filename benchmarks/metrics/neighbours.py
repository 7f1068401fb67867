"""Precision, recall, density and coverage: are samples where data are, and data where samples are?

With r_k(a; A) the distance from a in A to its k-th nearest other point of A, m samples x and m true y:

    precision  share of x within r_k(y; Y) of some y                       recall  share of y within r_k(x; X) of some x
    density    mean over x of #{y: |x - y| <= r_k(y; Y)} / k               coverage  share of y with some x within r_k(y; Y)

Kynkaanniemi et al. 2019 (k = 3), Naeem et al. 2020 (k = 5). All depend on m: a perfect sampler's value is the floor, not 1.
Density is above its floor for samples too close to the modes, so there both sides are bad.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.errors import InputError

from ..problems import REFERENCE, Problem
from . import features as extractors
from .base import Block, Metric, no_data
from .kernel import distances
from .statistics import check_rows


def radii(x: Tensor, k: int) -> Tensor:
    """The distance of each row to its k-th nearest other row, (n,)."""
    if not 1 <= k < len(x):
        raise InputError(f"k={k} nearest neighbours of {len(x)} points: give more than {k} samples")
    table = distances(x, x)
    table.fill_diagonal_(torch.inf)
    return table.kthvalue(k, dim=1).values


def neighbourhood(x: Tensor, y: Tensor, kind: str, k: int) -> float:
    """One of the four numbers, of samples x (n, d) and true y (m, d)."""
    x, y = check_rows(x), check_rows(y)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"samples of {x.shape[1]} and of {y.shape[1]} dimensions cannot be compared")
    apart = distances(x, y)
    if kind == "recall":
        return float((apart <= radii(x, k)[:, None]).any(0).double().mean())
    inside = apart <= radii(y, k)
    if kind == "density":
        return float(inside.double().sum(1).mean()) / k
    return float(inside.any(1 if kind == "precision" else 0).double().mean())


@dataclass(frozen=True)
class Neighbours(Metric):
    """kind: "precision", "recall", "density" or "coverage"; k neighbours; features: see ``metrics.features``."""

    kind: str = "precision"
    k: int = 3
    features: str = "own"

    lower_is_better: ClassVar[bool] = False
    limit: ClassVar[int] = 2048

    @property
    def most(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return math.inf if self.kind == "density" else 1.0

    @property
    def sees(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "narrow" if self.kind == "recall" else "spread"

    @property
    def two_sided(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.kind == "density"

    def available(self, problem: Problem) -> str | None:
        return extractors.missing(self.features, problem) or no_data(problem)

    def fewest(self, problem: Problem) -> int:
        return self.k + 1

    def check(self, problem: Problem) -> None:
        extractors.check(self.features, problem)

    def value(self, problem: Problem, block: Block) -> float:
        x = block.first(self.limit).reshape(-1, *problem.shape)
        truth = problem.truth(block.seed, range(len(x)), REFERENCE)
        a, b = (extractors.extract(self.features, problem, z.to(x.device)) for z in (x, truth))
        return neighbourhood(a, b, self.kind, self.k)

    def grain(self, n: int) -> float:
        return 1.0 / min(n, self.limit)
