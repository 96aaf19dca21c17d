"""The orbit of one measured point: leg Grams of weights and of gradient noise anywhere on it (theory.md section 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from noetherflow.equilibrium.factors import Factors, FactorTerm, fits_factors
from noetherflow.equilibrium.overlap import LegCoordinates, leg_coordinates, mixed_parameters, overlapping_parameters
from noetherflow.equilibrium.weights import LegPair, Weights
from noetherflow.errors import MomentError
from noetherflow.moments.result import GradientMoments
from noetherflow.symmetry import Symmetry
from noetherflow.symmetry_set import tensors_of

Samples = Mapping[str, Tensor | Factors]
Remeasure = Callable[[nn.Module], GradientMoments]


class Term(Protocol):
    """A part of the model that knows its leg Grams, and how charges change, on the whole orbit."""

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        """Write `(K, M)` of this part's legs into `out[symmetry][leg]`; return its `||theta||^2` and `Tr M`."""

    def slope(self, elements: Sequence[Tensor], generators: Sequence[Tensor], out: list[Tensor]) -> None:
        """Add to `out[symmetry]` the change of its charge under infinitesimal generators of all symmetries."""


@dataclass(frozen=True, eq=False)
class LegTerm:
    """A leg that shares no entry with any other leg: its two Grams say everything."""

    symmetry: int
    leg: int
    exponent: float
    torus: bool
    weight: Tensor
    noise: Tensor

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        element = elements[self.symmetry]
        if self.torus:
            factor = element ** (2 * self.exponent)
            k, m = self.weight * factor, self.noise / factor
            traces = float(k.sum()), float(m.sum())
        else:
            dual = torch.linalg.inv(element).mT
            g, h = (element, dual) if self.exponent > 0 else (dual, element)
            k, m = g @ self.weight @ g.mT, h @ self.noise @ h.mT
            traces = _trace(k), _trace(m)
        out[self.symmetry][self.leg] = (k, m)
        return traces

    def slope(self, elements: Sequence[Tensor], generators: Sequence[Tensor], out: list[Tensor]) -> None:
        element, a = elements[self.symmetry], generators[self.symmetry]
        if self.torus:
            change = 2 * self.exponent**2 * a * self.weight * element ** (2 * self.exponent)
        else:
            g = element if self.exponent > 0 else torch.linalg.inv(element).mT
            k = g @ self.weight @ g.mT
            change = a @ k + k @ a
        out[self.symmetry] = out[self.symmetry] + change


@dataclass(frozen=True, eq=False)
class EntryTerm:
    """A parameter moved by several torus legs at once: its entries, summed over the axes that no leg touches."""

    legs: tuple[LegCoordinates, ...]
    weight: Tensor
    noise: Tensor

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        k, m = self.weight, self.noise
        for leg in self.legs:
            factor = leg.spread(elements[leg.symmetry]) ** (2 * leg.exponent)
            k, m = k * factor, m / factor
        for leg in self.legs:
            out[leg.symmetry][leg.leg] = (leg.collect(k), leg.collect(m))
        return float(k.sum()), float(m.sum())

    def slope(self, elements: Sequence[Tensor], generators: Sequence[Tensor], out: list[Tensor]) -> None:
        k, rate = 2 * self.weight, torch.zeros((), dtype=torch.float64)
        for leg in self.legs:
            k = k * leg.spread(elements[leg.symmetry]) ** (2 * leg.exponent)
            rate = rate + leg.exponent * leg.spread(generators[leg.symmetry], outside=0.0)
        for leg in self.legs:
            change = leg.exponent * leg.collect(k * rate)
            out[leg.symmetry] = out[leg.symmetry] + change


