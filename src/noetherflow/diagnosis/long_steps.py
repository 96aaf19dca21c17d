"""The rule on steps that are as long as the weights that they change."""

from __future__ import annotations

from collections.abc import Sequence

from noetherflow.core.printing import count
from noetherflow.diagnosis.facts import NormTrend
from noetherflow.diagnosis.finding import NOTHING, Evidence, Finding, Severity, plain, unless

REPLACED = 1.0
LOST = 3.0


def step_length(facts: Sequence[NormTrend], warmup: int | None = None) -> list[Finding]:
    """Steps as long as the weights that they change, root mean square over noise, at the first step of a warmup.

    With a warmup of `W` steps the first is `1 / W` of the full length, and what the steps before it leave keeps later
    ones shorter than the weight: by noise alone step `s` of relative size `a s` finds a weight of `1 + a^2 s^3 / 3`
    times the square. A weight whose norm the loss ignores is drawn anew by one long step, and its norm grows to that
    of the step, so that the next turns it less: to watch at most.

    Threshold: at a relative length of 1 one step replaces the weight, wherever the gradient points: neither curvature
    nor any forecast at the present weights says where it lands. Usual peak rates are below 0.05 (Adam at 1e-3 with
    weights of standard deviation 0.02), so nothing is said below 1. From 3 on the step is nine times the weight's
    square, and this is to act on; below, a first gradient that is larger than all later ones may be harmless (a small
    last layer before the loss has fallen), and it is to watch.

    A matrix much smaller than usual initial weights of its shape (`NormTrend.is_small`) is told apart, and asks for
    nothing as long as a step is shorter than such usual weights: its first steps give it its size, as they do for a
    last layer that begins at zero. (A last layer scaled by
    1e-4, whose first step is 860 times as long as itself, trained digits as well as the usual one under SGD with
    momentum, in three seeds of three; with a learning rate 8,600 times smaller for it the loss never fell.)
    """
    share = 1 / max(warmup or 1, 1)
    sizes = ((f, f.step_length * share) for f in facts)
    long = sorted(((f, size) for f, size in sizes if size >= REPLACED), key=lambda p: (p[0].unseen, -p[1]))
    small = [(f, size) for f, size in long if f.is_small and size * f.usual < REPLACED]
    far = [p for p in long if p not in small]
    return [*([_too_long(far, warmup)] if far else []), *([_still_small(small, warmup)] if small else [])]


Lengths = Sequence[tuple[NormTrend, float]]
"""Weights, and the length of a step over theirs."""


def _first(lengths: Lengths, warmup: int | None) -> str:
    """How long a step is against the first of these weights."""
    worst, length = lengths[0]
    step = f"The first step of the warmup of {warmup:,}" if warmup else "A step"
    times = f"{plain(length)} times as long as" if plain(length) != "1" else "as long as"
    return f"{step} is {times} `{worst.name}` itself"


def _still_small(small: Lengths, warmup: int | None) -> Finding:
    """Long steps of weights that are nearly zero: they make them grow."""
    worst, _ = small[0]
    title = f"{_first(small, warmup)}, and that is no fault: the weight is {plain(worst.usual)} of a usual initial one "
    title += "of its shape, as where a layer begins at zero, and its first steps make it grow"
    title += f" (the same of {count(len(small) - 1, 'more weight', 'more weights')})." if len(small) > 1 else "."
    numbers = tuple(Evidence(f"step over weight, {f.name}", size) for f, size in small[:3])
    names, sure = tuple(f.name for f, _ in small), "sure for the size of the weight and of the next step"
    return Finding("small-weights", "warmup", "good", title, "", NOTHING, sure, numbers, names)


def _too_long(far: Lengths, warmup: int | None) -> Finding:
    """Steps that replace weights of ordinary size, or weights before a normalisation."""
    worst, length = far[0]
    title = _first(far, warmup)
    title += f" (and too long for {count(len(far) - 1, 'more weight', 'more weights')})." if len(far) > 1 else "."
    means = "One step replaces what the weight was; curvature at the present weights says nothing of where it lands."
    needed, what = 10 * length, "it"
    if worst.is_small:
        needed, what = needed * worst.usual, "a usual initial weight of its shape"
    advice = f"lower the learning rate of `{worst.name}` at least {needed:,.0f} times, so that a step is a tenth of "
    advice += f"{what} at most"
    severity: Severity = "watch" if worst.unseen or length < LOST else "act"
    if severity == "watch":
        advice = f"warm up, or lower the learning rate of `{worst.name}` {needed:,.0f} times"
    if worst.unseen:
        advice = unless(advice)
        means = (
            "One step draws its direction anew; the loss ignores its norm, which grows to that of the step, so that "
        )
        means += "the next steps turn it less."
    numbers = tuple(Evidence(f"step over weight, {f.name}", size) for f, size in far[:3])
    names = tuple(f.name for f, _ in far)
    sure = "sure for one step by itself, from the gradients measured and the learning rate; momentum comes on top"
    return Finding("step-length", "warmup", severity, title, means, advice, sure, numbers, names, weight=length)
