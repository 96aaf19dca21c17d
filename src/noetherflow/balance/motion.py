"""What a group element does to weights, gradients and their squares, parameter by parameter (theory.md section 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import DataError
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry


@dataclass(frozen=True, eq=False)
class Reordering:
    """Channels that change places: block `i` of every leg becomes what block `order[i]` was."""

    legs: tuple[Leg, ...]
    order: Tensor

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """One parameter, or what has an entry for each of its entries, reordered on all its legs."""
        for leg in self.legs:
            if leg.parameter == name:
                tensor = leg.fold(tensor, leg.unfold(tensor)[self.order.to(tensor.device)])
        return tensor


@dataclass(frozen=True, eq=False)
class Motion:
    """`theta -> G P theta` for several symmetries, one group element each by name, after the permutations `P` of
    `reorderings` (none, as a rule). Results are float64.
    """

    symmetries: Sequence[Symmetry]
    elements: Mapping[str, Tensor]
    reorderings: tuple[Reordering, ...] = ()

    @classmethod
    def of(cls, eq: Equilibrium) -> Motion:
        """The motion to an equilibrium: its symmetries whose element is not the identity."""
        elements = {name: element.double() for name, element in eq.elements.items()}
        return cls([s for s in eq.symmetries if not torch.equal(elements[s.name], s.identity())], elements)

    @cached_property
    def by_parameter(self) -> dict[str, list[Symmetry]]:
        """The symmetries with a leg on each moved tensor; none where it is only reordered."""
        out: dict[str, list[Symmetry]] = {leg.parameter: [] for r in self.reorderings for leg in r.legs}
        for s in self.symmetries:
            for name in dict.fromkeys(leg.parameter for leg in s.legs):
                out.setdefault(name, []).append(s)
        return out

    def is_torus(self, name: str) -> bool:
        """True when every entry of the tensor is multiplied by a number."""
        return all(s.is_torus for s in self.by_parameter[name])

    def weight(self, name: str, tensor: Tensor) -> Tensor:
        """`X -> G X` on `+` legs, `X -> G^-T X` on `-` legs."""
        return self._each(name, tensor, lambda s, out: s.move_weight(name, out, self.elements[s.name]))

    @cached_property
    def of_gradients(self) -> Motion:
        """The motion that does to weights what this one does to gradients."""
        duals = {s.name: _dual(s, self.elements[s.name]) for s in self.symmetries}
        return Motion([_without_offsets(s) for s in self.symmetries], duals, self.reorderings)

    @cached_property
    def of_squares(self) -> Motion:
        """The motion that does to weights what this one does to second moments of gradients, on tori."""
        tori = [_without_offsets(s) for s in self.symmetries if s.is_torus]
        return Motion(tori, {s.name: _dual(s, self.elements[s.name]).square() for s in tori}, self.reorderings)

    def gradient(self, name: str, tensor: Tensor) -> Tensor:
        """`dX -> G^-T dX` on `+` legs, `dX -> G dX` on `-` legs."""
        return self._each(name, tensor, lambda s, out: s.move(name, out, _dual(s, self.elements[s.name])))

    def squares(self, name: str, tensor: Tensor) -> Tensor:
        """Second moments `v` of gradients `dX -> A dX` whose entries are taken as uncorrelated: `v -> (A * A) v`."""
        return self._each(name, tensor, lambda s, out: _squares(s, name, out, _dual(s, self.elements[s.name])))

    def _each(self, name: str, tensor: Tensor, move: Callable[[Symmetry, Tensor], Tensor]) -> Tensor:
        out = tensor.detach().double()
        for reordering in self.reorderings:
            out = reordering.of(name, out)
        for s in self.by_parameter.get(name, ()):
            out = move(s, out)
        return out


def _dual(symmetry: Symmetry, element: Tensor) -> Tensor:
    inverse = symmetry.inverse(element)
    return inverse if symmetry.is_torus else inverse.mT


def _without_offsets(symmetry: Symmetry) -> Symmetry:
    """The same action on what moves linearly: gradients do not know where the weights' orbit has its origin."""
    return replace(symmetry, legs=tuple(replace(leg, offset=0.0) for leg in symmetry.legs))


def _squares(symmetry: Symmetry, name: str, tensor: Tensor, dual: Tensor) -> Tensor:
    if symmetry.is_torus:
        return symmetry.move(name, tensor, dual.square())
    other = torch.linalg.inv(dual).mT
    for leg in symmetry.legs:
        if leg.parameter == name:
            tensor = leg.multiply(tensor, (dual if leg.sign > 0 else other).to(tensor.device).square())
    return tensor


def refuse_frozen(model: nn.Module, motion: Motion) -> None:
    """Refuse to move parameters that are frozen: adapters, or files that hold a part of the model, would miss it.

    Raises:
        DataError: names them and the remedy.
    """
    tensors = tensors_of(model)
    moved = [n for n in motion.by_parameter if isinstance(tensors.get(n), nn.Parameter)]
    frozen = [n for n in moved if not tensors[n].requires_grad]
    if frozen:
        raise DataError(
            f"{frozen[:4]} ({len(frozen)} in all) are frozen (requires_grad=False) and would move: leave their "
            "symmetries out, syms.trainable(model) (and solve again where an equilibrium was solved before), or "
            "unfreeze them first, model.requires_grad_(True)"
        )
