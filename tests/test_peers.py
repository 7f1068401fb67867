"""Lines of other libraries in a sweep: their names, what is said where one cannot be run, budgets, and one sweep of all."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from peering import gaussian, line_of, run, states
from sweeping import in_memory, quietly

from benchmarks import peers, store
from benchmarks.lines import Meter, resolve_line
from benchmarks.peers.base import Library, Sampler, importing
from benchmarks.peers.line import PeerLine
from benchmarks.sweep import Sweep
from scores import Score
from sde import VP
from sde.errors import InputError, NetworkError

# --- the whole: one sweep -----------------------------------------------------------------------------------------------------

SEVEN = (
    "diffusers/UniPC2:final_sigmas_type=sigma_min",
    "k_diffusion/dpmpp_2m:end=stop",
    "azula/zEAB3",
    "flow_matching/midpoint",
    "torchdiffeq/rk4",
    "torchsde/euler:eta=0",
    "torchode/dopri5:rtol=0.01,atol=0.01",
)


def test_at_least_six_libraries_are_lines_of_one_sweep_beside_ours():
    here = tuple(text for text in SEVEN if not peers.library(text.partition("/")[0]).missing())
    if len(here) < 6:
        pytest.skip(f"only {len(here)} libraries are installed")
    with in_memory() as folder:
        cells = {"model": ("tiny_models:quick",), "solver": ("dpmpp_2m", *here), "nfe": (60,), "n": 6, "blocks": 3}
        sweep = Sweep(**cells, metric=("strong_error",), out=folder)
        assert quietly(sweep) == 0
        rows = store.read(folder).rows
    found = {row["solver"]: row for row in rows}
    assert set(found) == {"dpmpp_2m", *here}
    for row in rows:
        assert row["value"] is not None, row
        assert row["nfe"] <= 60, row
    assert found["dpmpp_2m"]["value"] == pytest.approx(found["k_diffusion/dpmpp_2m:end=stop"]["value"], rel=1e-3)


def test_a_strong_error_is_that_of_where_a_sampler_ends(monkeypatch: pytest.MonkeyPatch):
    """It goes on to sigma = 0; against the end of ours, beside which it stands, most of its error would be that last step."""
    text, found = "k_diffusion/lms", {}
    line_of(text)
    with in_memory() as folder:
        for to_zero in (True, False):
            if not to_zero:
                monkeypatch.setattr(PeerLine, "to_zero", False)
            asked = Sweep(model=("gauss64:vp",), solver=("dpmpp_2m", text), nfe=(200,), n=6, blocks=3, dtype="float64")
            assert quietly(replace(asked, metric=("strong_error",), out=folder / str(to_zero))) == 0
            found[to_zero] = {row["solver"]: row["value"] for row in store.read(folder / str(to_zero)).rows}
    assert found[True]["dpmpp_2m"] == found[False]["dpmpp_2m"]
    assert found[True][text] < 0.1 * found[False][text]


# --- names, and libraries that are not there ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("k_difusion/euler", "no library .* did you mean 'k_diffusion'"),
        ("k_diffusion/dpmpp2m", "k_diffusion has no sampler 'dpmpp2m' here: did you mean 'dpmpp_2m'"),
        ("diffusers/", "has no sampler '' here: known: DDIM"),
        ("diffusers/UniPC3:final=zero", "'final=zero' is unknown, write option=value: .*final_sigmas_type"),
        ("diffusers/UniPC3:solver_type", "'solver_type' is unknown, write option=value"),
        ("diffusers/UniPC3:solver_type=bh3", "solver_type='bh3' is unknown: did you mean 'bh2' or 'bh1'"),
        ("azula/DDIM:eta=0.5,eta=0.6", "'eta' is given twice"),
        ("azula/DDIM:eta=x", "eta='x': give a value like 0.0"),
        ("azula/PC:corrections=1.5", "corrections='1.5': give a value like 1"),
        ("dpm_solver/multistep2:lower_order_final=1", "give a value like True"),
        ("azula/Heun:eta=1", "'eta=1' is unknown.*it has none"),
    ],
)
def test_a_wrong_name_is_told_with_the_nearest_right_ones(text, said):
    with pytest.raises(InputError, match=said) as error:
        peers.parse_line(text)
    assert "\n" not in str(error.value)


def test_names_of_the_library_itself_are_known_and_a_line_has_one_name():
    parse = peers.parse_line
    assert parse("diffusers/DDIMScheduler").name == "diffusers/DDIM"
    assert parse("k-diffusion/sample_dpmpp_2m").name == "k_diffusion/dpmpp_2m"
    assert parse("azula/zEAB3Sampler").name == "azula/zEAB3"
    line = parse("torchdiffeq/dopri5:rtol=1e-4,atol=0.01")
    assert line.name == parse(line.name).name == "torchdiffeq/dopri5:atol=0.01,rtol=0.0001"
    assert line.options == {"rtol": 1e-4, "atol": 0.01, "variable": "t"}
    assert parse("dpm_solver/multistep2:lower_order_final=FALSE").name == "dpm_solver/multistep2:lower_order_final=false"
    assert parse("azula/DDIM").joint  # a sweep may give it an eta


def test_a_grid_that_a_sampler_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(InputError, match="torchsde/euler does not run on the grid 'karras': it runs on uniform, log_snr"):
        run(line_of("torchsde/euler"), gaussian(), states(), grid="karras")
    with pytest.raises(InputError, match="does not run on the grid 'karas': did you mean 'karras'"):
        run(line_of("azula/Heun"), gaussian(), states(), grid="karas")


#: what is imported of a library, where it is not the library's own name
MODULES = {
    "k_diffusion": "k_diffusion.sampling",
    "azula": "azula.noise",
    "flow_matching": "flow_matching.solver",
    "dpm_solver": "dpm_solver_pytorch",
    "diff_sampler": "solver_utils",
    "edm": "generate",
}


@pytest.mark.parametrize("name", peers.LIBRARIES)
def test_a_library_that_is_not_there_is_one_line_with_the_command_that_installs_it(name, monkeypatch):
    found = peers.library(name)
    missing = MODULES.get(name, name)
    monkeypatch.setitem(sys.modules, missing, None)
    if name == "k_diffusion":
        monkeypatch.setattr("benchmarks.peers.k_diffusion._MODULE", [])
        monkeypatch.delitem(sys.modules, missing)
        monkeypatch.setattr("importlib.util.find_spec", lambda *a: None)
    with pytest.raises(InputError) as error:
        resolve_line(f"{name}/{next(iter(found.samplers))}")
    said = str(error.value)
    assert said.startswith(f"{name} needs ")
    assert "which is not installed: " in said
    assert found.install in said
    assert "\n" not in said
    assert found.missing() == said


def test_a_library_that_breaks_when_it_is_imported_is_told_from_one_that_is_not_there():
    def load():
        raise RuntimeError("operator torchvision::nms does not exist")

    broken = Library("broken", "torch", "pip install broken", load, "", {"a": Sampler(lambda module, task: task.x)})
    assert broken.missing() == (
        "broken is installed but does not import (RuntimeError: operator torchvision::nms does not exist): pip install broken"
    )


# --- around a loop: a library of our own --------------------------------------------------------------------------------------


def library(run, distribution="torch", **more) -> PeerLine:
    found = Library("mine", distribution, "pip install mine", importing("math"), "", {"a": Sampler(run, **more)})
    return PeerLine(found, "a")


def calling(count):
    """A loop of count(n) calls for n steps."""

    def loop(module, task):
        x = task.x
        for _ in range(count(task.n)):
            x = x - 1e-3 * task.network.eps(x, task.start.t)
        return x

    return loop


@pytest.mark.parametrize(
    ("count", "budget", "steps"),
    [
        (lambda n: n, 7, 7),
        (lambda n: 2 * n, 7, 3),
        (lambda n: 2 * n - 1, 7, 4),
        (lambda n: n + 1, 7, 6),
        (lambda n: 4 * n, 7, 1),
        (lambda n: 3 * n + 2, 5, 1),
    ],
)
def test_a_budget_buys_the_most_steps_whose_calls_it_pays(count, budget, steps):
    made, calls = run(library(calling(count)), gaussian(), states(), budget)
    assert (made.steps, calls) == (steps, count(steps))


def test_a_budget_below_one_step_is_refused_with_what_a_step_costs():
    with pytest.raises(InputError, match="nfe=3: mine/a: a run takes at least 5 network calls"):
        run(library(calling(lambda n: 5 * n)), gaussian(), states(), 3)
    with pytest.raises(InputError, match="at least 1 network call"):
        run(library(calling(lambda n: n)), gaussian(), states(), 0)
    meter, given = Meter(gaussian(), torch.device("cpu")), {"eta": None, "start": None, "stop": None}
    line = library(calling(lambda n: 5 * n))
    assert "at least 5 network calls" in (line.refuses(meter, nfe=3, grid="log_snr", **given) or "")
    assert "does not run on the grid" in (line.refuses(meter, nfe=5, grid="karas", **given) or "")
    assert line.refuses(meter, nfe=5, grid="log_snr", **given) is None


def test_a_budget_whose_best_step_count_gives_nan_is_refused():
    """Fewer steps would be another sampler than the one asked for. Counts that cost too much anyway do not matter."""

    def loop(calls, bad):
        def run(module, task):
            x = calling(lambda n: calls * n)(module, task)
            return x * torch.nan if task.n >= bad else x

        return library(run)

    with pytest.raises(InputError, match="mine/a gives NaN or infinity with 9 steps on log_snr, whatever the network"):
        run(loop(1, bad=9), gaussian(), states(), 9)
    assert run(loop(2, bad=5), gaussian(), states(), 8)[0].steps == 4


def test_an_error_of_a_library_names_the_line_and_an_error_of_the_network_stays_what_it_is():
    def broken(module, task):
        raise TypeError("unexpected keyword")

    with pytest.raises(InputError, match="mine/a raised TypeError: unexpected keyword with 5 steps on log_snr"):
        library(broken).loop(None, states(), VP(), VP().knot(1.0), VP().knot(1e-3), 5, "log_snr")

    def hiding(module, task):
        try:
            return calling(lambda n: n)(module, task)
        except Exception as error:
            raise ValueError("something went wrong") from error

    def network(x, t):
        raise ZeroDivisionError("network")

    with pytest.raises(NetworkError, match="ZeroDivisionError"):
        run(library(hiding), Score(network, VP(), predicts="eps"), states())


def test_a_loop_that_spends_more_than_was_counted_is_stopped_before_the_network():
    def loop(module, task):
        return calling(lambda n: n + 3 * (len(task.x) > 2))(module, task)  # counted on two samples

    with pytest.raises(InputError, match="mine/a wants more than 6 network calls: 6 of its steps cost more than counted"):
        run(library(loop), gaussian(), states(4), 6)


def test_versions_are_those_of_the_distribution_or_of_the_file(tmp_path):
    assert library(calling(lambda n: n)).version == f"mine {torch.__version__}"
    assert library(calling(lambda n: n), "no-such-thing").version == "mine from source"
    module = types.SimpleNamespace(__file__=str(tmp_path / "a.py"))
    (tmp_path / "a.py").write_text("x = 1")
    from benchmarks.peers.schedule import of_file

    first = of_file(module)
    other = types.SimpleNamespace(__file__=str(tmp_path / "b.py"))
    (tmp_path / "b.py").write_text("x = 2")
    assert first.startswith("file ")
    assert of_file(other) != first
