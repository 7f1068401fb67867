"""Models for the tests of sweeps: networks of one multiplication a number, so that a sample does not feel its batch mates."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed
from torch import Tensor, nn

from benchmarks.problems import Problem, wrap
from scores import Score
from sde import EDM


class Shrink(nn.Module):
    """eps of data N(0, s^2 I) on EDM's path: x sigma / (sigma^2 + s^2)."""

    def __init__(self, s: float = 0.5) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(s))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x * (sigma / (sigma * sigma + self.s * self.s)).reshape(-1, *(1,) * (x.dim() - 1))


class Rotten(Shrink):
    """NaN for samples whose first number is large once the noise is low."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        bad = (x[:, :1] > 0.6) & (sigma[:, None] < 0.5)
        return torch.where(bad, torch.nan, super().forward(x, sigma))


class Greedy(Shrink):
    """Has memory for few samples."""

    largest = 3

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        if len(x) > self.largest:
            raise torch.OutOfMemoryError(f"a batch of {len(x)}")
        return super().forward(x, sigma)


def data() -> Tensor:
    return 0.5 * torch.randn(64, 3, generator=torch.Generator().manual_seed(3))


def shrink() -> tuple[Score, Tensor]:
    """Its weight is SHRINK of the environment, which tests change to be another checkpoint."""
    return Score(Shrink(float(os.environ.get("SHRINK", "0.5"))), EDM()), data()


def quick() -> Problem:
    """With end points that cost little."""
    score, points = shrink()
    return wrap(score, (3,), data=points, fineness=4)


def wide() -> Problem:
    """Samples of 256 numbers."""
    points = 0.5 * torch.randn(64, 256, generator=torch.Generator().manual_seed(4))
    return wrap(Score(Shrink(), EDM()), (256,), data=points)


class Killed(Shrink):
    """Slow, so that each worker has a part; rank 1 kills its process, once, in the middle of its first."""

    calls = 0

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        Killed.calls += 1
        time.sleep(0.05 if "RANK" in os.environ else 0.0)
        path = os.environ.get("KILL_ONCE", "")
        if path and os.environ["RANK"] == "1" and Killed.calls == 2 and not os.path.exists(path):
            words = f"{os.environ['RANK']} {torch.distributed.get_world_size()} {torch.distributed.get_backend()}"
            with open(path, "w", encoding="ascii") as file:
                file.write(words)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x, sigma)


def grouped() -> tuple[Score, Tensor]:
    """As a model does that talks to its copies: a member of a gloo group, in which all have met."""
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        here = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        torch.distributed.init_process_group("gloo", init_method=os.environ.get("GROUP", "env://"), **here)
        torch.distributed.barrier()
    return Score(Killed(), EDM()), data()


class Mixing(nn.Module):
    """Takes nothing but the dtype of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)
        nn.init.eye_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.mix(x) * (sigma / (sigma * sigma + 0.25)).to(x.dtype)[:, None]


def mixing(own: torch.dtype | None = None) -> Problem:
    return wrap(Score(Mixing().to(own).eval(), EDM(), dtype=own), (3,), data=data(), fineness=4)


def half() -> Problem:
    return mixing(torch.bfloat16)


def bare() -> Score:
    """Without data, and without a shape."""
    return Score(Shrink(), EDM())


def rotten() -> tuple[Score, Tensor]:
    return Score(Rotten(), EDM()), data()


def greedy() -> tuple[Score, Tensor]:
    return Score(Greedy(), EDM()), data()


def failing() -> Score:
    raise FileNotFoundError("no weights at\n/nowhere")


def number() -> int:
    return 3


NOT_CALLABLE = 7
