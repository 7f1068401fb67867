"""Reference statistics: mean and covariance of features of true data, from a file or from a problem.

A file is an ``.npz`` with ``mu`` (d,) and ``sigma`` (d, d), as EDM, ADM and others publish them; arrays of objects are refused,
nothing in it is run. Files that ``save_reference`` writes also say of which features, of how many samples, and of what shape;
what a file says is held against what is measured.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as File

import numpy as np
import torch
from torch import Tensor

from sde.errors import InputError

from ..files import write
from .statistics import Moments


def root(cov: Tensor) -> Tensor:
    """A (d, r) with A A^T = cov, r the rank. InputError where cov is not symmetric positive semi-definite."""
    size = float(cov.abs().max()) if cov.numel() else 0.0
    if float((cov - cov.T).abs().max()) > 1e-6 * size:
        raise InputError("a covariance is not symmetric: give (C + C.T) / 2")
    values, vectors = torch.linalg.eigh(0.5 * (cov + cov.T))
    if float(values[0]) < -1e-6 * size:
        raise InputError(f"a covariance is not positive semi-definite: its smallest eigenvalue is {float(values[0]):g}")
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


@dataclass(frozen=True)
class Reference:
    """Mean (d,) and covariance (d, d) in float64; ``count`` of how many samples (None: exact, or not said); ``features`` of
    which features and ``shape`` of samples of what shape, where known; ``source`` is where from.
    """

    mean: Tensor
    cov: Tensor
    count: int | None
    features: str = ""
    shape: tuple[int, ...] = ()
    source: str = "the reference"

    def __post_init__(self) -> None:
        d = len(self.mean) if self.mean.dim() == 1 else -1
        if d < 1 or self.cov.shape != (d, d):
            shapes = f"mean {tuple(self.mean.shape)}, covariance {tuple(self.cov.shape)}"
            raise InputError(f"{self.source}: {shapes}; give (d,), (d, d)")
        if not (bool(self.mean.isfinite().all()) and bool(self.cov.isfinite().all())):
            raise InputError(f"{self.source}: mean or covariance is not finite")

    @classmethod
    def of(cls, found: Moments) -> Reference:
        return cls(found.mean, found.cov, found.count)

    @cached_property
    def root(self) -> Tensor:
        return root(self.cov)

    def check(self, dimension: int, features: str, shape: Sequence[int], count: int) -> None:
        """Refuse statistics of other features, other dimensions, pictures of another size, or another number of samples."""
        if len(self.mean) != dimension:
            raise InputError(f"{self.source} has {len(self.mean)} dimensions, the samples' features have {dimension}")
        if self.features and self.features != features:
            raise InputError(f"{self.source} is of {self.features!r} features, not of {features!r}")
        if self.shape and self.shape != tuple(shape):
            raise InputError(f"{self.source} is of samples {self.shape}, not {tuple(shape)}")
        if count and self.count != count:
            said = "does not say of how many samples it is" if self.count is None else f"is of {self.count} samples"
            raise InputError(f"{self.source} {said}, where count={count} was asked for")


def load_reference(file: str | File) -> Reference:
    """The statistics in an ``.npz`` file. Nothing in it is run: files of pickled objects (``.pkl`` of EDM2) are refused."""
    try:
        opened = np.load(file, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise InputError(f"{file}: one array; give an .npz with mu (d,) and sigma (d, d)")
        with opened as found:
            if not {"mu", "sigma"} <= set(found.files):
                holds = ", ".join(found.files) or "nothing"
                raise InputError(f"{file}: holds {holds}; give an .npz with mu (d,) and sigma (d, d)")
            mean, cov = (torch.from_numpy(np.array(found[k], dtype=np.float64)) for k in ("mu", "sigma"))
            said = {k: found[k] for k in ("count", "features", "shape") if k in found.files}
            return Reference(
                mean,
                cov,
                int(said["count"]) if "count" in said else None,
                str(said["features"]) if "features" in said else "",
                tuple(int(s) for s in np.atleast_1d(said["shape"])) if "shape" in said else (),
                str(file),
            )
    except InputError:
        raise
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{file}: cannot be read as reference statistics ({error}); give an .npz with mu and sigma") from None


def save_reference(file: File, found: Moments, features: str = "", shape: Sequence[int] = ()) -> None:
    """Write statistics where ``load_reference``, and EDM's scripts, read them."""
    arrays = {"mu": found.mean.numpy(), "sigma": found.cov.numpy(), "count": np.int64(found.count)}
    if features:
        arrays["features"] = np.str_(features)
    if shape:
        arrays["shape"] = np.array(shape, dtype=np.int64)
    write(file, lambda partial: np.savez(partial, **arrays))
