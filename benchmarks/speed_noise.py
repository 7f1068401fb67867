"""What a normal costs: White against torch.randn, Brownian against White, side by side, on one thread.

    python -m benchmarks.speed_noise

Medians over interleaved repetitions, so that a slow spell of the machine meets every contender alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from sde.noise import Brownian, White
from sde.prediction import Knot

SHAPES = ((4096, 2), (16, 3, 32, 32), (64, 3, 64, 64))
SMALL = ((16, 2), (16, 28, 28))  # where the fixed cost of a draw shows
CELLS = (64, 128, 256, 1024)
STEPS = (20, 64)


def knot(lam: float) -> Knot:
    """A knot at half log-SNR ``lam``: all that noise looks at."""
    return Knot(-lam, 1.0, 1.0, lam, 0.0, 0.0, 0.0)


def timings(
    contenders: Mapping[str, Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    least: int = 5,
) -> dict[str, list[float]]:
    """Seconds of each call, the contenders taking turns for about ``seconds`` in all and ``least`` times at least, after one
    call each to warm up: a slow spell of the machine meets every contender alike.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(times.values()))) < least:
        for name, call in contenders.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return times


def medians(contenders: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds a call of ``timings``."""
    return {name: statistics.median(values) for name, values in timings(contenders, seconds).items()}


def white(shape: Sequence[int], dtype: torch.dtype, seconds: float = 2.0) -> tuple[float, float]:
    """(seconds of torch.randn, seconds of White) for one draw."""
    draws, out = White(0).open(shape, dtype), torch.empty(tuple(shape), dtype=dtype)
    at = knot(0.0)
    found = medians(
        {
            "randn": lambda: torch.randn(tuple(shape), dtype=dtype, out=out),
            "White": lambda: draws.normal(1, at, at, out=out),
        },
        seconds,
    )
    return found["randn"], found["White"]


def brownian(shape: Sequence[int], steps: int, seconds: float = 6.0) -> dict[str, float]:
    """Seconds a run of ``steps`` uniform steps of lam from -5 to 4.5, opening included, by source."""
    out = torch.empty(tuple(shape))
    knots = [knot(-5.0 + 9.5 * n / steps) for n in range(steps + 1)]

    def run(source: White | Brownian) -> None:
        draws = source.open(shape)
        for k in range(steps):
            draws.normal(k, knots[k], knots[k + 1], out=out)

    sources: dict[str, White | Brownian] = {"White": White(0)}
    sources.update({f"cells={cells}": Brownian(0, cells) for cells in CELLS})
    return medians({name: lambda source=source: run(source) for name, source in sources.items()}, seconds)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'one draw':28}{'randn us':>10}{'White us':>10}{'ratio':>8}")
    for shape in (*SMALL, *SHAPES):
        for dtype in (torch.float32, torch.float64):
            randn, ours = white(shape, dtype)
            label = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            print(f"{label:28}{1e6 * randn:10.1f}{1e6 * ours:10.1f}{ours / randn:8.2f}")
    print(f"\n{'a run, in units of White':28}" + "".join(f"{f'cells={cells}':>12}" for cells in CELLS))
    for shape in SHAPES:
        for steps in STEPS:
            found = brownian(shape, steps)
            ratios = "".join(f"{found[f'cells={cells}'] / found['White']:12.2f}" for cells in CELLS)
            print(f"{'x'.join(map(str, shape)) + f', {steps} steps':28}{ratios}")


if __name__ == "__main__":
    main()
