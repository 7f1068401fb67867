"""Where results come from: digests of code and weights, versions, the commit. Nothing of the environment is recorded."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path as File
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sde.prediction import Predictor

ROOT = File(__file__).parent.parent

#: What samples and metrics are computed by; the rest of ``benchmarks`` only handles or shows them.
SOURCES = ("sde", "scores", "solvers")
MEASURING = ("problems", "laws", "endpoints", "networks", "models", "lines", "making", "rows", "metrics", "peers", "weights")


@functools.cache
def code() -> dict[str, str]:
    """What results are a function of besides their settings: the toolkit's sources, and the versions that set rounding."""
    found = hashlib.sha256()
    for path in sorted(_sources()):
        data = path.read_bytes()
        found.update(f"{path.relative_to(ROOT).as_posix()} {len(data)}\n".encode())
        found.update(data)
    return {"toolkit": found.hexdigest()[:16], "torch": str(torch.__version__), "numpy": np.__version__}


def _sources() -> Iterator[File]:
    for package in SOURCES:
        yield from (ROOT / package).rglob("*.py")
    here = ROOT / "benchmarks"
    for name in MEASURING:
        one = here / f"{name}.py"
        yield from [one] if one.is_file() else []
        yield from (p for p in (here / name).rglob("*") if p.suffix in (".py", ".safetensors"))


def named(metrics: Iterable[str]) -> dict[str, str]:
    """Digests of the files and folders that metrics name, such as reference statistics: numbers depend on them."""
    words = {word for text in metrics for word in re.split("[:=,]", text)[1:] if re.search(r"[./\\]", word)}
    return {word: _contents(File(word)) for word in sorted(words) if File(word).exists()}


def _contents(path: File) -> str:
    found = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        found.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
        with open(file, "rb") as data:
            while piece := data.read(1 << 20):
                found.update(piece)
    return found.hexdigest()[:16]


def sources(names: Iterable[str]) -> str:
    """sha256 of the source of modules, and of those that they import, as far as they are the caller's own: neither of the
    standard library, nor installed, nor of this toolkit. Modules that only a function imports are not seen.
    """
    found, todo, files = hashlib.sha256(), sorted(set(names)), dict[str, File]()
    while todo:
        name = todo.pop()
        module = sys.modules.get(name)
        where = getattr(module, "__file__", None)
        if where is None or name in files:
            continue
        file = File(where).resolve()
        if not file.is_file() or any(file.is_relative_to(place) for place in _foreign()):
            continue
        files[name] = file
        held = list(vars(module).values())
        todo += {v.__name__ if isinstance(v, ModuleType) else getattr(v, "__module__", None) or "" for v in held} - {""}
    for name, file in sorted(files.items()):
        found.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


@functools.cache
def _foreign() -> list[File]:
    libraries = (sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
    return [*(File(p).resolve() for p in libraries if p), *(ROOT / name for name in (*SOURCES, "benchmarks"))]


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    try:
        found["score-solvers"] = metadata.version("score-solvers")
    except metadata.PackageNotFoundError:
        found["score-solvers"] = "from source"
    return found


@functools.cache
def commit() -> str:
    """The commit of the toolkit's own repository, with "+changes" where files differ from it; or "no repository"."""
    tracked = _git("ls-files", "--error-unmatch", "benchmarks/__init__.py")
    head = _git("rev-parse", "HEAD") if tracked is not None else None
    if head is None:
        return "no repository"
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, errors="replace", timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def weights(model: object) -> str:
    """sha256 of every tensor and number that can be reached from a model by public names: parameters and buffers of modules,
    attributes of scores, what functions have closed over. Two models of equal weights have equal digests.
    """
    found = hashlib.sha256()
    for name, value in _reach(model, "", set(), 0):
        found.update(f"{name}\n".encode("utf-8", "backslashreplace"))
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            found.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
            found.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
        else:
            found.update(f"{value!r}\n".encode("utf-8", "backslashreplace"))
    return found.hexdigest()


def _reach(value: Any, name: str, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    """(name, tensor or number) of what a value holds."""
    if value is None or isinstance(value, (bool, int, float, str, complex, torch.dtype)):
        yield name, value
        return
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value)) if value.dtype.kind in "fiub" else None
    if isinstance(value, Tensor):
        yield name, value
        return
    if value is None or id(value) in seen or depth > 8:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield from _module(value, name)
        return
    for key, part in _parts(value):
        yield from _reach(part, f"{name}.{key}", seen, depth + 1)


def _module(value: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Its tensors, and of each module inside the type and the plain settings; not its mode, which a score sets."""
    for key, tensor in (*value.named_parameters(), *value.named_buffers()):
        yield f"{name}.{key}", tensor
    for key, module in value.named_modules():
        yield f"{name}.{key}.type", type(module).__qualname__
        for setting, plain in sorted(vars(module).items()):
            if isinstance(plain, (bool, int, float, str)) and setting != "training" and not setting.startswith("_"):
                yield f"{name}.{key}.{setting}", plain


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(k), v) for k, v in value.items())
    elif isinstance(value, Sequence):
        yield from ((str(i), v) for i, v in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, MethodType):  # first: it shows its function's closure as its own
        yield from (("self", value.__self__), ("func", value.__func__))
    elif isinstance(value, FunctionType):
        names = value.__code__.co_freevars
        yield from ((k, c.cell_contents) for k, c in zip(names, value.__closure__ or (), strict=True) if _filled(c))
        yield "defaults", value.__defaults__ or ()
    elif isinstance(value, type) or not hasattr(value, "__dict__"):
        return
    else:
        if not isinstance(value, Predictor):
            yield "type", type(value).__name__
        yield from ((k, v) for k, v in sorted(vars(value).items()) if not k.startswith("_"))


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
