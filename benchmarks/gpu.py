"""``python -m benchmarks gpu --out DIR``: everything that wants a GPU, in one command and one folder.

    machine.json   versions, device, libraries
    quality/       a sweep: NFE against quality, our samplers and other libraries' (python -m benchmarks report DIR/quality)
    overhead.md    microseconds a step beyond the network, and memory, of every loop; overhead.json: the numbers
    cost.md        calls, wall time, device time by events, memory, on a model; cost.json
    graph.md       a plan as one CUDA graph beside the same plan without; graph.json
    summary.md     all of it in one page

What is there of the same options is not made again, so a borrowed machine that goes away costs one part at the most.
``--device cpu`` runs the same code on a processor, small, without graphs: a rehearsal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path as File
from typing import Any, Literal

import torch

from sde.errors import InputError, ToolkitError
from solvers import trace
from solvers.grids import make_grid

from . import costs, files, graphs, peers, provenance, reading
from .models import load
from .peer_tables import LOOPS, cost_lines, micros, shape
from .sweep import Sweep

#: Lines of the quality sweep beside ours, where their library is here.
LINES = (
    "k_diffusion/dpmpp_2m:end=stop",
    "diffusers/DPMSolverMultistep2",
    "diffusers/UniPC3:final_sigmas_type=sigma_min",
    "azula/zEAB3",
    "flow_matching/midpoint",
    "torchdiffeq/rk4",
)
GRAPHED = ("ddim", "dpmpp_2m", "unipc_3", "heun")


@dataclass(frozen=True)
class Gpu:
    """NFE against quality, overhead against other libraries, and CUDA graphs, on one device into one folder."""

    out: File
    """Folder of the results."""
    device: str = "cuda"
    """cuda, cuda:1; or cpu, for a small rehearsal of the same code."""
    model: tuple[str, ...] = ()
    """As for run: built-in problems, or module:function (default: digits_network, and gmm256:vp, which is no network that could
    be cast or compiled, where neither is asked for). Costs and graphs are of the first."""
    solver: tuple[str, ...] = ("ddim", "dpmpp_2m", "deis_rho_3", "unipc_3", "heun")
    """Of the quality sweep, beside other libraries' lines."""
    nfe: tuple[int, ...] = ()
    """Budgets (default: 5 10 20 50; on a processor 5 10)."""
    n: int = 0
    """Samples of a cell of the sweep (default: 20000; on a processor 64)."""
    batch: int = 0
    """Samples of a run of the cost and graph tables (default: 256; on a processor 16)."""
    shapes: tuple[str, ...] = ()
    """States of the overhead table (default: 4096x2, 16x3x32x32, 64x3x64x64; on a processor 64x2)."""
    seconds: float = 0.0
    """To measure for, a table (default: 20; on a processor 1)."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """As for run."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """As for run."""
    peers: bool = True
    """Other libraries' lines too."""
    force_new: bool = False
    """As for run."""


def run(config: Gpu) -> int:
    """Make what is missing. 0 done; InputError (2) where torch sees no such device; the status of a sweep that was stopped."""
    device = check(config)
    config = sized(config, device)
    out = config.out
    files.folder(out)
    absent = {name for name in peers.LIBRARIES if not config.peers or peers.library(name).missing()}
    _json(out / "machine.json", {**machine(device), "absent": sorted(absent), "options": asdict(config)})
    status = quality(config, absent)
    if status:
        return status
    pages = [quality_lines(out / "quality")]
    of = {**asdict(config), "absent": sorted(absent), "device": provenance.device_name(device)}
    of = _as_json({key: value for key, value in of.items() if key not in ("out", "force_new")})
    for name, make in (("overhead", overhead), ("cost", cost), ("graph", graph)):
        page, numbers = out / f"{name}.md", out / f"{name}.json"
        if not files.exists(page) or _options(numbers) != of:
            text, rows = make(config, device, absent)
            files.remove(page)
            _json(numbers, {"options": of, "rows": rows})
            files.write(page, text + "\n")  # last: what has its page is whole
        pages.append((files.read(page) or b"").decode())
        print(pages[-1], flush=True)
    files.write(out / "summary.md", "\n\n".join([f"# On {provenance.device_name(device)}", *pages]) + "\n")
    print(f"all in {files.show(str(out))}; next: python -m benchmarks report {files.show(str(out / 'quality'))}")
    return 0


