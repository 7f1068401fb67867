"""torchdiffeq behind the same call: gradients, samples one by one with their own rows, one budget for all of them."""

from __future__ import annotations

import pytest
import torch

from scores import Gaussian, Score
from sde import VP
from sde.errors import StepLimitError
from solvers import integrate
from solvers.backends import TorchDiffEq, TorchSDE, _Reverse
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
