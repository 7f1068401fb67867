"""What a metric is, and how a number with its interval comes of blocks of samples.

A sampler is measured on B disjoint blocks of m samples, each with a seed of its own; a block is compared with true draws of
the same seed. The value of a row is the mean over blocks, or, where a metric is biased in the number of samples (``pooled``),
its value on all n = B m samples together. Its 95 % interval is a t interval over blocks; pooled values use the jackknife that
leaves one block out (Efron and Stein 1981):  p_b = B v - (B - 1) v_without_b,  interval v +- t sd(p) / sqrt(B).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sde.errors import InputError

from ..endpoints import End
from ..problems import Problem
from .levels import Floor, t_quantile
from .statistics import Moments, Summary, merge, unpack

CHUNK = 1 << 18  # numbers at a time, of whole samples, at most 4096 of them; fixed, so that sums have the same bits everywhere


def chunks(count: int, d: int) -> Iterator[range]:
    """The indices of ``count`` samples of d numbers, so many at a time as take little memory."""
    step = max(1, min(4096, CHUNK // d))
    return (range(low, min(count, low + step)) for low in range(0, count, step))


class Samples(Protocol):
    """The samples of a block, in memory or not: how many, and some of them, (B, *shape). A tensor is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, span: slice, /) -> Tensor: ...


class Statistic(Protocol):
    """What a part keeps for a metric. Equal statistics are measured once."""

    @property
    def name(self) -> str: ...
    def measure(self, problem: Problem, x: Tensor, start: Tensor | None, end: End | None) -> Summary: ...


@dataclass(frozen=True)
class Block:
    """One block of samples as measured: how many were asked for, the seed, and the merged statistics or where samples are."""

    asked: int
    seed: int
    summary: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Samples | None = None

    def moments(self, name: str) -> Moments:
        """The moments of a statistic; refused where they are not of the samples asked for."""
        found = unpack(self.summary, name)
        self._check(found.count, name)
        return found

    def list(self, key: str) -> Tensor:
        """One number a sample."""
        if key not in self.summary:
            raise InputError(f"the summary holds {', '.join(sorted(self.summary)) or 'nothing'}: {key} was not measured")
        found = self.summary[key]
        self._check(len(found), key)
        return found

    def first(self, limit: int) -> Tensor:
        """The first ``limit`` samples, (n, d) float64."""
        return torch.cat(list(self.rows(limit)))

    def rows(self, limit: int) -> Iterator[Tensor]:
        """The same in ``chunks``: for metrics that look at so many samples that they should not be in memory at once."""
        if self.samples is None:
            raise InputError(f"the block of seed {self.seed} holds no samples: keep them for this metric")
        used = min(self.asked, limit)
        if not used <= len(self.samples) <= self.asked:
            self._check(len(self.samples), "samples")
        if used < 2:
            raise InputError(f"{used} samples: a distance between sets needs at least 2")
        for span in chunks(used, self.samples[:1].numel()):
            x = self.samples[span.start : span.stop].detach().double().reshape(len(span), -1)
            bad = ~x.isfinite().all(1)
            if bool(bad.any()):
                first = span.start + int(bad.nonzero()[0])
                raise InputError(f"samples are not finite in {int(bad.sum())} of {len(span)} (first: number {first})")
            yield x

    def _check(self, count: int, what: str) -> None:
        if count != self.asked:
            raise InputError(
                f"{what}: {count} samples where {self.asked} were asked for (seed {self.seed}): a metric of another number is "
                "another metric; make the missing ones, or ask for what there is"
            )


class Measured(NamedTuple):
    """A row's number: the value, its 95 % interval, how many samples it looked at, and the blocks' own values."""

    value: float
    low: float
    high: float
    n: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Metric(ABC):
    """A number that says how good samples are. Frozen; its repr says all that it depends on.

    needs            "statistics": mergeable summaries of parts; "samples": (the first ``limit``) samples of a block;
                     "model": the score alone, whatever the samples; "table": the sampler's table, exactly (``exact``)
    unit             of the value: "std" is the data's root mean standard deviation a dimension
    lower_is_better  or higher;  two_sided: nearest to the floor is best
    pooled           the value is of all samples together, not the mean over blocks
    flow_only        says something of samplers of the probability flow only
    sees             what it is sensitive to: "spread" (too large a one, and all else), a "narrow" one, or the "mean" alone
    wants_end        ``part`` uses the exact end points, if they are at hand
    least, most      the smallest and the largest possible value
    """

    name: str

    needs: ClassVar[str] = "samples"
    unit: ClassVar[str] = ""
    lower_is_better: ClassVar[bool] = True
    two_sided: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    flow_only: ClassVar[bool] = False
    wants_end: ClassVar[bool] = False
    sees: ClassVar[str] = "spread"
    least: ClassVar[float] = 0.0
    most: ClassVar[float] = math.inf
    limit: ClassVar[int] = 1 << 62

    @property
    def statistic(self) -> Statistic | None:
        """What parts keep; None for metrics that need no statistics."""
        return None

    @abstractmethod
    def available(self, problem: Problem) -> str | None:
        """None, or why the problem cannot be measured so."""

    def check(self, problem: Problem) -> None:
        """InputError for a file that the metric names and that is missing, cannot be read, or is of something else."""
        return

    def part(
        self, problem: Problem, x: Tensor, start: Tensor | None, indices: Sequence[int], end: End | None = None
    ) -> Summary:
        """The mergeable summary of one part: x (B, *shape) of these sample indices, from ``start`` (B, *shape)."""
        return summarise([self], problem, x, start, indices, end)

    @abstractmethod
    def value(self, problem: Problem, block: Block) -> float:
        """The number of one block. InputError for a block whose count is not the one asked for."""

    def own_floor(self, problem: Problem, blocks: Sequence[Block]) -> Floor | None:
        """The floor where it is known from these very blocks; None: it is measured on true draws (``floors.floor``)."""
        return None

    def enough(self, problem: Problem, worse: float, blocks: int) -> int | None:
        """The samples that ``floors.recommend`` would find, where they are known without trying; None: by trying."""
        return None

    def fewest(self, problem: Problem) -> int:
        """Samples that a value takes at the least, as far as the problem alone says."""
        return 1

    def used(self, block: Block) -> int:
        """How many samples of a block the value looks at."""
        return min(block.asked, self.limit)

    def grain(self, n: int) -> float:
        """The step between neighbouring values of n samples: no spread is known better than that."""
        return 0.0


