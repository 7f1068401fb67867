"""Starts, ends and wrappers of multistep samplers as a user meets them: what the page says, calls counted, no order unsaid."""

from __future__ import annotations

import math
from pathlib import Path as File

import pytest
import torch

from benchmarks import orders
from scores import Score
from sde import VP, Linear
from sde.errors import InputError
from sde.prediction import Prediction
from solvers import SOLVERS, integrate, sample, trace
from solvers.compose import Ancestral, Churn, Langevin, PredictorCorrector, Restart
from solvers.convergence import convergence
from solvers.dpm_v3 import DPMSolverV3
from solvers.exponential import AdamsMoulton, FixedWeights, Multistep, UniPC
from solvers.exponential_rk import ExponentialRK
from solvers.exponential_tableaux import two_stage
from solvers.multistep import ADAMS_BASHFORTH
from solvers.reversible import BELM
from solvers.runge_kutta import RungeKutta
from solvers.starts import GradedStart, Started
from solvers.tableaux import HEUN

STAGES = ExponentialRK(two_stage(), "x0")
MULTISTEP = [
    Multistep(2, "x0"),
    Multistep(3, "eps", "rho", lower_final=True),
    FixedWeights(ADAMS_BASHFORTH),
    FixedWeights(((1.0,), (2.0, -1.0))),
    UniPC(1),
    UniPC(3, lower_final=False),
    AdamsMoulton(3, 4),
    AdamsMoulton(2, 3, mode="PECE"),
    DPMSolverV3(2),
    DPMSolverV3(2, corrector=1),
    Started(Multistep(3, "x0"), STAGES),
    GradedStart(UniPC(2)),
    BELM(),
]


class Counted(Score):
    """x0 = x/2, every call of the network counted by itself."""

    def __init__(self, path=None):
        self.asked: list[float] = []

        def network(x, t):
            self.asked.append(float(t[0]))
            return 0.5 * x

        super().__init__(network, path or VP(), "x0")


def test_the_page_prints_what_it_says(capsys):
    text = (File(__file__).parents[1] / "docs" / "starts_and_ends.md").read_text(encoding="utf-8")
    code, shown = (text.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "text"))
    exec(compile(code, "starts_and_ends.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("solver", MULTISTEP, ids=lambda s: str(s)[:60])
@pytest.mark.parametrize("stop", [None, 0.02, 0.0])
def test_a_budget_is_kept_and_counted_whatever_the_end(solver, stop):
    """Network calls by the network's own count; the last time is where the run was told to end."""
    for budget in (5, 10):
        score = Counted()
        out = sample(score, (2, 3), solver=solver, nfe=budget, stop=stop)
        assert out.nfe == len(score.asked) <= budget
        assert out.nfe >= budget - 2  # a step more would not fit
        assert float(out.times[-1]) == (VP().t_min if stop is None else stop)
        assert out.x.isfinite().all()


@pytest.mark.parametrize("solver", MULTISTEP[:-1], ids=lambda s: str(s)[:60])
def test_a_last_denoising_step_gives_x0_and_costs_its_call(solver):
    score = Counted(Linear())
    path = score.path
    out = sample(score, (2, 3), solver=solver, steps=6, stop=0.0, trajectory=True)
    assert out.trajectory is not None
    assert float(out.times[-2]) == path.t_min
    assert sum(math.isclose(t, path.t_min, rel_tol=1e-5) for t in score.asked) == solver.stages
    if not getattr(solver, "rewrites", False):  # else the state before the last step was corrected there
        assert float((out.x - 0.5 * out.trajectory[-2]).abs().max()) < 1e-6


@pytest.mark.parametrize("solver", MULTISTEP, ids=lambda s: str(s)[:60])
@pytest.mark.parametrize("wrap", [Churn, Ancestral])
def test_noise_at_every_step_refuses_a_method_that_goes_on_from_earlier_ones(solver, wrap):
    """It would run without its history: of order one, under a declared two."""
    with pytest.raises(InputError, match="single-step"):
        wrap(solver)


@pytest.mark.parametrize(
    "inner", [Multistep(1, "x0"), FixedWeights(((1.0,),)), STAGES, RungeKutta(HEUN, "rho"), DPMSolverV3(1)]
)
def test_single_step_methods_may_be_wrapped(inner):
    for wrap in (Churn, Ancestral, Restart):
        assert wrap(inner).weak == inner.order


@pytest.mark.parametrize(
    "inner", [UniPC(2), DPMSolverV3(2, lower_final=True, corrector=1), Started(Multistep(3, "x0"), STAGES)]
)
def test_restart_keeps_the_order_of_a_multistep_method(inner):
    """Every passage begins anew, the main run goes on from the last one."""
    result = convergence(Restart(inner), "weak", orders.gaussian(VP()), steps=(80, 160), low=orders.LOW, high=orders.HIGH)
    assert result.declared == inner.order
    assert abs(result.measured - inner.order) <= orders.TOLERANCE, result


def test_a_start_graded_into_no_levels_is_the_method():
    path = VP()
    grid = path.time(torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)).tolist()
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, graded = (integrate(m, Counted(path), x, grid) for m in (Multistep(3, "x0"), GradedStart(Multistep(3, "x0"), 0)))
    assert torch.equal(plain.x, graded.x)
    assert plain.nfe == graded.nfe
    with pytest.raises(InputError, match="levels=-1"):
        GradedStart(Multistep(3, "x0"), -1)


def test_restart_around_a_multistep_method_without_passages_is_the_method():
    path = VP()
    grid = path.time(torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)).tolist()
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = Counted(path)
    plain = integrate(Multistep(3, "x0"), score, x, grid).x
    outside = Restart(Multistep(3, "x0"), ((0.01, 0.02, 2),))
    assert float((integrate(outside, score, x, grid).x - plain).abs().max()) < 1e-14
    once = Restart(Multistep(3, "x0"), ((0.5, 1.5, 1),), steps=1)
    plan, alone = trace(once, path, grid), trace(Multistep(3, "x0"), path, grid)
    assert plan.nfe == alone.nfe + 1


