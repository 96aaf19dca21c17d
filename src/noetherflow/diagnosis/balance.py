"""Rules on layers and heads: far from their noise equilibrium."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from noetherflow.core.printing import count
from noetherflow.diagnosis.evening import steps_to_even
from noetherflow.diagnosis.facts import LayerBalance, RunBalance
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

FAR, VERY_FAR = math.log(3.0), math.log(10.0)
LAYER_FAR, LAYER_VERY_FAR = math.log(10.0), math.log(30.0)
GAINS = math.log(3.0)
CERTAIN = 2.0
SHOWN = 4
SOON = 0.1
FARTHEST_PART = "farthest channel, unit or head"
"""What the answers of a run and its page rank by; `median` always is that of one layer."""
AT_EQUILIBRIUM = "nf.diagnose(...) finds them at their noise equilibrium"
NO_PROMISE = "That is about noise, steps and the rate that they allow; the loss at the end may not care."
USUAL = "layers of usual initial weights are up to 10 away, gains of 1 up to 30"


def far_from_equilibrium(facts: Sequence[LayerBalance], steps: float, limiting: bool = False) -> list[Finding]:
    """Units, heads and layers whose two sides are far from where gradient noise will put them.

    A coordinate that must be moved by a factor `f` has gradients of `f` times the balanced size on its small side and
    curvature of `f^2` times. Threshold for one unit or head against the median of its layer: `f = 3` is to watch, a
    curvature of 9 times, more than random initialisation scatters; `f = 10` to act on, a curvature of 100 times, which
    lowers the stable learning rate of the whole model as much. For a layer as a whole: 10 and 30, since gains of 1 in
    front of weights of standard deviation 0.02, the usual start of a transformer, are 1 / sqrt(0.02) = 7 off under SGD
    and up to 12 under Adam; gains, one number against a column of weights, get three times as much. Two standard errors
    are taken off first, so that sampling alone finds nothing. No lower loss is promised: a unit scaled by 30 that was
    moved back, in an MLP on digits at a rate far below the stable one, ended at the same loss in two seeds.

    A single one is to act on only where it stays 3 times off until the end of the run (`steps_to_even`), or where the
    curvature that imbalance makes holds down the learning rate of this run (`limiting`); else the steps that it takes
    are told.

    A whole layer asks for nothing where one of its weights is nearly zero, as where it begins at zero (its first steps
    make it grow), or where noise evens the imbalance out within a tenth of the run. (A last layer scaled by 1e-4 was
    both, by 37 steps of 1,000; moved to its noise equilibrium it ended at 0.0034, left as it was at 0.0020.)
    """
    parts = [(f, beyond_layer(f)) for f in facts if np.isfinite(f.factors).any()]
    if not parts and facts:
        title = (
            f"Not known: {count(len(facts), 'pair', 'pairs')} of layers can trade scale (`{facts[0].name}`), but none "
        )
        title += "has a noise equilibrium that these gradients determine."
        advice = "a run's ledger estimates the balance: nf.Ledger(...), then ledger.diagnose()"
        return [Finding("balance", "balance", "open", title, "", advice, "open")]
    if not parts:
        title = "No two layers can trade scale here, so none is imbalanced."
        return [calm("balance", "balance", title, SURE_BY_SYMMETRY)]
    found: list[Finding] = []
    lone = [(f, s) for f, s in parts if s.max() >= FAR]
    if lone:
        found.append(outliers(lone, steps, limiting))
    whole = [f for f, _ in parts if level_of(f) >= LAYER_FAR]
    passing = [f for f in whole if f.small or f.steps <= SOON * steps]
    lasting = [f for f in whole if f not in passing]
    found += [_layers(lasting, steps)] if lasting else []
    found += [_passing(passing, steps)] if passing else []
    if found:
        return found
    worst = max((f for f, _ in parts), key=lambda f: float(np.nanmax(np.abs(f.factors))))
    at = int(np.nanargmax(np.abs(worst.factors)))
    factor, median = (math.exp(abs(float(v))) for v in (worst.factors[at], np.nanmedian(worst.factors)))
    farthest = f"the farthest, {worst.part} {at} of `{worst.name}`, is a factor of {plain(factor)} away, the median of "
    farthest += f"its layer {plain(median)}"
    title = f"None is far from its noise equilibrium: {farthest}."
    if factor >= math.exp(FAR):
        title = f"None stands out from its layer. From its noise equilibrium {farthest}; {USUAL}."
    return [calm("balance", "balance", title, certainty_of(worst, at))]


def beyond_layer(fact: LayerBalance) -> np.ndarray:
    """How far beyond its layer a coordinate is off, less two standard errors; 0 where there is no equilibrium.

    The smaller of `|log factor - median of the layer|` and `|log factor|`: one nearer to its equilibrium than the
    others of its layer are is no outlier to worry about.
    """
    away = np.minimum(np.abs(fact.factors - np.nanmedian(fact.factors)), np.abs(fact.factors))
    return np.nan_to_num(np.maximum(away - CERTAIN * np.nan_to_num(fact.errors, posinf=0.0), 0.0))


def level_of(fact: LayerBalance) -> float:
    """`|median log factor|` of a layer less two standard errors of a coordinate's, and less what gains are granted."""
    level, error = abs(float(np.nanmedian(fact.factors))), np.nan_to_num(fact.errors, posinf=0.0)
    level -= GAINS if fact.part == "channel" else 0.0
    return level - CERTAIN * float(np.median(error)) / math.sqrt(len(error))