def summarise(
    metrics: Iterable[Metric],
    problem: Problem,
    x: Tensor,
    start: Tensor | None,
    indices: Sequence[int],
    end: End | None = None,
) -> Summary:
    """The summaries of one part for several metrics, each statistic measured once."""
    check_part(problem, x, start, indices)
    summary: Summary = {}
    for statistic in dict.fromkeys(m.statistic for m in metrics if m.statistic is not None):
        summary |= statistic.measure(problem, x, start, end)
    return summary


def check_part(problem: Problem, x: Tensor, start: Tensor | None, indices: Sequence[int]) -> None:
    if len(x) != len(indices):
        raise InputError(f"{len(x)} samples for {len(indices)} indices: a part is complete or absent")
    for label, value in (("x", x), ("start", start)):
        if value is not None and (value[0:1].numel() != problem.dim * min(1, len(x)) or len(value) != len(x)):
            raise InputError(f"{label} has shape {tuple(value.shape)}: {problem.name} wants ({len(x)}, *{problem.shape})")
    bad = ~x.isfinite().reshape(len(x), -1).all(1)
    if bool(bad.any()):
        where = [indices[i] for i in bad.nonzero().flatten().tolist()]
        raise InputError(f"samples are not finite in {len(where)} of {len(x)} (first: number {where[0]})")


def pool(blocks: Sequence[Block]) -> Block:
    """The blocks as one."""
    return Block(sum(b.asked for b in blocks), blocks[0].seed, merge(b.summary for b in blocks))


def measure(metric: Metric, problem: Problem, blocks: Sequence[Block]) -> Measured:
    """The metric's value of these blocks, with its interval. At least 3 blocks of one size, of different seeds."""
    check_blocks(blocks)
    if refused := too_few(metric, problem, blocks):
        raise InputError(refused)
    count = len(blocks)
    used = sum(metric.used(b) for b in blocks)
    if metric.pooled:
        value = metric.value(problem, pool(blocks))
        values = [metric.value(problem, pool([*blocks[:i], *blocks[i + 1 :]])) for i in range(count)]
        spread = torch.tensor([count * value - (count - 1) * v for v in values], dtype=torch.float64).std()
    else:
        values = [metric.value(problem, b) for b in blocks]
        value = sum(values) / count
        spread = torch.tensor(values, dtype=torch.float64).std()
    reach = t_quantile(0.975, count - 1) * float(spread) / count**0.5
    return Measured(value, max(metric.least, value - reach), min(metric.most, value + reach), used, tuple(values))


def too_few(metric: Metric, problem: Problem, blocks: Sequence[Block]) -> str | None:
    """None, or why so many samples in so many blocks have no value with an interval, and how many would have."""
    m, count, fewest = blocks[0].asked, len(blocks), metric.fewest(problem)
    least = math.ceil(fewest / (count - 1)) if metric.pooled else fewest  # the jackknife leaves a block out
    if m >= least:
        return None
    left = f"without any one block leave {(count - 1) * m}" if metric.pooled else f"are {m} a block"
    return f"n = {count * m} in {count} blocks {left}, and {metric.name} takes {fewest}: give -n {count * least} or more"


def check_blocks(blocks: Sequence[Block]) -> None:
    if len(blocks) < 3:
        raise InputError(f"{len(blocks)} blocks: an interval wants at least 3 disjoint ones")
    sizes, seeds = {b.asked for b in blocks}, {b.seed for b in blocks}
    if len(sizes) > 1 or len(seeds) < len(blocks):
        raise InputError(f"blocks of {sorted(sizes)} samples and seeds {sorted(seeds)}: give blocks of one size, each its seed")


def no_data(problem: Problem) -> str | None:
    """Why there is nothing to compare with."""
    if problem.data is not None:
        return None
    return f"{problem.name} has no true data to compare with: let the model's function return (score, data)"
