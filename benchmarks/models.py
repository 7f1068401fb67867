"""Loading what is measured: a built-in problem by name, or ``module:function`` of the caller's own.

The function is called without arguments, or with ``device=`` where it has such a parameter, and returns a Score, a pair
(Score, data) with data (N, *shape), or a ``benchmarks.problems.Problem``.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from scores import Score
from sde.errors import InputError, RunError, nearest
from sde.prediction import Predictor

from . import problems, provenance
from .lines import Meter
from .problems import Problem, with_network
from .sweep import Facts, Sweep

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model: the metered score that samplers get, the problem that metrics get, and what its files depend on."""

    facts: Facts
    problem: Problem
    score: Meter
    device: torch.device
    dtype: torch.dtype


def look(text: str) -> None:
    """InputError for a model that does not exist, before anything is loaded or written."""
    if builtin(text):
        problems.get(text)
    elif ":" in text:
        _function(text)
    else:
        raise InputError(f"--model {text!r} is unknown: {nearest(text, problems.PROBLEMS)}; or give module:function")


def builtin(text: str) -> bool:
    """Whether the name is one of the harness's own, with its noise."""
    return text.partition(":")[0] in (*problems.PROBLEMS, "gaussian")


def load(text: str, sweep: Sweep, device: torch.device) -> Model:
    """A model of ``--model``, on its device. InputError: no such model, or nothing that can be measured."""
    dtype = torch.float64 if sweep.dtype == "float64" else torch.float32
    if builtin(text):
        problem, source = problems.get(text), ""
    else:
        problem, source = _own(text, sweep, device)
    problem = problem.between(sweep.start_time, sweep.stop)
    score = problem.score(device, dtype)
    weights = hashlib.sha256(f"{provenance.weights(score)}{source}".encode()).hexdigest()[:16]
    score = _compiled(_cast(score, sweep, device, dtype, text), sweep, text)
    return Model(Facts(text, weights, tuple(problem.shape)), problem, Meter(score, device), device, dtype)


# --- the caller's own -------------------------------------------------------------------------------------------------------


def _own(text: str, sweep: Sweep, device: torch.device) -> tuple[Problem, str]:
    """The problem that module:function gives, and a digest of its data and of the code that is the caller's own."""
    function = _function(text)
    try:
        wants = "device" in inspect.signature(function).parameters
        found = function(device=device) if wants else function()
    except Exception as error:
        raise RunError(f"--model {text}: {function.__name__}() raised {type(error).__name__}: {str(error)[:300]}") from error
    if isinstance(found, Problem):
        return replace(found, name=text), _digest(found, function, found.network)
    score, data = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(score, Predictor):
        kind = type(score).__name__
        raise InputError(f"--model {text} returned a {kind}: give a Score, (Score, data), or a Problem of benchmarks.problems")
    if data is not None and not isinstance(data, Tensor):
        raise InputError(f"--model {text} returned data of type {type(data).__name__}: give a tensor (N, *shape)")
    shape = sweep.shape or (tuple(data.shape[1:]) if data is not None else tuple(getattr(score, "event_shape", ())))
    if not shape:
        raise InputError(f"--model {text} does not say the shape of a sample: give it, such as --shape 3 32 32")
    problem = problems.wrap(score, shape, name=text, data=data)
    return problem, _digest(problem, function, getattr(score, "network", None))


def _digest(problem: Problem, function: Any, network: Any) -> str:
    """Of what the weights do not tell: the data, and the code that is the caller's own."""
    parts = network.modules() if isinstance(network, nn.Module) else [network]
    used = {getattr(part, "__module__", None) or "" for part in (function, *parts)}
    words = provenance.sources(used), provenance.weights((problem.data, problem.held_out, problem.features))
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def _function(text: str) -> Any:
    name, _, attribute = text.partition(":")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) or not re.fullmatch(r"[A-Za-z_]\w*", attribute):
        raise InputError(f"--model {text!r}: give a built-in problem, or module:function, such as my_module:load_score")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"--model {text}: module {name} needs {error.name!r}, which is not installed") from error
        hint = nearest(name, problems.PROBLEMS) if difflib.get_close_matches(name, problems.PROBLEMS) else "run where it lies"
        raise InputError(f"--model {text}: there is no module {name!r}; {hint}") from None
    except Exception as error:
        raise RunError(f"--model {text}: importing {name} raised {type(error).__name__}: {str(error)[:300]}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise InputError(f"--model {text}: {name} has no function {attribute!r}: {nearest(attribute, known)}")
    return function


# --- precision and compilation ------------------------------------------------------------------------------------------------


def _cast(score: Predictor, sweep: Sweep, device: torch.device, dtype: torch.dtype, text: str) -> Predictor:
    """The score with its network on the device, in the dtype of the state, or in half precision."""
    network = getattr(score, "network", None)
    half = HALF.get(sweep.dtype)
    if not isinstance(score, Score) or not isinstance(network, nn.Module):
        if half is not None:
            raise InputError(f"--dtype {sweep.dtype}: {text} is not a Score of a network that could be cast; use float32")
        return score
    if half is None and score.dtype is not None:  # a precision of its own
        network.to(device=device)
        return score
    network.to(device=device, dtype=half or dtype)
    return with_network(score, network, half) if half is not None else score


def _compiled(score: Predictor, sweep: Sweep, text: str) -> Predictor:
    if sweep.compile == "no":
        return score
    if not isinstance(score, Score):
        raise InputError(f"--compile {sweep.compile}: {text} is not a Score of a network; leave it out")
    compiled = torch.compile(score.network, mode=sweep.compile)
    if sweep.compile == "default":
        return with_network(score, compiled, score.dtype)

    def network(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*args, **kwargs)  # lies in the graph's own memory, which the next call writes again
        return out.clone() if isinstance(out, Tensor) else out

    return with_network(score, network, score.dtype)
