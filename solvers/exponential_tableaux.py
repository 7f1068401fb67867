"""Exponential Runge-Kutta methods as data: nodes, and weights that are sums of  coefficient * phi_k(c z).

For u' = A u + g(u), with z = h A, a method reads

    U_i = e^{c_i z} u_n + h sum_j a_ij(z) g(U_j),      u_{n+1} = e^z u_n + h sum_j b_j(z) g(U_j)

and phi_0 = exp, phi_k(z) = int_0^1 e^{(1-v) z} v^{k-1}/(k-1)! dv. A tableau is checked when it is made:

rows     sum_j a_ij = c_i phi_1(c_i z) and sum_j b_j = phi_1(z) for every z, so a constant g is integrated exactly
order    the conditions of the order it claims for h -> 0, A fixed: one for every rooted tree whose nodes are g, with any
         number of children, or A, with one (Berland, Owren & Skaflestad 2005). The conditions of the Runge-Kutta method at
         z = 0 are those without A; they are not enough.
stiff    the conditions of the stiff order it claims, uniform in A (Hochbruck & Ostermann 2005, table 1), the highest in
         their weakened form, b(0) for b(z)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from sde.errors import InputError

from .formula import phi


@dataclass(frozen=True)
class Weight:
    """sum of coefficient * phi_k(c z), from terms (coefficient, k, c); written with +, - and factors as papers do."""

    terms: tuple[tuple[float, int, float], ...] = ()

    def __add__(self, other: Weight) -> Weight:
        return Weight(self.terms + other.terms)

    def __rmul__(self, factor: float) -> Weight:
        return Weight(tuple((factor * w, k, c) for w, k, c in self.terms))

    def __neg__(self) -> Weight:
        return -1.0 * self

    def __sub__(self, other: Weight) -> Weight:
        return self + (-other)

    def __call__(self, z: float) -> float:
        return math.fsum(w * phi(k, c * z) for w, k, c in self.terms)

    def series(self, m: int) -> float:
        """The coefficient of z^m."""
        return math.fsum(w * c**m / math.factorial(m + k) for w, k, c in self.terms)


ZERO = Weight()


def p(k: int, c: float = 1.0) -> Weight:
    """phi_k(c z)."""
    return Weight(((1.0, k, c),))


@dataclass(frozen=True)
class ExponentialTableau:
    """An explicit exponential Runge-Kutta method: a strictly lower triangular, every condition checked (see the module)."""

    name: str
    order: int
    stiff: int
    c: tuple[float, ...]
    a: tuple[tuple[Weight, ...], ...]
    b: tuple[Weight, ...]
    source: str = ""

    def __post_init__(self) -> None:
        n = len(self.c)
        if n == 0 or len(self.b) != n or len(self.a) != n or any(len(row) != i for i, row in enumerate(self.a)):
            raise InputError(f"tableau {self.name}: a must be strictly lower triangular with {n} rows, b and c of length {n}")
        if self.c[0] != 0.0 or not all(0.0 < c <= 1.0 for c in self.c[1:]):
            raise InputError(f"tableau {self.name}: c = {self.c}: the first node is 0, the others lie in (0, 1]")
        checks = [
            ("the row sums c_i phi_1(c_i z)", rows(self)),
            (f"the conditions of order {self.order}", order_conditions(self, self.order)),
            (f"the conditions of stiff order {self.stiff}", stiff_conditions(self, self.stiff)),
        ]
        for what, residuals in checks:
            worst = max(map(abs, residuals), default=0.0)
            if not worst < 1e-12:
                raise InputError(f"tableau {self.name} does not satisfy {what} (residual {worst:.2e})")


# --- conditions ---------------------------------------------------------------------------------------------------------

_Z = (-2.7, -0.6, 0.8, 1.9)


def rows(tableau: ExponentialTableau) -> Iterator[float]:
    """The residuals of the row sums."""
    for c, row in zip((*tableau.c[1:], 1.0), (*tableau.a[1:], tableau.b), strict=True):
        for z in _Z:
            yield math.fsum(w(z) for w in row) - c * phi(1, c * z)


Tree = tuple  # the children of a node g, each a chain (m, tree): m nodes A, then a node g, or None where it ends in A u


@cache
def trees(n: int) -> tuple[Tree, ...]:
    """The rooted trees of n nodes with root g."""
    return tuple(sorted(set(_forests(n - 1, n - 1)), key=repr))


def _forests(n: int, largest: int) -> Iterator[Tree]:
    """Multisets of chains of n nodes in all, none larger than ``largest``."""
    if n == 0:
        yield ()
    for size in range(min(n, largest), 0, -1):
        for rest in _forests(n - size, size):
            for chain in _chains(size):
                yield tuple(sorted((chain, *rest), key=repr))


def _chains(n: int) -> list[tuple[int, Tree | None]]:
    return [(n, None), *((m, tree) for m in range(n) for tree in trees(n - m))]


@cache
def _size(tree: Tree) -> int:
    return 1 + sum(m + (0 if child is None else _size(child)) for m, child in tree)


@cache
def _density(m: int, tree: Tree | None) -> int:
    """gamma of a chain: the product, over its nodes, of the size of what hangs there."""
    if tree is None:
        return math.factorial(m)
    size = _size(tree)
    below = size * math.prod(_density(*child) for child in tree)
    return below * math.prod(range(size + 1, size + m + 1))


def order_conditions(tableau: ExponentialTableau, order: int) -> Iterator[float]:
    """The residuals of all rooted trees of up to ``order`` nodes, for A fixed as h -> 0."""

    @cache
    def stages(tree: Tree) -> tuple[float, ...]:
        """The weight of the tree in g(U_i), every i."""
        return tuple(math.prod(chain(i, *child) for child in tree) for i in range(len(tableau.c)))

    def chain(i: int, m: int, tree: Tree | None) -> float:
        if tree is None:
            return tableau.c[i] ** m / math.factorial(m)
        return math.fsum(w.series(m) * v for w, v in zip(tableau.a[i], stages(tree), strict=False))

    for total in range(1, order + 1):
        for m in range(total):
            for tree in trees(total - m):
                value = math.fsum(w.series(m) * v for w, v in zip(tableau.b, stages(tree), strict=True))
                yield value - 1.0 / _density(m, tree)


def stiff_conditions(tableau: ExponentialTableau, order: int) -> Iterator[float]:
    """The residuals of Hochbruck and Ostermann's conditions up to ``order`` (at most 4), the last in their weakened form."""
    c, n = tableau.c, range(len(tableau.c))

    def defect(k: int, end: float, row: tuple[Weight, ...], y: float, z: float) -> float:
        """end^k phi_k(end z) - sum_j w_j(y) c_j^{k-1}/(k-1)!"""
        moment = math.fsum(w(y) * v ** (k - 1) for w, v in zip(row, c, strict=False)) / math.factorial(k - 1)
        return end**k * phi(k, end * z) - moment

    for y, z in itertools.product(_Z, _Z):  # weights and stages meet with an operator in between: their arguments are free
        for k in range(1, order + 1):
            at = 0.0 if k == order > 1 else y
            yield defect(k, 1.0, tableau.b, at, at)
        a = [[w(z) for w in row] for row in tableau.a]
        second, third = ([defect(k, c[i], tableau.a[i], z, z) for i in n] for k in (2, 3))
        b = [w(0.0 if order == 3 else y) for w in tableau.b]
        if order >= 3:
            yield math.fsum(b[i] * second[i] for i in n)
        b = [w(0.0 if order == 4 else y) for w in tableau.b]
        if order >= 4:
            yield math.fsum(b[i] * third[i] for i in n)
            yield math.fsum(b[i] * c[i] * second[i] for i in n)
            yield math.fsum(b[i] * a[i][j] * second[j] for i in n for j in range(i))


