"""sde/noise.py: the words are Philox's, the normals are normal, sample i depends on (seed, i) alone, the path is Brownian."""

from __future__ import annotations

import gc
import hashlib
import inspect
import math
import sys
import threading
import tracemalloc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sde import noise
from sde.errors import InputError
from sde.noise import Brownian, Draws, Source, White, clock
from sde.prediction import Knot

torch.set_num_threads(1)


def at(lam: float, t: float | None = None) -> Knot:
    """A knot at half log-SNR ``lam``: noise looks at t and lam only."""
    return Knot(-lam if t is None else t, 1.0, 1.0, lam, 0.0, 0.0, 0.0)


def place(c: float) -> Knot:
    """The knot at clock ``c``, such that clock(lam) gives c back, or as near as floats go."""
    if c < 1e-9 or c > 1 - 1e-9:
        return at(math.inf if c > 0.5 else -math.inf)
    x = 2.0 * c - 1.0
    lam = 4.0 * x / math.sqrt((1.0 - x) * (1.0 + x))
    for _ in range(8):  # the clock rounds: look for the neighbour that gives c exactly
        if clock(lam) == c:
            break
        lam = math.nextafter(lam, math.inf if clock(lam) < c else -math.inf)
    return at(lam)


ANY = at(0.0)


def white(k: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, **more: object) -> Tensor:
    return White(seed, **more).open(shape, dtype).normal(k, ANY, ANY)  # type: ignore[arg-type]


def sweep(draws: Draws, knots: list[Knot]) -> list[Tensor]:
    return [draws.normal(k, s, t) for k, (s, t) in enumerate(pairwise(knots))]


def increments(draws: Draws, knots: list[Knot]) -> list[Tensor]:
    """B(c_t) - B(c_s) along the sweep."""
    steps = pairwise([clock(knot.lam) for knot in knots])
    return [z * math.sqrt(end - start) for z, (start, end) in zip(sweep(draws, knots), steps, strict=True)]


# ---------------------------------------------------------------------------------------------------------------- words


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 from the paper's recurrence, in Python integers."""
    mask = 2**64 - 1
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        one, two = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (two >> 64) ^ b ^ k0, two & mask, (one >> 64) ^ d ^ k1, one & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [a, b, c, d]


PI = "243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89 452821e638d01377 be5466cf34e90c6c"

#: kat_vectors of Random123: counter and key, then the words.
KNOWN = {
    " ".join(["0" * 16] * 6): "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b",
    " ".join(["f" * 16] * 6): "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
    PI: "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
}


@pytest.mark.parametrize("given_", KNOWN)
def test_known_answers(given_: str) -> None:
    numbers = [int(word, 16) for word in given_.split()]
    counter, key = numbers[:4], numbers[4:]
    wanted = [int(word, 16) for word in KNOWN[given_].split()]
    assert philox(counter, key) == wanted
    number = sum(word << 64 * j for j, word in enumerate(counter))
    before = (number - 1) % 2**256  # numpy increments first
    generator = np.random.Philox(
        key=np.array(key, np.uint64), counter=np.array([before >> 64 * j & (2**64 - 1) for j in range(4)], np.uint64)
    )
    assert generator.random_raw(4).tolist() == wanted


K = 128  # radii, or angles, of a block


@pytest.mark.parametrize("block", [0, 1, 7, 1000001, 2**56 - 1])
def test_words_are_philox_of_the_documented_counter(block: int) -> None:
    words = noise._Philox().words(11, block, 22, 33, 44, 9)
    for j, word in enumerate(words.tolist()):
        counter, lane = divmod(K * block + j, 4)
        assert word == philox([counter + 1, 22, 33, 44], [11, noise.LAYOUT])[lane]


