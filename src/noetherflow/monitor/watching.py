"""The parameters of a run, and closures that compute gradients inside the optimiser's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from noetherflow.core.tensors import check_same_model, tensors_of
from noetherflow.core.unwrap import unwrap
from noetherflow.errors import DataError, DeclarationError
from noetherflow.monitor import sharding


def parameters_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    watched: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, nn.Parameter]:
    """All parameters of the model by their canonical names.

    Args:
        model: the model, wrapped or not.
        optimizer: the optimiser that should train it.
        watched: the names of the parameters that symmetries act on.
        shapes: the shapes that the symmetries were found with.

    Raises:
        DeclarationError: one of those `watched` is not in the model, has another shape, or is complex.
        DataError: the optimiser holds none of the trainable ones.
    """
    named = {n: t for n, t in tensors_of(unwrap(model)).items() if isinstance(t, nn.Parameter)}
    remedy = f"find them again with find_symmetries(model, example_inputs). The model has {sorted(named)[:8]}"
    check_same_model(named, watched, shapes, "the symmetries belong", remedy, DeclarationError)
    if unreal := [n for n in watched if named[n].is_complex()]:
        raise DeclarationError(f"complex parameters cannot be watched: {unreal[:5]}; filter their symmetries out")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [n for n in watched if named[n].requires_grad]
    if trained and not any(id(named[n]) in held for n in trained):
        raise DataError(
            f"the optimiser holds none of {trained[:5]}, which these symmetries are about: was it made for another "
            "copy of the model? Make it from this model's parameters()"
        )
    return named


class WeightStamps:
    """Where some parameters lay and how often they were written, to tell later whether a training has moved them.

    Example:
        >>> weight = nn.Parameter(torch.zeros(3))
        >>> stamps = WeightStamps([weight])
        >>> with torch.no_grad():
        ...     _ = weight.add_(1)
        >>> weight.grad = torch.ones(3)
        >>> stamps.trained()
        True
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._seen = self._now()

    def _now(self) -> list[tuple[int, int]]:
        plain = [sharding.local(p, True) for p in self._parameters]
        return [(t.data_ptr(), t._version) for t in plain]

    def trained(self) -> bool:
        """Whether there are gradients and a parameter was written since."""
        return any(p.grad is not None for p in self._parameters) and self._now() != self._seen


def watch_closure(args: tuple[Any, ...], kwargs: dict[str, Any], then: Callable[[], None]) -> Any:
    """The arguments of `optimizer.step` with `then` run after the first evaluation of its closure; None without one.

    A closure computes the gradients inside the step (Lightning, L-BFGS), so that hooks before the step come too early.
    """
    place = next((i for i, a in enumerate(args) if callable(a) and not isinstance(a, torch.optim.Optimizer)), None)
    closure = kwargs.get("closure") if place is None else args[place]
    if closure is None:
        return None
    waiting = [then]

    def watched() -> Any:
        result = closure()
        while waiting:
            waiting.pop()()
        return result

    if place is None:
        return args, {**kwargs, "closure": watched}
    return (*args[:place], watched, *args[place + 1 :]), kwargs


def untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that `torch.compile` leaves alone, when it compiles the optimiser's step that calls the hook."""
    return cast(Callable[..., Any], torch.compiler.disable(hook))


def group_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the log's header says of the optimiser: the settings of each parameter group, and whether lr is scheduled.

    A schedule leaves `initial_lr` in the groups; which schedule it is, and whether gradients are clipped, cannot be
    seen from the optimiser.

    Example:
        >>> weight = nn.Parameter(torch.zeros(3))
        >>> group_settings(torch.optim.SGD([weight], lr=0.1))["groups"][0]["lr"]
        0.1
    """
    groups = []
    for group in optimizer.param_groups:
        known = {k: v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for k, v in group.items()}
        told = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items() if k != "params" and _simple(v)}
        groups.append({"parameters": len(group["params"]), **told})
    return {"groups": groups, "scheduled": any("initial_lr" in group for group in optimizer.param_groups)}


def _simple(value: Any) -> bool:
    """Whether a setting is a number, a word or a few of them."""
    if isinstance(value, tuple):
        return all(_simple(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))
