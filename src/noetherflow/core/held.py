"""What an optimiser keeps under each parameter: of a living optimiser, or of its saved `state_dict()`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.foreign import settings_of, state_of, without_parameters
from noetherflow.core.prefix import prefix_of
from noetherflow.core.tensors import named_tensors, tensors_of
from noetherflow.core.unwrap import unwrap_optimizer
from noetherflow.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class Held:
    """The state and the settings that one optimiser has for one parameter.

    Attributes:
        name: canonical name of the parameter in the model.
        parameter: the parameter itself.
        state: the optimiser's state of it, such as `exp_avg`; empty before the first step.
        settings: its parameter group, such as `lr` and `weight_decay`, without the parameters.
    """

    name: str
    parameter: Tensor
    state: dict[str, Any]
    settings: Mapping[str, Any]

    @property
    def coupled(self) -> bool:
        """True where the gradients that the optimiser averages include the weight decay."""
        return bool(self.settings.get("weight_decay")) and not self.settings.get("decoupled_weight_decay")


def held_by(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> list[Held]:
    """The state of a living optimiser, under the names of `tensors`."""
    names = {id(t): n for n, t in tensors.items()}
    return [
        Held(
            names.get(id(p), "a parameter outside the model"), p, state_of(optimizer, p), settings_of(optimizer, group)
        )
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def peak_rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a parameter group, or the one that its schedule starts from where that is larger."""
    return max(float(group["lr"]), float(group.get("initial_lr", 0.0)))


def moving_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parameter groups that have a learning rate; all where none has.

    Example:
        >>> [g["lr"] for g in moving_groups([{"lr": 0.0}, {"lr": 0.1}])]
        [0.1]
    """
    return [group for group in groups if peak_rate(group) > 0] or list(groups)


@contextmanager
def others_frozen(model: nn.Module, optimizer: Any) -> Iterator[None]:
    """Parameters that an optimiser does not move are frozen during the block: those that it does not hold, and those of
    groups at a learning rate of 0 beside others that have one.

    Args:
        model: whose parameters are meant.
        optimizer: of torch, wrapped or not; anything without `param_groups`, as settings are, freezes none.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> with others_frozen(net, torch.optim.SGD(net[1].parameters(), lr=0.1)):
        ...     net[0].weight.requires_grad
        False
        >>> net[0].weight.requires_grad
        True
    """
    groups = moving_groups(unwrap_optimizer(optimizer).param_groups) if hasattr(optimizer, "param_groups") else []
    held = {id(p) for group in groups for p in group["params"]}
    others = [p for p in model.parameters() if groups and p.requires_grad and id(p) not in held]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def is_saved_optimizer(value: Any) -> bool:
    """Whether `value` has the layout of `optimizer.state_dict()`."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and all(isinstance(s, dict) for s in value["state"].values())
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(g, dict) and "params" in g for g in value["param_groups"])
    )


def names_in(saved: Mapping[str, Any], model: nn.Module) -> list[str] | None:
    """The model's names of the parameters in an `optimizer.state_dict()`, where the file itself has them.

    Args:
        saved: what `optimizer.state_dict()` gave, its `param_groups` with `param_names` or names in place of indices.
        model: the model that the optimiser trained.

    Returns:
        One canonical name per parameter, in the order of the file; None where it holds indices only.

    Raises:
        CheckpointError: names that are not the model's.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> names_in(torch.optim.SGD(net.named_parameters(), lr=0.1).state_dict(), net)
        ['weight', 'bias']
    """
    labels = [n for g in saved["param_groups"] for n in g.get("param_names", g["params"])]
    if not labels or not all(isinstance(n, str) for n in labels):
        return None
    canonical = {id(t): n for n, t in tensors_of(model).items()}
    named = {n: canonical[id(t)] for n, t in named_tensors(model) if isinstance(t, nn.Parameter)}
    prefix = prefix_of(labels, named)
    names = [prefix.name(n) or n for n in labels]
    unknown = [label for label, n in zip(labels, names, strict=True) if n not in named]
    if unknown:
        raise CheckpointError(f"its parameter names are not the model's: {unknown[:3]} ({len(unknown)} in all)")
    return [named[n] for n in names]


