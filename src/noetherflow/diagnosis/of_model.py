"""The facts that rules need, from one measurement of a model and its optimiser's settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.members import modules_of, some_named
from noetherflow.core.optimizers import described
from noetherflow.core.schedule import RateCourse
from noetherflow.core.settings import SGDConfig
from noetherflow.core.tensors import tensors_of
from noetherflow.diagnosis import balance, breaking, long_steps, norms, sampling, squares, stability
from noetherflow.diagnosis import heads as head_rules
from noetherflow.diagnosis.dead import dead_units, silent_parts
from noetherflow.diagnosis.decay import decay_bites, decay_rules
from noetherflow.diagnosis.examined import Examined, named
from noetherflow.diagnosis.facts import (
    BatchRegime,
    LayerBalance,
    NormTrend,
    PresentSharpness,
    ScaleInvariantNorm,
    StepStability,
)
from noetherflow.diagnosis.finding import Diagnosis, Finding, doubted, not_judged, plain, unsure
from noetherflow.diagnosis.logits import logit_growth, logit_spread, still_norms
from noetherflow.diagnosis.parts import (
    activities_of,
    balances_of,
    logit_growths,
    logit_spreads,
    seen_activities,
    uncertified_activities,
    usual_sizes,
)
from noetherflow.diagnosis.step import Step, decay_share
from noetherflow.diagnosis.unanswered import Unanswered, answered, known
from noetherflow.equilibrium.regime import COUNTS
from noetherflow.equilibrium.roots import second_moments
from noetherflow.equilibrium.sharpness import Sharpness
from noetherflow.equilibrium.validity import SquareMemory
from noetherflow.moments.result import GradientMoments

MOSTLY = 0.5
"""Share of the stiffest direction from which on its curvature is that of weights which one step replaces."""
FILLED = 2.0
"""Warmup of Adam in memories of `v`: over `2 / (1 - b2)` steps its average fills up with gradients of the settled run
(Ma and Yarats, On the adequacy of untuned warmup for adaptive optimization, 2019).
"""
BALANCES = ("balance", "balance-layer", "balance-heads")
"""Rules that rest on where the flow ends and on nothing else."""
ON_THE_FLOW = (
    *BALANCES,
    "norm-growth",
    "norms-to-come",
    "fastest-norms",
    "sharpening",
)
"""Rules that rest on the flow or on where it ends; the learning rate does where a warmup along it is counted on."""
FORECASTS = {
    "norm-growth": "How the norms that the loss ignores grow",
    "norms-to-come": "How the norms that the loss feels grow",
    "sharpening": "Whether noise sharpens or flattens",
}
"""Those of them that say where the flow goes and nothing else, and what they answer."""
IN_TRAINING = "call model.train(), then nf.diagnose(...) again"
MOST_DEAD = "most units of a layer get no gradient on these data"
NOT_A_DRIFT = "the flow is NOT VALID as a drift here (see CAUTION)"


def diagnose_measurement(examined: Examined) -> Diagnosis:
    """All findings that one measurement supports."""
    settings = examined.settings
    trends, activities = list(_trends(examined)), list(activities_of(examined))
    too_long = long_steps.step_length([t for t in trends if t.matrix], examined.warmup)
    steps = replace(_stability(examined), replaced=bool(too_long))
    uncertified, decays = list(uncertified_activities(examined)), _decays(examined)
    units = [*activities, *uncertified, *seen_activities(examined)]
    dead = dead_units(units, _samples(examined.moments), examined.started)
    found: list[Finding] = [
        *answered("norms", "norm-growth", lambda: _on_norms(examined, trends)),
        *answered("norms", "fastest-norms", lambda: _first_norms(examined, trends)),
        *answered("norms", "logit-growth", lambda: _on_logits(examined)),
        *decay_bites(decays, examined.steps, examined.steps_given, scheduled=examined.course.known),
        *decay_rules(decays, examined.steps, "sure, by the settings"),
        *answered("balance", "balance", lambda: _on_balance(examined, steps)),
        *dead,
        *head_rules.frozen_heads(activities),
        *stability.learning_rate(steps),
        *too_long,
        *stability.sharpening(steps),
        *squares.memory_of_squares(settings),
        *squares.eps_of_adam(_swamped(examined), getattr(settings, "eps", 0.0)),
        *answered("batch", "batch-size", lambda: sampling.batch_size(_regime(examined))),
        *breaking.broken_by_the_loss(examined.refused, silent_parts(uncertified)),
    ]
    samples = f"{examined.moments.samples:,} {'minibatches' if examined.moments.replicates else 'samples'}"
    subject = f"{type(examined.model).__name__} under {described(examined.settings)}, for {examined.steps:,} steps"
    subject += "" if examined.steps_given else " (the default: give steps=... of the whole training)"
    subject += _under(examined)
    members = {s.name: modules_of(s.parameters) for s in examined.symmetries}
    regime = None if isinstance(examined.flow, Unanswered) else examined.flow.regime
    cautions = [*_untrained(examined), *examined.moments.conditions.caution, *(regime.cautions if regime else ())]
    if examined.moments.conditions.running:
        found = doubted(found, ("norms", "warmup", "balance", "batch"), "measured with running statistics", IN_TRAINING)
    if any(f.severity == "act" for f in dead):
        found = not_judged(found, (*ON_THE_FLOW, "learning-rate"), MOST_DEAD, dead[0].advice, FORECASTS)
    if (why := _unsure_of_equilibria(examined)) is not None:
        found = unsure(found, BALANCES, why)
    if regime is not None and not regime.constant:
        rules = (*ON_THE_FLOW, "learning-rate") if steps.load >= 1 else ON_THE_FLOW
        found = not_judged(found, rules, NOT_A_DRIFT, _with_a_ledger(regime.memory), FORECASTS)
    return Diagnosis.of(f"{subject}, from {samples}", found, members, cautions)


def _untrained(examined: Examined) -> list[str]:
    """Which layers are not trained: of norms, decay, noise and balance nothing is said that concerns them."""
    still = [n for n, t in tensors_of(examined.model).items() if isinstance(t, nn.Parameter) and not t.requires_grad]
    if not still:
        return []
    which = some_named(modules_of(still))
    return [f"not trained (frozen, or not in the optimiser), and left out of norms, decay, noise and balance: {which}"]


def _unsure_of_equilibria(examined: Examined) -> str | None:
    """Why predicted noise equilibria are off by factors here, None where they are not: Adam's `v` is no scale."""
    settings, found = examined.settings, examined.curvature
    if not isinstance(settings, AdamConfig):
        return None
    follows = isinstance(found, SquareMemory) and found.verdict == "off"
    if not follows and settings.betas[1] > squares.LLM_MEMORY:
        return None
    return (
        f"at b2 = {settings.betas[1]:g} Adam's v follows the fluctuations, and predicted equilibria are off by factors"
    )


