"""Rows of results as tables: CSV and Parquet for programs, LaTeX for papers.

COLUMNS says once what a row's columns are; CSV and Parquet have the same, one line a row of ``results.jsonl``:

    value, low, high          the number and its 95 % interval
    floor ... floor_high      what a perfect sampler gets, and where 99 % of perfect samplers lie
    seeds, values             of the blocks; in CSV joined by spaces
    samples_per_second ...    what it cost, medians over parts; empty where nothing was logged

The LaTeX is one booktabs table a model and metric: a line a sampler and grid, a column a budget.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sde.errors import InputError

from .differences import Row, reach
from .reading import series, won


class Column(NamedTuple):
    """A column: the type of its values ("str", "int", "float", "bool", or a list of them), and where they are in a row."""

    kind: str
    get: Callable[[Row], Any]


def _field(name: str, *inner: str) -> Callable[[Row], Any]:
    """row[name][inner]..., None where any of them is absent."""

    def get(row: Row) -> Any:
        value: Any = row.get(name)
        for key in inner:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return get


def _end(index: int) -> Callable[[Row], Any]:
    return lambda row: None if row.get("interval") is None else row["interval"][index]


def _words(name: str) -> Callable[[Row], Any]:
    """A mapping as JSON, so that it fits a column."""

    def get(row: Row) -> Any:
        value = row.get(name)
        return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)

    return get


COLUMNS: dict[str, Column] = {
    "model": Column("str", _field("model")),
    "solver": Column("str", _field("solver")),
    "grid": Column("str", _field("grid")),
    "budget": Column("int", _field("budget")),
    "nfe": Column("int", _field("nfe")),
    "net_evals": Column("int", _field("net_evals")),
    "steps": Column("int", _field("steps")),
    "metric": Column("str", _field("metric")),
    "unit": Column("str", _field("unit")),
    "value": Column("float", _field("value")),
    "low": Column("float", _end(0)),
    "high": Column("float", _end(1)),
    "floor": Column("float", _field("floor", "mean")),
    "floor_sd": Column("float", _field("floor", "sd")),
    "floor_low": Column("float", _field("floor", "low")),
    "floor_high": Column("float", _field("floor", "high")),
    "within_floor": Column("bool", _field("within_floor")),
    "enough": Column("int", _field("enough", "n")),
    "lower_is_better": Column("bool", _field("lower_is_better")),
    "n": Column("int", _field("n")),
    "blocks": Column("int", _field("blocks")),
    "seeds": Column("ints", _field("seeds")),
    "values": Column("floats", _field("values")),
    "digest": Column("str", _field("digest")),
    "path": Column("str", _field("path")),
    "start_law": Column("str", _field("start_law")),
    "start": Column("float", _field("start")),
    "stop": Column("float", _field("stop")),
    "eta": Column("float", _field("eta")),
    "dtype": Column("str", _field("dtype")),
    "device": Column("str", _field("device")),
    "versions": Column("str", _words("versions")),
    "git": Column("str", _words("git")),
    "config": Column("str", _field("config")),
    "weights": Column("str", _field("weights")),
    "samples_per_second": Column("float", _field("cost", "samples_per_second")),
    "seconds_per_call": Column("float", _field("cost", "seconds_per_call", "median")),
    "device_seconds_per_call": Column("float", _field("cost", "device_seconds_per_call", "median")),
    "overhead": Column("float", _field("cost", "overhead", "median")),
    "peak_memory": Column("int", _field("cost", "peak_memory")),
    "note": Column("str", _field("note")),
}


def to_csv(rows: Sequence[Row]) -> bytes:
    """RFC 4180 with line feeds, in UTF-8; numbers to all their digits, absent values empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow(_cell(column.get(row)) for column in COLUMNS.values())
    return text.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(map(_cell, value))
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def to_parquet(rows: Sequence[Row]) -> bytes:
    """The same columns, each with its type. InputError without pyarrow."""
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"parquet needs pyarrow: pip install pyarrow; or use --to csv ({error})") from None
    plain = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64(), "bool": pyarrow.bool_()}
    types = plain | {"ints": pyarrow.list_(plain["int"]), "floats": pyarrow.list_(plain["float"])}
    arrays = [pyarrow.array([_typed(c, c.get(row)) for row in rows], types[c.kind]) for c in COLUMNS.values()]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(arrays, names=list(COLUMNS)), sink)
    return sink.getvalue()


def _typed(column: Column, value: Any) -> Any:
    """A number of JSON as its column has it: 1 is a float too; and text that UTF-8 can hold."""
    if column.kind == "float" and value is not None:
        return float(value)
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


