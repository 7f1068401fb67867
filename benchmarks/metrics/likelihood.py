"""Negative log-likelihoods, in nats a dimension.

nll        of the samples under the exact density of a perfect sample: the mean of -log p_stop(x) / d. Both sides are bad: a
           sampler that keeps to the modes has it too low. Merged as moments of one number a sample.
nll_model  of data that the model has not seen, under the model's own density: the probability flow with an exact trace
           (``sde.log_likelihood``). A property of the score, whatever the sampler. Its floor is that of the exact density
           on the very same draws, and what separates the two is an estimate of KL(data || model).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from sde import log_likelihood
from sde.errors import InputError

from ..endpoints import End
from ..laws import Points
from ..problems import FIXED, Problem, for_states
from .base import Block, Metric, no_data
from .levels import Floor, t_quantile
from .statistics import Summary, pack


def surprise(problem: Problem, x: Tensor) -> Tensor:
    """-log p_stop(x) / d under the exact law, (B,)."""
    if problem.exact is None:
        raise InputError(f"the exact density of {problem.name} is not known")
    return -problem.exact.log_prob(x.double(), problem.stop) / problem.dim


@dataclass(frozen=True)
class Surprise:
    """Moments of -log p_stop(x) / d."""

    @property
    def name(self) -> str:
        return "nll"

    def measure(self, problem: Problem, x: Tensor, start: Tensor | None, end: End | None) -> Summary:
        return pack(self.name, surprise(problem, x)[:, None])


@dataclass(frozen=True)
class SampleNLL(Metric):
    """-log p_stop of the samples."""

    needs: ClassVar[str] = "statistics"
    unit: ClassVar[str] = "nats a dimension"
    two_sided: ClassVar[bool] = True
    least: ClassVar[float] = -math.inf

    @property
    def statistic(self) -> Surprise:
        return Surprise()

    def available(self, problem: Problem) -> str | None:
        return None if problem.exact is not None else f"the exact density of {problem.name} is not known"

    def value(self, problem: Problem, block: Block) -> float:
        return float(block.moments("nll").mean[0])


@dataclass(frozen=True)
class ModelNLL(Metric):
    """-log of the model's density of unseen data; ``tolerance`` of its flow; exact traces of at most ``largest`` dimensions."""

    tolerance: float = 1e-6
    largest: int = 1024

    needs: ClassVar[str] = "model"
    unit: ClassVar[str] = "nats a dimension"
    least: ClassVar[float] = -math.inf
    limit: ClassVar[int] = 256

    def available(self, problem: Problem) -> str | None:
        if problem.dim > self.largest:
            return f"{problem.name} has {problem.dim} dimensions: an exact trace of more than {self.largest} takes too long"
        return None if problem.held_out is not None else no_data(problem)

    def value(self, problem: Problem, block: Block) -> float:
        return float(model_surprise(self, problem, block.seed, self.used(block)).mean())

    def own_floor(self, problem: Problem, blocks: Sequence[Block]) -> Floor | None:
        """The exact density on the same draws; its reach is the spread of the paired differences, and the flow's tolerance."""
        if no_density(problem) is not None:
            return None
        law, sizes = cast(Any, problem.law), [(b.seed, self.used(b)) for b in blocks]
        model = torch.cat([model_surprise(self, problem, *size) for size in sizes])
        draws = torch.cat([problem.unseen(seed, range(count)) for seed, count in sizes])
        exact = -law.log_prob(draws, problem.stop) / problem.dim
        sd = float((model - exact).std()) / math.sqrt(len(exact))
        mean = float(exact.mean())
        reach = t_quantile(0.995, len(exact) - 1) * sd + 10.0 * self.tolerance
        return Floor(mean, sd, mean - reach, mean + reach, 0)

    def enough(self, problem: Problem, worse: float, blocks: int) -> int:
        """From the mean and spread of log p - log q over true draws, q the density of true draws whose deviations are too
        large: q(m + (1 + w)(x - m)) = p(x) / (1 + w)^d. The mean, KL(p || q), is far below the spread: what it is on Gaussian
        data is taken from Stein's identity, E (x - m) . grad log p = -d, and only the rest from the draws.
        """
        law, w = cast(Any, problem.law), worse
        x, mean = problem.truth(0, range(512), FIXED), problem.mean.reshape(problem.shape)
        log_p, log_q = (law.log_prob(z, problem.stop) for z in (x, mean + (x - mean) / (1.0 + w)))
        lost = log_p - log_q + problem.dim * math.log1p(w)
        stein = ((x - mean) * law(x, problem.stop)).flatten(1).sum(1) + problem.dim
        kl = float((lost - 0.5 * (1.0 - (1.0 + w) ** -2) * stein).mean())
        n = (1.1 * (t_quantile(0.995, 511) + 2.33) * float(lost.std()) / kl) ** 2
        return blocks * max(4, math.ceil(n / blocks))


def no_density(problem: Problem) -> str | None:
    """Why the exact density of data that the model has not seen is not known."""
    if problem.data is None or isinstance(problem.data, Points) or problem.held_out is not None:
        return f"the exact density of {problem.name} is not known, so what a perfect model would get is not known either"
    return None


@lru_cache(maxsize=64)
def model_surprise(metric: ModelNLL, problem: Problem, seed: int, count: int) -> Tensor:
    """-log of the model's density / d of ``count`` unseen draws of this seed, (count,) float64."""
    found = log_likelihood(
        for_states(problem.score(), torch.float64),
        problem.unseen(seed, range(count)),
        trace="exact",
        rtol=metric.tolerance,
        atol=metric.tolerance,
        limit=metric.largest,
        t_min=problem.stop,
        t_max=problem.start,
    )
    return -found.log_prob.double() / problem.dim
