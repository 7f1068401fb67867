"""The samples that a folder of results keeps: of each cell all n of them, each once, in the order of blocks and indices.

A sweep that has grown leaves short parts beside the full ones that replace them, so parts are chosen, not listed; and each is
looked at before it is used: it must be whole, of this cell, and of the configuration and the weights that the folder is of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as File
from typing import Any, NamedTuple

from torch import Tensor

from sde.errors import InputError, ResultsError

from . import files
from .sweep import ENDING, LISTS

_PART = re.compile(rf"(\d+)\.(\d{{9}})-(\d{{9}}){re.escape(ENDING)}")


class Kept(NamedTuple):
    """A cell whose samples are all there: what it is, its n and seeds, and its part files, in the order of their samples, each
    with the item that it must hold.
    """

    cell: dict[str, Any]
    n: int
    seeds: list[int]
    parts: list[tuple[File, dict[str, Any]]]

    def read(self, finite: bool = True) -> Iterator[Tensor]:
        """The samples, part by part, (B, *shape). InputError, if ``finite``, for numbers that are not."""
        for path, item in self.parts:
            about, tensors = _unpack(path)
            if about.get("item") != item or len(tensors["x"]) != item["b"] - item["a"]:
                raise ResultsError(f"{files.show(path)}: holds something else; run the sweep again, which makes it again")
            x = tensors["x"]
            bad = ~x.isfinite().reshape(len(x), -1).all(1)
            if finite and bool(bad.any()):
                raise InputError(f"{files.show(path)}: {int(bad.sum())} of its samples are not finite; this cell is no use")
            yield x

    def __str__(self) -> str:
        return words(self.cell)


def words(cell: Mapping[str, Any]) -> str:
    """A cell in words."""
    return files.show(f"{cell['model']}, {cell['solver']} on {cell['grid']} with {cell['budget']} calls")


def kept(out: File, record: Mapping[str, Any], wanted: Callable[[dict[str, Any]], bool] = lambda cell: True) -> Iterator[Kept]:
    """The wanted cells of a folder of results, in the order of the sweep; ``record`` is what its ``sweep.json`` says.

    InputError: the samples of a wanted one are not all there. A cell whose budget does not buy a step has none: it is left out.
    """
    cells = {}
    for name in files.names(out / "parts"):
        spans = part_files(out / "parts" / name)
        if not spans:
            continue
        about, tensors = _unpack(next(iter(spans.values())))
        item = about.get("item", {})
        model = record["models"].get(item.get("model"), {})
        if item.get("config") == record["config"] and item.get("digest") == model.get("digest"):
            cell = {**{k: item[k] for k in ("model", "solver", "grid")}, "budget": item["nfe"]}
            cells[tuple(cell.values())] = cell, spans, about, "x" in tensors
    places = {name: {value: i for i, value in enumerate(record["lists"][name])} for name in LISTS}
    for key in sorted(cells, key=lambda key: [places[name].get(v, -1) for name, v in zip(LISTS, key, strict=True)]):
        cell, spans, about, held = cells[key]
        if not wanted(cell) or "failed" in about:
            continue
        n, seed = record["n"], record["settings"]["seed"]
        if not held or not record["settings"]["keep_samples"]:
            raise InputError(f"{words(cell)}: its {n} samples were not kept: run the sweep with --keep-samples")
        parts = [
            (spans[span], {**about["item"], "block": span[0], "a": span[1], "b": span[2]})
            for span in _cover(record, cell, spans)
        ]
        yield Kept(cell, n, [seed + block for block in range(record["settings"]["blocks"])], parts)


def _cover(
    record: Mapping[str, Any], cell: Mapping[str, Any], spans: Mapping[tuple[int, int, int], File]
) -> Iterator[tuple[int, int, int]]:
    """The parts that make up each block, each index once: from where the last one ended, the longest."""
    blocks, size = record["settings"]["blocks"], record["n"] // record["settings"]["blocks"]
    for block in range(blocks):
        at = 0
        while at < size:
            end = max((b for k, a, b in spans if (k, a) == (block, at)), default=0)
            if not at < end <= size:
                raise InputError(f"{words(cell)}: block {block} has no part from sample {at} on: go on with the sweep first")
            yield block, at, end
            at = end


def part_files(folder: File) -> dict[tuple[int, int, int], File]:
    """(block, first, end) -> the file of that part."""
    found = {}
    for name in files.names(folder) if files.is_folder(folder) else ():
        if match := _PART.fullmatch(name):
            block, a, b = map(int, match.groups())
            found[block, a, b] = folder / name
    return found


def _unpack(path: File) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        return files.unpack(files.read(path) or b"")
    except ResultsError as error:
        raise ResultsError(f"{files.show(path)}: {error}; run the sweep again, which makes it again") from None
