"""``python -m benchmarks quick``: samplers against each other on three problems, in under a minute, with nothing to download.

Two numbers for each run of a sampler at a budget of network calls.

error      strong error, of samplers of the probability flow: the root mean square, over samples and coordinates, of the
           distance to the flow's exact end point from the same noise. Exact end points come from classical Runge-Kutta in
           sigma in many steps; the same in half the steps says how far to trust them. The slope in log NFE is minus the
           order that is seen at this budget.
sliced_w2  sliced Wasserstein distance to true data, of every sampler: the mean over disjoint blocks of samples, each against
           true draws of its own. Its floor is the same distance between two independent draws of true data: below that
           nothing can be told apart.
"""

from __future__ import annotations

import json
import math
import platform
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, ToolkitError, nearest
from sde.noise import White
from solvers import GRIDS, SOLVERS, sample

from . import metrics
from .files import folder, write
from .metrics import Level
from .problems import PROBLEMS, Problem
from .results import Outcome, Row, slope

#: The samplers compared, each on the grid its authors use.
SAMPLERS: dict[str, str] = {
    "ddim": "karras",
    "edm_heun": "karras",
    "edm_rk4": "karras",
    "dpmpp_2m": "log_snr",
    "unipc_3": "log_snr",
    "ddpm": "karras",
    "dpmpp_2m_sde": "log_snr",
}

FLOOR_PAIRS = 16
TRUTH = 1_000_003  # true draws take seeds from here on, generated ones take the run's own


