"""Where normals come from: counter-based streams, one a sample, and a Brownian path that every grid shares.

Sample i of a run depends on (seed, i) alone: not on the batch size, its batch mates, their order, the shard, the device or
the dtype. A source is a small frozen value that says which streams a batch reads. ``source.open(shape, dtype, device)`` gives
the ``Draws`` of one run, which holds the scratch memory; every number it returns is a function of the arguments.

Words. Philox4x64-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a counter
of four 64-bit words and a key of two to four random words. Here

    key     = (seed, LAYOUT)
    counter = (1 + block, draw, kind, node)

and word w of a (seed, draw, kind, node) is word w % 4 of block w // 4. A sample of n numbers owns the m = ceil(n / 2) words
from i m on, so a run of consecutive samples is one stretch of words, with none wasted.

Normals (Box and Muller 1958). From the halves of a word as signed integers, hi and lo, both rounded to float32,

    r = sqrt(-2 log(|hi + 1/2| / 2^31)),   angle = pi lo / 2^31,   z_j = r cos(angle),   z_{m+j} = r sin(angle)

for word j of the sample. The rounding to float32 is the same in every dtype, so a float32 run sees the normals of the float64
run to a few ulp of r; float16 and bfloat16 are cast from float32. |z| <= 6.66.
"""

from __future__ import annotations

import math
import operator
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .prediction import Knot

#: Second word of every key. Another layout of words or normals gets another number, so that old and new never overlap.
LAYOUT = 1

# Third word of the counter: what the words are for.
_INITIAL, _WHITE, _TREE, _BRIDGE = range(4)

_WORD = 1 << 64
_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)

# Words at a time. On a CPU the scratch of a chunk stays in the cache, and no chunk reaches the size (32768) from which torch
# splits an operation over threads, where the split may change the last bit of a logarithm.
_CPU_CHUNK = 1 << 14
_DEVICE_CHUNK = 1 << 20
_NARROW = 16  # numpy's loops over rows this short cost more than strided loops over their columns
_LANES = 64  # a chunk is padded to whole vectors, so that no element is left to a scalar loop that rounds differently


def clock(lam: float) -> float:
    """c(lam) = 1/2 + lam / (2 hypot(lam, 4)) in [0, 1]: the time of the Brownian path at half log-SNR lam.

    Increasing, 0 at lam = -inf, 1 at +inf, steepest (1/8) at 0; 76% of the path lies in lam in [-5, 4.5].
    """
    if math.isinf(lam):
        return 1.0 if lam > 0 else 0.0
    return 0.5 + 0.5 * lam / math.hypot(lam, 4.0)


