"""torchdiffeq and torchsde behind the same call as every other solver.

Both may choose their own times between the grid's first and last one, and then have no table. Their step size is shared by
the batch (the norm of the error is an average), hence a sample depends on its batch mates, within the tolerance, unless
``per_sample=True``: then each sample is integrated by itself, which costs the calls of all of them. ``adaptive.py`` has step
control a sample with the network called on the whole batch.
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
        first = evaluator.tally.nfe
        if self.per_sample:
            out = one_by_one(lambda alone, row, _: self._solve(alone, row, grid, first), evaluator, x)
        else:
            out = self._solve(evaluator, x, grid, first)
        only_step(after, grid, out.x, self.method)
        return out

    def _solve(self, evaluator: Evaluator, x: Tensor, grid: list[Knot], first: int) -> Outcome:
        from torchdiffeq import odeint

        flow = _Flow(evaluator, grid[0], grid[-1], self.max_nfe, x, first)
        times = torch.tensor([grid[0].t, grid[-1].t], dtype=torch.float64, device=x.device)
        # step_t: not past the end. A first step that torchdiffeq chooses would carry a gradient, which times do not.
        options = {"dtype": torch.float64, "step_t": times[-1:], "first_step": 1e-3 * abs(grid[-1].t - grid[0].t)}
        try:
            y = odeint(flow, x, times, rtol=self.rtol, atol=self.atol, method=self.method, options=options)
        except NetworkError as error:
            error.step = flow.accepted
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


def one_by_one(solve: Callable[[Evaluator, Tensor, int], Outcome], evaluator: Evaluator, x: Tensor) -> Outcome:
    """Sample after sample: solve(an evaluator of sample i alone on the same count of calls, x[i : i + 1], i).

    The budget is that of the run, and what is reached when it is used up holds all samples.
    """
    parts = list[Outcome]()
    for i in range(len(x)):
        row = x[i : i + 1]
        conditions = rows_of(evaluator.conditions, slice(i, i + 1), len(x))
        try:
            parts.append(solve(Evaluator(evaluator.score, row, conditions, evaluator.eta_of, evaluator.tally), row, i))
        except StepLimitError as error:
            error.partial = torch.cat([*(p.x for p in parts), error.partial, x[i + 1 :]])
            raise
        except NetworkError as error:
            error.samples = tuple(i + j for j in error.samples)
            raise

    def total(kind: str) -> int | None:
        counts = [getattr(p, kind) for p in parts]
        return None if None in counts else sum(counts)

    return Outcome(torch.cat([p.x for p in parts]) if parts else x, total("accepted"), total("rejected"))


class _Flow:
    """The velocity as torchdiffeq's func(t, x), with its step callbacks."""

    def __init__(self, evaluator: Evaluator, s: Knot, t: Knot, max_nfe: int, x: Tensor, first: int) -> None:
        self.evaluator, self.low, self.high, self.max_nfe = evaluator, min(s.t, t.t), max(s.t, t.t), max_nfe
        self.ends = {s.t: s, t.t: t}
        self.accepted = self.rejected = 0
        self.first = first
        self.last, self.state, self.slope = s.t, x, x

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        if self.evaluator.tally.nfe - self.first + self.evaluator.score.calls() > self.max_nfe:
            raise out_of_calls(self.max_nfe, self.last, self.state, self.rejected)
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


