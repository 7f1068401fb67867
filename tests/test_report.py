"""The page of a folder of results: safe, small, and as a reader sees it in a real browser; and who is told to have won."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import torch
from browser import Parsed
from PIL import Image
from result_rows import row, written
from sweeping import cheap, in_memory, quietly

from benchmarks import differences, kept, problems, reading, reports, store
from benchmarks.reports import Report, Sheet, Study, page, sheets
from benchmarks.reports.chart import chart
from benchmarks.reports.page import POLICY, SCRIPT
from benchmarks.sweep import Sweep
from sde.errors import ResultsError

PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    '"><script>alert(1)</script>',
    "</style><svg onload=alert(1)>",
    "\u202etxt.exe\u2066 \x00 \ud800 \u2028",
    "</script x='",
    "javascript:alert(1) & ' <!--",
]


def many(count: int = 200) -> list[dict[str, Any]]:
    """A sweep of 200 rows: two metrics, ten samplers, ten budgets."""
    rows = [
        row(f"sampler_{s}", 4 + 2 * b, (1.0 + 0.1 * s) / (4 + 2 * b) ** (1 + s % 2), metric=metric)
        for metric in ("sliced_w2", "strong_error")
        for s in range(10)
        for b in range(10)
    ]
    return rows[:count]


def hostile_page(name: str) -> str:
    """A page with this name wherever a name can be."""
    one = row(name, model=name, grid=name, metric=name, note=name, unit=name, digest=name)
    sheets = [Sheet(name, name, 8, PNG)]
    return page(Study(name, [one], {name: (name, name)}, sheets, [(name, name)], [name], [name], 1.0))


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    path = browser.find()
    if path is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    found = browser.Browser(path)
    yield found
    found.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    text, plain = hostile_page(name), hostile_page("plain")
    text.encode("utf-8")
    found, safe = Parsed(text), Parsed(plain)
    assert found.tags == safe.tags
    assert [(t, n) for t, n, _ in found.attributes] == [(t, n) for t, n, _ in safe.attributes]
    assert not any(n.startswith("on") or n == "style" for _, n, _ in found.attributes)
    assert not any(c in text for c in "\u202e\u2066\x00\u2028")
    assert text.count("</script") == text.count("</script>") == 2


def test_a_page_of_200_rows_is_small_and_asks_for_nothing() -> None:
    text = page(Study("Samplers compared", many()))
    assert len(text.encode()) < 3_000_000
    assert not re.search(r"https?:|@import|url\(|javascript:|eval\(|innerHTML", text.replace("http://www.w3.org/2000/svg", ""))
    policy = [v for t, n, v in Parsed(text).attributes if t == "meta" and n == "content" and "default-src" in v]
    assert policy == [POLICY.replace("&#x27;", "'")]
    assert "unsafe" not in policy[0]
    assert f"<script>{SCRIPT}</script>" in text


def test_winners_and_ties() -> None:
    called = {("a", "karras"): "a", ("b", "karras"): "b"}

    def said(*values: float) -> str:
        (of,) = reading.series(row(name, value=v) for name, v in zip("ab", values, strict=False))
        return reading.words(reading.won(of, 8), called)

    assert said(0.1, 0.5) == "a 0.100"
    assert said(0.5, 0.1) == "b 0.100"
    assert said(0.012, 0.008) == "b = a 0.0080 at floor"
    noisy = [row("a", value=0.10, values=[0.05, 0.15, 0.12, 0.08]), row("b", value=0.11, values=[0.16, 0.06, 0.10, 0.12])]
    (of,) = reading.series(noisy)
    assert reading.words(reading.won(of, 8), called) == "a = b 0.100"


def test_who_overspends_does_not_win() -> None:
    """A sampler that took 10 calls where 8 were allowed is no winner at 8; one that could only spend 7 may be."""
    rows = [row("a", 10, 0.1, budget=8), row("b", 7, 0.3, budget=8), row("c", 8, 0.5)]
    (of,) = reading.series(rows)
    win = reading.won(of, 8)
    assert win is not None
    assert (win.best["solver"], win.ran) == ("b", 2)
    assert reading.won(of, 4) is None


def test_scales_and_floors_of_the_chart() -> None:
    """Distances on a log axis, whatever else on a linear one; a band from the lowest floor to the highest."""
    rows = [row(nfe=b, value=v) for b, v in ((4, 0.4), (8, 0.2), (16, 0.1))]
    for change, log in (
        ({}, True),
        ({"two_sided": True}, False),
        ({"lower_is_better": False}, False),
        ({"metric": "nll"}, False),
    ):
        (found,) = chart(Study("", [{**r, **change} for r in rows]))["series"]
        assert found["log"] == log
    (found,) = chart(Study("", [{**r, "value": -r["value"]} for r in rows]))["series"]
    assert not found["log"]
    levels = [{"mean": m, "sd": 0.01, "low": 0.5 * m, "high": 2.0 * m, "replicates": 9} for m in (0.2, 0.1, 0.3)]
    (found,) = chart(Study("", [{**r, "floor": f} for r, f in zip(rows, levels, strict=True)]))["series"]
    assert found["floor"] == {"mean": 0.2, "low": 0.05, "high": 0.6}
    (found,) = chart(Study("", [{**r, "floor": None} for r in rows]))["series"]
    assert found["floor"] is None


@pytest.mark.parametrize(
    ("enough", "words"),
    [
        ({"worse": 0.05, "n": 65536, "why": ""}, "65,536 samples tell a sampler 5 % worse from a perfect one."),
        ({"worse": 0.1, "n": None, "why": "too few"}, "Too few."),
        ({"worse": 0.05, "n": 0, "why": ""}, "No sampling noise hides a sampler 5 % worse."),
        (None, ""),
    ],
)
def test_how_many_samples_it_takes(enough: dict[str, Any] | None, words: str) -> None:
    (found,) = chart(Study("", [row(enough=enough)]))["series"]
    assert found["enough"] == words


def test_a_line_keeps_its_look_over_the_page() -> None:
    """A colour a sampler and a dash a grid, the same on every model."""
    rows = [row(s, model=m, grid=g) for m in ("ring2", "rings") for s in ("a", "b") for g in ("karras", "log_snr")]
    found = chart(Study("", rows[::-1]))
    looks = {line["name"]: (line["colour"], line["dash"]) for line in found["lines"]}
    assert looks == {"b · log_snr": (0, 0), "b · karras": (0, 1), "a · log_snr": (1, 0), "a · karras": (1, 1)}
    assert [sorted(line["id"] for line in s["lines"]) for s in found["series"]] == [[0, 1, 2, 3]] * 2


def test_pairing_sees_what_shared_noise_hides() -> None:
    shared = [0.5, 1.5, 1.1, 0.9]
    a, b = (
        row(value=1.0, values=shared),
        row(value=1.1, values=[v + 0.1 + e for v, e in zip(shared, (0.01, -0.01, 0.01, -0.01), strict=True)]),
    )
    assert differences.difference(a, b).p < 0.01
    assert differences.difference(a, {**b, "seeds": [4, 5, 6, 7]}).p > 0.5


def test_t_tails_and_discoveries() -> None:
    assert differences.t_tails(1.0, 1.0) == pytest.approx(0.5, rel=1e-12)
    assert differences.t_tails(4.302652729696142, 2.0) == pytest.approx(0.05, rel=1e-9)
    assert differences.discoveries([0.014, 0.02, 0.03, 0.04]) == [True] * 4
    assert differences.discoveries([0.04, 0.2, 0.5, 0.9]) == [False] * 4
    assert differences.discoveries([]) == []


def test_slopes_and_what_is_within_the_floor() -> None:
    rows = [row(nfe=4, value=0.4), row(nfe=8, value=0.1), row(nfe=16, value=0.01)]
    (only,) = reading.slopes(rows)
    assert (only.start, only.end) == (4, 8)
    assert only.value == pytest.approx(-2.0)


def test_a_folder_of_rows(tmp_path: Path) -> None:
    wrong = [{**row(), "value": "<b>"}, row(n=True), {k: v for k, v in row().items() if k != "model"}]
    written(tmp_path, [*many(20), *wrong], b"torn")
    assert reports.run(Report(tmp_path)) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count('<tr data-model="ring2"') == 20
    assert "4 lines of the folder are damaged" in text
    with pytest.raises(ResultsError, match="holds no results"):
        reports.run(Report(tmp_path / "none"))


@pytest.fixture(scope="module")
def sampled() -> Iterator[Path]:
    """A small sweep that keeps its samples: pictures, points of the plane, and a metric of the flow's samplers only."""
    with in_memory() as out, cheap():
        options = {"solver": ("ddim", "ddpm"), "nfe": (2, 4), "grid": ("karras",), "n": 12, "blocks": 3, "keep_samples": True}
        assert quietly(Sweep(model=("digits_exact", "ring2"), metric=("sliced_w2",), out=out / "run", **options)) == 0
        yield out / "run"


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"))


