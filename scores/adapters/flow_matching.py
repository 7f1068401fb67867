"""Velocity models of Meta's ``flow_matching``.

Call    model(x=x, t=t, **extras), by keyword.
Time    u = 1 - t: u = 0 is noise, u = 1 data. Of shape () where the batch shares it, as ``ODESolver.sample`` gives it, and (B,)
        where samples differ, as in training.
Output  dx/du = alpha' x1 + sigma' x0 with x1 data and x0 noise: minus our velocity, the row (-alpha', -sigma') in t.
Input   native x of the scheduler, no scaling; the data range is the user's.
Paths   CondOT alpha = u, sigma = 1 - u;  Cosine sin, cos of pi u/2;  VP;  LinearVP u, sqrt(1 - u^2);  Polynomial u^n, 1 - u^n;
        any other scheduler object is read by calling it.
Traps   time runs against ours. The velocity of Polynomial is 0 at u = 0 and that of VP infinite at u = 1. A wrapper that guides
        inside costs two networks a call: evals=2. The image example has extra={"label": ...} and cfg (1 + w) c - w u.

Source: facebookresearch/flow_matching solver/ode_solver.py, path/scheduler/scheduler.py (CC BY-NC 4.0: called, not copied).
Lipman et al. 2024, arXiv:2412.06264.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sde.errors import InputError
from sde.path import VP, FromFunctions, Linear, Path, Trigonometric

from ..network import Score
from ._calls import one_time
from ._flows import linear_vp, polynomial, rising
from ._options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_flow_matching(model: Any, scheduler: Any = None, **options: Unpack[Options]) -> Score:
    """The score of a velocity model.

    scheduler : the library's scheduler object, or a path of ``sde`` (default: CondOT, the path Linear())
    """
    path = _path(scheduler)

    def network(x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        return model(x=x, t=one_time(t), **extras)

    velocity = (lambda t: -path.dalpha(t), lambda t: -path.dsigma(t))
    return Score(network, path, velocity, label=rising, **options)


def _path(scheduler: Any) -> Path:
    if scheduler is None or isinstance(scheduler, Path):
        return scheduler or Linear()
    known = {
        "CondOTScheduler": lambda s: Linear(),
        "CosineScheduler": lambda s: Trigonometric(),
        "LinearVPScheduler": lambda s: linear_vp(),
        "VPScheduler": lambda s: VP(float(s.beta_min), float(s.beta_max)),
        "PolynomialConvexScheduler": lambda s: polynomial(float(s.n)),
    }
    name = type(scheduler).__name__
    if name in known:
        return known[name](scheduler)
    if not callable(scheduler):
        raise InputError(f"scheduler is {scheduler!r:.80}: give a scheduler of flow_matching, or a path such as Linear()")
    return _called(scheduler)


def _called(scheduler: Callable[[Tensor], Any]) -> Path:
    """The path of any scheduler u -> (alpha, sigma and their slopes)."""
    return FromFunctions(
        lambda t: scheduler(1.0 - t).alpha_t,
        lambda t: scheduler(1.0 - t).sigma_t,
        lambda t: -scheduler(1.0 - t).d_alpha_t,
        lambda t: -scheduler(1.0 - t).d_sigma_t,
    )
