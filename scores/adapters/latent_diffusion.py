"""Latent diffusion: a score on latents z, and the autoencoder around it.

    z = (raw - shift) scale,    raw = z / scale + shift,    raw = encode(image),  image = decode(raw)

with numbers or one number a channel. So Stable Diffusion has scale 0.18215, SD3 and Flux a scale and a shift, a per-channel
mean and deviation (SDXL, Qwen-Image, Wan) are shift = mean, scale = 1/deviation, and EDM2's autoencoder, z = a raw + b with
a = 0.5/std and b = -mean a, is shift = [5.81, 3.25, 0.12, -2.15], scale = 0.5 / [4.17, 4.62, 3.71, 3.28].

CompVis ``LatentDiffusion`` (ldm.models.diffusion.ddpm)
    Call    model.apply_model(x, t, cond); t the index of its table. cond goes by ``model.model.conditioning_key``: a tensor or
            list is context= (crossattn), joined channels (concat) or y= (adm); a dict {"c_concat": [...], "c_crossattn": [...]}
            is handed on (hybrid). It comes from ``get_learned_conditioning``.
    Output  ``parameterization``: eps, x0, or v (SD 2).
    Input   latents times ``scale_factor``: 0.18215, or the buffer 1/std that scale_by_std made in training.
    Table   its betas, "linear" being linear in sqrt(beta); kept in float32.
Traps   ``get_first_stage_encoding`` draws from the encoder's posterior; here ``encode`` takes its mode, so that encoding is a
        function. EMA weights are swapped in by ``model.ema_scope()`` around a run, or are in the checkpoint already.

Source: CompVis/latent-diffusion ldm/models/diffusion/ddpm.py (MIT); NVlabs/edm2 training/encoders.py (CC BY-NC-SA 4.0).
Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sde.errors import InputError, NetworkError
from sde.path import Tabulated
from sde.prediction import Knot, Prediction, Predictor, Row, Tally

from ..network import Score
from ._labels import table_label
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

Factor = float | Sequence[float] | Tensor


class LatentScore(Predictor):
    """A score on latents that can also ``encode`` images and ``decode`` latents. As a score it is ``score`` itself.

    encode : image -> raw latents, or an object with .latent_dist, .mode() or .latent (an autoencoder's ``encode``)
    decode : raw latents -> image, or an object with .sample (an autoencoder's ``decode``)
    scale, shift : numbers or one a channel, of z = (raw - shift) scale
    """

    def __init__(
        self,
        score: Predictor,
        encode: Callable[[Tensor], Any],
        decode: Callable[[Tensor], Any],
        *,
        scale: Factor = 1.0,
        shift: Factor = 0.0,
    ) -> None:
        if not isinstance(score, Predictor):
            raise InputError(f"score is a {type(score).__name__}: wrap the network first, Score(network, path)")
        for name, function in (("encode", encode), ("decode", decode)):
            if not callable(function):
                raise InputError(f"{name} is {function!r:.80}: give a function, such as the autoencoder's {name}")
        self.score, self.path = score, score.path
        self._encode, self._decode = encode, decode
        self.scale, self.shift = _factor("scale", scale), _factor("shift", shift)
        if bool((self.scale == 0.0).any()):
            raise InputError(f"scale={scale!r}: must not be 0")

    def encode(self, image: Tensor) -> Tensor:
        """The latents z of images, those of the encoder's mode where it gives a distribution."""
        raw = self._encode(image)
        if not isinstance(raw, Tensor):
            raw = getattr(raw, "latent_dist", getattr(raw, "latent", raw))
        if not isinstance(raw, Tensor) and hasattr(raw, "mode"):
            raw = raw.mode()
        raw = _tensor("encode", raw)
        return (raw - _channels(self.shift, raw)) * _channels(self.scale, raw)

    def decode(self, z: Tensor) -> Tensor:
        """The images of latents z."""
        image = self._decode(z / _channels(self.scale, z) + _channels(self.shift, z))
        return _tensor("decode", getattr(image, "sample", image) if not isinstance(image, Tensor) else image)

    @property
    def native_dtype(self) -> torch.dtype:
        return getattr(self.score, "native_dtype", torch.float32)

    def running(self) -> AbstractContextManager[Any]:
        return self.score.running() if hasattr(self.score, "running") else nullcontext()  # pyright: ignore[reportAttributeAccessIssue]

    def row(self, knot: Knot) -> Row:
        return self.score.row(knot)

    def calls(self, *knots: Knot) -> int:
        return self.score.calls(*knots)

    def at(
        self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally
    ) -> list[Callable[[Tensor], Tensor]]:
        return self.score.at(knots, x, conditions, tally)

    def each(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> Callable[[Tensor], Tensor]:
        return self.score.each(knots, x, conditions, tally)

    def with_variance(
        self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally
    ) -> list[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        return self.score.with_variance(knots, x, conditions, tally)

    def predict(self, x: Tensor, t: Any, **conditions: Any) -> Prediction:
        return self.score.predict(x, t, **conditions)

    def __call__(self, x: Tensor, t: Any, **conditions: Any) -> Tensor:
        return self.score(x, t, **conditions)


def from_latent_diffusion(
    model: Any,
    autoencoder: Any = None,
    *,
    scale: Factor | None = None,
    shift: Factor | None = None,
    rule: str = "linear",
    **options: Unpack[Options],
) -> LatentScore:
    """A score with its autoencoder: ``score.decode(sample(score, shape).x)``.

    model       : a CompVis ``LatentDiffusion``, which holds both; or any score on latents, with its ``autoencoder``
    autoencoder : an object with ``encode`` and ``decode``
    scale, shift: of z = (raw - shift) scale; by default what ``autoencoder.config`` says, as diffusers writes it:
                  shift_factor or latents_mean, and scaling_factor, divided by latents_std
    rule        : the label between two entries of a CompVis table, see ``_labels``
    """
    if isinstance(model, Predictor):
        if autoencoder is None or options:
            given = f"{', '.join(options)} given" if options else "autoencoder is missing"
            raise InputError(
                f"model is a score on latents, and {given}: from_latent_diffusion(score, autoencoder, scale=..., shift=...)"
            )
        known = _written(autoencoder)
        scale, shift = known[0] if scale is None else scale, known[1] if shift is None else shift
        if scale is None:
            name = type(autoencoder).__name__
            raise InputError(
                f"{name} has no config with scaling_factor or latents_std: give scale= (0.18215 for Stable Diffusion)"
            )
        return LatentScore(model, autoencoder.encode, autoencoder.decode, scale=scale, shift=shift)
    if not hasattr(model, "apply_model") or autoencoder is not None or scale is not None or shift is not None:
        raise InputError(
            f"model is a {type(model).__name__}: give a CompVis LatentDiffusion alone, or a score and its autoencoder: "
            "from_latent_diffusion(Score(network, path), autoencoder, scale=0.18215)"
        )
    return _compvis(model, rule, options)


def _written(autoencoder: Any) -> tuple[Factor | None, Factor]:
    """(scale, shift) of an autoencoder's config; no scale where it says none."""
    config = getattr(autoencoder, "config", None)

    def setting(name: str) -> Any:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    scale, mean, std = setting("scaling_factor"), setting("latents_mean"), setting("latents_std")
    shift = setting("shift_factor") if mean is None else mean
    if std is not None:
        scale = (1.0 if scale is None else float(scale)) / torch.as_tensor(std, dtype=torch.float64)
    return scale, 0.0 if shift is None else shift


def _compvis(model: Any, rule: str, options: Options) -> LatentScore:
    path = Tabulated(tuple(float(b) for b in model.betas))
    if model.parameterization not in ("eps", "x0", "v"):  # the names that the outputs have here
        raise InputError(f"parameterization={model.parameterization!r} is unknown: known are 'eps', 'x0' and 'v'")

    def network(x: Tensor, t: Tensor, cond: Any = None) -> Any:
        return model.apply_model(x, t, cond)

    def decode(raw: Tensor) -> Any:
        return model.decode_first_stage(raw * float(model.scale_factor))  # which divides by it again

    score = Score(network, path, model.parameterization, label=table_label(path, rule), **options)
    return LatentScore(score, model.encode_first_stage, decode, scale=float(model.scale_factor))


def _factor(name: str, value: Factor) -> Tensor:
    try:
        factor = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}={value!r:.80}: give a number, or one number a channel") from error
    if factor.dim() > 1 or not math.isfinite(float(factor.sum())):
        raise InputError(f"{name}={value!r:.80}: give a finite number, or one finite number a channel")
    return factor


def _channels(factor: Tensor, z: Tensor) -> Tensor:
    """A number, or one a channel of z (B, C, ...)."""
    if factor.dim() == 0:
        return factor.to(z)
    if z.dim() < 2 or z.shape[1] != len(factor):
        raise InputError(
            f"latents of shape {tuple(z.shape)} for {len(factor)} channels of scale or shift: give (B, {len(factor)}, ...)"
        )
    return factor.to(z).reshape(-1, *(1,) * (z.dim() - 2))


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise NetworkError(
            f"{name} returned a {type(value).__name__}: it must return a tensor; wrap it, lambda z: vae.{name}(z)[0]"
        )
    return value
