"""What a page is about: rows, samples, the configuration; gathered from a folder of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path as File
from typing import Any

from .. import problems
from ..differences import Row
from ..reading import results
from ..sweep import Sweep
from .sheets import Sheet, sheets, stored


@dataclass(frozen=True)
class Study:
    """All that a page shows.

    rows      as in ``results.jsonl``; each may have its ``cost`` beside
    told      model -> (title, note), where the model is a built-in problem
    facts     the configuration, as pairs of words
    warnings  what a reader must know before believing the rest
    next      commands to go on with
    """

    title: str
    rows: Sequence[Row]
    told: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    sheets: Sequence[Sheet] = ()
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    next: Sequence[str] = ()
    seconds: float | None = None


def gather(out: File) -> Study:
    """The study of a folder, finished or not. ResultsError: it holds no results."""
    found = results(out)
    rows = found.rows
    warnings = []
    if found.missing:
        done = len({tuple(r.get(k) for k in ("model", "solver", "grid", "budget")) for r in rows} - set(found.missing))
        warnings.append(
            f"Not finished: {len(found.missing)} of {len(found.missing) + done} cells have no rows of the full n yet. The "
            "command below goes on where it stopped."
        )
    if found.damaged:
        warnings.append(f"{found.damaged} lines of the folder are damaged and left out; the command below makes them again.")
    again = command(found.sweep, out)
    return Study(
        title="Samplers compared",
        rows=rows,
        told=told(r["model"] for r in rows),
        sheets=sheets(out, found.sweep, rows) if found.sweep else stored(out),
        facts=facts(found.sweep, rows),
        warnings=warnings,
        next=[*([again] if again else []), "python -m benchmarks compare OTHER_FOLDER THIS_FOLDER"],
        seconds=sum(c["seconds"] for c in found.costs if isinstance(c.get("seconds"), (int, float))) or None,
    )


# --- words ------------------------------------------------------------------------------------------------------------------


def told(models: Any) -> dict[str, tuple[str, str]]:
    """Titles and notes of the built-in problems among them. Nothing of anybody else's is imported."""
    entries = {m: problems.PROBLEMS.get(m.partition(":")[0]) for m in models}
    return {m: (entry.title, entry.note) for m, entry in entries.items() if entry is not None}


def facts(record: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The configuration in words: what was asked for, and where it ran."""
    found: list[tuple[str, str]] = []
    for name, values in record.get("lists", {}).items():
        found.append((name, _said(values)))
    settings = dict(record.get("settings", {}))
    found += [("samples of a cell", _said(record.get("n") or sorted({r["n"] for r in rows})))]
    found += [(name.replace("_", " "), _said(value)) for name, value in settings.items() if value not in (None, [], "", False)]
    seeds = sorted({s for r in rows for s in r["seeds"]})
    found.append(("seeds", _said(seeds)))
    for name, model in record.get("models", {}).items():
        found.append((f"weights of {name}", f"{_said(model.get('digest'))}, shape {_said(model.get('shape'))}"))
    first = rows[0] if rows else {}
    for name in ("device", "git", "config"):
        value = record.get(name) or first.get(name)
        if value and name not in settings:
            found.append((name, _said(value)))
        elif value and value != settings.get(name):
            found.append((f"{name} of the first run", _said(value)))
    versions = record.get("versions") or first.get("versions") or {}
    found += [(str(k), _said(v)) for k, v in versions.items()]
    code = record.get("code", {}).get("toolkit")
    return [*found, ("digest of the toolkit's code", _said(code))] if code else found


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def command(record: Mapping[str, Any], out: File) -> str:
    """The command that makes the folder, or goes on with it; empty where that is not known."""
    from ..run import command as words

    known = {f.name for f in fields(Sweep)}
    given = {**record.get("settings", {}), **record.get("lists", {}), "n": record.get("n")}
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in known}
    return words(Sweep(**options, out=out)) if record else ""
