"""Making the files of a sweep: end points, parts, floors, rows. Each is a function of ``item.about`` and the model alone.

A part is sampled in batches of any size, then looked at whole, in the order of its indices, by one thread: its statistics have
the same bits however it was sampled. Statistics of a block are its parts' merged in order.

Memory that runs out halves the batch. A sample that is not finite is an error that says where, or, when asked for, recorded:
then it is in no statistic, and metrics refuse the block, whose count is not the one asked for.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sde.errors import BudgetWarning, NetworkError, ResultsError, RunError, ToolkitError
from solvers.base import non_finite

from . import metrics, provenance
from .endpoints import End
from .lines import Line
from .metrics import Block
from .models import Model
from .peaks import peak_memory
from .store import Held, Store
from .sweep import Item, Sweep

Tensors = dict[str, Tensor]


@dataclass
class Maker:
    """One worker: ``model`` loads what an item is about, ``items`` are those of the sweep by their paths."""

    sweep: Sweep
    store: Store
    model: Callable[[str], Model]
    lines: dict[str, Line]
    metrics: dict[str, Any]
    items: dict[str, Item] = field(default_factory=dict)
    seen: Callable[[Model, Tensor], None] = lambda model, x: None
    batch: int = 0

    def make(self, item: Item) -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
        """(what to say of it, its tensors, what it cost)."""
        make = {"end": self._end, "part": self._part, "floor": self._floor, "rows": self._rows}[item.kind]
        return make(item, self.model(item.about["model"]))

    def needed(self, path: str) -> Held:
        """What another item's file holds; if it is damaged it is removed, so that it is made again, and the error goes on."""
        item = self.items[path]
        try:
            return self.store.get(item)
        except ResultsError as error:
            self.store.drop(item)
            self.store.log("damaged", path=path, why=str(error))
            raise

    # --- end points

    def _end(self, item: Item, model: Model) -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
        a, b = item.about["a"], item.about["b"]
        found: dict[int, Any] = {}

        def solve(lo: int, hi: int) -> None:
            found[lo] = model.problem.end(self._starts(model, item, range(lo, hi)), item.about.get("to_zero", False))

        # step control looks at all samples at once: a batch of another size would be another answer
        batch = b - a if model.problem.exact is not None else self._batch(model, b - a)
        with torch.no_grad():
            self._batches(a, b, batch, solve)
        ends = [found[lo] for lo in sorted(found)]
        return {}, {"x": torch.cat([e.x.cpu() for e in ends]), "error": torch.cat([e.error.cpu() for e in ends])}, {}

    def _starts(self, model: Model, item: Item, indices: Sequence[int]) -> Tensor:
        seed = self.sweep.seed + item.about["block"]
        return model.problem.starts(seed, indices, self.sweep.start, model.dtype, model.device)

    # --- parts

    def _part(self, item: Item, model: Model) -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
        about, a, b = item.about, item.about["a"], item.about["b"]
        line = self.lines[about["solver"]]
        run = _Run(self, item, model, line)
        batch = b - a if line.joint else self._batch(model, b - a)
        with peak_memory(model.device) as peak, _notes() as notes:
            try:
                self._batches(a, b, batch, run, fixed=line.joint)
            except ToolkitError as error:
                if isinstance(error, (NetworkError, RunError)):
                    raise
                return {"failed": str(error), "note": ""}, {}, {}  # this budget does not buy a step, say: true of every part
        x, good = run.x, [i for i in range(a, b) if i not in run.bad]
        said = {
            "digest": hashlib.sha256(raw(x)).hexdigest(),
            "dtype": str(x.dtype).removeprefix("torch."),
            "nfe": run.nfe,
            "net_evals": run.net_evals,
            "steps": run.steps,
            "bad": [[i, *run.bad[i]] for i in sorted(run.bad)],
            "note": "; ".join(notes),
        }
        tensors = self._statistics(item, model, x, good, line)
        keep = self._kept(b - a, a)
        if keep:
            tensors["x"] = x[:keep].clone()
        cost = {
            "samples": b - a,
            "calls": run.calls,
            "batch": min(batch, self.batch or batch),
            "seconds": run.seconds,
            "network_seconds": run.network_seconds,
            "device_seconds": run.device_seconds,
            "peak_memory": peak[0],
            "device": provenance.device_name(model.device),
        }
        return said, tensors, cost

    def _statistics(self, item: Item, model: Model, x: Tensor, good: list[int], line: Line) -> Tensors:
        flow = line.flow(self.sweep.eta)
        wanted = [m for m in self.metrics.values() if m.needs == "statistics" and (flow or not m.flow_only)]
        wanted = [m for m in wanted if m.available(model.problem) is None]
        if not wanted or not good:
            return {}
        a = item.about["a"]
        rows = torch.tensor([i - a for i in good])
        ends = [p for p in item.needs if self.items[p].kind == "end"]
        known = self.needed(ends[0]).tensors if ends else None
        end = None if known is None else End(known["x"][rows], known["error"][rows])
        start = self._starts(model, item, good).cpu()
        with one_thread(), torch.no_grad():
            return dict(metrics.summarise(wanted, model.problem, x[rows], start, good, end))

    def _kept(self, count: int, a: int) -> int:
        """How many of a part's samples its file keeps: all, or the first of the block as far as a metric looks."""
        if self.sweep.keep_samples:
            return count
        return min(count, max(0, self.looked_at() - a))

    def looked_at(self) -> int:
        """How many of a block's samples the metrics look at."""
        return max((m.limit for m in self.metrics.values() if m.needs == "samples"), default=0)

    # --- batches

    def _batch(self, model: Model, count: int) -> int:
        auto = max(1, (1 << 22) // model.problem.dim)
        return max(1, min(count, self.batch or self.sweep.batch or auto))

    def _batches(self, a: int, b: int, batch: int, run: Callable[[int, int], None], fixed: bool = False) -> None:
        """run(lo, hi) over [a, b); a batch for which there is no memory is halved, and so are those after it."""
        lo = a
        while lo < b:
            hi = min(b, lo + batch)
            try:
                run(lo, hi)
            except Exception as error:
                if not _no_memory(error):
                    raise
                if batch == 1 or fixed:
                    hint = "give a smaller --part" if fixed and batch > 1 else "the model does not fit"
                    raise RunError(f"no memory for a batch of {hi - lo} samples ({str(error)[:120]}): {hint}") from None
                short = True
            else:
                short = False
            if short:  # outside of the handler, whose traceback holds the tensors of the failed run
                batch = self.batch = max(1, (hi - lo) // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self.store.log("batch halved", batch=batch)
                continue
            lo = hi

    # --- floors and rows

    def blocks(self) -> list[Block]:
        """The blocks of a sweep without their samples: what a floor is told, and a metric of the model alone."""
        m = self.sweep.n // self.sweep.blocks
        return [Block(asked=m, seed=self.sweep.seed + b) for b in range(self.sweep.blocks)]

    def _floor(self, item: Item, model: Model) -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
        with one_thread():
            metric, blocks = self.metrics[item.about["metric"]], self.blocks()
            found = metrics.floor(metric, model.problem, blocks)
            enough = None if found is None else metrics.enough(metric, model.problem, blocks)
        return {"floor": None if found is None else found.to_dict(), "enough": enough}, {}, {}

    def _rows(self, item: Item, model: Model) -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
        from .rows import rows_alone, rows_of_cell

        with one_thread():
            make = rows_alone if "metric" in item.about else rows_of_cell
            return {"rows": make(self, item, model)}, {}, {}


@dataclass
class _Run:
    """The batches of a part: samples on the host, and what was counted and timed at the network."""

    maker: Maker
    item: Item
    model: Model
    line: Line
    bad: dict[int, tuple[int | None, float | None]] = field(default_factory=dict)
    nfe: int = 0
    net_evals: int = 0
    steps: int = 0
    calls: int = 0
    seconds: float = 0.0
    network_seconds: float = 0.0
    device_seconds: float | None = None

    def __post_init__(self) -> None:
        about, model = self.item.about, self.model
        self.x = torch.full((about["b"] - about["a"], *model.problem.shape), torch.nan, dtype=model.dtype)

    def __call__(self, lo: int, hi: int) -> None:
        good: list[int] | range = range(lo, hi)
        while len(good):
            try:
                made = self._sample(good)
            except NetworkError as error:
                if not error.samples:
                    raise RunError(f"{self._where()}: {error}") from error
                rows, step, t, words = error.samples, error.step, error.t, str(error)
            else:
                rows, step, t, words = non_finite(made), None, None, "its own loop does not say where"
                if not rows:
                    self.x[torch.tensor(good) - self.item.about["a"]] = made.cpu()
                    self.maker.seen(self.model, made)
                    return
            if self.maker.sweep.on_nan == "stop":
                first = good[rows[0]]
                place = "" if step is None else f", step {step + 1}"
                place += "" if t is None else f", t = {t:.6g}"
                raise RunError(
                    f"{self._where()}: {len(rows)} samples are not finite, the first is sample {first} of block "
                    f"{self.item.about['block']}{place} ({words[:200]}). Nothing of this part is written; --on-nan skip "
                    "records such samples and goes on"
                )
            self.bad.update({good[r]: (step, t) for r in rows})
            gone = set(rows)
            good = [i for r, i in enumerate(good) if r not in gone]

    def _where(self) -> str:
        about = self.item.about
        return f"{about['model']}, {about['solver']} on {about['grid']} with {about['nfe']} calls"

    def _sample(self, indices: Sequence[int]) -> Tensor:
        sweep, model, about = self.maker.sweep, self.model, self.item.about
        meter, problem, cuda = model.score, model.problem, model.device.type == "cuda"
        x = self.maker._starts(model, self.item, indices)
        meter.reset()
        if cuda:
            torch.cuda.synchronize(model.device)
        began = time.perf_counter()
        made = self.line.run(
            meter,
            x,
            nfe=about["nfe"],
            grid=about["grid"],
            seed=sweep.seed + about["block"],
            indices=indices,
            eta=sweep.eta,
            start=problem.start,
            stop=problem.stop,
        )
        if cuda:
            torch.cuda.synchronize(model.device)
        if tuple(made.x.shape) != tuple(x.shape):
            raise RunError(f"{self._where()}: {self.line.name} returned shape {tuple(made.x.shape)} for {tuple(x.shape)}")
        seconds, device = time.perf_counter() - began, meter.device_seconds
        self.seconds += seconds
        self.network_seconds += meter.seconds if device is None else device
        self.device_seconds = None if device is None else (self.device_seconds or 0.0) + device
        self.calls += meter.nfe
        # a sampler that decides how many calls it makes decides for each sample: the part's is the largest
        self.nfe, self.net_evals = max(self.nfe, meter.nfe), max(self.net_evals, meter.net_evals)
        self.steps = max(self.steps, made.steps or 0)
        return made.x.to(model.dtype)


def raw(x: Tensor) -> bytes:
    """The bytes of samples, in order of their indices."""
    return x.detach().cpu().contiguous().numpy().tobytes()


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums over samples have the same bits whatever the number of threads, if there is one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _notes() -> Iterator[list[str]]:
    """What a run warns of because of what was asked for, each once; warnings that depend on the process pass through."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BudgetWarning)
        try:
            yield found
        finally:
            kept = [w for w in caught if issubclass(w.category, BudgetWarning)]
            found += dict.fromkeys(str(w.message) for w in kept)
    for w in caught:
        if w not in kept:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


def _no_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is memory that has run out."""
    for _ in range(10):
        if error is None:
            return False
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and "not enough memory" in str(error):  # torch's allocator on the host
            return True
        error = error.__cause__ or error.__context__
    return False
