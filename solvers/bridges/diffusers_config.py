"""What the keys of a diffusers scheduler mean: a path, the timesteps as labels of its times, and a grid.

    kind         path                           timestep of a time                                    state
    table        Tabulated(betas)               the entry's index; between entries linear in          VP
                                                log(sigma/alpha), as diffusers and k-diffusion do
    continuous   Trigonometric                  log(sigma/alpha) / 4                                  VP
    flow         Linear, time = sigma           num_train_timesteps * sigma                           flow

``sigmas`` are sigma/alpha for the first two and sigma for flows. A kind knows its path, the timesteps of knots (``labels``),
and, back from timesteps, the (alpha, sigma) that noise is added with (``levels``) and the times (``times``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sde.errors import InputError, nearest
from sde.path import BETA_SCHEDULES, Linear, Path, Tabulated, Trigonometric
from sde.prediction import Knot

from ..grids import GRIDS, make_grid
from ..grids_published import beta_quantiles, leading, normal, trailing

#: diffusers' ``prediction_type`` as the row of ``sde.prediction.OUTPUTS`` that the network returns.
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}
SPACINGS = ("trailing", "linspace", "leading")
ENDS = ("zero", "sigma_min")
RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


class Kind(Protocol):
    """How timesteps and times belong together."""

    @property
    def path(self) -> Path: ...

    def labels(self, knots: Sequence[Knot]) -> list[float]:
        """The timestep of each knot."""
        ...

    def levels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at timesteps of any shape, float64, on their device."""
        ...

    def times(self, labels: Sequence[float]) -> list[float]:
        """The path's time of each timestep."""
        ...

    def times_of_sigmas(self, sigmas: Sequence[float]) -> list[float]: ...

    def sigma(self, knot: Knot) -> float:
        """The noise level as diffusers counts it."""
        ...


class _VariancePreserving(ABC):
    """What both kinds on a VP path share: everything goes through l = log(sigma/alpha) = -lambda."""

    path: Any

    @abstractmethod
    def log_sigmas(self, labels: Tensor) -> Tensor:
        """l at timesteps, float64."""

    def levels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        level = 2.0 * self.log_sigmas(labels.to(torch.float64))
        return torch.sqrt(torch.sigmoid(-level)), torch.sqrt(torch.sigmoid(level))

    def times(self, labels: Sequence[float]) -> list[float]:
        return self.path.time(-self.log_sigmas(torch.tensor(labels, dtype=torch.float64))).tolist()

    def times_of_sigmas(self, sigmas: Sequence[float]) -> list[float]:
        return self.path.time(-torch.log(torch.tensor(sigmas, dtype=torch.float64))).tolist()

    def sigma(self, knot: Knot) -> float:
        return knot.sigma / knot.alpha if knot.alpha > 0.0 else math.inf


@dataclass(frozen=True, eq=False)
class Table(_VariancePreserving):
    """A table of betas, whose entries are the whole timesteps 0 ... N - 1."""

    path: Tabulated

    @cached_property
    def _log_sigmas(self) -> Tensor:
        """log(sigma/alpha) at the entries, rising; the last is infinite where the terminal SNR is zero."""
        return -self.path.lam(self.path.time_of(torch.arange(len(self.path.betas), dtype=torch.float64)))

    def labels(self, knots: Sequence[Knot]) -> list[float]:
        table, level = self._log_sigmas, torch.tensor([-k.lam for k in knots], dtype=torch.float64)
        i = (torch.searchsorted(table, level, right=True) - 1).clamp(0, len(table) - 2)
        share = ((level - table[i]) / (table[i + 1] - table[i])).clamp(0.0, 1.0)
        to_zero = table[i + 1].isinf()  # nothing is linear in an infinite logarithm: there alpha is linear in t
        index = self.path.index(torch.tensor([k.t for k in knots], dtype=torch.float64))
        return torch.where(to_zero, index, i + share).tolist()

    def log_sigmas(self, labels: Tensor) -> Tensor:
        table = self._log_sigmas.to(labels.device)
        i = labels.floor().clamp(0, len(table) - 2).long()
        share = (labels - i).clamp(0.0, 1.0)
        between = table[i] + torch.where(share > 0.0, share * (table[i + 1] - table[i]), 0.0)
        return torch.where(table[i + 1].isinf(), -self.path.lam(self.path.time_of(labels)), between)


