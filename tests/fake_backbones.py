"""Networks that are right by construction, one for each convention of ``scores.adapters``.

A fake network decodes the noise level from the time label it is given, by the formula of the family's own source (transcribed
here, not taken from the adapter), and answers for a Gaussian law in that family's output. So an adapter gives the closed form
if and only if its path, label, input scaling and output row are all those of the family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from scores import adapters
from sde import VE, VP, SubVP, Tabulated
from sde.noise import Draws, Source

EVENT = (2, 2, 2)
D = 8


class Law:
    """N(mean, cov) on samples of shape (2, 2, 2), cov dense."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.mean = torch.randn(D, generator=g, dtype=torch.float64)
        basis = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
        self.cov = basis @ torch.diag(0.05 + torch.rand(D, generator=g, dtype=torch.float64)) @ basis.T
        self.generator = g

    def draw(self, batch: int, a: float, s: float, dtype: torch.dtype) -> Tensor:
        z = torch.randn(2, batch, D, generator=self.generator, dtype=torch.float64)
        x0 = self.mean + z[0] @ torch.linalg.cholesky(self.cov).T
        return (a * x0 + s * z[1]).reshape(batch, *EVENT).to(dtype)

    def posterior(self, x: Tensor, a: Any, s: Any) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], E[eps | x]) at x = a x0 + s eps; a and s numbers, or one a sample. Float64."""
        a, s = (torch.as_tensor(v, dtype=torch.float64).reshape(-1, 1).expand(len(x), 1) for v in (a, s))
        y = x.double().flatten(1) - a * self.mean
        wide = a[:, :, None] ** 2 * self.cov + s[:, :, None] ** 2 * torch.eye(D, dtype=torch.float64)
        solved = torch.linalg.solve(wide, y)
        x0 = self.mean + a * (solved @ self.cov)
        return x0.reshape(x.shape), (s * solved).reshape(x.shape)


Levels = Callable[[Tensor], tuple[Tensor, Tensor]]


def wide(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(-1, *(1,) * (x.dim() - 1)) if v.dim() else v


def backbone(law: Law, decode: Levels, answer: Callable[..., Tensor], scaled: Any = None, double: bool = False) -> Any:
    """network(c_in x, label): decode(label) -> (alpha, sigma), answer(a, s, x, x0, eps) -> the output; ``scaled``: (a, s) ->
    c_in; ``double``: returns 2C channels, the second half being something else.
    """

    def network(x: Tensor, label: Tensor) -> Tensor:
        a, s = decode(label.double().reshape(-1))
        state = x.double()
        if scaled is not None:
            state = state / wide(scaled(a, s), state)
        x0, eps = law.posterior(state, a, s)
        y = answer(wide(a, x), wide(s, x), state, x0, eps)
        return (torch.cat([y, torch.full_like(y, 7.0)], 1) if double else y).to(x.dtype)

    return network


EPS = lambda a, s, x, x0, eps: eps  # noqa: E731
X0 = lambda a, s, x, x0, eps: x0  # noqa: E731
V = lambda a, s, x, x0, eps: a * eps - s * x0  # noqa: E731
SCORE = lambda a, s, x, x0, eps: -eps / s  # noqa: E731


def edm_f(sd: float = 0.5) -> Callable[..., Tensor]:
    """F with D = c_skip x + c_out F (Karras et al. 2022, table 1)."""

    def answer(a: Tensor, s: Tensor, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        return (x0 - sd**2 / (s**2 + sd**2) * x) * (s**2 + sd**2) ** 0.5 / (s * sd)

    return answer


def edm_in(sd: float = 0.5) -> Callable[..., Tensor]:
    return lambda a, s: (s**2 + sd**2) ** -0.5


# --- noise levels, each by its source's formula -----------------------------------------------------------------------


def sigma_level(s: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(s), s


def linear_beta(t: Tensor, low: float = 0.1, high: float = 20.0) -> tuple[Tensor, Tensor]:
    rate = 0.5 * t**2 * (high - low) + t * low  # -2 log_mean_coeff of sde_lib.VPSDE
    return torch.exp(-0.5 * rate), torch.sqrt(-torch.expm1(-rate))


def sub_vp(t: Tensor) -> tuple[Tensor, Tensor]:
    a, s = linear_beta(t)
    return a, s**2


def in_table(betas: Tensor) -> Levels:
    """index -> (alpha, sigma), piecewise linear in log alpha between the entries."""
    logs = torch.cumsum(torch.log1p(-betas), 0)

    def decode(k: Tensor) -> tuple[Tensor, Tensor]:
        low = k.floor().clamp(0, len(betas) - 1).long()
        high = (low + 1).clamp(max=len(betas) - 1)
        log = logs[low] + (k - low) * (logs[high] - logs[low])
        return torch.exp(0.5 * log), torch.sqrt(-torch.expm1(log))

    return decode


LINEAR_1000 = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SD_1000 = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
_BAR = torch.cos((torch.linspace(0.0, 1.0, 4001, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2) ** 2
COSINE_4000 = (1.0 - _BAR[1:] / _BAR[:-1]).clamp(max=0.999)
DDPM_1000 = torch.linspace(0.1 / 1000, 20.0 / 1000, 1000, dtype=torch.float64)  # sde_lib.VPSDE.discrete_betas


def sigmoid_betas(n: int = 1000) -> Tensor:
    """lucidrains' default schedule, start -3, end 3."""
    u = torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)
    low, high = 1.0 / (1.0 + math.exp(3.0)), 1.0 / (1.0 + math.exp(-3.0))
    bar = (high - torch.sigmoid(6.0 * u - 3.0)) / (high - low)
    return (1.0 - bar[1:] / bar[:-1]).clamp(0.0, 0.999)


