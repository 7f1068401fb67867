"""The parts of a folder of results: whole files, sealed lines and files, claims, the configuration, the audit."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import claims, files, kept, record, store, sweep
from benchmarks.claims import Claims
from benchmarks.store import Store
from benchmarks.sweep import Cell, Facts, Item, Measures, Sweep
from sde.errors import InputError, ResultsError, RunError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NASTY = "a\u0085b\u2028c\u2029d\x00e\x1ff\n\r\x0b\x0c\x1c\ud800g\u202e</script>\"'"


# --- sealed lines -----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(), JSON, min_size=1, max_size=5))
def test_a_line_is_one_line_and_reads_back(record: dict[str, Any]) -> None:
    line = files.seal(record)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert line.isascii()
    back = files.unseal(line[:-1])
    record.pop("crc", None)
    assert back == record


def test_a_line_is_rfc_8259() -> None:
    line = files.seal({"a": float("nan"), "b": [float("inf"), 1.5], "c": (1, 2), "d": NASTY})
    found = json.loads(line, parse_constant=lambda word: pytest.fail(word))
    assert (found["a"], found["b"], found["c"], found["d"]) == (None, [None, 1.5], [1, 2], NASTY)


ROWS = [{"i": i, "words": NASTY, "value": i / 7} for i in range(3)]


def test_truncation_at_every_byte_is_seen() -> None:
    data = b"".join(map(files.seal, ROWS))
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in range(1, len(data)):
        rows, damaged = files.unseal_lines(data[:cut])
        assert len(rows) == sum(end <= cut for end in ends)
        assert damaged == (cut not in ends), cut  # at a line's end nothing is torn; that rows are missing the sweep knows


def test_every_bit_flip_in_lines_is_seen() -> None:
    data = b"".join(map(files.seal, ROWS))
    for at in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            rows, damaged = files.unseal_lines(bytes(broken))
            assert damaged >= 1, (at, bit)
            assert all({k: v for k, v in row.items() if k != "crc"} in ROWS for row in rows)


def test_lines_end_at_line_feeds_only() -> None:
    for mark in ("\u0085", "\u2028", "\x0b", "\x0c", "\x1c", "\r"):
        body = json.dumps({"a": mark}, ensure_ascii=False).encode()
        line = body[:-1] + b', "crc": "%08x"}\n' % files.zlib.crc32(body)
        found = files.unseal_lines(line)[0]
        assert [f["a"] for f in found] == [mark]


def test_foreign_lines_are_damaged_lines() -> None:
    deep = b"[" * 100_000
    sealed_deep = b'{"a": ' + deep + b"}"
    sealed_deep = sealed_deep[:-1] + b', "crc": "%08x"}' % files.zlib.crc32(sealed_deep)
    for line in (b"{}", b"\x00" * 50, deep, sealed_deep, b'{"crc": "00000000"}', b"x" * 10_000_000, b"[1]"):
        assert files.unseal(line) is None


def test_appending_after_a_torn_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for cut in (0, 1, 20, len(files.seal(ROWS[0])) - 1):
        log.write_bytes(files.seal(ROWS[0]) + files.seal(ROWS[1])[:cut])
        files.append(log, ROWS[2])
        rows, damaged = files.unseal_lines(log.read_bytes())
        assert ([r["i"] for r in rows], damaged) == ([0, 2], cut > 0)


# --- sealed files -----------------------------------------------------------------------------------------------------------

ABOUT = {"words": NASTY.replace("\ud800", ""), "sha256": '"sha256":"' + "0" * 64, "n": 3}
TENSORS = {"a/mean": torch.arange(3.0, dtype=torch.float64), "x": torch.tensor([[1.0, float("nan")]])}


def test_a_sealed_file_reads_back_and_is_safetensors(tmp_path: Path) -> None:
    data = files.pack(ABOUT, TENSORS)
    assert data == files.pack(ABOUT, TENSORS)
    about, tensors = files.unpack(data)
    assert about == ABOUT
    assert {k: v.dtype for k, v in tensors.items()} == {k: v.dtype for k, v in TENSORS.items()}
    assert all(torch.equal(tensors[k].nan_to_num(7), TENSORS[k].nan_to_num(7)) for k in TENSORS)
    assert files.unpack(files.pack({}, {})) == ({}, {})
    (tmp_path / "a.safetensors").write_bytes(data)
    from safetensors.torch import load_file  # anyone can read it

    assert torch.equal(load_file(tmp_path / "a.safetensors")["a/mean"], TENSORS["a/mean"])


def test_every_damage_of_a_sealed_file_is_seen() -> None:
    data = files.pack(ABOUT, TENSORS)
    chance = random.Random(0)
    broken = [data[:cut] for cut in range(len(data))] + [data + b"\x00", b"\x00" * len(data), data + data]
    for at in range(len(data)):
        one = bytearray(data)
        one[at] ^= 1 << chance.randrange(8)
        broken.append(bytes(one))
    seen = 0
    for damaged in broken:
        with pytest.raises(ResultsError, match=r"damaged|empty"):
            files.unpack(damaged)
        seen += 1
    assert seen == 2 * len(data) + 3


def test_a_file_that_is_sealed_but_not_ours() -> None:
    from scores.safetensors_file import encode

    blank = encode({}, {"other": "1", "sha256": "0" * 64})
    with pytest.raises(ResultsError, match="not a file of this harness"):
        files.unpack(blank.replace(b"0" * 64, files.hashlib.sha256(blank).hexdigest().encode()))


# --- whole files ------------------------------------------------------------------------------------------------------------


def test_files_have_the_usual_modes_and_nothing_is_left_beside(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "a", b"1")
        files.subfolder(tmp_path / "f")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o750
    assert sorted(os.listdir(tmp_path)) == ["a", "f"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its name is, before anything is built on it: what is left of a power cut is the old file or the new one."""
    made = []

    class Told(files.System):
        def __getattribute__(self, name: str) -> Any:
            made.append(name)
            return getattr(files.System, name)

    monkeypatch.setattr(files, "system", Told())
    for content in (b"1", lambda path: path.write_bytes(b"1")):
        made.clear()
        files.write(tmp_path / "a", content)
        written = ["open", "write"] if content == b"1" else ["open"]
        assert made == [*written, "fsync", "close", "replace", "open", "fsync", "close"]


