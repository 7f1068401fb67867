"""Networks of ``guided_diffusion`` (ADM) and ``improved_diffusion``.

Call    model(x, timesteps, y=None); timesteps (B,).
Time    the index of the table, 0 the least noise, T - 1 the most; with ``rescale_timesteps`` the float index * 1000/T
        (improved-diffusion's default, and its checkpoints have T = 4000; off in guided-diffusion).
Output  eps, or x0 with ``predict_xstart``; with ``learn_sigma`` 2C channels, of which the second half is v in [-1, 1], the
        place of the reverse variance between its bounds. It is split off, and ``solvers.learned_variance`` uses it.
Input   native x of the table, no scaling. Images in [-1, 1].
Labels  y, integers (B,), exactly where the network is class-conditional. ``cond_fn`` is guidance, a matter of scores.guidance.
Traps   a respaced diffusion has a table of its own, betas 1 - acp_i / acp_previous, and its wrapped model maps index i to the
        original entry. Here one path serves all of them: respacing only chooses the times (``respaced``), because a step's
        coefficients are made of alpha and sigma at its two ends. Published samplers clip x0 to [-1, 1] (``clip_denoised``):
        that is thresholding, a matter of the score.

Source: openai/guided-diffusion guided_diffusion/gaussian_diffusion.py, respace.py, unet.py; openai/improved-diffusion (MIT).
Nichol & Dhariwal 2021, arXiv:2102.09672; Dhariwal & Nichol 2021, arXiv:2105.05233.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sde.errors import InputError
from sde.path import Path, Tabulated

from ..network import Score
from ._labels import table_label
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_guided_diffusion(
    model: Any,
    diffusion: Any = None,
    *,
    predicts: str = "eps",
    rescale_timesteps: bool = False,
    rule: str = "linear",
    **options: Unpack[Options],
) -> Score:
    """The score of an ADM network; a learned variance is split off where there is one, for

        sample(score, shape, solver=LearnedVariance(), grid=respaced("250"), steps=250)         # as published, but for clipping

    diffusion : a ``Tabulated`` path (default: 1000 linear betas), or the library's own (Spaced)GaussianDiffusion, which then
                also says what is predicted and how time steps are scaled
    predicts  : "eps", or "x0" for ``predict_xstart``
    rule      : the label between two entries of the table, see ``_labels``
    """
    table = _read(Tabulated.linear() if diffusion is None else diffusion, predicts, rescale_timesteps)
    factor = 1000.0 / table.size if table.rescaled else 1.0
    label = table_label(table.path, rule, table.entries, factor)
    network = _first_half(model) if table.drop else model
    return Score(network, table.path, table.predicts, label=label, split="learned_var", **options)


def from_improved_diffusion(
    model: Any,
    diffusion: Any,
    *,
    predicts: str = "eps",
    rescale_timesteps: bool = True,
    rule: str = "linear",
    **options: Unpack[Options],
) -> Score:
    """The same for improved-diffusion, whose time steps are rescaled to 0 ... 1000 by default and whose table has no default:
    ``Tabulated.squared_cosine(4000)`` for most released checkpoints.
    """
    return from_guided_diffusion(model, diffusion, predicts=predicts, rescale_timesteps=rescale_timesteps, rule=rule, **options)


def space_timesteps(size: int, sections: str | Sequence[int]) -> tuple[int, ...]:
    """The entries of a table of ``size`` that a respacing visits, rising.

    "ddimN" takes every i-th entry from 0, for the i that gives N of them; "a,b,..." or a sequence cuts the table into equal
    sections and spreads a, b, ... entries over each, both ends included.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        count = _counted(sections, sections[4:])
        for stride in range(1, size):
            if len(range(0, size, stride)) == count:
                return tuple(range(0, size, stride))
        raise InputError(f"sections={sections!r}: no integer stride visits {count} of {size} entries; give '{count}' instead")
    counts = [_counted(sections, c) for c in (sections.split(",") if isinstance(sections, str) else sections)]
    entries: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        width = size // len(counts) + (1 if i < size % len(counts) else 0)
        if not 1 <= count <= width:
            raise InputError(f"sections={sections!r}: section {i + 1} has {width} entries, so it cannot give {count}")
        stride = (width - 1) / (count - 1) if count > 1 else 1.0
        at = 0.0  # summed, as published, so that the same entries round up
        for _ in range(count):
            entries.append(start + round(at))
            at += stride
        start += width
    return tuple(entries)


def respaced(sections: str | Sequence[int]) -> Any:
    """The times of a respaced table, then data, as a grid: ``sample(score, grid=respaced("250"), steps=250)``.

    ``steps`` must be the number of entries visited; ``stop`` is where the last step ends, 0 unless given.
    """

    def grid(path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
        if not isinstance(path, Tabulated):
            raise InputError(f"path is {path}: respacing chooses entries of a table; give a score on a Tabulated path")
        entries = space_timesteps(len(path.betas), sections)
        if len(entries) != n or start is not None:
            raise InputError(
                f"steps={n}, start={start}: {sections!r} visits {len(entries)} entries; give steps={len(entries)} alone"
            )
        times = path.time_of(torch.tensor(entries[::-1]))
        return torch.cat([times, torch.tensor([0.0 if stop is None else stop], dtype=torch.float64)])

    return grid


class _Table(NamedTuple):
    path: Tabulated
    predicts: str
    rescaled: bool
    entries: Any  # labels of the entries; None for 0, 1, ...
    size: int  # entries of the table the network was trained on
    drop: bool  # the second half is a log variance itself, not a place between bounds


def _read(diffusion: Any, predicts: str, rescaled: bool) -> _Table:
    if isinstance(diffusion, Tabulated):
        return _Table(diffusion, predicts, rescaled, None, len(diffusion.betas), False)
    if not hasattr(diffusion, "betas"):
        raise InputError(
            f"diffusion is a {type(diffusion).__name__}: give a Tabulated path or an object with betas, a GaussianDiffusion"
        )
    kinds = {"EPSILON": "eps", "START_X": "x0"}
    mean = getattr(getattr(diffusion, "model_mean_type", None), "name", None)
    if mean is not None and mean not in kinds:
        raise InputError(
            f"model_mean_type is {mean}: only EPSILON and START_X networks are supported, no published one is another"
        )
    path = Tabulated(tuple(float(b) for b in diffusion.betas))
    return _Table(
        path,
        kinds.get(mean or "", predicts),
        bool(getattr(diffusion, "rescale_timesteps", rescaled)),
        getattr(diffusion, "timestep_map", None),
        int(getattr(diffusion, "original_num_steps", len(path.betas))),
        getattr(getattr(diffusion, "model_var_type", None), "name", "") == "LEARNED",
    )


def _first_half(model: Any) -> Any:
    def network(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        return model(x, t, **conditions)[:, : x.shape[1]]

    return network


def _counted(sections: Any, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InputError(f"sections={sections!r}: give 'ddim50', '250', '10,15,20' or a sequence of ints") from None
