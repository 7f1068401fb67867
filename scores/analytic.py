"""Exact scores of laws whose diffusion is known in closed form, on any path: the truth that solvers are measured against.

Data x_0 ~ p_0, x_t = alpha x_0 + sigma eps. For Gaussian data N(mu, C) and S = alpha^2 C + sigma^2 I,

    x0    = E[x_0 | x] = S^-1 (sigma^2 mu + alpha C x)          eps   = E[eps | x] = sigma S^-1 (x - alpha mu)
    score = grad log p_t(x) = -S^-1 (x - alpha mu)              Cov[x_0 | x] = sigma^2 S^-1 C

and mixtures average these over the posterior of the component. x0 and eps are each computed from such a formula, never
one from the other, so both are accurate at alpha = 0 and at sigma = 0 (where eps is independent of x, hence 0).

Everything accepts states (B, *event) in float32 or float64 on any device, with parameters shaped like a sample or
flattened; parameters are kept in float64 on the host, and cast and moved once for each dtype and device. Coefficients are
computed in float64. Half-precision states are computed in float32.
"""

from __future__ import annotations

import copy
import functools
import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, nearest
from sde.path import Path
from sde.prediction import OUTPUTS, Knot, Prediction, Predictor, Row, Tally

from .network import check_state, levels, needs_sigma, per_sample, working

Field = Callable[[Tensor], Tensor]

EAGER = 1 << 24  # coefficients prepared ahead by ``at``; beyond this they are made when a knot is called
CHUNK = 1 << 22  # elements of the (B, n) tables of distances to data


