"""Cut a stored tensor into pieces and move each by itself, so that wide copies are made of a small part of it.

A piece is some rows along one axis. A leg along another axis acts on every piece in the same way, a torus leg along the
same axis scales the piece's own rows. Matrices along the axis mix rows: pieces then keep such rows together, or, where
those are too many, are computed from all rows that a matrix reads, some of them at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry

PIECE = 1 << 20
"""Entries in a piece."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Rows that one block of a matrix leg makes from one another, too many for one piece.

    Attributes:
        reads: the rows that the matrix reads, in the order of its coordinates.
        symmetry, leg: which leg of which symmetry it is, by position.
        block: of the group element.
        first: the coordinate of the first row that is written.
    """

    reads: Tensor
    symmetry: int
    leg: int
    block: int
    first: int


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a tensor along an axis, with what they are mixed from where that is more than themselves."""

    rows: Tensor
    mixture: Mixture | None = None


def taken(tensor: Tensor, axis: int, rows: Tensor) -> Tensor:
    """Rows of a tensor along an axis, a view where they follow one another."""
    if _consecutive(rows):
        return tensor.narrow(axis, int(rows[0]), len(rows))
    return tensor.index_select(axis, rows)


def put(tensor: Tensor, axis: int, rows: Tensor, values: Tensor) -> None:
    """Write these rows, rounded to the tensor's dtype."""
    if _consecutive(rows):
        tensor.narrow(axis, int(rows[0]), len(rows)).copy_(values)
    else:
        tensor.index_copy_(axis, rows, values.to(tensor.dtype))


def _consecutive(rows: Tensor) -> bool:
    return bool((rows == torch.arange(int(rows[0]), int(rows[0]) + len(rows))).all())


