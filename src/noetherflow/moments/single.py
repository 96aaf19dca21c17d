"""Gradients of single samples, one backward pass each: for small models, and to check faster ways against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.inputs import LossFn
from noetherflow.core.tensors import tensors_of
from noetherflow.errors import DataError


def single_gradients(
    model: nn.Module, names: Sequence[str], loss_fn: LossFn, batches: Iterable[Any], most: int | None = None
) -> dict[str, Tensor]:
    """The gradient of every sample's loss in some parameters, one by one.

    Args:
        model: left as it is.
        names: of the parameters.
        loss_fn: `loss_fn(model, batch)` gives one loss per sample, `[batch]`.
        batches: the data.
        most: stop after so many samples.

    Returns:
        `[N, *shape]` by name.

    Raises:
        DataError: no batches.

    Example:
        >>> net, x = nn.Linear(3, 2), torch.randn(5, 3)
        >>> single_gradients(net, ["weight"], lambda m, b: m(b).square().sum(1), [x])["weight"].shape
        torch.Size([5, 2, 3])
    """
    tensors = tensors_of(model)
    params = [tensors[n] for n in names]
    rows: list[tuple[Tensor, ...]] = []
    with torch.enable_grad():
        for batch in batches:
            losses = loss_fn(model, batch)
            losses = losses if most is None else losses[: most - len(rows)]
            rows += [torch.autograd.grad(one, params, retain_graph=True) for one in losses]
            if most is not None and len(rows) >= most:
                break
    if not rows:
        raise DataError("no batches to measure gradients on")
    return {n: torch.stack(list(g)) for n, g in zip(names, zip(*rows, strict=True), strict=True)}
