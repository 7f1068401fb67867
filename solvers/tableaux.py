"""Runge-Kutta tableaux as data, with their sources. A mistyped coefficient cannot be imported: every condition is checked.

A method has order p where every rooted tree t of at most p nodes has the elementary weight b . u(t) = 1 / gamma(t), and not
where one of order p + 1 fails. Trees are built by hanging a smaller tree below the root of another (Butcher's product):

    u(rest + child) = u(rest) * (A u(child)),    gamma = |t| gamma(rest) / |rest| * gamma(child),    u = gamma = 1 for one node

(Butcher 2016, sections 301-310; Hairer, Norsett & Wanner 1993, II.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sde.errors import InputError

Array = NDArray[np.float64]
TOLERANCE = 1e-11  # of gamma * weight - 1; rounding reaches 4e-13 for the tableaux below


class Trees(NamedTuple):
    """All rooted trees of n nodes: where in the list of all trees their two parts are, and gamma."""

    rest: NDArray[np.intp]
    child: NDArray[np.intp]
    gamma: Array


@cache
def rooted_trees(nodes: int) -> tuple[Trees, ...]:
    """The trees of 2, 3, ... ``nodes`` nodes (tree 0 is the single node). Each is found once: the child hung last is the one
    latest in the list.
    """
    size, gamma, last, out = [1], [1.0], [-1], list[Trees]()
    for n in range(2, nodes + 1):
        pairs = [(r, c) for c in range(len(size)) for r in range(len(size)) if size[r] + size[c] == n and last[r] <= c]
        values = [n * gamma[r] / size[r] * gamma[c] for r, c in pairs]
        out.append(Trees(np.array([r for r, _ in pairs]), np.array([c for _, c in pairs]), np.array(values)))
        size += [n] * len(pairs)
        gamma += values
        last += [c for _, c in pairs]
    return tuple(out)


def residuals(a: Array, b: Array, order: int) -> list[float]:
    """max |gamma b.u - 1| over the trees of 1, 2, ... ``order`` nodes."""
    u = np.ones((1, len(b)))
    au = u @ a.T
    out = [abs(float(b.sum()) - 1.0)]
    for trees in rooted_trees(order):
        new = u[trees.rest] * au[trees.child]
        out.append(float(np.abs(trees.gamma * (new @ b) - 1.0).max()))
        u, au = np.concatenate([u, new]), np.concatenate([au, new @ a.T])
    return out


@dataclass(frozen=True)
class Tableau:
    """A Butcher tableau: a, weights b, nodes c = a 1, and the order it claims.

    a is strictly lower triangular (row i has i entries, an explicit method) or square (an implicit one, see
    ``fixed_point``). ``low`` are the weights of an embedded solution of order ``low_order``, for step control. Checked at
    construction: all conditions of the order hold, and not all of the next one's, for both.
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    source: str = ""
    low: tuple[float, ...] = ()
    low_order: int = 0

    def __post_init__(self) -> None:
        n = len(self.c)
        if n == 0 or len(self.b) != n or len(self.a) != n or not (self.explicit or all(len(row) == n for row in self.a)):
            raise InputError(
                f"tableau {self.name}: a must be strictly lower triangular (row i of i entries) or square, "
                f"with {n} rows, and b and c of length {n} > 0"
            )
        if bool(self.low) != bool(self.low_order) or (self.low and len(self.low) != n):
            raise InputError(f"tableau {self.name}: give low, of length {n}, and low_order together")
        off = float(np.abs(self.matrix.sum(1) - np.array(self.c)).max())
        if not off <= TOLERANCE:  # a NaN is off
            raise InputError(f"tableau {self.name}: the rows of a do not sum to c (off by {off:.2e})")
        self._check(self.b, self.order, "b")
        if self.low:
            self._check(self.low, self.low_order, "low")

    def _check(self, weights: tuple[float, ...], order: int, what: str) -> None:
        if order < 1:
            raise InputError(f"tableau {self.name}: order {order} of {what}: must be >= 1")
        *found, beyond = residuals(self.matrix, np.array(weights), order + 1)
        if not max(found) <= TOLERANCE:
            raise InputError(
                f"tableau {self.name}: {what} does not satisfy the conditions of order {order} (residual {max(found):.2e})"
            )
        if beyond <= TOLERANCE:
            raise InputError(f"tableau {self.name}: {what} satisfies the conditions of order {order + 1} too: declare that")

    @property
    def explicit(self) -> bool:
        return all(len(row) == i for i, row in enumerate(self.a))

    @property
    def matrix(self) -> Array:
        """a as a square matrix."""
        n = len(self.a)
        return np.array([[*row, *[0.0] * (n - len(row))] for row in self.a])

    @cached_property
    def stages(self) -> int:
        """Stages that the result needs: a last one of weight 0 serves the embedded solution alone."""
        return max(i for i, weight in enumerate(self.b) if weight != 0.0) + 1

    @cached_property
    def uses(self) -> tuple[int, ...]:
        """How many later stages and results each stage goes into."""
        rows = (*self.a[: self.stages], self.b)
        return tuple(sum(j < len(row) and row[j] != 0.0 for row in rows) for j in range(len(self.b)))

    @property
    def embedded(self) -> Tableau:
        """The method of the weights ``low``."""
        if not self.low:
            raise InputError(f"tableau {self.name} has no embedded solution")
        return Tableau(f"{self.name}_low", self.low_order, self.c, self.a, self.low, self.source)


