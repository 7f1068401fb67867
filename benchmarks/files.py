"""The disk as the harness sees it. Every call into the operating system goes through one seam, ``system``.

write    a file is whole or absent: written beside its place under a name of its own, flushed, moved there in one step
seal     a line knows whether it is torn: JSON with a checksum of its own bytes; lines end at b"\\n" and nowhere else
pack     a file knows whether it is damaged: safetensors whose metadata holds the sha256 of all its other bytes
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as File
from typing import Any

from sde.errors import InputError, ResultsError, RunError

try:
    import fcntl
except ModuleNotFoundError:  # Windows: claims beat
    fcntl = None


# --- the seam ---------------------------------------------------------------------------------------------------------------


def _flock(descriptor: int) -> None:
    """Hold the open file, without waiting. BlockingIOError: someone else does."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no flock")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class System:
    """The calls that are made. Tests put one in its place that fails."""

    open, close, fsync = staticmethod(os.open), staticmethod(os.close), staticmethod(os.fsync)
    read, write, lseek = staticmethod(os.read), staticmethod(os.write), staticmethod(os.lseek)
    replace, unlink = staticmethod(os.replace), staticmethod(os.unlink)
    mkdir, makedirs, rmdir = staticmethod(os.mkdir), staticmethod(os.makedirs), staticmethod(os.rmdir)
    listdir, lstat, fstat = staticmethod(os.listdir), staticmethod(os.lstat), staticmethod(os.fstat)
    flock = staticmethod(_flock)


system: Any = System()

BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""A link in the place of a file of ours leads out of the folder: it is never followed."""


def call(name: str, *args: Any) -> Any:
    """One call, again for as long as a signal interrupts it."""
    while True:
        try:
            return getattr(system, name)(*args)
        except InterruptedError:
            continue


def show(path: object) -> str:
    """A path, or any other text from outside, on one line: control and direction marks as codes."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in str(path))


