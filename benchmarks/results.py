"""What a comparison of samplers measured: one row a run, one outcome a problem, and how its numbers are read and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .metrics import Level


@dataclass(frozen=True)
class Row:
    """One run: a line of results.jsonl."""

    problem: str
    solver: str
    grid: str
    budget: int
    nfe: int | None
    steps: int | None
    error: float | None
    reference_error: float
    slope: float | None
    sliced_w2: float | None
    sliced_w2_sd: float | None
    floor: float
    floor_sd: float
    within_floor: bool
    seconds: float | None
    seed: int
    n: int
    blocks: int
    device: str
    versions: dict[str, str]
    note: str = ""


@dataclass
class Outcome:
    """Everything measured on one problem."""

    name: str
    title: str
    note: str
    floor: Level
    reference_error: float
    reference_nfe: int
    reference_w2: Level
    rows: list[Row] = field(default_factory=list)
    kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def best(self, budget: int, key: str) -> Row | None:
        """The row with the least ``key`` that spent at most ``budget`` calls."""
        rows = [r for r in self.rows if getattr(r, key) is not None and r.nfe is not None and r.nfe <= budget]
        return min(rows, key=lambda r: getattr(r, key), default=None)

    def of(self, solver: str) -> list[Row]:
        return [r for r in self.rows if r.solver == solver]


def slope(before: Row | None, nfe: int, error: float | None, trusted: float) -> float | None:
    """d log error / d log NFE from the run before, where both errors stand clear of the reference's own."""
    if before is None or before.error is None or before.nfe in (None, nfe) or error is None:
        return None
    if min(error, before.error) <= 3.0 * trusted or before.nfe is None:
        return None
    return math.log(error / before.error) / math.log(nfe / before.nfe)


def number(value: float | None, digits: int = 3) -> str:
    """0.154, 0.0356, 1.2e-4, 2.5e3: short, and six characters, seven below 1e-9."""
    if value is None:
        return ""
    if value == 0.0:
        return "0"
    if not 1e-3 <= abs(value) < 1e3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    places = max(0, min(digits + 1, digits - 1 - math.floor(math.log10(abs(value)))))
    return f"{value:.{places}f}"[:6]


def last_slope(rows: Sequence[Row]) -> float | None:
    """The slope at the largest budget that has one."""
    return next((r.slope for r in reversed(rows) if r.slope is not None), None)


def milestones(budgets: Sequence[int]) -> list[int]:
    """The budgets that the summary speaks of."""
    usual = [b for b in budgets if b in (8, 16, 32)]
    return usual if len(usual) > 1 else list(budgets[-3:])


def winner(outcome: Outcome, budget: int) -> str:
    """Who has the least strong error at this budget; empty where no sampler of the flow ran."""
    row = outcome.best(budget, "error")
    return "" if row is None else f"{row.solver} {number(row.error)}"


def closest(outcome: Outcome, budget: int) -> str:
    """Who is closest to true data at this budget. Within the floor there is no order: who is there is named or counted."""
    rows = [r for r in outcome.rows if r.budget == budget and r.sliced_w2 is not None]
    level = [r.solver for r in rows if r.within_floor]
    if len(level) > 2:
        return f"{len(level)} of {len(rows)} at floor"
    if level:
        return f"{' and '.join(level)} at floor"
    row = outcome.best(budget, "sliced_w2")
    return "" if row is None else f"{row.solver} {number(row.sliced_w2)}"
