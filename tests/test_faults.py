"""Kills and failing disks: after any of them the same command gives the same bytes, or one clear error and nothing damaged.

Runs are forked from this process, so torch is imported once. Kills come at random moments; every call into the operating
system fails once, in each way that it can.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sweeping import SWEEP, cheap, digests, fork, in_memory, quietly

from benchmarks import __main__ as command
from benchmarks import files, store
from benchmarks.making import Maker
from benchmarks.sweep import Sweep
from sde.errors import ToolkitError

KILLS = int(os.environ.get("KILLS", "110"))


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    with in_memory() as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def _cheap() -> Iterator[None]:
    with cheap():
        yield


def check_costs(out: Path, sweep: Sweep) -> None:
    """Nothing lost and nothing doubled in the log either: every cell's samples are counted once."""
    costs = store.read(out).costs
    assert [c["samples"] for c in costs] == [sweep.n] * (len(sweep.solver) * len(sweep.nfe))


# --- kills --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(memory: Path) -> tuple[dict[str, str], float]:
    """What a run that nobody kills leaves, and the seconds it takes. The first one here, so that children find all imported."""
    assert quietly(replace(SWEEP, out=memory / "first")) == 0
    out, began = memory / "undisturbed", time.monotonic()
    assert os.waitpid(fork(lambda: quietly(replace(SWEEP, out=out))), 0)[1] == 0
    took = time.monotonic() - began
    assert store.read(out).missing == []
    check_costs(out, SWEEP)
    return digests(out), took


def test_kills_at_random_moments(memory: Path, undisturbed: tuple[dict[str, str], float]) -> None:
    """At least a hundred: 0 lost, 0 doubled, the same bytes in the same files."""
    chance, kills, sweeps = random.Random(0), 0, 0
    wanted, took = undisturbed
    while kills < KILLS:
        out = memory / "killed"
        while True:
            pid = fork(lambda out=out: quietly(replace(SWEEP, out=out)))
            if kills < KILLS:
                time.sleep(chance.uniform(0.0, 0.7 * took))
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if os.WIFSIGNALED(status):
                kills += 1
                continue
            assert status == 0
            break
        assert digests(out) == wanted
        check_costs(out, SWEEP)
        shutil.rmtree(out)
        sweeps += 1
    assert kills >= KILLS >= 100
    assert sweeps >= 5


def test_kills_of_workers_that_share(memory: Path, undisturbed: tuple[dict[str, str], float]) -> None:
    """Three on one folder; whoever is killed is replaced by another."""
    chance, out, kills = random.Random(1), memory / "shared", 0
    wanted, took = undisturbed
    workers = [fork(lambda: quietly(replace(SWEEP, out=out, batch=2))) for _ in range(3)]
    while workers:
        time.sleep(chance.uniform(0.0, 0.2 * took))
        done = [pid for pid in workers if os.waitpid(pid, os.WNOHANG)[0]]
        workers = [pid for pid in workers if pid not in done]
        if workers and kills < 25:
            victim = chance.choice(workers)
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            workers.remove(victim)
            workers.append(fork(lambda: quietly(replace(SWEEP, out=out, batch=3))))
            kills += 1
    assert kills >= 5
    assert quietly(replace(SWEEP, out=out)) == 0
    assert digests(out) == wanted


# --- every call fails once ----------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What goes wrong, and in which calls it can. ``always``: a run recovers from it by itself."""

    act: Callable[[str, Any, tuple[Any, ...]], Any]
    calls: tuple[str, ...]
    always: bool = False


class Faulty:
    """The seam, whose call number ``at``, of those that can fail so, goes wrong."""

    def __init__(self, fault: Fault, at: int) -> None:
        self._fault, self._at, self.count, self.hit = fault, at, 0, ""

    def __getattr__(self, name: str) -> Any:
        real = getattr(files.System, name)

        def made(*args: Any) -> Any:
            self.count += name in self._fault.calls
            if self.hit or self.count != self._at:
                return real(*args)
            self.hit = name
            return self._fault.act(name, real, args)

        return made


def raising(number: int) -> Callable[[str, Any, tuple[Any, ...]], Any]:
    def act(name: str, real: Any, args: tuple[Any, ...]) -> Any:
        raise OSError(number, os.strerror(number))

    return act


