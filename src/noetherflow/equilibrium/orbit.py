"""The orbit of one measured point: leg Grams of weights and of gradient noise anywhere on it (theory.md section 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from noetherflow.equilibrium.factors import Factors
from noetherflow.equilibrium.overlap import LegCoordinates, leg_coordinates, mixed_parameters, overlapping_parameters
from noetherflow.equilibrium.terms import EntryTerm, FactorTerm, LegTerm, SampleTerm, Term, fits_factors
from noetherflow.equilibrium.weights import LegPair, Weights
from noetherflow.errors import MomentError
from noetherflow.moments.result import GradientMoments
from noetherflow.symmetry import Symmetry
from noetherflow.symmetry_set import tensors_of

Samples = Mapping[str, Tensor | Factors]
Remeasure = Callable[[nn.Module], GradientMoments]


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
    lacking = [n for n in mixed_parameters(coordinates, symmetries) if samples is None or n not in samples]
    if lacking:
        raise MomentError(
            f"one measurement does not determine the joint equilibrium: general_linear and other symmetries move the "
            f"same entries of {lacking[:4]}{' ...' if len(lacking) > 4 else ''}; pass "
            f"samples=nf.gradient_factors(model, loss_fn, batches, syms) of the same batches, or "
            f"remeasure=lambda model: nf.gradient_moments(model, loss_fn, batches, syms), or joint=False to solve "
            f"every symmetry with the others held"
        )
    terms = _terms(tensors, symmetries, coordinates, moments, weights, samples or {})
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
        alone = {
            name: tuple(replace(leg, symmetry=index) for leg in legs)
            for name, legs in leg_coordinates([symmetry], shapes).items()
        }
        terms += _terms(tensors, symmetries, alone, moments, weights, {})
    return MeasuredOrbit(tuple(symmetries), weights, tuple(terms))


def _terms(
    tensors: Mapping[str, Tensor],
    symmetries: Sequence[Symmetry],
    coordinates: Mapping[str, tuple[LegCoordinates, ...]],
    moments: GradientMoments,
    weights: Weights,
    samples: Samples,
) -> list[Term]:
    """The terms of all parameters: Grams where no two legs meet, per-sample gradients where a general_linear leg meets
    another and `samples` holds them, else entries.
    """
    shared, mixed = overlapping_parameters(coordinates), mixed_parameters(coordinates, symmetries)
    terms: list[Term] = []
    for name, legs in coordinates.items():
        theta = tensors[name].detach().cpu()
        if name in mixed and name in samples:
            own = tuple((i, s) for i, s in enumerate(symmetries) if name in s.parameters)
            terms.append(_sample_term(name, own, theta, samples[name], moments.mean[name].cpu(), weights))
        elif name in shared:
            terms.append(_entry_term(name, legs, theta, moments, weights))
        else:
            terms += [_leg_term(symmetries, leg, theta, moments, weights) for leg in legs]
    return terms


def _sample_term(
    name: str,
    own: tuple[tuple[int, Symmetry], ...],
    theta: Tensor,
    gradients: Tensor | Factors,
    mean: Tensor,
    weights: Weights,
) -> Term:
    """Weights are copied: the model may move on before a forecast asks for them."""
    if isinstance(gradients, Factors):
        if fits_factors([s for _, s in own], name, tuple(theta.shape)):
            return FactorTerm(name, own, theta.clone(), mean, weights, gradients)
        gradients = gradients.dense()
    return SampleTerm(name, own, theta.double().clone(), mean.double(), weights, gradients.double().cpu())


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
