"""What has changed between two folders of results, beyond noise: no more false alarms than declared, and none missed that is
plain.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from result_rows import row, written

from benchmarks import __main__ as command
from benchmarks import compare, differences, files, metrics, problems, record
from benchmarks.compare import compare as compared
from benchmarks.metrics.levels import t_quantile
from benchmarks.sweep import LISTS

Rows = list[dict[str, Any]]


def digest(number: object) -> str:
    return f"{number!s:0>64}"


def verdicts(a: Rows, b: Rows, **options: float) -> dict[str, str]:
    """By sampler."""
    return {c.a["solver"]: c.verdict for c in compared(a, b, **options).changes}


# --- false alarms: at most as many as declared --------------------------------------------------------------------------------

PAIRS, CELLS = 200, 12


def gauss(rng: random.Random) -> float:
    return rng.gauss(0.0, 1.0)


def skewed(rng: random.Random) -> float:
    return rng.expovariate(1.0)


def simulated(rng: random.Random, paired: bool, noise: Callable[[random.Random], float]) -> tuple[Rows, Rows]:
    """Two runs of the same samplers; where they start from the same noise their blocks share the most of it."""
    found: tuple[Rows, Rows] = ([], [])
    for cell in range(CELLS):
        shared = [noise(rng) for _ in range(4)]
        for side in (0, 1):
            own = [0.2 * noise(rng) if paired else noise(rng) for _ in range(4)]
            values = [1.0 + 0.1 * ((s if paired else 0.0) + o) for s, o in zip(shared, own, strict=True)]
            seeds = [k + 4 * side * (not paired) for k in range(4)]
            made = row(f"s{cell}", 8, sum(values) / 4, values=values, seeds=seeds, digest=digest(side))
            found[side].append(made)
    return found


@pytest.mark.parametrize("noise", [gauss, skewed])
@pytest.mark.parametrize("paired", [True, False])
def test_no_more_false_alarms_than_declared(paired: bool, noise: Callable[[random.Random], float]) -> None:
    """Of 200 pairs of results in which nothing has changed, at most 5 % have a cell called worse, and at most 5 % and three
    deviations of that count any change at all.
    """
    rng = random.Random(20 + paired)
    alarms = [compared(*simulated(rng, paired, noise)) for _ in range(PAIRS)]
    assert sum(found.status for found in alarms) <= 0.05 * PAIRS
    changed = sum(len(found.of(compare.SAME)) < CELLS for found in alarms)
    assert changed <= 0.05 * PAIRS + 3.0 * math.sqrt(0.05 * 0.95 * PAIRS)


def test_the_level_is_used_up() -> None:
    """A test that never says anything has no false alarms either: at a level of a third, alarms are near that."""
    rng = random.Random(5)
    alarms = [compared(*simulated(rng, False, gauss), level=0.33) for _ in range(PAIRS)]
    changed = sum(len(found.of(compare.SAME)) < CELLS for found in alarms) / PAIRS
    assert 0.2 <= changed <= 0.4


def real(seed: int, worse: float, metric: metrics.Metric) -> dict[str, Any]:
    """The row of a sampler that draws from the truth, or from what is a little wider."""
    problem = problems.get("ring2")
    blocks = [metrics.perfect([metric], problem, seed + b, 64, worse) for b in range(4)]
    found = metrics.measure(metric, problem, blocks)
    seeds = [seed + b for b in range(4)]
    own = {"values": list(found.values), "metric": metric.name, "seeds": seeds, "n": 256, "floor": None, "within_floor": None}
    return row("ddim", 8, found.value, **own, digest=digest(seed + 1000 * worse))


@pytest.mark.parametrize("name", ["sliced_w2", "fd"])
def test_false_alarms_of_real_metrics(name: str) -> None:
    """The same of true draws: block values are not normal, and those of pooled metrics come from the jackknife."""
    metric = metrics.metric(name)
    rows = [real(4 * k, 0.0, metric) for k in range(101)]
    assert sum(compared([a], [b]).status for a, b in pairwise(rows)) <= 5


def test_what_is_plain_is_found() -> None:
    """A sampler that is half as wide again is worse for every seed; from the same noise a tenth is enough."""
    metric = metrics.metric("sliced_w2")
    for k in range(10):
        assert verdicts([real(8 * k, 0.0, metric)], [real(8 * k + 4, 1.5, metric)]) == {"ddim": "worse"}
        assert verdicts([real(8 * k, 1.5, metric)], [real(8 * k + 4, 0.0, metric)]) == {"ddim": "better"}
    shared = [0.5, 1.5, 1.1, 0.9]
    a = row(value=1.0, values=shared)
    b = row(value=1.1, values=[v + d for v, d in zip(shared, (0.11, 0.09, 0.11, 0.09), strict=True)], digest=digest(1))
    assert verdicts([a], [b]) == {"ddim": "worse"}
    assert verdicts([a], [{**b, "seeds": [4, 5, 6, 7]}]) == {"ddim": "same"}


def test_an_interval_stands_for_blocks_that_are_not_told() -> None:
    """Rows of another tool, or of another version, may have no block values: their intervals say the same."""
    rows = []
    for seed, value in ((0, 1.0), (4, 1.2)):
        values = [value + d for d in (-0.1, 0.1, 0.05, -0.05)]
        reach = t_quantile(0.975, 3) * statistics.stdev(values) / 2.0
        interval = [value - reach, value + reach]
        rows.append(row(value=value, values=values, interval=interval, seeds=[seed + k for k in range(4)]))
    told, bare = (differences.difference(*pair) for pair in (rows, [{**r, "values": None} for r in rows]))
    assert bare == pytest.approx(told, rel=1e-12)
    assert 0.01 < told.p < 0.05


def test_few_true_changes_among_many_cells_are_found() -> None:
    """Benjamini and Hochberg: two cells of 12 are worse by much, the others are not touched."""
    a, b = simulated(random.Random(1), True, gauss)
    for made in b[:2]:
        made["values"] = [v + 1.0 for v in made["values"]]
        made["value"] += 1.0
    found = verdicts(a, b)
    assert {name for name, verdict in found.items() if verdict == "worse"} == {"s0", "s1"}


# --- verdicts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "verdict", "why"),
    [
        ({}, "same", "identical"),
        ({"digest": digest(1)}, "same", "not told apart"),
        ({"value": 0.9, "digest": digest(1)}, "worse", ""),
        ({"value": 0.05, "digest": digest(1)}, "better", ""),
        ({"value": 0.2001, "digest": digest(1)}, "same", "changed by less than 0.1 %"),
        ({"value": 0.21, "values": [0.3, 0.1, 0.25, 0.19], "digest": digest(1)}, "same", "not told apart"),
        ({"value": None, "note": "3 of 400 samples are not finite"}, "worse", "no value any more: 3 of 400"),
        ({"value": 0.9, "path": "VP()", "digest": digest(1)}, "incomparable", "path None -> VP()"),
        ({"unit": "bits"}, "incomparable", "unit std -> bits"),
        ({"value": 0.9}, "worse", ""),  # the same samples, measured otherwise
    ],
)
def test_verdicts(change: dict[str, Any], verdict: str, why: str) -> None:
    (found,) = compared([row()], [row(**change)]).changes
    assert (found.verdict, found.why[: len(why)]) == (verdict, why)
    assert (compared([row()], [row(**change)]).status == 1) == (verdict in ("worse", "incomparable"))


def test_within_both_floors_nothing_changes() -> None:
    inside = row(value=0.008, values=[0.0081, 0.0079, 0.0081, 0.0079])
    other = row(value=0.014, values=[0.0141, 0.0139, 0.0141, 0.0139], digest=digest(1))
    (found,) = compared([inside], [other]).changes
    assert (found.verdict, found.why) == ("same", "both within the floor")
    assert verdicts([inside], [{**other, "value": 0.04, "values": [0.04] * 4, "within_floor": False}]) == {"ddim": "worse"}


def test_more_is_better_and_nearest_to_the_floor_is_best() -> None:
    top = {"mean": 0.9, "sd": 0.01, "low": 0.87, "high": 0.93, "replicates": 32}
    high = [row(value=v, metric="recall", lower_is_better=False, floor=top, digest=digest(v)) for v in (0.8, 0.4, 1.8)]
    assert verdicts(high[:1], high[1:2]) == {"ddim": "worse"}
    assert verdicts(high[:1], high[2:]) == {"ddim": "worse"}  # better than any perfect sampler is not good
    floor = {"mean": 1.0, "sd": 0.01, "low": 0.97, "high": 1.03, "replicates": 32}
    nll = [
        row(value=v, values=[v - 0.001, v + 0.001, v, v], metric="nll", two_sided=True, floor=floor, digest=digest(v))
        for v in (0.5, 1.1, 1.6)
    ]
    assert verdicts(nll[:1], nll[1:2]) == {"ddim": "better"}
    assert verdicts(nll[1:2], nll[2:]) == {"ddim": "worse"}
    near, narrow = (
        row(value=v, values=[v - 0.001, v + 0.001, v, v], metric="w2", floor=floor, digest=digest(v)) for v in (1.1, 0.5)
    )
    assert verdicts([near], [narrow]) == {"ddim": "worse"}


def test_what_unequal_floors_leave_in_doubt_is_no_change() -> None:
    small = {"mean": 0.10, "sd": 0.002, "low": 0.09, "high": 0.11, "replicates": 32}
    large = {**small, "mean": 0.01}
    a = row(value=0.30, values=[0.301, 0.299, 0.3, 0.3], floor=small)
    b = row(value=0.22, values=[0.221, 0.219, 0.22, 0.22], floor=large, n=4000, digest=digest(1))
    assert verdicts([a], [b]) == {"ddim": "same"}
    assert verdicts([a], [{**b, "value": 0.1, "values": [0.101, 0.099, 0.1, 0.1]}]) == {"ddim": "better"}


def test_sorted_from_the_worst_to_the_best() -> None:
    a = [row(name, value=0.2, digest=digest(0)) for name in "abcd"]
    b = [row(name, value=v, digest=digest(1)) for name, v in zip("abcd", (0.4, 0.05, None, 0.8), strict=True)]
    assert [c.a["solver"] for c in compared(a, b).changes] == ["c", "d", "a", "b"]


def test_cells_of_one_side_alone() -> None:
    both, gone, new = row("ddim"), row("heun"), row("euler")
    found = compared([both, gone, row("none", value=None)], [both, new])
    assert ([r["solver"] for r in found.missing], [r["solver"] for r in found.new]) == (["heun"], ["euler"])
    assert found.status == 1
    assert compared([both], [both, new]).status == 0


def test_configurations_that_differ() -> None:
    a = row(weights="aa", versions={"torch": "2.1", "numpy": "2"}, path="EDM()", stop=0.002)
    b = {**a, "weights": "bb", "versions": {"torch": "2.2", "numpy": "2"}, "n": 800, "seeds": [4, 5, 6, 7], "stop": 0.1}
    found = {entry["what"]: entry for entry in compared([a], [b]).configuration}
    assert set(found) == {"weights", "versions", "n", "seeds", "stop"}
    assert (found["versions"]["a"], found["versions"]["b"]) == ("torch 2.1", "torch 2.2")
    assert (found["seeds"]["a"], found["seeds"]["b"]) == ("0 1 2 3", "4 5 6 7")
    assert compared([a], [a]).configuration == []


# --- the command --------------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = [row("other", b, stop=0.1) for b in (4, 8)]
    evil = row("evil\x1b[2J", note="\u202e")
    before = [row("ddim", b) for b in (4, 8)] + [row("heun"), row("gone", 4), row("gone", 8), row("lost", value=0.1), evil]
    before += [{**r, "stop": 0.2} for r in other]
    after = [row("ddim", 4), row("ddim", 8, 0.5), row("heun", value=0.1), row("lost", value=None, note="it blew up"), evil]
    after += other
    a, b = written(tmp_path / "a", before, b"torn"), written(tmp_path / "b", [{**r, "seeds": [9, 8, 7, 6]} for r in after])
    assert command.main(["compare", str(a), str(b)]) == 1
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "different seeds: 0 1 2 3 -> 9 8 7 6 (blocks are not compared in pairs, so small changes stay unseen)" in lines
    at = lines.index("worse in B: 2")
    assert lines[at + 1] == "ring2 sliced_w2 lost karras NFE 8 0.100 -> - no value any more: it blew up"
    assert lines[at + 2].startswith("ring2 sliced_w2 ddim karras NFE 8 0.200 -> 0.500 +150 % p ")
    assert lines[lines.index("better in B: 1") + 1].startswith("ring2 sliced_w2 heun karras NFE 8 0.200 -> 0.100 -50 % p ")
    assert lines[lines.index("missing in B:") + 1] == "ring2 sliced_w2 gone karras NFE 4 8"
    assert lines[lines.index("incomparable:") + 1] == "ring2 sliced_w2 other karras NFE 4 8 stop 0.2 -> 0.1"
    assert "1 lines are damaged and left out" in said
    assert lines[-1] == "B against A: 2 worse, 2 missing, 2 incomparable; 5 cells compared."
    assert not any(c in said for c in "\x1b\u202e")
    assert command.main(["compare", str(a / "results.jsonl"), str(a)]) == 0
    assert "nothing is worse" in capsys.readouterr().out


def cost(solver: str, *quartiles: float, parts: int = 8) -> dict[str, Any]:
    spread = dict(zip(("low", "median", "high"), quartiles, strict=True))
    cell = {"model": "ring2", "solver": solver, "grid": "karras", "budget": 8}
    return {**cell, "parts": parts, "seconds_per_call": spread, "overhead": None, "device_seconds_per_call": "strange"}


def test_costs_are_a_side_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told where quartiles do not meet, whichever way; the status is that of the values alone."""
    before = [cost(s, 1.0, 2.0, 3.0) for s in ("slower", "faster", "meets", "gone")] + [cost("few", 1.0, 2.0, 3.0, parts=3)]
    after = [cost("slower", 3.5, 4.0, 4.5), cost("faster", 0.5, 0.5, 0.9), cost("meets", 2.9, 9.0, 9.0)]
    after += [cost("few", 8.0, 8.0, 8.0), cost("new", 8.0, 8.0, 8.0)]
    assert [(c.cell[1], c.what, c.a, c.b) for c in compare.costs(before, after)] == [
        ("slower", "seconds_per_call", 2.0, 4.0),
        ("faster", "seconds_per_call", 2.0, 0.5),
    ]
    folders = []
    for name, found in (("a", before), ("b", after)):
        folders.append(str(written(tmp_path / name, [row()])))
        (tmp_path / name / "costs.jsonl").write_bytes(b"".join(map(files.seal, found)))
        (tmp_path / name / "sweep.json").write_bytes(record.render({"n": 400, "lists": {key: [] for key in LISTS}}))
    assert command.main(["compare", *folders]) == 0
    said = capsys.readouterr().out
    assert "costs, no verdict: seconds a call 0.250 to 2.00 times as much in 2 cells, beyond their quartiles" in said
    assert command.main(["compare", *folders, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["costs"]
    assert told[0] == {
        "model": "ring2", "solver": "slower", "grid": "karras", "budget": 8, "what": "seconds_per_call", "a": 2.0, "b": 4.0
    }  # fmt: skip


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (
        written(tmp_path / name, [row(value=v), row("heun", value=w)]) for name, v, w in (("a", 0.2, 0.2), ("b", 0.9, None))
    )
    assert command.main(["compare", str(a), str(b), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["counts"], found["level"]) == (1, {"worse": 2}, 0.05)
    lost, worse = found["cells"]
    assert (lost["solver"], lost["size"], lost["p"], lost["b"]["value"]) == ("heun", None, None, None)
    assert (worse["solver"], worse["budget"], worse["verdict"], worse["a"]["value"]) == ("ddim", 8, "worse", 0.2)
    assert worse["size"] == pytest.approx(0.7 / 0.9)
    assert 0.0 < worse["p"] < 0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["A", "none"], "holds no results"),
        (["A", "A", "--level", "0"], "--level 0.0: must be a share, such as 0.05"),
        (["A", "A", "--level", "5"], "--level 5.0"),
        (["A", "A", "--least", "-1"], "--least -1.0"),
        (["A", "other"], "no cell is in both results (ring2 and rings)"),
        (["A", "foreign"], "no line of it is a row of results"),
    ],
)
def test_bad_requests(options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "A", [row()])
    written(tmp_path / "other", [row(model="rings")])
    written(tmp_path / "foreign", [], b"<html>\n")
    paths = [str(tmp_path / word) if word.isalpha() else word for word in options]
    assert command.main(["compare", *paths]) == 2
    said = capsys.readouterr().err
    assert said.startswith("benchmarks compare: ")
    assert words in said
    assert said.count("\n") == 1
