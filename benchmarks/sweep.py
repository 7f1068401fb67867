"""What a sweep is: options, cells, and the files that it comes down to.

A sweep is a set of cells (model, sampler, grid, NFE). A cell is n samples in ``blocks`` disjoint streams of noise, seed,
seed + 1, ...; sample i of a stream is a function of (seed, i). Streams are made in parts, consecutive indices [a, b), and a
part is a file. Four kinds of files, each a function of what its name stands for:

    end     where the exact flow ends from the start noise of a part: shared by all samplers of the model that end there, at
            the sweep's last time or at sigma = 0
    part    digest, counts, mergeable statistics (and, where asked for, the samples) of one part of one cell
    floor   what a metric gives for a perfect sampler of the same size
    rows    the rows of one cell: made of its parts and floors

``Item.about`` is everything that the content depends on; its sha256 is in the path, so that two configurations never meet in
one file. How many samples a network call takes, who makes a part, when and in which order is in none of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path as File
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from sde.errors import InputError, nearest

from . import files

SCHEMA = 1
"""Of all files of a folder of results. Another number is another format."""

SEEDS = 1 << 32


@dataclass(frozen=True)
class Sweep:
    """Samplers against each other: every solver on every grid at every budget, measured against floors, with intervals.

    The same command again goes on where it stopped; the same command elsewhere on the same folder shares the work.
    """

    model: tuple[str, ...] = ()
    """Built-in problems (ring2, gauss64:vp, digits_network, ...), or module:function that returns a Score, or (Score, data)."""
    solver: tuple[str, ...] = ("ddim", "dpmpp_2m", "unipc_3")
    """Names of SOLVERS, or library/name of another library's sampler."""
    nfe: tuple[int, ...] = (4, 6, 8, 10, 20)
    """Budgets: network calls a sample may take."""
    grid: tuple[str, ...] = ("log_snr",)
    """Names of GRIDS."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 10_000
    """Samples of a cell, over all blocks. May grow later."""
    metric: tuple[str, ...] = ("fd", "sliced_w2")
    """Names of METRICS, with settings where wanted: kid, fd:features=raw."""
    out: File = File("out/run")
    """Folder of the results."""
    config: File | None = None
    """A TOML file with any of these options; what is on the command line comes first."""

    seed: int = 0
    """Of the first block's noise; block b has seed + b."""
    blocks: int = 4
    """Disjoint blocks of samples, at least 3: intervals come from them."""
    part: int = 0
    """Samples of a part, the most that a kill can cost. 0: by the size of a sample, 64 to 1000."""
    eta: float | None = None
    """Noise level of samplers that take one; default: each one's own."""
    start: Literal["prior", "marginal"] = "prior"
    """Start noise: the Gaussian that users start from, or the exact marginal, where the problem knows it."""
    start_time: float | None = None
    """First time; default: the problem's own."""
    stop: float | None = None
    """Last time; default: the problem's own."""
    shape: tuple[int, ...] = ()
    """Shape of a sample, for a module:function that does not say: --shape 3 32 32."""

    device: str = "cpu"
    """cpu, cuda or cuda:1. Under torchrun, cuda is the worker's own."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Of the state; the two half ones are of the network only, in a float32 state."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """torch.compile of the network; reduce-overhead records CUDA graphs."""
    batch: int = 0
    """Samples a network call. 0: as many as hold four million numbers. Halved when memory runs out."""
    threads: int = 1
    """Processor threads of a worker; several workers on one folder do more than several threads."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Samples that are not finite: stop and say where, or record them and go on (their cell then gets no value)."""
    keep_samples: bool = False
    """Keep all samples in the part files, for export."""
    preview: float = 60.0
    """Write preview.png of the newest samples every so many seconds. 0: never."""
    force_new: bool = False
    """Throw away what the folder holds, if it is of another configuration."""


#: Options that must be those of the folder. ``models``, code and versions are compared beside them.
SETTINGS = (
    "seed",
    "blocks",
    "part",
    "eta",
    "start",
    "start_time",
    "stop",
    "shape",
    "dtype",
    "compile",
    "metric",
    "keep_samples",
)
#: Options that may grow.
LISTS = ("model", "solver", "grid", "nfe")


