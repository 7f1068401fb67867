"""Our samplers as functions of k-diffusion and ComfyUI, against their formulas transcribed in float64."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import parity_reference as reference
import pytest
import torch
from rows import one_of_each_kind
from torch import Tensor

from sde.errors import InputError, PathError
from solvers import SOLVERS
from solvers.bridges import k_diffusion
from solvers.compose import Churn
from solvers.runge_kutta import HEUN, RungeKutta

BATCH, DIM = 4, 3


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, START, NORMALS = randn(DIM, DIM, seed=0), randn(BATCH, DIM, seed=1), randn(40, BATCH, DIM, seed=2)
SIGMAS = torch.tensor([14.6, 8.0, 4.1, 1.9, 0.7, 0.25, 0.03, 0.0], dtype=torch.float64)
FLOW = torch.tensor([1.0, 0.93, 0.8, 0.61, 0.4, 0.2, 0.07, 0.0], dtype=torch.float64)


def denoise(x: Tensor, sigma: Any) -> Tensor:
    """E[x0] without structure."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1)
    shrink = 1.0 / torch.sqrt(1.0 + sigma * sigma)
    return shrink * torch.tanh(shrink * x @ WEIGHT.to(x.dtype) + 0.25 * torch.log(sigma)) + shrink**2 * x


def stored(normals: Tensor = NORMALS) -> Callable[[Tensor, Tensor], Tensor]:
    """k-diffusion's noise_sampler that hands out the stored normals in order."""
    stream = iter(normals)
    return lambda sigma, sigma_next: next(stream)


def run(solver: Any, sigmas: Tensor = SIGMAS, model: Any = denoise, x: Tensor = START, **options: Any) -> Tensor:
    start = sigmas[0].to(x.dtype) * x
    return k_diffusion.sampler(solver)(model, start, sigmas, disable=True, **options)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


# --- parity with k-diffusion's formulas -------------------------------------------------------------------------------

KD: dict[str, Callable[..., Tensor]] = {
    "edm_euler": reference.kd_euler,
    "k_diffusion:sample_euler": reference.kd_euler,
    "edm_heun": reference.kd_heun,
    "heun": reference.kd_heun,
    "dpmpp_2m": reference.kd_dpmpp_2m,
    "dpmpp_2m_sde": reference.kd_dpmpp_2m_sde,
    "euler_ancestral": reference.kd_euler_ancestral,
    "lms_4": reference.kd_lms,
}


@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-1]], ids=["to zero", "stops early"])
@pytest.mark.parametrize("name", KD)
def test_parity(name: str, sigmas: Tensor) -> None:
    if name == "lms_4" and float(sigmas[-1]) == 0.0:
        pytest.skip("where lambda is infinite ours takes a first-order step")
    theirs = KD[name](denoise, sigmas[0] * START, sigmas.tolist(), iter(NORMALS))
    close(run(name, sigmas, noise_sampler=stored()), theirs)


def test_parity_of_eta() -> None:
    """k-diffusion's ancestral eta is ours; that of its SDE samplers is our square."""
    x, sigmas = SIGMAS[0] * START, SIGMAS.tolist()
    theirs = reference.kd_euler_ancestral(denoise, x, sigmas, iter(NORMALS), eta=0.6)
    close(run("euler_ancestral", noise_sampler=stored(), eta=0.6), theirs)
    theirs = reference.kd_dpmpp_2m_sde(denoise, x, sigmas, iter(NORMALS), eta=0.36)
    close(run("dpmpp_2m_sde", noise_sampler=stored(), eta=0.6), theirs)
    close(k_diffusion.sampler("dpmpp_2m", eta=0.6)(denoise, x, SIGMAS, disable=True, noise_sampler=stored()), theirs)


def test_parity_of_s_noise() -> None:
    """s_noise scales every normal."""
    theirs = reference.kd_euler_ancestral(denoise, SIGMAS[0] * START, SIGMAS.tolist(), iter(1.3 * NORMALS))
    close(run("euler_ancestral", noise_sampler=stored(), s_noise=1.3), theirs)


