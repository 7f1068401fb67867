"""Weights from files, without running anything that is in them.

    network = NCSNpp(config)                                                # built by its own code
    load_into(network, "checkpoint_26.pth", ema=True, sha256="9f86d0...")   # then score = Score(network, path, "eps", ...)

``load_weights`` reads a file of safetensors (nothing in that format can run) or of ``torch.save`` (see ``torch_file``) into
named tensors; ``load_into`` finds a network's weights among them (see ``checkpoint_copies``); ``save_weights`` writes
safetensors. A file is read once; its sha256 is that of the bytes that were used, and is compared before anything is parsed.
Names are paths: dicts and lists in a file are flattened, "ema.shadow_params.[3]". Whatever is wrong with a file is one
``CheckpointError``. What is not defended is said in SECURITY.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sde.errors import CheckpointError, InputError, PrecisionWarning, UnverifiedWarning

from . import files, safetensors_file, torch_file
from .checkpoint_copies import choose, listed
from .files import File
from .safetensors_file import show

#: What files call the prediction, and how they call each kind.
PREDICTION_KEYS = ("predicts", "prediction_type", "parameterization")
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "velocity"}


@dataclass(frozen=True, eq=False)
class Weights(Mapping[str, Tensor]):
    """Named tensors, on the CPU, with where they come from.

    tensors   path -> tensor. Those of one file may share memory: clone before changing one in place.
    metadata  what else the file says: safetensors' own map of text, or the numbers and texts beside torch's tensors, by path.
    sha256    of the file's bytes, in hex.
    format    "safetensors", "torch" (a zip) or "torch legacy" (before torch 1.6).
    path      the file.
    notes     what was done on the way: prefix, average, casts.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""
    format: str = ""
    path: str = "weights"
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        size = sum(t.numel() * t.element_size() for t in self.tensors.values()) / 1e6
        head = f"Weights({self.path!r}, {self.format or 'given'}, {len(self)} tensors, {size:.1f} MB, sha256 {self.sha256[:12]}"
        return "; ".join((head, *self.notes)) + ")"


def load_weights(
    path: File, *, sha256: str | bool | None = None, prefix: str = "", expect: Mapping[str, Any] | None = None
) -> Weights:
    """All named tensors of a file.

    sha256  the digest (64 hex digits) that the file must have. True: the one in ``path + ".sha256"``, as sha256sum writes it;
            where there is none, UnverifiedWarning. None: the digest is recorded, not compared.
    prefix  keep the names that begin with it, and take it off.
    expect  what the caller believes of the file, {"predicts": "v", "sigma_data": 0.5}. Where the file says otherwise it is an
            error; where it says nothing, a note. A key is that of an entry of ``metadata``, or its last component; entries
            that are JSON objects are looked into.

    Cost: the file's size in memory for safetensors, twice that for torch. A symbolic link is followed (model caches
    are full of them); what is not a regular file then is refused.

    Errors: CheckpointError for anything wrong with the file, InputError for the arguments, UnverifiedWarning.
    """
    shown = _shown(path)
    try:
        wanted = _digest(path, sha256, shown)
        kind, data = files.read(path)
        digest = hashlib.sha256(data).hexdigest()
        if wanted and digest != wanted:
            raise CheckpointError(f"sha256 differs: is {digest[:16]}..., wanted {wanted[:16]}...; damaged, or another file")
        tensors, metadata = _parse(kind, data)
        if not tensors:
            raise CheckpointError("holds no tensors")
        tensors = _under(tensors, prefix)
        return Weights(tensors, metadata, digest, kind, shown, _agree(metadata, expect or {}))
    except CheckpointError as error:
        raise _named(shown, error) from error.__cause__
    except MemoryError as error:
        raise _named(shown, "does not fit into this machine's memory") from error


