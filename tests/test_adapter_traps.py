"""What goes wrong between a network and a sampler, family by family: each known trap is one test."""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import math
import pathlib
from types import SimpleNamespace

import pytest
import torch
from fake_backbones import (
    COSINE_4000,
    DDPM_1000,
    FAMILIES,
    FLOWS,
    LINEAR_1000,
    SD_1000,
    Given,
    Law,
    Smooth,
    backbone,
    cosine_log_snr,
    edm_f,
    edm_in,
    flow_network,
    in_table,
    linear_log_snr,
    of,
    relative,
    scheduler,
    sub_vp,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scores import Gaussian, Score, adapters
from scores.adapters._labels import RULES, table_label
from scores.adapters.edm import rounded
from scores.adapters.guided_diffusion import respaced, space_timesteps
from sde import EDM, VE, VP, Cosine, Linear, ReverseSDE, SubVP, Tabulated
from sde.errors import InputError, NetworkError, PathError, TrainModeWarning
from sde.prediction import Predictor, Tally
from solvers import GRIDS, integrate, sample
from solvers.learned_variance import LearnedVariance


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


X = noise(3, 2, 2, 2)


class Recorder:
    """A network that keeps what it was called with and returns zeros."""

    def __init__(self, channels=1):
        self.calls, self.channels = [], channels

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        x = next(a for a in (*args, kwargs.get("x")) if a is not None and a.dim() > 1)
        return torch.zeros_like(torch.cat([x] * self.channels, 1))

    @property
    def label(self):
        return self.calls[-1][0][1]


# --- labels of a table ------------------------------------------------------------------------------------------------

TABLE = Tabulated.linear(50, 0.002, 0.3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "path",
    [TABLE, Tabulated.linear(1000), Tabulated.squared_cosine(4000), Tabulated.linear(7, 0.1, 0.4, zero_terminal_snr=True)],
)
def test_at_the_entries_every_rule_gives_the_entry(path, rule):
    """Also where N ((k + 1)/N) - 1 is an ulp below k, where truncation would give k - 1."""
    k = torch.arange(len(path.betas))
    label = table_label(path, rule)(path.time_of(k))
    assert torch.equal(label.double(), k.double())
    assert label.is_floating_point() == (rule in ("linear", "log"))


@settings(max_examples=30)
@given(u=st.floats(0.021, 0.999))
def test_between_the_entries_each_rule_is_its_library_s(u):
    t = torch.tensor(u, dtype=torch.float64)
    acp = TABLE.alphas_cumprod
    alpha, level = float(TABLE.alpha(u)), -float(TABLE.lam(u))
    k = int((torch.sqrt(acp) > alpha).sum()) - 1  # the entry below
    if abs(u * 50 - round(u * 50)) < 1e-6:
        return
    levels = torch.log((1 - acp) / acp) / 2
    at = {rule: float(table_label(TABLE, rule)(t)) for rule in RULES}
    # dpm-solver: log alpha is linear in the index
    logs = torch.log(acp) / 2
    assert at["linear"] == pytest.approx(k + float((math.log(alpha) - logs[k]) / (logs[k + 1] - logs[k])), abs=1e-9)
    # k-diffusion's sigma_to_t, quantize off and on
    w = float((level - levels[k]) / (levels[k + 1] - levels[k]))
    assert at["log"] == pytest.approx(k + w, abs=1e-9)
    if abs(w - 0.5) > 1e-6:
        assert at["nearest"] == int((level - levels).abs().argmin())
    # azula's ADM plugin: searchsorted on sqrt(1 - acp); score_sde: long()
    assert at["ceil"] == int(torch.searchsorted(torch.sqrt(1 - acp), torch.sqrt(1 - torch.tensor(alpha) ** 2)))
    assert at["floor"] == k == int(at["linear"])


def test_labels_below_the_first_entry_and_of_a_table_that_ends_at_alpha_zero():
    for rule in RULES:
        assert float(table_label(TABLE, rule)(torch.tensor(0.001, dtype=torch.float64))) == 0.0
    zero = Tabulated.linear(7, 0.1, 0.4, zero_terminal_snr=True)
    t = torch.tensor([6.5 / 7, 1 - 1e-7], dtype=torch.float64)
    assert table_label(zero, "linear")(t).tolist() == pytest.approx([5.5, 6 - 7e-7])
    assert table_label(zero, "log")(t).tolist() == [5.0, 5.0]  # the last level is infinite
    assert table_label(zero, "ceil")(t).tolist() == [6, 6]


def test_labels_of_a_respaced_and_rescaled_table():
    path = Tabulated((0.1, 0.2, 0.3))
    t = torch.tensor([1 / 3, 0.5, 2 / 3, 1.0], dtype=torch.float64)
    assert table_label(path, "linear", [10, 20, 50])(t).tolist() == pytest.approx([10, 15, 20, 50])
    assert table_label(path, "floor", [10, 20, 50])(t).tolist() == [10, 10, 20, 50]
    assert table_label(path, "floor", [10, 20, 50])(t).dtype == torch.int64
    assert table_label(path, "ceil", [10, 20, 50], factor=0.25)(t).tolist() == [2.5, 5.0, 5.0, 12.5]
    with pytest.raises(InputError, match="rule='nearst' is unknown: did you mean 'nearest'"):
        table_label(path, "nearst")
    with pytest.raises(InputError, match=r"entries has shape \(2,\): give one label for each of the 3 entries"):
        table_label(path, "linear", [1, 2])


# --- EDM --------------------------------------------------------------------------------------------------------------


class FakeEDM(nn.Module):
    """The outside of an EDM network: float32 inside, one-hot labels reshaped to (-1, label_dim), sigma of any shape."""

    def __init__(self, label_dim=0, **attributes):
        super().__init__()
        self.net, self.label_dim = Smooth(), label_dim
        self.embed = nn.Linear(max(label_dim, 1), 8)
        vars(self).update(attributes)
        self.forced = []

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        self.forced.append(force_fp32)
        x, sigma = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        f = self.net(x / (sigma**2 + 0.25).sqrt(), sigma.log().flatten() / 4)
        if self.label_dim:
            labels = (
                torch.zeros(1, self.label_dim) if class_labels is None else class_labels.float().reshape(-1, self.label_dim)
            )
            f = f + self.embed(labels).reshape(-1, 2, 2, 2)
        return 0.25 / (sigma**2 + 0.25) * x + sigma * 0.5 / (sigma**2 + 0.25).sqrt() * f


class FakeIDDPM(FakeEDM):
    """Rounds to the 1000 levels of ``iDDPMPrecond``: u_{j-1}^2 = (u_j^2 + 1) / max(bar_{j-1} / bar_j, C_1) - 1."""

    def __init__(self):
        super().__init__()
        u = torch.zeros(1001)
        bar = torch.sin(0.5 * math.pi * torch.arange(1001) / 1000 / 1.008) ** 2
        for j in range(1000, 0, -1):
            u[j - 1] = ((u[j] ** 2 + 1) / (bar[j - 1] / bar[j]).clip(min=0.001) - 1).sqrt()
        self.u, self.sigma_min, self.sigma_max = u, float(u[999]), float(u[0])

    def round_sigma(self, sigma):
        sigma = torch.as_tensor(sigma)
        index = (sigma.reshape(-1, 1).float() - self.u).abs().argmin(1)
        return self.u[index].to(sigma.dtype).reshape(sigma.shape)


def test_edm_takes_sigma_itself_and_the_ends_that_the_network_supports():
    net = FakeEDM(sigma_min=0.02, sigma_max=100.0, round_sigma=lambda s: s)  # VEPrecond
    score = adapters.from_edm(net)
    assert (score.path.t_min, score.path.T) == (0.02, 80.0)
    assert adapters.from_edm(net, sigma_max=1e9).path.T == 100.0
    assert (adapters.from_edm(FakeEDM(sigma_min=0, sigma_max=math.inf)).path.T) == 80.0  # EDMPrecond
    edm2 = adapters.from_edm(FakeEDM())  # states no ends and cannot round
    assert (edm2.path.t_min, edm2.path.T) == (0.002, 80.0)
    recorder = Recorder()
    adapters.from_edm(recorder).predict(X, 3.7)
    assert recorder.label.tolist() == pytest.approx([3.7] * 3)
    out = edm2.predict(X, 3.7)
    assert out.x0.dtype == torch.float64  # of a float32 network, in the state's dtype
    assert relative(out.x0, edm2.network(X.float(), torch.tensor([3.7]))) < 1e-6


def test_edm_class_labels_are_one_hot():
    net = FakeEDM(label_dim=3)
    score = adapters.from_edm(net)
    labels = torch.tensor([0, 2, 1])
    # B = label_dim integers would pass for one row of a label, without an error in the network
    assert net(X, torch.ones(3), labels).shape == X.shape
    with pytest.raises(InputError, match=r"int64 of shape \(3,\): give one-hot floats \(B, 3\), torch.nn.functional.one_hot"):
        score.predict(X, 1.0, class_labels=labels)
    one_hot = nn.functional.one_hot(labels, 3).float()
    assert relative(score.predict(X, 1.0, class_labels=one_hot).x0, net(X, torch.ones(3), one_hot)) < 1e-6
    assert relative(score.predict(X, 1.0).x0, net(X, torch.ones(3), torch.zeros(3, 3))) < 1e-6  # none is zeros
    with pytest.raises(InputError, match=r"float32 of shape \(3, 4\)"):
        score.predict(X, 1.0, class_labels=torch.zeros(3, 4))
    adapters.from_edm(net, conditions={"class_labels": one_hot, "force_fp32": True}).predict(X, 1.0)
    assert net.forced[-1] is True


def edm_sampler(net, latents, num_steps, sigma_min=0.002, sigma_max=80.0, rho=7):
    """Algorithm 1 of Karras et al. 2022 with the published handling of the ends and of rounding."""
    sigma_min, sigma_max = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    i = torch.arange(num_steps, dtype=torch.float64)
    t = (sigma_max ** (1 / rho) + i / (num_steps - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    t = torch.cat([net.round_sigma(t), torch.zeros(1)])
    x = latents * t[0]
    for i, (now, then) in enumerate(itertools.pairwise(t)):
        slope = (x - net(x, now).double()) / now
        new = x + (then - now) * slope
        if i < num_steps - 1:
            new = x + (then - now) * 0.5 * (slope + (new - net(new, then).double()) / then)
        x = new
    return x


def test_edm_iddpm_rounds_its_grid():
    net = FakeIDDPM()
    score = adapters.from_edm(net)
    assert score.path.t_min == pytest.approx(0.0064, abs=1e-4)
    assert pytest.approx(80.204, abs=1e-3) == score.path.T
    grid = rounded(net, GRIDS["karras"])
    latents = noise(2, 2, 2, 2)
    with torch.no_grad():
        theirs = edm_sampler(net, latents, 7)
    start = float(net.round_sigma(torch.tensor(80.0)))
    ours = sample(score, x=latents * start, solver="edm_heun", grid=grid, steps=7, start=80.0, stop=0.0)
    assert set(ours.times[:-1].float().tolist()) <= set(net.u.tolist())
    assert relative(ours.x, theirs) < 1e-5
    assert ours.nfe == 13
    off = sample(score, x=latents * start, solver="edm_heun", grid="karras", steps=7, stop=0.0)
    assert not set(off.times[1:-2].float().tolist()) & set(net.u.tolist())
    with pytest.raises(InputError, match="round to the same level"):
        sample(score, shape=(1, 2, 2, 2), grid=grid, steps=900, start=80.0)


# --- score_sde --------------------------------------------------------------------------------------------------------


def test_score_sde_labels():
    recorder = Recorder()
    adapters.from_score_sde(recorder, VP())(X, 0.3)
    assert recorder.label.tolist() == pytest.approx([299.7] * 3)
    adapters.from_score_sde(recorder, SubVP())(X, 0.3)
    assert recorder.label.tolist() == pytest.approx([299.7] * 3)
    adapters.from_score_sde(recorder, VE(0.01, 50.0))(X, 0.3)
    assert recorder.label.tolist() == pytest.approx([0.01 * 5000**0.3] * 3)
    # discrete VE: rounded integers, the largest sigma first
    ve = adapters.from_score_sde(recorder, VE(0.01, 50.0), discrete=1000)
    for t, k in ((1.0, 0), (0.0, 999), (0.7496, 250)):
        ve(X, t)
        assert recorder.label.tolist() == [k] * 3
        assert recorder.label.dtype == torch.int64
    floor = adapters.from_score_sde(recorder, VP(), discrete=1000, rule="floor")
    floor(X, float(floor.path.time_of(41.9)))
    assert recorder.label.tolist() == [41] * 3
    assert recorder.label.dtype == torch.int64


def test_score_sde_sub_vp_has_the_variance_and_not_its_root():
    """std = 1 - exp(2 lmc): with VP's path in its place the score would be wrong by the factor sqrt(1 - alpha^2)."""
    law = Law(0)
    network = backbone(law, lambda k: sub_vp(k / 999), lambda a, s, x, x0, eps: eps)
    a, s = sub_vp(torch.tensor(0.2, dtype=torch.float64))
    truth = -law.posterior(X, a, s)[1] / s
    assert relative(adapters.from_score_sde(network, SubVP())(X, 0.2), truth) < 1e-12
    assert relative(adapters.from_score_sde(network, VP())(X, 0.2), truth * s**0.5) < 1e-12


def test_score_sde_discrete_vp_truncates_between_its_entries():
    """get_score_fn divides by the sigma of the truncated index: right at the entries, where we agree, and nowhere else."""
    law = Law(1)
    net = backbone(law, in_table(DDPM_1000), lambda a, s, x, x0, eps: eps)
    score = adapters.from_score_sde(net, VP(), discrete=1000)
    std = torch.sqrt(1 - torch.cumprod(1 - DDPM_1000, 0))

    def get_score_fn(label):
        return -net(X, torch.full((3,), label, dtype=torch.float64)) / std[int(label)]

    for k in (0, 7, 500, 999):
        assert relative(score(X, float(score.path.time_of(k))), get_score_fn(float(k))) < 1e-10
    worst = 0.0
    for t in torch.linspace(1.0, 1e-3, 1000, dtype=torch.float64)[[1, 300, 995, 998]].tolist():  # their sampler's times
        label = t * 999
        a, s = in_table(DDPM_1000)(torch.tensor(label, dtype=torch.float64))
        truth = -law.posterior(X, a, s)[1] / s
        assert relative(score(X, float(score.path.time_of(label))), truth) < 1e-10
        worst = max(worst, relative(get_score_fn(label), truth))
    assert 0.2 < worst < 0.5
    with pytest.raises(InputError, match="score_sde has no discrete sub-VP"):
        adapters.from_score_sde(net, SubVP(), discrete=1000)


def test_score_sde_takes_the_library_s_objects():
    net = Smooth()
    assert adapters.from_score_sde(net, of("VPSDE", beta_0=0.2, beta_1=10)).path == VP(0.2, 10.0)
    assert adapters.from_score_sde(net, of("subVPSDE", beta_0=0.2, beta_1=10)).path == SubVP(0.2, 10.0)
    assert adapters.from_score_sde(net, of("VESDE", sigma_min=0.02, sigma_max=30)).path == VE(0.02, 30.0)
    with pytest.raises(InputError, match="give VP"):
        adapters.from_score_sde(net, EDM())
    for bad in (True, 1, 2.5):
        with pytest.raises(InputError, match="discrete="):
            adapters.from_score_sde(net, VP(), discrete=bad)


# --- guided_diffusion, improved_diffusion -----------------------------------------------------------------------------


def diffusion(betas, **attributes):
    """What (Spaced)GaussianDiffusion shows of itself."""
    kind = attributes.pop("mean", "EPSILON")
    var = attributes.pop("var", "LEARNED_RANGE")
    return of(
        "SpacedDiffusion",
        betas=betas.numpy(),
        model_mean_type=SimpleNamespace(name=kind),
        model_var_type=SimpleNamespace(name=var),
        **attributes,
    )


def test_guided_diffusion_index_is_whole_or_rescaled():
    recorder = Recorder(channels=2)
    score = adapters.from_guided_diffusion(recorder)
    score(X, 1.0)
    assert recorder.label.tolist() == [999.0] * 3
    score(X, score.path.t_min)
    assert recorder.label.tolist() == [0.0] * 3
    adapters.from_guided_diffusion(recorder, rule="nearest")(X, 0.5004)
    assert recorder.label.tolist() == [499] * 3
    assert recorder.label.dtype == torch.int64
    improved = adapters.from_improved_diffusion(recorder, Tabulated.squared_cosine(4000))
    improved(X, 1.0)
    assert recorder.label.tolist() == [3999 / 4] * 3
    adapters.from_improved_diffusion(recorder, Tabulated.squared_cosine(4000), rescale_timesteps=False)(X, 1.0)
    assert recorder.label.tolist() == [3999.0] * 3
    assert "diffusion" in inspect.signature(adapters.from_improved_diffusion).parameters  # no table is guessed
    with pytest.raises(TypeError):
        adapters.from_improved_diffusion(recorder)


def test_guided_diffusion_class_labels_go_exactly_where_the_network_has_classes():
    def network(num_classes):
        def call(x, timesteps, y=None):
            if (y is not None) != (num_classes is not None):
                raise AssertionError("must specify y if and only if the model is class-conditional")
            return torch.cat([x, x], 1)

        return call

    y = torch.tensor([1, 2, 3])
    adapters.from_guided_diffusion(network(10)).predict(X, 0.5, y=y)
    adapters.from_guided_diffusion(network(10), conditions={"y": y}).predict(X, 0.5)
    adapters.from_guided_diffusion(network(None)).predict(X, 0.5)
    with pytest.raises(NetworkError, match="if and only if the model is class-conditional"):
        adapters.from_guided_diffusion(network(10)).predict(X, 0.5)
    with pytest.raises(NetworkError, match="if and only if the model is class-conditional"):
        adapters.from_guided_diffusion(network(None)).predict(X, 0.5, y=y)


def test_respacing_lists_the_published_entries():
    assert space_timesteps(1000, "50") == tuple(round(i * 999 / 49) for i in range(50))
    assert space_timesteps(1000, "ddim50") == tuple(range(0, 1000, 20))
    assert space_timesteps(1000, "ddim25")[-1] == 960  # not the last entry
    assert space_timesteps(1000, [1000]) == tuple(range(1000))
    three = space_timesteps(300, "10,15,20")  # the docstring's example: strides within each third
    assert [len([k for k in three if low <= k < low + 100]) for low in (0, 100, 200)] == [10, 15, 20]
    assert three[:2] == (0, 11)
    assert three[10] == 100
    assert three[-1] == 299
    assert space_timesteps(10, [1, 1]) == (0, 5)
    assert space_timesteps(11, [3, 2]) == (0, 2, 5, 6, 10)  # the odd entry goes to the first section
    with pytest.raises(InputError, match="no integer stride visits 30 of 40 entries; give '30'"):
        space_timesteps(40, "ddim30")
    with pytest.raises(InputError, match="section 2 has 5 entries, so it cannot give 6"):
        space_timesteps(10, "2,6")
    with pytest.raises(InputError, match="give 'ddim50', '250'"):
        space_timesteps(10, "many")
    with pytest.raises(InputError, match="give steps=10 alone"):
        sample(adapters.from_guided_diffusion(Smooth()), shape=(1, 2, 2, 2), grid=respaced("10"), steps=9)
    with pytest.raises(InputError, match="respacing chooses entries of a table"):
        sample(adapters.from_sit(Smooth()), shape=(1, 2, 2, 2), grid=respaced("10"), steps=10)


def test_a_respaced_table_is_the_whole_table_at_some_of_its_times():
    net, betas = Smooth(out=4, scale=0.01).double(), COSINE_4000
    entries = space_timesteps(4000, "6,3")
    acp = torch.cumprod(1 - betas, 0)[list(entries)]
    new = 1 - acp / torch.cat([torch.ones(1, dtype=torch.float64), acp[:-1]])
    theirs = diffusion(new, timestep_map=list(entries), rescale_timesteps=True, original_num_steps=4000)
    small = adapters.from_improved_diffusion(net, theirs)
    whole = adapters.from_improved_diffusion(net, diffusion(betas, rescale_timesteps=True))
    assert len(small.path.betas) == 9
    assert len(whole.path.betas) == 4000
    for i in (0, 4, 8):
        ours = [s.predict(X, float(s.path.time_of(k))) for s, k in ((small, i), (whole, entries[i]))]
        assert relative(ours[0].eps, ours[1].eps) < 1e-9
        assert net.seen[-1].tolist() == pytest.approx([entries[i] / 4] * 3) == net.seen[-2].tolist()
    z = list(noise(9, 3, 2, 2, 2, seed=3))
    runs = [
        sample(small, x=X, solver=LearnedVariance(), grid="uniform", steps=9, stop=0.0, noise=Given(z)).x,
        sample(whole, x=X, solver=LearnedVariance(), grid=respaced("6,3"), steps=9, noise=Given(z)).x,
    ]
    assert relative(*runs) < 1e-6  # a respaced beta near 1 keeps eight digits of 1 - beta


def test_guided_diffusion_objects_say_what_is_predicted():
    net = Smooth(out=4).double()
    assert adapters.from_guided_diffusion(net, diffusion(LINEAR_1000, mean="START_X")).predicts == "x0"
    assert adapters.from_guided_diffusion(net, diffusion(LINEAR_1000)).predicts == "eps"
    with pytest.raises(InputError, match="PREVIOUS_X"):
        adapters.from_guided_diffusion(net, diffusion(LINEAR_1000, mean="PREVIOUS_X"))
    with pytest.raises(InputError, match="give a Tabulated path or an object with betas"):
        adapters.from_guided_diffusion(net, VP())
    # LEARNED is a log variance, not a place between bounds: its eps is used, its variance cannot be
    score = adapters.from_guided_diffusion(net, diffusion(LINEAR_1000, var="LEARNED"))
    assert relative(score.predict(X, 0.5).eps, net(X, torch.tensor([499.0]))[:, :2]) < 1e-9
    with pytest.raises(NetworkError, match="no learned variance"):
        sample(score, shape=(1, 2, 2, 2), solver=LearnedVariance(), steps=2)


# --- k-diffusion ------------------------------------------------------------------------------------------------------


class TableDenoiser(nn.Module):
    """k-diffusion's wrapper of an eps network with 2C channels (OpenAIDenoiser)."""

    def __init__(self, inner, acp, quantize):
        super().__init__()
        self.inner, self.quantize = inner, quantize
        self.sigmas = torch.sqrt((1 - acp) / acp)

    @property
    def sigma_min(self):
        return self.sigmas[0]

    @property
    def sigma_max(self):
        return self.sigmas[-1]

    def sigma_to_t(self, sigma):
        apart = sigma.log() - self.sigmas.log()[:, None]
        if self.quantize:
            return apart.abs().argmin(0)
        low = apart.ge(0).cumsum(0).argmax(0).clamp(max=len(self.sigmas) - 2)
        below, above = self.sigmas.log()[low], self.sigmas.log()[low + 1]
        w = ((below - sigma.log()) / (below - above)).clamp(0, 1)
        return (1 - w) * low + w * (low + 1)

    def forward(self, x, sigma, **kwargs):
        s = sigma.reshape(-1, 1, 1, 1)
        return x - s * self.inner(x / torch.sqrt(s**2 + 1), self.sigma_to_t(sigma), **kwargs)[:, :2]


@pytest.mark.parametrize("quantize", [False, True])
def test_k_diffusion_wrappers_and_their_rules(quantize):
    """A wrapped network on EDM(), and the bare one on its own table by the same rule, are one score in two coordinates."""
    net = Smooth(out=4, scale=0.02).double()
    wrapped = TableDenoiser(net, torch.cumprod(1 - LINEAR_1000, 0), quantize)
    score = adapters.from_k_diffusion(wrapped)
    bare = adapters.from_guided_diffusion(net, rule="nearest" if quantize else "log")
    assert score.path == EDM(T=float(wrapped.sigma_max), t_min=float(wrapped.sigma_min))
    for sigma in (0.05, 1.234, 40.0):
        t = float(bare.path.time(-math.log(sigma)))
        x0 = score.predict(X, sigma).x0
        assert relative(x0, bare.predict(X * float(bare.path.alpha(t)), t).x0) < 1e-8
        assert relative(x0, wrapped(X, torch.full((3,), sigma, dtype=torch.float64))) < 1e-12
    assert net.seen[-1].is_floating_point() != quantize
    assert adapters.from_k_diffusion(Recorder()).path == EDM(T=80.0, t_min=0.002)
    assert adapters.from_k_diffusion(wrapped, sigma_min=0.1, sigma_max=10.0).path == EDM(T=10.0, t_min=0.1)


def test_k_diffusion_v_and_extra_args():
    """VDenoiser's network is a v-diffusion network: label atan(sigma) 2/pi."""
    net = Smooth(scale=3.0, classes=5).double()

    def v_denoiser(x, sigma, **extra):
        s = sigma.reshape(-1, 1, 1, 1)
        root = torch.sqrt(s**2 + 1)
        return x / root**2 - s / root * net(x / root, torch.atan(sigma) / math.pi * 2, **extra)

    y = torch.tensor([0, 1, 4])
    score, bare = adapters.from_k_diffusion(v_denoiser, conditions={"y": y}), adapters.from_v_diffusion(net)
    for sigma in (0.05, 1.0, 40.0):
        t = math.atan(sigma) / math.pi * 2
        x0 = bare.predict(X / math.hypot(1.0, sigma), t, y=y).x0
        assert relative(score.predict(X, sigma).x0, x0) < 1e-10
    assert relative(score.predict(X, 1.0, y=y * 0).x0, score.predict(X, 1.0).x0) > 1e-3  # per call overrides


# --- DiT, SiT ---------------------------------------------------------------------------------------------------------


class FakeDiT(Smooth):
    """DiT's and SiT's guidance: on three channels of the four."""

    def forward_with_cfg(self, x, t, y, cfg_scale):
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        eps, rest = out[:, :3], out[:, 3:]
        cond, uncond = eps.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], 1)


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_dit_and_sit_guide_three_channels(family):
    net = FakeDiT(channels=4, out=8 if family == "dit" else 4, scale=0.01 if family == "dit" else 1.0, classes=10).double()
    make = adapters.from_dit if family == "dit" else adapters.from_sit
    y, x = torch.tensor([3, 1, 4]), noise(3, 4, 2, 2)
    t, label = (0.5, 499.0) if family == "dit" else (0.3, 0.7)
    guided, plain = make(net, cfg_scale=4.0, null=10), make(net)
    labels = torch.full((3,), label, dtype=torch.float64)
    cond, null = net(x, labels, y), net(x, labels, torch.full((3,), 10))
    raw, _ = guided.raw(x, t, y=y)
    assert relative(raw[:, :3], (null + 4.0 * (cond - null))[:, :3]) < 1e-12
    assert relative(raw[:, 3], cond[:, 3]) < 1e-12
    assert relative(plain.raw(x, t, y=y)[0], cond[:, :4]) < 1e-12
    run = sample(guided, x=x, solver="dpmpp_2m", nfe=3, grid="uniform", start=0.9, conditions={"y": y})
    assert (run.nfe, run.net_evals) == (3, 6)
    assert sample(plain, x=x, nfe=3, grid="uniform", start=0.9, conditions={"y": y}).net_evals == 3
    if family == "dit":  # the variance is that of the labels
        t2 = float(guided.path.time_of(400))
        steps = [
            integrate(LearnedVariance(), guided, x, [t, t2], noise=Given([f * torch.ones_like(x)]), conditions={"y": y}).x
            for f in (0.0, 1.0)
        ]
        own = [
            integrate(LearnedVariance(), plain, x, [t, t2], noise=Given([f * torch.ones_like(x)]), conditions={"y": y}).x
            for f in (0.0, 1.0)
        ]
        assert relative(steps[1] - steps[0], own[1] - own[0]) < 1e-9
    with pytest.raises(InputError, match="cannot be called as network"):
        guided.predict(x, t)  # y is missing
    with pytest.raises(InputError, match="has no forward_with_cfg; guide the score instead"):
        make(Smooth(), cfg_scale=2.0)


def test_sit_time_runs_from_noise_to_data_and_num_steps_counts_points():
    net = Smooth().double()
    score = adapters.from_sit(net)
    score.predict(X, 0.9)
    assert net.seen[-1].tolist() == pytest.approx([0.1] * 3)
    u = torch.linspace(0, 1, 9, dtype=torch.float64)  # num_steps = 9
    x = X
    with torch.no_grad():
        for now, then in itertools.pairwise(u):
            x = x + (then - now) * net(x, now.expand(3))
    assert relative(sample(score, x=X, solver="euler", steps=8, grid="uniform", stop=0.0).x, x) < 1e-12
    with pytest.raises(InputError, match="path_type='linear' is unknown: did you mean 'Linear'"):
        adapters.from_sit(net, "linear")
    with pytest.raises(InputError, match="prediction='eps' is unknown"):
        adapters.from_sit(net, prediction="eps")


def test_sit_diffusion_w_is_half_of_g_squared():
    """dx = (v + w s) du + sqrt(2 w) dW in its time u is our reverse SDE of diffusion sqrt(2 w)."""
    net = Smooth().double()
    score = adapters.from_sit(net)
    w, t = (lambda u: 0.25 * (math.cos(math.pi * u) + 1) ** 2), 0.6  # its "decreasing"
    ours = ReverseSDE(score.path, score, diffusion=lambda t: math.sqrt(2 * w(1 - float(t))))
    with torch.no_grad():
        v = net(X, torch.full((3,), 1 - t, dtype=torch.float64))
        s = ((1 - t) * v - X) / t  # its score from the velocity
        assert relative(-ours.drift(X, t), v + w(1 - t) * s) < 1e-12
    assert float(ours.diffusion(t)) == pytest.approx(math.sqrt(2 * w(1 - t)))


# --- flow matching, torchcfm, rectified flow --------------------------------------------------------------------------


def test_flow_matching_calls_by_keyword_with_a_scalar_time():
    seen = []

    def model(*, x, t, label=None):
        seen.append((t, label))
        return x

    score = adapters.from_flow_matching(model, conditions={"label": torch.tensor([1, 2, 3])})
    score.predict(X, 0.75)
    assert seen[-1][0].shape == ()
    assert float(seen[-1][0]) == 0.25
    assert seen[-1][1].tolist() == [1, 2, 3]
    score.predict(X, torch.tensor([0.75, 0.5, 0.25]))
    assert seen[-1][0].tolist() == [0.25, 0.5, 0.75]
    score.predict(X[:1], torch.tensor([0.75]), label=None)
    assert seen[-1][0].shape == ()
    assert score.predict(X[:0], 0.5).x0.shape == (0, 2, 2, 2)
    guided = adapters.from_flow_matching(model, evals=2)
    assert sample(guided, x=X, nfe=3, grid="uniform").net_evals == 6


def test_flow_matching_schedulers_have_their_paths():
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    for name, flow in FLOWS.items():
        path = adapters.from_flow_matching(lambda *, x, t: x, scheduler(name)).path
        a, s, da, ds = flow(u)
        for mine, theirs in ((path.alpha, a), (path.sigma, s)):
            assert relative(mine(1 - u), theirs) < 1e-12
        for mine, theirs in ((path.dalpha, -da), (path.dsigma, -ds)):
            assert relative(mine(1 - u), theirs) < 1e-9
    other = of("VPScheduler", beta_min=0.2, beta_max=10)
    assert adapters.from_flow_matching(lambda *, x, t: x, other).path == VP(0.2, 10.0)
    assert adapters.from_flow_matching(lambda *, x, t: x).path == Linear()
    assert adapters.from_flow_matching(lambda *, x, t: x, Cosine()).path == Cosine()
    with pytest.raises(InputError, match="give a scheduler of flow_matching"):
        adapters.from_flow_matching(lambda *, x, t: x, "CondOT")


def test_a_velocity_that_vanishes_at_noise():
    """Polynomial paths start at T = 0.999: at noise their velocity is 0 and says nothing, which is an error and no division."""
    law = Law(2)
    network = flow_network(law, FLOWS["PolynomialConvexScheduler"])
    score = adapters.from_flow_matching(lambda *, x, t: network(x, t), scheduler("PolynomialConvexScheduler"))
    assert score.path.T == 0.999
    exact = Gaussian(score.path, law.mean.reshape(2, 2, 2), law.cov)
    runs = [sample(s, x=X, solver="euler", steps=8, grid="uniform", stop=0.0).x for s in (score, exact)]
    assert relative(*runs) < 1e-9
    vanishing = Score(lambda x, t: 0 * x, Linear(), (lambda t: -2.0 * (1 - t), lambda t: 2.0 * (1 - t)))
    with pytest.raises(PathError, match="alpha = 0"):
        sample(vanishing, x=X, solver="euler", steps=2, grid="uniform")


def test_torchcfm_time_comes_first_and_the_mlp_takes_one_tensor():
    seen = []

    def unet(t, x, y=None):
        seen.append((t, x, y))
        return x

    score = adapters.from_torchcfm(unet)
    score.predict(X, 0.75, y=torch.tensor([1, 2, 3]))
    assert seen[-1][0].shape == ()
    assert float(seen[-1][0]) == 0.25
    assert torch.equal(seen[-1][1], X)
    assert seen[-1][2].tolist() == [1, 2, 3]
    flat = noise(4, 5)
    mlp = nn.Linear(6, 5).double()
    y, _ = adapters.from_torchcfm(mlp, concat=True).raw(flat, 0.75)
    assert relative(y, mlp(torch.cat([flat, torch.full((4, 1), 0.25, dtype=torch.float64)], 1))) < 1e-12
    with pytest.raises(InputError, match="matcher is a SchrodingerBridgeConditionalFlowMatcher: give one of"):
        adapters.from_torchcfm(unet, of("SchrodingerBridgeConditionalFlowMatcher", sigma=1.0))


@pytest.mark.parametrize(
    "name", ["ConditionalFlowMatcher", "TargetConditionalFlowMatcher", "VariancePreservingConditionalFlowMatcher"]
)
def test_torchcfm_sigma_belongs_to_the_noise(name):
    """The regression target of the matcher, averaged over its own draws given x, is the output that the adapter assumes.

    For Gaussian data the average is the linear regression of the target on x, from the second moments of (x1, x0, e).
    """
    sigma, u, data = 0.4, 0.3, 0.7  # data variance, mean 0
    c, d = math.cos(math.pi / 2 * u), math.sin(math.pi / 2 * u)
    x_of, target = {  # coefficients of (x1, x0, e)
        "ConditionalFlowMatcher": ((u, 1 - u, sigma), (1, -1, 0)),
        "TargetConditionalFlowMatcher": ((u, 1 - (1 - sigma) * u, 0), (1, -(1 - sigma), 0)),
        "VariancePreservingConditionalFlowMatcher": ((d, c, sigma), (math.pi / 2 * c, -math.pi / 2 * d, 0)),
    }[name]
    moments = (data, 1.0, 1.0)
    cov = sum(a * b * m for a, b, m in zip(x_of, target, moments, strict=True))
    var = sum(a * a * m for a, m in zip(x_of, moments, strict=True))
    score = adapters.from_torchcfm(lambda t, x: cov / var * x, of(name, sigma=sigma))
    pair = score.predict(X, 1 - u)
    assert relative(pair.x0, x_of[0] * data / var * X) < 1e-9
    assert relative(score(X, 1 - u), -X / var) < 1e-9
    assert score.path.prior_std() == pytest.approx(1.0 if name.startswith("Target") else math.sqrt(1 + sigma**2))


def test_rectified_flow_labels_and_its_loop():
    net = Smooth(scale=0.01).double()
    score = adapters.from_rectified_flow(net)
    score.predict(X, 0.4)
    assert net.seen[-1].tolist() == pytest.approx([999 * 0.6] * 3)
    sample(score, x=X, solver="euler", steps=1, grid="uniform", stop=0.0)
    assert net.seen[-1].tolist() == pytest.approx([0.999] * 3)  # never below 0.001, where it was not trained
    # the published loop evaluates at 0.001 + 0.999 i/N and steps by 1/N: ours at i/N, apart by labels alone
    x, n = X, 10
    with torch.no_grad():
        for i in range(n):
            x = x + net(x, torch.full((3,), 999 * (i / n * 0.999 + 1e-3), dtype=torch.float64)) / n
        same = Score(net, Linear(), (1.0, -1.0), label=lambda t: 999 * ((1 - t) * 0.999 + 1e-3))
    assert relative(sample(same, x=X, solver="euler", steps=n, grid="uniform", stop=0.0).x, x) < 1e-12
    assert 1e-9 < relative(sample(score, x=X, solver="euler", steps=n, grid="uniform", stop=0.0).x, x) < 5e-3
    with pytest.raises(InputError, match="noise_scale"):
        adapters.from_rectified_flow(net, noise_scale=0.0)


# --- lucidrains -------------------------------------------------------------------------------------------------------


def test_lucidrains_log_snr_is_the_label_and_learned_schedules_are_taken():
    class Learned(nn.Module):
        """A monotone schedule in float32, whose gradient is scaled as the library's is."""

        def __init__(self):
            super().__init__()
            self.slope, self.frac_gradient = nn.Parameter(torch.tensor(-14.0)), 0.25

        def forward(self, t):
            out = 7.0 + self.slope * (0.7 * t + 0.3 * t**2)
            return out * self.frac_gradient + out.detach() * (1 - self.frac_gradient)

    net, schedule = Smooth(scale=0.1).double(), Learned()
    before = copy.deepcopy(schedule.state_dict())
    thing = of("ContinuousTimeGaussianDiffusion", model=net, log_snr=schedule)
    score = adapters.from_lucidrains(thing)
    score.predict(X, 0.5)
    snr = 7.0 - 14.0 * (0.35 + 0.075)
    assert net.seen[-1].tolist() == pytest.approx([snr] * 3)
    assert float(score.path.dlam(0.5)) == pytest.approx(-7.0 * (0.7 + 0.3), rel=1e-9)
    assert schedule.frac_gradient == 0.25
    assert schedule.slope.requires_grad
    assert schedule.slope.dtype == torch.float32
    assert torch.equal(before["slope"], schedule.slope)


def test_lucidrains_schedules_that_reach_alpha_zero_end_before():
    """An eps network knows nothing of x0 at alpha = 0; the cosine schedule is there at t = 1, the linear one is not."""
    law = Law(6)
    for log_snr, end in ((cosine_log_snr, 1 - 1e-4), (linear_log_snr, 1.0)):
        network = backbone(law, lambda k: (torch.sigmoid(k) ** 0.5, torch.sigmoid(-k) ** 0.5), lambda a, s, x, x0, eps: eps)
        score = adapters.from_lucidrains(of("ContinuousTimeGaussianDiffusion", model=network, log_snr=log_snr))
        assert float(score.path.T) == end
        exact = Gaussian(score.path, law.mean.reshape(2, 2, 2), law.cov)
        runs = [sample(s, x=X, solver="dpmpp_2m", nfe=8).x for s in (score, exact)]
        assert relative(*runs) < 1e-6


def test_lucidrains_objects_that_are_not_known_are_refused():
    with pytest.raises(InputError, match="diffusion is a Unet: give a GaussianDiffusion"):
        adapters.from_lucidrains(of("Unet"))
    with pytest.raises(InputError, match="objective='pred_eps' is unknown: did you mean"):
        adapters.from_lucidrains(of("GaussianDiffusion", model=Smooth(), betas=LINEAR_1000, objective="pred_eps"))
    with pytest.raises(InputError, match="mean_variance_net=True"):
        adapters.from_lucidrains(of("RectifiedFlow", model=Smooth(), predict="flow", mean_variance_net=True))


def test_lucidrains_models_without_time_and_with_2c_channels():
    flow = of("RectifiedFlow", model=lambda x: 2 * x, predict="flow", time_cond_kwarg=None)
    assert torch.equal(adapters.from_lucidrains(flow).raw(X, 0.5)[0], 2 * X)
    learned = of("LearnedGaussianDiffusion", model=Smooth(out=4), betas=LINEAR_1000, objective="pred_noise")
    learned.__class__ = type("LearnedGaussianDiffusion", (type("GaussianDiffusion", (), {}),), {})
    score = adapters.from_lucidrains(learned)
    assert sample(score, shape=(2, 2, 2, 2), solver=LearnedVariance(), steps=3).x.isfinite().all()


# --- consistency ------------------------------------------------------------------------------------------------------


def test_consistency_student_is_the_identity_at_sigma_min():
    net = Smooth(scale=0.01).double()
    score = adapters.from_consistency(net)
    assert torch.equal(score.predict(X, 0.002).x0, X)
    single = adapters.from_consistency(Smooth(scale=0.01))
    assert torch.equal(single.predict(X.float(), 0.002).x0, X.float())
    score.predict(X, 5.0)
    assert net.seen[-1].tolist() == pytest.approx([250 * math.log(5.0)] * 3)
    teacher = adapters.from_consistency(net, distillation=False)
    teacher.predict(X, 5.0)
    assert net.seen[-1].tolist() == pytest.approx([250 * math.log(5.0)] * 3)
    assert teacher.predicts == "F"


def test_consistency_sigma_data_is_that_of_the_network():
    law, sd = Law(5), 0.7
    network = backbone(law, lambda k: (torch.ones_like(k), torch.exp(k / 250)), edm_f(sd), edm_in(sd))
    score = adapters.from_consistency(network, distillation=False, sigma_data=sd)
    assert relative(score.predict(X, 1.5).x0, law.posterior(X, 1.0, 1.5)[0]) < 1e-10
    student = adapters.from_consistency(lambda x, k: 0 * x, sigma_data=sd, sigma_min=0.1)
    assert relative(student.predict(X, 1.5).x0, sd**2 / (1.4**2 + sd**2) * X) < 1e-12


def exact_student(law, sigma_min=0.002):
    """The F whose student output is the point of x's own trajectory at sigma_min, for a Gaussian law on EDM()."""
    values, basis = torch.linalg.eigh(law.cov)

    def network(x, label):
        s = torch.exp(label.double() / 250).reshape(-1, 1)
        y = x.double().flatten(1) * (s**2 + 0.25).sqrt()
        gain = torch.sqrt((values + sigma_min**2) / (values + s**2))
        f = law.mean + ((y - law.mean) @ basis * gain) @ basis.T
        past = s - sigma_min
        return ((f - 0.25 / (past**2 + 0.25) * y) * (s**2 + 0.25).sqrt() / (past * 0.5)).reshape(x.shape).to(x.dtype)

    return network


def test_consistency_sampler_keeps_the_law_with_an_exact_student():
    law = Law(4)
    score = adapters.from_consistency(exact_student(law))
    exact = Gaussian(EDM(), law.mean.reshape(2, 2, 2), law.cov)
    # one step: the flow map itself, down to sigma_min
    x = law.draw(3, 1.0, 80.0, torch.float64)
    one = sample(score, x=x, solver="consistency", nfe=1).x
    flow = sample(exact, x=x, solver="edm_rk8", steps=60, grid="log_snr").x
    assert relative(one, flow) < 1e-7
    # several: x <- f(x, s) + sqrt(t^2 - 0.002^2) z, as published
    times = [80.0, 24.0, 5.0, 0.6, 0.002]
    z = list(noise(4, 3, 2, 2, 2, seed=9))
    state = x
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        state = score.predict(state, s).x0 + math.sqrt(t**2 - 0.002**2) * z[i]
    assert relative(integrate("consistency", score, x, times, noise=Given(z)).x, state) < 1e-12


# --- azula, dpm-solver ------------------------------------------------------------------------------------------------


def test_azula_paths_go_down_to_zero_where_noise_is_left():
    path = FAMILIES["azula"].score(Law(0)).path
    assert (path.t_min, float(path.sigma(0.0))) == (0.0, pytest.approx(1e-3))
    assert math.isfinite(float(path.lam(0.0)))


def test_azula_denoisers_without_a_schedule_are_refused():
    with pytest.raises(InputError, match="without a schedule"):
        adapters.from_azula(Smooth())


def wrapper(net, total, scale=None, null=None, condition=None):
    """dpm-solver's model_wrapper for a discrete noise network, with classifier-free guidance where a scale is given."""

    def model_fn(x, t):
        if scale is None:
            return net(x, (t - 1 / total) * 1000)
        both = net(torch.cat([x, x]), ((torch.cat([t, t]) - 1 / total) * 1000), torch.cat([null, condition]))
        uncond, cond = both.chunk(2)
        return uncond + scale * (cond - uncond)

    return model_fn


def test_dpm_solver_s_clipped_table():
    """On a cosine table the entries with lambda < -5.1 go, and the wrapper's labels are stretched over the rest."""
    path = Tabulated.squared_cosine(1000)
    log_alpha = 0.5 * torch.log(path.alphas_cumprod)
    lam = log_alpha - 0.5 * torch.log1p(-torch.exp(2 * log_alpha))
    kept = log_alpha[: len(lam) - int((lam < -5.1).sum())]
    n = len(kept)
    assert n == 996
    schedule = of("NoiseScheduleVP", schedule="discrete", log_alpha_array=kept.reshape(1, -1), total_N=n, T=1.0)
    net = Smooth(scale=0.01).double()
    score = adapters.from_dpm_solver_wrapper(wrapper(net, n), schedule)
    assert len(score.path.betas) == n
    pair = score.predict(X, float(score.path.time_of(500)))
    assert net.seen[-1].tolist() == pytest.approx([500 * 1000 / n] * 3)  # not 500
    a, s = float(path.alphas_cumprod[500].sqrt()), float((1 - path.alphas_cumprod[500]).sqrt())
    assert relative(pair.x0, (X - s * pair.eps) / a) < 1e-9
    assert float(score.path.lam(1.0)) > -5.1


def test_dpm_solver_guidance_batches_both_networks():
    net = Smooth(scale=0.01, classes=5).double()
    y, null = torch.tensor([0, 1, 2]), torch.tensor([5, 5, 5])
    score = adapters.from_dpm_solver_wrapper(wrapper(net, 1000, 3.0, null, y), Tabulated.linear(), evals=2)
    run = sample(score, x=X, nfe=4)
    assert (run.nfe, run.net_evals) == (4, 8)
    cosine = of("NoiseScheduleVP", schedule="cosine", cosine_s=0.008, T=0.9946)
    old = adapters.from_dpm_solver_wrapper(lambda x, t: x, cosine).path
    assert old.T == 0.9946
    assert float(old.alpha(0.5)) == pytest.approx(float(Cosine().alpha(0.5)))
    with pytest.raises(InputError, match="give a NoiseScheduleVP or a path"):
        adapters.from_dpm_solver_wrapper(lambda x, t: x, "linear")


# --- latent diffusion -------------------------------------------------------------------------------------------------


class FakeLDM(nn.Module):
    """CompVis LatentDiffusion, as far as it shows itself: apply_model, conditioning keys, first stage."""

    def __init__(self, key, parameterization="eps"):
        super().__init__()
        extra = 1 if key in ("concat", "hybrid") else 0
        self.net = Smooth(channels=2 + extra, out=2, scale=0.01).double()
        self.model = SimpleNamespace(conditioning_key=key)
        self.parameterization, self.betas, self.scale_factor = parameterization, SD_1000, torch.tensor(0.25)
        self.asked = []

    def apply_model(self, x, t, cond):
        key = self.model.conditioning_key
        if not isinstance(cond, dict):
            cond = {"c_concat" if key == "concat" else "c_crossattn": cond if isinstance(cond, list) else [cond]}
        self.asked.append({k: [c.shape for c in v if c is not None] for k, v in cond.items()})
        if "c_concat" in cond:
            x = torch.cat([x, *cond["c_concat"]], 1)
        return self.net(x, t)

    def encode_first_stage(self, image):
        return SimpleNamespace(mode=lambda: image * 2 + 1, sample=lambda: pytest.fail("the posterior was drawn from"))

    def decode_first_stage(self, z):
        return (z / self.scale_factor - 1) / 2


def test_compvis_conditioning_goes_by_its_key():
    tokens, image = noise(3, 7, 5), noise(3, 1, 2, 2)
    for key, cond, asked in (
        (None, None, {"c_crossattn": []}),
        ("crossattn", tokens, {"c_crossattn": [(3, 7, 5)]}),
        ("concat", image, {"c_concat": [(3, 1, 2, 2)]}),
        ("hybrid", {"c_concat": [image], "c_crossattn": [tokens]}, {"c_concat": [(3, 1, 2, 2)], "c_crossattn": [(3, 7, 5)]}),
    ):
        model = FakeLDM(key)
        score = adapters.from_latent_diffusion(model)
        out = sample(score, x=X, nfe=2, conditions=None if cond is None else {"cond": cond})
        assert out.x.isfinite().all()
        assert [{k: [tuple(s) for s in v] for k, v in a.items()} for a in model.asked] == [asked] * 2
    v = adapters.from_latent_diffusion(FakeLDM("crossattn", "v"))
    assert v.score.predicts == "v"
    with pytest.raises(InputError, match="parameterization='mu' is unknown"):
        adapters.from_latent_diffusion(FakeLDM(None, "mu"))


def test_compvis_first_stage_is_scaled_and_its_mode_taken():
    score = adapters.from_latent_diffusion(FakeLDM("crossattn"))
    image = noise(3, 2, 4, 4)
    z = score.encode(image)
    assert relative(z, 0.25 * (image * 2 + 1)) < 1e-12
    assert relative(score.decode(z), image) < 1e-12


def test_latents_of_every_kind_of_scaling():
    """Number, shift, mean and deviation a channel; EDM2's scale and bias; what diffusers writes in a config."""
    inner = Score(Smooth(channels=4, out=4), VP(), "eps")
    vae = SimpleNamespace(encode=lambda x: x, decode=lambda z: z)
    raw = noise(3, 4, 2, 2)
    mean, std = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])
    edm2 = adapters.from_latent_diffusion(inner, vae, scale=0.5 / std, shift=mean)
    scale = (0.5 / std).double().reshape(1, 4, 1, 1)
    bias = (0 - mean * (0.5 / std)).double().reshape(1, 4, 1, 1)
    assert relative(edm2.encode(raw), raw * scale + bias) < 1e-6
    assert relative(edm2.decode(edm2.encode(raw)), raw) < 1e-12

    def written(**config):
        return SimpleNamespace(encode=vae.encode, decode=vae.decode, config=config)

    column = lambda v: torch.tensor(v, dtype=torch.float64).reshape(1, 4, 1, 1)  # noqa: E731
    four = [1.0, 2.0, 3.0, 4.0]
    for config, want in (
        ({"scaling_factor": 0.18215}, raw * 0.18215),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, (raw - 0.0609) * 1.5305),  # SD 3
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159, "latents_mean": None}, (raw - 0.1159) * 0.3611),  # Flux
        (
            {"scaling_factor": 0.13, "latents_mean": four, "latents_std": four},
            (raw - column(four)) * 0.13 / column(four),
        ),  # SDXL
        ({"latents_mean": four, "latents_std": four}, (raw - column(four)) / column(four)),  # Qwen-Image, Wan
    ):
        latents = adapters.from_latent_diffusion(inner, written(**config))
        assert relative(latents.encode(raw), want) < 1e-12
        assert relative(latents.decode(latents.encode(raw)), raw) < 1e-12
    video = noise(1, 4, 3, 2, 2)
    assert edm2.encode(video).shape == video.shape
    for bad, words in (
        (lambda: adapters.from_latent_diffusion(inner, vae), "has no config with scaling_factor or latents_std: give scale="),
        (lambda: adapters.from_latent_diffusion(inner, written()), "has no config with scaling_factor"),
        (lambda: adapters.from_latent_diffusion(inner), "autoencoder is missing"),
        (lambda: adapters.from_latent_diffusion(inner, vae, scale=1.0, mode="eval"), "mode given"),
        (lambda: adapters.from_latent_diffusion(Smooth()), "give a CompVis LatentDiffusion alone, or a score"),
        (lambda: adapters.LatentScore(inner, vae.encode, 3), "decode is 3: give a function"),
        (lambda: adapters.LatentScore(Smooth(), vae.encode, vae.decode), "score is a Smooth: wrap the network first"),
        (lambda: adapters.LatentScore(inner, vae.encode, vae.decode, scale=0.0), "scale=0.0: must not be 0"),
        (lambda: adapters.LatentScore(inner, vae.encode, vae.decode, shift="a"), "shift='a'"),
        (lambda: edm2.encode(noise(1, 3, 2, 2)), "4 channels of scale or shift"),
    ):
        with pytest.raises(InputError, match=words):
            bad()
    wrong = adapters.LatentScore(inner, lambda x: [x], lambda z: [z])
    with pytest.raises(NetworkError, match="encode returned a list"):
        wrong.encode(raw)
    with pytest.raises(NetworkError, match="decode returned a list"):
        wrong.decode(raw)