def fixed_point(tableau: Tableau, sweeps: int) -> Tableau:
    """An implicit method whose stages are found by ``sweeps`` fixed-point iterations from the slope at s: again an explicit
    tableau, of order min(p, sweeps + 1) (van der Houwen & Sommeijer 1990, parallel iterated Runge-Kutta).

        k_i^0 = f(s, y),    k_i^m = f(s + c_i h, y + h sum_j a_ij k_j^{m-1}),    y + h sum_i b_i k_i^sweeps

    1 + sweeps * stages network calls a step (a first stage at s itself, as the trapezoidal rule has, is not asked for again);
    those of one sweep are independent of each other. What it is for: with enough sweeps a symmetric method (implicit
    midpoint, trapezoid, Gauss) is reversed by its own steps backwards. What it is not: A-stable. The iteration contracts for
    steps h |df/dy| < 1 / |a| only, so at stiff ends it is bound to small steps as explicit methods are.
    """
    if sweeps < 1:
        raise InputError(f"sweeps={sweeps}: must be >= 1")
    solved = [i for i, row in enumerate(tableau.a) if any(row)]  # the others are the slope at s
    size = 1 + sweeps * len(solved)

    def row(weights: tuple[float, ...], sweep: int) -> list[float]:
        """The weights on the slopes of a sweep, as a row over all stages; sweep 0 is the slope at s."""
        out = [0.0] * size
        for i, w in enumerate(weights):
            out[1 + (sweep - 1) * len(solved) + solved.index(i) if sweep and i in solved else 0] += w
        return out

    rows = [row(tableau.a[i], sweep) for sweep in range(sweeps) for i in solved]
    return Tableau(
        f"{tableau.name}_{sweeps}",
        min(tableau.order, sweeps + 1),
        (0.0, *[tableau.c[i] for i in solved] * sweeps),
        ((), *(tuple(values[: 1 + k]) for k, values in enumerate(rows))),
        tuple(row(tableau.b, sweeps)),
        tableau.source,
    )


# --- explicit, order 1 to 4 -------------------------------------------------------------------------------------------

