"""The point of least norm of a checkpoint on disk: its tensors are read one after the other, no model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.balance.layout import open_checkpoint
from noetherflow.balance.names import match_names
from noetherflow.balance.pieces import MovedSums, leg_gram_of, moved_sums
from noetherflow.balance.spill import spilled
from noetherflow.balance.stored import RenamedTensors
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.blocks import TorusClasses, gl_frame
from noetherflow.equilibrium.conditioning import ROUNDING, Stretches, stretch
from noetherflow.equilibrium.orbit import FramedOrbit, Point
from noetherflow.equilibrium.potential import LegPair, Potential
from noetherflow.equilibrium.result import Equilibrium, Settled
from noetherflow.equilibrium.solve import classify, drives, imbalance
from noetherflow.equilibrium.start import Start
from noetherflow.equilibrium.task import TOLERANCE, Task
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

LEAST_NORM = Potential(norm=1.0, second=0.0, mean=0.0)


def stored_equilibrium(
    source: str | Path,
    model: nn.Module,
    syms: SymmetrySet,
    *,
    joint: bool = True,
    approximate: bool = False,
    key: str | None = None,
    prefix: str | None = None,
    max_iterations: int = 100,
    progress: Callable[[str], None] | None = None,
) -> Equilibrium:
    """`noise_equilibrium(..., objective="norm")` of a checkpoint on disk, without its weights in memory.

    The sums of squares that the answer depends on are taken tensor by tensor, and symmetries that share no parameter
    (those of different layers) are solved one group after the other. Tensors on which legs of several symmetries meet
    are read again in every sweep, the others once. So beside the group elements memory does not grow with the depth of
    the model, and the time is that of some passes over the files. The result holds no Grams.

    Args:
        source: the checkpoint (`read_checkpoint`).
        model: its model, which may be on the meta device.
        syms: its symmetries; those on frozen parameters are excluded.
        joint: all symmetries move together; `False`: each with the others held, one pass over the files.
        approximate: `True` moves symmetries too that a normalisation's eps makes approximate.
        key, prefix: see `load_checkpoint_`.
        max_iterations: sweeps at most.
        progress: called with the name of each tensor that is read.

    Returns:
        Where the norm of all moved parameters is least, for `balance_checkpoint`. It counts as converged at an
        imbalance of 1e-11, or a hundredth of the rounding of the stored dtype.

    Raises:
        CheckpointError: a checkpoint that is unreadable or not of this model.

    Source: theory.md section 5.
    """
    opened = open_checkpoint(source, key)
    names = match_names(model, opened.stored, opened.path, prefix, opened.adapter)
    shapes = {n: tuple(t.shape) for n, t in tensors_of(model).items()}
    weights = RenamedTensors(opened.stored, names.stored_names, names.parts, shapes)
    syms = syms.trainable(model)
    if not approximate:
        syms = syms.without({s.name: f"only approximate (eps {s.eps:g})" for s in syms if s.eps is not None})
    return _solved(weights, syms, _Reading(weights, progress or (lambda name: None)), joint, max_iterations)


@dataclass(frozen=True, eq=False)
class _Reading:
    """Stored weights as the groups see them, read when they are needed."""

    weights: Mapping[str, Tensor]
    progress: Callable[[str], None]

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
class StoredOrbit:
    """The orbit of stored weights under the norm: what legs share is read anew at every point.

    Attributes:
        symmetries: those that move.
        reading: the stored weights.
        own: the Grams of legs that meet no other, by symmetry and leg.
        shared: by parameter the legs that meet on it, as pairs of symmetry and leg.
    """

    symmetries: tuple[Symmetry, ...]
    reading: _Reading
    own: Mapping[tuple[int, int], Tensor]
    shared: Mapping[str, tuple[tuple[int, int], ...]]

    @property
    def potential(self) -> Potential:
        """The norm alone."""
        return LEAST_NORM

    def at(self, elements: Sequence[Tensor]) -> Point:
        """The Grams at a point of the orbit; the norm is that of the legs' entries."""
        grams = {place: self._scaled(place, gram, elements) for place, gram in self.own.items()}
        norm = sum(float(k.sum() if k.ndim == 1 else k.diagonal(dim1=-2, dim2=-1).sum()) for k in grams.values())
        for name, legs in self.shared.items():
            moves = [(self.symmetries[i], elements[i]) for i in dict.fromkeys(i for i, _ in legs)]
            asked = [(self.symmetries[i], self.symmetries[i].weight_legs[j]) for i, j in legs]
            sums = self.reading.moved(name, moves, asked)
            grams |= dict(zip(legs, sums.grams, strict=True))
            norm += sums.norm
        pairs: list[list[LegPair]] = [
            [(grams[i, j], torch.zeros_like(grams[i, j])) for j in range(len(s.weight_legs))]
            for i, s in enumerate(self.symmetries)
        ]
        return Point(pairs, norm, None)

    def _scaled(self, place: tuple[int, int], gram: Tensor, elements: Sequence[Tensor]) -> Tensor:
        symmetry, element = self.symmetries[place[0]], elements[place[0]]
        leg = symmetry.weight_legs[place[1]]
        if symmetry.is_torus:
            return gram * element ** (2 * leg.exponent)
        g = element if leg.sign > 0 else torch.linalg.inv(element).mT
        return g @ gram @ g.mT


