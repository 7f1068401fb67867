"""Floors: what a perfect sampler gets; and how many samples tell a slightly worse one from it.

A perfect sampler is one whose samples are true draws, of seeds of their own. Its number is measured in R replicates of a row,
or in R B / 2 of one of the row's B blocks, of the same size and against reference draws of the same size. From their mean,
spread and skewness follows where a perfect sampler's value lies in 99 % of cases; outside it a sampler is told from a
perfect one. Also on the side that looks good: samples that are drawn in towards the data have a smaller W2 to a finite set of
true draws than other true draws have, a higher precision and a better coverage.

``worse = w`` stands for a sampler whose samples are m + (1 + w) (x - m): true draws whose deviations from the mean m are too
large by w. What a metric cannot see it is not asked to: for recall, which rises with the spread, deviations are too small by w;
for a metric of the mean alone samples are x + w s, s the standard deviation of each number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde.errors import InputError, ToolkitError

from ..problems import PERFECT, Problem
from .base import Block, Measured, Metric, check_blocks, chunks, summarise
from .levels import Floor, floor_of
from .likelihood import no_density
from .statistics import Summary, merge

REPLICATES = 32
SEEDS = 1 << 62  # replicate r has the seed SEEDS + r: beyond those of any run
VERSION = 2
WORSE = 0.05  # the difference that every row says how many samples it takes to see


@dataclass(frozen=True)
class Drawn:
    """The first ``count`` samples of a perfect sampler, or of one that is ``worse``: each is drawn when it is looked at."""

    problem: Problem
    seed: int
    count: int
    worse: float
    sees: str

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, span: slice) -> Tensor:
        x = self.problem.truth(self.seed, range(self.count)[span], PERFECT)
        return spoil(self.problem, x, self.worse, self.sees) if self.worse else x


def perfect(metrics: Sequence[Metric], problem: Problem, seed: int, m: int, worse: float = 0.0) -> Block:
    """A block of m samples of a perfect sampler (or one that is ``worse``), for these metrics."""
    drawn = Drawn(problem, seed, m, worse, metrics[0].sees)

    def summaries() -> Iterator[Summary]:  # merged as they come: memory does not grow with m
        for span in chunks(m, problem.dim):
            yield summarise(metrics, problem, drawn[span.start : span.stop], None, span)

    wanted = any(q.statistic is not None for q in metrics)
    return Block(m, seed, merge(summaries()) if wanted else {}, drawn)


def spoil(problem: Problem, x: Tensor, worse: float, what: str = "spread") -> Tensor:
    """True draws x (B, *shape) made worse: their deviations from the mean too large or too small, or their mean off."""
    if what == "mean":
        return x + worse * problem.cov.diag().sqrt().reshape(problem.shape)
    mean = problem.mean.reshape(problem.shape)
    return mean + (1.0 + (worse if what == "spread" else -worse)) * (x - mean)


def floor_missing(metric: Metric, problem: Problem) -> str | None:
    """Why there is no floor, or None."""
    if problem.data is None:
        return f"{problem.name} has no true data, so what a perfect sampler would get is not known"
    return no_density(problem) if metric.needs == "model" else None


def floor(metric: Metric, problem: Problem, blocks: Sequence[Block], replicates: int = REPLICATES) -> Floor | None:
    """The metric's floor for blocks of this number and size; None where it is not known (``floor_missing`` says why)."""
    own = metric.own_floor(problem, blocks)
    if own is not None or floor_missing(metric, problem) is not None:
        return own
    check_blocks(blocks)
    m, count = blocks[0].asked, len(blocks)
    # half as many rows' worth of single blocks: then the floor's mean is known to a quarter of a row's deviation
    draws = replicates if metric.pooled else math.ceil(0.5 * replicates * count)
    return _floor(metric, _replicates(metric, problem, m, count, draws, 0.0), m, count)


def floor_key(metric: Metric, problem: Problem, blocks: Sequence[Block], replicates: int = REPLICATES) -> str | None:
    """What the floor is a function of, as a digest; None where it depends on the samples themselves."""
    if metric.needs in ("model", "table") or metric.wants_end:
        return None
    words = (VERSION, repr(metric), problem.name, repr(problem.noise), problem.shape, blocks[0].asked, len(blocks), replicates)
    return hashlib.sha256(repr(words).encode()).hexdigest()


def within(measured: Measured | float, floor: Floor) -> bool:
    """Is the value one that a perfect sampler could have got? Better than that is not perfect either."""
    value = measured.value if isinstance(measured, Measured) else measured
    return floor.low <= value <= floor.high


