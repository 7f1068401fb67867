"""The first run: the comparison of samplers, its files, the small network and the command line."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import files, metrics, networks, pictures, problems, quick, report, results, train
from benchmarks.metrics import levels
from benchmarks.results import Outcome, Row
from sde.errors import InputError
from sde.prediction import Tally
from solvers import SOLVERS, sample

SMALL = quick.Quick(nfe=(4, 5, 12), n=64, digits=16, reference=40, solvers=("ddim", "edm_heun", "edm_rk4", "ddpm"))
COLUMNS = {
    "problem": str,
    "solver": str,
    "grid": str,
    "budget": int,
    "nfe": int,
    "steps": int,
    "error": float,
    "reference_error": float,
    "slope": float,
    "sliced_w2": float,
    "sliced_w2_sd": float,
    "floor": float,
    "floor_sd": float,
    "within_floor": bool,
    "seconds": float,
    "seed": int,
    "n": int,
    "blocks": int,
    "device": str,
    "versions": dict,
    "note": str,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    """One small run of everything: the folder, its rows and its page."""
    out = tmp_path_factory.mktemp("quick") / "run"
    assert quick.run(replace(SMALL, out=out)) == 0
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return out, rows, (out / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a page would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def check(self) -> None:
        assert not set(self.tags) & {
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "a",
            "svg",
            "video",
            "audio",
        }
        for tag, name, value in self.attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "srcset", "href", "action", "data", "poster", "background"):
                assert value.startswith("data:image/png;base64,"), (tag, name, value[:40])
        policy = [v for t, n, v in self.attributes if t == "meta" and n == "content" and "default-src" in v]
        assert policy == [report.POLICY]
        assert policy[0].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_files(made: tuple[Path, list[dict[str, Any]], str]) -> None:
    out, _, _ = made
    assert sorted(p.name for p in out.iterdir()) == ["nfe_vs_error.png", "report.html", "results.jsonl", "samples.png"]
    for name in ("nfe_vs_error.png", "samples.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_rows(made: tuple[Path, list[dict[str, Any]], str]) -> None:
    _, rows, _ = made
    assert len(rows) == len(quick.PROBLEMS) * len(SMALL.solvers) * len(SMALL.nfe)
    for row in rows:
        assert list(row) == list(COLUMNS)
        for name, kind in COLUMNS.items():
            assert row[name] is None or type(row[name]) is kind, (name, row[name])
        assert row["nfe"] <= row["budget"]
        assert (row["error"] is None) == (row["solver"] == "ddpm")
        assert row["n"] == (SMALL.n if row["problem"] == "mixture" else SMALL.digits)
    cut = [row for row in rows if row["solver"] == "edm_rk4" and row["budget"] == 5]
    assert {row["nfe"] for row in cut} == {4}
    assert all(row["slope"] is None for row in rows if row["budget"] == 4)


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
    config = replace(SMALL, solvers=solvers, n=16, blocks=4)
    *_, outcome = quick.measure(config, "mixture", problems.get("mixture"))
    assert calls[2:] == [row.nfe for row in outcome.rows]  # after the reference and the half reference
    assert calls[0] == outcome.reference_nfe


def test_numbers_are_a_function_of_the_seed() -> None:
    def numbers(seed: int) -> list[Any]:
        config = replace(SMALL, seed=seed, n=32, nfe=(4, 8))
        *_, outcome = quick.measure(config, "mixture", problems.get("mixture"))
        return [(r.error, r.sliced_w2, r.slope, r.floor, r.within_floor) for r in outcome.rows]

    assert numbers(3) == numbers(3)
    assert numbers(3) != numbers(4)


def test_slopes_show_the_orders() -> None:
    """From 32 to 64 calls on the mixture: Euler first, Heun second, to within half an order, and the reference far below."""
    config = replace(SMALL, nfe=(32, 64), n=256, reference=200, solvers=("ddim", "edm_heun"))
    *_, outcome = quick.measure(config, "mixture", problems.get("mixture"))
    slopes = {r.solver: r.slope for r in outcome.rows if r.budget == 64}
    assert slopes["ddim"] == pytest.approx(-1.0, abs=0.2)
    assert slopes["edm_heun"] == pytest.approx(-2.0, abs=0.5)
    assert outcome.reference_error < 1e-4


def test_a_perfect_sampler_is_within_the_floor_and_a_poor_one_is_not() -> None:
    """True draws pass in at least 90 of 100 trials; draws moved by half a standard deviation in none."""
    problem, along = problems.get("digits_exact"), metrics.directions(64)
    seeds = iter(range(10_000))

    def pair(shift: float = 0.0) -> float:
        a, b = (problem.truth(next(seeds), range(64)) for _ in range(2))
        return metrics.sliced_w2(a + shift, b, along)

    floor = metrics.level([pair() for _ in range(quick.FLOOR_PAIRS)])
    passed = sum(levels.within(metrics.level([pair() for _ in range(4)]), floor) for _ in range(100))
    assert passed >= 90
    assert not any(levels.within(metrics.level([pair(0.4) for _ in range(4)]), floor) for _ in range(20))


def test_sliced_w2_of_a_shift() -> None:
    """Moved by c, each projection moves by c.v: sliced W2 is |c| / sqrt(d) on average over directions."""
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    along = torch.eye(2, dtype=torch.float64)
    assert metrics.sliced_w2(x, x + torch.tensor([3.0, 4.0]), along) == pytest.approx(5.0 / math.sqrt(2.0), abs=1e-12)
    assert metrics.sliced_w2(x, x[torch.randperm(50)], along) == 0.0
    with pytest.raises(InputError, match="same size"):
        metrics.sliced_w2(x, x[:3], along)


def test_page_is_self_contained(made: tuple[Path, list[dict[str, Any]], str]) -> None:
    _, _, text = made
    page = Page(text)
    page.check()
    assert page.tags["img"] == 2
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|javascript:", re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    )
    words = " ".join(page.words)
    assert all(solver in words for solver in SMALL.solvers)


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "</style><svg onload=alert(1)>",
        "javascript:alert(1)",
        "\u202etxt.exe\u2066 \x00 \ud800",
        "$\\frac{1}{$ & <b>",
    ],
)
def test_hostile_names_stay_text(hostile: str) -> None:
    text, plain = page_of(hostile), page_of("plain")
    text.encode("utf-8")
    page = Page(text)
    page.check()
    assert page.tags == Page(plain).tags
    assert [(t, n) for t, n, _ in page.attributes] == [(t, n) for t, n, _ in Page(plain).attributes]
    assert not any(c in text for c in "\u202e\u2066\x00")


def page_of(name: str) -> str:
    """A page with this name wherever a name can be, in its pictures too."""
    level = metrics.Level(0.1, 0.01, 16)
    numbers = {"budget": 4, "nfe": 4, "steps": 4, "error": 0.1, "reference_error": 1e-6, "slope": -1.0, "sliced_w2": 0.2}
    numbers |= {"sliced_w2_sd": 0.01, "floor": 0.1, "floor_sd": 0.01, "within_floor": False, "seconds": 0.1, "seed": 0, "n": 8}
    row = Row(problem=name, solver=name, grid=name, device=name, versions={name: name}, note=name, blocks=4, **numbers)
    outcome = Outcome(name, name, name, level, 1e-6, 100, level, [row])
    drawable = "".join(c for c in name if c.isprintable())  # fonts have no glyph for the others
    shown = Outcome(drawable, drawable, drawable, level, 1e-6, 100, level, [replace(row, solver=drawable)])
    shown.kept[drawable, 4] = torch.zeros(4, 1, 8, 8)
    images = pictures.all_pictures([shown], [4])
    images = {file: picture._replace(alt=name) for file, picture in images.items()}
    return report.page([outcome], replace(SMALL, nfe=(4,)), images, 1.0)


def test_a_budget_below_one_step_is_a_row_that_says_so(tmp_path: Path) -> None:
    config = replace(SMALL, nfe=(1, 8), solvers=("edm_rk4", "ddim"), problems=("mixture",), out=tmp_path)
    (tmp_path / "samples.png").write_bytes(b"of an earlier run with digits")
    assert quick.run(config) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    first = rows[0]
    assert first["solver"] == "edm_rk4"
    assert (first["nfe"] is None) == (first["error"] is None)
    assert first["note"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nfe_vs_error.png", "report.html", "results.jsonl"]


def test_every_name_with_a_table_can_be_compared() -> None:
    names = tuple(n for n, e in SOLVERS.items() if e.solver.linear)
    config = replace(SMALL, n=16, nfe=(8,), solvers=names, reference=10)
    *_, outcome = quick.measure(config, "mixture", problems.get("mixture"))
    assert {r.solver for r in outcome.rows} == set(names)
    stochastic = {r.solver for r in outcome.rows if r.error is None and r.nfe is not None}
    assert {"ddpm", "dpmpp_2m_sde"} <= stochastic
    assert not stochastic & {"ddim", "dpmpp_2m", "unipc_3", "heun"}


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
    assert {v: results.number(v) for v in shown} == shown
    assert all(len(results.number(10.0**k * 9.99)) <= 6 + (k < -9) for k in range(-12, 10))
    assert results.number(None) == ""


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


def test_training_gives_the_same_bytes_from_the_same_seed(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    made = [networks.to_bytes(*train.train(TINY)) for _ in range(2)]
    assert made[0] == made[1]
    assert networks.to_bytes(*train.train(replace(TINY, seed=1))) != made[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    again = tmp_path / "again.safetensors"
    line = f"-m benchmarks train digits --steps 3 --batch 16 --no-quality --out {again}"
    subprocess.run([sys.executable, *line.split()], check=True, capture_output=True, cwd=Path(__file__).parent.parent)
    assert again.read_bytes() == made[0]


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