# --- methods ------------------------------------------------------------------------------------------------------------

_LU = "Lu et al. 2022 (DPM-Solver)"
_HO = "Hochbruck & Ostermann 2005"

EXPONENTIAL_EULER = ExponentialTableau("exponential_euler", 1, 1, (0.0,), ((),), (p(1),), "Certaine 1960; DDIM; DPM-Solver-1")


@cache
def two_stage(c2: float = 0.5, exact: bool = True) -> ExponentialTableau:
    """Two stages. Weights exact for g linear in time (``exact``: phi_2, HO's (5.3); DPM-Solver's "taylor"), or proportional
    to phi_1 (HO's (5.4); DPM-Solver-2 and DPM-Solver++(2S) as published).
    """
    _inside("c2", c2)
    b2 = (1.0 / c2) * p(2) if exact else (0.5 / c2) * p(1)
    name = f"two_stage({c2:g}, {'exact' if exact else 'midpoint'})"
    return ExponentialTableau(name, 2, 2, (0.0, c2), ((), (c2 * p(1, c2),)), (p(1) - b2, b2), _HO + "; " + _LU)


@cache
def three_stage(c2: float = 1 / 3, c3: float = 2 / 3, exact: bool = False) -> ExponentialTableau:
    """DPM-Solver-3 and DPM-Solver++(3S), as published HO's (5.8). ``exact``: the parabola's weights ("taylor").

    Order 3 for c3 = 2/3 alone, whatever the weights: the stage conditions ask for b_2(0) = 0. Other c3 (parameters of the
    released code) leave order 2; ``refined`` repairs the stage.
    """
    _inside("c2", c2)
    _inside("c3", c3)
    if c2 == c3:
        raise InputError(f"c2 = c3 = {c2:g}: a parabola needs two nodes; use c2=1/3, c3=2/3")
    a32 = (c3 * c3 / c2) * p(2, c3)
    b2, b3 = ZERO, (1.0 / c3) * p(2)
    if exact:
        b2 = (c3 / (c2 * (c3 - c2))) * p(2) - (2.0 / (c2 * (c3 - c2))) * p(3)
        b3 = (2.0 / (c3 * (c3 - c2))) * p(3) - (c2 / (c3 * (c3 - c2))) * p(2)
    fits = abs(c3 - 2 / 3) < 1e-15
    return ExponentialTableau(
        f"three_stage({c2:g}, {c3:g}, {'exact' if exact else 'published'})",
        3 if fits else 2,
        3 if fits else 2,
        (0.0, c2, c3),
        ((), (c2 * p(1, c2),), (c3 * p(1, c3) - a32, a32)),
        (p(1) - b2 - b3, b2, b3),
        _LU + "; " + _HO + ", (5.8)",
    )


