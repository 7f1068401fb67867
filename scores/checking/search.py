"""Which wiring explains what was seen: every hypothesis of ``wirings``, judged on the same data.

The wiring as given is right as far as can be seen where no affine map of its output says more of x0. If one does, every
hypothesis is tried, the likelier groups first. A hypothesis is accused only if its error is markedly less (by ``CLEARLY`` in
the sum of log errors, and by five standard errors), if nearly all of what an affine map would save is saved, if it denoises as
well as simple denoisers do, and if it is the network that does so. Of those that do about as well, the simplest is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bench import Bench
from .levels import Bar, Level, Verdict, judge, times
from .wirings import SPREADS, Reading, Wiring, groups, readings

CLEARLY = 0.15  # by how much the sum over levels of log errors must fall, for an accusation
DEVIATIONS = 5.0  # ... in standard errors
SAVED = 0.3  # the share of the loss of the wiring as given that may remain
EXACT = 0.05  # an excess that is nothing
TIE = 0.1  # differences of the sum of log errors that mean nothing
SCREEN, FINALISTS = (1, 4), 3  # the levels at which all of a group are tried, and how many are tried at all


@dataclass(frozen=True, eq=False)
class Found:
    """A hypothesis, and how it does."""

    wiring: Wiring
    reading: Reading
    verdict: Verdict
    levels: Sequence[Level]

    @property
    def parts(self) -> int:
        return len(self.wiring.changes) + (self.reading.name != "given" or self.reading.negated)


def fits(v: Verdict, several: int, allowed: float = EXACT) -> bool:
    """Is the excess nothing at every level, up to the scatter of the samples and what three fitted numbers gain on them?"""
    return all(e <= allowed + 4.0 * n + 3.0 / several for e, n in zip(v.excess, v.noise, strict=True))


def denoises(v: Verdict, limits: Sequence[float]) -> bool:
    """At most levels where simple denoisers gain something, does it gain a good part of that?"""
    hard = [(e, b) for e, b in zip(v.error, limits, strict=True) if b < 0.8]
    return 2 * sum(1.0 - e < 0.4 * (1.0 - b) for e, b in hard) <= len(hard)


class Search:
    """Over all wirings of a network, for those that fit ``x0``."""

    def __init__(self, bench: Bench, base: Wiring, x0: Tensor, several: int, bar: Bar) -> None:
        self.bench, self.base, self.x0, self.several, self.bar = bench, base, x0, several, bar
        deviation = float(x0.double().std())
        self.spreads = sorted({*SPREADS, bench.score.sigma_data, round(deviation, 3)})
        self.known = readings(bench.score.row, self.spreads)
        self.levels = bench.look(base, x0)
        self.given = judge(self.levels, self.known[:1])[0] if self.levels else None

    def limits(self, levels: Sequence[Level], gain: float = 1.0) -> list[float]:
        return self.bar([level.ratio for level in levels], gain)

    @property
    def right(self) -> bool:
        """Is nothing to be said against the wiring as given?"""
        if self.given is None or self.levels is None:
            return False
        return fits(self.given, self.several) and denoises(self.given, self.limits(self.levels))

    def best(self, classes: Sequence[Wiring]) -> Found | None:
        """The hypothesis to accuse, or None. ``classes`` are those about conditions."""
        found = self._accepted(self.base, self.levels) if self.levels else []
        seen = {self._key(self.base)}
        for group in groups(self.base, self.spreads, classes):
            best = _simplest(found)
            if best is not None and best.parts <= 2 and fits(best.verdict, self.several):
                return best
            fresh = [w for w in group if self._new(w, seen)]
            for w in self._finalists(fresh):
                levels = self.bench.look(w, self.x0)
                if levels:
                    found += self._accepted(w, levels)
        return _simplest(found)

    def _finalists(self, group: Sequence[Wiring]) -> Iterator[Wiring]:
        """Those that do best at two levels."""
        screened: list[tuple[float, int]] = []
        for i, w in enumerate(group):
            levels = self.bench.look(w, self.x0, SCREEN)
            costs = [v.cost for v in judge(levels, self.known) if v is not None] if levels else []
            if costs:
                screened.append((min(costs), i))
        chosen = sorted(i for _, i in sorted(screened)[:FINALISTS])
        return (group[i] for i in chosen)

    def _accepted(self, w: Wiring, levels: Sequence[Level]) -> list[Found]:
        limits = self.limits(levels, w.gain)
        verdicts = zip(self.known, judge(levels, self.known), strict=True)
        return [Found(w, r, v, levels) for r, v in verdicts if v is not None and self._accusable(v, limits)]

    def _accusable(self, v: Verdict, limits: Sequence[float]) -> bool:
        short = sum(e > 1.15 * b + 0.05 for e, b in zip(v.error, limits, strict=True))
        if short > 1 or not v.matters or not fits(v, self.several, 4.0 * EXACT):
            return False
        if self.given is None:
            return True
        gain, scatter = v.gain(self.given)
        return gain >= max(CLEARLY, DEVIATIONS * scatter) and v.loss <= max(SAVED * self.given.loss, EXACT)

    def _new(self, w: Wiring, seen: set[object]) -> bool:
        """Is it not, in other words, a wiring that was tried?"""
        key = self._key(w)
        if key is None or key in seen:
            return False
        seen.add(key)
        return True

    def _key(self, w: Wiring) -> object:
        t = torch.tensor(times(w.path, float(self.x0.double().std())), dtype=torch.float64)
        scale = torch.ones_like(t) if w.scale is None else w.scale(t)
        columns = torch.cat([w.path.alpha(t), w.path.sigma(t), w.label(t).double(), scale])
        if not bool(columns.isfinite().all()):
            return None
        return (*(f"{v:.4g}" for v in columns.tolist()), w.gain, w.shift, *w.conditions)


def _simplest(found: Sequence[Found]) -> Found | None:
    """Of the explanations that are about as good as the best, the simplest; of several sigma_data, the one that fits best."""
    if not found:
        return None
    least = min(found, key=lambda f: f.verdict.cost)
    good = [f for f in found if f.verdict.cost <= least.verdict.cost + TIE or _within(f.verdict, least.verdict)]
    first = min(good, key=lambda f: f.parts)
    alike = [f for f in good if f.parts == first.parts and _kind(f) == _kind(first)]
    return min(alike, key=lambda f: f.verdict.cost)


def _within(v: Verdict, best: Verdict) -> bool:
    gain, scatter = best.gain(v)
    return gain <= 2.0 * scatter


def _kind(f: Found) -> object:
    """What is changed, but for numbers of sigma_data."""
    changes = {part: "" if part == "scale" else line for part, line in f.wiring.changes.items()}
    return tuple(changes.items()), f.reading.name, f.reading.negated


def improvement(given: Verdict | None, found: Verdict) -> str:
    """What the change does, in numbers."""
    after = ", ".join(f"{e:.2g}" for e in found.error)
    if given is None:
        return f"as wired, outputs are not finite; so changed, the squared error over a linear filter's is {after}"
    factor = math.exp((given.cost - found.cost) / len(found.error))
    before = ", ".join(f"{e:.2g}" for e in given.error)
    return f"so changed, the squared error falls {factor:.3g}-fold: over a linear filter's, from {before} to {after}"
