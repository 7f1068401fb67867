"""Step control per sample: batch independence to the bit, tolerances kept, calls counted, and the published controller."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.truth import Mixture1D
from scores import Gaussian, GaussianMixture, Score
from sde import EDM, VP, Cosine, Linear, SubVP
from sde.errors import InputError, NetworkError, PathError, StepLimitError
from sde.noise import White
from sde.prediction import Knot, Predictor, Tally
from solvers import encode, integrate, sample
from solvers.adaptive import CLOCKS, Adaptive, Pair, knots_at, sum_of_rows, trace_steps
from solvers.backends import TorchDiffEq
from solvers.exponential import Multistep
from solvers.exponential_rk import ExponentialRK
from solvers.exponential_tableaux import three_stage, two_stage
from solvers.runge_kutta import RungeKutta
from solvers.stochastic import EulerMaruyama
from solvers.tableaux import BOSH3, DOPRI5, HEUN, TSIT5, Tableau

PATHS = {"VP": VP(), "EDM": EDM(), "Linear": Linear(), "Cosine": Cosine()}


def embedded(tableau: Tableau, variable: str = "t") -> Pair:
    return Pair(RungeKutta(tableau, variable), RungeKutta(tableau.embedded, variable))


DPM_12 = Pair(ExponentialRK(two_stage(0.5, exact=False), "eps"), Multistep(1, "eps"))
DPM_23 = Pair(ExponentialRK(three_stage(), "eps"), ExponentialRK(two_stage(1 / 3, exact=False), "eps"))
PAIRS = {"heun": embedded(HEUN), "bosh3": embedded(BOSH3), "dopri5": embedded(DOPRI5), "tsit5_rho": embedded(TSIT5, "rho")}
PAIRS |= {"dpm_12": DPM_12, "dpm_23": DPM_23}


def elementwise(x, t):
    """Rows do not depend on one another to the bit, and each depends on its own time."""
    t = t.reshape(-1, *(1,) * (x.dim() - 1))
    return x / (x * x + 1.0) * 0.8 + 0.1 * t


class Spy:
    def __init__(self, network=elementwise):
        self.network, self.calls, self.batches = network, [], []

    def __call__(self, x, t):
        self.calls.append(t.tolist())
        self.batches.append(x.clone())
        return self.network(x, t)


def start(n, shape=(3,), dtype=torch.float64):
    """Samples of very different sizes, so that they want different steps."""
    x = White(1).initial((n, *shape), dtype)
    return x * torch.logspace(-1.0, 1.0, n, dtype=dtype).reshape(-1, *(1,) * len(shape))


# --- independence of the batch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", ["bosh3", "dopri5", "dpm_23"])
def test_a_sample_does_not_depend_on_its_batch_to_the_bit(name, dtype):
    score = Score(elementwise, VP(), "x0")
    solver = Adaptive(PAIRS[name], rtol=1e-3, atol=1e-3)
    for shape in ((3,), (2, 3, 3)):
        x = start(7, shape, dtype)
        whole = integrate(solver, score, x, [1.0, 1e-3])
        order = [3, 0, 6, 5, 1, 4, 2]
        assert torch.equal(integrate(solver, score, x[order], [1.0, 1e-3]).x, whole.x[order])
        alone = [integrate(solver, score, x[i : i + 1], [1.0, 1e-3]) for i in range(7)]
        assert torch.equal(torch.cat([a.x for a in alone]), whole.x)
        assert sum(a.accepted for a in alone) == whole.accepted
        assert sum(a.rejected for a in alone) == whole.rejected
        assert len({a.accepted + a.rejected for a in alone}) > 1  # their steps are not the same
        # the calls of the slowest, and at most one more a rejected step, whose first evaluation others have not kept
        most = max(a.nfe for a in alone)
        assert most <= whole.nfe <= most + whole.rejected


@pytest.mark.parametrize("path", [VP(), SubVP(), Cosine()], ids=str)
def test_knots_do_not_depend_on_those_asked_for_beside_them(path):
    times = torch.linspace(0.05, 0.9, 61, dtype=torch.float64).tolist()
    asks = [("t", t) for t in times] + [("lam", k.lam) for k in path.knots(times)]
    together = knots_at(path, asks)
    assert together == [knots_at(path, [ask])[0] for ask in asks]
    assert together[::-1] == knots_at(path, asks[::-1])
    for (kind, value), k in zip(asks, together, strict=True):
        assert math.isclose(k.t if kind == "t" else k.lam, value, rel_tol=1e-7, abs_tol=1e-7)
        assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(k[:7], path.knot(k.t)[:7], strict=True))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 64, 1001])
def test_sums_of_rows(n):
    v = torch.rand(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sum_of_rows(v), v.sum(1), rtol=1e-14, atol=0.0)
    assert all(torch.equal(sum_of_rows(v[i : i + 1]), sum_of_rows(v)[i : i + 1]) for i in range(5))


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", PATHS)
@pytest.mark.parametrize("name", ["bosh3", "dopri5", "dpm_23"])
def test_every_sample_keeps_the_tolerance_on_a_mixture_from_noise_to_data(name, label):
    path = PATHS[label]
    mixture = Mixture1D(path)
    s, t = path.knots([0.999 if float(path.alpha(path.T)) == 0.0 else path.T, path.t_min])
    x = mixture.score.sample(16, t=s.t, seed=4).double()
    exact = mixture.flow(x[:, 0], s, t)[:, None]
    for tolerance in (1e-3, 1e-5):
        out = integrate(Adaptive(PAIRS[name], rtol=tolerance, atol=tolerance), mixture.score, x, [s.t, t.t])
        assert float((out.x - exact).abs().max()) <= 10.0 * tolerance
        assert out.nfe < (500 if tolerance == 1e-5 else 100)


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_keeps_the_tolerance_on_gaussian_data_both_ways(name):
    path = VP()
    score = Gaussian(path, torch.tensor([0.5, -1.0], dtype=torch.float64), var=torch.tensor([0.04, 1.0]).double())
    ends = path.time([-1.0, 3.0]).tolist()
    x = score.sample(5, t=ends[0], seed=1).double()
    exact = score.flow(x, *ends)
    solver = Adaptive(PAIRS[name], rtol=1e-4, atol=1e-4)
    assert float((integrate(solver, score, x, ends).x - exact).abs().max()) <= 1e-3
    back = encode(score, exact, solver=solver, nfe=2000, start=ends[0], stop=ends[1])
    assert float((back.x - x).abs().max()) <= 2e-2  # the way back expands: by sigma ratios of about ten


def test_a_hard_sample_among_easy_ones_keeps_its_tolerance_where_a_shared_step_does_not():
    """300 samples on their way to a wide component and one to a narrow one, whose flow turns late and sharply."""
    path = Linear()
    score = GaussianMixture(path, [0.5, 0.5], torch.tensor([[-3.0], [3.0]]), torch.tensor([1.0, 1e-4]))
    s, t = path.knots([0.8, 0.001])
    x = torch.cat([torch.linspace(-2.6, -2.2, 300, dtype=torch.float64)[:, None], torch.full((1, 1), 1.1, dtype=torch.float64)])
    tolerance = 1e-4
    tight = integrate(TorchDiffEq("dopri8", rtol=1e-11, atol=1e-11), score, x[-1:], [s.t, t.t]).x
    mine = integrate(Adaptive(embedded(BOSH3), rtol=tolerance, atol=tolerance), score, x, [s.t, t.t]).x[-1:]
    shared = integrate(TorchDiffEq("bosh3", rtol=tolerance, atol=tolerance), score, x, [s.t, t.t]).x[-1:]
    assert float((mine - tight).abs()) <= 10.0 * tolerance
    assert float((shared - tight).abs()) > 10.0 * tolerance


def test_the_same_flow_as_torchdiffeq_at_tight_tolerance():
    path = VP()
    score = Score(elementwise, path, "x0")
    x = start(4)
    ours = integrate(Adaptive(embedded(DOPRI5), rtol=1e-10, atol=1e-10), score, x, [0.9, 0.01])
    theirs = integrate(TorchDiffEq("dopri5", rtol=1e-11, atol=1e-11), score, x, [0.9, 0.01])
    assert float((ours.x - theirs.x).abs().max()) <= 1e-8


def test_ends_are_hit_exactly_and_a_span_of_one_step_works():
    spy = Spy()
    out = integrate(Adaptive(embedded(BOSH3), first=1.0), Score(spy, VP(), "x0"), start(2), [0.5, 0.499])
    assert out.accepted == 2
    assert out.rejected == 0
    assert spy.calls[-1] == [0.499, 0.499]


@pytest.mark.parametrize("clock", CLOCKS)
def test_clocks_invert(clock):
    position, ask = CLOCKS[clock]
    for path in PATHS.values():
        for k in path.knots([0.03 * path.T, 0.4 * path.T, 0.9 * path.T]):
            assert math.isclose(knots_at(path, [ask(position(k))])[0].t, k.t, rel_tol=1e-7)
    for a, b in zip(*(VP().knots(t) for t in ([0.9, 0.5, 0.1], [0.5, 0.1, 0.01])), strict=True):
        assert (position(a) < position(b)) == (clock in ("lam", "soft"))


def test_exponential_pairs_in_a_clock_of_the_noise_level_do_not_see_the_path():
    solver = Adaptive(DPM_23, rtol=1e-4, atol=1e-4)
    assert solver.invariant
    assert not replace(solver, clock="t").invariant
    assert not replace(solver, unit=False).invariant
    assert not Adaptive(embedded(BOSH3)).invariant
    y, ends = start(3) * math.exp(1.0), []
    for path in (VP(), EDM(), Linear()):
        s, t = path.knots(path.time([-2.0, 3.0]).tolist())
        mixture = GaussianMixture(
            path, [0.4, 0.6], torch.tensor([[1.0, 0.5, -0.3], [-0.8, 0.1, 0.9]]), torch.tensor([0.3, 0.2])
        )
        out = integrate(solver, mixture, s.alpha * y, [s.t, t.t])
        ends.append((out.x / t.alpha, out.accepted, out.rejected))
    for x, accepted, rejected in ends[1:]:
        assert (accepted, rejected) == ends[0][1:]
        assert torch.allclose(x, ends[0][0], rtol=0.0, atol=1e-7)


# --- calls and limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_calls_are_those_of_the_network_on_the_whole_batch(name):
    spy = Spy()
    out = integrate(Adaptive(PAIRS[name]), Score(spy, VP(), "x0"), start(5), [0.9, 0.05])
    assert out.nfe == out.net_evals == len(spy.calls)
    assert all(len(times) == 5 for times in spy.calls)
    assert any(len(set(times)) == 5 for times in spy.calls)  # a time a sample


def test_a_pair_shares_its_calls_and_keeps_first_evaluations():
    """Alone, an FSAL pair costs its stages less one a step, rejected or not; another saves its first call when rejected."""
    score = Score(elementwise, VP(), "x0")
    x = 30.0 * start(1)
    for pair, stages, fsal in ((embedded(BOSH3), 4, True), (embedded(DOPRI5), 7, True), (DPM_23, 3, False), (DPM_12, 2, False)):
        out = integrate(Adaptive(pair, first=0.3, rtol=1e-5, atol=1e-5), score, x, [0.9, 0.01])
        assert out.rejected > 0
        if fsal:
            assert out.nfe == 1 + (stages - 1) * (out.accepted + out.rejected)
        else:
            assert out.nfe == stages * out.accepted + (stages - 1) * out.rejected


@pytest.mark.parametrize("name", PAIRS)
def test_the_bound_on_calls_is_kept_and_tells_what_was_reached(name):
    for budget in (1, 2, 9, 20):
        spy = Spy(lambda x, t: torch.sin(300.0 * x))
        with pytest.raises(StepLimitError, match=f"max_nfe={budget} network calls used at t = ") as caught:
            sample(Score(spy, VP(), "x0"), (3, 2), solver=Adaptive(PAIRS[name], rtol=1e-6, atol=1e-6), nfe=budget)
        assert len(spy.calls) == budget
        assert caught.value.partial.shape == (3, 2)
        assert 0.001 <= caught.value.t <= 1.0
        assert caught.value.partial.isfinite().all()
    assert caught.value.t < 1.0  # twenty calls get somewhere
    assert not torch.equal(caught.value.partial, spy.batches[0])


def test_a_sample_that_has_arrived_stays_as_it_is():
    """The easy sample arrives first; the network sees it again at times where it has seen it, and it is not changed."""
    path, spy = VP(), Spy()
    x = torch.tensor([[1e-3], [40.0]], dtype=torch.float64)
    solver = Adaptive(embedded(BOSH3), rtol=1e-4, atol=1e-6)
    out = integrate(solver, Score(spy, path, "x0"), x, [0.9, 0.01])
    alone = [integrate(solver, Score(elementwise, path, "x0"), x[i : i + 1], [0.9, 0.01]) for i in (0, 1)]
    assert torch.equal(out.x, torch.cat([a.x for a in alone]))
    assert alone[0].nfe != alone[1].nfe
    early = 0 if alone[0].nfe < alone[1].nfe else 1
    last = spy.calls[-1][early]
    assert last in [times[early] for times in spy.calls[: alone[early].nfe]]
    assert 0.01 < last < 0.9
    with pytest.raises(StepLimitError) as caught:  # tells where the slow one is, and keeps what the other one has reached
        integrate(replace(solver, max_nfe=alone[early].nfe + 4), Score(elementwise, path, "x0"), x, [0.9, 0.01])
    assert 0.01 < caught.value.t < 0.9
    assert torch.equal(caught.value.partial[early], alone[early].x[0])


def test_the_network_may_reuse_its_output():
    buffer = torch.empty(3, 3, dtype=torch.float64)

    def reusing(x, t):
        return buffer.copy_(elementwise(x, t))

    for pair in PAIRS.values():
        own = integrate(Adaptive(pair), Score(reusing, VP(), "x0"), start(3), [0.9, 0.1]).x
        assert torch.equal(own, integrate(Adaptive(pair), Score(elementwise, VP(), "x0"), start(3), [0.9, 0.1]).x)


def test_conditions_and_gradients_pass_through():
    path = VP()
    score = Score(lambda x, t, shift: 0.5 * x / (1.0 + x * x) + shift[:, None], path, "x0")
    x = start(4).requires_grad_()
    shift = torch.linspace(0.0, 1.0, 4, dtype=torch.float64)
    solver = Adaptive(embedded(BOSH3), rtol=1e-7, atol=1e-7)

    def run(x, grad=False):
        return integrate(solver, score, x, [0.5, 0.2], conditions={"shift": shift}, grad=grad).x

    (slope,) = torch.autograd.grad(run(x, True).sum(), x)
    step = 1e-4 * torch.ones_like(x)
    with torch.no_grad():
        central = (run(x + step) - run(x - step)) / 2e-4
    assert float((slope - central).abs().max()) <= 1e-4 * float(slope.abs().max())
    assert not run(x).requires_grad


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_one_error(value):
    def bad(x, t):
        y = elementwise(x, t)
        y[2] = torch.where(t[2] < 0.4, value, y[2])
        return y

    with pytest.raises(NetworkError, match=r"non-finite network output.*1 of 4 samples \(first: 2\)") as caught:
        integrate(Adaptive(embedded(BOSH3)), Score(bad, VP(), "x0"), start(4), [0.9, 0.1])
    assert caught.value.samples == (2,)
    assert 0.1 <= caught.value.t < 0.4
    assert caught.value.step is not None
    assert len(str(caught.value)) < 400


def test_a_step_that_overflows_is_a_step_too_long():
    """A stiff field of states not far below the largest of float32: the stages of long steps overflow, those of short ones
    do not.
    """
    seen = []

    def explosive(x, t):
        seen.append(x.isfinite().all())
        return (-40.0 * x).clamp(-3e38, 3e38)

    x = torch.full((2, 1), 1e36)
    out = integrate(Adaptive(embedded(BOSH3), first=1.0), Score(explosive, VP(), "score"), x, [0.999, 0.5])
    assert not all(seen)
    assert out.rejected > 0
    assert out.x.isfinite().all()


def test_a_field_too_steep_for_any_step():
    def jump(x, t):  # constant on either side, where any step will do
        return torch.where(t[:, None] > 0.5, 1e8, -1e8) * torch.ones_like(x)

    with pytest.raises(StepLimitError, match=r"the step size vanished at t = 0\.5 \(sample [01]\)") as caught:
        integrate(Adaptive(embedded(BOSH3), rtol=1e-18, atol=1e-12), Score(jump, Linear(), "velocity"), start(2), [0.9, 0.1])
    assert caught.value.partial.isfinite().all()
    assert caught.value.rejected > 0


def test_a_network_that_raises_keeps_its_time():
    def broken(x, t):
        if float(t[0]) < 0.5:
            raise KeyError("mine")
        return 0.5 * x

    with pytest.raises(NetworkError, match="KeyError") as caught:
        integrate(Adaptive(embedded(BOSH3)), Score(broken, VP(), "x0"), start(2), [0.9, 0.1])
    assert caught.value.t < 0.5
    assert caught.value.step > 0


def test_starts_and_ends_that_a_pair_cannot_reach_are_refused_before_any_call():
    spy = Spy()
    for solver, path, times, says in (
        (Adaptive(embedded(BOSH3), clock="lam"), Linear(), [1.0, 0.1], "lam is infinite at t = 1"),
        (Adaptive(embedded(BOSH3), clock="rho"), Linear(), [1.0, 0.1], "rho is infinite at t = 1"),
        (Adaptive(DPM_23), Linear(), [1.0, 0.1], "alpha"),
        (Adaptive(DPM_23), VP(), [1.0, 0.0], "no error estimate"),
        (Adaptive(embedded(DOPRI5)), VP(), [1.0, 0.0], "no error estimate"),
    ):
        with pytest.raises(PathError, match=says):
            integrate(solver, Score(spy, path, "velocity"), start(2), times)
    assert not spy.calls
    out = integrate(Adaptive(embedded(BOSH3)), Score(elementwise, Linear(), "velocity"), start(2), [1.0, 0.0])
    assert out.x.isfinite().all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Pair(RungeKutta(HEUN), RungeKutta(HEUN)), "same solver"),
        (lambda: Pair(RungeKutta(HEUN), "euler"), "low='euler'"),
        (lambda: Pair(TorchDiffEq("bosh3"), RungeKutta(HEUN)), "high="),
        (lambda: Adaptive(RungeKutta(HEUN)), "pair is a RungeKutta"),
        (lambda: Adaptive(DPM_23, clock="sigma"), "clock='sigma'"),
        (lambda: Adaptive(DPM_23, rtol=0.0), "rtol=0.0"),
        (lambda: Adaptive(DPM_23, atol=-1.0), "atol=-1.0"),
        (lambda: Adaptive(DPM_23, max_nfe=0), "max_nfe=0"),
        (lambda: Adaptive(DPM_23, accept=0.0), "accept=0.0"),
        (lambda: Adaptive(DPM_23, first=1.5), "first=1.5"),
        (lambda: Adaptive(DPM_23, unit=1), "unit=1"),
        (lambda: Adaptive(DPM_23, icoeff=-1.0), "pcoeff, icoeff, dcoeff"),
    ],
)
def test_bad_arguments(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_a_pair_may_hold_solvers_of_the_reverse_sde_without_their_noise():
    pair = Pair(RungeKutta(HEUN), EulerMaruyama())
    out = integrate(Adaptive(pair), Score(elementwise, VP(), "x0"), start(2), [0.9, 0.1])
    same = integrate(Adaptive(embedded(HEUN)), Score(elementwise, VP(), "x0"), start(2), [0.9, 0.1])
    assert torch.allclose(out.x, same.x, rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="noise level"):
        sample(Score(elementwise, VP(), "x0"), (2, 2), solver=Adaptive(pair), nfe=50, eta=1.0)


# --- tracing and the network at a time a sample -----------------------------------------------------------------------


def test_a_traced_step_is_the_step():
    """The stacked coefficients, executed by hand on one sample, give both solvers' own steps."""
    for label, path in PATHS.items():
        mixture = Mixture1D(path).score
        s, t = path.knots(path.time([-0.5, 0.4]).tolist())
        x = torch.tensor([[0.7]], dtype=torch.float64)
        for name, pair in PAIRS.items():
            (trial,) = trace_steps(pair, path, mixture.row, [(s, t)])
            registers = [x]

            def value(form, registers=registers):
                return sum(float(c) * y for c, y in zip(form, registers, strict=False))

            for state, knot in zip(trial.states, trial.knots, strict=True):
                registers.append(mixture.at([knot], x, {}, Tally())[0](value(state)))
            high = integrate(pair.high, mixture, x, [s.t, t.t]).x
            low = integrate(pair.low, mixture, x, [s.t, t.t]).x
            assert float((value(trial.high) - high).abs()) <= 1e-12, (label, name)
            assert float((value(trial.error) - (high - low)).abs()) <= 1e-12, (label, name)


