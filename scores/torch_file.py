"""Files of ``torch.save``: a zip of a pickle and of the storages it names, or, before torch 1.6, one stream of both.

The pickle is run on a machine that does nothing (``stack_machine``), which describes the tensors; storages must be as long as
their records, tensors within their storages. What passes is read by ``torch.load(weights_only=True)``, whose result must be
what was described.

torch before 2.10 is refused: there a file can write outside a tensor's memory through the weights-only reader
(CVE-2026-24747, GHSA-63cw-57p8-fm3p; mended by pytorch#170085).
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sde.errors import CheckpointError

from .safetensors_file import HEADER_CAP, NAME_CAP, TENSOR_CAP, check_bool, check_name, show
from .stack_machine import OPERATION_CAP, Described, Storage, foreign, no_storage, refusal, run

SAFE_TORCH = (2, 10)
LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # how a file before torch 1.6 begins
DIRECTORY_CAP = 128 * TENSOR_CAP  # bytes of a zip's list of records
#: What ``torch.save`` puts into a zip.
RECORDS = r"data\.pkl|data/\d{1,9}|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id"
DEPTH_CAP = 32  # lists in dicts in lists
VALUE_CAP = OPERATION_CAP // 2  # in all of them, shared ones as often as they occur


def read_zip(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the plain values of a file of torch >= 1.6, by path. Errors: CheckpointError, the file not named."""
    _check_torch()
    records = _records(data)
    for name in records:
        if not re.fullmatch(RECORDS, name):
            code = name == "constants.pkl" or name.startswith("code/")
            kind = "a TorchScript archive, which is code" if code else "no part of a file of tensors"
            raise CheckpointError(f"the zip holds {show(name)} beside data.pkl: {kind}, refused")
    lengths = {name.removeprefix("data/"): len(record) for name, record in records.items() if name.startswith("data/")}

    def check(storage: Storage) -> None:
        need, found = storage.numel * storage.dtype.itemsize, lengths.get(storage.key)
        if need != found:
            raise CheckpointError(f"storage {show(storage.key)} is said to be {need} bytes long, and is {found}")

    if len(records["data.pkl"]) > HEADER_CAP:
        raise CheckpointError(f"data.pkl of {len(records['data.pkl'])} bytes, more than the {HEADER_CAP} that are read")
    stream = io.BytesIO(records["data.pkl"])
    tree = run(stream, check, fields=5)
    _check_end(stream)
    return _load(data, tree)


