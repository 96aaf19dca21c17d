"""The curvature that a diagnosis looks at: of which kind, on how many samples, and what to do where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.inputs import LossFn
from noetherflow.core.optimizers import Settings
from noetherflow.core.settings import SGDConfig
from noetherflow.diagnosis.facts import PresentSharpness
from noetherflow.diagnosis.unanswered import Unanswered, known
from noetherflow.equilibrium import Equilibrium
from noetherflow.equilibrium.curvature import top_eigenvalue
from noetherflow.equilibrium.flow import Flow
from noetherflow.equilibrium.sharpness import Sharpness, sharpness_forecast
from noetherflow.equilibrium.validity import SquareMemory, square_memory
from noetherflow.errors import NoetherflowError
from noetherflow.moments import GradientMoments

PROBES = 16
"""Hessian products for a trace."""
ACCURACY = 0.01
"""Relative accuracy of the largest eigenvalue under Adam, which is held against thresholds and told in two digits."""
LARGE = 2_000_000
"""Trainable entries above which curvature is measured only on request."""
Curvature = Sharpness | PresentSharpness | SquareMemory | None
"""What is known of the curvature, and of Adam's memory of squares."""
REMEDY = "return one loss per sample from loss_fn(model, batch), or pass the criterion itself; curvature=True says more"
"""What measures a curvature that could not be measured."""


def remedy(model: nn.Module, settings: Settings, wanted: bool | None) -> str:
    """What would measure a curvature that is missing; empty where asking for it would."""
    if not isinstance(settings, SGDConfig | AdamConfig):
        return "nothing: steps of this optimiser have one size at any curvature"
    return REMEDY if wants_curvature(model, wanted) else ""


def wants_curvature(model: nn.Module, wanted: bool | None) -> bool:
    """As asked; where nobody asked, up to `LARGE` trainable entries."""
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return size <= LARGE if wanted is None else wanted


def curvature_of(
    moments: GradientMoments,
    model: nn.Module,
    loss_fn: LossFn,
    data: Sequence[Any],
    flow: Flow | Unanswered,
    eq: Equilibrium | Unanswered,
    settings: Settings,
    wanted: bool | None,
) -> Curvature:
    """Sharpness under SGD, the memory of squares under Adam; None where it is not wanted or cannot be measured.

    Raises:
        NoetherflowError: it cannot be measured, and was asked for.
    """
    if not wants_curvature(model, wanted):
        return None
    try:
        unknown = isinstance(flow, Unanswered) or isinstance(eq, Unanswered) or not flow.regime.constant
        if isinstance(settings, SGDConfig) and unknown:
            top = top_eigenvalue(model, loss_fn, data)
            return PresentSharpness(top, settings.lr, settings.stability_limit)
        if isinstance(settings, SGDConfig):
            found = sharpness_forecast(model, loss_fn, data, known(eq), known(flow), probes=PROBES)
            return found if isinstance(found, Sharpness) else None
        if isinstance(settings, AdamConfig):
            return square_memory(model, loss_fn, data, moments, settings, accuracy=ACCURACY)
    except NoetherflowError:
        if wanted:
            raise
    return None
