"""Guidance: functions Score -> Score. What comes out is a score like any other, for every sampler and for guidance again.

    classifier_free(score, w, unconditional={"y": 1000})     unconditional + w (conditional - unconditional)
    autoguidance(score, worse, w)                            the same against a worse network
    perpendicular_negative(score, w, unconditional=, negative=)   negative prompts across the positive one
    interval(guided, low, high)                              guided only where low < sigma/alpha <= high
    rescale(guided, phi)                                     the spread of the conditional prediction
    apg(guided, eta=, threshold=)                            adaptive projected guidance
    classifier(score, log_prob, w)                           the gradient of a classifier
    dps(score, log_likelihood, w)                            the gradient of a likelihood of x0, through the network
    pigdm(score, y, operator, noise=)                        posterior sampling for a linear observation
    inpaint(score, known, mask)                              x0 replaced where it is known
    static_threshold(score), dynamic_threshold(score)        x0 clipped

    sample(classifier_free(score, 3.0, unconditional={"y": 10}), shape, nfe=20, conditions={"y": labels})

Budgets and counts are of network calls: two calls an evaluation make half the steps. Guidance nests: thresholds go around the
guidance whose x0 they clip, and classifier-free guidance inside that of an observation.

CFG++ (Chung et al. 2024) renoises with the unconditional eps; on the table of a sampler it is classifier-free guidance with the
scale ``solvers.guided.cfg_pp(plan, lam)``. RePaint's resampling is the solver ``solvers.guided.Resample``.
"""

from .base import interval as interval
from .contrast import apg as apg
from .contrast import autoguidance as autoguidance
from .contrast import classifier_free as classifier_free
from .contrast import perpendicular_negative as perpendicular_negative
from .contrast import rescale as rescale
from .edits import dynamic_threshold as dynamic_threshold
from .edits import inpaint as inpaint
from .edits import static_threshold as static_threshold
from .gradient import classifier as classifier
from .gradient import dps as dps
from .gradient import pigdm as pigdm
