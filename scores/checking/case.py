"""The arguments of ``scores.check``, checked; the rows in use; and what has been found so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sde.errors import InputError
from sde.prediction import Predictor, rows_of

from ..network import check_state
from .report import Diagnosis, Finding, Measured


@dataclass
class Case:
    """The rows in use and what has been found so far.

    x0         clean samples (B, *event); without data zeros, of which only shape, dtype and device count
    data       all that was given, or None
    several    how many different samples are in use
    """

    score: Predictor
    x0: Tensor
    data: Tensor | None
    several: int
    seed: int
    conditions: Mapping[str, Any]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    levels: list[Measured] = field(default_factory=list)

    @property
    def deviation(self) -> float:
        """The standard deviation of the data, 1 where there are none."""
        return 1.0 if self.data is None else max(float(self.x0.double().std()), 1e-12)

    def part(self, rows: int) -> dict[str, Any]:
        """The conditions of the first rows."""
        return rows_of(dict(self.conditions), slice(rows), len(self.x0))

    def report(self, name: str, evidence: str, change: str) -> None:
        self.findings.append(Finding(name, evidence, change))

    def diagnosis(self, calls: int) -> Diagnosis:
        return Diagnosis(tuple(self.findings), tuple(self.notes), tuple(self.levels), calls)


def open_case(score: Predictor, data: Any, shape: Sequence[int] | None, seed: int, conditions: Mapping[str, Any]) -> Case:
    """The arguments, checked, and the rows that are used: few for large events, repeated with other noise for small ones."""
    if data is None:
        event, have = _shape(score, shape)
    else:
        data = _clean(data)
        event, have = data.shape[1:], len(data)
    size = event.numel()
    most = max(16 if size <= 1 << 16 else 8, (1 << 16) // size)
    rows = min(max(have, 8, -(-4096 // size)), most)
    pick = torch.arange(rows) % have if rows >= have else torch.linspace(0, have - 1, rows).round().long()
    if data is None:
        dtype, device = native(score)
        x0, several = torch.zeros((rows, *event), dtype=dtype, device=device), rows
    else:
        x0 = data[pick.to(data.device)]
        several = len(torch.unique(x0.flatten(1), dim=0))
    kept = {name: _picked(value, have, pick) for name, value in conditions.items()}
    return Case(score, x0, data, several, seed, kept)


def _clean(data: Any) -> Tensor:
    check_state(data)
    if data.dim() < 2 or len(data) < 2:
        raise InputError(f"data has shape {tuple(data.shape)}: give a batch (B, ...) of clean samples, best 64 or more")
    if not bool(data.isfinite().all()):
        raise InputError("data holds inf or nan: give clean samples")
    if float(data.double().std()) == 0.0:
        raise InputError("data are all the same number: give different samples")
    data = data.detach()
    return data.float() if torch.finfo(data.dtype).bits < 32 else data


def _shape(score: Predictor, shape: Sequence[int] | None) -> tuple[torch.Size, int]:
    if shape is None and hasattr(score, "event_shape"):
        shape = (16, *score.event_shape)  # pyright: ignore[reportAttributeAccessIssue]
    if shape is None:
        raise InputError("shape is missing: without data give the shape of a batch, such as shape=(16, 3, 32, 32)")
    try:
        sizes = torch.Size(int(n) for n in shape)
    except (TypeError, ValueError):
        raise InputError(f"shape={shape!r}: give the shape of a batch (B, ...), such as (16, 3, 32, 32)") from None
    if len(sizes) < 2 or min(sizes) < 1:
        raise InputError(f"shape={tuple(sizes)}: give the shape of a batch (B, ...), such as (16, 3, 32, 32)")
    return sizes[1:], sizes[0]


def _picked(value: Any, have: int, pick: Tensor) -> Any:
    """The rows of a condition that go with the rows in use."""
    if isinstance(value, Tensor) and value.dim() and len(value) == have:
        return value[pick.to(value.device)]
    if isinstance(value, Mapping):
        return {k: _picked(v, have, pick) for k, v in value.items()}
    return value


def native(score: Predictor) -> tuple[torch.dtype, torch.device]:
    """The dtype and device that a state has unless told otherwise."""
    module = getattr(score, "_module", None)
    first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return getattr(score, "native_dtype", torch.float32), torch.device("cpu") if first is None else first.device
