"""Move a model, or a file, along its orbits by group elements of your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noetherflow.balance.checkpoint import balance_checkpoint
from noetherflow.balance.model import BalanceReport, balance_
from noetherflow.balance.motion import Motion, refuse_frozen
from noetherflow.balance.stored_given import stored_equilibrium_at
from noetherflow.core.arguments import expect
from noetherflow.core.host import on_host
from noetherflow.core.tensors import tensors_of
from noetherflow.discovery.certificate import Certificate
from noetherflow.discovery.unusable import refuse_without_values
from noetherflow.equilibrium.given import Destination, checked_elements, equilibrium_at
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import CertificateError, DataError
from noetherflow.symmetry.arguments import expect_model_and_symmetries
from noetherflow.symmetry.symmetry_set import SymmetrySet

Elements = Mapping[str, Any]
"""Group elements by symmetry name, each of the shape `symmetry.shape`."""


@on_host
def move_(
    model: nn.Module,
    syms: SymmetrySet,
    elements: Elements,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    example_inputs: Any = None,
    certificate: Certificate | None = None,
    tolerance: float | None = None,
    unchecked: bool = False,
) -> BalanceReport:
    """Apply your own group elements to `model`, in place; the function it computes stays the same.

    Everything is done as `balance_` does it: in float64, rounded once; gradients and the optimiser's state move along;
    outputs are compared before and after, and on any error all is put back.

    Args:
        model: the model that the symmetries were found on.
        syms: its symmetries.
        elements: by symmetry name (`syms[0].name`), of the shape `syms[0].shape`: for scalar and diagonal symmetries
            one number for each coordinate, by which rows of `+` legs are multiplied and those of `-` legs divided; for
            general_linear ones an invertible matrix for each block. Symmetries without an element stay.
        optimizer: whose state moves along, one or several.
        example_inputs: on which outputs are compared; by default those of `find_symmetries`.
        certificate: of `nf.certify`, in place of outputs. It proves positive scales only.
        tolerance: largest relative change of outputs; see `balance_`.
        unchecked: move even where nothing proves that the function stays (positive scales only).

    Returns:
        What moved, and by how much the outputs changed.

    Raises:
        DataError: an unknown name, an element of another shape, not finite, 0 or singular, or one that moves a frozen
            parameter.
        CertificateError: nothing proves the move, or outputs change; negative scales, where the model forbids them
            (behind a relu), are refused so. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)).double()
        >>> x = torch.randn(8, 3, dtype=torch.float64)
        >>> syms = nf.find_symmetries(model, x)
        >>> row = model[0].weight[1].clone()
        >>> report = nf.move_(model, syms, {"0 -> 2": [1.0, 4.0]})
        >>> bool((model[0].weight[1] == 4 * row).all()), report.output_change < 1e-12
        (True, True)

    Source: theory.md section 2.
    """
    if isinstance(model, str | Path):
        raise DataError(
            f"{str(model)!r} is a file: nf.move_checkpoint(source, target, model, syms, elements) moves files, with "
            "the model for their names and for the check of the outputs"
        )
    call = "move_(model, syms, elements, optimizer)"
    expect_model_and_symmetries(call, model, syms)
    expect(call, "elements", elements, Mapping, "group elements by name, {syms[0].name: [2.0, 0.5, ...]}")
    refuse_without_values(tensors_of(model), "move_")
    eq = _equilibrium(model, syms, elements)
    refuse_frozen(model, Motion.of(eq))
    inverted = _inverted(eq)
    if not inverted:
        options = {"example_inputs": example_inputs, "certificate": certificate}
        return balance_(model, eq, optimizer, **options, tolerance=tolerance, unchecked=unchecked)
    inputs = _inputs_for(inverted, syms, example_inputs)
    try:
        return balance_(model, eq, optimizer, example_inputs=inputs, tolerance=tolerance)
    except CertificateError as cause:
        raise CertificateError(_forbidden(inverted)) from cause


def move_checkpoint(
    source: str | Path,
    target: str | Path,
    model: nn.Module,
    syms: SymmetrySet,
    elements: Elements,
    **options: Any,
) -> BalanceReport:
    """Write the checkpoint `source`, moved by your own group elements, to `target`; the function it computes stays.

    Files and folders are read, checked and written as `balance_checkpoint` does it.

    Args:
        source, target: files or folders; see `balance_checkpoint`.
        model: the model with the weights of `source` (`load_checkpoint_`), which is not changed; or on the meta device,
            where the tensors are read one by one and `certificate` or `unchecked` stands for the outputs.
        syms: its symmetries.
        elements: by symmetry name; see `move_`.
        options: any keyword of `balance_checkpoint`: `example_inputs`, `certificate`, `tolerance`, `unchecked`,
            `dry_run`, `optimizer`, `prefix`, ...

    Returns:
        What moved, or would.

    Raises:
        DataError, CertificateError: as `move_` does.
        CheckpointError: as `balance_checkpoint` does.

    Example:
        ```
        nf.load_checkpoint_(model, "model.safetensors")
        syms = nf.find_symmetries(model, x)
        nf.move_checkpoint("model.safetensors", "moved.safetensors", model, syms, {"0 -> 2": torch.full((16,), 2.0)})
        ```

    Source: theory.md section 2.
    """
    meta = any(t.is_meta for t in tensors_of(model).values())
    eq = _stored_equilibrium(source, model, syms, elements, options) if meta else _equilibrium(model, syms, elements)
    inverted = _inverted(eq)
    if inverted and meta:
        raise CertificateError(
            f"negative scales of {inverted[:3]} are proven by outputs alone, which a model on the meta device does not "
            "have: load the checkpoint into one with weights (nf.load_checkpoint_), or use positive scales"
        )
    if inverted:
        inputs = _inputs_for(inverted, syms, options.get("example_inputs"))
        options |= {"example_inputs": inputs, "certificate": None, "unchecked": False}
    try:
        return balance_checkpoint(source, target, model, eq, **options)
    except CertificateError as cause:
        if inverted:
            raise CertificateError(_forbidden(inverted)) from cause
        raise


def _equilibrium(model: nn.Module, syms: SymmetrySet, elements: Elements) -> Equilibrium:
    """The destination of the move. Raises DeclarationError for the symmetries of another model."""
    syms.tensors_in(model)
    return equilibrium_at(model, syms, Destination(checked_elements(syms, elements)))


def _stored_equilibrium(
    source: str | Path, model: nn.Module, syms: SymmetrySet, elements: Elements, options: Mapping[str, Any]
) -> Equilibrium:
    """The same for a model on the meta device, from the file."""
    destination = Destination(checked_elements(syms, elements))
    return stored_equilibrium_at(source, model, syms, destination, key=options.get("key"), prefix=options.get("prefix"))


def _inverted(eq: Equilibrium) -> list[str]:
    """Names of the scalar and diagonal symmetries with negative scales, and the first of these."""
    out = []
    for s in eq:
        negative = (s.element < 0).nonzero().flatten().tolist() if s.element.ndim == 1 else []
        out += [f"{s.name} (coordinate {negative[0]})"] if negative else []
    return out


def _inputs_for(inverted: Sequence[str], syms: SymmetrySet, example_inputs: Any) -> Any:
    """Inputs on which outputs are compared. Raises CertificateError where there are none."""
    inputs = syms.example_inputs if example_inputs is None else example_inputs
    if inputs is None:
        raise CertificateError(
            f"negative scales of {inverted[:3]} are proven by outputs alone, since certificates are of positive ones: "
            "pass example_inputs"
        )
    return inputs


def _forbidden(inverted: Sequence[str]) -> str:
    return (
        f"negative scales of {inverted[:3]} change the outputs: an operator that they pass through, such as relu, "
        "keeps positive scales only; use their absolute values. Nothing was moved"
    )
