"""Parameters that general_linear and other symmetries move together: they need the gradient of every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from noetherflow.equilibrium.potential import LegPair, Potential
from noetherflow.equilibrium.terms import HeldSlope, dual_of
from noetherflow.moments.products import Factors
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry


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
            duals[i] = s.inverse(elements[i]) if s.is_torus else dual_of(elements[i])
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

    def noise_now(self) -> dict[tuple[int, int], Tensor]:
        """`M` of every leg at the identity, by symmetry and leg."""
        out = {}
        for index, position, leg, symmetry in self._legs():
            second = torch.stack([symmetry.leg_gram(leg, g) for g in self.gradients]).mean(0)
            out[index, position] = self.potential.drive(second, symmetry.leg_gram(leg, self.mean))
        return out


@dataclass(frozen=True, eq=False)
class Noisy:
    """A matrix, its mean gradient, and one side `[N, T, d]` of the factors of its gradients, at one point."""

    theta: Tensor
    mean: Tensor
    side: Tensor


@dataclass(frozen=True, eq=False)
class FactorTerm(_GradientTerm):
    """... as a matrix whose gradients are `Factors`, every leg along one of its axes (`fits_factors`)."""

    factors: Factors

    @property
    def meetings(self) -> frozenset[frozenset[int]]:
        """Pairs of symmetries that move an entry together; a symmetry by itself where it meets any along one axis, so
        that their order matters.
        """
        found: set[frozenset[int]] = set()
        for (i, _, a, _), (j, _, b, _) in combinations(self._legs(), 2):
            if a.axes[0] % 2 != b.axes[0] % 2:
                found.add(frozenset((i, j)))
            elif bool(np.isin(a.index, b.index).any()):
                found |= {frozenset((i,)), frozenset((j,))}
        return frozenset(found)

    def unpacked(self) -> FactorTerm:
        """The same in float64, so that no evaluation has to convert anything."""
        kept = replace(self, factors=self.factors.to(torch.float64))
        return replace(kept, theta=self.theta.double(), mean=self.mean.double())

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        here = self.moved_along(0, elements, self.theta, self.mean)
        there = self.moved_along(1, elements, here.theta, here.mean)
        inner = [x.side @ x.side.mT for x in (here, there)]
        self.write(0, replace(there, side=here.side), inner[1] @ here.side, out)
        self.write(1, there, inner[0] @ there.side, out)
        return self.sizes(there.theta, there.mean, (inner[0] * inner[1]).sum() / len(inner[0]))

    def sizes_now(self) -> tuple[float, float]:
        """What `add` returns at the identity."""
        inner = [x.double() @ x.double().mT for x in (self.factors.left, self.factors.right)]
        return self.sizes(self.theta.double(), self.mean.double(), (inner[0] * inner[1]).sum() / len(inner[0]))

    def noise_now(self) -> dict[tuple[int, int], Tensor]:
        """`M` of every leg at the identity by symmetry and leg, summed in the dtype of the factors."""
        sides, out = (self.factors.left, self.factors.right), {}
        for axis in (0, 1):
            side, other = sides[axis], sides[1 - axis]
            partner, mean = (other @ other.mT) @ side, self.mean.to(side.dtype)
            for index, position, leg, symmetry in self.along(axis):
                second = _form(leg, symmetry, _columns(side), _columns(partner)) / len(side)
                x = mean.mT if axis else mean
                out[index, position] = self.potential.drive(second, _form(leg, symmetry, x, x)).double()
        return out

    def holding(self, elements: Sequence[Tensor], members: frozenset[int]) -> HeldFactors:
        """The same part with the symmetries `members`, all of one axis, standing at these elements."""
        axis = next(leg.axes[0] % 2 for index, _, leg, _ in self._legs() if index in members)
        at = self.moved_along(axis, elements, self.theta, self.mean)
        return HeldFactors(self, axis, at, at.side @ at.side.mT)

    def moved_along(self, axis: int, elements: Sequence[Tensor], theta: Tensor, mean: Tensor) -> Noisy:
        """Weights, a mean gradient and the factor along an axis in float64, moved by the legs along this axis."""
        moves = self._moves(axis, elements)
        side = self.factors.right if axis else self.factors.left
        duals = _turned(moves, mean, axis, dual=True), _turned(moves, side, 2, dual=True)
        return Noisy(_turned(moves, theta, axis), *duals)

    def write(self, axis: int, x: Noisy, partner: Tensor, out: list[list[LegPair]]) -> None:
        """Write `(K, M)` of the legs along an axis; `x.side` lies along it, `partner` is the inner products of the
        other side, times `x.side`.
        """
        theta, mean = (x.theta.mT, x.mean.mT) if axis else (x.theta, x.mean)
        for index, position, leg, symmetry in self.along(axis):
            second = _form(leg, symmetry, _columns(x.side), _columns(partner)) / len(partner)
            drive = self.potential.drive(second, _form(leg, symmetry, mean, mean))
            out[index][position] = (_form(leg, symmetry, theta, theta), drive)

    def sizes(self, theta: Tensor, mean: Tensor, second: Tensor) -> tuple[float, float]:
        """`||theta||^2` and `Tr M`, `second` the trace of `E[g g^T]`."""
        return float(theta.square().sum()), float(self.potential.drive(second, mean.square().sum()))

    def _moved(self, values: Tensor, elements: Sequence[Tensor]) -> Tensor:
        for axis in (0, 1):
            values = _turned(self._moves(axis, elements), values, axis)
        return values

    def _moves(self, axis: int, elements: Sequence[Tensor]) -> list[_Move]:
        return [_Move.of(leg, s, elements[index]) for index, _, leg, s in self.along(axis)]

    def scales(self, axis: int, elements: Sequence[Tensor]) -> Tensor:
        """What the torus legs along an axis multiply the rows of weights by."""
        rows = torch.ones(1, self.theta.shape[axis], dtype=torch.float64)
        return _turned(self._moves(axis, elements), rows, 1)[0]

    def along(self, axis: int) -> list[tuple[int, int, Leg, Symmetry]]:
        """The legs along an axis: symmetry, position of the leg, leg, and the symmetry itself."""
        return [own for own in self._legs() if own[2].axes[0] % 2 == axis]


@dataclass(frozen=True, eq=False)
class HeldFactors:
    """A matrix with gradients as factors while the symmetries along one axis stand.

    Attributes:
        term: The part as it was measured.
        axis: The axis along which symmetries stand.
        at: Weights, mean gradient and the factor along this axis, as these symmetries have moved them.
        inner: Inner products `[N, T, T]` of that factor.
    """

    term: FactorTerm
    axis: int
    at: Noisy
    inner: Tensor

    def free(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        if all(symmetry.is_torus for *_, symmetry in self.term.along(1 - self.axis)):
            return self._free_rows(elements, out)
        x = self._moved(elements)
        partner = self.inner @ x.side
        self.term.write(1 - self.axis, x, partner, out)
        return self.term.sizes(x.theta, x.mean, (x.side * partner).sum() / len(partner))

    def held(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> None:
        x = self._moved(elements)
        partner = (x.side @ x.side.mT) @ self.at.side
        self.term.write(self.axis, replace(x, side=self.at.side), partner, out)

    def _free_rows(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        """`free` where only numbers scale the rows along the other axis: sums of squares of rows say everything."""
        axis, term = 1 - self.axis, self.term
        side = (term.factors.right if axis else term.factors.left).double()
        second = (side * (self.inner @ side)).sum((0, 1)) / len(side)
        squares = [x.square().sum(self.axis) for x in (self.at.theta, self.at.mean)]
        scale = term.scales(axis, elements).square()
        weight, noise = squares[0] * scale, term.potential.drive(second, squares[1]) / scale
        for index, position, leg, _ in term.along(axis):
            rows = _chosen(leg)
            out[index][position] = (
                weight[rows].reshape(leg.blocks, -1).sum(1),
                noise[rows].reshape(leg.blocks, -1).sum(1),
            )
        return float(weight.sum()), float(noise.sum())

    def _moved(self, elements: Sequence[Tensor]) -> Noisy:
        """What the symmetries along the other axis make of it, with the factor along that axis."""
        return self.term.moved_along(1 - self.axis, elements, self.at.theta, self.at.mean)


@dataclass(frozen=True, eq=False)
class _Move:
    """What a leg does to the rows that it chooses: to those of weights, and (`dual`) to those of gradients.

    Numbers `[rows]` for a torus, else matrices `[blocks, n, n]`.
    """

    rows: slice | Tensor
    weight: Tensor
    dual: Tensor

    @classmethod
    def of(cls, leg: Leg, symmetry: Symmetry, element: Tensor) -> _Move:
        """The move of a leg by a group element."""
        if symmetry.is_torus:
            scale = (element**leg.exponent).repeat_interleave(leg.replicas)
            return cls(_chosen(leg), scale, scale.reciprocal())
        both = (element, dual_of(element))
        return cls(_chosen(leg), *(both if leg.sign > 0 else both[::-1]))


def _turned(moves: Sequence[_Move], values: Tensor, axis: int, *, dual: bool = False) -> Tensor:
    """Values in float64 with their rows along an axis moved by one leg after the other; other rows stay."""
    x = values.double().movedim(axis, -1).flatten(0, -2)
    met = torch.zeros(x.shape[-1], dtype=torch.int64)
    for move in moves:
        met[move.rows] += 1
    out = torch.empty_like(x) if bool((met == 1).all()) else x.clone()
    for move in moves:
        source = out.clone() if bool((met[move.rows] > 1).any()) else x
        _turn(move.rows, move.dual if dual else move.weight, source, out)
    return out.reshape(values.shape[:axis] + values.shape[axis + 1 :] + x.shape[-1:]).movedim(-1, axis)


def _turn(rows: slice | Tensor, by: Tensor, source: Tensor, out: Tensor) -> None:
    """Write the chosen rows of `source`, which run along its last axis, into `out` as they are moved."""
    if by.ndim == 1:
        if isinstance(rows, slice):
            torch.mul(source[:, rows], by, out=out[:, rows])
        else:
            out[:, rows] = source[:, rows] * by
        return
    n = by.shape[-1]
    if isinstance(rows, slice) and rows.stop - rows.start == len(by) * n:
        for start, g in zip(range(rows.start, rows.stop, n), by, strict=True):
            torch.mm(source[:, start : start + n], g.mT, out=out[:, start : start + n])
        return
    blocks = source[:, rows].reshape(len(source), len(by), n, -1)
    out[:, rows] = torch.einsum("mbir,bji->mbjr", blocks, by).flatten(1)


def _columns(samples: Tensor) -> Tensor:
    """A view of `[N, T, d]` as a matrix `[d, N T]`."""
    return samples.flatten(0, 1).mT


def _form(leg: Leg, symmetry: Symmetry, x: Tensor, y: Tensor) -> Tensor:
    """`X Y^T` of the rows that the leg chooses, in the layout of the symmetry."""
    rows = _chosen(leg)
    x, y = (a[rows].reshape(leg.blocks, leg.dim, -1) for a in (x, y))
    return (x * y).sum((1, 2)) if symmetry.is_torus else x @ y.mT


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