@cache
def refined(c2: float = 0.5, c3: float = 1.0) -> ExponentialTableau:
    """HO's (5.9), RES with three stages: gamma from 2 (gamma c2 + c3) = 3 (gamma c2^2 + c3^2)."""
    _inside("c2", c2)
    _inside("c3", c3)
    if abs(c2 - 2 / 3) < 1e-9:
        raise InputError("c2 = 2/3: gamma is infinite; use another c2, such as 1/2")
    gamma = (3.0 * c3 * c3 - 2.0 * c3) / (2.0 * c2 - 3.0 * c2 * c2)
    a32 = (gamma * c2) * p(2, c2) + (c3 * c3 / c2) * p(2, c3)
    b3 = (1.0 / (gamma * c2 + c3)) * p(2)
    return ExponentialTableau(
        f"refined({c2:g}, {c3:g})",
        3,
        3,
        (0.0, c2, c3),
        ((), (c2 * p(1, c2),), (c3 * p(1, c3) - a32, a32)),
        (p(1) - gamma * b3 - b3, gamma * b3, b3),
        _HO + ", (5.9); Zhang et al. 2023 (RES)",
    )


def _inside(label: str, c: float) -> None:
    if not 0.0 < c <= 1.0:
        raise InputError(f"{label}={c!r}: a stage lies inside the step, 0 < {label} <= 1")