class Plain(Predictor):
    """A predictor with the abstract methods only."""

    def __init__(self, score):
        self.score, self.path = score, score.path

    def row(self, knot):
        return self.score.row(knot)

    def at(self, knots, x, conditions, tally):
        return self.score.at(knots, x, conditions, tally)

    def predict(self, x, t, **conditions):
        return self.score.predict(x, t, **conditions)

    def __call__(self, x, t, **conditions):
        return self.score(x, t, **conditions)


def test_a_time_a_sample_is_the_same_as_one_after_the_other():
    for path in PATHS.values():
        knots = path.knots([0.05 * path.T, 0.3 * path.T, 0.9 * path.T])
        x = start(3)
        law = Gaussian(path, torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), var=0.3)
        scaled = Score(
            lambda x, t: torch.tanh(x) * t[:, None], path, "v", label=lambda t: 10.0 * t, scale=lambda t: 1.0 / (1.0 + t)
        )
        for score in (law, scaled, Plain(law), Plain(scaled), Mixture1D(path).score):
            x = x[:, :1] if isinstance(score, GaussianMixture) else x
            tally = Tally()
            together = score.each(knots, x, {}, tally)(x)
            single = torch.cat([score.at([k], x[i : i + 1], {}, Tally())[0](x[i : i + 1]) for i, k in enumerate(knots)])
            assert torch.allclose(together, single, rtol=1e-9, atol=1e-12)
            assert tally.nfe == tally.net_evals == 1


