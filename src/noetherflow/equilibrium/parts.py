"""A joint solve part by part: symmetries that move no parameter in common have nothing to do with one another.

Example: in a transformer the gains and heads of one layer meet on its query-key-value weight, and no symmetry reaches
from one layer to the next. Each layer then takes the sweeps that it needs by itself, and only its tensors are in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noetherflow.core.progress import watched
from noetherflow.equilibrium.alternate import HalvedOrbit, alternating, halves_of, minimise_in_turns, worth_turns
from noetherflow.equilibrium.orbit import FramedOrbit, MeasuredOrbit, Point, blank_pairs
from noetherflow.equilibrium.potential import LegPair, Potential
from noetherflow.equilibrium.search import Minimum
from noetherflow.equilibrium.solve import Classes, StepLimits, minimise
from noetherflow.equilibrium.terms import OrbitTerm
from noetherflow.symmetry.symmetry import Symmetry


@dataclass(frozen=True, eq=False)
class PartOrbit:
    """Some symmetries of a measured orbit that share no term with the others, as an orbit of their own.

    Attributes:
        whole: the orbit of all.
        members: the positions of these symmetries among all.
        terms: what they move.
    """

    whole: MeasuredOrbit
    members: tuple[int, ...]
    terms: tuple[OrbitTerm, ...]

    @classmethod
    def of(cls, whole: MeasuredOrbit, members: tuple[int, ...]) -> PartOrbit:
        """The part of these symmetries, with what all its points share worked out once."""
        own = [t for t in whole.terms if not set(members).isdisjoint(t.moved_by)]
        return cls(whole, members, tuple(t.unpacked() for t in own))

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        return tuple(self.whole.symmetries[i] for i in self.members)

    @property
    def potential(self) -> Potential:
        return self.whole.potential

    def at(self, elements: Sequence[Tensor]) -> Point:
        placed = [torch.zeros(0)] * len(self.whole.symmetries)
        for i, element in zip(self.members, elements, strict=True):
            placed[i] = element
        out = blank_pairs(self.whole.symmetries)
        traces = [term.add(placed, out) for term in self.terms]
        return Point([out[i] for i in self.members], sum(t[0] for t in traces), sum(t[1] for t in traces))


def independent(orbit: MeasuredOrbit) -> list[tuple[int, ...]]:
    """The symmetries of an orbit, by position, in groups that share no term; each group as small as can be."""
    groups: list[set[int]] = []
    for met in [{i} for i in range(len(orbit.symmetries))] + [set(t.moved_by) for t in orbit.terms]:
        joined = met.union(*(g for g in groups if not g.isdisjoint(met)))
        groups = [g for g in groups if g.isdisjoint(met)] + [joined]
    return sorted(tuple(sorted(g)) for g in groups)


def minimise_in_parts(
    orbit: FramedOrbit,
    classes: Sequence[Classes],
    limits: StepLimits,
    *,
    start: Sequence[Tensor] | None = None,
    tolerance: float = 1e-11,
    max_iterations: int = 500,
) -> Minimum:
    """`minimise`, part by part where the orbit is measured (`MeasuredOrbit`), else as a whole.

    Returns:
        The minimum of all parts: sweeps and evaluations are those of the part that took most.
    """
    whole = orbit.orbit
    if not isinstance(whole, MeasuredOrbit):
        return minimise(orbit, classes, limits, start=start, tolerance=tolerance, max_iterations=max_iterations)
    groups, found = independent(whole), []
    for members in watched(groups, "noise equilibrium, parts:", len(groups)):
        part, logs = PartOrbit.of(whole, members), None if start is None else [start[i] for i in members]
        terms = alternating(part.terms) if max_iterations and worth_turns(part.terms) else ()
        halves = halves_of(whole.symmetries, members, terms, limits.alone)
        if halves is None:
            framed = FramedOrbit(part, tuple(orbit.frame[i] for i in members))
            chosen = [classes[i] for i in members]
            own = limits.of(members)
            best = minimise(framed, chosen, own, start=logs, tolerance=tolerance, max_iterations=max_iterations)
        else:
            halved = HalvedOrbit(whole, halves, terms, orbit.frame, tuple(classes), limits.alone)
            best = minimise_in_turns(halved, start=logs, tolerance=tolerance, max_iterations=max_iterations)
        found.append(best)
    return _joined(groups, found)


def _joined(groups: Sequence[tuple[int, ...]], found: Sequence[Minimum]) -> Minimum:
    """The minima of all parts as one."""
    logs: dict[int, Tensor] = {}
    pairs: dict[int, list[LegPair]] = {}
    for members, part in zip(groups, found, strict=True):
        logs.update(zip(members, part.logs, strict=True))
        pairs.update(zip(members, part.point.pairs, strict=True))
    traces = [part.point.trace for part in found]
    return Minimum(
        logs=[logs[i] for i in sorted(logs)],
        point=Point(
            [pairs[i] for i in sorted(pairs)],
            sum(part.point.norm for part in found),
            None if None in traces else sum(t for t in traces if t is not None),
        ),
        imbalance=max((part.imbalance for part in found), default=0.0),
        iterations=max((part.iterations for part in found), default=0),
        evaluations=max((part.evaluations for part in found), default=0),
        converged=all(part.converged for part in found),
    )
