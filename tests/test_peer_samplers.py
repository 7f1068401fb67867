"""Samplers of other libraries are what their library makes: calls counted at the network, our samples where the rule is ours,
the closed form on Gaussian data, and the exact law of their noise. Libraries that are not installed are skipped.
"""

from __future__ import annotations

import math

import pytest
import torch
from peering import CPU, F64, gaussian, line_of, need, run, states

from benchmarks import peers, problems
from benchmarks.lines import Meter, resolve_line
from benchmarks.metrics.gaussian import Exactly
from benchmarks.peers.impulses import exact_w2
from benchmarks.peers.line import PeerLine
from benchmarks.peers.network import Wrapped, knots_of
from scores import Gaussian, Score
from sde import VE, VP, Linear
from sde.errors import InputError
from solvers import GRIDS

# --- calls --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", peers.LIBRARIES)
def test_every_sampler_makes_no_more_calls_than_asked_for_and_one_step_more_would(name):
    for short, sampler in need(name).samplers.items():
        line, calls = line_of(f"{name}/{short}"), 0

        def network(x, t):
            nonlocal calls
            calls += 1
            return 0.5 * x

        x = states(2)
        before, budget = x.clone(), 2000 if sampler.adaptive else 11
        grid = (sampler.grids or ("log_snr",))[0]
        made, metered = run(line, Score(network, VP(), predicts="eps"), x, budget, grid)
        assert 0 < calls == metered <= budget, line.name
        assert made.x.shape == x.shape, line.name
        assert made.x.dtype == x.dtype, line.name
        assert bool(made.x.isfinite().all()), line.name
        assert torch.equal(x, before), f"{line.name} has changed the start noise"
        if sampler.adaptive:
            assert made.steps is None
        else:
            ends = VP().knot(VP().T), VP().knot(VP().t_min)
            assert line.trial(VP(), *ends, made.steps, grid)[0] == calls, line.name
            if "fixed" not in short:  # singlestep_fixed spends whole blocks: 11 buys as many as 10 or 9
                assert line.trial(VP(), *ends, made.steps + 1, grid)[0] > budget, line.name


def test_an_adaptive_line_is_stopped_at_the_budget():
    line = line_of("torchdiffeq/dopri5:rtol=1e-6,atol=1e-6")
    calls = 0

    def network(x, t):
        nonlocal calls
        calls += 1
        return x.sin()

    with pytest.raises(InputError, match="wants more than 20 network calls: allow more, or a looser tolerance"):
        run(line, Score(network, VP(), predicts="eps"), states(), 20)
    assert calls == 20


# --- the same rule, written twice ---------------------------------------------------------------------------------------------

#: (theirs, ours): two programs of one rule, which agree to rounding.
SAME = (
    ("k_diffusion/euler:end=stop", "ddim"),
    ("k_diffusion/heun:end=stop", "edm_heun"),
    ("k_diffusion/dpm_2:end=stop", "dpm_solver_2"),
    ("k_diffusion/lms:end=stop", "deis_rho_4"),
    ("k_diffusion/lms:order=3,end=stop", "deis_rho_3"),
    ("k_diffusion/dpmpp_2m:end=stop", "dpmpp_2m"),
    ("azula/DDIM", "ddim"),
    ("azula/Euler", "ddim"),
    ("azula/Heun", "edm_heun"),
    ("azula/zAB3", "deis_rho_3"),
    ("azula/zEAB3", "deis_lam_3"),
    ("azula/xEAB2", "dpmpp_2m_heun"),
    ("azula/xEAB3", "dpmpp_3m"),
    ("azula/xEAB4", "dpmpp_4m"),
    ("torchdiffeq/euler", "euler"),
    ("torchdiffeq/midpoint", "midpoint"),
    ("torchdiffeq/heun2", "heun"),
    ("torchdiffeq/heun3", "heun3"),
    ("torchdiffeq/rk4", "rk38"),
    ("flow_matching/euler", "ddim"),
    ("dpm_solver/multistep2", "dpmpp_2m"),
    ("uni_pc/bh2_3", "unipc_3"),
    ("diff_sampler/ipndm3", "ipndm_3"),
    ("diff_sampler/unipc3", "unipc_3"),
)


