"""Losses of single samples from criteria that average over the batch, and from batches that carry their labels."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from noetherflow.core.arguments import expect
from noetherflow.core.inputs import LossFn, ModelInputs
from noetherflow.core.unwrap import unwrap
from noetherflow.errors import DataError

SAME_LOSS = 1e-3
SHIFTED = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of transformers classes whose logits predict the next token."""


def per_sample(criterion: nn.Module | Callable[..., Tensor]) -> LossFn:
    """A `loss_fn(model, batch)` with one loss per sample from a criterion that averages over the batch.

    Args:
        criterion: a criterion of torch such as `nn.CrossEntropyLoss()`, or a function with a `reduction` argument such
            as `F.mse_loss`. Its `reduction` is set to `none`, and what is left beside the batch axis is averaged sample
            by sample; `ignore_index` is respected.

    Returns:
        The loss function for batches `(inputs, targets)`; it moves the batch to the model's device.

    Raises:
        DataError: a criterion without a reduction, with class weights, or whose losses are no longer one per sample.

    Example:
        >>> loss_fn = per_sample(nn.CrossEntropyLoss())
        >>> loss_fn(nn.Linear(3, 4), (torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0]))).shape
        torch.Size([5])
    """
    expect("per_sample(criterion)", "criterion", criterion, Callable, "a criterion such as nn.CrossEntropyLoss()")
    single = _unreduced(criterion)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = _pair(batch)
        inputs, targets = (_on_device_of(model, part) for part in (inputs, targets))
        losses = single(ModelInputs.of(inputs).call(model), targets)
        return averaged(losses, targets, getattr(criterion, "ignore_index", None))

    return loss_fn


def _unreduced(criterion: Any) -> Callable[[Any, Any], Tensor]:
    if isinstance(criterion, nn.Module):
        if not hasattr(criterion, "reduction"):
            raise DataError(
                f"{type(criterion).__name__} has no reduction to turn off; write loss_fn(model, batch) yourself, with "
                "one loss per sample"
            )
        if isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss) and criterion.weight is not None:
            raise DataError(
                f"{type(criterion).__name__} with class weights divides by the weights in the batch, so no sample has "
                "a loss of its own; write loss_fn(model, batch) yourself, with one loss per sample"
            )
        single: Any = copy.copy(criterion)
        single.reduction = "none"
        return single  # type: ignore[no-any-return]
    if "reduction" not in inspect.signature(criterion).parameters:
        raise DataError(
            f"{criterion!r} takes no reduction; per_sample is for criteria such as nn.CrossEntropyLoss() or F.mse_loss"
        )
    return lambda outputs, targets: criterion(outputs, targets, reduction="none")


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise DataError(
        f"per_sample(criterion) takes batches (inputs, targets), got {type(batch).__name__}; write "
        "loss_fn(model, batch) yourself"
    )


def _on_device_of(model: nn.Module, part: Any) -> Any:
    parameter = next(model.parameters(), None)
    if parameter is None:
        return part
    return pytree.tree_map(lambda t: t.to(parameter.device) if isinstance(t, Tensor) else t, part)


def averaged(losses: Tensor, targets: Any, ignored: int | None) -> Tensor:
    """`[batch, ...]` averaged over all axes but the first, over the targets that count.

    Example:
        >>> averaged(torch.tensor([[1.0, 3.0], [5.0, 0.0]]), torch.tensor([[2, 2], [2, -100]]), -100)
        tensor([2., 5.])
    """
    if losses.ndim == 0:
        raise DataError("the criterion returned one number for the batch, not one loss per sample")
    if losses.ndim == 1:
        return losses
    flat = losses.flatten(1)
    if ignored is None or not isinstance(targets, Tensor) or targets.numel() != losses.numel():
        return flat.mean(1)
    counts = (targets.flatten(1) != ignored).sum(1).clamp_min(1)
    return flat.sum(1) / counts


def labelled_loss(model: nn.Module, batch: Any) -> Tensor:
    """One loss per sample of a batch of keyword arguments with `labels`, as transformers models take it.

    Causal language models are asked for the next token, other models for what `labels` holds at each place.

    Raises:
        DataError: no `labels` in the batch, or an output without logits.
    """
    given = _on_device_of(model, dict(batch))
    labels = given.pop("labels", None)
    if labels is None:
        raise DataError(f"the batch has no labels, only {sorted(given)}; give loss_fn(model, batch)")
    return _of_output(model, model(**given), labels)


def _of_output(model: nn.Module, output: Any, labels: Tensor) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        raise DataError(f"{type(model).__name__} returns no logits; give loss_fn(model, batch), one loss per sample")
    return _of_logits(logits, labels, type(unwrap(model)).__name__.endswith(SHIFTED))


def _of_logits(logits: Tensor, labels: Tensor, shifted: bool) -> Tensor:
    """Squared errors of numbers, cross entropies of classes; `shifted`: of the next token."""
    if labels.is_floating_point():
        return (logits.squeeze(-1) - labels).square().reshape(len(labels), -1).mean(1)
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(logits.movedim(-1, 1).to(wide), labels, reduction="none", ignore_index=-100)
    return averaged(losses, labels, -100)


def _check_labelled(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raises DataError where the mean of `labelled_loss` is not the loss that the model itself returns."""
    given = _on_device_of(model, dict(batch))
    with torch.no_grad():
        output = model(**given)
        ours = float(_of_output(model, output, given["labels"]).mean())
    own = getattr(output, "loss", None)
    if own is not None and abs(float(own) - ours) > SAME_LOSS * (1 + abs(ours)):
        raise DataError(
            f"the model's own loss is {float(own):.6g}, the mean over samples of its logits' losses {ours:.6g}: it has "
            "a loss of another kind, or samples with unequal numbers of labels; give loss_fn(model, batch), one loss "
            "per sample"
        )


def chosen_loss(loss_fn: Any, model: nn.Module, batch: Any) -> LossFn:
    """The `loss_fn(model, batch)` that the user means: their own, a criterion, or the model's own labels.

    Args:
        loss_fn: a function `loss_fn(model, batch)`, a criterion of torch, or None for batches with `labels`.
        model: the model.
        batch: the first batch.
    """
    if isinstance(loss_fn, nn.Module):
        return per_sample(loss_fn)
    if loss_fn is not None:
        return loss_fn  # type: ignore[no-any-return]
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise DataError("loss_fn=None is for batches with labels (a dict); give loss_fn(model, batch) or a criterion")
    _check_labelled(model, batch)
    return labelled_loss
