"""Optimiser state that moves with the weights: what moves, what only approximately, and what stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from noetherflow.balance.motion import Motion
from noetherflow.balance.state_rules import StateMove, StateRule
from noetherflow.core.codes import BlockCodes, is_coded, numbers_in, plain
from noetherflow.core.held import Held
from noetherflow.core.tensors import is_narrow
from noetherflow.errors import DataError

SHAPED = (
    "momentum_buffer", "exp_avg", "grad_avg", "exp_avg_sq", "square_avg", "max_exp_avg_sq", "sum", "ax", "z", "prev",
)  # fmt: skip
"""Keys of torch's optimisers that hold one number per entry of the parameter."""
ITERATE = 0.5
"""An unknown entry this near to the weights, relative to their norm, is taken for an iterate of them."""


@dataclass(frozen=True, eq=False)
class EntryMove:
    """One entry that moves."""

    held: Held
    key: str
    move: StateMove

    def value(self, motion: Motion) -> Tensor:
        """The entry at the moved weights, in its own dtype."""
        assert self.move.change is not None
        old = plain(self.held.state[self.key])
        return self.move.change(motion, self.held.name, old).to(old.dtype)


@dataclass(frozen=True, eq=False)
class StatePlan:
    """What is to happen to an optimiser's state: `moves`, lines on approximate ones, and on what stays as it was."""

    moves: tuple[EntryMove, ...] = ()
    approximate: tuple[str, ...] = ()
    unmoved: tuple[str, ...] = ()

    @classmethod
    def joined(cls, plans: Sequence[StatePlan]) -> StatePlan:
        """Several plans as one."""
        return cls(
            tuple(move for plan in plans for move in plan.moves),
            tuple(line for plan in plans for line in plan.approximate),
            tuple(line for plan in plans for line in plan.unmoved),
        )


def optimizers_in(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """An optimiser and those that it holds as attributes, at any depth of lists and dicts: Muon with AdamW inside.

    Example:
        >>> class Both(torch.optim.Optimizer):
        ...     def __init__(self, a, b):
        ...         super().__init__([a, b], {})
        ...         self.parts = [torch.optim.SGD([a], lr=0.1), torch.optim.AdamW([b])]
        >>> [type(o).__name__ for o in optimizers_in(Both(torch.zeros(2), torch.zeros(2)))]
        ['Both', 'SGD', 'AdamW']
    """
    found: list[torch.optim.Optimizer] = []
    waiting = [optimizer]
    while waiting:
        current = waiting.pop(0)
        if not any(current is known for known in found):
            found.append(current)
            own = {k: v for k, v in vars(current).items() if k not in ("state", "param_groups", "defaults")}
            waiting += [v for v in tree_leaves(own) if isinstance(v, torch.optim.Optimizer)]
    return found


def plan_state(held: Sequence[Held], rule: StateRule, motion: Motion) -> StatePlan:
    """What of one optimiser's state moves, and how.

    Args:
        held: the state by parameter.
        rule: the rule of the optimiser's class.
        motion: the move of the weights.

    Returns:
        The plan. Tensors under a moved parameter without a rule, and flat ones that span all parameters (L-BFGS), are
        listed as not moved.

    Raises:
        DataError: an entry without a rule lies so near to the weights that it must be an iterate of them; left in
            place it would pull the weights back.
    """
    if not any(h.name in motion.by_parameter for h in held):
        return StatePlan()
    span = sum(h.parameter.numel() for h in held)
    plans = [_plan_entry(h, key, rule, motion, span) for h in held for key in h.state]
    return StatePlan.joined(plans)


def _plan_entry(held: Held, key: str, rule: StateRule, motion: Motion, span: int) -> StatePlan:
    """What happens to one entry; `span` is the size of all parameters of the optimiser together."""
    value, moves = held.state[key], rule.moves(held.settings)
    move = moves.get(key)
    if move is not None and move.change is not None and _fits(held, value, motion):
        return StatePlan((EntryMove(held, key, move),), tuple(_approximations(held, key, move, rule, motion)))
    if move is None:
        _refuse_iterate(held, key, value, motion)
    concerned = 2 if held.name in motion.by_parameter else span
    if numbers_in(value) < concerned:
        return StatePlan()
    why = f": {move.note}" if move is not None and move.note else ""
    return StatePlan(unmoved=(f"{held.name}: {key} left as it was (no rule for this optimiser state{why})",))


def _approximations(held: Held, key: str, move: StateMove, rule: StateRule, motion: Motion) -> Iterator[str]:
    if held.coupled and move.gradients:
        yield f"{held.name}: {key} moved like a gradient; its weight-decay part moves like a weight"
    if move.squares and not motion.is_torus(held.name):
        yield f"{held.name}: {key} moved as if gradient entries were uncorrelated"
    coded = "stored in a few bits, so that it is rounded anew" if is_coded(held.state[key]) else ""
    for note in (move.note, rule.note, coded):
        if note:
            yield f"{held.name}: {key} moved approximately: {note}"


def _fits(held: Held, value: object, motion: Motion) -> bool:
    """Whether the entry has one floating number per entry of a parameter that moves."""
    return (
        held.name in motion.by_parameter
        and isinstance(value, Tensor | BlockCodes)
        and value.dtype.is_floating_point
        and not is_narrow(value.dtype)
        and value.shape == held.parameter.shape
    )


def _refuse_iterate(held: Held, key: str, value: object, motion: Motion) -> None:
    """An iterate of the weights (schedule-free `z`, a moving average) that stayed would undo the move."""
    if not (_fits(held, value, motion) and isinstance(value, Tensor | BlockCodes)):
        return
    weight = held.parameter.detach().double()
    distance = torch.linalg.vector_norm(plain(value).detach().double() - weight)
    if float(distance) < ITERATE * float(torch.linalg.vector_norm(weight)):
        raise DataError(
            f"{held.name}: the optimiser's state {key!r} lies near the weights, so it seems to be an iterate of the "
            "weights that must move with them, but no rule says so; register one: @noetherflow.extend.state_rule("
            "OptimizerClass), docs/extend/state_rule.md"
        )


def without_optimizer(held: Sequence[Held], tensors: Mapping[str, Tensor], motion: Motion) -> list[str]:
    """A line for every moved parameter that none of the optimisers holds."""
    known = {h.name for h in held}
    moved = [n for n in motion.by_parameter if isinstance(tensors[n], nn.Parameter)]
    return [f"{n}: optimiser state, if there is any (in no optimiser given)" for n in moved if n not in known]
