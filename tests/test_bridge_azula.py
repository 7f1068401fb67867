"""Our samplers on azula's denoisers: their own samplers' formulas, and azula itself where it is installed."""

from __future__ import annotations

import itertools
import math
import types
from typing import Any

import parity_reference as reference
import pytest
import torch
from torch import Tensor

from sde.errors import InputError
from solvers.bridges.azula import Sampler, path_of


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, START = randn(3, 3, seed=0), randn(4, 3, seed=1)


def vp(t: Tensor) -> tuple[Tensor, Tensor]:
    """azula's VPSchedule."""
    alpha = torch.exp(math.log(1e-2) * t**2)
    return alpha, torch.sqrt(1.0 - alpha**2 + 1e-6)


def rectified(t: Tensor) -> tuple[Tensor, Tensor]:
    """azula's RectifiedSchedule."""
    return t * 1e-3 + (1.0 - t), t + (1.0 - t) * 1e-3


class Denoiser:
    """What azula's denoisers look like: a schedule, and a call that returns an object with a mean."""

    def __init__(self, schedule: Any) -> None:
        self.schedule, self.calls = schedule, []

    def mean(self, x: Tensor, t: Tensor, shift: float) -> Tensor:
        alpha, sigma = self.schedule(t)
        return (alpha * x + shift) / (alpha**2 + sigma**2) + 0.2 * torch.tanh(x @ WEIGHT.to(x.dtype) + t)

    def __call__(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Any:
        self.calls.append((t.shape, t.dtype, x.dtype))
        return types.SimpleNamespace(mean=self.mean(x, t, shift))


def levels(schedule: Any, n: int) -> tuple[Tensor, list[tuple[float, float]]]:
    t = torch.linspace(1.0, 0.0, n + 1, dtype=torch.float64)
    return t, [(float(a), float(s)) for a, s in map(schedule, t)]


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-11) -> None:
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@pytest.mark.parametrize("schedule", [vp, rectified])
def test_parity_with_their_formulas(schedule: Any) -> None:
    """DDIM, Euler, Heun and the Adams-Bashforth sampler, conditions handed on."""
    denoiser = Denoiser(schedule)
    t, table = levels(schedule, 12)

    def x0(x: Tensor, i: int) -> Tensor:
        return denoiser.mean(x, t[i], 0.3)

    def eps(x: Tensor, i: int) -> Tensor:
        alpha, sigma = table[i]
        return (x - alpha * x0(x, i)) / sigma

    nothing = iter(())
    close(
        Sampler(denoiser, "ddim", steps=12, silent=True)(START, shift=0.3), reference.azula_ddim(x0, START, table, nothing, 0.0)
    )
    heun = reference.azula_heun(eps, START, table, nothing, 2)
    close(Sampler(denoiser, "edm_heun", steps=12, silent=True)(START, shift=0.3), heun, 1e-9)
    close(
        Sampler(denoiser, "lms_3", steps=12, silent=True)(START, shift=0.3),
        reference.azula_zab(eps, START, table, nothing, 3),
        1e-9,
    )


def test_noise() -> None:
    """Ancestral sampling with our own stream of normals; seeds by generators."""
    denoiser = Denoiser(vp)

    def run(seed: int, batch: int = 4, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return Sampler(denoiser, "ddpm", steps=8, generator=generator, silent=True, **options)(START[:batch])

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert not torch.equal(run(3), run(3, noise="brownian"))
    close(run(3, 2), run(3)[:2])
    with pytest.raises(InputError, match="a list of 2 for 4 samples"):
        Sampler(denoiser, "ddpm", steps=8, generator=[torch.Generator()] * 2, silent=True)(START)


def test_init_and_timesteps() -> None:
    sampler = Sampler(Denoiser(vp), "dpmpp_2m", steps=6, grid="cosine", start=0.4, stop=0.1, silent=True)
    times = sampler.timesteps.tolist()
    assert len(times) == 7
    assert (times[0], times[-1]) == (0.4, 0.1)
    assert all(a > b for a, b in itertools.pairwise(times))
    torch.manual_seed(0)
    x = sampler.init((20000, 2), mean=2.0, var=0.25, dtype=torch.float64)
    alpha, sigma = map(float, vp(torch.tensor(0.4, dtype=torch.float64)))
    assert abs(float(x.mean()) - 2.0 * alpha) < 5.0 / math.sqrt(40000)
    assert abs(float(x.var()) - (0.25 * alpha**2 + sigma**2)) < 5.0 * math.sqrt(2.0 / 40000)
    generator = torch.Generator().manual_seed(1)
    seeded = Sampler(Denoiser(vp), "ddim", steps=2, generator=generator, silent=True)
    assert torch.equal(seeded.init((3,)), Sampler(Denoiser(vp), "ddim", steps=2, generator=generator.manual_seed(1)).init((3,)))


def test_dtypes_and_gradients() -> None:
    denoiser = Denoiser(vp)
    out = Sampler(denoiser, "edm_heun", steps=3, silent=True)(START.half().requires_grad_())
    assert out.dtype == torch.float16
    assert not out.requires_grad
    assert set(denoiser.calls) == {(torch.Size([]), torch.float32, torch.float16)}
    assert len(denoiser.calls) == 6


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"'dopri5' chooses its steps.*azula"):
        Sampler(Denoiser(vp), "dopri5")
    with pytest.raises(InputError, match="without a schedule"):
        Sampler(torch.nn.Identity())
    with pytest.raises(InputError, match="lambda"):
        path_of(lambda t: (t, 1.0 - t))


@pytest.mark.parametrize("name", ["VESchedule", "VPSchedule", "CosineSchedule", "RectifiedSchedule", "DecaySchedule"])
def test_parity_with_azula(name: str) -> None:
    noise = pytest.importorskip("azula.noise")
    sample = pytest.importorskip("azula.sample")
    denoise = pytest.importorskip("azula.denoise")

    class Theirs(denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = getattr(noise, name)(**({"sigma_max": 20.0} if name == "VESchedule" else {}))

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Any:
            alpha, sigma = self.schedule(t)
            return denoise.DiracPosterior(alpha * x_t / (alpha**2 + sigma**2) + 0.2 * torch.tanh(x_t @ WEIGHT))

    denoiser = Theirs()
    for solver, cls, options in (
        ("ddim", sample.DDIMSampler, {}),
        ("edm_euler", sample.EulerSampler, {}),
        ("edm_heun", sample.HeunSampler, {}),
        ("adams_3", sample.vABSampler, {"order": 3}),  # theirs is in sigma / (alpha + sigma), which is t here only
        ("lms_3", sample.zABSampler, {"order": 3}),
        ("dpmpp_3m", sample.xEABSampler, {"order": 3}),
    ):
        if solver == "adams_3" and name != "RectifiedSchedule":
            continue
        theirs = cls(denoiser, steps=10, silent=True, dtype=torch.float64, **options)(START)
        close(Sampler(denoiser, solver, steps=10, silent=True)(START), theirs, 1e-7)
