"""The Noether flow under Adam and Lion from measured gradients: the drift of every preconditioned charge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.adaptive import adaptive_equilibrium, adaptive_regime, covered
from noetherflow.equilibrium.charge_flow import ChargeFlow
from noetherflow.equilibrium.feedback import SquareFeedback, with_feedback
from noetherflow.equilibrium.forecast import TooFast, all_reached
from noetherflow.equilibrium.invariance import cautions, refuse_other_moments
from noetherflow.equilibrium.lag import lagging_forecast
from noetherflow.equilibrium.orbit import MeasuredOrbit
from noetherflow.equilibrium.regime import Regime
from noetherflow.equilibrium.result import Settled
from noetherflow.equilibrium.roots import (
    AdaptiveConfig,
    NoiseLaw,
    decay_share,
    divisor,
    orbit_of_weights,
    reference_lr,
    root_drives,
    root_orbit,
)
from noetherflow.equilibrium.task import SolveOptions
from noetherflow.moments.result import GradientMoments
from noetherflow.moments.statistics import jackknife
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

DIFFERENCE = 1e-3
"""Step in the log of an element by which the slope of the drift at the equilibrium is taken."""


@dataclass(frozen=True, eq=False)
class AdaptiveDrift:
    """What `noether_flow` needs of an adaptive optimiser: the drift of every symmetry, the orbit they span together,
    which symmetries are covered, the regime, what takes away from the answer, and how sure forecasts are.
    """

    details: tuple[ChargeFlow, ...]
    orbit: MeasuredOrbit
    symmetries: SymmetrySet
    regime: Regime
    cautions: tuple[str, ...]
    groups: ForecastGroups | None


@dataclass(frozen=True, eq=False)
class ForecastGroups:
    """What standard errors of forecasts need: the groups of samples, and the weights where they were measured.

    Attributes:
        weights: copies of what the symmetries move, since the model may move on before a forecast is asked for.
        symmetries: those that move together.
        moments: in at least two groups, entries alone.
        config: the optimiser's settings.
        feedback: of `v`, the same in all forecasts; None where it is not counted.
    """

    weights: dict[str, Tensor]
    symmetries: tuple[Symmetry, ...]
    moments: GradientMoments
    config: AdaptiveConfig
    feedback: SquareFeedback | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        syms: SymmetrySet,
        moments: GradientMoments,
        config: AdaptiveConfig,
        feedback: SquareFeedback | None = None,
    ) -> ForecastGroups | None:
        """Of measured moments; None where they have no groups, or groups without entries."""
        if not _has_groups(syms, moments):
            return None
        tensors = tensors_of(model)
        weights = {n: tensors[n].detach().to("cpu", copy=True) for s in syms for n in s.parameters}
        return cls(weights, tuple(syms), _entries_alone(moments), config, feedback)

    def errors(self, steps: tuple[int, ...], charges: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Jackknife standard errors of forecast charges: each forecast again without each group of samples.

        The measured root mean squares weigh the charge itself, so that it has an error at step 0 too. Every forecast
        starts with `v` at what its own samples say.

        Args:
            steps: as whole numbers, increasing.
            charges: the forecast from all samples at these steps.

        Returns:
            By symmetry, in the shape of the charges; empty where a forecast without one of the groups does not reach
            the last step.
        """

        def without(part: GradientMoments) -> dict[str, Tensor]:
            frozen = orbit_of_weights(self.weights, self.symmetries, part, self.config)
            orbit = with_feedback(frozen, self.feedback, reference_lr(self.config))
            return all_reached(lagging_forecast(orbit, steps, b2_of(self.config)), steps)

        try:
            found = jackknife(self.moments, charges, without, self.config.dataset_size)
        except TooFast:
            return {}
        return {n: e.error for n, e in found.items()}


def b2_of(config: AdaptiveConfig) -> float:
    """Adam's `b2`; 0 for optimisers whose drift follows the gradients at once."""
    return config.betas[1] if isinstance(config, AdamConfig) else 0.0


def adaptive_drift(
    model: nn.Module,
    syms: SymmetrySet,
    moments: GradientMoments,
    config: AdaptiveConfig,
    feedback: SquareFeedback | None = None,
) -> AdaptiveDrift:
    """Charges, drifts and time scales under Adam or Lion, each symmetry with the others held.

    `E[C_P' - C_P] = lr^2 sum a (white f Sigma + mean gbar^2) / (s + eps) - decay`: noise and step-size parts as
    `NoiseLaw` weighs them, and what the feedback of `v` adds where it was measured.

    Args:
        model: only read.
        syms: trainable ones; those not covered are excluded.
        moments: with `entries=True`.
        config: Adam's or Lion's settings.
        feedback: of `square_feedback` at these weights and settings, or None.

    Raises:
        MomentError: entry-wise moments are missing, or belong to another loss or other weights.
        DataError: the feedback is of other weights or settings.

    Source: theory.md section 13.
    """
    said = cautions(moments, refuse_other_moments(model, syms, moments))
    syms = covered(syms, config)
    alone = adaptive_equilibrium(model, syms, moments, config, SolveOptions(joint=False, feedback=feedback))
    orbit, separate = (
        with_feedback(root_orbit(model, tuple(syms), moments, config, joint=j), feedback, reference_lr(config), joint=j)
        for j in (True, False)
    )
    slow = _relaxation(separate, alone.settled)
    added = _added_by_feedback(orbit, feedback)
    errors = _drift_errors(syms, moments, config)
    details = tuple(
        replace(
            _charge_flow(model, s, settled, moments, config, slow[s.name], errors.get(s.name)),
            feedback=added.get(s.name),
        )
        for s, settled in zip(syms, alone.settled, strict=True)
    )
    regime = adaptive_regime(tuple(syms), moments, config)
    return AdaptiveDrift(details, orbit, syms, regime, said, ForecastGroups.of(model, syms, moments, config, feedback))


