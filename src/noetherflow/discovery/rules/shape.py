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


@rule("aten.slice.Tensor", "aten.select.int", "aten.narrow", "aten.diagonal", "aten.unfold")
def pick(ctx: Context, x: Gauge, *args: Any, **kwargs: Any) -> Gauge:
    target: Any = ctx.node.target
    fields = on_ids(x.fields, x.shape, lambda ids: target(ids, *args, **kwargs))
    for before, after in zip(x.fields, fields, strict=True):
        _separate_pieces(ctx, before, [after])
    return ctx.out(fields, zero=x.zero, marks=_kept(x))


@rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.tensor_split")
def split(ctx: Context, x: Gauge, *args: Any, **kwargs: Any) -> list[Gauge]:
    target: Any = ctx.node.target
    pieces: list[list[Field]] = [[] for _ in ctx.shapes]
    for f in x.fields:
        after = [Field(narrow(p), f.exponent) for p in target(f.ids.expand(*x.shape), *args, **kwargs)]
        _separate_pieces(ctx, f, after)
        for piece, g in zip(pieces, after, strict=True):
            piece.append(g)
    return [
        Gauge(shape or (), ctx.store.simplify(piece), zero=x.zero, marks=_kept(x))
        for shape, piece in zip(ctx.shapes, pieces, strict=True)
    ]


def _separate_pieces(ctx: Context, before: Field, after: Sequence[Field]) -> None:
    """Coordinates that go into different pieces may not mix."""
    atoms = before.ids.reshape(-1).numpy()
    labels = np.zeros(atoms.size, dtype=np.int64)
    for k, piece in enumerate(after):
        labels += (k + 1) * np.isin(atoms, np.unique(piece.ids.numpy()))
    if labels.size and bool((labels != labels[0]).any()):
        ctx.store.refine(before, torch.from_numpy(labels).reshape(before.ids.shape))


@rule("aten.cat", "aten.concat")
def cat(ctx: Context, tensors: Sequence[Gauge], dim: int = 0) -> Gauge:
    parts = [t for t in tensors if t.shape != (0,)]
    return ctx.out(_joined(ctx, parts, dim % len(ctx.shape)), zero=all(t.zero for t in parts))


@rule("aten.stack")
def stack(ctx: Context, tensors: Sequence[Gauge], dim: int = 0) -> Gauge:
    axis = dim % len(ctx.shape)
    raised = [
        Gauge(
            (*t.shape[:axis], 1, *t.shape[axis:]),
            tuple(Field(f.ids.unsqueeze(axis), f.exponent) for f in t.fields),
            t.zero,
        )
        for t in tensors
    ]
    return ctx.out(_joined(ctx, raised, axis), zero=all(t.zero for t in raised))


def _joined(ctx: Context, parts: Sequence[Gauge], axis: int) -> list[Field]:
    """Fields of a concatenation: slot by slot for every exponent, free atoms for zeros, atom 0 where there is none."""
    spanned = {a for t in parts for f in t.fields for a in f.spans(range(len(t.shape)))}
    exponents = dict.fromkeys(f.exponent for t in parts for f in t.fields)
    out = []
    for order, exponent in enumerate(exponents):
        columns = [[f.ids for f in t.fields if f.exponent == exponent] for t in parts]
        for slot in range(max(len(c) for c in columns)):
            pieces = []
            for t, column in zip(parts, columns, strict=True):
                sizes = [n if a == axis or a in spanned else 1 for a, n in enumerate(t.shape)]
                if t.zero and order == slot == 0:
                    ids = ctx.store.wildcard(tuple(sizes)).ids
                else:
                    ids = column[slot] if slot < len(column) else torch.zeros([1] * len(sizes), dtype=torch.int64)
                pieces.append(ids.expand(*sizes))
            out.append(Field(narrow(torch.cat(pieces, axis)), exponent))
    return out


