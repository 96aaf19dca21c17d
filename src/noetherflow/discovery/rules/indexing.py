"""Reading and writing at places given by a tensor of positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from noetherflow.discovery.gauges import Field, Gauge, narrow
from noetherflow.discovery.rules.base import Context, aligned, is_number, normal_axes, on_ids, rule, short_name
from noetherflow.discovery.rules.elementwise import masked_fill
from noetherflow.discovery.rules.shape import agree, separate_pieces

BY_DATA = "is indexed by data"
UNCHANGED = frozenset({"clone", "to_copy", "alias", "contiguous", "detach", "lift_fresh_copy"})
"""Operators behind which a tensor of positions is the same."""


def varying_axes(ctx: Context, positions: Any, ndim: int) -> list[int]:
    """The axes along which a tensor of positions is not known to repeat itself.

    Example: `i[:, None].expand(-1, 5)` varies along its first axis only, so every channel reads the same rows.
    """
    if not isinstance(positions, fx.Node):
        return list(range(ndim))
    if positions in ctx.known:
        value = narrow(ctx.known[positions])
        return [a + ndim - value.ndim for a, n in enumerate(value.shape) if n > 1]
    name = short_name(positions)
    if name in UNCHANGED:
        return varying_axes(ctx, positions.args[0], ndim)
    shape = _shape(positions)
    if name in ("expand", "expand_as", "broadcast_to"):
        source: Any = positions.args[0]
        shape = _shape(source)
        long = varying_axes(ctx, source, len(shape))
        return [a + ndim - len(shape) for a in long if shape[a] > 1]
    return [a + ndim - len(shape) for a, n in enumerate(shape) if n > 1]


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _by_position(ctx: Context, gauge: Gauge, axis: int, positions: Any) -> tuple[Field, ...]:
    """Fields of a tensor that is read or written along `axis` at places that data give, entry by entry.

    Where the places also vary along another axis (every channel reads other rows), that axis may not mix.
    """
    fields = ctx.store.constant_along(gauge.fields, (axis,), BY_DATA)
    varying = [a for a in varying_axes(ctx, positions, len(gauge.shape)) if a != axis]
    for f in fields:
        ctx.store.separate(f, varying)
    return fields


@rule("aten.index.Tensor")
def index(ctx: Context, x: Gauge, indices: Sequence[Gauge | None]) -> Gauge:
    given: Any = ctx.node.args[1]
    axes = [a for a, i in enumerate(indices) if i is not None]
    if all(node is None or node in ctx.known for node in given):
        known = [None if node is None else ctx.known[node] for node in given]
        if len(axes) > 1 or any(i is not None and i.dtype == torch.bool and i.ndim > 1 for i in known):
            ctx.store.singletons([f for f in x.fields if f.spans(range(axes[0], len(x.shape)))])
        return _read(ctx, x, lambda ids: torch.ops.aten.index.Tensor(ids, known))
    matrices = [f for f in x.fields if f.spans(axes) and len(f.spans(range(len(x.shape)))) > 1]
    if matrices and len(axes) == 1:
        stack = _matrices_by_data(ctx, x, axes[0], matrices, indices)
        if stack is not None:
            return stack
    blank = [None if i is None else torch.zeros(i.shape, dtype=torch.int64) for i in indices]
    fields = ctx.store.constant_along(x.fields, axes, BY_DATA)
    return ctx.out(on_ids(fields, x.shape, lambda ids: torch.ops.aten.index.Tensor(ids, blank)), zero=x.zero)


def _read(ctx: Context, x: Gauge, take: Callable[[Tensor], Tensor]) -> Gauge:
    """Entries at known places. What is read may no longer mix with what is not."""
    fields = on_ids(x.fields, x.shape, take)
    for before, after in zip(x.fields, fields, strict=True):
        separate_pieces(ctx, before, [after])
    return ctx.out(fields, zero=x.zero)


def _matrices_by_data(
    ctx: Context, x: Gauge, axis: int, matrices: Sequence[Field], indices: Sequence[Gauge | None]
) -> Gauge | None:
    """One matrix of a stack per position, None if there are fewer positions than matrices.

    Which matrix it is depends on data, but equally for everything that is indexed alike (the three weights of one
    expert), so stand-ins for the positions show what the matrices of one expert demand of each other.
    """
    shape = indices[axis].shape  # type: ignore[union-attr]
    positions = ctx.stand_in(prod(shape), x.shape[axis])
    if positions is None:
        return None
    chosen: list[Tensor | None] = [None] * axis + [positions.reshape(shape)]
    single = [f for f in x.fields if all(f is not m for m in matrices)]
    fields = (*matrices, *ctx.store.constant_along(single, (axis,), BY_DATA))
    moved = on_ids(fields, x.shape, lambda ids: torch.ops.aten.index.Tensor(ids, chosen))
    return ctx.out(moved, marks=frozenset({"stack"}))


@rule("aten.index_select")
def index_select(ctx: Context, x: Gauge, dim: int, _: Gauge) -> Gauge:
    positions = ctx.value_of(ctx.node.args[2])
    if positions is not None:
        return _read(ctx, x, lambda ids: torch.index_select(ids, dim, positions))
    fields = ctx.store.constant_along(x.fields, normal_axes(dim, len(x.shape)), BY_DATA)
    return ctx.out(fields, zero=x.zero)


@rule("aten.gather")
def gather(ctx: Context, x: Gauge, dim: int, _: Gauge, **__: Any) -> Gauge:
    (axis,) = normal_axes(dim, len(x.shape))
    positions = ctx.value_of(ctx.node.args[2])
    if positions is None:
        return ctx.out(_cut_to(_by_position(ctx, x, axis, ctx.node.args[2]), ctx.shape), zero=x.zero)
    varying = [a for a in varying_axes(ctx, ctx.node.args[2], len(x.shape)) if a != axis]
    for f in x.fields:
        ctx.store.separate(f, varying)
    return _read(ctx, x, lambda ids: torch.gather(ids, axis, positions))


@rule("aten.take_along_dim")
def take_along_dim(ctx: Context, x: Gauge, positions: Gauge, dim: int | None = None) -> Gauge:
    if dim is None:
        return take(ctx, x, positions)
    fields = _by_position(ctx, x, dim % len(x.shape), ctx.node.args[1])
    return ctx.out(fields, zero=x.zero)


@rule("aten.take")
def take(ctx: Context, x: Gauge, _: Gauge) -> Gauge:
    fields = ctx.store.constant_along(x.fields, range(len(x.shape)), BY_DATA)
    return ctx.out([Field(f.ids.reshape([1] * len(ctx.shape)), f.exponent) for f in fields], zero=x.zero)


def _cut_to(fields: Sequence[Field], shape: Sequence[int]) -> tuple[Field, ...]:
    """Fields of the first entries along every axis."""
    cut = tuple(slice(0, n) for n in shape)
    return tuple(Field(f.ids[cut], f.exponent) for f in fields)


@rule("aten.embedding")
def embedding(ctx: Context, weight: Gauge, ids: Gauge, *_: Any) -> Gauge:
    """Rows chosen by data: all must be scaled alike, but where every one goes straight into a norm of its own."""
    rows = [f for f in weight.fields if f.spans((0,)) and not f.spans((1,))]
    chosen = ctx.lookup(rows[0], ids.shape) if len(rows) == 1 else None
    left = weight.fields if chosen is None else [f for f in weight.fields if f is not rows[0]]
    fields = ctx.store.constant_along(left, (0,), BY_DATA)
    lead = [1] * len(ids.shape)
    columns = tuple(Field(f.ids.reshape(*lead, -1), f.exponent) for f in fields)
    return ctx.out(columns if chosen is None else (chosen, *columns))


MAXIMUM = 2
"""The number by which an embedding bag says that it takes the largest entry."""


@rule("aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(ctx: Context, weight: Gauge, ids: Gauge, offsets: Gauge, *options: Any) -> list[Gauge]:
    """The sum, mean or maximum of the rows of a bag; `options` are `scale_grad_by_freq, mode, sparse, row weights`."""
    mode = options[1] if len(options) > 1 else 0
    ctx.trivial([o for o in options if isinstance(o, Gauge)], why="weighs the rows of a bag")
    if mode == MAXIMUM:
        ctx.store.singletons(weight.fields)
    fields = ctx.store.constant_along(weight.fields, (0,), BY_DATA)
    return [ctx.out(fields), *(Gauge(shape or ()) for shape in ctx.shapes[1:])]


@rule("aten.index_add", "aten.index_copy", "aten.index_reduce")
def write_rows(ctx: Context, x: Gauge, dim: int, _: Gauge, source: Gauge, *reduce: Any, **__: Any) -> Gauge:
    axes = normal_axes(dim, len(x.shape))
    if reduce and not _keeps_scale(ctx, reduce[0], x, source):
        return ctx.out()
    own, other = (Gauge(g.shape, ctx.store.constant_along(g.fields, axes, BY_DATA), g.zero) for g in (x, source))
    return ctx.out(agree(ctx, own, other), zero=x.zero and source.zero)


@rule("aten.scatter_add", "aten.scatter.src", "aten.scatter.reduce", "aten.scatter_reduce")
def write_entries(ctx: Context, x: Gauge, dim: int, _: Gauge, source: Gauge, reduce: str = "", **more: Any) -> Gauge:
    axis = dim % len(x.shape)
    if not _keeps_scale(ctx, reduce or more.get("reduce", ""), x, source):
        return ctx.out()
    own, other = (Gauge(g.shape, _by_position(ctx, g, axis, ctx.node.args[2]), g.zero) for g in (x, source))
    return ctx.out(agree(ctx, own, other), zero=x.zero and source.zero)


def _keeps_scale(ctx: Context, reduce: str, x: Gauge, source: Gauge) -> bool:
    """Whether what is written together scales like each of it: yes for sums, means and extrema, no for products."""
    if reduce in ("prod", "multiply"):
        ctx.trivial(x, source, why="is multiplied up")
        return False
    if reduce in ("amax", "amin"):
        ctx.store.singletons([*x.fields, *source.fields])
    return True


@rule("aten.scatter.value", "aten.index_fill")
def fill_entries(ctx: Context, x: Gauge, dim: int, _: Gauge, value: Any, **__: Any) -> Gauge:
    if (is_number(value) and value == 0) or (isinstance(value, Gauge) and value.zero):
        positions = ctx.node.args[2] if short_name(ctx.node) == "scatter" else None
        fields = x.fields if positions is None else _by_position(ctx, x, dim % len(x.shape), positions)
        return ctx.out(ctx.store.constant_along(fields, normal_axes(dim, len(x.shape)), BY_DATA), zero=x.zero)
    ctx.trivial(x, value, why="is filled with a constant")
    return ctx.out()


@rule("aten.index_put")
def index_put(ctx: Context, x: Gauge, indices: Sequence[Gauge | None], source: Gauge, *_: Any) -> Gauge:
    axes, lead = _indexed(ctx.node.args[1])
    first, ndim = axes[0], len(x.shape)
    mask = indices[0]
    if (
        mask is not None
        and len(indices) == 1
        and len(mask.shape) == len(axes) > 1
        and max(source.shape, default=1) == 1
    ):
        return masked_fill(ctx, x, mask, Gauge((), (), source.zero))
    if axes != list(range(first, first + len(axes))):
        ctx.trivial(x, source)
        return ctx.out()
    there = range(first, first + lead)
    placed = aligned(source, ndim - len(axes) + lead)
    written = ctx.store.constant_along(placed, there, "is written at places given by data")
    ones = [1] * len(axes)
    laid = tuple(
        Field(f.ids.reshape([*f.ids.shape[:first], *ones, *f.ids.shape[first + lead :]]), f.exponent) for f in written
    )
    kept = ctx.store.constant_along(x.fields, axes, BY_DATA)
    fields = agree(ctx, Gauge(x.shape, kept, x.zero), Gauge(x.shape, laid, source.zero))
    return ctx.out(fields, zero=x.zero and source.zero)


def _indexed(positions: Any) -> tuple[list[int], int]:
    """The axes that tensors of positions index, and how many axes they take in what is read or written.

    A mask of several axes indexes them all, and takes one axis of as many entries as it is true.
    """
    axes: list[int] = []
    count, lead = 0, 0
    for node in positions:
        if node is None:
            count += 1
            continue
        mask = node.meta["val"].dtype == torch.bool
        width = len(_shape(node))
        axes += range(count, count + (width if mask else 1))
        count = axes[-1] + 1
        lead = max(lead, 1 if mask else width)
    return axes, lead
