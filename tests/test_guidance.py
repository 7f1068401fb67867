"""Guidance on laws whose conditional and unconditional scores are both known: labels are the components of a mixture."""

from __future__ import annotations

import functools
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scores import Gaussian, GaussianMixture, Score, as_network, guidance
from scores.guidance.base import dot
from scores.guidance.edits import quantile_of
from scores.guidance.gradient import solve
from sde import EDM, VP, Cosine, Linear, ProbabilityFlow, Tabulated
from sde.errors import BudgetWarning, InputError, NetworkError, PathError, StepLimitError, TrainModeWarning
from sde.noise import White
from sde.prediction import Predictor, Tally
from solvers import GRIDS, SOLVERS, encode, exact_law, integrate, sample, trace
from solvers.base import FiniteCheck
from solvers.guided import Resample, cfg_pp
from solvers.learned_variance import LearnedVariance
from solvers.testing import paths

F64 = torch.float64
NULL = 2
ROW = torch.tensor([[1.0, 0.5]], dtype=F64)
MEANS = torch.tensor([[1.2, -0.4], [-0.7, 0.9]], dtype=F64)
COVS = torch.tensor([[[0.30, 0.10], [0.10, 0.20]], [[0.15, -0.05], [-0.05, 0.40]]], dtype=F64)
WEIGHTS = torch.tensor([0.35, 0.65], dtype=F64)
X = torch.tensor([[0.3, -0.7], [1.1, 0.4], [-2.0, 0.9], [0.2, 1.6], [-0.5, -0.1]], dtype=F64)
Y = torch.tensor([0, 1, 1, 0, 1])
OUTPUTS = ("eps", "x0", "score", "v", "velocity", "F")
ZERO_SNR = Tabulated.scaled_linear(1000, zero_terminal_snr=True)


class Labelled:
    """network(x, t, y): exact for p(x | y), and for the mixture where y is NULL. Counts its calls and rows."""

    def __init__(self, path, predicts="eps", equal=False):
        covs = COVS[:1].expand(2, 2, 2) if equal else COVS
        self.laws = [Gaussian(path, m, c) for m, c in zip(MEANS, covs, strict=True)]
        self.all = GaussianMixture(path, WEIGHTS, MEANS, covs)
        self.networks = [as_network(law, path, predicts) for law in (*self.laws, self.all)]
        self.calls = self.rows = 0
        self.seen = []

    def __call__(self, x, t, y):
        assert len(x) == len(y) == len(t)
        self.calls += 1
        self.rows += len(x)
        self.seen.append((t.clone(), y.clone()))
        out = torch.zeros_like(x)
        for k in set(y.tolist()):
            out = torch.where((y == k)[:, None], self.networks[k](x, t), out)
        return out


def labelled(path, predicts="eps", **options):
    network = Labelled(path, predicts, **options)
    return Score(network, path, predicts), network


def cfg(score, scale, **options):
    return guidance.classifier_free(score, scale, unconditional={"y": NULL}, **options)


def only(score, y):
    """The same network with y fixed."""
    return Score(lambda x, t: score.network(x, t, y[: len(x)]), score.path, score.predicts)


def raw(score, x, t, **conditions):
    return score.at([score.path.knot(t)], x, conditions, Tally())[0](x)


def close(a, b, tol=1e-9):
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    size = max(float(b.abs().max()), 1e-300)
    error = float((a - b).abs().max())
    assert error <= tol * size, (error, size)


def middle(path, share):
    """A time where neither alpha nor sigma is small, at a share of lambda in [-2, 2]."""
    low, high = path.lam([path.T, max(path.t_min, 1e-3 * path.T)]).tolist()
    if low < 1.0 and high > -1.0:
        low, high = max(-2.0, low), min(2.0, high)
    return float(path.time(low + share * (high - low)))


def exact(network, x, t, y):
    """(conditional, unconditional) scores from the laws themselves."""
    answers = torch.stack([law(x, t) for law in network.laws])
    return answers[y, torch.arange(len(x))], network.all(x, t)


def times_of(path):
    """A scale that is 1, then 2, then 0."""
    return lambda t: 1.0 if t > 0.6 * path.T else 0.0 if t < 0.2 * path.T else 2.0


def second(score):
    """A network of its own, in another row, counted with the first."""

    def network(x, t):
        score.network.calls += 1
        score.network.rows += len(x)
        return 0.5 * torch.tanh(x)

    return Score(network, score.path, "x0")


GUIDED = {
    "cfg": lambda s: cfg(s, 2.5),
    "cfg_two_calls": lambda s: cfg(s, 2.5, batched=False),
    "interval": lambda s: guidance.interval(cfg(s, 2.5, batched=False), 0.3, 3.0),
    "autoguidance": lambda s: guidance.autoguidance(s, Score(s.network, s.path, s.predicts), 2.0),
    "rescale": lambda s: guidance.rescale(cfg(s, 3.0), 0.7),
    "rescale_x0": lambda s: guidance.rescale(cfg(s, 3.0, batched=False), 0.7, of="x0"),
    "apg": lambda s: guidance.apg(cfg(s, 3.0), eta=0.2, threshold=0.8),
    "perpendicular": lambda s: guidance.perpendicular_negative(
        s, 2.0, unconditional={"y": 0}, negative={"y": NULL}, batched=False
    ),
    "classifier": lambda s: guidance.classifier(s, lambda x, t: -((x - 0.5) ** 2).sum(1) * (1.1 - t / s.path.T), 0.7),
    "dps": lambda s: guidance.dps(s, lambda x0: -2.0 * (x0[:, 0] - 0.3) ** 2),
    "pigdm": lambda s: guidance.pigdm(s, torch.full((1, 1), 0.3, dtype=F64), ROW, noise=0.3, variance=None, iterations=1),
    "static": lambda s: guidance.static_threshold(cfg(s, 4.0), 0.9),
    "dynamic": lambda s: guidance.dynamic_threshold(cfg(s, 4.0, batched=False), 0.8, 0.5),
    "inpaint": lambda s: guidance.inpaint(s, torch.full((2,), 0.4, dtype=F64), torch.tensor([True, False])),
    "nested": lambda s: guidance.static_threshold(
        guidance.pigdm(guidance.interval(cfg(s, 2.0), 0.5, 2.0), torch.full((1, 1), 0.3, dtype=F64), ROW, noise=0.5)
    ),
    "by_sample": lambda s: cfg(s, torch.tensor([0.0, 1.0, 2.0, 1.0, 3.5])),
    "by_time": lambda s: cfg(s, times_of(s.path), batched=False),
    "two_rows": lambda s: guidance.classifier_free(s, times_of(s.path), unconditional=second(s)),
    "apg_interval": lambda s: guidance.interval(guidance.apg(cfg(s, 3.0)), 0.3, 3.0),
}


# --- w = 0, w = 1, linear ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("predicts", ["eps", "v", "F"])
def test_scales_zero_and_one_are_the_two_predictions_to_the_bit(predicts, batched):
    path = EDM() if predicts == "F" else VP()
    score, network = labelled(path, predicts)
    null = torch.full_like(Y, NULL)
    for w, y in ((0.0, null), (1.0, Y), (torch.zeros(5), null), (torch.ones(5), Y), (lambda t: 1, Y)):
        guided = cfg(score, w, batched=batched)
        t = 0.4 * path.T
        assert torch.equal(raw(guided, X, t, y=Y), raw(score, X, t, y=y))
        assert torch.equal(guided(X, t, y=Y), score(X, t, y=y))
        for a, b in zip(vars(guided.predict(X, t, y=Y)).values(), vars(score.predict(X, t, y=y)).values(), strict=True):
            assert torch.equal(a, b)
        ts = torch.linspace(0.1, 0.9, 5, dtype=F64) * path.T
        assert torch.equal(guided(X, ts, y=Y), score(X, ts, y=y))
        for name in ("dpmpp_2m", "ddpm") if isinstance(w, float) else ():
            ours, theirs = (
                sample(s, x=X, solver=name, nfe=4, seed=3, conditions={"y": labels}) for s, labels in ((guided, Y), (score, y))
            )
            assert torch.equal(ours.x, theirs.x)
            assert (ours.nfe, ours.net_evals) == (theirs.nfe, theirs.net_evals)
    network.calls = 0
    cfg(score, 0.0, batched=batched).at([path.knot(0.5)], X, {}, Tally())  # the conditional network is not asked for a label
    assert network.calls == 0


def test_each_sample_of_a_tensor_of_scales_is_exact_at_its_own_end():
    score, _ = labelled(VP(), "v")
    scales = torch.tensor([0.0, 1.0, 2.0, 1.0, 0.0])
    guided = cfg(score, scales, batched=False)
    got, c, u = raw(guided, X, 0.4, y=Y), raw(score, X, 0.4, y=Y), raw(score, X, 0.4, y=torch.full_like(Y, NULL))
    assert torch.equal(got[[0, 4]], u[[0, 4]])
    assert torch.equal(got[[1, 3]], c[[1, 3]])
    close(got[2], 2 * c[2] - u[2], 1e-14)
    close(raw(cfg(score, scales), X, 0.4, y=Y), got, 1e-13)
    alone = cfg(score, 2.0, batched=False)
    assert torch.equal(raw(alone, X[2:3], 0.4, y=Y[2:3]), got[2:3])


@settings(max_examples=20)
@given(
    path=paths(), w=st.floats(-2.0, 8.0), share=st.floats(0.0, 1.0), predicts=st.sampled_from(OUTPUTS), batched=st.booleans()
)
def test_the_guided_score_is_linear_in_the_scale_on_every_path(path, w, share, predicts, batched):
    t = middle(path, share)
    score, network = labelled(path, predicts)
    guided = cfg(score, w, batched=batched)
    c, u = exact(network, X, t, Y)
    wanted = u + w * (c - u)
    size = float(c.abs().max() + u.abs().max()) * (1 + abs(w))
    assert float((guided(X, t, y=Y) - wanted).abs().max()) <= 1e-8 * size
    knot, pair = path.knot(t), guided.predict(X, t, y=Y)
    assert float((pair.eps + knot.sigma * wanted).abs().max()) <= 1e-8 * size * knot.sigma
    close(knot.alpha * pair.x0 + knot.sigma * pair.eps, X, 1e-12)
    a, b = guided.row(knot)
    close(raw(guided, X, t, y=Y), a * pair.x0 + b * pair.eps, 1e-8)


def test_one_batch_is_two_calls():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(11, 16), nn.Linear(5, 16), nn.Linear(16, 4)

        def forward(self, x, t, y):
            return self.b(torch.tanh(self.a(torch.cat([x, t[:, None]], 1)) + self.embed(y)))

    score = Score(Net().eval(), VP(), "v")
    x, y = torch.randn(7, 4), torch.tensor([1, 4, 2, 9, 0, 0, 3])
    for name in ("ddim", "dpmpp_2m", "heun", "ddpm"):
        one, two = (
            sample(
                guidance.classifier_free(score, 3.0, unconditional={"y": 10}, batched=batched),
                x=x,
                solver=name,
                steps=6,
                seed=1,
                conditions={"y": y},
            )
            for batched in (True, False)
        )
        assert float((one.x - two.x).norm() / two.x.norm()) <= 1e-6
        assert one.nfe == two.nfe // 2
        assert one.net_evals == two.net_evals == two.nfe


