"""Solvers of the reverse SDE that are not exponential: Euler-Maruyama, stochastic Runge-Kutta, the discrete DDPM step,
annealed Langevin dynamics.

gDDIM (Zhang, Tao & Chen 2023) is not here: for isotropic noise, the noise of every path, its stochastic step with their
lambda = eta is ``Multistep(1, "x0")``, that is 'ddim' and 'ddpm' at another eta (row 'gddim'), and its multistep predictor is
DEIS. What it adds are noises that differ from direction to direction (critically damped Langevin, blurring); these have no
alpha and sigma as numbers, so no path can be made of them: ``FromFunctions`` refuses functions that are not shaped like t with
a PathError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from sde.errors import InputError, PathError, check_counts, check_numbers
from sde.prediction import Knot

from .base import Form, Noise, Problem, Step


def slope(k: Knot, eta: float) -> tuple[float, float]:
    """(a, b) of the reverse SDE's drift a x0 + b eps = f x - (1 + eta^2)/2 g^2 score.

    That is velocity + eta^2 g^2/(2 sigma) eps: the velocity alone is finite where alpha = 0. Infinite where the drift is.
    """
    extra = 0.0 if eta == 0.0 else 0.5 * eta * eta * k.g2 / k.sigma if k.sigma > 0.0 else math.inf
    return k.dalpha, k.dsigma + extra


def _finite_slope(s: Knot, eta: float) -> tuple[float, float]:
    """``slope`` where a step starts."""
    row = slope(s, eta)
    if not math.isfinite(row[1]):
        raise PathError(
            f"the drift is infinite at t = {s.t:g} (sigma' = {s.dsigma:g}, g^2 = {s.g2:g}, eta = {eta:g}): "
            "start elsewhere, or use 'ddpm', whose step is finite there"
        )
    return row


@dataclass(frozen=True)
class EulerMaruyama:
    """x_t = x_s + (t - s) [f x_s - (1 + eta^2)/2 g^2 score(x_s)] + eta g sqrt|t - s| z, everything at s. Milstein's method
    is the same here: the noise is additive, so the term that it adds is zero.

    Weak order 1, strong order 1 (the noise is additive), order 1 for eta = 0, where it is Euler's method. One network call a
    step.
    """

    stages = 1
    order = weak = strong = 1.0
    stochastic = takes_eta = True
    linear = True
    target = None
    invariant = False

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        eta, h = problem.eta(s), t.t - s.t
        a, b = _finite_slope(s, eta)
        out = x + h * problem.predict(x, s).combine(a, b)
        return Step(out if eta == 0.0 else out + (eta * math.sqrt(s.g2 * abs(h))) * noise(s, t))


@dataclass(frozen=True)
class AdditiveTableau:
    """An explicit stochastic Runge-Kutta method for additive noise, dX = F dt + G(t) dW (Roessler 2010, section 6).

        H_i = X + h sum_j a_ij F(t + c_j h, H_j) + sum_j (u_ij I + v_ij J) G(t + d_j h)
        X'  = X + h sum_i b_i F(t + c_i h, H_i) + sum_i (p_i I + q_i J) G(t + d_i h)

    I is the increment of W over the step and J its mean height above the start, (1/h) int (W_s - W_0) ds. ``weak`` 2 and
    ``strong`` 1 or 1.5 are checked at construction, as is the order for G = 0; where v and q are 0 no J is drawn.
    """

    name: str
    order: int
    strong: float
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    u: tuple[tuple[float, ...], ...]
    v: tuple[tuple[float, ...], ...]
    p: tuple[float, ...]
    q: tuple[float, ...]
    d: tuple[float, ...]
    source: str = ""

    def __post_init__(self) -> None:
        n = len(self.c)
        rows = all(len(m) == n and all(len(row) == i for i, row in enumerate(m)) for m in (self.a, self.u, self.v))
        if not rows or any(len(v) != n for v in (self.b, self.p, self.q, self.d)):
            raise InputError(f"tableau {self.name}: a, u, v must be strictly lower triangular, all of {n} stages")
        for residual in self._conditions():
            if abs(residual) > 1e-12:
                raise InputError(
                    f"tableau {self.name} does not satisfy the conditions of order {self.order}, weak 2 and "
                    f"strong {self.strong:g} (residual {residual:.2e})"
                )

    @property
    def areas(self) -> bool:
        """Whether J is needed."""
        return any(self.q) or any(any(row) for row in self.v)

    def _conditions(self) -> list[float]:
        """Residuals: the flow's, those of weak order 2, those of strong order 1.5.

        With E I^2 = h, E I J = h/2 and E J^2 = h/3, the noise u I + v J of the stages must have the covariance with I that
        int W has (the term F'G), and its variance (F''GG); p and q must carry G's slope in time. For strong order 1.5 the
        stages' noise must be int W itself and the slope's part I - J.
        """
        b, c, d, p, q = self.b, self.c, self.d, self.p, self.q
        i = range(len(c))
        u, v = [sum(row) for row in self.u], [sum(row) for row in self.v]
        flow = [sum(row) - c[k] for k, row in enumerate(self.a)]
        flow += [sum(b) - 1.0, sum(b[k] * c[k] for k in i) - 0.5]
        if self.order >= 3:
            flow.append(sum(b[k] * c[k] ** 2 for k in i) - 1.0 / 3.0)
            flow.append(sum(b[k] * w * c[j] for k in i for j, w in enumerate(self.a[k])) - 1.0 / 6.0)
        weak = [
            sum(p) - 1.0,
            sum(q),
            sum(b[k] * (u[k] + 0.5 * v[k]) for k in i) - 0.5,
            sum(b[k] * (u[k] ** 2 + u[k] * v[k] + v[k] ** 2 / 3.0) for k in i) - 0.5,
            sum((p[k] + 0.5 * q[k]) * d[k] for k in i) - 0.5,
        ]
        area = [
            sum(b[k] * u[k] for k in i),
            sum(b[k] * v[k] for k in i) - 1.0,
            sum(p[k] * d[k] for k in i) - 1.0,
            sum(q[k] * d[k] for k in i) + 1.0,
        ]
        return flow + weak + (area if self.strong > 1.0 else [])


_NONE2, _NONE3 = ((), (0.0,)), ((), (0.0,), (0.0, 0.0))
STOCHASTIC_HEUN = AdditiveTableau(
    "stochastic Heun",
    order=2,
    strong=1.0,
    c=(0.0, 1.0),
    a=((), (1.0,)),
    b=(0.5, 0.5),
    u=((), (1.0,)),
    v=_NONE2,
    p=(0.5, 0.5),
    q=(0.0, 0.0),
    d=(0.0, 1.0),
    source="Kloeden & Platen 1992, section 15.1; G averaged over the ends",
)
SRA1 = AdditiveTableau(
    "SRA1",
    order=2,
    strong=1.5,
    c=(0.0, 3 / 4),
    a=((), (3 / 4,)),
    b=(1 / 3, 2 / 3),
    u=_NONE2,
    v=((), (3 / 2,)),
    p=(1.0, 0.0),
    q=(-1.0, 1.0),
    d=(1.0, 0.0),
    source="Roessler 2010, table 6.1",
)
SRA2 = replace(SRA1, name="SRA2", p=(0.0, 1.0), q=(3 / 2, -3 / 2), d=(1 / 3, 1.0))
SRA3 = AdditiveTableau(
    "SRA3",
    order=3,
    strong=1.5,
    c=(0.0, 1.0, 1 / 2),
    a=((), (1.0,), (1 / 4, 1 / 4)),
    b=(1 / 6, 1 / 6, 2 / 3),
    u=_NONE3,
    v=((), (0.0,), (1.0, 1 / 2)),
    p=(1.0, 0.0, 0.0),
    q=(-1.0, 1.0, 0.0),
    d=(1.0, 0.0, 0.0),
    source="Roessler 2010, table 6.2",
)


@dataclass(frozen=True)
class StochasticRungeKutta:
    """A stochastic Runge-Kutta method on the reverse SDE in t, whose noise is additive: tableau as data.

    With F the drift and G = eta g, both at the stage's own time and eta. Weak order 2; strong order as the tableau says: 1 from
    the increment alone, 1.5 with the mean height J, for which a second normal a step is drawn (``areas``) that belongs to no
    path of ``sde.noise``: strong convergence is to the path whose increments and areas are these. For eta = 0 it is the
    Runge-Kutta method (c, a, b). ``stages`` network calls a step.

    Where the drift is infinite at a stage (sigma_t = 0) the step is Euler-Maruyama's, which uses s alone.
    """

    tableau: AdditiveTableau

    stochastic = takes_eta = linear = True
    weak = 2.0
    target = None
    invariant = False
    end_rule = "Euler-Maruyama to sigma = 0"

    @property
    def order(self) -> float:
        return float(self.tableau.order)

    @property
    def strong(self) -> float:
        return self.tableau.strong

    @property
    def stages(self) -> int:
        return len(self.tableau.b)

    @property
    def areas(self) -> bool:
        """Whether a step draws the increment and then the area, as ``benchmarks.probing`` must know."""
        return self.tableau.areas

    @property
    def reduced(self) -> EulerMaruyama:
        """The one-call method."""
        return EulerMaruyama()

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        tableau, h = self.tableau, t.t - s.t
        _finite_slope(s, problem.eta(s))
        if 1.0 in tableau.c and not math.isfinite(slope(t, problem.eta(t))[1]):
            return EulerMaruyama().step(problem, x, s, t, None, noise)
        knots = {c: s if c == 0.0 else t if c == 1.0 else problem.path.knot(s.t + c * h) for c in {*tableau.c, *tableau.d}}
        size = {c: problem.eta(k) * math.sqrt(k.g2 * abs(h)) if problem.eta(k) > 0.0 else 0.0 for c, k in knots.items()}
        normals: list[Form] = []
        if any(size.values()):
            normals.append(noise(s, t))
            if tableau.areas:  # J/sqrt(h) = I/(2 sqrt(h)) + z/sqrt(12)
                normals.append(0.5 * normals[0] + math.sqrt(1.0 / 12.0) * noise(s, s))

        def advance(weights: tuple[float, ...], *noises: tuple[float, ...]) -> Form:
            out = x
            for w, f in zip(weights, slopes, strict=False):
                out = out + (h * w) * f
            for weights_of, z in zip(noises, normals, strict=False):
                out = out + sum(w * size[d] for w, d in zip(weights_of, tableau.d, strict=False)) * z
            return out

        slopes: list[Form] = []
        for i, c in enumerate(tableau.c):
            stage, knot = advance(tableau.a[i], tableau.u[i], tableau.v[i]), knots[c]
            slopes.append(problem.predict(stage, knot).combine(*slope(knot, problem.eta(knot))))
        return Step(advance(tableau.b, tableau.p, tableau.q))


def check_variance_preserving(k: Knot, what: str) -> None:
    """PathError where alpha^2 + sigma^2 is not 1."""
    total = k.alpha**2 + k.sigma**2
    if abs(total - 1.0) > 1e-9:
        raise PathError(f"alpha^2 + sigma^2 = {total:.9g} at t = {k.t:g}: {what} needs a variance-preserving path; use 'ddpm'")


@dataclass(frozen=True)
class DiscreteDDPM:
    """DDPM with a table beta_k = g(s)^2 (s - t), as Pierret & Galerne (2025) discretise it; variance-preserving paths only,
    eta = 1.

        x_t = (x_s + beta score(x_s)) / sqrt(1 - beta) + sqrt(beta) z

    Order one in every sense. The exact posterior step is 'ddpm'.

    beta is clipped at 0.999, as in the tables of Nichol & Dhariwal (2021), so that any number of steps is defined; steps so
    long are of no order. (At the end of a cosine path, where g is infinite, only the clip says what the step is.)
    """

    stages = 1
    order = None
    weak = strong = 1.0
    stochastic = takes_eta = True
    linear = True
    target = None
    invariant = False

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        check_variance_preserving(s, "ddpm_discrete")
        if problem.eta(s) != 1.0:
            raise InputError(
                f"eta = {problem.eta(s):g}: ddpm_discrete is defined for eta = 1; use 'ddpm' for other noise levels"
            )
        beta = min(s.g2 * (s.t - t.t), 0.999)
        mean = (1.0 / math.sqrt(1.0 - beta)) * (x - (beta / s.sigma) * problem.predict(x, s).eps)
        return Step(mean + math.sqrt(beta) * noise(s, t))


@dataclass(frozen=True)
class AnnealedLangevin:
    """Annealed Langevin dynamics (Song & Ermon 2019): at each new level ``inner`` unadjusted Langevin steps, no predictor.

        x <- (alpha_t/alpha_s) x,   then ``inner`` times   x <- x + size/2 sigma_t^2 score(x) + sqrt(size) sigma_t z

    ``size`` is NCSN's epsilon / sigma_L^2 (0.2 there). At sigma_t = 0 the state becomes alpha_t x0 (NCSNv2's final
    denoising). ``inner`` calls a step. Weak order 1 in the number of levels, down to a floor: Langevin steps of fixed
    relative size leave the variance too large by size/4 sigma_t^2.
    """

    inner: int = 5
    size: float = 0.2

    order = strong = None
    weak = 1.0
    stochastic = True
    takes_eta = False
    linear = True
    target = None
    invariant = True

    def __post_init__(self) -> None:
        check_numbers(size=self.size)
        check_counts(inner=self.inner)
        if self.inner < 1 or not 0.0 < self.size < math.inf:
            raise InputError(f"{self}: inner >= 1 and size > 0")

    @property
    def stages(self) -> int:
        return self.inner

    @property
    def floor(self) -> float:
        """The excess variance it settles at, in units of sigma_t^2, to leading order."""
        return self.size / 4.0

    @property
    def linearised(self) -> AnnealedLangevin:
        """A solver of the same floor that has a table."""
        return self

    @property
    def reduced(self) -> AnnealedLangevin:
        """One Langevin step a level."""
        return AnnealedLangevin(1, self.size)

    def step(self, problem: Problem, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        if s.alpha == 0.0:
            raise PathError(f"alpha({s.t:g}) = 0: the levels cannot be rescaled from there; start just below")
        if t.sigma == 0.0:
            return Step(t.alpha * problem.predict(x, s).x0)
        x = (t.alpha / s.alpha) * x
        for _ in range(self.inner):
            drift = problem.predict(x, t).eps
            x = problem.keep(x - (0.5 * self.size * t.sigma) * drift + (math.sqrt(self.size) * t.sigma) * noise(t, t))
        return Step(x)