@pytest.mark.parametrize("problem", ["ring2:vp", "ring2:ve"])
@pytest.mark.parametrize(("theirs", "ours"), SAME)
def test_a_rule_that_both_have_gives_the_same_samples(theirs, ours, problem):
    line, where = line_of(theirs), problems.get(problem)
    x = where.starts(0, range(4), "marginal")
    for grid in ("log_snr", "karras", "uniform"):
        if grid not in (line.sampler.grids or GRIDS) or (problem == "ring2:ve" and grid == "uniform"):
            continue
        given = {"grid": grid, "start": where.start, "stop": where.stop}
        made, calls = run(line, where.score(), x, 12, **given)
        wanted, ours_calls = run(resolve_line(ours), where.score(), x, 12, **given)
        assert calls == ours_calls == 12
        assert float((made.x - wanted.x).abs().max()) < 1e-11, grid


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("DPMSolverMultistep1", "ddim"),
        ("DPMSolverMultistep2", "dpmpp_2m_lower_final"),
        ("UniPC1", "unipc_1"),
        ("UniPC2", "unipc_2"),
        ("UniPC3", "unipc_3"),
        ("UniPC2:solver_type=bh1", "unipc_2_bh1"),
    ],
)
def test_diffusers_where_its_table_of_levels_holds_the_grid_gives_the_same_samples(theirs, ours):
    """9 steps divide its 999 intervals. Its tables are float32, hence the tolerance."""
    line = line_of(f"diffusers/{theirs}{',' if ':' in theirs else ':'}final_sigmas_type=sigma_min")
    where = problems.get("ring2:vp")
    x = where.starts(0, range(4), "marginal")
    given = {"grid": "uniform", "start": where.start, "stop": where.stop}
    made, calls = run(line, where.score(), x, 9, **given)
    wanted, _ = run(resolve_line(ours), where.score(), x, 9, **given)
    assert calls == 9
    assert float((made.x - wanted.x).abs().max()) < 4e-6


# --- closed forms -------------------------------------------------------------------------------------------------------------


def errors(line: PeerLine, score: Gaussian, nfe: int, grid: str, *stops: float) -> list[list[float]]:
    """Errors of the coordinates, in their standard deviations, to the exact flow at each of ``stops``."""
    path, x = score.path, states()
    made, _ = run(line, score, x, nfe, grid)
    found = []
    for stop in stops:
        truth = path.knot(path.t_min).alpha / path.knot(stop).alpha * score.flow(x, path.T, stop)
        found.append(((made.x - truth).square().mean(0) / score.eigenvalues).sqrt().tolist())
    return found


#: the first has rounded time steps, and its error stays where it is; the second is of first order, from a lucky start
SLOW = ("diffusers/PNDM", "uni_pc/vary_coeff_2")


def check_convergence(line: PeerLine) -> None:
    score = gaussian()
    stop = score.path.t_min
    own, other = (0.0, stop) if line.to_zero else (stop, 0.0)
    known = line.sampler.grids or GRIDS
    grid = "log_snr" if "log_snr" in known else known[0]
    coarse = max(errors(line, score, 20, grid, own)[0][:2])
    found, wrong = errors(line, score, 60, grid, own, other)
    fine = max(found[:2])
    assert fine < 0.15, line.name
    assert fine < 0.55 * coarse or fine < 1e-3 or line.name in SLOW, line.name
    if grid != "uniform":  # which is coarse where the noise is low
        assert found[2] < wrong[2], line.name


