"""Exact split of an optimiser's update into gradient, momentum memory, decay and preconditioner (theory.md section 3).

`theta' = theta - u`, `u = sum of parts`, so for every symmetry `C' - C = -2 sum_parts theta^T A u_part + u^T A u`.
A rule names the inner products that determine all of these, so that no part of `u` has to be formed during training.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

Group = Mapping[str, Any]
State = Mapping[str, Any]
Pairs = dict[str, tuple[Tensor, Tensor]]
Values = Mapping[str, np.ndarray]
Settings = Mapping[str, float]
Tensors = Mapping[str, Tensor]

FIRST_ORDER = ("gradient", "momentum", "decay", "preconditioner", "other")
ENTRIES = (*FIRST_ORDER, "second_order")


class LedgerRule(ABC):
    """How one optimiser's update splits. Subclasses are stateless; `c` holds one number per coefficient name.

    `before` and `after` name the inner products to measure around a step, as pairs of tensors; `first_order` turns the
    measured values into `<theta, u_part>`, `second_order` into `<u, u>`. Both are linear in the values, entry by entry,
    so they hold for row sums, totals and (symmetrised) leg matrices alike. `carried[q]` is the name under which `after`
    measures what `q` is before the next step, if nobody writes to weights and state in between. The effective learning
    rate of a scale-invariant weight is `lr / |W|^lr_power`: gradients fall as `1 / |W|`, which Adam divides out.
    """

    quantities: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    coefficients: ClassVar[tuple[str, ...]]
    carried: ClassVar[Mapping[str, str]] = {}
    state_keys: ClassVar[tuple[str, ...]] = ()
    counts_steps: ClassVar[bool] = False
    keeps_copy: ClassVar[bool] = False
    has_equilibrium: ClassVar[bool] = False
    lr_power: ClassVar[float] = math.nan

    @abstractmethod
    def settings(self, group: Group, state: State, steps: float) -> dict[str, float]:
        """Coefficients of one parameter's next step; `steps` already made by the optimiser on it."""

    def reads_gradient(self, c: Settings) -> bool:
        """Whether `before` needs `grad`; without it, it gives nothing but what is `carried`."""
        return False

    def before(self, c: Settings, t: Tensors) -> Pairs:
        """Pairs from `theta`, `grad` and the `state_keys` before the step; entry-wise, so slices of them will do."""
        return {}

    def after(self, c: Settings, t: Tensors) -> Pairs:
        """Pairs from `theta`, the `state_keys` and (with `keeps_copy`) `kept`, theta before, after the step."""
        return {}

    @abstractmethod
    def first_order(self, q: Values, c: Values, reference: np.ndarray | float) -> dict[str, np.ndarray]:
        """`<theta, u_part>` per part."""

    @abstractmethod
    def second_order(self, q: Values, c: Values) -> np.ndarray:
        """`<u, u>` of the whole update: with decay it includes the decay part's own square `(lr w)^2 <theta, theta>`,
        which `flow.step_identity` counts under decay."""

    def reference(self, q: Values, weights: np.ndarray) -> np.ndarray | float:
        """The scalar that stands for the preconditioner in the parts without one, per recorded step: `[T, 1]`."""
        return 1.0