def outliers(lone: Sequence[tuple[LayerBalance, np.ndarray]], steps: float, limiting: bool = False) -> Finding:
    """Single units or heads far from the others of their layer: to act on where they stay so, or limit the step.

    `steps` to come, within which noise may even them out; `limiting`: their curvature is what the learning rate is
    held down by.
    """
    ranked = sorted(lone, key=lambda r: -float(r[1].max()))
    worst, sizes = ranked[0]
    at = int(sizes.argmax())
    factor = math.exp(abs(float(worst.factors[at])))
    very_far = [(f, int(i)) for f, s in ranked for i in np.flatnonzero(s >= VERY_FAR)]
    lasting = [f for f, i in very_far if not _evens_out(f, i) <= steps]
    named = [_lone(f, s) for f, s in ranked]
    title = f"{some_of(named)} from the noise equilibrium, unlike the rest of the layer"
    title += f" (worst: {worst.part} {at} of `{worst.name}`)." if len(ranked) > 1 else "."
    severity: Severity = "act" if lasting or (limiting and very_far) else "watch"
    numbers = tuple(evidence_of(f, int(s.argmax())) for f, s in ranked[:SHOWN])
    names = tuple(f.name for f, _ in ranked)
    needed = _evens_out(worst, at)
    if severity == "watch" and needed <= steps:
        title += f" {_evened(needed)}, within this run."
    means, advice = f"{_means(factor, needed, steps)} {NO_PROMISE}", _advice(names, severity)
    weight = float(sizes.max())
    return Finding(
        "balance", "balance", severity, title, means, advice, certainty_of(worst, at), numbers, names, weight
    )


def _evens_out(fact: LayerBalance, at: int) -> float:
    """Steps until this part is off by 3 times only; NaN where that is not known."""
    return steps_to_even(float(fact.factors[at]), float(fact.each[at]) if len(fact.each) else fact.steps)


def _lone(fact: LayerBalance, sizes: np.ndarray) -> str:
    """The units or heads of one layer that are far, with how far the farthest is."""
    which = np.flatnonzero(sizes >= FAR)
    most = math.exp(float(np.abs(fact.factors[which]).max()))
    return f"{_listed(fact, which)} of `{fact.name}` {'up to ' if len(which) > 1 else ''}{plain(most, 3)} times"


