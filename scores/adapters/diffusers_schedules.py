"""A diffusers scheduler, read for what it says about a network: noise path, timestep, output, input scaling.

A scheduler of diffusers is a path, a grid and a solver in one object. Here is the path; the grid is in ``diffusers_grids``; the
solver is the caller's choice, so keys such as ``solver_order`` say nothing to either. Five kinds of scheduler:

    kind         path                       timestep given to the network      output by ``prediction_type``
    table        Tabulated, entry k of N    k = 0 ... N - 1                    epsilon, sample, v_prediction
                 at t = (k + 1)/N
    flow         Linear, t = sigma          N sigma (N = 1000)                 u = eps - x0  (flow_prediction)
    edm          EDM, t = sigma             ln(sigma)/4, or 2 atan(sigma)/pi   "epsilon" is EDM's F, "v_prediction" is -F
    consistency  EDM, t = sigma             250 ln(sigma)                      F of f = c_skip x + c_out F, f(x, sigma_min) = x
    ve           VE                         sigma                              the score

The shift of a flow (``shift``, ``flow_shift``, dynamic) moves the grid, not the path: t is sigma itself. ``clip_sample`` and
``thresholding`` change x0 after the network has spoken; no score can hold them, and a warning says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, ToolkitWarning, nearest
from sde.path import BETA_SCHEDULES, EDM, VE, Linear, Path, Tabulated

from ._labels import RULES, table_label

TimeFunction = Callable[[Tensor], Tensor]
Get = Callable[[str], Any]
"""The value of a configuration's key, or the default of its class."""

HALF_MINIMUM = 2.0**-24  # the smallest number of float16: what diffusers' sigma-based classes put for alpha^2 = 0


@dataclass(frozen=True)
class Known:
    """What is known of one scheduler class.

    kind      a row of the table above
    grid      a name of ``diffusers_grids.GRIDS``, "" where its list of times is not reproduced
    last      alpha^2 of the last entry under ``rescale_betas_zero_snr``
    flows     reads ``use_flow_sigmas``, which makes a flow of it
    defaults  what a missing key means, where that differs from ``DEFAULTS``
    """

    kind: str = "table"
    grid: str = ""
    last: float = 0.0
    flows: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


#: What a missing key means, unless the class says otherwise.
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
    "set_alpha_to_one": True,
    "lambda_min_clipped": -math.inf,
    "flow_shift": 1.0,
    "shift": 1.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
    "sigma_schedule": "karras",
    "rho": 7.0,
    "original_inference_steps": 50,
}