def test_sheets_show_the_samples_of_the_folder(sampled: Path) -> None:
    """Of each model true draws, then each sampler's samples, in order; the pictures are those of the samples themselves."""
    found = reports.gather(sampled).sheets
    names = [(s.model, s.name, s.nfe) for s in found]
    for model in ("digits_exact", "ring2"):
        own = [name[1:] for name in names if name[0] == model]
        assert own[0] == ("true draws", None)
        assert sorted(own[1:]) == sorted((solver, nfe) for solver in ("ddim", "ddpm") for nfe in (2, 4))
    whole = {(k.cell["model"], k.cell["solver"], k.cell["budget"]): k for k in kept.kept(sampled, store.read(sampled).sweep)}
    for sheet in found:
        problem = problems.get(sheet.model)
        x = (
            problem.truth(0, range(12))
            if sheet.nfe is None
            else torch.cat(list(whole[sheet.model, sheet.name, sheet.nfe].read()))
        )
        assert np.array_equal(pixels(sheet.png), problem.preview(x))
        assert sheet.ink == (sheet.model == "ring2")
    assert len({sheet.png for sheet in found}) == len(found)


def test_no_sample_is_shown_twice(tmp_path: Path) -> None:
    """A sweep that has grown leaves short parts beside full ones."""
    spans = ["0.000000000-000000002", "0.000000000-000000004", "0.000000002-000000004", "0.000000004-000000008"]
    for name in [*spans, "1.000000000-000000004", "10.000000000-000000004", "2.000000000-000000004"]:
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    (tmp_path / "0.000000008-000000012.safetensors.partial").write_bytes(b"")
    found = [path.name.partition(".safetensors")[0] for path in sheets.parts(tmp_path)]
    assert found == [spans[1], spans[3], "1.000000000-000000004", "2.000000000-000000004", "10.000000000-000000004"]


