"""``python -m benchmarks compare A B``: what has changed from one folder of results to another, beyond noise.

Cells are matched by model, metric, sampler, grid and budget, and each pair gets one verdict:

    same     of equal samples and value; or both within their floors; or not told apart; or changed by less than ``--least``
    worse, better   told apart: of all cells that are, a share of ``--level`` is expected to be so by chance, and where nothing
                    has changed at all the chance of any is ``--level`` (Benjamini and Hochberg 1995 over all cells that were
                    tested; ``differences`` has the test of one)
    worse, too      had a value, and has none;  better, too: the other way round
    incomparable    not the same quantity: another path, another time where sampling stops, another unit

Equal seeds and n make a sharper comparison, for blocks are then compared in pairs.

Costs of a cell are told where the quartiles of its parts do not meet. That is a side note and no verdict: clocks are noisy, and
machines differ.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Annotated, Any, NamedTuple

import tyro

from sde.errors import InputError

from . import files
from .differences import Difference, Row, both_at_floor, difference, discoveries
from .reading import number, results
from .store import Results, cell_of

WORSE, BETTER, SAME, INCOMPARABLE = "worse", "better", "same", "incomparable"
EMPTY = "no value in either"

#: What two rows of one quantity agree in.
QUANTITY = ("path", "start_law", "start", "stop", "unit", "lower_is_better", "two_sided")

#: What a cell costs, as ``costs.jsonl`` has it with quartiles.
COSTS = {"seconds_per_call": "seconds a call", "device_seconds_per_call": "device seconds a call", "overhead": "overhead"}
PARTS = 4  # a quartile of fewer is not one

#: What else may be different in the configuration, and what follows from it.
CONFIGURATION = {
    "n": "what the floors of unequal n leave in doubt counts as no change",
    "seeds": "blocks are not compared in pairs, so small changes stay unseen",
    "blocks": "",
    "eta": "",
    "dtype": "",
    "weights": "another model, or its code has changed",
    "device": "",
    "git": "",
    "versions": "",
    **dict.fromkeys(QUANTITY[:4], "cells of unequal ones are not compared"),
}


@dataclass(frozen=True)
class Compare:
    """What has changed from A to B, beyond noise. Exit status 0: nothing is worse or missing in B; 1: something is."""

    a: Annotated[File, tyro.conf.Positional]
    """Folder of results before: of ``run`` or ``quick``, or a results.jsonl."""
    b: Annotated[File, tyro.conf.Positional]
    """Folder of results after."""
    level: float = 0.05
    """Share of the reported changes that chance may make up."""
    least: float = 0.001
    """A change of less than this share of the value is called the same, however sure it is."""
    json: bool = False
    """One JSON document in place of the text."""


class Change(NamedTuple):
    """What became of a cell. ``size``: how much worse, as a share of the larger value; negative where it is better."""

    a: Row
    b: Row
    verdict: str
    size: float
    p: float | None
    why: str


class Cost(NamedTuple):
    """Medians of what a cell (model, solver, grid, budget) cost, of which the quartiles do not meet."""

    cell: tuple[Any, ...]
    what: str
    a: float
    b: float


class Comparison(NamedTuple):
    """Changes from the worst to the best; rows of one side alone; what is different in the configuration, and in costs."""

    changes: list[Change]
    missing: list[Row]
    new: list[Row]
    configuration: list[dict[str, str]]
    costs: Sequence[Cost] = ()

    def of(self, verdict: str) -> list[Change]:
        return [c for c in self.changes if c.verdict == verdict]

    @property
    def status(self) -> int:
        lost = self.missing or self.of(WORSE) or self.of(INCOMPARABLE)
        return 1 if lost else 0


def run(options: Compare) -> int:
    """Say what has changed. 0: nothing is worse, 1: something is, or is missing."""
    for name, ends in (("level", (0.0, 0.5)), ("least", (0.0, 1.0))):
        value = getattr(options, name)
        if not ends[0] <= value < ends[1] or (name == "level" and value == 0.0):
            raise InputError(f"--{name} {value}: must be a share, such as {getattr(Compare, name)}")
    found = [results(path) for path in (options.a, options.b)]
    compared = compare(found[0].rows, found[1].rows, options.level, options.least)
    compared = compared._replace(costs=list(costs(found[0].costs, found[1].costs)))
    print(to_json(options, compared) if options.json else "\n".join(_text(options, compared, found)))
    return compared.status


# --- what has changed ---------------------------------------------------------------------------------------------------------


def compare(a: Iterable[Row], b: Iterable[Row], level: float = 0.05, least: float = 0.001) -> Comparison:
    """Rows before and after. InputError: no cell is in both."""
    before, after = ({_cell(row): row for row in rows} for rows in (a, b))
    both = [cell for cell in before if cell in after]
    if not both:
        models = " and ".join(", ".join(sorted({cell[0] for cell in side})[:3]) or "nothing" for side in (before, after))
        raise InputError(f"no cell is in both results ({files.show(models)}): compare runs of the same models and metrics")
    pairs = [(before[cell], after[cell]) for cell in both]
    known = [_without_test(row, then) for row, then in pairs]
    changes = [change for change in known if change is not None and change.why != EMPTY]
    tested = [pair for pair, change in zip(pairs, known, strict=True) if change is None]
    found = [difference(row, then) for row, then in tested]
    ps = [1.0 if both_at_floor(*pair) else d.p for pair, d in zip(tested, found, strict=True)]
    told = discoveries(ps, level)
    changes += [_tested(*pair, d._replace(p=p), sure, least) for pair, d, p, sure in zip(tested, found, ps, told, strict=True)]
    return Comparison(
        sorted(changes, key=lambda c: -c.size),
        [row for cell, row in before.items() if cell not in after and row["value"] is not None],
        [row for cell, row in after.items() if cell not in before and row["value"] is not None],
        list(_configuration(pairs)),
    )


def _cell(row: Row) -> tuple[Any, ...]:
    return row["model"], row["metric"], row["solver"], row["grid"], row["budget"]


def _without_test(a: Row, b: Row) -> Change | None:
    """The verdict where it does not depend on noise, else None."""
    had, has = a["value"] is not None, b["value"] is not None
    if not had and not has:
        return Change(a, b, SAME, 0.0, None, EMPTY)
    if had and not has:
        return Change(a, b, WORSE, math.inf, None, f"no value any more: {b.get('note') or 'no reason is given'}")
    if not had:
        return Change(a, b, BETTER, -math.inf, None, "has a value now")
    apart = [name for name in QUANTITY if a.get(name) != b.get(name)]
    if apart:
        said = "; ".join(f"{name} {a.get(name)} -> {b.get(name)}" for name in apart)
        return Change(a, b, INCOMPARABLE, 0.0, None, said)
    if a["value"] == b["value"] and a.get("digest") == b.get("digest") and a["n"] == b["n"]:
        return Change(a, b, SAME, 0.0, None, "identical")
    return None


def _tested(a: Row, b: Row, found: Difference, sure: bool, least: float) -> Change:
    """The verdict of two values, given whether they are told apart."""
    largest = max(abs(a["value"]), abs(b["value"]))
    size = found.worse / largest if largest else 0.0
    why = "both within the floor" if both_at_floor(a, b) else "not told apart"
    if sure:
        why = f"changed by less than {100 * least:g} %" if abs(size) <= least else ""
    return Change(a, b, SAME if why else WORSE if size > 0.0 else BETTER, size, found.p, why)


def _configuration(pairs: Sequence[tuple[Row, Row]]) -> Iterable[dict[str, str]]:
    """What the rows of both sides say differently of how they were made."""
    for name, follows in CONFIGURATION.items():
        sides = [dict.fromkeys(word for pair in pairs for word in _said(pair[side], name)) for side in (0, 1)]
        if set(sides[0]) != set(sides[1]):
            alone = [", ".join(w for w in mine if w not in other) or "-" for mine, other in (sides, sides[::-1])]
            yield {"what": name, "a": alone[0], "b": alone[1], "so": follows}


def _said(row: Row, name: str) -> list[str]:
    value = row.get(name)
    if name == "versions":
        return [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else []
    if name == "weights":
        return [f"{row['model']} {value}"]
    return [" ".join(map(str, value)) if isinstance(value, list) else str(value)]


def costs(a: Iterable[Mapping[str, Any]], b: Iterable[Mapping[str, Any]]) -> Iterable[Cost]:
    """Costs before and after that differ beyond their quartiles, cell by cell."""
    before = {cell_of(cost): cost for cost in a}
    for cost in b:
        for what in COSTS:
            old, new = _quartiles(before.get(cell_of(cost), {}), what), _quartiles(cost, what)
            if old and new and (old[2] < new[0] or new[2] < old[0]):
                yield Cost(cell_of(cost), what, old[1], new[1])


def _quartiles(cost: Mapping[str, Any], what: str) -> list[float] | None:
    """[low, median, high]; None where there are none, or of too few parts."""
    found, parts = cost.get(what), cost.get("parts")
    if not isinstance(found, dict) or not isinstance(parts, int) or parts < PARTS:
        return None
    values = [value for k in ("low", "median", "high") if isinstance(value := found.get(k), float)]
    return values if len(values) == 3 else None


# --- said ---------------------------------------------------------------------------------------------------------------------


def to_json(options: Compare, compared: Comparison) -> str:
    """Everything, as one JSON document."""

    def cell(row: Row) -> dict[str, Any]:
        return dict(zip(("model", "metric", "solver", "grid", "budget"), _cell(row), strict=True))

    def side(row: Row) -> dict[str, Any]:
        return {k: row.get(k) for k in ("value", "interval", "within_floor", "nfe", "n", "seeds", "digest")}

    found = {
        "a": str(options.a),
        "b": str(options.b),
        "level": options.level,
        "least": options.least,
        "status": compared.status,
        "counts": dict(Counter(c.verdict for c in compared.changes)),
        "configuration": compared.configuration,
        "cells": [
            {**cell(c.a), "verdict": c.verdict, "size": c.size, "p": c.p, "why": c.why, "a": side(c.a), "b": side(c.b)}
            for c in compared.changes
        ],
        "costs": [
            {**dict(zip(("model", "solver", "grid", "budget"), c.cell, strict=True)), "what": c.what, "a": c.a, "b": c.b}
            for c in compared.costs
        ],
        "missing": [cell(row) for row in compared.missing],
        "new": [cell(row) for row in compared.new],
    }
    return json.dumps(files.plain(found), indent=1, allow_nan=False)


def _text(options: Compare, compared: Comparison, found: Sequence[Results]) -> Iterable[str]:
    for name, path, side in zip("AB", (options.a, options.b), found, strict=True):
        yield f"{name}  {files.show(path)}: {len(side.rows)} rows"
        if side.missing:
            yield f"   not finished: {len(side.missing)} cells have no rows of the full n yet"
        if side.damaged:
            yield f"   {side.damaged} lines are damaged and left out"
    for entry in compared.configuration:
        so = f" ({entry['so']})" if entry["so"] else ""
        yield files.show(f"different {entry['what']}: {entry['a']} -> {entry['b']}{so}")
    for verdict in (WORSE, BETTER):
        changes = compared.of(verdict)[:: 1 if verdict == WORSE else -1]
        if changes:
            yield f"\n{verdict} in B: {len(changes)}"
            yield from _columns([_line(c) for c in changes])
    for title, rows in (
        ("incomparable", _together((c.a, c.why) for c in compared.of(INCOMPARABLE))),
        ("missing in B", _together((row, "") for row in compared.missing)),
        ("new in B", _together((row, "") for row in compared.new)),
    ):
        if rows:
            yield f"\n{title}:"
            yield from _columns(rows)
    why = Counter(c.why for c in compared.of(SAME))
    yield f"\nsame: {why.total()}{''.join(f', {count} {words}' for words, count in why.most_common())}"
    for what, words in COSTS.items():
        if ratios := [c.b / c.a if c.a else math.inf for c in compared.costs if c.what == what]:
            range_ = " to ".join(dict.fromkeys(number(r) or "0" for r in (min(ratios), max(ratios))))
            cells = f"{len(ratios)} cell{'s' * (len(ratios) > 1)}"
            yield f"costs, no verdict: {words} {range_} times as much in {cells}, beyond their quartiles"
    bad = {WORSE: compared.of(WORSE), "missing": compared.missing, INCOMPARABLE: compared.of(INCOMPARABLE)}
    words = ", ".join(f"{len(them)} {what}" for what, them in bad.items() if them)
    count = len(compared.changes) - len(bad[INCOMPARABLE])
    yield f"B against A: {words or 'nothing is worse'}; {count} cells compared."


def _together(rows: Iterable[tuple[Row, str]]) -> list[tuple[str, ...]]:
    """Rows, each with a word, as a line for all budgets of a sampler."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row, word in rows:
        *words, calls = _name(row)
        found.setdefault((*words, word), []).append(calls.removeprefix("NFE "))
    return [(*words, f"NFE {' '.join(calls)}" if all(calls) else "", word) for (*words, word), calls in found.items()]


def _name(row: Row) -> tuple[str, ...]:
    calls = "" if row["budget"] is None else f"NFE {row['budget']}"
    return row["model"], row["metric"], row["solver"] or "", row["grid"] or "", calls


def _line(change: Change) -> tuple[str, ...]:
    a, b = change.a, change.b
    if change.p is None:
        return *_name(a), f"{number(a['value']) or '-'} -> {number(b['value']) or '-'}", "", change.why
    grown = b["value"] / a["value"] - 1.0 if a["value"] else math.inf
    share = f"{100.0 * grown:+.3g} %" if abs(grown) < 10.0 else f"x {number(grown + 1.0)}"
    calls = "" if a["nfe"] == b["nfe"] else f"calls {a['nfe']} -> {b['nfe']}"
    return *_name(a), f"{number(a['value'])} -> {number(b['value'])}", share, f"p {number(change.p) or '0'} {calls}".rstrip()


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    shown = [[files.show(word) for word in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        yield "  " + "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
