"""How much one symmetry is violated: of outputs and of gradients, at a random element of the group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noetherflow.discovery.bench import Bench, Trial
from noetherflow.discovery.copies import eps_scaled, eps_settings
from noetherflow.discovery.survey import Baseline, Item, Obedience, Survey, relative
from noetherflow.symmetry.symmetry import Symmetry

EPS_FACTORS = (1e-2, 0.0)
"""What the eps of normalisations is multiplied by to see whether it explains a violation."""
LEAST_FACTOR = 1e-9
"""In place of 0 where a normalisation does not take an eps of 0 (one with batch statistics)."""
MOST_MOVES = 48
"""Symmetries beyond this number are applied in groups, which bounds the cost by this many runs of the model."""
ROUNDING = 1e-15
"""Relative change of weights by which rounding errors are measured."""


@dataclass(frozen=True)
class Violations:
    """How far one symmetry is from holding; every number is relative and the worst over trials.

    Attributes:
        outputs: change of the outputs; NaN where they are no finite numbers at the moved weights.
        covariance: per-sample gradients at the moved point against the predicted ones; NaN likewise.
        loss: `theta^T A g` of the example, with the user's loss where there is one.
        conserved: `theta^T A g` in all trials with random projections of the outputs.
        training: the same in training mode, None where the model does not run in it.
        without_effect: coordinates with a leg that the outputs never depended on.
    """

    outputs: float
    covariance: float
    loss: float
    conserved: float
    training: float | None
    without_effect: int


@dataclass(frozen=True, eq=False)
class Move:
    """Random elements of some symmetries, to be applied one after the other.

    Attributes:
        items: the symmetries and translations.
        seeds: of the element of each.
        spread: deviation of the entries of the random generators.
    """

    items: tuple[Item, ...]
    seeds: tuple[int, ...]
    spread: float

    def act(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """The moved tensors by name, and the group elements."""
        moved: dict[str, Tensor] = {}
        elements = []
        for item, seed in zip(self.items, self.seeds, strict=True):
            here = {n: moved.get(n, t).detach() for n, t in tensors.items()}
            element = _element(item, here, self.spread, torch.Generator("cpu").manual_seed(seed))
            moved.update(item.act(here, element))
            elements.append(element)
        return moved, tuple(elements)

    def predict(self, gradients: Mapping[str, Tensor], elements: Sequence[Tensor]) -> dict[str, Tensor]:
        """What gradients become at the moved point; translations leave them as they are."""
        predicted = dict(gradients)
        for item, element in zip(self.items, elements, strict=True):
            if isinstance(item, Symmetry):
                predicted.update(item.act_on_gradients({n: predicted[n] for n in item.parameters}, element))
        return predicted

    @property
    def parameters(self) -> frozenset[str]:
        """Names of all parameters that carry a charge of some of the symmetries."""
        return frozenset(n for item in self.items for n in item.parameters)


def _element(item: Item, tensors: Mapping[str, Tensor], spread: float, rng: torch.Generator) -> Tensor:
    if isinstance(item, Symmetry):
        return item.random_element(spread, rng)
    columns = item.leg.unfold(tensors[item.leg.parameter]).shape[-1]
    return torch.randn(item.leg.blocks, columns, dtype=torch.float64, generator=rng, device="cpu")


def moves(items: Sequence[Item], spread: float, seed: int) -> list[Move]:
    """Every symmetry by itself, or in groups that are applied together where there are many.

    A group that leaves outputs and gradients as they must be proves each of its symmetries: random errors of two wrong
    ones do not cancel. Symmetries that hold up to eps only are never grouped, nor are those with a parameter in common
    with another of the group, so that the errors of one are not hidden behind the size of another.
    """
    seeded = [(item, seed + k) for k, item in enumerate(items)]
    if len(items) <= MOST_MOVES:
        return [Move((item,), (number,), spread) for item, number in seeded]
    size = -(-len(items) // MOST_MOVES)
    groups: list[list[tuple[Item, int]]] = []
    for item, number in seeded:
        alone = isinstance(item, Symmetry) and item.eps is not None
        open_groups = [] if alone else [g for g in groups if _may_join(item, g, size)]
        if open_groups:
            open_groups[0].append((item, number))
        else:
            groups.append([(item, number)])
    return [Move(tuple(i for i, _ in g), tuple(n for _, n in g), spread) for g in groups]


def _may_join(item: Item, group: Sequence[tuple[Item, int]], size: int) -> bool:
    taken = {n for other, _ in group for n in other.parameters}
    approximate = any(isinstance(other, Symmetry) and other.eps is not None for other, _ in group)
    return len(group) < size and not approximate and not taken.intersection(item.parameters)


@dataclass(frozen=True)
class MoveEffect:
    """What a move changed: outputs, and gradients against the prediction; relative, the worst over trials."""

    outputs: float
    covariance: float


def effect_of(move: Move, bench: Bench, looks: Survey) -> MoveEffect:
    """Apply a move in all trials near the example; the bench is back in its own state afterwards."""
    return MoveEffect(output_violation(move, bench, looks.near), _covariance(move, bench, looks.near[0]))


def violations(item: Item, effect: MoveEffect, looks: Survey) -> Violations:
    """The effect of a symmetry's move together with what the gradients of all baselines say about it."""
    example = Obedience.of(item, looks.near[:1])
    drawn = Obedience.of(item, (*looks.near[1:], *looks.far))
    training = Obedience.of(item, looks.training)
    effective = example.effective | drawn.effective | training.effective
    return Violations(
        outputs=effect.outputs,
        covariance=effect.covariance,
        loss=example.violation,
        conserved=drawn.violation,
        training=training.violation if looks.training else None,
        without_effect=int((~effective).sum()),
    )


