"""What a sampler's loop costs beyond its network: a traced plan against a bare hand-written loop, side by side, on one thread.

    python -m benchmarks speed steps

The network is one multiplication, so the loop is all there is. The hand-written loops take their coefficients as Python
floats, as one would write
them; memory is the peak of live tensors of the state's size, the network's output included and the caller's own start not.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from scores import Score
from sde import VP
from sde.prediction import Knot
from solvers import sample, trace
from solvers.grids import log_snr

from .speed_noise import medians

SHAPES = ((4096, 2), (16, 3, 32, 32), (64, 3, 64, 64))
STEPS = 20


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        print(f"{STEPS} steps, float32, one thread; medians of interleaved runs; ratios to the hand-written loop")
        print(f"{'state':>18} {'sampler':>9} {'hand us/step':>13} {'plan.run':>9} {'sample()':>9} {'buffers':>8}")
        for shape in SHAPES:
            for name in ("ddim", "dpmpp_2m"):
                row = measure(shape, name)
                print(f"{shape!s:>18} {name:>9} {row['hand'] * 1e6 / STEPS:>13.1f} {row['plan'] / row['hand']:>9.2f} "
                      f"{row['sample'] / row['hand']:>9.2f} {row['buffers']:>8.1f}")  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def measure(shape: tuple[int, ...], name: str, seconds: float = 3.0) -> dict[str, float]:
    """Median seconds a run of the hand-written loop, the plan and ``sample``, and the plan's peak of live state-sized
    buffers.
    """
    path = VP()
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.rand(shape[1:], generator=generator), torch.randn(shape, generator=generator)
    score = Score(lambda x, t: x * weight, path, predicts="eps")
    times = log_snr(path, STEPS)
    plan = trace(name, path, times)
    hand = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}[name](path.knots(times), lambda x, t: x * weight, shape[0])
    with torch.no_grad():
        difference = float((plan.run(score, x) - hand(x)).abs().max() / hand(x).abs().max())
        if difference > 1e-4:
            raise RuntimeError(
                f"{name}: the hand-written loop and the plan differ by {difference:.1e}: they are not the same sampler"
            )
        found: dict[str, Any] = medians(
            {
                "hand": lambda: hand(x),
                "plan": lambda: plan.run(score, x),
                "sample": lambda: sample(score, x=x, solver=name, steps=STEPS),
            },
            seconds,
        )
        found["buffers"] = peak_buffers(lambda: plan.run(score, x), x)
    return found


def ddim(knots: list[Knot], network: Callable[[Tensor, Tensor], Tensor], batch: int) -> Callable[[Tensor], Tensor]:
    """x <- a x + b eps."""
    steps = [
        (t.alpha / s.alpha, t.sigma - t.alpha * s.sigma / s.alpha, torch.full((batch,), s.t))
        for s, t in itertools.pairwise(knots)
    ]

    def loop(x: Tensor) -> Tensor:
        for a, b, t in steps:
            x = a * x + b * network(x, t)
        return x

    return loop


def dpmpp_2m(knots: list[Knot], network: Callable[[Tensor, Tensor], Tensor], batch: int) -> Callable[[Tensor], Tensor]:
    """x0 = p x + q eps;  x <- a x + b (c0 x0 + c1 x0_old)."""
    steps = []
    for i, (s, t) in enumerate(itertools.pairwise(knots)):
        h = t.lam - s.lam
        r = (s.lam - knots[i - 1].lam) / h if i else math.inf
        t_s = torch.full((batch,), s.t)
        steps.append(
            (t.sigma / s.sigma, -t.alpha * math.expm1(-h), 1.0 + 0.5 / r, -0.5 / r, 1.0 / s.alpha, -s.sigma / s.alpha, t_s)
        )

    def loop(x: Tensor) -> Tensor:
        old = None
        for a, b, c0, c1, p, q, t in steps:
            x0 = p * x + q * network(x, t)
            x = a * x + b * (x0 if old is None else c0 * x0 + c1 * old)
            old = x0
        return x

    return loop


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations under it made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in given | self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_buffers(run: Callable[[], Any], x: Tensor) -> float:
    """Peak of live memory that ``run`` makes, in units of x."""
    with _Live() as live:
        result = run()
    del result
    return live.peak / (x.numel() * x.element_size())


if __name__ == "__main__":
    main()