def _with_a_ledger(memory: float) -> str:
    """What answers questions on a flow that the mean gradient spoils: ten memories of momentum, booked step by step."""
    steps = max(TRIAL, round(10 * memory))
    return (
        f"train {steps:,} steps with nf.Ledger(model, optimizer, symmetries, estimate_every=10) attached, then "
        "ledger.diagnose()"
    )


TRIAL = 50
"""Steps after which a fresh run is asked again, at least."""


def _on_norms(examined: Examined, trends: Sequence[NormTrend]) -> list[Finding]:
    """Where norms go, by the flow and its end."""
    growth = norms.norm_growth(list(_invariant_norms(examined)), examined.steps)
    return [*growth, *norms.norms_to_come(trends, _moving(examined))]


def _on_balance(examined: Examined, rate: StepStability) -> list[Finding]:
    """Layers and heads against their noise equilibrium."""
    balances = [_under_schedule(fact, examined.course) for fact in balances_of(examined)]
    return [
        *balance.far_from_equilibrium(balances, examined.steps, rate.held_by_imbalance),
        *head_rules.heads_apart(balances),
    ]


def _under_schedule(fact: LayerBalance, course: RateCourse) -> LayerBalance:
    """The same with the steps that noise takes at the mean of the squared learning rate of the run, which noise goes by
    (theory.md section 6): within the run it does what it would in as many steps fewer at the largest rate.
    """
    return replace(fact, steps=fact.steps / course.mean_square, each=tuple(k / course.mean_square for k in fact.each))


