"""Reductions, pooling and normalisations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from noetherflow.discovery.gauges import Field, Gauge
from noetherflow.discovery.rules.base import Context, aligned, normal_axes, reshaped, rule, short_name
from noetherflow.discovery.rules.contraction import LETTERS, contracted
from noetherflow.discovery.rules.shape import agree


def _reduced(ctx: Context, fields: Sequence[Field], ndim: int, axes: Sequence[int], keepdim: bool) -> tuple[Field, ...]:
    left = ctx.store.constant_along(fields, axes, f"is reduced by {short_name(ctx.node)}")
    if keepdim or not ndim:
        return left
    keep = [a for a in range(ndim) if a not in axes]
    return tuple(Field(f.ids.reshape([f.ids.shape[a] for a in keep]), f.exponent) for f in left)


@rule("aten.sum", "aten.mean", "aten.nansum")
def mean(ctx: Context, x: Gauge, dim: Any = None, keepdim: bool = False, **_: Any) -> Gauge:
    axes = normal_axes(dim, len(x.shape))
    if x.factors:
        return ctx.out(_inner_product(ctx, x, axes, keepdim))
    return ctx.out(_reduced(ctx, x.fields, len(x.shape), axes, keepdim), zero=x.zero)


def _inner_product(ctx: Context, product: Gauge, axes: Sequence[int], keepdim: bool) -> tuple[Field, ...]:
    """The sum over `axes` of a product that was kept as its two factors."""
    labels = LETTERS[: len(product.shape)]
    output = "".join(c for a, c in enumerate(labels) if a not in axes)
    x, y = product.factors
    fields = contracted(ctx, x, y, f"{labels},{labels}->{output}")
    if not keepdim:
        return fields
    return tuple(Field(_with_ones(f.ids, axes, len(labels)), f.exponent) for f in fields)


def _with_ones(ids: Tensor, axes: Sequence[int], ndim: int) -> Tensor:
    """`ids` with size 1 put in at `axes` of a tensor of `ndim` axes."""
    kept = iter(ids.shape)
    return ids.reshape([1 if a in axes else next(kept) for a in range(ndim)])


@rule("aten.cumsum")
def cumsum(ctx: Context, x: Gauge, dim: int, **_: Any) -> Gauge:
    """What is summed up must scale alike along the axis; channels beside it mix as before."""
    return ctx.out(ctx.store.constant_along(x.fields, normal_axes(dim, len(x.shape)), "is summed cumulatively"))


MOST_FACTORS = 64
"""A product over an axis is followed factor by factor up to this length."""


@rule("aten.prod.dim_int")
def product_over(ctx: Context, x: Gauge, dim: int, keepdim: bool = False, **_: Any) -> Gauge:
    """A product of n entries that scale by p scales by p^n; of entries with scales of their own, by their product."""
    axis = dim % max(len(x.shape), 1)
    if not x.shape or x.shape[axis] > MOST_FACTORS:
        ctx.trivial(x)
        return ctx.out()
    ctx.store.singletons(x.fields)
    count = x.shape[axis]
    factors = []
    for f in x.fields:
        if f.spans([axis]):
            factors += [Field(f.ids.narrow(axis, k, 1), f.exponent) for k in range(count)]
        else:
            factors.append(replace(f, exponent=count * f.exponent))
    return ctx.out(factors if keepdim else [replace(f, ids=f.ids.squeeze(axis)) for f in factors], zero=x.zero)


@rule("aten.amax", "aten.amin")
def amax(ctx: Context, x: Gauge, dim: Any = None, keepdim: bool = False) -> Gauge:
    ctx.store.singletons(x.fields)
    return mean(ctx, x, dim, keepdim)


@rule("aten.max.default", "aten.min.default", "aten.median.default", "aten.nanmedian.default")
def max_all(ctx: Context, x: Gauge) -> Gauge:
    return amax(ctx, x)


@rule("aten.max.dim", "aten.min.dim", "aten.median.dim", "aten.nanmedian.dim", "aten.mode")
def max_dim(ctx: Context, x: Gauge, dim: int = -1, keepdim: bool = False) -> list[Gauge]:
    """A value picked along an axis by its rank, and where it was found."""
    values = amax(ctx, x, dim, keepdim)
    return [values, Gauge(values.shape)]


@rule("aten.kthvalue")
def kthvalue(ctx: Context, x: Gauge, _: int, dim: int = -1, keepdim: bool = False) -> list[Gauge]:
    return max_dim(ctx, x, dim, keepdim)


@rule("aten.argmax", "aten.argmin")
def argmax(ctx: Context, x: Gauge, dim: int | None = None, keepdim: bool = False) -> Gauge:
    """The place of the largest entry stays where all entries grow alike."""
    amax(ctx, x, dim, keepdim)
    return ctx.out()


@rule("aten.cummax", "aten.cummin")
def cummax(ctx: Context, x: Gauge, dim: int) -> list[Gauge]:
    return _sorted(ctx, x, dim)


@rule("aten.sort.default", "aten.argsort.default")
def sort(ctx: Context, x: Gauge, dim: int = -1, descending: bool = False) -> Any:
    return _sorted(ctx, x, dim)


@rule("aten.sort.stable", "aten.argsort.stable")
def sort_stable(ctx: Context, x: Gauge, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    return _sorted(ctx, x, dim)


@rule("aten.topk")
def topk(ctx: Context, x: Gauge, _: int, dim: int = -1, *__: Any, **___: Any) -> list[Gauge]:
    return _sorted(ctx, x, dim)


def _sorted(ctx: Context, x: Gauge, dim: int) -> Any:
    """Entries along an axis in an order that they decide, and their places; `argsort` gives the places alone."""
    ctx.store.singletons(x.fields)
    fields = ctx.store.constant_along(x.fields, normal_axes(dim, len(x.shape)), "is sorted")
    return [ctx.out(fields, zero=x.zero), Gauge(ctx.shape)] if len(ctx.shapes) > 1 else ctx.out()


@rule("aten.linalg_vector_norm", "aten.norm", "aten.frobenius_norm", "aten.linalg_norm")
def norm(ctx: Context, x: Gauge, order: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Gauge:
    if order == 0:  # the number of entries that are not zero
        amax(ctx, x, dim, keepdim)
        return ctx.out()
    return amax(ctx, x, dim, keepdim)


@rule("aten.var", "aten.std")
def variance(ctx: Context, x: Gauge, dim: Any = None, *_: Any, keepdim: bool = False, **__: Any) -> Gauge:
    ctx.store.singletons(x.fields)
    power = 2.0 if short_name(ctx.node).startswith("var") else 1.0
    axes = normal_axes(None if isinstance(dim, bool) else dim, len(x.shape))
    fields = _reduced(ctx, x.fields, len(x.shape), axes, keepdim)
    return ctx.out([replace(f, exponent=power * f.exponent) for f in fields])


@rule("aten.var_mean.correction", "aten.std_mean.correction", "aten.var_mean.dim", "aten.std_mean.dim")
def variance_mean(ctx: Context, x: Gauge, dim: Any = None, *_: Any, keepdim: bool = False, **__: Any) -> list[Gauge]:
    return [variance(ctx, x, dim, keepdim=keepdim), mean(ctx, x, dim, keepdim)]


@rule(*(f"aten.{kind}_pool{n}d" for kind in ("avg", "adaptive_avg", "_adaptive_avg", "lp") for n in (1, 2, 3)))
def average_pool(ctx: Context, x: Gauge, *_: Any, **__: Any) -> Gauge:
    count = int(str(ctx.node.target).split("pool")[1][0])
    return ctx.out(_over_space(ctx, x, count))


@rule(*(f"aten.{kind}max_pool{n}d" for kind in ("", "adaptive_", "fractional_") for n in (1, 2, 3)))
@rule(*(f"aten.max_pool{n}d_with_indices" for n in (1, 2, 3)))
def max_pool(ctx: Context, x: Gauge, *_: Any, **__: Any) -> Any:
    ctx.store.singletons(x.fields)
    values = average_pool(ctx, x)
    return values if len(ctx.shapes) == 1 else [values, Gauge(values.shape)]


@rule(*(f"aten.upsample_{kind}" for kind in ["nearest1d", "nearest2d", "nearest3d", "linear1d", "trilinear3d"]))
@rule(*(f"aten.{kind}" for kind in ["upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d"]))
@rule("aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa", "aten._upsample_nearest_exact1d")
@rule("aten._upsample_nearest_exact3d")
def interpolate(ctx: Context, x: Gauge, *_: Any, **__: Any) -> Gauge:
    return ctx.out(_over_space(ctx, x, len(x.shape) - 2))


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def grid_sample(ctx: Context, x: Gauge, grid: Gauge, *_: Any, **__: Any) -> Gauge:
    ctx.trivial(grid, why="is a place to read at")
    return interpolate(ctx, x)


@rule("aten.max_unpool2d", "aten.max_unpool3d")
def max_unpool(ctx: Context, x: Gauge, places: Gauge, *_: Any) -> Gauge:
    """Every channel has its own places, so channels may not mix."""
    ctx.store.singletons(x.fields)
    return ctx.out(_over_space(ctx, x, len(x.shape) - 2))


@rule("aten.im2col")
def unfold(ctx: Context, x: Gauge, kernel: Sequence[int], *_: Any) -> Gauge:
    """Patches `[batch, channels * kernel, places]`: each channel occurs once per place of the kernel."""
    size = kernel[0] * kernel[1]
    fields = [Field(f.ids.squeeze(-1), f.exponent) for f in _over_space(ctx, x, 2)]
    return ctx.out(
        [replace(f, ids=f.ids.repeat_interleave(size, -2)) if f.spans([f.ids.ndim - 2]) else f for f in fields]
    )


@rule("aten.col2im")
def fold(ctx: Context, x: Gauge, _: Any, kernel: Sequence[int], *__: Any) -> Gauge:
    """The sum of patches `[batch, channels * kernel, places]` where they overlap in the image."""
    size = kernel[0] * kernel[1]
    *lead, rows, places = x.shape
    split = (*lead, rows // size, size, places)
    return ctx.out(_over_space(ctx, Gauge(split, reshaped(x.fields, x.shape, split)), 2))


def _over_space(ctx: Context, x: Gauge, count: int) -> tuple[Field, ...]:
    axes = range(len(x.shape) - count, len(x.shape))
    return ctx.store.constant_along(x.fields, list(axes), f"is averaged over by {short_name(ctx.node)}")


def _scale_free(ctx: Context, fields: Sequence[Field], axes: Sequence[int], eps: float | None) -> tuple[Field, ...]:
    """A normalisation over `axes` divides the input's scale out, up to eps; the scale that it removed."""
    scale = ctx.store.constant_along(fields, axes, f"is normalised by {short_name(ctx.node)}")
    ctx.store.singletons(scale)
    ctx.store.notice(scale)
    if eps:
        ctx.store.approximately([replace(f, exponent=2 * f.exponent) for f in scale], float(eps))
    return scale


