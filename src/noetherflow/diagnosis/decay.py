"""What weight decay takes of weights: whether that matters within a run, and whether it is too much."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from noetherflow.diagnosis.facts import ACTS, LossCourse
from noetherflow.diagnosis.finding import NOTHING, Evidence, Finding, calm, in_steps, plain
from noetherflow.diagnosis.losses import less_decay
from noetherflow.monitor.rundata import RunData, weights_of

TOO_SMALL = 0.1
"""Share of squared norms that decay takes in a run, below which it does not matter."""
SHORT = 1000
"""Steps below which a run of unknown length is taken for a trial."""


def decays_of(data: RunData, rate: float) -> list[float]:
    """What decay took of each family's charge per step at a learning rate, as the mean over all steps (`run_rates`).

    The entries on the charges have a slope in proportion to the learning rate, whose mean over the steps weighs it.
    With momentum the entry is the first touch of a step's decay; its memory carries on to `1 / (1 - m)` of it. NaN
    where there is decay that no entry shows, or that Adam divides by its own average. Without any watched symmetry,
    what the settings of SGD say.
    """
    decaying = [group for group in data.header.get("groups", ()) if group.get("weight_decay")]
    memory = 1 - float(data.header.get("momentum") or 0.0)
    lr = np.where(np.isfinite(data.lr), data.lr, 1.0)
    weights = weights_of(data.steps)
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


def decay_bites(
    decays: Sequence[float],
    steps: float,
    asked: bool = True,
    course: LossCourse | None = None,
    scheduled: bool = False,
) -> list[Finding]:
    """Whether weight decay has time to act within the run: `decays` are its shares of squared weights per step, NaN
    where there is decay whose share is not known.

    `asked`: somebody gave `steps`. Where nobody did, runs below a thousand steps are taken for trials or beginnings, on
    which no decay that suits a training acts: they leave the question open. `scheduled`: the shares are means over the
    learning rates of all these steps.

    Threshold: `share * steps < 0.1` removes less than a tenth of any squared norm, 5 % of a norm, in the whole run, as
    if there were no decay: to watch. From 3 on it removes 95 % and more, so that norms are where decay and growth
    balance, whatever they began with; between it acts partly. All that is good, unless the loss of a run (`course`) has
    left its lowest level after three memories: then decay is a candidate to lower, and to watch. (Ten times the decay
    cost a BatchNorm network on digits, whose loss rose again from 0.008 to 0.08, 3 to 5 points of accuracy.)
    """
    decaying = [d for d in decays if d > 0]
    if not decaying and any(math.isnan(d) for d in decays):
        title = "What weight decay takes of norms is not known: it goes into the gradients, as in `torch.optim.Adam`, "
        title += "or into a step that cannot be told apart."
        advice = "to know it, use decoupled decay, such as torch.optim.AdamW, whose share is lr times decay"
        return [Finding("decay-bites", "decay", "open", title, "", advice, "open")]
    if not decaying:
        return [calm("decay-bites", "decay", "There is no weight decay; norms are what gradients make of them.")]
    share, memory = max(decaying) * steps, max(1, round(1 / max(decaying)))
    taken = 1 - math.exp(-share)
    numbers = (
        Evidence("share of squared weights that decay takes per step", max(decaying)),
        Evidence("memory of decay", memory, unit="step" if memory == 1 else "steps"),
        Evidence("run looked at", steps, unit="steps"),
    )
    sure = "sure for a constant learning rate; one that falls makes decay weaker still: schedule=... takes it"
    sure = "sure for the schedule given" if scheduled else sure
    sure = "by the learning rates of the run" if course is not None else sure
    if share < TOO_SMALL:
        title = f"Weight decay is too small to matter in this run: it takes {plain(taken)} of the squared norms in "
        title += f"{in_steps(steps)}."
        means = f"It acts over {in_steps(memory)}, so norms do not settle in this run, which goes as if it had none."
        if steps < SHORT and not asked:
            few = f"{in_steps(steps)} {'is' if round(steps) <= 1 else 'are'} too few"
            title = f"{few} to judge weight decay by: in them it takes {plain(taken)} of the "
            title += f"squared norms; it acts over {in_steps(memory)}."
            advice = "give the steps of the whole training: steps=... (on the command line --steps)"
            return [Finding("decay-bites", "decay", "open", title, "", advice, sure, numbers)]
        advice = f"{NOTHING} for the loss, which hardly depends on this weight decay"
        advice += "" if asked else f"; if {in_steps(steps)}, the default, are not the whole training, give steps=..."
        weight = math.log(TOO_SMALL / share)
        return [Finding("decay-bites", "decay", "watch", title, means, advice, sure, numbers, weight=weight)]
    settled = share >= ACTS
    title = f"{'Yes' if settled else 'Partly'}: it acts over {in_steps(memory)}; in {in_steps(steps)} it takes "
    title += f"{taken:.0%} of the squares that decayed weights began with"
    title += f"{'' if scheduled else _under_a_schedule(share, course)}, so "
    title += "by then they are mostly where decay and growth balance." if settled else "they do not settle yet."
    if not settled:
        return [calm("decay-bites", "decay", title, sure, numbers)]
    if course is not None and course.rise is not None and course.decay_acts:
        title += " The loss has left its lowest level meanwhile."
        means = "Decay keeps norms small, and steps long against them, which may be why the loss rises again."
        advice = less_decay(course, course.rise)
        sure = "decay is measured; that it is the reason is a guess that the trial decides"
        return [Finding("decay-bites", "decay", "watch", title, means, advice, sure, numbers, weight=math.log(share))]
    return [calm("decay-bites", "decay", title, sure, numbers)]


def _under_a_schedule(share: float, course: LossCourse | None) -> str:
    """What a forecast at a constant learning rate becomes under a cosine, whose mean is a half; nothing of a log."""
    if course is not None:
        return ""
    return f" at a constant learning rate ({1 - math.exp(-share / 2):.0%} under a cosine to 0)"


def decay_rules(decays: Sequence[float], steps: float, sure: str = "measured") -> list[Finding]:
    """A weight decay that takes weights back faster than they can learn.

    Threshold: a memory of 200 steps. Usual settings have 5,000 and more (SGD with 0.1 times 5e-4 has 10,000 without
    momentum and 1,000 with 0.9, AdamW with 1e-3 times 0.1 has 5,000). A weight must learn within its memory what it is
    to hold; an MLP on digits with a memory of 10 steps ended at a loss of 0.30 where it reaches 0.002. To watch, where
    three memories have passed: in a shorter run it has hardly begun.
    """
    memory = 1 / max((d for d in decays if d > 0), default=math.nan)
    if not memory < FORGETS or steps < ACTS * memory:
        return []
    title = f"Weight decay is strong: weights forget within {in_steps(max(1, round(memory)))}."
    means = "All that a weight holds it must have learnt within so many steps; usual settings have a thousand and more."
    advice = "if the loss is higher than hoped for, try a third of the weight decay"
    numbers = (Evidence("memory of decay", memory, unit="steps"),)
    return [Finding("decay-rules", "decay", "watch", title, means, advice, sure, numbers, weight=FORGETS / memory)]


FORGETS = 200.0
"""Memory of weight decay in steps below which it is to watch."""
