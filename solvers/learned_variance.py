"""Ancestral sampling with the variance that the network has learned (Improved DDPM, guided-diffusion, DiT).

A step s -> t of a variance-preserving chain has beta = 1 - (alpha_s / alpha_t)^2, that of a respaced table when s and t are
entries further apart. Its exact posterior q(x_t | x_s, x_0) has the variance beta_tilde = beta sigma_t^2 / sigma_s^2, which is
right for data without spread; beta itself is right for data that are unit normals. In between the network chooses, for each
pixel, by an output v in [-1, 1] (Nichol & Dhariwal 2021, eq. 15):

    x_t = mean of q(x_t | x_s, x0(x_s)) + exp(w/2 log beta + (1 - w)/2 log beta_tilde) z,    w = (1 + v) / 2

The scale of z is a tensor, so this is no row of a table of numbers: it marches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from sde.prediction import Knot

from .base import Form, Noise, Step
from .stochastic import check_variance_preserving


@dataclass(frozen=True)
class LearnedVariance:
    """The ancestral step of ``guided_diffusion`` with ``learn_sigma``; for scores made with ``split="learned_var"``, on
    variance-preserving paths. One network call a step.

    Weak order 1, like 'ddpm': beta and beta_tilde differ by O(h^2). At sigma_t = 0 the state becomes alpha_t x0 and no noise is
    drawn, as published for the last entry; give ``stop=0`` to end there. Published samplers also clip x0 to [-1, 1]: that is
    thresholding, a property of the score.

    Reference: Nichol & Dhariwal 2021, arXiv:2102.09672; Dhariwal & Nichol 2021, arXiv:2105.05233.
    """

    stages = 1
    order = strong = None
    weak = 1.0
    stochastic = True
    takes_eta = linear = False
    target = None
    invariant = False

    def step(self, problem: Any, x: Form, s: Knot, t: Knot, carry: Any, noise: Noise) -> Step:
        check_variance_preserving(s, "a learned variance")
        pair, v = problem.predict_with_variance(x, s)
        if t.sigma == 0.0:
            return Step(t.alpha * pair.x0)
        rest = -math.expm1(2.0 * (s.lam - t.lam))  # 1 - (sigma_t alpha_s / (sigma_s alpha_t))^2
        large, small = s.sigma**2 * rest, t.sigma**2 * rest  # beta and beta_tilde
        mean = pair.combine(t.alpha, t.sigma**2 * s.alpha / (t.alpha * s.sigma))
        spread = torch.exp((0.25 * (1.0 + v)) * math.log(large) + (0.25 * (1.0 - v)) * math.log(small))
        return Step(mean + spread * noise(s, t))
