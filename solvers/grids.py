"""Grids: plain functions (path, n) -> n + 1 decreasing float64 times from ``start`` (default T) to ``stop`` (default the
path's t_min), both exact. Their parameters are keywords: ``sample(..., grid=partial(karras, rho=3.0))``.

rho = sigma / alpha and lambda = -log rho: where nothing else is said, formulas that authors write in their sigma are written
here in rho, which is the same on paths with alpha = 1 and makes the grid the same on every path. What happens where lambda is
infinite is told in ``grids_base``; the integer steps of released code are in ``grids_published``, grids fitted to a model in
``grids_fitted``. A new grid is a function and a row of GRIDS; the tests read GRIDS.

One step more or less: released code lists n noise levels for its n network calls and appends 0, so that its list is ours with
``stop=0.0``, or, for formulas that end at sigma_min, ours of n - 1 steps and a last one to 0.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, ToolkitError, nearest
from sde.path import Path

from .grids_base import Grid, Map, bisect, ends, equal, exact, in_time, need, ramp
from .grids_published import beta, beta_quantiles, leading, linspace, normal, sgm_uniform, simple, trailing, turbo

# --- equal steps in a coordinate --------------------------------------------------------------------------------------


def uniform(path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
    """Equal steps in t (DPM-Solver's 'time_uniform'; of flow models when ``stop`` is 0)."""
    return equal(path, n, start, stop, lambda t: t, lambda t: t, finite=True)


def quadratic(path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
    """Equal steps in sqrt(t) (DDIM's 'quad', DPM-Solver's 'time_quadratic')."""
    return equal(path, n, start, stop, torch.sqrt, torch.square, finite=True)


def karras(path: Path, n: int, start: float | None = None, stop: float | None = None, rho: float = 7.0) -> Tensor:
    """Equal steps in (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. 5; "polynomial", "edm")."""
    need(rho > 0.0, "rho", rho, "must be > 0 (Karras et al. use 7)")
    to, back = (lambda t: torch.exp(-path.lam(t) / rho)), (lambda u: path.time(-rho * torch.log(u)))
    return equal(path, n, start, stop, to, back)


def log_snr(path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
    """Equal steps in lambda, half the log signal-to-noise ratio (Lu et al. 2022; k-diffusion's 'exponential')."""
    return equal(path, n, start, stop, path.lam, path.time)


def poly_exponential(path: Path, n: int, start: float | None = None, stop: float | None = None, rho: float = 1.0) -> Tensor:
    """log(sigma/alpha) falls to its last value as (1 - i/n)^rho (k-diffusion's 'polyexponential'; rho = 1 is ``log_snr``).

    Above 1 the steps in lambda shrink towards data, below 1 towards noise.
    """
    need(rho > 0.0, "rho", rho, "must be > 0 (k-diffusion's default is 1)")
    return equal(path, n, start, stop, path.lam, path.time, bend=lambda r: 1.0 - (1.0 - r) ** rho)


def cosine(path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
    """Equal steps in the angle arctan(sigma/alpha): a cosine schedule on any path, finite at both ends.

    The same as ``gaussian_optimal`` with c = 1, and as ComfyUI's 'kl_optimal' (which divides by 0 at one step).
    """
    return gaussian_optimal(path, n, start, stop, c=1.0)


def gaussian_optimal(path: Path, n: int, start: float | None = None, stop: float | None = None, c: float = 0.5) -> Tensor:
    """Equal steps in arctan(sigma / (c alpha)): rho_i = c tan(a_0 - (i/n) (a_0 - a_n)), finite at both ends.

    The best grid for DDIM on Gaussian data of standard deviation c: a step multiplies the deviation from the mean by
    cos(step of the angle) relative to the exact flow, so that the final standard deviation is cos^n((a_0 - a_n) / n) of the
    true one, and equal angles are the largest product. Align Your Steps (Sabour et al. 2024) finds the same grid as the one
    that minimises its bound of the KL divergence. c is the standard deviation of the data: 0.5 for images in [-1, 1].
    """
    need(0.0 < c < math.inf, "c", c, "must be a standard deviation > 0 (0.5 for images in [-1, 1])")
    to, back = (lambda t: torch.atan2(path.sigma(t), c * path.alpha(t))), (lambda u: path.time(-torch.log(c * torch.tan(u))))
    return equal(path, n, start, stop, to, back, finite=True)


def vp(
    path: Path,
    n: int,
    start: float | None = None,
    stop: float | None = None,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
) -> Tensor:
    """Equal steps in the time of the VP path with linear beta, whatever the path (k-diffusion's 'vp', which also fixes both
    ends: t = 1 and 1e-3, sigma/alpha = 152.2 and 0.0101). ``beta_max - beta_min`` is its beta_d.
    """
    need(0.0 < beta_min < math.inf, "beta_min", beta_min, "must be > 0 and finite, e.g. 0.1")
    need(beta_min <= beta_max < math.inf, "beta_max", beta_max, f"must be >= beta_min={beta_min!r} and finite, e.g. 20.0")
    slope = beta_max - beta_min

    def to(t: Tensor) -> Tensor:  # from -2 log alpha = log(1 + rho^2) = beta_min u + slope u^2 / 2
        rate = torch.nn.functional.softplus(-2.0 * path.lam(t), threshold=700.0)
        return 2.0 * rate / (beta_min + torch.sqrt(beta_min**2 + 2.0 * slope * rate))

    def back(u: Tensor) -> Tensor:
        rate = u * (beta_min + 0.5 * slope * u)
        return path.time(-0.5 * torch.where(rate < 30.0, torch.log(torch.expm1(rate.clamp(max=30.0))), rate))

    return equal(path, n, start, stop, to, back)


# --- quantiles --------------------------------------------------------------------------------------------------------


def laplace(
    path: Path, n: int, start: float | None = None, stop: float | None = None, mu: float = 0.0, scale: float = 0.5
) -> Tensor:
    """Quantiles of log(sigma/alpha) ~ Laplace(mu, scale) between both ends (Hang et al. 2024, as ComfyUI samples with it).

    Hang et al. draw the log SNR, which is -2 log(sigma/alpha), from Laplace(0, 0.5): their law is ``scale=0.25`` here.
    ComfyUI takes their formula for log sigma and clamps it to the ends, where it repeats levels from some 430 steps on;
    here the law is truncated to the ends.
    """
    log_cdf = lambda z: torch.where(z < 0.0, z - math.log(2.0), torch.log1p(-0.5 * torch.exp(-z.abs())))  # noqa: E731
    return _quantiles(path, n, start, stop, log_cdf, mu, scale)


def probit(
    path: Path, n: int, start: float | None = None, stop: float | None = None, mu: float = 0.0, scale: float = 3.0
) -> Tensor:
    """Quantiles of log(sigma/alpha) ~ N(mu, scale^2) between both ends: on the ``Linear`` path t = sigmoid(mu + scale z).

    skrample's 'Probit' has these quantiles with scale 3. With mu and scale of a training law (EDM's N(-1.2, 1.2^2), SD3's
    logit-normal) the grid goes where the network was trained.
    """
    return _quantiles(path, n, start, stop, torch.special.log_ndtr, mu, scale)


def _quantiles(path: Path, n: int, start: float | None, stop: float | None, log_cdf: Map, mu: float, scale: float) -> Tensor:
    """Equal steps of the CDF of (-lambda - mu) / scale, a law symmetric about 0.

    Between two points of one tail the CDF is taken relative to the nearer one, so that its digits are not lost.
    """
    need(math.isfinite(mu), "mu", mu, "must be finite: the centre of the law of log(sigma/alpha)")
    need(0.0 < scale < math.inf, "scale", scale, "must be > 0 and finite")

    def law(a: float, b: float, m: int) -> Tensor:
        high, low = ((-path.lam(torch.tensor([t], dtype=torch.float64)) - mu) / scale for t in (a, b))
        flip = bool(low >= 0.0)  # all in the upper tail: mirrored into the lower one
        if flip:
            high, low = -low, -high
        top = log_cdf(torch.minimum(high, torch.zeros(1, dtype=torch.float64)))  # the largest that matters of a tail, or 1/2

        def cdf(z: Tensor) -> Tensor:
            return torch.exp(log_cdf(z) - top)

        share = ramp(m) if flip else 1.0 - ramp(m)
        z = bisect(cdf, cdf(low) + share * (cdf(high) - cdf(low)), float(low), float(high))
        return path.time(-(mu + scale * (-z if flip else z)))

    return ends(path, n, start, stop, law)


def beta_sigma(
    path: Path,
    n: int,
    start: float | None = None,
    stop: float | None = None,
    alpha: float = 0.6,
    beta: float = 0.6,
) -> Tensor:
    """sigma/alpha between its ends by the quantiles of Beta(alpha, beta): diffusers' ``use_beta_sigmas``.

    Not what its paper does, which spreads the time steps (``beta``): on noise levels from 14.6 to 0.03, 0.5 of the steps
    lie above sigma = 7.
    """

    def law(a: float, b: float, m: int) -> Tensor:
        first, last = (math.exp(-float(path.lam(t))) for t in (a, b))
        return path.time(-torch.log(last + (first - last) * beta_quantiles(m, alpha, beta).flip(0)))

    return ends(path, n, start, stop, law)


# --- shapes in t ------------------------------------------------------------------------------------------------------


def linear_quadratic(
    path: Path, n: int, start: float | None = None, stop: float | None = None, threshold: float = 0.025
) -> Tensor:
    """n // 2 equal steps over the first ``threshold`` of the way in t, then the parabola that leaves them with the same
    slope and reaches ``stop`` (Mochi; ComfyUI; LTX-Video). ComfyUI's sigma is t on the ``EDM`` and ``Linear`` paths.
    """
    need(0.0 < threshold < 0.5, "threshold", threshold, "must be in (0, 0.5); Mochi uses 0.025")

    def shape(m: int) -> Tensor:
        half = m // 2
        if half == 0:
            return 1.0 - ramp(m)
        i = torch.arange(m + 1, dtype=torch.float64)
        slope, bow = threshold / half, ((i - half) / (m - half)).clamp(min=0.0)
        return 1.0 - (slope * i + (1.0 - slope * m) * bow**2)

    return in_time(path, n, start, stop, shape)


def bong_tangent(
    path: Path,
    n: int,
    start: float | None = None,
    stop: float | None = None,
    pivot: float = 0.6,
    slope: float = 0.2,
    middle: float = 0.5,
) -> Tensor:
    """Two arctangents in t, from 1 to ``middle`` and on to 0, each steepest at ``pivot`` of all steps (RES4LYF).

    As released, it divides by 0 at one step, and it is in absolute sigma from 1 to 0, whatever the model's: a flow model's
    range, which is the only one it is right for. Here it goes from ``start`` to ``stop``, and one step is one step.
    """
    need(0.0 < pivot < 1.0, "pivot", pivot, "must be in (0, 1); RES4LYF uses 0.6")
    need(0.0 < slope < math.inf, "slope", slope, "must be > 0 and finite; RES4LYF uses 0.2")
    need(0.0 < middle < 1.0, "middle", middle, "must be in (0, 1); RES4LYF uses 0.5")

    def piece(points: int, knee: int, bend: float, first: float, last: float) -> Tensor:
        curve = -torch.atan(bend * (torch.arange(points, dtype=torch.float64) - knee))
        return last + (first - last) * (curve - curve[-1]) / (curve[0] - curve[-1])

    def shape(m: int) -> Tensor:
        points = m + 2
        knee, bend = int(points * pivot), slope * 40.0 / points
        if not 2 <= knee <= points - 2:  # a piece of one point has no slope
            return 1.0 - ramp(m)
        return torch.cat([piece(knee, knee, bend, 1.0, middle)[:-1], piece(points - knee, 0, bend, middle, 0.0)])

    return in_time(path, n, start, stop, shape)


def hyper(path: Path, n: int, start: float | None = None, stop: float | None = None, scale: float = 2.0) -> Tensor:
    """tanh(x / sqrt 2) for equal steps of x from ``scale`` to -scale, stretched to both ends in t: small steps at both ends
    (skrample's 'Hyper'). With scale < 0, sinh(x): small steps in the middle.
    """
    need(0.0 < abs(scale) <= 20.0, "scale", scale, "must not be 0, and at most 20 in size; skrample uses 2")
    curve = torch.sinh if scale < 0.0 else (lambda x: torch.tanh(x / math.sqrt(2.0)))

    def shape(m: int) -> Tensor:
        y = curve(scale * (1.0 - 2.0 * ramp(m)))
        return 0.5 * (1.0 + y / y[0])

    return in_time(path, n, start, stop, shape)


# --- other grids, changed ---------------------------------------------------------------------------------------------


def flow_shift(
    path: Path,
    n: int,
    start: float | None = None,
    stop: float | None = None,
    shift: float = 3.0,
    grid: Any = "uniform",
) -> Tensor:
    """Any grid with its times u = t/T moved to shift u / (1 + (shift - 1) u) (Esser et al. 2024, eq. 23: SD3 uses 3, Flux
    exp(mu) with mu by the size of the image). On the ``Linear`` path lambda moves by -log(shift).

    ``grid`` (a name or a function) is made between the times that move to ``start`` and ``stop``, so that these are exact.
    """
    need(0.0 < shift < math.inf, "shift", shift, "must be > 0 and finite; 1 changes nothing, SD3 uses 3")
    move = lambda t, s: s * t / (1.0 + (s - 1.0) * t / path.T)  # noqa: E731
    last = path.t_min if stop is None else stop
    before = [None if t is None else min(path.T, move(t, 1.0 / shift)) for t in (start, last)]
    times = make_grid(grid, path, n, *before)
    first = path.T if float(times[0]) == path.T else float(move(times[0], shift))
    return exact(move(times, shift), first if start is None else float(start), float(last))


def from_sigmas(levels: Any, name: str = "from_sigmas", *, stretch: bool = False) -> Grid:
    """The grid of an explicit list of falling noise levels sigma/alpha > 0; other numbers of steps by interpolation linear
    in log sigma (what Align Your Steps does with its tables).

    Where ``start`` and ``stop`` are not given the grid's ends are the list's own, as far as the path reaches, or, with
    ``stretch``, the path's. Other ends stretch the whole list, affinely in lambda. Levels of 0 are not part of a list: with
    sigma(stop) = 0 the last step goes from the lowest level to 0.
    """
    table = torch.as_tensor(levels, dtype=torch.float64).detach().cpu()
    need(table.dim() == 1 and len(table) >= 2, "levels", levels, "give a 1-D list of at least 2 noise levels")
    bad = ~((table > 0.0) & table.isfinite())
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise InputError(
            f"levels[{i}]={float(table[i]):g}: must be finite and > 0; for a last step to 0, drop it and give stop=0.0"
        )
    rising = table[1:] >= table[:-1]
    if bool(rising.any()):
        i = int(rising.nonzero()[0])
        raise InputError(f"levels[{i + 1}]={float(table[i + 1]):g} after levels[{i}]={float(table[i]):g}: must fall strictly")
    lams = -torch.log(table)
    own = (float(lams[0]), float(lams[-1]))

    def law(path: Path, first: float, last: float, m: int) -> Tensor:
        place = torch.linspace(0, len(table) - 1, m + 1, dtype=torch.float64)
        low = place.floor().clamp(max=len(table) - 2).long()
        lam = lams[low] + (place - low) * (lams[low + 1] - lams[low])
        return path.time(first + (lam - own[0]) * ((last - first) / (own[1] - own[0])))

    def grid(path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
        def between(a: float, b: float, m: int) -> Tensor:
            return law(path, float(path.lam(a)), float(path.lam(b)), m)

        if stretch:
            return ends(path, n, start, stop, between)
        reach = (max(own[0], float(path.lam(path.T))), min(own[1], float(path.lam(0.0))))
        if not reach[0] < reach[1]:
            raise InputError(
                f"{name} covers sigma/alpha from {float(table[-1]):g} to {float(table[0]):g}, which {path} does not reach "
                f"({math.exp(-float(path.lam(0.0))):g}, {math.exp(-float(path.lam(path.T))):g})"
            )
        a, b = (float(path.time(lam)) for lam in reach)
        return ends(path, n, a if start is None else start, b if stop is None else stop, between, zero=b)

    grid.__name__ = name
    grid.__doc__ = f"The noise levels {tuple(table.tolist())}, interpolated linearly in log sigma for other n."
    return grid


#: Align Your Steps (Sabour, Fidler & Kreis 2024): the noise levels sigma/alpha published for ten steps, data of the paper's
#: quick-start page. Released code (diffusers, ComfyUI) writes 0 over the last of them, so that it is never visited.
AYS_TABLES = {
    "ays_sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
#: GITS (Chen et al. 2024): the noise levels published for iPNDM on CIFAR-10 at six steps.
GITS_TABLE = (80.0, 10.9836, 3.8811, 1.584, 0.5666, 0.1698, 0.002)

GRIDS: dict[str, Grid] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "karras": karras,
    "log_snr": log_snr,
    "cosine": cosine,
    "poly_exponential": poly_exponential,
    "gaussian_optimal": gaussian_optimal,
    "vp": vp,
    "laplace": laplace,
    "probit": probit,
    "beta": beta,
    "beta57": partial(beta, alpha=0.5, beta=0.7),
    "beta_sigma": beta_sigma,
    "linear_quadratic": linear_quadratic,
    "bong_tangent": bong_tangent,
    "hyper": hyper,
    "flow_shift": flow_shift,
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "normal": normal,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "ddim_uniform": partial(leading, offset=1),
    "turbo": turbo,
    "gits": from_sigmas(GITS_TABLE, "gits", stretch=True),
    **{name: from_sigmas(table, name) for name, table in AYS_TABLES.items()},
    # the same under the field's other names
    "time_uniform": uniform,
    "time_quadratic": quadratic,
    "polynomial": karras,
    "exponential": log_snr,
    "kl_optimal": cosine,
}


def make_grid(grid: Any, path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
    """The times of a grid given by name, function, or as the times themselves."""
    if isinstance(grid, str):
        if grid not in GRIDS:
            raise InputError(f"grid={grid!r} is unknown: {nearest(grid, GRIDS)}")
        return GRIDS[grid](path, n, start, stop)
    if callable(grid):
        try:
            times = torch.as_tensor(grid(path, n, start, stop), dtype=torch.float64)
        except ToolkitError:
            raise
        except Exception as error:
            raise InputError(
                f"grid(path, {n}, start, stop) raised {type(error).__name__}: {str(error)[:150]}; "
                f"give a function of (path, n, start, stop) that returns {n + 1} decreasing times"
            ) from error
        if times.shape != (n + 1,) or not bool((times[1:] < times[:-1]).all() | times.isnan().any()):
            raise InputError(f"grid(path, {n}, start, stop) gave shape {tuple(times.shape)}: return {n + 1} decreasing times")
        return times
    raise InputError(
        f"grid={grid!r}: give a name of GRIDS or a function (path, n, start, stop) -> times; for explicit times use integrate"
    )
