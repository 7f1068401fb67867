"""Few-step sampling with networks that were distilled to jump: a jump to a lower level, then exact noise up to the next time.

A consistency function sends x_s to the point of its own probability-flow trajectory at the data; a trajectory function sends
it to the trajectory's point at any lower time. After such a jump exact noise gives the exact law at t again, so that with an
exact function every step keeps the marginals whatever the number of steps, and more steps only repair what the network gets
wrong. With a denoiser in its place nothing converges: these samplers have no order, and their theory is "exact".

The function's value comes as the prediction of x0 (consistency), or as the pair (x0, eps) whose mix alpha_d x0 + sigma_d eps is
the point at the lower time d (trajectory consistency).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sde.errors import InputError, check_numbers
from sde.path import Path
from sde.prediction import Knot

from .base import Form, Noise, Problem, Step
from .compose import renoise


@dataclass(frozen=True)
class Consistency:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1) and LCM's (Luo et al. 2023). One network call a step.

        x_t = alpha_t (x0 + sqrt(rho_t^2 - origin^2) z),    rho = sigma/alpha

    ``origin`` is the level at which the network's trajectories end, in rho: 0, or the 0.002 of Song et al., whose function is
    the identity there. At rho_t <= origin, so at sigma_t = 0, the state is alpha_t x0 and no noise is drawn: end the grid
    there (``stop=0``) for the published samplers' last step. What networks wrap around x0 (c_skip, c_out) is the network's.
    """

    origin: float = 0.0

    stages = 1
    order = weak = strong = None
    stochastic = linear = True
    takes_eta = False

    def __post_init__(self) -> None:
        check_numbers(origin=self.origin)
        if not 0.0 <= self.origin < math.inf:
            raise InputError(f"origin={self.origin}: must be >= 0 and finite")

    @property
    def target(self) -> str | None:
        return "x0" if self.origin == 0.0 else None  # else x0 is a point at level origin, not data

    @property
    def invariant(self) -> bool:
        return self.origin == 0.0  # an origin above 0 does not move when the data are scaled

    def landing(self, path: Path, t: Knot) -> tuple[float, float]:
        """(alpha, sigma) of the level that a step to t jumps to."""
        return 1.0, self.origin

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        out = t.alpha * problem.predict(x, s).x0
        spread = math.sqrt(max(t.sigma**2 - (t.alpha * self.origin) ** 2, 0.0))
        return Step(out if spread == 0.0 else out + spread * noise(s, t))


@dataclass(frozen=True)
class TrajectoryConsistency:
    """TCD's strategic stochastic sampling (Zheng et al. 2024). One network call a step.

        d = (1 - gamma) t,    x_d = alpha_d x0 + sigma_d eps,    then exact noise from d up to t

    gamma 0 is DDIM, gamma 1 the consistency sampler; times are the path's own, where diffusers rounds d down to an integer.
    """

    gamma: float = 0.3

    stages = 1
    order = weak = strong = None
    stochastic = linear = True
    takes_eta = False
    target = "x0"
    invariant = False

    def __post_init__(self) -> None:
        check_numbers(gamma=self.gamma)
        if not 0.0 <= self.gamma <= 1.0:
            raise InputError(f"gamma={self.gamma}: must be in [0, 1]")

    def landing(self, path: Path, t: Knot) -> tuple[float, float]:
        """(alpha, sigma) of the level that a step to t jumps to."""
        d = self._below(path, t)
        return d.alpha, d.sigma

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        d = self._below(problem.path, t)
        jumped = problem.predict(x, s).combine(d.alpha, d.sigma)
        return Step(jumped if d.t == t.t else renoise(jumped, d, t, noise(s, t)))

    def _below(self, path: Path, t: Knot) -> Knot:
        return path.knot((1.0 - self.gamma) * t.t) if self.gamma > 0.0 else t