# --- conditions -------------------------------------------------------------------------------------------------------


class Rich:
    """An elementwise network with conditions of every kind: rows cannot mix, so promises hold to the bit."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, y, text, extra, style=0.25):
        self.batches.append(len(x))
        assert len(text) == len(x) == len(extra["mask"]) == len(extra["list"][0])
        return (
            x * text.mean((1, 2))[:, None]
            + 0.1 * y[:, None]
            - 0.3 * extra["mask"] * extra["list"][0]
            + style * (1.0 + t[:, None]) * extra["name"]
        )


def rich_conditions(n=5):
    generator = torch.Generator().manual_seed(4)
    return {
        "y": torch.arange(n) % 3,
        "text": torch.rand(n, 4, 3, generator=generator, dtype=F64),
        "extra": {
            "mask": torch.rand(n, 2, generator=generator, dtype=F64),
            "list": [torch.rand(n, 1, generator=generator, dtype=F64)],
            "name": 0.7,
        },
    }


def permuted(value, order):
    if isinstance(value, torch.Tensor):
        return value[order]
    if isinstance(value, dict):
        return {k: permuted(v, order) for k, v in value.items()}
    return [permuted(v, order) for v in value] if isinstance(value, list) else value


NULLS = {
    "text": {"text": torch.full((1, 4, 3), 0.2, dtype=F64)},
    "row": {"text": torch.linspace(0, 1, 60, dtype=F64).reshape(5, 4, 3), "y": 7},
    "number": {"y": 0, "text": 0.5},
    "float32": {"text": torch.full((1, 4, 3), 0.25)},
    "nested": {"extra": {"mask": torch.zeros(1, 2, dtype=F64), "list": [torch.ones(5, 1, dtype=F64)], "name": 0.7}},
}


@pytest.mark.parametrize("null", NULLS.values(), ids=NULLS)
@pytest.mark.parametrize("batched", [True, False])
def test_conditions_stay_with_their_rows(null, batched):
    network = Rich()
    score, given = Score(network, VP(), "eps"), rich_conditions()
    order = torch.tensor([3, 0, 4, 1, 2])
    guided = guidance.classifier_free(score, 2.0, unconditional=null, batched=batched)
    moved = guidance.classifier_free(score, 2.0, unconditional=permuted_rows(null, order), batched=batched)
    out, again = (
        sample(s, x=x, solver="dpmpp_2m", nfe=6, conditions=c).x
        for s, x, c in ((guided, X, given), (moved, X[order], permuted(given, order)))
    )
    assert torch.equal(out[order], again)
    filled = {
        k: torch.full_like(given[k], v) if isinstance(v, (int, float)) else v.to(F64) if isinstance(v, torch.Tensor) else v
        for k, v in null.items()
    }
    c, u = raw(score, X, 0.4, **given), raw(score, X, 0.4, **{**given, **filled})
    close(raw(guided, X, 0.4, **given), u + 2.0 * (c - u), 1e-13)
    network.batches.clear()
    raw(guided, X, 0.4, **given)
    assert network.batches == ([10] if batched else [5, 5])


def permuted_rows(value, order):
    if isinstance(value, torch.Tensor):
        return value[order] if len(value) > 1 else value
    if isinstance(value, dict):
        return {k: permuted_rows(v, order) for k, v in value.items()}
    return [permuted_rows(v, order) for v in value] if isinstance(value, list) else value


def test_conditions_of_the_call_override_those_of_the_guidance():
    score, _ = labelled(VP())
    guided = cfg(score, 2.0, conditions={"y": Y})
    assert torch.equal(guided(X, 0.4), cfg(score, 2.0)(X, 0.4, y=Y))
    assert torch.equal(guided(X, 0.4, y=1 - Y), cfg(score, 2.0)(X, 0.4, y=1 - Y))
    assert torch.equal(sample(guided, x=X, nfe=4).x, sample(cfg(score, 2.0), x=X, nfe=4, conditions={"y": Y}).x)
    one = torch.tensor([1])  # a single row is every sample's
    for batched in (True, False):
        close(cfg(score, 2.0, batched=batched)(X, 0.4, y=one), cfg(score, 2.0)(X, 0.4, y=torch.ones_like(Y)), 1e-13)


def test_an_unconditional_network_of_its_own_takes_no_conditions():
    path = VP()
    score, network = labelled(path, "v")
    alone = Score(as_network(network.all, path, "x0"), path, "x0")  # another row, so it is converted
    guided = guidance.classifier_free(score, 3.0, unconditional=alone)
    close(guided(X, 0.4, y=Y), cfg(score, 3.0)(X, 0.4, y=Y), 1e-10)
    zero = guidance.classifier_free(score, 0.0, unconditional=alone)
    assert torch.equal(raw(zero, X, 0.4, y=Y), raw(alone, X, 0.4))
    assert zero.row(path.knot(0.4)) == alone.row(path.knot(0.4))
    close(guidance.classifier_free(score, 3.0, unconditional=network.all)(X, 0.4, y=Y), guided(X, 0.4, y=Y), 1e-10)


BAD_CONDITIONS = {
    "labels": ({"y": torch.zeros(3, dtype=torch.long)}, {"y": NULL}, None, "3 rows for a batch of 5"),
    "null rows": ({"y": Y}, {"y": torch.full((4,), NULL)}, None, "unconditional y has 4 rows for a batch of 5"),
    "unequal rows": ({"y": {"a": Y, "b": Y[:2]}}, {"y": {"a": Y, "b": Y}}, None, "2 rows for a batch of 5"),
    "missing": ({}, {"y": Y}, True, "conditional"),
    "half label": ({"y": Y}, {"y": 0.5}, None, "int64"),
    "no tensor": ({"y": Y}, {"y": None}, True, "batched=False"),
    "two numbers": ({"y": 1}, {"y": 2}, True, "batched=False"),
    "keys": ({"y": {"a": Y}}, {"y": {"b": Y}}, True, "keys"),
    "shapes": ({"y": torch.zeros(5, 2)}, {"y": torch.zeros(5, 3)}, True, r"\(2,\), \(3,\)"),
    "lengths": ({"y": [Y]}, {"y": [Y, Y]}, True, "1 and 2 elements"),
}


@pytest.mark.parametrize("case", BAD_CONDITIONS.values(), ids=BAD_CONDITIONS)
def test_conditions_that_do_not_fit_are_refused_with_their_sizes(case):
    conditions, null, batched, message = case
    calls = []
    score = Score(lambda x, t, y=None: calls.append(1) or x, VP())
    for mode in (True, False) if batched is None else (batched,):
        guided = guidance.classifier_free(score, 2.0, unconditional=null, batched=mode)
        with pytest.raises(InputError, match=message):
            sample(guided, x=X, nfe=4, conditions=conditions)
    assert not calls


def test_conditions_that_cannot_be_stacked_take_two_calls():
    def network(x, t, y=None):
        return x * (0.1 if y is None else y)

    score = Score(network, VP())
    guided = guidance.classifier_free(score, 3.0, unconditional={"y": None}, batched=False)
    close(raw(guided, X, 0.3, y=0.4), 0.1 * X + 3.0 * 0.3 * X, 1e-14)


def test_what_is_stacked_keeps_the_dtype_of_the_condition():
    seen = []
    score = Score(lambda x, t, text: seen.append(text.dtype) or x, VP())
    guided = guidance.classifier_free(score, 2.0, unconditional={"text": torch.ones(1, 2, dtype=F64)})
    raw(guided, X.float(), 0.4, text=torch.ones(5, 2))
    assert seen == [torch.float32]


def test_a_batched_output_of_the_wrong_size_is_named():
    score = Score(lambda x, t, y: x[: len(x) // 2], VP())
    with pytest.raises(NetworkError, match=r"\(5, 2\), state \(10, 2\)"):
        sample(cfg(score, 2.0), x=X, nfe=4, conditions={"y": Y})


BAD_SCALES = [math.nan, math.inf, -math.inf, "3", None, True, 1j, (1.0, 2.0), torch.tensor([1.0, math.nan]), torch.ones(2, 2)]


@pytest.mark.parametrize("scale", [*BAD_SCALES, torch.tensor([True]), torch.ones(0)], ids=repr)
def test_scales_that_are_no_numbers_are_refused(scale):
    score, network = labelled(VP())
    makers = (
        lambda: cfg(score, scale),
        lambda: guidance.autoguidance(score, score, scale),
        lambda: guidance.classifier(score, lambda x, t: x.sum(1), scale),
        lambda: guidance.dps(score, lambda x0: x0.sum(1), scale),
    )
    for make in makers:
        with pytest.raises(InputError, match="scale"):
            make()
    guided = cfg(score, lambda t: scale)
    with pytest.raises(InputError, match=r"scale\("):
        sample(guided, x=X, nfe=4, conditions={"y": Y})
    assert not network.calls


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", ["cfg", "classifier", "pigdm"])
def test_a_scale_a_sample_of_the_wrong_size_is_refused(name, value):
    score, network = labelled(VP())
    scales = torch.full((3,), value)
    guided = {
        "cfg": lambda: cfg(score, scales),
        "classifier": lambda: guidance.classifier(score, lambda x, t: x.sum(1), scales),
        "pigdm": lambda: guidance.pigdm(score, torch.zeros(1, 1, dtype=F64), ROW, noise=0.1, scale=lambda t: scales),
    }[name]()
    for ask in (
        lambda: sample(guided, x=X, nfe=4, conditions={"y": Y}),
        lambda: guided(X, torch.linspace(0.2, 0.8, 5), y=Y),
        lambda: guided.predict(X, 0.4, y=Y),
    ):
        with pytest.raises(InputError, match="3 values for a batch of 5"):
            ask()
    assert not network.calls
    with pytest.raises(InputError, match="raised ZeroDivisionError"):
        sample(cfg(score, lambda t: 1 / 0), x=X, nfe=4, conditions={"y": Y})


# --- the guided law ---------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(path=paths(), w=st.floats(-1.0, 6.0), name=st.sampled_from(["ddim", "dpmpp_2m", "edm_heun", "ddpm", "unipc_2"]))
def test_of_equal_covariances_the_guided_law_is_a_shifted_gaussian(path, w, name):
    """mu = mu' + w (mu - mu'): whole runs are those on its exact score, on every path."""
    cov = COVS[0]
    given_y = Gaussian(path, MEANS[0], cov)
    base = Gaussian(path, MEANS[1], cov)
    shifted = Gaussian(path, MEANS[1] + w * (MEANS[0] - MEANS[1]), cov)
    for guided in (guidance.autoguidance(given_y, base, w), guidance.classifier_free(given_y, w, unconditional=base)):
        t = middle(path, 0.4)
        wanted = shifted(X, t)
        assert float((guided(X, t) - wanted).abs().max()) <= 1e-9 * (1 + abs(w)) * float(wanted.abs().max() + 1)
        start, stop = middle(path, 0.0), middle(path, 1.0)
        ours, theirs = (sample(s, x=X, solver=name, steps=5, start=start, stop=stop, seed=2) for s in (guided, shifted))
        assert float((ours.x - theirs.x).abs().max()) <= 1e-8 * (1 + abs(w)) * float(theirs.x.abs().max() + 1)
        assert ours.nfe == 2 * theirs.nfe or w in (0.0, 1.0)


def test_of_unequal_covariances_the_guided_score_is_that_of_combined_precisions():
    path, t, w = VP(), 0.35, 1.7
    k = path.knot(t)
    score, _ = labelled(path, "v")
    other = Gaussian(path, torch.tensor([0.2, 0.1], dtype=F64), torch.tensor([[0.6, 0.2], [0.2, 0.5]], dtype=F64))
    guided = guidance.classifier_free(score, w, unconditional=other)
    eye = torch.eye(2, dtype=F64)
    p = torch.linalg.inv(k.alpha**2 * COVS[0] + k.sigma**2 * eye)
    q = torch.linalg.inv(k.alpha**2 * torch.tensor([[0.6, 0.2], [0.2, 0.5]], dtype=F64) + k.sigma**2 * eye)
    both = w * p + (1 - w) * q
    mean = torch.linalg.solve(both, k.alpha * (w * p @ MEANS[0] + (1 - w) * q @ other.mean))
    close(guided(X, t, y=torch.zeros_like(Y)), -(X - mean) @ both, 1e-10)


def test_autoguidance_converts_the_worse_networks_row():
    path = VP()
    good, worse = Gaussian(path, MEANS[0], COVS[0]), Gaussian(path, MEANS[0], 2.0 * COVS[0])
    for a in OUTPUTS:
        for b in ("eps", "v", "x0"):
            guided = guidance.autoguidance(
                Score(as_network(good, path, a), path, a), Score(as_network(worse, path, b), path, b), 2.5
            )
            close(guided(X, 0.3), worse(X, 0.3) + 2.5 * (good(X, 0.3) - worse(X, 0.3)), 1e-9)
    conditional, _ = labelled(path)
    seen = []
    worse = Score(lambda x, t, y: seen.append(y) or 0.9 * conditional.network(x, t, y), path)
    c = raw(conditional, X, 0.3, y=Y)
    close(raw(guidance.autoguidance(conditional, worse, 2.0), X, 0.3, y=Y), 1.1 * c, 1e-12)
    assert torch.equal(seen[0], Y)
    one = guidance.autoguidance(conditional, worse, 1.0)
    assert torch.equal(raw(one, X, 0.3, y=Y), c)
    assert len(seen) == 1


def test_networks_that_reuse_their_output_are_copied():
    buffer = torch.empty(5, 2, dtype=F64)

    def network(x, t, y):
        return torch.mul(x, 1.0 + y[:, None], out=buffer)

    guided = cfg(Score(network, VP()), 3.0, batched=False)
    close(raw(guided, X, 0.3, y=Y), 3.0 * X + 3.0 * (1.0 + Y[:, None] - 3.0) * X, 1e-13)


# --- interval ---------------------------------------------------------------------------------------------------------


def test_outside_the_interval_only_the_conditional_call_is_made():
    path = EDM()  # t is sigma / alpha
    for batched in (True, False):
        score, network = labelled(path, "F")
        guided = guidance.interval(cfg(score, 3.0, batched=batched), 0.3, 5.0)
        full = cfg(score, 3.0, batched=batched)
        for t, inside in (
            (0.3, False),
            (math.nextafter(0.3, 1), True),
            (5.0, True),
            (math.nextafter(5.0, 9), False),
            (80.0, False),
        ):
            tally = Tally()
            network.calls = network.rows = 0
            out = guided.at([path.knot(t)], X, {"y": Y}, tally)[0](X)
            assert torch.equal(out, raw(full if inside else score, X, t, y=Y))
            assert (
                tally.nfe == network.calls - (1 if not inside else 1 if batched else 2) == (2 if inside and not batched else 1)
            )
            assert tally.net_evals == (2 if inside else 1)
            assert guided.calls(path.knot(t)) == tally.nfe
        out = sample(guided, x=80.0 * X, steps=12, conditions={"y": Y})
        inside = sum(0.3 < t <= 5.0 for t in out.times[:-1].tolist())
        assert 0 < inside < 12
        assert out.net_evals == 12 + inside
        assert out.nfe == (12 if batched else 12 + inside)
    twice = guidance.interval(guidance.interval(full, 0.3, 5.0), 1.0, 9.0)
    assert [twice.calls(path.knot(t)) for t in (0.9, 1.1, 5.0, 6.0)] == [1, 2, 2, 1]
    assert guidance.interval(full, 0.0).calls(path.knot(0.0)) == 1
    assert guidance.interval(cfg(labelled(ZERO_SNR, "v")[0], 2.0, batched=False), 1.0).calls(ZERO_SNR.knot(ZERO_SNR.T)) == 2
    for low, high in ((-1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (math.nan, 1.0), (0.0, math.nan), ("a", 1.0)):
        with pytest.raises(InputError, match=r"low|high"):
            guidance.interval(full, low, high)
    with pytest.raises(InputError, match="interval takes guidance"):
        guidance.interval(score, 0.0, 1.0)
    with pytest.raises(InputError, match="interval takes guidance"):
        guidance.interval(guidance.static_threshold(full), 0.0, 1.0)


def test_a_sample_outside_the_interval_does_not_see_the_other_network():
    def network(x, t, y):
        return torch.where((y == NULL)[:, None] & (t > 0.6)[:, None], math.nan, 0.3 * x * (1.0 + y[:, None]))

    score, knots = Score(network, Linear(), "v"), Linear().knots([0.2, 0.3, 0.5, 0.7, 0.9])
    plain = score.each(knots, X, {"y": Y}, Tally())(X)
    for guided in (cfg(score, 3.0), guidance.rescale(cfg(score, 3.0, batched=False)), guidance.apg(cfg(score, 3.0))):
        out = guidance.interval(guided, 0.0, 1.2).each(knots, X, {"y": Y}, Tally())(X)
        assert torch.equal(out[3:], plain[3:])
        assert bool(out.isfinite().all())
        assert not torch.equal(out[:3], plain[:3])


def test_an_interval_of_a_gradient_guidance_leaves_the_score_alone_outside():
    path = EDM()
    score, _ = labelled(path, "F")
    asked = []

    def log_prob(x, t):
        asked.append(float(t[0]))
        return -(x**2).sum(1)

    guided = guidance.interval(guidance.classifier(score, log_prob, 2.0), 0.5, 2.0)
    sample(guided, x=80.0 * X, steps=12, conditions={"y": Y})
    assert asked
    assert all(0.5 < t <= 2.0 for t in asked)
    assert torch.equal(raw(guided, X, 3.0, y=Y), raw(score, X, 3.0, y=Y))


# --- rescale, APG, perpendicular, thresholds: per-sample formulas ------------------------------------------------------


def by_sample(fn, *tensors):
    """A published formula applied to each sample on its own."""
    return torch.stack([fn(*rows) for rows in zip(*tensors, strict=True)])


def parts(score, t, y=Y, x=X, null=NULL):
    return raw(score, x, t, y=y), raw(score, x, t, y=torch.full_like(y, null))


def test_rescale_is_the_published_formula_on_the_networks_output():
    """Lin et al. 2023, algorithm 2."""

    def published(pos, neg, weight=3.0, phi=0.7):
        cfg = neg + weight * (pos - neg)
        factor = pos.std() / cfg.std()
        return cfg * (phi * factor + 1 - phi)

    for predicts in ("v", "eps"):
        score, _ = labelled(VP(), predicts)
        guided = guidance.rescale(cfg(score, 3.0), 0.7)
        c, u = parts(score, 0.4)
        close(raw(guided, X, 0.4, y=Y), by_sample(published, c, u), 1e-12)
        assert guided.row(VP().knot(0.4)) == score.row(VP().knot(0.4))
        close(raw(guidance.rescale(cfg(score, 3.0), 0.0), X, 0.4, y=Y), raw(cfg(score, 3.0), X, 0.4, y=Y), 1e-14)
        full = raw(guidance.rescale(cfg(score, 3.0), 1.0), X, 0.4, y=Y)
        close(full.std(1), c.std(1), 1e-12)
        x0 = guidance.rescale(cfg(score, 3.0), 0.7, of="x0").predict(X, 0.4, y=Y).x0
        c, u = (score.predict(X, 0.4, y=y).x0 for y in (Y, torch.full_like(Y, NULL)))
        close(x0, by_sample(published, c, u), 1e-11)
        assert torch.equal(raw(guidance.rescale(cfg(score, 1.0)), X, 0.4, y=Y), raw(score, X, 0.4, y=Y))
        zero = raw(guidance.rescale(cfg(score, 0.0), 0.7), X, 0.4, y=Y)
        close(zero, by_sample(functools.partial(published, weight=0.0), *parts(score, 0.4)), 1e-12)
    flat = Score(lambda x, t, y: torch.full_like(x, 0.3) * (1 + y[:, None]), VP())  # std 0: left as it is
    close(raw(guidance.rescale(cfg(flat, 3.0)), X, 0.4, y=Y), raw(cfg(flat, 3.0), X, 0.4, y=Y), 1e-14)


def test_apg_is_the_published_formula_on_x0():
    """Sadat et al. 2024, algorithm 1 without momentum."""

    def published(cond, uncond, w, eta, r):
        diff = cond - uncond
        if r > 0:
            diff = diff * min(1.0, r / float(diff.norm()))
        unit = cond / cond.norm()
        along = (diff * unit).sum() * unit
        return cond + (w - 1) * ((diff - along) + eta * along)

    score, _ = labelled(VP(), "v")
    c, u = (score.predict(X, 0.4, y=y).x0 for y in (Y, torch.full_like(Y, NULL)))
    for w, eta, r in ((4.0, 0.0, 0.5), (4.0, 0.3, 0.05), (2.0, 1.0, 100.0), (3.0, 0.0, math.inf), (-1.0, 0.5, 1.0)):
        guided = guidance.apg(cfg(score, w), eta=eta, threshold=r)
        got = guided.predict(X, 0.4, y=Y).x0
        formula = functools.partial(published, w=w, eta=eta, r=0 if r == math.inf else r)
        close(got, by_sample(formula, c, u), 1e-11)
        assert bool(((got - c).norm(dim=1) <= abs(w - 1) * max(1.0, eta) * r * (1 + 1e-9)).all())
        if eta == 0.0:
            assert float(((got - c) * c).sum(1).abs().max()) < 1e-12
    close(guidance.apg(cfg(score, 4.0), eta=1.0)(X, 0.4, y=Y), cfg(score, 4.0)(X, 0.4, y=Y), 1e-12)
    assert torch.equal(raw(guidance.apg(cfg(score, 1.0)), X, 0.4, y=Y), raw(score, X, 0.4, y=Y))
    with pytest.raises(InputError, match="function of"):
        guidance.apg(cfg(score, 4.0), momentum=-0.5)
    still = Score(lambda x, t, y: torch.zeros_like(x), VP(), "x0")  # D = 0 and D - D' = 0
    assert torch.equal(raw(guidance.apg(cfg(still, 4.0), threshold=1.0), X, 0.4, y=Y), torch.zeros_like(X))


def test_negative_prompts_take_away_only_what_is_across_the_positive_one():
    """Armandpour et al. 2023, eq. 5 with its weights' signs turned."""

    def published(pos, neu, neg, w, c):
        a, b = pos - neu, neg - neu
        across = b - (b @ a) / (a @ a) * a
        return neu + w * (a - c * across)

    for batched in (True, False):
        network_score, network = labelled(VP(), "eps")
        null, negative = torch.full_like(Y, NULL), 1 - Y
        guided = guidance.perpendicular_negative(
            network_score, 2.5, unconditional={"y": NULL}, negative={"y": negative}, weights=0.6, batched=batched
        )
        pos, neu, neg = (raw(network_score, X, 0.4, y=y) for y in (Y, null, negative))
        network.calls = 0
        tally = Tally()
        got = guided.at([VP().knot(0.4)], X, {"y": Y}, tally)[0](X)
        close(got, by_sample(functools.partial(published, w=2.5, c=0.6), pos, neu, neg), 1e-12)
        assert (tally.nfe, network.calls, tally.net_evals) == ((1, 1, 3) if batched else (3, 3, 3))
        assert guided.calls(VP().knot(0.4)) == tally.nfe
        two = guidance.perpendicular_negative(
            network_score,
            2.5,
            unconditional={"y": NULL},
            negative=[{"y": negative}, {"y": Y}],
            weights=[0.6, 5.0],
            batched=batched,
        )
        close(raw(two, X, 0.4, y=Y), got, 1e-11)  # what lies along the positive prompt takes nothing away
    zero = guidance.perpendicular_negative(network_score, 0.0, unconditional={"y": NULL}, negative={"y": negative})
    assert torch.equal(raw(zero, X, 0.4, y=Y), neu)
    same = guidance.perpendicular_negative(network_score, 2.5, unconditional={"y": Y}, negative={"y": 1 - Y}, weights=1.0)
    close(raw(same, X, 0.4, y=Y), pos - 2.5 * (neg - pos), 1e-11)  # no positive direction: all of it is across


