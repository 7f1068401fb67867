"""The page: one file of HTML. No address outside, every word escaped, one script and one style, each known by its hash."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path as File
from typing import Any, NamedTuple

from .. import files
from ..differences import Row
from ..reading import Series, between, is_error, line, names, number, series, slopes, won, words
from .chart import chart
from .sheets import Sheet
from .study import Study

STYLE, SCRIPT = (File(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)

READING = """<h2>How to read this</h2><ul>
<li><b>NFE</b>: network calls on the batch, counted at the network. A sampler of two calls a step takes half the steps. A budget
that could not be spent in full is shown at the calls that were made.</li>
<li><b>Interval</b>: 95 %, from disjoint blocks of samples, each with a seed of its own.</li>
<li><b>Floor</b>: what a perfect sampler gets for the same number of samples. Two sets of true data are not at a distance of
zero; a value within the floor (✓, hollow marks) is not told from a perfect sampler's, and there is no order among those.</li>
<li><b>Ties</b>: samplers that start from the same noise are compared block by block. Those that are not told apart from the
best tie with it (=); of all that are told apart, 5 % are expected to be so by chance.</li>
<li><b>Strong error</b>: distance to where the exact flow ends from the same noise. It sees the sampler only; its slope against
NFE is minus the order that is seen at that budget. A stochastic sampler has no such end point.</li>
<li><b>Broad grey line</b>: the Pareto front, the best that so many calls bought.</li></ul>"""


SHEET = 150
"""Pixels of a screen that a sheet of samples is about as wide as."""


def text(value: object) -> str:
    """Any value as text of the page: markup escaped; control, format (bidirectional) and unpaired characters shown as codes."""
    shown = "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else f"\\u{ord(c):04x}"
        for c in str(value)
    )
    return html.escape(shown, quote=True)


def page(study: Study) -> str:
    """The whole report as one HTML file."""
    found = series(study.rows)
    called = names(line(r) for s in found for r in s.rows)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{text(study.title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{text(study.title)}</h1>",
        _summary(study),
        *(f'<p class="warn">{text(w)}</p>' for w in study.warnings),
        _chart(),
        _winners(found, called),
        _slopes(found, called),
        _samples(study),
        _rows(study.rows),
        READING,
        _facts(study),
        f'<script type="application/json" id="data">{_json(chart(study))}</script>',
        f"<script>{SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _json(value: Any) -> str:
    """JSON that no HTML parser takes for an end of the script. Invisible characters of names are codes, as in the rest."""

    def clean(v: Any) -> Any:
        if isinstance(v, str):
            return html.unescape(text(v))
        if isinstance(v, dict):
            return {clean(k): clean(x) for k, x in v.items()}
        return [clean(x) for x in v] if isinstance(v, list) else v

    made = json.dumps(clean(files.plain(value)), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return made.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _summary(study: Study) -> str:
    rows = [r for r in study.rows if r["solver"] is not None]
    count = {k: len({r[k] for r in rows}) for k in ("solver", "grid", "model", "budget", "metric")}

    def some(k: str, word: str) -> str:
        return f"{count[k]} {word}{'' if count[k] == 1 else 's'}"

    spent = "" if study.seconds is None else f" {study.seconds:.0f} s of sampling in all."
    return (
        f'<p class="quiet">{some("solver", "sampler")} on {some("grid", "grid")}, {some("model", "model")}, '
        f"{some('budget', 'budget')} of network calls, {some('metric', 'metric')}. "
        f"Every call was counted at the network.{spent}</p>"
    )


# --- tables -----------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A cell of a table: HTML, and where it is sorted by something else, that."""

    html: str
    key: float | None = None
    kind: str = ""


def _table(head: Sequence[tuple[str, str]], body: Iterable[Sequence[Cell]], caption: str = "", **attributes: str) -> str:
    """``head`` is (HTML, class) a column; a cell adds its own class. Attributes are of the table."""
    top = "".join(f'<th scope="col"{_class(kind)}>{cell}</th>' for cell, kind in head)
    kinds = [kind for _, kind in head]
    rows = "".join(f"<tr>{_cells(row, kinds)}</tr>" for row in body)
    title = f"<caption>{caption}</caption>" if caption else ""
    own = "".join(f' {k.rstrip("_")}="{v}"' for k, v in attributes.items())
    return f"<table{own}>{title}<thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>"


def _cells(row: Sequence[Cell], kinds: Sequence[str]) -> str:
    return "".join(f"<td{_class(k, c.kind)}{_key(c)}>{c.html}</td>" for c, k in zip(row, kinds, strict=True))


