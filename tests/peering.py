"""What the tests of other libraries' samplers share: a library or a skip, a line, a run of it, and data of known flow."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers
from benchmarks.lines import Meter, resolve_line
from benchmarks.peers.base import Library
from benchmarks.peers.line import PeerLine
from scores import Gaussian
from sde import VP

CPU = torch.device("cpu")
F64 = torch.float64


def need(name: str) -> Library:
    found = peers.library(name)
    why = found.missing()
    if why:
        pytest.skip(why)
    return found


def line_of(text: str) -> PeerLine:
    need(text.partition("/")[0])
    line = resolve_line(text)
    assert isinstance(line, PeerLine)
    return line


def run(line, score, x, nfe=9, grid="log_snr", **changed):
    """(what it made, calls)."""
    meter = Meter(score, CPU)
    given = {"seed": 0, "indices": range(len(x)), "eta": None, "start": None, "stop": None, **changed}
    made = line.run(meter, x, nfe=nfe, grid=grid, **given)
    return made, meter.nfe


def gaussian(path=None) -> Gaussian:
    """The last coordinate is as narrow as the noise at which VP stops: there it matters whether a sampler goes on to 0."""
    return Gaussian(path or VP(), torch.tensor([0.3, -0.2, 0.0], dtype=F64), var=torch.tensor([1.0, 0.2, 2e-4], dtype=F64))


def states(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)