def test_parity_of_churn() -> None:
    """Below the first level; its normals are of no Brownian path, so they come from the seed and not from noise_sampler."""
    churned = Churn(RungeKutta(HEUN, "rho"), s_churn=2.0, s_max=9.0)
    drawn: list[Tensor] = []

    class Recorded(list[Tensor]):
        def __next__(self) -> Tensor:
            return self.pop(0)

    original = k_diffusion.drawer

    def recording(origin: Any) -> Any:
        draw = original(origin)

        def recorded(*arguments: Any) -> Tensor:
            drawn.append(draw(*arguments))
            return drawn[-1]

        return recorded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(k_diffusion, "drawer", recording)
        ours = run(churned, seed=5, noise_sampler=stored())
    assert len(drawn) == 6
    x, sigmas = SIGMAS[0] * START, SIGMAS.tolist()
    normals = Recorded(drawn)
    theirs = reference.kd_heun(denoise, x, sigmas, normals, s_churn=2.0, s_tmax=9.0)  # pyright: ignore[reportArgumentType]
    close(ours, theirs)


# --- flow models ------------------------------------------------------------------------------------------------------


def flow_lam(sigma: float) -> float:
    return math.log((1.0 - sigma) / sigma) if sigma < 1.0 else -math.inf


def flow_2m(x: Tensor, sigmas: list[float], normals: Iterator[Tensor], eta: float = 0.0) -> Tensor:
    """DPM-Solver++(2M), and with eta = 1 its SDE, on x = (1 - sigma) x0 + sigma eps."""
    old, h_last = None, 0.0
    for s, t in itertools.pairwise(sigmas):
        d = denoise(x, s)
        if t == 0.0:
            return d
        h = flow_lam(t) - flow_lam(s)
        drop = -math.expm1(-(1.0 + eta) * h)
        out = t / s * (math.exp(-eta * h) if eta else 1.0) * x + (1.0 - t) * drop * d
        if old is not None:
            out = out + 0.5 * (1.0 - t) * drop * (h / h_last) * (d - old)
        if eta:
            out = out + t * math.sqrt(-math.expm1(-2.0 * eta * h)) * next(normals)
        x, old, h_last = out, d, h
    return x


def flow_ancestral(x: Tensor, sigmas: list[float], normals: Iterator[Tensor], eta: float) -> Tensor:
    """ComfyUI's Euler ancestral for rectified flows."""
    for s, t in itertools.pairwise(sigmas):
        d = denoise(x, s)
        if t == 0.0:
            return d
        down = t * (1.0 + (t / s - 1.0) * eta)
        x = down / s * x + (1.0 - down / s) * d
        x = (1.0 - t) / (1.0 - down) * x
        x = x + math.sqrt(t**2 - down**2 * (1.0 - t) ** 2 / (1.0 - down) ** 2) * next(normals)
    return x


def flow_heun(x: Tensor, sigmas: list[float]) -> Tensor:
    for s, t in itertools.pairwise(sigmas):
        d = (x - denoise(x, s)) / s
        stage = x + (t - s) * d
        x = stage if t == 0.0 else x + (t - s) * 0.5 * (d + (stage - denoise(stage, t)) / t)
    return x


@pytest.mark.parametrize("sigmas", [FLOW, FLOW[1:]], ids=["from pure noise", "image to image"])
def test_parity_on_flows(sigmas: Tensor) -> None:
    x, levels = sigmas[0] * START, sigmas.tolist()
    options: dict[str, Any] = {"flow": True}
    close(run("dpmpp_2m", sigmas, **options), flow_2m(x, levels, iter(NORMALS)))
    close(run("dpmpp_2m_sde", sigmas, noise_sampler=stored(), **options), flow_2m(x, levels, iter(NORMALS), 1.0))
    close(run("euler", sigmas, **options), reference.kd_euler(denoise, x, levels, iter(NORMALS)))
    close(run("heun", sigmas, **options), flow_heun(x, levels))
    for eta in (1.0, 0.5):
        ours = run("euler_ancestral_rf", sigmas, noise_sampler=stored(), eta=math.sqrt(eta), **options)
        close(ours, flow_ancestral(x, levels, iter(NORMALS), eta))


