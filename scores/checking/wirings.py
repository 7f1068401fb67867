"""The wirings that ``scores.check`` tries, as data: how a network would have to be wired instead, and what that is called.

A wiring is what stands between data and a prediction: path, time label, input scaling, an affine map of the data, conditions;
and a reading, the row (a, b) that the output is taken for, y = a x0 + b eps. A hypothesis is the wiring as given with one part
replaced, or with path, label and scaling replaced together where a network was taken for one of another family. Readings need
no network call of their own, so every reading is tried with every wiring. Nothing here calls a network.

To teach ``check`` another mistake, add a line to a table: ``UNIT_LABELS``, ``LEVEL_LABELS``, ``PATHS``, ``RANGES``,
``LATENTS``, ``FAMILIES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sde.path import EDM, VE, VP, Cosine, FromFunctions, Linear, Path, SubVP, Tabulated, Trigonometric
from sde.prediction import OUTPUTS, Knot, Row

from ..network import TimeFunction

RowOf = Callable[[Knot], Row]


@dataclass(frozen=True)
class Wiring:
    """How a network is connected. It sees gain * data + shift where the caller's data are ``data``.

    ``changes`` says what is not as it was given: part -> the line of code.
    """

    path: Path
    label: TimeFunction
    scale: TimeFunction | None = None
    gain: float = 1.0
    shift: float = 0.0
    conditions: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)

    def instead(self, part: str, line: str, **values: Any) -> Wiring:
        return replace(self, changes={**self.changes, part: line}, **values)


@dataclass(frozen=True)
class Reading:
    """What an output is taken for: its row, its name ("given", or one of OUTPUTS), and sigma_data where that is "F"."""

    row: RowOf
    name: str = "given"
    negated: bool = False
    spread: float = 0.0

    @property
    def line(self) -> str:
        named = "" if self.name == "given" else f'predicts="{self.name}"'
        named += f", sigma_data={self.spread:g}" if self.name == "F" else ""
        network = "network=lambda x, t, **more: -net(x, t, **more)" if self.negated else ""
        return ", ".join(filter(None, (named, network)))


# --- readings -----------------------------------------------------------------------------------------------------------

SPREADS = (0.25, 0.5, 0.7, 1.0)  # of sigma_data; that of the data is tried, too


def readings(given: RowOf, spreads: Sequence[float]) -> list[Reading]:
    """As given; that negated; every row of OUTPUTS; and these negated."""
    found = [Reading(given), Reading(_signed(given, -1.0), negated=True)]
    for sign in (1.0, -1.0):
        for name in OUTPUTS:
            for spread in spreads if name == "F" else (0.0,):
                found.append(Reading(_signed(_named(name, spread), sign), name, sign < 0.0, spread))
    return found


def _named(name: str, spread: float) -> RowOf:
    return lambda k: OUTPUTS[name](k.alpha, k.sigma, k.dalpha, k.dsigma, spread)


def _signed(row: RowOf, sign: float) -> RowOf:
    def signed(k: Knot) -> Row:
        a, b = row(k)
        return Row(sign * a, sign * b)

    return signed


# --- time labels --------------------------------------------------------------------------------------------------------


def mirrored(path: Path) -> TimeFunction:
    """t -> the time as far from noise as t is from data: 1 - t, or, where T is a noise level, the same in lambda."""
    if path.T == 1.0:
        return lambda t: 1.0 - t
    ends = path.lam(torch.tensor([path.t_min, path.T], dtype=torch.float64)).clamp(-10.0, 10.0)
    return lambda t: path.time(float(ends.sum()) - path.lam(t))


def _ratio(path: Path, t: Tensor) -> Tensor:
    return torch.exp(-path.lam(t))


#: Labels on [0, 1]: code -> (path, t) -> label.
UNIT_LABELS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "t": lambda path, t: t,
    "1 - t": lambda path, t: 1.0 - t,
    "999 * t": lambda path, t: 999.0 * t,
    "999 * (1 - t)": lambda path, t: 999.0 * (1.0 - t),
}

#: Labels made of the noise level, which is called {level} in the code.
LEVEL_LABELS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "torch.log({level}) / 4": lambda path, t: -0.25 * path.lam(t),
    "{level}": _ratio,
    "250 * torch.log({level})": lambda path, t: -250.0 * path.lam(t),
    "-2 * torch.log({level})": lambda path, t: 2.0 * path.lam(t),
    "torch.atan({level}) * 2 / math.pi": lambda path, t: torch.atan(_ratio(path, t)) * (2.0 / math.pi),
}


def _level_code(path: Path) -> str:
    return "t" if isinstance(path, EDM) else "path.sigma(t)" if isinstance(path, VE) else "path.sigma(t) / path.alpha(t)"


def unit_labels(w: Wiring) -> Iterator[Wiring]:
    """Time itself, the entry of a table, and the given label mirrored, multiplied, divided."""
    path, given = w.path, w.label
    if isinstance(path, Tabulated):
        yield w.instead("label", "label=path.index", label=lambda t: path.index(t).clamp(min=0.0))
    if path.T == 1.0:
        for code, label in UNIT_LABELS.items():
            yield w.instead("label", f"label=lambda t: {code}", label=lambda t, label=label: label(path, t))
    mirror, where = mirrored(path), "where old is the label that you have"
    back = "1 - t" if path.T == 1.0 else "T - t"
    yield w.instead("label", f"label=lambda t: old({back}), {where}", label=lambda t: given(mirror(t)))
    yield w.instead("label", f"label=lambda t: 999 * old(t), {where}", label=lambda t: 999.0 * given(t))
    yield w.instead("label", f"label=lambda t: old(t) / 999, {where}", label=lambda t: given(t) / 999.0)


def level_labels(w: Wiring) -> Iterator[Wiring]:
    path, level = w.path, _level_code(w.path)
    for code, label in LEVEL_LABELS.items():
        line = f"label=lambda t: {code.format(level=level)}"
        yield w.instead("label", line, label=lambda t, label=label: label(path, t))


# --- input scalings -----------------------------------------------------------------------------------------------------


def c_in(path: Path, spread: float) -> TimeFunction:
    """1 / sqrt(sigma^2 + spread^2 alpha^2): EDM's, for a state on any path; with spread 1, to VP coordinates."""
    return lambda t: (path.sigma(t) ** 2 + (spread * path.alpha(t)) ** 2) ** -0.5


