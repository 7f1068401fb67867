"""``python -m benchmarks peers``: our samplers beside those of every library that is installed, on the same work.

    error     four problems with known end points, two noises: root mean square error (and median over samples) / data std
    law       stochastic samplers on Gaussian data: the exact distance of their output's law from the truth
    overhead  microseconds a step beyond the network, and memory, on a network of one multiplication
    cost      calls, wall time, network time and what is left, on the shipped network of 8x8 digits

Published figures of the first (391 configurations, ``benchmarks/peers.json``) stand beside what is measured here; libraries
that are not there are named, with the command that installs them. Candidates are few by default: the winners of that comparison
and what users know. ``--every`` runs all deterministic samplers of all libraries instead.
"""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path as File
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from sde.errors import InputError, ToolkitError, nearest
from solvers import GRIDS

from . import costs, files, peer_laws, peers, problems
from .endpoints import rms
from .lines import Meter, resolve_line
from .peers import winners

PUBLISHED = File(__file__).parent / "peers.json"
CELLS = tuple(winners.PEER_WINNERS)

#: Ours beside them.
OURS = tuple(
    (name, grid)
    for name in ("ddim", "dpmpp_2m", "dpmpp_3m", "deis_rho_3", "deis_lam_4", "ipndm_3", "unipc_3")
    for grid in ("log_snr", "karras")
)

#: (line, grid) whose overhead is measured: ours, then each library's best known.
LOOPS = (
    ("ddim", "log_snr"),
    ("dpmpp_2m", "log_snr"),
    ("unipc_2", "log_snr"),
    ("deis_rho_3", "log_snr"),
    ("heun", "log_snr"),
    ("rk4", "uniform"),
    ("euler_maruyama", "uniform"),
    ("dpmpp_2m_sde", "log_snr"),
    ("k_diffusion/euler", "log_snr"),
    ("k_diffusion/dpmpp_2m", "log_snr"),
    ("k_diffusion/heun", "log_snr"),
    ("k_diffusion/lms", "log_snr"),
    ("k_diffusion/dpmpp_2m_sde:noise=white", "log_snr"),
    ("k_diffusion/dpmpp_2m_sde", "log_snr"),
    ("diffusers/DDIM", "uniform"),
    ("diffusers/DPMSolverMultistep2", "log_snr"),
    ("diffusers/UniPC2", "log_snr"),
    ("diffusers/DEIS3", "log_snr"),
    ("diffusers/DPMSolverMultistep2:algorithm_type=sde-dpmsolver++", "log_snr"),
    ("azula/DDIM", "log_snr"),
    ("azula/xEAB3", "log_snr"),
    ("azula/zAB3", "log_snr"),
    ("azula/Ito", "log_snr"),
    ("flow_matching/euler", "log_snr"),
    ("torchdiffeq/euler", "uniform"),
    ("torchdiffeq/rk4", "uniform"),
    ("torchsde/euler", "uniform"),
    ("dpm_solver/multistep2", "log_snr"),
    ("uni_pc/bh2_2", "log_snr"),
    ("diff_sampler/ipndm3", "log_snr"),
    ("edm/edm", "karras"),
)


