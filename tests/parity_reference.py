"""Samplers of released code, transcribed from their papers as short float64 loops: what tests/test_parity.py compares with.

Nothing here knows the toolkit. Coefficients are Python floats, states are tensors, and each loop uses its source's
own words and coordinates: ``sigmas`` for EDM's x = x0 + sigma eps, ``levels`` of (alpha, sigma) pairs for x = alpha
x0 + sigma eps. Levels go from noise to data. ``denoise(x, sigma)`` gives E[x0], ``x0(x, i)`` and ``eps(x, i)`` the
pair at level i, and ``normals`` is an iterator of stored normals, asked for only where the sampler uses them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]
AtLevel = Callable[[Tensor, int], Tensor]
Levels = Sequence[tuple[float, float]]
Normals = Iterator[Tensor]

# --- k-diffusion (Crowson), sampling.py: EDM coordinates ------------------------------------------------------------


def kd_churned(x: Tensor, sigma: float, n: int, normals: Normals, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float):
    """The opening of sample_euler, sample_heun and sample_dpm_2: (x, sigma_hat)."""
    gamma = min(s_churn / n, math.sqrt(2.0) - 1.0) if s_tmin <= sigma <= s_tmax else 0.0
    sigma_hat = sigma * (gamma + 1.0)
    if gamma > 0.0:
        x = x + (s_noise * math.sqrt(sigma_hat**2 - sigma**2)) * next(normals)
    return x, sigma_hat


def kd_euler(
    denoise: Denoiser, x: Tensor, sigmas, normals: Normals, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0
) -> Tensor:
    """sample_euler."""
    n = len(sigmas) - 1
    for i in range(n):
        x, sigma_hat = kd_churned(x, sigmas[i], n, normals, s_churn, s_tmin, s_tmax, s_noise)
        d = (x - denoise(x, sigma_hat)) / sigma_hat
        x = x + d * (sigmas[i + 1] - sigma_hat)
    return x


def kd_heun(
    denoise: Denoiser, x: Tensor, sigmas, normals: Normals, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0
) -> Tensor:
    """sample_heun: a step to sigma = 0 is an Euler step."""
    n = len(sigmas) - 1
    for i in range(n):
        x, sigma_hat = kd_churned(x, sigmas[i], n, normals, s_churn, s_tmin, s_tmax, s_noise)
        d = (x - denoise(x, sigma_hat)) / sigma_hat
        dt = sigmas[i + 1] - sigma_hat
        if sigmas[i + 1] == 0.0:
            x = x + d * dt
        else:
            x_2 = x + d * dt
            d_2 = (x_2 - denoise(x_2, sigmas[i + 1])) / sigmas[i + 1]
            x = x + (d + d_2) / 2.0 * dt
    return x


def kd_dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas, normals: Normals) -> Tensor:
    """sample_dpmpp_2m."""
    old, h_last = None, 0.0
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0.0:
            return denoised
        h = math.log(sigma / sigma_next)
        d = denoised
        if old is not None:
            r = h_last / h
            d = (1.0 + 1.0 / (2.0 * r)) * denoised - 1.0 / (2.0 * r) * old
        x = (sigma_next / sigma) * x - math.expm1(-h) * d
        old, h_last = denoised, h
    return x


def kd_dpmpp_2m_sde(denoise: Denoiser, x: Tensor, sigmas, normals: Normals, eta: float = 1.0) -> Tensor:
    """sample_dpmpp_2m_sde, solver_type="midpoint"."""
    old, h_last = None, 0.0
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0.0:
            return denoised
        h = math.log(sigma / sigma_next)
        eta_h = eta * h
        x = (sigma_next / sigma * math.exp(-eta_h)) * x - math.expm1(-h - eta_h) * denoised
        if old is not None:
            x = x - 0.5 * math.expm1(-h - eta_h) * (h / h_last) * (denoised - old)
        if eta > 0.0:
            x = x + (sigma_next * math.sqrt(-math.expm1(-2.0 * eta_h))) * next(normals)
        old, h_last = denoised, h
    return x


def kd_euler_ancestral(denoise: Denoiser, x: Tensor, sigmas, normals: Normals, eta: float = 1.0) -> Tensor:
    """sample_euler_ancestral with get_ancestral_step."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = denoise(x, sigma)
        up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
        down = math.sqrt(sigma_next**2 - up**2)
        x = x + (x - denoised) / sigma * (down - sigma)
        if sigma_next > 0.0:
            x = x + up * next(normals)
    return x


