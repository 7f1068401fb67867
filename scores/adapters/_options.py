"""What every adapter hands on to ``Score`` as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch


class Options(TypedDict, total=False):
    """Keyword arguments of every adapter, with the meaning they have in ``Score``."""

    conditions: Mapping[str, Any] | None
    mode: str | None
    dtype: torch.dtype | None
    evals: int
