"""The times that a diffusers scheduler visits: what a comparison with its own loop needs, and the scale of its first noise.

``published(scheduler, n)`` is ``set_timesteps(n)`` in the path's own time. Networks are called at all times but the last:

    grid = published(scheduler, 30)
    out = solvers.integrate("edm_euler", score, grid.start * noise, grid.times)

or ``sample(score, ..., steps=30, grid=lambda path, n, start, stop: published(scheduler, n).times)``.

``start`` is the standard deviation of the first state in the path's coordinates. diffusers' sigma-based classes keep x / alpha
and multiply the noise by ``init_noise_sigma``: sigma for "linspace" and "trailing", sqrt(sigma^2 + 1) for "leading", whence
start is sigma alpha or 1. Classes that keep x, and flows, start at 1; EDM at sqrt(sigma_max^2 + 1); the consistency model at
sigma_max.

Lists are those of the released code (0.42.1), also where that is odd:

- "leading" starts below the last entry, and DDIM with it asks the network less noise than there is (Lin et al. 2024).
- DDIM steps to the entry N // n below, whatever the next timestep is: its "linspace", and "trailing" where n does not divide N,
  label a state with a time that is not its own. The list here is that of the labels.
- "trailing" lists entry -1 as well for some n (61, 103, ...): refused.
- FlowMatchEuler shifts twice: sigma_min is shifted already when the evenly spaced list is made of it and shifted again.
  ``sigmas=`` (what the pipelines of Flux, Qwen-Image, Lumina 2 and Z-Image pass: linspace(1, 1/n, n)) are shifted once.
- UniPC on a flow starts at sigma = 1 - 1e-6.
- Where the last two sigmas are equal the last call moves nothing; it is left out, so that times fall strictly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sde.errors import InputError
from sde.path import Path, Tabulated

from .diffusers_schedules import SCHEDULERS, Get, Known, read, schedule, table

Array = NDArray[np.float64]


class Published(NamedTuple):
    """``times`` (n + 1,) float64, falling, in the path's own time; ``start``: the first state is start * normal noise."""

    times: Tensor
    start: float


@dataclass(frozen=True)
class _Wish:
    """What is asked of a grid: n calls, and for flows the shift mu or the sigmas before the shift."""

    n: int
    mu: float | None
    sigmas: Array | None


def published(
    scheduler: Any,
    n: int,
    *,
    mu: float | None = None,
    image_tokens: int | None = None,
    sigmas: Sequence[float] | Tensor | Array | None = None,
    terminal: float | None = None,
) -> Published:
    """The times of ``scheduler.set_timesteps(n)`` and the scale of the noise that its loop starts from.

    scheduler     a diffusers scheduler, or the dict of a ``scheduler_config.json`` (its class decides the list)
    mu            of dynamic shifting; or image_tokens, from which mu is linear between (base_image_seq_len, base_shift) and
                  (max_image_seq_len, max_shift), as in the pipelines of SD 3, Flux, Qwen-Image, Lumina 2, Z-Image
    sigmas        n falling noise levels of a flow before the shift, instead of the scheduler's own
    terminal      as for ``from_diffusers``

    Errors: InputError where the class has no list here, or a list that no sampler can follow.
    """
    name, known, get = read(scheduler)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(f"n={n!r}: give the number of steps, an int >= 1")
    if not name:
        raise InputError("the configuration does not name its scheduler: give the scheduler itself, or add '_class_name'")
    if not known.grid:
        raise InputError(f"the list of times of {name} is not known here: give times of your own to solvers.integrate")
    wish = _Wish(n, _mu(get, known, mu, image_tokens), _levels(get, known, n, sigmas))
    return GRIDS[known.grid](get, name, schedule(scheduler, terminal=terminal).path, wish)


def _is_flow(get: Get, known: Known) -> bool:
    return known.kind == "flow" or bool(get("use_flow_sigmas"))