def _class(*kinds: str) -> str:
    found = " ".join(k for k in kinds if k)
    return f' class="{found}"' if found else ""


def _key(cell: Cell) -> str:
    return "" if cell.key is None else f' data-v="{cell.key!r}"'


def _scroll(table: str, kind: str = "scroll") -> str:
    return f'<div class="{kind}" tabindex="0">{table}</div>'


def _winners(found: Sequence[Series], called: dict[Any, str]) -> str:
    """Who won by each metric on each model at each budget."""
    if not found:
        return ""
    models, metrics = (list(dict.fromkeys(names)) for names in zip(*((s.model, s.metric) for s in found), strict=True))
    budgets = sorted({b for s in found for b in s.budgets})
    head = [("model", ""), ("metric", ""), *((f"NFE {b}", "") for b in budgets)]
    body = [
        [Cell(text(s.model)), Cell(f"{text(s.metric)} <small>{text(s.rows[0].get('unit') or '')}</small>"), *cells]
        for s in sorted(found, key=lambda s: (models.index(s.model), metrics.index(s.metric)))
        if (cells := [_winner(s, b, called) for b in budgets])
    ]
    lead = "=: a tie, not told apart by so many samples. Small, after a metric: the unit of its values."
    return f'<h2>What won</h2><p class="quiet">{lead}</p>{_scroll(_table(head, body))}'


def _winner(of: Series, budget: int, called: dict[Any, str]) -> Cell:
    win = won(of, budget)
    if win is None:
        return Cell("")
    tied = [win.best, *win.tied]
    shown = text(words(win, called))
    if len(tied) > 3:
        listed = ", ".join(called[line(r)] for r in tied)
        shown = f"<details><summary>{shown}</summary><small>{text(listed)}</small></details>"
    return Cell(shown, kind="wrap best" if len(tied) == 1 else "wrap")


def _slopes(found: Sequence[Series], called: dict[Any, str]) -> str:
    """Of strong errors: the slope between neighbouring budgets, which shows the order."""
    parts = []
    for of in (s for s in found if is_error(s.metric)):
        lines = {which: slopes(of.of(which)) for which in of.lines}
        steps = sorted({(s.start, s.end) for each in lines.values() for s in each})
        if not steps:
            continue
        head = [("sampler", ""), *((f"{a} to {b}", "n") for a, b in steps)]
        body = []
        for which, each in lines.items():
            by = {(s.start, s.end): s for s in each}
            body.append([Cell(text(called[which])), *(_slope(by.get(step)) for step in steps)])
        parts.append(_scroll(_table(head, body, f"{text(of.model)}, {text(of.metric)}")))
    if not parts:
        return ""
    lead = (
        "Slope of the error in log NFE between neighbouring budgets: -1 first order, -2 second, where the step is small enough "
        "to show it. Empty where an error is within what the end points are trusted to."
    )
    return f'<h2>Strong-error slopes</h2><p class="quiet">{lead}</p>{"".join(parts)}'


def _slope(of: Any) -> Cell:
    if of is None:
        return Cell("")
    reach = "" if of.reach is None else f" <small>± {of.reach:.2f}</small>"
    return Cell(f"{of.value:.2f}{reach}", of.value)


def _rows(rows: Sequence[Row]) -> str:
    """Every row, to sort and to filter. The number and what it is of come first: a phone shows no more without moving."""
    columns = [("sampler", ""), ("NFE", "n"), ("metric", ""), ("value", "n"), ("interval", "n less"), ("floor", "n less")]
    columns += [("grid", ""), ("model", ""), ("n", "n less"), ("ms a call", "n less"), ("overhead", "n less")]
    columns += [("samples' digest", "less"), ("note", "less wrap")]
    top = "".join(f'<th scope="col"{_class(kind)}>{name}</th>' for name, kind in columns)
    kinds = [kind for _, kind in columns]
    body = "".join(
        f'<tr data-model="{text(r["model"])}" data-metric="{text(r["metric"])}">{_cells(_row(r), kinds)}</tr>' for r in rows
    )
    table = f'<table id="rows"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    tools = (
        '<div class="tools"><input type="search" id="search" placeholder="filter: ddim karras" aria-label="filter the rows">'
        '<label><input type="checkbox" id="only"> only what the chart shows</label>'
        '<span id="count" class="quiet" role="status"></span></div>'
    )
    return f"<h2>All rows</h2>{tools}{_scroll(table, 'tall')}"


