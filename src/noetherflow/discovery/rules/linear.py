"""Linear layers, matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from noetherflow.discovery.gauges import Field, Gauge
from noetherflow.discovery.rules.base import Context, aligned, reshaped, rule
from noetherflow.discovery.rules.contraction import LETTERS, contracted
from noetherflow.discovery.rules.shape import agree


def with_bias(ctx: Context, fields: Sequence[Field], zero: bool, bias: Gauge | None, axis: int = -1) -> Gauge:
    """A layer's output, which transforms like its bias along `axis`; where the product is zero, like the bias alone."""
    if bias is None:
        return ctx.out(fields, zero=zero)
    n = len(ctx.shape)
    sizes = [-1 if a == axis % n else 1 for a in range(n)]
    placed = tuple(Field(f.ids.reshape(sizes), f.exponent) for f in bias.fields)
    product = Gauge(ctx.shape, tuple(fields), zero)
    return ctx.out(agree(ctx, product, Gauge(ctx.shape, placed, bias.zero), "gets a bias"), zero=zero and bias.zero)


@rule("aten.linear")
def linear(ctx: Context, x: Gauge, weight: Gauge, bias: Gauge | None = None) -> Gauge:
    """Columns of the weight undo the input's scales; the output has those of the rows, and the bias must share them."""
    lead = LETTERS[: len(x.shape) - 1]
    zero = x.zero or weight.zero
    if len(weight.shape) == 1:
        return ctx.out(contracted(ctx, x, weight, f"{lead}z,z->{lead}"), zero=zero)
    return with_bias(ctx, contracted(ctx, x, weight, f"{lead}z,yz->{lead}y"), zero, bias)


@rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot")
def matmul(ctx: Context, x: Gauge, y: Gauge, *_: Any) -> Gauge:
    return ctx.out(_matmul(ctx, x, y, len(ctx.shape)), zero=x.zero or y.zero)


def _matmul(ctx: Context, x: Gauge, y: Gauge, ndim: int) -> tuple[Field, ...]:
    rows = "y" if len(x.shape) > 1 else ""
    columns = "x" if len(y.shape) > 1 else ""
    lead = LETTERS[: ndim - len(rows) - len(columns)]
    own = lead[len(lead) - max(len(x.shape) - 2, 0) :]
    other = lead[len(lead) - max(len(y.shape) - 2, 0) :]
    return contracted(ctx, x, y, f"{own}{rows}z,{other}z{columns}->{lead}{rows}{columns}")


@rule("aten.addmm", "aten.baddbmm", "aten.addbmm", "aten.addmv")
def addmm(ctx: Context, bias: Gauge, x: Gauge, y: Gauge, *, beta: Any = 1, alpha: Any = 1) -> Gauge:
    n = len(ctx.shape)
    product = Gauge(ctx.shape, _matmul(ctx, x, y, n), x.zero or y.zero)
    if beta == 0:
        return ctx.out(product.fields, zero=product.zero)
    own = Gauge(ctx.shape, aligned(bias, n), bias.zero)
    return ctx.out(agree(ctx, product, own, "gets a bias"), zero=product.zero and own.zero)


@rule("aten.outer", "aten.ger")
def outer(ctx: Context, x: Gauge, y: Gauge) -> Gauge:
    return ctx.out(contracted(ctx, x, y, "a,b->ab"), zero=x.zero or y.zero)


@rule("aten.linalg_inv", "aten.inverse")
def inverse(ctx: Context, x: Gauge) -> Gauge:
    """Rows of `W` times r and columns times c: columns of its inverse divided by r and rows divided by c."""
    last = (len(x.shape) - 2, len(x.shape) - 1)
    if any(len(f.spans(last)) > 1 for f in x.fields):
        ctx.trivial(x)
        return ctx.out()
    return ctx.out([Field(f.ids.transpose(-1, -2), -f.exponent) for f in x.fields])


@rule("aten.linalg_solve")
def solve(ctx: Context, matrix: Gauge, y: Gauge, left: bool = True) -> Gauge:
    if not left or len(matrix.shape) != len(y.shape):
        ctx.trivial(matrix, y)
        return ctx.out()
    turned = inverse(replace(ctx, shapes=(matrix.shape,)), matrix)
    return ctx.out(_matmul(ctx, replace(turned, marks=matrix.marks), y, len(ctx.shape)))


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d")
def conv_plain(
    ctx: Context,
    x: Gauge,
    weight: Gauge,
    bias: Gauge | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Gauge:
    return _convolve(ctx, x, weight, bias, groups, False)


@rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def conv_transposed(
    ctx: Context,
    x: Gauge,
    weight: Gauge,
    bias: Gauge | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Gauge:
    """The nine parameters are those of `aten.conv_transpose2d`, which puts `groups` before `dilation`."""
    return _convolve(ctx, x, weight, bias, groups, True)


@rule("aten.convolution")
def convolution(
    ctx: Context,
    x: Gauge,
    weight: Gauge,
    bias: Gauge | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Gauge:
    """The ten parameters are those of `aten.convolution`, in its order; where it convolves does not matter here."""
    return _convolve(ctx, x, weight, bias, groups, transposed)


def _convolve(ctx: Context, x: Gauge, weight: Gauge, bias: Gauge | None, groups: int, transposed: bool) -> Gauge:
    """A convolution is a linear layer over channels at every place, one per group of channels."""
    k = len(weight.shape) - 2
    lead = len(x.shape) - k - 1
    if x.zero or weight.zero:
        return with_bias(ctx, (), True, bias, axis=lead)
    space = tuple(range(lead + 1, lead + 1 + k))
    fx = ctx.store.constant_along(x.fields, space, "is convolved over")
    fw = ctx.store.constant_along(weight.fields, tuple(range(2, 2 + k)), "is a convolution kernel")
    channels, wide = x.shape[lead], weight.shape[:2]
    split = (groups, channels // groups)
    ax = Gauge((*x.shape[:lead], *split), marks=x.marks)
    fx = reshaped(
        [Field(f.ids.reshape(f.ids.shape[: lead + 1]), f.exponent) for f in fx], x.shape[: lead + 1], ax.shape
    )
    aw = Gauge((groups, wide[0] // groups, wide[1]), marks=weight.marks)
    fw = reshaped([Field(f.ids.reshape(f.ids.shape[:2]), f.exponent) for f in fw], wide, aw.shape)
    batch = LETTERS[:lead]
    kernel = "xzy" if transposed else "xyz"
    out = contracted(ctx, replace(ax, fields=fx), replace(aw, fields=fw), f"{batch}xz,{kernel}->{batch}xy")
    per_group = wide[1] if transposed else wide[0] // groups
    old = (*x.shape[:lead], groups, per_group)
    merged = reshaped(out, old, (*x.shape[:lead], groups * per_group))
    full = [Field(f.ids.reshape([*f.ids.shape, *[1] * k]), f.exponent) for f in merged]
    return with_bias(ctx, full, False, bias, axis=lead)
