"""Which of a file's tensors are a network's weights.

A *copy* of a network is a prefix under which the file has all the parameters that the network trains: "", "module.",
"state_dict.model.diffusion_model.". What the prefix is called decides whether the copy is a moving average: by the table
``AVERAGES``, and by nothing in the file. Two families write their average without the network's names, so that it is found
through the table alone. One copy is taken as it is; of several the caller says which.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from sde.errors import CheckpointError

from .safetensors_file import show


class Average(NamedTuple):
    """How a family of checkpoints writes its moving average; ``name`` is a run of whole components of a path."""

    family: str
    name: str
    style: str


#: "names": the network's names follow. "joined": they follow with their dots removed, parameters alone (LitEma). "list": the
#: parameters that are trained, numbered in the order of ``network.parameters()``. The first row that fits is the one.
AVERAGES = (
    Average("score_sde, RectifiedFlow, flow_matching, diffusers", "shadow_params", "list"),
    Average("latent-diffusion", "model_ema", "joined"),
    Average("lucidrains", "ema.ema_model", "names"),
    Average("torchcfm", "ema_model", "names"),
    Average("JiT", "model_ema1", "names"),
    Average("JiT", "model_ema2", "names"),
    Average("k-diffusion", "model_ema", "names"),
    Average("DiT, SiT", "ema", "names"),
    Average("NCSN, DDIM", "[4]", "names"),
)
#: A second copy of the weights as trained (lucidrains): passed over.
DUPLICATE = "ema.online_model"


@dataclass(frozen=True)
class Copy:
    """One set of a network's weights: {name in the network: name in the file}."""

    prefix: str
    names: Mapping[str, str]
    average: Average | None = None
    fault: str = ""

    def __str__(self) -> str:
        return f"{show(self.prefix)}{f' (average, {self.average.family})' if self.average else ''}"

    def is_called(self, name: str) -> bool:
        return self.prefix.startswith(name + ".") or (self.average is not None and self.average.name == name)


