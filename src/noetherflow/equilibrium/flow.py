"""The Noether flow: how charges change per step, exactly and in expectation, and where they go (theory.md 3, 4, 7)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core import spd
from noetherflow.core.host import on_host
from noetherflow.core.printing import table, transposed
from noetherflow.core.settings import SGDConfig
from noetherflow.equilibrium.forecast import Forecast, orbit_forecast, whole_steps
from noetherflow.equilibrium.joint import noise_equilibrium
from noetherflow.equilibrium.orbit import MeasuredOrbit, Samples, measured_orbit, separate_orbits
from noetherflow.equilibrium.potential import Drift, Potential
from noetherflow.equilibrium.regime import (
    Regime,
    drift_parts,
    few_samples,
    regime_of,
    t_quantile,
)
from noetherflow.equilibrium.result import Settled
from noetherflow.errors import MomentError
from noetherflow.moments.result import GradientMoments
from noetherflow.moments.statistics import jackknife
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(frozen=True, eq=False)
class ChargeFlow:
    """The flow of one symmetry; tensors in the layout `symmetry.shape`, changes per step.

    Attributes:
        name, family, kind: Of the symmetry.
        charge: Today's charge, signed.
        decay, noise, step_size: The parts of `E[C' - C]`.
        error: Standard error of `noise + step_size`, None without groups of samples.
        groups: How many groups the error comes from.
        equilibrium: The charge at which this symmetry's flow stops with the others held; today's on coordinates
            without one.
        finite: Which coordinates (torus) or blocks (general_linear) have a finite equilibrium, `[blocks]`.
        relaxation_steps: Steps in which a small deviation of a coordinate (torus) or of the slowest direction of a
            block falls by e near the equilibrium, `[blocks]`; 0 where not finite.
        imbalance: Relative Noether flow, `[blocks]`.
    """

    name: str
    family: str
    kind: str
    charge: Tensor
    decay: Tensor
    noise: Tensor
    step_size: Tensor
    error: Tensor | None
    equilibrium: Tensor
    finite: Tensor
    relaxation_steps: Tensor
    imbalance: Tensor
    groups: int = 0

    @property
    def drift(self) -> Tensor:
        """`E[C' - C]` per step."""
        return self.decay + self.noise + self.step_size

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the interval of the drift that holds the truth with probability `level`, by
        Student's t of the groups of samples.

        Raises:
            MomentError: There are no errors: the moments have no groups.
        """
        if self.error is None:
            raise MomentError(f"the drift of {self.name!r} has no error: measure moments in at least two groups")
        half = t_quantile(level, self.groups) * self.error
        return self.drift - half, self.drift + half

    def phase(self, steps: float) -> str:
        """`fast` if every finite coordinate relaxes within `steps` of training, `slow` if none does, else `mixed`;
        `none` without a finite coordinate (theory.md section 7).
        """
        within = self.relaxation_steps[self.finite] <= steps
        if not len(within):
            return "none"
        if bool(within.all()):
            return "fast"
        return "mixed" if bool(within.any()) else "slow"

    def row(self) -> dict[str, Any]:
        """Norms over the coordinates, beside them the signed sums (for general_linear the trace) of charge and
        drift, and the median and largest relaxation time; the equilibrium over the finite ones (None where nothing
        is finite).
        """
        times = self.relaxation_steps[self.finite]
        return {
            "symmetry": self.name,
            "family": self.family,
            "kind": self.kind,
            "charge": _norm(self.charge),
            "equilibrium_charge": norm_where([(self.equilibrium, self.finite)]),
            "decay": _norm(self.decay),
            "noise": _norm(self.noise),
            "step_size": _norm(self.step_size),
            "drift": _norm(self.drift),
            "charge_sum": signed_sum(self.charge),
            "drift_sum": signed_sum(self.drift),
            "drift_error": None if self.error is None else _norm(self.error),
            "imbalance": float(self.imbalance.max()) if times.numel() else None,
            "relaxation_steps": float(times.median()) if times.numel() else None,
            "slowest_relaxation": float(times.max()) if times.numel() else None,
            "without_equilibrium": int((~self.finite).sum()),
        }

    def to_dict(self) -> dict[str, Any]:
        values = ("charge", "equilibrium", "decay", "noise", "step_size", "finite", "relaxation_steps", "imbalance")
        return {
            "symmetry": self.name,
            "family": self.family,
            "kind": self.kind,
            **{v: getattr(self, v).tolist() for v in values},
            "error": None if self.error is None else self.error.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Flow:
    """The Noether flow of a model: one `ChargeFlow` per symmetry, and forecasts of the charges from one measurement."""

    details: tuple[ChargeFlow, ...]
    sgd: SGDConfig
    loss: float
    excluded: dict[str, str]
    moments: GradientMoments
    orbit: MeasuredOrbit
    joint: bool
    regime: Regime

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

        Forecasts beyond `regime.horizon` are marked as not valid.

        Raises:
            ValueError: `steps` are not whole, non-negative and increasing.
        """
        charges = orbit_forecast(self.orbit, steps)
        found = {}
        if errors and len(self.moments.groups) > 1 and not self.orbit.needs_samples:
            found = jackknife(self.moments, charges, partial(self._charges, steps), self.sgd.dataset_size)
        errors_by_name = {n: e.error for n, e in found.items()}
        measured = (self.moments.samples, len(self.moments.groups))
        return Forecast(whole_steps(steps), charges, errors_by_name, self.joint, self.regime, *measured)

    def _charges(self, steps: Sequence[int] | Tensor, moments: GradientMoments) -> dict[str, Tensor]:
        potential = Potential.of(Drift.of(self.sgd), moments, self.sgd)
        return orbit_forecast(self.orbit.with_moments(moments, potential), steps)

    def rows(self, steps: float | None = None) -> list[dict[str, Any]]:
        """One row of norms per symmetry; with the `steps` of a training, also the `phase` each symmetry is in."""
        return [r.row() | ({} if steps is None else {"phase": r.phase(steps)}) for r in self.details]

    def families(self) -> list[dict[str, Any]]:
        """One row per family under the names of `printing.MEANING`: norms over all its coordinates, of equilibrium
        charges over those that have one; None where nothing is finite.
        """
        return [self._family(f) for f in dict.fromkeys(r.family for r in self.details)]

    def _family(self, family: str) -> dict[str, Any]:
        own = [r for r in self.details if r.family == family]
        times = torch.cat([r.relaxation_steps[r.finite] for r in own])
        return {
            "family": family,
            "symmetries": len(own),
            "charge": _norm(_flat(r.charge for r in own)),
            "drift per step: weight decay": _norm(_flat(r.decay for r in own)),
            "drift per step: noise": _norm(_flat(r.noise for r in own)),
            "drift per step: step size": _norm(_flat(r.step_size for r in own)),
            "drift per step: sum": sum(signed_sum(r.drift) for r in own),
            "imbalance": float(_flat(r.imbalance for r in own).max()) if times.numel() else None,
            "relaxation (steps)": float(np.median(times.numpy())) if times.numel() else None,
            "coordinates without equilibrium": sum(int((~r.finite).sum()) for r in own),
            "equilibrium charge, others held": norm_where([(r.equilibrium, r.finite) for r in own]),
        }

    def __str__(self) -> str:
        lines = [
            f"Noether flow at lr {self.sgd.lr:g}, batch size {self.sgd.batch_size}, loss {self.loss:.4g}",
            table(transposed(self.families()), *EXPLAINED) if self.details else "(no symmetry)",
        ]
        lines += [str(self.regime), *(few_samples(self.moments.samples) if self.moments.groups else [])]
        return "\n".join([*lines, *(f"excluded: {n}: {why}" for n, why in self.excluded.items())])

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        return {
            "sgd": self.sgd.to_dict(),
            "loss": self.loss,
            "regime": self.regime.to_dict(),
            "excluded": dict(self.excluded),
            "symmetries": [r.to_dict() for r in self.details],
        }


EXPLAINED = ("charge", "drift per step", "imbalance", "relaxation (steps)", "equilibrium charge", "–")
"""Names of `printing.MEANING` that a table of families needs."""


@on_host
def noether_flow(
    model: nn.Module, syms: SymmetrySet, mom: GradientMoments, sgd: SGDConfig, *, samples: Samples | None = None
) -> Flow:
    """Expected change of every charge per SGD step, its parts, and the time scale.

    `E[C' - C] = -lr (2w - lr w^2) C + lr^2 D(Cov[g_B]) + lr^2 D(gbar gbar^T)`: decay, noise and step-size parts. With
    momentum `m` the leading-order stationary coefficients of `Drift.of`, valid while a charge relaxes slowly against
    `1 / (1 - m)` steps.

    Args:
        model: Only read.
        syms: Its symmetries; those on frozen parameters are excluded and listed.
        mom: Moments of per-sample gradients at these weights.
        sgd: How SGD steps.
        samples: As in `noise_equilibrium`; they carry no groups, so forecasts then have no errors.

    Returns:
        A Flow. Its `regime` says how much of the drift is the mean gradient's and for how many steps the measured
        gradients
        last: the theory's noise regime has a small share and a long horizon.

    Raises:
        MomentError: A symmetry was not measured, or the moments are not those of a loss with these symmetries at these
            weights.

    Example:
        ```
        flow = nf.noether_flow(model, syms, mom, nf.SGDConfig(lr=0.05, batch_size=16))
        print(flow)
        flow["0 -> 2"].drift  # E[C' - C] of one symmetry, coordinate by coordinate
        flow.forecast([0, 1000]).charges["0 -> 2"]
        ```

    Source: theory.md sections 4 and 7.
    """
    syms = syms.trainable(model)
    potential = Potential.of(Drift.of(sgd), mom, sgd)
    syms = syms.without({s.name: why for s in syms if (why := s.pulled(lambda _: sgd.weight_decay > 0))})
    alone = noise_equilibrium(model, syms, mom, sgd, joint=False, samples=samples)
    errors = _drift_errors(syms, mom, sgd)
    details = tuple(
        _charge_flow(s, settled, mom, sgd, errors.get(s.name)) for s, settled in zip(syms, alone, strict=True)
    )
    orbit, joint = _orbit(model, tuple(syms), mom, potential, samples)
    regime = regime_of(tuple(syms), mom, sgd)
    return Flow(details, sgd, mom.loss, dict(syms.excluded), mom, orbit, joint, regime)


def _charge_flow(
    symmetry: Symmetry, settled: Settled, mom: GradientMoments, sgd: SGDConfig, error: Tensor | None
) -> ChargeFlow:
    drift = Drift.of(sgd)
    noise, step_size = drift_parts(symmetry, mom, sgd)
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
        groups=len(mom.groups),
    )


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def signed_sum(values: Tensor) -> float:
    """The sum over coordinates, for general_linear the trace: positive where the + side is the larger."""
    return float((values.diagonal(dim1=-2, dim2=-1) if values.ndim == 3 else values).sum())


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in parts])


def norm_where(parts: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """The norm of `values[finite]` over all `(values, finite)`, None where nothing is finite."""
    chosen = _flat(values[finite] for values, finite in parts)
    return _norm(chosen) if chosen.numel() else None


def _drift_errors(syms: SymmetrySet, mom: GradientMoments, sgd: SGDConfig) -> dict[str, Tensor]:
    """Jackknife standard errors of `noise + step_size`."""
    if len(mom.groups) < 2:
        return {}

    def drifts(m: GradientMoments) -> dict[str, Tensor]:
        return {s.name: sum(drift_parts(s, m, sgd), torch.zeros(())) for s in syms}

    legs = replace(mom, groups=tuple(replace(g, squares={}) for g in mom.groups))
    return {n: e.error for n, e in jackknife(legs, drifts(mom), drifts, sgd.dataset_size).items()}


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
