"""What is integrated: the forward SDE, the reverse SDE at any noise level eta, and the probability-flow ODE.

All three share the path's marginals p_t. With the score s = grad log p_t = -eps / sigma, in the path's own time t,

    forward     dx = f x dt + g dw                                        t from 0 to T
    flow        dx = (f x - g^2 s / 2) dt        = (alpha' x0 + sigma' eps) dt
    reverse     dx = (f x - (1 + eta^2) g^2 s / 2) dt + eta g dw          dt < 0: t from T down to 0
                   = (alpha' x0 + sigma' eps + eta^2 (sigma' - f sigma) eps) dt + eta g dw

The forms in (x0, eps) are used: where alpha = 0 the flow is finite though f is not. Where sigma = 0 and sigma' is infinite
(VP at t = 0) the form in s takes over. Times are numbers, or tensors of shape () or (B,) for states of shape (B, ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import InputError, is_number
from .path import Path, _as_float64, _in_float64, check_inside
from .prediction import Knot, Prediction, Predictor

Coefficient = Callable[[Tensor], Any]
"""A function of one time, given as a float64 tensor of shape (), to a number or a tensor of shape ()."""


@dataclass(frozen=True)
class ForwardSDE:
    """dx = f x dt + g dw, and its exact Gaussian laws.

    ``torchsde.sdeint(ForwardSDE(path), x0, ts)`` works as is, for states (B, d) and increasing ``ts`` in the path's own time.
    """

    path: Path

    noise_type: ClassVar[str] = "diagonal"
    sde_type: ClassVar[str] = "ito"

    def __post_init__(self) -> None:
        _check_score(self.path, None)

    def drift(self, x: Tensor, t: Any) -> Tensor:
        """f x, shaped like x; infinite where alpha = 0."""
        return _shaped(self.path.f, t, x) * x

    def diffusion(self, t: Any) -> Tensor:
        """g, shaped like t."""
        return self.path.g(t)

    def f(self, t: Any, y: Tensor) -> Tensor:
        """The drift, with torchsde's order of arguments."""
        return self.drift(y, t)

    def g(self, t: Any, y: Tensor) -> Tensor:
        """The diffusion, shaped like y for torchsde's diagonal noise."""
        return _shaped(self.path.g, t, y) * torch.ones_like(y)

    def marginal(self, x0: Tensor, t: Any) -> tuple[Tensor, Tensor]:
        """(mean, std) of q(x_t | x_0): alpha_t x0, shaped like x0, and sigma_t, which broadcasts against it."""
        t = _as_float64(t)
        check_inside(self.path, t)  # the formulas go on there, without meaning
        return _shaped(self.path.alpha, t, x0) * x0, _shaped(self.path.sigma, t, x0)

    def transition(self, s: Any, t: Any) -> tuple[Tensor, Tensor]:
        """(scale, std) of q(x_t | x_s) = N(scale x_s, std^2) for s < t, shaped like s and t broadcast together, in float64.

        scale = alpha_t / alpha_s and std = sigma_t sqrt(1 - e^{2 (lam_t - lam_s)}).
        """
        s, t = self._ordered(s, t, earlier="s", later="t")
        scale = self.path.alpha(t) / self.path.alpha(s)
        return scale, self.path.sigma(t) * torch.sqrt(-torch.expm1(2.0 * (self.path.lam(t) - self.path.lam(s))))

    def posterior(self, x0: Tensor, xs: Tensor, s: Any, t: Any) -> tuple[Tensor, Tensor]:
        """(mean, std) of q(x_t | x_s, x_0) for t < s (Ho et al. 2020, eq. 6, for any path).

        With rho = e^{2 (lam_s - lam_t)} = (sigma_t alpha_s / sigma_s alpha_t)^2, by Bayes' rule

            mean = alpha_t (1 - rho) x0 + (alpha_s sigma_t^2 / (alpha_t sigma_s^2)) x_s,    std = sigma_t sqrt(1 - rho),

        which gives alpha_t x0 at sigma_t = 0 and q(x_t | x_0) at alpha_s = 0. The mean is shaped like x0; std broadcasts
        against it.
        """
        s, t = self._ordered(s, t, earlier="t", later="s")
        (alpha_s, sigma_s), (alpha_t, sigma_t) = ((self.path.alpha(u), self.path.sigma(u)) for u in (s, t))
        rest = -torch.expm1(2.0 * (self.path.lam(s) - self.path.lam(t)))  # 1 - rho
        of_x0, of_xs = alpha_t * rest, alpha_s * sigma_t**2 / (alpha_t * sigma_s**2)
        mean = _fit(of_x0, x0) * x0 + _fit(of_xs, xs) * xs
        return mean, _fit(sigma_t * torch.sqrt(rest), x0)

    def _ordered(self, s: Any, t: Any, *, earlier: str, later: str) -> tuple[Tensor, Tensor]:
        s, t = _as_float64(s), _as_float64(t)
        low, high = (s, t) if earlier == "s" else (t, s)
        bad = ~((low >= 0.0) & (low < high) & (high <= self.path.T))
        if bool(bad.any()):
            low, high = (float(torch.broadcast_to(u, bad.shape)[bad][0]) for u in (low, high))
            raise InputError(f"{earlier} = {low:g}, {later} = {high:g}: give 0 <= {earlier} < {later} <= T = {self.path.T:g}")
        return s, t