def test_exponential_steps_must_know_a_flow() -> None:
    """The same call without flow=True is another sampler, unlike an Euler step, which is the same."""
    sigmas = FLOW[1:]
    close(run("euler", sigmas, flow=False), run("euler", sigmas, flow=True))
    apart = (run("dpmpp_2m", sigmas, flow=False) - run("dpmpp_2m", sigmas, flow=True)).abs().max()
    assert float(apart) > 1e-3


class CONST:
    """ComfyUI's sampling of flow models."""


class EPS:
    """ComfyUI's sampling of eps models."""


def comfy_model(sampling: type) -> Any:
    """What ComfyUI hands to a sampler function: the sampling is two ``inner_model`` down, and mixed from two classes."""
    mixed = type("ModelSampling", (type("ModelSamplingDiscrete", (), {}), sampling), {})()

    class Wrapped:
        inner_model = types.SimpleNamespace(inner_model=types.SimpleNamespace(model_sampling=mixed))

        def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
            return denoise(x, sigma)

    return Wrapped()


def test_flow_models_of_comfyui_are_recognised() -> None:
    assert k_diffusion.is_flow(comfy_model(CONST))
    assert not k_diffusion.is_flow(comfy_model(EPS))
    assert not k_diffusion.is_flow(denoise)
    ours = run("dpmpp_2m", FLOW, model=comfy_model(CONST))
    close(ours, run("dpmpp_2m", FLOW, flow=True))
    close(run("dpmpp_2m", model=comfy_model(EPS)), run("dpmpp_2m"))
    close(run("dpmpp_2m", FLOW[1:], model=comfy_model(CONST), flow=False), run("dpmpp_2m", FLOW[1:], flow=False))


# --- what the loop hands over ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edm_euler", "edm_heun", "res_3s", "unipc_3"])
def test_the_callback_comes_once_a_step(name: str) -> None:
    told: list[dict[str, Any]] = []
    copies: list[Tensor] = []

    def callback(d: dict[str, Any]) -> None:
        told.append(d)
        copies.append(d["x"].clone())

    plain = run(name)
    assert torch.equal(run(name, callback=callback), plain)
    n = len(SIGMAS) - 1
    assert [d["i"] for d in told] == list(range(n))
    assert [float(d["sigma"]) for d in told] == SIGMAS[:-1].tolist()
    assert torch.equal(told[0]["x"], SIGMAS[0] * START)
    for d, copy in zip(told, copies, strict=True):
        assert set(d) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert torch.equal(d["x"], copy)  # not a buffer that is used again
        assert float(d["sigma_hat"]) == float(d["sigma"])
        close(d["denoised"], denoise(d["x"], d["sigma"]))
    if name == "edm_euler":
        x = SIGMAS[0] * START
        for i, d in enumerate(told):
            close(d["x"], x)
            x = x + (x - denoise(x, SIGMAS[i])) / SIGMAS[i] * (SIGMAS[i + 1] - SIGMAS[i])


def test_sigma_hat_is_where_the_network_was_called() -> None:
    told: list[dict[str, Any]] = []
    run("edm_sde", callback=told.append, seed=0)
    hats = [float(d["sigma_hat"]) / float(d["sigma"]) for d in told]
    assert hats[0] == 1.0  # capped where the run starts
    assert all(abs(h - math.sqrt(2.0)) < 1e-9 for h in hats[1:])
    for d in told:
        close(d["denoised"], denoise(d["x"], d["sigma_hat"]), 1e-9)


