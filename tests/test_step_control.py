"""Step control a sample: its steps and its bits are those it has alone. And what is reversible comes back."""

from __future__ import annotations

import pytest
import torch

from scores import Gaussian, GaussianMixture, Score
from sde import VP
from sde.errors import StepLimitError, ToolkitError
from solvers import SOLVERS, encode, integrate, sample
from solvers.adaptive import Adaptive

ADAPTIVE = [n for n, e in SOLVERS.items() if isinstance(e.solver, Adaptive)]
REVERSIBLE = [n for n, e in SOLVERS.items() if getattr(e.solver, "reversible", False)]
TIMES = VP().time([-1.0, 2.0]).tolist()


def elementwise(x, t):
    return 0.8 * x / (x * x + 1.0) + 0.1


def mixture():
    means = torch.tensor([[1.0, 0.5], [-0.8, 0.1]], dtype=torch.float64)
    return GaussianMixture(VP(), [0.4, 0.6], means, torch.tensor([0.1, 0.2], dtype=torch.float64))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_sample_takes_the_steps_it_takes_alone(name):
    score = Score(elementwise, VP(), "x0")
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = integrate(name, score, x, TIMES).x
    for i in range(len(x)):
        assert torch.equal(integrate(name, score, x[i : i + 1], TIMES).x[0], together[i])
    order = [3, 0, 4, 1, 2]
    assert torch.equal(integrate(name, score, x[order], TIMES).x, together[order])


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_error_of_every_sample_follows_the_tolerance(name):
    from dataclasses import replace

    score = Gaussian(VP(), torch.tensor([0.5, -1.0]).double(), var=torch.tensor([0.04, 1.0]).double())
    x = score.sample(16, t=TIMES[0], seed=1).double()
    exact = score.flow(x, *TIMES)
    worst = []
    for tolerance in (1e-3, 1e-5):
        out = integrate(replace(SOLVERS[name].solver, rtol=tolerance, atol=tolerance), score, x, TIMES)
        worst.append(float((out.x - exact).abs().max()))
        assert worst[-1] <= 10 * tolerance * (1.0 + float(x.abs().max()))
        assert out.accepted > 0
    assert worst[1] < worst[0]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_limit_on_calls_keeps_what_was_reached(name):
    score = Gaussian(VP(), torch.zeros(2).double(), std=0.5)
    with pytest.raises(StepLimitError) as caught:
        sample(score, (3, 2), solver=name, nfe=7)
    assert caught.value.partial.shape == (3, 2)
    assert caught.value.partial.isfinite().all()


@pytest.mark.parametrize("name", REVERSIBLE)
def test_encoding_and_decoding_comes_back(name):
    score, x = mixture(), mixture().sample(8, seed=3).double()
    ends = {"start": TIMES[0], "stop": TIMES[1], "grid": "log_snr"}
    there = encode(score, x, solver=name, steps=12, **ends)
    back = sample(score, x=there.x, carry=there.carry, solver=name, steps=12, **ends)
    assert float((back.x - x).abs().max()) <= 1e-9
    without = sample(score, x=there.x, solver=name, steps=12, **ends)
    assert float((without.x - x).abs().max()) > 1e-6  # the second state is what makes it exact


@pytest.mark.parametrize("name", REVERSIBLE)
def test_a_carry_goes_to_the_solver_it_is_of(name):
    score, x = mixture(), mixture().sample(4, seed=3).double()
    there = encode(score, x, solver=name, steps=5, start=TIMES[0], stop=TIMES[1])
    for other, state in (("ddim", there.x), (name, there.x[:2])):
        with pytest.raises(ToolkitError):
            sample(score, x=state, carry=there.carry, solver=other, steps=5, start=TIMES[0], stop=TIMES[1])