def _mu(get: Get, known: Known, mu: float | None, image_tokens: int | None) -> float | None:
    if not get("use_dynamic_shifting"):
        if mu is not None or image_tokens is not None:
            raise InputError("mu and image_tokens are of dynamic shifting: set use_dynamic_shifting=True, or leave them out")
        return None
    if mu is not None and image_tokens is not None:
        raise InputError(f"mu={mu!r} and image_tokens={image_tokens!r} are both given: give one")
    if mu is not None:
        return float(mu)
    if image_tokens is None:
        raise InputError("use_dynamic_shifting=True: give mu=, or image_tokens=, the length of the image's sequence")
    low, high = get("base_image_seq_len"), get("max_image_seq_len")
    return get("base_shift") + (get("max_shift") - get("base_shift")) * (image_tokens - low) / (high - low)


def _levels(get: Get, known: Known, n: int, sigmas: Any) -> Array | None:
    if sigmas is None:
        return None
    if not _is_flow(get, known):
        raise InputError("sigmas= are of flows: leave them out for this scheduler")
    levels = np.array([float(s) for s in sigmas])
    if levels.shape != (n,) or not (np.all(np.diff(levels) < 0.0) and levels[-1] >= 0.0 and levels[0] <= 1.0):
        raise InputError(
            f"sigmas={levels.tolist()!r:.80}: give {n} falling numbers in [0, 1], e.g. torch.linspace(1, 1 / n, n)"
        )
    return levels


# --- lists of entries -------------------------------------------------------------------------------------------------


