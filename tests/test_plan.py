"""The table: short rows, exact JSON, refusal of damage and of another path."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import one_of_each_kind

from scores import Gaussian
from sde import EDM, VP
from sde.errors import InputError
from solvers import SOLVERS, Plan, trace
from solvers.convergence import warped_grid
from solvers.plan import Call, Lin

TRACEABLE = [name for name in one_of_each_kind() if SOLVERS[name].solver.linear]


def plan_of(name, n=60):
    return trace(name, VP(), warped_grid(VP(), n))


@pytest.mark.parametrize("name", TRACEABLE)
def test_rows_stay_short(name):
    """A row combines what one step needs: a velocity is two registers, and a four-step corrector five velocities. Forms that
    grow from step to step would make a run quadratic in the steps.
    """
    plan = plan_of(name)
    assert max(len(row.terms) for row in plan.rows if isinstance(row, Lin)) <= 10
    assert len(plan.rows) <= 12 * plan.steps * max(SOLVERS[name].solver.stages, 1)
    assert plan.nfe == sum(isinstance(row, Call) for row in plan.rows)


@pytest.mark.parametrize("name", TRACEABLE)
def test_json_keeps_every_bit(name):
    plan = plan_of(name)
    text = plan.to_json()
    json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert Plan.from_json(text) == plan


@pytest.mark.parametrize("name", ["dpmpp_2m", "rk4"])
def test_json_of_a_plan_that_ends_at_the_data(name):
    """lambda is infinite there, which JSON has no number for."""
    times = [1.0, 0.5, 0.1, 1e-3] if name == "rk4" else [1.0, 0.5, 0.1, 0.0]
    plan = trace(name, VP(), times)
    assert Plan.from_json(plan.to_json()) == plan


def test_damaged_tables_are_refused():
    good = json.loads(plan_of("unipc_3", 4).to_json())
    wrongs = [
        {},
        {**good, "format": 99},
        {**good, "rows": good["rows"][1:]},
        {**good, "rows": [["exec", 1, 2]]},
        {**good, "states": good["states"][:-1]},
        {**good, "times": "abc"},
        {**good, "rows": [*good["rows"][:-1], [good["rows"][-1][0], 1, [[999, 1.0]]]]},
    ]
    for wrong in [json.dumps(w) for w in wrongs] + ["", "[]", "null", "{" * 50]:
        with pytest.raises(InputError):
            Plan.from_json(wrong)


@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=150)
def test_any_changed_byte_is_refused_or_still_a_table(place, byte):
    text = bytearray(plan_of("dpmpp_2m", 3).to_json().encode())
    text[place % len(text)] = byte
    try:
        plan = Plan.from_json(text.decode("utf-8", errors="replace"))
    except InputError:
        return
    assert isinstance(plan, Plan)


def test_another_path_is_refused():
    score = Gaussian(EDM(), torch.zeros(2), var=1.0)
    with pytest.raises(InputError, match=r"trace on score\.path"):
        plan_of("ddim", 3).run(score, torch.zeros(1, 2))


def test_a_plan_runs_on_any_score_of_its_path():
    plan = plan_of("dpmpp_2m", 5)
    x = torch.ones(2, 3, dtype=torch.float64)
    for mean in (0.0, 1.0):
        score = Gaussian(VP(), torch.full((3,), mean, dtype=torch.float64), var=1e-12)
        assert torch.allclose(plan.run(score, x), plan.run(score, x))
        assert float((plan.run(score, x) - plan.grid[-1].alpha * mean).abs().max()) < 0.2


def test_iterate_hands_over_the_network_calls():
    plan = plan_of("edm_heun", 4)
    score = Gaussian(VP(), torch.zeros(3, dtype=torch.float64), var=0.5)
    x = torch.ones(2, 3, dtype=torch.float64)
    from sde.prediction import Tally

    gen = plan.iterate(score, x)
    state, knot = next(gen)
    calls = 0
    try:
        while True:
            calls += 1
            (call,) = score.at([knot], state, {}, Tally())
            state, knot = gen.send(call(state))
    except StopIteration as stop:
        torch.testing.assert_close(stop.value, plan.run(score, x), rtol=0, atol=0)
    assert calls == plan.nfe == 8
