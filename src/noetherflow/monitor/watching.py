"""The parameters of a run, and closures that compute gradients inside the optimiser's step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from noetherflow.core.tensors import check_same_model, tensors_of
from noetherflow.core.unwrap import unwrap
from noetherflow.errors import DataError, DeclarationError


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
