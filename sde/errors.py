"""Every error this package raises on purpose. A message names the argument, shows the value and says what to write instead."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable
from typing import Any


class ToolkitError(Exception):
    """Base of all errors raised on purpose by sde, scores, solvers and benchmarks."""


class InputError(ToolkitError, ValueError):
    """An argument is wrong; nothing was computed."""


class PathError(InputError):
    """The noise path (alpha_t, sigma_t) is undefined, or not usable, at a time that was asked for."""


class CheckpointError(InputError):
    """A file of weights is missing, broken, dangerous, or does not fit what it is wanted for; nothing in it was run."""


class NetworkError(ToolkitError, RuntimeError):
    """The network failed or returned something unusable.

    ``step`` is the solver step (from 0), ``t`` the time and ``samples`` the indices of the offending rows, when known.
    """

    def __init__(self, message: str, *, step: int | None = None, t: float | None = None, samples: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.step, self.t, self.samples = step, t, samples


class StepLimitError(ToolkitError, RuntimeError):
    """An adaptive solver used up its budget. ``partial`` holds what was reached (may be None)."""

    def __init__(self, message: str, *, t: float | None = None, rejected: int = 0, partial: Any = None) -> None:
        super().__init__(message)
        self.t, self.rejected, self.partial = t, rejected, partial


class CallbackError(ToolkitError, RuntimeError):
    """A user callback raised. ``step`` is the step after which it was called, ``x`` the state there."""

    def __init__(self, message: str, *, step: int, x: Any = None) -> None:
        super().__init__(message)
        self.step, self.x = step, x


class RunError(ToolkitError, RuntimeError):
    """A run cannot be carried out, or cannot go on; what is on the disk is whole. The same command again goes on from there."""


class ResultsError(ToolkitError, ValueError):
    """A folder or file of results is damaged, or of another version or configuration than what is asked of it."""


class ToolkitWarning(UserWarning):
    """Base of all warnings issued by this package."""


class TrainModeWarning(ToolkitWarning):
    """The network is in train mode and has layers that behave differently there (dropout, batch normalisation)."""


class PrecisionWarning(ToolkitWarning):
    """A tensor was cast because its dtype loses or wastes precision here."""


class BudgetWarning(ToolkitWarning):
    """A budget of network evaluations is below one step of the solver, so a lower order was used."""


class UnverifiedWarning(ToolkitWarning):
    """A check of a file against its digest was asked for, and no digest of it is known."""


def nearest(name: object, known: Iterable[str]) -> str:
    """'did you mean a or b?' for an unknown name, or what there is when nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"known: {', '.join(names[:12])}{more}"


def is_number(value: Any) -> bool:
    """Whether it is a real number, or a tensor or array that holds one and has no dimension; a bool is none."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_numbers(**values: object) -> None:
    """InputError for the first of the named values that is no number, before it is compared."""
    for name, value in values.items():
        if not is_number(value):
            raise InputError(f"{name}={value!r:.80}: must be a number")


def check_counts(**values: object) -> None:
    """InputError for the first of the named values that is no int."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InputError(f"{name}={value!r:.80}: must be an int")