def test_writing_follows_no_link_and_takes_no_name_that_exists(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    (tmp_path / "a").symlink_to(secret)
    files.write(tmp_path / "a", "new")
    assert (secret.read_text(), (tmp_path / "a").read_text(), (tmp_path / "a").is_symlink()) == ("s", "new", False)
    (tmp_path / ".b.0123.partial").symlink_to(secret)
    with pytest.raises(RunError, match="cannot be written"):
        files.write(tmp_path / "b", "new", token="0123")
    assert secret.read_text() == "s"


def test_reading_takes_regular_files_only(tmp_path: Path) -> None:
    assert files.read(tmp_path / "none") is None
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "loop", "folder"):
        with pytest.raises(ResultsError, match="no regular file"):
            files.read(tmp_path / name)
        assert not files.exists(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        files.write(tmp_path / "a", "1")


def test_out_may_have_any_name(tmp_path: Path) -> None:
    for name in ("with space", "new\nline", "\u00fcnicode \u202e", "$(touch x)'\"", "x" * 200):
        made = Store(tmp_path / name, "me")
        made.close()
        assert (tmp_path / name).is_dir()
    assert len(os.listdir(tmp_path)) == 5


@pytest.mark.parametrize("make", ["file", "loop", "foreign", "long"])
def test_an_out_that_cannot_be_used(tmp_path: Path, make: str) -> None:
    out = tmp_path / ("x" * 300 if make == "long" else "out")
    if make == "file":
        out.write_text("")
    elif make == "loop":
        out.symlink_to(out)
    elif make == "foreign":
        out.mkdir()
        (out / "thesis.tex").write_text("dear")
    with pytest.raises((InputError, RunError), match="other files" if make == "foreign" else "--out"):
        Store(out, "me")
    if make == "foreign":
        assert os.listdir(out) == ["thesis.tex"]


# --- claims -----------------------------------------------------------------------------------------------------------------


def test_a_name_is_held_by_one(tmp_path: Path) -> None:
    a, b = Claims(tmp_path / "l", "process a"), Claims(tmp_path / "l", "process b")
    assert a.take("x")
    assert not b.take("x")
    assert not a.take("x")
    assert b.take("y")
    assert a.alive(b.token)
    assert (a.at_work(), b.at_work()) == ([], [])
    b.start()
    assert (a.at_work(), b.at_work()) == (["process b"], [])
    a.give("x")
    assert b.take("x")
    b.close()
    assert a.take("x")
    assert a.at_work() == []
    assert not a.alive(b.token)
    a.close()
    assert not (tmp_path / "l").exists()


def test_a_name_that_was_removed_while_it_was_opened_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder lets go between the opening and the locking: the lock would be on a file that nobody else sees."""
    a, b, c = (Claims(tmp_path / "l", word) for word in "abc")
    assert a.take("x")

    class Between(files.System):
        @staticmethod
        def flock(descriptor: int) -> None:
            if "x" in a._open:
                a.give("x")
            files.System.flock(descriptor)

    monkeypatch.setattr(files, "system", Between())
    assert b.take("x")
    assert (tmp_path / "l" / "x").exists()
    assert not c.take("x")
    for one in (a, b, c):
        one.close()


def test_a_name_ends_with_its_process(tmp_path: Path) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child = Claims(tmp_path / "l", "the child")
        child.start()
        os.write(write, b"1" if child.take("x") else b"0")
        time.sleep(60)
        os._exit(0)
    assert os.read(read, 1) == b"1"
    mine = Claims(tmp_path / "l", "me")
    assert not mine.take("x")
    assert mine.at_work() == ["the child"]
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert mine.take("x")
    assert mine.at_work() == []
    mine.close()
    assert not (tmp_path / "l").exists()


class NoFlock(files.System):
    """A file system that has no locks."""

    @staticmethod
    def flock(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")


def test_without_flock_names_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "system", NoFlock())
    monkeypatch.setattr(claims, "STALE", 0.6)
    a, b = Claims(tmp_path / "l", "a"), Claims(tmp_path / "l", "b")
    assert not a.flock
    assert a.take("x")
    end = time.monotonic() + 1.5
    while time.monotonic() < end:  # it beats, so it lives, however long
        assert not b.take("x")
        time.sleep(0.05)
    a._end.set()  # what a killed process does: nothing more
    began = time.monotonic()
    while not b.take("x"):
        assert time.monotonic() < began + 5.0
        time.sleep(0.05)
    assert time.monotonic() - began > 0.3
    b.give("x")
    assert b.take("x")
    b.close()


def test_a_beat_goes_to_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors are numbers that are given out again."""
    monkeypatch.setattr(files, "system", NoFlock())
    monkeypatch.setattr(claims, "STALE", 0.01)
    mine = Claims(tmp_path / "l", "a" * 100)
    for i in range(200):
        assert mine.take(f"n{i}")
        mine.give(f"n{i}")
        files.write(tmp_path / "file", b"content")
        assert (tmp_path / "file").read_bytes() == b"content"
    assert mine._beat > 0
    mine.close()


# --- a sweep's files --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(1, 90))
def test_parts_hold_every_index_once(m: int, part: int) -> None:
    found = sweep.spans(m, part)
    assert [i for a, b in found for i in range(a, b)] == list(range(m))
    assert all(0 < b - a <= part for a, b in found)


class FakeLine:
    version = ""
    joint = to_zero = False

    def flow(self, eta: float | None) -> bool:
        return True


FACTS = Facts("m", "d", (2,))
SMALL = Sweep(model=("m",), solver=("ddim", "ddpm"), nfe=(2, 4), n=24, blocks=3, part=3, metric=("fd",))
MEASURES = Measures({"ddim": FakeLine(), "ddpm": FakeLine()}, {"fd": "key"}, ("nll_model",), True, True, True)


@given(st.integers(3, 6), st.integers(2, 60), st.integers(0, 25))
def test_items_of_a_sweep(blocks: int, m: int, part: int) -> None:
    """Every index of every block of every cell once; what an item needs comes before it; no two share a path."""
    asked = replace(SMALL, blocks=blocks, n=m * blocks, part=part)
    found = list(sweep.items(asked, "c", FACTS, MEASURES))
    paths = [item.path for item in found]
    assert len(set(paths)) == len(paths)
    for i, item in enumerate(found):
        assert set(item.needs) <= set(paths[:i])
    for cell in sweep.cells(asked, "m"):
        parts = [i.about for i in found if i.kind == "part" and (i.about["solver"], i.about["nfe"]) == (cell.solver, cell.nfe)]
        have = [(p["block"], j) for p in parts for j in range(p["a"], p["b"])]
        assert have == [(b, j) for b in range(blocks) for j in range(m)]
    rows = [i for i in found if i.kind == "rows"]
    assert len(rows) == 5
    assert all(len(i.needs) == 1 + blocks * len(sweep.spans(m, part or 1000)) for i in rows[1:])


def test_a_name_depends_on_all_that_the_content_does() -> None:
    def paths(asked: Sweep = SMALL, config: str = "c", facts: Facts = FACTS) -> set[str]:
        return {i.path for i in sweep.items(asked, config, facts, MEASURES) if i.kind != "floor"}

    base = paths()
    for other in (paths(config="e"), paths(facts=Facts("m", "e", (2,))), paths(facts=Facts("k", "d", (2,)))):
        assert not base & other
    more = paths(replace(SMALL, n=48)) & base  # more samples: all parts stay, but for the short last ones
    assert {p for p in base if "rows/" not in p and not p.endswith("000000006-000000008.safetensors")} == more
    assert base == paths(replace(SMALL, batch=7, threads=2, preview=1.0, out=Path("elsewhere"), on_nan="skip"))


@given(st.lists(st.text(max_size=400) | st.sampled_from(["../x", "/etc/x", "a\0b", "CON", "x" * 300, "..", "."]), max_size=4))
def test_names_are_harmless(words: list[str]) -> None:
    path = sweep.place("part", {"w": words}, *words)
    kind, name = path.split("/")
    assert kind == "parts"
    assert len(name) <= 93
    assert store._CELL.fullmatch(name) or not name.split("-")[0]
    assert not set(name) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_+-")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": ()}, "give --model"),
        ({"solver": ("ddim", "ddim")}, "each once"),
        ({"nfe": ()}, "at least one"),
        ({"nfe": (0, 4)}, "must be >= 1"),
        ({"blocks": 2}, "at least 3 blocks"),
        ({"n": 50_001}, "multiple of --blocks 3, at least 6, such as 50001|such as"),
        ({"n": 3}, "at least 6, such as 6"),
        ({"seed": -1}, "must be in"),
        ({"part": -1}, "must be >= 0"),
        ({"threads": 0}, "must be >= 1"),
        ({"preview": float("nan")}, "must be >= 0"),
        ({"eta": -0.1}, "must be >= 0"),
        ({"eta": float("nan")}, "must be >= 0"),
        ({"shape": (3, 0)}, "sizes must be >= 1"),
    ],
)
def test_bad_options(change: dict[str, Any], words: str) -> None:
    if change.get("n") == 50_001:  # 3 blocks divide it
        change, words = {"n": 50_000}, "such as 50001"
    with pytest.raises(InputError, match=words):
        sweep.check(replace(SMALL, **change))
    sweep.check(SMALL)


