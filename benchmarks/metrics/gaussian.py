"""Distances between Gaussians fitted to samples and to the truth: Frechet distance, W2, KL, errors of mean and covariance.

With means m, mu and covariances S, C (S of the samples, divided by n - 1):

    fd           |m - mu|^2 + tr S + tr C - 2 tr (S^1/2 C S^1/2)^1/2      (Dowson and Landau 1982; in Inception features: FID)
    w2_gaussian  sqrt(fd of the samples themselves / d) / std
    kl_gaussian  KL(N(m, S) || N(mu, C)), nats a dimension
    mean_error   |m - mu| / (sqrt(d) std);   cov_error  |S - C|_F / |C|_F

All are of first order in 1/n even for a perfect sampler, so they are pooled: one value of all samples. With a solver that has a
table, and Gaussian data, the law of its output is known without samples: ``Exactly``.

The trace in fd is the nuclear norm of A^T B for any roots S = A A^T, C = B B^T: singular values carry an error of one ulp of
the largest, where eigenvalues of S^1/2 C S^1/2 near 0 would carry its square root.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from scores import Gaussian
from sde.errors import InputError

from ..endpoints import End
from ..problems import Problem
from . import features as extractors
from .base import Block, Metric, no_data
from .levels import Floor
from .reference import Reference, load_reference
from .statistics import Moments, Summary, moments, pack


def frechet(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> float:
    """|m - mu|^2 + tr (S + C - 2 (S C)^1/2) for means (d,) and covariances (d, d), float64.

    InputError for unequal dimensions, values that are not finite, matrices that are not symmetric or have an eigenvalue below 0
    by more than rounding.
    """
    given = Reference(mean.double(), cov.double(), None)
    return _frechet(given, Reference(other_mean.double(), other_cov.double(), None))


def _frechet(a: Reference, b: Reference) -> float:
    if len(a.mean) != len(b.mean):
        raise InputError(f"distributions of {len(a.mean)} and of {len(b.mean)} dimensions have no Frechet distance")
    joint = torch.linalg.svdvals(a.root.T @ b.root).sum() if a.root.numel() and b.root.numel() else 0.0
    total = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2.0 * joint
    return max(0.0, float(total))


def kl(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> float:
    """KL(N(mean, cov) || N(other_mean, other_cov)) in nats; InputError where one of them has no density."""
    factors = []
    for label, c in (("first", cov), ("second", other_cov)):
        factor, fault = torch.linalg.cholesky_ex(c)
        if int(fault):
            raise InputError(f"the {label} covariance is singular and has no density: give more samples than dimensions")
        factors.append(factor)
    both = torch.linalg.solve_triangular(factors[1], factors[0], upper=False)
    off = torch.linalg.solve_triangular(factors[1], (mean - other_mean)[:, None], upper=False)
    logs = both.diagonal().log().sum()
    return float(0.5 * (both.square().sum() + off.square().sum() - len(mean)) - logs)


@dataclass(frozen=True)
class FeatureMoments:
    """Moments of the samples' features."""

    features: str

    @property
    def name(self) -> str:
        return f"moments[{self.features}]"

    def measure(self, problem: Problem, x: Tensor, start: Tensor | None, end: End | None) -> Summary:
        return pack(self.name, extractors.extract(self.features, problem, x))


@lru_cache(maxsize=16)
def reference_of(problem: Problem, features: str, file: str) -> Reference:
    """What samples are compared with: a file's statistics; the exact moments, where features are the numbers themselves; or
    the moments of the features of true draws (of every point of a finite set, once).
    """
    if file:
        return load_reference(file)
    if extractors.is_raw(features, problem):
        return Reference(problem.mean, problem.cov, None)
    return Reference.of(moments(extractors.of_truth(features, problem)))


