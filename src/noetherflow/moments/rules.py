"""One rule per family of operators that consume parameters: from activations and output gradient to a `Form`.

A rule looks at the arguments of one call and answers which operands are consumed how (`Call`), or None when this use of
the operator is beyond it. Operands may be parameters or tensors made from parameters alone; every operand that a rule
does not claim counts as not covered.
"""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from noetherflow.moments.forms import Blocks, Convolution, Dense, Form, Lookup, Outer, RankOne
from noetherflow.moments.layout import Layout
from noetherflow.moments.target import wide

Prepare = Callable[..., tuple[Tensor, ...]]
Build = Callable[..., Form]


@dataclass(eq=False, slots=True)
class Site:
    """One consumed operand.

    `prepare(delta, *saved)` gives tensors that carry samples on the output's axes; `build(layout, *tensors)` gets them
    with samples in front.
    """

    operand: Tensor
    prepare: Prepare
    build: Build


@dataclass(eq=False, slots=True)
class Call:
    """A covered call: what to keep for the backward, where samples may lie in the output, the consumed operands.

    `seen`: the output as the rule speaks of it, its axes permuted.
    """

    saved: tuple[Tensor, ...]
    sample_axes: Callable[[Tensor], Sequence[int]]
    sites: tuple[Site, ...]
    seen: Callable[[Tensor], Tensor] = lambda out: out


Owned = Callable[[Any], bool]
Rule = Callable[[Owned, Callable[..., Any], dict[str, Any]], Call | None]


@dataclass(frozen=True)
class Signature:
    """Parameter names, defaults, and the name that takes further positional arguments, if any."""

    names: tuple[str, ...]
    defaults: dict[str, Any]
    rest: str | None

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Signature:
        given = inspect.signature(function).parameters.values()
        rest = next((p.name for p in given if p.kind is p.VAR_POSITIONAL), None)
        return cls(
            tuple(p.name for p in given if p.kind is not p.VAR_POSITIONAL),
            {p.name: p.default for p in given if p.default is not p.empty},
            rest,
        )

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """All arguments by name; None for a call of another shape."""
        known = len(self.names)
        if (len(args) > known and self.rest is None) or any(k not in self.names for k in kwargs):
            return None
        bound = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        if self.rest is not None:
            bound[self.rest] = args[known:]
        return bound if all(n in bound for n in self.names) else None


RULES: dict[Callable[..., Any], tuple[Signature, Rule]] = {}