def test_a_page_of_a_sweep(sampled: Path, chromium: browser.Browser) -> None:
    """The folder of a real run, opened: pictures of whole pixels, the command, no complaint."""
    assert reports.run(Report(sampled)) == 0
    text = (sampled / "report.html").read_text(encoding="utf-8")
    assert "python -m benchmarks run --model digits_exact ring2 --solver ddim ddpm" in text
    assert "damaged" not in text
    assert "Not finished" not in text
    chromium.open(sampled / "report.html")
    sizes = chromium.js("[...document.images].map((i) => [i.complete, i.naturalWidth, i.width / i.naturalWidth])")
    assert len(sizes) == 10
    assert all(done and width > 0 and scale in (2, 4) for done, width, scale in sizes)
    assert chromium.js("document.querySelectorAll('#chart path.mark').length") == 4
    assert chromium.complaints == []


def test_large_pictures_are_made_smaller_and_the_page_stays_small() -> None:
    """Samples of 3 x 256 x 256 take a sheet of tiles of 64 pixels; what is beyond the room for pictures is left out."""
    problem = sheets.problem_of("mine:load", (3, 256, 256))
    made = sheets.sheet(problem, "mine:load", "ddim", 8, torch.rand(4, 3, 256, 256) * 2.0 - 1.0, 4)
    assert Image.open(io.BytesIO(made.png)).size == (2 * 65 - 1, 2 * 65 - 1)
    assert not made.ink


# --- a real browser -----------------------------------------------------------------------------------------------------------


SHOWN = "[...document.querySelectorAll('#rows tbody tr')].filter((r) => !r.hidden)"
FITS = "document.documentElement.scrollWidth <= innerWidth"
SET = "(() => { const e = document.getElementById('%s'); e.value = '%s'; e.dispatchEvent(new Event('%s')); })()"


