"""Weights from files: what is read, what of it goes into a network, and what is refused.

Hostile and broken files are made by ``hostile.py`` and loaded in one process of their own under an audit hook. The numbers
A1, A2, ... are the attacks of SECURITY.md; ``test_security.py`` checks that each has its tests here.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import io
import json
import os
import random
import re
import resource
import stat
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import safetensors.torch as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import problems
from benchmarks.networks import DigitNetwork
from scores import checkpoint_copies, files, safetensors_file, torch_file
from scores.checkpoint import Weights, load_into, load_weights, save_weights
from sde.errors import CheckpointError, InputError, PrecisionWarning, UnverifiedWarning

ROOT = Path(__file__).resolve().parent.parent
DIGITS = "5a1c0b02a9336dff96bdef3b3b8fc6c8c1c9f7369350c4c63729593e53a98512"
SAVERS: dict[str, Callable[[Any, Path], object]] = {
    "safetensors": lambda tensors, path: reference.save_file(tensors, path),
    "torch": lambda tensors, path: torch.save(tensors, path),
    "torch legacy": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
}


class Net(nn.Module):
    """Weights, buffers of two dtypes, and a parameter that is not trained."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.fourier = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.first = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 2)


def net(seed: int, width: int = 3) -> Net:
    """Every tensor random, no two networks alike."""
    made, generator = Net(width), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in made.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator) if value.is_floating_point() else torch.tensor(seed))
    return made


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def clear(error: BaseException, says: str = "") -> None:
    text = str(error)
    assert type(error) is CheckpointError, f"{type(error).__name__}: {text}"
    assert len(text) < 400
    assert text.isprintable()
    for part in says.split("|"):
        assert part in text, f"{part!r} not in {text!r}"


# --- reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAVERS)
def test_what_was_saved_is_read(kind: str, tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(3, 4),
        "b": torch.arange(6, dtype=torch.int64).reshape(1, 2, 3),
        "c": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 5),
        "half": torch.randn(7).half(),
        "bf": torch.randn(5).bfloat16(),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(256, dtype=torch.uint8),
    }
    path = tmp_path / "w.file"
    SAVERS[kind](tensors, path)
    weights = load_weights(path)
    assert weights.format == kind
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(weights) == set(tensors)
    for name, tensor in tensors.items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor)
        assert not weights[name].requires_grad
    assert kind in repr(weights)
    assert "8 tensors" in repr(weights)


def test_the_reference_library_writes_the_same_bytes(tmp_path: Path) -> None:
    """All dtypes, in the library's order; names and metadata beyond ASCII; one entry of metadata (it shuffles several)."""
    tensors = {f"t{i}.é": torch.zeros(i + 1, dtype=d) for i, d in enumerate(safetensors_file.DTYPES.values())}
    tensors |= {"b": torch.randn(3, 2), "a": torch.randn(0, 2), "s": torch.tensor(1.0)}
    words = {"about": 'tab \t, quote ", bell \x07, ü, \u2028'}
    ours = safetensors_file.encode(tensors, words)
    assert ours == reference.save(tensors, words)
    assert safetensors_file.encode(tensors) == reference.save(tensors)
    path = tmp_path / "all.safetensors"
    assert save_weights(tensors, path, metadata=words) == hashlib.sha256(ours).hexdigest()
    assert path.read_bytes() == ours
    read = load_weights(path)
    assert dict(read.metadata) == words
    assert {n: (t.dtype, t.shape) for n, t in read.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
    several = safetensors_file.encode(tensors, {"b": "2", "a": "1"})
    assert several == safetensors_file.encode(dict(reversed(tensors.items())), {"a": "1", "b": "2"})


NAMES = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 3), max_size=4)


@settings(max_examples=60)
@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from(list(safetensors_file.DTYPES.values())), SHAPES), min_size=1, max_size=5)
)
def test_any_tensors_come_back(
    tmp_path_factory: pytest.TempPathFactory, about: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    about.pop("__metadata__", None)
    tensors = {n: torch.randint(0, 2, shape).to(dtype) for n, (dtype, shape) in about.items()} or {"x": torch.ones(1)}
    path = tmp_path_factory.mktemp("any") / "w.safetensors"
    digest = save_weights(tensors, path)
    for read in (load_weights(path, sha256=digest).tensors, reference.load_file(path)):
        assert set(read) == set(tensors)
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert read[name].shape == tensor.shape
            assert torch.equal(bits(read[name]), bits(tensor))


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_tensors_need_not_be_aligned(tmp_path: Path) -> None:
    """The format allows a header of any length and a float after a byte; torch needs floats at multiples of four."""
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "c": {"dtype": "F64", "shape": [1], "data_offsets": [9, 17]},
    }
    path = tmp_path / "w.safetensors"
    for pad in range(4):
        text = json.dumps(header).encode() + b" " * pad
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x07" + struct.pack("<ff", 1.5, -2) + struct.pack("<d", 3))
        read = load_weights(path)
        assert (read["a"].item(), read["b"].tolist(), read["c"].item()) == (7, [1.5, -2.0], 3.0)


def test_safetensors_are_not_copied(tmp_path: Path) -> None:
    save_weights(net(1), tmp_path / "w.safetensors")
    read = load_weights(tmp_path / "w.safetensors")
    assert len({t.untyped_storage().data_ptr() for t in read.values()}) == 1


def test_nested_files_become_paths(tmp_path: Path) -> None:
    state = net(0).state_dict()
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}}
    optimiser = {"state": moments, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "fused": None, "params": [0, 1]}]}
    nested = {
        "step": 12,
        "model": state,
        "parameter": nn.Parameter(torch.ones(2)),
        "ema": {"decay": 0.999, "shadow_params": [torch.ones(2), torch.zeros(3)]},
        "optimizer": optimiser,
        "pair": (torch.ones(1), "text", None, True),
        "size": torch.Size([2, 3]),
        "dtype": torch.float32,
        7: torch.full((1,), 7.0),
    }
    path = tmp_path / "w.pt"
    for kind in ("torch", "torch legacy"):
        SAVERS[kind](nested, path)
        read = load_weights(path)
        assert torch.equal(read["ema.shadow_params.[1]"], torch.zeros(3))
        assert torch.equal(read["model.first.weight"], state["first.weight"])
        assert not read["parameter"].requires_grad
        assert read["7"].item() == 7
        assert read["pair.[0]"].item() == 1
        said = read.metadata
        assert (said["step"], said["ema.decay"], said["pair.[1]"], said["pair.[3]"], said["size.[1]"]) == (
            12,
            0.999,
            "text",
            True,
            3,
        )
        assert said["optimizer.param_groups.[0].lr"] == 1e-3
        assert torch.equal(read["optimizer.state.0.exp_avg"], torch.ones(2, 3))
        assert not any("dtype" in name or "_metadata" in name for name in said)


