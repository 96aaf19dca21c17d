"""The conservation law of one gradient: `theta^T A g = 0` for every generator A (theory.md section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from noetherflow.symmetry.symmetry import Symmetry, Translation

NEGLIGIBLE = 1e-3
"""Coordinates this much smaller than the average one are judged against the average, not against themselves."""


@dataclass(frozen=True, eq=False)
class Conservation:
    """How well one gradient obeys a symmetry.

    Attributes:
        amount: `theta^T A g` for a basis of generators A, zero where the symmetry holds: one number per coordinate of a
            torus, `[blocks, dim, dim]` for a general linear group (all matrices, antisymmetric ones included),
            `[blocks, columns]` for a translation.
        size: the same sum with absolute values inside, what `amount` has to be small against.
        legs: for each charge-carrying leg its share of `size`, summed up per block: `[blocks]`. Exactly zero where the
            gradient, or the weights, of that leg are zero.
    """

    amount: Tensor
    size: Tensor
    legs: tuple[Tensor, ...]

    def violation(self, floor: float = 0.0) -> float:
        """The largest `|amount| / size` over generators, 0 for an exact symmetry, of order 1 for none.

        Args:
            floor: added to every size, so that coordinates that hardly matter do not show their rounding errors.
        """
        if not self.amount.numel():
            return 0.0
        size = self.size + NEGLIGIBLE * self.size.mean() + floor
        return float((self.amount.abs() / torch.where(size > 0, size, 1.0)).max())


def conservation(
    item: Symmetry | Translation, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> Conservation:
    """What a symmetry demands of a gradient, and what the gradient does.

    Args:
        item: a symmetry, with one or many coordinates, or a translation.
        weights: parameters by name, all legs of the symmetry among them.
        gradients: the gradient of any loss that depends on the model's outputs alone, by name, at these weights.

    Returns:
        The sums that vanish for an exact symmetry, with the sizes of their terms.

    Example:
        >>> from noetherflow.symmetry.declare import declare
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 1, bias=False)).double()
        >>> (scale,) = declare(net, "diagonal", plus=[("0.weight", 0)], minus=[("1.weight", 1)])
        >>> net(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
        >>> weights = dict(net.named_parameters())
        >>> conservation(scale, weights, {n: p.grad for n, p in weights.items()}).violation() < 1e-14
        True

    Source:
        theory.md section 2.
    """
    if isinstance(item, Translation):
        return _of_translation(item, gradients)
    positions = item.positions(weights)
    amounts, sizes = [], []
    for leg in item.weight_legs:
        theta, g = positions[leg.parameter].detach(), gradients[leg.parameter]
        if item.is_torus:
            terms = theta * g
            amounts.append(leg.exponent * leg.row_sums(terms))
            sizes.append(abs(leg.exponent) * leg.row_sums(terms.abs()))
        else:
            x, dx = leg.unfold(theta), leg.unfold(g)
            amounts.append(dx @ x.mT if leg.sign > 0 else -x @ dx.mT)
            sizes.append(dx.abs() @ x.abs().mT if leg.sign > 0 else x.abs() @ dx.abs().mT)
    shares = tuple(size if item.is_torus else size.sum((1, 2)) for size in sizes)
    return Conservation(torch.stack(amounts).sum(0), torch.stack(sizes).sum(0), shares)


def _of_translation(item: Translation, gradients: Mapping[str, Tensor]) -> Conservation:
    """`u^T dX` per column, which the shift `X + u c^T` for every c demands to vanish."""
    dx = item.leg.unfold(gradients[item.leg.parameter])
    u = torch.ones(item.leg.dim, dtype=dx.dtype, device=dx.device)
    if item.direction is not None:
        u = torch.as_tensor(item.direction, dtype=dx.dtype, device=dx.device)
    size = torch.einsum("i,bim->bm", u.abs(), dx.abs())
    return Conservation(torch.einsum("i,bim->bm", u, dx), size, (size.sum(1),))
