"""Operands broadcast along the samples: elementwise products and sums, expand, PReLU, attention masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from noetherflow.moments.rules.registry import Call, Owned, Prepare, rule
from noetherflow.moments.rules.sites import (
    channel_axis,
    delta_alone,
    last_axes,
    raised,
    summed,
)


@rule(lambda input, weight: None, torch.prelu, F.prelu)
def prelu(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    x, w = a["input"], a["weight"]
    if owned(x) or x.ndim < 2:
        return None
    aligned = channel_axis(w) if w.numel() > 1 else last_axes(w)
    slopes = summed(w, aligned, lambda delta, x: (torch.mul(*raised(delta, x.clamp(max=0))),))
    return Call((x,), lambda out: [k for k in range(out.ndim) if k != 1 or w.numel() == 1], (slopes,))


def spread(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Attention's arguments with the mask (relative position bias) expanded to one copy per sample; None without."""
    names = ("query", "key", "value", "attn_mask")
    a = {**dict(zip(names, args, strict=False)), **kwargs}
    mask, query, key = a.get("attn_mask"), a["query"], a["key"]
    if mask is None or len(args) > len(names):
        return None
    return {**a, "attn_mask": mask.expand(*query.shape[:-1], key.shape[-2])}


SPREADING = (Tensor.expand, Tensor.repeat, Tensor.broadcast_to, torch.broadcast_to)


@rule(lambda input, *size: None, *SPREADING)
def expand(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    """One copy per sample: consumed where it is expanded."""
    operand = a["input"]
    if func is Tensor.repeat and not _copies(operand.shape, a["size"]):
        return None
    return _elementwise(operand, None, delta_alone)


def _copies(shape: torch.Size, repeats: tuple[Any, ...]) -> bool:
    """Whether `repeat` broadcasts: it repeats axes of size 1 and new ones only."""
    given = repeats if all(isinstance(r, int) for r in repeats) else repeats[0]
    return all(size == 1 or times == 1 for size, times in zip(reversed(shape), reversed(given), strict=False))


def _elementwise(operand: Tensor, other: Any, prepare: Prepare) -> Call | None:
    """A broadcast operand: samples lie where its aligned size is 1."""
    aligned = last_axes(operand)
    saved = (other,) if isinstance(other, Tensor) else ()
    return Call(
        saved,
        lambda out: [k for k, size in enumerate(aligned(out.ndim)) if size == 1],
        (summed(operand, aligned, prepare),),
    )


def _pair(owned: Owned, a: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """(operand, activation) when exactly one of the two is owned and both are tensors."""
    x, y = a["input"], a["other"]
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or owned(x) == owned(y):
        return None
    return (x, y) if owned(x) else (y, x)


@rule(
    lambda input, other: None, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply
)
def multiply(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    pair = _pair(owned, a)
    return pair and _elementwise(*pair, lambda delta, other: (torch.mul(*raised(delta, other)),))


@rule(
    lambda input, other, alpha=1: None,
    torch.add,
    Tensor.add,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__iadd__,
    Tensor.add_,
)
def add(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    pair = _pair(owned, a)
    if pair is None or a["alpha"] != 1:
        return None
    if func in (Tensor.__iadd__, Tensor.add_) and (owned(a["input"]) or a["input"]._is_view()):
        return None  # into a view: what it is a view of changes too, beyond the tapped output
    return _elementwise(pair[0], None, delta_alone)


@rule(lambda input, other, alpha=1: None, torch.sub, Tensor.sub, Tensor.__sub__, Tensor.subtract, torch.subtract)
def subtract(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    pair = _pair(owned, a)
    if pair is None or a["alpha"] != 1:
        return None
    return _elementwise(pair[0], None, delta_alone if owned(a["input"]) else lambda delta: (-delta,))
