"""A sampler by name as a line of a sweep, and the meter at its network."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.lines import Meter, resolve_line
from scores import Gaussian, Score
from scores.guidance import classifier_free
from sde import VP, Linear
from sde.errors import InputError
from solvers import SOLVERS, sample
from solvers.catalogue import resolve

CPU = torch.device("cpu")
F64 = torch.float64


def gaussian(path=None) -> Gaussian:
    return Gaussian(path or VP(), torch.tensor([0.3, -1.0], dtype=F64), var=torch.tensor([0.25, 2.0], dtype=F64))


class Counted(torch.nn.Module):
    """A network that counts its calls, and the samples that went through it, by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.samples = 0

    def forward(self, x, t, label=None):
        self.calls += 1
        self.samples += len(x)
        return 0.5 * x if label is None else 0.5 * x + label.reshape(-1, 1)


def run(line, meter, x, **changed):
    given = {"nfe": 6, "grid": "log_snr", "seed": 0, "indices": range(len(x)), "eta": None, "start": None, "stop": None}
    return line.run(meter, x, **{**given, **changed})


# --- ours -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "grid"), [("ddim", "log_snr"), ("heun", "karras"), ("ddpm", "uniform"), ("unipc_3", "log_snr")]
)
def test_a_line_of_ours_is_sample_with_the_stream_of_its_indices(name, grid):
    """What a sweep makes of sample i is what ``sample`` makes of it with the same seed."""
    score = gaussian()
    x = torch.linspace(-1.0, 1.0, 8, dtype=F64).reshape(4, 2)
    meter = Meter(score, CPU)
    whole = sample(score, x=x, solver=name, nfe=7, grid=grid, seed=5)
    made = run(resolve_line(name), meter, x, nfe=7, grid=grid, seed=5)
    assert torch.equal(made.x, whole.x)
    assert (meter.nfe, made.steps) == (whole.nfe, len(whole.times) - 1)
    some = run(resolve_line(name), meter, x[[1, 3]], nfe=7, grid=grid, seed=5, indices=[1, 3])
    assert torch.allclose(some.x, whole.x[[1, 3]], rtol=1e-13, atol=1e-13)


def test_start_stop_and_eta_reach_the_sampler():
    score, x = gaussian(), torch.ones(2, 2, dtype=F64)
    made = run(resolve_line("gddim"), Meter(score, CPU), x, start=0.9, stop=0.1, eta=0.4, seed=3)
    wanted = sample(score, x=x, solver="gddim", nfe=6, start=0.9, stop=0.1, eta=0.4, seed=3)
    assert torch.equal(made.x, wanted.x)
    assert not torch.equal(made.x, sample(score, x=x, solver="gddim", nfe=6, start=0.9, stop=0.1, eta=0.5, seed=3).x)


def test_what_a_line_refuses_is_known_without_a_call():
    meter = Meter(gaussian(), CPU)
    given = {"nfe": 3, "grid": "log_snr", "eta": None, "start": None, "stop": None}
    for name, changed, why in (
        ("heun", {}, None),
        ("abm_4_started", {"nfe": 1}, "costs 3 network calls"),
        ("unipc_3", {"eta": 5.0}, "does not take a noise level"),
        ("ddim", {"start": 7.0}, "start"),
    ):
        found = resolve_line(name).refuses(meter, **{**given, **changed})
        assert (found is None) if why is None else why in (found or ""), (name, found)
    assert meter.nfe == 0


def test_names_are_resolved_as_sample_resolves_them():
    assert resolve_line("ddim").name == "ddim"
    assert resolve_line("k_diffusion:sample_dpmpp_2m").name == resolve("k_diffusion:sample_dpmpp_2m")[0] == "dpmpp_2m"
    with pytest.raises(InputError, match="dpmpp_2m"):
        resolve_line("dpmp_2m")
    with pytest.raises(InputError, match="torchsde"):
        resolve_line("torch_sde/euler")


