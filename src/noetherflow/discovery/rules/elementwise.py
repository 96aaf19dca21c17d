"""Entry-wise operators: sums, products, powers, positively homogeneous and all other functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from noetherflow.discovery.gauges import Field, Gauge
from noetherflow.discovery.rules.base import KEPT, Context, aligned, is_number, rule, short_name
from noetherflow.discovery.rules.shape import agree

SMALL = 1e-2
"""A constant added in front of a root or a division counts as a normalisation's eps up to this size."""


@rule(
    "aten.clone",
    "aten.detach",
    "aten.alias",
    "aten.contiguous",
    "aten._to_copy",
    "aten.to",
    "aten.lift_fresh",
    "aten.lift_fresh_copy",
    "aten.nan_to_num",
    "aten.type_as",
    "aten.neg",
    "aten.positive",
    "aten.view_of",
    "aten.real",
    "aten.conj",
    "aten._conj",
)
def identity(ctx: Context, x: Gauge, *_: Any, **__: Any) -> Gauge:
    return ctx.out(x.fields, zero=x.zero, marks=x.marks & KEPT)


@rule("aten.dropout", "aten.feature_dropout")
def dropout(ctx: Context, x: Gauge, p: float = 0.5, train: bool = False) -> Gauge:
    if train and p > 0:
        ctx.store.singletons(x.fields)
    return identity(ctx, x)


@rule("aten.alpha_dropout", "aten.feature_alpha_dropout")
def alpha_dropout(ctx: Context, x: Gauge, p: float = 0.5, train: bool = False) -> Gauge:
    """What it drops it sets to a constant that is not zero."""
    if train and p > 0:
        ctx.trivial(x)
        return ctx.out()
    return identity(ctx, x)


@rule("aten.native_dropout")
def native_dropout(ctx: Context, x: Gauge, p: float, train: bool = True) -> list[Gauge]:
    kept = dropout(ctx, x, p, train)
    return [kept, Gauge(kept.shape)]


@rule("aten.relu", "aten.leaky_relu", "aten.abs", "aten.relu_", "aten.rrelu")
def homogeneous(ctx: Context, x: Gauge, *_: Any, **__: Any) -> Gauge:
    ctx.store.singletons(x.fields)
    ctx.store.tag(x.fields, "relu")
    return ctx.out(x.fields, zero=x.zero)


@rule("aten.prelu", "aten._prelu_kernel")
def prelu(ctx: Context, x: Gauge, slope: Gauge) -> Gauge:
    ctx.trivial(slope, why="is a slope")
    return homogeneous(ctx, x)


@rule("aten.clamp", "aten.clamp_min", "aten.clamp_max", "aten.threshold", "aten.clip")
def clamp(ctx: Context, x: Gauge, low: Any = None, high: Any = None, **named: Any) -> Gauge:
    name = short_name(ctx.node)
    low, high = named.get("min", low), named.get("max", high)
    if name == "clamp_max":
        low, high = None, low
    if name == "threshold" and high == low == 0:
        high = None
    bounds = [bound for bound in (low, high) if not (bound is None or (is_number(bound) and bound == 0))]
    if not bounds:
        return homogeneous(ctx, x)
    if name != "threshold" and all(isinstance(bound, Gauge) for bound in bounds):
        for bound in bounds:
            x = extremum(ctx, x, bound)
        return x
    if high is None and is_number(low) and 0 < low <= SMALL and _normalises(ctx.node):
        ctx.store.approximately(x.fields, float(low))
        return ctx.out(x.fields)
    ctx.trivial(x, low, high)
    return ctx.out()


@rule("aten.add", "aten.sub", "aten.rsub")
def add(ctx: Context, x: Any, y: Any, *_: Any, alpha: Any = 1) -> Gauge:
    if is_number(x):
        x, y = y, x
    if is_number(y):
        name = short_name(ctx.node)
        if y == 0 or x.zero:
            return ctx.out(x.fields if y == 0 else (), zero=x.zero and y == 0)
        if name == "add" and 0 < y * alpha <= SMALL and _normalises(ctx.node):
            ctx.store.approximately(x.fields, float(y * alpha))
            return ctx.out(x.fields)
        ctx.trivial(x, why=f"has a constant added ({name})")
        return ctx.out()
    return _sum(ctx, x, y)