def test_autoencoders_of_every_return_type():
    inner = Score(Smooth(channels=4, out=4), VP(), "eps")
    raw = noise(2, 4, 2, 2)
    posterior = SimpleNamespace(mode=lambda: raw, sample=lambda: pytest.fail("the posterior was drawn from"))
    for encoded in (raw, posterior, SimpleNamespace(latent_dist=posterior), SimpleNamespace(latent=raw)):
        score = adapters.LatentScore(inner, lambda image, e=encoded: e, lambda z: SimpleNamespace(sample=z), scale=2.0)
        assert torch.equal(score.encode(raw), 2 * raw)
        assert torch.equal(score.decode(2 * raw), raw)


def test_a_latent_score_is_its_score():
    own = [name for name, member in vars(Predictor).items() if inspect.isfunction(member)]
    assert set(own) <= set(vars(adapters.LatentScore))  # nothing falls back to a default of the base
    inner = adapters.from_guided_diffusion(Smooth(channels=2, out=4, scale=0.01), mode="eval")
    score = adapters.LatentScore(inner, lambda x: x, lambda z: z)
    assert score.path is inner.path
    assert score.native_dtype is torch.float32
    for solver in ("dpmpp_2m", "ddpm", "pc_ddpm", "adaptive_bosh3", LearnedVariance()):
        budget = 400 if solver == "adaptive_bosh3" else 12
        runs = [sample(s, shape=(2, 2, 2, 2), solver=solver, nfe=budget, seed=3, grid="uniform") for s in (score, inner)]
        assert torch.equal(runs[0].x, runs[1].x)
        assert runs[0].nfe == runs[1].nfe
    x = X.float()
    assert torch.equal(score(x, 0.5), inner(x, 0.5))
    assert torch.equal(score.predict(x, 0.5).x0, inner.predict(x, 0.5).x0)
    tallies = Tally(), Tally()
    knots = score.path.knots([0.2, 0.5, 0.7])
    twice = adapters.LatentScore(adapters.from_guided_diffusion(Smooth(out=4), evals=2), lambda x: x, lambda z: z)
    ys = [s.each(knots, x, {}, tally)(x) for s, tally in zip((twice, twice.score), tallies, strict=True)]
    assert torch.equal(*ys)
    assert [(t.nfe, t.net_evals) for t in tallies] == [(1, 2)] * 2

    class Costly(Score):
        def calls(self, *knots):
            return 3

    assert adapters.LatentScore(Costly(Smooth(), VP()), lambda x: x, lambda z: z).calls() == 3
    inner.network.train()
    with score.running():
        assert not inner.network.training
    assert inner.network.training


