"""``python -m benchmarks samplers``: the table of samplers, printed or written into the README."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path as File

from sde.errors import InputError
from solvers.catalogue import markdown_table

BEGIN = "<!-- samplers: written by `python -m benchmarks samplers --write`, checked by a test -->"
END = "<!-- end of samplers -->"


@dataclass(frozen=True)
class Samplers:
    """The table of samplers as Markdown."""

    write: bool = False
    """Write it into the README instead of printing it."""
    readme: File = File("README.md")
    """The file that holds the table between its two marks."""


def run(config: Samplers) -> int:
    if config.write:
        text = config.readme.read_text(encoding="utf-8")
        config.readme.write_text(with_table(text), encoding="utf-8")
    else:
        print(markdown_table())
    return 0


def with_table(text: str) -> str:
    """The README's text with the table of today between the marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"the README must hold {BEGIN!r} and {END!r} once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{markdown_table()}\n\n{END}{rest.split(END)[1]}"
