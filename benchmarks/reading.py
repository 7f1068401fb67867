"""What rows of results say: lines, budgets, who won at which and who ties, slopes; how numbers are written.

A row is a line of ``results.jsonl`` (``rows.py`` says what is in it). A *line* is a sampler on a grid, a *series* the rows of
one model and one metric. Nothing here computes a metric, and nothing is said that noise could have said (``differences``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path as File
from typing import Any, NamedTuple

from sde.errors import ResultsError

from . import files, store
from .differences import Row, badness, discoveries, doubt, reach

Line = tuple[str, str]


class Series(NamedTuple):
    """The rows of one model and one metric that are about a sampler and have a value."""

    model: str
    metric: str
    rows: list[Row]

    @property
    def budgets(self) -> list[int]:
        return sorted({r["budget"] for r in self.rows})

    @property
    def lines(self) -> list[Line]:
        return list(dict.fromkeys(map(line, self.rows)))

    def of(self, which: Line) -> list[Row]:
        """A line's rows by their network calls, one each: of two budgets that bought the same calls the first."""
        found = {r["nfe"]: r for r in reversed([r for r in self.rows if line(r) == which])}
        return [found[nfe] for nfe in sorted(found)]


def line(row: Row) -> Line:
    return row["solver"], row["grid"] or ""


