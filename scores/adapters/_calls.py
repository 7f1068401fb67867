"""Small differences in how networks are called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError

from ._options import Options


def one_time(t: Tensor) -> Tensor:
    """The time as libraries' own loops give it: of shape () where all samples share it, else (B,) as it is.

    Shared times arrive as one number expanded to (B,), which its stride tells without asking the device.
    """
    return t[0] if len(t) and (len(t) == 1 or t.stride(0) == 0) else t


def guided(model: Any, scale: float | None, null: int, options: Options) -> tuple[Any, Options]:
    """(network, options) with DiT's and SiT's own classifier-free guidance: ``model.forward_with_cfg`` on 2B rows, with labels
    y and then ``null``, of which the first B count. It guides the first three channels and leaves the rest as y gives it.

    Two networks a call. Without a ``scale`` both come back as they are.
    """
    if scale is None:
        return model, options
    if not hasattr(model, "forward_with_cfg"):
        name = type(model).__name__
        raise InputError(f"cfg_scale={scale}: {name} has no forward_with_cfg; guide the score instead, see scores.guidance")

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        labels = torch.cat([y, torch.full_like(y, null)])
        return model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), labels, scale)[: len(x)]

    return network, {"evals": 2, **options}