def check(sweep: Sweep) -> None:
    """What can be seen to be wrong with the options alone, before anything is loaded or written."""
    if not sweep.model:
        raise InputError("give --model: a built-in problem such as ring2, or my_module:load_score")
    for name in (*LISTS, "metric"):
        values = getattr(sweep, name)
        if not values or len(set(values)) < len(values):
            raise InputError(f"--{name} {' '.join(map(str, values))}: give at least one, each once")
    if min(sweep.nfe) < 1:
        raise InputError(f"--nfe {' '.join(map(str, sweep.nfe))}: budgets must be >= 1")
    if sweep.blocks < 3:
        raise InputError(f"--blocks {sweep.blocks}: an interval wants at least 3 blocks")
    if sweep.n < 2 * sweep.blocks or sweep.n % sweep.blocks:
        step = sweep.blocks
        near = max(2 * step, round(sweep.n / step) * step)
        raise InputError(f"-n {sweep.n}: give a multiple of --blocks {step}, at least {2 * step}, such as {near}")
    if not 0 <= sweep.seed < SEEDS:
        raise InputError(f"--seed {sweep.seed}: must be in [0, {SEEDS})")
    for name, least in (("part", 0), ("batch", 0), ("threads", 1), ("preview", 0)):
        if not least <= getattr(sweep, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(sweep, name)}: must be >= {least}")
    if sweep.eta is not None and not 0.0 <= sweep.eta < math.inf:
        raise InputError(f"--eta {sweep.eta}: must be >= 0")
    if any(size < 1 for size in sweep.shape):
        raise InputError(f"--shape {' '.join(map(str, sweep.shape))}: sizes must be >= 1")


# --- TOML -------------------------------------------------------------------------------------------------------------------


def defaults(args: Sequence[str]) -> Sweep:
    """The options of the file that ``--config`` names among the arguments, else the plain ones."""
    named = [b for a, b in pairwise(args) if a == "--config"]
    named += [a.partition("=")[2] for a in args if a.startswith("--config=")]
    return from_toml(File(named[-1])) if named else Sweep()