@dataclass(frozen=True, eq=False)
class Cut:
    """How a leg sees the pieces of its parameter.

    Attributes:
        symmetry, leg: the leg on the whole parameter, and whose it is.
        shape: of the parameter.
        cut: the axis of the parameter along which it is cut.
        view: the shape in which the leg looks at the whole parameter.
        axis: the place of the cut axis in `view`.
    """

    symmetry: Symmetry
    leg: Leg
    shape: tuple[int, ...]
    cut: int
    view: tuple[int, ...]
    axis: int

    @property
    def along(self) -> bool:
        """Whether the leg's rows lie along the cut."""
        return self.axis in self.axes

    @property
    def axes(self) -> tuple[int, ...]:
        """The leg's axes, counted from 0."""
        return tuple(a % len(self.view) for a in self.leg.axes)

    @property
    def mixes(self) -> bool:
        """Whether rows along the cut are made from one another."""
        return self.along and not self.symmetry.is_torus

    @cached_property
    def sets(self) -> np.ndarray:
        """The rows that a matrix mixes, in the order of its coordinates, one set for each block and replica."""
        return self.leg.index.transpose(0, 2, 1).reshape(-1, self.leg.dim)

    def view_of(self, length: int) -> tuple[int, ...]:
        """The leg's view of a piece with so many rows."""
        return (*self.view[: self.axis], length, *self.view[self.axis + 1 :])

    def numbers(self, element: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """What the leg multiplies by: factors that broadcast against its view (torus), or matrices."""
        if self.symmetry.is_torus:
            return self.leg.factors(element, like).to(dtype)
        return (element if self.leg.sign > 0 else self.symmetry.inverse(element).mT).to(dtype)

    def moved(self, part: Tensor, rows: Tensor, numbers: Tensor) -> Tensor:
        """A piece with these rows, multiplied; rows that matrices mix must all be in it."""
        if self.symmetry.is_torus:
            here = numbers if numbers.shape[self.axis] == 1 else numbers.index_select(self.axis, rows)
            return (part.reshape(self.view_of(len(rows))) * here).reshape(part.shape)
        if not self.along:
            return replace(self.leg, view=self.view_of(len(rows))).multiply(part, numbers)
        places, blocks = self._sets_in(rows)
        if not len(blocks):
            return part
        flat = part.movedim(self.cut, 0)
        out = flat.reshape(len(rows), -1).clone()
        picked = out[places.reshape(-1)].reshape(*places.shape, -1)
        out[places.reshape(-1)] = (numbers[blocks] @ picked).reshape(places.numel(), -1)
        return out.reshape(flat.shape).movedim(0, self.cut)

    def gram(self, part: Tensor, rows: Tensor) -> Tensor:
        """What a piece adds to the leg's Gram, float64 in the layout of the symmetry."""
        s = self.symmetry
        if not self.along:
            return s.leg_gram(replace(self.leg, view=self.view_of(len(rows))), part).double()
        total = torch.zeros(s.shape, dtype=torch.float64)
        if s.is_torus:
            coordinates = torch.as_tensor(self.leg.entry_coordinates(self.shape))
            here = coordinates.reshape([self.view[a] for a in self.axes])
            here = here.index_select(self.axes.index(self.axis), rows).reshape(-1)
            squares = part.reshape(self.view_of(len(rows))).square()
            sums = squares.movedim(self.axes, tuple(range(len(self.axes)))).reshape(len(here), -1).sum(1).double()
            return total.index_add_(0, here[here >= 0], sums[here >= 0])
        places, blocks = self._sets_in(rows)
        if not len(blocks):
            return total
        picked = part.movedim(self.cut, 0).reshape(len(rows), -1)[places.reshape(-1)].reshape(*places.shape, -1)
        return total.index_add_(0, blocks, (picked @ picked.mT).double())

    def _sets_in(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where the sets that lie in a piece have their rows, `[sets, dim]`, and the blocks that they belong to."""
        place = np.full(self.shape[self.cut], -1)
        place[rows.numpy()] = np.arange(len(rows))
        places = place[self.sets]
        inside = (places >= 0).all(1)
        blocks = np.arange(len(self.sets)) // self.leg.replicas
        return torch.as_tensor(places[inside]), torch.as_tensor(blocks[inside])


@dataclass(frozen=True, eq=False)
class Cutting:
    """A parameter cut along one axis; `cuts`: by symmetry the legs on it."""

    shape: tuple[int, ...]
    axis: int
    cuts: tuple[tuple[Cut, ...], ...]

    @property
    def mixing(self) -> list[tuple[int, int, Cut]]:
        """The legs that mix rows, with their places in `cuts`."""
        return [(i, j, cut) for i, own in enumerate(self.cuts) for j, cut in enumerate(own) if cut.mixes]

    @property
    def length(self) -> int:
        """How many rows a piece has, or a few."""
        return max(1, PIECE * self.shape[self.axis] // math.prod(self.shape))

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """All rows, in pieces that are closed under the matrices or know what they are mixed from."""
        groups = self._groups()
        if groups is None:
            return tuple(Piece(rows) for rows in torch.split(torch.arange(self.shape[self.axis]), self.length))
        out: list[Piece] = []
        held: list[np.ndarray] = []
        for rows in groups:
            if held and sum(map(len, held)) + len(rows) > self.length:
                out.append(_joined(held))
                held = []
            if len(rows) > self.length:
                out += self._mixed(rows)
            else:
                held.append(rows)
        return tuple([*out, _joined(held)] if held else out)

    @property
    def largest(self) -> int:
        """Rows of the largest piece."""
        return max(len(p.rows) for p in self.pieces)

    def _groups(self) -> list[np.ndarray] | None:
        """Rows that are mixed with one another, directly or by way of others; None where no rows are."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        n = self.shape[self.axis]
        edges = [(np.repeat(cut.sets[:, 0], cut.leg.dim), cut.sets.reshape(-1)) for _, _, cut in self.mixing]
        if not edges:
            return None
        a, b = (np.concatenate(column) for column in zip(*edges, strict=True))
        _, labels = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(n, n)), directed=False)
        order = np.argsort(labels, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)

    def _mixed(self, rows: np.ndarray) -> list[Piece]:
        """Pieces of a group of rows that is too large for one; the group as it is where several matrices mix it."""
        sets = [
            (i, j, number, cut)
            for i, j, cut in self.mixing
            for number in np.flatnonzero(np.isin(cut.sets[:, 0], rows)).tolist()
        ]
        scales = [cut for own in self.cuts for cut in own if cut.along and not cut.mixes]
        if len(sets) > 1 or any(len(c.axes) > 1 for c in scales) or any(c.leg.offset for own in self.cuts for c in own):
            return [Piece(torch.as_tensor(rows))]
        (i, j, number, cut) = sets[0]
        reads = torch.as_tensor(cut.sets[number])
        starts = range(0, len(reads), self.length)
        return [Piece(reads[a : a + self.length], Mixture(reads, i, j, number // cut.leg.replicas, a)) for a in starts]


def _joined(groups: Sequence[np.ndarray]) -> Piece:
    return Piece(torch.as_tensor(np.sort(np.concatenate(list(groups)))))


def cuttings(symmetries: Sequence[Symmetry], name: str, shape: Sequence[int]) -> list[Cutting]:
    """The ways to cut a parameter that all legs on it can follow, those with small and simple pieces first.

    Args:
        symmetries: those that move it, and those whose Grams are asked for.
        name: of the parameter.
        shape: of the parameter.
    """
    out = []
    for axis in range(len(shape)):
        found = [[_cut(s, leg, tuple(shape), axis) for leg in s.legs if leg.parameter == name] for s in symmetries]
        if not any(cut is None for own in found for cut in own):
            out.append(Cutting(tuple(shape), axis, tuple(tuple(c for c in own if c is not None) for own in found)))
    return sorted(out, key=_cost)


def _cost(cutting: Cutting) -> tuple[bool, bool, bool]:
    """What speaks against a cutting: pieces that are too large, rows read more than once, rows kept together."""
    mixed = any(p.mixture is not None for p in cutting.pieces)
    return cutting.largest > cutting.length, mixed, bool(cutting.mixing)


def _cut(symmetry: Symmetry, leg: Leg, shape: tuple[int, ...], axis: int) -> Cut | None:
    """The cut along an axis that the leg's view keeps whole; None where it splits or merges it, or where matrices act
    on rows that this axis and another one count together.
    """
    view = shape if leg.view is None else tuple(leg.view)
    before = math.prod(shape[:axis])
    place = next((a for a in range(len(view)) if view[a] == shape[axis] and math.prod(view[:a]) == before), None)
    if place is None:
        return None
    cut = Cut(symmetry, leg, shape, axis, view, place)
    return None if cut.mixes and len(cut.axes) > 1 else cut


@dataclass(frozen=True, eq=False)
class PieceMove:
    """Group elements made ready to move the pieces of one parameter.

    Attributes:
        cutting: how it is cut.
        numbers: by symmetry and leg what the leg multiplies by (`Cut.numbers`); empty for symmetries that stay.
        offsets: by symmetry what is added before it acts and taken off again.
        dtype: of the result.
    """

    cutting: Cutting
    numbers: tuple[tuple[Tensor, ...], ...]
    offsets: tuple[float, ...]
    dtype: torch.dtype

    def pieces(self, tensor: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Every piece of a tensor with its moved values; the tensor must stay while they are made where pieces are
        mixed from more than their own rows.
        """
        for piece in self.cutting.pieces:
            yield piece, self.of(tensor, piece)

    def of(self, tensor: Tensor, piece: Piece, offset: float = 0.0) -> Tensor:
        """One piece of a tensor, to which `offset` is added first, moved."""
        if piece.mixture is not None:
            return self._mixed(tensor, piece, piece.mixture)
        part = taken(tensor, self.cutting.axis, piece.rows).to(self.dtype, copy=True)
        part = part.add_(offset) if offset else part
        for own, numbers, added in zip(self.cutting.cuts, self.numbers, self.offsets, strict=True):
            part = part + added if added else part
            for cut, number in zip(own, numbers, strict=False):
                part = cut.moved(part, piece.rows, number)
            part = part - added if added else part
        return part

    def _mixed(self, tensor: Tensor, piece: Piece, mixture: Mixture) -> Tensor:
        """Rows that a matrix makes from many. What acts along other axes commutes with it and comes last."""
        axis, step = self.cutting.axis, self.cutting.length
        if not self.numbers[mixture.symmetry]:
            part = taken(tensor, axis, piece.rows).to(self.dtype, copy=True)
            return self._others(part, piece.rows, range(len(self.numbers)))
        matrix = self.numbers[mixture.symmetry][mixture.leg][mixture.block]
        matrix = matrix[mixture.first : mixture.first + len(piece.rows)]
        total: Tensor | None = None
        for start in range(0, len(mixture.reads), step):
            rows = mixture.reads[start : start + step]
            part = taken(tensor, axis, rows).to(self.dtype, copy=True)
            part = self._scaled(part, rows, range(mixture.symmetry))
            added = torch.tensordot(matrix[:, start : start + step], part, ([1], [axis]))
            total = added if total is None else total.add_(added)
        assert total is not None
        part = self._scaled(total.movedim(0, axis), piece.rows, range(mixture.symmetry + 1, len(self.numbers)))
        return self._others(part, piece.rows, range(0))

    def _scaled(self, part: Tensor, rows: Tensor, symmetries: range) -> Tensor:
        """Under the legs of these symmetries that scale rows along the cut."""
        for i in symmetries:
            for cut, number in zip(self.cutting.cuts[i], self.numbers[i], strict=False):
                part = cut.moved(part, rows, number) if cut.along and not cut.mixes else part
        return part

    def _others(self, part: Tensor, rows: Tensor, symmetries: range) -> Tensor:
        """Under all legs along other axes, and under the scales along the cut of these symmetries."""
        part = self._scaled(part, rows, symmetries)
        for own, numbers in zip(self.cutting.cuts, self.numbers, strict=True):
            for cut, number in zip(own, numbers, strict=False):
                part = part if cut.along else cut.moved(part, rows, number)
        return part
