"""Operators that do not see a shift: softmax one that is equal along its axis, normalisations one they take away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from noetherflow.discovery.rules.base import normal_axes
from noetherflow.discovery.shift_rules.base import ShiftContext, Shifted, shift_rule
from noetherflow.discovery.shift_rules.products import along


@shift_rule("aten.softmax", "aten._softmax", "aten._safe_softmax", "aten.log_softmax", "aten._log_softmax")
def softmax(ctx: ShiftContext, x: Shifted, dim: int = -1, *_: Any, **__: Any) -> Shifted:
    ctx.absorb(x, normal_axes(dim, x.ndim), "translation")
    return ctx.out()


@shift_rule("aten.scaled_dot_product_attention")
def attention(
    ctx: ShiftContext, q: Shifted, k: Shifted, v: Shifted, attn_mask: Any = None, *_: Any, **__: Any
) -> Shifted:
    """A shift that is the same for all keys moves all scores of a query alike."""
    ctx.kill(q, v)
    ctx.absorb(k, [k.ndim - 2], "translation")
    if isinstance(attn_mask, Shifted):
        ctx.absorb(attn_mask, [attn_mask.ndim - 1], "translation")
    return ctx.out()


@shift_rule("aten.layer_norm", "aten.native_layer_norm")
def layer_norm(
    ctx: ShiftContext,
    x: Shifted,
    normalized: Sequence[int],
    weight: Shifted | None = None,
    bias: Shifted | None = None,
    *_: Any,
) -> Shifted | list[Shifted]:
    n = len(ctx.shape)
    ctx.absorb(x, list(range(n - len(normalized), n)), "null")
    return _affine(ctx, weight, bias, -1 if len(normalized) == 1 else None)


@shift_rule("aten.group_norm")
def group_norm(
    ctx: ShiftContext, x: Shifted, groups: int, weight: Shifted | None = None, bias: Shifted | None = None, *_: Any
) -> Shifted | list[Shifted]:
    """Per group of channels, over the group and all of space."""
    split = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    parts = Shifted(split, tuple(t.map(lambda ids: ids.reshape(split), x.shape) for t in x.terms))
    ctx.absorb(parts, list(range(2, len(split))), "null")
    return _affine(ctx, weight, bias, 1)


@shift_rule("aten.native_group_norm")
def native_group_norm(
    ctx: ShiftContext, x: Shifted, weight: Shifted | None, bias: Shifted | None, *sizes: int
) -> Shifted | list[Shifted]:
    """The same; `sizes` are samples, channels, positions, groups and eps."""
    return group_norm(ctx, x, sizes[3], weight, bias)


@shift_rule("aten.var", "aten.std")
def spread(ctx: ShiftContext, x: Shifted, dim: Any = None, *_: Any, **__: Any) -> Shifted:
    """A variance does not see what moves all its entries alike."""
    ctx.absorb(x, normal_axes(None if isinstance(dim, bool) else dim, x.ndim), "null")
    return ctx.out()


def _affine(
    ctx: ShiftContext, weight: Shifted | None, bias: Shifted | None, axis: int | None
) -> Shifted | list[Shifted]:
    """The norm's own gain lets no shift pass, its bias is added along `axis` (None: several axes, not followed)."""
    ctx.kill(weight)
    if axis is None:
        ctx.kill(bias)
        return ctx.first_or_all()
    return ctx.first_or_all(along(ctx, bias, axis))
