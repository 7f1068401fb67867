"""Small score networks and their weight files.

A weight file is safetensors: tensors (float16 on disk) and one line of JSON that says all that is needed to use them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from scores import Score
from scores.checkpoint import Weights, load_into, load_weights
from scores.safetensors_file import encode
from sde import EDM
from sde.errors import CheckpointError, InputError


class _Block(nn.Module):
    """h + B silu((1 + scale) A norm(h) + shift), scale and shift from the noise level; B starts at zero."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)
        self.level = nn.Linear(32, 2 * width)
        self.drop = nn.Dropout(dropout)
        for part in (self.b, self.level):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.level(level).chunk(2, dim=-1)
        return h + self.b(self.drop(nn.functional.silu(self.a(self.norm(h)) * (1.0 + scale) + shift)))


class DigitNetwork(nn.Module):
    """A residual perceptron on 8x8 pictures: network(c_in x, log(sigma)/4), both as EDM's, predicts EDM's F.

    c_in x (B, 1, 8, 8), label (B,) -> (B, 1, 8, 8).
    """

    def __init__(self, width: int = 288, blocks: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.settings = {"width": width, "blocks": blocks, "dropout": dropout}
        self.register_buffer("frequencies", math.pi * torch.arange(1, 9) / 4, persistent=False)
        self.embed = nn.Sequential(nn.Linear(16, 32), nn.SiLU())
        self.first = nn.Linear(64, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 64)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def hidden(self, x: Tensor, label: Tensor) -> Tensor:
        """What the last layer sees, (B, width)."""
        angle = label[:, None] * self.frequencies  # pyright: ignore[reportOperatorIssue]
        level = self.embed(torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype))
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, level)
        return self.norm(h)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.last(self.hidden(x, label)).reshape(x.shape)


def edm_score(network: nn.Module, sigma_data: float, mode: str = "eval") -> Score:
    """EDM's preconditioning of a network that predicts F (Karras et al. 2022, table 1)."""
    return Score(
        network,
        EDM(),
        "F",
        label=lambda t: t.log() / 4,
        scale=lambda t: (t * t + sigma_data**2) ** -0.5,
        sigma_data=sigma_data,
        mode=mode,
    )


def to_bytes(network: DigitNetwork, about: Mapping[str, object]) -> bytes:
    """The weight file's bytes: the same weights and words give the same bytes."""
    tensors = {name: value.detach().to(torch.float16) for name, value in network.state_dict().items()}
    return encode(tensors, {"about": json.dumps(about, sort_keys=True)})


def about(file: File) -> dict[str, Any]:
    """What a weight file says of itself."""
    return _read(file)[1]


def load(file: File, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Score:
    """The score in a weight file. The network's settings are read from the file, its tensors checked against them."""
    weights, words = _read(file)
    try:
        settings, sigma_data = dict(words["network"]), float(words["sigma_data"])
        if (settings.pop("kind"), words["path"], words["predicts"]) != ("DigitNetwork", "EDM", "F"):
            raise InputError(f"{file}: holds {words['network']} on {words['path']}, not a DigitNetwork on EDM that predicts F")
        width, blocks = int(settings["width"]), int(settings["blocks"])
        if not (1 <= width <= 4096 and 1 <= blocks <= 64):
            raise InputError(f"{file}: a width of {width} and {blocks} blocks are out of bounds")
        network = DigitNetwork(width, blocks, float(settings["dropout"]))
        load_into(network, weights)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError) and not isinstance(error, CheckpointError):
            raise
        raise InputError(f"{file}: its tensors do not fit its description ({error})") from None
    return edm_score(network.to(device, dtype).requires_grad_(False), sigma_data)


def _read(file: File) -> tuple[Weights, dict[str, Any]]:
    """The tensors of a weight file, and what it says of itself."""
    try:
        weights = load_weights(file)
        words = json.loads(weights.metadata.get("about", ""))
    except ValueError as error:  # a CheckpointError, or words that are no JSON
        why = error if isinstance(error, CheckpointError) else f"{file}: it does not say what it is"
        raise InputError(f"{why}: not a weight file; make one with: python -m benchmarks train digits --out {file}") from None
    if not isinstance(words, dict):
        raise InputError(f"{file}: not a weight file of benchmarks train")
    return weights, words
