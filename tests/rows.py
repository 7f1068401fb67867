"""Which rows of SOLVERS stand for the others where a test is about code, not about numbers."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from solvers import SOLVERS
from solvers.exponential_tableaux import ExponentialTableau
from solvers.tableaux import Tableau


def kind(value: Any) -> Any:
    """What code a solver runs: its class, its options that are words or switches, and those of the solvers inside it."""
    if not is_dataclass(value):
        return value if isinstance(value, (str, bool)) else None
    if isinstance(value, (Tableau, ExponentialTableau)):
        return type(value).__name__
    return (type(value).__name__, *(kind(getattr(value, f.name)) for f in fields(value)))


def one_of_each_kind() -> list[str]:
    """Promises are kept by code: one row of each kind, the one with most stages up to four, stands for those that differ in
    constants alone.
    """
    by_stages = sorted(SOLVERS, key=lambda n: SOLVERS[n].solver.stages if SOLVERS[n].solver.stages <= 4 else 0)
    kinds = {(kind(SOLVERS[n].solver), SOLVERS[n].eta > 0.0): n for n in by_stages}
    return [name for name in SOLVERS if name in kinds.values()]


def structure(value: Any) -> Any:
    """The classes of a solver and of those inside it, whatever their options."""
    if not is_dataclass(value):
        return None
    if isinstance(value, (Tableau, ExponentialTableau)):
        return type(value).__name__
    return (type(value).__name__, *(structure(getattr(value, f.name)) for f in fields(value)))


def one_of_each_class() -> list[str]:
    """Of ``one_of_each_kind`` one row of each class, the last: for promises that no option of a solver has a part in."""
    classes = {(structure(SOLVERS[n].solver), SOLVERS[n].eta > 0.0): n for n in one_of_each_kind()}
    return [name for name in SOLVERS if name in classes.values()]
