"""Velocity models of ``torchcfm`` (conditional flow matching).

Call    model(t, x, y=None), time first (its UNet); or model(cat[x, t]) for its MLP (``concat=True``).
Time    u = 1 - t: u = 0 is noise, u = 1 data. Of shape () where the batch shares it, as its ODE solvers give it, else (B,).
Output  the velocity dx/du that the matcher regressed. With x1 data and x0 unit normals,
            ConditionalFlowMatcher(sigma)           x = u x1 + (1 - u) x0 + sigma e,       y = x1 - x0
            TargetConditionalFlowMatcher(sigma)     x = u x1 + (1 - (1 - sigma) u) x0,     y = x1 - (1 - sigma) x0
            VariancePreserving...(sigma)            x = sin x1 + cos x0 + sigma e,         y = pi/2 (cos x1 - sin x0)
        e belongs to the noise of x, of deviation s^2 = (1 - u)^2 + sigma^2, so that E[x0 | x] = (1 - u)/s eps.
Input   native x, no scaling; images in [-1, 1].
Traps   the order of the arguments. Its samplers start from x0 though with sigma > 0 the marginal at u = 0 has deviation
        sqrt(1 + sigma^2), which is what ``sample`` starts from here. ExactOptimalTransport couples x0 with x1: the velocity
        and every deterministic solver stand, but -eps / sigma is not the score of its marginals, so no SDE and no corrector.
        SchrodingerBridge needs its score network too and is refused.

Source: atong01/conditional-flow-matching torchcfm/conditional_flow_matching.py, models/unet/unet.py, utils.py (MIT).
Tong et al. 2024, arXiv:2302.00482.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sde.errors import InputError
from sde.path import FromFunctions, Linear, Path, Trigonometric

from ..network import Score
from ._calls import one_time
from ._flows import rising, widened
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_torchcfm(model: Any, matcher: Any = None, *, concat: bool = False, **options: Unpack[Options]) -> Score:
    """The score of a velocity model.

    matcher : the library's flow matcher object, or a path of ``sde`` (default: ConditionalFlowMatcher(0), the path Linear())
    concat  : call model(cat[x, t]) for states (B, d)
    """
    base, sigma, path = _base(matcher)

    def network(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        if concat:
            return model(torch.cat([x, t[:, None]], 1), **conditions)
        return model(one_time(t), x, **conditions)

    def of_noise(t: Tensor) -> Tensor:
        slope = -base.dsigma(t)
        return slope if sigma == 0.0 else slope * base.sigma(t) / path.sigma(t)

    return Score(network, path, (lambda t: -base.dalpha(t), of_noise), label=rising, **options)


def _base(matcher: Any) -> tuple[Path, float, Path]:
    """(the path of x1 and x0 alone, the deviation of what is added, the path with it)."""
    if matcher is None or isinstance(matcher, Path):
        path = matcher or Linear()
        return path, 0.0, path
    name, sigma = type(matcher).__name__, float(getattr(matcher, "sigma", 0.0))
    if name == "TargetConditionalFlowMatcher" and sigma > 0.0:
        path = FromFunctions(rising, lambda t: sigma + (1.0 - sigma) * t, t_min=0.0)
        return path, 0.0, path
    plain = {
        "ConditionalFlowMatcher": Linear(),
        "ExactOptimalTransportConditionalFlowMatcher": Linear(),
        "TargetConditionalFlowMatcher": Linear(),
        "VariancePreservingConditionalFlowMatcher": Trigonometric(),
    }
    if name not in plain:
        raise InputError(f"matcher is a {name}: give one of {', '.join(plain)}, or a path such as Linear()")
    base = plain[name]
    return base, sigma, base if sigma == 0.0 else widened(sigma, name.startswith("Variance"))
