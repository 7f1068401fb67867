"""The exact law of a plan's output on Gaussian data: no Monte Carlo, no network.

On N(mu, Sigma) with eigenvalues l the optimal prediction is affine in the state, direction by direction (S = alpha^2 l +
sigma^2):

    x0 = mu + alpha l / S (x - alpha mu),        eps = sigma / S (x - alpha mu)

so every register of a plan is  const + gain * x_start + (a combination of the normals drawn so far).  ``exact_law`` pushes
these three through the table; the joint covariance of the noise parts is kept for the registers that are still alive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sde.errors import InputError
from sde.noise import clock
from sde.path import Path
from sde.prediction import Knot

from .plan import Call, Lin, Normal, Plan, PlanRow, check_path

Array = NDArray[np.float64]
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)


class GaussianData(Protocol):
    """Gaussian data as ``scores.Gaussian`` describes it: mean, the covariance's d eigenvalues, and its eigenvectors as
    columns, (d, r).

    None: the coordinates. With r < d the other directions share one eigenvalue.
    """

    @property
    def path(self) -> Path: ...
    @property
    def mean(self) -> Tensor: ...
    @property
    def eigenvalues(self) -> Tensor: ...
    @property
    def eigenvectors(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Law:
    """The Gaussian law of a plan's output, float64. ``mean`` (d,) and ``covariance`` (d, d) are in the data's own coordinates,
    ``center`` and ``variance``, (d,), are the mean and the eigenvalues along the eigenvectors of the data's covariance, on
    which the directions are independent.
    """

    center: Tensor
    variance: Tensor
    gaussian: GaussianData
    times: tuple[float, ...]
    nfe: int

    @property
    def mean(self) -> Tensor:
        """The mean in the data's own coordinates, (d,)."""
        q = _basis(self.gaussian)
        return self.center if q is None else q @ self.center

    @property
    def covariance(self) -> Tensor:
        """The covariance in the data's own coordinates, (d, d)."""
        q = _basis(self.gaussian)
        return torch.diag(self.variance) if q is None else (q * self.variance) @ q.T

    def _target(self, t: float) -> tuple[Tensor, Tensor]:
        k = self.gaussian.path.knot(t)
        mean, eigenvalues = _eigenbasis(self.gaussian)
        return k.alpha * torch.from_numpy(mean), torch.from_numpy(k.alpha**2 * eigenvalues + k.sigma**2)

    def w2(self, t: float = 0.0) -> float:
        """2-Wasserstein distance to the exact marginal at time t (default: the data)."""
        mean, variance = self._target(t)
        return float(((self.center - mean) ** 2).sum().add(((self.variance.sqrt() - variance.sqrt()) ** 2).sum()).sqrt())

    def kl(self, t: float = 0.0) -> float:
        """KL(output || exact marginal at time t), inf where the marginal is degenerate and the output is not."""
        mean, variance = self._target(t)
        ratio = self.variance / variance
        terms = 0.5 * (ratio - 1.0 - ratio.log() + (self.center - mean) ** 2 / variance)
        same = (self.variance == 0) & (self.center == mean)
        degenerate = torch.where(same, 0.0, math.inf)  # the terms are inf - inf there, or 0 / 0
        return float(torch.where(variance == 0, degenerate, terms).sum())

    def mean_error(self, t: float = 0.0) -> float:
        """Euclidean distance of the means."""
        return float((self.center - self._target(t)[0]).norm())


def exact_law(plan: Plan, gaussian: GaussianData, start: str | tuple[Any, Any] = "marginal") -> Law:
    """The exact mean and covariance of ``plan``'s output when the data are ``gaussian`` and its score is exact.

    start : "marginal" (the exact law at times[0]), "prior" (N(0, prior_std^2), what sampling starts from), or a pair
            (mean, variance) along the eigenvectors
    """
    registers = _propagate(plan, gaussian)
    const, gain, noise = registers.final
    mean, variance = _start(plan, gaussian, start)
    return Law(
        torch.from_numpy(const + gain * mean),
        torch.from_numpy(gain**2 * variance + noise),
        gaussian,
        plan.times,
        plan.nfe,
    )


