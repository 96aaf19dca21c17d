"""One pass over the graph: every tensor gets a gauge, every operator states its demands."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from noetherflow.discovery.export import Graph, module_path, operator_name
from noetherflow.discovery.gauges import AxisAtoms, Gauge
from noetherflow.discovery.rules import Context, find_rule, gauges_in
from noetherflow.discovery.store import Store
from noetherflow.symmetry.symmetry_set import UnknownOperator


@dataclass(frozen=True, eq=False)
class Inference:
    """What one pass collected: the store of demands, the nodes by number, the operators without a rule."""

    graph: Graph
    store: Store
    nodes: tuple[fx.Node, ...]
    unknown: tuple[UnknownOperator, ...]

    def place(self, node: int) -> str:
        """`module path (operator)` of a node."""
        here = self.nodes[node]
        if here.op == "output":
            return "the model's output"
        path = module_path(here)
        return f"{path} ({operator_name(here)})" if path else operator_name(here)


def axis_atoms(shape: tuple[int, ...], uses: Sequence[fx.Node], placeholder: fx.Node) -> list[AxisAtoms]:
    """Which axes of a parameter carry coordinates of their own.

    Up to two axes longer than 1: each by itself; a number is seen as a vector of one entry. What becomes a convolution
    weight: output and input channels (grouped: the view `[groups, out / groups, in / groups, ...]`). A stack of
    matrices: the first axis jointly with each of the others.
    """
    if not shape:
        return [AxisAtoms((0,), view=(1,))]
    long = [a for a, n in enumerate(shape) if n > 1] or [0]
    convolution = _convolution(uses, placeholder)
    if convolution is not None:
        return _convolution_atoms(shape, int(_argument(convolution, "groups", 1)))
    if len(long) <= 2:
        return [AxisAtoms((a,)) for a in long]
    return [AxisAtoms((long[0], a), slices=shape[long[0]]) for a in long[1:]]


def _convolution(uses: Sequence[fx.Node], placeholder: fx.Node) -> fx.Node | None:
    """The convolution whose weight a parameter is, or becomes through tensors of its own shape."""
    shape, seen, left = _shapes(placeholder)[0], {placeholder}, [(placeholder, node) for node in uses]
    while left:
        source, node = left.pop()
        if "conv" in operator_name(node) and len(node.args) > 1 and node.args[1] is source:
            return node
        if node not in seen and shape in _shapes(node)[:1]:
            seen.add(node)
            left += [(node, user) for user in node.users]
    return None


def _convolution_atoms(shape: tuple[int, ...], groups: int) -> list[AxisAtoms]:
    if groups == 1:
        return [AxisAtoms((0,)), AxisAtoms((1,))]
    view = (groups, shape[0] // groups, *shape[1:])
    return [AxisAtoms((0,), slices=groups), AxisAtoms((0, 2), view, groups)]


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else default


def axis_atoms_of(graph: Graph) -> dict[str, list[AxisAtoms]]:
    """For every parameter the graph uses, the axes that carry atoms."""
    out: dict[str, list[AxisAtoms]] = {}
    for node in graph.nodes:
        name = graph.leaves.get(node.name, "") if node.op == "placeholder" else ""
        if name in graph.parameters and node.users:
            out[name] = axis_atoms(graph.shapes[name], list(node.users), node)
    return out


def infer(graph: Graph) -> Inference:
    """Run every rule once, in graph order (twice if stacks of matrices are indexed by data)."""
    store = Store()
    nodes = tuple(graph.nodes)
    env: dict[fx.Node, Any] = {}
    leaves: dict[str, Gauge] = {}
    unknown: dict[tuple[str, str], UnknownOperator] = {}
    users: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if node.op == "placeholder" and node.name in graph.leaves:
            users.setdefault(graph.leaves[node.name], []).extend(node.users)

    def leaf(name: str, node: fx.Node | None, exponent: float = 1.0) -> Gauge:
        if name not in leaves:
            shape = graph.shapes[name]
            plan = [AxisAtoms((0,))] if node is None else axis_atoms(shape, users.get(name, []), node)
            gauge = store.leaf(name, shape or (1,), plan, exponent)
            scalars = tuple(replace(f, ids=f.ids.reshape(shape)) for f in gauge.fields) if not shape else gauge.fields
            leaves[name] = replace(gauge, shape=shape, fields=scalars)
        return leaves[name]

    def buffer(gauge: Gauge, exponent: float) -> Gauge:
        return leaf(gauge.leaf, None, exponent) if gauge.leaf else Gauge(gauge.shape)

    def value(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if argument.op == "placeholder" and graph.leaves.get(argument.name) in graph.parameters:
                gauge = leaf(graph.leaves[argument.name], argument)
                return replace(gauge, fields=store.simplify(gauge.fields))
            found = env[argument]
            if isinstance(found, Gauge):
                return replace(found, fields=store.simplify(found.fields))
            return found
        if isinstance(argument, (list, tuple)):
            return [value(a) for a in argument]
        if isinstance(argument, dict):
            return {k: value(v) for k, v in argument.items()}
        return argument

    offset, asked = 0, False

    def stand_in(count: int, length: int) -> Tensor | None:
        """Positions that meet every entry of an axis of `length`; a second pass with other ones makes that sound."""
        nonlocal asked
        if count < length:
            return None
        asked = True
        return (torch.arange(count) + offset) % length

    def run() -> None:
        env.clear()
        for number, node in enumerate(nodes):
            store.node = number
            visit(node)

    def visit(node: fx.Node) -> None:
        if node.op == "placeholder":
            shape = _shapes(node)[0]
            name = graph.leaves.get(node.name, "")
            marks = frozenset() if name or node.name in graph.constants else frozenset({"data"})
            env[node] = Gauge(shape or (), leaf=name, marks=marks)
        elif node.op == "get_attr":
            env[node] = Gauge(_shapes(node)[0] or ())
        elif node.op == "output":
            for gauge in gauges_in(value(node.args)):
                store.vanish(gauge.fields, "is an output")
        elif node.op == "call_function":
            env[node] = _apply(store, node, value, (buffer, stand_in), unknown)

    run()
    if asked:
        offset = 1
        run()
    return Inference(graph, store, nodes, tuple(unknown.values()))


def _apply(store: Store, node: fx.Node, value: Any, services: tuple, unknown: dict) -> Any:
    args, kwargs = value(node.args), value(node.kwargs)
    if node.target is operator.getitem:
        container = args[0]
        return container[args[1]] if isinstance(container, list) else container
    shapes = _shapes(node)
    if not any(shape is not None for shape in shapes):
        return node.meta.get("val")
    name = operator_name(node)
    inputs = gauges_in([args, kwargs])
    rule = find_rule(name)
    if rule is None:
        if any(g.fields for g in inputs):
            key = (name, module_path(node))
            seen = unknown.get(key)
            unknown[key] = UnknownOperator(name, node.name, module_path(node), 1 if seen is None else seen.count + 1)
        for gauge in inputs:
            store.vanish(gauge.fields, f"passes {name}, which has no rule")
        out: Any = [Gauge(shape or ()) for shape in shapes]
        out = out if isinstance(node.meta.get("val"), (list, tuple)) else out[0]
    else:
        out = rule(Context(store, node, shapes, *services), *args, **kwargs)
    if any("data" in g.marks for g in inputs):
        out = _marked(out)
    return out


def _marked(out: Any) -> Any:
    if isinstance(out, list):
        return [_marked(g) for g in out]
    if "stack" in out.marks:
        return out
    return replace(out, marks=out.marks | {"data"})


def _shapes(node: fx.Node) -> tuple[tuple[int, ...] | None, ...]:
    """Output shapes; None for outputs that are no tensors."""
    out = node.meta.get("val")
    listed = out if isinstance(out, (list, tuple)) else [out]
    return tuple(tuple(int(n) for n in v.shape) if isinstance(v, Tensor) else None for v in listed)
