"""Models and schedulers of diffusers as scores: every convention against closed forms, against diffusers' own conversions,
lists of times and whole loops, and every trap by name.

Backbones that decode their noise level from the timestep and answer with the exact Gaussian target are bound to the signatures
of the real classes. Everything they know of a convention is written here, from the pipelines, not taken from the adapter.
"""

import copy
import inspect
import itertools
import json
import logging
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scores.adapters import diffusers_schedules as schedules
from scores.adapters.diffusers import FAMILIES, Family, from_diffusers
from scores.adapters.diffusers_grids import published
from scores.adapters.diffusers_schedules import DEFAULTS, KEYS, SCHEDULERS, schedule
from sde import EDM, VE, Linear, Tabulated
from sde.errors import InputError, NetworkError, PathError, ToolkitWarning
from solvers import integrate, sample

diffusers = pytest.importorskip("diffusers")
logging.getLogger("diffusers").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers

N = 1000
PARITY = 2e-5  # relative, in float32, of a whole loop
SD = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
FM = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
MULTI = {**SD, "_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, N) ** 2
LOG_ALPHA = 0.5 * np.cumsum(np.log1p(-BETAS))
LAW = 0.4, 0.3  # mean and variance of the Gaussian data, each element


def truth(x, a, s, law=LAW):
    """(x0, eps, score) of the Gaussian at x = a x0 + s eps."""
    mean, var = law
    score = (a * mean - x) / (a * a * var + s * s)
    return mean - a * var * score, -s * score, score


def normals(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- how each model speaks --------------------------------------------------------------------------------------------


def entry(time):
    """alpha and sigma of Stable Diffusion's table at an index; log alpha is linear in between."""
    a = torch.from_numpy(np.exp(np.interp(time.double().numpy(), np.arange(N), LOG_ALPHA)))
    return a, (1.0 - a * a).sqrt()


def noise_level(of):
    """A flow: alpha = 1 - sigma, sigma = of(time)."""
    return lambda time: (1.0 - of(time.double()), of(time.double()))


THOUSAND, UNIT, REVERSED = (noise_level(f) for f in (lambda t: t / 1000.0, lambda t: t, lambda t: 1.0 - t))


@dataclass(frozen=True)
class Speaks:
    """What a backbone expects and answers: time -> (alpha, sigma), (x0, eps, alpha, sigma) -> output, sigma -> c_in."""

    decode: Any
    says: Any
    scheduler: dict
    x: str = "hidden_states"
    time: str = "timestep"
    doubled: bool = False
    scale: Any = None
    config: Any = None


def eps(x0, eps, a, s):
    return eps


def velocity(x0, eps, a, s):
    return eps - x0


def negated(x0, eps, a, s):
    return x0 - eps


def v(x0, eps, a, s):
    return a * eps - s * x0


FAMILY_ROWS = {
    "UNet2DModel": Speaks(entry, eps, SD, "sample", doubled=True),
    "UNet2DConditionModel": Speaks(entry, v, {**SD, "prediction_type": "v_prediction"}, "sample"),
    "UNet3DConditionModel": Speaks(entry, eps, SD, "sample"),
    "UNetMotionModel": Speaks(entry, eps, SD, "sample"),
    "DiTTransformer2DModel": Speaks(entry, eps, SD, doubled=True),
    "PixArtTransformer2DModel": Speaks(entry, eps, SD, doubled=True),
    "HunyuanDiT2DModel": Speaks(entry, v, {**SD, "prediction_type": "v_prediction"}, doubled=True),
    "LatteTransformer3DModel": Speaks(entry, eps, SD, doubled=True),
    "AllegroTransformer3DModel": Speaks(entry, eps, SD),
    "CogVideoXTransformer3DModel": Speaks(entry, v, {**SD, "prediction_type": "v_prediction"}),
    "CogView3PlusTransformer2DModel": Speaks(entry, v, {**SD, "prediction_type": "v_prediction"}),
    "StableAudioDiTModel": Speaks(entry, v, {**SD, "prediction_type": "v_prediction"}),
    "SD3Transformer2DModel": Speaks(THOUSAND, velocity, FM),
    "WanTransformer3DModel": Speaks(
        THOUSAND, velocity, {**MULTI, "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}
    ),
    "CogView4Transformer2DModel": Speaks(THOUSAND, velocity, FM),
    "LTXVideoTransformer3DModel": Speaks(THOUSAND, velocity, FM),
    "MochiTransformer3DModel": Speaks(noise_level(lambda t: 1.0 - t / 1000.0), negated, {**FM, "invert_sigmas": True}),
    "HunyuanVideoTransformer3DModel": Speaks(THOUSAND, velocity, FM),
    "HiDreamImageTransformer2DModel": Speaks(THOUSAND, negated, FM, time="timesteps"),
    "SanaTransformer2DModel": Speaks(
        noise_level(lambda t: t / 250.0),
        velocity,
        {**MULTI, "prediction_type": "flow_prediction"},
        doubled=True,
        config={"timestep_scale": 0.25},
    ),
    "FluxTransformer2DModel": Speaks(UNIT, velocity, FM),
    "Flux2Transformer2DModel": Speaks(UNIT, velocity, FM),
    "QwenImageTransformer2DModel": Speaks(UNIT, velocity, FM),
    "AuraFlowTransformer2DModel": Speaks(UNIT, velocity, FM),
    "ChromaTransformer2DModel": Speaks(UNIT, velocity, FM),
    "PRXTransformer2DModel": Speaks(UNIT, velocity, FM),
    "Lumina2Transformer2DModel": Speaks(REVERSED, negated, FM),
    "ZImageTransformer2DModel": Speaks(REVERSED, negated, FM, "x", "t"),
}


def ve_level(of):
    return lambda time: (torch.ones_like(time.double()), of(time.double()))


def edm_f(data, sign=1.0, low=0.0):
    """F of D = c_skip x + c_out F (Karras et al. 2022, table 1), with the consistency model's shift by sigma_min."""

    def says(x0, eps, a, s):
        skip = data**2 / ((s - low) ** 2 + data**2)
        out = sign * (s - low) * data / (s * s + data**2) ** 0.5
        return (x0 - skip * (a * x0 + s * eps)) / out

    return says


def c_in(data):
    return lambda s: (s * s + data * data) ** -0.5


EDM_TIME, EDM_CONFIG = ve_level(lambda t: torch.exp(4.0 * t)), {"_class_name": "EDMEulerScheduler"}
CONTINUOUS = {
    **SD,
    "_class_name": "EulerDiscreteScheduler",
    "timestep_type": "continuous",
    "prediction_type": "v_prediction",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
}
KIND_ROWS = {
    "epsilon": Speaks(entry, eps, SD),
    "v_prediction": Speaks(entry, v, {**SD, "prediction_type": "v_prediction"}),
    "sample": Speaks(entry, lambda x0, eps, a, s: x0, {**SD, "prediction_type": "sample"}),
    "EDM epsilon is F": Speaks(EDM_TIME, edm_f(0.5), EDM_CONFIG, scale=c_in(0.5)),
    "EDM v_prediction is -F": Speaks(
        EDM_TIME, edm_f(0.5, -1.0), {**EDM_CONFIG, "prediction_type": "v_prediction"}, scale=c_in(0.5)
    ),
    "EDM multistep": Speaks(
        EDM_TIME, edm_f(0.7), {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.7}, scale=c_in(0.7)
    ),
    "cosine": Speaks(
        ve_level(lambda t: torch.tan(0.5 * math.pi * t)),
        edm_f(1.0, -1.0),
        {"_class_name": "CosineDPMSolverMultistepScheduler"},
        scale=c_in(1.0),
    ),
    "consistency": Speaks(
        ve_level(lambda t: torch.exp(t / 250.0)),
        edm_f(0.5, low=0.002),
        {"_class_name": "CMStochasticIterativeScheduler", "clip_denoised": False},
        scale=c_in(0.5),
    ),
    "NCSN++": Speaks(
        ve_level(lambda t: t),
        lambda x0, eps, a, s: -eps / s,
        {"_class_name": "ScoreSdeVeScheduler"},
        config={"time_embedding_type": "fourier"},
    ),
    "continuous v": Speaks(EDM_TIME, edm_f(1.0, -1.0), CONTINUOUS, scale=c_in(1.0)),
    "flow by a multistep class": Speaks(THOUSAND, velocity, {**MULTI, "prediction_type": "flow_prediction"}),
    "eps on a flow": Speaks(THOUSAND, eps, {**MULTI, "prediction_type": "epsilon"}),
    "x0 on a flow": Speaks(THOUSAND, lambda x0, eps, a, s: x0, {**MULTI, "prediction_type": "sample"}),
}
KIND_ROWS = {k: Speaks(**{**vars(r), "x": "sample"}) for k, r in KIND_ROWS.items()}


def backbone(name, row, law=LAW):
    """A module named like the class, called like it, that answers with the exact target; it keeps what it was given."""
    real = inspect.signature(getattr(diffusers, name).forward)
    lists = name == "ZImageTransformer2DModel"

    def forward(self, *args, **kwargs):
        given = real.bind(self, *args, **kwargs).arguments
        x, time = given[row.x], given[row.time]
        x = torch.stack(x).squeeze(2) if lists else x
        assert isinstance(time, torch.Tensor)
        assert time.shape == x.shape[:1]
        self.seen = given
        a, s = (u.reshape(-1, 1, 1, 1) for u in row.decode(time))
        state = x.double() if row.scale is None else x.double() / row.scale(s)
        out = row.says(*truth(state, a, s, law)[:2], a, s).to(x.dtype)
        if row.doubled:
            out = torch.cat([out, 7.0 + out], 1)
        return SimpleNamespace(sample=list(out.unsqueeze(2).unbind(0)) if lists else out)

    forward.__signature__ = real
    made = type(name, (nn.Module,), {"forward": forward})()
    made.config = row.config or {}
    return made


def needed(name, row, batch):
    """What the class cannot be called without, one row a sample."""
    found = {}
    for key, p in inspect.signature(getattr(diffusers, name).forward).parameters.items():
        if key not in ("self", row.x, row.time) and p.default is p.empty:
            found[key] = torch.zeros(batch, 1)
    return found


def check(score, times, dtype, tolerance, conditions, law=LAW):
    path = score.path
    for t in times:
        a, s = (torch.as_tensor(fn(t), dtype=torch.float64) for fn in (path.alpha, path.sigma))
        a, s = (u.reshape(-1, 1, 1, 1) for u in (a, s))
        x = (a * (law[0] + law[1] ** 0.5 * normals(3, 3, 2, 2, 2).double()) + s * normals(4, 3, 2, 2, 2)).to(dtype)
        x0, noise, grad = truth(x.double(), a, s, law)
        pair = score.predict(x, t, **conditions)
        at = f"t={t}"
        ulp = 4.0 * torch.finfo(dtype).eps * x.abs()  # of the state: seen in x0 over alpha, in eps over sigma
        assert pair.x0.dtype is dtype
        assert ((pair.x0 - x0).abs() <= tolerance * x0.abs().max() + ulp / a).all(), at
        assert ((pair.eps - noise).abs() <= tolerance * noise.abs().max() + ulp / s).all(), at
        assert ((score(x, t, **conditions) - grad).abs() <= tolerance * grad.abs().max() + ulp / s**2).all(), at


def entries(*k):
    return [(i + 1) / N for i in k]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_exact_pair(name, dtype, tolerance):
    row = FAMILY_ROWS[name]
    score = from_diffusers(backbone(name, row), row.scheduler)
    on_table = row.decode is entry
    times = entries(0, 20, 500, 999) if on_table else [0.02, 0.3, 0.71, 0.98]
    several = torch.tensor(times[:3], dtype=torch.float64)
    check(score, [*times, several], dtype, tolerance, needed(name, row, 3))
    assert isinstance(score.path, Tabulated if on_table else Linear)


@given(
    name=st.sampled_from(sorted(FAMILIES)),
    share=st.floats(0.0, 1.0),
    mean=st.floats(-2.0, 2.0),
    var=st.floats(0.01, 4.0),
)
@settings(max_examples=60)
def test_any_gaussian_at_any_time(name, share, mean, var):
    """Between the entries of a table too, where log alpha is linear in the index and the label is not whole."""
    row = FAMILY_ROWS[name]
    score = from_diffusers(backbone(name, row, (mean, var)), row.scheduler)
    low, high = (1.0 / N, 1.0) if row.decode is entry else (0.01, 0.99)
    check(score, [low + share * (high - low)], torch.float64, 1e-9, needed(name, row, 3), (mean, var))


def test_every_family_has_a_row_here():
    assert set(FAMILY_ROWS) == set(FAMILIES)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KIND_ROWS)
def test_every_kind_of_scheduler_gives_the_exact_pair(kind, dtype, tolerance):
    row = KIND_ROWS[kind]
    score = from_diffusers(backbone("UNet2DModel", row), row.scheduler)
    times = {
        Tabulated: entries(0, 20, 500, 999),
        Linear: [0.02, 0.3, 0.98],
        EDM: [max(0.004, 2.0 * score.path.t_min), 0.5, 3.0, 0.9 * score.path.T],
        VE: [0.0, 0.2, 0.5, 0.9],
    }[type(score.path)]
    check(score, times, dtype, tolerance, {})


# --- against diffusers' own conversions -------------------------------------------------------------------------------


class constant:  # noqa: N801
    """A network that always says ``out``, and keeps what it was asked."""

    def __init__(self, out):
        self.out, self.seen = out, (torch.empty(0), torch.empty(0))

    def __call__(self, sample, timestep):
        self.seen = sample, timestep
        return self.out


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


OWN_STEPS = itertools.product(
    ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"],
    ["epsilon", "v_prediction", "sample"],
)


@pytest.mark.parametrize(("cls", "way"), [row for row in OWN_STEPS if row != ("EulerDiscreteScheduler", "sample")])
def test_x0_is_that_of_the_schedulers_own_step(cls, way):
    config = {k: value for k, value in SD.items() if k != "_class_name"} | {"prediction_type": way}
    config = config if cls != "EulerDiscreteScheduler" else {k: value for k, value in config.items() if k != "clip_sample"}
    theirs = getattr(diffusers, cls)(**config)
    theirs.set_timesteps(N)
    x, out = normals(1, 2, 3, 4, 4), normals(2, 2, 3, 4, 4)
    model = constant(out)
    score = from_diffusers(model, theirs, family="UNet2DModel")
    for k in (0, 400, 999) if cls.startswith("DD") else (400,):
        a = math.exp(LOG_ALPHA[k])
        state = x if cls.startswith("DD") else x / a
        step = copy.deepcopy(theirs)
        t = step.timesteps[(step.timesteps == k).nonzero()[0, 0]]
        given = step.scale_model_input(state, t)
        done = step.step(out, t, state, **({"generator": torch.Generator().manual_seed(0)} if cls == "DDPMScheduler" else {}))
        pair = score.predict(x, (k + 1) / N)
        seen, label = model.seen
        assert relative(pair.x0, done.pred_original_sample) < 1e-5
        assert relative(seen, given) < 1e-5
        assert torch.equal(label, torch.full((2,), float(k)))


@pytest.mark.parametrize("way", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cls", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"])
def test_edm_preconditioning_is_that_of_diffusers(cls, way):
    theirs = getattr(diffusers, cls)(prediction_type=way)
    x, out = normals(1, 2, 3), normals(2, 2, 3)
    model = constant(out)
    score = from_diffusers(model, theirs, family="UNet2DModel")
    for sigma in (0.5, 2.0, 60.0):
        pair = score.predict(x * sigma, sigma)
        seen, label = model.seen
        level = torch.tensor(sigma)
        assert relative(pair.x0, theirs.precondition_outputs(x * sigma, out, level)) < 1e-5
        assert relative(seen, theirs.precondition_inputs(x * sigma, level)) < 1e-6
        assert relative(label, theirs.precondition_noise(level).expand(2)) < 1e-6


def test_the_consistency_function_is_that_of_diffusers():
    theirs = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    theirs.set_timesteps(4)
    x, out = 80.0 * normals(1, 2, 3), normals(2, 2, 3)
    model = constant(out)
    score = from_diffusers(model, theirs, family="UNet2DModel")
    for i, t in enumerate(theirs.timesteps):
        given = theirs.scale_model_input(x, t)
        clean = copy.deepcopy(theirs)
        clean.sigmas = clean.sigmas.clone()
        clean.sigmas[i + 1] = 0.002  # no noise is added back then, and the step returns f
        pair = score.predict(x, float(theirs.sigmas[i]))
        seen, label = model.seen
        assert relative(pair.x0, clean.step(out, t, x, generator=torch.Generator().manual_seed(0)).prev_sample) < 1e-5
        assert relative(seen, given) < 1e-6
        assert relative(label, t.float().expand(2)) < 1e-6
        theirs._step_index += 1
    with pytest.raises(PathError):
        score.predict(x, 0.002)  # f(x, sigma_min) = x: the network says nothing there


def test_flow_prediction_of_a_multistep_class_is_that_of_diffusers():
    config = {k: value for k, value in MULTI.items() if k not in ("_class_name", "clip_sample")}
    x, out = normals(1, 2, 3), normals(2, 2, 3)
    for way in ("flow_prediction", "epsilon", "sample"):
        theirs = diffusers.DPMSolverMultistepScheduler(**config, prediction_type=way)
        theirs.set_timesteps(5)
        model = constant(out)
        score = from_diffusers(model, theirs, family="UNet2DModel")
        for i in range(5):
            theirs._step_index = i
            sigma = float(theirs.sigmas[i])
            pair = score.predict(x, sigma)
            assert relative(pair.x0, theirs.convert_model_output(out, sample=x)) < 1e-5
            assert relative(model.seen[1], torch.full((2,), 1000.0 * sigma)) < 1e-6


# --- tables and configurations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        ("DDPMScheduler", {}),
        ("DDPMScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
        ("DDPMScheduler", {"beta_schedule": "laplace"}),
        ("HeunDiscreteScheduler", {"beta_schedule": "exp"}),
        ("DDPMScheduler", {"trained_betas": [0.1, 0.2, 0.05], "num_train_timesteps": 3}),
        ("DDPMScheduler", {"num_train_timesteps": 50, "beta_end": 0.1}),
        ("CogVideoXDDIMScheduler", {}),
        ("CogVideoXDDIMScheduler", {"rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}),
        (
            "EulerDiscreteScheduler",
            {"rescale_betas_zero_snr": True, **{k: SD[k] for k in ("beta_start", "beta_end", "beta_schedule")}},
        ),
    ],
)
def test_every_table_is_that_of_diffusers(cls, config):
    theirs = getattr(diffusers, cls)(**config)
    path: Any = schedule(theirs).path
    ours, want = path.alphas_cumprod, theirs.alphas_cumprod.double()
    # theirs is a product of float32 numbers, and 1 - alpha^2 of it is rounded to an ulp of 1
    assert ((ours - want).abs() <= 1e-4 * want + 1e-12).all()
    assert (((1.0 - ours) - (1.0 - want)).abs() <= 1e-5 * (1.0 - want) + 1e-6).all()
    assert path == schedule(json.loads(theirs.to_json_string())).path == schedule(theirs.config).path or "zero" in str(config)


def test_zero_terminal_snr_has_three_ends():
    stable = {k: SD[k] for k in ("beta_start", "beta_end", "beta_schedule")} | {"rescale_betas_zero_snr": True}
    ddim, euler = (
        {**stable, "_class_name": f"{c}Scheduler", "prediction_type": "v_prediction", "clip_sample": False}
        for c in ("DDIM", "EulerDiscrete")
    )
    assert float(schedule(ddim).path.alpha(1.0)) == 0.0
    top = [float(torch.exp(-schedule(euler, terminal=end).path.lam(1.0))) for end in (None, 2.0**-24, 4.8973451890853435e-08)]
    assert top == pytest.approx([4096.0, 4096.0, 4518.8], rel=1e-4)
    assert math.isinf(float(schedule(euler, terminal=0.0).path.lam(1.0)))
    with pytest.raises(InputError, match=r"terminal=0\.5"):
        schedule(euler, terminal=0.5)
    with pytest.raises(InputError, match="rescale_betas_zero_snr"):
        schedule(SD, terminal=0.0)
    # an eps network says nothing of x0 where alpha = 0, a v network does
    v_row = Speaks(entry, v, ddim, "sample")
    out = from_diffusers(backbone("UNet2DModel", v_row), ddim).predict(torch.zeros(1, 2, 2, 2), 1.0)
    assert out.x0.isfinite().all()
    with pytest.raises(PathError, match="undefined at alpha=0"):
        from_diffusers(backbone("UNet2DModel", v_row), {**ddim, "prediction_type": "epsilon"}).predict(
            torch.zeros(1, 2, 2, 2), 1.0
        )


RESCALED = [c for c in SCHEDULERS if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, c).__init__).parameters]


