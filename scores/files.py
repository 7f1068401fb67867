"""Files of weights on the disk: read once and whole, from one descriptor; written whole or not at all.

A file is told by its first bytes, before the rest is read. Errors are ``CheckpointError``s that do not name the file: the
caller does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from torch import Tensor

from sde.errors import CheckpointError

from . import safetensors_file, torch_file

File = str | os.PathLike[str]

FOREIGN = (
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a .npy array"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip file: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"PK", "an empty or split zip"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself with git lfs pull"),
    (b"<", "a page of HTML or XML: the download failed"),
    (b"{", "JSON text"),
)


def read(path: File) -> tuple[str, bytearray | bytes]:
    """("safetensors" | "torch" | "torch legacy" | "pickle", bytes) of a file; those of safetensors may be written to."""
    try:
        with _open(path) as file:
            before = os.fstat(file.fileno())
            kind = _format(file.read(512), before.st_size, os.fspath(path))
            file.seek(0)
            if kind == "safetensors":
                data = bytearray(before.st_size)
                count = file.readinto(data)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                data = file.read(before.st_size)
                count = len(data)
            after = os.fstat(file.fileno())
    except FileNotFoundError:
        raise CheckpointError("no such file") from None
    if (count, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError("changed while it was read: wait until it is written")
    return kind, data


def contents(path: File, limit: int) -> bytes:
    """The first bytes of a small file. Errors: FileNotFoundError too."""
    with _open(path) as file:
        return file.read(limit)


@contextlib.contextmanager
def _open(path: File) -> Iterator[BinaryIO]:
    try:
        _check_regular(os.stat(path))  # before it is opened: a pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            _check_regular(os.fstat(descriptor))
            yield file
    except (FileNotFoundError, CheckpointError):
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def write(path: File, header: bytes, tensors: Iterable[Tensor]) -> str:
    """Header and tensors, beside their place, flushed to the disk, and moved there in one step; returns the sha256."""
    target = os.fspath(path)
    partial = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.partial")
    digest = hashlib.sha256()
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with open(descriptor, "wb") as file:
                for part in (header, *map(safetensors_file.raw, tensors)):
                    file.write(part)
                    digest.update(part)
                file.flush()
                os.fsync(descriptor)
            os.replace(partial, target)
        except BaseException:
            os.unlink(partial)
            raise
        _flush_folder(os.path.dirname(target) or ".")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be written ({getattr(error, 'strerror', None) or error})") from error
    return digest.hexdigest()


def _check_regular(about: os.stat_result) -> None:
    """A regular file, after symbolic links: model caches are full of them."""
    if stat.S_ISDIR(about.st_mode):
        raise CheckpointError("is a directory: give the file of weights in it")
    if not stat.S_ISREG(about.st_mode):
        raise CheckpointError("is a device, pipe or socket, not a file")


def _format(head: bytes, size: int, path: str) -> str:
    """The format, from the first bytes: a file's name is not asked, and may not contradict them."""
    if size == 0:
        raise CheckpointError("is empty (0 bytes)")
    if head[8:9] == b"{":
        safetensors_file.header_length(head, size)
        return "safetensors"
    if head[:15] == torch_file.LEGACY_MAGIC:
        kind = "torch legacy"
    elif head[:4] == b"PK\x03\x04":
        kind = "torch"
    elif torch_file.looks_like_pickle(head):
        kind = "pickle"
    elif head[257:262] == b"ustar":
        raise CheckpointError("a tar archive: unpack it, or, if torch before 0.2 wrote it, have its weights as safetensors")
    else:
        foreign = next((what for magic, what in FOREIGN if head.lstrip().startswith(magic)), f"it begins with {head[:8]!r}")
        raise CheckpointError(f"neither safetensors nor a file of torch.save: {foreign}")
    if path.lower().endswith(".safetensors") and kind != "pickle":  # a bare pickle gets a worse message
        raise CheckpointError("is named .safetensors and is a file of torch.save: whoever made it is mistaken, or not honest")
    return kind


def _flush_folder(folder: str) -> None:
    """So that the move itself survives a power cut; not every system lets a folder be flushed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
