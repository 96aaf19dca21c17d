"""Translations: directions of a parameter that softmax or a normalisation ignores (theory.md section 2, last row).

Words: a *shift* is an additive motion `X -> X + u c^T` of one tensor that this pass follows; a *translation* is a shift
of a parameter that something absorbs and nothing kills. Its family says what absorbed it: `translation` a softmax,
`null` a normalisation.

A second, additive pass over the graph. A *shift term* says which shifts a tensor carries: `label` numbers the free
shift of every entry (0: none), and two entries with equal `value` are shifted by the same amount. A softmax absorbs a
shift that is uniform along its axis, a layer norm one that is uniform over what it normalises; whatever else meets a
shift kills it (`shift_rules.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from noetherflow.discovery.export import Graph
from noetherflow.discovery.shift_rules import ShiftStore, ShiftTerm, ShiftTerms, terms_of, visit
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Translation


def find_translations(graph: Graph) -> list[Translation]:
    """Every translation `X -> X + u c^T` of one parameter that leaves the outputs as they are."""
    shifts = ShiftStore()
    leaves: dict[str, ShiftTerms] = {}
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
            env[node] = visit(
                shifts, node, [value(a) for a in node.args], {k: value(v) for k, v in node.kwargs.items()}
            )
        elif node.op == "output":
            shifts.kill(terms_of(value(node.args)))
    return _collect(shifts, graph)


def _leaf_terms(shifts: ShiftStore, name: str, shape: tuple[int, ...]) -> ShiftTerms:
    terms = []
    for axis, size in enumerate(shape):
        if size < 2:
            continue
        label = torch.full([1] * len(shape), shifts.new(name, axis, -1))
        others = [1 if a == axis else n for a, n in enumerate(shape)]
        terms.append(ShiftTerm(label, torch.arange(int(np.prod(others))).reshape(others)))
    if len(shape) == 1:
        labels = torch.tensor([shifts.new(name, 0, row) for row in range(shape[0])])
        terms.append(ShiftTerm(labels, labels))
    return tuple(terms)


def _collect(shifts: ShiftStore, graph: Graph) -> list[Translation]:
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
