"""Contractions: a shift of one factor is a shift of the product, equal along the axes that only this factor has."""

from __future__ import annotations

import math
from typing import Any

import torch

from noetherflow.discovery.rules.contraction import LETTERS
from noetherflow.discovery.shift_rules.base import ShiftContext, Shifted, shift_rule
from noetherflow.discovery.shift_store import ShiftTerm


def product(ctx: ShiftContext, x: Shifted, y: Shifted, spec: str) -> list[ShiftTerm]:
    """The terms of `einsum(spec, x, y)`.

    A key bias in `einsum("td,sd->ts", q, k)` moves entry `(t, s)` by `sum_d q[t, d] b[d]`: equal along `s`, which only
    the keys have, and different along `t`. A shift that moves both factors does more than that, and is killed.
    """
    inputs, output = spec.split("->")
    left, right = inputs.split(",")
    sides = [(x, y, left, right), (y, x, right, left)]
    found: list[ShiftTerm | None] = []
    for tensor, partner, mine, other in sides:
        own = [t for t in tensor.terms if not ctx.store.shares_labels([t], partner.terms)]
        ctx.store.kill([t for t in tensor.terms if t not in own])
        found += [_term(ctx, t, mine, other, output) for t in own]
    return [t for t in found if t is not None]


def _term(ctx: ShiftContext, t: ShiftTerm, mine: str, other: str, output: str) -> ShiftTerm | None:
    """One term of a factor with axes `mine` in the product; None (killed) if it is equal along no axis."""
    equal = {c for k, c in enumerate(mine) if c not in other and t.value.shape[k] == 1}
    sizes = [1 if c in equal else n for c, n in zip(output, ctx.shape, strict=True)]
    if all(n > 1 or full == 1 for n, full in zip(sizes, ctx.shape, strict=True)):
        ctx.store.kill([t])
        return None
    summed = [k for k, c in enumerate(mine) if c not in output]
    label = ctx.store.grouped(t, summed)
    kept = [c for c in mine if c in output]
    short = label.reshape([label.shape[mine.index(c)] for c in kept])
    ordered = short.permute([kept.index(c) for c in output if c in mine])
    lengths = iter(ordered.shape)
    placed = ordered.reshape([next(lengths) if c in mine else 1 for c in output])
    return ShiftTerm(placed, torch.arange(math.prod(sizes)).reshape(sizes), ctx.store.source(), 1.0, t.family)


def along(ctx: ShiftContext, bias: Shifted | None, axis: int = -1) -> list[ShiftTerm]:
    """The terms of a vector that is added along one axis of the output."""
    n = len(ctx.shape)
    sizes = [-1 if a == axis % n else 1 for a in range(n)]
    return [] if bias is None else [t.map(lambda ids: ids.reshape(sizes), bias.shape) for t in bias.terms]


@shift_rule("aten.linear")
def linear(ctx: ShiftContext, x: Shifted, weight: Shifted, bias: Shifted | None = None) -> Shifted:
    if weight.ndim != 2:
        return ctx.kill(x, weight, bias)
    lead = LETTERS[: x.ndim - 1]
    return ctx.out([*product(ctx, x, weight, f"{lead}z,yz->{lead}y"), *along(ctx, bias)])


@shift_rule("aten.matmul", "aten.mm", "aten.bmm")
def matmul(ctx: ShiftContext, x: Shifted, y: Shifted) -> Shifted:
    if x.ndim < 2 or y.ndim < 2:
        return ctx.kill(x, y)
    lead = LETTERS[: len(ctx.shape) - 2]
    own, other = (lead[len(lead) - s.ndim + 2 :] for s in (x, y))
    return ctx.out(product(ctx, x, y, f"{own}yz,{other}zx->{lead}yx"))


@shift_rule("aten.addmm")
def addmm(ctx: ShiftContext, bias: Shifted, x: Shifted, y: Shifted, *, beta: Any = 1, alpha: Any = 1) -> Shifted:
    if bias.ndim != 1 or beta != 1:
        return ctx.kill(bias, x, y)
    return ctx.out([*product(ctx, x, y, "yz,zx->yx"), *along(ctx, bias)])


@shift_rule("aten.einsum")
def einsum(ctx: ShiftContext, equation: str, tensors: list[Shifted], **_: Any) -> Shifted:
    spec = equation.replace(" ", "")
    names = spec.split("->")[0].split(",")
    if "->" not in spec or "." in spec or len(tensors) != 2 or any(len(set(n)) < len(n) for n in names):
        return ctx.kill(tensors)
    return ctx.out(product(ctx, tensors[0], tensors[1], spec))


@shift_rule("aten.conv1d", "aten.conv2d", "aten.conv3d")
def convolution(
    ctx: ShiftContext,
    x: Shifted,
    weight: Shifted,
    bias: Shifted | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Shifted:
    """Only output channels of the weight and the bias survive. The parameters are those of the operator in torch."""
    ctx.kill(x)
    sizes = [1 if a == 1 else n for a, n in enumerate(ctx.shape)]
    out = along(ctx, bias, axis=1)
    for t in weight.terms:
        if groups == 1 and t.uniform([0]) and all(n == 1 for n in t.label.shape[1:]):
            label = t.label.reshape([-1 if a == 1 else 1 for a in range(len(sizes))])
            value = torch.arange(math.prod(sizes)).reshape(sizes)
            out.append(ShiftTerm(label, value, ctx.store.source(), 1.0, t.family))
        else:
            ctx.store.kill([t])
    return ctx.out(out)