@pytest.mark.parametrize("cls", RESCALED)
def test_zero_terminal_snr_ends_where_the_class_ends_it(cls):
    config = {"num_train_timesteps": N, **{k: SD[k] for k in ("beta_start", "beta_end", "beta_schedule")}}
    theirs = getattr(diffusers, cls)(**config, rescale_betas_zero_snr=True)
    path: Any = schedule(theirs).path
    assert float(path.alphas_cumprod[-1]) == pytest.approx(float(theirs.alphas_cumprod[-1]), abs=1e-12)


def test_a_linear_table_does_not_fall_with_their_zero_terminal_snr():
    """2^-24 is above the entry before it: diffusers' table rises at its end, and sigma is not largest where it starts."""
    theirs = diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True)
    assert theirs.alphas_cumprod[-1] > theirs.alphas_cumprod[-2]
    with pytest.raises(InputError, match=r"give terminal=0\.0, which is exact"):
        schedule(theirs)
    assert float(schedule(theirs, terminal=0.0).path.alpha(1.0)) == 0.0


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_defaults_and_keys_are_those_of_the_class(cls):
    """A missing key means what it means to the class, and no key of any class is unknown."""
    known = SCHEDULERS[cls]
    for key, p in inspect.signature(getattr(diffusers, cls).__init__).parameters.items():
        if key in ("self", "kwargs"):
            continue
        assert key in KEYS, key
        ours = known.defaults.get(key, DEFAULTS.get(key))
        if KEYS[key] != "solver" and key not in ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"):
            assert ours == p.default or (ours is None and p.default in (None, False)) or key == "variance_type", key