def rule(signature: Callable[..., Any], *functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for functions that share one call signature, given as that of a function."""
    parsed = Signature.of(signature)

    def register(function: Rule) -> Rule:
        for f in functions:
            RULES[f] = (parsed, function)
        return function

    return register


def match(owned: Owned, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The `Call` of a covered use of `func`, else None; `owned` tells operands made from parameters alone."""
    entry = RULES.get(func)
    if entry is None:
        return None
    signature, function = entry
    bound = signature.bind(args, kwargs)
    return None if bound is None else function(owned, func, bound)


def features_last(out: Tensor) -> range:
    return range(out.ndim - 1)


def _raised(*tensors: Tensor) -> list[Tensor]:
    return [t.to(wide(t.dtype)) for t in tensors]


def _as_given(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


def _delta(delta: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    return (delta,)


def outer(operand: Tensor, out_first: bool, prepare: Prepare = _as_given) -> Site:
    """`[.., features]` tensors: a weight `[out, in]` if `out_first`, else `[in, out]`."""

    def build(_: Layout, delta: Tensor, x: Tensor) -> Form:
        left, right = (delta, x) if out_first else (x, delta)
        if delta.ndim == 2:
            return RankOne(left, right)
        return Outer(*(t.reshape(t.shape[0], -1, t.shape[-1]) for t in (left, right)))

    return Site(operand, prepare, build)


def summed(operand: Tensor, aligned: Callable[[int], Sequence[int]], prepare: Prepare = _delta) -> Site:
    """An operand that was broadcast: its gradient is `prepare(..)` summed over the axes where `aligned` is 1."""

    def build(layout: Layout, product: Tensor) -> Form:
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
    return Site(operand, prepare, build)


def last_axes(operand: Tensor) -> Callable[[int], Sequence[int]]:
    """Broadcasting as usual: the operand's shape at the end."""
    shape = tuple(operand.shape)
    return lambda ndim: (1,) * (ndim - len(shape)) + shape


def channel_axis(operand: Tensor) -> Callable[[int], Sequence[int]]:
    """The operand's one axis is axis 1 of the output."""
    size = operand.shape[0]
    return lambda ndim: (1, size) + (1,) * (ndim - 2)


def _claimed(owned: Owned, arguments: dict[str, Any], sites: Sequence[Site]) -> bool:
    """Every owned operand among the arguments is one of the sites, and there is a site."""
    claimed = [s.operand for s in sites]
    return bool(sites) and not any(owned(v) and all(v is not c for c in claimed) for v in arguments.values())


@rule(lambda input, weight, bias=None: None, F.linear)
def linear(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    x, w, b = a["input"], a["weight"], a["bias"]
    if w.ndim != 2 or x.ndim < 2:
        return None
    sites = ([outer(w, True)] if owned(w) else []) + ([summed(b, last_axes(b))] if owned(b) else [])
    return Call((x,) if owned(w) else (), features_last, tuple(sites)) if _claimed(owned, a, sites) else None


@rule(
    lambda input, other: None, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, Tensor.__rmatmul__
)
def matmul(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
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

    def build(_: Layout, delta: Tensor, x: Tensor) -> Form:
        k, m, n = (prod(size[i] for i in letters) for letters in (blocks, rows, columns))
        left, right = delta.reshape(len(delta), -1, k, m), x.reshape(len(x), -1, k, n)
        if k == 1 and of_w == rows + columns:
            return Outer(left[:, :, 0], right[:, :, 0])
        if k == 1 and of_w == columns + rows:
            return Outer(right[:, :, 0], left[:, :, 0])
        return Blocks(left, right, arrange)

    saved = x.permute([of_x.index(i) for i in tokens + blocks + columns])
    seen = [out.index(i) for i in tokens + blocks + rows]
    axes = range(len(tokens))
    return Call((saved,), lambda _: axes, (Site(w, _as_given, build),), lambda out: out.permute(seen))


@rule(lambda input, mat1, mat2, beta=1, alpha=1: None, torch.addmm, Tensor.addmm)
def addmm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    b, x, w = a["input"], a["mat1"], a["mat2"]
    if a["beta"] != 1 or a["alpha"] != 1 or owned(x):
        return None
    sites = ([outer(w, False)] if owned(w) else []) + ([summed(b, last_axes(b))] if owned(b) else [])
    return Call((x,) if owned(w) else (), features_last, tuple(sites)) if _claimed(owned, a, sites) else None


@rule(
    lambda input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False: None,
    F.embedding,
)
def embedding(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    index, w, padding = a["input"], a["weight"], a["padding_idx"]
    if a["scale_grad_by_freq"] or a["max_norm"] is not None or index.ndim < 1:
        return None
    rows = w.shape[0]
    if padding is not None and padding < 0:
        padding += rows

    def prepare(delta: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        kept = delta if padding is None else delta.masked_fill((index == padding).unsqueeze(-1), 0)
        return kept, index

    return _lookup(w, index, prepare)


@rule(lambda input, index: None, Tensor.__getitem__)
def gather(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    """`weight[index]` with an integer tensor: an embedding without a module."""
    index = a["index"]
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool or index.ndim < 1:
        return None
    wrapped = torch.where(index < 0, index + a["input"].shape[0], index)
    return _lookup(a["input"], wrapped, _as_given) if a["input"].ndim == 2 else None


def _lookup(w: Tensor, index: Tensor, prepare: Prepare) -> Call:
    rows = w.shape[0]

    def build(_: Layout, delta: Tensor, index: Tensor) -> Form:
        k = index.shape[0]
        return Lookup(index.reshape(k, -1), delta.reshape(k, -1, delta.shape[-1]), rows)

    return Call((index,), features_last, (Site(w, prepare, build),))


@rule(lambda input, weight: None, torch.prelu, F.prelu)
def prelu(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    x, w = a["input"], a["weight"]
    if owned(x) or x.ndim < 2:
        return None
    aligned = channel_axis(w) if w.numel() > 1 else last_axes(w)
    slopes = summed(w, aligned, lambda delta, x: (torch.mul(*_raised(delta, x.clamp(max=0))),))
    return Call((x,), lambda out: [k for k in range(out.ndim) if k != 1 or w.numel() == 1], (slopes,))


def _norm(
    owned: Owned,
    a: dict[str, Any],
    normalised: Callable[[Tensor], Tensor],
    aligned: Callable[[Tensor], Callable[[int], Sequence[int]]],
    sample_axes: Callable[[Tensor], Sequence[int]],
) -> Call | None:
    """`y = xhat * weight + bias`: the gain sees `delta * xhat`, recomputed by the same function without affine part."""
    x, w = a["input"], a["weight"]
    b: Any = a.get("bias")
    sites = []
    if owned(w):
        sites.append(summed(w, aligned(w), lambda delta, x: (torch.mul(*_raised(delta, normalised(x))),)))
    if owned(b):
        sites.append(summed(b, aligned(b)))
    return Call((x,), sample_axes, tuple(sites)) if _claimed(owned, a, sites) else None


def _first_axis(out: Tensor) -> range:
    return range(1)


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
    return _norm(owned, a, lambda x: F.group_norm(x, groups, None, None, eps), channel_axis, _first_axis)


@rule(
    lambda input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5: None,
    F.batch_norm,
)
def batch_norm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    """Evaluation mode only; with batch statistics samples have no gradients of their own."""
    if a["training"]:
        return None
    mean, var, eps = a["running_mean"], a["running_var"], a["eps"]
    normalised = lambda x: F.batch_norm(x, mean, var, None, None, False, 0.0, eps)
    return _norm(owned, a, normalised, channel_axis, _first_axis)


@rule(F.instance_norm, F.instance_norm)
def instance_norm(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    """With statistics of each sample alone."""
    if not a["use_input_stats"] or a["running_mean"] is not None:
        return None
    eps = a["eps"]
    normalised = lambda x: F.instance_norm(x, None, None, None, None, True, 0.0, eps)
    return _norm(owned, a, normalised, channel_axis, _first_axis)


def _convolution(nd: int, transposed: bool) -> Rule:
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

        def build(layout: Layout, delta: Tensor, x: Tensor) -> Form:
            if layout.fold == "whole":
                delta, x = delta.unsqueeze(1), x.unsqueeze(1)
            return Convolution(x, delta, kernel, settings)

        sites = ([Site(w, _as_given, build)] if owned(w) else []) + ([summed(b, channel_axis(b))] if owned(b) else [])
        return Call((x,) if owned(w) else (), _first_axis, tuple(sites)) if _claimed(owned, a, sites) else None

    return convolution


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int] | None:
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


def spread(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Attention's arguments with the mask (relative position bias) expanded to one copy per sample; None without."""
    names = ("query", "key", "value", "attn_mask")
    a = {**dict(zip(names, args, strict=False)), **kwargs}
    mask, query, key = a.get("attn_mask"), a["query"], a["key"]
    if mask is None or len(args) > len(names):
        return None
    return {**a, "attn_mask": mask.expand(*query.shape[:-1], key.shape[-2])}


SPREADING = (Tensor.expand, Tensor.repeat, Tensor.broadcast_to, torch.broadcast_to)


@rule(lambda input, *size: None, *SPREADING)
def expand(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    """One copy per sample: consumed where it is expanded."""
    operand = a["input"]
    if func is Tensor.repeat and any(n != 1 for n in operand.shape[:1]):
        return None
    return _elementwise(operand, None, _delta)


def _elementwise(operand: Tensor, other: Any, prepare: Prepare) -> Call | None:
    """A broadcast operand: samples lie where its aligned size is 1."""
    aligned = last_axes(operand)
    saved = (other,) if isinstance(other, Tensor) else ()
    return Call(
        saved,
        lambda out: [k for k, size in enumerate(aligned(out.ndim)) if size == 1],
        (summed(operand, aligned, prepare),),
    )


def _pair(owned: Owned, a: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """(operand, activation) when exactly one of the two is owned and both are tensors."""
    x, y = a["input"], a["other"]
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or owned(x) == owned(y):
        return None
    return (x, y) if owned(x) else (y, x)


@rule(
    lambda input, other: None, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply
)
def multiply(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    pair = _pair(owned, a)
    return pair and _elementwise(*pair, lambda delta, other: (torch.mul(*_raised(delta, other)),))


@rule(
    lambda input, other, alpha=1: None,
    torch.add,
    Tensor.add,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__iadd__,
    Tensor.add_,
)
def add(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    pair = _pair(owned, a)
    if pair is None or a["alpha"] != 1 or (func in (Tensor.__iadd__, Tensor.add_) and owned(a["input"])):
        return None
    return _elementwise(pair[0], None, _delta)


@rule(lambda input, other, alpha=1: None, torch.sub, Tensor.sub, Tensor.__sub__, Tensor.subtract, torch.subtract)
def subtract(owned: Owned, func: Callable[..., Any], a: dict[str, Any]) -> Call | None:
    pair = _pair(owned, a)
    if pair is None or a["alpha"] != 1:
        return None
    return _elementwise(pair[0], None, _delta if owned(a["input"]) else lambda delta: (-delta,))
