"""Rules on norms: those that grow without a counterweight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from noetherflow.core.members import some_named
from noetherflow.core.printing import count
from noetherflow.diagnosis.facts import (
    FALLEN,
    LossCourse,
    NormHistory,
    NormTrend,
    ScaleInvariantNorm,
)
from noetherflow.diagnosis.finding import (
    NOTHING,
    SURE_BY_SYMMETRY,
    Evidence,
    Finding,
    Severity,
    calm,
    in_steps,
    plain,
    unless,
)

HALVED, TENTH = 2.0, 10.0
TRENDS = 3
DOUBLES = 1.0
MOVES, STILL = 1.01, 1e-3
HIDDEN = "scale-invariant weight", "scale-invariant weights"
NONE_HIDDEN = "The model has no scale-invariant weight: the loss feels the norm of every watched weight."


def norm_growth(facts: Sequence[ScaleInvariantNorm], steps: float) -> list[Finding]:
    """What the norms of scale-invariant weights do to the effective learning rate over the steps to come.

    The largest change on the way counts, not that at the end: a longer run can only find more.

    Threshold: a change by a factor of 2 is to watch, since it is what halving the learning rate by hand would do, a
    step that schedules take on purpose. It is never to act on: a falling learning rate is no fault, and runs that train
    well show it. (With the decay raised until norms settled, two such runs of 1,000 steps ended at a higher loss.)

    The range given is the change to the powers `LEAST` and `MOST`. It holds all that was measured in nine runs of 1,000
    steps: a BatchNorm network under SGD with momentum, a LayerNorm network under Adam, a small Llama under AdamW. What
    dominates the error is that gradients are taken to stay as large as they are: where the loss falls to near 0 within
    a tenth of the run, noise and mean gradient end there, and so does growth (powers 0.4 to 0.5); where the mean
    gradient goes on to point one way for longer than its size tells, growth is larger (power 1.2 to 1.3 in the Llama).
    """
    if not facts:
        return [calm("norm-growth", "norms", NONE_HIDDEN, SURE_BY_SYMMETRY)]
    worst = max(facts, key=lambda f: _size(f, steps))
    at = worst.farthest(steps)
    size, change = _size(worst, steps), worst.learning_rate_factor(at)
    number = count(len(facts), *HIDDEN)
    error = None if worst.growth_error is None else worst.growth_error / worst.norm_square
    numbers = (
        Evidence(f"squared norm's growth by gradients per step, {worst.name}", worst.growth / worst.norm_square, error),
        Evidence("what weight decay takes of it per step", worst.decay),
    )
    if size < HALVED:
        title = "Of norms that the loss ignores none much, at present gradients: "
        title += f"of {number} the norm of `{worst.name}` changes the effective "
        title += f"learning rate most, by a factor of about {plain(size)} within {in_steps(steps)}"
        title += f" ({_range(size)}). {GUIDE}."
        return [calm("norm-growth", "norms", title, _sure(worst), numbers)]
    over = [f for f in facts if _size(f, steps) >= HALVED]
    grown = worst.norm_factor(at) ** 0.5
    same = [f for f in over if (f.learning_rate_factor(f.farthest(steps)) < 1) == (change < 1)]
    title = f"{len(same)} of {number} {_verb(len(same), change)}: the norm of `{worst.name}` becomes about "
    title += f"{plain(grown)} times as large in {in_steps(at)}"
    title += f" ({_range(grown)})" if grown > 1 else ""
    title += (
        f", its effective learning rate {plain(change)} times today's{', schedule apart' if worst.course.known else ''}"
    )
    title += f" ({_range(change)})" if change < 1 else ""
    title += f". {GUIDE}."
    means = _means(larger=change < 1)
    names = tuple(f.name for f in over)
    advice, weight = _advice(worst, change), math.log(size)
    return [Finding("norm-growth", "norms", "watch", title, means, advice, _sure(worst), numbers, names, weight)]


def _means(larger: bool) -> str:
    """What a norm that the loss ignores does to the steps."""
    turn = "a larger one makes every step turn the weight by less" if larger else ""
    turn = turn or "a smaller one makes every step turn the weight by more"
    return f"The loss ignores this norm, but {turn}: a learning rate schedule that nobody wrote."


def _on_the_way(facts: Sequence[NormHistory], size: float) -> str:
    """The largest change of an effective learning rate where it is much larger than the largest of the ends, `size`.

    Effective learning rates are a power of the squared norm, the same for all: the norm that changed most tells it.
    """
    moved = max(facts, key=lambda f: abs(math.log(f.norm_factor)))
    if moved.norm_factor == 1:
        return ""
    power = abs(math.log(moved.rate_factor) / math.log(moved.norm_factor))
    highest = max(facts, key=lambda f: f.peak if math.isfinite(f.peak) else 0.0)
    if not highest.peak**power > MUCH_MORE * size:
        return ""
    which = f"`{highest.name}` changed it by {plain(highest.peak**power)}"
    return f", but at step {highest.peak_step:,.0f}, where its norm was largest, {which}"


MUCH_MORE = 1.2
"""How many times the change at the end one on the way must be to be told of."""


def _way(fact: NormHistory) -> str:
    """What the ends of a norm's course do not tell; nothing where it ends at its largest."""
    return f" ({plain(fact.peak**0.5)} times at step {fact.peak_step:,.0f}, falls since)" if fact.falls else ""