@dataclass(frozen=True)
class ProbabilityFlow:
    """dx/dt = alpha' x0 + sigma' eps (Song et al. 2021, eq. 13), with x0 and eps the score's prediction at (x, t).

    It is the ``func`` of ``torchdiffeq.odeint(ProbabilityFlow(path, score), x, ts)``, for states of any shape and ``ts`` in
    the path's own time: decreasing to sample, increasing to encode. Adaptive solvers of torchdiffeq step past the last time and
    come back; times outside [0, T] are taken as the nearest end.
    """

    path: Path
    score: Predictor | None = None

    def __post_init__(self) -> None:
        _check_score(self.path, self.score)

    def drift(self, x: Tensor, t: Any, **conditions: Any) -> Tensor:
        """alpha' x0 + sigma' eps, shaped like x."""
        return _drift(self.path, self.score, x, t, conditions)

    def diffusion(self, t: Any) -> Tensor:
        """0, shaped like t."""
        return _in_float64(torch.zeros_like, t)

    def eta_at(self, knot: Knot) -> float:
        """The noise level, 0."""
        return 0.0

    def __call__(self, t: Any, x: Tensor) -> Tensor:
        """The drift, with torchdiffeq's order of arguments."""
        return self.drift(x, _as_float64(t).clamp(0.0, self.path.T))


