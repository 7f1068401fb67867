"""Kills and failing disks: after any of them the same command gives the same bytes, or one clear error and nothing damaged.

Runs are forked from this process, so torch is imported once. Kills come at random moments; every call into the operating
system fails once, in each way that it can. Where each fault of a sweep is tried (names without a file: here):

    F1       SIGKILL at a random moment            test_kills_at_random_moments, test_kills_of_workers_that_share
    F2-F7    kill, ENOSPC, EIO, EINTR, EDQUOT,     test_every_call_fails_once, test_every_call_is_interrupted,
             EROFS at the n-th call, every n       test_a_full_disk_is_one_line
    F8       short write, fsync fails, EXDEV,      test_every_call_fails_once; test_store: a_folder_without_permission
             permission denied
    F9       truncated, bits flipped               test_store: truncation_at_every_byte, every_bit_flip_in_lines,
                                                   every_damage_of_a_sealed_file
    F10      torn line, U+0085, NUL, long line     test_store: lines_end_at_line_feeds_only, appending_after_a_torn_line,
                                                   foreign_lines_are_damaged_lines
    F11      two processes, one folder             test_run: workers_share; test_store: force_new_harms_nobody_at_work
    F12      stale lock, other host                test_store: a_name_ends_with_its_process, without_flock_names_beat
    F13      a worker lost, or hanging             test_run: two_workers_of_a_gloo_group, torchrun_itself (slow),
                                                   a_worker_that_hangs_is_not_waited_for
    F14      another configuration, weights, n     test_store: another_configuration_is_refused_and_named; test_run:
                                                   other_weights_are_refused, more_samples_are_those_of_a_run
    F15      another batch or number of workers    test_run: batches, workers_share, parts_in_any_order
    F16      Ctrl-C once, twice, SIGTERM           test_run: stopping_leaves_what_is_made_and_says_how_to_go_on
    F17      memory of the device runs out         test_run: memory_that_runs_out_halves_the_batch
    F18      NaN in sample i                       test_run: numbers_that_are_not_finite_stop_the_run_and_say_where
    F19      the clock jumps, the folder is gone   test_run: a_folder_that_is_gone; test_the_clock_may_jump
    F20      quota reached while a report is made  files.write, tried here at every call, is how reports are written
    F21      weights replaced while it runs        test_run: weights_that_change_while_the_sweep_runs, other_weights
    F22      10,000 parts, an empty one, a         test_store: ten_thousand_parts, the_audit_lists_what_is_damaged
             foreign one, a folder in its place
    F23      fork or spawn, threads, one core      test_run: an_interpreter_of_its_own, workers_share (threads 1 and 2)
    F24      stdout closed, no tty, LANG=C, odd    test_run: an_interpreter_of_its_own, a_closed_stdout_ends_no_run;
             paths                                 test_store: out_may_have_any_name
"""

from __future__ import annotations

import errno
import itertools
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
from sweeping import SWEEP, cheap, digests, ended, fork, in_memory, quietly

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

SHORT = replace(SWEEP, nfe=(2,))


@pytest.fixture(scope="module")
def undisturbed(memory: Path) -> tuple[dict[str, str], float]:
    """What a run that nobody kills leaves, and the seconds it takes. The first one here, so that children find all imported."""
    assert quietly(replace(SHORT, out=memory / "first")) == 0
    out, began = memory / "undisturbed", time.monotonic()
    assert ended(fork(lambda: quietly(replace(SHORT, out=out)))) == 0
    took = time.monotonic() - began
    assert store.read(out).missing == []
    check_costs(out, SHORT)
    return digests(out), took


def made(out: Path) -> int:
    """Files that are made, while others come and go."""
    return sum(name.endswith(".safetensors") for _, _, names in os.walk(out) for name in names)


def until(pid: int, out: Path, count: int) -> None:
    """Wait until so many files are made, or the process is over."""
    while made(out) < count and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(1e-3)


def test_kills_at_random_moments(memory: Path, undisturbed: tuple[dict[str, str], float]) -> None:
    """At least a hundred: 0 lost, 0 doubled, the same bytes in the same files. Each comes at a random moment after a few more
    files than the last kill left, so that they come in the middle of the work whatever the load of the machine.
    """
    chance, kills, sweeps, moments = random.Random(0), 0, 0, set[int]()
    wanted, took = undisturbed
    while kills < KILLS:
        out, left = memory / "killed", 0
        while True:
            pid = fork(lambda out=out: quietly(replace(SHORT, out=out)))
            if kills < KILLS:
                until(pid, out, left + chance.randrange(5))
                time.sleep(chance.uniform(0.0, 0.1 * took))
                os.kill(pid, signal.SIGKILL)
            status = ended(pid)
            assert status in (0, -signal.SIGKILL)
            if status == 0:
                break
            left = made(out)
            kills += 1
            moments.add(left)
        assert digests(out) == wanted
        check_costs(out, SHORT)
        shutil.rmtree(out)
        sweeps += 1
    assert kills >= KILLS >= 100
    assert len(moments) >= 15  # of the 22 files that a run makes, after how many it was killed
    assert sweeps >= 3