def killed(name: str, real: Any, args: tuple[Any, ...]) -> Any:
    """A write is half done first."""
    if name == "write":
        real(args[0], bytes(args[1])[: len(args[1]) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def short(name: str, real: Any, args: tuple[Any, ...]) -> Any:
    return real(args[0], bytes(args[1])[: len(args[1]) // 2])


CHANGING = ("open", "write", "fsync", "close", "replace", "unlink", "mkdir", "makedirs", "rmdir", "flock")
LOOKING = ("lstat", "fstat", "listdir", "read", "lseek")
GROWING = ("open", "write", "fsync", "close", "mkdir", "makedirs", "replace")
FAULTS = {
    "kill": Fault(killed, CHANGING),  # between two changes one moment is as good as another
    "EIO": Fault(raising(errno.EIO), CHANGING + LOOKING),
    "EINTR": Fault(raising(errno.EINTR), CHANGING + LOOKING, always=True),
    "ENOSPC": Fault(raising(errno.ENOSPC), GROWING),
    "EDQUOT": Fault(raising(errno.EDQUOT), GROWING),
    "EROFS": Fault(raising(errno.EROFS), ("open", "mkdir", "makedirs", "replace", "unlink", "rmdir")),
    "EACCES": Fault(raising(errno.EACCES), ("open", "mkdir", "makedirs", "replace", "unlink", "rmdir", "listdir", "lstat")),
    "short write": Fault(short, ("write",), always=True),
    "EXDEV": Fault(raising(errno.EXDEV), ("replace",)),
    "ENOLCK": Fault(raising(errno.ENOLCK), ("flock",)),
}
BRIEF = replace(SWEEP, solver=("ddim",), nfe=(2,), n=6, part=2, metric=("mean_error",))


def constant(self: Maker, item: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """In the place of sampling: what is tried here is the way of files to the disk."""
    about = item.about
    rows = [{"model": about["model"], "solver": about.get("solver"), "grid": "g", "budget": 2, "n": 6, "value": 1.0}]
    rows = [{**row, "metric": "m", "note": "", "interval": None, "within_floor": None} for row in rows]
    for path in item.needs:
        self.needed(path)
    cost = {
        "samples": about.get("b", 0) - about.get("a", 0),
        "calls": 2,
        "batch": 1,
        "seconds": 1.0,
        "network_seconds": 1.0,
        "device_seconds": None,
    }
    return (
        {"rows": rows} if item.kind == "rows" else {},
        {"x": torch.ones(3)},
        {**cost, "peak_memory": 1, "device": "cpu"} if item.kind == "part" else {},
    )


def attempt(sweep: Sweep) -> str:
    """What a run that fails says; "" if it does not."""
    try:
        assert quietly(sweep) == 0
    except ToolkitError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", FAULTS)
def test_every_call_fails_once(memory: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """For n = 1, 2, ... until there is no n-th call: it goes wrong, then comes the same command again."""
    monkeypatch.setattr(Maker, "make", constant)
    reference, out, fault = memory / "brief", memory / f"faulty {kind}", FAULTS[kind]
    if not reference.exists():
        assert quietly(replace(BRIEF, out=reference)) == 0
    wanted, asked = digests(reference), replace(BRIEF, out=out)
    recovered = refused = 0
    for at in range(1, 10_000):
        seam = Faulty(fault, at)
        monkeypatch.setattr(files, "system", seam)
        if kind == "kill":
            status = os.waitpid(fork(lambda: quietly(asked)), 0)[1]
            assert status in (0, signal.SIGKILL)
            over, said = status == 0, "killed"
        else:
            said = attempt(asked)
            over = not seam.hit
        monkeypatch.setattr(files, "system", files.System())
        if over:
            break
        recovered, refused = recovered + (not said), refused + bool(said)
        if said and kind != "kill":
            assert len(said) < 400
            assert "\n" not in said
            assert str(out) in said
        for name, digest in digests(out).items() if out.exists() else ():  # whatever has its name is whole
            if name in wanted and name != store.RESULTS:
                assert digest == wanted[name], (at, seam.hit, name)
        if (out / store.RESULTS).exists():
            assert files.unseal_lines((out / store.RESULTS).read_bytes())[1] == 0
        assert fault.always or quietly(asked) == 0
        assert digests(out) == wanted, (at, seam.hit)
        check_costs(out, BRIEF)
        shutil.rmtree(out)
    assert recovered + refused == at - 1
    assert at > {"short write": 10, "EXDEV": 5, "ENOLCK": 8}.get(kind, 60)  # every call of a run was tried
    assert (refused == 0) == fault.always or kind == "ENOLCK"


class Full(files.System):
    """A disk that takes so many writes, and no more."""

    left = 12

    @classmethod
    def write(cls, descriptor: int, data: Any) -> int:
        cls.left -= 1
        if cls.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(descriptor, data)


def test_a_full_disk_is_one_line(memory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """By way of the command line: status 2, no traceback, and what is whole stays; with room again the sweep ends."""
    monkeypatch.setattr(files, "system", Full())
    words = ["run", "--model", "tiny_models:shrink", "--solver", "ddim", "--nfe", "2", "-n", "6", "--blocks", "3"]
    words += ["--metric", "mean_error", "--out", str(memory / "full")]
    assert command.main(words) == 2
    said = capfd.readouterr().err
    assert said.startswith("benchmarks run: ")
    assert "No space left on device" in said
    assert said.count("\n") == 1
    assert not list((memory / "full").rglob("*.partial"))
    monkeypatch.setattr(files, "system", files.System())
    assert command.main(words) == 0
    assert store.read(memory / "full").missing == []
