"""One self-contained page: no script, no address, every word escaped, pictures inside."""

from __future__ import annotations

import base64
import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from .pictures import Picture
from .results import Outcome, Row, closest, last_slope, milestones, number, winner

if TYPE_CHECKING:
    from .quick import Quick

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #626a73; --page: #ffffff; --rule: #d9dde1; --soft: #f3f5f7;
  --good: #00704f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --quiet: #9aa2aa; --page: #14171a; --rule: #343a41; --soft: #1d2125; --good: #44d6a5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 74rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1rem 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .3rem; }
p, li { max-width: 46rem; }
.quiet, caption, figcaption { color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .4rem 0 1rem; }
caption { text-align: left; padding: .5rem 0 .3rem; }
th, td { padding: .28rem .75rem .28rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tbody tr:nth-child(even) { background: var(--soft); }
small { color: var(--quiet); font-size: .8em; font-weight: 400; }
.best { color: var(--good); font-weight: 700; }
.floor { color: var(--good); }
figure { margin: 1.2rem 0; }
img { width: 100%; min-width: 42rem; height: auto; display: block; border-radius: 6px; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--soft);
  padding: .1em .3em; border-radius: 4px; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }
pre code { padding: 0; background: none; }
"""


CURVES = (
    "Above: strong error, with the slope at the largest budget. Dashed, below: stochastic samplers. Triangles at the top edge "
    "are runs that blew up, with their value. Grey: what true data give, mean and two deviations."
)

DIGITS = (
    "The first grid of a column is by its best sampler at the largest budget. The strips follow the same ten noises through "
    "growing budgets (the numbers at the left), by the best and by the worst sampler in the middle of the budgets."
)

READING = """<h2>How to read this</h2><ul>
<li><b>NFE</b>: network calls on the batch. A sampler of two calls a step takes half the steps. <small>@4</small> marks a
budget that could not be spent in full: the number of calls made.</li>
<li><b>Strong error</b>: root mean square distance to where the exact probability flow ends from the same noise. It sees the
sampler only, so its slope shows the order: -1 first, -2 second. At few calls the slope is not yet the order. A stochastic
sampler has no such end point.</li>
<li><b>Trusted to</b>: how much the reference end points move when their steps are doubled; errors near it mean nothing.</li>
<li><b>Sliced W2</b>: a distance between distributions, over 64 directions. Two sets of true data of the same size are not at
zero but at the <b>floor</b>; samplers within it are equally good as far as this many samples can tell.</li></ul>"""


def text(value: object) -> str:
    """Any value as text of the page: markup escaped; control, format (bidirectional) and unpaired characters shown as codes."""
    shown = "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else f"\\u{ord(c):04x}" for c in str(value)
    )
    return html.escape(shown, quote=True)


def page(outcomes: Sequence[Outcome], config: Quick, images: Mapping[str, Picture], seconds: float) -> str:
    """The whole report as one HTML file."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>Samplers compared</title><style>{STYLE}</style></head><body>",
        "<h1>Samplers compared</h1>",
        f'<p class="quiet">{len(config.solvers)} samplers on {len(outcomes)} problems at {len(config.nfe)} budgets of network '
        f"calls, {seconds:.0f} s in all. Every call was counted at the network.</p>",
        _winners(outcomes, config.nfe),
        _figure("nfe_vs_error.png", images, CURVES),
        _figure("samples.png", images, DIGITS),
        *(_section(o, config) for o in outcomes),
        READING,
        _facts(outcomes, config),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _figure(name: str, images: Mapping[str, Picture], caption: str) -> str:
    if name not in images:
        return ""
    picture = images[name]
    light, dark = (f"data:image/png;base64,{base64.b64encode(p).decode('ascii')}" for p in (picture.light, picture.dark))
    return (
        f'<figure><div class="scroll"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{text(picture.alt)}"></picture></div><figcaption>{text(caption)}</figcaption></figure>'
    )


def _table(head: Sequence[str], body: Iterable[Sequence[str]], caption: str) -> str:
    """Cells are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    words = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="scroll"><table>{words}<thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'


def _winners(outcomes: Sequence[Outcome], budgets: Sequence[int]) -> str:
    columns = milestones(budgets)
    head = ["problem", *(f"NFE {b}" for b in columns)]
    return "".join(
        _table(head, [[text(o.title), *(text(say(o, b)) for b in columns)] for o in outcomes], words)
        for say, words in ((winner, "Least strong error"), (closest, "Closest to true data, by sliced W2"))
    )


def _section(outcome: Outcome, config: Quick) -> str:
    head = ["sampler", "grid", *(f"NFE {b}" for b in config.nfe)]
    errors, distances = [], []
    for solver in dict.fromkeys(r.solver for r in outcome.rows):
        rows = outcome.of(solver)
        name = [text(solver), text(rows[0].grid)]
        trend = last_slope(rows)
        if any(r.error is not None for r in rows):
            errors.append([*name, *(_cell(outcome, r, "error") for r in rows), "" if trend is None else f"{trend:.2f}"])
        spent, calls = sum(r.seconds or 0.0 for r in rows), sum(r.nfe or 0 for r in rows)
        pace = f"{1e3 * spent / calls:.2f}" if calls else ""
        distances.append([*name, *(_cell(outcome, r, "sliced_w2") for r in rows), pace])
    floor = outcome.floor
    parts = [f"<h2>{text(outcome.title)}</h2>", f"<p>{text(outcome.note)}</p>"]
    if errors:
        trust = f"Strong error. End points from {outcome.reference_nfe} calls, trusted to {number(outcome.reference_error)}"
        parts.append(_table([*head, "slope"], errors, trust))
    words = (
        f"Sliced W2 to true data; ✓ within the floor, {number(floor.mean)} ± {number(floor.sd)} a block. "
        f"The exact flow itself: {number(outcome.reference_w2.mean)}"
    )
    parts.append(_table([*head, "ms a call"], distances, words))
    notes = {f"{r.solver} at {r.budget}: {r.note}" for r in outcome.rows if r.note}
    if notes:
        parts.append("<ul>" + "".join(f"<li><small>{text(n)}</small></li>" for n in sorted(notes)) + "</ul>")
    return "".join(parts)


def _cell(outcome: Outcome, row: Row, key: str) -> str:
    value = getattr(row, key)
    if value is None:
        return "<small>-</small>"
    shown = number(value)
    if outcome.best(row.budget, key) is row and not (key == "sliced_w2" and row.within_floor):
        shown = f'<span class="best">{shown}</span>'
    if key == "sliced_w2" and row.within_floor:
        shown += ' <span class="floor">✓</span>'
    return shown if row.nfe == row.budget else f"<small>@{row.nfe}</small> {shown}"


def _facts(outcomes: Sequence[Outcome], config: Quick) -> str:
    row = next((r for o in outcomes for r in o.rows), None)
    facts = {} if row is None else {"device": row.device, **row.versions}
    facts |= {
        "seed": str(config.seed),
        "samples": f"{config.n} in the plane, {config.digits} digits, in {config.blocks} blocks",
    }
    body = [[text(k), text(v)] for k, v in facts.items()]
    command = "python -m benchmarks quick --help\npython -m benchmarks train digits\npython -m benchmarks exact --help"
    return f"<h2>This run</h2>{_table(['', ''], body, '')}<p>Next:</p><pre><code>{text(command)}</code></pre>"