def test_a_view_shares_its_storage(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    torch.save({"base": base, "row": base[2], "t": base.t(), "part": base[1:3, 1:3], "empty": base[6:]}, tmp_path / "w.pt")
    read = load_weights(tmp_path / "w.pt")
    assert torch.equal(read["t"], base.t())
    assert torch.equal(read["part"], base[1:3, 1:3])
    assert read["row"].data_ptr() == read["base"][2].data_ptr()


def test_storages_may_be_empty(tmp_path: Path) -> None:
    """The last one of a legacy file then ends with its length."""
    where = hostile.storage(numel=0, tail=b"N")
    body = hostile.named(("w", hostile.tensor((0, 3), (3, 1), where=where)))
    (tmp_path / "w.pt").write_bytes(hostile.legacy(body, tail=struct.pack("<q", 0)))
    assert load_weights(tmp_path / "w.pt")["w"].shape == (0, 3)


def test_checksums_of_records_are_optional(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"w": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert all(record.CRC == 0 for record in zipfile.ZipFile(path).infolist())
    assert load_weights(path)["w"].tolist() == [1, 1, 1]


def test_global_settings_of_torch_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.arange(3.0)}, tmp_path / "w.pt")
    reference.save_file({"w": torch.arange(3.0)}, tmp_path / "w.safetensors")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for name in ("w.pt", "w.safetensors"):
        with warnings.catch_warnings(), torch.utils.serialization.config.patch("load.mmap", True):
            warnings.simplefilter("error")
            with torch.inference_mode(), torch.autocast("cpu"):
                assert load_weights(tmp_path / name)["w"].tolist() == [0, 1, 2]
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
            try:
                assert load_weights(tmp_path / name)["w"].dtype == torch.float32
                assert load_weights(tmp_path / name)["w"].tolist() == [0, 1, 2]
            finally:
                torch.set_default_device(None)
                torch.set_default_dtype(torch.float32)


def test_prefix_keeps_a_part(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "other": torch.ones(2)}, tmp_path / "w.pt")
    assert list(load_weights(tmp_path / "w.pt", prefix="model.")) == ["a"]
    for prefix in ("modal.", "other"):
        with pytest.raises(CheckpointError) as caught:
            load_weights(tmp_path / "w.pt", prefix=prefix)
        clear(caught.value, f"prefix='{prefix}' is in front of no name; there are model.a, other")


# --- digests --------------------------------------------------------------------------------------------------------------


def test_the_digest_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    digest = save_weights({"w": torch.ones(3)}, path)
    assert load_weights(path).sha256 == digest
    assert load_weights(path, sha256=digest.upper()).sha256 == digest
    assert load_weights(path, sha256=False).sha256 == digest
    with pytest.raises(CheckpointError) as caught:
        load_weights(path, sha256="0" * 64)
    clear(caught.value, f"w.safetensors: sha256 differs: is {digest[:16]}|wanted 0000")
    for bad in ("12", digest[:-1], "g" * 64, digest + "0", 5):
        with pytest.raises(InputError, match="give 64 hex digits"):
            load_weights(path, sha256=bad)  # pyright: ignore[reportArgumentType]


def test_the_digest_may_lie_beside_the_file(tmp_path: Path) -> None:
    path, beside = tmp_path / "w.safetensors", tmp_path / "w.safetensors.sha256"
    digest = save_weights({"w": torch.ones(3)}, path)
    with pytest.warns(UnverifiedWarning, match=r"w.safetensors is unverified") as record:
        load_weights(path, sha256=True)
    assert record[0].filename == __file__
    for text in (f"{digest}  w.safetensors\n", digest.upper(), f"{digest} *w.safetensors"):
        beside.write_text(text)
        assert load_weights(path, sha256=True).sha256 == digest
    beside.write_text("0" * 64)
    with pytest.raises(CheckpointError) as caught:
        load_weights(path, sha256=True)
    clear(caught.value, "sha256 differs")
    for text in ("", "hello", digest[:-1], digest + "ab"):
        beside.write_text(text)
        with pytest.raises(CheckpointError) as caught:
            load_weights(path, sha256=True)
        clear(caught.value, "does not begin with 64 hex digits")
    beside.unlink()
    os.mkfifo(beside)
    with pytest.raises(CheckpointError) as caught:
        load_weights(path, sha256=True)
    clear(caught.value, "a device, pipe or socket")


