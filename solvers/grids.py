"""Grids: plain functions (path, n) -> n + 1 decreasing float64 times from ``start`` (default T) to ``stop`` (default the
path's t_min).

rho = sigma / alpha and lambda = -log rho. A grid in lambda or rho cannot reach a time where they are infinite in one law:
with sigma(stop) = 0 it goes to t_min in n - 1 steps and to ``stop`` in the last (as released samplers that end at zero do);
with alpha(start) = 0 it starts at T - t_min instead unless told otherwise, and says so if an infinite start is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, ToolkitError, nearest
from sde.path import Path

Grid = Callable[..., Tensor]


def uniform(path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
    """Equal steps in t."""
    return _ends(path, n, start, stop, lambda a, b, m: torch.linspace(a, b, m + 1, dtype=torch.float64), infinite_ok=True)


def quadratic(path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
    """Equal steps in sqrt(t) (DDIM's and DPM-Solver's 'quadratic')."""
    law = lambda a, b, m: torch.linspace(math.sqrt(a), math.sqrt(b), m + 1, dtype=torch.float64) ** 2  # noqa: E731
    return _ends(path, n, start, stop, law, infinite_ok=True)


def karras(path: Path, n: int, start: float | None = None, stop: float | None = None, rho: float = 7.0) -> Tensor:
    """Equal steps in (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. 5)."""
    if not rho > 0:
        raise InputError(f"rho={rho}: must be > 0 (Karras et al. use 7)")

    def law(a: float, b: float, m: int) -> Tensor:
        first, last = (math.exp(-float(path.lam(t)) / rho) for t in (a, b))
        return path.time(-rho * torch.log(torch.linspace(first, last, m + 1, dtype=torch.float64)))

    return _ends(path, n, start, stop, law)


def log_snr(path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
    """Equal steps in lambda, half the log signal-to-noise ratio (Lu et al. 2022)."""

    def law(a: float, b: float, m: int) -> Tensor:
        return path.time(torch.linspace(float(path.lam(a)), float(path.lam(b)), m + 1, dtype=torch.float64))

    return _ends(path, n, start, stop, law)


def cosine(path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
    """Equal steps in the angle arctan(sigma/alpha): a cosine schedule on any path, finite at both ends."""

    def law(a: float, b: float, m: int) -> Tensor:
        first, last = (math.atan2(float(path.sigma(t)), float(path.alpha(t))) for t in (a, b))
        return path.time(-torch.log(torch.tan(torch.linspace(first, last, m + 1, dtype=torch.float64))))

    return _ends(path, n, start, stop, law, infinite_ok=True)


#: Align Your Steps (Sabour, Fidler & Kreis 2024): the noise levels sigma/alpha published for ten steps, data of the paper's
#: quick-start page.
AYS_TABLES = {
    "ays_sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def _ays(name: str) -> Grid:
    def grid(path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
        _check(path, n, start, stop)
        table = torch.tensor(AYS_TABLES[name], dtype=torch.float64).log()
        place = torch.linspace(0, len(table) - 1, n + 1, dtype=torch.float64)
        low = place.floor().clamp(max=len(table) - 2).long()
        levels = table[low] + (place - low) * (table[low + 1] - table[low])
        first, last = (-math.log(AYS_TABLES[name][i]) for i in (0, -1))
        a = max(first, float(path.lam(path.T))) if start is None else float(path.lam(start))
        b = min(last, float(path.lam(0.0))) if stop is None else float(path.lam(stop))
        if not (math.isfinite(a) and math.isfinite(b)):
            raise InputError(
                f"{name} is a table of noise levels: start={start} and stop={stop} must have finite sigma/alpha > 0"
            )
        if not a < b:
            low, high = math.exp(-b), math.exp(-a)
            raise InputError(
                f"{name} covers sigma/alpha from {AYS_TABLES[name][-1]:g} to {AYS_TABLES[name][0]:g}, which {path} does not "
                f"reach ({low:g}, {high:g})"
            )
        # the published levels, mapped affinely in lambda where other ends were asked for or the path does not reach them
        lam = a + (-levels - first) * ((b - a) / (last - first))
        return path.time(lam) if (start, stop) == (None, None) else _pin(path.time(lam), start, stop)

    grid.__name__ = name
    grid.__doc__ = f"The published Align Your Steps levels {AYS_TABLES[name]}, interpolated linearly in log sigma for other n."
    return grid


def _check(path: Path, n: int, start: float | None, stop: float | None) -> None:
    """The arguments that all grids share."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise InputError(f"steps must be an int, got {n!r}")
    if n < 1:
        raise InputError(f"steps must be >= 1, got {n}")
    for name, value in (("start", start), ("stop", stop)):
        if value is not None and not 0.0 <= value <= path.T:
            raise InputError(f"{name}={value:g} is outside the domain [0, {path.T:g}] of {path}")
    if start is not None and stop is not None and not start > stop:
        raise InputError(f"start={start:g} must be above stop={stop:g}: grids run from noise to data")


