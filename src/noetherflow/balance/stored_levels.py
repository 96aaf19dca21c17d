"""Equal levels (`objective="range"`) of a checkpoint on disk: a few channels of one tensor are in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from noetherflow.balance import cuts
from noetherflow.balance.cuts import Cutting, Piece, cuttings
from noetherflow.balance.pieces import Moves, ready
from noetherflow.balance.stored_given import part_at
from noetherflow.balance.stored_parts import StoredPart, StoredReading
from noetherflow.equilibrium.given import Destination
from noetherflow.equilibrium.levels import diagonal_part, element_of, levelled
from noetherflow.equilibrium.objective import LevelObjective
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry


def level_part(
    symmetries: Sequence[Symmetry], reading: StoredReading, objective: LevelObjective, tolerance: float, passes: int
) -> StoredPart:
    """Where the levels of symmetries that share parameters meet; others than `objective.met` names stay, if it does.

    Args:
        symmetries: all that move one of these parameters.
        reading: the stored weights.
        objective: what a level is.
        tolerance: logs of scales that count as 0.
        passes: over all symmetries, at most.
    """
    own = tuple(s for s in symmetries if not objective.met or s.name in objective.met)
    shapes = {n: tuple(reading.weights[n].shape) for s in symmetries for n in s.parameters}
    tori = {s.name: _plain(diagonal_part(s), shapes) for s in own}
    logs = {n: torch.zeros(torus.blocks, dtype=torch.float64) for n, torus in tori.items()}
    found = levelled(own, StoredLevels(reading, objective, tori, logs), objective, tolerance, passes)
    elements = {s.name: element_of(s, found.logs[s.name].exp()) for s in own}
    return part_at(symmetries, reading, Destination(elements, objective.name, found.search, found.stays))


@dataclass(frozen=True, eq=False)
class StoredLevels:
    """Stored weights and the scales that their channels have been given so far.

    Attributes:
        reading: the stored weights.
        objective: what a level is.
        tori: by name the symmetries, of general_linear ones the diagonal part.
        logs: by name the logs of the scales; `scale` adds to them.
    """

    reading: StoredReading
    objective: LevelObjective
    tori: Mapping[str, Symmetry]
    logs: dict[str, Tensor]

    def is_matrix(self, parameter: str) -> bool:
        return self.reading.weights[parameter].ndim > 1

    def scale(self, torus: Symmetry, scales: Tensor) -> None:
        self.logs[torus.name] = self.logs[torus.name] + scales.log()

    def levels(self, leg: Leg) -> Tensor:
        """The levels of a leg's channels, from some of its channels after the other."""
        name = leg.parameter
        self.reading.progress(name)
        tensor = self.reading.weights[name]
        moves = [(s, self.logs[n].exp()) for n, s in self.tori.items() if name in s.parameters]
        own = plain_leg(leg, tuple(tensor.shape))
        asked = Symmetry(f"levels of {name}", "levels", "diagonal", (own,))
        for cutting in cuttings([*(s for s, _ in moves), asked], name, tensor.shape):
            cut = cutting.cuts[-1][0]
            if cut.along and len(cut.axes) == 1:
                return self._by_channels(cutting, own, moves, tensor)
        theta = tensor.double() + own.offset
        for s, scales in moves:
            theta = s.move(name, theta, scales)
        return self.objective.of_rows(leg.unfold(theta).flatten(1))

    def _by_channels(self, cutting: Cutting, leg: Leg, moves: Moves, tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.element_size() < 4 else torch.float64
        move = ready(cutting, moves, (0.0,) * len(cutting.cuts), tensor, dtype)
        channels = torch.as_tensor(leg.index[:, 0])
        entries = leg.replicas * tensor.numel() // tensor.shape[cutting.axis]
        found = []
        for rows in torch.split(channels, max(1, cuts.PIECE // max(entries, 1))):
            part = move.of(tensor, Piece(rows.reshape(-1)), leg.offset)
            own = part.movedim(cutting.axis, 0).reshape(len(rows), -1)
            found.append(self.objective.of_rows(own).double())
        return torch.cat(found)


def _plain(torus: Symmetry, shapes: Mapping[str, tuple[int, ...]]) -> Symmetry:
    """The same symmetry with all legs on stored parameters as `plain_leg` has them."""
    legs = (plain_leg(leg, shapes[leg.parameter]) if leg.parameter in shapes else leg for leg in torus.legs)
    return replace(torus, legs=tuple(legs))


def plain_leg(leg: Leg, shape: tuple[int, ...]) -> Leg:
    """The same rows, named along one axis of the parameter itself where they lie along one; else the leg as it is.

    Example:
        Channel `j` of a leg that views `[4, 6]` as `[2, 2, 6]` and runs along the second axis has rows `j` and `2 + j`.

        >>> plain_leg(Leg("w", np.arange(2).reshape(2, 1, 1), 1, (1,), (2, 2, 6)), (4, 6)).index[:, 0].tolist()
        [[0, 2], [1, 3]]
    """
    view = shape if leg.view is None else leg.view
    axes = [a % len(view) for a in leg.axes]
    if leg.view is None and len(axes) == 1:
        return replace(leg, axes=(axes[0],))
    for axis in range(len(shape)):
        inside = _axes_within(view, shape, axis)
        if inside and set(axes) <= set(inside):
            coordinates = leg.entry_coordinates(shape).reshape([view[a] for a in axes]).transpose(np.argsort(axes))
            spread = coordinates.reshape([view[a] if a in axes else 1 for a in inside])
            by_row = np.broadcast_to(spread, [view[a] for a in inside]).reshape(-1)
            order = np.argsort(by_row, kind="stable")[int((by_row < 0).sum()) :]
            if len(order) % leg.blocks == 0 and len(set(np.bincount(by_row[by_row >= 0], minlength=leg.blocks))) == 1:
                return replace(leg, view=None, axes=(axis,), index=order.reshape(leg.blocks, 1, -1))
    return leg


def _axes_within(view: Sequence[int], shape: Sequence[int], axis: int) -> list[int]:
    """The axes of the view that together make one axis of the parameter; none where the view mixes it with others."""
    before = math.prod(shape[:axis])
    inside = [a for a in range(len(view)) if before <= math.prod(view[:a]) < before * shape[axis]]
    whole = inside and math.prod(view[: inside[0]]) == before
    return inside if whole and math.prod(view[a] for a in inside) == shape[axis] else []
