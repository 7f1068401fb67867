"""Parity with released samplers: the same network, the same noise, the same numbers.

Two kinds of counterpart. Installed libraries (diffusers, azula, torchdiffeq, torchsde) run as released. Loops
transcribed from papers and from code that is not installed are in ``parity_reference.py``, in float64. The tolerance
is 1e-12 relative to the largest entry wherever the counterpart computes in float64, and 1e-5 for diffusers, whose
tables are float32 whatever the state's dtype is.

Where released code is wrong a test pins the difference, so that it is neither copied nor forgotten. Every comparison
of ours runs the solver's table and its plain loop.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import parity_reference as reference
import pytest
import torch
from rows import one_of_each_kind
from torch import Tensor

from scores import Score
from sde import EDM, VE, VP, Linear, ProbabilityFlow, ReverseSDE, SubVP, Tabulated
from sde.errors import InputError, PathError
from sde.noise import Draws, Source
from sde.path import Path
from sde.prediction import Knot
from solvers import SOLVERS, integrate
from solvers.compose import Churn, Langevin, PredictorCorrector
from solvers.exponential import Multistep, UniPC
from solvers.runge_kutta import EULER, HEUN, RungeKutta, Tableau
from solvers.stochastic import AnnealedLangevin

# diffusers warns about its own future and about numpy's
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BATCH, DIM = 4, 3
EXACT, SINGLE = 1e-12, 1e-5

# --- the same noise -------------------------------------------------------------------------------------------------


class _StoredDraws(Draws):
    def __init__(self, normals: tuple[Tensor, ...], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.normals, self.shape, self.dtype = normals, shape, dtype

    def initial(self, out: Tensor | None = None) -> Tensor:
        raise AssertionError("parity runs start from a given state")

    def normal(self, k: int, s: Knot, t: Knot, like: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        assert self.normals[k].shape == self.shape
        return self.normals[k].to(self.dtype)


@dataclass(frozen=True, eq=False)
class Stored(Source):
    """Draw k of a run is the k-th stored tensor: what the other loop takes from the same list."""

    normals: tuple[Tensor, ...]

    def open(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Draws:
        return _StoredDraws(self.normals, tuple(shape), dtype)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NORMALS = tuple(randn(200, BATCH, DIM, seed=1))
START = randn(BATCH, DIM, seed=2)

# --- the same network -----------------------------------------------------------------------------------------------

_IN, _OUT = randn(DIM, 16, seed=3), randn(16, DIM, seed=4) / 4.0
_LIFT, _SHIFT = randn(1, 16, seed=5), randn(1, 16, seed=6)


def network(x: Tensor, label: Any) -> Tensor:
    """A smooth network without structure: tanh of a random layer, of x (B, d) and a label of order one, number or (B,)."""
    label = torch.as_tensor(label, dtype=x.dtype).reshape(-1, 1)
    inputs, outputs, lift, shift = (w.to(x.dtype) for w in (_IN, _OUT, _LIFT, _SHIFT))
    return 0.7 * x + torch.tanh(x @ inputs + label * lift + shift) @ outputs


def indexed_network(x: Tensor, label: Any) -> Tensor:
    """The same for labels 0 ... 999."""
    return network(x, 0.001 * torch.as_tensor(label, dtype=x.dtype))


def denoise(x: Tensor, sigma: Any) -> Tensor:
    """E[x0] in EDM coordinates, with an input of order one at every sigma."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1)
    shrink = 1.0 / torch.sqrt(1.0 + sigma * sigma)
    return shrink * network(shrink * x, 0.25 * torch.log(sigma))


def ours(
    solver: Any, score: Score, x: Tensor, times: Any, normals: Sequence[Tensor] = NORMALS, eta: Any = None
) -> tuple[Tensor, ...]:
    """The end state by the solver's table and by its plain loop, at the name's own eta unless one is given."""
    problem = score if eta is None else ReverseSDE(score.path, score, eta)
    return tuple(
        integrate(solver, problem, x, times, noise=Stored(tuple(normals)), traced=traced).x for traced in (True, False)
    )


def distance(mine: Sequence[Tensor], theirs: Tensor) -> float:
    """Largest deviation of any of ours, relative to the largest entry of theirs."""
    scale = float(theirs.abs().max())
    assert math.isfinite(scale)
    assert scale > 0.0
    return max(float((m - theirs).abs().max()) for m in mine) / scale


