"""Where a certificate looks: the example, weights and inputs near it, and weights in general position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from noetherflow.core.inputs import LossFn, ModelInputs
from noetherflow.discovery.bench import Bench, SampleLoss, Trial
from noetherflow.discovery.draws import jittered_weights, random_inputs, redrawn_statistics, redrawn_weights
from noetherflow.errors import DataError
from noetherflow.symmetry.conservation import Conservation, conservation
from noetherflow.symmetry.symmetry import Symmetry, Translation

REDRAWN, MOST_REDRAWN = 1, 6
"""Draws of weights in general position: at least, and at most while some leg is still without effect."""
FLOOR = 1e-5
"""Coordinates below this fraction of an average parameter's `sum |theta| |g|` are judged against it."""

Item = Symmetry | Translation
Gradients = tuple[dict[str, Tensor], ...]


@dataclass(frozen=True, eq=False)
class Baseline:
    """What the model gives in one trial before anything is moved."""

    trial: Trial
    outputs: Tensor
    gradients: Gradients


@dataclass(frozen=True, eq=False)
class Survey:
    """Baselines of one model.

    Attributes:
        near: the example, and random inputs with weights near the model's. Symmetries are applied in these.
        far: weights drawn anew, where only gradients are looked at.
        training: the same in training mode; empty where the model does not run in it.
        unsteady: relative difference of the outputs of two equal calls, 0 unless the forward depends on something
            outside the model.
        random: whether the forward draws random numbers.
    """

    near: tuple[Baseline, ...]
    far: tuple[Baseline, ...]
    training: tuple[Baseline, ...]
    unsteady: float
    random: bool


@dataclass(frozen=True, eq=False)
class Looks:
    """What the user asked of a certificate: the loss and how much to look at."""

    loss_fn: LossFn | None
    batch: Any
    trials: int
    samples: int
    spread: float
    seed: int


def survey(bench: Bench, example_inputs: Any, looks: Looks, items: Sequence[Item], trainable: Sequence[str]) -> Survey:
    """Run the bench in every trial a certificate needs.

    Args:
        bench: the copy of the model.
        example_inputs: as the user gave them, in float64.
        looks: number of trials and samples, loss.
        items: the symmetries to certify; weights are drawn until each of their legs has an effect.
        trainable: names of parameters that training changes; these and the legs of `items` are drawn anew.

    Raises:
        DataError: outputs on the example are not finite.
    """
    rng = torch.Generator("cpu").manual_seed(looks.seed)
    inputs = ModelInputs.of(example_inputs)
    own = SampleLoss(looks.loss_fn, example_inputs if looks.batch is None else looks.batch, looks.samples)
    projected = SampleLoss(None, None, looks.samples)
    free = {n for item in items for n in item.parameters} | set(trainable)
    movable = {n: t for n, t in bench.parameters.items() if n in free}
    example = _baseline(bench, Trial(inputs, own))
    if not bool(torch.isfinite(example.outputs).all()):
        raise DataError("the model's outputs on the example inputs are not finite; certify needs finite outputs")
    near = [example]
    for _ in range(looks.trials - 1):
        trial = Trial(random_inputs(inputs, rng), projected)
        statistics = redrawn_statistics(bench.model, bench.tensors, rng)
        jittered = replace(trial, weights={**jittered_weights(movable, rng), **statistics})
        near += _first_that_runs(bench, [jittered, trial])[:1]
    far: list[Baseline] = []
    while len(far) < REDRAWN or (len(far) < MOST_REDRAWN and not all(_alive(i, bench, [*near, *far]) for i in items)):
        weights = {**redrawn_weights(movable, rng), **redrawn_statistics(bench.model, bench.tensors, rng)}
        trial = Trial(random_inputs(inputs, rng), projected, weights)
        found = _first_that_runs(bench, [trial, replace(trial, inputs=inputs)])
        if not found:
            break
        far += found
    training = [replace(b.trial, training=True) for b in (example, *far[:1])]
    return Survey(
        near=tuple(near),
        far=tuple(far),
        training=tuple(b for t in training for b in _first_that_runs(bench, [t])),
        unsteady=relative(bench.outputs(example.trial), example.outputs),
        random=not torch.equal(bench.outputs(replace(example.trial, draws=1)), example.outputs),
    )


def relative(a: Tensor, b: Tensor) -> float:
    """`|a - b| / |b|`, infinite where only `b` vanishes.

    Example:
        >>> relative(torch.tensor([1.0, 1.5]), torch.tensor([1.0, 1.0])) < 0.5
        True
    """
    if a.shape != b.shape:
        return math.inf
    scale = float(torch.linalg.vector_norm(b))
    difference = float(torch.linalg.vector_norm(a - b))
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


def _baseline(bench: Bench, trial: Trial) -> Baseline:
    return Baseline(trial, bench.outputs(trial), bench.gradients(trial))


def _first_that_runs(bench: Bench, trials: Sequence[Trial]) -> list[Baseline]:
    """The baseline of the first trial with finite outputs and gradients, in a list; empty where there is none.

    Drawn weights and inputs may leave the domain of a model (the logarithm of a negative weight, an assertion about the
    inputs), and some models do not run in training mode (batch statistics of one sample).
    """
    for trial in trials:
        try:
            found = _baseline(bench, trial)
        except DataError:
            raise
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError, ArithmeticError):
            continue
        tensors = [found.outputs, *(g for row in found.gradients for g in row.values())]
        if all(bool(torch.isfinite(t).all()) for t in tensors):
            return [found]
    return []


def conservations(item: Item, bench: Bench, baselines: Sequence[Baseline]) -> list[tuple[Conservation, float]]:
    """What every gradient of some baselines says about a symmetry, each with the floor of its sizes."""
    if not set(item.parameters) <= bench.parameters.keys():
        return []
    found = []
    for baseline in baselines:
        weights = {**bench.tensors, **baseline.trial.weights}
        found += [(conservation(item, weights, g), _floor(weights, g)) for g in baseline.gradients]
    return found


def _floor(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> float:
    sizes = [float((weights[n].detach() * g).abs().sum()) for n, g in gradients.items()]
    return FLOOR * sum(sizes) / max(1, sum(size > 0 for size in sizes))


def violation(item: Item, bench: Bench, baselines: Sequence[Baseline]) -> float:
    """The largest `|theta^T A g|` over generators, samples and baselines, relative to `sum |theta| |g|`."""
    return max((c.violation(floor) for c, floor in conservations(item, bench, baselines)), default=0.0)


def without_effect(item: Item, bench: Bench, baselines: Sequence[Baseline]) -> int:
    """How many coordinates (blocks) have a leg on which the outputs did not depend in any baseline.

    A leg counts as without effect where each product of a weight and its gradient is exactly zero: dead units, inputs
    of zeros, weights of zero. Where a gradient cancels (a key's bias in front of a softmax), rounding leaves a trace.
    For a translation, whose very claim is that the leg has no effect, the model as a whole must have gradients.
    """
    found = conservations(item, bench, baselines)
    if isinstance(item, Translation):
        return 0 if any(floor > 0 for _, floor in found) or not found else item.leg.blocks
    if not found:
        return 0
    alive = [torch.stack(legs).amax(0) > 0 for legs in zip(*(c.legs for c, _ in found), strict=True)]
    return int((~torch.stack(alive).all(0)).sum())


def _alive(item: Item, bench: Bench, baselines: Sequence[Baseline]) -> bool:
    return without_effect(item, bench, baselines) == 0
