"""Attention heads: which symmetries are of them, how many there are, and one number for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

QUERY_KEY = ("attention-qk", "rotary-qk")
HEADS = (*QUERY_KEY, "attention-vo")
"""Families whose blocks or coordinates belong to attention heads."""


def scales_of(symmetry: Symmetry) -> Symmetry:
    """The subgroup of a general_linear symmetry that multiplies each block by one number; a torus as it is.

    Optimisers that treat every entry by itself have no theory for matrices, but have one for these scales: the balance
    of each head's value weights against its output weights.

    Returns:
        A diagonal symmetry of the same name with one coordinate per block.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
        >>> syms = nf.find_symmetries(model, torch.randn(2, 3))
        >>> syms[0].kind, scales_of(syms[0]).kind, scales_of(syms[0]).blocks
        ('general_linear', 'diagonal', 1)
    """
    if symmetry.is_torus:
        return symmetry
    legs = tuple(replace(leg, index=leg.index.reshape(leg.blocks, 1, leg.dim * leg.replicas)) for leg in symmetry.legs)
    return Symmetry(symmetry.name, symmetry.family, "diagonal", legs, symmetry.eps, symmetry.note)


def with_scales(syms: SymmetrySet) -> SymmetrySet:
    """The same set with every general_linear symmetry replaced by its scales."""
    return replace(syms, symmetries=tuple(scales_of(s) for s in syms))


def part_of(symmetry: Symmetry) -> str:
    """What the diagnosis counts a layer by, in a word: heads also where a symmetry moves pairs of their coordinates."""
    return "head" if symmetry.family in HEADS else symmetry.part


def heads_in(symmetry: Symmetry, syms: Iterable[Symmetry]) -> int:
    """How many heads share the coordinates of an attention symmetry.

    A matrix symmetry has one block per head; where rotary positions leave single pairs of coordinates, the value and
    output weights of the same layer tell.
    """
    if not symmetry.is_torus or symmetry.family != "rotary-qk":
        return symmetry.blocks
    layer = symmetry.parameters[0].rpartition(".")[0].rpartition(".")[0]
    siblings = [s for s in syms if s.family == "attention-vo" and s.parameters[0].startswith(f"{layer}.")]
    blocks = siblings[0].blocks if siblings else symmetry.blocks
    return blocks if symmetry.blocks % blocks == 0 else symmetry.blocks
