"""Per-sample gradients of matrices kept as products of two thin factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """Gradients `g_z = left_z^T right_z` of one matrix `[m, n]`, for N samples that use it T times each.

    `left` `[N, T, m]`, `right` `[N, T, n]`: for the weight of a linear layer, the output gradients and the inputs.

    Example:
        >>> Factors(torch.ones(5, 2, 3), torch.ones(5, 2, 4)).dense().shape
        torch.Size([5, 3, 4])
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The gradients themselves, `[N, m, n]`."""
        return self.left.mT @ self.right

    def to(self, dtype: torch.dtype) -> Factors:
        """The same in another dtype."""
        return Factors(self.left.to(dtype), self.right.to(dtype))


def joined_factors(parts: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """The factors of the samples of all parts, by parameter; zeros for the tokens that shorter sequences lack."""
    return {name: _joined([part[name] for part in parts]) for name in (parts[0] if parts else {})}


def _joined(parts: Sequence[Factors]) -> Factors:
    """The samples of all parts, of one matrix."""
    if len(parts) == 1:
        return parts[0]
    if len({p.left.shape[1] for p in parts}) > 1:
        tokens = max(p.left.shape[1] for p in parts)
        parts = [Factors(_padded(p.left, tokens), _padded(p.right, tokens)) for p in parts]
    return Factors(torch.cat([p.left for p in parts]), torch.cat([p.right for p in parts]))


def _padded(side: Tensor, tokens: int) -> Tensor:
    """`[N, T, ..]` with zeros for the tokens that shorter sequences lack."""
    return torch.nn.functional.pad(side, (0, 0, 0, tokens - side.shape[1]))