def _advice(names: Sequence[str], severity: Severity, until: str = "they stand as their neighbours do") -> str:
    """How to move the parts or layers of these symmetries, and `until` when: at once, or if the loss does not fall.

    By hand, not by `balance_`, which moves all weights: of a small Llama with one head out of balance that made a loss
    of 1.96 one of 2.61, in three seeds of three. Ordinary runs that train well have single units 3 to 10 times off: an
    MLP on digits under Adam had one at 6 times before, and one at 8.6 times after 1,000 steps in which its loss fell
    from 2.3 to 0.09.
    """
    which = some_of([f"`{n}`" for n in names])
    move = f"scale the two sides of {which}, one up and one down by as much, which leaves the function as it is, until "
    move += until
    return move if severity == "act" else unless(move)


def _layers(whole: Sequence[LayerBalance], steps: float) -> Finding:
    """Layers that stand as a whole on one side of their equilibrium."""
    ranked = sorted(whole, key=lambda f: -level_of(f))
    worst, level = ranked[0], level_of(ranked[0])
    at = int(np.nanargmin(np.abs(np.abs(worst.factors) - level)))
    factor = math.exp(abs(float(np.nanmedian(worst.factors))))
    sizes = [math.exp(abs(float(np.nanmedian(f.factors)))) for f in ranked]
    named = [f"`{f.name}` {plain(size, 3)} times" for f, size in zip(ranked, sizes, strict=True)]
    title = f"As a layer {some_of(named)} from the noise equilibrium."
    severity: Severity = "act" if level >= LAYER_VERY_FAR else "watch"
    numbers = tuple(Evidence(f"median log factor of {f.name}", float(np.nanmedian(f.factors))) for f in ranked[:SHOWN])
    means, names = _means(factor, worst.steps, steps), tuple(f.name for f in ranked)
    return Finding(
        "balance-layer",
        "balance",
        severity,
        title,
        means,
        _advice(names, severity, AT_EQUILIBRIUM),
        certainty_of(worst, at),
        numbers,
        names,
        level,
    )


def _passing(whole: Sequence[LayerBalance], steps: float) -> Finding:
    """Layers that are off as a whole, and that the beginning of the run brings back by itself."""
    ranked = sorted(whole, key=lambda f: -level_of(f))
    named = [f"`{f.name}` {plain(math.exp(abs(float(np.nanmedian(f.factors)))), 3)} times" for f in ranked]
    title = f"As a layer {some_of(named)} from the noise equilibrium, which asks for nothing: "
    if ranked[0].small:
        title += f"`{ranked[0].small}` is much smaller than usual initial weights, and its first steps make it grow."
    else:
        title += f"noise evens most of it out over some {in_steps(ranked[0].steps)}, a small part of the run."
    numbers = tuple(Evidence(f"median log factor of {f.name}", float(np.nanmedian(f.factors))) for f in ranked[:SHOWN])
    sure = "likely: at gradients of the present size"
    names = tuple(f.name for f in ranked)
    return Finding("balance-layer", "balance", "good", title, "", NOTHING, sure, numbers, names)


