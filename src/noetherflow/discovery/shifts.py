"""Translations: directions of a parameter that softmax or a normalisation ignores (theory.md section 2, last row).

A second, additive pass over the graph. A *term* says which shifts a tensor carries: `label` numbers the free shift of
every entry (0: none), and two entries with equal `value` are shifted by the same amount. A softmax absorbs a shift
that is uniform along its axis, a layer norm one that is uniform over what it normalises; whatever else meets a shift
kills it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from noetherflow.discovery.export import Graph, operator_name
from noetherflow.discovery.gauges import narrow
from noetherflow.discovery.rules.linear import LETTERS
from noetherflow.legs import Leg
from noetherflow.symmetry import Translation

Family = str


@dataclass(frozen=True, eq=False)
class Term:
    label: Tensor
    value: Tensor

    def uniform(self, axes: Sequence[int]) -> bool:
        return all(self.value.shape[a] == 1 and self.label.shape[a] == 1 for a in axes)

    def map(self, act: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Term:
        return Term(*(narrow(act(t.expand(*shape))) for t in (self.label, self.value)))

    def aligned(self, ndim: int) -> Term:
        lead = [1] * (ndim - self.label.ndim)
        return Term(self.label.reshape(*lead, *self.label.shape), self.value.reshape(*lead, *self.value.shape))


Terms = tuple[Term, ...]


@dataclass(eq=False)
class _Shifts:
    """Free shifts by number: what they move, whether something killed or absorbed them."""

    leaf: list[tuple[str, int, int]] = field(default_factory=lambda: [("", 0, 0)])
    members: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    dead: set[int] = field(default_factory=set)
    absorbed: dict[int, Family] = field(default_factory=dict)

    def new(self, leaf: str, axis: int, row: int, members: tuple[int, ...] = ()) -> int:
        self.leaf.append((leaf, axis, row))
        self.members.append(members)
        return len(self.leaf) - 1

    def _all(self, terms: Sequence[Term]) -> set[int]:
        found = {int(x) for t in terms for x in np.unique(t.label.numpy())} - {0}
        pending = list(found)
        while pending:
            inner = self.members[pending.pop()]
            pending += [m for m in inner if m not in found]
            found.update(inner)
        return found

    def kill(self, terms: Sequence[Term]) -> None:
        self.dead |= self._all(terms)

    def absorb(self, terms: Sequence[Term], axes: Sequence[int], family: Family) -> None:
        for term in terms:
            if not term.uniform(axes):
                self.kill([term])
                continue
            for label in self._all([term]):
                if self.absorbed.get(label) != "null":
                    self.absorbed[label] = family

    def alive(self, term: Term) -> bool:
        return not self._all([term]) <= self.dead


def find_translations(graph: Graph) -> list[Translation]:
    """Every translation `X -> X + u c^T` of one parameter that leaves the outputs as they are."""
    shifts = _Shifts()
    leaves: dict[str, Terms] = {}
    env: dict[fx.Node, Any] = {}

    def value(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            name = graph.leaves.get(argument.name, "") if argument.op == "placeholder" else ""
            if name in graph.parameters:
                if name not in leaves:
                    leaves[name] = _leaf_terms(shifts, name, graph.shapes[name])
                return leaves[name]
            return env.get(argument, ())
        if isinstance(argument, (list, tuple)):
            return [value(a) for a in argument]
        return argument

    for node in graph.nodes:
        if node.op == "call_function":
            env[node] = _visit(
                shifts, node, [value(a) for a in node.args], {k: value(v) for k, v in node.kwargs.items()}
            )
        elif node.op == "output":
            shifts.kill(_terms(value(node.args)))
    return _collect(shifts, graph)


def _leaf_terms(shifts: _Shifts, name: str, shape: tuple[int, ...]) -> Terms:
    terms = []
    for axis, size in enumerate(shape):
        if size < 2:
            continue
        label = torch.full([1] * len(shape), shifts.new(name, axis, -1))
        others = [1 if a == axis else n for a, n in enumerate(shape)]
        terms.append(Term(label, torch.arange(int(np.prod(others))).reshape(others)))
    if len(shape) == 1:
        labels = torch.tensor([shifts.new(name, 0, row) for row in range(shape[0])])
        terms.append(Term(labels, labels))
    return tuple(terms)


def _terms(value: Any) -> list[Term]:
    if isinstance(value, Term):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _terms(v)]
    return [t for v in value for t in _terms(v)] if isinstance(value, (list, tuple)) else []


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


def _visit(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    every = _terms([args, kwargs])
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


def _move(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    shape, target = _shape(node.args[0]), node.target
    if any(_terms(a) for a in args[1:]):
        shifts.kill(_terms(args))
        return ()
    if "view" in operator_name(node) or "reshape" in operator_name(node):
        new = _shape(node)
        return tuple(t.map(lambda ids: ids.reshape(new), shape) for t in args[0])
    return tuple(t.map(lambda ids: target(ids, *args[1:], **kwargs), shape) for t in args[0])  # type: ignore[operator]


def _split(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> list[Terms]:
    shape, target = _shape(node.args[0]), node.target
    pieces: list[list[Term]] = [[] for _ in node.meta["val"]]
    for t in args[0]:
        labels, values = (target(x.expand(*shape), *args[1:], **kwargs) for x in (t.label, t.value))  # type: ignore[operator]
        for piece, a, b in zip(pieces, labels, values, strict=True):
            piece.append(Term(narrow(a), narrow(b)))
    return [tuple(p) for p in pieces]


def _add(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    n = len(_shape(node))
    return tuple(t.aligned(n) for a in args[:2] for t in _terms(a))


def _scale(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    if isinstance(args[1], (int, float)) or (_shape(node.args[1]) in ((), (1,)) and not _terms(args[1])):
        return args[0]
    shifts.kill(_terms(args))
    return ()


def _masked_fill(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    if isinstance(args[2], (int, float)) and args[2] < HIDDEN:
        return args[0]
    shifts.kill(_terms(args))
    return ()


def _where(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    if isinstance(args[2], (int, float)) and args[2] < HIDDEN:
        return tuple(t.aligned(len(_shape(node))) for t in _terms(args[1]))
    shifts.kill(_terms(args))
    return ()


def _cat(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    shape = _shape(node)
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    sizes = [_shape(x)[axis] for x in node.args[0]]  # type: ignore[union-attr]
    out = []
    for k, terms in enumerate(args[0]):
        before, after = sum(sizes[:k]), sum(sizes[k + 1 :])
        for t in _terms(terms):
            pieces = []
            for ids, blank in ((t.label, 0), (t.value, -1)):
                own = ids.expand([sizes[k] if a == axis else n for a, n in enumerate(ids.shape)])
                ends = [[width if a == axis else n for a, n in enumerate(ids.shape)] for width in (before, after)]
                first, last = (torch.full(end, blank) for end in ends)
                pieces.append(narrow(torch.cat((first, own, last), axis)))
            out.append(Term(*pieces))
    return tuple(out)


def _product(shifts: _Shifts, node: fx.Node, sides: Sequence[tuple[Any, Any]], spec: str) -> Terms:
    """Shifts of either factor of `einsum(spec)`: uniform along own uniform axes that the other factor lacks."""
    inputs, output = spec.split("->")
    names = inputs.split(",")
    out = []
    for own, (_, terms) in enumerate(sides):
        mine, other = names[own], names[1 - own]
        for t in _terms(terms):
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
            term = Term(spread, torch.arange(int(np.prod(sizes))).reshape(sizes))
            if all(n > 1 or full == 1 for n, full in zip(sizes, _shape(node), strict=True)):
                shifts.kill([term])
            else:
                out.append(term)
    return tuple(out)


def _grouped(shifts: _Shifts, label: Tensor, axes: Sequence[int]) -> Tensor:
    """Shifts that a sum over `axes` ties together, as one new shift per remaining position."""
    rest = [a for a in range(label.ndim) if a not in axes]
    flat = label.permute(*rest, *axes).reshape([label.shape[a] for a in rest] + [-1])
    rows = flat.reshape(-1, flat.shape[-1])
    fresh = [shifts.new("", 0, 0, tuple({int(x) for x in row} - {0})) for row in rows.tolist()]
    sizes = [1 if a in axes else label.shape[a] for a in range(label.ndim)]
    return torch.tensor(fresh).reshape([label.shape[a] for a in rest]).reshape(sizes)


def _bias(shifts: _Shifts, node: fx.Node, bias: Any, axis: int = -1) -> Terms:
    n = len(_shape(node))
    sizes = [-1 if a == axis % n else 1 for a in range(n)]
    return tuple(Term(t.label.reshape(sizes), t.value.reshape(sizes)) for t in _terms(bias))


def _linear(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    lead = LETTERS[: len(_shape(node.args[0])) - 1]
    sides = [(node.args[0], args[0]), (node.args[1], args[1])]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return (*_product(shifts, node, sides, f"{lead}z,yz->{lead}y"), *_bias(shifts, node, bias))


def _matmul(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    x, y = node.args[0], node.args[1]
    lead = LETTERS[: len(_shape(node)) - 2]
    if len(_shape(x)) < 2 or len(_shape(y)) < 2:
        shifts.kill(_terms(args))
        return ()
    own, other = (lead[len(lead) - len(_shape(s)) + 2 :] for s in (x, y))
    return _product(shifts, node, [(x, args[0]), (y, args[1])], f"{own}yz,{other}zx->{lead}yx")


def _addmm(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    sides = [(node.args[1], args[1]), (node.args[2], args[2])]
    return (*_product(shifts, node, sides, "yz,zx->yx"), *_bias(shifts, node, args[0]))


def _convolution(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    """Only the output channels of the weight and the bias survive a convolution."""
    shape = _shape(node)
    sizes = [1 if a == 1 else n for a, n in enumerate(shape)]
    out = []
    plain = (args[6] if len(args) > 6 else kwargs.get("groups", 1)) == 1
    shifts.kill(_terms(args[0]))
    for t in _terms(args[1]):
        if plain and t.uniform([0]):
            out.append(Term(t.label.reshape([1] * len(shape)), torch.arange(int(np.prod(sizes))).reshape(sizes)))
        else:
            shifts.kill([t])
    return (*out, *_bias(shifts, node, args[2] if len(args) > 2 else None, axis=1))


def _embedding(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    lead, width = _shape(node)[:-1], _shape(node)[-1]
    out = []
    for t in _terms(args[0]):
        if t.label.numel() > 1:
            shifts.kill([t])
            continue
        over_rows = t.value.shape[0] == 1
        sizes = [*([1] * len(lead) if over_rows else lead), 1 if t.value.shape[1] == 1 else width]
        out.append(Term(t.label.reshape([1] * len(sizes)), torch.arange(int(np.prod(sizes))).reshape(sizes)))
    return tuple(out)


def _index(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    if len(_shape(node.args[0])) == 2 and len(args[1]) == 1:
        return _embedding(shifts, node, args, kwargs)
    shifts.kill(_terms(args))
    return ()


def _layer_norm(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    count = len(args[1])
    shape = _shape(node)
    shifts.absorb(_terms(args[0]), list(range(len(shape) - count, len(shape))), "null")
    shifts.kill(_terms(args[2]) if len(args) > 2 else [])
    bias = _terms(args[3]) if len(args) > 3 and count == 1 else []
    if len(args) > 3 and count != 1:
        shifts.kill(_terms(args[3]))
    out = _bias(shifts, node, bias)
    return [out, (), ()] if isinstance(node.meta.get("val"), (list, tuple)) else out


def _softmax(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    axis = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    shifts.absorb(_terms(args[0]), [axis % len(_shape(node))], "translation")
    return ()


def _attention(shifts: _Shifts, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Terms:
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    shifts.kill([*_terms(args[0]), *_terms(args[2])])
    rank = len(_shape(node))
    shifts.absorb(_terms(args[1]), [rank - 2], "translation")
    for t in _terms(mask):
        shifts.absorb([t], [t.label.ndim - 1], "translation")
    return ()


RULES: dict[str, Callable[[_Shifts, fx.Node, list[Any], dict[str, Any]], Any]] = {
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


def _collect(shifts: _Shifts, graph: Graph) -> list[Translation]:
    """Surviving shifts as translations: whole axes, and rows of vectors that are free one by one."""
    rows: dict[tuple[str, str], list[int]] = {}
    whole: dict[tuple[str, int], str] = {}
    for number, family in sorted(shifts.absorbed.items()):
        leaf, axis, row = shifts.leaf[number]
        if not leaf or number in shifts.dead:
            continue
        if row >= 0:
            rows.setdefault((leaf, family), []).append(row)
        else:
            whole[(leaf, axis)] = family
    out = []
    for (leaf, family), free in rows.items():
        index = np.array(free, dtype=np.int64)[:, None, None]
        name = f"{leaf} rows {free[0]}-{free[-1]} [shift]"
        out.append(Translation(name, family, Leg(leaf, index), note="every row on its own"))  # type: ignore[arg-type]
        if len(free) == graph.shapes[leaf][0]:
            whole.pop((leaf, 0), None)
    for (leaf, axis), family in whole.items():
        size = graph.shapes[leaf][axis]
        leg = Leg(leaf, np.arange(size, dtype=np.int64).reshape(1, size, 1), axes=(axis,))
        out.append(Translation(f"{leaf} axis {axis} [shift]", family, leg))  # type: ignore[arg-type]
    return out