def choose(
    network: nn.Module, given: Mapping[str, Tensor], ema: bool | str | None, prefix: str | None, strict: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of one copy under the network's names, and notes on where they were.

    Errors: CheckpointError where no copy, or more than one, is what was asked for, or it is not just the network's.
    """
    state = {name: value for name, value in network.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    found = _copies(network, state, given)
    copy = _wanted(found, ema, prefix) or _nearest(state, given, ema, prefix)
    if copy.fault:
        raise CheckpointError(copy.fault)
    names, notes = dict(copy.names), [f"under {copy}"] if copy.prefix else []
    plain = [other for other in found if other.average is None] if copy.average else []
    lacking = [name for name in state if name not in names]
    if copy.average and lacking and (strict or plain):
        if len(plain) != 1:
            raise CheckpointError(f"{copy} lacks {listed(lacking)}, and there are {len(plain)} copies to take that from")
        names |= {name: plain[0].names[name] for name in lacking if name in plain[0].names}
        notes.append(f"{len(lacking)} of {len(state)} from {plain[0]}")
    by_name = copy.average is None or copy.average.style == "names"  # else the weights as trained have the network's names
    base = plain[0].prefix if len(plain) == 1 and not by_name else copy.prefix
    taken = {place for other in (*found, copy) for place in other.names.values()}
    beside = [place for place in given if place.startswith(base) and place not in taken]
    extra = [place for place in beside if _average_of(place[len(base) :]) is None]  # an average may have more of its own
    _check_fit(type(network).__name__, given, state, names, extra, base, strict)
    return {name: given[place] for name, place in names.items()}, notes


def listed(names: Iterable[str], limit: int = 5, room: int = 90) -> str:
    """At most five names, in little room."""
    kept: list[str] = []
    rest = iter(names)
    for name in rest:
        if len(kept) == limit or (kept and len(", ".join((*kept, name))) > room):
            return ", ".join(kept) + ", ..."
        kept.append(name if len(name) <= room else show(name, room)[1:-1])
    return ", ".join(kept)


def _wanted(found: list[Copy], ema: bool | str | None, prefix: str | None) -> Copy | None:
    """The one copy that was asked for; None where the file has none at all."""
    fits = _asked_for(found, ema, prefix)
    fits = [copy for copy in fits if copy.prefix == prefix] or fits
    if len(fits) == 1 or not found:
        return fits[0] if fits else None
    if fits:
        what = f"{len(fits)} copies of this network: {', '.join(map(str, fits[:3]))}"
        raise CheckpointError(f"holds {what}; say ema=True, ema=False, ema='a name' or prefix=")
    hint = "; a file with one copy does not say what it is: leave ema out" if len(found) == 1 else ""
    raise CheckpointError(f"has no copy for ema={ema!r}, prefix={prefix!r}: it has {', '.join(map(str, found[:3]))}{hint}")


def _asked_for(copies: Iterable[Copy], ema: bool | str | None, prefix: str | None) -> list[Copy]:
    fits = [copy for copy in copies if copy.prefix.startswith(prefix or "")]
    if isinstance(ema, str):
        return [copy for copy in fits if copy.is_called(ema)]
    return fits if ema is None else [copy for copy in fits if (copy.average is not None) == ema]


def _check_fit(
    kind: str,
    given: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    extra: list[str],
    base: str,
    strict: bool,
) -> None:
    if not names:
        raise CheckpointError(
            f"does not fit {kind}: it has {listed(given)}, and the network {listed(state)}; is there a prefix?"
        )
    shapes = [(name, given[place].shape, state[name].shape) for name, place in names.items()]
    faults = {
        "missing": [name for name in state if name not in names] if strict else [],
        "unexpected": extra if strict else [],
        "of another shape": [f"{name} {_size(there)}, not {_size(here)}" for name, there, here in shapes if there != here],
    }
    said = [f"{len(found)} {what} ({listed(found)})" for what, found in faults.items() if found]
    if said:
        raise CheckpointError(f"does not fit {kind}{f' under {show(base)}' if base else ''}: {'; '.join(said)}")


def _copies(network: nn.Module, state: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[Copy]:
    """Every copy of the parameters that the network trains, plain ones first."""
    every = [name for name, _ in network.named_parameters() if name in state]
    trained = [name for name, p in network.named_parameters() if p.requires_grad and name in state]
    needed = trained or every or list(state)
    found = [
        Copy(prefix, names, _average_of(prefix))
        for prefix, names in _by_prefix(state, given).items()
        if all(name in names for name in needed) and not _has(prefix, DUPLICATE)
    ]
    known = [{name: copy.names[name] for name in needed} for copy in found]
    found += [copy for copy in _joined([c for c in found if c.average is None], needed, given) if copy.names not in known]
    found += _numbered(needed, every, state, given)
    return sorted(found, key=lambda copy: (copy.average is not None, len(copy.prefix), copy.prefix))


def _by_prefix(state: Mapping[str, Tensor], given: Iterable[str]) -> dict[str, dict[str, str]]:
    """{prefix: {name in the network: name in the file}} for every prefix under which the file has any of the names.

    Of tensors that are one in the network (tied layers) some writers keep one name: it stands for all of them.
    """
    lengths = sorted({name.count(".") + 1 for name in state})
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for place in given:
        parts = place.split(".")
        for length in lengths:
            name = ".".join(parts[-length:])
            if name in state:
                found[place[: len(place) - len(name)]][name] = place
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, value in state.items():
        names_of[id(value)].append(name)
    for tied in (names for names in names_of.values() if len(names) > 1):
        for names in found.values():
            kept = next((names[name] for name in tied if name in names), None)
            if kept:
                names.update({name: names.get(name, kept) for name in tied})
    return found


def _joined(plain: Iterable[Copy], needed: list[str], given: Mapping[str, Tensor]) -> Iterator[Copy]:
    """LitEma's buffers: "outer.model.rest.a.b" of the weights as trained is "outer.model_ema.restab" of the average."""
    row = next(row for row in AVERAGES if row.style == "joined")
    outers = {f".{place}".split(f".{row.name}.")[0][1:] for place in given if _has(place, row.name)}
    for copy in plain:
        for outer in sorted(f"{outer}." if outer else "" for outer in outers):
            inner = copy.prefix.removeprefix(outer)
            if not copy.prefix.startswith(outer):
                continue
            for rest in dict.fromkeys((inner.removeprefix("model."), inner)):
                names = {name: f"{outer}{row.name}.{(rest + name).replace('.', '')}" for name in needed}
                if all(place in given for place in names.values()) and len(set(names.values())) == len(names):
                    yield Copy(f"{outer}{row.name}.", names, row)
                    break


def _numbered(needed: list[str], every: list[str], state: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterator[Copy]:
    """Lists of parameters: which is which follows from their order in the network alone, so number and shapes must agree."""
    row = next(row for row in AVERAGES if row.style == "list")
    lists: dict[str, dict[int, str]] = defaultdict(dict)
    for place in given:
        match = re.fullmatch(rf"((?:.+\.)?{row.name}\.)\[?(\d{{1,9}})\]?", place)
        if match:
            lists[match[1]][int(match[2])] = place
    for prefix, places in lists.items():
        order = next((names for names in (needed, every) if len(names) == len(places)), [])
        names = {name: places.get(index, "") for index, name in enumerate(order)}
        wrong = next((n for n, place in names.items() if place not in given or given[place].shape != state[n].shape), None)
        fault = ""
        if not order:
            trained = f"{len(needed)} of {len(every)} parameters are trained in the network"
            fault = f"{show(prefix)} has {len(places)} averages, and {trained}: give it as built, before requires_grad_(False)"
        elif wrong:
            fault = (
                f"{show(prefix)} goes by the order of parameters, and number {order.index(wrong)} does not fit {show(wrong)}"
            )
        yield Copy(prefix, names, row, fault)


def _nearest(state: Mapping[str, Tensor], given: Mapping[str, Tensor], ema: bool | str | None, prefix: str | None) -> Copy:
    """Of the prefixes that may be meant, the one with most of the network's names."""
    under = _by_prefix(state, given)
    copies = _asked_for([Copy(place, names, _average_of(place)) for place, names in under.items()], ema, prefix)
    return max(copies, key=lambda copy: (len(copy.names), -len(copy.prefix)), default=Copy(prefix or "", {}))


def _average_of(prefix: str) -> Average | None:
    """The row of the table that a prefix belongs to."""
    return next((row for row in AVERAGES if row.style != "joined" and _has(prefix, row.name)), None)


def _has(place: str, name: str) -> bool:
    return f".{name}." in f".{place}"


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