def _row(row: Row) -> list[Cell]:
    nfe, budget = row["nfe"], row["budget"]
    calls = "" if nfe is None else f"{nfe}" if nfe == budget else f"{nfe} <small>of {budget}</small>"
    inside = ' <span class="floor-tick" title="within its floor">✓</span>' if row.get("within_floor") else ""
    floor, ends = row.get("floor"), row.get("interval") or (None, None)
    cost = row.get("cost") or {}
    low, high = ends
    width = None if low is None or high is None else high - low
    return [
        Cell(text(row["solver"] or "")),
        Cell(calls, nfe),
        Cell(text(row["metric"])),
        Cell(f"{number(row['value'])}{inside}" if row["value"] is not None else "–", row["value"]),
        Cell(text(between(row)), width),
        Cell(text(f"{number(floor['low'])} to {number(floor['high'])}") if floor else "", floor["mean"] if floor else None),
        Cell(text(row["grid"] or "")),
        Cell(text(row["model"])),
        Cell(str(row["n"]), row["n"]),
        _spread(cost.get("seconds_per_call"), 1e3),
        _spread(cost.get("overhead"), 100.0, " %"),
        Cell(f"<code>{text((row.get('digest') or '')[:12])}</code>" if row.get("digest") else ""),
        Cell(text(row.get("note") or "")),
    ]


def _spread(found: object, scale: float, unit: str = "") -> Cell:
    """A median with its quartiles."""
    given = [found.get(k) for k in ("median", "low", "high")] if isinstance(found, dict) else []
    values = [v for v in given if isinstance(v, (int, float))]
    if len(values) != 3:
        return Cell("")
    median, low, high = (scale * v for v in values)
    return Cell(f"{number(median)}{unit} <small>{number(low)} to {number(high)}</small>", median)


# --- the rest -----------------------------------------------------------------------------------------------------------------


def _chart() -> str:
    return (
        '<section id="comparing"><h2>Quality against network calls</h2>'
        '<p class="still">The chart is drawn by the page\'s own script, which does not run here. '
        "The tables hold the numbers.</p>"
        '<div class="tools"><label>model <select id="model"></select></label>'
        '<label>metric <select id="metric"></select></label>'
        '<button type="button" id="reset">show all lines</button></div>'
        '<p id="about" class="quiet"></p><p id="chart-title"></p>'
        '<div id="frame"><div id="chart"></div><div id="tip" hidden></div></div>'
        '<div id="legend" role="group" aria-label="lines of the chart; press to hide or show"></div>'
        '<p id="floor-note" class="quiet"></p></section>'
    )


def _samples(study: Study) -> str:
    """For each model: true draws, then a sampler a row with more and more calls."""
    parts = []
    for model in dict.fromkeys(s.model for s in study.sheets):
        of = [s for s in study.sheets if s.model == model]
        rows = [(name, [s for s in of if s.name == name]) for name in dict.fromkeys(s.name for s in of)]
        shown = "".join(_strip(name, row) for name, row in rows)
        parts.append(f"<h3>{text(model)}</h3>{shown}")
    if not parts:
        return ""
    lead = "The same noise taken to data with more and more network calls, by samplers from the best to the worst."
    return f'<h2>Samples</h2><p class="quiet">{lead}</p>{"".join(parts)}'


def _strip(name: str, row: Sequence[Sheet]) -> str:
    figures = "".join(_figure(s) for s in row)
    return f'<h4>{text(name)}</h4><div class="scroll" tabindex="0"><div class="sheets">{figures}</div></div>'


def _figure(sheet: Sheet) -> str:
    calls = "" if sheet.nfe is None else f"NFE {sheet.nfe}"
    words = text(f"samples: {sheet.name} {calls}".strip())
    data = base64.b64encode(sheet.png).decode("ascii")
    width, height = (int.from_bytes(sheet.png[a : a + 4], "big") for a in (16, 20))  # of PNG's first chunk
    scale = max(1, round(SHEET / max(width, 1)))  # whole: pixels of one size
    size = f'width="{scale * width}" height="{scale * height}"'
    image = f'<img{_class("ink" if sheet.ink else "")} {size} src="data:image/png;base64,{data}" alt="{words}">'
    return f"<figure>{image}{f'<figcaption>{calls}</figcaption>' if calls else ''}</figure>"


def _facts(study: Study) -> str:
    body = [[Cell(text(k)), Cell(text(v), kind="wrap")] for k, v in study.facts]
    table = _table([("", ""), ("", "")], body, class_="facts")
    commands = f"<p>Next:</p><pre><code>{text(chr(10).join(study.next))}</code></pre>" if study.next else ""
    return f"<h2>Configuration</h2>{_scroll(table)}{commands}"
