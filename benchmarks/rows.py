"""Rows of results: each metric of a cell with its interval, its floor, and where it comes from.

A row holds nothing that another run of the same sweep would not find again to the bit. What it cost is in ``costs.jsonl``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sde.errors import ResultsError, ToolkitError

from . import metrics
from .metrics import Block
from .models import Model
from .store import Held
from .sweep import SCHEMA, Item

if TYPE_CHECKING:
    from .making import Maker


@dataclass
class InFiles:
    """The samples of a block as its parts' files keep them, at most ``limit``: those of one part in memory at a time."""

    maker: Maker
    limit: int
    ends: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    _held: tuple[str, Tensor] | None = None

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def add(self, path: str, x: Tensor) -> None:
        """The next part: of a folder that keeps more samples than metrics look at, perhaps none."""
        if count := min(len(x), self.limit - len(self)):
            self.paths.append(path)
            self.ends.append(len(self) + count)

    def __getitem__(self, span: slice) -> Tensor:
        first, last, _ = span.indices(len(self))
        found = []
        for path, a, b in zip(self.paths, [0, *self.ends], self.ends, strict=False):
            if a < last and first < b:
                found.append(self._part(path)[max(first - a, 0) : last - a])
        return torch.cat(found)

    def _part(self, path: str) -> Tensor:
        if self._held is None or self._held[0] != path:
            self._held = path, self.maker.needed(path).tensors["x"]
        return self._held[1]


class Merged:
    """The parts of a cell, merged block by block, one part in memory at a time."""

    def __init__(self, maker: Maker, item: Item) -> None:
        self.maker = maker
        self.digest, self.failed, self.note = hashlib.sha256(), "", ""
        self.nfe = self.net_evals = self.steps = 0
        self.dtype = ""
        self.bad: list[list[Any]] = []
        by_block: dict[int, list[str]] = {}
        for path in item.needs:
            if maker.items[path].kind == "part":
                by_block.setdefault(maker.items[path].about["block"], []).append(path)
        m = maker.sweep.n // maker.sweep.blocks
        self.blocks = [self._block(block, paths, m) for block, paths in sorted(by_block.items())]

    def _block(self, block: int, paths: list[str], m: int) -> Block:
        kept = InFiles(self.maker, self.maker.looked_at())
        summaries = self._summaries(paths, block, kept)
        first = next(summaries, None)
        summary = {} if first is None else metrics.merge(chain([first], summaries))
        return Block(asked=m, seed=self.maker.sweep.seed + block, summary=summary, samples=kept if len(kept) else None)

    def _summaries(self, paths: list[str], block: int, kept: InFiles) -> Iterator[dict[str, Tensor]]:
        for path in paths:
            part = self.maker.needed(path)
            tensors = self._note(part, block)
            if tensors is None:
                return
            if "x" in tensors:
                kept.add(path, tensors.pop("x"))
            if tensors:
                yield tensors

    def _note(self, part: Held, block: int) -> dict[str, Tensor] | None:
        said = part.about
        if "failed" in said:
            self.failed = self.failed or said["failed"]
            return None
        self.digest.update(bytes.fromhex(said["digest"]))
        self.nfe, self.net_evals = max(self.nfe, said["nfe"]), max(self.net_evals, said["net_evals"])
        self.steps, self.dtype = max(self.steps, said["steps"]), said["dtype"]
        self.bad += [[block, *entry] for entry in said["bad"]]
        self.note = self.note or said["note"]
        return dict(part.tensors)


def rows_of_cell(maker: Maker, item: Item, model: Model) -> list[dict[str, Any]]:
    """One row a metric that looks at samples or at the sampler's table."""
    cell = Merged(maker, item)
    line = maker.lines[item.about["solver"]]
    common = {
        "solver": item.about["solver"],
        "grid": item.about["grid"],
        "budget": item.about["nfe"],
        "nfe": cell.nfe or None,
        "net_evals": cell.net_evals or None,
        "steps": cell.steps or None,
        "digest": cell.digest.hexdigest() if cell.nfe else None,
        "dtype": cell.dtype or maker.sweep.dtype,
    }
    found = []
    for text, metric in maker.metrics.items():
        if metric.needs == "model":
            continue
        why = cell.failed or metric.available(model.problem) or ""
        if not why and metric.flow_only and not line.flow(maker.sweep.eta):
            why = f"{text} is of samplers of the probability flow"
        found.append(_row(maker, model, item, text, metric, cell.blocks, common, why, cell))
    return found


