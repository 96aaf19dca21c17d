"""Optimiser state that moves with the weights: in a living optimiser, or in its saved `state_dict()`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from noetherflow.balance.motion import Motion
from noetherflow.core.tensors import tensors_of
from noetherflow.errors import CheckpointError

GRADIENT_LIKE = ("momentum_buffer", "exp_avg", "grad_avg")
SQUARE_LIKE = ("exp_avg_sq", "square_avg", "max_exp_avg_sq", "sum")
WEIGHT_LIKE = ("ax",)
RULES = {
    **dict.fromkeys(GRADIENT_LIKE, Motion.gradient),
    **dict.fromkeys(SQUARE_LIKE, Motion.squares),
    **dict.fromkeys(WEIGHT_LIKE, Motion.weight),
}


@dataclass(frozen=True, eq=False)
class Held:
    """What an optimiser keeps under one parameter; `coupled`: its gradients include the weight decay."""

    name: str
    parameter: Tensor
    state: dict[str, Any]
    coupled: bool


@dataclass
class MoveTally:
    """How many entries moved, which of them only approximately, and what should have moved but did not."""

    entries: int = 0
    approximate: list[str] = field(default_factory=list)
    unmoved: list[str] = field(default_factory=list)


def held_by(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> list[Held]:
    """The state of a living optimiser, under the names of `tensors`."""
    names = {id(t): n for n, t in tensors.items()}
    return [
        Held(names.get(id(p), "a parameter outside the model"), p, optimizer.state.get(p, {}), _coupled(group))
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def is_saved_optimizer(value: Any) -> bool:
    """Whether `value` has the layout of `optimizer.state_dict()`."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and all(isinstance(s, dict) for s in value["state"].values())
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(g, dict) and "params" in g for g in value["param_groups"])
    )


def held_in(saved: Mapping[str, Any], model: nn.Module) -> list[Held]:
    """The state in an `optimizer.state_dict()`, under the model's parameter names.

    Parameters are known by `param_names` (or names in place of indices) where the file has them, else by their order,
    which is taken to be that of `model.parameters()` (all, or the trainable ones).

    Raises CheckpointError when this does not identify every parameter beyond doubt: another number of parameters, state
    of another shape, or several groups that hold parameters of the same shape.
    """
    groups = saved["param_groups"]
    labels = [n for g in groups for n in g.get("param_names", g["params"])]
    tensors = tensors_of(model)
    canonical = {id(t): n for n, t in tensors.items()}
    named = {n: canonical[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    by_name = bool(labels) and all(n in named for n in labels)
    names = [named[n] for n in labels] if by_name else _in_order(len(labels), tensors)
    held = [
        Held(name, tensors[name], saved["state"].get(index, {}), _coupled(g))
        for (g, index), name in zip(((g, i) for g in groups for i in g["params"]), names, strict=True)
    ]
    for h in held:
        for key, value in h.state.items():
            if key in RULES and isinstance(value, Tensor) and value.shape != h.parameter.shape:
                raise CheckpointError(
                    f"its {key} of shape {tuple(value.shape)} does not fit {h.name}, shape {tuple(h.parameter.shape)}"
                )
    if not by_name:
        _refuse_doubtful_order(groups, held)
    return held


def moved_state(held: Sequence[Held], motion: Motion, tally: MoveTally) -> Iterator[tuple[Held, str, Tensor]]:
    """`(held, key, new value in its own dtype)` for every entry of one optimiser that has a rule.

    What moved and what should have is told to `tally`: tensors under a moved parameter, and flat ones that span all
    parameters (L-BFGS).
    """
    if not any(h.name in motion.by_parameter for h in held):
        return
    span = sum(h.parameter.numel() for h in held)
    for h in held:
        concerned = 2 if h.name in motion.by_parameter else span
        for key, value in list(h.state.items()):
            if not _has_rule(h, key, motion):
                if any(t.numel() >= concerned for t in tree_leaves(value) if isinstance(t, Tensor)):
                    tally.unmoved.append(f"{h.name}: {key} left as it was (no rule for this optimiser state)")
                continue
            tally.entries += 1
            if h.coupled and key not in WEIGHT_LIKE:
                tally.approximate.append(
                    f"{h.name}: {key} moved like a gradient; its weight-decay part moves like a weight"
                )
            if key in SQUARE_LIKE and not motion.is_torus(h.name):
                tally.approximate.append(f"{h.name}: {key} moved as if gradient entries were uncorrelated")
            yield h, key, RULES[key](motion, h.name, value).to(value.dtype)


def without_optimizer(held: Sequence[Held], tensors: Mapping[str, Tensor], motion: Motion) -> list[str]:
    """A line for every moved parameter that none of the optimisers holds."""
    known = {h.name for h in held}
    moved = [n for n in motion.by_parameter if isinstance(tensors[n], nn.Parameter)]
    return [f"{n}: optimiser state, if there is any (in no optimiser given)" for n in moved if n not in known]


def _has_rule(held: Held, key: str, motion: Motion) -> bool:
    value = held.state[key]
    preconditioned = key == "momentum_buffer" and "square_avg" in held.state
    return (
        held.name in motion.by_parameter
        and key in RULES
        and not preconditioned
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.shape == held.parameter.shape
    )


def _coupled(group: Mapping[str, Any]) -> bool:
    return bool(group.get("weight_decay")) and not group.get("decoupled_weight_decay")


def _in_order(count: int, tensors: Mapping[str, Tensor]) -> list[str]:
    every = [n for n, t in tensors.items() if isinstance(t, nn.Parameter)]
    trainable = [n for n in every if tensors[n].requires_grad]
    for names in (every, trainable):
        if len(names) == count:
            return names
    raise CheckpointError(f"it holds {count} parameters, the model {len(every)} ({len(trainable)} trainable)")


def _refuse_doubtful_order(groups: Sequence[Mapping[str, Any]], held: Sequence[Held]) -> None:
    """Parameters of the same shape in two groups: another order than the model's would go unnoticed."""
    numbers = [number for number, group in enumerate(groups) for _ in group["params"]]
    seen: dict[torch.Size, int] = {}
    for number, h in zip(numbers, held, strict=True):
        if seen.setdefault(h.parameter.shape, number) != number:
            raise CheckpointError(
                f"parameters of shape {tuple(h.parameter.shape)} are in two groups, so that their order cannot be "
                f"checked; build the optimiser from model.named_parameters() to have names stored"
            )
