"""A score that is no wrapped network, such as an exact law or a guided score: is it consistent?"""

from __future__ import annotations

import torch
from torch import Tensor

from sde.errors import ToolkitError
from sde.noise import White
from sde.prediction import Knot, Predictor, Tally

from .bench import STREAM
from .case import Case
from .levels import times

TOLERANCE = 1e-3  # of the size of the larger


def consistent(case: Case, score: Predictor) -> int:
    """Reports where alpha x0 + sigma eps = x, score = -eps / sigma or y = a x0 + b eps fail, inf and nan, and rows that
    influence each other. The number of calls.
    """
    draws = White(STREAM + case.seed).open(case.x0.shape, case.x0.dtype, case.x0.device)
    knots = score.path.knots(times(score.path, case.deviation))
    tally = Tally()
    for i, knot in enumerate(knots):
        x = knot.alpha * case.x0 + knot.sigma * draws.normal(i, knots[0], knots[0])
        try:
            if _fails(case, score, knot, x, tally):
                break
        except ToolkitError as error:
            seen = " ".join(str(error).split())[:300]
            case.report("call fails", seen, f"what the score does at t={knot.t:g}")
            break
    case.notes.append(
        f"a {type(score).__name__} is no wrapped network: it was asked whether its predictions are consistent, and no "
        "more; the wiring of a network inside it is judged by check(Score(...), data)"
    )
    return tally.nfe


def _fails(case: Case, score: Predictor, knot: Knot, x: Tensor, tally: Tally) -> bool:
    pair, row = score.predict(x, knot.t, **case.conditions), score.row(knot)
    y = score.at((knot,), x, case.conditions, tally)[0](x)
    tally.nfe += 2
    where = f"at t={knot.t:g}"
    count = sum(int((~v.isfinite()).sum()) for v in (pair.x0, pair.eps, y))
    if count:
        case.report("not finite", f"{count} of {3 * y.numel()} values {where}", "what the score does at this time")
        return True
    for left, right, formula in (
        (knot.alpha * pair.x0 + knot.sigma * pair.eps, x, "alpha x0 + sigma eps = x"),
        (-knot.sigma * score(x, knot.t, **case.conditions), pair.eps, "-sigma score = eps"),
        (row.a * pair.x0 + row.b * pair.eps, y, "a x0 + b eps = y, for (a, b) = row(knot) and y = at(knot)(x)"),
    ):
        off = _apart(left, right)
        if not off <= TOLERANCE:  # nan, too
            case.report(
                "inconsistent prediction", f"{formula} is off by {off:.2g} of its size {where}", "predict, at or row of it"
            )
            return True
    few = 2
    alone = score.predict(x[:few], knot.t, **case.part(few))
    off = _apart(alone.eps, pair.eps[:few])
    if not off <= TOLERANCE:  # nan, too
        seen = f"the predictions of {few} samples change by {off:.2g} without the others {where}"
        case.report("rows influence each other", seen, "predict each sample by itself")
        return True
    return False


def _apart(one: Tensor, other: Tensor) -> float:
    sizes = (float(v.double().square().mean()) for v in (one, other))
    return float((one - other).double().square().mean() / max(*sizes, 1e-300)) ** 0.5 if torch.numel(one) else 0.0