def test_normals_are_box_muller_of_the_documented_words() -> None:
    seed, index, k, size = 5, 3, 7, 200
    found = white(k, (1, size), torch.float64, seed, indices=[index])[0]

    def half(block: int, place: int) -> float:
        """Signed integer ``place`` of a block's 2 K, as float32 has it."""
        counter, lane = divmod(K * block + place // 2, 4)
        word = philox([counter + 1, k, 1, 0], [seed, noise.LAYOUT])[lane]
        part = word >> 32 if place % 2 else word & (2**32 - 1)
        return float(np.float32((part ^ 2**31) - 2**31))

    for j in range(size):
        block, place = divmod(index * size + j, 2 * K)
        o = place % K
        radius = math.sqrt(-2.0 * math.log(abs(float(np.float32(half(block, o)) + np.float32(0.5))) / 2**31))
        angle = math.pi * half(block, K + o) / 2**31
        wanted = radius * (math.cos(angle) if place < K else math.sin(angle))
        assert found[j].item() == pytest.approx(wanted, abs=1e-14)


@pytest.mark.parametrize("order", ["little", "big"])
def test_halves_are_those_of_the_numbers_whatever_the_order_of_bytes(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise.sys, "byteorder", order)  # the long way is right on any machine
    found = noise._signed(np.array([0x0000000180000000, 0xFFFFFFFE00000003], np.uint64))
    assert found.dtype == np.int32
    assert found.tolist() == [-(2**31), 1, 3, -2]


def test_extreme_words_give_finite_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = np.array([0, 2**64 - 1, 2**63, 2**63 - 1, 2**31, 2**32 - 1, 2**32, 0xFFFFFFFF00000000], np.uint64)
    monkeypatch.setattr(noise._Philox, "words", lambda self, *a: np.resize(ends, a[-1]))
    for dtype in (torch.float32, torch.float64):
        z = white(0, (1, 16), dtype)
        assert torch.isfinite(z).all()
        assert 6.6 < z.abs().max() < 6.7


def test_pinned_digests() -> None:
    words = noise._Philox().words(1, 0, 2, 3, 4, 1000)
    assert hashlib.sha256(words.astype("<u8").tobytes()).hexdigest()[:16] == "e9f105cf5970dc7e"
    # Rounded: the last bits belong to the processor's log, sin and cos.
    z = torch.cat([White(1).initial((4, 5), torch.float64), white(2, (4, 5), torch.float64, 1)])
    path = torch.cat(sweep(Brownian(1, 128).open((4, 5), torch.float64), [at(-3.0), at(0.0), at(0.1), at(2.0)]))
    assert [round(v, 9) for v in (z.sum().item(), z.norm().item(), path.sum().item(), path.norm().item())] == PINNED


PINNED = [19.328721669, 6.838583161, 1.186094703, 7.484243926]


# --------------------------------------------------------------------------------------------------------- distribution


def ks(z: Tensor) -> float:
    """sqrt(n) times the Kolmogorov distance to N(0, 1): above 2.0 with probability 7e-4, above 2.5 with 8e-6."""
    x = z.flatten().double().sort().values
    n = len(x)
    cdf = torch.special.ndtr(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((steps[1:] - cdf).max().item(), (cdf - steps[:-1]).max().item())


def correlation(x: Tensor, y: Tensor) -> float:
    """z-score of the sample correlation, for independent unit normals."""
    x, y = x.flatten().double(), y.flatten().double()
    return (x @ y).item() / math.sqrt(len(x))


def assert_normal(z: Tensor) -> None:
    x = z.flatten().double()
    n = len(x)
    assert ks(x) < 2.5
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - mean) < 5 * math.sqrt(variance / n), power
    for edge in (2.0, 3.0, 4.0):
        p = math.erfc(edge / math.sqrt(2.0))
        assert abs((x.abs() > edge).double().mean().item() - p) < 5 * math.sqrt(p / n) + 5 / n, edge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(100000, 2), (20000, 5), (300, 1000), (2, 50001)])