# --- TOML -------------------------------------------------------------------------------------------------------------------


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(
        'model = "ring2"\nsolver = ["ddim", "heun"]\nnfe = [4, 8]\nkeep-samples = true\nstop = 1\nout = "here"\n'
        'on_nan = "skip"\n'
    )
    found = sweep.from_toml(path)
    wanted = Sweep(model=("ring2",), solver=("ddim", "heun"), nfe=(4, 8), keep_samples=True, stop=1.0, out=Path("here"))
    assert found == replace(wanted, on_nan="skip", config=path)
    assert sweep.defaults(["--nfe", "3", "--config", str(path)]) == found
    assert sweep.defaults([f"--config={path}"]) == found
    assert sweep.defaults(["--nfe", "3"]) == Sweep()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("solvr = 'ddim'", "'solvr' is unknown: did you mean 'solver'"),
        ("n = 'many'", "give int"),
        ("n = true", "give int"),
        ("n = 1.5", "give int"),
        ("n = [1]", "give int"),
        ("nfe = ['a']", "give a list of int"),
        ("eta = 'x'", "give float"),
        ("keep_samples = 1", "give bool"),
        ("dtype = 'float23'", "did you mean 'float32'"),
        ("nfe = ", "no TOML"),
        ("config = 'x'", "'config' is unknown"),
        ("model = 'os:system'", "no file may"),
        ("model = ['ring2', 'my.module:load']", "no file may"),
    ],
)
def test_bad_toml(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        sweep.from_toml(path)
    with pytest.raises(InputError, match="cannot be read"):
        sweep.from_toml(tmp_path / "none.toml")


def test_toml_of_builtin_names_with_a_colon(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('model = ["ring2:vp", "gaussian:x.npy"]')
    assert sweep.from_toml(path).model == ("ring2:vp", "gaussian:x.npy")


# --- the folder ---------------------------------------------------------------------------------------------------------------

CODE = {"toolkit": "t", "torch": "2"}
ORIGIN = {"versions": {"torch": "2"}, "git": "abc", "device": "cpu"}


def opened(out: Path, asked: Sweep = SMALL, facts: Facts = FACTS, code: dict[str, str] = CODE) -> Store:
    found = Store(out, "me")
    try:
        found.open(asked, [facts], code, ORIGIN)
    except BaseException:
        found.close()
        raise
    return found


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("asked", "facts", "code", "words"),
    [
        (replace(SMALL, seed=1), FACTS, CODE, "--seed was 0, is 1"),
        (replace(SMALL, dtype="float64"), FACTS, CODE, "--dtype was float32, is float64"),
        (replace(SMALL, metric=("fd", "kid")), FACTS, CODE, "--metric was fd, is fd kid"),
        (replace(SMALL, start_time=2.0), FACTS, CODE, "--start-time was not given, is 2.0"),
        (replace(SMALL, device="cuda:1"), FACTS, CODE, "--device was cpu, is cuda"),
        (replace(SMALL, n=12), FACTS, CODE, "-n was 24, is 12: it may grow, not shrink"),
        (replace(SMALL, part=4), FACTS, CODE, "--part was 3, is 4"),
        (SMALL, Facts("m", "e", (2,)), CODE, r"weights, data or code of m have changed \(digest d, now e\)"),
        (SMALL, Facts("m", "d", (3,)), CODE, r"samples of m were \(2,\), are \(3,\)"),
        (SMALL, FACTS, {**CODE, "toolkit": "u"}, "the code of this toolkit was t, is u"),
        (SMALL, FACTS, {**CODE, "torch": "3"}, "torch was 2, is 3"),
    ],
)
def test_another_configuration_is_refused_and_named(
    tmp_path: Path, asked: Sweep, facts: Facts, code: dict[str, str], words: str
) -> None:
    opened(tmp_path / "o").close()
    before = contents(tmp_path / "o")
    with pytest.raises(ResultsError, match=words) as caught:
        opened(tmp_path / "o", asked, facts, code)
    assert "--force-new" in str(caught.value)
    assert contents(tmp_path / "o") == before
    opened(tmp_path / "o", replace(asked, force_new=True), facts, code).close()
    assert contents(tmp_path / "o") != before


def test_a_folder_grows(tmp_path: Path) -> None:
    opened(tmp_path / "o").close()
    other = replace(SMALL, n=48, solver=("heun", "ddim"), nfe=(8,), model=("k",), batch=3, threads=4, on_nan="skip")
    opened(tmp_path / "o", other, Facts("k", "d", (5,))).close()
    found = record.read_sweep(tmp_path / "o")
    assert found is not None
    assert found["n"] == 48
    assert found["lists"] == {"model": ["m", "k"], "solver": ["ddim", "ddpm", "heun"], "grid": ["log_snr"], "nfe": [2, 4, 8]}
    assert sorted(found["models"]) == ["k", "m"]


def items_of(out: Store, asked: Sweep = SMALL) -> list[Item]:
    return list(sweep.items(asked, out.config, FACTS, MEASURES))


def filled(out: Path) -> tuple[Store, list[Item]]:
    """A folder in which every item's file is there."""
    made = opened(out)
    found = items_of(made)
    for item in found:
        cell = Cell(*(item.about.get(k) for k in Cell._fields))
        rows = [{**cell._asdict(), "budget": cell.nfe, "n": 8, "asked": SMALL.n, "value": 0.5}]
        made.put(item, {"rows": rows} if item.kind == "rows" else {}, {"t": torch.ones(2)})
    return made, found


def test_the_audit_lists_what_is_damaged_and_only_that_is_made_again(tmp_path: Path) -> None:
    made, found = filled(tmp_path / "o")
    assert made.audit(found) == store.Audit(whole=len(found))
    parts = [tmp_path / "o" / i.path for i in found if i.kind == "part"]
    parts[0].write_bytes(b"")
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    flipped = bytearray(parts[2].read_bytes())
    flipped[len(flipped) // 2] ^= 4
    parts[2].write_bytes(flipped)
    parts[3].write_bytes(parts[4].read_bytes())  # whole, and another's
    parts[5].unlink()
    parts[5].mkdir()
    (parts[5] / "thesis.tex").write_text("dear")
    parts[6].unlink()
    parts[6].symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(b"outside")
    parts[7].unlink()  # missing is not damaged
    (parts[0].parent / "notes.txt").write_text("mine")
    (tmp_path / "o" / "parts" / "mine").mkdir()
    (tmp_path / "o" / "mine.txt").write_text("mine")
    result = made.audit(found)
    assert result.whole == len(found) - 7
    assert len(result.damaged) == 6
    said = "\n".join(result.damaged)
    for i, word in enumerate(("is empty", "is damaged", "is damaged", "another item's", None, "no regular", "no regular")):
        if word is not None:
            assert f"{parts[i].name}" in said
            assert word in said
    notes = str((parts[0].parent / "notes.txt").relative_to(tmp_path / "o"))
    assert sorted(result.foreign) == sorted([notes, "parts/mine", "mine.txt"])
    missing = [i for i in found if not made.has(i)]
    assert [tmp_path / "o" / i.path for i in missing] == [p for k, p in enumerate(parts) if k in (0, 1, 2, 3, 5, 6, 7)]
    for item in missing:
        made.put(item, {}, {"t": torch.ones(2)})
    again = made.audit(found)
    assert (again.whole, again.damaged) == (len(found), [])
    assert (tmp_path / "elsewhere").read_bytes() == b"outside"
    assert next((tmp_path / "o" / "aside").rglob("thesis.tex")).read_text() == "dear"
    made.close()


def test_what_is_removed_is_only_ours(tmp_path: Path) -> None:
    made, found = filled(tmp_path / "o")
    made.publish()
    made.close()
    (tmp_path / "o" / "notes.txt").write_text("mine")
    (tmp_path / "o" / "parts" / "notes.txt").write_text("mine")
    opened(tmp_path / "o", replace(SMALL, seed=5, force_new=True)).close()
    left = {name for name in contents(tmp_path / "o") if not name.startswith("locks")}
    assert left == {"notes.txt", "parts/notes.txt", "sweep.json"}
    assert found


def without_locks(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if not name.startswith("locks")}


def test_force_new_harms_nobody_at_work(tmp_path: Path) -> None:
    """Of another configuration the folder is cleared, unless someone is at work on it; of the same one nothing is lost, so that
    workers that are started together, or again, may all say so.
    """
    made, found = filled(tmp_path / "o")
    before = without_locks(tmp_path / "o")
    with pytest.raises(store.HeldError, match="in use by me"):
        opened(tmp_path / "o", replace(SMALL, seed=5, force_new=True))
    same = opened(tmp_path / "o", replace(SMALL, force_new=True))
    assert same.others == ["me"]
    same.close()
    assert without_locks(tmp_path / "o") == before
    made.close()
    starting = Store(tmp_path / "o", "another worker of the same start")
    first = opened(tmp_path / "o", replace(SMALL, seed=5, force_new=True))
    assert set(without_locks(tmp_path / "o")) == {"sweep.json"}
    first.put(items_of(first, replace(SMALL, seed=5))[0], {}, {})
    starting.open(replace(SMALL, seed=5, force_new=True), [FACTS], CODE, ORIGIN)
    assert len(without_locks(tmp_path / "o")) == 2
    for one in (first, starting):
        one.close()
    assert found


def test_partial_files_of_the_dead_are_removed_and_of_the_living_are_not(tmp_path: Path) -> None:
    made, found = filled(tmp_path / "o")
    mine = tmp_path / "o" / "parts" / f".x.{made.claims.token}.partial"
    dead = [
        tmp_path / "o" / f".sweep.json.{'0' * 16}.partial",
        (tmp_path / "o" / found[3].path).parent / f".y.{'a' * 16}.partial",
    ]
    for path in (mine, *dead):
        path.write_bytes(b"half")
    other = opened(tmp_path / "o")
    assert mine.exists()
    assert not any(path.exists() for path in dead)
    other.close()
    made.close()
    opened(tmp_path / "o").close()
    assert not mine.exists()


def test_results_are_made_of_items(tmp_path: Path) -> None:
    made, found = filled(tmp_path / "o")
    assert len(made.publish()) == 5
    first = (tmp_path / "o" / "results.jsonl").read_bytes()
    for damage in (b"", first[:-7], first + b"junk", first.replace(b"0.5", b"0.6"), None):
        if damage is None:
            (tmp_path / "o" / "results.jsonl").unlink()
        else:
            (tmp_path / "o" / "results.jsonl").write_bytes(damage)
        made.publish()
        assert (tmp_path / "o" / "results.jsonl").read_bytes() == first
    result = store.read(tmp_path / "o")
    assert (len(result.rows), result.damaged, result.missing) == (5, 0, [])
    cell = [i for i in found if i.kind == "rows"][-1]
    (tmp_path / "o" / cell.path).unlink()
    made.publish()
    result = store.read(tmp_path / "o")
    assert (len(result.rows), result.missing) == (4, [("m", "ddpm", "log_snr", 4)])
    made.close()


def test_rows_stay_until_the_grown_ones_are_there(tmp_path: Path) -> None:
    made, _ = filled(tmp_path / "o")
    made.publish()
    made.close()
    grown = replace(SMALL, n=48)
    made = opened(tmp_path / "o", grown)
    assert len(made.publish()) == 5
    rows = [i for i in items_of(made, grown) if i.kind == "rows"]
    made.put(rows[2], {"rows": [{"model": "m", "solver": "ddim", "grid": "log_snr", "budget": 4, "n": 8, "asked": 48}]}, {})
    made.publish()
    result = store.read(tmp_path / "o")
    assert sorted(row["asked"] for row in result.rows) == [24, 24, 24, 24, 48]
    assert ("m", "ddim", "log_snr", 4) not in result.missing
    assert len(result.missing) == 3
    made.close()


def test_a_configuration_that_is_damaged_is_written_again(tmp_path: Path) -> None:
    made, found = filled(tmp_path / "o")
    made.close()
    path = tmp_path / "o" / "sweep.json"
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) - 2):
        path.write_bytes(whole[:cut])
        made = opened(tmp_path / "o")
        assert made.audit(found).whole == len(found)
        made.close()
        assert path.read_bytes() == whole
    for at in range(0, len(whole), 3):
        broken = bytearray(whole)
        broken[at] ^= 1
        path.write_bytes(broken)
        if broken[:15] == whole[:15]:  # else it may be of another schema
            assert record.read_sweep(tmp_path / "o") is None
    with pytest.raises(ResultsError, match="holds no results"):
        store.read(tmp_path)


