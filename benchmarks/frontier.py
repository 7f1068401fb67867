"""``python -m benchmarks frontier``: error against NFE on four problems with known end points, beside what peers reach.

Problems (full covariance and mixtures, exact scores): gauss64, ring2, gmm256, digits64; noise: "vp", the linear VP(0.1, 20)
from t = 1 to 1e-3, and "ve", EDM from sigma 80 to .002. x_T is drawn from the exact marginal; the truth at the last time is
the closed-form flow (gauss64) or dopri8 at tolerance 1e-11 in log(sigma/alpha). The error is the root mean square over samples
and dimensions of x/alpha, divided by the data's standard deviation.

Candidates are all deterministic names of SOLVERS with a table, on the grids of ``GRID_NAMES``. They are selected on one batch
and judged on another, larger one, which is the peers' own: the same generator drawn in the same order, so that a sampler that
is theirs too has their error to the printed digit. The winners among theirs (``PEER_WINNERS``) are judged in every cell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path as File
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scores import Gaussian, GaussianMixture
from sde import EDM, VP
from sde.errors import InputError, ToolkitError, nearest
from sde.path import Path
from solvers import SOLVERS, sample

from .problems import digits

NFES = (4, 5, 6, 8, 10, 12, 15, 20, 30, 50)
GRID_NAMES = ("log_snr", "karras", "uniform", "quadratic", "cosine", "gaussian_optimal", "probit", "ays_svd")
#: The seeds of the batch that selects and of the one that judges.
FIRST, SECOND = 0, 2
#: The peers' winners by their names here; two of diffusers' (Heun:trailing, PNDM:leading) are of its table of 1000 levels.
PEER_WINNERS = tuple(
    (solver, grid)
    for solvers, grids in (
        (("ipndm_3", "ipndm_4", "deis_lam_3", "unipc_3_full", "dpmpp_4m"), ("log_snr", "karras")),
        (("unipc_2", "unipc_2_exact", "unipc_3", "unipc_3_bh1", "dpmpp_3s"), ("log_snr",)),
        (("dpmpp_2m", "dpmpp_2m_lower_final", "dpm_2m"), ("quadratic",)),
        (("deis_t_4",), ("karras", "uniform")),
    )
    for solver in solvers
    for grid in grids
)
PEERS = File(__file__).parent / "peers.json"


@dataclass(frozen=True)
class Frontier:
    """Error against NFE on four problems, beside the best peer at every NFE."""

    problems: tuple[str, ...] = ("gauss64", "ring2", "gmm256", "digits64")
    noises: tuple[str, ...] = ("vp", "ve")
    nfes: tuple[int, ...] = NFES
    solvers: tuple[str, ...] = ()
    """Names of SOLVERS (default: every deterministic one with a table)."""
    grids: tuple[str, ...] = GRID_NAMES
    keep: int = 16
    """Candidates a cell, by either error, that the first batch hands to the second."""
    first: int = 256
    """Samples of the selection batch."""
    cache: File = File("out/frontier")
    """Where the truths are kept, and results.jsonl, from which a stopped run goes on."""
    output: File | None = None
    """Write the tables here as Markdown too."""


class Noise(NamedTuple):
    """A path and the times between which it is used."""

    path: Path
    start: float
    stop: float


def noise(name: str) -> Noise:
    found = {"vp": lambda: Noise(VP(0.1, 20.0), 1.0, 1e-3), "ve": lambda: Noise(EDM(), 80.0, 0.002)}
    if name not in found:
        raise InputError(f"noise {name!r} is unknown: use vp or ve")
    return found[name]()


class Data(NamedTuple):
    """A Gaussian or a mixture: weights (K,), means (K, d), covariances (K, d) or (K, d, d); n samples of the second batch."""

    weights: Tensor
    means: Tensor
    covs: Tensor
    n: int

    def score(self, path: Path) -> Gaussian | GaussianMixture:
        if len(self.weights) == 1:
            return Gaussian(path, self.means[0], cov=self.covs[0])
        return GaussianMixture(path, self.weights, self.means, self.covs)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws (n, d), in the order and by the square roots of the peers' batches: V sqrt(w) z for a covariance V w V^T."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        if self.covs.dim() == 2:
            return self.means[k] + self.covs[k].sqrt() * z
        values, vectors = torch.linalg.eigh(self.covs)
        return self.means[k] + torch.einsum("nde,ne->nd", vectors[k], z * values[k].sqrt())

    @property
    def std(self) -> float:
        """Root mean variance a dimension."""
        variances = torch.stack([c.diag() if c.dim() == 2 else c for c in self.covs])
        mean = self.weights @ self.means
        return float((self.weights @ (variances + self.means**2) - mean**2).mean().sqrt())


def _gauss64() -> Data:
    """Spectrum 1/k, standard deviation .5 a dimension, a random basis and mean."""
    g = torch.Generator().manual_seed(1)
    values = 1.0 / torch.arange(1, 65, dtype=torch.float64)
    values = 0.25 * values / values.mean()
    q = torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64))[0]
    mean = 0.3 * torch.randn(1, 64, generator=g, dtype=torch.float64)
    return Data(torch.ones(1, dtype=torch.float64), mean, ((q * values) @ q.T)[None], 512)


def _ring2() -> Data:
    """Eight modes of standard deviation .06 on a ring of radius .7, unequal weights."""
    angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    weights = torch.tensor([4.0, 1, 2, 1, 3, 1, 2, 1], dtype=torch.float64)
    means = 0.7 * torch.stack([angle.cos(), angle.sin()], 1)
    return Data(weights / weights.sum(), means, torch.full((8, 2), 0.06**2, dtype=torch.float64), 4096)


def _gmm256() -> Data:
    """Ten random means in 256 dimensions, each with its own permutation of the spectrum 1/k."""
    g = torch.Generator().manual_seed(3)
    means = 0.35 * torch.randn(10, 256, generator=g, dtype=torch.float64)
    spectrum = 1.0 / torch.arange(1, 257, dtype=torch.float64)
    spectrum = 0.12 * spectrum / spectrum.mean()
    variances = torch.stack([spectrum[torch.randperm(256, generator=g)] for _ in range(10)]) + 1e-4
    weights = torch.rand(10, generator=g, dtype=torch.float64) + 0.3
    return Data(weights / weights.sum(), means, variances, 2048)


def _digits64() -> Data:
    """One full-covariance Gaussian a class of scikit-learn's digits, with a floor of .02^2."""
    from sklearn.datasets import load_digits

    label = torch.tensor(load_digits(return_X_y=True)[1])
    x = digits().double().flatten(1)
    groups = [x[label == k] for k in range(10)]
    covs = torch.stack([torch.cov(g.T) + 4e-4 * torch.eye(64, dtype=torch.float64) for g in groups])
    weights = torch.tensor([float(len(g)) for g in groups], dtype=torch.float64)
    return Data(weights / weights.sum(), torch.stack([g.mean(0) for g in groups]), covs, 2048)


