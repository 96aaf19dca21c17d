"""Rules on the learning rate: stability, warmup, sharpening to come, and Adam's memory of squares."""

from __future__ import annotations

import math
from collections.abc import Sequence

from noetherflow.core.printing import count, show
from noetherflow.diagnosis.facts import FELL, LossCourse, StepStability, Turn
from noetherflow.diagnosis.finding import NOTHING, Evidence, Finding, Severity, calm, in_steps, plain, unless
from noetherflow.diagnosis.losses import LOST_RUN, broke, rose_late

EDGE = 2.0
NOISY = 1.0
SHARPER = 2.0
TURN, BIG_TURN = 0.1, 0.3
LATE = 0.5
ANEW = 1.0
ROSE = 2.0
RISES = 0.02
AGAIN = "train 50 steps and ask again from there, nf.diagnose(model, loss_fn, loader, optimizer, steps=..., warmup=...)"
HELD = "with the function held fixed"
CURVED = "likely: curvature on some hundred samples, the function taken to stay as it is meanwhile"


def learning_rate(fact: StepStability) -> list[Finding]:
    """Whether the learning rate is stable at this curvature, and the warmup long enough until it is.

    Threshold: `load = lr / stable lr`; at 1 the error along the stiffest direction stops shrinking, full batch or not,
    so a fresh run with a load of 1 needs a warmup: to act on. Below 1 the answer holds at the weights as they are, and
    before training these are not the ones that count: `_before_training`. A run whose optimiser has made steps lives at
    the edge of stability (load about 1, measured within 2), where the curvature adapts to the learning rate: to watch,
    no more. A load of 1 with minibatches alone bounds the mean square on a quadratic loss; losses that flatten out, as
    cross entropy does, survive it: to watch.
    """
    if math.isnan(fact.load):
        title = "Not known whether a warmup is needed: the curvature is not measured here."
        return [Finding("learning-rate", "warmup", "open", title, "", fact.remedy, "open")]
    if fact.small:
        title = (
            "Curvature cannot tell whether a warmup is needed: where it is largest it is that of weights much smaller "
        )
        title += "than the others of their layer, which one step replaces."
        return [Finding("learning-rate", "warmup", "open", title, "", AGAIN, "open")]
    if fact.load < 1 and fact.replaced:
        title = "Curvature cannot tell whether a warmup is needed: a step is as long as weights that it changes."
        return [Finding("learning-rate", "warmup", "open", title, "", AGAIN, "open", _numbers(fact))]
    if fact.load < 1:
        return [_stable(fact) if fact.started else _before_training(fact)]
    if fact.started and fact.load < EDGE:
        title = f"The learning rate {fact.lr:g} is at the edge of stability: {plain(fact.load)} times the stable one."
        means = "A running training often settles there; a sharper stretch makes the loss spike."
        advice = unless(f"lower the optimiser's learning rate below {show(fact.stable)}", "if it spikes")
        return [
            Finding("learning-rate", "warmup", "watch", title, means, advice, CURVED, _numbers(fact), weight=fact.load)
        ]
    return [_warmup(fact)]


def _numbers(fact: StepStability) -> tuple[Evidence, ...]:
    found = [Evidence("learning rate", fact.lr), Evidence("largest stable one here, full batches", fact.stable)]
    if fact.noisy_load > 0:
        found.append(Evidence("with these minibatches", fact.lr / fact.noisy_load))
    if fact.load_later > 0:
        found.append(Evidence("at the noise equilibrium, full batches", fact.lr / fact.load_later))
    return tuple(found)


def _before_training(fact: StepStability) -> Finding:
    """A load below 1 at weights that no step has changed: stable here, which says little of the steps to come.

    Threshold: curvature rises in the first tens of steps. Measured, by the largest Hessian eigenvalue within 50 steps
    over that at the start, at usual learning rates: 16 to 27 times in an MLP with ReLU on digits (SGD with momentum, lr
    0.1 and 0.3, two seeds each), 2.6 times in a network of convolutions and BatchNorm, 1.2 to 2.3 times in a small GPT
    (SGD and AdamW). So a load below 0.02, a rise of 50, is good; from there on it is open. (That MLP at lr 0.5, a load
    of 0.15 at the start, ended at chance.)
    """
    if fact.load < RISES:
        return _stable(fact)
    title = f"At these weights, before training, the learning rate {fact.lr:g} is stable: {plain(fact.load)} of the "
    title += f"largest stable one with full batches ({show(fact.stable)}). Whether it stays stable in the first steps "
    title += "is not told by that."
    left = f"a rise of {plain(1 / fact.load)} times ends it" if fact.load > 0 else "a positive one may end it"
    means = "Curvature rises within the first tens of steps, up to 27 times where that was measured (an MLP), up "
    means += f"to 3 times with normalisations (BatchNorm, GPT); here {left}."
    if fact.noisy_load >= NOISY:
        means += f" {_worst_case(fact)}"
    if fact.planned:
        advice = f"to know whether the planned warmup of {fact.planned:,} steps is enough, {AGAIN}; if not, try a "
        advice += "third of the peak learning rate"
    else:
        advice = f"warm up over some tens of steps, which costs little; or {AGAIN}"
    return Finding("learning-rate", "warmup", "open", title, means, advice, "open", _numbers(fact))