def test_an_interrupt_of_the_callback_passes() -> None:
    class Interrupt(Exception):
        pass

    def callback(d: dict[str, Any]) -> None:
        if d["i"] == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        run("edm_heun", callback=callback)


def test_the_model_gets_its_arguments_and_no_gradient() -> None:
    calls: list[Any] = []

    def model(x: Tensor, sigma: Tensor, cond: str, seed: int) -> Tensor:
        calls.append((sigma.shape, sigma.dtype, cond, seed, torch.is_grad_enabled()))
        return denoise(x, sigma)

    out = run("edm_heun", model=model, x=START.clone().requires_grad_(), extra_args={"cond": "cat", "seed": 7})
    assert len(calls) == 2 * (len(SIGMAS) - 1) - 1
    assert set(calls) == {((BATCH,), torch.float64, "cat", 7, False)}
    assert not out.requires_grad


def test_the_start_is_left_alone() -> None:
    x = SIGMAS[0] * START
    copy = x.clone()
    k_diffusion.sampler("dpmpp_2m")(denoise, x, SIGMAS, disable=True)
    assert torch.equal(x, copy)


# --- noise --------------------------------------------------------------------------------------------------------------


def test_seeds() -> None:
    """A seed is a function of (seed, sample); extra_args and torch's global generator give one too; noise= is a source."""
    first = run("dpmpp_2m_sde", seed=3)
    assert torch.equal(first, run("dpmpp_2m_sde", seed=3))
    assert torch.equal(first, run("dpmpp_2m_sde", model=lambda x, s, seed: denoise(x, s), extra_args={"seed": 3}))
    close(run("dpmpp_2m_sde", x=START[:2], seed=3), first[:2])
    assert not torch.equal(first, run("dpmpp_2m_sde", seed=4))
    assert not torch.equal(first, run("dpmpp_2m_sde", seed=3, noise="white"))
    torch.manual_seed(9)
    one, two = run("dpmpp_2m_sde"), run("dpmpp_2m_sde")
    assert not torch.equal(one, two)
    torch.manual_seed(9)
    assert torch.equal(one, run("dpmpp_2m_sde"))
    state = torch.get_rng_state()
    run("dpmpp_2m")
    run("dpmpp_2m_sde", seed=1)
    run("dpmpp_2m_sde", noise_sampler=stored())
    assert torch.equal(state, torch.get_rng_state())


def test_one_path_a_seed_at_any_number_of_steps() -> None:
    """Brownian noise: twice the steps end near the same place; white noise does not."""

    def grid(n: int) -> Tensor:
        return torch.exp(torch.linspace(math.log(10.0), math.log(0.05), n + 1, dtype=torch.float64))

    def gap(noise: str) -> float:
        coarse, fine = (run("ddpm", grid(n), x=randn(50, DIM, seed=3), seed=1, noise=noise) for n in (64, 128))
        return float((coarse - fine).abs().median())  # few samples end at another fixed point

    assert gap("brownian") < 0.2 * gap("white")


def test_what_a_noise_sampler_is_asked_for() -> None:
    asked: list[tuple[float, float]] = []

    def noise_sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        asked.append((float(sigma), float(sigma_next)))
        return torch.zeros(BATCH, DIM, dtype=torch.float32)

    out = run("euler_ancestral", noise_sampler=noise_sampler)
    assert asked == list(itertools.pairwise(SIGMAS.tolist()))[:-1]
    assert out.dtype == torch.float64


# --- sigmas -------------------------------------------------------------------------------------------------------------


