"""Operators without a gauge rule, written out in smaller operators as torch itself defines them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from noetherflow.discovery.rules import find_rule


def expanded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """An exported program in which every operator without a gauge rule is replaced by what it consists of.

    `aten.gru_cell`, for example, has no rule; torch defines it by two linear layers, splits, sigmoids and products,
    which all have one. Operators with a rule stay whole, and so does what torch does not define by others.

    Args:
        program: The program, already free of in-place operators (`run_decompositions({})`).

    Returns:
        The same program if nothing is to be replaced, else a new one that computes the same.

    Example:
        >>> import torch
        >>> class Stack(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.hstack((x, x))
        >>> program = torch.export.export(Stack(), (torch.zeros(2, 3),)).run_decompositions({})
        >>> [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        ['aten.hstack.default']
        >>> [str(node.target) for node in expanded(program).graph.nodes if node.op == "call_function"]
        ['aten.cat.default']
    """
    known = torch.export.default_decompositions()
    table: dict[torch._ops.OperatorBase, object] = {}
    while True:
        missing = {node.target for node in program.graph.nodes if _lacks_rule(node)}
        further = {target: known[target] for target in missing if target in known and target not in table}
        if not further:
            return program
        table |= further
        program = program.run_decompositions(table)


def _lacks_rule(node: fx.Node) -> bool:
    """Whether inference would have to give up at this node: an operator on tensors that no rule describes."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    reads = any(isinstance(source.meta.get("val"), (Tensor, list, tuple)) for source in node.all_input_nodes)
    return reads and find_rule(str(node.target)) is None
