"""Closed-form noise equilibria of linear networks with Gaussian data, and their sharpness (theory.md sections 8 to 10).

Per-sample loss `c * ||W_D ... W_1 x - y||^2` with `y = V x + eps`, eps independent of x; `c` is `loss_scale`
(1: the paper's, 1/2: halved, 1/d_y: mean over outputs). Every function is batched over leading axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from noetherflow.core import spd
from noetherflow.core.settings import SGDConfig


def trace(a: Tensor) -> Tensor:
    """`Tr A` over the last two axes."""
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)


def _scaled(factor: Tensor, matrix: Tensor) -> Tensor:
    return factor[..., None, None] * matrix


def noise_matrices(sigma_x: Tensor, sigma_eps: Tensor, error: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`Gam_U = E[|x|^2 r r^T]`, `Gam_W = E[|r|^2 x x^T]` for Gaussian x and `r = error x - eps` (theory.md section 8).

    `sigma_x` `[..., d_x, d_x]`, `sigma_eps` `[..., d_y, d_y]`, `error = U W - V` `[..., d_y, d_x]` (None: the minimum,
    where they are `Tr(Sig_x) Sig_eps` and `Tr(Sig_eps) Sig_x`). With an error Isserlis' theorem adds the rest.
    """
    gam_u = _scaled(trace(sigma_x), sigma_eps)
    gam_w = _scaled(trace(sigma_eps), sigma_x)
    if error is None:
        return gam_u, gam_w
    es = error @ sigma_x
    signal = es @ error.mT
    gam_u = gam_u + _scaled(trace(sigma_x), signal) + 2 * es @ es.mT
    return gam_u, gam_w + _scaled(trace(signal), sigma_x) + 2 * es.mT @ es


def decay_shift(sgd: SGDConfig, loss_scale: float = 1.0) -> float:
    """`w~ / (2 c^2 eta f)`, what weight decay adds to the diagonal of both noise matrices (theory.md section 8).

    `w~ = w (1 - eta w / 2)`, `f = 1/S` (with the finite-data factor), `eta` the effective learning rate. For `c = 1`
    and small eta it is `w S / (2 eta)`.
    """
    eta = sgd.effective_lr
    decay = sgd.weight_decay * (1 - eta * sgd.weight_decay / 2)
    return decay / (2 * loss_scale**2 * eta * sgd.covariance_factor)


