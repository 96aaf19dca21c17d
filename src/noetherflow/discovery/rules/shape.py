"""Operators that re-index: they are run on the atoms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.discovery.gauges import Field, Gauge, narrow
from noetherflow.discovery.rules.base import KEPT, Context, aligned, normal_axes, on_ids, reshaped, rule


def _kept(gauge: Gauge) -> frozenset[str]:
    return gauge.marks & KEPT


@rule("aten.view", "aten._unsafe_view", "aten.reshape", "aten.flatten", "aten.unflatten")
def reshape(ctx: Context, x: Gauge, *_: Any) -> Gauge:
    return ctx.out(reshaped(x.fields, x.shape, ctx.shape), zero=x.zero, marks=_kept(x))


@rule(
    "aten.permute",
    "aten.transpose",
    "aten.t",
    "aten.expand",
    "aten.squeeze",
    "aten.unsqueeze",
    "aten.flip",
    "aten.roll",
    "aten.repeat",
    "aten.tile",
    "aten.rot90",
    "aten.repeat_interleave.self_int",
    "aten.movedim",
    "aten.swapaxes",
    "aten.pixel_shuffle",
    "aten.pixel_unshuffle",
    "aten.channel_shuffle",
    "aten.broadcast_to",
    "aten.expand_as",
)
def rearrange(ctx: Context, x: Gauge, *args: Any, **kwargs: Any) -> Gauge:
    rest = [torch.empty(a.shape, device="meta") if isinstance(a, Gauge) else a for a in args]
    target: Any = ctx.node.target
    fields = on_ids(x.fields, x.shape, lambda ids: target(ids, *rest, **kwargs))
    return ctx.out(fields, zero=x.zero, marks=_kept(x))


@rule("aten.slice.Tensor", "aten.select.int", "aten.narrow", "aten.unfold")
def pick(ctx: Context, x: Gauge, *args: Any, **kwargs: Any) -> Gauge:
    target: Any = ctx.node.target
    fields = on_ids(x.fields, x.shape, lambda ids: target(ids, *args, **kwargs))
    for before, after in zip(x.fields, fields, strict=True):
        separate_pieces(ctx, before, [after])
    return ctx.out(fields, zero=x.zero, marks=_kept(x))


@rule("aten.diagonal", "aten.diagonal_copy")
def diagonal(ctx: Context, x: Gauge, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Gauge:
    return diagonal_of(ctx, x, offset, dim1, dim2)


def diagonal_of(ctx: Context, x: Gauge, offset: int, dim1: int, dim2: int) -> Gauge:
    """The diagonal of two axes. A matrix that mixes rows takes entries off the diagonal onto it, so none may."""
    axes = normal_axes([dim1, dim2], len(x.shape))
    ctx.store.singletons([f for f in x.fields if f.spans(axes)])
    take: Callable[[Tensor], Tensor] = lambda ids: torch.diagonal(ids, offset, dim1, dim2)
    shape = take(torch.empty(x.shape, device="meta")).shape
    fields = ctx.store.simplify(on_ids(x.fields, x.shape, take))
    return Gauge(tuple(shape), fields, x.zero, x.marks & (KEPT | {"data"}))


@rule("aten.split", "aten.split_with_sizes", "aten.unsafe_split", "aten.chunk", "aten.unbind", "aten.tensor_split")
def split(ctx: Context, x: Gauge, *args: Any, **kwargs: Any) -> list[Gauge]:
    target: Any = ctx.node.target
    pieces: list[list[Field]] = [[] for _ in ctx.shapes]
    for f in x.fields:
        after = [Field(narrow(p), f.exponent) for p in target(f.ids.expand(tuple(x.shape)), *args, **kwargs)]
        separate_pieces(ctx, f, after)
        for piece, g in zip(pieces, after, strict=True):
            piece.append(g)
    return [
        Gauge(shape or (), ctx.store.simplify(piece), zero=x.zero, marks=_kept(x))
        for shape, piece in zip(ctx.shapes, pieces, strict=True)
    ]


def separate_pieces(ctx: Context, before: Field, after: Sequence[Field]) -> None:
    """Coordinates that go into different pieces may not mix."""
    atoms = before.ids.reshape(-1).numpy()
    labels = np.zeros(atoms.size, dtype=np.int64)
    for k, piece in enumerate(after):
        labels += (k + 1) * np.isin(atoms, np.unique(piece.ids.numpy()))
    if labels.size and bool((labels != labels[0]).any()):
        ctx.store.refine(before, torch.from_numpy(labels).reshape(before.ids.shape))


@rule("aten.cat", "aten.concat")
def cat(ctx: Context, tensors: Sequence[Gauge], dim: int = 0) -> Gauge:
    axis = dim % len(ctx.shape)
    parts = [t for t in tensors if t.shape != (0,)]  # torch lets an empty vector be joined to anything
    fields = joined(ctx, parts, {axis}, lambda pieces: torch.cat(list(pieces), axis))
    return ctx.out(fields, zero=all(t.zero for t in parts))


@rule("aten.stack")
def stack(ctx: Context, tensors: Sequence[Gauge], dim: int = 0) -> Gauge:
    return cat(ctx, [raised(t, dim % len(ctx.shape)) for t in tensors], dim)


def raised(gauge: Gauge, axis: int) -> Gauge:
    """A tensor with a new axis of length 1 (`unsqueeze`)."""
    shape = (*gauge.shape[:axis], 1, *gauge.shape[axis:])
    return Gauge(shape, tuple(Field(f.ids.unsqueeze(axis), f.exponent) for f in gauge.fields), gauge.zero)


def joined(
    ctx: Context, parts: Sequence[Gauge], axes: set[int], arrange: Callable[[Sequence[Tensor]], Tensor]
) -> list[Field]:
    """Fields of a tensor that is put together from parts with equally many axes.

    The parts are paired field by field: for `cat((a, b))` the first field of `a` stands beside the first field of `b`.
    A part with fewer fields is filled up with atom 0 (it stays as it is), a part of zeros with free atoms (it fits
    whatever the others do).

    Args:
        ctx: The operator.
        parts: The tensors that are put together.
        axes: The axes along which `arrange` needs the parts in full length.
        arrange: The operator itself, run on one tensor of atoms per part.

    Returns:
        The fields of the result.
    """
    long = {*axes, *(a for t in parts for f in t.fields for a in f.spans(range(t.ndim)))}
    out: list[Field] = []
    for exponent in dict.fromkeys(f.exponent for t in parts for f in t.fields):
        columns = [[f.ids for f in t.fields if f.exponent == exponent] for t in parts]
        for slot in range(max(len(column) for column in columns)):
            free = not out
            pieces = [
                _piece(ctx, t, column[slot : slot + 1], long, free) for t, column in zip(parts, columns, strict=True)
            ]
            out.append(Field(narrow(arrange(pieces)), exponent))
    return out


def _piece(ctx: Context, part: Gauge, found: Sequence[Tensor], long: set[int], free: bool) -> Tensor:
    """The atoms of one part in full length along the `long` axes; new ones for zeros if they are to be `free`."""
    sizes = [n if a in long else 1 for a, n in enumerate(part.shape)]
    if part.zero and free:
        return ctx.store.wildcard(tuple(sizes)).ids
    ids = found[0] if found else torch.zeros([1] * len(sizes), dtype=torch.int64)
    return ids.expand(tuple(sizes))


@rule("aten.slice_scatter")
def slice_scatter(ctx: Context, x: Gauge, source: Gauge, dim: int = 0, *where: Any) -> Gauge:
    axis = dim % len(x.shape)
    positions = torch.arange(x.shape[axis])
    written = torch.isin(positions, torch.ops.aten.slice.Tensor(positions, 0, *where))
    kept = [f for f in x.fields if f.spans([axis])]
    for f in kept:
        separate_pieces(ctx, f, [Field(f.ids.index_select(axis, positions[~written]), f.exponent)])
    fields = joined(ctx, (x, source), {axis}, lambda pieces: torch.slice_scatter(pieces[0], pieces[1], axis, *where))
    return ctx.out(fields, zero=x.zero and source.zero)


@rule("aten.select_scatter")
def select_scatter(ctx: Context, x: Gauge, source: Gauge, dim: int, index: int) -> Gauge:
    axis = dim % len(x.shape)
    start = index % x.shape[axis]
    return slice_scatter(ctx, x, raised(source, axis), axis, start, start + 1)


@rule("aten.diagonal_scatter")
def diagonal_scatter(ctx: Context, x: Gauge, source: Gauge, *where: int) -> Gauge:
    ctx.store.singletons([*x.fields, *source.fields])
    target: Any = ctx.node.target
    blank = torch.zeros(x.shape, dtype=torch.int64)
    placed = [Field(target(blank, f.ids.expand(tuple(source.shape)), *where), f.exponent) for f in source.fields]
    written = target(blank, torch.ones(source.shape, dtype=torch.int64), *where).bool()
    parts = (x, Gauge(x.shape, tuple(placed), source.zero))
    fields = joined(ctx, parts, set(range(len(x.shape))), lambda pieces: torch.where(written, pieces[1], pieces[0]))
    return ctx.out(fields, zero=x.zero and source.zero)


@rule("aten.diag_embed")
def diag_embed(ctx: Context, x: Gauge, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Gauge:
    """A vector on the diagonal of a matrix; what is off the diagonal is zero and fits anything.

    The matrix `D` of a vector `d` may go to `diag(r) D diag(d / r)` with any `r`, so its rows get atoms of their own.
    A constant in `r` cancels; the first entry of `r` is set to 1.
    """
    n = len(ctx.shape)
    if offset or (dim1 % n, dim2 % n) != (n - 2, n - 1):
        ctx.trivial(x)
        return ctx.out()
    ctx.store.singletons(x.fields)
    width = ctx.shape[-1]
    start = ctx.store.fresh(width - 1)
    free = torch.cat((torch.zeros(1, dtype=torch.int64), torch.arange(start, start + width - 1)))
    lead = [1] * (n - 2)
    rows, columns = Field(free.reshape(*lead, width, 1), 1.0), Field(free.reshape(*lead, 1, width), -1.0)
    return ctx.out([rows, columns, *(Field(f.ids.unsqueeze(-2), f.exponent) for f in x.fields)])


@rule("aten.copy")
def copy(ctx: Context, _: Gauge, source: Gauge, *__: Any) -> Gauge:
    return ctx.out(aligned(source, len(ctx.shape)), zero=source.zero, marks=_kept(source))


@rule("aten.empty_like", "aten.new_empty", "aten.new_empty_strided", "aten.zeros_like", "aten.new_zeros", "aten.zero")
@rule("aten.zeros", "aten.empty", "aten.empty_permuted", "aten.empty_strided")
def zeros(ctx: Context, *_: Any, **__: Any) -> Gauge:
    """A tensor of zeros, or one whose content is still to be written."""
    return ctx.out(zero=True)


@rule("aten.constant_pad_nd", "aten.pad")
def pad(ctx: Context, x: Gauge, widths: Sequence[int], *args: Any, value: Any = 0) -> Gauge:
    fill = args[-1] if args and not isinstance(args[-1], str) else value
    mode = args[0] if args and isinstance(args[0], str) else "constant"
    if mode != "constant":
        return _spatial(ctx, x, len(widths) // 2)
    if fill not in (0, 0.0, None):
        ctx.trivial(x)
        return ctx.out()
    current = x
    for k in range(len(widths) // 2):
        current = _padded(ctx, current, len(x.shape) - 1 - k, widths[2 * k], widths[2 * k + 1])
    return ctx.out(current.fields, zero=x.zero)


def _padded(ctx: Context, x: Gauge, axis: int, before: int, after: int) -> Gauge:
    """Zeros added at both ends of one axis, or entries cut off where a width is negative."""
    first, last = max(-before, 0), x.shape[axis] - max(-after, 0)
    inner = _cut(ctx, x, axis, first, last)
    lengths = (max(before, 0), last - first, max(after, 0))
    shapes = [tuple(width if a == axis else n for a, n in enumerate(x.shape)) for width in lengths]
    shape = tuple(sum(lengths) if a == axis else n for a, n in enumerate(x.shape))
    if not any(f.spans([axis]) for f in inner.fields):
        return Gauge(shape, inner.fields, x.zero)
    ends = (Gauge(shapes[0], zero=True), inner, Gauge(shapes[2], zero=True))
    parts = [part for part, length in zip(ends, lengths, strict=True) if length]
    return Gauge(shape, tuple(joined(ctx, parts, {axis}, lambda pieces: torch.cat(list(pieces), axis))), x.zero)


def _cut(ctx: Context, x: Gauge, axis: int, first: int, last: int) -> Gauge:
    """The entries `first .. last` along one axis; they may no longer mix with those that are cut off."""
    shape = tuple(last - first if a == axis else n for a, n in enumerate(x.shape))
    if shape == x.shape:
        return x
    fields = []
    for f in x.fields:
        kept = Field(f.ids.narrow(axis, first, last - first), f.exponent) if f.spans([axis]) else f
        separate_pieces(ctx, f, [kept])
        fields.append(kept)
    return Gauge(shape, tuple(fields), x.zero)


@rule("aten.reflection_pad1d", "aten.reflection_pad2d", "aten.replication_pad1d", "aten.replication_pad2d")
def border_pad(ctx: Context, x: Gauge, widths: Sequence[int]) -> Gauge:
    return _spatial(ctx, x, len(widths) // 2)


def _spatial(ctx: Context, x: Gauge, count: int) -> Gauge:
    axes = range(len(x.shape) - count, len(x.shape))
    return ctx.out(ctx.store.constant_along(x.fields, list(axes), "pads"))


def agree(ctx: Context, x: Gauge, y: Gauge, why: str = "is added") -> tuple[Field, ...]:
    """Two tensors of one number of axes that must transform alike; zeros fit anything. The common fields."""
    if x.zero or y.zero:
        return y.fields if x.zero else x.fields
    ctx.store.equal(x.fields, y.fields, why)
    a, b = ctx.store.simplify(x.fields), ctx.store.simplify(y.fields)
    size: Callable[[tuple[Field, ...]], tuple[int, int]] = lambda fs: (len(fs), sum(f.ids.numel() for f in fs))
    return min(a, b, key=size)
