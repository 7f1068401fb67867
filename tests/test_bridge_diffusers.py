"""SolverScheduler as diffusers' loops use it, against diffusers' own schedulers with the same network, noise and lists.

Real pipelines are in ``test_bridge_pipelines.py``. diffusers' tables are float32, so 1e-5 is what can be asked.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rows import one_of_each_kind
from torch import Tensor

from scores import Score
from sde import Linear, Tabulated
from sde.errors import InputError, PathError
from solvers import SOLVERS, integrate
from solvers.bridges.replay import first_calls

diffusers = pytest.importorskip("diffusers")

from solvers.bridges.diffusers import SolverScheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BATCH, DIM = 4, 6
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, START = randn(DIM, DIM, seed=0), randn(BATCH, DIM, seed=1)


def network(x: Tensor, label: Any) -> Tensor:
    """Without structure, and different at every timestep."""
    return torch.tanh(x @ WEIGHT.to(x.dtype) / 2.0 + 0.003 * float(label)) + 0.3 * x


def loop(scheduler: Any, x: Tensor = START, begin: int = 0, generator: Any = None, **step: Any) -> Tensor:
    """A pipeline's loop, from an entry of ``timesteps`` on."""
    timesteps = scheduler.timesteps[begin:]
    if begin:
        scheduler.set_begin_index(begin)
    elif not isinstance(scheduler, FLOW):
        x = x * scheduler.init_noise_sigma
    if generator is not None:
        step["generator"] = generator
    for t in timesteps:
        seen = x if isinstance(scheduler, FLOW) else scheduler.scale_model_input(x, t)
        x = scheduler.step(network(seen, t), t, x, return_dict=False, **step)[0]
    return x


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    scale = float(theirs.abs().max())
    assert math.isfinite(scale)
    assert float((ours - theirs).abs().max()) <= tolerance * scale


def ours(theirs: Any, solver: str, **options: Any) -> Any:
    return SolverScheduler.from_config(theirs.config, solver=solver, **options)


# --- VP: the same picture as their own scheduler ------------------------------------------------------------------------

PREDICTIONS = ("epsilon", "v_prediction", "sample")
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
VE = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler")
#: (our solver, their class, its options); leading spacing gives Euler's family the unit initial noise that ours has.
SAME = [
    ("ddim", "DDIMScheduler", {**TRAILING, "clip_sample": False}),
    ("ddim", "DDIMScheduler", {**LEADING, "clip_sample": False}),
    ("edm_euler", "EulerDiscreteScheduler", LEADING),
    ("edm_euler", "EulerDiscreteScheduler", {**LEADING, "use_karras_sigmas": True}),
    ("edm_euler", "EulerDiscreteScheduler", {**LEADING, "use_exponential_sigmas": True}),
    ("edm_euler", "EulerDiscreteScheduler", {**LEADING, "use_beta_sigmas": True}),
    ("edm_euler", "EulerDiscreteScheduler", {**LEADING, "final_sigmas_type": "sigma_min"}),
    ("edm_heun", "HeunDiscreteScheduler", LEADING),
    ("edm_heun", "HeunDiscreteScheduler", {**LEADING, "use_karras_sigmas": True}),
    ("dpm_solver_2", "KDPM2DiscreteScheduler", LEADING),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", TRAILING),
    ("dpmpp_2m_lower_final", "DPMSolverMultistepScheduler", {**TRAILING, "final_sigmas_type": "sigma_min"}),
    ("unipc_2", "UniPCMultistepScheduler", TRAILING),
    ("unipc_3", "UniPCMultistepScheduler", {**TRAILING, "solver_order": 3}),
]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("solver", "name", "options"), SAME)
def test_parity(solver: str, name: str, options: dict[str, Any], prediction: str) -> None:
    options = {**STABLE, **options}
    if prediction == "sample" and name in ("KDPM2DiscreteScheduler", "HeunDiscreteScheduler"):
        pytest.skip("not implemented there")
    theirs = getattr(diffusers, name)(prediction_type=prediction, **options)
    mine = ours(theirs, solver)
    theirs.set_timesteps(10)
    mine.set_timesteps(10)
    wanted = theirs.timesteps.float()
    assert len(mine.timesteps) == len(wanted)
    assert float((mine.timesteps - wanted).abs().max()) < 0.05  # their float32 logarithms
    if name in VE:  # their state is x / alpha, at the start and at the end
        scale = float((1.0 + theirs.sigmas[0] ** 2) ** 0.5) / float(theirs.init_noise_sigma)
        picture = loop(theirs, START * scale) / float((1.0 + theirs.sigmas[-1] ** 2) ** 0.5)
    else:
        picture = loop(theirs)
    close(loop(mine), picture, 5e-5)


