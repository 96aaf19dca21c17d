"""What becomes of each symmetry, in a class and in words: which coordinates settle, and why others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from noetherflow.equilibrium.blocks import GLClasses, TorusClasses
from noetherflow.equilibrium.conditioning import Stretches
from noetherflow.symmetry.symmetry import Symmetry

Class = Literal["finite", "one-sided", "degenerate", "ill-conditioned"]
CAUSES = {
    "neutral": "no noise and no decay on either side (dead or unused)",
    "grows": "scale recedes to infinity: nothing pulls back (no gradient through the - legs)",
    "shrinks": "scale recedes to zero: nothing pushes back (no gradient on the + legs)",
    "invalid": "an estimated second moment is negative or not finite: measure more samples",
}
DIRECTIONS = {
    "shrinks": "shrink to zero (no gradient noise or weight beyond this rank)",
    "grows": "grow without bound",
    "neutral": "are moved by nothing",
}


@dataclass(frozen=True, eq=False)
class Outcome:
    """The class of a symmetry, which coordinates (torus) or blocks (general_linear) have a finite equilibrium
    `[blocks]`, and why not all of them (empty where all do).
    """

    classification: Class
    finite: Tensor
    reason: str = ""


def torus_verdict(symmetry: Symmetry, classes: TorusClasses, decays: bool) -> Outcome:
    """The verdict on a torus; `decays`: something holds the norm of the weights back."""
    if bool(classes.finite.all()):
        return Outcome("finite", classes.finite)
    recedes = bool((classes.grows | classes.shrinks).any())
    if symmetry.one_sided and not decays and recedes and not bool(classes.invalid.any()):
        why = "all legs scale the same way and no weight decay holds the norm: it grows for ever"
        return Outcome("one-sided", classes.finite, why)
    counts = {name: int(getattr(classes, name).sum()) for name in CAUSES}
    parts = [f"{count} of {symmetry.blocks}: {CAUSES[name]}" for name, count in counts.items() if count]
    return Outcome("degenerate", classes.finite, "; ".join(parts))


def gl_verdict(symmetry: Symmetry, classes: GLClasses, stretches: Stretches) -> Outcome:
    """The verdict on a general_linear symmetry; where the factors are too stretched for Grams it says so, and no
    more.
    """
    rank = GLClasses.rank(classes.finite)
    finite = rank == symmetry.dim
    if bool(finite.all()):
        trusted = symmetry.name not in stretches.imprecise
        return Outcome("finite", finite, "" if trusted else f"few digits: {stretches.advice(symmetry.name)}")
    if stretches.by_name[symmetry.name] > stretches.limit:
        return Outcome("ill-conditioned", finite, stretches.advice(symmetry.name))
    counts = {name: int(GLClasses.rank(getattr(classes, name)).sum()) for name in DIRECTIONS}
    parts = [f"{count} directions {DIRECTIONS[name]}" for name, count in counts.items() if count]
    reason = f"of {symmetry.blocks * symmetry.dim}: " + ", ".join(parts)
    if not int(rank.sum()):
        reason += "; if a factor is zero (LoRA's B at initialisation), train some steps first, then balance"
    return Outcome("degenerate", finite, reason)
