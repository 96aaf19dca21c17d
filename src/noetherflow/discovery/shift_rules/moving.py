"""Operators that re-index: they are run on labels and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from noetherflow.discovery.gauges import narrow
from noetherflow.discovery.rules.base import normal_axes
from noetherflow.discovery.shift_rules.base import ShiftContext, Shifted, shift_rule, shifted_in
from noetherflow.discovery.shift_store import ShiftTerm

PASSING = """clone detach alias contiguous _to_copy to lift_fresh_copy type_as positive view_of real"""
MOVING = """permute transpose t expand squeeze unsqueeze flip roll repeat slice select narrow movedim swapaxes diagonal
repeat_interleave.self_int broadcast_to"""


@shift_rule(*(f"aten.{name}" for name in PASSING.split()))
def same(ctx: ShiftContext, x: Shifted, *_: Any, **__: Any) -> Shifted:
    return ctx.out(x.terms)


@shift_rule("aten.dropout", "aten.feature_dropout", "aten.native_dropout")
def dropout(ctx: ShiftContext, x: Shifted, p: float = 0.5, train: bool = True) -> Shifted | list[Shifted]:
    """Active dropout sets entries to zero, shifted or not: nothing passes."""
    if train and p > 0:
        ctx.kill(x)
    return ctx.first_or_all(x.terms)


@shift_rule("aten.view", "aten._unsafe_view", "aten.reshape", "aten.flatten", "aten.unflatten")
def reshape(ctx: ShiftContext, x: Shifted, *_: Any) -> Shifted:
    return ctx.out(t.map(lambda ids: ids.reshape(ctx.shape), x.shape) for t in x.terms)


@shift_rule(*(f"aten.{name}" for name in MOVING.split()))
def rearrange(ctx: ShiftContext, x: Shifted, *args: Any, **kwargs: Any) -> Shifted:
    if any(y.terms for y in shifted_in([args, kwargs])):
        return ctx.kill(x, args, kwargs)
    act: Any = ctx.node.target
    return ctx.out(t.map(lambda ids: act(ids, *args, **kwargs), x.shape) for t in x.terms)


@shift_rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.tensor_split")
def split(ctx: ShiftContext, x: Shifted, *args: Any, **kwargs: Any) -> list[Shifted]:
    act: Any = ctx.node.target
    pieces: list[list[ShiftTerm]] = [[] for _ in ctx.shapes]
    for t in x.terms:
        labels, values = (act(ids.expand(tuple(x.shape)), *args, **kwargs) for ids in (t.label, t.value))
        for piece, label, value in zip(pieces, labels, values, strict=True):
            piece.append(ShiftTerm(narrow(label), narrow(value), t.source, t.scale, t.family))
    return [Shifted(shape or (), tuple(terms)) for shape, terms in zip(ctx.shapes, pieces, strict=True)]


@shift_rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(ctx: ShiftContext, tensors: Sequence[Shifted], dim: int = 0) -> Shifted:
    parts = [x for x in tensors if x.shape != (0,)]
    axis = dim % len(ctx.shape)
    return ctx.out(_beside(parts, axis))


@shift_rule("aten.stack")
def stack(ctx: ShiftContext, tensors: Sequence[Shifted], dim: int = 0) -> Shifted:
    axis = dim % len(ctx.shape)
    raised = []
    for x in tensors:
        terms = tuple(t.map(lambda ids: ids.unsqueeze(axis), x.shape) for t in x.terms)
        raised.append(Shifted((*x.shape[:axis], 1, *x.shape[axis:]), terms))
    return ctx.out(_beside(raised, axis))


def _beside(parts: Sequence[Shifted], axis: int) -> list[ShiftTerm]:
    """The terms of tensors laid side by side: each moves its own part, nothing moves the others (label 0)."""
    sizes = [x.shape[axis] for x in parts]
    out = []
    for k, x in enumerate(parts):
        for t in x.terms:
            label, value = (
                narrow(_padded(ids, axis, sizes[k], sum(sizes[:k]), sum(sizes[k + 1 :]), blank))
                for ids, blank in ((t.label, 0), (t.value, -1))
            )
            out.append(ShiftTerm(label, value, t.source, t.scale, t.family))
    return out


def _padded(ids: torch.Tensor, axis: int, own: int, before: int, after: int, blank: int) -> torch.Tensor:
    """`ids` stretched to size `own` along `axis`, with `blank` in front and behind."""
    ends = [[width if a == axis else n for a, n in enumerate(ids.shape)] for width in (before, after)]
    full = ids.expand([own if a == axis else n for a, n in enumerate(ids.shape)])
    first, last = (torch.full(end, blank) for end in ends)
    return torch.cat((first, full, last), axis)


@shift_rule("aten.constant_pad_nd")
def pad(ctx: ShiftContext, x: Shifted, widths: Sequence[int], *_: Any) -> Shifted:
    """What is padded is constant and does not move."""
    out = []
    for t in x.terms:
        label = F.pad(t.label.expand(tuple(x.shape)), list(widths), value=0)
        value = F.pad(t.value.expand(tuple(x.shape)), list(widths), value=-1)
        out.append(ShiftTerm(narrow(label), narrow(value), t.source, t.scale, t.family))
    return ctx.out(out)


@shift_rule("aten.embedding")
def embedding(ctx: ShiftContext, weight: Shifted, ids: Shifted, *_: Any) -> Shifted:
    """Rows are chosen by data: a shift of all rows alike stays, one of single rows does not."""
    return ctx.out(_chosen(ctx, weight, len(ids.shape)))


@shift_rule("aten.index.Tensor")
def index(ctx: ShiftContext, x: Shifted, indices: Sequence[Shifted | None]) -> Shifted:
    if len(indices) != 1 or indices[0] is None or len(ctx.shape) != indices[0].ndim + x.ndim - 1:
        return ctx.kill(x, indices)
    return ctx.out(_chosen(ctx, x, len(indices[0].shape)))


@shift_rule("aten.index_select", "aten.gather")
def lookup(ctx: ShiftContext, x: Shifted, dim: int, *_: Any, **__: Any) -> Shifted:
    return ctx.out(_united_and_cut(ctx, x, normal_axes(dim, x.ndim)))


def _united_and_cut(ctx: ShiftContext, x: Shifted, axes: Sequence[int]) -> list[ShiftTerm]:
    """Terms that are equal along `axes`, cut to the size of the output along the others."""
    cut = tuple(slice(0, n) for n in ctx.shape)
    return [ShiftTerm(t.label[cut], t.value[cut], t.source, t.scale, t.family) for t in ctx.united(x, axes)]


def _chosen(ctx: ShiftContext, x: Shifted, lead: int) -> list[ShiftTerm]:
    """Terms of `x[indices]` with indices of `lead` axes: which row stands where is not known."""
    out = []
    for t in x.terms:
        rest = t.value.shape[1:]
        if t.label.shape[0] > 1:
            united = ctx.store.unite(t, [0])
            if united is None:
                continue
            t = united
        label = t.label.reshape([1] * lead + list(t.label.shape[1:]))
        if t.value.shape[0] == 1:
            out.append(ShiftTerm(label, t.value.reshape([1] * lead + list(rest)), t.source, t.scale, t.family))
        else:
            sizes = [*ctx.shape[:lead], *rest]
            value = torch.arange(int(torch.tensor(sizes).prod())).reshape(sizes)
            out.append(ShiftTerm(label, value, ctx.store.source(), 1.0, t.family))
    return out