@pytest.fixture
def agree(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Assert agreement; the differences found are kept as properties of the test, for reports."""

    def check(mine: Sequence[Tensor], theirs: Tensor, tolerance: float = EXACT) -> None:
        apart = distance(mine, theirs)
        request.node.user_properties.append(("apart", apart))
        assert apart <= tolerance

    return check


# ====================================================================================================================
# diffusers, as released. Their tables are float32, so states are float32 too and 1e-5 is what can be asked.
# ====================================================================================================================


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


OUTPUT = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def path_of(scheduler: Any) -> Tabulated:
    """Our path on the scheduler's own float32 table."""
    return Tabulated.from_alphas_cumprod(scheduler.alphas_cumprod.double())


def index_times(path: Tabulated, scheduler: Any, last: float = 0.0) -> list[float]:
    """Our times of the scheduler's whole time steps, and where it ends."""
    return [*path.time_of(scheduler.timesteps.double()).tolist(), last]


def sigma_times(path: Path, scheduler: Any) -> list[float]:
    """Our times of the scheduler's noise levels sigma/alpha; repeated entries (Heun's) once."""
    levels = list(dict.fromkeys(scheduler.sigmas.double().tolist()))
    return [float(path.time(-math.log(s))) if s > 0.0 else 0.0 for s in levels]


def looked_up(times: Sequence[float], scheduler: Any) -> Callable[[Tensor], Tensor]:
    """The scheduler's own label of each of its times: it interpolates (and for multistep classes rounds) in its own way."""
    known, labels = torch.tensor(times[:-1], dtype=torch.float64), torch.unique_consecutive(scheduler.timesteps.double())
    assert len(known) == len(labels)
    return lambda t: labels[(t.reshape(-1, 1) - known).abs().argmin(1)].reshape(t.shape)


def run_diffusers(scheduler: Any, net: Any, x: Tensor, options: Callable[[int], dict[str, Any]] = lambda k: {}) -> Tensor:
    for k, t in enumerate(scheduler.timesteps):
        label = torch.full((len(x),), float(t), dtype=x.dtype)
        x = scheduler.step(net(scheduler.scale_model_input(x, t), label), t, x, **options(k)).prev_sample
    return x


def stored_noise(k: int) -> dict[str, Any]:
    return {"variance_noise": NORMALS[k].float()}


def patch_randn(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Schedulers without ``variance_noise`` draw by ``randn_tensor``: let it hand out the stored normals in order."""
    stored = iter(NORMALS)
    monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *a, **k: next(stored).float())


@pytest.mark.parametrize("prediction", OUTPUT)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize(("spacing", "n", "to_one"), [("trailing", 10, True), ("leading", 7, True), ("trailing", 20, False)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_diffusers_ddim(diffusers, agree, prediction: str, betas: str, spacing: str, n: int, to_one: bool, eta: float) -> None:
    """DDIM is our "ddim"; at its eta = 1 it is our "ddpm"."""
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=betas, prediction_type=prediction, timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=to_one
    )
    scheduler.set_timesteps(n)
    path = path_of(scheduler)
    score = Score(indexed_network, path, OUTPUT[prediction], label=path.index)
    x = START.float()
    options = (lambda k: {"eta": 1.0, **stored_noise(k)}) if eta else (lambda k: {})
    theirs = run_diffusers(scheduler, indexed_network, x, options)
    last = 0.0 if to_one else 1.0 / 1000.0
    agree(ours("ddpm" if eta else "ddim", score, x, index_times(path, scheduler, last)), theirs, SINGLE)


@pytest.mark.parametrize("prediction", OUTPUT)
@pytest.mark.parametrize(("spacing", "n"), [("trailing", 10), ("leading", 7)])
def test_diffusers_ddpm(diffusers, agree, monkeypatch, prediction: str, spacing: str, n: int) -> None:
    """DDPM, variance_type "fixed_small" (the posterior's), with the same normals."""
    patch_randn(monkeypatch, "scheduling_ddpm")
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(n)
    path = path_of(scheduler)
    score = Score(indexed_network, path, OUTPUT[prediction], label=path.index)
    x = START.float()
    theirs = run_diffusers(scheduler, indexed_network, x)
    agree(ours("ddpm", score, x, index_times(path, scheduler)), theirs, SINGLE)


DPM = {  # algorithm_type -> (target, eta)
    "dpmsolver++": ("x0", 0.0),
    "dpmsolver": ("eps", 0.0),
    "sde-dpmsolver++": ("x0", 1.0),
    "sde-dpmsolver": ("eps", 1.0),
}


DPM_CASES = [  # their formula in eps has no limit at sigma = 0, and is refused there
    (algorithm, *case)
    for algorithm, (target, _) in DPM.items()
    for case in (("zero", False, 10), ("zero", True, 20), ("sigma_min", False, 10), ("sigma_min", False, 20))
    if target == "x0" or case[0] == "sigma_min"
]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("algorithm", "final", "karras", "n"), DPM_CASES)
def test_diffusers_dpmsolver_multistep(diffusers, agree, algorithm: str, order: int, final: str, karras: bool, n: int) -> None:
    """Midpoint multistep, all four algorithm types; "dpmpp_2m" and "dpmpp_2m_sde" are two of them.

    With a last sigma > 0 they lower the order at the end below 15 steps, which is our ``lower_final``.
    """
    target, eta = DPM[algorithm]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_order=order, solver_type="midpoint", final_sigmas_type=final, use_karras_sigmas=karras
    )
    scheduler.set_timesteps(n)
    path = path_of(scheduler)
    last = 0.0 if final == "zero" else 1.0 / 1000.0
    times = sigma_times(path, scheduler) if karras else index_times(path, scheduler, last)
    score = Score(indexed_network, path, "eps", label=looked_up(times, scheduler))
    x = START.float()
    theirs = run_diffusers(scheduler, indexed_network, x, stored_noise if eta else lambda k: {})
    rule = "midpoint" if order == 2 else "exact"
    solver: Any = Multistep(order, target, rule=rule, lower_final=order == 2 and final == "sigma_min" and n < 15)
    if order == 2 and final == "zero":
        solver = SOLVERS["dpmpp_2m_sde" if eta else "dpmpp_2m"].solver
    agree(ours(solver, score, x, times, eta=eta), theirs, SINGLE)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    ("variant", "final", "karras", "lower", "target"),
    [
        ("bh2", "zero", False, True, "x0"),
        ("bh2", "zero", True, True, "x0"),
        *(
            (variant, "sigma_min", False, lower, target)
            for variant in ("bh1", "bh2")
            for lower, target in ((True, "x0"), (False, "x0"), (True, "eps"))
        ),
    ],
)
def test_diffusers_unipc(
    diffusers, agree, variant: str, order: int, final: str, karras: bool, lower: bool, target: str
) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order,
        solver_type=variant,
        predict_x0=target == "x0",
        lower_order_final=lower,
        final_sigmas_type=final,
        use_karras_sigmas=karras,
    )
    scheduler.set_timesteps(10)
    path = path_of(scheduler)
    last = 0.0 if final == "zero" else 1.0 / 1000.0
    times = sigma_times(path, scheduler) if karras else index_times(path, scheduler, last)
    score = Score(indexed_network, path, "eps", label=looked_up(times, scheduler))
    x = START.float()
    theirs = run_diffusers(scheduler, indexed_network, x)
    named = f"unipc_{order}" + ("_full" if not lower else "_bh1" if variant == "bh1" else "")
    in_catalogue = target == "x0" and (lower or variant == "bh2")
    agree(ours(named if in_catalogue else UniPC(order, variant, target, lower), score, x, times), theirs, SINGLE)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "solver", "karras"),
    [
        ("Euler", "edm_euler", False),
        ("Euler", "edm_euler", True),
        ("Heun", "edm_heun", False),
        ("Heun", "edm_heun", True),
        ("EulerAncestral", "ddpm", False),
    ],
)
def test_diffusers_sigma_schedulers(
    diffusers, agree, monkeypatch, name: str, solver: str, karras: bool, prediction: str
) -> None:
    """EulerDiscrete, HeunDiscrete, EulerAncestralDiscrete: their state is x / alpha, ours x; both end at sigma = 0."""
    options = {"use_karras_sigmas": karras} if name != "EulerAncestral" else {}
    if name == "EulerAncestral":
        patch_randn(monkeypatch, "scheduling_euler_ancestral_discrete")
    scheduler = getattr(diffusers, f"{name}DiscreteScheduler")(prediction_type=prediction, **options)
    scheduler.set_timesteps(10)  # 999 / 9 steps: whole time steps without karras
    path = path_of(scheduler)
    times = sigma_times(path, scheduler)
    score = Score(indexed_network, path, OUTPUT[prediction], label=looked_up(times, scheduler))
    x = START.float()
    scale = float(path.alpha(times[0]))
    theirs = run_diffusers(scheduler, indexed_network, x / scale)
    agree(ours(solver, score, x, times), theirs, SINGLE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("n", [1, 8])
def test_diffusers_flow_match_euler(diffusers, agree, shift: float, n: int) -> None:
    """FlowMatchEulerDiscrete is our "euler" on Linear(), at its own (twice shifted) sigmas."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n)
    score = Score(indexed_network, Linear(), "velocity", label=lambda t: 1000.0 * t)
    x, times = START.float(), scheduler.sigmas.double()
    for k, t in enumerate(scheduler.timesteps):
        assert abs(float(t) - 1000.0 * float(times[k])) < 1e-3
    scheduler.scale_model_input = lambda x, t: x
    agree(ours("euler", score, x, times), run_diffusers(scheduler, indexed_network, x), SINGLE)


# --- what is wrong there, and cannot happen here --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"solver_order": 2, "solver_type": "heun"}, {"solver_order": 3}])
def test_dpmsolver_repeated_final_sigma(diffusers, options: dict[str, Any]) -> None:
    """final_sigmas_type="sigma_min" with Karras sigmas repeats the last sigma: h = 0, and NaN from 15 steps on.

    Here the same levels are refused by name, and without the repetition every solver is finite on them.
    """
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, final_sigmas_type="sigma_min", **options)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas.double()
    assert sigmas[-1] == sigmas[-2]
    theirs = run_diffusers(scheduler, indexed_network, START.float())
    assert bool(theirs.isnan().any())

    path = path_of(scheduler)
    score = Score(indexed_network, path, "eps", label=path.index)
    times = path.time(-sigmas.log())
    for name in one_of_each_kind():
        with pytest.raises(InputError, match=r"times\[20\].*strictly decreasing"):
            integrate(name, score, START, times)
        if not hasattr(SOLVERS[name].solver, "solve"):
            assert bool(integrate(name, score, START, times[:-1]).x.isfinite().all()), name


def test_unipc_bh1_to_clean_data(diffusers, agree) -> None:
    """Released UniPC with "bh1" multiplies an infinite B(h) = h by a correction of 0 on its default last step, to
    sigma = 0: NaN.

    The limit of that step is DDIM's, x0, whatever B is; ours takes it. Up to that step the two agree.
    """
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=2, solver_type="bh1")
    scheduler.set_timesteps(10)
    path = path_of(scheduler)
    score = Score(indexed_network, path, "eps", label=path.index)
    x, times = START.float(), index_times(path, scheduler)
    assert bool(run_diffusers(scheduler, indexed_network, x).isnan().all())

    states: list[Tensor] = []
    mine = integrate("unipc_2_bh1", score, x, times, callback=lambda info: states.append(info.x)).x
    levels = [(float(path.alpha(t)), float(path.sigma(t))) for t in times[:-1]]

    def x0(x: Tensor, i: int) -> Tensor:
        alpha, sigma = levels[i]
        return (x - sigma * indexed_network(x, float(path.index(times[i])))) / alpha

    before = reference.unipc_bh(x0, START, levels, 2, "bh1", predict_x0=True, lower_order_final=False)
    agree([states[-2]], before, SINGLE)
    assert bool(mine.isfinite().all())


def test_zero_terminal_snr_start(diffusers, agree) -> None:
    """alpha = 0 at the start: a v network runs and agrees; an eps network is refused, where the released step divides by 0."""
    schedulers = {
        p: diffusers.DDIMScheduler(
            rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=p, clip_sample=False
        )
        for p in ("v_prediction", "epsilon")
    }
    for scheduler in schedulers.values():
        scheduler.set_timesteps(10)
    path = path_of(schedulers["v_prediction"])
    assert float(path.alpha(1.0)) == 0.0
    times, x = index_times(path, schedulers["v_prediction"]), START.float()
    v = Score(indexed_network, path, "v", label=path.index)
    agree(ours("ddim", v, x, times), run_diffusers(schedulers["v_prediction"], indexed_network, x), SINGLE)
    for name in ("ddpm", "dpmpp_2m", "dpmpp_2m_sde", "unipc_2", "unipc_3", "unipc_3_full"):
        assert bool(torch.stack(ours(name, v, x, times)).isfinite().all()), name

    assert not bool(run_diffusers(schedulers["epsilon"], indexed_network, x).isfinite().all())
    eps = Score(indexed_network, path, "eps", label=path.index)
    for name in ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "unipc_2", "unipc_3"):
        for traced in (True, False):
            with pytest.raises(PathError, match="eps-prediction is undefined at alpha = 0"):
                integrate(name, eps, x, times, traced=traced)


def test_ddim_steps_that_do_not_divide_the_table(diffusers) -> None:
    """DDIM's target is t - 1000 // n whatever the next time step is: with 7 trailing steps most states are one entry
    off, and the run ends at the table's first entry instead of clean data. On our grid a step ends where the next one
    starts."""
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(7)
    visited = scheduler.timesteps.tolist()
    targets = [t - 1000 // 7 for t in visited]
    assert targets[:-1] != visited[1:]
    path = path_of(scheduler)
    score = Score(indexed_network, path, "eps", label=path.index)
    x = START.float()
    theirs = run_diffusers(scheduler, indexed_network, x)
    assert distance(ours("ddim", score, x, index_times(path, scheduler)), theirs) > 1e-3
    # Reproduced by our own step from each visited entry to its wrong target: the step is right, the grid is not.
    for t, target in zip(visited, targets, strict=True):
        end = float(path.time_of(target)) if target >= 0 else 0.0
        x = integrate("ddim", score, x, [float(path.time_of(t)), end]).x
    assert distance([x], theirs) <= SINGLE


def test_euler_discrete_churn_is_not_edm(diffusers) -> None:
    """EulerDiscrete adds its churn noise after the network was called, so the network never sees sigma_hat (EDM calls
    it there)."""
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    path = path_of(scheduler)
    times = sigma_times(path, scheduler)
    score = Score(indexed_network, path, "eps", label=path.index)
    x = START.float()
    solver = Churn(RungeKutta(EULER, "rho"), s_churn=2.0, s_max=10.0)
    stored = iter(NORMALS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_euler_discrete.randn_tensor", lambda *a, **k: next(stored).float())
        theirs = run_diffusers(
            scheduler, indexed_network, x / float(path.alpha(times[0])), lambda k: {"s_churn": 2.0, "s_tmax": 10.0}
        )
    assert distance(ours(solver, score, x, times), theirs) > 1e-3
    # Ours is EDM's: the transcription with the network called at sigma_hat.
    sigmas = torch.exp(-path.lam(torch.tensor(times, dtype=torch.float64))).tolist()

    def at(x: Tensor, sigma: float) -> Tensor:
        t = float(path.time(-math.log(sigma)))
        return x - sigma * indexed_network(x / math.sqrt(1.0 + sigma**2), float(path.index(t)))

    start = START / float(path.alpha(times[0]))
    edm = reference.kd_euler(at, start, sigmas, iter(NORMALS), s_churn=2.0, s_tmax=10.0)
    assert distance(ours(solver, score, START, times), edm) <= EXACT


# ====================================================================================================================
# k-diffusion and EDM, transcribed: EDM path, 1e-12
# ====================================================================================================================

KARRAS = [
    float(s) for s in EDM().time(-7.0 * torch.log(torch.linspace(60.0 ** (1 / 7), 0.02 ** (1 / 7), 12, dtype=torch.float64)))
]
TO_ZERO, TO_MIN = [*KARRAS, 0.0], KARRAS
EDM_SCORE = Score(denoise, EDM(), "x0")


@pytest.mark.parametrize("sigmas", [TO_ZERO, TO_MIN], ids=["to_zero", "to_min"])
@pytest.mark.parametrize("churn", [0.0, 4.0, 40.0])
@pytest.mark.parametrize(("loop", "tableau"), [(reference.kd_euler, EULER), (reference.kd_heun, HEUN)], ids=["euler", "heun"])
def test_k_diffusion_euler_and_heun(agree, loop: Any, tableau: Tableau, churn: float, sigmas: list[float]) -> None:
    """sample_euler and sample_heun; with churn inside a window, away from the cap at the path's end."""
    x = sigmas[0] * START
    window = {"s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    theirs = loop(denoise, x, sigmas, iter(NORMALS), s_churn=churn, **window)
    solver = Churn(RungeKutta(tableau, "rho"), churn, s_min=0.05, s_max=50.0, s_noise=1.003)
    agree(ours(solver, EDM_SCORE, x, sigmas), theirs)
    if churn == 0.0:
        agree(ours(f"edm_{tableau.name}", EDM_SCORE, x, sigmas), theirs)


@pytest.mark.parametrize("sigmas", [TO_ZERO, TO_MIN], ids=["to_zero", "to_min"])
def test_k_diffusion_dpmpp_2m(agree, sigmas: list[float]) -> None:
    x = sigmas[0] * START
    agree(ours("dpmpp_2m", EDM_SCORE, x, sigmas), reference.kd_dpmpp_2m(denoise, x, sigmas, iter(NORMALS)))


@pytest.mark.parametrize("sigmas", [TO_ZERO, TO_MIN], ids=["to_zero", "to_min"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_k_diffusion_dpmpp_2m_sde(agree, eta: float, sigmas: list[float]) -> None:
    """sample_dpmpp_2m_sde (midpoint): k-diffusion's eta is the square of ours."""
    x = sigmas[0] * START
    theirs = reference.kd_dpmpp_2m_sde(denoise, x, sigmas, iter(NORMALS), eta=eta)
    agree(ours("dpmpp_2m_sde", EDM_SCORE, x, sigmas, eta=math.sqrt(eta)), theirs)
    if eta == 0.5:
        assert distance(ours("dpmpp_2m_sde", EDM_SCORE, x, sigmas, eta=eta), theirs) > 1e-3


@pytest.mark.parametrize("sigmas", [TO_ZERO, TO_MIN], ids=["to_zero", "to_min"])
def test_k_diffusion_euler_ancestral_is_ddpm(agree, sigmas: list[float]) -> None:
    """sample_euler_ancestral at eta = 1 is the exact posterior, our "ddpm"."""
    x = sigmas[0] * START
    agree(ours("ddpm", EDM_SCORE, x, sigmas), reference.kd_euler_ancestral(denoise, x, sigmas, iter(NORMALS)))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_k_diffusion_lms(agree, order: int) -> None:
    """sample_lms is the eps polynomial in rho. At sigma = 0, where lambda is infinite, ours takes one first-order
    step instead."""
    x = TO_MIN[0] * START
    solver = Multistep(order, "eps", basis="rho")
    agree(ours(solver, EDM_SCORE, x, TO_MIN), reference.kd_lms(denoise, x, TO_MIN, iter(NORMALS), order))


@pytest.mark.parametrize("sigmas", [TO_ZERO, TO_MIN], ids=["to_zero", "to_min"])
@pytest.mark.parametrize(("low", "high", "s_noise"), [(0.0, math.inf, 1.0), (0.05, 50.0, 1.007)])
def test_edm_algorithm_2_below_the_cap(agree, low: float, high: float, s_noise: float, sigmas: list[float]) -> None:
    """Karras et al., algorithm 2. 40 / 12 steps gives gamma = sqrt 2 - 1 from 40: sigma_hat stays below T = 80."""
    sigmas = [s * 40.0 / 60.0 for s in sigmas]
    x = sigmas[0] * START
    theirs = reference.edm_algorithm_2(denoise, x, sigmas, iter(NORMALS), 40.0, low, high, s_noise)
    agree(ours(Churn(RungeKutta(HEUN, "rho"), 40.0, low, high, s_noise), EDM_SCORE, x, sigmas), theirs)
    if s_noise == 1.0:
        agree(ours("edm_sde", EDM_SCORE, x, sigmas), theirs)


def test_edm_algorithm_2_is_capped_at_the_end_of_the_path(agree) -> None:
    """From sigma_max = T the paper's first call is at 1.41 T, where no network was trained: ours caps sigma_hat at T.

    From T the first step adds no noise; from 60 it adds what is left up to 80. Later steps are the paper's.
    """
    for top in (80.0, 60.0):
        sigmas = [s * top / 60.0 for s in TO_ZERO]
        x = sigmas[0] * START
        mine = ours("edm_sde", EDM_SCORE, x, sigmas)
        setting = (40.0, 0.0, math.inf, 1.0)
        agree(mine, reference.edm_algorithm_2(denoise, x, sigmas, iter(NORMALS), *setting, cap=80.0))
        assert distance(mine, reference.edm_algorithm_2(denoise, x, sigmas, iter(NORMALS), *setting)) > 1e-4


# ====================================================================================================================
# score_sde and NCSN, transcribed
# ====================================================================================================================


class Level(NamedTuple):
    """VP() at one time, from its formulas and not from the path's code."""

    t: float
    alpha: float
    sigma: float
    beta: float

    @property
    def lam(self) -> float:
        return math.log(self.alpha / self.sigma)

    @property
    def rho(self) -> float:
        return self.sigma / self.alpha


def vp(t: float) -> Level:
    rate = 0.1 * t + 0.5 * 19.9 * t * t
    return Level(t, math.exp(-0.5 * rate), math.sqrt(-math.expm1(-rate)), 0.1 + 19.9 * t)


def vp_at_rho(rho: float) -> Level:
    rate = math.log1p(rho * rho)
    return vp(2.0 * rate / (0.1 + math.sqrt(0.01 + 2.0 * 19.9 * rate)))


def at_vp(x: Tensor, k: Level) -> tuple[Tensor, Tensor]:
    """(x0, eps) of the eps network."""
    eps = network(x, k.t)
    return (x - k.sigma * eps) / k.alpha, eps


def vp_score(x: Tensor, k: Level) -> Tensor:
    return -at_vp(x, k)[1] / k.sigma


VP_SCORE = Score(network, VP(), "eps")
VP_TIMES = [0.95, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.04]
VP_LEVELS = [vp(t) for t in VP_TIMES]
VE_PATH = VE(0.01, 50.0)
VE_SCORE = Score(denoise, VE_PATH, "x0", label=VE_PATH.sigma)
VE_TIMES = torch.linspace(1.0, 0.1, 10, dtype=torch.float64).tolist()
VE_SIGMAS = [0.01 * 5000.0**t for t in VE_TIMES]


def ve_score(x: Tensor, sigma: float) -> Tensor:
    return (denoise(x, sigma) - x) / sigma**2


def test_score_sde_euler_maruyama_vp(agree) -> None:
    """EulerMaruyamaPredictor with dt the distance to the next time."""
    x = START
    for (s, t), z in zip(itertools.pairwise(VP_LEVELS), NORMALS, strict=False):
        x = reference.song_euler_maruyama_vp(vp_score(x, s), x, s.beta, t.t - s.t, z)
    agree(ours("euler_maruyama", VP_SCORE, START, VP_TIMES), x)


def test_score_sde_euler_maruyama_ve(agree) -> None:
    start = x = 50.0 * START
    for i, z in zip(range(len(VE_TIMES) - 1), NORMALS, strict=False):
        dt = VE_TIMES[i + 1] - VE_TIMES[i]
        x = reference.song_euler_maruyama_ve(ve_score(x, VE_SIGMAS[i]), x, VE_SIGMAS[i], 0.01, 50.0, dt, z)
    agree(ours("euler_maruyama", VE_SCORE, start, VE_TIMES), x)


def test_score_sde_steps_by_1_over_n_on_a_grid_of_n_minus_1() -> None:
    """The released sampler makes N updates with dt = -1/N at linspace(1, 1e-3, N), whose spacing is (1 - 1e-3) / (N -
    1), and the last update leaves from the last time. Ours steps by the grid's own spacing; the two differ to first
    order."""

    def released(n: int) -> Tensor:
        x = START
        for t in torch.linspace(1.0, 1e-3, n, dtype=torch.float64).tolist():
            k = vp(t)
            x = reference.song_euler_maruyama_vp(vp_score(x, k), x, k.beta, -1.0 / n, torch.zeros_like(x))
        return x

    def apart(n: int) -> float:
        times = torch.linspace(1.0, 1e-3, n, dtype=torch.float64)
        return distance(ours("euler_maruyama", VP_SCORE, START, times, [torch.zeros_like(START)] * n), released(n))

    ratio = apart(50) / apart(100)
    assert apart(100) > 1e-4
    assert 1.6 < ratio < 2.4


def test_score_sde_ancestral_ve_is_ddpm(agree) -> None:
    start = x = 50.0 * START
    for i, z in zip(range(len(VE_TIMES) - 1), NORMALS, strict=False):
        x = reference.song_ancestral_ve(ve_score(x, VE_SIGMAS[i]), x, VE_SIGMAS[i], VE_SIGMAS[i + 1], z)
    agree(ours("ddpm", VE_SCORE, start, VE_TIMES), x)


def test_score_sde_ancestral_vp_is_ddpm_discrete(agree) -> None:
    """With discrete_betas = beta(t)/N, on times 1/N apart."""
    n = 40
    times = [1.0 - i / n for i in range(n)][10:]
    x = START
    for t, z in zip(times[:-1], NORMALS, strict=False):
        k = vp(t)
        x = reference.song_ancestral_vp(vp_score(x, k), x, k.beta / n, z)
    agree(ours("ddpm_discrete", VP_SCORE, START, times), x)


def test_score_sde_ancestral_vp_has_ddpm_mean_on_a_table(agree) -> None:
    """With the table's betas between neighbouring entries the mean is the posterior's exactly; the variance is beta, not the
    posterior's beta (1 - abar_{k-1}) / (1 - abar_k)."""
    path = Tabulated.linear(20, 1e-3, 0.3)
    score = Score(network, path, "eps")
    for k in range(19, 0, -1):
        t, beta = (k + 1) / 20, path.betas[k]
        grad = -network(START, t) / float(path.sigma(t))
        step = [t, k / 20]
        silent, loud = ([torch.zeros_like(START)], [torch.ones_like(START)])
        mean = reference.song_ancestral_vp(grad, START, beta, silent[0])
        agree(ours("ddpm", score, START, step, silent), mean)
        spread = ours("ddpm", score, START, step, loud)[0] - ours("ddpm", score, START, step, silent)[0]
        smaller = float((1.0 - path.alphas_cumprod[k - 1]) / (1.0 - path.alphas_cumprod[k]))
        agree([spread], torch.full_like(spread, math.sqrt(beta * smaller)))


FIRST_ORDER = {  # name -> (their update of (x, s, t, z), our solver)
    "euler_maruyama_vp/ddpm": (
        lambda x, s, t, z: reference.song_euler_maruyama_vp(vp_score(x, s), x, s.beta, t.t - s.t, z), "ddpm"
    ),
    "reverse_diffusion_vp/ddpm": (
        lambda x, s, t, z: reference.song_reverse_diffusion_vp(vp_score(x, s), x, s.beta * (s.t - t.t), z), "ddpm"
    ),
    "reverse_diffusion_vp/ddpm_discrete": (
        lambda x, s, t, z: reference.song_reverse_diffusion_vp(vp_score(x, s), x, s.beta * (s.t - t.t), z), "ddpm_discrete"
    ),
    "ancestral_vp/ddpm": (
        lambda x, s, t, z: reference.song_ancestral_vp(vp_score(x, s), x, s.beta * (s.t - t.t), z), "ddpm"
    ),
    "reverse_diffusion_vp/euler_maruyama": (
        lambda x, s, t, z: reference.song_reverse_diffusion_vp(vp_score(x, s), x, s.beta * (s.t - t.t), z), "euler_maruyama"
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", FIRST_ORDER)
def test_score_sde_predictors_that_agree_to_first_order_only(pair: str) -> None:
    """One step: the means part by O(h^2) and the noise by O(h^1.5), so the samplers converge to each other at order one."""
    theirs, solver = FIRST_ORDER[pair]

    def parts(h: float) -> tuple[float, float]:
        """How far the means are apart, and the standard deviations."""
        s, t = vp(0.5), vp(0.5 - h)
        silent, loud = torch.zeros_like(START), torch.ones_like(START)
        mine, mine_loud = (ours(solver, VP_SCORE, START, [s.t, t.t], [z])[0] for z in (silent, loud))
        other, other_loud = (theirs(START, s, t, z) for z in (silent, loud))
        return float((mine - other).abs().max()), float(((mine_loud - mine) - (other_loud - other)).abs().max())

    (mean, noise), (half_mean, half_noise) = parts(2e-3), parts(1e-3)
    assert mean > 1e-7
    assert 3.8 < mean / half_mean < 4.2
    if solver == "ddpm":
        assert noise > 1e-7
        assert 2.7 < noise / half_noise < 3.0
    else:  # both add sqrt(beta h) z
        assert noise < 1e-14


def test_score_sde_reverse_diffusion_ve_has_ddpm_mean(agree) -> None:
    """Same mean as the posterior, noise larger by sigma_i / sigma_{i-1}."""
    sigma, adjacent = 3.0, 2.5
    x, step = 3.0 * START, VE_PATH.time(-torch.log(torch.tensor([3.0, 2.5], dtype=torch.float64)))
    silent, loud = [torch.zeros_like(x)], [torch.ones_like(x)]
    mean = ours("ddpm", VE_SCORE, x, step, silent)
    agree(mean, reference.song_reverse_diffusion_ve(ve_score(x, sigma), x, sigma, adjacent, silent[0]))
    spread = ours("ddpm", VE_SCORE, x, step, loud)[0] - mean[0]
    theirs = reference.song_reverse_diffusion_ve(ve_score(x, sigma), x, sigma, adjacent, loud[0]) - mean[0]
    agree([spread * (sigma / adjacent)], theirs)


@pytest.mark.parametrize("inner", [1, 3])
def test_score_sde_langevin_with_ancestral_ve_at_batch_1(agree, inner: int) -> None:
    """The released PC sampler on VE: at each time the corrector, then the predictor. "pc_ddpm" for a batch of one."""
    start = x = 50.0 * START[:1]
    stored = [z[:1] for z in NORMALS]
    draws = iter(stored)
    for sigma, adjacent in itertools.pairwise(VE_SIGMAS):
        x = reference.song_langevin(lambda x, sigma=sigma: ve_score(x, sigma), x, 0.16, inner, 1.0, draws)
        x = reference.song_ancestral_ve(ve_score(x, sigma), x, sigma, adjacent, next(draws))
    solver: Any = "pc_ddpm" if inner == 1 else PredictorCorrector(Multistep(1, "x0"), Langevin(0.16, inner))
    agree(ours(solver, VE_SCORE, start, VE_TIMES, stored, eta=1.0), x)


def test_score_sde_langevin_couples_the_batch(agree) -> None:
    """Their step size is from norms averaged over the batch, so a sample depends on its mates. Ours is what theirs does to each
    sample alone."""
    t, sigma = 0.7, 0.01 * 5000.0**0.7
    x, z = sigma * START * torch.tensor([[1.0], [2.0], [3.0], [0.5]], dtype=torch.float64), NORMALS[0]
    idle = PredictorCorrector(_Stay(), Langevin())  # the corrector alone
    mine = ours(idle, VE_SCORE, x, [t, t - 0.1], [z])
    grad = lambda x: ve_score(x, sigma)  # noqa: E731
    alone = [reference.song_langevin(grad, x[i : i + 1], 0.16, 1, 1.0, iter([z[i : i + 1]])) for i in range(BATCH)]
    agree(mine, torch.cat(alone))
    assert distance(mine, reference.song_langevin(grad, x, 0.16, 1, 1.0, iter([z]))) > 1e-3


def test_score_sde_langevin_vp_scales_its_step_by_alpha(agree) -> None:
    """For VP the released corrector multiplies the step by 1 - beta_i, which Algorithm 5 of the paper has and ours
    leaves out: the same as ours at snr sqrt(1 - beta_i)."""
    k, beta, z = vp(0.6), 0.05, NORMALS[0][:1]
    x = START[:1]
    theirs = reference.song_langevin(lambda x: vp_score(x, k), x, 0.16, 1, 1.0 - beta, iter([z]))
    agree(ours(PredictorCorrector(_Stay(), Langevin(0.16 * math.sqrt(1.0 - beta))), VP_SCORE, x, [0.6, 0.5], [z]), theirs)
    assert distance(ours(PredictorCorrector(_Stay(), Langevin(0.16)), VP_SCORE, x, [0.6, 0.5], [z]), theirs) > 1e-4


@dataclass(frozen=True)
class _Stay:
    """A predictor that does nothing."""

    stages = 0
    order = weak = strong = None
    stochastic = takes_eta = False
    linear = True

    def step(self, problem: Any, x: Any, s: Knot, t: Knot, carry: Any, noise: Any) -> Any:
        from solvers.base import Step

        return Step(x)


@pytest.mark.parametrize("inner", [1, 5])
def test_ncsn_annealed_langevin(agree, inner: int) -> None:
    """``size`` is epsilon / sigma_L^2 of the paper, twice that of the released code; the first level is the start's own."""
    last = 0.01
    start = VE_SIGMAS[0] * START
    mine = ours(AnnealedLangevin(inner, size=0.2), VE_SCORE, start, VE_TIMES)
    agree(mine, reference.ncsn_paper(ve_score, start, VE_SIGMAS[1:], iter(NORMALS), 0.2 * last**2, last, inner))
    agree(mine, reference.ncsn_code(ve_score, start, VE_SIGMAS[1:], iter(NORMALS), 0.1 * last**2, last, inner))
    if inner == 5:
        agree(ours("annealed_langevin", VE_SCORE, start, VE_TIMES), mine[0])


# ====================================================================================================================
# azula, DPM-Solver, UniPC: any path
# ====================================================================================================================

LEVELS = [(k.alpha, k.sigma) for k in VP_LEVELS]


def x0_at(x: Tensor, i: int) -> Tensor:
    return at_vp(x, VP_LEVELS[i])[0]


def eps_at(x: Tensor, i: int) -> Tensor:
    return at_vp(x, VP_LEVELS[i])[1]


def per_step_eta(levels: Sequence[Level], share: float) -> Callable[[float], float]:
    """The eta of ours whose step keeps the same share of noise: e^{-2 eta^2 h} = 1 - share (1 - e^{-2h})."""
    etas = {}
    for s, t in itertools.pairwise(levels):
        h = t.lam - s.lam
        etas[s.t] = math.sqrt(-math.log1p(share * math.expm1(-2.0 * h)) / (2.0 * h))
    return lambda t: etas.get(float(t), 0.0)


def test_azula_ddpm(agree) -> None:
    agree(ours("ddpm", VP_SCORE, START, VP_TIMES), reference.azula_ddim(x0_at, START, LEVELS, iter(NORMALS), 1.0))


def test_azula_ddim(agree) -> None:
    agree(ours("ddim", VP_SCORE, START, VP_TIMES), reference.azula_ddim(x0_at, START, LEVELS, iter(NORMALS), 0.0))


@pytest.mark.parametrize("eta", [0.25, 0.5])
def test_ddim_eta_is_another_parameter(agree, eta: float) -> None:
    """Between 0 and 1, DDIM's eta scales the variance of each step (azula: eta tau, Song et al.: eta^2 tau), ours the
    diffusion of the SDE. They agree with an eta that changes from step to step, not with a constant one."""
    theirs = reference.azula_ddim(x0_at, START, LEVELS, iter(NORMALS), eta)
    agree(ours("ddim", VP_SCORE, START, VP_TIMES, eta=per_step_eta(VP_LEVELS, eta)), theirs)
    assert distance(ours("ddim", VP_SCORE, START, VP_TIMES, eta=eta), theirs) > 1e-3
    assert distance(ours("ddim", VP_SCORE, START, VP_TIMES, eta=math.sqrt(eta)), theirs) > 1e-3


@pytest.mark.parametrize(("order", "solver"), [(1, "edm_euler"), (1, "ddim"), (2, "edm_heun")])
def test_azula_euler_and_heun(agree, order: int, solver: str) -> None:
    agree(ours(solver, VP_SCORE, START, VP_TIMES), reference.azula_heun(eps_at, START, LEVELS, iter(NORMALS), order))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_azula_zab(agree, order: int) -> None:
    mine = ours(Multistep(order, "eps", basis="rho"), VP_SCORE, START, VP_TIMES)
    agree(mine, reference.azula_zab(eps_at, START, LEVELS, iter(NORMALS), order))


AZULA = {
    "DDPMSampler": ({}, "ddpm"),
    "DDIMSampler": ({"eta": 0.0}, "ddim"),
    "EulerSampler": ({}, "edm_euler"),
    "HeunSampler": ({}, "edm_heun"),
    "zABSampler": ({"order": 3}, Multistep(3, "eps", basis="rho")),
    "zEABSampler": ({"order": 2}, Multistep(2, "eps")),
    "xEABSampler": ({"order": 2}, Multistep(2, "x0")),
}


@pytest.mark.parametrize("name", AZULA)
def test_azula_as_released(agree, monkeypatch, name: str) -> None:
    """The installed library, whose steps are float64 here."""
    module = pytest.importorskip("azula.sample")
    options, solver = AZULA[name]
    path = VP()

    class Denoise:
        def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return path.alpha(t), path.sigma(t)

        def __call__(self, x: Tensor, t: Tensor) -> Any:
            class Posterior:
                mean = at_vp(x, vp(float(t)))[0]

            return Posterior

    stored = iter(NORMALS)
    monkeypatch.setattr(torch, "randn_like", lambda x: next(stored).clone())
    sampler = getattr(module, name)(Denoise(), start=0.9, stop=0.05, steps=9, silent=True, dtype=torch.float64, **options)
    theirs = sampler(START)
    monkeypatch.undo()
    agree(ours(solver, VP_SCORE, START, sampler.timesteps), theirs)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(("algorithm", "target", "model"), [("dpmsolver++", "x0", x0_at), ("dpmsolver", "eps", eps_at)])
def test_dpm_solver_multistep_2(agree, algorithm: str, target: str, model: Any, lower: bool) -> None:
    """Lu et al.'s own code, multistep order 2, "dpmsolver" (midpoint) type."""
    theirs = reference.dpm_solver_multistep_2(model, START, LEVELS, algorithm, lower)
    agree(ours(Multistep(2, target, rule="midpoint", lower_final=lower), VP_SCORE, START, VP_TIMES), theirs)
    if target == "x0" and not lower:
        agree(ours("dpmpp_2m", VP_SCORE, START, VP_TIMES), theirs)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(("target", "model"), [("x0", x0_at), ("eps", eps_at)])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_bh(agree, order: int, variant: str, target: str, model: Any, lower: bool, n: int) -> None:
    """Zhao et al.'s own multistep_uni_pc_bh_update, also with fewer steps than the order."""
    levels = LEVELS[: n + 1]
    theirs = reference.unipc_bh(model, START, levels, order, variant, target == "x0", lower)
    times = VP_TIMES[: n + 1]
    agree(ours(UniPC(order, variant, target, lower), VP_SCORE, START, times), theirs)
    name = f"unipc_{order}" + ("_full" if not lower else "_bh1" if variant == "bh1" else "")
    if target == "x0" and name in SOLVERS and (lower or variant == "bh2"):
        agree(ours(name, VP_SCORE, START, times), theirs)


# ====================================================================================================================
# torchdiffeq (flow_matching's solver) and torchsde, as released
# ====================================================================================================================

FLOW = Score(network, Linear(), "velocity")
FLOW_TIMES = torch.tensor([1.0, 0.85, 0.6, 0.42, 0.2, 0.0], dtype=torch.float64)
THREE_EIGHTHS = Tableau(
    "rk4_38",
    4,
    (0.0, 1 / 3, 2 / 3, 1.0),
    ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    "Kutta 1901",
)


def odeint(method: str, field: Any = None) -> Tensor:
    """As flow_matching's ODESolver calls it: torchdiffeq on the velocity, fixed steps at the given times."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    field = field or (lambda t, x: network(x, float(t)))
    return torchdiffeq.odeint(field, START, FLOW_TIMES, method=method)[-1]


@pytest.mark.parametrize(
    ("method", "solver"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun2", "heun"), ("rk4", RungeKutta(THREE_EIGHTHS))]
)
def test_flow_matching_by_torchdiffeq(agree, method: str, solver: Any) -> None:
    agree(ours(solver, FLOW, START, FLOW_TIMES), odeint(method))
    agree(ours(solver, FLOW, START, FLOW_TIMES), odeint(method, ProbabilityFlow(Linear(), FLOW)))


def test_torchdiffeq_rk4_is_the_three_eighths_rule() -> None:
    """Both are of order four; ours named "rk4" is the classical one (checked by hand below)."""
    apart = distance(ours("rk4", FLOW, START, FLOW_TIMES), odeint("rk4"))
    assert 1e-8 < apart < 1e-2


class _StoredIncrements:
    """torchsde's Brownian motion from stored normals: one increment an interval, in order."""

    def __init__(self, normals: Sequence[Tensor]) -> None:
        self.normals, self.shape = iter(normals), (BATCH, DIM)
        self.dtype, self.device, self.levy_area_approximation = torch.float64, torch.device("cpu"), "none"

    def size(self) -> tuple[int, ...]:
        return self.shape

    def __call__(self, ta: Any, tb: Any, **options: Any) -> Tensor:
        return math.sqrt(float(tb) - float(ta)) * next(self.normals)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("solver", ["euler_maruyama", "torchsde_euler"])
def test_torchsde_euler(agree, solver: str, eta: float) -> None:
    """torchsde.sdeint on our ReverseSDE, and our back end of that name, with the same increments."""
    torchsde = pytest.importorskip("torchsde")
    problem = ReverseSDE(VP(), VP_SCORE, eta)
    times = torch.linspace(1.0, 0.25, 7, dtype=torch.float64)  # spacing 1/8: sums of it are exact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bm = _StoredIncrements(NORMALS)
        theirs = torchsde.sdeint(problem, START, problem.tau(times[[0, -1]]), bm=bm, method="euler", dt=0.125)[-1]
    agree(ours(solver, VP_SCORE, START, times, eta=eta), theirs)


# ====================================================================================================================
# One and two steps by hand
# ====================================================================================================================

Hand = Callable[[Tensor, list[Level], Sequence[Tensor]], Tensor]


def velocity(x: Tensor, k: Level) -> Tensor:
    """dx/dt of the flow in the form of the score: -beta/2 (x + score)."""
    return -0.5 * k.beta * (x + vp_score(x, k))


def in_t(step: Callable[[Tensor, Level, Level], Tensor]) -> Hand:
    def hand(x: Tensor, levels: list[Level], normals: Sequence[Tensor]) -> Tensor:
        for s, t in itertools.pairwise(levels):
            x = step(x, s, t)
        return x

    return hand


def noisy(step: Callable[[Tensor, Level, Level, Tensor], Tensor]) -> Hand:
    def hand(x: Tensor, levels: list[Level], normals: Sequence[Tensor]) -> Tensor:
        for s, t, z in zip(levels, levels[1:], normals, strict=False):
            x = step(x, s, t, z)
        return x

    return hand


def hand_midpoint(x: Tensor, s: Level, t: Level) -> Tensor:
    h = t.t - s.t
    return x + h * velocity(x + 0.5 * h * velocity(x, s), vp(0.5 * (s.t + t.t)))


def hand_heun(x: Tensor, s: Level, t: Level) -> Tensor:
    h, k1 = t.t - s.t, velocity(x, s)
    return x + 0.5 * h * (k1 + velocity(x + h * k1, t))


def hand_rk4(x: Tensor, s: Level, t: Level) -> Tensor:
    h, m = t.t - s.t, vp(0.5 * (s.t + t.t))
    k1 = velocity(x, s)
    k2 = velocity(x + 0.5 * h * k1, m)
    k3 = velocity(x + 0.5 * h * k2, m)
    k4 = velocity(x + h * k3, t)
    return x + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)


def in_rho(y: Tensor, k: Level) -> Tensor:
    return at_vp(k.alpha * y, k)[1]


def hand_edm_midpoint(x: Tensor, s: Level, t: Level) -> Tensor:
    y, h, m = x / s.alpha, t.rho - s.rho, vp_at_rho(0.5 * (s.rho + t.rho))
    return t.alpha * (y + h * in_rho(y + 0.5 * h * in_rho(y, s), m))


def hand_edm_heun(x: Tensor, s: Level, t: Level) -> Tensor:
    y, h = x / s.alpha, t.rho - s.rho
    k1 = in_rho(y, s)
    return t.alpha * (y + 0.5 * h * (k1 + in_rho(y + h * k1, t)))


def hand_edm_rk4(x: Tensor, s: Level, t: Level) -> Tensor:
    y, h, m = x / s.alpha, t.rho - s.rho, vp_at_rho(0.5 * (s.rho + t.rho))
    k1 = in_rho(y, s)
    k2 = in_rho(y + 0.5 * h * k1, m)
    k3 = in_rho(y + 0.5 * h * k2, m)
    k4 = in_rho(y + h * k3, t)
    return t.alpha * (y + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4))


def hand_ddim(x: Tensor, s: Level, t: Level) -> Tensor:
    x0, eps = at_vp(x, s)
    return t.alpha * x0 + t.sigma * eps


def hand_ddpm(x: Tensor, s: Level, t: Level, z: Tensor) -> Tensor:
    """Ho et al. (2020), eqs. 6 and 7, with abar = alpha^2."""
    here, there = s.alpha**2, t.alpha**2
    beta = 1.0 - here / there
    x0 = at_vp(x, s)[0]
    mean = math.sqrt(there) * beta / (1.0 - here) * x0 + math.sqrt(1.0 - beta) * (1.0 - there) / (1.0 - here) * x
    return mean + math.sqrt((1.0 - there) / (1.0 - here) * beta) * z


def hand_ddpm_discrete(x: Tensor, s: Level, t: Level, z: Tensor) -> Tensor:
    beta = s.beta * (s.t - t.t)
    return (x + beta * vp_score(x, s)) / math.sqrt(1.0 - beta) + math.sqrt(beta) * z


def hand_euler_maruyama(x: Tensor, s: Level, t: Level, z: Tensor) -> Tensor:
    h = s.t - t.t
    return x + h * (0.5 * s.beta * x + s.beta * vp_score(x, s)) + math.sqrt(s.beta * h) * z


def hand_exponential_integrator(x: Tensor, s: Level, t: Level, z: Tensor) -> Tensor:
    """The frozen score's integral in closed form: int alpha_t/alpha_u beta_u du = 2 (alpha_t/alpha_s - 1)."""
    grow = t.alpha / s.alpha
    return grow * x + 2.0 * (grow - 1.0) * vp_score(x, s) + math.sqrt(grow**2 * s.sigma**2 - t.sigma**2) * z


def hand_edm_sde(x: Tensor, levels: list[Level], normals: Sequence[Tensor]) -> Tensor:
    """gamma = sqrt 2 - 1 for so few steps; the second step's noise is the second normal."""
    for s, t, z in zip(levels, levels[1:], normals, strict=False):
        up = vp_at_rho(math.sqrt(2.0) * s.rho)
        x = hand_edm_heun(up.alpha * (x / s.alpha + s.rho * z), up, t)
    return x


def hand_dpmpp(eta: float) -> Hand:
    """A first-order step, then one with the midpoint's slope; the exact noise of the linear part."""

    def hand(x: Tensor, levels: list[Level], normals: Sequence[Tensor]) -> Tensor:
        before: tuple[float, Tensor] | None = None
        for s, t, z in zip(levels, levels[1:], normals, strict=False):
            h, x0 = t.lam - s.lam, at_vp(x, s)[0]
            d = x0 if before is None else x0 + 0.5 * h / before[0] * (x0 - before[1])
            x = t.sigma / s.sigma * math.exp(-eta * h) * x + t.alpha * (1.0 - math.exp(-(1.0 + eta) * h)) * d
            x = x + eta * t.sigma * math.sqrt(1.0 - math.exp(-2.0 * h)) * z
            before = (h, x0)
        return x

    return hand


def hand_unipc(variant: str, full: bool) -> Hand:
    """One step is DDIM. Two: the first is corrected with weight 1/2, then DDIM again, or with ``full`` the
    second-order predictor."""

    def b(h: float) -> float:
        return -h if variant == "bh1" else math.exp(-h) - 1.0

    def hand(x: Tensor, levels: list[Level], normals: Sequence[Tensor]) -> Tensor:
        a, c = levels[:2]
        m0, h = at_vp(x, a)[0], c.lam - a.lam
        x = hand_ddim(x, a, c)
        if len(levels) == 2:
            return x
        m1 = at_vp(x, c)[0]
        x = x - c.alpha * b(h) * 0.5 * (m1 - m0)
        end = levels[2]
        h_2 = end.lam - c.lam
        x = end.sigma / c.sigma * x + end.alpha * (1.0 - math.exp(-h_2)) * m1
        return x - end.alpha * b(h_2) * 0.5 * (h_2 / h) * (m1 - m0) if full else x

    return hand


HAND: dict[str, Hand] = {
    "euler": in_t(lambda x, s, t: x + (t.t - s.t) * velocity(x, s)),
    "midpoint": in_t(hand_midpoint),
    "heun": in_t(hand_heun),
    "rk4": in_t(hand_rk4),
    "edm_euler": in_t(hand_ddim),
    "edm_midpoint": in_t(hand_edm_midpoint),
    "edm_heun": in_t(hand_edm_heun),
    "edm_rk4": in_t(hand_edm_rk4),
    "ddim": in_t(hand_ddim),
    "dpmpp_2m": hand_dpmpp(0.0),
    "dpmpp_2m_lower_final": in_t(hand_ddim),  # with one or two steps the start and the end leave order one everywhere
    "unipc_2": hand_unipc("bh2", full=False),
    "unipc_3": hand_unipc("bh2", full=False),
    "unipc_2_bh1": hand_unipc("bh1", full=False),
    "unipc_3_bh1": hand_unipc("bh1", full=False),
    "unipc_2_full": hand_unipc("bh2", full=True),
    "unipc_3_full": hand_unipc("bh2", full=True),
    "euler_maruyama": noisy(hand_euler_maruyama),
    "exponential_integrator": noisy(hand_exponential_integrator),
    "ddpm": noisy(hand_ddpm),
    "ddpm_discrete": noisy(hand_ddpm_discrete),
    "dpmpp_2m_sde": hand_dpmpp(1.0),
    "edm_sde": hand_edm_sde,
}


@pytest.mark.parametrize("times", [[0.7, 0.65], [0.4, 0.37, 0.34], [0.12, 0.05]], ids=["one", "two", "low"])
@pytest.mark.parametrize(
    "name", [n for n, e in SOLVERS.items() if n in HAND or not (e.solver.stochastic or hasattr(e.solver, "solve"))]
)
def test_one_and_two_steps_by_hand(agree, name: str, times: list[float]) -> None:
    """Every deterministic solver on a grid, and the ancestral ones. The others are compared with released code above."""
    if name not in HAND:
        pytest.skip("no hand formula yet: add one to HAND")
    agree(ours(name, VP_SCORE, START, times), HAND[name](START, [vp(t) for t in times], NORMALS))


def test_every_hand_formula_is_of_a_solver() -> None:
    assert set(HAND) <= set(SOLVERS)


@pytest.mark.parametrize("predicts", ["eps", "v", "x0", "velocity"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "unipc_2", "unipc_3", "edm_euler", "edm_heun"])
def test_a_last_step_to_clean_data_gives_x0(agree, name: str, predicts: str) -> None:
    """At alpha = 1, sigma = 0 the state is the prediction of x0 itself, and not the network's raw output."""
    score = Score(network, VP(), predicts)
    for times in ([0.6, 0.0], [0.6, 0.3, 0.0]):
        before = START if len(times) == 2 else ours(name, score, START, times[:-1])[0]
        if len(times) == 3 and name.startswith("unipc"):  # corrects the state it starts from, so it is not a function of it
            continue
        agree(ours(name, score, START, times), score.predict(before, times[-2]).x0)


# ====================================================================================================================
# Bugs of the field by name
# ====================================================================================================================

ANCESTRAL = ["ddpm", "dpmpp_2m_sde", "exponential_integrator", "euler_maruyama"]


def test_negative_root_in_ancestral_steps_of_released_formulas() -> None:
    """In float32 the released differences under the root do fall below 0: DDIM's 1 - abar' - std^2 on diffusers'
    linear table, and k-diffusion's sigma_next^2 - sigma_up^2 on a long step. What follows is NaN; the tests below
    show that ours has no such place."""
    betas = torch.linspace(1e-4, 0.02, 1000)
    products = torch.cumprod(1.0 - betas, 0)
    here, there = products[:, None], products[None, :]
    variance = (1.0 - there) / (1.0 - here) * (1.0 - here / there)
    rest = 1.0 - there - (variance**0.5) ** 2
    assert bool(((rest < 0.0) & (there > here)).any())

    sigma = torch.linspace(1.0, 80.0, 1000)
    below = 1e-4 * sigma
    up = (below**2 * (sigma**2 - below**2) / sigma**2) ** 0.5
    assert bool((below**2 - up**2 < 0.0).any())


@pytest.mark.parametrize("name", ANCESTRAL)
@pytest.mark.parametrize("path", [VP(), VE_PATH, EDM(), Linear(), SubVP(), Tabulated.linear()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_no_negative_root_in_ancestral_steps(name: str, path: Path, dtype: torch.dtype) -> None:
    """Steps between neighbouring floats of either precision, where 1 - e^{-2h} and differences of squares vanish:
    finite, and no further than the noise of such a step goes. A step too small for lambda to change is refused, not
    run."""
    score = Score(network, path, "x0")
    x, ran = START.to(dtype), 0
    kind = np.float32 if dtype == torch.float32 else np.float64
    for share in (0.999, 0.9, 0.51, 0.5, 0.2, 0.03, 0.004):
        high = kind(share * path.T)
        low = kind(np.nextafter(high, kind(0.0)))
        try:
            states = ours(name, score, x, [float(high), float(low)])
        except PathError as error:
            assert "not monotone" in str(error)  # noqa: PT017
            continue
        ran += 1
        for state in states:
            assert bool(state.isfinite().all())
            assert float((state - x).abs().max()) < 0.1 * max(1.0, float(high))
    assert ran >= 2


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde"])
def test_no_negative_root_on_long_steps(name: str) -> None:
    """The steps that break the released float32 formulas, and the longest ones there are."""
    for path, times in ((EDM(), [80.0, 8e-3]), (EDM(), [80.0, 1e-12]), (VP(), [1.0, 1e-9]), (Tabulated.linear(), [1.0, 1e-3])):
        score = Score(network, path, "x0")
        for state in ours(name, score, START.float(), times):
            assert bool(state.isfinite().all())


@pytest.mark.parametrize("name", SOLVERS)
def test_repeated_times_are_refused(name: str) -> None:
    for times in ([0.5, 0.5], [0.8, 0.5, 0.5], [0.8, 0.8, 0.5]):
        with pytest.raises(InputError, match="strictly"):
            integrate(name, VP_SCORE, START, times)
