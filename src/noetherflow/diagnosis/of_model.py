"""The facts that rules need, from one measurement of a model and its optimiser's settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.members import modules_of
from noetherflow.core.optimizers import Settings, described
from noetherflow.core.settings import SGDConfig
from noetherflow.core.tensors import tensors_of
from noetherflow.diagnosis import balance, breaking, long_steps, norms, sampling, stability
from noetherflow.diagnosis import heads as head_rules
from noetherflow.diagnosis.examined import Examined, named
from noetherflow.diagnosis.facts import (
    SMALL,
    BatchRegime,
    LayerBalance,
    LogitGrowth,
    NormTrend,
    PartActivity,
    PresentSharpness,
    ScaleInvariantNorm,
    StepStability,
)
from noetherflow.diagnosis.finding import Diagnosis, Finding, doubted, not_judged
from noetherflow.diagnosis.step import Step, of_parameter
from noetherflow.diagnosis.unanswered import Unanswered, answered, known
from noetherflow.equilibrium.potential import Drift
from noetherflow.equilibrium.regime import COUNTS
from noetherflow.equilibrium.result import Settled
from noetherflow.equilibrium.sharpness import Sharpness
from noetherflow.equilibrium.validity import SquareMemory
from noetherflow.moments.result import GradientMoments
from noetherflow.symmetry.heads import HEADS, QUERY_KEY, heads_in, part_of, scales_of
from noetherflow.symmetry.symmetry import Symmetry

FILLED = 2.0
"""Warmup of Adam in memories of `v`: over `2 / (1 - b2)` steps its average fills up with gradients of the settled run
(Ma and Yarats, On the adequacy of untuned warmup for adaptive optimization, 2019).
"""
ON_THE_FLOW = (
    "balance",
    "balance-layer",
    "balance-heads",
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
NOT_A_DRIFT = "the flow is NOT VALID as a drift here (see CAUTION)"


def diagnose_measurement(examined: Examined) -> Diagnosis:
    """All findings that one measurement supports."""
    settings = examined.settings
    too_long = long_steps.step_length([t for t in _trends(examined) if t.matrix], examined.warmup)
    steps = replace(_stability(examined), replaced=bool(too_long))
    uncertified = list(_uncertified_activities(examined))
    found: list[Finding] = [
        *answered("norms", "norm-growth", lambda: _on_norms(examined)),
        *answered("norms", "fastest-norms", lambda: _first_norms(examined, list(_trends(examined)))),
        *answered("norms", "logit-growth", lambda: norms.logit_growth(list(_logits(examined)))),
        *norms.decay_bites(_decays(examined), examined.steps, examined.steps_given),
        *answered("balance", "balance", lambda: _on_balance(examined)),
        *balance.dead_units([*_activities(examined), *uncertified], _samples(examined.moments)),
        *head_rules.frozen_heads(list(_activities(examined))),
        *stability.learning_rate(steps),
        *too_long,
        *stability.sharpening(steps),
        *stability.memory_of_squares(settings),
        *answered("batch", "batch-size", lambda: sampling.batch_size(_regime(examined))),
        *breaking.broken_by_the_loss(examined.refused, balance.silent_parts(uncertified)),
    ]
    samples = f"{examined.moments.samples:,} {'minibatches' if examined.moments.replicates else 'samples'}"
    subject = f"{type(examined.model).__name__} under {described(examined.settings)}, for {examined.steps:,} steps"
    subject += "" if examined.steps_given else " (the default: give steps=... of the whole training)"
    members = {s.name: modules_of(s.parameters) for s in examined.symmetries}
    regime = None if isinstance(examined.flow, Unanswered) else examined.flow.regime
    cautions = [*examined.moments.conditions.caution, *(regime.cautions if regime else ())]
    if examined.moments.conditions.running:
        found = doubted(found, ("norms", "warmup", "balance", "batch"), "measured with running statistics", IN_TRAINING)
    if regime is not None and not regime.constant:
        rules = (*ON_THE_FLOW, "learning-rate") if steps.load >= 1 else ON_THE_FLOW
        found = not_judged(found, rules, NOT_A_DRIFT, _with_a_ledger(regime.memory), FORECASTS)
    return Diagnosis.of(f"{subject}, from {samples}", found, members, cautions)


def _with_a_ledger(memory: float) -> str:
    """What answers questions on a flow that the mean gradient spoils: ten memories of momentum, booked step by step."""
    steps = max(TRIAL, round(10 * memory))
    return (
        f"train {steps:,} steps with nf.Ledger(model, optimizer, symmetries) attached, then ledger.diagnose(); or "
        "nf.diagnose(...) again from there"
    )


TRIAL = 50
"""Steps after which a fresh run is asked again, at least."""


def _on_norms(examined: Examined) -> list[Finding]:
    """Where norms go, by the flow and its end."""
    growth = norms.norm_growth(list(_invariant_norms(examined)), examined.steps)
    return [*growth, *norms.norms_to_come(list(_trends(examined)), _moving(examined))]


def _on_balance(examined: Examined) -> list[Finding]:
    """Layers and heads against their noise equilibrium."""
    balances = list(_balances(examined))
    return [*balance.far_from_equilibrium(balances, examined.steps), *head_rules.heads_apart(balances)]


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
    return regime.mean_share >= COUNTS and regime.horizon < examined.steps


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
        yield ScaleInvariantNorm(symmetry.name, charge, growth, error, decay, power, horizon, later)


def decay_share(settings: Settings, parameter: str) -> float:
    """What weight decay takes of a squared weight per step, `2 lr w` (with momentum `m` over `1 - m`).

    0 for Adam's coupled decay, whose share depends on the gradients.

    Example:
        >>> decay_share(SGDConfig(lr=0.1, batch_size=8, weight_decay=0.01, momentum=0.9), "any")
        0.02
    """
    rates = settings.rates(parameter)
    if isinstance(settings, AdamConfig) and not settings.decoupled:
        return 0.0
    memory = 1 - settings.momentum if isinstance(settings, SGDConfig) else 1.0
    return round(2 * rates.lr * rates.weight_decay / memory, 15)


def _decays(examined: Examined) -> list[float]:
    """The share of every parameter; NaN for decay that is coupled to Adam's gradients."""
    settings = examined.settings
    coupled = isinstance(settings, AdamConfig) and not settings.decoupled
    unknown = [math.nan for n in examined.moments.mean if coupled and settings.rates(n).weight_decay > 0]
    return unknown or [decay_share(settings, n) for n in examined.moments.mean]


