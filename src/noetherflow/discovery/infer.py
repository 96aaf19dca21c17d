"""One pass over the graph: every tensor gets a gauge, every operator states its demands."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from noetherflow.discovery.axes import axis_atoms, output_shapes, stack_sides
from noetherflow.discovery.constants import known_values
from noetherflow.discovery.export import Graph, module_path, operator_name
from noetherflow.discovery.gauges import AxisAtoms, Field, Gauge
from noetherflow.discovery.offsets import Offsets, offsets_of
from noetherflow.discovery.rules import Context, find_rule, gauges_in
from noetherflow.discovery.rules.base import GaugeRule
from noetherflow.discovery.store import Store
from noetherflow.errors import ExportError
from noetherflow.symmetry.symmetry_set import UnknownOperator


@dataclass(frozen=True, eq=False)
class Inference:
    """What one pass collected: the store of demands, the nodes by number, the operators without a rule, and the
    constants that the model adds to parameters before it uses them.
    """

    graph: Graph
    store: Store
    nodes: tuple[fx.Node, ...]
    unknown: tuple[UnknownOperator, ...]
    offsets: Offsets

    def place(self, node: int) -> str:
        """`module path (operator)` of a node."""
        here = self.nodes[node]
        if here.op == "output":
            return "the model's output"
        path = module_path(here)
        return f"{path} ({operator_name(here)})" if path else operator_name(here)


def infer(graph: Graph) -> Inference:
    """Run every rule once, in graph order (twice if stacks of matrices are indexed by data)."""
    store, leaves, unknown, offsets = Store(), Leaves(graph), UnknownOperators(), offsets_of(graph)
    nodes = tuple(graph.nodes)
    known = known_values(graph)
    lookups = _free_lookups(graph, nodes, offsets.sums, known)
    first = _Pass(graph, store, leaves, unknown, offsets.sums, known, lookups, start=0)
    first.run(nodes)
    if first.stood_in:
        _Pass(graph, store, leaves, unknown, offsets.sums, known, lookups, start=1).run(nodes)
    store.end_lookups()
    store.end_decoys()
    return Inference(graph, store, nodes, unknown.listed(), offsets)


def _free_lookups(
    graph: Graph, nodes: tuple[fx.Node, ...], sums: dict[fx.Node, str], known: dict[fx.Node, Tensor]
) -> frozenset[fx.Node]:
    """The embeddings whose rows may be scaled one by one, because each goes straight into a norm of its own.

    Found by a pass for trial, in which all embeddings have free rows: those are right of which nothing was demanded.
    """
    found = frozenset(node for node in nodes if operator_name(node).startswith("aten.embedding."))
    while found:
        trial = Store()
        _Pass(graph, trial, Leaves(graph), UnknownOperators(), sums, known, found, start=0).run(nodes)
        free = frozenset(nodes[k] for k in trial.free_lookups())
        if free == found:
            break
        found = free
    return found


class Leaves:
    """The gauges of parameters and moving buffers, each made at its first use and the same at every later one."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._gauges: dict[str, Gauge] = {}
        self._users: dict[str, list[fx.Node]] = {}
        self._stacks = stack_sides(graph)
        for node in graph.nodes:
            if node.op == "placeholder" and node.name in graph.leaves:
                self._users.setdefault(graph.leaves[node.name], []).extend(node.users)

    def parameter(self, store: Store, name: str, node: fx.Node) -> Gauge:
        """The gauge of a parameter that enters the graph at `node`."""
        if name not in self._gauges:
            plan = axis_atoms(self._graph.shapes[name], self._users.get(name, []), node, self._stacks)
            self._gauges[name] = self._new(store, name, plan, 1.0)
        return self._gauges[name]

    def buffer(self, store: Store, name: str, exponent: float) -> Gauge:
        """The gauge of a buffer of one axis that moves with the weights, as `exponent` times their scale."""
        if name not in self._gauges:
            self._gauges[name] = self._new(store, name, [AxisAtoms((0,))], exponent)
        return self._gauges[name]

    def _new(self, store: Store, name: str, plan: list[AxisAtoms], exponent: float) -> Gauge:
        shape = self._graph.shapes[name]
        gauge = store.leaf(name, shape or (1,), plan, exponent)
        if shape:
            return gauge
        return replace(gauge, shape=(), fields=tuple(replace(f, ids=f.ids.reshape(())) for f in gauge.fields))


