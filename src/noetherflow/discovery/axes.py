"""Which axes of a parameter carry atoms, judged by its shape and by the operators that use it."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from torch import Tensor, fx

from noetherflow.discovery.export import Graph, operator_name
from noetherflow.discovery.gauges import AxisAtoms

STACK_AXES = 3
"""A parameter with this many axes longer than 1, no convolution's weight, is a stack of matrices."""


def axis_atoms(
    shape: tuple[int, ...],
    uses: Sequence[fx.Node],
    placeholder: fx.Node,
    stacks: AbstractSet[tuple[int, ...]],
) -> list[AxisAtoms]:
    """Which axes of a parameter carry coordinates of their own.

    Up to two axes longer than 1: each by itself; a number is seen as a vector of one entry. What becomes a convolution
    weight: output and input channels (grouped: the view `[groups, out / groups, in / groups, ...]`), and each axis of
    the kernel where the weight is computed from the parameter. A stack of matrices: the first axis jointly with each of
    the others; the biases of a stack, `[experts, units]`: both axes jointly.

    Args:
        shape: of the parameter.
        uses: the operators that read it.
        placeholder: the node by which it enters the graph.
        stacks: number and side of the matrices of the model's stacks (`stack_sides`).
    """
    if not shape:
        return [AxisAtoms((0,), view=(1,))]
    long = [a for a, n in enumerate(shape) if n > 1] or [0]
    convolution = _convolution(uses, placeholder)
    if convolution is not None:
        direct = convolution in uses
        return _convolution_atoms(shape, int(_argument(convolution, "groups", 1)), direct)
    if shape in stacks and _is_added(uses, placeholder):
        return [AxisAtoms((0, 1), slices=shape[0])]
    if len(long) < STACK_AXES:
        return [AxisAtoms((a,)) for a in long]
    return [AxisAtoms((long[0], a), slices=shape[long[0]]) for a in long[1:]]


def stack_sides(graph: Graph) -> frozenset[tuple[int, ...]]:
    """Shapes that the biases of the model's stacks of matrices have: `[experts, units]`."""
    stacks = [shape for name, shape in graph.shapes.items() if name in graph.parameters and len(shape) == STACK_AXES]
    return frozenset((shape[0], side) for shape in stacks for side in shape[1:] if shape[0] > 1 and side > 1)


RESHAPING = ("unsqueeze", "view", "reshape", "expand", "slice", "select", "index", "clone", "to", "_to_copy", "alias")
ADDING = ("add", "sub", "baddbmm")


def _is_added(uses: Sequence[fx.Node], placeholder: fx.Node) -> bool:
    """Whether a parameter is only added to tensors of three or more axes, as it is or through a change of shape."""
    left = [(placeholder, node) for node in uses]
    while left:
        source, node = left.pop()
        name = operator_name(node).removeprefix("aten.").partition(".")[0]
        shape = output_shapes(node)[0] or ()
        if name in RESHAPING and node.args[0] is source:
            left += [(node, user) for user in node.users]
        elif name not in ADDING or len(shape) < STACK_AXES or (name == "baddbmm" and node.args[0] is not source):
            return False
    return bool(uses)


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


def _convolution_atoms(shape: tuple[int, ...], groups: int, direct: bool) -> list[AxisAtoms]:
    """Channels of `[out, in, kernel...]` and, where the weight is computed (a weight norm), the axes of the kernel."""
    kernel = [] if direct else [AxisAtoms((a,)) for a in range(2, len(shape)) if shape[a] > 1]
    if groups == 1:
        return [AxisAtoms((0,)), AxisAtoms((1,)), *kernel]
    view = (groups, shape[0] // groups, *shape[1:])
    return [AxisAtoms((0,), slices=groups), AxisAtoms((0, 2), view, groups)]


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """An argument of an operator by name, given by keyword or by position."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else default
