"""Any sampler of SOLVERS on a velocity of flow_matching.

    from solvers.bridges.flow_matching import ODESolver
    x1 = ODESolver(velocity_model, "dpmpp_2m").sample(x_init=x0, step_size=0.05, label=labels)

``velocity_model(x=x, t=t, **extras)`` returns dx/dt in their time, 0 noise and 1 data, t of shape (). Ours is 1 - t, so their
velocity is -(alpha' x0 + sigma' eps). The path is the one that the model was trained on, given as their scheduler or as one of
``sde``; by default it is theirs, CondOT, which is our Linear. flow_matching itself is not imported.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError
from sde.path import FromFunctions, Linear, Path
from sde.prediction import Knot, Row

from .replay import Output, Replay, check_traceable, drawer, source, traced


class ODESolver:
    """``sample`` in the shape of flow_matching's own ODESolver, by any solver with a table.

    solver    : a name of SOLVERS, or of another library, or a solver object;  eta : the noise level, where it takes one
    path      : a ``sde.Path`` on [0, 1], noise at 1; or a scheduler of flow_matching, t -> (alpha_t, sigma_t), data at 1
    generator : a torch.Generator, or a list with one a sample, for solvers that draw noise (default: torch's global one)
    """

    def __init__(
        self, velocity_model: Any, solver: Any = "euler", *, path: Any = None, eta: float | None = None, generator: Any = None
    ) -> None:
        check_traceable(solver, "flow_matching")
        self.velocity_model, self.solver, self.eta, self.generator = velocity_model, solver, eta, generator
        self.path = Linear() if path is None else path if isinstance(path, Path) else path_of(path)
        if self.path.T != 1.0:
            raise InputError(f"path={self.path} ends at T = {self.path.T:g}: their time is in [0, 1], give a path with T = 1")
        self._output = Output(self.path, _row)

    def sample(
        self,
        x_init: Tensor,
        step_size: float | None = None,
        steps: int | None = None,
        time_grid: Any = (0.0, 1.0),
        return_intermediates: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> Tensor:
        """The state at time_grid[-1] from x_init (B, ...) at time_grid[0]; decreasing times go from data to noise.

        step_size            : the length of steps; the last before an entry of ``time_grid`` is shorter where it must be
        steps                : or the number of equal steps between two entries; without either they are the steps themselves
        return_intermediates : the states at all entries, (len(time_grid), B, ...)
        """
        times, marks = _their_times(torch.as_tensor(time_grid, dtype=torch.float64).tolist(), step_size, steps)
        plan = traced(self.solver, self._output, [1.0 - t for t in times], self.eta)
        state = x_init.float() if x_init.dtype in (torch.float16, torch.bfloat16) else x_init
        kept = [state]
        streams = drawer(source("white", self.generator, len(state))) if plan.draws else None

        def after(i: int, x: Tensor) -> None:
            if return_intermediates and i + 1 in marks:
                kept.append(x)

        with torch.set_grad_enabled(enable_grad):
            replay = Replay(plan, self._output, state, streams, after)
            while not replay.done:
                t = torch.tensor(1.0 - replay.knot.t, dtype=state.dtype, device=state.device)
                y = self.velocity_model(x=replay.state.to(x_init.dtype), t=t, **model_extras)
                replay.send(y.to(state.dtype))
            out = torch.stack(kept) if return_intermediates else replay.state
        return out.to(x_init.dtype)


def _row(knot: Knot) -> Row:
    return Row(-knot.dalpha, -knot.dsigma)


def path_of(scheduler: Any) -> FromFunctions:
    """The path of a scheduler of flow_matching, in our time.

    A cosine of pi / 2 is 6e-17, which would make the last step one to lambda = 37: at the ends, such a number is 0.
    """

    def exact(value: Tensor, at_end: Tensor) -> Tensor:
        rounding = at_end & (value.abs() < 1e-6)
        return torch.where(rounding, value - value.detach(), value)  # the slope stays

    return FromFunctions(
        lambda t: exact(scheduler(1.0 - t).alpha_t.double(), t == 1.0),
        lambda t: exact(scheduler(1.0 - t).sigma_t.double(), t == 0.0),
    )


def _their_times(entries: list[float], step_size: float | None, steps: int | None) -> tuple[list[float], set[int]]:
    """(their times, the end included; which of them are ``entries``)."""
    if step_size is not None and steps is not None:
        raise InputError(f"step_size={step_size!r} and steps={steps!r} are both given: give one")
    if step_size is not None and not step_size > 0.0:
        raise InputError(f"step_size={step_size!r}: must be > 0, or None for the steps of time_grid")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InputError(f"steps={steps!r}: must be an int >= 1")
    times, marks = [entries[0]], {0}
    for a, b in itertools.pairwise(entries):
        count = steps or 1 if step_size is None else max(1, math.ceil(abs(b - a) / step_size - 1e-9))
        step = (b - a) / count if step_size is None else math.copysign(step_size, b - a)
        times += [*(a + i * step for i in range(1, count)), b]
        marks.add(len(times) - 1)
    return times, marks