class Draws(ABC):
    """The normals of one run. Not for two threads at once; open one a run, the source itself is shared freely."""

    @abstractmethod
    def initial(self, out: Tensor | None = None) -> Tensor:
        """Unit normals of the opened shape, dtype and device: where a run starts."""

    @abstractmethod
    def normal(self, k: int, s: Knot, t: Knot, like: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Draw k = 0, 1, ... of the run, for the step from knot s to knot t: unit normals of the opened shape.

        ``like`` may be the state, which must then have the opened shape, dtype and device. ``out`` is filled and returned.
        """


class Source(ABC):
    """Which streams a batch reads: White or Brownian. Frozen, without state, safe to share between threads and runs."""

    @abstractmethod
    def open(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Draws:
        """The draws of one run on a batch of ``shape`` (B, ...). The memory they need is freed with the returned object."""

    def initial(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """The unit normals a run starts from, of ``shape`` (B, ...)."""
        return self.open(shape, dtype, device).initial()


@dataclass(frozen=True)
class White(Source):
    """Independent normals, a function of (seed, i, k): the knots play no part.

    ``indices`` are the samples' numbers, 0 ... B - 1 unless given. ``seeds`` gives one seed a sample instead; sample j is then
    number 0 of seeds[j]. A new (seed, index) pair costs about 1.5 microseconds a draw, a run of consecutive indices that once.

    Reference: Salmon et al. 2011, doi:10.1145/2063384.2063405.
    """

    seed: int = 0
    indices: Sequence[int] | None = None
    seeds: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _check_streams(self)

    def open(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Draws:
        return _WhiteDraws(_Normals(self, shape, dtype, device))


@dataclass(frozen=True)
class Brownian(Source):
    """A Brownian path B on the clock c(lam) in [0, 1] that all grids share.

    normal(k, s, t) = (B(c_t) - B(c_s)) / sqrt(c_t - c_s)

    The path is known at the ends of ``cells`` equal cells of the clock by halving: given B at the ends of an interval of
    width w, the midpoint is their mean plus sqrt(w) / 2 times the normal of that node. Inside a cell, a knot at distance p
    from the last known point, with w left to the cell's end, is p / w of the way plus sqrt(p (w - p) / w) times the normal
    numbered by (cell, how many knots this cell has seen). So on every grid the increments have exactly their law, and two
    grids agree exactly at the ends of cells, and at a knot they share if it is the first of its cell for both. They part by
    about sqrt(1 / cells) / 2 where a cell has two knots: for strong errors let ``cells``, a power of two, be 4 times the
    steps of the finest grid (uniform in lam). A step costs about log2(cells / steps) + 2 normals.

    Each stretch of the clock is used once, so the draws of a run are independent whatever the sampler does. A draw that
    cannot have a stretch of its own is white noise numbered by k, as in ``White``: s.t = t.t (a corrector), a step towards
    noise (churn, restart), a second draw for the same step, knots that the clock cannot tell apart.

    k increases along a run. Going back to an earlier k replays: the same bits, always for the last draw, for all draws
    where no cell has two knots. For another grid, open anew.

    Memory: up to log2(cells) + 2 states while a ``Draws`` is alive. ``indices`` and ``seeds`` as in ``White``; the same
    seed gives both sources the same initial state.
    """

    seed: int = 0
    cells: int = 64
    indices: Sequence[int] | None = None
    seeds: Sequence[int] | None = None

    def __post_init__(self) -> None:
        cells = _integer("cells", self.cells, 1, 1 << 53, "a power of two such as cells=64")
        if cells & (cells - 1):
            low = 1 << (cells.bit_length() - 1)
            raise InputError(f"cells={cells} is not a power of two; write cells={low} or cells={2 * low}")
        object.__setattr__(self, "cells", cells)
        _check_streams(self)

    def open(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Draws:
        return _BrownianDraws(_Normals(self, shape, dtype, device), self.cells)


# ---------------------------------------------------------------------------------------------------------------- input


def _integer(name: str, value: object, low: int, high: int, wanted: str) -> int:
    """``value`` as an int in [low, high)."""
    if isinstance(value, torch.Generator):
        raise InputError(
            f"{name}=<torch.Generator>: noise is a function of an integer here, not of a generator's state; "
            f"write {name}=generator.initial_seed()"
        )
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"{name}={value!r} is not an integer; write {wanted}") from None
    if not low <= number < high:
        raise InputError(f"{name}={number} is outside [{low}, {high}); write {wanted}")
    return number


def _integers(name: str, values: object, wanted: str) -> Sequence[int]:
    if isinstance(values, range):
        if len(values):
            _integer(f"{name}[0]", values[0], 0, _WORD, wanted)
            _integer(f"{name}[{len(values) - 1}]", values[-1], 0, _WORD, wanted)
        return values
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(f"{name}={values!r} is not a sequence of integers; write {wanted}")
    return tuple(_integer(f"{name}[{j}]", value, 0, _WORD, wanted) for j, value in enumerate(values))


def _check_streams(source: White | Brownian) -> None:
    """Validate seed, indices and seeds, and store them as int, and range or tuple of ints."""
    seed = _integer("seed", source.seed, 0, _WORD, "an integer such as seed=0")
    object.__setattr__(source, "seed", seed)
    if source.seeds is not None:
        if seed != 0 or source.indices is not None:
            other = f"seed={seed}" if seed != 0 else "indices"
            raise InputError(f"seeds and {other} are both given; seeds= alone gives one seed a sample, each at index 0")
        object.__setattr__(source, "seeds", _integers("seeds", source.seeds, "one seed a sample, such as seeds=[3, 4]"))
    if source.indices is not None:
        wanted = "the samples' numbers, such as indices=range(64, 128)"
        object.__setattr__(source, "indices", _integers("indices", source.indices, wanted))


class _Run(NamedTuple):
    """Rows row ... row + rows - 1 of the batch: samples first, first + 1, ... of ``seed``."""

    row: int
    rows: int
    seed: int
    first: int


def _runs(source: White | Brownian, batch: int) -> list[_Run]:
    for name in ("indices", "seeds"):
        values = getattr(source, name)
        if values is not None and len(values) != batch:
            raise InputError(
                f"{name} has {len(values)} entries for a batch of {batch}; give one a sample: shape[0] is the batch"
            )
    if source.seeds is not None:
        return [_Run(row, 1, seed, 0) for row, seed in enumerate(source.seeds)]
    indices = range(batch) if source.indices is None else source.indices
    if isinstance(indices, range) and indices.step == 1:
        return [_Run(0, batch, source.seed, indices.start)]
    runs: list[_Run] = []
    for row, index in enumerate(indices):
        if runs and runs[-1].first + runs[-1].rows == index:
            runs[-1] = runs[-1]._replace(rows=runs[-1].rows + 1)
        else:
            runs.append(_Run(row, 1, source.seed, index))
    return runs


# -------------------------------------------------------------------------------------------------------------- normals


class _Philox:
    """Philox4x64-10 as a function of (key, counter), by numpy's generator.

    numpy increments the counter before it makes a block; counters here start at block + 1, so setting word 0 to ``block`` is
    right and needs no borrow. Setting the state costs 0.8 microseconds, a new generator 6.5.
    """

    def __init__(self) -> None:
        self._generator = np.random.Philox(key=0)  # a given key: no entropy is asked of the system
        self._state: Any = self._generator.state
        self._counter, self._key = self._state["state"]["counter"], self._state["state"]["key"]
        self._key[1] = LAYOUT

    def words(self, seed: int, first: int, draw: int, kind: int, node: int, count: int) -> np.ndarray[Any, Any]:
        """Words first ... first + count - 1, as (count,) uint64."""
        block, skip = divmod(first, 4)
        self._key[0] = seed
        counter = self._counter
        counter[0], counter[1], counter[2], counter[3] = block, draw, kind, node
        self._generator.state = self._state
        words = self._generator.random_raw(skip + count)
        return words[skip:] if skip else words


class _Chunk(NamedTuple):
    """The words of rows [row, row + rows) and word columns [column, column + columns) of a batch, at most one row in parts."""

    row: int
    rows: int
    column: int
    columns: int
    pieces: tuple[tuple[int, int, int], ...]  # (seed, first word, count), in order
    padded: int


Array = Any  # an ndarray on the CPU in float32, a Tensor elsewhere: the two share operators, and functions with out=


class _Normals:
    """Box-Muller on the words of a batch of ``shape``, chunk by chunk.

    float32 on a CPU is computed by numpy, whose log, sin and cos take half the time of torch's; everything else by torch on
    the device. Arrays are 1-D, contiguous and padded, whatever the shape of the batch: the bits cannot depend on it.
    """

    def __init__(self, source: White | Brownian, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.shape = _shape(shape)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise InputError(f"dtype={dtype!r} cannot hold normals; write dtype=torch.float32, or float64, float16, bfloat16")
        self.dtype, self.device = dtype, torch.empty(0, device=device).device  # with the index that "cuda" stands for
        self._batch, self._size = self.shape[0], math.prod(self.shape[1:])
        self._half = (self._size + 1) // 2
        cpu = self.device.type == "cpu"
        self.chunks = self._split(_runs(source, self._batch), _CPU_CHUNK if cpu else _DEVICE_CHUNK)
        self._philox = _Philox()
        self._working = torch.float64 if dtype == torch.float64 else torch.float32
        self.xp: Any = np if cpu and self._working == torch.float32 else torch
        self._direct = self.xp is np and dtype == torch.float32
        longest = max((chunk.padded for chunk in self.chunks), default=0)
        self._pair, self._cosine = self.empty(2 * longest), self.empty(longest)
        self._halves: Array = self._allocate(2 * longest, torch.float32)
        self._views: dict[int, tuple[Array, ...]] = {}
        self._turn = self.empty(1)  # an array, whose dtype counts in a product of mixed dtypes, as a number's would not
        self._turn[:] = math.pi * 2.0**-31

    def _split(self, runs: list[_Run], limit: int) -> list[_Chunk]:
        half, chunks = self._half, list[_Chunk]()
        if half == 0:
            return chunks
        last = max((run.first + run.rows for run in runs), default=0)
        if last * half >= _WORD:
            raise InputError(
                f"index {last - 1} of samples of {self._size} numbers is beyond the stream; write indices below 2^40"
            )
        if half > limit:  # a sample in parts
            for run in runs:
                for j in range(run.rows):
                    for column in range(0, half, limit):
                        columns = min(limit, half - column)
                        pieces = ((run.seed, (run.first + j) * half + column, columns),)
                        chunks.append(_Chunk(run.row + j, 1, column, columns, pieces, _pad(columns)))
            return chunks
        most, pieces, row, rows = limit // half, list[tuple[int, int, int]](), 0, 0

        def close() -> None:
            nonlocal row, rows
            if rows:
                chunks.append(_Chunk(row, rows, 0, half, tuple(pieces), _pad(rows * half)))
            pieces.clear()
            row, rows = row + rows, 0

        for run in runs:
            done = 0
            while done < run.rows:
                take = min(run.rows - done, most - rows)
                pieces.append((run.seed, (run.first + done) * half, take * half))
                done, rows = done + take, rows + take
                if rows == most:
                    close()
        close()
        return chunks

    def _allocate(self, count: int, dtype: torch.dtype) -> Array:
        if self.xp is np:
            return np.empty(count, np.float32)
        with torch.inference_mode(False):  # else scratch made in inference mode could not be written outside it
            return torch.empty(count, dtype=dtype, device=self.device)

    def empty(self, count: int) -> Array:
        """Uninitialised numbers in the working precision, (count,)."""
        return self._allocate(count, self._working)

    def _words(self, chunk: _Chunk, draw: int, kind: int, node: int) -> Array:
        """The words of a chunk and some padding, as their halves, (2 padded,) int32."""
        philox = self._philox
        if len(chunk.pieces) == 1:
            seed, first, _ = chunk.pieces[0]
            words = philox.words(seed, first, draw, kind, node, chunk.padded)
        else:
            words, start = np.zeros(chunk.padded, np.uint64), 0
            for seed, first, count in chunk.pieces:
                words[start : start + count] = philox.words(seed, first, draw, kind, node, count)
                start += count
        halves = words.view(np.int32)
        if self.xp is np:
            return halves
        tensor = torch.from_numpy(halves)
        if self.device.type == "cuda":  # a pinned block is not reused before its copy has run: no need to wait for it here
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _view(self, n: int) -> tuple[Array, ...]:
        """The scratch of a chunk of n words: halves, high and low ones, radius, angle, cosine. Small draws feel each slice."""
        single = self._halves[: 2 * n]
        pair = self._pair[:n], self._pair[n : 2 * n]
        self._views[n] = found = (single, single[_HIGH::2], single[_LOW::2], *pair, self._cosine[:n])
        return found

    def polar(self, chunk: _Chunk, draw: int, kind: int, node: int) -> tuple[Array, Array, Array]:
        """(r, cos, sin), each (padded,), of a chunk's words: scratch that the next call overwrites."""
        xp, n = self.xp, chunk.padded
        single, high, low, radius, angle, cosine = self._views.get(n) or self._view(n)
        single[:] = self._words(chunk, draw, kind, node)  # the rounding that every dtype shares
        # Symmetric: every |hi + 1/2| is met twice, none is 0. Added in float32 in every dtype, so that none is above 2^31.
        xp.add(high, 0.5, out=radius)
        xp.abs(radius, out=radius)
        radius *= 2.0**-31
        xp.log(radius, out=radius)
        radius *= -2.0
        xp.sqrt(radius, out=radius)
        xp.multiply(low, self._turn, out=angle)
        xp.cos(angle, out=cosine)
        xp.sin(angle, out=angle)
        return radius, cosine, angle

    def scaled(self, chunk: _Chunk, draw: int, kind: int, node: int, scale: float) -> Array:
        """``scale`` times the normals of a chunk, in a new array (2 padded,): those of the cosines, then those of the sines."""
        radius, cosine, sine = self.polar(chunk, draw, kind, node)
        radius *= scale
        z = self.empty(2 * chunk.padded)
        self.xp.multiply(radius, cosine, out=z[: chunk.padded])
        self.xp.multiply(radius, sine, out=z[chunk.padded :])
        return z

    def times(self, x: Array, factor: float) -> Array:
        """factor x, for x as ``scaled`` gives it: scratch that the next call overwrites."""
        return self.xp.multiply(x, factor, out=self._pair[: len(x)])

    def store(self, flat: Array, chunk: _Chunk, left: tuple[Array, Any], right: tuple[Array, Any]) -> None:
        """Write the products ``left`` and ``right``, (padded,) each, where the chunk's normals go in ``flat``, (B, size)."""
        rows, columns = slice(chunk.row, chunk.row + chunk.rows), chunk.columns
        count, multiply = chunk.rows * columns, self.xp.multiply
        if self.xp is np and self._half == 1:  # samples of two numbers, or of one: a column each
            for start, (one, other) in enumerate((left, right)[: self._size]):
                multiply(one[:count], other if isinstance(other, float) else other[:count], out=flat[rows, start])
            return
        for start, (one, other) in ((chunk.column, left), (chunk.column + self._half, right)):
            width = min(columns, self._size - start)  # of odd samples the right half is one column narrower
            if self.xp is np and columns < _NARROW:
                for j in range(width):
                    factor = other if isinstance(other, float) else other[j:count:columns]
                    multiply(one[j:count:columns], factor, out=flat[rows, start + j])
            else:
                wide = (x if isinstance(x, float) else x[:count].reshape(-1, columns)[:, :width] for x in (one, other))
                multiply(*wide, out=flat[rows, start : start + width])

    def white(self, k: int, kind: int, like: Tensor | None, out: Tensor | None) -> Tensor:
        """Draw k, a function of (seed, i, k) alone."""
        out, array = self.target(like, out)
        for chunk in self.chunks:
            radius, cosine, sine = self.polar(chunk, k, kind, 0)
            self.store(array, chunk, (radius, cosine), (radius, sine))
        return self.finish(out, array)

    def target(self, like: Tensor | None, out: Tensor | None) -> tuple[Tensor, Array]:
        """The tensor to return, and the (B, size) array to write: its memory, where its dtype and layout allow."""
        if like is not None:
            self._check("like", like)
        if out is not None:
            self._check("out", out)
        elif self._direct:  # the cheapest way to a tensor and its array
            array = np.empty(self.shape, np.float32)
            return torch.from_numpy(array), array.reshape(self._batch, self._size)
        else:
            out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        flat = out.detach()
        if self.dtype != self._working or not out.is_contiguous():
            flat = torch.empty(self.shape, dtype=self._working, device=self.device)
        return out, (flat.numpy() if self.xp is np else flat).reshape(self._batch, self._size)

    def _check(self, name: str, given: Tensor) -> None:
        if given.shape != self.shape or given.dtype != self.dtype or given.device != self.device:
            raise InputError(
                f"{name} is {tuple(given.shape)}, {given.dtype}, {given.device}, but the draws were opened for "
                f"{self.shape}, {self.dtype}, {self.device}; open(x.shape, x.dtype, x.device) for this state"
            )

    def finish(self, out: Tensor, array: Array) -> Tensor:
        """Copy to ``out`` what could not be written there."""
        if self.dtype != self._working or not out.is_contiguous():
            values = torch.from_numpy(array) if self.xp is np else array
            out.detach().copy_(values.view(self.shape))
        return out


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, int) or not len(shape):
        raise InputError(f"shape={shape!r} has no batch; write shape=(B, ...), such as (1, {shape if shape else 2})")
    return tuple(_integer(f"shape[{j}]", n, 0, _WORD, "shape=(B, ...)") for j, n in enumerate(shape))


