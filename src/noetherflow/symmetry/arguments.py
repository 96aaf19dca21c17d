"""The model and its symmetries as arguments of a verb."""

from __future__ import annotations

from typing import Any

from torch import nn

from noetherflow.core.arguments import A_MODEL, SYMMETRIES, expect
from noetherflow.symmetry.symmetry_set import SymmetrySet


def expect_model_and_symmetries(call: str, model: Any, syms: Any) -> None:
    """Refuse a model or symmetries that are something else.

    Args:
        call: how the verb is called, `certify(model, syms, example_inputs)`.
        model: what it was given as model.
        syms: as symmetries.

    Raises:
        DataError: names the argument, what came, and the order of all.

    Example:
        >>> expect_model_and_symmetries("certify(model, syms, x)", nn.Linear(1, 1), SymmetrySet(()))
    """
    expect(call, "model", model, nn.Module, A_MODEL)
    expect(call, "syms", syms, SymmetrySet, SYMMETRIES)