def test_labels_that_are_not_finite_are_told_when_called():
    score = Score(lambda x, t: x, Linear(), "velocity", label=torch.log)
    call = score.each(Linear().knots([0.5, 0.0]), start(2), {}, Tally())
    with pytest.raises(PathError, match=r"label\(0\) = -inf"):
        call(start(2))


# --- the controller ---------------------------------------------------------------------------------------------------


def test_the_factor_of_a_step():
    """A PID controller written out for order 3 gains: F = (1/E)^((P+I+D)/3) (1/E')^(-(P+2D)/3) (1/E'')^(D/3)."""
    plain = Adaptive(DPM_23)
    assert DPM_23.order == 3.0
    for error in (1e-9, 1e-3, 0.5, 1.0, 8.0, 1e9):
        factor, inverse = plain.factor(error, None)
        assert math.isclose(factor, 1.0 + math.atan((error + 1e-8) ** (-1 / 3) - 1.0), rel_tol=1e-12)
        assert math.isclose(inverse, 1.0 / (error + 1e-8), rel_tol=1e-12)
    assert plain.factor(math.inf, None) == (1.0 - math.pi / 4, 0.0)
    pid = Adaptive(DPM_23, pcoeff=0.3, icoeff=0.4, dcoeff=0.2)
    one, two = 1.0 / 0.7, 1.0 / 1.6
    product = (1.0 / (0.5 + 1e-8)) ** 0.3 * one ** (-0.7 / 3) * two ** (0.2 / 3)
    assert math.isclose(pid.factor(0.5, (one, two))[0], 1.0 + math.atan(product - 1.0), rel_tol=1e-12)
    assert pid.factor(math.inf, None)[1] == 0.0