def test_repeated_sigmas_are_no_steps() -> None:
    doubled = torch.cat([SIGMAS[:3], SIGMAS[2:4], SIGMAS[3:]])
    told: list[int] = []
    close(run("dpmpp_2m", doubled, callback=lambda d: told.append(d["i"])), run("dpmpp_2m"))
    assert told == [0, 1, 2, 4, 6, 7, 8]
    assert [float(doubled[i]) for i in told] == SIGMAS[:-1].tolist()


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_do(n: int) -> None:
    x = START.clone()
    assert k_diffusion.sampler("dpmpp_2m")(denoise, x, SIGMAS[:n], disable=True) is x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_integrated_in_float32(dtype: torch.dtype) -> None:
    """The model sees its own dtype; the result is the float32 run's, rounded once, where the network is exact in both."""
    seen: set[torch.dtype] = set()

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        seen.add(x.dtype)
        return torch.full_like(x, 0.25)

    ours = run("dpmpp_2m", SIGMAS[:-1].float(), model=model, x=START.to(dtype))
    assert seen == {dtype}
    assert ours.dtype == dtype
    start = (SIGMAS[0].to(dtype) * START.to(dtype)).float()
    wanted = k_diffusion.sampler("dpmpp_2m")(lambda x, s: torch.full_like(x, 0.25), start, SIGMAS[:-1].float(), disable=True)
    assert torch.equal(ours, wanted.to(dtype))


def test_encoding() -> None:
    """Rising sigmas go to noise, along the same flow."""
    up = SIGMAS[:-1].flip(0)
    fine = torch.exp(torch.linspace(math.log(0.03), math.log(14.6), 200, dtype=torch.float64))
    x = k_diffusion.sampler("edm_rk4")(denoise, START, fine, disable=True)
    back = k_diffusion.sampler("edm_rk4")(denoise, x, fine.flip(0), disable=True)
    close(back, START, 1e-5)
    assert run("edm_heun", up).isfinite().all()


@pytest.mark.parametrize("name", [n for n in one_of_each_kind() if SOLVERS[n].solver.linear])
def test_every_sampler_runs_or_says_why_not(name: str) -> None:
    for sigmas, flow in ((SIGMAS, False), (FLOW[1:], True)):
        if name != "ddpm_discrete":
            assert float(run(name, sigmas, flow=flow, seed=0).abs().max()) < 50.0
    try:
        out = run(name, FLOW, flow=True, seed=0)
    except (InputError, PathError) as error:
        message = str(error)
    else:
        message = "" if float(out.abs().max()) < 50.0 else "diverged"
    # alpha = 0: methods in rho or eps, and slopes in t of an SDE, have no first step there
    assert message == "" or "alpha" in message or "infinite at t = 1" in message


@pytest.mark.parametrize(
    "name", ["dpmpp_2m", "unipc_3", "res_3s", "heun", "rk4", "ddpm", "euler_ancestral_rf", "dpmpp_2m_sde", "seeds_3"]
)
def test_samplers_that_start_a_flow_from_pure_noise(name: str) -> None:
    assert float(run(name, FLOW, flow=True, seed=0).abs().max()) < 50.0


def test_a_sampler_of_another_path() -> None:
    with pytest.raises(PathError, match="ddpm_discrete needs a variance-preserving"):
        run("ddpm_discrete", seed=0)


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"'dopri5' chooses its steps.*k-diffusion"):
        k_diffusion.sampler("dopri5")
    with pytest.raises(InputError, match="'pc_ddpm' has no table"):
        k_diffusion.sampler("pc_ddpm")
    with pytest.raises(InputError, match=r"sigmas=.*1-D tensor"):
        k_diffusion.sampler("ddim")(denoise, START, SIGMAS.tolist())  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="strictly decreasing"):
        run("ddim", torch.tensor([5.0, 1.0, 2.0, 0.0], dtype=torch.float64))
    with pytest.raises(InputError, match=r"sigmas reach 14\.6.*flow=False"):
        run("ddim", flow=True)
    with pytest.raises(InputError, match="sigmas reach inf"):
        run("ddim", torch.tensor([math.inf, 1.0]))
    with pytest.raises(InputError, match="noise='pink'"):
        run("ddpm", noise="pink")
    with pytest.raises(InputError, match="does not take a noise level"):
        run("edm_heun", eta=1.0)
    with pytest.raises(TypeError, match="s_churn"):
        run("edm_heun", s_churn=1.0)


