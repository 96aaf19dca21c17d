"""The noise equilibrium of a whole network: group elements that stop the Noether flow (theory.md section 5)."""

from noetherflow.equilibrium.blocks import gl_equilibrium, torus_equilibrium
from noetherflow.equilibrium.joint import noise_equilibrium
from noetherflow.equilibrium.potential import Drift
from noetherflow.equilibrium.result import Equilibrium, Settled

__all__ = [
    "Drift",
    "Equilibrium",
    "Settled",
    "gl_equilibrium",
    "noise_equilibrium",
    "torus_equilibrium",
]
