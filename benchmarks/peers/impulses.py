"""The exact law of any library's stochastic sampler on Gaussian data, by its own loop and without Monte Carlo.

On data N(m, diag(v)) the score is affine in every coordinate by itself, so a sampler of fixed steps is

    x_N = c + a x_T + sum_j b_j z_j      (c, a, b_j: a number a coordinate; z_j: the unit normals in the order they are drawn)

and its output is N(c + a E x_T, a^2 Var x_T + sum_j b_j^2). One run in a batch of 2 + J samples finds all of them: row 0 starts
at the mean of x_T and is given no noise, row 1 starts one standard deviation off it, and row 1 + j starts at the mean and is
given z_j = 1 and nothing else. That a Brownian tree asks for the same normal twice is seen from the state of its generator, so
its correlations are kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scores import Gaussian
from sde.errors import InputError

from ..lines import Meter
from ..problems import Problem
from .line import PeerLine

_ZEROS = {torch.randn: torch.zeros, torch.randn_like: torch.zeros_like}


class Impulses(TorchFunctionMode):
    """Inside, the j-th new unit normal (from 0) that is drawn for a batch is 1 in row first + j, and 0 in all others."""

    def __init__(self, batch: int, first: int) -> None:
        super().__init__()
        self.batch, self.first = batch, first
        self.drawn: dict[Any, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _ZEROS:
            return func(*args, **kwargs)
        generator = kwargs.pop("generator", None)
        out = _ZEROS[func](*args, **kwargs)
        if out.dim() < 2 or len(out) != self.batch:
            raise InputError(f"normals of shape {tuple(out.shape)} were drawn for {self.batch} states: not one each")
        key = len(self.drawn) if generator is None else bytes(generator.get_state().numpy())
        row = self.first + self.drawn.setdefault(key, len(self.drawn))
        if row < self.batch:
            out[row] = 1.0
        return out


def exact_w2(line: PeerLine, problem: Problem, nfe: int, grid: str) -> tuple[float, int]:
    """(W2 / sqrt(d) in standard deviations, calls) between the sampler's output, from the exact marginal, and the truth where
    the sampler stops. InputError: data that are not Gaussian, or a sampler that chooses its steps.
    """
    law = problem.exact
    if not isinstance(law, Gaussian):
        raise InputError(f"{problem.name}: the exact law of a sampler is known on Gaussian data")
    if line.sampler.adaptive:
        raise InputError(f"{line.name} chooses its steps by the state: its output is not Gaussian")
    vectors, values = law.eigenvectors, law.eigenvalues.double()
    mean = law.mean.double().reshape(-1)
    mean = mean if vectors is None else vectors.double().T @ mean
    meter = Meter(Gaussian(problem.path, mean, var=values), torch.device("cpu"))
    start, stop = problem.path.knots([problem.start, problem.stop])
    given = {"nfe": nfe, "grid": grid, "seed": 0, "eta": None, "start": start.t, "stop": stop.t}

    def rows(count: int) -> tuple[Tensor, int]:
        x = (start.alpha * mean).repeat(count, 1)
        x[1] += (start.alpha**2 * values + start.sigma**2).sqrt()
        meter.reset()
        with Impulses(count, first=2) as seen:
            made = line.run(meter, x, indices=range(count), **given)
        return made.x, len(seen.drawn)

    line.steps(problem.path, start, stop, nfe, grid)  # found now: its trial runs draw normals as well
    normals = rows(2)[1]
    x, again = rows(2 + normals)
    if again != normals or bool(normals) != line.sampler.noisy(line.options):
        raise InputError(f"{line.name} drew {normals} normals that are known here, and again {again}: its law was not found")
    deviation = (x[1:] - x[0]).square().sum(0).sqrt()
    rho = 0.0 if line.to_zero else stop.sigma / stop.alpha
    truth = stop.alpha * (values + rho * rho).sqrt()
    w2 = ((x[0] - stop.alpha * mean).square() + (deviation - truth).square()).sum().sqrt()
    return float(w2) / (math.sqrt(len(values)) * problem.std), meter.nfe