GUIDE = "A guide, no bound: gradients change as the loss falls"
LEAST, MOST = 0.3, 1.6
"""Powers of a predicted growth between which that of twelve measured runs lies (0.38 to 1.5), with a margin."""


def _range(factor: float) -> str:
    """From where to where a change predicted as `factor` came out in the runs that were measured."""
    return f"{plain(factor**LEAST)} to {plain(factor**MOST)}"


def _verb(number: int, change: float) -> str:
    return ("grow" if change < 1 else "shrink") + ("s" if number == 1 else "")


def _size(fact: ScaleInvariantNorm, steps: float) -> float:
    """The largest factor by which the effective learning rate changes within so many steps, up or down."""
    factor = fact.learning_rate_factor(fact.farthest(steps))
    return max(factor, 1 / factor)


def _advice(worst: ScaleInvariantNorm, change: float) -> str:
    if change > 1:
        return unless(_smaller(worst.name), "if it turns noisy or rises")
    return unless(_larger(worst.name, change))


def _smaller(name: str) -> str:
    return f"try a third of the weight decay of `{name}`, which shrinks its norm"


def _larger(name: str, change: float) -> str:
    """What gives steps their length back where the effective learning rate is, or will be, so many times smaller; ten
    times at most.
    """
    rate = f"{plain(min(1 / change, TENTH))} times the learning rate for `{name}`"
    return f"try from a checkpoint, and keep it only if the loss then falls, {rate}, which makes up for its norm"


def _sure(worst: ScaleInvariantNorm) -> str:
    rests = "gradients of the present size for all these steps, and of the present direction for as long as the mean "
    rests += "gradient can last, at "
    rests += "the schedule given" if worst.course.known else "a constant learning rate"
    if worst.growth_error is None or not worst.growth > 0:
        return f"a guide: {rests}"
    share = worst.growth_error / worst.growth
    return f"a guide: {rests} (sampling error {share:.0%})"


def norms_so_far(facts: Sequence[NormHistory], course: LossCourse, watched: int) -> list[Finding]:
    """What norms of scale-invariant weights did to the effective learning rate over a run.

    `watched`: how many such weights the ledger watches; those that it estimated once or never have no history.

    Threshold: a factor of 2 is to watch, as above. By itself it is no fault: only where the effective learning rate
    fell to a tenth and the loss falls no longer is there something to act on, for steps have then become too short to
    get on by; at a half there is something to try. Where the loss falls, or nobody noted it, nothing is to be done.
    """
    known = [f for f in facts if math.isfinite(f.rate_factor) and f.rate_factor > 0]
    if not watched:
        title = "No scale-invariant weight is watched: the loss feels the norm of every watched weight."
        return [calm("norm-growth", "norms", title, SURE_BY_SYMMETRY)]
    if not known:
        title = f"Not in the log: {count(watched, *HIDDEN)} {'is' if watched == 1 else 'are'} watched, but a change "
        title += "takes two estimates of a norm, and there is one at most."
        advice = "nf.Ledger(..., estimate_every=...) with fewer steps between estimates, or a longer run"
        return [Finding("norm-growth", "norms", "open", title, "", advice, "open")]
    worst = max(known, key=lambda f: abs(math.log(f.rate_factor)))
    size = max(worst.rate_factor, 1 / worst.rate_factor)
    numbers = (Evidence(f"squared norm of {worst.name}, at the end over the beginning", worst.norm_factor),)
    number = count(len(known), *HIDDEN)
    if size < HALVED:
        title = f"Of norms that the loss ignores none much: of {number} "
        title += f"the norm of `{worst.name}` changed the effective learning rate most, by a "
        title += f"factor of {plain(size)} {worst.span}{_on_the_way(known, size)}."
        return [calm("norm-growth", "norms", title, "measured", numbers)]
    over = tuple(f.name for f in known if abs(math.log(f.rate_factor)) >= math.log(HALVED))
    slowed = course.slowed and worst.rate_factor < 1
    severity: Severity = "act" if size >= TENTH and slowed else "watch"
    changed = "grew" if worst.norm_factor > 1 else "shrank"
    grown = worst.norm_factor**0.5
    same = [f for f in known if f.name in over and (f.norm_factor > 1) == (worst.norm_factor > 1)]
    title = f"{len(same)} of {number} {changed}: the norm of `{worst.name}` is {plain(grown)} times what it was "
    title += f"{in_steps(worst.steps)} before ({worst.span}), its effective learning rate {plain(worst.rate_factor)} "
    title += "times, schedule apart."
    if len(same) > 1:
        title += (
            f" In the median their norms are {plain(median(f.norm_factor**0.5 for f in same))} times what they were."
        )
    if len(over) > len(same):
        title += (
            f" {len(over) - len(same)} {'shrank' if worst.norm_factor > 1 else 'grew'} enough to change theirs twofold."
        )
    means = _means(larger=worst.rate_factor < 1)
    if worst.falls:
        title += f" It was largest at step {worst.peak_step:,.0f} ({plain(worst.peak**0.5)} times), and falls since."
    if slowed:
        means += " The loss falls no longer, for which this may be the reason; or it is as low as it gets."
        advice = _larger(worst.name, worst.rate_factor)
    elif worst.rate_factor < 1:
        advice = unless(_larger(worst.name, worst.rate_factor))
    else:
        advice = _smaller(worst.name)
        advice = unless(advice, "if it turns noisy or rises") if course.rise is None else advice
    weight = math.log(size)
    return [Finding("norm-growth", "norms", severity, title, means, advice, "measured", numbers, over, weight)]