def test_a_newer_schema_is_named(tmp_path: Path) -> None:
    opened(tmp_path / "o").close()
    path = tmp_path / "o" / "sweep.json"
    path.write_text(json.dumps({"schema": 99, "new": True}))
    for read in (store.read, lambda out: opened(out)):
        with pytest.raises(ResultsError, match="schema 99 by a newer version; this one reads 1"):
            read(tmp_path / "o")


def test_costs_count_a_part_once(tmp_path: Path) -> None:
    made, _ = filled(tmp_path / "o")
    cost = {"samples": 3, "calls": 2, "batch": 3, "device_seconds": None, "peak_memory": 5, "device": "cpu"}
    for path, seconds in (("a", 9.0), ("b", 2.0), ("a", 4.0), ("c", 6.0)):
        made.log(
            "part", path=path, model="m", solver="ddim", grid="log_snr", budget=2, seconds=seconds, network_seconds=2.0, **cost
        )
    with open(tmp_path / "o" / "log.jsonl", "ab") as log:
        log.write(b'{"torn')
    made.log(
        "part",
        path="d",
        model="m",
        solver="ddpm",
        grid="log_snr",
        budget=2,
        seconds=1.0,
        network_seconds=0.5,
        **cost | {"peak_memory": None},
    )
    made.publish()
    first, second = store.read(tmp_path / "o").costs
    assert (first["solver"], first["parts"], first["samples"], first["seconds"]) == ("ddim", 3, 9, 12.0)
    assert first["seconds_per_call"] == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert first["overhead"] == {"median": 1.0, "low": 0.5, "high": 1.5}
    assert (first["peak_memory"], second["peak_memory"]) == (5, None)
    assert (second["solver"], second["seconds_per_call"]["median"], second["overhead"]["high"]) == ("ddpm", 0.5, 1.0)
    made.close()


