"""Exports: tables for programs and papers, pictures as the evaluation scripts of others read them."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import exporting, files, problems, reading, run, store, tables
from benchmarks.sweep import Sweep
from sde.errors import InputError, ResultsError

SWEEP = Sweep(
    model=("digits64:vp",),
    solver=("ddim", "unipc_2"),
    nfe=(2, 3),
    n=24,
    blocks=3,
    part=5,
    metric=("sliced_w2", "nll"),
    keep_samples=True,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "run"
    assert run.run(replace(SWEEP, out=out)) == 0
    return out


def export(made: Path, **more: Any) -> int:
    return exporting.run(exporting.Export(made, **more))


def samples(made: Path, solver: str, nfe: int) -> torch.Tensor:
    """A cell's samples straight from its part files, in the order of blocks and indices."""
    found = {}
    for path in made.glob(f"parts/*{solver}*-{nfe}-*/*"):
        about, tensors = files.unpack(path.read_bytes())
        found[about["item"]["block"], about["item"]["a"]] = tensors["x"]
    return torch.cat([found[key] for key in sorted(found)])


# --- tables -----------------------------------------------------------------------------------------------------------------


def test_csv_says_what_the_rows_say(made: Path, tmp_path: Path) -> None:
    assert export(made, to=("csv",), out=tmp_path) == 0
    with open(tmp_path / "rows.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    rows = store.read(made).rows
    assert len(found) == len(rows) == 8
    for line, row in zip(found, rows, strict=True):
        assert list(line) == list(tables.COLUMNS)
        for key in ("model", "solver", "grid", "metric", "digest", "dtype", "config"):
            assert line[key] == row[key]
        for key in ("budget", "nfe", "n", "blocks"):
            assert int(line[key]) == row[key]
        assert (float(line["value"]), float(line["low"]), float(line["high"])) == (row["value"], *row["interval"])
        assert [float(line[k]) for k in ("floor", "floor_low", "floor_high")] == [
            row["floor"][k] for k in ("mean", "low", "high")
        ]
        assert line["within_floor"] == str(row["within_floor"]).lower()
        assert [int(seed) for seed in line["seeds"].split()] == [0, 1, 2]
        assert [float(v) for v in line["values"].split()] == row["values"]
        assert float(line["seconds_per_call"]) == row["cost"]["seconds_per_call"]["median"]
        assert json.loads(line["versions"]) == row["versions"]


def test_only_what_is_asked_for(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(made, to=("csv",), out=tmp_path, solver=("ddim",), nfe=(3,), metric=("nll",)) == 0
    assert capsys.readouterr().out == f"1 rows in {tmp_path / 'rows.csv'}\n"
    (row,) = csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_text()))
    assert (row["solver"], row["budget"], row["metric"]) == ("ddim", "3", "nll")
    for change, words in (
        ({"solver": ("ddmi",)}, "did you mean 'ddim'"),
        ({"nfe": (5,)}, "--nfe 5: is not in this sweep"),
        ({"metric": ("nlll",)}, "did you mean 'nll'"),
        ({"to": ()}, "at least one format"),
        ({"to": ("csv", "csv")}, "each once"),
    ):
        with pytest.raises(InputError, match=words):
            export(made, **{"out": tmp_path, **change})


def test_rows_without_a_value_and_names_with_commas() -> None:
    row = {
        "model": 'a,"b"\n\udcff',
        "solver": None,
        "value": None,
        "interval": None,
        "floor": None,
        "note": "why not",
        "seeds": [1],
    }
    (line,) = csv.DictReader(io.StringIO(tables.to_csv([row]).decode("utf-8")))
    assert (line["model"], line["solver"], line["value"], line["low"], line["note"]) == (
        'a,"b"\n\\udcff',
        "",
        "",
        "",
        "why not",
    )
    assert tables.to_csv([{**row, "value": 1.0, "within_floor": False}]).decode().count("false") == 1