@dataclass(frozen=True, eq=False)
class Continuous(_VariancePreserving):
    """Networks told log(sigma/alpha) / 4 on all noise levels (Stable Video Diffusion)."""

    path: Trigonometric = field(default_factory=Trigonometric)

    def labels(self, knots: Sequence[Knot]) -> list[float]:
        return [-0.25 * k.lam for k in knots]

    def log_sigmas(self, labels: Tensor) -> Tensor:
        return 4.0 * labels


@dataclass(frozen=True, eq=False)
class Flow:
    """x = (1 - sigma) x0 + sigma eps, told N sigma."""

    count: int
    path: Linear = field(default_factory=Linear)

    def labels(self, knots: Sequence[Knot]) -> list[float]:
        return [self.count * k.t for k in knots]

    def levels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        sigma = labels.to(torch.float64) / self.count
        return 1.0 - sigma, sigma

    def times(self, labels: Sequence[float]) -> list[float]:
        return [label / self.count for label in labels]

    def times_of_sigmas(self, sigmas: Sequence[float]) -> list[float]:
        return list(sigmas)

    def sigma(self, knot: Knot) -> float:
        return knot.sigma


# --- the kind of a configuration --------------------------------------------------------------------------------------


def kind_of(config: Any) -> Kind:
    """The kind that a scheduler's configuration describes; every key that matters is checked here."""
    count = config.num_train_timesteps
    _one_of("prediction_type", config.prediction_type, PREDICTIONS)
    _one_of("timestep_spacing", config.timestep_spacing, SPACINGS)
    _one_of("final_sigmas_type", config.final_sigmas_type, ENDS)
    _one_of("timestep_type", config.timestep_type, ("discrete", "continuous"))
    _one_of("time_shift_type", config.time_shift_type, ("exponential", "linear"))
    if config.grid is not None and config.grid not in GRIDS:
        raise InputError(f"grid={config.grid!r} is unknown: {nearest(config.grid, GRIDS)}; None follows timestep_spacing")
    respaced = [key for key in RESPACED if config[key]]
    if len(respaced) > 1 or (respaced and config.grid is not None):
        rivals = [*respaced, *(["grid"] if config.grid is not None else [])]
        raise InputError(f"{' and '.join(rivals)} are given: each makes the noise levels, so give one of them")
    if config.prediction_type == "flow_prediction":
        if config.invert_sigmas:
            raise InputError("invert_sigmas=True: this convention (t = 1 is data) is not supported; negate the output instead")
        return Flow(count)
    if config.timestep_type == "continuous":
        if not (config.sigma_min and config.sigma_max and (respaced or config.grid)):
            raise InputError("timestep_type='continuous' needs sigma_min, sigma_max and use_karras_sigmas=True (or grid=...)")
        if config.final_sigmas_type != "zero":
            raise InputError("timestep_type='continuous' has no table to end in: give final_sigmas_type='zero'")
        return Continuous()
    return Table(_betas(config))


def _betas(config: Any) -> Tabulated:
    count, zero = config.num_train_timesteps, bool(config.rescale_betas_zero_snr)
    if config.trained_betas is not None:
        return Tabulated(tuple(np.asarray(config.trained_betas, dtype=np.float64).tolist()), zero)
    _one_of("beta_schedule", config.beta_schedule, BETA_SCHEDULES)
    return BETA_SCHEDULES[config.beta_schedule](count, config.beta_start, config.beta_end, zero_terminal_snr=zero)


