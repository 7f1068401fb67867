"""Independent truths that solvers are measured against in several test files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scores import GaussianMixture
from sde.noise import Draws, Source
from sde.path import Path
from sde.prediction import Knot


class _ProbeDraws(Draws):
    """Draw k is 1 in row 2 + k and 0 elsewhere."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.drawn = shape, dtype, []

    def initial(self, out: Tensor | None = None) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype)

    def normal(self, k: int, s: Knot, t: Knot, like: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        z = torch.zeros(self.shape, dtype=self.dtype)
        if 2 + k < len(z):  # draws beyond the last row have no row to appear in: the caller asked for fewer
            z[2 + k] = 1.0
        return z


class Probe(Source):
    """Noise that reads off a solver that is affine in its start and its normals, with no table and no theory.

    Row 0 starts at 0 and sees no noise (the constant), row 1 starts at 1 (the gain), row 2 + k sees the k-th normal alone.
    """

    def open(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Draws:
        return _ProbeDraws(tuple(shape), dtype)


def probe(run, dimension: int, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """(const (d,), gain (d,), noise gains (draws, d)) of ``run``: start (B, d) -> end (B, d) under ``Probe`` noise."""
    start = torch.zeros(2 + draws, dimension, dtype=torch.float64)
    start[1] = 1.0
    end = run(start)
    return end[0], end[1] - end[0], end[2:] - end[0]


class Mixture1D:
    """A 1-D Gaussian mixture, whose probability flow is known: it keeps the quantile, F_t(x_t) = F_s(x_s)."""

    weights = (0.3, 0.45, 0.25)
    means = (-1.1, 0.2, 1.3)
    variances = (0.05, 0.2, 0.1)

    def __init__(self, path: Path) -> None:
        self.path = path
        columns = [torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.variances)]
        self.w, self.m, self.v = columns
        self.score = GaussianMixture(path, self.w, self.m[:, None], self.v)

    def cdf(self, x: Tensor, k: Knot) -> Tensor:
        std = (k.alpha**2 * self.v + k.sigma**2).sqrt()
        return (self.w * torch.special.ndtr((x[:, None] - k.alpha * self.m) / std)).sum(1)

    def flow(self, x: Tensor, s: Knot, t: Knot) -> Tensor:
        """The exact end point at t of the probability flow from x (B,) at s, by bisection on the quantile."""
        target = self.cdf(x, s)
        low, high = torch.full_like(x, -60.0), torch.full_like(x, 60.0)
        for _ in range(120):
            middle = 0.5 * (low + high)
            below = self.cdf(middle, t) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)
