"""The first run: the comparison of samplers, its files, the small network and the command line."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Parsed

from benchmarks import __main__ as command
from benchmarks import files, metrics, networks, pictures, problems, quick, reading, results, train
from benchmarks.endpoints import fine
from benchmarks.results import DISTANCE, ERROR, Outcome
from sde.errors import InputError, RunError
from sde.prediction import Tally
from solvers import SOLVERS, sample

SMALL = quick.Quick(nfe=(4, 5, 12), n=64, digits=16, reference=40, solvers=("ddim", "edm_heun", "edm_rk4", "ddpm"))


class Made:
    """One small run of everything: the folder, its rows, its page, and what it said."""

    def __init__(self, out: Path, said: str) -> None:
        self.out, self.said = out, said
        self.rows = reading.results(out).rows
        self.page = (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    out, said = tmp_path_factory.mktemp("quick") / "run", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert quick.run(replace(SMALL, out=out)) == 0
    return Made(out, said.getvalue())


def test_files(made: Made) -> None:
    wanted = ["nfe_vs_error.png", "report.html", "results.jsonl", "samples.png", "sheets.safetensors"]
    assert sorted(p.name for p in made.out.iterdir()) == wanted
    for name in ("nfe_vs_error.png", "samples.png"):
        assert (made.out / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_what_is_asked_of_the_first_run() -> None:
    """Three problems, at least six samplers at six budgets each."""
    default = quick.Quick()
    assert default.problems == ("mixture", "digits_exact", "digits_network")
    assert len(default.solvers) >= 6
    assert len(default.nfe) >= 6


def test_rows(made: Made) -> None:
    """A row a run and metric, with all that ``run`` says, and nothing that another run would not find again."""
    assert len(made.rows) == len(quick.PROBLEMS) * len(SMALL.solvers) * len(SMALL.nfe) * 2
    assert reading.results(made.out).damaged == 0
    wanted = {"solver", "nfe", "grid", "metric", "value", "interval", "floor", "n", "seeds", "digest", "budget", "git"}
    for row in made.rows:
        assert not wanted - set(row)
        assert "cost" not in row
        assert row["nfe"] <= row["budget"]
        assert (row["value"] is None) == (row["solver"] == "ddpm" and row["metric"] == ERROR)
        assert row["n"] == (SMALL.n if row["model"] == "mixture" else SMALL.digits)
        assert row["seeds"] == [0, 1, 2, 3]
        assert row["dtype"] == ("float32" if row["model"] == "digits_network" else "float64")
        if row["value"] is not None:
            assert row["interval"][0] <= row["value"] <= row["interval"][1]
            assert row["floor"]["mean"] > 0.0
    cut = [row for row in made.rows if row["solver"] == "edm_rk4" and row["budget"] == 5]
    assert {row["nfe"] for row in cut} == {4}
    assert len({row["digest"] for row in made.rows}) == len({(row["model"], row["solver"], row["nfe"]) for row in made.rows})


def test_the_last_lines(made: Made) -> None:
    """What won at which NFE, where the page is, what to run next."""
    tail = made.said[made.said.index("Least strong error") :]
    for name in quick.PROBLEMS:
        winners = re.findall(rf"^  {name} +(\S.*)$", tail, re.MULTILINE)
        assert [len(re.split(r" {2,}", line.strip())) for line in winners] == [len(SMALL.nfe)] * 2
    assert all(f"NFE {b}" in tail.splitlines()[0] for b in SMALL.nfe)
    assert f"Open {made.out / 'report.html'}" in tail
    assert [line.strip() for line in tail.splitlines() if "python -m" in line] == list(quick.NEXT)
    for solver in SMALL.solvers:
        assert made.said.count(f" {solver} ") >= 3


def test_page_is_self_contained(made: Made) -> None:
    """One file: the chart's data, every slope and floor, and pictures of digits, with no address outside."""
    page = Parsed(made.page)
    sheets = [v for t, n, v in page.attributes if t == "img" and n == "src"]
    assert len(sheets) == 2 * (1 + len(SMALL.solvers) * len(SMALL.nfe))
    assert all(v.startswith("data:image/png;base64,") for v in sheets)
    plain = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+|http://www.w3.org/2000/svg", "", made.page)
    assert not re.search(r"https?:|@import|url\(|javascript:", plain)
    for words in (*SMALL.solvers, *quick.PROBLEMS, "4 to 12", "NFE 12", *quick.NEXT):
        assert words in made.page
    assert made.page.count("<tr data-model=") == len(made.rows)


