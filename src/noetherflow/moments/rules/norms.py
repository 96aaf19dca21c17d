"""Gains and biases of normalisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from noetherflow.moments.rules.registry import Call, Owned, rule
from noetherflow.moments.rules.sites import (
    channel_axis,
    claimed,
    first_axis,
    last_axes,
    raised,
    summed,
)


def _norm(
    owned: Owned,
    a: dict[str, Any],
    normalised: Callable[[Tensor], Tensor],
    aligned: Callable[[Tensor], Callable[[int], Sequence[int]]],
    sample_axes: Callable[[Tensor], Sequence[int]],
) -> Call | None:
    """`y = xhat * weight + bias`: the gain sees `delta * xhat`, recomputed by the same function without affine part.

    In the accumulation type: inside, torch normalises 16-bit activations in float32 too.
    """
    x, w = a["input"], a["weight"]
    b: Any = a.get("bias")
    sites = []
    if owned(w):
        sites.append(summed(w, aligned(w), lambda delta, x: (torch.mul(*raised(delta, normalised(*raised(x)))),)))
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
    return _norm(owned, a, lambda x: F.layer_norm(x, shape, None, None, eps), last_axes, leading)


@rule(lambda input, normalized_shape, weight=None, eps=None: None, F.rms_norm, torch.rms_norm)
def rms_norm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    shape, eps = a["normalized_shape"], a["eps"]
    leading = lambda out: range(out.ndim - len(shape))
    return _norm(owned, a, lambda x: F.rms_norm(x, shape, None, eps), last_axes, leading)


@rule(
    lambda input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True: None,
    F.group_norm,
    torch.group_norm,
)
def group_norm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    groups, eps = a["num_groups"], a["eps"]
    return _norm(owned, a, lambda x: F.group_norm(x, groups, None, None, eps), channel_axis, first_axis)


@rule(
    lambda input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5: None,
    F.batch_norm,
)
def batch_norm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    """Evaluation mode only; with batch statistics samples have no gradients of their own."""
    if a["training"]:
        return None
    (mean, var), eps = raised(a["running_mean"], a["running_var"]), a["eps"]
    normalised = lambda x: F.batch_norm(x, mean, var, None, None, False, 0.0, eps)
    return _norm(owned, a, normalised, channel_axis, first_axis)


@rule(F.instance_norm, F.instance_norm)
def instance_norm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    """With statistics of each sample alone."""
    if not a["use_input_stats"] or a["running_mean"] is not None:
        return None
    eps = a["eps"]
    normalised = lambda x: F.instance_norm(x, None, None, None, None, True, 0.0, eps)
    return _norm(owned, a, normalised, channel_axis, first_axis)