def _one_of(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise InputError(f"{name}={value!r} is unknown: give one of {', '.join(map(repr, known))}")


# --- the grid ---------------------------------------------------------------------------------------------------------


def grid_times(kind: Kind, config: Any, n: int | None, sigmas: Any, timesteps: Any, mu: float | None) -> list[float]:
    """The falling times of a run, the end included, from ``set_timesteps``'s arguments and the configuration.

    Lists hold one entry a step, noise first; the end (sigma = 0, or the table's first entry) is added, unless ``sigmas`` ends
    with 0 itself.
    """
    given = "timesteps" if timesteps is not None else "sigmas"
    if sigmas is not None and timesteps is not None:
        raise InputError("sigmas and timesteps are both given: one follows from the other, so give one")
    listed = _listed(given, sigmas if timesteps is None else timesteps, given == "timesteps" and not isinstance(kind, Flow))
    if listed is None and n is None:
        raise InputError("num_inference_steps is missing: give it, or a list of sigmas or timesteps")
    if n is not None and (isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1):
        raise InputError(f"num_inference_steps={n!r}: must be an int >= 1")
    if listed is not None and n is not None and len(listed) != n:
        raise InputError(f"num_inference_steps={n}, but {given} has {len(listed)} entries: leave num_inference_steps out")
    steps = len(listed) if listed is not None else int(n or 0)
    if isinstance(kind, Flow):
        head = kind.times(listed) if listed is not None and given == "timesteps" else listed
        return [*_flow_sigmas(kind, config, steps, head, mu), 0.0]
    if mu is not None:
        raise InputError(f"mu={mu!r}: only flows are shifted; leave it out for prediction_type={config.prediction_type!r}")
    if listed is None:
        return _vp_times(kind, config, steps)
    if config.grid is not None:
        raise InputError(f"grid={config.grid!r} and a list of {given}: each makes the times, so give one of them")
    times = [*(kind.times(listed) if given == "timesteps" else kind.times_of_sigmas(listed)), _stop(kind, config)]
    if times[-1] >= times[-2] * (1.0 - 1e-9):
        raise InputError(f"{given}[-1]={listed[-1]:g} is at or below the end, final_sigmas_type='sigma_min': leave it out")
    return times


def _stop(kind: Kind, config: Any) -> float:
    """Data, or the table's first entry."""
    return 0.0 if config.final_sigmas_type == "zero" else kind.path.t_min


def _vp_times(kind: Kind, config: Any, n: int) -> list[float]:
    path, stop = kind.path, _stop(kind, config)
    table = isinstance(kind, Table)
    if config.grid is not None:
        start = None if table else kind.times_of_sigmas([config.sigma_max])[0]
        return make_grid(config.grid, path, n, start, stop).tolist()
    if not table:
        return [*kind.times_of_sigmas(_respaced([config.sigma_max, config.sigma_min], n, config)), stop]
    spacing = {
        "trailing": trailing,
        "linspace": normal,
        "leading": partial(leading, offset=config.steps_offset, published=True),
    }
    times = spacing[config.timestep_spacing](path, n, None, stop).tolist()
    if not any(config[key] for key in RESPACED):
        return times
    ends = [kind.sigma(k) for k in path.knots([times[0], times[-2]])]
    return [*kind.times_of_sigmas(_respaced(ends, n, config)), stop]


def _respaced(ends: Sequence[float], n: int, config: Any) -> list[float]:
    """n noise levels between the same ends by one of Karras's, exponential or beta rules (``sigma_max``, ``sigma_min``
    replace the ends).
    """
    high = float(ends[0] if config.sigma_max is None else config.sigma_max)
    low = float(ends[-1] if config.sigma_min is None else config.sigma_min)
    if math.isinf(high):
        raise InputError("use_karras_sigmas and its like need a finite first sigma: give sigma_max, or no zero terminal SNR")
    ramp = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    if config.use_karras_sigmas:
        levels = (high ** (1.0 / 7.0) + ramp * (low ** (1.0 / 7.0) - high ** (1.0 / 7.0))) ** 7.0
    elif config.use_exponential_sigmas:
        levels = torch.exp(math.log(high) + ramp * (math.log(low) - math.log(high)))
    else:
        levels = low + (high - low) * beta_quantiles(max(n - 1, 1), 0.6, 0.6).flip(0)[:n]
    return levels.tolist()


def _flow_sigmas(kind: Flow, config: Any, n: int, listed: list[float] | None, mu: float | None) -> list[float]:
    """sigma -> k sigma / (1 + (k - 1) sigma), with k the shift, of the list given or of the default one.

    The default list is diffusers': from 1 to 1/N, or, with a static shift, to the shifted 1/N, which is thereby shifted twice;
    with ``use_flow_sigmas`` from 1 - 1/N, evenly, so that 0 is the next.
    """
    if config.use_dynamic_shifting and mu is None:
        raise InputError("mu is missing: use_dynamic_shifting=True shifts by the size of the image, which pipelines pass as mu")
    if config.grid is not None:
        # pipelines like Flux always pass this list, so it is no wish of the user's
        if listed is not None and not np.allclose(listed, np.linspace(1.0, 1.0 / n, n), rtol=1e-6, atol=0.0):
            raise InputError(f"grid={config.grid!r} and a list of sigmas: each makes the times, so give one of them")
        sigmas = make_grid(config.grid, kind.path, n, None, 0.0)[:-1].numpy()
    elif listed is not None:
        sigmas = np.array(listed)
    elif config.use_flow_sigmas:
        sigmas = np.linspace(1.0 - 1.0 / kind.count, 0.0, n + 1)[:-1]
    else:
        least = 1.0 / kind.count
        sigmas = np.linspace(1.0, _shifted(least, config, None), n)
    sigmas = _shifted(sigmas, config, mu)
    if config.shift_terminal and sigmas[-1] < 1.0:
        sigmas = 1.0 - (1.0 - sigmas) * ((1.0 - config.shift_terminal) / (1.0 - sigmas[-1]))
    return _respaced(sigmas.tolist(), n, config) if any(config[key] for key in RESPACED) else sigmas.tolist()


def every_timestep(kind: Kind, config: Any) -> list[float]:
    """All N timesteps that the network was trained on, noise first; those of flows under their static shift."""
    count = config.num_train_timesteps
    if not isinstance(kind, Flow):
        return [float(count - 1 - i) for i in range(count)]
    return [count * float(_shifted((count - i) / count, config, None)) for i in range(count)]


def _shifted(sigmas: Any, config: Any, mu: float | None) -> Any:
    if config.use_dynamic_shifting and mu is not None:
        k = math.exp(mu) if config.time_shift_type == "exponential" else float(mu)
    else:
        k = 1.0 if config.use_dynamic_shifting else float(config.flow_shift if config.use_flow_sigmas else config.shift)
    return k * sigmas / (1.0 + (k - 1.0) * sigmas)


def _listed(name: str, values: Any, zero: bool) -> list[float] | None:
    """A falling list of finite numbers: all > 0, with a last 0 taken for the end, or with ``zero`` >= 0 and taken as it is."""
    if values is None:
        return None
    try:
        numbers = np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}={values!r:.80}: give a list of numbers, noise first") from error
    if numbers.ndim == 1 and len(numbers) > 1 and numbers[-1] == 0.0 and not zero:
        numbers = numbers[:-1]
    if numbers.ndim != 1 or len(numbers) < 1 or not np.isfinite(numbers).all():
        raise InputError(f"{name}={values!r:.80}: give a list of finite numbers, noise first")
    rises = np.flatnonzero(np.diff(numbers) >= 0.0)
    if len(rises):
        i = int(rises[0]) + 1
        raise InputError(f"{name}[{i}]={numbers[i]:g} after {numbers[i - 1]:g}: the list must fall strictly, one entry a step")
    if numbers[-1] < 0.0 or (numbers[-1] == 0.0 and not zero):
        raise InputError(f"{name}[{len(numbers) - 1}]={numbers[-1]:g}: must be {'>= 0' if zero else '> 0'}")
    return numbers.tolist()
