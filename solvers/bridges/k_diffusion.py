"""Any sampler of SOLVERS as a function of k-diffusion and ComfyUI.

    from solvers.bridges import k_diffusion
    sample = k_diffusion.sampler("unipc_3")
    x0 = sample(model, x, sigmas, extra_args={...}, callback=show)

``model(x, sigma * ones(B), **extra_args)`` returns E[x0]; x arrives noised at sigmas[0], and sigmas fall, mostly to 0. The
state is x = x0 + sigma eps, on the path alpha = 1, sigma = t. Flow models (ComfyUI's ``CONST``) have x = (1 - sigma) x0 + sigma
eps, the Linear path: an ODE step in (x - E[x0]) / sigma is the same on both, but what works in half log-SNR (exponential,
ancestral, SDE) must know, lambda = log((1 - sigma) / sigma). They are found by the model's ``model_sampling``, or said by
``flow=``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sde.errors import InputError
from sde.path import EDM, Linear, Path
from sde.prediction import Knot

from ..catalogue import SOLVERS
from ..plan import Plan
from .replay import KINDS, Noise, Output, Replay, check_traceable, drawer, first_calls, source, traced


def sampler(
    solver: Any, *, eta: float | None = None, flow: bool | None = None, noise: str = "brownian", s_noise: float = 1.0
) -> Callable[..., Tensor]:
    """The function sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options) of a sampler.

    solver  : a name of SOLVERS, or of another library, or a solver object, with a table
    eta     : the noise level (default: the solver's own). Of the ancestral samplers it is k-diffusion's eta, of the SDE
              samplers the square root of theirs; 1 is 1
    flow    : whether x = (1 - sigma) x0 + sigma eps; None asks the model
    noise   : "brownian" (one path a seed: more steps refine the same picture) or "white"
    s_noise : a factor of all noise

    The options of the function are these, for one run, and

    noise_sampler : noise_sampler(sigma, sigma_next) -> unit normals like x, as in k-diffusion
    seed          : an int for the noise (default: ``extra_args["seed"]``, as ComfyUI has it, else one from torch's global
                    generator); sample i is a function of (seed, i) alone
    callback      : called once a step, after its first network call, with x, i, sigma, sigma_hat (where the network was
                    called) and denoised

    Nothing is drawn where nothing is random. Repeated sigmas are steps of no length and are passed over. A last step to sigma
    = 0 never asks the model there. Half precision is integrated in float32. Errors: InputError for a solver without a table,
    for sigmas that do not fall or do not fit the path.
    """
    name, _, _ = check_traceable(solver, "k-diffusion")

    @torch.no_grad()
    def sample(
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
        *,
        eta: float | None = eta,
        flow: bool | None = flow,
        noise: str = noise,
        s_noise: float = s_noise,
        noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        kept = _moving(sigmas)
        if len(kept) < 2:
            return x
        extra = extra_args or {}
        path = _path(sigmas, kept, is_flow(model) if flow is None else flow)
        output = Output(path, "x0")
        plan = traced(solver, output, sigmas.detach().double().cpu()[kept], eta)
        draw = _noise(noise, noise_sampler, extra.get("seed") if seed is None else seed, s_noise)
        state = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        replay = Replay(plan, output, state, draw)
        steps = _first_calls_of(plan)
        with _bar(plan.steps, disable) as bar:
            while not replay.done:
                seen, sigma = replay.state.to(x.dtype), replay.knot.sigma
                denoised = model(seen, sigma * x.new_ones(len(x)), **extra)
                if replay.call in steps:
                    step = steps[replay.call]
                    if callback is not None:
                        at = {"sigma": sigmas[kept[step]], "sigma_hat": sigmas.new_tensor(sigma)}
                        callback({"x": seen, "i": kept[step], "denoised": denoised, **at})
                    bar.update(step + 1 - bar.n)
                replay.send(denoised.to(state.dtype))
        return replay.state.to(x.dtype)

    sample.__name__ = f"sample_{name}"
    return sample


def names() -> list[str]:
    """The names of SOLVERS that have a table, which ``sampler`` takes."""
    return [name for name, entry in SOLVERS.items() if entry.solver.linear]


def is_flow(model: Any) -> bool:
    """Whether the model is one of ComfyUI's flow models: the ``model_sampling`` inside it is a ``CONST``."""
    for _ in range(4):
        sampling = getattr(model, "model_sampling", None)
        if sampling is not None:
            return any(c.__name__ == "CONST" for c in type(sampling).__mro__)
        model = getattr(model, "inner_model", None)
    return False


def _moving(sigmas: Any) -> list[int]:
    """Which sigmas remain when repeated ones are dropped."""
    if not isinstance(sigmas, Tensor) or sigmas.dim() != 1 or not sigmas.dtype.is_floating_point:
        raise InputError(f"sigmas={sigmas!r:.80}: give a 1-D tensor of noise levels, falling")
    values = sigmas.tolist()
    return [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]


def _path(sigmas: Tensor, kept: list[int], flow: bool) -> Path:
    high = float(sigmas.max())
    if flow and high > 1.0:
        raise InputError(f"sigmas reach {high:g}, but a flow model's are in [0, 1]: give flow=False for x = x0 + sigma eps")
    if not high > 0.0 or not math.isfinite(high):
        raise InputError(f"sigmas reach {high:g}: give noise levels > 0, falling to the last")
    return Linear() if flow else EDM(T=high, t_min=0.0)


def _first_calls_of(plan: Plan) -> dict[int, int]:
    """Network call -> the step that it is the first of."""
    return {call: step for step, call in reversed(list(enumerate(first_calls(plan))))}


def _noise(kind: str, noise_sampler: Any, seed: int | None, s_noise: float) -> Noise:
    """The draws of one run, from k-diffusion's function or from a seed."""
    streams: Noise | None = None

    def draw(k: int, s: Knot, t: Knot, like: Tensor) -> Tensor:
        nonlocal streams
        if noise_sampler is not None and s.sigma != t.sigma:
            z = noise_sampler(like.new_tensor(s.sigma), like.new_tensor(t.sigma)).to(like.dtype)
        else:
            if streams is None:
                streams = drawer(source(kind, None, len(like)) if seed is None else KINDS[kind](seed))
            z = streams(k, s, t, like)
        return z if s_noise == 1.0 else s_noise * z

    if kind not in KINDS:
        raise InputError(f"noise={kind!r}: give one of {', '.join(map(repr, KINDS))}")
    return draw


def _bar(steps: int, disable: bool | None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=steps, disable=disable)
