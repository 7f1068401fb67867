"""torchdiffeq and torchsde behind the same call as every other solver.

Both choose their own times between the grid's first and last one, so they have no table. torchdiffeq's step size is shared
by the batch (its error
norm is an average), hence a sample depends on its batch mates by rounding of the step control unless ``per_sample=True``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde.errors import InputError, NetworkError, PathError, StepLimitError
from sde.prediction import Knot, rows_of

from .base import Evaluator, non_finite

Draw = Callable[[int, Knot, Knot, Tensor], Tensor]
After = Callable[[int, Tensor], Any] | None


class Outcome(NamedTuple):
    """What a run hands back: the last state, accepted and rejected steps of step control, the last step's carry."""

    x: Tensor
    accepted: int | None
    rejected: int | None
    carry: Any = None


@dataclass(frozen=True)
class TorchDiffEq:
    """An adaptive Runge-Kutta pair of torchdiffeq on dx/dt = alpha' x0 + sigma' eps, between the ends of the grid.

    The last step lands on the last time (torchdiffeq alone steps past it and calls the network there). ``max_nfe`` bounds
    the work; what is reached then is the ``partial`` of a StepLimitError. ``per_sample`` integrates the samples one by one.
    """

    method: str
    rtol: float = 1e-3
    atol: float = 1e-3
    max_nfe: int = 10_000
    per_sample: bool = False

    order = weak = strong = None
    stages = 1
    stochastic = takes_eta = False
    linear = False
    adaptive = True

    def __post_init__(self) -> None:
        check_control(self)
        if self.method not in (
            "dopri5",
            "dopri8",
            "bosh3",
            "adaptive_heun",
        ):  # fehlberg2's error runs to 200 times its tolerance here
            raise InputError(f"method={self.method!r}: use dopri5, dopri8, bosh3 or adaptive_heun")

    def solve(self, evaluator: Evaluator, x: Tensor, grid: list[Knot], draw: Draw, after: After = None) -> Outcome:
        x = x.contiguous()  # its norm of the error rounds with the layout
        for k in (grid[0], grid[-1]):
            if not math.isfinite(k.dsigma + k.dalpha):
                raise InputError(
                    f"the slope of x in t is infinite at t = {k.t:g} (sigma' = {k.dsigma:g}): give start or stop off it, "
                    "such as t_min"
                )
        if self.per_sample:
            parts = self._each(evaluator, x, grid)
            accepted, rejected = (sum(getattr(p, kind) for p in parts) for kind in ("accepted", "rejected"))
            out = Outcome(torch.cat([p.x for p in parts]), accepted, rejected)
        else:
            out = self._solve(evaluator, x, grid)
        only_step(after, grid, out.x, self.method)
        return out

    def _each(self, evaluator: Evaluator, x: Tensor, grid: list[Knot]) -> list[Outcome]:
        """Sample after sample, within one budget; what is reached when it is used up holds all samples."""
        parts, first = list[Outcome](), evaluator.tally.nfe
        for i in range(len(x)):
            try:
                parts.append(self._solve(_alone(evaluator, x, i), x[i : i + 1], grid, i, first))
            except StepLimitError as error:
                error.partial = torch.cat([*(p.x for p in parts), error.partial, x[i + 1 :]])
                raise
        return parts

    def _solve(self, evaluator: Evaluator, x: Tensor, grid: list[Knot], row: int = 0, first: int | None = None) -> Outcome:
        from torchdiffeq import odeint

        flow = _Flow(evaluator, grid[0], grid[-1], self.max_nfe, x, first)
        times = torch.tensor([grid[0].t, grid[-1].t], dtype=torch.float64, device=x.device)
        # step_t: not past the end. A first step that torchdiffeq chooses would carry a gradient, which times do not.
        options = {"dtype": torch.float64, "step_t": times[-1:], "first_step": 1e-3 * abs(grid[-1].t - grid[0].t)}
        try:
            y = odeint(flow, x, times, rtol=self.rtol, atol=self.atol, method=self.method, options=options)
        except NetworkError as error:
            error.step, error.samples = flow.accepted, tuple(row + i for i in error.samples)
            raise
        except (AssertionError, _NotFinite) as error:  # torchdiffeq's "underflow in dt": a slope is not finite or too steep
            for seen in (flow.slope, flow.state):
                if non_finite(seen):
                    return Outcome(seen - seen, flow.accepted, flow.rejected)  # NaN where it is not: a replay says why
            raise StepLimitError(
                f"{self.method}: the step size vanished at t = {flow.last:g}: the field is too steep there; raise the "
                f"tolerances (rtol={self.rtol:g}) or stop earlier",
                t=flow.last,
                rejected=flow.rejected,
                partial=flow.state,
            ) from error
        return Outcome(torch.as_tensor(y[-1]), flow.accepted, flow.rejected)