@dataclass(frozen=True)
class Peers:
    """Our samplers beside other libraries': errors, overhead, cost. Minutes on a CPU."""

    tables: tuple[Literal["error", "law", "overhead", "cost"], ...] = ("error", "law", "overhead", "cost")
    """Which of the four."""
    problems: tuple[str, ...] = CELLS
    """Of the error table and, where they are Gaussian, of the law table: problem:noise."""
    nfe: tuple[int, ...] = (5, 10, 20, 50)
    """Budgets of the error table and the law table."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 256
    """Samples a problem. On mixtures a few, near a border between modes, dominate: read the median, or give thousands."""
    library: tuple[str, ...] = ()
    """Only these libraries (default: all that are installed)."""
    every: bool = False
    """All deterministic samplers of the libraries on all their grids, instead of the winners and the well known."""
    shapes: tuple[str, ...] = ("4096x2", "16x3x32x32")
    """States of the overhead table."""
    steps: int = 20
    """Steps of the overhead table."""
    seconds: float = 20.0
    """To measure for, a shape of the overhead table and the cost table each."""
    output: File | None = None
    """Write the tables here as Markdown too, and the numbers as JSON beside them."""


def run(config: Peers) -> int:
    """Measure, print, write. 0 done."""
    _check(config)
    absent = [name for name in peers.LIBRARIES if _wanted(config, name) and peers.library(name).missing()]
    parts, numbers = [], {}
    for name in config.tables:
        text, rows = TABLES[name](config, absent)
        print(text + "\n", flush=True)
        parts.append(text)
        numbers[name] = rows
    missing = "\n".join(f"not here: {peers.library(name).missing()}" for name in absent)
    if missing:
        print(missing)
        parts.append(missing)
    if config.output is not None:
        files.write(config.output, ("\n\n".join(parts) + "\n").encode(), "peers")
        files.write(config.output.with_suffix(".json"), json.dumps(numbers, indent=1, default=str).encode(), "peers")
    return 0


def _check(config: Peers) -> None:
    for name in config.library:
        peers.library(name)
    for name in config.problems:
        if name not in CELLS:
            raise InputError(f"--problems {name!r} is unknown: {nearest(name, CELLS)}")
    if min(config.nfe, default=0) < 1 or config.n < 2 or config.steps < 1 or config.seconds <= 0.0:
        raise InputError("--nfe and --steps must be >= 1, -n >= 2 and --seconds > 0")
    for text in config.shapes:
        shape(text)


def shape(text: str) -> tuple[int, ...]:
    """4096x2 as (4096, 2)."""
    words = text.split("x")
    if len(words) < 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"--shapes {text!r}: give the batch and the sample, such as 16x3x32x32")
    return tuple(map(int, words))


def _wanted(config: Peers, library: str) -> bool:
    return not config.library or library in {name.replace("-", "_") for name in config.library}


def candidates(config: Peers, absent: Sequence[str]) -> list[tuple[str, str]]:
    """(line, grid) of the error table: ours, then those of the libraries that are here."""
    found = list(OURS)
    if config.every:
        found += every(config, absent)
    else:
        found += [(w.line, w.grid) for w in winners.lines()]
    return [pair for pair in found if _here(config, pair[0], absent)]


def _here(config: Peers, line: str, absent: Sequence[str]) -> bool:
    library = line.partition("/")[0]
    return "/" not in line or (library not in absent and _wanted(config, library))


def every(config: Peers, absent: Sequence[str]) -> Iterator[tuple[str, str]]:
    """All deterministic samplers of fixed steps of the libraries, on the grids that the comparison had."""
    for name in peers.LIBRARIES:
        if name in absent or not _wanted(config, name):
            continue
        for short, sampler in peers.library(name).samplers.items():
            if sampler.adaptive or sampler.noisy(sampler.options):
                continue
            for grid in sampler.grids or ("log_snr", "karras", "uniform"):
                if grid in GRIDS:
                    yield f"{name}/{short}", grid


# --- errors -------------------------------------------------------------------------------------------------------------------


class Error(NamedTuple):
    """Of a line in a cell: root mean square over all numbers, and median over samples, of x / alpha, in units of the data's
    standard deviation; ``nfe`` is what it spent.
    """

    cell: str
    budget: int
    line: str
    grid: str
    nfe: int
    rmse: float
    median: float


def errors(
    cell: str, pairs: Sequence[tuple[str, str]], budgets: Sequence[int], n: int, refused: set[str], seed: int = 0
) -> Iterator[Error]:
    """Every line at every budget that buys a step of it, from exact marginals to where it stops, float64; what the others said
    goes into ``refused``.
    """
    problem = problems.get(cell)
    x = problem.starts(seed, range(n), "marginal")
    meter = Meter(problem.score(), torch.device("cpu"))
    alpha, data = problem.path.knot(problem.stop).alpha, problem.data
    unit = alpha * (1.0 if data is None else float(data.cov.diag().mean().sqrt()))

    @functools.cache
    def truth(to_zero: bool) -> Tensor:
        return problem.end(x, to_zero).x

    for text, grid in pairs:
        line = resolve_line(text)
        end = truth(line.to_zero)
        for budget in budgets:
            meter.reset()
            try:
                made = line.run(
                    meter,
                    x,
                    nfe=budget,
                    grid=grid,
                    seed=seed,
                    indices=range(n),
                    eta=None,
                    start=problem.start,
                    stop=problem.stop,
                )
            except ToolkitError as error:  # this budget does not buy a step, or the sampler is not defined there
                refused.add(f"{text} {grid}: {error}")
                continue
            off = rms(made.x - end) / unit
            yield Error(cell, budget, text, grid, meter.nfe, float(off.square().mean().sqrt()), float(off.median()))


def error_table(config: Peers, absent: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """One configuration everywhere, the best of each library, and the frontier of each problem beside the published one."""
    pairs = candidates(config, absent)
    found, refused = [], set()
    for cell in config.problems:
        found += errors(cell, pairs, config.nfe, config.n, refused)
        print(f"{cell}: {len(pairs)} lines measured", flush=True)
    frontiers = [_frontier(config, found, kind) for kind in ("rmse", "median")]
    tables = [_everywhere(config, found), _libraries(config, found), *frontiers, *_refused(refused)]
    return "\n\n".join(tables), [e._asdict() for e in found]


def _refused(said: set[str]) -> list[str]:
    """What could not be measured, and why, in no or one paragraph."""
    return ["\n".join(f"- not measured: {files.show(line)}" for line in sorted(said))] if said else []


def law_table(config: Peers, absent: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """Stochastic samplers on Gaussian data (``peer_laws``)."""
    pairs = [pair for pair in peer_laws.LINES if _here(config, pair[0], absent)]
    refused: set[str] = set()
    found = [
        law for cell in peer_laws.CELLS if cell in config.problems for law in peer_laws.laws(cell, pairs, config.nfe, refused)
    ]
    return "\n\n".join([peer_laws.table(found, config.nfe), *_refused(refused)]), [law._asdict() for law in found]


def _geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _head(first: str, columns: Sequence[Any]) -> str:
    return f"| {first} | " + " | ".join(map(str, columns)) + " |\n" + "|---" * (len(columns) + 1) + "|"


def _everywhere(config: Peers, found: Sequence[Error]) -> str:
    rows = []
    for line, grid in dict.fromkeys((e.line, e.grid) for e in found):
        cells = []
        for nfe in config.nfe:
            here = [e for e in found if (e.line, e.grid, e.budget) == (line, grid, nfe)]
            whole = len(here) == len(config.problems)
            cells.append(f"{_geomean([e.rmse for e in here]):.1e} ({_geomean([e.median for e in here]):.1e})" if whole else "-")
        rows.append(f"| {line} {grid} | " + " | ".join(cells) + " |")
    title = (
        f"**One configuration everywhere: geometric mean of {len(config.problems)} problems, RMSE (median), n = {config.n}**"
    )
    return "\n".join([title, "", _head("sampler", config.nfe), *rows])


def _libraries(config: Peers, found: Sequence[Error]) -> str:
    rows = []
    for name in dict.fromkeys(library_of(e.line) for e in found):
        cells = []
        for nfe in config.nfe:
            best = [
                min((e.rmse for e in found if (e.cell, library_of(e.line)) == (cell, name) and e.nfe <= nfe), default=None)
                for cell in config.problems
            ]
            whole = [b for b in best if b is not None]
            cells.append(f"{_geomean(whole):.1e}" if len(whole) == len(best) else "-")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(
        ["**Best of each library, in hindsight: geometric mean of RMSE**", "", _head("library", config.nfe), *rows]
    )


def library_of(line: str) -> str:
    return line.partition("/")[0] if "/" in line else "ours"


def _frontier(config: Peers, found: Sequence[Error], kind: str) -> str:
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))[kind]
    value = operator.attrgetter(kind)
    rows = []
    for cell in config.problems:
        cells = []
        for nfe in config.nfe:
            ours, theirs = (
                min((e for e in found if e.cell == cell and e.nfe <= nfe and ("/" in e.line) == peer), key=value, default=None)
                for peer in (False, True)
            )
            known = published.get(cell.replace(":", " "), {}).get(str(nfe))
            best = "-" if theirs is None else f"{value(theirs):.1e} {theirs.line} {theirs.grid}"
            mine = "-" if ours is None else f"{value(ours):.1e}"
            cells.append(f"{mine}; {best}" + (f" [{known:.1e}]" if known else ""))
        rows.append(f"| {cell} | " + " | ".join(cells) + " |")
    what = {"rmse": "RMSE", "median": "median error"}[kind]
    title = f"**Best {what} at most so many calls: ours; best library here, and which [best of 391, published]**"
    return "\n".join([title, "", _head("problem", config.nfe), *rows])


# --- overhead and cost --------------------------------------------------------------------------------------------------------


def overhead_table(config: Peers, absent: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """Microseconds a step beyond the network, median [quartiles], in ratio to our ddim, and memory in units of the state."""
    pairs = [pair for pair in LOOPS if _here(config, pair[0], absent)]
    columns, rows = [], []
    for text in config.shapes:
        found = costs.overhead(pairs, shape(text), config.steps, config.seconds)
        rows += [{"shape": text, **asdict(row)} for row in found]
        columns.append(found)
    lines = []
    for i, (line, grid) in enumerate(pairs):
        cells = [micros(found[i], found[0].micros.median) for found in columns]
        lines.append(f"| {line} {grid} | " + " | ".join(cells) + " |")
    title = (
        f"**Overhead, {config.steps} steps: us a step beyond the network, median [quartiles], x our ddim; memory in states**"
    )
    return "\n".join([title, "", _head("loop", config.shapes), *lines]), rows


def micros(row: costs.Overhead, unit: float) -> str:
    ratio = f"{row.micros.median / unit:.1f}x" if unit > 0.0 else "-"
    return f"{row.micros.median:.0f} [{row.micros.low:.0f}, {row.micros.high:.0f}] {ratio}; {row.memory:.0f}"


def cost_table(config: Peers, absent: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """On the shipped network of digits: milliseconds a run."""
    problem = problems.get("digits_network")
    device = torch.device("cpu")
    x = problem.starts(0, range(min(config.n, 64)), dtype=torch.float32)
    pairs = [pair for pair in LOOPS if _here(config, pair[0], absent) and "edm/" not in pair[0]]
    nfe = max(config.nfe)
    score = problem.score(device, torch.float32)
    found = costs.on_model(score, pairs, x, nfe, problem.start, problem.stop, config.seconds)
    return cost_lines(found, f"digits_network, {len(x)} samples, at most {nfe} calls"), [asdict(row) for row in found]


def cost_lines(found: Sequence[costs.Cost], title: str) -> str:
    """Costs as Markdown: milliseconds, medians with quartiles."""
    rows = []
    for row in found:
        times = [_milliseconds(s) for s in (row.wall, row.network, row.overhead)]
        device = "-" if row.device is None else _milliseconds(row.device)
        rows.append(
            f"| {row.line} {row.grid} | {row.nfe} | {row.net_evals} | {' | '.join(times)} | {device} | {row.memory:.0f} |"
        )
    columns = ("NFE", "net_evals", "wall ms", "network ms", "the rest ms", "device ms", "memory, states")
    return "\n".join([f"**Cost on {title}: median [quartiles]**", "", _head("sampler", columns), *rows])


def _milliseconds(spread: costs.Spread) -> str:
    return f"{1e3 * spread.median:.1f} [{1e3 * spread.low:.1f}, {1e3 * spread.high:.1f}]"


TABLES = {"error": error_table, "law": law_table, "overhead": overhead_table, "cost": cost_table}