def _sum(ctx: Context, x: Gauge, y: Gauge) -> Gauge:
    n = len(ctx.shape)
    a, b = (Gauge(ctx.shape, aligned(g, n), g.zero) for g in (x, y))
    return ctx.out(agree(ctx, a, b), zero=x.zero and y.zero)


def _normalises(node: fx.Node) -> bool:
    """Every use of the value is a root, a power or a division."""
    names = {short_name(user) for user in node.users if isinstance(user.target, torch._ops.OpOverload)}
    passing = {"to_copy", "expand", "view", "clone", "unsqueeze"}
    inner = all(_normalises(u) for u in node.users if short_name(u) in passing)
    return bool(names) and names <= {"rsqrt", "sqrt", "div", "reciprocal", "pow"} | passing and inner


@rule("aten.mul", "aten.multiply")
def mul(ctx: Context, x: Any, y: Any) -> Gauge:
    if is_number(x):
        x, y = y, x
    if is_number(y):
        return ctx.out(x.fields if y != 0 else (), zero=x.zero or y == 0, marks=x.marks & KEPT)
    if _only_summed(ctx.node) and not (x.zero or y.zero):
        n = len(ctx.shape)
        whole = tuple(replace(g, shape=(*[1] * (n - len(g.shape)), *g.shape), fields=aligned(g, n)) for g in (x, y))
        return ctx.out(factors=whole)
    return _product(ctx, x, y, 1.0)


def _only_summed(node: fx.Node) -> bool:
    """Whether a product of two tensors is used by sums alone, so that it is a contraction: `(a * b).sum(-1)`.

    A tensor times itself is a square, which only scales pass.
    """
    names = [short_name(user) for user in node.users]
    return bool(names) and set(names) <= {"sum", "mean"} and node.args[0] is not node.args[1]


@rule("aten.ldexp")
def ldexp(ctx: Context, x: Gauge, exponent: Gauge) -> Gauge:
    """`x * 2 ** exponent`: scales of `x` pass as through a product with a constant, the exponent stays as it is."""
    ctx.trivial(exponent)
    return _product(ctx, x, Gauge(exponent.shape), 1.0)


@rule("aten.div", "aten.divide", "aten.true_divide")
def div(ctx: Context, x: Any, y: Any, **mode: Any) -> Gauge:
    if mode.get("rounding_mode"):
        ctx.trivial(x, y)
        return ctx.out()
    if is_number(y):
        return ctx.out(x.fields, zero=x.zero, marks=x.marks & KEPT)
    return _product(ctx, x, y, -1.0)


@rule("aten.reciprocal")
def reciprocal(ctx: Context, x: Gauge) -> Gauge:
    return _power(ctx, x, -1.0)


@rule("aten.sqrt")
def sqrt(ctx: Context, x: Gauge) -> Gauge:
    return _power(ctx, x, 0.5)


@rule("aten.rsqrt")
def rsqrt(ctx: Context, x: Gauge) -> Gauge:
    return _power(ctx, x, -0.5)


@rule("aten.square")
def square(ctx: Context, x: Gauge) -> Gauge:
    return _power(ctx, x, 2.0)


@rule("aten.pow.Tensor_Scalar")
def power(ctx: Context, x: Gauge, exponent: Any) -> Gauge:
    return _power(ctx, x, float(exponent))


def _power(ctx: Context, x: Gauge, exponent: float) -> Gauge:
    if exponent == 0:
        return ctx.out()
    ctx.store.singletons(x.fields)
    return ctx.out([replace(f, exponent=f.exponent * exponent) for f in x.fields])


def _product(ctx: Context, x: Gauge, y: Gauge, sign: float) -> Gauge:
    if x.zero or (y.zero and sign > 0):
        return ctx.out(zero=True)
    n = len(ctx.shape)
    a, b = aligned(x, n), aligned(y, n)
    ctx.store.varies(a, y.shape)
    ctx.store.varies(b, x.shape)
    for own, mine, other in ((a, x, y), (b, y, x)):
        wide = [f for f in own if any(other.shape[k - n] > 1 for k in f.spans(range(n)) if n - k <= len(other.shape))]
        if "data" in mine.marks and "data" in other.marks:
            ctx.store.tag(wide, "gate")
        elif "data" in other.marks and mine.leaf:
            ctx.store.tag(wide, "gain")
    return ctx.out([*a, *(Field(f.ids, sign * f.exponent) for f in b)])


@rule("aten.addcmul")
def addcmul(ctx: Context, x: Gauge, a: Gauge, b: Gauge, **_: Any) -> Gauge:
    return _sum(ctx, x, _product(ctx, a, b, 1.0))


