"""Integer steps of a table, as released code takes them: diffusers' ``timestep_spacing``, ComfyUI's schedulers, SD-Turbo.

A ``Tabulated`` path has its own table of N entries, entry k at t = (k + 1)/N; on any other path the same rule is used on N =
``table`` entries at T (k + 1)/N. A rule (calls, N) lists the entries visited by that many network calls; the time after the
last call is ``stop``:

- ``stop=0.0`` is what DDIM, Euler and ComfyUI do: n calls at the listed entries, then sigma = 0.
- ``stop`` at the first entry (the default on a ``Tabulated`` path) is what diffusers' multistep classes do with
  ``final_sigmas_type="sigma_min"``: where a list of n would visit the first entry already, it is the list of n + 1 whose last
  is ``stop``.
- Above the first entry the table lies between ``stop`` and ``start``; ``start`` is its last entry.

A table with fewer entries than a rule asks for is refined by halving until all entries differ. So every grid has n steps, falls
strictly and starts at ``start``. Released lists do not always; where they do not is said below, and pinned in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sde.path import Path, Tabulated

from .grids_base import check, exact, falling, need

Array = NDArray[np.float64]
Rule = Callable[[int, int], NDArray[Any]]
"""(calls, table size) -> that many falling entries, from 0 to size - 1."""


def trailing(path: Path, n: int, start: float | None = None, stop: float | None = None, table: int = 1000) -> Tensor:
    """Entries round(N - i N/n) - 1: the last entry of each of n equal stretches (Lin et al. 2024; SDXL-Turbo, Lightning).

    diffusers writes arange(N, 0, -N/n), whose rounding gives one entry too many, index -1, for 62 of n = 1 ... 1000
    (61, 103, 121, ...): the sampler then evaluates the network at time -1.
    """
    return _listed(path, n, start, stop, table, lambda m, size: np.round(size - np.arange(m) * (size / m)) - 1.0)


def leading(
    path: Path,
    n: int,
    start: float | None = None,
    stop: float | None = None,
    table: int = 1000,
    offset: int = 0,
    *,
    published: bool = False,
) -> Tensor:
    """Entries i (N // n) + offset, i = n - 1 ... 0, the first of them replaced by the last entry of the table.

    As published (DDIM; Stable Diffusion with offset 1) it is not replaced: pure noise is given to the network as entry
    (n - 1) (N // n), a noise level below that of pure noise, whose mean the network then takes for signal (Lin et al. 2024).
    ``published=True`` starts there; at one step that is entry 0. ComfyUI's 'ddim_uniform' (``offset=1``) lists however many
    entries fit, 31 when asked for 30, 999 for 600.
    """
    need(isinstance(offset, int) and offset >= 0, "offset", offset, "must be an int >= 0: 0, or 1 for Stable Diffusion")

    def rule(m: int, size: int) -> NDArray[Any]:
        return np.arange(m - 1, -1, -1) * float(max(size // m, 1)) + offset

    return _listed(path, n, start, stop, table, rule, keep_start=published and start is None)


def linspace(path: Path, n: int, start: float | None = None, stop: float | None = None, table: int = 1000) -> Tensor:
    """n rounded entries from the last to the first, both included (Nichol & Dhariwal 2021). As released, one step is entry 0;
    here it is the last entry.
    """
    return _listed(path, n, start, stop, table, lambda m, size: np.linspace(0, size - 1, m).round()[::-1])


def normal(path: Path, n: int, start: float | None = None, stop: float | None = None, table: int = 1000) -> Tensor:
    """``linspace`` without rounding (k-diffusion's and ComfyUI's default, 'normal'; at one step the last entry)."""
    return _listed(path, n, start, stop, table, lambda m, size: np.linspace(size - 1, 0, m))


def sgm_uniform(path: Path, n: int, start: float | None = None, stop: float | None = None, table: int = 1000) -> Tensor:
    """The first n of n + 1 unrounded entries from the last to the first (ComfyUI's 'sgm_uniform', Stability's)."""
    return _listed(path, n, start, stop, table, lambda m, size: np.linspace(size - 1, 0, m + 1)[:-1])


def simple(path: Path, n: int, start: float | None = None, stop: float | None = None, table: int = 1000) -> Tensor:
    """Entries N - 1 - int(i N/n) (ComfyUI's 'simple'): ``trailing`` but for the rounding."""
    return _listed(path, n, start, stop, table, lambda m, size: size - 1.0 - np.floor(np.arange(m) * (size / m)))


def turbo(path: Path, n: int, start: float | None = None, stop: float | None = None, table: int = 1000) -> Tensor:
    """Every tenth of the table from the last entry down, n of them: 999, 899, ... (ComfyUI's 'SDTurboScheduler').

    The last call of few is far from data: 4 steps are 999, 899, 799, 699 and then ``stop``. Right for SD-Turbo, which jumps to
    data from anywhere; ``trailing`` spreads the same calls over the whole table. From 10 steps on both are the same.
    """
    return _listed(path, n, start, stop, table, lambda m, size: np.round(size - np.arange(m) * (size / max(m, 10))) - 1.0)


def beta(
    path: Path,
    n: int,
    start: float | None = None,
    stop: float | None = None,
    alpha: float = 0.6,
    beta: float = 0.6,
    table: int = 1000,
) -> Tensor:
    """Rounded entries at the quantiles 1 - i/n of Beta(alpha, beta): small steps at both ends (Lee et al. 2024, "Beta sampling
    is all you need"; ComfyUI's 'beta'; 'beta57' has 0.5 and 0.7).

    ComfyUI drops repeated entries, so that it takes fewer steps than asked for (from 139 on with a table of 1000;
    'beta57' from 97 on).
    """

    def rule(m: int, size: int) -> NDArray[Any]:
        return np.round((size - 1) * beta_quantiles(m, alpha, beta).numpy()[:0:-1])

    return _listed(path, n, start, stop, table, rule)


def _listed(
    path: Path, n: int, start: float | None, stop: float | None, table: int, rule: Rule, *, keep_start: bool = False
) -> Tensor:
    """The times of a rule's entries, then ``stop``."""
    check(path, n, start, stop)
    need(isinstance(table, int) and table >= 1, "table", table, "must be an int >= 1: the entries of the table, e.g. 1000")
    size = len(path.betas) if isinstance(path, Tabulated) else table
    high, last = (path.T if start is None else float(start)), (path.t_min if stop is None else float(stop))
    falling(high, last)

    def times_of(low: float, calls: int) -> Array:
        entries, entries_of = _distinct(rule, calls, size, keep_start)
        return low + (high - low) * ((entries[:n] + 1.0) / entries_of)

    below_first = [(0.0, n), (0.0, n + 1)] if last <= high / size else []
    times = next(t for t in (times_of(*way) for way in [*below_first, (last, n)]) if t[-1] > last)
    return exact(torch.tensor([*times, last], dtype=torch.float64), float(times[0]) if keep_start else high, last)


def _distinct(rule: Rule, calls: int, size: int, keep_start: bool) -> tuple[Array, int]:
    """(falling entries, size of their table): the table is refined until they are all different."""
    while True:
        entries = np.array(rule(calls, size), dtype=np.float64)
        if not keep_start:
            entries[0] = size - 1
        if entries[0] <= size - 1 and entries[-1] >= 0.0 and np.all(entries[1:] < entries[:-1]):
            return entries, size
        size *= 2


@lru_cache(maxsize=1024)
def beta_quantiles(n: int, alpha: float, beta: float) -> Tensor:
    """The quantiles 0, 1/n, ..., 1 of Beta(alpha, beta), by bisection of the regularised incomplete beta function."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        need(0.2 <= value <= 20.0, name, value, "must be in [0.2, 20]; 0.6 is published, 1 and 1 is uniform")
    share, low, high = np.linspace(0.0, 1.0, n + 1), np.zeros(n + 1), np.ones(n + 1)
    for _ in range(80):
        middle = 0.5 * (low + high)
        below = incomplete_beta(middle, alpha, beta) < share
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    out = 0.5 * (low + high)
    out[0], out[-1] = 0.0, 1.0
    if alpha == beta:  # the median of a symmetric law is 1/2 to the bit, and rounding to entries asks for no less
        out = np.where(share < 0.5, out, np.where(share > 0.5, 1.0 - out[::-1], 0.5))
    return torch.from_numpy(out)


def incomplete_beta(x: Array, a: float, b: float) -> Array:
    """The CDF of Beta(a, b): x^a (1 - x)^b / (a B(a, b)) sum_k x^k prod_{j < k} (a + b + j) / (a + 1 + j), below the
    mean; above it by symmetry. All terms are positive.
    """
    swap = x > (a + 1.0) / (a + b + 2.0)
    y, p, q = np.where(swap, 1.0 - x, x), np.where(swap, b, a), np.where(swap, a, b)
    k = np.arange(_TERMS)[:, None]
    series = 1.0 + np.cumprod(y * (a + b + k) / (p + 1.0 + k), axis=0).sum(axis=0)
    log_beta = float(torch.lgamma(torch.tensor([a, b, a + b], dtype=torch.float64)) @ torch.tensor([1.0, 1.0, -1.0]).double())
    with np.errstate(divide="ignore"):
        tail = np.exp(p * np.log(y) + q * np.log1p(-y) - log_beta) / p * series
    return np.where(swap, 1.0 - tail, tail)


_TERMS = 600  # the ratio of terms is at most about the mean, at worst 0.95 where a = 20 and b = 0.2
