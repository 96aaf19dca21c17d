"""What is wanted of one parameter's per-sample gradients, and where it accumulates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from noetherflow.legs import Leg
from noetherflow.moments.result import GradientMoments
from noetherflow.symmetry_set import SymmetrySet

Side = Literal["rows", "columns"]
SidedLeg = tuple["LegNeed", Side, Leg]


@dataclass(frozen=True, eq=False)
class LegNeed:
    """One leg whose Gram `E[dX dX^T]` is wanted: leg number `position` of symmetry `symmetry`."""

    symmetry: str
    position: int
    leg: Leg
    torus: bool


@dataclass(frozen=True, eq=False)
class Split:
    """Legs of a parameter read as a matrix: on one side (with the leg restated on that side alone), or mixing both."""

    torus: tuple[SidedLeg, ...]
    linear: tuple[SidedLeg, ...]
    mixed_torus: bool
    mixed_linear: tuple[LegNeed, ...]

    @property
    def separable(self) -> bool:
        return not self.mixed_torus and not self.mixed_linear


@dataclass(eq=False)
class Need:
    """The leg Grams wanted of one parameter, and its entry-wise squares if `entries`."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    legs: tuple[LegNeed, ...]
    entries: bool
    _splits: dict[int, Split] = field(default_factory=dict)

    def split(self, rows: int) -> Split:
        """The legs sorted by which side of the parameter, read as `[rows, columns]`, they live on."""
        if rows not in self._splits:
            sided: list[tuple[LegNeed, Side, Leg]] = []
            mixed: list[LegNeed] = []
            for n in self.legs:
                found = _one_side(n.leg, self.shape, rows)
                if found is None:
                    mixed.append(n)
                else:
                    sided.append((n, *found))
            self._splits[rows] = Split(
                tuple(s for s in sided if s[0].torus),
                tuple(s for s in sided if not s[0].torus),
                any(n.torus for n in mixed),
                tuple(n for n in mixed if not n.torus),
            )
        return self._splits[rows]

    @property
    def grams(self) -> bool:
        """True when a general-linear leg is among the legs."""
        return any(not n.torus for n in self.legs)


def _one_side(leg: Leg, shape: torch.Size, rows: int) -> tuple[Side, Leg] | None:
    view = tuple(shape) if leg.view is None else leg.view
    axes = tuple(a % len(view) for a in leg.axes)
    for k in range(len(view) + 1):
        if prod(view[:k]) == rows:
            if all(a < k for a in axes):
                return "rows", replace(leg, view=view[:k], axes=axes)
            if all(a >= k for a in axes):
                return "columns", replace(leg, view=view[k:], axes=tuple(a - k for a in axes))
    return None


def stacked(leg: Leg, shape: Sequence[int] = ()) -> Leg:
    """The leg (of a parameter of this shape, if it has no view) with one more axis at the end for further columns."""
    view = tuple(shape) if leg.view is None else leg.view
    return replace(leg, view=(*view, -1), axes=tuple(a % len(view) for a in leg.axes))


def needs_of(syms: SymmetrySet, params: dict[str, Tensor], entries: bool) -> dict[str, Need]:
    """The `Need` of every parameter in `params`."""
    legs: dict[str, list[LegNeed]] = {name: [] for name in params}
    for s in syms:
        for i, leg in enumerate(s.weight_legs):
            legs[leg.parameter].append(LegNeed(s.name, i, leg, s.is_torus))
    return {
        name: Need(name, p.shape, wide(p.dtype), p.device, tuple(legs[name]), entries) for name, p in params.items()
    }