# alpha, sigma and their slopes as functions of the flow's own time u, 0 noise and 1 data
FLOWS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "CondOTScheduler": lambda u: (u, 1 - u, torch.ones_like(u), -torch.ones_like(u)),
    "CosineScheduler": lambda u: (
        torch.sin(math.pi / 2 * u),
        torch.cos(math.pi / 2 * u),
        math.pi / 2 * torch.cos(math.pi / 2 * u),
        -math.pi / 2 * torch.sin(math.pi / 2 * u),
    ),
    "LinearVPScheduler": lambda u: (u, (1 - u**2) ** 0.5, torch.ones_like(u), -u / (1 - u**2) ** 0.5),
    "VPScheduler": lambda u: (
        *linear_beta(1 - u),
        0.5 * (0.1 + 19.9 * (1 - u)) * linear_beta(1 - u)[0],
        -0.5 * (0.1 + 19.9 * (1 - u)) * linear_beta(1 - u)[0] ** 2 / linear_beta(1 - u)[1],
    ),
    "PolynomialConvexScheduler": lambda u: (u**2.0, 1 - u**2.0, 2.0 * u, -2.0 * u),
    "SquareScheduler": lambda u: (u, (1 - u) ** 1.5, torch.ones_like(u), -1.5 * (1 - u) ** 0.5),  # no library's
}


def velocity(flow: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor) -> Callable[..., Tensor]:
    return lambda a, s, x, x0, eps: wide(flow(u)[2], x) * x0 + wide(flow(u)[3], x) * eps


def scheduler(name: str) -> Any:
    """An object of the library's class name, called as it is called."""

    def call(self: Any, u: Tensor) -> Any:
        return SimpleNamespace(**dict(zip(("alpha_t", "sigma_t", "d_alpha_t", "d_sigma_t"), FLOWS[name](u), strict=True)))

    return type(name, (), {"__call__": call, "n": 2.0, "beta_min": 0.1, "beta_max": 20.0})()


def flow_network(law: Law, flow: Callable[[Tensor], tuple[Tensor, ...]]) -> Any:
    """(x, u) -> the velocity dx/du; u of shape () or (B,)."""

    def network(x: Tensor, u: Tensor) -> Tensor:
        u = u.double().reshape(-1)
        return backbone(law, lambda _: flow(u)[:2], velocity(flow, u))(x, u)

    return network