def scalings(w: Wiring, spreads: Sequence[float]) -> Iterator[Wiring]:
    path = w.path
    if w.scale is not None:
        yield w.instead("scale", "scale=None", scale=None)
    if not isinstance(path, (EDM, VE)):
        yield w.instead("scale", "scale=lambda t: 1 / path.alpha(t)", scale=lambda t: 1.0 / path.alpha(t))
    for spread in spreads:
        square = f"{spread * spread:.4g}"
        code = f"(t * t + {square}) ** -0.5"
        if not isinstance(path, EDM):
            code = f"(path.sigma(t) ** 2 + {square} * path.alpha(t) ** 2) ** -0.5"
        yield w.instead("scale", f"scale=lambda t: {code}", scale=c_in(path, spread))


# --- paths --------------------------------------------------------------------------------------------------------------


def shifted(shift: float) -> Path:
    """Linear() at the times shift t / (1 + (shift - 1) t)."""
    return FromFunctions(
        lambda t: (1.0 - t) / (1.0 + (shift - 1.0) * t),
        lambda t: shift * t / (1.0 + (shift - 1.0) * t),
        lambda t: -shift / (1.0 + (shift - 1.0) * t) ** 2,
        lambda t: shift / (1.0 + (shift - 1.0) * t) ** 2,
    )


#: Paths on [0, 1].
PATHS: dict[str, Callable[[], Path]] = {
    "VP()": VP,
    "Cosine()": Cosine,
    "Tabulated.linear()": Tabulated.linear,
    "Tabulated.scaled_linear()": Tabulated.scaled_linear,
    "Tabulated.squared_cosine()": Tabulated.squared_cosine,
    "Linear()": Linear,
    "Trigonometric()": Trigonometric,
    "SubVP()": SubVP,
    "Linear() at the times 3 t / (1 + 2 t): the shift is in the grid, or in the label, but not in both": lambda: shifted(3.0),
    "Linear() at the times t / (3 - 2 t): the shift is in the grid, or in the label, but not in both": lambda: shifted(1 / 3),
}