def load_into(
    network: nn.Module,
    source: File | Mapping[str, Tensor],
    *,
    ema: bool | str | None = None,
    prefix: str | None = None,
    strict: bool = True,
    sha256: str | bool | None = None,
    expect: Mapping[str, Any] | None = None,
) -> Weights:
    """Load a network's weights from a file, or from tensors at hand; returns them under the network's names.

    ema      True: the moving average, of which there must be one. False: the weights as trained. A name ("model_ema2"): that
             copy. None: the file must hold one copy of the network.
    prefix   a copy whose names begin with it.
    strict   False: parameters and buffers that are missing keep their values, names that are unexpected are left.
    sha256, expect   as in ``load_weights``.

    What an average lacks (buffers, parameters that are not trained) comes from the weights as trained. float16 and bfloat16
    weights widen to float32 exactly, and ``notes`` say so; rounding to fewer bits is a PrecisionWarning. All checks come
    before the first change: after an error the network is as it was. Its mode, device and dtypes stay.

    Errors: CheckpointError for missing, unexpected and misshapen weights, for NaN anywhere and inf in a parameter.
    """
    if not isinstance(network, nn.Module):
        raise InputError(f"network is {type(network).__name__}: give the torch.nn.Module to load into, built by its own code")
    if not (ema is None or isinstance(ema, (bool, str))):
        raise InputError(f"ema={ema!r}: give True, False, the name of a copy in the file, or None")
    if not isinstance(source, Mapping):
        weights = load_weights(source, sha256=sha256, expect=expect)
    elif sha256 is not None or expect is not None:
        raise InputError("sha256 and expect are for files: give them to load_weights")
    else:
        weights = source if isinstance(source, Weights) else Weights(dict(source))
    try:
        chosen, notes = choose(network, weights.tensors, ema, prefix, strict)
        notes += _check_values(network, chosen)
        network.load_state_dict(chosen, strict=False)
    except CheckpointError as error:
        raise _named(weights.path, error) from error.__cause__
    except RuntimeError as error:  # a network with loading code of its own
        raise _named(weights.path, f"{type(network).__name__} refused it: {torch_file.first_line(error)}") from error
    return replace(weights, tensors=chosen, notes=(*weights.notes, *notes))


def save_weights(
    source: nn.Module | Mapping[str, Tensor], path: File, *, metadata: Mapping[str, str | float | bool] | None = None
) -> str:
    """Write safetensors, whole or not at all; returns the file's sha256. The same weights and words give the same bytes.

    A network's state_dict, or named tensors (dense, of any device; shared ones are written twice). Metadata is text; numbers
    are written as JSON. The file is written beside its place under a name of its own, flushed to the disk, and moved there.

    Errors: InputError for what cannot be written, CheckpointError where the place cannot be.
    """
    tensors = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise InputError(f"{show(name)} is {type(tensor).__name__}: save_weights writes dense tensors that hold numbers")
        if tensor.dtype not in safetensors_file.DTYPES.values():
            raise InputError(f"{show(name)} is {_short(tensor.dtype)}, for which safetensors has no name")
        if not isinstance(name, str) or name == "__metadata__":
            raise InputError(f"the name {show(name)} cannot be a tensor's")
        safetensors_file.check_name(name)
    words: dict[str, str] = {}
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, (str, int, float)):
            raise InputError(f"metadata[{show(key)}] is {type(value).__name__}: give text or a number")
        words[key] = value if isinstance(value, str) else json.dumps(value)
    header, ordered = safetensors_file.pack(tensors, None if metadata is None else words)
    try:
        return files.write(path, header, ordered)
    except CheckpointError as error:
        raise _named(_shown(path), error) from error.__cause__


# --- what a file holds ----------------------------------------------------------------------------------------------------