def test_latex(made: Path, tmp_path: Path) -> None:
    """A table a metric, a line a sampler, a column a budget; the best at each budget bold; balanced, and nothing unescaped."""
    assert export(made, to=("latex",), out=tmp_path) == 0
    text = (tmp_path / "rows.tex").read_text(encoding="utf-8")
    rows = store.read(made).rows
    assert text.count("\\begin{tabular}{llrr}") == text.count("\\end{tabular}") == 2
    wins = [reading.won(of, budget) for of in reading.series(rows) for budget in of.budgets]
    assert text.count("\\mathbf") == sum(1 + len(win.tied) for win in wins if win) >= 4
    assert re.sub(r"\\.", "", text).count("{") == re.sub(r"\\.", "", text).count("}")
    assert "unipc\\_2 & log\\_snr & $" in text
    assert "sampler & grid & NFE 2 & NFE 3 \\\\" in text
    assert "seeds 0, 1, 2." in text


def row(solver: str, value: float | None, **more: Any) -> dict[str, Any]:
    common = {
        "model": "m_1",
        "grid": "g",
        "budget": 4,
        "nfe": 4,
        "metric": "q",
        "unit": "",
        "lower_is_better": True,
        "two_sided": False,
    }
    floor = {"mean": 1.0, "sd": 0.1, "low": 0.8, "high": 1.2, "replicates": 8}
    return {**common, "solver": solver, "value": value, "interval": None, "floor": floor, "n": 8, "seeds": [0, 1, 2]} | more


@pytest.mark.parametrize(
    ("change", "best"),
    [
        ({}, "b"),  # better than any perfect sampler is not best
        ({"floor": None}, "a"),
        ({"floor": None, "lower_is_better": False}, "c"),
        ({"two_sided": True}, "b"),
    ],
)
def test_what_is_bold(change: dict[str, Any], best: str) -> None:
    rows = [
        row("a", 0.5, **change),
        row("b", 1.1, within_floor=True, **change),
        row("c", 3.0, **change),
        row("d", None, **change),
    ]
    text = tables.to_latex(rows).decode()
    bold = [line.split(" & ")[0] for line in text.splitlines() if "mathbf" in line]
    assert bold == [best]
    assert ("from $0.800$ to $1.20$" in text) is ("floor" not in change)
    assert ("^\\dagger$ \\\\" in next(line for line in text.splitlines() if line.startswith("b "))) is True
    assert "d & g & -- \\\\" in text
    assert "m\\_1" in text


def test_latex_compiles(tmp_path: Path) -> None:
    """Daggers beside powers of ten, bold and not, and names with every character: where LaTeX is at hand, it takes them."""
    tiny = {"interval": [9.1e-5, 1.7e-3], "within_floor": True}
    rows = [row("a", 9.1e-4, **tiny), row("b_&%$#{}~^\\", 9.5e-4, **tiny, nfe=5)]  # b overspends: it wins nothing
    rows += [row("c", 9.1e-4, budget=6, **{**tiny, "interval": None}), row("d", 0.5, budget=6)]
    text = tables.to_latex(rows).decode()
    assert "^{-4}{}^\\dagger$" in text
    assert not re.search(r"\^(\{[^{}]*\}|.)\^", text)
    if latex := shutil.which("pdflatex"):
        page = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}{text}\\end{{document}}"
        (tmp_path / "rows.tex").write_text(page)
        made = subprocess.run([latex, "-interaction=batchmode", "rows.tex"], cwd=tmp_path, capture_output=True, check=False)
        assert made.returncode == 0, (tmp_path / "rows.log").read_text(errors="replace")[-2000:]


def test_numbers_in_latex() -> None:
    assert tables.number(0.041234, 0.0021) == "$0.0412 \\pm 0.0021$"
    assert tables.number(12.3456, 1.23) == "$12.3 \\pm 1.2$"
    assert tables.number(1.234e-5, 3.4e-7) == "$(1.234 \\pm 0.034) \\cdot 10^{-5}$"
    assert tables.number(-0.5, None) == "$-0.500$"
    assert tables.number(123456.0, None) == "$1.23 \\cdot 10^{5}$"
    assert tables.number(0.0, None) == "$0.0$"
    assert tables.number(0.0, 0.01) == "$0.000 \\pm 0.010$"


