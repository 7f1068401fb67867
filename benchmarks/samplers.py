"""``python -m benchmarks samplers``: the table of samplers and their names elsewhere, printed or written to the docs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path as File

from sde.errors import InputError
from solvers import aliases
from solvers.catalogue import markdown_table

BEGIN = "<!-- samplers: written by `python -m benchmarks samplers --write`, checked by a test -->"
END = "<!-- end of samplers -->"
NAMES = """# Names in other libraries

Every name runs as `solver="library:name"`, for example `solver="k_diffusion:sample_dpmpp_2m"`. This page is written by
`python -m benchmarks samplers --write` and checked by a test.
"""


@dataclass(frozen=True)
class Samplers:
    """The table of samplers as Markdown."""

    write: bool = False
    """Write the table into the README, and the names into docs/names.md, instead of printing."""
    readme: File = File("README.md")
    """The file that holds the table between its two marks."""
    names: File = File("docs/names.md")
    """The file of other libraries' names."""


def run(config: Samplers) -> int:
    if config.write:
        text = config.readme.read_text(encoding="utf-8")
        config.readme.write_text(with_table(text), encoding="utf-8")
        config.names.parent.mkdir(exist_ok=True)
        config.names.write_text(f"{NAMES}\n{aliases.markdown_table()}\n", encoding="utf-8")
    else:
        print(markdown_table(), aliases.markdown_table(), sep="\n\n")
    return 0


def with_table(text: str) -> str:
    """The README's text with the table of today between the marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"the README must hold {BEGIN!r} and {END!r} once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{markdown_table()}\n\n{END}{rest.split(END)[1]}"
