"""Shared settings of all tests."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

# CI draws the same examples every time; a developer's machine looks for new ones.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "dev")

torch.set_num_threads(1)