def _alone(evaluator: Evaluator, x: Tensor, i: int) -> Evaluator:
    """The evaluator of a batch of which only sample i is left, on the same count of calls."""
    conditions = rows_of(evaluator.conditions, slice(i, i + 1), len(x))
    return Evaluator(evaluator.score, x[i : i + 1], conditions, evaluator.eta_of, evaluator.tally)


class _Flow:
    """The velocity as torchdiffeq's func(t, x), with its step callbacks."""

    def __init__(self, evaluator: Evaluator, s: Knot, t: Knot, max_nfe: int, x: Tensor, first: int | None) -> None:
        self.evaluator, self.low, self.high, self.max_nfe = evaluator, min(s.t, t.t), max(s.t, t.t), max_nfe
        self.ends = {s.t: s, t.t: t}
        self.accepted = self.rejected = 0
        self.first = evaluator.tally.nfe if first is None else first
        self.last, self.state, self.slope = s.t, x, x

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        if self.evaluator.tally.nfe - self.first + self.evaluator.score.calls() > self.max_nfe:
            raise StepLimitError(
                f"max_nfe={self.max_nfe} network calls used at t = {self.last:g} ({self.rejected} steps rejected): "
                "raise max_nfe or the tolerances",
                t=self.last,
                rejected=self.rejected,
                partial=self.state,
            )
        if math.isnan(t.detach()):
            raise _NotFinite(self.slope)
        at = min(max(float(t.detach()), self.low), self.high)
        for end in (self.low, self.high):  # torchdiffeq asks just outside and just inside its ends: they are the end itself
            if abs(at - end) <= 1e-12 * (self.high - self.low):
                at = end
        knot = self.ends.get(at) or self.evaluator.path.knot(at)
        self.slope = self.evaluator.predict(x, knot).combine(knot.dalpha, knot.dsigma).to(x.dtype)
        return self.slope

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.last, self.state = float(t0.detach()), y0

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.rejected += 1
        if non_finite(self.slope):  # every stage feeds the last one: no smaller step will do
            raise _NotFinite(self.slope)


def check_control(solver: Any) -> None:
    for name in ("rtol", "atol"):
        value = getattr(solver, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
            seen = type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)
            raise InputError(f"{name}={seen}: must be a number > 0")
    if isinstance(solver.max_nfe, bool) or not isinstance(solver.max_nfe, int) or solver.max_nfe < 1:
        raise InputError(f"max_nfe={solver.max_nfe!r}: must be an int >= 1")


class _NotFinite(Exception):
    """Leaves torchdiffeq's loop."""


def only_step(after: After, grid: list[Knot], x: Tensor, method: str) -> None:
    """Callbacks of a solver that chooses its own steps: one, at the end."""
    if after is None:
        return
    if len(grid) > 2:
        raise InputError(
            f"callback, trajectory and progress follow the grid, but {method} chooses its own steps: give two times, or "
            "integrate in parts"
        )
    after(0, x)


