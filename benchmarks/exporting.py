"""``python -m benchmarks export DIR``: results as tables, and kept samples as the evaluation scripts of others want them.

    csv       rows.csv: a line a row (``benchmarks.tables``)
    parquet   rows.parquet: the same, typed; needs pyarrow
    latex     rows.tex: a table a model and metric
    adm       NAME.npz, ``arr_0`` (n, H, W, 3) uint8, for guided-diffusion's evaluations/evaluator.py; grey is repeated
    edm       NAME/000000/000000.png ..., folders of a thousand, for fid.py calc --images=NAME of EDM and EDM2

A cell's samples are exported whole or not at all: n of them, in the order of blocks and indices. Numbers become bytes as EDM
has them, 127.5 x + 128 cut to 0 ... 255, that is rounded to nearest.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as File
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from torch import Tensor

from sde.errors import InputError, nearest

from . import files, problems, store, tables
from .kept import Kept, kept
from .sweep import LISTS, digest

ROWS = {
    "csv": ("rows.csv", tables.to_csv),
    "parquet": ("rows.parquet", tables.to_parquet),
    "latex": ("rows.tex", tables.to_latex),
}


@dataclass(frozen=True)
class Export:
    """Results of a sweep as tables (csv, parquet, latex), and its samples for the scripts of ADM and EDM."""

    folder: Annotated[File, tyro.conf.Positional]
    """Folder of results, as ``benchmarks run --out`` had it."""
    to: tuple[Literal["csv", "parquet", "latex", "adm", "edm"], ...] = ("csv", "latex")
    """Formats. adm and edm want a sweep that was run with --keep-samples."""
    out: File | None = None
    """Where the files go; default: a folder ``export`` in the folder of results."""
    model: tuple[str, ...] = ()
    """Only these models."""
    solver: tuple[str, ...] = ()
    """Only these samplers."""
    grid: tuple[str, ...] = ()
    """Only these grids."""
    nfe: tuple[int, ...] = ()
    """Only these budgets."""
    metric: tuple[str, ...] = ()
    """Only these metrics; of tables."""
    low: float = -1.0
    """The number that is black, in samples."""
    high: float = 1.0
    """The number that is white."""
    picture: tuple[int, ...] = ()
    """Channels, height and width of a sample; default: the shape that the model gives."""


def run(config: Export) -> int:
    """Write what was asked for, and say where it is."""
    if not config.to or len(set(config.to)) < len(config.to):
        raise InputError(f"--to {' '.join(config.to)}: give at least one format, each once")
    found = store.read(config.folder)
    _check_choice(config, found)
    if found.damaged:
        print(f"benchmarks export: {found.damaged} lines are damaged and left out; run the sweep again", file=sys.stderr)
    if found.missing:
        print(f"benchmarks export: {len(found.missing)} cells are not done yet", file=sys.stderr)
    out = files.folder(config.out or config.folder / "export")
    rows = [row for row in found.rows if _chosen(config, row)]
    for name, make in (ROWS[kind] for kind in config.to if kind in ROWS):
        if not rows:
            raise InputError(f"{files.show(config.folder)}: no rows of what was asked for; go on with the sweep first")
        files.write(out / name, make(rows))
        print(f"{len(rows)} rows in {files.show(out / name)}")
    for kind in (kind for kind in config.to if kind not in ROWS):
        _export_samples(config, found, kind, out)
    return 0


def _check_choice(config: Export, found: store.Results) -> None:
    """What was asked for alone is there at all."""
    known = {name: found.sweep["lists"][name] for name in LISTS}
    known["metric"] = found.sweep["settings"]["metric"]
    for name, values in known.items():
        for wanted in getattr(config, name):
            if wanted not in values:
                raise InputError(f"--{name} {wanted}: is not in this sweep: {nearest(str(wanted), map(str, values))}")


def _chosen(config: Export, row: Mapping[str, Any]) -> bool:
    wanted = {"model": config.model, "solver": config.solver, "grid": config.grid, "budget": config.nfe}
    return all(not values or row[key] in values for key, values in (wanted | {"metric": config.metric}).items() if key in row)


# --- samples ------------------------------------------------------------------------------------------------------------------


def _export_samples(config: Export, found: store.Results, kind: str, out: File) -> None:
    cells = list(kept(config.folder, found.sweep, lambda cell: _chosen(config, cell)))
    if not cells:
        raise InputError(f"{files.show(config.folder)}: no samples of what was asked for; run the sweep with --keep-samples")
    shapes = [_picture(config, found, cell) for cell in cells]  # nothing is written where one is wrong
    taken = set[str]()
    for cell, shape in zip(cells, shapes, strict=True):
        name = re.sub(r"[^A-Za-z0-9_+]+", "-", "-".join(map(str, cell.cell.values())))[:80].strip("-")
        name = name if name not in taken else f"{name}-{digest(cell.cell)[:8]}"
        taken.add(name)
        bytes_of = (_bytes(config, x, shape) for x in cell.read())
        if kind == "adm":
            place = out / f"{name}.npz"
            files.write(place, lambda path, b=bytes_of, c=cell, s=shape: write_npz(path, b, (c.n, *s[1:], 3)))
        else:
            place = out / name
            write_pngs(place, bytes_of, cell.n)
        about = {**cell.cell, "n": cell.n, "seeds": cell.seeds, "config": found.sweep["config"]}
        files.write(out / f"{name}.json", json.dumps(about, indent=1) + "\n")
        print(f"{cell.n} samples of {cell} in {files.show(place)}")


def _picture(config: Export, found: store.Results, cell: Kept) -> tuple[int, int, int]:
    """(C, H, W) of a sample, of 1 or 3 channels."""
    name = cell.cell["model"]
    shape = tuple(found.sweep["models"][name]["shape"])
    wanted = config.picture or (shape if len(shape) == 3 else None)
    if wanted is None and name.partition(":")[0] in problems.PROBLEMS:
        wanted = problems.get(name).picture
    if wanted is None or len(wanted) != 3 or np.prod(wanted) != np.prod(shape) or wanted[0] not in (1, 3):
        said = f"--picture {' '.join(map(str, wanted))}" if wanted else "no picture"
        raise InputError(f"{files.show(name)}: samples of shape {shape}, {said}: adm and edm want pictures, (1 or 3, H, W)")
    return wanted  # pyright: ignore[reportReturnType]


def _bytes(config: Export, x: Tensor, shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Samples as bytes (B, H, W, C)."""
    if not config.low < config.high:
        raise InputError(f"--low {config.low:g} --high {config.high:g}: black must be below white")
    level = 2.0 * (x.double() - config.low) / (config.high - config.low) - 1.0
    return problems.to_bytes(level).reshape(-1, *shape).permute(0, 2, 3, 1).contiguous().numpy()


