"""``python -m benchmarks train digits``: denoising score matching on the 8x8 digits of scikit-learn, reproducible from a seed.

EDM's recipe (Karras et al. 2022): the network predicts F, log sigma is normal, the loss is the network's own squared error,
and an exponential moving average of the weights is kept. Same seed, steps, machine and versions: the same file, byte for byte.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path as File
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from scores import denoising_loss
from scores.matching import draw_noise, draw_times
from sde import EDM
from sde.errors import InputError
from solvers import sample

from . import metrics, networks, problems
from .files import folder, write


@dataclass(frozen=True)
class Train:
    """Train the small network of 8x8 digits again (about three minutes on one core)."""

    what: Annotated[Literal["digits"], tyro.conf.Positional] = "digits"
    """What to train."""
    seed: int = 0
    """Start values, order of the data, noise: everything random."""
    steps: int = 9000
    """Optimiser steps."""
    out: File = File("out/train/digits.safetensors")
    """The weight file to write; --out benchmarks/weights/digits.safetensors replaces the shipped one."""
    batch: int = 256
    """Digits a step."""
    rate: float = 2e-3
    """Peak learning rate (warm-up, then a cosine to zero)."""
    average: float = 0.999
    """Decay a step of the moving average."""
    log_sigma: tuple[float, float] = (-0.6, 1.2)
    """Mean and standard deviation of log sigma in training."""
    threads: int = 1
    """Processor threads. A small network gains nothing from more; another number may change the last bits."""
    quality: bool = True
    """Measure the trained network against held-out digits."""


def run(config: Train) -> int:
    """Train, write the file, say how good the network is."""
    for name in ("steps", "batch", "threads"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: must be >= 1")
    torch.set_num_threads(config.threads)
    folder(config.out.parent)
    network, about = train(config)
    write(config.out, networks.to_bytes(network, about))
    print(f"wrote {config.out}, {config.out.stat().st_size / 1e6:.2f} MB")
    if config.quality:
        for line in quality(config.out):
            print(line)
    return 0


def train(config: Train) -> tuple[networks.DigitNetwork, dict[str, object]]:
    """The averaged network, and what its file says about it."""
    from tqdm.auto import tqdm

    data, _ = problems.split()
    sigma_data = round(float(data.std()), 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = networks.DigitNetwork()
        average = copy.deepcopy(network)
        score = networks.edm_score(network, sigma_data, mode="keep")
        generator = torch.Generator().manual_seed(config.seed)
        optimiser = torch.optim.Adam(network.parameters(), config.rate, betas=(0.9, 0.99), fused=True)
        live, kept = list(network.parameters()), list(average.parameters())
        for step in tqdm(range(config.steps), desc="training", unit="step", mininterval=0.5):
            ramp = min(1.0, (step + 1) / 200) * 0.5 * (1.0 + math.cos(math.pi * step / config.steps))
            for group in optimiser.param_groups:
                group["lr"] = config.rate * ramp
            x0 = data[torch.randint(len(data), (config.batch,), generator=generator)]
            noise, t = draw_noise(x0, generator=generator), times(config, generator)
            loss = denoising_loss(score, x0, noise=noise, t=t, weight=None).mean() / x0[0].numel()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            fresh = 1.0 - min(config.average, (1.0 + step) / (10.0 + step))
            with torch.no_grad():
                for a, b in zip(kept, live, strict=True):
                    a.lerp_(b, fresh)
    about: dict[str, object] = {
        "path": "EDM",
        "predicts": "F",
        "sigma_data": sigma_data,
        "network": {"kind": "DigitNetwork", **average.settings},
        "data": "scikit-learn digits, 8x8 in [-1, 1], 1500 of 1797",
        "data_sha256": hashlib.sha256(data.numpy().tobytes()).hexdigest(),
        "seed": config.seed,
        "steps": config.steps,
        "batch": config.batch,
        "rate": config.rate,
        "average": config.average,
        "log_sigma": list(config.log_sigma),
    }
    return average, about


def times(config: Train, generator: torch.Generator) -> Tensor:
    """sigma with log sigma normal, one a digit, stratified over the batch, inside the path's domain."""
    path, (mean, sd) = EDM(), config.log_sigma
    normal = draw_times(EDM(T=1e6), config.batch, "log_normal", generator=generator, stratified=True).log().add(1.2).div(1.2)
    return torch.exp(mean + sd * normal).clamp(path.t_min, path.T)


def quality(file: File, n: int = 1000, seed: int = 1) -> list[str]:
    """How close n generated digits are to held-out ones, in words, beside the same distances of training digits."""
    training, held_out = problems.split()
    score = networks.load(file)
    made = sample(score, (n, *training.shape[1:]), solver="edm_heun", nfe=64, grid="karras", seed=seed).x
    along, m = metrics.directions(64), len(held_out)
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(len(training), generator=generator)[:m] for _ in range(8)]
    floor = metrics.level([metrics.sliced_w2(training[p], held_out, along) for p in picks])
    ours = metrics.level([metrics.sliced_w2(block, held_out, along) for block in made.split(m) if len(block) == m])
    energy = metrics.energy_distance(made, held_out)
    spare = metrics.level([metrics.energy_distance(training[p], held_out) for p in picks])
    near, near_true = (metrics.nearest_distance(x, training) for x in (made, held_out))
    copies = float((near < near_true.min()).double().mean())

    def three(d: Tensor) -> str:
        return " / ".join(f"{v:.2f}" for v in d.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist())

    return [
        f"sliced W2 to {m} held-out digits   {ours.mean:.3f}   (training digits: {floor.mean:.3f} +- {floor.sd:.3f})",
        f"energy distance to the same         {energy:.4f}  (training digits: {spare.mean:.4f} +- {spare.sd:.4f})",
        f"distance to the nearest training digit, 10 / 50 / 90 %: {three(near)}   (held-out digits: {three(near_true)})",
        f"nearer to a training digit than any held-out digit is: {100 * copies:.1f} % of the generated ones",
    ]
