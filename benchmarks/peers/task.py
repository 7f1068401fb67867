"""What a library's loop is given: one batch, its grid, and the coordinates that libraries use."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError
from sde.path import Path
from sde.prediction import Knot
from solvers.grids import make_grid

from .network import Network


@dataclass(frozen=True, eq=False)
class Task:
    """One batch for a library's loop.

    network  what to call;  x: the state at ``start``, in the path's coordinates, not to be changed
    n        steps, in the library's own way of counting;  grid: a name
    options  the sampler's options, all of them;  eta: a noise level, or None for the sampler's own
    """

    network: Network
    x: Tensor
    path: Path
    start: Knot
    stop: Knot
    n: int
    grid: str
    options: Mapping[str, Any]
    eta: float | None

    def over(self, n: int) -> Task:
        """The same with another number of steps."""
        return replace(self, n=n)

    @cached_property
    def times(self) -> Tensor:
        """n + 1 times of the named grid, float64, on the state's device."""
        return _times(self.path, self.grid, self.n, self.start.t, self.stop.t).to(self.x.device)

    @cached_property
    def rhos(self) -> Tensor:
        """sigma / alpha at the times, float64, on the state's device."""
        self.need_finite()
        return _rhos(self.path, self.grid, self.n, self.start.t, self.stop.t).to(self.x.device)

    def need_finite(self) -> None:
        """InputError where sampling starts at alpha = 0, which no sigma / alpha describes."""
        if self.start.alpha < 1e-12:
            raise InputError(f"alpha({self.start.t:g}) = 0: sigma/alpha is infinite there; give a --start-time below")

    @property
    def top(self) -> float:
        """sigma / alpha at the start."""
        self.need_finite()
        return self.start.sigma / self.start.alpha

    @property
    def bottom(self) -> float:
        """sigma / alpha at the end."""
        return self.stop.sigma / self.stop.alpha

    @property
    def y(self) -> Tensor:
        """The state x / alpha at the start."""
        self.need_finite()
        return self.x if self.start.alpha == 1.0 else self.x / self.start.alpha

    def back(self, y: Tensor) -> Tensor:
        """x from x / alpha at the end."""
        return y if self.stop.alpha == 1.0 else self.stop.alpha * y


# a grid is made once for all runs: libraries that are timed are not charged for it


@functools.lru_cache(maxsize=64)
def _times(path: Path, grid: str, n: int, start: float, stop: float) -> Tensor:
    return make_grid(grid, path, n, start, stop)


@functools.lru_cache(maxsize=64)
def _rhos(path: Path, grid: str, n: int, start: float, stop: float) -> Tensor:
    knots = path.knots(_times(path, grid, n, start, stop))
    return torch.tensor([k.sigma / k.alpha for k in knots], dtype=torch.float64)