class UnknownOperators:
    """Operators without a rule that something scalable met, with how often and where."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], UnknownOperator] = {}

    def note(self, node: fx.Node) -> None:
        """Count one meeting at a node."""
        name, path = operator_name(node), module_path(node)
        before = self._found.get((name, path))
        count = 1 if before is None else before.count + 1
        self._found[(name, path)] = UnknownOperator(name, node.name, path, count)

    def listed(self) -> tuple[UnknownOperator, ...]:
        return tuple(self._found.values())


@dataclass(eq=False)
class _Pass:
    """One walk over the graph: the gauge of every node, and what rules may ask for besides."""

    graph: Graph
    store: Store
    leaves: Leaves
    unknown: UnknownOperators
    sums: dict[fx.Node, str]
    """Nodes that add a constant to a parameter which then transforms as the sum (`offsets.py`)."""
    known: dict[fx.Node, Tensor]
    lookups: frozenset[fx.Node]
    """Nodes at which data choose rows that may be scaled one by one."""
    start: int
    """Where stand-ins for unknown positions begin; a second walk with another one makes them sound."""
    stood_in: bool = False
    gauges: dict[fx.Node, Any] = field(default_factory=dict)

    def run(self, nodes: tuple[fx.Node, ...]) -> None:
        for number, node in enumerate(nodes):
            with self.store.visiting(number):
                self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            name = self.graph.leaves.get(node.name, "")
            marks = frozenset() if name or node.name in self.graph.constants else frozenset({"data"})
            self.gauges[node] = Gauge(output_shapes(node)[0] or (), leaf=name, marks=marks)
        elif node.op == "get_attr":
            self.gauges[node] = Gauge(output_shapes(node)[0] or ())
        elif node.op == "output":
            for gauge in gauges_in(self._value(node.args)):
                self.store.vanish(gauge.fields, "is an output")
        elif node.op == "call_function":
            self.gauges[node] = self._call(node)

    def _value(self, argument: Any) -> Any:
        """An argument of a node with gauges in the place of tensors."""
        if isinstance(argument, fx.Node):
            name = self.graph.leaves.get(argument.name) if argument.op == "placeholder" else None
            if name in self.graph.parameters:
                found: Any = self.leaves.parameter(self.store, name, argument)
            else:
                found = self.gauges[argument]
            return replace(found, fields=self.store.simplify(found.fields)) if isinstance(found, Gauge) else found
        if isinstance(argument, (list, tuple)):
            return [self._value(a) for a in argument]
        if isinstance(argument, dict):
            return {k: self._value(v) for k, v in argument.items()}
        return argument

    def _call(self, node: fx.Node) -> Any:
        """The gauges of an operator's results."""
        args, kwargs = self._value(node.args), self._value(node.kwargs)
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], list) else args[0]
        shapes = output_shapes(node)
        if not any(shape is not None for shape in shapes):
            return node.meta.get("val")
        inputs = gauges_in([args, kwargs])
        if node in self.sums:
            (summed,) = [g for g in inputs if g.fields] or inputs[:1]
            return replace(summed, shape=shapes[0] or (), leaf=self.sums[node])
        rule = find_rule(operator_name(node))
        if rule is None:
            out = self._without_rule(node, inputs)
        else:
            lookup = self.store.chosen if node in self.lookups else _all_rows_alike
            context = Context(self.store, node, shapes, self._buffer, self._stand_in, self.known, lookup)
            out = _applied(rule, context, args, kwargs)
        return _with_data(out) if any("data" in g.marks for g in inputs) else out

    def _without_rule(self, node: fx.Node, inputs: list[Gauge]) -> Any:
        """Nothing that goes in may scale (the safe answer); what comes out carries a decoy."""
        why = f"passes {operator_name(node)}, which has no rule"
        met = any(g.fields for g in inputs)
        if met:
            self.unknown.note(node)
        for gauge in inputs:
            self.store.vanish(gauge.fields, why)
        shapes = [shape or () for shape in output_shapes(node)]
        out = [Gauge(shape, (self.store.decoy(len(shape), why),) if met else ()) for shape in shapes]
        return out if isinstance(node.meta.get("val"), (list, tuple)) else out[0]

    def _buffer(self, gauge: Gauge, exponent: float) -> Gauge:
        return self.leaves.buffer(self.store, gauge.leaf, exponent) if gauge.leaf else Gauge(gauge.shape)

    def _stand_in(self, count: int, length: int) -> Tensor | None:
        """Positions that meet every entry of an axis of `length`; a second pass with other ones makes that sound."""
        if count < length:
            return None
        self.stood_in = True
        return (torch.arange(count) + self.start) % length


def _all_rows_alike(rows: Field, shape: tuple[int, ...]) -> None:
    """The rows that data choose have no scales of their own."""


def _applied(rule: GaugeRule, context: Context, args: Any, kwargs: Any) -> Any:
    """What a rule answers. Raises ExportError naming the operator where the rule fails or answers with no gauge."""
    name = operator_name(context.node)
    try:
        out = rule(context, *args, **kwargs)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as cause:
        raise ExportError(f"the gauge rule of {name} failed: {type(cause).__name__}: {cause}") from cause
    if not gauges_in(out):
        raise ExportError(f"the gauge rule of {name} must answer with a Gauge (context.out(...)), got {out!r:.80}")
    return out


def _with_data(out: Any) -> Any:
    """The same gauges, marked as depending on the input."""
    if isinstance(out, list):
        return [_with_data(g) for g in out]
    return out if "stack" in out.marks else replace(out, marks=out.marks | {"data"})