def _under(examined: Examined) -> str:
    """The schedule that was given, in words."""
    course = examined.course
    if not course.known:
        return ""
    warm = f"a warmup of {course.warmup:,} steps" if course.warmup else "no warmup"
    return f" of the schedule given ({warm}, mean learning rate {plain(course.mean)} times the largest)"


def _samples(moments: GradientMoments) -> int:
    """How many samples went into the moments, those of a minibatch each by itself."""
    return moments.samples * (moments.replicates.batch_size if moments.replicates else 1)


def _moving(examined: Examined) -> bool:
    """Whether the function changes within the run: the mean gradient counts, and does not last for it. Nobody knows
    where the flow is not known: then it may.
    """
    if isinstance(examined.flow, Unanswered):
        return True
    regime = examined.flow.regime
    return regime.mean_share >= COUNTS and regime.horizon < examined.steps * examined.course.mean


def _invariant_norms(examined: Examined) -> Iterator[ScaleInvariantNorm]:
    """Norms without a counterweight; the mean gradient's growth counts for as long as it lasts."""
    power = 2 if isinstance(examined.settings, SGDConfig) else 1
    for symmetry, flow, _ in named(examined):
        charge = abs(float(flow.charge.sum()))
        if not symmetry.one_sided or charge == 0:
            continue
        sign = symmetry.weight_legs[0].sign
        noise = sign * float(flow.noise.sum())
        growth, later = max(0.0, noise + sign * float(flow.step_size.sum())), max(0.0, noise)
        error = None if flow.error is None else float(flow.error.norm())
        decay = abs(float(flow.decay.sum())) / charge
        horizon = known(examined.flow).regime.horizon
        yield ScaleInvariantNorm(symmetry.name, charge, growth, error, decay, power, horizon, later, examined.course)


def _swamped(examined: Examined) -> float:
    """The share of entries whose root mean square gradient is below Adam's eps; those without any gradient left out."""
    settings = examined.settings
    if not isinstance(settings, AdamConfig):
        return 0.0
    below = reached = 0
    for name in examined.moments.squares:
        noise, steady = second_moments(name, examined.moments, settings)
        square = (noise + steady)[noise + steady > 0]
        below, reached = below + int((square < settings.eps**2).sum()), reached + square.numel()
    return below / reached if reached else 0.0


def _decays(examined: Examined) -> list[float]:
    """The share of every parameter, on average over the rates of the run; NaN for decay coupled to Adam's gradients."""
    settings = examined.settings
    coupled = isinstance(settings, AdamConfig) and not settings.decoupled
    unknown = [math.nan for n in examined.moments.mean if coupled and settings.rates(n).weight_decay > 0]
    return unknown or [decay_share(settings, n) * examined.course.mean for n in examined.moments.mean]


def _first_norms(examined: Examined, trends: Sequence[NormTrend]) -> list[Finding]:
    """What the next step of plain SGD does to norms. Steps of Adam and of momentum depend on the state and on the order
    of batches: of 21 weights of a small Llama 4 were foretold to grow, and 11 to 19 did.
    """
    if not isinstance(examined.settings, SGDConfig) or examined.settings.momentum > 0:
        return []
    return norms.next_step(trends, _moving(examined), bool(examined.warmup))


