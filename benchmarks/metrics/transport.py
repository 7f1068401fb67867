"""Exact optimal transport between two sets of m points: the cheapest way to turn one into the other.

    W_p^p = min over couplings of mean |x_i - y_j|^p        in units of sqrt(d) std

By POT's network simplex, O(m^3 log m): m is capped. In d dimensions two sets of true draws are m^(-1/d) apart (for d > 2 p), so
in many dimensions the floor is high and nearly all of the value: prefer ``sliced_w2`` or ``energy`` there.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from sde.errors import InputError, ToolkitError

from ..problems import REFERENCE, Problem
from .base import Block, Metric, no_data
from .kernel import distances
from .statistics import check_rows

ITERATIONS = 10_000_000


def wasserstein(x: Tensor, y: Tensor, p: int = 2) -> float:
    """W_p of two sets of rows (n, d), (m, d), each of equal weights, p = 1 or 2. InputError without POT."""
    x, y = check_rows(x), check_rows(y)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"samples of {x.shape[1]} and of {y.shape[1]} dimensions cannot be compared")
    if p not in (1, 2):
        raise InputError(f"p={p}: give 1 or 2")
    try:
        import ot
    except ImportError as error:
        raise InputError(f"exact transport needs POT: pip install 'score-solvers[metrics]' ({error})") from None
    cost = (distances(x, y) ** p).cpu().numpy()
    with warnings.catch_warnings():  # POT says by a warning that it gave up
        warnings.simplefilter("error")
        try:
            total = float(cast(Any, ot.emd2([], [], cost, numItermax=ITERATIONS)))
        except Warning as warning:
            raise ToolkitError(f"optimal transport of {len(x)} and {len(y)} points was not solved: {warning}") from None
    return max(0.0, total) ** (1.0 / p)


def installed() -> str | None:
    """Why POT is not at hand, without importing it (it takes seconds)."""
    from importlib.util import find_spec

    return None if find_spec("ot") else "exact transport needs POT: pip install 'score-solvers[metrics]'"


@dataclass(frozen=True)
class Transport(Metric):
    """p: 1 or 2."""

    p: int = 2

    unit: ClassVar[str] = "std"
    limit: ClassVar[int] = 1024

    def available(self, problem: Problem) -> str | None:
        return no_data(problem) or installed()

    def value(self, problem: Problem, block: Block) -> float:
        x = block.first(self.limit)
        truth = problem.truth(block.seed, range(len(x)), REFERENCE).flatten(1).to(x.device)
        return wasserstein(x, truth, self.p) / (math.sqrt(problem.dim) * problem.std)


def nearest_distance(x: Tensor, y: Tensor) -> Tensor:
    """Distance of each x to its nearest y, (n,)."""
    return torch.cdist(x.flatten(1).double(), y.flatten(1).double()).min(1).values