def paths(w: Wiring) -> Iterator[Wiring]:
    """Other paths on [0, 1]; label and scaling stay what they are as functions of time."""
    if w.path.T == 1.0:
        for code, make in PATHS.items():
            yield w.instead("path", f"path={code}", path=make())


# --- data ---------------------------------------------------------------------------------------------------------------

#: What the network was trained on, in terms of the caller's data: code -> (gain, shift).
RANGES: dict[str, tuple[float, float]] = {
    "2 * data - 1": (2.0, -1.0),
    "(data + 1) / 2": (0.5, 0.5),
    "data / 127.5 - 1": (1.0 / 127.5, -1.0),
    "data / 255": (1.0 / 255.0, 0.0),
    "127.5 * (data + 1)": (127.5, 127.5),
    "255 * data": (255.0, 0.0),
}
LATENTS: dict[str, tuple[float, float]] = {
    "0.18215 * data": (0.18215, 0.0),
    "data / 0.18215": (1.0 / 0.18215, 0.0),
    "0.13025 * data": (0.13025, 0.0),
    "data / 0.13025": (1.0 / 0.13025, 0.0),
}


def data_maps(w: Wiring) -> Iterator[Wiring]:
    for part, table in (("range", RANGES), ("latents", LATENTS)):
        for code, (gain, shift) in table.items():
            yield w.instead(part, f"data = {code}", gain=gain, shift=shift)


# --- families -----------------------------------------------------------------------------------------------------------


def _entry(path: Path, t: Tensor) -> Tensor:
    return path.index(t).clamp(min=0.0) if isinstance(path, Tabulated) else t


_LOG, _QUARTER, _ONE = "torch.log(t) / 4", "(t * t + 0.25) ** -0.5", "(t * t + 1) ** -0.5"

#: Path, label and scaling of well-known families: (path, label's code, label, scale's code, sigma_data of the scale).
FAMILIES: tuple[tuple[str, Callable[[], Path], str, Callable[[Path, Tensor], Tensor], str, float], ...] = (
    ("EDM()", EDM, _LOG, lambda path, t: 0.25 * torch.log(t), _QUARTER, 0.5),
    ("EDM()", EDM, _LOG, lambda path, t: 0.25 * torch.log(t), _ONE, 1.0),
    ("EDM()", EDM, "250 * torch.log(t)", lambda path, t: 250.0 * torch.log(t), _QUARTER, 0.5),
    ("EDM()", EDM, "t", lambda path, t: t, "", 0.0),
    *((code, PATHS[code], "path.index(t)", _entry, "", 0.0) for code in PATHS if code.startswith("Tabulated")),
    ("VP()", VP, "t", lambda path, t: t, "", 0.0),
    ("Cosine()", Cosine, "t", lambda path, t: t, "", 0.0),
    ("Cosine()", Cosine, "2 * path.lam(t)", lambda path, t: 2.0 * path.lam(t), "", 0.0),
    ("Trigonometric()", Trigonometric, "t", lambda path, t: t, "", 0.0),
    ("Linear()", Linear, "t", lambda path, t: t, "", 0.0),
    ("Linear()", Linear, "1 - t", lambda path, t: 1.0 - t, "", 0.0),
    ("Linear()", Linear, "1000 * t", lambda path, t: 1000.0 * t, "", 0.0),
    ("Linear()", Linear, "999 * (1 - t)", lambda path, t: 999.0 * (1.0 - t), "", 0.0),
)


def families(w: Wiring) -> Iterator[Wiring]:
    """Where the path is the given one, label and scaling are two changes; else all is one."""
    for path_code, make, label_code, label, scale_code, spread in FAMILIES:
        path = make()
        scale = c_in(path, spread) if spread else None
        known = {"path": path, "label": lambda t, path=path, label=label: label(path, t), "scale": scale}
        scaling = f"scale=lambda t: {scale_code}" if spread else "scale=None"
        if path == w.path:
            two = w.instead("label", f"label=lambda t: {label_code}").instead("scale", scaling)
            yield replace(two, **known)
        else:
            yield w.instead("family", f"Score(network, {path_code}, label=lambda t: {label_code}, {scaling})", **known)