@dataclass(frozen=True)
class TorchSDE:
    """A method of torchsde on the reverse SDE: "euler" and "milstein" (equal here, orders 1) or "srk" (Roessler's SRA for
    additive noise).

    srk has weak order 2 and strong order 1.5; where the score is affine (Gaussian data) its strong order is 2.

    Fixed steps are those of the grid. Their normals come from ``sde.noise``, so sample i depends on (seed, i) alone. With
    ``adaptive`` torchsde controls the step by ``rtol`` and ``atol`` between the grid's ends, and draws from its own
    BrownianInterval, shared by the batch. "srk" wants the diffusion as (B, d, d), which bounds the state's size.
    """

    method: str
    adaptive: bool = False
    rtol: float = 1e-3
    atol: float = 1e-3
    max_nfe: int = 10_000

    order = None
    stochastic = takes_eta = True
    linear = False

    def __post_init__(self) -> None:
        if self.method not in ("euler", "milstein", "srk"):
            raise InputError(f"method={self.method!r}: use euler, milstein or srk")
        check_control(self)

    @property
    def stages(self) -> int:
        return 2 if self.method == "srk" else 1

    @property
    def areas(self) -> bool:
        """Whether a step draws the area under the Brownian path beside its increment."""
        return self.method == "srk"

    @property
    def reduced(self) -> TorchSDE:
        """The one-call method."""
        return TorchSDE("euler")

    @property
    def weak(self) -> float | None:
        return None if self.adaptive else 2.0 if self.method == "srk" else 1.0

    @property
    def strong(self) -> float | None:
        return None if self.adaptive else 1.5 if self.method == "srk" else 1.0

    def solve(self, evaluator: Evaluator, x: Tensor, grid: list[Knot], draw: Draw, after: After = None) -> Outcome:
        import torchsde

        d = x[0].numel() if len(x) else 0
        if self.method == "srk" and len(x) * d * d > 2**27:
            raise InputError(
                f"torchsde's srk needs a diffusion of shape ({len(x)}, {d}, {d}): too large; use torchsde_euler or "
                "'dpmpp_2m_sde'"
            )
        y = x.reshape(len(x), d).contiguous()
        steps = [(grid[0], grid[-1])] if self.adaptive else list(itertools.pairwise(grid))
        bm: Any = _Increments(draw, y)
        for i, (s, t) in enumerate(steps):
            span = abs(t.t - s.t)
            if self.adaptive:
                first = draw(0, s, s, x)  # the run's seed, through its first normals
                entropy = int(first.reshape(-1)[0].double().view(torch.int64)) & (2**31 - 1)
                kind = "space-time" if self.method == "srk" else "none"
                bm = torchsde.BrownianInterval(
                    0.0, span, size=y.shape, dtype=x.dtype, device=str(x.device), entropy=entropy, levy_area_approximation=kind
                )
            else:
                bm.step = s, t
            field = _Reverse(evaluator, s, t, x.shape, self)
            clock = torch.tensor([0.0, span], dtype=torch.float64, device=x.device)
            dt = span / (len(grid) - 1) if self.adaptive else span
            options = {"dt": dt, "adaptive": self.adaptive, "rtol": self.rtol, "atol": self.atol}
            try:
                with torch.autocast(
                    x.device.type, enabled=False
                ):  # its matrix products would round; autocast is for the network
                    y = torchsde.sdeint(field, y, clock, bm=bm, method=self.method, **options)[-1]
            except NetworkError as error:
                error.step = i
                raise
            except _NotFinite as error:
                (slope,) = error.args
                return Outcome((slope - slope).reshape(x.shape), None, None)  # NaN where it is not: a replay says why
            if after is not None and not self.adaptive:
                after(i, y.reshape(x.shape))
        out = y.reshape(x.shape)
        if self.adaptive:
            only_step(after, grid, out, f"torchsde's adaptive {self.method}")
        return Outcome(out, None, None)


