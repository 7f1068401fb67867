"""Any sampler of SOLVERS as a scheduler of diffusers.

    from solvers.bridges.diffusers import SolverScheduler
    pipe.scheduler = SolverScheduler.from_config(pipe.scheduler.config, solver="unipc_3", use_karras_sigmas=True)

The state is the model's own x = alpha x0 + sigma eps (VP or flow), so that ``scale_model_input`` does nothing and
``init_noise_sigma`` is 1: that is right in every pipeline, also in those that never call either (DDPM, DiT). ``timesteps``
holds one entry a network call (Heun: t0, t1, t1, t2, ...), ``order`` entries a step, so that pipelines that slice
``timesteps[i * order:]`` and ``set_begin_index(i * order)`` for image-to-image start at step i: the sampler is then traced anew
from there, and a multistep method begins without history. What the keys of the configuration mean is in ``diffusers_config``.

The state may be changed between two calls (inpainting blends it with the known image): ``step`` goes on from the sample it is
given. In half precision the state is kept in float32 and handed out cast; where the sample given back is what was handed out,
the float32 numbers are used.

diffusers is imported when ``SolverScheduler`` is asked for, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sde.errors import InputError, PathError
from sde.prediction import Knot, Row

from ..plan import Plan
from .diffusers_config import PREDICTIONS, Flow, Table, every_timestep, grid_times, kind_of
from .replay import KINDS, Noise, Output, Replay, check_traceable, drawer, first_calls, source, starts_at_state, traced

if TYPE_CHECKING:
    SolverScheduler: type[Any]

HALF = (torch.float16, torch.bfloat16)


class _Scheduler:
    """What ``SolverScheduler`` does; the class itself adds diffusers' mixins.

    solver  : a name of SOLVERS, or of another library ("k_diffusion:sample_dpmpp_2m"), with a table
    grid    : a name of GRIDS; None follows ``timestep_spacing`` and the ``use_*_sigmas`` keys, as diffusers does. Where a
              pipeline passes its own default list (Flux: 1 ... 1/N), the grid replaces it; other lists are an error
    eta     : the noise level (default: the solver's own)
    noise   : "generator": drawn from the generator that the pipeline passes, in the order and shape in which diffusers' own
              schedulers draw, so that the same generator gives the same image as there; a list of generators makes samples
              independent of their batch. "white", "brownian": streams of ``sde.noise``, one a sample, seeded by one number
              from each generator: a single generator then makes sample i independent of the batch size too

    The other keys are diffusers' own. ``sample`` and ``prev_sample`` have the model's own coordinates; ``pred_original_sample``
    is E[x0], after clipping where ``clip_sample`` or ``thresholding`` ask for it (then eps is recomputed from it).

    Errors: InputError for an adaptive solver, or one whose coefficients depend on the state; for one that draws noise before
    its first network call (EDM's churn after image-to-image); for starting inside a step; for steps out of order.
    """

    config: Any  # from diffusers' ConfigMixin

    def __init__(
        self,
        solver: str = "dpmpp_2m",
        grid: str | None = None,
        eta: float | None = None,
        noise: str = "generator",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        timestep_type: str = "discrete",
        final_sigmas_type: str = "zero",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        variance_type: str | None = None,
        shift: float = 1.0,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        invert_sigmas: bool = False,
    ) -> None:
        if not isinstance(solver, str):
            raise InputError(f"solver={solver!r:.80}: give a name of SOLVERS, which scheduler_config.json can hold")
        if noise not in ("generator", *KINDS):
            raise InputError(f"noise={noise!r}: give one of 'generator', {', '.join(map(repr, KINDS))}")
        _, self._solver, _ = check_traceable(solver, "a diffusers pipeline")
        self._kind = kind_of(self.config)
        self._output = Output(self._kind.path, PREDICTIONS[prediction_type])
        if isinstance(self._kind, Table):
            self.betas = torch.tensor(self._kind.path.betas, dtype=torch.float32)
            self.alphas, self.alphas_cumprod = 1.0 - self.betas, self._kind.path.alphas_cumprod.float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._plan: Plan | None = None
        self._labels: list[float] = []
        self._reset()
        # what training code expects of a scheduler that was not told a number of steps
        self.timesteps = torch.tensor(every_timestep(self._kind, self.config), dtype=torch.float32)
        alpha, sigma = self._kind.levels(self.timesteps)
        self.sigmas = (sigma if isinstance(self._kind, Flow) else sigma / alpha).float()

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def order(self) -> int:
        """Entries of ``timesteps`` a step."""
        return self._solver.stages

    @property
    def step_index(self) -> int | None:
        """The entry of ``timesteps`` whose network output is wanted next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The entry that the run starts at, as told by ``set_begin_index``."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this entry of ``timesteps``, the first of a step."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: the state is what the network wants."""
        return sample

    # --- the grid ---

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: float | None = None,
    ) -> None:
        """Trace the solver on the grid of so many steps, or on a list of noise levels or timesteps, one a step.

        sigmas : sigma/alpha (VP) or sigma (flow), noise first;  mu : the dynamic shift of flows
        """
        times = grid_times(self._kind, self.config, num_inference_steps, sigmas, timesteps, mu)
        try:
            plan = traced(self.config.solver, self._output, times, self.config.eta)
        except PathError as error:
            if self._kind.path.knot(times[0]).alpha > 0.0:
                raise
            hint = "in a pipeline, give sigmas that begin below 1, or use a method in x0 or in t such as 'dpmpp_2m' or 'heun'"
            raise PathError(f"{error}; {hint}") from error
        if not starts_at_state(plan):
            raise InputError(
                f"solver={self.config.solver!r} draws noise before its first network call, which a pipeline makes before it "
                "asks the scheduler: start from the path's end (timestep_spacing='trailing'), or use 'euler_ancestral'"
            )
        plan.program(self._output, in_place=False)  # a network that cannot say what is wanted is told now
        self._plan, self._labels = plan, self._kind.labels(plan.knots)
        self.timesteps = torch.tensor(self._labels, dtype=torch.float32, device=device)
        levels = [self._kind.sigma(k) for k in (*plan.knots, plan.grid[-1])]
        self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self.num_inference_steps = plan.steps
        self._reset()

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._replay: Replay | None = None
        self._generator: Any = None

    # --- the run ---

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        """The state for the next network call, or the result after the last.

        model_output : the network's output at (sample, timestep), guidance done; of 2C channels the first C are used
        generator    : a torch.Generator or a list with one a sample, for solvers that draw noise
        """
        replay = self._replay or self._begin(timestep, sample)
        self._check_order(timestep)
        state = _given(replay, sample)
        y = _first_half(model_output, sample).to(state.dtype)
        x0 = replay.x0(y, state)
        if self.config.clip_sample or self.config.thresholding:
            x0 = self._clipped(x0)
            y = _output_of(x0, state, self._output.row(replay.knot), replay.knot)
        self._generator = generator
        replay.send(y, state)
        self._step_index = replay.call + len(self._labels) - replay.plan.nfe
        previous = replay.state.to(sample.dtype)
        if replay.done:
            self._replay = None
        return _scheduler_output()(previous, x0.to(sample.dtype)) if return_dict else (previous,)

    def _begin(self, timestep: Any, sample: Tensor) -> Replay:
        if self._plan is None:
            raise InputError("step comes after set_timesteps(num_inference_steps): call it first")
        if self._step_index is not None:
            raise InputError(f"all {len(self._labels)} network calls are done: call set_timesteps for another run")
        firsts = first_calls(self._plan)
        begin = self._begin_index if self._begin_index is not None else self._entry_of(timestep, firsts)
        if begin not in firsts:
            raise InputError(
                f"begin_index={begin} is inside a step of {self.config.solver!r}, whose steps begin at entries {firsts}: set "
                "one of these, or use a solver of one call a step such as 'dpmpp_2m'"
            )
        plan = self._plan if begin == 0 else self._tail(self._plan, firsts.index(begin), begin)
        self._step_index = begin
        self._replay = Replay(plan, self._output, _working(sample), self._noise(sample))
        return self._replay

    def _tail(self, whole: Plan, step: int, begin: int) -> Plan:
        """The sampler from step ``step`` on, which must ask for what is left of ``timesteps``."""
        plan = traced(self.config.solver, self._output, whole.times[step:], self.config.eta)
        wanted, left = self._kind.labels(plan.knots), self._labels[begin:]
        if len(wanted) != len(left) or any(abs(a - b) > 1e-6 * (1.0 + abs(b)) for a, b in zip(wanted, left, strict=False)):
            raise InputError(
                f"solver={self.config.solver!r} begins with other network calls than it goes on with, so it cannot start at "
                f"step {step}: it wants the timesteps {_few(wanted)}, but {_few(left)} are left; use 'dpmpp_2m'"
            )
        if not starts_at_state(plan):
            raise InputError(
                f"solver={self.config.solver!r} draws noise before its first network call, which a pipeline makes before it "
                "asks the scheduler: use it from pure noise, or take 'euler_ancestral' here"
            )
        return plan

    def _entry_of(self, timestep: Any, firsts: Sequence[int]) -> int:
        """The first entry of a step with this timestep, where no begin_index was set."""
        label = _number(timestep)
        near = [i for i in firsts if _is_label(label, self._labels[i])]
        if not near:
            raise InputError(f"timestep={label:g} begins no step: give one of {_few([self._labels[i] for i in firsts])}")
        return min(near, key=lambda i: abs(self._labels[i] - label))

    def _check_order(self, timestep: Any) -> None:
        """Refuse steps out of order, where that costs no wait for a device."""
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            return
        label, wanted = _number(timestep), self._labels[self._step_index or 0]
        if not _is_label(label, wanted):
            raise InputError(
                f"timestep={label:g}, but entry {self._step_index} of timesteps is {wanted:g}: call step once for each of "
                "scheduler.timesteps, in order"
            )

    def _noise(self, sample: Tensor) -> Noise:
        dtype, streams = sample.dtype, None

        def draw(k: int, s: Knot, t: Knot, like: Tensor) -> Tensor:
            nonlocal streams
            if self.config.noise == "generator":
                from diffusers.utils.torch_utils import randn_tensor

                return randn_tensor(like.shape, generator=self._generator, device=like.device, dtype=dtype).to(like.dtype)
            if streams is None:
                streams = drawer(source(self.config.noise, self._generator, len(like)))
            return streams(k, s, t, like)

        return draw

    def _clipped(self, x0: Tensor) -> Tensor:
        """x0 within [-r, r]; with ``thresholding`` by a quantile of each sample, rescaled (Saharia et al. 2022, Imagen)."""
        if not self.config.thresholding:
            return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        size = x0.detach().abs().flatten(1).float().quantile(self.config.dynamic_thresholding_ratio, dim=1)
        size = size.clamp(1.0, self.config.sample_max_value).to(x0.dtype).reshape(-1, *(1,) * (x0.dim() - 1))
        return x0.clamp(-size, size) / size

    # --- noise added by pipelines and training code ---

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """alpha x0 + sigma noise at the timesteps, one a sample or one for all."""
        alpha, sigma = self._levels(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """The same under the name and with the order of arguments that flow pipelines use."""
        if noise is None:
            raise InputError("noise is missing: scale_noise(sample, timestep, noise)")
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """What a v (VP: alpha noise - sigma x0) or velocity (flow: noise - x0) network is trained on."""
        if isinstance(self._kind, Flow):
            return noise - sample
        alpha, sigma = self._levels(timesteps, sample)
        return alpha * noise - sigma * sample

    def _levels(self, timesteps: Any, like: Tensor) -> tuple[Tensor, ...]:
        device = "cpu" if like.device.type == "mps" else like.device  # which has no float64
        labels = torch.as_tensor(timesteps).to(device)
        if labels.dim() > 1 or (labels.dim() == 1 and len(labels) not in (1, len(like))):
            raise InputError(f"timesteps has shape {tuple(labels.shape)} for {len(like)} samples: give one, or one a sample")
        shape = (-1, *(1,) * (like.dim() - 1))
        return tuple(level.reshape(shape).to(like.device, like.dtype) for level in self._kind.levels(labels))


def _working(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x


def _given(replay: Replay, sample: Tensor) -> Tensor:
    """The state that the network saw, in float32 at least; digits that only the cast to ``sample`` lost are kept."""
    kept = replay.state
    if sample.dtype not in HALF or kept.shape != sample.shape:
        return _working(sample)
    return torch.where(kept.to(sample.dtype) == sample, kept, sample.to(kept.dtype))


def _first_half(output: Tensor, sample: Tensor) -> Tensor:
    """The output without a learned variance."""
    if output.dim() > 1 and sample.dim() > 1 and output.shape[1] == 2 * sample.shape[1]:
        output = output[:, : sample.shape[1]]
    if output.shape != sample.shape:
        raise InputError(f"model_output is {tuple(output.shape)} for a sample {tuple(sample.shape)}: they must be alike")
    return output


def _output_of(x0: Tensor, x: Tensor, row: Row, knot: Knot) -> Tensor:
    """What the network would have to say for this x0: y = a x0 + b eps with eps = (x - alpha x0)/sigma."""
    b = row.b / knot.sigma
    return (row.a - b * knot.alpha) * x0 + b * x


def _number(timestep: Any) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)


def _is_label(label: float, wanted: float) -> bool:
    return abs(label - wanted) <= 0.005 * max(1.0, abs(wanted))  # bfloat16 keeps 0.4 percent


def _few(labels: Sequence[float]) -> str:
    text = ", ".join(f"{label:.6g}" for label in labels[:4])
    return f"{text}, ... ({len(labels)} of them)" if len(labels) > 4 else text


# --- diffusers' side --------------------------------------------------------------------------------------------------

#: Keys that are facts about the network and its data: diffusers' ``from_config`` replaces what another class has by default by
#: one's own default, here it is kept.
FACTS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("clip_sample", "clip_sample_range", "shift", "flow_shift"),
)
#: What says that a network is of one of ``diffusers_config``'s kinds, and what says that it is not.
KNOWN_KEYS = ("solver", "beta_schedule", "trained_betas", "shift")
FOREIGN_KEYS = ("sigma_data", "snr_shift_scale")


def _translated(config: dict[str, Any], kwargs: dict[str, Any], own: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Another scheduler's configuration as ours. Flow matching has no prediction_type: it is known by its shift."""
    name = config.get("_class_name", own)
    foreign = [key for key in FOREIGN_KEYS if key in config]
    if foreign or name == "IPNDMScheduler" or not any(key in config for key in KNOWN_KEYS):
        said = (
            f" with {foreign[0]}" if foreign else f" with none of {', '.join(KNOWN_KEYS)}" if name != "IPNDMScheduler" else ""
        )
        raise InputError(
            f"the config of {name if name != own else 'a scheduler'}{said}: its networks have conventions that SolverScheduler "
            "does not speak; wrap the network with scores.adapters and call solvers.sample"
        )
    if name != own or "solver" not in config:
        unsaid = [key for key in config.get("_use_default_values", []) if key not in FACTS]
        config = {**config, "_use_default_values": unsaid}
        if "prediction_type" not in config and "shift" in config:
            kwargs = {"prediction_type": "flow_prediction", **kwargs}
    return config, kwargs


def __getattr__(name: str) -> Any:
    if name == "SolverScheduler":
        return _scheduler_class()
    if name == "SchedulerMixin":  # a pipeline that is loaded looks beside the class for the base that can load it
        from diffusers.schedulers.scheduling_utils import SchedulerMixin

        return SchedulerMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _scheduler_output() -> type[Any]:
    from dataclasses import dataclass

    from diffusers.utils.outputs import BaseOutput

    @dataclass
    class SolverSchedulerOutput(BaseOutput):
        """``prev_sample``, the state for the next network call, and ``pred_original_sample``, E[x0]."""

        prev_sample: Tensor
        pred_original_sample: Tensor | None = None

    return SolverSchedulerOutput


@cache
def _scheduler_class() -> type[Any]:
    """The class, made once, under the name by which pipelines store and find it."""
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

    flows = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")

    class SolverScheduler(_Scheduler, SchedulerMixin, ConfigMixin):  # pyright: ignore[reportIncompatibleMethodOverride]
        __doc__ = _Scheduler.__doc__
        __init__ = register_to_config(_Scheduler.__init__)
        _compatibles: ClassVar = [*(e.name for e in KarrasDiffusionSchedulers), *flows]

        @classmethod
        def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            """As ConfigMixin's, of any scheduler whose network it can serve."""
            if isinstance(config, dict):
                config, kwargs = _translated(config, kwargs, cls.__name__)
            return super().from_config(config, return_unused_kwargs, **kwargs)

    SolverScheduler.__module__, SolverScheduler.__qualname__ = __name__, "SolverScheduler"
    return SolverScheduler
