"""SolverScheduler inside diffusers' own pipelines, with tiny random networks: the same picture as diffusers' own schedulers.

Prompts are given as embeddings and there is no text encoder, but diffusers will not import most pipelines without
``transformers``; those tests are skipped where it is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sde.errors import InputError

diffusers = pytest.importorskip("diffusers")

from solvers.bridges.diffusers import SolverScheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

BAR = 1e-4
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LEADING, TRAILING = {**STABLE, "timestep_spacing": "leading"}, {**STABLE, "timestep_spacing": "trailing"}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def needs_transformers() -> None:
    pytest.importorskip("transformers")


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def made(cls: Any, **config: Any) -> Any:
    """A model with random weights, also where its own initialisation is zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = cls(**config).eval()
        for parameter in model.parameters():
            if not bool(parameter.abs().max() > 0.0):
                nn.init.normal_(parameter, std=0.2)
    return model


def run(cls: Any, scheduler: Any, parts: dict[str, Any], **call: Any) -> Tensor:
    pipe = cls(scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe(generator=generator(), **call).images


def distance(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert bool(theirs.isfinite().all())
    inside = (theirs > 0.0) & (theirs < 1.0) if float(theirs.min()) >= 0.0 and float(theirs.max()) <= 1.0 else theirs != 0.0
    assert float(theirs.std()) > 0.05  # a picture, not a constant
    assert float(inside.float().mean()) > 0.3  # nor mostly clipped, where nothing could differ
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compare(picture: Callable[[Any], Tensor], theirs: Any, solver: str, **options: Any) -> None:
    ours = SolverScheduler.from_config(theirs.config, solver=solver, **options)
    assert distance(picture(ours), picture(theirs)) <= BAR


# --- tiny models ----------------------------------------------------------------------------------------------------------


@cache
def vae(channels: int = 4) -> Any:
    block = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16, "shift_factor": 0.1}
    return made(diffusers.AutoencoderKL, latent_channels=channels, **config, **block)


UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}


@cache
def unet(channels: int = 4, **more: Any) -> Any:
    return made(diffusers.UNet2DConditionModel, in_channels=channels, out_channels=4, **UNET, **CROSS, **more)


@cache
def pixel_unet() -> Any:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return made(diffusers.UNet2DModel, in_channels=3, out_channels=3, **UNET, **blocks)


@cache
def dit() -> Any:
    return made(
        diffusers.DiTTransformer2DModel,
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        norm_type="ada_norm_zero",
    )


@cache
def sd3() -> Any:
    return made(
        diffusers.SD3Transformer2DModel,
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
    )


