"""What a ledger must know of an optimiser: how its update splits into causes (theory.md section 3).

The optimiser moves the weights by `-update`. Writing the update as a sum of parts splits the change of every charge
exactly: `C' - C = -2 sum_parts weight^T A part + update^T A update`. A rule names the inner products that determine
these numbers, so that no part of the update has to be formed during training.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from noetherflow.errors import DataError

Array = np.ndarray
Number = float | Array
Group = Mapping[str, Any]
"""One of `optimizer.param_groups`."""
State = Mapping[str, Any]
"""`optimizer.state[parameter]`."""
StepTensors = Mapping[str, Tensor]
"""Tensors of one parameter by name: `weight`, `gradient`, `weight_before` and those of the optimiser's state."""
Pairs = dict[str, tuple[Tensor, Tensor]]
"""Pairs of tensors whose inner products are wanted, by the names of fields of the rule's `Products`."""


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of one step over the legs of the symmetries; a rule adds the fields that it needs.

    Every field is an array `[steps, leg values]` in the books. `weight_square` is `<weight, weight>` before the step.
    """

    weight_square: Array


@dataclass(frozen=True)
class StepSettings:
    """The numbers that an optimiser uses in one step of one parameter; a rule adds fields to the learning rate `lr`.

    In the books each field is an array `[steps, leg values]` in place of a number.
    """

    lr: Number

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The fields, in order."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def idle(cls) -> Self:
        """All zero: of a parameter that the optimiser does not move."""
        return cls(**dict.fromkeys(cls.names(), 0.0))

    def at(self, row: int) -> Self:
        """One step of a record of arrays `[steps, leg values]`."""
        return type(self)(**{name: np.asarray(getattr(self, name))[row] for name in self.names()})


@dataclass(frozen=True, eq=False)
class Parts:
    """`<weight, part>` for each part of an update, `[steps, leg values]`; None for a part that a rule does not have."""

    gradient: Array | None = None
    momentum: Array | None = None
    decay: Array | None = None
    preconditioner: Array | None = None
    other: Array | None = None


@dataclass(frozen=True, eq=False)
class PreconditionedParts:
    """Where a preconditioned charge `sum a d theta^2` went in a step, `[steps, values]`.

    `d` is one over the preconditioner; `before` has the `d` of the step before and `after` that of this step. The
    change is the sum of the entries: `transport`, `theta^2` before the step times the change of `d`, comes first; the
    others are at this step's `d`.

    Source: theory.md section 13.
    """

    before: Array
    after: Array
    gradient: Array
    momentum: Array
    decay: Array
    noise: Array
    transport: Array


@dataclass(frozen=True, eq=False)
class GradientRoots:
    """Entry by entry of one parameter: the root mean square of its minibatch gradient, its mean, and the divisor of
    the optimiser's step.
    """

    root: Tensor
    mean: Tensor
    divisor: Tensor


@dataclass(frozen=True, eq=False)
class RootRates:
    """How noise and decay move a preconditioned charge: per step by `lr^2 A - lr w (2 - lr w) B`, `[leg values]`.

    `A` is the charge of the roots `s` of the minibatch gradient's mean squares, `B` that of `s theta^2`. `persistence`
    is `(1 + b1) / (1 - b1)`: the square of the average gradient times this is that of uncorrelated gradients.

    Source: theory.md section 13.
    """

    lr: Array
    weight_decay: Array
    persistence: Array


@dataclass(frozen=True, eq=False)
class DriftRates:
    """What weight decay, noise and mean gradient do to a charge per step, `[leg values]` (theory.md section 4).

    `E[C' - C] = -decay C + noise D(noise) + mean D(mean gradient)`, with `D` the charge of the gradient's Grams.
    """

    decay: Array
    noise: Array
    mean: Array


@dataclass(frozen=True, eq=False)
class MemorySums:
    """The weights with which past gradients stand in a momentum buffer: their sum and the sum of their squares.

    `decay` is the weight decay that was added to each of these gradients. All `[leg values]`.
    """

    total: Array
    squares: Array
    decay: Number


PRECONDITIONED = ("gradient", "momentum", "decay", "noise", "transport")
"""The entries of the books of a preconditioned charge."""
FIRST_ORDER = tuple(f.name for f in fields(Parts))
ENTRIES = (*FIRST_ORDER, "second_order")

P = TypeVar("P", bound=Products)
S = TypeVar("S", bound=StepSettings)


class LedgerRule(ABC, Generic[P, S]):
    """How the update of one optimiser splits. A rule has no state of its own: it reads settings and measured products.

    A subclass names its records in `products` and `step_settings` and says which inner products to measure (`before`
    the step, `after` it, or both), and what follows from them (`first_order`, `second_order`). Both must be linear in
    the products, number by number, so that they hold for sums over rows, for totals and for matrices of a leg alike.
    `docs/extend/ledger_rule.md` builds one.

    - `state_keys`: the tensors of `optimizer.state[parameter]` that the rule reads.
    - `carried`: `{"weight_buffer": "weight_buffer_after"}` says that the first, before a step, is the second after the
      step before. Then the tensors are read once a step, unless somebody wrote to them in between.
    - `counts_steps`: `settings` needs the number of steps that the optimiser has made.
    - `keeps_copy`: `after` needs `weight_before`, a copy of the weights.
    - `lr_power`: the effective learning rate of a weight whose scale does not matter is `lr / |W|^lr_power`.
    - `effective_lr_words`: the report's words for that.
    - `momentum_key`: the key of the state that holds a momentum buffer, a weighted sum of all gradients so far.
    - `has_equilibrium`: `drift` predicts the noise equilibrium.
    - `keeps_squares`: `gradient_roots` and `root_rates` predict it, that of the preconditioned charge.
    - `not_booked`: why there are no books of a preconditioned charge, for a rule without `preconditioned`.
    """

    products: ClassVar[type[Products]]
    step_settings: ClassVar[type[StepSettings]]
    carried: ClassVar[Mapping[str, str]] = {}
    state_keys: ClassVar[tuple[str, ...]] = ()
    counts_steps: ClassVar[bool] = False
    keeps_copy: ClassVar[bool] = False
    momentum_key: ClassVar[str | None] = None
    has_equilibrium: ClassVar[bool] = False
    keeps_squares: ClassVar[bool] = False
    lr_power: ClassVar[float] = math.nan
    effective_lr_words: ClassVar[str] = ""
    not_booked: ClassVar[str] = "no charge is known that its steps leave alone at first order"

    @property
    def reason_not_booked(self) -> str:
        """Why there are no books of a preconditioned charge; empty where there are."""
        return self.not_booked if type(self).preconditioned is LedgerRule.preconditioned else ""

    @abstractmethod
    def settings(self, group: Group, state: State, steps: float) -> S:
        """The settings of one parameter's next step; `steps` were made on it before."""

    def reads_gradient(self, c: S) -> bool:
        """Whether `before` needs `gradient`; without it, it gives nothing but what is `carried`."""
        return False

    def before(self, c: S, t: StepTensors) -> Pairs:
        """Pairs to measure before the step. Long tensors come in slices, so only work entry by entry on them."""
        return {}

    def after(self, c: S, t: StepTensors) -> Pairs:
        """Pairs to measure after the step."""
        return {}

    @abstractmethod
    def first_order(self, q: P, c: S, reference: Number) -> Parts:
        """`<weight, part>` for each part, from the measured products `q` and the settings `c`, arrays of one shape."""

    @abstractmethod
    def second_order(self, q: P, c: S) -> Array:
        """`<update, update>` of the whole update, weight decay included."""

    def reference(self, q: P, picked: Array) -> Number:
        """One number per step, `[steps, 1]`, that stands for the preconditioner in the parts without one.

        `picked`: 1 on leg values that together count every watched weight once.
        """
        return 1.0

    def preconditioned(self, q: P, c: S) -> PreconditionedParts | None:
        """The books of the preconditioned charge; None for an optimiser without one."""
        return None

    def gradient_roots(self, c: S, state: State) -> GradientRoots | None:
        """What the state before the step tells of the minibatch gradient; None while it does not."""
        return None

    def root_rates(self, c: S) -> RootRates | None:
        """How the preconditioned charge moves under these settings; None where no theory is known."""
        return None

    def unscaled(self, c: S, scale: float) -> S:
        """The settings when the gradients are still to be divided by a gradient scaler's `scale` within the step."""
        return c

    def drift(self, c: S) -> DriftRates | None:
        """How decay, noise and mean gradient move the charges under these settings; None where no theory is known."""
        return None

    def memory_sums(self, c: S, gradients: Array) -> MemorySums | None:
        """The weights of past gradients in the momentum buffer, once it has taken up so many `gradients`.

        None for an optimiser without one.
        """
        return None

    def rotation(self, c: S) -> float:
        """Predicted rotation per step of a scale-invariant weight once its norm is stationary, radians; else NaN."""
        return math.nan


