"""A folder of results, in which nothing can be lost or doubled. Why, in full:

1. The content of a file is a function of its name (``sweep.Item``), and the name is a function of the sweep.
2. A file appears in one step, whole and sealed (``files.write``, ``files.pack``); one that is damaged is as good as missing.
3. A run makes what is missing until nothing is. A kill, at any moment, leaves some files missing, and that is all it can do.
4. ``results.jsonl`` is made of those files, again and again, and moved into place in one step.

So a worker needs to know nothing of other workers. Claims only keep two from making the same file at once; where they fail, the
file is made twice, with the same bytes.

    sweep.json      the configuration: what must be the same in every run on this folder, and what it has grown to
    results.jsonl   the rows: one metric of one sampler a line, reproducible to the byte
    costs.jsonl     one cell a line: time, memory, overhead. Measured, so never the same twice; made of the log
    log.jsonl       what happened, appended: parts made, batches halved, files found damaged
    parts/ ends/ floors/ rows/    the items;  locks/   claims of living processes
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any, NamedTuple

from torch import Tensor

from sde.errors import ResultsError, RunError

from . import files
from .claims import Claims
from .record import SWEEP as SWEEP
from .record import compare, grown, read_sweep, render, wanted_record
from .sweep import ENDING, LISTS, SCHEMA, Facts, Item, Sweep, digest, settings

KINDS = ("end", "part", "floor", "row")
FOLDERS = tuple(f"{kind}s" for kind in KINDS)
RESULTS, COSTS, LOG, PREVIEW, LOCKS, ASIDE = (
    "results.jsonl",
    "costs.jsonl",
    "log.jsonl",
    "preview.png",
    "locks",
    "aside",
)
OURS = {SWEEP, RESULTS, COSTS, LOG, PREVIEW, LOCKS, ASIDE, "report.html", "export", *FOLDERS}

#: Seconds to wait for what another process holds, before doing it as well.
PATIENCE = 60.0

_LEAF = re.compile(rf"[A-Za-z0-9_+-]+-[0-9a-f]{{12}}{ENDING}|\d+\.\d{{9}}-\d{{9}}{ENDING}")
_CELL = re.compile(r"[A-Za-z0-9_+-]+-[0-9a-f]{12}")
_PARTIAL = re.compile(r"\..+\.([0-9a-f]{16})\.partial")


class HeldError(RunError):
    """Another process uses the folder for something that cannot be shared."""


class Held(NamedTuple):
    """What an item holds: what was said of it, and its tensors."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass
class Audit:
    """What a look at every file has found: how many are whole, which were damaged (they are removed, to be made again), and
    which are nobody's (they are left alone).
    """

    whole: int = 0
    damaged: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


