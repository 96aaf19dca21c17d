"""Where every symmetry stands at the measured weights: leg Grams, drives, and which coordinates can settle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.blocks import GLClasses, TorusClasses
from noetherflow.equilibrium.conditioning import Stretches, rank_tolerance
from noetherflow.equilibrium.orbit import leg_pairs
from noetherflow.equilibrium.potential import LegPair, Potential
from noetherflow.equilibrium.solve import Classes, classify, drives, imbalance
from noetherflow.equilibrium.verdict import Outcome, gl_verdict, torus_verdict
from noetherflow.moments.result import GradientMoments
from noetherflow.symmetry.symmetry import Symmetry


@dataclass(frozen=True, eq=False)
class Start:
    """One symmetry at the measured weights: `(K, M)` of its legs, its drives `X`, `Y`, and its directions sorted."""

    symmetry: Symmetry
    pairs: list[LegPair]
    x: Tensor
    y: Tensor
    classes: Classes

    @property
    def moves(self) -> bool:
        """Whether any direction has a finite equilibrium."""
        return bool(self.classes.finite.any())

    @property
    def charge(self) -> Tensor:
        """The charge, layout `symmetry.shape`."""
        return self.symmetry.combine(tuple(k for k, _ in self.pairs))

    @property
    def imbalance(self) -> Tensor:
        """Relative Noether flow per coordinate or block, `[blocks]`."""
        return imbalance(self.symmetry, self.classes, self.x, self.y)

    def verdict(self, decays: bool, stretches: Stretches) -> Outcome:
        """What becomes of the symmetry, in words; `decays`: something holds the norm of the weights back."""
        if isinstance(self.classes, TorusClasses):
            return torus_verdict(self.symmetry, self.classes, decays)
        assert isinstance(self.classes, GLClasses)
        return gl_verdict(self.symmetry, self.classes, stretches)


def starts_of(
    model: nn.Module, symmetries: Sequence[Symmetry], moments: GradientMoments, potential: Potential
) -> list[Start]:
    """All symmetries at the measured weights.

    Raises:
        MomentError: A symmetry was not measured.
    """
    tolerance = rank_tolerance(model, symmetries)
    out = []
    for s, pairs in zip(symmetries, leg_pairs(model, symmetries, moments, potential), strict=True):
        x, y = drives(s, pairs, potential)
        out.append(Start(s, pairs, x, y, classify(s, x, y, tolerance)))
    return out


def no_moments(model: nn.Module, symmetries: Sequence[Symmetry]) -> GradientMoments:
    """Moments that are all zero, for objectives that need no gradients."""
    tensors = tensors_of(model)
    names = dict.fromkeys(n for s in symmetries for n in s.parameters)
    zero = {n: torch.zeros(tensors[n].shape, dtype=torch.float64) for n in names}
    second = {s.name: tuple(torch.zeros(s.shape, dtype=torch.float64) for _ in s.weight_legs) for s in symmetries}
    return GradientMoments(1, 0.0, second, zero, zero)