def test_ties_are_bold_together() -> None:
    """As in the report: what is not told apart from the best, all that is within the floor; not who overspends."""
    rows = [row("a", 0.5, interval=[0.3, 0.7]), row("b", 0.6, interval=[0.4, 0.8]), row("c", 3.0, interval=[2.9, 3.1])]
    rows += [row("d", 0.1, nfe=5)]
    rows += [
        row(name, value, budget=8, nfe=8, within_floor=value < 1.2) for name, value in zip("abc", (0.9, 1.0, 1.3), strict=True)
    ]
    lines = {line.split(" & ")[0]: line.split(" & ")[2:] for line in tables.to_latex(rows).decode().splitlines()}
    bold = {name: ["mathbf" in cell for cell in lines[name]] for name in "abcd"}
    assert bold == {"a": [True, True], "b": [True, True], "c": [False, False], "d": [False, False]}


def test_floors_that_differ_are_all_told() -> None:
    floors = [{"mean": 0.1, "sd": 0.1, "low": low, "high": high, "replicates": 8} for low, high in ((0.1, 0.2), (0.3, 0.4))]
    rows = [row(name, 0.2, floor=floor) for name, floor in zip("ab", floors, strict=True)]
    assert "from $0.100$--$0.300$ to $0.200$--$0.400$, as" in tables.to_latex(rows).decode()


@pytest.mark.parametrize("ends", [[0.0, 0.010], [-0.006, 0.003], [None, 0.010]])
def test_an_interval_that_is_cut_off_is_as_wide_as_its_other_half(ends: list[float | None]) -> None:
    assert "0.0020 \\pm 0.0080" in tables.to_latex([row("b", 0.002, interval=ends)]).decode()


def test_latex_is_escaped() -> None:
    assert tables.escape("a_b&c%d#e$f{g}~h^i\\j\nk") == (
        "a\\_b\\&c\\%d\\#e\\$f\\{g\\}\\textasciitilde{}h\\textasciicircum{}i\\textbackslash{}j k"
    )