def kd_lms(denoise: Denoiser, x: Tensor, sigmas, normals: Normals, order: int = 4) -> Tensor:
    """sample_lms, with the integrals of its Lagrange polynomials exact (the released quadrature has a tolerance of 1e-4)."""
    slopes: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        slopes = [*slopes, (x - denoise(x, sigma)) / sigma][-order:]
        nodes = sigmas[i + 1 - len(slopes) : i + 1]
        step = 0.0
        for j, d in enumerate(slopes):
            others = [s for k, s in enumerate(nodes) if k != j]
            # In sigma - sigmas[i], so that the polynomial's integral does not cancel.
            poly = np.poly1d([o - sigma for o in others], r=True) / math.prod(nodes[j] - o for o in others)
            step = step + float(np.polyint(poly)(sigma_next - sigma)) * d
        x = x + step
    return x


# --- EDM (Karras et al. 2022), algorithm 2 --------------------------------------------------------------------------


def edm_algorithm_2(
    denoise: Denoiser,
    x: Tensor,
    t,
    normals: Normals,
    churn: float,
    low: float,
    high: float,
    s_noise: float,
    cap: float = math.inf,
) -> Tensor:
    """Stochastic Heun. ``cap`` bounds t_hat, which the paper does not do: its first step asks the network beyond sigma_max."""
    n = len(t) - 1
    for i in range(n):
        gamma = min(churn / n, math.sqrt(2.0) - 1.0) if low <= t[i] <= high else 0.0
        t_hat = min(t[i] + gamma * t[i], cap)
        if t_hat > t[i]:
            x = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * next(normals)
        d = (x - denoise(x, t_hat)) / t_hat
        x_next = x + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0.0:
            d_2 = (x_next - denoise(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (0.5 * d + 0.5 * d_2)
        x = x_next
    return x


# --- score_sde (Song et al. 2021), sampling.py: one update of a predictor, score = grad log p -----------------------


def song_euler_maruyama_vp(score: Tensor, x: Tensor, beta_t: float, dt: float, z: Tensor) -> Tensor:
    """EulerMaruyamaPredictor on the VP SDE, with dt < 0."""
    drift = -0.5 * beta_t * x - beta_t * score
    return x + drift * dt + math.sqrt(beta_t) * math.sqrt(-dt) * z


def song_euler_maruyama_ve(
    score: Tensor, x: Tensor, sigma: float, sigma_min: float, sigma_max: float, dt: float, z: Tensor
) -> Tensor:
    """EulerMaruyamaPredictor on the VE SDE, with dt < 0."""
    g = sigma * math.sqrt(2.0 * (math.log(sigma_max) - math.log(sigma_min)))
    return x - g**2 * score * dt + g * math.sqrt(-dt) * z


def song_ancestral_ve(score: Tensor, x: Tensor, sigma: float, adjacent: float, z: Tensor) -> Tensor:
    """AncestralSamplingPredictor.vesde_update_fn."""
    std = math.sqrt(adjacent**2 * (sigma**2 - adjacent**2) / sigma**2)
    return x + score * (sigma**2 - adjacent**2) + std * z


def song_ancestral_vp(score: Tensor, x: Tensor, beta: float, z: Tensor) -> Tensor:
    """AncestralSamplingPredictor.vpsde_update_fn."""
    return (x + beta * score) / math.sqrt(1.0 - beta) + math.sqrt(beta) * z


def song_reverse_diffusion_ve(score: Tensor, x: Tensor, sigma: float, adjacent: float, z: Tensor) -> Tensor:
    """ReverseDiffusionPredictor with VESDE.discretize."""
    g = math.sqrt(sigma**2 - adjacent**2)
    return x + g**2 * score + g * z


def song_reverse_diffusion_vp(score: Tensor, x: Tensor, beta: float, z: Tensor) -> Tensor:
    """ReverseDiffusionPredictor with VPSDE.discretize."""
    forward = math.sqrt(1.0 - beta) * x - x
    return x - (forward - beta * score) + math.sqrt(beta) * z


def song_langevin(
    score: Callable[[Tensor], Tensor], x: Tensor, snr: float, n_steps: int, alpha: float, normals: Normals
) -> Tensor:
    """LangevinCorrector: norms are means over the batch; alpha is 1 for VE and sub-VP, 1 - beta_i for VP."""
    for _ in range(n_steps):
        grad, noise = score(x), next(normals)
        grad_norm = grad.reshape(len(grad), -1).norm(dim=-1).mean()
        noise_norm = noise.reshape(len(noise), -1).norm(dim=-1).mean()
        step = (snr * noise_norm / grad_norm) ** 2 * 2.0 * alpha
        x = x + step * grad + (step * 2.0).sqrt() * noise
    return x


# --- NCSN (Song & Ermon 2019) ---------------------------------------------------------------------------------------


def ncsn_paper(score: Denoiser, x: Tensor, sigmas, normals: Normals, epsilon: float, sigma_last: float, inner: int) -> Tensor:
    """Algorithm 1: alpha_i = epsilon sigma_i^2 / sigma_L^2, x + alpha_i/2 score + sqrt(alpha_i) z."""
    for sigma in sigmas:
        step = epsilon * sigma**2 / sigma_last**2
        for _ in range(inner):
            x = x + step / 2.0 * score(x, sigma) + math.sqrt(step) * next(normals)
    return x


def ncsn_code(score: Denoiser, x: Tensor, sigmas, normals: Normals, step_lr: float, sigma_last: float, inner: int) -> Tensor:
    """anneal_Langevin_dynamics as released, whose step is twice the paper's: x + step score + sqrt(2 step) z."""
    for sigma in sigmas:
        step = step_lr * (sigma / sigma_last) ** 2
        for _ in range(inner):
            x = x + step * score(x, sigma) + math.sqrt(step * 2.0) * next(normals)
    return x


# --- azula: any (alpha, sigma) --------------------------------------------------------------------------------------


def azula_ddim(x0: AtLevel, x: Tensor, levels: Levels, normals: Normals, eta: float) -> Tensor:
    """DDIMSampler; eta = 1 is DDPMSampler. Its tau is 1 - (alpha_t sigma_s / alpha_s sigma_t)^2 and eta scales it."""
    for i, ((alpha_t, sigma_t), (alpha_s, sigma_s)) in enumerate(itertools.pairwise(levels)):
        tau = eta * (1.0 - (alpha_t / alpha_s * sigma_s / sigma_t) ** 2)
        mean = x0(x, i)
        x = alpha_s * mean + sigma_s * math.sqrt(1.0 - tau) / sigma_t * (x - alpha_t * mean)
        if eta > 0.0 and sigma_s > 0.0:
            x = x + sigma_s * math.sqrt(tau) * next(normals)
    return x


def azula_heun(eps: AtLevel, x: Tensor, levels: Levels, normals: Normals, order: int) -> Tensor:
    """EulerSampler (order 1) and HeunSampler (order 2), in sigma / alpha."""
    for i, ((alpha_t, sigma_t), (alpha_s, sigma_s)) in enumerate(itertools.pairwise(levels)):
        z = eps(x, i)
        width = sigma_s / alpha_s - sigma_t / alpha_t
        if order == 2:
            z = (z + eps(alpha_s / alpha_t * x + alpha_s * width * z, i + 1)) / 2.0
        x = alpha_s / alpha_t * x + alpha_s * width * z
    return x


def azula_zab(eps: AtLevel, x: Tensor, levels: Levels, normals: Normals, order: int) -> Tensor:
    """zABSampler: Adams-Bashforth in sigma / alpha, coefficients from the Vandermonde system (shifted to the current node)."""
    u, buffer = [sigma / alpha for alpha, sigma in levels], []
    for i in range(len(levels) - 1):
        buffer = [*buffer, eps(x, i)][-order:]
        n = len(buffer)
        nodes = np.array(u[i + 1 - n : i + 1]) - u[i]
        end = u[i + 1] - u[i]
        weights = np.linalg.solve(nodes[None, :] ** np.arange(n)[:, None], [end ** (k + 1) / (k + 1) for k in range(n)])
        x = levels[i + 1][0] / levels[i][0] * x + levels[i + 1][0] * sum(
            float(w) * z for w, z in zip(weights, buffer, strict=True)
        )
    return x


# --- DPM-Solver (Lu et al. 2022) and UniPC (Zhao et al. 2023), multistep --------------------------------------------


def dpm_solver_multistep_2(model: AtLevel, x: Tensor, levels: Levels, algorithm: str, lower_order_final: bool) -> Tensor:
    """Order 2, solver_type "dpmsolver" (midpoint): model predicts x0 for "dpmsolver++" and eps for "dpmsolver"."""
    n, lam = len(levels) - 1, [math.log(a / s) for a, s in levels]
    outputs: list[Tensor] = []
    for i in range(n):
        outputs.append(model(x, i))
        (alpha_s, sigma_s), (alpha_t, sigma_t) = levels[i], levels[i + 1]
        order = min(2, i + 1, n - i) if lower_order_final else min(2, i + 1)
        h = lam[i + 1] - lam[i]
        if algorithm == "dpmsolver++":
            phi_1 = math.expm1(-h)
            out = sigma_t / sigma_s * x - alpha_t * phi_1 * outputs[-1]
        else:
            phi_1 = math.expm1(h)
            out = alpha_t / alpha_s * x - sigma_t * phi_1 * outputs[-1]
        if order == 2:
            r0 = (lam[i] - lam[i - 1]) / h
            d1 = (outputs[-1] - outputs[-2]) / r0
            out = out - 0.5 * (alpha_t if algorithm == "dpmsolver++" else sigma_t) * phi_1 * d1
        x = out
    return x


def unipc_bh(
    model: AtLevel, x: Tensor, levels: Levels, order: int, variant: str, predict_x0: bool, lower_order_final: bool
) -> Tensor:
    """multistep_uni_pc_bh_update in a multistep loop: predict x_t, evaluate there, correct x_t; the last step is not
    corrected."""
    n, lam = len(levels) - 1, [math.log(a / s) for a, s in levels]
    outputs = [model(x, 0)]
    for i in range(n):
        p = min(order, i + 1, n - i) if lower_order_final else min(order, i + 1)
        (alpha_s, sigma_s), (alpha_t, sigma_t) = levels[i], levels[i + 1]
        h, m0 = lam[i + 1] - lam[i], outputs[-1]
        hh = -h if predict_x0 else h
        ratios = [(lam[i - j] - lam[i]) / h for j in range(1, p)]
        d1s = [(outputs[-1 - j] - m0) / r for j, r in zip(range(1, p), ratios, strict=True)]
        ratios = [*ratios, 1.0]
        b_h = hh if variant == "bh1" else math.expm1(hh)
        rows, rhs = [], []
        h_phi_k, factorial = math.expm1(hh) / hh - 1.0, 1.0
        for k in range(1, p + 1):
            rows.append([r ** (k - 1) for r in ratios])
            rhs.append(h_phi_k * factorial / b_h)
            factorial *= k + 1
            h_phi_k = h_phi_k / hh - 1.0 / factorial
        matrix, rhs = np.array(rows), np.array(rhs)
        if predict_x0:
            base, scale = sigma_t / sigma_s * x - alpha_t * math.expm1(hh) * m0, alpha_t
        else:
            base, scale = alpha_t / alpha_s * x - sigma_t * math.expm1(hh) * m0, sigma_t
        rho_p = [] if p == 1 else [0.5] if p == 2 else np.linalg.solve(matrix[:-1, :-1], rhs[:-1]).tolist()
        x_t = base - scale * b_h * sum(w * d for w, d in zip(rho_p, d1s, strict=True))
        if i < n - 1:
            arrived = model(x_t, i + 1)
            rho_c = [0.5] if p == 1 else np.linalg.solve(matrix, rhs).tolist()
            x_t = base - scale * b_h * sum(w * d for w, d in zip(rho_c, [*d1s, arrived - m0], strict=True))
            outputs.append(arrived)
        x = x_t
    return x
