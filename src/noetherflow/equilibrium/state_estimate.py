"""Flow, equilibrium and time scale of one torus symmetry from the sums of an optimiser's averages over its legs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from noetherflow.equilibrium.averages import AveragingLaw
from noetherflow.equilibrium.blocks import classify_torus
from noetherflow.equilibrium.monotone import zero_of_log_ratio
from noetherflow.equilibrium.state_sums import LegSums

Source = Literal["squares", "momentum"]


@dataclass(frozen=True, eq=False)
class LegOrbit:
    """The leg sums at the points that torus elements `[blocks]` move the weights to, and how exact they are."""

    at: Callable[[Tensor], Sequence[LegSums]]
    rounding: float


DIFFERENCE = 1e-3
"""Step in the log of an element by which slopes at the equilibrium are taken."""


@dataclass(frozen=True, eq=False)
class FlowEstimate:
    """The flow of one symmetry from one of the two averages, and where it leads; layout of the symmetry.

    Attributes:
        source: `squares` (the average of squared gradients; holds for gradients that are uncorrelated from step to
            step) or `momentum` (the average of gradients; holds for any).
        noise: expected growth of the preconditioned charge per step by the gradients.
        error: standard error of `noise`.
        drift: `noise` less what weight decay takes.
        imbalance: `|drift|` over all that pushes either way, `[blocks]`; 0 at the equilibrium, at most 1.
        finite: where there is an equilibrium, `[blocks]`.
        element: moves the weights there, every other symmetry held; the identity where not finite.
        log_error: standard error of `log element` (general_linear: None).
        relaxation_steps: steps in which a small deviation falls by e near the equilibrium, `[blocks]`; 0 where not
            finite.
    """

    source: Source
    noise: Tensor
    error: Tensor
    drift: Tensor
    imbalance: Tensor
    finite: Tensor
    element: Tensor
    log_error: Tensor | None
    relaxation_steps: Tensor


def pushes(legs: Sequence[LegSums], source: Source) -> tuple[Tensor, Tensor]:
    """What drives a coordinate to larger and to smaller elements per step; the drift is the difference.

    Args:
        legs: the sums at one point.
        source: which average the noise is taken from.

    Returns:
        `(up, down)`, `[blocks]` each: noise on `+` legs and decay on `-` legs, and the other way round, weighted by the
        size of the exponents.
    """
    up = torch.zeros_like(legs[0].weight)
    down = torch.zeros_like(up)
    for leg in legs:
        noise, decay = abs(leg.exponent) * _of(leg, source), abs(leg.exponent) * leg.decay
        up, down = (up + noise, down + decay) if leg.exponent > 0 else (up + decay, down + noise)
    return up, down


def estimate(
    legs: Sequence[LegSums], orbit: LegOrbit, law: AveragingLaw, source: Source, relative_errors: Sequence[Tensor]
) -> FlowEstimate:
    """Everything about one torus symmetry from one average.

    Along the orbit the noise falls and the decay rises with the element, so that their difference has one zero: the
    minimum of `Psi = sum (lr s + 2 w s theta^2)` for Adam, of `sum (lr s^2 + ...) / 2` for SGD.

    Args:
        legs: the sums at the present point.
        orbit: the sums elsewhere.
        law: how the optimiser steps.
        source: which average the noise is taken from.
        relative_errors: of the noise of every leg, `[blocks]` each.

    Returns:
        The estimate; coordinates without an equilibrium are marked in `finite`.

    Source: theory.md section 13, "Equilibrium" and "The state identity".
    """
    up, down = pushes(legs, source)
    finite = classify_torus(down, up).finite
    logs = _equilibrium(orbit, source, finite, _slopes(legs, law))
    there = orbit.at(logs.exp())
    steepness = _steepness(orbit, source, logs)
    total = up + down
    noises = [leg.exponent * _of(leg, source) for leg in legs]
    weight = torch.stack([leg.exponent**2 * leg.weight for leg in there]).sum(0)
    return FlowEstimate(
        source=source,
        noise=torch.stack(noises).sum(0),
        error=_error(legs, source, relative_errors),
        drift=up - down,
        imbalance=torch.where(total > 0, (up - down).abs() / total, torch.zeros_like(total)),
        finite=finite,
        element=logs.exp(),
        log_error=_where(finite, _error(there, source, relative_errors) / steepness),
        relaxation_steps=_where(finite, 2 * weight / steepness),
    )


def scaled_sums(legs: Sequence[LegSums], law: AveragingLaw, element: Tensor) -> tuple[LegSums, ...]:
    """The sums moved by an element where `eps` does not count: powers of it.

    The gradients' part of Adam falls like the root mean square, its decay grows like root times square; SGD's two parts
    go like squares.
    """
    return tuple(_scaled(leg, law, element) for leg in legs)


def _scaled(leg: LegSums, law: AveragingLaw, element: Tensor) -> LegSums:
    once = element**leg.exponent
    noise = 1 / (once if law.eps is not None else once.square())
    weight = once if law.eps is not None else once.square()
    decay = once.square() if not law.decoupled else once
    return replace(
        leg,
        weight=leg.weight * weight,
        decay=leg.decay * decay,
        white=None if leg.white is None else leg.white * noise,
        held=None if leg.held is None else leg.held * noise,
    )


def _of(leg: LegSums, source: Source) -> Tensor:
    noise = leg.noise(source)
    assert noise is not None
    return noise


def _error(legs: Sequence[LegSums], source: Source, relative: Sequence[Tensor]) -> Tensor:
    """Standard error of the noise, whose legs err independently."""
    parts = [(leg.exponent * _of(leg, source) * r).square() for leg, r in zip(legs, relative, strict=True)]
    return torch.stack(parts).sum(0).sqrt()


def _slopes(legs: Sequence[LegSums], law: AveragingLaw) -> tuple[float, float]:
    """The least and the largest slope that `log(up / down)` can have: twice the exponent to four times."""
    sizes = [abs(leg.exponent) for leg in legs]
    return 2 * min(sizes) * (2 if law.eps is None else 1), 4 * max(sizes)


def _equilibrium(orbit: LegOrbit, source: Source, finite: Tensor, slopes: tuple[float, float]) -> Tensor:
    """Log of the element at which the pushes are equal, 0 where not finite."""

    def ratio(logs: Tensor) -> Tensor:
        up, down = pushes(orbit.at(logs.expand(len(finite)).exp()), source)
        one = torch.ones_like(up)
        return torch.where(finite, (torch.where(finite, up, one) / torch.where(finite, down, one)).log(), 0 * up)

    if not bool(finite.any()):
        return torch.zeros(len(finite), dtype=torch.float64)
    return zero_of_log_ratio(ratio, *slopes, tolerance=orbit.rounding)


def _steepness(orbit: LegOrbit, source: Source, logs: Tensor) -> Tensor:
    """How fast the drift falls with the log of the element, at `logs`."""
    drifts = []
    for side in (1, -1):
        up, down = pushes(orbit.at((logs + side * DIFFERENCE).exp()), source)
        drifts.append(up - down)
    return (drifts[1] - drifts[0]) / (2 * DIFFERENCE)


def _where(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values, torch.zeros_like(values))
