"""Sums of an optimiser's averages over the entries of each leg: all that the flow of a torus symmetry needs.

A step `theta' = theta - lr d m` with `d = 1 / (s + eps)` (SGD: `d = 1`) leaves, at first order, the preconditioned
charge `sum_i a_i theta_i^2 / d_i` unchanged; what moves it are `lr^2 sum_i a_i d_i m_i^2` and weight decay. With
learning rates that differ between legs the charge is `sum_i a_i (lr / lr_i) theta_i^2 / d_i`, `lr` the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noetherflow.equilibrium.averages import Averages, AveragingLaw
from noetherflow.symmetry.leg import Leg, accumulation_dtype
from noetherflow.symmetry.symmetry import Symmetry

ROWS = 64
"""Rows of a leg that are compared to find how many of its entries are independent."""


@dataclass(frozen=True, eq=False)
class LegSums:
    """One leg of a torus symmetry, summed over its entries: float64 `[blocks]` each, changes per step.

    Attributes:
        exponent: of the group element on this leg's weights, `a`.
        weight: `(lr / lr_i) theta^2 / d`, the leg's part of the preconditioned charge.
        decay: what weight decay takes of it.
        white: `lr lr_i s^2 d` of the average of squares: its growth if gradients were uncorrelated; None for SGD.
        held: `lr lr_i d m^2 (1 + b1) / (1 - b1)` of the average of gradients; None where the optimiser keeps none.
        eps_share: the part of `weight` that is due to `eps`.
    """

    exponent: float
    weight: Tensor
    decay: Tensor
    white: Tensor | None
    held: Tensor | None
    eps_share: Tensor

    def noise(self, source: str) -> Tensor | None:
        """`white` for the source `squares`, `held` for `momentum`."""
        return self.white if source == "squares" else self.held


def leg_sums(
    symmetry: Symmetry,
    averages: Mapping[str, Averages],
    law: AveragingLaw,
    lr: float,
    element: Tensor | None = None,
    only: Sequence[int] | None = None,
) -> tuple[LegSums, ...]:
    """The sums of every charge-carrying leg, at the present point or moved by a group element.

    Args:
        symmetry: a torus symmetry (scalar or diagonal).
        averages: by parameter name, of all its parameters.
        law: how the optimiser steps.
        lr: the learning rate that the charge is scaled by.
        element: `[blocks]`, moves the weights; gradients and their averages move the opposite way, `eps` does not.
        only: positions of the legs wanted; all by default.

    Returns:
        One record per leg of `symmetry.weight_legs`, or per leg wanted.
    """
    legs = symmetry.weight_legs if only is None else tuple(symmetry.weight_legs[i] for i in only)
    return tuple(_summed(symmetry, g, averages[g.parameter], law, lr, element) for g in legs)


def mean_sums(parts: Sequence[Sequence[LegSums]]) -> tuple[LegSums, ...]:
    """The sums of every leg, averaged over snapshots of a run."""
    return tuple(_mean_of(leg) for leg in zip(*parts, strict=True))


def _mean_of(leg: Sequence[LegSums]) -> LegSums:
    """The mean of one leg; the share of `eps` is the largest."""

    def mean(values: Sequence[Tensor | None]) -> Tensor | None:
        known = [v for v in values if v is not None]
        return torch.stack(known).mean(0) if known else None

    return LegSums(
        leg[0].exponent,
        torch.stack([p.weight for p in leg]).mean(0),
        torch.stack([p.decay for p in leg]).mean(0),
        mean([p.white for p in leg]),
        mean([p.held for p in leg]),
        torch.stack([p.eps_share for p in leg]).amax(0),
    )


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, 0 where the gradient has always been 0."""
    return torch.where(b > 0, a / b, torch.zeros_like(a))


def _summed(
    symmetry: Symmetry, leg: Leg, averages: Averages, law: AveragingLaw, lr: float, element: Tensor | None
) -> LegSums:
    """The sums of one leg, piece by piece: parameters may be large."""
    rates, eps, scale = averages.rates, law.eps or 0.0, lr / averages.rates.lr
    theta = symmetry.positions({averages.name: averages.theta.detach()})[averages.name]
    given = {"theta": theta, "square": averages.square, "mean": averages.mean}
    if element is not None:
        given["factor"] = _factors(symmetry, leg, theta, element)
    names = [name for name, tensor in given.items() if tensor is not None]
    found = leg.sums_by_piece(
        lambda *pieces: _entries(averages, eps, **dict(zip(names, pieces, strict=True))),
        [tensor for tensor in given.values() if tensor is not None],
    )
    plain, weight, white, held = (sums.double().cpu() for sums in found)
    plain, weight = plain * scale, weight * scale
    decayed = weight if law.decoupled or law.kind == "sgd" else plain
    step = lr * rates.lr
    return LegSums(
        leg.exponent,
        weight,
        rates.lr * law.decay_per_step(rates) * decayed,
        None if averages.square is None else step * white,
        None if averages.mean is None else step * law.persistence * held,
        _quotient(plain * eps, weight),
    )


