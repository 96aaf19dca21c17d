"""The noise equilibrium of Adam, AdamW, RMSprop and Lion along torus symmetries (theory.md section 13)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from noetherflow.core.adaptive import LionConfig
from noetherflow.core.optimizers import Settings
from noetherflow.core.settings import SGDConfig
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.blocks import TorusClasses, classify_torus
from noetherflow.equilibrium.feedback import SquareFeedback, with_feedback
from noetherflow.equilibrium.orbit import MeasuredOrbit
from noetherflow.equilibrium.potential import LegPair, refuse_too_few
from noetherflow.equilibrium.regime import Regime
from noetherflow.equilibrium.result import Equilibrium, Settled
from noetherflow.equilibrium.roots import (
    AdaptiveConfig,
    EpsEntries,
    NoiseLaw,
    RootTerm,
    charges,
    divisor,
    reference_lr,
    root_drives,
    root_orbit,
    second_moments,
)
from noetherflow.equilibrium.search import Minimum
from noetherflow.equilibrium.solve import StepLimits, drives, elements_of, imbalance, minimise
from noetherflow.equilibrium.task import TOLERANCE, SolveOptions
from noetherflow.equilibrium.turning import turning
from noetherflow.equilibrium.verdict import torus_verdict
from noetherflow.errors import MomentError
from noetherflow.moments.result import GradientMoments
from noetherflow.moments.statistics import jackknife
from noetherflow.symmetry.overlap import leg_coordinates, stiffness
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet


def covered(syms: SymmetrySet, config: AdaptiveConfig) -> SymmetrySet:
    """The symmetries whose equilibrium under an adaptive optimiser is derived; the others are excluded and say why."""
    name = "Lion" if isinstance(config, LionConfig) else "Adam"
    groups_differ = isinstance(config, SGDConfig)
    reasons = {}
    for s in syms:
        pulled = s.pulled(lambda name: config.rates(name).weight_decay > 0)
        if not s.is_torus and groups_differ:
            reasons[s.name] = (
                "parameter groups differ: with rates of their own only scalar and diagonal symmetries are solved for; "
                "solve this one with nf.SGDConfig(...) of its parameters' lr and weight decay, if they are the same"
            )
        elif not s.is_torus:
            reasons[s.name] = (
                f"{name}'s preconditioner does not commute with matrices: no flow of general_linear charges is derived"
            )
        elif pulled:
            reasons[s.name] = pulled
    return syms.without(reasons)


def adaptive_equilibrium(
    model: nn.Module, syms: SymmetrySet, moments: GradientMoments, config: AdaptiveConfig, options: SolveOptions
) -> Equilibrium:
    """The group elements that minimise `Psi = sum_i (lr s_i + 2 w s_i theta_i^2)`, `s_i` the root mean square of entry
    `i` of the minibatch gradient.

    Args:
        model: only read.
        syms: its symmetries; general_linear ones are excluded.
        moments: measured with `entries=True` at these weights.
        config: Adam's or Lion's settings; Lion counts its noise `correlation_sum` times.
        options: as in `noise_equilibrium`; `samples` and `remeasure` are not needed and not used.

    Returns:
        Elements, preconditioned charges and classes of every symmetry; what they assume is in `assumptions`.

    Raises:
        MomentError: entry-wise moments are missing, or errors are wanted of moments without groups.
        SampleNumberError: too few samples to tell the mean gradient from noise.

    Source: theory.md section 13.
    """
    law = NoiseLaw.of(config)
    refuse_too_few(moments, config, law.white, law.mean)
    syms = covered(syms, config)
    symmetries, feedback = tuple(syms), options.feedback
    if feedback is not None:
        feedback.refuse_other(model, config)
    starts = _starts(model, symmetries, moments, config, feedback)
    movers = [s for s in starts if bool(s.classes.finite.any())]
    task = _RootTask(model, tuple(s.symmetry for s in movers), tuple(s.classes for s in movers), config, options)
    orbit = task.orbit(moments)
    minimum = task.solve(orbit)
    errors = task.errors(moments, minimum) if options.errors else {}
    settled = _settled(starts, task, orbit, minimum, errors, _decays(symmetries, config))
    now = orbit.at([s.identity() for s in task.symmetries])
    return Equilibrium(
        objective="noise+decay" if _decays(symmetries, config) else "noise",
        settled=settled,
        imbalance_now=max((float(s.imbalance_now.max()) for s in settled), default=0.0),
        imbalance=minimum.imbalance,
        iterations=minimum.iterations,
        evaluations=minimum.evaluations,
        converged=minimum.converged,
        joint=options.joint,
        norm_now=_norm(model, task.symmetries, {s.name: s.identity() for s in task.symmetries}),
        norm=_norm(model, task.symmetries, task.elements(minimum)),
        trace_now=now.trace,
        trace=minimum.point.trace,
        symmetries=syms,
        regime=adaptive_regime(symmetries, moments, config),
        assumptions=assumptions(config, feedback),
    )


def assumptions(
    config: Settings, feedback: SquareFeedback | None = None, charges: Sequence[Tensor] = ()
) -> tuple[str, ...]:
    """What an equilibrium or a flow of these charges rests on under these settings, one sentence each."""
    frozen = "the function stands still meanwhile: near a minimum, or for as long as the measured gradients last"
    if isinstance(config, SGDConfig):
        weighed = "charges count every squared weight over the learning rate of its group, relative to the largest"
        return (*((weighed,) if config.groups else ()), *turning(charges))
    if isinstance(config, LionConfig):
        return (frozen, *_of_lion(config))
    if feedback is not None:
        return (frozen, str(feedback))
    b2 = config.betas[1]
    return (
        frozen,
        "v is slow against the fluctuations of the weights: it averages over "
        f"{round(1 / (1 - b2)):,} steps, and (1 - b2) must be much less than lr times the curvatures that carry them, "
        "in v's metric. Without curvature that is unknown; at b2 = 0.95 it usually fails, and the equilibrium is off "
        "by factors",
    )


def _of_lion(config: LionConfig) -> tuple[str, str]:
    """What an equilibrium or a flow of Lion rests on beside that."""
    return (
        "Lion's average is short against the time in which weights relax, and the size of its entries does not follow "
        f"the fluctuations of the weights: it reaches back over {round(1 / (1 - config.betas[1])):,} steps, and a mean "
        f"gradient moves the step by {config.gain:.1f} / s of itself. The first fails where lr times curvature times "
        "both is not small, the second where it is; without curvature neither is known. Logs of elements were up to "
        "0.06 off in one small net, 0.1 in another and 0.4 in a convolutional one",
        "entries of minibatch gradients are Gaussian (Lion)",
    )


@dataclass(frozen=True, eq=False)
class _RootStart:
    """A symmetry at the measured weights: which coordinates settle, how far from it, and its charge."""

    symmetry: Symmetry
    classes: TorusClasses
    imbalance: Tensor
    charge: Tensor


def _starts(
    model: nn.Module,
    symmetries: Sequence[Symmetry],
    moments: GradientMoments,
    config: AdaptiveConfig,
    feedback: SquareFeedback | None,
) -> list[_RootStart]:
    """Every symmetry where it is. Which coordinates settle is asked of noise and decay alone: the feedback shifts
    where, and makes no equilibrium of its own.
    """
    orbit = root_orbit(model, symmetries, moments, config, joint=False)
    followed = with_feedback(orbit, feedback, reference_lr(config))
    identity = [s.identity() for s in symmetries]
    now, out = charges(orbit, identity), []
    for s, frozen, pairs, charge in zip(
        symmetries, orbit.at(identity).pairs, followed.at(identity).pairs, now, strict=True
    ):
        classes = classify_torus(*drives(s, frozen, orbit.potential))
        out.append(_RootStart(s, classes, imbalance(s, classes, *drives(s, pairs, orbit.potential)), charge))
    return out


@dataclass(frozen=True, eq=False)
class _RootTask:
    """The symmetries that move, which of their coordinates do, and how to solve for them."""

    model: nn.Module
    symmetries: tuple[Symmetry, ...]
    classes: tuple[TorusClasses, ...]
    config: AdaptiveConfig
    options: SolveOptions

    def orbit(self, moments: GradientMoments) -> MeasuredOrbit:
        """The orbit of these symmetries by these moments."""
        orbit = root_orbit(self.model, self.symmetries, moments, self.config, joint=self.options.joint)
        return with_feedback(orbit, self.options.feedback, reference_lr(self.config), joint=self.options.joint)

    def solve(self, orbit: MeasuredOrbit, start: list[Tensor] | None = None, tolerance: float | None = None) -> Minimum:
        """The minimum of Psi; `tolerance` by default that of the options."""
        wanted = self.options.tolerance if self.options.tolerance is not None else TOLERANCE
        return minimise(
            orbit,
            self.classes,
            self._limits(orbit),
            start=start,
            tolerance=wanted if tolerance is None else tolerance,
            max_iterations=self.options.max_iterations,
        )

    def _limits(self, orbit: MeasuredOrbit) -> StepLimits:
        """How far steps may go: twice as far as under SGD, whose sums go like squares of the elements; with `eps` or
        coupled decay some of the sums here do so too.
        """
        shapes = {n: tuple(t.shape) for n, t in tensors_of(self.model).items()}
        own = orbit.symmetries
        steep = NoiseLaw.of(self.config).steep or any(
            isinstance(t, RootTerm) and isinstance(t.entries, EpsEntries) for t in orbit.terms
        )
        unit = 1.0 if steep else 0.5
        alone = tuple(unit * stiffness(leg_coordinates([s], shapes), [s])[0] for s in own)
        if not self.options.joint:
            return StepLimits(alone, alone)
        return StepLimits(alone, tuple(unit * k for k in stiffness(leg_coordinates(own, shapes), own)))

    def elements(self, minimum: Minimum) -> dict[str, Tensor]:
        """Group elements by symmetry."""
        found = elements_of(self.symmetries, minimum.logs)
        return {s.name: e for s, e in zip(self.symmetries, found, strict=True)}

    def errors(self, moments: GradientMoments, minimum: Minimum) -> dict[str, Tensor]:
        """Jackknife standard errors of the logs of the elements.

        Raises:
            MomentError: the moments have no groups.
        """
        if len(moments.groups) < 2:
            raise MomentError("errors=True needs moments measured in at least two groups")

        def logs(part: GradientMoments) -> dict[str, Tensor]:
            found = self.solve(self.orbit(part), list(minimum.logs), 1e-6).logs
            return {s.name: v for s, v in zip(self.symmetries, found, strict=True)}

        full = {s.name: v for s, v in zip(self.symmetries, minimum.logs, strict=True)}
        return {n: e.error for n, e in jackknife(moments, full, logs, self.config.dataset_size).items()}


def _settled(
    starts: Sequence[_RootStart],
    task: _RootTask,
    orbit: MeasuredOrbit,
    minimum: Minimum,
    errors: dict[str, Tensor],
    decays: bool,
) -> tuple[Settled, ...]:
    """Every symmetry at the minimum; what does not move stays, its charge by its own entries."""
    elements, there = task.elements(minimum), charges(orbit, elements_of(task.symmetries, minimum.logs))
    charge = {s.name: c for s, c in zip(task.symmetries, there, strict=True)}
    pairs = {s.name: p for s, p in zip(task.symmetries, minimum.point.pairs, strict=True)}
    out = []
    for start in starts:
        s, own = start.symmetry, pairs.get(start.symmetry.name, [])
        verdict = torus_verdict(s, start.classes, decays)
        left = torch.zeros(s.blocks, dtype=torch.float64)
        if own:
            left = imbalance(s, start.classes, *drives(s, own, orbit.potential))
        out.append(
            Settled(
                name=s.name,
                family=s.family,
                kind=s.kind,
                element=elements.get(s.name, s.identity()),
                classification=verdict.classification,
                charge_now=start.charge,
                charge=charge.get(s.name, start.charge),
                weight_grams=_grams(own, 0),
                noise_grams=_grams(own, 1),
                imbalance_now=start.imbalance,
                imbalance=left,
                finite=verdict.finite,
                reason=verdict.reason,
                log_error=errors.get(s.name),
                eps=s.eps,
            )
        )
    return tuple(out)


def _grams(pairs: Sequence[LegPair], which: int) -> tuple[Tensor, ...]:
    return tuple(pair[which] for pair in pairs)


def _decays(symmetries: Sequence[Symmetry], config: AdaptiveConfig) -> bool:
    return any(config.rates(n).weight_decay > 0 for s in symmetries for n in s.parameters)


def _norm(model: nn.Module, symmetries: Sequence[Symmetry], elements: dict[str, Tensor]) -> float:
    """`||theta||^2` of the moved parameters, at the elements."""
    tensors = tensors_of(model)
    moved = {n: tensors[n].detach().double().cpu() for s in symmetries for n in s.parameters}
    for s in symmetries:
        moved = {n: s.move_weight(n, t, elements[s.name]) if n in s.parameters else t for n, t in moved.items()}
    return sum(float(t.square().sum()) for t in moved.values())


def without_decay(config: AdaptiveConfig) -> AdaptiveConfig:
    """The same optimiser with every weight decay 0."""
    return replace(config, weight_decay=0.0, groups=tuple(replace(g, weight_decay=0.0) for g in config.groups))


def adaptive_regime(symmetries: Sequence[Symmetry], moments: GradientMoments, config: AdaptiveConfig) -> Regime:
    """How much of the growth of preconditioned charges the mean gradient makes, and how many steps it lasts: the loss
    over what one step along it takes off, `lr sum gbar^2 / (s + eps)`.
    """
    drives = [root_drives(s, moments, config) for s in symmetries]
    noise, mean = (sum((float(d[k].abs().sum()) for d in drives), 0.0) for k in (0, 1))
    share = mean / (noise + mean) if noise + mean > 0 else 0.0
    if isinstance(config, LionConfig) or not moments.loss > 0:
        return Regime(share, math.inf)
    law, fall = NoiseLaw.of(config), 0.0
    for name in moments.squares:
        steady = second_moments(name, moments, config)[1]
        over = divisor(name, moments, config, law)
        fall += config.rates(name).lr * float((steady[over > 0] / over[over > 0]).sum())
    fall /= 1 - config.momentum if isinstance(config, SGDConfig) else 1.0
    return Regime(share, moments.loss / fall if fall > 0 else math.inf)
