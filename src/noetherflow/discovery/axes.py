"""Which axes of a parameter carry atoms, judged by its shape and by the operators that use it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import combinations
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
    the kernel where the weight is computed from the parameter. A stack of matrices: the axis along which they lie
    (`_stack_axis`) jointly with each of the others; the biases of a stack, `[experts, units]`: both axes jointly.

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
    stack = _stack_axis(uses, placeholder)
    return [AxisAtoms((stack, a), slices=shape[stack]) for a in long if a != stack]


def _stack_axis(uses: Iterable[fx.Node], placeholder: fx.Node) -> int:
    """The axis of a parameter of three or more along which its matrices lie, the first one if nothing says otherwise.

    In attention it is `heads` of `[width, heads, head width]`: the coordinates of a head belong to it, and the result
    of `bti,ihd->bthd` has both axes, so they must move jointly; `width` stands alone.
    """
    shape = output_shapes(placeholder)[0] or ()
    pairs = [pair for node in uses for pair in _together(node, placeholder)]
    long = [a for a, n in enumerate(shape) if n > 1]
    return max(long, key=lambda a: (sum(a in pair for pair in pairs), -a))


def _together(node: fx.Node, source: fx.Node) -> list[tuple[int, int]]:
    """Pairs of axes of `source` that another factor, or the result, of an einsum has both, or that a view merges."""
    name = operator_name(node).removeprefix("aten.").partition(".")[0]
    old, new = (output_shapes(n)[0] or () for n in (source, node))
    if name in ("view", "reshape", "flatten", "_unsafe_view") and (len(old), len(new)) == (3, 2):
        return [(1, 2) if old[0] == new[0] else (0, 1)]
    if name != "einsum" or "..." in str(node.args[0]):
        return []
    inputs, _, output = str(node.args[0]).replace(" ", "").partition("->")
    factors: Any = node.args[1]
    terms = inputs.split(",")
    own = next(k for k, factor in enumerate(factors) if factor is source)
    others = [*terms[:own], *terms[own + 1 :], output]
    found = [[a for a, label in enumerate(terms[own]) if label in term] for term in others]
    return [pair for axes in found for pair in combinations(axes, 2)]


def stack_sides(graph: Graph) -> frozenset[tuple[int, ...]]:
    """Shapes that the biases of the model's stacks of matrices have: `[experts, units]`."""
    sides = set()
    for node in graph.nodes:
        shape = graph.shapes.get(graph.leaves.get(node.name, ""), ())
        if node.op == "placeholder" and graph.leaves.get(node.name) in graph.parameters and len(shape) == STACK_AXES:
            stack = _stack_axis(node.users, node) if max(shape) > 1 else 0
            sides |= {(shape[stack], n) for a, n in enumerate(shape) if a != stack and shape[stack] > 1 and n > 1}
    return frozenset(sides)


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