def flow_error(plan: Plan, gaussian: GaussianData) -> float:
    """Root mean square distance, per dimension, of a deterministic plan's output to the exact flow of the same start, drawn
    from p_T.
    """
    if plan.draws:
        raise InputError(f"{plan.solver} draws noise: use strong_error, or exact_law for its law")
    const, gain, _ = _propagate(plan, gaussian).final
    mean, eigenvalues = _eigenbasis(gaussian)
    s, t = plan.grid[0], plan.grid[-1]
    start = s.alpha**2 * eigenvalues + s.sigma**2
    exact = np.sqrt((t.alpha**2 * eigenvalues + t.sigma**2) / start)
    shift = const - t.alpha * mean + gain * s.alpha * mean  # the error at the mean of p_T
    return float(np.sqrt(np.mean((gain - exact) ** 2 * start + shift**2)))


def strong_error(plan: Plan, gaussian: GaussianData) -> float:
    """Root mean square distance, per dimension, to the exact solution of the reverse SDE driven by the same Brownian path,
    start from p_T.

    The path is the one of ``sde.noise``: a normal of the step s -> t is its increment in the clock c(lambda), divided by
    sqrt(c_t - c_s).
    """
    registers = _propagate(plan, gaussian, reference=True)
    mean, eigenvalues = _eigenbasis(gaussian)
    s = plan.grid[0]
    start = s.alpha**2 * eigenvalues + s.sigma**2
    const, gain, variance = registers.difference()
    return float(np.sqrt(np.mean(gain**2 * start + variance + (const + gain * s.alpha * mean) ** 2)))


def _basis(gaussian: GaussianData) -> Tensor | None:
    """All eigenvectors as columns, (d, d), completed to an orthonormal basis where only r < d are stored."""
    if gaussian.eigenvectors is None:
        return None
    q = gaussian.eigenvectors.detach().double().cpu()
    d, r = q.shape
    if r < d:
        full, triangle = torch.linalg.qr(torch.cat([q, torch.eye(d, dtype=torch.float64)], dim=1)[:, : d + r], mode="complete")
        full[:, :r] *= triangle.diagonal()[:r].sign()  # Householder may flip the given columns
        return full
    return q


def _eigenbasis(gaussian: GaussianData) -> tuple[Array, Array]:
    """Mean and eigenvalues along the eigenvectors, float64."""
    mean = gaussian.mean.detach().double().cpu().flatten()
    q = _basis(gaussian)
    if q is not None:
        mean = q.T @ mean
    eigenvalues = gaussian.eigenvalues.detach().double().cpu().flatten()
    return mean.numpy(), eigenvalues.expand(len(mean)).numpy()


def _start(plan: Plan, gaussian: GaussianData, start: str | tuple[Any, Any]) -> tuple[Array, Array]:
    mean, eigenvalues = _eigenbasis(gaussian)
    k = plan.grid[0]
    if start == "marginal":
        return k.alpha * mean, k.alpha**2 * eigenvalues + k.sigma**2
    if start == "prior":
        return 0.0 * mean, np.full_like(eigenvalues, gaussian.path.prior_std(k.t) ** 2)
    if isinstance(start, tuple) and len(start) == 2:
        given = [np.broadcast_to(torch.as_tensor(v, dtype=torch.float64).numpy(), mean.shape) for v in start]
        if not (np.isfinite(given[0]).all() and (given[1] >= 0).all()):
            raise InputError("start=(mean, variance): the mean must be finite and the variance >= 0")
        return given[0], given[1]
    raise InputError(f"start={start!r}: use 'marginal', 'prior' or a pair (mean, variance) along the eigenvectors")


