"""``python -m benchmarks gpu``: its tables, here on a processor at the smallest size; and a plan as one CUDA graph."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from sweeping import in_memory

from benchmarks import costs, gpu, graphs, provenance
from benchmarks.__main__ import main
from benchmarks.graphs import Captured, Prepared
from scores import Gaussian, Score
from sde import VP
from sde.errors import InputError
from solvers import trace
from solvers.grids import log_snr

cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
F64 = torch.float64
SMALL = ("--model", "tiny_models:quick", "--solver", "ddim", "--nfe", "4", "--n", "12", "--batch", "2", "--seconds", "0.01")


@pytest.fixture
def few(monkeypatch):
    """Few loops, one of which no device can run, and one library that is not there."""
    loops = (("ddim", "log_snr"), ("heun", "log_snr"), ("torchdiffeq/euler", "uniform"), ("torchsde/euler", "karras"))
    monkeypatch.setattr(gpu, "LOOPS", (*loops, ("edm/edm", "karras")))
    monkeypatch.setattr(gpu, "LINES", ("torchdiffeq/rk4", "edm/edm"))
    monkeypatch.setattr(gpu, "GRAPHED", ("ddim", "heun"))
    monkeypatch.setattr(gpu.peers, "LIBRARIES", {"torchdiffeq": "torchdiffeq", "torchsde": "torchsde", "edm": "edm"})
    monkeypatch.setitem(sys.modules, "generate", None)


def run(folder: Path, *more: str, device: str = "cpu", shapes: tuple[str, ...] = ("4x2",)) -> int:
    return main(["gpu", "--out", str(folder), "--device", device, *SMALL, "--shapes", *shapes, *more])


def test_without_a_gpu_it_says_so_and_how_to_rehearse(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert "torch sees 0 CUDA devices here" in said
    assert "rehearse it with --device cpu" in said
    assert not (tmp_path / "o").exists()
    for bad in ("mps", "nothing"):
        assert run(tmp_path / "o", device=bad) == 2
        assert "cuda, cuda:1, or cpu" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu.check(gpu.Gpu(tmp_path, device="cuda")) == torch.device("cuda", 0)
    with pytest.raises(InputError, match="torch sees 1 CUDA devices"):
        gpu.check(gpu.Gpu(tmp_path, device="cuda:1"))


def test_sizes_are_those_of_the_device_unless_they_are_given():
    config = gpu.Gpu(Path("out"), n=7)
    small, large = (gpu.sized(config, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert small.n == large.n == 7
    assert (small.batch, large.batch) == (16, 256)
    assert max(small.nfe) < max(large.nfe)


def test_the_whole_of_it_on_a_processor_and_what_is_there_is_not_made_again(few, capsys):
    with in_memory() as folder:
        assert run(folder) == 0
        said = capsys.readouterr().out
        rows = [json.loads(line) for line in (folder / "quality" / "results.jsonl").read_text().splitlines()]
        assert {row["solver"] for row in rows} == {"ddim", "torchdiffeq/rk4"}
        assert {row["grid"] for row in rows} == {"log_snr", "karras"}

        pages = {name: (folder / f"{name}.md").read_text() for name in ("overhead", "cost", "graph")}
        numbers = {name: json.loads((folder / f"{name}.json").read_text())["rows"] for name in pages}
        assert all(page in said and page.strip() in (folder / "summary.md").read_text() for page in pages.values())
        lines = ["ddim", "heun", "torchdiffeq/euler"]
        assert [row["line"] for row in numbers["overhead"]] == lines
        assert [row["steps"] for row in numbers["overhead"]] == [20] * 3
        assert [row["nfe"] for row in numbers["overhead"]] == [20, 40, 20]
        assert [(row["line"], row["nfe"], row["net_evals"]) for row in numbers["cost"]] == [(name, 4, 4) for name in lines]
        assert all(row["device"] is None for row in numbers["cost"])
        for name in ("overhead", "cost"):
            assert "- not measured: torchsde/euler karras: torchsde/euler does not run on the grid 'karras'" in pages[name]
            assert "edm" not in pages[name]
        assert [(row["solver"], row["nfe"]) for row in numbers["graph"]] == [("ddim", 4), ("heun", 4)]
        assert all(row["graph"] is None and row["difference"] == 0.0 for row in numbers["graph"])
        assert "No CUDA device: nothing was recorded" in pages["graph"]
        machine = json.loads((folder / "machine.json").read_text())
        assert machine["device"] == provenance.device_name(torch.device("cpu"))
        assert machine["absent"] == ["edm"]

        before = {name: (folder / f"{name}.json").stat().st_mtime_ns for name in pages}
        assert run(folder) == 0
        assert {name: (folder / f"{name}.json").stat().st_mtime_ns for name in pages} == before
        (folder / "cost.json").write_text("torn")
        assert run(folder) == 0
        assert json.loads((folder / "cost.json").read_text())["rows"]
        assert run(folder, shapes=("4x2", "3x5")) == 0  # other options: other tables
        assert "| loop | 4x2 | 3x5 |" in (folder / "overhead.md").read_text()
        capsys.readouterr()
        assert run(folder, "--dtype", "float64") == 2
        assert "holds results of another configuration" in capsys.readouterr().err


# --- measuring ----------------------------------------------------------------------------------------------------------------


def test_overhead_is_what_is_left_of_a_run_without_its_calls_and_memory_is_in_states():
    ours, theirs = costs.overhead([("ddim", "log_snr"), ("torchdiffeq/rk4", "uniform")], (64, 8), 5, seconds=0.05)
    assert (ours.steps, ours.nfe) == (5, 5)
    assert (theirs.steps, theirs.nfe) == (5, 20)
    for row in (ours, theirs):
        assert row.micros.low <= row.micros.median <= row.micros.high
        assert row.micros.median > 0.0
    assert 2.0 <= ours.memory < theirs.memory


def test_a_loop_that_chooses_its_steps_has_no_overhead_a_step():
    with pytest.raises(InputError, match="torchdiffeq/dopri5 chooses its own steps"):
        costs.overhead([("torchdiffeq/dopri5", "uniform")], (4, 2), 5, seconds=0.01)


def test_the_time_of_a_slow_network_is_counted_as_the_networks():
    import time

    def slow(x, t):
        time.sleep(0.004)
        return 0.5 * x

    score = Score(slow, VP(), predicts="eps")
    rows = costs.on_model(score, [("ddim", "log_snr"), ("torchdiffeq/euler", "uniform")], torch.ones(2, 2), 3, 1.0, 1e-3, 0.05)
    for row in rows:
        assert row.nfe == 3
        assert row.network.median > 0.012
        assert row.wall.median > row.network.median
        assert row.overhead.median == pytest.approx(row.wall.median - row.network.median, abs=2e-3)
        assert row.overhead.median < 0.012


def test_spreads_are_medians_with_quartiles():
    assert costs.Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert costs.Spread.of([7.0]) == (7.0, 7.0, 7.0)
    assert costs.Spread(3.0, 2.0, 4.0).each(10.0, less=1.0) == (20.0, 10.0, 30.0)


# --- graphs -------------------------------------------------------------------------------------------------------------------


def prepared(name: str, device: str = "cpu"):
    path = VP()
    score = Gaussian(path, torch.zeros(3, dtype=F64), var=torch.tensor([1.0, 0.2, 0.01], dtype=F64))
    plan = trace(name, path, log_snr(path, 6))
    return plan, score, torch.randn(4, 3, dtype=F64).to(device)


@pytest.mark.parametrize("name", ["ddim", "heun", "unipc_3", "rk4"])
def test_a_prepared_plan_is_the_plan(name):
    plan, score, x = prepared(name)
    ready = Prepared(plan, score, x)
    assert torch.equal(ready.run(x.clone()), plan.run(score, x))
    found = graphs.measure(plan, score, x, seconds=0.01)
    assert (found.solver, found.nfe, found.graph, found.difference) == (plan.solver, plan.nfe, None, 0.0)


def test_a_plan_that_draws_normals_is_not_recorded():
    plan, score, x = prepared("ddpm")
    with pytest.raises(InputError, match="ddpm draws 6 normals: a graph holds none"):
        Prepared(plan, score, x)


def test_a_graph_needs_a_cuda_device():
    plan, score, x = prepared("ddim")
    with pytest.raises(InputError, match="needs a state on a CUDA device, this one is on cpu"):
        Captured(Prepared(plan, score, x), x)


@pytest.mark.parametrize("name", [pytest.param(name, marks=cuda) for name in ("ddim", "dpmpp_2m", "unipc_3", "heun")])
def test_a_graph_gives_what_the_plan_gives_for_every_start(name):
    device = torch.device("cuda")
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64)).to(device)
    score = Score(lambda x, t: net(x), VP(), predicts="eps")
    plan = trace(name, score.path, log_snr(score.path, 6))
    with torch.no_grad():
        first, other = (torch.randn(8, 64, device=device) for _ in range(2))
        captured = Captured(Prepared(plan, score, first), first)
        for x in (first, other):
            assert torch.allclose(captured.run(x), plan.run(score, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param("whole", marks=cuda)])
def test_the_whole_of_it_on_a_gpu(kind, few):
    with in_memory() as folder:
        assert run(folder, device="cuda") == 0
        rows = json.loads((folder / "graph.json").read_text())["rows"]
        assert all(row["graph"] is not None and row["difference"] < 1e-4 for row in rows)
        assert all(row["device"] is not None for row in json.loads((folder / "cost.json").read_text())["rows"])
