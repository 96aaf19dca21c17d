"""From measured violations to a verdict: the rules of a certificate, without a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from noetherflow.discovery.certificate import Mode, Verdict
from noetherflow.discovery.violations import EpsSize, Violations

EXACT = 1e-12
"""Largest relative output violation of an exact symmetry in float64."""
EXACT_WITH_CASTS = 1e-5
"""The same where the model casts to float32 and runs in no other way."""
ROUNDING_MARGIN = 30.0
"""A violation below this many times the measured rounding of the outputs counts as none,"""
MOST_ROUNDING = 1e-7
"""unless it is larger than this."""
GRADIENT_SLACK = 1e2
"""Gradients may violate this much more than outputs: they pass the graph twice."""
DRAWN_SLACK = 1e4
"""The same at drawn weights, where a model may be worse conditioned than where it was trained."""
CHANGED_BACKWARD = (
    "outputs obey it, gradients do not: the backward pass is not that of the forward (detach, no_grad, .data, gradient "
    "reversal, hook, padding_idx), so that training moves the charge at first order"
)
LOSS_BREAKS = "outputs obey it, gradients of loss_fn do not: the loss depends on more than the outputs"


@dataclass(frozen=True)
class Ruling:
    """A verdict, the words for it and the mode it is about."""

    verdict: Verdict
    note: str
    mode: Mode


def tolerance_of(narrow: bool, rounding: float) -> float:
    """The largest output violation of an exact symmetry.

    Args:
        narrow: the model casts to float32 and those casts could not be widened.
        rounding: relative change of the outputs by rounding, as far as measured.

    Example:
        >>> tolerance_of(False, 1e-16), tolerance_of(False, 1e-13)
        (1e-12, 3e-12)
    """
    if narrow:
        return EXACT_WITH_CASTS
    return max(EXACT, min(MOST_ROUNDING, ROUNDING_MARGIN * rounding))


def holds(v: Violations, tolerance: float, statistics: bool) -> bool:
    """Whether outputs and gradients obey a symmetry to rounding.

    Args:
        v: what was measured.
        tolerance: the largest output violation; gradients of the example may violate `GRADIENT_SLACK` times as much,
            those at drawn weights `DRAWN_SLACK` times.
        statistics: the symmetry moves running statistics. These get no gradient, so that `theta^T A g` vanishes with
            batch statistics only and is judged in training mode.
    """
    if not (v.outputs < tolerance and v.covariance < GRADIENT_SLACK * tolerance):
        return False
    return conserved(v, statistics) < DRAWN_SLACK * tolerance and (statistics or v.loss < GRADIENT_SLACK * tolerance)


def overflows(v: Violations) -> bool:
    """Whether outputs or gradients at the moved weights are no finite numbers, so that nothing can be compared."""
    return math.isnan(v.outputs) or math.isnan(v.covariance)


OVERFLOW = (
    "outputs or gradients are not finite numbers at the moved weights: the sizes of weights or inputs leave the range "
    "of the arithmetic on the way; bring them nearer to 1 to certify it"
)
ALTERED = 0.05
"""Share of `sum |theta| |g|` from which gradients tell of an altered backward pass where an eps that cannot be varied
may be all that a weight acts through (a norm over copies of one number)."""


def conserved(v: Violations, statistics: bool) -> float:
    """The violation of `theta^T A g = 0` that counts: with batch statistics for a symmetry that moves them."""
    if statistics:
        return v.training or 0.0
    return max(v.loss, v.conserved)


def unsteady(difference: float) -> Ruling:
    """The verdict where two equal calls of the model differ: nothing can be compared."""
    return Ruling(
        "undetermined",
        f"two calls with the same weights, inputs and random state differ by {difference:.1e}: the forward depends on "
        "something outside the model (a counter or generator of its own, the time); make it repeatable to certify it",
        "any",
    )


def rule(v: Violations, tolerance: float, statistics: bool) -> Ruling:
    """The verdict on a symmetry that no eps excuses."""
    if overflows(v):
        return Ruling("undetermined", OVERFLOW, "any")
    if holds(v, tolerance, statistics):
        return _proved("exact", "", v, tolerance, statistics)
    return Ruling("broken", _why_broken(v, tolerance, statistics), "any")


def _why_broken(v: Violations, tolerance: float, statistics: bool) -> str:
    limit = DRAWN_SLACK * tolerance
    if v.outputs >= tolerance:
        if v.training is not None and v.training < max(limit, 1e-2 * v.conserved) and v.conserved >= limit:
            return "holds with batch statistics only (training mode); otherwise running statistics must move too"
        return ""
    if conserved(v, statistics) < limit:
        return "outputs obey it, gradients do not"
    return CHANGED_BACKWARD if statistics or v.conserved >= limit else LOSS_BREAKS


def rule_with_eps(v: Violations, sizes: Sequence[EpsSize], eps: float, tolerance: float, statistics: bool) -> Ruling:
    """The verdict on a symmetry that holds up to a normalisation's eps, by what is left when eps goes to 0."""
    if overflows(v):
        return Ruling("undetermined", OVERFLOW, "any")
    if holds(v, tolerance, statistics):
        return _proved("exact", "", v, tolerance, statistics)
    shown = ", ".join(f"{s.outputs:.1e} at eps {s.factor * eps:.0e}" for s in sizes)
    varied = any(abs(s.outputs - v.outputs) > 1e-6 * v.outputs for s in sizes)
    explained = any(s.outputs < max(min(tolerance, 0.5 * v.outputs), 0.1 * v.outputs) for s in sizes)
    if explained:
        left = min((s.training if statistics else s.conserved for s in sizes), default=0.0)
        before = conserved(v, statistics) if statistics else max(v.loss, v.conserved)
        if left > max(DRAWN_SLACK * tolerance, 0.1 * before):
            return Ruling("broken", CHANGED_BACKWARD, "any")
        return _proved("approximate", f"eps of a normalisation: {shown}", v, tolerance, statistics)
    if v.outputs < 1e-3 and not varied:
        if not statistics and min(v.loss, v.conserved) > max(1e3 * v.outputs, ALTERED):
            return Ruling("broken", CHANGED_BACKWARD, "any")
        note = "the eps is written into the code and could not be varied"
        return _proved("approximate", note, v, tolerance, statistics)
    return Ruling("broken", f"not explained by eps: {shown}", "any")


def _proved(verdict: Verdict, note: str, v: Violations, tolerance: float, statistics: bool) -> Ruling:
    """A symmetry that holds wherever it was tried: undetermined if some leg never had an effect."""
    mode = _mode(v, tolerance, statistics)
    if v.without_effect:
        where = f"{v.without_effect} coordinates have a leg"
        note = (
            f"{where} on which the outputs do not depend, neither on the example nor at random weights and inputs: "
            "pass example inputs on which they do"
        )
        return Ruling("undetermined", note, mode)
    words = {
        "any": "",
        "training": "conserved in training mode (batch statistics)",
        "evaluation": "conserved in evaluation mode only",
    }
    return Ruling(verdict, "; ".join(filter(None, (note, words[mode]))), mode)


def _mode(v: Violations, tolerance: float, statistics: bool) -> Mode:
    if statistics:
        return "training"
    if v.training is None:
        return "any"
    limit = max(DRAWN_SLACK * tolerance, 1e2 * max(v.loss, v.conserved))
    return "any" if v.training < limit else "evaluation"
