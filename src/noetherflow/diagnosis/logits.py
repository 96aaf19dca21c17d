"""Rules on attention logits: how far they spread where a model was run, how query and key norms grow in a log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from noetherflow.core.printing import count
from noetherflow.diagnosis.finding import Evidence, Finding, Severity, calm, in_steps, plain, unless

GROWN, GROWN_PREDICTED = 3.0, 10.0
LOGITS, LOGITS_SATURATE = 3.0, 10.0
ALIGNED = "norms alone: trained queries and keys align, so that logits are larger, ten times in a small Llama"


@dataclass(frozen=True)
class LogitSpread:
    """How far the attention logits of one head spread, measured, and what its query and key norms will do.

    Attributes:
        module: that computes the attention.
        head: the head.
        seen: standard deviation of its logits over the keys that a query may look at, root mean square over queries.
        factor: by which noise alone makes `|W_q|^2 + |W_k|^2` grow over the steps to come, at most; 1 where unknown.
        steps: these steps.
    """

    module: str
    head: int
    seen: float
    factor: float
    steps: float

    @property
    def later(self) -> float:
        """The spread at the end of these steps, if nothing but the norms changes."""
        return self.seen * self.factor


@dataclass(frozen=True)
class LogitGrowth:
    """Query and key weights of one attention layer: their norms bound the attention logits.

    Attributes:
        name: of the symmetry.
        head: the head concerned, None for the whole layer.
        factor: by which `|W_q|^2 + |W_k|^2` grows over the steps looked at.
        spread: about the root mean square of the logits at the end, `|W_q| |W_k| / head width` for inputs with entries
            of about 1, as a normalisation gives them.
        steps: over how many steps.
        measured: it has grown by that much; else it will, by noise and decay alone.
    """

    name: str
    head: int | None
    factor: float
    spread: float
    steps: float
    measured: bool


def logit_spread(facts: Sequence[LogitSpread]) -> list[Finding]:
    """How far attention logits spread, as they were measured with the gradients.

    Threshold: a spread of 10, for `e^-10` is below what bfloat16 tells from 0 beside 1, so that attention is a hard
    choice; and growth of the squared norms by 10 times, an upper bound, to a spread of at least 3: `e^3 = 20` turns a
    soft maximum over a few tokens into a choice. Both are no fault while the loss falls.
    """
    if not facts:
        return []
    worst, grown = max(facts, key=lambda f: f.seen), max(facts, key=lambda f: f.later)
    layers = count(len({f.module for f in facts}), "layer", "layers")
    numbers = (Evidence(f"spread of the logits of {_head(worst)}", worst.seen),)
    title = f"Attention logits spread by {plain(worst.seen)} over the keys of a query in {_head(worst)}, the most of "
    title += f"{count(len(facts), 'head', 'heads')} in {layers} (root mean square over queries)"
    sure = "measured on these data, at these weights"
    if worst.seen >= LOGITS_SATURATE:
        title += ": attention is nearly a hard choice."
        means = "A softmax of such logits passes hardly a gradient on."
        return [_large(title, means, sure, numbers, worst, worst.seen)]
    if grown.factor >= GROWN_PREDICTED and grown.later >= LOGITS:
        title += f"; noise pushes the squared query and key norms of {_head(grown)} up {plain(grown.factor)} times in "
        title += f"{in_steps(grown.steps)} at most, which would make that {plain(grown.later)}."
        means = "Large logits turn attention into a hard choice and stop its gradient."
        return [_large(title, means, sure, numbers, grown, grown.later)]
    return [calm("logit-growth", "norms", f"{title}.", sure, numbers)]


def still_norms(facts: Sequence[LogitGrowth]) -> list[Finding]:
    """What is said of a model whose logits were not seen, as in a fused kernel, and whose norms hardly grow."""
    if not facts:
        return []
    most = max(facts, key=lambda f: f.factor)
    title = (
        f"Nothing drives attention logits up: noise and decay change the squared query and key norms of `{most.name}` "
    )
    title += f"by a factor of {plain(most.factor)} at most in {in_steps(most.steps)}."
    return [calm("logit-growth", "norms", title, "norms alone: the logits themselves were not seen")]


def _large(
    title: str, means: str, sure: str, numbers: tuple[Evidence, ...], fact: LogitSpread, spread: float
) -> Finding:
    """Logits that are large, or may become so."""
    advice, where = unless(_remedy(_place(fact.module))), (fact.module,)
    return Finding("logit-growth", "norms", "watch", title, means, advice, sure, numbers, where, math.log(spread))


def _head(fact: LogitSpread) -> str:
    return f"head {fact.head} of {_place(fact.module)}"


def _place(module: str) -> str:
    return f"`{module}`" if module else "the model"


def _remedy(where: str) -> str:
    return f"normalise the queries and keys of {where} (QK-norm), or halve their learning rate"


def logit_growth(facts: Sequence[LogitGrowth], stalled: bool = False) -> list[Finding]:
    """Attention logits that query and key norms drive up, where the logits themselves were not seen, as in a log.

    Said only where squared norms grew by a factor of 3 (10 where it is a prediction, an upper bound). Where queries and
    keys are unrelated the spread follows from the norms; where they align it is larger, so that small norms clear
    nothing: below a spread of 3 (`e^3 = 20` turns a soft maximum over a few tokens into a choice) it is told what
    measures the logits, and no more, for growth from tiny initial weights is how attention begins to work. A spread of
    10 that was measured is to act on where the loss falls no longer (`stalled`): `e^-10` is below what bfloat16 tells
    from 0 beside 1.
    """
    grown = [f for f in facts if f.factor >= (GROWN if f.measured else GROWN_PREDICTED)]
    if not grown:
        return []
    worst = max(grown, key=lambda f: f.spread)
    head = "" if worst.head is None else f"head {worst.head} of "
    numbers = (
        Evidence(f"growth of squared norms, {head}{worst.name}", worst.factor, unit="times"),
        Evidence("spread of its logits by norms alone, about", worst.spread),
    )
    verb = "have grown" if worst.measured else "are pushed to grow"
    title = f"quared query and key norms of {head}`{worst.name}` {verb} {plain(worst.factor)} times in "
    title += in_steps(worst.steps)
    if worst.spread < LOGITS:
        advice = unless("nf.diagnose(model, loss_fn, loader, optimizer) at the last weights measures the logits")
        return [Finding("logit-growth", "norms", "good", f"S{title}.", "", advice, ALIGNED, numbers)]
    severity: Severity = "act" if worst.spread >= LOGITS_SATURATE and worst.measured and stalled else "watch"
    title = f"Attention logits grow: s{title}, which by itself makes logits of about {plain(worst.spread)}; where "
    title += "queries and keys align, as trained ones do, they are several times larger."
    means = "Their product bounds the logits; large ones turn attention into a hard choice and stop its gradient."
    advice = _remedy(f"`{worst.name}`")
    advice = advice if severity == "act" else unless(advice)
    weight = math.log(worst.spread)
    return [Finding("logit-growth", "norms", severity, title, means, advice, ALIGNED, numbers, (worst.name,), weight)]
