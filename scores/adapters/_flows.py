"""Paths of flow models whose own time u = 1 - t runs from noise, u = 0, to data, u = 1."""

from __future__ import annotations

import torch
from torch import Tensor

from sde.path import FromFunctions, Path, Trigonometric


def rising(t: Tensor) -> Tensor:
    """u = 1 - t."""
    return 1.0 - t


def linear_vp() -> Path:
    """alpha = u, sigma = sqrt(1 - u^2)."""
    return FromFunctions(rising, lambda t: torch.sqrt(t * (2.0 - t)))


def polynomial(n: float) -> Path:
    """alpha = u^n, sigma = 1 - u^n. For n > 1 the velocity is 0 at u = 0 and knows nothing of x0 there: T = 0.999."""
    return FromFunctions(
        lambda t: (1.0 - t) ** n,
        lambda t: -torch.expm1(n * torch.log1p(-t)),
        lambda t: -n * (1.0 - t) ** (n - 1.0),
        lambda t: n * (1.0 - t) ** (n - 1.0),
        T=1.0 if n == 1.0 else 0.999,
    )


def widened(sigma: float, trigonometric: bool) -> Path:
    """A path from unit normals with normals of deviation ``sigma`` added all along: alpha as before, sigma_t^2 + sigma^2."""
    if trigonometric:
        base = Trigonometric()
        return FromFunctions(base.alpha, lambda t: torch.sqrt(base.sigma(t) ** 2 + sigma**2), t_min=0.0)
    return FromFunctions(rising, lambda t: torch.sqrt(t * t + sigma**2), t_min=0.0)
