"""Hostile and broken files of weights, made from a few bytes each, and a process that tries to load them under audit.

``python tests/hostile.py FOLDER`` makes the files, loads each one while an audit hook records every event that Python reports,
and prints JSON. Each file belongs to one of the numbered attacks of SECURITY.md. Pickles are assembled by hand; what they
would do is create the file CANARY in the folder.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import socket
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CANARY = "executed"


class Hostile(NamedTuple):
    attack: str  # of SECURITY.md
    name: str  # of the file
    content: bytes | Callable[[Path], object] | None  # None: there is no such file
    says: str  # in the error; "" where the file may be loaded, as data


# --- pickles, by hand -----------------------------------------------------------------------------------------------------

PROTO, STOP = b"\x80\x02", b"."


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tup(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def glob(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def ordered() -> bytes:
    return glob("collections.OrderedDict") + b")R"


def storage(key: str = "0", numel: int = 4, kind: str = "torch.FloatStorage", tail: bytes = b"") -> bytes:
    return tup(text("storage"), glob(kind), text(key), text("cpu"), number(numel), tail) + b"Q"


def tensor(
    shape: tuple[int, ...] = (2, 2), stride: tuple[int, ...] = (2, 1), offset: int = 0, where: bytes = b"", hooks: bytes = b""
) -> bytes:
    sizes, steps = tup(*map(number, shape)), tup(*map(number, stride))
    call = tup(where or storage(), number(offset), sizes, steps, b"\x89", hooks or ordered())
    return glob("torch._utils._rebuild_tensor_v2") + call + b"R"


def named(*parts: tuple[str, bytes]) -> bytes:
    """A dict."""
    return b"}(" + b"".join(text(name) + part for name, part in parts) + b"u"


def program(body: bytes) -> bytes:
    return PROTO + body + STOP


GOOD = named(("weight", tensor()))
DATA = struct.pack("<4f", 1, 2, 3, 4)


# --- containers -----------------------------------------------------------------------------------------------------------


def zipped(
    pickled: bytes | None, extra: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED, root: str = "a/"
) -> bytes:
    """A zip as torch.save makes it: data.pkl, its storage 0, version."""
    out = io.BytesIO()
    records = {} if pickled is None else {"data.pkl": pickled, "data/0": DATA, "version": b"3\n"}
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in {**records, **(extra or {})}.items():
            archive.writestr(zipfile.ZipInfo(root + name, (1980, 1, 1, 0, 0, 0)), data, method)
    return out.getvalue()


def legacy(body: bytes, keys: bytes = b"](" + text("0") + b"e", tail: bytes = struct.pack("<q", 4) + DATA) -> bytes:
    """A file as torch before 1.6 made it."""
    magic = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
    system = program(named(("protocol_version", number(1001)), ("little_endian", b"\x88")))
    return magic + program(number(1001)) + system + program(body) + program(keys) + tail


def legacy_tensor() -> bytes:
    return named(("weight", tensor(where=storage(tail=b"N"))))


def tarred(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return out.getvalue()


def safetensors(header: object, body: bytes = DATA, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def one(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16), **more: object) -> dict[str, object]:
    return {"weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


# --- the files ------------------------------------------------------------------------------------------------------------


def gadgets(canary: str) -> dict[str, tuple[str, ...]]:
    """{what a pickle calls: its arguments}: each would leave the canary, open a socket, or load more code."""
    code = f"open({canary!r}, 'w').close()"
    shell = f"touch {canary}"
    return {
        "os.system": (shell,),
        "posix.system": (shell,),
        "os.popen": (shell,),
        "subprocess.getoutput": (shell,),
        "subprocess.Popen": (f"/usr/bin/touch {canary}",),
        "builtins.exec": (code,),
        "builtins.eval": (code,),
        "__builtin__.eval": (code,),
        "builtins.open": (canary, "w"),
        "io.open": (canary, "w"),
        "builtins.compile": (code, "x", "exec"),
        "builtins.__import__": ("antigravity",),
        "builtins.getattr": ("x", "__class__"),
        "importlib.import_module": ("antigravity",),
        "runpy.run_path": (canary + ".py",),
        "timeit.timeit": (code,),
        "code.interact": (),
        "pdb.run": (code,),
        "pty.spawn": ("/bin/sh",),
        "shutil.copyfile": ("/etc/hostname", canary),
        "ctypes.CDLL": (canary,),
        "webbrowser.open": ("http://localhost:9",),
        "socket.create_connection": (),
        "urllib.request.urlopen": ("http://localhost:9",),
        "pickle.loads": (program(glob("os.system") + tup(text(shell)) + b"R").decode("latin-1"),),
        "functools.partial": (),
        "operator.attrgetter": ("system",),
        "torch.load": (canary,),
        "torch.hub.load": ("owner/repo", "model"),
        "torch.jit.load": (canary,),
        "torch.storage._load_from_bytes": (program(glob("os.system") + tup(text(shell)) + b"R").decode("latin-1"),),
        "torch._utils._import_dotted_name": ("os.system",),
        "torch.serialization.add_safe_globals": (),
        "torch.utils.cpp_extension.load_inline": (code,),
        "numpy.core.multiarray.scalar": (),
        "numpy.testing._private.utils.runstring": (code, "x"),
        "torch._tensor._rebuild_from_type_v2": (),
        "torch._utils._rebuild_wrapper_subclass": (),
        "torch._utils._rebuild_sparse_tensor": (),
        "builtins.bytearray": ("1",),
        "collections.Counter": (),
        "argparse.Namespace": (),
        "torch_utils.persistence._reconstruct_persistent_obj": (),
    }


def calls(canary: str) -> Iterator[Hostile]:
    """A1: pickles that call something, in every container; A3: code in another coat."""
    everywhere = (
        "os.system",
        "posix.system",
        "subprocess.Popen",
        "builtins.exec",
        "builtins.eval",
        "builtins.open",
        "torch.hub.load",
    )
    for name, arguments in gadgets(canary).items():
        call = glob(name) + tup(*map(text, arguments)) + b"R"
        yield Hostile("A1", f"zip-{name}.pt", zipped(program(call)), f"contains {name}: refused")
        if name in everywhere:
            module, _, attribute = name.rpartition(".")
            short = "".join(f"S{argument!r}\n" for argument in arguments)
            new = b"".join(b"\x8c" + bytes([len(a)]) + a.encode() for a in (module, attribute)) + b"\x93"
            says = f"contains {name}: refused"
            yield Hostile("A1", f"zip-inside-{name}.pt", zipped(program(named(("weight", tensor()), ("x", call)))), says)
            yield Hostile("A1", f"legacy-{name}.pt", legacy(call), says)
            yield Hostile("A1", f"legacy-keys-{name}.pt", legacy(legacy_tensor(), keys=call), says)
            yield Hostile("A1", f"raw2-{name}.pkl", program(call), says)
            yield Hostile("A1", f"raw0-{name}.pt", f"c{module}\n{attribute}\n({short}tR.".encode(), says)
            yield Hostile("A1", f"raw4-{name}.ckpt", b"\x80\x04" + new + tup(*map(text, arguments)) + b"R.", says)
            yield Hostile("A1", f"zip4-{name}.pt", zipped(b"\x80\x04" + new + tup(*map(text, arguments)) + b"R."), says)
            yield Hostile("A1", f"inst-{name}.pt", zipped(PROTO + f"({short}i{module}\n{attribute}\n.".encode()), says)
            obj = b"(" + glob(name) + b"".join(map(text, arguments)) + b"o."
            yield Hostile("A1", f"obj-{name}.pt", zipped(PROTO + obj), says)
            new_object = glob(name) + tup(*map(text, arguments)) + b"\x81."
            yield Hostile("A1", f"newobj-{name}.pt", zipped(PROTO + new_object), says)
            yield Hostile("A1", f"after-stop-{name}.pt", zipped(program(GOOD) + call + STOP), "goes on after its end")
            yield Hostile("A1", f"tar-{name}.pt", tarred({"sys_info": program(call), "pickle": program(call)}), "tar archive")
            yield Hostile("A1", f"named-{name}.safetensors", program(call), says)
    call = glob("os.system") + tup(text(f"touch {canary}")) + b"R"
    inner = zipped(program(call))
    yield Hostile("A3", "zip-beside.pt", zipped(program(GOOD), {"more.pt": inner}), "'more.pt' beside data.pkl")
    yield Hostile("A3", "zip-as-storage.pt", zipped(program(GOOD), {"data/1": inner}), "")
    yield Hostile("A3", "zip-in-zip.pt", zipped(None, {"inner.pt": inner}, root=""), "a zip without data.pkl")
    yield Hostile(
        "A3", "torchscript.pt", zipped(program(GOOD), {"code/m.py": b"import os", "constants.pkl": b"x"}), "TorchScript"
    )
    yield Hostile("A3", "torchscript-constants.pt", zipped(program(GOOD), {"constants.pkl": program(call)}), "TorchScript")
    yield Hostile("A3", "package.pt", zipped(program(GOOD), {".data/extern_modules": b"os"}), "beside data.pkl")
    yield Hostile("A3", "torch.safetensors", zipped(program(GOOD)), "is named .safetensors")
    yield Hostile("A3", "legacy.safetensors", legacy(legacy_tensor()), "is named .safetensors")
    yield Hostile("A3", "bare.pkl", program(named(("a", number(3)))), "a bare pickle")
    yield Hostile("A3", "npy-objects.pt", npy_objects(call), "a .npy array")
    yield Hostile("A3", "npz-objects.pt", zipped(None, {"w.npy": npy_objects(call)}, root=""), "a zip without data.pkl")


def npy_objects(call: bytes) -> bytes:
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + program(call)


def changes(canary: str) -> Iterator[Hostile]:
    """A2: a pickle that changes objects, or calls an allowed name with other arguments. A4: numbers outside a storage."""
    set_ = glob("torch._utils._rebuild_tensor_v2")

    def bad(name: str, body: bytes, says: str, attack: str = "A2") -> Hostile:
        return Hostile(attack, f"{name}.pt", zipped(program(body)), says)

    state = named(("__class__", number(1)))
    yield bad("build-dict", ordered() + named(("items", set_)) + b"b", "sets attributes of a ordered")
    yield bad("build-metadata-and-more", ordered() + named(("_metadata", b"}"), ("keys", set_)) + b"b", "sets attributes")
    yield bad(
        "build-tensor", tensor() + tup(storage(), number(0), tup(number(9)), tup(number(1))) + b"b", "attributes of a tensor"
    )
    yield bad("build-plain-dict", b"}" + state + b"b", "attributes of a dict")
    yield bad("setitem-tensor", tensor() + number(0) + number(7) + b"s", "sets items of a tensor")
    yield bad("setitems-tensor", tensor() + b"(" + number(0) + number(7) + b"u", "sets items of a tensor")
    yield bad("setitem-storage", storage() + number(0) + number(7) + b"s", "sets items of a storage")
    yield bad("setitem-tuple", b")" + number(0) + number(7) + b"s", "sets items of a tuple")
    yield bad("setitem-name", set_ + text("x") + number(7) + b"s", "sets items of a name")
    yield bad("setitems-odd", b"}(" + text("x") + b"u", "sets items")
    yield bad("append-tensor", tensor() + number(7) + b"a", "appends to a tensor")
    yield bad("append-dict", b"}" + number(7) + b"a", "appends to a dict")
    yield bad("appends-tuple", b")(" + number(7) + b"e", "appends to a tuple")
    yield bad("call-number", number(7) + b")R", "calls int")
    yield bad("call-dtype", glob("torch.float32") + b")R", "calls torch.float32 in a way")
    yield bad("call-storage", glob("torch.FloatStorage") + tup(number(10**12)) + b"R", "calls torch.FloatStorage in a way")
    yield bad("call-ordered-dict", glob("collections.OrderedDict") + tup(b"]") + b"R", "calls collections.OrderedDict in a way")
    yield bad("call-size", glob("torch.Size") + tup(tup(text("x"))) + b"R", "calls torch.Size in a way")
    for name in ("torch.Size", "torch.float32", "torch.FloatStorage", "collections.OrderedDict"):
        other = glob(name) + tensor().removeprefix(glob("torch._utils._rebuild_tensor_v2"))
        yield bad(f"call-as-tensor-{name}", named(("w", other)), f"calls {name} in a way")
        other = glob(name) + tup(tensor(), b"\x88", ordered()) + b"R"
        yield bad(f"call-as-parameter-{name}", named(("w", other)), f"calls {name} in a way")
    yield bad("call-without-tuple", glob("torch.Size") + b"]R", "calls with a list")
    yield bad(
        "parameter-of-number", glob("torch._utils._rebuild_parameter") + tup(number(1), b"\x88", ordered()) + b"R", "calls"
    )
    yield bad("hooks", named(("w", tensor(hooks=ordered() + text("x") + set_ + b"s"))), "not described as torch.save does")
    yield bad("grad-not-bool", named(("w", tensor()[: -len(ordered()) - 3] + number(1) + ordered() + b"tR")), "not described")
    yield bad("tensor-as-key", b"}" + tensor() + number(1) + b"s", "as key")
    yield bad("list-as-key", b"}]" + number(1) + b"s", "as key")
    yield bad("persistent-text", text("storage") + b"Q", "not a storage of numbers")
    yield bad("persistent-module", tup(text("module"), set_, text("x"), text("y")) + b"Q", "not a storage of numbers")
    yield bad("persistent-untyped", storage(kind="torch._utils._rebuild_tensor_v2"), "not a storage of numbers")
    yield bad("persistent-protocol-0", b"Pos\n", "instruction PERSID")
    yield bad("extension", b"\x82\x01", "extension 1")
    yield bad("next-buffer", b"\x97", "instruction NEXT_BUFFER")
    yield bad("empty-stack", b"R", "broken pickle")
    yield bad("no-mark", number(1) + b"t", "broken pickle")
    yield bad("memo-missing", b"h\x05", "broken pickle")
    yield bad("two-values", number(1) + number(2), "unfinished")
    yield bad("open-mark", number(1) + b"(" + number(2), "unfinished")
    yield Hostile("A2", "no-stop.pt", zipped(PROTO + GOOD), "broken pickle")
    yield Hostile("A2", "no-proto-2.pt", zipped(b"\x80\x03" + GOOD + STOP), "protocol 3")
    yield Hostile("A2", "unknown-instruction.pt", zipped(PROTO + b"\xff."), "broken pickle")
    yield Hostile("A2", "short-text.pt", zipped(PROTO + b"X\xff\xff\xff\x7fabc."), "broken pickle")
    yield bad("bare-tensor", tensor(), "one bare tensor")
    yield bad("no-tensors", named(("a", number(1))), "holds no tensors")
    yield bad("same-names", named(("a.b", tensor()), ("a", named(("b", tensor())))), "two values are called 'a.b'")
    yield bad(
        "bool-7", named(("m", tensor((16,), (1,), where=storage(numel=16, kind="torch.BoolStorage")))), "other than 0 and 1"
    )

    far = [
        ("too-large", tensor((3, 2)), "not within its storage of 4"),
        ("offset", tensor(offset=1), "not within its storage"),
        ("offset-huge", tensor((1,), (1,), offset=2**62), "impossible shape"),
        ("stride-huge", tensor((2,), (2**40,)), "not within its storage"),
        ("stride-0", tensor((2**20, 2**20), (0, 0)), "not within its storage"),
        ("shape-overflow", tensor((2**32, 2**32), (1, 1)), "impossible shape"),
        ("shape-overflow-empty", tensor((0, 2**62, 2**62), (1, 1, 1)), "impossible shape"),
        ("shape-negative", tensor((-2, 2)), "not described"),
        ("stride-negative", tensor((2, 2), (-2, 1)), "not described"),
        ("rank-mismatch", tensor((2, 2), (1,)), "not described"),
        ("rank-1000", tensor((1,) * 1000, (1,) * 1000), "not described"),
        ("not-a-storage", tensor(where=number(3)), "not described"),
    ]
    for name, body, says in far:
        yield bad(f"tensor-{name}", named(("w", body)), says, "A4")
    lies = [
        ("longer", storage(numel=2**33), "said to be 34359738368 bytes long, and is 16"),
        ("shorter", storage(numel=3), "said to be 12 bytes long, and is 16"),
        ("missing", storage(key="9"), "is None"),
        ("path", storage(key="../data.pkl"), "is None"),
        ("negative", storage(numel=-1), "length -1"),
        ("other-type", storage(kind="torch.DoubleStorage"), "said to be 32 bytes"),
        ("view", storage(tail=b"N"), "not a storage of numbers"),
        ("number", storage().replace(text("0"), number(0)), "not a storage of numbers"),
        ("list", storage().replace(text("0"), b"]"), "not a storage of numbers"),
        ("nowhere", storage().replace(text("cpu"), b"N"), "not a storage of numbers"),
        ("of-text", storage().replace(glob("torch.FloatStorage"), text("FloatStorage")), "not a storage of numbers"),
        ("of-no-type", storage().replace(glob("torch.FloatStorage"), glob("torch.float32")), "not a storage of numbers"),
    ]
    for name, where, says in lies:
        yield bad(f"storage-{name}", named(("w", tensor((1,), (1,), where=where))), says, "A4")
    twice = named(("a", tensor()), ("b", tensor((1,), (1,), where=storage(numel=4, kind="torch.IntStorage"))))
    yield bad("storage-twice", twice, "described in two ways", "A4")
    legacies = [
        ("length", legacy(legacy_tensor(), tail=struct.pack("<q", 2**40) + DATA), "has 1099511627776 numbers, not 4"),
        ("negative", legacy(legacy_tensor(), tail=struct.pack("<q", -1) + DATA), "has -1 numbers"),
        ("cut", legacy(legacy_tensor())[:-3], "the storages end at byte"),
        ("cut-length", legacy(legacy_tensor())[:-20], "has None numbers"),
        ("more", legacy(legacy_tensor()) + b"more", "the storages end at byte"),
        ("keys", legacy(legacy_tensor(), keys=b"](" + text("1") + b"e"), "list of 1 storages"),
        ("keys-twice", legacy(legacy_tensor(), keys=b"](" + text("0") * 2 + b"e"), "list of 1 storages"),
        (
            "huge",
            legacy(named(("w", tensor((1,), (1,), where=storage(numel=2**50, tail=b"N"))))),
            "has 4 numbers, not 1125899906842624",
        ),
        ("view", legacy(named(("w", tensor(where=storage(tail=tup(text("0"), number(0), number(2))))))), "part of another"),
        ("magic", legacy(legacy_tensor()).replace(program(number(1001)), program(number(1002)), 1), "marks are wrong"),
        ("big-endian", legacy(legacy_tensor()).replace(b"\x88u.", b"\x89u.", 1), "big-endian"),
    ]
    for name, content, says in legacies:
        yield Hostile("A4", f"legacy-{name}.pth", content, says)


def zips(canary: str) -> Iterator[Hostile]:
    """A5: zips that unpack to more, or to something else, than they show."""
    good = zipped(program(GOOD))
    at = good.rindex(b"PK\x05\x06")
    cd = struct.unpack_from("<I", good, at + 16)[0]
    yield Hostile("A5", "bzip2.pt", zipped(program(GOOD), method=zipfile.ZIP_BZIP2), "compressed or encrypted")
    yield Hostile("A5", "encrypted.pt", patched(good, cd + 8, struct.pack("<H", 1)), "compressed or encrypted")
    yield Hostile("A5", "prefix.pt", b"PK\x03\x04" + b"x" * 60 + good, "not where it says")
    yield Hostile("A5", "comment.pt", good[:-2] + struct.pack("<H", 4) + b"more", "goes on after its end")
    yield Hostile("A5", "tail.pt", good + b"\0", "goes on after its end")
    yield Hostile("A5", "truncated.pt", good[:-30], "truncated")
    yield Hostile("A5", "half.pt", good[: len(good) // 2], "truncated")
    yield Hostile("A5", "tiny.pt", b"PK\x03\x04", "broken zip")
    yield Hostile("A5", "empty-zip.pt", good[at : at + 4] + bytes(18), "empty or split zip")
    yield Hostile("A5", "duplicate.pt", duplicate(), "there twice")
    yield Hostile("A5", "overlap.pt", overlap(), "overlaps another")
    yield Hostile("A5", "gap.pt", zip_with_gap(), "overlaps another, lies apart")
    moved = patched(good, at + 16, struct.pack("<I", cd + 7))
    yield Hostile("A5", "gap-at-end.pt", moved[:cd] + b"g" * 7 + moved[cd:], "7 bytes of the zip belong to none")
    yield Hostile("A5", "inside-name.pt", patched(good, 30, b"b/data.pkl"), "named differently inside")
    yield Hostile("A5", "two-roots.pt", zipped(program(GOOD), {"../b/data.pkl": b"x"}), "beside data.pkl")
    yield Hostile("A5", "other-root.pt", other_root(), "outside the folder")
    yield Hostile("A5", "absolute.pt", zipped(program(GOOD), {"/etc/passwd": b"x"}, root="a/"), "beside data.pkl")
    yield Hostile("A5", "upper-case.pt", zipped(program(GOOD), {"DATA.PKL": program(GOOD)}), "beside data.pkl")
    yield Hostile("A5", "directory-size.pt", patched(good, at + 12, struct.pack("<I", 2**31)), "too long or not where it says")
    yield Hostile("A5", "directory-place.pt", patched(good, at + 16, struct.pack("<I", 7)), "not where it says")
    yield Hostile("A5", "record-size.pt", patched(good, cd + 20, struct.pack("<II", 10**6, 10**6)), "is damaged")
    yield Hostile("A5", "record-two-sizes.pt", patched(good, cd + 24, struct.pack("<I", 10**6)), "compressed or encrypted")
    yield Hostile("A5", "record-place.pt", patched(good, cd + 42, struct.pack("<I", 10**6)), "lies apart")
    yield Hostile(
        "A5", "zip64.pt", good[:at] + b"PK\x06\x06" + b"\xff" * 52 + b"PK\x06\x07" + bytes(16) + good[at:], "too long"
    )
    yield Hostile("A5", "checksum.pt", good.replace(DATA, DATA[::-1], 1), "its checksum differs")


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def duplicate() -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = io.BytesIO(zipped(program(GOOD)))
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr("a/data.pkl", program(GOOD))
    return out.getvalue()


def overlap() -> bytes:
    """Two records in the same bytes."""
    good = zipped(program(GOOD), {"data/1": DATA})
    first, second = (good.index(b"PK\x01\x02", i) for i in (good.index(b"PK\x01\x02") + 1, good.index(b"a/data/1", 1) + 9))
    return patched(good, second + 42, good[first + 42 : first + 46])


def zip_with_gap() -> bytes:
    """Bytes between two records that belong to none, with the directory moved along."""
    good, gap = zipped(program(GOOD)), b"g" * 7
    cut = good.index(b"PK\x03\x04", 4)
    end = good.rindex(b"PK\x05\x06")
    out = bytearray(good[:cut] + gap + good[cut:])
    struct.pack_into("<I", out, end + 7 + 16, struct.unpack_from("<I", good, end + 16)[0] + 7)
    at = out.index(b"PK\x01\x02")
    while (at := out.find(b"PK\x01\x02", at + 1)) > 0:
        struct.pack_into("<I", out, at + 42, struct.unpack_from("<I", out, at + 42)[0] + 7)
    return bytes(out)


def other_root() -> bytes:
    out = io.BytesIO(zipped(program(GOOD)))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("b/data/1", DATA)
    return out.getvalue()


def many_records() -> bytes:
    """A directory of 200,000 records."""
    entry = b"PK\x01\x02" + bytes(42)
    directory = entry * 200_000
    end = b"PK\x05\x06" + bytes(4) + struct.pack("<HHIIH", 65535, 65535, len(directory), 4, 0)
    return b"PK\x03\x04" + directory + end


def headers(canary: str) -> Iterator[Hostile]:
    """A6: safetensors that describe their bytes falsely. A8: text that would be more than text."""

    def lie(name: str, header: object, says: str, body: bytes = DATA, attack: str = "A6") -> Hostile:
        return Hostile(attack, f"{name}.safetensors", safetensors(header, body), says)

    pair = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
    yield lie("overlap", {**pair, "b": {**pair["b"], "data_offsets": [4, 12]}}, "overlaps another", DATA[:12])
    yield lie("same-bytes", {**pair, "b": pair["a"]}, "overlaps another", DATA[:8])
    yield lie("gap", {**pair, "b": {**pair["b"], "data_offsets": [12, 20]}}, "4 bytes unused", DATA + bytes(4))
    yield lie("gap-at-start", one(offsets=[4, 20]), "4 bytes unused", DATA + bytes(4))
    yield lie("tail", one(), "3 bytes after the last tensor", DATA + b"abc")
    yield lie("only-tail", {}, "16 bytes after the last tensor")
    yield lie("out-of-range", one(shape=[2**20], offsets=[0, 2**22]), "is at bytes 0 to 4194304 of 16")
    yield lie("truncated-data", one(), "is at bytes 0 to 16 of 9: truncated", DATA[:9])
    yield lie("reversed", one(offsets=[16, 0]), "is at bytes 16 to 0")
    yield lie("negative-offset", one(offsets=[-16, 0]), "not two numbers >= 0")
    yield lie("float-offset", b'{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0.0,16]}}', "only whole numbers")
    yield lie("bool-offset", one(shape=[], offsets=[False, True], dtype="U8"), "not two numbers", b"x")
    yield lie("three-offsets", one(offsets=[0, 16, 16]), "not two numbers")
    yield lie("no-offsets", one(offsets=None), "not two numbers")
    yield lie("size", one(shape=[3, 2]), "needs 24 bytes, has 16")
    yield lie("dtype-size", one(dtype="F64"), "needs 32 bytes, has 16")
    yield lie("dtype-unknown", one(dtype="F128"), "has dtype 'F128'")
    yield lie("dtype-python", one(dtype="torch.float32"), "has dtype 'torch.float32'")
    yield lie("dtype-list", one(dtype=["F32"]), "has dtype ['F32']")
    yield lie("dtype-none", one(dtype=None), "has dtype None")
    yield lie("shape-negative", one(shape=[-2, -2]), "impossible shape")
    yield lie("shape-text", one(shape="22"), "impossible shape")
    yield lie("shape-bool", one(shape=[True, True, 4]), "impossible shape")
    yield lie("shape-nested", one(shape=[[2, 2]]), "impossible shape")
    yield lie("shape-overflow", one(shape=[2**32, 2**32]), "impossible shape")
    yield lie("shape-overflow-to-16", one(shape=[2**62 + 1, 4]), "impossible shape")
    yield lie("shape-overflow-empty", one(shape=[0, 2**62, 2**62], offsets=[0, 0]), "impossible shape", b"")
    yield lie("shape-rank", one(shape=[1] * 100 + [4]), "impossible shape")
    yield lie("field-missing", {"w": {"dtype": "F32", "shape": [2, 2]}}, "not described by exactly")
    yield lie("field-more", one(code="os.system"), "not described by exactly")
    yield lie("entry-list", {"w": ["F32", [2, 2], [0, 16]]}, "not described by exactly")
    yield lie("entry-text", {"w": "F32"}, "not described by exactly")
    yield lie(
        "key-twice",
        b'{"w":' + json.dumps(one()["weight"]).encode() + b',"w":' + json.dumps(one()["weight"]).encode() + b"}",
        "key 'w' twice",
    )
    yield lie("field-twice", b'{"w":{"dtype":"F32","dtype":"F64","shape":[2,2],"data_offsets":[0,16]}}', "key 'dtype' twice")
    yield lie("not-json", b"{'w': 1}", "is not JSON")
    yield lie("json-cut", b'{"w":{"dtype":"F32"', "is not JSON")
    yield lie("json-two", b"{}{}", "is not JSON")
    yield lie("not-utf8", b'{"\xff\xfe":1}', "is not JSON")
    yield lie("nan", b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', "only whole numbers")
    yield lie("bool-7", one(dtype="BOOL", shape=[16]), "bytes other than 0 and 1")
    yield lie("empty", {}, "holds no tensors", b"")
    yield lie("metadata-number", {"__metadata__": {"a": 1}, **one()}, "not a map from text to text")
    yield lie("metadata-nested", {"__metadata__": {"a": {"b": "c"}}, **one()}, "not a map from text to text")
    yield lie("metadata-list", {"__metadata__": ["a"], **one()}, "not a map from text to text")
    yield lie("metadata-twice", b'{"__metadata__":{"a":"b"},"__metadata__":{"a":"c"}}', "key '__metadata__' twice", b"")
    yield Hostile(
        "A6", "length-beyond.safetensors", safetensors(one(), length=10**6), "the header ends at byte 1000008, the file at "
    )
    yield Hostile("A6", "length-short.safetensors", safetensors(one(), length=20), "is not JSON")
    yield Hostile("A6", "header-alone.safetensors", safetensors(one())[:8] + b"{", "truncated safetensors")

    words = {
        "format": f"__import__('os').system('touch {canary}')",
        "class": "os.system",
        "adapter": "subprocess:Popen",
        "yaml": f"!!python/object/apply:os.system ['touch {canary}']",
        "json": '{"__class__": "os.system", "py/reduce": ["os.system"]}',
        "template": "{{ ''.__class__.__mro__ }} %(x)s ${jndi:ldap://localhost}",
        "html": "</style><script>alert(1)</script>",
        "bidi": "\u202e\u2066 gnp.exe",
        "deep": '{"a":' * 2000,
    }
    yield lie("metadata-code", {"__metadata__": words, **one()}, "", attack="A8")
    yield lie("metadata-surrogate", b'{"__metadata__":{"a":"\\ud800"},"w":{}}', "not Unicode", b"", "A8")
    entry = one()["weight"]
    yield lie("name-bidi", {"wei\u202eght": entry}, "not printable", attack="A8")
    yield lie("name-newline", {"w\nerror: all is well": entry}, "not printable", attack="A8")
    yield lie("name-escape", {"\x1b[2J": entry}, "not printable", attack="A8")
    yield lie("name-surrogate", b'{"\\ud800":' + json.dumps(entry).encode() + b"}", "not printable", attack="A8")
    yield lie("name-long", {"w" * 5000: entry}, "longer than 1024", attack="A8")
    yield lie(
        "name-of-python",
        {
            "__class__.__init__.__globals__": entry,
        },
        "",
        attack="A8",
    )
    yield Hostile("A8", "name-escape.pt", zipped(program(named(("\x1b[2J", tensor())))), "not printable")
    yield Hostile("A8", "name-long.pt", zipped(program(named(("w" * 5000, tensor())))), "longer than 1024")
    yield Hostile("A8", "name-surrogate.pt", zipped(program(named(("\ud800", tensor())))), "not printable")


def floods(canary: str) -> Iterator[Hostile]:
    """A7: a small file that would cost much memory or time. Made when they are needed: some are 16 MiB."""
    cap, put, get = 16 * 2**20, b"q\x00", b"h\x00"
    over = f"more than the {cap} that are read"

    def entries(count: int) -> bytes:
        return b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(count))

    tens = [("x0", b"](" + number(1) * 10 + b"eq\x00")]
    tens += [(f"x{i}", b"](" + b"h%c" % (i - 1) * 10 + b"eq%c" % i) for i in range(1, 20)]

    def laughing(key: bool = False) -> bytes:
        """A list of ten lists of ten lists ..., twenty deep, where a length or a name should be."""
        if key:
            return named(*tens) + b"h\x13" + number(1) + b"s"
        where = tup(text("storage"), glob("torch.FloatStorage"), text("0"), text("cpu"), b"h\x13") + b"Q"
        return named(*tens, ("w", tensor(where=where)))

    def wide() -> bytes:
        parts = ("a", b"](" + number(1) * 200 + b"eq\x01"), ("n" * 10**6, b"](" + b"h\x01" * 200 + b"e")
        return zipped(program(named(("w", tensor()), *parts)))

    def same_tensor(count: int) -> bytes:
        rest = b"".join(text(f"w{i}") + get for i in range(1, count))
        return zipped(PROTO + b"}(" + text("w0") + tensor() + put + rest + b"u.")

    made: dict[str, tuple[Callable[[], bytes], str]] = {
        "header-huge.safetensors": (lambda: safetensors(one(), length=2**63), over),
        "header-over-cap.safetensors": (lambda: safetensors(b"{" + b" " * cap), over),
        "million-tensors.safetensors": (lambda: safetensors(b"{" + entries(300_000) + b"}", b""), over),
        "many-tensors.safetensors": (lambda: safetensors(b"{" + entries(70_000) + b"}", b""), "lists 70000 tensors"),
        "spaces.safetensors": (lambda: safetensors(b"{" + b" " * (cap - 1)), "is not JSON"),
        "deep-lists.safetensors": (lambda: safetensors(b'{"a":' + b"[" * 10**6), "nested too deeply"),
        "deep-objects.safetensors": (lambda: safetensors(b'{"a":' * 10**6), "nested too deeply"),
        "escaped-tensors.safetensors": (
            lambda: safetensors(b"{" + entries(70_000).replace(b"data_", b"data\\u005f") + b"}", b""),
            "lists 70000 tensors",
        ),
        "same-key.safetensors": (lambda: safetensors(b"{" + b'"a":1,' * 10**6 + b'"a":1}'), "key 'a' twice"),
        "last-key.safetensors": (lambda: safetensors(b"{" + entries(60_000) + b',"59999":1}', b""), "key '59999' twice"),
        "long-number.safetensors": (lambda: safetensors(b'{"w":[' + b"9" * 10**6 + b"]}"), "1000000 digits"),
        "long-shape.safetensors": (lambda: safetensors(one(shape=[1] * 10**6)), "impossible shape"),
        "many-tensors.pt": (lambda: same_tensor(66_000), "66000 tensors, more than the 65536"),
        "million-instructions.pt": (lambda: zipped(PROTO + b"}" + put * 10**6 + STOP), "more than 500000 instructions"),
        "pickle-over-cap.pt": (lambda: zipped(PROTO + b"N" * (cap + 1)), over),
        "circular.pt": (lambda: zipped(program(b"}" + put + text("a") + get + b"s" + text("w") + tensor() + b"s")), "circular"),
        "laughs.pt": (lambda: zipped(program(named(("w", tensor()), *tens))), "circular or hostile"),
        "laughs-as-length.pt": (lambda: zipped(program(laughing())), "length [[["),
        "laughs-as-name.pt": (lambda: zipped(program(laughing(key=True))), "a dict with a list as key"),
        "deep-tuples.pt": (lambda: zipped(program(named(("w", tensor()), ("x", b"N" + b"\x85" * 10**5)))), "deeper than 32"),
        "wide-names.pt": (wide, "longer than 1024"),
        "memo-far.pt": (lambda: zipped(program(b"}r\xff\xff\xff\xff" + text("w") + tensor() + b"s")), ""),
        "long-integer.pt": (lambda: zipped(PROTO + b"\x8b@B\x0f\x00" + b"\x7f" * 10**6 + STOP), "instruction LONG4"),
        "digits.pt": (lambda: zipped(PROTO + b"I" + b"9" * 10**6 + b"\n."), "broken pickle"),
        "stride-0-of-one.pt": (lambda: zipped(program(named(("w", tensor((2**30,), (0,)))))), "not within its storage"),
        "deflated-bomb.pt": (lambda: zipped(program(GOOD), {"data/1": bytes(2**25)}, zipfile.ZIP_DEFLATED), "compressed or"),
        "npz-bomb.pt": (lambda: zipped(None, {"w.npy": bytes(2**25)}, zipfile.ZIP_DEFLATED, ""), "a zip without data.pkl"),
        "million-records.pt": (many_records, "too long or not where it says"),
    }
    for name, (make, says) in made.items():
        yield Hostile("A7", name, lambda path, make=make: path.write_bytes(make()), says)


def odd_files(canary: str) -> Iterator[Hostile]:
    """A9: damage. A10: things that are not files. A11: other formats."""
    good = safetensors(one())
    yield Hostile("A9", "missing.safetensors", None, "no such file")
    yield Hostile("A9", "zero.safetensors", b"", "is empty (0 bytes)")
    yield Hostile("A9", "zero.pt", b"", "is empty (0 bytes)")
    yield Hostile("A9", "four.safetensors", good[:4], "neither safetensors nor")
    yield Hostile("A9", "eight.safetensors", good[:8], "neither safetensors nor")
    yield Hostile("A9", "truncated.safetensors", good[:30], "truncated safetensors")
    yield Hostile("A9", "data-cut.safetensors", good[:-1], "truncated, or out of range")
    yield Hostile("A9", "zeros.pt", bytes(4096), "neither safetensors nor")
    yield Hostile("A9", "noise.pt", bytes(range(256)) * 4, "neither safetensors nor")

    yield Hostile("A10", "folder.safetensors", lambda path: path.mkdir(), "is a directory")
    yield Hostile("A10", "pipe.pt", lambda path: os.mkfifo(path), "a device, pipe or socket")
    yield Hostile("A10", "zero-device.pt", lambda path: path.symlink_to("/dev/zero"), "a device, pipe or socket")
    yield Hostile("A10", "random-device.safetensors", lambda path: path.symlink_to("/dev/urandom"), "a device, pipe or socket")
    yield Hostile("A10", "to-folder.pt", lambda path: path.symlink_to("/"), "is a directory")
    yield Hostile("A10", "dangling.pt", lambda path: path.symlink_to(path.with_name("nowhere")), "no such file")
    yield Hostile("A10", "loop.pt", lambda path: path.symlink_to(path), "cannot be read")
    yield Hostile("A10", "socket.pt", _socket, "a device, pipe or socket")
    yield Hostile("A10", "proc.pt", lambda path: path.symlink_to("/proc/self/environ"), "is empty (0 bytes)")
    yield Hostile("A10", "nul\0name.pt", None, "cannot be read")
    yield Hostile("A10", "x" * 300 + ".pt", None, "cannot be read")

    yield Hostile("A11", "hdf5.pt", b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file")
    yield Hostile("A11", "gguf.pt", b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file")
    yield Hostile("A11", "gzip.pt", b"\x1f\x8b\x08\0" + bytes(100), "a gzip file")
    yield Hostile("A11", "seven.pt", b"7z\xbc\xaf\x27\x1c" + bytes(100), "a 7z archive")
    yield Hostile("A11", "array.npz", zipped(None, {"w.npy": b"\x93NUMPY"}, root=""), "a zip without data.pkl")
    yield Hostile("A11", "docx.pt", zipped(None, {"word/document.xml": b"<x/>"}, root=""), "a zip without data.pkl")
    yield Hostile("A11", "plain.tar", tarred({"w.safetensors": good}), "tar archive")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
    yield Hostile("A11", "pointer.safetensors", pointer, "git lfs pull")
    yield Hostile("A11", "page.safetensors", b"<!DOCTYPE html><html>404</html>", "the download failed")
    yield Hostile("A11", "index.json", b'{"metadata": {"total_size": 1}, "weight_map": {}}', "JSON text")
    yield Hostile("A11", "keras.pb", b"\x08\x01\x12\x04" + bytes(100), "neither safetensors nor")


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def hostile(folder: Path) -> list[Hostile]:
    canary = str(folder / CANARY)
    return [file for family in (calls, changes, zips, headers, floods, odd_files) for file in family(canary)]


def good_files() -> dict[str, bytes]:
    """One sound file of each format."""
    return {
        "good.safetensors": safetensors(one()),
        "good.pt": zipped(program(GOOD)),
        "good-legacy.pth": legacy(legacy_tensor()),
    }


def make(folder: Path, file: Hostile) -> Path:
    path = folder / file.name
    if callable(file.content):
        file.content(path)
    elif file.content is not None:
        path.write_bytes(file.content)
    return path


# --- the trial ------------------------------------------------------------------------------------------------------------

#: What loading may do, as Python names it: look at the file, and open it for reading.
HARMLESS = {"open"}


def trial(folder: Path) -> dict[str, Any]:
    """Load every file under an audit hook: {"results": {file: ...}, "control": ..., "growth": MiB}."""
    from scores.checkpoint import load_weights

    seen: list[tuple[str, str]] = []
    active = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active:
            seen.append((event, repr(arguments)[:200]) if event != "open" else (event, _mode(arguments)))

    files = hostile(folder)
    for name, content in good_files().items():  # so that whatever torch imports on its first call is imported
        (folder / name).write_bytes(content)
        load_weights(folder / name)
    sys.addaudithook(hook)
    results: dict[str, Any] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in files:
        path = make(folder, file)
        seen.clear()
        start = time.process_time()
        active = True
        try:
            load_weights(path)
            error: BaseException | None = None
        except BaseException as raised:  # a sound trial lets nothing end it
            error = raised
        active = False
        results[f"{file.attack} {file.name}"] = {
            "error": type(error).__name__ if error else None,
            "says": str(error) if error else "",
            "seconds": time.process_time() - start,
            "events": [event for event in seen if event[0] not in HARMLESS or event == ("open", "write")],
        }
        if file.attack == "A7":
            path.unlink()
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    executed = (folder / CANARY).exists()
    seen.clear()
    active = True  # the hook and the canary work: this is what a plain unpickler does
    pickle.loads(program(glob("os.system") + tup(text(f"touch {folder / CANARY}")) + b"R"))  # noqa: S301
    active = False
    control = {"events": sorted({event for event, _ in seen}), "executed": (folder / CANARY).exists()}
    return {"results": results, "executed": executed, "control": control, "growth": growth}


def _mode(arguments: tuple[Any, ...]) -> str:
    _, mode, flags = arguments
    writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    return "write" if writes or (isinstance(mode, str) and set(mode) & set("wax+")) else "read"


if __name__ == "__main__":
    print(json.dumps(trial(Path(sys.argv[1]))))  # noqa: T201