def _worst_case(fact: StepStability) -> str:
    """What minibatches would allow on a quadratic loss."""
    return (
        f"On a quadratic loss these minibatches would allow {plain(1 / fact.noisy_load)} of this rate only. That bound "
        "is for the worst case: cross entropy flattens out away from its minimum, and training often goes well above "
        "it. Where it does not, the loss scatters from the first steps on."
    )


def _stable(fact: StepStability) -> Finding:
    """A load below 1: stable with full batches."""
    warm = "No warmup is needed for stability at these weights"
    if fact.planned:
        warm = f"Yes, the planned warmup of {fact.planned:,} steps is long enough; stability at these weights asks for "
        warm += "none"
    title = f"{warm}: the learning rate {fact.lr:g} is {plain(fact.load)} of the largest stable one with full batches "
    title += f"({show(fact.stable)})"
    if fact.noisy_load >= NOISY:
        return Finding(
            "learning-rate",
            "warmup",
            "watch",
            f"{title}.",
            _worst_case(fact),
            unless("try a smaller learning rate or larger batches"),
            CURVED,
            _numbers(fact),
            weight=fact.noisy_load,
        )
    if fact.noisy_load > 0:
        title += f"; on a quadratic loss minibatches would allow {show(fact.lr / fact.noisy_load)}, "
        title += "which training often exceeds"
    title += (
        "" if fact.started else "; with full batches it stays stable where curvature rises 50 times in the first steps"
    )
    return calm("learning-rate", "warmup", f"{title}.", CURVED, _numbers(fact))


def _warmup(fact: StepStability) -> Finding:
    """A load that no edge of stability explains: what warmup does about it, and what it promises."""
    severity: Severity = "act"
    lower = f"lower the peak learning rate of the optimiser below {show(fact.stable)}"
    means = (
        f"Steps of {fact.lr:g} overshoot here, at {plain(fact.load)} times the learning rate that is stable with full "
        f"batches, {show(fact.stable)}."
    )
    if fact.needed is None:
        title = f"The learning rate {fact.lr:g} is too large, and no warmup along the noise flow makes it stable."
        advice = lower
    elif math.isnan(fact.needed):
        title, advice = (
            f"The learning rate {fact.lr:g} is {plain(fact.load)} times the stable one, and how long a warmup makes up "
            "for that is not known.",
            lower,
        )
    elif fact.needed > fact.run:
        title = f"The learning rate {fact.lr:g} is too large for this run: stability asks for a warmup of about "
        title += f"{fact.needed:,.0f} steps, and the run has {fact.run:,.0f}."
        advice = lower
    elif fact.planned is None:
        title = f"The learning rate {fact.lr:g} needs a warmup of about {fact.needed:,.0f} steps; none was named."
        advice = (
            f"warm up linearly over {fact.needed:,.0f} steps or more (warmup=steps checks a planned one), or {lower}"
        )
    elif fact.counts < fact.needed:
        title = f"No, {_planned(fact)} is too short: stability asks for about {fact.needed:,.0f}."
        advice = f"lengthen the warmup to {fact.needed:,.0f} steps or more, or {lower}"
    elif fact.safe is not None and fact.counts < fact.safe:
        severity = "watch"
        title = f"T{_planned(fact)[1:]} is enough for full batches (about {fact.needed:,.0f}), "
        title += f"short for these minibatches (about {fact.safe:,.0f})."
        advice = unless(f"lengthen the warmup towards {fact.safe:,.0f} steps", "if it spikes")
    else:
        severity, advice = "good", NOTHING
        title = f"Yes, {_planned(fact)} is long enough: stability asks for about {fact.needed:,.0f}."
    return Finding("learning-rate", "warmup", severity, title, means, advice, CURVED, _numbers(fact), weight=fact.load)


