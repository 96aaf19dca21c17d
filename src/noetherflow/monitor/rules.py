"""The ledger's rules for torch's SGD, Adam and AdamW, and the choice of a rule for an optimiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

import noetherflow.monitor.divided_rules  # noqa: F401 - registers its rules
from noetherflow.core.foreign import LION, class_name, decays_weights
from noetherflow.equilibrium.potential import decay_rate, mean_rate, noise_rate
from noetherflow.monitor.realised_rules import DecoupledRule, LionRule, RealisedRule
from noetherflow.monitor.rule import (
    AnyRule,
    Array,
    DriftRates,
    GradientRoots,
    Group,
    LedgerRule,
    MemorySums,
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
    registered_rule,
)


@dataclass(frozen=True, eq=False)
class SGDProducts(Products):
    """Inner products of weight, gradient and momentum buffer, before the step and after it."""

    weight_gradient: Array
    gradient_square: Array
    weight_buffer: Array
    gradient_buffer: Array
    buffer_square: Array
    weight_buffer_after: Array
    buffer_square_after: Array


@dataclass(frozen=True)
class SGDSettings(StepSettings):
    """`update = lr (lead d + memory_lead b)` with `d = sign gradient + weight_decay weight`, b the buffer before.

    `momentum` is mu, `kept` is 1 - dampening (1 without momentum). `sign` is -1 with `maximize`, over the scale of a
    gradient scaler that the optimiser has still to divide by. `heavy_ball`: 1 for momentum that is not Nesterov's.
    """

    sign: Number
    weight_decay: Number
    lead: Number
    memory_lead: Number
    heavy_ball: Number
    momentum: Number
    kept: Number


@ledger_rule(torch.optim.SGD)
class SGDRule(LedgerRule[SGDProducts, SGDSettings]):
    """SGD with momentum, dampening, Nesterov, maximize and coupled weight decay; exact.

    The buffer becomes `b' = mu b + (1 - dampening) d`, in the first step `b' = d`. The update is `lr d` without
    momentum, `lr b'` for heavy ball and `lr (d + mu b')` for Nesterov. For heavy ball all follows from weight and
    buffer after the step, and the gradient's part is what momentum and decay leave of it: no gradient is read.
    """

    products = SGDProducts
    step_settings = SGDSettings
    carried: ClassVar[Mapping[str, str]] = {"weight_buffer": "weight_buffer_after"}
    state_keys = ("momentum_buffer",)
    momentum_key = "momentum_buffer"
    has_equilibrium = True
    lr_power = 2.0
    effective_lr_words = "the effective learning rate goes as one over the squared norm"
    not_booked = "SGD divides by nothing: the plain charge is the one that its steps leave alone at first order"

    def settings(self, group: Group, state: State, steps: float) -> SGDSettings:
        mu, kept = float(group["momentum"]), 1 - float(group["dampening"])
        started = state.get("momentum_buffer") is not None
        fresh = kept if started else 1.0
        if mu == 0:
            lead, memory_lead = 1.0, 0.0
        elif group["nesterov"]:
            lead, memory_lead = 1 + mu * fresh, mu * mu * started
        else:
            lead, memory_lead = fresh, mu * started
        return SGDSettings(
            lr=float(group["lr"]),
            sign=-1.0 if group["maximize"] else 1.0,
            weight_decay=float(group["weight_decay"]),
            lead=lead,
            memory_lead=memory_lead,
            heavy_ball=float(mu != 0 and not group["nesterov"]),
            momentum=mu,
            kept=kept if mu else 1.0,
        )

    def reads_gradient(self, c: SGDSettings) -> bool:
        return not c.heavy_ball

    def before(self, c: SGDSettings, t: StepTensors) -> Pairs:
        weight, g = t["weight"], t.get("gradient")
        pairs: Pairs = {} if g is None else {"weight_gradient": (weight, g), "gradient_square": (g, g)}
        if "momentum_buffer" in t and c.memory_lead:
            b = t["momentum_buffer"]
            pairs["weight_buffer"] = (weight, b)
            if g is not None:
                pairs |= {"gradient_buffer": (g, b), "buffer_square": (b, b)}
        return pairs

    def after(self, c: SGDSettings, t: StepTensors) -> Pairs:
        if not c.heavy_ball:
            return {}
        b = t["momentum_buffer"]
        return {"weight_buffer_after": (t["weight"], b), "buffer_square_after": (b, b)}

    def first_order(self, q: SGDProducts, c: SGDSettings, reference: Number) -> Parts:
        lead = c.lr * c.lead
        momentum = c.lr * c.memory_lead * q.weight_buffer
        decay = lead * c.weight_decay * q.weight_square
        rest = c.lr * (q.weight_buffer_after + c.lr * q.buffer_square_after) - momentum - decay
        gradient = np.where(np.asarray(c.heavy_ball) > 0, rest, lead * c.sign * q.weight_gradient)
        return Parts(gradient=gradient, momentum=momentum, decay=decay)

    def second_order(self, q: SGDProducts, c: SGDSettings) -> Array:
        s, w = c.sign, c.weight_decay
        fresh = s * s * q.gradient_square + 2 * w * s * q.weight_gradient + w * w * q.weight_square
        mixed = s * q.gradient_buffer + w * q.weight_buffer
        other = c.lead**2 * fresh + 2 * c.lead * c.memory_lead * mixed + c.memory_lead**2 * q.buffer_square
        return c.lr**2 * np.where(np.asarray(c.heavy_ball) > 0, q.buffer_square_after, other)

    def unscaled(self, c: SGDSettings, scale: float) -> SGDSettings:
        return replace(c, sign=c.sign / scale)

    def drift(self, c: SGDSettings) -> DriftRates:
        lr, w, mu = np.asarray(c.lr * c.kept), np.asarray(c.weight_decay), np.asarray(c.momentum)
        nesterov = (mu > 0) * (1 - np.asarray(c.heavy_ball))
        return DriftRates(decay_rate(lr, w, mu), noise_rate(lr, mu), mean_rate(lr, mu, nesterov))

    def memory_sums(self, c: SGDSettings, gradients: Array) -> MemorySums:
        """The first gradient enters the buffer with weight 1, all others with `kept`; each step multiplies by mu."""
        mu, kept = np.asarray(c.momentum), np.asarray(c.kept)
        with np.errstate(invalid="ignore"):
            first = np.where(gradients > 0, mu ** np.maximum(gradients - 1, 0), 0.0)
            later = np.where(gradients > 0, 1.0, 0.0)
        total = first + kept * (later - first) / (1 - mu)
        squares = first**2 + kept**2 * (later - first**2) / (1 - mu**2)
        return MemorySums(total, squares, c.weight_decay)

    def rotation(self, c: SGDSettings) -> float:
        """`|u|^2 / |W|^2 = 2 lr (1 - dampening) w / (1 + mu)` for heavy ball; the square root is the angle.

        Source: Kosson, Messmer, Jaggi, *Rotational Equilibrium*, ICML 2024 (arXiv 2305.17212), for SGD also Wan et al.,
        *Spherical Motion Dynamics*, 2021 (arXiv 2006.08419). With Nesterov the factor `1 / (1 + mu)` becomes
        `(1 - mu) ((1 + mu)^2 + mu^4 / (1 - mu^2))`, from `|W|^2 = lr (1 - dampening) E|g|^2 / (2 w (1 - mu))`.
        """
        mu, size = float(c.momentum), float(2 * c.lr * c.kept * c.weight_decay)
        if c.heavy_ball or not mu:
            return math.sqrt(size / (1 + mu))
        return math.sqrt(size * (1 - mu) * ((1 + mu) ** 2 + mu**4 / (1 - mu**2)))


@dataclass(frozen=True, eq=False)
class AdamProducts(Products):
    """Inner products of weight, average `m` (exp_avg) and direction `p = m / (sqrt(v) + root eps)`.

    `scaled_square` is `<(sqrt(v) + root eps) weight, weight>`, with the `root` of the same step as `v`.
    """

    weight_average: Array
    scaled_square: Array
    scaled_square_after: Array
    weight_average_after: Array
    weight_direction_after: Array
    direction_square_after: Array
    direction_average_after: Array
    average_square_after: Array


@dataclass(frozen=True)
class AdamSettings(StepSettings):
    """`update = rate p + lr decoupled weight`, `root = sqrt(1 - b2^k)`, `rate = root lr / (1 - b1^k)` in step k.

    `root_before` is that of step `k - 1`, zero before the first one, as is `filled = 1 - b1^(k - 1)`. `coupled` and
    `decoupled` are the weight decay that goes through the averages and that which does not.
    """

    coupled: Number
    decoupled: Number
    beta1: Number
    rate: Number
    root: Number
    root_before: Number
    filled: Number
    eps: Number
    amsgrad: Number


@ledger_rule(torch.optim.Adam)
class AdamRule(LedgerRule[AdamProducts, AdamSettings]):
    """Adam and AdamW, amsgrad included; exact.

    What would the same step have been without the coordinate-wise preconditioner? Momentum SGD with one number, the
    `reference` `|p| / |m|` over all watched weights, in place of the preconditioner, so that the step is as long. Its
    gradient, momentum and coupled-decay parts are entered as such, and the preconditioner part is the rest. For an
    exact symmetry the gradient part is then zero as in SGD. Everything follows from weight and state after the step
    and `<weight, m>` before it: `(1 - lr decoupled) weight = weight' + rate p`, `(1 - b1) d = m' - b1 m`.
    """

    products = AdamProducts
    step_settings = AdamSettings
    carried: ClassVar[Mapping[str, str]] = {
        "weight_average": "weight_average_after",
        "scaled_square": "scaled_square_after",
    }
    state_keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    counts_steps = True
    keeps_squares = True
    lr_power = 1.0
    effective_lr_words = (
        "the effective learning rate goes as one over the norm: Adam's step does not grow with the gradient"
    )

    def settings(self, group: Group, state: State, steps: float) -> AdamSettings:
        beta1, beta2 = (float(b) for b in group["betas"])
        decoupled = bool(group.get("decoupled_weight_decay", False))
        w, lr, k = float(group["weight_decay"]), float(group["lr"]), steps + 1
        root = math.sqrt(1 - beta2**k)
        return AdamSettings(
            lr=lr,
            coupled=0.0 if decoupled else w,
            decoupled=w if decoupled else 0.0,
            beta1=beta1,
            rate=root * lr / (1 - beta1**k),
            root=root,
            root_before=math.sqrt(1 - beta2**steps),
            filled=1 - beta1**steps,
            eps=float(group["eps"]),
            amsgrad=float(group["amsgrad"]),
        )

    def before(self, c: AdamSettings, t: StepTensors) -> Pairs:
        if "exp_avg" not in t:
            return {}
        weight = t["weight"]
        scaled = self._divisor(c, t, c.root_before).mul_(weight)
        return {"weight_average": (weight, t["exp_avg"]), "scaled_square": (weight, scaled)}

    def _divisor(self, c: AdamSettings, t: StepTensors, root: Number) -> Tensor:
        """`sqrt(v) + root eps`, a new tensor."""
        return t["max_exp_avg_sq" if c.amsgrad else "exp_avg_sq"].sqrt().add_(float(root * c.eps))

    def after(self, c: AdamSettings, t: StepTensors) -> Pairs:
        weight, m, divisor = t["weight"], t["exp_avg"], self._divisor(c, t, c.root)
        p = m / divisor
        return {
            "scaled_square_after": (weight, divisor.mul_(weight)),
            "weight_average_after": (weight, m),
            "weight_direction_after": (weight, p),
            "direction_square_after": (p, p),
            "direction_average_after": (p, m),
            "average_square_after": (m, m),
        }

    def first_order(self, q: AdamProducts, c: AdamSettings, reference: Number) -> Parts:
        shrink, scalar = 1 - c.lr * c.decoupled, c.rate * reference
        weight_direction = (q.weight_direction_after + c.rate * q.direction_square_after) / shrink
        weight_new_average = (q.weight_average_after + c.rate * q.direction_average_after) / shrink
        coupled = scalar * (1 - c.beta1) * c.coupled * q.weight_square
        momentum = scalar * c.beta1 * q.weight_average
        return Parts(
            gradient=scalar * weight_new_average - momentum - coupled,
            momentum=momentum,
            decay=coupled + c.lr * c.decoupled * q.weight_square,
            preconditioner=c.rate * weight_direction - scalar * weight_new_average,
        )

    def second_order(self, q: AdamProducts, c: AdamSettings) -> Array:
        d = c.lr * c.decoupled
        weight_direction = (q.weight_direction_after + c.rate * q.direction_square_after) / (1 - d)
        return c.rate**2 * q.direction_square_after + 2 * c.rate * d * weight_direction + d * d * q.weight_square

    def preconditioned(self, q: AdamProducts, c: AdamSettings) -> PreconditionedParts:
        """The books of `sum a d theta^2` with `d = sqrt(v)/root + eps`, one over the preconditioner of the step.

        In the first step there is no preconditioner before, and its transport is zero. A parameter that the optimiser
        does not move has no `d`: it counts nothing. `d p` is `m / root`, and so all follows from the products.
        """
        shrink, taken = 1 - c.lr * c.decoupled, c.lr * c.decoupled
        moving = np.asarray(c.root) > 0
        root, root_before = np.where(moving, c.root, 1.0), np.asarray(c.root_before)
        weight_average = (q.weight_average_after + c.rate * q.direction_average_after) / shrink
        scaled = q.scaled_square_after + c.rate * (q.weight_average_after + shrink * weight_average)
        middle = scaled / (shrink**2 * root)
        started = np.where(root_before > 0, root_before, 1.0)
        before = np.where(root_before > 0, q.scaled_square / started, middle)
        scale = c.rate / root
        momentum = -2 * scale * c.beta1 * q.weight_average
        coupled = -2 * scale * (1 - c.beta1) * c.coupled * q.weight_square
        return PreconditionedParts(
            before=before,
            after=q.scaled_square_after / root,
            gradient=-2 * scale * weight_average - momentum - coupled,
            momentum=momentum,
            decay=coupled - taken * (2 - taken) * middle + 2 * scale * taken * weight_average,
            noise=scale * c.rate * q.direction_average_after,
            transport=middle - before,
        )

    def gradient_roots(self, c: AdamSettings, state: State) -> GradientRoots | None:
        """From the averages before the step, bias-corrected; with `amsgrad` the preconditioner is another."""
        root = float(c.root_before)
        if root == 0 or c.amsgrad or "exp_avg_sq" not in state:
            return None
        s = state["exp_avg_sq"].sqrt() / root
        return GradientRoots(s, state["exp_avg"] / float(c.filled), s + float(c.eps))

    def root_rates(self, c: AdamSettings) -> RootRates:
        """Coupled decay shrinks another charge than the noise drives: NaN."""
        w = np.where(np.asarray(c.coupled) > 0, np.nan, c.decoupled)
        return RootRates(np.asarray(c.lr), w, (1 + np.asarray(c.beta1)) / (1 - np.asarray(c.beta1)))

    def reference(self, q: AdamProducts, picked: Array) -> Number:
        mine = (q.direction_square_after * picked).sum(-1, keepdims=True)
        plain = (q.average_square_after * picked).sum(-1, keepdims=True)
        return np.sqrt(np.divide(mine, plain, out=np.zeros_like(mine), where=plain > 0))

    def rotation(self, c: AdamSettings) -> float:
        """`sqrt(2 lr w (1 - b1) / (1 + b1))` for AdamW; NaN for coupled decay.

        Source: Kosson, Messmer, Jaggi, *Rotational Equilibrium*, ICML 2024 (arXiv 2305.17212).
        """
        if c.coupled:
            return math.nan
        return math.sqrt(float(2 * c.lr * c.decoupled * (1 - c.beta1) / (1 + c.beta1)))


def rule_for(optimizer: torch.optim.Optimizer) -> AnyRule:
    """The rule registered for the optimiser's class, or for a base class whose step it keeps; else the realised one."""
    rule = registered_rule(optimizer)
    if rule is not None:
        return rule
    if LION.fullmatch(class_name(optimizer)):
        return LionRule()
    return DecoupledRule() if decays_weights(optimizer) else RealisedRule()