@cache
def flux() -> Any:
    return made(
        diffusers.FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


# --- pixels and classes ---------------------------------------------------------------------------------------------------


def ddpm_picture(scheduler: Any) -> Tensor:
    parts = {"unet": pixel_unet()}
    return run(diffusers.DDPMPipeline, scheduler, parts, batch_size=2, num_inference_steps=10, output_type="pt")


@pytest.mark.parametrize(
    ("solver", "theirs"),
    [
        (
            "ddpm",
            lambda: diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction"),
        ),
        ("ddpm", lambda: diffusers.DDPMScheduler(clip_sample_range=0.3, timestep_spacing="leading")),
        (
            "ddim",
            lambda: diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction"),
        ),
        ("dpmpp_2m", lambda: diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing", prediction_type="sample")),
    ],
)
def test_ddpm_pipeline(solver: str, theirs: Callable[[], Any]) -> None:
    """A pipeline that never scales input or noise."""
    compare(ddpm_picture, theirs(), solver)


def test_ddpm_pipeline_runs_two_calls_a_step() -> None:
    heun = ddpm_picture(SolverScheduler(solver="edm_heun", prediction_type="v_prediction"))
    fine = ddpm_picture(SolverScheduler(solver="dpmpp_3m", prediction_type="v_prediction"))
    assert 0.0 < distance(heun, fine) < 0.5


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_dit_pipeline(guidance: float) -> None:
    """Learned variance in the output, and both halves of the guided batch in the state."""

    def picture(scheduler: Any) -> Tensor:
        parts = {"transformer": dit(), "vae": vae()}
        call = {"class_labels": [1, 2], "guidance_scale": guidance, "num_inference_steps": 10, "output_type": "pt"}
        return run(diffusers.DiTPipeline, scheduler, parts, **call)

    compare(picture, diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), "ddim")
    compare(picture, diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing"), "dpmpp_2m")


# --- Stable Diffusion -----------------------------------------------------------------------------------------------------

PROMPT, NEGATIVE = randn(1, 4, 8, seed=1), randn(1, 4, 8, seed=2)
IMAGE, MASK = torch.rand(1, 3, 16, 16, generator=generator(4)), torch.zeros(1, 1, 16, 16)
MASK[..., 8:] = 1.0

TASKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "text to image": ("StableDiffusionPipeline", {"height": 16, "width": 16}, 4),
    "image to image": ("StableDiffusionImg2ImgPipeline", {"image": IMAGE, "strength": 0.5}, 4),
    "inpaint": ("StableDiffusionInpaintPipeline", {"image": IMAGE, "mask_image": MASK, "height": 16, "width": 16}, 4),
    "inpaint some": (
        "StableDiffusionInpaintPipeline",
        {"image": IMAGE, "mask_image": MASK, "height": 16, "width": 16, "strength": 0.6},
        4,
    ),
    "inpaint by nine channels": (
        "StableDiffusionInpaintPipeline",
        {"image": IMAGE, "mask_image": MASK, "height": 16, "width": 16, "strength": 0.6},
        9,
    ),
}


def stable(task: str, steps: int | None = 6, **more: Any) -> Callable[[Any], Tensor]:
    name, call, channels = TASKS[task]

    def picture(scheduler: Any) -> Tensor:
        parts = {"unet": unet(channels), "vae": vae(), "safety_checker": None, "feature_extractor": None}
        parts |= {"text_encoder": None, "tokenizer": None, "requires_safety_checker": False}
        prompts = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE, "guidance_scale": 3.0}
        options = {**call, **({"num_inference_steps": steps} if steps else {}), **more}
        return run(getattr(diffusers, name), scheduler, parts, output_type="latent", **prompts, **options)

    return picture


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("solver", "name", "options"),
    [
        ("edm_euler", "EulerDiscreteScheduler", LEADING),
        ("edm_euler", "EulerDiscreteScheduler", {**LEADING, "use_karras_sigmas": True}),
        ("edm_heun", "HeunDiscreteScheduler", LEADING),
        ("ddim", "DDIMScheduler", {**LEADING, "clip_sample": False}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", TRAILING),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", LEADING),
    ],
    ids=["euler", "euler karras", "heun", "ddim", "2m", "ancestral"],
)
def test_stable_diffusion(task: str, solver: str, name: str, options: dict[str, Any]) -> None:
    """With guidance; leading spacing gives Euler's family the unit initial noise that ours has."""
    needs_transformers()
    compare(stable(task), getattr(diffusers, name)(**options), solver)


def test_stable_diffusion_with_lists() -> None:
    """timesteps= and sigmas= of the pipeline."""
    needs_transformers()
    theirs = diffusers.DPMSolverMultistepScheduler(**STABLE)
    compare(stable("text to image", None, timesteps=[981, 700, 420, 200, 41]), theirs, "dpmpp_2m")
    sigma = 12.0
    latents = randn(1, 4, 8, 8, seed=5)
    ours = SolverScheduler(solver="edm_euler", **STABLE)
    theirs = diffusers.EulerDiscreteScheduler(**LEADING)
    levels = [sigma, 5.0, 2.0, 0.7, 0.1, 0.0]
    a = stable("text to image", None, sigmas=levels, latents=latents * sigma / (1.0 + sigma**2) ** 0.5)(ours)
    # theirs scales the noise by sqrt(sigma^2 + 1)
    b = stable("text to image", None, sigmas=levels, latents=latents * sigma / (1.0 + sigma**2) ** 0.5)(theirs)
    assert distance(a, b) <= BAR