def _parse(kind: str, data: bytearray | bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(data, bytearray):
        tensors, words = safetensors_file.read(data)
        return tensors, dict(words)
    if kind == "pickle":
        torch_file.read_pickle(data)
    return torch_file.read_zip(data) if kind == "torch" else torch_file.read_legacy(data)


def _digest(path: File, sha256: str | bool | None, shown: str) -> str | None:
    """The digest to compare with, in lower case."""
    if sha256 is None or sha256 is False:
        return None
    if sha256 is not True:
        if not (isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{64}", sha256)):
            raise InputError(f"sha256={show(sha256)}: give 64 hex digits, True or None")
        return sha256.lower()
    beside = os.fspath(path) + ".sha256"
    try:
        found = re.match(b"[0-9a-fA-F]{64}(?![0-9a-fA-F])", files.contents(beside, 4096))
    except FileNotFoundError:
        message = f"{shown} is unverified: no sha256 was given, and there is no file {shown}.sha256"
        warnings.warn(message, UnverifiedWarning, stacklevel=3)
        return None
    if not found:
        raise CheckpointError(f"{show(os.path.basename(beside))} does not begin with 64 hex digits, as sha256sum writes them")
    return found[0].decode("ascii").lower()


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    kept = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not kept or "" in kept:
        raise CheckpointError(f"prefix={show(prefix)} is in front of no name; there are {listed(tensors)}")
    return kept


def _agree(metadata: Mapping[str, Any], expect: Mapping[str, Any]) -> tuple[str, ...]:
    """Compare what is believed of a file with what it says; what it does not say is noted."""
    said = dict(_said(metadata)) if expect else {}
    silent = []
    for key, belief in expect.items():
        keys = PREDICTION_KEYS if key in PREDICTION_KEYS else (key,)
        about = {name: value for name, value in said.items() if name == key or name.rsplit(".", 1)[-1] in keys}
        for name, value in about.items():
            if not _same(value, belief):
                raise CheckpointError(f"says {show(name)} is {show(value)}, where {key}={show(belief)} is expected")
        if not about:
            silent.append(key)
    return (f"the file does not say: {', '.join(silent)}",) if silent else ()


def _said(metadata: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in metadata.items():
        yield name, value
        if isinstance(value, str) and value[:1] == "{":
            with contextlib.suppress(ValueError, RecursionError):  # text that only looks like JSON says nothing
                yield from torch_file.flatten({name: json.loads(value)}).items()


def _same(said: Any, belief: Any) -> bool:
    if isinstance(belief, bool):
        return said is belief or said == json.dumps(belief)
    if isinstance(belief, str):
        return PREDICTIONS.get(str(said), str(said)) == PREDICTIONS.get(belief, belief)
    try:
        return math.isclose(float(said), float(belief), rel_tol=1e-6)
    except (TypeError, ValueError):
        return str(said) == str(belief)


# --- values ---------------------------------------------------------------------------------------------------------------


def _check_values(network: nn.Module, chosen: Mapping[str, Tensor]) -> list[str]:
    """Notes on the casts; CheckpointError for values that no weight has, PrecisionWarning for rounding."""
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    casts: dict[tuple[torch.dtype, torch.dtype], int] = defaultdict(int)
    for name, goal in network.state_dict().items():
        if name not in chosen:
            continue
        tensor = chosen[name]
        if goal.is_meta:
            raise CheckpointError(f"{show(name)} of the network is on the meta device: network.to_empty(device='cpu') first")
        if not _castable(tensor.dtype, goal.dtype):
            raise CheckpointError(f"{show(name)} is {_short(tensor.dtype)} in the file and {_short(goal.dtype)} in the network")
        if tensor.dtype != goal.dtype:
            casts[tensor.dtype, goal.dtype] += 1
        bad = _not_finite(tensor.to(goal.dtype), allow_inf=name not in parameters)
        if bad:
            cast = "" if tensor.dtype == goal.dtype else f" as {_short(goal.dtype)}"
            raise CheckpointError(f"{show(name)} holds {bad} values that are not finite{cast}, of {tensor.numel()}")
    for (old, new), count in casts.items():
        if _is_real(new) and new.itemsize <= old.itemsize:
            message = f"{count} tensors are rounded from {_short(old)} to {_short(new)}, the network's dtype"
            warnings.warn(message, PrecisionWarning, stacklevel=3)
    return [f"{count} tensors {_short(old)} -> {_short(new)}" for (old, new), count in casts.items()]


def _castable(old: torch.dtype, new: torch.dtype) -> bool:
    """Numbers stay numbers of their kind; whole ones keep their values, others may be rounded."""
    if old == new or _is_real(old) or _is_real(new):
        return old == new or (_is_real(old) and _is_real(new) and old.is_complex == new.is_complex)
    if torch.bool in (old, new):
        return False
    return torch.iinfo(new).min <= torch.iinfo(old).min and torch.iinfo(old).max <= torch.iinfo(new).max


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _not_finite(tensor: Tensor, allow_inf: bool) -> int:
    """How many values are NaN, or inf where that is no value either (a mask may hold it, a weight may not)."""
    if not _is_real(tensor.dtype):
        return 0
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # floats of 8 bits have no isfinite
    return int((wide.isnan() if allow_inf else ~wide.isfinite()).sum())


# --- words ----------------------------------------------------------------------------------------------------------------


def _named(shown: str, why: object) -> CheckpointError:
    text = f"{shown}: {why}"
    return CheckpointError(text if len(text) < 400 else f"{text[:390]}...")


def _shown(path: File) -> str:
    try:
        text = repr(os.fspath(path))[1:-1]
    except TypeError:
        raise InputError(f"path is {type(path).__name__}: give the name of a file") from None
    return text if len(text) <= 100 else f"...{text[-97:]}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
