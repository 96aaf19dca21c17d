"""Convolutions in one to three dimensions, also transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from noetherflow.moments.convolution import Convolution
from noetherflow.moments.forms import Form
from noetherflow.moments.layout import SampleLayout
from noetherflow.moments.rules.registry import Call, MomentRule, Owned, Site, rule
from noetherflow.moments.rules.sites import (
    as_given,
    channel_axis,
    claimed,
    first_axis,
    summed,
)


def _convolution(nd: int, transposed: bool) -> MomentRule:
    """The rule of convolutions over `nd` axes of positions."""

    def convolution(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
        x, w, b = a["input"], a["weight"], a["bias"]
        if x.ndim != nd + 2:
            return None
        given = (a["stride"], a["dilation"], a.get("output_padding", 0))
        stride, dilation, output_padding = ([v] * nd if isinstance(v, int) else list(v) for v in given)
        padding = _padding(a["padding"], w.shape[2:], dilation)
        if padding is None:
            return None
        stride, dilation, padding, output_padding = (
            v * nd if len(v) == 1 else v for v in (stride, dilation, padding, output_padding)
        )
        settings = (stride, padding, dilation, transposed, output_padding, a["groups"])
        kernel = w.detach()

        def build(layout: SampleLayout, delta: Tensor, x: Tensor) -> Form:
            if layout.fold == "whole":
                delta, x = delta.unsqueeze(1), x.unsqueeze(1)
            return Convolution(x, delta, kernel, settings)

        sites = ([Site(w, as_given, build)] if owned(w) else []) + ([summed(b, channel_axis(b))] if owned(b) else [])
        return Call((x,) if owned(w) else (), first_axis, tuple(sites)) if claimed(owned, a, sites) else None

    return convolution


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int] | None:
    """Zeros put at either end of each axis; None for `same` where the two ends differ."""
    if padding == "valid":
        return [0] * len(kernel)
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return None if any(r % 2 for r in reach) else [r // 2 for r in reach]
    return [padding] * len(kernel) if isinstance(padding, int) else list(padding)


for _nd, _conv, _transposed in (
    (1, F.conv1d, F.conv_transpose1d),
    (2, F.conv2d, F.conv_transpose2d),
    (3, F.conv3d, F.conv_transpose3d),
):
    rule(lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None, _conv)(
        _convolution(_nd, False)
    )
    rule(
        lambda input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1: None, _transposed
    )(_convolution(_nd, True))
