"""Gains and biases of normalisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from noetherflow.moments.forms import norm
from noetherflow.moments.rules.registry import Call, Owned, rule
from noetherflow.moments.rules.sites import (
    channel_axis,
    claimed,
    first_axis,
    last_axes,
    raised,
    summed,
)


@dataclass(frozen=True, eq=False)
class Normalisation:
    """A norm without its gain and bias: `(x - mean) * spread`.

    `apply(x)`: the normalised input. `spread(x)`: the factor, broadcast against `x`; None where no mean is subtracted.
    """

    apply: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor] | None

    def gain(self, delta: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """What the gain's gradient is summed from, in the type sums are kept in, as torch does inside."""
        return (torch.mul(*raised(delta, self.apply(*raised(x)))),)

    def cancelled(self, delta: Tensor, x: Tensor) -> Tensor:
        """The size of that if no mean were subtracted: all there is, where a norm has one entry alone."""
        if self.spread is None:
            return delta.new_zeros(())
        delta, x = raised(delta, x)
        return norm(delta * x * self.spread(x)) * sqrt(x.numel())


def _spread(x: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    """`1 / sqrt(variance + eps)` over the axes."""
    return (x.var(tuple(axes), unbiased=False, keepdim=True) + eps).rsqrt()


def _spread_of_groups(x: Tensor, groups: int, eps: float) -> Tensor:
    """The same for each of the groups of channels."""
    grouped = x.reshape(x.shape[0], groups, -1)
    return _spread(grouped, (2,), eps).expand_as(grouped).reshape(x.shape)


def _norm(
    owned: Owned,
    a: dict[str, Any],
    normalisation: Normalisation,
    aligned: Callable[[Tensor], Callable[[int], Sequence[int]]],
    sample_axes: Callable[[Tensor], Sequence[int]],
) -> Call | None:
    """`y = xhat * weight + bias`: the gain sees `delta * xhat`, recomputed by the same function without affine part."""
    x, w = a["input"], a["weight"]
    b: Any = a.get("bias")
    sites = []
    if owned(w):
        sites.append(summed(w, aligned(w), normalisation.gain, normalisation.cancelled))
    if owned(b):
        sites.append(summed(b, aligned(b)))
    return Call((x,), sample_axes, tuple(sites)) if claimed(owned, a, sites) else None


@rule(
    lambda input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True: None,
    F.layer_norm,
    torch.layer_norm,
)
def layer_norm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    shape, eps = a["normalized_shape"], a["eps"]
    leading = lambda out: range(out.ndim - len(shape))
    normalisation = Normalisation(
        lambda x: F.layer_norm(x, shape, None, None, eps), lambda x: _spread(x, range(-len(shape), 0), eps)
    )
    return _norm(owned, a, normalisation, last_axes, leading)


@rule(lambda input, normalized_shape, weight=None, eps=None: None, F.rms_norm, torch.rms_norm)
def rms_norm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    shape, eps = a["normalized_shape"], a["eps"]
    leading = lambda out: range(out.ndim - len(shape))
    normalisation = Normalisation(lambda x: F.rms_norm(x, shape, None, eps), None)
    return _norm(owned, a, normalisation, last_axes, leading)


@rule(
    lambda input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True: None,
    F.group_norm,
    torch.group_norm,
)
def group_norm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    groups, eps = a["num_groups"], a["eps"]
    normalisation = Normalisation(
        lambda x: F.group_norm(x, groups, None, None, eps), lambda x: _spread_of_groups(x, groups, eps)
    )
    return _norm(owned, a, normalisation, channel_axis, first_axis)


@rule(
    lambda input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5: None,
    F.batch_norm,
)
def batch_norm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    """Evaluation mode only; with batch statistics samples have no gradients of their own."""
    if a["training"]:
        return None
    (mean, var), eps = raised(a["running_mean"], a["running_var"]), a["eps"]
    normalisation = Normalisation(
        lambda x: F.batch_norm(x, mean, var, None, None, False, 0.0, eps),
        lambda x: (var + eps).rsqrt().view(-1, *(1 for _ in x.shape[2:])),
    )
    return _norm(owned, a, normalisation, channel_axis, first_axis)


@rule(F.instance_norm, F.instance_norm)
def instance_norm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    """With statistics of each sample alone."""
    if not a["use_input_stats"] or a["running_mean"] is not None:
        return None
    eps = a["eps"]
    normalisation = Normalisation(
        lambda x: F.instance_norm(x, None, None, None, None, True, 0.0, eps),
        lambda x: _spread(x, range(2, x.ndim), eps),
    )
    return _norm(owned, a, normalisation, channel_axis, first_axis)