def output_violation(move: Move, bench: Bench, baselines: Sequence[Baseline]) -> float:
    """The largest relative change of the outputs over some baselines, NaN where one is no finite number."""
    changes = [relative(bench.outputs(_moved(move, b)[0]), b.outputs) for b in baselines]
    return math.nan if any(math.isnan(c) for c in changes) else max(changes)


def _moved(move: Move, baseline: Baseline) -> tuple[Trial, tuple[Tensor, ...]]:
    """The trial of a baseline with a move applied to its weights, and the group elements."""
    values, elements = move.act(baseline.weights)
    return replace(baseline.trial, weights={**baseline.trial.weights, **values}), elements


def _covariance(move: Move, bench: Bench, example: Baseline) -> float:
    """How far per-sample gradients at a moved point are from the ones that the group predicts, over all parameters and
    over those of the moved symmetries.
    """
    if not example.gradients or not move.parameters <= example.gradients[0].keys():
        return 0.0
    trial, elements = _moved(move, example)
    worst = 0.0
    for before, after in zip(example.gradients, bench.gradients(trial), strict=True):
        predicted = move.predict(before, elements)
        total = _norm(predicted, predicted)
        for names in (predicted.keys(), move.parameters):
            scale = _norm(predicted, names)
            off = _norm({n: after[n] - predicted[n] for n in names}, names)
            if not math.isfinite(off + total):
                return math.nan
            if scale > 1e-9 * total:
                worst = max(worst, off / scale)
    return worst


def _norm(tensors: Mapping[str, Tensor], names: Iterable[str]) -> float:
    return math.sqrt(sum(float(tensors[n].square().sum()) for n in names))


@dataclass(frozen=True, eq=False)
class EpsLevel:
    """The baselines of a survey with the eps of every normalisation multiplied by `factor`."""

    factor: float
    near: tuple[Baseline, ...]
    far: tuple[Baseline, ...]
    training: tuple[Baseline, ...]


def eps_levels(bench: Bench, looks: Survey) -> tuple[EpsLevel, ...]:
    """Run a survey's trials again with smaller eps; a level at which outputs are not finite is left out."""
    found = []
    for factor in EPS_FACTORS:
        for tried in (factor, LEAST_FACTOR) if factor == 0 else (factor,):
            level = _at_eps(bench, looks, tried)
            if level is not None:
                found.append(level)
                break
    return tuple(found)


def _at_eps(bench: Bench, looks: Survey, factor: float) -> EpsLevel | None:
    try:
        with eps_scaled(eps_settings(bench.model), factor):
            near = tuple(Baseline.of(bench, b.trial) for b in looks.near)
            far = tuple(Baseline.of(bench, b.trial) for b in looks.far)
        with eps_scaled(eps_settings(bench.model), max(factor, LEAST_FACTOR)):
            training = tuple(Baseline.of(bench, b.trial) for b in looks.training)
    except (RuntimeError, ValueError):
        return None
    if not all(bool(torch.isfinite(b.outputs).all()) for b in near):
        return None
    return EpsLevel(factor, near, tuple(b for b in far if b.finite), tuple(b for b in training if b.finite))


@dataclass(frozen=True)
class EpsSize:
    """What is left of a violation when eps is multiplied by a factor.

    Attributes:
        factor: what eps was multiplied by.
        outputs: change of the outputs.
        conserved: `theta^T A g` in evaluation mode.
        training: the same in training mode.
    """

    factor: float
    outputs: float
    conserved: float
    training: float


def eps_sizes(move: Move, bench: Bench, levels: Sequence[EpsLevel]) -> tuple[EpsSize, ...]:
    """The violation of one symmetry at each level of eps."""
    sizes = []
    for level in levels:
        with eps_scaled(eps_settings(bench.model), level.factor):
            outputs = output_violation(move, bench, level.near)
        if math.isfinite(outputs):
            item, near = move.items[0], [b for b in level.near if b.finite]
            evaluation = Obedience.of(item, [*near, *level.far]).violation
            sizes.append(EpsSize(level.factor, outputs, evaluation, Obedience.of(item, level.training).violation))
    return tuple(sizes)


def rounding(bench: Bench, looks: Survey) -> float:
    """How much outputs change when weights change by the least that float64 can tell: the noise of any comparison."""
    rng = torch.Generator("cpu").manual_seed(0)
    worst = 0.0
    for b in looks.near:
        weights = {n: b.trial.weights.get(n, t).detach() for n, t in bench.parameters.items()}
        noise = lambda w: 1 + ROUNDING * torch.randn(w.shape, dtype=torch.float64, generator=rng, device="cpu").to(w)
        nudged = {**b.trial.weights, **{n: w * noise(w) for n, w in weights.items()}}
        worst = max(worst, relative(bench.outputs(replace(b.trial, weights=nudged)), b.outputs))
    return worst