def from_toml(path: File) -> Sweep:
    """Options by the names of ``Sweep``, or with hyphens as on the command line.

    A file may name built-in problems, not code: module:function is for the command line alone.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {files.show(path)}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    toml = _toml()
    try:
        found = toml.loads(text)
    except ValueError as error:
        raise InputError(f"--config {files.show(path)}: no TOML ({error})") from None
    known = {f.name: f for f in fields(Sweep) if f.name != "config"}
    given: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in known:
            raise InputError(f"--config {files.show(path)}: {key!r} is unknown: {nearest(name, known)}")
        given[name] = _typed(path, key, str(known[name].type), value)
    from .models import builtin

    for model in given.get("model", ()):
        if ":" in model and not builtin(model):
            raise InputError(
                f"--config {files.show(path)}: model {model!r} names code, and no file may: leave it out there and write "
                f"--model {model} on the command line"
            )
    return Sweep(**given, config=path)


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    try:
        import tomli  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise InputError("--config: Python 3.10 reads TOML with one package more: pip install tomli") from None
    return tomli


def _typed(path: File, key: str, kind: str, value: Any) -> Any:
    """A value of TOML as its option wants it: a list where several may be given, or one alone."""
    many = kind.startswith("tuple")
    values = value if isinstance(value, list) else [value]
    if kind.startswith("Literal"):
        choices = re.findall(r"[\"']([^\"']+)[\"']", kind)
        if value not in choices:
            raise InputError(f"--config {files.show(path)}: {key} = {value!r:.60} is unknown: {nearest(value, choices)}")
        return value
    wanted = next(t for word, t in (("bool", bool), ("float", float), ("int", int), ("", str)) if word in kind)
    for v in values:
        right = isinstance(v, (int, float)) if wanted is float else isinstance(v, wanted)
        if not right or (isinstance(v, bool) and wanted is not bool) or (isinstance(value, list) and not many):
            what = f"{'a list of ' if many else ''}{wanted.__name__}"
            raise InputError(f"--config {files.show(path)}: {key} = {value!r:.60}: give {what}")
    if wanted is float:
        values = [float(v) for v in values]
    return tuple(values) if many else File(str(value)) if kind.startswith("File") else values[0]


# --- cells and items ----------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """What a row speaks of."""

    model: str
    solver: str
    grid: str
    nfe: int


class Facts(NamedTuple):
    """What of a loaded model decides about files: the digest of its tensors and code, and the shape of a sample."""

    name: str
    digest: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Item:
    """A file to be made: ``path`` in the folder, ``about`` all that its content is a function of, ``needs`` the paths of the
    items that it is made from. ``weight``: network evaluations, to tell the time left.
    """

    kind: Literal["end", "part", "floor", "rows"]
    path: str
    about: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    weight: float = 0.0

    def __repr__(self) -> str:
        return f"<{self.path}>"


def cells(sweep: Sweep, model: str) -> Iterator[Cell]:
    """In the order of the rows."""
    for solver in sweep.solver:
        for grid in sweep.grid:
            for nfe in sweep.nfe:
                yield Cell(model, solver, grid, nfe)


def spans(m: int, part: int) -> list[tuple[int, int]]:
    """The parts [a, b) of a block of m samples: each index once."""
    return [(a, min(a + part, m)) for a in range(0, m, part)]


def part_size(sweep: Sweep, shape: Sequence[int]) -> int:
    return sweep.part or max(64, min(1000, (1 << 22) // math.prod(shape)))


def digest(value: Any) -> str:
    """sha256 of the canonical JSON."""
    text = json.dumps(files.plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def settings(sweep: Sweep) -> dict[str, Any]:
    """The options that content depends on, as JSON has them; of the device its kind."""
    return files.plain({name: getattr(sweep, name) for name in SETTINGS} | {"device": sweep.device.partition(":")[0]})


def place(kind: str, about: Mapping[str, Any], *words: Any) -> str:
    """Where an item goes, without its ending: words for people, made harmless, and the digest of what it is about."""
    name = re.sub(r"[^A-Za-z0-9_+]+", "-", "-".join(map(str, words)))[:80].strip("-")
    return f"{kind}s/{name}-{digest(about)[:12]}"


def items(sweep: Sweep, config: str, facts: Facts, measures: Measures) -> Iterator[Item]:
    """All files of one model, in an order in which they can be made: floors, then cell by cell."""
    m, part = sweep.n // sweep.blocks, part_size(sweep, facts.shape)
    d = math.prod(facts.shape)
    base = {"schema": SCHEMA, "config": config, "model": facts.name, "digest": facts.digest}
    floors: dict[str, Item] = {}
    for metric, key in measures.floors.items():
        about = {**base, "kind": "floor", "metric": metric, "key": key}
        floors[metric] = Item("floor", place("floor", about, facts.name, metric) + ENDING, about)
    yield from floors.values()
    needs = tuple(item.path for item in floors.values())
    for metric in measures.alone:
        about = {**base, "kind": "rows", "metric": metric, "n": sweep.n}
        yield Item("rows", place("row", about, facts.name, metric) + ENDING, about, needs)
    done: set[str] = set()
    for cell in cells(sweep, facts.name) if measures.cells else ():
        line = measures.lines[cell.solver]
        own = {**base, "solver": cell.solver, "version": line.version, "grid": cell.grid, "nfe": cell.nfe}
        last = {**base, "to_zero": True} if line.to_zero else base
        where, parts = place("part", own, *cell), []
        for block in range(sweep.blocks if measures.sampled else 0):
            for a, b in spans(m, part):
                leaf = f"/{block}.{a:09d}-{b:09d}{ENDING}"
                span = {"block": block, "a": a, "b": b}
                first = ()
                if measures.ends and line.flow(sweep.eta):
                    path = place("end", last, facts.name) + leaf
                    first = (path,)
                    if path not in done:
                        done.add(path)
                        yield Item("end", path, {**last, "kind": "end", **span})
                parts.append(Item("part", where + leaf, {**own, "kind": "part", **span}, first, float((b - a) * cell.nfe * d)))
                yield parts[-1]
        about = {**own, "kind": "rows", "n": sweep.n}
        yield Item("rows", place("row", about, *cell, sweep.n) + ENDING, about, (*needs, *(p.path for p in parts)))


ENDING = ".safetensors"


@dataclass(frozen=True)
class Measures:
    """What the metrics of a sweep ask for on one model: the keys of their floors, and which of them look at the score alone
    (``alone``: a row a model), at a sampler (``cells``), at its samples (``sampled``), at exact end points (``ends``); with
    ``lines`` by the sampler's name.
    """

    lines: Mapping[str, Any]
    floors: Mapping[str, str]
    alone: tuple[str, ...]
    cells: bool
    sampled: bool
    ends: bool
