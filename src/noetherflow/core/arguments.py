"""Arguments that are another thing than they should be: one sentence for all verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from noetherflow.errors import DataError


def expect(call: str, name: str, given: Any, kind: Any, what: str) -> None:
    """Refuse an argument of another kind.

    Args:
        call: how the verb is called, `certify(model, syms, example_inputs)`.
        name: the argument.
        given: its value.
        kind: the class (or union of classes) that it must be of.
        what: what it must be, in words.

    Raises:
        DataError: names the argument, what came, and the order of all.

    Example:
        >>> expect("certify(model, syms, example_inputs)", "model", nn.Linear(1, 1), nn.Module, "a torch.nn.Module")
    """
    if not isinstance(given, kind):
        raise DataError(f"{call}: {name} must be {what}, got {type(given).__name__}; are the arguments in that order?")


def expect_measurement(call: str, model: Any, loss_fn: Any, batches: Any) -> None:
    """Refuse a model, loss or batches that are something else; `call` is as in `expect`, which says what it raises.

    Example:
        >>> expect_measurement("top_eigenvalue(model, loss_fn, batches)", nn.Linear(1, 1), lambda m, b: m(b), [])
    """
    expect(call, "model", model, nn.Module, A_MODEL)
    expect(call, "loss_fn", loss_fn, Callable, A_LOSS)
    refuse_other_losses(loss_fn)
    expect(call, "batches", batches, Iterable, BATCHES)


def refuse_other_losses(loss_fn: Any) -> None:
    """Raises DataError for a loss that is a module (a criterion) or cannot be called."""
    if not callable(loss_fn) or isinstance(loss_fn, nn.Module):
        raise DataError(
            f"loss_fn is called as loss_fn(model, batch) and returns one loss per sample, got a "
            f"{type(loss_fn).__name__}; wrap a criterion with reduction='none': "
            "lambda model, batch: criterion(model(batch[0]), batch[1])"
        )


A_MODEL = "a torch.nn.Module"
SYMMETRIES = "the symmetries, nf.find_symmetries(model, example_inputs)"
MOMENTS = "moments, nf.gradient_moments(model, loss_fn, batches, syms)"
A_LOSS = "loss_fn(model, batch), which gives one loss per sample"
BATCHES = "an iterable of batches, a DataLoader or [(x, y), ...]"
EQUILIBRIUM = "an equilibrium, nf.noise_equilibrium(model, syms, mom, sgd)"
FLOW = "a flow, nf.noether_flow(model, syms, mom, sgd)"
OPTIMISER = "a torch optimiser or a sequence of them"
