"""Equal levels: scales at which the channels' levels on both sides of every symmetry meet.

For a channel of scale `p`, `+` rows of level `a` and `-` rows of level `b` become `p a` and `b / p`, equal at
`p = sqrt(b / a)`. With the maximum as level this is the equalisation that precedes quantisation (Nagel et al. 2019),
here for whatever lies on the legs of a symmetry. One pass takes the symmetries one after the other; where two of them
scale the same weights, passes are repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from noetherflow.equilibrium.given import Destination, Search, Stays, equilibrium_at
from noetherflow.equilibrium.objective import LevelObjective
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.equilibrium.task import SolveOptions
from noetherflow.errors import DataError
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet, positions_of

TOLERANCE = 1e-9
"""Difference of the logs of two levels at which they count as equal."""


@dataclass(frozen=True, eq=False)
class Gap:
    """How far apart the levels of a symmetry's channels are.

    Attributes:
        log: Log of the scale that makes the levels meet, `[channels]`; 0 where there is none.
        known: Channels with a level above 0 on each side that there is, `[channels]`.
    """

    log: Tensor
    known: Tensor


class ChannelWeights(Protocol):
    """Weights as the search for equal levels sees them: in memory, or on the disk."""

    def is_matrix(self, parameter: str) -> bool:
        """Whether a parameter has more than one axis."""

    def levels(self, leg: Leg) -> Tensor:
        """The levels of a leg's channels at the weights as they have been scaled, `[channels]`."""

    def scale(self, torus: Symmetry, scales: Tensor) -> None:
        """Scale the channels of a torus further, `[channels]`."""


@dataclass(frozen=True, eq=False)
class HeldWeights:
    """Weights in memory, which are scaled in place; `tensors`: positions by parameter name."""

    tensors: dict[str, Tensor]
    objective: LevelObjective

    def is_matrix(self, parameter: str) -> bool:
        return self.tensors[parameter].ndim > 1

    def levels(self, leg: Leg) -> Tensor:
        return self.objective.of_rows(leg.unfold(self.tensors[leg.parameter]).flatten(1))

    def scale(self, torus: Symmetry, scales: Tensor) -> None:
        for parameter in torus.parameters:
            self.tensors[parameter] = torus.move(parameter, self.tensors[parameter], scales)


@dataclass(frozen=True, eq=False)
class LevelSearch:
    """Where levels meet: logs of the scales by symmetry, what stays, and how the search went."""

    logs: Mapping[str, Tensor]
    stays: Mapping[str, Stays]
    search: Search


@dataclass(frozen=True, eq=False)
class LegLevels:
    """Logs of the levels of one side, averaged over its legs, and by how much they rise with the log of the scale."""

    log: Tensor
    slope: float
    known: Tensor


def level_equilibrium(
    model: nn.Module, syms: SymmetrySet, objective: LevelObjective, options: SolveOptions
) -> Equilibrium:
    """The point at which levels meet, for every channel that has one.

    Args:
        model: Only read.
        syms: Its symmetries; of general_linear ones the diagonal part moves.
        objective: What a level is.
        options: Of which `max_iterations` (passes) and `tolerance` are used, and `joint=False` for a single pass.

    Returns:
        The equilibrium. Its imbalance is `|a - b| / (a + b)` of the two levels, the largest over all channels.

    Raises:
        DataError: `errors=True`, or a level that is not finite or negative.

    Source: Nagel et al., Data-free quantization through weight equalization and bias correction, 2019.
    """
    if options.errors:
        raise DataError(
            f"objective {objective.name!r} comes from the weights alone and has no errors: leave errors out"
        )
    tensors = {n: t.detach().double().cpu() for n, t in positions_of(model, syms).items() if n in syms.parameters}
    weights = HeldWeights(tensors, objective)
    own = tuple(s for s in syms if not objective.met or s.name in objective.met)
    tolerance = TOLERANCE if options.tolerance is None else options.tolerance
    found = levelled(own, weights, objective, tolerance, options.max_iterations if options.joint else 1)
    search = replace(found.search, converged=found.search.converged or not options.joint)
    elements = {s.name: element_of(s, found.logs[s.name].exp()) for s in own}
    return equilibrium_at(model, syms, Destination(elements, objective.name, search, found.stays))


def levelled(
    symmetries: Sequence[Symmetry], weights: ChannelWeights, objective: LevelObjective, tolerance: float, passes: int
) -> LevelSearch:
    """Bring the levels of all channels together, one symmetry after the other, until no scale moves any more.

    Args:
        symmetries: Of general_linear ones the diagonal part moves.
        weights: Their weights; at the end they have been scaled.
        objective: What a level is.
        tolerance: Logs of scales that count as 0.
        passes: Over all symmetries, at most.
    """
    tori = {s.name: diagonal_part(s) for s in symmetries}
    logs = {name: torch.zeros(torus.blocks, dtype=torch.float64) for name, torus in tori.items()}
    stays = {s.name: held for s in symmetries for held in _stays(s, weights, objective)}
    first = worst = 0.0
    sweeps = 0
    for sweeps in range(1, max(passes, 1) + 1):
        worst = 0.0
        for name, torus in tori.items():
            gap = gap_of(torus, weights, objective, logs[name])
            worst = max(worst, float(gap.log.abs().max()))
            logs[name] = logs[name] + gap.log
            weights.scale(torus, gap.log.exp())
        first = worst if sweeps == 1 else first
        if worst <= tolerance:
            break
    return LevelSearch(logs, stays, Search(_share(first), _share(worst), sweeps, worst <= tolerance))