@pytest.mark.parametrize("options", [{"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}])
def test_initial_noise(options: dict[str, Any]) -> None:
    """Euler scales the noise by sigma_max, which in our coordinates is sigma_t < 1: the same picture from that noise."""
    theirs = diffusers.EulerDiscreteScheduler(**STABLE, **options)
    mine = ours(theirs, "edm_euler")
    theirs.set_timesteps(10)
    mine.set_timesteps(10)
    assert float(mine.init_noise_sigma) == 1.0
    sigma = float(theirs.init_noise_sigma)
    close(loop(mine, START * sigma / math.sqrt(1.0 + sigma**2)), loop(theirs))


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_parity_of_noise(spacing: str) -> None:
    """The same generator, the same picture: drawn in the order in which their own schedulers draw."""
    for name, solver, options in (
        ("DDPMScheduler", "ddpm", {"clip_sample": False}),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral", {"steps_offset": 1} if spacing == "leading" else {}),
        ("DPMSolverMultistepScheduler", "dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++"}),
    ):
        if spacing == "leading" and name.startswith("DPM"):
            continue  # another list of timesteps
        theirs = getattr(diffusers, name)(timestep_spacing=spacing, **STABLE, **options)
        mine = ours(theirs, solver)
        theirs.set_timesteps(10)
        mine.set_timesteps(10)
        start = START
        if name.startswith("Euler"):
            sigma = float(theirs.init_noise_sigma)
            start = START if spacing == "leading" else START * sigma / math.sqrt(1.0 + sigma**2)
        generator = torch.Generator().manual_seed(7)
        wanted = loop(theirs, generator=generator)
        close(loop(mine, start, generator=generator.manual_seed(7)), wanted)


@pytest.mark.parametrize(
    "options", [{"clip_sample": True, "clip_sample_range": 0.7}, {"thresholding": True, "sample_max_value": 1.5}]
)
def test_parity_of_clipping(options: dict[str, Any]) -> None:
    theirs = diffusers.DDPMScheduler(timestep_spacing="trailing", **{"clip_sample": False, **options})
    mine = ours(theirs, "ddpm", clip_sample=options.get("clip_sample", False))
    theirs.set_timesteps(8)
    mine.set_timesteps(8)
    x = START.reshape(BATCH, DIM, 1, 1).repeat(1, 1, 2, 2)
    generator = torch.Generator()
    out = []
    for scheduler in (theirs, mine):
        generator.manual_seed(3)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(torch.tanh(1.5 * y + 0.001 * float(t)), t, y, generator=generator).prev_sample
        out.append(y)
    close(out[1], out[0])
    unclipped = ours(theirs, "ddpm", clip_sample=False, thresholding=False)
    unclipped.set_timesteps(8)
    y = x
    generator.manual_seed(3)
    for t in unclipped.timesteps:
        y = unclipped.step(torch.tanh(1.5 * y + 0.001 * float(t)), t, y, generator=generator).prev_sample
    assert float((y - out[0]).abs().max()) > 0.1


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained", "exp", "zero snr"])
def test_tables(betas: str) -> None:
    """Their alphas_cumprod, to float32's digits."""
    if betas == "trained":
        options: dict[str, Any] = {"trained_betas": np.linspace(1e-3, 0.03, 200).tolist(), "num_train_timesteps": 200}
    elif betas == "zero snr":
        options = {**STABLE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    else:
        options = {"beta_schedule": betas, "beta_start": 0.0005, "beta_end": 0.017, "num_train_timesteps": 500}
    cls = diffusers.HeunDiscreteScheduler if betas == "exp" else diffusers.DDPMScheduler
    theirs = cls(**options)
    mine = ours(theirs, "ddim")
    close(mine.alphas_cumprod, theirs.alphas_cumprod, 2e-5)
    close(mine.betas, theirs.betas, 1e-4)
    close(mine.alphas, theirs.alphas)
    assert len(mine) == len(theirs) if betas != "exp" else len(mine) == 500


def test_zero_terminal_snr() -> None:
    """alpha = 0 at the start: a v network does it, an eps network is told why not."""
    theirs = diffusers.DDIMScheduler(
        **STABLE, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )
    mine = ours(theirs, "ddim")
    theirs.set_timesteps(10)
    mine.set_timesteps(10)
    close(loop(mine), loop(theirs))
    assert float(mine.sigmas[0]) == math.inf
    with pytest.raises(PathError, match="eps-prediction is undefined at alpha = 0"):
        ours(theirs, "ddim", prediction_type="epsilon").set_timesteps(10)
    with pytest.raises(InputError, match="finite first sigma"):
        ours(theirs, "ddim", use_karras_sigmas=True).set_timesteps(10)
    labels = torch.tensor([999.0, 998.25, 998.0, 500.0])
    alpha, sigma = mine._kind.levels(labels)
    knots = mine._kind.path.knots(mine._kind.times(labels.tolist()))
    close(alpha, torch.tensor([k.alpha for k in knots], dtype=torch.float64), 1e-12)
    close(sigma, torch.tensor([k.sigma for k in knots], dtype=torch.float64), 1e-12)
    assert mine._kind.labels(knots) == pytest.approx(labels.tolist(), abs=1e-6)


def test_stable_video_diffusion() -> None:
    """Continuous timesteps log(sigma)/4 on Karras's sigmas from 700."""
    theirs = diffusers.EulerDiscreteScheduler(
        **STABLE,
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
    )
    mine = ours(theirs, "edm_euler")
    theirs.set_timesteps(9)
    mine.set_timesteps(9)
    close(mine.timesteps, theirs.timesteps)
    close(loop(mine), loop(theirs), 2e-5)
    mine = ours(theirs, "dpmpp_2m", use_karras_sigmas=False, grid="log_snr")
    mine.set_timesteps(9)
    close(mine.sigmas[:1], torch.tensor([700.0]))
    for options, message in (
        ({"use_karras_sigmas": False}, "needs sigma_min, sigma_max and use_karras"),
        ({"final_sigmas_type": "sigma_min"}, "no table to end in"),
    ):
        with pytest.raises(InputError, match=message):
            ours(theirs, "edm_euler", **options)


# --- flows --------------------------------------------------------------------------------------------------------------

SHIFTS: list[tuple[dict[str, Any], float | None]] = [
    ({}, None),
    ({"shift": 3.0}, None),
    ({"use_dynamic_shifting": True}, 0.8),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.7),
    ({"shift": 2.0, "shift_terminal": 0.1}, None),
    ({"shift": 2.0, "use_karras_sigmas": True}, None),
    ({"shift": 2.0, "use_exponential_sigmas": True}, None),
    ({"shift": 2.0, "use_beta_sigmas": True}, None),
]


@pytest.mark.parametrize("given", ["steps", "sigmas", "timesteps"])
@pytest.mark.parametrize(("options", "mu"), SHIFTS)
def test_flow_parity(options: dict[str, Any], mu: float | None, given: str) -> None:
    theirs = FLOW(**options)
    mine = ours(theirs, "euler")
    arguments: dict[str, Any] = {
        "steps": {"num_inference_steps": 7},
        "sigmas": {"sigmas": np.linspace(1.0, 1.0 / 7.0, 7)},
        "timesteps": {"timesteps": [950.0, 700.0, 300.0, 40.0]},
    }[given]
    theirs.set_timesteps(**arguments, mu=mu)
    mine.set_timesteps(**arguments, mu=mu)
    close(mine.sigmas, theirs.sigmas, 1e-6)
    close(mine.timesteps, theirs.sigmas[:-1] * 1000.0, 1e-6)
    if given != "timesteps":  # theirs would give the network the timesteps before the shift
        close(loop(mine), loop(theirs))


def test_one_step_of_a_flow() -> None:
    """The first sigma is the last: there is nothing to stretch."""
    mine = SolverScheduler(solver="euler", prediction_type="flow_prediction", shift_terminal=0.1)
    mine.set_timesteps(1)
    assert mine.sigmas.tolist() == [1.0, 0.0]
    close(loop(mine), START - network(START, 1000.0))


def test_flow_parity_of_multistep_classes() -> None:
    """use_flow_sigmas and flow_shift of DPMSolverMultistep (Sana) and UniPC (Wan)."""
    theirs = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    mine = ours(theirs, "dpmpp_2m")
    theirs.set_timesteps(8)
    mine.set_timesteps(8)
    close(mine.sigmas, theirs.sigmas, 1e-6)
    close(mine.timesteps.long(), theirs.timesteps, 2e-3)

    # theirs hands over whole timesteps, so the network must not look at fractions
    class Whole:
        def __init__(self, scheduler: Any) -> None:
            self.scheduler, self.init_noise_sigma = scheduler, 1.0
            self.timesteps = theirs.timesteps

    x, y = START, START
    for t, u in zip(theirs.timesteps, mine.timesteps, strict=True):
        x = theirs.step(network(x, t), t, x).prev_sample
        y = mine.step(network(y, t), u, y).prev_sample
    close(y, x)


def test_the_grids_of_ours() -> None:
    """Any name of GRIDS, on both kinds of path; a pipeline's default list gives way, a user's does not."""
    mine = SolverScheduler(solver="dpmpp_2m", grid="cosine", **STABLE)
    mine.set_timesteps(6)
    path = Tabulated.scaled_linear()
    from solvers import GRIDS

    times = GRIDS["cosine"](path, 6, None, 0.0)
    close(mine.sigmas[:-1].double(), (path.sigma(times) / path.alpha(times))[:-1], 1e-6)
    assert float(mine.sigmas[-1]) == 0.0
    mine = SolverScheduler(solver="dpmpp_2m", grid="cosine", prediction_type="flow_prediction", shift=2.0)
    for arguments in ({"num_inference_steps": 5}, {"sigmas": np.linspace(1.0, 0.2, 5)}):
        mine.set_timesteps(**arguments)
        t = GRIDS["cosine"](Linear(), 5, None, 0.0)
        close(mine.sigmas.double(), 2.0 * t / (1.0 + t), 1e-6)
    with pytest.raises(InputError, match="grid='cosine' and a list of sigmas"):
        mine.set_timesteps(sigmas=[0.9, 0.5, 0.1])
    with pytest.raises(InputError, match="grid='cosine' and a list of timesteps"):
        SolverScheduler(grid="cosine").set_timesteps(timesteps=[900, 300])


# --- what a step is handed and returns ------------------------------------------------------------------------------------


def test_lists_of_sigmas_and_timesteps() -> None:
    theirs = diffusers.EulerDiscreteScheduler(**STABLE, timestep_spacing="leading")
    mine = ours(theirs, "edm_euler")
    sigmas = [10.0, 4.0, 1.5, 0.4, 0.05, 0.0]
    theirs.set_timesteps(sigmas=sigmas)
    for given in (sigmas, sigmas[:-1], np.array(sigmas), torch.tensor(sigmas)):
        mine.set_timesteps(sigmas=given)
        close(mine.timesteps, theirs.timesteps, 1e-4)
        close(mine.sigmas, theirs.sigmas, 1e-6)
    scale = math.sqrt(101.0)
    close(loop(mine, START * 10.0 / scale), loop(theirs, START * 10.0 / float(theirs.init_noise_sigma)), 5e-5)
    theirs = diffusers.DDIMScheduler(**STABLE, clip_sample=False)
    mine = ours(theirs, "ddim")
    for labels in ([999, 700, 333, 0], [999.0, 700.5, 12.25]):
        mine.set_timesteps(timesteps=labels)
        assert mine.timesteps.tolist() == pytest.approx(labels, abs=1e-4)
        assert mine.num_inference_steps == len(labels)


def test_pred_original_sample() -> None:
    """E[x0] at every call, of every kind of output."""
    for prediction in PREDICTIONS:
        theirs = diffusers.DDIMScheduler(**STABLE, clip_sample=False, timestep_spacing="trailing", prediction_type=prediction)
        mine = ours(theirs, "ddim")
        theirs.set_timesteps(5)
        mine.set_timesteps(5)
        x = START
        for t in theirs.timesteps:
            y = network(x, t)
            a, b = theirs.step(y, t, x), mine.step(y, t, x)
            close(b.pred_original_sample, a.pred_original_sample)
            close(b[0], a.prev_sample)
            x = a.prev_sample
    mine = SolverScheduler(prediction_type="flow_prediction")
    mine.set_timesteps(2)
    out = mine.step(network(START, 1000.0), mine.timesteps[0], START)
    close(out.pred_original_sample, START - network(START, 1000.0))


def started(scheduler: Any, begin: int) -> Tensor | str:
    """The picture of a run from this entry on, or why there is none."""
    torch.manual_seed(11)
    scheduler.set_timesteps(5)
    try:
        return loop(scheduler, START, begin)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_any_sampler_from_any_step(kind: str) -> None:
    """Image-to-image: sliced as pipelines slice, every sampler is itself on the grid that is left, or says why it cannot."""
    path = Tabulated.scaled_linear() if kind == "vp" else Linear()
    options: dict[str, Any] = STABLE if kind == "vp" else {"prediction_type": "flow_prediction"}
    predicts = "eps" if kind == "vp" else "velocity"
    score = Score(
        lambda x, t: network(x, t[0]), path, predicts, label=lambda t: (1000.0 * t - float(kind == "vp")).clamp(min=0.0)
    )
    torch.manual_seed(11)
    seed = int(torch.randint(0, (1 << 63) - 1, ()))
    refused, whole = {}, 0
    for name in one_of_each_kind():
        if not SOLVERS[name].solver.linear:
            continue
        mine = SolverScheduler(solver=name, noise="white", **options)
        try:
            mine.set_timesteps(5)
        except (InputError, PathError) as error:
            refused[name] = str(error)
            continue
        plan = mine._plan
        firsts = first_calls(plan)
        for begin in (0, 2 * mine.order):
            if begin >= len(mine.timesteps):
                continue  # 'restart', whose steps differ much in cost
            out = started(mine, begin)
            if isinstance(out, str):
                assert begin > 0
                uneven = (np.diff(firsts) != mine.order).any() or "graded" in name or "churn" in str(SOLVERS[name].solver)
                assert uneven, out
                assert any(part in out for part in ("inside a step", "begins with other", "draws noise before"))
                continue
            times = plan.times[firsts.index(begin) :]
            close(out, integrate(name, score, START, times, seed=seed).x, 2e-4)
            assert mine.step_index == len(mine.timesteps)
            whole += begin > 0
    assert whole > (35 if kind == "vp" else 15)
    # alpha = 0 at the start, sigma' infinite at the end: methods that have no step there
    if kind == "vp":
        assert set(refused) == {"reversible_heun", "annealed_langevin"}
    else:
        assert all("alpha" in message or "infinite at t = 1" in message for message in refused.values())
        assert all("sigmas that begin below 1" in message for message in refused.values() if "(1)" in message)
        assert not set(refused) & {"dpmpp_2m", "unipc_6", "rk4", "heun", "ddpm", "dpmpp_2m_sde", "euler_ancestral"}


def test_begin_without_an_index() -> None:
    """Loops that slice timesteps but never call set_begin_index: the first timestep says where it is, the first of a step."""
    for solver in ("edm_heun", "dpmpp_2m"):
        mine = SolverScheduler(solver=solver, **STABLE)
        mine.set_timesteps(6)
        begin = 2 * mine.order
        wanted = loop(mine, START, begin)
        mine.set_timesteps(6)
        x = START
        for t in mine.timesteps[begin:]:
            x = mine.step(network(x, t), t, x).prev_sample
        assert torch.equal(x, wanted)
        mine.set_timesteps(6)
        with pytest.raises(InputError, match="timestep=123 begins no step"):
            mine.step(START, 123, START)


def test_indices() -> None:
    mine = SolverScheduler(solver="edm_heun", **STABLE)
    assert (mine.step_index, mine.begin_index, mine.order, len(mine)) == (None, None, 2, 1000)
    mine.set_timesteps(4)
    assert len(mine.timesteps) == 7
    assert mine.timesteps[1] == mine.timesteps[2]
    assert len(mine.sigmas) == 8
    mine.set_begin_index(2)
    assert mine.begin_index == 2
    mine.step(START, mine.timesteps[2], START)
    assert mine.step_index == 3
    mine.set_timesteps(4)
    assert (mine.step_index, mine.begin_index) == (None, None)
    assert mine.timesteps.dtype == torch.float32
    mine.set_begin_index(3)
    with pytest.raises(InputError, match="inside a step of 'edm_heun', whose steps begin at entries"):
        mine.step(START, mine.timesteps[3], START)


def test_steps_out_of_order() -> None:
    mine = SolverScheduler(solver="ddim", **STABLE)
    with pytest.raises(InputError, match="set_timesteps"):
        mine.step(START, 999, START)
    mine.set_timesteps(3)
    loop(mine)
    with pytest.raises(InputError, match="all 3 network calls are done"):
        mine.step(START, mine.timesteps[-1], START)
    mine.set_timesteps(3)
    mine.step(START, mine.timesteps[0], START)
    with pytest.raises(InputError, match="timestep=1, but entry 1 of timesteps is 666"):
        mine.step(START, 1, START)  # an index instead of a timestep
    mine.step(START, mine.timesteps[1].to(torch.bfloat16), START)  # cast by a pipeline: still recognised
    mine.set_timesteps(3)
    mine.step(START, mine.timesteps[:1].repeat(BATCH), START)  # one a sample


def test_a_changed_sample_is_gone_on_from() -> None:
    """Inpainting: half of the state is overwritten between the calls; theirs and ours agree."""
    for name, solver in (("EulerDiscreteScheduler", "edm_euler"), ("HeunDiscreteScheduler", "edm_heun")):
        theirs = getattr(diffusers, name)(**STABLE, **LEADING)
        mine = ours(theirs, solver)
        theirs.set_timesteps(6)
        mine.set_timesteps(6)
        out = []
        for scheduler in (theirs, mine):
            x = START * scheduler.init_noise_sigma
            for i, t in enumerate(scheduler.timesteps):
                x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
                if i < len(scheduler.timesteps) - 1:
                    known = scheduler.add_noise(0.5 * START, START.flip(0), scheduler.timesteps[i + 1 : i + 2])
                    x = torch.cat([known[:, :3], x[:, 3:]], 1)
            out.append(x)
        close(out[1], out[0])


def test_half_precision() -> None:
    """The state is kept in float32: the run ends on the float32 run's numbers, rounded once; changed entries count."""
    mine = SolverScheduler(solver="dpmpp_2m", **STABLE, timestep_spacing="trailing")

    def run(dtype: torch.dtype, change: bool = False, keep: bool = True) -> Tensor:
        mine.set_timesteps(20)
        x = START.half().to(dtype)
        for i, t in enumerate(mine.timesteps):
            y = torch.full_like(x, 0.25 + 0.01 * i)  # the same in both precisions
            x = mine.step(y.half().to(dtype), t, x).prev_sample
            assert x.dtype == dtype
            if not keep:
                x = (x + 1.0) - 1.0
            if change and i == 10:
                x = x.clone()
                x[0] = 0.5
        return x

    assert torch.equal(run(torch.float16), run(torch.float32).half())
    changed = run(torch.float16, change=True)
    assert torch.equal(changed[1:], run(torch.float16)[1:])
    assert torch.equal(changed, run(torch.float32, change=True).half())
    mine.set_timesteps(2)
    half = mine.step(START.half(), mine.timesteps[0], START.half())
    assert half.pred_original_sample.dtype == torch.float16
    mine.set_timesteps(2)
    assert mine.step(START.half(), mine.timesteps[0], START.float()).prev_sample.dtype == torch.float32
    mine.set_timesteps(2)
    assert mine.step(START.double(), mine.timesteps[0], START.double()).prev_sample.dtype == torch.float64


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun"])
def test_nothing_waits_for_a_device(kind: str, solver: str) -> None:
    """On the meta device, which has no values to read: a loop that sets the begin index, as pipelines do, asks for none."""
    mine = SolverScheduler(solver=solver, **(STABLE if kind == "vp" else {"prediction_type": "flow_prediction"}))
    x = START.to("meta")
    for begin in (0, mine.order):
        mine.set_timesteps(4, device="meta")
        mine.set_begin_index(begin)
        y = mine.add_noise(x, x, mine.timesteps[begin : begin + 1].repeat(BATCH))
        for t in mine.timesteps[begin:]:
            y = mine.step(0.5 * mine.scale_model_input(y, t), t, y).prev_sample
        assert (y.device.type, y.shape) == ("meta", x.shape)
        assert mine.timesteps.device.type == "meta"
        assert mine.sigmas.device.type == "cpu"


def test_learned_variance_is_cut_off() -> None:
    mine = SolverScheduler(solver="ddim", **STABLE)
    mine.set_timesteps(3)
    x = START.reshape(BATCH, DIM, 1, 1)
    y = network(START, 999).reshape(BATCH, DIM, 1, 1)
    a = mine.step(torch.cat([y, 100.0 + y], 1), mine.timesteps[0], x).prev_sample
    mine.set_timesteps(3)
    assert torch.equal(a, mine.step(y, mine.timesteps[0], x).prev_sample)
    with pytest.raises(InputError, match="model_output is"):
        mine.step(y[:, :2], mine.timesteps[1], x)


def test_gradients_pass_through_a_step() -> None:
    mine = SolverScheduler(solver="edm_heun", **STABLE)
    mine.set_timesteps(3)
    x = START.clone().requires_grad_()
    y = x
    for t in mine.timesteps:
        y = mine.step(network(y, t), t, y).prev_sample
    (slope,) = torch.autograd.grad(y.square().sum(), x)
    bumped = START.double()
    bumped[0, 0] += 1e-5
    base = [loop_double(mine, s) for s in (START.double(), bumped)]
    difference = float((base[1].square().sum() - base[0].square().sum()) / 1e-5)
    assert float(slope[0, 0]) == pytest.approx(difference, rel=1e-3)


def loop_double(scheduler: Any, x: Tensor) -> Tensor:
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


# --- noise --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["generator", "white", "brownian"])
def test_generators(noise: str) -> None:
    """The same generator, the same picture; with a list of generators, or our streams, samples know no batch mates."""
    mine = SolverScheduler(solver="ddpm", noise=noise, **STABLE)

    def run(generator: Any, x: Tensor = START) -> Tensor:
        mine.set_timesteps(6)
        return loop(mine, x, generator=generator)

    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(s) for s in seeds]

    first = run(seeded(5)[0])
    assert torch.equal(first, run(seeded(5)[0]))
    assert not torch.equal(first, run(seeded(6)[0]))
    generator = seeded(5)[0]
    assert torch.equal(first, run(generator))
    assert not torch.equal(first, run(generator))  # a generator goes on
    many = run(seeded(1, 2, 3, 4))
    swapped = run(seeded(3, 1), START[[2, 0]])
    close(swapped, many[[2, 0]], 1e-6)
    alone = run(seeded(5)[0], START[:2])
    assert torch.allclose(alone, first[:2], atol=1e-5) == (noise != "generator")
    torch.manual_seed(0)
    first = run(None)
    torch.manual_seed(0)
    assert torch.equal(first, run(None))
    assert not torch.equal(first, run(None))
    if noise != "generator":
        with pytest.raises(InputError, match="a list of 2 for 4 samples"):
            run(seeded(1, 2))


# --- noise added by pipelines ---------------------------------------------------------------------------------------------


def test_add_noise_and_velocity() -> None:
    theirs = diffusers.DDPMScheduler(**STABLE)
    mine = ours(theirs, "ddim")
    x, z = START.reshape(BATCH, 2, 3), START.flip(0).reshape(BATCH, 2, 3)
    labels = torch.tensor([0, 10, 500, 999])
    close(mine.add_noise(x, z, labels), theirs.add_noise(x, z, labels), 1e-5)
    close(mine.get_velocity(x, z, labels), theirs.get_velocity(x, z, labels), 1e-5)
    assert mine.add_noise(x.half(), z.half(), labels).dtype == torch.float16
    close(mine.add_noise(x, z, 500), theirs.add_noise(x, z, torch.tensor([500] * 4)))
    euler = diffusers.EulerDiscreteScheduler(**STABLE, **TRAILING, use_karras_sigmas=True)
    mine = ours(euler, "edm_euler")
    euler.set_timesteps(7)
    mine.set_timesteps(7)
    for i in range(7):  # fractional timesteps; their state is x / alpha
        sigma = float(euler.sigmas[i])
        noised = euler.add_noise(x, z, euler.timesteps[i : i + 1].repeat(BATCH)) / math.sqrt(1.0 + sigma**2)
        close(mine.add_noise(x, z, mine.timesteps[i : i + 1]), noised, 1e-5)
    with pytest.raises(InputError, match=r"timesteps has shape \(3,\) for 4 samples"):
        mine.add_noise(x, z, labels[:3])


def test_scale_noise_of_flows() -> None:
    theirs = FLOW(shift=3.0)
    mine = ours(theirs, "heun")
    theirs.set_timesteps(6)
    mine.set_timesteps(6)
    x, z = START.reshape(BATCH, 2, 3), START.flip(0).reshape(BATCH, 2, 3)
    for i in range(6):
        t = theirs.timesteps[i : i + 1].repeat(BATCH)
        close(mine.scale_noise(x, mine.timesteps[2 * i : 2 * i + 1].repeat(BATCH), z), theirs.scale_noise(x, t, z), 1e-6)
    assert torch.equal(mine.get_velocity(x, z, mine.timesteps[:1]), z - x)
    with pytest.raises(InputError, match="noise is missing"):
        mine.scale_noise(x, mine.timesteps[:1])


def test_before_any_grid() -> None:
    """Training code looks at timesteps, sigmas and alphas_cumprod of a scheduler that was never told a number of steps."""
    theirs, mine = diffusers.EulerDiscreteScheduler(**STABLE), SolverScheduler(**STABLE)
    close(mine.timesteps, theirs.timesteps)
    close(mine.sigmas, theirs.sigmas[:-1], 1e-4)
    close(mine.alphas_cumprod, theirs.alphas_cumprod)
    theirs = FLOW(shift=3.0)
    mine = ours(theirs, "euler")
    close(mine.timesteps, theirs.timesteps, 1e-6)
    close(mine.sigmas, theirs.sigmas, 1e-6)


# --- configurations -------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    mine = SolverScheduler(
        solver="unipc_3", grid="karras", eta=None, noise="brownian", prediction_type="v_prediction", **STABLE
    )
    mine.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert stored["_class_name"] == "SolverScheduler"
    assert stored["solver"] == "unipc_3"
    again = SolverScheduler.from_pretrained(tmp_path)
    same = {k: v for k, v in mine.config.items() if not k.startswith("_")}
    assert same == {k: v for k, v in again.config.items() if not k.startswith("_")}
    mine.set_timesteps(5)
    again.set_timesteps(5)
    assert torch.equal(loop(mine), loop(again))
    back = diffusers.EulerDiscreteScheduler.from_config(mine.config)
    assert (back.config.beta_end, back.config.prediction_type) == (0.012, "v_prediction")
    assert SolverScheduler.from_config(back.config).config.prediction_type == "v_prediction"
    twin = copy.deepcopy(mine)
    twin.set_timesteps(5)
    mine.set_timesteps(5)
    assert torch.equal(loop(mine), loop(twin))
    module = importlib.import_module(SolverScheduler.__module__)
    assert getattr(module, SolverScheduler.__qualname__) is SolverScheduler  # where pickle and pipelines look for it


