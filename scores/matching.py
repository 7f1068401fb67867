"""Denoising score matching: per-sample losses whose minimiser is the exact score. Pure: noise and times are arguments.

With x_t = alpha x0 + sigma eps and a network that answers the row y = a x0 + b eps, the error of the network in any other
row (a', b') is the same up to a factor, because the errors of x0 and eps at a given x_t satisfy alpha e_x0 + sigma e_eps = 0:

    y' - y'* = (det' / det) (y - y*),    y* = a x0 + b eps,    det = alpha b - sigma a.

So a loss is the network's own squared error, times (det'/det)^2 for the row it is measured in, times a weight. Flow matching
is the velocity row; conditional flow matching is ``weight=None`` on ``Linear``. Every weight has the same minimiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, PathError, nearest
from sde.path import Path
from sde.prediction import OUTPUTS, Knot, Predictor, Row

from .network import Score, check_state, levels, per_sample

GAMMA = 5.0  # of min-SNR


@dataclass(frozen=True)
class Weight:
    """weight(t) on the squared error of one row of ``OUTPUTS``: ``factor`` takes a knot of float64 tensors (B,)."""

    row: str
    factor: Callable[[Knot], Any] = lambda knot: 1.0

    def __post_init__(self) -> None:
        if self.row not in OUTPUTS:
            raise InputError(f"row={self.row!r} is unknown: {nearest(self.row, OUTPUTS)}")


def min_snr(gamma: float = GAMMA) -> Weight:
    """min(SNR, gamma) on the error of x0, SNR = alpha^2 / sigma^2 (Hang et al. 2023, eq. 6)."""
    if not gamma > 0.0:
        raise InputError(f"gamma={gamma!r}: must be > 0")

    def factor(knot: Knot) -> Any:
        return ((knot.alpha / knot.sigma) ** 2).clamp_max(gamma)  # type: ignore[attr-defined]

    return Weight("x0", factor)


#: What the squared error is measured in, and its weight. Sums over the event are in nats for "vdm".
WEIGHTS: dict[str, Weight] = {
    "eps": Weight("eps"),  # Ho et al. 2020, L_simple
    "x0": Weight("x0"),
    "v": Weight("v"),  # Salimans & Ho 2022: SNR + 1 on x0
    "velocity": Weight("velocity"),  # flow matching
    "score": Weight("score", lambda knot: knot.sigma**2),  # Song et al. 2021, lambda(t) = sigma^2: "eps" by another name
    "edm": Weight("F"),  # Karras et al. 2022: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0 at alpha = 1
    "min_snr": min_snr(),
    "vdm": Weight("eps", lambda knot: 0.5 * knot.g2 / knot.sigma**2),  # Kingma et al. 2021, eq. 18: -d lambda / dt on eps
}


def denoising_loss(
    score: Predictor,
    x0: Tensor,
    *,
    noise: Tensor,
    t: Any,
    weight: str | Weight | Callable[[Tensor], Any] | Tensor | None = "eps",
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """weight(t) |error|^2 of each sample, summed over the event: (B,), differentiable in the network's parameters.

    score       its network's own output is trained, in the row it predicts; any other Predictor is measured in the v row.
    x0, noise   (B, *event), data and unit normals; x_t = alpha x0 + sigma noise is formed here.
    t           a number, or a tensor () or (B,); see ``draw_times``.
    weight      a name of WEIGHTS; a Weight; None (1), a tensor (B,), or a function t -> (B,), on the network's own error.
    conditions  keyword arguments of the network.

    InputError for shapes that differ and unknown names; PathError where the network's row does not determine the error
    asked for (an eps network at alpha = 0 under the x0 weight), or a target or weight is infinite. The mode of the network
    is left alone.
    """
    check_state(x0)
    check_state(noise)
    if noise.shape != x0.shape:
        raise InputError(f"noise has shape {tuple(noise.shape)}, x0 {tuple(x0.shape)}: must be equal")
    knot = levels(score.path, t, x0)
    columns: Any = (torch.as_tensor(v, dtype=torch.float64).expand(len(x0)) for v in knot[:7])
    knot = Knot(*columns)
    x = per_sample(knot.alpha, x0) * x0 + per_sample(knot.sigma, x0) * noise
    sigma_data = score.sigma_data if isinstance(score, Score) else 0.5
    if isinstance(score, Score):
        predicts: Any = score.predicts
        row = score.row(knot)
        y, _ = score.raw(x, knot.t, **(conditions or {}))
    else:
        predicts = "v"
        row = OUTPUTS["v"](knot.alpha, knot.sigma, knot.dalpha, knot.dsigma, sigma_data)
        pair = score.predict(x, knot.t, **(conditions or {}))
        y = pair.combine(per_sample(row.a, x), per_sample(row.b, x))
    factor = torch.as_tensor(_weight(weight, knot, predicts, row, sigma_data), dtype=torch.float64).expand(len(x0))
    for name, value in (("target", row.a), ("target", row.b), ("weight", factor)):
        bad = ~torch.as_tensor(value, dtype=torch.float64).expand(len(x0)).isfinite()
        if bool(bad.any()):
            where = float(torch.as_tensor(knot.t)[bad][0])
            raise PathError(f"the {name} is not finite at t={where:g} of {score.path}: draw times inside (0, {score.path.T:g})")
    error = y - (per_sample(row.a, x) * x0 + per_sample(row.b, x) * noise)
    return error.square().reshape(len(x), x.shape[1:].numel()).sum(1) * factor.to(device=x.device, dtype=x.dtype)


def _weight(weight: Any, knot: Knot, predicts: Any, row: Row, sigma_data: float) -> Any:
    """The factor on the network's own squared error."""
    if weight is None:
        return 1.0
    if isinstance(weight, Tensor):
        if weight.shape != torch.as_tensor(knot.t).shape:
            raise InputError(f"weight has shape {tuple(weight.shape)}: give ({len(torch.as_tensor(knot.t))},), one a sample")
        return weight
    if isinstance(weight, str):
        if weight not in WEIGHTS:
            raise InputError(f"weight={weight!r} is unknown: {nearest(weight, WEIGHTS)}")
        weight = WEIGHTS[weight]
    if isinstance(weight, Weight):
        factor = weight.factor(knot)
        if weight.row == predicts:
            return factor
        other = OUTPUTS[weight.row](knot.alpha, knot.sigma, knot.dalpha, knot.dsigma, sigma_data)
        if _is_zero(row.a) and _is_zero(other.a):  # both are eps times a factor: det / alpha, defined at alpha = 0
            return factor * (other.b / row.b) ** 2
        det, det_other = (knot.alpha * r.b - knot.sigma * r.a for r in (row, other))
        return factor * (det_other / det) ** 2
    if callable(weight):
        return weight(knot.t)
    raise InputError(
        f"weight is a {type(weight).__name__}: give a name of WEIGHTS, a Weight, a function of t, a tensor or None"
    )