def _planned(fact: StepStability) -> str:
    """The planned warmup, and what it counts as where it is far from linear."""
    text = f"the warmup of {fact.planned:,} steps"
    return text if fact.counts == fact.planned else f"{text} (which acts as a linear one of {fact.counts:,.0f})"


def sharpening(fact: StepStability) -> list[Finding]:
    """Whether the noise flow will sharpen the minimum or flatten it.

    Threshold: a factor of 2 either way; less is within what the curvature of one batch differs from another's. It is to
    watch where sharpening takes the load beyond 1, else good to know.
    """
    if fact.saddle:
        title = (
            "Whether noise sharpens or flattens cannot be told: the trace of the curvature is not positive, as away "
        )
        title += "from a minimum."
        advice = "ask again after some 50 steps, once the loss has fallen: nf.diagnose(model, loss_fn, loader, ...)"
        return [Finding("sharpening", "warmup", "open", title, "", advice, "open")]
    if math.isnan(fact.sharpening):
        return []
    factor = max(fact.sharpening, 1 / fact.sharpening)
    numbers = (Evidence("curvature at the noise equilibrium over today's", fact.sharpening),)
    sure = "the function held fixed: what training makes of the curvature comes on top, and is often more"
    if fact.sharpening >= SHARPER and fact.load_later >= 1:
        title = f"Sharpening to come: {HELD}, noise raises the curvature {plain(factor)} times."
        means = f"The learning rate becomes {plain(fact.load_later)} times the stable one on the way."
        advice = unless(
            f"a learning rate below {show(fact.lr / fact.load_later)} or larger batches", "if it spikes later"
        )
        return [Finding("sharpening", "warmup", "watch", title, means, advice, sure, numbers, weight=factor)]
    word = "sharpening" if fact.sharpening >= 1 else "flattening"
    title = f"Noise leaves the curvature as it is, {HELD} (a factor of {plain(fact.sharpening)})."
    if factor >= SHARPER:
        title = (
            f"{word.capitalize()} by noise, {HELD}: by a factor of {plain(factor)}, at which the learning rate stays "
        )
        title += "stable with full batches. What training makes of the curvature comes on top."
    return [calm("sharpening", "warmup", title, sure, numbers)]


