"""What the noise equilibrium of a general_linear symmetry leaves out: that SGD may turn hidden units."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

TURNING = (
    "noise and curvature commute on the orbits of general_linear symmetries: elsewhere SGD turns hidden units, which "
    "no charge shows, and comes to rest beside this point, by 1 to 14 % of squared norms in linear networks with label "
    "noise that is neither isotropic nor along the signal; the drift of the charges here and now is right all the "
    "same (theory.md section 8)"
)


def turning(charges: Iterable[Tensor]) -> tuple[str, ...]:
    """The sentence on it where one of the charges is a matrix, `[blocks, dim, dim]` with dim above 1; else nothing.

    Example:
        >>> import torch
        >>> turning([torch.zeros(3), torch.zeros(2, 1, 1)])
        ()
        >>> len(turning([torch.zeros(2, 4, 4)]))
        1

    Source: theory.md section 8.
    """
    return (TURNING,) if any(c.ndim == 3 and c.shape[-1] > 1 for c in charges) else ()
