"""How good samples are: METRICS by name, each number with its interval and its floor.

``metric("fd")`` is a row of METRICS; ``metric("fd:features=raw")`` is the same with fields changed, ``name:field=value,...``.
The way of a number: ``summarise`` each part of the samples, ``merge`` the parts of a block, ``measure`` the blocks, ``floor``
for the same size, ``within`` to compare. ``recommend`` says how many samples it takes to see a difference.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sde.errors import InputError, nearest

from .base import Block as Block
from .base import Measured as Measured
from .base import Metric as Metric
from .base import measure as measure
from .base import summarise as summarise
from .base import too_few as too_few
from .floors import Recommendation as Recommendation
from .floors import enough as enough
from .floors import floor as floor
from .floors import floor_key as floor_key
from .floors import floor_missing as floor_missing
from .floors import perfect as perfect
from .floors import recommend as recommend
from .floors import within as within
from .gaussian import Exactly, Fitted
from .gaussian import frechet as frechet
from .kernel import Kernelled
from .kernel import energy_distance as energy_distance
from .levels import Floor as Floor
from .levels import Level as Level
from .levels import level as level
from .likelihood import ModelNLL, SampleNLL
from .neighbours import Neighbours
from .reference import load_reference as load_reference
from .reference import save_reference as save_reference
from .sliced import Sliced
from .sliced import directions as directions
from .sliced import sliced_w2 as sliced_w2
from .statistics import merge as merge
from .strong import StrongError
from .transport import Transport
from .transport import nearest_distance as nearest_distance
from .transport import wasserstein as wasserstein

METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        StrongError("strong_error"),
        StrongError("strong_error_median", "median"),
        StrongError("strong_error_max", "max"),
        Fitted("fd", "fd"),
        Fitted("fid", "fd", "inception"),
        Fitted("fd_dinov2", "fd", "dinov2"),
        Fitted("w2_gaussian", "w2", "raw"),
        Fitted("kl_gaussian", "kl", "raw"),
        Fitted("mean_error", "mean", "raw"),
        Fitted("cov_error", "cov", "raw"),
        Exactly("w2_exact", "w2"),
        Exactly("kl_exact", "kl"),
        Exactly("mean_error_exact", "mean"),
        Sliced("sliced_w2"),
        Sliced("max_sliced_w2", worst=True),
        Transport("w1", 1),
        Transport("w2", 2),
        Kernelled("energy", "energy"),
        Kernelled("mmd", "gaussian", "own"),
        Kernelled("cmmd", "gaussian", "clip", width=10.0, scale=1000.0, unbiased=False),
        Kernelled("kid", "cubic", "own"),
        Neighbours("precision", "precision", 3),
        Neighbours("recall", "recall", 3),
        Neighbours("density", "density", 5),
        Neighbours("coverage", "coverage", 5),
        SampleNLL("nll"),
        ModelNLL("nll_model"),
    )
}


def metric(text: str) -> Metric:
    """The metric ``name`` or ``name:field=value,...``. InputError, with the nearest names, for one that does not exist."""
    name, _, rest = text.partition(":")
    if name not in METRICS:
        raise InputError(f"metric {name!r} is unknown: {nearest(name, METRICS)}")
    found = METRICS[name]
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name not in ("name", "kind", "kernel")}
    changed: dict[str, Any] = {}
    for word in rest.split(",") if rest else []:
        field, _, value = word.partition("=")
        if field not in fields:
            hint = nearest(field, fields) if fields else "it has none"
            raise InputError(f"metric {text!r}: {name} has no field {field!r}: {hint}")
        changed[field] = _read(text, field, value, fields[field])
    return dataclasses.replace(found, name=text, **changed)


def _read(text: str, field: str, value: str, like: Any) -> Any:
    """A value as what the field is."""
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[value.lower()]
        return type(like)(value)
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(like)]
        raise InputError(f"metric {text!r}: {field}={value!r} is not {kind}") from None
