"""The exact solution of the reverse SDE over one step, and the weights by which multistep methods approximate it.

With h = lambda_t - lambda_s, eta the noise level and r = 1 + eta^2, the reverse SDE is solved exactly by

    in x0 :  x_t = (sigma_t/sigma_s) e^{-eta^2 h} x_s + alpha_t int_0^h r e^{-r(h-u)} x0(u) du
                   + sigma_t sqrt(1 - e^{-2 eta^2 h}) z
    in eps:  x_t = (alpha_t/alpha_s) x_s - sigma_t r int_0^h e^{h-u} eps(u) du + sigma_t eta sqrt(e^{2h} - 1) z

and the probability flow (eta = 0) also by

    in the velocity v = alpha' x0 + sigma' eps:  x_t = x_s + int_s^t v du

A method replaces x0(u), eps(u) or v(u) by a polynomial through the predictions at some knots; its weights are integrals of
that polynomial. Limits are written out: sigma_t = 0 gives alpha_t x0, alpha_s = 0 leaves sigma_t/sigma_s x + alpha_t x0 (h is
infinite; the polynomial is then a constant). eta is constant over a step, taken at its start.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from sde.errors import PathError
from sde.path import Path
from sde.prediction import Knot, Prediction

from .base import Form, Noise

NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)

TARGETS = ("x0", "eps", "velocity")

#: The variable in which the predictions are interpolated, as a function of (path, lambdas).
BASES = {
    "lam": lambda path, lam: lam,
    "rho": lambda path, lam: np.exp(-lam),
    "t": lambda path, lam: np.array(path.time(lam.tolist()).tolist()),
}


_FACTORIALS = [float(math.factorial(i)) for i in range(100)]


@lru_cache(maxsize=4096)
def phi(k: int, z: float) -> float:
    """phi_k(z) = (phi_{k-1}(z) - 1/(k-1)!) / z, phi_0 = exp; by its series where the recursion would cancel."""
    if abs(z) < 2.0:
        return math.fsum([z**i / _FACTORIALS[i + k] for i in range(30)])
    value = math.exp(z)
    for i in range(1, k + 1):
        value = (value - 1.0 / math.factorial(i - 1)) / z
    return value


def lagrange(v: Any, nodes: list[float], j: int) -> Any:
    """The j-th Lagrange polynomial of the nodes at v, a number or an array."""
    return math.prod((v - nodes[i]) / (nodes[j] - nodes[i]) for i in range(len(nodes)) if i != j)


def exact_weights(path: Path, s: Knot, t: Knot, nodes: list[Knot], target: str, basis: str, r: float) -> list[float]:
    """w_j = int k(u) L_j(u) du over the step, L_j the Lagrange polynomials of the nodes in the variable ``basis``.

    k = r e^{-r(h-u)} in x0, r e^{h-u} in eps (u from 0 to h, in lambda) and 1 in the velocity (in t). For one node the
    integral is closed; else by Gauss-Legendre quadrature, 32 points on each panel of at most 8 e-foldings of k: relative error
    below 1e-13 in lam and rho, and in t where t(lambda) is smooth.
    """
    h = t.lam - s.lam
    if target == "velocity":
        u, du = _quadrature(t.t - s.t, 1)
        return [float(np.sum(du * lagrange(s.t + u, [k.t for k in nodes], j))) for j in range(len(nodes))]
    if len(nodes) == 1:
        return [-math.expm1(-r * h) if target == "x0" else r * math.expm1(h)]
    u, du = _quadrature(h, 1 + int(r * abs(h) / 8.0))
    kernel = du * r * np.exp(-r * (h - u) if target == "x0" else h - u)
    variable = BASES[basis]
    v = variable(path, s.lam + u)
    at = [k.t for k in nodes] if basis == "t" else variable(path, np.array([k.lam for k in nodes])).tolist()
    return [float(np.sum(kernel * lagrange(v, at, j))) for j in range(len(nodes))]


def _quadrature(h: float, panels: int) -> tuple[Any, Any]:
    """Points and weights of composite Gauss-Legendre quadrature on [0, h]."""
    width = h / panels
    starts = width * np.arange(panels)[:, None]
    return (starts + 0.5 * width * (1.0 + NODES)).ravel(), np.tile(0.5 * width * WEIGHTS, panels)


def value_of(prediction: Prediction, k: Knot, target: str) -> Form:
    """What a method in ``target`` interpolates, from the prediction at k."""
    if target == "velocity":
        if not (math.isfinite(k.dalpha) and math.isfinite(k.dsigma)):
            raise PathError(
                f"the slope of x in t is infinite at t = {k.t:g} (sigma' = {k.dsigma:g}): start elsewhere, such as the "
                "path's t_min"
            )
        return prediction.combine(k.dalpha, k.dsigma)
    return prediction.x0 if target == "x0" else prediction.eps


def interpolable(k: Knot, target: str) -> bool:
    """Whether a polynomial in lambda may pass through k; in the velocity it is one in t, which is always finite."""
    return target == "velocity" or math.isfinite(k.lam)


def exponential_step(s: Knot, t: Knot, eta: float, target: str, x: Form, parts: list[tuple[float, Form]], noise: Noise) -> Form:
    """x_t from x_s and the weighted predictions, with the exact linear and noise terms.

    ``parts`` are (w, value) with sum w = 1 - e^{-rh} in x0, r (e^h - 1) in eps, t - s in the velocity.
    """
    spread = 0.0
    if target == "velocity":
        out = x
        for w, value in parts:
            out = out + w * value
    elif target == "x0":
        if s.sigma == 0.0:
            raise PathError(
                f"sigma({s.t:g}) = 0: a method in x0 cannot start there; start (or, to encode, stop) at a time with sigma > 0, "
                "such as the path's t_min"
            )
        decay = 1.0 if eta == 0.0 else math.exp(-eta * eta * (t.lam - s.lam))
        out = (t.sigma / s.sigma * decay) * x
        for w, value in parts:
            out = out + (t.alpha * w) * value
        if eta != 0.0:
            spread = t.sigma * math.sqrt(-math.expm1(-2.0 * eta * eta * (t.lam - s.lam)))
    else:
        if s.alpha == 0.0:
            raise PathError(f"alpha({s.t:g}) = 0: a method in eps cannot start there; start just below, or use target 'x0'")
        out = (t.alpha / s.alpha) * x
        for w, value in parts:
            out = out - (t.sigma * w) * value
        if eta != 0.0:  # sigma_t^2 (e^{2h} - 1) = (alpha_t sigma_s / alpha_s)^2 - sigma_t^2, finite also at sigma_t = 0
            spread = eta * math.sqrt(max((t.alpha * s.sigma / s.alpha) ** 2 - t.sigma**2, 0.0))
    return out if spread == 0.0 else out + spread * noise(s, t)


def one_node(s: Knot, t: Knot, eta: float, target: str, x: Form, value: Form, noise: Noise) -> Form:
    """The first-order step, exact where the prediction is constant, and its limits at infinite h."""
    r = 1.0 + eta * eta
    if target == "velocity":
        return x + (t.t - s.t) * value
    if target == "x0":
        w = -math.expm1(-r * (t.lam - s.lam))  # 1 where h is infinite
        return exponential_step(s, t, eta, target, x, [(w, value)], noise)
    if t.sigma == 0.0:  # sigma_t (e^h - 1) -> alpha_t sigma_s / alpha_s
        if s.alpha == 0.0:
            raise PathError(f"alpha({s.t:g}) = 0: a method in eps cannot start there; start just below, or use target 'x0'")
        out = (t.alpha / s.alpha) * x - (r * t.alpha * s.sigma / s.alpha) * value
        return out if eta == 0.0 else out + (eta * t.alpha * s.sigma / s.alpha) * noise(s, t)
    return exponential_step(s, t, eta, target, x, [(r * math.expm1(t.lam - s.lam), value)], noise)
