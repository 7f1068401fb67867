"""Sheets of samples: for each model a few samplers, each with more and more calls, from the same noise; and true draws beside.

Only what the folder kept can be shown: all samples with ``run --keep-samples``, else as many as a metric wanted to see; of a
folder of ``quick``, which keeps no samples, the sheets of its own page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from sde.errors import ToolkitError

from .. import files, problems
from ..differences import Row, badness
from ..kept import part_files
from ..problems import Problem
from ..reading import Line, is_error, line, names, series
from ..sweep import place

SHEETS = "sheets.safetensors"

ROOM = 1_200_000
"""Bytes of all PNG together, so that a page stays well below 3 MB."""
LINES, BUDGETS = 4, 6
POINTS = 4096  # of the plane: a density wants many


@dataclass(frozen=True)
class Sheet:
    """Samples as one picture: of a sampler with so many calls, or true draws (``nfe`` None)."""

    model: str
    name: str
    nfe: int | None
    png: bytes
    ink: bool = False
    """Dark on white, to be inverted on a dark page; not so pictures that are data."""


def sheets(out: File, record: Mapping[str, Any], rows: Sequence[Row]) -> list[Sheet]:
    """The sheets of every model of which samples were kept, within ``ROOM``."""
    chosen = [(model, *found) for model in dict.fromkeys(r["model"] for r in rows) if (found := _chosen(model, rows))]
    everyone = [line(r) for s in series(rows) for r in s.rows]
    for count in (64, 36, 16, 9, 4):
        made = [
            sheet
            for model, lines, budgets in chosen
            for sheet in _of_model(out, record, model, lines, budgets, count, everyone)
        ]
        if sum(len(s.png) for s in made) <= ROOM:
            return made
    return []


def packed(found: Sequence[Sheet]) -> bytes:
    """Sheets as a file, which ``stored`` reads."""
    pngs = {str(i): torch.frombuffer(bytearray(s.png), dtype=torch.uint8) for i, s in enumerate(found)}
    return files.pack({"sheets": [[s.model, s.name, s.nfe, s.ink] for s in found]}, pngs)


def stored(out: File) -> list[Sheet]:
    """The sheets in a folder's file; none where it is not there, or not what was written: it may come from anywhere."""
    try:
        about, pngs = files.unpack(files.read(out / SHEETS) or b"")
        return [
            Sheet(str(model), str(name), None if nfe is None else int(nfe), pngs[str(i)].numpy().tobytes(), bool(ink))
            for i, (model, name, nfe, ink) in enumerate(about["sheets"])
        ]
    except (ToolkitError, KeyError, TypeError, ValueError):
        return []


def _chosen(model: str, rows: Sequence[Row]) -> tuple[list[Line], list[int]] | None:
    """Lines from the best to the worst in the middle of the budgets, and the budgets: at most so many of each."""
    found = [s for s in series(rows) if s.model == model]
    if not found:
        return None
    of = next((s for s in found if is_error(s.metric)), found[0])
    of = max(found, key=lambda s: len(s.lines)) if len(of.lines) < max(len(s.lines) for s in found) else of
    middle = of.budgets[len(of.budgets) // 2]
    ranked = [line(r) for r in sorted((r for r in of.rows if r["budget"] == middle), key=badness)]
    return _spread(ranked, LINES), _spread(of.budgets, BUDGETS)


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    """The first, the last, and others at even distances."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _of_model(
    out: File,
    record: Mapping[str, Any],
    model: str,
    lines: Sequence[Line],
    budgets: Sequence[int],
    count: int,
    everyone: Sequence[Line],
) -> Iterator[Sheet]:
    shape = tuple(record.get("models", {}).get(model, {}).get("shape", ()))
    if not shape or not all(isinstance(s, int) and 0 < s < 1 << 20 for s in shape):
        return
    problem = problem_of(model, shape)
    called = names(everyone)
    found, most = [], 0
    for which in lines:
        for budget in budgets:
            x = kept(out, record, (model, *which, budget), POINTS if math.prod(shape) == 2 else count)
            if x is not None:
                found.append(sheet(problem, model, called[which], budget, x, count))
                most = max(most, len(x))
    if found and problem.data is not None:  # as many as of a sampler, or the truth would look better than it is
        yield sheet(problem, model, "true draws", None, problem.truth(0, range(most)), count)
    yield from found


def problem_of(model: str, shape: tuple[int, ...]) -> Problem:
    """The built-in problem, or of anybody else's model what shows a sample by its shape alone."""
    if model.partition(":")[0] in problems.PROBLEMS:
        try:
            return problems.get(model)
        except ToolkitError:  # a noise of another version, or what it needs is not installed
            pass
    return Problem(name=model, title=model, shape=shape, noise=problems.NOISES["ve"](), data=None)


def sheet(problem: Problem, model: str, name: str, nfe: int | None, x: Tensor, count: int) -> Sheet:
    """Samples as a PNG: large pictures are made smaller first."""
    from ..exporting import png_bytes

    picture = problem.picture or (problem.shape if len(problem.shape) == 3 else None)
    tiles = picture is not None and picture[0] in (1, 3)
    if tiles and picture is not None:
        x = x.double().reshape(-1, *picture)
        smaller = math.ceil(max(picture[1:]) / 64)
        if smaller > 1:
            x = torch.nn.functional.avg_pool2d(x, smaller, ceil_mode=True)
            problem = Problem(name=model, title=model, shape=tuple(x.shape[1:]), noise=problem.noise, data=None)
        x = x.reshape(-1, *problem.shape)
    return Sheet(model, name, nfe, png_bytes(problem.preview(x, count)), ink=not tiles)


def kept(out: File, record: Mapping[str, Any], cell: tuple[str, str, str, int], most: int) -> Tensor | None:
    """The first samples of a cell that its part files hold, in order; None where they hold none."""
    prefix = place("part", {}, *cell).removeprefix("parts/")[:-12]
    found: list[Tensor] = []
    for folder in files.names(out / "parts"):
        if not folder.startswith(prefix) or len(folder) != len(prefix) + 12:
            continue
        for path in parts(out / "parts" / folder):
            if sum(map(len, found)) >= most:
                break
            x = _part(path, record, cell)
            if x is not None:
                found.append(x)
    return torch.cat(found)[:most] if found else None


def parts(folder: File) -> Iterator[File]:
    """Part files in order, each sample once: a sweep that has grown leaves short parts beside the full ones."""
    longest = {(block, first): (end, path) for (block, first, end), path in sorted(part_files(folder).items())}
    block, at = -1, 0
    for (own, first), (end, path) in longest.items():
        if own == block and first < at:
            continue
        block, at = own, end
        yield path


def _part(path: File, record: Mapping[str, Any], cell: tuple[str, str, str, int]) -> Tensor | None:
    try:
        about, tensors = files.unpack(files.read(path) or b"")
    except ToolkitError:
        return None
    item = about.get("item", {})
    wanted = (*cell, record.get("config"), record.get("models", {}).get(cell[0], {}).get("digest"))
    if tuple(item.get(k) for k in ("model", "solver", "grid", "nfe", "config", "digest")) != wanted:
        return None
    x = tensors.get("x")
    return x if x is not None and bool(x.isfinite().all()) else None
