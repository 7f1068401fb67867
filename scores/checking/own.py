"""Without data: does a wiring agree with itself?

A network under the right wiring makes samples of the law it was trained on, and denoises those as well as any affine map of
its output can, and better than a linear filter. So each wiring makes samples, and is judged on them as if they were data.
That alone is not enough: a wiring that makes nearly nothing of its input agrees with itself, too. So far out, where x / alpha
is r eps whatever the data are, x0-hat must also be small beside r, and must not fall as x / alpha rises: its slope is
tr Cov[x0 | x] / (d r^2) in the mean, by Stein's lemma. Of all that agree with themselves, the right wiring knows most of its
samples: it has the least error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde.errors import ToolkitError

from .bench import BOTTOM, TOP, Bench
from .levels import Level, Verdict, at_ratios, coefficients, judge, reach, whole
from .search import fits
from .wirings import Reading, Wiring, level_labels, scalings, unit_labels

FAR = (TOP, 10.0)  # sigma / alpha of the outer levels
STEPS = 12  # of the sampler
ALIKE = 0.3  # differences of the sum over levels of log errors that leave two explanations as good as each other
KNOWS = 0.3  # by how much the sum over levels of log errors must be below a linear filter's


@dataclass(frozen=True, eq=False)
class Own:
    """A wiring on its own samples."""

    wiring: Wiring
    reading: Reading
    x0: Tensor
    levels: Sequence[Level]
    verdict: Verdict

    @property
    def parts(self) -> int:
        return len(self.wiring.changes) + (self.reading.name != "given" or self.reading.negated)

    @property
    def agrees(self) -> bool:
        return fits(self.verdict, len(self.x0))

    @property
    def knows(self) -> bool:
        """Does it know its samples better than a linear filter, by what the network says?"""
        return self.agrees and self.verdict.matters and self.verdict.cost <= -KNOWS


def described(x: Tensor) -> str:
    wide = x.double()
    numbers = (float(v) for v in (wide.mean(), wide.std(), wide.min(), wide.max()))
    return "mean {:.2g}, deviation {:.2g}, in [{:.2g}, {:.2g}]".format(*numbers)


def own(bench: Bench, w: Wiring, reading: Reading) -> Own | None:
    """The wiring on its own samples; None where it makes none that can be."""
    if not plausible(bench, w, [reading]):
        return None
    x0 = bench.samples(w, reading, STEPS)
    if x0 is None or not 2.0 * max(BOTTOM, reach(w.path)[0]) < float((x0 - x0.mean(0)).double().std()) < TOP:
        return None
    levels = bench.look(w, x0)
    verdict = judge(levels, [reading])[0] if levels else None
    return None if levels is None or verdict is None else Own(w, reading, x0, levels, verdict)


def plausible(bench: Bench, w: Wiring, readings: Sequence[Reading]) -> list[Reading]:
    """Those whose x0-hat is, far out, small beside x / alpha, and does not fall where that rises."""
    most = reach(w.path)[1]
    logs = torch.tensor([math.log(min(r, most)) for r in FAR], dtype=torch.float64)
    try:
        knots = [w.path.knot(whole(w, t)) for t in at_ratios(w.path, logs)]
        inputs = [(k.sigma / k.alpha) * bench.normal(101 + i) for i, k in enumerate(knots)]
        outputs = bench.answers(w, knots, [k.alpha * u for k, u in zip(knots, inputs, strict=True)])
    except ToolkitError:
        return []
    good = list(readings)
    for knot, u, y in zip(knots, inputs, outputs, strict=True):
        u, y = ((v - v.mean(0)).double() for v in (u, y))
        uu, uy, yy = float((u * u).mean()), float((u * y).mean()), float((y * y).mean())
        good = [r for r in good if _small(*coefficients(r, knot), knot.sigma / knot.alpha, uu, uy, yy)]
    return good


def _small(p: float, q: float, ratio: float, uu: float, uy: float, yy: float) -> bool:
    size = math.sqrt(max(p * p * uu + 2.0 * p * q * uy + q * q * yy, 0.0) / uu)
    return size < 0.35 + 3.0 / ratio and p + q * uy / uu > -0.03


def most_knowing(bench: Bench, base: Wiring, known: Sequence[Reading], classes: Sequence[Wiring]) -> Own | None:
    """Of the hypotheses that agree with themselves, the simplest of those that know most of their samples."""
    found: list[tuple[int, int, float, Own]] = []
    for rank, group in enumerate(_hypotheses(base, known, classes)):
        for w, tried in group:
            for reading in plausible(bench, w, tried):
                mine = own(bench, w, reading)
                if mine is not None and mine.knows:
                    found.append((mine.parts, rank, mine.verdict.cost, mine))
    least = min((cost for _, _, cost, _ in found), default=0.0)
    best = [f for f in found if f[2] <= least + ALIKE]
    return min(best, key=lambda f: f[:3])[3] if best else None


def _hypotheses(
    base: Wiring, known: Sequence[Reading], classes: Sequence[Wiring]
) -> Iterator[list[tuple[Wiring, Sequence[Reading]]]]:
    """One change at a time, the likelier first; but a label may come with a sign, and the scaling of F with its sigma_data."""
    yield [(base, known[1:])]
    yield [(w, known[:2]) for w in unit_labels(base)]
    yield [(w, known[:1]) for w in (*classes, *level_labels(base))]
    spreads = {r.spread: r for r in known if r.name == "F" and not r.negated}
    yield [(w, [known[0], r]) for spread, r in spreads.items() for w in scalings(base, [spread])]
