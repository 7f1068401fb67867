"""A model of diffusers as a score: ``from_diffusers(model, scheduler)``.

Two things are read. The scheduler says what the network was trained on: path, timestep, output (``diffusers_schedules``). The
model's class says how it is called, and what its pipeline does to the timestep and to the output. The latter is a row of
``FAMILIES``:

    score = from_diffusers(unet, scheduler)                                               # DDPM, DDIM, Euler, ...
    out = solvers.sample(score, (8, 3, 32, 32), solver="dpmpp_2m", nfe=20)
    score = from_diffusers(flux, scheduler, conditions={"txt_ids": txt, "img_ids": img, "guidance": 3.5})
    out = solvers.sample(score, (1, 4096, 64), conditions={"encoder_hidden_states": e, "pooled_projections": p}, steps=28)

What is handled here, because it goes wrong in silence elsewhere: UNet2DModel cuts a timestep that is a Python float to an
int, so timesteps are tensors; SD 3 and Wan want 1000 sigma, Flux and AuraFlow sigma, Lumina 2 and Z-Image 1 - sigma, and
return u = x0 - eps; DiT and PixArt return 2C channels, the first C of which are the prediction; EDM's "epsilon" is F.

The state is what the transformer sees: latents, packed where the family packs them. Latents z are made from the raw output of
an encoder by z = scaling_factor (raw - shift_factor) (SD: 0.18215, no shift; SD 3, Flux: both), by (raw - latents_mean) /
latents_std with vectors in the VAE's config (Qwen-Image, Wan; SDXL fine-tunes), or by the VAE's running batch statistics
(Flux 2). ``from_latent_diffusion`` does that; nothing here does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sde.errors import InputError, nearest

from ..network import Score
from ._options import Options
from .diffusers_schedules import Schedule, schedule, warn_of_clipping

if TYPE_CHECKING:
    from typing_extensions import Unpack

Call = Callable[[Any, Tensor, Tensor, dict[str, Any]], Any]
"""(model, x, time, conditions) -> the model's output, or a tensor shaped like x (or with 2C channels)."""

#: The model's time from the scheduler's: ``timestep`` is what the scheduler hands over, sigma = t on a flow.
TIMES: dict[str, Callable[[Schedule, Tensor, Any], Tensor]] = {
    "timestep": lambda schedule, t, model: schedule.timestep(t),
    "scaled": lambda schedule, t, model: schedule.timestep(t) * float(_setting(model, "timestep_scale", 1.0)),
    "sigma": lambda schedule, t, model: t,
    "1 - sigma": lambda schedule, t, model: 1.0 - t,
}


@dataclass(frozen=True)
class Family:
    """How a class of models is called.

    sample, time  the names of the two arguments
    wants         what the time is, a name of ``TIMES``
    flow          only a flow scheduler makes sense
    sign          the model returns sign times the output that the scheduler names (its pipeline negates where it is -1)
    halves        may return 2C channels, of which the first C count
    guidance      the factor of a ``guidance`` given as a number: the model gets a tensor (B,); None: it takes none
    call          for a model that is not called by ``model(**{sample: x, time: time}, **conditions)``
    """

    sample: str = "hidden_states"
    time: str = "timestep"
    wants: str = "timestep"
    flow: bool = False
    sign: float = 1.0
    halves: bool = False
    guidance: float | None = None
    call: Call | None = None

    def __post_init__(self) -> None:
        if self.wants not in TIMES:
            raise InputError(f"wants={self.wants!r} is unknown: {nearest(self.wants, TIMES)}")
        if self.sign not in (1.0, -1.0):
            raise InputError(f"sign={self.sign!r}: give 1 or -1")


def _lists(model: Any, x: Tensor, time: Tensor, conditions: dict[str, Any]) -> Tensor:
    """Z-Image: lists of (C, 1, H, W) in and out, and one caption (L, d) a sample."""
    captions = conditions.get("cap_feats")
    if isinstance(captions, Tensor):
        conditions["cap_feats"] = list(captions.unbind(0))
    elif isinstance(captions, (list, tuple)) and len(captions) == 1:
        conditions["cap_feats"] = list(captions) * len(x)
    out = model(list(x.unsqueeze(2).unbind(0)), time, **conditions)
    return torch.stack(list(getattr(out, "sample", out))).squeeze(2)


