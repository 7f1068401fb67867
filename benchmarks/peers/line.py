"""A sampler of another library as a line of a sweep: how it is run, and how many of its steps a budget buys.

Budgets. A library counts steps in its own way, so its calls are counted: its loop is run on two samples of four numbers with a
network that does nothing, and the largest number of steps whose calls fit the budget is taken. What is reported is what the
meter at the real network has counted.

Noise. Stochastic samplers draw from torch's global generator, which is seeded by (seed, first index) around the run and put
back after it; a sample then depends on its batch, so such a line is ``joint``, and so is one whose steps look at a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, NetworkError, ToolkitError, nearest
from sde.path import Path
from sde.prediction import Knot
from solvers import GRIDS

from ..lines import Made, Meter
from .base import Library, Sampler
from .network import Bare, BudgetError, Network, Wrapped
from .task import Task


@dataclass(frozen=True, eq=False)
class PeerLine:
    """A sampler of a library with its options: a ``benchmarks.lines.Line``."""

    library: Library
    short: str
    given: tuple[tuple[str, Any], ...] = ()
    _steps: dict[Any, int] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        words = ",".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in self.given)
        return f"{self.library.name}/{self.short}{':' if words else ''}{words}"

    @property
    def version(self) -> str:
        return f"{self.library.name} {self.library.version}"

    @property
    def sampler(self) -> Sampler:
        return self.library.samplers[self.short]

    @cached_property
    def options(self) -> dict[str, Any]:
        return {**self.sampler.options, **dict(self.given)}

    @property
    def joint(self) -> bool:
        return self.sampler.adaptive or self.sampler.noisy(self.options) or self.sampler.takes_eta

    @property
    def to_zero(self) -> bool:
        """Whether it ends at sigma = 0, one step past the end it is given: its exact end point is the one there."""
        return self.sampler.to_zero(self.options)

    def flow(self, eta: float | None) -> bool:
        return not self.sampler.noisy(self._with(eta))

    def _with(self, eta: float | None) -> dict[str, Any]:
        """The options with --eta, which loses against an eta of the line itself."""
        own = "eta" in dict(self.given)
        return {**self.options, "eta": eta} if self.sampler.takes_eta and eta is not None and not own else self.options

    def refuses(
        self, score: Meter, *, nfe: int, grid: str, eta: float | None, start: float | None, stop: float | None
    ) -> str | None:
        """Why it cannot be run so: its grids, its noise level, the steps that the budget buys."""
        path = score.path
        ends = path.knot(path.T if start is None else start), path.knot(path.t_min if stop is None else stop)
        try:
            self.check(grid, eta)
            if not self.sampler.adaptive:
                self.steps(path, *ends, nfe, grid, eta)
        except ToolkitError as error:
            return str(error)
        return None

    def run(
        self,
        score: Meter,
        x: Tensor,
        *,
        nfe: int,
        grid: str,
        seed: int,
        indices: Sequence[int],
        eta: float | None,
        start: float | None,
        stop: float | None,
    ) -> Made:
        """Samples from the start noise x by the library's own loop, with at most ``nfe`` calls of the network."""
        path = score.path
        ends = path.knot(path.T if start is None else start), path.knot(path.t_min if stop is None else stop)
        self.check(grid, eta)
        n = nfe if self.sampler.adaptive else self.steps(path, *ends, nfe, grid, eta)
        network = Wrapped(score, x.dtype, x.shape, nfe)
        with torch.no_grad(), running(score):
            found = self.loop(network, x, path, *ends, n, grid, eta, seed * 1_000_003 + (indices[0] if len(indices) else 0))
        return Made(found.to(x.dtype), None if self.sampler.adaptive else n)

    def loop(
        self,
        network: Network,
        x: Tensor,
        path: Path,
        start: Knot,
        stop: Knot,
        n: int,
        grid: str,
        eta: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """The library's loop of n of its steps, whatever the network. Its own errors become one that names the line."""
        options = self._with(eta)
        task = Task(network, x, path, start, stop, n, grid, options, options.get("eta"))
        module = self.library.module()
        with warnings.catch_warnings(), seeded(seed, x.device) if self.sampler.noisy(options) else nullcontext():
            warnings.simplefilter("ignore", FutureWarning)  # of what libraries deprecate in themselves
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", "Should have t[ab]", UserWarning)  # torchsde, of times it has rounded itself
            try:
                return self.sampler.run(module, task)
            except BudgetError as error:
                raise InputError(self._too_many(str(error), n)) from None
            except (ToolkitError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                cause = error
                while cause is not None and not isinstance(cause, NetworkError):
                    cause = cause.__cause__ or cause.__context__
                if cause is not None:
                    raise cause from error
                said = f"{type(error).__name__}: {str(error)[:200]}"
                raise InputError(f"{self.name} raised {said} with {n} steps on {grid}") from error

    def _too_many(self, said: str, n: int) -> str:
        looser = "allow more, or a looser tolerance such as rtol=1e-2,atol=1e-2"
        return f"{self.name} wants {said}: " + (looser if self.sampler.adaptive else f"{n} of its steps cost more than counted")

    def check(self, grid: str, eta: float | None) -> None:
        """InputError: a grid that the sampler does not have, or a noise level that it does not take."""
        known = self.sampler.grids
        if grid not in (GRIDS if known is None else known):
            hint = nearest(grid, GRIDS) if known is None else f"it runs on {', '.join(known)}"
            raise InputError(f"{self.name} does not run on the grid {grid!r}: {hint}")
        if eta is not None and not self.sampler.takes_eta and (eta != 0.0 or self.sampler.noisy(self.options)):
            raise InputError(f"--eta {eta:g}: {self.name} has no noise level that could be set")

    # --- steps for a budget

    def steps(self, path: Path, start: Knot, stop: Knot, nfe: int, grid: str, eta: float | None = None) -> int:
        """The most steps whose calls fit the budget, found by counting. InputError: one step costs more, the library cannot
        run this many, or gives NaN; fewer steps than the budget buys would be another sampler than the one asked for.
        """
        if nfe < 1:
            raise InputError(f"nfe={nfe}: {self.name} needs at least 1 network call")
        key = path, start.t, stop.t, nfe, grid, eta
        if key not in self._steps:
            trial = cache(lambda n: self.trial(path, start, stop, n, grid, eta))
            n = self._most(lambda n: trial(n)[0], nfe)
            if not trial(n)[1]:
                raise InputError(f"{self.name} gives NaN or infinity with {n} steps on {grid}, whatever the network")
            self._steps[key] = n
        return self._steps[key]

    def _most(self, calls: Callable[[int], int], nfe: int) -> int:
        """The largest n with calls(n) <= nfe, which grows with n: down in proportion from n = nfe, then up one by one. Counts
        that raise are passed over, unless what is left would not spend the budget.
        """
        n, refused = nfe, None
        while True:
            try:
                cost = calls(n)
                if cost <= nfe:
                    break
                said, lower = f"a run takes at least {cost} network calls", n * nfe // cost
            except InputError as error:
                refused = refused or error
                said, lower = str(refused), n - 1
            if n == 1:
                raise InputError(f"nfe={nfe}: {self.name}: {said}")
            n = max(1, min(n - 1, lower))
        with suppress(InputError):
            while n < nfe and calls(n + 1) <= nfe:
                n += 1
        if refused is not None and calls(n) < nfe:
            raise refused
        return n

    def trial(self, path: Path, start: Knot, stop: Knot, n: int, grid: str, eta: float | None = None) -> tuple[int, bool]:
        """Network calls of n steps, counted on two samples of four numbers with x -> x / 2; and whether that run stayed finite:
        where not, its coefficients are not.
        """
        network = Bare(0.5, most=64 * n + 64)
        x = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64).reshape(2, 4) * path.prior_std(start.t)
        with torch.no_grad():
            out = self.loop(network, x, path, start, stop, n, grid, eta)
        return network.calls, bool(out.isfinite().all())


# --- around a run -----------------------------------------------------------------------------------------------------------


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators start from this seed; after, they are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed % (1 << 63))
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """For libraries that make their grids in torch's default dtype: the state's, so that they are as good as they can be."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def running(score: Any) -> AbstractContextManager[None]:
    """Around a run: the network in the mode that its score asks for."""
    found = getattr(score, "running", None)
    return nullcontext() if found is None else found()
