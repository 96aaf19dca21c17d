"""How the state of each optimiser class moves when the weights do: one registered function per class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from noetherflow.balance.motion import Motion
from noetherflow.core.foreign import ADAM, class_name, is_bitsandbytes
from noetherflow.errors import DataError

Settings = Mapping[str, Any]
"""A parameter group of an optimiser, without its parameters."""


@dataclass(frozen=True, eq=False)
class StateMove:
    """How one entry of an optimiser's state moves with the weights.

    Attributes:
        change: `(motion, parameter name, entry) -> entry`, in float64; None leaves the entry as it is.
        note: why the move is only approximate, or why the entry is left; "" for an exact move.
        squares: the entry holds squares, which have an exact rule on tori alone.
        gradients: the entry is made of gradients, so that coupled weight decay is in it.
    """

    change: Callable[[Motion, str, Tensor], Tensor] | None
    note: str = ""
    squares: bool = False
    gradients: bool = False

    def as_weights(self, motion: Motion, name: str) -> Motion | None:
        """The motion of weights that does the same to this entry, None where there is none or it is not known."""
        if self.change is Motion.gradient:
            return motion.of_gradients
        if self.change is Motion.squares and motion.is_torus(name):
            return motion.of_squares
        return motion if self.change is Motion.weight else None


LIKE_GRADIENT = StateMove(Motion.gradient, gradients=True)
"""A weighted sum of past gradients: a momentum buffer, Adam's `exp_avg`."""
LIKE_SQUARES = StateMove(Motion.squares, squares=True, gradients=True)
"""A weighted sum of squared gradients: Adam's `exp_avg_sq`."""
LIKE_WEIGHT = StateMove(Motion.weight)
"""An iterate or an average of the weights."""


def left(why: str) -> StateMove:
    """An entry that stays as it is, and is listed in the report as not moved, for this reason."""
    return StateMove(None, why)


StateMoves = Mapping[str, StateMove]
MovesOf = Callable[[Settings], StateMoves]
F = TypeVar("F", bound=MovesOf)


@dataclass(frozen=True, eq=False)
class StateRule:
    """The rule of one optimiser class; `saved_by`: settings that tell it in a saved `state_dict()`."""

    moves: MovesOf
    saved_by: frozenset[str] = frozenset()
    note: str = ""


NO_RULE = StateRule(lambda settings: {})
"""Of an optimiser that nobody registered: nothing moves, all of it is listed."""
_RULES: dict[type[torch.optim.Optimizer], StateRule] = {}


