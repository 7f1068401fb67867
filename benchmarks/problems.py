"""The built-in problems: a score, the shape of a sample, draws of the truth. One row a problem; all on EDM's path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path as File

import torch
from torch import Tensor

from scores import Empirical, GaussianMixture
from sde import EDM
from sde.errors import InputError
from sde.prediction import Predictor


@dataclass(frozen=True)
class Problem:
    """``score`` makes the float64 score on a device; ``truth(n, seed)`` draws true data, (n, *shape) float64 on the host."""

    title: str
    shape: tuple[int, ...]
    score: Callable[[torch.device], Predictor]
    truth: Callable[[int, int], Tensor]
    note: str


@cache
def digits() -> Tensor:
    """The 1797 handwritten digits inside scikit-learn, (1797, 1, 8, 8) float32 in [-1, 1]. Nothing is downloaded."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise InputError("the digits are inside scikit-learn: pip install 'score-solvers[report]'") from None
    return torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32).reshape(-1, 1, 8, 8) / 8.0 - 1.0


def split(held_out: int = 297) -> tuple[Tensor, Tensor]:
    """(training digits, held-out digits): a fixed random split, the one the shipped network was trained with."""
    order = torch.randperm(len(digits()), generator=torch.Generator().manual_seed(0))
    return digits()[order[held_out:]], digits()[order[:held_out]]


def _mixture(device: torch.device | None = None) -> GaussianMixture:
    means = [[1.1, 0.75], [-1.25, 1.25], [0.0, -1.0]]
    return GaussianMixture(EDM(), [1 / 3, 1 / 3, 1 / 3], means, [0.1, 0.125, 0.175])


def _digits_exact(device: torch.device) -> Predictor:
    return Empirical(EDM(), digits().double())


def _digits_network(device: torch.device) -> Predictor:
    from .networks import load

    return load(WEIGHTS, device=device, dtype=torch.float64)


def _true_digits(n: int, seed: int) -> Tensor:
    """Independent draws: what a perfect sampler of the exact score would give."""
    return digits()[torch.randint(len(digits()), (n,), generator=torch.Generator().manual_seed(seed))].double()


WEIGHTS = File(__file__).parent / "weights" / "digits.safetensors"

PROBLEMS: dict[str, Problem] = {
    "mixture": Problem(
        "three Gaussians in the plane, exact score",
        (2,),
        _mixture,
        lambda n, seed: _mixture().sample(n, seed=seed, dtype=torch.float64),
        "The score is known in closed form and the flow is not linear: nothing but the sampler errs.",
    ),
    "digits_exact": Problem(
        "8x8 digits, exact score of the data set",
        (1, 8, 8),
        _digits_exact,
        _true_digits,
        "What a network that fits its training set perfectly would know: every path ends on one of the 1797 digits, so the "
        "error is mostly the share of samples that end on another digit than they should.",
    ),
    "digits_network": Problem(
        "8x8 digits, trained network",
        (1, 8, 8),
        _digits_network,
        _true_digits,
        "The network that ships with the package. What it has not learned shows in the distance to true data, not in the "
        "strong error.",
    ),
}
