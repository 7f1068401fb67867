"""Where normals come from: counter-based streams, one a sample, and a Brownian path that every grid shares.

Sample i of a run depends on (seed, i) alone: not on the batch size, its batch mates, their order, the shard, the device or
the dtype. A source is a small frozen value that says which streams a batch reads. ``source.open(shape, dtype, device)`` gives
the ``Draws`` of one run, which holds the scratch memory; every number it returns is a function of the arguments.

Words. Philox4x64-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a counter
of four 64-bit words and a key of two to four random words. Here

    key     = (seed, LAYOUT)
    counter = (1 + j, draw, kind, node)

and its words make one endless row of normals for each (seed, draw, kind, node), of which sample i of n numbers owns
i n ... i n + n - 1. A block of 2 K normals, K = 128, takes K words; their 2 K halves, the low one first, are signed
integers, of which the first K give radii and the last K angles. Normals (Box and Muller 1958), with both rounded to float32
and o = 0 ... K - 1,

    r = sqrt(-2 log(|first_o + 1/2| / 2^31)),   angle = pi last_o / 2^31,   z_o = r cos(angle),   z_{K+o} = r sin(angle)

so everything is arithmetic on contiguous arrays, whatever the shape of the batch. The rounding to float32 is the same in every
dtype, so a float32 run sees the normals of the float64 run to a few ulp of r; float16 and bfloat16 are cast from float32.
|z| <= 6.66.
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
LAYOUT = 2

# Third word of the counter: what the words are for.
_INITIAL, _WHITE, _TREE, _BRIDGE = range(4)

_WORD = 1 << 64

# Whole vectors, so that no element is left to a scalar loop that rounds differently. A sample alone costs at least a block.
_HALF = 128
_BLOCK = 2 * _HALF

# Blocks at a time. On a CPU the scratch of a chunk stays in the cache, and its radii do not reach the size (32768) from which
# torch splits an operation over threads, where the split may change the last bit of a logarithm.
_CPU_CHUNK = 1 << 7
_DEVICE_CHUNK = 1 << 13


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
    number 0 of seeds[j]. On a CPU in float32 a draw costs 9 microseconds and 1.2 to 1.3 times torch.randn; a new (seed, index)
    pair costs 2 microseconds more, a run of consecutive indices that once.

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
    right and needs no borrow. Setting the state from lists costs 0.4 microseconds, from arrays 0.9, a new generator 6.5.
    """

    def __init__(self) -> None:
        self._generator = np.random.Philox(key=0)  # a given key: no entropy is asked of the system
        self._state: Any = self._generator.state
        self._counter, self._key = [0] * 4, [0, LAYOUT]
        self._state.update(state={"counter": self._counter, "key": self._key}, buffer=self._state["buffer"].tolist())

    def words(self, seed: int, block: int, draw: int, kind: int, node: int, count: int) -> np.ndarray[Any, Any]:
        """``count`` words from the beginning of a block of ``_BLOCK`` normals, (count,) uint64."""
        self._key[0] = seed
        counter = self._counter
        counter[0], counter[1], counter[2], counter[3] = block * _HALF // 4, draw, kind, node
        self._generator.state = self._state
        return self._generator.random_raw(count)


Array = Any  # an ndarray on the CPU in float32, a Tensor elsewhere: the two share operators, and functions with out=


class _Scratch(NamedTuple):
    """Working memory for some blocks: n = blocks * _HALF numbers each, or pairs of n. Made once, for a slice costs time."""

    halves: Array  # (blocks, 2, _HALF) in float32, whose parts ``first`` and ``last`` are contiguous
    first: Array
    last: Array
    radius: Array  # in float32 this is ``first``, and the next ``last``
    angle: Array
    cosine: Array
    sine: Array
    pair: Array  # the last two again, (blocks, 2, _HALF)


class _Chunk(NamedTuple):
    """Numbers start ... stop - 1 of the flattened batch, and the blocks of normals that they are found in."""

    start: int
    stop: int
    blocks: int
    pieces: tuple[tuple[int, int, int], ...]  # (seed, first block, blocks), in order
    where: Any  # which of the blocks' normals: None for all, a slice, or an array of places


