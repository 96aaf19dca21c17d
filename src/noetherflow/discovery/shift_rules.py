"""How operators pass, absorb or kill the shifts of their inputs: one short function per operator (see `shifts.py`)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from noetherflow.discovery.export import operator_name
from noetherflow.discovery.gauges import narrow
from noetherflow.discovery.rules.linear import LETTERS

TranslationFamily = str


@dataclass(frozen=True, eq=False)
class ShiftTerm:
    label: Tensor
    value: Tensor

    def uniform(self, axes: Sequence[int]) -> bool:
        return all(self.value.shape[a] == 1 and self.label.shape[a] == 1 for a in axes)

    def map(self, act: Callable[[Tensor], Tensor], shape: Sequence[int]) -> ShiftTerm:
        return ShiftTerm(*(narrow(act(t.expand(*shape))) for t in (self.label, self.value)))

    def aligned(self, ndim: int) -> ShiftTerm:
        lead = [1] * (ndim - self.label.ndim)
        return ShiftTerm(self.label.reshape(*lead, *self.label.shape), self.value.reshape(*lead, *self.value.shape))


ShiftTerms = tuple[ShiftTerm, ...]


@dataclass(eq=False)
class ShiftStore:
    """Free shifts by number: what they move, whether something killed or absorbed them."""

    leaf: list[tuple[str, int, int]] = field(default_factory=lambda: [("", 0, 0)])
    members: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    dead: set[int] = field(default_factory=set)
    absorbed: dict[int, TranslationFamily] = field(default_factory=dict)

    def new(self, leaf: str, axis: int, row: int, members: tuple[int, ...] = ()) -> int:
        self.leaf.append((leaf, axis, row))
        self.members.append(members)
        return len(self.leaf) - 1

    def _all(self, terms: Sequence[ShiftTerm]) -> set[int]:
        found = {int(x) for t in terms for x in np.unique(t.label.numpy())} - {0}
        pending = list(found)
        while pending:
            inner = self.members[pending.pop()]
            pending += [m for m in inner if m not in found]
            found.update(inner)
        return found

    def kill(self, terms: Sequence[ShiftTerm]) -> None:
        self.dead |= self._all(terms)

    def absorb(self, terms: Sequence[ShiftTerm], axes: Sequence[int], family: TranslationFamily) -> None:
        for term in terms:
            if not term.uniform(axes):
                self.kill([term])
                continue
            for label in self._all([term]):
                if self.absorbed.get(label) != "null":
                    self.absorbed[label] = family

    def alive(self, term: ShiftTerm) -> bool:
        return not self._all([term]) <= self.dead


def terms_of(value: Any) -> list[ShiftTerm]:
    if isinstance(value, ShiftTerm):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in terms_of(v)]
    return [t for v in value for t in terms_of(v)] if isinstance(value, (list, tuple)) else []


def _shape(node: Any) -> tuple[int, ...]:
    out = node.meta.get("val") if isinstance(node, fx.Node) else None
    first = out[0] if isinstance(out, (list, tuple)) and out else out
    return tuple(int(n) for n in first.shape) if isinstance(first, Tensor) else ()


PASS = frozenset(
    ("clone", "detach", "alias", "contiguous", "_to_copy", "to", "neg", "dropout", "lift_fresh_copy", "native_dropout")
)
MOVE = frozenset(
    ("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "flip", "roll")
    + ("repeat", "slice", "select", "narrow")
)
HIDDEN = -1e30
"""A constant below this in front of a softmax hides an entry, whatever shift the others have."""


def visit(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    every = terms_of([args, kwargs])
    if node.target is operator.getitem:
        return args[0][args[1]] if isinstance(args[0], list) and args[0] else ()
    if not every or node.meta.get("val") is None:
        return ()
    name = operator_name(node).removeprefix("aten.").split(".")[0]
    rule = RULES.get(name)
    if name in MOVE:
        rule = _move
    elif name in PASS:
        return args[0]
    if rule is None or not _shape(node):
        shifts.kill(every)
        return ()
    out = rule(shifts, node, args, kwargs)
    return out if isinstance(out, list) else tuple(t for t in out if shifts.alive(t))


def _move(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    shape, target = _shape(node.args[0]), node.target
    if any(terms_of(a) for a in args[1:]):
        shifts.kill(terms_of(args))
        return ()
    if "view" in operator_name(node) or "reshape" in operator_name(node):
        new = _shape(node)
        return tuple(t.map(lambda ids: ids.reshape(new), shape) for t in args[0])
    return tuple(t.map(lambda ids: target(ids, *args[1:], **kwargs), shape) for t in args[0])  # type: ignore[operator]


def _split(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> list[ShiftTerms]:
    shape, target = _shape(node.args[0]), node.target
    pieces: list[list[ShiftTerm]] = [[] for _ in node.meta["val"]]
    for t in args[0]:
        labels, values = (target(x.expand(*shape), *args[1:], **kwargs) for x in (t.label, t.value))  # type: ignore[operator]
        for piece, a, b in zip(pieces, labels, values, strict=True):
            piece.append(ShiftTerm(narrow(a), narrow(b)))
    return [tuple(p) for p in pieces]


def _add(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    n = len(_shape(node))
    return tuple(t.aligned(n) for a in args[:2] for t in terms_of(a))


def _scale(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    if isinstance(args[1], (int, float)) or (_shape(node.args[1]) in ((), (1,)) and not terms_of(args[1])):
        return args[0]
    shifts.kill(terms_of(args))
    return ()


def _masked_fill(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    if isinstance(args[2], (int, float)) and args[2] < HIDDEN:
        return args[0]
    shifts.kill(terms_of(args))
    return ()


def _where(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    if isinstance(args[2], (int, float)) and args[2] < HIDDEN:
        return tuple(t.aligned(len(_shape(node))) for t in terms_of(args[1]))
    shifts.kill(terms_of(args))
    return ()


def _cat(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    shape = _shape(node)
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    sizes = [_shape(x)[axis] for x in node.args[0]]  # type: ignore[union-attr]
    out = []
    for k, terms in enumerate(args[0]):
        before, after = sum(sizes[:k]), sum(sizes[k + 1 :])
        for t in terms_of(terms):
            pieces = []
            for ids, blank in ((t.label, 0), (t.value, -1)):
                own = ids.expand([sizes[k] if a == axis else n for a, n in enumerate(ids.shape)])
                ends = [[width if a == axis else n for a, n in enumerate(ids.shape)] for width in (before, after)]
                first, last = (torch.full(end, blank) for end in ends)
                pieces.append(narrow(torch.cat((first, own, last), axis)))
            out.append(ShiftTerm(*pieces))
    return tuple(out)


def _product(shifts: ShiftStore, node: fx.Node, sides: Sequence[tuple[Any, Any]], spec: str) -> ShiftTerms:
    """ShiftStore of either factor of `einsum(spec)`: uniform along own uniform axes that the other factor lacks."""
    inputs, output = spec.split("->")
    names = inputs.split(",")
    out = []
    for own, (_, terms) in enumerate(sides):
        mine, other = names[own], names[1 - own]
        for t in terms_of(terms):
            summed = [k for k, c in enumerate(mine) if c not in output]
            label = t.label
            label = _grouped(shifts, label, summed) if any(label.shape[k] > 1 for k in summed) else label
            keep = [k for k in range(len(mine)) if k not in summed]
            label = label.reshape([label.shape[k] for k in keep])
            kept = [mine[k] for k in keep]
            sizes = []
            for a, c in enumerate(output):
                own_uniform = c not in kept or t.value.shape[mine.index(c)] == 1
                long = _shape(node)[a] if c in other or not own_uniform else 1
                sizes.append(long)
            order = [kept.index(c) for c in output if c in kept]
            placed = iter(label.permute(order).shape)
            spread = label.permute(order).reshape([next(placed) if c in kept else 1 for c in output])
            term = ShiftTerm(spread, torch.arange(int(np.prod(sizes))).reshape(sizes))
            if all(n > 1 or full == 1 for n, full in zip(sizes, _shape(node), strict=True)):
                shifts.kill([term])
            else:
                out.append(term)
    return tuple(out)


def _grouped(shifts: ShiftStore, label: Tensor, axes: Sequence[int]) -> Tensor:
    """ShiftStore that a sum over `axes` ties together, as one new shift per remaining position."""
    rest = [a for a in range(label.ndim) if a not in axes]
    flat = label.permute(*rest, *axes).reshape([label.shape[a] for a in rest] + [-1])
    rows = flat.reshape(-1, flat.shape[-1])
    fresh = [shifts.new("", 0, 0, tuple({int(x) for x in row} - {0})) for row in rows.tolist()]
    sizes = [1 if a in axes else label.shape[a] for a in range(label.ndim)]
    return torch.tensor(fresh).reshape([label.shape[a] for a in rest]).reshape(sizes)


def _bias(shifts: ShiftStore, node: fx.Node, bias: Any, axis: int = -1) -> ShiftTerms:
    n = len(_shape(node))
    sizes = [-1 if a == axis % n else 1 for a in range(n)]
    return tuple(ShiftTerm(t.label.reshape(sizes), t.value.reshape(sizes)) for t in terms_of(bias))


def _linear(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    lead = LETTERS[: len(_shape(node.args[0])) - 1]
    sides = [(node.args[0], args[0]), (node.args[1], args[1])]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return (*_product(shifts, node, sides, f"{lead}z,yz->{lead}y"), *_bias(shifts, node, bias))


def _matmul(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    x, y = node.args[0], node.args[1]
    lead = LETTERS[: len(_shape(node)) - 2]
    if len(_shape(x)) < 2 or len(_shape(y)) < 2:
        shifts.kill(terms_of(args))
        return ()
    own, other = (lead[len(lead) - len(_shape(s)) + 2 :] for s in (x, y))
    return _product(shifts, node, [(x, args[0]), (y, args[1])], f"{own}yz,{other}zx->{lead}yx")


def _addmm(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    sides = [(node.args[1], args[1]), (node.args[2], args[2])]
    return (*_product(shifts, node, sides, "yz,zx->yx"), *_bias(shifts, node, args[0]))


def _convolution(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    """Only the output channels of the weight and the bias survive a convolution."""
    shape = _shape(node)
    sizes = [1 if a == 1 else n for a, n in enumerate(shape)]
    out = []
    plain = (args[6] if len(args) > 6 else kwargs.get("groups", 1)) == 1
    shifts.kill(terms_of(args[0]))
    for t in terms_of(args[1]):
        if plain and t.uniform([0]):
            out.append(ShiftTerm(t.label.reshape([1] * len(shape)), torch.arange(int(np.prod(sizes))).reshape(sizes)))
        else:
            shifts.kill([t])
    return (*out, *_bias(shifts, node, args[2] if len(args) > 2 else None, axis=1))


def _embedding(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    lead, width = _shape(node)[:-1], _shape(node)[-1]
    out = []
    for t in terms_of(args[0]):
        if t.label.numel() > 1:
            shifts.kill([t])
            continue
        over_rows = t.value.shape[0] == 1
        sizes = [*([1] * len(lead) if over_rows else lead), 1 if t.value.shape[1] == 1 else width]
        out.append(ShiftTerm(t.label.reshape([1] * len(sizes)), torch.arange(int(np.prod(sizes))).reshape(sizes)))
    return tuple(out)


def _index(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    if len(_shape(node.args[0])) == 2 and len(args[1]) == 1:
        return _embedding(shifts, node, args, kwargs)
    shifts.kill(terms_of(args))
    return ()


def _layer_norm(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    count = len(args[1])
    shape = _shape(node)
    shifts.absorb(terms_of(args[0]), list(range(len(shape) - count, len(shape))), "null")
    shifts.kill(terms_of(args[2]) if len(args) > 2 else [])
    bias = terms_of(args[3]) if len(args) > 3 and count == 1 else []
    if len(args) > 3 and count != 1:
        shifts.kill(terms_of(args[3]))
    out = _bias(shifts, node, bias)
    return [out, (), ()] if isinstance(node.meta.get("val"), (list, tuple)) else out


def _softmax(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    axis = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    shifts.absorb(terms_of(args[0]), [axis % len(_shape(node))], "translation")
    return ()


def _attention(shifts: ShiftStore, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> ShiftTerms:
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    shifts.kill([*terms_of(args[0]), *terms_of(args[2])])
    rank = len(_shape(node))
    shifts.absorb(terms_of(args[1]), [rank - 2], "translation")
    for t in terms_of(mask):
        shifts.absorb([t], [t.label.ndim - 1], "translation")
    return ()


RULES: dict[str, Callable[[ShiftStore, fx.Node, list[Any], dict[str, Any]], Any]] = {
    "add": _add,
    "sub": _add,
    "mul": _scale,
    "div": _scale,
    "masked_fill": _masked_fill,
    "where": _where,
    "cat": _cat,
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _addmm,
    "embedding": _embedding,
    "index": _index,
    "layer_norm": _layer_norm,
    "native_layer_norm": _layer_norm,
    "softmax": _softmax,
    "_softmax": _softmax,
    "log_softmax": _softmax,
    "_log_softmax": _softmax,
    "scaled_dot_product_attention": _attention,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _split,
    "unbind": _split,
    **{f"conv{k}d": _convolution for k in (1, 2, 3)},
}