def k_diffusion_adaptive(denoise, x, sigmas, order, rtol, atol, h_init, unit_previous, coefficients=(0.0, 1.0, 0.0)):
    """DPM-Solver-12 and -23 with a PID controller as k-diffusion's sample_dpm_adaptive does it (eta = 0), in lambda = -log
    sigma on x = x0 + sigma eps: (x, accepted, rejected, calls).

    Its x_prev is the low solution of the last accepted step; ``unit_previous`` takes the state itself.
    """
    calls = 0

    def eps(x, lam):
        nonlocal calls
        calls += 1
        return (x - denoise(x, math.exp(-lam))) * math.exp(lam)

    def one(x, s, t, e):
        return x - math.exp(-t) * math.expm1(t - s) * e

    def two(x, s, t, e, r):
        e1 = eps(one(x, s, s + r * (t - s), e), s + r * (t - s))
        return one(x, s, t, e) - math.exp(-t) / (2 * r) * math.expm1(t - s) * (e1 - e), e1

    def three(x, s, t, e, e1, r1=1 / 3, r2=2 / 3):
        h, middle = t - s, s + r2 * (t - s)
        u2 = one(x, s, middle, e) - math.exp(-middle) * (r2 / r1) * (math.expm1(r2 * h) / (r2 * h) - 1) * (e1 - e)
        return one(x, s, t, e) - math.exp(-t) / r2 * (math.expm1(h) / h - 1) * (eps(u2, middle) - e)

    p, i, d = coefficients
    powers = (p + i + d) / order, -(p + 2 * d) / order, d / order
    s, end, h, previous, history = -math.log(sigmas[0]), -math.log(sigmas[1]), h_init, x, None
    accepted = rejected = 0
    while s < end - 1e-5:
        t = min(end, s + h)
        e = eps(x, s)
        if order == 2:
            low = one(x, s, t, e)
            high, _ = two(x, s, t, e, 0.5)
        else:
            low, e1 = two(x, s, t, e, 1 / 3)
            high = three(x, s, t, e, e1)
        delta = torch.maximum(torch.full_like(x, atol), rtol * torch.maximum(low.abs(), previous.abs()))
        error = float(((low - high) / delta).square().mean().sqrt())
        inverse = 1.0 / (error + 1e-8)
        history = [inverse] * 3 if history is None else [inverse, *history[1:]]
        factor = 1.0 + math.atan(math.prod(v**w for v, w in zip(history, powers, strict=True)) - 1.0)
        if factor >= 0.81:
            history = [history[0], history[0], history[1]]
            previous, x, s = (high if unit_previous else low), high, t
            accepted += 1
        else:
            rejected += 1
        h *= factor
    return x, accepted, rejected, calls


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("coefficients", [(0.0, 1.0, 0.0), (0.2, 0.5, 0.1)], ids=["I", "PID"])
@pytest.mark.parametrize("top", [40.0, 0.4])  # states that shrink all the way, and states that grow
def test_k_diffusions_dpm_adaptive(order, coefficients, top):
    """The same accepted steps and result, at its own tolerances, but for two things: it measures |x| by the low solution
    of the last step (x_prev), where we take the state; and it makes the first call of a rejected step again.
    """
    path = EDM()
    score = Score(lambda x, t: torch.tanh(3.0 * x) * 0.9 + 0.05 * x / (1.0 + t[:, None]), path, "x0")
    x = top * White(3).initial((1, 8), torch.float64)
    sigmas, (p, i, d) = (top, 0.02), coefficients
    way = math.log(sigmas[0] / sigmas[1])
    published = {"clock": "lam", "unit": False, "accept": 0.81, "first": 0.05 / way, "rtol": 0.05, "atol": 0.0078}
    solver = Adaptive(DPM_12 if order == 2 else DPM_23, pcoeff=p, icoeff=i, dcoeff=d, **published)
    out = integrate(solver, score, x, list(sigmas))

    def denoise(x, sigma):
        return torch.tanh(3.0 * x) * 0.9 + 0.05 * x / (1.0 + sigma)

    args = (denoise, x, sigmas, order, 0.05, 0.0078, 0.05)
    y, accepted, rejected, calls = k_diffusion_adaptive(*args, True, coefficients)
    assert (out.accepted, out.rejected) == (accepted, rejected)
    assert float((out.x - y).abs().max()) <= 1e-6
    assert out.nfe == calls - rejected
    y, accepted, _, _ = k_diffusion_adaptive(*args, False, coefficients)
    assert abs(out.accepted - accepted) <= 1
    assert float((out.x - y).abs().max()) <= 0.01


def test_times_are_asked_for_together(monkeypatch):
    """The path is asked a few times a step for the whole batch, not once a sample."""
    asked = []
    original = VP._alpha
    monkeypatch.setattr(VP, "_alpha", lambda self, t: asked.append(t.numel()) or original(self, t))
    path = VP()
    knots = path.knots([0.9 - 0.01 * i for i in range(20)])
    steps = [(k, Knot(*path.knot(k.t - 0.05))) for k in knots]
    asked.clear()
    trace_steps(embedded(DOPRI5), path, lambda k: Score(elementwise, path, "x0").row(k), steps)
    assert len(asked) <= 4
