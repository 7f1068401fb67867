"""Bad input: each case gives one clear error of the right class, never silence, a hang or another library's exception.

Numbers B1, B2, ... group the cases: what a network returns, conditions, times, steps, names, states, seeds, parameters, paths.
Cases that reach the solvers run with one of every kind: traced, stochastic, without a table, and back ends of two libraries.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path as File
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rows import one_of_each_kind
from torch import Tensor, nn

from scores import Gaussian, Score
from sde import (
    EDM,
    VE,
    VP,
    Cosine,
    ForwardSDE,
    FromCoefficients,
    FromFunctions,
    Linear,
    ProbabilityFlow,
    ReverseSDE,
    SubVP,
    Tabulated,
)
from sde.errors import (
    BudgetWarning,
    CallbackError,
    InputError,
    NetworkError,
    PathError,
    PrecisionWarning,
    StepLimitError,
    ToolkitError,
    TrainModeWarning,
)
from sde.noise import Brownian, White
from solvers import GRIDS, SOLVERS, Plan, encode, integrate, sample, trace
from solvers.backends import TorchDiffEq, TorchSDE
from solvers.compose import Churn, Langevin, PredictorCorrector
from solvers.exponential import Multistep, UniPC
from solvers.runge_kutta import EULER, RK4, RungeKutta
from solvers.stochastic import AnnealedLangevin, EulerMaruyama

KINDS = ("dpmpp_2m", "heun", "euler_maruyama", "pc_ddpm", "dopri5", "torchsde_euler", "torchsde_adaptive")
X = torch.full((4, 2), 0.5)
TIMES = (0.9, 0.7, 0.5, 0.3, 0.1)


def network(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


def returns(value: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    return lambda x, t: value(x)


def score(net: Any = network, **options: Any) -> Score:
    return Score(net, VP(), options.pop("predicts", "x0"), **options)


def run(solver: Any = "dpmpp_2m", net: Any = network, x: Any = X, times: Any = TIMES, **options: Any) -> Tensor:
    return integrate(solver, score(net), x, times, **options).x


class Case(NamedTuple):
    name: str
    error: type[Exception]
    says: str  # parts of the message, separated by |
    call: Callable[..., Any]


def clear(error: BaseException, case: Case) -> None:
    """The class is exact, the message short and it names what the case wants named."""
    text = str(error)
    assert type(error) is case.error, f"{type(error).__name__}: {text}"
    assert len(text) < 400, text
    assert "tensor([" not in text, text
    for part in case.says.split("|"):
        assert part in text, f"{part!r} not in {text!r}"


class Falling(VP):
    """A path whose sigma is wrong near the data."""

    def _sigma(self, t: Tensor) -> Tensor:
        return t - 0.3


class TwoInputs:
    def __init__(self, x: Any = None) -> None:
        pass

    def __call__(self, x: Tensor) -> Tensor:
        return x


class Element:
    def __init__(self, other: Tensor) -> None:
        self.other = other


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)


def raising(x: Tensor, t: Tensor) -> Tensor:
    raise KeyError("conv_7")


def in_place(x: Tensor, t: Tensor) -> Tensor:
    return x.mul_(0.5)


# --- cases with every kind of solver: call(solver) --------------------------------------------------------------------

N, I, P = NetworkError, InputError, PathError

EVERY = [
    # what the network returns
    Case(
        "B3 output (B, 1)", N, "shape (4, 1)|(4, 2)|broadcasting|step 1/4|t=0.9", lambda s: run(s, returns(lambda x: x[:, :1]))
    ),
    Case("B4 output (B,)", N, "shape (4,)|(4, 2)", lambda s: run(s, returns(lambda x: x[:, 0]))),
    Case("B4 output with a dimension more", N, "(4, 2, 1)", lambda s: run(s, returns(lambda x: x[..., None]))),
    Case(
        "B5 twice the channels",
        N,
        "4 channels for 2|split='learned_var'",
        lambda s: run(s, returns(lambda x: torch.cat([x, x], 1))),
    ),
    Case("B6 tuple", N, "returned tuple|output=0", lambda s: run(s, returns(lambda x: (x, x)))),
    Case("B6 list", N, "returned list|output=0", lambda s: run(s, returns(lambda x: [x]))),
    Case("B7 dict of two", N, "'a', 'b'|output=", lambda s: run(s, returns(lambda x: {"a": x, "b": x}))),
    Case("B7 object", N, "Element|tensor", lambda s: run(s, returns(Element))),
    Case("B8 None", N, "returned None", lambda s: run(s, returns(lambda x: None))),
    Case("B9 int64", N, "int64|need floating", lambda s: run(s, returns(lambda x: x.long()))),
    Case("B9 bool", N, "bool|need floating", lambda s: run(s, returns(lambda x: x > 0))),
    Case("B10 complex", N, "complex", lambda s: run(s, returns(lambda x: x.to(torch.complex64)))),
    Case("B12 other device", N, "meta|cpu", lambda s: run(s, returns(lambda x: x.to("meta")))),
    Case("B13 in place", N, "in place|clone", lambda s: run(s, in_place, X.clone())),
    Case("B18 network raises", N, "KeyError|conv_7|t=0.9|step 1/4", lambda s: run(s, raising)),
    # conditions
    Case(
        "B14 rows of a condition",
        I,
        "y has 3 rows|batch of 4",
        lambda s: run(s, lambda x, t, y: x, conditions={"y": torch.ones(3)}),
    ),
    Case(
        "B14 rows in a dict",
        I,
        "['b']|2 rows|4",
        lambda s: run(s, lambda x, t, y: x, conditions={"y": {"a": torch.ones(4), "b": torch.ones(2)}}),
    ),
    Case("B35 unknown condition", I, "label|(x, t)", lambda s: run(s, lambda x, t: x, conditions={"label": 1})),
    Case("conditions no mapping", I, "conditions|dict", lambda s: run(s, conditions=[1])),
    # the state
    Case("B38 int state", I, "int64|float", lambda s: run(s, x=torch.ones(4, 2).long())),
    Case("B38 bool state", I, "bool", lambda s: run(s, x=torch.ones(4, 2) > 0)),
    Case("B38 numpy", I, "ndarray|torch.from_numpy", lambda s: run(s, x=np.ones((4, 2)))),
    Case("B38 list", I, "list|torch.as_tensor", lambda s: run(s, x=[[1.0, 2.0]])),
    Case("B38 None", I, "NoneType", lambda s: run(s, x=None)),
    Case("B38 0-d", I, "batch dimension", lambda s: run(s, x=torch.tensor(1.0))),
    Case("B38 NaN", I, "not finite|1 of 4|first: 2", lambda s: run(s, x=X.index_fill(0, torch.tensor(2), math.nan))),
    Case("B38 inf", I, "not finite", lambda s: run(s, x=X.index_fill(0, torch.tensor(2), -math.inf))),
    Case("B38 inf of both signs", I, "not finite", lambda s: run(s, x=torch.tensor([[math.inf, 0.0], [-math.inf, 0.0]]))),
    Case("B38 sparse", I, "sparse", lambda s: run(s, x=X.to_sparse())),
    Case("B38 quantised", I, "qint8", lambda s: run(s, x=quantised())),
    Case("B10 complex state", I, "complex", lambda s: run(s, x=X.to(torch.complex64))),
    # times
    Case("B26 not monotone", I, "times[2]=0.6|times[1]=0.2", lambda s: run(s, times=[0.9, 0.2, 0.6])),
    Case("B26 repeated", I, "times[1]=0.5|times[0]=0.5", lambda s: run(s, times=[0.5, 0.5, 0.1])),
    Case("B26 NaN", I, "times[1] is nan", lambda s: run(s, times=[0.9, math.nan, 0.1])),
    Case("B26 NaN first", I, "times[0] is nan", lambda s: run(s, times=[math.nan, 0.5])),
    Case("B26 inf", I, "times[0] is inf", lambda s: run(s, times=[math.inf, 0.5])),
    Case("B27 no times", I, "times|two", lambda s: run(s, times=[])),
    Case("B27 one time", I, "times|two", lambda s: run(s, times=[0.5])),
    Case("B27 2-d times", I, "(2, 2)", lambda s: run(s, times=[[0.9, 0.8], [0.7, 0.6]])),
    Case("B27 bool times", I, "bool", lambda s: run(s, times=torch.tensor([True, False]))),
    Case("B27 complex times", I, "complex", lambda s: run(s, times=torch.tensor([1.0 + 0j, 0.5]))),
    Case("B17 half times", I, "float16|float64", lambda s: run(s, times=torch.tensor([0.9, 0.5], dtype=torch.float16))),
    Case("times as text", I, "times", lambda s: run(s, times="0.9, 0.5")),
    Case("times None", I, "times", lambda s: run(s, times=None)),
    Case("times a number", I, "times", lambda s: run(s, times=0.5)),
    Case("B28 above T", I, "1.2|[0, 1]", lambda s: run(s, times=[1.2, 0.5])),
    Case("B28 below 0", I, "-0.1|[0, 1]", lambda s: run(s, times=[0.5, -0.1])),
    # where to start and stop
    Case("B28 start above T", I, "start=2|[0, 1]", lambda s: sample(score(), (2, 2), solver=s, steps=3, start=2.0)),
    Case(
        "B28 start below stop",
        I,
        "start=0.1|stop=0.5",
        lambda s: sample(score(), (2, 2), solver=s, steps=3, start=0.1, stop=0.5),
    ),
    Case(
        "B28 start is stop", I, "start=0.5|stop=0.5", lambda s: sample(score(), (2, 2), solver=s, steps=3, start=0.5, stop=0.5)
    ),
    Case("B28 NaN stop", I, "stop=nan", lambda s: sample(score(), (2, 2), solver=s, steps=3, stop=math.nan)),
    Case("start as text", I, "start='T'", lambda s: sample(score(), (2, 2), solver=s, steps=3, start="T")),
    Case("start True", I, "start=True", lambda s: sample(score(), (2, 2), solver=s, steps=3, start=True)),
    # how many
    Case("B30 0 steps", I, "steps must be >= 1, got 0", lambda s: sample(score(), (2, 2), solver=s, steps=0)),
    Case("B30 -3 steps", I, "steps must be >= 1, got -3", lambda s: sample(score(), (2, 2), solver=s, steps=-3)),
    Case("B30 0 calls", I, "nfe must be >= 1, got 0", lambda s: sample(score(), (2, 2), solver=s, nfe=0)),
    *[
        Case(
            f"B31 steps={v!r}", I, f"steps must be an int, got {v!r}", lambda s, v=v: sample(score(), (2, 2), solver=s, steps=v)
        )
        for v in (2.5, "8", True, math.nan)
    ],
    Case("B31 nfe=2.0", I, "nfe must be an int, got 2.0", lambda s: sample(score(), (2, 2), solver=s, nfe=2.0)),
    Case("B31 neither", I, "exactly one of nfe= and steps=", lambda s: sample(score(), (2, 2), solver=s)),
    Case("B31 both", I, "exactly one of nfe= and steps=", lambda s: sample(score(), (2, 2), solver=s, steps=3, nfe=3)),
    # names and keywords
    Case("B34 grid", I, "'log_snt'|'log_snr'", lambda s: sample(score(), (2, 2), solver=s, steps=3, grid="log_snt")),
    Case("B34 grid a number", I, "grid=3", lambda s: sample(score(), (2, 2), solver=s, steps=3, grid=3)),
    Case("grid of times", I, "grid|integrate", lambda s: sample(score(), (2, 2), solver=s, steps=3, grid=[1.0, 0.5])),
    Case("B35 sample", TypeError, "stepz", lambda s: sample(score(), (2, 2), solver=s, steps=3, stepz=4)),
    Case("B35 integrate", TypeError, "stepz", lambda s: run(s, stepz=4)),
    Case("B35 encode", TypeError, "seed", lambda s: encode(score(), X, solver="heun", steps=2, seed=4)),
    # shapes and starts
    Case("shape and x", I, "exactly one of shape= and x=", lambda s: sample(score(), (2, 2), x=X, solver=s, steps=3)),
    Case("neither shape nor x", I, "exactly one of shape= and x=", lambda s: sample(score(), solver=s, steps=3)),
    Case("shape a number", I, "shape=4", lambda s: sample(score(), 4, solver=s, steps=3)),
    Case("shape of floats", I, "shape=(4.0, 2)", lambda s: sample(score(), (4.0, 2), solver=s, steps=3)),
    Case("shape negative", I, "shape=(-4, 2)", lambda s: sample(score(), (-4, 2), solver=s, steps=3)),
    Case("shape empty", I, "shape=()", lambda s: sample(score(), (), solver=s, steps=3)),
    Case("shape as text", I, "shape='4, 2'", lambda s: sample(score(), "4, 2", solver=s, steps=3)),
    Case("dtype int", I, "int32", lambda s: sample(score(), (4, 2), solver=s, steps=3, dtype=torch.int32)),
    Case(
        "dtype as text",
        I,
        "dtype='float32'|torch.float32",
        lambda s: sample(score(), (4, 2), solver=s, steps=3, dtype="float32"),
    ),
    # seeds and noise
    Case("B41 negative seed", I, "seed=-1", lambda s: sample(score(), (2, 2), solver=s, steps=3, seed=-1)),
    Case("B41 large seed", I, f"seed={2**64}", lambda s: sample(score(), (2, 2), solver=s, steps=3, seed=2**64)),
    Case("B41 float seed", I, "seed=1.5", lambda s: sample(score(), (2, 2), solver=s, steps=3, seed=1.5)),
    Case("B41 True seed", I, "seed=True", lambda s: sample(score(), (2, 2), solver=s, steps=3, seed=True)),
    Case("B41 seed None", I, "seed=None", lambda s: sample(score(), (2, 2), solver=s, steps=3, seed=None)),
    Case(
        "B42 generator",
        I,
        "seed|Generator|initial_seed",
        lambda s: sample(score(), (2, 2), solver=s, steps=3, seed=torch.Generator()),
    ),
    Case(
        "B42 seeds for another batch",
        I,
        "seeds has 3|batch of 2",
        lambda s: sample(score(), (2, 2), solver=s, steps=3, seeds=[1, 2, 3]),
    ),
    Case(
        "B42 generators",
        I,
        "seeds[0]|Generator",
        lambda s: sample(score(), (2, 2), solver=s, steps=3, seeds=[torch.Generator()] * 2),
    ),
    Case("B42 seeds negative", I, "seeds[1]", lambda s: sample(score(), (2, 2), solver=s, steps=3, seeds=[1, -2])),
    Case("seed and seeds", I, "seed", lambda s: sample(score(), (2, 2), solver=s, steps=3, seed=3, seeds=[1, 2])),
    Case("noise unknown", I, "noise='pink'|'white'", lambda s: sample(score(), (2, 2), solver=s, steps=3, noise="pink")),
    Case(
        "seed beside a source", I, "seed=4|White", lambda s: sample(score(), (2, 2), solver=s, steps=3, seed=4, noise=White(1))
    ),
    Case(
        "seeds beside a source",
        I,
        "seeds|White",
        lambda s: sample(score(), (2, 2), solver=s, steps=3, seeds=[1, 2], noise=White()),
    ),
    Case("noise a class", I, "noise", lambda s: sample(score(), (2, 2), solver=s, steps=3, noise=White)),
    # the score
    Case(
        "network instead of a score",
        I,
        "wrap the network|Score(network, path",
        lambda s: sample(network, (2, 2), solver=s, steps=3),
    ),
    Case("score class", I, "score is a Score", lambda s: sample(Score, (2, 2), solver=s, steps=3)),
    Case("path instead of a score", I, "score is a VP", lambda s: sample(VP(), (2, 2), solver=s, steps=3)),
    Case("problem without a score", I, "ProbabilityFlow has no score", lambda s: integrate(s, ProbabilityFlow(VP()), X, TIMES)),
    Case("event of another size", I, "(4, 2)|3", lambda s: integrate(s, Gaussian(VP(), torch.zeros(3), std=1.0), X, TIMES)),
    # eta
    Case("B44 negative eta", I, "eta=-0.5|>= 0", lambda s: sample(score(), (2, 2), solver=s, steps=3, eta=-0.5)),
    Case("B44 NaN eta", I, "eta=nan", lambda s: sample(score(), (2, 2), solver=s, steps=3, eta=math.nan)),
    Case("B44 inf eta", I, "eta=inf", lambda s: sample(score(), (2, 2), solver=s, steps=3, eta=math.inf)),
    Case("B44 text eta", I, "eta='1'", lambda s: sample(score(), (2, 2), solver=s, steps=3, eta="1")),
    # callbacks
    Case("callback no function", I, "callback=3", lambda s: run(s, times=TIMES[:2], callback=3)),
    Case(
        "B48 callback raises",
        CallbackError,
        "ZeroDivisionError|step 1/1|t=0.7",
        lambda s: run(s, times=TIMES[:2], callback=lambda i: 1 / 0),
    ),
    Case("progress text", I, "progress='yes'", lambda s: run(s, times=TIMES[:2], progress="yes")),
    # ends of the path
    Case("B21 eps at alpha = 0", P, "t = 1|start", lambda s: integrate(s, Score(network, Linear(), "eps"), X, [1.0, 0.5, 0.1])),
]

# --- cases without a solver, or of one solver: call() -----------------------------------------------------------------

ONE = torch.ones_like


def zigzag(t: Tensor) -> Tensor:
    return 0.1 + t - 2.0 * (t - 0.5).clamp(min=0.0)


ONCE = [
    # networks that cannot be called
    Case("B19 not callable", I, "network is|callable", lambda: Score(3, VP())),
    Case("B19 None", I, "network is NoneType|callable", lambda: Score(None, VP())),
    Case("B19 class", I, "class TwoInputs|instance", lambda: Score(TwoInputs, VP())),
    Case("B19 arity", I, "positional|network(x, label)", lambda: Score(TwoInputs(), VP())),
    Case("B19 arity of 3", I, "(x, t, y)|without conditions", lambda: run(net=lambda x, t, y: x)),
    Case("B34 path by name", I, "path is str|VP()", lambda: Score(network, "VP")),
    Case("B34 path class", I, "path is|VP()", lambda: Score(network, VP)),
    Case("B34 predicts", I, "'epz'|'eps'", lambda: Score(network, VP(), "epz")),
    Case("predicts a number", I, "predicts=3", lambda: Score(network, VP(), 3)),
    Case("B35 Score", TypeError, "predictz", lambda: Score(network, VP(), predictz="eps")),
    Case("label no function", I, "label is", lambda: Score(network, VP(), label=1000)),
    Case("label of another shape", I, "label(t)|shape", lambda: Score(network, VP(), label=lambda t: t.sum())),
    Case("label raises", I, "label(t) raised", lambda: Score(network, VP(), label=lambda t: t.nonsense())),
    Case("sigma_data", I, "sigma_data=-1", lambda: Score(network, VP(), "F", sigma_data=-1)),
    Case("mode", I, "mode='train'", lambda: Score(network, VP(), mode="train")),
    Case(
        "output missing",
        N,
        "output='y'|'a'",
        lambda: integrate("ddim", Score(returns(lambda x: {"a": x}), VP(), output="y"), X, TIMES),
    ),
    Case(
        "output out of range",
        N,
        "output=5",
        lambda: integrate("ddim", Score(returns(lambda x: (x, x)), VP(), output=5), X, TIMES),
    ),
    Case(
        "B12 state on meta",
        N,
        "device",
        lambda: run(net=returns(lambda x: torch.ones(4, 2)), x=torch.ones(4, 2, device="meta")),
    ),
    Case(
        "B17 fp16 overflow",
        I,
        "float16|t=20000|bfloat16",
        lambda: integrate("ddim", Score(network, EDM(T=20000.0), dtype=torch.float16), X, [20000.0, 1.0]),
    ),
    # paths
    Case("B20 negative sigma", P, "sigma(|= -0.", lambda: FromFunctions(ONE, lambda t: t - 0.3)),
    Case("B20 alpha 0 inside", P, "alpha", lambda: FromFunctions(lambda t: (0.5 - t).clamp(min=0.0), lambda t: t + 0.1)),
    Case("B23 lambda not monotone", P, "lambda|t = 0.", lambda: FromFunctions(ONE, zigzag)),
    Case("B23 constant", P, "lambda", lambda: FromFunctions(ONE, ONE)),
    Case("B24 NaN", P, "sigma(|nan", lambda: FromFunctions(ONE, lambda t: torch.log(t - 0.5))),
    Case("B24 shape", P, "alpha(t)|shape", lambda: FromFunctions(lambda t: torch.ones(3), lambda t: t + 0.1)),
    Case("B24 float", P, "alpha(t) returned a float|torch.full_like", lambda: FromFunctions(lambda t: 1.0, lambda t: t + 0.1)),
    Case("B24 int", P, "int64|float64", lambda: FromFunctions(lambda t: torch.ones_like(t).long(), lambda t: t + 0.1)),
    Case("B24 float32", P, "float32", lambda: FromFunctions(lambda t: torch.ones_like(t).float(), lambda t: t + 0.1)),
    Case("B24 mutates t", P, "argument|clone", lambda: FromFunctions(ONE, lambda t: t.add_(0.1))),
    Case("B24 raises", P, "alpha(t) raised|ZeroDivisionError", lambda: FromFunctions(lambda t: 1 / 0, lambda t: t)),
    Case("B24 no function", I, "alpha|function", lambda: FromFunctions(1.0, lambda t: t)),
    Case("B25 no gradient", P, "dalpha, dsigma", lambda: FromFunctions(ONE, lambda t: torch.tensor(t.detach().numpy() + 0.1))),
    Case(
        "B25 wrong slope",
        P,
        "dsigma|correct",
        lambda: FromFunctions(ONE, lambda t: t + 0.1, dalpha=torch.zeros_like, dsigma=lambda t: 2 * ONE(t)),
    ),
    Case("coefficients infinite", P, "f(1)|finite", lambda: FromCoefficients(lambda t: -1 / (1 - t), ONE)),
    Case("VP betas", I, "beta_min = -1", lambda: VP(-1.0)),
    Case("VP beta_max", I, "beta_max = 0.01", lambda: VP(0.1, 0.01)),
    Case("VP NaN", I, "beta_min = nan", lambda: VP(math.nan)),
    Case("VE order", I, "sigma_max", lambda: VE(1.0, 0.5)),
    Case("EDM T", I, "T = -1", lambda: EDM(T=-1.0)),
    Case("EDM t_min", I, "t_min = 90", lambda: EDM(t_min=90.0)),
    Case("Cosine s", I, "s = 0", lambda: Cosine(0.0)),
    Case("table beta", I, "betas[1] = 1.5", lambda: Tabulated((0.1, 1.5))),
    Case("table of one", I, "betas", lambda: Tabulated((0.1,))),
    Case("table NaN", I, "betas[0] = nan", lambda: Tabulated((math.nan, 0.1))),
    Case("B28 knot outside", I, "1.5|[0, 1]", lambda: VP().knot(1.5)),
    Case("B28 training times", I, "time 7|[0, 1]", lambda: ForwardSDE(VP()).marginal(X, torch.tensor([0.5, 7.0, 0.1, 1.0]))),
    Case("knot NaN", I, "nan|[0, 1]", lambda: VP().knot(math.nan)),
    # names
    Case("B34 solver", I, "'dpmpp2m'|'dpmpp_2m'", lambda: run("dpmpp2m")),
    Case("B34 solver far off", I, "'zzz'|known: ", lambda: trace("zzz", VP(), TIMES)),
    Case("B34 solver a number", I, "solver=3", lambda: run(3)),
    Case("B34 solver class", I, "solver=|object", lambda: run(Multistep)),
    Case("B34 solver None", I, "solver=None", lambda: run(None)),
    Case("trace without a path", I, "path", lambda: trace("ddim", "vp", TIMES)),
    # solver and problem
    Case(
        "B36 eta of an ODE solver",
        I,
        "eta=1|'heun'|'euler_maruyama'",
        lambda: sample(score(), (2, 2), solver="heun", steps=2, eta=1.0),
    ),
    Case(
        "B36 reverse SDE with an ODE solver",
        I,
        "reverse SDE|'dopri5'",
        lambda: integrate("dopri5", ReverseSDE(VP(), score()), X, TIMES),
    ),
    *[
        Case(
            f"B28 {name} towards noise",
            I,
            f"{name!r}|0.1 to 0.9|decreasing|'ddim'",
            lambda name=name: run(name, times=[0.1, 0.9]),
        )
        for name, entry in SOLVERS.items()
        if not entry.deterministic
    ],
    Case("B28 table towards noise", I, "'ddpm'|decreasing", lambda: trace("ddpm", VP(), [0.1, 0.9])),
    Case("B27 times on meta", I, "times|meta|CPU", lambda: run(times=torch.tensor([1.0, 0.5], device="meta"))),
    Case(
        "B20 sigma of an own path", P, "sigma(0.1) = -0.2", lambda: integrate("ddim", Score(network, Falling()), X, [0.9, 0.1])
    ),
    *[
        Case(f"B44 eta={eta!r} of a problem", I, "eta = |e.g. eta = 1.0", lambda eta=eta: ReverseSDE(VP(), score(), eta))
        for eta in ("1", None, True)
    ],
    Case("B44 eta(t) of text", I, "eta(0.5) = 'a'", lambda: ReverseSDE(VP(), score(), lambda t: "a").drift(X, 0.5)),
    Case("B44 eta() of nothing", I, "eta(0.5) raised TypeError", lambda: ReverseSDE(VP(), score(), lambda: 1.0).drift(X, 0.5)),
    Case("B37 names nfe", StepLimitError, "max_nfe=3|raise nfe=", lambda: sample(score(), (2, 2), solver="dopri5", nfe=3)),
    Case(
        "frozen score at alpha = 0",
        P,
        "alpha = 0|start=|'ddpm'",
        lambda: integrate("exponential_integrator", Score(network, Linear(), "velocity"), X, [1.0, 0.5]),
    ),
    Case("B36 encode stochastic", I, "'ddpm' is stochastic|dpmpp_2m", lambda: encode(score(), X, solver="ddpm", steps=3)),
    Case("B36 encode churn", I, "'edm_sde' is stochastic", lambda: encode(score(), X, solver="edm_sde", steps=3)),
    Case("B36 no table", I, "'pc_ddpm'|not linear|integrate", lambda: trace("pc_ddpm", VP(), TIMES)),
    Case("B36 no table of dopri5", I, "'dopri5'|not linear", lambda: trace("dopri5", VP(), TIMES)),
    Case(
        "B36 discrete on EDM",
        P,
        "variance-preserving|'ddpm'",
        lambda: integrate("ddpm_discrete", Score(network, EDM()), X, [2.0, 1.0]),
    ),
    Case("B36 path of the problem", I, "path", lambda: ReverseSDE(EDM(), score())),
    Case(
        "B36 plan on another path",
        I,
        "VP|EDM|trace on score.path",
        lambda: trace("ddim", VP(), TIMES).run(Score(network, EDM()), X),
    ),
    Case(
        "eta a function that is negative",
        I,
        "eta|-1",
        lambda: sample(score(), (2, 2), solver="ddpm", steps=3, eta=lambda t: -1.0),
    ),
    Case(
        "eta a function of NaN", I, "eta|nan", lambda: sample(score(), (2, 2), solver="ddpm", steps=3, eta=lambda t: math.nan)
    ),
    Case("eta a function of text", I, "eta", lambda: sample(score(), (2, 2), solver="ddpm", steps=3, eta=lambda t: "a")),
    # parameters of solvers
    *[
        Case(f"B33 {k}={v}", I, f"{k}={v!r}", lambda k=k, v=v: TorchDiffEq("dopri5", **{k: v}))
        for k in ("rtol", "atol")
        for v in (0.0, -1e-3, math.nan, math.inf, "1e-3", None)
    ],
    Case("B33 tensor", I, "rtol", lambda: TorchDiffEq("dopri5", rtol=torch.ones(3))),
    *[
        Case(f"B33 torchsde {k}={v}", I, f"{k}", lambda k=k, v=v: TorchSDE("srk", **{k: v}))
        for k in ("rtol", "atol")
        for v in (0.0, math.nan, "1")
    ],
    Case("method of torchdiffeq", I, "method='rk5'|dopri5", lambda: TorchDiffEq("rk5")),
    Case("method of torchsde", I, "method='heun'|srk", lambda: TorchSDE("heun")),
    Case("max_nfe", I, "max_nfe=0", lambda: TorchDiffEq("dopri5", max_nfe=0)),
    Case("max_nfe of torchsde", I, "max_nfe=-2", lambda: TorchSDE("euler", max_nfe=-2)),
    Case("B44 churn", I, "s_churn", lambda: Churn(RungeKutta(EULER, "rho"), s_churn=-1.0)),
    Case("B44 churn NaN", I, "s_churn", lambda: Churn(RungeKutta(EULER, "rho"), s_churn=math.nan)),
    Case("B44 s_noise", I, "s_noise", lambda: Churn(RungeKutta(EULER, "rho"), s_noise=0.0)),
    Case("B44 snr 0", I, "snr=0", lambda: Langevin(0.0)),
    Case("B44 snr NaN", I, "snr=nan", lambda: Langevin(math.nan)),
    Case("B44 inner", I, "inner", lambda: PredictorCorrector(EulerMaruyama(), Langevin(inner=0))),
    Case("B44 Langevin size", I, "size", lambda: AnnealedLangevin(size=-0.1)),
    Case("B32 order 0", I, "steps >= 1", lambda: Multistep(0, "x0")),
    Case("target", I, "target", lambda: Multistep(2, "v")),
    Case("basis", I, "basis", lambda: Multistep(2, "x0", basis="sigma")),
    Case("UniPC order", I, "steps", lambda: UniPC(7)),
    Case("variable", I, "variable='s'", lambda: RungeKutta(EULER, "s")),
    # grids
    *[Case(f"B30 grid {name}", I, "steps must be >= 1, got 0", lambda name=name: GRIDS[name](VP(), 0)) for name in GRIDS],
    *[Case(f"B31 grid {name}", I, "steps must be an int, got 2.5", lambda name=name: GRIDS[name](VP(), 2.5)) for name in GRIDS],
    Case("B22 log_snr from alpha = 0", I, "alpha(1) = 0|start=0.999", lambda: GRIDS["log_snr"](Linear(), 5, 1.0)),
    Case("B28 grid start", I, "start=1.5|[0, 1]", lambda: GRIDS["karras"](VP(), 5, 1.5)),
    Case("B28 table start", I, "start=1.5|[0, 1]", lambda: GRIDS["ays_sd15"](VP(), 5, 1.5)),
    Case("B28 table direction", I, "start=0.1|stop=0.5", lambda: GRIDS["ays_sd15"](VP(), 5, 0.1, 0.5)),
    Case(
        "grid function of the wrong length",
        I,
        "grid(path, 5|(3,)|6",
        lambda: sample(score(), (2, 2), steps=5, grid=lambda path, n, a, b: [0.9, 0.5, 0.1]),
    ),
    Case(
        "grid function of NaN",
        I,
        "times[1] is nan",
        lambda: sample(score(), (2, 2), steps=2, grid=lambda path, n, a, b: [0.9, math.nan, 0.1]),
    ),
    Case(
        "grid function rising",
        I,
        "grid(path, 2|decreasing",
        lambda: sample(score(), (2, 2), steps=2, grid=lambda path, n, a, b: [0.1, 0.5, 0.9]),
    ),
    Case("grid function None", I, "grid(path, 2", lambda: sample(score(), (2, 2), steps=2, grid=lambda path, n, a, b: None)),
    Case(
        "grid function raises",
        I,
        "grid(path, 2|TypeError",
        lambda: sample(score(), (2, 2), steps=2, grid=lambda path: [0.9, 0.1]),
    ),
    # ends of the path
    Case("B22 from sigma = 0", P, "sigma(0) = 0|t_min", lambda: run("ddim", times=[0.0, 0.5])),
    Case("B22 x0 at sigma = 0", P, "x0|sigma", lambda: integrate("euler", Score(network, EDM(), "x0"), X, [0.0, 0.5])),
    Case(
        "B21 zero SNR",
        P,
        "eps|alpha = 0",
        lambda: integrate("ddim", Score(network, Tabulated.linear(10, zero_terminal_snr=True)), X, [1.0, 0.5]),
    ),
    Case("B22 infinite slope", I, "slope|t = 0", lambda: run("dopri5", times=[0.5, 0.0])),
    Case("B36 srk of a large state", I, "torchsde_euler|too large", lambda: run("torchsde_srk", x=torch.ones(4, 6000))),
    # noise
    Case("cells", I, "cells=100", lambda: Brownian(cells=100)),
    Case("indices", I, "indices has 2|batch of 4", lambda: run("ddpm", noise=White(indices=[0, 1]))),
    Case("indices negative", I, "indices[0]", lambda: White(indices=[-1])),
    Case("seeds text", I, "seeds='12'", lambda: White(seeds="12")),
    # plans
    Case("plan not JSON", I, "not a plan", lambda: Plan.from_json("{")),
    Case("plan of a list", I, "not a plan", lambda: Plan.from_json("[]")),
    Case("plan of another format", I, "format 99", lambda: Plan.from_json('{"format": 99}')),
    Case("plan of nothing", I, "not a plan", lambda: Plan.from_json(None)),
    Case("B38 plan state", I, "x is a list", lambda: trace("ddim", VP(), TIMES).run(score(), [1.0])),
    Case("plan without a score", I, "score is a function", lambda: trace("ddim", VP(), TIMES).run(network, X)),
    Case("plan run keyword", TypeError, "stepz", lambda: trace("ddim", VP(), TIMES).run(score(), X, stepz=3)),
    Case("callback of an adaptive solver", I, "callback|two times", lambda: run("dopri5", trajectory=True)),
]


def check(case: Case, *arguments: Any) -> None:
    """Run a case without pytest too: ``python -O`` strips asserts, this raises by itself."""
    try:
        case.call(*arguments)
    except BaseException as error:
        text = str(error)
        if type(error) is not case.error or len(text) >= 400 or any(part not in text for part in case.says.split("|")):
            raise RuntimeError(f"{case.name} {arguments}: {type(error).__name__}: {text}") from error
        return
    raise RuntimeError(f"{case.name} {arguments}: no error")


def expected(case: Case, solver: str) -> Case:
    """The case for a solver that chooses its own steps: those are not numbered by the grid."""
    if getattr(SOLVERS[solver].solver, "adaptive", False):
        return case._replace(says="|".join(part for part in case.says.split("|") if not part.startswith("step ")))
    return case


@pytest.mark.timeout(20)
@pytest.mark.parametrize("solver", KINDS)
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_kind_of_solver_refuses(case, solver):
    with pytest.raises(BaseException) as caught:
        case.call(solver)
    clear(caught.value, expected(case, solver))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", ONCE, ids=lambda case: case.name)
def test_refused(case):
    with pytest.raises(BaseException) as caught:
        case.call()
    clear(caught.value, case)


def main(every: int) -> None:
    """Every ``every``-th case, for other modes of the interpreter."""
    cases = [(expected(case, solver), (solver,)) for case in EVERY for solver in KINDS] + [(case, ()) for case in ONCE]
    for case, arguments in cases[::every]:
        check(case, *arguments)
    sys.stdout.write(f"{len(cases[::every])} cases\n")


@pytest.mark.slow
def test_other_modes_of_the_interpreter():
    """Without asserts and with every warning an error."""
    here = File(__file__).resolve().parent
    code = f"import sys; sys.path.insert(0, {str(here)!r}); import test_bad_input; test_bad_input.main(17)"
    done = subprocess.run(
        [sys.executable, "-O", "-W", "error", "-c", code],
        cwd=here.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("cases\n")


# --- numbers that are not finite: found by a replay, at their step, time and samples ----------------------------------

RUN_BY = one_of_each_kind()


def budget(solver: str) -> dict[str, Any]:
    return {"nfe": 300} if getattr(SOLVERS[solver].solver, "adaptive", False) else {"steps": 6}


class Bad:
    """Rows 1 and 3 of its output are ``value`` from time ``cut`` on, by the clock of row 1."""

    def __init__(self, cut: float, value: float) -> None:
        self.cut, self.value, self.seen = cut, value, list[float]()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(float(t[1]))
        bad = torch.zeros(5, 1, dtype=torch.bool)
        bad[1] = bad[3] = float(t[1]) <= self.cut
        return torch.where(bad, self.value, 0.5 * x)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["NaN", "inf", "-inf"])
@pytest.mark.parametrize("solver", RUN_BY)
def test_a_network_that_is_not_finite_is_located(solver, value):
    adaptive = getattr(SOLVERS[solver].solver, "adaptive", False)
    for cut in (0.3, 0.5, 2.0):
        net = Bad(cut, value)
        with pytest.raises(NetworkError) as caught:
            sample(
                score(net), (5, 2), solver=solver, start=0.9, stop=0.1, grid="uniform", dtype=torch.float64, **budget(solver)
            )
        error, first = caught.value, next(t for t in net.seen if t <= cut)
        assert error.t == first
        assert error.samples == (1, 3)
        text = str(error)
        assert len(text) < 400
        for part in (
            "non-finite network output",
            "NaN" if math.isnan(value) else "inf",
            f"t={first:.6g}",
            "2 of 5",
            "first: 1",
        ):
            assert part in text
        if adaptive:
            assert error.step is not None
            assert error.step >= 0
        else:
            times = torch.linspace(0.9, 0.1, 7, dtype=torch.float64).tolist()
            slack = 0.2 if getattr(SOLVERS[solver].solver, "wanders", False) else 1e-9  # churn goes up first, others below
            assert times[error.step + 1] - slack <= first <= times[error.step] + slack
            assert f"step {error.step + 1}/6" in text


@pytest.mark.timeout(30)
@pytest.mark.parametrize("solver", RUN_BY)
def test_a_state_that_overflows_is_located(solver):
    def net(x: Tensor, t: Tensor) -> Tensor:
        big = 1e35 * x
        return torch.cat([0.5 * x[:2], big[2:3], 0.5 * x[3:]]).clamp(-1e38, 1e38)

    try:
        out = sample(score(net, predicts="score"), (4, 2), solver=solver, start=0.9, stop=0.1, **budget(solver))
    except (NetworkError, StepLimitError) as caught:
        error = caught
    else:  # step control may find a way round it
        assert getattr(SOLVERS[solver].solver, "adaptive", False)
        assert out.x.isfinite().all()
        return
    assert len(str(error)) < 400
    if isinstance(error, NetworkError):
        assert error.samples == (2,)
        assert error.t is not None
        assert error.step is not None
        assert "overflowed" in str(error) or "non-finite" in str(error)


def test_a_replay_that_is_finite_says_so():
    calls = iter(range(100))
    net = returns(lambda x: x * (math.nan if next(calls) == 2 else 0.5))
    with pytest.raises(NetworkError, match="not deterministic"):
        run("ddim", net)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "ddpm"])
def test_finite_sums_that_overflow_are_no_error(solver):
    x = torch.full((4, 2), 3e38)
    assert run(solver, returns(lambda x: torch.zeros_like(x)), x, [0.11, 0.1]).isfinite().all()


# --- accepted, with a warning where that is due -----------------------------------------------------------------------


@pytest.mark.parametrize("solver", KINDS)
def test_outputs_that_hold_one_tensor_are_accepted(solver):
    times = TIMES[:2]
    reference = run(solver, times=times)
    for net in (returns(lambda x: {"sample": 0.5 * x, "b": x}), returns(lambda x: {"y": 0.5 * x}), returns(Named)):
        assert torch.equal(run(solver, net, times=times), reference)
    picked = Score(returns(lambda x: (x, 0.5 * x)), VP(), "x0", output=1)
    assert torch.equal(integrate(solver, picked, X, times).x, reference)
    split = Score(returns(lambda x: torch.cat([0.5 * x, x], 1)), VP(), "x0", split="learned_var")
    assert torch.equal(integrate(solver, split, X, times).x, reference)


class Named:
    def __init__(self, x: Tensor) -> None:
        self.sample = 0.5 * x


@pytest.mark.parametrize("solver", KINDS)
def test_output_of_another_precision_is_cast(solver):
    with pytest.warns(PrecisionWarning, match="float64") as seen:
        out = run(solver, returns(lambda x: 0.5 * x.double()))
    assert out.dtype == torch.float32
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(solver, returns(lambda x: (0.5 * x).half())).dtype == torch.float32


@pytest.mark.parametrize("solver", KINDS)
def test_train_mode_is_told(solver):
    net = Drop().train()
    with pytest.warns(TrainModeWarning, match="Dropout 'drop'"):
        run(solver, net, times=TIMES[:2])
    quiet = integrate(solver, Score(net, VP(), "x0", mode="eval"), X, TIMES[:2]).x
    assert net.training
    assert net.drop.training
    assert torch.equal(quiet, run(solver, Drop().eval(), times=TIMES[:2]))


class Drop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.drop(0.5 * x)


def test_integers_that_are_times_are_accepted():
    for times in (torch.tensor([1, 0]), [1, 0], (1, 0), np.array([1, 0]), torch.tensor([1.0, 0.0], requires_grad=True)):
        out = integrate("ddim", score(), X, times)
        assert out.x.isfinite().all()
        assert out.times.tolist() == [1.0, 0.0]
        assert not out.x.requires_grad


@pytest.mark.parametrize("solver", one_of_each_kind())
def test_few_steps_work(solver):
    path = VP(0.1, 0.9)  # a gentle one, on which a step of every method is defined
    for steps in (1, 2, 3):
        arguments = {"nfe": 500} if getattr(SOLVERS[solver].solver, "adaptive", False) else {"steps": steps}
        assert sample(Score(network, path, "x0"), (3, 2), solver=solver, **arguments).x.isfinite().all()


def test_a_small_budget_says_that_it_lowers_the_order():
    with pytest.warns(BudgetWarning, match="nfe=2: a step of 'rk4' costs 4"):
        assert sample(score(), (2, 2), solver="rk4", nfe=2).nfe <= 2
    with pytest.warns(BudgetWarning, match="nfe=2: a step of 'annealed_langevin' costs 5"):
        assert sample(score(), (2, 2), solver="annealed_langevin", nfe=2).nfe <= 2
    whole = PredictorCorrector(RungeKutta(RK4))  # its reduced form is the predictor, four calls a step
    with pytest.raises(InputError, match=r"nfe=2: a step of .* costs 5"):
        sample(score(), (2, 2), solver=whole, nfe=2)


# --- bounds of work, empty and odd shapes, callbacks ------------------------------------------------------------------


@pytest.mark.timeout(30)
@pytest.mark.parametrize("solver", [name for name, e in SOLVERS.items() if getattr(e.solver, "adaptive", False)])
def test_the_limit_of_work_keeps_what_was_reached(solver):
    calls = []

    def stiff(x: Tensor, t: Tensor) -> Tensor:
        calls.append((float(t[0]), x.clone()))
        return torch.sin(300.0 * x)

    with pytest.raises(StepLimitError, match="max_nfe=40 network calls used at t = ") as caught:
        sample(score(stiff), (3, 2), solver=solver, nfe=40)
    error = caught.value
    assert len(calls) == 40
    assert error.partial.shape == (3, 2)
    assert error.partial.isfinite().all()
    if solver in ("dopri5", "bosh3"):  # the network saw the very state that is kept
        assert any(math.isclose(t, error.t, rel_tol=1e-6) and torch.equal(x, error.partial) for t, x in calls)
    assert error.t is not None
    assert 0.001 <= error.t <= 1.0
    assert error.rejected >= 0
    assert len(str(error)) < 400
    with pytest.raises(StepLimitError) as caught:
        sample(score(stiff), (3, 2), solver=solver, nfe=1)
    assert caught.value.partial.shape == (3, 2)


@pytest.mark.parametrize("solver", one_of_each_kind())
def test_an_empty_batch_is_returned_without_a_call(solver):
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    net = Score(never, VP(0.1, 0.9), "x0")
    for dtype in (torch.float32, torch.float16):
        out = sample(net, (0, 3, 2), solver=solver, nfe=20, dtype=dtype)
        assert out.x.shape == (0, 3, 2)
        assert out.x.dtype == dtype
        assert out.nfe == 0
    assert integrate(solver, net, torch.empty(0, 2), [0.5, 0.4]).x.shape == (0, 2)
    assert integrate(solver, net, torch.empty(3, 0), [0.5, 0.4]).x.shape == (3, 0)
    if solver == "ddim":
        assert integrate(solver, net, torch.empty(0, 2), [0.5, 0.4, 0.3], trajectory=True).trajectory.shape == (3, 0, 2)
        assert trace(solver, net.path, [0.5, 0.4]).run(net, torch.empty(0, 2)).shape == (0, 2)


@pytest.mark.parametrize("solver", one_of_each_kind())
def test_states_of_any_shape(solver):
    path = VP(0.1, 0.9)
    for shape in ((1,), (3,), (1, 1), (2, 1, 1, 1, 1), (2, 2, 1, 2, 2), (1, 7)):
        out = sample(Score(network, path, "x0"), shape, solver=solver, nfe=300 if "nfe" in budget(solver) else 24)
        assert out.x.shape == shape
        assert out.x.isfinite().all()


@pytest.mark.parametrize("solver", [s for s in KINDS if s not in ("dopri5", "torchsde_adaptive")])
def test_a_callback_that_raises_keeps_the_state(solver):
    states = []

    def callback(info):
        states.append(info.x.clone())
        if info.i == 2:
            raise KeyError("mine " + "x" * 1000)

    with pytest.raises(CallbackError, match="KeyError after step 3/4") as caught:
        run(solver, callback=callback)
    assert caught.value.step == 2
    assert torch.equal(caught.value.x, states[-1])
    assert len(states) == 3
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("solver", KINDS)
def test_a_network_that_raises_is_the_cause(solver):
    class Broken(Exception):
        pass

    def net(x: Tensor, t: Tensor) -> Tensor:
        if float(t[0]) <= 0.5:
            raise Broken("x" * 1000)
        return 0.5 * x

    with pytest.raises(NetworkError) as caught:
        run(solver, net)
    assert isinstance(caught.value.__cause__, Broken)
    assert len(str(caught.value)) < 400
    assert caught.value.t is not None
    assert caught.value.t <= 0.5
    assert caught.value.step is not None
    if "adaptive" not in solver and solver != "dopri5":
        assert caught.value.step == (1 if solver == "heun" else 2)
        assert caught.value.t == 0.5
    for kind in (KeyboardInterrupt, SystemExit):  # not ours to catch
        with pytest.raises(kind):
            run(solver, returns(lambda x, kind=kind: (_ for _ in ()).throw(kind())))


def test_errors_have_one_base():
    for kind in (InputError, PathError, NetworkError, StepLimitError, CallbackError):
        assert issubclass(kind, ToolkitError)
    assert issubclass(InputError, ValueError)
    assert issubclass(PathError, InputError)
    assert issubclass(NetworkError, RuntimeError)


def numbers_of(thing: Any) -> dict[str, bool]:
    """The fields of a solver or path that hold a number, and whether they may be None."""
    fields = {f.name: f for f in dataclasses.fields(thing) if f.init}
    values = {name: getattr(thing, name) for name in fields}
    held = [name for name, value in values.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return {name: "None" in str(fields[name].type) for name in held}


@pytest.mark.parametrize(
    "thing",
    [*{type(e.solver): e.solver for e in SOLVERS.values()}.values(), Langevin(), VP(), SubVP(), VE(), EDM(), Cosine()],
    ids=lambda thing: type(thing).__name__,
)
def test_a_constant_that_is_no_number_is_refused(thing):
    for name, optional in numbers_of(thing).items():
        for wrong in ("a", [1], torch.ones(2), torch.tensor(True), float("nan"), *([] if optional else [None])):
            with pytest.raises(InputError, match=name):
                dataclasses.replace(thing, **{name: wrong})


def own_path(alpha: Callable[[Tensor], Any]) -> Linear:
    """A user's own class of paths, with this alpha."""
    return type("Own", (Linear,), {"_alpha": lambda self, t: alpha(t)})()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda t: 0.5, r"alpha\(t\) is a float"),
        (lambda t: torch.tensor(0.5), r"alpha\(t\) is a torch.float32 of shape \(\)"),
        (lambda t: torch.ones_like(t).long(), r"alpha\(t\) is a torch.int64"),
        (lambda t: t.mul_(0.5), "wrote to the times"),
        (lambda t: t.no_such_thing(), r"alpha\(t\) raised AttributeError"),
        (lambda t: t * math.nan, r"alpha\(0.9\) = nan"),
    ],
    ids=["float", "shape", "int", "mutates", "raises", "nan"],
)
def test_a_users_own_path_is_checked(wrong, said):
    assert [k.alpha for k in own_path(lambda t: 1.0 - t).knots([0.9, 0.1])] == [1.0 - 0.9, 0.9]
    with pytest.raises(PathError, match=said):
        own_path(wrong).knots([0.9, 0.1])