DATA = {"gauss64": _gauss64, "ring2": _ring2, "gmm256": _gmm256, "digits64": _digits64}


@cache
def data(name: str) -> Data:
    if name not in DATA:
        raise InputError(f"problem {name!r} is unknown: {nearest(name, DATA)}")
    return DATA[name]()


class Batch(NamedTuple):
    """Starts x_T (n, d) and the exact x/alpha at the last time."""

    x: Tensor
    truth: Tensor


def batch(problem: str, level: str, n: int, seed: int, folder: File | None = None) -> Batch:
    """n starts from the exact marginal and their exact end points, kept in ``folder``."""
    file = None if folder is None else folder / f"truth-{problem}-{level}-{n}-{seed}.pt"
    if file is not None and file.exists():
        return Batch(*torch.load(file, weights_only=True))
    where, what = noise(level), data(problem)
    g = torch.Generator().manual_seed(1000 + seed)
    score, x0 = what.score(where.path), what.draw(n, g)
    k = where.path.knot(where.start)
    x = k.alpha * (x0 + k.sigma / k.alpha * torch.randn(n, x0.shape[1], generator=g, dtype=torch.float64))
    found = Batch(x, exact_end(score, x, where))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        torch.save(tuple(found), temporary)
        temporary.replace(file)
    return found


