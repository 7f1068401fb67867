"""Adapters against libraries that install: azula and flow_matching, their own conversions and their own loops, as released.

    pip install --no-deps azula==0.11.1 flow_matching==1.0.10 einops==0.8.2

(without their dependencies, which include torchvision; what is tested needs none of them but einops). Skipped where they are
not installed. One small random network stands in for a trained one: both sides must do the same with it.
"""

from __future__ import annotations

import pytest
import torch
from fake_backbones import Given, Law, Smooth, relative

from scores import adapters
from scores.adapters.flow_matching import _path
from solvers import sample

X = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
LOOP = 1e-4  # relative, float32


@pytest.fixture(scope="module")
def azula():
    pytest.importorskip("azula.denoise")
    import azula.denoise
    import azula.noise
    import azula.sample

    return azula


@pytest.fixture(scope="module")
def flow_matching():
    pytest.importorskip("flow_matching.path")
    import flow_matching.path
    import flow_matching.path.scheduler
    import flow_matching.solver
    import flow_matching.utils

    return flow_matching


SCHEDULES = ("VPSchedule", "VESchedule", "CosineSchedule", "RectifiedSchedule", "DecaySchedule")
DENOISERS = ("KarrasDenoiser", "SimpleDenoiser")


def denoiser_of(azula, schedule, denoiser, dtype=torch.float32):
    made = getattr(azula.noise, schedule)()
    net = Smooth(scale=0.3).to(dtype)
    return getattr(azula.denoise, denoiser)(net, made)


@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_azula_conversion(azula, schedule, denoiser):
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        theirs = denoiser_of(azula, schedule, denoiser, dtype)
        score = adapters.from_azula(theirs)
        for t in (0.0, 0.02, 0.5, 1.0):
            alpha, sigma = theirs.schedule(torch.tensor(t, dtype=torch.float64))
            assert float(score.path.alpha(t)) == pytest.approx(float(alpha), rel=1e-12)
            assert float(score.path.sigma(t)) == pytest.approx(float(sigma), rel=1e-12)
            x = (float(alpha) ** 2 + float(sigma) ** 2) ** 0.5 * X.to(dtype)
            mean = theirs(x, torch.tensor(t, dtype=dtype)).mean
            pair = score.predict(x, t)
            assert relative(pair.x0, mean) < tol
            # eps from x0 at the first level divides rounding by sigma = 0.001
            apart = (pair.eps - (x - alpha.to(dtype) * mean) / sigma.to(dtype)).abs().max()
            assert float(apart.detach()) < tol * float(x.abs().max() / sigma)
        times = torch.tensor([0.1, 0.5, 0.9], dtype=dtype)
        assert relative(score.predict(X.to(dtype), times).x0, theirs(X.to(dtype), times).mean) < tol


def test_azula_gaussian_denoiser_wants_scalar_times(azula):
    """It is exact, so is the closed form; and it takes times of shape () only, which is what it is given."""
    from azula.linalg.covariance import DiagonalCovariance

    law = Law(0)
    variances = 0.3 + torch.arange(8, dtype=torch.float64).reshape(2, 2, 2) / 10
    theirs = azula.denoise.GaussianDenoiser(law.mean.reshape(2, 2, 2), DiagonalCovariance(variances), azula.noise.VPSchedule())
    score = adapters.from_azula(theirs)
    x = X.double()
    law.cov = torch.diag(variances.flatten())
    a, s = float(score.path.alpha(0.4)), float(score.path.sigma(0.4))
    assert relative(score.predict(x, 0.4).x0, law.posterior(x, a, s)[0]) < 1e-10


#: azula's samplers and the solvers that take the same steps.
AZULA_LOOPS = {
    "EulerSampler": ("ddim", {}),
    "DDIMSampler": ("ddim", {}),
    "HeunSampler": ("edm_heun", {}),
    "zABSampler": ("deis_rho_2", {"order": 2}),
    "zABSampler 3": ("deis_rho_3", {"order": 3}),
    "xEABSampler": ("dpmpp_2m_heun", {"order": 2}),
    "xEABSampler 3": ("dpmpp_3m", {"order": 3}),
}


