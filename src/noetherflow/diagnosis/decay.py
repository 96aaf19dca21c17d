"""What weight decay took in a run, from its log, and whether that is too much."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from noetherflow.diagnosis.facts import ACTS, LossCourse
from noetherflow.diagnosis.finding import Evidence, Finding, in_steps
from noetherflow.monitor.rundata import RunData, weights_of


def decays_of(data: RunData) -> list[float]:
    """What decay took of each family's charge per step, on average over all steps made.

    The entries on the charges have a slope in proportion to the learning rate, whose mean over the steps weighs it.
    With momentum the entry is the first touch of a step's decay; its memory carries on to `1 / (1 - m)` of it. NaN
    where there is decay that no entry shows, or that Adam divides by its own average. Without any watched symmetry,
    what the settings of SGD say.
    """
    decaying = [group for group in data.header.get("groups", ()) if group.get("weight_decay")]
    memory = 1 - float(data.header.get("momentum") or 0.0)
    lr = np.where(np.isfinite(data.lr), data.lr, 1.0)
    weights = weights_of(data.steps)
    rate = mean_rate(data.steps, lr, data.steps_made)
    if not data.families and data.header.get("rule") == "SGDRule":
        return [2 * rate * float(g["weight_decay"]) / (1 - float(g.get("momentum", 0.0))) for g in decaying]
    shares, pace = [], lr / rate if rate > 0 else np.zeros_like(lr)
    for i, _ in enumerate(data.families):
        with np.errstate(over="ignore", invalid="ignore"):
            charge, decay = pace * data.family["charge"][:, i], data.family["decay"][:, i]
            square, product = weights * charge**2, weights * charge * decay
        known = np.isfinite(square) & np.isfinite(product)
        if square[known].sum() > 0:
            shares.append(max(0.0, -float(product[known].sum() / square[known].sum())) / memory)
    divided = any("betas" in group and group.get("decoupled_weight_decay") is False for group in decaying)
    return [math.nan] if divided or (decaying and not any(shares)) else shares


def mean_rate(steps: np.ndarray, lr: np.ndarray, made: int) -> float:
    """The mean learning rate of a run of `made` steps, from those at the recorded steps and straight lines between.

    After the last one the line of the last two goes on, down to 0 and up to the largest one seen.

    Example:
        >>> round(mean_rate(np.array([0, 1, 51]), np.array([1.0, 0.99, 0.49]), 101), 3)
        0.5
    """
    slope = (lr[-1] - lr[-2]) / (steps[-1] - steps[-2]) if len(steps) > 1 else 0.0
    left = max(0, made - 1 - int(steps[-1]))
    known = np.append(steps, steps[-1] + left + 1), np.append(lr, lr[-1] + slope * (left + 1))
    return float(np.mean(np.clip(np.interp(np.arange(steps[0], steps[-1] + left + 1), *known), 0, np.max(lr))))


def decay_rules(decays: Sequence[float], course: LossCourse) -> list[Finding]:
    """A weight decay that takes weights back faster than they can learn.

    Threshold: a memory of 200 steps. Usual settings have 5,000 and more (SGD with 0.1 times 5e-4 has 10,000 without
    momentum and 1,000 with 0.9, AdamW with 1e-3 times 0.1 has 5,000). A weight must learn within its memory what it is
    to hold; an MLP on digits with a memory of 10 steps ended at a loss of 0.30 where it reaches 0.002. To watch, where
    three memories have passed: in a shorter run it has hardly begun.
    """
    memory = 1 / max((d for d in decays if d > 0), default=math.nan)
    if not memory < FORGETS or course.steps < ACTS * memory:
        return []
    title = f"Weight decay is strong: weights forget within {in_steps(max(1, round(memory)))}."
    means = "All that a weight holds it must have learnt within so many steps; usual settings have a thousand and more."
    advice = "if the loss is higher than hoped for, try a tenth of the weight decay"
    numbers = (Evidence("memory of decay", memory, unit="steps"),)
    return [
        Finding("decay-rules", "decay", "watch", title, means, advice, "measured", numbers, weight=FORGETS / memory)
    ]


FORGETS = 200.0
"""Memory of weight decay in steps below which it is to watch."""
