"""Matrix products: linear, matmul, addmm, einsum."""

from __future__ import annotations

import string
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from noetherflow.moments.forms import Blocks, Form, Outer
from noetherflow.moments.layout import SampleLayout
from noetherflow.moments.rules.registry import Call, Owned, Site, rule
from noetherflow.moments.rules.sites import (
    as_given,
    claimed,
    features_last,
    last_axes,
    outer,
    summed,
)


@rule(lambda input, weight, bias=None: None, F.linear)
def linear(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    x, w, b = a["input"], a["weight"], a["bias"]
    if w.ndim != 2 or x.ndim < 2:
        return None
    sites = ([outer(w, True)] if owned(w) else []) + ([summed(b, last_axes(b))] if owned(b) else [])
    return Call((x,) if owned(w) else (), features_last, tuple(sites)) if claimed(owned, a, sites) else None


@rule(
    lambda input, other: None, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, Tensor.__rmatmul__
)
def matmul(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    """`x @ w` with either side a parameter, of one axis or more."""
    x, w = a["input"], a["other"]
    if func is Tensor.__rmatmul__:
        x, w = w, x
    if owned(x) == owned(w):
        return None
    if owned(w) and w.ndim > 2:
        if x.ndim <= w.ndim:
            return None
        x = x.expand(*x.shape[: x.ndim - w.ndim], *w.shape[:-2], *x.shape[-2:])
        return _contraction(x, w, *_matmul_letters(x.ndim, w.ndim))
    if owned(w):
        if w.ndim == 1 and x.ndim > 1:
            site = summed(w, last_axes(w), lambda delta, x: (delta.unsqueeze(-1) * x,))
            return Call((x,), lambda out: range(out.ndim), (site,))
        return Call((x,), features_last, (outer(w, False),)) if w.ndim == 2 and x.ndim > 1 else None
    if x.ndim != 2 or w.ndim < 2:
        return None
    return Call((w.mT,), features_last, (outer(x, True),), seen=_flip)


def _flip(out: Tensor) -> Tensor:
    return out.mT


def _matmul_letters(x: int, w: int) -> tuple[str, str, str]:
    """`x @ w` with these numbers of axes as index letters of an einsum: of x, of w and of the output."""
    letters = string.ascii_lowercase
    batch, tokens = letters[: x - 2], letters[x - 2]
    return f"{batch}{tokens}y", f"{batch[x - w :]}yz", f"{batch}{tokens}z"


@rule(lambda equation, *operands: None, torch.einsum)
def einsum(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    """Two operands, explicit output, every index of the activation in the weight or the output."""
    equation, operands = a["equation"], a["operands"]
    if not isinstance(equation, str) or len(operands) != 2 or owned(operands[0]) == owned(operands[1]):
        return None
    terms, arrow, out = equation.replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    x, w, of_x, of_w = (*operands, first, second) if owned(operands[1]) else (*operands[::-1], second, first)
    return _contraction(x, w, of_x, of_w, out) if arrow else None


def _contraction(x: Tensor, w: Tensor, of_x: str, of_w: str, out: str) -> Call | None:
    """`out = sum x w` by index letters: tokens lie in `x` and `out` alone, blocks in all three."""
    if "." in of_x + of_w + out or any(len(set(s)) < len(s) for s in (of_x, of_w, out)):
        return None
    tokens = "".join(i for i in out if i in of_x and i not in of_w)
    blocks = "".join(i for i in out if i in of_x and i in of_w)
    rows = "".join(i for i in out if i not in of_x)
    columns = "".join(i for i in of_x if i not in out)
    if set(columns) - set(of_w) or set(of_w) != set(blocks + rows + columns) or not tokens:
        return None
    size = dict(zip(of_w, w.shape, strict=True))
    shape = [size[i] for i in blocks + rows + columns]
    back = [(blocks + rows + columns).index(i) for i in of_w]

    def arrange(gradient: Tensor) -> Tensor:
        return gradient.reshape(shape).permute(back)

    def build(_: SampleLayout, delta: Tensor, x: Tensor) -> Form:
        k, m, n = (prod(size[i] for i in letters) for letters in (blocks, rows, columns))
        left, right = delta.reshape(len(delta), -1, k, m), x.reshape(len(x), -1, k, n)
        if k == 1 and of_w == rows + columns:
            return Outer(left[:, :, 0], right[:, :, 0], tuple(w.shape))
        if k == 1 and of_w == columns + rows:
            return Outer(right[:, :, 0], left[:, :, 0], tuple(w.shape))
        return Blocks(left, right, arrange)

    saved = x.permute([of_x.index(i) for i in tokens + blocks + columns])
    seen = [out.index(i) for i in tokens + blocks + rows]
    axes = range(len(tokens))
    return Call((saved,), lambda _: axes, (Site(w, as_given, build),), lambda out: out.permute(seen))


@rule(lambda input, mat1, mat2, beta=1, alpha=1: None, torch.addmm, Tensor.addmm)
def addmm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    b, x, w = a["input"], a["mat1"], a["mat2"]
    if a["beta"] != 1 or a["alpha"] != 1 or owned(x):
        return None
    sites = ([outer(w, False)] if owned(w) else []) + ([summed(b, last_axes(b))] if owned(b) else [])
    return Call((x,) if owned(w) else (), features_last, tuple(sites)) if claimed(owned, a, sites) else None