def test_thresholds_are_the_published_ones_of_each_sample():
    score, _ = labelled(VP(), "v")
    base = cfg(score, 4.0)
    x0 = base.predict(X, 0.4, y=Y).x0
    close(guidance.static_threshold(base, 0.7).predict(X, 0.4, y=Y).x0, x0.clamp(-0.7, 0.7), 1e-12)

    def imagen(v, p, low=1.0, high=None):
        s = max(float(torch.quantile(v.abs(), p)), low)
        s = s if high is None else min(s, high)
        return v.clamp(-s, s) * (low / s)

    for options in ((0.995, 1.0, None), (0.3, 0.2, None), (0.5, 0.1, 0.4), (1.0, 0.5, None), (0.4, 1.5, None)):
        got = guidance.dynamic_threshold(base, *options).predict(X, 0.4, y=Y).x0
        close(got, by_sample(lambda v, o=options: imagen(v, *o), x0), 1e-12)
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 10, 1000):
        v = torch.rand(3, n, 1, generator=generator, dtype=F64)
        for q in (0.001, 0.25, 0.5, 0.995, 1.0):
            close(quantile_of(v, q), torch.quantile(v, q, dim=1, keepdim=True), 1e-14)


@pytest.mark.parametrize("name", [n for n in GUIDED if n not in ("by_sample",)])
def test_a_sample_does_not_know_its_batch_mates(name):
    """To the bit, with an elementwise network: not for its guidance, nor for theirs."""
    network = Counted()
    guided = GUIDED[name](Score(network, VP(), "v"))
    x = torch.cat([X, 50.0 * X])
    y = torch.cat([Y, 1 - Y])
    for t in (0.1, 0.5, 0.8):
        together = raw(guided, x, t, y=y)
        assert bool(together.any())
        for i in (0, 3, 7):
            assert torch.equal(raw(guided, x[i : i + 1], t, y=y[i : i + 1]), together[i : i + 1])


