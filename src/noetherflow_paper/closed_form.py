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
    """`Tr A` of matrices in the last two axes, `[..., n, n] -> [...]`."""
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)


def _scaled(factor: Tensor, matrix: Tensor) -> Tensor:
    """One number `[...]` per matrix `[..., n, m]`, multiplied on."""
    return factor[..., None, None] * matrix


def noise_matrices(sigma_x: Tensor, sigma_eps: Tensor, error: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The matrices through which gradient noise acts on the two layers of `||U W x - y||^2`.

    `Gam_U = E[|x|^2 r r^T]` and `Gam_W = E[|r|^2 x x^T]` with the residual `r = (U W - V) x - eps`, for Gaussian x. At
    the minimum they are `Tr(Sig_x) Sig_eps` and `Tr(Sig_eps) Sig_x`; with an error Isserlis' theorem adds the rest.

    Args:
        sigma_x: covariance of the inputs, `[..., d_x, d_x]`.
        sigma_eps: covariance of the label noise, `[..., d_y, d_y]`.
        error: `U W - V`, `[..., d_y, d_x]`; None at the minimum.

    Returns:
        `(Gam_U, Gam_W)`, `[..., d_y, d_y]` and `[..., d_x, d_x]`.

    Example:
        >>> gam_u, gam_w = noise_matrices(torch.eye(3), 2 * torch.eye(2))
        >>> gam_u.diagonal().tolist(), gam_w.diagonal().tolist()
        ([6.0, 6.0], [4.0, 4.0, 4.0])

    Source: theory.md section 8.
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
    """What weight decay adds to the diagonal of both noise matrices: `w~ / (2 c^2 eta f)`.

    `w~ = w (1 - eta w / 2)`, `eta` is the effective learning rate, and `f = 1/S`, times the finite-data factor. For
    `c = 1` and small eta it is `w S / (2 eta)`.

    Args:
        sgd: learning rate, batch size S, weight decay w, momentum and sampling.
        loss_scale: `c` in front of the squared error.

    Example:
        >>> round(decay_shift(SGDConfig(lr=0.01, batch_size=20, weight_decay=0.002)), 4)
        2.0

    Source: theory.md section 8.
    """
    eta = sgd.effective_lr
    decay = sgd.weight_decay * (1 - eta * sgd.weight_decay / 2)
    return decay / (2 * loss_scale**2 * eta * sgd.covariance_factor)


def with_decay(gammas: tuple[Tensor, Tensor], sgd: SGDConfig, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The noise matrices `(Gam_U, Gam_W)` with `decay_shift` added to their diagonals."""
    shift = decay_shift(sgd, loss_scale)
    return tuple(g + shift * torch.eye(g.shape[-1], dtype=g.dtype, device=g.device) for g in gammas)  # type: ignore[return-value]


def two_layer(
    product: Tensor, gam_u: Tensor, gam_w: Tensor, width: int | None = None, frame: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The noise equilibrium of a two-layer linear net: the factors of `V` at which noise pulls equally on both.

    `U = Gam_U^-1/2 L s^1/2 F`, `W = F^T s^1/2 R Gam_W^-1/2` from the SVD `L s R` of `Gam_U^1/2 V Gam_W^1/2`. It is
    unique up to the frame F, which says in which hidden directions the k = min(d_x, d_y) used ones lie.

    Args:
        product: `V`, `[..., d_y, d_x]`.
        gam_u: noise matrix `[..., d_y, d_y]`.
        gam_w: noise matrix `[..., d_x, d_x]`.
        width: hidden units, k by default.
        frame: `F`, `[..., k, width]` with orthonormal rows; by default the first k coordinate directions.

    Returns:
        `(U, W)`, `[..., d_y, width]` and `[..., width, d_x]`, with `U W = V`.

    Raises:
        ValueError: `width` is smaller than k.

    Example:
        >>> u, w = two_layer(torch.eye(2), torch.eye(2), 16 * torch.eye(2))
        >>> u.diagonal().tolist(), w.diagonal().tolist()
        ([2.0, 2.0], [0.5, 0.5])

    Source: theory.md section 8.
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
    """How far a two-layer net is from its noise equilibrium: `W Gam_W W^T - U^T Gam_U U`, `[..., d, d]`, zero there.

    Source: theory.md section 8.
    """
    return w @ gam_w @ w.mT - u.mT @ gam_u @ u


def two_layer_hessian_trace(u: Tensor, w: Tensor, sigma_x: Tensor, loss_scale: float = 1.0) -> Tensor:
    """The trace of the Hessian of the population loss: `2 c (d_y Tr(W Sig_x W^T) + ||U||_F^2 Tr Sig_x)`, `[...]`.

    Source: theory.md section 8.
    """
    return 2 * loss_scale * (u.shape[-2] * trace(w @ sigma_x @ w.mT) + u.square().sum((-2, -1)) * trace(sigma_x))


def norm_balanced(product: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """The factors `(U, W)` of a matrix with `U^T U = W W^T`, where gradient flow with weight decay ends."""
    eye_u = torch.eye(product.shape[-2], dtype=product.dtype, device=product.device)
    eye_w = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    return two_layer(product, eye_u, eye_w, width)


def identity_covariance(phi: float, d: int) -> Tensor:
    """The diagonal covariance of size d whose first half is phi and whose second half is 2 - phi, float64."""
    half = torch.full((d // 2,), phi, dtype=torch.float64)
    return torch.diag(torch.cat([half, torch.full((d - d // 2,), 2 - phi, dtype=torch.float64)]))


def identity_norm_ratio(phi: float) -> float:
    """`||U||^2 / ||W||^2` at the noise equilibrium for `V = Sig_eps = I`, `Sig_x = identity_covariance(phi, d)`.

    Example:
        >>> identity_norm_ratio(0.4)
        0.8
    """
    return float((phi * (2 - phi)) ** 0.5)


def identity_hessian_trace(phi: float, d: int, loss_scale: float = 0.5) -> float:
    """The Hessian's trace in the setting of `identity_norm_ratio`, d even: `2 c d^2 (sqrt(phi) + sqrt(2 - phi))`."""
    return float(2 * loss_scale * d**2 * (phi**0.5 + (2 - phi) ** 0.5))


def deep_linear(
    product: Tensor, sigma_x: Tensor, sigma_eps: Tensor, depth: int, width: int | None = None
) -> list[Tensor]:
    """The noise equilibrium of a deep linear net at the minimum of its loss.

    With the SVD `Sig_eps^1/2 V Sig_x^1/2 = L S' R` and `c = (Tr S' / sqrt(Tr Sig_x Tr Sig_eps))^(1/D)`, middle layers
    are c times partial isometries, the outer ones `U_1 s1 R Sig_x^-1/2` and `Sig_eps^-1/2 L sD U_{D-1}^T`. Directions
    beyond the rank of V stay zero.

    Args:
        product: `V`, `[..., d_y, d_x]`.
        sigma_x: covariance of the inputs.
        sigma_eps: covariance of the label noise.
        depth: number of layers D.
        width: hidden units of every layer, `min(d_x, d_y)` by default.

    Returns:
        `[W_1, ..., W_D]` with `W_D ... W_1 = V`.

    Raises:
        ValueError: a depth below 2, or too small a width.

    Source: theory.md section 9.
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
    """What comes before and after each layer of a linear net.

    Returns:
        Two lists over the layers i = 1..D: `B_i = W_{i-1} ... W_1` and `A_i = W_D ... W_{i+1}`; `B_1` and `A_D` are
        identities.
    """
    like = layers[0]
    eye = lambda n: torch.eye(n, dtype=like.dtype, device=like.device)
    before, after = [eye(layers[0].shape[-1])], [eye(layers[-1].shape[-2])]
    for layer in layers[:-1]:
        before.append(layer @ before[-1])
    for layer in reversed(layers[1:]):
        after.append(after[-1] @ layer)
    return before, after[::-1]


def gradient_grams(layers: Sequence[Tensor], sigma_x: Tensor, sigma_eps: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Second moments of per-sample gradients of every layer at the minimum, for the un-halved loss.

    From `dW_i = 2 A_i^T r (B_i x)^T` they are `4 Tr(B Sig_x B^T) A^T Sig_eps A` and `4 Tr(A^T Sig_eps A) B Sig_x B^T`.

    Returns:
        `(E[dW_i dW_i^T], E[dW_i^T dW_i])` for every layer.

    Source: theory.md section 9.
    """
    grams = []
    for b, a in zip(*prefix_products(layers), strict=True):
        hidden, back = b @ sigma_x @ b.mT, a.mT @ sigma_eps @ a
        grams.append((4 * _scaled(trace(hidden), back), 4 * _scaled(trace(back), hidden)))
    return grams


def deep_linear_residuals(layers: Sequence[Tensor], sigma_x: Tensor, sigma_eps: Tensor) -> list[Tensor]:
    """How far neighbouring layers are from the noise equilibrium, where all of these are zero.

    Returns:
        `(E[dW_i dW_i^T] - E[dW_{i+1}^T dW_{i+1}]) / 4` for every pair of neighbours.
    """
    grams = gradient_grams(layers, sigma_x, sigma_eps)
    return [(rows[0] - columns[1]) / 4 for rows, columns in pairwise(grams)]


def noise_trace(layers: Sequence[Tensor], sigma_x: Tensor, sigma_eps: Tensor) -> Tensor:
    """The noise `E ||grad l||^2` of all layers at the minimum, un-halved loss; on an orbit least at the equilibrium."""
    return sum((trace(rows) for rows, _ in gradient_grams(layers, sigma_x, sigma_eps)), torch.zeros(()).to(sigma_x))


def initial_sharpness(d_x: int, d: int, var_u: float, var_w: float, trace_x: float) -> float:
    """The mean Hessian trace of an isotropic autoencoder at its start, halved loss: `d_x d (s_U^2 + s_W^2) Tr Sig_x`.

    Source: theory.md section 10.
    """
    return d_x * d * (var_u + var_w) * trace_x


def equilibrium_sharpness(d_x: int, d: int, trace_x: float) -> float:
    """The Hessian trace of an isotropic autoencoder at its noise equilibrium, halved loss: `2 min(d, d_x) Tr Sig_x`.

    Source: theory.md section 10.
    """
    return 2 * min(d, d_x) * trace_x


def scalar_decay_rate(lr: float, batch_size: int, var_x: float, var_eps: float, loss_scale: float = 1.0) -> float:
    """The share of `|u^2 - w^2|` that a step of SGD takes from the net `c (u w x - y)^2` at its minimum.

    It is `eta^2 Var[dl/d(uw)] / S = 4 c^2 eta^2 Var(x) Var(eps) / S`, exact in every step because
    `u'^2 - w'^2 = (u^2 - w^2)(1 - eta^2 g^2)`.
    """
    return 4 * loss_scale**2 * lr**2 * var_x * var_eps / batch_size