@pytest.mark.parametrize(
    "text",
    [
        "diffusers/DDIM",
        "diffusers/Euler",
        "diffusers/DPMSolverMultistep2",
        "diffusers/UniPC2:final_sigmas_type=sigma_min",
        "k_diffusion/dpmpp_2m",
        "k_diffusion/dpm_fast",
        "azula/vAB2",
        "flow_matching/midpoint",
        "torchdiffeq/midpoint:variable=log_rho",
        "torchdiffeq/explicit_adams",
        "dpm_solver/singlestep2",
        "uni_pc/bh1_2",
        "diff_sampler/deis3",
        "edm/edm",
    ],
)
def test_a_sampler_of_the_flow_converges_to_the_closed_form_on_gaussian_data(text):
    check_convergence(line_of(text))


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.LIBRARIES)
def test_every_sampler_of_the_flow_converges_to_the_closed_form_on_gaussian_data(name):
    for short, sampler in need(name).samplers.items():
        if not sampler.adaptive and not sampler.noisy(sampler.options):
            check_convergence(line_of(f"{name}/{short}"))


@pytest.mark.parametrize(
    "text",
    [
        "torchdiffeq/dopri5:rtol=1e-7,atol=1e-7",
        "torchdiffeq/dopri8:rtol=1e-7,atol=1e-7,variable=log_rho",
        "torchode/tsit5:rtol=1e-7,atol=1e-7",
        "flow_matching/dopri5:rtol=1e-7,atol=1e-7",
        "k_diffusion/dpm_adaptive:rtol=1e-6,atol=1e-7",
    ],
)
def test_an_adaptive_sampler_keeps_its_tolerance(text):
    line, score = line_of(text), gaussian(VE(sigma_max=5.0))
    assert line.joint
    x, path = 5.0 * states(), score.path
    made, _ = run(line, score, x, 3000)
    assert float((made.x - score.flow(x, path.T, path.t_min)).abs().max()) < 1e-4


def test_samples_of_other_shapes_and_types_come_back_as_they_went_in():
    ways = (
        "k_diffusion/dpmpp_2m",
        "diffusers/DDIM",
        "torchsde/euler",
        "torchode/dopri5:rtol=0.1,atol=0.1",
        "azula/Heun",
        "flow_matching/euler",
    )
    for text in ways:
        line = line_of(text)
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        made, _ = run(line, Score(lambda x, t: 0.5 * x, VP(), predicts="eps"), x, 200, (line.sampler.grids or ("log_snr",))[0])
        assert made.x.shape == x.shape
        assert made.x.dtype == torch.float32


# --- the network as libraries see it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [VP(), VE(), Linear()], ids=["vp", "ve", "linear"])
def test_every_form_of_the_network_is_the_closed_form(path):
    """x0 and eps of Gaussian data are known; the forms are their combinations, each written out here."""
    score = gaussian(path)
    k = path.knot(0.4 * path.T)
    rho = k.sigma / k.alpha
    x = states()
    prediction = score.predict(x, k.t)
    x0, eps = prediction.x0, prediction.eps
    ask = Wrapped(Meter(score, CPU), F64, x.shape)
    y = x / k.alpha
    wanted = {
        "x0": (ask.x0(x, k.t), x0),
        "eps": (ask.eps(x, torch.tensor(k.t, dtype=F64)), eps),
        "slope": (ask.slope(x, k.t), k.dalpha * x0 + k.dsigma * eps),
        "drift": (ask.drift(x, k.t, 0.7), k.dalpha * x0 + (k.dsigma + 0.5 * 0.49 * k.g2 / k.sigma) * eps),
        "drift of the flow": (ask.drift(x, k.t, 0.0), k.dalpha * x0 + k.dsigma * eps),
        "denoised": (ask.denoised(y, torch.full((4,), rho, dtype=F64)), x0),
        "noise": (ask.noise(y / (1.0 + rho**2) ** 0.5, rho), eps),
        "edm": (ask.edm(y, rho), (x0 - 0.25 / (0.25 + rho**2) * y) / (0.5 * rho / (0.25 + rho**2) ** 0.5)),
        "flow": (ask.flow(y / (1.0 + rho), rho), x0 - eps),
        "log_drift": (ask.log_drift(y, rho, 0.7), 1.49 * rho * eps),
    }
    for form, (found, truth) in wanted.items():
        assert torch.allclose(found, truth, rtol=1e-9, atol=1e-9), form