def _first_norms(examined: Examined, trends: Sequence[NormTrend]) -> list[Finding]:
    """What the next steps do to norms; of an Adam that has made steps, whose state is not looked at, nothing."""
    if isinstance(examined.settings, SGDConfig):
        return norms.next_step(trends, _moving(examined), examined.settings.momentum > 0)
    return [] if examined.started else norms.first_steps(trends)


def _trends(examined: Examined) -> Iterator[NormTrend]:
    """How the norms of weights and gains change in a step at the present gradients.

    With a warmup of `W` steps the first has `1 / W` of the learning rate; `step_square` is that of full steps.
    """
    settings, tensors = examined.settings, tensors_of(examined.model)
    settles, unseen, usual = _settled_norms(examined), _unseen(examined), _usual_sizes(examined)
    first = 1 / max(examined.warmup or 1, 1)
    for name, mean in examined.moments.mean.items():
        weight = tensors[name].detach().double().cpu()
        norm = float(weight.square().sum())
        bias = weight.ndim < 2 and not name.endswith("weight")
        if bias or norm == 0 or name not in examined.moments.squares:
            continue
        step = Step.of(settings, name, weight, mean.double().cpu(), examined.moments.squares[name].double().cpu())
        change = first**2 * step.grown - first * (2 * step.along + decay_share(settings, name) * norm)
        rest = settles.get(name, math.nan)
        matrix = weight.ndim > 1
        yield NormTrend(name, norm, change, step.square, rest, name in unseen, matrix, usual.get(name, 1.0))


def usual_size(weight: Tensor) -> float:
    """The root mean square of a matrix or kernel over `1 / sqrt(fan in)`, about what usual initialisations give.

    Example:
        >>> round(usual_size(torch.full((4, 25), 0.1)), 6)
        0.5
    """
    fan_in = weight.numel() / max(len(weight), 1)
    return float(weight.double().square().mean().sqrt()) * math.sqrt(fan_in)


