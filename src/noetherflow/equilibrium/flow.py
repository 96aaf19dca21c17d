"""The Noether flow: how charges change per step, exactly and in expectation, and where they go (theory.md 3, 4, 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core import spd
from noetherflow.core.host import on_host
from noetherflow.core.optimizers import Settings, check_settings
from noetherflow.core.printing import assumed, count, grouped, table, transposed
from noetherflow.core.settings import SGDConfig
from noetherflow.core.shown import Shown
from noetherflow.equilibrium.adaptive import assumptions
from noetherflow.equilibrium.adaptive_flow import ForecastGroups, adaptive_drift, b2_of
from noetherflow.equilibrium.arguments import refuse_strangers
from noetherflow.equilibrium.charge_flow import ChargeFlow, flat, largest, norm_of, norm_where, signed_sum
from noetherflow.equilibrium.feedback import SquareFeedback, refuse_feedback_of_others
from noetherflow.equilibrium.forecast import Forecast, TooFast, all_reached, orbit_forecast, whole_steps
from noetherflow.equilibrium.joint import noise_equilibrium
from noetherflow.equilibrium.lag import lagging_forecast
from noetherflow.equilibrium.orbit import MeasuredOrbit, Samples, measured_orbit, separate_orbits
from noetherflow.equilibrium.potential import Drift, Potential
from noetherflow.equilibrium.regime import Regime, drift_parts, few_samples, regime_of
from noetherflow.equilibrium.result import Settled
from noetherflow.equilibrium.state_flow import state_flow
from noetherflow.equilibrium.state_result import StateFlow
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.result import GradientMoments
from noetherflow.moments.statistics import jackknife
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(frozen=True, eq=False)
class Flow(Shown):
    """The Noether flow of a model: one `ChargeFlow` per symmetry, and forecasts of the charges from one measurement."""

    details: tuple[ChargeFlow, ...]
    sgd: Settings
    loss: float
    excluded: dict[str, str]
    moments: GradientMoments
    orbit: MeasuredOrbit
    joint: bool
    regime: Regime
    cautions: tuple[str, ...] = ()
    groups: ForecastGroups | None = None
    feedback: SquareFeedback | None = None

    def __getitem__(self, name: str) -> ChargeFlow:
        for row in self.details:
            if row.name == name:
                return row
        raise KeyError(f"no symmetry named {name!r}; names: {[r.name for r in self.details][:20]}")

    @on_host
    def forecast(self, steps: Sequence[int] | Tensor, *, errors: bool = True) -> Forecast:
        """`C(k)` at the given numbers of steps, from the exact orbit ODE `dC/dk = E[C' - C]` (theory.md section 7).

        Every coefficient comes from the one measurement; what it cannot know is how the orbit itself (the loss, the
        function) moves meanwhile. All symmetries move together where the moments determine that (`Forecast.joint`),
        else each with the others held. `errors`: standard errors by jackknife where the moments carry groups and
        determine the orbit without samples, at the cost of one more forecast per group.

        Under Adam the charges are preconditioned, each at the `v` of its step, which lags behind; errors need groups
        with entries (`gradient_moments(..., entries=True)`), and there is one at step 0 too: `v` is measured.
        Forecasts beyond `regime.horizon`, or of a mean gradient that momentum counts as constant and that may not be
        (`regime.constant`), are marked as not valid. Where the flow changes too fast to be followed, the
        forecast ends before the last step, says so (`Forecast.asked`), and has no errors.

        Raises:
            DataError: `steps` are not whole, non-negative and increasing, or not even the first can be reached.
        """
        at, measured = whole_steps(steps), (self.moments.samples, len(self.moments.groups))
        if not isinstance(self.sgd, SGDConfig) or self.sgd.groups:
            return self._lagging_forecast(self.sgd, at, errors)
        charges = orbit_forecast(self.orbit, at)
        whole = all(len(c) == len(at) for c in charges.values())
        if not (errors and whole and measured[1] > 1 and not self.orbit.needs_samples):
            return self._forecast(at, charges, {}, measured)
        try:
            found = jackknife(self.moments, charges, partial(self._charges, at), self.sgd.dataset_size)
        except TooFast:
            return self._forecast(at, charges, {}, measured)
        return self._forecast(at, charges, {n: e.error for n, e in found.items()}, measured)

    def _lagging_forecast(self, config: Settings, at: tuple[int, ...], errors: bool) -> Forecast:
        """The forecast of preconditioned charges."""
        charges = lagging_forecast(self.orbit, at, b2_of(config))
        whole = all(len(c) == len(at) for c in charges.values())
        if not (errors and whole and self.groups is not None):
            return self._forecast(at, charges, {}, (self.moments.samples, 0))
        sure = self.groups.errors(at, charges)
        return self._forecast(at, charges, sure, (self.moments.samples, len(self.moments.groups)))

    def _forecast(
        self, at: tuple[int, ...], charges: dict[str, Tensor], errors: dict[str, Tensor], measured: tuple[int, int]
    ) -> Forecast:
        """The forecast of the steps that were reached."""
        reached = min((len(c) for c in charges.values()), default=len(at))
        asked = 0 if reached == len(at) else at[-1]
        families = {r.name: r.family for r in self.details}
        adaptive = not isinstance(self.sgd, SGDConfig)
        return Forecast(at[:reached], charges, errors, self.joint, self.regime, *measured, families, asked, adaptive)

    def _charges(self, steps: tuple[int, ...], moments: GradientMoments) -> dict[str, Tensor]:
        """Charges by moments without one group. Raises TooFast where not all steps are reached."""
        assert isinstance(self.sgd, SGDConfig)
        potential = Potential.of(Drift.of(self.sgd), moments, self.sgd)
        return all_reached(orbit_forecast(self.orbit.with_moments(moments, potential), steps), steps)

    def rows(self, steps: float | None = None) -> list[dict[str, Any]]:
        """One row of norms per symmetry; with the `steps` of a training, also the `phase` each symmetry is in."""
        return [r.row() | ({} if steps is None else {"phase": r.phase(steps)}) for r in self.details]

    def families(self) -> list[dict[str, Any]]:
        """One row per family under the names of `printing.MEANING`: norms of charges, of equilibrium charges over the
        coordinates that have one; the parts of the drift summed with their signs, so that they add up to `sum`; None
        where nothing is finite.
        """
        return [self._family(f) for f in dict.fromkeys(r.family for r in self.details)]

    def _family(self, family: str) -> dict[str, Any]:
        own = [r for r in self.details if r.family == family]
        times = torch.cat([r.relaxation_steps[r.finite] for r in own])
        added = [r.feedback for r in own if r.feedback is not None]
        return {
            "family": family,
            "symmetries": len(own),
            "charge": norm_of(flat(r.charge for r in own)),
            "drift per step: weight decay": sum(signed_sum(r.decay) for r in own),
            "drift per step: noise": sum(signed_sum(r.noise) for r in own),
            "drift per step: step size": sum(signed_sum(r.step_size) for r in own),
            **({"drift per step: feedback of v": sum(map(signed_sum, added))} if added else {}),
            "drift per step: sum": sum(signed_sum(r.drift) for r in own),
            "drift per step: norm": norm_of(flat(r.drift for r in own)),
            "imbalance": largest(flat(r.imbalance for r in own), torch.cat([r.finite for r in own])),
            "relaxation (steps)": float(np.median(times.numpy())) if times.numel() else None,
            "coordinates without equilibrium": sum(int((~r.finite).sum()) for r in own),
            "equilibrium charge, others held": norm_where([(r.equilibrium, r.finite) for r in own]),
        }

    def table_rows(self) -> list[dict[str, Any]]:
        """`rows()`."""
        return self.rows()

    @property
    def _each(self) -> str:
        """What one sample of the moments is, in words."""
        return "samples" if self.moments.replicates is None else "minibatches"

    def _sentence(self) -> str:
        """Of how many symmetries, under what optimiser, and how long it takes."""
        times = [r.relaxation_steps[r.finite] for r in self.details]
        known = torch.cat(times) if times else torch.zeros(0)
        settle = f": half settles within about {np.median(known.numpy()):,.0f} steps" if known.numel() else ""
        where = f"at lr {self.sgd.lr:g}, batch size {self.sgd.batch_size}, loss {self.loss:.4g}"
        return f"Noether flow of {count(len(self.details), 'symmetry', 'symmetries')} {where}{settle}"

    def describe(self, *, verbose: bool = False, legend: bool = True) -> str:
        """A sentence, a table by family, and what the numbers rest on; see `Shown.describe`."""
        lines = [self._sentence()]
        if self.details:
            lines.append(table(transposed(self.families()), *(EXPLAINED if legend else ())))
        if not isinstance(self.sgd, SGDConfig):
            lines.append("charges are preconditioned: every squared weight times the root mean square of its gradient")
        lines += assumed(assumptions(self.sgd, self.feedback, [r.charge for r in self.details]), verbose)
        lines += [
            *self.regime.lines(verbose),
            *(f"CAUTION: {text}" for text in self.cautions),
            *self.regime.cautions,
            *(few_samples(self.moments.samples, self._each) if self.moments.groups else []),
        ]
        lines += grouped("without equilibrium", {r.name: r.reason for r in self.details if r.reason}, verbose)
        return "\n".join([*lines, *grouped("excluded", self.excluded, verbose)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "sgd": self.sgd.to_dict(),
            "loss": self.loss,
            "regime": self.regime.to_dict(),
            "cautions": list(self.cautions),
            "excluded": dict(self.excluded),
            "symmetries": [r.to_dict() for r in self.details],
        }


EXPLAINED = ("charge", "drift per step", "imbalance", "relaxation (steps)", "equilibrium charge", "–")
"""Names of `printing.MEANING` that a table of families needs."""


@overload
def noether_flow(
    model: nn.Module,
    syms: SymmetrySet,
    mom: GradientMoments,
    sgd: Settings,
    *,
    samples: Samples | None = None,
    feedback: SquareFeedback | None = None,
) -> Flow: ...


@overload
def noether_flow(model: nn.Module, syms: SymmetrySet, *, optimizer: Any, lr: float | None = None) -> StateFlow: ...


@on_host
def noether_flow(
    model: nn.Module,
    syms: SymmetrySet,
    mom: GradientMoments | None = None,
    sgd: Settings | None = None,
    *,
    samples: Samples | None = None,
    optimizer: Any = None,
    lr: float | None = None,
    feedback: SquareFeedback | None = None,
) -> Flow | StateFlow:
    """Expected change of every charge per optimiser step, its parts, and the time scale.

    From moments under SGD `E[C' - C] = -lr (2w - lr w^2) C + lr^2 D(Cov[g_B]) + lr^2 D(gbar gbar^T)`: decay, noise and
    step-size parts. With momentum `m` the leading-order stationary coefficients of `Drift.of`, valid while a charge
    relaxes slowly against `1 / (1 - m)` steps. Under Adam and Lion the same of the preconditioned charge
    (docs/adaptive.md).

    Or from the state of the optimiser of a run, without moments: `noether_flow(model, syms, optimizer=optimizer)`.

    Args:
        model: Only read.
        syms: Its symmetries; those on frozen parameters are excluded and listed.
        mom: Moments of per-sample gradients at these weights; for Adam and Lion with `entries=True`.
        sgd: How the optimiser steps.
        samples: As in `noise_equilibrium`, by default the factors in `mom`; they carry no groups, so forecasts then
            have no errors.
        optimizer: In place of `mom` and `sgd`: momentum SGD, Adam, AdamW or RMSprop of torch, or its `state_dict()`.
        lr: With `optimizer`: the learning rate to use where a schedule has taken the stored one to 0.
        feedback: With AdamConfig: `nf.square_feedback(...)` of these weights, which counts what `v` does where it
            follows the fluctuations of the weights (b2 far below 1), in drifts, equilibria and forecasts.

    Returns:
        A Flow; its `regime` says how much of the drift is the mean gradient's and for how many steps the measured
        gradients last: the theory's noise regime has a small share and a long horizon. A StateFlow for `optimizer`.

    Raises:
        MomentError: A symmetry was not measured, or the moments are not those of a loss with these symmetries at these
            weights.
        DataError: Neither moments with settings nor an optimiser, an optimiser without theory, or a feedback of
            other weights or settings.

    Example:
        ```
        flow = nf.noether_flow(model, syms, mom, nf.SGDConfig(lr=0.05, batch_size=16))
        print(flow)
        flow["0 -> 2"].drift  # E[C' - C] of one symmetry, coordinate by coordinate
        flow.forecast([0, 1000]).charges["0 -> 2"]
        print(nf.noether_flow(model, syms, optimizer=optimizer))  # of a run, without data
        ```

    Source: theory.md sections 4, 7 and 13.
    """
    refuse_strangers("noether_flow", model, syms, mom)
    if optimizer is not None:
        if mom is not None or sgd is not None:
            raise DataError("give moments and settings, or optimizer=, not both")
        if feedback is not None:
            raise DataError("feedback= goes with moments and nf.AdamConfig(...), not with optimizer=")
        return state_flow(model, syms, optimizer, lr=lr)
    if mom is None or sgd is None:
        raise DataError("noether_flow needs moments and settings (mom, sgd), or optimizer= for the state of a run")
    if lr is not None:
        raise DataError("lr= goes with optimizer=; with moments the learning rate is in the settings")
    check_settings(sgd)
    refuse_feedback_of_others(feedback, sgd)
    return _measured_flow(model, syms.trainable(model), mom, sgd, samples, feedback)


def _measured_flow(
    model: nn.Module,
    syms: SymmetrySet,
    mom: GradientMoments,
    sgd: Settings,
    samples: Samples | None,
    feedback: SquareFeedback | None,
) -> Flow:
    """The flow of trainable symmetries from moments; entry by entry where the optimiser or its groups ask for it."""
    if isinstance(sgd, SGDConfig) and not sgd.groups:
        return _sgd_flow(model, syms, mom, sgd, samples)
    drift = adaptive_drift(model, syms, mom, sgd, feedback)
    return Flow(
        details=drift.details,
        sgd=sgd,
        loss=mom.loss,
        excluded=dict(drift.symmetries.excluded),
        moments=mom,
        orbit=drift.orbit,
        joint=True,
        regime=drift.regime,
        cautions=drift.cautions,
        groups=drift.groups,
        feedback=feedback,
    )


def _sgd_flow(
    model: nn.Module, syms: SymmetrySet, mom: GradientMoments, sgd: SGDConfig, samples: Samples | None
) -> Flow:
    """The flow under SGD of trainable symmetries."""
    samples = mom.factors or None if samples is None else samples
    potential = Potential.of(Drift.of(sgd), mom, sgd)
    syms = syms.without({s.name: why for s in syms if (why := s.pulled(lambda _: sgd.weight_decay > 0))})
    alone = noise_equilibrium(model, syms, mom, sgd, joint=False, samples=samples)
    parts = drift_parts(tuple(syms), mom, sgd)
    errors = _drift_errors(syms, mom, sgd, parts)
    groups = len(mom.groups)
    details = tuple(
        _charge_flow(s, settled, parts[s.name], Drift.of(sgd), errors.get(s.name), groups)
        for s, settled in zip(syms, alone, strict=True)
    )
    orbit, joint = _orbit(model, tuple(syms), mom, potential, samples)
    regime = alone.regime or regime_of(tuple(syms), mom, sgd)
    return Flow(details, sgd, mom.loss, dict(syms.excluded), mom, orbit, joint, regime, alone.cautions)


def _charge_flow(
    symmetry: Symmetry,
    settled: Settled,
    parts: tuple[Tensor, Tensor],
    drift: Drift,
    error: Tensor | None,
    groups: int,
) -> ChargeFlow:
    """The flow of one charge from its equilibrium and the noise and step-size `parts` of its drift."""
    noise, step_size = parts
    return ChargeFlow(
        name=symmetry.name,
        family=symmetry.family,
        kind=symmetry.kind,
        charge=settled.charge_now,
        decay=-drift.decay * settled.charge_now,
        noise=noise,
        step_size=step_size,
        error=error,
        equilibrium=settled.charge,
        finite=settled.finite,
        relaxation_steps=_relaxation(symmetry, settled, drift.decay),
        imbalance=settled.imbalance_now,
        groups=groups,
        reason=settled.reason,
    )


def _drift_errors(
    syms: SymmetrySet, mom: GradientMoments, sgd: SGDConfig, parts: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Jackknife standard errors of `noise + step_size`, which are the `parts` of all samples."""
    if len(mom.groups) < 2:
        return {}

    def drifts(m: GradientMoments) -> dict[str, Tensor]:
        return _sums(drift_parts(tuple(syms), m, sgd))

    legs = replace(mom, groups=tuple(replace(g, squares={}) for g in mom.groups))
    return {n: e.error for n, e in jackknife(legs, _sums(parts), drifts, sgd.dataset_size).items()}