def test_which_lines_follow_the_flow_and_which_depend_on_their_batch():
    assert resolve_line("unipc_3").flow(None)
    assert not resolve_line("ddpm").flow(None)
    assert not resolve_line("gddim").flow(0.5)
    assert resolve_line("gddim").flow(0.0)
    adaptive = [n for n, e in SOLVERS.items() if n.startswith(("torchdiffeq", "torchsde")) and e.solver.adaptive]
    assert adaptive
    assert all(resolve_line(name).joint for name in adaptive)
    assert not resolve_line("ddim").joint
    assert resolve_line("ddim").version == ""


# --- the meter --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "heun", "rk4", "unipc_2", "ddpm"])
def test_the_meter_counts_what_the_network_counts(name):
    network = Counted()
    meter = Meter(Score(network, VP(), predicts="eps"), CPU)
    x = torch.ones(3, 2)
    made = sample(meter, x=x, solver=name, nfe=9, seed=0)
    assert meter.nfe == network.calls == made.nfe <= 9
    assert meter.net_evals == made.net_evals
    assert meter.seconds > 0.0
    assert meter.device_seconds is None
    before = meter.nfe
    sample(meter, x=x, solver=name, nfe=9, seed=0)
    assert meter.nfe == 2 * before  # it goes on counting until it is told not to
    meter.reset()
    assert (meter.nfe, meter.net_evals, meter.seconds) == (0, 0, 0.0)


def test_guidance_is_one_call_of_twice_the_samples():
    network = Counted()
    score = classifier_free(Score(network, VP(), predicts="eps"), 3.0, unconditional={"label": 0.0})
    meter = Meter(score, CPU)
    out = sample(meter, x=torch.ones(3, 2), solver="ddim", nfe=4, conditions={"label": torch.ones(3)})
    assert (meter.nfe, meter.net_evals) == (out.nfe, out.net_evals)
    assert meter.net_evals * 3 == network.samples == 24


@pytest.mark.parametrize("path", [VP(), Linear()], ids=["vp", "linear"])
def test_whoever_asks_the_meter_gets_the_scores_answer_and_is_counted(path):
    score = gaussian(path)
    meter = Meter(score, CPU)
    x = torch.tensor([[0.1, 0.2], [-0.4, 1.0], [2.0, 0.0]], dtype=F64)
    for t in (0.5, torch.tensor(0.5), torch.tensor([0.1, 0.5, 0.9])):
        one, other = meter.predict(x, t), score.predict(x, t)
        assert torch.allclose(one.x0, other.x0, atol=1e-12)
        assert torch.allclose(one.eps, other.eps, atol=1e-12)
        assert torch.allclose(meter(x, t), score(x, t), atol=1e-10)
    assert meter.nfe == 6
    assert meter.predict(x.bfloat16(), 0.5).x0.dtype == torch.bfloat16


def test_what_the_meter_does_not_know_the_score_answers_and_it_can_be_copied():
    meter = Meter(Score(Counted(), VP(), predicts="eps"), CPU)
    assert meter.network is meter.score.network
    with pytest.raises(AttributeError, match="nowhere"):
        _ = meter.nowhere
    x = torch.ones(1, 2)
    assert torch.equal(copy.copy(meter).predict(x, 0.5).x0, meter.predict(x, 0.5).x0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_time_is_measured_by_events_and_lies_within_the_wall_time():
    import time

    device = torch.device("cuda")
    net = torch.nn.Linear(512, 512).to(device)
    meter = Meter(Score(lambda x, t: net(x), VP(), predicts="eps"), device)
    x = torch.randn(256, 512, device=device)
    with torch.no_grad():
        sample(meter, x=x, solver="ddim", nfe=4)
        meter.reset()
        torch.cuda.synchronize()
        began = time.perf_counter()
        sample(meter, x=x, solver="ddim", nfe=20)
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    assert meter.device_seconds is not None
    assert 0.0 < meter.device_seconds < wall