_DDIM = {"timestep_spacing": "leading", "clip_sample": True}
_STABLE = {"beta_start": 0.00085, "beta_end": 0.012}
_COG = {**_DDIM, **_STABLE, "beta_schedule": "scaled_linear", "snr_shift_scale": 3.0}
_LCM = {**_STABLE, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
_EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
_COSINE = {
    "sigma_min": 0.3,
    "sigma_max": 500.0,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
    "prediction_type": "v_prediction",
}

#: The scheduler classes that are understood. A class with the same meaning is one more row.
SCHEDULERS: dict[str, Known] = {
    "DDIMScheduler": Known("table", "ddim", defaults=_DDIM),
    "DDIMParallelScheduler": Known("table", "ddim", defaults=_DDIM),
    "DDIMInverseScheduler": Known("table", defaults=_DDIM),
    "DDPMScheduler": Known("table", "ddim", defaults=_DDIM),
    "DDPMParallelScheduler": Known("table", "ddim", defaults=_DDIM),
    "CogVideoXDDIMScheduler": Known("table", "ddim", defaults=_COG),
    "CogVideoXDPMScheduler": Known("table", "ddim", defaults=_COG),
    "PNDMScheduler": Known("table", defaults={"timestep_spacing": "leading", "set_alpha_to_one": False}),
    "LCMScheduler": Known("table", "lcm", defaults=_LCM),
    "TCDScheduler": Known("table", "lcm", defaults=_LCM),
    "EulerDiscreteScheduler": Known("table", "sigmas", HALF_MINIMUM),
    "EulerAncestralDiscreteScheduler": Known("table", "sigmas", HALF_MINIMUM),
    "HeunDiscreteScheduler": Known("table", "sigmas", HALF_MINIMUM, defaults=_STABLE),
    "KDPM2DiscreteScheduler": Known("table", "sigmas", HALF_MINIMUM, defaults=_STABLE),
    "KDPM2AncestralDiscreteScheduler": Known("table", "sigmas", HALF_MINIMUM, defaults=_STABLE),
    "LMSDiscreteScheduler": Known("table", "sigmas", HALF_MINIMUM),
    "DPMSolverSDEScheduler": Known("table", last=HALF_MINIMUM, defaults=_STABLE),
    "DPMSolverMultistepScheduler": Known("table", "multistep", HALF_MINIMUM, flows=True),
    "DPMSolverMultistepInverseScheduler": Known("table", last=HALF_MINIMUM, flows=True),
    "DPMSolverSinglestepScheduler": Known("table", "multistep", HALF_MINIMUM, flows=True),
    "UniPCMultistepScheduler": Known("table", "unipc", HALF_MINIMUM, flows=True),
    "DEISMultistepScheduler": Known("table", "multistep", HALF_MINIMUM, flows=True),
    "SASolverScheduler": Known("table", "multistep", HALF_MINIMUM, flows=True),
    "FlowMatchEulerDiscreteScheduler": Known("flow", "flow"),
    "FlowMatchHeunDiscreteScheduler": Known("flow", "flow"),
    "FlowMatchLCMScheduler": Known("flow"),
    "LTXEulerAncestralRFScheduler": Known("flow"),
    "EDMEulerScheduler": Known("edm", "edm", defaults=_EDM),
    "EDMDPMSolverMultistepScheduler": Known("edm", "edm", defaults=_EDM),
    "CosineDPMSolverMultistepScheduler": Known("edm", "edm", defaults=_COSINE),
    "CMStochasticIterativeScheduler": Known(
        "consistency", "consistency", defaults={**_EDM, "num_train_timesteps": 40, "clip_denoised": True}
    ),
    "ScoreSdeVeScheduler": Known(
        "ve", defaults={"num_train_timesteps": 2000, "sigma_min": 0.01, "sigma_max": 1348.0, "sampling_eps": 1e-5}
    ),
}

#: Every key of a configuration, by who answers to it.
KEYS: dict[str, str] = {
    key: owner
    for owner, keys in {
        "path": "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type rescale_betas_zero_snr "
        "snr_shift_scale sigma_min sigma_max sigma_data use_flow_sigmas timestep_type invert_sigmas variance_type",
        "grid": "timestep_spacing steps_offset set_alpha_to_one use_karras_sigmas use_exponential_sigmas use_beta_sigmas "
        "use_lu_lambdas interpolation_type final_sigmas_type lambda_min_clipped shift flow_shift use_dynamic_shifting "
        "base_shift max_shift base_image_seq_len max_image_seq_len time_shift_type shift_terminal sigma_schedule rho "
        "original_inference_steps sampling_eps",
        "solver": "solver_order solver_type algorithm_type lower_order_final euler_at_final skip_prk_steps predict_x0 "
        "disable_corrector solver_p predictor_order corrector_order tau_func stochastic_sampling eta s_noise "
        "noise_sampler_seed snr correct_steps timestep_scaling scale_factors upscale_mode",
        "clip": "clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value clip_denoised",
    }.items()
    for key in keys.split()
}

#: ``prediction_type`` -> the row of ``sde.prediction.OUTPUTS``.
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}

#: What ``rule`` does to the timestep of a flow, N sigma: diffusers' multistep classes cut it to int64.
WHOLE: dict[str, TimeFunction] = {
    "nearest": torch.round,
    "floor": lambda t: torch.floor(t + 1e-9),  # N sigma may be an ulp off a whole number
    "ceil": lambda t: torch.ceil(t - 1e-9),
}


