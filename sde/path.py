"""Noise paths: the pair (alpha_t, sigma_t) of x_t = alpha_t x_0 + sigma_t eps, with t = 0 data and t = T noise.

Everything else follows from the pair and its slopes:

    lambda = log(alpha / sigma)                        half log signal-to-noise ratio, decreasing in t
    f      = alpha' / alpha                            of the forward SDE dx = f x dt + g dw
    g^2    = 2 sigma sigma' - 2 f sigma^2              = -2 sigma^2 lambda'

A path implements six functions of a float64 tensor; the public methods take a number or a tensor of any shape and return a
tensor of the same shape and dtype (numbers and integers as float64, half precision as float32 with a warning), computed in
float64. Values at the ends are exact where the limit exists and infinite where it is infinite (sigma'(0) of VP, f(T) where
alpha_T = 0). Arguments are never written to, and gradients flow through t.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, PathError, PrecisionWarning, check_numbers
from .prediction import Knot


class Path(ABC):
    """A noise path on [0, T].

    Implement ``_alpha``, ``_sigma``, ``_dalpha``, ``_dsigma``, ``_g2`` and ``_time`` on float64 tensors. ``t_min`` is where
    sample grids stop unless told otherwise: the network knows nothing below it, and lambda is still finite.
    """

    T: float = 1.0
    t_min: float = 1e-3

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _dalpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _dsigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _g2(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _time(self, lam: Tensor) -> Tensor: ...

    def alpha(self, t: Any) -> Tensor:
        """alpha_t, the factor of the data."""
        return _in_float64(self._alpha, t)

    def sigma(self, t: Any) -> Tensor:
        """sigma_t, the standard deviation of the noise."""
        return _in_float64(self._sigma, t)

    def dalpha(self, t: Any) -> Tensor:
        """d alpha / dt."""
        return _in_float64(self._dalpha, t)

    def dsigma(self, t: Any) -> Tensor:
        """d sigma / dt."""
        return _in_float64(self._dsigma, t)

    def lam(self, t: Any) -> Tensor:
        """log(alpha_t / sigma_t): +inf where sigma = 0, -inf where alpha = 0."""
        return _in_float64(self._lam, t)

    def dlam(self, t: Any) -> Tensor:
        """d lambda / dt = -g^2 / (2 sigma^2), negative."""
        return _in_float64(self._dlam, t)

    def time(self, lam: Any) -> Tensor:
        """The time with this lambda: the inverse of ``lam``, clamped to [0, T]."""
        return _in_float64(lambda lam: self._time(lam).clamp(0.0, self.T), lam)

    def f(self, t: Any) -> Tensor:
        """f = alpha' / alpha of the forward SDE dx = f x dt + g dw."""
        return _in_float64(self._f, t)

    def g2(self, t: Any) -> Tensor:
        """g^2 of the forward SDE."""
        return _in_float64(self._g2, t)

    def g(self, t: Any) -> Tensor:
        """g of the forward SDE."""
        return _in_float64(lambda t: torch.sqrt(self._g2(t)), t)

    def prior_std(self, t: Any = None) -> float:
        """Standard deviation of the Gaussian that sampling starts from at time t (default T).

        1 where alpha^2 + sigma^2 = 1, else sigma_t.
        """
        knot = self.knot(self.T if t is None else t)
        return 1.0 if abs(knot.alpha**2 + knot.sigma**2 - 1.0) < 1e-9 else knot.sigma

    def _lam(self, t: Tensor) -> Tensor:
        return torch.log(self._alpha(t)) - torch.log(self._sigma(t))

    def _f(self, t: Tensor) -> Tensor:
        alpha = self._alpha(t)  # log alpha falls to -inf where alpha = 0, whatever alpha' is there
        return torch.where(alpha == 0.0, -math.inf, self._dalpha(t) / alpha)

    def _dlam(self, t: Tensor) -> Tensor:
        # f - sigma'/sigma and not -g^2 / (2 sigma^2): the latter is 0/0 at sigma = 0 of EDM and Linear
        sigma = self._sigma(t)
        return torch.where(sigma == 0.0, -math.inf, self._f(t) - self._dsigma(t) / sigma)

    def knot(self, t: Any) -> Knot:
        """The path's values at one time, as Python floats."""
        return self.knots([float(t)])[0]

    def knot_at(self, lam: float) -> Knot:
        """The knot with this lambda."""
        return self.knot(self.time(float(lam)))

    def knots(self, times: Sequence[float] | Tensor, *, grid: bool = False) -> list[Knot]:
        """The path's values at several times; with ``grid`` the knots know their place (index, count)."""
        t = _as_float64(times).to("cpu")
        if t.dim() != 1:
            raise InputError(f"times has shape {tuple(t.shape)}: give a 1-D sequence of times")
        listed = t.tolist()
        check_inside(self, t)
        columns = [self._column(name, t) for name in ("alpha", "sigma", "lam", "dalpha", "dsigma", "g2")]
        if t.tolist() != listed:
            raise PathError(f"{self} wrote to the times it was given: its functions must return new tensors")
        last = len(t) - 1
        rows = zip(listed, *columns, strict=True)
        places = [(i, last) if grid else (-1, -1) for i in range(len(t))]
        knots = [Knot(*row, index=i, count=n) for row, (i, n) in zip(rows, places, strict=True)]
        for k in knots:
            if not (k.alpha >= 0.0 and k.sigma >= 0.0 and k.alpha + k.sigma > 0.0 and math.isfinite(k.alpha + k.sigma)):
                raise PathError(
                    f"{self}: alpha({k.t:g}) = {k.alpha:g}, sigma({k.t:g}) = {k.sigma:g}: "
                    "both must be finite and >= 0, and not both 0"
                )
        return knots

    def _column(self, name: str, t: Tensor) -> list[float]:
        """One of the path's functions at times (n,), whose class may be the user's own."""
        try:
            value = getattr(self, f"_{name}")(t)
        except InputError:
            raise
        except Exception as error:
            raise PathError(f"{self}: {name}(t) raised {type(error).__name__}: {str(error)[:150]}") from error
        if not isinstance(value, Tensor) or value.shape != t.shape or not value.is_floating_point():
            found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PathError(f"{self}: {name}(t) is a {found} for float64 times of shape {tuple(t.shape)}: return the like")
        return value.tolist()


