"""Equilibria without gradients of a checkpoint on disk: tensors are read one after the other, no model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.balance.stored_levels import level_part
from noetherflow.balance.stored_parts import StoredPart, StoredReading, components, joined, spilled_settled
from noetherflow.equilibrium.blocks import TorusClasses, gl_frame
from noetherflow.equilibrium.conditioning import ROUNDING, Stretches, stretch
from noetherflow.equilibrium.levels import TOLERANCE as LEVEL_TOLERANCE
from noetherflow.equilibrium.objective import AnyObjective, LevelObjective, objective_of
from noetherflow.equilibrium.orbit import FramedOrbit, Point
from noetherflow.equilibrium.potential import LegPair, Potential
from noetherflow.equilibrium.result import Equilibrium, Settled
from noetherflow.equilibrium.solve import StepLimits, classify, drives, imbalance
from noetherflow.equilibrium.start import Start
from noetherflow.equilibrium.task import TOLERANCE, Task
from noetherflow.errors import DataError
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

LEAST_NORM = Potential(norm=1.0, second=0.0, mean=0.0)


def stored_equilibrium(
    source: str | Path,
    model: nn.Module,
    syms: SymmetrySet,
    *,
    objective: str | AnyObjective = "norm",
    joint: bool = True,
    approximate: bool = False,
    key: str | None = None,
    prefix: str | None = None,
    max_iterations: int = 100,
    progress: Callable[[str], None] | None = None,
) -> Equilibrium:
    """`noise_equilibrium` of a checkpoint on disk without its weights in memory, for objectives without gradients.

    The sums of squares or the levels that the answer depends on are taken from pieces of one tensor after the other,
    and symmetries that share no parameter (those of different layers) are solved one group after the other. Tensors on
    which legs of several symmetries meet are read again in every sweep. What is kept of a group, its elements and
    charges, waits in a temporary file, but for some small vectors. The result holds no Grams.

    Args:
        source: the checkpoint (`read_checkpoint`).
        model: its model, which may be on the meta device.
        syms: its symmetries; those on frozen parameters are excluded.
        objective: `norm`, `range`, or another that needs no gradients (`nf.extend.level_objective`).
        joint: all symmetries move together; `False`: each with the others held (`range`: a single pass over all).
        approximate: `True` moves symmetries too that a normalisation's eps makes approximate.
        key, prefix: see `load_checkpoint_`.
        max_iterations: sweeps at most.
        progress: called with the name of each tensor that is read.

    Returns:
        The point asked for, for `balance_checkpoint`: with `norm`, where the norm of all moved parameters is least,
        converged at an imbalance of 1e-11, or a hundredth of the rounding of the stored dtype.

    Raises:
        CheckpointError: a checkpoint that is unreadable or not of this model.
        DataError: an objective that needs gradients, or one that is unknown.

    Source: theory.md section 5.
    """
    chosen = objective_of(objective)
    if chosen.moments != "none":
        raise DataError(
            f"objective {chosen.name!r} needs gradients, which a file alone does not give: load the model, measure "
            "(nf.gradient_moments) and solve with nf.noise_equilibrium; norm and range need none"
        )
    reading = StoredReading.of(source, model, key=key, prefix=prefix, progress=progress)
    syms = syms.trainable(model)
    if not approximate:
        syms = syms.without({s.name: f"only approximate (eps {s.eps:g})" for s in syms if s.eps is not None})
    eps = max((reading.eps.get(n, 0.0) for n in syms.parameters), default=0.0)
    if isinstance(chosen, LevelObjective):
        tolerance, passes = max(LEVEL_TOLERANCE, 0.01 * eps), max_iterations if joint else 1
        levels = [level_part(own, reading, chosen, tolerance, passes) for own in components(syms, True)]
        return joined([replace(p, converged=p.converged or not joint) for p in levels], syms, chosen.name, joint)
    parts = [_norm_part(own, reading, eps, max_iterations) for own in components(syms, joint)]
    return joined(parts, syms, chosen.name, joint)


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
    reading: StoredReading
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


def _orbit(
    symmetries: Sequence[Symmetry], grams: Mapping[tuple[str, int], Tensor], reading: StoredReading
) -> StoredOrbit:
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


def _limits(symmetries: Sequence[Symmetry], weights: Mapping[str, Tensor]) -> StepLimits:
    alone = tuple(_kappa([s], weights)[0] for s in symmetries)
    return StepLimits(alone, _kappa(symmetries, weights))


def _kappa(symmetries: Sequence[Symmetry], weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """How far steps are shortened so that all can be taken at once (`symmetry.overlap.stiffness`), per block."""
    largest = [0.0] * len(symmetries)
    for name, places in _places(symmetries).items():
        touches = _touches(symmetries, places, weights[name].shape)
        for i, _ in places:
            largest[i] = max(largest[i], touches)
    return tuple(torch.full((s.blocks,), k, dtype=torch.float64) for s, k in zip(symmetries, largest, strict=True))


def _norm_part(symmetries: Sequence[Symmetry], reading: StoredReading, eps: float, max_iterations: int) -> StoredPart:
    """The least norm over symmetries that share parameters."""
    weights = reading.weights
    grams = {(s.name, j): reading.gram(s, leg) for s in symmetries for j, leg in enumerate(s.weight_legs)}
    starts = [_start(s, grams, eps) for s in symmetries]
    movers = tuple(s for s in starts if s.moves)
    moving = [s.symmetry for s in movers]
    frame = tuple(
        s.symmetry.identity() if isinstance(s.classes, TorusClasses) else gl_frame(s.classes, s.x, s.y, 1.0)
        for s in movers
    )
    orbit = FramedOrbit(_orbit(moving, grams, reading), frame)
    task = Task(movers, orbit, _limits(moving, weights), max(TOLERANCE, 0.01 * eps), max_iterations)
    found = task.solve()
    elements, pairs = task.elements(found.logs), task.pairs(found)
    stretches = _stretches(symmetries, grams, weights, eps)
    settled = spilled_settled([_settled(s, elements, pairs, stretches) for s in starts])
    norm_now = orbit.orbit.at([s.identity() for s in moving]).norm
    imbalance_now = max(float(s.imbalance_now.max()) for s in settled)
    return StoredPart(
        settled, imbalance_now, found.imbalance, found.iterations, found.evaluations, found.converged, norm_now,
        found.point.norm,
    )  # fmt: skip


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