def test_2000_bit_flips_are_2000_errors_when_the_digest_is_known(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "w.file"
    for kind in SAVERS:
        SAVERS[kind](dict(net(0).state_dict()), path)
        data, good = bytearray(path.read_bytes()), load_weights(path).sha256
        for _ in range(667):
            at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
            data[at] ^= bit
            path.write_bytes(data)
            with pytest.raises(CheckpointError):
                load_weights(path, sha256=good)
            data[at] ^= bit


def test_the_digest_is_of_the_bytes_that_were_used(tmp_path: Path) -> None:
    """Two files take each other's place all the time; what is loaded is one of them, whole, under its own digest."""
    path, values = tmp_path / "w.safetensors", {}
    for value in (1.0, 2.0):
        values[save_weights({"w": torch.full((20_000,), value)}, tmp_path / f"{value}")] = value
    os.link(tmp_path / "1.0", path)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for value in (1.0, 2.0):
                os.link(tmp_path / f"{value}", tmp_path / "next")
                os.replace(tmp_path / "next", path)
                (tmp_path / "next").unlink(missing_ok=True)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        seen = set()
        for _ in range(300):
            read = load_weights(path)
            assert torch.equal(read["w"], torch.full((20_000,), values[read.sha256]))
            seen.add(read.sha256)
    finally:
        stop.set()
        thread.join()
    assert len(seen) == 2


def test_a_file_that_is_written_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights({"w": torch.ones(3)}, path)
    size, look = path.stat().st_size, files._format

    def write(extra: int) -> Callable[..., str]:
        def meanwhile(head: bytes, size: int, name: str) -> str:
            os.truncate(path, size + extra)
            return look(head, size, name)

        return meanwhile

    for extra in (5, -5):
        os.truncate(path, size)
        monkeypatch.setattr(files, "_format", write(extra))
        with pytest.raises(CheckpointError) as caught:
            load_weights(path)
        clear(caught.value, "changed while it was read")


# --- hostile files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All hostile files, loaded under an audit hook in a process of their own."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ  # one trial serves all workers
    root = tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.getbasetemp()
    with open(root / "trial.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "trial.json").exists():
            (root / "trial.json").write_text(run_trial(tmp_path_factory.mktemp("hostile")))
        return json.loads((root / "trial.json").read_text())


def run_trial(folder: Path) -> str:
    command = [sys.executable, str(ROOT / "tests" / "hostile.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


FILES = hostile.hostile(Path("/nowhere"))


def test_nothing_is_executed(trial: dict[str, Any]) -> None:
    """No canary, and of the events that Python reports none but opening the file for reading: no find_class, exec, import."""
    assert len(trial["results"]) == len(FILES) >= 300
    assert not trial["executed"]
    assert {name: r["events"] for name, r in trial["results"].items() if r["events"]} == {}


def test_the_trial_would_notice(trial: dict[str, Any]) -> None:
    """A plain unpickler in the same process leaves the canary and is seen by the same hook."""
    assert trial["control"] == {"events": ["os.system", "pickle.find_class"], "executed": True}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.attack}-{file.name[:40]}")
def test_hostile_files(file: hostile.Hostile, trial: dict[str, Any]) -> None:
    """Each is one clear CheckpointError that says what came; a few are sound data with hostile words, and are data."""
    result = trial["results"][f"{file.attack} {file.name}"]
    assert result["error"] == ("CheckpointError" if file.says else None), result["says"]
    assert file.says in result["says"]
    assert len(result["says"]) < 400
    assert result["says"].isprintable()
    assert result["seconds"] < 4  # most take a millisecond, the longest half a second
    if file.says:
        assert file.name[-20:].replace("\0", "\\x00") in result["says"]


def test_hostile_files_take_little_memory(trial: dict[str, Any]) -> None:
    """MiB over all files, some of which are 16 MiB themselves or speak of exabytes."""
    assert trial["growth"] < 256


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    """Metadata that names code is text, and selects nothing."""
    file = next(file for file in FILES if file.name == "metadata-code.safetensors")
    read = load_weights(hostile.make(tmp_path, file))
    assert read.metadata["class"] == "os.system"
    assert read["weight"].tolist() == [[1, 2], [3, 4]]
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path / file.name, expect={"bidi": "x"})
    clear(caught.value, "\\u202e")
    assert load_weights(tmp_path / file.name, expect={"deep": '{"a":' * 2000}).notes == ()


def test_nesting_of_any_depth(tmp_path: Path) -> None:
    """Parsing, checking and showing each have their own limit of recursion."""
    path = tmp_path / "w.safetensors"
    for depth in (*range(1, 900, 50), *range(900, 1040)):
        path.write_bytes(
            hostile.safetensors(json.dumps(hostile.one()).replace("[2, 2]", "[" * depth + "2" + "]" * depth).encode())
        )
        with pytest.raises(CheckpointError) as caught:
            load_weights(path)
        clear(caught.value)


def mutants(data: bytes, rng: random.Random, count: int) -> list[bytes]:
    """Bytes changed, cut, doubled, moved, or set to telling values."""
    made = []
    for _ in range(count):
        bad = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(bad))
            kind = rng.randrange(6)
            if kind == 0:
                bad[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                bad[at] = rng.choice(b'\x00\x01\x7f\x80\xff(.Rbcsu}]t\x85h0{"')
            elif kind == 2:
                del bad[at : at + rng.randrange(1, 9)]
            elif kind == 3:
                bad[at:at] = bad[(start := rng.randrange(len(bad))) : start + rng.randrange(1, 40)]
            elif kind == 4:
                bad[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1)))
            else:
                del bad[rng.randrange(len(bad)) :]
            bad = bad or bytearray(b"\0")
        made.append(bytes(bad))
    return made


def fuzz() -> list[bytes]:
    """Mutants of whole files, and of the pickles and headers inside files that are sound around them."""
    rng = random.Random(20)
    state = {"model": OrderedDict(net(0).state_dict()), "step": 3, "ema": {"decay": 0.5, "shadow_params": [torch.ones(2)]}}
    made: list[bytes] = []
    for kind in ("safetensors", "torch", "torch legacy"):
        made += mutants(_saved(kind, state), rng, 500)
    pickled = hostile.program(hostile.named(("model", hostile.GOOD), ("step", hostile.number(3)), ("other", hostile.tensor())))
    made += [hostile.zipped(bad) for bad in mutants(pickled, rng, 1500)]
    made += [hostile.legacy(bad[2:-1]) for bad in mutants(hostile.program(hostile.legacy_tensor()), rng, 500)]
    header = json.dumps({"__metadata__": {"a": "b"}, **hostile.one()}).encode()
    made += [hostile.safetensors(bad) for bad in mutants(header, rng, 1000)]
    return made


def _saved(kind: str, state: dict[str, Any]) -> bytes:
    if kind == "safetensors":
        return reference.save(dict(state["model"]))
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=kind == "torch")
    return buffer.getvalue()


def test_5000_mutated_files(tmp_path: Path) -> None:
    """A CheckpointError, or tensors that are no larger than the file, under the digest of what was read; nothing else."""
    path, loaded, long = tmp_path / "w.bin", 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = fuzz()
    for data in made:
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                read = load_weights(path)
        except CheckpointError as error:
            clear(error)
            continue
        loaded += 1
        assert read.sha256 == hashlib.sha256(data).hexdigest()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in read.values()}
        assert sum(storages.values()) <= len(data)
        assert all(t.numel() * t.element_size() <= len(data) for t in read.values())
        long = max(long, *map(len, read))
    assert len(made) >= 4500
    assert 50 < loaded < len(made) // 2  # a changed number or name is sound: only a digest tells
    assert long < 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 64


SAFE = ("2.10.0", "2.10.1", "2.10.0+cu128", "2.10.1rc1", "2.11.0.dev20260101", "2.13.0+cpu", "3.0.0a0", "10.0")
UNSAFE = ("2.9.1", "2.6.0", "2.9.1+cpu", "2.10.0a0+git123", "2.10.0rc2", "2.10.0.dev20251201", "1.13.1", "0.4.1", "nightly", "")


def test_only_a_safe_torch_reads_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2026-24747: before torch 2.10 the weights-only reader can be made to write outside a tensor."""
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    save_weights({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    assert [v for v in SAFE if not torch_file.is_safe(v)] == []
    assert [v for v in UNSAFE if torch_file.is_safe(v)] == []

    def never(*args: object, **options: object) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", never)
    for version in UNSAFE:
        monkeypatch.setattr(torch, "__version__", version)
        for name in ("w.pt", "w.pth"):
            with pytest.raises(CheckpointError) as caught:
                load_weights(tmp_path / name)
            clear(caught.value, f"needs torch >= 2.10|CVE-2026-24747|this is {version}|safetensors")
        assert load_weights(tmp_path / "w.safetensors")["w"].item() == 1


def test_names_that_others_allowed_stay_refused(tmp_path: Path) -> None:
    """torch keeps a process-wide list of names that any library may add to."""
    import argparse

    torch.save({"w": torch.ones(1), "args": argparse.Namespace(a=1)}, tmp_path / "w.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        torch.load(tmp_path / "w.pt", weights_only=True)
        with pytest.raises(CheckpointError) as caught:
            load_weights(tmp_path / "w.pt")
    clear(caught.value, "contains argparse.Namespace: refused")


def test_what_torch_reads_must_be_what_was_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second line: a file that torch understood differently is refused."""
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    others = (
        {"w": torch.ones(3)},
        {"w": torch.ones(2).double()},
        {"v": torch.ones(2)},
        {"w": torch.ones(2), "x": torch.ones(1)},
        {},
    )
    for other in others:
        monkeypatch.setattr(torch, "load", lambda *a, other=other, **k: other)
        with pytest.raises(CheckpointError) as caught:
            load_weights(tmp_path / "w.pt")
        clear(caught.value, "torch.load read other tensors")

    def fails(*args: object, **options: object) -> None:
        raise KeyError

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path / "w.pt")
    clear(caught.value, "refused it: KeyError")
    assert isinstance(caught.value.__cause__, KeyError)