def test_samples_at_levels_of_their_own_are_each_asked_at_theirs():
    score, x = gaussian(), states(3)
    meter = Meter(score, CPU)
    ask = Wrapped(meter, F64, x.shape)
    times = torch.tensor([0.9, 0.5, 0.1], dtype=F64)
    for i, t in enumerate(times.tolist()):
        assert torch.allclose(ask.slope(x, times)[i], ask.slope(x[[i]].expand(3, 3), t)[i], atol=1e-10)
    assert meter.nfe == 6
    rhos = torch.tensor([k.sigma / k.alpha for k in score.path.knots(times)], dtype=F64)
    for i, rho in enumerate(rhos.tolist()):
        assert torch.allclose(ask.denoised(x, rhos)[i], ask.denoised(x, rho)[i], atol=1e-10)


def test_levels_past_the_end_of_the_path_are_asked_at_its_end():
    assert [k.t for k in knots_of(VE(), [1e9, 0.0])] == [VE().T, 0.0]


def test_a_path_that_starts_without_signal_has_no_sigma_over_alpha_there():
    line = line_of("k_diffusion/dpmpp_2m")
    with pytest.raises(InputError, match=r"alpha\(1\) = 0: .* give a --start-time below"):
        run(line, gaussian(Linear()), states())
    made, _ = run(line, gaussian(Linear()), states(), start=0.99)
    assert bool(made.x.isfinite().all())
    made, calls = run(line_of("azula/DDIM"), gaussian(Linear()), states(), grid="uniform")  # which needs none
    assert calls == 9
    assert torch.allclose(made.x, run(resolve_line("ddim"), gaussian(Linear()), states(), grid="uniform")[0].x, atol=1e-12)


# --- noise --------------------------------------------------------------------------------------------------------------------

#: (theirs, ours, grid): one rule and one law of the noise, so one law of the output. To rounding with noise=white; the Brownian
#: tree takes times that are closer than 1e-6 for one.
SAME_LAW = (
    ("k_diffusion/dpmpp_2m_sde:end=stop,noise=white", "dpmpp_2m_sde", "log_snr"),
    ("k_diffusion/dpmpp_2m_sde:end=stop", "dpmpp_2m_sde", "karras"),
    ("k_diffusion/dpmpp_2m_sde:end=stop,noise=white,solver_type=heun", "dpmpp_2m_sde_heun", "log_snr"),
    ("k_diffusion/dpmpp_3m_sde:end=stop,noise=white", "dpmpp_3m_sde_published", "log_snr"),
    ("k_diffusion/dpmpp_sde:end=stop", "dpmpp_sde_published", "log_snr"),
    ("k_diffusion/euler_ancestral:end=stop", "euler_ancestral", "karras"),
    ("azula/DDPM", "ddpm", "log_snr"),
    ("azula/Ito", "exponential_euler_sde", "log_snr"),
)


@pytest.mark.parametrize(("theirs", "ours", "grid"), SAME_LAW)
def test_the_exact_law_of_a_loop_of_theirs_is_that_of_our_table(theirs, ours, grid):
    problem = problems.get("gauss64:vp")
    found, calls = exact_w2(line_of(theirs), problem, 8, grid)
    assert calls == 8
    tree = theirs.startswith("k_diffusion/dpmpp") and "noise=white" not in theirs
    assert found == pytest.approx(
        Exactly("w2").exact(problem, ours, nfe=8, grid=grid, law="marginal"), rel=1e-5 if tree else 1e-9
    )