def test_kills_of_workers_that_share(memory: Path, undisturbed: tuple[dict[str, str], float]) -> None:
    """Three on one folder; whoever is killed is replaced by another."""
    chance, kills, folders = random.Random(1), 0, itertools.count()
    wanted, took = undisturbed
    while kills < 12:
        out = memory / f"shared {next(folders)}"
        workers = [fork(lambda out=out: quietly(replace(SHORT, out=out, batch=2))) for _ in range(3)]
        while workers:
            time.sleep(chance.uniform(0.0, 0.2 * took))
            done = [pid for pid in workers if os.waitpid(pid, os.WNOHANG)[0]]
            workers = [pid for pid in workers if pid not in done]
            if workers and kills < 25:
                victim = chance.choice(workers)
                os.kill(victim, signal.SIGKILL)
                os.waitpid(victim, 0)
                workers.remove(victim)
                workers.append(fork(lambda out=out: quietly(replace(SHORT, out=out, batch=3))))
                kills += 1
        assert quietly(replace(SHORT, out=out)) == 0
        assert digests(out) == wanted
        took *= 0.7  # a machine that is quicker now than when it was measured would be done before it is killed


# --- every call fails once ----------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What goes wrong, and in which calls it can. ``always``: a run recovers from it by itself. ``step``: 1 tries every call;
    errors that nothing tells from another one, which is tried at every call, are tried at every third.
    """

    act: Callable[[str, Any, tuple[Any, ...]], Any]
    calls: tuple[str, ...]
    always: bool = False
    step: int = 1


class Faulty:
    """The seam, whose call number ``at``, of those that can fail so, goes wrong: once."""

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
    "ENOSPC": Fault(raising(errno.ENOSPC), GROWING),
    "EDQUOT": Fault(raising(errno.EDQUOT), GROWING, step=3),
    "EROFS": Fault(raising(errno.EROFS), ("open", "mkdir", "makedirs", "replace", "unlink", "rmdir")),
    "EACCES": Fault(
        raising(errno.EACCES), ("open", "mkdir", "makedirs", "replace", "unlink", "rmdir", "listdir", "lstat"), step=3
    ),
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


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k in ("EDQUOT", "EACCES") else ()) for k in FAULTS])
def test_every_call_fails_once(memory: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """For n = 1, 2, ... until there is no n-th call: it goes wrong, then comes the same command again."""
    monkeypatch.setattr(Maker, "make", constant)
    reference, out, fault = memory / "brief", memory / f"faulty {kind}", FAULTS[kind]
    if not reference.exists():
        assert quietly(replace(BRIEF, out=reference)) == 0
    wanted, asked = digests(reference), replace(BRIEF, out=out)
    tried = recovered = refused = 0
    for at in range(1, 10_000, fault.step):
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
        tried, recovered, refused = tried + 1, recovered + (not said), refused + bool(said)
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
    assert recovered + refused == tried
    assert at > {"short write": 10, "EXDEV": 5, "ENOLCK": 8}.get(kind, 60)  # every call of a run was tried
    assert (refused == 0) == fault.always or kind == "ENOLCK"


class Interrupted:
    """The seam, each of whose calls is interrupted by a signal before it is made again."""

    def __init__(self) -> None:
        self.again, self.count = False, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(files.System, name)

        def made(*args: Any) -> Any:
            self.again, self.count = not self.again, self.count + 1
            if self.again:
                raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
            return real(*args)

        return made


def test_every_call_is_interrupted(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, out = memory / "not interrupted", memory / "interrupted"
    assert quietly(replace(BRIEF, out=reference)) == 0
    monkeypatch.setattr(files, "system", seam := Interrupted())
    assert quietly(replace(BRIEF, out=out)) == 0
    assert digests(out) == digests(reference)
    assert seam.count > 200


def test_the_clock_may_jump(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back, and far: nothing but what people read has the time of day in it."""
    reference, out = memory / "on time", memory / "out of time"
    assert quietly(replace(BRIEF, out=reference)) == 0
    times = iter(range(10_000, 0, -7))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    assert quietly(replace(BRIEF, out=out)) == 0
    assert digests(out) == digests(reference)


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
    begun, said = capfd.readouterr().err.splitlines()
    assert begun.startswith("1 cell of 6 samples in 3 blocks: 3 parts; 5 of 5 files to make, first the floor of mean_error on ")
    assert said.startswith("benchmarks run: ")
    assert "No space left on device" in said
    assert not list((memory / "full").rglob("*.partial"))
    monkeypatch.setattr(files, "system", files.System())
    assert command.main(words) == 0
    assert store.read(memory / "full").missing == []