@dataclass(frozen=True)
class Schedule:
    """What a scheduler says about its network, which returns ``sign`` times the output ``predicts``.

    timestep : t -> what the scheduler hands over as the timestep
    scale    : t -> c_in, None where the network sees the path's own x
    """

    kind: str
    path: Path
    predicts: Any
    timestep: TimeFunction
    sign: float = 1.0
    scale: TimeFunction | None = None
    sigma_data: float = 0.5


def read(scheduler: Any) -> tuple[str, Known, Get]:
    """(class name or "", what is known of it, get) of a scheduler, its ``config``, or a dict.

    Errors: InputError for a class or a key that is not understood, with the nearest names.
    """
    config = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise InputError(
            f"scheduler is a {type(scheduler).__name__}: give a diffusers scheduler, its .config, or the dict of a "
            "scheduler_config.json, json.load(file)"
        )
    name = str(config.get("_class_name", "")) if scheduler is config else _class_of(scheduler)
    known = SCHEDULERS.get(name)
    if known is None and name:
        raise InputError(f"scheduler class {name!r} is not understood: {nearest(name, SCHEDULERS)}")
    for key in config:
        if key not in KEYS and not key.startswith("_"):
            raise InputError(f"scheduler key {key!r} is not understood: {nearest(key, KEYS)}; leave it out to ignore it")
    known = known or Known(_kind_of(config), flows=True)
    if config.get("use_flow_sigmas") and not known.flows:
        raise InputError(
            f"use_flow_sigmas=True: {name} does not read it; leave it out, or name the multistep class that it is of"
        )

    def get(key: str) -> Any:
        return config[key] if key in config else known.defaults.get(key, DEFAULTS.get(key))

    return name, known, get


def _class_of(scheduler: Any) -> str:
    """The nearest class of a scheduler that is understood: a subclass means what its base means."""
    names = [c.__name__ for c in type(scheduler).__mro__]
    return next((n for n in names if n in SCHEDULERS), names[0])


def _kind_of(config: Mapping[str, Any]) -> str:
    """The kind of a configuration that does not name its class, by the keys that only that kind has."""
    for kind, keys in (
        ("table", ("beta_schedule", "trained_betas", "beta_start")),
        ("flow", ("shift", "use_dynamic_shifting")),
        ("consistency", ("clip_denoised",)),
        ("ve", ("snr",)),  # an EDM configuration does not tell which of two timesteps it means
    ):
        if any(key in config for key in keys):
            return kind
    raise InputError(
        f"scheduler has the keys {', '.join(config) or 'none'}: add '_class_name', for example "
        "'DDIMScheduler', as a scheduler_config.json has it"
    )


