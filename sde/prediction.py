"""What a network knows at (x, t): the pair (x0, eps) with alpha_t x0 + sigma_t eps = x.

Every network output of the field is one linear row of that pair, y = a x0 + b eps. Given x and y the pair follows from

    [alpha sigma] [x0 ]   [x]              x0  = (b x - sigma y) / det
    [a     b    ] [eps] = [y]      hence   eps = (alpha y - a x) / det,    det = alpha b - sigma a.

Where det = 0 the output says nothing about the pair beyond x itself (an eps network at alpha = 0, an x0 network at sigma = 0).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .errors import InputError, PathError

if TYPE_CHECKING:
    from .path import Path


class Knot(NamedTuple):
    """A time with the path's values there, as Python floats: what a solver's coefficients are made of.

    ``index`` of ``count`` steps is the knot's place in the grid; both are -1 for the stages inside a step.
    """

    t: float
    alpha: float
    sigma: float
    lam: float  # log(alpha / sigma), +inf at sigma = 0, -inf at alpha = 0
    dalpha: float
    dsigma: float
    g2: float  # g(t)^2 = 2 sigma (sigma' - f sigma) of dx = f x dt + g dw
    index: int = -1  # pyright: ignore[reportIncompatibleMethodOverride]
    count: int = -1  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclass
class Prediction:
    """The pair (x0, eps) at (x, t), both shaped like x: x0 = E[x_0 | x_t = x], eps = E[eps | x_t = x]."""

    x0: Any
    eps: Any

    def combine(self, a: float, b: float) -> Any:
        """The row a x0 + b eps."""
        return a * self.x0 + b * self.eps


Scalar = Any  # a float, or a tensor that broadcasts against the state


class Row(NamedTuple):
    """The coefficients (a, b) of y = a x0 + b eps at one time."""

    a: Scalar
    b: Scalar


def _v_row(alpha: Scalar, sigma: Scalar, dalpha: Scalar, dsigma: Scalar, sigma_data: float) -> Row:
    norm = (alpha * alpha + sigma * sigma) ** 0.5
    return Row(-sigma / norm, alpha / norm)


def _edm_row(alpha: Scalar, sigma: Scalar, dalpha: Scalar, dsigma: Scalar, sigma_data: float) -> Row:
    # D = c_skip y + c_out F in EDM's own coordinates y = x / alpha, noise level sigma / alpha, solved for F.
    norm = (sigma * sigma + (sigma_data * alpha) ** 2) ** 0.5
    return Row(sigma / (sigma_data * norm), -sigma_data * alpha / norm)


RowRule = Callable[[Scalar, Scalar, Scalar, Scalar, float], Row]

#: What a network may predict, each as (alpha, sigma, alpha', sigma', sigma_data) -> (a, b) of y = a x0 + b eps.
OUTPUTS: dict[str, RowRule] = {
    "eps": lambda alpha, sigma, dalpha, dsigma, sigma_data: Row(0.0, 1.0),
    "x0": lambda alpha, sigma, dalpha, dsigma, sigma_data: Row(1.0, 0.0),
    "score": lambda alpha, sigma, dalpha, dsigma, sigma_data: Row(0.0, -1.0 / sigma if _nonzero(sigma) else -math.inf),
    "v": _v_row,  # Salimans & Ho 2022: alpha eps - sigma x0, normalised where alpha^2 + sigma^2 is not 1
    "velocity": lambda alpha, sigma, dalpha, dsigma, sigma_data: Row(dalpha, dsigma),  # dx/dt of the flow
    "F": _edm_row,  # Karras et al. 2022, eq. 7
}


def _nonzero(sigma: Scalar) -> bool:
    return isinstance(sigma, Tensor) or sigma != 0.0


def solve_row(row: Row, alpha: Scalar, sigma: Scalar) -> tuple[Row, Row]:
    """((p, q), (r, s)) with x0 = p x + q y and eps = r x + s y, for the output y of ``row``.

    The caller has checked that det = alpha b - sigma a is finite and not 0.
    """
    a, b = row
    det = alpha * b - sigma * a
    return Row(b / det, -sigma / det), Row(-a / det, alpha / det)


def affine(row: Row, knot: Knot, c: float, d: float) -> tuple[float, float]:
    """(u, v) with c x0 + d eps = u x + v y, where y = a x0 + b eps is the network's output.

    Raises PathError where the output does not determine the combination: an eps network at alpha = 0 knows nothing of x0, an
    x0 network at sigma = 0 nothing of eps.
    """
    a, b = row
    det = knot.alpha * b - knot.sigma * a
    if det != 0.0 and math.isfinite(det):
        return (c * b - d * a) / det, (d * knot.alpha - c * knot.sigma) / det
    if det == 0.0 and c * b == d * a and (a, b) != (0.0, 0.0):
        return 0.0, (d / b if b != 0.0 else c / a)
    if math.isfinite(det) and c * knot.sigma == d * knot.alpha:
        return (c / knot.alpha if knot.alpha != 0.0 else d / knot.sigma), 0.0
    name = _row_name(row)
    if knot.alpha == 0.0:
        raise PathError(
            f"{name}-prediction is undefined at alpha = 0 (t = {knot.t:g}, zero terminal SNR): "
            f"use a v, velocity or x0 network, or start below t = {knot.t:g}"
        )
    raise PathError(
        f"{name}-prediction does not determine the pair (x0, eps) at t = {knot.t:g} "
        f"(alpha = {knot.alpha:g}, sigma = {knot.sigma:g}): stop at a time with sigma > 0, such as the path's t_min"
    )


def _row_name(row: Row) -> str:
    return {(0.0, 1.0): "eps", (1.0, 0.0): "x0"}.get((row[0], row[1]), "score" if math.isinf(row[1]) else "this")


def rows_of(conditions: Any, rows: slice, batch: int) -> Any:
    """The conditions of some samples: these rows of tensors with a row a sample, however nested; anything else as it is."""
    if isinstance(conditions, Tensor):
        return conditions[rows] if conditions.dim() and len(conditions) == batch else conditions
    if isinstance(conditions, Mapping):
        return {k: rows_of(v, rows, batch) for k, v in conditions.items()}
    if type(conditions) in (tuple, list):
        return type(conditions)(rows_of(v, rows, batch) for v in conditions)
    return conditions


class Tally:
    """Network evaluations of one run, counted where the network is called.

    ``nfe`` counts calls on the batch, ``net_evals`` counts batches' worth of samples through the network (guidance doubles it).
    """

    __slots__ = ("net_evals", "nfe")

    def __init__(self) -> None:
        self.nfe = 0
        self.net_evals = 0


class Predictor(ABC):
    """What solvers need of a score. ``scores.Score`` wraps a network; the exact scores of ``scores.analytic`` are the
    others.
    """

    path: Path

    @abstractmethod
    def row(self, knot: Knot) -> Row:
        """(a, b) of the raw output y = a x0 + b eps at this knot, as floats."""

    @abstractmethod
    def at(
        self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally
    ) -> list[Callable[[Tensor], Tensor]]:
        """One function a knot: state -> raw output y, both of x's shape, dtype and device.

        Everything that needs the host (labels, scalings, transfers) is prepared here, so that no call syncs with a device.
        Each network call adds to ``tally``.
        """

    def calls(self, *knots: Knot) -> int:
        """Network calls of one evaluation of a batch at this knot, or of a batch whose samples are at these knots; without
        knots, the most that an evaluation anywhere makes. A budget is reckoned with it; what is reported is counted.
        """
        return 1

    def each(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> Callable[[Tensor], Tensor]:
        """One function for a batch whose sample i is at ``knots[i]``: state -> raw outputs y, in the row of each knot.

        Prepared here and counted like the functions of ``at``. This form asks ``predict``, one call; a score that can do
        better, or that counts otherwise, has its own.
        """
        t = torch.tensor([k.t for k in knots], dtype=torch.float64)
        rows = torch.tensor([self.row(k) for k in knots], dtype=x.dtype).to(x.device)
        a, b = (rows[:, i].reshape(-1, *(1,) * (x.dim() - 1)) for i in (0, 1))

        def call(x: Tensor) -> Tensor:
            tally.nfe += 1
            tally.net_evals += 1
            pair = self.predict(x, t, **conditions)
            return a * pair.x0 + b * pair.eps

        return call

    def with_variance(
        self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally
    ) -> list[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """As ``at``, for networks that have also learned the variance of an ancestral step (Nichol & Dhariwal 2021):
        state -> (raw output y, v), both shaped like x, where v in [-1, 1] says where between its bounds the variance lies.
        """
        raise InputError(
            f"{type(self).__name__} has no learned variance: use solver='ddpm', whose variance is that of q(x_t | x_s, x0)"
        )

    @abstractmethod
    def predict(self, x: Tensor, t: Any, **conditions: Any) -> Prediction:
        """The pair (x0, eps) at x and time t, a number or a tensor of shape () or (B,)."""

    @abstractmethod
    def __call__(self, x: Tensor, t: Any, **conditions: Any) -> Tensor:
        """The score grad_x log p_t(x), shaped like x."""