def _entries(get: Get, n: int, size: int, *, whole: bool) -> Array:
    """The table entries of DDIM and of the sigma-based classes (whose "linspace" is not rounded), falling."""
    spacing = get("timestep_spacing")
    if spacing == "linspace":
        entries = np.linspace(0.0, size - 1.0, n)[::-1]
        entries = entries.round() if whole else entries
    elif spacing == "leading":
        entries = np.arange(n)[::-1] * float(size // n) + get("steps_offset")
    elif spacing == "trailing":
        entries = np.arange(size, 0, -size / n).round() - 1.0
    else:
        raise InputError(f"timestep_spacing={spacing!r} is unknown: give 'linspace', 'leading' or 'trailing'")
    return _checked(get, n, size, entries)


def _checked(get: Get, n: int, size: int, entries: Array) -> Array:
    spacing = get("timestep_spacing")
    if entries[-1] < 0.0 or len(entries) != n:
        raise InputError(f"timestep_spacing={spacing!r} lists {len(entries)} timesteps for n={n}, the last -1: take another n")
    if entries[0] > size - 1 or bool(np.any(np.diff(entries) >= 0.0)):
        raise InputError(
            f"timestep_spacing={spacing!r} with steps_offset={get('steps_offset')} lists timesteps {entries[:2]} for n={n} of "
            f"a table of {size}: take another n or offset"
        )
    return entries


def _ddim(get: Get, name: str, path: Path, wish: _Wish) -> Published:
    entries_of = _as_table(path)
    return _at_entries(get, entries_of, _entries(get, wish.n, len(entries_of.betas), whole=True))


def _at_entries(get: Get, path: Tabulated, entries: Array) -> Published:
    """Then data, or the first entry: Stable Diffusion has set_alpha_to_one=False."""
    end = 0.0 if get("set_alpha_to_one") else path.t_min
    return Published(_falling([*path.time_of(torch.from_numpy(entries.copy())).tolist(), end]), 1.0)


def _lcm(get: Get, name: str, path: Path, wish: _Wish) -> Published:
    """n of the ``original_inference_steps`` entries k N/m - 1 that the model was distilled on."""
    entries_of = _as_table(path)
    size, m = len(entries_of.betas), get("original_inference_steps")
    if wish.n > m:
        raise InputError(f"n={wish.n}: at most original_inference_steps={m}")
    origin = np.arange(1, m + 1)[::-1] * (size // m) - 1.0
    return _at_entries(get, entries_of, origin[np.floor(np.linspace(0.0, m, wish.n, endpoint=False)).astype(int)])


# --- lists of sigma / alpha -------------------------------------------------------------------------------------------


def _as_table(path: Path) -> Tabulated:
    if not isinstance(path, Tabulated):
        raise InputError(f"{path} is no table of betas: this scheduler's list of times is of one")
    return path


def _sigmas_of(path: Tabulated) -> Array:
    """sigma / alpha at the entries, rising; infinite where alpha = 0."""
    t = path.time_of(torch.arange(len(path.betas), dtype=torch.float64))
    return torch.exp(-path.lam(t)).numpy()


def _remade(get: Get, high: float, low: float, n: int) -> Array | None:
    """The n sigmas from high to low of the configuration's own rule, None where it has none."""
    ways = [way for way in ("karras", "exponential", "beta") if get(f"use_{way}_sigmas")]
    ways += ["exponential"] if get("use_lu_lambdas") else []  # equal steps of lambda are equal steps of log sigma
    if len(ways) > 1:
        raise InputError(f"the scheduler re-makes its sigmas in {len(ways)} ways, {' and '.join(ways)}: choose one")
    if not ways:
        return None
    high, low = float(get("sigma_max") or high), float(get("sigma_min") or low)
    if math.isinf(high):
        raise InputError(f"{ways[0]} sigmas cannot start where alpha = 0: give terminal=2**-24, or a sigma_max")
    return _spread(ways[0], high, low, n, 7.0)


def _spread(way: str, high: float, low: float, n: int, rho: float) -> Array:
    ramp = np.linspace(0.0, 1.0, n)
    if way == "karras":
        return (high ** (1.0 / rho) + ramp * (low ** (1.0 / rho) - high ** (1.0 / rho))) ** rho
    if way == "exponential":
        return np.exp(math.log(high) + ramp * (math.log(low) - math.log(high)))
    try:
        from scipy.stats import beta  # what diffusers needs for it too
    except ImportError:
        raise InputError("use_beta_sigmas=True needs scipy: pip install scipy, or take grid='beta'") from None
    return low + beta.ppf(1.0 - ramp, 0.6, 0.6) * (high - low)


def _final(get: Get, first: float) -> float:
    kind = get("final_sigmas_type")
    if kind not in ("zero", "sigma_min"):
        raise InputError(f"final_sigmas_type={kind!r} is unknown: give 'zero' or 'sigma_min'")
    return 0.0 if kind == "zero" else first


def _sigma_based(get: Get, name: str, path: Path, wish: _Wish) -> Published:
    """Euler, Heun, KDPM2, LMS: sigma between entries is linear in the entry."""
    entries_of = path if isinstance(path, Tabulated) else table(get, SCHEDULERS[name])  # a continuous time has its own path
    if get("interpolation_type") != "linear":
        raise InputError(
            f"interpolation_type={get('interpolation_type')!r}: its timesteps are not those of its sigmas; "
            "use_exponential_sigmas=True is the same list with the right ones"
        )
    levels = _sigmas_of(entries_of)
    entries = _entries(get, wish.n, len(levels), whole=False)
    sigmas = np.interp(entries, np.arange(len(levels)), levels)
    remade = _remade(get, float(sigmas[0]), float(sigmas[-1]), wish.n)
    sigmas = sigmas if remade is None else remade
    times = _times(path, [*sigmas.tolist(), _final(get, float(levels[0]))])
    first = path.knot(times[0])
    return Published(times, math.hypot(first.alpha, first.sigma) if get("timestep_spacing") == "leading" else first.sigma)


def _multistep(get: Get, name: str, path: Path, wish: _Wish) -> Published:
    """The DPM-Solver classes: n + 1 entries of which the last is not visited; then sigma = 0, or the first entry."""
    always_min = name in ("DEISMultistepScheduler", "SASolverScheduler")
    if get("use_flow_sigmas"):
        return _multistep_flow(get, wish, stands_still=always_min)
    entries_of = _as_table(path)
    levels, n = _sigmas_of(entries_of), wish.n
    remade = _remade(get, float(levels[-1]), float(levels[0]), n)
    if remade is not None:
        sigmas = remade
    else:
        # lambda_min_clipped leaves out the entries with less than that lambda
        size = int(np.sum(-np.log(levels) >= get("lambda_min_clipped")))
        sigmas = levels[_multistep_entries(get, name, n, size, len(levels)).astype(int)]
    own_last = remade is not None and (always_min or name == "UniPCMultistepScheduler")
    first = float(sigmas[-1] if own_last else levels[0])
    end = first if always_min else _final(get, first)
    return Published(_times(path, [*sigmas.tolist(), end]), 1.0)


def _multistep_entries(get: Get, name: str, n: int, size: int, total: int) -> Array:
    spacing = get("timestep_spacing")
    if spacing == "linspace" or name == "DPMSolverSinglestepScheduler":
        entries = np.linspace(0.0, size - 1.0, n + 1).round()[:0:-1]
    elif spacing == "leading":
        entries = np.arange(n, 0, -1) * float(size // (n + 1)) + get("steps_offset")
    elif spacing == "trailing":
        entries = np.arange(size, 0, -total / n).round() - 1.0
    else:
        raise InputError(f"timestep_spacing={spacing!r} is unknown: give 'linspace', 'leading' or 'trailing'")
    return _checked(get, n, total, entries)


# --- flows ------------------------------------------------------------------------------------------------------------


def _multistep_flow(get: Get, wish: _Wish, *, stands_still: bool) -> Published:
    """The n + 1 evenly spaced sigmas from 1 - 1/N to 0, shifted; those that stand still at the end never get to 0."""
    if get("final_sigmas_type") != "zero":
        raise InputError("final_sigmas_type='sigma_min' on a flow: diffusers ends it at a sigma of a beta table; set 'zero'")
    if wish.sigmas is not None:
        raise InputError("sigmas= cannot be given to this scheduler: leave them out")
    size = get("num_train_timesteps")
    shift = get("flow_shift") if wish.mu is None else math.exp(wish.mu)
    even = np.linspace(1.0 - 1.0 / size, 0.0, wish.n + 1)
    sigmas = _shifted(even[:-1] if stands_still else even, shift)
    return Published(_falling(sigmas.tolist()), 1.0)


def _shifted(sigmas: Array, shift: float) -> Array:
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def _time_shift(get: Get, mu: float, sigmas: Array) -> Array:
    """sigma -> k sigma / (1 + (k - 1) sigma) with k = e^mu ("exponential") or mu ("linear")."""
    way = get("time_shift_type")
    if way not in ("exponential", "linear"):
        raise InputError(f"time_shift_type={way!r} is unknown: give 'exponential' or 'linear'")
    return _shifted(sigmas, math.exp(mu) if way == "exponential" else mu)


def _flow(get: Get, name: str, path: Path, wish: _Wish) -> Published:
    """FlowMatchEuler and FlowMatchHeun."""
    size, shift = get("num_train_timesteps"), float(get("shift"))
    sigmas = wish.sigmas
    if sigmas is None:
        low = np.array([1.0 / size])
        low = low if wish.mu is not None else _shifted(low, shift)
        sigmas = np.linspace(1.0, float(low[0]), wish.n)
    sigmas = _shifted(sigmas, shift) if wish.mu is None else _time_shift(get, wish.mu, sigmas)
    sigmas = _stretched(get, sigmas)
    remade = _remade(get, float(sigmas[0]), float(sigmas[-1]), wish.n)
    return Published(_falling([*(sigmas if remade is None else remade).tolist(), 0.0]), 1.0)


def _stretched(get: Get, sigmas: Array) -> Array:
    """1 - sigma scaled so that the last sigma is ``shift_terminal`` (LTX-Video)."""
    if not (end := get("shift_terminal")):
        return sigmas
    return 1.0 - (1.0 - sigmas) * ((1.0 - end) / (1.0 - sigmas[-1]))


def _unipc(get: Get, name: str, path: Path, wish: _Wish) -> Published:
    if not get("use_flow_sigmas"):
        return _multistep(get, name, path, wish)
    n, size = wish.n, get("num_train_timesteps")
    levels = _sigmas_of(table(get, SCHEDULERS[name]))
    remade = _remade(get, float(levels[-1]), float(levels[0]), n)
    if remade is not None:  # sigma / alpha of a table of betas, taken as that of the flow
        sigmas = remade / (1.0 + remade)
    else:
        even = np.linspace(1.0, 1.0 / size, n + 1)[:-1] if wish.sigmas is None else wish.sigmas
        sigmas = _shifted(even, get("flow_shift")) if wish.mu is None else _time_shift(get, wish.mu, even)
        sigmas = _stretched(get, sigmas)
        if abs(sigmas[0] - 1.0) < 1e-6:
            sigmas[0] -= 1e-6
    return Published(_falling([*sigmas.tolist(), _final(get, float(sigmas[-1]))]), 1.0)


# --- continuous noise levels ------------------------------------------------------------------------------------------


def _edm(get: Get, name: str, path: Path, wish: _Wish) -> Published:
    high, low, way = float(get("sigma_max")), float(get("sigma_min")), get("sigma_schedule")
    if way not in ("karras", "exponential"):
        raise InputError(f"sigma_schedule={way!r} is unknown: give 'karras' or 'exponential'")
    sigmas = _spread(way, high, low, wish.n, float(get("rho")))
    return Published(_falling([*sigmas.tolist(), _final(get, low)]), math.hypot(high, 1.0))


def _consistency(get: Get, name: str, path: Path, wish: _Wish) -> Published:
    """Entries i (N // n) of the N Karras levels, noise first; then f itself, at t = 0."""
    size, high, low, rho = get("num_train_timesteps"), float(get("sigma_max")), float(get("sigma_min")), float(get("rho"))
    if wish.n > size:
        raise InputError(f"n={wish.n}: at most num_train_timesteps={size}")
    ramp = np.arange(wish.n) * (size // wish.n) / (size - 1.0)
    sigmas = (high ** (1.0 / rho) + ramp * (low ** (1.0 / rho) - high ** (1.0 / rho))) ** rho
    sigmas = sigmas[sigmas > low * (1.0 + 1e-9)]  # f(x, low) = x: a call there moves nothing
    return Published(_falling([*sigmas.tolist(), 0.0]), high)


# --- times ------------------------------------------------------------------------------------------------------------


def _times(path: Path, sigmas: Sequence[float]) -> Tensor:
    """The times with these sigma / alpha."""
    levels = torch.tensor(sigmas, dtype=torch.float64)
    top = math.exp(-float(path.lam(path.T)))
    if float(levels[0]) > top * (1.0 + 1e-9):
        raise InputError(f"sigma={float(levels[0]):g} is beyond {top:g}, the largest of {path}: give a lower sigma_max")
    return _falling(path.time(-torch.log(levels)).tolist())


def _falling(times: Sequence[float]) -> Tensor:
    """The times without a last one that stands still."""
    kept = list(times)
    if len(kept) > 2 and kept[-1] >= kept[-2] * (1.0 - 1e-9):
        kept.pop()
    out = torch.tensor(kept, dtype=torch.float64)
    if bool((out[1:] >= out[:-1]).any()):
        raise InputError(f"this scheduler's times do not fall: {[round(t, 6) for t in kept[:4]]} ...: take another n")
    return out


GRIDS: dict[str, Callable[[Get, str, Path, _Wish], Published]] = {
    "ddim": _ddim,
    "lcm": _lcm,
    "sigmas": _sigma_based,
    "multistep": _multistep,
    "unipc": _unipc,
    "flow": _flow,
    "edm": _edm,
    "consistency": _consistency,
}
