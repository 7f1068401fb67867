"""What a sweep says while it runs: rows as they are done, a bar or a line with the rate and the time left.

Nothing here may end a run: a stdout that is closed is written to no more, and the work goes on.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from . import files
from .sweep import Item

#: Seconds between two lines of progress where there is no terminal to draw a bar on.
EVERY = 60.0

KINDS = {"end": "exact end points", "part": "samples of", "floor": "the floor of", "rows": "the rows of"}


def words(item: Item) -> str:
    """What is being made: the floor of fd on ring2."""
    about = item.about
    return " ".join(filter(None, (KINDS[item.kind], about.get("metric") or about.get("solver"), "on", about.get("model"))))


class Screen:
    """stdout for results, stderr for all else."""

    def __init__(self) -> None:
        self.bar: Any = None
        self._reasons = set[str]()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # LANG=C

    def say(self, text: str) -> None:
        self._print(text, sys.stdout)

    def warn(self, text: str) -> None:
        self._print(text, sys.stderr)

    def _print(self, text: str, stream: Any) -> None:
        if stream is None:
            return
        try:
            if self.bar is not None:
                self.bar.clear()
            print(text, file=stream, flush=True)
            if self.bar is not None:
                self.bar.refresh()
        except (OSError, ValueError):  # closed, or on a full disk
            with suppress(OSError, ValueError):  # what is left in the buffer is written at exit, to nowhere
                descriptor = os.open(os.devnull, os.O_WRONLY)
                os.dup2(descriptor, stream.fileno())
                os.close(descriptor)

    def rows(self, rows: list[dict[str, Any]]) -> None:
        """A line a cell; why a metric has no value is said once."""
        head = " ".join(str(rows[0][k]) for k in ("model", "solver", "grid", "budget") if rows[0][k] is not None)
        self.say(f"{files.show(head)}: {', '.join(map(_short, rows))}")
        for row in rows:
            if row["value"] is None and row["note"] not in self._reasons:
                self._reasons.add(row["note"])
                self.say(f"  {row['metric']}: {files.show(row['note'])}")

    @contextmanager
    def progress(self, todo: Iterable[Item], quiet: bool = False) -> Iterator[Progress]:
        """Inside, the work left is told: by a bar on a terminal, else by a line now and then."""
        found = Progress(todo)
        if not quiet and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            shape = "{percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
            self.bar = tqdm(total=found.total, bar_format=shape, dynamic_ncols=True, mininterval=0.2)
        try:
            found.show = (lambda: None) if quiet else self._drawer(found)
            yield found
        finally:
            if self.bar is not None:
                self.bar.close()
                self.bar = None

    def _drawer(self, found: Progress) -> Any:
        """What shows progress on this screen."""
        said = time.monotonic()

        def line() -> None:
            nonlocal said
            if found.left and time.monotonic() - said >= EVERY:
                said = time.monotonic()
                self.warn(str(found))

        def bar() -> None:
            self.bar.initial = found.before  # made before this run began: no part of its rate
            self.bar.set_postfix_str(found.rate(), refresh=False)
            self.bar.update(found.total - found.left - self.bar.n)

        return line if self.bar is None else bar


class Progress:
    """What is left of a sweep's samples, weighted by what they cost: NFE times numbers a sample."""

    def __init__(self, todo: Iterable[Item]) -> None:
        self.parts = {i.path: (i.weight, i.about["b"] - i.about["a"]) for i in todo if i.kind == "part"}
        self.total = self.left = sum(weight for weight, _ in self.parts.values())
        self.samples = sum(count for _, count in self.parts.values())
        self.before, self._first, self._began = 0.0, 0, 0.0
        self.now = ""
        self.show: Any = lambda: None

    def remaining(self, missing: Iterable[Item]) -> None:
        """These are missing; whatever else there was has been made, by whomever."""
        paths = {item.path for item in missing}
        for path in [path for path in self.parts if path not in paths]:
            self._drop(path)
        if not self._began:
            self._began, self.before, self._first = time.monotonic(), self.total - self.left, self.samples
        self.show()

    def begins(self, item: Item) -> None:
        """This one is next: told until there is a rate to tell."""
        self.now = words(item)
        self.show()

    def done(self, item: Item) -> None:
        if item.path in self.parts:
            self._drop(item.path)
        elif self.samples == self._first:
            self._began = time.monotonic()  # floors come first, and are no part of the rate
        self.show()

    def _drop(self, path: str) -> None:
        weight, count = self.parts.pop(path)
        self.left -= weight
        self.samples -= count

    def rate(self) -> str:
        """350 samples/s, 40 parts left; before the first part is done: 40 parts left, making the floor of fd on ring2"""
        if self.samples == self._first:
            return f"{len(self.parts)} parts left{', making ' * bool(self.now)}{self.now}"
        took = max(1e-9, time.monotonic() - self._began)
        return f"{(self._first - self.samples) / took:.0f} samples/s, {len(self.parts)} parts left"

    def __str__(self) -> str:
        """12 % done, 350 samples/s, 40 parts left, 0:12:10 to go"""
        made = self.total - self.left - self.before
        share = (self.total - self.left) / max(1.0, self.total)
        left = self.left * (time.monotonic() - self._began) / made if made else None
        end = "" if left is None else f", {timedelta(seconds=round(left))} to go"
        return f"{100.0 * share:.0f} % done, {self.rate()}{end}"


def _short(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return f"{row['metric']} -"
    mark = " (within floor)" if row["within_floor"] else ""
    spread = "" if not row["interval"] or None in row["interval"] else f" [{row['interval'][0]:.3g}, {row['interval'][1]:.3g}]"
    return f"{row['metric']} {row['value']:.4g}{spread}{mark}"
