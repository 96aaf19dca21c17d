"""The ledger's rules for RMSprop and NAdam: what an optimiser does that divides by roots of average squares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from noetherflow.monitor.rule import (
    Array,
    GradientRoots,
    Group,
    LedgerRule,
    Number,
    Pairs,
    Parts,
    PreconditionedParts,
    Products,
    RootRates,
    State,
    StepSettings,
    StepTensors,
    ledger_rule,
)


@dataclass(frozen=True, eq=False)
class DividedProducts(Products):
    """Inner products before the step, `scaled_square_after` apart: of weight, gradient, average `m`, buffer `b`.

    `fed` is `n = lead (gradient + coupled weight) + memory m`, `divided` is `n / d`, `direction` is `p = n / d + buffer
    b`; `scaled` means times `d`, the divisor of this step, in `scaled_square` that of the step before.
    """

    weight_gradient: Array
    weight_average: Array
    weight_buffer: Array
    weight_scaled_buffer: Array
    weight_direction: Array
    direction_square: Array
    fed_square: Array
    divided_square: Array
    scaled_square_now: Array
    scaled_direction_square: Array
    scaled_square: Array
    scaled_square_after: Array


@dataclass(frozen=True)
class DividedSettings(StepSettings):
    """`update = lr p + lr decoupled weight`, `p = (lead (sign g + coupled weight) + memory m) / d + buffer b`.

    `d = sqrt(v / filled) + eps` of the step's own `v = square_memory v + (1 - square_memory) (g + coupled weight)^2`,
    with `centered` of `v - a^2`, `a` the average gradient with the same memory. `filled_before` is `filled` one step
    earlier, 0 before the first step.
    """

    sign: Number
    coupled: Number
    decoupled: Number
    lead: Number
    memory: Number
    buffer: Number
    square_memory: Number
    filled: Number
    filled_before: Number
    eps: Number
    centered: Number


class DividedRule(LedgerRule[DividedProducts, DividedSettings]):
    """An optimiser that divides by roots of average squares, and whose step the state after it does not tell.

    The gradient is read before the step, and the divisor that the step will use is formed from it. The entries of the
    plain charge are told apart as for Adam: one number, the `reference` `|n / d| / |n|` over all watched weights,
    stands for the preconditioner in gradient, memory and coupled decay, and the rest is the preconditioner's.

    A subclass names the keys of the state: `square_key`, and `average_key`, `buffer_key`, `centre_key` where it has
    them ("" where not).
    """

    products = DividedProducts
    step_settings = DividedSettings
    carried: ClassVar[Mapping[str, str]] = {"scaled_square": "scaled_square_after"}
    counts_steps = True
    lr_power = 1.0
    effective_lr_words = (
        "the effective learning rate goes as one over the norm: the step does not grow with the gradient"
    )
    square_key: ClassVar[str]
    average_key: ClassVar[str] = ""
    buffer_key: ClassVar[str] = ""
    centre_key: ClassVar[str] = ""

    def reads_gradient(self, c: DividedSettings) -> bool:
        return True

    def before(self, c: DividedSettings, t: StepTensors) -> Pairs:
        weight, zero = t["weight"], torch.zeros_like(t["weight"])
        pairs: Pairs = {}
        if c.filled_before and self.square_key in t:
            pairs["scaled_square"] = (
                weight,
                _divisor(c, c.filled_before, t[self.square_key], self._centre(c, t)) * weight,
            )
        if "gradient" not in t:
            return pairs
        g = t["gradient"] * float(c.sign)
        fed = g + float(c.coupled) * weight
        keep = float(c.square_memory)
        square = t.get(self.square_key, zero) * keep + fed.square() * (1 - keep)
        centre = self._centre(c, t)
        d = _divisor(c, c.filled, square, None if centre is None else centre * keep + fed * (1 - keep))
        average, buffer = t.get(self.average_key, zero), t.get(self.buffer_key, zero)
        n = fed * float(c.lead) + average * float(c.memory)
        q = n / d
        p = q + buffer * float(c.buffer)
        return pairs | {
            "weight_gradient": (weight, g),
            "weight_average": (weight, average),
            "weight_buffer": (weight, buffer),
            "weight_scaled_buffer": (weight, d * buffer),
            "weight_direction": (weight, p),
            "direction_square": (p, p),
            "fed_square": (n, n),
            "divided_square": (q, q),
            "scaled_square_now": (weight, d * weight),
            "scaled_direction_square": (p, d * p),
        }

    def after(self, c: DividedSettings, t: StepTensors) -> Pairs:
        d = _divisor(c, c.filled, t[self.square_key], self._centre(c, t))
        return {"scaled_square_after": (t["weight"], d * t["weight"])}

    def _centre(self, c: DividedSettings, t: StepTensors) -> Tensor | None:
        """The average gradient that is taken off; zeros before the first step, None where nothing is."""
        return t.get(self.centre_key, torch.zeros_like(t["weight"])) if c.centered else None

    def first_order(self, q: DividedProducts, c: DividedSettings, reference: Number) -> Parts:
        scalar, taken = c.lr * reference, c.lr * c.decoupled
        gradient, coupled = scalar * c.lead * q.weight_gradient, scalar * c.lead * c.coupled * q.weight_square
        memory, held = scalar * c.memory * q.weight_average, c.lr * c.buffer * q.weight_buffer
        return Parts(
            gradient=gradient,
            momentum=memory + held,
            decay=coupled + taken * q.weight_square,
            preconditioner=c.lr * q.weight_direction - held - gradient - coupled - memory,
        )

    def second_order(self, q: DividedProducts, c: DividedSettings) -> Array:
        taken = c.lr * c.decoupled
        both = 2 * c.lr * taken * q.weight_direction + taken * taken * q.weight_square
        return c.lr**2 * q.direction_square + both

    def reference(self, q: DividedProducts, picked: Array) -> Number:
        mine = (q.divided_square * picked).sum(-1, keepdims=True)
        plain = (q.fed_square * picked).sum(-1, keepdims=True)
        return np.sqrt(np.divide(mine, plain, out=np.zeros_like(mine), where=plain > 0))

    def preconditioned(self, q: DividedProducts, c: DividedSettings) -> PreconditionedParts:
        """The books of `sum a d theta^2`; in the first step there is no `d` before, and its transport is zero."""
        taken, now = c.lr * c.decoupled, q.scaled_square_now
        before = np.where(np.asarray(c.filled_before) > 0, q.scaled_square, now)
        gradient, coupled = c.lead * q.weight_gradient, c.lead * c.coupled * q.weight_square
        memory = c.memory * q.weight_average + c.buffer * q.weight_scaled_buffer
        cross = 2 * c.lr * taken * (gradient + coupled + memory)
        return PreconditionedParts(
            before=before,
            after=q.scaled_square_after,
            gradient=-2 * c.lr * gradient,
            momentum=-2 * c.lr * memory,
            decay=cross - 2 * c.lr * coupled - taken * (2 - taken) * now,
            noise=c.lr**2 * q.scaled_direction_square,
            transport=now - before,
        )


def _divisor(c: DividedSettings, filled: Number, square: Tensor, centre: Tensor | None) -> Tensor:
    """`sqrt(v / filled) + eps`, a new tensor."""
    spread = square if centre is None else (square - centre.square()).clamp_min(0)
    return (spread / float(filled)).sqrt() + float(c.eps)


@ledger_rule(torch.optim.RMSprop)
class RMSpropRule(DividedRule):
    """RMSprop with momentum (whose buffer holds divided gradients), centered, maximize and coupled decay; exact."""

    state_keys = ("square_avg", "grad_avg", "momentum_buffer")
    square_key = "square_avg"
    buffer_key = "momentum_buffer"
    centre_key = "grad_avg"
    keeps_squares = True

    def settings(self, group: Group, state: State, steps: float) -> DividedSettings:
        return DividedSettings(
            lr=float(group["lr"]),
            sign=-1.0 if group["maximize"] else 1.0,
            coupled=float(group["weight_decay"]),
            decoupled=0.0,
            lead=1.0,
            memory=0.0,
            buffer=float(group["momentum"]),
            square_memory=float(group["alpha"]),
            filled=1.0,
            filled_before=float(state.get("square_avg") is not None and steps > 0),
            eps=float(group["eps"]),
            centered=float(group["centered"]),
        )

    def gradient_roots(self, c: DividedSettings, state: State) -> GradientRoots | None:
        """From the average of squares before the step, which has no bias correction; a centred one tells no more than
        the variance. The mean gradient is that of the buffer, unknown without one.
        """
        if not c.filled_before or c.centered:
            return None
        root = state["square_avg"].sqrt()
        d = root + float(c.eps)
        mean = state["momentum_buffer"] * d * (1 - float(c.buffer)) if c.buffer else torch.full_like(root, math.nan)
        return GradientRoots(root, mean, d)

    def root_rates(self, c: DividedSettings) -> RootRates:
        """The buffer adds up gradients: `lr / (1 - momentum)` of their mean. Coupled decay: NaN, as for Adam."""
        kept = 1 - np.asarray(c.buffer)
        w = np.where(np.asarray(c.coupled) > 0, np.nan, 0.0)
        return RootRates(np.asarray(c.lr) / kept, w, (2 - kept) / kept)


@ledger_rule(torch.optim.NAdam)
class NAdamRule(DividedRule):
    """NAdam, with decay coupled or decoupled; exact.

    Its step `k` is `(c g + e m') / d` with `c = (1 - u_k) / (1 - U_k)`, `e = u_(k+1) / (1 - U_k u_(k+1))`, the momentum
    `u_k = b1 (1 - 0.96^(k momentum_decay) / 2)` and its product `U_k` over the steps so far.
    """

    state_keys = ("exp_avg", "exp_avg_sq")
    square_key = "exp_avg_sq"
    average_key = "exp_avg"

    def settings(self, group: Group, state: State, steps: float) -> DividedSettings:
        b1, b2 = (float(b) for b in group["betas"])
        k, w = steps + 1, float(group["weight_decay"])
        now, later = (b1 * (1 - 0.5 * 0.96 ** (j * float(group["momentum_decay"]))) for j in (k, k + 1))
        made: Tensor = state.get("mu_product", torch.ones((), device="cpu"))
        product = float(made * now)  # rounded as the optimiser's own
        fresh, kept = (1 - now) / (1 - product), later / (1 - product * later)
        decoupled = bool(group["decoupled_weight_decay"])
        return DividedSettings(
            lr=float(group["lr"]),
            sign=-1.0 if group["maximize"] else 1.0,
            coupled=0.0 if decoupled else w,
            decoupled=w if decoupled else 0.0,
            lead=fresh + kept * (1 - b1),
            memory=kept * b1,
            buffer=0.0,
            square_memory=b2,
            filled=1 - b2**k,
            filled_before=1 - b2**steps,
            eps=float(group["eps"]),
            centered=0.0,
        )