def test_inner_products_do_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 9, 3, 7, 5, generator=generator)
    out = dot(a, b)
    assert out.shape == (9, 1, 1, 1)
    close(out.flatten().double(), torch.einsum("bijk,bijk->b", a.double(), b.double()), 1e-6)
    assert all(torch.equal(dot(a[i : i + 1], b[i : i + 1]), out[i : i + 1]) for i in range(9))
    assert torch.equal(dot(a[:, :0], b[:, :0]), torch.zeros(9, 1, 1, 1))


# --- inpainting -------------------------------------------------------------------------------------------------------

MASK = torch.tensor([True, False])
KNOWN = torch.tensor([0.37, math.nan], dtype=F64)  # what is not known is not read


@pytest.mark.parametrize("path", [VP(), EDM(), Linear(), ZERO_SNR], ids=str)
def test_the_known_part_is_at_the_right_noise_level_throughout(path):
    """As in a run whose data are that one point: alpha known + sigma eps along the flow."""
    law = GaussianMixture(path, WEIGHTS, MEANS, COVS)
    score = Score(as_network(law, path, "v"), path, "v")
    guided = guidance.inpaint(score, KNOWN, MASK)
    point = Gaussian(path, KNOWN[:1], var=0.0)
    x = path.prior_std() * X
    for name in ("ddim", "dpmpp_2m", "edm_heun", "ddpm", "unipc_2"):
        for stop in (path.t_min, 0.0):
            top = 0.9 * path.T if name == "edm_heun" else path.T
            times = [top, *(path.T * torch.linspace(0.8, 0.1, 5, dtype=F64)).tolist(), stop]
            ours = integrate(name, guided, x, times, seed=5, trajectory=True)
            if name != "ddpm":  # whose normals are drawn for the whole sample
                known = integrate(name, point, x[:, :1], times, trajectory=True)
                close(ours.trajectory[:, :, :1], known.trajectory, 1e-9)
            if stop == float(path.sigma(stop)) == 0.0:
                close(ours.x[:, 0], KNOWN[:1].expand(5), 1e-12)
                assert name == "edm_heun" or bool((ours.x[:, 0] == KNOWN[0]).all())
            if name == "ddim":
                knots = [k for k in path.knots(times) if k.sigma > 0.0]
                eps = [(state[:, 0] - k.alpha * KNOWN[0]) / k.sigma for state, k in zip(ours.trajectory, knots, strict=False)]
                close(torch.stack(eps), eps[0].expand(len(eps), 5), 1e-6)
    single = Gaussian(path, MEANS[0, 1:], var=0.3)  # of independent parts the unknown one is as if alone
    free = Gaussian(path, MEANS[0], var=torch.tensor([0.5, 0.3], dtype=F64))
    alone = sample(single, x=path.prior_std() * X[:, 1:], steps=8)
    close(sample(guidance.inpaint(free, KNOWN, MASK), x=path.prior_std() * X, steps=8).x[:, 1:], alone.x, 1e-8)


def test_under_ddpm_the_known_part_has_the_exact_law():
    path = VP()
    guided = guidance.inpaint(Gaussian(path, MEANS[0], COVS[0]), KNOWN, MASK)
    plan = trace("ddpm", path, path.time([-3.0, -1.0, 0.5, 1.5]))
    mean, covariance = probed(plan, guided, 2)
    s, t = plan.grid[0], plan.grid[-1]
    got = mean(torch.tensor([s.alpha * 0.37, 0.0], dtype=F64))[0]
    assert math.isclose(got, t.alpha * 0.37, rel_tol=1e-9)
    assert math.isclose(covariance(torch.tensor([[s.sigma**2, 0.0], [0.0, 1.0]], dtype=F64))[0, 0], t.sigma**2, rel_tol=1e-9)


def probed(plan, score, d):
    """A run that is affine in its start and normals, read off by probing: (mean of a mean, covariance of a covariance)."""

    def run(x, z):
        gen = plan.iterate(score, x, lambda k, s, t, like: z[k])
        calls = score.at(plan.knots, x, {}, Tally())
        try:
            state, _ = next(gen)
            i = 0
            while True:
                y, i = calls[i](state), i + 1
                state, _ = gen.send(y)
        except StopIteration as stop:
            return stop.value

    n = plan.draws
    x = torch.zeros(1 + d + n * d, d, dtype=F64)
    z = torch.zeros(n, *x.shape, dtype=F64)
    for i in range(d):
        x[1 + i, i] = 1.0
        for k in range(n):
            z[k, 1 + d + k * d + i, i] = 1.0
    out = run(x, z)
    gain, noise = (out[1 : 1 + d] - out[:1]).T, (out[1 + d :] - out[:1]).T
    return lambda m: gain @ m + out[0], lambda c: gain @ c @ gain.T + noise @ noise.T


def test_resampling_draws_the_unknown_part_given_the_known_one():
    """On correlated Gaussian data the run is affine, so its law is exact; with repeats it tends to the conditional law."""
    path = Cosine()
    cov = torch.tensor([[0.5, 0.45], [0.45, 0.6]], dtype=F64)
    guided = guidance.inpaint(Gaussian(path, MEANS[0], cov), KNOWN, MASK)
    wanted = float(MEANS[0, 1] + 0.45 / 0.5 * (0.37 - MEANS[0, 0]))
    variance = 0.6 - 0.45**2 / 0.5
    times = path.time(torch.linspace(-4.0, 3.5, 31, dtype=F64))
    errors = []
    for solver in (SOLVERS["ddpm"].solver, *(Resample(SOLVERS["ddpm"].solver, repeats, 3) for repeats in (2, 5, 20))):
        plan = trace(solver, path, times, eta=1.0)
        mean, covariance = probed(plan, guided, 2)
        m, c = mean(torch.zeros(2, dtype=F64)), covariance(torch.eye(2, dtype=F64))
        errors.append((abs(float(m[1]) - wanted), abs(math.log(float(c[1, 1]) / variance))))
    off = [mean for mean, _ in errors]
    assert off == sorted(off, reverse=True), errors
    assert off[-1] < 0.1 * off[0], errors
    assert errors[0][1] > 0.3
    assert max(spread for _, spread in errors[1:]) < 0.2, errors


