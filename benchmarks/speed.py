"""``python -m benchmarks speed``: all ``benchmarks/speed_*.py``, or one; each has a ``main()`` that prints its table."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path as File
from typing import Annotated

import tyro

from sde.errors import InputError, nearest


@dataclass(frozen=True)
class Speed:
    """What things cost on this machine."""

    what: Annotated[str, tyro.conf.Positional] = "all"
    """One table, such as noise; or all."""


def tables() -> list[str]:
    found = (module.name for module in pkgutil.iter_modules([str(File(__file__).parent)]))
    return sorted(name.removeprefix("speed_") for name in found if name.startswith("speed_"))


def run(config: Speed) -> int:
    names = tables()
    if config.what not in ("all", *names):
        raise InputError(f"speed {config.what!r} is unknown: {nearest(config.what, ['all', *names])}")
    for name in names if config.what == "all" else [config.what]:
        importlib.import_module(f"benchmarks.speed_{name}").main()
    return 0