# --- what they share --------------------------------------------------------------------------------------------------


def test_options_are_those_of_score():
    seen = []

    def net(x, t, y=None):
        seen.append((x.dtype, t.dtype, y))
        return torch.zeros_like(x)

    score = adapters.from_score_sde(net, VP(), conditions={"y": 3}, dtype=torch.bfloat16, mode="keep")
    assert score.predict(X.float(), 0.5).x0.dtype is torch.float32
    assert seen[-1] == (torch.bfloat16, torch.float32, 3)
    assert score.mode == "keep"
    with pytest.raises(TypeError, match="conditons"):
        adapters.from_score_sde(net, VP(), conditons={})
    for bad in (0, True, 1.5):
        with pytest.raises(InputError, match="evals="):
            Score(net, VP(), evals=bad)


def test_train_mode_is_seen_through_the_closures():
    class Dropping(Smooth):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

    net = Dropping().train()
    for score in (
        adapters.from_edm(net),
        adapters.from_torchcfm(net),
        adapters.from_flow_matching(net),
        adapters.from_consistency(net),
    ):
        with pytest.warns(TrainModeWarning, match="Dropout 'drop'"):
            score.at([score.path.knot(0.5 * score.path.T)], X.float(), {}, Tally())


def test_every_adapter_is_exported_and_imports_no_library():
    names = [n for n in dir(adapters) if n.startswith("from_")]
    assert {n for n in names if n not in ("from_diffusers", "from_onnx")} == {
        "from_azula",
        "from_consistency",
        "from_dit",
        "from_dpm_solver_wrapper",
        "from_edm",
        "from_flow_matching",
        "from_guided_diffusion",
        "from_improved_diffusion",
        "from_jit",
        "from_k_diffusion",
        "from_latent_diffusion",
        "from_lucidrains",
        "from_rectified_flow",
        "from_score_sde",
        "from_sit",
        "from_torchcfm",
        "from_v_diffusion",
    }
    heavy = {"azula", "diffusers", "flow_matching", "onnxruntime", "torchcfm", "torchvision", "transformers"}
    folder = pathlib.Path(inspect.getfile(adapters)).parent
    for file in folder.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not {name.partition(".")[0] for name in found} & heavy, file.name


