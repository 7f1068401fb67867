"""diffusers: schedulers, called in the loop of its pipelines.

A scheduler knows its noise by a table of 1000 levels, given as ``trained_betas``: of paths with alpha = 1 they are spaced as
Karras et al. do, of others uniformly in t, from the sweep's end to its start. The state is y = x / alpha for schedulers whose
``init_noise_sigma`` is not 1, and y / sqrt(1 + rho^2) for the others; the network is asked at the level that the scheduler
itself uses. Its tables are float32 whatever the state is.

Grids: uniform is its own ``timestep_spacing`` (linspace, trailing or leading), karras its ``use_karras_sigmas`` and log_snr its
``use_exponential_sigmas``. By default the last step goes to 0; final_sigmas_type=sigma_min stops at the lowest level, where
DEIS, PNDM and SASolver always stop.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sde.path import Path
from solvers.grids import make_grid

from .base import Library, Sampler, always, importing, never, with_eta
from .task import Task

LEVELS = 1000
SPACINGS = ("linspace", "trailing", "leading")
FLAGS: Mapping[str, Mapping[str, bool]] = {
    "uniform": {},
    "karras": {"use_karras_sigmas": True},
    "log_snr": {"use_exponential_sigmas": True},
}


@functools.lru_cache(maxsize=16)
def betas(path: Path, start: float, stop: float) -> tuple[float, ...]:
    """beta_i = 1 - abar_i / abar_(i-1) of the table, abar = 1 / (1 + rho^2), from the lowest level up."""
    flat = path.knot(start).alpha == 1.0
    times = make_grid("karras" if flat else "uniform", path, LEVELS - 1, start, stop).flip(0)
    bars = [1.0 / (1.0 + (k.sigma / k.alpha) ** 2) for k in path.knots(times)]
    return tuple(1.0 - b / a for a, b in itertools.pairwise([1.0, *bars]))


def _run(module: Any, task: Task, name: str, given: Mapping[str, Any], in_step: tuple[str, ...]) -> Tensor:
    task.need_finite()
    options = {key: value for key, value in task.options.items() if key not in in_step}
    kind, table = getattr(module, f"{name}Scheduler"), list(betas(task.path, task.start.t, task.stop.t))
    scheduler = kind(num_train_timesteps=LEVELS, trained_betas=table, **options, **given, **FLAGS[task.grid])
    scheduler.set_timesteps(task.n, device=task.x.device)
    scaled = float(scheduler.init_noise_sigma) != 1.0  # then the state is x / alpha
    state = task.y if scaled else task.y / math.hypot(1.0, task.top)
    step = {key: task.options[key] for key in in_step}
    for i, t in enumerate(scheduler.timesteps):
        rho = _level(scheduler, i, t)
        eps = task.network.noise(scheduler.scale_model_input(state, t), rho)
        state = scheduler.step(eps, t, state, **step).prev_sample
    return task.back(state if scaled else state * math.hypot(1.0, _last(scheduler)))


def _level(scheduler: Any, i: int, t: Tensor) -> float:
    """sigma / alpha of the i-th call, by the scheduler's own table."""
    if not getattr(scheduler, "state_in_first_order", True) and hasattr(scheduler, "mid_point_sigma"):
        return float(scheduler.mid_point_sigma)
    if hasattr(scheduler, "sigmas"):
        return float(scheduler.sigmas[i])
    return _rho(scheduler.alphas_cumprod[int(t)])


def _last(scheduler: Any) -> float:
    """sigma / alpha where the scheduler stops."""
    if hasattr(scheduler, "sigmas"):
        return float(scheduler.sigmas[-1])
    return _rho(getattr(scheduler, "final_alpha_cumprod", torch.ones(())))


def _rho(bar: Tensor) -> float:
    return math.sqrt(max(0.0, 1.0 - float(bar)) / float(bar))