@pytest.mark.parametrize("cls", [c for c in SCHEDULERS if c != "ScoreSdeVeScheduler"])
def test_a_scheduler_its_config_and_its_json_say_the_same(cls):
    theirs = getattr(diffusers, cls)()
    one, config = schedule(theirs), copy.copy(theirs.config)  # writing the JSON adds the class to the configuration itself
    others = [json.loads(theirs.to_json_string()), {"_class_name": cls}]
    if SCHEDULERS[cls].kind == "edm" or cls.startswith("LTX"):  # these do not tell their class by their keys
        with pytest.raises(InputError, match="add '_class_name'"):
            schedule(config)
    else:
        others.append(config)
    for other in map(schedule, others):
        assert (one.kind, one.path, one.sign, one.sigma_data) == (other.kind, other.path, other.sign, other.sigma_data)
        t = torch.tensor([0.3 * one.path.T], dtype=torch.float64)
        assert torch.equal(one.timestep(t), other.timestep(t))


# --- timesteps between the entries of a table -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "want"), [(None, 20.25), ("linear", 20.25), ("nearest", 20), ("floor", 20), ("ceil", 21), ("log", None)]
)
def test_the_rule_between_entries_is_the_callers(rule, want):
    model = constant(torch.zeros(2, 3))
    score = from_diffusers(model, SD, family="UNet2DModel", rule=rule)
    t = 21.25 / N
    score.predict(normals(1, 2, 3), t)
    label = float(model.seen[1][0])
    if rule == "log":
        theirs = diffusers.EulerDiscreteScheduler(**{k: SD[k] for k in ("beta_start", "beta_end", "beta_schedule")})
        levels = np.log(np.sqrt((1.0 - np.exp(2.0 * LOG_ALPHA)) / np.exp(2.0 * LOG_ALPHA)))
        want = float(theirs._sigma_to_t(np.exp(-float(score.path.lam(t))), levels))
        assert 20.0 < want < 21.0
        assert abs(want - 20.25) > 1e-3  # or this could not tell it from "linear"
    assert label == pytest.approx(want, abs=1e-5)