MOVING = [
    Finding(
        "norms-to-come",
        "norms",
        "open",
        "How far the norms that the loss feels grow in training cannot be told yet: the mean gradient counts and does "
        "not last, and it moves them.",
        "",
        "let nf.Ledger(...) measure it while it trains: ledger.diagnose()",
        "open",
    )
]


def norms_to_come(facts: Sequence[NormTrend], moving: bool = False) -> list[Finding]:
    """Where noise and decay take the norms that the loss feels, the function held fixed; below 1 % counts as nothing.

    Open where the function is `moving`: a mean gradient that counts and does not last changes it.
    """
    if moving:
        return MOVING
    known = sorted((f for f in facts if f.settles > 0 and math.isfinite(f.settles)), key=lambda f: -f.settles)
    if not known:
        return []
    grown, less = ([f for f in known if f.settles**sign >= MOVES] for sign in (1, -1))
    parts = [_moved(grown, "up"), _moved(less[::-1], "down")]
    title = "Gradient noise and decay alone, to which training itself adds more, "
    title += f"take norms {'; '.join(p for p in parts if p)}." if any(parts) else "leave all norms as they are."
    numbers = tuple(Evidence(f"norm of {f.name} at the noise equilibrium over now", f.settles) for f in known)
    sure = "how the two sides of symmetries trade; what changes the function, training itself, comes on top"
    return [calm("norms-to-come", "norms", title, sure, numbers)]


def _moved(facts: Sequence[NormTrend], where: str) -> str:
    """How many norms go this way, how far in the median, and which of them farthest, the first."""
    if not facts:
        return ""
    most = f"`{facts[0].name}` to {plain(facts[0].settles)} times"
    if len(facts) == 1:
        return f"{where}: {most}"
    middle = median(f.settles for f in facts)
    return f"{where}: {len(facts)} norms, to {plain(middle)} times in the median, most {most}"


def next_step(facts: Sequence[NormTrend], moving: bool = False, warmup: bool = False) -> list[Finding]:
    """What the very next step of plain SGD does to norms, apart from where they go: `moving` as above.

    It is no trend: its part along the mean gradient often turns within a few steps. With a `warmup` it is at the first
    of its learning rates. Threshold: a squared norm that doubles within one step is to watch; below, the loss guides
    these norms. That of a nearly zero weight is no news.
    """
    when = "In the very next step only,"
    when += " at the first learning rate of the warmup," if warmup else ""
    rising, falling = _by_direction(facts)
    sure = "the present gradients alone: many of these turn within a few steps"
    if not rising:
        return [calm("fastest-norms", "norms", f"{when} no weight's norm grows in a step.", sure)]
    shown = rising[:TRENDS]
    fewer = f" and {_shrink(len(falling))}" if falling else ""
    title = f"{when} {_of(len(rising), len(facts))}{fewer} (norm per step): "
    title += f"{_paces(rising, 'growing')}{'; ' + _paces(falling, 'shrinking') if falling else ''}."
    turning = [] if moving else [f.name for f in rising if 0 < f.settles <= 1 / MOVES]
    if turning:
        title += f" Noise then shrinks {some_named(turning)}."
    numbers = tuple(Evidence(f"squared norm's change per step, {f.name}", f.change / f.norm_square) for f in shown)
    paces, names = {f.name: f.change / f.norm_square for f in rising}, tuple(f.name for f in rising)
    fast = [f.name for f in rising if paces[f.name] >= DOUBLES and not f.is_small]
    small = [f.name for f in rising if paces[f.name] >= DOUBLES and f.is_small]
    if small:
        title += f" Much smaller than usual initial weights, so that they grow at once: {some_named(small)}."
    if fast:
        pace = paces[fast[0]]
        means = "At this pace a squared norm doubles within a step."
        slower = plain(math.sqrt(10 * pace))  # what gradients add goes as the square of the rate
        advice = unless(f"lower the learning rate of {some_named(fast)} {slower} times, for a tenth a step, or warm up")
        return [Finding("fastest-norms", "norms", "watch", title, means, advice, sure, numbers, names, pace)]
    return [Finding("fastest-norms", "norms", "good", title, "", NOTHING, sure, numbers, names)]


