"""The noise equilibrium of a whole network: group elements that stop the Noether flow (theory.md section 5)."""

from noetherflow.equilibrium.blocks import gl_equilibrium, torus_equilibrium
from noetherflow.equilibrium.factors import Factors, gradient_factors
from noetherflow.equilibrium.joint import noise_equilibrium
from noetherflow.equilibrium.result import Equilibrium, Settled
from noetherflow.equilibrium.weights import Drift

__all__ = [
    "Drift",
    "Equilibrium",
    "Factors",
    "Settled",
    "gl_equilibrium",
    "gradient_factors",
    "noise_equilibrium",
    "torus_equilibrium",
]