# --- the formats of others ----------------------------------------------------------------------------------------------------


def write_npz(path: File, parts: Iterator[np.ndarray[Any, Any]], shape: tuple[int, ...]) -> None:
    """An ``.npz`` of one array ``arr_0`` of ``shape``, (n, H, W, 3) uint8, from parts (B, H, W, 1 or 3); one part in memory.

    InputError where the parts do not have n pictures together.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    written = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        name = zipfile.ZipInfo("arr_0.npy", (1980, 1, 1, 0, 0, 0))  # no clock: the same samples are the same file
        with archive.open(name, "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for part in parts:
                stream.write(np.ascontiguousarray(np.broadcast_to(part, (*part.shape[:3], 3))).tobytes())
                written += len(part)
    if written != shape[0]:
        raise InputError(f"{written} pictures where {shape[0]} were asked for")


def write_pngs(place: File, parts: Iterator[np.ndarray[Any, Any]], n: int) -> None:
    """A folder of n PNGs, numbered, a thousand to a subfolder. It appears in one step, whole; one that is there is refused."""
    if files.there(place):
        raise InputError(f"{files.show(place)}: is there already: move it away, or give another --out")
    partial = place.with_name(f".{place.name}.partial")
    count = 0
    with files.trouble(place, "written"):
        if partial.is_dir():  # of an export that was killed
            shutil.rmtree(partial)
        for part in parts:
            for pixels in part:
                folder = partial / f"{count - count % 1000:06d}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{count:06d}.png").write_bytes(png_bytes(pixels))
                count += 1
    if count != n:
        raise InputError(f"{files.show(place)}: {count} pictures where {n} were asked for")
    files.move(partial, place)


def png_bytes(pixels: np.ndarray[Any, Any]) -> bytes:
    """A PNG of bytes (H, W), (H, W, 1) or (H, W, 3)."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise InputError(f"pixels of {pixels.dtype} {pixels.shape}: give uint8 (H, W), (H, W, 1) or (H, W, 3)")
    if 0 in pixels.shape:
        raise InputError(f"pixels of shape {pixels.shape}: a picture has at least one")
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 and pixels.shape[2] == 3 else 0
    rows = pixels.reshape(height, -1)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1).tobytes()  # a line begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, chunks))


def _chunk(chunk: tuple[bytes, bytes]) -> bytes:
    kind, data = chunk
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