def diagonal_part(symmetry: Symmetry) -> Symmetry:
    """The torus of diagonal matrices inside a general_linear symmetry, one scale for each row; a torus as it is.

    Example: of `GL(3)` in `2` blocks a diagonal symmetry of six coordinates.
    """
    if symmetry.is_torus:
        return symmetry
    legs = tuple(replace(leg, index=leg.index.reshape(-1, 1, leg.replicas)) for leg in symmetry.legs)
    return replace(symmetry, kind="diagonal", legs=legs)


def gap_of(torus: Symmetry, weights: ChannelWeights, objective: LevelObjective, log: Tensor) -> Gap:
    """What the scales of a torus are to be multiplied by for its levels to meet.

    Args:
        torus: A scalar or diagonal symmetry.
        weights: Its weights now.
        objective: What a level is.
        log: Logs of the scales that led here, with which measured activations have grown.

    Returns:
        The gap. Where all legs scale the same way, all channels are brought to their geometric mean.
    """
    down = _side(torus, -1, weights)
    up = _met(torus, objective, log) if objective.met else _side(torus, 1, weights)
    sides = [(side, sign) for side, sign in ((up, 1), (down, -1)) if side is not None]
    known = torch.stack([side.known for side, _ in sides]).all(0)
    if len(sides) == 1:
        (side, sign) = sides[0]
        mean = side.log[known].mean() if bool(known.any()) else torch.zeros(())
        return Gap(torch.where(known, sign * (mean - side.log) / side.slope, torch.zeros_like(side.log)), known)
    assert up is not None
    assert down is not None
    a, b = objective.share, 1 - objective.share
    scale = (b * down.log - a * up.log) / (a * up.slope + b * down.slope)
    return Gap(torch.where(known, scale, torch.zeros_like(scale)), known)


def _side(torus: Symmetry, sign: int, weights: ChannelWeights) -> LegLevels | None:
    """The levels on one side. Matrices alone count where there are any: vectors (biases, gains) are not quantised.

    Each matrix has its own quantisation step, so that the mean of the logs is taken over them; of several vectors, the
    gain and bias of a norm, the larger level.
    """
    legs = [leg for leg in torus.weight_legs if leg.sign == sign]
    if not legs:
        return None
    matrices = [leg for leg in legs if weights.is_matrix(leg.parameter)]
    levels = [weights.levels(leg) for leg in matrices or legs]
    if not matrices:
        levels = [torch.stack(levels).amax(0)]
    return _averaged(levels, matrices or legs[:1])


def _averaged(levels: Sequence[Tensor], legs: Sequence[Leg]) -> LegLevels:
    """The mean log over the legs whose level is not 0."""
    stacked = torch.stack(list(levels))
    there = stacked > 0
    logs = torch.where(there, stacked, torch.ones_like(stacked)).log()
    slope = sum(abs(leg.exponent) for leg in legs) / len(legs)
    return LegLevels(logs.sum(0) / there.sum(0).clamp_min(1), slope, there.any(0))


def _met(torus: Symmetry, objective: LevelObjective, log: Tensor) -> LegLevels:
    """The levels of the activations that `-` legs read, at scales that have grown by `log` since the measurement."""
    level = objective.met[torus.name].double().cpu().reshape(-1)
    known = level > 0
    slope = next(abs(leg.exponent) for leg in torus.weight_legs if leg.sign < 0)
    return LegLevels(torch.where(known, level, torch.ones_like(level)).log() + slope * log, slope, known)


def _stays(symmetry: Symmetry, weights: ChannelWeights, objective: LevelObjective) -> list[Stays]:
    """The channels without a level on one side, which stay where they are; nothing where all have both."""
    torus = diagonal_part(symmetry)
    gap = gap_of(torus, weights, objective, torch.zeros(torus.blocks, dtype=torch.float64))
    unknown = (~gap.known).reshape(symmetry.blocks, -1)
    if not bool(unknown.any()):
        return []
    why = f"{int(unknown.sum())} of {torus.blocks} channels: all weights (or activations) of one side are 0"
    return [Stays(unknown.any(1), why)]


def element_of(symmetry: Symmetry, scales: Tensor) -> Tensor:
    """The scales of the diagonal part as an element of the symmetry itself."""
    if symmetry.is_torus:
        return scales
    return torch.diag_embed(scales.reshape(symmetry.blocks, symmetry.dim))


def _share(log: float) -> float:
    """`|a - b| / (a + b)` of two levels whose scale to meet has this log, `a = exp(-log)`, `b = exp(log)`."""
    return float(torch.tanh(torch.tensor(abs(log), dtype=torch.float64)))
