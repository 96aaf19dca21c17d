"""Find every continuous symmetry of a model by gauge inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from noetherflow.core.function_model import FunctionModel
from noetherflow.core.host import on_host
from noetherflow.core.tensors import refuse_narrow
from noetherflow.discovery.assemble import assemble
from noetherflow.discovery.export import Graph, export, sizes_known
from noetherflow.discovery.infer import infer
from noetherflow.discovery.shifts import find_translations
from noetherflow.discovery.solve import solve
from noetherflow.errors import ExportError
from noetherflow.symmetry.symmetry_set import SymmetrySet


def find_symmetries(model: nn.Module | Callable[..., Any], example_inputs: Any = ()) -> SymmetrySet:
    """All continuous axis-wise symmetries `l(G . theta, z) = l(theta, z)` of the model's outputs (theory.md section 2).

    The model is traced in its current mode on a copy without weights, so models on the meta device work. Symmetries
    with a frozen leg are listed in `.excluded`, operators without a rule in `.unknown`, casts to a lower precision in
    `.casts`.

    Args:
        model: a module; or a plain function `function(parameters)` of a dictionary of tensors, with that dictionary in
            place of `example_inputs` (`nf.FunctionModel` makes a module of the two, for all other verbs).
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; only shapes matter. A module
            that takes none, such as a loss in closed form, needs none here.

    Returns:
        The SymmetrySet; print it.

    Raises:
        ExportError: the model cannot be traced.
        DataError: a function without a dictionary of parameters; trainable parameters of eight bits.

    Example:
        >>> find_symmetries(lambda p: (p["a"] * p["b"] - 1) ** 2, {"a": 2.0, "b": 0.5})[0].name
        'a -> b'
    """
    if not callable(model):
        raise ExportError(f"expected a torch.nn.Module, got {model!r:.80}")
    if not isinstance(model, nn.Module):
        model, example_inputs = FunctionModel(model, example_inputs), ()
    refuse_narrow({n: p for n, p in model.named_parameters() if p.requires_grad}, "find_symmetries")
    found = find_in_graph(export(model, example_inputs)).trainable(model)
    return replace(found, example_inputs=example_inputs)


@on_host
def find_in_graph(graph: Graph) -> SymmetrySet:
    """The symmetries of an exported graph, frozen parameters included."""
    with sizes_known(graph):
        inference = infer(graph)
        symmetries = assemble(inference, solve(inference.store))
        translations = find_translations(graph)
    return SymmetrySet(
        tuple(symmetries),
        tuple(translations),
        shapes=dict(graph.shapes),
        unknown=inference.unknown,
        casts=graph.casts(),
    )
