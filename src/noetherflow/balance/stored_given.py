"""Group elements of your own, as an Equilibrium of a checkpoint on disk: its charges are read, no model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from noetherflow.balance.motion import Motion
from noetherflow.balance.stored_parts import StoredPart, StoredReading, components, joined, spilled_settled
from noetherflow.equilibrium.given import Destination, Stays, settled_at
from noetherflow.equilibrium.result import Equilibrium, Settled
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet


def stored_equilibrium_at(
    source: str | Path,
    model: nn.Module,
    syms: SymmetrySet,
    destination: Destination,
    *,
    key: str | None = None,
    prefix: str | None = None,
) -> Equilibrium:
    """`equilibrium_at` of a checkpoint on disk: the tensors that are moved are read one after the other.

    Args:
        source: the checkpoint (`read_checkpoint`).
        model: its model, which may be on the meta device.
        syms: its symmetries.
        destination: the elements, and what they are called.
        key, prefix: see `load_checkpoint_`.

    Returns:
        For `balance_checkpoint`: the charges of the stored weights, and those they will have. Symmetries without an
        element stay.

    Raises:
        CheckpointError: a checkpoint that is unreadable or not of this model.
    """
    reading = StoredReading.of(source, model, key=key, prefix=prefix)
    parts = [part_at(own, reading, destination) for own in components(syms, True)]
    return joined(parts, syms, destination.objective, True)


def part_at(symmetries: Sequence[Symmetry], reading: StoredReading, destination: Destination) -> StoredPart:
    """Symmetries that share parameters, at their elements.

    Args:
        symmetries: all that move one of these parameters.
        reading: the stored weights.
        destination: the elements, perhaps of others, too.
    """
    names = {s.name for s in symmetries}
    elements = {n: e for n, e in destination.elements.items() if n in names}
    now, there = _sums(symmetries, reading, {}), _sums(symmetries, reading, elements)
    settled = [
        _settled(s, elements.get(s.name, s.identity()), now, there, destination.stays.get(s.name)) for s in symmetries
    ]
    search = destination.search
    return StoredPart(
        spilled_settled(settled), search.imbalance_now, search.imbalance, search.sweeps, search.sweeps,
        search.converged, now.norm, there.norm,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Sums:
    """Grams by symmetry and leg, and the squared norm of all parameters."""

    grams: Mapping[tuple[str, int], Tensor]
    norm: float


def _sums(symmetries: Sequence[Symmetry], reading: StoredReading, elements: Mapping[str, Tensor]) -> _Sums:
    """The sums of the stored weights under these elements. The norm is that of the stored numbers, without offsets."""
    places: dict[str, list[tuple[Symmetry, int]]] = {}
    for s in symmetries:
        for j, leg in enumerate(s.weight_legs):
            places.setdefault(leg.parameter, []).append((s, j))
    movers = [s for s in symmetries if s.name in elements]
    motion, grams, norm = Motion(movers, elements), dict[tuple[str, int], Tensor](), 0.0
    for name, own in places.items():
        moves = [(s, elements[s.name]) for s in movers if name in s.parameters]
        found = reading.moved(name, moves, [(s, s.weight_legs[j]) for s, j in own])
        grams |= {(s.name, j): gram for (s, j), gram in zip(own, found.grams, strict=True)}
        offset = any(name in s.offsets for s, _ in own)
        norm += float(motion.weight(name, reading.weights[name]).square().sum()) if offset else found.norm
    return _Sums(grams, norm)


def _settled(s: Symmetry, element: Tensor, now: _Sums, there: _Sums, held: Stays | None) -> Settled:
    """One symmetry of the answer, without the Grams of its weights."""
    legs = range(len(s.weight_legs))
    before, after = (s.combine(tuple(sums.grams[s.name, j] for j in legs)) for sums in (now, there))
    return settled_at(s, element, (before, after), (), held)