def check(config: Gpu) -> torch.device:
    """The device. InputError where there is none of this name."""
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise InputError(f"--device {config.device!r} is unknown: give cuda, cuda:1, or cpu") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(
                f"--device {config.device}: torch sees {count} CUDA devices here; run this on a machine with a GPU, "
                "or rehearse it with --device cpu"
            )
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise InputError(f"--device {config.device}: give cuda, cuda:1, or cpu")
    return device


def sized(config: Gpu, device: torch.device) -> Gpu:
    """The options with their sizes, by the kind of device."""
    cuda = device.type == "cuda"
    as_it_is = config.dtype in ("float32", "float64") and config.compile == "no"
    return replace(
        config,
        model=config.model or ("digits_network", *(("gmm256:vp",) if as_it_is else ())),
        nfe=config.nfe or ((5, 10, 20, 50) if cuda else (5, 10)),
        n=config.n or (20_000 if cuda else 64),
        batch=config.batch or (256 if cuda else 16),
        shapes=config.shapes or (("4096x2", "16x3x32x32", "64x3x64x64") if cuda else ("64x2",)),
        seconds=config.seconds or (20.0 if cuda else 1.0),
    )


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers are of."""
    found: dict[str, Any] = {
        "device": provenance.device_name(device),
        "versions": provenance.versions(),
        "git": provenance.commit(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"memory": card.total_memory, "capability": [card.major, card.minor], "cuda": torch.version.cuda}
    return found


def _json(file: File, value: Any) -> None:
    files.write(file, json.dumps(value, indent=1, default=str) + "\n")


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _options(file: File) -> Any:
    """What the numbers of an earlier run were made with; None where there are none that can be read."""
    try:
        return json.loads(files.read(file) or b"")["options"]
    except (ValueError, KeyError, TypeError):
        return None


def here(line: str, absent: set[str]) -> bool:
    return "/" not in line or line.partition("/")[0] not in absent


# --- the parts ----------------------------------------------------------------------------------------------------------------


def quality(config: Gpu, absent: set[str]) -> int:
    """The sweep, or what of it is missing; its exit status."""
    from .run import run as sweep

    return sweep(
        Sweep(
            model=config.model,
            solver=(*config.solver, *(line for line in LINES if here(line, absent))),
            nfe=config.nfe,
            grid=("log_snr", "karras"),
            n=config.n,
            metric=("strong_error", "sliced_w2"),
            out=config.out / "quality",
            device=config.device,
            dtype=config.dtype,
            compile=config.compile,
            start="prior",
            force_new=config.force_new,
        )
    )


def usable(pairs: Sequence[tuple[str, str]], try_it: Callable[[tuple[str, str]], object]) -> tuple[list[tuple[str, str]], str]:
    """The pairs that run on this device, and what the others said: one library's fault costs its own row."""
    good, said = [], []
    for pair in pairs:
        try:
            try_it(pair)
        except (ToolkitError, RuntimeError, TypeError, ValueError) as error:
            said.append(f"{pair[0]} {pair[1]}: {str(error)[:160]}")
        else:
            good.append(pair)
    return good, "\n".join(f"- not measured: {files.show(line)}" for line in said)


def overhead(config: Gpu, device: torch.device, absent: set[str]) -> tuple[str, list[dict[str, Any]]]:
    """Microseconds a step beyond the network, of every loop that runs on the device."""
    from sde import VP

    pairs = [pair for pair in LOOPS if here(pair[0], absent)]
    columns, rows, notes = [], [], []
    for text in config.shapes:
        x = torch.randn(shape(text), generator=torch.Generator().manual_seed(0)).to(device)
        good, note = usable(pairs, lambda pair, x=x: costs.contender(*pair, VP(), x, 4).run())
        found = costs.overhead(good, shape(text), 20, config.seconds, device)
        rows += [{"shape": text, **asdict(row)} for row in found]
        columns.append({(row.line, row.grid): row for row in found})
        notes.append(note)
    unit = [next(iter(column.values())).micros.median for column in columns]
    lines = []
    for key in dict.fromkeys(key for column in columns for key in column):
        cells = [micros(column[key], unit[i]) if key in column else "-" for i, column in enumerate(columns)]
        lines.append(f"| {key[0]} {key[1]} | " + " | ".join(cells) + " |")
    head = "| loop | " + " | ".join(config.shapes) + " |\n" + "|---" * (len(config.shapes) + 1) + "|"
    title = "**Overhead, 20 steps: us a step beyond the network, median [quartiles], x the first row; memory in states**"
    return "\n".join([title, "", head, *lines, "", *filter(None, notes)]).rstrip(), rows


