"""A wrapped network: conventions, rows, checks of what comes back, and what is left untouched."""

import copy
import functools
import math
import pickle
import threading
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sde
from scores import Gaussian, Score
from scores.network import SPLITS
from sde import EDM, VP, Linear
from sde.errors import InputError, NetworkError, PathError, PrecisionWarning, TrainModeWarning
from sde.prediction import OUTPUTS, Tally

X = torch.tensor([[0.3, -0.7], [1.1, 0.4], [-2.0, 0.9]], dtype=torch.float64)
F32 = X.float()
MEAN, VAR = 0.4, 0.3  # of a Gaussian, per dimension
PATHS = {
    name: make()
    for name, make in {
        "VP": VP,
        "EDM": EDM,
        "Linear": Linear,
        **{name: getattr(sde, name) for name in ("VE", "Cosine", "SubVP", "Trigonometric") if hasattr(sde, name)},
    }.items()
}


def call(score, x=F32, t=0.5, tally=None, **conditions):
    """One call as solvers make it."""
    return score.at(score.path.knots([t]), x, conditions, tally or Tally())[0](x)


def truth(path, x, t):
    """(x0, eps, score) of the Gaussian, in the form with one division by the variance of x_t."""
    a, s = float(path.alpha(t)), float(path.sigma(t))
    score = (a * MEAN - x) / (a * a * VAR + s * s)
    return MEAN - a * VAR * score, -s * score, score


def answer(path, predicts, x, t, sigma_data=0.5):
    """What a perfect network says, from the table of published conventions rather than from OUTPUTS."""
    a, s, da, ds = (float(fn(t)) for fn in (path.alpha, path.sigma, path.dalpha, path.dsigma))
    x0, eps, score = truth(path, x, t)
    if predicts == "F":  # D = sd^2/(sig^2+sd^2) y + sig sd/sqrt(sig^2+sd^2) F in y = x/a, sig = s/a
        y, sig, sd = x / a, s / a, sigma_data
        return (x0 - sd**2 / (sig**2 + sd**2) * y) * math.sqrt(sig**2 + sd**2) / (sig * sd)
    if predicts == "v":
        r = math.hypot(a, s)
        return (a * eps - s * x0) / r
    return {"eps": eps, "x0": x0, "score": score, "velocity": da * x0 + ds * eps}[predicts]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("predicts", OUTPUTS)
def test_every_output_gives_the_same_prediction(path, predicts):
    for u in (0.03, 0.4, 0.97):
        t = path.t_min + u * (path.T - path.t_min)
        score = Score(lambda x, label, t=t: answer(path, predicts, x, t), path, predicts)
        x0, eps, grad = truth(path, X, t)
        pair = score.predict(X, t)
        size = max(1.0, float(path.sigma(t)))
        assert (pair.x0 - x0).abs().max() < 1e-10 * size
        assert (pair.eps - eps).abs().max() < 1e-10 / min(1.0, float(path.sigma(t)))
        assert (score(X, t) - grad).abs().max() < 1e-10 * (1 + grad.abs().max())
        y = score.at(path.knots([t]), X, {}, Tally())[0](X)
        row = score.row(path.knot(t))
        assert torch.equal(y, answer(path, predicts, X, t))
        assert (row.a * x0 + row.b * eps - y).abs().max() < 1e-10 * (1 + y.abs().max())


@pytest.mark.parametrize("predicts", OUTPUTS)
def test_a_time_a_sample_is_each_sample_alone(predicts):
    path = VP()
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    seen = []

    def network(x, label):
        seen.append(label)
        return torch.stack([answer(path, predicts, row, float(t)) for row, t in zip(x / 2, label / 3, strict=True)])

    score = Score(network, path, predicts, label=lambda t: 3 * t, scale=lambda t: 2 + 0 * t)
    pair, grad = score.predict(X, times), score(X, times)
    for i, t in enumerate(times.tolist()):
        one = score.predict(X[i : i + 1], t)
        assert (one.x0[0] - pair.x0[i]).abs().max() < 1e-13
        assert (one.eps[0] - pair.eps[i]).abs().max() < 1e-13
        assert (score(X[i : i + 1], t)[0] - grad[i]).abs().max() < 1e-12
        assert (pair.x0[i] - truth(path, X[i], t)[0]).abs().max() < 1e-12
    assert torch.equal(seen[0], 3 * times)