class Exact(Predictor):
    """Base of the exact scores. A law implements ``_field``; everything a solver needs follows.

    As a network it answers eps where alpha >= sigma and x0 elsewhere: the output from which the other follows without
    cancellation.
    """

    def __init__(self, path: Path, event: torch.Size) -> None:
        if not isinstance(path, Path):
            raise InputError(f"path is a {type(path).__name__}: give a sde.Path, for example VP()")
        self.path = path
        self.event_shape = event
        self.dim = event.numel()
        self._cost = self.dim  # numbers kept a knot
        self._cache: dict[Any, Tensor] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but the lock."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**state, "_lock": threading.Lock()}.items():
            setattr(self, name, value)

    @abstractmethod
    def _field(self, kind: str, alpha: Tensor, sigma: Tensor, x: Tensor) -> Field:
        """ "x0", "eps" or "score" at one noise level, (1, 1) float64, or one a sample, (B, 1): a function (B, d) -> (B, d).

        x is flat and gives dtype, device and batch only.
        """

    def _fields(self, kind: str, alpha: Tensor, sigma: Tensor, x: Tensor) -> list[Field]:
        """One function a level, for n levels (n, 1)."""
        return [self._field(kind, a[None], s[None], x) for a, s in zip(alpha, sigma, strict=True)]

    @abstractmethod
    def log_prob(self, x: Tensor, t: Any = 0.0) -> Tensor:
        """log p_t(x): (B, *event) -> (B,). Computed in float64."""

    @abstractmethod
    def posterior_cov(self, x: Tensor, t: Any, v: Tensor | None = None) -> Tensor:
        """Cov[x_0 | x_t = x], (B, d, d), or its product (B, *event) with v (B, *event). Computed in float64."""

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n data points, (n, d) float64 on the host."""

    def row(self, knot: Knot) -> Row:
        """(a, b) of the raw output: eps where alpha >= sigma, else x0."""
        return Row(0.0, 1.0) if knot.alpha >= knot.sigma else Row(1.0, 0.0)

    def at(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> list[Field]:
        """One function a knot: state (B, *event) -> raw output. Coefficients are prepared here; one NFE a call."""
        self._check(x)
        if conditions:
            raise InputError(f"conditions {', '.join(conditions)}: {type(self).__name__} takes none")
        kinds = ["eps" if k.alpha >= k.sigma else "x0" for k in knots]
        if len(knots) * self._cost > EAGER:
            late = [functools.partial(self._shaped, kind, k) for kind, k in zip(kinds, knots, strict=True)]
            return [_counted(_late(make), tally) for make in late]
        fields: dict[int, Field] = {}
        for kind in ("eps", "x0"):
            chosen = [i for i, this in enumerate(kinds) if this == kind]
            if chosen:
                levels64 = torch.tensor([(knots[i].alpha, knots[i].sigma) for i in chosen], dtype=torch.float64)
                made = self._fields(kind, levels64[:, :1], levels64[:, 1:], self._flat(x))
                fields.update(zip(chosen, made, strict=True))
        return [_counted(self._reshaped(fields[i], x), tally) for i in range(len(knots))]

    def each(self, knots: Sequence[Knot], x: Tensor, conditions: Mapping[str, Any], tally: Tally) -> Field:
        """One function for a batch whose sample i is at ``knots[i]``; one NFE a call. Rows of both kinds cost two fields."""
        self._check(x)
        if conditions:
            raise InputError(f"conditions {', '.join(conditions)}: {type(self).__name__} takes none")
        levels64 = torch.tensor([(k.alpha, k.sigma) for k in knots], dtype=torch.float64)
        alpha, sigma = levels64[:, :1], levels64[:, 1:]
        in_eps = alpha >= sigma
        made = [self._field(kind, alpha, sigma, self._flat(x)) for kind in ("eps", "x0")]
        if bool(in_eps.all()) or not bool(in_eps.any()):
            return _counted(self._reshaped(made[0] if bool(in_eps[0]) else made[1], x), tally)
        where = in_eps.to(x.device)
        return _counted(self._reshaped(lambda x: torch.where(where, made[0](x), made[1](x)), x), tally)

    def predict(self, x: Tensor, t: Any, **conditions: Any) -> Prediction:
        """The pair (x0, eps) at x (B, *event) and time t, a number or a tensor () or (B,)."""
        state, knot, back = self._entry(x, t, conditions)
        return Prediction(*(back(self._shaped(kind, knot, state)(state)) for kind in ("x0", "eps")))

    def __call__(self, x: Tensor, t: Any, **conditions: Any) -> Tensor:
        """grad_x log p_t(x), shaped like x. PathError at sigma = 0 for laws without a density there."""
        state, knot, back = self._entry(x, t, conditions)
        return back(self._shaped("score", knot, state)(state))

    def posterior_mean(self, x: Tensor, t: Any) -> Tensor:
        """E[x_0 | x_t = x], shaped like x."""
        state, knot, back = self._entry(x, t, {})
        return back(self._shaped("x0", knot, state)(state))

    def sample(
        self,
        n: int,
        t: float = 0.0,
        seed: int | torch.Generator = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> Tensor:
        """n draws of x_t, (n, *event): drawn in float64 on the host from their own generator, then cast and moved."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise InputError(f"n={n!r}: give the number of samples, an int >= 0")
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        knot = self.path.knot(t)
        x = knot.alpha * self._draw(n, generator)
        if knot.sigma > 0.0:
            x = x + knot.sigma * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return x.reshape(n, *self.event_shape).to(device=device, dtype=dtype)

    def on(self, path: Path) -> Exact:
        """The same law on another path. Parameters are shared."""
        if not isinstance(path, Path):
            raise InputError(f"path is a {type(path).__name__}: give a sde.Path, for example VP()")
        other = copy.copy(self)
        other.path = path
        return other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path}, event={tuple(self.event_shape)})"

    def _check(self, x: Any) -> None:
        check_state(x)
        if x.shape[1:].numel() != self.dim:
            raise InputError(f"x has shape {tuple(x.shape)}: give (B, *{tuple(self.event_shape)}) or (B, {self.dim})")

    def _entry(self, x: Any, t: Any, conditions: Mapping[str, Any]) -> tuple[Tensor, Knot, Field]:
        self._check(x)
        if conditions:
            raise InputError(f"conditions {', '.join(conditions)}: {type(self).__name__} takes none")
        state, back = working(x)
        return state, levels(self.path, t, state), back

    def _shaped(self, kind: str, knot: Knot, x: Tensor) -> Field:
        """The field as a function of (B, *event)."""
        alpha, sigma = (torch.as_tensor(v, dtype=torch.float64).cpu().reshape(-1, 1) for v in (knot.alpha, knot.sigma))
        return self._reshaped(self._field(kind, alpha, sigma, self._flat(x)), x)

    def _flat(self, x: Tensor) -> Tensor:
        return x if x.dim() == 2 else x.reshape(x.shape[0], self.dim)

    def _reshaped(self, field: Field, x: Tensor) -> Field:
        """A function of (B, d) as one of (B, *event)."""
        shape, kind = x.shape, x.device.type

        def run(x: Tensor) -> Tensor:
            if torch.is_autocast_enabled(kind):  # autocast is for networks; an exact score must not be rounded by it
                with torch.autocast(kind, enabled=False):
                    return field(x.reshape(shape[0], self.dim)).reshape(shape)
            return field(x.reshape(shape[0], self.dim)).reshape(shape)

        return run

    def _flat64(self, x: Tensor, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, d), alpha and sigma (1, 1) or (B, 1), in float64 on x's device."""
        self._check(x)
        knot = levels(self.path, t, x)
        alpha, sigma = (torch.as_tensor(v, dtype=torch.float64, device=x.device) for v in (knot.alpha, knot.sigma))
        return x.reshape(x.shape[0], self.dim).double(), alpha.reshape(-1, 1), sigma.reshape(-1, 1)

    def _like(self, name: str, value: Tensor, x: Tensor) -> Tensor:
        """A parameter in x's dtype and device, made once."""
        key = (name, x.dtype, x.device)
        if key not in self._cache:
            with self._lock:
                if key not in self._cache:
                    self._cache[key] = value.to(device=x.device, dtype=x.dtype)
        return self._cache[key]