@dataclass(frozen=True)
class Quick:
    """Compare samplers on three built-in problems: a live table, two pictures, one report. Under a minute, offline."""

    out: File = File("out/quick")
    """Folder of the results; the files of an earlier run in it are replaced."""
    seed: int = 0
    """Start noise and the noise of stochastic samplers. The same seed gives the same numbers."""
    device: str = "cpu"
    """cpu, cuda or cuda:1."""
    nfe: tuple[int, ...] = (4, 6, 8, 12, 16, 32)
    """Budgets: network calls a run may spend."""
    solvers: tuple[str, ...] = tuple(SAMPLERS)
    """Names of SOLVERS."""
    grid: str | None = None
    """One grid of GRIDS for all; default: karras for one-step samplers, log_snr for multistep ones."""
    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Which problems: mixture, digits_exact, digits_network."""
    n: int = 4096
    """Samples a run in the plane."""
    digits: int = 256
    """Samples a run of digits."""
    blocks: int = 4
    """Disjoint blocks of samples for the distance to true data."""
    reference: int = 256
    """Runge-Kutta steps of the exact end points in the plane; digits take a fifth."""
    threads: int = 1
    """Processor threads; one is fastest for networks this small."""


def run(config: Quick) -> int:
    """Measure, show, write four files, say what won."""
    check(config)
    torch.set_num_threads(config.threads)
    from . import pictures, report
    from .screen import Screen

    began, out = time.perf_counter(), folder(config.out)
    screen = Screen(config)
    screen.hello((out / "report.html").exists())
    partial = out / "results.jsonl.partial"
    outcomes: list[Outcome] = []
    try:
        with open(partial, "w", encoding="utf-8") as lines:
            for name in config.problems:
                with screen.problem(PROBLEMS[name]) as show:
                    for outcome in measure(config, name, PROBLEMS[name]):
                        if outcome.rows:
                            lines.write(json.dumps(asdict(outcome.rows[-1]), allow_nan=False) + "\n")
                            lines.flush()
                        else:
                            outcomes.append(outcome)
                        show(outcome)
        partial.replace(out / "results.jsonl")
    except OSError as error:
        raise InputError(f"--out {config.out}: cannot be written ({error.strerror})") from error
    images = pictures.all_pictures(outcomes, config.nfe)
    (out / "samples.png").unlink(missing_ok=True)  # an earlier run may have had one where this has none
    for name, image in images.items():
        write(out / name, image.light)
    write(out / "report.html", report.page(outcomes, config, images, time.perf_counter() - began))
    screen.goodbye(outcomes, [*images, "results.jsonl"], time.perf_counter() - began)
    return 0


def check(config: Quick) -> None:
    """Everything that can be wrong with the options, before anything is computed."""
    for label, values, known in (("--solvers", config.solvers, SOLVERS), ("--problems", config.problems, PROBLEMS)):
        for name in values:
            if name not in known:
                raise InputError(f"{label} {name!r} is unknown: {nearest(name, known)}")
        if not values or len(set(values)) < len(values):
            raise InputError(f"{label}: give at least one name, each once")
    if config.grid is not None and config.grid not in GRIDS:
        raise InputError(f"--grid {config.grid!r} is unknown: {nearest(config.grid, GRIDS)}")
    if not config.nfe or min(config.nfe) < 1 or list(config.nfe) != sorted(set(config.nfe)):
        raise InputError(f"--nfe {' '.join(map(str, config.nfe))}: give increasing numbers of calls, such as --nfe 4 8 16")
    for label in ("threads", "reference"):
        if getattr(config, label) < 1:
            raise InputError(f"--{label} {getattr(config, label)}: must be >= 1")
    if config.blocks < 3:
        raise InputError(f"--blocks {config.blocks}: a spread wants at least 3 blocks")
    for label in ("n", "digits"):
        value = getattr(config, label)
        if value < 2 * config.blocks or value % config.blocks:
            raise InputError(f"--{label} {value}: give a multiple of --blocks {config.blocks}, at least {2 * config.blocks}")
    if not 0 <= config.seed < TRUTH:
        raise InputError(f"--seed {config.seed}: must be in [0, {TRUTH})")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise InputError(f"--device {config.device!r} is unknown: give cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(
            f"--device {config.device}: torch sees {torch.cuda.device_count()} CUDA devices on this machine; use cpu"
        )


def measure(config: Quick, name: str, problem: Problem) -> Iterator[Outcome]:
    """The problem's outcome, handed over again after each run, with one more row."""
    device = torch.device(config.device)
    flat = len(problem.shape) == 1
    n, steps = (config.n, config.reference) if flat else (config.digits, max(2, config.reference // 5))
    score = problem.score(device)
    start = score.path.prior_std(score.path.T) * White(config.seed).initial((n, *problem.shape), torch.float64, device)
    exact = sample(score, x=start, solver="edm_rk4", steps=steps)
    half = sample(score, x=start, solver="edm_rk4", steps=max(1, steps // 2))

    size, d = n // config.blocks, math.prod(problem.shape)
    along = metrics.directions(d)
    seeds = iter(range(TRUTH + config.seed * 1000, TRUTH + config.seed * 1000 + 1000))

    def true_draw() -> Tensor:
        return problem.truth(size, next(seeds))

    floor = metrics.level([metrics.sliced_w2(true_draw(), true_draw(), along) for _ in range(FLOOR_PAIRS)])
    truth = [true_draw() for _ in range(config.blocks)]

    def distance(x: Tensor) -> Level:
        return metrics.level([metrics.sliced_w2(a, b, along) for a, b in zip(x.cpu().split(size), truth, strict=True)])

    outcome = Outcome(name, problem.title, problem.note, floor, rms(half.x - exact.x), exact.nfe, distance(exact.x))
    yield outcome
    facts = {"device": device_name(device), "versions": versions()}
    for solver in config.solvers:
        entry = SOLVERS[solver]
        on_flow = entry.deterministic
        grid = config.grid or SAMPLERS.get(solver, "log_snr")
        before: Row | None = None
        for budget in config.nfe:
            common: dict[str, Any] = {
                "problem": name,
                "solver": solver,
                "grid": grid,
                "budget": budget,
                "reference_error": outcome.reference_error,
                "floor": floor.mean,
                "floor_sd": floor.sd,
                "seed": config.seed,
                "n": n,
                "blocks": config.blocks,
                **facts,
            }
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    out = sample(score, x=start, solver=solver, nfe=budget, grid=grid, seed=config.seed)
                error = rms(out.x - exact.x) if on_flow else None
                w2 = distance(out.x)
                row = Row(
                    nfe=out.nfe,
                    steps=len(out.times) - 1,
                    error=error,
                    slope=slope(before, out.nfe, error, outcome.reference_error),
                    sliced_w2=w2.mean,
                    sliced_w2_sd=w2.sd,
                    within_floor=metrics.within(w2, floor),
                    seconds=round(out.seconds, 6),
                    note="; ".join(str(w.message) for w in caught),
                    **common,
                )
                if not flat:
                    outcome.kept[solver, budget] = out.x[:100].float().cpu()
                before = row if before is None or before.nfe != row.nfe else before
            except ToolkitError as failure:  # this budget does not buy a step, or the run blew up: a row that says so
                nothing = dict.fromkeys(("nfe", "steps", "error", "slope", "sliced_w2", "sliced_w2_sd", "seconds"))
                row = Row(within_floor=False, note=str(failure), **nothing, **common)
            outcome.rows.append(row)
            yield outcome


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("numpy", "score-solvers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "from source"
    return found