def state_rule(optimizer_class: type[torch.optim.Optimizer], *, saved_by: Iterable[str] = ()) -> Callable[[F], F]:
    """Register how the state of an optimiser class moves when `balance_` moves the weights.

    The function decorated gets a parameter group's settings and answers with the entries that it knows, by their key in
    `optimizer.state[parameter]`: `LIKE_GRADIENT`, `LIKE_SQUARES`, `LIKE_WEIGHT`, `left(why)`, or a `StateMove` of your
    own. Entries with as many numbers as the parameter that it does not name stay and are listed as not moved.

    Args:
        optimizer_class: the class; subclasses that keep its `step` are served as well.
        saved_by: names of settings by which a saved `optimizer.state_dict()`, which does not tell its class, is known
            to be of this one; without them `balance_checkpoint` leaves such a state and lists it.

    Returns:
        A decorator that returns the function as it is.

    Raises:
        DataError: `optimizer_class` is no optimiser class.

    Example:
        >>> class Mine(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         return super().step(closure)
        >>> @state_rule(Mine)
        ... def moves(settings):
        ...     return {"momentum_buffer": LIKE_GRADIENT}
        >>> list(state_rule_of(Mine([torch.zeros(2)], lr=0.1)).moves({}))
        ['momentum_buffer']
    """
    if not (inspect.isclass(optimizer_class) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise DataError(f"state_rule(...) takes a class of torch.optim.Optimizer, got {optimizer_class!r}")

    def register(moves: F) -> F:
        _RULES[optimizer_class] = StateRule(moves, frozenset(saved_by))
        return moves

    return register


def state_rule_of(optimizer: torch.optim.Optimizer) -> StateRule:
    """The rule registered for the class or for a base class whose `step` it keeps; well-known names come last."""
    step = inspect.unwrap(type(optimizer).step)
    for base in type(optimizer).__mro__:
        rule = _RULES.get(base)
        if rule is not None and step is inspect.unwrap(getattr(base, "step")):  # noqa: B009
            return rule
    if is_bitsandbytes(optimizer):
        return StateRule(lambda settings: _BITSANDBYTES)
    moves = _ADAM if ADAM.fullmatch(class_name(optimizer)) else _NAMED.get(type(optimizer).__name__)
    if moves is None:
        return NO_RULE
    return StateRule(lambda settings: moves, note=f"as {type(optimizer).__name__} is usually written")


def saved_state_rule(settings: Settings) -> StateRule:
    """The rule of a saved state, known by the names of its settings; `NO_RULE` where they tell no class."""
    found = [r for r in _RULES.values() if r.saved_by and r.saved_by <= settings.keys()]
    return max(found, key=lambda rule: len(rule.saved_by), default=NO_RULE)


def _table(cls: type[torch.optim.Optimizer], moves: StateMoves, saved_by: Collection[str] = ()) -> None:
    state_rule(cls, saved_by=saved_by)(lambda settings: moves)


_ADAM = {"exp_avg": LIKE_GRADIENT, "exp_avg_sq": LIKE_SQUARES, "max_exp_avg_sq": LIKE_SQUARES}
_PRECONDITIONED = left("it averages preconditioned gradients, which do not move like gradients")
_table(torch.optim.SGD, {"momentum_buffer": LIKE_GRADIENT}, ("momentum", "dampening", "nesterov"))
_table(torch.optim.Adam, _ADAM, ("betas", "amsgrad"))
_table(torch.optim.SparseAdam, _ADAM)
_table(torch.optim.NAdam, _ADAM, ("betas", "momentum_decay"))
_table(torch.optim.RAdam, _ADAM, ("betas", "decoupled_weight_decay", "capturable"))
_table(torch.optim.Adamax, {"exp_avg": LIKE_GRADIENT, "exp_inf": left("it is a maximum of absolute gradients")})
_table(
    torch.optim.RMSprop,
    {"square_avg": LIKE_SQUARES, "grad_avg": LIKE_GRADIENT, "momentum_buffer": _PRECONDITIONED},
    ("alpha", "centered"),
)
_table(torch.optim.Adagrad, {"sum": LIKE_SQUARES}, ("lr_decay", "initial_accumulator_value"))
_table(torch.optim.Adadelta, {"square_avg": LIKE_SQUARES}, ("rho", "capturable"))
_table(torch.optim.Rprop, {"prev": LIKE_GRADIENT})
_table(torch.optim.ASGD, {"ax": LIKE_WEIGHT}, ("lambd", "alpha", "t0"))
if hasattr(torch.optim, "Muon"):
    _table(torch.optim.Muon, {"momentum_buffer": LIKE_GRADIENT}, ("ns_coefficients", "ns_steps"))

_BITSANDBYTES = _ADAM | {"momentum_buffer": LIKE_GRADIENT, "square_avg": LIKE_SQUARES, "sum": LIKE_SQUARES}
_NAMED: Mapping[str, StateMoves] = {
    "AdEMAMix": {"exp_avg_fast": LIKE_GRADIENT, "exp_avg_slow": LIKE_GRADIENT, "exp_avg_sq": LIKE_SQUARES},
    "Adan": {
        "exp_avg": LIKE_GRADIENT,
        "exp_avg_diff": LIKE_GRADIENT,
        "exp_avg_sq": LIKE_SQUARES,
        "neg_pre_grad": LIKE_GRADIENT,
    },
    "AdamWScheduleFree": {"z": LIKE_WEIGHT, "exp_avg_sq": LIKE_SQUARES},
    "SGDScheduleFree": {"z": LIKE_WEIGHT},
    "Lion": {"exp_avg": LIKE_GRADIENT},
    "Muon": {"momentum_buffer": LIKE_GRADIENT},
    "Prodigy": {"p0": LIKE_WEIGHT, "s": LIKE_GRADIENT, "exp_avg": LIKE_GRADIENT, "exp_avg_sq": LIKE_SQUARES},
}
"""Well-known optimisers outside torch, by the name of their class; what moves so is listed as approximate."""
