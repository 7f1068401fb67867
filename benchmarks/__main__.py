"""The command line: ``python -m benchmarks COMMAND``.

A command is one row of COMMANDS and one module: a frozen dataclass of options, and ``run(options) -> exit status``.
Nothing heavy is imported before a command is chosen.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """Where a command lives (module:Class) and what it does, in one line."""

    target: str
    summary: str


COMMANDS: dict[str, Command] = {
    "run": Command("benchmarks.run:Sweep", "a sweep: any samplers on any model, resumable, shared between workers"),
    "quick": Command("benchmarks.quick:Quick", "compare samplers on three problems: a table, two pictures, a report"),
    "report": Command("benchmarks.reports:Report", "one page of a folder of results: chart, winners, slopes, samples, rows"),
    "compare": Command("benchmarks.compare:Compare", "what has changed from one folder of results to another, beyond noise"),
    "export": Command("benchmarks.exporting:Export", "results as CSV, Parquet or LaTeX, samples for the scripts of ADM, EDM"),
    "train": Command("benchmarks.train:Train", "train the small network of 8x8 digits again, from a seed"),
    "exact": Command("benchmarks.exact:Exact", "the exact law of a sampler's output on Gaussian data"),
    "orders": Command("benchmarks.orders:Orders", "declared and measured order, error constant and cost of every sampler"),
    "frontier": Command("benchmarks.frontier:Frontier", "error against NFE on four problems, beside the best peers"),
    "peers": Command("benchmarks.peer_tables:Peers", "errors, overhead and cost beside every other library that is installed"),
    "samplers": Command("benchmarks.samplers:Samplers", "the table of samplers, printed or written into the README"),
    "speed": Command("benchmarks.speed:Speed", "what a normal and a step cost on this machine"),
    "gpu": Command("benchmarks.gpu:Gpu", "on a GPU, into one folder: quality, overhead, cost, CUDA graphs"),
    "doctor": Command("benchmarks.doctor:Doctor", "versions, device, extras, threads, and a self-test of some seconds"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. 2: the request cannot be carried out, and one line says why."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(COMMANDS)}"
        print(f"benchmarks: unknown command {name!r}: {hint}", file=sys.stderr)
        return 2
    try:
        return _run(name, rest)
    except KeyboardInterrupt:
        print("\nstopped; files that were complete before are untouched", file=sys.stderr)
        return 130
    except BrokenPipeError:  # | head: whoever read has what they wanted
        return 141


def _run(name: str, rest: list[str]) -> int:
    try:
        import tyro
    except ModuleNotFoundError:
        print("benchmarks: the command line needs a few more packages: pip install 'score-solvers[report]'", file=sys.stderr)
        return 2
    module_name, _, class_name = COMMANDS[name].target.partition(":")
    module = importlib.import_module(module_name)
    from sde.errors import ToolkitError

    try:
        default = {"default": module.defaults(rest)} if hasattr(module, "defaults") else {}
        options = tyro.cli(getattr(module, class_name), args=rest, prog=f"python -m benchmarks {name}", **default)
        return module.run(options)
    except ToolkitError as error:
        print(f"benchmarks {name}: {error}", file=sys.stderr)
        return 2


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    head, foot = "usage: python -m benchmarks COMMAND [OPTIONS]", "Options of a command: python -m benchmarks COMMAND --help"
    return f"{head}\n\n{rows}\n\n{foot}"


def _end(status: int) -> int:
    """The status, once stdout has taken everything; without a word, or Python's own complaint, where nobody listens."""
    try:
        sys.stdout.flush()
        return status
    except (BrokenPipeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return status or 141


if __name__ == "__main__":
    sys.exit(_end(main()))