class _Registers:
    """(const, gain) of the live registers, (2, d), and their noise covariance, (d,) a pair of registers."""

    def __init__(self, d: int) -> None:
        self.zero = np.zeros(d)
        self.line: dict[int, Array] = {0: np.stack([np.zeros(d), np.ones(d)])}
        self.noise: dict[int, dict[int, Array]] = {0: {}}
        self.result = 0

    def affine(self, out: int, terms: list[tuple[int, Any]], const: Any = 0.0, own: Any = 0.0) -> None:
        """out = sum coefficient * register + const + independent noise of variance ``own``; coefficients are scalars or
        (d,).
        """
        line = np.zeros((2, len(self.zero)))
        for r, c in terms:
            line += c * self.line[r]
        line[0] += const
        self.line[out] = line
        if isinstance(own, float) and own == 0.0 and not any(self.noise[r] for r, _ in terms):
            self.noise[out] = {}  # as everywhere in a plan that draws no noise
            return
        row: dict[int, Array] = {}
        for r, c in terms:
            for q, covariance in self.noise[r].items():
                row[q] = row.get(q, self.zero) + c * covariance
        variance = sum((c * row[r] for r, c in terms if r in row), self.zero) + own
        self.noise[out] = row
        for q, covariance in row.items():
            self.noise[q][out] = covariance
        if np.any(variance != 0.0):
            self.noise[out][out] = variance

    def drop(self, register: int) -> None:
        for q in self.noise.pop(register):
            if q != register:
                del self.noise[q][register]
        del self.line[register]

    def rename(self, old: int, new: int) -> None:
        self.line[new] = self.line.pop(old)
        row = self.noise.pop(old)
        for q in list(row):
            if q != old:
                self.noise[q][new] = self.noise[q].pop(old)
        if old in row:
            row[new] = row.pop(old)
        self.noise[new] = row

    @property
    def final(self) -> tuple[Array, Array, Array]:
        r = self.result
        return *self.line[r], self.noise[r].get(r, self.zero)

    def difference(self) -> tuple[Array, Array, Array]:
        """const, gain and noise variance of the result minus the reference."""
        r, e = self.result, _REFERENCE
        cross = self.noise[r].get(e, self.zero)
        variance = self.noise[r].get(r, self.zero) + self.noise[e].get(e, self.zero) - 2.0 * cross
        return *(self.line[r] - self.line[e]), np.maximum(variance, 0.0)


_REFERENCE = -1


def _propagate(plan: Plan, gaussian: GaussianData, reference: bool = False) -> _Registers:
    if not all(hasattr(gaussian, name) for name in ("path", "mean", "eigenvalues", "eigenvectors")):
        raise InputError(
            f"gaussian is a {type(gaussian).__name__}: exact laws are those of Gaussian data; give a scores.Gaussian on the "
            "plan's path"
        )
    check_path(plan, gaussian.path, "the Gaussian's path", "gaussian.path, or give gaussian.on(path)")
    mean, eigenvalues = _eigenbasis(gaussian)
    registers = _Registers(len(mean))
    registers.result = plan.states[-1]
    if reference:
        registers.affine(_REFERENCE, [(0, 1.0)])
    last = {0: -1} | {row.out: i for i, row in enumerate(plan.rows)}
    for i, row in enumerate(plan.rows):
        last.update((r, i) for r in _reads(row))
    last[registers.result] = len(plan.rows)
    steps = {register: i for i, register in enumerate(plan.states[1:])}
    normals: list[Normal] = []
    for i, row in enumerate(plan.rows):
        if isinstance(row, Call):
            k = plan.knots[row.knot]
            slope = _slope(k, eigenvalues, row.target)
            offset = (mean if row.target == "x0" else 0.0) - slope * k.alpha * mean
            registers.affine(row.out, [(row.state, slope)], offset)
        elif isinstance(row, Normal):
            registers.affine(row.out, [], 0.0, 1.0)
            normals.append(row)
        else:
            registers.affine(row.out, list(row.terms))
        keep = {n.out for n in normals} if reference else set()
        if reference and row.out in steps:
            j = steps[row.out]
            _advance(registers, plan, j, gaussian, mean, eigenvalues, normals)
            done, normals = normals, []
            for n in done:
                if last[n.out] <= i:
                    registers.drop(n.out)
        for r in {row.out, *_reads(row)}:
            if last[r] <= i and r not in keep and r in registers.line:
                registers.drop(r)
    return registers


