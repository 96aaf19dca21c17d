"""Functions of symmetric positive (semi-)definite matrices, batched over leading axes, for small float64 matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def symmetric(a: Tensor) -> Tensor:
    """`(A + A^T) / 2`, shape `[..., n, n]`."""
    return (a + a.mT) / 2


def spectral(a: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`V f(w) V^T` for symmetric `A = V diag(w) V^T`, shape `[..., n, n]`."""
    w, v = torch.linalg.eigh(symmetric(a))
    return torch.matmul(v * function(w).unsqueeze(-2), v.mT)


def sqrtm(a: Tensor) -> Tensor:
    """`A^1/2` of a positive semi-definite matrix; rounding below zero is cut."""
    return spectral(a, lambda w: w.clamp_min(0).sqrt())


def inv_sqrtm(a: Tensor) -> Tensor:
    """`A^-1/2` of a positive definite matrix."""
    return spectral(a, torch.rsqrt)


def expm(a: Tensor) -> Tensor:
    """`exp(A)` of a symmetric matrix."""
    return spectral(a, torch.exp)


def logm(a: Tensor) -> Tensor:
    """`log(A)` of a positive definite matrix."""
    return spectral(a, torch.log)


def geometric_mean(x_inverse_of: Tensor, y: Tensor) -> Tensor:
    """`P = X^-1 # Y = X^-1/2 (X^1/2 Y X^1/2)^1/2 X^-1/2`, the unique positive solution of `P X P = Y`.

    `X`, `Y` positive definite, shape `[..., n, n]` (theory.md section 5).
    """
    w, v = torch.linalg.eigh(symmetric(x_inverse_of))
    scale = w.clamp_min(0).sqrt().unsqueeze(-2)
    root, inverse_root = (v * scale) @ v.mT, (v / scale) @ v.mT
    return symmetric(inverse_root @ sqrtm(root @ y @ root) @ inverse_root)
