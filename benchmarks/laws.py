"""Laws of data whose scores are known exactly: what problems are made of.

A law is a frozen value that says three things: ``on(path)``, its exact score on a path; ``mean`` and ``cov``, its exact
moments, (d,) and (d, d) float64; and ``draw(z, u)``, which turns unit normals (n, d) and uniforms (n,) into n data points, so
that a draw is a function of its own random numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from scores import Empirical, Gaussian, GaussianMixture
from scores.analytic import Exact
from sde import EDM
from sde.path import Path

F64 = torch.float64


class Law(Protocol):
    """What a problem asks of its data."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def cov(self) -> Tensor: ...
    def on(self, path: Path) -> Exact: ...
    def draw(self, z: Tensor, u: Tensor) -> Tensor: ...


def rowwise(z: Tensor, matrix: Tensor) -> Tensor:
    """z @ matrix, (n, k) and (k, d), added up term by term: row i has the same bits whatever rows are beside it."""
    total = torch.zeros(len(z), matrix.shape[1], dtype=z.dtype)
    for column, row in zip(z.unbind(1), matrix, strict=True):
        total += column[:, None] * row
    return total


@dataclass(frozen=True, eq=False)
class Mixture:
    """sum_k weights_k N(means_k, covs_k): weights (K,), means (K, d), covs (K, d, d), or (K, d) variances. One component: a
    Gaussian.
    """

    weights: Tensor
    means: Tensor
    covs: Tensor

    def on(self, path: Path) -> Gaussian | GaussianMixture:
        if len(self.weights) == 1:
            return Gaussian(path, self.means[0], cov=self.covs[0])
        return GaussianMixture(path, self.weights, self.means, self.covs)

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def cov(self) -> Tensor:
        apart = self.means - self.mean
        inner = torch.einsum("k,k...->...", self.weights, self.covs)
        return (apart * self.weights[:, None]).T @ apart + (inner if inner.dim() == 2 else torch.diag(inner))

    @cached_property
    def _roots(self) -> Tensor:
        """Square roots of the covariances: of variances (K, d), of matrices the symmetric ones, also of singular ones."""
        if self.covs.dim() == 2:
            return self.covs.sqrt()
        values, vectors = torch.linalg.eigh(self.covs)
        return (vectors * values.clamp_min(0.0).sqrt()[:, None, :]) @ vectors.transpose(1, 2)

    def draw(self, z: Tensor, u: Tensor) -> Tensor:
        k = torch.searchsorted(self.weights.cumsum(0), u.contiguous()).clamp_max(len(self.weights) - 1)
        if self.covs.dim() == 2:
            return self.means[k] + self._roots[k] * z
        x = self.means[k]
        for i, root in enumerate(self._roots):  # not root[k]: that is n d^2 numbers
            here = k == i
            x[here] += rowwise(z[here], root)
        return x


@dataclass(frozen=True, eq=False)
class Normal:
    """The Gaussian that an exact score describes, by its eigenvalues and eigenvectors: singular ones too, in any dimension."""

    score: Gaussian

    def on(self, path: Path) -> Gaussian:
        return self.score.on(path)  # pyright: ignore[reportReturnType]

    @property
    def mean(self) -> Tensor:
        return self.score.mean.reshape(-1)

    def _apply(self, values: Tensor, z: Tensor) -> Tensor:
        """phi(C) z for phi's values (d,) on the eigenvalues; directions outside the stored columns share one."""
        vectors = self.score.eigenvectors
        if vectors is None:
            return values * z
        r = vectors.shape[1]
        rest = values[r:].max() if r < len(values) else torch.zeros((), dtype=F64)
        return rest * z + rowwise(rowwise(z, vectors) * (values[:r] - rest), vectors.T)

    @property
    def cov(self) -> Tensor:
        return self._apply(self.score.eigenvalues, torch.eye(len(self.mean), dtype=F64))

    def draw(self, z: Tensor, u: Tensor) -> Tensor:
        return self.mean + self._apply(self.score.eigenvalues.sqrt(), z)


@dataclass(frozen=True, eq=False)
class Points:
    """Uniform on a finite set of points, (N, d)."""

    points: Tensor

    def on(self, path: Path) -> Empirical:
        return Empirical(path, self.points)

    @property
    def mean(self) -> Tensor:
        return self.points.mean(0)

    @property
    def cov(self) -> Tensor:
        return torch.cov(self.points.T, correction=0).reshape(self.points.shape[1], -1)

    def draw(self, z: Tensor, u: Tensor) -> Tensor:
        return self.points[(u * len(self.points)).long().clamp_max(len(self.points) - 1)]


def ring(radius: float, modes: int, centre: Sequence[float] = (0.0, 0.0)) -> Tensor:
    """Points equally spaced on a circle, (modes, 2)."""
    angle = torch.arange(modes, dtype=F64) * (2.0 * math.pi / modes)
    return radius * torch.stack([angle.cos(), angle.sin()], 1) + torch.tensor(centre, dtype=F64)


def isotropic(weights: Tensor, means: Tensor, variances: Tensor | float) -> Mixture:
    """A mixture of round components; weights are normalised."""
    values = torch.as_tensor(variances, dtype=F64).expand(len(means))
    return Mixture(weights / weights.sum(), means, values[:, None].expand_as(means).contiguous())


# --- the laws of peers.md: every number is a function of these lines --------------------------------------------------------


