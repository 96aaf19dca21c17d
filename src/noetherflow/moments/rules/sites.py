"""What rules share: sites that are outer products or broadcast sums, and where samples may lie in an output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from noetherflow.moments.forms import Dense, Form, OneToken, Outer
from noetherflow.moments.layout import SampleLayout
from noetherflow.moments.rules.registry import Owned, Prepare, Site
from noetherflow.moments.target import wide


def features_last(out: Tensor) -> range:
    """Samples may lie on every axis but the last, as in the output of a linear layer."""
    return range(out.ndim - 1)


def first_axis(out: Tensor) -> range:
    """Samples lie on axis 0, as in images `[samples, channels, height, width]`."""
    return range(1)


def raised(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the type that sums are kept in."""
    return [t.to(wide(t.dtype)) for t in tensors]


def as_given(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The output gradient and all that was saved."""
    return tensors


def delta_alone(delta: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    """The output gradient."""
    return (delta,)


def outer(operand: Tensor, out_first: bool, prepare: Prepare = as_given) -> Site:
    """A weight matrix that multiplies the last axis of an activation.

    `prepare` gives the output gradient `[.., out]` and the activation `[.., in]`.

    Args:
        operand: the weight, `[out, in]` if `out_first` (`y = x @ W.T`), else `[in, out]` (`y = x @ W`).
        out_first: which.
        prepare: from output gradient and saved tensors; as they are, if the rule saves the activation alone.
    """

    def build(_: SampleLayout, delta: Tensor, x: Tensor) -> Form:
        left, right = (delta, x) if out_first else (x, delta)
        if delta.ndim == 2:
            return OneToken(left, right)
        return Outer(left.flatten(1, -2), right.flatten(1, -2))

    return Site(operand, prepare, build)


def summed(
    operand: Tensor,
    aligned: Callable[[int], Sequence[int]],
    prepare: Prepare = delta_alone,
    cancelled: Callable[..., Tensor] | None = None,
) -> Site:
    """An operand that was broadcast along the samples: biases, gains, masks.

    Args:
        operand: for example a bias `[features]`.
        aligned: its shape as it is broadcast against an output of so many axes, 1 where it is repeated: `last_axes` for
            `[features]` against `[.., features]`, `channel_axis` for `[channels]` against `[samples, channels, ..]`.
        prepare: from output gradient and saved tensors, the gradient of the broadcast copy, of the output's shape.
        cancelled: as in `Site`.
    """

    def build(layout: SampleLayout, product: Tensor) -> Form:
        if product.shape[1:] == operand_shape and layout.fold != "none":
            return Dense(product.to(wide(product.dtype)))
        if layout.fold == "none":
            target = aligned(product.ndim - 1)
        else:
            target = layout.rest(
                aligned(product.ndim - 1 + (layout.span if layout.fold == "whole" else layout.span - 1))
            )
        axes = [k + 1 for k, size in enumerate(target) if size == 1 and product.shape[k + 1] != 1]
        product = product.to(wide(product.dtype))
        gradient = product.sum(axes) if axes else product
        return Dense(gradient.reshape(product.shape[0], *operand_shape), product)

    operand_shape = operand.shape
    return Site(operand, prepare, build, cancelled)


def last_axes(operand: Tensor) -> Callable[[int], Sequence[int]]:
    """Broadcasting as usual: the operand's shape at the end."""
    shape = tuple(operand.shape)
    return lambda ndim: (1,) * (ndim - len(shape)) + shape


def channel_axis(operand: Tensor) -> Callable[[int], Sequence[int]]:
    """The operand's one axis is axis 1 of the output."""
    size = operand.shape[0]
    return lambda ndim: (1, size) + (1,) * (ndim - 2)


def claimed(owned: Owned, arguments: dict[str, Any], sites: Sequence[Site]) -> bool:
    """The sites, at least one, are the owned operands among the arguments, each given once."""
    operands = sorted(id(s.operand) for s in sites)
    return bool(sites) and operands == sorted({id(v) for v in arguments.values() if owned(v)})
