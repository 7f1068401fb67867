"""Independent truths that solvers are measured against in several test files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scores import GaussianMixture, Score
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

    weights = np.array([0.3, 0.45, 0.25])
    means = np.array([-1.1, 0.2, 1.3])
    variances = np.array([0.05, 0.2, 0.1])

    def __init__(self, path: Path) -> None:
        self.path = path
        self.w, self.m, self.v = (torch.from_numpy(c) for c in (self.weights, self.means, self.variances))
        self.score = GaussianMixture(path, self.w, self.m[:, None], self.v)

    def predict(self, x: NDArray[np.float64], k: Knot) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(E[x_0 | x], E[eps | x]) at x (B,), in numpy: the formulas of ``GaussianMixture`` for a few numbers."""
        w, m, v = self.weights, self.means, self.variances
        total = k.alpha**2 * v + k.sigma**2
        off = x[:, None] - k.alpha * m
        weight = w / np.sqrt(total) * np.exp(-0.5 * off**2 / total)
        weight /= weight.sum(1, keepdims=True)
        return (weight * (m + k.alpha * v / total * off)).sum(1), (weight * (k.sigma / total * off)).sum(1)

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


def consistent_gaussian(path: Path, mean: float, variance: float, landings: Mapping[float, tuple[float, float]]) -> Score:
    """The exact distilled network of N(mean, variance) in each dimension: at time s it predicts the x0 for which

        alpha_d x0 + sigma_d eps,   eps = (x_s - alpha_s x0) / sigma_s,    (alpha_d, sigma_d) = landings[s],

    is the point of x_s's own probability-flow trajectory at that level. (1, 0) is the consistency function; (1, origin) stands
    for one whose value is a point at a small level, which is then used as x0 itself.
    """

    def network(x: Tensor, t: Tensor) -> Tensor:
        s = path.knot(float(t[0]))
        alpha, sigma = landings[min(landings, key=lambda u: abs(u - s.t))]
        ratio = math.sqrt((alpha**2 * variance + sigma**2) / (s.alpha**2 * variance + s.sigma**2))
        point = alpha * mean + ratio * (x - s.alpha * mean)
        if alpha == 1.0:  # the point itself
            return point
        return (point - (sigma / s.sigma) * x) / (alpha - sigma * s.alpha / s.sigma)

    return Score(network, path, "x0")
