"""Lower bounds on log p(x0) of diffusion as a model with latent variables: stochastic counterparts of ``sde.log_likelihood``.

    -log p(x0)  <=  KL(q(x_T | x0) | p(x_T))  +  diffusion  +  E_q[-log p(x0 | x_last)],     q(x_t | x0) = N(alpha x0, sigma^2)

``ddpm_elbo`` has a chain of steps s -> t (Ho et al. 2020, eq. 5), ``vdm_elbo`` its limit of infinitely many (Kingma et al.
2021). With rho = SNR_s / SNR_t, and x0' the network's x0 at (x_s, s), a step's two Gaussians

    q(x_t | x_s, x0)   mean alpha_t (1 - rho) x0 + (...) x_s,     variance b = sigma_t^2 (1 - rho)
    p(x_t | x_s)       mean alpha_t (1 - rho) x0' + the same,     variance c

have KL = sum_i (b / c - 1 - log(b / c) + alpha_t^2 (1 - rho)^2 (x0 - x0')^2 / c) / 2. At c = b that is (SNR_t - SNR_s)
|x0 - x0'|^2 / 2, and in the limit int |eps - eps'|^2 dlam. With tau = log(1 + SNR) / 2 this is int |e_v|^2 dtau, e_v the error
in the v row: finite also where alpha = 0, and nearly constant for data of unit scale. So tau is drawn uniformly.

The bound is that of the model whose reverse process is the chain, or the reverse SDE: not of the probability flow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, PathError, nearest
from sde.likelihood import bits_per_dim
from sde.noise import Source, White
from sde.path import Path, Tabulated
from sde.prediction import Knot, Predictor, Row, Tally, affine
from sde.trace import NO_KNOT

from .network import check_state, per_sample, working

VARIANCES = ("posterior", "forward", "learned")

Levels = tuple[float, float, int]
"""(value of the first level, value of the last one, how many): 8-bit images in [-1, 1] are (-1.0, 1.0, 256)."""

_FIRST_NORMAL, _FIRST_TIME = 1 << 34, 1 << 35  # draws of a sample's stream, beyond those of samplers and of the likelihood


@dataclass(frozen=True)
class Elbo:
    """The three parts of -ELBO in nats, (B,) float64, each an unbiased estimate where it is not exact.

    standard_error   of their sum, from the spread of the draws; None for one draw of a chain
    discrete         the decoder is that of levels: log_prob is of the levels themselves, else a density
    """

    prior: Tensor
    diffusion: Tensor
    decoder: Tensor
    standard_error: Tensor | None
    nfe: int
    net_evals: int
    shape: tuple[int, ...]
    discrete: bool

    @property
    def log_prob(self) -> Tensor:
        """The lower bound on log p(x0), (B,)."""
        return -(self.prior + self.diffusion + self.decoder)

    def bits_per_dim(self, *, scale: float | None = None, bins: int | None = None) -> Tensor:
        """``sde.bits_per_dim`` of log_prob, an upper bound: (B,). Without scale and bins for a decoder of levels."""
        if self.discrete:
            if scale is not None or bins is not None:
                raise InputError(f"scale={scale!r}, bins={bins!r}: the decoder is that of the levels already; give neither")
            scale, bins = 1.0, 1
        return bits_per_dim(self.log_prob, self.shape, scale=scale, bins=bins)


def ddpm_elbo(
    score: Predictor,
    x0: Tensor,
    times: Sequence[float] | Tensor | None = None,
    *,
    variance: str = "posterior",
    levels: Levels | None = None,
    decoder_std: float | None = None,
    prior_std: float | None = None,
    draws: int = 1,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    noise: Source | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Elbo:
    """The bound of a chain of ancestral steps, L_T + sum_t L_t + L_0 of Ho et al. (2020), for x0 (B, *event).

    times        decreasing, from the prior's to the last one, where sigma > 0 still (default: all entries of a table)
    variance     c of a step: "posterior", b itself (beta tilde); "forward", sigma_s^2 (1 - rho) (beta; both of Ho et al.);
                 "learned", between the two as a network with split="learned_var" says (Nichol & Dhariwal 2021, eq. 15,
                 made for variance-preserving paths)
    levels       None: the decoder N(x0', decoder_std^2) is a density. Or ``Levels``: its mass between the middles of the
                 levels, the outer ones open (Ho et al., eq. 13); x0 must lie on them
    decoder_std  default: that of q in the last step, as in published code; "learned" has its own
    prior_std    of p(x_T), default ``path.prior_std``
    draws        independent runs of the whole chain, averaged. Each costs one network call a step and one for the decoder
    seed         the noise of sample i is a function of (seed, i); seeds= gives one seed a sample, noise= a source

    Errors: InputError for bad arguments; PathError where the network's output says nothing of x0 (eps at alpha = 0).
    """
    x, _ = _begin(score, x0)
    knots = _chain(score.path, times)
    if variance not in VARIANCES:
        raise InputError(f"variance={variance!r} is unknown: {nearest(variance, VARIANCES)}")
    if decoder_std is not None and variance == "learned":
        raise InputError("decoder_std is given, but variance='learned' has its own")
    std = _std("decoder_std", decoder_std, math.sqrt(_bounds(*knots[-2:])[0]))
    prior, source, count = _prior(score.path, x, knots[0], prior_std), _source(noise, seed, seeds), _draws(draws, 1)
    _check_levels(x, levels)
    tally, sums = Tally(), torch.zeros(2, count, len(x), dtype=torch.float64, device=x.device)
    if x.numel():
        with torch.no_grad(), _running(score):
            make = score.with_variance if variance == "learned" else score.at
            calls = make(knots, x, conditions or {}, tally)
            normals = source.open(tuple(x.shape), x.dtype, x.device)
            for r in range(count):
                for i, (k, call) in enumerate(zip(knots, calls, strict=True)):
                    z = normals.normal(_FIRST_NORMAL + r * len(knots) + i, NO_KNOT, NO_KNOT)
                    mean, v = _x0_of(score, k, call, k.alpha * x + k.sigma * z, variance)
                    if i < len(knots) - 1:
                        sums[0, r] += _step(x, mean, v, k, knots[i + 1], variance)
                    else:
                        spread = std if v is None else torch.exp(0.5 * _between(v, std**2, k.sigma**2))
                        sums[1, r] -= _log_decoder(x, mean, spread, levels)
    return _result(prior, sums, x, levels, tally)


def vdm_elbo(
    score: Predictor,
    x0: Tensor,
    *,
    t_min: float | None = None,
    t_max: float | None = None,
    levels: Levels | None = None,
    prior_std: float | None = None,
    draws: int = 2,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    noise: Source | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Elbo:
    """The bound in continuous time (Kingma et al. 2021), for x0 (B, *event).

    t_min      where the decoder is, sigma > 0 (default: the path's);  t_max: where the prior is (default T)
    levels     None: the decoder is N(x_{t_min} / alpha, (sigma / alpha)^2), whose mean is known exactly; or ``Levels``, as in
               ``ddpm_elbo``, with that Gaussian
    draws      even: two independent ones in each of draws / 2 equal cells of tau, times and noise of their own in every sample
    prior_std, seed, seeds, noise: as in ``ddpm_elbo``. ``draws`` network calls.
    """
    x, d = _begin(score, x0)
    path, count = score.path, _draws(draws, 2)
    first = path.knot(_time(path, "t_min", path.t_min if t_min is None else t_min))
    last = path.knot(_time(path, "t_max", path.T if t_max is None else t_max))
    if not first.t < last.t:
        raise InputError(f"t_min={first.t:g}, t_max={last.t:g}: give t_min < t_max")
    _needs_noise(path, first)
    prior, source, cells = _prior(path, x, last, prior_std), _source(noise, seed, seeds), count // 2
    _check_levels(x, levels)
    low, high = (0.5 * math.log1p((k.alpha / k.sigma) ** 2) for k in (last, first))
    tally, sums = Tally(), torch.zeros(2, count, len(x), dtype=torch.float64, device=x.device)
    std = first.sigma / first.alpha
    if x.numel():
        with torch.no_grad(), _running(score):
            normals = source.open(tuple(x.shape), x.dtype, x.device)
            clocks = source.open((len(x), 1), torch.float64)
            for r in range(count):
                u = torch.special.ndtr(clocks.normal(_FIRST_TIME + r, NO_KNOT, NO_KNOT)[:, 0])
                tau = low + (high - low) * (r % cells + u) / cells
                z = normals.normal(_FIRST_NORMAL + 2 * r, NO_KNOT, NO_KNOT)
                error = _v_error(score, path.knots(path.time(0.5 * torch.log(torch.expm1(2.0 * tau)))), x, z, conditions, tally)
                sums[0, r] = (high - low) * error
                if levels is not None:
                    z = normals.normal(_FIRST_NORMAL + 2 * r + 1, NO_KNOT, NO_KNOT)
                    sums[1, r] = -_log_decoder(x, x + std * z, std, levels)
    if levels is None:
        sums[1] = d * (math.log(std * math.sqrt(2.0 * math.pi)) + 0.5)
    pairs = sums.reshape(2, 2, cells, len(x))
    return _result(prior, sums, x, levels, tally, square=((pairs[:, 0] - pairs[:, 1]).sum(0) / (2.0 * cells)).square().sum(0))


# --- the parts --------------------------------------------------------------------------------------------------------


def _bounds(s: Knot, t: Knot) -> tuple[float, float]:
    """(b, the forward variance) of the step s -> t."""
    rest = -math.expm1(2.0 * (s.lam - t.lam))  # 1 - rho
    return t.sigma**2 * rest, s.sigma**2 * rest


def _between(v: Tensor, small: float, large: float) -> Tensor:
    """log of the learned variance, v in [-1, 1]."""
    return 0.5 * (1.0 + v) * math.log(large) + 0.5 * (1.0 - v) * math.log(small)


def _step(x: Tensor, mean: Tensor, v: Tensor | None, s: Knot, t: Knot, variance: str) -> Tensor:
    """KL(q(x_t | x_s, x0) | p(x_t | x_s)) in nats, (B,) float64."""
    b, forward = _bounds(s, t)
    log_c: Any = math.log(b if variance == "posterior" else forward) if v is None else _between(v, b, forward)
    log_c = torch.as_tensor(log_c, dtype=x.dtype, device=x.device)
    gap = (t.alpha * -math.expm1(2.0 * (s.lam - t.lam)) * (x - mean)).square()
    ratio = math.log(b) - log_c
    return _sum(0.5 * (torch.expm1(ratio) - ratio + gap * torch.exp(-log_c)))


def _x0_of(score: Predictor, k: Knot, call: Callable[[Tensor], Any], xs: Tensor, variance: str) -> tuple[Tensor, Tensor | None]:
    """(the network's x0 at x_s, its v or None)."""
    p, q = affine(score.row(k), k, 1.0, 0.0)
    out = call(xs)
    y, v = out if variance == "learned" else (out, None)
    return (q * y if p == 0.0 else p * xs + q * y), v


def _v_error(
    score: Predictor, knots: list[Knot], x: Tensor, z: Tensor, conditions: Mapping[str, Any] | None, tally: Tally
) -> Tensor:
    """|cos(th) (eps - eps') - sin(th) (x0 - x0')|^2 of each sample at its own knot, (B,) float64."""

    def column(values: Sequence[float]) -> Tensor:
        return per_sample(torch.tensor(values, dtype=torch.float64), x)

    alpha, sigma = column([k.alpha for k in knots]), column([k.sigma for k in knots])
    rows: list[Row] = [score.row(k) for k in knots]
    # the error of y = a x0 + b eps is det / r times that of v; ``affine`` says where det is 0
    factor = [affine(row, k, -k.sigma, k.alpha)[1] / math.hypot(k.alpha, k.sigma) for row, k in zip(rows, knots, strict=True)]
    y = score.each(knots, x, conditions or {}, tally)(alpha * x + sigma * z)
    error = y - (column([row.a for row in rows]) * x + column([row.b for row in rows]) * z)
    return _sum((column(factor) * error).square())


def _log_decoder(x: Tensor, mean: Tensor, std: Any, levels: Levels | None) -> Tensor:
    """log of the decoder's density at x, or of its mass on x's level: (B,) float64."""
    std = torch.as_tensor(std, dtype=torch.float64, device=x.device)
    gap = x.double() - mean.double()
    if levels is None:
        return _sum(-0.5 * (gap / std).square() - torch.log(std * math.sqrt(2.0 * math.pi)))
    low, high, n = levels
    half = 0.5 * (high - low) / (n - 1)
    below = torch.where(x < low + half, -math.inf, (gap - half) / std)
    above = torch.where(x > high - half, math.inf, (gap + half) / std)
    flip = below > 0.0  # both in the upper tail, where Phi is 1: take them from the lower one
    below, above = torch.where(flip, -above, below), torch.where(flip, -below, above)
    top = torch.special.log_ndtr(above)
    return _sum(top + torch.log(-torch.expm1(torch.special.log_ndtr(below) - top)))


def _prior(path: Path, x: Tensor, last: Knot, given: float | None) -> Tensor:
    """KL(N(alpha x0, sigma^2) | N(0, prior_std^2)), (B,) float64."""
    std = _std("prior_std", given, path.prior_std(last.t))
    ratio = (last.sigma / std) ** 2
    return _sum(0.5 * ((last.alpha / std * x.double()).square() + (ratio - 1.0 - math.log(ratio))))


def _sum(values: Tensor) -> Tensor:
    return values.double().reshape(len(values), values[0:1].numel()).sum(1)


def _result(prior: Tensor, sums: Tensor, x: Tensor, levels: Any, tally: Tally, square: Tensor | None = None) -> Elbo:
    """From the draws (diffusion and decoder, draws, B) and the square of their mean's standard error, if it is known."""
    count = sums.shape[1]
    if square is None and count > 1:
        square = (sums - sums.mean(1, keepdim=True)).sum(0).square().sum(0) / (count * (count - 1))
    error = None if square is None else square.sqrt()
    diffusion, decoder = sums.mean(1)
    return Elbo(prior, diffusion, decoder, error, tally.nfe, tally.net_evals, tuple(x.shape), levels is not None)


# --- the boundary check -----------------------------------------------------------------------------------------------


def _begin(score: Any, x0: Any) -> tuple[Tensor, int]:
    """(x0 in float32 at least, the numbers in a sample)."""
    if not isinstance(score, Predictor):
        raise InputError(
            f"score is a {type(score).__name__}: wrap the network first, score = Score(network, path, predicts='eps')"
        )
    check_state(x0)
    x, _ = working(x0.detach())
    bad = ~x.reshape(len(x), x[0:1].numel()).isfinite().all(1)
    if bool(bad.any()):
        raise InputError(f"x0 is not finite in {int(bad.sum())} of {len(x)} samples (first: {int(bad.nonzero()[0])})")
    return x, x[0:1].numel()


def _chain(path: Path, times: Any) -> list[Knot]:
    if times is None:
        if not isinstance(path, Tabulated):
            raise InputError(f"times=None: only a table has times of its own, and this is {path}; give the chain's, decreasing")
        times = path.time_of(torch.arange(len(path.betas) - 1, -1, -1, dtype=torch.float64))
    knots = path.knots(times)
    if len(knots) < 2 or any(not t.t < s.t for s, t in itertools.pairwise(knots)):
        raise InputError(f"times {[round(k.t, 4) for k in knots[:4]]}...: give at least two, strictly decreasing")
    _needs_noise(path, knots[-1])
    return knots


def _needs_noise(path: Path, k: Knot) -> None:
    if k.sigma == 0.0:
        raise PathError(
            f"sigma({k.t:g}) = 0: the bound is infinite there; end at a time with noise, such as {path.t_min or 1e-3:g}"
        )


def _time(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= path.T:
        raise InputError(f"{name}={value!r}: must be a number in [0, {path.T:g}]")
    return float(value)


def _std(name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
        raise InputError(f"{name}={value!r}: must be a number > 0")
    return float(value)


def _draws(value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or value % least:
        raise InputError(f"draws={value!r}: must be an{' even' if least == 2 else ''} int >= {least}")
    return value


def _check_levels(x: Tensor, levels: Any) -> None:
    if levels is None:
        return
    wanted = "give (value of the first level, of the last one, how many), such as (-1.0, 1.0, 256)"
    if not isinstance(levels, tuple) or len(levels) != 3:
        raise InputError(f"levels={levels!r}: {wanted}")
    low, high, n = levels
    if not -math.inf < low < high < math.inf or isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise InputError(f"levels={levels!r}: {wanted}")
    k = (x.double() - low) / (high - low) * (n - 1)
    off = (k - k.round()).abs() + (k - k.clamp(0, n - 1)).abs()
    if x.numel() and float(off.max()) > 1e-2:
        raise InputError(
            f"x0 contains {float(x.flatten()[off.flatten().argmax()]):g}, not one of {n} levels from {low:g} to {high:g}: "
            "give data that are not dequantised, or levels=None for a density"
        )


def _source(noise: Any, seed: int, seeds: Sequence[int] | None) -> Source:
    if noise is not None and not isinstance(noise, Source):
        raise InputError(f"noise is a {type(noise).__name__}: give a source of sde.noise, such as White(seed=0)")
    return noise if noise is not None else White(seed, seeds=seeds)


def _running(score: Predictor) -> AbstractContextManager[Any]:
    return score.running() if hasattr(score, "running") else nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
