"""What all grids are made of: the checks they share, their ends, and equal steps in a coordinate.

A grid that is finite at both ends of its path takes them as they are. One in lambda or rho = sigma / alpha cannot reach a time
where they are infinite: with sigma(stop) = 0 it goes to t_min in n - 1 steps and to ``stop`` in the last (as released samplers
that end at zero do); with alpha(T) = 0, to rounding, it starts at T - t_min T unless told otherwise, and says so if told to
start where alpha is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError
from sde.path import Path

Grid = Callable[..., Tensor]
Law = Callable[[float, float, int], Tensor]
"""(first time, last time, steps) -> steps + 1 times."""
Map = Callable[[Tensor], Tensor]


def need(ok: bool, name: str, value: Any, wanted: str) -> None:
    """An InputError that names the argument and its value unless ``ok``."""
    if not ok:
        raise InputError(f"{name}={value!r}: {wanted}")


def check(path: Path, n: int, start: float | None, stop: float | None) -> None:
    """The arguments that all grids share."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise InputError(f"steps must be an int, got {n!r}")
    if n < 1:
        raise InputError(f"steps must be >= 1, got {n}")
    for name, value in (("start", start), ("stop", stop)):
        if value is not None and not 0.0 <= value <= path.T:
            raise InputError(f"{name}={value:g} is outside the domain [0, {path.T:g}] of {path}")
    if start is not None and stop is not None:
        falling(start, stop)


def falling(start: float, stop: float) -> None:
    if not start > stop:
        raise InputError(f"start={start:g} must be above stop={stop:g}: grids run from noise to data")


def ends(
    path: Path, n: int, start: float | None, stop: float | None, law: Law, *, finite: bool = False, zero: float | None = None
) -> Tensor:
    """n steps by ``law(start, stop, steps)``, both ends exact.

    finite : the law holds where lambda is infinite
    zero   : where the last step to sigma(stop) = 0 begins (default t_min)
    """
    check(path, n, start, stop)
    no_data = float(path.alpha(path.T)) < 1e-15  # 0 but for rounding: cos(pi/2) is 6e-17, and lambda there -37
    b = float(stop) if stop is not None else path.t_min
    back_off = min(path.t_min * path.T, 0.5 * (path.T - b)) if no_data and not finite else 0.0
    a = float(start) if start is not None else path.T - back_off
    falling(a, b)
    if not finite and math.isinf(float(path.lam(a))):
        raise InputError(
            f"alpha({a:g}) = 0, so lambda is infinite at start={a:g}: "
            f"use grid='uniform' or 'cosine', or start={path.T - path.t_min * path.T:g}"
        )
    if not finite and math.isinf(float(path.lam(b))):
        before = path.t_min if zero is None else zero
        if n > 1 and not b < before < a:
            raise InputError(
                f"sigma({b:g}) = 0, so lambda is infinite at stop={b:g}, and t_min={before:g} is not between: raise stop"
            )
        head = law(a, before, n - 1).clone() if n > 1 else torch.tensor([a], dtype=torch.float64)
        if n > 1:
            head[-1] = before
        return exact(torch.cat([head, torch.tensor([b], dtype=torch.float64)]), a, b)
    return exact(law(a, b, n), a, b)


def exact(times: Tensor, first: float, last: float) -> Tensor:
    """A copy with these ends; refused where two neighbours are the same time."""
    times = times.clone()
    times[0], times[-1] = first, last
    same = times[1:] >= times[:-1]
    if bool(same.any()):
        i = int(same.nonzero()[0])
        raise InputError(
            f"steps={len(times) - 1}: times {i} and {i + 1} of this grid are {float(times[i])!r} and {float(times[i + 1])!r}, "
            "too close for float64: take fewer steps, other parameters, or grid='uniform'"
        )
    return times


def equal(
    path: Path,
    n: int,
    start: float | None,
    stop: float | None,
    to: Map,
    back: Map,
    *,
    bend: Map | None = None,
    finite: bool = False,
) -> Tensor:
    """Equal steps in the coordinate to(t), whose inverse is ``back``; ``bend`` makes other steps of the ramp from 0 to 1."""

    def law(a: float, b: float, m: int) -> Tensor:
        first, last = (float(to(torch.tensor(t, dtype=torch.float64))) for t in (a, b))
        if bend is None:
            return back(torch.linspace(first, last, m + 1, dtype=torch.float64))
        return back(first + (last - first) * bend(ramp(m)))

    return ends(path, n, start, stop, law, finite=finite)


def in_time(path: Path, n: int, start: float | None, stop: float | None, shape: Callable[[int], Tensor]) -> Tensor:
    """t = stop + (start - stop) shape(n), where shape(n) holds n + 1 numbers from 1 down to 0."""
    return ends(path, n, start, stop, lambda a, b, m: b + (a - b) * shape(m), finite=True)


def ramp(n: int) -> Tensor:
    """0, 1/n, ..., 1."""
    return torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)


def bisect(fn: Map, target: Tensor, low: float, high: float) -> Tensor:
    """Where in [low, high] the rising ``fn`` reaches each target, to rounding."""
    lower, upper = torch.full_like(target, low), torch.full_like(target, high)
    for _ in range(100):
        middle = 0.5 * (lower + upper)
        below = fn(middle) < target
        lower, upper = torch.where(below, middle, lower), torch.where(below, upper, middle)
    return 0.5 * (lower + upper)