def test_rows_given_as_a_pair():
    path = Linear()
    reverse = Score(lambda x, label: -answer(path, "velocity", x, 0.3), path, (lambda t: 1 + 0 * t, -1))  # u = x0 - eps
    other = Score(lambda x, label: 2 * truth(path, x, 0.3)[0] + 0.3 * truth(path, x, 0.3)[1], path, (2.0, lambda t: t))
    for score in (reverse, other):
        assert (score.predict(X, 0.3).x0 - truth(path, X, 0.3)[0]).abs().max() < 1e-12
        assert (score(X, 0.3) - truth(path, X, 0.3)[2]).abs().max() < 1e-12
        full = score.predict(X, torch.full((3,), 0.3, dtype=torch.float64))
        assert (full.x0 - truth(path, X, 0.3)[0]).abs().max() < 1e-12
    assert other.row(path.knot(0.3)) == (2.0, 0.3)


def test_the_network_gets_scaled_input_and_float64_labels_cast_once():
    seen = []

    def network(x, label):
        seen.append((x, label))
        return x

    path = EDM()
    score = Score(network, path, "F", label=lambda t: t.log() / 4, scale=lambda t: (t * t + 0.25) ** -0.5)
    knots = path.knots([80.0, 1.7, 0.002])
    tally = Tally()
    for x, dtype in ((X, torch.float64), (F32, torch.float32)):
        seen.clear()
        for f in score.at(knots, x, {}, tally):
            f(x)
        for (x_in, label), k in zip(seen, knots, strict=True):
            expected = torch.tensor(math.log(k.t) / 4, dtype=torch.float64).to(dtype)
            assert label.shape == (3,)
            assert label.dtype is dtype
            assert (label - expected).abs().max() < 1e-15
            assert x_in.dtype is dtype
            torch.testing.assert_close(x_in, x / math.hypot(k.t, 0.5))
    assert (tally.nfe, tally.net_evals) == (6, 6)


def test_integer_labels_stay_integers():
    seen = []
    score = Score(lambda x, n: seen.append(n) or x, VP(), label=lambda t: (999 * t).round().long())
    call(score, t=0.5)
    score.predict(X, torch.tensor([0.0005, 0.5, 1.0]))
    assert seen[0].dtype is torch.int64
    assert seen[0].tolist() == [500] * 3
    assert seen[1].tolist() == [0, 500, 999]


def test_the_label_function_cannot_change_the_grid():
    path = VP()
    score = Score(lambda x, label: x * label[0], path, label=lambda t: t.mul_(2))
    knots = path.knots([1.0, 0.25])
    first, second = score.at(knots, X, {}, Tally())
    assert torch.equal(first(X), 2 * X)
    assert torch.equal(second(X), 0.5 * X)


def test_calls_are_counted_also_when_the_network_fails():
    tally = Tally()
    with pytest.raises(NetworkError):
        call(Score(lambda x, t: None, VP()), tally=tally)
    assert (tally.nfe, tally.net_evals) == (1, 1)


# ---------------------------------------------------------------- conditions


class Conditioned(nn.Module):
    def forward(self, x, t, y=None, context=None):
        self.seen = {"y": y, "context": context}
        return x


def test_no_conditions_means_no_keyword_arguments():
    seen = []

    def network(*args, **kwargs):
        seen.append((len(args), kwargs))
        return args[0]

    call(Score(network, VP()))
    call(Score(network, VP()), y=1)
    assert seen == [(2, {}), (2, {"y": 1})]