class SGDRule(LedgerRule):
    """`d = s g + w theta`, `b' = mu b + (1 - tau) d`, `u = lr (alpha d + beta b)` in the buffer `b` before the step.

    No momentum: `alpha = 1, beta = 0`; heavy ball: `1 - tau, mu`; Nesterov: `1 + mu (1 - tau), mu^2`; the first step
    starts with `b' = d`. `s = -1` with maximize. For heavy ball `u = lr b'`, so `<theta, u> = lr (<theta', b'> + lr
    <b', b'>)` and the gradient's part is what momentum and decay leave of it: gradients need not be read at all.
    """

    quantities = ("tt", "tg", "tb", "gg", "gb", "bb", "tb_after", "bb_after")
    carried: ClassVar[Mapping[str, str]] = {"tb": "tb_after"}
    state_keys = ("momentum_buffer",)
    parts = ("gradient", "momentum", "decay")
    coefficients = ("lr", "sign", "weight_decay", "alpha", "beta", "heavy_ball", "memory", "fresh")
    has_equilibrium = True
    lr_power = 2.0

    def settings(self, group: Group, state: State, steps: float) -> dict[str, float]:
        mu, kept = float(group["momentum"]), 1 - float(group["dampening"])
        started = state.get("momentum_buffer") is not None
        fresh = kept if started else 1.0
        if mu == 0:
            alpha, beta = 1.0, 0.0
        elif group["nesterov"]:
            alpha, beta = 1 + mu * fresh, mu * mu * started
        else:
            alpha, beta = fresh, mu * started
        return {
            "lr": float(group["lr"]),
            "sign": -1.0 if group["maximize"] else 1.0,
            "weight_decay": float(group["weight_decay"]),
            "alpha": alpha,
            "beta": beta,
            "heavy_ball": float(mu != 0 and not group["nesterov"]),
            "memory": mu,
            "fresh": kept if mu else 1.0,
        }

    def reads_gradient(self, c: Settings) -> bool:
        return not c["heavy_ball"]

    def before(self, c: Settings, t: Tensors) -> Pairs:
        theta, g = t["theta"], t.get("grad")
        pairs = {} if g is None else {"tg": (theta, g), "gg": (g, g)}
        if "momentum_buffer" in t and c["beta"]:
            b = t["momentum_buffer"]
            pairs |= {"tb": (theta, b)} if g is None else {"tb": (theta, b), "gb": (g, b), "bb": (b, b)}
        return pairs

    def after(self, c: Settings, t: Tensors) -> Pairs:
        if not c["heavy_ball"]:
            return {}
        b = t["momentum_buffer"]
        return {"tb_after": (t["theta"], b), "bb_after": (b, b)}

    def first_order(self, q: Values, c: Values, reference: np.ndarray | float) -> dict[str, np.ndarray]:
        lr, lead = c["lr"], c["lr"] * c["alpha"]
        momentum = lr * c["beta"] * q["tb"]
        decay = lead * c["weight_decay"] * q["tt"]
        rest = lr * (q["tb_after"] + lr * q["bb_after"]) - momentum - decay
        gradient = np.where(c["heavy_ball"] > 0, rest, lead * c["sign"] * q["tg"])
        return {"gradient": gradient, "momentum": momentum, "decay": decay}

    def second_order(self, q: Values, c: Values) -> np.ndarray:
        s, w, alpha, beta = c["sign"], c["weight_decay"], c["alpha"], c["beta"]
        dd = s * s * q["gg"] + 2 * w * s * q["tg"] + w * w * q["tt"]
        db = s * q["gb"] + w * q["tb"]
        other = alpha**2 * dd + 2 * alpha * beta * db + beta**2 * q["bb"]
        return c["lr"] ** 2 * np.where(c["heavy_ball"] > 0, q["bb_after"], other)


