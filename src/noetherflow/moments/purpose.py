"""What a measurement has to hold for the answers that it is meant for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from noetherflow.errors import DataError
from noetherflow.moments.factors import refuse_tensors
from noetherflow.symmetry.overlap import leg_coordinates, mixed_parameters, overlapping_parameters
from noetherflow.symmetry.symmetry_set import SymmetrySet

Purpose = Literal["flow", "equilibrium"]


@dataclass(frozen=True)
class Wanted:
    """What is measured beside leg Grams and mean gradients: squares of all `entries`, and `factors` of parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> syms = nf.find_symmetries(model, torch.randn(3, 4))
        >>> Wanted.of(syms, dict(model.named_parameters()), "equilibrium")  # two tori meet in the middle weight
        Wanted(entries=True, factors=frozenset())
    """

    entries: bool = False
    factors: frozenset[str] = frozenset()

    @classmethod
    def of(cls, syms: SymmetrySet, tensors: dict[str, Tensor], purpose: Purpose) -> Wanted:
        """What the symmetries of a model with these tensors need.

        Raises:
            DataError: an unknown purpose.
            MomentError: factors are needed of a parameter that is no matrix.
        """
        if purpose not in get_args(Purpose):
            raise DataError(f"for_ must be one of {list(get_args(Purpose))}, got {purpose!r}")
        if purpose == "flow":
            return cls()
        symmetries = list(syms)
        shapes = {n: tuple(tensors[n].shape) for s in symmetries for n in s.parameters}
        coordinates = leg_coordinates(symmetries, shapes)
        mixed = mixed_parameters(coordinates, symmetries)
        refuse_tensors({n: tensors[n] for n in mixed})
        return cls(bool(overlapping_parameters(coordinates) - mixed.keys()), frozenset(mixed))