def test_whole_timesteps_of_a_flow():
    """N sigma is an ulp off a whole number for some sigma = k/N: no rule moves it to the next."""
    k = torch.arange(1, 1001, dtype=torch.float64)
    exact = k / 1000.0
    sigma = torch.cat([exact, torch.nextafter(exact, torch.zeros_like(k)), torch.nextafter(exact, torch.full_like(k, 2.0))])
    whole = torch.cat([k, k, k])
    for rule, of_half in (("nearest", None), ("floor", 0.0), ("ceil", 1.0)):
        timestep = schedule(FM, rule=rule).timestep
        assert torch.equal(timestep(sigma), whole)
        if of_half is not None:
            assert torch.equal(timestep(sigma - 0.0004), whole - 1.0 + of_half)
    assert float(schedule(FM).timestep(torch.tensor(0.3004).double())) == pytest.approx(300.4)


def test_re_made_sigmas_take_the_logarithmic_rule_by_default():
    model = constant(torch.zeros(2, 3))
    seen = []
    for config in (SD, {**SD, "use_karras_sigmas": True}, {**SD, "use_karras_sigmas": True, "rule": None}):
        rule = "log" if "rule" in config else None
        config = {k: value for k, value in config.items() if k != "rule"}
        from_diffusers(model, config, family="UNet2DModel", rule=rule).predict(normals(1, 2, 3), 21.25 / N)
        seen.append(float(model.seen[1][0]))
    assert seen[1] == seen[2] != seen[0]


def test_below_the_first_entry_the_label_is_the_first():
    model = constant(torch.zeros(2, 3))
    for rule in ("linear", "log", "nearest", "floor", "ceil"):
        from_diffusers(model, SD, family="UNet2DModel", rule=rule).predict(normals(1, 2, 3), 0.2 / N)
        assert float(model.seen[1][0]) == 0.0


# --- lists of times ---------------------------------------------------------------------------------------------------


def their_levels(theirs, path):
    """Their sigmas, once each: without the doubled entries of two-call classes, and without a last one that stands still."""
    levels = theirs.sigmas.double()
    if type(theirs).__name__.startswith(("Heun", "FlowMatchHeun")):
        levels = levels[[0, *range(1, len(levels), 2)]]
    if type(theirs).__name__.startswith("KDPM2"):
        levels = levels[::2]
    return levels[:-1] if levels[-1] > 0.0 and levels[-1] >= levels[-2] * (1.0 - 1e-6) else levels


def agree(cls, n, config, tolerance=2e-6, **kwargs):
    theirs = getattr(diffusers, cls)(**config)
    path = schedule(theirs).path
    if isinstance(path, Tabulated) or hasattr(theirs, "alphas_cumprod"):
        # their table is float32, whose 1 - alpha^2 is rounded to an ulp of 1: the list of times is compared on the exact one
        theirs.alphas_cumprod = schedules.table(schedules.read(theirs)[2], SCHEDULERS[cls]).alphas_cumprod
    theirs.set_timesteps(**{"num_inference_steps": n, **kwargs})
    given = {k: value for k, value in kwargs.items() if k in ("mu", "sigmas")}
    ours = published(theirs, n, **given)
    levels = ours.times if isinstance(path, (Linear, EDM)) else torch.exp(-path.lam(ours.times))
    want = their_levels(theirs, path)
    assert levels.shape == want.shape
    assert ((levels - want).abs() <= tolerance * want).all()
    start = float(getattr(theirs, "init_noise_sigma", 1.0))
    if SCHEDULERS[cls].grid == "sigmas":  # its state is x / alpha
        start *= float(path.alpha(ours.times[0]))
    assert ours.start == pytest.approx(start, rel=1e-6)
    return ours, theirs


SPACINGS = ("linspace", "leading", "trailing")
STABLE = {k: SD[k] for k in ("beta_start", "beta_end", "beta_schedule")}
SIGMA_BASED = [c for c, known in SCHEDULERS.items() if known.grid == "sigmas"]
MULTISTEP = [c for c, known in SCHEDULERS.items() if known.grid in ("multistep", "unipc")]


@pytest.mark.parametrize("cls", [*SIGMA_BASED, *MULTISTEP])
def test_lists_of_sigmas_are_those_of_diffusers(cls):
    spacings = SPACINGS if "Singlestep" not in cls else (None,)
    size = {"num_train_timesteps": 60} if cls.startswith("KDPM2") else {}  # it takes seconds to make one of 1000
    for spacing, n, table in itertools.product(spacings, (1, 6, 20), (STABLE, {"beta_schedule": "squaredcos_cap_v2"})):
        own = {} if spacing is None else {"timestep_spacing": spacing, "steps_offset": int(spacing == "leading")}
        agree(cls, n, {**table, **own, **size})
    for way in ("karras", "exponential", "beta") if cls != "EulerAncestralDiscreteScheduler" else ():
        agree(cls, 7, {**STABLE, f"use_{way}_sigmas": True, **size})


