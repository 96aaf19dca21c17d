"""Parts of a model that know their leg Grams anywhere on the orbit, by how much of the gradients they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from noetherflow.equilibrium.potential import LegPair, Potential
from noetherflow.moments.products import Factors
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.overlap import LegCoordinates
from noetherflow.symmetry.symmetry import Symmetry


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


def _dual(element: Tensor) -> Tensor:
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

    def unpacked(self) -> LegTerm:
        return self

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        element = elements[self.symmetry]
        if self.torus:
            factor = element ** (2 * self.exponent)
            k, m = self.weight * factor, self.noise / factor
            traces = float(k.sum()), float(m.sum())
        else:
            dual = _dual(element)
            g, h = (element, dual) if self.exponent > 0 else (dual, element)
            k, m = g @ self.weight @ g.mT, h @ self.noise @ h.mT
            traces = _trace(k), _trace(m)
        out[self.symmetry][self.leg] = (k, m)
        return traces

    def slope(self, elements: Sequence[Tensor], generators: Sequence[Tensor], out: list[Tensor]) -> None:
        self.slope_at(elements).add(generators, out)

    def slope_at(self, elements: Sequence[Tensor]) -> LegSlope:
        """What `slope` needs of the elements, to be worked out once for many generators."""
        element = elements[self.symmetry]
        if self.torus:
            k = 2 * self.exponent**2 * self.weight * element ** (2 * self.exponent)
        else:
            g = element if self.exponent > 0 else _dual(element)
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

    def unpacked(self) -> EntryTerm:
        return self

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        k, m = self.weight, self.noise
        for leg in self.legs:
            factor = leg.spread(elements[leg.symmetry]) ** (2 * leg.exponent)
            k, m = k * factor, m / factor
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


@dataclass(frozen=True, eq=False)
class _GradientTerm:
    """A parameter that general_linear and other legs move together: its weights, mean gradient and what a subclass
    holds.
    """

    parameter: str
    symmetries: tuple[tuple[int, Symmetry], ...]
    theta: Tensor
    mean: Tensor
    potential: Potential

    @property
    def moved_by(self) -> tuple[int, ...]:
        return tuple(index for index, _ in self.symmetries)

    def slope_at(self, elements: Sequence[Tensor]) -> HeldSlope:
        """`slope` at these elements."""
        return HeldSlope(self, elements)

    def slope(self, elements: Sequence[Tensor], generators: Sequence[Tensor], out: list[Tensor]) -> None:
        theta = self._moved(self.theta, elements)
        rate = torch.zeros_like(theta)
        for index, symmetry in self.symmetries:
            rate = rate + symmetry.tangent_of(self.parameter, theta, generators[index])
        for index, _, leg, symmetry in self._legs():
            grown, shrunk = symmetry.leg_gram(leg, theta + rate), symmetry.leg_gram(leg, theta - rate)
            out[index] = out[index] + leg.exponent * (grown - shrunk) / 2

    def _legs(self) -> list[tuple[int, int, Leg, Symmetry]]:
        return [
            (index, position, leg, symmetry)
            for index, symmetry in self.symmetries
            for position, leg in enumerate(symmetry.weight_legs)
            if leg.parameter == self.parameter
        ]

    def _duals(self, elements: Sequence[Tensor]) -> list[Tensor]:
        """What gradients are moved by; elements of symmetries without a leg here as they are."""
        duals = list(elements)
        for i, s in self.symmetries:
            duals[i] = s.inverse(elements[i]) if s.is_torus else _dual(elements[i])
        return duals

    def _moved(self, values: Tensor, elements: Sequence[Tensor]) -> Tensor:
        for index, symmetry in self.symmetries:
            values = symmetry.move(self.parameter, values, elements[index])
        return values


@dataclass(frozen=True, eq=False)
class SampleTerm(_GradientTerm):
    """... with its dense gradient for every sample, `[N, *shape]`."""

    gradients: Tensor

    def unpacked(self) -> SampleTerm:
        return self

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        duals = self._duals(elements)
        theta, mean = self._moved(self.theta, elements), self._moved(self.mean, duals)
        gradients = torch.stack([self._moved(g, duals) for g in self.gradients])
        for index, position, leg, symmetry in self._legs():
            second = torch.stack([symmetry.leg_gram(leg, g) for g in gradients]).mean(0)
            drive = self.potential.drive(second, symmetry.leg_gram(leg, mean))
            out[index][position] = (symmetry.leg_gram(leg, theta), drive)
        trace = self.potential.drive(gradients.square().mean(0), mean.square()).sum()
        return float(theta.square().sum()), float(trace)


@dataclass(frozen=True, eq=False)
class FactorTerm(_GradientTerm):
    """... as a matrix whose gradients are `Factors`, every leg along one of its axes (`fits_factors`)."""

    factors: Factors

    def unpacked(self) -> FactorTerm:
        """The same in float64, so that no evaluation has to convert anything."""
        kept = replace(self, factors=self.factors.to(torch.float64))
        return replace(kept, theta=self.theta.double(), mean=self.mean.double())

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        duals = self._duals(elements)
        theta, mean = self._moved(self.theta, elements), self._moved(self.mean, duals)
        left, right = self._sides(duals)
        inner = [x @ x.mT for x in (left, right)]
        partners = (inner[1] @ left, inner[0] @ right)
        n = len(left)
        for index, position, leg, symmetry in self._legs():
            axis = leg.axes[0] % 2
            second = _form(leg, symmetry, _columns((left, right)[axis]), _columns(partners[axis])) / n
            x, g = (theta, mean) if axis == 0 else (theta.mT, mean.mT)
            drive = self.potential.drive(second, _form(leg, symmetry, g, g))
            out[index][position] = (_form(leg, symmetry, x, x), drive)
        trace = (inner[0] * inner[1]).sum() / n
        return float(theta.square().sum()), float(self.potential.drive(trace, mean.square().sum()))

    def _sides(self, duals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Both factors `[N, T, d]` under the group elements of gradients."""
        left, right = (_own(f) for f in (self.factors.left, self.factors.right))
        self._move_axis(0, _columns(left), duals)
        self._move_axis(1, _columns(right), duals)
        return left, right

    def _moved(self, values: Tensor, elements: Sequence[Tensor]) -> Tensor:
        x = _own(values)
        self._move_axis(0, x, elements)
        self._move_axis(1, x.mT, elements)
        return x

    def _move_axis(self, axis: int, x: Tensor, elements: Sequence[Tensor]) -> None:
        """Move the rows of `x`, which run along `axis` of the parameter, in place by the legs on that axis."""
        for index, _, leg, symmetry in self._legs():
            if leg.axes[0] % 2 == axis:
                _apply(leg, symmetry, elements[index], x)


