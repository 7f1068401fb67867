"""``python -m benchmarks exact``: the exact law of a solver's output on Gaussian data, no Monte Carlo and no network.

The data are N(0, Sigma), given by the eigenvalues of Sigma; every number is exact up to rounding.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal

import numpy as np
import torch

from scores import Gaussian
from sde import EDM, VE, VP, Cosine, Linear, SubVP, Trigonometric
from sde.errors import InputError, nearest
from sde.path import Path
from solvers import exact_law, trace
from solvers.grids import make_grid


@dataclass(frozen=True)
class Exact:
    """Exact Wasserstein distance, KL and mean error of a solver's output on Gaussian data."""

    eigenvalues: File
    """A .npy file: the eigenvalues of the data's covariance, shape (d,), or the covariance itself, shape (d, d)."""
    solver: str = "euler_maruyama"
    """A name of SOLVERS that has a table."""
    path: str = "vp"
    """vp, subvp, cosine, trigonometric, linear, ve or edm."""
    beta_min: float = 0.1
    """vp, subvp: beta(0)."""
    beta_max: float = 20.0
    """vp, subvp: beta(1). The published VP with b_t = 0.05 + 9.95 t has beta = 2 b, that is 0.1 and 20."""
    sigma_min: float | None = None
    """ve: the lowest noise level (0.01); edm: where grids stop (0.002)."""
    sigma_max: float | None = None
    """ve, edm: the highest noise level (50, 80)."""
    grid: str = "uniform"
    """A name of GRIDS."""
    points: int | None = None
    """Number of grid points, one more than the steps."""
    steps: int | None = None
    """Number of steps; instead of points."""
    begin: float | None = None
    """First time of the grid (default T)."""
    stop: float | None = None
    """Last time of the grid (default the path's t_min)."""
    start: Literal["marginal", "prior"] = "marginal"
    """Law of the start: the exact marginal, or the prior that samplers start from."""
    eta: float | None = None
    """Noise level (default the solver's own)."""
    json: bool = False
    """Print one JSON line."""


def run(config: Exact) -> int:
    row = compute(config)
    if config.json:
        print(json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}))
        return 0
    for key, value in row.items():
        print(f"{key:>12}  {value:.6g}" if isinstance(value, float) else f"{key:>12}  {value}")
    return 0


def compute(config: Exact) -> dict[str, Any]:
    """One row: w2, kl, mean_error (against the data), w2_stop (against the exact marginal at the last time), nfe, points,
    and what was asked.
    """
    path = make_path(config)
    if (config.points is None) == (config.steps is None):
        raise InputError(f"give exactly one of --points and --steps, got points={config.points} and steps={config.steps}")
    if config.points is not None and config.points < 2:
        raise InputError(f"--points {config.points}: a grid has two at least, its ends")
    steps = config.points - 1 if config.points is not None else config.steps
    values, vectors = read_spectrum(config.eigenvalues, f"--eigenvalues {config.eigenvalues}")
    mean = torch.zeros(len(values), dtype=torch.float64)
    gaussian = Gaussian(path, mean, var=values) if vectors is None else Gaussian(path, mean, cov=(vectors * values) @ vectors.T)
    times = make_grid(config.grid, path, steps, config.begin, config.stop)  # pyright: ignore[reportArgumentType]
    plan = trace(config.solver, path, times, config.eta)
    law = exact_law(plan, gaussian, start=config.start)
    return {
        "w2": law.w2(),
        "kl": law.kl(),
        "mean_error": law.mean_error(),
        "w2_stop": law.w2(plan.times[-1]),
        "nfe": plan.nfe,
        "points": len(plan.times),
        "steps": plan.steps,
        "solver": config.solver,
        "grid": config.grid,
        "path": str(path),
        "start": config.start,
        "begin": plan.times[0],
        "stop": plan.times[-1],
        "dimension": len(values),
    }


def make_path(config: Exact) -> Path:
    """The path named on the command line, with its constants."""
    levels = {"sigma_min": config.sigma_min, "sigma_max": config.sigma_max}
    given = {k: v for k, v in levels.items() if v is not None}
    paths: dict[str, Any] = {
        "vp": lambda: VP(config.beta_min, config.beta_max),
        "subvp": lambda: SubVP(config.beta_min, config.beta_max),
        "cosine": Cosine,
        "trigonometric": Trigonometric,
        "linear": Linear,
        "ve": lambda: VE(**given),
        "edm": lambda: EDM(**{{"sigma_min": "t_min", "sigma_max": "T"}[k]: v for k, v in given.items()}),
    }
    if config.path not in paths:
        raise InputError(f"--path {config.path!r} is unknown: {nearest(config.path, paths)}")
    return paths[config.path]()


def read_spectrum(file: File, asked: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(eigenvalues, eigenvectors or None) of a .npy file with eigenvalues (d,) or a covariance (d, d); rounding below zero
    is clipped. InputError begins with what was ``asked``: the option that names the file.
    """
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{asked}: cannot be read as .npy: {error}") from error
    values = torch.from_numpy(np.asarray(array, dtype=np.float64))
    vectors = None
    if values.dim() == 2 and values.shape[0] == values.shape[1]:
        values, vectors = torch.linalg.eigh(0.5 * (values + values.T))
    if values.dim() != 1 or len(values) == 0 or not bool(values.isfinite().all()):
        raise InputError(f"{asked}: shape {tuple(array.shape)}; give finite eigenvalues (d,) or a covariance (d, d)")
    if float(values.min()) < -1e-6 * float(values.abs().max()):
        raise InputError(f"{asked}: smallest is {float(values.min()):g}; a covariance has none below 0")
    return values.clamp(min=0.0), vectors