def test_resampling_keeps_the_law_and_its_order():
    path = VP()
    data = Gaussian(path, MEANS[0], COVS[0])
    start, stop = path.time(-2.5), path.time(2.0)
    for inner, eta, order in ((SOLVERS["ddpm"].solver, 1.0, 1), (SOLVERS["dpm_solver_2"].solver, 0.0, 2)):
        solver = Resample(inner, 3, 4)
        assert solver.weak == order
        errors = []
        for n in (64, 128):
            times = path.time(torch.linspace(float(path.lam(start)), float(path.lam(stop)), n + 1, dtype=F64))
            errors.append(exact_law(trace(solver, path, times, eta=eta), data).w2(float(stop)))
        assert 2.0 ** (order - 0.25) < errors[0] / errors[1] < 2.0 ** (order + 0.35), (errors, order)


def test_resampling_visits_the_published_times():
    """RePaint's schedule: after every ``jump`` steps up again, ``repeats`` - 1 times (it counts steps from the data)."""

    def published(n, jump, repeats):
        left, t, out = dict.fromkeys(range(jump, n, jump), repeats - 1), 0, []
        while t < n:
            out.append(t)
            t += 1
            if left.get(t, 0):
                left[t] -= 1
                t -= jump
        return out

    score, network = labelled(VP())
    for n, jump, repeats in ((12, 3, 2), (10, 1, 3), (7, 4, 3), (5, 9, 2)):
        network.seen.clear()
        out = sample(score, x=X, solver=Resample(SOLVERS["ddim"].solver, repeats, jump), steps=n, stop=0.0, conditions={"y": Y})
        times = out.times.tolist()
        assert [times.index(float(t[0])) for t, _ in network.seen] == published(n, jump, repeats)
        assert out.nfe == len(network.seen) <= n * repeats
    data, times, inner = Gaussian(ZERO_SNR, MEANS[0], COVS[0]), torch.linspace(1.0, 0.1, 31, dtype=F64), SOLVERS["ddpm"].solver
    plain, jumping = (exact_law(trace(s, ZERO_SNR, times, eta=1.0), data) for s in (inner, Resample(inner, 2, 3)))
    assert jumping.nfe == 60
    assert jumping.w2(0.1) < 1.2 * plain.w2(0.1) < 0.2  # the first jump is back to alpha = 0
    assert Resample(SOLVERS["edm_sde"].solver).weak == SOLVERS["edm_sde"].solver.weak
    for options in ({"repeats": 0}, {"jump": 0}, {"repeats": 2.5}, {"jump": True}):
        with pytest.raises(InputError, match="must be an int"):
            Resample(SOLVERS["ddpm"].solver, **options)
    with pytest.raises(InputError, match="inner"):
        Resample("ddpm")


# --- gradients --------------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(path=paths(), share=st.floats(0.0, 1.0), predicts=st.sampled_from(OUTPUTS), k=st.integers(0, 1))
def test_an_exact_classifier_makes_the_unconditional_score_the_conditional_one(path, share, predicts, k):
    t = middle(path, share)
    _, network = labelled(path)
    score = Score(as_network(network.all, path, predicts), path, predicts)

    def log_prob(x, t):
        joint = torch.stack([w.log() + law.log_prob(x, t) for w, law in zip(WEIGHTS, network.laws, strict=True)], 1)
        return joint.log_softmax(1)[:, k]

    c, u = network.laws[k](X, t), network.all(X, t)
    size = float(c.abs().max() + u.abs().max())
    wanted = {
        guidance.classifier(score, log_prob): c,
        guidance.classifier(score, log_prob, 0.5): 0.5 * (c + u),
        guidance.classifier(score, lambda x, t: c - u, 0.5, gradient=True): 0.5 * (c + u),
    }
    with torch.no_grad():
        for guided, value in wanted.items():
            assert float((guided(X, t) - value).abs().max()) <= 1e-8 * size
        assert torch.equal(guidance.classifier(score, log_prob, 0.0)(X, t), score(X, t))


def test_a_classifiers_conditions_are_its_own_unless_shared():
    network = Counted()
    score, plain = Score(network, VP()), Score(lambda x, t: network(x, t, Y[: len(x)]), VP())
    seen = []

    def log_prob(x, t, y):
        seen.append((t, y))
        return -(x**2).sum(1) * y

    grad = -2.0 * X * Y[:, None]
    sigma = VP().knot(0.4).sigma
    shared = guidance.classifier(score, log_prob, 1.5, takes=("y",), shared=True)
    own = guidance.classifier(plain, log_prob, 1.5, takes="y")
    for guided in (shared, own):
        close(raw(guided, X, 0.4, y=Y), raw(plain, X, 0.4) - 1.5 * sigma * grad, 1e-12)
    assert seen[0][0].shape == (5,)
    assert bool((seen[0][0] == 0.4).all())
    assert seen[0][0].dtype == F64
    with pytest.raises(InputError, match="log_prob takes condition y"):
        sample(own, x=X, nfe=3)
    with pytest.raises(InputError, match="condition y has 3 rows for a batch of 5"):
        sample(own, x=X, nfe=3, conditions={"y": Y[:3]})


def test_a_sample_that_is_not_guided_does_not_see_its_gradient():
    score = Score(Counted(), VP(), "v")
    guided = guidance.classifier(score, lambda x, t: ((x - X[0]) ** 2).sum(1).sqrt(), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]))
    with torch.no_grad():  # the root's gradient is NaN at the first sample
        got, plain = raw(guided, X, 0.4, y=Y), raw(score, X, 0.4, y=Y)
    assert torch.equal(got[[0, 2]], plain[[0, 2]])
    assert not torch.equal(got[1], plain[1])


def test_gradients_are_taken_only_there():
    """Nothing of them stays: no graph in the result, none in parameters; and none is lost where the caller builds a graph."""
    layer = nn.Linear(2, 2, dtype=F64)
    score = Score(lambda x, t: layer(x), VP())
    guided = {
        "classifier": guidance.classifier(score, lambda x, t: -(layer(x) ** 2).sum(1)),
        "dps": guidance.dps(score, lambda x0: -(x0**2).sum(1)),
        "pigdm": guidance.pigdm(score, torch.zeros(1, 1, dtype=F64), ROW, noise=0.3, variance=None, iterations=2),
        "pigdm_1": guidance.pigdm(score, torch.zeros(1, 1, dtype=F64), ROW, noise=0.3),
    }
    for name, g in guided.items():
        out = sample(g, x=X, nfe=4, solver="ddim", start=0.7).x
        assert not out.requires_grad
        assert all(p.grad is None for p in layer.parameters())
        with torch.inference_mode():
            close(sample(g, x=X.clone(), nfe=4, solver="ddim", start=0.7).x, out, 1e-13)
        with torch.no_grad():
            assert torch.equal(raw(g, X, 0.4), raw(g, X.clone().requires_grad_(), 0.4))
            assert not raw(g, X, 0.4).requires_grad
        x = X[:2].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, g=g: sample(g, x=x, nfe=2, solver="ddim", start=0.7, grad=True).x, (x,)), name
        weight = layer.weight.detach().clone()

        def through_parameters(w, g=g):
            with torch.no_grad():
                layer.weight.copy_(w)
            return sample(g, x=X[:2], nfe=2, solver="ddim", start=0.7, grad=True).x.sum()

        (slope,) = torch.autograd.grad(through_parameters(weight), layer.weight)
        step = torch.zeros_like(weight)
        step[0, 1] = 1e-6
        measured = (through_parameters(weight + step) - through_parameters(weight - step)) / 2e-6
        assert math.isclose(float(slope[0, 1]), float(measured.detach()), rel_tol=1e-6), name
        through_parameters(weight)


@pytest.mark.parametrize("name", ["cfg", "cfg_two_calls", "apg", "rescale", "static", "perpendicular", "inpaint"])
def test_gradients_pass_through(name):
    guided = GUIDED[name](Score(Counted(), VP(), "v"))
    x = X[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: sample(guided, x=x, nfe=4, solver="ddim", conditions={"y": Y[:2]}, grad=True).x, (x,)
    )


@settings(max_examples=10)
@given(
    path=paths(),
    share=st.floats(0.0, 1.0),
    predicts=st.sampled_from(OUTPUTS),
    noise=st.floats(0.05, 1.0),
    seed=st.integers(0, 99),
)
def test_on_gaussian_data_pigdm_is_the_exact_posterior(path, share, predicts, noise, seed):
    """p(x_0 | y) is Gaussian in closed form, and so is its diffusion: the guided score must be its score."""
    generator = torch.Generator().manual_seed(seed)
    h, a = torch.randn(2, 3, generator=generator, dtype=F64), torch.randn(3, 3, generator=generator, dtype=F64)
    mean, cov = torch.randn(3, generator=generator, dtype=F64), 0.3 * a @ a.T + 0.1 * torch.eye(3, dtype=F64)
    y = torch.randn(1, 2, generator=generator, dtype=F64)
    x = torch.randn(4, 3, generator=generator, dtype=F64)
    t = middle(path, share)
    for variance, prior in ((None, cov), (0.7, 0.7 * torch.eye(3, dtype=F64))):
        score = Score(as_network(Gaussian(path, mean, prior), path, predicts), path, predicts)
        guided = guidance.pigdm(score, y, h, noise=noise, variance=variance, iterations=2)
        close(guided(x, t), posterior(path, mean, prior, h, y[0], noise)(x, t), 1e-6)


def posterior(path, mean, cov, h, y, noise):
    gain = cov @ h.T @ torch.linalg.inv(h @ cov @ h.T + noise**2 * torch.eye(len(h), dtype=F64))
    after = cov - gain @ h @ cov
    return Gaussian(path, mean + gain @ (y - h @ mean), 0.5 * (after + after.T))


@pytest.mark.parametrize("path", [VP(), Linear(), EDM()], ids=str)
def test_whole_runs_draw_from_the_posterior(path):
    mean, cov = torch.tensor([0.4, -0.2], dtype=F64), COVS[0]
    y = torch.tensor([0.9], dtype=F64)
    score = Score(as_network(Gaussian(path, mean, cov), path, "v"), path, "v")
    guided = guidance.pigdm(score, y[None], lambda x0: x0 @ ROW.T, noise=0.2, variance=None, iterations=1)
    truth = posterior(path, mean, cov, ROW, y, 0.2)
    x = path.prior_std() * X
    for name in ("dpmpp_2m", "ddpm", "edm_heun"):
        start = float(path.time(-3.0))
        ours, theirs = (
            sample(s, x=x, solver=name, steps=6, start=start, stop=0.0 if name == "dpmpp_2m" else None, seed=1)
            for s in (guided, truth)
        )
        close(ours.x, theirs.x, 1e-7)
        assert ours.nfe == theirs.nfe == ours.net_evals
    back = encode(guided, theirs.x, solver="dpmpp_2m", steps=6, start=start)
    close(back.x, encode(truth, theirs.x, solver="dpmpp_2m", steps=6, start=start).x, 1e-7)


