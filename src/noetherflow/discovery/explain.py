"""Why a parameter has or lacks a symmetry: the operators that carry or kill the gauge of each of its axes."""

from __future__ import annotations

import difflib
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import breadth_first_order
from torch import nn

from noetherflow.discovery.assemble import assemble
from noetherflow.discovery.export import export, sizes_known
from noetherflow.discovery.gauges import Array, Bundle
from noetherflow.discovery.infer import Inference, infer
from noetherflow.discovery.solve import GaugeSolution, solve
from noetherflow.errors import DeclarationError
from noetherflow.symmetry.symmetry import Symmetry

SHOWN = 12


def explain(model: nn.Module, example_inputs: Any, parameter: str) -> str:
    """Per axis of `parameter`: the symmetries that carry it and the operators it meets, or the path to what kills it.

    Raises DeclarationError for an unknown parameter, ExportError if the model cannot be traced.
    """
    graph = export(model, example_inputs)
    if parameter not in graph.parameters:
        close = difflib.get_close_matches(parameter, graph.parameters, n=3)
        hint = f"did you mean {close}?" if close else f"the model has {sorted(graph.parameters)[:8]}"
        raise DeclarationError(f"no parameter named {parameter!r}; {hint}")
    with sizes_known(graph):
        inference = infer(graph)
    solution = solve(inference.store)
    symmetries = assemble(inference, solution)
    bundles = inference.store.redundancy.of_leaf.get(parameter, [])
    lines = [f"{parameter} {list(graph.shapes[parameter])}"]
    if not bundles:
        lines.append("  no operator uses it")
    for bundle in bundles:
        lines += _explain_axis(inference, solution, symmetries, bundle)
    if len(bundles) > 1:
        lines.append(
            "  (a constant on one axis against its inverse on another acts as nothing; it is fixed at the first use)"
        )
    return "\n".join(lines)


def _explain_axis(
    inference: Inference, solution: GaugeSolution, symmetries: list[Symmetry], bundle: Bundle
) -> list[str]:
    axes = "axis " + ", ".join(map(str, bundle.axes)) + (f" of view {list(bundle.view)}" if bundle.view else "")
    lines = []
    left = np.ones(bundle.size, dtype=bool)
    for s in symmetries:
        rows = [
            (leg.sign, leg.index.reshape(-1))
            for leg in s.legs
            if leg.parameter == bundle.leaf and leg.axes == bundle.axes and leg.view == bundle.view
        ]
        for sign, index in rows:
            left[index] = False
            group = f"GL({s.dim})" if not s.is_torus else s.kind
            head = f"  {axes}: {index.size} of {bundle.size} rows carried by {s.name!r} [{s.family}, {group}]"
            lines.append(f"{head}, sign {'+' if sign > 0 else '-'}{_approximate(s)}")
            lines += _met(inference, solution, bundle.start + int(index[0]))
    if left.any():
        lines.append(f"  {axes}: {int(left.sum())} of {bundle.size} rows have no symmetry of their own")
        lines += _killed(inference, solution, bundle.start + int(np.flatnonzero(left)[0]))
    return lines


def _approximate(s: Symmetry) -> str:
    return f", approximate (eps {s.eps:g})" if s.eps else ""


def _met(inference: Inference, solution: GaugeSolution, atom: int) -> list[str]:
    """The operators that asked something of an atom, in graph order."""
    same = np.flatnonzero(solution.root == solution.root[atom])
    found: dict[tuple[int, str], None] = {}
    for equation in inference.store.equations:
        if np.isin(equation.ids, same).any():
            found[(equation.node, equation.why)] = None
    for node, why, ids in inference.store.events:
        if np.isin(ids, same).any():
            found[(node, why)] = None
    steps = [f"    {why} at {inference.place(node)}" for node, why in sorted(found)]
    return steps[:SHOWN] + ([f"    ... and {len(steps) - SHOWN} more"] if len(steps) > SHOWN else [])


def _killed(inference: Inference, solution: GaugeSolution, atom: int) -> list[str]:
    """The shortest chain of demands from an atom to the trivial gauge."""
    store = inference.store
    pairs = []
    for equation in store.equations:
        ids = equation.ids if equation.ids.shape[1] > 1 else np.c_[equation.ids, np.zeros_like(equation.ids)]
        pairs += [ids[:, [0, k]] for k in range(1, ids.shape[1])]
    edges = np.concatenate(pairs) if pairs else np.zeros((0, 2), dtype=np.int64)
    ones = np.ones(len(edges), dtype=np.int8)
    graph = sp.coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(store.size, store.size)).tocsr()
    _, before = breadth_first_order(graph, atom, directed=False)
    if atom != 0 and before[0] < 0:
        if solution.root[atom] != 0:
            return ["    nothing that the outputs depend on scales with it alone"]
        return [
            "    bound by a combination of demands (every operator it meets is listed below)",
            *_met(inference, solution, atom),
        ]
    path = [0]
    while path[-1] != atom:
        path.append(int(before[path[-1]]))
    path.reverse()
    steps: dict[str, None] = {}
    for a, b in pairwise(path):
        steps[_step(inference, a, b)] = None
    return [f"    {step}" for step in steps]


def _step(inference: Inference, a: int, b: int) -> str:
    for equation in inference.store.equations:
        hit: Array = (equation.ids == a).any(1)
        if b != 0 or equation.ids.shape[1] > 1:
            hit = hit & (equation.ids == b).any(1)
        if hit.any():
            owners = dict.fromkeys(
                _owner(inference, int(x)) for x in equation.ids[np.flatnonzero(hit)[0]] if x not in (a, 0)
            )
            others = ", ".join(o for o in owners if o)
            return f"{equation.why} at {inference.place(equation.node)}" + (f", with {others}" if others else "")
    return "is bound"


def _owner(inference: Inference, atom: int) -> str:
    for bundle in inference.store.bundles:
        if bundle.start <= atom < bundle.start + bundle.size:
            return f"{bundle.leaf} axis {', '.join(map(str, bundle.axes))}"
    return ""