def test_too_little_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of a terabyte costs no disk, and would cost a terabyte of memory."""
    path = tmp_path / "w.safetensors"
    header = json.dumps(hostile.one("U8", [2**40], [0, 2**40])).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    try:
        os.truncate(path, 8 + len(header) + 2**40)
    except OSError:
        pytest.skip("no sparse files here")

    def none_left(size: int) -> bytearray:
        assert size > 2**40
        raise MemoryError

    monkeypatch.setattr(files, "bytearray", none_left, raising=False)
    with pytest.raises(CheckpointError) as caught:
        load_weights(path)
    clear(caught.value, "does not fit into this machine's memory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights({"w": torch.ones(1)}, path)
    path.chmod(0)
    with pytest.raises(CheckpointError) as caught:
        load_weights(path)
    clear(caught.value, "cannot be read (Permission denied)")


def test_a_link_is_followed(tmp_path: Path) -> None:
    """Model caches keep blobs and link to them."""
    save_weights({"w": torch.ones(1)}, tmp_path / "blob")
    (tmp_path / "model.safetensors").symlink_to("blob")
    assert load_weights(tmp_path / "model.safetensors")["w"].item() == 1
    with pytest.raises(InputError, match="path is int"):
        load_weights(3)  # pyright: ignore[reportArgumentType]


# --- layouts of the field -------------------------------------------------------------------------------------------------


def wrapped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def trained(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def lit_ema(network: nn.Module, inner: str) -> dict[str, Tensor]:
    """As LitEma registers its buffers: names without dots, of the trained parameters."""
    buffers = {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(3, dtype=torch.int32)}
    return {**buffers, **{(inner + name).replace(".", ""): p for name, p in trained(network).items()}}


def shadow(network: nn.Module) -> dict[str, Any]:
    return {"decay": 0.999, "num_updates": 7, "shadow_params": list(trained(network).values())}


class Averaged(nn.Module):
    """flow_matching's EMA module."""

    def __init__(self, model: nn.Module, average: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("num_updates", torch.tensor(0))
        values = (nn.Parameter(p, requires_grad=False) for p in trained(average).values())
        self.shadow_params = nn.ParameterList(values)


def lucidrains(plain: Net, average: Net) -> dict[str, Any]:
    betas = {"betas": torch.linspace(0, 1, 5)}
    whole = {**betas, **wrapped(plain.state_dict(), "model.")}
    mean = {**betas, **wrapped(average.state_dict(), "model.")}
    ema = {"initted": torch.tensor([True]), "step": torch.tensor([3])}
    ema |= wrapped(whole, "online_model.") | wrapped(mean, "ema_model.")
    return {
        "step": 9,
        "model": whole,
        "opt": {"state": {0: {"exp_avg": torch.ones(2)}}},
        "ema": ema,
        "scaler": None,
        "version": "2.3",
    }


def latent(plain: Net, average: Net) -> dict[str, Tensor]:
    first_stage = {"first_stage_model.decoder.weight": torch.ones(2), "betas": torch.ones(4)}
    ema = wrapped(lit_ema(average, "diffusion_model."), "model_ema.")
    return {**first_stage, **wrapped(plain.state_dict(), "model.diffusion_model."), **ema}


#: How the families of conventions' table lay their files out: (file, weights as trained, average) -> contents.
#: The third entry is what is left of the average: "all" of the network, or its "trained" parameters.
LAYOUTS: dict[str, tuple[Callable[[Net, Net], Any], str, str]] = {
    "score_sde": (
        lambda a, b: {"optimizer": {"state": {}}, "model": wrapped(a.state_dict(), "module."), "ema": shadow(b), "step": 3},
        "trained",
        "'ema.shadow_params.' (average, score_sde",
    ),
    "flow_matching": (lambda a, b: {"model": Averaged(a, b).state_dict(), "epoch": 3}, "trained", "'model.shadow_params.'"),
    "latent-diffusion": (lambda a, b: {"state_dict": latent(a, b), "global_step": 3}, "trained", "'state_dict.model_ema.'"),
    "latent-diffusion, flat": (latent, "trained", "'model_ema.' (average, latent-diffusion)"),
    "LitEma of the whole": (
        lambda a, b: {"state_dict": {**a.state_dict(), **wrapped(lit_ema(b, ""), "model_ema.")}},
        "trained",
        "'state_dict.model_ema.'",
    ),
    "lucidrains": (lucidrains, "all", "'ema.ema_model.model.' (average, lucidrains)"),
    "torchcfm": (
        lambda a, b: {"net_model": a.state_dict(), "ema_model": b.state_dict(), "step": 3},
        "all",
        "(average, torchcfm)",
    ),
    "torchcfm, parallel": (
        lambda a, b: {"net_model": wrapped(a.state_dict(), "module."), "ema_model": wrapped(b.state_dict(), "module.")},
        "all",
        "'ema_model.module.'",
    ),
    "k-diffusion": (lambda a, b: {"model": a.state_dict(), "model_ema": b.state_dict(), "epoch": 1}, "all", "k-diffusion"),
    "DiT": (lambda a, b: {"model": a.state_dict(), "ema": b.state_dict(), "opt": {}}, "all", "'ema.' (average, DiT, SiT)"),
    "AveragedModel": (
        lambda a, b: {"model": a.state_dict(), "ema": {"n_averaged": torch.tensor(3), **wrapped(b.state_dict(), "module.")}},
        "all",
        "'ema.module.'",
    ),
    "JiT, one average": (
        lambda a, b: {"model": wrapped(a.state_dict(), "net."), "model_ema1": wrapped(trained(b), "net.")},
        "trained",
        "'model_ema1.net.' (average, JiT)",
    ),
    "NCSN": (
        lambda a, b: [wrapped(a.state_dict(), "module."), {"state": {}}, 7, 100, trained(b)],
        "trained",
        "'[4].' (average, NCSN, DDIM)",
    ),
}


def expected_average(plain: Net, average: Net, part: str) -> Net:
    made = copy.deepcopy(plain)
    made.load_state_dict(average.state_dict() if part == "all" else trained(average), strict=False)
    return made


@pytest.mark.parametrize("kind", ["torch", "torch legacy"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_layouts(family: str, kind: str, tmp_path: Path) -> None:
    make, part, note = LAYOUTS[family]
    plain, average = net(1), net(2)
    path = tmp_path / "w.pt"
    SAVERS[kind](make(plain, average), path)
    target = net(3)
    done = load_into(target, path, ema=True)
    assert same(target, expected_average(plain, average, part))
    assert note in repr(done)
    assert set(done) == set(target.state_dict())
    assert (f"of {len(done)} from" in repr(done)) == (part == "trained")
    load_into(target, path, ema=False)
    assert same(target, plain)
    before = copy.deepcopy(target)
    with pytest.raises(CheckpointError) as caught:
        load_into(target, path)
    clear(caught.value, "holds 2 copies of this network|say ema=True, ema=False")
    assert same(target, before)


def test_every_row_of_the_table_has_a_layout(tmp_path: Path) -> None:
    found = set()
    for make, _, _ in [*LAYOUTS.values(), (two_averages, "", "")]:
        torch.save(make(net(1), net(2)), tmp_path / "w.pt")
        target = net(3)
        found |= {
            c.average for c in checkpoint_copies._copies(target, target.state_dict(), load_weights(tmp_path / "w.pt").tensors)
        }
    assert found - {None} == set(checkpoint_copies.AVERAGES)


def two_averages(plain: Net, average: Net) -> dict[str, Any]:
    names = ("model", "model_ema1", "model_ema2")
    return {name: wrapped(network.state_dict(), "net.") for name, network in zip(names, (plain, average, net(4)), strict=True)}


def test_two_averages_are_told_apart_by_name(tmp_path: Path) -> None:
    torch.save(two_averages(net(1), net(2)), tmp_path / "w.pt")
    target = net(3)
    with pytest.raises(CheckpointError) as caught:
        load_into(target, tmp_path / "w.pt", ema=True)
    clear(caught.value, "holds 2 copies|'model_ema1.net.'|'model_ema2.net.'|ema='a name'")
    for name, seed in (("model_ema1", 2), ("model_ema2", 4), ("model", 1)):
        load_into(target, tmp_path / "w.pt", ema=name)
        assert same(target, net(seed))
    load_into(target, tmp_path / "w.pt", prefix="model_ema2.")
    assert same(target, net(4))
    with pytest.raises(CheckpointError) as caught:
        load_into(target, tmp_path / "w.pt", ema="model_ema")
    clear(caught.value, "has no copy for ema='model_ema'|'model_ema1.net.'")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "state_dict.", "model.", "net.model.module.", "ema_model."])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_lone_copy_is_found_under_any_prefix(prefix: str, kind: str, tmp_path: Path) -> None:
    SAVERS[kind](wrapped(dict(net(1).state_dict()), prefix), tmp_path / "w")
    target = net(3)
    done = load_into(target, tmp_path / "w")
    assert same(target, net(1))
    assert done.notes == ((f"under {prefix!r}{' (average, torchcfm)' if prefix == 'ema_model.' else ''}",) if prefix else ())
    if prefix == "":
        for ema in (True, "ema"):
            with pytest.raises(CheckpointError) as caught:
                load_into(target, tmp_path / "w", ema=ema)
            clear(caught.value, "has no copy for ema=|leave ema out")


def test_the_whole_and_its_part_are_both_found(tmp_path: Path) -> None:
    """lucidrains saves the diffusion, which holds the network: either may be asked for."""
    torch.save(lucidrains(net(1), net(2)), tmp_path / "w.pt")

    class Diffusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net(3)
            self.register_buffer("betas", torch.zeros(5))

    target = Diffusion()
    load_into(target, tmp_path / "w.pt", ema=True)
    assert same(target.model, net(2))
    assert torch.equal(target.betas, torch.linspace(0, 1, 5))  # pyright: ignore[reportArgumentType]
    load_into(target, tmp_path / "w.pt", ema=False)
    assert same(target.model, net(1))


def test_lists_of_averages_go_by_order(tmp_path: Path) -> None:
    """score_sde: their order is all that tells which is which, so number and shapes must be the network's."""
    plain, average = net(1), net(2)
    contents = {"model": plain.state_dict(), "ema": shadow(average)}
    torch.save(contents, tmp_path / "w.pt")
    target = net(3).requires_grad_(False)
    with pytest.raises(CheckpointError) as caught:
        load_into(target, tmp_path / "w.pt", ema=True)
    clear(caught.value, "has 6 averages|7 of 7 parameters are trained|before requires_grad_(False)")
    load_into(target, tmp_path / "w.pt", ema=False)
    assert same(target, plain)
    assert not any(p.requires_grad for p in target.parameters())

    contents["ema"] = {"shadow_params": [p.detach() for p in average.parameters()]}  # all of them: torch_ema of a later version
    torch.save(contents, tmp_path / "w.pt")
    for target in (net(3), net(3).requires_grad_(False)):
        load_into(target, tmp_path / "w.pt", ema=True)
        assert torch.equal(target.fourier, average.fourier)
        assert torch.equal(target.last.bias, average.last.bias)
        assert torch.equal(target.norm.running_mean, plain.norm.running_mean)  # pyright: ignore[reportArgumentType]

    values = list(trained(average).values())
    for bad, says in (
        (values[:-1], "has 5 averages"),
        ([*values, values[0]], "[6]|7"),
        ([values[1], values[0], *values[2:]], "number 0 does not fit 'first.weight'"),
    ):
        torch.save({"model": plain.state_dict(), "ema": {"shadow_params": bad}}, tmp_path / "w.pt")
        with pytest.raises(CheckpointError) as caught:
            load_into(net(3), tmp_path / "w.pt", ema=True)
        clear(caught.value, "ema.shadow_params." if says.startswith("[") else says)

    gap = {f"ema.shadow_params.{i}": v for i, v in enumerate(values) if i != 2} | {"ema.shadow_params.6": values[2]}
    reference.save_file({**wrapped(dict(plain.state_dict()), "model."), **gap}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_into(net(3), tmp_path / "w.safetensors", ema=True)
    clear(caught.value, "number 2 does not fit 'norm.weight'")


def test_a_list_alone_serves_a_network_of_parameters(tmp_path: Path) -> None:
    """diffusers' EMAModel: nothing but the list."""
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save(shadow(source), tmp_path / "w.pt")
    load_into(target, tmp_path / "w.pt")
    assert same(source, target)
    torch.save(shadow(net(1)), tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        load_into(net(3), tmp_path / "w.pt", ema=True)
    clear(caught.value, "lacks fourier, norm.running_mean|there are 0 copies to take that from")
    target = net(3)
    load_into(target, tmp_path / "w.pt", ema=True, strict=False)
    assert same(target, expected_average(net(3), net(1), "trained"))


def test_averages_of_joined_names_must_be_whole(tmp_path: Path) -> None:
    contents = latent(net(1), net(2))
    del contents["model_ema.diffusion_modellastbias"]
    torch.save(contents, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        load_into(net(3), tmp_path / "w.pt", ema=True)
    clear(caught.value, "has no copy for ema=True")
    load_into(net(3), tmp_path / "w.pt")


# --- what does not fit ----------------------------------------------------------------------------------------------------


def without(*names: str, seed: int = 1, **more: Tensor) -> dict[str, Tensor]:
    return {**{n: v for n, v in net(seed).state_dict().items() if n not in names}, **more}


def with_value(name: str, index: int, value: float) -> dict[str, Tensor]:
    state = dict(net(1).state_dict())
    state[name].view(-1)[index] = value
    return state


BAD: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "missing": (lambda: without("last.bias", "first.weight"), "does not fit Net: 2 missing (first.weight, last.bias)"),
    "missing buffer": (lambda: without("norm.running_var"), "1 missing (norm.running_var)"),
    "unexpected": (lambda: without(**{"extra.weight": torch.ones(1)}), "1 unexpected (extra.weight)"),
    "both": (lambda: without("last.bias", **{"last.scale": torch.ones(2)}), "1 missing (last.bias); 1 unexpected (last.scale)"),
    "many": (lambda: {f"a{i}": torch.ones(1) for i in range(30)} | without(), "30 unexpected (a0, a1, a"),
    "shape": (lambda: without(**{"last.bias": torch.ones(3)}), "1 of another shape (last.bias 3, not 2)"),
    "scalar": (lambda: without(**{"norm.num_batches_tracked": torch.ones(1)}), "(norm.num_batches_tracked 1, not scalar)"),
    "transposed": (lambda: without(**{"first.weight": torch.ones(2, 3)}), "(first.weight 2x3, not 3x2)"),
    "other names": (lambda: {"conv.kernel": torch.ones(1)}, "it has conv.kernel, and the network fourier, first.weight"),
    "prefix of a part": (
        lambda: wrapped(without("last.bias"), "model."),
        "does not fit Net under 'model.': 1 missing (last.bias)",
    ),
    "nan": (lambda: with_value("first.weight", 3, float("nan")), "'first.weight' holds 1 values that are not finite, of 6"),
    "inf": (lambda: with_value("last.weight", 0, float("-inf")), "'last.weight' holds 1 values that are not finite"),
    "nan in a buffer": (lambda: with_value("norm.running_var", 0, float("nan")), "'norm.running_var' holds 1 values"),
    "whole numbers": (
        lambda: without(**{"last.bias": torch.ones(2, dtype=torch.int32)}),
        "'last.bias' is int32 in the file and float32",
    ),
    "bool": (lambda: without(**{"last.bias": torch.ones(2, dtype=torch.bool)}), "is bool in the file"),
    "complex": (lambda: without(**{"last.bias": torch.ones(2, dtype=torch.complex64)}), "is complex64 in the file"),
    "float counter": (lambda: without(**{"norm.num_batches_tracked": torch.tensor(1.0)}), "is float32 in the file and int64"),
    "long names": (
        lambda: {**without(), **{f"{'long.' * 60}{i}": torch.ones(1) for i in range(9)}},
        "9 unexpected (long.long",
    ),
    "short of 5": (lambda: without(**{f"{'n' * 30}{i}": torch.ones(1) for i in range(9)}), "nnn0, nnnnn"),
}


@pytest.mark.parametrize("kind", SAVERS)
@pytest.mark.parametrize("case", BAD)
def test_weights_that_do_not_fit(case: str, kind: str, tmp_path: Path) -> None:
    make, says = BAD[case]
    SAVERS[kind](make(), tmp_path / "w")
    target, before = net(3), net(3)
    with pytest.raises(CheckpointError) as caught:
        load_into(target, tmp_path / "w")
    clear(caught.value, f"/w: |{says}")
    assert not str(caught.value).endswith("...")  # cut
    if case == "many":
        assert len(re.findall(r"\ba\d", str(caught.value).split("/w: ")[1])) == 5
    assert same(target, before)
    with pytest.raises(CheckpointError) as caught:  # and from tensors at hand
        load_into(target, load_weights(tmp_path / "w").tensors)
    clear(caught.value, f"weights: |{says}")


def test_not_strict_takes_what_fits(tmp_path: Path) -> None:
    torch.save(wrapped(without("last.bias", extra=torch.ones(1)), "model."), tmp_path / "w.pt")
    target = net(3)
    done = load_into(target, tmp_path / "w.pt", strict=False)
    assert torch.equal(target.last.bias, net(3).last.bias)
    assert torch.equal(target.last.weight, net(1).last.weight)
    assert set(target.state_dict()) - set(done) == {"last.bias"}
    for options in ({"ema": True}, {"ema": "ema"}, {"prefix": "net."}):
        with pytest.raises(CheckpointError) as caught:
            load_into(target, tmp_path / "w.pt", strict=False, **options)
        clear(caught.value, "does not fit Net: it has model.")
    torch.save(without(**{"last.bias": torch.ones(3)}), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="of another shape"):
        load_into(target, tmp_path / "w.pt", strict=False)


def test_long_messages_are_cut(tmp_path: Path) -> None:
    save_weights(net(1), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_into(net(3), tmp_path / "w.safetensors", prefix="x" * 1000)
    clear(caught.value, "w.safetensors: has no copy")
    assert str(caught.value).endswith("xxx...")
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path / "w.safetensors", sha256="0" * 64)
    assert str(caught.value).endswith("damaged, or another file")


def test_names_may_be_long(tmp_path: Path) -> None:
    save_weights({"w" * 1024: torch.ones(1)}, tmp_path / "w.safetensors")
    assert len(load_weights(tmp_path / "w.safetensors")) == 1
    with pytest.raises(CheckpointError):
        save_weights({"w" * 1025: torch.ones(1)}, tmp_path / "w.safetensors")


def test_an_average_is_checked_for_strangers_too(tmp_path: Path) -> None:
    contents = {"model": net(1).state_dict(), "ema": {**net(2).state_dict(), "extra": torch.ones(1)}}
    torch.save(contents, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        load_into(net(3), tmp_path / "w.pt", ema=True)
    clear(caught.value, "under 'ema.': 1 unexpected (ema.extra)")
    load_into(net(3), tmp_path / "w.pt", ema=False)
    for family in ("score_sde", "latent-diffusion"):  # there, strangers are among the weights as trained
        contents = LAYOUTS[family][0](net(1), net(2))
        place = contents["model"] if family == "score_sde" else contents["state_dict"]
        place["module.extra" if family == "score_sde" else "model.diffusion_model.extra"] = torch.ones(1)
        torch.save(contents, tmp_path / "w.pt")
        for ema in (True, False):
            with pytest.raises(CheckpointError) as caught:
                load_into(net(3), tmp_path / "w.pt", ema=ema)
            clear(caught.value, "1 unexpected|.extra)")


def test_tied_layers_may_be_written_once(tmp_path: Path) -> None:
    """safetensors' save_model keeps one of the names of a tensor that has two."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward, self.out = nn.Linear(3, 3), nn.Linear(3, 3)
            self.out.weight = self.inward.weight

    source = Tied()
    reference.save_model(source, str(tmp_path / "w.safetensors"))
    assert len(load_weights(tmp_path / "w.safetensors")) == 3
    target = Tied()
    load_into(target, tmp_path / "w.safetensors")
    assert same(source, target)
    assert target.out.weight is target.inward.weight
    for dropped in ("inward.weight", "out.weight"):
        torch.save({n: v for n, v in source.state_dict().items() if n != dropped}, tmp_path / "w.pt")
        target = Tied()
        load_into(target, tmp_path / "w.pt")
        assert same(source, target)
    with pytest.raises(CheckpointError, match="missing"):
        load_into(nn.ModuleDict({"inward": nn.Linear(3, 3), "out": nn.Linear(3, 3)}), tmp_path / "w.pt")


def test_masks_may_be_infinite(tmp_path: Path) -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    save_weights(Masked(), tmp_path / "w.safetensors")
    load_into(Masked(), tmp_path / "w.safetensors")


CASTS = [
    (torch.float16, torch.float32, True),
    (torch.bfloat16, torch.float32, True),
    (torch.float32, torch.float64, True),
    (torch.float8_e4m3fn, torch.float32, True),
    (torch.float8_e5m2, torch.float16, True),
    (torch.float32, torch.float16, False),
    (torch.float32, torch.bfloat16, False),
    (torch.float64, torch.float32, False),
    (torch.float16, torch.bfloat16, False),
    (torch.bfloat16, torch.float16, False),
]


@pytest.mark.parametrize(("there", "here", "exact"), CASTS, ids=str)
def test_casts(there: torch.dtype, here: torch.dtype, exact: bool, tmp_path: Path) -> None:
    """Widening is exact and noted; rounding is a warning; the network keeps its dtype."""
    weight = torch.randn(3, 2).to(there)
    save_weights({"weight": weight, "bias": torch.ones(3).to(there)}, tmp_path / "w.safetensors")
    target = nn.Linear(2, 3).to(here)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        done = load_into(target, tmp_path / "w.safetensors")
    assert target.weight.dtype == here
    assert torch.equal(target.weight, weight.to(here))
    assert (target.weight.to(torch.float64) == weight.to(torch.float64)).all() or not exact
    names = [str(d).removeprefix("torch.") for d in (there, here)]
    assert done.notes == (f"2 tensors {names[0]} -> {names[1]}",)
    assert [w.category for w in seen] == ([] if exact else [PrecisionWarning])
    assert done["weight"].dtype == there


def test_casts_that_overflow_or_change_kind(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights({"weight": torch.full((3, 2), 1e5), "bias": torch.ones(3)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_into(nn.Linear(2, 3).half(), path)
    clear(caught.value, "'weight' holds 6 values that are not finite as float16, of 6")

    class Counter(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(2, dtype=dtype))

    whole = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
    for there in whole:
        save_weights({"n": torch.ones(2, dtype=there)}, path)
        for here in whole:
            holds = there == here or (
                torch.bool not in (there, here)
                and torch.iinfo(here).min <= torch.iinfo(there).min
                and torch.iinfo(there).max <= torch.iinfo(here).max
            )
            try:
                load_into(Counter(here), path)
                assert holds
            except CheckpointError as error:
                clear(error, "in the file and")
                assert not holds


def test_finite_is_finite_in_the_dtype_of_the_network(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights({"weight": torch.full((3, 2), 1e200, dtype=torch.float64), "bias": torch.ones(3).double()}, path)
    load_into(nn.Linear(2, 3).double(), path)
    with pytest.raises(CheckpointError, match="'weight' holds 6 values that are not finite as float32"):
        load_into(nn.Linear(2, 3), path)

    class Eight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.ones(4).to(torch.float8_e5m2))

    for value, good in ((2.0, True), (torch.inf, True), (torch.nan, False)):
        save_weights({"w": torch.tensor([1.0, value, 1.0, value]).to(torch.float8_e5m2)}, path)
        if good:
            load_into(Eight(), path)
        else:
            with pytest.raises(CheckpointError, match="'w' holds 2 values that are not finite, of 4"):
                load_into(Eight(), path)


def test_networks_that_cannot_be_loaded_into(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError) as caught:
        load_into(nn.Linear(2, 2, device="meta"), path)
    clear(caught.value, "on the meta device|to_empty")
    with pytest.raises(InputError, match=r"network is type: give the torch.nn.Module"):
        load_into(nn.Linear, path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="ema=3"):
        load_into(nn.Linear(2, 2), path, ema=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="sha256 and expect are for files"):
        load_into(nn.Linear(2, 2), load_weights(path), sha256="0" * 64)
    with pytest.raises(InputError, match="sha256 and expect are for files"):
        load_into(nn.Linear(2, 2), load_weights(path), expect={"predicts": "v"})

    class Stubborn(nn.Linear):
        def load_state_dict(self, *args: Any, **options: Any) -> Any:
            raise RuntimeError("not today\nor ever")

    with pytest.raises(CheckpointError) as caught:
        load_into(Stubborn(2, 2), path)
    clear(caught.value, "Stubborn refused it: not today")


def test_mode_device_and_gradients_are_left_alone(tmp_path: Path) -> None:
    save_weights(net(1), tmp_path / "w.safetensors")
    target = net(3).train()
    target.last.weight.requires_grad_(False)
    kept = {name: id(p) for name, p in target.named_parameters()}
    done = load_into(target, tmp_path / "w.safetensors")
    assert target.training
    assert {name: id(p) for name, p in target.named_parameters()} == kept
    assert (target.first.weight.requires_grad, target.last.weight.requires_grad) == (True, False)
    with torch.no_grad():
        target.first.weight.zero_()
    assert torch.equal(done["first.weight"], net(1).first.weight)  # the network has its own memory


# --- what a file says of itself -------------------------------------------------------------------------------------------


def test_words_that_contradict_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    about = {"path": "EDM", "schedule": {"kind": "karras", "rho": 7}, "flag": False}
    words: dict[str, str | float | bool] = {"predicts": "v", "sigma_data": 0.5, "zero_snr": True, "about": json.dumps(about)}
    save_weights(net(1), path, metadata=words)
    agreed = {"predicts": "v", "sigma_data": 0.5, "zero_snr": True, "path": "EDM", "about.schedule.rho": 7, "flag": False}
    assert load_weights(path, expect=agreed).notes == ()
    assert load_weights(path, expect={"predicts": "v_prediction", "sigma_data": torch.tensor(0.5)}).notes == ()
    assert load_weights(path, expect={"sigma_max": 80.0, "T": 1}).notes == ("the file does not say: sigma_max, T",)
    for expect, says in (
        ({"predicts": "eps"}, "says 'predicts' is 'v', where predicts='eps' is expected"),
        ({"prediction_type": "epsilon"}, "'predicts' is 'v'"),
        ({"sigma_data": 0.25}, "says 'sigma_data' is '0.5', where sigma_data=0.25 is expected"),
        ({"sigma_data": "big"}, "'sigma_data'"),
        ({"path": "VP"}, "says 'about.path' is 'EDM', where path='VP' is expected"),
        ({"rho": 5}, "says 'about.schedule.rho' is 7"),
        ({"zero_snr": False}, "says 'zero_snr' is 'true'"),
        ({"flag": True}, "says 'about.flag' is False"),
        ({"predicts": None}, "'predicts' is 'v'"),
    ):
        target, before = net(3), net(3)
        with pytest.raises(CheckpointError) as caught:
            load_into(target, path, expect=expect)
        clear(caught.value, says)
        assert same(target, before)


@pytest.mark.parametrize(
    ("key", "value", "agrees"),
    [
        ("modelspec.prediction_type", "epsilon", "eps"),
        ("modelspec.prediction_type", "v", "v"),
        ("prediction_type", "sample", "x0"),
        ("prediction_type", "flow_prediction", "velocity"),
        ("parameterization", "eps", "eps"),
    ],
)
def test_words_of_others_for_the_prediction(key: str, value: str, agrees: str, tmp_path: Path) -> None:
    reference.save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors", {key: value})
    torch.save({"w": torch.ones(1), "step": 3, "hyper_parameters": {key: value, "rate": 0.1}}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        assert load_weights(tmp_path / name, expect={"predicts": agrees}).notes == ()
        for other in {"eps", "x0", "v", "velocity"} - {agrees}:
            with pytest.raises(CheckpointError) as caught:
                load_weights(tmp_path / name, expect={"predicts": other})
            clear(caught.value, f"predicts='{other}' is expected")


# --- writing --------------------------------------------------------------------------------------------------------------


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call on the way to the disk fails once: the old file stays, nothing else is left."""
    path = tmp_path / "w.safetensors"
    old = save_weights(net(1), path)

    def failing(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    def half_way(tensor: Tensor) -> memoryview:
        raise KeyboardInterrupt

    for owner, name, error in (
        (os, "open", CheckpointError),
        (os, "fsync", CheckpointError),
        (os, "replace", CheckpointError),
        (safetensors_file, "raw", KeyboardInterrupt),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, half_way if name == "raw" else failing)
            with pytest.raises(error) as caught:
                save_weights(net(2), path)
        if error is CheckpointError:
            clear(caught.value, "w.safetensors: cannot be written (No space left on device)")
        assert os.listdir(tmp_path) == ["w.safetensors"]
        assert load_weights(path).sha256 == old
    new = save_weights(net(2), path)
    assert load_weights(path, sha256=new)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_writing_touches_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of its own, made anew; a link in the way is replaced, not followed; modes are those of the umask."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link.safetensors").symlink_to("precious")
    mask = os.umask(0o027)
    try:
        save_weights(net(1), tmp_path / "link.safetensors")
    finally:
        os.umask(mask)
    assert (tmp_path / "precious").read_text() == "mine"
    assert stat.S_IMODE((tmp_path / "link.safetensors").lstat().st_mode) == 0o640
    assert load_weights(tmp_path / "link.safetensors")

    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "known")
    (tmp_path / ".known.partial").symlink_to("precious")
    with pytest.raises(CheckpointError) as caught:
        save_weights(net(2), tmp_path / "w.safetensors")
    clear(caught.value, "cannot be written (File exists)")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / ".known.partial").is_symlink()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, says in (
        (tmp_path / "folder", "cannot be written (Is a directory)"),
        (tmp_path / "none" / "w.safetensors", "cannot be written (No such file or directory)"),
        ("a\0b", "cannot be written (embedded null byte)"),
        (tmp_path / ("x" * 300), "cannot be written (File name too long)"),
    ):
        with pytest.raises(CheckpointError) as caught:
            save_weights(net(1), path)
        clear(caught.value, says)
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        ({"a": 1.0}, None, "'a' is float: save_weights writes dense tensors"),
        ({"a": torch.eye(2).to_sparse()}, None, "dense tensors"),
        ({"a": torch.ones(1, device="meta")}, None, "dense tensors"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, None, "complex128, for which safetensors has no name"),
        ({3: torch.ones(1)}, None, "the name 3"),
        ({"__metadata__": torch.ones(1)}, None, "'__metadata__' cannot be a tensor's"),
        ({"a\n": torch.ones(1)}, None, "not printable"),
        ({"a": torch.ones(1)}, {"k": [1]}, r"metadata\['k'\] is list"),
        ({"a": torch.ones(1)}, {3: "v"}, r"metadata\[3\]"),
    ],
)
def test_what_cannot_be_written(tensors: Any, metadata: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        save_weights(tensors, tmp_path / "w.safetensors", metadata=metadata)
    assert os.listdir(tmp_path) == []


def test_tensors_of_any_memory_are_written(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "t": base.t(),
        "part": base[1:3, ::2],
        "row": base[0],
        "same": base[0],
        "wide": torch.ones(1).expand(5),
        "last": torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last),
        "conj": torch.tensor([1 + 2j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
        "p": nn.Parameter(torch.ones(2)),
    }
    save_weights(tensors, tmp_path / "w.safetensors")
    for read in (load_weights(tmp_path / "w.safetensors").tensors, reference.load_file(tmp_path / "w.safetensors")):
        for name, tensor in tensors.items():
            assert torch.equal(read[name], tensor), name


# --- a real file ----------------------------------------------------------------------------------------------------------


def test_shipped_weights_load_offline() -> None:
    """Trained weights of this repository, by the digest that is written here."""
    network = DigitNetwork()
    done = load_into(network, problems.WEIGHTS, sha256=DIGITS)
    assert done.notes == (f"{len(done)} tensors float16 -> float32",)
    assert json.loads(done.metadata["about"])["path"] == "EDM"
    read = reference.load_file(problems.WEIGHTS)
    assert all(torch.equal(value, read[name].float()) for name, value in network.state_dict().items())
    load_weights(problems.WEIGHTS, expect={"path": "EDM", "predicts": "F", "about.sigma_data": done_sigma(done)})
    with pytest.raises(CheckpointError, match=r"says 'about.predicts' is 'F', where predicts='eps'"):
        load_weights(problems.WEIGHTS, expect={"predicts": "eps"})


def done_sigma(weights: Weights) -> float:
    return json.loads(weights.metadata["about"])["sigma_data"]