class Gaussian(Exact):
    """Gaussian data N(mean, C). Give one of

    cov             (d, d) symmetric positive semi-definite; or variances shaped like mean; or one number
    std, var        shaped like mean, or one number: standard deviations, variances
    factor, diag    C = factor factor^T + diag, factor (d, r) or (*event, r), diag a number or shaped like mean. With a
                    number only the r directions are stored (principal components); otherwise C is formed.

    Zero eigenvalues are allowed. Attributes, in float64: mean (*event); eigenvalues (d,); eigenvectors (d, r) as columns,
    r <= d, or None for the identity. Directions outside the columns share the value ``eigenvalues[r:]``.

    Diagonal laws act elementwise: rows of a batch do not depend on each other, to the bit.
    """

    def __init__(
        self,
        path: Path,
        mean: Any,
        cov: Any = None,
        *,
        std: Any = None,
        var: Any = None,
        factor: Any = None,
        diag: Any = None,
    ) -> None:
        self.mean = _numbers("mean", mean)
        super().__init__(path, self.mean.shape)
        d = self.dim
        given = [n for n, v in (("cov", cov), ("std", std), ("var", var), ("factor", factor)) if v is not None]
        if len(given) != 1:
            raise InputError(f"{' and '.join(given) or 'no covariance'} given: give exactly one of cov, std, var, factor")
        if diag is not None and factor is None:
            raise InputError("diag is given without factor: diagonal covariances go to var=")
        self._mu = self.mean.reshape(d)
        self.eigenvectors: Tensor | None = None
        self._rest: float | None = None  # eigenvalue of the directions outside the columns
        if factor is not None:
            u = _numbers("factor", factor)
            if u.dim() < 2 or u.shape[:-1].numel() != d:
                raise InputError(f"factor has shape {tuple(u.shape)} for mean {tuple(self.event_shape)}: give ({d}, r)")
            u = u.reshape(d, -1)
            extra = _numbers("diag", 0.0 if diag is None else diag)
            _nonnegative("diag", extra)
            if extra.numel() == 1 and u.shape[1] < d:
                vectors, values, _ = torch.linalg.svd(u, full_matrices=False)
                self._rest = float(extra)
                self.eigenvectors, self._values = vectors, values**2 + self._rest
            else:
                self._values, self.eigenvectors = _eigen("cov", u @ u.T + torch.diag(_spread("diag", extra, d)), d)
        elif cov is not None:
            c = _numbers("cov", cov)
            if c.numel() == d * d and (d > 1 or c.dim() == 2):
                self._values, self.eigenvectors = _eigen("cov", c.reshape(d, d), d)
            else:
                self._values = _spread("cov", c, d)
        else:
            spread = _spread(given[0], _numbers(given[0], std if var is None else var), d)
            _nonnegative(given[0], spread)
            self._values = spread**2 if var is None else spread
        _nonnegative(given[0], self._values)
        outside = d - len(self._values)
        self.eigenvalues = torch.cat([self._values, torch.full((outside,), self._rest or 0.0, dtype=torch.float64)])
        rank = 0 if self.eigenvectors is None else self.eigenvectors.shape[1]
        self._dense = rank > 0 and d <= 256  # one matrix a knot is faster than two thin products
        self._cost = 3 * d + (d * d if self._dense else 0)

    def _apply(self, values: Tensor, rest: Tensor | None, x: Tensor) -> Tensor:
        """phi(C) x for phi on the eigenvalues (., r), rest (., 1) on the remaining directions; x (., d)."""
        if self.eigenvectors is None:
            return values * x
        v = self._like("V", self.eigenvectors, x)
        if rest is None:
            return ((x @ v) * values) @ v.T
        return rest * x + ((x @ v) * (values - rest)) @ v.T

    def _phi(self, phi: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor | None]:
        """phi on the eigenvalues, (., r), and on the remaining directions, (., 1) or None."""
        rest = None if self._rest is None else phi(torch.full((1, 1), self._rest, dtype=torch.float64, device=like.device))
        return phi(self._like("values", self._values, like)[None]), rest

    def _coefficients(self, kind: str, alpha: Tensor, sigma: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """shift (., d) in x's dtype, and phi of y = shift + phi(C) x in float64, for levels (., 1)."""
        if kind == "score":
            self._check_density(alpha, sigma)

        def slope(c: Tensor) -> Tensor:
            s = alpha**2 * c + sigma**2
            return _ratio({"x0": alpha * c, "eps": sigma.expand_as(s), "score": -torch.ones_like(s)}[kind], s)

        def offset(c: Tensor) -> Tensor:
            s = alpha**2 * c + sigma**2
            return torch.where(s > 0.0, sigma**2 / s, 1.0) if kind == "x0" else -alpha * slope(c)

        shift = self._apply(*self._phi(offset, alpha), self._mu[None]).to(device=x.device, dtype=x.dtype)
        return shift, *self._phi(slope, alpha)

    def _field(self, kind: str, alpha: Tensor, sigma: Tensor, x: Tensor) -> Field:
        return self._affine(*self._coefficients(kind, alpha, sigma, x), x)

    def _fields(self, kind: str, alpha: Tensor, sigma: Tensor, x: Tensor) -> list[Field]:
        shift, values, rest = self._coefficients(kind, alpha, sigma, x)
        rests = [None] * len(alpha) if rest is None else rest[:, None]
        return [self._affine(a, b, c, x) for a, b, c in zip(shift[:, None], values[:, None], rests, strict=True)]

    def _affine(self, shift: Tensor, values: Tensor, rest: Tensor | None, x: Tensor) -> Field:
        if self._dense and len(values) == 1:
            matrix = self._apply(values, rest, torch.eye(self.dim, dtype=torch.float64)).to(device=x.device, dtype=x.dtype)
            return lambda x: torch.addmm(shift, x, matrix)
        values = values.to(device=x.device, dtype=x.dtype)
        if self.eigenvectors is None:
            return lambda x: torch.addcmul(shift, x, values)
        rest = None if rest is None else rest.to(device=x.device, dtype=x.dtype)
        return lambda x: shift + self._apply(values, rest, x)

    def _check_density(self, alpha: Tensor, sigma: Tensor) -> None:
        if bool((self.eigenvalues == 0.0).any()):
            needs_sigma(sigma, self.path)

    def posterior_cov(self, x: Tensor, t: Any, v: Tensor | None = None) -> Tensor:
        """Cov[x_0 | x] = sigma^2 C / (alpha^2 C + sigma^2), the same for every x: (B, d, d), or its product with v."""
        flat, alpha, sigma = self._flat64(x, t)
        phi = self._phi(lambda c: _ratio(sigma**2 * c, alpha**2 * c + sigma**2), flat)
        if v is not None:
            return self._apply(*phi, v.reshape(flat.shape).double()).reshape(x.shape).to(x.dtype)
        eye = torch.eye(self.dim, dtype=torch.float64, device=x.device)
        values, rest = phi
        rests = [None] * len(values) if rest is None else list(rest[:, None])
        rows = [self._apply(a, b, eye) for a, b in zip(values[:, None], rests, strict=True)]
        return torch.stack(rows).expand(len(flat), -1, -1).to(x.dtype)

    def log_prob(self, x: Tensor, t: Any = 0.0) -> Tensor:
        """log N(x; alpha mean, alpha^2 C + sigma^2 I), (B,). PathError where the law has no density."""
        flat, alpha, sigma = self._flat64(x, t)
        self._check_density(alpha, sigma)
        centred = flat - alpha * self._like("mean", self._mu, flat)
        values, rest = self._phi(lambda c: alpha**2 * c + sigma**2, flat)
        z, log_det, quadratic = centred, values.log().sum(-1), torch.zeros_like(flat[:, 0])
        if self.eigenvectors is not None:
            vectors = self._like("V", self.eigenvectors, flat)
            z = centred @ vectors
            if rest is not None:
                quadratic = ((centred - z @ vectors.T) ** 2 / rest).sum(-1)
                log_det = log_det + (self.dim - len(self._values)) * rest.log()[:, 0]
        quadratic = quadratic + (z * z / values).sum(-1)
        return (-0.5 * (quadratic + log_det + self.dim * math.log(2.0 * math.pi))).to(x.dtype)

    def flow(self, x: Tensor, s: Any, t: Any) -> Tensor:
        """The exact probability-flow map from time s to t (either direction), x_s (B, *event) -> x_t:

            x_t = alpha_t mean + sqrt(S_t / S_s) (x_s - alpha_s mean),   S = alpha^2 C + sigma^2.

        PathError from sigma_s = 0 for laws without a density there.
        """
        self._check(x)
        start, end = levels(self.path, s, x), levels(self.path, t, x)
        state, back = working(x)
        flat = state.reshape(len(state), self.dim)
        a, b, c, d = (
            torch.as_tensor(v, dtype=torch.float64, device=x.device).reshape(-1, 1)
            for v in (start.alpha, start.sigma, end.alpha, end.sigma)
        )
        self._check_density(a, b)
        phi = self._phi(lambda e: torch.sqrt((c**2 * e + d**2) / (a**2 * e + b**2)), a)
        values, rest = phi[0].to(state.dtype), None if phi[1] is None else phi[1].to(state.dtype)
        mean = self._like("mean", self._mu, torch.empty(0, dtype=torch.float64, device=x.device))
        moved = self._apply(values, rest, flat - (a * mean).to(state.dtype)) + (c * mean).to(state.dtype)
        return back(moved.reshape(x.shape))

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return self._mu + self._apply(*self._phi(torch.sqrt, z), z)


class GaussianMixture(Exact):
    """Data from sum_k weights_k N(means_k, covs_k).

    weights (K,), >= 0, summing to 1; means (K, *event) or (K, d); covs (K, d, d) full, shaped like means (diagonal), or (K,)
    isotropic variances. Zero variances are allowed. At time t component k has mean alpha mu_k and covariance alpha^2 C_k +
    sigma^2, and the posterior weight r_k(x) = softmax_k log(w_k N_k(x)); x0, eps and the score are averages over r.

    Diagonal mixtures expand the squares into matrix products where that costs no precision, and form x - alpha mu_k elsewhere.
    """

    def __init__(self, path: Path, weights: Any, means: Any, covs: Any) -> None:
        self.weights, self.means, self.covs = _numbers("weights", weights), _numbers("means", means), _numbers("covs", covs)
        if self.weights.dim() != 1 or not len(self.weights):
            raise InputError(f"weights has shape {tuple(self.weights.shape)}: give (K,)")
        k = len(self.weights)
        _nonnegative("weights", self.weights)
        total = float(self.weights.sum())
        if abs(total - 1.0) > 1e-6:
            raise InputError(f"weights sum to {total:g}: they must sum to 1; give weights / weights.sum()")
        if self.means.dim() < 1 or len(self.means) != k:
            raise InputError(f"means has shape {tuple(self.means.shape)} for {k} weights: give ({k}, *event)")
        super().__init__(path, self.means.shape[1:])
        d = self.dim
        self.weights = self.weights / total
        self._mu, self._log_w = self.means.reshape(k, d), self.weights.log()
        self._vectors: Tensor | None = None
        if self.covs.numel() == k * d * d and (d > 1 or self.covs.dim() == 3):
            pairs = [_eigen(f"covs[{i}]", c, d) for i, c in enumerate(self.covs.reshape(k, d, d))]
            self._values = torch.stack([values for values, _ in pairs])
            self._vectors = torch.stack([vectors for _, vectors in pairs])  # (K, d, d), columns
            self._forth = self._vectors.permute(1, 0, 2).reshape(d, k * d)  # x @ forth: coordinates in all K bases
            self._back = self._vectors.transpose(1, 2).reshape(k * d, d)
            self._mu_basis = torch.einsum("kd,kde->ke", self._mu, self._vectors)
        elif self.covs.dim() and len(self.covs) == k and self.covs.numel() in (k, k * d):
            self._values = self.covs.reshape(k, -1).expand(k, d)
            _nonnegative("covs", self._values)
        else:
            raise InputError(f"covs has shape {tuple(self.covs.shape)}: give ({k}, {d}, {d}), ({k}, {d}) or ({k},)")
        self._size = max(float((self._mu**2 + self._values).mean().sqrt()), 1e-150)
        self._cost = 4 * k * d

    def _variance(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma (., 1, 1); eigenvalues, V = alpha^2 lambda + sigma^2 and V with a floor under zeros, (., K, d)."""
        alpha, sigma = alpha[:, :, None], sigma[:, :, None]
        values = self._like("values", self._values, alpha)
        v = alpha**2 * values + sigma**2
        # Where V = 0 the posterior is the limit sigma -> 0: a floor far below the data's size picks the nearest component.
        return alpha, sigma, values, v, torch.where(v > 0.0, v, (1e-10 * self._size) ** 2)

    def _field(self, kind: str, alpha: Tensor, sigma: Tensor, x: Tensor) -> Field:
        if kind == "score" and bool((self._values == 0.0).any()):
            needs_sigma(sigma, self.path)
        a, s, values, v, floored = self._variance(alpha, sigma)
        slope = _ratio({"x0": a * values, "eps": s.expand_as(v), "score": -torch.ones_like(v)}[kind], v)
        constant = self._log_w - 0.5 * floored.log().sum(-1)  # (., K)

        def cast(c: Tensor) -> Tensor:
            return c.to(device=x.device, dtype=x.dtype)

        if self._vectors is not None:
            centre, half, slope, constant = cast(a * self._mu_basis), cast(0.5 / floored), cast(slope), cast(constant)
            mean = self._like("means", self._mu, x)
            forth, basis = self._like("forth", self._forth, x), self._like("back", self._back, x)
            shape = (-1, *self._mu.shape)

            def full(x: Tensor) -> Tensor:
                z = (x @ forth).reshape(shape) - centre
                r = torch.softmax(constant - (z * z * half).sum(-1), -1)
                out = (z * slope * r[..., None]).flatten(1) @ basis
                return out + r @ mean if kind == "x0" else out

            return full
        # offset + slope x is the component's own answer; for x0 the offset is mu sigma^2 / V, written without 1 - alpha slope.
        offset = self._mu * torch.where(v > 0.0, s**2 / v, 1.0) if kind == "x0" else -a * self._mu * slope
        size = (a**2 * (self._mu**2 + values) + s**2) / floored
        error = float(size.square().sum(-1).sqrt().max()) * torch.finfo(x.dtype).eps
        if len(v) == 1 and error <= (1e-12 if x.dtype is torch.float64 else 1e-5):
            flat = constant - 0.5 * ((a * self._mu) ** 2 / floored).sum(-1)
            square, linear = cast(-0.5 / floored[0]).T, cast((a * self._mu / floored)[0]).T
            flat, slope, offset = cast(flat), cast(slope[0]), cast(offset[0])

            def expanded(x: Tensor) -> Tensor:
                r = torch.softmax(flat + (x * x) @ square + x @ linear, -1)
                return torch.addcmul(r @ offset, x, r @ slope)

            return expanded
        centre, half, slope, offset, constant = (cast(c) for c in (a * self._mu, 0.5 / floored, slope, offset, constant))

        def direct(x: Tensor) -> Tensor:
            x = x[:, None]
            r = torch.softmax(constant - ((x - centre) ** 2 * half).sum(-1), -1)
            if kind == "x0":
                return (r[..., None] * (offset + slope * x)).sum(1)
            return (r[..., None] * (slope * (x - centre))).sum(1)

        return direct

    def _posterior(self, flat: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """log joint (B, K), its V (., K, d), component means of x_0 (B, K, d), their covariance's eigenvalues, and z."""
        a, s, values, v, floored = self._variance(alpha, sigma)
        mean = self._like("means", self._mu, flat)
        if self._vectors is None:
            z = flat[:, None] - a * mean
        else:
            z = (flat @ self._like("forth", self._forth, flat)).reshape(-1, *mean.shape)
            z = z - a * self._like("mu_basis", self._mu_basis, flat)
        log_w = self._like("log_w", self._log_w, flat)
        joint = log_w - 0.5 * (z * z / floored + floored.log() + math.log(2.0 * math.pi)).sum(-1)
        shift = _ratio(a * values, v) * z
        if self._vectors is not None:
            shift = torch.einsum("bke,kde->bkd", shift, self._like("vectors", self._vectors, flat))
        return joint, v, mean + shift, _ratio(s**2 * values, v), z

    def posterior_cov(self, x: Tensor, t: Any, v: Tensor | None = None) -> Tensor:
        """Cov[x_0 | x] = sum_k r_k (C_k|x + (m_k - m)(m_k - m)^T), (B, d, d), or its product with v."""
        flat, alpha, sigma = self._flat64(x, t)
        joint, _, means, values, _ = self._posterior(flat, alpha, sigma)
        r = torch.softmax(joint, -1)
        apart = means - (r[..., None] * means).sum(1, keepdim=True)
        values = r[..., None] * values  # (B, K, d)
        if v is not None:
            u = v.reshape(flat.shape).double()
            out = (r[..., None] * apart * (apart @ u[..., None])).sum(1)
            if self._vectors is None:
                return (out + values.sum(1) * u).reshape(x.shape).to(x.dtype)
            q = self._like("vectors", self._vectors, flat)
            return (out + torch.einsum("kde,bke,kfe,bf->bd", q, values, q, u)).reshape(x.shape).to(x.dtype)
        out = torch.einsum("bk,bkd,bke->bde", r, apart, apart)
        if self._vectors is None:
            return (out + torch.diag_embed(values.sum(1))).to(x.dtype)
        q = self._like("vectors", self._vectors, flat)
        return (out + torch.einsum("kde,bke,kfe->bdf", q, values, q)).to(x.dtype)

    def log_prob(self, x: Tensor, t: Any = 0.0) -> Tensor:
        """log sum_k w_k N(x; alpha mu_k, alpha^2 C_k + sigma^2 I), (B,). PathError where a component has no density."""
        flat, alpha, sigma = self._flat64(x, t)
        if bool((self._values == 0.0).any()):
            needs_sigma(sigma, self.path)
        return torch.logsumexp(self._posterior(flat, alpha, sigma)[0], -1).to(x.dtype)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator) if n else torch.zeros(0, dtype=torch.long)
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64) * self._values[k].sqrt()
        return self._mu[k] + (z if self._vectors is None else torch.einsum("nde,ne->nd", self._vectors[k], z))