def check_inside(path: Path, t: Tensor) -> None:
    """InputError where one of the times t is not in [0, T]."""
    outside = ~((t >= 0.0) & (t <= path.T))
    if bool(outside.any()):
        raise InputError(f"time {float(t[outside][0]):g} is outside the domain [0, {path.T:g}] of {path}: give times in it")


def _as_float64(t: Any) -> Tensor:
    """t as a float64 tensor; half precision, which cannot tell neighbouring times apart, is taken with a warning."""
    if isinstance(t, Tensor) and t.dtype in _HALF:
        warnings.warn(
            f"a time or lambda in {t.dtype} keeps 3 digits at most: give float32 or float64 (float32 is returned here)",
            PrecisionWarning,
            stacklevel=4,
        )
    return torch.as_tensor(t, dtype=torch.float64)


_HALF = (torch.float16, torch.bfloat16)


def _in_float64(fn: Callable[[Tensor], Tensor], t: Any) -> Tensor:
    """fn in float64, back in the dtype of t; numbers and integer tensors give float64, half precision float32."""
    out = fn(_as_float64(t))
    if not isinstance(t, Tensor) or not t.dtype.is_floating_point:
        return out
    return out.to(torch.float32 if t.dtype in _HALF else t.dtype)


def _need(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise InputError(f"{name} = {value!r}: {wanted}")


def _check_domain(T: float, t_min: float) -> None:
    check_numbers(T=T, t_min=t_min)
    _need(0.0 < T < math.inf, "T", T, "the time of pure noise must be positive and finite, e.g. T=1.0")
    _need(0.0 <= t_min < T, "t_min", t_min, f"must be in [0, T) = [0, {T:g}), e.g. t_min={1e-3 * T:g}")


# alpha^2 = 1/(1 + exp(-2 lambda)) where alpha^2 + sigma^2 = 1: both halves, and the rate -2 log alpha, without cancellation.


def _unit_alpha(lam: Tensor) -> Tensor:
    return torch.sqrt(torch.sigmoid(2.0 * lam))


def _unit_sigma(lam: Tensor) -> Tensor:
    return torch.sqrt(torch.sigmoid(-2.0 * lam))


def _unit_rate(lam: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-2.0 * lam, threshold=700.0)  # -2 log alpha = log(1 + exp(-2 lambda))


@dataclass(frozen=True)
class _LinearBeta:
    """beta(t) = beta_min + (beta_max - beta_min) t and its integral, the rate -2 log alpha; shared by VP and SubVP."""

    beta_min: float
    beta_max: float

    def __post_init__(self) -> None:
        check_numbers(beta_min=self.beta_min, beta_max=self.beta_max)
        _need(0.0 < self.beta_min < math.inf, "beta_min", self.beta_min, "must be positive and finite, e.g. beta_min=0.1")
        wanted = f"must be finite and at least beta_min = {self.beta_min!r}, e.g. beta_max=20.0"
        _need(self.beta_min <= self.beta_max < math.inf, "beta_max", self.beta_max, wanted)

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def rate(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def time(self, rate: Tensor) -> Tensor:
        rate = rate.clamp(max=0.5 * (self.beta_min + self.beta_max))  # the rate at t = 1: keeps lambda = -inf off inf / inf
        slope = self.beta_max - self.beta_min
        return 2.0 * rate / (self.beta_min + torch.sqrt(self.beta_min**2 + 2.0 * slope * rate))


@dataclass(frozen=True)
class VP(Path):
    """Variance preserving with linear beta (Song et al. 2021, eq. 32).

    d log alpha / dt = -beta(t)/2 with beta = beta_min + (beta_max - beta_min) t, and sigma^2 = 1 - alpha^2.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        _LinearBeta(self.beta_min, self.beta_max)

    @cached_property
    def _linear(self) -> _LinearBeta:
        return _LinearBeta(self.beta_min, self.beta_max)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._linear.rate(t))

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._linear.rate(t)))

    def _dalpha(self, t: Tensor) -> Tensor:
        return -0.5 * self._linear.beta(t) * self._alpha(t)

    def _dsigma(self, t: Tensor) -> Tensor:
        return 0.5 * self._linear.beta(t) * self._alpha(t) ** 2 / self._sigma(t)

    def _g2(self, t: Tensor) -> Tensor:
        return self._linear.beta(t)

    def _time(self, lam: Tensor) -> Tensor:
        return self._linear.time(_unit_rate(lam))


@dataclass(frozen=True)
class SubVP(Path):
    """Sub-variance preserving (Song et al. 2021, eq. 29): alpha of VP, sigma = 1 - alpha^2, g^2 = beta (1 - alpha^4)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        _LinearBeta(self.beta_min, self.beta_max)

    @cached_property
    def _linear(self) -> _LinearBeta:
        return _LinearBeta(self.beta_min, self.beta_max)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._linear.rate(t))

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._linear.rate(t))

    def _dalpha(self, t: Tensor) -> Tensor:
        return -0.5 * self._linear.beta(t) * self._alpha(t)

    def _dsigma(self, t: Tensor) -> Tensor:
        return self._linear.beta(t) * self._alpha(t) ** 2

    def _g2(self, t: Tensor) -> Tensor:
        return -self._linear.beta(t) * torch.expm1(-2.0 * self._linear.rate(t))

    def _time(self, lam: Tensor) -> Tensor:
        # With r = exp(lambda), r alpha^2 + alpha - r = 0: alpha = 2 r / (1 + root), sigma = 2 / (1 + root), root = |(1, 2 r)|.
        root = torch.hypot(torch.ones_like(lam), 2.0 * torch.exp(lam))
        near_data = -torch.log1p(
            -2.0 / (1.0 + root.clamp(min=2.0))
        )  # -log(1 - sigma); the clamp only keeps the other branch finite
        near_noise = 2.0 * (torch.log(0.5 * (1.0 + root)) - lam)  # -2 log alpha
        return self._linear.time(torch.where(lam > 0.0, near_data, near_noise))