def test_defaults_of_other_classes_are_facts_about_the_network() -> None:
    """diffusers' from_config replaces another class's defaults by one's own: betas would change silently."""
    heun = diffusers.HeunDiscreteScheduler()
    assert ours(heun, "edm_heun").config.beta_end == heun.config.beta_end == 0.012
    lcm = diffusers.LCMScheduler()
    assert ours(lcm, "ddim").config.beta_schedule == "scaled_linear"
    assert ours(lcm, "ddim", beta_schedule="linear").config.beta_schedule == "linear"
    assert ours(diffusers.DDPMScheduler(), "ddpm").config.clip_sample is True
    assert ours(diffusers.DDPMScheduler(timestep_spacing="leading"), "ddpm").config.timestep_spacing == "leading"
    assert ours(diffusers.DDPMScheduler(), "ddpm").config.timestep_spacing == "trailing"  # a matter of taste: ours
    assert ours(FLOW(shift=2.0), "heun").config.prediction_type == "flow_prediction"
    assert ours(FLOW(), "heun").config.prediction_type == "flow_prediction"
    assert ours(diffusers.FlowMatchHeunDiscreteScheduler(), "heun").config.prediction_type == "flow_prediction"
    stored = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert SolverScheduler.from_config(stored).config.prediction_type == "flow_prediction"


