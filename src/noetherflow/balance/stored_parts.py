"""Checkpoints on disk solved part by part: symmetries that share no parameter have nothing to do with one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from noetherflow.balance.layout import open_checkpoint
from noetherflow.balance.names import match_names
from noetherflow.balance.pieces import MovedSums, leg_gram_of, moved_sums
from noetherflow.balance.spill import spilled
from noetherflow.balance.stored import RenamedTensors
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.result import Equilibrium, Settled
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(frozen=True, eq=False)
class StoredReading:
    """Stored weights as a solve sees them, read when they are needed; `progress` is told the name of each.

    Attributes:
        weights: by canonical name.
        eps: of the dtype in which each is stored, by the same names.
        progress: called with the name of each tensor that is read.
    """

    weights: Mapping[str, Tensor]
    eps: Mapping[str, float]
    progress: Callable[[str], None]

    @classmethod
    def of(
        cls,
        source: str | Path,
        model: nn.Module,
        *,
        key: str | None = None,
        prefix: str | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> StoredReading:
        """Open a checkpoint of a model, which may be on the meta device; see `load_checkpoint_` for the rest.

        Raises CheckpointError for one that is unreadable or not of this model.
        """
        opened = open_checkpoint(source, key)
        names = match_names(model, opened.stored, opened.path, prefix, opened.adapter)
        shapes = {n: tuple(t.shape) for n, t in tensors_of(model).items()}
        weights = RenamedTensors(opened.stored, names.stored_names, names.parts, shapes)
        dtypes = {n: opened.stored.dtype(stored[0]) for n, stored in names.stored_names.items()}
        eps = {n: torch.finfo(dtype).eps for n, dtype in dtypes.items() if dtype.is_floating_point}
        return cls(weights, eps, progress or (lambda name: None))

    def gram(self, symmetry: Symmetry, leg: Leg) -> Tensor:
        """The Gram of one leg, float64."""
        return leg_gram_of(symmetry, leg, self.weights[leg.parameter]).double()

    def moved(
        self, name: str, moves: Sequence[tuple[Symmetry, Tensor]], legs: Sequence[tuple[Symmetry, Leg]]
    ) -> MovedSums:
        """Grams of legs on one weight, and its norm, under group elements."""
        self.progress(name)
        return moved_sums(name, self.weights[name], moves, legs)


@dataclass(frozen=True, eq=False)
class StoredPart:
    """The answer for symmetries that share parameters with one another, and with no others; its large tensors are on
    the disk (`spilled`). The numbers are those of an Equilibrium.
    """

    settled: tuple[Settled, ...]
    imbalance_now: float
    imbalance: float
    iterations: int
    evaluations: int
    converged: bool
    norm_now: float
    norm: float


def spilled_settled(settled: Sequence[Settled]) -> tuple[Settled, ...]:
    """The same with elements and charges on the disk, where they are large."""
    places = iter(spilled([t for s in settled for t in (s.element, s.charge_now, s.charge)]))
    return tuple(replace(s, element=next(places), charge_now=next(places), charge=next(places)) for s in settled)


def components(syms: SymmetrySet, joint: bool) -> list[tuple[Symmetry, ...]]:
    """Symmetries in groups that share no parameter, so that each group can be solved by itself; without `joint` every
    symmetry alone.
    """
    if not joint:
        return [(s,) for s in syms]
    group_of: dict[str, int] = {}
    groups: dict[int, list[Symmetry]] = {}
    for number, s in enumerate(syms):
        met = {group_of[n] for n in s.parameters if n in group_of}
        groups[number] = [member for old in sorted(met) for member in groups.pop(old)] + [s]
        group_of.update(dict.fromkeys((n for member in groups[number] for n in member.parameters), number))
    return [tuple(members) for members in groups.values()]


def joined(parts: Sequence[StoredPart], syms: SymmetrySet, objective: str, joint: bool) -> Equilibrium:
    """The answers of all parts as one Equilibrium."""
    by_name = {s.name: s for part in parts for s in part.settled}
    return Equilibrium(
        objective=objective,
        settled=tuple(by_name[s.name] for s in syms),
        imbalance_now=max((part.imbalance_now for part in parts), default=0.0),
        imbalance=max((part.imbalance for part in parts), default=0.0),
        iterations=max((part.iterations for part in parts), default=0),
        evaluations=max((part.evaluations for part in parts), default=0),
        converged=all(part.converged for part in parts),
        joint=joint,
        norm_now=sum(part.norm_now for part in parts),
        norm=sum(part.norm for part in parts),
        trace_now=None,
        trace=None,
        symmetries=syms,
    )