@rule("aten.constant_pad_nd", "aten.pad")
def pad(ctx: Context, x: Gauge, widths: Sequence[int], *args: Any, value: Any = 0) -> Gauge:
    fill = args[-1] if args and not isinstance(args[-1], str) else value
    mode = args[0] if args and isinstance(args[0], str) else "constant"
    if mode != "constant":
        return _spatial(ctx, x, len(widths) // 2)
    if fill not in (0, 0.0, None):
        ctx.trivial(x)
        return ctx.out()
    current, shape = x, list(x.shape)
    for k in range(len(widths) // 2):
        axis = len(x.shape) - 1 - k
        pieces: list[Gauge] = []
        for width, piece in ((widths[2 * k], None), (0, current), (widths[2 * k + 1], None)):
            if piece is not None:
                pieces.append(piece)
            elif width > 0:
                pieces.append(Gauge(tuple(width if a == axis else n for a, n in enumerate(shape)), zero=True))
        shape[axis] += widths[2 * k] + widths[2 * k + 1]
        if min(widths[2 * k : 2 * k + 2]) < 0:
            ctx.trivial(x)
            return ctx.out()
        if any(f.spans([axis]) for f in current.fields):
            current = Gauge(tuple(shape), tuple(_joined(ctx, pieces, axis)))
        else:
            current = Gauge(tuple(shape), current.fields)
    return ctx.out(current.fields, zero=x.zero)


@rule("aten.reflection_pad1d", "aten.reflection_pad2d", "aten.replication_pad1d", "aten.replication_pad2d")
def border_pad(ctx: Context, x: Gauge, widths: Sequence[int]) -> Gauge:
    return _spatial(ctx, x, len(widths) // 2)


def _spatial(ctx: Context, x: Gauge, count: int) -> Gauge:
    axes = range(len(x.shape) - count, len(x.shape))
    return ctx.out(ctx.store.constant_along(x.fields, list(axes), "pads"))


@rule("aten.index.Tensor")
def index(ctx: Context, x: Gauge, indices: Sequence[Gauge | None]) -> Gauge:
    axes = [a for a, i in enumerate(indices) if i is not None]
    blank: list[Tensor | None] = [None if i is None else torch.zeros(i.shape, dtype=torch.int64) for i in indices]
    matrices = [f for f in x.fields if f.spans(axes) and len(f.spans(range(len(x.shape)))) > 1]
    chosen = indices[axes[0]]
    if matrices and len(axes) == 1 and chosen is not None:
        # One matrix of a stack per position: which one depends on data, but equally for everything indexed alike.
        positions = ctx.stand_in(int(np.prod(chosen.shape)), x.shape[axes[0]])
        if positions is not None:
            blank[axes[0]] = positions.reshape(chosen.shape)
            single = [f for f in x.fields if f not in matrices]
            fields = (*matrices, *ctx.store.constant_along(single, axes, "is indexed by data"))
            moved = on_ids(fields, x.shape, lambda ids: torch.ops.aten.index.Tensor(ids, blank))
            return ctx.out(moved, marks=frozenset({"stack"}))
    fields = ctx.store.constant_along(x.fields, axes, "is indexed by data")
    return ctx.out(on_ids(fields, x.shape, lambda ids: torch.ops.aten.index.Tensor(ids, blank)), zero=x.zero)


@rule("aten.index_select", "aten.gather", "aten.take_along_dim")
def lookup(ctx: Context, x: Gauge, dim: int, _: Gauge, **__: Any) -> Gauge:
    fields = ctx.store.constant_along(x.fields, normal_axes(dim, len(x.shape)), "is indexed by data")
    cut = tuple(slice(0, n) for n in ctx.shape)
    return ctx.out(tuple(Field(f.ids[cut], f.exponent) for f in fields), zero=x.zero)


@rule("aten.embedding")
def embedding(ctx: Context, weight: Gauge, ids: Gauge, *_: Any) -> Gauge:
    fields = ctx.store.constant_along(weight.fields, (0,), "is indexed by data")
    lead = [1] * len(ids.shape)
    return ctx.out(tuple(Field(f.ids.reshape(*lead, -1), f.exponent) for f in fields))


@rule("aten.index_add", "aten.index_copy", "aten.scatter_add", "aten.scatter.src")
def write_along(ctx: Context, x: Gauge, dim: int, _: Gauge, source: Gauge, **__: Any) -> Gauge:
    axes = normal_axes(dim, len(x.shape))
    own, other = (
        Gauge(g.shape, ctx.store.constant_along(g.fields, axes, "is indexed by data"), g.zero) for g in (x, source)
    )
    return ctx.out(agree(ctx, own, other), zero=x.zero and source.zero)


@rule("aten.index_put")
def index_put(ctx: Context, x: Gauge, indices: Sequence[Gauge | None], source: Gauge, *_: Any) -> Gauge:
    axes = [a for a, i in enumerate(indices) if i is not None]
    known = [i.shape for i in indices if i is not None]
    rest = x.shape[len(axes) :]
    if axes != list(range(len(axes))) or (rest and source.shape[-len(rest) :] != rest):
        ctx.trivial(x, source)
        return ctx.out()
    lead = len(torch.broadcast_shapes(*known))
    written = ctx.store.constant_along(
        aligned(source, lead + len(rest)), list(range(lead)), "is written at places given by data"
    )
    tail = tuple(Field(f.ids.reshape([1] * len(axes) + list(f.ids.shape[lead:])), f.exponent) for f in written)
    kept = ctx.store.constant_along(x.fields, axes, "is indexed by data")
    return ctx.out(agree(ctx, Gauge(x.shape, kept, x.zero), Gauge(x.shape, tail, source.zero)))


def agree(ctx: Context, x: Gauge, y: Gauge, why: str = "is added") -> tuple[Field, ...]:
    """Two tensors of one number of axes that must transform alike; zeros fit anything. The common fields."""
    if x.zero or y.zero:
        return y.fields if x.zero else x.fields
    ctx.store.equal(x.fields, y.fields, why)
    a, b = ctx.store.simplify(x.fields), ctx.store.simplify(y.fields)
    size: Callable[[tuple[Field, ...]], tuple[int, int]] = lambda fs: (len(fs), sum(f.ids.numel() for f in fs))
    return min(a, b, key=size)