def _own(values: Tensor) -> Tensor:
    """A contiguous copy in float64."""
    return torch.empty(values.shape, dtype=torch.float64).copy_(values)


def _columns(samples: Tensor) -> Tensor:
    """A view of `[N, T, d]` as a matrix `[d, N T]`."""
    return samples.flatten(0, 1).mT


def _form(leg: Leg, symmetry: Symmetry, x: Tensor, y: Tensor) -> Tensor:
    """`X Y^T` of the rows that the leg chooses, in the layout of the symmetry."""
    rows = _chosen(leg)
    x, y = (a[rows].reshape(leg.blocks, leg.dim, -1) for a in (x, y))
    return (x * y).sum((1, 2)) if symmetry.is_torus else x @ y.mT


def _apply(leg: Leg, symmetry: Symmetry, element: Tensor, x: Tensor) -> None:
    """Move the rows of `x` that the leg chooses, in place."""
    rows = _chosen(leg)
    if symmetry.is_torus:
        x[rows] *= (element**leg.exponent).repeat_interleave(leg.replicas)[:, None]
        return
    g = element if leg.sign > 0 else _dual(element)
    blocks = x[rows].reshape(leg.blocks, leg.dim, -1)
    moved = (blocks.mT @ g.mT).mT if blocks.stride(1) == 1 else g @ blocks
    x[rows] = moved.reshape(leg.index.size, -1) if leg.replicas > 1 else moved.flatten(0, 1)


def _chosen(leg: Leg) -> slice | Tensor:
    """The rows that a leg moves: a slice where they follow one another, which takes no copy."""
    index = leg.index.reshape(-1)
    first, size = int(index[0]), index.size
    if bool((index == np.arange(first, first + size)).all()):
        return slice(first, first + size)
    return torch.as_tensor(index)


def fits_factors(symmetries: Sequence[Symmetry], parameter: str, shape: tuple[int, ...]) -> bool:
    """True when every leg on the parameter lies along one of its two axes as it is stored."""
    legs = [leg for s in symmetries for leg in s.weight_legs if leg.parameter == parameter]
    return len(shape) == 2 and all(leg.view in (None, shape) and len(leg.axes) == 1 for leg in legs)


def _trace(a: Tensor) -> float:
    return float(a.diagonal(dim1=-2, dim2=-1).sum())
