"""The orbit of one measured point: leg Grams of weights and of gradient noise anywhere on it (theory.md section 5)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.potential import LegPair, Potential
from noetherflow.equilibrium.sample_terms import FactorTerm, SampleTerm, fits_factors
from noetherflow.equilibrium.terms import EntryTerm, LegTerm, OrbitTerm
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.products import Factors
from noetherflow.moments.result import GradientMoments
from noetherflow.symmetry.overlap import LegCoordinates, leg_coordinates, mixed_parameters, overlapping_parameters
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import positions_of

Samples = Mapping[str, Tensor | Factors]
Remeasure = Callable[[nn.Module], GradientMoments]


@dataclass(frozen=True, eq=False)
class Point:
    """What is known at one point of the orbit.

    Attributes:
        pairs: Per symmetry and leg the Grams `(K, M)` of weights and gradient noise.
        norm: `||theta||^2` of the moved parameters.
        trace: `Tr M` of the moved parameters, None where only leg Grams are measured.
    """

    pairs: list[list[LegPair]]
    norm: float
    trace: float | None


class Orbit(Protocol):
    """All points that the group makes of one model, and the leg Grams at each of them.

    A point is named by one group element per symmetry, a vector for tori and matrices for general_linear; the
    identity is the model as it is.
    """

    @property
    def symmetries(self) -> tuple[Symmetry, ...]: ...

    @property
    def potential(self) -> Potential: ...

    def at(self, elements: Sequence[Tensor]) -> Point:
        """The point `G . theta`."""


@dataclass(frozen=True, eq=False)
class MeasuredOrbit:
    """The whole orbit from one measurement: each term knows how its Grams scale with the group elements."""

    symmetries: tuple[Symmetry, ...]
    potential: Potential
    terms: tuple[OrbitTerm, ...]

    def at(self, elements: Sequence[Tensor]) -> Point:
        out = blank_pairs(self.symmetries)
        traces = [term.add(elements, out) for term in self.terms]
        return Point(out, sum(t[0] for t in traces), sum(t[1] for t in traces))

    def added_drift(self, elements: Sequence[Tensor]) -> list[list[Tensor]]:
        """What the charges gain per step at a point beside what the terms say, by symmetry and leg: nothing here."""
        return [[torch.zeros(s.blocks, dtype=torch.float64) for _ in s.weight_legs] for s in self.symmetries]

    @property
    def needs_samples(self) -> bool:
        """True where moments alone do not determine the orbit."""
        return any(isinstance(term, SampleTerm | FactorTerm) for term in self.terms)

    def with_moments(self, moments: GradientMoments, potential: Potential) -> MeasuredOrbit:
        """The orbit of the same parameters for other moments; not where it `needs_samples`."""
        return replace(
            self, potential=potential, terms=tuple(self._with_noise(t, moments, potential) for t in self.terms)
        )

    def _with_noise(self, term: OrbitTerm, moments: GradientMoments, potential: Potential) -> OrbitTerm:
        if isinstance(term, LegTerm):
            return replace(term, noise=_leg_noise(self.symmetries[term.symmetry], term.leg, moments, potential))
        assert isinstance(term, EntryTerm)
        first = term.legs[0]
        name = self.symmetries[first.symmetry].weight_legs[first.leg].parameter
        return replace(term, noise=_entry_noise(name, term.legs, moments, potential))


@dataclass(frozen=True, eq=False)
class RemeasuredOrbit:
    """The orbit by moving a copy of the model and measuring again, where one measurement does not determine it."""

    symmetries: tuple[Symmetry, ...]
    potential: Potential
    model: nn.Module
    remeasure: Remeasure

    def at(self, elements: Sequence[Tensor]) -> Point:
        moved = copy.deepcopy(self.model)
        for symmetry, element in zip(self.symmetries, elements, strict=True):
            symmetry.act_(tensors_of(moved), element)
        tensors = positions_of(moved, self.symmetries)
        moments = self.remeasure(moved)
        pairs = leg_pairs(moved, self.symmetries, moments, self.potential)
        touched = dict.fromkeys(n for s in self.symmetries for n in s.parameters)
        norm = sum(float(tensors[n].detach().double().square().sum()) for n in touched)
        return Point(pairs, norm, None)


@dataclass(frozen=True, eq=False)
class FramedOrbit:
    """Another orbit seen from `frame . theta`: the point of `G` is the other's of `G frame`."""

    orbit: Orbit
    frame: tuple[Tensor, ...]

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        return self.orbit.symmetries

    @property
    def potential(self) -> Potential:
        return self.orbit.potential

    def at(self, elements: Sequence[Tensor]) -> Point:
        return self.orbit.at(self.unframed(elements))

    def unframed(self, elements: Sequence[Tensor]) -> list[Tensor]:
        """`G frame`: the elements as seen from `theta`."""
        return [s.compose(g, f) for s, g, f in zip(self.symmetries, elements, self.frame, strict=True)]


