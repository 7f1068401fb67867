"""The evaluations that guidance compares: networks, the conditions that each is given, and how they are called together.

Every branch gets the conditions of the call. A branch of the same network then replaces some of them, ``given``: the null label
of an unconditional branch, a negative prompt. Of what it replaces, a number stands for a tensor like the one it replaces,
filled with it, and a tensor has B rows or one. Called together, the branches' states and conditions are stacked branch by
branch, (K B, ...): sample i is in rows i, B + i, ... and its conditions with it.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError
from sde.prediction import Predictor, Tally

from .base import Call, Request

Together = Callable[[Tensor], Sequence[Tensor]]  # state -> the branches' raw outputs


@dataclass(frozen=True)
class Branch:
    """One evaluation: ``name`` is what errors call it; with ``given`` None the network takes no conditions at all."""

    score: Predictor
    given: Mapping[str, Any] | None
    name: str

    def conditions(self, conditions: Mapping[str, Any], x: Tensor) -> Mapping[str, Any]:
        """What this branch's network gets where the call has ``conditions``."""
        if self.given is None:
            return {}
        for key, value in self.given.items():
            _check_rows(f"{self.name} {key}", value, len(x))
        return {
            **conditions,
            **{key: _alike(f"{self.name} {key}", value, conditions.get(key)) for key, value in self.given.items()},
        }


def one_by_one(
    branches: Sequence[Branch], request: Request, x: Tensor, conditions: Mapping[str, Any], tally: Tally
) -> list[Together]:
    """A call a branch, one function a level."""
    parts = [
        (request if i == 0 else request.narrow).of(b.score, x, b.conditions(conditions, x), tally)
        for i, b in enumerate(branches)
    ]

    def together(calls: Sequence[Call]) -> Together:
        def run(x: Tensor) -> Sequence[Tensor]:
            # a network may reuse the memory of its output, so all but the last are copied
            return [*(call(x).clone() for call in calls[:-1]), calls[-1](x)]

        return run

    return [together(calls) for calls in zip(*parts, strict=True)]


def in_one_batch(
    branches: Sequence[Branch], request: Request, x: Tensor, conditions: Mapping[str, Any], tally: Tally
) -> list[Together]:
    """One call of a batch of K B rows for K branches of the same network, one function a level: K times the net_evals."""
    copies, batch = len(branches), len(x)
    if copies == 1:
        return one_by_one(branches, request, x, conditions, tally)
    stacked = stack(branches, conditions, x)
    inner = Tally()
    calls = request.of(branches[0].score, x.new_empty((copies * batch, *x.shape[1:])), stacked, inner, copies)

    def together(call: Call) -> Together:
        def run(x: Tensor) -> Sequence[Tensor]:
            nfe, net_evals = inner.nfe, inner.net_evals
            try:
                y = call(torch.cat([x] * copies))
            finally:
                tally.nfe += inner.nfe - nfe
                tally.net_evals += copies * (inner.net_evals - net_evals)
            return y.split(batch)

        return run

    return [together(call) for call in calls]


def stack(branches: Sequence[Branch], conditions: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
    """The branches' conditions as those of one batch, branch by branch."""
    each = [branch.conditions(conditions, x) for branch in branches]
    names = {name: None for found in each for name in found}
    for branch, found in zip(branches, each, strict=True):
        missing = [name for name in names if name not in found]
        if missing:
            raise InputError(
                f"condition {missing[0]} is given to one branch, but not to the {branch.name} one: give conditions="
                f"{{{missing[0]!r}: ...}}, or batched=False for a call a branch"
            )
    return {name: _stacked(name, [found[name] for found in each], [b.name for b in branches], x) for name in names}


def _stacked(name: str, values: Sequence[Any], branches: Sequence[str], x: Tensor) -> Any:
    """One condition of K branches as one of K B rows."""
    first = values[0]

    def fail(why: str) -> InputError:
        return InputError(f"condition {name} {why}: one batch needs tensors alike; make them so, or give batched=False")

    if all(isinstance(v, Tensor) and v.dim() for v in values):
        if all(v is first for v in values) and len(first) == 1:
            return first
        for v, branch in zip(values, branches, strict=True):
            _check_rows(f"{name} of the {branch} branch", v, len(x))
        shapes = [tuple(v.shape[1:]) for v in values]
        if len(set(shapes)) > 1:
            raise fail(f"has rows of shapes {', '.join(map(str, shapes))}")
        rows = [v.to(device=x.device, dtype=first.dtype).expand(len(x), *v.shape[1:]) for v in values]
        return torch.cat(rows)
    if all(isinstance(v, Mapping) for v in values):
        if any(v.keys() != first.keys() for v in values):
            raise fail(f"has keys {' and '.join(str(sorted(map(str, v))) for v in values)}")
        return {k: _stacked(f"{name}[{k!r}]", [v[k] for v in values], branches, x) for k in first}
    if all(type(v) is type(first) and isinstance(v, (tuple, list)) for v in values):
        if any(len(v) != len(first) for v in values):
            raise fail(f"has {' and '.join(str(len(v)) for v in values)} elements")
        return type(first)(_stacked(f"{name}[{i}]", column, branches, x) for i, column in enumerate(zip(*values, strict=True)))
    if all(v is first for v in values) or (all(map(_plain, values)) and all(v == first for v in values)):
        return first
    raise fail(f"is {' and '.join(f'{_seen(v)} for the {b} branch' for v, b in zip(values, branches, strict=True))}")


def _alike(name: str, value: Any, replaced: Any) -> Any:
    """A number in place of a tensor is that tensor filled with it; anything else is itself."""
    if isinstance(value, Mapping) and isinstance(replaced, Mapping):
        return {k: _alike(f"{name}[{k!r}]", v, replaced.get(k)) for k, v in value.items()}
    scalar = value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
    if not isinstance(scalar, (int, float)) or not isinstance(replaced, Tensor) or replaced.dim() == 0:
        return value
    if not replaced.is_floating_point() and not float(scalar).is_integer():
        raise InputError(f"{name}={scalar!r} stands for a tensor of {replaced.dtype}: give an int, or a tensor")
    return torch.full_like(replaced, scalar)


def _check_rows(name: str, value: Any, batch: int) -> None:
    """Tensors, however deep, with B rows or one."""
    if isinstance(value, Tensor):
        if value.dim() and len(value) not in (1, batch):
            raise InputError(f"condition {name} has {len(value)} rows for a batch of {batch}: give {batch} rows, or 1")
    elif isinstance(value, Mapping):
        for k, v in value.items():
            _check_rows(f"{name}[{k!r}]", v, batch)
    elif type(value) in (tuple, list):
        for i, v in enumerate(value):
            _check_rows(f"{name}[{i}]", v, batch)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (numbers.Number, str, bytes))


def _seen(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.40}"
