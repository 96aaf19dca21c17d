"""Rules on attention heads: which stand out from their layer, which contribute next to nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from noetherflow.diagnosis.balance import (
    FAR,
    LAYER_FAR,
    SHOWN,
    beyond_layer,
    certainty_of,
    evidence_of,
    level_of,
    outliers,
)
from noetherflow.diagnosis.facts import LayerBalance, PartActivity
from noetherflow.diagnosis.finding import Evidence, Finding, Severity, calm, in_steps, plain

FAINT, FROZEN_OUT = 0.1, 0.01
MEASURES = "nf.diagnose(model, loss_fn, loader, optimizer) at the last weights"
"""What answers what a log leaves open about heads."""
FROM_A_RUN = (
    "likely: running estimates from single minibatches, each pair by itself, the error their scatter lately; "
    f"{MEASURES} measures all pairs together"
)


@dataclass(frozen=True, eq=False)
class RunHeads:
    """The attention heads of one layer, as a run's log tells of them.

    Attributes:
        balance: how far each lately stood from its noise equilibrium, with the scatter of the last estimates as errors;
            all NaN where the log has no equilibria.
        drift: how much of its squared weights each head's charge has moved by from the first estimate to the last,
            as signed shares. `[heads]`.
        sizes: the product of the norms of both sides of each head, at the end. `[heads]`.
        steps: from the first estimate to the last.
    """

    balance: LayerBalance
    drift: np.ndarray
    sizes: np.ndarray
    steps: float


def heads_apart(facts: Sequence[LayerBalance]) -> list[Finding]:
    """Which attention head is farthest from its noise equilibrium, where none is far enough to worry about.

    Heads beyond the threshold are named by `far_from_equilibrium`, which looks at all parts of all layers.
    """
    heads = [f for f in facts if f.part == "head" and np.isfinite(f.factors).any()]
    if not heads or any(beyond_layer(f).max() >= FAR or level_of(f) >= LAYER_FAR for f in heads):
        return []
    worst = max(heads, key=lambda f: float(np.nanmax(np.abs(f.factors))))
    at = int(np.nanargmax(np.abs(worst.factors)))
    factor, total = math.exp(abs(float(worst.factors[at]))), sum(len(f.factors) for f in heads)
    title = f"Of {total} attention heads (queries with keys and values with outputs count apart) none stands out; the "
    title += f"farthest, head {at} of `{worst.name}`, is a factor of {plain(factor)} from its equilibrium."
    return [calm("balance-heads", "balance", title, certainty_of(worst, at), (evidence_of(worst, at),))]


def heads_in_run(facts: Sequence[RunHeads], steps: float) -> list[Finding]:
    """Which attention heads stand out from their layer by a run's log, and whose charge moved most.

    Thresholds as in `far_from_equilibrium`: 3 times from the noise equilibrium, and beyond the median head of its
    layer, two errors taken off, is to watch, 10 times to act on. A drift by itself is no fault and is only told. Which
    heads get no gradient is not in a log, and said to be open. `steps`: that are still to come.
    """
    if not facts:
        return []
    known = [f.balance for f in facts if np.isfinite(f.balance.factors).any()]
    moved = _moved_most(facts)
    lone = [(f, beyond_layer(f)) for f in known if beyond_layer(f).max() >= FAR]
    faint = _by_size(facts)
    if lone:
        found = outliers(lone, steps)
        return [replace(found, rule="balance-heads", title=f"{found.title} {moved}", sure=FROM_A_RUN), *faint]
    if not known:
        title = f"Not known: this optimiser's log has no noise equilibria. {moved}"
        return [Finding("balance-heads", "balance", "open", title, "", f"{MEASURES} measures them", "open"), *faint]
    worst = max(known, key=lambda f: float(np.nanmax(np.abs(f.factors))))
    at = int(np.nanargmax(np.abs(worst.factors)))
    title = f"Of {sum(len(f.factors) for f in known)} attention heads (queries with keys and values with outputs count "
    title += f"apart) none stands out from its layer: the farthest from its noise equilibrium is head {at} of "
    title += f"`{worst.name}`, a factor of {plain(math.exp(abs(float(worst.factors[at]))))}, the median of its layer "
    title += (
        f"{plain(math.exp(abs(float(np.nanmedian(worst.factors)))))}. {moved} Whether a head gets no gradient is open: "
    )
    title += f"{MEASURES}."
    return [calm("balance-heads", "balance", title, FROM_A_RUN, (evidence_of(worst, at),)), *faint]


def _moved_most(facts: Sequence[RunHeads]) -> str:
    """Which head's charge moved most, beside the median head of its layer."""
    worst = max(facts, key=lambda f: float(np.abs(f.drift).max()))
    head = int(np.abs(worst.drift).argmax())
    text = f"The charge of head {head} of `{worst.balance.name}` moved most in {in_steps(worst.steps)}, by "
    text += f"{plain(float(worst.drift[head]))} of its squared weights"
    return f"{text} (median of its layer {plain(float(np.median(worst.drift)))})."


