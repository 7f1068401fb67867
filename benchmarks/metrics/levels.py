"""Numbers with their spread: means over blocks, t intervals, and floors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from sde.errors import InputError


class Level(NamedTuple):
    """A mean over disjoint blocks, and the standard deviation of one block."""

    mean: float
    sd: float
    blocks: int

    @property
    def se(self) -> float:
        return self.sd / math.sqrt(self.blocks)


def level(values: Sequence[float]) -> Level:
    v = torch.tensor(values, dtype=torch.float64)
    return Level(float(v.mean()), float(v.std()) if len(v) > 1 else 0.0, len(v))


def within(value: Level, floor: Level) -> bool:
    """Is the value no further from the floor than two standard errors of their difference, as judged by the floor's spread?"""
    return value.mean <= floor.mean + 2.0 * floor.sd * math.sqrt(1.0 / value.blocks + 1.0 / floor.blocks)


@dataclass(frozen=True)
class Floor:
    """What a perfect sampler gets for the same number of samples, blocks and reference draws.

    mean, sd    of that number (of the row's own value: of the mean over blocks, or of all samples together)
    low, high   where a perfect sampler's value lies with a probability of 99 %, from a t distribution and its skewness
    replicates  how many perfect samplers that is estimated from (0: it is known otherwise)
    """

    mean: float
    sd: float
    low: float
    high: float
    replicates: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def floor_of(mean: float, sd: float, replicates: int, inflation: float = 1.0, skew: float = 0.0) -> Floor:
    """The floor from the mean of ``replicates`` values; ``inflation``: that mean's variance, in units of sd^2, plus 1.

    On the side of the longer tail the t quantile is moved out by Cornish and Fisher's first term, skew (z^2 - 1) / 6: what is
    nearly a sum of few squares is more than 2.6 deviations above its mean far more often than one time in 200.
    """
    quantile, tail = t_quantile(0.995, replicates - 1), (Z**2 - 1.0) / 6.0
    low, high = (quantile + tail * max(0.0, side * skew) for side in (-1.0, 1.0))
    unit = sd * math.sqrt(inflation)
    return Floor(mean, sd, mean - low * unit, mean + high * unit, replicates)


Z = 2.5758293035489004
"""The 99.5 % quantile of the normal law."""


@cache
def t_quantile(p: float, dof: float) -> float:
    """The p-quantile of Student's t. With t = sqrt(dof) tan(th) its density is proportional to cos(th)^(dof - 1)."""
    if not (0.0 < p < 1.0 and dof >= 1.0):
        raise InputError(f"t_quantile({p}, {dof}): p must be in (0, 1) and dof >= 1")
    nodes, weights = np.polynomial.legendre.leggauss(128)
    constant = math.exp(math.lgamma((dof + 1.0) / 2.0) - math.lgamma(dof / 2.0)) / math.sqrt(math.pi)

    def mass(angle: float) -> float:
        at = 0.5 * angle * (nodes + 1.0)
        return 0.5 * angle * constant * float(weights @ np.cos(at) ** (dof - 1.0))

    low, high = -0.5 * math.pi, 0.5 * math.pi
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if 0.5 + mass(middle) < p else (low, middle)
    return math.sqrt(dof) * math.tan(0.5 * (low + high))
