"""Any sampler of SOLVERS on a denoiser of azula.

    from solvers.bridges.azula import Sampler
    sampler = Sampler(denoiser, "dpmpp_2m", steps=64)
    x0 = sampler(sampler.init((16, 3, 64, 64)), label=labels)

``denoiser(x, t, **kwargs).mean`` is E[x0] and ``denoiser.schedule(t)`` is (alpha, sigma), t = 1 noise and t = 0 data: our own
convention, so the path is the schedule as it is. azula itself is not imported: anything with these two will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError
from sde.path import FromFunctions

from ..grids import make_grid
from .replay import Output, Replay, check_traceable, drawer, source, traced


class Sampler:
    """``sampler(x, **kwargs)`` from x at ``start`` to ``stop``, in the shape of azula's own samplers.

    solver : a name of SOLVERS, or of another library, or a solver object, with a table;  eta : its noise level
    steps  : steps of the grid, a name of GRIDS or a function (path, n, start, stop) -> times; "uniform" is azula's own
    noise  : "white" or "brownian";  generator : a torch.Generator, or a list with one a sample (default: torch's global one);
             one number of it seeds a run
    silent : no progress bar

    kwargs are the denoiser's. Errors: InputError for a solver without a table or a schedule that is no path.
    """

    def __init__(
        self,
        denoiser: Any,
        solver: Any = "dpmpp_2m",
        *,
        steps: int = 64,
        grid: Any = "uniform",
        start: float = 1.0,
        stop: float = 0.0,
        eta: float | None = None,
        noise: str = "white",
        generator: Any = None,
        silent: bool = False,
    ) -> None:
        check_traceable(solver, "an azula sampler")
        if not callable(getattr(denoiser, "schedule", None)):
            raise InputError(f"denoiser is a {type(denoiser).__name__} without a schedule: give an azula denoiser")
        self.denoiser, self.noise, self.generator, self.silent = denoiser, noise, generator, silent
        self.path = path_of(denoiser.schedule)
        self._output = Output(self.path, "x0")
        self.plan = traced(solver, self._output, make_grid(grid, self.path, steps, start, stop), eta)

    @property
    def timesteps(self) -> Tensor:
        """The grid, (steps + 1,), float64."""
        return torch.tensor(self.plan.times, dtype=torch.float64)

    def init(self, shape: Sequence[int], mean: Any = 0.0, var: Any = 1.0, **kwargs: Any) -> Tensor:
        """A state at ``start``, N(alpha E[X], alpha^2 Var[X] + sigma^2); kwargs as for torch.randn."""
        knot = self.plan.grid[0]
        std = (torch.as_tensor(var, **kwargs) * knot.alpha**2 + knot.sigma**2).sqrt()
        generator = self.generator if isinstance(self.generator, torch.Generator) else None
        return knot.alpha * mean + std * torch.randn(*shape, generator=generator, **kwargs)

    @torch.no_grad()
    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        """The state at ``stop``, like x (B, ...)."""
        from tqdm.auto import tqdm

        streams = None

        def draw(k: int, s: Any, t: Any, like: Tensor) -> Tensor:
            nonlocal streams
            if streams is None:
                streams = drawer(source(self.noise, self.generator, len(like)))
            return streams(k, s, t, like)

        state = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        replay = Replay(self.plan, self._output, state, draw)
        with tqdm(total=self.plan.nfe, unit="call", disable=self.silent) as bar:
            while not replay.done:
                t = torch.tensor(replay.knot.t, dtype=state.dtype, device=x.device)
                replay.send(self.denoiser(replay.state.to(x.dtype), t, **kwargs).mean.to(state.dtype))
                bar.update()
        return replay.state.to(x.dtype)


@lru_cache(maxsize=64)
def path_of(schedule: Any) -> FromFunctions:
    """The path (alpha, sigma) of a schedule, checked once."""
    return FromFunctions(lambda t: schedule(t)[0].double(), lambda t: schedule(t)[1].double(), t_min=0.0)
