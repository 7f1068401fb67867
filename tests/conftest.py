"""Shared settings of all tests."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# CI draws the same examples every time; a developer's machine looks for new ones.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "dev")

torch.set_num_threads(1)

#: Tests of promises that a solver keeps by its class: `make test` runs them for one row of each, `make slow` for one of each
#: combination of options, or for every row. Budgets are kept by every row there is: constants could break that.
BY_CLASS = (
    "test_contract.py",
    "test_bad_input.py",
    "test_plan.py",
    "test_bridge_",
    "test_laws.py::test_samples_",
    "test_laws.py::test_no_time",
    "test_laws.py::test_the_same_log_snr_grid",
    "test_stochastic.py::test_noise_levels_may",
)
FOR_ALL = ("::test_calls_are_counted_at_the_network_and_never", "::test_few_steps_work")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from rows import one_of_each_class

    from solvers import SOLVERS

    some = set(one_of_each_class())
    for item in items:
        given = getattr(item, "callspec", None)
        of_class = any(f"/{place}" in f"/{item.nodeid}" for place in BY_CLASS)
        if given is None or not of_class or any(name in item.nodeid for name in FOR_ALL):
            continue
        named = {v for key in ("name", "solver") if isinstance(v := given.params.get(key), str) and v in SOLVERS}
        if named - some:
            item.add_marker(pytest.mark.slow)
