"""Distances between sets of samples, in float64. Each has its floor: the distance between two sets of true samples."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sde.errors import InputError


def directions(d: int, count: int = 64, seed: int = 0) -> Tensor:
    """Unit vectors, (d, count)."""
    v = torch.randn(d, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v / v.norm(dim=0)


def sliced_w2(x: Tensor, y: Tensor, along: Tensor) -> float:
    """Sliced 2-Wasserstein distance of two sets of n points (n, ...) along the unit vectors (d, m).

    sqrt of the mean, over directions and ranks, of the squared difference of the sorted projections.
    """
    if x.shape != y.shape:
        raise InputError(f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: sliced_w2 wants two sets of the same size")
    a, b = (torch.sort(z.flatten(1).double().cpu() @ along, dim=0).values for z in (x, y))
    return math.sqrt(float((a - b).square().mean()))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| without bias: 0 on average for equal laws, and may be negative."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    within = [float(torch.cdist(z, z).sum()) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return 2.0 * float(torch.cdist(x, y).mean()) - within[0] - within[1]


def nearest_distance(x: Tensor, y: Tensor) -> Tensor:
    """Distance of each x to its nearest y, (n,)."""
    return torch.cdist(x.flatten(1).double(), y.flatten(1).double()).min(1).values


class Level(NamedTuple):
    """A mean over disjoint blocks, and the standard deviation of one block."""

    mean: float
    sd: float
    blocks: int

    @property
    def se(self) -> float:
        return self.sd / math.sqrt(self.blocks)


def level(values: list[float]) -> Level:
    v = torch.tensor(values, dtype=torch.float64)
    return Level(float(v.mean()), float(v.std()) if len(v) > 1 else 0.0, len(v))


def within(value: Level, floor: Level) -> bool:
    """Is the value no further from the floor than two standard errors of their difference, as judged by the floor's spread?"""
    return value.mean <= floor.mean + 2.0 * floor.sd * math.sqrt(1.0 / value.blocks + 1.0 / floor.blocks)
