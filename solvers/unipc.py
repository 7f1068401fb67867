"""Multistep predictor-correctors: UniPC in its published forms, and Adams-Bashforth-Moulton in any target with exact weights,
which with noise is SA-Solver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sde.errors import InputError, check_counts
from sde.prediction import Knot, Prediction

from .base import Form, Noise, Problem, Step
from .formula import BASES, TARGETS, exact_weights, exponential_step, interpolable, one_node, phi, value_of
from .multistep import History, usable_history


@dataclass(frozen=True)
class UniPC:
    """Unified predictor-corrector (Zhao et al. 2023). One network call a step.

    Each step corrects the state it starts from with the prediction made there, then predicts the next; the last state is not
    corrected, as in the released code. ``lower_final`` lowers the order towards the last step (the released default).

    variant : B(h) = h ("bh1") or e^h - 1 ("bh2"); they differ only where one difference is known, whose weight is then the
              published 1/2. "exact" gives it its integral: then the weights are those of the polynomial through all nodes,
              the arrived one included, which is what the paper's "vary_coeff" means. (Released, that variant forgets
              terms of its corrector, which leaves it of order one.)
    corrector : False for the predictor alone, UniP

    Order: inside, steps + 1 (UniP: steps). The corrected first step has a local error of order 3, so the whole has order
    min(steps + 1, 3) (UniP: min(steps, 2)); with ``lower_final`` the last step is an uncorrected first-order one and the whole
    has order 2 at most, whatever ``steps``. ``starts.Started`` brings out the inner order.
    """

    steps: int
    variant: str = "bh2"
    target: str = "x0"
    lower_final: bool = True
    corrector: bool = True

    stages = 1
    weak = strong = None
    stochastic = takes_eta = False
    linear = True
    invariant = True

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        known = self.variant in ("bh1", "bh2", "exact")
        if not 1 <= self.steps <= 6 or not known or self.target not in ("x0", "eps"):
            raise InputError(f"{self}: 1 <= steps <= 6, variant 'bh1', 'bh2' or 'exact', target 'x0' or 'eps'")

    @property
    def rewrites(self) -> bool:
        """Whether a step does not go on from the state it is handed: it makes that anew from the one before."""
        return self.corrector

    @property
    def inner_order(self) -> float:
        return float(self.steps + self.corrector)

    @property
    def order(self) -> float:
        return min(self.inner_order, 2.0 + (self.corrector and not self.lower_final))

    @property
    def start_rule(self) -> str:
        if self.corrector:
            return "order 2 first step, then growing"
        return "as any step" if self.steps == 1 else "order 1 first step, then growing"

    @property
    def end_rule(self) -> str:
        if self.lower_final and self.steps > 1:
            return "lowered to order 1 at the end" + (", not corrected" if self.corrector else "")
        return "last state not corrected" if self.corrector else "as any step"

    def remember(self, prediction: Prediction, k: Knot, carry: Any) -> Any:
        """The carry with the prediction at k put in front; the state there is not to be corrected."""
        history = carry[1] if carry else []
        return None, [(k, value_of(prediction, k, self.target)), *history][: self.steps], 1

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        prediction = problem.predict(x, s)
        value = value_of(prediction, s, self.target)
        history: History = []
        if carry is not None:
            before, history, order = carry
            if before is not None and self.corrector:
                x = problem.keep(self._update(before, history[0][0], s, history, order, value))
        history = [(s, value), *history][: self.steps]
        order = len([k for k, _ in history if math.isfinite(k.lam)])
        if self.lower_final and t.count >= 0:
            order = min(order, t.count - s.index)
        if not (math.isfinite(t.lam) and math.isfinite(s.lam)):
            order = 1
        return Step(self._update(x, s, t, history, max(order, 1), None), (x, history, max(order, 1)))

    def _update(self, x: Form, s: Knot, t: Knot, history: History, order: int, arrived: Form | None) -> Form:
        """s -> t by the predictor, or by the corrector where ``arrived``, the prediction at t, is known."""
        sign = -1.0 if self.target == "x0" else 1.0
        m0 = history[0][1]
        h = t.lam - s.lam
        base = one_node(s, t, 0.0, self.target, x, m0, _no_noise)
        if not math.isfinite(h):
            return base
        hh = sign * h
        ratios = [(k.lam - s.lam) / h for k, _ in history[1:order]] + [1.0]
        differences = [(v - m0) / q for (_, v), q in zip(history[1:order], ratios, strict=False)]
        scale = -(t.alpha if self.target == "x0" else t.sigma) * (math.expm1(hh) if self.variant == "bh2" else hh)
        if arrived is not None:
            differences.append(arrived - m0)
        weights = self._weights(hh, ratios[: len(differences)])
        for w, d in zip(weights, differences, strict=True):
            base = base + (scale * w) * d
        return base

    def _weights(self, hh: float, ratios: list[float]) -> list[float]:
        """The solution of sum_m rho_m ratio_m^(i-1) = i! phi_{i+1}(hh) hh / B(h), i = 1 .. len(ratios); 1/2 for a single
        equation, the degenerate case of the paper, exact to its order.
        """
        n = len(ratios)
        if n == 0:
            return []
        if n == 1 and self.variant != "exact":
            return [0.5]
        b = math.expm1(hh) if self.variant == "bh2" else hh
        right = [math.factorial(i) * phi(i + 1, hh) * hh / b for i in range(1, n + 1)]
        matrix = [[q ** (i - 1) for q in ratios] for i in range(1, n + 1)]
        return np.linalg.solve(np.array(matrix), np.array(right)).tolist()


def _no_noise(s: Knot, t: Knot) -> Form:
    raise InputError("this method is deterministic")


@dataclass(frozen=True)
class AdamsMoulton:
    """Adams-Bashforth predictor and Adams-Moulton corrector with exact weights on any grid.

        predict   the polynomial through the last ``predictor`` predictions, integrated over the step
        correct   the polynomial through the prediction at the arrived state and the last ``corrector`` - 1 ones, integrated
                  over the same step, with the same noise: so the correction is the difference of the two sums

    target "x0" (or "eps") is SA-Solver (Xue et al. 2023), whose tau is our eta, a number or a function of t; at eta = 0 it is
    UniPC with exact weights, AdamsMoulton(p, p + 1) being UniPC(p, "exact"). target "velocity" (basis "t") is the classical
    Adams-Bashforth-Moulton method. (Released SA-Solver code replaces the two-node weights of x0 by ones that agree to their
    order but exceed the whole step's on steps that are not small; not done here.)

    mode : "PEC", one call a step: a state is corrected by the prediction that the next step makes anyway, and that prediction,
           made at the uncorrected state, stays in the history. "PECE", two calls: the corrected state is evaluated again.
    lower_final : lower both orders towards the last step

    Order min(predictor + 1, corrector, 3): the first step, order one corrected by the trapezium rule, errs by h^3 once; with
    ``lower_final`` 2 in PEC, whose last state is not corrected. ``starts.Started`` brings out min(predictor + 1, corrector).
    With noise: weak order 2, strong order 1.
    """

    predictor: int
    corrector: int
    target: str = "x0"
    basis: str = "lam"
    mode: str = "PEC"
    lower_final: bool = False

    linear = True
    start_rule = "order 2 first step, then growing"

    def __post_init__(self) -> None:
        check_counts(predictor=self.predictor, corrector=self.corrector)
        if self.predictor < 1 or self.corrector < 2 or self.target not in TARGETS or self.basis not in BASES:
            raise InputError(
                f"{self}: predictor >= 1, corrector >= 2, target 'x0', 'eps' or 'velocity', basis one of {sorted(BASES)}"
            )
        if self.target == "velocity" and self.basis != "t":
            raise InputError(f"{self}: a method in the velocity interpolates in t: give basis='t'")
        if self.mode not in ("PEC", "PECE"):
            raise InputError(f"mode={self.mode!r}: use 'PEC' or 'PECE'")

    @property
    def steps(self) -> int:
        """Predictions that a full step uses."""
        return max(self.predictor, self.corrector - 1)

    @property
    def inner_order(self) -> float:
        return float(min(self.predictor + 1, self.corrector))

    @property
    def order(self) -> float:
        return min(self.inner_order, 2.0 if self.lower_final else 3.0)

    @property
    def weak(self) -> float | None:
        return 2.0 if self.takes_eta else None

    @property
    def strong(self) -> float | None:
        return 1.0 if self.takes_eta else None

    @property
    def stages(self) -> int:
        return len(self.mode) - 2

    @property
    def takes_eta(self) -> bool:
        return self.target != "velocity"

    @property
    def stochastic(self) -> bool:
        return self.takes_eta

    @property
    def invariant(self) -> bool:
        return self.basis != "t"

    @property
    def end_rule(self) -> str:
        lowered = "lowered to order 1 at the end" if self.lower_final else ""
        return ", ".join(filter(None, [lowered, "last state not corrected" if self.mode == "PEC" else ""])) or "as any step"

    @property
    def reduced(self) -> AdamsMoulton:
        """The same with one call a step."""
        return AdamsMoulton(self.predictor, self.corrector, self.target, self.basis, "PEC", self.lower_final)

    def remember(self, prediction: Prediction, k: Knot, carry: Any) -> Any:
        """The carry with the prediction at k put in front; the state there is not to be corrected."""
        history = carry[0] if carry else []
        return [(k, value_of(prediction, k, self.target)), *history][: self.steps], None

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        history, pending = carry or ([], None)
        prediction = problem.predict(x, s)
        if pending is not None:
            x = problem.keep(self._correct(problem, x, s, pending, value_of(prediction, s, self.target)))
        history, _ = self.remember(prediction, s, carry)
        eta = problem.eta(s)
        used = usable_history(history, s, t, self.target, self.predictor, self.lower_final)
        if interpolable(s, self.target) and interpolable(t, self.target):
            weights = self._weights(problem, s, t, [k for k, _ in used], eta)
            parts = list(zip(weights, (v for _, v in used), strict=True))
            out = exponential_step(s, t, eta, self.target, x, parts, noise)
            pending = (s, eta, usable_history(history, s, t, self.target, self.steps, False), weights)
        else:
            out, pending = one_node(s, t, eta, self.target, x, history[0][1], noise), None
        if self.mode == "PEC" or pending is None or not _finite(t, self.target):
            return Step(out, (history, pending if self.mode == "PEC" else None))
        out = problem.keep(out)
        arrived = value_of(problem.predict(out, t), t, self.target)
        return Step(self._correct(problem, out, t, pending, arrived), (history, None))

    def _weights(self, problem: Problem, s: Knot, t: Knot, nodes: list[Knot], eta: float) -> list[float]:
        return exact_weights(problem.path, s, t, nodes, self.target, self.basis, 1.0 + eta * eta)

    def _correct(self, problem: Problem, x: Form, t: Knot, pending: Any, arrived: Form) -> Form:
        """The state at t with the predictor's weights replaced by the corrector's: linear part and noise are in x."""
        s, eta, history, predicted = pending
        most = self.corrector
        if self.lower_final and t.count >= 0:
            most = min(most, t.count - s.index + 1)
        used = history[: most - 1]
        weights = self._weights(problem, s, t, [t, *(k for k, _ in used)], eta)
        scale = {"x0": t.alpha, "eps": -t.sigma, "velocity": 1.0}[self.target]
        x = x + (scale * weights[0]) * arrived
        new = weights[1:] + [0.0] * (len(predicted) - len(used))
        old = predicted + [0.0] * (len(used) - len(predicted))
        for (_, value), a, b in zip(history, new, old, strict=False):
            x = x + (scale * (a - b)) * value
        return x


def _finite(k: Knot, target: str) -> bool:
    """Whether what the corrector interpolates can be evaluated at k."""
    return target != "velocity" or (math.isfinite(k.dalpha) and math.isfinite(k.dsigma))
