"""Rows looked up by integer: embedding, `weight[index]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from noetherflow.moments.forms import Form, Lookup
from noetherflow.moments.layout import SampleLayout
from noetherflow.moments.rules.registry import Call, Owned, Prepare, Site, rule
from noetherflow.moments.rules.sites import (
    as_given,
    features_last,
)


@rule(
    lambda input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False: None,
    F.embedding,
)
def embedding(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    index, w, padding = a["input"], a["weight"], a["padding_idx"]
    if a["scale_grad_by_freq"] or a["max_norm"] is not None or index.ndim < 1:
        return None
    rows = w.shape[0]
    if padding is not None and padding < 0:
        padding += rows

    def prepare(delta: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        kept = delta if padding is None else delta.masked_fill((index == padding).unsqueeze(-1), 0)
        return kept, index

    return _lookup(w, index, prepare)


@rule(lambda input, index: None, Tensor.__getitem__)
def gather(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    """`weight[index]` with an integer tensor: an embedding without a module."""
    index = a["index"]
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool or index.ndim < 1:
        return None
    wrapped = torch.where(index < 0, index + a["input"].shape[0], index)
    return _lookup(a["input"], wrapped, as_given) if a["input"].ndim == 2 else None


def _lookup(w: Tensor, index: Tensor, prepare: Prepare) -> Call:
    """Rows of `w` picked by an integer tensor of any shape."""
    rows = w.shape[0]

    def build(_: SampleLayout, delta: Tensor, index: Tensor) -> Form:
        k = index.shape[0]
        return Lookup(index.reshape(k, -1), delta.reshape(k, -1, delta.shape[-1]), rows)

    return Call((index,), features_last, (Site(w, prepare, build),))