def test_names() -> None:
    assert set(k_diffusion.names()) == {n for n, e in SOLVERS.items() if e.solver.linear}
    assert k_diffusion.sampler("unipc_3").__name__ == "sample_unipc_3"


# --- the example node ---------------------------------------------------------------------------------------------------


class KSAMPLER:
    """As ComfyUI's: scales the noise, calls the function with its own options, shows previews by the callback's keys."""

    def __init__(self, sampler_function: Any, extra_options: dict[str, Any] | None = None) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, model: Any, sigmas: Tensor, noise: Tensor, latent: Tensor, flow: bool) -> tuple[Tensor, list[Any]]:
        x = sigmas[0] * noise + (1.0 - sigmas[0]) * latent if flow else latent + sigmas[0] * noise
        shown: list[Any] = []
        out = self.sampler_function(
            model,
            x,
            sigmas,
            extra_args={"seed": 1},
            callback=lambda d: shown.append((d["i"], d["denoised"], d["x"])),
            disable=True,
            **self.extra_options,
        )
        return out, shown


def test_the_comfyui_node(monkeypatch: pytest.MonkeyPatch) -> None:
    comfy, kd, kd_sampling, samplers = (
        types.ModuleType(n) for n in ("comfy", "comfy.k_diffusion", "comfy.k_diffusion.sampling", "comfy.samplers")
    )
    names = ["euler"]
    samplers.KSampler = type("KSampler", (), {"SAMPLERS": names})  # pyright: ignore[reportAttributeAccessIssue]
    samplers.KSAMPLER = KSAMPLER  # pyright: ignore[reportAttributeAccessIssue]
    comfy.samplers, comfy.k_diffusion, kd.sampling = samplers, kd, kd_sampling  # pyright: ignore[reportAttributeAccessIssue]
    for module in (comfy, kd, kd_sampling, samplers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    path = Path(__file__).resolve().parent.parent / "docs" / "examples" / "comfyui_node.py"
    spec = importlib.util.spec_from_file_location("comfyui_node", path)
    assert spec is not None
    assert spec.loader is not None
    node = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(node)

    assert len(names) == 1 + len(node.LISTED)
    for name in names[1:]:  # as ComfyUI finds a sampler by its name
        function = getattr(kd_sampling, f"sample_{name}")
        for model, sigmas, flow in ((comfy_model(EPS), SIGMAS, False), (comfy_model(CONST), FLOW, True)):
            out, shown = KSAMPLER(function).sample(model, sigmas, START, torch.zeros_like(START), flow)
            ours = name.removeprefix("solvers_")
            assert torch.equal(out, run(ours, sigmas, flow=flow, seed=1))
            assert [i for i, _, _ in shown] == list(range(len(sigmas) - 1))

    (make,) = node.NODE_CLASS_MAPPINGS.values()
    inputs = make.INPUT_TYPES()["required"]
    assert set(inputs) == {"solver", "own_eta", "eta", "s_noise"}
    assert "dpmpp_2m_sde" in inputs["solver"][0]
    (sampler,) = getattr(make(), make.FUNCTION)("dpmpp_2m_sde", False, 0.5, 1.2)
    out, _ = sampler.sample(comfy_model(EPS), SIGMAS, START, torch.zeros_like(START), False)
    assert torch.equal(out, run("dpmpp_2m_sde", eta=0.5, s_noise=1.2, seed=1))
    (sampler,) = make().make("dpmpp_2m_sde", True, 0.5, 1.0)
    out, _ = sampler.sample(comfy_model(EPS), SIGMAS, START, torch.zeros_like(START), False)
    assert torch.equal(out, run("dpmpp_2m_sde", seed=1))