class AdamRule(LedgerRule):
    """`m' = b1 m + (1 - b1) d`, `p = m' / (sqrt(v') + h eps)`, `h = sqrt(1 - b2^k)`, `u = a p + lr w_dec theta`.

    `a = h lr/(1 - b1^k)`, `d = s g + w_L2 theta`. The gradient, momentum and coupled-decay parts are those of the same
    step with the preconditioner replaced by one number `r = |p| / |m'|` over the watched weights (momentum SGD of the
    same step length); the preconditioner part is the rest. For an exact symmetry the gradient part is then zero as in
    SGD, and what Adam's coordinate-wise preconditioner adds stands by itself. Everything follows from weights and state
    after the step and `<theta, m>` before it: `(1 - lr w_dec) theta = theta' + a p`, `(1 - b1) d = m' - b1 m`.
    """

    quantities = ("tt", "tm", "tm_after", "tp", "pp", "pm", "mm")
    carried: ClassVar[Mapping[str, str]] = {"tm": "tm_after"}
    state_keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    counts_steps = True
    lr_power = 1.0
    parts = ("gradient", "momentum", "decay", "preconditioner")
    coefficients = ("lr", "coupled", "decoupled", "beta1", "rate", "root", "eps", "amsgrad")

    def settings(self, group: Group, state: State, steps: float) -> dict[str, float]:
        beta1, beta2 = (float(b) for b in group["betas"])
        decoupled = bool(group.get("decoupled_weight_decay", False))
        w, lr, k = float(group["weight_decay"]), float(group["lr"]), steps + 1
        root = math.sqrt(1 - beta2**k)
        return {
            "lr": lr,
            "coupled": 0.0 if decoupled else w,
            "decoupled": w if decoupled else 0.0,
            "beta1": beta1,
            "rate": root * lr / (1 - beta1**k),
            "root": root,
            "eps": float(group["eps"]),
            "amsgrad": float(group["amsgrad"]),
        }

    def before(self, c: Settings, t: Tensors) -> Pairs:
        return {"tm": (t["theta"], t["exp_avg"])} if "exp_avg" in t else {}

    def after(self, c: Settings, t: Tensors) -> Pairs:
        theta, m, v = t["theta"], t["exp_avg"], t["max_exp_avg_sq" if c["amsgrad"] else "exp_avg_sq"]
        p = v.sqrt().add_(c["root"] * c["eps"])
        torch.div(m, p, out=p)
        return {"tm_after": (theta, m), "tp": (theta, p), "pp": (p, p), "pm": (p, m), "mm": (m, m)}

    def first_order(self, q: Values, c: Values, reference: np.ndarray | float) -> dict[str, np.ndarray]:
        a, shrink = c["rate"], 1 - c["lr"] * c["decoupled"]
        theta_p, theta_m = (q["tp"] + a * q["pp"]) / shrink, (q["tm_after"] + a * q["pm"]) / shrink
        scalar = a * reference
        coupled = scalar * (1 - c["beta1"]) * c["coupled"] * q["tt"]
        momentum = scalar * c["beta1"] * q["tm"]
        return {
            "gradient": scalar * theta_m - momentum - coupled,
            "momentum": momentum,
            "decay": coupled + c["lr"] * c["decoupled"] * q["tt"],
            "preconditioner": a * theta_p - scalar * theta_m,
        }

    def second_order(self, q: Values, c: Values) -> np.ndarray:
        a, d = c["rate"], c["lr"] * c["decoupled"]
        theta_p = (q["tp"] + a * q["pp"]) / (1 - d)
        return a * a * q["pp"] + 2 * a * d * theta_p + d * d * q["tt"]

    def reference(self, q: Values, weights: np.ndarray) -> np.ndarray | float:
        mine, plain = (q["pp"] * weights).sum(-1, keepdims=True), (q["mm"] * weights).sum(-1, keepdims=True)
        return np.sqrt(np.divide(mine, plain, out=np.zeros_like(mine), where=plain > 0))


class RealisedRule(LedgerRule):
    """Any optimiser: `u = theta - theta'` from a copy of theta; one first-order part and `u^T A u`."""

    quantities = ("tt", "tu", "uu")
    keeps_copy = True
    parts = ("other",)
    coefficients = ("lr",)

    def settings(self, group: Group, state: State, steps: float) -> dict[str, float]:
        return {"lr": float(group.get("lr", float("nan")))}

    def after(self, c: Settings, t: Tensors) -> Pairs:
        u = t["kept"] - t["theta"]
        return {"tu": (t["kept"], u), "uu": (u, u)}

    def first_order(self, q: Values, c: Values, reference: np.ndarray | float) -> dict[str, np.ndarray]:
        return {"other": q["tu"]}

    def second_order(self, q: Values, c: Values) -> np.ndarray:
        return q["uu"]


def rule_for(optimizer: torch.optim.Optimizer) -> LedgerRule:
    """The exact rule for `torch.optim.SGD`, `Adam`, `AdamW` or subclasses keeping their step, else the realised."""
    step = inspect.unwrap(type(optimizer).step)

    def same(base: type[torch.optim.Optimizer]) -> bool:
        return step is inspect.unwrap(base.step)

    if isinstance(optimizer, torch.optim.SGD) and same(torch.optim.SGD):
        return SGDRule()
    if isinstance(optimizer, torch.optim.Adam) and same(torch.optim.Adam):
        return AdamRule()
    return RealisedRule()


def decompose(rule: LedgerRule, q: Values, c: Values, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Entries per leg value: `-2 <theta, u_part>` per part and `<u, u>`, summing to the change of `<theta, theta>`.

    `q[name]`, `c[name]`: `[T, N]` over recorded steps and leg values; `weights` `[N]` picks each watched weight once
    (for the reference scalar). Parts a rule does not have are absent.
    """
    first = rule.first_order(q, c, rule.reference(q, weights))
    return {name: -2 * value for name, value in first.items()} | {"second_order": rule.second_order(q, c)}
