"""``python -m benchmarks quick``: samplers against each other on three problems, in under a minute, with nothing to download.

Two numbers for each run of a sampler at a budget of network calls, both in units of the data's deviation:

strong_error  of samplers of the probability flow: the root mean square distance to the flow's exact end point from the same
              noise. End points come from classical Runge-Kutta in many steps; the same in half the steps says how far to trust
              them. The slope in log NFE is minus the order that is seen at this budget.
sliced_w2     sliced Wasserstein distance to true data, of every sampler. Its floor is what true draws get: below that nothing
              can be told apart.

They are the metrics of ``run``, and rows are written as there; what is left out is its store: a run of a minute is made again.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError, ToolkitError, nearest
from solvers import GRIDS, SOLVERS

from . import files, metrics, provenance
from .endpoints import fine
from .lines import Line, Meter, resolve_line
from .metrics import Block, Metric
from .problems import Problem, get
from .results import DISTANCE, ERROR, Outcome
from .sweep import SCHEMA, digest

#: The samplers compared, each on the grid its authors use.
SAMPLERS: dict[str, str] = {
    "ddim": "karras",
    "edm_heun": "karras",
    "dpmpp_2m": "log_snr",
    "unipc_3": "log_snr",
    "ddpm": "karras",
    "dpmpp_2m_sde": "log_snr",
}

PROBLEMS = ("mixture", "digits_exact", "digits_network")

SEEDS = 1 << 32
PROBE = ".writable"
SHOWN = 36  # samples of a sheet


@dataclass(frozen=True)
class Quick:
    """Compare samplers on three built-in problems: a live table, two pictures, one report. Under a minute, offline."""

    out: File = File("out/quick")
    """Folder of the results; the files of an earlier run in it are replaced."""
    seed: int = 0
    """Start noise and the noise of stochastic samplers: block b has seed + b. The same seed gives the same numbers."""
    device: str = "cpu"
    """cpu, cuda or cuda:1."""
    nfe: tuple[int, ...] = (4, 6, 8, 12, 16, 32)
    """Budgets: network calls a run may spend."""
    solvers: tuple[str, ...] = tuple(SAMPLERS)
    """Names of SOLVERS."""
    grid: str | None = None
    """One grid of GRIDS for all; default: karras for one-step samplers, log_snr for multistep ones."""
    problems: tuple[str, ...] = PROBLEMS
    """Built-in problems: any of benchmarks.problems, with a noise where wanted (ring2:vp)."""
    n: int = 4096
    """Samples a run in the plane."""
    digits: int = 192
    """Samples a run of digits."""
    blocks: int = 4
    """Disjoint blocks of samples, each with a seed of its own: intervals come from them."""
    reference: int = 48
    """Runge-Kutta steps of the exact end points; the table says how far those are to be trusted."""
    threads: int = 1
    """Processor threads; one is fastest for networks this small."""


def run(config: Quick) -> int:
    """Measure, show, write the files, say what won."""
    check(config)
    torch.set_num_threads(config.threads)
    from . import pictures
    from .reports import PAGE, SHEETS, packed, page
    from .screen import Screen

    began, out = time.perf_counter(), files.folder(config.out)
    screen = Screen(config)
    screen.hello(files.exists(out / PAGE))
    files.write(out / PROBE, "written")  # a folder that cannot be written to is told of now, and not in a minute
    files.remove(out / PROBE)
    outcomes = []
    for name in config.problems:
        with screen.problem(get(name)) as show:
            outcomes.append(measure(config, name, get(name), show))
    rows = [{k: v for k, v in row.items() if k != "cost"} for o in outcomes for row in o.rows]
    images = pictures.all_pictures(outcomes, config.nfe)
    files.write(out / "results.jsonl", b"".join(map(files.seal, rows)))
    files.remove(out / "samples.png")  # an earlier run may have had one where this has none
    for name, image in images.items():
        files.write(out / name, image)
    shown = study(outcomes, config)
    files.write(out / SHEETS, packed(shown.sheets))
    files.write(out / PAGE, page(shown))
    screen.goodbye(outcomes, [*images, "results.jsonl"], time.perf_counter() - began)
    return 0


def check(config: Quick) -> None:
    """Everything that can be wrong with the options, before anything is computed."""
    for name in config.solvers:
        if name not in SOLVERS:
            raise InputError(f"--solvers {name!r} is unknown: {nearest(name, SOLVERS)}")
    for name in config.problems:
        get(name)
    for label, values in (("--solvers", config.solvers), ("--problems", config.problems)):
        if not values or len(set(values)) < len(values):
            raise InputError(f"{label}: give at least one name, each once")
    if config.grid is not None and config.grid not in GRIDS:
        raise InputError(f"--grid {config.grid!r} is unknown: {nearest(config.grid, GRIDS)}")
    if not config.nfe or min(config.nfe) < 1 or list(config.nfe) != sorted(set(config.nfe)):
        raise InputError(f"--nfe {' '.join(map(str, config.nfe))}: give increasing numbers of calls, such as --nfe 4 8 16")
    if config.threads < 1:
        raise InputError(f"--threads {config.threads}: must be >= 1")
    if config.reference < 4:
        raise InputError(f"--reference {config.reference}: must be >= 4, for half of that says how far to trust it")
    if config.blocks < 3:
        raise InputError(f"--blocks {config.blocks}: a spread wants at least 3 blocks")
    for label in ("n", "digits"):
        value = getattr(config, label)
        if value < 2 * config.blocks or value % config.blocks:
            raise InputError(f"--{label} {value}: give a multiple of --blocks {config.blocks}, at least {2 * config.blocks}")
    if not 0 <= config.seed < SEEDS:
        raise InputError(f"--seed {config.seed}: must be in [0, {SEEDS})")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise InputError(f"--device {config.device!r} is unknown: give cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(
            f"--device {config.device}: torch sees {torch.cuda.device_count()} CUDA devices on this machine; use cpu"
        )


# --- measuring ----------------------------------------------------------------------------------------------------------------


def measure(config: Quick, name: str, problem: Problem, show: Callable[[Outcome], None] = lambda outcome: None) -> Outcome:
    """Everything on one problem; ``show`` sees it grow, after each run by its rows."""
    bench = Bench(config, name, problem)
    outcome = bench.outcome
    show(outcome)
    for solver in config.solvers:
        line, grid = resolve_line(solver), config.grid or SAMPLERS.get(solver, "log_snr")
        for budget in config.nfe:
            made = bench.sample(line, grid, budget)
            if made.blocks and len(problem.shape) > 1:
                outcome.kept[solver, budget] = made.blocks[0][:SHOWN].float().cpu()
            outcome.rows += bench.rows(line, grid, budget, made)
            show(outcome)
    return outcome


@dataclass
class Made:
    """The samples of a run, block by block, and what they took. Without blocks: why there are none."""

    blocks: list[Tensor] = field(default_factory=list)
    digest: str | None = None
    nfe: int | None = None
    net_evals: int | None = None
    steps: int | None = None
    note: str = ""
    cost: dict[str, Any] | None = None


class Bench:
    """A problem with its start noise, the exact end points from it, and its floors."""

    def __init__(self, config: Quick, name: str, problem: Problem) -> None:
        self.config, self.problem = config, problem
        n, steps = config.n if len(problem.shape) == 1 else config.digits, config.reference
        self.device = torch.device(config.device)
        # an exact score of many points takes a matrix product where float64 allows it, and differences in float32
        self.dtype = torch.float64 if problem.network is None else torch.float32
        self.meter = Meter(problem.score(self.device, self.dtype), self.device)
        self.seeds = [config.seed + b for b in range(config.blocks)]
        self.m = n // config.blocks
        self.starts = [problem.starts(seed, range(self.m), dtype=self.dtype, device=self.device) for seed in self.seeds]
        self.ends = [fine(self.meter, x, problem.start, problem.stop, steps) for x in self.starts]
        calls = self.meter.nfe // config.blocks - 4 * (steps // 2)  # half the steps only say how far to trust the others
        self.metrics = {text: metrics.metric(text) for text in (ERROR, DISTANCE)}
        exact = self.blocks([end.x for end in self.ends])
        floors = {text: metrics.floor(metric, problem, exact) for text, metric in self.metrics.items()}
        known = {text: floor for text, floor in floors.items() if floor is not None}
        distance = metrics.measure(self.metrics[DISTANCE], problem, exact).value
        self.outcome = Outcome(name, problem.title, problem.note, known, (calls, distance))

    def blocks(self, samples: list[Tensor]) -> list[Block]:
        """What metrics look at."""
        found = []
        for seed, x, start, end in zip(self.seeds, samples, self.starts, self.ends, strict=True):
            host = x.cpu()
            summary = metrics.summarise([self.metrics[ERROR]], self.problem, host, start.cpu(), range(self.m), end)
            found.append(Block(self.m, seed, summary, host))
        return found

    def sample(self, line: Line, grid: str, budget: int) -> Made:
        made, hashed, seconds, inside = Made(), hashlib.sha256(), 0.0, 0.0
        problem, notes = self.problem, list[str]()
        given: dict[str, Any] = {"nfe": budget, "grid": grid, "eta": None, "start": problem.start, "stop": problem.stop}
        try:
            for seed, start in zip(self.seeds, self.starts, strict=True):
                self.meter.reset()
                began = time.perf_counter()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    out = line.run(self.meter, start, seed=seed, indices=range(self.m), **given)
                host = out.x.cpu()  # the device is waited for
                seconds += time.perf_counter() - began
                inside += self.meter.device_seconds or self.meter.seconds
                made.blocks.append(host)
                hashed.update(host.contiguous().numpy().tobytes())
                notes += [str(w.message) for w in caught]
                made.nfe, made.net_evals, made.steps = self.meter.nfe, self.meter.net_evals, out.steps
        except ToolkitError as failure:  # this budget does not buy a step, or the run blew up: a row that says so
            return Made(note=str(failure))
        calls = len(self.seeds) * self.meter.nfe
        made.cost = {"calls": calls, "seconds": seconds, "samples": self.m * len(self.seeds)}
        for key, value in (("seconds_per_call", seconds / calls), ("overhead", seconds / inside - 1.0)):
            made.cost[key] = {"median": value, "low": value, "high": value}
        made.digest, made.note = hashed.hexdigest(), "; ".join(dict.fromkeys(notes))
        return made

    def rows(self, line: Line, grid: str, budget: int, made: Made) -> list[dict[str, Any]]:
        """A row a metric, as ``run`` writes them."""
        blocks = self.blocks(made.blocks) if made.blocks else []
        return [self._row(line, grid, budget, made, text, metric, blocks) for text, metric in self.metrics.items()]

    def _row(
        self, line: Line, grid: str, budget: int, made: Made, text: str, metric: Metric, blocks: list[Block]
    ) -> dict[str, Any]:
        problem, floor = self.problem, self.outcome.floors.get(text)
        note = made.note
        if made.blocks and metric.flow_only and not line.flow(None):
            note, blocks = f"{text} is of samplers of the probability flow", []
        found = metrics.measure(metric, problem, blocks) if blocks else None
        inside = None if found is None or floor is None else metrics.within(found, floor)
        return {
            "model": self.outcome.name,
            "solver": line.name,
            "grid": grid,
            "nfe": made.nfe,
            "metric": text,
            "value": None if found is None else found.value,
            "interval": None if found is None else [found.low, found.high],
            "floor": None if floor is None else floor.to_dict(),
            "within_floor": None if inside is None else bool(inside),
            "n": self.m * len(self.seeds),
            "asked": self.m * len(self.seeds),
            "seeds": self.seeds,
            "digest": made.digest,
            "budget": budget,
            "steps": made.steps,
            "net_evals": made.net_evals,
            "values": None if found is None else list(found.values),
            "blocks": len(self.seeds),
            "unit": metric.unit,
            "lower_is_better": metric.lower_is_better,
            "two_sided": metric.two_sided,
            "path": repr(problem.path),
            "start_law": "prior",
            "start": problem.start,
            "stop": problem.stop,
            "eta": None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": provenance.device_name(self.device),
            "versions": provenance.versions(),
            "git": provenance.commit(),
            "config": digest({**asdict(self.config), "out": ""})[:16],
            "weights": "",
            "schema": SCHEMA,
            "note": note,
            "cost": made.cost,
        }


def study(outcomes: list[Outcome], config: Quick) -> Any:
    """What the report is told: the same page as of ``run``'s folders."""
    from .reports import Study
    from .reports.sheets import sheet
    from .reports.study import facts

    rows = [row for o in outcomes for row in o.rows]
    sheets = []
    for o in (o for o in outcomes if o.kept):
        problem, size = get(o.name), len(next(iter(o.kept.values())))
        sheets.append(sheet(problem, o.name, "true draws", None, problem.truth(0, range(size)), size))
        for solver in o.ranked(config.nfe[len(config.nfe) // 2], DISTANCE):
            runs = [(budget, o.kept[solver, budget]) for budget in config.nfe if (solver, budget) in o.kept]
            sheets += [sheet(problem, o.name, solver, budget, x, size) for budget, x in runs]
    options = {"n": "samples a run in the plane", "digits": "samples a run of digits", "blocks": "blocks", "seed": "seed"}
    return Study(
        title="Samplers compared",
        rows=rows,
        told={o.name: (o.title, o.note) for o in outcomes},
        sheets=sheets,
        facts=[*((words, str(getattr(config, k))) for k, words in options.items()), *facts({}, rows)],
        next=NEXT,
        seconds=sum(r["cost"]["seconds"] for r in rows if r["cost"] and r["metric"] == DISTANCE),
    )


NEXT = (
    "python -m benchmarks run --model ring2 --solver ddim dpmpp_2m unipc_3 --nfe 5 10 20 -n 4000 --out out/ring2",
    "python -m benchmarks report out/ring2",
    "python -m benchmarks quick --solvers ddim heun unipc_2 --nfe 10 20 40",
)