def _affine(ctx: Context, gain: Gauge | None, bias: Gauge | None, axes: Sequence[int]) -> tuple[Field, ...]:
    """Gain (and bias) along `axes` of a normalised tensor."""
    sizes = [n if a in axes else 1 for a, n in enumerate(ctx.shape)]

    def placed(g: Gauge | None) -> Gauge:
        if g is None:
            return Gauge(ctx.shape)
        core = [k for k in range(len(sizes)) if k in axes]
        shape = [1] * len(sizes)
        fields = []
        for f in g.fields:
            for k, n in zip(core, f.ids.shape, strict=True):
                shape[k] = n
            fields.append(Field(f.ids.reshape(shape), f.exponent))
        return Gauge(ctx.shape, tuple(fields), g.zero)

    scaled = placed(gain)
    ctx.store.singletons(scaled.fields)
    ctx.store.tag(scaled.fields, "gain")
    return scaled.fields if bias is None else agree(ctx, scaled, placed(bias), "gets a bias")


@rule("aten.cosine_similarity")
def cosine_similarity(ctx: Context, x: Gauge, y: Gauge, dim: int = 1, eps: float = 1e-8) -> Gauge:
    """Each of the two is divided by its length; `eps` counts only for vectors shorter than that."""
    n = max(len(x.shape), len(y.shape))
    for side in (x, y):
        _scale_free(ctx, aligned(side, n), (dim % n,), None)
    return ctx.out()