def schedule(scheduler: Any, *, rule: str | None = None, terminal: float | None = None) -> Schedule:
    """The path, timestep and output of a scheduler (an object, its ``config``, or the dict of a ``scheduler_config.json``).

    rule      the timestep between entries of a table: "linear", "log", "nearest", "ceil" or "floor" (``_labels``). Default:
              "log" where the configuration re-makes sigmas (karras, exponential, beta, lu), as diffusers does, else "linear".
              diffusers' multistep classes hand over whole ones: "nearest" with karras sigmas, "floor" with others and on a flow
    terminal  alpha^2 of the last entry under ``rescale_betas_zero_snr``: 0 is exact (DDIM, DDPM), 2^-24 is what diffusers'
              Euler and multistep classes have (sigma = 4096), 4.8973451890853435e-08 ComfyUI's (4519). Default: the class's
    """
    name, known, get = read(scheduler)
    if rule is not None and rule not in RULES:
        raise InputError(f"rule={rule!r} is unknown: {nearest(rule, RULES)}")
    if terminal is not None and not get("rescale_betas_zero_snr"):
        raise InputError(f"terminal={terminal!r} without rescale_betas_zero_snr=True in the scheduler: leave it out")
    if known.kind == "flow" or (
        known.kind == "table" and (get("use_flow_sigmas") or get("prediction_type") == "flow_prediction")
    ):
        return _flow(get, rule or "linear")
    if known.kind == "table" and not (get("timestep_type") == "continuous" and get("prediction_type") == "v_prediction"):
        remade = any(get(f"use_{way}") for way in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas"))
        path = table(get, known, terminal)
        hint = "; flow_prediction needs use_flow_sigmas=True"
        predicts = _predicts(get, ("epsilon", "sample", "v_prediction"), hint)
        return Schedule("table", path, predicts, table_label(path, rule or ("log" if remade else "linear")))
    if rule is not None:
        raise InputError(f"rule={rule!r} is of tables and flows: leave it out, here timesteps are a function of sigma")
    make = {"table": _continuous, "edm": _edm, "consistency": _consistency, "ve": _ve}[known.kind]
    return make(get, name)


def warn_of_clipping(scheduler: Any) -> None:
    """Names the keys that no score can hold, with the way to say that one knows."""
    get = read(scheduler)[2]
    on = [key for key in ("clip_sample", "thresholding", "clip_denoised") if get(key)]
    if on:
        named, off = " and ".join(f"{key}=True" for key in on), ", ".join(f"{key}=False" for key in on)
        warnings.warn(
            f"the scheduler has {named}: clipping x0 is not part of a score and is left out; clip by guidance, or say so with "
            f"dict(scheduler.config, {off}, _class_name=...)",
            ToolkitWarning,
            stacklevel=3,
        )


def _predicts(get: Get, allowed: tuple[str, ...], hint: str = "") -> str:
    kind = get("prediction_type")
    if kind not in allowed:
        raise InputError(f"prediction_type={kind!r}: give one of {', '.join(allowed)}{hint}")
    return PREDICTIONS[kind]


def _size(get: Get) -> int:
    n = get("num_train_timesteps")
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise InputError(f"num_train_timesteps={n!r}: must be an int >= 2, e.g. 1000")
    return n


# --- tables -----------------------------------------------------------------------------------------------------------


def table(get: Get, known: Known, terminal: float | None = None) -> Tabulated:
    """The table of a configuration, zero terminal SNR and the shift of log-SNR included."""
    path = _betas(get)
    if shift := get("snr_shift_scale"):  # CogVideoX: the SNR over ``shift``
        square = path.alphas_cumprod
        path = Tabulated.from_alphas_cumprod(square / (shift + (1.0 - shift) * square))
    if not get("rescale_betas_zero_snr"):
        return path
    path = Tabulated(path.betas, zero_terminal_snr=True)
    last = known.last if terminal is None else float(terminal)
    if last == 0.0:
        return path
    square = path.alphas_cumprod
    if not 0.0 < last < float(square[-2]):
        raise InputError(
            f"terminal={last:g}, alpha^2 of the last entry by rescale_betas_zero_snr, is not between 0 and that of the entry "
            f"before, {float(square[-2]):g}: give terminal=0.0, which is exact"
        )
    square[-1] = last
    return Tabulated.from_alphas_cumprod(square)


def _betas(get: Get) -> Tabulated:
    if (trained := get("trained_betas")) is not None:
        if len(trained) != _size(get):
            raise InputError(f"trained_betas has {len(trained)} entries, num_train_timesteps={_size(get)}: make them equal")
        return Tabulated(tuple(float(b) for b in trained))
    way = get("beta_schedule")
    if way not in BETA_SCHEDULES:
        raise InputError(f"beta_schedule={way!r} is unknown: {nearest(way, BETA_SCHEDULES)}; or give trained_betas")
    return BETA_SCHEDULES[way](_size(get), float(get("beta_start")), float(get("beta_end")))


# --- flows and continuous noise levels --------------------------------------------------------------------------------


def _flow(get: Get, rule: str) -> Schedule:
    size, predicts = _size(get), "velocity"
    if get("use_flow_sigmas"):  # a multistep class on a flow
        allowed = ("flow_prediction", "epsilon", "sample")
        predicts = _predicts(get, allowed, " (v is not of a flow's alpha and sigma)")
    elif get("prediction_type") == "flow_prediction":
        raise InputError(
            "prediction_type='flow_prediction' without use_flow_sigmas=True: diffusers takes sigmas of a table then; set it"
        )
    if rule not in (*WHOLE, "linear"):
        raise InputError(f"rule={rule!r} is of tables: on a flow give 'linear', 'nearest', 'floor' or 'ceil'")
    whole = WHOLE.get(rule, torch.clone)
    if get("invert_sigmas"):  # 1 - sigma is what rises, for the network and for the output dx / d(1 - sigma)
        return Schedule("flow", Linear(), predicts, lambda t: whole(size * (1.0 - t)), sign=-1.0)
    return Schedule("flow", Linear(), predicts, lambda t: whole(size * t))


def _range(get: Get) -> tuple[float, float, float]:
    low, high, data = (float(get(key)) for key in ("sigma_min", "sigma_max", "sigma_data"))
    return low, high, data


def _edm(get: Get, name: str) -> Schedule:
    """c_skip and c_out of Karras et al. 2022, table 1; with v_prediction c_out is negative."""
    low, high, data = _range(get)
    _predicts(get, ("epsilon", "v_prediction"), ": of an EDM scheduler they are F and -F")
    sign = 1.0 if get("prediction_type") == "epsilon" else -1.0
    timestep: TimeFunction = (
        (lambda t: torch.atan(t) * (2.0 / math.pi)) if name.startswith("Cosine") else (lambda t: torch.log(t) / 4.0)
    )
    return Schedule("edm", EDM(high, low), "F", timestep, sign, _input_scale(data), data)


def _continuous(get: Get, name: str) -> Schedule:
    """EulerDiscrete with timestep_type="continuous" (Stable Video Diffusion): EDM with sigma_data = 1 and v = -F.

    x0 = x / (sigma^2 + 1) - sigma v / sqrt(sigma^2 + 1), timestep ln(sigma)/4. sigma_max may be beyond the table.
    """
    entries = _betas(get)
    low, high = torch.exp(-entries.lam(torch.tensor([entries.t_min, 1.0], dtype=torch.float64))).tolist()
    path = EDM(max(float(get("sigma_max") or high), high), min(float(get("sigma_min") or low), low))
    return Schedule("edm", path, "F", lambda t: torch.log(t) / 4.0, -1.0, _input_scale(1.0), 1.0)


def _input_scale(data: float) -> TimeFunction:
    return lambda t: (t * t + data**2) ** -0.5


def _consistency(get: Get, name: str) -> Schedule:
    """f = c_skip x + c_out F with c_skip = sd^2 / ((t - low)^2 + sd^2), c_out = (t - low) sd / sqrt(t^2 + sd^2), taken as x0.

    The row of F: x0 = f and x = x0 + t eps give F = ((1 - c_skip) x0 - c_skip t eps) / c_out; infinite at t = low, where f = x.
    """
    low, high, data = _range(get)

    def skip(t: Tensor) -> Tensor:
        return data**2 / ((t - low) ** 2 + data**2)

    def out(t: Tensor) -> Tensor:
        return (t - low) * data / (t * t + data**2) ** 0.5

    row = (lambda t: (1.0 - skip(t)) / out(t), lambda t: -skip(t) * t / out(t))
    return Schedule(
        "consistency", EDM(high, low), row, lambda t: 250.0 * torch.log(t + 1e-44), scale=_input_scale(data), sigma_data=data
    )


def _ve(get: Get, name: str) -> Schedule:
    path = VE(float(get("sigma_min")), float(get("sigma_max")))
    return Schedule("ve", path, "score", path.sigma)
