"""Parameter symmetries of neural networks, the Noether flow along them, and the noise equilibrium."""

from noetherflow.legs import Leg
from noetherflow.sgd import SGDConfig
from noetherflow.symmetry import Symmetry, Translation
from noetherflow.symmetry_set import SymmetrySet, declare, tensors_of

__version__ = "0.1.0"

__all__ = ["Leg", "SGDConfig", "Symmetry", "SymmetrySet", "Translation", "declare", "tensors_of"]
