"""What ``quick`` measured: the rows of one problem, and what its page and its pictures need beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .differences import badness
from .metrics import Floor
from .reading import Series, line, series

ERROR, DISTANCE = "strong_error", "sliced_w2"


@dataclass
class Outcome:
    """Everything measured on one problem.

    rows       as of ``run``, two a run: the strong error and the distance to true data
    floors     by metric; that of the strong error is how far the end points are to be trusted
    reference  calls of the exact flow's own run, and how far from true data its end points are
    kept       (solver, budget) -> some of the samples
    """

    name: str
    title: str
    note: str
    floors: dict[str, Floor]
    reference: tuple[int, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def series(self, metric: str) -> Series:
        """The rows of a metric that have a value; empty at first."""
        found = series(r for r in self.rows if r["metric"] == metric)
        return found[0] if found else Series(self.name, metric, [])

    def row(self, solver: str, budget: int, metric: str) -> dict[str, Any] | None:
        """The row of a run, once it is there."""
        wanted = (solver, budget, metric)
        return next((r for r in self.rows if (r["solver"], r["budget"], r["metric"]) == wanted), None)

    def of(self, solver: str, metric: str) -> list[Any]:
        """A sampler's rows that have a value, by their calls."""
        found = self.series(metric)
        return found.of(next((which for which in found.lines if which[0] == solver), (solver, "")))

    def ranked(self, budget: int, metric: str) -> list[str]:
        """Samplers from the best to the worst at a budget."""
        return [r["solver"] for r in sorted((r for r in self.series(metric).rows if r["budget"] == budget), key=badness)]

    def pace(self, solver: str) -> float | None:
        """Milliseconds a call, over all of a sampler's runs."""
        rows = [r for r in self.rows if r["solver"] == solver and r["metric"] == DISTANCE and r["cost"]]
        calls = sum(r["cost"]["calls"] for r in rows)
        return 1e3 * sum(r["cost"]["seconds"] for r in rows) / calls if calls else None


def milestones(budgets: Sequence[int]) -> list[int]:
    """The budgets that a summary speaks of."""
    usual = [b for b in budgets if b in (8, 16, 32)]
    return usual if len(usual) > 1 else list(budgets[-3:])


def called(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], str]:
    """Lines by their samplers alone: in ``quick`` each has one grid."""
    return {line(r): r["solver"] for o in outcomes for r in o.rows}