def _usual_sizes(examined: Examined) -> dict[str, float]:
    """`usual_size` of every matrix, as far as its layer makes it small: times that of a larger layer that it trades
    scale with, so that two layers of which one was divided by what the other was multiplied with are as before.
    """
    tensors = {n: t.detach().cpu() for n, t in tensors_of(examined.model).items() if t.ndim > 1 and t.numel()}
    own = {n: usual_size(t) for n, t in tensors.items()}
    partner = dict.fromkeys(own, 1.0)
    for symmetry in examined.symmetries:
        legs = [leg for leg in symmetry.weight_legs if leg.parameter in own]
        for leg in legs:
            other = [own[o.parameter] for o in legs if o.sign != leg.sign]
            partner[leg.parameter] = max([partner[leg.parameter], *other])
    return {n: size * partner[n] for n, size in own.items()}


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


def _balances(examined: Examined) -> Iterator[LayerBalance]:
    small = {n for n, size in _usual_sizes(examined).items() if size < SMALL}
    for symmetry, flow, settled in named(examined):
        if symmetry.one_sided:
            continue
        logs = _logs(settled)
        errors = _log_errors(symmetry, examined.moments, settled)
        times = flow.relaxation_steps[flow.finite & (flow.relaxation_steps > 0)]
        if symmetry.family in HEADS:
            heads = heads_in(symmetry, examined.symmetries)
            logs, errors = _by_head(logs, heads), _by_head(errors, heads)
        yield LayerBalance(
            symmetry.name,
            symmetry.family,
            part_of(symmetry),
            logs.numpy(),
            errors.numpy(),
            float(times.median()) if times.numel() else math.nan,
            next((n for n in symmetry.parameters if n in small), ""),
        )


STAYS = 1e-9
"""Log factors below this are those of directions that the equilibrium leaves alone."""


def _logs(settled: Settled) -> Tensor:
    """The signed log factor of each coordinate; of a matrix the mean over its directions. NaN where nothing settles.

    A matrix moves the directions that have an equilibrium, and leaves the others as they are: these do not count.
    """
    element = settled.element.double()
    if element.ndim == 1:
        return torch.where(settled.finite, element.log(), torch.nan)
    logs = torch.linalg.svdvals(element).log()
    moved = settled.finite.unsqueeze(-1) | (logs.abs() > STAYS)
    return torch.where(moved, logs, torch.nan).nanmean(-1)


def _by_head(values: Tensor, heads: int) -> Tensor:
    """Means over the coordinates of each head, NaN left out."""
    return values.reshape(heads, -1).nanmean(1)


def _log_errors(symmetry: Symmetry, moments: GradientMoments, settled: Settled) -> Tensor:
    """Standard errors of `1/4 log(M_- / M_+)`, the factor that noise asks for, from groups of samples; NaN without."""
    unknown = torch.full((symmetry.blocks,), math.nan, dtype=torch.float64)
    if len(moments.groups) < 2:
        return unknown
    parts = [_log_ratio(symmetry, m.second[symmetry.name]) for m in moments.groups]
    spread: Tensor = torch.stack(parts).std(0) / len(parts) ** 0.5
    return torch.where(settled.finite, spread, unknown)


def _log_ratio(symmetry: Symmetry, second: Sequence[Tensor]) -> Tensor:
    sides = [torch.zeros(symmetry.blocks, dtype=torch.float64) for _ in range(2)]
    for leg, gram in zip(symmetry.weight_legs, second, strict=True):
        own = gram if gram.ndim == 1 else gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        sides[0 if leg.sign > 0 else 1] += own.double().cpu()
    return 0.25 * (sides[1] / sides[0]).log()


def _activities(examined: Examined) -> Iterator[PartActivity]:
    """Of every symmetry that was measured, by its moments."""
    for symmetry in examined.symmetries:
        if not symmetry.one_sided and symmetry.name in examined.moments.second:
            second = [_diagonal(g) for g in examined.moments.second[symmetry.name]]
            yield _activity(examined, symmetry, sum_of(second))


