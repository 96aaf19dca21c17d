"""How much one symmetry is violated: of outputs and of gradients, at a random element of the group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noetherflow.discovery.bench import Bench, Trial
from noetherflow.discovery.copies import eps_scaled, eps_settings
from noetherflow.discovery.survey import Baseline, Gradients, Item, Survey, relative, violation, without_effect
from noetherflow.symmetry.symmetry import Symmetry

EPS_FACTORS = (1e-2, 0.0)
"""What the eps of normalisations is multiplied by to see whether it explains a violation."""
LEAST_FACTOR = 1e-9
"""In place of 0 where a normalisation does not take an eps of 0 (one with batch statistics)."""
ROUNDING = 1e-15
"""Relative change of weights by which rounding errors are measured."""


@dataclass(frozen=True)
class Violations:
    """How far one symmetry is from holding; every number is relative and the worst over trials.

    Attributes:
        outputs: change of the outputs.
        covariance: per-sample gradients at the moved point against the predicted ones.
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


def violations(item: Item, bench: Bench, looks: Survey, spread: float, seed: int) -> Violations:
    """Apply one random element of a symmetry, and look at the gradients of all baselines.

    Args:
        item: the symmetry or translation.
        bench: the copy of the model, back in its own state afterwards.
        looks: the baselines.
        spread: deviation of the entries of the random generator.
        seed: of the random generator.
    """
    example = looks.near[0]
    return Violations(
        outputs=output_violation(item, bench, looks.near, spread, seed),
        covariance=_covariance(item, bench, example, spread, seed),
        loss=violation(item, bench, [example]),
        conserved=violation(item, bench, [*looks.near[1:], *looks.far]),
        training=violation(item, bench, looks.training) if looks.training else None,
        without_effect=without_effect(item, bench, [*looks.near, *looks.far, *looks.training]),
    )


def output_violation(item: Item, bench: Bench, baselines: Sequence[Baseline], spread: float, seed: int) -> float:
    """The largest relative change of the outputs over some baselines at one random element."""
    return max(relative(bench.outputs(_moved(item, bench, b.trial, spread, seed)[0]), b.outputs) for b in baselines)


def act(item: Item, tensors: Mapping[str, Tensor], spread: float, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A random element of the group (or shift), applied: the moved tensors by name, and the element."""
    rng = torch.Generator("cpu").manual_seed(seed)
    here = {n: t.detach() for n, t in tensors.items()}
    if isinstance(item, Symmetry):
        element = item.random_element(spread, rng)
    else:
        columns = item.leg.unfold(here[item.leg.parameter]).shape[-1]
        element = torch.randn(item.leg.blocks, columns, dtype=torch.float64, generator=rng, device="cpu")
    return item.act(here, element), element


def _moved(item: Item, bench: Bench, trial: Trial, spread: float, seed: int) -> tuple[Trial, Tensor]:
    """The trial with a symmetry applied to its weights, and the group element."""
    values, element = act(item, {**bench.tensors, **trial.weights}, spread, seed)
    return replace(trial, weights={**trial.weights, **values}), element


def _covariance(item: Item, bench: Bench, example: Baseline, spread: float, seed: int) -> float:
    """How far per-sample gradients at a moved point are from the ones that the group predicts, over all parameters and
    over those of the symmetry.
    """
    if not example.gradients or not set(item.parameters) <= bench.parameters.keys():
        return 0.0
    trial, element = _moved(item, bench, example.trial, spread, seed)
    worst = 0.0
    for before, after in zip(example.gradients, bench.gradients(trial), strict=True):
        known = {n: g for n, g in before.items() if n in item.parameters}
        predicted = {**before, **(item.act_on_gradients(known, element) if isinstance(item, Symmetry) else {})}
        total = _norm(predicted, before)
        for names in (before.keys(), known.keys()):
            scale = _norm(predicted, names)
            if scale > 1e-9 * total:
                worst = max(worst, _norm({n: after[n] - predicted[n] for n in names}, names) / scale)
    return worst


def _norm(tensors: Mapping[str, Tensor], names: Iterable[str]) -> float:
    return math.sqrt(sum(float(tensors[n].square().sum()) for n in names))


@dataclass(frozen=True, eq=False)
class EpsLevel:
    """The baselines of a survey with the eps of every normalisation multiplied by `factor`."""

    factor: float
    near: tuple[Baseline, ...]
    far: tuple[Baseline, ...]


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
    def again(baselines: Sequence[Baseline]) -> tuple[Baseline, ...]:
        return tuple(Baseline(b.trial, bench.outputs(b.trial), bench.gradients(b.trial)) for b in baselines)

    try:
        with eps_scaled(eps_settings(bench.model), factor):
            level = EpsLevel(factor, again(looks.near), again(looks.far))
    except (RuntimeError, ValueError):
        return None
    return level if all(bool(torch.isfinite(b.outputs).all()) for b in level.near) else None


@dataclass(frozen=True)
class EpsSize:
    """What is left of a violation when eps is multiplied by a factor: of the outputs, and of `theta^T A g`."""

    factor: float
    outputs: float
    conserved: float


def eps_sizes(item: Item, bench: Bench, levels: Sequence[EpsLevel], spread: float, seed: int) -> tuple[EpsSize, ...]:
    """The violation of one symmetry at each level of eps."""
    sizes = []
    for level in levels:
        with eps_scaled(eps_settings(bench.model), level.factor):
            outputs = output_violation(item, bench, level.near, spread, seed)
        finite = [b for b in (*level.near, *level.far) if _finite(b.gradients)]
        if math.isfinite(outputs):
            sizes.append(EpsSize(level.factor, outputs, violation(item, bench, finite)))
    return tuple(sizes)


def _finite(gradients: Gradients) -> bool:
    return all(bool(torch.isfinite(g).all()) for row in gradients for g in row.values())


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
