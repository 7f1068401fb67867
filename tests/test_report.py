"""The page of a folder of results: safe, small, and as a reader sees it in a real browser; and who is told to have won."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import pytest
from result_rows import row, written

from benchmarks import differences, reading, reports
from benchmarks.reports import Report, Sheet, Study, page
from benchmarks.reports.page import POLICY, SCRIPT
from sde.errors import ResultsError

PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    '"><script>alert(1)</script>',
    "</style><svg onload=alert(1)>",
    "\u202etxt.exe\u2066 \x00 \ud800 \u2028",
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


class Parsed(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]


def hostile_page(name: str) -> str:
    """A page with this name wherever a name can be."""
    one = row(name, model=name, grid=name, metric=name, note=name, unit=name, digest=name)
    sheets = [Sheet(name, name, 8, PNG)]
    return page(Study(name, [one], {name: (name, name)}, sheets, [(name, name)], [name], [name], 1.0))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    text, plain = hostile_page(name), hostile_page("plain")
    text.encode("utf-8")
    found, safe = Parsed(text), Parsed(plain)
    assert found.tags == safe.tags
    assert [(t, n) for t, n, _ in found.attributes] == [(t, n) for t, n, _ in safe.attributes]
    assert not any(n.startswith("on") or n == "style" for _, n, _ in found.attributes)
    assert not any(c in text for c in "\u202e\u2066\x00\u2028")
    assert text.count("</script>") == 2


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


# --- a real browser -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    path = browser.find()
    if path is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    found = browser.Browser(path)
    yield found
    found.close()


SHOWN = "[...document.querySelectorAll('#rows tbody tr')].filter((r) => !r.hidden)"
FITS = "document.documentElement.scrollWidth <= innerWidth"
SET = "(() => { const e = document.getElementById('%s'); e.value = '%s'; e.dispatchEvent(new Event('%s')); })()"


def test_in_a_browser(chromium: browser.Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(Study("Samplers compared", many())), encoding="utf-8")
    chromium.open(path)
    assert chromium.js("document.querySelectorAll('#chart path.mark').length") == 100
    assert chromium.js("document.querySelectorAll('#chart .front-point').length") > 0
    chromium.js("document.querySelectorAll('#rows th button')[5].click()")
    values = f"{SHOWN}.map((r) => Number(r.cells[5].dataset.v))"
    up = chromium.js(values)
    assert up == sorted(up)
    chromium.js("document.querySelectorAll('#rows th button')[5].click()")
    assert chromium.js(values) == up[::-1]
    chromium.js(SET % ("search", "sampler_3 strong", "input"))
    assert chromium.js(f"{SHOWN}.length") == 10
    chromium.js(SET % ("metric", "strong_error", "change"))
    assert "strong_error" in chromium.js("document.getElementById('chart-title').textContent")
    chromium.js("document.querySelector('#legend button').click()")
    assert chromium.js("document.querySelectorAll('#chart path.mark').length") == 90
    assert chromium.complaints == []


def test_on_a_phone_and_in_the_dark(chromium: browser.Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(Study("Samplers compared", many())), encoding="utf-8")
    ground = {}
    for dark in (False, True):
        chromium.open(path, 390, 844, dark, phone=True)
        assert chromium.js(FITS)
        assert chromium.js("document.querySelector('#chart svg').clientWidth") <= 390
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
