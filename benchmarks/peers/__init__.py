"""Samplers of other libraries as lines of the same sweep: ``library/sampler``, counted and timed at the same meter.

A library is one file here and one row of LIBRARIES. Nothing of it is imported before one of its lines is asked for.
"""

from __future__ import annotations

import importlib

from sde.errors import InputError, nearest

from .base import Library
from .line import PeerLine

#: name -> the module here that declares it. The first seven are on PyPI; of the others a copy of the repository is needed.
LIBRARIES: dict[str, str] = {
    "diffusers": "diffusers",
    "k_diffusion": "k_diffusion",
    "azula": "azula",
    "flow_matching": "flow_matching",
    "torchdiffeq": "torchdiffeq",
    "torchsde": "torchsde",
    "torchode": "torchode",
    "dpm_solver": "dpm_solver",
    "uni_pc": "uni_pc",
    "diff_sampler": "diff_sampler",
    "edm": "edm",
}


def library(name: str) -> Library:
    """A library's table. InputError, with the nearest names, for an unknown one. It need not be installed."""
    known = name.replace("-", "_")
    if known not in LIBRARIES:
        raise InputError(f"{name!r} is no library of benchmarks/peers: {nearest(known, LIBRARIES)}")
    return importlib.import_module(f".{LIBRARIES[known]}", __name__).LIBRARY


def parse_line(text: str) -> PeerLine:
    """The line of ``library/sampler:option=value,...``, whether or not the library is installed."""
    name, _, rest = text.partition("/")
    found = library(name)
    short, options = found.parse(rest)
    return PeerLine(found, short, tuple(sorted(options.items())))


def resolve_line(text: str) -> PeerLine:
    """The line, ready to run. InputError: unknown, or its library cannot be imported, with the command that installs it."""
    line = parse_line(text)
    line.library.module()
    return line