def test_in_a_browser(chromium: browser.Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(Study("Samplers compared", many())), encoding="utf-8")
    chromium.open(path)
    assert chromium.js("document.querySelectorAll('#chart path.mark').length") == 100
    assert chromium.js("document.querySelectorAll('#chart .front-point').length") > 0
    chromium.js("document.querySelectorAll('#rows th button')[3].click()")
    values = f"{SHOWN}.map((r) => Number(r.cells[3].dataset.v))"
    up = chromium.js(values)
    assert up == sorted(up)
    chromium.js("document.querySelectorAll('#rows th button')[3].click()")
    assert chromium.js(values) == up[::-1]
    chromium.js(SET % ("search", "sampler_3 strong", "input"))
    assert chromium.js(f"{SHOWN}.length") == 10
    chromium.js(SET % ("search", "", "input"))
    chromium.js("document.getElementById('only').click()")
    assert set(chromium.js(f"{SHOWN}.map((r) => r.dataset.metric)")) == {"sliced_w2"}
    chromium.js(SET % ("metric", "strong_error", "change"))
    assert set(chromium.js(f"{SHOWN}.map((r) => r.dataset.metric)")) == {"strong_error"}
    assert chromium.js("document.getElementById('count').textContent") == "100 of 200 rows"
    place = chromium.js("(() => { const b = document.querySelector('#chart path.mark').getBoundingClientRect();"
                        " return [b.x + b.width / 2, b.y + b.height / 2]; })()")  # fmt: skip
    chromium.move(*place)
    assert "sampler_0, NFE 4" in chromium.js("document.getElementById('tip').innerText")
    assert "strong_error" in chromium.js("document.getElementById('chart-title').textContent")
    assert "Floor 0.01, from 0.005 to 0.015: " in chromium.js("document.getElementById('floor-note').textContent")
    assert "1,024 samples tell a sampler 5 % worse" in chromium.js("document.getElementById('floor-note').textContent")
    chromium.js("document.querySelector('#legend button').click()")
    assert chromium.js("document.querySelectorAll('#chart path.mark').length") == 90
    assert chromium.complaints == []


def test_rows_without_a_value_stay_last(chromium: browser.Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    values = [0.3, None, -0.2, None, 0.0, 0.1, None, 0.2]
    path.write_text(page(Study("", [row(f"s{i}", value=v) for i, v in enumerate(values)])), encoding="utf-8")
    chromium.open(path)
    for up in (True, False):
        chromium.js("[...document.querySelectorAll('#rows th button')].find((b) => b.textContent === 'value').click()")
        found = chromium.js(f"{SHOWN}.map((r) => r.cells[3].dataset.v ?? null)")
        known = sorted((v for v in values if v is not None), reverse=not up)
        assert [v if v is None else float(v) for v in found] == [*known, None, None, None]
    assert chromium.complaints == []


def test_on_a_phone_and_in_the_dark(chromium: browser.Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(Study("Samplers compared", many())), encoding="utf-8")
    ground = {}
    for dark in (False, True):
        chromium.open(path, 390, 844, dark, phone=True)
        assert chromium.js(FITS)
        assert chromium.js("document.querySelector('#chart svg').clientWidth") <= 390
        heads = "[...document.querySelectorAll('#rows th')].filter((h) => h.getBoundingClientRect().right <= innerWidth)"
        seen = chromium.js(f"{heads}.map((h) => h.textContent)")
        assert seen[:4] == ["sampler", "NFE", "metric", "value"]
        ground[dark] = chromium.js("getComputedStyle(document.body).backgroundColor")
    assert ground == {False: "rgb(255, 255, 255)", True: "rgb(20, 23, 26)"}
    assert chromium.complaints == []


def test_hostile_names_in_a_browser(chromium: browser.Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(hostile_page(" ".join(HOSTILE)), encoding="utf-8")
    chromium.open(path)
    assert chromium.js("document.querySelectorAll('#chart path.mark').length") == 1
    assert not [c for c in chromium.complaints if "image" not in c.lower()]


def test_the_browser_hears_complaints(chromium: browser.Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<script>console.error('no'); nothing.here</script><img src='http://localhost:9/x.png'>")
    chromium.open(path)
    heard = " ".join(chromium.complaints)
    assert "console.error" in heard
    assert "nothing is not defined" in heard
    assert "asked for http://localhost:9/x.png" in heard