@dataclass(frozen=True, eq=False)
class SampleTerm:
    """A parameter that general_linear and other legs move together: the weights and its gradient for every sample."""

    parameter: str
    symmetries: tuple[tuple[int, Symmetry], ...]
    theta: Tensor
    gradients: Tensor
    mean: Tensor
    weights: Weights

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        theta, mean, gradients = self.theta, self.mean, self.gradients
        for index, symmetry in self.symmetries:
            element = elements[index]
            dual = symmetry.inverse(element) if symmetry.is_torus else torch.linalg.inv(element).mT
            theta = symmetry.move(self.parameter, theta, element)
            mean = symmetry.move(self.parameter, mean, dual)
            gradients = torch.stack([symmetry.move(self.parameter, g, dual) for g in gradients])
        for index, symmetry in self.symmetries:
            for position, leg in enumerate(symmetry.weight_legs):
                if leg.parameter != self.parameter:
                    continue
                second = torch.stack([symmetry.leg_gram(leg, g) for g in gradients]).mean(0)
                drive = self.weights.drive(second, symmetry.leg_gram(leg, mean))
                out[index][position] = (symmetry.leg_gram(leg, theta), drive)
        norm = float(theta.square().sum())
        return norm, float(self.weights.drive(gradients.square().mean(0), mean.square()).sum())

    def slope(self, elements: Sequence[Tensor], generators: Sequence[Tensor], out: list[Tensor]) -> None:
        theta, rate = self.theta, torch.zeros_like(self.theta)
        for index, symmetry in self.symmetries:
            theta = symmetry.move(self.parameter, theta, elements[index])
        for index, symmetry in self.symmetries:
            rate = rate + symmetry.tangent_of(self.parameter, theta, generators[index])
        for index, symmetry in self.symmetries:
            for leg in symmetry.weight_legs:
                if leg.parameter == self.parameter:
                    grown, shrunk = symmetry.leg_gram(leg, theta + rate), symmetry.leg_gram(leg, theta - rate)
                    out[index] = out[index] + leg.exponent * (grown - shrunk) / 2


@dataclass(frozen=True, eq=False)
class Point:
    """What is known at one point of the orbit: per symmetry the `(K, M)` of its legs, `||theta||^2` and `Tr M` of
    the moved parameters (None where only leg Grams are measured)."""

    pairs: list[list[LegPair]]
    norm: float
    trace: float | None


class Orbit(Protocol):
    """Leg Grams along the orbit under group elements, one per symmetry (tori: vectors, GL: matrices)."""

    @property
    def symmetries(self) -> tuple[Symmetry, ...]: ...

    @property
    def weights(self) -> Weights: ...

    def at(self, elements: Sequence[Tensor]) -> Point:
        """The point `G . theta`."""


@dataclass(frozen=True, eq=False)
class MeasuredOrbit:
    """The whole orbit from one measurement."""

    symmetries: tuple[Symmetry, ...]
    weights: Weights
    terms: tuple[Term, ...]

    def at(self, elements: Sequence[Tensor]) -> Point:
        empty = torch.zeros(0)
        out = [[(empty, empty)] * len(s.weight_legs) for s in self.symmetries]
        traces = [term.add(elements, out) for term in self.terms]
        return Point(out, sum(t[0] for t in traces), sum(t[1] for t in traces))


@dataclass(frozen=True, eq=False)
class RemeasuredOrbit:
    """The orbit by moving a copy of the model and measuring again, where one measurement does not determine it."""

    symmetries: tuple[Symmetry, ...]
    weights: Weights
    model: nn.Module
    remeasure: Remeasure

    def at(self, elements: Sequence[Tensor]) -> Point:
        import copy

        moved = copy.deepcopy(self.model)
        tensors = tensors_of(moved)
        for symmetry, element in zip(self.symmetries, elements, strict=True):
            symmetry.act_(tensors, element)
        moments = self.remeasure(moved)
        touched = dict.fromkeys(n for s in self.symmetries for n in s.parameters)
        theta = {n: tensors[n].detach().double().cpu() for n in touched}
        mean = {n: moments.mean[n].double().cpu() for n in touched}
        pairs = []
        for s in self.symmetries:
            if s.name not in moments.second:
                raise MomentError(f"remeasure returned no moments for symmetry {s.name!r}")
            drives = [
                self.weights.drive(second.cpu(), m)
                for second, m in zip(moments.second[s.name], s.grams(mean), strict=True)
            ]
            pairs.append(list(zip(s.grams(theta), drives, strict=True)))
        return Point(pairs, sum(float(t.square().sum()) for t in theta.values()), None)


def orbit_of(
    model: nn.Module,
    symmetries: Sequence[Symmetry],
    moments: GradientMoments,
    weights: Weights,
    *,
    samples: Samples | None = None,
    remeasure: Remeasure | None = None,
) -> Orbit:
    """`measured_orbit` where the moments determine it, else `RemeasuredOrbit` if `remeasure` is given.

    Raises MomentError as `measured_orbit` does.
    """
    try:
        return measured_orbit(model, symmetries, moments, weights, samples)
    except MomentError:
        if remeasure is None:
            raise
        return RemeasuredOrbit(tuple(symmetries), weights, model, remeasure)


