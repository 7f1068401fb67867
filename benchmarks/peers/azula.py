"""azula: a sampler is built around a denoiser with a schedule, and called on x_T.

Its times are a property of the sampler, which is given as the harness's grid; its schedule (alpha_t, sigma_t) is the path.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Library, Sampler, always, importing, with_eta
from .task import Task


def _run(module: Any, task: Task, name: str, **given: Any) -> Tensor:
    library, path, network = module, task.path, task.network

    class Schedule(library.noise.Schedule):
        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return path.alpha(t), path.sigma(t)

    class Denoiser(library.denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = Schedule()

        def forward(self, x_t: Tensor, t: Tensor) -> Any:
            return library.denoise.DiracPosterior(mean=network.x0(x_t, t))

    class OnGrid(getattr(library.sample, f"{name}Sampler")):
        timesteps = task.times

    options = {key: value for key, value in task.options.items() if value is not None}
    return OnGrid(Denoiser(), silent=True, **options, **given)(task.x)


def _sampler(name: str, order: int | None = None, **more: Any) -> Sampler:
    given = {} if order is None else {"order": order}
    return Sampler(lambda module, task: _run(module, task, name, **given), **more)


def _load() -> Any:
    importing("azula.noise", "azula.denoise", "azula.sample")()
    return importing("azula")()


LIBRARY = Library(
    name="azula",
    distribution="azula",
    install="pip install --no-deps azula einops",
    load=_load,
    how="denoiser(x, t) gives E[x0 | x] at its own t, in the path's coordinates; schedules in float64",
    affixes=("", "Sampler"),
    samplers={
        "DDPM": _sampler("DDPM", noisy=always),
        "DDIM": _sampler("DDIM", options={"eta": 0.0}, noisy=with_eta, takes_eta=True),
        "Euler": _sampler("Euler"),
        "Heun": _sampler("Heun"),
        "Ito": _sampler("Ito", options={"eta": 1.0, "temperature": 1.0}, noisy=with_eta, takes_eta=True),
        "PC": _sampler("PC", options={"corrections": 1, "delta": 0.01}, noisy=always),
        **{f"{kind}AB{order}": _sampler(f"{kind}AB", order) for kind in ("z", "v", "zE", "xE", "RE") for order in (1, 2, 3, 4)},
    },
)