def _by_size(facts: Sequence[RunHeads]) -> list[Finding]:
    """Heads frozen out by the size of their weights; nothing where there are none, for gradients are not known."""
    parts = [PartActivity(f.balance.name, "head", f.sizes, np.ones(len(f.sizes))) for f in facts]
    return [f for f in frozen_heads(parts) if f.severity != "good"]


def heads_not_logged(layers: Sequence[str]) -> list[Finding]:
    """Attention layers of a log that tells too little of their heads: which of these stand out is open."""
    if not layers:
        return []
    others = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    title = "Which attention heads stand out is not in this log, which has fewer than two estimates of them "
    title += f"(`{layers[0]}`{others})."
    return [Finding("balance-heads", "balance", "open", title, "", f"{MEASURES} names them", "open")]


def frozen_heads(facts: Sequence[PartActivity]) -> list[Finding]:
    """Attention heads that contribute next to nothing beside the others of their layer, or get no gradient.

    Compared is the product of the norms of both sides (value and output, query and key), and the root mean squared
    gradient, with the layer's median. Threshold: a tenth is to watch; a hundredth to act on: the gradient of each side
    is the other side's size, so that a head whose sides are both small learns ten times or more slower than its
    neighbours. (Of a head whose output weights alone were scaled by 1e-4, these grew to 0.2 of the others' in 50 steps
    of AdamW, and the loss ended where it does without: 1.966 and 1.962.)
    """
    layers = [f for f in facts if f.part == "head" and len(f.weight) > 1]
    if not layers:
        return []
    found = [(f, h, share) for f in layers for h, share in _faint(f)]
    if not found:
        return [calm("frozen-heads", "balance", "No attention head is frozen out.", "sure on the data measured")]
    ranked = sorted(found, key=lambda r: r[2])
    worst, head, share = ranked[0]
    listed = ", ".join(f"head {h} of `{f.name}`" for f, h, _ in ranked[:SHOWN]) + (
        ", ..." if len(ranked) > SHOWN else ""
    )
    title = f"Frozen out: {listed}, at {plain(share)} of its layer's median head."
    means = "Its weights or their gradients are that much smaller. The gradient of each side is as large as the other "
    means += "side, and that of queries and keys goes with values and outputs: where one side alone is small it grows "
    means += "within tens of steps, where both are it lags (sides of 0.01 under AdamW: a half of the median head after "
    means += "300 steps)."
    advice = f"look for a mask or a skipped initialisation; ask again after 50 steps, and if head {head} of "
    advice += f"`{worst.name}` is still behind, draw it anew"
    severity: Severity = "act" if share < FROZEN_OUT else "watch"
    numbers = tuple(Evidence(f"head {h} of {f.name} over the median", s) for f, h, s in ranked[:SHOWN])
    names, weight = tuple(dict.fromkeys(f.name for f, _, _ in ranked)), -math.log(max(share, 1e-12))
    sure = "sure on the data measured"
    return [Finding("frozen-heads", "balance", severity, title, means, advice, sure, numbers, names, weight)]


def _faint(fact: PartActivity) -> list[tuple[int, float]]:
    """Heads below `FAINT` of the median, with their share of it, by weights or by gradients."""
    shares = np.ones(len(fact.weight))
    for values in (fact.weight, fact.gradient):
        level = float(np.median(values))
        if level > 0:
            shares = np.minimum(shares, values / level)
    return [(int(h), float(shares[h])) for h in np.flatnonzero(shares < FAINT)]
