"""Values of a graph that are known before it runs: lists written into the code, ranges, masks made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from noetherflow.discovery.export import Graph

LARGEST = 100_000
"""Entries up to which a constant is worked out."""


def known_values(graph: Graph) -> dict[fx.Node, Tensor]:
    """The values of the nodes that depend on no input and on no weight.

    Example: in `heads[:, [0, -1]]` the list `[0, -1]` is known, so it is known which heads are read.

    Args:
        graph: The exported model.

    Returns:
        Node -> its value, for results that are one tensor of moderate size and involve no random numbers.
    """
    known: dict[fx.Node, Tensor] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in graph.constants:
            known[node] = graph.constants[node.name]
        elif node.op == "call_function" and _constant(node, known):
            value: Any = lambda a: known[a] if isinstance(a, fx.Node) else a
            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), value)
            target: Any = node.target
            with torch.no_grad():
                known[node] = target(*args, **kwargs)
    return known


def _constant(node: fx.Node, known: dict[fx.Node, Tensor]) -> bool:
    value = node.meta.get("val")
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(value, Tensor) or value.numel() > LARGEST:
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    empty = "empty" in str(node.target)
    return not random and not empty and all(source in known for source in node.all_input_nodes)