def series(rows: Iterable[Row]) -> list[Series]:
    """In the order of the rows."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["solver"] is not None and row["value"] is not None and row["nfe"]:
            found.setdefault((row["model"], row["metric"]), []).append(row)
    return [Series(model, metric, of) for (model, metric), of in found.items()]


def names(lines: Iterable[Line]) -> dict[Line, str]:
    """What to call lines: by the sampler, and by the grid too where a sampler runs on several, or all do not share one."""
    lines = list(dict.fromkeys(lines))
    alone = len(lines) == len({solver for solver, _ in lines})
    return {(s, g): s if alone or not g else f"{s} · {g}" for s, g in lines}


# --- rows that can be trusted to have the shape of rows -----------------------------------------------------------------------


def results(path: File) -> store.Results:
    """The results in a folder of ``run``, finished or not, in one of ``quick``, or in a ``results.jsonl`` alone. What has not
    the shape of a row is counted as damaged: a file may come from anywhere. ResultsError: there is nothing to read.
    """
    place, shown = path.resolve(), files.show(path)
    if files.is_folder(place) and files.exists(place / store.SWEEP):
        found = store.read(place)
    else:
        data = files.read(place / store.RESULTS if files.is_folder(place) else place)
        if data is None:
            raise ResultsError(f"{shown}: holds no results; give the --out of python -m benchmarks run")
        rows, damaged = files.unseal_lines(data)
        if not rows:
            raise ResultsError(f"{shown}: no line of it is a row of results")
        found = store.Results(rows, [], {}, damaged, [])
    good = [row for row in found.rows if _sound(row)]
    return found._replace(rows=good, damaged=found.damaged + len(found.rows) - len(good))


def _sound(row: Row) -> bool:
    ends, values = row.get("interval"), row.get("values")
    return (
        all(isinstance(row.get(k), str) for k in ("model", "metric"))
        and all(row.get(k) is None or isinstance(row[k], str) for k in ("solver", "grid", "digest", "note", "unit"))
        and all(row.get(k) is None or _count(row[k]) for k in ("nfe", "budget"))
        and all(k in row for k in ("solver", "grid", "nfe", "budget", "value", "floor", "interval"))
        and (row["solver"] is None or row["budget"] is not None)
        and _count(row.get("n"))
        and isinstance(row.get("seeds"), list)
        and all(isinstance(seed, int) for seed in row["seeds"])
        and (row["value"] is None or _finite(row["value"]))
        and (row["floor"] is None or _floor(row["floor"]))
        and (ends is None or (isinstance(ends, list) and len(ends) == 2 and _ends(ends)))
        and (values is None or (isinstance(values, list) and _ends(values)))
        and (row.get("enough") is None or _enough(row["enough"]))
        and (row.get("cost") is None or isinstance(row["cost"], dict))
    )


def _floor(floor: object) -> bool:
    return isinstance(floor, dict) and _finite(floor.get("mean")) and _ends([floor.get("low"), floor.get("high")])


def _enough(enough: object) -> bool:
    return (
        isinstance(enough, dict)
        and _finite(enough.get("worse"))
        and isinstance(enough.get("why"), str)
        and (enough.get("n") in (None, 0) or _count(enough["n"]))
    )


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 53


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)


def _ends(values: Sequence[object]) -> bool:
    return all(v is None or _finite(v) for v in values)


# --- who won ----------------------------------------------------------------------------------------------------------------


class Win(NamedTuple):
    """At one budget: the best row, those not told apart from it, best first, and how many ran."""

    best: Row
    tied: list[Row]
    ran: int

    @property
    def at_floor(self) -> bool:
        return bool(self.best.get("within_floor"))


def won(of: Series, budget: int) -> Win | None:
    """Who was best among those who had this budget and kept to it, and who is not told apart from it: of all that are told
    apart, 5 % are expected to be so by chance (``differences.discoveries``).
    """
    rows = sorted((r for r in of.rows if r["budget"] == budget and r["nfe"] <= budget), key=badness)
    if not rows:
        return None
    best, others = rows[0], rows[1:]
    apart = discoveries([doubt(best, r) for r in others])
    return Win(best, [r for r, worse in zip(others, apart, strict=True) if not worse], len(rows))


def words(win: Win | None, called: Mapping[Line, str], most: int = 3) -> str:
    """A cell of the table of winners: unipc_3 0.114;  ddim = heun 0.2;  5 of 8 at floor."""
    if win is None:
        return ""
    level = [win.best, *win.tied]
    if len(level) > most:
        return f"{len(level)} of {win.ran} {'at floor' if win.at_floor else 'tie'}, {number(win.best['value'])}"
    shown = " = ".join(called[line(r)] for r in level)
    return f"{shown} {number(win.best['value'])}{' at floor' if win.at_floor else ''}"


# --- slopes -----------------------------------------------------------------------------------------------------------------


class Slope(NamedTuple):
    """d log value / d log NFE between two rows, and half of its 95 % interval (None where a row has no interval)."""

    start: int
    end: int
    value: float
    reach: float | None


def slopes(rows: Sequence[Row]) -> list[Slope]:
    """Between neighbouring rows of one line that both stand clear of the floor."""
    found = []
    for a, b in pairwise(rows):
        if any(r.get("within_floor") or r["value"] <= 0.0 for r in (a, b)) or a["nfe"] >= b["nfe"]:
            continue
        run = math.log(b["nfe"] / a["nfe"])
        parts = [_relative(r) for r in (a, b)]
        half = None if None in parts else math.hypot(*(p for p in parts if p is not None)) / run
        found.append(Slope(a["nfe"], b["nfe"], math.log(b["value"] / a["value"]) / run, half))
    return found


def is_error(metric: str) -> bool:
    """Whether its slope is a sampler's order: the strong errors."""
    return metric.startswith("strong_error")


def _relative(row: Row) -> float | None:
    """Half of a row's interval, as a part of its value."""
    half = reach(row)
    return None if half is None else half / row["value"]


# --- numbers ----------------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """0.154, 0.0356, 1.2e-4, 2.5e3: short, and six characters, seven below 1e-9; a minus sign more where there is one."""
    if value is None:
        return ""
    if value < 0.0:
        return f"-{number(-value, digits)}"
    if value == 0.0:
        return "0"
    if not 1e-3 <= value < 999.5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    places = max(0, min(digits + 1, digits - 1 - math.floor(math.log10(value))))
    return f"{value:.{places}f}"[:6]


def between(row: Mapping[str, Any]) -> str:
    """A row's interval: [0.11, 0.124]; empty where it has none, or no width."""
    ends = row.get("interval")
    if not ends or ends[0] == ends[1]:
        return ""
    low, high = ("?" if end is None else number(end) for end in ends)
    return f"[{low}, {high}]"