def exact_end(score: Any, x: Tensor, where: Noise, tolerance: float = 1e-11) -> Tensor:
    """x/alpha at the last time: the closed-form flow, or dy/du = y - x0(y) in u = log(sigma/alpha) by dopri8."""
    s, t = where.path.knots([where.start, where.stop])
    if isinstance(score, Gaussian):
        return score.flow(x, where.start, where.stop) / t.alpha
    from torchdiffeq import odeint

    def field(u: Tensor, y: Tensor) -> Tensor:
        k = where.path.knot_at(-float(u))
        return y - score.predict(k.alpha * y, k.t).x0

    ends = torch.tensor([-s.lam, -t.lam], dtype=torch.float64)
    options = {"step_t": ends[-1:]}
    return torch.as_tensor(
        odeint(field, x / s.alpha, ends, rtol=tolerance, atol=tolerance, method="dopri8", options=options)[-1]
    )


class Errors(NamedTuple):
    """Root mean square over all numbers, and the median over samples of each sample's."""

    rmse: float
    median: float


def errors(problem: str, level: str, given: Batch, solver: Any, grid: Any, nfe: int) -> Errors:
    """The errors of one sampler, in units of the data's standard deviation; infinite where it cannot run at this NFE."""
    where, what = noise(level), data(problem)
    try:
        out = sample(_score(problem, level), x=given.x, solver=solver, nfe=nfe, grid=grid, start=where.start, stop=where.stop)
    except ToolkitError:
        return Errors(math.inf, math.inf)
    if out.nfe > nfe:
        raise ToolkitError(f"{solver} on {grid} used {out.nfe} calls of {nfe}")
    each = (out.x / where.path.knot(where.stop).alpha - given.truth).square().mean(1)
    return Errors(float(each.mean().sqrt()) / what.std, float(each.sqrt().median()) / what.std)


@cache
def _score(problem: str, level: str) -> Any:
    return data(problem).score(noise(level).path)


def candidates(config: Frontier) -> list[tuple[str, str]]:
    """(solver, grid) pairs; sigma/alpha-uniform grids in t only on paths where t is not sigma itself."""
    names: Iterable[str] = config.solvers
    if not names:  # one name a solver
        names = {
            repr(e.solver): n for n, e in SOLVERS.items() if e.deterministic and e.solver.linear and e.theory == "order"
        }.values()
    return [(name, grid) for name in names for grid in config.grids]


class Cell(NamedTuple):
    """The best sampler of one problem, noise and NFE, judged on the second batch."""

    problem: str
    noise: str
    nfe: int
    rmse: float
    median: float
    solver: str
    grid: str


def judge(config: Frontier, level: str, nfe: int) -> list[Cell]:
    """At one noise and NFE: the candidates that did best on the first batch of a problem, judged on its second.

    Problems take turns inside, so that each table is traced once.
    """
    where = noise(level)
    in_t = ("uniform", "quadratic") if isinstance(where.path, EDM) else ()  # there t is sigma itself
    pairs, theirs = ([p for p in given if p[1] not in in_t] for given in (candidates(config), PEER_WINNERS))
    small = {problem: batch(problem, level, config.first, FIRST, config.cache) for problem in config.problems}
    scored = [(pair, {p: errors(p, level, small[p], *pair, nfe) for p in config.problems}) for pair in pairs]
    found = []
    for problem in config.problems:
        large = batch(problem, level, data(problem).n, SECOND, config.cache)
        best = (sorted(scored, key=lambda item: item[1][problem][kind])[: config.keep] for kind in (0, 1))
        chosen = {pair for group in best for pair, _ in group} | (set(theirs) if not config.solvers else set())
        for pair in sorted(chosen):
            found.append(Cell(problem, level, nfe, *errors(problem, level, large, *pair, nfe), *pair))
    return found