def test_network_with_variance_gives_both_halves_of_one_call():
    net = Smooth(out=4, scale=0.01)
    score = adapters.from_guided_diffusion(net)
    tally = Tally()
    y, v = score.with_variance([score.path.knot(0.5)], X.float(), {}, tally)[0](X.float())
    out = net(X.float(), torch.tensor([499.0]))
    assert relative(y, out[:, :2]) < 1e-6
    assert relative(v, out[:, 2:]) < 1e-6
    assert (tally.nfe, tally.net_evals) == (1, 1)
    changed = adapters.from_guided_diffusion(lambda x, t: torch.cat([x.mul_(2), x], 1))
    with pytest.raises(NetworkError, match="changed its input in place"):
        changed.with_variance([score.path.knot(0.5)], X.clone(), {}, tally)[0](X.clone())


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_the_closed_form_of_the_fakes_is_that_of_the_exact_scores(seed):
    """The closed form of the fakes is that of ``scores.Gaussian``: two independent formulas."""
    law = Law(seed)
    exact = Gaussian(VP(), law.mean.reshape(2, 2, 2), law.cov)
    a, s = float(VP().alpha(0.4)), float(VP().sigma(0.4))
    x0, eps = law.posterior(X, a, s)
    pair = exact.predict(X, 0.4)
    assert relative(pair.x0, x0) < 1e-10
    assert relative(pair.eps, eps) < 1e-10
