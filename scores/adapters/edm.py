"""EDM and EDM2 networks: ``VPPrecond``, ``VEPrecond``, ``iDDPMPrecond``, ``EDMPrecond``, EDM2's ``Precond``.

Call    net(x, sigma, class_labels=None, force_fp32=False); sigma (B,). Each class does its own preconditioning inside.
Time    sigma itself, the noise level of x = x0 + sigma eps: the path EDM(), t = sigma, 0 is data.
Output  D = E[x0 | x], so y = x0; float32 whatever x is.
Input   as it is (c_in is inside). Images are in [-1, 1]; EDM2's latents are (raw - mean) / (2 std), see ``latent_diffusion``.
Labels  class_labels, one-hot floats (B, label_dim); None means no class. Integers are refused: the network reshapes what it
        gets to (-1, label_dim), so that B integers pass for one row wherever B = label_dim.
Traps   iDDPMPrecond knows 1000 noise levels and rounds its label to the nearest, so published sampling takes its times from
        ``net.round_sigma`` (``rounded`` below). Networks state sigma_min and sigma_max (iDDPM 0.0064 and 20291; EDMPrecond 0
        and inf; EDM2 none); the published sampler clamps 0.002 and 80 to them, as is done here. EDM2 has no round_sigma.

Source: NVlabs/edm training/networks.py, generate.py; NVlabs/edm2 training/networks_edm2.py (both CC BY-NC-SA 4.0: called here,
not copied). Karras et al. 2022, arXiv:2206.00364, table 1; Karras et al. 2024, arXiv:2312.02696.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sde.errors import InputError
from sde.path import EDM, Path

from ..network import Score
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

Grid = Callable[[Path, int, float | None, float | None], Tensor]


def from_edm(net: Any, *, sigma_min: float = 0.002, sigma_max: float = 80.0, **options: Unpack[Options]) -> Score:
    """The score of an EDM or EDM2 network on the path EDM(), between the noise levels that the network supports.

    conditions : {"class_labels": one-hot floats}, and force_fp32
    """
    low, high = max(sigma_min, getattr(net, "sigma_min", 0.0)), min(sigma_max, getattr(net, "sigma_max", sigma_max))
    classes = getattr(net, "label_dim", 0)

    def network(x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **more: Any) -> Tensor:
        if class_labels is not None and (not class_labels.is_floating_point() or class_labels.shape[-1:] != (classes,)):
            raise InputError(
                f"class_labels is {str(class_labels.dtype).removeprefix('torch.')} of shape {tuple(class_labels.shape)}: give "
                f"one-hot floats (B, {classes}), torch.nn.functional.one_hot(labels, {classes}).float()"
            )
        return net(x, sigma, class_labels, **more)

    return Score(network, EDM(T=_round(net, high), t_min=_round(net, low)), "x0", **options)


def rounded(net: Any, grid: Grid) -> Grid:
    """The grid with every time but sigma = 0 moved to a noise level that the network was trained at. As published:
    ``sample(score, grid=rounded(net, GRIDS["karras"]), steps=18, start=80.0, stop=0.0)``.
    """

    def on_table(path: Path, n: int, start: float | None = None, stop: float | None = None) -> Tensor:
        times = grid(path, n, start, stop)
        moved = torch.tensor([0.0 if t == 0.0 else _round(net, t) for t in times.tolist()], dtype=torch.float64)
        if bool((moved[1:] >= moved[:-1]).any()):
            i = int((moved[1:] >= moved[:-1]).nonzero()[0])
            raise InputError(
                f"steps={n}: sigma = {float(times[i]):g} and {float(times[i + 1]):g} round to the same level "
                f"{float(moved[i]):g} of the network: take fewer steps"
            )
        return moved

    return on_table


def _round(net: Any, sigma: float) -> float:
    if not hasattr(net, "round_sigma"):
        return float(sigma)
    return float(net.round_sigma(torch.tensor(float(sigma), dtype=torch.float64)))
