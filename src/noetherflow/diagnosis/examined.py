"""What was measured of one model, for its diagnosis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from noetherflow.core.optimizers import Settings
from noetherflow.core.schedule import CONSTANT, RateCourse
from noetherflow.core.sightings import Sightings
from noetherflow.diagnosis.facts import PresentSharpness
from noetherflow.diagnosis.unanswered import Unanswered, known
from noetherflow.equilibrium.charge_flow import ChargeFlow
from noetherflow.equilibrium.flow import Flow
from noetherflow.equilibrium.result import Equilibrium, Settled
from noetherflow.equilibrium.sharpness import Sharpness
from noetherflow.equilibrium.validity import SquareMemory
from noetherflow.moments.result import GradientMoments
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(frozen=True, eq=False)
class Examined:
    """All that was measured of one model.

    Attributes:
        model: at the weights that were measured.
        symmetries: those that were measured.
        refused: by name, why the certificate refused others.
        moments: of the gradients, with `entries=True`.
        flow: under `settings`; Unanswered where the moments do not determine it.
        equilibrium: where it ends, likewise.
        settings: the optimiser's.
        curvature: the sharpness forecast (SGD; the present sharpness without an equilibrium), the memory of squares
            (Adam), or None where it was not measured.
        steps: of training to come.
        warmup: steps of warmup planned, None where nobody said.
        started: the optimiser has made steps.
        steps_given: somebody said how many steps are to come.
        remedy: what would measure the curvature, where an attempt failed.
        course: of the learning rate over these steps, whose largest is that of `settings`.
        uncertified: the symmetries that the certificate refused; their units can be dead all the same.
        seen: what was seen of the activations during the measurement.
    """

    model: nn.Module
    symmetries: SymmetrySet
    refused: dict[str, str]
    moments: GradientMoments
    flow: Flow | Unanswered
    equilibrium: Equilibrium | Unanswered
    settings: Settings
    curvature: Sharpness | PresentSharpness | SquareMemory | None
    steps: int
    warmup: int | None
    started: bool
    steps_given: bool = True
    remedy: str = ""
    uncertified: tuple[Symmetry, ...] = ()
    seen: Sightings = field(default_factory=Sightings)
    course: RateCourse = CONSTANT


def named(examined: Examined) -> Iterator[tuple[Symmetry, ChargeFlow, Settled]]:
    """Every symmetry that flow and equilibrium cover, with its flow and where it settles.

    Raises:
        MomentError: flow or equilibrium are not known.
    """
    flows = {r.name: r for r in known(examined.flow).details}
    for settled in known(examined.equilibrium):
        if settled.name in flows:
            yield examined.symmetries[settled.name], flows[settled.name], settled
