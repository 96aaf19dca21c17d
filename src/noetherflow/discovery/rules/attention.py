"""Softmax and fused attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from noetherflow.discovery.gauges import Gauge
from noetherflow.discovery.rules.base import Context, on_ids, rule
from noetherflow.discovery.rules.contraction import LETTERS, contracted


@rule("aten.softmax", "aten._softmax", "aten._safe_softmax", "aten.log_softmax", "aten._log_softmax")
def softmax(ctx: Context, x: Gauge, dim: int = -1, *_: Any, **__: Any) -> Gauge:
    ctx.trivial(x, why="passes a softmax")
    return ctx.out(marks=frozenset({"softmax"}))


def _repeated(gauge: Gauge, heads: int) -> Gauge:
    """Key/value heads repeated for the query heads that share them."""
    here = gauge.shape[-3]
    if here == heads:
        return gauge
    fields = on_ids(gauge.fields, gauge.shape, lambda ids: torch.repeat_interleave(ids, heads // here, dim=-3))
    return replace(gauge, shape=(*gauge.shape[:-3], heads, *gauge.shape[-2:]), fields=fields)


@rule("aten.scaled_dot_product_attention")
def attention(
    ctx: Context,
    q: Gauge,
    k: Gauge,
    v: Gauge,
    mask: Gauge | None = None,
    *_: Any,
    scale: Any = None,
    enable_gqa: bool = False,
    **__: Any,
) -> Gauge:
    if enable_gqa:
        k, v = _repeated(k, q.shape[-3]), _repeated(v, q.shape[-3])
    ctx.trivial(mask, why="is an attention mask")
    batch = LETTERS[: len(q.shape) - 2]
    scores = contracted(ctx, q, k, f"{batch}yz,{batch}xz->{batch}yx")
    ctx.store.vanish(scores, "passes a softmax")
    weights = Gauge((*q.shape[:-1], k.shape[-2]), marks=frozenset({"softmax", "data"}))
    return ctx.out(contracted(ctx, weights, v, f"{batch}yx,{batch}xz->{batch}yz"))


@rule(
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
)
def fused_attention(ctx: Context, q: Gauge, k: Gauge, v: Gauge, *args: Any, **kwargs: Any) -> list[Gauge]:
    ctx.trivial(args, kwargs)
    return [attention(ctx, q, k, v), *(Gauge(shape or ()) for shape in ctx.shapes[1:])]


@rule("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input")
def recurrent(ctx: Context, x: Gauge, state: Any, weights: Any, *args: Any) -> list[Gauge]:
    """Trivial inside; the first layer's input weights pair with the input."""
    layers, bidirectional = args[1], args[4]
    per_cell = len(weights) // (layers * (2 if bidirectional else 1))
    first = {0, per_cell} if bidirectional else {0}
    for k, weight in enumerate(weights):
        fields = contracted(ctx, x, weight, "abz,yz->aby") if k in first else weight.fields
        ctx.store.vanish(fields, "passes a recurrent cell")
    ctx.trivial(state, why="passes a recurrent cell")
    return [Gauge(shape or ()) for shape in ctx.shapes]