def gauss64() -> Mixture:
    """Spectrum 1/k, standard deviation .5 a dimension, a random basis and mean."""
    g = torch.Generator().manual_seed(1)
    values = 1.0 / torch.arange(1, 65, dtype=F64)
    values = 0.25 * values / values.mean()
    q = torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=F64))[0]
    mean = 0.3 * torch.randn(1, 64, generator=g, dtype=F64)
    return Mixture(torch.ones(1, dtype=F64), mean, ((q * values) @ q.T)[None])


def ring2() -> Mixture:
    """Eight modes of standard deviation .06 on a ring of radius .7, unequal weights."""
    return isotropic(torch.tensor([4.0, 1, 2, 1, 3, 1, 2, 1], dtype=F64), ring(0.7, 8), 0.06**2)


def gmm256() -> Mixture:
    """Ten random means in 256 dimensions, each with its own permutation of the spectrum 1/k."""
    g = torch.Generator().manual_seed(3)
    means = 0.35 * torch.randn(10, 256, generator=g, dtype=F64)
    spectrum = 1.0 / torch.arange(1, 257, dtype=F64)
    spectrum = 0.12 * spectrum / spectrum.mean()
    variances = torch.stack([spectrum[torch.randperm(256, generator=g)] for _ in range(10)]) + 1e-4
    weights = torch.rand(10, generator=g, dtype=F64) + 0.3
    return Mixture(weights / weights.sum(), means, variances)


def classes(x: Tensor, label: Tensor, floor: float) -> Mixture:
    """One Gaussian of full covariance a class of the points x (N, d), with ``floor`` added to every variance."""
    groups = [x[label == k] for k in label.unique()]
    covs = torch.stack([torch.cov(g.T) + floor * torch.eye(x.shape[1], dtype=F64) for g in groups])
    weights = torch.tensor([float(len(g)) for g in groups], dtype=F64)
    return Mixture(weights / weights.sum(), torch.stack([g.mean(0) for g in groups]), covs)


# --- the others -------------------------------------------------------------------------------------------------------------


def three_modes() -> Mixture:
    means = torch.tensor([[1.1, 0.75], [-1.25, 1.25], [0.0, -1.0]], dtype=F64)
    return isotropic(torch.ones(3, dtype=F64), means, torch.tensor([0.1, 0.125, 0.175], dtype=F64))


def rings() -> Mixture:
    """Two concentric rings, each of so many modes that their neighbours overlap; mass in proportion to the radius."""
    means = torch.cat([ring(0.4, 24), ring(1.0, 60)])
    return isotropic(torch.ones(84, dtype=F64), means, 0.05**2)


def low_rank(d: int = 128, rank: int = 8) -> Normal:
    """Standard deviations 1, 1/sqrt(2), ..., 1/sqrt(rank) along random directions, none along the others."""
    g = torch.Generator().manual_seed(5)
    q = torch.linalg.qr(torch.randn(d, rank, generator=g, dtype=F64))[0]
    factor = q * torch.arange(1, rank + 1, dtype=F64) ** -0.5
    return Normal(Gaussian(EDM(), 0.3 * torch.randn(d, generator=g, dtype=F64), factor=factor, diag=0.0))


def heavy_tailed(dof: float = 3.0) -> Mixture:
    """A scale mixture in the plane after Student's t: x = sqrt(v) z, where 1/v is Gamma(dof/2, dof/2), on v = 2^-4 ... 2^10.

    The law of log v has density proportional to v^(-dof/2) exp(-dof / (2 v)). Scaled to standard deviation .5 a dimension; the
    kurtosis of a coordinate is 53, against 3 of a Gaussian.
    """
    v = 2.0 ** torch.arange(-4, 11, dtype=F64)
    weights = v ** (-dof / 2) * torch.exp(-dof / (2.0 * v))
    weights = weights / weights.sum()
    return isotropic(weights, torch.zeros(len(v), 2, dtype=F64), 0.25 * v / (weights @ v))


def multiscale() -> Mixture:
    """Four groups of four groups of four modes in the plane: radii 1, .2 and .04, standard deviation .01."""
    means = torch.zeros(1, 2, dtype=F64)
    for radius in (1.0, 0.2, 0.04):
        means = (means[:, None] + ring(radius, 4)).reshape(-1, 2)
    return isotropic(torch.ones(64, dtype=F64), means, 1e-4)


def spectrum(values: Tensor, vectors: Tensor | None) -> Normal:
    """N(0, C) from C's eigenvalues (d,), and its eigenvectors as columns (d, d) where they are not the coordinates."""
    mean = torch.zeros(len(values), dtype=F64)
    if vectors is None:
        return Normal(Gaussian(EDM(), mean, var=values))
    return Normal(Gaussian(EDM(), mean, cov=(vectors * values) @ vectors.T))


def of(score: object) -> Law | None:
    """The law that an exact score is the score of; None where there is none, or none that can be drawn from here."""
    if isinstance(score, Gaussian):
        return Normal(score)
    if isinstance(score, GaussianMixture):
        means = score.means.flatten(1)
        k, d = means.shape
        full = score.covs.numel() == k * d * d and (d > 1 or score.covs.dim() == 3)
        covs = score.covs.reshape(k, d, d) if full else score.covs.reshape(k, -1).expand(k, d)
        return Mixture(score.weights, means, covs)
    return Points(score.data.double().flatten(1)) if isinstance(score, Empirical) else None
