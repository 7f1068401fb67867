"""Files that are whole or absent: written beside their place, flushed, and moved there in one step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path as File

from sde.errors import InputError


def folder(path: File) -> File:
    """The folder, made where it is missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be used as a folder ({error.strerror}); give another") from None
    return path


def write(path: File, content: bytes | str | Callable[[File], object]) -> None:
    """Write bytes, text (UTF-8), or what a function writes to the path it is given."""
    # the suffix stays the last one: savers choose a format by it
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)
