"""The command line: ``python -m benchmarks COMMAND``.

A command is one row of COMMANDS and one module: a frozen dataclass of options, and ``run(options) -> exit status``.
Nothing heavy is imported before a command is chosen.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """Where a command lives (module:Class) and what it does, in one line."""

    target: str
    summary: str


COMMANDS: dict[str, Command] = {
    "quick": Command("benchmarks.quick:Quick", "compare samplers on three problems: a table, two pictures, a report"),
    "train": Command("benchmarks.train:Train", "train the small network of 8x8 digits again, from a seed"),
    "exact": Command("benchmarks.exact:Exact", "the exact law of a sampler's output on Gaussian data"),
    "orders": Command("benchmarks.orders:Orders", "declared and measured order, error constant and cost of every sampler"),
    "frontier": Command("benchmarks.frontier:Frontier", "error against NFE on four problems, beside the best peers"),
    "samplers": Command("benchmarks.samplers:Samplers", "the table of samplers, printed or written into the README"),
    "speed": Command("benchmarks.speed:Speed", "what a normal and a step cost on this machine"),
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


def _run(name: str, rest: list[str]) -> int:
    try:
        import tyro
    except ModuleNotFoundError:
        print("benchmarks: the command line needs a few more packages: pip install 'score-solvers[report]'", file=sys.stderr)
        return 2
    module_name, _, class_name = COMMANDS[name].target.partition(":")
    module = importlib.import_module(module_name)
    options = tyro.cli(getattr(module, class_name), args=rest, prog=f"python -m benchmarks {name}")
    from sde.errors import ToolkitError

    try:
        return module.run(options)
    except ToolkitError as error:
        print(f"benchmarks {name}: {error}", file=sys.stderr)
        return 2


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    head, foot = "usage: python -m benchmarks COMMAND [OPTIONS]", "Options of a command: python -m benchmarks COMMAND --help"
    return f"{head}\n\n{rows}\n\n{foot}"


if __name__ == "__main__":
    sys.exit(main())
