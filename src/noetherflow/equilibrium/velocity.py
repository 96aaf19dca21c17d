"""The generators that move all charges at once as the expected flow says: one linear equation, by conjugate
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from noetherflow.equilibrium.orbit import MeasuredOrbit
from noetherflow.equilibrium.terms import EntrySlope, LegSlope, PointSlope

DENSE = 500
"""Coordinates of tori up to which their slope is worked out as a matrix."""
Generators = list[Tensor]
"""One generator per symmetry, in its layout; symmetric matrices for general_linear."""


@dataclass(frozen=True, eq=False)
class OwnSlope:
    """How a symmetry's charge changes under its own generator alone: `dC = A K + K A` with `K = sum_legs exponent^2
    K_leg`.

    `values`: `2 K` of a torus; the eigenvalues of `K` for general_linear, with `vectors` its eigenvectors.
    """

    values: Tensor
    vectors: Tensor | None

    @classmethod
    def of(cls, k: Tensor, torus: bool) -> OwnSlope:
        """From `K`."""
        if torus:
            return cls(2 * k, None)
        values, vectors = torch.linalg.eigh(k)
        return cls(values, vectors)

    def solve(self, right: Tensor) -> Tensor:
        """`A` with `A K + K A = right`, zero where the slope is zero or rounding."""
        if self.vectors is None:
            return divide(right, self.values)
        slopes = self.values.unsqueeze(-1) + self.values.unsqueeze(-2)
        rounding = 1e-12 * slopes.abs().amax((-2, -1), keepdim=True)
        v = self.vectors
        return v @ divide(v.mT @ right @ v, slopes, rounding) @ v.mT


@dataclass(frozen=True, eq=False)
class ChargeSlope:
    """The linear map from generators of all symmetries to the change of all charges, at one point of the orbit.

    It is symmetric and positive semi-definite, and each symmetry's own slope is a good approximation of its part.
    """

    terms: Sequence[PointSlope]
    own: tuple[OwnSlope, ...]

    def apply(self, generators: Generators) -> Generators:
        """`dC[A]` for all symmetries."""
        out = [torch.zeros_like(g) for g in generators]
        for term in self.terms:
            term.add(generators, out)
        return out

    def approximate_inverse(self, changes: Generators) -> Generators:
        """Generators that would make these changes if every symmetry moved alone."""
        return [own.solve(c) for own, c in zip(self.own, changes, strict=True)]


@dataclass(frozen=True, eq=False)
class Iterate:
    """One iterate of the conjugate gradients for `slope(x) = right`: `residual` is what is missing, `direction`
    where to go next, `size` the residual's square in the metric of the approximate inverse.
    """

    x: Generators
    residual: Generators
    direction: Generators
    size: float


def orbit_velocity(orbit: MeasuredOrbit, elements: Sequence[Tensor], tolerance: float = 1e-11) -> Generators:
    """Generators `A` (symmetric for GL) with `dC[A] = E[C' - C]` for all symmetries at the point `elements`."""
    point = orbit.at(elements)
    drift, own = [], []
    for s, pairs in zip(orbit.symmetries, point.pairs, strict=True):
        charge, drive = s.combine(tuple(k for k, _ in pairs)), s.combine(tuple(m for _, m in pairs))
        drift.append(drive - orbit.potential.norm * charge)
        k = torch.stack([leg.exponent**2 * k for leg, (k, _) in zip(s.weight_legs, pairs, strict=True)]).sum(0)
        own.append(OwnSlope.of(k, s.is_torus))
    slopes = tuple(term.slope_at(elements) for term in orbit.terms)
    matrix = torus_matrix(slopes, drift)
    if matrix is None:
        return conjugate_gradients(ChargeSlope(slopes, tuple(own)), drift, tolerance)
    alone = OwnSlope(torch.cat([o.values for o in own]), None)
    (rates,) = conjugate_gradients(ChargeSlope((MatrixSlope(matrix),), (alone,)), [torch.cat(drift)], tolerance)
    return list(torch.split(rates, [len(d) for d in drift]))


@dataclass(frozen=True, eq=False)
class MatrixSlope:
    """The slope of all tori, their coordinates one after the other, as one matrix."""

    matrix: Tensor

    def add(self, generators: Sequence[Tensor], out: list[Tensor]) -> None:
        out[0] = out[0] + self.matrix @ generators[0]


def torus_matrix(slopes: Sequence[PointSlope], charges: Sequence[Tensor]) -> Tensor | None:
    """The sum of the slopes as one matrix; None where it would be large, or not all symmetries are tori."""
    offsets = [0, *accumulate(c.numel() for c in charges)]
    if offsets[-1] > DENSE or any(c.ndim > 1 for c in charges):
        return None
    matrix = torch.zeros(offsets[-1], offsets[-1], dtype=torch.float64)
    for slope in slopes:
        if isinstance(slope, LegSlope):
            at = offsets[slope.symmetry]
            matrix.diagonal()[at : at + len(slope.k)].add_(slope.k)
        elif isinstance(slope, EntrySlope):
            slope.add_matrix(matrix, offsets)
        else:
            return None
    return matrix


def conjugate_gradients(slope: ChargeSlope, right: Generators, tolerance: float = 1e-11) -> Generators:
    """`x` with `slope(x) = right`, up to `tolerance` in the metric of the approximate inverse; at most 1,000 steps.

    Source: the preconditioned method of Hestenes and Stiefel, as in Saad, Iterative Methods for Sparse Linear Systems
    (2003), algorithm 9.1.
    """
    start = slope.approximate_inverse(right)
    now = Iterate([torch.zeros_like(b) for b in right], right, start, _dot(right, start))
    enough = tolerance**2 * now.size
    for _ in range(1000):
        if now.size <= enough or now.size <= 0:
            break
        now = _next(slope, now)
    return now.x


def _next(slope: ChargeSlope, now: Iterate) -> Iterate:
    image = slope.apply(now.direction)
    step = now.size / _dot(now.direction, image)
    residual = _plus(now.residual, image, -step)
    corrected = slope.approximate_inverse(residual)
    size = _dot(residual, corrected)
    return Iterate(_plus(now.x, now.direction, step), residual, _plus(corrected, now.direction, size / now.size), size)


def _plus(a: Generators, b: Generators, factor: float) -> Generators:
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def _dot(a: Generators, b: Generators) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def divide(a: Tensor, b: Tensor, rounding: Tensor | float = 0.0) -> Tensor:
    """`a / b`, zero where `|b| <= rounding`."""
    small = b.abs() <= rounding
    return torch.where(small, torch.zeros_like(a), a / torch.where(small, torch.ones_like(b), b))