class _Normals:
    """Box-Muller on the words of a batch of ``shape``, chunk by chunk.

    float32 on a CPU is computed by numpy, whose log, sin and cos take half the time of torch's; everything else by torch on
    the device.
    """

    def __init__(self, source: White | Brownian, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.shape = _shape(shape)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise InputError(f"dtype={dtype!r} cannot hold normals; write dtype=torch.float32, or float64, float16, bfloat16")
        self.dtype, self.device = dtype, torch.empty(0, device=device).device  # with the index that "cuda" stands for
        cpu = self.device.type == "cpu"
        self._working = torch.float64 if dtype == torch.float64 else torch.float32
        self.xp: Any = np if cpu and self._working == torch.float32 else torch
        self._direct = self.xp is np and dtype == torch.float32
        self.chunks = self._split(_runs(source, self.shape[0]), _CPU_CHUNK if cpu else _DEVICE_CHUNK)
        self._philox = _Philox()
        self._scratch: dict[int, _Scratch] = {}
        longest = max((chunk.blocks for chunk in self.chunks), default=0)
        self._halves: Array = self._allocate(longest * _BLOCK, torch.float32)
        self._polar = self._halves if self._working == torch.float32 else self.empty(longest * _BLOCK)
        self._pair, self._whole = self.empty(longest * _BLOCK), self.empty(longest * _BLOCK)
        # Arrays: numpy takes as long to convert a number as to multiply 2000, and in a product of float32 and a number torch
        # would round to float32. One operation a row, too: numpy's broadcasting costs twice as much as a second call.
        self._half, self._unit, self._minus_two, self._turn = (
            self._constant(value) for value in (0.5, 2.0**-31, -2.0, math.pi * 2.0**-31)
        )

    def _split(self, runs: list[_Run], most: int) -> list[_Chunk]:
        """The batch in chunks of at most ``most`` blocks."""
        size = math.prod(self.shape[1:])
        last = max((run.first + run.rows for run in runs), default=0)
        if last * size >= _WORD:
            raise InputError(f"index {last - 1} of samples of {size} numbers is beyond the stream; write indices below 2^40")
        chunks, start = list[_Chunk](), 0
        pieces, parts, blocks, newest = list[tuple[int, int, int]](), list[tuple[int, int]](), 0, (0, -1)

        def close() -> None:
            nonlocal start, blocks, newest
            if parts:
                stop = start + sum(length for _, length in parts)
                chunks.append(_Chunk(start, stop, blocks, tuple(pieces), self._where(parts, blocks)))
                start = stop
            pieces.clear()
            parts.clear()
            blocks, newest = 0, (0, -1)

        for run in runs:
            place, end = run.first * size, (run.first + run.rows) * size
            while place < end:
                block, offset = divmod(place, _BLOCK)
                begin = blocks - 1 if (run.seed, block) == newest else blocks  # neighbours may share a block
                if begin == most:
                    close()
                    begin = 0
                after = begin + min(-(-end // _BLOCK) - block, most - begin)
                if after > blocks:
                    pieces.append((run.seed, block + blocks - begin, after - blocks))
                stop = min(end, (block + after - begin) * _BLOCK)
                at = begin * _BLOCK + offset
                if parts and sum(parts[-1]) == at:
                    at, length = parts.pop()
                    parts.append((at, length + stop - place))
                else:
                    parts.append((at, stop - place))
                place, blocks, newest = stop, after, (run.seed, block + after - begin - 1)
        close()
        return chunks

    def _where(self, parts: list[tuple[int, int]], blocks: int) -> Any:
        """Where a chunk's numbers are among the normals of its blocks: ``parts`` are (place, length), in order."""
        if len(parts) == 1:
            (place, length), whole = parts[0], blocks * _BLOCK
            return None if length == whole else slice(place, place + length)
        places, lengths = (np.array(column, np.int64) for column in zip(*parts, strict=True))
        index = np.repeat(places - np.cumsum(lengths) + lengths, lengths)
        index += np.arange(len(index))
        return index if self.xp is np else torch.from_numpy(index).to(self.device)

    def _allocate(self, count: int, dtype: torch.dtype) -> Array:
        if self.xp is np:
            memory = np.empty(count + 16, np.float32)
            begin = -memory.ctypes.data // 4 % 16  # of a cache line: additions and products are a third faster there
            return memory[begin : begin + count]
        with torch.inference_mode(False):  # else scratch made in inference mode could not be written outside it
            return torch.empty(count, dtype=dtype, device=self.device)

    def _constant(self, value: float) -> Array:
        """A number in the working precision that broadcasts."""
        if self.xp is np:
            return np.array(value, np.float32)
        return self.empty(1).fill_(value)

    def empty(self, count: int) -> Array:
        """Uninitialised numbers in the working precision, (count,)."""
        return self._allocate(count, self._working)

    def _words(self, chunk: _Chunk, draw: int, kind: int, node: int) -> Array:
        """The halves of a chunk's words, low ones first, (blocks, 2, _HALF) int32; one copy to a device, whatever the runs."""
        found = [self._philox.words(seed, block, draw, kind, node, n * _HALF) for seed, block, n in chunk.pieces]
        halves = _signed(found[0] if len(found) == 1 else np.concatenate(found)).reshape(chunk.blocks, 2, _HALF)
        if self.xp is np:
            return halves
        tensor = torch.from_numpy(halves)
        if self.device.type == "cuda":  # a pinned block is not reused before its copy has run: no need to wait for it here
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _views(self, blocks: int) -> _Scratch:
        """The scratch for that many blocks."""
        n = blocks * _HALF

        def parts(x: Array) -> tuple[Array, Array, Array]:
            return x[: 2 * n].reshape(2, blocks, _HALF).swapaxes(0, 1), x[:n], x[n : 2 * n]

        halves, first, last = parts(self._halves)
        pair, cosine, sine = parts(self._pair)
        found = _Scratch(halves, first, last, *parts(self._polar)[1:], cosine, sine, pair)
        self._scratch[blocks] = found
        return found

    def fill(self, out: Array, chunk: _Chunk, draw: int, kind: int, node: int, scale: float = 1.0) -> None:
        """Write ``scale`` times a chunk's normals to ``out``, (stop - start,)."""
        xp, blocks, where = self.xp, chunk.blocks, chunk.where
        views = self._scratch.get(blocks) or self._views(blocks)
        halves, first, last, radius, angle, cosine, sine, pair = views
        halves[:] = self._words(chunk, draw, kind, node)  # to float32: the rounding that every dtype shares
        # Symmetric: every |first + 1/2| is met twice, none is 0. Added in float32 in every dtype, so that none is above 2^31.
        first += self._half
        xp.multiply(first, self._unit, out=radius)
        xp.abs(radius, out=radius)
        xp.log(radius, out=radius)
        radius *= self._minus_two
        xp.sqrt(radius, out=radius)
        if scale != 1.0:
            radius *= scale
        xp.multiply(last, self._turn, out=angle)
        xp.cos(angle, out=cosine)
        xp.sin(angle, out=sine)
        cosine *= radius
        sine *= radius
        whole = out if where is None else self._whole[: blocks * _BLOCK]
        whole.reshape(blocks, 2, _HALF)[:] = pair
        if where is not None:
            out[:] = whole[where]

    def times(self, x: Array, factor: float) -> Array:
        """factor x, for x of a chunk's numbers: scratch that the next call overwrites."""
        return self.xp.multiply(x, factor, out=self._pair[: len(x)])

    def white(self, k: int, kind: int, like: Tensor | None, out: Tensor | None) -> Tensor:
        """Draw k, a function of (seed, i, k) alone."""
        out, array = self.target(like, out)
        for chunk in self.chunks:
            self.fill(array[chunk.start : chunk.stop], chunk, k, kind, 0)
        return self.finish(out, array)

    def target(self, like: Tensor | None, out: Tensor | None) -> tuple[Tensor, Array]:
        """The tensor to return, and the flat array to write: its memory, where its dtype and layout allow."""
        if like is not None:
            self._check("like", like)
        if out is not None:
            self._check("out", out)
        elif self._direct:  # the cheapest way to a tensor and its array
            array = np.empty(self.shape, np.float32)
            return torch.from_numpy(array), array.ravel()
        else:
            out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        flat = out.detach() if out.requires_grad else out
        if self.dtype != self._working or not out.is_contiguous():
            flat = torch.empty(self.shape, dtype=self._working, device=self.device)
        return out, (flat.numpy() if self.xp is np else flat).ravel()

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


def _signed(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The halves of words (n,) uint64, low ones first, as (2 n,) int32: in memory as they are where low bytes come first."""
    return words.view(np.int32) if sys.byteorder == "little" else words.astype("<u8").view("<i4").astype(np.int32)


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, int) or not len(shape):
        raise InputError(f"shape={shape!r} has no batch; write shape=(B, ...), such as (1, {shape if shape else 2})")
    return tuple(_integer(f"shape[{j}]", n, 0, _WORD, "shape=(B, ...)") for j, n in enumerate(shape))


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
            self._normals.xp.multiply(step, scale, out=array[chunk.start : chunk.stop])
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
                left = self._normals.empty(chunk.stop - chunk.start)
                self._normals.fill(left, chunk, move.draw, move.kind, move.node, move.deviation)
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
