"""Samples as one picture, and numbers as bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sheet(
    x: Tensor, picture: tuple[int, ...] | None, centre: Tensor | None, spread: Tensor | None, count: int
) -> np.ndarray[Any, Any]:
    """Samples (B, ...) as uint8 (H, W), or (H, W, 3): tiled where they are pictures of 1 or 3 channels, counted in the plane,
    else ``count`` rows. ``centre`` and ``spread`` (d,) of the law; None: those of the samples.
    """
    x = x.detach().double().cpu()
    if picture is not None and picture[0] in (1, 3):
        return _tiles(x[:count].reshape(-1, *picture))
    x = x.reshape(len(x), -1)
    centre = x.mean(0) if centre is None else centre
    spread = x.std(0) if spread is None else spread
    z = (x - centre) / spread.clamp_min(1e-12)
    if x.shape[1] == 2:
        return _density(z)
    return ((z[:count] / 6.0 + 0.5).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).numpy()


def _tiles(x: Tensor) -> np.ndarray[Any, Any]:
    """(B, C, H, W) in [-1, 1] as a near-square sheet with a white line between tiles."""
    columns = math.ceil(math.sqrt(max(1, len(x))))
    rows, (c, h, w) = math.ceil(len(x) / columns), x.shape[1:]
    sheet = torch.full((max(1, rows) * (h + 1) - 1, columns * (w + 1) - 1, c), 255, dtype=torch.uint8)
    for i, tile in enumerate(to_bytes(x).permute(0, 2, 3, 1)):
        top, left = (i // columns) * (h + 1), (i % columns) * (w + 1)
        sheet[top : top + h, left : left + w] = tile
    return (sheet[..., 0] if c == 1 else sheet).numpy()


def _density(z: Tensor, cells: int = 96) -> np.ndarray[Any, Any]:
    """Counts of standardised points of the plane, dark where there are many; the square root, so that thin parts show."""
    counts, _, _ = np.histogram2d(-z[:, 1].numpy(), z[:, 0].numpy(), bins=cells, range=((-4.0, 4.0), (-4.0, 4.0)))
    return np.round(255.0 * (1.0 - np.sqrt(counts / max(1.0, counts.max())))).astype(np.uint8)


def to_bytes(x: Tensor) -> Tensor:
    """[-1, 1] to 0 ... 255, rounded to nearest."""
    return (x.double() * 127.5 + 128.0).clamp(0.0, 255.0).to(torch.uint8)
