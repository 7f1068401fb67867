"""The trace of a Jacobian J of a batch, from products w^T J alone: one backward pass each.

    exact        sum_i e_i^T J e_i: d products
    hutchinson   w^T J w for random w with E w w^T = I (Hutchinson 1989), each an unbiased estimate
    hutch++      J on the range of a sketch, exactly, and ``hutchinson`` on the rest (Meyer et al. 2021), less the multiple of
                 the identity that the sketch finds: for a J that is low rank, plus such a multiple, plus something small.
                 (Data near a plane have J = cot(th) I plus low rank: without this they would fare worse than by
                 ``hutchinson``.)

Samples must not depend on each other, so that one backward pass gives a row of J in every sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .noise import Source
from .prediction import Knot

TRACES = ("exact", "hutchinson", "hutch++")
PROBES = ("rademacher", "gaussian")

Pull = Callable[[Tensor], Tensor]
"""Vectors w (k, B or 1, d) -> their products w^T J, (k, B, d)."""

# White draws do not look at their knots, and these are far beyond the draws that a sampler with the same seed reaches.
NO_KNOT = Knot(0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
_FIRST = 1 << 32


class Trace(Protocol):
    """trace(pull, like, chunk) -> (B, count): that many estimates of tr J a sample, ``chunk`` products at a time."""

    @property
    def count(self) -> int: ...

    def __call__(self, pull: Pull, like: Tensor, chunk: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Exact:
    """The trace itself, (B, 1). Never more than ``chunk`` rows of J are held at a time."""

    count: int = field(default=1, init=False)

    def __call__(self, pull: Pull, like: Tensor, chunk: int) -> Tensor:
        d = like.shape[1]
        total = torch.zeros(len(like), dtype=like.dtype, device=like.device)
        for start in range(0, d, chunk):
            k = min(chunk, d - start)
            unit = torch.zeros(k, 1, d, dtype=like.dtype, device=like.device)
            unit[:, 0, start : start + k] = torch.eye(k, dtype=like.dtype, device=like.device)
            total = total + pull(unit)[:, :, start : start + k].diagonal(dim1=0, dim2=2).sum(-1)
        return total[:, None]


@dataclass(frozen=True)
class Hutchinson:
    """w^T J w for each w of ``probes`` (m, B, d): (B, m)."""

    probes: Tensor

    @property
    def count(self) -> int:
        return len(self.probes)

    def __call__(self, pull: Pull, like: Tensor, chunk: int) -> Tensor:
        return (self.probes * pull(self.probes)).sum(-1).T


@dataclass(frozen=True)
class HutchPlusPlus:
    """tr Q^T J Q + mu tr P + g^T P (J - mu) P g for each remaining probe g, P = 1 - Q Q^T: (B, m).

    Of the probes the first k, a third, are the sketch s: Q (d, k) spans (J - nu)^T s, nu = tr s^T J s / tr s^T s, and mu is the
    same ratio for P s. Q and mu come from the sketch alone, so each column has the mean tr J over its g, whatever they are.
    2 k + m products, the number of probes.
    """

    probes: Tensor

    @property
    def _sketch(self) -> int:
        return len(self.probes) // 3

    @property
    def count(self) -> int:
        return len(self.probes) - 2 * self._sketch

    def __call__(self, pull: Pull, like: Tensor, chunk: int) -> Tensor:
        with torch.autocast(like.device.type, enabled=False):  # it is for networks; the projections must not be rounded
            return self._estimate(pull, like.shape[1])

    def _estimate(self, pull: Pull, d: int) -> Tensor:
        s, g = self.probes[: self._sketch], self.probes[self._sketch : self._sketch + self.count]
        with torch.no_grad():  # whatever Q and mu are: the gradient of the estimate is that of its other parts
            image = pull(s).detach()
            nu = _ratio((s * image).sum((0, 2)), (s * s).sum((0, 2)))
            q = torch.linalg.qr((image - nu[:, None] * s).permute(1, 2, 0)).Q.permute(2, 0, 1)  # (k, B, d)
            apart, g = (w - torch.einsum("kbd,kbe,jbe->jbd", q, q, w) for w in (s, g))
        rows = pull(torch.cat([q, g]))
        of_q, of_g = rows[: len(q)], rows[len(q) :]
        with torch.no_grad():
            inside = torch.einsum("kbd,jbd->jkb", q, s)
            square = (image * apart).sum((0, 2)) - torch.einsum("jkb,kbd,jbd->b", inside, of_q.detach(), apart)
            mu = _ratio(square, (apart * apart).sum((0, 2)))
        rest = (g * of_g).sum(-1) + mu * (d - len(q) - (g * g).sum(-1))
        return ((q * of_q).sum((0, 2)) + rest).T


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0.0, a / torch.where(b > 0.0, b, 1.0), 0.0)


def draw_probes(source: Source, count: int, x: Tensor, law: str) -> Tensor:
    """(count, B, d) probes: draw k of sample i's own stream, so neither the batch nor ``count`` changes one."""
    if not x.numel():
        return x.new_zeros(count, len(x), 0)
    draws = source.open(tuple(x.shape), x.dtype, x.device)
    normals = torch.stack([draws.normal(_FIRST + k, NO_KNOT, NO_KNOT) for k in range(count)]).reshape(count, len(x), -1)
    return normals if law == "gaussian" else torch.where(normals < 0.0, -1.0, 1.0).to(x.dtype)


class Products:
    """w^T dy/dx for a graph from x to y, and how many there were."""

    def __init__(self, create_graph: bool) -> None:
        self.create_graph, self.done = create_graph, 0
        self._batched = True

    def __call__(self, w: Tensor, x: Tensor, y: Tensor, chunk: int) -> Tensor | None:
        """(k, B, d) for w (k, B or 1, d); None where no gradient reaches x. ``chunk`` of them in one backward pass, where the
        network's layers have batching rules; else one by one.
        """
        w = w.expand(len(w), len(x), w.shape[2]).reshape(len(w), *x.shape)
        options: Any = {"retain_graph": True, "create_graph": self.create_graph, "allow_unused": True}
        parts: list[Tensor] = []
        for part in w.split(chunk):
            found: list[Any] = []
            if self._batched and len(part) > 1:
                try:
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", message="There is a performance drop")
                        found = [torch.autograd.grad(y, x, part, is_grads_batched=True, **options)[0]]
                except RuntimeError:  # some layer has no batching rule
                    self._batched = False
            found = found or [torch.autograd.grad(y, x, one, **options)[0] for one in part]
            if found[0] is None:
                return None
            parts += [rows.reshape(-1, len(x), x.shape[1:].numel()) for rows in found]
        self.done += len(w)
        return torch.cat(parts)
