"""Guidance by contrast: the same state seen by several networks, or by one under several conditions.

With D the prediction to be guided and D' the one to be moved away from, in any row (a, b) of y = a x0 + b eps,

    guided = D' + w (D - D'),        w = 0: D',  w = 1: D,  both to the bit and without the other's call,

since at one state the difference y - y' of any row is a number times that of any other. So what is linear in differences
(guidance itself, its perpendicular parts) is done on the networks' own outputs, and holds at alpha = 0 and at sigma = 0 as they
do. What looks at lengths or at x0 itself says which row it is in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sde.errors import InputError
from sde.prediction import Knot, Predictor, Row, Scalar, Tally, affine

from .base import (
    X0,
    Call,
    Guided,
    Level,
    Request,
    Scale,
    check_number,
    check_score,
    deferred,
    dot,
    per_level,
    per_row,
    ratio,
    scale_of,
)
from .branches import Branch, Together, in_one_batch, one_by_one


class Rule(Protocol):
    """How the branches' outputs, the guided one first, become one."""

    @property
    def row(self) -> Row | None:
        """The row that it works in; None: the guided network's own."""
        ...

    def uses(self, scales: Sequence[float], count: int) -> tuple[int, ...]:
        """The branches, of ``count``, that matter at these scales."""
        ...

    def __call__(self, ys: Sequence[Tensor], w: Scalar) -> Tensor:
        """All branches' outputs in ``row``, each (B, *event), to one; w a float or (B, 1, ...)."""
        ...


@dataclass(frozen=True)
class Linear:
    """y' + w (y - y')."""

    row = None

    def uses(self, scales: Sequence[float], count: int) -> tuple[int, ...]:
        return (0,) if all(w == 1.0 for w in scales) else (1,) if all(w == 0.0 for w in scales) else (0, 1)

    def __call__(self, ys: Sequence[Tensor], w: Scalar) -> Tensor:
        return torch.lerp(ys[1], ys[0], w)  # exact at w = 0 and w = 1, for every sample of a tensor w


@dataclass(frozen=True)
class Rescaled:
    """The guided output g = y' + w (y - y') brought back towards the spread of y: g (phi std(y)/std(g) + 1 - phi)."""

    phi: float
    row: Row | None

    def uses(self, scales: Sequence[float], count: int) -> tuple[int, ...]:
        return (0,) if all(w == 1.0 for w in scales) else (0, 1)

    def __call__(self, ys: Sequence[Tensor], w: Scalar) -> Tensor:
        g = torch.lerp(ys[1], ys[0], w)
        return g * (self.phi * ratio(spread(ys[0]), spread(g), 1.0) + (1.0 - self.phi))


@dataclass(frozen=True)
class Projected:
    """D + (w - 1)(across + eta along), of u = min(1, threshold/|D - D'|)(D - D') the parts along D and across it, in x0."""

    eta: float
    threshold: float

    row = X0

    def uses(self, scales: Sequence[float], count: int) -> tuple[int, ...]:
        return (0,) if all(w == 1.0 for w in scales) else (0, 1)

    def __call__(self, ys: Sequence[Tensor], w: Scalar) -> Tensor:
        d, u = ys[0], ys[0] - ys[1]
        if self.threshold < math.inf:
            u = u * (self.threshold / dot(u, u).sqrt()).clamp(max=1.0)
        along = ratio(dot(u, d), dot(d, d)) * d
        return d + (w - 1.0) * (u + (self.eta - 1.0) * along)


@dataclass(frozen=True)
class Perpendicular:
    """y' + w (u - sum_i c_i (u_i's part across u)), u = y - y' and u_i = y_i - y' of the negative branches."""

    weights: tuple[float, ...]

    row = None

    def uses(self, scales: Sequence[float], count: int) -> tuple[int, ...]:
        return (1,) if all(w == 0.0 for w in scales) else tuple(range(count))

    def __call__(self, ys: Sequence[Tensor], w: Scalar) -> Tensor:
        u = ys[0] - ys[1]
        size, total = dot(u, u), u
        for c, y in zip(self.weights, ys[2:], strict=True):
            v = y - ys[1]
            total = total - c * (v - ratio(dot(v, u), size) * u)
        return ys[1] + w * total