def _orbit(symmetries: Sequence[Symmetry], grams: Mapping[tuple[str, int], Tensor], reading: _Reading) -> StoredOrbit:
    """The orbit, with the legs that meet others apart from those that do not."""
    shared = {
        name: places
        for name, places in _places(symmetries).items()
        if len(places) > 1 and _meeting(symmetries, places, reading.weights[name].shape)
    }
    inside = {place for places in shared.values() for place in places}
    own = {
        (i, j): grams[s.name, j]
        for i, s in enumerate(symmetries)
        for j in range(len(s.weight_legs))
        if (i, j) not in inside
    }
    return StoredOrbit(tuple(symmetries), reading, own, shared)


def _places(symmetries: Sequence[Symmetry]) -> dict[str, tuple[tuple[int, int], ...]]:
    """The legs on each parameter, as pairs of symmetry and leg."""
    out: dict[str, tuple[tuple[int, int], ...]] = {}
    for i, s in enumerate(symmetries):
        for j, leg in enumerate(s.weight_legs):
            out[leg.parameter] = (*out.get(leg.parameter, ()), (i, j))
    return out


def _touches(symmetries: Sequence[Symmetry], places: Sequence[tuple[int, int]], shape: Sequence[int]) -> float:
    """The largest `sum_legs |exponent|` over the entries of a parameter, or a little more: legs along the same axes
    meet where they choose the same row, legs along different axes always.
    """
    rows: dict[tuple[object, ...], np.ndarray] = {}
    for i, j in places:
        leg = symmetries[i].weight_legs[j]
        view = tuple(shape) if leg.view is None else leg.view
        axes = tuple(a % len(view) for a in leg.axes)
        here = rows.setdefault((view, axes), np.zeros(int(np.prod([view[a] for a in axes]))))
        here[leg.index.reshape(-1)] += abs(leg.exponent)
    return float(sum(r.max() for r in rows.values()))


def _meeting(symmetries: Sequence[Symmetry], places: Sequence[tuple[int, int]], shape: Sequence[int]) -> bool:
    largest = max(abs(symmetries[i].weight_legs[j].exponent) for i, j in places)
    return _touches(symmetries, places, shape) > largest


