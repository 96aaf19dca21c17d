"""Which axes of a parameter carry atoms, judged by its shape and by the operators that use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from noetherflow.discovery.export import Graph, operator_name
from noetherflow.discovery.gauges import AxisAtoms


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


def axis_atoms_of(graph: Graph) -> dict[str, list[AxisAtoms]]:
    """For every parameter the graph uses, the axes that carry atoms."""
    out: dict[str, list[AxisAtoms]] = {}
    for node in graph.nodes:
        name = graph.leaves.get(node.name, "") if node.op == "placeholder" else ""
        if name in graph.parameters and node.users:
            out[name] = axis_atoms(graph.shapes[name], list(node.users), node)
    return out


def output_shapes(node: fx.Node) -> tuple[tuple[int, ...] | None, ...]:
    """Shapes of a node's outputs; None for outputs that are no tensors."""
    out = node.meta.get("val")
    listed = out if isinstance(out, (list, tuple)) else [out]
    return tuple(tuple(int(n) for n in v.shape) if isinstance(v, Tensor) else None for v in listed)


def _convolution(uses: Sequence[fx.Node], placeholder: fx.Node) -> fx.Node | None:
    """The convolution whose weight a parameter is, or becomes through tensors of its own shape."""
    shape, seen, left = output_shapes(placeholder)[0], {placeholder}, [(placeholder, node) for node in uses]
    while left:
        source, node = left.pop()
        if "conv" in operator_name(node) and len(node.args) > 1 and node.args[1] is source:
            return node
        if node not in seen and shape in output_shapes(node)[:1]:
            seen.add(node)
            left += [(node, user) for user in node.users]
    return None


def _convolution_atoms(shape: tuple[int, ...], groups: int) -> list[AxisAtoms]:
    """Output and input channels of a convolution weight `[out, in / groups, kernel...]`, in groups of their own."""
    if groups == 1:
        return [AxisAtoms((0,)), AxisAtoms((1,))]
    view = (groups, shape[0] // groups, *shape[1:])
    return [AxisAtoms((0,), slices=groups), AxisAtoms((0, 2), view, groups)]


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """An argument of an operator by name, given by keyword or by position."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else default