def _trends(examined: Examined) -> Iterator[NormTrend]:
    """How the norms of weights and gains change in a step at the present gradients.

    With a warmup of `W` steps the first has `1 / W` of the learning rate, under a schedule what that says;
    `step_square` is that of steps at the full rate.
    """
    settings, tensors = examined.settings, tensors_of(examined.model)
    settles, unseen, usual = _settled_norms(examined), _unseen(examined), usual_sizes(examined)
    first = 1 / max(examined.warmup or 1, 1)
    if examined.course.known:
        first = float(examined.course.shares[np.flatnonzero(examined.course.shares)[0]])
    for name, mean in examined.moments.mean.items():
        weight = tensors[name].detach().double().cpu()
        norm = float(weight.square().sum())
        bias = weight.ndim < 2 and not name.endswith("weight")
        if bias or norm == 0 or name not in examined.moments.squares:
            continue
        step = Step.of(settings, name, weight, mean.double().cpu(), examined.moments.squares[name].double().cpu())
        change = first**2 * step.square - first * (2 * step.along + decay_share(settings, name) * norm)
        rest = settles.get(name, math.nan)
        matrix = weight.ndim > 1
        yield NormTrend(name, norm, change, step.square, rest, name in unseen, matrix, usual.get(name, 1.0))


def _unseen(examined: Examined) -> set[str]:
    """Parameters whose norm the loss ignores, for a normalisation follows."""
    return {leg.parameter for s in examined.symmetries if s.one_sided for leg in s.weight_legs}


def _settled_norms(examined: Examined) -> dict[str, float]:
    """By parameter, its norm at the noise equilibrium over its norm now; those that no symmetry settles are left out.

    Norms without a counterweight are no part of this: they go on for ever or settle where decay holds them. Empty where
    the equilibrium is not known.
    """
    if isinstance(examined.equilibrium, Unanswered) or isinstance(examined.flow, Unanswered):
        return {}
    pairs = [(s, r) for s, _, r in named(examined) if not s.one_sided and bool(r.finite.all())]
    moved = {leg.parameter for s, _ in pairs for leg in s.weight_legs} - _unseen(examined)
    now = {n: t.detach().double().cpu() for n, t in tensors_of(examined.model).items()}
    then = {n: t.clone() for n, t in now.items()}
    for symmetry, settled in pairs:
        symmetry.act_(then, settled.element)
    return {n: float(then[n].norm() / now[n].norm()) for n in moved if bool(now[n].any())}


def _stability(examined: Examined) -> StepStability:
    found, lr = examined.curvature, examined.settings.lr
    fact = StepStability(
        lr, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, examined.warmup, examined.started
    )
    fact = replace(fact, remedy=examined.remedy) if examined.remedy else fact
    fact = replace(fact, run=examined.steps) if examined.steps_given else fact
    fact = replace(fact, linear=examined.course.linear_warmup) if examined.course.known else fact
    if isinstance(found, Sharpness):
        return replace(
            fact,
            load=lr / found.stable_lr_now,
            noisy_load=found.load_now,
            load_later=lr / found.stable_lr_equilibrium,
            sharpening=found.ratio,
            saddle=not min(found.trace_now, found.trace_equilibrium) > 0,
            needed=_or_none(found.full_batch_warmup_steps),
            safe=_or_none(found.warmup_steps),
        )
    if isinstance(found, PresentSharpness):
        return replace(fact, load=found.load)
    if isinstance(found, SquareMemory):
        steps = FILLED / (1 - found.square_memory)
        return replace(fact, load=lr / found.stable_lr, needed=steps, safe=steps, small=found.small > MOSTLY)
    return fact


def _or_none(steps: int | None) -> float | None:
    return None if steps is None else float(steps)


def _regime(examined: Examined) -> BatchRegime:
    settings = examined.settings
    regime = None if isinstance(examined.flow, Unanswered) else examined.flow.regime
    mean_share, horizon = (regime.mean_share, regime.horizon) if regime else (math.nan, math.nan)
    scales = examined.moments.noise_scale(settings.dataset_size)
    share = settings.covariance_factor * settings.batch_size
    return BatchRegime(settings.batch_size, scales, mean_share, horizon, examined.started, share, settings.dataset_size)


def _on_logits(examined: Examined) -> list[Finding]:
    """Attention logits as they were seen; where they were not, what their norms will do."""
    growth = list(logit_growths(examined))
    spreads = list(logit_spreads(examined, growth))
    return logit_spread(spreads) or logit_growth(growth) or still_norms(growth)