@rule("aten._cdist_forward")
def distance(ctx: Context, x: Gauge, y: Gauge, *_: Any) -> Gauge:
    """Distances `[..., rows of x, rows of y]`: both sets of points scale alike, by one number per pair of rows."""
    rows = [Field(f.ids.unsqueeze(-2), f.exponent) for f in aligned(x, len(ctx.shape))]
    columns = [Field(f.ids.unsqueeze(-3), f.exponent) for f in aligned(y, len(ctx.shape))]
    shape = (*ctx.shape, x.shape[-1])
    fields = agree(ctx, Gauge(shape, tuple(rows), x.zero), Gauge(shape, tuple(columns), y.zero), "is a distance to")
    ctx.store.singletons(fields)
    return ctx.out(_reduced(ctx, fields, len(shape), (len(shape) - 1,), keepdim=False))


@rule("aten._pdist_forward")
def distances(ctx: Context, x: Gauge, *_: Any) -> Gauge:
    ctx.store.singletons(x.fields)
    fields = ctx.store.constant_along(x.fields, (0, 1), "is a distance to")
    return ctx.out([Field(f.ids.reshape(1), f.exponent) for f in fields])


@rule("aten.layer_norm", "aten.native_layer_norm")
def layer_norm(
    ctx: Context,
    x: Gauge,
    normalized: Sequence[int],
    weight: Gauge | None = None,
    bias: Gauge | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    axes = tuple(range(len(x.shape) - len(normalized), len(x.shape)))
    _scale_free(ctx, x.fields, axes, eps)
    return _with_statistics(ctx, ctx.out(_affine(ctx, weight, bias, axes)))


@rule("aten.rms_norm", "aten._fused_rms_norm")
def rms_norm(
    ctx: Context, x: Gauge, normalized: Sequence[int], weight: Gauge | None = None, eps: float | None = None
) -> Any:
    axes = tuple(range(len(x.shape) - len(normalized), len(x.shape)))
    _scale_free(ctx, x.fields, axes, 2.3e-16 if eps is None else eps)
    return _with_statistics(ctx, ctx.out(_affine(ctx, weight, None, axes)))


def _with_statistics(ctx: Context, out: Gauge) -> Any:
    return out if len(ctx.shapes) == 1 else [out, *(Gauge(shape or ()) for shape in ctx.shapes[1:])]


@rule("aten.group_norm")
def group_norm(
    ctx: Context,
    x: Gauge,
    groups: int,
    weight: Gauge | None = None,
    bias: Gauge | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    split = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    _scale_free(ctx, reshaped(x.fields, x.shape, split), tuple(range(2, len(split))), eps)
    return _with_statistics(ctx, ctx.out(_affine(ctx, weight, bias, (1,))))


@rule("aten.native_group_norm")
def native_group_norm(
    ctx: Context, x: Gauge, weight: Gauge | None, bias: Gauge | None, n: int, c: int, hw: int, groups: int, eps: float
) -> Any:
    """The nine parameters are those of `aten.native_group_norm`: batch, channels and places are given as numbers."""
    return group_norm(ctx, x, groups, weight, bias, eps)


@rule("aten._native_batch_norm_legit_no_training")
def batch_norm_eval(
    ctx: Context, x: Gauge, weight: Gauge | None, bias: Gauge | None, mean: Gauge, var: Gauge, _: float, eps: float
) -> Any:
    return _batch_norm(ctx, x, weight, bias, mean, var, eps)


@rule("aten.batch_norm", "aten.native_batch_norm")
@rule("aten._native_batch_norm_legit_functional", "aten._native_batch_norm_legit")
def batch_norm(
    ctx: Context,
    x: Gauge,
    weight: Gauge | None,
    bias: Gauge | None,
    mean: Gauge | None,
    var: Gauge | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Any:
    """The ten parameters are those of `aten.batch_norm`, in its order; training or not, the statistics move along."""
    return _batch_norm(ctx, x, weight, bias, mean, var, eps)


@rule("aten._native_batch_norm_legit.no_stats")
def batch_norm_plain(
    ctx: Context, x: Gauge, weight: Gauge | None, bias: Gauge | None, training: bool, _: float, eps: float
) -> Any:
    return _batch_norm(ctx, x, weight, bias, None, None, eps)


def _batch_norm(
    ctx: Context,
    x: Gauge,
    weight: Gauge | None,
    bias: Gauge | None,
    mean: Gauge | None,
    var: Gauge | None,
    eps: float,
) -> Any:
    n = len(x.shape)
    scale = _scale_free(ctx, x.fields, tuple(a for a in range(n) if a != 1), eps)
    sizes = [-1 if a == 1 else 1 for a in range(n)]
    for buffer, power in ((mean, 1.0), (var, 2.0)):
        if buffer is not None:
            moved = ctx.buffer(buffer, power).fields
            placed = [Field(f.ids.reshape(sizes), f.exponent) for f in moved]
            ctx.store.equal(placed, [replace(f, exponent=power * f.exponent) for f in scale], "is a running statistic")
    return _with_statistics(ctx, ctx.out(_affine(ctx, weight, bias, (1,))))


@rule("aten.instance_norm")
def instance_norm(
    ctx: Context, x: Gauge, weight: Gauge | None, bias: Gauge | None, mean: Any, var: Any, use_input: bool, *args: Any
) -> Any:
    _scale_free(ctx, x.fields, tuple(range(2, len(x.shape))), args[1])
    return ctx.out(_affine(ctx, weight, bias, (1,)))


@rule("aten._weight_norm", "aten._weight_norm_interface")
def weight_norm(ctx: Context, v: Gauge, g: Gauge, dim: int = 0) -> Any:
    axes = tuple(a for a in range(len(v.shape)) if a != dim % len(v.shape))
    _scale_free(ctx, v.fields, axes, None)
    return _with_statistics(ctx, ctx.out(g.fields))
