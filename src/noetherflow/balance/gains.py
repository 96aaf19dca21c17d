"""Fold the gains of normalisations into the layers that read them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.balance.check import OutputCheck
from noetherflow.balance.model import BalanceReport
from noetherflow.balance.motion import Motion
from noetherflow.balance.move import move_
from noetherflow.core.host import on_host
from noetherflow.core.tensors import tensors_of
from noetherflow.core.unwrap import unwrap
from noetherflow.discovery.unusable import refuse_without_values
from noetherflow.errors import DataError, NoetherflowError
from noetherflow.symmetry.arguments import expect_model_and_symmetries
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet, positions_of

NOT_GAINS = ("bias", "beta", "shift")
"""Names of vectors in a normalisation that are added, not multiplied."""


@dataclass(frozen=True, eq=False)
class Fold:
    """What folds the gains: group elements by symmetry name, and why some gains are not made 1, by parameter."""

    elements: dict[str, Tensor]
    left: dict[str, str]


@on_host
def gains_to_one(
    model: nn.Module,
    syms: SymmetrySet,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    example_inputs: Any = None,
    tolerance: float | None = None,
    unchecked: bool = False,
) -> BalanceReport:
    """Make the gains of normalisations 1 by multiplying them into the layers that read them, in place.

    The gain of a LayerNorm, RMSNorm or BatchNorm goes into the columns of every layer behind it, its bias is divided
    by it. Gains stored as `1 + weight` (Gemma) end as `weight = 0`. The symmetries know which layers read a norm. Where
    a reader is tied to something else (the embedding as output layer), or where something between the norm and its
    readers is not linear, there is no such symmetry, and the gain stays as it is. The function is the same; outputs,
    gradients and the optimiser's state are treated as in `balance_`.

    Args:
        model: the model that the symmetries were found on.
        syms: its symmetries.
        optimizer: whose state moves along, one or several.
        example_inputs: on which outputs are compared; by default those of `find_symmetries`.
        tolerance: largest relative change of outputs; see `balance_`.
        unchecked: move even where nothing proves that the function stays.

    Returns:
        What moved. `skipped` lists each gain that is not 1 now, with the reason: no symmetry, a frozen
        parameter, an entry that is 0, or one that is negative with a relu behind it (-1 then).

    Raises:
        DataError: the model has no normalisation with a gain.
        CertificateError: as `balance_` does.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
        >>> _ = nn.init.constant_(model[1].weight, 2.0)
        >>> syms = nf.find_symmetries(model, torch.randn(8, 3, dtype=torch.float64))
        >>> report = nf.gains_to_one(model, syms)
        >>> model[1].weight.tolist(), report.output_change < 1e-12
        ([1.0, 1.0, 1.0, 1.0], True)

    Source: theory.md section 2.
    """
    expect_model_and_symmetries("gains_to_one(model, syms, optimizer)", model, syms)
    refuse_without_values(tensors_of(model), "gains_to_one")
    syms.tensors_in(model)
    names = norm_gains(model)
    if not names:
        raise DataError("no normalisation of this model has a gain (a vector in a module whose class is named ...Norm)")
    inputs = syms.example_inputs if example_inputs is None else example_inputs
    fold = fold_of(model, syms, names, inputs)
    options = {"example_inputs": example_inputs, "tolerance": tolerance, "unchecked": unchecked}
    report = move_(model, syms, fold.elements, optimizer, **options)
    return replace(report, skipped={**report.skipped, **fold.left})


def norm_gains(model: nn.Module) -> list[str]:
    """The gains of the model's normalisations, by canonical name, in the order of the modules.

    Example:
        >>> norm_gains(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
        ['1.weight']
    """
    names = {id(t): n for n, t in tensors_of(model).items()}
    found = [
        names[id(p)]
        for module in unwrap(model).modules()
        if "norm" in type(module).__name__.lower()
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 1 and not name.endswith(NOT_GAINS)
    ]
    return list(dict.fromkeys(found))


def fold_of(model: nn.Module, syms: SymmetrySet, names: Sequence[str], inputs: Any) -> Fold:
    """The group elements that make these gains 1.

    Args:
        model: only read.
        syms: its symmetries.
        names: the gains.
        inputs: example inputs, which tell whether a negative gain may be folded; None: it may not.

    Returns:
        The elements, and the gains that are not 1 after them.
    """
    elements: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    positions, trainable = positions_of(model, syms), syms.trainable(model)
    for name in names:
        found = [(s, leg) for s in trainable for leg in s.weight_legs if _folds(s, leg, name, positions[name])]
        free = [(s, leg) for s, leg in found if s.name not in elements]
        if not free:
            shared = f"{found[0][0].name} makes another gain 1" if found else _no_symmetry(syms, trainable, name)
            left[name] = shared
            continue
        symmetry, leg = free[0]
        gain = leg.unfold(positions[name].detach().double().cpu()).reshape(-1)
        elements[symmetry.name] = _element(model, symmetry, leg, gain, inputs)
        left |= _not_one(name, gain, elements[symmetry.name] ** leg.exponent * gain)
    return Fold(elements, left)


def _folds(symmetry: Symmetry, leg: Leg, name: str, tensor: Tensor) -> bool:
    """Whether each entry of the gain has a scale of its own, which multiplies it and divides its readers."""
    own = [other for other in symmetry.weight_legs if other.parameter == name]
    return (
        leg.parameter == name
        and symmetry.is_torus
        and not symmetry.one_sided
        and len(own) == 1
        and leg.exponent == 1
        and leg.replicas == 1
        and leg.blocks == tensor.numel()
    )


def _no_symmetry(syms: SymmetrySet, trainable: SymmetrySet, name: str) -> str:
    """Why no element makes this gain 1."""
    near = next((s for s in syms if name in s.parameters), None)
    if near is not None and near.name in trainable.excluded:
        return trainable.excluded[near.name]
    if near is not None:
        return (
            f"only {near.name!r} ({near.kind}) moves it, by one scale for several entries: a reader is tied to "
            "something else, or takes several channels together"
        )
    return (
        "no symmetry scales it against its readers: one of them is tied to something else or is not linear "
        f"(nf.explain(model, example_inputs, {name!r}))"
    )


def _element(model: nn.Module, symmetry: Symmetry, leg: Leg, gain: Tensor, inputs: Any) -> Tensor:
    """The inverse of the gain, of its absolute value where the model does not allow a change of sign."""
    element = torch.where(gain == 0, torch.ones_like(gain), gain).reciprocal()
    if bool((element < 0).any()) and not _sign_is_free(model, symmetry, element.sign(), inputs):
        element = element.abs()
    return element


def _sign_is_free(model: nn.Module, symmetry: Symmetry, signs: Tensor, inputs: Any) -> bool:
    """Whether outputs stay under these signs, tried on a copy: exact in floating point, so that rounding has no say."""
    if inputs is None or any(leg.exponent != round(leg.exponent) for leg in symmetry.legs):
        return False
    other = copy.deepcopy(model)
    motion = Motion([symmetry], {symmetry.name: signs})
    check = OutputCheck(inputs)
    try:
        before = check.before(other, motion, None)
    except NoetherflowError:
        return False
    symmetry.act_(tensors_of(other), signs)
    precisions = [t.dtype for t in tensors_of(other).values() if t.is_floating_point()]
    return before is not None and before.change(other) <= check.limit(precisions, [symmetry])


def _not_one(name: str, before: Tensor, after: Tensor) -> dict[str, str]:
    """A line on the entries that are 0 or -1 at the end."""
    zero, negative = int((before == 0).sum()), int((after < 0).sum())
    parts = [f"{zero} entries are 0 and stay 0"] if zero else []
    parts += [f"{negative} entries are -1: behind them is no operator that keeps a change of sign"] if negative else []
    return {name: "; ".join(parts)} if parts else {}