def groups(w: Wiring, spreads: Sequence[float], classes: Sequence[Wiring]) -> Iterator[list[Wiring]]:
    """All hypotheses, the likelier and simpler first. ``classes`` are those about conditions, which depend on the network."""
    yield list(unit_labels(w))
    yield list(classes)
    yield list(scalings(w, spreads))
    yield list(data_maps(w))
    yield list(paths(w))
    yield list(level_labels(w))
    yield list(families(w))
    yield [v for u in (*unit_labels(w), *level_labels(w)) for v in scalings(u, (0.5, 1.0))]


# --- what a difference is called ----------------------------------------------------------------------------------------


def mistakes(given: Wiring, row: RowOf, found: Wiring, reading: Reading, times: Tensor, cut: bool) -> list[tuple[str, str]]:
    """(name of ``MISTAKES``, the line to change) for each part in which ``found`` and ``reading`` are not as given.

    ``times`` are those of the levels that were looked at; ``cut``: the network answers the same for different given labels.
    """
    path, changes = given.path, dict(found.changes)
    named: list[tuple[str, str]] = []
    knots = path.knots(times)
    alone = reading.name == "F" and not reading.negated and _is_f(row, knots)
    if alone and changes.keys() <= {"scale"}:
        return [("wrong sigma_data", ", ".join([*changes.values(), f"sigma_data={reading.spread:g}"]))]
    line = changes.pop("family", None)
    if line is not None:
        more = "" if reading.name == "given" else f", {reading.line}"
        return [("another family", line[:-1] + more + ")")]
    if "label" in changes:
        old, new = given.label(times).double(), found.label(times).double()
        back = given.label(mirrored(path)(times)).double()
        named += [(name, changes["label"]) for name in _label_mistakes(old, new, back, cut)]
    if "scale" in changes:
        kind = "missing" if given.scale is None else "superfluous" if found.scale is None else ""
        named.append((f"input scaling {kind}" if kind else "wrong input scaling", changes["scale"]))
    for part, name in (("path", "wrong path"), ("range", "wrong data range"), ("latents", "wrong latent scale")):
        if part in changes:
            named.append((name, changes[part]))
    for part in ("condition missing", "wrong null label"):
        if part in changes:
            named.append((part, changes[part]))
    if reading.name != "given" or reading.negated:
        opposite = all(_close(reading.row(k), _signed(row, -1.0)(k)) for k in knots)
        named.append(("negated output" if opposite else "output mixed up", reading.line))
    return named


def _label_mistakes(old: Tensor, new: Tensor, back: Tensor, cut: bool) -> list[str]:
    if bool((old == old.round()).all()) and len(set(old.tolist())) <= 2:
        return ["time label truncated"]
    for names, like in (([], old), (["time reversed"], back)):
        share = float((new / like).median())
        for name, factor in ((None, 1.0), ("factor 1000 missing", 1000.0), ("factor 1000 superfluous", 1e-3)):
            if 0.95 < share / factor < 1.05 and bool(((new - factor * like).abs() < 0.03 * new.abs().max()).all()):
                if cut and name == "factor 1000 missing":
                    name = "time label truncated"
                return [*names, name] if name else names
    return ["wrong time label"]


def _is_f(row: RowOf, knots: Sequence[Knot]) -> bool:
    """Is this row that of F, with some sigma_data? Then a / b = -sigma / (sd^2 alpha), and a = sigma / (sd norm)."""
    for k in knots:
        a, b = row(k)
        if not (a > 0.0 > b):
            return False
        spread = math.sqrt(-b * k.sigma / (a * k.alpha))
        if not _close(Row(a, b), _named("F", spread)(k)):
            return False
    return True


def _close(one: Row, other: Row) -> bool:
    size = max(abs(c) for c in (*one, *other))
    return all(abs(c - d) <= 1e-6 * size for c, d in zip(one, other, strict=True))
