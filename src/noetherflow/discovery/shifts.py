"""Translations: directions of a parameter that softmax or a normalisation ignores (theory.md section 2, last row).

Words: a *shift* is an additive motion of rows of one parameter, `X[i, :] += c`, that this pass follows through the
model; a *translation* is a shift that something absorbs and nothing kills. Its family says what absorbed it:
`translation` a softmax, `null` a normalisation.

A second, additive pass over the graph: every tensor carries `ShiftTerm`s (`shift_store.py`), every operator passes,
absorbs or kills them (`shift_rules/`); one without a rule kills them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from noetherflow.discovery.axes import output_shapes
from noetherflow.discovery.export import Graph, operator_name
from noetherflow.discovery.shift_rules import ShiftContext, Shifted, find_shift_rule, shifted_in
from noetherflow.discovery.shift_store import FoundShift, ShiftStore, ShiftTerm
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Translation


def find_translations(graph: Graph) -> list[Translation]:
    """Every translation `X -> X + u c^T` of one parameter that leaves the outputs as they are."""
    walk = _ShiftPass(graph)
    for node in graph.nodes:
        walk.visit(node)
    found = [_translation(f) for f in walk.store.found() if f.rows.shape[1] > 1 or len(graph.shapes[f.axis.leaf]) == 1]
    return sorted(found, key=lambda t: t.leg.dim > 1)


@dataclass(eq=False)
class _ShiftPass:
    """One walk over the graph: the shifts that every node's value carries."""

    graph: Graph
    store: ShiftStore = field(default_factory=ShiftStore)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    leaves: dict[str, tuple[ShiftTerm, ...]] = field(default_factory=dict)

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.values[node] = Shifted(output_shapes(node)[0] or (), self._leaf(node))
        elif node.op == "get_attr":
            self.values[node] = Shifted(output_shapes(node)[0] or ())
        elif node.op == "call_function":
            self.values[node] = self._call(node)
        elif node.op == "output":
            for x in shifted_in(self._value(node.args)):
                self.store.kill(x.terms)

    def _leaf(self, node: fx.Node) -> tuple[ShiftTerm, ...]:
        name = self.graph.leaves.get(node.name, "")
        if name not in self.graph.parameters:
            return ()
        if name not in self.leaves:
            self.leaves[name] = self.store.leaf_terms(name, self.graph.shapes[name])
        return self.leaves[name]

    def _value(self, argument: Any) -> Any:
        """An argument of a node with shifted tensors in the place of tensors."""
        if isinstance(argument, fx.Node):
            return self.values[argument]
        if isinstance(argument, (list, tuple)):
            return [self._value(a) for a in argument]
        if isinstance(argument, dict):
            return {k: self._value(v) for k, v in argument.items()}
        return argument

    def _call(self, node: fx.Node) -> Any:
        args, kwargs = self._value(node.args), self._value(node.kwargs)
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], list) else args[0]
        shapes = output_shapes(node)
        if not any(shape is not None for shape in shapes):
            return node.meta.get("val")
        carried = [t for x in shifted_in([args, kwargs]) for t in x.terms]
        rule = find_shift_rule(operator_name(node)) if carried else None
        if rule is not None:
            return rule(ShiftContext(self.store, node, shapes), *args, **kwargs)
        self.store.kill(carried)
        out = [Shifted(shape or ()) for shape in shapes]
        return out if isinstance(node.meta.get("val"), (list, tuple)) else out[0]


def _translation(found: FoundShift) -> Translation:
    """Blocks of rows as one translation with one leg."""
    leaf, axis, rows = found.axis.leaf, found.axis.axis, found.rows
    blocks, dim = rows.shape
    if dim == 1:
        name, note = f"{leaf} rows {rows[0, 0]}-{rows[-1, 0]} [shift]", "every row on its own"
    elif blocks == 1:
        name, note = f"{leaf} axis {axis} [shift]", ""
    else:
        name, note = f"{leaf} axis {axis} in {blocks} blocks [shift]", f"every block of {dim} rows on its own"
    leg = Leg(leaf, np.asarray(rows[..., None], dtype=np.int64), axes=(axis,))
    return Translation(name, found.family, leg, note=note)