def measured_orbit(
    model: nn.Module,
    symmetries: Sequence[Symmetry],
    moments: GradientMoments,
    weights: Weights,
    samples: Samples | None = None,
) -> MeasuredOrbit:
    """The orbit from one measurement.

    Legs that share no entry need their Grams only; several torus legs on one parameter need entry-wise moments; a
    parameter that a general_linear leg shares with another leg needs per-sample gradients (`samples[parameter]`, dense
    `[N, *shape]` or `Factors`).

    Raises MomentError naming the parameters for which nothing suffices.
    """
    tensors = tensors_of(model)
    coordinates = leg_coordinates(symmetries, {n: tuple(t.shape) for n, t in tensors.items()})
    shared = overlapping_parameters(coordinates)
    mixed = mixed_parameters(coordinates, symmetries)
    lacking = [n for n in mixed if samples is None or n not in samples]
    if lacking:
        raise MomentError(
            f"one measurement does not determine the joint equilibrium: general_linear and other symmetries move the "
            f"same entries of {lacking[:4]}{' ...' if len(lacking) > 4 else ''}; pass remeasure=, samples=, or "
            f"joint=False to solve every symmetry with the others held"
        )
    terms: list[Term] = []
    for name, legs in coordinates.items():
        theta = tensors[name].detach().cpu()
        if name in mixed and samples is not None:
            own = tuple((i, s) for i, s in enumerate(symmetries) if name in s.parameters)
            terms.append(_sample_term(name, own, theta, samples[name], moments.mean[name], weights))
        elif name in shared:
            terms.append(_entry_term(name, legs, theta, moments, weights))
        else:
            terms += [_leg_term(symmetries, leg, theta, moments, weights) for leg in legs]
    return MeasuredOrbit(tuple(symmetries), weights, tuple(terms))


def separate_orbits(
    model: nn.Module, symmetries: Sequence[Symmetry], moments: GradientMoments, weights: Weights
) -> MeasuredOrbit:
    """Every symmetry on its own orbit, the others held: each leg by its Grams alone, overlaps ignored.

    Raises MomentError for a symmetry that shares entries with itself and has no entry-wise moments.
    """
    tensors = tensors_of(model)
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    terms: list[Term] = []
    for index, symmetry in enumerate(symmetries):
        own = leg_coordinates([symmetry], shapes)
        shared = overlapping_parameters(own)
        for name, legs in own.items():
            theta = tensors[name].detach().cpu()
            here = tuple(replace(leg, symmetry=index) for leg in legs)
            if name in shared:
                terms.append(_entry_term(name, here, theta, moments, weights))
            else:
                terms += [_leg_term(symmetries, leg, theta, moments, weights) for leg in here]
    return MeasuredOrbit(tuple(symmetries), weights, tuple(terms))


def _sample_term(
    name: str,
    own: tuple[tuple[int, Symmetry], ...],
    theta: Tensor,
    gradients: Tensor | Factors,
    mean: Tensor,
    weights: Weights,
) -> Term:
    if isinstance(gradients, Factors):
        if fits_factors([s for _, s in own], name, tuple(theta.shape)):
            return FactorTerm(name, own, theta.clone(), gradients, mean.cpu(), weights)
        gradients = gradients.dense()
    return SampleTerm(name, own, theta.double().clone(), gradients.double().cpu(), mean.double().cpu(), weights)


def _entry_term(
    name: str, legs: tuple[LegCoordinates, ...], theta: Tensor, moments: GradientMoments, weights: Weights
) -> EntryTerm:
    if name not in moments.squares:
        raise MomentError(
            f"several symmetries move the same entries of {name!r}; measure with gradient_moments(..., entries=True)"
        )
    squares, theta = moments.squares[name].cpu(), theta.double()
    noise = weights.drive(squares, moments.mean[name].double().cpu().square())
    return EntryTerm(legs, legs[0].reduce(theta.square(), legs), legs[0].reduce(noise, legs))


def _leg_term(
    symmetries: Sequence[Symmetry], at: LegCoordinates, theta: Tensor, moments: GradientMoments, weights: Weights
) -> LegTerm:
    symmetry, theta = symmetries[at.symmetry], theta.double()
    leg = symmetry.weight_legs[at.leg]
    if symmetry.name not in moments.second:
        raise MomentError(f"no moments for symmetry {symmetry.name!r}; measured: {list(moments.second)[:8]}")
    mean = symmetry.leg_gram(leg, moments.mean[leg.parameter].double().cpu())
    noise = weights.drive(moments.second[symmetry.name][at.leg].cpu(), mean)
    return LegTerm(at.symmetry, at.leg, leg.exponent, symmetry.is_torus, symmetry.leg_gram(leg, theta), noise)


def _trace(a: Tensor) -> float:
    return float(a.diagonal(dim1=-2, dim2=-1).sum())