def wide(dtype: torch.dtype) -> torch.dtype:
    """The accumulation type: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(eq=False)
class Sums:
    """Running sums over samples: gradients and squares by parameter, leg Grams by symmetry (float64)."""

    needs: dict[str, Need]
    samples: int = 0
    loss: float = 0.0
    gradient: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def zeros(cls, syms: SymmetrySet, needs: dict[str, Need]) -> Sums:
        sums = cls(needs)
        for name, need in needs.items():
            sums.gradient[name] = torch.zeros(need.shape, dtype=need.dtype, device=need.device)
            if need.entries:
                sums.squares[name] = torch.zeros_like(sums.gradient[name])
        for s in syms:
            sums.second[s.name] = [
                torch.zeros(s.shape, dtype=torch.float64, device=needs[leg.parameter].device) for leg in s.weight_legs
            ]
        return sums

    def target(self, name: str) -> Target:
        return Target(self.needs[name], self)

    def add_torus_legs(self, need: Need, squares: Tensor) -> None:
        for n in need.legs:
            if n.torus:
                out = self.second[n.symmetry][n.position]
                out.add_(n.leg.row_sums(squares).reshape(out.shape))

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        for mine, theirs in ((self.gradient, other.gradient), (self.squares, other.squares)):
            for name, tensor in theirs.items():
                mine[name].add_(tensor)
        for name, legs in other.second.items():
            for mine_leg, leg in zip(self.second[name], legs, strict=True):
                mine_leg.add_(leg)
        self.samples += other.samples
        self.loss += other.loss
        return self

    def moments(self, fallback: tuple[str, ...]) -> GradientMoments:
        """Means over the samples so far."""
        n = self.samples
        self._read_torus_legs()
        return GradientMoments(
            samples=n,
            loss=self.loss / n,
            second={name: tuple(leg / n for leg in legs) for name, legs in self.second.items()},
            mean={name: g / n for name, g in self.gradient.items()},
            squares={name: q / n for name, q in self.squares.items()},
            fallback=fallback,
        )

    @classmethod
    def of(cls, moments: GradientMoments, needs: dict[str, Need]) -> Sums:
        """The sums behind moments measured before, to go on from."""
        n = moments.samples
        return cls(
            needs,
            n,
            moments.loss * n,
            {name: g * n for name, g in moments.mean.items()},
            {name: q * n for name, q in moments.squares.items()},
            {name: [leg * n for leg in legs] for name, legs in moments.second.items()},
        )

    def _read_torus_legs(self) -> None:
        """Torus legs from the entry-wise squares, where those are kept."""
        for name, squares in self.squares.items():
            for leg in self.needs[name].legs:
                if leg.torus:
                    self.second[leg.symmetry][leg.position].zero_()
            self.add_torus_legs(self.needs[name], squares)


@dataclass(frozen=True, eq=False)
class Target:
    """The accumulators of one parameter."""

    need: Need
    sums: Sums

    @property
    def gradient(self) -> Tensor:
        return self.sums.gradient[self.need.name]

    def add_leg(self, need: LegNeed, value: Tensor) -> None:
        """Add to a leg Gram; `value` in any shape with the symmetry's number of entries."""
        out = self.sums.second[need.symmetry][need.position]
        out.add_(value.reshape(out.shape))

    @property
    def squares(self) -> Tensor | None:
        """Entry-wise `sum_i g_i^2` where wanted; torus legs are then read off it at the end."""
        return self.sums.squares.get(self.need.name)

    def add_squares(self, squares: Tensor) -> None:
        """Entry-wise `sum_i g_i^2` of some samples, the parameter's shape."""
        if self.squares is not None:
            self.squares.add_(squares)
        else:
            self.sums.add_torus_legs(self.need, squares)

    def add_grams(self, gradients: Tensor, needs: Iterable[LegNeed] | None = None) -> None:
        """General-linear leg Grams of per-sample gradients stacked along a last axis: `[*parameter shape, samples]`."""
        for n in self.need.legs if needs is None else needs:
            if not n.torus:
                self.add_leg(n, stacked(n.leg, self.need.shape).gram(gradients))

    def add_dense(self, gradients: Tensor) -> None:
        """Everything from explicit per-sample gradients `[samples, *parameter shape]`."""
        gradients = gradients.to(self.need.dtype)
        self.gradient.add_(gradients.sum(0))
        self.add_squares(gradients.square().sum(0))
        if self.need.grams:
            self.add_grams(gradients.movedim(0, -1))