def loss_course(fact: LossCourse) -> list[Finding]:
    """Whether the loss of a run stayed in hand, and the warmup long enough for that.

    Threshold: the ledger's own for a spike, ten times the 90 % quantile of what the loss did in the 50 steps before.
    One spike is to watch. Numbers that are not finite, or spikes that begin within twice the warmup, are to act on:
    there the learning rate had just come to its peak, and the curvature had not fallen with it. Without either the
    last losses are compared with the first: twice as much is no accident of a batch, and to act on; less than 5 % below
    is to watch, since so ends both a run that began at its minimum and one that was thrown back to chance. And with the
    lowest level before them: `losses.rose_late`. A loss that once stood at 1.3 times the first is to watch: that of a
    small Llama went from 5.5 up to 7.5 in its first steps and ended at 3.05, with a warmup at 2.45.
    """
    if fact.broke_calmly and not _rose(fact):
        return [broke(fact)]
    if fact.diverged is not None:
        return [_diverged(fact, fact.diverged)]
    if fact.dead:
        return [_dead(fact)]
    early = [s for s in fact.spikes if fact.warmup and s <= 2 * fact.warmup]
    first = fact.broken if fact.broken is not None else fact.spikes[0] if fact.spikes else None
    if first is None:
        return [_without_spikes(fact)]
    times = count(len(fact.spikes), "time", "times") + (", first" if len(fact.spikes) > 1 else "")
    what = "Numbers were not finite" if fact.broken is not None else f"The loss spiked {times}"
    numbers = (Evidence("warmup", float(fact.warmup), unit="steps"), Evidence("first trouble at step", float(first)))
    severity: Severity = "act" if early or fact.broken is not None or _rose(fact) else "watch"
    short = first <= 2 * fact.warmup if fact.warmup else first <= max(100, fact.steps // 10)
    if short:
        warm = f"No, the warmup of {fact.warmup:,} steps is too short" if fact.warmup else "There was no warmup"
        title = f"{warm}: {what.lower()} at step {first:,}."
        advice = "try a third of the optimiser's peak learning rate; a longer warmup alone may not help"
    elif fact.began > 0 and fact.middle > fact.began:
        title = f"{what} at step {first:,}, and in the middle of the run the loss was {show(fact.middle)}, above the "
        title += f"first, {show(fact.began)}: the learning rate is too large."
        advice, severity = "lower the optimiser's peak learning rate to a third", "act"
    else:
        title = f"{what} at step {first:,}, long after {'the warmup' if fact.warmup else 'the first steps'}, so that a "
        title += "longer warmup would hardly help."
        advice = "look at the data of that step; clip gradients, or lower the learning rate from there on"
    if severity == "watch" and fact.well:
        advice = unless(advice, "if it spikes again")
    means = "A sample out of the ordinary, or a learning rate above the stable one at that point."
    return [
        Finding("loss-course", "warmup", severity, title, means, advice, "measured", numbers, weight=len(fact.spikes))
    ]


def _diverged(fact: LossCourse, at: int) -> Finding:
    """A run that was lost before its end."""
    losses = not math.isnan(fact.ended)
    gone = f"from {show(fact.began)} to {show(fact.ended)}" if losses else "by numbers that grew beyond all bounds"
    title = f"The run diverged at step {at:,}: {'the loss rose ' if losses else 'lost '}{gone}. "
    warm = (
        f"The warmup of {fact.warmup:,} steps was too short for this learning rate, or the rate is too high after any."
    )
    title += warm if fact.warmup else "There was no warmup."
    means = "Steps are too long for this loss. What is said of norms, angles and noise describes a run that is lost."
    advice = "lower the optimiser's peak learning rate and begin again from before it; a warmup alone may not be enough"
    numbers = (Evidence("diverged at step", float(at)), Evidence("warmup", float(fact.warmup), unit="steps"))
    return Finding("loss-course", "warmup", "act", title, means, advice, "measured", numbers, weight=LOST_RUN)


def _dead(fact: LossCourse) -> Finding:
    """A network whose watched weights learn nothing any more."""
    title = "The network is dead: lately no gradient reached any of the watched weights"
    if not math.isnan(fact.ended):
        title += f", and the loss went from {show(fact.began)} to {show(fact.ended)}"
        up = fact.highest >= ROSE * fact.began > 0
        title += f", up to {show(fact.highest)} on the way" if up else ""
    means = "Units that are off for every sample, as steps far too long leave them, learn nothing; what weights still "
    means += "do is weight decay and momentum."
    advice = "lower the optimiser's peak learning rate and begin again from before it; a warmup alone may not be enough"
    numbers = (Evidence("loss at first", fact.began), Evidence("loss of the last tenth of the steps", fact.ended))
    return Finding("loss-course", "warmup", "act", f"{title}.", means, advice, "measured", numbers, weight=LOST_RUN)


def _rose(fact: LossCourse) -> bool:
    """Whether the loss ended far above where it began; a loss of 0 or below has no ratio."""
    return fact.began > 0 and fact.ended >= ROSE * fact.began


def _without_spikes(fact: LossCourse) -> Finding:
    """Where the loss went that never jumped."""
    if math.isnan(fact.ended):
        title = (
            f"Not known whether the warmup was long enough: no number was NaN or infinite in {in_steps(fact.steps)}, "
        )
        title += "but losses were not noted."
        advice = "ledger.note(loss) in every step, or after_step(loss)"
        return Finding("loss-course", "warmup", "open", title, "", advice, "open")
    over = f" (the mean of the last {fact.ended_over:,} losses)" if fact.ended_over else ""
    went = f"from {show(fact.began)} to {show(fact.ended)}{over} in {in_steps(fact.steps)}"
    warm = f"with a warmup of {fact.warmup:,} steps" if fact.warmup else "without a warmup"
    numbers = (Evidence("loss at first", fact.began), Evidence("loss of the last tenth of the steps", fact.ended))
    lower = "lower the optimiser's peak learning rate; a warmup alone may not be enough"
    data_first = "look at inputs and labels first; then try a third and three times the peak learning rate"
    if _rose(fact):
        means = "Steps are too long for this loss, or it is not the loss that they descend."
        title = f"The loss rose {went}, {warm}."
        return Finding("loss-course", "warmup", "act", title, means, lower, "measured", numbers, weight=ROSE)
    if fact.began > 0 and fact.ended > FELL * fact.began and fact.highest >= ROSE * fact.began:
        title = f"The loss was thrown back: up to {show(fact.highest)} on the way {went}, {warm}."
        means = "Steps are too long: such a run has lost what it began with, and often learns nothing more."
        return Finding("loss-course", "warmup", "act", title, means, lower, "measured", numbers, weight=ROSE)
    if fact.rise is not None:
        return rose_late(fact, fact.rise)
    if fact.began > 0 and fact.ended > FELL * fact.began:
        means = "The run began near a minimum, or it does not learn: labels that do not belong to their inputs (a loss "
        means += "of ln(classes)), steps too short, or so long that they throw a network back to chance."
        moved = "rose" if fact.ended * FELL > fact.began else "hardly changed"
        title = f"The loss {moved}, {went}, {warm}."
        return Finding(
            "loss-course", "warmup", "watch", title, means, f"if it should fall: {data_first}", "measured", numbers
        )
    if fact.up_at is not None:
        return _went_up(fact, fact.up_at, f"{went}, {warm}")
    fine = "The run went without a warmup"
    if fact.warmup:
        fine = f"Yes, the warmup of {fact.warmup:,} steps was long enough for stability"
    title = f"{fine}: the loss stayed in hand, {went}, and never spiked"
    title += "" if fact.seen is None else f", as far as the {count(fact.seen, 'loss', 'losses')} noted tell"
    title += f". Whether {'another' if fact.warmup else 'a'} warmup or peak rate trains better is not in a log."
    return calm("loss-course", "warmup", title, "measured", numbers)


def _went_up(fact: LossCourse, at: int, went: str) -> Finding:
    """A loss that stood well above its first value and came down again."""
    title = (
        f"The loss stood at {show(fact.highest)} by step {at:,}, {plain(fact.highest / fact.began)} times the first "
    )
    title += f"one, on its way {went}."
    if at <= max(2 * fact.warmup, fact.steps // 10):
        means = "The first steps may have been too long for these weights."
        advice = "try a third of the peak learning rate, and compare the last losses; a longer warmup may not help"
    else:
        means = "A batch out of the ordinary, or steps that became too long there."
        advice = "look at the data of these steps; clip gradients, or lower the learning rate there"
    numbers = (Evidence("loss at first", fact.began), Evidence("largest loss", fact.highest))
    return Finding("loss-course", "warmup", "watch", title, means, advice, "measured", numbers)


def turning(facts: Sequence[Turn], course: LossCourse) -> list[Finding]:
    """How far one step turns scale-invariant weights.

    Threshold: 0.1 radians forget a direction within about 100 steps (a random walk of angle 1), fewer than most data
    sets have batches: to watch. 0.3 forget it within 10: to act on where the loss falls no longer. Where it falls, the
    steps are not too long, whatever the angle: nothing to do. Nothing is said where the last estimates are of steps at
    a learning rate of 0, as at the first of a warmup. A single step of 1 radian drew the weight anew: to watch. (A
    small Llama under AdamW at 0.06 without a warmup was turned by 1.2 in its first step and ended at 2.59 and 2.77 in
    two seeds; at 0.013 at 2.24 and 2.45.)
    """
    known = [f for f in facts if math.isfinite(f.lately)]
    if not known:
        return []
    most, worst = max(known, key=lambda f: f.largest), max(known, key=lambda f: f.lately)
    if most.largest >= ANEW and worst.lately < TURN:
        return [_drawn_anew(most)]
    if worst.lately == 0:
        return []
    number = (Evidence(f"angle per step of {worst.name}", worst.lately, unit="radians"),)
    if worst.lately < TURN:
        title = f"Steps are small: of scale-invariant weights the fastest, `{worst.name}`, lately turned by "
        title += f"{plain(worst.lately)} radians a step"
        title += f", at {plain(worst.rate_share)} of the largest learning rate." if worst.rate_share < LATE else "."
        return [calm("turning", "warmup", title, "measured", number)]
    severity: Severity = "act" if worst.lately >= BIG_TURN and course.stalled else "watch"
    title = f"Each step lately turned `{worst.name}` by {plain(worst.lately)} radians, which is much."
    memory = round(1 / worst.lately**2)
    means = f"Its direction is forgotten within {'one step' if memory <= 1 else f'about {in_steps(memory)}'}."
    advice = f"lower the learning rate of `{worst.name}`"
    advice = advice if course.stalled else unless(advice)
    if course.stalled:
        means += " The loss falls no longer, for which this may be the reason."
    names = (worst.name,)
    return [Finding("turning", "warmup", severity, title, means, advice, "measured", number, names, worst.lately)]


def _drawn_anew(most: Turn) -> Finding:
    """A step that left hardly anything of a weight's direction."""
    title = f"Step {most.at:,} turned `{most.name}` by {plain(most.largest)} radians: it drew the weight anew."
    means = "What the weight had learnt, or begun with, was lost in it."
    advice = "try a third of the peak learning rate from the start, and compare the last losses"
    number = (Evidence(f"largest angle of a step, {most.name}", most.largest, unit="radians"),)
    names = (most.name,)
    return Finding("turning", "warmup", "watch", title, means, advice, "measured", number, names, most.largest)
