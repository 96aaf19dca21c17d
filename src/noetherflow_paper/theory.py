"""Theory curves for linear networks: the Noether flow along the orbit of a given solution (theory.md 4, 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from noetherflow.core import spd
from noetherflow.core.settings import SGDConfig
from noetherflow_paper import closed_form as cf

Pair = tuple[Tensor, Tensor]
Gammas = Pair | Callable[[Tensor, Tensor], Pair]


def balance(params: Sequence[Tensor]) -> dict[str, Tensor]:
    """`ratio = log(||U||^2 / ||W||^2)` and `charge = ||W||^2 - ||U||^2` of `[W, U]`, per replica."""
    w, u = (p.square().sum((-2, -1)) for p in params)
    return {"ratio": (u / w).log(), "charge": w - u}


def stretched(product: Tensor, factor: float) -> Pair:
    """`(U, W)`: the norm-balanced solution with U `factor` times larger and W smaller by the same factor."""
    u, w = cf.norm_balanced(product)
    return factor * u, w / factor


def fall_time(steps: np.ndarray, curve: np.ndarray, level: float) -> float:
    """Steps until `curve` first falls to `level` times its first value, interpolated in the logarithm; nan if never."""
    logs = np.log(np.maximum(curve / curve[0], 1e-9) / level)
    below = int(np.argmax(logs < 0))
    if logs[below] >= 0:
        return float("nan")
    a, b = logs[below - 1], logs[below]
    return float(steps[below - 1] + (steps[below] - steps[below - 1]) * a / (a - b))


def charge_drift(u: Tensor, w: Tensor, gammas: Gammas, sgd: SGDConfig, loss_scale: float = 1.0) -> Tensor:
    """Expected change per step of `C = W W^T - U^T U`, `[..., d, d]` (theory.md section 4).

    `-eta (2w - eta w^2) C + 4 c^2 eta^2 f (U^T Gam_U U - W Gam_W W^T)`, `eta` the effective learning rate.
    """
    at_point = gammas(u, w) if callable(gammas) else gammas
    eta, decay = sgd.effective_lr, sgd.weight_decay
    noise = -4 * loss_scale**2 * eta**2 * sgd.covariance_factor * cf.two_layer_residual(u, w, *at_point)
    return noise - eta * (2 * decay - eta * decay**2) * (w @ w.mT - u.mT @ u)


def orbit_flow(
    u: Tensor,
    w: Tensor,
    gammas: Gammas,
    sgd: SGDConfig,
    at: Sequence[int],
    loss_scale: float = 1.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """`(U, W)` at the steps `at` when only the Noether flow acts: `U W` stays, `C` moves by its expected drift.

    `gammas`: the noise matrices, or a function `(u, w) -> gammas`.
    `dW = A W`, `dU = -U A` with A symmetric and `A K + K A = dC`, `K = W W^T + U^T U`; midpoint rule with steps short
    beside the fastest relaxation time. Shapes `[..., d_y, d]`, `[..., d, d_x]`.
    """

    def generator(u: Tensor, w: Tensor) -> Tensor:
        k, q = torch.linalg.eigh(w @ w.mT + u.mT @ u)
        drift = q.mT @ charge_drift(u, w, gammas, sgd, loss_scale) @ q
        sums = (k.unsqueeze(-1) + k.unsqueeze(-2)).clamp_min(1e-12 * k.amax())
        return q @ (drift / sums) @ q.mT

    def move(u: Tensor, w: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return u @ spd.expm(-a), spd.expm(a) @ w

    largest = sum(float(torch.linalg.matrix_norm(g, 2).max()) for g in (gammas(u, w) if callable(gammas) else gammas))
    decay = 4 * sgd.effective_lr * sgd.weight_decay
    fastest = 4 * loss_scale**2 * sgd.effective_lr**2 * sgd.covariance_factor * largest + decay
    stride = 0.25 / fastest
    us, ws, now = [], [], 0.0
    for target in at:
        count = max(1, int(-(-(target - now) // stride))) if target > now else 0
        for _ in range(count):
            h = (target - now) / count
            middle = move(u, w, h / 2 * generator(u, w))
            u, w = move(u, w, h * generator(*middle))
        now = float(target)
        us.append(u)
        ws.append(w)
    return us, ws


def finite_step_gammas(
    sigma_x: Tensor, sigma_eps: Tensor, sgd: SGDConfig, loss_scale: float = 1.0
) -> Callable[[Tensor, Tensor], Pair]:
    """Noise matrices at first order in eta: with the stationary fluctuation of `E = U W - V`.

    Valid where `Sig_x` commutes with `W^T W` (isotropic inputs, or aligned ones). R_B rather than Sigma drives the
    charge (theory.md section 1), so beyond `noise_matrices(error=E)` there are `(S - 1) <E Sig_x^2 E^T>` and
    `(S - 1) Sig_x <E^T E> Sig_x`. In the eigenbases of `U U^T` (a_i) and of `W^T W` and `Sig_x` (b_j, x_j) the linear
    part of a step is `E_ij -> E_ij - 2 c eta (a_i + b_j) (x_j E_ij - noise_ij)`, so that Cov[E] solves a diagonal
    Lyapunov equation.
    """
    eta, s = sgd.effective_lr, sgd.batch_size

    def gammas(u: Tensor, w: Tensor) -> Pair:
        a, qa = torch.linalg.eigh(u @ u.mT)
        wtw = w.mT @ w
        joint = sigma_x / cf.trace(sigma_x)[..., None, None] + 1e-3 * wtw / cf.trace(wtw)[..., None, None]
        qb = torch.linalg.eigh(joint).eigenvectors
        b, x = ((qb.mT @ m @ qb).diagonal(dim1=-2, dim2=-1) for m in (wtw, sigma_x))
        noise = qa.mT @ sigma_eps @ qa
        kick = 2 * loss_scale * eta * (a.unsqueeze(-1) + b.unsqueeze(-2))
        rates = kick * x.unsqueeze(-2)
        decay = rates.unsqueeze(-2) + rates.unsqueeze(-3) - rates.unsqueeze(-2) * rates.unsqueeze(-3)
        source = kick.unsqueeze(-2) * kick.unsqueeze(-3) * noise.unsqueeze(-1) * x[..., None, None, :] / s
        covariance = source / decay.clamp_min(1e-30)
        once, twice = (qa @ (covariance * x[..., None, None, :] ** k).sum(-1) @ qa.mT for k in (1, 2))
        columns = (qb * covariance.diagonal(dim1=-3, dim2=-2).sum(-1).unsqueeze(-2)) @ qb.mT
        gam_u, gam_w = cf.noise_matrices(sigma_x, sigma_eps)
        gam_u = gam_u + cf.trace(sigma_x)[..., None, None] * once + (1 + s) * twice
        return gam_u, gam_w + cf.trace(once)[..., None, None] * sigma_x + (1 + s) * sigma_x @ columns @ sigma_x

    return gammas


def first_order_equilibrium(
    product: Tensor, sigma_x: Tensor, sigma_eps: Tensor, sgd: SGDConfig, steps: int, loss_scale: float = 1.0
) -> Pair:
    """`(U, W)` after `steps` of the flow with `finite_step_gammas`, from the equilibrium of eta -> 0."""
    first = cf.two_layer(product, *cf.noise_matrices(sigma_x, sigma_eps))
    us, ws = orbit_flow(*first, finite_step_gammas(sigma_x, sigma_eps, sgd, loss_scale), sgd, [steps], loss_scale)
    return us[-1], ws[-1]