# --- LaTeX --------------------------------------------------------------------------------------------------------------------


def to_latex(rows: Sequence[Row]) -> bytes:
    r"""A table a model and metric. Value +- its distance to the farther end of its interval: the nearer end may be cut off at 0
    or 1, and half the width would be too small then. Bold: the best at its budget and its ties, as the report has them;
    \dagger: within the floor.
    """
    tables = dict.fromkeys((row["model"], row["metric"]) for row in rows)
    text = "% \\usepackage{booktabs}\n"
    for model, metric in tables:
        text += _table([row for row in rows if (row["model"], row["metric"]) == (model, metric)])
    return text.encode("utf-8", "backslashreplace")


def _table(rows: Sequence[Row]) -> str:
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None}) or [None]
    lines = dict.fromkeys((row["solver"], row["grid"]) for row in rows)
    by_cell = {(row["solver"], row["grid"], row["budget"]): row for row in rows}
    bold = {id(row) for of in series(rows) for b in of.budgets if (win := won(of, b)) for row in (win.best, *win.tied)}
    body = [["sampler", "grid", *("" if b is None else f"NFE {b}" for b in budgets)]]
    for solver, grid in lines:
        cells = [by_cell.get((solver, grid, b)) for b in budgets]
        entries = [_entry(row, id(row) in bold) for row in cells]
        body.append([escape(solver or "model"), escape(grid or ""), *entries])
    head, *rest = (" & ".join(words) + " \\\\" for words in body)
    return "\n".join(
        [
            "",
            "\\begin{table}",
            f"\\caption{{{_caption(rows)}}}",
            f"\\begin{{tabular}}{{ll{'r' * len(budgets)}}}",
            "\\toprule",
            head,
            "\\midrule",
            *rest,
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def _caption(rows: Sequence[Row]) -> str:
    """What is compared, on how many samples of which seeds, and what a perfect sampler gets."""
    first = rows[0]
    better = "two-sided" if first.get("two_sided") else "lower is better" if first["lower_is_better"] else "higher is better"
    better += ", as far as $\\dagger$" if any(row.get("floor") for row in rows) and not first.get("two_sided") else ""
    unit = f" [{escape(first['unit'])}]" if first.get("unit") else ""
    seeds = ", ".join(map(str, first["seeds"]))
    said = f"{escape(first['metric'])}{unit} on {escape(first['model'])} ({better}), $n = {first['n']}$, seeds {seeds}."
    floors = [row["floor"] for row in rows if row.get("floor")]
    if floors:
        low, high = (_span([floor[end] for floor in floors]) for end in ("low", "high"))
        said += f" $\\dagger$: from {low} to {high}, as 99 \\% of perfect samplers are."
    return said + " Bold: the best at its budget, and what is not told apart from it."


def _span(ends: Sequence[float | None]) -> str:
    """The one end that all floors share; where rows have floors of their own, from the lowest to the highest."""
    known = sorted(end for end in ends if end is not None)
    shown = dict.fromkeys(number(end, None) for end in (*known[:1], *known[-1:]))
    return "--".join(shown) or "?"


def _entry(row: Row | None, bold: bool) -> str:
    if row is None or row["value"] is None:
        return "--"
    shown = number(row["value"], reach(row))
    if bold:
        shown = f"$\\mathbf{{{shown[1:-1]}}}$"
    # {}: what is before the dagger may end in a superscript of its own
    return f"{shown[:-1]}{{}}^\\dagger$" if row.get("within_floor") else shown


def number(value: float, half: float | None) -> str:
    """$value \\pm half$ in mathematics, to two digits of ``half`` (to three of the value without one)."""
    size = max(abs(value), half or 0.0)
    power = math.floor(math.log10(size)) if size > 0.0 else 0
    scale = 0 if -4 < power < 4 else power
    least = half if half else abs(value) / 10.0 if value else 1.0
    digits = min(max(0, 1 - math.floor(math.log10(least)) + scale), 12)
    text = f"{value / 10.0**scale:.{digits}f}"
    if half:
        text += f" \\pm {half / 10.0**scale:.{digits}f}"
    if scale:
        text = f"({text}) \\cdot 10^{{{scale}}}" if half else f"{text} \\cdot 10^{{{scale}}}"
    return f"${text}$"


_ESCAPES = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"} | {c: f"\\{c}" for c in "&%$#_{}"}


def escape(text: str) -> str:
    """Text as LaTeX shows it, on one line."""
    return "".join(_ESCAPES.get(c, c) if c.isprintable() else " " for c in text)