@pytest.mark.parametrize(
    ("cls", "config", "kwargs"),
    [
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}, {}),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, {}),
        ("EulerDiscreteScheduler", {"sigma_min": 0.1, "sigma_max": 10.0, "use_karras_sigmas": True}, {}),
        ("EulerDiscreteScheduler", {k: CONTINUOUS[k] for k in CONTINUOUS if k not in ("_class_name", "clip_sample")}, {}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, {}),
        (
            "EulerDiscreteScheduler",  # sigma_min and sigma_max are not read without re-made sigmas
            {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.1, "sigma_max": 5.0},
            {},
        ),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
        ("DPMSolverMultistepScheduler", {"rescale_betas_zero_snr": True}, {}),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -2.0}, {}),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing"}, {}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, {}),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {}),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True, "sigma_min": 0.05}, {}),
        *((c, {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}, {}) for c in MULTISTEP),
        *(
            (c, {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}, {"mu": 0.8})
            for c in MULTISTEP
            if c != "SASolverScheduler"
        ),
        (
            "UniPCMultistepScheduler",
            {"use_flow_sigmas": True, "use_karras_sigmas": True, "prediction_type": "flow_prediction"},
            {},
        ),
        (
            "UniPCMultistepScheduler",
            {
                "use_flow_sigmas": True,
                "use_dynamic_shifting": True,
                "prediction_type": "flow_prediction",
                "shift_terminal": 0.02,
                "time_shift_type": "linear",
            },
            {"mu": 0.8},
        ),
        (
            "UniPCMultistepScheduler",
            {
                "use_flow_sigmas": True,
                "flow_shift": 3.0,
                "prediction_type": "flow_prediction",
                "final_sigmas_type": "sigma_min",
            },
            {"sigmas": np.linspace(1.0, 1 / 7, 7)},
        ),
    ],
)
def test_lists_of_sigmas_of_special_configurations(cls, config, kwargs):
    agree(cls, 7, {**STABLE, **config}, **kwargs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("way", [None, "karras", "exponential", "beta"])
def test_lists_of_flows_are_those_of_diffusers(shift, way):
    cls, remade = "FlowMatchEulerDiscreteScheduler", {} if way is None else {f"use_{way}_sigmas": True}
    for n in (1, 4, 9):
        even = np.linspace(1.0, 1.0 / n, n)
        if n > 1:
            agree(cls, n, {"shift": shift, **remade})
        agree(cls, n, {"shift": shift}, sigmas=even)
        agree("FlowMatchHeunDiscreteScheduler", n, {"shift": shift})
        for kind in ("exponential", "linear"):
            dynamic = {"use_dynamic_shifting": True, "time_shift_type": kind}
            agree(cls, n, {**dynamic}, mu=0.7)
            agree(cls, n, {**dynamic, "shift_terminal": 0.1} if n > 1 else dynamic, mu=0.7, sigmas=even)


def test_lists_of_continuous_noise_levels_are_those_of_diffusers():
    for cls, way, final in itertools.product(
        ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"),
        ("karras", "exponential"),
        ("zero", "sigma_min"),
    ):
        agree(cls, 7, {"sigma_schedule": way, "final_sigmas_type": final}, tolerance=4e-6)
    for n in (1, 2, 5, 40):
        theirs = diffusers.CMStochasticIterativeScheduler()
        theirs.set_timesteps(n)
        ours = published(theirs, n)
        want = theirs.sigmas.double()[:-1]
        want = want[want > 0.0020001]
        assert ((ours.times[:-1] - want).abs() <= 1e-6 * want).all()
        assert (len(ours.times), float(ours.times[-1]), ours.start) == (len(want) + 1, 0.0, 80.0)


@pytest.mark.parametrize("cls", ["DDIMScheduler", "DDPMScheduler", "CogVideoXDDIMScheduler", "LCMScheduler", "TCDScheduler"])
def test_lists_of_entries_are_those_of_diffusers(cls):
    for spacing, n in itertools.product(SPACINGS if "CM" not in cls and "TCD" not in cls else ("leading",), (1, 4, 10, 25)):
        theirs = getattr(diffusers, cls)(timestep_spacing=spacing)
        theirs.set_timesteps(n)
        ours = published(theirs, n)
        kept = theirs.timesteps.double()
        index = N * ours.times[: len(kept)] - 1.0
        assert ((index - kept).abs() < 1e-9).all()
        assert (float(ours.times[-1]), ours.start) == (0.0, 1.0)
    if "CM" not in cls and "TCD" not in cls and "DDPM" not in cls:
        stable = published(getattr(diffusers, cls)(set_alpha_to_one=False, steps_offset=1), 10)
        assert float(stable.times[-1]) == 1.0 / N
        still = published(
            getattr(diffusers, cls)(set_alpha_to_one=False), 10
        )  # ends at the first entry, where its last call is
        assert len(still.times) == 10


def test_the_published_first_sigmas():
    """Six steps of Stable Diffusion: 14.61 for linspace, 5.88 for leading, 14.61 for trailing."""
    tops, starts = [], []
    for spacing in SPACINGS:
        config = {**SD, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": spacing}
        grid = published(config, 6)
        tops.append(float(torch.exp(-schedule(config).path.lam(grid.times[0]))))
        starts.append(grid.start)
    assert tops == pytest.approx([14.6146, 5.8784, 14.6146], abs=1e-3)
    assert starts == pytest.approx([14.6146 / math.hypot(14.6146, 1.0), 1.0, 14.6146 / math.hypot(14.6146, 1.0)], abs=1e-6)


def test_a_continuous_time_covers_the_table_and_what_is_asked():
    config = {k: value for k, value in CONTINUOUS.items() if k not in ("sigma_min", "sigma_max")}
    first, last = (math.sqrt(math.exp(-2.0 * a) - 1.0) for a in (LOG_ALPHA[0], LOG_ALPHA[-1]))
    for low, high, want in ((None, None, (first, last)), (0.002, 700.0, (0.002, 700.0)), (0.1, 5.0, (first, last))):
        path = schedule({**config, "sigma_min": low, "sigma_max": high}).path
        assert (path.t_min, path.T) == pytest.approx(want, rel=1e-9)


def test_the_double_shift():
    """sigma_min is shifted when the scheduler is made and again with the list: shift(shift(0.001)), not shift(0.001)."""
    once = 3.0 * 0.001 / (1.0 + 2.0 * 0.001)
    twice = 3.0 * once / (1.0 + 2.0 * once)
    grid = published(FM, 4)
    assert float(grid.times[-2]) == pytest.approx(twice, rel=1e-12) == pytest.approx(0.00893, abs=5e-6)
    grid = published(FM, 4, sigmas=[1.0, 0.75, 0.5, 0.25])
    assert float(grid.times[-2]) == pytest.approx(3.0 * 0.25 / (1.0 + 2.0 * 0.25), rel=1e-12)


def test_mu_is_linear_in_the_tokens():
    flux = {**FM, "shift": 3.0, "use_dynamic_shifting": True}
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.5 + 0.65 * 768 / 3840)):
        assert torch.equal(published(flux, 5, image_tokens=tokens).times, published(flux, 5, mu=mu).times)
    wide = {**flux, "max_shift": 1.16, "base_image_seq_len": 100}
    assert torch.equal(published(wide, 5, image_tokens=4096).times, published(wide, 5, mu=1.16).times)
    times = published(flux, 5, mu=1.0, sigmas=np.linspace(1.0, 0.2, 5)).times[:-1].numpy()
    even = np.linspace(1.0, 0.2, 5)
    assert times == pytest.approx(math.e / (math.e + 1.0 / even - 1.0), rel=1e-12)


def test_trailing_lists_the_entry_minus_one():
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(61)
    assert theirs.timesteps[-1] == -1
    for cls in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        with pytest.raises(InputError, match="the last -1: take another n"):
            published(getattr(diffusers, cls)(timestep_spacing="trailing"), 61)


# --- whole loops of tiny networks -------------------------------------------------------------------------------------


def build(name, **config):
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval().requires_grad_(False)


def unet(**more):
    small = {
        "sample_size": 8,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 4,
        "add_attention": False,
    }
    return build("UNet2DModel", **{**small, **more})


UNET = unet()
TEXT, POOLED = normals(11, 2, 3, 6), normals(12, 2, 5)
BOX = normals(13, 2, 4, 4, 4)
PACKED = normals(14, 2, 4, 8)
IDS = torch.tensor([[0.0, i, j] for i in range(2) for j in range(2)])


@dataclass(frozen=True)
class Tiny:
    """A tiny network, its conditions, and its pipeline's call, transcribed: (model, latents, t) -> what ``step`` gets."""

    model: Any
    noise: torch.Tensor
    call: Any
    conditions: dict
    constants: dict