def test_measurements_a_sample_and_operators_that_are_functions():
    path = VP()
    score = Gaussian(path, torch.zeros(1, 3, 3, dtype=F64), var=1.0)
    x = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = torch.randn(4, 1, 1, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    guided = guidance.pigdm(score, y, lambda x0: x0.mean(2, keepdim=True), noise=0.1)
    whole = guided(x, 0.5)
    for i in range(4):
        h = torch.kron(torch.full((1, 3), 1 / 3, dtype=F64), torch.eye(3, dtype=F64))
        one = posterior(path, torch.zeros(9, dtype=F64), torch.eye(9, dtype=F64), h, y[i].flatten(), 0.1)
        close(whole[i : i + 1].flatten(1), one(x[i : i + 1].flatten(1), 0.5), 1e-9)
    offset = guidance.pigdm(score, y + 3.0, lambda x0: x0.mean(2, keepdim=True) + 3.0, noise=0.1)
    close(offset(x, 0.5), whole, 1e-10)
    mask = torch.tensor([[1.0, 0.0, 1.0]], dtype=F64)  # singular where nothing is seen
    guided = guidance.pigdm(score, 0.5 * mask.expand(1, 1, 3, 3), lambda x0: x0 * mask, noise=0.0)
    got = guided(x, 0.5)
    close(got[..., 1], score(x, 0.5)[..., 1], 1e-12)
    k = path.knot(0.5)
    close(got[..., 0], (k.alpha * 0.5 - x[..., 0]) / k.sigma**2, 1e-9)


def test_conjugate_gradients_solve_each_sample_and_stop_at_the_solution():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 4, 4, generator=generator, dtype=F64)
    a = a @ a.transpose(1, 2) + 0.5 * torch.eye(4, dtype=F64)
    a[1] = 2.0 * torch.eye(4, dtype=F64)
    b = torch.randn(6, 4, generator=generator, dtype=F64)
    b[2] = 0.0
    apply = lambda u: torch.einsum("bij,bj->bi", a, u)  # noqa: E731
    close(solve(apply, b, 4), torch.linalg.solve(a, b), 1e-8)
    close(solve(apply, b, 12), torch.linalg.solve(a, b), 1e-10)
    close(solve(apply, b, 1)[1], b[1] / 2.0, 1e-14)


def test_dps_on_gaussian_data_is_its_own_closed_form():
    """g = J^T H^T (y - H x0) / noise^2 with J = alpha C / (alpha^2 C + sigma^2): the spread of x_0 is left out."""
    path, t, noise = VP(), 0.3, 0.4
    k = path.knot(t)
    law = Gaussian(path, MEANS[0], COVS[0])
    y = torch.tensor([0.9], dtype=F64)
    jacobian = k.alpha * COVS[0] @ torch.linalg.inv(k.alpha**2 * COVS[0] + k.sigma**2 * torch.eye(2, dtype=F64))
    x0 = law.posterior_mean(X, t)
    gradient = ((y - x0 @ ROW.T) / noise**2) @ ROW @ jacobian

    def log_likelihood(x0):
        return -((y - x0 @ ROW.T) ** 2).sum(1) / (2 * noise**2)

    for predicts in ("eps", "v"):
        score = Score(as_network(law, path, predicts), path, predicts)
        close(guidance.dps(score, log_likelihood, 0.8)(X, t), law(X, t) + 0.8 * gradient, 1e-9)
        per_sample = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5])
        got = guidance.dps(score, log_likelihood, per_sample)(X, t)
        close(got, law(X, t) + per_sample[:, None] * gradient, 1e-9)
    truth = posterior(path, MEANS[0], COVS[0], ROW, y, noise)
    near, far = (path.time(lam) for lam in (4.5, -1.0))
    errors = [
        float((guidance.dps(law, log_likelihood)(X, s) - truth(X, s)).abs().max() / (truth(X, s) - law(X, s)).abs().max())
        for s in (near, far)
    ]
    assert errors[0] < 0.02
    assert errors[1] > 0.3


# --- CFG++ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [VP(), EDM(), Linear(), ZERO_SNR], ids=str)
@pytest.mark.parametrize("predicts", ["v", "x0"])
def test_cfg_pp_is_ddim_that_renoises_with_the_unconditional_eps(path, predicts):
    """Chung et al. 2024, algorithm 2: x_t = alpha_t x0_guided + sigma_t eps_unconditional."""
    score, _ = labelled(path, predicts)
    null, lam = torch.full_like(Y, NULL), 0.6
    times = torch.tensor([1.0, 0.85, 0.6, 0.3, 0.05, 0.0], dtype=F64) * path.T
    x = path.prior_std() * X
    plan = trace("ddim", path, times)
    guided = cfg(score, cfg_pp(plan, lam))
    ours = plan.run(guided, x, conditions={"y": Y})
    s = x
    for a, b in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        c, u = score.predict(s, a, y=Y), score.predict(s, a, y=null)
        s = float(path.alpha(b)) * (u.x0 + lam * (c.x0 - u.x0)) + float(path.sigma(b)) * u.eps
    close(ours, s, 1e-9)
    with pytest.raises(InputError, match="not a time of this plan"):
        sample(guided, x=x, solver="ddim", steps=3, conditions={"y": Y})


def test_cfg_pp_of_stochastic_and_other_samplers():
    path = VP()
    score, _ = labelled(path, "v")
    null, lam = torch.full_like(Y, NULL), 0.7
    times = GRIDS["log_snr"](path, 5)

    def run(name, eta=None):
        plan = trace(name, path, times, eta=eta)
        return plan.run(cfg(score, cfg_pp(plan, lam)), X, conditions={"y": Y}, seed=7)

    def by_hand(step, name, eta=None):
        """step(x0_guided, eps_unconditional, x, s, t, normals), with the same normals."""
        plan = trace(name, path, times, eta=eta)
        draws = White(7).open(tuple(X.shape), F64, X.device)
        rows = [row for row in plan.rows if type(row).__name__ == "Normal"]
        x = X
        for i, (a, b) in enumerate(zip(plan.grid, plan.grid[1:], strict=False)):
            c, u = score.predict(x, a.t, y=Y), score.predict(x, a.t, y=null)
            z = draws.normal(i, rows[i].s, rows[i].t) if rows else 0.0
            x = step(u.x0 + lam * (c.x0 - u.x0), u.eps, x, a, b, z)
        return x

    def ddpm(x0, eps, x, s, t, z):  # x_t = alpha_t x0 + sqrt(sigma_t^2 - v) eps + sqrt(v) z, v the posterior variance
        v = t.sigma**2 / s.sigma**2 * (s.sigma**2 - (s.alpha / t.alpha) ** 2 * t.sigma**2)
        return t.alpha * x0 + math.sqrt(t.sigma**2 - v) * eps + math.sqrt(v) * z

    def ancestral(x0, eps, x, s, t, z):  # ComfyUI's euler_ancestral_cfg_pp in x / alpha
        a, b = s.sigma / s.alpha, t.sigma / t.alpha
        up = min(b, math.sqrt(b**2 * (a**2 - b**2) / a**2))
        down = math.sqrt(b**2 - up**2)
        return t.alpha * (x0 + down * eps + up * z)

    def euler(x0, eps, x, s, t, z):  # in t: the unconditional step, and alpha_t times what x0 moved by
        plain = (x - s.sigma * eps) / s.alpha
        return x + (t.t - s.t) * (s.dalpha * plain + s.dsigma * eps) + t.alpha * (x0 - plain)

    close(run("ddpm"), by_hand(ddpm, "ddpm"), 1e-10)
    close(run("euler_ancestral", 1.0), by_hand(ancestral, "euler_ancestral", 1.0), 1e-10)
    close(run("euler"), by_hand(euler, "euler"), 1e-10)
    close(run("edm_euler"), run("ddim"), 1e-10)
    for name in ("dpmpp_2m", "heun", "edm_heun", "dpmpp_2s", "unipc_2", "pc_ddpm_underdamped", "rk4"):
        with pytest.raises(InputError, match="which eps renoises"):
            cfg_pp(trace(name, path, times), lam)
    for bad in (math.nan, "0.5", True):
        with pytest.raises(InputError, match="lam"):
            cfg_pp(trace("ddim", path, times), bad)
    back = trace("ddim", path, times.flip(0))  # inversion: the same formula
    s = X
    for a, b in zip(back.times, back.times[1:], strict=False):
        c, u = score.predict(s, a, y=Y), score.predict(s, a, y=null)
        s = float(path.alpha(b)) * (u.x0 + lam * (c.x0 - u.x0)) + float(path.sigma(b)) * u.eps
    close(back.run(cfg(score, cfg_pp(back, lam)), X, conditions={"y": Y}), s, 1e-9)


# --- counts and budgets -----------------------------------------------------------------------------------------------

NAMES = ["ddim", "dpmpp_2m", "edm_heun", "dpm_fast", "euler_ancestral"]


class Counted:
    """A smooth elementwise network that counts its calls and rows."""

    def __init__(self):
        self.calls = self.rows = 0

    def __call__(self, x, t, y):
        self.calls += 1
        self.rows += len(x)
        return x / (x * x + 1.0) * (0.8 + 0.3 * y[:, None]) + 0.1 * t[:, None]


@pytest.mark.parametrize("guide", GUIDED)
def test_budgets_hold_and_counts_are_the_networks(guide):
    path = VP()
    for name in NAMES:
        for budget in (3, 7, 10):
            network = Counted()
            guided = GUIDED[guide](Score(network, path, "v"))
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always", BudgetWarning)
                try:
                    out = sample(guided, x=X, solver=name, nfe=budget, conditions={"y": Y}, seed=1)
                except InputError:
                    out = None
            if out is None:  # not even a step of a lower order
                assert (guide, budget) == ("perpendicular", 3) or budget == 3 < guided.calls() * SOLVERS[name].solver.stages
                assert not network.calls
                continue
            assert out.nfe == network.calls <= budget, (name, budget)
            assert out.net_evals * len(X) == network.rows
            if name == "dpm_fast":  # a schedule made for the budget
                assert not seen
                assert guide in ("interval", "by_time", "two_rows") or budget - out.nfe < guided.calls()
                continue
            if seen:  # a lower order
                continue
            cost = [
                sum(map(guided.calls, trace(name, path, GRIDS["log_snr"](path, n)).knots))
                for n in (len(out.times) - 1, len(out.times))
            ]
            assert cost[0] == out.nfe
            assert cost[1] > budget, (name, budget)  # another step would not fit


@pytest.mark.parametrize("guide", ["interval", "perpendicular"])
def test_solvers_without_a_table_keep_the_budget_too(guide):
    path = VP()
    for name in ("dpm_adaptive", "dopri5", "torchsde_euler", "torchsde_adaptive", "torchsde_srk", "pc_ddpm"):
        for budget in (8, 9, 100):
            network = Counted()
            guided = GUIDED[guide](Score(network, path, "v"))
            try:
                out = sample(guided, x=X[:2], solver=name, nfe=budget, start=0.5, stop=0.2, conditions={"y": Y[:2]}, seed=1)
            except StepLimitError:
                assert budget < 100 or name == "torchsde_adaptive"
                assert budget - guided.calls() < network.calls <= budget
                continue
            assert 0 < out.nfe == network.calls <= budget
            assert out.net_evals * 2 == network.rows


