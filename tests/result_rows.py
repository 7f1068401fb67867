"""Rows of results as ``run`` writes them, made up: for tests of what reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import files


def row(solver: str = "ddim", nfe: int = 8, value: float | None = 0.2, **change: Any) -> dict[str, Any]:
    """A row whose blocks scatter by a twentieth of its value."""
    values = None if value is None else [value * f for f in (0.95, 1.05, 1.0, 1.0)]
    ends = None if value is None else [0.9 * value, 1.1 * value]
    floor = {"mean": 0.01, "sd": 0.002, "low": 0.005, "high": 0.015, "replicates": 32}
    found = {"model": "ring2", "solver": solver, "grid": "karras", "nfe": nfe, "budget": nfe, "metric": "sliced_w2"}
    found |= {"value": value, "interval": ends, "floor": floor, "within_floor": value is not None and value <= 0.015}
    found |= {
        "enough": {"worse": 0.05, "n": 1024, "why": ""},
        "n": 400,
        "seeds": [0, 1, 2, 3],
        "digest": "ab" * 32,
        "values": values,
        "unit": "std",
        "note": "",
    }
    return {**found, "lower_is_better": True, "two_sided": False, **change}


def written(folder: Path, rows: Iterable[Mapping[str, Any]], tail: bytes = b"") -> Path:
    """A folder with these rows."""
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_bytes(b"".join(map(files.seal, rows)) + tail)
    return folder
