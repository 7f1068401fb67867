"""What is kept of a part of the samples, and how parts merge.

A summary is a flat dict "statistic/field" -> float64 tensor. Two kinds of statistic:

    moments   count n, mean (d,), and the centred second moment m2 = sum (x - mean)(x - mean)^T (d, d). While n < d the centred
              rows (n, d) are kept instead: they are smaller and say the same. Two summaries merge by Chan, Golub and LeVeque's
              formula ("Updating formulae and a pairwise algorithm for computing sample variances", 1979):

                  n = a + b,  mean = mean_a + (b/n) delta,  m2 = m2_a + m2_b + (a b / n) delta delta^T,  delta = mean_b - mean_a

    lists     one number a sample, in index order (8 bytes a sample): merged by joining them.

``merge`` folds from the left in the order given, so the result is a function of the parts and their order, to the bit, and
memory does not depend on how many parts there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sde.errors import InputError

Summary = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Moments:
    """n, mean (d,), and m2 (d, d), float64."""

    count: int
    mean: Tensor
    m2: Tensor

    @property
    def cov(self) -> Tensor:
        """m2 / (n - 1)."""
        if self.count < 2:
            raise InputError(f"a covariance of {self.count} samples: at least 2 are needed")
        return self.m2 / (self.count - 1)


def check_rows(x: Tensor, what: str = "features") -> Tensor:
    """x as float64 rows (n, d), refused where a number is not finite."""
    if x.dim() < 2:
        raise InputError(f"{what} have shape {tuple(x.shape)}: give (n, d)")
    x = x.detach().double().flatten(1)
    bad = ~x.isfinite().all(1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise InputError(f"{what} are not finite in {int(bad.sum())} of {len(x)} samples (first: {first})")
    return x


def moments(x: Tensor) -> Moments:
    """The moments of rows (n, d)."""
    rows = check_rows(x)
    if not len(rows):
        raise InputError("moments of no samples: give at least one")
    mean = rows.mean(0)
    apart = rows - mean
    return Moments(len(rows), mean, apart.T @ apart)


def combine(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together."""
    if len(a.mean) != len(b.mean):
        raise InputError(f"moments of {len(a.mean)} and of {len(b.mean)} dimensions cannot be merged")
    n, delta = a.count + b.count, b.mean - a.mean
    return Moments(n, a.mean + delta * (b.count / n), a.m2 + b.m2 + torch.outer(delta, delta) * (a.count * b.count / n))


def pack(name: str, x: Tensor) -> Summary:
    """The summary of rows (n, d) under a statistic's name."""
    rows = check_rows(x).cpu()
    n, d = rows.shape
    mean = rows.mean(0)
    apart = rows - mean
    inner = {"rows": apart} if n < d else {"m2": apart.T @ apart}
    kept = {"count": torch.tensor(float(n), dtype=torch.float64), "mean": mean, **inner}
    return {f"{name}/{field}": value for field, value in kept.items()}


def unpack(summary: Mapping[str, Tensor], name: str) -> Moments:
    """The moments in a summary."""
    if f"{name}/mean" not in summary:
        raise InputError(f"the summary holds {', '.join(sorted(summary)) or 'nothing'}: {name} was not measured")
    m2 = summary.get(f"{name}/m2")
    if m2 is None:
        rows = summary[f"{name}/rows"]
        m2 = rows.T @ rows
    return Moments(round(float(summary[f"{name}/count"])), summary[f"{name}/mean"], m2)


def merge(summaries: Iterable[Mapping[str, Tensor]]) -> Summary:
    """One summary of several, folded from the left."""
    total: Summary | None = None
    for summary in summaries:
        total = dict(summary) if total is None else _join(total, summary)
    if total is None:
        raise InputError("merge of no summaries: give at least one part")
    return total


def _join(a: Summary, b: Mapping[str, Tensor]) -> Summary:
    names = [{key.rpartition("/")[0] for key in summary} for summary in (a, b)]
    if names[0] != names[1]:
        raise InputError(f"parts hold different statistics: {', '.join(sorted(names[0] ^ names[1]))} is not in both")
    joined: Summary = {}
    for name in sorted(names[0]):
        if f"{name}/mean" in a:
            both = combine(unpack(a, name), unpack(b, name))
            joined[f"{name}/count"] = torch.tensor(float(both.count), dtype=torch.float64)
            joined[f"{name}/mean"], joined[f"{name}/m2"] = both.mean, both.m2
        else:
            for key in (k for k in a if k.rpartition("/")[0] == name):
                joined[key] = torch.cat([a[key], b[key]])
    return joined