def test_a_budget_below_one_evaluation_is_refused():
    for name in ("ddim", "dpmpp_2m", "edm_heun", "dpm_solver_3"):
        network = Counted()
        guided = cfg(Score(network, VP(), "v"), 2.0, batched=False)
        with pytest.raises(InputError, match="nfe=1"):
            sample(guided, x=X, solver=name, nfe=1, conditions={"y": Y})
        assert not network.calls
    with pytest.warns(BudgetWarning, match="costs 4 network calls"):
        assert sample(guided, x=X, solver="edm_heun", nfe=3, stop=0.01, conditions={"y": Y}).nfe == 2


def test_the_most_calls_are_known_without_a_knot():
    score, _ = labelled(VP())
    check = FiniteCheck(cfg(score, 2.0, batched=False), "ddim", 3)
    assert check.calls() == check.calls(VP().knot(0.5)) == 2
    k = VP().knot(0.5)
    assert [s.calls() for s in (score, cfg(score, 1.0), cfg(score, 2.0, batched=False))] == [1, 1, 2]
    inner = cfg(score, 2.0, batched=False)
    double = guidance.autoguidance(inner, score, 3.0)
    assert double.calls() == double.calls(k) == 3
    assert guidance.static_threshold(double).calls(k) == 3
    assert guidance.classifier(double, lambda x, t: x.sum(1)).calls(k) == 3
    assert cfg(inner, 2.0).calls(k) == 2
    timed = cfg(score, lambda t: float(t > 0.4), batched=False)
    low, high = VP().knot(0.2), VP().knot(0.6)
    assert (timed.calls(low), timed.calls(high), timed.calls(low, high)) == (1, 1, 2)


def test_a_batched_guidance_of_a_guidance_counts_all_samples():
    score, network = labelled(VP(), "v")
    inner = guidance.autoguidance(score, Score(network, VP(), "v"), 2.0)
    guided = cfg(inner, 3.0)
    tally = Tally()
    out = guided.at([VP().knot(0.4)], X, {"y": Y}, tally)[0](X)
    assert (tally.nfe, tally.net_evals, network.calls, network.rows) == (2, 4, 2, 20)
    close(out, raw(cfg(score, 3.0), X, 0.4, y=Y), 1e-12)


# --- everywhere that a score goes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guide", "predicts"), [*((g, "v") for g in GUIDED), ("cfg", "eps"), ("apg", "eps"), ("nested", "eps")]
)
def test_a_time_a_sample_is_the_same_as_one_after_the_other(guide, predicts):
    path = Linear()
    score, network = labelled(path, predicts)
    guided = GUIDED[guide](score)
    times = torch.tensor([0.08, 0.3, 0.5, 0.7, 0.9], dtype=F64)
    knots = path.knots(times)
    tally = Tally()
    together = guided.each(knots, X, {"y": Y}, tally)(X)
    assert tally.nfe == network.calls == guided.calls(*knots)
    pair, value = guided.predict(X, times, y=Y), guided(X, times, y=Y)
    for i, k in enumerate(knots):
        one = GUIDED[guide](score) if guide != "by_sample" else cfg(score, [0.0, 1.0, 2.0, 1.0, 3.5][i])
        x, y = X[i : i + 1], Y[i : i + 1]
        a, b = guided.row(k)
        alone = one.predict(x, k.t, y=y)
        close(together[i : i + 1], a * alone.x0 + b * alone.eps, 1e-10)
        close(pair.x0[i : i + 1], alone.x0, 1e-10)
        close(pair.eps[i : i + 1], alone.eps, 1e-10)
        close(value[i : i + 1], -alone.eps / k.sigma, 1e-10)
        if guide != "by_sample":
            c, d = one.row(k)
            close(raw(one, x, k.t, y=y), c * alone.x0 + d * alone.eps, 1e-10)
            close(one(x, k.t, y=y), -alone.eps / k.sigma, 1e-10)


@pytest.mark.parametrize("guide", GUIDED)
def test_runs_agree_whichever_way_they_are_made(guide):
    path, given_y = VP(), {"y": Y}
    guided = GUIDED[guide](Score(Counted(), path, "v"))
    assert isinstance(guided, Predictor)
    assert guided.native_dtype is torch.float32
    times = path.time([-2.0, -1.0, 0.0, 0.5, 1.5])
    for name in ("dpmpp_2m", "heun", "ddpm"):
        plan = trace(name, path, times)
        table = plan.run(guided, X, conditions=given_y, seed=3)
        marched = integrate(name, guided, X, times, conditions=given_y, seed=3, traced=False).x
        close(marched, table, 1e-9)
        assert torch.equal(table, plan.run(guided, X, conditions=given_y, seed=3))  # no state is left
    grid = GRIDS["log_snr"](path, 4, 0.9, 0.1)
    ours = encode(guided, X, solver="dpmpp_2m", steps=4, start=0.9, stop=0.1, conditions=given_y).x
    close(ours, integrate("dpmpp_2m", guided, X, grid.flip(0), conditions=given_y).x, 1e-10)
    pair, k = guided.predict(X, 0.4, y=Y), path.knot(0.4)
    drift = ProbabilityFlow(path, guided).drift(X, 0.4, y=Y)
    close(drift, k.dalpha * pair.x0 + k.dsigma * pair.eps, 1e-10)
    if guide in ("cfg_two_calls", "apg", "classifier", "dps", "by_sample"):  # the others have kinks, or are made alike
        fine = integrate("rk4", guided, X, torch.linspace(0.6, 0.2, 21, dtype=F64), conditions=given_y).x
        close(integrate("dpm_adaptive", guided, X, [0.6, 0.2], conditions=given_y).x, fine, 2e-2)
    single = sample(guided, x=X.float(), nfe=6, solver="dpmpp_2m", conditions=given_y).x
    assert single.dtype is torch.float32
    close(single.double(), sample(guided, x=X.float().double(), nfe=6, solver="dpmpp_2m", conditions=given_y).x, 2e-4)


def test_no_call_waits_for_the_host_nor_prepares_anything():
    """The functions that ``at`` made read no conditions, scales or knots again."""
    asked = []
    score, _ = labelled(VP(), "v")

    def scale(t):
        asked.append(float(t))
        return 2.0

    guided = guidance.interval(cfg(score, scale), 0.01)
    calls = guided.at(VP().knots([0.3, 0.6]), X, {"y": Y}, Tally())
    count = len(asked)
    assert count
    for call in calls:
        call(X)
    assert len(asked) == count


@pytest.mark.parametrize("guide", ["cfg", "cfg_two_calls", "apg", "pigdm", "static", "inpaint"])
def test_a_run_that_fails_is_replayed(guide):
    network = Labelled(VP(), "v")

    def failing(x, t, y):
        out = network(x, t, y)
        return torch.where((t[:, None] < 0.5) & (y[:, None] == 0), math.nan, out)

    guided = GUIDED[guide](Score(failing, VP(), "v"))
    if guide == "inpaint":  # a NaN under the mask does not matter, so in the other part
        guided = guidance.inpaint(Score(failing, VP(), "v"), torch.zeros(2, dtype=F64), MASK)
    for name in ("ddim", "dpm_adaptive"):
        with pytest.raises(NetworkError, match="non-finite network output") as caught:
            sample(guided, x=X, solver=name, nfe=400 if name == "dpm_adaptive" else 8, conditions={"y": Y}, start=0.9)
        assert caught.value.samples == (0, 3)
        assert caught.value.t < 0.5


def test_errors_of_the_network_keep_their_place():
    def broken(x, t, y):
        if float(t[0]) < 0.5:
            raise ValueError("no more")
        return x

    for batched in (True, False):
        with pytest.raises(NetworkError, match=r"ddim, step .* no more") as caught:
            sample(cfg(Score(broken, VP()), 2.0, batched=batched), x=X, solver="ddim", nfe=8, conditions={"y": Y})
        assert caught.value.step > 0


def test_ends_are_exact_or_refused():
    path = ZERO_SNR
    score, _ = labelled(path, "v")
    assert path.knot(path.T).alpha == 0.0
    c, u = (raw(score, X, path.T, y=y) for y in (Y, torch.full_like(Y, NULL)))
    assert torch.equal(raw(cfg(score, 3.0, batched=False), X, path.T, y=Y), torch.lerp(u, c, 3.0))
    close(cfg(score, 3.0).predict(X, path.T, y=Y).x0, -(u + 3.0 * (c - u)), 1e-12)
    times, given_y = [path.T, 0.7, 0.4, 0.1, 0.0], {"y": Y}
    for guide in ("cfg", "static", "apg", "rescale", "rescale_x0", "inpaint", "perpendicular"):
        out = integrate("ddim", GUIDED[guide](score), X, times, conditions=given_y).x
        close(out, GUIDED[guide](score).predict(*_before(GUIDED[guide](score), times), y=Y).x0, 1e-9)
    by_eps, _ = labelled(path, "eps")
    y = raw(cfg(by_eps, 2.0, batched=False), X, path.T, y=Y)
    assert torch.equal(cfg(by_eps, 2.0, batched=False)(X, path.T, y=Y), -y)
    for guide in ("cfg", "static", "apg", "dps"):
        with pytest.raises(PathError, match="alpha = 0"):
            integrate("ddim", GUIDED[guide](by_eps), X, times, conditions=given_y)
    knots = path.knots([path.T, path.T, 0.5, 0.4, 0.3])
    mixed = guidance.interval(guidance.apg(cfg(by_eps, 3.0)), 0.0, 50.0).each(knots, X, given_y, Tally())(X)
    close(mixed[:2], by_eps.each(knots, X, given_y, Tally())(X)[:2], 1e-14)
    at_top = guidance.classifier(by_eps, lambda x, t: -(x**2).sum(1))
    close(raw(at_top, X, path.T, y=Y), raw(by_eps, X, path.T, y=Y) + 2.0 * X, 1e-12)
    for guide in ("classifier", "dps", "pigdm"):
        with pytest.raises(PathError, match="alpha = 0"):
            integrate("ddim", GUIDED[guide](score), X, times, conditions=given_y)
        top, below = GUIDED[guide](score).at(path.knots([path.T, 0.5]), X, given_y, Tally())
        assert bool(below(X).isfinite().all())  # told where it is asked, not where it is prepared
        with pytest.raises(PathError, match="alpha = 0"):
            top(X)
        late = guidance.interval(GUIDED[guide](score), 0.0, 50.0)
        assert bool(integrate("ddim", late, X, times, conditions=given_y).x.isfinite().all())
        mixed = late.each(knots, X, given_y, Tally())(X)
        assert torch.equal(mixed[:2], score.each(knots, X, given_y, Tally())(X)[:2])
    flow, _ = labelled(Linear(), "v")
    assert torch.equal(raw(GUIDED["pigdm"](flow), X, 0.0, y=Y), raw(flow, X, 0.0, y=Y))
    close(cfg(flow, 3.0).predict(X, 0.0, y=Y).x0, X, 1e-14)
    with pytest.raises(PathError, match="sigma"):
        GUIDED["static"](flow).predict(X, 0.0, y=Y)
    with pytest.raises(PathError, match="sigma"):
        cfg(flow, 3.0)(X, 0.0, y=Y)
    with pytest.raises(PathError, match="sigma"):
        encode(GUIDED["static"](flow), X, solver="ddim", steps=4, stop=0.0, conditions={"y": Y})