FOREIGN = (
    "EDMEuler",
    "CosineDPMSolverMultistep",
    "CMStochasticIterative",
    "CogVideoXDDIM",
    "ScoreSdeVe",
    "DDPMWuerstchen",
    "IPNDM",
)


@pytest.mark.parametrize("name", [f"{name}Scheduler" for name in FOREIGN])
def test_foreign_conventions_are_refused(name: str) -> None:
    """By what their configuration says, and by their name where it says nothing."""
    config = dict(getattr(diffusers, name)().config)
    with pytest.raises(InputError, match=f"config of {name}.*does not speak"):
        SolverScheduler.from_config({**config, "_class_name": name})
    if name != "IPNDMScheduler":
        with pytest.raises(InputError, match=r"config of a scheduler with .*does not speak"):
            SolverScheduler.from_config(config)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"solver": "dopri5"}, r"'dopri5' chooses its steps.*diffusers pipeline"),
    ({"solver": "pc_ddpm"}, "'pc_ddpm' has no table"),
    ({"solver": "dpmpp_2n"}, "did you mean"),
    ({"solver": SOLVERS["ddim"].solver}, "give a name of SOLVERS"),
    ({"grid": "karas"}, "did you mean 'karras'"),
    ({"grid": "karras", "use_karras_sigmas": True}, "each makes the noise levels"),
    ({"use_beta_sigmas": True, "use_karras_sigmas": True}, "each makes the noise levels"),
    ({"noise": "pink"}, "noise='pink'"),
    ({"prediction_type": "eps"}, "prediction_type='eps' is unknown: give one of 'epsilon'"),
    ({"beta_schedule": "quadratic"}, "beta_schedule='quadratic' is unknown"),
    ({"timestep_spacing": "even"}, "timestep_spacing='even' is unknown"),
    ({"final_sigmas_type": "one"}, "final_sigmas_type='one' is unknown"),
    ({"timestep_type": "whole"}, "timestep_type='whole' is unknown"),
    ({"time_shift_type": "quadratic"}, "time_shift_type='quadratic' is unknown"),
    ({"prediction_type": "flow_prediction", "invert_sigmas": True}, "invert_sigmas=True"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SolverScheduler(**options)


BAD_LISTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "num_inference_steps is missing"),
    ({}, {"num_inference_steps": 0}, "num_inference_steps=0: must be an int >= 1"),
    ({}, {"num_inference_steps": True}, "num_inference_steps=True"),
    ({}, {"num_inference_steps": 3, "timesteps": [9, 5]}, "timesteps has 2 entries"),
    ({}, {"sigmas": [3.0, 1.0], "timesteps": [9, 5]}, "both given"),
    ({}, {"timesteps": [5, 9]}, r"timesteps\[1\]=9 after 5"),
    ({}, {"sigmas": [5.0, 0.0, 0.0]}, r"sigmas\[1\]=0"),
    ({}, {"sigmas": [3.0, 1.0, -1.0]}, r"sigmas\[2\]=-1"),
    ({}, {"sigmas": [math.nan]}, "finite"),
    ({}, {"sigmas": "abc"}, "give a list of numbers"),
    ({}, {"sigmas": []}, "finite"),
    ({}, {"num_inference_steps": 3, "mu": 1.0}, "only flows are shifted"),
    ({"final_sigmas_type": "sigma_min"}, {"timesteps": [9, 0]}, "at or below the end"),
    ({"prediction_type": "flow_prediction", "use_dynamic_shifting": True}, {"num_inference_steps": 3}, "mu is missing"),
    ({"prediction_type": "flow_prediction"}, {"sigmas": [1.5, 0.5]}, "outside the domain"),
]


@pytest.mark.parametrize(("options", "arguments", "message"), BAD_LISTS)
def test_bad_lists(options: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SolverScheduler(solver="ddim" if not options.get("prediction_type") else "euler", **options).set_timesteps(**arguments)


def test_churn_after_image_to_image_is_refused() -> None:
    mine = SolverScheduler(solver="edm_sde", **STABLE)
    mine.set_timesteps(5)
    assert torch.isfinite(loop(mine)).all()
    mine.set_timesteps(5)
    with pytest.raises(InputError, match=r"'edm_sde' begins with other network calls|draws noise before"):
        loop(mine, START, 4)
    with pytest.raises(InputError, match="'edm_sde' draws noise before its first network call"):
        SolverScheduler(solver="edm_sde", **STABLE).set_timesteps(timesteps=[800, 400, 100])
