"""Closed forms for one symmetry: the minimiser of `Phi = Tr(P X) + Tr(P^-1 Y)` over `P = G^T G` (theory.md section
5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from noetherflow.core import spd

RATIO_LIMIT = 1e40
"""A torus coordinate whose `y / x` lies outside `[1/limit, limit]` would have to be scaled by more than 1e10: it
recedes.
"""


def torus_equilibrium(x: Tensor, y: Tensor) -> Tensor:
    """`p = (y / x)^(1/4)`: the scale that makes `p^2 x = y / p^2`, element-wise. `x, y > 0`."""
    return (y / x) ** 0.25


def gl_equilibrium(x: Tensor, y: Tensor) -> Tensor:
    """`G = P^1/2` with `P = X^-1 # Y`, so that `G X G = G^-1 Y G^-1`. `X, Y` positive definite `[..., n, n]`."""
    return spd.sqrtm(spd.geometric_mean(x, y))


@dataclass(frozen=True)
class TorusClasses:
    """Which coordinates of a torus have a finite equilibrium; boolean masks of the symmetry's shape.

    `grows`: no counterweight, the scale recedes to infinity (`x = 0 < y`); `shrinks`: to zero (`y = 0 < x`);
    `neutral`: nothing drives it (`x = y = 0`); `invalid`: an estimate below zero.
    """

    finite: Tensor
    grows: Tensor
    shrinks: Tensor
    neutral: Tensor
    invalid: Tensor


def classify_torus(x: Tensor, y: Tensor) -> TorusClasses:
    """Sort coordinates by the drives `x` (towards smaller scale) and `y` (towards larger), same shape."""
    invalid = (x < 0) | (y < 0) | ~torch.isfinite(x) | ~torch.isfinite(y)
    neutral = ~invalid & (x == 0) & (y == 0)
    grows = ~invalid & ~neutral & (x * RATIO_LIMIT < y)
    shrinks = ~invalid & ~neutral & (y * RATIO_LIMIT < x)
    return TorusClasses(~(invalid | neutral | grows | shrinks), grows, shrinks, neutral, invalid)


@dataclass(frozen=True)
class GLClasses:
    """Orthogonal projectors `[blocks, n, n]` that split each block of a GL symmetry, with their ranks `[blocks]`.

    `finite`: where `X` and `Y` meet, the equilibrium is finite. `shrinks`: the null space of `Y`; `grows`: the null
    space of `X` in what is left; `neutral`: the part of `shrinks` where `X` vanishes too, so that nothing moves it.
    """

    finite: Tensor
    grows: Tensor
    shrinks: Tensor
    neutral: Tensor

    @staticmethod
    def rank(projector: Tensor) -> Tensor:
        return projector.diagonal(dim1=-2, dim2=-1).sum(-1).round().long()


def classify_gl(x: Tensor, y: Tensor, tolerance: float) -> GLClasses:
    """Split each block by the null spaces of `X` and `Y`; eigenvalues below `tolerance` times the largest count as
    zero.

    The product `X Y`, and with it the number of finite directions, does not change along the orbit, and neither do the
    null spaces when other symmetries move; `X` and `Y` are first brought to one scale by their diagonals.
    """
    rows = [_split_block(a, b, tolerance) for a, b in zip(x, y, strict=True)]
    return GLClasses(*(torch.stack(column) for column in zip(*rows, strict=True)))


def gl_frame(classes: GLClasses, x: Tensor, y: Tensor, recede: float) -> Tensor:
    """`F = Q diag(d) Q + recede S + G / recede + N`, `d_i^4 = Y_ii / X_ii` inside the finite subspace, with the
    projectors `Q` finite, `S` shrinking, `G` growing, `N` neutral: `[blocks, n, n]`.

    Receding directions end there; on the others `X` and `Y` become comparable, however badly scaled they were.
    """
    q = classes.finite
    x, y = ((q @ a @ q).diagonal(dim1=-2, dim2=-1) for a in (x, y))
    d = torch.where((x > 0) & (y > 0), y / x, torch.ones_like(x)) ** 0.25
    return q @ torch.diag_embed(d) @ q + recede * classes.shrinks + classes.grows / recede + classes.neutral


def _split_block(x: Tensor, y: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    in_y, null_y = _range_and_null(y, tolerance)
    inner_range, inner_null = _range_and_null(in_y.mT @ x @ in_y, tolerance)
    x_on_null = null_y.mT @ x @ null_y
    scale = x.diagonal().amax().clamp_min(torch.finfo(x.dtype).tiny)
    w, v = torch.linalg.eigh(spd.symmetric(x_on_null))
    still = null_y @ v[:, w <= tolerance * scale]
    return (
        _projector(in_y @ inner_range),
        _projector(in_y @ inner_null),
        _projector(null_y @ v[:, w > tolerance * scale]),
        _projector(still),
    )


def _projector(columns: Tensor) -> Tensor:
    """`C C^T`, without rounding where the columns span everything or nothing."""
    n, rank = columns.shape
    return columns @ columns.mT if rank < n else torch.eye(n, dtype=columns.dtype)


def _range_and_null(a: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of range and null space of a positive semi-definite matrix, judged at unit diagonal.

    Scaling to unit diagonal first keeps well-determined coordinates of very different size in the range.
    """
    if not a.numel():
        return a, a
    diagonal = a.diagonal().clamp_min(0)
    unit = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
    w, v = torch.linalg.eigh(spd.symmetric(unit[:, None] * a * unit))
    large = w > tolerance * w[-1].clamp_min(torch.finfo(a.dtype).tiny)
    null, _ = torch.linalg.qr(unit[:, None] * v[:, ~large])
    span, _ = torch.linalg.qr(v[:, large] / unit[:, None])
    return span, null