def test_standard_normal(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_normal(white(3, shape, dtype, 4))
    assert_normal(White(4).initial(shape, dtype))


def test_small_radii_are_not_quantised() -> None:
    z = white(0, (500000, 2))
    radius = z.double().norm(dim=1)
    small = radius[radius < 0.02]
    assert abs(len(small) - 100) < 50  # P(r < 0.02) = 2e-4
    assert len(set((small**2).tolist())) == len(small)


def test_draws_samples_seeds_and_kinds_are_independent() -> None:
    shape, draws = (2000, 50), White(9).open((2000, 50))
    first = draws.normal(0, ANY, ANY)
    others = {f"k={k}": draws.normal(k, ANY, ANY) for k in (1, 2, 1000, 2**63)}
    others |= {f"seed={seed}": white(0, shape, seed=seed) for seed in (8, 10, 2**64 - 1)}
    others |= {"initial": draws.initial(), "next sample": white(0, shape, seed=9, indices=range(1, 2001))}
    others |= {"next draw's next sample": white(1, shape, seed=9, indices=range(1, 2001))}
    others["far samples"] = white(0, shape, seed=9, indices=range(2**40, 2**40 + 2000))
    for name, other in others.items():
        for x, y in ((first, other), (first**2 - 1, (other**2 - 1) / 2)):
            assert abs(correlation(x, y)) < 5, name
        assert (first == other).sum() < 5, name
    for lag in (1, 2, 49, 50, 51, 127, 128, 129, 256):  # within a sample and across samples, the two normals of a pair included
        flat = first.flatten()
        assert abs(correlation(flat[lag:], flat[:-lag])) < 5
        assert abs(correlation(flat[lag:] ** 2 - 1, (flat[:-lag] ** 2 - 1) / 2)) < 5


# ----------------------------------------------------------------------------------------------------- (seed, i) alone

SHAPES = [(1,), (2,), (3,), (5,), (12,), (3, 32, 32)]
SOURCES = [White(3), Brownian(3, 16)]
KNOTS = [at(-3.0), at(-0.4), at(-0.3), at(0.9), at(math.inf)]


def together(source: Source, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    draws = source.open(shape, dtype)
    return torch.stack([draws.initial(), *sweep(draws, KNOTS)], dim=1)


def select(source: White | Brownian, **streams: object) -> White | Brownian:
    return White(**{"seed": 3, **streams}) if isinstance(source, White) else Brownian(**{"seed": 3, "cells": 16, **streams})  # type: ignore[arg-type]


@pytest.mark.parametrize("source", SOURCES, ids=["white", "brownian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_bits_depend_on_seed_and_index_alone(source: White | Brownian, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    batch = 1000 if math.prod(size) < 10 else 300 if math.prod(size) < 100 else 70
    whole = together(source, (batch, *size), dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(together(source, (batch, *size), dtype), whole)
            for part in (1, 7, 64) if threads == 1 else (7,):  # batch sizes, at a place that no chunk or vector begins at
                found = together(select(source, indices=range(5, 5 + part)), (part, *size), dtype)
                assert torch.equal(found, whole[5 : 5 + part])
        finally:
            torch.set_num_threads(1)
    order = np.random.default_rng(0).permutation(batch)[:20].tolist()
    order += [order[0], *range(20, 30), *range(40, 20, -2)]
    assert torch.equal(together(select(source, indices=order), (len(order), *size), dtype), whole[order])
    shards = [together(select(source, indices=range(j, batch, 3)), (len(range(j, batch, 3)), *size), dtype) for j in range(3)]
    assert all(torch.equal(shard, whole[j::3]) for j, shard in enumerate(shards))


def test_every_length_of_sample() -> None:
    """Whatever lane of a vector a word lands in: lengths 1 ... 200, alone and behind others, and chunks of every kind."""
    for dtype in (torch.float32, torch.float64):
        for n in range(1, 201):
            whole = white(1, (9, n), dtype)
            assert torch.equal(white(1, (1, n), dtype, indices=[8])[0], whole[8]), n
            assert torch.equal(white(1, (2, n), dtype, indices=[3, 1]), whole[[3, 1]]), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_do_not_show(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample longer than a chunk, a chunk of several samples, and one chunk for all: the same bits."""
    for source in SOURCES:
        whole = together(source, (5, 1001), dtype)
        for limit in (1, 2, 3, 19, 20):  # blocks
            monkeypatch.setattr(noise, "_CPU_CHUNK", limit)
            assert torch.equal(together(source, (5, 1001), dtype), whole), limit
            assert torch.equal(together(select(source, indices=[3]), (1, 1001), dtype)[0], whole[3]), limit
        monkeypatch.undo()


def test_chunks_never_reach_the_size_that_torch_splits_over_threads() -> None:
    """which is what keeps torch's bits from depending on where a number sits; and they cover the batch once."""
    for size in (1, 2, 3, 5, 12, 3072, 12288, 40000, 10**6):
        for indices in (range(64), range(3, 10), [5], [0, 2, 4, 4, 9, 8]):
            chunks = White(indices=indices).open((len(indices), size))._normals.chunks  # type: ignore[attr-defined]
            assert all(chunk.blocks * K <= 1 << 14 for chunk in chunks)
            assert all(sum(piece[2] for piece in chunk.pieces) == chunk.blocks for chunk in chunks)
            assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
            assert (chunks[0].start, chunks[-1].stop) == (0, len(indices) * size)


def test_neighbours_share_the_blocks_they_are_in() -> None:
    """A shard of every third sample of two numbers costs its blocks once, not one a sample."""
    chunks = White(indices=range(0, 3000, 3)).open((1000, 2))._normals.chunks  # type: ignore[attr-defined]
    assert sum(chunk.blocks for chunk in chunks) == math.ceil(2998 * 2 / (2 * K))


@pytest.mark.parametrize("source", SOURCES, ids=["white", "brownian"])
def test_one_seed_a_sample(source: White | Brownian) -> None:
    seeds = [7, 7, 0, 2**64 - 1, 12]
    found = together(select(source, seed=0, seeds=seeds), (5, 3))
    for row, seed in zip(found, seeds, strict=True):
        assert torch.equal(row, together(select(source, seed=seed), (1, 3))[0])
        assert torch.equal(row, together(select(source, seed=0, seeds=[seed]), (1, 3))[0])
        assert torch.equal(row, together(select(source, seed=seed), (40, 3))[0])


@pytest.mark.parametrize("source", SOURCES, ids=["white", "brownian"])
def test_dtypes_see_the_same_noise(source: Source) -> None:
    double, single = (together(source, (200, 33), dtype) for dtype in (torch.float64, torch.float32))
    # A few ulp of the radius, which is at most 6.7.
    assert (double - single.double()).abs().max() < (2e-6 if isinstance(source, White) else 4e-6)
    assert (double - single.double()).pow(2).mean().sqrt() < 2e-7
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(together(source, (200, 33), dtype), single.to(dtype))


@pytest.mark.parametrize("source", SOURCES, ids=["white", "brownian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_out_and_layouts(source: Source, dtype: torch.dtype) -> None:
    shape = (4, 3, 6, 5)
    wanted = together(source, shape, dtype)
    wide = torch.full((4, 3, 6, 10), 7.0, dtype=dtype)
    for out in (
        torch.empty(shape, dtype=dtype),
        torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last),
        torch.empty((5, 6, 3, 4), dtype=dtype).permute(3, 2, 1, 0),
        wide[..., ::2],
        torch.empty(shape, dtype=dtype, requires_grad=True),
        torch.empty((5, *shape[1:]), dtype=dtype)[1:],
    ):
        draws, strides = source.open(shape, dtype), out.stride()
        assert draws.initial(out) is out
        assert torch.equal(out, wanted[:, 0])
        for k, (s, t) in enumerate(pairwise(KNOTS)):
            assert draws.normal(k, s, t, like=out, out=out) is out
            assert torch.equal(out, wanted[:, k + 1])
        assert out.stride() == strides
        assert out.grad_fn is None
    assert torch.all(wide[..., 1::2] == 7)


def test_results_are_the_callers() -> None:
    """A later draw does not write into an earlier result, and changing a result does not change a later draw."""
    for source in SOURCES:
        draws = source.open((3, 2000))
        found = [draws.initial(), *sweep(draws, KNOTS)]
        kept = [z.clone() for z in found]
        for k, (s, t) in enumerate(pairwise(KNOTS)):
            draws.normal(k, s, t).fill_(9.0)
        assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
        assert torch.equal(torch.stack(found, 1), together(source, (3, 2000)))


def test_global_state_is_left_alone() -> None:
    """Neither read nor written: generators, default dtype, number of threads, inference mode."""
    wanted = [together(source, (3, 5)) for source in SOURCES]
    torch.manual_seed(0)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode():
            opened = [source.open((3, 5)) for source in SOURCES]
            found = [together(source, (3, 5)) for source in SOURCES]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(draws.initial(), z[:, 0]) for draws, z in zip(opened, wanted, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]


@pytest.mark.parametrize("source", SOURCES, ids=["white", "brownian"])
def test_one_source_in_eight_threads(source: Source) -> None:
    wanted, found = together(source, (16, 700)), list[Tensor]()

    def work() -> None:
        found.extend(together(source, (16, 700)) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(torch.equal(z, wanted) for z in found)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("source", SOURCES, ids=["white", "brownian"])
def test_cuda_agrees_with_the_cpu(source: Source) -> None:
    for dtype, tolerance in ((torch.float32, 4e-6), (torch.float64, 1e-14)):
        draws = source.open((70, 33), dtype, "cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = torch.stack([draws.initial(), *sweep(draws, KNOTS)], dim=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.device.type == "cuda"
        assert (found.cpu() - together(source, (70, 33), dtype)).abs().max() < tolerance
        again = source.open((70, 33), dtype, "cuda")
        assert torch.equal(torch.stack([again.initial(), *sweep(again, KNOTS)], dim=1), found)


# ------------------------------------------------------------------------------------------------------------- Brownian


def test_clock() -> None:
    assert (clock(-math.inf), clock(0.0), clock(math.inf)) == (0.0, 0.5, 1.0)
    lams = torch.linspace(-30.0, 30.0, 1001, dtype=torch.float64).tolist()
    assert all(clock(a) < clock(b) for a, b in pairwise(lams))
    assert all(clock(a) + clock(-a) == pytest.approx(1.0, abs=1e-15) for a in lams)
    assert clock(3.0) == 0.8  # 1/2 + 3 / (2 * 5)
    assert clock(4.5) - clock(-5.0) == pytest.approx(0.764, abs=1e-3)


def assert_brownian(knots: list[Knot], cells: int, batch: int = 40000, seed: int = 0) -> None:
    """cov(B(c_i), B(c_j)) = min(c_i, c_j) - c_0 for the values of many paths, every entry within 5 standard errors."""
    steps = increments(Brownian(seed, cells).open((batch, 2), torch.float64), knots)
    c = torch.tensor([clock(knot.lam) for knot in knots], dtype=torch.float64)
    d = torch.stack([z.flatten() for z in steps]) / (c[1:] - c[:-1]).sqrt()[:, None]
    n = d.shape[1]
    eye = torch.eye(len(d), dtype=torch.float64)
    scores = (d @ d.T / n - eye) * math.sqrt(n) / (1.0 + eye).sqrt()
    assert scores.abs().max() < 5, "correlation of the increments"
    assert abs(d.mean(1) * math.sqrt(n)).max() < 5
    assert all(ks(row) < 2.5 for row in d)
    values = torch.stack([z.flatten() for z in steps]).cumsum(0)
    wanted = torch.minimum(c[1:, None], c[None, 1:]) - c[0]
    spread = ((wanted.diagonal()[:, None] * wanted.diagonal() + wanted**2) / n).sqrt()
    assert ((values @ values.T / n - wanted) / spread).abs().max() < 5, "covariance of the values"


GRIDS = {
    "uniform in lambda": [at(-5.0 + 9.5 * n / 12) for n in range(13)],
    "from end to end": [at(-math.inf), at(-3.0), at(-2.9), at(1.0), at(7.0), at(math.inf)],
    "one step": [at(-math.inf), at(math.inf)],
    "ends of cells": [place(j / 8) for j in range(9)],
    "many knots in a cell": [place(c) for c in (0.26, 0.27, 0.29, 0.33, 0.34, 0.36, 0.372, 0.374, 0.38, 0.49, 0.51)],
    "random": [place(c) for c in sorted(np.random.default_rng(3).random(12).tolist())],
    "beginning inside a cell": [at(0.2), at(0.21), at(0.22), at(5.0)],
}


@pytest.mark.parametrize("cells", [1, 8, 128])
@pytest.mark.parametrize("name", GRIDS)
def test_increments_have_their_exact_law(name: str, cells: int) -> None:
    assert_brownian(GRIDS[name], cells)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(
    st.lists(st.floats(0.0, 1.0, allow_subnormal=False), min_size=2, max_size=9, unique_by=lambda c: round(c, 6)),
    st.sampled_from([1, 2, 16, 1024]),
    st.integers(0, 2**64 - 1),
)
def test_any_grid_has_the_exact_law(places: list[float], cells: int, seed: int) -> None:
    assert_brownian([place(c) for c in sorted(places)], cells, batch=4000, seed=seed)


def test_midpoints_and_bridges_have_the_documented_deviation() -> None:
    """Given the ends: sqrt(w) / 2 at the middle of a node, sqrt(p (w - p) / w) inside a cell."""
    shape, double = (50000, 2), torch.float64
    ends = increments(Brownian(1, 4).open(shape, double), [place(0.25), place(0.5)])[0]
    for cells, c in ((8, 0.375), (4, 0.3), (4, 0.45)):
        first = increments(Brownian(1, cells).open(shape, double), [place(0.25), place(c), place(0.5)])[0]
        fraction = (c - 0.25) / 0.25
        rest = (first - fraction * ends) / math.sqrt(0.25 * fraction * (1 - fraction))
        assert_normal(rest)
        assert abs(correlation(rest, ends / 0.5)) < 5


@pytest.mark.parametrize("cells", [16, 128])
def test_grids_share_the_path_at_the_ends_of_cells(cells: int) -> None:
    """Sums of increments between ends of cells agree to 1e-12 for all grids that contain them."""
    shape, rng = (6, 5), np.random.default_rng(0)
    ends = [j / cells for j in range(cells + 1)]
    fine = torch.stack(increments(Brownian(5, cells).open(shape, torch.float64), [place(c) for c in ends]))
    values = dict(zip(ends, torch.cat([torch.zeros(1, *shape), fine]).cumsum(0), strict=True))
    for _ in range(30):
        chosen = sorted(rng.choice(ends, rng.integers(2, 9), replace=False).tolist())
        between = rng.random(rng.integers(0, 12)).tolist()  # knots inside cells do not disturb the ends
        places = sorted({*chosen, *between})
        steps = increments(Brownian(5, cells).open(shape, torch.float64), [place(c) for c in places])
        found = dict(zip(places, torch.cat([torch.zeros(1, *shape), torch.stack(steps)]).cumsum(0), strict=True))
        for a, b in pairwise(chosen):
            assert ((found[b] - found[a]) - (values[b] - values[a])).abs().max() < 1e-12


def test_finer_cells_refine_the_same_path() -> None:
    knots = [place(j / 8) for j in range(9)]
    paths = [torch.stack(increments(Brownian(5, cells).open((6, 5), torch.float64), knots)) for cells in (8, 64, 4096)]
    assert all((path - paths[0]).abs().max() < 1e-12 for path in paths)


def endpoint(source: Source, steps: int) -> Tensor:
    """Euler-Maruyama for dX = -X dc + (1 + c) dB over the clock of lam in [-5, 4.5], steps uniform in lam."""
    knots = [at(-5.0 + 9.5 * n / steps) for n in range(steps + 1)]
    draws = source.open((500, 2), torch.float64)
    x = torch.zeros(500, 2, dtype=torch.float64)
    for k, (s, t) in enumerate(pairwise(knots)):
        start, step = clock(s.lam), clock(t.lam) - clock(s.lam)
        x = x - x * step + (1 + start) * math.sqrt(step) * draws.normal(k, s, t)
    return x


def test_refinement_is_strongly_coupled() -> None:
    def apart(x: Tensor, y: Tensor) -> float:
        return (x - y).pow(2).mean().sqrt().item()

    # The last: a cell with two knots costs the coupling at once, so cells must outnumber the steps well.
    for steps, cells, bound in ((8, 128, 0.05), (16, 128, 0.03), (64, 1024, 0.01), (64, 128, 0.1)):
        other = apart(endpoint(Brownian(1, cells), steps), endpoint(Brownian(2, cells), 2 * steps))
        assert apart(endpoint(Brownian(1, cells), steps), endpoint(Brownian(1, cells), 2 * steps)) < bound * other
        assert apart(endpoint(White(1), steps), endpoint(White(1), 2 * steps)) > 0.5 * other
    # With cells to spare the error falls with the step, at order 1 for additive noise.
    errors = [apart(endpoint(Brownian(1, 2**14), n), endpoint(Brownian(1, 2**14), 2 * n)) for n in (16, 64, 256)]
    assert math.log2(errors[0] / errors[2]) / 4 > 0.9


def test_replay_gives_the_same_bits() -> None:
    """The last draw at any time; every draw where no cell has two knots; all of a run that starts over."""
    crowded = [place(c) for c in (0.26, 0.27, 0.28, 0.30, 0.31, 0.33, 0.37, 0.378, 0.4, 0.7)]
    spread = [place(c) for c in (0.05, 0.3, 0.4, 0.6, 0.61, 0.8, 1.0)]
    for knots, cells in ((crowded, 8), (crowded, 1), (spread, 128), (crowded, 2**20)):
        wanted = sweep(Brownian(2, cells).open((2, 3)), knots)
        draws = Brownian(2, cells).open((2, 3))
        for k, (s, t) in enumerate(pairwise(knots)):
            assert all(torch.equal(draws.normal(k, s, t), wanted[k]) for _ in range(3)), k
        assert all(torch.equal(a, b) for a, b in zip(sweep(draws, knots), wanted, strict=True))
    pairs = [(0.1, 0.26), (0.28, 0.3), (0.31, 0.32), (0.32, 0.6)]  # with gaps: where a draw begins is a knot, too
    draws = Brownian(2, 4).open((2, 3))
    for k, (a, b) in enumerate(pairs):
        assert torch.equal(draws.normal(k, place(a), place(b)), draws.normal(k, place(a), place(b))), k
    for k in (4, 1, 5, 0, 3, 3, 2):
        draws = Brownian(2, 128).open((2, 3))
        expected = sweep(draws, spread)
        assert torch.equal(draws.normal(k, spread[k], spread[k + 1]), expected[k])


def test_a_stretch_of_the_path_is_used_once() -> None:
    """Correctors, steps towards noise and second passes get white noise numbered by k: all draws of a run are independent."""
    a, b, c, d = at(-2.0), at(-1.0), at(0.5), at(3.0)
    pairs = [(a, b), (b, b), (a, b), (b, a), (a, c), (b, c), (c, c), (c, d), (b, d)]
    white_ = [False, True, True, True, True, False, True, False, True]
    draws = Brownian(6).open((40000, 2))
    found = [draws.normal(k, s, t) for k, (s, t) in enumerate(pairs)]
    for k, z in enumerate(found):
        assert torch.equal(z, white(k, (40000, 2), seed=6)) == white_[k], k
        assert abs(ks(z)) < 2.5
        assert all(abs(correlation(z, other)) < 5 for other in found[:k]), k


def test_clock_saturation_is_white() -> None:
    draws = Brownian(6).open((2, 3))
    assert torch.equal(draws.normal(0, at(1e12), at(math.inf)), white(0, (2, 3), seed=6))
    assert torch.equal(draws.normal(1, at(-math.inf), at(-1e12)), white(1, (2, 3), seed=6))


def test_both_sources_start_from_the_same_state() -> None:
    assert torch.equal(White(8).initial((3, 4)), Brownian(8).initial((3, 4)))


def test_float32_keeps_its_digits_on_tiny_steps() -> None:
    """The stack holds increments: a step of 1e-6 of the path is not a difference of values of size 1."""
    knots = [place(0.6 + 1e-6 * n) for n in range(5)]
    single, double = (
        torch.stack(sweep(Brownian(1, 2**24).open((100, 3), dtype), knots)) for dtype in (torch.float32, torch.float64)
    )
    assert (single.double() - double).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("cells", "steps", "batch"), [(1, 20_000, 0), (2**20, 8_000, 0), (1, 2_000, 1), (128, 2_000, 1), (2**20, 2_000, 1)]
)
def test_many_steps(cells: int, steps: int, batch: int) -> None:
    """2e4 steps (of a batch of none: the host's part) and 2e3 with numbers, without recursion; the stack stays short."""
    draws, out = Brownian(1, cells).open((batch, 2)), torch.empty(batch, 2)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 40)
    try:
        total, s = 0.0, at(-5.0)
        for k in range(steps):
            t = at(-5.0 + 9.5 * (k + 1) / steps)
            total += draws.normal(k, s, t, out=out).pow(2).sum().item()
            s = t
    finally:
        sys.setrecursionlimit(limit)
    assert batch == 0 or abs(total / (2 * steps) - 1) < 5 * math.sqrt(1 / steps)
    assert len(draws._ahead) <= math.log2(cells) + 2  # type: ignore[attr-defined]
    assert len(draws._knots) <= 6 + 6 * steps / cells  # of one cell or two  # type: ignore[attr-defined]


def test_memory_is_a_few_states_and_freed() -> None:
    size = 1 << 20
    state, out = 4 * size, torch.empty(1, size)
    for source, states in ((White(1), 0.5), (Brownian(1, 64), 10)):
        tracemalloc.start()
        try:
            draws = source.open((1, size))
            for k in range(12):
                draws.normal(k, at(-5.0 + 9.5 * k / 12), at(-5.0 + 9.5 * (k + 1) / 12), out=out)
            _, peak = tracemalloc.get_traced_memory()
            alive = weakref.ref(draws)
            gc.disable()  # freed by counting: no cycle waits for a collection
            del draws
            assert alive() is None
            held, _ = tracemalloc.get_traced_memory()
        finally:
            gc.enable()
            tracemalloc.stop()
        assert peak < states * state
        assert peak > state or isinstance(source, White)  # it was measured
        assert held < 1 << 16


# ---------------------------------------------------------------------------------------------------------------- input


def test_frozen_values() -> None:
    assert White(3, indices=[1, 2]) == White(3, indices=(1, 2))
    assert hash(Brownian(3, 64, seeds=None)) == hash(Brownian(3, 64))
    assert White(np.int64(3)).seed == 3  # type: ignore[arg-type]
    assert White(3, indices=torch.tensor([1, 2])).indices == (1, 2)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        White(3).seed = 4  # type: ignore[misc]


BAD = [
    ("seed=-1", {"seed": -1}),
    ("seed=18446744073709551616", {"seed": 2**64}),
    ("seed=0.5", {"seed": 0.5}),
    ("seed=True", {"seed": True}),
    ("seed=None", {"seed": None}),
    ("initial_seed", {"seed": torch.Generator()}),
    (r"indices\[1\]=-2", {"indices": [0, -2]}),
    (r"indices\[0\]=-3", {"indices": range(-3, 3)}),
    ("indices=4", {"indices": 4}),
    (r"seeds\[1\]=1.5", {"seeds": [1, 1.5]}),
    ("seeds=<torch", {"seeds": torch.Generator()}),
    (r"seeds\[0\].*initial_seed", {"seeds": [torch.Generator()]}),
    ("seeds and indices", {"seeds": [1], "indices": [0]}),
    ("seeds and seed=4", {"seeds": [1], "seed": 4}),
]


@pytest.mark.parametrize("kind", [White, Brownian])
@pytest.mark.parametrize(("message", "arguments"), BAD, ids=[message for message, _ in BAD])
def test_bad_streams(kind: type, message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match=message):
        kind(**arguments)


@pytest.mark.parametrize("cells", [0, 3, -2, 1.0, True, None, 2**53])
def test_bad_cells(cells: object) -> None:
    with pytest.raises(InputError, match="cells="):
        Brownian(0, cells)  # type: ignore[arg-type]


def test_bad_opening() -> None:
    for name, source in (("seeds", White(seeds=[1, 2])), ("indices", White(indices=[1, 2, 3]))):
        with pytest.raises(InputError, match=f"{name} has . entries for a batch of 4"):
            source.open((4, 2))
    for shape in ((), 4, (2, -1), (2, 1.5), (True, 2)):
        with pytest.raises(InputError, match="shape"):
            White().open(shape)  # type: ignore[arg-type]
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn, float):
        with pytest.raises(InputError, match="dtype"):
            White().open((4, 2), dtype)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="beyond the stream"):
        White(indices=[2**64 - 1]).open((1, 100))


def test_bad_draws() -> None:
    for draws in (White().open((4, 2)), Brownian().open((4, 2))):
        for k in (-1, 2**64):
            with pytest.raises(InputError, match="k="):
                draws.normal(k, ANY, ANY)
        for wrong in (torch.empty(4, 3), torch.empty(4, 2, dtype=torch.float64), torch.empty(4, 2, device="meta")):
            with pytest.raises(InputError, match="like is"):
                draws.normal(0, ANY, ANY, like=wrong)
            with pytest.raises(InputError, match="out is"):
                draws.normal(0, ANY, ANY, out=wrong)
    with pytest.raises(InputError, match="lam is nan"):
        Brownian().open((4, 2)).normal(0, at(math.nan, 0.5), ANY)


def test_empty_batches() -> None:
    for source in SOURCES:
        for shape in ((0, 3), (3, 0), (2, 0, 4)):
            assert together(source, shape).shape == (shape[0], 5, *shape[1:])


def test_scalar_samples() -> None:
    assert torch.equal(white(0, (5,)), white(0, (5, 1))[:, 0])