class Empirical(Exact):
    """Data uniform on a finite set, data (N, *event): what a network that fits its training set perfectly knows.

        x0 = sum_i r_i d_i,   r = softmax_i(-|x - alpha d_i|^2 / (2 sigma^2)),   eps = (x - alpha x0) / sigma

    At sigma = 0, x0 is the nearest point and eps is 0. Work is streamed over the data: memory is bounded by ``CHUNK``
    elements and the data itself. Squares are expanded into a matrix product (about the data's mean) only where that costs
    no precision; elsewhere differences are formed (once differentiable).
    """

    def __init__(self, path: Path, data: Any) -> None:
        self.data = (
            data.detach().clone() if isinstance(data, Tensor) and data.dtype is torch.float32 else _numbers("data", data)
        )
        if self.data.dim() < 1 or not len(self.data):
            raise InputError(f"data has shape {tuple(self.data.shape)}: give (N, *event) with N >= 1")
        if not bool(self.data.isfinite().all()):
            raise InputError("data has non-finite values: give finite data")
        super().__init__(path, self.data.shape[1:])
        self._points = self.data.reshape(len(self.data), self.dim).cpu()
        self._centre = self._points.double().mean(0)
        self._radius = float((self._points - self._centre.to(self._points.dtype)).norm(dim=1).max())
        self._cost = 1

    def _levels(self, alpha: Tensor, sigma: Tensor, x: Tensor) -> tuple[Tensor, Tensor, bool]:
        """alpha and sigma in x's dtype and device, sigma with a floor, and whether squares may be expanded."""
        floor = 1e-12 * max(self._radius, 1e-100) * alpha
        sigma = torch.where(sigma > 0.0, sigma, floor).clamp_min(1e-150 if x.dtype is torch.float64 else 1e-15)
        reach = alpha * self._radius
        error = float((reach * (reach + sigma * math.sqrt(self.dim)) / sigma**2).max()) * torch.finfo(x.dtype).eps
        safe = error <= (1e-11 if x.dtype is torch.float64 else 1e-5)
        return alpha.to(device=x.device, dtype=x.dtype), sigma.to(device=x.device, dtype=x.dtype), safe

    def _tables(self, x: Tensor, alpha: Tensor, sigma: Tensor, safe: bool) -> Any:
        """(chunk (n, d), -|x - alpha d_i|^2 / (2 sigma^2) (B, n) up to a constant of the row when expanded), chunk by chunk."""
        points = self._like("points", self._points, x)
        step = max(1, CHUNK // max(1, len(x)))
        if safe:
            centre = self._like("centre", self._centre, x)
            ahead = (x - alpha * centre) * (alpha / sigma / sigma)
            for chunk in points.split(step):
                apart = chunk - centre
                yield chunk, ahead @ apart.T - (apart * apart).sum(-1) * (0.5 * (alpha / sigma) ** 2)
            return
        alpha = alpha.clamp_min(1e-12)  # in both factors: at alpha = 0 the distance is |x|, which log_prob needs
        ahead, rate = x / alpha, (alpha / sigma) * math.sqrt(0.5)
        for chunk in points.split(step):
            distance = torch.cdist(ahead, chunk, compute_mode="donot_use_mm_for_euclid_dist")
            yield chunk, -((distance * rate) ** 2)

    def _mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, safe: bool) -> Tensor:
        top, total, out = x.new_full((len(x), 1), -math.inf), 0.0, torch.zeros_like(x)
        for chunk, logits in self._tables(x, alpha, sigma, safe):
            new = torch.maximum(top, logits.detach().amax(1, keepdim=True))
            p, keep = torch.exp(logits - new), torch.exp(top - new)
            total = keep * total + p.sum(1, keepdim=True)
            out = keep * out + p @ chunk
            top = new
        return out / total

    def _field(self, kind: str, alpha: Tensor, sigma: Tensor, x: Tensor) -> Field:
        if kind == "score":
            needs_sigma(sigma, self.path)
        prepared = self._levels(alpha, sigma, x)
        if kind == "x0":
            return lambda x: self._mean(x, *prepared)
        power = {"eps": 1, "score": 2}[kind]
        rate = _ratio(torch.full_like(sigma, 1.0 if kind == "eps" else -1.0), sigma**power)
        a, rate = prepared[0], rate.to(device=x.device, dtype=x.dtype)
        return lambda x: (x - a * self._mean(x, *prepared)) * rate

    def _weights(self, flat: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, bool]]:
        """log sum_i exp(-|x - alpha d_i|^2 / (2 sigma^2)), (B,), by differences; and the levels for a second pass."""
        a, s, _ = self._levels(alpha, sigma, flat)
        sums = [torch.logsumexp(logits, 1) for _, logits in self._tables(flat, a, s, False)]
        return torch.logsumexp(torch.stack(sums), 0), (a, s, False)

    def posterior_cov(self, x: Tensor, t: Any, v: Tensor | None = None) -> Tensor:
        """Cov[x_0 | x] = sum_i r_i (d_i - x0)(d_i - x0)^T, (B, d, d), or its product with v."""
        flat, alpha, sigma = self._flat64(x, t)
        log_total, prepared = self._weights(flat, alpha, sigma)
        mean = self._mean(flat, *prepared)
        if v is None:
            out = flat.new_zeros(len(flat), self.dim, self.dim)
            for chunk, logits in self._tables(flat, *prepared):
                r = torch.exp(logits - log_total[:, None])
                for b in range(len(flat)):
                    apart = chunk - mean[b]
                    out[b] += (apart * r[b][:, None]).T @ apart
            return out.to(x.dtype)
        u = v.reshape(flat.shape).double()
        out = torch.zeros_like(flat)
        for chunk, logits in self._tables(flat, *prepared):
            weight = torch.exp(logits - log_total[:, None]) * (u @ chunk.T - (u * mean).sum(-1, keepdim=True))
            out = out + weight @ chunk - mean * weight.sum(-1, keepdim=True)
        return out.reshape(x.shape).to(x.dtype)

    def log_prob(self, x: Tensor, t: Any = 0.0) -> Tensor:
        """log of the smoothed density (1/N) sum_i N(x; alpha d_i, sigma^2 I), (B,). PathError at sigma = 0."""
        flat, alpha, sigma = self._flat64(x, t)
        needs_sigma(sigma, self.path)
        log_total, _ = self._weights(flat, alpha, sigma)
        norm = math.log(len(self._points)) + self.dim * (0.5 * math.log(2.0 * math.pi) + sigma[:, 0].log())
        return (log_total - norm).to(x.dtype)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        return self._points[torch.randint(len(self._points), (n,), generator=generator)].double()