_UNET = Family("sample", halves=True)
_TABLE = Family()
_FLOW = Family(flow=True)
_UNIT = Family(flow=True, wants="sigma")

#: Model class -> how it is called. A class with a convention of its own is one more row: FAMILIES["MyModel"] = Family(...).
FAMILIES: dict[str, Family] = {
    "UNet2DModel": _UNET,  # a Fourier time embedding takes sigma, from ScoreSdeVeScheduler; a consistency UNet 250 ln(sigma)
    "UNet2DConditionModel": _UNET,
    "UNet3DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "DiTTransformer2DModel": Family(halves=True),
    "PixArtTransformer2DModel": Family(halves=True),
    "HunyuanDiT2DModel": Family(halves=True),
    "LatteTransformer3DModel": Family(halves=True),
    "AllegroTransformer3DModel": _TABLE,
    "CogVideoXTransformer3DModel": _TABLE,
    "CogView3PlusTransformer2DModel": _TABLE,
    "StableAudioDiTModel": _TABLE,
    "SD3Transformer2DModel": _FLOW,
    "WanTransformer3DModel": _FLOW,  # Wan 2.2 has two of them, for sigma above and below boundary_ratio: two scores
    "CogView4Transformer2DModel": _FLOW,
    "LTXVideoTransformer3DModel": _FLOW,
    "MochiTransformer3DModel": _FLOW,  # its scheduler has invert_sigmas=True
    "HunyuanVideoTransformer3DModel": Family(flow=True, guidance=1000.0),
    "HiDreamImageTransformer2DModel": Family(time="timesteps", flow=True, sign=-1.0),
    "SanaTransformer2DModel": Family(wants="scaled", flow=True, halves=True),
    "FluxTransformer2DModel": Family(wants="sigma", flow=True, guidance=1.0),  # both are multiplied by 1000 inside
    "Flux2Transformer2DModel": Family(wants="sigma", flow=True, guidance=1.0),
    "QwenImageTransformer2DModel": Family(wants="sigma", flow=True, guidance=1.0),
    "AuraFlowTransformer2DModel": _UNIT,
    "ChromaTransformer2DModel": _UNIT,
    "PRXTransformer2DModel": _UNIT,
    "Lumina2Transformer2DModel": Family(wants="1 - sigma", flow=True, sign=-1.0),
    "ZImageTransformer2DModel": Family("x", "t", wants="1 - sigma", flow=True, sign=-1.0, call=_lists),
}


def from_diffusers(
    model: Any,
    scheduler: Any,
    *,
    family: str | Family | None = None,
    rule: str | None = None,
    terminal: float | None = None,
    **options: Unpack[Options],
) -> Score:
    """A diffusers model as a ``Score`` on the path of its scheduler.

    model       a model of diffusers, compiled or wrapped, or any callable with the same call
    scheduler   a scheduler of diffusers, its ``config``, or the dict of a ``scheduler_config.json``. It decides the path, the
                timestep and the output (see ``diffusers_schedules``), not the solver
    family      a name of ``FAMILIES`` or a ``Family``, where the model's class does not say
    rule        the timestep between the entries of a table: "linear", "log", "nearest", "ceil" or "floor" (default: "log" where
                the configuration re-makes its sigmas, else "linear"; "nearest" for a learned time embedding, which takes ints)
    terminal    alpha^2 of the last entry under ``rescale_betas_zero_snr``: 0, or what the class puts there (2^-24)
    conditions  constant keyword arguments of the model: embeddings, ids, ``guidance`` as a number. One row a sample or without
                a batch; those given to the solver as ``conditions=`` are checked to have a row a sample
    mode, dtype, evals  as for ``Score``; dtype is the model's own where that is a half precision

    A comparison with diffusers' own loop needs its grid and its first noise: ``diffusers_grids.published``. Their steps are
    "ddim", "edm_euler", "edm_heun", "dpmpp_2m", and "euler" on a flow.

    Errors: InputError for an unknown class or key (with the nearest names), or a model that does not go with its scheduler.
    A ToolkitWarning names ``clip_sample`` and ``thresholding``, which are left out.
    """
    name, family = _family_of(model, family)
    if not callable(model):
        raise InputError(f"model is a {type(model).__name__}: give a model, or a callable with the same call")
    if rule is None and _setting(model, "time_embedding_type", None) == "learned":
        rule = "nearest"
    meaning = schedule(scheduler, rule=rule, terminal=terminal)
    _check_pair(name, family, model, meaning)
    warn_of_clipping(scheduler)

    return Score(
        _network(model, name, family, meaning.sign * family.sign),
        meaning.path,
        meaning.predicts,
        label=lambda t: TIMES[family.wants](meaning, t, model),
        scale=meaning.scale,
        sigma_data=meaning.sigma_data,
        split="learned_var" if family.halves else None,
        **{"dtype": _half(model), **options},
    )