def sizes_now(orbit: Orbit) -> tuple[float, float | None]:
    """`||theta||^2` and `Tr M` of the moved parameters at the identity, without leg Grams where that is less work."""
    here = [s.identity() for s in orbit.symmetries]
    if not isinstance(orbit, MeasuredOrbit):
        point = orbit.at(here)
        return point.norm, point.trace
    out = blank_pairs(orbit.symmetries)
    sizes = [t.sizes_now() if isinstance(t, FactorTerm) else t.add(here, out) for t in orbit.terms]
    return sum(a for a, _ in sizes), sum(b for _, b in sizes)


def leg_pairs(
    model: nn.Module, symmetries: Sequence[Symmetry], moments: GradientMoments, potential: Potential
) -> list[list[LegPair]]:
    """`(K, M)` of every leg, by symmetry, where the moments were measured: nothing more is needed there.

    Raises MomentError for a symmetry that was not measured.
    """
    tensors = positions_of(model, symmetries)
    return [
        [
            _leg_pair(s, j, tensors[leg.parameter].detach().cpu(), moments, potential)
            for j, leg in enumerate(s.weight_legs)
        ]
        for s in symmetries
    ]


def blank_pairs(symmetries: Sequence[Symmetry]) -> list[list[LegPair]]:
    """A place for `(K, M)` of every leg, by symmetry, for the terms to write into."""
    empty = torch.zeros(0)
    return [[(empty, empty)] * len(s.weight_legs) for s in symmetries]


def orbit_of(
    model: nn.Module,
    symmetries: Sequence[Symmetry],
    moments: GradientMoments,
    potential: Potential,
    *,
    samples: Samples | None = None,
    remeasure: Remeasure | None = None,
) -> Orbit:
    """`measured_orbit` where the moments determine it, else `RemeasuredOrbit` if `remeasure` is given.

    Raises MomentError as `measured_orbit` does.
    """
    try:
        return measured_orbit(model, symmetries, moments, potential, samples)
    except MomentError:
        if remeasure is None:
            raise
        return RemeasuredOrbit(tuple(symmetries), potential, model, remeasure)


def measured_orbit(
    model: nn.Module,
    symmetries: Sequence[Symmetry],
    moments: GradientMoments,
    potential: Potential,
    samples: Samples | None = None,
) -> MeasuredOrbit:
    """The orbit from one measurement.

    Legs that share no entry need their Grams only; several torus legs on one parameter need entry-wise moments; a
    parameter that a general_linear leg shares with another leg needs per-sample gradients (`samples[parameter]`, dense
    `[N, *shape]` or `Factors`).

    Raises MomentError naming the parameters for which nothing suffices, DataError for samples that disagree with the
    moments.
    """
    tensors = positions_of(model, symmetries)
    coordinates = leg_coordinates(symmetries, {n: tuple(t.shape) for n, t in tensors.items()})
    samples = _given_or_zero(samples, tensors, mixed_parameters(coordinates, symmetries), potential)
    lacking = [n for n in mixed_parameters(coordinates, symmetries) if n not in samples]
    if lacking:
        raise MomentError(
            f"one measurement does not determine the joint equilibrium: general_linear and other symmetries move the "
            f"same entries of {lacking[:4]}{' ...' if len(lacking) > 4 else ''}; measure with gradient_moments(..., "
            f"for_='equilibrium'), or pass samples=nf.gradient_factors(model, loss_fn, batches, syms) of the same "
            f"batches, or "
            f"remeasure=lambda model: nf.gradient_moments(model, loss_fn, batches, syms), or joint=False to solve "
            f"every symmetry with the others held"
        )
    terms = _terms(tensors, symmetries, coordinates, moments, potential, samples)
    return MeasuredOrbit(tuple(symmetries), potential, tuple(terms))


