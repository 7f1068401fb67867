"""``python -m benchmarks report DIR``: everything in a folder of results as one page of HTML.

The page is one file, works offline and on a phone, and is safe to open whoever named the models in it. The folder may be
one of a run that is still going on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path as File
from typing import Annotated

import tyro

from .. import files
from .page import page as page
from .sheets import SHEETS as SHEETS
from .sheets import Sheet as Sheet
from .sheets import packed as packed
from .study import Study as Study
from .study import gather

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """One self-contained page of a folder of results: chart, winners, slopes, samples, every row, the configuration."""

    folder: Annotated[File, tyro.conf.Positional]
    """Folder that a run wrote."""
    out: File | None = None
    """Where the page goes; default: report.html in the folder."""


def run(options: Report) -> int:
    """Write the page, say where."""
    study = gather(options.folder)
    out = options.out or options.folder / PAGE
    made = page(study)
    files.write(out, made)
    print(f"{len(study.rows)} rows, {len(made.encode()) / 1e6:.2f} MB: open {files.show(out)}")
    for warning in study.warnings:
        print(f"  {files.show(warning)}")
    return 0