def spread(y: Tensor) -> Tensor:
    """The standard deviation of each sample's elements, (B, 1, ...)."""
    n = max(1, y[0].numel())
    centred = y - dot(y, torch.ones_like(y)) / n
    return (dot(centred, centred) / n).sqrt()


@dataclass(frozen=True, eq=False)
class Contrast(Guided):
    """``score`` under the conditions of the call, against ``others``, by a rule; ``defaults`` are conditions that the call may
    override.
    """

    score: Predictor
    others: tuple[Branch, ...]
    rule: Rule
    scale: Scale
    batched: bool
    defaults: Mapping[str, Any]

    @property
    def branches(self) -> tuple[Branch, ...]:
        return Branch(self.score, {}, "conditional"), *self.others

    def row(self, knot: Knot) -> Row:
        """The row of the one network that is asked there, or else of the rule."""
        sole = self._sole(knot)
        return self._row(knot) if sole is None else self.branches[sole].score.row(knot)

    def calls(self, *knots: Knot) -> int:
        used = self._used(knots) if knots else range(len(self.branches))
        if self.batched:
            return self.score.calls(*knots)
        return sum(self.branches[i].score.calls(*knots) for i in used)

    def _row(self, knot: Knot) -> Row:
        return self.score.row(knot) if self.rule.row is None else self.rule.row

    def _sole(self, knot: Knot) -> int | None:
        """The only branch that matters at this knot, if there is one."""
        used = self.rule.uses(self.scale.at(knot), len(self.branches))
        return used[0] if len(used) == 1 else None

    def _used(self, level: Level) -> tuple[int, ...]:
        return tuple(sorted({i for k in level for i in self.rule.uses(self.scale.at(k), len(self.branches))}))

    def _scores(self) -> Iterable[Predictor]:
        return {id(b.score): b.score for b in self.branches}.values()

    def _plain(self, knots: Sequence[Knot]) -> Any:
        used = self._used(knots)
        if len(used) != 1:
            return None
        branch = self.branches[used[0]]

        def plain(conditions: Mapping[str, Any], x: Tensor) -> tuple[Predictor, Mapping[str, Any]]:
            self.scale.of(knots, len(x))
            return branch.score, branch.conditions({**self.defaults, **conditions}, x)

        return plain

    def _make(self, request: Request, x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> list[Call]:
        levels = request.levels
        scales = [per_row(self.scale.of(level, len(x)), x) for level in levels]
        used = [self._used(level) for level in levels]
        together = in_one_batch if self.batched else one_by_one
        conditions = {**self.defaults, **conditions}
        made = {u: together([self.branches[i] for i in u], request, x, conditions, tally) for u in dict.fromkeys(used)}
        parts = enumerate(zip(levels, used, scales, strict=True))
        return [deferred(partial(self._level, level, u, made[u][j], w, x)) for j, (level, u, w) in parts]

    def _level(self, level: Level, used: tuple[int, ...], together: Together, w: Scalar, x: Tensor) -> Call:
        if len(used) == 1:
            return lambda x: together(x)[0]
        rule = self.rule
        coefficients = [per_level(partial(self._into, self.branches[i].score), level, x) for i in used]
        soles = [self._sole(k) for k in level] if len(level) > 1 else []  # of several samples, some may not be guided
        masks = [
            (used.index(i), torch.tensor([s == i for s in soles]).to(x.device).reshape(-1, *(1,) * (x.dim() - 1)))
            for i in dict.fromkeys(soles)
            if i is not None
        ]

        def call(x: Tensor) -> Tensor:
            ys = together(x)
            out = rule([_in_row(c, x, y) for c, y in zip(coefficients, ys, strict=True)], w)
            for i, mask in masks:
                out = torch.where(mask, ys[i], out)
            return out

        return call

    def _into(self, score: Predictor, knot: Knot) -> tuple[float, float]:
        """(u, v): u x + v y is a branch's output y in the rule's row."""
        row, target = score.row(knot), self._row(knot)
        if row == target or self._sole(knot) is not None:
            return 0.0, 1.0
        return affine(row, knot, *target)


def _in_row(coefficients: Sequence[Scalar], x: Tensor, y: Tensor) -> Tensor:
    u, v = coefficients
    if isinstance(u, float) and isinstance(v, float) and (u, v) == (0.0, 1.0):
        return y
    return u * x + v * y


def classifier_free(
    score: Predictor,
    scale: Any,
    *,
    unconditional: Mapping[str, Any] | Predictor,
    conditions: Mapping[str, Any] | None = None,
    batched: bool | None = None,
) -> Contrast:
    """Classifier-free guidance (Ho & Salimans 2022): unconditional + scale (conditional - unconditional).

    The score guided towards is that of p(x) (p(x|y)/p(x))^scale at each noise level, which is not the diffusion of any such law
    of the data. scale 0 is the unconditional and 1 the conditional prediction (Ho & Salimans' w is scale - 1). For Gaussians
    of equal covariance it is the score of one with the mean unconditional + scale (conditional - unconditional).

    scale          a number, a tensor (B,) of one a sample, or a function of t (a float64 tensor ()) to either.
    unconditional  what the unconditional branch is given in place of the call's conditions, such as {"y": 1000}; those it does
                   not name are shared. A number stands for a tensor like the one it replaces. Or another score, a network
                   that takes no conditions.
    conditions     those of the call where it gives none; the call's own override them.
    batched        True (the default for one network): both in one call of 2 B rows. False: two calls.

    Costs nfe 1 (batched) or 2, net_evals 2; 1 and 1 where the scale is 0 or 1. Errors: InputError for scales that are not
    finite or not one a sample, and for conditions whose rows do not fit the batch.
    """
    check_score("score", score)
    if isinstance(unconditional, Predictor):
        check_score("unconditional", unconditional, score.path)
        if batched:
            raise InputError("batched=True, but unconditional is another network: leave batched out")
        other, batched = Branch(unconditional, None, "unconditional"), False
    else:
        other = Branch(score, _named("unconditional", unconditional), "unconditional")
    return _contrast(score, (other,), Linear(), scale, conditions, batched)


def autoguidance(score: Predictor, worse: Predictor, scale: Any, *, conditions: Mapping[str, Any] | None = None) -> Contrast:
    """Autoguidance (Karras et al. 2024): worse + scale (score - worse), both under the call's conditions.

    ``worse`` is a smaller or less trained network of the same path; what it predicts may be another row. Costs nfe 2 and
    net_evals 2 (1 and 1 where the scale is 0 or 1). scale as for ``classifier_free``.
    """
    check_score("score", score)
    check_score("worse", worse, score.path)
    return _contrast(score, (Branch(worse, {}, "worse"),), Linear(), scale, conditions, False)


def perpendicular_negative(
    score: Predictor,
    scale: Any,
    *,
    unconditional: Mapping[str, Any],
    negative: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    weights: float | Sequence[float] = 1.0,
    conditions: Mapping[str, Any] | None = None,
    batched: bool = True,
) -> Contrast:
    """Perpendicular negative prompts (Armandpour et al. 2023, Perp-Neg):

        y' + scale (u - sum_i weights_i (u_i - <u_i, u>/<u, u> u)),    u = y - y',  u_i = y_i - y'

    with y' unconditional and y_i under the conditions ``negative`` (one mapping or several): a negative prompt takes away only
    what is across the positive one. Products are over a sample. weights >= 0 (the paper's are their negatives).

    Costs nfe 1 (batched) or 2 + n, net_evals 2 + n for n negatives; 1 and 1 where the scale is 0, the unconditional.
    """
    check_score("score", score)
    negatives = [negative] if isinstance(negative, Mapping) else list(negative)
    sizes = [weights] * len(negatives) if isinstance(weights, (int, float)) else list(weights)
    if len(sizes) != len(negatives) or not negatives:
        raise InputError(f"{len(sizes)} weights for {len(negatives)} negative conditions: give one each, and at least one")
    others = [Branch(score, _named("unconditional", unconditional), "unconditional")]
    others += [Branch(score, _named("negative", given), "negative") for given in negatives]
    rule = Perpendicular(tuple(check_number("weights", c, 0.0) for c in sizes))
    return _contrast(score, tuple(others), rule, scale, conditions, batched)


def rescale(guided: Predictor, phi: float = 0.7, *, of: str = "output") -> Contrast:
    """Guidance brought back to the spread of the conditional prediction (Lin et al. 2023, section 3.4): of y and the guided g

        g (phi std(y)/std(g) + 1 - phi)

    with std over the elements of each sample. ``guided`` is a ``classifier_free`` or an ``autoguidance``. of "output": of the
    network's own output, as published; the result depends on what the network predicts. of "x0": of the denoised sample,
    whatever it predicts. phi 0 is ``guided`` itself. Where the scale is 0 the unconditional prediction is rescaled too.
    """
    if of not in ("output", "x0"):
        raise InputError(f"of={of!r}: use 'output' or 'x0'")
    rule = Rescaled(check_number("phi", phi, 0.0, 1.0), None if of == "output" else X0)
    return _with_rule(guided, rule, "rescale")


def apg(guided: Predictor, *, eta: float = 0.0, threshold: float = math.inf, momentum: float = 0.0) -> Contrast:
    """Adaptive projected guidance (Sadat et al. 2024), in x0: of the difference u = D - D', shortened to ``threshold`` in each
    sample, the part along D counts ``eta`` times,

        D + (scale - 1)(u - (1 - eta) <u, D>/<D, D> D).

    ``guided`` is a ``classifier_free`` or an ``autoguidance``; eta = 1 without a threshold is ``guided`` itself.

    momentum must be 0. The published one replaces u by u + momentum times its last value, which is state of the run: what it
    says at (x, t) depends on the steps before and on how many calls a step makes, so that rejected steps, stages, a replay
    or parallel time steps change it. A score is a function of (x, t).
    """
    if momentum != 0.0:
        raise InputError(
            f"momentum={momentum!r}: a running mean over the steps of one sampler is not a function of (x, t), so it cannot be "
            "part of a score; leave it 0 (use eta and threshold)"
        )
    bound = math.inf if threshold == math.inf else check_number("threshold", threshold, 0.0, open_low=True)
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not math.isfinite(eta):
        raise InputError(f"eta={eta!r}: must be a finite number, 0 for no guidance along the prediction")
    return _with_rule(guided, Projected(float(eta), bound), "apg")


def _contrast(
    score: Predictor, others: tuple[Branch, ...], rule: Rule, scale: Any, conditions: Any, batched: bool | None
) -> Contrast:
    if batched not in (None, True, False):
        raise InputError(f"batched={batched!r}: must be True or False")
    defaults = {} if conditions is None else _named("conditions", conditions)
    return Contrast(score, others, rule, scale_of(scale, 1.0), batched is not False, defaults)


def _with_rule(guided: Any, rule: Rule, name: str) -> Contrast:
    if not isinstance(guided, Contrast) or not isinstance(guided.rule, Linear):
        raise InputError(f"guided is a {type(guided).__name__}: {name} takes the result of classifier_free or autoguidance")
    return replace(guided, rule=rule)


def _named(name: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InputError(f"{name} is a {type(given).__name__}: give a dict of keyword arguments of the network")
    return dict(given)