def collect(config: Frontier) -> list[Cell]:
    """All cells; those of an earlier run of the same options are read back."""
    file = config.cache / "results.jsonl"
    given = {k: getattr(config, k) for k in ("problems", "solvers", "grids", "keep", "first")}
    key = json.loads(json.dumps(given | {"candidates": candidates(config), "seeds": (FIRST, SECOND)}))
    done: dict[tuple[str, int], list[Cell]] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that a kill cut short
                continue
            if entry["key"] == key:
                done[tuple(entry["at"])] = [Cell(*row) for row in entry["rows"]]
    found: list[Cell] = []
    for level in config.noises:
        for nfe in config.nfes:
            if (level, nfe) not in done:
                done[level, nfe] = judge(config, level, nfe)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a", encoding="utf-8") as f:
                    f.write(json.dumps({"key": key, "at": [level, nfe], "rows": done[level, nfe]}) + "\n")
            for problem in config.problems:
                best = min((c for c in done[level, nfe] if c.problem == problem), key=lambda c: c.rmse)
                print(f"{problem:9}{level:4}{nfe:4}  {best.rmse:9.2e}  {best.solver}:{best.grid}", flush=True)
            found += done[level, nfe]
    return found


def tables(config: Frontier, cells: Sequence[Cell]) -> str:
    """Markdown: our best at most so many NFE beside the best peer's, and the geometric mean, for both errors."""
    peers = json.loads(PEERS.read_text(encoding="utf-8"))
    parts = []
    for kind, title in (("rmse", "RMSE"), ("median", "median over samples")):
        head = f"**{title} / data std, ours (best peer)**\n\n| problem | " + " | ".join(map(str, config.nfes)) + " |"
        lines = [head, "|---" * (len(config.nfes) + 1) + "|"]
        logs = {nfe: [] for nfe in config.nfes}
        for problem in config.problems:
            for level in config.noises:
                row = [f"{problem} {level}"]
                for nfe in config.nfes:
                    here = [c for c in cells if (c.problem, c.noise) == (problem, level) and c.nfe <= nfe]
                    ours = min(getattr(c, kind) for c in here)
                    theirs = peers[kind].get(f"{problem} {level}", {}).get(str(nfe))
                    logs[nfe].append((math.log(ours), math.log(theirs) if theirs else math.nan))
                    mark = "**" if theirs and float(f"{ours:.1e}") <= theirs else ""  # to their printed digits
                    row.append(f"{mark}{ours:.1e}{mark} ({theirs:.1e})" if theirs else f"{ours:.1e}")
                lines.append("| " + " | ".join(row) + " |")
        means = [[math.exp(sum(v) / len(v)) for v in zip(*logs[nfe], strict=True)] for nfe in config.nfes]
        lines.append("| **geometric mean** | " + " | ".join(f"{a:.1e} ({b:.1e})" for a, b in means) + " |")
        parts.append("\n".join(lines))
    header = "| problem | " + " | ".join(map(str, config.nfes)) + " |"
    winners = [f"**Who won (RMSE)**\n\n{header}", "|---" * (len(config.nfes) + 1) + "|"]
    for problem in config.problems:
        for level in config.noises:
            here = [c for c in cells if (c.problem, c.noise) == (problem, level)]
            best = [min((c for c in here if c.nfe <= n), key=lambda c: c.rmse) for n in config.nfes]
            winners.append(f"| {problem} {level} | " + " | ".join(f"{c.solver}:{c.grid}" for c in best) + " |")
    return "\n\n".join([*parts, "\n".join(winners)])


def run(config: Frontier) -> int:
    text = tables(config, collect(config))
    print(text)
    if config.output is not None:
        config.output.write_text(text + "\n", encoding="utf-8")
    return 0