def cost(config: Gpu, device: torch.device, absent: set[str]) -> tuple[str, list[dict[str, Any]]]:
    """On the first model: calls, wall, network and device time, memory."""
    model = load(config.model[0], _sweep(config), device)
    problem, score = model.problem, model.score.score
    x = problem.starts(0, range(config.batch), dtype=model.dtype, device=device)
    nfe = max(config.nfe)
    pairs = [pair for pair in LOOPS if here(pair[0], absent)]

    def once(pair: tuple[str, str]) -> None:
        line = costs.resolve_line(pair[0])
        meter = costs.Meter(score, device)
        given = {"eta": None, "start": problem.start, "stop": problem.stop}
        line.run(meter, x, nfe=nfe, grid=pair[1], seed=0, indices=range(len(x)), **given)

    good, note = usable(pairs, once)
    found = costs.on_model(score, good, x, nfe, problem.start, problem.stop, config.seconds)
    text = cost_lines(found, f"{config.model[0]}, {len(x)} samples, at most {nfe} calls")
    return "\n".join(filter(None, [text, note])), [asdict(row) for row in found]


def quality_lines(out: File) -> str:
    """NFE against quality: a table a model and metric, of each line's values by network calls."""
    shown = files.show(str(out / "results.jsonl"))
    tables = [f"**NFE against quality**, with intervals in {shown}; `*`: within its floor"]
    for of in reading.series(reading.results(out).rows):
        called, found = reading.names(of.lines), {(reading.line(r), r["budget"]): r for r in of.rows}
        rows = [[f"{of.model}, {of.metric}", *(f"NFE {b}" for b in of.budgets)], ["---"] * (1 + len(of.budgets))]
        for which in of.lines:
            values = [found.get((which, b)) for b in of.budgets]
            cells = ["" if r is None else reading.number(r["value"]) + "*" * bool(r["within_floor"]) for r in values]
            rows.append([called[which], *cells])
        tables.append("\n".join(f"| {' | '.join(cells)} |" for cells in rows))
    return "\n\n".join(tables)


def _sweep(config: Gpu) -> Sweep:
    return Sweep(model=config.model, dtype=config.dtype, compile=config.compile, device=config.device)


def graph(config: Gpu, device: torch.device, absent: set[str]) -> tuple[str, list[dict[str, Any]]]:
    """Deterministic plans on the first model: as they run, prepared, and as one graph."""
    model = load(config.model[0], replace(_sweep(config), compile="no"), device)  # a compiled network has graphs of its own
    problem = model.problem
    x = problem.starts(0, range(config.batch), dtype=model.dtype, device=device)
    rows = []
    for name in GRAPHED:
        steps = max(config.nfe) // (2 if name == "heun" else 1)
        plan = trace(name, problem.path, make_grid("log_snr", problem.path, steps, problem.start, problem.stop))
        rows.append(graphs.measure(plan, model.score.score, x, config.seconds / len(GRAPHED)))
    lines = [
        f"| {row.solver} | {row.nfe} | {1e3 * row.plan:.2f} | {1e3 * row.prepared:.2f} | "
        f"{'-' if row.graph is None else f'{1e3 * row.graph:.2f}'} | {row.difference:.0e} |"
        for row in rows
    ]
    head = "| sampler | NFE | plan ms | prepared ms | CUDA graph ms | difference |\n|---|---|---|---|---|---|"
    note = "" if device.type == "cuda" else "\n\nNo CUDA device: nothing was recorded, the prepared plan was run as it is."
    title = f"**A plan as one CUDA graph**, {config.model[0]}, {len(x)} samples"
    return "\n".join([title, "", head, *lines]) + note, [asdict(row) for row in rows]