def _reads(row: PlanRow) -> tuple[int, ...]:
    if isinstance(row, Lin):
        return tuple(r for r, _ in row.terms)
    return (row.state,) if isinstance(row, Call) else ()


def _slope(k: Knot, eigenvalues: Array, target: str) -> Array:
    total = k.alpha**2 * eigenvalues + k.sigma**2
    top = k.alpha * eigenvalues if target == "x0" else k.sigma
    if k.sigma > 0.0:
        return top / total
    return np.divide(top, total, out=np.zeros_like(total), where=total > 0)


def _advance(
    registers: _Registers, plan: Plan, j: int, gaussian: GaussianData, mean: Array, eigenvalues: Array, normals: list[Normal]
) -> None:
    """The exact solution over step j, with eta constant over the step.

    Y = x - alpha mu obeys dY = (f + (1 + eta^2) g^2 / (2 S)) Y dt + eta g dW, so Phi(t, u) = (alpha_t/alpha_u)^(-eta^2)
    (S_t/S_u)^((1+eta^2)/2), and its noise over the step has variance S_t - Phi^2 S_s. A normal z of the interval (a, b)
    carries the part kappa z of it, kappa = int Phi(t, u) eta sqrt(2) sigma_u sqrt(c'(lambda) / (c_b - c_a)) d lambda.
    """
    s, t, eta = plan.grid[j], plan.grid[j + 1], plan.eta[j]
    path = gaussian.path

    def spread(alpha: Any, sigma: Any) -> Array:
        return np.multiply.outer(np.asarray(alpha) ** 2, eigenvalues) + np.expand_dims(np.asarray(sigma) ** 2, -1)

    def phi(alpha: Any, sigma: Any) -> Array:
        growth = (spread(t.alpha, t.sigma) / spread(alpha, sigma)) ** (0.5 * (1.0 + eta * eta))
        return np.expand_dims((t.alpha / np.asarray(alpha)) ** (-eta * eta), -1) * growth

    step = phi(s.alpha, s.sigma)
    terms: list[tuple[int, Any]] = [(_REFERENCE, step)]
    explained = np.zeros_like(eigenvalues)
    for n in normals:
        if n.s.t == n.t.t:
            continue
        lam = 0.5 * (n.s.lam + n.t.lam) + 0.5 * (n.t.lam - n.s.lam) * _NODES
        at = path.time(lam)
        alpha, sigma = path.alpha(at).numpy(), path.sigma(at).numpy()
        rate = np.sqrt([_clock_rate(v) / (clock(n.t.lam) - clock(n.s.lam)) for v in lam])
        weight = 0.5 * (n.t.lam - n.s.lam) * _WEIGHTS * rate * eta * math.sqrt(2.0) * sigma
        kappa = np.einsum("u,ud->d", weight, phi(alpha, sigma))
        explained += kappa**2
        terms.append((n.out, kappa))
    total = spread(t.alpha, t.sigma) - step**2 * spread(s.alpha, s.sigma)
    own = np.maximum(total - explained, 0.0) if eta else 0.0
    registers.affine(_NEXT, terms, t.alpha * mean - step * s.alpha * mean, own)
    registers.drop(_REFERENCE)
    registers.rename(_NEXT, _REFERENCE)


_NEXT = -2


def _clock_rate(lam: float) -> float:
    """The derivative of ``sde.noise.clock``."""
    return 8.0 / math.hypot(lam, 4.0) ** 3
