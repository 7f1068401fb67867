"""What guidance asks of solvers: CFG++ on a sampler's table, and RePaint's resampling.

CFG++ (Chung et al. 2024) denoises with the guided prediction and renoises with the unconditional one. With primes for the
unconditional pair, DDIM's step becomes

    x_t = alpha_t (x0' + lam (x0 - x0')) + sigma_t eps'

which no pair with alpha x0 + sigma eps = x has for both parts. But a step of one call is x_t = (its step with the unconditional
prediction) + B (x0_guided - x0'), B its coefficient of x0 beside x_s. So CFG++ is that step under ordinary classifier-free
guidance,

    x0' + w (x0 - x0')    with    w = lam alpha_t / B,        DDIM: B = alpha_t (1 - e^-h),  w = lam / (1 - e^-h)

(h the step in lambda; 'ddpm': 1 - e^-2h; an ancestral step to the level d below t: 1 - rho_d/rho_s). The steps of a multistep
method use a prediction again with another B, and the later stages of a Runge-Kutta method start from states that are
themselves guided: there no w makes both parts, and what renoises is not defined. They are refused. As w grows like lam/h,
CFG++ is not the flow of any score: lam is the guidance of a step, and it belongs to the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from sde.errors import InputError

from .base import Form, Noise, Problem, Solver, Step
from .compose import renoise
from .plan import Call, Lin, Plan


def cfg_pp(plan: Plan, lam: float) -> Callable[[Tensor], float]:
    """The scale with which classifier-free guidance on this plan is CFG++ with lam (published: between 0 and 1).

        plan.run(guidance.classifier_free(score, cfg_pp(plan, 0.6), unconditional={"y": 10}), x, conditions={"y": labels})

    For plans that call the network once a step and use what it says in that step alone: 'ddim', 'ddpm', 'euler', 'edm_euler',
    'euler_ancestral', with the stochastic ones at any eta, in either direction. InputError for others, and for times that are
    not the plan's.
    """
    if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not math.isfinite(lam):
        raise InputError(f"lam={lam!r}: give a finite number, such as 0.6")
    gains = _gains(plan)

    def scale(t: Tensor) -> float:
        at = float(t)
        if at not in gains:
            raise InputError(f"t = {at:g} is not a time of this plan of {plan.solver}: run the plan that cfg_pp was given")
        return lam / gains[at]

    return scale


def _gains(plan: Plan) -> dict[float, float]:
    """{t of a call: B / alpha_t}, t the call's time and alpha_t at the end of its step."""
    forms: dict[int, dict[int, float]] = {0: {0: 1.0}}  # every register in calls, normals and the states between steps
    ends = {register: i for i, register in enumerate(plan.states)}
    calls, fresh, gains = dict[int, Call](), list[Call](), dict[float, float]()
    for row in plan.rows:
        if isinstance(row, Lin):
            total: dict[int, float] = {}
            for register, c in row.terms:
                for q, v in forms[register].items():
                    total[q] = total.get(q, 0.0) + c * v
            forms[row.out] = total
        else:
            forms[row.out] = {row.out: 1.0}
            if isinstance(row, Call):
                calls[row.out] = row
                fresh.append(row)
        if row.out in ends and ends[row.out] > 0:
            step = ends[row.out]
            used = [r for r, v in forms[row.out].items() if v != 0.0 and r in calls]
            if len(fresh) != 1 or used != [fresh[0].out]:
                raise InputError(
                    f"step {step} of {plan.solver!r} is not of one network call used in that step alone, so CFG++ does not say "
                    "which eps renoises: use 'ddim', 'ddpm', 'edm_euler' or 'euler_ancestral'"
                )
            call, knot, t = fresh[0], plan.knots[fresh[0].knot], plan.grid[step]
            gain = forms[row.out][call.out]
            if call.target == "eps":
                gain = -gain * knot.alpha / knot.sigma
            if gain == 0.0 or knot.t in gains:
                raise InputError(
                    f"step {step} of {plan.solver!r} does not denoise, or its time comes twice: CFG++ is not defined"
                )
            gains[knot.t] = gain / t.alpha
            forms[row.out], fresh = {row.out: 1.0}, []
    return gains


@dataclass(frozen=True)
class Resample:
    """RePaint's resampling (Lugmayr et al. 2022) around any single-step solver: for conditions that are put into x0, such as
    ``scores.guidance.inpaint``.

    After every ``jump`` steps, ``repeats`` - 1 times, exact noise takes the state back up ``jump`` steps and ``inner``
    integrates it down again through the same times. The noise is exact, so the law keeps the order of ``inner``; what changes
    is that the parts of a state that a replaced x0 left in disagreement see each other again. The published values are
    repeats 10, jump 10, with 'ddpm' inside and eta = 1. No jump starts from a time with sigma = 0.

    Calls: ``repeats`` times those of ``inner`` (the last steps, fewer than ``jump``, and those that end at sigma = 0, once).
    """

    inner: Solver
    repeats: int = 10
    jump: int = 10

    stochastic = uneven = True
    order = strong = None
    wanders = False
    invariant = False

    def __post_init__(self) -> None:
        for name in ("repeats", "jump"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}: must be an int >= 1")
        if not isinstance(self.inner, Solver):
            raise InputError(f"inner={self.inner!r:.80}: give a single-step solver, such as SOLVERS['ddpm'].solver")

    @property
    def weak(self) -> float | None:
        return self.inner.weak if self.inner.stochastic else self.inner.order

    @property
    def stages(self) -> int:
        return self.inner.stages * self.repeats

    @property
    def takes_eta(self) -> bool:
        return self.inner.takes_eta

    @property
    def linear(self) -> bool:
        return self.inner.linear

    @property
    def target(self) -> str | None:
        return getattr(self.inner, "target", None)

    @property
    def reduced(self) -> Solver:
        """Without resampling."""
        return getattr(self.inner, "reduced", self.inner)

    def step(self, problem: Problem, x: Form, s: Any, t: Any, carry: Any, noise: Noise) -> Step:
        visited = (*(carry or ()), s)
        x = self.inner.step(problem, x, s, t, None, noise).x
        if t.index % self.jump or t.sigma == 0.0 or s.sigma < t.sigma:
            return Step(x, visited)
        levels = [*visited[-self.jump :], t]
        for _ in range(self.repeats - 1):
            x = problem.keep(renoise(x, t, levels[0], noise(t, t)))
            for a, b in pairwise(levels):
                x = problem.keep(self.inner.step(problem, x, a, b, None, noise).x)
        return Step(x, visited)