def far_during_run(facts: Sequence[RunBalance], steps: float) -> list[Finding]:
    """The same from the estimates of a ledger, which keep the median and the largest log factor of each layer.

    `steps`: that are still to come.
    """
    known = [f for f in facts if math.isfinite(f.largest)]
    if not known:
        title = "Not in the log: a ledger estimates noise equilibria under SGD with momentum only."
        advice = "nf.diagnose(model, loss_fn, loader, optimizer) measures them"
        return [Finding("balance", "balance", "open", title, "", advice, "open")]
    worst = max(known, key=lambda f: max(f.largest - f.median - FAR, f.median - LAYER_FAR))
    lone, whole = worst.largest - worst.median, worst.median
    numbers = (Evidence(f"largest log factor of {worst.name}", worst.largest), Evidence("median", worst.median))
    sure = "likely: a running estimate from single minibatches, each pair of layers by itself; nf.diagnose measures at "
    sure += "one point and solves all pairs together, which may come out farther"
    factor = math.exp(worst.largest)
    if lone < FAR and whole < LAYER_FAR:
        worst = max(known, key=lambda f: f.largest)
        factor, whole = math.exp(worst.largest), worst.median
        numbers = (Evidence(f"largest log factor of {worst.name}", worst.largest), Evidence("median", whole))
        apart = f"one of `{worst.name}`, a factor of {plain(factor)} away, the median of its layer "
        apart += plain(math.exp(whole))
        title = "None is far from its noise equilibrium, each pair of layers by itself: the "
        title += f"{FARTHEST_PART} is {apart}."
        if factor >= math.exp(FAR):
            title = "None stands out from its layer. From its noise equilibrium, each pair of layers by itself, the "
            title += f"{FARTHEST_PART} is {apart}; {USUAL}."
        return [calm("balance", "balance", title, sure, numbers)]
    needed = steps_to_even(worst.largest, worst.steps)
    lasts = not needed <= steps
    severity: Severity = "act" if (lone >= VERY_FAR and lasts) or whole >= LAYER_VERY_FAR else "watch"
    where = "a part of it" if lone >= FAR else "the whole layer"
    title = f"`{worst.name}` is up to {plain(factor, 3)} times from its noise equilibrium, {where}."
    means = "The small side has gradients and curvature above the balanced ones, which holds down the stable learning "
    means += f"rate. {_phase(needed, steps)}"
    if not lasts and severity == "watch":
        title += f" {_evened(needed)}, within this run."
    names = tuple(f.name for f in known if f.largest - f.median >= FAR or f.median >= LAYER_FAR)
    advice = _advice(names, severity, *([] if lone >= FAR else [AT_EQUILIBRIUM]))
    return [Finding("balance", "balance", severity, title, means, advice, sure, numbers, names, worst.largest)]


def evidence_of(fact: LayerBalance, at: int) -> Evidence:
    error = float(fact.errors[at])
    what = f"{fact.part} {at} of {fact.name}, log factor"
    return Evidence(what, float(fact.factors[at]), error if math.isfinite(error) else None)


def _means(factor: float, needed: float, steps: float) -> str:
    means = (
        f"The small side has gradients about {plain(factor)} times and curvature {plain(factor**2)} times the balanced "
    )
    means += "one, which holds down the stable learning rate. "
    return means + _phase(needed, steps)


def _evened(needed: float) -> str:
    """How fast noise evens something out, most of it: a unit scaled by 30 was back at 3 within 50 steps in an MLP, and
    under AdamW in a small Llama at 5 after the 72 steps foretold and at 4 to 5 after 300, for the function moves too.
    """
    return f"Noise evens most of it out over some {in_steps(needed)}"


def _phase(needed: float, steps: float) -> str:
    """How long noise takes to even an imbalance out, against the run."""
    if not needed > 0 or math.isinf(needed):
        return "How long noise takes to even that out is not known."
    if steps <= 0:
        return f"{_evened(needed)} more; steps=... tells of a run that goes on."
    phase = "within this run (fast phase)" if needed <= steps else "longer than this run (slow phase)"
    return f"{_evened(needed)}, {phase}, with the function held fixed; what the loss does comes on top, either way."


def _listed(fact: LayerBalance, which: np.ndarray) -> str:
    names = ", ".join(str(i) for i in which[:6])
    return f"{fact.part}{'s' if len(which) > 1 else ''} {names}{', ...' if len(which) > 6 else ''}"


def some_of(named: Sequence[str]) -> str:
    return "; ".join(named[:3]) + (f" and {len(named) - 3} more layers" if len(named) > 3 else "")


def certainty_of(fact: LayerBalance, at: int) -> str:
    error = float(fact.errors[at])
    if not math.isfinite(error):
        return "likely: no error bar here, measure more batches for one"
    return f"factor known to {math.exp(error) - 1:.1%}; it is the balance of the function as it is now"
