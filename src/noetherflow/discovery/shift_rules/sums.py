"""Sums, scalings and reductions, which pass shifts on; what is added up may cancel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from noetherflow.discovery.rules.base import is_number, normal_axes, short_name
from noetherflow.discovery.shift_rules.base import ShiftContext, Shifted, shift_rule
from noetherflow.discovery.shift_store import ShiftTerm, TranslationFamily

HIDDEN = -1e30
"""A constant below this in front of a softmax hides an entry, whatever shift the others have."""


@shift_rule("aten.add", "aten.sub", "aten.rsub")
def add(ctx: ShiftContext, x: Any, y: Any, *, alpha: Any = 1) -> Shifted:
    """`x + alpha * y` (`sub`: minus), `y - alpha * x` (`rsub`)."""
    name, n = short_name(ctx.node), len(ctx.shape)
    first, second = (y, x) if name == "rsub" else (x, y)
    factor = float(alpha) if name == "add" else -float(alpha)
    left = [t.aligned(n) for t in first.terms] if isinstance(first, Shifted) else []
    right = [t.aligned(n) for t in second.terms] if isinstance(second, Shifted) else []
    return ctx.out(_cancelled(ctx, [*left, *(replace(t, scale=factor * t.scale) for t in right)]))


def _cancelled(ctx: ShiftContext, terms: Sequence[ShiftTerm]) -> list[ShiftTerm]:
    """Terms that are one shift added up; those that add up to nothing are absorbed.

    So `x - x.mean(-1, keepdim=True)`, the beginning of a layer norm written by hand, takes out what is equal along the
    last axis: both carry the same shift, once with scale 1 and once with scale -1.
    """
    out: list[ShiftTerm] = []
    for t in terms:
        k = next((k for k, other in enumerate(out) if _one_shift(ctx, t, other)), None)
        if k is None:
            out.append(t)
            continue
        other = out.pop(k)
        shorter = min(t, other, key=lambda term: term.label.numel())
        family: TranslationFamily = "null" if "null" in (t.family, other.family) else "translation"
        total = replace(shorter, scale=t.scale + other.scale, family=family)
        if abs(total.scale) < 1e-9:
            ctx.store.absorbed([total])
        else:
            out.append(total)
    return out


def _one_shift(ctx: ShiftContext, a: ShiftTerm, b: ShiftTerm) -> bool:
    return a.source == b.source and torch.equal(a.value, b.value) and ctx.store.same(a.label, b.label)


@shift_rule("aten.neg")
def negate(ctx: ShiftContext, x: Shifted) -> Shifted:
    return ctx.out(replace(t, scale=-t.scale) for t in x.terms)


@shift_rule("aten.mul", "aten.div")
def scale(ctx: ShiftContext, x: Any, y: Any, **mode: Any) -> Shifted:
    """A factor without shifts; along axes on which it varies, the amounts are all different afterwards."""
    if is_number(x):
        x, y = y, x
    divides = short_name(ctx.node) == "div"
    if mode.get("rounding_mode") or (divides and (is_number(ctx.node.args[0]) or (isinstance(y, Shifted) and y.terms))):
        return ctx.kill(x, y)
    if is_number(y):
        return ctx.out(replace(t, scale=t.scale / y if divides else t.scale * y) for t in x.terms)
    if x.terms and y.terms:
        return ctx.kill(x, y)
    moved, factor = (x, y) if x.terms else (y, x)
    n = len(ctx.shape)
    long = [1] * (n - factor.ndim) + list(factor.shape)
    return ctx.out(t for t in (_varied(ctx, term.aligned(n), long) for term in moved.terms) if t is not None)


def _varied(ctx: ShiftContext, t: ShiftTerm, long: Sequence[int]) -> ShiftTerm | None:
    """The term after a factor of shape `long` that is not known; None (killed) if no axis is left to be equal along."""
    sizes = [full if a > 1 or b > 1 else 1 for a, b, full in zip(t.value.shape, long, ctx.shape, strict=True)]
    if all(n > 1 or full == 1 for n, full in zip(sizes, ctx.shape, strict=True)):
        ctx.store.kill([t])
        return None
    return ShiftTerm(t.label, torch.arange(math.prod(sizes)).reshape(sizes), ctx.store.source(), 1.0, t.family)


@shift_rule("aten.ldexp")
def ldexp(ctx: ShiftContext, x: Shifted, exponent: Shifted) -> Shifted:
    """As a product with a factor that is not known; a shift of the exponent is none of the output."""
    ctx.kill(exponent)
    long = [1] * (len(ctx.shape) - exponent.ndim) + list(exponent.shape)
    terms = (_varied(ctx, term.aligned(len(ctx.shape)), long) for term in x.terms)
    return ctx.out(t for t in terms if t is not None)


@shift_rule("aten.masked_fill")
def masked_fill(ctx: ShiftContext, x: Shifted, mask: Any, value: Any) -> Shifted:
    if is_number(value) and value < HIDDEN:
        return ctx.out(t.aligned(len(ctx.shape)) for t in x.terms)
    return ctx.kill(x, mask, value)


@shift_rule("aten.where")
def where(ctx: ShiftContext, condition: Any, x: Any, y: Any) -> Shifted:
    if is_number(y) and y < HIDDEN and isinstance(x, Shifted):
        return ctx.out(t.aligned(len(ctx.shape)) for t in x.terms)
    return ctx.kill(condition, x, y)


@shift_rule("aten.mean", "aten.sum")
def mean(ctx: ShiftContext, x: Shifted, dim: Any = None, keepdim: bool = False, **_: Any) -> Shifted:
    axes = normal_axes(dim, x.ndim)
    count = math.prod(x.shape[a] for a in axes) if short_name(ctx.node) == "sum" else 1
    out = []
    for t in x.terms:
        family: TranslationFamily = "null"
        term = ctx.store.unite(t, axes) if t.uniform(axes) else _averaged(ctx, t, axes)
        if term is not None:
            out.append(replace(_reduced(term, axes, keepdim), scale=term.scale * count, family=family))
    return ctx.out(out)


def _averaged(ctx: ShiftContext, t: ShiftTerm, axes: Sequence[int]) -> ShiftTerm | None:
    """The mean of different amounts: equal along the axes along which the amounts were, different along the others."""
    sizes = [1 if a in axes else n for a, n in enumerate(t.value.shape)]
    label = ctx.store.grouped(t, axes)
    return ShiftTerm(label, torch.arange(math.prod(sizes)).reshape(sizes), ctx.store.source(), 1.0, t.family)


def _reduced(t: ShiftTerm, axes: Sequence[int], keepdim: bool) -> ShiftTerm:
    """The term without `axes`, on which it has size 1."""
    if keepdim:
        return t
    keep = [a for a in range(t.label.ndim) if a not in axes]
    label, value = (ids.reshape([ids.shape[a] for a in keep]) for ids in (t.label, t.value))
    return replace(t, label=label, value=value)


@shift_rule("aten.amax", "aten.amin", "aten.logsumexp", "aten.max.dim", "aten.min.dim", "aten.median.dim")
def extremum(ctx: ShiftContext, x: Shifted, dim: Any = None, keepdim: bool = False) -> Shifted | list[Shifted]:
    """The largest of entries that all move alike moves like them."""
    axes = normal_axes(dim, x.ndim)
    return ctx.first_or_all(_reduced(t, axes, keepdim) for t in ctx.united(x, axes))


@shift_rule("aten.topk")
def topk(ctx: ShiftContext, x: Shifted, k: int, dim: int = -1, *_: Any, **__: Any) -> list[Shifted]:
    """The same entries are chosen if all move alike."""
    return ctx.outs(ctx.united(x, normal_axes(dim, x.ndim)))


@shift_rule("aten.sort")
def sort(ctx: ShiftContext, x: Shifted, dim: int = -1, *_: Any, **__: Any) -> list[Shifted]:
    return ctx.outs(ctx.united(x, normal_axes(dim, x.ndim)))


@shift_rule("aten.argmax", "aten.argmin", "aten.argsort")
def position(ctx: ShiftContext, x: Shifted, dim: Any = None, *_: Any, **__: Any) -> Shifted:
    """Positions do not move as long as all entries move alike."""
    ctx.united(x, normal_axes(dim, x.ndim))
    return ctx.out()


def _pools(*kinds: str) -> tuple[str, ...]:
    return tuple(f"aten.{kind}_pool{n}d" for kind in kinds for n in (1, 2, 3))


@shift_rule(*_pools("avg", "adaptive_avg", "_adaptive_avg", "max", "adaptive_max"))
@shift_rule(*(f"aten.max_pool{n}d_with_indices" for n in (1, 2, 3)))
def pool(ctx: ShiftContext, x: Shifted, *args: Any, **_: Any) -> Shifted | list[Shifted]:
    """A shift that is equal over space stays; one that varies is averaged (average pools) or killed (maximum).

    With zeros padded into the averages the shift is no longer equal at the border.
    """
    name = str(ctx.node.target)
    count = int(name.split("pool")[1][0])
    space = tuple(range(x.ndim - count, x.ndim))
    pads = any(p for p in (args[2] if isinstance(args[2], (list, tuple)) else [args[2]])) if len(args) > 2 else False
    out = []
    for t in x.terms:
        if t.uniform(space) and not (pads and "avg" in name):
            united = ctx.store.unite(t, space)
            out += [] if united is None else [united]
        elif "avg" in name:
            sizes = [ctx.shape[a] if n > 1 or a in space else 1 for a, n in enumerate(t.value.shape)]
            value = torch.arange(math.prod(sizes)).reshape(sizes)
            out.append(ShiftTerm(ctx.store.grouped(t, space), value, ctx.store.source(), 1.0, t.family))
        else:
            ctx.store.kill([t])
    return ctx.first_or_all(out)