def _kappa(symmetries: Sequence[Symmetry], weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """How far steps are shortened so that all can be taken at once (`symmetry.overlap.stiffness`), per block."""
    largest = [0.0] * len(symmetries)
    for name, places in _places(symmetries).items():
        touches = _touches(symmetries, places, weights[name].shape)
        for i, _ in places:
            largest[i] = max(largest[i], touches)
    return tuple(torch.full((s.blocks,), k, dtype=torch.float64) for s, k in zip(symmetries, largest, strict=True))


@dataclass(frozen=True, eq=False)
class _Component:
    """The answer for symmetries that share parameters with one another, and with no others; large tensors of it are on
    the disk (`spilled`).
    """

    settled: tuple[Settled, ...]
    imbalance: float
    iterations: int
    evaluations: int
    converged: bool
    norm_now: float
    norm: float


def _components(syms: SymmetrySet, joint: bool) -> list[tuple[Symmetry, ...]]:
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


def _solved(
    weights: Mapping[str, Tensor], syms: SymmetrySet, reading: _Reading, joint: bool, max_iterations: int
) -> Equilibrium:
    eps = max((torch.finfo(weights[n].dtype).eps for n in syms.parameters), default=0.0)
    parts = [_component(own, weights, reading, eps, max_iterations) for own in _components(syms, joint)]
    by_name = {s.name: s for part in parts for s in part.settled}
    return Equilibrium(
        objective="norm",
        settled=tuple(by_name[s.name] for s in syms),
        imbalance_now=max((float(s.imbalance_now.max()) for s in by_name.values()), default=0.0),
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


def _component(
    symmetries: Sequence[Symmetry], weights: Mapping[str, Tensor], reading: _Reading, eps: float, max_iterations: int
) -> _Component:
    grams = {(s.name, j): reading.gram(s, leg) for s in symmetries for j, leg in enumerate(s.weight_legs)}
    starts = [_start(s, grams, eps) for s in symmetries]
    movers = tuple(s for s in starts if s.moves)
    moving = [s.symmetry for s in movers]
    frame = tuple(
        s.symmetry.identity() if isinstance(s.classes, TorusClasses) else gl_frame(s.classes, s.x, s.y, 1.0)
        for s in movers
    )
    orbit = FramedOrbit(_orbit(moving, grams, reading), frame)
    task = Task(movers, orbit, _kappa(moving, weights), max(TOLERANCE, 0.01 * eps), max_iterations)
    found = task.solve()
    elements, pairs = task.elements(found.logs), task.pairs(found)
    stretches = _stretches(symmetries, grams, weights, eps)
    settled = spilled_settled([_settled(s, elements, pairs, stretches) for s in starts])
    norm_now = orbit.orbit.at([s.identity() for s in moving]).norm
    return _Component(
        settled, found.imbalance, found.iterations, found.evaluations, found.converged, norm_now, found.point.norm
    )


def spilled_settled(settled: Sequence[Settled]) -> tuple[Settled, ...]:
    """The same with elements and charges on the disk, where they are large."""
    places = iter(spilled([t for s in settled for t in (s.element, s.charge_now, s.charge)]))
    return tuple(replace(s, element=next(places), charge_now=next(places), charge=next(places)) for s in settled)


def _start(symmetry: Symmetry, grams: Mapping[tuple[str, int], Tensor], eps: float) -> Start:
    """One symmetry at the stored weights."""
    pairs: list[LegPair] = [
        (k := grams[symmetry.name, j], torch.zeros_like(k)) for j in range(len(symmetry.weight_legs))
    ]
    x, y = drives(symmetry, pairs, LEAST_NORM)
    return Start(symmetry, pairs, x, y, classify(symmetry, x, y, _rank_tolerance([symmetry], eps)))


def _rank_tolerance(symmetries: Sequence[Symmetry], eps: float) -> float:
    """As `equilibrium.conditioning.rank_tolerance`, for the dtype in which the weights are stored."""
    n = max((s.dim for s in symmetries), default=1)
    return max(10 * n * min(eps, torch.finfo(torch.float32).eps), eps**2)


def _stretches(
    symmetries: Sequence[Symmetry], grams: Mapping[tuple[str, int], Tensor], weights: Mapping[str, Tensor], eps: float
) -> Stretches:
    limit = _rank_tolerance(symmetries, eps) ** -0.5
    found = {s.name: _stretch(s, grams, weights, eps) for s in symmetries if not s.is_torus}
    return Stretches(found, limit, limit)


def _stretch(
    symmetry: Symmetry, grams: Mapping[tuple[str, int], Tensor], weights: Mapping[str, Tensor], eps: float
) -> float:
    """`equilibrium.conditioning.stretch`, from the Grams alone where they tell; else the factors are read as a whole.

    Of dtypes so coarse that rounding hides every stretch (bf16, from 13 rows on) it is 1.
    """
    resolved = ROUNDING * symmetry.dim * eps
    if resolved >= 1:
        return 1.0
    found = 1.0
    for sign in (1, -1):
        own = [grams[symmetry.name, j] for j, leg in enumerate(symmetry.weight_legs) if leg.sign == sign]
        if own:
            squares = torch.linalg.eigvalsh(torch.stack(own).sum(0))
            if not bool((squares[:, 0] > max(1e-9, resolved**2) * squares[:, -1]).all()):
                return stretch(symmetry, weights)
            found = max(found, math.sqrt(float((squares[:, -1] / squares[:, 0]).max())))
    return found


def _settled(
    start: Start, elements: Mapping[str, Tensor], pairs: Mapping[str, list[LegPair]], stretches: Stretches
) -> Settled:
    s = start.symmetry
    verdict = start.verdict(True, stretches)
    there = pairs.get(s.name)
    left = None if there is None else imbalance(s, start.classes, *drives(s, there, LEAST_NORM))
    return Settled(
        name=s.name,
        family=s.family,
        kind=s.kind,
        element=elements.get(s.name, s.identity()),
        classification=verdict.classification,
        charge_now=start.charge,
        charge=start.charge if there is None else s.combine(tuple(k for k, _ in there)),
        weight_grams=(),
        noise_grams=(),
        imbalance_now=start.imbalance,
        imbalance=torch.zeros(s.blocks, dtype=torch.float64) if left is None else left,
        finite=verdict.finite,
        reason=verdict.reason,
        eps=s.eps,
    )