def out_of_calls(max_nfe: int, t: float, partial: Tensor, rejected: int | None = None) -> StepLimitError:
    """The error of a run that has used up its calls at t; ``partial`` is the state reached."""
    steps = "" if rejected is None else f" ({rejected} steps rejected)"
    fix = "raise nfe= (of a solver object, max_nfe) or the tolerances"
    message = f"max_nfe={max_nfe} network calls used at t = {t:g}{steps}: {fix}"
    return StepLimitError(message, t=t, rejected=rejected or 0, partial=partial)


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
    ``adaptive`` torchsde controls the step by ``rtol`` and ``atol`` between the grid's ends and draws from its own
    BrownianInterval, whose path depends on its seed and on the steps; both are shared by the batch unless ``per_sample``:
    then each sample is integrated by itself, from a seed made of its own first normals. "srk" wants the diffusion as
    (B, d, d), which bounds the state's size.
    """

    method: str
    adaptive: bool = False
    rtol: float = 1e-3
    atol: float = 1e-3
    max_nfe: int = 10_000
    per_sample: bool = False

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
        d = x[0].numel() if len(x) else 0
        if self.method == "srk" and len(x) * d * d > 2**27:
            raise InputError(
                f"torchsde's srk needs a diffusion of shape ({len(x)}, {d}, {d}): too large; use torchsde_euler or "
                "'dpmpp_2m_sde'"
            )
        x = x.contiguous()
        if not self.adaptive:
            return self._solve(evaluator, x, grid, _Increments(draw, x.reshape(len(x), d)), after)
        noise = [_Interval(seed) for seed in _seeds(draw, grid[0], x)]
        if self.per_sample or not noise:
            out = one_by_one(lambda alone, row, i: self._solve(alone, row, grid, noise[i]), evaluator, x)
        else:
            out = self._solve(evaluator, x, grid, noise[0])
        only_step(after, grid, out.x, f"torchsde's adaptive {self.method}")
        return out

    def _solve(
        self, evaluator: Evaluator, x: Tensor, grid: list[Knot], noise: _Increments | _Interval, after: After = None
    ) -> Outcome:
        """torchsde from knot to knot, or with step control from end to end."""
        import torchsde

        y = x.reshape(len(x), -1) if x.numel() else x.new_empty(len(x), 0)
        options = {"method": self.method, "adaptive": self.adaptive, "rtol": self.rtol, "atol": self.atol}
        for i, (s, t) in enumerate([(grid[0], grid[-1])] if self.adaptive else itertools.pairwise(grid)):
            field = _Reverse(evaluator, s, t, x.shape, self)
            clock = torch.tensor([0.0, field.span], dtype=torch.float64, device=x.device)
            options["dt"] = field.span / (len(grid) - 1) if self.adaptive else field.span
            try:
                # autocast is for the network: torchsde's matrix products would round
                with torch.autocast(x.device.type, enabled=False):
                    y = torchsde.sdeint(field, y, clock, bm=noise.over(s, t, y), **options)[-1]
            except NetworkError as error:
                error.step = i
                raise
            except _NotFinite as error:
                (slope,) = error.args
                return Outcome((slope - slope).reshape(x.shape), None, None)  # NaN where it is not: a replay says why
            if after is not None:
                after(i, y.reshape(x.shape))
        return Outcome(y.reshape(x.shape), None, None)


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
            raise out_of_calls(self.solver.max_nfe, k.t, y.detach().reshape(self.shape).clone())
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

    def over(self, s: Knot, t: Knot, y: Tensor) -> Any:
        """The Brownian motion of the step from s to t."""
        self.step = s, t
        return self

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


@dataclass(frozen=True)
class _Interval:
    """The Brownian motion of a run with step control: torchsde's BrownianInterval, which the samples of the run share."""

    seed: int

    def over(self, s: Knot, t: Knot, y: Tensor) -> Any:
        """The Brownian motion from s to t."""
        from torchsde import BrownianInterval

        given = {"size": y.shape, "dtype": y.dtype, "device": str(y.device), "entropy": self.seed}
        return BrownianInterval(0.0, abs(t.t - s.t), levy_area_approximation="space-time", **given)


def _seeds(draw: Draw, start: Knot, x: Tensor) -> list[int]:
    """A seed a sample for generators that are not ours: the bits of its first numbers in four draws, some 100 of them (a normal
    in half precision has 10).
    """
    first = torch.stack([draw(k, start, start, x).reshape(len(x), -1)[:, 0] for k in range(4)], 1)
    bits = first.double().cpu().numpy()
    return [int.from_bytes(row.tobytes(), "little") for row in bits]