@contextlib.contextmanager
def trouble(path: File, what: str) -> Iterator[None]:
    """An error of the operating system as one that says which file, and that nothing else was harmed."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{show(path)}: cannot be {what} ({error.strerror or error})") from error


# --- whole files ------------------------------------------------------------------------------------------------------------


def folder(path: File) -> File:
    """The folder, made where it is missing."""
    try:
        call("makedirs", path, 0o777, True)
    except OSError as error:
        raise InputError(f"--out {show(path)}: cannot be used as a folder ({error.strerror}); give another") from None
    return path


def subfolder(path: File) -> File:
    """A folder inside one that exists, made where it is missing; a link or a file in its place is refused."""
    with trouble(path, "made"):
        with contextlib.suppress(FileExistsError):
            call("mkdir", path)
        if not stat.S_ISDIR(call("lstat", path).st_mode):
            raise RunError(f"{show(path)}: is no folder, and one is needed there: move it away")
    return path


def write(path: File, content: bytes | str | Callable[[File], object], token: str = "") -> None:
    """Write bytes, text (UTF-8), or what a function writes to the path it is given.

    Whatever fails, or kills the process, at whatever moment: there is the old file or the new one. What a killed process
    leaves beside it is named ``.NAME.TOKEN.partial``.
    """
    # the suffix of what a function writes stays the last one: savers choose a format by it
    end = path.suffix if callable(content) else ".partial"
    partial = path.with_name(f".{path.name}.{token or secrets.token_hex(8)}{end}")
    with trouble(path, "written"):
        try:
            if callable(content):
                content(partial)
                descriptor = call("open", partial, os.O_RDWR | BINARY)
            else:
                descriptor = call("open", partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
            try:
                if not callable(content):
                    write_all(descriptor, content.encode("utf-8") if isinstance(content, str) else content)
                call("fsync", descriptor)
            finally:
                call("close", descriptor)
            call("replace", partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                call("unlink", partial)
            raise
        _flush_folder(path.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """Write to an open file, however many calls that takes."""
    rest = memoryview(data)
    while rest:
        count = call("write", descriptor, rest)
        if count <= 0:
            raise OSError(errno.EIO, "nothing was written")
        rest = rest[count:]


def _flush_folder(path: File) -> None:
    """So that the move itself survives a power cut. Not every system lets a folder be flushed."""
    if os.name != "posix":
        return
    descriptor = call("open", path, os.O_RDONLY | BINARY)
    try:
        call("fsync", descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        call("close", descriptor)


def read(path: File) -> bytes | None:
    """The bytes of a regular file, not through a link; None where there is nothing. ResultsError: something else is there."""
    with trouble(path, "read"):
        try:
            if not stat.S_ISREG(call("lstat", path).st_mode):  # before it is opened: a pipe would wait for its writer
                raise ResultsError(f"{show(path)}: is no regular file")
            descriptor = call("open", path, os.O_RDONLY | NO_LINK | BINARY)
        except FileNotFoundError:
            return None
        try:
            parts = []
            while part := call("read", descriptor, 1 << 24):
                parts.append(part)
            return b"".join(parts)
        finally:
            call("close", descriptor)


def exists(path: File) -> bool:
    """Whether a regular file is there."""
    with trouble(path, "looked at"):
        try:
            return stat.S_ISREG(call("lstat", path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False


def names(path: File) -> list[str]:
    """What is in a folder, sorted; nothing where there is none."""
    with trouble(path, "listed"):
        try:
            return sorted(call("listdir", path))
        except FileNotFoundError:
            return []


def is_folder(path: File) -> bool:
    with trouble(path, "looked at"):
        try:
            return stat.S_ISDIR(call("lstat", path).st_mode)
        except FileNotFoundError:
            return False


def there(path: File) -> bool:
    """Whether anything is there, if only a link to nowhere."""
    with trouble(path, "looked at"):
        try:
            call("lstat", path)
            return True
        except (FileNotFoundError, NotADirectoryError):
            return False


def remove(path: File) -> None:
    """Remove a file or a link, if it is still there."""
    with trouble(path, "removed"), contextlib.suppress(FileNotFoundError):
        call("unlink", path)


def remove_folder(path: File) -> None:
    """Remove a folder if it is there and empty."""
    with contextlib.suppress(OSError):
        call("rmdir", path)


def move(path: File, place: File) -> None:
    """Move a file or folder to a place in the same file system."""
    with trouble(path, "moved"):
        call("replace", path, place)


# --- sealed lines -----------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite are null, tuples are lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def seal(record: Mapping[str, Any]) -> bytes:
    """One line of JSON (RFC 8259, ASCII) of a record that is not empty; its last field ``crc`` is the CRC-32 of the line
    without it.
    """
    body = json.dumps(plain({k: v for k, v in record.items() if k != "crc"}), allow_nan=False).encode("ascii")
    return body[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(body)


_TAIL = len(b', "crc": "00000000"}')


def unseal(line: bytes) -> dict[str, Any] | None:
    """The record of a line (without its line end and its crc); None where it is not what was written."""
    body, tail = line[:-_TAIL] + b"}", line[-_TAIL:]
    if tail != b', "crc": "%08x"}' % zlib.crc32(body):
        return None
    try:
        record = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def unseal_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """(the records of the whole lines, how many lines are damaged). A last line without its end is damaged too."""
    lines = [line for line in data.split(b"\n")[:-1] if line]
    records = [record for line in lines if (record := unseal(line)) is not None]
    torn = bool(data) and not data.endswith(b"\n")
    return records, len(lines) - len(records) + torn


def append(path: File, record: Mapping[str, Any]) -> None:
    """Add a sealed line, after the line end that a torn one lacks. For what may be lost with the power: not flushed."""
    line = seal(record)
    with trouble(path, "written"):
        descriptor = call("open", path, os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_LINK | BINARY, 0o666)
        try:
            whole = not call("fstat", descriptor).st_size or _last_byte(descriptor) == b"\n"
            for _ in range(8):  # a short write leaves a torn line, and the whole one follows it
                data = line if whole else b"\n" + line
                count = call("write", descriptor, data)
                if count == len(data):
                    return
                whole = whole and count == 0
            raise OSError(errno.EIO, "short writes")
        finally:
            call("close", descriptor)


def _last_byte(descriptor: int) -> bytes:
    call("lseek", descriptor, -1, os.SEEK_END)
    return call("read", descriptor, 1)


# --- sealed files -----------------------------------------------------------------------------------------------------------

_BLANK = "0" * 64
_MARK = b'"sha256":"'


def pack(about: Mapping[str, Any], tensors: Mapping[str, Any]) -> bytes:
    """A safetensors file: ``about`` as JSON in its metadata, beside the sha256 of the file with zeros in the digest's place."""
    from scores.safetensors_file import encode

    text = json.dumps(plain(about), allow_nan=False)
    blank = encode(tensors, {"about": text, "sha256": _BLANK})
    at = blank.index(_MARK) + len(_MARK)  # inside a string of JSON the mark's quotes would have backslashes
    return blank[:at] + hashlib.sha256(blank).hexdigest().encode("ascii") + blank[at + 64 :]


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(about, tensors) of a sealed file. ResultsError: a byte of it is not the one that was written."""
    from scores.safetensors_file import read as parse
    from sde.errors import CheckpointError

    at = data.find(_MARK) + len(_MARK)
    digest = data[at : at + 64]
    if at < len(_MARK) or hashlib.sha256(data[:at] + _BLANK.encode("ascii") + data[at + 64 :]).hexdigest().encode() != digest:
        raise ResultsError("is damaged" if data else "is empty")
    try:
        tensors, metadata = parse(bytearray(data))
        about = json.loads(metadata["about"])
    except (CheckpointError, KeyError, ValueError, RecursionError) as error:  # sealed, but not by us
        raise ResultsError(f"is not a file of this harness ({str(error)[:80]})") from None
    return about, tensors