def test_begin_index_matters() -> None:
    """The same image-to-image run without its begin_index is far off: the bar above can fail."""
    needs_transformers()
    theirs = diffusers.EulerDiscreteScheduler(**LEADING)
    ours = SolverScheduler.from_config(theirs.config, solver="edm_euler")
    wanted = stable("image to image")(theirs)
    ours.set_begin_index = lambda begin_index=0: setattr(ours, "_begin_index", 0)
    with pytest.raises(InputError, match="entry 0 of timesteps is"):
        stable("image to image")(ours)
    ours._check_order = lambda timestep: None
    assert distance(stable("image to image")(ours), wanted) > 100.0 * BAR


def test_stable_diffusion_xl() -> None:
    """Base and refiner: the first stops in the middle, the second starts there."""
    needs_transformers()
    parts = {"unet": unet(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=40)}
    parts |= {"vae": vae(), "text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    call = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE, "pooled_prompt_embeds": randn(1, 16, seed=6)}
    call |= {"negative_pooled_prompt_embeds": randn(1, 16, seed=7), "guidance_scale": 3.0, "output_type": "latent"}

    def picture(name: str, **more: Any) -> Callable[[Any], Tensor]:
        cls = getattr(diffusers, name)
        return lambda s: run(cls, s, {**parts, "add_watermarker": False}, num_inference_steps=6, **call, **more)

    compare(picture("StableDiffusionXLPipeline", height=16, width=16), diffusers.EulerDiscreteScheduler(**LEADING), "edm_euler")
    ddim = diffusers.DDIMScheduler(**LEADING, clip_sample=False)
    compare(picture("StableDiffusionXLPipeline", height=16, width=16, denoising_end=0.6), ddim, "ddim")
    refiner = "StableDiffusionXLImg2ImgPipeline"
    compare(picture(refiner, image=IMAGE, denoising_start=0.5), ddim, "ddim")
    compare(picture(refiner, image=IMAGE, strength=0.5), diffusers.HeunDiscreteScheduler(**LEADING), "edm_heun")


def test_a_pipeline_is_saved_and_loaded(tmp_path: Path) -> None:
    """The class is stored by module and name, and found again."""
    scheduler = SolverScheduler(solver="unipc_3", noise="white", grid="cosine", prediction_type="v_prediction")
    pipe = diffusers.DDPMPipeline(pixel_unet(), scheduler)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is SolverScheduler
    assert again.scheduler.config.solver == "unipc_3"
    pictures = []
    for p in (pipe, again):
        p.set_progress_bar_config(disable=True)
        pictures.append(p(generator=generator(), num_inference_steps=4, output_type="pt").images)
    assert distance(*pictures) <= BAR  # networks of other memory layout round otherwise


def test_half_precision_pipeline() -> None:
    """bfloat16 networks: the latents stay bfloat16 for the pipeline, and near the float32 picture."""
    needs_transformers()

    def picture(dtype: torch.dtype) -> Tensor:
        parts = {"unet": made(diffusers.UNet2DConditionModel, in_channels=4, out_channels=4, **UNET, **CROSS).to(dtype)}
        parts |= {"vae": vae(), "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        parts |= {"text_encoder": None, "tokenizer": None}
        scheduler = SolverScheduler(solver="edm_heun", **TRAILING)
        prompts = {"prompt_embeds": PROMPT.to(dtype), "negative_prompt_embeds": NEGATIVE.to(dtype)}
        latents = randn(1, 4, 8, 8, seed=5).to(torch.bfloat16).to(dtype)
        call = {"height": 16, "width": 16, "num_inference_steps": 6, "latents": latents, "output_type": "latent"}
        return run(diffusers.StableDiffusionPipeline, scheduler, parts, **prompts, **call)

    half = picture(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert distance(half.float(), picture(torch.float32)) < 0.05


# --- flows ----------------------------------------------------------------------------------------------------------------

WORDS, POOLED = randn(1, 4, 16, seed=8), randn(1, 16, seed=9)


def sd3_picture(name: str = "StableDiffusion3Pipeline", **more: Any) -> Callable[[Any], Tensor]:
    call = {"prompt_embeds": WORDS, "negative_prompt_embeds": -WORDS, "pooled_prompt_embeds": POOLED}
    call |= {"negative_pooled_prompt_embeds": -POOLED, "num_inference_steps": 5, "output_type": "latent"}
    call |= more or {"height": 16, "width": 16}
    empty = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    parts = {"transformer": sd3(), "vae": vae(), **dict.fromkeys(empty)}
    return lambda scheduler: run(getattr(diffusers, name), scheduler, parts, **call)


def flux_picture(name: str = "FluxPipeline", **more: Any) -> Callable[[Any], Tensor]:
    call = {"prompt_embeds": WORDS, "pooled_prompt_embeds": POOLED, "height": 16, "width": 16, "output_type": "latent"}
    empty = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = {"transformer": flux(), "vae": vae(), **dict.fromkeys(empty)}
    return lambda scheduler: run(getattr(diffusers, name), scheduler, parts, **{"num_inference_steps": 5, **call, **more})


SHIFTS = [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}]


@pytest.mark.parametrize("options", [*SHIFTS, {"shift_terminal": 0.1}], ids=str)
def test_stable_diffusion_3(options: dict[str, Any]) -> None:
    """No sigmas are passed; a static shift moves the last one twice."""
    needs_transformers()
    compare(sd3_picture(), FLOW(**options), "euler")


@pytest.mark.parametrize("options", SHIFTS, ids=str)
def test_flux(options: dict[str, Any]) -> None:
    """sigmas and mu are always passed."""
    needs_transformers()
    compare(flux_picture(), FLOW(**options), "euler")


def test_flows_from_images() -> None:
    needs_transformers()
    compare(sd3_picture("StableDiffusion3Img2ImgPipeline", image=IMAGE, strength=0.6), FLOW(shift=3.0), "euler")
    compare(flux_picture("FluxImg2ImgPipeline", image=IMAGE, strength=0.6), FLOW(use_dynamic_shifting=True), "euler")
    compare(flux_picture("FluxInpaintPipeline", image=IMAGE, mask_image=MASK, strength=0.8), FLOW(shift=2.0), "euler")


@cache
def fine_flux() -> Tensor:
    return flux_picture(num_inference_steps=50)(
        SolverScheduler.from_config(FLOW(use_dynamic_shifting=True).config, solver="heun")
    )


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "unipc_3", "res_3s", "ddpm", "euler_ancestral_rf"])
def test_other_samplers_in_flux(solver: str) -> None:
    """More samplers than diffusers has for flows (its own Heun cannot run in Flux); ODE samplers agree at many steps."""
    needs_transformers()
    config = FLOW(use_dynamic_shifting=True).config
    ours = SolverScheduler.from_config(config, solver=solver, grid="cosine")
    out = flux_picture(num_inference_steps=12)(ours)
    assert 0.0 < distance(out, fine_flux()) < (3.0 if solver in ("ddpm", "euler_ancestral_rf") else 0.05)