def _family_of(model: Any, family: str | Family | None) -> tuple[str, Family]:
    if isinstance(family, Family):
        return type(model).__name__, family
    if family is not None:
        if family not in FAMILIES:
            raise InputError(f"family={family!r} is unknown: {nearest(family, FAMILIES)}")
        return family, FAMILIES[family]
    classes = [c.__name__ for c in type(_unwrapped(model)).__mro__]
    for name in classes:  # a subclass is called as its base is
        if name in FAMILIES:
            return name, FAMILIES[name]
    raise InputError(
        f"model class {classes[0]!r} is not a row of FAMILIES: {nearest(classes[0], FAMILIES)} "
        "Name the one it is called like by family='...', or give a Family(...)"
    )


def _unwrapped(model: Any) -> Any:
    """The model inside torch.compile and data parallel wrappers."""
    while isinstance(inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None), nn.Module):
        model = inner
    return model


def _setting(model: Any, key: str, default: Any) -> Any:
    config = getattr(_unwrapped(model), "config", None)
    return config.get(key, default) if isinstance(config, Mapping) else default


def _half(model: Any) -> torch.dtype | None:
    """The model's dtype where it is a half precision: its input must be cast."""
    if not isinstance(model, nn.Module):
        return None
    found = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return found if found in (torch.float16, torch.bfloat16) else None


def _check_pair(name: str, family: Family, model: Any, meaning: Schedule) -> None:
    if family.flow and meaning.kind != "flow":
        raise InputError(
            f"{name} is a flow, but the scheduler is of a {meaning.kind}: give the FlowMatchEulerDiscreteScheduler it was "
            "trained with, or a multistep class with use_flow_sigmas=True and prediction_type='flow_prediction'"
        )
    if family.flow and meaning.predicts != "velocity":
        raise InputError(f"{name} returns a velocity, but the scheduler says otherwise: set prediction_type='flow_prediction'")
    if _setting(model, "time_embedding_type", None) == "fourier" and meaning.kind != "ve":
        raise InputError(
            f"{name} with time_embedding_type='fourier' takes sigma as its timestep and divides its output by it: give "
            "ScoreSdeVeScheduler"
        )


def _network(model: Any, name: str, family: Family, sign: float) -> Callable[..., Any]:
    """The model as network(x, time, **conditions), with the model's own signature for errors."""

    def network(x: Tensor, time: Tensor, **conditions: Any) -> Any:
        if family.guidance is not None and isinstance(conditions.get("guidance"), (int, float)):
            conditions["guidance"] = time.new_full(time.shape, conditions["guidance"] * family.guidance)
        if family.call is not None:
            out = family.call(model, x, time, conditions)
        else:
            out = model(**{family.sample: x, family.time: time}, **conditions)
        out = getattr(out, "sample", out)
        out = out[0] if isinstance(out, (tuple, list)) else out  # of return_dict=False
        return out if sign == 1.0 else -out

    if (signature := _signature(model, family)) is not None:
        network.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    network.__name__ = name
    return network


def _signature(model: Any, family: Family) -> inspect.Signature | None:
    """(x, time, the model's other arguments by keyword); None where there is no signature to see."""
    try:
        known = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):
        return None
    own = (family.sample, family.time)
    missing = [n for n in own if n not in known.parameters]
    if missing and not any(p.kind is p.VAR_KEYWORD for p in known.parameters.values()):
        raise InputError(f"the model{known} has no argument {missing[0]!r}: not called like this family, give family='...'")
    positional = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("x", "time")]
    others = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY) if p.kind is p.POSITIONAL_OR_KEYWORD else p
        for n, p in known.parameters.items()
        if n not in own and p.kind is not p.VAR_POSITIONAL
    ]
    others.sort(key=lambda p: p.kind)
    return inspect.Signature([*positional, *others])