@pytest.mark.parametrize(
    "predictor",
    [UniPC(2), DPMSolverV3(2, corrector=0), Started(UniPC(3), STAGES), GradedStart(UniPC(1))],
)
def test_a_predictor_that_rewrites_its_start_would_undo_a_langevin_corrector(predictor):
    with pytest.raises(InputError, match="undo"):
        PredictorCorrector(predictor)


@pytest.mark.parametrize(
    "predictor", [Multistep(2, "x0"), UniPC(2, corrector=False), AdamsMoulton(2, 3), AdamsMoulton(2, 3, mode="PECE")]
)
def test_other_multistep_predictors_are_corrected(predictor):
    """The corrector's work stays: the two runs differ by more than its last step."""
    path = VP()
    score = Counted(path)
    grid = path.time(torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)).tolist()
    x = torch.ones(3, 2, dtype=torch.float64)
    out = integrate(PredictorCorrector(predictor, Langevin(rule="sigma")), score, x, grid, seed=1)
    alone = integrate(predictor, score, x, grid, seed=1)
    assert float((out.x - alone.x).abs().max()) > 0.02
    assert out.nfe == alone.nfe + 5


def test_rewrites_is_said_of_those_that_do():
    """Their step does not begin where the last one ended: with a history, the state handed over does not matter."""
    path = VP()
    knots = path.knots(path.time(torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)), grid=True)

    class Problem:
        def __init__(self):
            self.path = path

        def predict(self, x, knot):
            return Prediction(torch.full((1, 1), 0.3), torch.full((1, 1), 0.2))

        def eta(self, knot):
            return 0.0

        def keep(self, x):
            return x

    def noise(s, t):
        raise AssertionError

    checked = 0
    for solver in [*MULTISTEP, *(e.solver for e in SOLVERS.values() if hasattr(e.solver, "remember"))]:
        if getattr(solver, "reversible", False):
            continue
        x = torch.ones(1, 1, dtype=torch.float64)
        x, carry = solver.step(Problem(), x, knots[0], knots[1], None, noise)
        if hasattr(solver, "main"):  # the start is over after its steps
            continue
        ends = [solver.step(Problem(), x + d, knots[1], knots[2], carry, noise).x for d in (0.0, 1.0)]
        ignored = math.isclose(float(ends[0]), float(ends[1]), abs_tol=1e-12)
        late = getattr(solver, "corrector", None) == 0 and isinstance(solver, DPMSolverV3)  # its first step is not corrected
        assert ignored == (getattr(solver, "rewrites", False) and not late), solver
        checked += 1
    assert checked > 20