def _uncertified_activities(examined: Examined) -> Iterator[PartActivity]:
    """Of the units whose symmetry the certificate refused, by the squared gradients of all entries; heads are left out.

    NaN where the gradients of some parameter were not measured.
    """
    squares = examined.moments.squares
    for symmetry in examined.uncertified:
        if symmetry.one_sided or symmetry.family in HEADS:
            continue
        scales = scales_of(symmetry)
        gradient = torch.full((scales.blocks,), math.nan, dtype=torch.float64)
        if all(n in squares for n in scales.parameters):
            sizes = {n: squares[n].double().cpu().sqrt() for n in scales.parameters}
            gradient = sum_of(scales.grams(scales.positions(sizes)))
        yield _activity(examined, symmetry, gradient)


def _activity(examined: Examined, symmetry: Symmetry, gradient: Tensor) -> PartActivity:
    """How much the parts of one symmetry carry and learn: `gradient` is the mean squared one of each coordinate."""
    tensors = {n: t.detach() for n, t in tensors_of(examined.model).items()}
    scales = scales_of(symmetry)
    weights = scales.grams(scales.positions(tensors))
    sides = [
        sum_of([w for w, leg in zip(weights, scales.weight_legs, strict=True) if leg.sign == sign]) for sign in (1, -1)
    ]
    weight = (sides[0] * sides[1]).sqrt()
    if symmetry.family in HEADS:
        heads = heads_in(symmetry, examined.symmetries)
        weight, gradient = weight.reshape(heads, -1).mean(1), gradient.reshape(heads, -1).sum(1)
    return PartActivity(symmetry.name, part_of(symmetry), weight.numpy(), gradient.sqrt().numpy())


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """The sum of some tensors on the host, in float64."""
    return torch.stack([p.double().cpu() for p in parts]).sum(0)


def _diagonal(gram: Tensor) -> Tensor:
    """Second moments per coordinate or block."""
    return gram if gram.ndim == 1 else gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _stability(examined: Examined) -> StepStability:
    found, lr = examined.curvature, examined.settings.lr
    fact = StepStability(
        lr, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, examined.warmup, examined.started
    )
    fact = replace(fact, remedy=examined.remedy) if examined.remedy else fact
    fact = replace(fact, run=examined.steps) if examined.steps_given else fact
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
        return replace(fact, load=lr / found.stable_lr, needed=steps, safe=steps)
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


def _logits(examined: Examined) -> Iterator[LogitGrowth]:
    """Growth of query and key norms by noise and decay alone over the steps to come."""
    tensors = {n: t.detach() for n, t in tensors_of(examined.model).items()}
    for symmetry in examined.symmetries:
        if symmetry.family not in QUERY_KEY or symmetry.name not in examined.moments.second:
            continue
        scales = scales_of(symmetry)
        heads = heads_in(symmetry, examined.symmetries)
        norm = sum_of(scales.grams(scales.positions(tensors))).reshape(heads, -1).sum(1)
        growth = _growth(symmetry, examined).reshape(heads, -1).sum(1) / norm
        decay = decay_share(examined.settings, symmetry.parameters[0])
        left = math.exp(-decay * examined.steps)
        reach = examined.steps if decay == 0 else (1 - left) / decay
        factors = left + growth.numpy() * reach
        head = int(np.argmax(factors))
        width = 2 * symmetry.blocks / heads if symmetry.is_torus else symmetry.dim
        spread = float(norm[head]) * factors[head] / (2 * width)
        yield LogitGrowth(symmetry.name, head, float(factors[head]), spread, examined.steps, measured=False)


def _growth(symmetry: Symmetry, examined: Examined) -> Tensor:
    """What noise adds to the squared weights of each coordinate per step: `lr^2 E|g|^2` under SGD, `lr^2` per entry
    under optimisers whose steps have one size.
    """
    settings = examined.settings
    if isinstance(settings, SGDConfig):
        grams = zip(symmetry.weight_legs, examined.moments.batch_grams(symmetry, settings), strict=True)
        return sum_of([Drift.of(of_parameter(settings, leg.parameter)).noise * _diagonal(g) for leg, g in grams])
    scales = scales_of(symmetry)
    ones = {n: torch.ones_like(t) for n, t in tensors_of(examined.model).items() if n in symmetry.parameters}
    return settings.lr**2 * sum_of(scales.grams(ones))