def with_decay(gammas: tuple[Tensor, Tensor], sgd: SGDConfig, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """`(Gam_U, Gam_W)` plus `decay_shift` on the diagonal."""
    shift = decay_shift(sgd, loss_scale)
    return tuple(g + shift * torch.eye(g.shape[-1], dtype=g.dtype, device=g.device) for g in gammas)  # type: ignore[return-value]


def two_layer(
    product: Tensor, gam_u: Tensor, gam_w: Tensor, width: int | None = None, frame: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`U = Gam_U^-1/2 L s^1/2 F`, `W = F^T s^1/2 R Gam_W^-1/2` from the SVD `L s R` of `Gam_U^1/2 V Gam_W^1/2`.

    The unique noise equilibrium with `U W = product`, up to the orthogonal frame `F` `[..., k, width]` with
    orthonormal rows, `k = min(d_x, d_y)` (default: the first k coordinate directions, `width = k`).
    Raises ValueError when `width` is smaller than k.
    """
    left, s, right = torch.linalg.svd(spd.sqrtm(gam_u) @ product @ spd.sqrtm(gam_w), full_matrices=False)
    k = s.shape[-1]
    if frame is None:
        width = k if width is None else width
        if width < k:
            raise ValueError(f"width {width} is smaller than min(d_x, d_y) = {k}: the product has no such factors")
        frame = torch.eye(k, width, dtype=product.dtype, device=product.device)
    root = s.sqrt()
    u = spd.inv_sqrtm(gam_u) @ (left * root.unsqueeze(-2)) @ frame
    return u, frame.mT @ (root.unsqueeze(-1) * right) @ spd.inv_sqrtm(gam_w)


def two_layer_residual(u: Tensor, w: Tensor, gam_u: Tensor, gam_w: Tensor) -> Tensor:
    """`W Gam_W W^T - U^T Gam_U U`, zero at the noise equilibrium, `[..., d, d]` (theory.md section 8)."""
    return w @ gam_w @ w.mT - u.mT @ gam_u @ u


def two_layer_hessian_trace(u: Tensor, w: Tensor, sigma_x: Tensor, loss_scale: float = 1.0) -> Tensor:
    """`Tr H = 2 c (d_y Tr(W Sig_x W^T) + ||U||_F^2 Tr Sig_x)` of the population loss (theory.md section 8)."""
    return 2 * loss_scale * (u.shape[-2] * trace(w @ sigma_x @ w.mT) + u.square().sum((-2, -1)) * trace(sigma_x))


def norm_balanced(product: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """The factors with `U^T U = W W^T` (where gradient flow with weight decay ends)."""
    eye_u = torch.eye(product.shape[-2], dtype=product.dtype, device=product.device)
    eye_w = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    return two_layer(product, eye_u, eye_w, width)


def identity_covariance(phi: float, d: int) -> Tensor:
    """`Sig_x = diag(phi, ..., phi, 2 - phi, ..., 2 - phi)` of size d, halves of equal length, float64."""
    half = torch.full((d // 2,), phi, dtype=torch.float64)
    return torch.diag(torch.cat([half, torch.full((d - d // 2,), 2 - phi, dtype=torch.float64)]))


def identity_norm_ratio(phi: float) -> float:
    """`||U||^2 / ||W||^2 = sqrt(phi (2 - phi))` for `V = I`, `Sig_eps = I`, `Sig_x = identity_covariance`, no decay."""
    return float((phi * (2 - phi)) ** 0.5)


def identity_hessian_trace(phi: float, d: int, loss_scale: float = 0.5) -> float:
    """`Tr H = 2 c d^2 (sqrt(phi) + sqrt(2 - phi))` in the setting of `identity_norm_ratio` (d even)."""
    return float(2 * loss_scale * d**2 * (phi**0.5 + (2 - phi) ** 0.5))


def deep_linear(
    product: Tensor, sigma_x: Tensor, sigma_eps: Tensor, depth: int, width: int | None = None
) -> list[Tensor]:
    """`[W_1, ..., W_D]` with `W_D ... W_1 = V` at the noise equilibrium (theory.md section 9).

    SVD `Sig_eps^1/2 V Sig_x^1/2 = L S' R`, `c = (Tr S' / sqrt(Tr Sig_x Tr Sig_eps))^(1/D)`; middle layers are `c` times
    partial isometries, outer ones `U_1 s1 R Sig_x^-1/2` and `Sig_eps^-1/2 L sD U_{D-1}^T`. Hidden width >= rank;
    directions beyond the rank stay zero. Raises ValueError for a depth below 2 or too small a width.
    """
    if depth < 2:
        raise ValueError(f"depth must be at least 2, got {depth}")
    left, s, right = torch.linalg.svd(spd.sqrtm(sigma_eps) @ product @ spd.sqrtm(sigma_x), full_matrices=False)
    k = s.shape[-1]
    width = k if width is None else width
    if width < k:
        raise ValueError(f"width {width} is smaller than min(d_x, d_y) = {k}")
    live = (s > 1e-12 * s[..., :1]).to(s)
    frame = torch.eye(width, k, dtype=s.dtype, device=s.device)
    tx, te = trace(sigma_x), trace(sigma_eps)
    c = (s.sum(-1) / (tx * te).sqrt()) ** (1 / depth)
    outer = c ** (-(depth - 2) / 2)
    s1, s_last = (tx / te) ** 0.25 * outer, (te / tx) ** 0.25 * outer
    root = s.sqrt() * live
    first = frame @ ((s1[..., None] * root).unsqueeze(-1) * right) @ spd.inv_sqrtm(sigma_x)
    last = spd.inv_sqrtm(sigma_eps) @ (left * (s_last[..., None] * root).unsqueeze(-2)) @ frame.mT
    middle = (frame * (c[..., None] * live).unsqueeze(-2)) @ frame.mT
    return [first, *([middle] * (depth - 2)), last]


def prefix_products(layers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """`B_i = W_{i-1} ... W_1` and `A_i = W_D ... W_{i+1}` for i = 1..D (the outermost ones identities)."""
    like = layers[0]
    eye = lambda n: torch.eye(n, dtype=like.dtype, device=like.device)
    before, after = [eye(layers[0].shape[-1])], [eye(layers[-1].shape[-2])]
    for layer in layers[:-1]:
        before.append(layer @ before[-1])
    for layer in reversed(layers[1:]):
        after.append(after[-1] @ layer)
    return before, after[::-1]


def gradient_grams(layers: Sequence[Tensor], sigma_x: Tensor, sigma_eps: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`(E[dW_i dW_i^T], E[dW_i^T dW_i])` per layer at the global minimum, un-halved loss (theory.md section 9).

    `dW_i = 2 A_i^T r (B_i x)^T`: the two are `4 Tr(B Sig_x B^T) A^T Sig_eps A` and `4 Tr(A^T Sig_eps A) B Sig_x B^T`.
    """
    grams = []
    for b, a in zip(*prefix_products(layers), strict=True):
        hidden, back = b @ sigma_x @ b.mT, a.mT @ sigma_eps @ a
        grams.append((4 * _scaled(trace(hidden), back), 4 * _scaled(trace(back), hidden)))
    return grams


def deep_linear_residuals(layers: Sequence[Tensor], sigma_x: Tensor, sigma_eps: Tensor) -> list[Tensor]:
    """`(E[dW_i dW_i^T] - E[dW_{i+1}^T dW_{i+1}]) / 4` for neighbouring layers: all zero at the noise equilibrium."""
    grams = gradient_grams(layers, sigma_x, sigma_eps)
    return [(rows[0] - columns[1]) / 4 for rows, columns in pairwise(grams)]


def noise_trace(layers: Sequence[Tensor], sigma_x: Tensor, sigma_eps: Tensor) -> Tensor:
    """`Tr Sigma = E ||grad l||^2` at the global minimum, un-halved loss: minimal at the equilibrium of an orbit."""
    return sum((trace(rows) for rows, _ in gradient_grams(layers, sigma_x, sigma_eps)), torch.zeros(()).to(sigma_x))


def initial_sharpness(d_x: int, d: int, var_u: float, var_w: float, trace_x: float) -> float:
    """`S_init = d_x d (s_U^2 + s_W^2) Tr Sig_x`, halved loss, isotropic autoencoder (theory.md section 10)."""
    return d_x * d * (var_u + var_w) * trace_x


def equilibrium_sharpness(d_x: int, d: int, trace_x: float) -> float:
    """`S_end = 2 min(d, d_x) Tr Sig_x`, halved loss, isotropic autoencoder (theory.md section 10)."""
    return 2 * min(d, d_x) * trace_x


def scalar_decay_rate(lr: float, batch_size: int, var_x: float, var_eps: float, loss_scale: float = 1.0) -> float:
    """`eta^2 Var[dl/d(uw)] / S = 4 c^2 eta^2 Var(x) Var(eps) / S`: decay of `|u^2 - w^2|` per step.

    For `l = c (u w x - y)^2` at the minimum; exact per step because `u'^2 - w'^2 = (u^2 - w^2)(1 - eta^2 g^2)`.
    """
    return 4 * loss_scale**2 * lr**2 * var_x * var_eps / batch_size
