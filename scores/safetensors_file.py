"""The safetensors format: n (8 bytes, little-endian), n bytes of JSON, then the bytes of the tensors.

    {"__metadata__": {str: str}, name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Offsets count from the end of the JSON. Reading makes no copy and believes nothing: the header is bounded, names are unique,
every tensor's bytes are those of its shape, and the tensors fill the rest of the file without a gap or an overlap. Writing
gives the bytes of the reference library, and with several entries of metadata always the same ones (the library's vary).
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from sde.errors import CheckpointError

HEADER_CAP = 16 * 2**20  # bytes of JSON
TENSOR_CAP = 2**16  # tensors in a file
NAME_CAP = 1024  # characters of a tensor's name
RANK_CAP = 32

#: The format's names, in its own order, which is that of the tensors in a file, from last to first.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200


class Entry(NamedTuple):
    """Where a tensor is: bytes [begin, end) after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read(data: bytearray) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file that begins as one (n, "{"), as views of ``data``, and its metadata.

    Errors: CheckpointError, the file not named.
    """
    if sys.byteorder != "little":
        raise CheckpointError("safetensors is little-endian and this machine is not")
    start = 8 + header_length(data, len(data))
    entries, metadata = _entries(bytes(memoryview(data)[8:start]), len(data) - start)
    body = torch.frombuffer(data, dtype=torch.uint8)
    tensors = {name: _view(body, start, entry) for name, entry in entries.items()}
    for name, tensor in tensors.items():
        check_bool(name, tensor)
    return tensors, metadata


def header_length(head: bytes | bytearray, size: int) -> int:
    """n, checked against the cap and the size of the file before anything is read."""
    (n,) = struct.unpack_from("<Q", head)
    if n > HEADER_CAP:
        raise CheckpointError(f"safetensors header of {n} bytes, more than the {HEADER_CAP} that are read")
    if 8 + n > size:
        raise CheckpointError(f"truncated safetensors: the header ends at byte {8 + n}, the file at {size}")
    return n


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[Tensor]]:
    """The header and, in order, the tensors whose bytes (``raw``) follow it; the same input gives the same bytes."""
    codes = {dtype: (rank, code) for rank, (code, dtype) in enumerate(DTYPES.items())}
    order = sorted(tensors, key=lambda name: (-codes[tensors[name].dtype][0], name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": codes[tensors[name].dtype][1], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return struct.pack("<Q", len(text)) + text, [tensors[name] for name in order]


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A whole file, in memory."""
    header, ordered = pack(tensors, metadata)
    return b"".join((header, *map(raw, ordered)))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in order, as they lie in memory."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # not reshape: one number may have any stride
    return flat.view(torch.uint8).numpy().data


def check_bool(name: str, tensor: Tensor) -> None:
    """A bool that is neither 0 nor 1 is undefined behaviour in compiled code."""
    if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise CheckpointError(f"tensor {show(name)} is bool and holds bytes other than 0 and 1")


def show(name: object, room: int = 60) -> str:
    """A name from a file, or anything else in it, printable and short. It may be nested a million times: repr would not end."""
    text = _SHORT.repr(name)
    return text if len(text) <= room else f"{text[: room - 4]}...{text[-1]}"


def _view(body: Tensor, start: int, entry: Entry) -> Tensor:
    part = body[start + entry.begin : start + entry.end]
    if (start + entry.begin) % entry.dtype.itemsize:  # allowed by the format, not by torch
        part = part.clone()
    return part.view(entry.dtype).view(entry.shape)


def _entries(header: bytes, room: int) -> tuple[dict[str, Entry], dict[str, str]]:
    _check_count(header.count(b'"data_offsets"'))  # before it takes memory, and, for names spelled otherwise, after
    try:
        found = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError("safetensors header is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"safetensors header is not JSON ({str(error)[:80]})") from None
    metadata = _metadata(found.pop("__metadata__", {}))
    _check_count(len(found))
    entries = {name: _entry(name, about, room) for name, about in found.items()}
    _check_layout(entries, room)
    return entries, metadata


def _check_count(count: int) -> None:
    if count > TENSOR_CAP:
        raise CheckpointError(f"safetensors header lists {count} tensors, more than the {TENSOR_CAP} that are read")


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError("safetensors __metadata__ is not a map from text to text")
    try:
        "".join((*found, *found.values())).encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError("safetensors __metadata__ holds text that is not Unicode") from None
    return found


def _entry(name: str, about: Any, room: int) -> Entry:
    check_name(name)
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {show(name)} is not described by exactly dtype, shape and data_offsets")
    code, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CheckpointError(f"tensor {show(name)} has dtype {show(code)}; known: {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > RANK_CAP or math.prod(max(d, 1) for d in shape) >= 2**60:
        raise CheckpointError(f"tensor {show(name)} has the impossible shape {show(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"tensor {show(name)} has data_offsets {show(offsets)}, not two numbers >= 0")
    begin, end = offsets
    if not begin <= end <= room:
        raise CheckpointError(f"tensor {show(name)} is at bytes {begin} to {end} of {room}: truncated, or out of range")
    if end - begin != math.prod(shape) * dtype.itemsize:
        need = f"{math.prod(shape) * dtype.itemsize} bytes, has {end - begin}"
        raise CheckpointError(
            f"tensor {show(name)} of shape {show(shape)} and dtype {code} needs {need} bytes, has {end - begin}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def check_name(name: str) -> None:
    """Names are text that can be shown."""
    if len(name) > NAME_CAP or not name.isprintable():
        raise CheckpointError(f"the name {show(name)} is longer than {NAME_CAP} characters or not printable")


def _check_layout(entries: Mapping[str, Entry], room: int) -> None:
    """One tensor after the other, from the first byte to the last."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            what = "overlaps another" if entry.begin < at else f"leaves {entry.begin - at} bytes unused before it"
            raise CheckpointError(f"tensor {show(name)} {what}")
        at = entry.end
    if at != room:
        raise CheckpointError(f"{room - at} bytes after the last tensor belong to none")


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise CheckpointError(f"safetensors header has the key {show(twice)} twice")
    return found


def _integer(text: str) -> int:
    if len(text) > 20:  # int() is quadratic in the digits
        raise CheckpointError(f"safetensors header holds a number of {len(text)} digits")
    return int(text)


def _no_number(text: str) -> NoReturn:
    raise CheckpointError(f"safetensors header holds {show(text)} where only whole numbers are allowed")