@dataclass(frozen=True)
class Cosine(Path):
    """alpha = cos(pi/2 (t + s)/(1 + s)) / cos(pi/2 s/(1 + s)), sigma^2 = 1 - alpha^2 (Nichol & Dhariwal 2021, eq. 17).

    Written with sines, so that alpha(1) = 0 exactly and sigma keeps all its digits near t = 0: with the angles c of t = 0 and u
    of the time that is left, cos(pi/2 (t + s)/(1 + s)) = sin(u) and cos^2(c) - sin^2(u) = cos(u - c) cos(u + c). The original
    has no t where alpha = 0 because it stops at the last table entry; see ``Tabulated.squared_cosine`` for that table.
    """

    s: float = 0.008

    def __post_init__(self) -> None:
        check_numbers(s=self.s)
        _need(0.0 < self.s < math.inf, "s", self.s, "must be positive and finite, e.g. s=0.008 (s = 0 is Trigonometric())")

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1.0 + self.s)  # d angle / dt, and the angle u that is left at t = 0

    @property
    def _c(self) -> float:
        return self._rate * self.s

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin(self._rate * (1.0 - t)) / math.cos(self._c)

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.sin(self._rate * (t + 2.0 * self.s)) * torch.sin(self._rate * t)) / math.cos(self._c)

    def _dalpha(self, t: Tensor) -> Tensor:
        return -self._rate * torch.cos(self._rate * (1.0 - t)) / math.cos(self._c)

    def _dsigma(self, t: Tensor) -> Tensor:
        return -self._alpha(t) * self._dalpha(t) / self._sigma(t)

    def _g2(self, t: Tensor) -> Tensor:
        return 2.0 * self._rate / torch.tan(self._rate * (1.0 - t))

    def _time(self, lam: Tensor) -> Tensor:
        alpha, sigma = _unit_alpha(lam) * math.cos(self._c), _unit_sigma(lam) * math.cos(self._c)
        angle = torch.atan2(torch.sqrt(sigma**2 + math.sin(self._c) ** 2), alpha)  # of t, from sin^2 and cos^2
        near_data = torch.asin((sigma**2 / torch.sin(angle + self._c)).clamp(max=1.0)) / self._rate
        return torch.where(lam > 0.0, near_data, 1.0 - torch.asin(alpha) / self._rate)


