"""Parts of a model that know their leg Grams anywhere on the orbit, by how much of the gradients they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import torch
from torch import Tensor

from noetherflow.equilibrium.potential import LegPair
from noetherflow.symmetry.overlap import LegCoordinates


class OrbitTerm(Protocol):
    """A part of the model that knows its leg Grams, and how charges change, on the whole orbit.

    Example: the Gram `K` of a torus leg `+` becomes `p^2 K` under the element `p`, and that of its gradients `M / p^2`.
    """

    @property
    def moved_by(self) -> tuple[int, ...]:
        """The positions of the symmetries that move this part."""

    def unpacked(self) -> OrbitTerm:
        """The same part for many evaluations: faster where something can be worked out once, and then larger."""

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        """Write `(K, M)` of this part's legs into `out[symmetry][leg]`; return its `||theta||^2` and `Tr M`."""

    def slope(self, elements: Sequence[Tensor], generators: Sequence[Tensor], out: list[Tensor]) -> None:
        """Add to `out[symmetry]` the change of its charge under infinitesimal generators of all symmetries."""

    def slope_at(self, elements: Sequence[Tensor]) -> PointSlope:
        """`slope` at these elements, with what depends on them alone worked out."""


class HeldTerm(Protocol):
    """A part of the model of whose symmetries some stand still: what follows from where they stand is worked out.

    Elements are those of all symmetries; those that stand are given as they stand.
    """

    def free(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        """Write `(K, M)` of the legs that move into `out[symmetry][leg]`; return `||theta||^2` and `Tr M`."""

    def held(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> None:
        """Write `(K, M)` of the legs that stand."""


def dual_of(element: Tensor) -> Tensor:
    """`G^-T` of every block `[blocks, n, n]`; NaN where a block is singular in float64, which the solver steps back
    from.
    """
    inverse, failed = torch.linalg.inv_ex(element)
    return torch.where((failed > 0)[:, None, None], torch.nan, inverse).mT


class SlopedTerm(Protocol):
    """A part of the model that knows how its charges change under generators."""

    def slope(self, elements: Sequence[Tensor], generators: Sequence[Tensor], out: list[Tensor]) -> None:
        """Add to `out[symmetry]` the change of its charge."""


class PointSlope(Protocol):
    """How the charges of a part of the model change under generators, at one point of the orbit."""

    def add(self, generators: Sequence[Tensor], out: list[Tensor]) -> None:
        """Add to `out[symmetry]` the change of its charge."""


@dataclass(frozen=True, eq=False)
class LegSlope:
    """The slope of a leg that shares no entry: `a k`, for general_linear `A K + K A`."""

    symmetry: int
    torus: bool
    k: Tensor

    def add(self, generators: Sequence[Tensor], out: list[Tensor]) -> None:
        a = generators[self.symmetry]
        out[self.symmetry] = out[self.symmetry] + (a * self.k if self.torus else a @ self.k + self.k @ a)


@dataclass(frozen=True, eq=False)
class EntrySlope:
    """The slope of a parameter that several torus legs move: every entry changes by the sum of their rates."""

    legs: tuple[LegCoordinates, ...]
    k: Tensor

    def add(self, generators: Sequence[Tensor], out: list[Tensor]) -> None:
        rate = torch.zeros((), dtype=torch.float64)
        for leg in self.legs:
            rate = rate + leg.exponent * leg.spread(generators[leg.symmetry], outside=0.0)
        change = self.k * rate
        for leg in self.legs:
            out[leg.symmetry] = out[leg.symmetry] + leg.exponent * leg.collect(change)

    def add_matrix(self, matrix: Tensor, offsets: Sequence[int]) -> None:
        """Add what `add` does, as a matrix over the coordinates of all symmetries, which begin at `offsets`."""
        places = [torch.where(leg.moves, leg.ids + offsets[leg.symmetry], -1).expand(self.k.shape) for leg in self.legs]
        for leg, rows in zip(self.legs, places, strict=True):
            for other, columns in zip(self.legs, places, strict=True):
                moved = (rows >= 0) & (columns >= 0)
                values = torch.where(moved, leg.exponent * other.exponent * self.k, 0.0)
                at = torch.where(moved, rows * len(matrix) + columns, 0)
                matrix.view(-1).index_add_(0, at.reshape(-1), values.reshape(-1))


@dataclass(frozen=True, eq=False)
class HeldSlope:
    """The slope of a part for which nothing is worked out beforehand."""

    term: SlopedTerm
    elements: Sequence[Tensor]

    def add(self, generators: Sequence[Tensor], out: list[Tensor]) -> None:
        self.term.slope(self.elements, generators, out)


@dataclass(frozen=True, eq=False)
class FreeLeg:
    """A leg that shares no entry with others, of a symmetry that moves."""

    term: LegTerm

    def free(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        return self.term.add(elements, out)

    def held(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> None:
        """There is none."""


@dataclass(frozen=True, eq=False)
class HeldLeg:
    """A leg that shares no entry with others, of a symmetry that stands: its Grams `(K, M)` and their traces."""

    symmetry: int
    leg: int
    pair: LegPair
    traces: tuple[float, float]

    def free(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        return self.traces

    def held(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> None:
        out[self.symmetry][self.leg] = self.pair


@dataclass(frozen=True, eq=False)
class HeldEntries:
    """Entries `weight` and `noise` as the legs of `term` that stand have moved them."""

    term: EntryTerm
    standing: frozenset[int]
    weight: Tensor
    noise: Tensor

    def free(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        k, m = self._moved(elements)
        for leg in self.term.legs:
            if leg.symmetry not in self.standing:
                out[leg.symmetry][leg.leg] = (leg.collect(k), leg.collect(m))
        return float(k.sum()), float(m.sum())

    def held(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> None:
        k, m = self._moved(elements)
        for leg in self.term.legs:
            if leg.symmetry in self.standing:
                out[leg.symmetry][leg.leg] = (leg.collect(k), leg.collect(m))

    def _moved(self, elements: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        free = [leg for leg in self.term.legs if leg.symmetry not in self.standing]
        return moved_entries(free, elements, self.weight, self.noise)


def moved_entries(
    legs: Sequence[LegCoordinates], elements: Sequence[Tensor], weight: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Squares of weights and noise of all entries after some legs have moved them."""
    for leg in legs:
        factor = leg.spread(elements[leg.symmetry]) ** (2 * leg.exponent)
        weight, noise = weight * factor, noise / factor
    return weight, noise


@dataclass(frozen=True, eq=False)
class LegTerm:
    """A leg that shares no entry with any other leg: its two Grams say everything."""

    symmetry: int
    leg: int
    exponent: float
    torus: bool
    weight: Tensor
    noise: Tensor

    @property
    def moved_by(self) -> tuple[int, ...]:
        return (self.symmetry,)

    @property
    def meetings(self) -> frozenset[frozenset[int]]:
        """Pairs of symmetries that move an entry together; a symmetry by itself where it meets itself: none."""
        return frozenset()

    def unpacked(self) -> LegTerm:
        return self

    def holding(self, elements: Sequence[Tensor], members: frozenset[int]) -> HeldLeg | FreeLeg:
        """The same part with the symmetries `members` standing at these elements."""
        if self.symmetry not in members:
            return FreeLeg(self)
        pair, traces = self._at(elements)
        return HeldLeg(self.symmetry, self.leg, pair, traces)

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        out[self.symmetry][self.leg], traces = self._at(elements)
        return traces

    def _at(self, elements: Sequence[Tensor]) -> tuple[LegPair, tuple[float, float]]:
        """`(K, M)` at these elements, and their traces."""
        element = elements[self.symmetry]
        if self.torus:
            factor = element ** (2 * self.exponent)
            k, m = self.weight * factor, self.noise / factor
            traces = float(k.sum()), float(m.sum())
        else:
            dual = dual_of(element)
            g, h = (element, dual) if self.exponent > 0 else (dual, element)
            k, m = g @ self.weight @ g.mT, h @ self.noise @ h.mT
            traces = _trace(k), _trace(m)
        return (k, m), traces

    def slope(self, elements: Sequence[Tensor], generators: Sequence[Tensor], out: list[Tensor]) -> None:
        self.slope_at(elements).add(generators, out)

    def slope_at(self, elements: Sequence[Tensor]) -> LegSlope:
        """What `slope` needs of the elements, to be worked out once for many generators."""
        element = elements[self.symmetry]
        if self.torus:
            k = 2 * self.exponent**2 * self.weight * element ** (2 * self.exponent)
        else:
            g = element if self.exponent > 0 else dual_of(element)
            k = g @ self.weight @ g.mT
        return LegSlope(self.symmetry, self.torus, k)


@dataclass(frozen=True, eq=False)
class EntryTerm:
    """A parameter moved by several torus legs at once: its entries, summed over the axes that no leg touches."""

    legs: tuple[LegCoordinates, ...]
    weight: Tensor
    noise: Tensor

    @property
    def moved_by(self) -> tuple[int, ...]:
        return tuple(leg.symmetry for leg in self.legs)

    @property
    def meetings(self) -> frozenset[frozenset[int]]:
        """Pairs of symmetries that move an entry together; a symmetry by itself where it meets itself."""
        return frozenset(
            frozenset((a.symmetry, b.symmetry))
            for a, b in combinations(self.legs, 2)
            if bool((a.moves & b.moves).any())
        )

    def unpacked(self) -> EntryTerm:
        return self

    def holding(self, elements: Sequence[Tensor], members: frozenset[int]) -> HeldEntries:
        """The same part with the symmetries `members` standing at these elements."""
        standing = [leg for leg in self.legs if leg.symmetry in members]
        return HeldEntries(self, members, *moved_entries(standing, elements, self.weight, self.noise))

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        k, m = moved_entries(self.legs, elements, self.weight, self.noise)
        for leg in self.legs:
            out[leg.symmetry][leg.leg] = (leg.collect(k), leg.collect(m))
        return float(k.sum()), float(m.sum())

    def slope(self, elements: Sequence[Tensor], generators: Sequence[Tensor], out: list[Tensor]) -> None:
        self.slope_at(elements).add(generators, out)

    def slope_at(self, elements: Sequence[Tensor]) -> EntrySlope:
        """What `slope` needs of the elements, to be worked out once for many generators."""
        k = 2 * self.weight
        for leg in self.legs:
            k = k * leg.spread(elements[leg.symmetry]) ** (2 * leg.exponent)
        return EntrySlope(self.legs, k)


def _trace(a: Tensor) -> float:
    return float(a.diagonal(dim1=-2, dim2=-1).sum())