def separate_orbits(
    model: nn.Module,
    symmetries: Sequence[Symmetry],
    moments: GradientMoments,
    potential: Potential,
    samples: Samples | None = None,
) -> MeasuredOrbit:
    """Every symmetry on its own orbit, the others held: each leg by its Grams alone, overlaps ignored.

    Raises MomentError for a symmetry that shares entries with itself and has no entry-wise moments (torus) or samples
    (general_linear), DataError for samples that disagree with the moments.
    """
    tensors = positions_of(model, symmetries)
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    terms: list[OrbitTerm] = []
    for index, symmetry in enumerate(symmetries):
        alone = {
            name: tuple(replace(leg, symmetry=index) for leg in legs)
            for name, legs in leg_coordinates([symmetry], shapes).items()
        }
        own = _given_or_zero(samples, tensors, mixed_parameters(alone, symmetries), potential)
        lacking = [n for n in mixed_parameters(alone, symmetries) if n not in own]
        if lacking:
            raise MomentError(
                f"one measurement does not determine the equilibrium of {symmetry.name!r} with the others held: it "
                f"moves entries of {lacking[:4]} along two axes; pass samples=nf.gradient_factors(model, loss_fn, "
                f"batches, syms) of the same batches"
            )
        terms += _terms(tensors, symmetries, alone, moments, potential, own)
    return MeasuredOrbit(tuple(symmetries), potential, tuple(terms))


def _given_or_zero(
    samples: Samples | None, tensors: Mapping[str, Tensor], names: Iterable[str], potential: Potential
) -> Samples:
    """The samples given; a single zero for each of `names` where the potential needs no gradients."""
    if potential.needs_gradients:
        return samples or {}
    return {n: torch.zeros(1, *tensors[n].shape, dtype=torch.float64) for n in names}


def _terms(
    tensors: Mapping[str, Tensor],
    symmetries: Sequence[Symmetry],
    coordinates: Mapping[str, tuple[LegCoordinates, ...]],
    moments: GradientMoments,
    potential: Potential,
    samples: Samples,
) -> list[OrbitTerm]:
    """The terms of all parameters: Grams where no two legs meet, per-sample gradients where a general_linear leg meets
    another, else entries.
    """
    shared, mixed = overlapping_parameters(coordinates), mixed_parameters(coordinates, symmetries)
    terms: list[OrbitTerm] = []
    for name, legs in coordinates.items():
        theta = tensors[name].detach().cpu()
        if name in mixed:
            own = tuple((i, symmetries[i]) for i in dict.fromkeys(leg.symmetry for leg in legs))
            term = _sample_term(name, own, theta, samples[name], moments.mean[name].cpu(), potential)
            _refuse_other_data(term, symmetries, legs, theta, samples[name], moments)
            terms.append(term)
        elif name in shared:
            terms.append(_entry_term(name, legs, theta, moments, potential))
        else:
            terms += [_leg_term(symmetries, leg, theta, moments, potential) for leg in legs]
    return terms


