"""torchdiffeq and torchsde behind the same call: gradients, samples one by one with their own rows, one budget for all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scores import Gaussian, Score
from sde import VP, ReverseSDE, White
from sde.errors import NetworkError, StepLimitError
from solvers import SOLVERS, integrate
from solvers.backends import TorchDiffEq, TorchSDE, _Reverse, _seeds
from solvers.base import Evaluator

PATH = VP()
TIMES = [1.0, 1e-3]


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_gradients_are_those_of_the_flow(method):
    """d x_end / d x_start of Gaussian data's affine flow, and the gradient in the mean of the data; torchdiffeq's own choice of
    a first step would put them off by 1e-3.
    """
    law = Gaussian(PATH, torch.zeros(1, dtype=torch.float64), var=0.3)
    mean = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)

    def network(x, t):  # eps = sigma (x - alpha mean) / (alpha^2 var + sigma^2)
        alpha, sigma = PATH.alpha(t)[:, None], PATH.sigma(t)[:, None]
        return sigma * (x - alpha * mean) / (alpha**2 * 0.3 + sigma**2)

    x = torch.tensor([[0.7], [-1.1]], dtype=torch.float64, requires_grad=True)
    end = integrate(TorchDiffEq(method, rtol=1e-7, atol=1e-7), Score(network, PATH), x, TIMES, grad=True).x
    in_x, in_mean = torch.autograd.grad(end.sum(), (x, mean))
    s, t = PATH.knots(TIMES)
    gain = ((t.alpha**2 * 0.3 + t.sigma**2) / (s.alpha**2 * 0.3 + s.sigma**2)) ** 0.5
    torch.testing.assert_close(in_x, torch.full_like(x, gain), rtol=2e-6, atol=0.0)
    torch.testing.assert_close(in_mean, torch.tensor([2 * (t.alpha - gain * s.alpha)]).double(), rtol=2e-6, atol=0.0)
    assert float((law.flow(x.detach(), *TIMES) + (t.alpha - gain * s.alpha) * 0.4 - end.detach()).abs().max()) < 1e-5


def network(x, t, y):
    """Labels and conditions of one row a sample, or it does not broadcast."""
    assert len(t) == len(y) == len(x)
    return (0.3 + y[:, None]) * x * (1.0 + t[:, None])


def test_one_by_one_each_sample_has_its_own_conditions():
    x, y = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0.1, 0.4, 0.7]).double()
    whole = integrate(TorchDiffEq("dopri5", per_sample=True), Score(network, PATH), x, TIMES, conditions={"y": y})
    for i in range(3):
        alone = integrate(TorchDiffEq("dopri5"), Score(network, PATH), x[i : i + 1], TIMES, conditions={"y": y[i : i + 1]})
        assert torch.equal(alone.x[0], whole.x[i])
    assert whole.nfe == sum(
        integrate(TorchDiffEq("dopri5"), Score(network, PATH), x[i : i + 1], TIMES, conditions={"y": y[i : i + 1]}).nfe
        for i in range(3)
    )


def test_one_by_one_the_budget_is_that_of_the_run():
    x, y = torch.ones(3, 2, dtype=torch.float64), torch.full((3,), 0.2, dtype=torch.float64)
    score, given = Score(network, PATH), {"y": y}
    each = integrate(TorchDiffEq("dopri5"), score, x[:1], TIMES, conditions={"y": y[:1]})
    with pytest.raises(StepLimitError, match="max_nfe") as caught:
        integrate(TorchDiffEq("dopri5", per_sample=True, max_nfe=each.nfe + 9), score, x, TIMES, conditions=given)
    assert torch.equal(caught.value.partial[0], each.x[0])  # done
    assert not torch.equal(caught.value.partial[1], x[1])  # on its way
    assert torch.equal(caught.value.partial[2], x[2])  # not begun


def test_the_table_says_whose_steps_are_those_of_the_batch():
    shared = {name for name, entry in SOLVERS.items() if getattr(entry.solver, "per_sample", True) is False}
    adaptive = {name for name in shared if getattr(SOLVERS[name].solver, "adaptive", False)}
    assert adaptive == {name for name, entry in SOLVERS.items() if "steps of the batch" in entry.summary} != set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_seed_has_a_brownian_motion_of_its_own_under_step_control(dtype):
    """A normal of half the precision has too few bits for a seed, and in float64 its low ones are zero."""
    s = PATH.knot(1.0)
    draws = White(seeds=range(500)).open((500, 1), dtype)
    found = _seeds(lambda k, s, t, like: draws.normal(k, s, t), s, torch.zeros(500, 1, dtype=dtype))
    assert len(set(found)) == 500


def test_step_control_of_torchsde_one_by_one():
    """Each sample as it is alone, steps and noise; the budget is that of the run, and an error names its sample."""
    y = torch.tensor([0.1, 0.4, 0.7], dtype=torch.float64)
    x, options = White(2).initial((3, 2), torch.float64), {"adaptive": True, "rtol": 0.05, "atol": 0.05}
    solver, problem = TorchSDE("srk", per_sample=True, **options), ReverseSDE(PATH, Score(network, PATH), 1.0)
    whole = integrate(solver, problem, x, TIMES, seed=5, conditions={"y": y})
    calls = []
    for i in range(3):
        given = {"noise": White(5, indices=[i]), "conditions": {"y": y[i : i + 1]}}
        for alone in (solver, TorchSDE("srk", **options)):
            one = integrate(alone, problem, x[i : i + 1], TIMES, **given)
            assert torch.equal(one.x[0], whole.x[i])
        calls.append(one.nfe)
    assert whole.nfe == sum(calls)
    assert len(set(calls)) > 1  # their steps differ
    assert not torch.equal(integrate(TorchSDE("srk", **options), problem, x, TIMES, seed=5, conditions={"y": y}).x, whole.x)

    with pytest.raises(StepLimitError, match="max_nfe") as caught:
        integrate(replace(solver, max_nfe=calls[0] + 9), problem, x, TIMES, seed=5, conditions={"y": y})
    assert torch.equal(caught.value.partial[0], whole.x[0])
    assert torch.equal(caught.value.partial[2], x[2])

    def fails(x, t, y):
        return torch.full_like(x, float("nan")) if y[0] == 0.7 else network(x, t, y)

    with pytest.raises(NetworkError) as failed:
        integrate(solver, ReverseSDE(PATH, Score(fails, PATH), 1.0), x, TIMES, seed=5, conditions={"y": y})
    assert failed.value.samples == (2,)


def test_torchsde_is_handed_the_knots_of_both_ends_and_not_ones_beside_them():
    """Its clock counts from zero: start - (start - stop) is not stop to the last bit."""
    path = VP()
    s, t = path.knots([1.0, 1e-3])
    assert 1.0 - (1.0 - t.t) != t.t
    x = torch.zeros(2, 3, dtype=torch.float64)
    field = _Reverse(Evaluator(Score(lambda x, t: x, path), x, {}), s, t, x.shape, TorchSDE("euler"))
    assert field._knot(0.0) == s
    assert field._knot(field.span) == t
    assert field._knot(field.span / 2).t == 1.0 - field.span / 2