AnyRule = LedgerRule[Any, Any]
_RULES: dict[type[torch.optim.Optimizer], type[AnyRule]] = {}

R = TypeVar("R", bound=type[AnyRule])


def ledger_rule(optimizer_class: type[torch.optim.Optimizer]) -> Callable[[R], R]:
    """Register a `LedgerRule` for an optimiser class: ledgers over it use this rule from now on.

    The rule also serves subclasses that keep the class's `step`; a subclass with a step of its own needs its own rule.
    The last registration for a class counts.

    Args:
        optimizer_class: the class of `torch.optim.Optimizer`.

    Returns:
        A class decorator.

    Raises:
        DataError: `optimizer_class` is no optimiser class, or what is decorated is no `LedgerRule` class.

    Example:
        >>> from noetherflow.monitor.realised_rules import RealisedRule
        >>> class Mine(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         return super().step(closure)
        >>> @ledger_rule(Mine)
        ... class MineRule(RealisedRule):
        ...     "The whole update is one entry."
        >>> registered_rule(Mine([torch.zeros(2)], lr=0.1)).__class__.__name__
        'MineRule'
    """
    if not (inspect.isclass(optimizer_class) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise DataError(f"ledger_rule(...) takes a class of torch.optim.Optimizer, got {optimizer_class!r}")

    def register(rule: R) -> R:
        if not (inspect.isclass(rule) and issubclass(rule, LedgerRule)):
            raise DataError(f"@ledger_rule decorates a subclass of noetherflow.extend.LedgerRule, got {rule!r}")
        _RULES[optimizer_class] = rule
        return rule

    return register


def registered_rule(optimizer: torch.optim.Optimizer) -> AnyRule | None:
    """The rule registered for the optimiser's class, or for a base class whose `step` it keeps; None without one."""
    step = inspect.unwrap(type(optimizer).step)
    for base in type(optimizer).__mro__:
        rule = _RULES.get(base)
        if rule is not None and step is inspect.unwrap(getattr(base, "step")):  # noqa: B009
            return rule()
    return None


def decompose(rule: AnyRule, q: Products, c: StepSettings, picked: Array) -> dict[str, Array]:
    """The entries of the books by name: `-2 <weight, part>` per part, and `<update, update>`.

    They add up to the change of `<weight, weight>`. Parts that a rule does not have are absent.

    Args:
        rule: the optimiser's rule.
        q: measured products, each `[steps, leg values]`.
        c: the settings, each `[steps, leg values]`.
        picked: `[leg values]`, 1 on values that together count every watched weight once.
    """
    parts = rule.first_order(q, c, rule.reference(q, picked))
    found = {name: getattr(parts, name) for name in FIRST_ORDER}
    entries = {name: -2 * value for name, value in found.items() if value is not None}
    return entries | {"second_order": rule.second_order(q, c)}