class Store:
    """The folder, for one worker. ``words`` say who that is."""

    def __init__(self, out: File, words: str) -> None:
        self.out = files.folder(out)
        strange = self._strange()
        if strange and not files.exists(out / SWEEP):
            shown = ", ".join(map(files.show, strange[:3]))
            raise RunError(f"--out {files.show(out)}: holds other files ({shown}) and no results: give an empty folder")
        self.config, self.record = "", dict[str, Any]()
        self.words, self.others = words, list[str]()  # who else is at work here
        self.claims = Claims(out / LOCKS, words)

    def close(self) -> None:
        self.claims.close()

    # --- the configuration

    def open(self, sweep: Sweep, models: Sequence[Facts], code: Mapping[str, str], origin: Mapping[str, Any]) -> None:
        """Make the folder one of this sweep, or see that it is. ResultsError names what is different; with ``force_new`` it is
        thrown away, but for what others are at work on. Workers that are started together may all say so: the first one clears.
        """
        self.config = digest({"schema": SCHEMA, "settings": settings(sweep), "code": code})[:16]
        with self.claim("sweep", PATIENCE):
            self.others = self.claims.at_work()
            found = read_sweep(self.out)
            wanted = wanted_record(sweep, models, code, origin, self.config)
            if found is not None:
                try:
                    compare(found, wanted, self.out)
                except ResultsError:
                    if not sweep.force_new:
                        raise
                    self._clear()
                    found = None
                else:
                    wanted = grown(found, wanted)
            if found != wanted:
                self._write(SWEEP, render(wanted))
            self.record = wanted
            self.claims.start()
        self._clean(self.out)
        for name in FOLDERS:
            self._clean(files.subfolder(self.out / name))

    def _clear(self) -> None:
        """Remove our own files, the configuration first."""
        if self.others:
            raise HeldError(
                f"--force-new: {files.show(self.out)} is in use by {'; '.join(self.others)}: stop it first, or, if it is long "
                f"gone, remove the folder {LOCKS} in it"
            )
        for name in (SWEEP, RESULTS, COSTS, LOG, PREVIEW):
            files.remove(self.out / name)
        for path, _ in self._leaves():
            if _LEAF.fullmatch(path.name):
                files.remove(path)
        for name in FOLDERS:
            for inner in files.names(self.out / name):
                files.remove_folder(self.out / name / inner)

    # --- items

    def has(self, item: Item | str) -> bool:
        return files.exists(self.out / (item if isinstance(item, str) else item.path))

    def get(self, item: Item) -> Held:
        """What the item's file holds. ResultsError: missing, damaged, or another item's."""
        data = files.read(self.out / item.path)
        if data is None:
            raise ResultsError(f"{item.path}: is missing")
        try:
            about, tensors = files.unpack(data)
        except ResultsError as error:
            raise ResultsError(f"{item.path}: {error}") from None
        if about.get("item") != files.plain(item.about):
            raise ResultsError(f"{item.path}: is another item's file")
        return Held(about, tensors)

    def put(self, item: Item, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the item's file, unless another worker has. Where rounding is not the same twice, what was built on the first
        one stays true.
        """
        path = self.out / item.path
        if self.has(item):
            return
        if item.path.count("/") > 1:
            files.subfolder(path.parent)
        if files.is_folder(path):
            self._set_aside(path)
        self._write(item.path, files.pack({"item": item.about, **about}, tensors))

    def drop(self, item: Item) -> bool:
        """Remove the item's file if it is damaged. False: it is whole (another worker has made it again)."""
        with self.claim(item.path) as mine:
            if not mine:
                return True
            try:
                self.get(item)
            except ResultsError:
                path = self.out / item.path
                if files.exists(path):
                    files.remove(path)
                elif files.there(path):
                    self._set_aside(path)
                return True
            return False

    @contextmanager
    def claim(self, path: str, wait: float = 0.0) -> Iterator[bool]:
        """Hold an item, or another name, while inside. Gives whether it is held; waits so many seconds for it."""
        name = f"{path.replace('/', '.').removesuffix(ENDING)}.lock"
        end, mine = time.monotonic() + wait, self.claims.take(name)
        while not mine and time.monotonic() < end:
            time.sleep(0.02)
            mine = self.claims.take(name)
        try:
            yield mine
        finally:
            if mine:
                self.claims.give(name)

    def audit(self, items: Iterable[Item]) -> Audit:
        """Look at every byte of the items' files, and at every name beside them."""
        found = Audit()
        for item in items:
            if not files.there(self.out / item.path):
                continue
            try:
                self.get(item)
                found.whole += 1
            except ResultsError as error:
                if self.drop(item):
                    found.damaged.append(str(error))
                    self.log("damaged", path=item.path, why=str(error))
        found.foreign += map(files.show, self._strange())
        for path, ours in self._leaves():
            if not ours:
                found.foreign.append(files.show(path.relative_to(self.out)))
        return found

    def _strange(self) -> list[str]:
        """Names in the folder itself that are not ours."""
        return [name for name in files.names(self.out) if name not in OURS and not _PARTIAL.fullmatch(name)]

    def _leaves(self) -> Iterator[tuple[File, bool]]:
        """Every path below the items' folders, and whether its name is one of ours."""
        for name in FOLDERS:
            for inner in files.names(self.out / name):
                path = self.out / name / inner
                if not _CELL.fullmatch(inner) or not files.is_folder(path):
                    yield path, bool(_LEAF.fullmatch(inner) or _PARTIAL.fullmatch(inner))
                    continue
                for leaf in files.names(path):
                    yield path / leaf, bool(_LEAF.fullmatch(leaf) or _PARTIAL.fullmatch(leaf))

    def _set_aside(self, path: File) -> None:
        """Something that is no file is where one belongs: it may be somebody's, so it is moved, not removed."""
        place = files.subfolder(self.out / ASIDE)
        taken = files.names(place)
        name = next(f"{path.name}.{k}" for k in range(len(taken) + 1) if f"{path.name}.{k}" not in taken)
        files.move(path, place / name)
        self.log("set aside", path=str(path.relative_to(self.out)), to=f"{ASIDE}/{name}")

    def _clean(self, folder: File) -> None:
        """Remove what killed processes were writing."""
        for name in files.names(folder):
            path = folder / name
            match = _PARTIAL.fullmatch(name)
            if match and not self.claims.alive(match[1]):
                files.remove(path)
            elif _CELL.fullmatch(name) and files.is_folder(path):
                self._clean(path)

    def _write(self, name: str, data: bytes) -> None:
        files.write(self.out / name, data, self.claims.token)

    # --- what is read by people

    def log(self, event: str, **words: Any) -> None:
        record = {"event": event, "config": self.config, **words, "worker": self.words, "time": round(time.time(), 3)}
        files.append(self.out / LOG, record)

    def publish(self) -> list[dict[str, Any]]:
        """Write ``results.jsonl`` and ``costs.jsonl`` from what there is; the rows."""
        with self.claim("results", PATIENCE):
            record = read_sweep(self.out) or {}
            # looked at again after each time it is written: should the claim not hold, an older view must not be the last
            while (new := b"".join(map(files.seal, rows := self._rows(record)))) != files.read(self.out / RESULTS):
                self._write(RESULTS, new)
            log, _ = files.unseal_lines(files.read(self.out / LOG) or b"")
            costs = b"".join(map(files.seal, costs_of(log, record, self.config)))
            if costs != files.read(self.out / COSTS):
                self._write(COSTS, costs)
        return rows

    def _rows(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Rows of all cells that are done, in the order of the sweep; of a cell that has grown, the newest."""
        newest: dict[tuple[Any, ...], tuple[int, list[dict[str, Any]]]] = {}
        for name in files.names(self.out / "rows"):
            if not _LEAF.fullmatch(name):
                continue
            try:
                about, _ = files.unpack(files.read(self.out / "rows" / name) or b"")
            except ResultsError:
                continue
            item = about["item"]
            if item["config"] != self.config or record.get("models", {}).get(item["model"], {}).get("digest") != item["digest"]:
                continue
            key = tuple(item.get(k) for k in ("model", "metric", "solver", "grid", "nfe"))
            if key not in newest or item["n"] > newest[key][0]:
                newest[key] = item["n"], about["rows"]
        order = {k: {v: i for i, v in enumerate(values)} for k, values in record.get("lists", {}).items()}

        def rank(key: tuple[Any, ...]) -> tuple[Any, ...]:
            model, metric, *cell = key
            places = [order.get(k, {}).get(v, -1) for k, v in zip(("solver", "grid", "nfe"), cell, strict=True)]
            return order["model"].get(model, -1), *places, metric or ""

        return [row for key in sorted(newest, key=rank) for row in newest[key][1]]


# --- reading ------------------------------------------------------------------------------------------------------------------


class Results(NamedTuple):
    """What a folder of results says. ``rows`` are joined with their ``cost`` (None where none was logged); ``damaged`` counts
    lines that are not what was written; ``missing`` are the cells (model, solver, grid, nfe) without rows of the full n.
    """

    rows: list[dict[str, Any]]
    costs: list[dict[str, Any]]
    sweep: dict[str, Any]
    damaged: int
    missing: list[tuple[Any, ...]]


def read(out: File) -> Results:
    """The results in a folder, finished or not. ResultsError: there are none, or they are of a newer version."""
    sweep = read_sweep(out)
    if sweep is None:
        raise ResultsError(
            f"{files.show(out)}: holds no results ({SWEEP} is missing); make some with: python -m benchmarks run"
        )
    rows, bad = files.unseal_lines(files.read(out / RESULTS) or b"")
    costs, torn = files.unseal_lines(files.read(out / COSTS) or b"")
    by_cell = {cell_of(cost): cost for cost in costs}
    for row in rows:
        row["cost"] = by_cell.get(cell_of(row))
    have = {cell_of(row) for row in rows if row.get("asked") == sweep["n"]}
    lists = sweep["lists"]
    wanted = [(m, s, g, b) for m in lists["model"] for s in lists["solver"] for g in lists["grid"] for b in lists["nfe"]]
    return Results(rows, costs, sweep, bad + torn, [cell for cell in wanted if cell not in have])


# --- what it cost -------------------------------------------------------------------------------------------------------------


def cell_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """(model, solver, grid, budget): what rows and costs are joined by."""
    values = (row.get(k) for k in ("model", "solver", "grid", "budget"))
    return tuple(v if isinstance(v, (str, int)) else repr(v) for v in values)  # a stranger's row may hold anything


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
        peaks = [p["peak_memory"] for p in ran if p["peak_memory"] is not None]
        yield {
            **dict(zip(("model", "solver", "grid", "budget"), cell, strict=True)),
            "parts": len(ran),
            "samples": samples,
            "seconds": seconds,
            "samples_per_second": samples / seconds if seconds else None,
            "seconds_per_call": spread([p["seconds"] / p["calls"] for p in ran]),
            "device_seconds_per_call": spread(device) if device else None,
            "overhead": spread([p["seconds"] / p["network_seconds"] - 1.0 for p in ran if p["network_seconds"]]),
            "peak_memory": max(peaks, default=None),
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
