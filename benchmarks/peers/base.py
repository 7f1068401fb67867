"""How another library becomes lines of a sweep: a table of its samplers, and one function that runs each.

A line is written ``library/sampler`` or ``library/sampler:option=value,option=value``. A library's file declares a ``Library``
with a ``Sampler`` for each name; what a sampler is given is a ``Task``, and what it returns is the state at the last time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from torch import Tensor

from sde.errors import InputError, ToolkitError, nearest

from .task import Task


def never(options: Mapping[str, Any]) -> bool:
    return False


def always(options: Mapping[str, Any]) -> bool:
    return True


def with_eta(options: Mapping[str, Any]) -> bool:
    return options["eta"] > 0.0


@dataclass(frozen=True)
class Sampler:
    """A sampler as its library offers it.

    run       (the library's module, task) -> the state at the last time
    options   what may be set after the colon, with what it is otherwise; a default of None is the library's own
    choices   option -> the words it may be
    grids     the grids it can run on; None: all of GRIDS, handed over as times
    noisy     options -> whether it draws normals;  adaptive: whether it chooses its own steps
    takes_eta whether the option "eta" is a noise level of the reverse SDE, which --eta sets too
    to_zero   options -> whether its last step goes to sigma = 0, past the end that it was given
    """

    run: Callable[[Any, Task], Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    grids: tuple[str, ...] | None = None
    noisy: Callable[[Mapping[str, Any]], bool] = never
    adaptive: bool = False
    takes_eta: bool = False
    to_zero: Callable[[Mapping[str, Any]], bool] = never


@dataclass(frozen=True)
class Library:
    """A library, or a file of one.

    distribution  its name on PyPI, of which the version is read; "" for files of a repository
    install       the command that makes it importable
    load          the module its samplers are run with
    how           in words: how the network is called there and what it is given
    affixes       what its own names of samplers begin and end with: with or without them, the sampler is the same
    version_of    the version of files of a repository: (loaded module) -> a word that other files have otherwise
    """

    name: str
    distribution: str
    install: str
    load: Callable[[], Any]
    how: str
    samplers: Mapping[str, Sampler]
    affixes: tuple[str, str] = ("", "")
    version_of: Callable[[Any], str] | None = None

    @functools.cached_property
    def version(self) -> str:
        """Of the installed distribution, or of the files. InputError where it cannot be loaded."""
        module = self.module()
        if self.version_of is not None:
            return self.version_of(module)
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "from source"

    def module(self) -> Any:
        """The loaded library. InputError: it is not there, or does not import; how to install it."""
        try:
            return self.load()
        except ToolkitError:
            raise
        except ModuleNotFoundError as error:
            raise InputError(f"{self.name} needs {error.name!r}, which is not installed: {self.install}") from error
        except Exception as error:  # whatever a module does when it is imported
            said = f"{type(error).__name__}: {str(error)[:150]}"
            raise InputError(f"{self.name} is installed but does not import ({said}): {self.install}") from error

    def missing(self) -> str | None:
        """Why it cannot be used here, in one line; None if it can."""
        try:
            self.module()
        except InputError as error:
            return str(error)
        return None

    def parse(self, text: str) -> tuple[str, dict[str, Any]]:
        """(name, options) of ``sampler`` or ``sampler:option=value,...``, by the table or by the library's own name.

        InputError: no such sampler, or option, with the nearest names. The library need not be installed.
        """
        name, _, rest = text.partition(":")
        before, after = self.affixes
        short = name if name in self.samplers else name.removeprefix(before).removesuffix(after)
        if short not in self.samplers:
            raise InputError(f"{self.name} has no sampler {name!r} here: {nearest(short, self.samplers)}")
        return short, self._options(short, rest)

    def _options(self, name: str, text: str) -> dict[str, Any]:
        sampler, found = self.samplers[name], {}
        for word in text.split(",") if text else []:
            key, equals, value = word.partition("=")
            where = f"{self.name}/{name}"
            if key not in sampler.options or not equals:
                hint = nearest(key, sampler.options) if sampler.options else "it has none"
                raise InputError(f"{where}: the option {word!r} is unknown, write option=value: {hint}")
            if key in found:
                raise InputError(f"{where}: the option {key!r} is given twice: give it once")
            found[key], default = _value(value), sampler.options[key]
            if key in sampler.choices and found[key] not in sampler.choices[key]:
                raise InputError(f"{where}: {key}={value!r} is unknown: {nearest(value, map(str, sampler.choices[key]))}")
            if default is not None and not _alike(found[key], default):
                raise InputError(f"{where}: {key}={value!r}: give a value like {default!r}")
        return found


def _value(text: str) -> Any:
    """true, false, a number, or the word itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _alike(value: Any, like: Any) -> bool:
    if isinstance(like, bool) or isinstance(value, bool):
        return type(value) is type(like)
    return isinstance(value, (int, float)) if isinstance(like, float) else isinstance(value, type(like))


def importing(*names: str) -> Callable[[], Any]:
    """load= of a package: the last module, those before it imported first."""

    def load() -> Any:
        return [importlib.import_module(name) for name in names][-1]

    return load