def _sample_term(
    name: str,
    own: tuple[tuple[int, Symmetry], ...],
    theta: Tensor,
    gradients: Tensor | Factors,
    mean: Tensor,
    potential: Potential,
) -> SampleTerm | FactorTerm:
    """Weights are copied: the model may move on before a forecast asks for them."""
    if isinstance(gradients, Factors):
        if fits_factors([s for _, s in own], name, tuple(theta.shape)):
            return FactorTerm(name, own, theta.clone(), mean, potential, gradients)
        gradients = gradients.dense()
    return SampleTerm(name, own, theta.double().clone(), mean.double(), potential, gradients.double().cpu())


def _entry_term(
    name: str, legs: tuple[LegCoordinates, ...], theta: Tensor, moments: GradientMoments, potential: Potential
) -> EntryTerm:
    if name not in moments.squares:
        raise MomentError(
            f"several symmetries move the same entries of {name!r}; measure with gradient_moments(..., "
            "for_='equilibrium') or entries=True"
        )
    return EntryTerm(legs, legs[0].reduce(theta.double().square(), legs), _entry_noise(name, legs, moments, potential))


def _entry_noise(name: str, legs: Sequence[LegCoordinates], moments: GradientMoments, potential: Potential) -> Tensor:
    noise = potential.drive(moments.squares[name].cpu(), moments.mean[name].double().cpu().square())
    return legs[0].reduce(noise, legs)


def _leg_term(
    symmetries: Sequence[Symmetry], at: LegCoordinates, theta: Tensor, moments: GradientMoments, potential: Potential
) -> LegTerm:
    symmetry = symmetries[at.symmetry]
    weight, noise = _leg_pair(symmetry, at.leg, theta, moments, potential)
    return LegTerm(at.symmetry, at.leg, at.exponent, symmetry.is_torus, weight, noise)


def _leg_pair(symmetry: Symmetry, leg: int, theta: Tensor, moments: GradientMoments, potential: Potential) -> LegPair:
    """`(K, M)` of one leg from its parameter and the measured moments."""
    if symmetry.name not in moments.second:
        raise MomentError(f"no moments for symmetry {symmetry.name!r}; measured: {list(moments.second)[:8]}")
    at = symmetry.weight_legs[leg]
    return symmetry.leg_gram(at, theta, torch.float64), _leg_noise(symmetry, leg, moments, potential)


def _leg_noise(symmetry: Symmetry, leg: int, moments: GradientMoments, potential: Potential) -> Tensor:
    at = symmetry.weight_legs[leg]
    mean = symmetry.leg_gram(at, moments.mean[at.parameter].cpu(), torch.float64)
    return potential.drive(moments.second[symmetry.name][leg].cpu(), mean)


def _refuse_other_data(
    term: SampleTerm | FactorTerm,
    symmetries: Sequence[Symmetry],
    legs: Sequence[LegCoordinates],
    theta: Tensor,
    gradients: Tensor | Factors,
    moments: GradientMoments,
) -> None:
    """The samples' own `M` where they were measured must be the moments', up to `sqrt(eps)` of the coarsest dtype used
    (float32 or coarser: moments may have been accumulated in it).

    Raises DataError otherwise: other data, or factors whose first axis is not the batch.
    """
    noise = term.noise_now()
    dtype = gradients.left.dtype if isinstance(gradients, Factors) else gradients.dtype
    tolerance = max(torch.finfo(t).eps for t in (dtype, theta.dtype, torch.float32)) ** 0.5
    for leg in legs:
        found = noise[leg.symmetry, leg.leg]
        expected = _leg_pair(symmetries[leg.symmetry], leg.leg, theta, moments, term.potential)[1]
        off = float(torch.linalg.vector_norm(found - expected))
        size = float(torch.linalg.vector_norm(expected))
        if not off <= tolerance * size:
            raise DataError(
                f"samples of {term.parameter!r} are not the gradients that the moments were measured on: noise of "
                f"{symmetries[leg.symmetry].name!r} off by {off / size if size else math.inf:.2g}; pass samples of the "
                f"same batches, batch axis first (layers fed [time, batch, ...] need dense [N, *shape] gradients)"
            )
