"""DPM-Solver's repository (LuChengTHU/dpm-solver): one file, ``dpm_solver_pytorch.py``, to be importable.

Its ``sample(steps=NFE)`` counts calls; its grids are three, made in torch's default dtype, which is the state's around a run.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Library, Sampler, importing
from .line import default_dtype
from .schedule import SKIP, of_file, quietly, schedule, times_inside
from .task import Task


def _run(module: Any, task: Task, method: str, order: int) -> Tensor:
    network, options = task.network, task.options
    with default_dtype(task.x.dtype), quietly():  # its adaptive solvers print what they spent
        solver = module.DPM_Solver(
            lambda x, t: network.eps(x, times_inside(t)),
            schedule(module, task),
            algorithm_type=options["algorithm_type"],
        )
        given = {key: options[key] for key in ("solver_type", "lower_order_final", "atol", "rtol") if key in options}
        return solver.sample(
            task.x,
            steps=task.n,
            t_start=task.start.t,
            t_end=task.stop.t,
            order=order,
            skip_type=SKIP.get(task.grid, "logSNR"),
            method=method,
            **given,
        )


ALGORITHM = {"algorithm_type": "dpmsolver++", "solver_type": "dpmsolver"}
CHOICES = {"algorithm_type": ("dpmsolver++", "dpmsolver"), "solver_type": ("dpmsolver", "taylor")}


def _sampler(method: str, order: int, **more: Any) -> Sampler:
    options = {**ALGORITHM, **more.pop("options", {})}
    return Sampler(
        lambda module, task: _run(module, task, method, order),
        options=options,
        choices=CHOICES,
        **{"grids": tuple(SKIP), **more},
    )


LIBRARY = Library(
    name="dpm_solver",
    distribution="",
    install="git clone https://github.com/LuChengTHU/dpm-solver, and put that folder on PYTHONPATH",
    load=importing("dpm_solver_pytorch"),
    how="eps-network at (x, t) of the path, its own NoiseScheduleVP where the path is the linear VP",
    version_of=of_file,
    samplers={
        **{f"multistep{order}": _sampler("multistep", order, options={"lower_order_final": True}) for order in (1, 2, 3)},
        **{f"singlestep{order}": _sampler("singlestep", order) for order in (1, 2, 3)},
        **{f"singlestep_fixed{order}": _sampler("singlestep_fixed", order) for order in (2, 3)},
        **{
            f"adaptive{order}": _sampler("adaptive", order, options={"atol": 0.0078, "rtol": 0.05}, grids=None, adaptive=True)
            for order in (2, 3)
        },
    },
)