def _added_by_feedback(orbit: MeasuredOrbit, feedback: SquareFeedback | None) -> dict[str, Tensor]:
    """What the feedback adds to every charge per step at the measured weights; nothing where there is none."""
    if feedback is None:
        return {}
    own = orbit.added_drift([s.identity() for s in orbit.symmetries])
    return {s.name: s.combine(tuple(legs)) for s, legs in zip(orbit.symmetries, own, strict=True)}


def root_decay(
    tensors: Mapping[str, Tensor], symmetry: Symmetry, moments: GradientMoments, config: AdaptiveConfig
) -> Tensor:
    """What weight decay adds to the charge of one torus symmetry per step, `[blocks]`."""
    law, reference = NoiseLaw.of(config), reference_lr(config)
    out = torch.zeros(symmetry.shape, dtype=torch.float64)
    here = symmetry.positions({n: tensors[n].detach() for n in symmetry.parameters})
    for leg in symmetry.weight_legs:
        rates = config.rates(leg.parameter)
        square = here[leg.parameter].double().cpu().square() * (reference / rates.lr)
        decayed = square if law.coupled else square * divisor(leg.parameter, moments, config, law)
        out = out - leg.exponent * decay_share(rates, config, law) * leg.row_sums(decayed)
    return out


def _charge_flow(
    model: nn.Module,
    symmetry: Symmetry,
    settled: Settled,
    moments: GradientMoments,
    config: AdaptiveConfig,
    relaxation: Tensor,
    error: Tensor | None,
) -> ChargeFlow:
    noise, step_size = root_drives(symmetry, moments, config)
    return ChargeFlow(
        name=symmetry.name,
        family=symmetry.family,
        kind=symmetry.kind,
        charge=settled.charge_now,
        decay=root_decay(tensors_of(model), symmetry, moments, config),
        noise=noise,
        step_size=step_size,
        error=error,
        equilibrium=settled.charge,
        finite=settled.finite,
        relaxation_steps=relaxation,
        imbalance=settled.imbalance_now,
        groups=len(moments.groups),
        reason=settled.reason,
    )


def _relaxation(orbit: MeasuredOrbit, settled: tuple[Settled, ...]) -> dict[str, Tensor]:
    """Steps in which a small deviation falls by e: twice `sum exponent^2 weight` over the slope of the drift there."""
    symmetries = orbit.symmetries
    there = [s.element for s in settled]
    drifts = []
    for side in (DIFFERENCE, -DIFFERENCE):
        pairs = orbit.at([e * torch.tensor(side, dtype=torch.float64).exp() for e in there]).pairs
        drifts.append([_drift(s, own) for s, own in zip(symmetries, pairs, strict=True)])
    ones = [torch.ones(s.shape, dtype=torch.float64) for s in symmetries]
    slopes = [torch.zeros(s.shape, dtype=torch.float64) for s in symmetries]
    for term in orbit.terms:
        term.slope(there, ones, slopes)
    out = {}
    for i, s in enumerate(symmetries):
        falls = (drifts[1][i] - drifts[0][i]) / (2 * DIFFERENCE)
        live = settled[i].finite & (falls > 0)
        out[s.name] = torch.where(live, slopes[i] / torch.where(live, falls, torch.ones_like(falls)), 0.0)
    return out


def _drift(symmetry: Symmetry, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The drift of the charge from `(D, N)` of the legs."""
    return symmetry.combine(tuple(n - d for d, n in pairs))


def _drift_errors(syms: SymmetrySet, moments: GradientMoments, config: AdaptiveConfig) -> dict[str, Tensor]:
    """Jackknife standard errors of the part that gradients add."""
    if not _has_groups(syms, moments):
        return {}

    def drifts(part: GradientMoments) -> dict[str, Tensor]:
        return {s.name: sum(root_drives(s, part, config), torch.zeros(())) for s in syms}

    found = jackknife(_entries_alone(moments), drifts(moments), drifts, config.dataset_size)
    return {n: e.error for n, e in found.items()}


def _has_groups(syms: SymmetrySet, moments: GradientMoments) -> bool:
    """Whether entries of what the symmetries move were measured in at least two groups of samples."""
    return len(moments.groups) > 1 and all(n in moments.groups[0].squares for n in syms.parameters)


def _entries_alone(moments: GradientMoments) -> GradientMoments:
    """The moments without their leg Grams, which roots do not use and which each group left out would add up anew."""
    return replace(moments, groups=tuple(replace(g, second={}, legs={}) for g in moments.groups), second={}, legs={})