def test_parquet_without_pyarrow_says_what_to_do(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install pyarrow; or use --to csv"):
        export(made, to=("parquet",), out=tmp_path)
    assert not (tmp_path / "rows.parquet").exists()


def test_parquet_columns(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pyarrow is handed: each column with its type, values that fit it. A stand-in records it where there is none."""
    rows = store.read(made).rows
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        seen: dict[str, Any] = {}
        fake = types.ModuleType("pyarrow")
        for kind in ("string", "int64", "float64", "bool_"):
            setattr(fake, kind, lambda kind=kind: kind)
        fake.list_ = lambda kind: f"list {kind}"  # pyright: ignore[reportAttributeAccessIssue]
        fake.array = lambda values, kind: (kind, values)  # pyright: ignore[reportAttributeAccessIssue]
        fake.table = lambda arrays, names: dict(zip(names, arrays, strict=True))  # pyright: ignore[reportAttributeAccessIssue]
        fake.parquet = types.ModuleType("pyarrow.parquet")  # pyright: ignore[reportAttributeAccessIssue]
        fake.parquet.write_table = lambda table, sink: seen.update(table) or sink.write(b"PAR1")  # pyright: ignore
        monkeypatch.setitem(sys.modules, "pyarrow", fake)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake.parquet)
        assert tables.to_parquet(rows) == b"PAR1"
        python = {"string": str, "int64": int, "float64": float, "bool_": bool, "list int64": list, "list float64": list}
        assert all(v is None or type(v) is python[kind] for kind, values in seen.values() for v in values)
        found = {name: list(values) for name, (_, values) in seen.items()}
    else:
        found = parquet.read_table(io.BytesIO(tables.to_parquet(rows))).to_pydict()
    assert list(found) == list(tables.COLUMNS)
    assert found["value"] == [r["value"] for r in rows]
    assert found["seeds"] == [[0, 1, 2]] * len(rows)


# --- samples ----------------------------------------------------------------------------------------------------------------


def test_adm_samples(made: Path, tmp_path: Path) -> None:
    """arr_0 (n, H, W, 3) uint8, each sample once and in order; the same samples are the same file."""
    assert export(made, to=("adm",), out=tmp_path) == 0
    names = {f"digits64-vp-{s}-log_snr-{k}" for s in SWEEP.solver for k in SWEEP.nfe}
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}{end}" for name in names for end in (".npz", ".json")}
    file = tmp_path / "digits64-vp-ddim-log_snr-3.npz"
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == ["arr_0.npy"]  # the name that ADM's reader looks for
    with np.load(file) as archive:
        found = archive["arr_0"]
    assert (found.shape, found.dtype) == ((24, 8, 8, 3), np.uint8)
    wanted = problems.to_bytes(samples(made, "ddim", 3)).reshape(24, 8, 8).numpy()
    assert all((found[..., c] == wanted).all() for c in range(3))
    about = json.loads(file.with_suffix(".json").read_text())
    assert (about["n"], about["seeds"], about["solver"], about["budget"]) == (24, [0, 1, 2], "ddim", 3)
    before = file.read_bytes()
    assert export(made, to=("adm",), out=tmp_path, solver=("ddim",), nfe=(3,)) == 0
    assert file.read_bytes() == before


def test_edm_samples(made: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    assert export(made, to=("edm",), out=tmp_path, solver=("unipc_2",), nfe=(2,)) == 0
    folder = tmp_path / "digits64-vp-unipc_2-log_snr-2"
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.name, f"{folder.name}.json"]
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png")) == [f"000000/{i:06d}.png" for i in range(24)]
    wanted = problems.to_bytes(samples(made, "unipc_2", 2)).reshape(24, 8, 8).numpy()
    for i in range(24):
        with image.open(folder / "000000" / f"{i:06d}.png") as picture:
            assert picture.mode == "L"
            assert (np.asarray(picture) == wanted[i]).all()
    with pytest.raises(InputError, match="is there already"):
        export(made, to=("edm",), out=tmp_path, solver=("unipc_2",), nfe=(2,))


def test_folders_of_a_thousand(tmp_path: Path) -> None:
    """More than a thousand pictures; what a killed export left is replaced; a wrong count leaves nothing in the place."""
    pixels = np.zeros((1001, 1, 1, 3), np.uint8)
    (tmp_path / ".p.partial" / "000000").mkdir(parents=True)
    (tmp_path / ".p.partial" / "000000" / "old.png").write_bytes(b"")
    exporting.write_pngs(tmp_path / "p", iter(np.split(pixels, [3, 900])), 1001)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p"]
    assert [p.name for p in sorted((tmp_path / "p" / "001000").iterdir())] == ["001000.png"]
    assert len(list((tmp_path / "p" / "000000").iterdir())) == 1000
    with pytest.raises(InputError, match="1001 pictures where 1000"):
        exporting.write_pngs(tmp_path / "q", iter([pixels]), 1000)
    assert not (tmp_path / "q").exists()
    with pytest.raises(InputError, match="1001 pictures where 1002"):
        files.write(tmp_path / "q.npz", lambda path: exporting.write_npz(path, iter([pixels]), (1002, 1, 1, 3)))
    assert not (tmp_path / "q.npz").exists()


def test_levels_and_shapes(made: Path, tmp_path: Path) -> None:
    """Black and white are where they are said to be, and a flat sample has the shape it is given."""
    assert export(made, to=("adm",), out=tmp_path, solver=("ddim",), nfe=(2,), low=0.0, high=1.0, picture=(1, 4, 16)) == 0
    with np.load(tmp_path / "digits64-vp-ddim-log_snr-2.npz") as archive:
        found = archive["arr_0"]
    x = samples(made, "ddim", 2).double().reshape(24, 4, 16)
    assert (found[..., 0] == np.clip(np.floor(255 * x.numpy() + 0.5), 0, 255)).all()
    for change, words in (
        ({"low": 1.0, "high": 1.0}, "black must be below white"),
        ({"picture": (2, 4, 8)}, r"--picture 2 4 8: adm and edm want pictures"),
        ({"picture": (1, 4, 4)}, "adm and edm want pictures"),
    ):
        with pytest.raises(InputError, match=words):
            export(made, to=("adm",), out=tmp_path / "none", **change)
    assert list((tmp_path / "none").iterdir()) == []


def quietly(sweep: Sweep) -> Path:
    assert run.run(sweep) == 0
    return sweep.out


def test_samples_that_are_not_pictures_or_not_kept(tmp_path: Path) -> None:
    small = replace(SWEEP, solver=("ddim",), nfe=(2,), metric=("nll",), n=9, model=("ring2",))
    plane = quietly(replace(small, out=tmp_path / "a"))
    with pytest.raises(InputError, match=r"samples of shape \(2,\), no picture"):
        export(plane, to=("edm",))
    gone = quietly(replace(small, out=tmp_path / "b", model=("digits64:vp",), keep_samples=False))
    with pytest.raises(InputError, match="9 samples were not kept: run the sweep with --keep-samples"):
        export(gone, to=("adm",))


def test_a_sweep_that_has_grown_is_exported_once(tmp_path: Path) -> None:
    """Growing from 12 to 24 leaves short last parts [0, 4) beside full ones [0, 5): each index is taken once."""
    small = replace(SWEEP, solver=("ddim",), nfe=(2,), metric=("nll",), n=12, out=tmp_path / "run")
    quietly(small)
    quietly(replace(small, n=24))
    assert len(list(tmp_path.glob("run/parts/*/0.*"))) == 3
    assert export(small.out, to=("adm",), out=tmp_path / "x") == 0
    grown = quietly(replace(small, n=24, out=tmp_path / "other"))
    assert export(grown, to=("adm",), out=tmp_path / "y") == 0
    name = "digits64-vp-ddim-log_snr-2.npz"
    assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_parts_that_are_missing_or_damaged(tmp_path: Path) -> None:
    small = replace(SWEEP, solver=("ddim",), nfe=(2,), metric=("nll",), n=18, out=tmp_path / "run")
    quietly(small)
    (lost,) = tmp_path.glob("run/parts/*/1.000000005-000000006.safetensors")
    whole = lost.read_bytes()
    lost.unlink()
    with pytest.raises(InputError, match="block 1 has no part from sample 5 on: go on with the sweep first"):
        export(small.out, to=("adm",), out=tmp_path / "x")
    lost.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ResultsError, match="is damaged; run the sweep again"):
        export(small.out, to=("adm",), out=tmp_path / "x")
    assert not list((tmp_path / "x").glob("*.npz"))
    about, tensors = files.unpack(whole)
    tensors["x"][0, 3] = math.nan
    lost.write_bytes(files.pack(about, tensors))
    with pytest.raises(InputError, match="1 of its samples are not finite"):
        export(small.out, to=("edm",), out=tmp_path / "x")
    assert not [p for p in (tmp_path / "x").iterdir() if not p.name.startswith(".")]


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="holds no results"):
        export(tmp_path)


def test_the_command_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["export", str(made), "--to", "csv", "latex", "--out", str(tmp_path / "t"), "--solver", "ddim"]) == 0
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["rows.csv", "rows.tex"]
    assert "4 rows in" in capsys.readouterr().out
    assert command.main(["export", str(tmp_path)]) != 0
    error = capsys.readouterr().err
    assert error.startswith("benchmarks export: ")
    assert error.count("\n") == 1


# --- PNG --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (1, 1), (300, 2, 3)])
def test_png_is_what_pillow_reads(shape: tuple[int, ...]) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    with image.open(io.BytesIO(exporting.png_bytes(pixels))) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert (np.asarray(picture).reshape(shape) == pixels).all()


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((2, 2)), "give uint8"),
        (np.zeros((2, 2, 4), np.uint8), "give uint8"),
        (np.zeros(3, np.uint8), "give uint8"),
        (np.zeros((0, 2), np.uint8), "at least one"),
    ],
)
def test_png_refuses(pixels: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        exporting.png_bytes(pixels)