@dataclass(frozen=True, init=False)
class ReverseSDE:
    """dx = (f x - (1 + eta^2) g^2 s / 2) dt + eta g dw, run from T down to 0: eta = 1 is Anderson's (1982), eta = 0 the flow.

    Every eta >= 0 keeps the marginals (Zhang & Chen 2023, eq. 6; Karras et al. 2022, eq. 6). ``eta`` is a number or a function
    of time; ``diffusion`` gives eta g itself instead, as a function of time. Both functions get one time, a tensor of shape ().

    ``torchsde.sdeint(problem, x, ts)`` works as is, for states (B, d): torchsde wants increasing times, so ``f`` and ``g`` run
    in the clock tau = T - t, as does ``ts``: ``ts = problem.tau(times)`` for decreasing ``times``, and ``problem.t(ts)`` back.
    For a score on samples of another shape give it as ``shape``, e.g. (3, 32, 32), and pass ``x.flatten(1)``.
    """

    path: Path
    score: Predictor | None
    eta: float | Coefficient
    given_diffusion: Coefficient | None
    shape: tuple[int, ...] | None

    noise_type: ClassVar[str] = "diagonal"
    sde_type: ClassVar[str] = "ito"

    def __init__(
        self,
        path: Path,
        score: Predictor | None = None,
        eta: float | Coefficient = 1.0,
        diffusion: Coefficient | None = None,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        _check_score(path, score)
        if diffusion is not None and not callable(diffusion):
            raise InputError(f"diffusion = {diffusion!r}: give a function of time, e.g. diffusion=lambda t: 0.5 * t")
        if diffusion is not None and eta != 1.0:
            raise InputError(f"eta = {eta!r} and diffusion are both given: give one, eta or diffusion = eta g")
        if not callable(eta):
            eta = _checked_level("eta", eta)
        for name, value in (("path", path), ("score", score), ("eta", eta), ("given_diffusion", diffusion), ("shape", shape)):
            object.__setattr__(self, name, value)

    def drift(self, x: Tensor, t: Any, **conditions: Any) -> Tensor:
        """f x - (1 + eta^2) g^2 s / 2, shaped like x, for dt < 0; infinite where alpha = 0 unless eta is 0 there."""
        return _drift(self.path, self.score, x, t, conditions, self._churn, self.diffusion)

    def diffusion(self, t: Any) -> Tensor:
        """eta g, shaped like t."""
        return _in_float64(self._diffusion, t)

    def eta_at(self, knot: Knot) -> float:
        """The noise level at a knot, finite and not negative."""
        at = torch.tensor(knot.t, dtype=torch.float64)
        if self.given_diffusion is None:
            return float(_at_times("eta", self.eta, at)) if callable(self.eta) else self.eta
        given = float(_at_times("diffusion", self.given_diffusion, at))
        if given == 0.0:
            return 0.0
        if knot.g2 == 0.0:
            raise InputError(
                f"diffusion({knot.t:g}) = {given:g} where g = 0: no eta gives it; make it 0 there, or stop earlier"
            )
        return given / math.sqrt(knot.g2)

    def f(self, t: Any, y: Tensor) -> Tensor:
        """Minus the drift, at torchsde's clock tau = T - t."""
        x = y if self.shape is None else y.reshape(-1, *self.shape)
        return -self.drift(x, self.t(t)).reshape(y.shape)

    def g(self, t: Any, y: Tensor) -> Tensor:
        """The diffusion at torchsde's clock tau = T - t, shaped like y for diagonal noise."""
        return _shaped(self.diffusion, self.t(t), y) * torch.ones_like(y)

    def tau(self, t: Any) -> Tensor:
        """torchsde's clock T - t of the path's times, in float64."""
        return self.path.T - _as_float64(t)

    def t(self, tau: Any) -> Tensor:
        """The path's time T - tau of torchsde's clock, in float64; rounding of tau does not leave [0, T]."""
        return (self.path.T - _as_float64(tau)).clamp(0.0, self.path.T)

    def _eta(self, t: Tensor) -> Tensor:
        return _at_times("eta", self.eta, t) if callable(self.eta) else torch.full_like(t, self.eta)

    def _diffusion(self, t: Tensor) -> Tensor:
        if self.given_diffusion is not None:
            return _at_times("diffusion", self.given_diffusion, t)
        eta = self._eta(t)
        return torch.where(eta == 0.0, 0.0, eta * self.path.g(t))  # 0 also where g is infinite

    def _churn(self, t: Tensor) -> Tensor:
        """The factor of eps beyond the flow, eta^2 (sigma' - f sigma) = (eta g)^2 / (2 sigma)."""
        if self.given_diffusion is not None:
            return self._diffusion(t) ** 2 / (2.0 * self.path.sigma(t))
        eta = self._eta(t)
        return torch.where(eta == 0.0, 0.0, eta**2 * (self.path.dsigma(t) - self.path.f(t) * self.path.sigma(t)))


def _check_score(path: Path, score: Predictor | None) -> None:
    if not isinstance(path, Path):
        raise InputError(f"path is a {type(path).__name__}: give a noise path, e.g. VP()")
    if score is not None and score.path is not path and score.path != path:
        raise InputError(f"path is {path}, but the score is for {score.path}: use path=score.path")


def _drift(
    path: Path,
    score: Predictor | None,
    x: Tensor,
    t: Any,
    conditions: dict[str, Any],
    churn: Callable[[Tensor], Tensor] = torch.zeros_like,
    diffusion: Callable[[Tensor], Tensor] = torch.zeros_like,
) -> Tensor:
    if score is None:
        raise InputError("score is None: this problem has no drift; give the score, e.g. ProbabilityFlow(path, score)")
    times = _as_float64(t)
    rise, extra = path.dsigma(times), churn(times)
    # Where sigma = 0 and sigma sigma' is not, sigma' is infinite and eps is 0: their product is the part of the score.
    clean = (path.sigma(times) == 0.0) & ((path.g2(times) > 0.0) | ~extra.isfinite())
    if bool(clean.any()):
        spread = 0.5 * (path.g2(times) + diffusion(times) ** 2)
        in_score = _shaped(path.f, t, x) * x - _fit(spread, x) * score(x, t, **conditions)
        if bool(clean.all()):
            return in_score
    else:
        in_score = None
    p: Prediction = score.predict(x, t, **conditions)
    drift = _shaped(path.dalpha, t, x) * p.x0 + _fit(rise + extra, x) * p.eps
    return drift if in_score is None else torch.where(_fit(clean, x).bool(), in_score, drift)


def _shaped(fn: Callable[[Tensor], Tensor], t: Any, x: Tensor) -> Tensor:
    """fn(t), computed in float64, ready to multiply x."""
    return _fit(fn(_as_float64(t)), x)


def _fit(value: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape () or (B,) in the dtype and on the device of x, shaped to broadcast against it."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InputError(f"the state is {getattr(x, 'dtype', type(x).__name__)}: give a floating point tensor")
    if value.dim() > 1 or (value.dim() == 1 and (x.dim() == 0 or len(value) not in (1, len(x)))):
        raise InputError(
            f"t has shape {tuple(value.shape)} for a state of shape {tuple(x.shape)}: give a number or one time a sample"
        )
    return value.to(x).reshape(value.shape + (1,) * (x.dim() - 1) if value.dim() else ())


def _checked_level(name: str, value: Any) -> float:
    if not is_number(value.detach().squeeze() if isinstance(value, Tensor) else value):
        raise InputError(f"{name} = {value!r:.80}: give a number that is finite and not negative, e.g. {name} = 1.0")
    if not 0.0 <= (level := float(value)) < math.inf:
        raise InputError(f"{name} = {level:g}: must be finite and not negative, e.g. {name} = 1.0")
    return level


def _at_times(name: str, fn: Coefficient, t: Tensor) -> Tensor:
    """A user's function at each of the times t, checked, float64."""
    values = list[Tensor]()
    for u in t.reshape(-1):
        try:
            value = fn(u)
        except Exception as error:
            raise InputError(
                f"{name}({float(u):g}) raised {type(error).__name__}: {str(error)[:150]}; give a function of t to a number >= 0"
            ) from error
        _checked_level(f"{name}({float(u):g})", value)
        values.append(torch.as_tensor(value, dtype=torch.float64, device=t.device).reshape(()))
    return torch.stack(values).reshape(t.shape)