def _is_zero(a: Any) -> bool:
    return isinstance(a, float) and a == 0.0


def _uniform(path: Path, u: Tensor) -> Tensor:
    return path.t_min + (path.T - path.t_min) * u


def _log_normal(path: Path, u: Tensor) -> Tensor:
    # path.time stays in the domain: EDM's own law reaches sigma > 80 about twice in a million draws
    return path.time(1.2 - 1.2 * torch.special.ndtri(u)).clamp(path.t_min, path.T)


def _uniform_lam(path: Path, u: Tensor) -> Tensor:
    last = path.knot(path.T)
    low = last.lam if math.isfinite(last.lam) else path.knot(path.T - path.t_min).lam
    high = path.knot(path.t_min).lam
    return path.time(high + (low - high) * u)


def _logit_normal(path: Path, u: Tensor) -> Tensor:
    return (path.T * torch.sigmoid(torch.special.ndtri(u))).clamp_min(path.t_min)


#: Distributions of training times as quantile functions, u in (0, 1) -> t in [t_min, T], both float64.
TIMES: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "uniform": _uniform,
    "log_normal": _log_normal,  # Karras et al. 2022: log(sigma / alpha) ~ N(-1.2, 1.2^2)
    "uniform_lam": _uniform_lam,  # lambda uniform; to lambda(T - t_min) where lambda(T) is infinite
    "logit_normal": _logit_normal,  # Esser et al. 2024: logit(t / T) ~ N(0, 1)
}


def draw_times(path: Path, n: int, kind: str = "uniform", *, generator: torch.Generator, stratified: bool = False) -> Tensor:
    """n training times, (n,) float64 on the generator's device.

    ``stratified`` uses u_i = frac(u + i/n) with one draw u (Kingma et al. 2021, app. I): each time is distributed as before,
    and averages over the batch vary less.
    """
    if kind not in TIMES:
        raise InputError(f"kind={kind!r} is unknown: {nearest(kind, TIMES)}")
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise InputError(f"n={n!r}: give the number of times, an int >= 0")
    _check_generator(generator)
    u = torch.rand(1 if stratified else n, generator=generator, dtype=torch.float64, device=generator.device)
    if stratified:
        u = (u + torch.arange(n, dtype=torch.float64, device=u.device) / max(n, 1)) % 1.0
    return TIMES[kind](path, u.clamp(1e-12, 1.0 - 1e-12))


def draw_noise(x0: Tensor, *, generator: torch.Generator) -> Tensor:
    """Unit normals shaped like x0, in its dtype and on its device."""
    _check_generator(generator)
    return torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=generator.device).to(x0.device)


def _check_generator(generator: Any) -> None:
    if not isinstance(generator, torch.Generator):
        raise InputError(f"generator is a {type(generator).__name__}: give torch.Generator().manual_seed(0)")