def test_ten_thousand_parts(tmp_path: Path) -> None:
    """Names are looked at once, and nothing is read twice: seconds, not minutes."""
    made = opened(tmp_path / "o")
    folder = tmp_path / "o" / "parts" / "m-ddim-2-0123456789ab"
    folder.mkdir()
    for i in range(10_000):
        (folder / f"0.{i:09d}-{i + 1:09d}.safetensors").touch()
    (folder / "foreign").touch()
    began = time.process_time()
    assert made.audit([]).foreign == ["parts/m-ddim-2-0123456789ab/foreign"]
    assert time.process_time() - began < 2.0
    made.close()


def test_the_first_of_two_files_stays(tmp_path: Path) -> None:
    """Where rounding is not the same twice, rows may have been made of the first one."""
    made, found = filled(tmp_path / "o")
    made.put(found[4], {"again": True}, {"t": torch.zeros(2)})
    assert made.get(found[4]).tensors["t"].tolist() == [1.0, 1.0]
    made.close()


def test_an_older_view_of_the_rows_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may lie about locks: then two publish at once, and the one that looked first may write last."""
    made, found = filled(tmp_path / "o")
    made.publish()
    whole = (tmp_path / "o" / "results.jsonl").read_bytes()
    last = tmp_path / "o" / [item for item in found if item.kind == "rows"][-1].path
    data = last.read_bytes()
    last.unlink()
    real, other = made._rows, iter([data])

    def meanwhile(sweep: Any) -> Any:
        rows = real(sweep)
        for other_rows in other:  # once: another worker ends, just after this one has looked
            last.write_bytes(other_rows)
            (tmp_path / "o" / "results.jsonl").write_bytes(whole)
        return rows

    monkeypatch.setattr(made, "_rows", meanwhile)
    made.publish()
    assert (tmp_path / "o" / "results.jsonl").read_bytes() == whole
    made.close()


def keeping(out: Path, n: int) -> tuple[Store, list[Item]]:
    """A folder of n samples a cell, sample i of block b being [10 b + i, -i]."""
    asked = replace(SMALL, n=n, part=4, keep_samples=True)
    made = opened(out, asked)
    found = [i for i in items_of(made, asked) if i.kind == "part" and not made.has(i)]
    for item in found:
        i = torch.arange(item.about["a"], item.about["b"], dtype=torch.float64)
        made.put(item, {}, {"x": torch.stack([10.0 * item.about["block"] + i, -i], 1)})
    made.close()
    return made, found


def test_kept_samples_are_each_there_once_however_the_folder_grew(tmp_path: Path) -> None:
    for n in (18, 21, 30):  # blocks of 6, 7 and 10: the last parts are [4, 6), [4, 7), [4, 8) and [8, 10)
        keeping(tmp_path / "o", n)
        sweep_ = record.read_sweep(tmp_path / "o")
        assert sweep_ is not None
        cells = list(kept.kept(tmp_path / "o", sweep_))
        assert [(c.cell["solver"], c.cell["budget"]) for c in cells] == [("ddim", 2), ("ddim", 4), ("ddpm", 2), ("ddpm", 4)]
        for cell in cells:
            assert (cell.n, cell.seeds) == (n, [0, 1, 2])
            x = torch.cat(list(cell.read()))
            assert x.tolist() == [[10.0 * b + i, -i] for b in range(3) for i in range(n // 3)]


def test_samples_that_are_not_those_are_refused(tmp_path: Path) -> None:
    made, found = keeping(tmp_path / "o", 18)
    sweep_ = record.read_sweep(tmp_path / "o")
    assert sweep_ is not None
    of = lambda cell: (cell["solver"], cell["budget"]) == ("ddim", 2)  # noqa: E731
    (cell,) = kept.kept(tmp_path / "o", sweep_, of)
    first, second = (tmp_path / "o" / item.path for item in found[:2])
    whole = second.read_bytes()
    for damage, words in (
        (first.read_bytes(), "something else"),
        (whole[:-3], "is damaged"),
        (None, "no part from sample 4 on"),
    ):
        second.write_bytes(damage) if damage is not None else second.unlink()
        with pytest.raises((InputError, ResultsError), match=words):
            list(next(kept.kept(tmp_path / "o", sweep_, of)).read())
    second.write_bytes(files.pack({"item": found[1].about}, {"x": torch.full((2, 2), torch.nan)}))
    with pytest.raises(InputError, match="2 of its samples are not finite"):
        list(cell.read())
    assert len(torch.cat(list(cell.read(finite=False)))) == 18
    other = {**sweep_, "models": {"m": {"digest": "of other weights", "shape": [2]}}}
    assert list(kept.kept(tmp_path / "o", other)) == []
    assert list(kept.kept(tmp_path / "o", {**sweep_, "config": "another"})) == []
    with pytest.raises(InputError, match="run the sweep with --keep-samples"):
        next(kept.kept(tmp_path / "o", {**sweep_, "settings": {**sweep_["settings"], "keep_samples": False}}))
    assert made


def test_reading_results_needs_no_torch_run(tmp_path: Path) -> None:
    """A reader sees what there is while others write, and writes nothing itself."""
    made, _ = filled(tmp_path / "o")
    made.publish()
    before = contents(tmp_path / "o")
    assert len(store.read(tmp_path / "o").rows) == 5
    assert record.read_sweep(tmp_path / "o") == store.read(tmp_path / "o").sweep
    assert contents(tmp_path / "o") == before
    made.close()


def test_the_seam_is_the_only_way_to_the_disk() -> None:
    """No call of these modules goes around ``files.system``: every fault that tests inject is a fault of all there are."""
    import ast

    here = Path(files.__file__).parent
    around = []
    for name in ("files", "claims", "record", "store", "kept", "making", "rows", "run", "progress"):
        for node in ast.walk(ast.parse((here / f"{name}.py").read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if (
                    called in ("open", "print")
                    or called.startswith(("os.", "shutil."))
                    or called.endswith((".write_bytes", ".write_text"))
                ):
                    around.append((name, called))
    allowed = {
        ("claims", "os.lseek"),  # beats, in their thread
        ("claims", "os.write"),
        ("run", "os.write"),  # to stderr, from a signal handler
        ("progress", "os.open"),  # a closed stdout's stand-in
        ("progress", "os.dup2"),
        ("progress", "os.close"),
        ("progress", "print"),
        ("run", "os.getpid"),
        ("run", "print"),
    }
    assert set(around) <= allowed
