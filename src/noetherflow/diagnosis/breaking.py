"""Rules on what breaks symmetries: the loss, the optimiser, other hands on the weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from noetherflow.core.printing import count
from noetherflow.diagnosis.finding import Evidence, Finding, Severity, calm, plain, unless
from noetherflow.diagnosis.penalty import NormPull

BROKEN, BEYOND_EPS = 0.01, 0.1
MOVED = 0.5
TOUCHED = 0.01
UNDETERMINED = "undetermined"
LEFT_OUT = "What is said about norms and balance leaves these layers out."
OUTSIDE_EVENTS = ("edited", "unexplained", "replaced")


def broken_by_the_loss(refused: Mapping[str, str], silent: Mapping[str, int] | None = None) -> list[Finding]:
    """Symmetries of the architecture that the certificate found broken or could not prove: by name the reason.

    `silent`: how many units of one get no gradient; the outputs then do not depend on their weights, which proves
    nothing and breaks nothing.

    Threshold: the certificate's own, which compares in float64 with rounding; nothing is left to choose here.
    """
    silent = silent or {}
    unproved = {n: why for n, why in refused.items() if why.endswith(UNDETERMINED)}
    broken = {n: why for n, why in refused.items() if n not in unproved}
    if not refused:
        return [calm("certificate", "invariance", "All symmetries hold, checked in float64.")]
    return [*([_broken(broken)] if broken else []), *([_unproved(unproved, silent)] if unproved else [])]


def _broken(refused: Mapping[str, str]) -> Finding:
    """Symmetries that do not hold."""
    name, why = next(iter(refused.items()))
    title = f"{count(len(refused), 'symmetry is', 'symmetries are')} broken (`{name}`: {why})."
    advice = (
        "nf.explain(model, example_inputs, parameter) says what breaks it, often a detach, a hook or an own backward"
    )
    sure, names = "sure: checked in float64", tuple(refused)
    return Finding("certificate", "invariance", "watch", title, LEFT_OUT, advice, sure, (), names, len(refused))


def _unproved(refused: Mapping[str, str], silent: Mapping[str, int]) -> Finding:
    """Symmetries of which nothing was proved, for the outputs do not depend on some of their weights."""
    name = max(refused, key=lambda n: silent.get(n, 0))
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    number = silent.get(name, 0)
    if number:
        title = (
            f"`{name}`{more} could not be certified: {count(number, 'unit gets', 'units get')} no gradient on these "
        )
        title += "data, so the outputs do not show whether its symmetry holds. It is not broken by that."
        means = f"{LEFT_OUT} Whether units are dead is judged all the same."
    else:
        title = (
            f"`{name}`{more} could not be certified: the outputs do not depend on some of its weights, or differ at "
        )
        title, means = f"{title}each call.", LEFT_OUT
    advice = "pass example_inputs=... on which all units are active; nf.certify(model, symmetries, inputs) says more"
    return Finding("certificate", "invariance", "open", title, means, advice, "open", (), tuple(refused))


def violated_in_training(
    checks: Sequence[tuple[str, float]],
    normalised: Collection[str] = (),
    pulls: Mapping[str, NormPull] = MappingProxyType({}),
) -> list[Finding]:
    """Symmetries that the gradients of a run violate: `(name, |theta^T A g| / (|theta| |g|))`.

    `normalised`: those of weights whose scale a normalisation takes out; `pulls`: what the gradients do to their norms
    step by step, as far as the log tells.

    Threshold: rounding leaves 1e-6 in float32 and 1e-3 in bfloat16; at 0.01 the loss itself depends on the position
    along the symmetry (a penalty on weights or logits, dropout between the legs). Before a normalisation its eps does
    the same, by about eps over the variance that it divides by: with the usual 1e-5 a violation of 0.01 is a variance
    of 1e-3, which weights that decay has shrunk come to, and 0.1 one of 1e-4. Where the pull on the norm is steady it
    is a penalty's (`NormPull`), and eps is named beside it where what scatters is still beyond the threshold; where it
    is not, eps is named, and nothing is to be done as long as the loss falls. Where the log has no such pull eps is
    named up to 0.1; beyond, or without a normalisation, a penalty.
    """
    known = [(n, c) for n, c in checks if math.isfinite(c)]
    if not known:
        return []
    broken = [(n, c) for n, c in known if c >= BROKEN]
    held = [(n, c) for n, c in broken if n in normalised and n in pulls and pulls[n].is_penalty]
    if held:
        name, worst = max(held, key=lambda r: r[1])
        rest = [(n, c) for n, c in broken if n not in normalised]
        also = [_by_the_loss(*max(rest, key=lambda r: r[1]))] if rest else []
        return [_penalised(name, worst, pulls[name]), *also]
    explained = [(n, c) for n, c in broken if n in normalised]
    explained = [(n, c) for n, c in explained if n in pulls or c < BEYOND_EPS]
    if explained and all(c < BROKEN for n, c in known if (n, c) not in explained):
        name, worst = max(explained, key=lambda r: r[1])
        return [_eps(name, worst, name in pulls)]
    name, worst = max((r for r in known if r not in explained), key=lambda r: r[1])
    if worst < BROKEN:
        number = (Evidence(f"violation of {name}", worst),)
        return [calm("violation", "invariance", f"Gradients obey all symmetries, to {worst:.1g}.", "measured", number)]
    return [_by_the_loss(name, worst)]


def _by_the_loss(name: str, violation: float) -> Finding:
    """A symmetry that something besides the function breaks."""
    number = (Evidence(f"violation of {name}", violation),)
    title = f"The loss breaks `{name}`: its gradients violate it by {plain(violation)}."
    means = "Something besides the model's function enters the loss: a penalty, or noise between the two layers."
    advice = f"if no penalty on `{name}` is meant, look for one, or for dropout between its layers; else give the "
    advice += "optimiser weight_decay in its place, and take the charge as driven by it"
    return Finding("violation", "invariance", "watch", title, means, advice, "measured", number, (name,), violation)


def _penalised(name: str, violation: float, pull: NormPull) -> Finding:
    """A weight before a normalisation that a penalty inside the loss pulls at; and eps with it where that counts."""
    strength = f"about {plain(pull.strength)} |W|^2" if not pull.adaptive else "some c |W|^2"
    title = f"The loss holds a penalty on the norm of `{name}`, {strength}: gradients violate its scale by "
    title += f"{plain(violation)}, and pull on the norm alike at every step."
    rest = violation * pull.rest
    if rest >= BROKEN:
        title += f" The eps of the normalisation after it counts as well, by about {plain(rest)}."
    means = "The model's function does not depend on that norm: the penalty makes it smaller and steps longer, and the "
    means += "charge is driven by it."
    decay = f"weight_decay={plain(2 * pull.strength)}" if not pull.adaptive else "weight_decay"
    advice = f"take the penalty on `{name}` out of the loss and give the optimiser {decay} for it"
    advice += ", which is booked as decay" if pull.adaptive else ", which makes the same steps and is booked as decay"
    numbers = (Evidence(f"violation of {name}", violation), Evidence("scatter of the pull on the norm", pull.scatter))
    sure = "measured: the pull of eps scatters from step to step and changes as the loss falls"
    return Finding("violation", "invariance", "watch", title, means, advice, sure, numbers, (name,), 1 + violation)


def _eps(name: str, violation: float, by_steps: bool) -> Finding:
    """A weight before a normalisation that is small enough for the eps of it to count."""
    number = (Evidence(f"violation of {name}", violation),)
    title = f"The scale of `{name}` is no exact symmetry here: gradients violate it by {plain(violation)}."
    means = "The eps of the normalisation after it explains as much, where it is about that share of the variance that "
    means += "it is added to: the weight's norm is small. Its charge then drifts by the gradient, too."
    advice = unless(f"try a third of the weight decay of `{name}`, which keeps its norm larger")
    sure = "measured; that it is eps is likely: "
    sure += "a penalty would pull alike at every step" if by_steps else "a penalty on this weight would look alike"
    return Finding("violation", "invariance", "watch", title, means, advice, sure, number, (name,), violation)


def moved_by_preconditioner(moved: Sequence[tuple[str, float, float]]) -> list[Finding]:
    """What an adaptive optimiser does to charges that gradient descent keeps: `(family, by preconditioner, norm)`.

    Adam divides the two sides of a symmetry by different numbers, so it moves charges at first order. Threshold: more
    than half of the squared weights have moved from one side to the other, so the layers' balance is Adam's making.
    That asks for nothing: two learning rates for the two sides were not seen to help.
    """
    known = [(f, abs(c) / n) for f, c, n in moved if n > 0 and math.isfinite(c)]
    if not known:
        return []
    family, share = max(known, key=lambda r: r[1])
    number = (Evidence(f"charge moved by the preconditioner over the squared weights, {family}", share),)
    if share < MOVED:
        title = f"Adam's unequal steps moved {plain(share)} of the squared weights of `{family}` from one side to the "
        title += "other, too little to rule its balance."
        title = "The optimiser treats both sides of every symmetry alike." if share == 0 else title
        return [calm("preconditioner", "optimiser", title, "measured", number)]
    title = f"Adam breaks the symmetry `{family}`: it moved {plain(share)} of the squared weights across, for its two "
    title += "layers get different step sizes. Their balance is the optimiser's, not that of SGD's noise."
    return [calm("preconditioner", "optimiser", title, "measured", number)]


def touched_from_outside(
    shares: Sequence[tuple[str, float]], events: Sequence[Mapping[str, Any]], recorded: int = 1, made: int = 1
) -> list[Finding]:
    """Weights that something else than the watched optimiser changed: `(family, |outside| over norm)`, and the events.

    Of the steps `made` those `recorded` were looked at.

    Threshold: 1 % of the squared weights over the run, or an event of the ledger, which notices single writes: to
    watch. Half of the squared weights is to act on: the run is then not the optimiser's.
    """
    noticed = [e for e in events if e.get("event") in OUTSIDE_EVENTS]
    known = [(f, s) for f, s in shares if math.isfinite(s)]
    family, share = max(known, key=lambda r: r[1], default=("", 0.0))
    if not noticed and share < TOUCHED:
        title = "Nobody but the optimiser changed the weights."
        if recorded < made:
            title = f"Nobody but the optimiser changed the weights in the {recorded:,} steps recorded of {made:,}; "
            title += "nf.Ledger(..., every=1) looks at all."
        return [calm("outside", "invariance", title, "sure for recorded steps")]
    when = f", first at step {noticed[0]['step']}" if noticed else ""
    much = f" ({plain(share)} of the squared weights of `{family}`)" if share >= TOUCHED else ""
    title = f"Parameters were changed from outside the optimiser{when}{much}."
    means = "A second optimiser, clipping of weights, averaging or a loaded checkpoint writes to them: neither the "
    means += "optimiser's state nor any prediction knows of it."
    advice = "if that is not meant, look under torch.no_grad() for code that writes to parameters between steps, such "
    advice += "as clipping, averaging or load_state_dict; nf.Ledger(..., every=1) names each step"
    severity: Severity = "act" if share >= MOVED else "watch"
    numbers = (Evidence("noticed events", float(len(noticed))), Evidence("share of squared weights", share))
    names = (family,) if share >= TOUCHED else ()
    sure = "sure: torch counts writes"
    return [Finding("outside", "invariance", severity, title, means, advice, sure, numbers, names, share)]


def nothing_watched() -> Finding:
    """What a log leaves open whose ledger watched no symmetry, as where the layers between are frozen."""
    title = "No symmetry is watched: none was found along which the trained weights can trade scale, so that the log "
    title += "says nothing of norms and of balance."
    advice = "nf.find_symmetries(model, batch) says what it found, nf.explain(model, batch, 'PARAMETER') why not more: "
    advice += "frozen weights, or an operator that lets no scale pass"
    return Finding("watched", "balance", "open", title, "", advice, "open")
