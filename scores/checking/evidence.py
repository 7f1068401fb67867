"""What is said of a network that can be called: with data, and without any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sde.errors import ToolkitError

from .bench import Bench
from .calls import class_wirings, report_finite, unfilled
from .case import Case
from .levels import Bar, Level, Verdict, row_at, times
from .own import described, most_knowing, own
from .report import Measured, listed
from .search import CLEARLY, EXACT, Search, denoises, fits, improvement
from .wirings import SPREADS, Reading, Wiring, mistakes, readings


def with_data(case: Case, bench: Bench, base: Wiring) -> None:
    bar = Bar(case.x0 if case.data is None else case.data, case.seed)
    search = Search(bench, base, case.x0, case.several, bar)
    case.levels = measured(search.levels, search.given)
    found = None if search.right else search.best(class_wirings(case, bench.score, base))
    if found is not None and _ignores_input(case, bench, found.wiring):
        found = None
    if found is not None:
        _accuse(case, bench, base, found.wiring, found.reading, improvement(search.given, found.verdict))
    elif report_finite(case, bench, base) and not search.right:
        _honestly(case, bench, base, search)


def measured(levels: Sequence[Level] | None, v: Verdict | None) -> list[Measured]:
    if levels is None or v is None:
        return []
    return [Measured(lv.ratio, e, float(lv.affine.mean()) / lv.linear) for lv, e in zip(levels, v.error, strict=True)]


def _accuse(case: Case, bench: Bench, base: Wiring, wiring: Wiring, reading: Reading, seen: str) -> None:
    at = torch.tensor(times(base.path, case.deviation), dtype=torch.float64)
    cut = ignores_time(case, bench, base)
    for i, (name, line) in enumerate(mistakes(base, bench.score.row, wiring, reading, at, cut)):
        case.report(name, seen if i == 0 else "together with the finding above", line)


def ignores_time(case: Case, bench: Bench, base: Wiring) -> bool:
    """Does the network answer the same, to the last bit, at the labels of different times?"""
    at = times(base.path, case.deviation)
    knot = base.path.knot(at[2])
    x = knot.alpha * case.x0 + knot.sigma * bench.normal(2)
    found: list[Tensor] = []
    for t in (at[1], at[4]):
        label = base.label(torch.tensor([t], dtype=torch.float64))[0]
        try:
            found.append(bench.answers(replace(base, label=lambda s, v=label: v.expand(s.shape)), [knot], [x])[0])
        except ToolkitError:
            return False
    return torch.equal(*found) or all(bool(y.isnan().all()) for y in found)


def _ignores_input(case: Case, bench: Bench, w: Wiring) -> bool:
    """Are the outputs of all samples the same?"""
    knot = w.path.knot(times(w.path, case.deviation)[3])
    try:
        y = bench.answers(w, [knot], [knot.alpha * case.x0 + knot.sigma * bench.normal(3)])[0].double()
    except ToolkitError:
        return False
    return float((y - y.mean(0)).square().mean()) <= 1e-10 * float(y.square().mean())


def _useless(case: Case, bench: Bench, base: Wiring) -> bool:
    """Reports a network that does not look at its input or its label."""
    if _ignores_input(case, bench, base):
        case.report("output ignores x", "all samples of a batch get the same output", "the network's forward, or its weights")
        return True
    if ignores_time(case, bench, base):
        seen = "outputs at the labels of different times are equal to the last bit"
        case.report("output ignores t", seen, "the label: on its way into the network it is left out, or cut to an integer")
        return True
    return False


def _honestly(case: Case, bench: Bench, base: Wiring, search: Search) -> None:
    """No hypothesis explains it: say what was seen, and no more."""
    given, levels = search.given, search.levels
    if given is None or levels is None:
        case.report("unexplained", "the output does not determine x0 at the levels of the data", "predicts=")
        return
    limits = search.limits(levels)
    good = denoises(given, limits)
    if good and fits(given, case.several, 10.0 * EXACT):
        case.notes.append(
            f"the network denoises, though its squared error is up to {1.0 + max(given.excess):.2g} times what a rescaling of "
            "its output would reach, and no known mistake explains it: it may be undertrained, or know other data than these"
        )
        return
    if not fits(given, case.several) and _useless(case, bench, base):
        return
    mine = own(bench, base, search.known[0])
    if mine is not None and mine.knows:
        seen = f"the network agrees with its own samples ({described(mine.x0)}) but not with the data ({described(case.x0)})"
        case.report("data do not fit", seen, _rescaling(mine.x0, case.x0))
        return
    words = off(bench, levels, given, case.several)
    others = unfilled(bench.score, case, optional=True)
    hint = f"; the network also takes {', '.join(others[:4])}, which it is not given" if others else ""
    if not good or given.cost > -EXACT:
        reached = f"simple denoisers that are fitted on half of the data reach {listed(limits)}"
        change = "the weights, or the data: it denoises none like these, however it is wired"
        case.report("does not denoise", f"{words}; {reached}{hint}", change)
    else:
        case.report("unexplained", words + hint, "compare Score's arguments with the code the network was trained by")


def _rescaling(wanted: Tensor, data: Tensor) -> str:
    """The line that gives the data the mean and deviation of the network's samples, where theirs are others."""
    factor = float(wanted.double().std() / data.double().std())
    shift = float(wanted.double().mean()) - factor * float(data.double().mean())
    if 0.7 < factor < 1.4 and abs(shift) < 0.3 * float(wanted.double().std()):
        return "data: give such as it was trained on; these have about the mean and deviation of its samples"
    return f"data = {factor:.3g} * data + {shift:.3g}, or what comes near to it in the code that it was trained by"


