"""What a ledger's estimates tell of single attention heads, beside what they tell of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from noetherflow.monitor.charge_map import ChargeMap
from noetherflow.symmetry.heads import HEADS, heads_in
from noetherflow.symmetry.symmetry import Symmetry

COLUMNS = ("charge", "norm", "distance")
"""Of each head: the sum of its charges, of its squared weights, and the mean signed log factor by which the weights of
its two sides must be stretched and shrunk to be at the noise equilibrium."""


@dataclass(frozen=True, eq=False)
class HeadMap:
    """Which coordinates of a layout belong to which attention head.

    Attributes:
        symmetries: for each head the name of its symmetry, `[heads]`.
        owner: for each coordinate the number of its head, -1 outside attention. `[n_out]`.
    """

    symmetries: tuple[str, ...]
    owner: np.ndarray

    @classmethod
    def of(cls, layout: ChargeMap) -> HeadMap:
        """The heads of a layout of detail `block`, symmetry by symmetry."""
        watched = [s for s in layout.symmetries if isinstance(s, Symmetry)]
        owner = np.full(layout.spans[-1][1] if layout.spans else 0, -1)
        names: list[str] = []
        for symmetry, (start, stop) in zip(layout.symmetries, layout.spans, strict=True):
            if isinstance(symmetry, Symmetry) and symmetry.family in HEADS:
                heads = heads_in(symmetry, watched)
                owner[start:stop] = len(names) + np.repeat(np.arange(heads), (stop - start) // heads)
                names += [symmetry.name] * heads
        return cls(tuple(names), owner)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums over the coordinates of each head, of `[n_out]` values."""
        mine = self.owner >= 0
        return np.bincount(self.owner[mine], weights=values[mine], minlength=len(self.symmetries)).astype(float)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Means over the coordinates whose value is known; NaN without any."""
        known = np.isfinite(values)
        number = self.sums(known.astype(float))
        total = self.sums(np.where(known, values, 0.0))
        return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def heads_of_header(header: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The name of the symmetry and the number of each head that a log tells of; none in logs of earlier versions.

    Example:
        >>> heads_of_header({"heads": ["q -> k", "q -> k", "v -> o"]})
        [('q -> k', 0), ('q -> k', 1), ('v -> o', 0)]
    """
    names = [str(name) for name in header.get("heads", ())]
    return [(name, names[:i].count(name)) for i, name in enumerate(names)]