class _Reverse:
    """The reverse SDE from s to t in torchsde's increasing clock tau = |u - s|."""

    sde_type = "ito"

    def __init__(self, evaluator: Evaluator, s: Knot, t: Knot, shape: torch.Size, solver: TorchSDE) -> None:
        self.evaluator, self.shape, self.solver = evaluator, shape, solver
        self.start, self.stop, self.span = s, t, abs(t.t - s.t)
        self.direction = 1.0 if t.t > s.t else -1.0
        self.noise_type = "additive" if solver.method == "srk" else "diagonal"
        device = evaluator.x.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.cast = lambda: torch.autocast(device, dtype=dtype, enabled=enabled)  # the caller's, for the network
        self._seen: tuple[float, Tensor, int | None] | None = None
        self._value: Tensor | None = None

    def _knot(self, tau: Any) -> Knot:
        tau = float(tau)
        if tau <= 0.0 or tau >= self.span:
            return self.start if tau <= 0.0 else self.stop
        return self.evaluator.path.knot(self.start.t + self.direction * tau)

    def f(self, tau: Any, y: Tensor) -> Tensor:
        # torchsde checks the contract with one call at the start, which is the first step's own: evaluated once
        version = None if y.is_inference() else y._version
        if self._seen is not None and self._seen[0] == float(tau) and self._seen[1] is y and self._seen[2] == version:
            return self._value  # pyright: ignore[reportReturnType]
        k = self._knot(tau)
        if self.evaluator.tally.nfe + self.evaluator.score.calls(k) > self.solver.max_nfe:
            state = y.detach().reshape(self.shape).clone()
            raise StepLimitError(
                f"max_nfe={self.solver.max_nfe} network calls used at t = {k.t:g}: raise max_nfe or the tolerances",
                t=k.t,
                partial=state,
            )
        eta = self.evaluator.eta(k)
        extra = 0.0 if eta == 0.0 else 0.5 * eta * eta * k.g2 / k.sigma if k.sigma > 0.0 else math.inf
        if not math.isfinite(k.dsigma + extra):
            raise PathError(
                f"the drift is infinite at t = {k.t:g} (sigma' = {k.dsigma:g}, g^2 = {k.g2:g}, eta = {eta:g}): "
                "start elsewhere, or use 'ddpm', whose step is finite there"
            )
        with self.cast():
            prediction = self.evaluator.predict(y.reshape(self.shape), k)
        drift = prediction.combine(k.dalpha, k.dsigma + extra)
        value = (self.direction * drift).reshape(y.shape)
        if self.solver.adaptive and non_finite(value):  # no smaller step will do
            raise _NotFinite(value)
        self._seen, self._value = (float(tau), y, version), value
        return value

    def g(self, tau: Any, y: Tensor) -> Tensor:
        k = self._knot(tau)
        size = self.evaluator.eta(k) * math.sqrt(k.g2)
        if self.noise_type == "diagonal":
            return torch.full_like(y, size)
        return (size * torch.eye(y.shape[1], dtype=y.dtype, device=y.device)).expand(y.shape[0], -1, -1)


class _Increments:
    """The Brownian increment of one step for torchsde, drawn from ``sde.noise``; with the space-time area U where it is
    asked for.
    """

    def __init__(self, draw: Draw, y: Tensor) -> None:
        self.draw, self.count = draw, 0
        self.shape, self.dtype, self.device, self.like = tuple(y.shape), y.dtype, y.device, y
        self.levy_area_approximation = "space-time"
        self.step: tuple[Knot, Knot]

    def size(self) -> tuple[int, ...]:
        return self.shape

    def _normal(self, s: Knot, t: Knot) -> Tensor:
        self.count += 1
        return self.draw(self.count - 1, s, t, self.like).reshape(self.shape)

    def __call__(self, ta: Any, tb: Any, return_U: bool = False, return_A: bool = False) -> Any:
        h = float(tb) - float(ta)
        s, t = self.step
        w = math.sqrt(h) * self._normal(s, t)
        if not return_U:
            return w
        # int_ta^tb (W_s - W_ta) ds = h (W/2 + H) with H ~ N(0, h/12) independent of W
        return w, h * (0.5 * w + math.sqrt(h / 12.0) * self._normal(s, s))