def off(bench: Bench, levels: Sequence[Level], v: Verdict, several: int) -> str:
    """The levels that are off, and what the output seems to be there."""
    parts = [
        f"{error:.2g} at sigma/alpha = {level.ratio:.2g}, where {row_at(bench.score.row(level.knot), level)}"
        for level, excess, error in zip(levels, v.excess, v.error, strict=True)
        if excess > 4.0 * EXACT + 3.0 / several
    ]
    return "squared error over a linear filter's: " + ("; ".join(parts[:3]) if parts else listed(v.error))


def without_data(case: Case, bench: Bench, base: Wiring) -> None:
    known = readings(bench.score.row, sorted({*SPREADS, bench.score.sigma_data}))
    mine = own(bench, base, known[0])
    agrees = mine is not None and mine.agrees
    found = None
    if mine is None or not mine.knows:
        found = most_knowing(bench, base, known, class_wirings(case, bench.score, base))
        if found is not None and mine is not None and agrees and found.verdict.cost > mine.verdict.cost - CLEARLY:
            found = None
    if found is not None:
        errors = f"its squared error on them, over a linear filter's, is {listed(found.verdict.error)}"
        before = "knows nothing of its own samples" if agrees else "does not agree with its own samples"
        _accuse(case, bench, base, found.wiring, found.reading, f"as wired, it {before}; so changed, {errors}")
    elif report_finite(case, bench, base) and not agrees and not _useless(case, bench, base):
        words = "it makes no samples" if mine is None else off(bench, mine.levels, mine.verdict, len(mine.x0))
        case.notes.append(
            f"as wired, the network does not agree with its own samples ({words}), and no known mistake explains it: it may be "
            "untrained, or know data of a size far from 1; give data, check(score, data)"
        )
    if mine is not None:
        case.levels = measured(mine.levels, mine.verdict)
        if agrees and not case.findings:
            case.notes.append(f"the network's own samples: {described(mine.x0)}; so must your data be")
    case.notes.append(
        "without data these cannot be told: the range of the data, the scale of latents, and differences of paths, of "
        "sigma_data and of outputs that leave a network in agreement with its own samples"
    )
