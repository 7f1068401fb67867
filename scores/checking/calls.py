"""Can the network be called, in its right mode, twice alike, row by row, finite at both ends? Before outputs are judged."""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sde.errors import InputError, PathError, ToolkitError
from sde.prediction import Predictor

from ..network import Score
from .bench import Bench, rewired
from .case import Case
from .levels import COUNT, times
from .wirings import Wiring

#: Names under which networks take a class.
CLASS_NAMES = ("y", "class_labels", "class_label", "labels", "label", "classes")


def first_calls(case: Case, bench: Bench, base: Wiring) -> Wiring | None:
    """Reports what is wrong with the call, the mode, repeatability and rows. The wiring to go on with, or None.

    Where the network is in train mode, all that follows is in eval mode.
    """
    score = bench.score
    knot = score.path.knot(times(score.path, case.deviation)[COUNT // 2])
    x = knot.alpha * case.x0 + knot.sigma * bench.normal(0)
    mode = "eval" if score.mode == "eval" else "keep"

    def ask(w: Wiring, rows: int | None = None) -> Tensor:
        return bench.answers(w, [knot], [x[:rows]], mode)[0]

    try:
        y = ask(base)
    except ToolkitError as error:
        rescued = _rescued(case, bench, base, error, ask)
        if rescued is None:
            return None
        base = rescued
        y = ask(base)
    few = 2  # so few feel what the others did to them
    repeat, mates = _difference(ask(base), y), _difference(ask(base, few), y[:few])
    rough = 20.0 if halved(score) else 1.0
    moody, dependent = repeat > 1e-3 * rough, mates > 1e-2 * rough
    training = [] if score.mode == "eval" else [name for name, module in score._moody if module.training]
    differs = f"two calls with the same input differ by {repeat:.2g} of the output"
    depends = f"the outputs of {few} samples change by {mates:.2g} without the other {len(x) - few} in the batch"
    if training and (score.mode is None or moody or dependent):
        more = f" and {len(training) - 4} more" if len(training) > 4 else ""
        seen = [f"in train mode: {', '.join(training[:4])}{more}", differs if moody else depends if dependent else ""]
        case.report("train mode", "; ".join(filter(None, seen)), 'network.eval(), or Score(..., mode="eval")')
    elif moody:
        case.report("not deterministic", differs, "take the noise out of the network's forward: solvers draw their own")
    elif dependent:
        case.report("rows influence each other", depends, "normalise each sample by itself, and give conditions a row a sample")
    return base


def _difference(one: Tensor, other: Tensor) -> float:
    size = float(other.double().square().mean())
    return (float((one - other).double().square().mean()) / max(size, 1e-30)) ** 0.5


def _rescued(case: Case, bench: Bench, base: Wiring, error: ToolkitError, ask: Any) -> Wiring | None:
    """After a call that failed: what makes it work, reported. None where nothing known does."""
    seen = " ".join(str(error).split())[:300]
    score = bench.score
    with suppress(ToolkitError):
        bench.score = rewired(score, split="learned_var")
        ask(base)
        case.report("2C output not split", seen, 'Score(..., split="learned_var")')
        return base
    bench.score = score
    for w in class_wirings(case, score, base):
        with suppress(ToolkitError):
            ask(w)
            case.report(*_only(w, seen))
            return replace(w, changes={})
    missing = unfilled(score, case)
    if missing:
        name = missing[0]
        case.report("condition missing", seen, f"check(score, data, {name}=...), and conditions={{'{name}': ...}} to sample")
    else:
        case.report("call fails", seen, "what it is called with, network(x, label, **conditions), or its forward")
    return None


def _only(w: Wiring, seen: str) -> tuple[str, str, str]:
    (name, line), *_ = w.changes.items()
    return name, seen, line


def unfilled(score: Score, case: Case, optional: bool = False) -> list[str]:
    """The network's arguments that it is not given, of those without a default or, if ``optional``, with None as theirs."""
    if score._signature is None:
        return []
    named = [p for p in score._signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = {*score.conditions, *case.conditions}
    default = None if optional else inspect.Parameter.empty
    return [p.name for p in named[2:] if p.name not in given and p.default is default]


def class_wirings(case: Case, score: Score, base: Wiring) -> list[Wiring]:
    """The last class of an embedding as the label of no class, where the network takes class labels."""
    if score._module is None:
        return []
    sizes = sorted({m.num_embeddings for m in score._module.modules() if isinstance(m, nn.Embedding)})
    if len(sizes) > 1 and case.x0.device.type != "cpu":  # on a GPU an index beyond one of them ends the process
        return []
    given = {**score.conditions, **case.conditions}
    wrong = [name for name, value in given.items() if _is_label(value)]
    absent = [n for n in (*unfilled(score, case), *unfilled(score, case, optional=True)) if n in CLASS_NAMES]
    found = []
    for name in (*wrong, *absent):
        part = "wrong null label" if name in given else "condition missing"
        for size in sizes:
            line = f"{name}={size - 1} for no class: the network has an embedding of {size} classes, the last of which is none"
            none = torch.full((len(case.x0),), size - 1, device=case.x0.device)
            found.append(base.instead(part, line, conditions={name: none}))
    return found


def _is_label(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)
    return isinstance(value, int) and not isinstance(value, bool)


def halved(score: Predictor) -> bool:
    """Does the network compute in half precision?"""
    module = getattr(score, "_module", None)
    first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    used = (getattr(score, "dtype", None), None if first is None else first.dtype)
    return any(dtype in (torch.float16, torch.bfloat16) for dtype in used)


def report_finite(case: Case, bench: Bench, base: Wiring) -> bool:
    """Reports inf, nan and failing calls at both ends and at the levels. False: the levels cannot be looked at."""
    path, inner = bench.score.path, times(bench.score.path, case.deviation)
    bad: list[tuple[float, str]] = []
    for t in (path.T, path.t_min, *inner):
        knot = path.knot(t)
        x = knot.alpha * case.x0 + knot.sigma * bench.normal(0)
        try:
            y = bench.answers(base, [knot], [x])[0]
        except PathError:  # the label is not finite at this end, or the output says nothing: solvers stop before it
            continue
        except ToolkitError as error:
            seen = " ".join(str(error).split())[:300]
            if isinstance(error, InputError) and halved(bench.score):
                bad.append((t, seen))
                continue
            label = float(base.label(torch.tensor([t], dtype=torch.float64))[0])
            case.report("call fails", seen, f"what the network is given at t={t:g}: its label is {label:g}")
            return False
        count = int((~y.isfinite()).sum())
        if count:
            factor = 1.0 if base.scale is None else float(base.scale(torch.tensor([t], dtype=torch.float64))[0])
            bad.append(
                (t, f"{count} of {y.numel()} values at t={t:g}, where inputs reach {float((factor * x).abs().max()):.3g}")
            )
    if bad:
        seen = bad[0][1] + (f"; and at {len(bad) - 1} more times" if len(bad) > 1 else "")
        if halved(bench.score):
            change = "dtype=torch.bfloat16, a float32 network, or scale= so that inputs are of order one"
            case.report("half-precision overflow", seen, change)
        else:
            case.report("not finite", seen, "the network's weights, or its label at these times")
    return not any(t in inner for t, _ in bad)