def _before(score, times):
    """The state and time of the last evaluation of a run."""
    return integrate("ddim", score, X, times[:-1], conditions={"y": Y}).x, times[-2]


def test_modes_and_dtypes_are_the_networks():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2, dtype=F64)).train()

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, y):
            return self.net(x) * y[:, None]

    score = Score(Conditional(), VP(), mode="eval")
    for batched in (True, False):
        guided = cfg(score, 2.0, batched=batched)
        assert guided.native_dtype is F64
        first, second = (sample(guided, x=X, nfe=4, conditions={"y": Y}).x for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(guided(X, 0.4, y=Y), guided(X, 0.4, y=Y))
        assert net.training
    with pytest.warns(TrainModeWarning):
        sample(cfg(Score(Conditional(), VP()), 2.0), x=X, nfe=4, conditions={"y": Y})


def test_threads_share_a_guided_score():
    score, _ = labelled(VP(), "v")
    guided = guidance.dynamic_threshold(guidance.apg(cfg(score, 3.0)), 0.8, 0.4)
    with ThreadPoolExecutor(4) as pool:
        runs = list(
            pool.map(lambda seed: sample(guided, x=X, nfe=5, solver="ddpm", seed=seed % 2, conditions={"y": Y}).x, range(8))
        )
    assert all(torch.equal(run, runs[i % 2]) for i, run in enumerate(runs))
    assert not torch.equal(runs[0], runs[1])


def test_a_learned_variance_is_that_of_the_guided_network():
    """With guided-diffusion's ancestral sampler, whose usual run is guided and clipped."""
    path = Tabulated.linear(50)
    seen = []

    def network(x, t, y):
        seen.append(len(x))
        return torch.cat([torch.tanh(x) * (1 + y[:, None, None]), torch.cos(3 * x + y[:, None, None])], 1)

    score = Score(network, path, "eps", split="learned_var")
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = torch.tensor([0, 1, 1])
    knot = path.knot(0.4)
    for make in (
        lambda: guidance.classifier_free(score, 2.0, unconditional={"y": 3}),
        lambda: guidance.classifier_free(score, 2.0, unconditional={"y": 3}, batched=False),
        lambda: guidance.static_threshold(guidance.classifier_free(score, 2.0, unconditional={"y": 3})),
        lambda: guidance.classifier(score, lambda x, t: -(x**2).flatten(1).sum(1)),
        lambda: guidance.dps(score, lambda x0: -(x0**2).flatten(1).sum(1)),
        lambda: guidance.autoguidance(score, Score(lambda x, t, y: x, path), 2.0),
    ):
        guided = make()
        with torch.no_grad():
            out, v = guided.with_variance([knot], x, {"y": y}, Tally())[0](x)
            assert torch.equal(out, raw(guided, x, 0.4, y=y))
        assert torch.equal(v, torch.cos(3 * x + y[:, None, None]))
        assert not v.requires_grad
        run = integrate(LearnedVariance(), guided, x, [0.8, 0.6, 0.4, 0.2], conditions={"y": y}, seed=1)
        assert run.nfe == 3 * guided.calls(knot)
        assert bool(run.x.isfinite().all())
    with pytest.raises(InputError, match="no learned variance"):
        integrate(LearnedVariance(), guidance.static_threshold(Score(lambda x, t: x, path)), x, [0.8, 0.6])


# --- bad input --------------------------------------------------------------------------------------------------------


def bad_inputs():
    score, _ = labelled(VP())
    other, _ = labelled(EDM())
    loglik = lambda x0: x0.sum(1)  # noqa: E731
    guided = cfg(score, 2.0)
    one = torch.zeros(1, 1, dtype=F64)
    return {
        "network": (lambda: cfg(lambda x, t: x, 2.0), "score is a function"),
        "class": (lambda: guidance.static_threshold(Score), "score is a Score"),
        "unconditional": (lambda: guidance.classifier_free(score, 2.0, unconditional=1000), "unconditional is a int"),
        "conditions": (lambda: cfg(score, 2.0, conditions=[1]), "conditions is a list"),
        "batched": (lambda: cfg(score, 2.0, batched="yes"), "batched="),
        "two networks": (lambda: guidance.classifier_free(score, 2.0, unconditional=score, batched=True), "another network"),
        "worse": (lambda: guidance.autoguidance(score, None, 2.0), "worse is a NoneType"),
        "path": (lambda: guidance.autoguidance(score, other, 2.0), "on EDM"),
        "unconditional path": (lambda: guidance.classifier_free(score, 2.0, unconditional=other), "on EDM"),
        "negatives": (lambda: guidance.perpendicular_negative(score, 2.0, unconditional={}, negative=[]), "0 weights"),
        "weights": (
            lambda: guidance.perpendicular_negative(score, 2.0, unconditional={}, negative={}, weights=[1.0, 2.0]),
            "2 weights for 1",
        ),
        "negative weight": (
            lambda: guidance.perpendicular_negative(score, 2.0, unconditional={}, negative={}, weights=-1.0),
            "weights=-1.0",
        ),
        "negative": (lambda: guidance.perpendicular_negative(score, 2.0, unconditional={}, negative=[3]), "negative is a int"),
        "phi": (lambda: guidance.rescale(guided, 1.5), "phi=1.5"),
        "phi nan": (lambda: guidance.rescale(guided, math.nan), "phi=nan"),
        "of": (lambda: guidance.rescale(guided, of="eps"), "of='eps'"),
        "rescaled": (lambda: guidance.rescale(score), "rescale takes"),
        "rescaled twice": (lambda: guidance.apg(guidance.rescale(guided)), "apg takes"),
        "eta": (lambda: guidance.apg(guided, eta=math.nan), "eta=nan"),
        "threshold": (lambda: guidance.apg(guided, threshold=0.0), "threshold=0.0"),
        "bound": (lambda: guidance.static_threshold(score, -1.0), "bound=-1.0"),
        "quantile": (lambda: guidance.dynamic_threshold(score, 99.5), "quantile=99.5"),
        "ceiling": (lambda: guidance.dynamic_threshold(score, ceiling=0.5), "ceiling=0.5"),
        "mask": (lambda: guidance.inpaint(score, X, torch.ones(5, 2)), "mask has dtype"),
        "mask kind": (lambda: guidance.inpaint(score, X, [True]), "mask is a list"),
        "mask shape": (lambda: guidance.inpaint(score, X, torch.ones(3, dtype=torch.bool)), "must broadcast"),
        "known": (lambda: guidance.inpaint(score, KNOWN, ~MASK), "not finite where mask is true"),
        "known ints": (lambda: guidance.inpaint(score, torch.ones(2, dtype=torch.long), MASK), "int64"),
        "log_prob": (lambda: guidance.classifier(score, 3.0), "log_prob is 3.0"),
        "shared": (lambda: guidance.classifier(score, loglik, shared=1), "shared=1"),
        "gradient": (lambda: guidance.classifier(score, loglik, gradient=None), "gradient=None"),
        "likelihood": (lambda: guidance.dps(score, torch.ones(3)), "log_likelihood is"),
        "operator": (lambda: guidance.pigdm(score, one, None, noise=0.1), "operator is None"),
        "matrix": (lambda: guidance.pigdm(score, one, torch.ones(3), noise=0.1), r"operator has shape \(3,\)"),
        "measurement": (lambda: guidance.pigdm(score, [0.3], ROW, noise=0.1), "measurement is"),
        "measurement nan": (lambda: guidance.pigdm(score, one / 0, ROW, noise=0.1), "measurement is not finite"),
        "noise": (lambda: guidance.pigdm(score, one, ROW, noise=-0.1), "noise=-0.1"),
        "variance": (lambda: guidance.pigdm(score, one, ROW, noise=0.1, variance=0.0), "variance=0.0"),
        "iterations": (lambda: guidance.pigdm(score, one, ROW, noise=0.1, iterations=0), "iterations=0"),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input_is_refused_at_construction(name):
    make, message = bad_inputs()[name]
    with pytest.raises(InputError, match=message):
        make()


def test_what_does_not_fit_the_state_is_refused_before_the_network_is_called():
    score, network = labelled(VP(), "v")
    one = torch.zeros(1, 1, dtype=F64)
    cases = {
        "known has shape": guidance.inpaint(score, torch.zeros(3, dtype=F64), torch.ones(3, dtype=torch.bool)),
        "mask has shape": guidance.inpaint(score, torch.zeros((), dtype=F64), torch.ones(4, 2, dtype=torch.bool)),
        r"operator has shape \(1, 3\)": guidance.pigdm(score, one, torch.ones(1, 3, dtype=F64), noise=0.1),
        r"measurement has shape \(1, 1\), but operator\(x0\) \(5, 2\)": guidance.pigdm(score, one, lambda x: x, noise=0.1),
        "not linear": guidance.pigdm(score, one, lambda x: x[:, :1].clamp(-1, 1), noise=0.1),
    }
    for message, guided in cases.items():
        with pytest.raises(InputError, match=message):
            sample(guided, x=X, nfe=4, start=0.8, conditions={"y": Y})
    assert not network.calls


def test_functions_that_cannot_guide_are_named():
    score, _ = labelled(VP(), "v")
    one = torch.zeros(1, 1, dtype=F64)
    cases = (
        (guidance.classifier(score, lambda x, t: x), r"log_prob returned .*\(5, 2\): give a floating tensor \(5,\)"),
        (guidance.classifier(score, lambda x, t: x.detach().sum(1)), "no gradient reaches x through log_prob"),
        (guidance.classifier(score, lambda x, t: 1 / 0), "log_prob raised ZeroDivisionError at t="),
        (guidance.classifier(score, lambda x, t: x.sum(1), gradient=True), r"give a floating tensor \(5, 2\)"),
        (guidance.dps(score, lambda x0: None), "log_likelihood returned None"),
        (guidance.dps(score, lambda x0: x0.detach().sum(1)), "no gradient reaches x through log_likelihood"),
        (guidance.pigdm(score, one, lambda x: x.sum(), noise=0.1), "give a tensor of 5 rows"),
        (guidance.pigdm(score, one, lambda x: x @ 3, noise=0.1), "operator raised TypeError"),
        (guidance.pigdm(score, one, lambda x: x.detach()[:, :1], noise=0.1), "no gradient reaches x through operator"),
    )
    for guided, message in cases:
        with pytest.raises(NetworkError, match=message):
            sample(guided, x=X, nfe=4, start=0.8, conditions={"y": Y})
    blind = Score(lambda x, t: 0.5 * x.detach(), VP(), "x0")
    with pytest.raises(NetworkError, match="no gradient reaches x through the network"):
        sample(guidance.dps(blind, lambda x0: x0.sum(1)), x=X, nfe=4, start=0.8)
