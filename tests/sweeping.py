"""What the tests of sweeps share: a small sweep, runs in forked children, and the bytes that a run leaves."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import metrics, provenance, run, store
from benchmarks.sweep import Sweep

SWEEP = Sweep(
    model=("tiny_models:quick",),
    solver=("ddim", "ddpm"),
    nfe=(2, 4),
    n=12,
    blocks=3,
    part=2,
    metric=("mean_error", "sliced_w2", "strong_error"),
    keep_samples=True,
)
MEASURED = {store.LOG, store.COSTS, store.PREVIEW}  # the files that depend on the time


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """A folder in memory where there is one: a disk would be waited for."""
    base = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=base if os.access(base, os.W_OK) else None) as found:
        yield Path(found)


@contextlib.contextmanager
def cheap() -> Iterator[None]:
    """What is known before forking children need not find out; few pages to copy for them; floors of few replicates."""
    for known in (provenance.code, provenance.commit, provenance.versions):
        known()
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("floor", "floor_key"):
            patch.setattr(metrics, name, functools.partial(getattr(metrics, name), replicates=4))
        yield
    gc.unfreeze()


def digests(out: Path) -> dict[str, str]:
    """Every file and folder, hidden and lost ones too, but for what depends on the time."""
    return {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(out.rglob("*"))
        if str(p.relative_to(out)) not in MEASURED
    }


def quietly(sweep: Sweep) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run.run(sweep)


def fork(work: Callable[[], int]) -> int:
    """The process id of a child that does the work and ends with its status."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    """The child's status; minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