@dataclass(frozen=True)
class Fitted(Metric):
    """A distance between the Gaussians fitted to the samples' features and to the reference.

    kind       "fd", "w2", "kl", "mean" or "cov"
    features   see ``metrics.features``;  reference: a .npz of statistics (``metrics.reference``), or "" for the truth
    count      refuse reference statistics that are not of this many samples (0: of any)
    """

    kind: str = "fd"
    features: str = "own"
    reference: str = ""
    count: int = 0

    needs: ClassVar[str] = "statistics"
    pooled: ClassVar[bool] = True

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {"w2": "std", "mean": "std", "kl": "nats a dimension"}.get(self.kind, "")

    @property
    def sees(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "mean" if self.kind == "mean" else "spread"

    @property
    def statistic(self) -> FeatureMoments:
        return FeatureMoments(self.features)

    def available(self, problem: Problem) -> str | None:
        return extractors.missing(self.features, problem) or (None if self.reference else no_data(problem))

    def fewest(self, problem: Problem) -> int:
        """A covariance of fewer is singular."""
        return problem.dim + 1 if self.kind == "kl" and extractors.is_raw(self.features, problem) else 1

    def check(self, problem: Problem) -> None:
        extractors.check(self.features, problem)
        if self.reference:
            truth = reference_of(problem, self.features, self.reference)
            # how many features another's network has is seen at the first sample only
            d = problem.dim if extractors.is_raw(self.features, problem) else len(truth.mean)
            truth.check(d, self.features, problem.picture or problem.shape, self.count)

    def value(self, problem: Problem, block: Block) -> float:
        found = block.moments(self.statistic.name)
        truth = reference_of(problem, self.features, self.reference)
        truth.check(len(found.mean), self.features, problem.picture or problem.shape, self.count)
        return self._distance(found, truth, problem)

    def _distance(self, found: Moments, truth: Reference, problem: Problem) -> float:
        d = len(found.mean)
        if self.kind == "mean":
            return float((found.mean - truth.mean).norm()) / (math.sqrt(d) * problem.std)
        if self.kind == "cov":
            return float((found.cov - truth.cov).norm() / truth.cov.norm())
        if self.kind == "kl":
            if found.count <= d:
                raise InputError(f"{found.count} samples in {d} dimensions: their covariance is singular; give more than {d}")
            return kl(found.mean, found.cov, truth.mean, truth.cov) / d
        fd = _frechet(Reference(found.mean, found.cov, None), truth)
        return fd if self.kind == "fd" else math.sqrt(fd / d) / problem.std


@dataclass(frozen=True)
class Exactly(Metric):
    """The distance between the law of a sampler's output and the truth on Gaussian data, from its table: no samples, no noise.

    kind  "w2" (in std), "kl" (nats a dimension) or "mean" (in std), as ``Fitted`` would have them with infinitely many samples
    """

    kind: str = "w2"

    needs: ClassVar[str] = "table"

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "nats a dimension" if self.kind == "kl" else "std"

    def available(self, problem: Problem) -> str | None:
        if not isinstance(problem.exact, Gaussian):
            return f"{problem.name} is not Gaussian data with its exact score: the sampler's exact law is not known"
        return None

    def exact(
        self,
        problem: Problem,
        solver: Any,
        *,
        nfe: int | None = None,
        steps: int | None = None,
        grid: Any = "log_snr",
        eta: Any = None,
        law: str = "prior",
    ) -> float:
        """The value of one sampler; arguments as those of ``solvers.sample``; ``law`` of the start: "prior" or "marginal".

        InputError for solvers without a table.
        """
        from solvers import exact_law
        from solvers.sampling import plan_of

        reason = self.available(problem)
        if reason is not None:
            raise InputError(reason)
        gaussian: Any = problem.exact
        plan = plan_of(gaussian, solver, nfe=nfe, steps=steps, grid=grid, start=problem.start, stop=problem.stop, eta=eta)
        found = exact_law(plan, gaussian, start=law)
        d = problem.dim
        if self.kind == "kl":
            return found.kl(problem.stop) / d
        error = found.w2(problem.stop) if self.kind == "w2" else found.mean_error(problem.stop)
        return error / (math.sqrt(d) * problem.std)

    def value(self, problem: Problem, block: Block) -> float:
        raise InputError(f"{self.name} is a property of a sampler's table: call exact(problem, solver, ...)")

    def own_floor(self, problem: Problem, blocks: Any) -> Floor:
        return Floor(0.0, 0.0, 0.0, 1e-9, 0)

    def used(self, block: Block) -> int:
        return 0

    def enough(self, problem: Problem, worse: float, blocks: int) -> int:
        return 0