def as_network(
    exact: Exact,
    path: Path,
    predicts: Any = "eps",
    *,
    time: Callable[[Tensor], Tensor] | None = None,
    scale: Callable[[Tensor], Tensor] | None = None,
    sigma_data: float = 0.5,
) -> Callable[[Tensor, Tensor], Tensor]:
    """An exact score disguised as a trained network: network(c_in x, label) -> y = a x0 + b eps.

    predicts  a name of OUTPUTS or a pair (a, b) of numbers or functions of t.
    time      label -> t, the inverse of the label convention (default: the label is t). Float32 labels limit the accuracy.
    scale     t -> c_in, undone on entry.
    The law is taken on ``path``. ``Score(as_network(exact, path, p), path, p)`` predicts what ``exact.on(path)`` predicts.
    """
    exact = exact.on(path)
    if isinstance(predicts, str) and predicts not in OUTPUTS:
        raise InputError(f"predicts={predicts!r} is unknown: {nearest(predicts, OUTPUTS)}")

    def network(x: Tensor, label: Tensor) -> Tensor:
        labels = label.reshape(-1).double()
        if len(labels) and (labels.stride(0) == 0 or bool((labels == labels[0]).all())):
            labels = labels[:1]
        t = labels if time is None else time(labels)
        t = t.clamp(0.0, path.T)
        if scale is not None:
            x = x / per_sample(scale(t), x)
        if predicts == "score":
            return exact(x, t)
        pair, knot = exact.predict(x, t), levels(path, t, x)
        if isinstance(predicts, str):
            row = OUTPUTS[predicts](knot.alpha, knot.sigma, knot.dalpha, knot.dsigma, sigma_data)
        else:
            row = Row(*(c(torch.as_tensor(knot.t, dtype=torch.float64)) if callable(c) else c for c in predicts))
        return pair.combine(per_sample(row.a, x), per_sample(row.b, x))

    return network


