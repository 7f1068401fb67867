"""DPM-Solver-v3 (Zheng et al. 2023): multistep between data and noise prediction, guided by statistics of the model.

With l, s and m over lambda of ``model_statistics``, L and S the integrals of l and s, and f = (1 - l) rho eps - l x0:

    x_t = alpha_t/alpha_s e^{-(L_t - L_s)} x_s - alpha_t int e^{-(L_t - L_u)} f(u) du         exactly, u = lambda
    f(u) = m(u) + sum_j q_j(u) e^{S_u - S_j} (f_j - m_j)                                      the approximation

where the q_j are the Lagrange polynomials of the nodes: f may move at the rate s from node to node, and a polynomial takes up
what is left. l = 1 and s = m = 0 is DPM-Solver++, l = 0 and s = -1 DPM-Solver in eps. With the closed statistics of
N(mu, c^2 I) a step of any length is exact on that data, from one node.

    from solvers.dpm_v3 import DPMSolverV3, statistics

    found = statistics(score, data)                                       # 200 calls, once
    sample(score, shape, solver=DPMSolverV3(2, found, corrector=1), nfe=6)

Released code rounds the grid to its table's levels and takes trapezoidal sums over them; here any grid will do, by
Gauss-Legendre quadrature between the levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sde.errors import InputError, check_counts
from sde.prediction import Knot, Prediction

from .base import Form, Noise, Problem, Step
from .formula import one_node
from .model_statistics import Array, GaussianStatistics, ModelStatistics, Statistics, remainder, statistics
from .multistep import History

__all__ = ["DPMSolverV3", "GaussianStatistics", "ModelStatistics", "statistics"]

IMAGES = GaussianStatistics(0.5)


@dataclass(frozen=True)
class DPMSolverV3:
    """Multistep predictor in f, and a corrector that replaces the state a step starts from. One network call a step.

    steps      : predictions that the predictor interpolates
    statistics : ``statistics(score, data)``, or a Gaussian's
    corrector  : None, or 0, or 1: it interpolates as many predictions as the predictor of the same step did, the arrived one
                 in place of the oldest (0, as published; a step from one node is not corrected) or beside them (1, which
                 raises the order). As in UniPC, the prediction is not made again at the corrected state, and the last state is
                 not corrected
    pseudo     : "predictor", "corrector" or "both": the published "pseudo-order" weights. In Newton's form of the polynomial
                 the products (u - lambda_0) ... (u - lambda_{i-1}) are replaced by (u - lambda_0)^i: of order two from three
                 nodes on, whatever their number
    half       : correct only at t > T/2, as published for guided sampling
    lower_final : lower the order towards the last step, as released

    Order: inside, steps, or min(steps + 1, nodes of the corrector). The first step, from one node, leaves order two, or three
    if corrected (corrector=1); ``lower_final`` leaves two. ``starts.Started`` brings out the inner order. The paper calls
    steps = 3 with its corrector "third order". Which path it is makes no difference in (x/alpha, lambda), but the scale of
    the data does: statistics have one.

    Linear, with a table, unless its statistics are one a dimension. A step to or from an infinite lambda is ddim's.
    """

    steps: int
    statistics: Statistics = IMAGES
    corrector: int | None = None
    pseudo: str = ""
    half: bool = False
    lower_final: bool = False

    stages = 1
    weak = strong = None
    stochastic = takes_eta = False
    target = None  # neither constant x0 nor constant eps is integrated exactly
    invariant = False  # see above

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, corrector=0 if self.corrector is None else self.corrector)
        if self.steps < 1 or self.corrector not in (None, 0, 1) or self.pseudo not in ("", "predictor", "corrector", "both"):
            raise InputError(f"{self}: steps >= 1, corrector None, 0 or 1, pseudo '', 'predictor', 'corrector' or 'both'")
        if self.corrector == 0 and self.steps == 1:
            raise InputError(f"{self}: corrector=0 has nothing to correct with steps=1; give corrector=1")
        if not hasattr(self.statistics, "growth"):
            kind = type(self.statistics).__name__
            raise InputError(f"statistics is a {kind}: give statistics(score, data), or GaussianStatistics(std)")

    @property
    def linear(self) -> bool:
        return not self.statistics.event

    @property
    def rewrites(self) -> bool:
        """Whether a step does not go on from the state it is handed: it makes that anew from the one before."""
        return self.corrector is not None

    @property
    def inner_order(self) -> float:
        predicted = self._true(self.steps, "predictor")
        if self.corrector is None or self.half:
            return predicted
        return min(predicted + 1.0, self._true(self.steps + self.corrector, "corrector"))

    def _true(self, nodes: int, part: str) -> float:
        return float(min(nodes, 2) if self.pseudo in (part, "both") else nodes)

    @property
    def order(self) -> float:
        return min(self.inner_order, 2.0 + (self.corrector == 1 and not self.half and not self.lower_final))

    @property
    def start_rule(self) -> str:
        if self.corrector == 1:
            return "order 2 first step, then growing"
        return "as any step" if self.steps == 1 else "order 1 first step, then growing"

    @property
    def end_rule(self) -> str:
        lowered = "lowered to order 1 at the end" if self.lower_final and self.steps > 1 else ""
        corrected = "" if self.corrector is None else "last state not corrected"
        return ", ".join(filter(None, [lowered, corrected])) or "as any step"

    def remember(self, prediction: Prediction, k: Knot, carry: Any) -> Any:
        """The carry with the prediction at k put in front; the state there is not to be corrected."""
        history = carry[1] if carry else []
        return None, [(k, self._value(prediction, k)), *history][: self.steps]

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        self._check(x)
        prediction = problem.predict(x, s)
        if not math.isfinite(s.lam):
            return Step(one_node(s, t, 0.0, "x0", x, prediction.x0, noise), None)
        pending, history = carry or (None, [])
        value = self._value(prediction, s)
        if self.steps > 1 or self.corrector is not None:
            value = problem.keep(value)  # one register, where the form has two
        if pending is not None and (not self.half or s.t > 0.5 * problem.path.T):
            x = problem.keep(self._corrected(pending, history, (s, value)))
        history = [(s, value), *history][: self.steps]
        if not math.isfinite(t.lam):
            return Step(one_node(s, t, 0.0, "x0", x, prediction.x0, noise), (None, history))
        order = len(history)
        if self.lower_final and t.count >= 0:
            order = max(1, min(order, t.count - s.index))
        out = self._update(x, s, t, history[:order], "predictor")
        corrects = self.corrector is not None and order + self.corrector >= 2
        return Step(out, ((x, order) if corrects else None, history))

    def _corrected(self, pending: tuple[Form, int], history: History, arrived: tuple[Knot, Form]) -> Form:
        """The state at the arrived knot, anew from the one before."""
        x, order = pending
        nodes = [history[0], arrived, *history[1 : order + (self.corrector or 0) - 1]]
        return self._update(x, history[0][0], arrived[0], nodes, "corrector")

    def _value(self, prediction: Prediction, k: Knot) -> Form:
        slope = self.statistics.slope_at(k.lam)
        return remainder(prediction, k, float(slope) if slope.ndim == 0 else torch.from_numpy(slope).to(prediction.x0))

    def _update(self, x: Form, s: Knot, t: Knot, nodes: History, part: str) -> Form:
        """s -> t by the polynomial through the nodes, s first."""
        decay, weights, shift = self._weights(s.lam, t.lam, [k.lam for k, _ in nodes], self.pseudo in (part, "both"))
        out = _factor(t.alpha / s.alpha * decay, x) * x
        for w, (_, value) in zip(weights, nodes, strict=True):
            out = out - _factor(t.alpha * w, x) * value
        return out if shift is None else out - _factor(t.alpha * shift, x)

    def _weights(self, a: float, b: float, nodes: list[float], pseudo: bool) -> tuple[Array, list[Array], Array | None]:
        """(e^{-(L_b - L_a)}, the weight of every f_j, what m adds to their sum) of the integral over lambda from a to b."""
        found, event = self.statistics, (1,) * len(self.statistics.event)
        u, du = _quadrature(a, b, found.breaks)
        (inside, grown), (at_nodes, factors), (end, _) = (found.growth(np.array(v)) for v in (u, nodes, b))
        measure = du.reshape(-1, *event) * np.exp(inside - end)
        kernel = measure * np.exp(grown - factors[0])
        basis = _basis(u, nodes, pseudo)
        weights = [np.exp(factors[0] - factors[j]) * (kernel * q.reshape(-1, *event)).sum(0) for j, q in enumerate(basis)]
        shift, mean = None, found.mean_at(u)
        if mean is not None:
            own: Any = found.mean_at(np.array(nodes))
            shift = (measure * mean).sum(0) - sum(w * m for w, m in zip(weights, own, strict=True))
        return np.exp(at_nodes[0] - end), weights, shift

    def _check(self, x: Form) -> None:
        if self.statistics.event and tuple(x.shape[1:]) != self.statistics.event:
            raise InputError(
                f"the statistics are of samples {self.statistics.event}, the state's are {tuple(x.shape[1:])}: measure them on "
                "data of this shape, or without per_dimension"
            )


def _factor(c: Array, x: Form) -> Any:
    """A float, or a tensor like the samples of x."""
    return float(c) if c.ndim == 0 else torch.from_numpy(c).to(x)


_POINTS, _GAUSS = np.polynomial.legendre.leggauss(12)


def _quadrature(a: float, b: float, breaks: Array) -> tuple[Array, Array]:
    """Points and weights of Gauss-Legendre quadrature from a to b, in panels of 1 at most that end at the breaks."""
    low, high = min(a, b), max(a, b)
    edges = np.linspace(low, high, 1 + max(1, math.ceil(high - low)))
    if len(breaks):
        edges = np.sort(np.concatenate([edges, breaks[(breaks > low) & (breaks < high)]]))
    half = 0.5 * np.diff(edges)[:, None]
    u = edges[:-1, None] + half * (1.0 + _POINTS)
    return u.ravel(), math.copysign(1.0, b - a) * (half * _GAUSS).ravel()


def _basis(u: Array, nodes: list[float], pseudo: bool) -> list[Array]:
    """The Lagrange polynomials of the nodes at u, from Newton's form: sum_i [f_0 ... f_i] prod_{k<i} (u - lambda_k). With
    ``pseudo`` the products are (u - lambda_0)^i.
    """
    out = [np.zeros_like(u) for _ in nodes]
    for i in range(len(nodes)):
        first = nodes[:1] * i if pseudo else nodes[:i]
        product = math.prod((u - k for k in first), start=np.ones_like(u))
        for j in range(i + 1):
            out[j] = out[j] + product / math.prod(nodes[j] - k for k in nodes[: i + 1] if k != nodes[j])
    return out
