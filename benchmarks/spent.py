"""What the cells of a sweep cost: medians over their parts, from the log. Measured, so never the same twice."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .sweep import LISTS


def cell_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """(model, solver, grid, budget): what rows and costs are joined by."""
    return tuple(row.get(k) for k in ("model", "solver", "grid", "budget"))


def costs_of(log: Sequence[Mapping[str, Any]], record: Mapping[str, Any], config: str) -> Iterator[dict[str, Any]]:
    """A line a cell, in order of first parts: medians over its parts, with their quartiles."""
    cells: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for entry in log:
        if entry["event"] == "part" and entry["config"] == config:
            cells.setdefault(cell_of(entry), {})[entry["path"]] = entry  # one made again counts once
    lists = record.get("lists", {})

    def rank(cell: tuple[Any, ...]) -> tuple[int, ...]:
        named = zip(LISTS, cell, strict=True)
        return tuple(lists.get(k, []).index(v) if v in lists.get(k, []) else -1 for k, v in named)

    for cell in sorted(cells, key=rank):
        parts = list(cells[cell].values())
        ran = [p for p in parts if p["calls"]]
        if not ran:
            continue
        samples, seconds = sum(p["samples"] for p in ran), sum(p["seconds"] for p in ran)
        device = [p["device_seconds"] / p["calls"] for p in ran if p["device_seconds"] is not None]
        yield {
            **dict(zip(("model", "solver", "grid", "budget"), cell, strict=True)),
            "parts": len(ran),
            "samples": samples,
            "seconds": seconds,
            "samples_per_second": samples / seconds if seconds else None,
            "seconds_per_call": spread([p["seconds"] / p["calls"] for p in ran]),
            "device_seconds_per_call": spread(device) if device else None,
            "overhead": spread([p["seconds"] / p["network_seconds"] - 1.0 for p in ran if p["network_seconds"]]),
            "peak_memory": max(p["peak_memory"] for p in ran),
            "batch": sorted({p["batch"] for p in ran}),
            "device": sorted({p["device"] for p in ran}),
            "workers": len({p["worker"] for p in ran}),
        }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median and quartiles."""
    if not values:
        return None
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