_SIMPSON = (p(1) - 3 * p(2) + 4 * p(3), 2 * p(2) - 4 * p(3), 2 * p(2) - 4 * p(3), 4 * p(3) - p(2))
_SIMPSON_LAST = (p(1) - 3 * p(2) + 4 * p(3), ZERO, 4 * p(2) - 8 * p(3), 4 * p(3) - p(2))
_KUTTA = (0.0, 0.5, 0.5, 1.0)
_HALF = 0.5 * p(1, 0.5)

ETD3RK = ExponentialTableau(
    "etd3rk",
    3,
    2,
    (0.0, 0.5, 1.0),
    ((), (_HALF,), (-p(1), 2 * p(1))),
    (p(1) - 3 * p(2) + 4 * p(3), 4 * p(2) - 8 * p(3), 4 * p(3) - p(2)),
    "Cox & Matthews 2002, (23)-(25)",
)
ETD4RK = ExponentialTableau(
    "etd4rk",
    4,
    2,
    _KUTTA,
    # phi_1(z/2) (e^{z/2} - 1)/2 = phi_1(z) - phi_1(z/2)
    ((), (_HALF,), (ZERO, _HALF), (p(1) - p(1, 0.5), ZERO, p(1, 0.5))),
    _SIMPSON,
    "Cox & Matthews 2002, (26)-(29)",
)
KROGSTAD = ExponentialTableau(
    "krogstad",
    4,
    3,
    _KUTTA,
    ((), (_HALF,), (_HALF - p(2, 0.5), p(2, 0.5)), (p(1) - 2 * p(2), ZERO, 2 * p(2))),
    _SIMPSON,
    "Krogstad 2005 (ETDRK4-B)",
)
STREHMEL_WEINER = ExponentialTableau(
    "strehmel_weiner",
    4,
    3,
    _KUTTA,
    ((), (_HALF,), (_HALF - 0.5 * p(2, 0.5), 0.5 * p(2, 0.5)), (p(1) - 2 * p(2), -2 * p(2), 4 * p(2))),
    _SIMPSON_LAST,
    "Strehmel & Weiner 1992; " + _HO,
)
FRIEDLI = ExponentialTableau(
    "friedli",
    4,
    3,
    _KUTTA,
    (
        (),
        (_HALF,),
        (_HALF - 0.5 * p(2, 0.5), 0.5 * p(2, 0.5)),
        (p(1) - 2 * p(2), -26 / 25 * p(1) + 2 / 25 * p(2), 26 / 25 * p(1) + 48 / 25 * p(2)),
    ),
    _SIMPSON_LAST,
    "Friedli 1978; Minchev & Wright 2005",
)
_A52 = 0.5 * p(2, 0.5) - p(3) + 0.25 * p(2) - 0.5 * p(3, 0.5)
HOCHBRUCK_OSTERMANN = ExponentialTableau(
    "hochbruck_ostermann",
    4,
    4,
    (0.0, 0.5, 0.5, 1.0, 0.5),
    (
        (),
        (_HALF,),
        (_HALF - p(2, 0.5), p(2, 0.5)),
        (p(1) - 2 * p(2), p(2), p(2)),
        (_HALF - 0.25 * p(2, 0.5) - _A52, _A52, _A52, 0.25 * p(2, 0.5) - _A52),
    ),
    (p(1) - 3 * p(2) + 4 * p(3), ZERO, ZERO, 4 * p(3) - p(2), 4 * p(2) - 8 * p(3)),
    _HO + ", (5.19)",
)
_ONE = p(0, 0.0)  # the constant 1
GENERALISED_LAWSON4 = ExponentialTableau(
    "generalised_lawson4",
    4,
    2,
    _KUTTA,
    ((), (_HALF,), (_HALF - 0.5 * _ONE, 0.5 * _ONE), (p(1) - p(0, 0.5), ZERO, p(0, 0.5))),
    (p(1) - 2 / 3 * p(0, 0.5) - 1 / 6 * _ONE, 1 / 3 * p(0, 0.5), 1 / 3 * p(0, 0.5), 1 / 6 * _ONE),
    "Krogstad 2005 (generalised integrating factor)",
)
