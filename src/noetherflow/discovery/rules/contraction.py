"""Sums of products: a summed axis of one tensor pairs with the same axis of the other, every other axis passes."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from noetherflow.discovery.gauges import Field, Gauge
from noetherflow.discovery.rules.base import Context, rule, short_name
from noetherflow.discovery.rules.shape import diagonal_of

LETTERS = "abcdefghijklmnopqrstuvw"
"""Labels for the leading axes of a contraction; x, y and z stay free for its rows, columns and summed axis."""


@dataclass(frozen=True)
class Labelled:
    """A tensor with one letter per axis, as in the equation of an einsum."""

    gauge: Gauge
    labels: str

    def sizes(self) -> dict[str, int]:
        """The length of every labelled axis."""
        return dict(zip(self.labels, self.gauge.shape, strict=True))


def contracted(ctx: Context, x: Gauge, y: Gauge, spec: str) -> tuple[Field, ...]:
    """`einsum(spec, x, y)` on gauges.

    Example: for `bz,yz->by` (a linear layer) the coordinates of `x` along z and those of the weight along z must
    cancel, and the output inherits the weight's gauge along y.

    Args:
        ctx: Where the sum happens.
        x: The left factor.
        y: The right factor.
        spec: The equation; no letter twice in one term, every letter of the output in a term.

    Returns:
        The fields of the result, axes in the order of the output's letters.
    """
    if x.zero or y.zero:
        return ()  # nothing is multiplied: no demand, and the result is zero
    inputs, output = spec.split("->")
    left, right = inputs.split(",")
    joint = output + "".join(dict.fromkeys(c for c in left + right if c not in output))
    a, b = _laid_out(x, left, joint), _laid_out(y, right, joint)
    axes = tuple(range(len(output), len(joint)))
    if "data" in x.marks & y.marks:
        _tag_attention(ctx, a, b, axes)
    fields = ctx.store.contract(a, b, axes, f"is summed over in {short_name(ctx.node)}")
    return tuple(Field(f.ids.reshape(f.ids.shape[: len(output)]), f.exponent) for f in fields)


def _laid_out(gauge: Gauge, labels: str, joint: str) -> Gauge:
    """A tensor with axes `labels` laid out on the axes `joint`, size 1 where it has none."""
    order = [labels.index(c) for c in joint if c in labels]
    sizes = [gauge.shape[labels.index(c)] if c in labels else 1 for c in joint]

    def place(f: Field) -> Field:
        ids = f.ids.permute(order)
        found = iter(ids.shape)
        return Field(ids.reshape([next(found) if c in labels else 1 for c in joint]), f.exponent)

    return replace(gauge, shape=tuple(sizes), fields=tuple(place(f) for f in gauge.fields))


def _tag_attention(ctx: Context, a: Gauge, b: Gauge, axes: Sequence[int]) -> None:
    """Two activations meet: what a softmax weighs is a value, what is summed against another activation a score."""
    for own, other in ((a, b), (b, a)):
        if "softmax" in other.marks:
            ctx.store.tag(own.fields, "value")
        elif "softmax" not in own.marks and own.fields and other.fields:
            ctx.store.tag([f for f in own.fields if f.spans(axes)], "score")
    if not axes:
        shared = [k for k in range(a.ndim) if a.shape[k] > 1 and b.shape[k] > 1]
        ctx.store.tag([f for f in (*a.fields, *b.fields) if f.spans(shared)], "gate")


def contracted_all(ctx: Context, factors: Sequence[Labelled], output: str) -> tuple[Field, ...]:
    """The einsum of any number of factors, two at a time.

    Which two is decided as a fast einsum does it: those whose product saves most entries, products of parameters
    alone last. So `bd,be,de->b` sums over d first and never forms the outer product of the first two, which would tie
    d and e together.

    Args:
        ctx: Where the sum happens.
        factors: The tensors with their labels; a label may occur twice in one of them (its diagonal is meant).
        output: The labels of the result.

    Returns:
        The fields of the result, axes in the order of `output`.
    """
    left = [_without_repeats(ctx, factor) for factor in factors]
    while len(left) > 1:
        i, j = min(_pairs(len(left)), key=lambda pair: _growth(left, pair[0], pair[1], output))
        merged = _merged(ctx, left, i, j, output)
        left = [merged, *(f for k, f in enumerate(left) if k not in (i, j))]
    (last,) = left
    if last.labels == output:
        return last.gauge.fields
    return contracted(ctx, last.gauge, Gauge(()), f"{last.labels},->{output}")


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def _remaining(factors: Sequence[Labelled], i: int, j: int, output: str) -> str:
    """The labels that the product of factors i and j keeps: those that the output or another factor has too."""
    wanted = set(output).union(*(f.labels for k, f in enumerate(factors) if k not in (i, j)))
    return "".join(dict.fromkeys(c for c in factors[i].labels + factors[j].labels if c in wanted))


def _growth(factors: Sequence[Labelled], i: int, j: int, output: str) -> tuple[bool, int]:
    """Whether factors i and j are both no activations; the entries of their product less those of the two."""
    sizes = factors[i].sizes() | factors[j].sizes()
    made = prod(sizes[c] for c in _remaining(factors, i, j, output))
    weights = not any("data" in factors[k].gauge.marks for k in (i, j))
    return weights, made - prod(factors[i].gauge.shape) - prod(factors[j].gauge.shape)


def _merged(ctx: Context, factors: Sequence[Labelled], i: int, j: int, output: str) -> Labelled:
    x, y = factors[i], factors[j]
    kept = _remaining(factors, i, j, output)
    fields = contracted(ctx, x.gauge, y.gauge, f"{x.labels},{y.labels}->{kept}")
    sizes = {c: max(x.sizes().get(c, 1), y.sizes().get(c, 1)) for c in kept}
    marks = (x.gauge.marks | y.gauge.marks) & {"data"}
    zero = x.gauge.zero or y.gauge.zero
    return Labelled(Gauge(tuple(sizes.values()), ctx.store.simplify(fields), zero, marks), kept)


def _without_repeats(ctx: Context, factor: Labelled) -> Labelled:
    """A factor such as `bii` as its diagonal `bi`."""
    gauge, labels = factor.gauge, factor.labels
    while len(set(labels)) < len(labels):
        first = next(k for k, c in enumerate(labels) if labels.count(c) > 1)
        second = labels.index(labels[first], first + 1)
        gauge = diagonal_of(ctx, gauge, 0, first, second)
        rest = "".join(c for k, c in enumerate(labels) if k not in (first, second))
        labels = rest + labels[first]
    return Labelled(gauge, labels)


@rule("aten.einsum")
def einsum(ctx: Context, equation: str, tensors: Sequence[Gauge], **_: Any) -> Gauge:
    terms, output = _spelled_out(equation, [len(t.shape) for t in tensors])
    factors = [Labelled(t, labels) for t, labels in zip(tensors, terms, strict=True)]
    return ctx.out(contracted_all(ctx, factors, output), zero=any(t.zero for t in tensors))


def _spelled_out(equation: str, ndims: Sequence[int]) -> tuple[list[str], str]:
    """The terms and the output of an einsum equation with a letter for every axis.

    Example: `...d,de` for tensors of 3 and 2 axes is (`ABd`, `de`) and output `ABe`.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    hidden = [n - len(t.replace("...", "")) if "..." in t else 0 for t, n in zip(terms, ndims, strict=True)]
    unused = [c for c in string.ascii_uppercase if c not in equation]
    dots = "".join(unused[: max(hidden)])
    spelled = [t.replace("...", dots[len(dots) - n :]) for t, n in zip(terms, hidden, strict=True)]
    if arrow:
        return spelled, output.replace("...", dots)
    letters = "".join(spelled)
    return spelled, dots + "".join(sorted(c for c in set(letters) if c not in dots and letters.count(c) == 1))


