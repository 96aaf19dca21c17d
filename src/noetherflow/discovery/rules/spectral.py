"""Fourier transforms and complex numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from noetherflow.discovery.gauges import Field, Gauge
from noetherflow.discovery.rules.base import Context, aligned, normal_axes, rule
from noetherflow.discovery.rules.shape import agree


@rule("aten._fft_r2c", "aten._fft_c2c", "aten._fft_c2r")
def fourier(ctx: Context, x: Gauge, dim: Sequence[int], *_: Any) -> Gauge:
    """A linear map along the transformed axes, the same for whatever stands on the others."""
    fields = ctx.store.constant_along(x.fields, normal_axes(dim, len(x.shape)), "is Fourier transformed")
    return ctx.out(fields, zero=x.zero)


@rule("aten.view_as_complex")
def view_as_complex(ctx: Context, x: Gauge) -> Gauge:
    last = len(x.shape) - 1
    fields = ctx.store.constant_along(x.fields, (last,), "becomes complex")
    return ctx.out([Field(f.ids.squeeze(last), f.exponent) for f in fields])


@rule("aten.view_as_real")
def view_as_real(ctx: Context, x: Gauge) -> Gauge:
    return ctx.out([Field(f.ids.unsqueeze(-1), f.exponent) for f in x.fields])


@rule("aten.complex")
def complex_of(ctx: Context, real: Gauge, imaginary: Gauge) -> Gauge:
    n = len(ctx.shape)
    a, b = (Gauge(ctx.shape, aligned(part, n), part.zero) for part in (real, imaginary))
    return ctx.out(agree(ctx, a, b, "becomes complex"), zero=real.zero and imaginary.zero)


@rule("aten.polar")
def polar(ctx: Context, size: Gauge, angle: Gauge) -> Gauge:
    ctx.trivial(angle, why="is an angle")
    return ctx.out(aligned(size, len(ctx.shape)), zero=size.zero)
