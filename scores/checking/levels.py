"""What a network does, in numbers: second moments of (x0, 1, input, output) at a few noise levels.

With u = x / alpha = x0 + r eps, r = sigma / alpha, a reading of the output y says x0-hat = p u + q y, where for the row (a, b)

    p = alpha b / det,   q = -sigma / det,   det = alpha b - sigma a,

and its squared error is a quadratic form of the 4 x 4 matrix G of second moments. So one call at a level judges every row:

    error(p, q) = v G v',  v = (1, 0, -p, -q)      of a reading
    affine      = min over (c, p, q)               the best that an affine map of this input and this output says
    linear      = min over (c, p)                  the best that is said without the network: a linear filter

No function of x has a smaller error than the posterior mean, so where a reading is right its excess error / affine - 1 is 0;
and of all wirings of a network the right one has the least error. Moments are kept a sample, so that a difference of two
errors comes with its standard error.

A level is sigma / alpha in units of the data's deviation, so that every path meets the same problem and errors compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sde.path import Path, Tabulated
from sde.prediction import Knot, Row

from .wirings import Reading, Wiring

Floats = NDArray[np.float64]

COUNT, LOW, HIGH = 6, 0.15, 9.0  # noise levels, in deviations of the data
CHUNK = 1 << 22  # numbers of the data that are taken to float64 at a time
SLACK = 0.03  # of the output's size: what is put down to its precision


@dataclass(frozen=True, eq=False)
class Level:
    """One noise level of one wiring: its knot and, a sample, the moments of (x0, 1, u, y): (B, 4, 4)."""

    knot: Knot
    moments: Floats

    @property
    def ratio(self) -> float:
        return self.knot.sigma / self.knot.alpha

    @cached_property
    def gram(self) -> Floats:
        return self.moments.mean(0)

    def errors(self, v: Floats) -> Floats:
        """(n, B): the mean squares of v . (x0, 1, u, y), for n rows v."""
        return np.maximum(np.einsum("ni,bij,nj->nb", v, self.moments, v, optimize=True), 0.0)

    def best(self, *columns: int) -> Floats:
        """v = (1, ...) of the least squared error of x0 over linear combinations of these columns of (x0, 1, u, y)."""
        a, b = self.gram[np.ix_(columns, columns)], self.gram[list(columns), 0]
        size = np.sqrt(np.maximum(np.diag(a), 1e-300))
        values, vectors = np.linalg.eigh(a / size[:, None] / size)
        kept = values > 1e-10
        weights = vectors[:, kept] @ ((vectors.T @ (b / size))[kept] / values[kept]) / size
        v = np.zeros((1, 4))
        v[0, 0], v[0, list(columns)] = 1.0, -weights
        return v

    @cached_property
    def linear(self) -> float:
        return max(float(self.errors(self.best(1, 2)).mean()), 1e-30)

    @cached_property
    def affine(self) -> Floats:
        """(B,) the squared errors of the best affine reading."""
        return np.maximum(self.errors(self.best(1, 2, 3))[0], 1e-30)

    def seen(self) -> tuple[float, float]:
        """(A, B) of the regression y = A x0 + B eps + c."""
        r = self.ratio
        basis = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [-1 / r, 0, 1 / r, 0], [0, 0, 0, 1.0]])
        g = basis @ self.gram @ basis.T  # of (x0, 1, eps, y)
        a, _, b = np.linalg.lstsq(g[:3, :3], g[:3, 3], rcond=None)[0]
        return float(a), float(b)


@dataclass(frozen=True, eq=False)
class Verdict:
    """How a reading denoises at each level.

    error    its squared error over that of a linear filter: at most 1 for a posterior mean
    excess   its squared error over that of the best affine reading of the same output, less 1
    noise    the standard error of log(1 + excess)
    without  its ``error``, were the output 0
    shares   (B,) the sum over levels of a sample's squared error over the mean one
    """

    error: tuple[float, ...]
    excess: tuple[float, ...]
    noise: tuple[float, ...]
    without: tuple[float, ...]
    shares: Floats

    @property
    def cost(self) -> float:
        """The sum over levels of log error: what a posterior mean makes least, of all things made of x."""
        return sum(math.log(max(e, 1e-9)) for e in self.error)

    @property
    def loss(self) -> float:
        """What of the cost an affine map of the output would save."""
        return sum(math.log1p(max(e, 0.0)) for e in self.excess)

    @property
    def matters(self) -> bool:
        """Is the prediction made by the network, not by the wiring around it?"""
        return sum(w > 1.2 * e for w, e in zip(self.without, self.error, strict=True)) >= 2

    def gain(self, other: Verdict) -> tuple[float, float]:
        """(cost of ``other`` less this one's, its standard error)."""
        scatter = (other.shares - self.shares).std() / math.sqrt(len(self.shares))
        return other.cost - self.cost, float(scatter)


def coefficients(reading: Reading, k: Knot) -> tuple[float, float]:
    """(p, q) of x0-hat = p u + q y; nan where the row does not determine x0."""
    a, b = reading.row(k)
    det = k.alpha * b - k.sigma * a
    if not math.isfinite(det) or det == 0.0:
        return math.nan, math.nan
    return k.alpha * b / det, -k.sigma / det


def judge(levels: Sequence[Level], readings: Sequence[Reading]) -> list[Verdict | None]:
    """A verdict on each reading; None where one does not determine x0 at some level."""
    errors, excesses, noises, withouts, shares = [], [], [], [], 0.0
    for level in levels:
        pq = np.array([coefficients(r, level.knot) for r in readings])
        ones, zeros = np.ones(len(pq)), np.zeros(len(pq))
        each = level.errors(np.stack([ones, zeros, -pq[:, 0], -pq[:, 1]], 1))
        mean = np.maximum(each.mean(1), 1e-30)
        share = each / mean[:, None]
        slack = (SLACK * pq[:, 1]) ** 2 * level.gram[3, 3]
        errors.append(mean / level.linear)
        excesses.append(np.maximum(mean - slack, 0.0) / level.affine.mean() - 1.0)
        noises.append((share - level.affine / level.affine.mean()).std(1) / math.sqrt(each.shape[1]))
        withouts.append(level.errors(np.stack([ones, zeros, -pq[:, 0], zeros], 1)).mean(1) / level.linear)
        shares = shares + share
    table = np.stack([errors, excesses, noises, withouts], 0)  # (kind, level, reading)
    found: list[Verdict | None] = []
    for i in range(len(readings)):
        error, excess, noise, without = (tuple(column[:, i].tolist()) for column in table)
        good = all(map(math.isfinite, error))
        found.append(Verdict(error, excess, noise, without, np.asarray(shares)[i]) if good else None)
    return found


def moments(x0: Tensor, u: Tensor, y: Tensor) -> Floats:
    """A sample's means of the products of (x0, 1, u, y), in float64: (B, 4, 4)."""
    parts = []
    rows = max(1, CHUNK // max(1, x0[0].numel()))
    for chunk in zip(*(v.flatten(1).split(rows) for v in (x0, u, y)), strict=True):
        a, b, c = (v.cpu().double() for v in chunk)
        stack = torch.stack([a, torch.ones_like(a), b, c], 1)
        parts.append((stack @ stack.transpose(1, 2) / a.shape[1]).numpy())
    return np.concatenate(parts)


# --- where to look ------------------------------------------------------------------------------------------------------


def reach(path: Path) -> tuple[float, float]:
    """The least and the largest sigma / alpha that are looked at: just inside the ends, where a row may know nothing."""
    low, high = (math.exp(min(-v, 700.0)) for v in path.lam(torch.tensor([path.t_min, path.T]).double()).tolist())
    return 1.02 * low, high / 1.02


def times(path: Path, deviation: float, count: int = COUNT) -> list[float]:
    """Times whose sigma / alpha are spread evenly in the logarithm over LOW ... HIGH deviations, or over what there is."""
    least, most = reach(path)
    low, high = max(LOW * deviation, least), min(HIGH * deviation, most)
    if not high > 5.0 * low:
        low, high = least, min(most, 1000.0 * least + 1000.0)
    return at_ratios(path, torch.linspace(math.log(low), math.log(high), count, dtype=torch.float64))


def at_ratios(path: Path, logs: Tensor) -> list[float]:
    """The times at which log(sigma / alpha) is this."""
    t = path.time(-logs)
    if isinstance(path, Tabulated):  # at the entries labels are exact
        t = path.time_of(path.index(t).round().clamp(0.0, len(path.betas) - 1.0))
    return t.tolist()


def whole(w: Wiring, t: float) -> float:
    """The middle of the times that have t's label, where labels are whole numbers: there the label is most nearly right."""
    here = w.label(torch.tensor([t], dtype=torch.float64))
    if here.is_floating_point():
        return t
    fine = torch.linspace(0.0, w.path.T, 4003, dtype=torch.float64)[1:-1]
    same = fine[w.label(fine) == here]
    return float(same.min() + same.max()) / 2.0 if 0 < len(same) < 1000 else t


# --- what simple means reach ------------------------------------------------------------------------------------------------


class Bar:
    """What an honest network must reach at sigma / alpha on some data, as an error over a linear filter's: what simple
    denoisers reach that are fitted on one half of the data and judged on the other.

    They are the linear filter itself; the Gaussian of the half's mean and (shrunk) covariance; the posterior mean on the half
    as atoms. A posterior mean beats them all. Fewer than 8 different samples make no bar: 1.
    """

    def __init__(self, data: Tensor, seed: int) -> None:
        self.unit = max(float(data.double().std()), 1e-12)
        at = np.geomspace(LOW / 2.0, 2.0 * HIGH, 9)
        self._logs, self._values = np.log(at), _simple(data, [float(r) * self.unit for r in at], seed)

    def __call__(self, ratios: Sequence[float], gain: float = 1.0) -> list[float]:
        """At these ratios, of data that are multiplied by ``gain``."""
        return np.interp(np.log(np.array(ratios) / (abs(gain) * self.unit)), self._logs, self._values).tolist()


def _simple(data: Tensor, ratios: Sequence[float], seed: int) -> list[float]:
    generator = np.random.default_rng(seed)
    flat = np.unique(data.flatten(1).cpu().double().numpy(), axis=0)
    flat = flat[generator.permutation(len(flat))[:512]]
    if flat.shape[1] > 4096:
        flat = flat[:, np.linspace(0, flat.shape[1] - 1, 4096).astype(int)]
    if len(flat) < 8:
        return [1.0] * len(ratios)
    known, new = flat[: len(flat) // 2], flat[len(flat) // 2 :]
    centre, share = known.mean(0), 0.7
    factor = (known - centre) / math.sqrt(len(known))
    found = []
    for r in ratios:
        u = new + r * generator.standard_normal(new.shape)
        # (C + r^2)^-1 (u - centre) by Woodbury, for C = share F'F + (1 - share) c I
        rest, v = (1.0 - share) * float(known.var()) + r * r, u - centre
        inner = np.linalg.solve(rest * np.eye(len(known)) + share * factor @ factor.T, factor @ v.T)
        gaussian = u - r * r * (v - share * (factor.T @ inner).T) / rest
        log = (u @ known.T - 0.5 * (known**2).sum(1)) / (r * r)
        weight = np.exp(log - log.max(1, keepdims=True))
        atoms = (weight / weight.sum(1, keepdims=True)) @ known
        plain = np.stack([np.ones(u.size), u.ravel()], 1)
        linear = plain @ np.linalg.lstsq(plain, new.ravel(), rcond=None)[0]
        errors = [float(((new.ravel() - d.ravel()) ** 2).mean()) for d in (linear, gaussian, atoms)]
        found.append(min(errors) / max(errors[0], 1e-30))
    return found


def row_at(row: Row, level: Level) -> str:
    """What the output is, as seen, and what the wiring says it is."""
    (a, b), (c, d) = row, level.seen()
    return f"the output is {c:.2g} x0 + {d:.2g} eps where the wiring says {a:.2g} x0 + {b:.2g} eps"
