"""A pickle is a program for a stack machine; this is a machine that runs it without doing anything.

It knows two dozen instructions, builds lists, dicts, numbers, text and *descriptions* of tensors, and calls nothing. Any other
instruction, any name but those that make a plain tensor, a tensor that does not lie in its storage, refuses the pickle: what
it would have called is named in the error, and was not looked up.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from sde.errors import CheckpointError

from .safetensors_file import RANK_CAP, show

OPERATION_CAP = 500_000  # instructions of a pickle; a tensor takes about 35

#: torch.FloatStorage and so on: what a storage holds.
STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch ComplexFloatStorage": torch.complex64,
    "torch ComplexDoubleStorage": torch.complex128,
}
ORDERED, SIZE = "collections OrderedDict", "torch Size"
TENSOR, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
#: The only names a file may use; the dtypes are those of settings beside the weights.
NAMES = {*STORAGES, ORDERED, SIZE, TENSOR, PARAMETER, *(f"torch {str(d).removeprefix('torch.')}" for d in STORAGES.values())}


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class Described:
    """A tensor that was not made yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A name of ``NAMES``: never looked up, never called."""

    name: str


class _Ordered(dict[Any, Any]):
    """What an OrderedDict becomes; it alone may carry ``_metadata``."""


def run(stream: BinaryIO, check: Callable[[Storage], None], fields: int = 0) -> Any:
    """What one pickle describes; the stream is left behind its end. The error names a dangerous name if there is one."""
    start = stream.tell()
    try:
        return _Machine(check, fields).run(stream)
    except CheckpointError:
        stream.seek(start)
        name = foreign(stream)
        if name:
            raise refusal(name) from None
        raise


def refusal(name: str) -> CheckpointError:
    """What is said of a file that would call something."""
    where = "If you trust it, read it with the code that wrote it and write its weights by save_weights"
    return CheckpointError(f"contains {name}: refused, nothing was run. {where}")


def _operations(stream: BinaryIO, cap: int = OPERATION_CAP) -> Iterator[tuple[str, Any]]:
    """(name, argument) of each instruction up to the end; genops parses and runs nothing."""
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            if count > cap:
                raise CheckpointError(f"a pickle of more than {cap} instructions: too many tensors, or hostile")
            yield operation.name, argument
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, struct.error, Warning) as error:
        raise CheckpointError(f"a broken pickle ({str(error)[:80]})") from None


def foreign(stream: BinaryIO) -> str | None:
    """The first name of a pickle that is none of ``NAMES``, as module.name; None where there is none to see."""
    texts: list[str] = ["?", "?"]
    memo: dict[Any, str] = {}
    try:
        for operation, argument in _operations(stream, OPERATION_CAP // 10):
            name = argument if operation in ("GLOBAL", "INST") else " ".join(texts) if operation == "STACK_GLOBAL" else None
            if name is not None and name not in NAMES:
                return _dotted(name)
            if operation in ("EXT1", "EXT2", "EXT4"):
                return f"extension {argument}"
            if operation == "MEMOIZE":
                memo[len(memo)] = texts[-1]
            elif "PUT" in operation:
                memo[argument] = texts[-1]
            elif "GET" in operation:
                texts = [texts[-1], memo.get(argument, "?")]
            elif isinstance(argument, str):
                texts = [texts[-1], argument]
    except CheckpointError:
        pass  # what can be read of it names nothing
    return None


def _dotted(name: str) -> str:
    return show(name.replace(" ", "."))[1:-1]


class _Machine:
    """The stack machine. Every instruction checks what it is given; there is none that calls, imports or sets an attribute."""

    def __init__(self, check: Callable[[Storage], None], fields: int) -> None:
        self.check, self.fields = check, fields
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, stream: BinaryIO) -> Any:
        for operation, argument in _operations(stream):
            step = _STEPS.get(operation)
            if step is None:
                raise CheckpointError(f"a pickle with the instruction {operation}, which no file of tensors needs: refused")
            try:
                step(self, argument)
            except (IndexError, KeyError, TypeError) as error:  # an empty stack, an unknown memo, an unhashable key
                raise CheckpointError(f"a broken pickle ({operation}: {str(error)[:60]})") from None
        if len(self.stack) != 1 or self.marks:
            raise CheckpointError("a broken pickle (it ends with an unfinished value)")
        return self.stack[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def proto(self, version: int) -> None:
        if version != 2:
            raise CheckpointError(f"a pickle of protocol {version}: torch.save writes protocol 2")

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_of(self, count: int) -> None:
        self.stack[-count:] = [tuple(self._top(count))]

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise CheckpointError(f"a pickle that appends to a {_kind(self.stack[-1])}: refused")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise CheckpointError(f"a pickle that sets items of a {_kind(self.stack[-1])}: refused")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise CheckpointError(f"a dict with a {_kind(key)} as key: wanted are names")
            self.stack[-1][key] = value

    def name(self, name: str) -> None:
        if name not in NAMES:
            raise refusal(_dotted(name))
        self.push(_Name(name))

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def build(self, _: Any) -> None:
        """State of an object: that of an OrderedDict is the versions of a network's layers, and is dropped."""
        target, state = self._pop(2)
        if not (isinstance(target, _Ordered) and isinstance(state, dict) and set(state) == {"_metadata"}):
            raise CheckpointError(f"a pickle that sets attributes of a {_kind(target)}: refused")
        self.push(target)

    def reduce(self, _: Any) -> None:
        """A call, of one of four names: described, not made."""
        function, arguments = self._pop(2)
        name = function.name if isinstance(function, _Name) else ""
        if not isinstance(arguments, tuple):
            raise CheckpointError(f"a pickle that calls with a {_kind(arguments)}: refused")
        if name == ORDERED and arguments == ():
            self.push(_Ordered())
        elif name == SIZE and len(arguments) == 1 and _naturals(arguments[0]):
            self.push(arguments[0])
        elif name == TENSOR and len(arguments) == 6:
            self.push(_describe(*arguments))
        elif name == PARAMETER and len(arguments) == 3 and isinstance(arguments[0], Described) and _no_hooks(arguments[2]):
            self.push(arguments[0])
        else:
            raise CheckpointError(f"a pickle that calls {_dotted(name) or _kind(function)} in a way no file of tensors does")

    def storage(self, _: Any) -> None:
        """("storage", type, key, device, length[, None]): where numbers lie."""
        (about,) = self._pop(1)
        good = isinstance(about, tuple) and len(about) == self.fields and about[0] == "storage" and isinstance(about[1], _Name)
        if not (good and about[1].name in STORAGES and isinstance(about[2], str) and isinstance(about[3], str)):
            raise CheckpointError("a pickle that refers to something that is not a storage of numbers")
        if not _naturals((about[4],)) or about[5:] not in ((), (None,)):
            raise CheckpointError(f"storage {show(about[2])} has the length {show(about[4])}, or is a part of another")
        storage = Storage(about[2], STORAGES[about[1].name], about[4])
        if self.storages.setdefault(storage.key, storage) != storage:
            raise CheckpointError(f"storage {show(storage.key)} is described in two ways")
        self.check(storage)
        self.push(storage)

    def _top(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("too few values")
        return self.stack[-count:]

    def _pop(self, count: int) -> list[Any]:
        items = self._top(count)
        del self.stack[-count:]
        return items


_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.proto,
    "STOP": lambda machine, _: None,
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append(machine._pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine._pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}


def _describe(storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any) -> Described:
    """A tensor that lies in its storage and has no number twice: its size is then bounded by the file's."""
    good = isinstance(storage, Storage) and _naturals((offset,)) and _naturals(shape) and _naturals(stride)
    if not (good and len(shape) == len(stride) <= RANK_CAP and isinstance(requires_grad, bool) and _no_hooks(hooks)):
        raise CheckpointError("a tensor is not described as torch.save does")
    if math.prod(max(d, 1) for d in shape) >= 2**60 or max((offset, *stride)) >= 2**60:
        raise CheckpointError(f"a tensor of the impossible shape {show(shape)}")
    last = offset + sum((d - 1) * s for d, s in zip(shape, stride, strict=True))
    if 0 not in shape and (last >= storage.numel or math.prod(shape) > storage.numel):
        raise CheckpointError(
            f"a tensor of shape {show(shape)} and stride {show(stride)} is not within its storage of {storage.numel} numbers"
        )
    return Described(storage.dtype, shape)


def _naturals(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and v >= 0 for v in values)


def _no_hooks(hooks: Any) -> bool:
    return hooks is None or (isinstance(hooks, _Ordered) and not hooks)


def no_storage(storage: Storage) -> None:
    raise CheckpointError(f"storage {show(storage.key)} where there should be none")


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, Described) else type(value).__name__.strip("_").lower()
