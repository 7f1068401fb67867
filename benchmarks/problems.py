"""The built-in problems as data: ``get("ring2:vp")`` is a law of ``benchmarks.laws`` (or a network) on a noise path.

A name is a row of PROBLEMS, then a colon and a row of NOISES; without one it is ``ve``. ``gaussian:FILE.npy`` is the Gaussian
with the eigenvalues (d,), or the covariance (d, d), of that file, and takes a noise in the same way. ``wrap`` makes a problem
of a score of your own.

Everything a problem gives is at the time where sampling stops, in the sampler's own coordinates: true draws are draws of
x_t = alpha_t x0 + sigma_t eps at t = stop, so a perfect sampler is perfect wherever it stops.

Randomness. Draw i of a stream is a function of (seed, stream, i) alone. Streams are draws of ``sde.noise.White`` numbered far
beyond those of a sampler, so true draws, references and the start noise of one seed are independent of each other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path as File
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from scores import Gaussian, Score
from scores.analytic import Exact
from sde import EDM, VP, Cosine, Linear
from sde.errors import InputError, nearest
from sde.noise import White
from sde.path import Path
from sde.prediction import Predictor

from . import laws
from .endpoints import End, between, fine, rms, tight
from .laws import F64, Law, Points
from .previews import sheet
from .previews import to_bytes as to_bytes

WEIGHTS = File(__file__).parent / "weights" / "digits.safetensors"

#: Streams of true draws: to stand for a perfect sampler, to compare samples with, to start from, to fix a kernel's width.
PERFECT, REFERENCE, START, FIXED = range(4)
_STREAMS = 1 << 40

Features = Callable[[Tensor], Tensor]
Network = Callable[[torch.device, torch.dtype], Predictor]


class Noise(NamedTuple):
    """A path and the times between which it is used."""

    path: Path
    start: float
    stop: float


#: ve and vp are those of peers.md.
NOISES: dict[str, Callable[[], Noise]] = {
    "ve": lambda: Noise(EDM(), 80.0, 0.002),
    "vp": lambda: Noise(VP(0.1, 20.0), 1.0, 1e-3),
    "flow": lambda: Noise(Linear(), 1.0, 1e-3),
    "cosine": lambda: Noise(Cosine(), 1.0, 1e-3),
}


@dataclass(frozen=True, eq=False)
class Problem:
    """What samplers are tried on.

    name      as it is asked for, with its noise: ring2:ve
    title     in words;  note: what is to be learned from it
    shape     of one sample
    noise     the path, and the times where sampling starts and stops
    data      the law of the data; None where it is not known, and then there are no true draws
    network   (device, dtype) -> the score, where it is not the exact one of ``data``
    held_out  data (N, *shape) that the network has not seen
    features  (B, *shape) -> (B, k): what distances in feature space use (default: the numbers themselves)
    picture   how to show a sample, (C, H, W) (default: its shape, where that has three dimensions)
    tolerance of dopri8 for the end points of an exact score's flow
    fineness  Runge-Kutta steps for those of a network's flow
    """

    name: str
    title: str
    shape: tuple[int, ...]
    noise: Noise
    data: Law | None
    note: str = ""
    network: Network | None = None
    held_out: Tensor | None = None
    features: Features | None = None
    picture: tuple[int, int, int] | None = None
    tolerance: float = 1e-10
    fineness: int = 128

    @property
    def path(self) -> Path:
        return self.noise.path

    @property
    def start(self) -> float:
        return self.noise.start

    @property
    def stop(self) -> float:
        return self.noise.stop

    @property
    def dim(self) -> int:
        return math.prod(self.shape)

    def between(self, start: float | None = None, stop: float | None = None) -> Problem:
        """The same problem with sampling from ``start`` to ``stop``; None leaves a time as it is."""
        a, b = between(self.path, start, stop, (self.start, self.stop))
        return self if (a, b) == (self.start, self.stop) else dataclasses.replace(self, noise=Noise(self.path, a, b))

    @cached_property
    def law(self) -> Exact | None:
        """The data's law on the path, with its exact score; None where the data are not known."""
        return None if self.data is None else self.data.on(self.path)

    @property
    def exact(self) -> Exact | None:
        """The exact law where the score is the exact one: then p_t is known, its density too."""
        return None if self.network is not None else self.law

    def score(self, device: torch.device | str = "cpu", dtype: torch.dtype = F64) -> Predictor:
        """The score. Exact ones take states of any dtype on any device; a network's weights are in ``dtype`` on ``device``."""
        if self.network is not None:
            return self.network(torch.device(device), dtype)
        if self.law is None:
            raise InputError(f"{self.name} has neither data nor a network: give problems.wrap a score")
        return self.law

    # --- moments of the marginal where sampling stops ---

    @cached_property
    def mean(self) -> Tensor:
        """Mean of a perfect sample, (d,)."""
        return self.path.knot(self.stop).alpha * self._known().mean

    @cached_property
    def cov(self) -> Tensor:
        """Covariance of a perfect sample, (d, d)."""
        k = self.path.knot(self.stop)
        return k.alpha**2 * self._known().cov + k.sigma**2 * torch.eye(self.dim, dtype=F64)

    @cached_property
    def std(self) -> float:
        """Root mean variance a dimension of a perfect sample: the unit of distances. 1 where the data are not known."""
        return 1.0 if self.data is None else float(self.cov.diag().mean().sqrt())

    def _known(self) -> Law:
        if self.data is None:
            raise InputError(f"{self.name} has no data: true draws and moments are unknown; give problems.wrap data=")
        return self.data

    # --- draws ---

    def truth(self, seed: int, indices: Sequence[int], stream: int = PERFECT) -> Tensor:
        """True draws of the marginal where sampling stops, (B, *shape) float64 on the host."""
        k = self.path.knot(self.stop)
        x0, eps = self._draw(seed, indices, stream)
        return (k.alpha * x0 + k.sigma * eps).reshape(-1, *self.shape)

    def unseen(self, seed: int, indices: Sequence[int]) -> Tensor:
        """Data that the network has not seen, noised to ``stop``, (B, *shape): draws of ``held_out``, or else true draws."""
        if self.held_out is None:
            return self.truth(seed, indices, REFERENCE)
        other = dataclasses.replace(self, data=Points(self.held_out.double().flatten(1)), held_out=None)
        return other.truth(seed, indices, REFERENCE)

    def starts(
        self,
        seed: int,
        indices: Sequence[int],
        law: str = "prior",
        dtype: torch.dtype = F64,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Where sampling starts, (B, *shape): unit normals of (seed, i) times the prior's standard deviation, or draws of the
        exact marginal at ``start`` ("marginal"), with the same normals as its noise.
        """
        eps = White(seed, indices=indices).initial((len(indices), *self.shape), F64)
        if law == "prior":
            x = self.path.prior_std(self.start) * eps
        elif law == "marginal":
            k = self.path.knot(self.start)
            x = k.alpha * self._draw(seed, indices, START)[0].reshape(eps.shape) + k.sigma * eps
        else:
            raise InputError(f"start law {law!r} is unknown: use 'prior' or 'marginal'")
        return x.to(device=device, dtype=dtype)

    def _draw(self, seed: int, indices: Sequence[int], stream: int) -> tuple[Tensor, Tensor]:
        """Data and unit normals, each (B, d)."""
        data, n = self._known(), len(indices)
        k, source = self.path.knot(self.start), White(seed, indices=indices)
        first = _STREAMS + 4 * stream
        z, eps = (source.open((n, self.dim), F64).normal(first + j, k, k) for j in (0, 1))
        u = torch.special.ndtr(source.open((n, 1), F64).normal(first + 2, k, k))[:, 0]
        return data.draw(z, u), eps

    # --- end points ---

    def end(self, x: Tensor, to_zero: bool = False) -> End:
        """Where the probability flow takes x (B, *shape) from ``start`` to ``stop``: by its closed form for Gaussian data (with
        the rounding of float64 as its error), by ``endpoints.tight`` for other exact scores, ``endpoints.fine`` for networks.

        ``to_zero``: what samplers should return whose last step goes on to sigma = 0: x / alpha of the flow's end there, times
        the alpha of ``stop``. Networks are not asked below ``stop``, and some paths do not reach 0: then it is what the score
        predicts at the flow's end.
        """
        denoise = to_zero and (self.network is not None or self.path.knot(0.0).sigma > 0.0)
        if to_zero and not denoise:
            scale = self.path.knot(self.stop).alpha / self.path.knot(0.0).alpha
            return End(*(scale * found for found in self.between(stop=0.0).end(x)))
        if self.network is not None:
            score = for_states(self.score(x.device, x.dtype), x.dtype)
            return fine(score, x, self.start, self.stop, self.fineness, denoise)
        score, x = self.score(), x.double()
        if isinstance(score, Gaussian) and not denoise:
            end = score.flow(x, self.start, self.stop)
            return End(end, 1e-13 * self.std + 1e-15 * rms(end))
        return tight(score, x, self.start, self.stop, self.tolerance, denoise)

    # --- pictures ---

    def preview(self, x: Tensor, count: int = 64) -> np.ndarray[Any, Any]:
        """Samples (B, *shape) as one picture, uint8 (H, W), or (H, W, 3) of three channels.

        Pictures are tiled; points of the plane are counted in a window of four standard deviations; of other samples each is a
        row, grey where it is at the mean, black and white at three standard deviations from it.
        """
        picture = self.picture or (self.shape if len(self.shape) == 3 else None)
        known = self.data is not None
        return sheet(x, picture, self.mean if known else None, self.cov.diag().sqrt() if known else None, count)


# --- the digits -----------------------------------------------------------------------------------------------------------


_DIGIT = (1, 8, 8)


@cache
def digits() -> Tensor:
    """The 1797 handwritten digits inside scikit-learn, (1797, 1, 8, 8) float32 in [-1, 1]. Nothing is downloaded."""
    return torch.tensor(_load_digits()[0], dtype=torch.float32).reshape(-1, 1, 8, 8) / 8.0 - 1.0


def _load_digits() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise InputError("the digits are inside scikit-learn: pip install 'score-solvers[report]'") from None
    return load_digits(return_X_y=True)


def split(held_out: int = 297) -> tuple[Tensor, Tensor]:
    """(training digits, held-out digits): a fixed random split, the one the shipped network was trained with."""
    order = torch.randperm(len(digits()), generator=torch.Generator().manual_seed(0))
    return digits()[order[held_out:]], digits()[order[:held_out]]


def _digit_classes() -> laws.Mixture:
    return laws.classes(digits().double().flatten(1), torch.tensor(_load_digits()[1]), 0.02**2)


def _digit_points() -> Points:
    return Points(digits().double().flatten(1))


def digits_network(device: torch.device, dtype: torch.dtype) -> Predictor:
    from .networks import load

    return load(WEIGHTS, device=device, dtype=dtype)


FEATURE_LEVEL = 0.3  # sigma: where the shipped network still sees strokes, and no longer single pixels


@cache
def _feature_network() -> tuple[Any, float]:
    from .networks import about, load

    network: Any = load(WEIGHTS, dtype=F64).network
    return network.eval(), float(about(WEIGHTS)["sigma_data"])


def digit_features(x: Tensor) -> Tensor:
    """What the shipped network makes of digits (B, 1, 8, 8) or (B, 64) before its last layer: (B, 288), float64 on the host."""
    network, sigma_data = _feature_network()
    x = x.detach().double().cpu().reshape(-1, *_DIGIT) / math.hypot(FEATURE_LEVEL, sigma_data)
    with torch.no_grad():
        return network.hidden(x, torch.full((len(x),), math.log(FEATURE_LEVEL) / 4.0, dtype=F64))


# --- the table --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A row of PROBLEMS: how to make the law, in words, and what is particular to it."""

    law: Callable[[], Law]
    title: str
    note: str
    shape: tuple[int, ...] | None = None
    network: Network | None = None
    features: Features | None = None
    picture: tuple[int, int, int] | None = None
    tolerance: float = 1e-10
    noises: tuple[str, ...] = tuple(NOISES)


PROBLEMS: dict[str, Entry] = {
    "mixture": Entry(
        laws.three_modes,
        "three Gaussians in the plane, exact score",
        "The score is known in closed form and the flow is not linear: nothing but the sampler errs.",
    ),
    "digits_exact": Entry(
        _digit_points,
        "8x8 digits, exact score of the data set",
        "What a network that fits its training set perfectly would know: every path ends on one of the 1797 digits, so the "
        "error is mostly the share of samples that end on another digit than they should.",
        shape=_DIGIT,
        features=digit_features,
        tolerance=1e-7,
    ),
    "digits_network": Entry(
        _digit_points,
        "8x8 digits, trained network",
        "The network that ships with the package. What it has not learned shows in the distance to true data, not in the "
        "strong error.",
        shape=_DIGIT,
        network=digits_network,
        features=digit_features,
        noises=("ve",),
    ),
    "gauss64": Entry(
        laws.gauss64,
        "Gaussian in 64 dimensions, spectrum 1/k",
        "Every sampler with a table has an exact law here: no Monte Carlo.",
    ),
    "ring2": Entry(
        laws.ring2,
        "eight narrow modes on a ring",
        "Unequal weights and narrow modes: samples near a border between modes dominate the mean error, so read the median.",
    ),
    "gmm256": Entry(laws.gmm256, "ten anisotropic Gaussians in 256 dimensions", "Many scales at once, in many dimensions."),
    "digits64": Entry(
        _digit_classes,
        "ten full-covariance Gaussians of 8x8 digits",
        "One Gaussian a class of digit: a smooth law with the spectrum of real data.",
        features=digit_features,
        picture=_DIGIT,
    ),
    "rings": Entry(laws.rings, "two rings in the plane", "Mass on curves: the score turns sharply across them."),
    "lowrank": Entry(
        laws.low_rank,
        "rank 8 in 128 dimensions",
        "The data lie on a subspace: all noise must go from 120 directions, and no density exists at t = 0.",
    ),
    "heavy_tailed": Entry(
        laws.heavy_tailed,
        "Student-like scale mixture in the plane",
        "Rare, large samples: means of squares are dominated by a few, and moments converge slowly.",
    ),
    "multiscale": Entry(
        laws.multiscale,
        "groups of groups of modes: scales 1, .2, .04, .01",
        "Structure is decided at three noise levels far apart: a grid that skips one of them shows it.",
    ),
}


@cache
def get(name: str) -> Problem:
    """The problem of this name. InputError, with the nearest names, for an unknown one."""
    kind, _, level = name.rpartition(":")
    if level not in NOISES or not kind:
        kind, level = name, "ve"
    if kind.startswith("gaussian:"):
        return _from_file(kind.removeprefix("gaussian:"), level)
    if kind not in PROBLEMS:
        base, _, tail = kind.partition(":")
        if base in PROBLEMS:
            raise InputError(f"problem {name!r}: the noise {tail!r} is unknown: {nearest(tail, NOISES)}")
        raise InputError(f"problem {name!r} is unknown: {nearest(kind, [*PROBLEMS, 'gaussian:FILE.npy'])}")
    entry = PROBLEMS[kind]
    if level not in entry.noises:
        raise InputError(f"problem {name!r}: its network was trained on {', '.join(entry.noises)}; leave {':' + level!r} out")
    data = entry.law()
    return Problem(
        name=f"{kind}:{level}",
        title=entry.title,
        shape=entry.shape or (len(data.mean),),
        noise=NOISES[level](),
        data=data,
        note=entry.note,
        network=entry.network,
        held_out=split()[1] if entry.network is not None else None,
        features=entry.features,
        picture=entry.picture,
        tolerance=entry.tolerance,
    )


def _from_file(file: str, level: str) -> Problem:
    from .exact import read_spectrum

    values, vectors = read_spectrum(File(file), f"--model gaussian:{file}")
    title = f"Gaussian in {len(values)} dimensions, covariance of {File(file).name}"
    note = "Every sampler with a table has an exact law here: no Monte Carlo."
    data = laws.spectrum(values, vectors)
    return Problem(f"gaussian:{file}:{level}", title, (len(values),), NOISES[level](), data, note)


def wrap(
    score: Predictor,
    shape: Sequence[int],
    *,
    name: str = "model",
    title: str = "",
    data: Tensor | None = None,
    held_out: Tensor | None = None,
    features: Features | None = None,
    start: float | None = None,
    stop: float | None = None,
    fineness: int = 128,
) -> Problem:
    """A problem of your own score: ``shape`` of one sample; ``data`` (N, *shape) to compare samples with, from which true draws
    are taken with replacement; ``held_out`` data for the likelihood; times default to the path's T and t_min.

    An exact score of ``scores.analytic`` (Gaussian, GaussianMixture, Empirical, ...) is its own truth where no data are given,
    if its law is one of those ``benchmarks.laws`` can draw from: Gaussians, mixtures and finite sets.
    """
    if not isinstance(score, Predictor):
        raise InputError(f"score is a {type(score).__name__}: wrap the network first, Score(network, path, predicts='eps')")
    shape = tuple(int(s) for s in shape)
    d, law = math.prod(shape), None if data is not None else laws.of(score)
    for label, values in (("data", data), ("held_out", held_out)):
        if values is not None and (tuple(values.shape[1:]) != shape or len(values) < 2):
            raise InputError(f"{label} has shape {tuple(values.shape)}: give (N, {', '.join(map(str, shape))}) with N >= 2")
        if values is not None and not bool(values.isfinite().all()):
            raise InputError(f"{label} has values that are not finite")
    a, b = between(score.path, start, stop, (score.path.T, score.path.t_min))
    return Problem(
        name=name,
        title=title or name,
        shape=shape,
        noise=Noise(score.path, a, b),
        data=law if data is None else Points(data.detach().double().cpu().reshape(len(data), d)),
        network=None if law is not None else lambda device, dtype: score,
        held_out=held_out,
        features=features,
        fineness=fineness,
    )


def for_states(score: Predictor, dtype: torch.dtype) -> Predictor:
    """The score for states of this dtype: a network of another one gets them cast, and keeps its weights as they are."""
    network = getattr(score, "network", None)
    if not isinstance(score, Score) or not isinstance(network, nn.Module) or score.dtype is not None:
        return score
    own = next((p.dtype for p in network.parameters() if p.is_floating_point()), dtype)
    return score if own == dtype else with_network(score, network, own)


def with_network(score: Score, network: Any, dtype: torch.dtype | None) -> Score:
    """The same score of another network: everything else as it was."""
    return Score(
        network,
        score.path,
        score.predicts,
        label=score.label,
        scale=score.scale,
        sigma_data=score.sigma_data,
        output=score.output,
        split=score.split,
        mode=score.mode,
        conditions=score.conditions,
        dtype=dtype,
        evals=score.evals,
    )