@rule("aten.maximum", "aten.minimum", "aten.fmax", "aten.fmin")
def extremum(ctx: Context, x: Gauge, y: Gauge) -> Gauge:
    ctx.store.singletons([*x.fields, *y.fields])
    return _sum(ctx, x, y)


@rule("aten.hypot")
def hypot(ctx: Context, x: Gauge, y: Gauge) -> Gauge:
    return extremum(ctx, x, y)


@rule("aten.sign", "aten.sgn", "aten.signbit", "aten.isnan", "aten.isinf", "aten.isfinite")
def sign(ctx: Context, x: Gauge, *_: Any) -> Gauge:
    """What a positive number in front does not change."""
    ctx.store.singletons(x.fields)
    return ctx.out()


@rule("aten.eq", "aten.ne", "aten.lt", "aten.le", "aten.gt", "aten.ge")
def compare(ctx: Context, x: Gauge, y: Any) -> Gauge:
    """Two tensors that scale alike, or one with zero: the order stays."""
    zero = y == 0 if is_number(y) else y.zero
    if is_number(y) and not zero:
        ctx.trivial(x, why="is compared with a constant")
    elif zero:
        ctx.store.singletons(x.fields)
    else:
        extremum(ctx, x, y)
    return ctx.out()


@rule("aten.atan2")
def atan2(ctx: Context, x: Gauge, y: Gauge) -> Gauge:
    ctx.store.notice([*x.fields, *y.fields])
    return compare(ctx, x, y)


@rule("aten.copysign.Tensor")
def copysign(ctx: Context, x: Gauge, y: Gauge) -> Gauge:
    ctx.store.singletons([*x.fields, *y.fields])
    return ctx.out(aligned(x, len(ctx.shape)), zero=x.zero)


@rule("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
def where(ctx: Context, condition: Gauge, x: Any, y: Any) -> Gauge:
    ctx.trivial(condition)
    n = len(ctx.shape)
    sides = []
    for side in (x, y):
        gauge = Gauge((), zero=side == 0) if is_number(side) else side
        ctx.store.varies(aligned(gauge, n), condition.shape)
        sides.append(gauge)
    return _sum(ctx, *sides)


@rule("aten.masked_fill")
def masked_fill(ctx: Context, x: Gauge, mask: Gauge, value: Any) -> Gauge:
    ctx.trivial(mask)
    n = len(ctx.shape)
    fill = Gauge((), zero=value == 0) if is_number(value) else value
    if not fill.zero:
        ctx.trivial(x, fill, why="is filled with a constant")
        return ctx.out()
    fields = aligned(x, n)
    ctx.store.varies(fields, mask.shape)
    return ctx.out(fields, zero=x.zero)


@rule("aten.tril", "aten.triu")
def triangle(ctx: Context, x: Gauge, *_: Any) -> Gauge:
    for f in x.fields:
        ctx.store.separate(f, [f.ids.ndim - 2, f.ids.ndim - 1])
    return ctx.out(x.fields, zero=x.zero)


@rule("aten.full", "aten.full_like", "aten.new_full")
def full(ctx: Context, *args: Any, **__: Any) -> Gauge:
    return ctx.out(zero=is_number(args[-1]) and args[-1] == 0)


OPAQUE = """
gelu silu tanh sigmoid exp exp2 expm1 log log1p log2 erf erfc softplus elu celu selu relu6 hardtanh
hardswish hardsigmoid mish log_sigmoid logsigmoid log_sigmoid_forward sin cos tan atan sinh cosh
asin acos round floor ceil trunc frac fmod remainder logical_and logical_or logical_not bitwise_and
bitwise_or bitwise_not one_hot logit softshrink hardshrink tanhshrink logsumexp logcumsumexp cumprod
ones_like new_ones floor_divide __and__ __or__ nonzero any all lstm gru rnn_tanh multinomial
bincount searchsorted histc lgamma digamma
"""


@rule(*(f"aten.{name}" for name in OPAQUE.split()))
def opaque(ctx: Context, *args: Any, **kwargs: Any) -> Any:
    """Functions that commute with no scaling: the gauge of every argument is trivial."""
    if short_name(ctx.node) not in ("ones_like", "new_ones"):
        ctx.trivial(args, kwargs)
    return [Gauge(shape or ()) for shape in ctx.shapes] if len(ctx.shapes) > 1 else ctx.out()
