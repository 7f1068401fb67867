"""A self-test of a wrapped network: is it wired as it was trained, and if not, which line is to be changed?

    print(check(Score(network, VP(), "eps"), images))

It calls the network, compares what comes back with what any right wiring must give, and names the mistake that explains the
difference. What is a mistake is data: ``MISTAKES`` are the names, ``wirings`` the changes that are tried.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sde.errors import InputError
from sde.prediction import Predictor

from ..network import Score
from .bench import Bench
from .calls import first_calls
from .case import Case, open_case
from .evidence import with_data, without_data
from .predictor import consistent
from .report import MISTAKES, Diagnosis, Finding, Measured
from .wirings import Wiring

__all__ = ["MISTAKES", "Diagnosis", "Finding", "Measured", "check"]


def check(
    score: Predictor, data: Tensor | None = None, *, shape: Sequence[int] | None = None, seed: int = 0, **conditions: Any
) -> Diagnosis:
    """What is wrong in the wiring of a score: ``print(check(score, images))``; ``.ok`` where nothing was found.

    score       a Score, from an adapter or by hand; other scores (exact laws, guided scores) are only asked whether their
                predictions are consistent
    data        clean samples (B, *event), scaled as the network is to see them; 64 or more are best, 2 are needed. Without
                any, ``shape`` is needed, and less can be told: the network is judged on its own samples.
    shape       the shape of a batch, such as (16, 3, 32, 32), where there are no data
    seed        of the noise, which no run of yours draws
    conditions  keyword arguments of the network, such as y=labels: a row a sample of ``data``, or one row for all

    With data, at six noise levels sigma / alpha from 0.15 to 9 deviations of the data, the mean square of x0-hat - x0 is held
    against the best affine map of the same input and output, which a posterior mean cannot be improved by. Where it is
    improved, every other wiring of ``wirings`` is tried, and that one named which explains the data markedly better, as well as
    simple denoisers would. What nothing explains is said as seen.

    Cost: 17 calls where all is right (31 without data), else up to some 300 (1500). The network is left in the mode and
    with the buffers that it had. What cannot be told: mistakes that change the error by less than a few hundredths, such as two
    nearly equal beta tables.
    Errors: InputError for arguments that cannot be used. What the network raises becomes a finding.
    Source: the denoising identity of Vincent 2011, doi:10.1162/NECO_a_00142, and Stein's lemma.
    """
    from ..adapters.latent_diffusion import LatentScore

    inner = score
    while isinstance(inner, LatentScore):
        inner = inner.score
    if not isinstance(inner, Predictor):
        raise InputError(f"score is a {type(score).__name__}: wrap the network first, Score(network, path, ...)")
    case = open_case(inner, data, shape, seed, conditions)
    with _no_trace(inner, case.x0.device):
        if isinstance(inner, Score):
            return case.diagnosis(_network(case, inner))
        return case.diagnosis(consistent(case, inner))


@contextmanager
def _no_trace(score: Predictor, device: torch.device) -> Generator[None, None, None]:
    """No gradients, no warnings, and afterwards the global generators and the network's buffers as they were."""
    module = getattr(score, "_module", None)
    kept: list[tuple[Tensor, Tensor]] = []
    if isinstance(module, nn.Module) and any(m.training for m in module.modules()):
        kept = [(b, b.clone()) for b in module.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for buffer, before in kept:
                buffer.copy_(before)


def _network(case: Case, score: Score) -> int:
    bench = Bench(score, case.x0, case.seed, case.conditions)
    base = first_calls(case, bench, Wiring(score.path, score.label or (lambda t: t), score.scale))
    if base is not None:
        (without_data if case.data is None else with_data)(case, bench, base)
    return bench.tally.nfe
