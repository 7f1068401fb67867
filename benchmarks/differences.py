"""Whether two rows of results differ by more than noise.

A row's value comes of B disjoint blocks of samples. Two rows of the same seeds start from the same noise and are compared with
the same true draws, so their blocks are compared in pairs, which takes away what they share; rows of other seeds are compared
by Welch's t. Either way the difference d has a standard error s and degrees of freedom, and p is the chance of a t at least as
far from zero where the two are equally good. Pooled metrics have no block values: the jackknife's pseudo-values stand for them
(``metrics.base``).

Two rows within their floors are equally good, whatever d: that many samples cannot tell either from a perfect sampler.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .metrics import METRICS
from .metrics.levels import t_quantile

Row = Mapping[str, Any]

#: Relative differences that rounding alone can make, also of exact values.
ROUNDING = 1e-9


class Difference(NamedTuple):
    """How much worse one row is than another (negative: better), its standard error, and the p-value of no difference."""

    worse: float
    se: float
    dof: float
    p: float


def difference(a: Row, b: Row) -> Difference:
    """How much worse b is than a; both have values. What the floors of unequal n leave in doubt counts as no difference."""
    signed = badness(b) - badness(a)
    worse = math.copysign(max(0.0, abs(signed) - _bias(a, b)), signed)
    xs, ys = _blocks(a), _blocks(b)
    if xs is not None and ys is not None and a["seeds"] == b["seeds"] and a["n"] == b["n"] and len(xs) == len(ys):
        gaps = [y - x for x, y in zip(xs, ys, strict=True)]
        se, dof = statistics.stdev(gaps) / math.sqrt(len(gaps)), len(gaps) - 1.0
    else:
        se, dof = _welch(_spread(a, xs), _spread(b, ys))
    if abs(worse) <= ROUNDING * max(abs(a["value"]), abs(b["value"])):
        return Difference(worse, se, dof, 1.0)
    return Difference(worse, se, dof, t_tails(worse / se, dof) if se > 0.0 else 0.0)


def doubt(a: Row, b: Row) -> float:
    """The p-value of the two being equally good; 1 where both are within their floors."""
    return 1.0 if both_at_floor(a, b) else difference(a, b).p


def both_at_floor(a: Row, b: Row) -> bool:
    """Whether neither is told from a perfect sampler, and so not from the other."""
    return bool(a.get("within_floor") and b.get("within_floor"))


def badness(row: Row) -> float:
    """The value as a number of which less is better."""
    return _turned(row, row["value"])


def reach(row: Row) -> float | None:
    """Half of a row's interval: from the value to its farther end, since the nearer one may be cut off at the least or the most
    possible value. None where the row has no interval.
    """
    known = [abs(end - row["value"]) for end in row.get("interval") or () if end is not None]
    return max(known, default=None)


def discoveries(ps: Sequence[float], rate: float = 0.05) -> list[bool]:
    """Which of many p-values to believe, so that at most this share of them is expected to be false (Benjamini and Hochberg
    1995); where nothing differs at all, the chance of believing any is the rate.
    """
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    believed = max((k for k, i in enumerate(order, 1) if ps[i] <= rate * k / len(ps)), default=0)
    found = [False] * len(ps)
    for i in order[:believed]:
        found[i] = True
    return found


@cache
def t_tails(t: float, dof: float) -> float:
    """P(|T| >= |t|) of Student's t, to full relative precision far out: with T = sqrt(dof) tan(th) and u = pi/2 - th the
    density of u is proportional to sin(u)^(dof - 1).
    """
    nodes, weights = _gauss()
    end = math.atan2(math.sqrt(dof), abs(t))
    half_nodes = 0.5 * (nodes + 1.0)
    # u = end v^2 takes the root at 0 of a fractional dof out of the integrand
    integrand = np.sin(end * half_nodes**2) ** (dof - 1.0) * 2.0 * end * half_nodes
    constant = math.exp(math.lgamma((dof + 1.0) / 2.0) - math.lgamma(dof / 2.0)) / math.sqrt(math.pi)
    return min(1.0, float(2.0 * constant * 0.5 * (weights @ integrand)))


@cache
def _gauss() -> tuple[Any, Any]:
    """Gauss and Legendre's nodes and weights."""
    return np.polynomial.legendre.leggauss(64)


# --- what a row says of its spread ------------------------------------------------------------------------------------------


def _turned(row: Row, value: float) -> float:
    """As a number of which less is better. What looks better than any perfect sampler is as bad as what looks worse by as much:
    a row beyond that side of its floor is mirrored.
    """
    lower, floor = row.get("lower_is_better", True), row.get("floor")
    if row.get("two_sided"):
        target = floor["mean"] if floor else 0.0
        return value - target if row["value"] >= target else target - value
    if floor and floor.get("replicates") and (row["value"] < floor["low"] if lower else row["value"] > floor["high"]):
        value = 2.0 * floor["mean"] - value
    return value if lower else -value


def _blocks(row: Row) -> list[float] | None:
    """One number a block, of which less is better; None where the row does not have them."""
    values = row.get("values")
    if not values or len(values) < 3 or any(v is None for v in values):
        return None
    metric = METRICS.get(row["metric"].partition(":")[0])
    if metric is None:
        return None
    if metric.pooled:
        count = len(values)
        values = [count * row["value"] - (count - 1) * v for v in values]
    return [_turned(row, v) for v in values]


def _spread(row: Row, blocks: list[float] | None) -> tuple[float, float]:
    """(standard error, degrees of freedom) of a row alone."""
    if blocks is not None:
        return statistics.stdev(blocks) / math.sqrt(len(blocks)), len(blocks) - 1.0
    dof = max(1.0, len(row["seeds"]) - 1.0)
    return (reach(row) or 0.0) / t_quantile(0.975, dof), dof


def _welch(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """Of a difference of two independent means: (standard error, degrees of freedom after Satterthwaite)."""
    (sa, fa), (sb, fb) = a, b
    variance = sa**2 + sb**2
    if variance == 0.0:
        return 0.0, fa + fb
    return math.sqrt(variance), variance**2 / (sa**4 / fa + sb**4 / fb)


def _bias(a: Row, b: Row) -> float:
    """How far values may be apart because of their n alone: as far as their floors are."""
    if a["n"] == b["n"] or not a.get("floor") or not b.get("floor"):
        return 0.0
    return abs(a["floor"]["mean"] - b["floor"]["mean"])
