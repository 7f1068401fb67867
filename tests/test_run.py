"""``python -m benchmarks run``: the same samples and numbers however the work is cut up, stopped, shared or gone on with."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import tyro
from sweeping import SWEEP, cheap, digests, ended, fork, in_memory, quietly

from benchmarks import __main__ as command
from benchmarks import (
    claims,
    files,
    kept,
    lines,
    making,
    metrics,
    peaks,
    problems,
    progress,
    provenance,
    rows,
    run,
    store,
    sweep,
)
from benchmarks.run import Place
from benchmarks.sweep import Sweep
from sde.errors import InputError, ResultsError, RunError

FIELDS = {"solver", "nfe", "grid", "metric", "value", "interval", "floor", "n", "seeds", "digest"}
BRIEF = replace(SWEEP, solver=("ddim",), nfe=(2,), metric=("mean_error",))


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    with in_memory() as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def _cheap() -> Iterator[None]:
    with cheap():
        yield


@pytest.fixture
def out(memory: Path, request: pytest.FixtureRequest) -> Path:
    """A folder of its own for each test, with a blank in its name."""
    return memory / f"{len(list(memory.iterdir()))} {request.node.originalname}"


def said(capfd: pytest.CaptureFixture[str]) -> str:
    return capfd.readouterr().err


def main(*words: object) -> int:
    return command.main(["run", *map(str, words)])


def samples(out: Path) -> torch.Tensor:
    """All samples that a folder keeps, cell by cell."""
    return torch.cat([x for cell in kept.kept(out, store.read(out).sweep) for x in cell.read(finite=False)])


# --- the command ------------------------------------------------------------------------------------------------------------


def test_one_command(out: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell has its rows, each with an interval and a floor; a second time nothing is made; a TOML file says the same."""
    words = ["--model", "ring2", "--solver", "ddim", "dpmpp_2m", "--nfe", "4", "8", "--grid", "log_snr", "karras"]
    words += ["-n", "200", "--metric", "fd", "sliced_w2"]
    assert main(*words, "--out", out) == 0
    shown = capfd.readouterr().out
    assert shown.count("\n") == 8 + 2
    assert "python -m benchmarks report" in shown
    found = store.read(out)
    assert (found.damaged, found.missing) == (0, [])
    rows = found.rows
    cells = [(r["solver"], r["grid"], r["budget"], r["metric"]) for r in rows]
    assert cells == [
        (s, g, b, m) for s in ("ddim", "dpmpp_2m") for g in ("log_snr", "karras") for b in (4, 8) for m in ("fd", "sliced_w2")
    ]
    for row in rows:
        assert set(row) >= FIELDS
        assert row["nfe"] == row["budget"]
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
        assert 0.0 <= row["floor"]["low"] < row["floor"]["high"]
        found = metrics.recommend(metrics.metric(row["metric"]), problems.get("ring2"), most=800)
        assert row["enough"] == {"worse": 0.05, "n": found.n, "why": found.reason}
        assert (row["n"], row["seeds"], len(row["digest"])) == (200, [0, 1, 2, 3], 64)
        assert row["cost"]["samples"] == 200
    assert len({r["digest"] for r in rows}) == 8
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr(making.Maker, "make", lambda self, item: pytest.fail(str(item)))
    assert main(*words, "--out", out) == 0
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()} == before
    toml = out.parent / "sweep.toml"
    toml.write_text(
        'model = "ring2"\nsolver = ["heun"]\nnfe = [4, 8]\ngrid = ["log_snr", "karras"]\nn = 200\n'
        f'metric = ["fd", "sliced_w2"]\nout = "{out}"\n'
    )
    assert main("--config", toml, "--solver", "ddim", "dpmpp_2m") == 0  # the command line comes first


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm"])
def test_samples_are_those_of_the_library(out: Path, solver: str) -> None:
    """What a sweep measures is what ``sample`` gives, number by number; each block has a seed, for its noise on the way too."""
    from sde.noise import White
    from solvers import sample

    assert quietly(replace(SWEEP, solver=(solver,), nfe=(4,), seed=5, out=out)) == 0
    score, _ = tiny_models.shrink()
    problem, found = tiny_models.quick(), samples(out)
    for block, x in enumerate(found.split(4)):
        start = problem.starts(5 + block, range(4), "prior", torch.float32)
        given = {"noise": White(5 + block, indices=range(4)), "start": problem.start, "stop": problem.stop}
        own = sample(score, x=start, solver=solver, nfe=4, grid="log_snr", **given)
        assert torch.equal(own.x, x)
    assert len(found) == 12
    parts = b"".join(hashlib.sha256(x.numpy().tobytes()).digest() for x in found.split(2))
    assert {row["digest"] for row in store.read(out).rows} == {hashlib.sha256(parts).hexdigest()}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "rng2"], "--model 'rng2' is unknown: did you mean 'ring2'"),
        (["--model", "ring2:vpp"], "did you mean 'vp'"),
        (["--model", "tiny_model:shrink"], "there is no module 'tiny_model'"),
        (["--model", "tiny_models:shrnk"], "has no function 'shrnk': did you mean 'shrink'"),
        (["--model", "tiny_models:NOT_CALLABLE"], "has no function 'NOT_CALLABLE'"),
        (["--model", "os.path:join:x"], "or module:function"),
        (["--model", "ring2", "--solver", "dpmp_2m"], "did you mean"),
        (["--model", "ring2", "--solver", "difusers/DDIM"], "did you mean"),
        (["--model", "ring2", "--grid", "karas"], "did you mean 'karras'"),
        (["--model", "ring2", "--metric", "slicd_w2"], "did you mean"),
        (["--model", "ring2", "--device", "gpu"], "give cpu, cuda or cuda:1"),
        (["--model", "ring2", "-n", "50001"], "multiple of --blocks 4"),
        ([], "give --model"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_anything_is_written(
    out: Path, capfd: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert main(*words, "--out", out) == 2
    text = said(capfd)
    assert told in text
    assert text.count("\n") == 1
    assert len(text) < 400
    assert not out.exists()


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("failing", "failing() raised FileNotFoundError: no weights at"),
        ("number", "returned a int: give a Score"),
        ("bare", "does not say the shape of a sample"),
    ],
)
def test_a_model_that_cannot_be_measured(out: Path, model: str, told: str) -> None:
    with pytest.raises((InputError, RunError)) as caught:
        quietly(replace(BRIEF, model=(f"tiny_models:{model}",), out=out))
    assert told in str(caught.value)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    ("model", "metric", "told"),
    [
        ("tiny_models:bare", "fd:reference=none.npz", "none.npz: cannot be read as reference statistics"),
        ("tiny_models:bare", "fd:reference=two.npz", "two.npz has 2 dimensions"),
        ("ring2", "fd:reference=two.npz,count=9", "does not say of how many samples"),
        ("digits_network", "fd:features=inception=none.pth", "no weights at none.pth"),
        ("digits_network", "kid:features=inception=none.pth", "no weights at none.pth"),
        ("digits_network", "recall:features=inception=none.pth", "no weights at none.pth"),
    ],
)
def test_files_that_metrics_name_are_looked_at_before_the_first_sample(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, metric: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "two.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(InputError, match=f"--metric {metric}: .*{told}"):
        quietly(replace(BRIEF, model=(model,), shape=(3,), metric=(metric,), out=out))
    assert not list(out.iterdir())


def test_a_bare_score_has_rows_that_say_what_they_lack(out: Path) -> None:
    bare = replace(BRIEF, model=("tiny_models:bare",), shape=(3,), metric=("mean_error", "strong_error"), out=out)
    assert quietly(bare) == 0
    mean, strong = store.read(out).rows
    assert (mean["value"], strong["value"] is None) == (None, False)
    assert mean["note"].endswith("no true data to compare with: let the model's function return (score, data)")


def test_metrics_that_want_more_samples_say_so_in_their_rows(out: Path) -> None:
    """And stop nothing: neither their floors nor their values are asked for."""
    assert quietly(replace(SWEEP, out=out, solver=("ddim",), nfe=(2,), n=9, metric=("precision", "mean_error"))) == 0
    precision, mean = store.read(out).rows
    assert precision["note"] == "n = 9 in 3 blocks are 3 a block, and precision takes 4: give -n 12 or more"
    assert (precision["value"], precision["floor"]) == (None, None)
    assert mean["value"] is not None
    assert mean["floor"] is not None


def test_cells_that_cannot_be_made_are_told_at_once_and_counted_in_the_end(
    out: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = replace(BRIEF, solver=("gddim", "heun"), nfe=(2, 4), eta=0.4, out=out)
    make = making.Maker.make
    told: list[str] = []
    monkeypatch.setattr(making.Maker, "make", lambda self, item: told.append(said(capfd)) or make(self, item))
    assert run.run(asked) == 0
    assert "2 cells cannot be made; the rows will have no value:\n  tiny_models:quick heun log_snr 2, " in told[0]
    assert "'heun' does not take a noise level" in told[0]
    assert run.run(asked) == 0  # nothing is left to be told beforehand
    shown = capfd.readouterr()
    assert "cannot be made" not in shown.err
    assert "4 rows in" in shown.out
    assert "\n2 of them have no value, and `note` there says why:\n  2: eta=0.4: " in shown.out


def test_the_command_that_is_printed_is_the_command() -> None:
    odd = replace(SWEEP, out=Path("a b'\n\u202e$(x)"), eta=0.5, shape=(3, 2), compile="default", on_nan="skip", start_time=1.5)
    assert "\n" not in run.command(odd)
    plain = replace(odd, out=Path("a b'$(x)"))
    words = shlex.split(run.command(plain))
    assert words[:4] == ["python", "-m", "benchmarks", "run"]
    assert tyro.cli(Sweep, args=words[4:]) == plain
    assert run.command(replace(SWEEP, force_new=True)) == run.command(SWEEP)


def test_a_closed_stdout_ends_no_run(out: Path) -> None:
    def deaf() -> int:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        sys.stdout = os.fdopen(1, "w", encoding="ascii")
        return run.run(replace(BRIEF, out=out))

    assert ended(fork(deaf)) == 0
    assert store.read(out).missing == []


def test_a_folder_that_is_gone_from_under_the_process(out: Path) -> None:
    """And a screen that speaks ASCII only."""
    gone = out.parent / "gone"
    gone.mkdir()

    def lost() -> int:
        os.chdir(gone)
        gone.rmdir()
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="ascii")
        return run.run(replace(BRIEF, out=out.with_name("\u00fc\u4e2d\n")))

    assert ended(fork(lost)) == 0


# --- one result however it is made ------------------------------------------------------------------------------------------

EVEN = replace(SWEEP, n=198, part=66, nfe=(3,))


@pytest.fixture(scope="module")
def even(memory: Path) -> dict[str, str]:
    assert quietly(replace(EVEN, out=memory / "even")) == 0
    return digests(memory / "even")


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches(out: Path, even: dict[str, str], batch: int) -> None:
    assert quietly(replace(EVEN, out=out, batch=batch, threads=1 + (batch == 7))) == 0
    assert digests(out) == even


@pytest.mark.parametrize("seed", [0, 1])
def test_parts_in_any_order(out: Path, even: dict[str, str], monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    def shuffled(*args: Any) -> list[sweep.Item]:
        found = list(sweep.items(*args))
        random.Random(seed).shuffle(found)
        return found

    monkeypatch.setattr(run, "items", shuffled)
    assert quietly(replace(EVEN, out=out)) == 0
    assert digests(out) == even


@pytest.mark.parametrize("count", [2, 3])
def test_workers_share(out: Path, even: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them makes some, and nothing is made twice. They meet in their first part: all have one, however fast it is."""
    part, meeting, met = making.Maker._part, multiprocessing.get_context("fork").Barrier(count), []

    def together(self: making.Maker, *work: Any) -> Any:
        if not met:
            met.append(meeting.wait(60.0))
        return part(self, *work)

    monkeypatch.setattr(making.Maker, "_part", together)
    pids = [fork(lambda k=k: quietly(replace(EVEN, out=out, batch=(1, 7, 64)[k]))) for k in range(count)]
    assert [ended(pid) for pid in pids] == [0] * count
    assert digests(out) == even
    log, torn = files.unseal_lines((out / store.LOG).read_bytes())
    parts = [entry for entry in log if entry["event"] == "part"]
    assert torn == 0
    assert len(parts) == 6 == len({entry["path"] for entry in parts})
    assert len({entry["worker"] for entry in parts}) == count


def test_more_samples_are_those_of_a_run_that_asked_for_them_at_once(out: Path, even: dict[str, str]) -> None:
    assert quietly(replace(EVEN, n=99, out=out)) == 0
    assert quietly(replace(EVEN, out=out)) == 0
    found = digests(out)
    assert found.items() >= even.items()
    assert all("-000000033." in name or name.startswith(("rows/", "floors/")) for name in found.keys() - even.keys())


def test_a_sampler_that_looks_at_its_batch_gets_whole_parts(out: Path) -> None:
    joint = replace(BRIEF, solver=("dopri5",), nfe=(40,), n=30, part=10)
    assert lines.resolve_line(joint.solver[0]).joint
    assert quietly(replace(joint, out=out)) == 0
    other = out.with_name("joint again")
    assert quietly(replace(joint, out=other, batch=3)) == 0
    assert digests(out) == digests(other)


def test_memory_that_runs_out_halves_the_batch(out: Path) -> None:
    """The samples are the same; a batch of one that does not fit is an error."""
    assert quietly(replace(EVEN, model=("tiny_models:greedy",), metric=("mean_error",), n=24, part=8, out=out)) == 0
    log, _ = files.unseal_lines((out / store.LOG).read_bytes())
    assert [e["batch"] for e in log if e["event"] == "batch halved"] == [4, 2]
    other = out.with_name("much memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models.Greedy, "largest", 1000)
        assert quietly(replace(EVEN, model=("tiny_models:greedy",), metric=("mean_error",), n=24, part=8, out=other)) == 0
        assert digests(out) == digests(other)
        patch.setattr(tiny_models.Greedy, "largest", 0)
        with pytest.raises(RunError, match=r"no memory for a batch of 1 samples .* the model does not fit"):
            quietly(replace(EVEN, model=("tiny_models:greedy",), out=out.with_name("no memory")))


@pytest.mark.parametrize(
    ("model", "n"),
    [
        ("tiny_models:quick", 50_000),
        ("tiny_models:wide", 20_000),
        pytest.param("tiny_models:wide", 50_000, marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_n(out: Path, model: str, n: int) -> None:
    """50,000 samples of 3 or of 256 numbers, 49 MiB of them, against 5,000: at most 32 MiB more at the peak."""
    asked = replace(BRIEF, model=(model,), nfe=(1,), blocks=4, part=500, metric=Sweep().metric, keep_samples=False)

    def peak(n: int) -> int:
        def work() -> int:
            for name in ("floor", "floor_key"):  # two true sets are as large as many, one after another
                setattr(metrics, name, functools.partial(getattr(metrics, name), replicates=2))
            ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is free goes back at once, and is not counted
            making.peak_memory = lambda device: nullcontext([None])  # each part would start the peak anew
            with open("/proc/self/clear_refs", "w") as marks:
                marks.write("5")  # the peak from here on
            assert quietly(replace(asked, n=n, out=out / str(n))) == 0
            status = Path("/proc/self/status").read_text()
            (out / f"{n}.peak").write_text(status.partition("VmHWM:")[2].split()[0])
            return 0

        out.mkdir(exist_ok=True)
        assert ended(fork(work)) == 0
        return int((out / f"{n}.peak").read_text()) // 1024

    assert peak(n) - peak(5_000) <= 32


def test_networks_of_any_dtype_are_measured_by_every_metric(out: Path) -> None:
    """End points and densities ask in float32 or float64, whatever the weights are in."""
    found: dict[str, dict[str, float]] = {}
    for model, dtype in (("mixing", "float64"), ("mixing", "float32"), ("mixing", "bfloat16"), ("half", "float32")):
        asked = replace(
            BRIEF, model=(f"tiny_models:{model}",), metric=("strong_error", "nll_model:tolerance=0.01"), dtype=dtype
        )
        place = out / f"{model} {dtype}"
        assert quietly(replace(asked, out=place)) == 0
        rows = store.read(place).rows
        assert [row["note"] for row in rows] == [""] * 2
        found[place.name] = {row["metric"]: row["value"] for row in rows}
    exact, near, *coarse = found.values()
    assert near == pytest.approx(exact, rel=0.01)
    assert coarse[0] == pytest.approx(exact, rel=0.1)
    assert coarse[1] == coarse[0]


def test_the_peak_of_a_part_is_its_own() -> None:
    """A small part after a large one, and a large one again."""

    def peak(mebibytes: int) -> float:
        with making.peak_memory(torch.device("cpu")) as found:
            torch.ones(mebibytes << 18).sum()
        return -1.0 if found[0] is None else found[0] / 2**20

    if (first := peak(64)) == -1.0:
        pytest.skip("this system does not tell")
    assert first == pytest.approx(64.0, rel=0.2)
    assert peak(1) < 8.0
    assert peak(64) == pytest.approx(64.0, rel=0.2)


def test_a_peak_that_the_system_does_not_tell_is_none(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_mark", lambda: None)
    assert quietly(replace(BRIEF, out=out)) == 0
    assert [cost["peak_memory"] for cost in store.read(out).costs] == [None]


# --- what must not go on ----------------------------------------------------------------------------------------------------


def test_other_weights_are_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(BRIEF, out=out)
    assert quietly(asked) == 0
    before = digests(out)
    monkeypatch.setenv("SHRINK", "0.6")
    with pytest.raises(ResultsError, match="weights, data or code of tiny_models:quick have changed"):
        quietly(asked)
    assert digests(out) == before
    assert quietly(replace(asked, force_new=True)) == 0
    assert digests(out) != before
    monkeypatch.setenv("SHRINK", "0.5")
    with pytest.raises(ResultsError, match="have changed"):
        quietly(asked)


CHANGED = "weights, data or code of .* have changed"


def test_other_data_code_and_references_are_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one folder are of one model, one set of data, one reference: what is imported by the model's module counts."""
    here = out.with_name("a project")
    here.mkdir()
    monkeypatch.syspath_prepend(str(here))
    net = "import torch\n\n\nclass Net(torch.nn.Module):\n    def forward(self, x, t):\n        return %s * x\n"
    body = "import torch\nimport sweep_net\nfrom sde import EDM\nfrom scores import Score\n\n\ndef load():\n"
    body += "    return Score(sweep_net.Net(), EDM()), torch.load(%r)\n"
    (here / "sweep_model.py").write_text(body % str(here / "data.pt"))

    def state(factor: float, shift: float) -> None:
        (here / "sweep_net.py").write_text(net % factor)
        torch.save(tiny_models.data() + shift, here / "data.pt")
        for name in ("sweep_model", "sweep_net"):
            sys.modules.pop(name, None)

    asked = replace(BRIEF, model=("sweep_model:load",), metric=("mean_error",), out=out)
    for change in ((0.5, 0.0), (0.25, 1.0)):
        state(0.25, 0.0)
        assert quietly(replace(asked, force_new=True)) == 0
        state(*change)
        with pytest.raises(ResultsError, match=CHANGED):
            quietly(asked)
    state(0.25, 0.0)
    assert quietly(asked) == 0

    statistics = here / "r.npz"
    for mean in (0.0, 1.0):
        np.savez(statistics, mu=np.full(3, mean), sigma=np.eye(3))
        judged = replace(asked, metric=(f"fd:reference={statistics}",), out=out.with_name("judged"))
        if mean:
            with pytest.raises(ResultsError, match=r"r\.npz was \w+, is \w+"):
                quietly(judged)
        else:
            assert quietly(judged) == 0


def test_weights_that_change_while_the_sweep_runs_are_seen(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two models each is loaded again when its turn comes: what is made then must be of the weights the run began with."""
    two = replace(BRIEF, model=("tiny_models:quick", "tiny_models:shrink"), out=out)
    real = making.Maker.make

    def replaced(self: making.Maker, item: sweep.Item) -> Any:
        monkeypatch.setenv("SHRINK", "0.6")
        return real(self, item)

    monkeypatch.setattr(making.Maker, "make", replaced)
    with pytest.raises(RunError, match="its weights, data or code have changed while the sweep ran"):
        quietly(two)
    assert store.read(out).rows == []
    monkeypatch.undo()
    assert quietly(two) == 0
    assert len(store.read(out).rows) == 2


def test_metrics_look_at_their_limit_of_kept_samples(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples are in the files; no more of them come into memory than are looked at, and rows say of how many cells are."""
    asked = replace(BRIEF, metric=("energy",), n=30, part=4)
    most = []
    monkeypatch.setattr(making.Maker, "looked_at", lambda self: 6)
    real = rows.Merged._block
    monkeypatch.setattr(rows.Merged, "_block", lambda *args: most.append(real(*args)) or most[-1])
    monkeypatch.setattr(metrics, "measure", lambda *args: metrics.Measured(1.0, 0.5, 1.5, 18, (1.0,) * 3))
    for keep in (False, True):
        place = out / str(keep)
        assert quietly(replace(asked, keep_samples=keep, out=place)) == 0
        (row,) = store.read(place).rows
        assert (row["n"], row["asked"]) == (18, 30)
        assert store.read(place).missing == []
        for item in (place / "parts").rglob("*.safetensors"):
            _, tensors = files.unpack(item.read_bytes())
            count = len(tensors["x"]) if "x" in tensors else 0
            a = int(item.stem.partition(".")[2][:9])
            assert count == ((4 if a < 8 else 2) if keep else max(0, min(4, 6 - a)))
    assert [len(block.samples) for block in most] == [6] * 6
    looked_at = [x[:6] for x in samples(place).split(10)]
    for block, x in zip(most, looked_at * 2, strict=True):
        for span in (slice(0, 6), slice(1, 3), slice(3, 5), slice(4, 6)):  # the parts are [0, 4) and [4, 6)
            assert torch.equal(block.samples[span], x[span])


def test_a_part_that_is_damaged_while_its_row_is_made_is_made_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are read again when a metric looks at them."""
    asked, spoilt = replace(BRIEF, metric=("sliced_w2",), out=out), []
    assert quietly(replace(asked, out=out.with_name("whole"))) == 0
    real = rows.Merged._block

    def spoils(self: rows.Merged, block: int, paths: list[str], m: int) -> metrics.Block:
        found = real(self, block, paths, m)
        if not spoilt:
            spoilt.append((out / paths[0]).write_bytes(b"damaged"))
        return found

    monkeypatch.setattr(rows.Merged, "_block", spoils)
    assert quietly(asked) == 0
    assert digests(out) == digests(out.with_name("whole"))


def test_numbers_that_are_not_finite_stop_the_run_and_say_where(out: Path) -> None:
    rotten = replace(BRIEF, model=("tiny_models:rotten",), n=60, part=20, nfe=(6,), out=out)
    with pytest.raises(RunError) as caught:
        quietly(rotten)
    place = r"tiny_models:rotten, ddim on log_snr with 6 calls: \d+ samples .* is sample \d+ of block 0, step \d, t = 0\.\d+ "
    assert re.search(place + ".*--on-nan skip", str(caught.value))
    assert not list((out / "parts").rglob("*.safetensors"))
    assert quietly(replace(rotten, on_nan="skip")) == 0
    (row,) = store.read(out).rows
    assert row["value"] is None
    assert "of 60 samples are not finite (first: sample" in row["note"]
    assert "60" in row["note"]
    assert len(row["digest"]) == 64
    skipped = samples(out)
    lost = ~skipped.isfinite().all(1)
    assert 0 < int(lost.sum()) < 30
    clean = out.with_name("clean")
    assert quietly(replace(rotten, model=("tiny_models:shrink",), out=clean)) == 0
    own = samples(clean)
    assert torch.equal(own[~lost], skipped[~lost])  # the others do not feel it


def test_a_worker_that_hangs_is_not_waited_for(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "PATIENCE", 0.3)
    read, write = os.pipe()

    def hang() -> int:
        def stuck(self: making.Maker, item: sweep.Item) -> Any:
            os.write(write, b"1")
            time.sleep(300)

        making.Maker.make = stuck
        return quietly(replace(BRIEF, out=out))

    pid = fork(hang)
    try:
        assert os.read(read, 1) == b"1"
        assert quietly(replace(BRIEF, out=out)) == 0
        assert store.read(out).missing == []
    finally:
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    log, _ = files.unseal_lines((out / store.LOG).read_bytes())
    assert [entry["event"] for entry in log].count("made without a claim") == 1


# --- stopping ---------------------------------------------------------------------------------------------------------------


def stopped(out: Path, *numbers: int) -> tuple[int, str, list[str]]:
    """(status, what is said, files) of a run that gets signals in the middle of its second part."""
    told = out.with_suffix(".txt")

    def work() -> int:
        real, made = making.Maker.make, 0

        def slow(self: making.Maker, item: sweep.Item) -> Any:
            nonlocal made
            made += item.kind == "part"
            if made == 2 and item.kind == "part":
                for number in numbers:
                    os.kill(os.getpid(), number)
            return real(self, item)

        making.Maker.make = slow
        descriptor = os.open(told, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w")
        return run.run(replace(SWEEP, out=out))

    status = ended(fork(work))
    return status, told.read_text(), sorted(str(p.relative_to(out)) for p in (out / "parts").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("numbers", "status", "parts"),
    [([signal.SIGINT], 130, 2), ([signal.SIGINT, signal.SIGINT], 130, 1), ([signal.SIGTERM], 143, 1)],
)
def test_stopping_leaves_what_is_made_and_says_how_to_go_on(
    out: Path, memory: Path, numbers: list[int], status: int, parts: int
) -> None:
    found, text, left = stopped(out, *numbers)
    assert (found, len(left)) == (status, parts)
    assert ("Ctrl-C again" in text) == (signal.SIGINT in numbers)
    assert run.command(replace(SWEEP, out=out)) in text
    assert "Traceback" not in text
    assert not list(out.rglob("*.partial"))
    assert not (out / store.LOCKS).exists()
    assert quietly(replace(SWEEP, out=out)) == 0
    reference = memory / "not stopped"
    if not reference.exists():
        assert quietly(replace(SWEEP, out=reference)) == 0
    assert digests(out) == digests(reference)


# --- several machines -------------------------------------------------------------------------------------------------------


def test_places() -> None:
    assert Place.here({}) == Place(0, 0, 1)
    assert Place.here({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}) == Place(3, 1, 4)
    for bad in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1"}, {"RANK": "x"}):
        with pytest.raises(InputError, match="as torchrun sets them"):
            Place.here(bad)


def check_shared(out: Path, asked: Sweep, marker: Path) -> None:
    """Rank 1 was killed in the middle of a part, and yet: not a part is lost or made twice, but for the one whose maker was
    killed between its log and its file, and the bytes are those of one process alone.
    """
    assert marker.read_text().split() == ["1", "2", "gloo"]
    assert store.read(out).missing == []
    alone = out.with_name("alone")
    assert quietly(replace(asked, out=alone)) == 0
    assert parts_of(out) == parts_of(alone)
    log, _ = files.unseal_lines((out / store.LOG).read_bytes())
    made = [entry["path"] for entry in log if entry["event"] == "part"]
    assert len(set(made)) == 6
    assert len(made) <= 7
    assert {entry["worker"].partition("rank ")[2] for entry in log} <= {"0 of 2", "1 of 2"}


GROUPED = replace(EVEN, model=("tiny_models:grouped",), metric=("mean_error",))


def test_two_workers_of_a_gloo_group_one_of_them_killed(out: Path, memory: Path) -> None:
    """The other one makes the lost part, without a word from the group; then both come again, as torchrun would start them."""
    marker, asked = out.with_suffix(".killed"), replace(GROUPED, out=out)

    def worker(rank: int, start: int) -> int:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", KILL_ONCE=str(marker))
        os.environ["GROUP"] = f"file://{memory}/group{start}"
        return quietly(asked)

    for start, wanted in enumerate(([0, -signal.SIGKILL], [0, 0])):
        pids = [fork(lambda rank=rank, start=start: worker(rank, start)) for rank in range(2)]
        assert [ended(pid) for pid in pids] == wanted
        assert store.read(out).missing == []
    check_shared(out, asked, marker)


@pytest.mark.slow
def test_torchrun_itself(out: Path) -> None:
    """The same by its command line, with interpreters of their own."""
    marker, here = out.with_suffix(".killed"), Path(__file__).parent
    asked = replace(GROUPED, out=out)
    ends = {**os.environ, "KILL_ONCE": str(marker), "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    ends["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else the group, started again, finds addresses of its lost members
    words = [
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
        "--max-restarts=3",
        "--monitor-interval=0.05",
        "-m",
    ]
    words += shlex.split(run.command(asked))[2:]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *words], env=ends, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_shared(out, asked, marker)


def test_an_interpreter_of_its_own(out: Path) -> None:
    """``python -m benchmarks run ... | head -1``: nobody listens to most of it, and nothing is lost."""
    words = shlex.split(run.command(replace(BRIEF, out=out)))[1:]
    here = Path(__file__).parent
    ends = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "LANG": "C", "LC_ALL": "C"}
    with subprocess.Popen([sys.executable, *words], env=ends, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert b"mean_error" in running.stdout.readline()
        running.stdout.close()
        told = running.stderr.read()
        assert running.wait() == 0, told
    assert b"Traceback" not in told
    assert store.read(out).missing == []


def parts_of(out: Path) -> dict[str, str]:
    """Not the floors, which have more replicates where nobody has asked for few, nor what is made of them."""
    return {name: digest for name, digest in digests(out).items() if name.startswith(("parts", "ends", "sweep"))}


# --- what is seen on the way ------------------------------------------------------------------------------------------------


def test_a_picture_of_the_newest_samples(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quietly(replace(BRIEF, out=out)) == 0
    assert not (out / store.PREVIEW).exists()  # the run was shorter than the time between two
    other = out.with_name("seen")
    assert quietly(replace(BRIEF, preview=1e-9, out=other)) == 0
    from PIL import Image

    with Image.open(other / store.PREVIEW) as picture:
        assert picture.size == (3, 2)
        assert len({picture.getpixel((i, j)) for i in range(3) for j in range(2)}) > 2
    assert digests(other) == digests(out)
    monkeypatch.setattr(run, "picture", lambda model, x: (_ for _ in ()).throw(ImportError("no pictures here")))
    assert quietly(replace(BRIEF, preview=1e-9, out=out.with_name("blind"))) == 0


def test_progress_counts_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    items = [
        sweep.Item("floor", "f", {"metric": "fd", "model": "ring2"}),
        *(sweep.Item("part", f"p{k}", {"a": 0, "b": 50}, weight=100.0) for k in range(8)),
    ]
    found = progress.Progress(items)
    found.remaining([items[0], *items[3:]])  # two parts were there before
    found.begins(items[0])
    assert str(found) == "25 % done, 6 parts left, making the floor of fd on ring2"
    clock[0] += 1000.0
    found.done(items[0])
    clock[0] += 10.0
    found.done(items[3])
    assert str(found) == "38 % done, 5 samples/s, 5 parts left, 0:00:50 to go"
    clock[0] += 10.0
    found.remaining(items[6:])  # two more were made by others
    assert str(found) == "62 % done, 8 samples/s, 3 parts left, 0:00:20 to go"


def test_without_a_terminal_a_line_now_and_then(
    out: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert run.run(replace(BRIEF, out=out)) == 0
    first, *told = said(capfd).splitlines()
    assert first.endswith("files to make, first the floor of mean_error on tiny_models:quick")
    assert len(told) >= 6
    assert told[:2] == ["0 % done, 6 parts left", "0 % done, 6 parts left, making the floor of mean_error on tiny_models:quick"]
    assert any("5 parts left" in line and "samples/s" in line for line in told)
    assert " to go" in told[-1]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run.run(replace(BRIEF, out=out.with_name("rank one"))) == 0
    assert said(capfd) == ""


def test_a_bar_on_a_terminal(out: Path) -> None:
    import pty
    import termios

    pid, terminal = pty.fork()
    if pid == 0:
        status = 99
        try:
            termios.tcsetwinsize(2, (24, 100))
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            status = run.run(replace(BRIEF, out=out))
        finally:
            os._exit(status)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 1 << 16)
        except OSError:
            break
    assert ended(pid) == 0
    assert b"100%|" in shown
    assert b"samples/s, 0 parts left" in shown
    assert b"mean_error 0." in shown


# --- precision, compilation, devices ----------------------------------------------------------------------------------------


def values(out: Path) -> list[float]:
    return [row["value"] for row in store.read(out).rows]


def test_dtypes(out: Path) -> None:
    """The network in half precision is another result, near; the state stays in float32."""
    found = {}
    for dtype in ("float32", "float64", "bfloat16"):
        place = out / dtype
        assert quietly(replace(BRIEF, dtype=dtype, n=60, part=20, metric=("strong_error",), out=place)) == 0
        (row,) = store.read(place).rows
        found[dtype] = row["value"]
        assert row["dtype"] == ("float64" if dtype == "float64" else "float32")
    assert found["float32"] == pytest.approx(found["float64"], rel=1e-4)
    assert found["bfloat16"] == pytest.approx(found["float64"], rel=0.05)
    assert len(set(found.values())) == 3


def test_half_precision_wants_a_network(out: Path) -> None:
    with pytest.raises(InputError, match="--dtype bfloat16: ring2 is not a Score of a network that could be cast"):
        quietly(replace(BRIEF, model=("ring2",), dtype="bfloat16", out=out))
    with pytest.raises(InputError, match="--compile default: ring2 is not a Score of a network"):
        quietly(replace(BRIEF, model=("ring2",), compile="default", out=out.with_name("ring")))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_network_is_called_in_its_place(out: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Compilation itself is torch's; what a sweep does with it is tried with one that counts."""
    calls = []

    def compiled(network: torch.nn.Module, mode: str) -> Callable[..., torch.Tensor]:
        shared = torch.empty(64, 3)

        def run(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            calls.append((mode, len(x)))
            memory = shared[: len(x)]
            return memory.copy_(network(x, *rest))  # as graphs do: the next call writes there again

        return run if mode == "reduce-overhead" else network

    marks: list[None] = []
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    assert quietly(replace(EVEN, compile=mode, solver=("dpmpp_2m",), n=30, part=10, out=out)) == 0
    plain = out.with_name(f"plain {mode}")
    assert quietly(replace(EVEN, solver=("dpmpp_2m",), n=30, part=10, out=plain)) == 0
    assert torch.equal(samples(out), samples(plain))
    assert len(calls) == len(marks) == (9 if mode == "reduce-overhead" else 0)


@pytest.mark.slow
def test_compiled_on_this_processor(out: Path) -> None:
    assert quietly(replace(BRIEF, compile="default", metric=("strong_error",), out=out)) == 0
    plain = out.with_name("not compiled")
    assert quietly(replace(BRIEF, metric=("strong_error",), out=plain)) == 0
    assert values(out) == pytest.approx(values(plain), rel=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["no", "default", "reduce-overhead"])
def test_a_cuda_device(out: Path, mode: str) -> None:
    """The same numbers but for rounding; device time is that of events, within the wall's."""
    asked = replace(EVEN, device="cuda", compile=mode, out=out)
    assert quietly(asked) == 0
    host = out.with_name(f"host {mode}")
    assert quietly(replace(EVEN, out=host)) == 0
    torch.testing.assert_close(samples(out), samples(host), rtol=1e-4, atol=1e-4)
    for cost in store.read(out).costs:
        assert 0.0 < cost["device_seconds_per_call"]["median"] <= cost["seconds_per_call"]["median"]
        assert cost["device"] == [torch.cuda.get_device_name()]
        assert cost["peak_memory"] > 0


def test_a_device_that_is_not_there(out: Path) -> None:
    with pytest.raises(InputError, match=r"torch sees .* CUDA devices on this machine; use cpu"):
        quietly(replace(BRIEF, device="cuda:99", out=out))


# --- provenance -------------------------------------------------------------------------------------------------------------


def test_weights_have_a_digest_wherever_they_are() -> None:
    """In parameters and buffers, in closures, defaults and attributes; and not in what a run leaves behind."""

    def closed(w: torch.Tensor) -> Callable[[Any], Any]:
        return lambda x, k=w[:1]: x * w + k

    class Holder:
        def __init__(self, w: torch.Tensor) -> None:
            self.parts = {"a": [w, 1.5]}
            self._cache = torch.rand(3)

        def call(self, x: Any) -> Any:
            return x

    w = torch.arange(3.0)
    for make in (closed, Holder, lambda w: Holder(w).call, lambda w: (closed(w), 3)):
        first = provenance.weights(make(w))
        assert first == provenance.weights(make(w.clone()))
        assert first != provenance.weights(make(w + torch.tensor([0.0, 0.0, 1e-6])))
        assert first != provenance.weights(make(w.double()))
    module = tiny_models.Shrink()
    first = provenance.weights(module)
    assert provenance.weights(module.eval()) == first
    assert provenance.weights(tiny_models.Rotten()) != first
    module.sigma_data = 0.25
    second = provenance.weights(module)
    module.register_buffer("more", torch.zeros(1))
    assert len({first, second, provenance.weights(module)}) == 3


def test_nothing_of_the_environment_is_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "secret-canary-4711")
    assert quietly(replace(BRIEF, out=out)) == 0
    for path in out.rglob("*"):
        assert not path.is_file() or b"secret-canary-4711" not in path.read_bytes()
    record = json.loads((out / "sweep.json").read_text())
    assert set(record["versions"]) == {"python", "torch", "numpy", "score-solvers"}
    assert record["git"]


def test_a_link_is_not_followed_out_of_the_folder(out: Path) -> None:
    """Neither by the log nor by a claim."""
    outside = out.parent / "outside.txt"
    outside.write_text("precious")
    assert quietly(replace(BRIEF, out=out)) == 0
    (out / store.LOG).unlink()
    (out / store.LOG).symlink_to(outside)
    held = store.Store(out, "me")
    with pytest.raises(RunError, match="cannot be written"):
        held.log("event")
    (out / store.LOCKS / "x.lock").symlink_to(outside)
    with pytest.raises(RunError, match="cannot be claimed"):
        held.claims.take("x.lock")
    (out / store.LOCKS / "x.lock").unlink()
    held.close()
    assert outside.read_text() == "precious"
    assert claims.NO_LINK