def test_two_calls_a_step_from_an_image() -> None:
    """Heun in Stable Diffusion 3 from an image: the pipeline slices by ``order`` and starts at a step."""
    needs_transformers()
    scheduler = SolverScheduler.from_config(FLOW(shift=3.0).config, solver="heun")
    starts: list[int] = []
    begin = scheduler.set_begin_index
    scheduler.set_begin_index = lambda begin_index=0: (starts.append(begin_index), begin(begin_index))[1]
    out = sd3_picture("StableDiffusion3Img2ImgPipeline", image=IMAGE, strength=0.6)(scheduler)
    assert starts == [4]
    assert scheduler.step_index == len(scheduler.timesteps) == 10
    fine = sd3_picture("StableDiffusion3Img2ImgPipeline", image=IMAGE, strength=0.6)(FLOW(shift=3.0))
    assert distance(out, fine) < 0.2


def test_the_page_on_bridges_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Every block of docs/bridges.md, the torchsde and torchdiffeq lines among them."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "bridges.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(code) == 5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        results = []
        for block in code:
            scope: dict[str, Any] = {}
            exec(compile(block, "bridges.md", "exec"), scope)  # noqa: S102
            results += [scope[name] for name in ("images", "x", "x0", "x1") if name in scope]
    assert all(bool(x.isfinite().all()) for x in results)
    printed = capsys.readouterr().out
    assert "torch.Size([1, 3, 8, 8])" in printed
    assert "\n5 0.2" in printed