def _counted(field: Field, tally: Tally) -> Field:
    def call(x: Tensor) -> Tensor:
        tally.nfe += 1
        tally.net_evals += 1
        return field(x)

    return call


def _late(make: Callable[[Tensor], Field]) -> Field:
    return lambda x: make(x)(x)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b = 0: the directions that carry neither data nor noise."""
    return torch.where(b > 0.0, a / torch.where(b > 0.0, b, 1.0), 0.0)


def _numbers(name: str, value: Any) -> Tensor:
    try:
        exact = isinstance(value, Tensor) or hasattr(value, "dtype")  # else Python numbers, which torch would round to float32
        out = torch.as_tensor(value, dtype=None if exact else torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} is a {type(value).__name__}: give numbers") from None
    if out.is_complex() or out.dtype is torch.bool:
        raise InputError(f"{name} has dtype {out.dtype}: give real numbers")
    out = out.to(device="cpu", dtype=torch.float64, copy=True)
    bad = ~out.isfinite()
    if bool(bad.any()):
        raise InputError(f"{name} contains {float(out[bad][0])}: give finite numbers")
    return out


def _nonnegative(name: str, value: Tensor) -> None:
    if bool((value < 0.0).any()):
        raise InputError(f"{name} contains {float(value.min()):g}: must be >= 0")


def _spread(name: str, value: Tensor, d: int) -> Tensor:
    if value.numel() not in (1, d):
        raise InputError(f"{name} has shape {tuple(value.shape)}: give one number, or {d} of them, one an element of mean")
    return value.reshape(-1).expand(d).contiguous()


def _eigen(name: str, cov: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues >= 0 and eigenvectors (columns) of a symmetric positive semi-definite matrix."""
    size = float(cov.abs().max())
    skew = (cov - cov.T).abs()
    if float(skew.max()) > 1e-6 * size:
        i, j = divmod(int(skew.argmax()), d)
        raise InputError(
            f"{name} is not symmetric: [{i}, {j}] = {float(cov[i, j]):g}, [{j}, {i}] = {float(cov[j, i]):g}; give (C + C.T) / 2"
        )
    values, vectors = torch.linalg.eigh(0.5 * (cov + cov.T))
    if float(values[0]) < -1e-6 * size:
        raise InputError(f"{name} is not positive semi-definite: its smallest eigenvalue is {float(values[0]):g}")
    return values.clamp_min(0.0), vectors
