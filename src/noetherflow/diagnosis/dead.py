"""Rules on units that are dead: no sample sends a gradient through them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from noetherflow.core.printing import count
from noetherflow.diagnosis.balance import some_of
from noetherflow.diagnosis.facts import PartActivity
from noetherflow.diagnosis.finding import Evidence, Finding, Severity, calm

SOME_DEAD, MANY_DEAD = 0.1, 0.5
SILENT = 1e-6
ENOUGH = 100
SATURATING = ("tanh", "sigmoid", "hardtanh", "hardsigmoid")
"""Activations whose silent units stand at an end of their range, not at 0."""


def dead_units(facts: Sequence[PartActivity], samples: float = math.inf, started: bool = False) -> list[Finding]:
    """Units that no measured sample sends any gradient through.

    A unit that is active for a share `p` of the data is silent on `n` samples with probability `(1 - p)^n`: on fewer
    than a hundred samples one of 3 % may be, as sparse units are, so that below `ENOUGH` samples dead ones are open.

    A unit that is active for one sample of thousands still has a hundredth of the usual root mean squared gradient;
    below `1e-6` of the layer's median it is rounding. Threshold: a tenth of a layer is to watch, for that much of its
    width is lost; half of it to act on. Layers whose symmetry could not be certified are judged by the same. Single
    dead units are normal in wide ReLU layers and are only mentioned. Half the learning rate is no advice: it made an
    MLP on digits with some silent units worse in three of three seeds (0.035, 0.040, 0.042 to 0.094, 0.090, 0.099).
    Where most of a layer died in training (`started`), so did new weights for them and leaky units (chance in three of
    three seeds each); a quarter of the learning rate from the start trained (0.05, 0.12 and 1.7).

    Layers that no symmetry tells of (before a tanh or GELU, frozen ones) are judged by their activations: a unit is
    dead that lies on all samples where the slope is 0 or below 0.002, as a tanh beyond 0.999.
    """
    asked = [f for f in facts if f.part != "head"]
    layers = [(f, _dead(f)) for f in asked if not np.isnan(f.gradient).any()]
    unknown = [f"`{f.name}`" for f in asked if np.isnan(f.gradient).any()]
    left_out = f" Not judged, for not all of their gradients were measured: {some_of(unknown)}." if unknown else ""
    if not layers and not unknown:
        return []
    if not layers:
        advice = "let the loss depend on all of their parameters, without hooks on gradients"
        return [Finding("dead-units", "balance", "open", f"Dead units:{left_out.lower()}", "", advice, "open")]
    worst, which = max(layers, key=lambda r: len(r[1]) / len(r[0].gradient))
    share, total = len(which) / len(worst.gradient), sum(len(w) for _, w in layers)
    if share < SOME_DEAD:
        number = f"{count(total, 'unit is', 'units are')} dead" if total else "No unit is dead"
        number += f" in the {count(len(layers), 'layer', 'layers')} looked at"
        title = f"{number}, at most {share:.0%} of one: normal." if total else f"{number}."
        return [calm("dead-units", "balance", title + left_out, "sure on the data measured")]
    if samples < ENOUGH:
        title = f"{len(which)} of {len(worst.gradient)} {worst.part}s of `{worst.name}` were silent, but on "
        title += f"{count(round(samples), 'sample', 'samples')} alone, too few to call them dead."
        advice = f"measure at least {ENOUGH} samples"
        return [Finding("dead-units", "balance", "open", title, "", advice, "open")]
    title = f"{_told(worst, which)}.{left_out}"
    more = [(f, w) for f, w in layers if len(w) >= SOME_DEAD * len(f.gradient) and f is not worst]
    title += f" Also: {some_of([_told(f, w) for f, w in more])}." if more else ""
    means = "No sample sends a gradient through them now: only weight decay moves their weights, until changes of the "
    means += "layers before them wake them, as they did 20 of 28 such units of small networks that were fresh."
    advice = _advice(worst, which)
    if started and share >= MANY_DEAD and not worst.frozen:
        advice = (
            f"begin again from before so many units of `{worst.name}` died, at a third of the peak learning rate or "
        )
        advice += "less"
    sure = "sure on the data measured; a unit that is active for rare samples only looks the same"
    severity: Severity = "act" if share >= MANY_DEAD else "watch"
    numbers = (Evidence(f"dead {worst.part}s of {worst.name}", float(len(which)), unit=f"of {len(worst.gradient)}"),)
    names = tuple(f.name for f, w in layers if len(w) >= SOME_DEAD * len(f.gradient))
    return [Finding("dead-units", "balance", severity, title, means, advice, sure, numbers, names, share)]


def _told(fact: PartActivity, which: np.ndarray) -> str:
    """Which units of a layer are dead, and how."""
    units = ", ".join(str(i) for i in which[:8]) + (", ..." if len(which) > 8 else "")
    how = f"saturated in {fact.activation}" if fact.activation in SATURATING else "dead"
    frozen = ", whose weights are frozen," if fact.frozen else ""
    verb = "is" if len(which) == 1 else "are"
    return f"{len(which)} of {len(fact.gradient)} {fact.part}s of `{fact.name}`{frozen} {verb} {how} ({units})"


def _advice(fact: PartActivity, which: np.ndarray) -> str:
    """What brings dead units back, or ends what they cost."""
    number = count(len(which), fact.part, f"{fact.part}s")
    if fact.frozen:
        return f"prune these {number} of `{fact.name}`, which learn nothing and change nothing, or unfreeze the layer"
    if fact.activation in SATURATING:
        return (
            f"divide these rows of weights and biases of `{fact.name}` by 10, halve the learning rate, or normalise "
            "what goes into the activation"
        )
    return (
        f"use a leaky activation such as nn.LeakyReLU(0.01), or draw the weights of these {number} of `{fact.name}` "
        "anew with biases of 0"
    )


def silent_parts(facts: Sequence[PartActivity]) -> dict[str, int]:
    """By the name of each symmetry how many of its parts get no gradient, where there are some."""
    numbers = {f.name: len(_dead(f)) for f in facts if not np.isnan(f.gradient).any()}
    return {name: number for name, number in numbers.items() if number}


def _dead(fact: PartActivity) -> np.ndarray:
    alive = fact.gradient[fact.gradient > 0]
    level = float(np.median(alive)) if alive.size else 0.0
    return np.flatnonzero(fact.gradient <= SILENT * level)
