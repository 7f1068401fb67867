"""lucidrains' ``denoising_diffusion_pytorch`` and ``rectified_flow_pytorch``.

GaussianDiffusion (and LearnedGaussianDiffusion)
    Call    model(x, t, x_self_cond=None); t the index 0 ... T - 1.
    Output  ``objective``: pred_noise, pred_x0, pred_v (the default). LearnedGaussianDiffusion has 2C channels, the second half
            the variance's place, split off as in ``guided_diffusion``.
    Table   betas of ``beta_schedule``, by default 'sigmoid', not 'linear'; kept in float32.
ElucidatedDiffusion
    Call    net(c_in x, ln(sigma)/4, self_cond=None);  output F with its sigma_data;  the path EDM(), t = sigma.
ContinuousTimeGaussianDiffusion, VParamContinuousTimeGaussianDiffusion
    Call    model(x, log_snr); log_snr (B,) = log(alpha^2 / sigma^2) = 2 lambda, not a time.
    Output  eps; v for the VParam class.
    Path    alpha^2 = sigmoid(log_snr(t)), t = 1 is noise, from its ``log_snr``: linear, cosine or learned. One that reaches
            alpha = 0 to rounding (cosine) ends at T = 1 - 1e-4, where eps still knows x0.
RectifiedFlow
    Call    model(x, times=u), the name is its ``time_cond_kwarg`` (None: no time);  u = 1 - t: 0 is noise, 1 data.
    Output  ``predict``: flow (minus our velocity), noise, clean.  Its noise_schedule only chooses training times.
Traps   images in [0, 1] become [-1, 1] inside (``normalize``): samples are in [-1, 1], apply ``unnormalize``. Its own samplers
        clip x0, and feed the last x0 back where self_condition is set; here networks get none, as in half of their training.

Source: denoising-diffusion-pytorch 2.3.4, rectified-flow-pytorch 0.14.0 (MIT).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sde.errors import InputError, nearest
from sde.path import EDM, FromFunctions, Linear, Path, Tabulated

from ..network import Score
from ._flows import rising
from ._labels import table_label
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_lucidrains(diffusion: Any, *, rule: str = "linear", **options: Unpack[Options]) -> Score:
    """The score of the network inside one of the classes above.

    rule : the label between two entries of a table (GaussianDiffusion), see ``_labels``
    """
    names = [c.__name__ for c in type(diffusion).__mro__]
    if "GaussianDiffusion" in names:
        return _table(diffusion, rule, options)
    if "ElucidatedDiffusion" in names:
        return _elucidated(diffusion, options)
    if "ContinuousTimeGaussianDiffusion" in names or "VParamContinuousTimeGaussianDiffusion" in names:
        return _continuous(diffusion, "v" if "VParamContinuousTimeGaussianDiffusion" in names else "eps", options)
    if "RectifiedFlow" in names:
        return _flow(diffusion, options)
    raise InputError(
        f"diffusion is a {names[0]}: give a GaussianDiffusion, ElucidatedDiffusion, ContinuousTimeGaussianDiffusion, "
        "VParamContinuousTimeGaussianDiffusion or RectifiedFlow"
    )


def _table(diffusion: Any, rule: str, options: Options) -> Score:
    path = Tabulated(tuple(float(b) for b in diffusion.betas))
    predicts = _chosen("objective", diffusion.objective, {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"})
    return Score(diffusion.model, path, predicts, label=table_label(path, rule), split="learned_var", **options)


def _elucidated(diffusion: Any, options: Options) -> Score:
    path, spread = EDM(T=float(diffusion.sigma_max), t_min=float(diffusion.sigma_min)), float(diffusion.sigma_data)

    def c_in(sigma: Tensor) -> Tensor:
        return (sigma**2 + spread**2) ** -0.5

    return Score(diffusion.net, path, "F", label=lambda s: 0.25 * torch.log(s), scale=c_in, sigma_data=spread, **options)


def _continuous(diffusion: Any, predicts: str, options: Options) -> Score:
    log_snr = diffusion.log_snr
    if isinstance(log_snr, nn.Module):  # a learned schedule, whose slope its frac_gradient would scale
        log_snr = copy.deepcopy(log_snr).double().cpu().requires_grad_(False)
        if hasattr(log_snr, "frac_gradient"):
            log_snr.frac_gradient = 1.0  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    path = FromFunctions(
        lambda t: torch.sqrt(torch.sigmoid(log_snr(t))),
        lambda t: torch.sqrt(torch.sigmoid(-log_snr(t))),
        T=1.0 if float(log_snr(torch.tensor(1.0, dtype=torch.float64))) > -20.0 else 1.0 - 1e-4,
        t_min=0.0,
    )
    return Score(diffusion.model, path, predicts, label=lambda t: 2.0 * path.lam(t), **options)


def _flow(diffusion: Any, options: Options) -> Score:
    if getattr(diffusion, "mean_variance_net", False):
        raise InputError(
            "mean_variance_net=True: the network gives a mean and a deviation of the flow; wrap it to return the mean"
        )
    model, name = diffusion.model, getattr(diffusion, "time_cond_kwarg", "times")
    path: Path = Linear()
    outputs = {"flow": (1.0, -1.0), "noise": "eps", "clean": "x0"}

    def network(x: Tensor, u: Tensor, **conditions: Any) -> Tensor:
        return model(x, **({} if name is None else {name: u}), **conditions)

    return Score(network, path, _chosen("predict", diffusion.predict, outputs), label=rising, **options)


def _chosen(name: str, value: Any, known: dict[str, Any]) -> Any:
    if value not in known:
        raise InputError(f"{name}={value!r} is unknown: {nearest(value, known)}")
    return known[value]
