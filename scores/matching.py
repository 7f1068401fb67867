"""Training losses: per-sample numbers whose mean the exact score minimises. Pure: noise, times and probes are arguments.

Denoising. With x_t = alpha x0 + sigma eps and a network that answers the row y = a x0 + b eps, the error of the network in any
other row (a', b') is the same up to a factor, because the errors of x0 and eps at a given x_t satisfy alpha e_x0 + sigma e_eps
= 0:

    y' - y'* = (det' / det) (y - y*),    y* = a x0 + b eps,    det = alpha b - sigma a.

So a loss is the network's own squared error, times (det'/det)^2 for the row it is measured in, times a weight. Every weight
has the same minimiser. ``flow_matching_loss`` is the velocity row (conditional flow matching), ``ncsn_loss`` many levels.

Without x0, from states x of p_t alone, by parts, with s the network's score, D its x0 as a function of y = x / alpha, and
rho = sigma / alpha:

    implicit     |s|^2 / 2 + div s                     E|s - grad log p_t|^2 / 2, up to a constant (Hyvarinen 2005)
    sliced       (v^T s)^2 / 2 + v^T (ds/dx) v         the same along random v (Song et al. 2019)
    SURE         |D - y|^2 - d rho^2 + 2 rho^2 div D   E|D - x0|^2 (Stein 1981)

These need the network's derivative, and its second derivative to train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, NetworkError, PathError, nearest
from sde.path import Path, Tabulated
from sde.prediction import OUTPUTS, Knot, Predictor, Row
from sde.trace import PROBES, Exact, Hutchinson, Products

from .network import Score, check_state, levels, needs_sigma, per_sample

GAMMA = 5.0  # of min-SNR
CHUNK = 1 << 18  # numbers of rows of a Jacobian computed at a time


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
    "score": Weight("score", lambda knot: knot.sigma**2),  # Song et al. 2021 (NCSN++), lambda(t) = sigma^2: "eps" again
    "ncsn": Weight("score", lambda knot: 0.5 * knot.sigma**2),  # Song & Ermon 2019, eq. 5 and 6: half of that
    "edm": Weight("F"),  # Karras et al. 2022: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0 at alpha = 1
    "min_snr": min_snr(),
    # Kingma et al. 2021, eq. 18: -d lambda / dt on eps; g^2 / 2 on the score, the likelihood weighting of Song et al. 2021b
    "vdm": Weight("eps", lambda knot: 0.5 * knot.g2 / knot.sigma**2),
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
    knot = _columns(score.path, t, x0)
    x = _mixed(knot, x0, noise)
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


def flow_matching_loss(
    score: Predictor, x0: Tensor, *, noise: Tensor, t: Any, conditions: Mapping[str, Any] | None = None
) -> Tensor:
    """|v - (alpha' x0 + sigma' noise)|^2 of each sample, (B,): conditional flow matching (Lipman et al. 2023; on ``Linear``,
    |v - (noise - x0)|^2, rectified flow, Liu et al. 2023). Arguments and errors as for ``denoising_loss``.
    """
    return denoising_loss(score, x0, noise=noise, t=t, weight="velocity", conditions=conditions)


def ncsn_loss(
    score: Predictor,
    x0: Tensor,
    *,
    noise: Tensor,
    sigmas: Sequence[float] | Tensor,
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """The mean over noise levels of sigma^2 |s + noise / sigma|^2 / 2, (B,): NCSN's loss (Song & Ermon 2019, eq. 6).

    sigmas  (L,), levels sigma / alpha of the path, such as torch.logspace(1, -2, 10) on ``VE``
    noise   (L, B, *event), unit normals: one network call a level
    """
    ratios = torch.as_tensor(sigmas, dtype=torch.float64).detach().cpu()
    if ratios.dim() != 1 or not len(ratios) or not bool((ratios > 0.0).all()):
        raise InputError(f"sigmas={sigmas!r:.80}: give a 1-D sequence of noise levels sigma / alpha > 0")
    if not isinstance(noise, Tensor) or noise.shape != (len(ratios), *x0.shape):
        seen = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise InputError(f"noise is {seen}, for {len(ratios)} levels of x0 {tuple(x0.shape)}: give (L, B, *event)")
    times = score.path.time(-ratios.log())
    made = score.path.lam(times).neg().exp()
    off = (made - ratios).abs() > 1e-6 * ratios
    if bool(off.any()):
        raise InputError(f"sigmas contains {float(ratios[off][0]):g}, which {score.path} does not reach: give levels it has")
    losses = [
        denoising_loss(score, x0, noise=z, t=float(t), weight="ncsn", conditions=conditions)
        for z, t in zip(noise, times, strict=True)
    ]
    return torch.stack(losses).mean(0)


def implicit_loss(
    score: Predictor,
    x: Tensor,
    *,
    t: Any,
    probes: Tensor | None = None,
    weight: Callable[[Tensor], Any] | Tensor | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """|s|^2 / 2 + div s of each sample, (B,): implicit score matching (Hyvarinen 2005).

    x       (B, *event), states with the law p_t: ``diffuse`` makes them of data and noise
    t       a number, or a tensor () or (B,), where sigma > 0
    probes  None: the exact divergence, d backward passes. Or (n, B, *event), ``draw_probes``: the mean of v^T (ds/dx) v, which
            makes this sliced score matching with reduced variance (Song et al. 2019)
    weight  a tensor (B,) or a function t -> (B,) on the loss, such as path.g2

    PathError at sigma = 0; NetworkError where no gradient reaches x.
    """
    knot = _columns(score.path, t, x)
    s, div = _with_divergence(lambda u: _score_of(score, u, knot, conditions), x, probes)
    return _on_loss(weight, knot, x) * (0.5 * _square(s) + div)


def sliced_loss(
    score: Predictor,
    x: Tensor,
    *,
    t: Any,
    probes: Tensor,
    weight: Callable[[Tensor], Any] | Tensor | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """The mean over probes of (v^T s)^2 / 2 + v^T (ds/dx) v, (B,): sliced score matching (Song et al. 2019).

    Its variant with reduced variance, |s|^2 for (v^T s)^2, is ``implicit_loss`` with probes. Arguments and errors as there.
    """
    knot = _columns(score.path, t, x)
    s, div = _with_divergence(lambda u: _score_of(score, u, knot, conditions), x, _needed(probes))
    along = (probes * s).reshape(len(probes), len(x), -1).sum(2)
    return _on_loss(weight, knot, x) * (0.5 * along.square().mean(0) + div)


def sure_loss(
    score: Predictor,
    x: Tensor,
    *,
    t: Any,
    probes: Tensor | None = None,
    weight: Callable[[Tensor], Any] | Tensor | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """Stein's unbiased estimate of |x0' - x0|^2 of each sample, (B,), from noisy x alone, for data only seen at level t:

        |x0' - x / alpha|^2 - d (sigma / alpha)^2 + 2 sigma^2 / alpha div x0'

    It may be negative. Arguments and errors as for ``implicit_loss``; also alpha > 0.
    """
    knot = _columns(score.path, t, x)
    if bool((torch.as_tensor(knot.alpha) == 0.0).any()):
        raise PathError(f"alpha = 0 at the last time of {score.path}: x says nothing about x0 there; draw earlier times")
    x0, div = _with_divergence(lambda u: _x0_of(score, u, knot, conditions), x, probes)
    alpha, sigma = (v.to(device=x.device, dtype=x.dtype) for v in (knot.alpha, knot.sigma))  # type: ignore[attr-defined]
    apart = _square(x0 - x / per_sample(knot.alpha, x))
    return _on_loss(weight, knot, x) * (apart - x[0:1].numel() * (sigma / alpha) ** 2 + 2.0 * sigma**2 / alpha * div)


def uncertainty_weighted(loss: Tensor, log_variance: Tensor, numbers: int) -> Tensor:
    """loss e^-u + d u, (B,): the likelihood weighting of EDM2 (Karras et al. 2024; Kendall et al. 2018).

    loss is summed over the event of d = ``numbers``, u = log_variance (B,) a learned function of t, at best log(E loss / d).
    """
    if isinstance(numbers, bool) or not isinstance(numbers, int) or numbers < 1 or log_variance.shape != loss.shape:
        raise InputError(
            f"numbers={numbers!r}, log_variance {tuple(log_variance.shape)}, loss {tuple(loss.shape)}: give the numbers in a "
            "sample, an int >= 1, and one log-variance a loss"
        )
    return loss * torch.exp(-log_variance) + numbers * log_variance


def diffuse(path: Path, x0: Tensor, *, noise: Tensor, t: Any) -> Tensor:
    """x_t = alpha x0 + sigma noise, shaped like x0; t a number, or a tensor () or (B,)."""
    return _mixed(_columns(path, t, x0), x0, noise)


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


def _columns(path: Path, t: Any, x: Any) -> Knot:
    """The path at t as float64 columns (B,)."""
    check_state(x)
    columns: Any = (torch.as_tensor(v, dtype=torch.float64).expand(len(x)) for v in levels(path, t, x)[:7])
    return Knot(*columns)


def _mixed(knot: Knot, x0: Tensor, noise: Tensor) -> Tensor:
    check_state(noise)
    if noise.shape != x0.shape:
        raise InputError(f"noise has shape {tuple(noise.shape)}, x0 {tuple(x0.shape)}: must be equal")
    return per_sample(knot.alpha, x0) * x0 + per_sample(knot.sigma, x0) * noise


def _square(x: Tensor) -> Tensor:
    return x.square().reshape(len(x), x.shape[1:].numel()).sum(1)


Form = tuple[Tensor, Any, Any]  # y, p and q of the field p x + q y


def _score_of(score: Predictor, x: Tensor, knot: Knot, conditions: Mapping[str, Any] | None) -> Form:
    """grad log p_t by the network as it is: its mode is left alone."""
    needs_sigma(torch.as_tensor(knot.sigma), score.path)
    if not isinstance(score, Score):
        return score(x, knot.t, **(conditions or {})), 0.0, 1.0
    y, (a, b) = score.raw(x, knot.t, **(conditions or {}))
    alpha, sigma = per_sample(knot.alpha, x), per_sample(knot.sigma, x)
    if _is_zero(a):  # eps times a factor: defined at alpha = 0 too
        return y, 0.0, -1.0 / (b * sigma)
    det = alpha * b - sigma * a
    return y, a / (det * sigma), -alpha / (det * sigma)


def _x0_of(score: Predictor, x: Tensor, knot: Knot, conditions: Mapping[str, Any] | None) -> Form:
    if not isinstance(score, Score):
        return score.predict(x, knot.t, **(conditions or {})).x0, 0.0, 1.0
    y, (a, b) = score.raw(x, knot.t, **(conditions or {}))
    alpha, sigma = per_sample(knot.alpha, x), per_sample(knot.sigma, x)
    det = alpha * b - sigma * a
    return y, b / det, -sigma / det


def _with_divergence(form: Callable[[Tensor], Form], x: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the field p x + q y, its divergence or the mean of v^T J v over the probes), with a graph where one is recorded."""
    graph, d = torch.is_grad_enabled(), x[0:1].numel()
    if probes is not None and (not isinstance(probes, Tensor) or probes.shape[1:] != x.shape or not len(probes)):
        seen = tuple(probes.shape) if isinstance(probes, Tensor) else type(probes).__name__
        raise InputError(f"probes is {seen} for x {tuple(x.shape)}: give (n, B, *event), such as draw_probes(x, 4, ...)")
    with torch.enable_grad():
        u = x if x.requires_grad else x.detach().requires_grad_()
        y, p, q = form(u)
        products = Products(create_graph=graph)

        def pull(w: Tensor) -> Tensor:
            rows = products(w, u, y, len(w)) if y.requires_grad else None
            if rows is None:
                raise NetworkError(
                    "no gradient reaches x: this loss needs the network's derivative; take no_grad, detach and numpy out of it"
                )
            return _flat(p, u) * w + _flat(q, u) * rows

        trace = Exact() if probes is None else Hutchinson(probes.reshape(len(probes), len(u), d))
        div = trace(pull, u.reshape(len(u), d), max(1, CHUNK // max(1, u.numel()))).mean(1)
        field = p * u + q * y
    return (field, div) if graph else (field.detach(), div.detach())


def _flat(value: Any, x: Tensor) -> Any:
    """A coefficient that broadcasts against x, as one that does against (n, B, d)."""
    return value.reshape(len(x), 1) if isinstance(value, Tensor) else value


def _on_loss(weight: Any, knot: Knot, x: Tensor) -> Any:
    value = weight(knot.t) if callable(weight) else 1.0 if weight is None else weight
    value = torch.as_tensor(value, dtype=torch.float64)
    if value.dim() > 1 or value.numel() not in (1, len(x)):
        raise InputError(f"weight has shape {tuple(value.shape)}: give ({len(x)},), one a sample")
    return value.to(device=x.device, dtype=x.dtype)


def _needed(probes: Any) -> Tensor:
    if not isinstance(probes, Tensor):
        raise InputError(f"probes is a {type(probes).__name__}: give a tensor (n, B, *event), such as draw_probes(x, 4, ...)")
    return probes


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


def _table(path: Path, u: Tensor) -> Tensor:
    if not isinstance(path, Tabulated):
        raise InputError(f"kind='table' draws the entries of a table, and this path is {path}: use 'uniform'")
    return path.time_of(torch.floor(u * len(path.betas)))


#: Distributions of training times as quantile functions, u in (0, 1) -> t in [t_min, T], both float64.
TIMES: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "uniform": _uniform,
    "log_normal": _log_normal,  # Karras et al. 2022: log(sigma / alpha) ~ N(-1.2, 1.2^2)
    "uniform_lam": _uniform_lam,  # lambda uniform; to lambda(T - t_min) where lambda(T) is infinite
    "logit_normal": _logit_normal,  # Esser et al. 2024: logit(t / T) ~ N(0, 1)
    "table": _table,  # Ho et al. 2020: the entries of a Tabulated path, each as likely; ``path.index`` is their whole label
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


def draw_probes(x: Tensor, n: int, law: str = "rademacher", *, generator: torch.Generator) -> Tensor:
    """(n, B, *event) probes v with E v v^T = I for a batch x: signs ("rademacher") or unit normals ("gaussian")."""
    _check_generator(generator)
    if law not in PROBES:
        raise InputError(f"law={law!r} is unknown: {nearest(law, PROBES)}")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(f"n={n!r}: give the number of probes, an int >= 1")
    z = torch.randn((n, *x.shape), generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    return z if law == "gaussian" else torch.where(z < 0.0, -1.0, 1.0).to(x.dtype)


def _check_generator(generator: Any) -> None:
    if not isinstance(generator, torch.Generator):
        raise InputError(f"generator is a {type(generator).__name__}: give torch.Generator().manual_seed(0)")
