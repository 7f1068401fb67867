"""The doctor: what it says of this machine, and that its self-test finds what is planted."""

from __future__ import annotations

import time
from importlib import metadata

import pytest
import torch

from benchmarks import doctor, peers
from benchmarks.__main__ import main
from benchmarks.doctor import Doctor


def test_it_says_what_is_here_and_ends_with_a_verdict_within_five_seconds(capsys):
    began = time.process_time()
    assert main(["doctor"]) == 0
    assert time.process_time() - began < 5.0
    said = capsys.readouterr().out
    for word in (
        "python 3.",
        "cores ",
        f"torch threads {torch.get_num_threads()}",
        f"torch {torch.__version__}",
        "OMP_NUM_THREADS",
    ):
        assert word in said
    assert ("CUDA " if torch.cuda.is_available() else "no CUDA device") in said
    assert said.splitlines()[-1].startswith("verdict: well; 6 of 6 checks passed")
    assert said.count("  ok  ") == 6


def test_it_lists_the_libraries_that_are_here_with_their_versions_and_how_to_get_the_others(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "self_test", list)
    monkeypatch.setattr(peers, "LIBRARIES", {"torchdiffeq": "torchdiffeq", "edm": "edm"})
    assert doctor.run(Doctor(peers=True)) == 0
    said = capsys.readouterr().out
    assert f"torchdiffeq {metadata.version('torchdiffeq')}: {len(peers.library('torchdiffeq').samplers)} samplers" in said
    assert "edm 1 samplers" in said or "git clone https://github.com/NVlabs/edm" in said or "edm file" in said


def test_packages_are_those_the_project_declares_and_a_missing_one_comes_with_its_command(capsys, monkeypatch):
    declared = ["torch>=2.6", "no-such-need>=1", 'no_such.extra>=3; extra == "report"', 'ruff; extra == "dev"']
    monkeypatch.setattr(doctor, "self_test", list)
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    assert doctor.wanted() == {"": ("torch", "no-such-need"), "report": ("no_such.extra",)}
    assert doctor.run(Doctor()) == 1  # one that is needed is missing
    said = capsys.readouterr().out
    assert f"core: torch {torch.__version__}; missing no-such-need: pip install score-solvers" in said
    assert "report: nothing; missing no_such.extra: pip install 'score-solvers[report]'" in said
    assert "verdict: NOT WELL; missing: no-such-need." in said


def test_it_runs_from_a_folder_that_was_never_installed(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert doctor.wanted() == {"": doctor.CORE}
    assert all(doctor.version(name) for name in doctor.CORE)


def test_a_torchvision_of_another_torch_is_named(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.import_module", broken)
    assert any("torchvision does not import (RuntimeError: operator torchvision::nms" in line for line in doctor.packages())


# --- planted failures ---------------------------------------------------------------------------------------------------------


def failed(name: str) -> str:
    """What the check says; all others are well."""
    found = {check.name: check for check in doctor.self_test()}
    assert [check.name for check in found.values() if not check.good] == [name]
    return found[name].said


def test_a_wrong_word_of_the_generator_is_found(monkeypatch):
    counter, key, words = doctor.KNOWN_WORDS[1]
    monkeypatch.setattr(doctor, "KNOWN_WORDS", (doctor.KNOWN_WORDS[0], (counter, key, (words[0] ^ 1, *words[1:]))))
    assert failed("random words") == "1 of 2 published answers of Philox4x64-10"


@pytest.mark.parametrize("fault", ["scale", "shift", "batch"])
def test_noise_that_is_not_a_unit_normal_or_depends_on_its_batch_is_found(monkeypatch, fault):
    class Wrong(doctor.White):
        def initial(self, shape, dtype):
            x = super().initial(shape, dtype)
            return {"scale": 1.1 * x, "shift": x + 0.1, "batch": x.roll(len(x) // 4096, 0)}[fault]

    monkeypatch.setattr(doctor, "White", Wrong)
    found = {check.name: check for check in doctor.self_test()}
    assert not found["normals"].good


def test_a_wrong_table_is_found_by_its_exact_law(monkeypatch):
    trace = doctor.trace
    monkeypatch.setattr(doctor, "trace", lambda name, path, times: trace("heun", path, times))
    assert failed("exact law").startswith("W2 of ddim")


def test_a_sampler_of_another_order_is_found(monkeypatch):
    sample = doctor.sample

    def other(score, **given):
        return sample(score, **{**given, "solver": "ddim" if given["solver"] == "dpmpp_2m" else given["solver"]})

    monkeypatch.setattr(doctor, "sample", other)
    assert "slope 0.99" in failed("order")


def test_a_call_that_is_not_counted_is_found(monkeypatch):
    sample = doctor.sample

    class Less:
        def __init__(self, out):
            self.x, self.nfe = out.x, out.nfe - 1

    monkeypatch.setattr(doctor, "sample", lambda score, **given: Less(sample(score, **given)))
    assert failed("calls") == "heun with nfe=11: 10 calls, 9 reported"


def test_a_nan_that_passes_as_a_sample_is_found(monkeypatch):
    sample = doctor.sample

    def silent(score, **given):
        try:
            return sample(score, **given)
        except doctor.NetworkError:
            return None

    monkeypatch.setattr(doctor, "sample", silent)
    assert failed("NaN") == "a sample with NaN came back without an error"


def test_a_check_that_breaks_has_failed_and_the_verdict_says_so_with_status_1(capsys, monkeypatch):
    def broken(*args, **given):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(doctor, "exact_law", broken)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "FAIL exact law: ZeroDivisionError: planted" in said
    assert said.splitlines()[-1] == "verdict: NOT WELL; failed: exact law. Do not trust numbers of this machine."