def test_conditions_reach_the_network_constants_as_they_are_single_rows_expanded():
    net = Conditioned()
    table = torch.randn(7, 2)
    score = Score(net, VP(), conditions={"context": table})
    call(score, y=torch.tensor([4]))
    assert net.seen["y"].tolist() == [4, 4, 4]
    assert torch.equal(net.seen["context"], table)
    call(score, y=torch.tensor([1, 2, 3]), context={"a": torch.ones(3, 5), "b": [torch.ones(1), "text", 2.0]})
    assert net.seen["y"].tolist() == [1, 2, 3]
    assert net.seen["context"]["b"][0].shape == (3,)
    score.predict(F32, 0.5, y=torch.tensor(7))
    assert net.seen["y"].shape == ()


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ({"y": torch.tensor([1, 2])}, ["y", "2 rows", "batch of 3"]),
        ({"y": torch.zeros(6)}, ["6 rows", "batch of 3"]),
        ({"context": {"a": torch.zeros(3, 1), "b": torch.zeros(2, 1)}}, ["context['b']", "2 rows", "3"]),
        ({"context": [torch.zeros(5)]}, ["context[0]", "5 rows"]),
        ({"label": torch.zeros(3)}, ["label", "(x, t, y=None, context=None)"]),
    ],
)
def test_b14_conditions_that_do_not_fit(conditions, words):
    score = Score(Conditioned(), VP())
    for attempt in (lambda: call(score, **conditions), lambda: score.predict(F32, 0.5, **conditions)):
        with pytest.raises(InputError) as error:
            attempt()
        assert all(word in str(error.value) for word in words), str(error.value)


def test_b14_a_missing_condition_is_named():
    def network(x, t, y):
        return x

    with pytest.raises(InputError, match="missing a required argument: 'y'"):
        call(Score(network, VP()))
    assert torch.equal(call(Score(functools.partial(network, y=1), VP())), F32)


# ---------------------------------------------------------------- what comes back


