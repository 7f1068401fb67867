"""Log-likelihood of data under a score: the probability flow of the pair (x, log p).

Along dx = v dt the density moves by d log p_t(x_t) / dt = -div v (Chen et al. 2018; Song et al. 2021, app. D.2), so

    log p_{t_min}(x) = log prior(z) + int div v dt,      x_{t_min} = x,  z = x at t_max.

Every path is the same flow in the angle th = atan2(sigma, alpha). With r = hypot(alpha, sigma) and u = x / r,

    u = cos(th) x0 + sin(th) eps,      du/dth = cos(th) eps - sin(th) x0,

which is a network's v row: finite on all of [0, pi/2], also where alpha = 0, where sigma = 0 and sigma' is infinite (VP at
t = 0), and across the kinks of a table of betas. ``_Flow`` integrates u and int div dth; log r is added at the ends. Adaptive
solvers step in th: a Gaussian of condition 3000 takes 210 to 250 calls of dopri5 at 1e-8 on every path, 3e-7 nats off; in t
it takes 390 on EDM and more than 10,000 on a table. Fixed steps are equal in the clock of ``sde.noise``, which spreads every
scale of lambda and is finite at both ends: 40 steps of rk4 are 1e-4 nats off there, 5e-2 in th, 2e-4 in lambda.

The divergence is the trace of a Jacobian (``sde.trace``). The probes of a sample are fixed for the whole run, so its integrand
is a smooth function, and each has its own integral: their spread is the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, NetworkError, StepLimitError, nearest
from .noise import Source, White
from .noise import clock as _noise_clock
from .path import Path
from .prediction import Knot, Predictor, Row, Tally, affine, rows_of
from .trace import NO_KNOT, PROBES, TRACES, Exact, Hutchinson, HutchPlusPlus, Products, Trace, draw_probes

LIMIT = 1024  # the largest sample whose exact trace is computed unasked
CHUNK = 1 << 16  # numbers of Jacobian rows computed at a time, unless told otherwise

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun3", "rk4")

_UNIFORM_DRAW = 1 << 33  # of a sample's stream: beyond those of a sampler and the probes


@dataclass(frozen=True)
class Likelihood:
    """What ``log_likelihood`` returns; (B,) tensors in x0's dtype (float32 at least).

    log_prob         log of the density at x0 of the law that the flow from the prior has at ``t_min``, in nats
    standard_error   of log_prob, from the spread of the probes; None for the exact trace and for a single probe
    cut              estimate of log p_0(x0) - log p_{t_min}(x0), in nats, to leading order in log alpha and sigma^2 at t_min:
                     ``log_prob + cut`` is the corrected value while cut is small, a large one asks for a smaller t_min
    z                the latent, shaped like x0: the state at ``t_max``, which the flow back takes to x0
    nfe, net_evals   network calls on the batch, and batches through it, counted at the network
    products         vector-Jacobian products on the batch: one backward pass through the network each
    """

    log_prob: Tensor
    standard_error: Tensor | None
    cut: Tensor
    z: Tensor
    nfe: int
    net_evals: int
    products: int
    t_min: float
    t_max: float

    def bits_per_dim(self, *, scale: float | None = None, bins: int | None = None) -> Tensor:
        """``sde.bits_per_dim`` of log_prob: (B,)."""
        return bits_per_dim(self.log_prob, tuple(self.z.shape), scale=scale, bins=bins)


def log_likelihood(
    score: Predictor,
    x0: Tensor,
    *,
    trace: str | None = None,
    probes: int | None = None,
    probe_law: str = "rademacher",
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    steps: int | None = None,
    per_sample: bool = False,
    max_nfe: int = 10_000,
    t_min: float | None = None,
    t_max: float | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    noise: Source | None = None,
    chunk: int | None = None,
    limit: int = LIMIT,
    conditions: Mapping[str, Any] | None = None,
    grad: bool = False,
) -> Likelihood:
    """log p(x0) under the score's probability flow, for x0 (B, *event), in nats.

    trace       "exact", "hutchinson" or "hutch++"; by default "exact", or "hutchinson" where probes are given
    probes      products w^T J a network call of the last two. hutch++ spends a third on the sketch, a third on its range and
                the rest on the remainder: at least 4
    probe_law   "rademacher" or "gaussian"
    method      "dopri5", "dopri8", "bosh3", "adaptive_heun": rtol and atol hold for u (root mean square over the event) and
                for the log-density, in every sample. "euler", "midpoint", "heun3", "rk4": ``steps`` of them
    per_sample  integrate the samples one by one: no step depends on batch mates, and ``nfe`` adds up
    max_nfe     network calls of one integration (of one sample with per_sample); StepLimitError beyond
    t_min       x0 is taken as a state at this time (default: the path's; 0 is exact where the network has a value there)
    t_max       where the prior is (default T)
    prior       function z (B, *event) -> log-density (B,) at t_max (default: normal with ``path.prior_std(t_max)``)
    seed        the probes of sample i are a function of (seed, i); seeds= gives one seed a sample, noise= a source of
                sde.noise, such as White(seed, indices=range(64, 128))
    chunk       Jacobian rows computed at a time, chunk B d numbers (default: up to 65536 numbers, or one row)
    limit       largest d for the exact trace
    conditions  keyword arguments of the network
    grad        build the autograd graph: gradients reach x0 and the network's parameters (needs its second derivatives)

    Accuracy: with an exact trace, that of the solver: a few tolerances, times the condition of the flow (the ratio of the
    prior's standard deviation to the data's smallest). Cost: (1 + d, or 1 + probes) passes through the network an evaluation.

    InputError for arguments that cannot work; PathError where the network's output does not determine the flow;
    NetworkError where no gradient reaches x, or values are not finite (``t`` and ``samples`` say where).
    """
    _check_score(score)
    state = _check_state(x0)
    kind, count = _check_trace(trace, probes, probe_law, state, limit)
    _check_solver(method, rtol, atol, steps, max_nfe, state.dtype)
    first, last = _check_times(score.path, t_min, t_max)
    if prior is not None and not callable(prior):
        raise InputError(f"prior is a {type(prior).__name__}: give a function of z to its log-density (B,), or None")
    if conditions is not None and not isinstance(conditions, Mapping):
        raise InputError(f"conditions is a {type(conditions).__name__}: give a dict of keyword arguments of the network")
    _check_count("chunk", chunk, none=True)
    if noise is not None and not isinstance(noise, Source):
        raise InputError(f"noise is a {type(noise).__name__}: give a source of sde.noise, such as White(seed=0)")
    source = noise if noise is not None else White(seed, seeds=seeds)
    batch, d = len(state), state[0:1].numel()
    control = _Control(method, float(rtol), float(atol), steps, max_nfe)
    tally, parts, products = Tally(), list[_Result](), 0
    # inference mode would keep the backward passes from being recorded
    with torch.inference_mode(False), torch.set_grad_enabled(grad), _running(score):
        vectors = None if kind == "exact" else draw_probes(source, count, state, probe_law)
        rows = [slice(i, i + 1) for i in range(batch)] if per_sample else [slice(0, batch)]
        for row in rows if state.numel() else []:
            part = state[row]
            given = rows_of(conditions or {}, row, batch) if per_sample else dict(conditions or {})
            estimator: Trace = Exact()
            if vectors is not None:
                estimator = (Hutchinson if kind == "hutchinson" else HutchPlusPlus)(vectors[:, row])
            rows_at_once = chunk or max(1, CHUNK // part.numel())
            flow = _Flow(score, part, given, tally, first, last, estimator, rows_at_once, grad, row.start)
            parts.append(flow.solve(control))
            products += flow.products.done
        z, integrals, cut = (torch.cat(c) for c in zip(*parts, strict=True)) if parts else _nothing(state)
        log_prior = _log_prior(score.path, last, z, prior)
        log_prob = log_prior + (integrals.double().mean(1) + d * (math.log(_radius(last)) - math.log(_radius(first))))
        error = None if integrals.shape[1] == 1 else integrals.std(1) / math.sqrt(integrals.shape[1])
    return Likelihood(
        log_prob=log_prob.to(state.dtype),
        standard_error=error,
        cut=cut,
        z=z.to(x0.dtype),
        nfe=tally.nfe,
        net_evals=tally.net_evals,
        products=products,
        t_min=first.t,
        t_max=last.t,
    )


def bits_per_dim(log_prob: Tensor, shape: Sequence[int], *, scale: float | None = None, bins: int | None = None) -> Tensor:
    """-log2 of the probability of one bin, per number: -(log_prob / log 2 + d log2(scale / bins)) / d, shaped like log_prob.

    shape  of the data, (B, *event): d is the product of the event.
    scale  the length in the model's units that ``bins`` equal bins fill. 8-bit images: scale=2, bins=256 where
           x = -1 + 2 (k + u) / 256, scale=1 where x = (k + u) / 256; scale=2 * 256 / 255 where x = -1 + 2 (k + u) / 255.
    bins   how many; scale=1, bins=1 for data that are continuous, or for a log_prob that is of whole bins already.

    Neither is guessed: the "+ 7" of published code is -log2(2 / 256), right for one choice of data only. log_prob is a density
    of dequantised data (``dequantise``); -log2 of it then bounds that of the discrete data from above, in the mean over u.
    """
    if scale is None or bins is None:
        raise InputError(
            f"scale={scale!r}, bins={bins!r}: say what the data are, e.g. scale=2.0, bins=256 for 8-bit images in [-1, 1], "
            "scale=1.0, bins=256 in [0, 1], scale=1.0, bins=1 for continuous data"
        )
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0.0 < scale < math.inf:
        raise InputError(f"scale={scale!r}: give the length that the bins fill, a number > 0 such as 2.0 for [-1, 1]")
    _check_count("bins", bins)
    if isinstance(shape, int) or len(shape) < 1 or math.prod(shape[1:]) < 1:
        raise InputError(f"shape={shape!r}: give the shape of the data, (B, *event), such as tuple(x.shape)")
    d = math.prod(shape[1:])
    return -(log_prob / d + math.log(scale / bins)) / math.log(2.0)


def dequantise(
    levels: Tensor,
    *,
    low: float,
    high: float,
    bins: int,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    noise: Source | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x = low + (high - low) (k + u) / bins for whole levels k = 0 ... bins - 1, (B, *event), u uniform on [0, 1].

    For any density p of x, Jensen's inequality gives the bound that bits/dim of dequantised data stand for (Theis et al. 2016):

        E_u[log p(x)] + d log((high - low) / bins)  <=  log P(k),      P(k) = the integral of p over the bin of k.

    So ``bits_per_dim(log p(x), shape, scale=high - low, bins=bins)`` is, in the mean over u, at least that of P. Sample i's u
    are a function of (seed, i), as in ``log_likelihood``.
    """
    if not isinstance(levels, Tensor) or levels.dim() == 0 or levels.is_complex() or levels.dtype is torch.bool:
        raise InputError(f"levels is {_seen(levels)}: give whole numbers (B, *event)")
    _check_count("bins", bins)
    if not -math.inf < low < high < math.inf:
        raise InputError(
            f"low={low!r}, high={high!r}: give the ends of the first and the last bin, low < high, such as -1.0, 1.0"
        )
    k = levels.double()
    bad = (k != k.round()) | (k < 0.0) | (k > bins - 1.0)
    if bool(bad.any()):
        raise InputError(f"levels contains {float(k[bad][0]):g}: give whole numbers 0 ... bins - 1 = {bins - 1}")
    source = noise if noise is not None else White(seed, seeds=seeds)
    z = source.open(tuple(k.shape), torch.float64, k.device).normal(_UNIFORM_DRAW, NO_KNOT, NO_KNOT)
    return (low + (high - low) * (k + torch.special.ndtr(z)) / bins).to(dtype)


# --- the clocks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clock:
    """A time that increases from data to noise: its value at a knot, lambda at a value, and d th / d clock at a knot."""

    place: Callable[[Knot], float]
    lam: Callable[[float], float]
    rate: Callable[[Knot], float]


def _radius(k: Knot) -> float:
    return math.hypot(k.alpha, k.sigma)


def _lam_of_clock(at: float) -> float:
    m = 2.0 * at + 1.0  # lam / hypot(lam, 4), negated as the clock is
    return -4.0 * m / math.sqrt(1.0 - m * m)


def _rate_of_clock(k: Knot) -> float:
    if math.isinf(k.lam):
        return 0.0
    return (k.alpha / _radius(k)) * (k.sigma / _radius(k)) * math.hypot(k.lam, 4.0) ** 3 / 8.0  # -dth/dlam over dclock/dlam


_ANGLE = _Clock(lambda k: math.atan2(k.sigma, k.alpha), lambda at: -math.log(math.tan(at)), lambda k: 1.0)
_EVEN = _Clock(lambda k: -_noise_clock(k.lam), _lam_of_clock, _rate_of_clock)


# --- the flow ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Control:
    method: str
    rtol: float
    atol: float
    steps: int | None
    max_nfe: int


class _NotFinite(Exception):
    """Leaves torchdiffeq's loop: a replay says where."""


_Result = tuple[Tensor, Tensor, Tensor]  # z, the integrals of the divergence (B, m), cut


class _Flow:
    """(u, int div dth) of one batch as torchdiffeq's func(clock, state), state (B, d + m), with its step callbacks."""

    def __init__(
        self,
        score: Predictor,
        x: Tensor,
        conditions: Mapping[str, Any],
        tally: Tally,
        first: Knot,
        last: Knot,
        trace: Trace,
        chunk: int,
        grad: bool,
        row: int,
    ) -> None:
        self.score, self.x, self.conditions, self.tally = score, x, conditions, tally
        self.first, self.last, self.trace, self.chunk, self.grad, self.row = first, last, trace, chunk, grad, row
        self.size, self.products, self.checking = x[0].numel(), Products(grad), False
        self.cut: Tensor | None = None

    def solve(self, control: _Control) -> _Result:
        """From the data to the prior."""
        end = self._integrate(control)
        bad = ~end.detach().isfinite().all(1)
        if bool(bad.any()):
            if not self.checking:  # runs are deterministic, so a replay with checks finds the call
                self.checking = True
                self.solve(control)
            rows = self._samples(bad)
            raise NetworkError(
                f"the result is not finite in {len(rows)} samples (first: {rows[0]}), though every network output was: the "
                "last step overflowed, or the network is not deterministic",
                samples=rows,
            )
        z = end[:, : self.size].reshape(self.x.shape) * _radius(self.last)
        return z, end[:, self.size :], self.cut  # pyright: ignore[reportReturnType]

    def _integrate(self, control: _Control) -> Tensor:
        """The state at the prior; NaN where torchdiffeq stopped for a value that is not finite."""
        from torchdiffeq import odeint

        adaptive = control.method in ADAPTIVE
        self.clock = _ANGLE if adaptive else _EVEN
        self.low, self.high = self.clock.place(self.first), self.clock.place(self.last)
        start = self.x.reshape(len(self.x), self.size) / _radius(self.first)
        start = torch.cat([start, start.new_zeros(len(start), self.trace.count)], 1)
        self.at, self.state, self.slope, self.rejected = self.low, start, start, 0
        self.max_nfe = self.tally.nfe + control.max_nfe
        ends = torch.tensor([self.low, self.high], dtype=torch.float64, device=start.device)
        if adaptive:
            # step_t: not past the end. A first step that torchdiffeq chooses would carry a gradient, times do not.
            first = 1e-3 * (self.high - self.low)
            func, options = self, {"dtype": torch.float64, "step_t": ends[-1:], "norm": self._norm, "first_step": first}
        else:
            grid = torch.linspace(self.low, self.high, control.steps + 1, dtype=torch.float64, device=start.device)  # pyright: ignore[reportOptionalOperand]
            inner = grid[1:-1]
            func = self.__call__  # without the callbacks of step control
            options = {"grid_constructor": lambda func, y, t: torch.cat([t[:1], inner, t[1:]])}
        tolerances = {"rtol": control.rtol, "atol": control.atol}
        try:
            return torch.as_tensor(odeint(func, start, ends, method=control.method, options=options, **tolerances)[-1])
        except _NotFinite:
            return self.slope - self.slope

    def __call__(self, place: Tensor, state: Tensor) -> Tensor:
        at = float(place.detach())
        if self.tally.nfe >= self.max_nfe:
            t = self._knot(self.at).t
            raise StepLimitError(
                f"max_nfe network calls used at t = {t:g} ({self.rejected} steps rejected): raise max_nfe or the tolerances",
                t=t,
                rejected=self.rejected,
                partial=self._partial(),
            )
        knot = self._knot(at)
        u = state[:, : self.size]
        v, div = self._field(u, knot)
        if self.cut is None:  # the first call is at the data
            self.cut = self._cut(u.detach(), v.detach(), div.detach())
        self.slope = self.clock.rate(knot) * torch.cat([v, div], 1)
        return self.slope

    def callback_step(self, at: Tensor, state: Tensor, step: Tensor) -> None:
        self.at, self.state = float(at.detach()), state
        if not bool(at + step > at):
            t = self._knot(self.at).t
            raise StepLimitError(
                f"the step size vanished at t = {t:g}: the flow is too steep there; raise the tolerances, or t_min",
                t=t,
                rejected=self.rejected,
                partial=self._partial(),
            )

    def callback_reject_step(self, at: Tensor, state: Tensor, step: Tensor) -> None:
        self.rejected += 1
        if not bool(self.slope.isfinite().all()):  # every stage feeds the last one: no smaller step will do
            raise _NotFinite

    def _partial(self) -> Tensor:
        """The state x of the last step."""
        return self.state[:, : self.size].detach().reshape(self.x.shape) * _radius(self._knot(self.at))

    def _norm(self, error: Tensor) -> Tensor:
        """The worst sample's error, that of u or of the log-density, so that the tolerance holds in each."""
        square = error.square()
        return torch.maximum(square[:, : self.size].mean(1), square[:, self.size :].mean(1)).max().sqrt()

    def _knot(self, at: float) -> Knot:
        # torchdiffeq rounds times to the state's dtype, and asks just inside its ends
        close = 4.0 * torch.finfo(self.x.dtype).eps
        if at <= self.low + close * abs(self.low):
            return self.first
        if at >= self.high - close * abs(self.high):
            return self.last
        return self.score.path.knot_at(self.clock.lam(at))

    def _field(self, u: Tensor, knot: Knot) -> tuple[Tensor, Tensor]:
        """(du/dth (B, d), the estimates of its divergence (B, m)) at u (B, d)."""
        r = _radius(knot)
        p, q = _v_of(self.score.row(knot), knot)
        with torch.enable_grad():
            x = (r * u).reshape(self.x.shape)
            x = x if self.grad and x.requires_grad else x.detach().requires_grad_()
            (call,) = self.score.at([knot], x, self.conditions, self.tally)
            self._check("the state overflowed, though the network's outputs were finite:", x, knot, "use more steps")
            y = call(x)
            if not y.requires_grad:
                raise _no_gradient(knot)
            self._check("the network's output is not finite", y, knot, "check the network there")

            def pull(w: Tensor) -> Tensor:
                """w^T J of du/dth in u: J = r (p + q dy/dx)."""
                products = self.products(w, x, y, self.chunk)
                if products is None:
                    raise _no_gradient(knot)
                return r * (p * w + q * products)

            div = self.trace(pull, u, self.chunk)
            self._check("the network's derivative is not finite", div, knot, "check the network there")
        with torch.set_grad_enabled(self.grad):
            v = p * (r * u) + q * y.reshape(u.shape)
        return (v, div) if self.grad else (v.detach(), div.detach())

    def _cut(self, u: Tensor, v: Tensor, div: Tensor) -> Tensor:
        """log p_0 - log p_{t_min} at x, as -log alpha dL/dlog alpha - rho^2 dL/drho^2 of L = log p_{t_min}(x).

        x_t = alpha (x0 + rho eps) gives dL/dlog alpha = -d - x s and dL/drho^2 = alpha^2 (div s + |s|^2) / 2, s = -eps / sigma.
        """
        k, r = self.first, _radius(self.first)
        c, s = k.alpha / r, k.sigma / r
        if k.sigma == 0.0:
            return torch.zeros_like(u[:, 0])
        eps = s * u + c * v
        scaling = math.log(k.alpha) * (self.size - (u * eps).sum(1) / s)
        return scaling + 0.5 * (s * (s * self.size + c * div.mean(1)) - eps.square().sum(1))

    def _check(self, what: str, values: Tensor, knot: Knot, fix: str) -> None:
        """In a replay."""
        if not self.checking:
            return
        bad = ~values.detach().isfinite().reshape(len(values), -1).all(1)
        if bool(bad.any()):
            rows = self._samples(bad)
            raise NetworkError(
                f"{what} at t={knot.t:.6g} (sigma {knot.sigma:.4g}) in {len(rows)} samples (first: {rows[0]}): {fix}",
                t=knot.t,
                samples=rows,
            )

    def _samples(self, bad: Tensor) -> tuple[int, ...]:
        return tuple(self.row + i for i in bad.nonzero().flatten().tolist())


def _no_gradient(knot: Knot) -> NetworkError:
    return NetworkError(
        f"no gradient reaches x: at t={knot.t:g} the network's output has no graph back to its input, as under torch.no_grad, "
        "detach or numpy; the likelihood needs the network's derivative (if the output does not depend on x, return y + 0 * x)",
        t=knot.t,
    )


def _v_of(row: Row, k: Knot) -> tuple[float, float]:
    """(p, q) with cos(th) eps - sin(th) x0 = p x + q y, for the output y of this row."""
    if k.sigma == 0.0 and math.isinf(row.b):  # the score, or the velocity of VP: y is finite, so eps is 0
        return 0.0, 0.0
    r = _radius(k)
    return affine(row, k, -k.sigma / r, k.alpha / r)


def _log_prior(path: Path, last: Knot, z: Tensor, prior: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The log-density of z at t_max, (B,) float64."""
    if prior is None:
        std, d = path.prior_std(last.t), z[0:1].numel()
        return -0.5 * (z.double() / std).square().reshape(len(z), d).sum(1) - d * math.log(std * math.sqrt(2.0 * math.pi))
    value: Any = prior(z)
    if not isinstance(value, Tensor) or value.shape != (len(z),):
        raise InputError(f"prior(z) gave {_seen(value)} for z of shape {tuple(z.shape)}: give its log-density, ({len(z)},)")
    return value.double()


def _nothing(x: Tensor) -> _Result:
    empty = x.new_zeros(len(x))
    return x.detach().clone(), empty[:, None], empty


def _running(score: Predictor) -> Any:
    """The score's own context for a run (train mode), where it has one."""
    return score.running() if hasattr(score, "running") else nullcontext()  # pyright: ignore[reportAttributeAccessIssue]


# --- the boundary check -----------------------------------------------------------------------------------------------


def _check_score(score: Any) -> None:
    if not isinstance(score, Predictor):
        raise InputError(
            f"score is a {type(score).__name__}: wrap the network first, score = Score(network, path, predicts='eps')"
        )


def _check_state(x: Any) -> Tensor:
    """x0 in float32 at least."""
    if not isinstance(x, Tensor):
        hint = "torch.from_numpy(x0)" if type(x).__module__ == "numpy" else "torch.as_tensor(x0)"
        raise InputError(f"x0 is a {type(x).__name__}: give a floating-point tensor, {hint}")
    if not x.dtype.is_floating_point or x.layout is not torch.strided:
        raise InputError(
            f"x0 has dtype {x.dtype} and layout {x.layout}: give a dense floating-point tensor (levels: dequantise)"
        )
    if x.dim() == 0:
        raise InputError("x0 has no batch dimension: give shape (batch, ...)")
    bad = ~x.detach().isfinite().reshape(len(x), -1).all(1) if x.numel() else torch.zeros(0)
    if bool(bad.any()):
        raise InputError(f"x0 is not finite in {int(bad.sum())} of {len(x)} samples (first: {int(bad.nonzero()[0])})")
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_trace(trace: Any, probes: Any, law: Any, x: Tensor, limit: Any) -> tuple[str, int]:
    """(kind, probes)."""
    kind = trace if trace is not None else "exact" if probes is None else "hutchinson"
    if kind not in TRACES:
        raise InputError(f"trace={trace!r} is unknown: {nearest(trace, TRACES)}")
    if law not in PROBES:
        raise InputError(f"probe_law={law!r} is unknown: {nearest(law, PROBES)}")
    _check_count("probes", probes, none=True)
    _check_count("limit", limit)
    if kind == "exact":
        if probes is not None:
            raise InputError(f"probes={probes} and trace='exact' are both given: the exact trace takes none")
        d = x[0:1].numel() if len(x) else 0
        if d > limit:
            raise InputError(
                f"x0 has {d} numbers a sample: the exact trace costs {d} backward passes a network call (limit={limit}); "
                f"give probes=16 for an estimate with its standard error, or limit={d} for the exact one"
            )
        return kind, 0
    least = 4 if kind == "hutch++" else 1
    if probes is None or probes < least:
        raise InputError(f"probes={probes}: trace={kind!r} needs at least {least}, such as probes=16")
    return kind, probes


def _check_solver(method: Any, rtol: Any, atol: Any, steps: Any, max_nfe: Any, dtype: torch.dtype) -> None:
    if method not in ADAPTIVE + FIXED:
        raise InputError(f"method={method!r} is unknown: {nearest(method, ADAPTIVE + FIXED)}")
    _check_count("max_nfe", max_nfe)
    if (method in FIXED) != (steps is not None):
        wanted = "has fixed steps: give steps=, such as steps=50" if steps is None else "chooses its own steps: leave steps out"
        raise InputError(f"method={method!r} {wanted}")
    _check_count("steps", steps, none=True)
    floor = 8.0 * torch.finfo(dtype).eps
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
            raise InputError(f"{name}={value!r}: must be a number > 0")
        if name == "rtol" and method in ADAPTIVE and value < floor:
            raise InputError(f"rtol={value:g} is below the rounding of {dtype}: give rtol >= {floor:.1g}, or x0.double()")


def _check_times(path: Path, t_min: Any, t_max: Any) -> tuple[Knot, Knot]:
    """The knots of the data and of the prior."""
    first, last = path.t_min if t_min is None else t_min, path.T if t_max is None else t_max
    for name, value in (("t_min", first), ("t_max", last)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= path.T:
            raise InputError(f"{name}={value!r}: must be a number in [0, {path.T:g}]")
    if not first < last:
        raise InputError(f"t_min={first:g}, t_max={last:g}: give t_min < t_max")
    return path.knot(first), path.knot(last)


def _check_count(name: str, value: Any, *, none: bool = False) -> None:
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}={value!r}: must be an int >= 1")


def _seen(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
