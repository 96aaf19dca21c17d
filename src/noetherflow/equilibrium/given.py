"""Group elements that come from elsewhere than a potential, as an Equilibrium: what `balance_` and its kin move to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.result import Equilibrium, Settled
from noetherflow.errors import DataError
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

SINGULAR = 1e-12
"""Smallest over largest singular value below which a matrix counts as singular."""


@dataclass(frozen=True)
class Search:
    """How a search for group elements went.

    Attributes:
        imbalance_now, imbalance: What was to be brought to 0, today and at the elements.
        sweeps: How many passes over all symmetries it took.
        converged: Whether the imbalance fell below the tolerance.
    """

    imbalance_now: float = 0.0
    imbalance: float = 0.0
    sweeps: int = 0
    converged: bool = True


@dataclass(frozen=True, eq=False)
class Stays:
    """Coordinates of a symmetry that stay where they are, `[blocks]` booleans, and why."""

    coordinates: Tensor
    reason: str


@dataclass(frozen=True, eq=False)
class Destination:
    """A point of the orbit by its group elements.

    Attributes:
        elements: By symmetry name; a symmetry without one stays.
        objective: What the point is called in tables.
        search: How it was found.
        stays: Coordinates that could not be moved, by symmetry name.
    """

    elements: Mapping[str, Tensor]
    objective: str = "given"
    search: Search = Search()
    stays: Mapping[str, Stays] = field(default_factory=dict)


def checked_elements(syms: SymmetrySet, elements: Mapping[str, object]) -> dict[str, Tensor]:
    """Group elements as the user gave them, in float64 on the host.

    Args:
        syms: The symmetries that they belong to.
        elements: By symmetry name, anything that `torch.as_tensor` reads, of the shape `symmetry.shape`: `[blocks]`
            numbers that are not 0, or invertible matrices `[blocks, dim, dim]`. Negative numbers are let pass here;
            whether the model allows them only its outputs tell.

    Returns:
        One tensor by name, for the symmetries given.

    Raises:
        DataError: An unknown name, another shape, a number that is not finite or 0, or a singular matrix.

    Example:
        >>> s = nf.find_symmetries(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)), torch.zeros(1, 2))
        >>> checked_elements(s, {"0 -> 2": [2.0, 3.0]})["0 -> 2"]
        tensor([2., 3.], dtype=torch.float64)
    """
    known = {s.name: s for s in syms}
    unknown = [n for n in elements if n not in known]
    if unknown:
        raise DataError(f"no symmetries named {unknown[:3]}; the names are {list(known)[:12]}")
    return {n: _checked_element(known[n], e) for n, e in elements.items()}


def _checked_element(symmetry: Symmetry, given: object) -> Tensor:
    name = f"group element of {symmetry.name!r}"
    try:
        element = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError) as cause:
        raise DataError(f"{name} must be numbers of shape {symmetry.shape}, got {given!r:.60}") from cause
    if tuple(element.shape) != symmetry.shape:
        raise DataError(f"{name} must have shape {symmetry.shape} ({symmetry.kind}), got {tuple(element.shape)}")
    if not bool(element.isfinite().all()):
        raise DataError(f"{name} has entries that are not finite: {int((~element.isfinite()).sum())} of them")
    if symmetry.is_torus:
        if bool((element == 0).any()):
            zero = int((element == 0).nonzero()[0])
            raise DataError(f"{name} is 0 at coordinate {zero}: scales must not be 0, that cannot be undone")
        _refuse_negative_powers(symmetry, element)
        return element
    spectrum = torch.linalg.svdvals(element)
    if bool((spectrum[:, -1] <= SINGULAR * spectrum[:, 0]).any()):
        raise DataError(f"{name} is singular (smallest singular value {float(spectrum[:, -1].min()):.1e}); invertible "
                        "matrices only")  # fmt: skip
    return element


def _refuse_negative_powers(symmetry: Symmetry, element: Tensor) -> None:
    """A negative scale has no `p^c` for an exponent `c` that is not a whole number."""
    broken = [leg.label for leg in symmetry.legs if leg.exponent != round(leg.exponent)]
    if broken and bool((element < 0).any()):
        raise DataError(
            f"group element of {symmetry.name!r} is negative at coordinate {int((element < 0).nonzero()[0])}, and "
            f"{broken[0]} is multiplied by a power of it that is no whole number; use positive scales"
        )


def equilibrium_at(model: nn.Module, syms: SymmetrySet, destination: Destination) -> Equilibrium:
    """The Equilibrium whose group elements are these: charges today and there, no noise.

    Args:
        model: Only read.
        syms: Its symmetries.
        destination: The elements, what they are called and how they were found.

    Returns:
        One Settled per symmetry. What is called imbalance is what `destination.search` says of it.
    """
    search, stays = destination.search, destination.stays
    tensors = tensors_of(model)
    names = dict.fromkeys(leg.parameter for s in syms for leg in s.legs)
    now = {n: tensors[n].detach().double().cpu() for n in names}
    there = dict(now)
    for s in syms:
        if s.name in destination.elements:
            there |= s.act(there, destination.elements[s.name])
    settled = []
    for s in syms:
        element, at = destination.elements.get(s.name, s.identity()), s.positions(there)
        settled.append(settled_at(s, element, (s.charge(now), s.form(at)), s.grams(at), stays.get(s.name)))
    moved = dict.fromkeys(n for s in syms for n in s.parameters)
    return Equilibrium(
        objective=destination.objective,
        settled=tuple(settled),
        imbalance_now=search.imbalance_now,
        imbalance=search.imbalance,
        iterations=search.sweeps,
        evaluations=search.sweeps,
        converged=search.converged,
        joint=True,
        norm_now=sum(float(now[n].square().sum()) for n in moved),
        norm=sum(float(there[n].square().sum()) for n in moved),
        trace_now=None,
        trace=None,
        symmetries=syms,
        solved_at={s.name: s.charge(now) for s in syms},
    )


def settled_at(
    s: Symmetry, element: Tensor, charges: tuple[Tensor, Tensor], grams: tuple[Tensor, ...], held: Stays | None
) -> Settled:
    """One symmetry that an element takes to a given point, with its charge before and after.

    Args:
        s: the symmetry.
        element: the identity where nothing moves.
        charges: now, and at the point.
        grams: of the weights on its legs at the point; empty where they are not kept.
        held: what stays of it, and why.
    """
    nothing = torch.zeros(s.blocks, dtype=torch.float64)
    return Settled(
        name=s.name,
        family=s.family,
        kind=s.kind,
        element=element,
        classification="finite" if held is None else "degenerate",
        charge_now=charges[0],
        charge=charges[1],
        weight_grams=grams,
        noise_grams=(),
        imbalance_now=nothing,
        imbalance=nothing,
        finite=torch.ones(s.blocks, dtype=torch.bool) if held is None else ~held.coordinates,
        reason="" if held is None else held.reason,
        eps=s.eps,
    )