class Output(OrderedDict):
    """Like a model output of a hub library: a dict whose entries are attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


IMAGE = torch.zeros(4, 3, 2, 2)
BAD = {
    "B3 broadcastable": (torch.zeros(4, 2), lambda x, t: x[:, :1], "output shape (4, 1), state (4, 2): must be equal"),
    "B4 vector": (torch.zeros(4, 2), lambda x, t: x[:, 0], "output shape (4,), state (4, 2)"),
    "B4 doubled batch": (torch.zeros(4, 2), lambda x, t: torch.cat([x, x]), "output shape (8, 2), state (4, 2)"),
    "B4 scalar": (torch.zeros(1, 1), lambda x, t: x.sum(), "output shape (), state (1, 1)"),
    "B5 learned variance": (IMAGE, lambda x, t: torch.cat([x, x], 1), "6 channels for 3: pass split='learned_var'"),
    "B6 tuple": (F32, lambda x, t: (x,), "returned tuple of 1: name the element by output=0"),
    "B6 list": (F32, lambda x, t: [x, x], "returned list of 2: name the element by output=0"),
    "B7 dict": (F32, lambda x, t: {"a": x, "b": x}, "keys 'a', 'b'"),
    "B7 object": (F32, lambda x, t: SimpleNamespace(mean=x), "returned SimpleNamespace"),
    "B8": (F32, lambda x, t: None, "returned None"),
    "B9 int": (F32, lambda x, t: x.long(), "dtype int64: need floating"),
    "B9 bool": (F32, lambda x, t: x > 0, "dtype bool: need floating"),
    "B10": (F32, lambda x, t: x.to(torch.complex64), "complex64: complex is not supported"),
    "B12": (F32, lambda x, t: x.to("meta"), "output on meta, state on cpu"),
    "B13": (F32, lambda x, t: x.mul_(2), "changed its input in place"),
    "float": (F32, lambda x, t: 1.0, "returned float: need a tensor"),
    "numpy": (F32, lambda x, t: x.numpy(), "returned ndarray: need a tensor"),
}


@pytest.mark.parametrize(("x", "network", "words"), BAD.values(), ids=BAD)
def test_bad_outputs(x, network, words):
    score = Score(network, VP())
    x = x.clone()
    with pytest.raises(NetworkError) as error:
        call(score, x)
    assert words in str(error.value)
    assert "t=0.5" in str(error.value)
    assert error.value.t == 0.5
    for attempt in (score, score.predict):
        with pytest.raises(NetworkError):
            attempt(x, 0.5)
        with pytest.raises(NetworkError):
            attempt(x, torch.full((len(x),), 0.5))


def test_b13_in_place_on_a_view_and_through_a_scaled_copy():
    def network(x, t):
        x[0, 0] = 1.0
        return x.clone()

    with pytest.raises(NetworkError, match="in place"):
        call(Score(network, VP()), F32.clone())
    x = F32.clone()
    call(Score(network, VP(), scale=lambda t: 1 + t), x)  # its own copy is the network's to change
    assert torch.equal(x, F32)


@pytest.mark.parametrize(
    ("network", "output"),
    [
        (lambda x, t: (0, x), 1),
        (lambda x, t: [x], -1),
        (lambda x, t: {"a": x, "b": 0}, "a"),
        (lambda x, t: {"a": x}, None),
        (lambda x, t: {"sample": x, "b": 0}, None),
        (lambda x, t: Output(sample=x, b=x + 1), None),
        (lambda x, t: SimpleNamespace(sample=x), None),
        (lambda x, t: SimpleNamespace(mean=x), "mean"),
        (lambda x, t: nn.Parameter(x), None),
        (lambda x, t: x.to(torch.bfloat16).half(), None),
    ],
)
def test_b6_b7_the_element_is_found(network, output):
    x = F32.bfloat16().float()
    y = call(Score(network, VP(), output=output), x)
    assert torch.equal(y, x)
    assert y.dtype is torch.float32


@pytest.mark.parametrize(
    ("network", "output", "words"),
    [
        (lambda x, t: (x,), 3, "output=3: it has 1 elements"),
        (lambda x, t: {"a": x, "b": x}, "c", "keys 'a', 'b'"),
        (lambda x, t: SimpleNamespace(mean=x), "sample", "attributes mean"),
        (lambda x, t: (x,), "sample", "output='sample'"),
    ],
)
def test_b6_b7_an_element_that_is_not_there(network, output, words):
    with pytest.raises(NetworkError) as error:
        call(Score(network, VP(), output=output))
    assert words in str(error.value)


def test_b5_split_keeps_the_first_half():
    x = torch.randn(4, 3, 2, 2)
    network = lambda x, t: torch.cat([x, x + 1], 1)  # noqa: E731
    assert torch.equal(call(Score(network, VP(), split="learned_var"), x), x)
    assert torch.equal(call(Score(lambda x, t: x, VP(), split="learned_var"), x), x)
    with pytest.raises(NetworkError, match="must be equal"):
        call(Score(lambda x, t: torch.cat([x, x, x], 1), VP(), split="learned_var"), x)


def test_b11_float64_output_is_cast_with_one_warning():
    score = Score(lambda x, t: x.double(), VP())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert call(score).dtype is torch.float32
    assert [w.category for w in seen] == [PrecisionWarning]


def test_b16_gradients_flow_when_asked_and_only_then():
    net = nn.Linear(2, 2).double()
    score = Score(lambda x, t: net(x), VP())
    x = X.clone().requires_grad_()
    score(x, 0.5).sum().backward()
    assert x.grad is not None
    assert net.weight.grad is not None
    with torch.no_grad():
        assert call(score, x).grad_fn is None
    exact = Score(lambda x, t: answer(VP(), "eps", x, 0.5), VP())
    grad = torch.func.vmap(torch.func.jacrev(lambda z: exact(z[None], 0.5)[0]))(X)
    a, s = float(VP().alpha(0.5)), float(VP().sigma(0.5))
    assert (grad + torch.eye(2, dtype=torch.float64) / (a * a * VAR + s * s)).abs().max() < 1e-12


def test_inference_mode_works_though_in_place_changes_go_unseen():
    score, tally = Score(lambda x, t: 2 * x, VP()), Tally()
    prepared_outside = score.at(VP().knots([0.5]), F32, {}, tally)[0]
    with torch.inference_mode():
        x = F32.clone()
        assert torch.equal(call(score, x), 2 * x)
        assert torch.equal(prepared_outside(x), 2 * x)
        assert torch.equal(prepared_outside(x), 2 * x)
    assert (tally.nfe, tally.net_evals) == (2, 2)
    assert torch.equal(call(score, x), 2 * x)  # an inference tensor outside


def test_b18_a_network_that_raises_is_chained():
    def network(x, t):
        raise ZeroDivisionError("no luck")

    score = Score(network, VP())
    with pytest.raises(NetworkError, match=r"ZeroDivisionError at t=0\.5: no luck") as error:
        call(score)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert error.value.t == 0.5
    with pytest.raises(NetworkError) as error:
        score.predict(F32, torch.tensor([0.1, 0.2, 0.3]))
    assert error.value.t is None
    assert isinstance(error.value.__cause__, ZeroDivisionError)

    def stopped(x, t):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(Score(stopped, VP()))
    original = InputError("theirs")

    def nested(x, t):
        raise original

    with pytest.raises(InputError) as error:
        call(Score(nested, VP()))
    assert error.value is original


# ---------------------------------------------------------------- construction


class Net(nn.Module):
    def forward(self, x, t):
        return x


def one_argument(x):
    return x


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((3, VP()), {}, ["int 3", "network(x, label)"]),
        ((None, VP()), {}, ["NoneType"]),
        ((Net, VP()), {}, ["the class Net", "Net(...)"]),
        ((one_argument, VP()), {}, ["(x)", "too many positional"]),
        ((nn.Linear(2, 2), VP()), {}, ["(input: torch.Tensor) -> torch.Tensor"]),
        ((Net(), "VP"), {}, ["path", "'VP'"]),
        ((Net(), VP), {}, ["path"]),
        ((Net(), VP(), "epsilon"), {}, ["'epsilon'", "'eps'"]),
        ((Net(), VP(), "velocty"), {}, ["'velocity'"]),
        ((Net(), VP(), (1.0,)), {}, ["pair"]),
        ((Net(), VP(), (1.0, "b")), {}, ["pair"]),
        ((Net(), VP(), (math.nan, 1.0)), {}, ["pair"]),
        ((Net(), VP(), None), {}, ["None"]),
        ((Net(), VP()), {"label": 999}, ["label", "999"]),
        ((Net(), VP()), {"label": lambda t: 3.0}, ["label(t)", "float"]),
        ((Net(), VP()), {"label": lambda t: t.sum()}, ["label(t)", "()"]),
        ((Net(), VP()), {"label": lambda t: t.numpy()}, ["label(t)", "ndarray"]),
        ((Net(), VP()), {"label": lambda t: 1 / []}, ["label(t) raised TypeError"]),
        ((Net(), VP()), {"scale": lambda t: t[:, None]}, ["scale(t)"]),
        ((Net(), VP()), {"sigma_data": 0.0}, ["sigma_data"]),
        ((Net(), VP()), {"sigma_data": math.nan}, ["sigma_data"]),
        ((Net(), VP()), {"mode": "train"}, ["mode='train'", "'eval'"]),
        ((Net(), VP()), {"split": "half"}, ["split='half'", "'learned_var'"]),
        ((Net(), VP()), {"output": 1.5}, ["output=1.5"]),
        ((Net(), VP()), {"dtype": "half"}, ["dtype"]),
        ((Net(), VP()), {"dtype": torch.int64}, ["dtype"]),
        ((Net(), VP()), {"conditions": [1]}, ["conditions"]),
    ],
)
def test_b19_bad_arguments(arguments, options, words):
    with pytest.raises(InputError) as error:
        Score(*arguments, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_label_function_for_single_times_is_found_out():
    score = Score(Net(), VP(), label=lambda t: torch.tensor([math.log(t)]))
    with pytest.raises(InputError, match=r"label\(t\) raised"):
        score.at(VP().knots([0.1, 0.2]), F32, {}, Tally())


def test_good_callables():
    class Callable:
        def __call__(self, x, t):
            return x

        def method(self, x, t, y=None):
            return x

    for network in (Net(), Callable(), Callable().method, lambda *a: a[0]):
        assert call(Score(network, VP())).shape == F32.shape
    assert repr(Score(Net(), VP(), "v")).startswith("Score(Net, VP(")
    assert None in SPLITS


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (X.numpy(), "torch.from_numpy"),
        ([[1.0, 2.0]], "torch.as_tensor"),
        (torch.zeros(3, 2, dtype=torch.long), "int64: need floating"),
        (torch.zeros(3, 2, dtype=torch.bool), "bool: need floating"),
        (torch.zeros(3, 2, dtype=torch.complex64), "complex is not supported"),
        (torch.tensor(1.0), "0-dimensional"),
        (torch.eye(3).to_sparse(), "layout"),
    ],
)
def test_bad_states(x, words):
    score = Score(lambda x, t: x, VP())
    for attempt in (lambda: score(x, 0.5), lambda: score.predict(x, 0.5), lambda: score.at([VP().knot(0.5)], x, {}, Tally())):
        with pytest.raises(InputError, match=words):
            attempt()


@pytest.mark.parametrize(
    "t", [1.5, -0.1, math.nan, "0.5", None, True, torch.zeros(2), torch.zeros(3, 1), torch.tensor(True), 1j]
)
def test_bad_times(t):
    score = Score(lambda x, t: x, VP())
    for attempt in (score, score.predict):
        with pytest.raises(InputError):
            attempt(F32, t)
    with pytest.raises(InputError, match="outside the domain"):
        score(F32, torch.tensor([0.1, 0.2, 2.0]))


def test_b17_half_precision_times_warn():
    score = Score(lambda x, t: x, VP())
    with pytest.warns(PrecisionWarning, match="float16"):
        score(F32, torch.tensor(0.5, dtype=torch.float16))


@pytest.mark.parametrize(
    "t", [0.5, 1, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([0.5] * 3), torch.tensor([1, 1, 1])]
)
def test_times_of_every_kind(t):
    value = float(torch.as_tensor(t).reshape(-1)[0])
    score = Score(lambda x, label: answer(VP(), "eps", x, value), VP())
    assert (score(X, t) - truth(VP(), X, value)[2]).abs().max() < 1e-12


# ---------------------------------------------------------------- the ends of the path


def test_b21_eps_at_alpha_zero():
    path = Linear()
    score = Score(lambda x, t: x, path, "eps")
    with pytest.raises(PathError, match=r"eps-prediction is undefined at alpha=0 \(t=1 .*use a v, x0 or velocity.*t=0.999"):
        score.predict(X, 1.0)
    with pytest.raises(PathError, match="alpha=0"):
        score.predict(X, torch.tensor([0.1, 1.0, 0.2]))
    assert torch.equal(score(X, 1.0), -X)  # the score itself is defined
    with pytest.raises(PathError, match="alpha=0"):
        Score(lambda x, t: x, path, "score").predict(X, 1.0)
    for predicts in ("x0", "v", "velocity", "F"):
        good = Score(lambda x, t, p=predicts: torch.full_like(x, MEAN) if p == "x0" else _at_noise(x, p), path, predicts)
        pair = good.predict(X, 1.0)
        assert (pair.x0 - MEAN).abs().max() < 1e-15
        assert (pair.eps - X).abs().max() < 1e-15


def _at_noise(x, predicts):
    return {"v": torch.full_like(x, -MEAN), "velocity": x - MEAN, "F": torch.full_like(x, MEAN / 0.5)}[predicts]


@pytest.mark.parametrize("predicts", ["x0", "score"])
def test_b22_sigma_zero(predicts):
    score = Score(lambda x, t: x, EDM(), predicts)
    with pytest.raises(PathError, match=rf"{predicts}-prediction is undefined at sigma=0 .*last usable time is t=0.002"):
        score.predict(X, 0.0)
    for other in ("x0", "eps", "v"):
        with pytest.raises(PathError, match="score is undefined at sigma=0"):
            Score(lambda x, t: x, EDM(), other)(X, 0.0)
    assert torch.equal(Score(lambda x, t: x, EDM(), "score")(X, 0.0), X)  # handed through
    for other in ("eps", "v", "velocity"):
        assert torch.equal(Score(lambda x, t: x, EDM(), other).predict(X, 0.0).x0, X)
    with pytest.raises(PathError, match="velocity-prediction"):
        Score(lambda x, t: x, VP(), "velocity").predict(X, 0.0)  # sigma'(0) is infinite


def test_a_row_parallel_to_the_state_says_nothing():
    score = Score(lambda x, t: x, Linear(), (0.5, 0.5))
    with pytest.raises(PathError, match="does not determine"):
        score.predict(X, 0.5)


def test_an_infinite_label_is_an_error_of_the_call_only():
    score = Score(lambda x, t: x, EDM(), label=torch.log)
    good, bad = score.at(EDM().knots([1.0, 0.0]), X, {}, Tally())
    assert torch.equal(good(X), X)
    with pytest.raises(PathError, match=r"label\(0\) = -inf"):
        bad(X)
    with pytest.raises(PathError, match="label"):
        score.predict(X, 0.0)


# ---------------------------------------------------------------- dtypes, layouts, modes, side effects


class Recorder(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(2, 2).to(dtype)

    def forward(self, x, t):
        self.seen = x.dtype, t.dtype
        return self.layer(x)


@pytest.mark.parametrize("network", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [torch.float64, torch.float32])
def test_dtype_matrix(network, state):
    net = Recorder(network)
    score = Score(net, VP(), dtype=network)
    y = call(score, X.to(state))
    assert y.dtype is state
    assert net.seen == (network, state)
    reference = Score(Recorder(torch.float64), VP())
    reference.network.layer.load_state_dict(net.layer.state_dict())
    tolerance = 10 * max(torch.finfo(network).eps, torch.finfo(state).eps)
    for a, b in zip(vars(score.predict(X.to(state), 0.3)).values(), vars(reference.predict(X, 0.3)).values(), strict=True):
        assert a.dtype is state
        assert (a.double() - b).abs().max() < tolerance


def test_half_states_are_worked_on_in_float32():
    net = Recorder(torch.float32)
    score = Score(net, VP())
    assert score(F32.half(), 0.5).dtype is torch.float16
    assert net.seen == (torch.float32, torch.float32)
    with pytest.raises(InputError, match="float16"):
        call(score, F32.half())


@pytest.mark.parametrize("own", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_that_do_not_go_together_say_what_to_write(own):
    with pytest.raises(NetworkError, match=rf"parameters are {own}, and x torch.float32: write Score\(..., dtype={own}\)"):
        call(Score(Recorder(own), VP()))
    mixes = Recorder(own)
    mixes.layer = nn.Linear(3, 2).to(own)
    mixes.forward = lambda x, t: mixes.layer(torch.cat([x, t[:, None]], 1))
    if own is not torch.float64:  # its label is in float32 or more
        with pytest.raises(NetworkError, match=r"cast it inside, t.to\(x.dtype\)"):
            call(Score(mixes, VP(), dtype=own))
    with pytest.raises(NetworkError, match=r"not 3 things$"):  # another error is left as it is
        call(Score(raising("not 3 things"), VP()))


def raising(words):
    def network(x, t):
        raise ValueError(words)

    return network


def test_b17_float16_range():
    with pytest.raises(InputError, match="float16 overflows at t=20000"):
        call(Score(Recorder(torch.float16), EDM(T=2e4), dtype=torch.float16), t=2e4)
    call(Score(Recorder(torch.float16), EDM(T=2e4), dtype=torch.float16, scale=lambda t: 1 / t), t=2e4)


def test_layouts_give_the_same_bits():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 2, 5)
    wide = torch.zeros(4, 3, 2, 10)
    wide[..., ::2] = x
    views = [x.to(memory_format=torch.channels_last), wide[..., ::2], x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)]
    score = Score(lambda x, t: x.sin() * t.reshape(-1, 1, 1, 1), VP(), "v")
    for view in views:
        assert torch.equal(score(view, 0.3), score(x, 0.3))
        assert torch.equal(call(score, view), call(score, x))


class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
        self.still = nn.Sequential(nn.Dropout(0.0), nn.LayerNorm(2), nn.InstanceNorm1d(2))

    def forward(self, x, t):
        self.trains = self.training, self.block[1].training
        return self.block(x)


def test_b15_train_mode_warns_and_names_the_layers():
    net = Moody()
    score = Score(net, VP())
    for attempt in (lambda: call(score), lambda: score.predict(F32, 0.5), lambda: score(F32, 0.5)):
        with pytest.warns(TrainModeWarning, match=r"BatchNorm1d 'block.0', Dropout 'block.1': .*mode='eval'") as seen:
            attempt()
        assert "still" not in str(seen[0].message)
    with pytest.warns(TrainModeWarning):
        call(Score(functools.partial(net), VP()))
    with pytest.warns(TrainModeWarning):
        call(Score(net.forward, VP()))
    call(Score(net, VP(), mode="keep"))
    score.raw(F32, 0.5)  # training
    net.eval()
    call(score)
    net.block[1].train()  # one layer is enough
    with pytest.warns(TrainModeWarning, match=r"Dropout 'block.1'"):
        call(score)


def test_b15_eval_mode_is_switched_and_restored():
    net = Moody()
    net.still.eval()
    before = [m.training for m in net.modules()]
    score = Score(net, VP(), mode="eval")
    with score.running():
        with score.running():
            assert call(score).shape == F32.shape
        assert not any(m.training for m in net.modules())
    assert [m.training for m in net.modules()] == before
    score.predict(F32, 0.5)
    assert net.trains == (False, False)
    assert [m.training for m in net.modules()] == before
    with pytest.raises(ZeroDivisionError), score.running():
        raise ZeroDivisionError
    assert [m.training for m in net.modules()] == before
    with pytest.warns(TrainModeWarning, match="running"):
        call(score)
    with Score(lambda x, t: x, VP(), mode="eval").running(), Score(net, VP(), mode="keep").running():
        assert net.training


def test_b15_threads_restore_once():
    net, inside, release = Moody(), threading.Event(), threading.Event()
    score = Score(net, VP(), mode="eval")

    def long_run():
        with score.running():
            inside.set()
            release.wait(10)

    thread = threading.Thread(target=long_run)
    thread.start()
    inside.wait(10)
    with score.running():
        pass
    assert not net.training
    release.set()
    thread.join()
    assert net.training
    assert net.block[1].training


def test_nothing_else_changes():
    net = Net()
    score = Score(net, VP())
    x, t = X.clone(), torch.tensor([0.1, 0.2, 0.3])
    state, version = torch.get_rng_state(), x._version
    keep = (torch.get_default_dtype(), torch.is_grad_enabled(), net.training, list(warnings.filters))
    score(x, t), score.predict(x, t), call(score, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, X)
    assert x._version == version
    assert t.tolist() == torch.tensor([0.1, 0.2, 0.3]).tolist()
    assert x.grad_fn is None
    assert keep == (torch.get_default_dtype(), torch.is_grad_enabled(), net.training, list(warnings.filters))


def test_empty_batch():
    score = Score(lambda x, t: x, VP(), "v")
    assert score(F32[:0], 0.5).shape == (0, 2)
    assert call(score, F32[:0]).shape == (0, 2)


class Untimed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    def forward(self, x, t):
        return self.layers(x)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["copied", "pickled"])  # noqa: S301
def test_scores_can_be_copied_and_pickled(again):
    """Each copy has a network, a mode and a lock of its own."""
    network = Untimed().double().train()
    score = Score(network, VP(), "eps", mode="eval")
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with score.running():
        expected, other = score(x, 0.5), again(score)
    assert network.training
    with other.running():
        assert torch.equal(other(x, 0.5), expected)
        assert not other.network.training
        assert network.training
    law = Gaussian(VP(), [0.5, -0.5], std=0.3)
    assert torch.equal(again(law)(x, 0.5), law(x, 0.5))
