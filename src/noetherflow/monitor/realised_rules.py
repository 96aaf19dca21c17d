"""The ledger's rules that serve any optimiser: the update as it was made, with its decay where that is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from noetherflow.monitor.rule import (
    Array,
    Group,
    LedgerRule,
    Number,
    Pairs,
    Parts,
    Products,
    State,
    StepSettings,
    StepTensors,
    ledger_rule,
)


@dataclass(frozen=True, eq=False)
class RealisedProducts(Products):
    """Inner products of the weight before the step and of the update."""

    weight_update: Array
    update_square: Array


@dataclass(frozen=True)
class RealisedSettings(StepSettings):
    """`decay`: the share of the weight that decoupled decay takes, `lr w`; NaN where decay cannot be told apart."""

    decay: Number


class RealisedRule(LedgerRule[RealisedProducts, RealisedSettings]):
    """Any optimiser: the update is measured against a copy of the weights and is one part, `other`.

    Weight decay that is known to be decoupled, by the flag that torch's optimisers have for it, is split off. Other
    decay is somewhere in the update: its entry is NaN, not zero.
    """

    products = RealisedProducts
    step_settings = RealisedSettings
    keeps_copy = True

    def settings(self, group: Group, state: State, steps: float) -> RealisedSettings:
        lr, w = (float("nan" if v is None else v) for v in (group.get("lr"), group.get("weight_decay", 0.0)))
        return RealisedSettings(lr, 0.0 if w == 0 else lr * w if self.decoupled(group) else math.nan)

    def decoupled(self, group: Group) -> bool:
        """Whether the weights shrink by `1 - lr w` apart from the rest of the step."""
        return bool(group.get("decoupled_weight_decay"))

    def after(self, c: RealisedSettings, t: StepTensors) -> Pairs:
        update = t["weight_before"] - t["weight"]
        return {"weight_update": (t["weight_before"], update), "update_square": (update, update)}

    def first_order(self, q: RealisedProducts, c: RealisedSettings, reference: Number) -> Parts:
        decay = c.decay * q.weight_square
        return Parts(decay=decay, other=q.weight_update - np.where(np.isnan(decay), 0.0, decay))

    def second_order(self, q: RealisedProducts, c: RealisedSettings) -> Array:
        return q.update_square


@ledger_rule(torch.optim.Adafactor)
class DecoupledRule(RealisedRule):
    """Optimisers whose weight decay is always decoupled."""

    def decoupled(self, group: Group) -> bool:
        return True


if hasattr(torch.optim, "Muon"):
    ledger_rule(torch.optim.Muon)(DecoupledRule)


class LionRule(DecoupledRule):
    """Lion: the sign of an average of gradients, with decoupled decay."""

    not_booked = (
        "Lion steps by signs and keeps no average of squares: theta^T A D^-1 sign(m) is 0 for no D but in the mean "
        "over minibatches, at a minimum, for the root mean squares of what it takes the sign of, not in its state"
    )