def _pad(count: int) -> int:
    return -(-count // _LANES) * _LANES


def _check_draw(k: int) -> None:
    if not 0 <= k < _WORD:
        raise InputError(f"k={k} is outside [0, 2^64); number the draws of a run 0, 1, 2, ...")


class _WhiteDraws(Draws):
    def __init__(self, normals: _Normals) -> None:
        self._normals = normals

    def initial(self, out: Tensor | None = None) -> Tensor:
        return self._normals.white(0, _INITIAL, None, out)

    def normal(self, k: int, s: Knot, t: Knot, like: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        _check_draw(k)
        return self._normals.white(k, _WHITE, like, out)


# ------------------------------------------------------------------------------------------------------------- Brownian


class _Interval(NamedTuple):
    """A stretch of the clock ahead: node ``place`` of ``level`` in the tree, or what is left of it after ``seen`` knots."""

    end: float
    level: int
    place: int
    seen: int


class _Move(NamedTuple):
    """One operation on the stack of increments, with z the normal (kind, draw, node):

    kind None:  take the top D, complete, into the increment of the step;
    otherwise:  replace the top D by D - L and L = fraction D + deviation z; and take L, too, in a cell (kind _BRIDGE).
    """

    kind: int | None
    draw: int = 0
    node: int = 0
    fraction: float = 0.0
    deviation: float = 0.0


class _BrownianDraws(Draws):
    """A sweep along the clock. The stack holds the increments of the path over the intervals ahead, nearest on top.

    Increments, not values: there is no cancellation to lose digits to, and a step of the sweep is the sum of what it takes.
    What happens to the stack is decided once, on the host (``_moves``), and then done to every chunk in turn (``_follow``).
    """

    def __init__(self, normals: _Normals, cells: int) -> None:
        self._normals, self._cells, self._levels = normals, cells, cells.bit_length() - 1
        self._last = -1  # the last draw's k
        self._cell = -1  # the cell where the last draw of the path began
        self._knots: list[tuple[int, float]] = []  # (k, clock) of the knots since that cell's beginning
        self._restart()

    def _restart(self) -> None:
        self._position = 0.0
        self._ahead: list[_Interval] = []
        self._increments: list[list[Array]] = [[] for _ in self._normals.chunks]

    def initial(self, out: Tensor | None = None) -> Tensor:
        return self._normals.white(0, _INITIAL, None, out)

    def normal(self, k: int, s: Knot, t: Knot, like: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        _check_draw(k)
        start, end = clock(s.lam), clock(t.lam)
        if math.isnan(start) or math.isnan(end):
            raise InputError(f"lam is nan at t={s.t} or t={t.t}; the path's alpha and sigma must not both be 0 there")
        if k <= self._last:
            self._rewind(k)
        self._last = k
        if s.t == t.t or end <= start or start < self._position:
            return self._normals.white(k, _WHITE, like, out)
        out, array = self._normals.target(like, out)
        cell = int(start * self._cells)
        if cell != self._cell:
            self._knots = [knot for knot in self._knots if knot[1] * self._cells >= cell]
            self._cell = cell
        self._skip(k, start)
        moves, scale = self._moves(end), 1.0 / math.sqrt(end - start)
        self._knots.append((k, end))
        for chunk, increments in zip(self._normals.chunks, self._increments, strict=True):
            step = self._follow(moves, chunk, increments)
            n = chunk.padded
            self._normals.store(array, chunk, (step[:n], scale), (step[n:], scale))
        return self._normals.finish(out, array)

    def _skip(self, k: int, place: float) -> None:
        """Move to ``place`` without a result."""
        if place > self._position:
            moves = self._moves(place)
            self._knots.append((k, place))
            for chunk, increments in zip(self._normals.chunks, self._increments, strict=True):
                self._follow(moves, chunk, increments)

    def _rewind(self, k: int) -> None:
        """Back to where the sweep stood before draw k: the knots of a cell matter to one another, in their order."""
        knots, self._knots = self._knots, []
        self._restart()
        for earlier, place in knots:
            if earlier < k:
                self._skip(earlier, place)

    def _moves(self, place: float) -> list[_Move]:
        """Move the host's half of the stack to ``place``; returns what is to be done to the tensors."""
        moves: list[_Move] = []
        if place > 0.0 and self._position == 0.0 and not self._ahead:
            self._ahead.append(_Interval(1.0, 0, 0, 0))
            moves.append(_Move(_TREE, deviation=1.0))  # node 0: the path from end to end
        while self._position < place:
            top = self._ahead.pop()
            node = (1 << top.level) + top.place
            if top.end <= place:
                moves.append(_Move(None))
                self._position = top.end
            elif top.level < self._levels:
                width = 2.0**-top.level
                self._ahead.append(_Interval(top.end, top.level + 1, 2 * top.place + 1, 0))
                self._ahead.append(_Interval(top.end - 0.5 * width, top.level + 1, 2 * top.place, 0))
                moves.append(_Move(_TREE, node, 0, 0.5, 0.5 * math.sqrt(width)))
            else:
                width, part = top.end - self._position, place - self._position
                self._ahead.append(top._replace(seen=top.seen + 1))
                moves.append(_Move(_BRIDGE, node, top.seen, part / width, math.sqrt(part * (width - part) / width)))
                self._position = place
        return moves

    def _follow(self, moves: list[_Move], chunk: _Chunk, increments: list[Array]) -> Array:
        """Do the moves to a chunk's stack; returns the sum of what was taken.

        Products and sums are separate operations: a fused one rounds differently on some processors or in some loops.
        """
        total: Array = None
        for move in moves:
            if move.kind is None:
                taken = increments.pop()
            else:
                left = self._normals.scaled(chunk, move.draw, move.kind, move.node, move.deviation)
                if increments:
                    left += self._normals.times(increments[-1], move.fraction)
                    increments[-1] -= left
                if move.kind == _TREE:
                    increments.append(left)
                    continue
                taken = left
            if total is None:
                total = taken
            else:
                total += taken
        return total
