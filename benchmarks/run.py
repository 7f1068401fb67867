"""``python -m benchmarks run``: make what is missing in a folder of results, until nothing is.

One worker is this loop. Several are several processes on one folder: the same command twice, or under torchrun, of which only
RANK, LOCAL_RANK and WORLD_SIZE are read. No worker waits for another; each takes what nobody has made or claimed.
"""

from __future__ import annotations

import io
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, ResultsError, RunError, ToolkitError, nearest
from solvers import GRIDS

from . import files, metrics, provenance
from .lines import Line, resolve_line
from .making import Maker
from .models import Model, load, look
from .progress import Progress, Screen, words
from .store import PATIENCE as PATIENCE
from .store import PREVIEW, RESULTS, HeldError, Store
from .sweep import Cell, Facts, Item, Measures, Sweep, check, items
from .sweep import defaults as defaults


@dataclass(frozen=True)
class Place:
    """Which worker this is."""

    rank: int = 0
    local: int = 0
    world: int = 1

    @staticmethod
    def here(environment: Mapping[str, str] = os.environ) -> Place:
        """From the variables of torchrun, where they are set."""
        try:
            rank, local, world = (int(environment.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
        except ValueError:
            raise InputError("RANK, LOCAL_RANK and WORLD_SIZE must be numbers, as torchrun sets them") from None
        if not 0 <= rank < world:
            raise InputError(f"RANK={rank}, WORLD_SIZE={world}: the rank must be below the size, as torchrun sets them")
        return Place(rank, local, world)


def run(sweep: Sweep) -> int:
    """Carry the sweep out, or go on with it. 0 done, 3 the folder is in other use, 130 and 143 interrupted."""
    place, out = Place.here(), Screen()
    check(sweep)
    for name in sweep.model:
        look(name)
    device = _device(sweep.device, place)
    lines = {name: _line(name) for name in sweep.solver}
    chosen = {name: metrics.metric(name) for name in sweep.metric}
    known = _grids(lines)
    for grid in sweep.grid:
        if grid not in known:
            raise InputError(f"--grid {grid!r} is unknown: {nearest(grid, known)}")
    torch.set_num_threads(sweep.threads)
    store = None
    try:
        with Signals() as signals:
            store = Store(sweep.out, _words(place))
            worker = Worker(sweep, place, device, store, lines, chosen, signals, out)
            worker.work()
    except HeldError as error:
        print(f"benchmarks run: {error}", file=sys.stderr)
        return 3
    except Stopped as stopped:
        if place.rank == 0:
            out.warn(f"stopped; what is made is kept. Go on with the same command:\n  {command(sweep)}")
        return stopped.status
    finally:
        if store is not None:
            store.close()
    return 0


class Worker:
    """One process at work on a folder."""

    def __init__(
        self,
        sweep: Sweep,
        place: Place,
        device: torch.device,
        store: Store,
        lines: dict[str, Line],
        chosen: dict[str, Any],
        signals: Signals,
        out: Screen,
    ) -> None:
        self.sweep, self.place, self.device, self.store = sweep, place, device, store
        self.signals, self.out = signals, out
        self._loaded: Model | None = None
        self._facts: dict[str, Facts] = {}
        self.maker = Maker(sweep, store, self.model, lines, chosen, seen=self._preview)
        self._pictured, self._published, self._longest = time.monotonic(), -1e9, 0.0
        self._no_preview = not sweep.preview or place.rank > 0

    def model(self, name: str) -> Model:
        """The model, loaded; one at a time is kept. RunError: it is no longer the one that this run began with."""
        if self._loaded is None or self._loaded.facts.name != name:
            self._loaded = None
            self._loaded = load(name, self.sweep, self.device)
            first = self._facts.setdefault(name, self._loaded.facts)
            if self._loaded.facts != first:
                raise RunError(
                    f"--model {name}: its weights, data or code have changed while the sweep ran: what is made is kept"
                )
        return self._loaded

    def work(self) -> None:
        """Everything, from an empty folder or from wherever it stands."""
        code = {**provenance.code(), **provenance.named(self.sweep.metric)}
        plans = [(self.model(name).facts, self._measures(self.model(name))) for name in self.sweep.model]
        origin = {
            "versions": provenance.versions(),
            "git": provenance.commit(),
            "device": provenance.device_name(self.device),
        }
        self.store.open(self.sweep, [facts for facts, _ in plans], code, origin)
        if self.store.others and self.place.world == 1:
            self.out.warn(f"sharing the work with {'; '.join(self.store.others)}")
        todo = [i for facts, measures in plans for i in items(self.sweep, self.store.config, facts, measures)]
        self.maker.items = {item.path: item for item in todo}
        self._audit(todo)
        if self.place.rank == 0:
            self.out.warn(self._begins(todo))
            self._warn_of(self._refused(todo))
        with self.out.progress(todo, quiet=self.place.rank > 0) as progress:
            self._make_all(todo, progress)
        rows = self.store.publish()
        if self.place.rank == 0:
            self.out.say(f"{len(rows)} row{'s' * (len(rows) != 1)} in {files.show(self.store.out / RESULTS)}")
            self._say_without(rows)
            self.out.say(f"Next: python -m benchmarks report {quoted(str(self.sweep.out))}")

    def _begins(self, todo: list[Item]) -> str:
        """What there is to do: said first, since floors may take a while before there is a row."""
        sweep, parts = self.sweep, [item for item in todo if item.kind == "part"]
        count = len({item.path.rpartition("/")[0] for item in parts})
        missing = [item for item in todo if not self.store.has(item)]
        said = f"{count} cell{'s' * (count != 1)} of {sweep.n} samples in {sweep.blocks} blocks: {len(parts)} parts"
        if not missing:
            return f"{said}; all there"
        return f"{said}; {len(missing)} of {len(todo)} files to make, first {words(missing[0])}"

    def _refused(self, todo: list[Item]) -> dict[str, list[str]]:
        """The cells that have samples to be made and are known to get none: by the reason why."""
        missing = [item.about for item in todo if item.kind == "part" and not self.store.has(item)]
        found: dict[str, list[str]] = {}
        for cell in dict.fromkeys(Cell(about["model"], about["solver"], about["grid"], about["nfe"]) for about in missing):
            model = self.model(cell.model)
            ends = {"start": model.problem.start, "stop": model.problem.stop}
            line = self.maker.lines[cell.solver]
            why = line.refuses(model.score, nfe=cell.nfe, grid=cell.grid, eta=self.sweep.eta, **ends)
            if why is not None:
                found.setdefault(why, []).append(" ".join(map(str, cell)))
        return found

    def _warn_of(self, refused: dict[str, list[str]]) -> None:
        if count := sum(map(len, refused.values())):
            self.out.warn(f"{count} cell{'s' * (count != 1)} cannot be made; the rows will have no value:")
        for why, names in refused.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.out.warn(f"  {files.show(', '.join(names[:3]))}{more}: {files.show(why)}")

    def _say_without(self, rows: list[dict[str, Any]]) -> None:
        """Last, and by their reasons: the rows that have no value."""
        without = Counter(row["note"] for row in rows if row["value"] is None)
        if count := without.total():
            self.out.say(f"{count} of them {'has' if count == 1 else 'have'} no value, and `note` there says why:")
        for note, times in without.most_common(5):
            self.out.say(f"  {times}: {files.show(note)}")
        if len(without) > 5:
            self.out.say(f"  {len(without) - 5} more reasons")

    def _measures(self, model: Model) -> Measures:
        """What the metrics ask for on a model. InputError for files that they name and that are no use."""
        blocks, problem = self.maker.blocks(), model.problem
        for text, metric in self.maker.metrics.items():
            try:
                metric.check(problem)
            except InputError as error:
                raise InputError(f"--metric {text}: {error}") from None
        found = {text: metric for text, metric in self.maker.metrics.items() if metric.available(problem) is None}
        valued = {text: metric for text, metric in found.items() if metrics.too_few(metric, problem, blocks) is None}
        keys = {text: metrics.floor_key(metric, problem, blocks) for text, metric in valued.items()}
        return Measures(
            lines=self.maker.lines,
            floors={text: key for text, key in keys.items() if key is not None},
            alone=tuple(text for text, metric in self.maker.metrics.items() if metric.needs == "model"),
            cells=any(metric.needs != "model" for metric in self.maker.metrics.values()),
            sampled=any(metric.needs in ("statistics", "samples") for metric in self.maker.metrics.values()),
            ends=any(metric.wants_end for metric in found.values()),
        )

    def _audit(self, todo: list[Item]) -> None:
        """Every file that is there is read once, before anything is built on it; workers of a torchrun share this too."""
        found = self.store.audit(todo[self.place.rank :: self.place.world])
        for what, names in (("damaged, made again", found.damaged), ("not ours, left alone", found.foreign)):
            if names and (self.place.rank == 0 or what.startswith("damaged")):
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                self.out.warn(f"{what}: {'; '.join(names[:5])}{more}")

    # --- the loop

    def _make_all(self, todo: list[Item], progress: Progress) -> None:
        """Make what is missing and free, until nothing is missing."""
        waited: list[Item] = []
        since = 0.0
        while missing := [item for item in todo if not self.store.has(item)]:
            progress.remaining(missing)
            made, busy = self._make_free(missing, progress)
            if made or not busy:
                continue
            if busy != waited:  # their holders are alive and at work
                waited, since = busy, time.monotonic()
            elif time.monotonic() - since > max(PATIENCE, 4.0 * self._longest):
                # whoever holds these may hang, or be lost where nobody can see it: they are made here as well
                self.store.log("made without a claim", path=busy[0].path)
                self._make(busy[0])
                waited = []
            time.sleep(0.1)

    def _make_free(self, missing: list[Item], progress: Progress) -> tuple[bool, list[Item]]:
        """One pass: (whether anything was made, what others hold)."""
        made, busy = False, []
        for item in missing:
            self.signals.check()
            if self.store.has(item) or not all(self.store.has(need) for need in item.needs):
                continue
            with self.store.claim(item.path) as mine:
                if not mine:
                    busy.append(item)
                elif not self.store.has(item):
                    progress.begins(item)
                    if self._make(item):
                        made = True
                        progress.done(item)
        return made, busy

    def _make(self, item: Item) -> bool:
        """Make one item. False: something that it is made of was damaged, and is missing now."""
        began = time.monotonic()
        try:
            about, tensors, cost = self.maker.make(item)
        except ResultsError as error:
            self.out.warn(f"damaged, made again: {error}")
            return False
        if cost:  # logged first: a kill between the two costs a part, whose next entry counts instead of this one
            cell = {k: item.about[k] for k in ("model", "solver", "grid")}
            self.store.log("part", path=item.path, **cell, budget=item.about["nfe"], **cost)
        self.store.put(item, about, tensors)
        took = time.monotonic() - began
        self._longest = max(self._longest, took)
        if item.kind == "rows":
            self.out.rows(about["rows"])
            self._publish()
        return True

    def _publish(self) -> None:
        """Show what is done so far, as often as that takes little of the time."""
        began = time.monotonic()
        if began < self._published:
            return
        self.store.publish()
        self._published = time.monotonic() + max(1.0, 20.0 * (time.monotonic() - began))

    def _preview(self, model: Model, x: Tensor) -> None:
        """Show the newest samples now and then. What goes wrong here costs the picture, not the run."""
        if self._no_preview or time.monotonic() - self._pictured < self.sweep.preview:
            return
        self._pictured = time.monotonic()
        try:
            files.write(self.store.out / PREVIEW, picture(model, x), self.store.claims.token)
        except (ToolkitError, ImportError) as error:
            self._no_preview = True
            self.out.warn(f"no preview: {error}")


def picture(model: Model, x: Tensor) -> bytes:
    """A PNG of the newest samples."""
    from PIL import Image  # matplotlib brings it

    found = io.BytesIO()
    Image.fromarray(model.problem.preview(x)).save(found, "PNG")
    return found.getvalue()


# --- stopping ---------------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """A signal said so. Not an Exception: nothing on the way may take it for a failure and go on."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Signals:
    """Inside, Ctrl-C lets the part in hand end, a second one does not, and SIGTERM stops at once. ``check`` is where work can
    be left. Files appear whole or not at all, so any of them leaves a folder that the same command goes on with.
    """

    def __enter__(self) -> Signals:
        self.asked, self._before = 0, {}
        if threading.current_thread() is threading.main_thread():
            for number, handler in ((signal.SIGINT, self._interrupt), (signal.SIGTERM, self._terminate)):
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        if self.asked:
            raise Stopped(self.asked)

    def _interrupt(self, *_: object) -> None:
        if self.asked:
            raise Stopped(self.asked)
        self.asked = 130
        _tell(b"\nfinishing the part in hand; Ctrl-C again throws it away\n")

    def _terminate(self, *_: object) -> None:
        self.asked = 143  # should a library swallow what is raised here, the next check raises it again
        raise Stopped(143)


def _tell(text: bytes) -> None:
    """To stderr, from a signal handler, where its buffer may be in use."""
    with suppress(OSError):
        os.write(2, text)


# --- the command line's part ------------------------------------------------------------------------------------------------


def command(sweep: Sweep) -> str:
    """The command that goes on with a sweep."""
    plain, words = Sweep(), ["python", "-m", "benchmarks", "run"]
    for f in fields(Sweep):
        value = getattr(sweep, f.name)
        if f.name in ("force_new", "config") or value == getattr(plain, f.name):
            continue
        words.append("-n" if f.name == "n" else f"--{f.name.replace('_', '-')}")
        words += [] if value is True else map(str, value) if isinstance(value, tuple) else [str(value)]
    return " ".join(map(quoted, words))


def quoted(word: str) -> str:
    """A word of a shell's command line, printable."""
    if word.isprintable():
        return shlex.quote(word)
    text = "".join(c if c.isprintable() and c not in "'\\" else f"\\u{ord(c):04x}" for c in word)
    return f"$'{text}'"


def _line(name: str) -> Line:
    try:
        return resolve_line(name)
    except InputError as error:
        raise InputError(f"--solver: {error}") from None


def _grids(lines: Mapping[str, Line]) -> list[str]:
    """Ours, and those that other libraries alone have."""
    theirs = (getattr(getattr(line, "sampler", None), "grids", None) or () for line in lines.values())
    return list(dict.fromkeys([*GRIDS, *(grid for grids in theirs for grid in grids)]))


def _device(text: str, place: Place) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise InputError(f"--device {text!r} is unknown: give cpu, cuda or cuda:1") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = place.local % max(count, 1) if device.index is None else device.index
        if index >= count:
            raise InputError(f"--device {text}: torch sees {count} CUDA devices on this machine; use cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def _words(place: Place) -> str:
    rank = f", rank {place.rank} of {place.world}" if place.world > 1 else ""
    return f"process {os.getpid()} on {socket.gethostname()}{rank}"