@dataclass(frozen=True)
class Trigonometric(Path):
    """alpha = cos(pi t/2), sigma = sin(pi t/2) (Albergo & Vanden-Eijnden 2023; TrigFlow), with alpha(1) = 0 exactly."""

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1.0 - t))

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def _dalpha(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * self._sigma(t)

    def _dsigma(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self._alpha(t)

    def _g2(self, t: Tensor) -> Tensor:
        return math.pi * self._sigma(t) / self._alpha(t)

    def _time(self, lam: Tensor) -> Tensor:
        return torch.atan2(_unit_sigma(lam), _unit_alpha(lam)) * (2.0 / math.pi)


@dataclass(frozen=True)
class VE(Path):
    """Variance exploding (Song et al. 2021, eq. 30): alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t, never 0."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    t_min = 0.0  # lambda is finite on all of [0, 1]

    def __post_init__(self) -> None:
        check_numbers(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        _need(0.0 < self.sigma_min < math.inf, "sigma_min", self.sigma_min, "must be positive and finite, e.g. sigma_min=0.01")
        wanted = f"must be finite and above sigma_min = {self.sigma_min!r}, e.g. sigma_max=50.0"
        _need(self.sigma_min < self.sigma_max < math.inf, "sigma_max", self.sigma_max, wanted)

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._rate * t)

    def _dalpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _dsigma(self, t: Tensor) -> Tensor:
        return self._rate * self._sigma(t)

    def _g2(self, t: Tensor) -> Tensor:
        return 2.0 * self._rate * self._sigma(t) ** 2

    def _time(self, lam: Tensor) -> Tensor:
        return -(lam + math.log(self.sigma_min)) / self._rate


@dataclass(frozen=True)
class EDM(Path):
    """alpha = 1, sigma = t (Karras et al. 2022); T is their sigma_max, t_min their sigma_min."""

    T: float = 80.0
    t_min: float = 0.002

    def __post_init__(self) -> None:
        _check_domain(self.T, self.t_min)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _dalpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _g2(self, t: Tensor) -> Tensor:
        return 2.0 * t

    def _time(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)


@dataclass(frozen=True)
class Linear(Path):
    """alpha = 1 - t, sigma = t: rectified flow, flow matching (Lipman et al. 2023; Liu et al. 2023)."""

    def _alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def _dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _g2(self, t: Tensor) -> Tensor:
        return 2.0 * t / (1.0 - t)

    def _time(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)


@dataclass(frozen=True, repr=False)
class Tabulated(Path):
    """Any table of betas (Ho et al. 2020): alpha_k^2 = prod_{j <= k} (1 - beta_j), sigma^2 = 1 - alpha^2.

    Convention: entry k of N sits at t_k = (k + 1)/N, and t = 0 is clean data, alpha = 1. Between entries log alpha is linear in
    t, as in DPM-Solver (Lu et al. 2022), whose code differs below the first entry: it extends the first interval's line instead
    of reaching alpha = 1 at t = 0. So g^2 is constant on each interval, and at an entry it is that of the interval above.

    ``zero_terminal_snr`` shifts and scales the table of alpha so that its last entry is 0 and its first is kept (Lin et al.
    2024, algorithm 1). A table that ends with beta = 1 has alpha(1) = 0 exactly; in its last interval alpha itself is linear.

    After construction ``betas`` is the table in use (rescaled if asked), ``zero_terminal_snr`` whether it ends at alpha = 0,
    and ``t_min`` the time of the first entry.
    """

    betas: tuple[float, ...]
    zero_terminal_snr: bool = False
    _rates: Tensor = field(init=False, compare=False)  # -2 log alpha at t = 0, t_0, t_1, ...; without an infinite last one

    def __post_init__(self) -> None:
        betas = _as_float64(self.betas).detach().cpu()
        _need(betas.dim() == 1 and len(betas) >= 2, "betas", tuple(betas.shape), "give a 1-D table of at least 2 betas")
        bad = ~((betas > 0.0) & (betas <= 1.0))
        bad[:-1] |= betas[:-1] == 1.0
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            raise InputError(f"betas[{k}] = {float(betas[k]):g}: every beta must be in (0, 1), and only the last may be 1")
        if self.zero_terminal_snr and not bool(betas[-1] == 1.0):
            betas = _betas_of(_zero_terminal(torch.cumprod(1.0 - betas, 0)))
        ends_at_zero = bool(betas[-1] == 1.0)
        logs = torch.log1p(-betas[:-1] if ends_at_zero else -betas)
        rates = torch.cat([torch.zeros(1, dtype=torch.float64), -torch.cumsum(logs, 0)])
        if not float(rates[-1]) < 1400.0:
            raise InputError(
                f"betas: their product underflows (alpha = exp(-{0.5 * float(rates[-1]):.0f})): give smaller betas"
            )
        object.__setattr__(self, "betas", tuple(betas.tolist()))
        object.__setattr__(self, "zero_terminal_snr", ends_at_zero)
        object.__setattr__(self, "_rates", rates)
        object.__setattr__(self, "t_min", 1.0 / len(betas))  # the network knows nothing below its first entry

    def __repr__(self) -> str:
        zero = ", zero_terminal_snr=True" if self.zero_terminal_snr else ""
        return f"Tabulated({len(self.betas)} betas {self.betas[0]:.3g}..{self.betas[-1]:.3g}{zero})"

    @classmethod
    def linear(
        cls, n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, *, zero_terminal_snr: bool = False
    ) -> Tabulated:
        """beta linear in k (Ho et al. 2020)."""
        _check_count(n)
        check_numbers(beta_start=beta_start, beta_end=beta_end)
        return cls(_table(torch.linspace(beta_start, beta_end, n, dtype=torch.float64)), zero_terminal_snr)

    @classmethod
    def scaled_linear(
        cls, n: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, *, zero_terminal_snr: bool = False
    ) -> Tabulated:
        """sqrt(beta) linear in k (Rombach et al. 2022, Stable Diffusion)."""
        _check_count(n)
        check_numbers(beta_start=beta_start, beta_end=beta_end)
        _need(beta_start > 0.0, "beta_start", beta_start, "must be in (0, 1), e.g. 0.00085")
        _need(beta_end > 0.0, "beta_end", beta_end, "must be in (0, 1), e.g. 0.012")
        root = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), n, dtype=torch.float64)
        return cls(_table(root**2), zero_terminal_snr)

    @classmethod
    def squared_cosine(cls, n: int = 1000, max_beta: float = 0.999, *, zero_terminal_snr: bool = False) -> Tabulated:
        """1 - beta_k = cos^2 at (k + 1)/n over cos^2 at k/n, beta capped (Nichol & Dhariwal 2021; "squaredcos_cap_v2")."""
        _check_count(n)
        check_numbers(max_beta=max_beta)
        _need(0.0 < max_beta <= 1.0, "max_beta", max_beta, "must be in (0, 1], e.g. 0.999")
        grid = torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)
        square = Cosine().alpha(grid) ** 2
        return cls(_table((1.0 - square[1:] / square[:-1]).clamp(max=max_beta)), zero_terminal_snr)

    @classmethod
    def sigmoid(
        cls, n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, *, zero_terminal_snr: bool = False
    ) -> Tabulated:
        """beta_k = beta_start + (beta_end - beta_start) s_k, s_k the logistic function on n points of [-6, 6] (GeoDiff)."""
        _check_count(n)
        ramp = torch.sigmoid(torch.linspace(-6.0, 6.0, n, dtype=torch.float64))
        return cls(_table(beta_start + (beta_end - beta_start) * ramp), zero_terminal_snr)

    @classmethod
    def from_alpha_bar(
        cls, alpha_bar: Callable[[float], float], n: int = 1000, max_beta: float = 0.999, *, zero_terminal_snr: bool = False
    ) -> Tabulated:
        """1 - beta_k = alpha_bar((k + 1)/n) / alpha_bar(k/n), beta capped; alpha_bar a function of [0, 1]: alpha^2."""
        _check_count(n)
        levels = torch.tensor([alpha_bar(k / n) for k in range(n + 1)], dtype=torch.float64)
        return cls(_table((1.0 - levels[1:] / levels[:-1]).clamp(max=max_beta)), zero_terminal_snr)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Sequence[float] | Tensor, *, zero_terminal_snr: bool = False) -> Tabulated:
        """From the products alpha_k^2, decreasing from below 1; the last may be 0."""
        table = _as_float64(alphas_cumprod).detach().cpu()
        _need(
            table.dim() == 1 and len(table) >= 2, "alphas_cumprod", tuple(table.shape), "give a 1-D table of at least 2 entries"
        )
        before = torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
        bad = ~((table < before) & (table >= 0.0))
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            raise InputError(
                f"alphas_cumprod[{k}] = {float(table[k]):g} after {float(before[k]):g}: "
                "the table must decrease strictly, from below 1 and not below 0"
            )
        return cls(_table(_betas_of(table)), zero_terminal_snr)

    @property
    def alphas_cumprod(self) -> Tensor:
        """The table of alpha^2, float64, one entry a beta."""
        table = torch.exp(-self._rates[1:])
        return torch.cat([table, torch.zeros(1, dtype=torch.float64)]) if self.zero_terminal_snr else table

    def index(self, t: Any) -> Tensor:
        """The table index N t - 1 of a time: whole at the entries, -1 at t = 0."""
        return _in_float64(lambda t: len(self.betas) * t - 1.0, t)

    def time_of(self, index: Any) -> Tensor:
        """The time (index + 1)/N of a table index, whole or not."""
        return _in_float64(lambda k: (k + 1.0) / len(self.betas), index)

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(where in the interval, rate at its start, its increase, is it the last one down to alpha = 0)."""
        n, rates = len(self.betas), self._rates.to(t.device)
        position = t * n
        # An entry's time times N may be an ulp short of whole: the entry starts its interval all the same.
        i = torch.floor(position.detach() * (1.0 + 1e-15)).clamp(0, n - 1).long()
        to_zero = i >= len(rates) - 1
        j = i.clamp(max=len(rates) - 2)
        return position - i, torch.where(to_zero, rates[-1], rates[j]), rates[j + 1] - rates[j], to_zero

    def _alpha(self, t: Tensor) -> Tensor:
        w, rate, step, to_zero = self._interval(t)
        return torch.exp(-0.5 * torch.where(to_zero, rate, rate + w * step)) * torch.where(to_zero, 1.0 - w, 1.0)

    def _sigma(self, t: Tensor) -> Tensor:
        w, rate, step, to_zero = self._interval(t)
        return torch.sqrt(torch.where(to_zero, 1.0 - self._alpha(t) ** 2, -torch.expm1(-(rate + w * step))))

    def _dalpha(self, t: Tensor) -> Tensor:
        w, rate, step, to_zero = self._interval(t)
        n = len(self.betas)
        return torch.where(to_zero, -n * torch.exp(-0.5 * rate), -0.5 * n * step * torch.exp(-0.5 * (rate + w * step)))

    def _dsigma(self, t: Tensor) -> Tensor:
        return -self._alpha(t) * self._dalpha(t) / self._sigma(t)

    def _g2(self, t: Tensor) -> Tensor:
        w, _, step, to_zero = self._interval(t)
        n = len(self.betas)
        return torch.where(to_zero, 2.0 * n / torch.where(to_zero, 1.0 - w, 1.0), n * step)

    def _time(self, lam: Tensor) -> Tensor:
        n, rates = len(self.betas), self._rates.to(lam.device)
        rate = _unit_rate(lam).clamp(max=float(rates[-1]))
        j = (torch.searchsorted(rates, rate.detach().contiguous(), right=True) - 1).clamp(0, len(rates) - 2)
        t = (j + (rate - rates[j]) / (rates[j + 1] - rates[j])) / n
        if not self.zero_terminal_snr:
            return t
        left = _unit_alpha(lam) * math.exp(0.5 * float(rates[-1])) / n  # alpha over its slope
        return torch.where(_unit_rate(lam) > rates[-1], 1.0 - left, t)


def _laplace(t: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1.0, 0.5 - t) * math.log(1.0 - 2.0 * abs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1.0 + snr))


#: diffusers' ``beta_schedule`` -> (n, beta_start, beta_end, zero_terminal_snr=) -> table.
BETA_SCHEDULES: dict[str, Callable[..., Tabulated]] = {
    "linear": Tabulated.linear,
    "scaled_linear": Tabulated.scaled_linear,
    "sigmoid": Tabulated.sigmoid,
    "squaredcos_cap_v2": lambda n, start, end, **zero: Tabulated.squared_cosine(n, **zero),
    "exp": lambda n, start, end, **zero: Tabulated.from_alpha_bar(lambda t: math.exp(-12.0 * t), n, **zero),
    "laplace": lambda n, start, end, **zero: Tabulated.from_alpha_bar(_laplace, n, **zero),
}


def _check_count(n: int) -> None:
    _need(isinstance(n, int) and n >= 2, "n", n, "a table has at least 2 betas, e.g. n=1000")


def _table(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


def _betas_of(alphas_cumprod: Tensor) -> Tensor:
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return 1.0 - alphas_cumprod / before


def _zero_terminal(alphas_cumprod: Tensor) -> Tensor:
    """Lin et al. 2024, algorithm 1: alpha shifted so that the last is 0, scaled so that the first is what it was."""
    alpha = torch.sqrt(alphas_cumprod)
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


Schedule = Callable[[Tensor], Tensor]
"""An elementwise function of a float64 tensor of times, of any shape."""


@dataclass(frozen=True, init=False, repr=False)
class FromFunctions(Path):
    """A path from two functions alpha(t), sigma(t) of a float64 tensor, with slopes by autodiff unless they are given.

    The functions work elementwise on any shape, are positive inside (0, T), and lambda = log(alpha / sigma) decreases strictly.
    All of that is checked here, once, on a grid of probes; so is each slope against differences. lambda is inverted by a
    safeguarded Newton iteration on a bracket, to rounding in t (relative to t where t is small).

    Where a slope or g^2 is 0/0 at an end (g^2 of VP at t = 0: sigma' = inf, sigma = 0), its value is that at 1e-12 T from the
    end (at worst 1e-6 T), an approximation of the limit; a slope of sigma that grows without bound towards t = 0 is inf there.
    A time change of another path is a path too: ``FromFunctions(lambda t: path.alpha(phi(t)), lambda t: path.sigma(phi(t)))``.
    """

    alpha_fn: Schedule
    sigma_fn: Schedule
    dalpha_fn: Schedule | None
    dsigma_fn: Schedule | None
    T: float
    t_min: float
    _ranges: tuple[tuple[float, float], ...] = field(init=False, compare=False)  # where dalpha, dsigma, g2 are numbers
    _steep: bool = field(init=False, compare=False)  # is sigma'(0) infinite
    _brackets: tuple[Tensor, Tensor] = field(init=False, compare=False)

    def __init__(
        self,
        alpha: Schedule,
        sigma: Schedule,
        dalpha: Schedule | None = None,
        dsigma: Schedule | None = None,
        T: float = 1.0,
        t_min: float = 1e-3,
    ) -> None:
        _check_domain(T, t_min)
        given = {"alpha": alpha, "sigma": sigma} | {k: v for k, v in (("dalpha", dalpha), ("dsigma", dsigma)) if v is not None}
        for name, fn in given.items():
            _check_schedule(name, fn, T)
        for name, fn in (("alpha", alpha), ("sigma", sigma)):
            if f"d{name}" not in given:
                _check_autodiff(name, fn, T)
        for name, value in (("alpha_fn", alpha), ("sigma_fn", sigma), ("dalpha_fn", dalpha), ("dsigma_fn", dsigma)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "T", float(T))
        object.__setattr__(self, "t_min", float(t_min))
        whole = (0.0, self.T)
        object.__setattr__(self, "_ranges", (whole,) * 3)
        object.__setattr__(self, "_steep", False)
        _check_positive(self)
        slopes = (_number_range("alpha", self._dalpha, whole), _number_range("sigma", self._dsigma, whole))
        object.__setattr__(self, "_ranges", (*slopes, whole))
        _check_slope("alpha", self._alpha, self._dalpha, self.T, given="dalpha" in given)
        _check_slope("sigma", self._sigma, self._dsigma, self.T, given="dsigma" in given)
        # g^2 needs both slopes at the very time it is taken at.
        both = (max(low for low, _ in slopes), min(high for _, high in slopes))
        object.__setattr__(self, "_ranges", (*slopes, _number_range("g^2", self._g2, both)))
        near, further = self._dsigma(torch.tensor([1e-12, 1e-8], dtype=torch.float64) * self.T).tolist()
        object.__setattr__(self, "_steep", slopes[1][0] > 0.0 and near > 10.0 * abs(further))
        _check_decreasing(self)
        object.__setattr__(self, "_brackets", _brackets(self))

    def __repr__(self) -> str:
        return f"FromFunctions({_name(self.alpha_fn)}, {_name(self.sigma_fn)}, T={self.T:g})"

    def _alpha(self, t: Tensor) -> Tensor:
        return self.alpha_fn(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_fn(t)

    def _dalpha(self, t: Tensor) -> Tensor:
        t = t.clamp(*self._ranges[0])
        return _autodiff(self.alpha_fn, t) if self.dalpha_fn is None else self.dalpha_fn(t)

    def _dsigma(self, t: Tensor) -> Tensor:
        u = t.clamp(*self._ranges[1])
        slope = _autodiff(self.sigma_fn, u) if self.dsigma_fn is None else self.dsigma_fn(u)
        return slope.masked_fill(t == 0.0, math.inf) if self._steep else slope

    def _g2(self, t: Tensor) -> Tensor:
        t = t.clamp(*self._ranges[2])
        sigma = self._sigma(t)
        # Rounding may leave a hair below 0 where lambda is nearly flat.
        return (2.0 * sigma * (self._dsigma(t) - self._f(t) * sigma)).clamp(min=0.0)

    def _time(self, lam: Tensor) -> Tensor:
        return _solve_time(self, self._brackets, lam)


@dataclass(frozen=True, init=False, repr=False)
class FromCoefficients(Path):
    """A path from the coefficients of its forward SDE dx = f(t) x dt + g(t) dw, by the moment equations

        (log alpha)' = f,    (sigma^2)' = 2 f sigma^2 + g^2,    alpha(0) = 1,    sigma(0) = sigma0.

    They are integrated once, on panels halved towards t = 0 (sigma stays accurate relative to itself down to t = 1e-9 T and
    below) and split where a polynomial of degree 15 is not enough; in between, values are polynomials of the panel. ``error``
    is the largest relative error of alpha and sigma, estimated by halving all panels. f and g are the given functions; they
    must be finite on all of [0, T], so a path that reaches alpha = 0 needs a smaller T, or ``FromFunctions``.
    """

    f_fn: Schedule
    g_fn: Schedule
    T: float
    sigma0: float
    t_min: float
    error: float = field(init=False, compare=False)
    _panels: _Panels = field(init=False, compare=False)
    _slope_range: tuple[float, float] = field(init=False, compare=False)
    _brackets: tuple[Tensor, Tensor] = field(init=False, compare=False)

    def __init__(self, f: Schedule, g: Schedule, T: float = 1.0, sigma0: float = 0.0, t_min: float = 1e-3) -> None:
        _check_domain(T, t_min)
        check_numbers(sigma0=sigma0)
        _need(0.0 <= sigma0 < math.inf, "sigma0", sigma0, "the noise level at t = 0 must be finite and not negative, e.g. 0.0")
        for name, fn in (("f", f), ("g", g)):
            _check_schedule(name, fn, T)
            for end in (0.0, T):
                value = float(fn(torch.tensor(end, dtype=torch.float64)))
                if not math.isfinite(value):
                    raise PathError(
                        f"{name}({end:g}) = {value}: f and g must be finite on [0, T]; give a smaller T, or FromFunctions"
                    )
        for name, value in (("f_fn", f), ("g_fn", g), ("T", float(T)), ("sigma0", float(sigma0)), ("t_min", float(t_min))):
            object.__setattr__(self, name, value)
        edges = _panel_edges(f, g, self.T)
        panels = _Panels(f, g, edges, self.sigma0)
        halves = _Panels(f, g, torch.sort(torch.cat([edges, 0.5 * (edges[1:] + edges[:-1])])).values, self.sigma0)
        probes = torch.cat([edges[1:], edges[:-1] + 0.37 * (edges[1:] - edges[:-1])])
        (log_alpha, variance), (log_alpha2, variance2) = panels.moments(probes), halves.moments(probes)
        error = torch.maximum((log_alpha - log_alpha2).abs(), 0.5 * (variance / variance2 - 1.0).abs())
        object.__setattr__(self, "_panels", panels)
        object.__setattr__(self, "_slope_range", (0.0, self.T))
        _check_positive(self)
        object.__setattr__(self, "error", float(error.max()))
        object.__setattr__(self, "_slope_range", _number_range("sigma", self._dsigma, (0.0, self.T)))
        _check_decreasing(self)
        object.__setattr__(self, "_brackets", _brackets(self))

    def __repr__(self) -> str:
        return f"FromCoefficients({_name(self.f_fn)}, {_name(self.g_fn)}, T={self.T:g}, sigma0={self.sigma0:g})"

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._panels.moments(t)[0])

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._panels.moments(t)[1])

    def _dalpha(self, t: Tensor) -> Tensor:
        return self.f_fn(t) * self._alpha(t)

    def _dsigma(self, t: Tensor) -> Tensor:
        t = t.clamp(*self._slope_range)  # where sigma and g are both 0 at t = 0, the value at 1e-12 T
        sigma = self._sigma(t)
        return self.f_fn(t) * sigma + 0.5 * self._g2(t) / sigma

    def _g2(self, t: Tensor) -> Tensor:
        return self.g_fn(t) ** 2

    def _time(self, lam: Tensor) -> Tensor:
        return _solve_time(self, self._brackets, lam)


# Below: what the two user-made paths need. Checks first, then the inverse of lambda, then the panels of FromCoefficients.


def _name(fn: object) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _probes(T: float) -> Tensor:
    """Times inside (0, T): even ones, and ones halved towards both ends, down to 1e-6 T from them."""
    halved = 2.0 ** -torch.arange(2.0, 21.0, dtype=torch.float64)
    even = (torch.arange(200, dtype=torch.float64) + 0.5) / 200.0
    return torch.unique(torch.cat([halved, even, 1.0 - halved])) * T


def _check_schedule(name: str, fn: Schedule, T: float) -> None:
    """A function of a float64 tensor that returns one shaped like it and leaves its argument alone."""
    _need(callable(fn), name, fn, "must be a function of a float64 tensor of times, e.g. lambda t: 1 - t")
    for times in (_probes(T), torch.tensor(0.5 * T, dtype=torch.float64)):
        given = times.clone()
        try:
            value: Any = fn(given)
        except Exception as error:
            raise PathError(
                f"{name}(t) raised {type(error).__name__}: {error}; use torch functions that take a tensor of any shape"
            ) from error
        if not torch.equal(given, times):
            raise PathError(f"{name}(t) writes to its argument t: work on a copy, t.clone()")
        if not isinstance(value, Tensor):
            raise PathError(
                f"{name}(t) returned a {type(value).__name__}: return a tensor shaped like t, e.g. torch.full_like(t, 1.0)"
            )
        if value.shape != times.shape:
            raise PathError(
                f"{name}(t) returned shape {tuple(value.shape)} for t of shape {tuple(times.shape)}: "
                "return a tensor shaped like t, e.g. torch.ones_like(t)"
            )
        if value.dtype != torch.float64:
            raise PathError(f"{name}(t) returned {value.dtype} for t in float64: compute in the dtype of t")
        bad = ~value.isfinite()
        if bool(bad.any()):
            raise PathError(f"{name}({float(times[bad][0]):g}) = {float(value[bad][0])}: it must be finite inside (0, {T:g})")


def _check_positive(path: Path) -> None:
    ends = torch.tensor([0.0, path.T], dtype=torch.float64)
    for name, fn in (("alpha", path._alpha), ("sigma", path._sigma)):
        for times, ok, wanted in (
            (_probes(path.T), lambda v: v > 0.0, f"must be positive inside (0, {path.T:g})"),
            (ends, lambda v: v >= 0.0, "must not be negative"),
        ):
            value = fn(times)
            bad = ~(ok(value) & value.isfinite())
            if bool(bad.any()):
                raise PathError(f"{name}({float(times[bad][0]):g}) = {float(value[bad][0]):g}: {wanted} and finite")


def _check_decreasing(path: Path) -> None:
    even = torch.linspace(0.0, path.T, 202, dtype=torch.float64)
    # Near an end rounding may hide the fall of lambda, but not a rise.
    for times, slack in ((even, 0.0), (_probes(path.T), 1e-9)):
        lam = path.lam(times)
        rises = ~(lam[1:] < lam[:-1]) if slack == 0.0 else lam[1:] > lam[:-1] + slack
        if bool(rises.any()):
            i = int(rises.nonzero()[0])
            raise PathError(
                f"lambda = log(alpha/sigma) does not decrease between t = {float(times[i]):g} and t = {float(times[i + 1]):g} "
                f"({float(lam[i]):.6g}, then {float(lam[i + 1]):.6g}): t = 0 is data, t = T is noise, and the noise must grow"
            )


def _number_range(name: str, fn: Schedule, within: tuple[float, float]) -> tuple[float, float]:
    """Where fn is not NaN: ``within``, or a little less at either end."""
    low, high = within
    ends: list[float] = []
    for end, sign in ((low, 1.0), (high, -1.0)):
        inwards = [end + sign * high * step for step in (0.0, 1e-12, 1e-9, 1e-6)]
        usable = [t for t in inwards if not math.isnan(float(fn(torch.tensor(t, dtype=torch.float64))))]
        if not usable:
            raise PathError(f"{name} has no usable slope near t = {end:g}: give dalpha, dsigma")
        ends.append(usable[0])
    return ends[0], ends[1]


def _check_slope(name: str, fn: Schedule, slope: Schedule, T: float, *, given: bool) -> None:
    """The slope must lie between the one-sided differences, which also lets a kink pass."""
    t = (torch.arange(40, dtype=torch.float64) + math.sqrt(0.5)) * (T / 42.0)
    step = 1e-5 * T
    below, here, above = fn(t - step), fn(t), fn(t + step)
    left, right, value = (here - below) / step, (above - here) / step, slope(t)
    slack = 0.5 * (right - left).abs() + 1e-6 * torch.maximum(left.abs(), right.abs()) + 1e-9 * here.abs() / T
    bad = ~((value >= torch.minimum(left, right) - slack) & (value <= torch.maximum(left, right) + slack))
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        rate = 0.5 * float(left[i] + right[i])
        said = f"d{name}({float(t[i]):g}) = {float(value[i]):g}, but {name} changes at the rate {rate:g}"
        fix = "correct it" if given else f"autograd cannot follow {name}; give dalpha, dsigma"
        raise PathError(f"{said}: {fix}")


def _autodiff(fn: Schedule, t: Tensor) -> Tensor:
    """d fn / dt of an elementwise fn; has a graph only where t has one, and works in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        u = t if t.requires_grad else t.detach().clone().requires_grad_()
        y = fn(u)
        if not y.requires_grad:
            return torch.zeros_like(t)
        (slope,) = torch.autograd.grad(y.sum(), u, create_graph=t.requires_grad, allow_unused=True)
    return torch.zeros_like(t) if slope is None else slope


def _check_autodiff(name: str, fn: Schedule, T: float) -> None:
    try:
        _autodiff(fn, _probes(T))
    except Exception as error:
        raise PathError(f"autograd cannot follow {name} ({error}): give dalpha, dsigma") from error


def _brackets(path: Path) -> tuple[Tensor, Tensor]:
    """(times, lambda) that enclose each root within a factor of two in t, and in T - t."""
    halved = 2.0 ** -torch.arange(1.0, 101.0, dtype=torch.float64)
    even = torch.linspace(0.0, 1.0, 65, dtype=torch.float64)
    times = torch.unique(torch.cat([halved, even, 1.0 - halved])) * path.T
    return times, torch.cummin(path.lam(times), 0).values


def _solve_time(path: Path, brackets: tuple[Tensor, Tensor], lam: Tensor) -> Tensor:
    """t with lambda(t) = lam: Newton steps, replaced by bisection where they leave the bracket."""
    times, levels = (column.to(lam.device) for column in brackets)
    with torch.no_grad():
        target = lam.detach().clamp(levels[-1], levels[0])
        above = torch.searchsorted(-levels, -target.contiguous(), right=True).clamp(1, len(times) - 1)
        low, high = times[above - 1], times[above]
        at_start, at_end = target >= levels[0], target <= levels[-1]
        t = 0.5 * (low + high)
        for _ in range(100):
            residual = path._lam(t) - target
            low, high = torch.where(residual >= 0.0, t, low), torch.where(residual <= 0.0, t, high)
            newton = t - residual / path._dlam(t)
            new = torch.where((newton > low) & (newton < high), newton, 0.5 * (low + high))
            step, t = (new - t).abs(), new
            if bool(((step <= 4e-16 * t) | at_start | at_end).all()):
                break
        t = t.masked_fill(at_start, 0.0).masked_fill(at_end, path.T)
    if lam.requires_grad:  # one Newton step has the slope dt/dlam of the inverse
        t = t + torch.where(lam.isfinite(), lam - lam.detach(), 0.0) / path._dlam(t)
    return torch.where(lam.isnan(), lam, t)


_DEGREE = 16  # points a panel, and terms of its polynomials


def _legendre(x: Tensor, count: int) -> Tensor:
    """P_0 ... P_{count - 1} at x, in a new last dimension."""
    columns = [torch.ones_like(x), x]
    for k in range(1, count - 1):
        columns.append(((2 * k + 1) * x * columns[k] - k * columns[k - 1]) / (k + 1))
    return torch.stack(columns[:count], -1)


def _panel_rule(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(nodes on [-1, 1], values at nodes -> Legendre coefficients, Legendre coefficients -> running means at the nodes).

    The running mean of h at x is the integral of h from -1 to x over x + 1, so that a panel's integral up to t is (t - start)
    times a polynomial, accurate relative to itself however near t is to the start.
    """
    nodes = torch.cos(math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    p = _legendre(nodes, n + 1)
    factors = 2.0 * torch.arange(n, dtype=torch.float64) + 1.0
    to_coefficients = torch.linalg.inv(p[:, :n])
    means = torch.ones(n, n, dtype=torch.float64)
    means[:, 1:] = (p[:, 2:] - p[:, :-2]) / (factors[1:] * (nodes[:, None] + 1.0))
    return nodes, to_coefficients, means


def _at_nodes(edges: Tensor, nodes: Tensor) -> Tensor:
    return edges[:-1, None] + 0.5 * (edges[1:] - edges[:-1])[:, None] * (nodes + 1.0)


def _panel_edges(f: Schedule, g: Schedule, T: float, limit: int = 4000) -> Tensor:
    """Panels halved 60 times towards 0, then split until the last Legendre terms of f and g^2 are rounding."""
    nodes, to_coefficients, _ = _panel_rule(_DEGREE)
    halved = 2.0 ** -torch.arange(60.0, -1.0, -1.0, dtype=torch.float64)
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), halved * T])
    for _ in range(30):
        t = _at_nodes(edges, nodes)
        coarse = torch.zeros(len(edges) - 1, dtype=torch.bool)
        for values in (f(t), g(t) ** 2):
            tail = (values @ to_coefficients.T)[:, -2:].abs().amax(1)
            coarse |= tail > 2e-14 * values.abs().amax(1)
        width = edges[1:] - edges[:-1]
        coarse |= width * f(t).abs().amax(1) > 1.0  # alpha may not fall too far within a panel
        coarse &= width > 1e-12 * edges[1:]
        if not bool(coarse.any()) or len(edges) > limit:
            break
        edges = torch.sort(torch.cat([edges, (edges[:-1] + 0.5 * width)[coarse]])).values
    return edges


