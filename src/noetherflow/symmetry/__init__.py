"""Symmetry algebra: group elements acting on legs, sets of symmetries, where their legs meet."""

from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry, Translation
from noetherflow.symmetry.symmetry_set import SymmetrySet

__all__ = ["Leg", "Symmetry", "SymmetrySet", "Translation"]
