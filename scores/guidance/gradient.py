"""Guidance by a gradient: what is observed or wanted, y, enters through g = grad_x log p(y | x_t = x).

    score' = score + w g,    eps' = eps - w sigma g,    x0' = x0 + w (sigma^2 / alpha) g

so a network's output y = a x0 + b eps moves by w (a sigma^2/alpha - b sigma) g, which is 0 at sigma = 0. At alpha = 0 the shift
of x0 is 0/0: only an output that is eps itself has one there. With w = 1 and the exact g this is Bayes' rule: the score of
p(x_t | y).

Gradients are taken inside, whatever the caller's grad mode, through x only; where the caller builds a graph they are part of
it. The calls of a classifier are not network calls; a reconstruction costs the backward pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sde.errors import InputError, NetworkError, PathError, ToolkitError
from sde.prediction import Knot, Predictor, Row, Scalar, Tally, affine

from .base import Call, Guided, Level, Request, Scale, check_number, check_score, deferred, dot, per_row, ratio, scale_of


@contextmanager
def graph(x: Tensor) -> Generator[tuple[Tensor, bool], None, None]:
    """(x as a variable to differentiate in, whether the caller builds a graph)."""
    keep = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        if keep and x.requires_grad:
            yield x, keep
        else:
            yield (x.clone() if x.is_inference() else x.detach()).requires_grad_(), keep


@dataclass(frozen=True, eq=False)
class Nudged(Guided):
    """Base: the score's own output, moved along a gradient."""

    score: Predictor
    scale: Scale

    def row(self, knot: Knot) -> Row:
        """The score's own."""
        return self.score.row(knot)

    def _shift(self, knot: Knot) -> float:
        """a sigma^2/alpha - b sigma of the output's row (a, b)."""
        a, b = self.score.row(knot)
        if knot.sigma == 0.0:
            return 0.0
        if a == 0.0:
            return -b * knot.sigma
        if knot.alpha == 0.0:
            raise PathError(
                f"guidance by a gradient is undefined at alpha = 0 (t = {knot.t:g}): x_t says nothing of x_0 there, so its "
                f"gradient says nothing of y; start at t = {0.999 * self.path.T:g}"
            )
        return a * knot.sigma**2 / knot.alpha - b * knot.sigma

    def _factors(self, level: Level, batch: int) -> list[tuple[Knot, float]]:
        """(knot, w times the shift), one or one a sample; 0 without the shift where w is 0."""
        scales = self.scale.of(level, batch)
        knots = list(level) * (len(scales) // len(level))
        return [(k, w * self._shift(k) if w != 0.0 else 0.0) for w, k in zip(scales, knots, strict=True)]

    def _plain(self, knots: Sequence[Knot]) -> Any:
        idle = all(k.sigma == 0.0 or all(w == 0.0 for w in self.scale.at(k)) for k in knots)
        if not idle:
            return None

        def plain(conditions: Mapping[str, Any], x: Tensor) -> tuple[Predictor, Mapping[str, Any]]:
            self.scale.of(knots, len(x))
            return self.score, self._rest(conditions)

        return plain

    def _rest(self, conditions: Mapping[str, Any]) -> Mapping[str, Any]:
        """The conditions that the network gets."""
        return conditions


@dataclass(frozen=True, eq=False)
class Classified(Nudged):
    """``log_prob(x, t, **takes)`` is log p(y | x_t = x), (B,), or with ``gradient`` its gradient."""

    log_prob: Callable[..., Tensor]
    takes: tuple[str, ...]
    shared: bool
    gradient: bool

    def _rest(self, conditions: Mapping[str, Any]) -> Mapping[str, Any]:
        missing = [name for name in self.takes if name not in conditions]
        if missing:
            raise InputError(f"log_prob takes condition {missing[0]}: give conditions={{{missing[0]!r}: ...}}")
        return conditions if self.shared else {k: v for k, v in conditions.items() if k not in self.takes}

    def _make(self, request: Request, x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> list[Call]:
        calls = request.of(self.score, x, self._rest(conditions), tally)
        with torch.inference_mode(False):  # what is prepared here enters a graph
            taken = {name: _moved(name, conditions[name], x) for name in self.takes}
            parts = zip(request.levels, calls, strict=True)
            return [deferred(partial(self._level, level, call, taken, x)) for level, call in parts]

    def _level(self, level: Level, base: Call, taken: Mapping[str, Any], x: Tensor) -> Call:
        move = _mover([f for _, f in self._factors(level, len(x))], x)
        if move is None:
            return base
        t = torch.tensor([k.t for k in level], dtype=torch.float64).to(device=x.device, dtype=x.dtype).expand(len(x))
        at = level[0].t if len(level) == 1 else None

        def call(x: Tensor) -> Tensor:
            y = base(x)
            return move(y, self._gradient(x, t, taken, at))

        return call

    def _gradient(self, x: Tensor, t: Tensor, taken: Mapping[str, Any], at: float | None) -> Tensor:
        if self.gradient:
            g = _called(lambda: self.log_prob(x, t, **taken), "log_prob", at)
            _check_output(g, x, tuple(x.shape), "log_prob (with gradient=True)", at)
            return g
        with graph(x) as (u, keep):
            value = _called(lambda: self.log_prob(u, t, **taken), "log_prob", at)
            _check_output(value, x, (len(x),), "log_prob", at)
            return _grad(value.sum(), u, None, keep, "log_prob", at)


Back = Callable[[Tensor, bool], Tensor]


class Pull(Protocol):
    """What an observation asks of a denoised sample."""

    def on(self, x: Tensor) -> Pull:
        """The same, checked and ready for states like x."""
        ...

    def spread(self, knot: Knot) -> float:
        """A number that it needs to know of a knot."""
        ...

    def __call__(self, x0: Tensor, back: Back, spread: Scalar, keep: bool) -> Tensor:
        """g from x0 (B, *event), a function of the state. back(v, last) is v^T dx0/dx; after ``last`` the graph is gone. With
        ``keep`` what comes back has a graph.
        """
        ...


@dataclass(frozen=True, eq=False)
class Reconstructed(Nudged):
    """g through the score's own x0: one evaluation and its backward pass."""

    pull: Pull

    def _make(self, request: Request, x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> list[Call]:
        with torch.inference_mode(False):  # what is prepared here enters a graph
            pull = self.pull.on(x)
            calls = request.of(self.score, x, conditions, tally)
            parts = zip(request.levels, calls, strict=True)
            return [deferred(partial(self._level, level, call, pull, x)) for level, call in parts]

    def _level(self, level: Level, base: Call, pull: Pull, x: Tensor) -> Call:
        factors = self._factors(level, len(x))
        move = _mover([f for _, f in factors], x)
        if move is None:
            return base
        rows = [(*affine(self.score.row(k), k, 1.0, 0.0), pull.spread(k)) if f else (0.0, 0.0, 0.0) for k, f in factors]
        p, q, spread = (per_row(column, x) for column in zip(*rows, strict=True))
        at = level[0].t if len(level) == 1 else None

        def call(x: Tensor) -> Tensor:
            with graph(x) as (u, keep):
                y = base(u)
                x0 = p * u + q * y

                def back(v: Tensor, last: bool) -> Tensor:
                    return p * v + _grad(y, u, q * v, keep, "the network", at, retain=not last)

                out = move(y, pull(x0, back, spread, keep))
            return out if keep else out.detach()

        return call


@dataclass(frozen=True)
class Likelihood:
    """g = grad_x log p(y | x0(x)) of a function x0 -> (B,)."""

    log_likelihood: Callable[[Tensor], Tensor]

    def on(self, x: Tensor) -> Likelihood:
        """Itself."""
        return self

    def spread(self, knot: Knot) -> float:
        """Nothing."""
        return 0.0

    def __call__(self, x0: Tensor, back: Back, spread: Scalar, keep: bool) -> Tensor:
        z = x0 if keep else x0.detach().requires_grad_()
        value = _called(lambda: self.log_likelihood(z), "log_likelihood", None)
        _check_output(value, x0, (len(x0),), "log_likelihood", None)
        return back(_grad(value.sum(), z, None, keep, "log_likelihood", None), True)


@dataclass(frozen=True)
class LinearObservation:
    """g = J^T H^T (H V H^T + noise^2)^{-1} (y - H x0), J = dx0/dx, by conjugate gradients in each sample.

    V = (sigma^2/alpha) J with ``variance`` None, else v sigma^2/(alpha^2 v + sigma^2) for data of variance v.
    """

    measurement: Tensor = field(repr=False)
    operator: Callable[[Tensor], Tensor] | Tensor
    noise: float
    variance: float | None
    iterations: int
    _ready: dict[Any, LinearObservation] = field(default_factory=dict, init=False, repr=False)

    def on(self, x: Tensor) -> LinearObservation:
        """On x's device; the operator's shape is checked, and that it is linear or affine."""
        key = (x.shape, x.dtype, x.device)
        if key not in self._ready:
            h = self.operator
            ready = replace(self, measurement=self.measurement.to(x), operator=_matrix(h.to(x)) if isinstance(h, Tensor) else h)
            ready._check(x)
            self._ready[key] = ready
        return self._ready[key]

    def _check(self, x: Tensor) -> None:
        with torch.no_grad():
            a = torch.linspace(-3.0, 3.0, x[0].numel(), dtype=x.dtype, device=x.device).reshape(x[0].shape).expand_as(x)
            b = 3.0 * torch.cos(5.0 * a)
            seen, other, both, zero = (self._seen(v) for v in (a, b, a + b, 0.0 * a))
            if not isinstance(seen, Tensor) or seen.dim() == 0 or len(seen) != len(x):
                raise NetworkError(f"operator returned {_seen(seen)} for x0 {tuple(x.shape)}: give a tensor of {len(x)} rows")
            if self.measurement.shape not in (seen.shape, (1, *seen.shape[1:])):
                raise InputError(
                    f"measurement has shape {tuple(self.measurement.shape)}, but operator(x0) {tuple(seen.shape)}: give one a "
                    "sample, or (1, ...)"
                )
            size = float(sum(v.abs().max() for v in (seen, other, both, zero)))
            gap = float((both + zero - seen - other).abs().max())
        if gap > 1e-3 * size:
            raise InputError(
                f"operator is not linear: operator(a + b) differs from operator(a) + operator(b) by {gap:g}; use dps, whose "
                "likelihood may be any function of x0"
            )

    def _seen(self, x0: Tensor) -> Tensor:
        return _called(partial(self.operator, x0), "operator", None)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def spread(self, knot: Knot) -> float:
        """The factor of V: sigma^2/alpha, or the variance itself."""
        if self.variance is None:
            return knot.sigma**2 / knot.alpha
        return self.variance * knot.sigma**2 / (knot.alpha**2 * self.variance + knot.sigma**2)

    def __call__(self, x0: Tensor, back: Back, spread: Scalar, keep: bool) -> Tensor:
        zero = torch.zeros_like(x0, requires_grad=True)
        image = self._seen(zero)  # linear, so its graph is the adjoint wherever it is taken

        def adjoint(u: Tensor) -> Tensor:
            return _grad(image, zero, u, keep, "operator", None, retain=True)

        def covariance(u: Tensor) -> Tensor:
            v = adjoint(u)
            v = spread * (back(v, False) if self.variance is None else v)
            return self._seen(v) - image + self.noise**2 * u

        with torch.set_grad_enabled(keep):
            u = solve(covariance, self.measurement - self._seen(x0), self.iterations)
            return back(adjoint(u), True)


def solve(apply: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """u with apply(u) = b by conjugate gradients, sample by sample; apply is linear, symmetric and positive."""
    u, r, p = torch.zeros_like(b), b, b
    size = dot(r, r)
    for _ in range(iterations):
        q = apply(p)
        step = ratio(size, dot(p, q))
        u, r = u + step * p, r - step * q
        before, size = size, dot(r, r)
        p = r + ratio(size, before) * p
    return u


def classifier(
    score: Predictor,
    log_prob: Callable[..., Tensor],
    scale: Any = 1.0,
    *,
    takes: Sequence[str] = (),
    shared: bool = False,
    gradient: bool = False,
) -> Classified:
    """Classifier guidance (Dhariwal & Nichol 2021): score + scale grad_x log p(y | x_t).

    log_prob  function (x, t, **takes) -> (B,): log p(y | x_t = x) at x (B, *event) and times t (B,) of the path, both in x's
              dtype. Differentiated here; or, with gradient=True, a function that returns the gradient itself, shaped like x.
    scale     a number, (B,) of one a sample, or a function of t to either; where it is 0, log_prob is not called.
    takes     names of the call's conditions that go to log_prob, and with ``shared`` to the network as well.

    With scale 1 and the exact log_prob the score is that of p(x_t | y). nfe 1, net_evals 1: the classifier is not counted.
    Errors: InputError for a scale that is not finite, NetworkError where log_prob raises, returns another shape or does not
    depend on x, PathError at alpha = 0 unless the network predicts eps or the score.
    """
    check_score("score", score)
    _check_function("log_prob", log_prob)
    names = (takes,) if isinstance(takes, str) else tuple(takes)
    for name, value in (("shared", shared), ("gradient", gradient)):
        if not isinstance(value, bool):
            raise InputError(f"{name}={value!r}: must be True or False")
    return Classified(score, scale_of(scale, 0.0), log_prob, names, shared, gradient)


def dps(score: Predictor, log_likelihood: Callable[[Tensor], Tensor], scale: Any = 1.0) -> Reconstructed:
    """Diffusion posterior sampling (Chung et al. 2023): score + scale grad_x log p(y | x0(x)), through the network.

    log_likelihood  function x0 (B, *event) -> (B,), differentiable: of any observation, linear or not, e.g.
                    lambda x0: -((y - blur(x0)) ** 2).flatten(1).sum(1) / (2 * noise**2)
    scale           a number, (B,), or a function of t to either.

    The likelihood of y given x_t is put equal to that at the mean x0(x), which leaves out its spread: too strong while sigma is
    large, exact as sigma -> 0. On Gaussian data ``pigdm`` is exact and this is not. Chung et al. subtract a multiple of the
    gradient of |y - A x0| from the state in each of 1000 steps, whatever the step; here it is part of the score, so that it
    converges with the steps. nfe 1 and net_evals 1, and a backward pass.
    """
    check_score("score", score)
    _check_function("log_likelihood", log_likelihood)
    return Reconstructed(score, scale_of(scale, 0.0), Likelihood(log_likelihood))


def pigdm(
    score: Predictor,
    measurement: Tensor,
    operator: Callable[[Tensor], Tensor] | Tensor,
    *,
    noise: float,
    variance: float | None = 1.0,
    scale: Any = 1.0,
    iterations: int = 10,
) -> Reconstructed:
    """Posterior sampling for y = H x_0 + noise z, H linear (Song et al. 2023, Pi-GDM):

        score + scale J^T H^T (H V H^T + noise^2)^{-1} (y - H x0),    J = dx0/dx,  V ~ Cov[x_0 | x_t]

    measurement  y, (B, ...) or (1, ...).
    operator     H: a linear (or affine) function x0 (B, *event) -> (B, ...), differentiable, or a matrix (m, d) for flattened
                 samples.
    noise        the standard deviation of the noise of y, >= 0.
    variance     v: V = v sigma^2/(alpha^2 v + sigma^2), exact for data N(., v I); 1 is Song et al.'s. None: V is the network's
                 own, (sigma^2/alpha) J (Tweedie; Boys et al. 2023, Rozet et al. 2024), exact for all Gaussian data, at the cost
                 of a backward pass an iteration.
    iterations   of conjugate gradients in the space of y. One is exact where H V H^T is a multiple of the identity (masks,
                 orthonormal rows), m always; clustered spectra need few. They stop, in a sample, at a direction in which the
                 network's V is not positive.

    Where V is exact and x_0 given x_t is Gaussian, the score is that of p(x_t | y). nfe 1, net_evals 1, and backward passes.
    """
    check_score("score", score)
    if isinstance(operator, Tensor):
        if operator.dim() != 2 or not operator.is_floating_point():
            raise InputError(f"operator has shape {tuple(operator.shape)} and dtype {operator.dtype}: give a floating (m, d)")
        operator = operator.detach()
    else:
        _check_function("operator", operator)
    if not isinstance(measurement, Tensor) or not measurement.is_floating_point() or measurement.dim() == 0:
        raise InputError(f"measurement is {_seen(measurement)}: give a floating tensor (B, ...) or (1, ...)")
    if not bool(measurement.isfinite().all()):
        raise InputError("measurement is not finite: put 0 where nothing is seen, and let the operator give 0 there")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise InputError(f"iterations={iterations!r}: must be an int >= 1")
    spread = None if variance is None else check_number("variance", variance, 0.0, open_low=True)
    pull = LinearObservation(measurement.detach(), operator, check_number("noise", noise, 0.0), spread, iterations)
    return Reconstructed(score, scale_of(scale, 0.0), pull)


def _matrix(h: Tensor) -> Callable[[Tensor], Tensor]:
    def operator(x0: Tensor) -> Tensor:
        if x0[0].numel() != h.shape[1]:
            raise InputError(f"operator has shape {tuple(h.shape)}, but a sample has {x0[0].numel()} elements: give (m, d)")
        return x0.flatten(1) @ h.T

    return operator


def _called(fn: Callable[[], Any], name: str, t: float | None) -> Any:
    try:
        return fn()
    except ToolkitError:
        raise
    except Exception as error:
        place = "" if t is None else f" at t={t:g}"
        raise NetworkError(f"{name} raised {type(error).__name__}{place}: {str(error)[:300]}", t=t) from error


def _check_output(value: Any, x: Tensor, shape: tuple[int, ...], name: str, t: float | None) -> None:
    if (
        not isinstance(value, Tensor)
        or tuple(value.shape) != shape
        or not value.is_floating_point()
        or value.device != x.device
    ):
        raise NetworkError(f"{name} returned {_seen(value)}: give a floating tensor {shape} on {x.device}", t=t)


def _grad(y: Tensor, x: Tensor, v: Tensor | None, keep: bool, name: str, t: float | None, retain: bool = False) -> Tensor:
    """v^T dy/dx, or an error that says that y does not depend on x."""
    if y.requires_grad:
        (g,) = torch.autograd.grad(y, x, v, create_graph=keep, retain_graph=keep or retain, allow_unused=True)
        if g is not None:
            return g
    raise NetworkError(f"no gradient reaches x through {name}: it runs under no_grad, detaches, or does not depend on x", t=t)


def _check_function(name: str, fn: Any) -> None:
    if not callable(fn):
        raise InputError(f"{name} is {_seen(fn)}: give a function")


def _mover(factors: Sequence[float], x: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """(y, g) -> y + factor g, and y to the bit where the factor is 0; None where all are."""
    if not any(factors):
        return None
    c = per_row(factors, x)
    if all(factors):
        return lambda y, g: y + c * g
    return lambda y, g: torch.where(c == 0.0, y, y + c * g)


def _moved(name: str, value: Any, x: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dim() and len(value) not in (1, len(x)):
        raise InputError(f"condition {name} has {len(value)} rows for a batch of {len(x)}: give {len(x)} rows, or 1")
    return (value.clone() if value.is_inference() else value).to(x.device)


def _seen(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"