@rule("aten._trilinear")
def trilinear(
    ctx: Context,
    x: Gauge,
    weight: Gauge,
    y: Gauge,
    expand_x: Sequence[int],
    expand_weight: Sequence[int],
    expand_y: Sequence[int],
    summed: Sequence[int],
    *_: Any,
) -> Gauge:
    """The product of three tensors, each given length 1 along its `expand` axes, summed over the `summed` axes.

    The many parameters are those of `aten._trilinear`, which `nn.Bilinear` consists of.
    """
    total = len(x.shape) + len(expand_x)
    inserted = ((x, expand_x), (weight, expand_weight), (y, expand_y))
    factors = [Labelled(g, "".join(LETTERS[a] for a in range(total) if a not in axes)) for g, axes in inserted]
    return ctx.out(contracted_all(ctx, factors, "".join(LETTERS[a] for a in range(total) if a not in summed)))


@rule("aten.linalg_vecdot")
def vecdot(ctx: Context, x: Gauge, y: Gauge, dim: int = -1) -> Gauge:
    lead = LETTERS[: len(ctx.shape)]
    terms = []
    for g in (x, y):
        labels = list(lead[len(lead) - len(g.shape) + 1 :])
        labels.insert(dim % len(g.shape), "z")
        terms.append(Labelled(g, "".join(labels)))
    return ctx.out(contracted_all(ctx, terms, lead))
