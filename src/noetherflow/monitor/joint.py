"""Several optimisers of one model, watched as one: Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from noetherflow.errors import DataError
from noetherflow.monitor.realised_rules import RealisedRule
from noetherflow.monitor.rule import AnyRule, Group
from noetherflow.monitor.rules import rule_for

Hook = Callable[..., Any]


class JointRule(RealisedRule):
    """The whole update of several optimisers, from before the first one's step to after the last one's.

    It splits as for any optimiser: decay that is known to be decoupled, and `other`.
    """

    not_booked = "several optimisers step as one, each with a preconditioner of its own or none"


class JointOptimizer:
    """Several optimisers that step once each in turn, as far as a ledger needs to see of them: one step of them all.

    The joint step begins before the first of them and ends after the last. Where one does not step (a gradient scaler
    skips it), the joint step ends before the one that usually goes first begins again, or one that was in it.

    Args:
        optimizers: at least one, no parameter in two of them.

    Raises:
        DataError: there is none, or two hold one parameter.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if not optimizers:
            raise DataError("a ledger needs at least one optimiser, got an empty list")
        held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        if len(set(held)) < len(held):
            raise DataError("two of the optimisers hold the same parameter; give each parameter to one of them")
        self.optimizers = tuple(optimizers)
        self.name = " + ".join(type(o).__name__ for o in optimizers)
        self.state: Mapping[Any, Any] = {}
        self._before: list[Hook] = []
        self._after: list[Hook] = []
        self._made: dict[int, None] = {}
        self._leader: int | None = None
        self._handles = [
            handle
            for i, o in enumerate(optimizers)
            for handle in (
                o.register_step_pre_hook(torch.compiler.disable(partial(self._begins, i))),
                o.register_step_post_hook(torch.compiler.disable(partial(self._ends, i))),
            )
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, as they are now, each with a flag that says whether its weight decay is decoupled."""
        return [
            {**group, "decoupled_weight_decay": _decoupled(rule_for(o), group)}
            for o in self.optimizers
            for group in o.param_groups
        ]

    def register_step_pre_hook(self, hook: Hook) -> JointHandle:
        """Have it called before each joint step, with the optimiser that is first and its arguments."""
        return JointHandle(self, self._before, hook)

    def register_step_post_hook(self, hook: Hook) -> JointHandle:
        """Have it called after each joint step."""
        return JointHandle(self, self._after, hook)

    def _begins(self, number: int, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if number in self._made or (self._made and number == self._leader):
            self.finish()
        if self._made:
            return None
        changed = [hook(optimizer, args, kwargs) for hook in self._before]
        return next((c for c in changed if c is not None), None)

    def _ends(self, number: int, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._made[number] = None
        if len(self._made) == len(self.optimizers):
            self._leader = next(iter(self._made))
            self.finish()

    def finish(self) -> None:
        """The joint step is over, also where some have not stepped; nothing where none has."""
        if not self._made:
            return
        self._made.clear()
        for hook in list(self._after):
            hook(self)

    def release(self) -> None:
        """Let go of the optimisers once nobody listens any more."""
        if not self._before and not self._after:
            for handle in self._handles:
                handle.remove()


class JointHandle:
    """A registered hook; `remove()` takes it off."""

    def __init__(self, joint: JointOptimizer, hooks: list[Hook], hook: Hook) -> None:
        self._joint, self._hooks, self._hook = joint, hooks, hook
        hooks.append(hook)

    def remove(self) -> None:
        """Take the hook off; the last one lets go of the optimisers."""
        self._hooks[:] = [h for h in self._hooks if h is not self._hook]
        self._joint.release()


def _decoupled(rule: AnyRule, group: Group) -> bool:
    """Whether the weights of a group shrink by `1 - lr w` apart from the rest of the step."""
    if isinstance(rule, RealisedRule):
        return rule.decoupled(group)
    return bool(group.get("decoupled_weight_decay", False))


def as_one(optimizer: Any, unwrap: Callable[[Any], torch.optim.Optimizer]) -> Any:
    """The optimiser, unwrapped; several of them (any iterable) as one."""
    if isinstance(optimizer, Iterable):
        return JointOptimizer([unwrap(o) for o in optimizer])
    return unwrap(optimizer)