def rows_alone(maker: Maker, item: Item, model: Model) -> list[dict[str, Any]]:
    """The row of a metric that looks at the model alone."""
    text = item.about["metric"]
    blocks = maker.blocks()
    common = dict.fromkeys(("solver", "grid", "budget", "nfe", "net_evals", "steps", "digest"))
    metric = maker.metrics[text]
    why = metric.available(model.problem) or ""
    return [_row(maker, model, item, text, metric, blocks, {**common, "dtype": maker.sweep.dtype}, why, None)]


def _row(
    maker: Maker,
    model: Model,
    item: Item,
    text: str,
    metric: Any,
    blocks: list[Block],
    common: dict[str, Any],
    why: str,
    cell: Merged | None,
) -> dict[str, Any]:
    sweep, problem = maker.sweep, model.problem
    value = low = high = values = None
    floor, inside, enough, n = None, None, None, sweep.n
    note = why
    if not why:
        try:
            if metric.needs == "table":
                value = metric.exact(
                    problem,
                    common["solver"],
                    nfe=common["budget"],
                    grid=common["grid"],
                    eta=sweep.eta,
                    law=sweep.start,
                )
                low = high = value
                floor = {"mean": 0.0, "sd": 0.0, "low": 0.0, "high": 0.0, "replicates": 0}
            else:
                measured = metrics.measure(metric, problem, blocks)
                value, low, high, n, values = measured.value, measured.low, measured.high, measured.n, list(measured.values)
                perfect, enough = _floor(maker, model, item, text, metric, blocks)
                if perfect is not None:
                    floor, inside = perfect.to_dict(), bool(metrics.within(measured, perfect))
        except ResultsError:  # a part that was whole a moment ago: it is made again first
            raise
        except ToolkitError as error:
            note = str(error)
    if cell is not None and cell.bad:
        block, index, step, t = cell.bad[0]
        place = "" if t is None else f", step {step + 1}, t = {t:.6g}"
        lost = f"{len(cell.bad)} of {sweep.n} samples are not finite (first: sample {index} of block {block}{place})"
        note = f"{lost}; {note}" if note else lost
    if cell is not None and cell.note:
        note = f"{note}; {cell.note}" if note else cell.note
    record = maker.store.record
    return {
        "model": model.facts.name,
        **{k: common[k] for k in ("solver", "grid", "nfe")},
        "metric": text,
        "value": value,
        "interval": None if low is None else [low, high],
        "floor": floor,
        "within_floor": inside,
        "enough": enough,
        "n": n,
        "asked": sweep.n,
        "seeds": [sweep.seed + b for b in range(sweep.blocks)],
        "digest": common["digest"],
        "budget": common["budget"],
        "steps": common["steps"],
        "net_evals": common["net_evals"],
        "values": values,
        "blocks": sweep.blocks,
        "unit": metric.unit,
        "lower_is_better": metric.lower_is_better,
        "two_sided": metric.two_sided,
        "path": repr(problem.path),
        "start_law": sweep.start,
        "start": problem.start,
        "stop": problem.stop,
        "eta": sweep.eta,
        "dtype": common["dtype"],
        "device": record["device"],
        "versions": record["versions"],
        "git": record["git"],
        "config": maker.store.config,
        "weights": model.facts.digest,
        "schema": SCHEMA,
        "note": note,
    }


def _floor(
    maker: Maker, model: Model, item: Item, text: str, metric: Any, blocks: list[Block]
) -> tuple[metrics.Floor | None, dict[str, Any] | None]:
    """The floor and the samples it takes, from their own file, or, where they depend on the run, found here."""
    for path in item.needs:
        if maker.items[path].kind == "floor" and maker.items[path].about["metric"] == text:
            said = maker.needed(path).about
            return None if said["floor"] is None else metrics.Floor(**said["floor"]), said["enough"]
    found = metrics.floor(metric, model.problem, blocks)
    return found, None if found is None else metrics.enough(metric, model.problem, blocks)