EULER = Tableau("euler", 1, (0.0,), ((),), (1.0,), "Euler 1768")
MIDPOINT = Tableau("midpoint", 2, (0.0, 0.5), ((), (0.5,)), (0.0, 1.0), "Runge 1895")
HEUN = Tableau(
    "heun",
    2,
    (0.0, 1.0),
    ((), (1.0,)),
    (0.5, 0.5),
    "Heun 1900; Karras et al. 2022, algorithm 1; with Euler embedded",
    low=(1.0, 0.0),
    low_order=1,
)
RALSTON2 = Tableau("ralston2", 2, (0.0, 2 / 3), ((), (2 / 3,)), (1 / 4, 3 / 4), "Ralston 1962: least error bound of order two")
HEUN3 = Tableau("heun3", 3, (0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4), "Heun 1900")
KUTTA3 = Tableau("kutta3", 3, (0.0, 1 / 2, 1.0), ((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), "Kutta 1901")
RALSTON3 = Tableau(
    "ralston3",
    3,
    (0.0, 1 / 2, 3 / 4),
    ((), (1 / 2,), (0.0, 3 / 4)),
    (2 / 9, 1 / 3, 4 / 9),
    "Ralston 1962: least error bound of order three",
)
HOUWEN_WRAY3 = Tableau(
    "houwen_wray3",
    3,
    (0.0, 8 / 15, 2 / 3),
    ((), (8 / 15,), (1 / 4, 5 / 12)),
    (1 / 4, 0.0, 3 / 4),
    "van der Houwen 1972; Wray 1988: two registers",
)
SSPRK3 = Tableau(
    "ssprk3",
    3,
    (0.0, 1.0, 1 / 2),
    ((), (1.0,), (1 / 4, 1 / 4)),
    (1 / 6, 1 / 6, 2 / 3),
    "Shu & Osher 1988: convex combinations of Euler steps",
)
SSPRK43 = Tableau(
    "ssprk43",
    3,
    (0.0, 1 / 2, 1.0, 1 / 2),
    ((), (1 / 2,), (1 / 2, 1 / 2), (1 / 6, 1 / 6, 1 / 6)),
    (1 / 6, 1 / 6, 1 / 6, 1 / 2),
    "Kraaijevanger 1991; embedded: Conde, Fekete & Shadid 2018",
    low=(1 / 4, 1 / 4, 1 / 4, 1 / 4),
    low_order=2,
)
BOSH3 = Tableau(
    "bosh3",
    3,
    (0.0, 1 / 2, 3 / 4, 1.0),
    ((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    (2 / 9, 1 / 3, 4 / 9, 0.0),
    "Bogacki & Shampine 1989; the third-order part is Ralston's",
    low=(7 / 24, 1 / 4, 1 / 3, 1 / 8),
    low_order=2,
)
RK4 = Tableau(
    "rk4", 4, (0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), "Kutta 1901"
)
RK38 = Tableau(
    "rk38",
    4,
    (0.0, 1 / 3, 2 / 3, 1.0),
    ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    "Kutta 1901: the 3/8 rule",
)
_R5 = math.sqrt(5.0)
RALSTON4 = Tableau(
    "ralston4",
    4,
    (0.0, 2 / 5, (14 - 3 * _R5) / 16, 1.0),
    (
        (),
        (2 / 5,),
        ((-2889 + 1428 * _R5) / 1024, (3785 - 1620 * _R5) / 1024),
        ((-3365 + 2094 * _R5) / 6040, (-975 - 3046 * _R5) / 2552, (467040 + 203968 * _R5) / 240845),
    ),
    (
        (263 + 24 * _R5) / 1812,
        (125 - 1000 * _R5) / 3828,
        (3426304 + 1661952 * _R5) / 5924787,
        (30 - 4 * _R5) / 123,
    ),
    "Ralston 1962: least error bound of order four",
)

# --- explicit, order 5 and more ---------------------------------------------------------------------------------------

FEHLBERG5 = Tableau(
    "fehlberg5",
    5,
    (0.0, 1 / 4, 3 / 8, 12 / 13, 1.0, 1 / 2),
    (
        (),
        (1 / 4,),
        (3 / 32, 9 / 32),
        (1932 / 2197, -7200 / 2197, 7296 / 2197),
        (439 / 216, -8.0, 3680 / 513, -845 / 4104),
        (-8 / 27, 2.0, -3544 / 2565, 1859 / 4104, -11 / 40),
    ),
    (16 / 135, 0.0, 6656 / 12825, 28561 / 56430, -9 / 50, 2 / 55),
    "Fehlberg 1969, RK4(5); he advances by the fourth-order solution, which is the embedded one here",
    low=(25 / 216, 0.0, 1408 / 2565, 2197 / 4104, -1 / 5, 0.0),
    low_order=4,
)
CASH_KARP5 = Tableau(
    "cash_karp5",
    5,
    (0.0, 1 / 5, 3 / 10, 3 / 5, 1.0, 7 / 8),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (3 / 10, -9 / 10, 6 / 5),
        (-11 / 54, 5 / 2, -70 / 27, 35 / 27),
        (1631 / 55296, 175 / 512, 575 / 13824, 44275 / 110592, 253 / 4096),
    ),
    (37 / 378, 0.0, 250 / 621, 125 / 594, 0.0, 512 / 1771),
    "Cash & Karp 1990",
    low=(2825 / 27648, 0.0, 18575 / 48384, 13525 / 55296, 277 / 14336, 1 / 4),
    low_order=4,
)
DOPRI5 = Tableau(
    "dopri5",
    5,
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    "Dormand & Prince 1980, RK5(4)7M",
    low=(5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
    low_order=4,
)
_TSIT5 = (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0)
#: The paper prints these differences, b minus the embedded weights, under the name of the embedded weights.
_TSIT5_DIFFERENCE = (
    *(0.00178001105222577714, 0.0008164344596567469, -0.007880878010261995, 0.1447110071732629),
    *(-0.5823571654525552, 0.45808210592918697, -1 / 66),
)
_TSIT5_A = (  # columns 2 to 5; the first follows from the nodes
    (),
    (),
    (0.335480655492357,),
    (-6.359448489975075, 4.362295432869581),
    (-11.74888356406283, 7.495539342889836, -0.09249506636175525),
    (-12.92096931784711, 8.159367898576159, -0.071584973281401, -0.02826905039406838),
)
_TSIT5_C = (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0)
TSIT5 = Tableau(
    "tsit5",
    5,
    _TSIT5_C,
    ((), *((c - math.fsum(row), *row) for c, row in zip(_TSIT5_C[1:], _TSIT5_A[1:], strict=False)), _TSIT5[:-1]),
    _TSIT5,
    "Tsitouras 2011",
    low=tuple(b - d for b, d in zip(_TSIT5, _TSIT5_DIFFERENCE, strict=True)),
    low_order=4,
)
NYSTROM5 = Tableau(
    "nystrom5",
    5,
    (0.0, 1 / 3, 2 / 5, 1.0, 2 / 3, 4 / 5),
    (
        (),
        (1 / 3,),
        (4 / 25, 6 / 25),
        (1 / 4, -3.0, 15 / 4),
        (2 / 27, 10 / 9, -50 / 81, 8 / 81),
        (2 / 25, 12 / 25, 2 / 15, 8 / 75, 0.0),
    ),
    (23 / 192, 0.0, 125 / 192, 0.0, -27 / 64, 125 / 192),
    "Kutta 1901, corrected by Nystrom 1925",
)
BUTCHER5 = Tableau(
    "butcher5",
    5,
    (0.0, 1 / 4, 1 / 4, 1 / 2, 3 / 4, 1.0),
    (
        (),
        (1 / 4,),
        (1 / 8, 1 / 8),
        (0.0, 0.0, 1 / 2),
        (3 / 16, -3 / 8, 3 / 8, 9 / 16),
        (-3 / 7, 8 / 7, 6 / 7, -12 / 7, 8 / 7),
    ),
    (7 / 90, 0.0, 16 / 45, 2 / 15, 16 / 45, 7 / 90),
    "Butcher 2016, table 236",
)
BUTCHER6 = Tableau(
    "butcher6",
    6,
    (0.0, 1 / 2, 2 / 3, 1 / 3, 5 / 6, 1 / 6, 1.0),
    (
        (),
        (1 / 2,),
        (2 / 9, 4 / 9),
        (7 / 36, 2 / 9, -1 / 12),
        (-35 / 144, -55 / 36, 35 / 48, 15 / 8),
        (-1 / 360, -11 / 36, -1 / 8, 1 / 2, 1 / 10),
        (-41 / 260, 22 / 13, 43 / 156, -118 / 39, 32 / 195, 80 / 39),
    ),
    (13 / 200, 0.0, 11 / 40, 11 / 40, 4 / 25, 4 / 25, 13 / 200),
    "Butcher 1964; Hairer, Norsett & Wanner 1993, table II.6.1",
)
_R21 = math.sqrt(21.0)
COOPER_VERNER8 = Tableau(
    "cooper_verner8",
    8,
    (
        *(0.0, 1 / 2, 1 / 2, (7 - _R21) / 14, (7 - _R21) / 14, 1 / 2),
        *((7 + _R21) / 14, (7 + _R21) / 14, 1 / 2, (7 - _R21) / 14, 1.0),
    ),
    (
        (),
        (1 / 2,),
        (1 / 4, 1 / 4),
        (1 / 7, (-7 + 3 * _R21) / 98, (21 - 5 * _R21) / 49),
        ((11 - _R21) / 84, 0.0, (18 - 4 * _R21) / 63, (21 + _R21) / 252),
        ((5 - _R21) / 48, 0.0, (9 - _R21) / 36, (-231 - 14 * _R21) / 360, (63 + 7 * _R21) / 80),
        (
            *((10 + _R21) / 42, 0.0, (-432 - 92 * _R21) / 315, (633 + 145 * _R21) / 90),
            *((-504 - 115 * _R21) / 70, (63 + 13 * _R21) / 35),
        ),
        (1 / 14, 0.0, 0.0, 0.0, (14 + 3 * _R21) / 126, (13 + 3 * _R21) / 63, 1 / 9),
        (
            *(1 / 32, 0.0, 0.0, 0.0, (91 + 21 * _R21) / 576, 11 / 72, (-385 + 75 * _R21) / 1152),
            (63 - 13 * _R21) / 128,
        ),
        (
            *(1 / 14, 0.0, 0.0, 0.0, 1 / 9, (-733 + 147 * _R21) / 2205, (515 - 111 * _R21) / 504),
            *((-51 + 11 * _R21) / 56, (132 - 28 * _R21) / 245),
        ),
        (
            *(0.0, 0.0, 0.0, 0.0, (-42 - 7 * _R21) / 18, (-18 - 28 * _R21) / 45, (-273 + 53 * _R21) / 72),
            *((301 - 53 * _R21) / 72, (28 + 28 * _R21) / 45, (49 + 7 * _R21) / 18),
        ),
    ),
    (1 / 20, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 49 / 180, 16 / 45, 49 / 180, 1 / 20),
    "Cooper & Verner 1972, eleven stages",
)

# --- explicit and nearly symmetric ------------------------------------------------------------------------------------
# Order two, yet a step back undoes a step up to O(h^6) and O(h^8): encode and decode meet at order five and seven.

EES25 = Tableau(
    "ees25",
    2,
    (0.0, 1 / 3, 5 / 6),
    ((), (1 / 3,), (-5 / 48, 15 / 16)),
    (1 / 10, 1 / 2, 2 / 5),
    "Shmelev, Ebrahimi-Fard, Tapia & Salvi 2025, EES(2,5; 1/10)",
)


def _low_storage(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]:
    """(a, b) of Williamson's two-register form: d_i = a_i d_{i-1} + h f(y_{i-1}), y_i = y_{i-1} + b_i d_i."""
    n = len(b)
    d, y, rows = np.zeros(n), np.zeros(n), list[tuple[float, ...]]()
    for i in range(n):
        rows.append(tuple(y[:i].tolist()))
        d = a[i] * d + np.eye(n)[i]
        y = y + b[i] * d
    return tuple(rows), tuple(y.tolist())


_R2 = math.sqrt(2.0)
_EES27 = _low_storage(
    (0.0, (-7 + 4 * _R2) / 3, -(4 + 5 * _R2) / 12, 3 * (-31 + 8 * _R2) / 49),
    ((2 - _R2) / 3, (4 + _R2) / 8, 3 * (3 - _R2) / 7, (9 - 4 * _R2) / 14),
)
EES27 = Tableau(
    "ees27",
    2,
    (0.0, (2 - _R2) / 3, (2 + _R2) / 6, (4 + _R2) / 6),
    *_EES27,
    "Shmelev, Ebrahimi-Fard, Tapia & Salvi 2025, EES(2,7; 1/4) in two registers",
)

# --- implicit: see fixed_point ----------------------------------------------------------------------------------------

_R3, _R6, _R15 = math.sqrt(3.0), math.sqrt(6.0), math.sqrt(15.0)
IMPLICIT_MIDPOINT = Tableau("implicit_midpoint", 2, (1 / 2,), ((1 / 2,),), (1.0,), "Gauss's one-stage method; symmetric")
TRAPEZOID = Tableau(
    "trapezoid", 2, (0.0, 1.0), ((0.0, 0.0), (1 / 2, 1 / 2)), (1 / 2, 1 / 2), "Crank & Nicolson 1947; symmetric"
)
RADAU_IIA3 = Tableau(
    "radau_iia3",
    3,
    (1 / 3, 1.0),
    ((5 / 12, -1 / 12), (3 / 4, 1 / 4)),
    (3 / 4, 1 / 4),
    "Ehle 1969; Hairer & Wanner 1996, table IV.5.5",
)
RADAU_IIA5 = Tableau(
    "radau_iia5",
    5,
    ((4 - _R6) / 10, (4 + _R6) / 10, 1.0),
    (
        ((88 - 7 * _R6) / 360, (296 - 169 * _R6) / 1800, (-2 + 3 * _R6) / 225),
        ((296 + 169 * _R6) / 1800, (88 + 7 * _R6) / 360, (-2 - 3 * _R6) / 225),
        ((16 - _R6) / 36, (16 + _R6) / 36, 1 / 9),
    ),
    ((16 - _R6) / 36, (16 + _R6) / 36, 1 / 9),
    "Ehle 1969; Hairer & Wanner 1996, table IV.5.6",
)
GAUSS4 = Tableau(
    "gauss4",
    4,
    (1 / 2 - _R3 / 6, 1 / 2 + _R3 / 6),
    ((1 / 4, 1 / 4 - _R3 / 6), (1 / 4 + _R3 / 6, 1 / 4)),
    (1 / 2, 1 / 2),
    "Hammer & Hollingsworth 1955; symmetric",
)
GAUSS6 = Tableau(
    "gauss6",
    6,
    (1 / 2 - _R15 / 10, 1 / 2, 1 / 2 + _R15 / 10),
    (
        (5 / 36, 2 / 9 - _R15 / 15, 5 / 36 - _R15 / 30),
        (5 / 36 + _R15 / 24, 2 / 9, 5 / 36 - _R15 / 24),
        (5 / 36 + _R15 / 30, 2 / 9 + _R15 / 15, 5 / 36),
    ),
    (5 / 18, 4 / 9, 5 / 18),
    "Kuntzmann 1961, Butcher 1964; symmetric",
)
