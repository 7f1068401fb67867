"""What the repositories of DPM-Solver and UniPC share: a noise schedule in their own words, and their three grids."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from sde import VP

from .task import Task

#: name of a grid -> their skip_type
SKIP = {"log_snr": "logSNR", "uniform": "time_uniform", "quadratic": "time_quadratic"}


class PathSchedule:
    """The functions of their ``NoiseScheduleVP``, of any path."""

    def __init__(self, task: Task) -> None:
        self.path, self.T, self.total_N = task.path, task.path.T, 1000

    def marginal_log_mean_coeff(self, t: Tensor) -> Tensor:
        return self.path.alpha(t).log()

    def marginal_alpha(self, t: Tensor) -> Tensor:
        return self.path.alpha(t)

    def marginal_std(self, t: Tensor) -> Tensor:
        return self.path.sigma(t)

    def marginal_lambda(self, t: Tensor) -> Tensor:
        return self.path.lam(t)

    def inverse_lambda(self, lamb: Tensor) -> Tensor:
        return self.path.time(lamb)


def schedule(module: Any, task: Task) -> Any:
    """Their own where the path is the linear VP that they know, else ``PathSchedule``."""
    path = task.path
    if type(path) is not VP:
        return PathSchedule(task)
    return module.NoiseScheduleVP("linear", continuous_beta_0=path.beta_min, continuous_beta_1=path.beta_max)


def pictures(x: Tensor) -> Tensor:
    """(B, ...) as (B, 1, 1, d), for code that is written for pictures."""
    return x.reshape(len(x), 1, 1, -1)


def quietly() -> contextlib.AbstractContextManager[Any]:
    """Inside, what code prints at every run is dropped."""
    return contextlib.redirect_stdout(io.StringIO())


@functools.cache
def _digest(file: str) -> str:
    return hashlib.sha256(File(file).read_bytes()).hexdigest()[:12]


def of_file(module: Any) -> str:
    """The version of a file: its digest."""
    return f"file {_digest(module.__file__)}"


def times_inside(t: Any) -> Any:
    """A time per sample, as these repositories ask for it, is one time: (B,) -> the first."""
    return t[0] if isinstance(t, Tensor) and t.dim() else torch.as_tensor(t)