def read_legacy(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same for a file before torch 1.6: five pickles, then each storage as its length and its bytes."""
    _check_torch()
    stream = io.BytesIO(data)
    storages: dict[str, Storage] = {}

    def check(storage: Storage) -> None:
        storages[storage.key] = storage  # their lengths come later in the file

    for wanted in (0x1950A86A20F9469CFC6C, 1001):
        if run(stream, no_storage) != wanted:
            raise CheckpointError("not a file of torch.save: its marks are wrong")
    system = run(stream, no_storage)
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise CheckpointError("written on a big-endian machine, or damaged: save it again as safetensors")
    tree = run(stream, check, fields=6)
    keys = run(stream, no_storage)
    if keys != sorted(storages):
        raise CheckpointError(f"the list of {len(storages)} storages does not agree with the tensors")
    at = stream.tell()
    for key in keys:
        (numel,) = struct.unpack_from("<q", data, at) if at + 8 <= len(data) else (None,)
        storage = storages[key]
        if numel != storage.numel:
            raise CheckpointError(f"storage {show(key)} has {numel} numbers, not {storage.numel}: truncated or damaged")
        at += 8 + storage.numel * storage.dtype.itemsize
    if at != len(data):
        raise CheckpointError(f"the storages end at byte {at}, the file at {len(data)}: truncated or damaged")
    return _load(data, tree)


def read_pickle(data: bytes) -> None:
    """Always a CheckpointError: a pickle that is no file of torch.save, by the worst that it holds."""
    name = foreign(io.BytesIO(data))
    raise refusal(name) if name else CheckpointError("a bare pickle, not a file of torch.save")


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file begins as pickles do; those of protocol 0 begin with an instruction."""
    return (
        head[:1] == b"\x80"
        or re.match(rb"c[\w.]+\n[\w.]+\n(?:[(q\x85\x8c)]|p\d)|\((?:[dl]p\d|[ic][\w.]+\n)|[\]}]q.", head) is not None
    )


def is_safe(version: str) -> bool:
    """Whether this torch reads weights without the known holes; a release before SAFE_TORCH's final one is not."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(a|b|rc|\.dev)?", version)
    if found is None:
        return False
    release = (int(found[1]), int(found[2]), int(found[3] or 0))
    return release > (*SAFE_TORCH, 0) or (release == (*SAFE_TORCH, 0) and not found[4])


def _check_torch() -> None:
    if not is_safe(torch.__version__):
        wanted = ".".join(map(str, SAFE_TORCH))
        raise CheckpointError(
            f"a file of torch.save needs torch >= {wanted} to be read safely (CVE-2026-24747), this is {torch.__version__}: "
            "update torch, or have the file as safetensors"
        )


def _load(data: bytes, tree: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what was described, by torch, and see that it is that."""
    found = flatten(tree)
    described = _tensors(found, Described)
    if not described or "" in described:
        raise CheckpointError("holds one bare tensor, not named ones" if described else "holds no tensors")
    if len(described) > TENSOR_CAP:
        raise CheckpointError(f"{len(described)} tensors, more than the {TENSOR_CAP} that are read")
    for name in described:
        check_name(name)
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # any class: torch's own readers raise many
        raise CheckpointError(f"torch.load(weights_only=True) refused it: {first_line(error)}") from error
    tensors = {name: tensor.detach() for name, tensor in _tensors(flatten(loaded), Tensor).items()}
    if {name: Described(t.dtype, tuple(t.shape)) for name, t in tensors.items()} != described:
        raise CheckpointError("torch.load read other tensors than the file describes")
    for name, tensor in tensors.items():
        check_bool(name, tensor)
    return tensors, {path: value for path, value in found.items() if path not in described}


def first_line(error: Exception) -> str:
    """What another library says, in short."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def flatten(tree: Any) -> dict[str, Any]:
    """{path: tensor, number or text} of dicts and lists in one another.

    Paths are joined by dots, list items are in brackets: "ema.shadow_params.[3]". Shared and circular parts are followed as
    often as they occur, so their number is bounded.
    """
    found: dict[str, Any] = {}
    for path, value in _walk(tree, "", 0, [VALUE_CAP]):
        if path in found:
            raise CheckpointError(f"two values are called {show(path)}")
        found[path] = value
    return found


def _tensors(found: Mapping[str, Any], kind: type) -> dict[str, Any]:
    return {path: value for path, value in found.items() if isinstance(value, kind)}


def _walk(value: Any, path: str, depth: int, left: list[int]) -> Iterator[tuple[str, Any]]:
    left[0] -= 1
    if depth > DEPTH_CAP or left[0] < 0:
        raise CheckpointError(f"nested deeper than {DEPTH_CAP}, or more than {VALUE_CAP} values: circular or hostile")
    if len(path) > NAME_CAP:
        raise CheckpointError(f"the name {show(path)} is longer than {NAME_CAP} characters")
    if isinstance(value, (Described, Tensor, str, int, float)):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _walk(part, f"{path}.{key}" if path else str(key), depth + 1, left)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _walk(part, f"{path}.[{index}]" if path else f"[{index}]", depth + 1, left)


# --- the zip --------------------------------------------------------------------------------------------------------------


def _records(data: bytes) -> dict[str, memoryview]:
    """The records by name, without the folder they share. Nothing is unpacked: they must lie in the file as they are.

    Records follow each other from the first byte to the list of records, so every reader of zips sees the same ones.
    """
    try:
        size, start, comment = struct.unpack("<IIH", data[-10:])  # of the list of records; its place; of a comment after it
        end = len(data) - 22
        if data[end : end + 4] != b"PK\x05\x06" or comment:
            raise CheckpointError("a zip that is truncated, or goes on after its end")
        if data[end - 20 : end - 16] == b"PK\x06\x07":  # numbers of 8 bytes, before those of 4
            end -= 76
            size, start = struct.unpack_from("<QQ", data, end + 40)
        if start + size != end or size > DIRECTORY_CAP:
            raise CheckpointError(f"a zip whose list of records, {size} bytes at {start}, is too long or not where it says")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if archive.start_dir != start:
                raise CheckpointError("a zip with two lists of records")
            found = sorted(archive.infolist(), key=lambda record: record.header_offset)
            return _laid_out(data, found, start)
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, struct.error, ValueError, OverflowError, IndexError, NotImplementedError) as error:
        raise CheckpointError(f"a broken zip ({str(error)[:80]})") from None


def _laid_out(data: bytes, found: list[zipfile.ZipInfo], end: int) -> dict[str, memoryview]:
    records: dict[str, memoryview] = {}
    at, view = 0, memoryview(data)
    if not any(record.orig_filename.endswith("/data.pkl") for record in found):
        held = ", ".join(show(record.orig_filename, 30) for record in found[:3])
        raise CheckpointError(f"a zip without data.pkl ({held or 'empty'}): not a file of torch.save")
    root = found[0].orig_filename.split("/")[0] + "/"
    for record in found:
        name = record.orig_filename
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size or record.flag_bits & 0x41:
            raise CheckpointError(f"record {show(name)} is compressed or encrypted: torch.save stores plain bytes")
        mark, flags, name_size, extra_size = struct.unpack_from("<4s2xH18xHH", data, record.header_offset)
        begin = record.header_offset + 30 + name_size + extra_size
        local = data[record.header_offset + 30 : record.header_offset + 30 + name_size]
        if record.header_offset != at or mark != b"PK\x03\x04" or local != name.encode("utf-8"):
            raise CheckpointError(f"record {show(name)} overlaps another, lies apart, or is named differently inside")
        at = begin + record.file_size
        if flags & 8:  # its sum and lengths are written again behind it, in 8 bytes each where 4 do not hold them
            at += 24 if max(record.file_size, record.header_offset) >= 0xFFFFFFFF else 16
        body = view[begin : begin + record.file_size]
        if record.CRC and zlib.crc32(body) != record.CRC:  # 0 where torch was told not to compute it
            raise CheckpointError(f"record {show(name)} is damaged: its checksum differs")
        if not name.startswith(root) or name.removeprefix(root) in records:
            raise CheckpointError(f"record {show(name)} is there twice, or outside the folder {show(root)}")
        records[name.removeprefix(root)] = body
    if at != end:
        raise CheckpointError(f"the records end at byte {at}, and {end - at} bytes of the zip belong to none")
    return records


def _check_end(stream: BinaryIO) -> None:
    if stream.read(1):
        raise CheckpointError("data.pkl goes on after its end")