def tiny(name):
    heads = {"attention_head_dim": 4, "num_attention_heads": 2}
    square = {"sample_size": 4, "patch_size": 2, "in_channels": 4}
    text, ids = {"encoder_hidden_states": TEXT}, {"img_ids": IDS, "txt_ids": torch.zeros(3, 3)}
    each = lambda t, x: t.expand(len(x))  # noqa: E731
    if name == "UNet2DConditionModel":
        model = build(
            name,
            sample_size=8,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=6,
        )
        return Tiny(model, BOX, lambda m, x, t: m(x, t, TEXT).sample, text, {})
    if name == "DiTTransformer2DModel":
        labels = torch.tensor([1, 7])
        model = build(name, **heads, **square, out_channels=8, num_layers=1, num_embeds_ada_norm=10, norm_num_groups=2)
        call = lambda m, x, t: m(x, timestep=each(t, x), class_labels=labels).sample.split(4, dim=1)[0]  # noqa: E731
        return Tiny(model, BOX, call, {"class_labels": labels}, {})
    if name == "PixArtTransformer2DModel":
        model = build(
            name, **heads, **square, out_channels=8, num_layers=1, cross_attention_dim=8, caption_channels=6, norm_num_groups=2,
            use_additional_conditions=False,
        )  # fmt: skip
        call = lambda m, x, t: m(x, encoder_hidden_states=TEXT, timestep=each(t, x)).sample.chunk(2, dim=1)[0]  # noqa: E731
        return Tiny(model, BOX, call, text, {})
    if name == "SD3Transformer2DModel":
        model = build(
            name, **heads, **square, out_channels=4, num_layers=1, joint_attention_dim=6, caption_projection_dim=8,
            pooled_projection_dim=5, pos_embed_max_size=4,
        )  # fmt: skip
        both = {**text, "pooled_projections": POOLED}
        return Tiny(model, BOX, lambda m, x, t: m(hidden_states=x, timestep=each(t, x), **both).sample, both, {})
    if name == "FluxTransformer2DModel":
        model = build(
            name, patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
            joint_attention_dim=6, pooled_projection_dim=5, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        both = {**text, "pooled_projections": POOLED}

        def flux(m, x, t):
            guidance = torch.full([1], 3.5).expand(len(x))
            return m(hidden_states=x, timestep=each(t, x) / 1000, guidance=guidance, **both, **ids).sample

        return Tiny(model, PACKED, flux, both, {**ids, "guidance": 3.5})
    if name == "Flux2Transformer2DModel":
        model = build(
            name, patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
            joint_attention_dim=6, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4),
        )  # fmt: skip
        four = {"img_ids": torch.cat([IDS, IDS[:, :1]], 1), "txt_ids": torch.zeros(3, 4)}

        def flux2(m, x, t):
            guidance = torch.full([1], 4.0).expand(len(x))
            return m(hidden_states=x, timestep=each(t, x) / 1000, guidance=guidance, **text, **four).sample

        return Tiny(model, PACKED, flux2, text, {**four, "guidance": 4.0})
    if name == "QwenImageTransformer2DModel":
        model = build(
            name, patch_size=2, in_channels=8, out_channels=2, num_layers=1, attention_head_dim=16, num_attention_heads=1,
            joint_attention_dim=6, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        both = {**text, "encoder_hidden_states_mask": torch.tensor([[True, True, True], [True, True, False]])}
        shapes = {"img_shapes": [[(1, 2, 2)]] * 2}
        return Tiny(model, PACKED, lambda m, x, t: m(x, timestep=each(t, x) / 1000, **both, **shapes).sample, both, shapes)
    if name == "WanTransformer3DModel":
        model = build(
            name, patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=6,
            freq_dim=8, ffn_dim=8, num_layers=1, rope_max_seq_len=8,
        )  # fmt: skip
        return Tiny(model, normals(15, 2, 4, 2, 4, 4), lambda m, x, t: m(x, each(t, x), TEXT).sample, text, {})
    if name == "SanaTransformer2DModel":
        model = build(
            name, in_channels=4, out_channels=8, num_attention_heads=1, attention_head_dim=8, num_layers=1,
            num_cross_attention_heads=1, cross_attention_head_dim=8, cross_attention_dim=8, caption_channels=6, mlp_ratio=1.0,
            sample_size=4, patch_size=1, timestep_scale=0.001,
        )  # fmt: skip
        call = lambda m, x, t: m(x, TEXT, each(t, x) * m.config.timestep_scale).sample.chunk(2, dim=1)[0]  # noqa: E731
        return Tiny(model, BOX, call, text, {})
    if name == "AuraFlowTransformer2DModel":
        model = build(
            name, **square, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=1,
            joint_attention_dim=6, caption_projection_dim=8, out_channels=4, pos_embed_max_size=16,
        )  # fmt: skip
        call = lambda m, x, t: m(x, TEXT, torch.tensor([t / 1000]).expand(len(x))).sample  # noqa: E731
        return Tiny(model, BOX, call, text, {})
    if name == "Lumina2Transformer2DModel":
        model = build(
            name, **square, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=1, num_kv_heads=1,
            multiple_of=8, axes_dim_rope=(8, 8, 8), axes_lens=(8, 8, 8), cap_feat_dim=6,
        )  # fmt: skip
        both = {**text, "encoder_attention_mask": torch.ones(2, 3, dtype=torch.bool)}
        return Tiny(model, BOX, lambda m, x, t: -m(x, timestep=(1 - t / 1000).expand(len(x)), **both).sample, both, {})
    assert name == "ZImageTransformer2DModel"
    torch.manual_seed(0)
    model = build(
        name, in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=6,
        axes_dims=[4, 6, 6], axes_lens=[64, 8, 8],
    )  # fmt: skip
    captions = [TEXT[0], TEXT[1][:2]]

    def z_image(m, x, t):
        out = m(list(x.unsqueeze(2).unbind(0)), (1000 - t.expand(len(x))) / 1000, captions, return_dict=False)[0]
        return -torch.stack([o.float() for o in out]).squeeze(2)

    return Tiny(model, BOX, z_image, {}, {"cap_feats": captions})


def their_loop(theirs, n, noise, call, **kwargs):
    """A pipeline's loop, without guidance."""
    theirs = copy.deepcopy(theirs)
    theirs.set_timesteps(**({"num_inference_steps": n} if "sigmas" not in kwargs else {}), **kwargs)
    x = noise * float(getattr(theirs, "init_noise_sigma", 1.0))
    for t in theirs.timesteps:
        given = theirs.scale_model_input(x, t) if hasattr(theirs, "scale_model_input") else x
        x = theirs.step(call(given, t), t, x).prev_sample
    return x


def both_loops(solver, theirs, n, noise, call, score, conditions=None, **kwargs):
    grid = published(theirs, n, **kwargs)
    ours = integrate(solver, score, grid.start * noise, grid.times, conditions=conditions).x
    with torch.no_grad():
        return ours, their_loop(theirs, n, noise, call, **kwargs)


IMAGE = normals(10, 2, 3, 8, 8)
LOOPS = {
    "ddim leading": ("ddim", "DDIMScheduler", {"clip_sample": False}, {}),
    "ddim stable diffusion": (
        "ddim",
        "DDIMScheduler",
        {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False},
        {},
    ),
    "ddim trailing": ("ddim", "DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, {}),
    "ddim x0": ("ddim", "DDIMScheduler", {"clip_sample": False, "prediction_type": "sample"}, {}),
    "ddim v from alpha = 0": (
        "ddim",
        "DDIMScheduler",
        {
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
        },
        {},
    ),
    "euler linspace": ("edm_euler", "EulerDiscreteScheduler", {}, {}),
    "euler leading": ("edm_euler", "EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, {}),
    "euler trailing": ("edm_euler", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, {}),
    "euler karras": ("edm_euler", "EulerDiscreteScheduler", {"use_karras_sigmas": True}, {}),
    "euler exponential": ("edm_euler", "EulerDiscreteScheduler", {"use_exponential_sigmas": True}, {}),
    "euler v": ("edm_euler", "EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, {}),
    "euler 2^-24": (
        "edm_euler",
        "EulerDiscreteScheduler",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {},
    ),
    "euler continuous": (
        "edm_euler",
        "EulerDiscreteScheduler",
        {k: CONTINUOUS[k] for k in CONTINUOUS if k not in ("_class_name", "clip_sample")} | {"timestep_spacing": "leading"},
        {},
    ),
    "heun": ("edm_heun", "HeunDiscreteScheduler", {}, {}),
    "heun karras": ("edm_heun", "HeunDiscreteScheduler", {"use_karras_sigmas": True}, {}),
    "2m": ("dpmpp_2m", "DPMSolverMultistepScheduler", {}, {}),
    "2m sigma_min": ("dpmpp_2m_lower_final", "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {}),
    "2m karras": ("dpmpp_2m", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {"rule": "nearest"}),
    "unipc": ("unipc_2", "UniPCMultistepScheduler", {}, {}),
    "edm euler": ("edm_euler", "EDMEulerScheduler", {}, {}),
    "edm 2m": ("dpmpp_2m", "EDMDPMSolverMultistepScheduler", {}, {}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_whole_loops_of_a_unet(name):
    solver, cls, config, options = LOOPS[name]
    theirs = getattr(diffusers, cls)(**{**({} if "EDM" in cls else STABLE), **config})
    score = from_diffusers(UNET, theirs, **options)
    ours, want = both_loops(solver, theirs, 10, IMAGE, lambda x, t: UNET(x, t).sample, score)
    assert want.isfinite().all()
    assert relative(ours, want) < PARITY


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel"])
@pytest.mark.parametrize("loop", ["euler linspace", "2m", "ddim stable diffusion"])
def test_whole_loops_of_models_on_tables(name, loop):
    solver, cls, config, options = LOOPS[loop]
    net, theirs = tiny(name), getattr(diffusers, cls)(**{**STABLE, **config})
    score = from_diffusers(net.model, theirs, conditions=net.constants, **options)
    ours, want = both_loops(solver, theirs, 8, net.noise, lambda x, t: net.call(net.model, x, t), score, net.conditions)
    assert relative(ours, want) < PARITY


FLOWS = [name for name, row in FAMILIES.items() if row.flow]
TINY_FLOWS = [
    "SD3Transformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel",
    "WanTransformer3DModel", "SanaTransformer2DModel", "AuraFlowTransformer2DModel", "Lumina2Transformer2DModel",
    "ZImageTransformer2DModel",
]  # fmt: skip


@pytest.mark.parametrize("name", TINY_FLOWS)
def test_whole_loops_of_flows(name):
    net = tiny(name)
    even = np.linspace(1.0, 1.0 / 6, 6)
    for config, kwargs in (
        ({"shift": 3.0}, {}),
        ({"shift": 3.0}, {"sigmas": even}),
        ({"use_dynamic_shifting": True}, {"mu": 0.6, "sigmas": even}),
    ):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
        score = from_diffusers(net.model, theirs, conditions=net.constants)
        call = lambda x, t: net.call(net.model, x, t)  # noqa: E731
        ours, want = both_loops("euler", theirs, 6, net.noise, call, score, net.conditions, **kwargs)
        assert relative(want, net.noise) > 1e-3  # the flow moves
        assert relative(ours, want) < PARITY


@pytest.mark.parametrize(
    ("cls", "solver"), [("DPMSolverMultistepScheduler", "dpmpp_2m"), ("UniPCMultistepScheduler", "unipc_2")]
)
@pytest.mark.parametrize("name", ["SanaTransformer2DModel", "WanTransformer3DModel"])
def test_whole_loops_of_flows_by_multistep_classes(name, cls, solver):
    """Their timesteps are cut to int64 and are not those of their sigmas: rule="floor" asks the network the same."""
    net = tiny(name)
    theirs = getattr(diffusers, cls)(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    score = from_diffusers(net.model, theirs, rule="floor", conditions=net.constants)
    ours, want = both_loops(solver, theirs, 7, net.noise, lambda x, t: net.call(net.model, x, t), score, net.conditions)
    assert relative(ours, want) < PARITY


def test_ddim_steps_to_an_entry_that_is_not_the_next_timestep():
    """Ten of "linspace": labels 999, 888, ... but steps of 1000 // 10. Theirs is reproduced by feeding those, not by a grid."""
    theirs = diffusers.DDIMScheduler(**STABLE, clip_sample=False, timestep_spacing="linspace")
    score = from_diffusers(UNET, theirs)
    ours, want = both_loops("ddim", theirs, 10, IMAGE, lambda x, t: UNET(x, t).sample, score)
    assert relative(ours, want) > 1e-3
    alpha = lambda k: math.exp(LOG_ALPHA[k]) if k >= 0 else 1.0  # noqa: E731
    x = IMAGE.clone()
    with torch.no_grad():
        for k in np.linspace(0, 999, 10).round()[::-1].astype(int).tolist():
            a, b = alpha(k), alpha(k - 100)
            noise = UNET(x, torch.tensor([float(k)])).sample
            x0 = (x - math.sqrt(1.0 - a * a) * noise) / a
            x = b * x0 + math.sqrt(1.0 - b * b) * noise
    assert relative(x, want) < PARITY


def test_a_cut_timestep_may_be_that_of_the_entry_below():
    """Exponential sigmas, cut to int64: the last entry's 998.99... becomes 998. With 999 there, the loops agree."""
    theirs = diffusers.DPMSolverMultistepScheduler(**STABLE, use_exponential_sigmas=True)
    score = from_diffusers(UNET, theirs, rule="floor")
    theirs.set_timesteps(10)
    assert theirs.timesteps[0] == 998
    ours, want = both_loops("dpmpp_2m", theirs, 10, IMAGE, lambda x, t: UNET(x, t + (t == 998)).sample, score)
    assert relative(ours, want) < PARITY
    _, want = both_loops("dpmpp_2m", theirs, 10, IMAGE, lambda x, t: UNET(x, t).sample, score)
    assert relative(ours, want) > 1e-4


def test_one_step_of_a_consistency_model():
    theirs = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    score = from_diffusers(UNET, theirs)
    grid = published(theirs, 1)
    ours = integrate("ddim", score, grid.start * IMAGE, grid.times).x
    with torch.no_grad():
        assert relative(ours, their_loop(theirs, 1, IMAGE, lambda x, t: UNET(x, t).sample)) < 1e-5


# --- traps, each by name ----------------------------------------------------------------------------------------------


def test_unet2d_cuts_a_python_float_and_is_never_given_one():
    with torch.no_grad():
        assert torch.equal(UNET(IMAGE, 0.7).sample, UNET(IMAGE, 0).sample)
        want = UNET(IMAGE, torch.tensor([0.7, 0.7])).sample
        assert relative(want, UNET(IMAGE, 0).sample) > 1e-4
        got = from_diffusers(UNET, {**SD, "clip_sample": False}).predict(IMAGE, 1.7 / N).eps
    assert relative(got, want) < 1e-5


def test_a_fourier_unet_takes_sigma_and_returns_the_score():
    model = unet(time_embedding_type="fourier")
    score = from_diffusers(model, diffusers.ScoreSdeVeScheduler(sigma_max=50.0))
    t = 0.6
    sigma = 0.01 * 5000.0**t
    with torch.no_grad():
        assert relative(score(IMAGE, t), model(IMAGE, torch.full((2,), sigma)).sample) < 1e-5
    assert isinstance(score.path, VE)
    for wrong in (SD, EDM_CONFIG, FM):
        with pytest.raises(InputError, match="takes sigma as its timestep"):
            from_diffusers(model, wrong)


def test_a_learned_time_embedding_takes_whole_numbers():
    model = unet(time_embedding_type="learned", num_train_timesteps=N)
    with torch.no_grad():
        got = from_diffusers(model, SD).predict(IMAGE, 21.4 / N).eps
        assert relative(got, model(IMAGE, torch.tensor([20, 20])).sample) < 1e-5
        with pytest.raises(NetworkError, match=r"Long|Int|int"):
            from_diffusers(model, SD, rule="linear").predict(IMAGE, 21.4 / N)


def test_a_model_that_returns_2c_without_being_known_to():
    row = Speaks(THOUSAND, velocity, FM, doubled=True)
    score = from_diffusers(backbone("SD3Transformer2DModel", row), FM)
    with pytest.raises(NetworkError, match="4 channels for 2"):
        score.predict(torch.zeros(3, 2, 2, 2), 0.5)


@pytest.mark.parametrize(("name", "factor"), [("FluxTransformer2DModel", 1.0), ("HunyuanVideoTransformer3DModel", 1000.0)])
def test_guidance_as_a_number(name, factor):
    row = FAMILY_ROWS[name]
    model = backbone(name, row)
    score = from_diffusers(model, FM, conditions={"guidance": 3.5})
    score.predict(torch.zeros(3, 2, 2, 2), 0.5, **needed(name, row, 3))
    assert torch.equal(model.seen["guidance"], torch.full((3,), 3.5 * factor))
    score.predict(torch.zeros(3, 2, 2, 2), 0.5, **needed(name, row, 3), guidance=torch.tensor([1.0, 2.0, 3.0]))
    assert model.seen["guidance"].tolist() == [1.0, 2.0, 3.0]  # a tensor is handed over as it is


def test_z_image_takes_captions_as_a_tensor_or_a_list():
    name = "ZImageTransformer2DModel"
    model = backbone(name, FAMILY_ROWS[name])
    x = torch.zeros(3, 2, 2, 2)
    for captions, want in ((TEXT[:1].expand(3, 3, 6), 3), ([TEXT[0]], 3), ([TEXT[0], TEXT[1], TEXT[0]], 3)):
        from_diffusers(model, FM, conditions={"cap_feats": captions}).predict(x, 0.5)
        assert [len(model.seen["cap_feats"]), model.seen["cap_feats"][2].shape] == [want, (3, 6)]
        assert [i.shape for i in model.seen["x"]] == [(2, 1, 2, 2)] * 3


def test_conditions_reach_the_model():
    net = tiny("UNet2DConditionModel")
    theirs = diffusers.DDIMScheduler(**STABLE, clip_sample=False)
    one = from_diffusers(net.model, theirs, conditions={"encoder_hidden_states": TEXT})
    two = from_diffusers(net.model, theirs)
    assert torch.equal(one.predict(BOX, 0.5).x0, two.predict(BOX, 0.5, encoder_hidden_states=TEXT).x0)
    assert not torch.equal(one.predict(BOX, 0.5).x0, one.predict(BOX, 0.5, encoder_hidden_states=-TEXT).x0)
    with pytest.raises(InputError, match="encoder_hidden_states"):
        two.predict(BOX, 0.5)
    with pytest.raises(InputError, match="encoder_hidden_state"):
        two.predict(BOX, 0.5, encoder_hidden_states=TEXT, encoder_hidden_state=TEXT)


def test_gradients_flow_and_a_likelihood_is_possible():
    x = IMAGE.double().requires_grad_()
    model = copy.deepcopy(UNET).double()
    (g,) = torch.autograd.grad(from_diffusers(model, SD).predict(x, 0.5).x0.sum(), x)
    assert g.abs().max() > 0.0


def test_half_precision_models_are_fed_their_own_dtype():
    model = copy.deepcopy(UNET).bfloat16()
    score = from_diffusers(model, SD)
    assert score.dtype is torch.bfloat16
    with torch.no_grad():
        got, want = score.predict(IMAGE, 0.5).eps, from_diffusers(UNET, SD).predict(IMAGE, 0.5).eps
    assert got.dtype is torch.float32
    assert relative(got, want) < 0.05
    assert from_diffusers(copy.deepcopy(UNET).double(), SD).native_dtype is torch.float64


def test_wrapped_models_and_subclasses_are_recognised():
    class Mine(type(UNET)):
        pass

    class Compiled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner

        def forward(self, *args, **kwargs):
            return self._orig_mod(*args, **kwargs)

    mine = copy.deepcopy(UNET)
    mine.__class__ = Mine
    want = from_diffusers(UNET, SD).predict(IMAGE, 0.5).x0
    for model in (mine, Compiled(UNET), nn.DataParallel(UNET), Compiled(nn.DataParallel(mine))):
        assert torch.equal(from_diffusers(model, SD).predict(IMAGE, 0.5).x0, want)
    function = lambda sample, timestep: UNET(sample, timestep).sample  # noqa: E731
    tuples = lambda sample, timestep: UNET(sample, timestep, return_dict=False)  # noqa: E731
    for model in (function, tuples):
        assert torch.equal(from_diffusers(model, SD, family="UNet2DModel").predict(IMAGE, 0.5).x0, want)


def test_a_newcomer_adds_a_family_as_one_row(monkeypatch):
    class Newcomer(nn.Module):
        def forward(self, latents, noise_level, prompt):
            s = noise_level.reshape(-1, 1)
            x0, noise, _ = truth(latents, 1.0 - s, s)
            return (x0 - noise + 0.0 * prompt,)

    row = Family("latents", "noise_level", wants="sigma", flow=True, sign=-1.0)
    x = normals(1, 2, 3).double()
    monkeypatch.setitem(FAMILIES, "Newcomer", row)
    for score in (from_diffusers(Newcomer(), FM), from_diffusers(Newcomer(), FM, family=row)):
        assert relative(score.predict(x, 0.4, prompt=torch.zeros(2, 1)).x0, truth(x, 0.6, 0.4)[0]) < 1e-12
    with pytest.raises(InputError, match="wants='time' is unknown"):
        Family(wants="time")
    with pytest.raises(InputError, match=r"sign=2\.0"):
        Family(sign=2.0)


def test_clipping_is_named_and_not_done():
    for config, key in (
        ({"_class_name": "DDPMScheduler"}, "clip_sample=True"),
        ({**SD, "thresholding": True}, "thresholding=True"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "clip_denoised=True"),
    ):
        with pytest.warns(ToolkitWarning, match=key):
            from_diffusers(constant(None), config, family="UNet2DModel")
    with pytest.warns(ToolkitWarning, match="clip by guidance"):
        from_diffusers(UNET, diffusers.DDPMScheduler())


def test_a_few_lines_from_a_model_to_samples():
    score = from_diffusers(UNET, diffusers.DDPMScheduler(clip_sample=False))
    out = sample(score, (2, 3, 8, 8), solver="dpmpp_2m", nfe=5, seed=1)
    assert out.x.isfinite().all()
    assert out.nfe == 5


# --- errors -----------------------------------------------------------------------------------------------------------


class Unknown(nn.Module):
    def forward(self, hidden_states, timestep):
        return hidden_states


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_diffusers(Unknown(), SD), "model class 'Unknown' is not a row of FAMILIES"),
        (lambda: from_diffusers(type("FluxTransformer3DModel", (Unknown,), {})(), FM), "did you mean 'FluxTransformer2DModel'"),
        (lambda: from_diffusers(Unknown(), SD, family="UNet2D"), "did you mean 'UNet2DModel'"),
        (lambda: from_diffusers(Unknown(), SD, family="UNet2DModel"), "has no argument 'sample'"),
        (lambda: from_diffusers(3, SD, family="UNet2DModel"), "model is a int"),
        (lambda: from_diffusers(Unknown(), SD, family="SD3Transformer2DModel"), "is a flow, but the scheduler is of a table"),
        (
            lambda: from_diffusers(backbone("WanTransformer3DModel", FAMILY_ROWS["WanTransformer3DModel"]), MULTI),
            "returns a velocity, but the scheduler says otherwise",
        ),
        (lambda: schedule({**SD, "use_flow_sigmas": True}), "DDIMScheduler does not read it"),
        (lambda: schedule(None), "scheduler is a NoneType"),
        (lambda: schedule("scheduler_config.json"), "json.load"),
        (lambda: schedule({"_class_name": "DDIMSchedular"}), "did you mean 'DDIMScheduler'"),
        (lambda: schedule({"_class_name": "KarrasVeScheduler"}), "'KarrasVeScheduler' is not understood"),
        (lambda: schedule({**SD, "beta_strat": 0.1}), "'beta_strat' is not understood: did you mean 'beta_start'"),
        (lambda: schedule({"timestep_spacing": "leading"}), "add '_class_name'"),
        (lambda: schedule({**SD, "beta_schedule": "cosine"}), "beta_schedule='cosine' is unknown"),
        (lambda: schedule({**SD, "trained_betas": [0.1, 0.2]}), "trained_betas has 2 entries"),
        (lambda: schedule({**SD, "num_train_timesteps": 1.5}), "num_train_timesteps=1.5"),
        (lambda: schedule({**SD, "prediction_type": "velocity"}), "prediction_type='velocity'"),
        (lambda: schedule({**SD, "prediction_type": "flow_prediction"}), "without use_flow_sigmas=True"),
        (lambda: schedule({**MULTI, "prediction_type": "v_prediction"}), "v is not of a flow's alpha and sigma"),
        (lambda: schedule({**EDM_CONFIG, "prediction_type": "sample"}), "they are F and -F"),
        (lambda: schedule(SD, rule="lgo"), "did you mean 'log'"),
        (lambda: schedule(FM, rule="log"), "'log' is of tables"),
        (lambda: schedule(EDM_CONFIG, rule="floor"), "timesteps are a function of sigma"),
        (lambda: published(SD, 0), "n=0"),
        (lambda: published({k: value for k, value in SD.items() if k != "_class_name"}, 5), "does not name its scheduler"),
        (lambda: published({"_class_name": "PNDMScheduler"}, 5), "PNDMScheduler is not known here"),
        (lambda: published({**SD, "timestep_spacing": "even"}, 5), "timestep_spacing='even'"),
        (lambda: published({**MULTI, "use_flow_sigmas": False, "timestep_spacing": "even"}, 5), "timestep_spacing='even'"),
        (lambda: published(SD, 1001), "take another n"),
        (lambda: published({**SD, "steps_offset": 200}, 5), "steps_offset=200"),
        (lambda: published(SD, 5, mu=0.5), "mu and image_tokens are of dynamic shifting"),
        (lambda: published({**FM, "use_dynamic_shifting": True}, 5), "give mu=, or image_tokens="),
        (lambda: published({**FM, "use_dynamic_shifting": True}, 5, mu=0.5, image_tokens=256), "both given"),
        (lambda: published({**FM, "use_dynamic_shifting": True, "time_shift_type": "cubic"}, 5, mu=0.5), "time_shift_type"),
        (lambda: published(SD, 2, sigmas=[1.0, 0.5]), "sigmas= are of flows"),
        (lambda: published(FM, 3, sigmas=[1.0, 0.5]), "give 3 falling numbers"),
        (lambda: published({**MULTI, "prediction_type": "flow_prediction"}, 2, sigmas=[1.0, 0.5]), "sigmas= cannot be given"),
        (
            lambda: published({**MULTI, "prediction_type": "flow_prediction", "final_sigmas_type": "sigma_min"}, 5),
            "a sigma of a beta table",
        ),
        (
            lambda: published({**SD, "_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "one"}, 5),
            "final_sigmas_type",
        ),
        (
            lambda: published({**SD, "_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, 5),
            "are not those of its sigmas",
        ),
        (
            lambda: published(
                {**SD, "_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, 5
            ),
            "karras and beta: choose one",
        ),
        (
            lambda: published({**SD, "_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "sigma_max": 20.0}, 5),
            "sigma=20 is beyond 14.6",
        ),
        (
            lambda: published(
                {**SD, "_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True, "rescale_betas_zero_snr": True},
                5,
                terminal=0.0,
            ),
            "cannot start where alpha = 0",
        ),
        (lambda: published({**EDM_CONFIG, "sigma_schedule": "even"}, 5), "sigma_schedule='even'"),
        (lambda: published({"_class_name": "CMStochasticIterativeScheduler"}, 41), "at most num_train_timesteps=40"),
        (lambda: published({"_class_name": "LCMScheduler"}, 51), "at most original_inference_steps=50"),
    ],
)
def test_one_clear_error(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)