def held_in(
    saved: Mapping[str, Any], model: nn.Module, shaped: Collection[str], given: Sequence[str] | None = None
) -> list[Held]:
    """The state in an `optimizer.state_dict()`, under the model's parameter names.

    Parameters are known by the names `given`, else by those in the file (`names_in`), else by their order, which is
    taken to be that of `model.parameters()` (all, or the trainable ones), within each group.

    Args:
        saved: what `optimizer.state_dict()` gave.
        model: the model that the optimiser trained.
        shaped: keys of the state that hold one number per entry of the parameter, such as `exp_avg`; their shapes
            check the order.
        given: the names in the order of the file, where the caller knows them.

    Returns:
        One record per parameter, in the order of the file.

    Raises:
        CheckpointError: this does not identify every parameter beyond doubt: another number of parameters, state of
            another shape, or several groups that hold parameters of the same shape.
    """
    groups = saved["param_groups"]
    indices = [i for g in groups for i in g["params"]]
    tensors = tensors_of(model)
    known = names_in(saved, model) if given is None else given
    shapes = [_shape(saved["state"].get(i, {}), shaped) for i in indices]
    numbers = [number for number, g in enumerate(groups) for _ in g["params"]]
    names = _in_order(shapes, numbers, tensors) if known is None else known
    held = [
        Held(name, tensors[name], saved["state"].get(index, {}), without_parameters(groups[number]))
        for index, number, name in zip(indices, numbers, names, strict=True)
    ]
    for h in held:
        for key, value in h.state.items():
            if key in shaped and isinstance(value, Tensor) and value.shape != h.parameter.shape:
                raise CheckpointError(
                    f"its {key} of shape {tuple(value.shape)} does not fit {h.name}, shape {tuple(h.parameter.shape)}"
                )
    if known is None:
        _refuse_doubtful_order(numbers, held)
    return held


def _shape(state: Mapping[str, Any], shaped: Collection[str]) -> torch.Size | None:
    """The shape of the parameter that this is the state of, None where nothing tells it."""
    return next((v.shape for k, v in state.items() if k in shaped and isinstance(v, Tensor)), None)


def _in_order(shapes: Sequence[torch.Size | None], numbers: Sequence[int], tensors: Mapping[str, Tensor]) -> list[str]:
    """The model's parameter names, trainable or all, in its order; in several groups each takes the next parameter of
    its shape, so that groups by kind (weights decayed, biases not) come out right.
    """
    every = [n for n, t in tensors.items() if isinstance(t, nn.Parameter)]
    trainable = [n for n in every if tensors[n].requires_grad]
    names = next((found for found in (every, trainable) if len(found) == len(shapes)), None)
    if names is None:
        raise CheckpointError(f"it holds {len(shapes)} parameters, the model {len(every)} ({len(trainable)} trainable)")
    if len(set(numbers)) < 2 or None in shapes:
        return names
    left: dict[torch.Size | None, list[str]] = {}
    for name in reversed(names):
        left.setdefault(tensors[name].shape, []).append(name)
    missing = [tuple(s) for s in shapes if s is not None and shapes.count(s) != len(left.get(s, []))]
    if missing:
        raise CheckpointError(f"it holds state of shape {missing[0]} for another number of parameters than the model")
    return [left[shape].pop() for shape in shapes]


def _refuse_doubtful_order(numbers: Sequence[int], held: Sequence[Held]) -> None:
    """Parameters of the same shape in two groups: another order than the model's would go unnoticed."""
    seen: dict[torch.Size, int] = {}
    for number, h in zip(numbers, held, strict=True):
        if seen.setdefault(h.parameter.shape, number) != number:
            raise CheckpointError(
                f"parameters of shape {tuple(h.parameter.shape)} are in two groups, so that their order cannot be "
                f"checked; build the optimiser from model.named_parameters() to have names stored"
            )
