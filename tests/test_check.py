"""``scores.check``: every planted mistake is named, with the line to change, and right wirings are never accused."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import pytest
import torch
from fake_backbones import EVENT, FAMILIES, Law
from torch import Tensor, nn

from benchmarks import networks, problems
from scores import Empirical, Gaussian, GaussianMixture, Score, as_network, check, guidance
from scores.checking import MISTAKES
from sde import EDM, VE, VP, Cosine, FromFunctions, Linear, SubVP, Tabulated
from sde.errors import InputError
from sde.path import Path, Trigonometric
from sde.prediction import Prediction, Predictor

WEIGHTS = File(networks.__file__).parent / "weights" / "digits.safetensors"
PATHS: dict[str, Callable[[], Path]] = {
    "VP": VP,
    "SubVP": SubVP,
    "VE": VE,
    "EDM": EDM,
    "Linear": Linear,
    "Cosine": Cosine,
    "Trigonometric": Trigonometric,
    "Tabulated": Tabulated.linear,
    "zero terminal SNR": lambda: Tabulated.scaled_linear(zero_terminal_snr=True),
    "FromFunctions": lambda: FromFunctions(lambda t: 1 - t**2, lambda t: t**2 + 0.001 * t),
}
_COV = torch.tensor([[0.5, 0.2, 0.0], [0.2, 0.3, -0.1], [0.0, -0.1, 0.2]])
_POINTS = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
LAWS: dict[str, Callable[[Path], Any]] = {
    "white": lambda p: Gaussian(p, torch.zeros(3), torch.ones(3)),
    "Gaussian": lambda p: Gaussian(p, torch.tensor([0.5, -1.0, 0.2]), _COV),
    "pixels": lambda p: Gaussian(p, torch.full((3,), 127.0), 3000.0 * torch.eye(3)),
    "mixture": lambda p: mixture(p),
    "two points": lambda p: GaussianMixture(p, [0.5, 0.5], torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2)),
    "Empirical": lambda p: Empirical(p, _POINTS),
}


def mixture(path: Path) -> GaussianMixture:
    means = torch.tensor([[0.8, 0.5], [-0.6, 0.7], [0.0, -0.9]])
    return GaussianMixture(path, [0.3, 0.3, 0.4], means, torch.full((3,), 0.0225))


def pictures(path: Path) -> GaussianMixture:
    means = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), -0.4)])
    return GaussianMixture(path, [0.5, 0.5], means, torch.full((2,), 0.05))


@functools.cache
def digits() -> tuple[Tensor, Score]:
    return problems.split()[1][:256], networks.load(WEIGHTS)


# --- right wirings --------------------------------------------------------------------------------------------------------


def judged(score: Any, data: Tensor, alone: bool = True) -> None:
    """Nothing is found, with data and, if ``alone``, without."""
    result = check(score, data)
    assert result.ok, str(result)
    if alone:
        result = check(score, shape=(64, *data.shape[1:]))
        assert result.ok, str(result)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_adapter_is_accused(name):
    law = Law(3)
    judged(FAMILIES[name].score(law), law.draw(128, 1.0, 0.0, torch.float32))
    assert law.draw(1, 1.0, 0.0, torch.float32).shape[1:] == EVENT


OUTPUT = ("eps", "v", "F", "x0", "velocity", "score")


@pytest.mark.parametrize("name", PATHS)
def test_no_exact_score_is_accused_on_any_path(name):
    path = PATHS[name]()
    for i, (called, law) in enumerate(LAWS.items()):
        exact = law(path)
        data = exact.sample(200, seed=7)
        judged(exact, data, alone=False)
        predicts = OUTPUT[(i + len(name)) % 6]
        if name == "zero terminal SNR" and predicts in ("eps", "score"):
            predicts = "v"
        # without data two laws a path are enough: "white" and "pixels" make a long search
        judged(
            Score(as_network(exact, path, predicts), path, predicts),
            data,
            called in ("mixture", "Empirical") or name == "Linear",
        )


@pytest.mark.parametrize("path", [Linear(), VP()])
@pytest.mark.parametrize("predicts", OUTPUT)
def test_no_output_is_accused(path, predicts):
    exact = mixture(path)
    judged(Score(as_network(exact, path, predicts), path, predicts), exact.sample(256, seed=1))


def test_the_trained_network_is_not_accused():
    data, score = digits()
    for seed in range(3):
        result = check(score, data, seed=seed)
        assert result.ok, str(result)
        assert result.calls < 20
        assert not result.notes
    assert check(score, shape=(64, 1, 8, 8)).ok
    assert check(score, data[:8]).ok


# --- planted mistakes -----------------------------------------------------------------------------------------------------


def net(path: Path, predicts: str = "eps", **options: Any) -> Callable[..., Tensor]:
    return as_network(mixture(path), path, predicts, **options)


def vp(
    predicts: str = "eps", *, path: Path | None = None, truth: str | None = None, sign: float = 1.0, **options: Any
) -> Score:
    """The mixture's network, that predicts ``truth``, wired as one that predicts ``predicts``."""
    path = path or VP()
    inner = net(path, truth or predicts, time=options.pop("time", None))
    return Score(lambda x, t: sign * inner(x, t), options.pop("on", path), predicts, **options)


