"""``sweep.json``: what a folder of results is of. What must be the same in every run on it, and what it has grown to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Any

from sde.errors import ResultsError

from . import files
from .sweep import LISTS, SCHEMA, Facts, Sweep, digest, settings

SWEEP = "sweep.json"


def read_sweep(out: File) -> dict[str, Any] | None:
    """The configuration of a folder; None where there is none, or none that is whole: then the command says what it is."""
    data = files.read(out / SWEEP)
    try:
        record = json.loads(data or b"")
        whole = isinstance(record, dict) and render(record) == data
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and isinstance(record.get("schema"), int) and record["schema"] > SCHEMA:
        raise ResultsError(
            f"{files.show(out)}: written in schema {record['schema']} by a newer version; this one reads {SCHEMA}: update it"
        )
    return record if whole else None


def render(record: Mapping[str, Any]) -> bytes:
    """JSON for people, with a digest of all the rest as its last word."""
    body = {k: v for k, v in record.items() if k != "sha256"}
    return (json.dumps({**body, "sha256": digest(body)}, indent=1, allow_nan=False) + "\n").encode("ascii")


def wanted_record(
    sweep: Sweep, models: Sequence[Facts], code: Mapping[str, str], origin: Mapping[str, Any], config: str
) -> dict[str, Any]:
    record = {
        "schema": SCHEMA,
        "config": config,
        "settings": settings(sweep),
        "code": dict(code),
        "n": sweep.n,
        "lists": {name: list(getattr(sweep, name)) for name in LISTS},
        "models": {m.name: {"digest": m.digest, "shape": list(m.shape)} for m in models},
        **origin,
    }
    return {**record, "sha256": digest(record)}


def compare(found: Mapping[str, Any], wanted: Mapping[str, Any], out: File) -> None:
    """ResultsError, naming the first differences, where a folder is of another configuration."""
    apart = []
    for name in wanted["settings"]:
        a, b = (r["settings"].get(name) for r in (found, wanted))
        if a != b:
            apart.append(f"--{name.replace('_', '-')} was {_said(a)}, is {_said(b)}")
    for name in wanted["code"]:
        a, b = (r["code"].get(name) for r in (found, wanted))
        if a != b:
            apart.append(f"{'the code of this toolkit' if name == 'toolkit' else name} was {a}, is {b}")
    for name, model in wanted["models"].items():
        before = found["models"].get(name)
        if before is not None and before["shape"] != model["shape"]:
            apart.append(f"samples of {name} were {tuple(before['shape'])}, are {tuple(model['shape'])}")
        elif before is not None and before["digest"] != model["digest"]:
            apart.append(f"weights, data or code of {name} have changed (digest {before['digest']}, now {model['digest']})")
    if wanted["n"] < found["n"]:
        apart.append(f"-n was {found['n']}, is {wanted['n']}: it may grow, not shrink")
    if apart:
        raise ResultsError(
            f"{files.show(out)} holds results of another configuration: {'; '.join(map(files.show, apart[:4]))}. Give another "
            "--out, or --force-new to throw them away"
        )


def _said(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)


def grown(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder is of from now on: its lists and n as long as either; its origin as it was."""
    lists = {k: [*v, *(x for x in wanted["lists"][k] if x not in v)] for k, v in found["lists"].items()}
    record = {**found, "n": wanted["n"], "lists": lists, "models": {**found["models"], **wanted["models"]}}
    record.pop("sha256")
    return {**record, "sha256": digest(record)}