# --- the families -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """score    law -> the adapted fake
    levels   our time -> (alpha, sigma), by the family's formula
    low, high  times to draw
    single   the network computes in float32 whatever the state is
    whole    times are drawn among these, where labels are rounded
    """

    score: Callable[[Law], Any]
    levels: Levels
    low: float
    high: float
    single: bool = False
    whole: tuple[float, ...] = ()


def of(name: str, **attributes: Any) -> Any:
    """An object of a class of that name."""
    return type(name, (), {})() if not attributes else _filled(type(name, (), {})(), attributes)


def _filled(thing: Any, attributes: dict[str, Any]) -> Any:
    vars(thing).update(attributes)
    return thing


def _edm(law: Law) -> Any:
    inner = backbone(law, sigma_level, X0)

    def net(x: Tensor, sigma: Tensor, class_labels: Any = None, force_fp32: bool = False) -> Tensor:
        return inner(x.float(), sigma.float().reshape(-1, 1, 1, 1).flatten())

    return net


def _torchcfm(name: str, sigma: float) -> Family:
    def levels_u(u: Tensor) -> tuple[Tensor, Tensor]:
        if name.startswith("Target"):
            return u, 1 - (1 - sigma) * u
        a, s = (torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)) if name.startswith("Variance") else (u, 1 - u)
        return a, torch.sqrt(s**2 + sigma**2)

    def score(law: Law) -> Any:
        def network(t: Tensor, x: Tensor) -> Tensor:
            u = t.double().reshape(-1)

            def answer(a: Tensor, s: Tensor, x: Tensor, x1: Tensor, eps: Tensor) -> Tensor:
                # E[x0 | x] of the matcher's noise x0, of which x holds the part (s0, and what sigma adds)
                if name.startswith("Target"):
                    return x1 - (1 - sigma) * eps
                if name.startswith("Variance"):
                    c, d = wide(torch.cos(math.pi / 2 * u), x), wide(torch.sin(math.pi / 2 * u), x)
                    return math.pi / 2 * (c * x1 - d * (c / s) * eps)
                return x1 - wide(1 - u, x) / s * eps

            return backbone(law, lambda _: levels_u(u), answer)(x, u)

        return adapters.from_torchcfm(network, of(name, sigma=sigma))

    return Family(score, lambda t: levels_u(1 - t), 0.02, 0.97)


def _sit(path_type: str, prediction: str) -> Family:
    flow = FLOWS[{"Linear": "CondOTScheduler", "GVP": "CosineScheduler", "VP": "VPScheduler"}[path_type]]

    def score(law: Law) -> Any:
        answer = {"noise": EPS, "score": SCORE}.get(prediction)

        def network(x: Tensor, t: Tensor, y: Any = None) -> Tensor:
            u = t.double()
            return backbone(law, lambda _: flow(u)[:2], answer or velocity(flow, u))(x, u)

        return adapters.from_sit(network, path_type, prediction)

    return Family(score, lambda t: flow(1 - t)[:2], 0.02, 0.97)


def _flow_matching(name: str) -> Family:
    def score(law: Law) -> Any:
        network = flow_network(law, FLOWS[name])

        def model(*, x: Tensor, t: Tensor) -> Tensor:
            return network(x, t)

        return adapters.from_flow_matching(model, scheduler(name))

    return Family(score, lambda t: FLOWS[name](1 - t)[:2], 0.02, 0.97)


def _lucidrains_table(objective: str, answer: Any, betas: Tensor) -> Family:
    decode = in_table(betas)

    def score(law: Law) -> Any:
        inner = backbone(law, decode, answer)
        model = lambda x, t, x_self_cond=None: inner(x, t)  # noqa: E731
        return adapters.from_lucidrains(of("GaussianDiffusion", model=model, betas=betas, objective=objective))

    return Family(score, lambda t: decode(t * len(betas) - 1), 0.001, 0.998)


def _continuous(name: str, answer: Any, log_snr: Callable[[Tensor], Tensor]) -> Family:
    def decode(snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(snr) ** 0.5, torch.sigmoid(-snr) ** 0.5

    def score(law: Law) -> Any:
        return adapters.from_lucidrains(of(name, model=backbone(law, decode, answer), log_snr=log_snr))

    return Family(score, lambda t: decode(log_snr(t)), 0.0, 0.98)


def linear_log_snr(t: Tensor) -> Tensor:
    return -torch.log(torch.expm1(1e-4 + 10 * t**2))


def cosine_log_snr(t: Tensor, s: float = 0.008) -> Tensor:
    return -torch.log(((torch.cos((t + s) / (1 + s) * math.pi * 0.5) ** -2) - 1).clamp(min=1e-5))


def _rectified(predict: str) -> Family:
    flow = FLOWS["CondOTScheduler"]

    def score(law: Law) -> Any:
        def model(x: Tensor, *, times: Tensor) -> Tensor:
            u = times.double()
            answer = {"noise": EPS, "clean": X0}.get(predict) or velocity(flow, u)
            return backbone(law, lambda _: flow(u)[:2], answer)(x, u)

        thing = of("RectifiedFlow", model=model, predict=predict, time_cond_kwarg="times", mean_variance_net=False)
        return adapters.from_lucidrains(thing)

    return Family(score, lambda t: flow(1 - t)[:2], 0.02, 0.97)


def azula_vp(t: Tensor) -> tuple[Tensor, Tensor]:
    alpha = torch.exp(t**2 * math.log(1e-3))
    return alpha, torch.sqrt(1 - alpha**2 + 1e-6)


def _azula(law: Law) -> Any:
    inner = backbone(law, azula_vp, X0)

    class Denoiser:
        schedule = staticmethod(azula_vp)

        def __call__(self, x: Tensor, t: Tensor) -> Any:
            return SimpleNamespace(mean=inner(x, t.expand(len(x))), var=None)

    return adapters.from_azula(Denoiser())


def _compvis(law: Law) -> Any:
    inner = backbone(law, in_table(SD_1000), EPS)
    model = of(
        "LatentDiffusion",
        apply_model=lambda x, t, cond: inner(x, t),
        betas=SD_1000,
        parameterization="eps",
        scale_factor=0.18215,
        encode_first_stage=lambda x: x,
        decode_first_stage=lambda z: z / 0.18215,
    )
    return adapters.from_latent_diffusion(model)


def _dpm_solver(law: Law) -> Any:
    """model_wrapper of a discrete schedule: a network of labels (t - 1/N) 1000."""
    inner = backbone(law, in_table(LINEAR_1000), EPS)
    log_alpha = 0.5 * torch.cumsum(torch.log1p(-LINEAR_1000), 0)
    schedule = of("NoiseScheduleVP", schedule="discrete", log_alpha_array=log_alpha.reshape(1, -1), total_N=1000, T=1.0)
    return adapters.from_dpm_solver_wrapper(lambda x, t: inner(x, (t - 1 / 1000) * 1000), schedule)


_TABLE = (0.001, 0.998)
_FLOW = (0.02, 0.97)

FAMILIES: dict[str, Family] = {
    "edm": Family(lambda law: adapters.from_edm(_edm(law)), sigma_level, 0.002, 80.0, single=True),
    "score_sde vp": Family(
        lambda law: adapters.from_score_sde(backbone(law, lambda k: linear_beta(k / 999), EPS), VP()), linear_beta, 1e-3, 1.0
    ),
    "score_sde sub-vp": Family(
        lambda law: adapters.from_score_sde(backbone(law, lambda k: sub_vp(k / 999), EPS), SubVP()), sub_vp, 1e-3, 1.0
    ),
    "score_sde ve": Family(
        lambda law: adapters.from_score_sde(backbone(law, sigma_level, SCORE), VE(0.01, 50.0)),
        lambda t: sigma_level(0.01 * 5000**t),
        0.0,
        1.0,
    ),
    "score_sde vp discrete": Family(
        lambda law: adapters.from_score_sde(backbone(law, in_table(DDPM_1000), EPS), VP(), discrete=1000),
        lambda t: in_table(DDPM_1000)(t * 1000 - 1),
        *_TABLE,
    ),
    "score_sde ve discrete": Family(
        lambda law: adapters.from_score_sde(
            # sigmas stored from the largest down
            backbone(law, lambda k: sigma_level(torch.exp(math.log(50.0) + k / 99 * math.log(0.01 / 50.0))), SCORE),
            VE(0.01, 50.0),
            discrete=100,
        ),
        lambda t: sigma_level(0.01 * 5000**t),
        0.0,
        1.0,
        whole=tuple(k / 99 for k in range(100)),
    ),
    "guided_diffusion": Family(
        lambda law: adapters.from_guided_diffusion(backbone(law, in_table(LINEAR_1000), EPS, double=True)),
        lambda t: in_table(LINEAR_1000)(t * 1000 - 1),
        *_TABLE,
    ),
    "guided_diffusion x0": Family(
        lambda law: adapters.from_guided_diffusion(backbone(law, in_table(LINEAR_1000), X0), predicts="x0"),
        lambda t: in_table(LINEAR_1000)(t * 1000 - 1),
        *_TABLE,
    ),
    "improved_diffusion": Family(
        lambda law: adapters.from_improved_diffusion(
            backbone(law, lambda k: in_table(COSINE_4000)(k * 4), EPS, double=True), Tabulated.squared_cosine(4000)
        ),
        lambda t: in_table(COSINE_4000)(t * 4000 - 1),
        1 / 4000,
        0.998,
    ),
    "dit": Family(
        lambda law: adapters.from_dit(backbone(law, in_table(LINEAR_1000), EPS, double=True)),
        lambda t: in_table(LINEAR_1000)(t * 1000 - 1),
        *_TABLE,
    ),
    "k_diffusion": Family(lambda law: adapters.from_k_diffusion(backbone(law, sigma_level, X0)), sigma_level, 0.002, 80.0),
    "consistency teacher": Family(
        lambda law: adapters.from_consistency(
            backbone(law, lambda k: sigma_level(torch.exp(k / 250)), edm_f(), edm_in()), distillation=False
        ),
        sigma_level,
        0.002,
        80.0,
    ),
    "rectified_flow": Family(
        lambda law: adapters.from_rectified_flow(lambda x, k: flow_network(law, FLOWS["CondOTScheduler"])(x, k / 999)),
        lambda t: FLOWS["CondOTScheduler"](1 - t)[:2],
        *_FLOW,
    ),
    "rectified_flow wide": Family(
        lambda law: adapters.from_rectified_flow(
            lambda x, k: flow_network(law, lambda u: (u, 2 * (1 - u), torch.ones_like(u), -2 * torch.ones_like(u)))(x, k / 999),
            noise_scale=2.0,
        ),
        lambda t: (1 - t, 2 * t),
        *_FLOW,
    ),
    "lucidrains elucidated": Family(
        lambda law: adapters.from_lucidrains(
            of(
                "ElucidatedDiffusion",
                net=backbone(law, lambda k: sigma_level(torch.exp(4 * k)), edm_f(0.7), edm_in(0.7)),
                sigma_data=0.7,
                sigma_min=0.002,
                sigma_max=80,
            )
        ),
        sigma_level,
        0.002,
        80.0,
    ),
    "azula": Family(_azula, azula_vp, 0.0, 1.0),
    "jit": Family(lambda law: adapters.from_jit(backbone(law, lambda u: (u, 1 - u), X0)), lambda t: (1 - t, t), *_FLOW),
    "v_diffusion": Family(
        lambda law: adapters.from_v_diffusion(
            backbone(law, lambda t: (torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)), V)
        ),
        lambda t: (torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)),
        0.01,
        0.99,
    ),
    "dpm_solver discrete": Family(_dpm_solver, lambda t: in_table(LINEAR_1000)(t * 1000 - 1), *_TABLE),
    "dpm_solver linear": Family(
        lambda law: adapters.from_dpm_solver_wrapper(
            backbone(law, lambda t: linear_beta(t, 0.2, 18.0), EPS),
            of("NoiseScheduleVP", schedule="linear", beta_0=0.2, beta_1=18.0, T=1.0),
        ),
        lambda t: linear_beta(t, 0.2, 18.0),
        1e-3,
        1.0,
    ),
    "latent_diffusion": Family(_compvis, lambda t: in_table(SD_1000)(t * 1000 - 1), *_TABLE),
    "lucidrains eps": _lucidrains_table("pred_noise", EPS, LINEAR_1000),
    "lucidrains x0": _lucidrains_table("pred_x0", X0, sigmoid_betas()),
    "lucidrains v": _lucidrains_table("pred_v", V, sigmoid_betas()),
    "lucidrains continuous": _continuous("ContinuousTimeGaussianDiffusion", EPS, linear_log_snr),
    "lucidrains continuous cosine": _continuous("ContinuousTimeGaussianDiffusion", EPS, cosine_log_snr),
    "lucidrains continuous v": _continuous("VParamContinuousTimeGaussianDiffusion", V, cosine_log_snr),
    **{f"lucidrains rectified {p}": _rectified(p) for p in ("flow", "noise", "clean")},
    **{f"flow_matching {name}": _flow_matching(name) for name in FLOWS},
    "torchcfm": _torchcfm("ConditionalFlowMatcher", 0.0),
    "torchcfm sigma": _torchcfm("ConditionalFlowMatcher", 0.3),
    "torchcfm ot": _torchcfm("ExactOptimalTransportConditionalFlowMatcher", 0.1),
    "torchcfm target": _torchcfm("TargetConditionalFlowMatcher", 0.1),
    "torchcfm target 0": _torchcfm("TargetConditionalFlowMatcher", 0.0),
    "torchcfm vp": _torchcfm("VariancePreservingConditionalFlowMatcher", 0.0),
    "torchcfm vp sigma": _torchcfm("VariancePreservingConditionalFlowMatcher", 0.2),
    **{f"sit {p} {y}": _sit(p, y) for p in ("Linear", "GVP", "VP") for y in ("velocity", "noise", "score")},
}


# --- other things that tests of adapters share ------------------------------------------------------------------------


class Given(Source):
    """Normals given as a list: draw k is the k-th."""

    def __init__(self, normals: list[Tensor]) -> None:
        self.normals = normals

    def open(self, shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Draws:
        return _GivenDraws(self.normals)


class _GivenDraws(Draws):
    def __init__(self, normals: list[Tensor]) -> None:
        self.normals = normals

    def initial(self, out: Any = None) -> Tensor:
        raise NotImplementedError

    def normal(self, k: int, s: Any, t: Any, like: Any = None, out: Any = None) -> Tensor:
        return self.normals[k]


class Smooth(nn.Module):
    """A random smooth network (x, t, y=None) -> (B, out, 2, 2), for whole loops; ``scale`` brings its time to order one."""

    def __init__(self, channels: int = 2, out: int = 2, scale: float = 1.0, classes: int = 0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner, self.outer = nn.Linear(4 * channels, 16), nn.Linear(16, 4 * out)
            self.time, self.label = nn.Linear(2, 16), nn.Embedding(classes + 1, 16)
        self.requires_grad_(False)
        self.scale = scale
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        self.seen.append(t)
        u = (self.scale * t).to(x.dtype).reshape(-1, 1)
        h = self.inner(x.flatten(1)) + self.time(torch.cat([torch.sin(u), torch.cos(u)], 1))
        h = torch.tanh(h if y is None else h + self.label(y))
        return self.outer(h).reshape(len(x), -1, *x.shape[2:])


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.detach() - y.detach()).abs().max() / y.detach().abs().max())