def _by_direction(facts: Sequence[NormTrend]) -> tuple[list[NormTrend], list[NormTrend]]:
    """The weights whose norms grow and those whose norms shrink, for their size the fastest first."""
    moving = sorted((f for f in facts if f.norm_square > 0), key=lambda f: -abs(f.change) / f.norm_square)
    return [f for f in moving if f.change > 0], [f for f in moving if f.change < 0]


def _paces(facts: Sequence[NormTrend], which: str) -> str:
    """How fast norms change in the median, and which of them fastest, the first; in percent of the norm per step."""
    paces = [100 * abs(math.sqrt(max(0.0, 1 + f.change / f.norm_square)) - 1) for f in facts]
    fastest = f"`{facts[0].name}` {plain(paces[0])} %"
    return f"{which} by {plain(median(paces))} % in the median, fastest {fastest}" if len(facts) > 1 else fastest


def _shrink(number: int) -> str:
    return f"{number} {'shrinks' if number == 1 else 'shrink'}"


def _of(some: int, number: int) -> str:
    return f"{some} of {number} weights {'grows' if some == 1 else 'grow'}"


def _factors(facts: Sequence[NormHistory], to: str) -> str:
    """How many times as large norms are in the median, and which of them changed most, the first."""
    most = f"`{facts[0].name}` {to}{plain(facts[0].norm_factor ** 0.5, 3)} times"
    if len(facts) == 1:
        return most
    return f"{to}{plain(median(f.norm_factor**0.5 for f in facts), 3)} times in the median, most {most}"


def grown_layers(facts: Sequence[NormHistory]) -> list[Finding]:
    """Which layers' norms grew most over a run, whether the loss feels them or not.

    Threshold: ten times is to watch. A step of the same length then turns or stretches the layer by a tenth of what it
    did, and most schedules end at a tenth of the peak. Layers that begin at 0, such as adapters, have no factor.
    """
    if not facts:
        return []
    ranked = sorted(facts, key=lambda f: -f.norm_factor)
    grown = [f for f in ranked if f.norm_factor > 1 + STILL]
    shrunk = [f for f in ranked[::-1] if f.norm_factor < 1 - STILL]
    longest = max(facts, key=lambda f: f.steps)
    steps = in_steps(longest.steps)
    numbers = tuple(Evidence(f"norm of {f.name}, now over then", f.norm_factor**0.5) for f in grown[:TRENDS])
    if not grown:
        title = f"No layer's norm grew in {steps}."
        highest = max(facts, key=lambda f: f.peak if math.isfinite(f.peak) else 0.0)
        if highest.falls and highest.peak > 1 / FALLEN:
            title = f"No layer's norm is larger than {steps} before; but `{highest.name}` was "
            title += f"{plain(highest.peak**0.5)} times as large at step {highest.peak_step:,.0f}."
        return [calm("grown-layers", "norms", title, "measured")]
    title = f"The norms of {len(grown)} of {count(len(facts), 'layer', 'layers')} grew in {steps} ({longest.span}): "
    title += f"{_factors(grown, '')}{_way(grown[0])}"
    title += f"; {len(shrunk)} shrank: {_factors(shrunk, 'to ')}." if shrunk else "."
    over = tuple(f.name for f in grown if f.norm_factor**0.5 >= TENTH)
    if not over:
        return [calm("grown-layers", "norms", title, "measured", numbers)]
    means = f"A step of the same length changes {'it' if len(over) == 1 else 'them'} by a tenth or less of what it did."
    advice = unless(f"halve the learning rate of `{over[0]}`, which holds it back")
    weight = math.log(grown[0].norm_factor)
    return [Finding("grown-layers", "norms", "watch", title, means, advice, "measured", numbers, over, weight)]