def test_the_exact_law_of_euler_on_an_sde_is_its_recursion():
    """torchsde's Euler in -log rho on N(m, v): y - m <- (1 - 2 h rho^2 / (v + rho^2)) (y - m) + rho sqrt(2 h) z. One of 13
    calls checks shapes.
    """
    problem = problems.get("gauss64:ve")
    found, calls = exact_w2(line_of("torchsde/euler"), problem, 13, "log_snr")
    assert calls == 13
    a, b = (problem.path.knot(t).sigma for t in (problem.start, problem.stop))
    h, v = math.log(a / b) / 12, problem.exact.eigenvalues.double()
    variance = v + a * a
    for rho in (a * math.exp(-h * k) for k in range(12)):
        variance = (1.0 - 2.0 * h * rho**2 / (v + rho**2)) ** 2 * variance + 2.0 * h * rho**2
    off = float((variance.sqrt() - (v + b * b).sqrt()).norm()) / 8.0 / problem.std
    assert found == pytest.approx(off, rel=1e-3)  # its steps are a hair longer than equal ones


@pytest.mark.parametrize(
    ("text", "grid", "published"),
    [
        ("k_diffusion/dpmpp_3m_sde:noise=white", "log_snr", (5.6e-1, 4.2e-1, 4.5e-2)),
        ("azula/Ito", "karras", (28.0, 2.0e-1, 1.2e-2)),
        ("diffusers/DPMSolverMultistep3:algorithm_type=sde-dpmsolver++", "log_snr", (1.8e-1, 2.3e-1)),
        ("diffusers/DDPM", "uniform", (4.8e-1, 3.2e-1, 2.0e-1)),
        ("diffusers/DPMSolverSDE", "karras", (6.2e-1,)),
    ],
)
def test_exact_laws_are_those_of_an_independent_measurement(text, grid, published):
    problem, line = problems.get("gauss64:vp"), line_of(text)
    budgets = (5, 10, 20)[: len(published)]
    assert [exact_w2(line, problem, nfe, grid)[0] for nfe in budgets] == pytest.approx(published, rel=0.03)


def test_an_exact_law_is_of_gaussian_data_and_of_fixed_steps():
    with pytest.raises(InputError, match="known on Gaussian data"):
        exact_w2(line_of("azula/DDPM"), problems.get("ring2:vp"), 5, "log_snr")
    with pytest.raises(InputError, match="chooses its steps"):
        exact_w2(line_of("torchode/dopri5"), problems.get("gauss64:vp"), 99, "log_snr")


@pytest.mark.parametrize("text", ["azula/DDPM", "k_diffusion/dpmpp_2m_sde", "diffusers/EulerAncestral", "torchsde/euler"])
def test_noise_is_of_the_seed_and_the_first_index_and_leaves_the_global_generator_alone(text):
    line, score, x = line_of(text), gaussian(), states()
    assert line.joint
    assert not line.flow(None)
    given = {"grid": (line.sampler.grids or ("log_snr",))[0], "nfe": 5}
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = run(line, score, x, **given)[0].x
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert torch.equal(run(line, score, x, **given)[0].x, first)
    assert not torch.equal(run(line, score, x, seed=1, **given)[0].x, first)
    assert not torch.equal(run(line, score, x, indices=range(4, 8), **given)[0].x, first)


def test_the_noise_level_of_a_sweep_is_the_option_eta_unless_the_line_has_its_own():
    line, fixed = line_of("azula/DDIM"), line_of("azula/DDIM:eta=0.7")
    assert line.flow(None)
    assert not line.flow(0.7)
    assert not fixed.flow(0.0)
    score, x = gaussian(), states()
    noisy = run(line, score, x, eta=0.7)[0].x
    assert torch.equal(noisy, run(fixed, score, x, eta=0.2)[0].x)
    assert not torch.equal(noisy, run(line, score, x)[0].x)
    with pytest.raises(InputError, match=r"--eta 0.5: diffusers/Euler has no noise level"):
        run(line_of("diffusers/Euler"), score, x, eta=0.5)
    run(line_of("diffusers/Euler"), score, x, eta=0.0)  # the flow has eta = 0