def outcome_of(name: str = "mixture", **change: Any) -> Outcome:
    config = replace(SMALL, **change)
    return quick.measure(config, name, problems.get(name))


def test_report_makes_the_page_again_with_its_samples(made: Made, tmp_path: Path) -> None:
    """Pictures are kept, samples are not; without the file, or with a damaged one, there is a page without them."""

    def sheets(page: str) -> list[str]:
        return re.findall(r"data:image/png;base64,[A-Za-z0-9+/=]+", page)

    again = tmp_path / "again.html"
    assert command.main(["report", str(made.out), "--out", str(again)]) == 0
    assert sheets(again.read_text()) == sheets(made.page)
    assert len(sheets(made.page)) >= 2 * (1 + len(SMALL.nfe))
    (tmp_path / "results.jsonl").write_bytes((made.out / "results.jsonl").read_bytes())
    damaged = (made.out / "sheets.safetensors").read_bytes()[:-1] + b"x"
    for kept in (None, damaged, files.pack({}, {}), files.pack({"sheets": [["model", "name", 4, True]]}, {})):
        if kept is not None:
            (tmp_path / "sheets.safetensors").write_bytes(kept)
        assert command.main(["report", str(tmp_path), "--out", str(again)]) == 0
        assert sheets(again.read_text()) == []


