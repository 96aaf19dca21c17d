"""What a measured drift consists of, and for how long it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from noetherflow.core.printing import show
from noetherflow.core.settings import SGDConfig
from noetherflow.equilibrium.potential import Drift
from noetherflow.moments.result import GradientMoments, trace
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry

LASTING = 10.0
"""Memories of momentum that the mean gradient must last at least. With a gradient that falls by `1/e` in `t` memories
its drift is smaller than that of a constant one by about `1 / (1 + 1 / t)`; and the horizon is an upper bound."""
COUNTS = 0.1
"""Share of the drift from which the mean gradient counts."""
FOR_EVER = 1e9
"""Steps that no training makes: at a minimum the horizon is infinite but for rounding."""
FIRST_ORDER = (
    "first order in lr: right far below the largest stable lr, off near it, void above; that lr is not measured here "
    "(nf.sharpness_forecast, nf.diagnose)"
)


@dataclass(frozen=True)
class Regime:
    """How much of the drift is the mean gradient's, and how many steps the measured gradients last.

    Attributes:
        mean_share: The step-size part's share of the drift by gradients, `sum |step_size| / sum (|noise| +
            |step_size|)` over all coordinates; near 0 in the noise regime of the theory, near 1 early in training
            with momentum.
        horizon: Steps after which the loss would be gone if the mean gradient stayed as it is; infinite at a minimum.
            An upper bound: along stiff directions gradients turn sooner.
        memory: Steps that momentum remembers, over which it counts the mean gradient as constant; 0 without momentum.
    """

    mean_share: float
    horizon: float
    memory: float = 0.0

    @property
    def constant(self) -> bool:
        """Whether the mean gradient may be taken to be constant over momentum's memory, or hardly counts."""
        return self.mean_share < COUNTS or self.horizon >= LASTING * self.memory

    @property
    def cautions(self) -> list[str]:
        """What to say of a drift whose mean gradient is not known to last for momentum's memory."""
        if self.constant:
            return []
        return [
            f"NOT VALID as a drift: momentum remembers {self.memory:.0f} steps and counts the mean gradient as "
            f"constant over them, but it lasts {self._steps()} {self._word()} at most, fewer than "
            f"{LASTING:.0f} memories; where gradients turn sooner the drift is smaller by up to "
            f"{2 * self.memory - 1:.0f} times; {self.advice}"
        ]

    def __str__(self) -> str:
        lasts = f", lasts about {self._steps()} {self._word()}" if self.horizon < FOR_EVER else ""
        return f"mean gradient: {self.mean_share:.0%} of the drift{lasts}"

    def lines(self, verbose: bool) -> list[str]:
        """What is printed below every drift, forecast and equilibrium; `verbose`: with what first order means."""
        return [str(self), FIRST_ORDER] if verbose else [f"{self}; first order in lr"]

    def _steps(self) -> str:
        """A whole number, at least 1."""
        return f"{max(1, round(self.horizon)):,}" if self.horizon < 1e7 else show(self.horizon)

    def _word(self) -> str:
        return "step" if self._steps() == "1" else "steps"

    @property
    def advice(self) -> str:
        """What is valid beyond the horizon."""
        return (
            f"by step {self._steps()} the measured mean gradient would have used up the loss, so gradients and "
            "noise are others by then; valid is the drift along the run: nf.Ledger books it step by step, and "
            "snapshots of the momentum buffer give it, nf.noether_flow(model, syms, optimizer=optimizer)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The attributes, an infinite `horizon` as None, and `constant`."""
        horizon = self.horizon if math.isfinite(self.horizon) else None
        return {"mean_share": self.mean_share, "horizon": horizon, "memory": self.memory, "constant": self.constant}


FEW = 200
"""Samples below which intervals hold the truth less often than they say."""


def few_samples(samples: int, each: str = "samples") -> list[str]:
    """A line of caution where standard errors come from few samples, or minibatches as replicates; else nothing."""
    if samples >= FEW:
        return []
    return [f"{samples} {each} are few: errors come out small"]


def drift_parts(
    symmetries: Sequence[Symmetry], moments: GradientMoments, sgd: SGDConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """The noise and the step-size part of `E[C' - C]` by symmetry, layout `symmetry.shape` (theory.md section 4).

    Mean gradients are read one after the other, once each: those of a jackknife are unpacked for it.
    """
    drift = Drift.of(sgd)
    (a, b), (c, d) = moments.batch_weights(sgd)
    means = _forms(symmetries, moments.mean)
    out = {}
    for s in symmetries:
        second, mean = s.combine(tuple(m.cpu() for m in moments.second[s.name])), means[s.name]
        out[s.name] = drift.noise * (a * second + b * mean), drift.mean * (c * second + d * mean)
    return out


def _forms(symmetries: Sequence[Symmetry], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`sum_legs exponent * dX dX^T` of the mean gradient, by symmetry."""
    users: dict[str, list[tuple[Symmetry, Leg]]] = {}
    for s in symmetries:
        for leg in s.weight_legs:
            users.setdefault(leg.parameter, []).append((s, leg))
    total = {s.name: torch.zeros(s.shape, dtype=torch.float64) for s in symmetries}
    for name, legs in users.items():
        gradient = mean[name].cpu()
        for s, leg in legs:
            total[s.name] += leg.exponent * s.leg_gram(leg, gradient, torch.float64)
    return total


def regime_of(symmetries: Sequence[Symmetry], moments: GradientMoments, sgd: SGDConfig) -> Regime:
    """The regime of the symmetries' drift.

    Horizon: as long as the mean gradient stays, steps of `lr / (1 - m)` along it lower the loss by `lr |gbar|^2 / (1
    - m)` each. A loss that cannot fall below zero allows at most `loss (1 - m) / (lr |gbar|^2)` of them: by then the
    gradient must have changed. It is a first-order estimate, and an upper bound where the loss at the minimum is not
    zero. The mean gradient is that of the measured parameters, its sampling noise taken off.
    """
    parts = list(drift_parts(symmetries, moments, sgd).values())
    noise, mean = (sum((float(p[k].abs().sum()) for p in parts), 0.0) for k in (0, 1))
    share = mean / (noise + mean) if noise + mean > 0 else 0.0
    square = mean_gradient_square(symmetries, moments, sgd)
    if square <= 0 or not moments.loss > 0:
        return Regime(share, math.inf)
    memory = 1 / (1 - sgd.momentum) if sgd.momentum else 0.0
    return Regime(share, moments.loss / (sgd.effective_lr * square), memory)


def mean_gradient_square(symmetries: Sequence[Symmetry], moments: GradientMoments, sgd: SGDConfig) -> float:
    """`|gbar|^2` over the measured parameters, less what the noise of finitely many samples adds where that is known.

    An unbiased estimate: at a minimum it scatters around 0 and may be negative.
    """
    _, (c, d) = moments.batch_weights(sgd)
    traces = {n: float(t.sum()) for n, t in moments.squares.items()}
    for s in symmetries:
        for leg, second in zip(s.weight_legs, moments.second[s.name], strict=True):
            whole = bool((leg.entry_coordinates(tuple(moments.mean[leg.parameter].shape)) >= 0).all())
            if leg.parameter not in traces and whole:
                traces[leg.parameter] = float(trace(second))
    total = 0.0
    for name, mean in moments.mean.items():
        square = float(mean.double().square().sum())
        total += c * traces[name] + d * square if name in traces else square
    return total
