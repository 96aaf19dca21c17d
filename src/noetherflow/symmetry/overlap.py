"""Which entries of a parameter each leg moves, and where legs of several symmetries meet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noetherflow.core.host import on_host
from noetherflow.symmetry.symmetry import Symmetry


@dataclass(frozen=True, eq=False)
class LegCoordinates:
    """One leg on one parameter: `ids`, broadcastable to the viewed parameter, names the coordinate that moves an entry.

    Coordinates are `block * dim + i`; -1 where the leg moves nothing. `count` coordinates in all.
    """

    symmetry: int
    leg: int
    exponent: float
    count: int
    dim: int
    ids: Tensor
    view: tuple[int, ...]

    def spread(self, values: Tensor, outside: float = 1.0) -> Tensor:
        """`values[coordinate]`, `outside` where the leg moves nothing; broadcastable to the viewed parameter."""
        padded = torch.cat([values.reshape(-1), values.new_full((1,), outside)])
        return padded[self.ids]

    def collect(self, entries: Tensor) -> Tensor:
        """Sum entries over each coordinate: `[count]`."""
        sums = entries
        for axis in range(entries.ndim):
            if self.ids.shape[axis] == 1 and sums.shape[axis] > 1:
                sums = sums.sum(dim=axis, keepdim=True)
        out = sums.new_zeros(self.count + 1)
        out.index_add_(0, self._slots(), sums.expand(self.ids.shape).reshape(-1))
        return out[: self.count]

    def largest(self, entries: Tensor) -> Tensor:
        """The largest entry that each coordinate moves: `[count]`."""
        top = entries
        for axis in range(entries.ndim):
            if self.ids.shape[axis] == 1 and top.shape[axis] > 1:
                top = top.amax(dim=axis, keepdim=True)
        out = top.new_zeros(self.count + 1)
        out.scatter_reduce_(0, self._slots(), top.expand(self.ids.shape).reshape(-1), "amax")
        return out[: self.count]

    def _slots(self) -> Tensor:
        """Flat ids with -1 sent to an extra last slot."""
        return self.ids.reshape(-1).remainder(self.count + 1)

    def reduce(self, entries: Tensor, legs: Sequence[LegCoordinates]) -> Tensor:
        """Entries of the parameter, viewed, summed over every axis that none of `legs` distinguishes."""
        viewed = entries.reshape(self.view)
        free = tuple(a for a in range(viewed.ndim) if all(leg.ids.shape[a] == 1 for leg in legs))
        return viewed.sum(dim=free, keepdim=True) if free else viewed

    @property
    def moves(self) -> Tensor:
        """True where the leg moves the entry."""
        return self.ids >= 0


@on_host
def leg_coordinates(
    symmetries: Sequence[Symmetry], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[LegCoordinates, ...]]:
    """All charge-carrying legs by parameter. Legs of one parameter are brought to one view (flat if theirs differ)."""
    by_parameter: dict[str, list[tuple[int, int]]] = {}
    for i, symmetry in enumerate(symmetries):
        for j, leg in enumerate(symmetry.weight_legs):
            by_parameter.setdefault(leg.parameter, []).append((i, j))
    return {
        name: tuple(_coordinates(symmetries, i, j, shapes[name], legs) for i, j in legs)
        for name, legs in by_parameter.items()
    }


def _coordinates(
    symmetries: Sequence[Symmetry], i: int, j: int, shape: tuple[int, ...], together: list[tuple[int, int]]
) -> LegCoordinates:
    leg = symmetries[i].weight_legs[j]
    view = shape if leg.view is None else leg.view
    others = {symmetries[a].weight_legs[b].view or shape for a, b in together}
    axes = tuple(a % len(view) for a in leg.axes)
    rows = torch.as_tensor(leg.entry_coordinates(shape)).reshape([view[a] for a in axes])
    order = sorted(range(len(axes)), key=lambda k: axes[k])
    ids = rows.permute(order).reshape([n if a in axes else 1 for a, n in enumerate(view)])
    if len(others) > 1:
        ids, view = ids.expand(view).reshape(-1), (math.prod(view),)
    return LegCoordinates(i, j, leg.exponent, leg.blocks * leg.dim, leg.dim, ids, tuple(view))


def _touches(legs: Sequence[LegCoordinates]) -> Tensor:
    """`sum_legs |exponent|` over the legs that move each entry, broadcastable to the viewed parameter."""
    total = torch.zeros([1] * legs[0].ids.ndim, dtype=torch.float64)
    for leg in legs:
        total = total + abs(leg.exponent) * leg.moves.double()
    return total


@on_host
def overlapping_parameters(coordinates: Mapping[str, tuple[LegCoordinates, ...]]) -> set[str]:
    """Parameters with an entry that more than one leg moves."""
    out = set()
    for name, legs in coordinates.items():
        count = sum(leg.moves.int() for leg in legs)
        if len(legs) > 1 and int(torch.as_tensor(count).max()) > 1:
            out.add(name)
    return out


def mixed_parameters(
    coordinates: Mapping[str, tuple[LegCoordinates, ...]], symmetries: Sequence[Symmetry]
) -> dict[str, None]:
    """Overlapping parameters where at least one leg is general_linear, in order."""
    shared = overlapping_parameters(coordinates)
    return {
        n: None for n in coordinates if n in shared and any(not symmetries[g.symmetry].is_torus for g in coordinates[n])
    }


def stiffness(coordinates: Mapping[str, tuple[LegCoordinates, ...]], symmetries: Sequence[Symmetry]) -> list[Tensor]:
    """`kappa`: per symmetry and block the largest `sum_legs |exponent|` over the entries that the block moves,
    `[blocks]`.

    An entry that scales as `exp(2 sum_l c_l d_l)` is bounded by `sum_l (|c_l| / kappa) exp(2 kappa sign(c_l) d_l)`
    (convexity), with equality in value and slope at `d = 0`; so steps shortened by `kappa` can be taken for all
    symmetries at once and never raise Phi.
    """
    out = [torch.zeros(s.blocks, dtype=torch.float64) for s in symmetries]
    for legs in coordinates.values():
        touches = _touches(legs)
        for leg in legs:
            top = leg.largest(touches).reshape(-1, leg.dim).amax(dim=1)
            out[leg.symmetry] = torch.maximum(out[leg.symmetry], top)
    return out