def test_calls_are_counted_at_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spy on the network sees, run by run, the calls that the rows claim."""
    calls: list[int] = []
    score = problems.get("mixture").score(torch.device("cpu"))
    at = type(score).at

    def spied(self: Any, knots: Any, x: Any, conditions: Any, tally: Tally) -> Any:
        calls.append(0)

        def count(call: Any) -> Any:
            def counted(state: Any) -> Any:
                calls[-1] += 1
                return call(state)

            return counted

        return [count(call) for call in at(self, knots, x, conditions, tally)]

    monkeypatch.setattr(type(score), "at", spied)
    solvers = ("ddim", "edm_heun", "edm_rk4", "dpmpp_2m", "unipc_3", "ddpm", "dpmpp_2m_sde")
    outcome = outcome_of(solvers=solvers, n=12, blocks=3, reference=10)
    claimed = [row["nfe"] for row in outcome.rows if row["metric"] == DISTANCE]
    runs = [count for count in calls if count > 1] if 1 not in claimed else calls
    assert runs == [nfe for nfe in claimed for _ in range(3)]  # the end points ask for a call at a time
    assert sum(calls) - sum(runs) == 3 * (4 * 10 + 4 * 5)
    assert outcome.reference[0] == 4 * 10


def test_numbers_are_a_function_of_the_seed() -> None:
    def numbers(seed: int) -> list[Any]:
        outcome = outcome_of(seed=seed, n=32, nfe=(4, 8), reference=10)
        return [(r["value"], r["interval"], r["floor"], r["within_floor"], r["digest"]) for r in outcome.rows]

    assert numbers(3) == numbers(3)
    assert numbers(3) != numbers(4)


def test_slopes_show_the_orders() -> None:
    """From 32 to 64 calls on the mixture: Euler first, Heun second, to within half an order, and the reference far below."""
    outcome = outcome_of(nfe=(32, 64), n=128, reference=120, solvers=("ddim", "edm_heun"))
    found = {solver: reading.slopes(outcome.of(solver, ERROR))[-1].value for solver in ("ddim", "edm_heun")}
    assert found["ddim"] == pytest.approx(-1.0, abs=0.2)
    assert found["edm_heun"] == pytest.approx(-2.0, abs=0.5)
    assert outcome.floors[ERROR].mean < 1e-4


def test_the_reference_of_the_default_is_good_enough() -> None:
    """End points are far nearer to the truth than the best sampler comes at 32 calls, and are trusted no further."""
    problem, start = problems.get("mixture"), problems.get("mixture").starts(0, range(64))
    coarse, truth = (fine(problem.score(), start, problem.start, problem.stop, n) for n in (quick.Quick().reference, 200))
    error = (coarse.x - truth.x).double().square().mean().sqrt() / problem.std
    assert float(error) < 1e-3
    assert float(error) < 3.0 * float(coarse.error.square().mean().sqrt()) / problem.std


def test_sliced_w2_of_a_shift() -> None:
    """Moved by c, each projection moves by c.v: sliced W2 is |c| / sqrt(d) on average over directions."""
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    along = torch.eye(2, dtype=torch.float64)
    assert metrics.sliced_w2(x, x + torch.tensor([3.0, 4.0]), along) == pytest.approx(5.0 / math.sqrt(2.0), abs=1e-12)
    assert metrics.sliced_w2(x, x[torch.randperm(50)], along) == 0.0
    with pytest.raises(InputError, match="same size"):
        metrics.sliced_w2(x, x[:3], along)


def test_pictures_take_any_name() -> None:
    """Neither markup nor mathematics in a name: matplotlib would read $ as TeX."""
    name = "$\\frac{1}{$ & <b>"
    outcome = outcome_of(n=12, blocks=3, nfe=(4,), reference=10, solvers=("ddim",))
    outcome.title = name
    for row in outcome.rows:
        row["solver"] = name
    outcome.kept[name, 4] = torch.zeros(4, 1, 8, 8)
    found = pictures.all_pictures([outcome], [4])
    assert sorted(found) == ["nfe_vs_error.png", "samples.png"]


def test_a_budget_below_one_step_is_a_row_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"solvers": ("abm_4_started", "ddim"), "problems": ("mixture",), "n": 16, "reference": 10}
    (tmp_path / "samples.png").write_bytes(b"of an earlier run with digits")
    assert quick.run(replace(SMALL, nfe=(1, 8), out=tmp_path, **small)) == 0
    first = reading.results(tmp_path).rows[0]
    assert [first[k] for k in ("solver", "budget", "nfe", "value", "digest")] == ["abm_4_started", 1, None, None, None]
    assert "nfe=1: a step of 'abm_4_started' costs 3 network calls" in first["note"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "nfe_vs_error.png",
        "report.html",
        "results.jsonl",
        "sheets.safetensors",
    ]
    assert re.search(r"^ abm_4_started +- ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_every_name_with_a_table_can_be_compared() -> None:
    names = tuple(n for n, e in SOLVERS.items() if e.solver.linear)
    outcome = outcome_of(n=6, blocks=3, nfe=(8,), solvers=names, reference=10)
    assert {r["solver"] for r in outcome.rows} == set(names)
    stochastic = {r["solver"] for r in outcome.rows if r["value"] is None and r["nfe"] is not None}
    assert {"ddpm", "dpmpp_2m_sde"} <= stochastic
    assert not stochastic & {"ddim", "dpmpp_2m", "unipc_3", "heun"}


def test_a_folder_that_cannot_be_written_is_told_of_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.jsonl").write_bytes(b"of an earlier run")

    class Full(files.System):
        write = staticmethod(lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space left")))

    monkeypatch.setattr(files, "system", Full())
    monkeypatch.setattr(quick, "measure", lambda *_: pytest.fail("measured first"))
    with pytest.raises(RunError, match="no space left"):
        quick.run(replace(SMALL, out=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]
    assert (tmp_path / "results.jsonl").read_bytes() == b"of an earlier run"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"solvers": ("dpmpp_2mm",)}, "did you mean 'dpmpp_2m"),
        ({"problems": ("mixtures",)}, "did you mean 'mixture'"),
        ({"grid": "karas"}, "did you mean 'karras'"),
        ({"nfe": (8, 4)}, "increasing"),
        ({"nfe": ()}, "increasing"),
        ({"solvers": ()}, "at least one"),
        ({"solvers": ("ddim", "ddim")}, "each once"),
        ({"n": 10}, "multiple of --blocks"),
        ({"digits": 4}, "multiple of --blocks"),
        ({"blocks": 2}, "at least 3"),
        ({"threads": 0}, ">= 1"),
        ({"seed": -1}, "seed"),
        ({"reference": 3}, "--reference 3: must be >= 4"),
        ({"device": "toaster"}, "cpu, cuda"),
        ({"device": "cuda:99"}, "CUDA devices"),
    ],
)
def test_options_are_checked_first(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        quick.run(replace(SMALL, out=tmp_path / "none", **change))
    assert not (tmp_path / "none").exists()


def test_number() -> None:
    shown = {0.154321: "0.154", 0.0356: "0.0356", 1.2345e-4: "1.2e-4", 2527.8: "2.5e3", 12.255: "12.3", 0.0: "0", 131.2: "131"}
    assert {v: reading.number(v) for v in shown} == shown
    assert all(len(reading.number(10.0**k * 9.99)) <= 6 + (k < -9) for k in range(-12, 10))
    assert reading.number(-0.154321) == "-0.154"
    assert reading.number(None) == ""


def test_milestones() -> None:
    assert results.milestones((4, 6, 8, 12, 16, 32)) == [8, 16, 32]
    assert results.milestones((5, 10, 20, 40)) == [10, 20, 40]


# --- files ----------------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.write(target, "old")

    def failing(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(target, failing)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="cannot be used as a folder"):
        quick.run(replace(SMALL, out=tmp_path / "taken"))


# --- the network ----------------------------------------------------------------------------------------------------------

TINY = train.Train(steps=3, batch=16, quality=False)


@pytest.mark.slow
def test_training_gives_the_same_bytes_from_the_same_seed(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    made = networks.to_bytes(*train.train(TINY))
    assert networks.to_bytes(*train.train(replace(TINY, seed=1))) != made
    assert torch.equal(torch.random.get_rng_state(), state)
    again = tmp_path / "again.safetensors"
    line = f"-m benchmarks train digits --steps 3 --batch 16 --no-quality --out {again}"
    subprocess.run([sys.executable, *line.split()], check=True, capture_output=True, cwd=Path(__file__).parent.parent)
    assert again.read_bytes() == made


def test_shipped_weights() -> None:
    assert problems.WEIGHTS.stat().st_size < 1_000_000
    about = networks.about(problems.WEIGHTS)
    assert (about["path"], about["predicts"], about["seed"], about["steps"]) == ("EDM", "F", 0, train.Train().steps)
    score = networks.load(problems.WEIGHTS)
    out = sample(score, (297, 1, 8, 8), solver="unipc_3", nfe=16, seed=5)
    training, held_out = problems.split()
    along = metrics.directions(64)
    assert metrics.sliced_w2(out.x, held_out, along) < 0.12  # 0.07 for true digits, 0.76 for an untrained network
    near = metrics.nearest_distance(out.x, training).median()
    assert 1.5 < float(near) < 3.0  # digits, and not copies: 2.06 for held-out digits, 0 for copies, 7.8 for noise


def test_weight_files_are_checked(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    with pytest.raises(InputError, match="benchmarks train digits"):
        networks.load(bad)
    bad.write_bytes(b"not a weight file")
    with pytest.raises(InputError, match="not a weight file"):
        networks.load(bad)
    network, about = train.train(TINY)
    for change, words in (
        ({"predicts": "eps"}, "predicts F"),
        ({"network": {"kind": "DigitNetwork", "width": 10**9, "blocks": 2, "dropout": 0.0}}, "out of bounds"),
        ({"network": {"kind": "DigitNetwork", "width": 64, "blocks": 2, "dropout": 0.0}}, "do not fit"),
        ({"network": 3}, "do not fit"),
    ):
        bad.write_bytes(networks.to_bytes(network, {**about, **change}))
        with pytest.raises(InputError, match=words):
            networks.load(bad)


def test_split_is_a_partition() -> None:
    training, held_out = problems.split()
    assert (len(training), len(held_out)) == (1500, 297)
    both = torch.cat([training, held_out]).reshape(1797, -1).sort(0).values
    assert torch.equal(both, problems.digits().reshape(1797, -1).sort(0).values)
    assert float(both.min()) == -1.0
    assert float(both.max()) == 1.0


# --- the command line -----------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from benchmarks.__main__ import main; status = main(['--help']);"
        "heavy = {'torch', 'matplotlib', 'sklearn', 'tyro', 'rich', 'numpy'} & set(sys.modules); print(status, sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.splitlines()[-1] == "0 []"
    assert all(name in done.stdout for name in command.COMMANDS)


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["quik"]) == 2
    assert capsys.readouterr().err == "benchmarks: unknown command 'quik': did you mean quick?\n"
    assert command.main(["quick", "--grid", "karas", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks quick: --grid 'karas' is unknown")
    assert error.count("\n") == 1
    assert command.main([]) == 2


def test_every_command_exists() -> None:
    import importlib

    for entry in command.COMMANDS.values():
        module, _, name = entry.target.partition(":")
        found = importlib.import_module(module)
        assert callable(found.run)
        assert getattr(found, name).__dataclass_params__.frozen
