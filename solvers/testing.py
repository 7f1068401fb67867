"""What property tests of solvers need, ours and users': hypothesis strategies for noise paths and grids.

Needs hypothesis: ``pip install hypothesis``. Everything drawn is float64 and deterministic given hypothesis' choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sde.path import EDM, VE, VP, Cosine, FromCoefficients, FromFunctions, Linear, Path, SubVP, Tabulated, Trigonometric

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy


def paths(*, user_made: bool = True) -> SearchStrategy[Path]:
    """Noise paths: every built-in family with random constants and, with ``user_made``, random ones made of functions.

    All have alpha > 0 and sigma > 0 inside (0, T); some end at alpha = 0, some start at sigma > 0.
    """
    st = _strategies()
    strategies = [_draw(builder) for builder in (_vp, _sub_vp, _cosine, _ve, _edm, _tabulated)]
    strategies += [st.just(Linear()), st.just(Trigonometric())]
    if user_made:
        strategies += [_draw(builder) for builder in (_from_lambda, _from_powers, _from_time_change, _from_coefficients)]
    return st.one_of(strategies)


def times(path: Path, n: int, *, end: float | None = None) -> SearchStrategy[list[float]]:
    """Grids of n steps: n + 1 strictly decreasing times from ``path.T`` to ``end`` (default ``path.t_min``)."""
    st = _strategies()
    stop = path.t_min if end is None else end

    def grid(weights: list[float]) -> list[float]:
        total, done, out = math.fsum(weights), 0.0, [path.T]
        for weight in weights[:-1]:
            done += weight
            out.append(path.T - (path.T - stop) * done / total)
        return [*out, stop]

    return st.lists(st.floats(0.05, 1.0), min_size=n, max_size=n).map(grid)


def _strategies():
    try:
        import hypothesis.strategies as st
    except ImportError as error:
        raise ImportError("solvers.testing needs hypothesis: pip install hypothesis") from error
    return st


def _draw(builder: Callable[[DrawFn], Path]) -> SearchStrategy[Path]:
    return _strategies().composite(builder)()


def _number(draw: DrawFn, low: float, high: float) -> float:
    return draw(_strategies().floats(low, high))


def _betas(draw: DrawFn) -> tuple[float, float]:
    beta_min = _number(draw, 0.01, 2.0)
    return beta_min, beta_min + draw(_strategies().just(0.0) | _strategies().floats(0.0, 25.0))


def _vp(draw: DrawFn) -> Path:
    return VP(*_betas(draw))


def _sub_vp(draw: DrawFn) -> Path:
    return SubVP(*_betas(draw))


def _cosine(draw: DrawFn) -> Path:
    return Cosine(_number(draw, 1e-4, 0.1))


def _ve(draw: DrawFn) -> Path:
    sigma_min = _number(draw, 1e-3, 0.5)
    return VE(sigma_min, sigma_min * _number(draw, 2.0, 1e4))


def _edm(draw: DrawFn) -> Path:
    return EDM(T=_number(draw, 1.0, 100.0))


def _tabulated(draw: DrawFn) -> Path:
    st = _strategies()
    zero = draw(st.booleans())
    kind = draw(st.sampled_from(["linear", "scaled_linear", "squared_cosine", "any"]))
    if kind == "any":
        return Tabulated(tuple(draw(st.lists(st.floats(1e-3, 0.5), min_size=2, max_size=8))), zero_terminal_snr=zero)
    return getattr(Tabulated, kind)(draw(st.integers(10, 1000)), zero_terminal_snr=zero)


def _from_lambda(draw: DrawFn) -> Path:
    """A random decreasing lambda(t) and a random scale alpha^2 + sigma^2 = exp(2 k t)."""
    a, b, c = _number(draw, -2.0, 2.0), _number(draw, 0.5, 2.0), _number(draw, 0.0, 8.0)
    start, k = _number(draw, 1e-4, 0.1), _number(draw, -1.0, 2.0)

    def lam(t: Tensor) -> Tensor:
        return a - b * torch.log(t + start) - c * t

    def alpha(t: Tensor) -> Tensor:
        return torch.exp(k * t) * torch.sqrt(torch.sigmoid(2.0 * lam(t)))

    def sigma(t: Tensor) -> Tensor:
        return torch.exp(k * t) * torch.sqrt(torch.sigmoid(-2.0 * lam(t)))

    return FromFunctions(alpha, sigma)


def _from_powers(draw: DrawFn) -> Path:
    """alpha = (1 - t)^p, sigma = t^q: ends at alpha = 0, starts at sigma = 0."""
    p, q = _number(draw, 0.6, 3.0), _number(draw, 0.6, 3.0)
    return FromFunctions(lambda t: (1.0 - t) ** p, lambda t: t**q)


def _from_time_change(draw: DrawFn) -> Path:
    """A built-in path at phi(u) = (1 + k) u / (1 + k u), u = t / T."""
    base = draw(_strategies().sampled_from([VP(), SubVP(), Cosine(), Linear(), Trigonometric(), VE()]))
    k, T = _number(draw, -0.7, 3.0), _number(draw, 0.5, 20.0)

    def phi(t: Tensor) -> Tensor:
        return ((1.0 + k) * t / (T + k * t)).clamp(max=1.0)

    return FromFunctions(lambda t: base.alpha(phi(t)), lambda t: base.sigma(phi(t)), T=T)


def _from_coefficients(draw: DrawFn) -> Path:
    a, b = _number(draw, -3.0, 1.0), _number(draw, -3.0, 1.0)
    c, d = _number(draw, 0.1, 3.0), _number(draw, 0.0, 3.0)
    sigma0 = draw(_strategies().sampled_from([0.0, 0.1]))
    return FromCoefficients(lambda t: a + b * t, lambda t: c + d * t * t, sigma0=sigma0)