def _sampler(
    name: str,
    *,
    grids: tuple[str, ...] = ("uniform", "karras", "log_snr"),
    noisy: Any = never,
    in_step: tuple[str, ...] = (),
    choices: Mapping[str, tuple[Any, ...]] | None = None,
    spacing: str = "linspace",
    options: Mapping[str, Any] | None = None,
    to_zero: Any = None,
    **given: Any,
) -> Sampler:
    return Sampler(
        lambda module, task: _run(module, task, name, given, in_step),
        options={"timestep_spacing": spacing, **(options or {})},
        choices={"timestep_spacing": SPACINGS, **(choices or {})},
        grids=grids,
        noisy=noisy,
        to_zero=to_zero or _as_told,
    )


def _as_told(options: Mapping[str, Any]) -> bool:
    return options.get("final_sigmas_type", "zero") == "zero"


FINAL = {"final_sigmas_type": ("zero", "sigma_min")}


def _dpm(name: str, order: int, algorithms: tuple[str, ...], **given: Any) -> Sampler:
    return _sampler(
        name,
        options={"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "zero"},
        choices={"algorithm_type": algorithms, "solver_type": ("midpoint", "heun"), **FINAL},
        noisy=lambda options: options["algorithm_type"].startswith("sde"),
        solver_order=order,
        **given,
    )


def _singlestep(order: int) -> Sampler:
    # lower_order_final is what it sets itself, with a message, for a last step to 0 or an uneven count
    found = _dpm("DPMSolverSinglestep", order, ("dpmsolver++", "dpmsolver", "sde-dpmsolver++"), lower_order_final=True)
    options = {key: value for key, value in found.options.items() if key != "timestep_spacing"}  # it has one spacing
    return replace(found, options=options, choices={k: v for k, v in found.choices.items() if k in options})


def _unipc(order: int) -> Sampler:
    return _sampler(
        "UniPCMultistep",
        options={"solver_type": "bh2", "predict_x0": True, "final_sigmas_type": "zero"},
        choices={"solver_type": ("bh1", "bh2"), **FINAL},
        solver_order=order,
    )


MULTISTEP = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")

LIBRARY = Library(
    name="diffusers",
    distribution="diffusers",
    install="pip install diffusers",
    load=importing("diffusers"),
    how="eps-network at the scheduler's own level, on its scaled input; its loop as in its pipelines, its tables in float32",
    affixes=("", "Scheduler"),
    samplers={
        "DDIM": _sampler(
            "DDIM",
            grids=("uniform",),
            options={"eta": 0.0},
            in_step=("eta",),
            spacing="trailing",
            noisy=with_eta,
            clip_sample=False,
        ),
        "DDPM": _sampler("DDPM", grids=("uniform",), spacing="trailing", noisy=always, clip_sample=False),
        "PNDM": _sampler("PNDM", grids=("uniform",), spacing="leading", to_zero=never, skip_prk_steps=True),
        "Euler": _sampler("EulerDiscrete", options={"final_sigmas_type": "zero"}, choices=FINAL),
        "EulerAncestral": _sampler("EulerAncestralDiscrete", grids=("uniform",), noisy=always),
        "Heun": _sampler("HeunDiscrete"),
        "LMS": _sampler("LMSDiscrete", options={"order": 4}, in_step=("order",)),
        "DPMSolverSDE": _sampler("DPMSolverSDE", noisy=always),
        "SASolver": _sampler("SASolver", noisy=always, to_zero=never),
        **{f"DPMSolverMultistep{order}": _dpm("DPMSolverMultistep", order, MULTISTEP) for order in (1, 2, 3)},
        **{f"DPMSolverSinglestep{order}": _singlestep(order) for order in (2, 3)},
        **{f"UniPC{order}": _unipc(order) for order in (1, 2, 3)},
        **{f"DEIS{order}": _sampler("DEISMultistep", to_zero=never, solver_order=order) for order in (1, 2, 3)},
    },
)