def edm(**changes: Any) -> Score:
    score = digits()[1]
    d = score.sigma_data
    known = {"predicts": "F", "label": lambda t: t.log() / 4, "scale": lambda t: (t * t + d * d) ** -0.5, "sigma_data": d}
    known = {**known, "network": score.network, "path": EDM(), **changes}
    return Score(known.pop("network"), known.pop("path"), known.pop("predicts"), mode="eval", **known)


def negated(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, t: -inner(x, t)


def scaling(score: Score) -> Callable[..., Tensor]:
    """The network with its input scaling inside."""
    inner, d = score.network, score.sigma_data
    return lambda x, t: inner(x * (torch.exp(8 * t) + d * d).rsqrt().reshape(-1, 1, 1, 1), t)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.inner = nn.Dropout(0.2), net(VP())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.drop(self.inner(x, t))


class Classes(nn.Module):
    """Right for the class 10 of 11, which is none."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(11, 4), net(VP())

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.inner(x, t) + (y != 10).to(x.dtype).reshape(-1, 1)


def spoilt(where: Callable[[Tensor], Tensor]) -> Score:
    inner = net(VP())
    return Score(lambda x, t: torch.where(where(t)[:, None], torch.nan, inner(x, t)), VP())


def halves() -> Score:
    inner = as_network(pictures(VP()), VP(), "eps")
    return Score(lambda x, t: torch.cat([inner(x, t), torch.full_like(x, 3.0)], 1), VP())


def thousandth(label: Tensor) -> Tensor:
    return label / 1000.0


def points() -> Tensor:
    return mixture(VP()).sample(256, seed=1)


def held_out() -> Tensor:
    return digits()[0]


# name of the mistake, what the line to change says, how it is planted, the data, may it be told without data
PLANTED: dict[str, tuple[str, str, Callable[[], Any], Callable[[], Tensor], bool]] = {
    "time reversed, Linear velocity": (
        "time reversed",
        "label=lambda t: t",
        lambda: vp("velocity", path=Linear(), label=lambda t: 1 - t),
        points,
        True,
    ),
    "time reversed, VP eps": ("time reversed", "label=lambda t: t", lambda: vp(label=lambda t: 1 - t), points, True),
    "time not reversed": (
        "time reversed",
        "label=lambda t: 1 - t",
        lambda: vp("v", path=Cosine(), time=lambda u: 1 - u),
        points,
        True,
    ),
    "eps as x0": ("output mixed up", 'predicts="eps"', lambda: vp("x0", truth="eps"), points, True),
    "x0 as eps": ("output mixed up", 'predicts="x0"', lambda: vp("eps", truth="x0"), points, True),
    "v as eps": ("output mixed up", 'predicts="v"', lambda: vp("eps", truth="v"), points, True),
    "eps as v": ("output mixed up", 'predicts="eps"', lambda: vp("v", truth="eps"), points, True),
    "score as eps": ("output mixed up", 'predicts="score"', lambda: vp("eps", truth="score"), points, True),
    "eps as velocity": ("output mixed up", 'predicts="eps"', lambda: vp("velocity", truth="eps", path=Linear()), points, False),
    "velocity as v": ("output mixed up", 'predicts="velocity"', lambda: vp("v", truth="velocity", path=Linear()), points, True),
    "F as x0, a trained network": (
        "output mixed up",
        'predicts="F", sigma_data=0.7',
        lambda: edm(predicts="x0"),
        held_out,
        True,
    ),
    "2C output": ("2C output not split", 'split="learned_var"', halves, lambda: pictures(VP()).sample(64, seed=2), True),
    "[0, 1] for [-1, 1]": ("wrong data range", "data = 2 * data - 1", edm, lambda: (held_out() + 1) / 2, False),
    "bytes": ("wrong data range", "data = data / 127.5 - 1", edm, lambda: (held_out() + 1) * 127.5, False),
    "numbers to 16": ("data do not fit", "data = 0.12", edm, lambda: (held_out() + 1) * 8, False),
    "label cut to an integer": (
        "time label truncated",
        "label=lambda t: t",
        lambda: vp(label=lambda t: t.long()),
        points,
        True,
    ),
    "network cuts t to an integer": (
        "time label truncated",
        "999 * t",
        lambda: vp(time=lambda k: k.long() / 1000),
        points,
        True,
    ),
    "log sigma cut to an integer": (
        "time label truncated",
        "torch.log(t) / 4",
        lambda: edm(label=lambda t: (t.log() / 4).long()),
        held_out,
        False,
    ),
    "factor 1000 missing": ("factor 1000 missing", "999 * t", lambda: vp("v", time=thousandth), points, True),
    "factor 1000 missing, a table": (
        "factor 1000 missing",
        "path.index",
        lambda: vp(path=Tabulated.linear(), time=thousandth),
        points,
        False,
    ),
    "factor 1000 superfluous": (
        "factor 1000 superfluous",
        "label=lambda t: t",
        lambda: vp(path=Linear(), label=lambda t: 1000 * t),
        points,
        True,
    ),
    "negated velocity": ("negated output", "-net(x, t", lambda: vp("velocity", path=Linear(), sign=-1.0), points, True),
    "negated F, a trained network": (
        "negated output",
        "-net(x, t",
        lambda: edm(network=negated(digits()[1].network)),
        held_out,
        True,
    ),
    "VP network on Cosine": ("wrong path", "path=VP()", lambda: vp(path=VP(), on=Cosine()), points, False),
    "Linear network on VP": ("wrong path", "path=Linear()", lambda: vp("velocity", path=Linear(), on=VP()), points, False),
    "no input scaling": ("input scaling missing", "(t * t + 0.56", lambda: edm(scale=None), held_out, True),
    "input scaled twice": (
        "input scaling superfluous",
        "scale=None",
        lambda: edm(network=scaling(digits()[1])),
        held_out,
        False,
    ),
    "wrong sigma_data": (
        "wrong sigma_data",
        "sigma_data=0.7",
        lambda: edm(sigma_data=0.5, scale=lambda t: (t * t + 0.25) ** -0.5),
        held_out,
        False,
    ),
    "sigma for log(sigma) / 4": ("wrong time label", "torch.log(t) / 4", lambda: edm(label=None), held_out, False),
    "train mode": ("train mode", "network.eval()", lambda: Score(Dropping().train(), VP()), points, True),
    "random output": (
        "not deterministic",
        "forward",
        lambda: Score(lambda x, t: net(VP())(x, t) + 0.1 * torch.randn_like(x), VP()),
        points,
        True,
    ),
    "batch statistics": (
        "rows influence each other",
        "each sample",
        lambda: Score(lambda x, t: net(VP())(x, t) - 0.3 * x.mean(0), VP()),
        points,
        True,
    ),
    "nan at t = 1": ("not finite", "weights", lambda: spoilt(lambda t: t > 0.995), points, True),
    "nan at t_min": ("not finite", "weights", lambda: spoilt(lambda t: t < 0.003), points, True),
    "nan everywhere": ("not finite", "weights", lambda: spoilt(lambda t: t > -1.0), points, True),
    "half precision overflows": (
        "half-precision overflow",
        "bfloat16",
        lambda: Score(lambda x, t: (7e4 * net(VP())(x.float(), t)).half(), VP(), dtype=torch.float16),
        points,
        True,
    ),
    "no class": ("condition missing", "y=10", lambda: Score(Classes(), VP()), points, True),
    "wrong class": (
        "wrong null label",
        "y=10",
        lambda: Score(Classes(), VP(), conditions={"y": torch.tensor(0)}),
        points,
        False,
    ),
    "no text": ("condition missing", "text=", lambda: Score(lambda x, t, text: net(VP())(x, t) + text, VP()), points, True),
    "raises": ("call fails", "forward", lambda: Score(lambda x, t: x @ torch.ones(7, 7), VP()), points, True),
    "constant": ("output ignores x", "forward", lambda: Score(lambda x, t: torch.ones_like(x), VP()), points, True),
    "fixed time": ("output ignores t", "label", lambda: Score(lambda x, t: net(VP())(x, 0 * t + 0.5), VP()), points, False),
    "other data": (
        "data do not fit",
        "such as it was trained on",
        edm,
        lambda: held_out().flatten(1)[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))].reshape(-1, 1, 8, 8),
        False,
    ),
}


# much like others of the table
ALIKE = {
    "time reversed, VP eps", "x0 as eps", "velocity as v", "bytes", "factor 1000 missing, a table", "Linear network on VP",
    "network cuts t to an integer", "negated F, a trained network", "nan at t_min",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in ALIKE else ()) for n in PLANTED])
def test_the_mistake_is_named(name):
    mistake, change, plant, data, _ = PLANTED[name]
    result = check(plant(), data())
    assert [f.name for f in result.findings][:1] == [mistake], str(result)
    assert change in result.findings[0].change
    assert result.findings[0].evidence
    assert not result.ok
    if mistake not in ("not deterministic", "rows influence each other"):  # which spoil every further measurement
        assert len(result.findings) == 1, str(result)


# a search without data costs a second or two: these are of all kinds, the others run with the slow tests
QUICK = {
    "2C output", "train mode", "batch statistics", "nan at t = 1", "constant",
    "no class", "no text", "raises",
}  # fmt: skip
WITHOUT = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n, row in PLANTED.items() if row[4]]


@pytest.mark.parametrize("name", WITHOUT)
def test_the_mistake_is_named_without_data(name):
    mistake, _, plant, data, _ = PLANTED[name]
    result = check(plant(), shape=(64, *data().shape[1:]))
    assert [f.name for f in result.findings][:1] == [mistake], str(result)


def test_the_planted_mistakes_are_of_many_kinds():
    assert len({row[0] for row in PLANTED.values()}) >= 20
    assert {row[0] for row in PLANTED.values()} <= set(MISTAKES)


def test_an_untrained_network_is_said_to_be_one():
    torch.manual_seed(0)
    with torch.random.fork_rng():
        layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).requires_grad_(False)
    score = Score(lambda x, t: layers(torch.cat([x, t[:, None]], 1)), VP())
    assert [f.name for f in check(score, points()).findings] == ["does not denoise"]
    assert any("agree" in note for note in check(score, shape=(64, 2)).notes)


# --- other scores ---------------------------------------------------------------------------------------------------------


class Off(Predictor):
    """An exact score but for one of its answers."""

    def __init__(self, fault: str) -> None:
        self.exact, self.fault = mixture(VP()), fault
        self.path = self.exact.path

    def row(self, knot):
        return self.exact.row(knot)

    def at(self, knots, x, conditions, tally):
        found = self.exact.at(knots, x, conditions, tally)
        return [lambda x, f=f: 1.1 * f(x) for f in found] if self.fault == "at" else found

    def predict(self, x, t, **conditions):
        pair = self.exact.predict(x, t)
        if self.fault == "rows":
            alpha, sigma = float(self.path.alpha(t)), float(self.path.sigma(t))
            x0 = pair.x0 + 0.2 * x.mean(0)
            pair = Prediction(x0, (x - alpha * x0) / sigma)
        return Prediction(pair.x0, 1.1 * pair.eps) if self.fault == "pair" else pair

    def __call__(self, x, t, **conditions):
        score = self.exact(x, t)
        return {"score": -score, "nan": score * torch.nan}.get(self.fault, score)


@pytest.mark.parametrize(
    ("fault", "formula"),
    [("pair", "alpha x0 + sigma eps = x"), ("score", "-sigma score = eps"), ("at", "a x0 + b eps = y")],
)
def test_an_inconsistent_score_is_found(fault, formula):
    (finding,) = check(Off(fault), points()).findings
    assert finding.name == "inconsistent prediction"
    assert formula in finding.evidence


def test_a_consistent_one_is_not():
    assert check(Off(""), points()).ok
    assert not check(Off("nan"), points()).ok
    assert [f.name for f in check(Off("rows"), points()).findings][:1] != []


@pytest.mark.parametrize("guide", [guidance.static_threshold, lambda s: guidance.autoguidance(s, vp("v"), 2.0)])
def test_a_guided_score_is_not_accused(guide):
    """It is no posterior mean, and need not be one."""
    result = check(guide(vp()), points())
    assert result.ok, str(result)
    assert "no wrapped network" in str(result)


def test_the_page_on_your_network_is_true(capsys):
    """Every block of docs/your_network.md, in order."""
    text = (File(__file__).resolve().parent.parent / "docs" / "your_network.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "your_network.md", "exec"), scope)  # noqa: S102
    said = capsys.readouterr().out
    for line in ("['does not denoise']", "1. factor 1000 missing", "change   label=lambda t: 999 * t"):
        assert line in said
    assert "data = 2 * data - 1" in said
    assert "input scaling missing" in said
    # the networks are given back as they were
    assert not scope["unet"].training


# --- manners --------------------------------------------------------------------------------------------------------------


def test_it_prints_what_to_do():
    result = check(vp("x0", truth="eps"), points())
    text = str(result)
    assert 'change   predicts="eps"' in text
    assert "output mixed up" in text
    assert f"{result.calls} network calls" in text
    assert len(result.levels) == 6
    assert "nothing wrong was found" in str(check(vp(), points()))


def test_calls_are_counted_and_nothing_is_left_behind():
    count = 0
    inner = Dropping().train()

    def network(x: Tensor, t: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return inner(x, t)

    before = torch.random.get_rng_state()
    result = check(Score(network, VP()), points())
    assert count == result.calls
    assert torch.equal(torch.random.get_rng_state(), before)
    assert inner.drop.training
    again = check(Score(network, VP()), points())
    assert again.levels == result.levels


def test_what_train_mode_does_is_measured_in_train_mode():
    (finding,) = check(Score(Dropping().train(), VP()), points()).findings
    assert "Dropout 'drop'" in finding.evidence
    assert "differ by" in finding.evidence
    assert check(Score(Dropping().train(), VP(), mode="eval"), points()).ok


def test_conditions_go_with_their_rows():
    inner = net(VP())
    score = Score(lambda x, t, shift: inner(x - path_alpha(t) * shift, t), VP())

    def path_alpha(t: Tensor) -> Tensor:
        return VP().alpha(t.double()).to(t.dtype)[:, None]

    shift = torch.linspace(-3.0, 3.0, 256)[:, None].expand(256, 2).clone()
    assert check(score, points() + shift, shift=shift).ok
    assert not check(score, points() + shift, shift=shift.flip(0)).ok


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": torch.zeros(8, 2)}, "all the same number"),
        ({"data": torch.randn(1, 2)}, "give a batch"),
        ({"data": torch.full((4, 2), torch.nan)}, "inf or nan"),
        ({"data": [1.0]}, "give a tensor"),
        ({}, "shape is missing"),
        ({"shape": (3,)}, "give the shape of a batch"),
        ({"shape": "ab"}, "give the shape of a batch"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        check(vp(), **arguments)


def test_a_bare_network_is_no_score():
    with pytest.raises(InputError, match="wrap the network first"):
        check(net(VP()), points())  # pyright: ignore[reportArgumentType]
