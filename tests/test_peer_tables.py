"""``python -m benchmarks peers``: the tables of errors, laws, overhead and cost, beside published figures."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import peer_laws, peer_tables, peers
from benchmarks.__main__ import main
from benchmarks.peer_tables import Peers, errors
from benchmarks.peers import winners
from benchmarks.peers.line import PeerLine
from solvers import GRIDS, SOLVERS

pytestmark = pytest.mark.skipif(
    any(peers.library(name).missing() for name in ("k_diffusion", "azula")), reason="k_diffusion and azula are not installed"
)


@pytest.fixture
def few(monkeypatch):
    """Few lines; and a library that is not there."""
    monkeypatch.setattr(peer_tables, "OURS", (("dpmpp_2m", "log_snr"),))
    popular = (("k_diffusion/dpmpp_2m:end=stop", "log_snr"), ("azula/zEAB3", "karras"), ("azula/Heun", "log_snr"))
    monkeypatch.setattr(winners, "POPULAR", tuple(winners.Winner(*pair) for pair in popular))
    monkeypatch.setattr(winners, "PEER_WINNERS", {})
    loops = (("ddim", "log_snr"), ("k_diffusion/euler", "log_snr"), ("azula/Ito", "log_snr"), ("edm/edm", "karras"))
    monkeypatch.setattr(peer_tables, "LOOPS", loops)
    monkeypatch.setattr(peer_laws, "LINES", (("ddpm", "karras"), ("azula/DDPM", "karras"), ("edm/edm:S_churn=9", "karras")))
    monkeypatch.setattr(peers, "LIBRARIES", {name: name for name in ("k_diffusion", "azula", "edm")})
    monkeypatch.setitem(sys.modules, "generate", None)


def test_one_command_makes_all_tables_and_writes_them(few, capsys, tmp_path):
    page = tmp_path / "peers.md"
    small = ["--problems", "gauss64:vp", "--nfe", "1", "10", "-n", "64", "--shapes", "8x2", "--steps", "4", "--seconds", "0.02"]
    assert main(["peers", *small, "--output", str(page)]) == 0
    said, text = capsys.readouterr().out, page.read_text()
    tables = text.split("\n\n**")
    assert all(part in said for part in text.strip().split("\n\n"))
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert list(numbers) == ["error", "law", "overhead", "cost"]

    # errors: ours and theirs of one rule have one value; azula's is the published winner of its cell, [2.1e-3]
    by_line = {(row["line"], row["budget"]): row for row in numbers["error"]}
    ours, same, best = (by_line[name, 10] for name in ("dpmpp_2m", "k_diffusion/dpmpp_2m:end=stop", "azula/zEAB3"))
    assert same["rmse"] == pytest.approx(ours["rmse"], rel=1e-9)
    assert best["rmse"] == pytest.approx(2.1e-3, rel=0.05)
    assert best["nfe"] == 10
    assert 0.5 * best["rmse"] < best["median"] < best["rmse"]
    assert "| dpmpp_2m log_snr | " in tables[0]
    assert "| azula | - | " not in text  # one call buys a step of azula's
    assert "| azula/Heun log_snr | - | " in text  # and none of its Heun
    assert "- not measured: azula/Heun log_snr: nfe=1: azula/Heun: a run takes at least 2 network calls" in text
    assert f"; {best['rmse']:.1e} azula/zEAB3 karras [2.1e-03]" in text
    assert f"; {best['median']:.1e} azula/zEAB3 karras [2.0e-03]" in text
    for kind in ("rmse", "median"):
        assert f"| gauss64:vp | {by_line['dpmpp_2m', 1][kind]:.1e}; " in text
    assert f"| ours | {by_line['dpmpp_2m', 1]['rmse']:.1e} | {ours['rmse']:.1e} |" in text

    # laws: one rule, one law
    laws = {(row["line"], row["budget"]): row["w2"] for row in numbers["law"]}
    assert laws["azula/DDPM", 10] == pytest.approx(laws["ddpm", 10], rel=1e-9)
    assert f"| ddpm karras | {laws['ddpm', 1]:.1e} | {laws['ddpm', 10]:.1e} |" in text

    for row in numbers["overhead"]:
        assert row["steps"] == row["nfe"] == 4
    assert [row["line"] for row in numbers["overhead"]] == ["ddim", "k_diffusion/euler", "azula/Ito"]
    assert " 1.0x; " in next(line for line in text.splitlines() if line.startswith("| ddim log_snr | ") and "]" in line)
    assert all(row["nfe"] == 10 == row["net_evals"] for row in numbers["cost"])
    assert "\nnot here: edm needs 'generate', which is not installed: git clone" in said


def test_a_sampler_that_goes_on_to_zero_is_compared_with_the_truth_there(monkeypatch):
    pairs, refused = [("k_diffusion/lms", "log_snr")], set()
    (right,) = errors("gauss64:vp", pairs, [200], 16, refused)
    monkeypatch.setattr(PeerLine, "to_zero", False)
    (wrong,) = errors("gauss64:vp", pairs, [200], 16, refused)
    assert not refused
    assert right.rmse < 0.1 * wrong.rmse


def test_every_sampler_of_the_flow_can_be_asked_for(few):
    found = list(peer_tables.every(Peers(library=("azula",)), absent=["edm"]))
    assert {line.partition("/")[0] for line, _ in found} == {"azula"}
    assert ("azula/xEAB4", "karras") in found
    assert not any(line in ("azula/DDPM", "azula/Ito") for line, _ in found)
    pairs = peer_tables.candidates(Peers(library=("azula",), every=True), ["edm"])
    assert pairs == [*peer_tables.OURS, *found]
    pairs = peer_tables.candidates(Peers(library=("k-diffusion",)), ["edm"])
    assert [line for line, _ in pairs] == ["dpmpp_2m", "k_diffusion/dpmpp_2m:end=stop"]


def test_every_line_of_the_tables_is_one_that_exists():
    pairs = [*peer_tables.OURS, *peer_tables.LOOPS, *peer_laws.LINES, *winners.lines()]
    for line, grid in pairs:
        if "/" not in line:
            assert line in SOLVERS
            assert grid in GRIDS
        else:
            known = peers.parse_line(line).sampler.grids
            assert grid in (GRIDS if known is None else known), line
    assert len(winners.lines()) == len(set(winners.lines()))
    assert {len(row) for row in winners.PEER_WINNERS.values()} == {6}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--problems", "gauss64"], "--problems 'gauss64' is unknown: did you mean 'gauss64:v"),
        (["--library", "azulla"], "did you mean 'azula'"),
        (["--shapes", "4x"], "--shapes '4x': give the batch and the sample"),
        (["--shapes", "16"], "--shapes '16': give the batch"),
        (["--nfe", "0"], "must be >= 1"),
        (["-n", "1"], "-n >= 2"),
        (["--seconds", "0"], "--seconds > 0"),
    ],
)
def test_a_wrong_option_is_one_line(options, said, capsys):
    assert main(["peers", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
