"""The chart of a page, as data: the page's own script draws it.

Why not with altair. Measured with altair 5 and vl-convert 1.9: a page of one chart is 0.91 MB of script before any row; the
packages are 131 MB; under a content policy that forbids ``eval``, as a page with other people's names in it should have, vega
draws nothing; and its colours do not follow a dark page. The script here is 0.02 MB, needs nothing installed, draws at the
width of the screen it is on, and its hash is in the page's policy, so that no other script can run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..differences import Row, badness
from ..reading import Series, line, names, series
from .study import Study

LINEAR = {"precision", "recall", "density", "coverage", "nll", "nll_model"}


def chart(study: Study) -> dict[str, Any]:
    """Series by series: what there is to draw. Lines are numbered over the whole page, so that each keeps its look."""
    found = series(study.rows)
    lines = list(dict.fromkeys(line(r) for s in found for r in s.rows))
    called = names(lines)
    solvers, grids = (list(dict.fromkeys(part)) for part in zip(*lines, strict=True)) if lines else ([], [])
    looks = []
    for solver, grid in lines:
        colour, dash = solvers.index(solver), grids.index(grid) if len(lines) > len(solvers) else solvers.index(solver) // 7
        if len(solvers) == 1:  # one sampler on many grids
            colour, dash = grids.index(grid), grids.index(grid) // 7
        looks.append({"name": called[solver, grid], "colour": colour, "dash": dash})
    return {
        "models": {m: " ".join(f"{part.rstrip('.')}." for part in words if part) for m, words in study.told.items()},
        "lines": looks,
        "series": [_series(s, lines) for s in found],
    }


def _series(of: Series, lines: Sequence[tuple[str, str]]) -> dict[str, Any]:
    first = of.rows[0]
    return {
        "model": of.model,
        "metric": of.metric,
        "unit": first.get("unit") or "",
        "lower": bool(first.get("lower_is_better", True)),
        "two_sided": bool(first.get("two_sided")),
        "log": is_log(of),
        "floor": floor(of.rows),
        "enough": enough(of.rows),
        "lines": [{"id": lines.index(which), "points": [_point(r) for r in of.of(which)]} for which in of.lines],
    }


def _point(row: Row) -> dict[str, Any]:
    low, high = row.get("interval") or (None, None)
    return {
        "x": row["nfe"],
        "budget": row["budget"],
        "y": row["value"],
        "lo": low,
        "hi": high,
        "n": row["n"],
        "inside": bool(row.get("within_floor")),
        "bad": badness(row),
    }


def is_log(of: Series) -> bool:
    """Distances on a log axis; shares, and what may be of any sign, on a linear one."""
    first = of.rows[0]
    if of.metric.partition(":")[0] in LINEAR or first.get("two_sided") or not first.get("lower_is_better", True):
        return False
    return 2 * sum(r["value"] > 0.0 for r in of.rows) > len(of.rows)


def floor(rows: Sequence[Row]) -> dict[str, float | None] | None:
    """The floor of a series; where rows have floors of their own, from the lowest to the highest."""
    found = [r["floor"] for r in rows if r.get("floor")]
    if not found:
        return None
    lows, highs = ([f[k] for f in found] for k in ("low", "high"))
    return {
        "mean": sorted(f["mean"] for f in found)[len(found) // 2],
        "low": None if None in lows else min(lows),
        "high": None if None in highs else max(highs),
    }


def enough(rows: Sequence[Row]) -> str:
    """How many samples it takes to see a difference, in words."""
    for found in (row["enough"] for row in rows if row.get("enough")):
        worse = f"a sampler {100 * found['worse']:g} % worse"
        if found["n"]:
            return f"{found['n']:,} samples tell {worse} from a perfect one."
        return f"{found['why'][:1].upper()}{found['why'][1:]}." if found["why"] else f"No sampling noise hides {worse}."
    return ""