class _Panels:
    """log alpha and sigma^2 as polynomials on panels."""

    def __init__(self, f: Schedule, g: Schedule, edges: Tensor, sigma0: float) -> None:
        nodes, to_coefficients, means = _panel_rule(_DEGREE)
        t = _at_nodes(edges, nodes)
        width = edges[1:] - edges[:-1]
        mean_f = f(t) @ to_coefficients.T @ means.T  # at the nodes
        # In a panel sigma^2 = (alpha/alpha_start)^2 (sigma_start^2 + int g^2 (alpha_start/alpha)^2): every term is positive.
        mean_h = (g(t) ** 2 * torch.exp(-2.0 * (t - edges[:-1, None]) * mean_f)) @ to_coefficients.T @ means.T
        self._edges = edges
        self._f, self._h = mean_f @ to_coefficients.T, mean_h @ to_coefficients.T
        gains, sources = width * self._f.sum(1), width * self._h.sum(1)  # every P_k(1) = 1
        self._log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(gains, 0)])
        variance = [sigma0**2]
        for gain, source in zip(gains.tolist(), sources.tolist(), strict=True):
            variance.append(math.exp(2.0 * gain) * (variance[-1] + source))
        self._variance = torch.tensor(variance, dtype=torch.float64)

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(log alpha, sigma^2) at t."""
        edges = self._edges.to(t.device)
        i = (torch.searchsorted(edges, t.detach().contiguous(), right=True) - 1).clamp(0, len(edges) - 2)
        since = t - edges[i]
        p = _legendre(2.0 * since / (edges[i + 1] - edges[i]) - 1.0, _DEGREE)
        gain = since * (p * self._f.to(t.device)[i]).sum(-1)
        source = since * (p * self._h.to(t.device)[i]).sum(-1)
        log_alpha, variance = self._log_alpha.to(t.device)[i], self._variance.to(t.device)[i]
        # Where g^2 starts from 0 the first panel's polynomial may cross 0, far below the promised accuracy.
        return log_alpha + gain, torch.exp(2.0 * gain) * (variance + source).clamp(min=0.0)