@pytest.mark.parametrize("name", AZULA_LOOPS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_azula_loops(azula, schedule, name):
    """From t = 1 to t = 0 in 12 steps. The cosine schedule in float32 has cos near pi/2 to 6e-8 and so alpha(1) = 0.001 to
    6e-5, which Heun's first step shows (5e-4 of the result); in float64 the two loops are one.
    """
    solver, options = AZULA_LOOPS[name]
    for dtype, tol in ((torch.float32, LOOP), (torch.float64, 1e-10)):
        theirs = denoiser_of(azula, schedule, "KarrasDenoiser", dtype)
        score = adapters.from_azula(theirs)
        x = X.to(dtype) * score.path.prior_std()
        sampler = getattr(azula.sample, name.partition(" ")[0])(theirs, steps=12, silent=True, dtype=dtype, **options)
        ours = sample(score, x=x, solver=solver, grid="uniform", steps=12, stop=0.0)
        assert ours.nfe == (24 if solver == "edm_heun" else 12)
        if (schedule, name, dtype) == ("CosineSchedule", "HeunSampler", torch.float32):
            tol = 1e-3
        assert relative(ours.x, sampler(x)) < tol


@pytest.mark.parametrize(("name", "solver"), [("DDPMSampler", "ddpm"), ("ItoSampler", "exponential_euler_sde")])
def test_azula_stochastic_loops(azula, monkeypatch, name, solver):
    theirs = denoiser_of(azula, "VPSchedule", "KarrasDenoiser")
    score = adapters.from_azula(theirs)
    normals = list(torch.randn(12, *X.shape, generator=torch.Generator().manual_seed(1)))
    given = iter(normals)
    monkeypatch.setattr(torch, "randn_like", lambda x: next(given))
    sampler = getattr(azula.sample, name)(theirs, steps=12, silent=True)
    ours = sample(score, x=X, solver=solver, grid="uniform", steps=12, stop=0.0, noise=Given(normals))
    assert relative(ours.x, sampler(X)) < LOOP


# --- flow_matching ----------------------------------------------------------------------------------------------------


def schedulers(flow_matching):
    all_of = flow_matching.path.scheduler
    return {
        "CondOT": all_of.CondOTScheduler(),
        "Cosine": all_of.CosineScheduler(),
        "VP": all_of.VPScheduler(0.1, 18.0),
        "LinearVP": all_of.LinearVPScheduler(),
        "Polynomial 2": all_of.PolynomialConvexScheduler(2),
        "Polynomial 3": all_of.PolynomialConvexScheduler(3.0),
        "Polynomial 1": all_of.PolynomialConvexScheduler(1),
    }


SCHEDULERS = ("CondOT", "Cosine", "VP", "LinearVP", "Polynomial 1", "Polynomial 2", "Polynomial 3")


def wrapped(flow_matching, dtype=torch.float32):
    class Model(flow_matching.utils.ModelWrapper):
        def forward(self, x, t, **extras):
            return self.model(x, t.expand(len(x)), **extras)

    return Model(Smooth(classes=4).to(dtype))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_flow_matching_conversion(flow_matching, name):
    scheduler = schedulers(flow_matching)[name]
    theirs = flow_matching.path.AffineProbPath(scheduler)
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        model = wrapped(flow_matching, dtype)
        score = adapters.from_flow_matching(model, scheduler)
        x = X.to(dtype)
        for t in (0.1, 0.5, 0.95):
            u = torch.tensor(1 - t, dtype=dtype)
            velocity = model(x=x, t=u)
            pair = score.predict(x, t)
            size = float(max(pair.x0.abs().max(), pair.eps.abs().max()))  # of what cancels in each
            assert float((pair.x0 - theirs.velocity_to_target(velocity, x, u)).abs().max()) < tol * size
            assert float((pair.eps - theirs.velocity_to_epsilon(velocity, x, u)).abs().max()) < tol * size


@pytest.mark.parametrize("name", SCHEDULERS)
def test_flow_matching_paths_named_and_read_are_one(flow_matching, name):
    """A scheduler that is known by name has an exact path; the same one under another name is read by calling it."""
    scheduler = schedulers(flow_matching)[name]
    renamed = type("Other", (type(scheduler),), {})
    other = object.__new__(renamed)
    vars(other).update(vars(scheduler))
    known, read = _path(scheduler), _path(other)
    t = torch.linspace(0.01, 0.99, 11, dtype=torch.float64)
    for fn in ("alpha", "sigma", "dalpha", "dsigma", "lam"):
        assert relative(getattr(read, fn)(t), getattr(known, fn)(t)) < 1e-9


LOOPS = [("euler", "euler", 1), ("midpoint", "midpoint", 2), ("rk4", "rk38", 4), ("heun3", "heun3", 3)]


@pytest.mark.parametrize(("method", "solver", "calls"), LOOPS, ids=[m for m, _, _ in LOOPS])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_flow_matching_loops(flow_matching, name, method, solver, calls):
    """ODESolver.sample from noise at u = 0 (or where our path of a polynomial begins) to u = 0.99, and the same steps of ours.

    torchdiffeq's 'rk4' is the 3/8 rule.
    """
    scheduler, model, n = schedulers(flow_matching)[name], wrapped(flow_matching), 9
    score = adapters.from_flow_matching(model, scheduler)
    label = torch.tensor([1, 3, 0])
    start, stop = score.path.T, 0.01
    grid = torch.linspace(1 - start, 1 - stop, n + 1)
    theirs = flow_matching.solver.ODESolver(model).sample(X, step_size=None, method=method, time_grid=grid, y=label)
    options = {"grid": "uniform", "steps": n, "start": start, "stop": stop, "conditions": {"y": label}}
    ours = sample(score, x=X, solver=solver, **options)
    assert ours.nfe == n * calls
    assert relative(ours.x, theirs) < LOOP


def test_flow_matching_euler_to_data(flow_matching):
    """The usual call: step_size 1/N, from u = 0 to u = 1."""
    model = wrapped(flow_matching)
    theirs = flow_matching.solver.ODESolver(model).sample(X, step_size=0.1, method="euler")
    ours = sample(adapters.from_flow_matching(model), x=X, solver="euler", grid="uniform", steps=10, stop=0.0)
    assert relative(ours.x, theirs) < 1e-5
    fine = flow_matching.solver.ODESolver(model).sample(X, step_size=0.002, method="midpoint")
    for solver, tol in (("dpmpp_2m", 3e-3), ("heun", 3e-4)):  # other methods, the same flow
        mine = sample(adapters.from_flow_matching(model), x=X, solver=solver, grid="uniform", steps=60, stop=0.0)
        assert relative(mine.x, fine) < tol