def _pin(times: Tensor, start: float | None, stop: float | None) -> Tensor:
    if start is not None:
        times[0] = start
    if stop is not None:
        times[-1] = stop
    return times


def _ends(
    path: Path,
    n: int,
    start: float | None,
    stop: float | None,
    law: Callable[[float, float, int], Tensor],
    infinite_ok: bool = False,
) -> Tensor:
    """n steps by ``law(start, stop, steps)``, both ends exact."""
    _check(path, n, start, stop)
    noisy_infinite = float(path.alpha(path.T)) == 0.0
    a = float(start) if start is not None else path.T - (0.0 if infinite_ok or not noisy_infinite else path.t_min * path.T)
    b = float(stop) if stop is not None else path.t_min
    if not a > b:
        raise InputError(f"start={a:g} must be above stop={b:g}: grids run from noise to data")
    if not infinite_ok and math.isinf(float(path.lam(a))):
        raise InputError(
            f"alpha({a:g}) = 0, so lambda is infinite at start={a:g}: "
            f"use grid='uniform' or 'cosine', or start={path.T - path.t_min * path.T:g}"
        )
    if not infinite_ok and math.isinf(float(path.lam(b))):
        if not b < path.t_min < a:
            raise InputError(
                f"sigma({b:g}) = 0, so lambda is infinite at stop={b:g}, and t_min={path.t_min:g} is not between: raise stop"
            )
        head = _exact(law(a, path.t_min, n - 1), a, path.t_min) if n > 1 else torch.tensor([a], dtype=torch.float64)
        return torch.cat([head, torch.tensor([b], dtype=torch.float64)])
    return _exact(law(a, b, n), a, b)


def _exact(times: Tensor, a: float, b: float) -> Tensor:
    times = times.clone()
    times[0], times[-1] = a, b
    return times


GRIDS: dict[str, Grid] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "karras": karras,
    "log_snr": log_snr,
    "cosine": cosine,
    **{name: _ays(name) for name in AYS_TABLES},
}


def make_grid(grid: Any, path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
    """The times of a grid given by name, function, or as the times themselves."""
    if isinstance(grid, str):
        if grid not in GRIDS:
            raise InputError(f"grid={grid!r} is unknown: {nearest(grid, GRIDS)}")
        return GRIDS[grid](path, n, start, stop)
    if callable(grid):
        try:
            times = torch.as_tensor(grid(path, n, start, stop), dtype=torch.float64)
        except ToolkitError:
            raise
        except Exception as error:
            raise InputError(
                f"grid(path, {n}, start, stop) raised {type(error).__name__}: {str(error)[:150]}; "
                f"give a function of (path, n, start, stop) that returns {n + 1} decreasing times"
            ) from error
        if times.shape != (n + 1,) or not bool((times[1:] < times[:-1]).all() | times.isnan().any()):
            raise InputError(f"grid(path, {n}, start, stop) gave shape {tuple(times.shape)}: return {n + 1} decreasing times")
        return times
    raise InputError(
        f"grid={grid!r}: give a name of GRIDS or a function (path, n, start, stop) -> times; for explicit times use integrate"
    )