class Recommendation(NamedTuple):
    """n samples in all tell a sampler that is ``worse`` from a perfect one; None where no n up to ``most`` does."""

    n: int | None
    worse: float
    blocks: int
    effect: float
    sd: float
    reason: str


def recommend(
    metric: Metric, problem: Problem, worse: float = 0.05, blocks: int = 4, most: int = 1 << 17, replicates: int = 16
) -> Recommendation:
    """How many samples the metric needs on this problem to tell a sampler that is ``worse`` from a perfect one.

    Both are measured, in ``replicates`` small experiments on the same draws, at n = 16 B, 32 B, ... until the difference of
    their means is what 99 % of such comparisons would see: beyond the floor's limit by another 2.33 deviations, and a tenth.
    """
    reason = metric.available(problem) or floor_missing(metric, problem)
    if reason is not None:
        return Recommendation(None, worse, blocks, math.nan, math.nan, reason)
    known = metric.enough(problem, worse, blocks)
    blind = f"the {{}} samples a block that this metric looks at do not tell a sampler {100 * worse:g} % worse"
    if known is not None:
        asked = Block(known // blocks, 0)
        if 0 < metric.used(asked) < asked.asked:
            return Recommendation(None, worse, blocks, math.nan, math.nan, blind.format(metric.used(asked)))
        return Recommendation(known, worse, blocks, math.nan, math.nan, "")
    m, effect, sd, refused = 16, math.nan, math.nan, ""
    reason = f"a sampler {100 * worse:g} % worse is not told from a perfect one by {most} samples"
    while m * blocks <= most:
        try:
            good, bad = (_replicates(metric, problem, m, blocks, replicates, w) for w in (0.0, worse))
        except InputError as error:  # too few samples for this metric at all
            m, refused = 2 * m, str(error)
            continue
        limit = _floor(metric, good, m, blocks)
        sd = max(limit.sd, _floor(metric, bad, m, blocks).sd)
        effect = float(bad.mean() - good.mean())
        above = effect > 0.0
        worse_seen = metric.two_sided or above == metric.lower_is_better  # else it looks better than perfect
        if worse_seen and abs(effect) > 1.1 * ((limit.high - limit.mean if above else limit.mean - limit.low) + 2.33 * sd):
            return Recommendation(m * blocks, worse, blocks, effect, sd, "")
        if metric.used(Block(2 * m, 0)) == metric.used(Block(m, 0)):
            reason = blind.format(metric.used(Block(m, 0)))
            break
        m *= 2
    return Recommendation(None, worse, blocks, effect, sd, refused if math.isnan(effect) else reason)


def enough(metric: Metric, problem: Problem, blocks: Sequence[Block]) -> dict[str, Any]:
    """``recommend`` for a row of these blocks: {"worse": 0.05, "n": how many, "why": why there is no n}.

    n is looked for up to four times the samples that there are; 0 means that the metric has no sampling noise at all.
    """
    found = recommend(metric, problem, WORSE, len(blocks), 4 * sum(b.asked for b in blocks))
    return {"worse": found.worse, "n": found.n, "why": found.reason}


def _replicates(metric: Metric, problem: Problem, m: int, blocks: int, replicates: int, worse: float) -> Tensor:
    """Values of R independent experiments: of one block each, or of all n samples where the metric is pooled."""
    values = []
    for r in range(replicates):
        if metric.pooled:
            block = perfect([metric], problem, SEEDS + r, m * blocks, worse)
        else:
            block = perfect([metric], problem, SEEDS + r, m, worse)
        values.append(metric.value(problem, block))
    found = torch.tensor(values, dtype=torch.float64)
    if not bool(found.isfinite().all()):
        raise ToolkitError(f"{metric.name} on {problem.name}: a perfect sampler's value is not finite")
    return found


def _floor(metric: Metric, values: Tensor, m: int, blocks: int) -> Floor:
    """The floor of a row from replicates of one block, or of all samples where pooled."""
    count = len(values)
    sd = max(float(values.std()), metric.grain(m * blocks if metric.pooled else m))
    skew = float(((values - values.mean()) / sd).pow(3).mean()) if sd else 0.0
    if metric.pooled:
        found = floor_of(float(values.mean()), sd, count, 1.0 + 1.0 / count, skew)
    else:
        found = floor_of(float(values.mean()), sd / math.sqrt(blocks), count, 1.0 + blocks / count, skew / math.sqrt(blocks))
    return replace(found, low=max(metric.least, found.low), high=min(metric.most, found.high))