def _factors(symmetry: Symmetry, leg: Leg, theta: Tensor, element: Tensor) -> Tensor:
    """By how much the element multiplies each weight of a parameter."""
    if sum(other.parameter == leg.parameter for other in symmetry.legs) == 1:
        return leg.moved_by(theta, element)
    return symmetry.move(leg.parameter, torch.ones_like(theta, dtype=torch.float64), element)


def _entries(
    averages: Averages,
    eps: float,
    theta: Tensor,
    square: Tensor | None = None,
    mean: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`theta^2`, `theta^2 / d`, `s^2 d` and `m^2 d` of a piece of a parameter, 0 for what the optimiser does not keep;
    `factor` multiplies weights and divides averages of gradients.
    """
    theta = accumulation_dtype(theta)
    by = torch.ones((), dtype=theta.dtype) if factor is None else factor.to(theta.dtype)
    back = by.reciprocal()
    theta_square = (theta * by).square_()
    nothing = torch.zeros((), dtype=theta.dtype).expand_as(theta)
    mean_square = nothing if mean is None else (accumulation_dtype(mean) * (back / averages.mean_total)).square_()
    if square is None:
        return theta_square, theta_square, nothing, mean_square
    root = (accumulation_dtype(square) / averages.square_total).sqrt_() * back
    over = root + eps
    step = over.reciprocal() if eps else torch.where(over > 0, over.reciprocal(), nothing)
    return theta_square, theta_square * over, root.square_() * step, mean_square * step


def independent_entries(leg: Leg, averages: Averages) -> Tensor:
    """How many independent numbers the average of gradients holds in each coordinate of a leg: `[blocks]`, at least 1.

    The entries of one row move together where few samples or few input directions carry the gradient. For rows that
    share a covariance `R` the squared cosine between two of them is `Tr R^2 / (Tr R)^2` in the mean, one over their
    effective number; it is measured on at most `ROWS` of them. A few large entries lower the number further.

    Source: theory.md section 13.
    """
    assert averages.mean is not None
    sums, fourth = _powers(leg, averages.mean)
    by_size = torch.where(fourth > 0, 3 * sums.square() / fourth, torch.ones_like(sums))
    by_direction = _directions(leg.unfold(averages.mean).flatten(1)) if leg.blocks > 1 else _of_whole(averages.mean)
    return by_size.clamp(max=by_direction).clamp_min(1.0)


def entries_of_whole(leg: Leg, averages: Averages) -> float:
    """How many independent numbers the average of gradients holds in a leg with all its coordinates, at least 1."""
    assert averages.mean is not None
    sums, fourth = (float(found.sum()) for found in _powers(leg, averages.mean))
    by_size = 3 * sums**2 / fourth if fourth > 0 else 1.0
    return max(1.0, min(by_size, _of_whole(averages.mean)))


def _powers(leg: Leg, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Second and fourth powers, summed over the entries of each coordinate."""

    def powers(piece: Tensor) -> tuple[Tensor, Tensor]:
        square = accumulation_dtype(piece).square()
        return square, square.square()

    sums, fourth = (found.double().cpu() for found in leg.sums_by_piece(powers, [mean]))
    return sums, fourth


def _directions(rows: Tensor) -> float:
    """One over the mean squared cosine between rows; infinite where there is but one that is not 0."""
    chosen = rows[:: max(1, len(rows) // ROWS)][:ROWS].double()
    norms = torch.linalg.vector_norm(chosen, dim=1)
    unit = chosen[norms > 0] / norms[norms > 0][:, None]
    pairs = len(unit) * (len(unit) - 1)
    cosines = float((unit @ unit.mT).square().sum()) - len(unit)
    return pairs / cosines if pairs and cosines > 0 else torch.inf


def _of_whole(mean: Tensor) -> float:
    """The same for a leg of one coordinate, a whole parameter: independent rows times independent columns."""
    if mean.ndim < 2:
        return torch.inf
    matrix = mean.flatten(1)
    return _directions(matrix) * _directions(matrix.mT)