def _sums(parts: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {name: noise + step_size for name, (noise, step_size) in parts.items()}


def _relaxation(symmetry: Symmetry, settled: Settled, decay: float) -> Tensor:
    """`1 / (4 min eig(K^-1 Z))` at the equilibrium, `K = sum_legs exponent^2 K_leg` and `4 Z = sum_legs
    exponent^2 (decay K_leg + M_leg)`: `[blocks]`.

    Linearising `d(A K + K A)/dk = -4 (A Z + Z A)`, the flow of a small symmetric displacement `A`; for exponents of 1
    and -1 `Z = X = Y`. For a torus `K / (4 Z)`.
    """
    finite, times = settled.finite, torch.zeros(symmetry.blocks, dtype=torch.float64)
    if not settled.weight_grams or not bool(finite.any()):
        return times
    squares = [leg.exponent**2 for leg in symmetry.weight_legs]
    k = torch.stack([e * gram for e, gram in zip(squares, settled.weight_grams, strict=True)]).sum(0)
    m = torch.stack([e * gram for e, gram in zip(squares, settled.noise_grams, strict=True)]).sum(0)
    z = (decay * k + m) / 4
    if symmetry.is_torus:
        times[finite] = (k / (4 * z))[finite]
    else:
        root = spd.inv_sqrtm(z[finite])
        times[finite] = torch.linalg.eigvalsh(root @ k[finite] @ root).amax(-1) / 4
    return times


def _orbit(
    model: nn.Module,
    symmetries: Sequence[Symmetry],
    mom: GradientMoments,
    potential: Potential,
    samples: Samples | None,
) -> tuple[MeasuredOrbit, bool]:
    """The joint orbit where the moments determine it (and True), else every symmetry on its own."""
    try:
        orbit = measured_orbit(model, symmetries, mom, potential, samples)
    except MomentError:
        orbit = separate_orbits(model, symmetries, mom, potential)
        return orbit, False
    return orbit, True
