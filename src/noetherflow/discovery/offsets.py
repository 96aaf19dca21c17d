"""Parameters that a model only ever reads with a constant added, as the gain `1 + weight` of Gemma's norms.

A group cannot multiply such a weight, but it can multiply the sum: `1 + weight -> p (1 + weight)`. The sum then takes
the parameter's place in the inference, and its legs carry the constant (`Leg.offset`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from noetherflow.discovery.export import Graph, operator_name

PASSING = frozenset({"aten._to_copy", "aten.to", "aten.clone", "aten.detach", "aten.alias", "aten.contiguous"})
"""Operators that leave a value as it is."""
SHAPE_ONLY = frozenset(
    {"aten._assert_tensor_metadata", "aten.ones_like", "aten.zeros_like", "aten.empty_like", "aten.full_like"}
    | {f"aten.new_{kind}" for kind in ("ones", "zeros", "empty", "full")}
)
"""Operators that read the shape and type of a tensor and not its entries."""
FILLED = {"aten.ones": 1.0, "aten.ones_like": 1.0, "aten.new_ones": 1.0}
SMALLEST = 1e-2
"""Constants up to this size are a normalisation's eps, which the rules of sums treat."""


@dataclass(frozen=True)
class Offsets:
    """`of[parameter]`: the constant added to it; `sums[node]`: the parameter to which a node adds it."""

    of: dict[str, float] = field(default_factory=dict)
    sums: dict[fx.Node, str] = field(default_factory=dict)


def offsets_of(graph: Graph) -> Offsets:
    """The parameters of a graph whose every use adds one and the same constant first.

    Example: `norm(x) * (1.0 + self.weight)` gives `{"weight": 1.0}`; a weight that is also used bare, or with two
    constants, is left out, since no multiplication of it is a symmetry then.
    """
    entries: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and graph.leaves.get(node.name) in graph.parameters and node.users:
            entries.setdefault(graph.leaves[node.name], []).append(node)
    found: dict[str, float] = {}
    sums: dict[fx.Node, str] = {}
    for name, nodes in entries.items():
        uses = _uses(nodes)
        constants = {_added(source, user) for source, user in uses}
        if len(constants) == 1 and (constant := constants.pop()) is not None:
            found[name] = constant
            sums.update((user, name) for _, user in uses)
    return Offsets(found, sums)


def _uses(nodes: list[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of a value equal to the parameter and a node that uses it, casts and copies looked through."""
    pairs = [(node, user) for node in nodes for user in node.users if _family(user) not in SHAPE_ONLY]
    through = [user for _, user in pairs if _family(user) in PASSING]
    direct = [(node, user) for node, user in pairs if _family(user) not in PASSING]
    return direct + (_uses(through) if through else [])


def _family(node: fx.Node) -> str:
    """`aten.add` of `aten.add.Tensor`."""
    return operator_name(node).rpartition(".")[0]


def _added(source: fx.Node, user: fx.Node) -> float | None:
    """The constant that `user` adds to `source` up to its sign (`1 - w` is `w - 1`), None for any other use."""
    family = _family(user)
    if family not in ("aten.add", "aten.sub", "aten.rsub") or len(user.args) < 2:
        return None
    first, second = user.args[:2]
    other = second if first is source else first
    constant, alpha = _constant(other), _constant(user.kwargs.get("alpha", 1))
    if constant is None or alpha is None or (first is not source and alpha != 1):
        return None
    offset = constant * alpha if family == "aten.add" else -constant * alpha
    if family == "aten.rsub" and alpha != 1:
        return None
    return offset if abs(offset) > SMALLEST else None


def _constant(value: object) -> float | None:
    """The number that an argument is, or that fills the tensor it is, if any."""
    if isinstance(value, bool) or not isinstance(value, int | float | fx.Node):
        return None
    if isinstance(value, fx.Node):
        if _family(value) in FILLED:
            return FILLED[_family(value)]
        filled = _family(value) in ("aten.full", "aten.full_like") and len(value.args) > 1
        return _constant(value.args[1]) if filled else None
    return float(value)
