"""Where a certificate looks: the example, weights and inputs near it, and weights in general position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from noetherflow.core.inputs import LossFn, ModelInputs
from noetherflow.discovery.bench import Bench, SampleLoss, Trial
from noetherflow.discovery.draws import (
    jittered_weights,
    padding_kept,
    random_inputs,
    redrawn_statistics,
    redrawn_weights,
)
from noetherflow.errors import DataError
from noetherflow.symmetry.conservation import conservation
from noetherflow.symmetry.symmetry import Symmetry, Translation

REDRAWN, MOST_REDRAWN = 1, 6
"""Draws of weights in general position: at least, and at most while some leg is still without effect."""
FLOOR = 1e-5
"""Coordinates below this fraction of an average parameter's `sum |theta| |g|` are judged against it."""

Item = Symmetry | Translation
Gradients = tuple[dict[str, Tensor], ...]


@dataclass(frozen=True, eq=False)
class Baseline:
    """What the model gives in one trial before anything is moved.

    Attributes:
        trial: weights and inputs.
        outputs: as one vector.
        weights: all tensors of the model in this trial, by name.
        gradients: of the first samples, by parameter.
        floors: for each of these, what sizes of coordinates are not judged below.
    """

    trial: Trial
    outputs: Tensor
    weights: Mapping[str, Tensor]
    gradients: Gradients
    floors: tuple[float, ...]

    @classmethod
    def of(cls, bench: Bench, trial: Trial) -> Baseline:
        """Run the bench in a trial, once for outputs and once for gradients."""
        weights = {**bench.tensors, **trial.weights}
        gradients = bench.gradients(trial)
        return cls(trial, bench.outputs(trial), weights, gradients, tuple(_floor(weights, g) for g in gradients))

    @property
    def finite(self) -> bool:
        """Whether outputs and gradients are."""
        tensors = [self.outputs, *(g for row in self.gradients for g in row.values())]
        return all(bool(torch.isfinite(t).all()) for t in tensors)


def _floor(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> float:
    sizes = [float((weights[n].detach() * g).abs().sum()) for n, g in gradients.items()]
    return FLOOR * sum(sizes) / max(1, sum(size > 0 for size in sizes))


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
    example = Baseline.of(bench, Trial(inputs, own))
    if not bool(torch.isfinite(example.outputs).all()):
        raise DataError("the model's outputs on the example inputs are not finite; certify needs finite outputs")
    kept = partial(padding_kept, bench.model, bench.tensors)
    near = [example]
    for _ in range(looks.trials - 1):
        trial = Trial(random_inputs(inputs, rng), projected)
        statistics = redrawn_statistics(bench.model, bench.tensors, rng)
        jittered = replace(trial, weights={**kept(jittered_weights(movable, rng)), **statistics})
        near += _first_that_runs(bench, [jittered, trial])[:1]
    far: list[Baseline] = []
    while len(far) < REDRAWN or (len(far) < MOST_REDRAWN and without_effect(items, [*near, *far])):
        weights = {**kept(redrawn_weights(movable, rng)), **redrawn_statistics(bench.model, bench.tensors, rng)}
        trial = Trial(random_inputs(inputs, rng), projected, weights, draws=1 + len(far))
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
    """`|a - b| / |b|`, infinite where only `b` vanishes, NaN where the difference is no finite number.

    Example:
        >>> relative(torch.tensor([1.0, 1.5]), torch.tensor([1.0, 1.0])) < 0.5
        True
    """
    if a.shape != b.shape:
        return math.inf
    scale = float(torch.linalg.vector_norm(b))
    difference = float(torch.linalg.vector_norm(a - b))
    if not math.isfinite(difference):
        return math.nan
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


def _first_that_runs(bench: Bench, trials: Sequence[Trial]) -> list[Baseline]:
    """The baseline of the first trial with finite outputs and gradients, in a list; empty where there is none.

    Drawn weights and inputs may leave the domain of a model (the logarithm of a negative weight, an assertion about the
    inputs), and some models do not run in training mode (batch statistics of one sample).
    """
    for trial in trials:
        try:
            found = Baseline.of(bench, trial)
        except DataError:
            raise
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError, ArithmeticError):
            continue
        if found.finite:
            return [found]
    return []


@dataclass(frozen=True, eq=False)
class Obedience:
    """What the gradients of some baselines say about one symmetry.

    Attributes:
        violation: the largest `|theta^T A g|` over generators, samples and baselines, relative to `sum |theta| |g|`.
        effective: for each coordinate (block), whether the outputs depended on each of its legs in some baseline.
    """

    violation: float
    effective: Tensor

    @classmethod
    def of(cls, item: Item, baselines: Sequence[Baseline]) -> Obedience:
        """Look at every gradient of some baselines.

        A leg has an effect where some product of a weight and its gradient is not exactly zero, which it is for dead
        units, inputs of zeros and weights of zero. Where a gradient cancels (a key's bias in front of a softmax),
        rounding leaves a trace. For a translation, whose very claim is that the leg has no effect, it is enough that
        the model has gradients.
        """
        blocks = item.blocks if isinstance(item, Symmetry) else item.leg.blocks
        legs = len(item.weight_legs) if isinstance(item, Symmetry) else 1
        worst, seen = 0.0, torch.zeros(legs, blocks, dtype=torch.bool, device="cpu")
        for baseline in baselines:
            if not baseline.gradients or not baseline.gradients[0].keys() >= set(item.parameters):
                continue
            for gradients, floor in zip(baseline.gradients, baseline.floors, strict=True):
                found = conservation(item, baseline.weights, gradients)
                worst = max(worst, found.violation(floor))
                alive = torch.stack(found.legs).cpu() > 0
                seen |= alive if isinstance(item, Symmetry) else torch.full_like(seen, floor > 0)
        return cls(worst, seen.all(0))


def without_effect(items: Sequence[Item], baselines: Sequence[Baseline]) -> bool:
    """Whether some symmetry has a leg on which the outputs did not depend in any of the baselines."""
    return not all(bool(Obedience.of(item, baselines).effective.all()) for item in items)
