"""The orbit under Adam and Lion: sums of root mean square gradients, where SGD has sums of squares.

Each entry's root mean square `s` of the minibatch gradient goes like a gradient, `s -> s / p`, and `s theta^2 -> p s
theta^2`, `p` the factor by which the weight grows. So the potential `Psi = sum (lr s + 2 w s theta^2)` is a sum of
exponentials in the logs of all group elements, and what solves SGD's equilibrium solves this one, with half the
exponents. SGD whose parameter groups differ is a third case: `s = 1`, and squares of the gradients in place of roots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from noetherflow.core.adaptive import AdamConfig, LionConfig
from noetherflow.core.rates import Rates
from noetherflow.core.settings import SGDConfig
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.orbit import MeasuredOrbit
from noetherflow.equilibrium.potential import Drift, LegPair, Potential, decay_rate, epoch_factor
from noetherflow.equilibrium.terms import HeldSlope
from noetherflow.errors import MomentError
from noetherflow.moments.result import GradientMoments
from noetherflow.symmetry.overlap import LegCoordinates, leg_coordinates
from noetherflow.symmetry.symmetry import Symmetry

AdaptiveConfig = AdamConfig | LionConfig | SGDConfig
"""Settings whose equilibrium is solved entry by entry; SGD where its parameter groups differ."""
EPS_COUNTS = 1e-6
"""Share of Adam's `eps` in `s + eps` from which on it is carried along the orbit, entry by entry."""


@dataclass(frozen=True)
class NoiseLaw:
    """What an adaptive optimiser makes of the minibatch gradient's second moment `s^2 = f Sigma + gbar^2`, per entry.

    The preconditioned charge grows by `lr^2 (white f Sigma + mean gbar^2) / (s + eps)`.

    Attributes:
        white: the factor of the noise; 1 for Adam with any memory, less under shuffled epochs.
        mean: the factor of the squared mean gradient, which is the same in all the steps that are averaged.
        eps: Adam's.
        coupled: weight decay is added to the gradients, so that it does not scale with `s`.
        plain: SGD, which does not divide by `s`.
    """

    white: float
    mean: float
    eps: float
    coupled: bool
    plain: bool = False

    @property
    def steep(self) -> bool:
        """Whether some sums go like squares of the elements."""
        return self.coupled or self.plain

    @classmethod
    def of(cls, config: AdaptiveConfig) -> NoiseLaw:
        """The law of an optimiser's settings.

        Example:
            >>> law = NoiseLaw.of(AdamConfig(lr=1e-3, batch_size=8))
            >>> law.white, round(law.mean, 9), law.coupled
            (1.0, 19.0, False)

        Source: theory.md section 13.
        """
        if isinstance(config, SGDConfig):
            drift = Drift.of(replace(config, groups=()))
            return cls(drift.noise / config.lr**2, drift.mean / config.lr**2, 0.0, False, plain=True)
        if isinstance(config, LionConfig):
            return cls(config.correlation_sum, config.correlation_sum, 0.0, False)
        b1, white = config.betas[0], 1.0
        if config.sampling == "epoch" and config.batches_per_epoch is not None:
            white = epoch_factor(b1, config.batches_per_epoch)
        decays = config.weight_decay > 0 or any(g.weight_decay > 0 for g in config.groups)
        return cls(white, (1 + b1) / (1 - b1), config.eps, decays and not config.decoupled)


@dataclass(frozen=True, eq=False)
class EntryParts:
    """Three sums over entries at one point of the orbit, on the axes that the legs distinguish: each entry's part of
    the preconditioned charge, what decay takes of it per step, and what gradients add; with the potential of both
    (where `v` does not lag behind).
    """

    weight: Tensor
    decay: Tensor
    noise: Tensor
    potential: float


class RootEntries(Protocol):
    """The entries of one parameter, wherever the orbit takes them."""

    @property
    def shape(self) -> torch.Size:
        """Of the sums, on the axes that the legs distinguish."""

    @property
    def size(self) -> int:
        """How many sums."""

    def at(self, growth: Tensor) -> EntryParts:
        """The sums where the weights have grown by these factors."""

    def lagging(self, growth: Tensor, ratio: Tensor) -> EntryParts:
        """The same where `v` is `ratio` times what it was at first, and not yet what the gradients are by now."""


@dataclass(frozen=True, eq=False)
class ScaledEntries:
    """Entries whose `eps` does not count, summed over the axes that no leg distinguishes: powers of the growth."""

    weight: Tensor
    decay: Tensor
    noise: Tensor
    coupled: bool
    plain: bool

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def size(self) -> int:
        return self.weight.numel()

    def at(self, growth: Tensor) -> EntryParts:
        return self.lagging(growth, 1 / growth.square())

    def lagging(self, growth: Tensor, ratio: Tensor) -> EntryParts:
        grown, root = growth.square(), torch.ones_like(growth) if self.plain else ratio.sqrt()
        decay, noise = self.decay * (grown if self.coupled else grown * root), self.noise / (grown * root)
        held, added = 2 if self.coupled or self.plain else 1, 2 if self.plain else 1
        potential = float(decay.sum()) / held + float(noise.sum()) / added
        return EntryParts(self.weight * grown * root, decay, noise, potential)


@dataclass(frozen=True, eq=False)
class EpsEntries:
    """Entries with their `eps`, which does not move along the orbit.

    Attributes:
        root: `s`.
        square: `theta^2`, in units of the reference learning rate.
        factor: noise over `s^2 / (s + eps)`.
        rate: what decay takes per step of the charge (coupled: of `square`).
        eps: Adam's.
        coupled: decay is added to the gradients.
    """

    root: Tensor
    square: Tensor
    factor: Tensor
    rate: float
    eps: float
    coupled: bool

    @property
    def shape(self) -> torch.Size:
        return self.root.shape

    @property
    def size(self) -> int:
        return self.root.numel()

    def at(self, growth: Tensor) -> EntryParts:
        return self.lagging(growth, 1 / growth.square())

    def lagging(self, growth: Tensor, ratio: Tensor) -> EntryParts:
        over, square = self.root * ratio.sqrt() + self.eps, self.square * growth.square()
        root, weight = self.root / growth, over * square
        decay = self.rate * (square if self.coupled else weight)
        noise = self.factor * root.square() / over
        held = self.rate * (square / 2 if self.coupled else (root + self.eps / 2) * square)
        grown = self.factor * (root - self.eps * torch.log1p(root / self.eps))
        return EntryParts(weight, decay, noise, float(held.sum()) + float(grown.sum()))


@dataclass(frozen=True, eq=False)
class RootTerm:
    """An `OrbitTerm` of one parameter under torus legs: `(D, N)` of each leg, what decay takes and what noise adds."""

    legs: tuple[LegCoordinates, ...]
    entries: RootEntries

    @property
    def moved_by(self) -> tuple[int, ...]:
        return tuple(leg.symmetry for leg in self.legs)

    def unpacked(self) -> RootTerm:
        return self

    def parts(self, elements: Sequence[Tensor]) -> EntryParts:
        """The sums over entries at a point of the orbit."""
        return self.entries.at(self.growth(elements))

    def growth(self, elements: Sequence[Tensor]) -> Tensor:
        """The factors by which the entries have grown there, broadcastable to their sums."""
        growth = torch.ones((), dtype=torch.float64)
        for leg in self.legs:
            growth = growth * leg.spread(elements[leg.symmetry]) ** leg.exponent
        return growth

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        parts = self.parts(elements)
        for leg in self.legs:
            out[leg.symmetry][leg.leg] = (leg.collect(parts.decay), leg.collect(parts.noise))
        return 0.0, 2 * parts.potential

    def slope_at(self, elements: Sequence[Tensor]) -> HeldSlope:
        """`slope` at these elements."""
        return HeldSlope(self, elements)

    def slope(self, elements: Sequence[Tensor], generators: Sequence[Tensor], out: list[Tensor]) -> None:
        """The change of the preconditioned charges at a frozen preconditioner: weights move, `s` does not."""
        weight, rate = self.parts(elements).weight, torch.zeros((), dtype=torch.float64)
        for leg in self.legs:
            rate = rate + leg.exponent * leg.spread(generators[leg.symmetry], outside=0.0)
        for leg in self.legs:
            change = leg.exponent * leg.collect(2 * weight * rate)
            out[leg.symmetry] = out[leg.symmetry] + change

    def charge(self, elements: Sequence[Tensor], out: list[Tensor]) -> None:
        """Add this parameter's part of every preconditioned charge to `out`."""
        weight = self.parts(elements).weight
        for leg in self.legs:
            out[leg.symmetry] = out[leg.symmetry] + leg.exponent * leg.collect(weight)


def root_orbit(
    model: nn.Module,
    symmetries: Sequence[Symmetry],
    moments: GradientMoments,
    config: AdaptiveConfig,
    *,
    joint: bool = True,
) -> MeasuredOrbit:
    """The orbit of torus symmetries under an adaptive optimiser, from one measurement.

    Args:
        model: where the moments were measured.
        symmetries: scalar and diagonal ones.
        moments: with `entries=True`.
        config: Adam's or Lion's settings.
        joint: all symmetries move together; else each with the others held.

    Returns:
        An orbit whose pairs are `(D, N)` of each leg per step and whose potential is Psi.

    Raises:
        MomentError: entry-wise second moments are missing.

    Source: theory.md section 13, "Equilibrium".
    """
    return orbit_of_weights(tensors_of(model), symmetries, moments, config, joint=joint)


def orbit_of_weights(
    weights: Mapping[str, Tensor],
    symmetries: Sequence[Symmetry],
    moments: GradientMoments,
    config: AdaptiveConfig,
    *,
    joint: bool = True,
) -> MeasuredOrbit:
    """`root_orbit` from the weights that the symmetries move, by parameter, in place of the model that holds them."""
    law = NoiseLaw.of(config)
    shapes = {n: tuple(t.shape) for n, t in weights.items()}
    reference = reference_lr(config)
    groups = [leg_coordinates(symmetries, shapes)] if joint else _alone(symmetries, shapes)
    terms = []
    for coordinates in groups:
        for name, legs in coordinates.items():
            offset = symmetries[legs[0].symmetry].offsets.get(name, 0.0)
            theta = weights[name].detach().double().cpu() + offset
            terms.append(RootTerm(legs, _entries(name, legs, theta, moments, config, law, reference)))
    return MeasuredOrbit(tuple(symmetries), Potential(norm=1.0, second=0.0, mean=0.0), tuple(terms))


def reference_lr(config: AdaptiveConfig) -> float:
    """The largest learning rate, which all charges, drifts and forecasts are scaled by.

    Where learning rates differ, what a step leaves alone at first order is `theta^T A (lr D)^-1 theta`, since
    `theta^T A (lr D)^-1 lr D g = theta^T A g = 0`. Times this number it is the charge in its usual units.

    Source: theory.md section 13.
    """
    return max(config.lr, *(g.lr for g in config.groups), 0.0)


def charges(orbit: MeasuredOrbit, elements: Sequence[Tensor]) -> list[Tensor]:
    """The preconditioned charge of every symmetry at a point of the orbit, `[blocks]` each."""
    out = [torch.zeros(s.shape, dtype=torch.float64) for s in orbit.symmetries]
    for term in orbit.terms:
        assert isinstance(term, RootTerm)
        term.charge(elements, out)
    return out


def second_moments(name: str, moments: GradientMoments, config: AdaptiveConfig) -> tuple[Tensor, Tensor]:
    """`f Sigma` and `gbar^2` of the minibatch gradient, entry by entry, float64; free of bias, so that the second may
    come out below 0 where it is small.

    Raises:
        MomentError: they were not measured.
    """
    if name not in moments.squares:
        raise MomentError(
            f"Adam's equilibrium needs the second moment of each entry of {name!r}; measure with "
            "gradient_moments(..., entries=True)"
        )
    (a, b), (c, d) = moments.batch_weights(config)
    second, mean = moments.squares[name].double().cpu(), moments.mean[name].double().cpu().square()
    return a * second + b * mean, c * second + d * mean


def divisor(name: str, moments: GradientMoments, config: AdaptiveConfig, law: NoiseLaw) -> Tensor:
    """`s + eps` of every entry of a parameter, by which the optimiser divides its gradient; 1 for SGD."""
    noise, steady = second_moments(name, moments, config)
    over = (noise.clamp_min(0) + steady.clamp_min(0)).sqrt() + law.eps
    return torch.ones_like(over) if law.plain else over


def root_drives(symmetry: Symmetry, moments: GradientMoments, config: AdaptiveConfig) -> tuple[Tensor, Tensor]:
    """What noise and what the mean gradient add to the charge of one torus symmetry per step, `[blocks]` each."""
    law, reference = NoiseLaw.of(config), reference_lr(config)
    grown = pushed = torch.zeros(symmetry.shape, dtype=torch.float64)
    for leg in symmetry.weight_legs:
        noise, steady = second_moments(leg.parameter, moments, config)
        step = leg.exponent * reference * config.rates(leg.parameter).lr
        over = divisor(leg.parameter, moments, config, law)
        grown = grown + step * law.white * leg.row_sums(_divided(noise, over))
        pushed = pushed + step * law.mean * leg.row_sums(_divided(steady, over))
    return grown, pushed


def _alone(
    symmetries: Sequence[Symmetry], shapes: Mapping[str, tuple[int, ...]]
) -> list[dict[str, tuple[LegCoordinates, ...]]]:
    """The legs of each symmetry by itself."""
    return [
        {n: tuple(replace(leg, symmetry=i) for leg in legs) for n, legs in leg_coordinates([s], shapes).items()}
        for i, s in enumerate(symmetries)
    ]


def _entries(
    name: str,
    legs: tuple[LegCoordinates, ...],
    theta: Tensor,
    moments: GradientMoments,
    config: AdaptiveConfig,
    law: NoiseLaw,
    reference: float,
) -> RootEntries:
    """The entries of one parameter, viewed as its legs do, in units of the reference learning rate."""
    rates = config.rates(name)
    noise, steady = (t.reshape(legs[0].view) for t in second_moments(name, moments, config))
    root = (noise.clamp_min(0) + steady.clamp_min(0)).sqrt()
    if law.plain:
        root = torch.ones_like(root)
    added = reference * rates.lr * (law.white * noise + law.mean * steady)
    scaled = theta.reshape(legs[0].view).square() * (reference / rates.lr)
    rate = decay_share(rates, config, law)
    if law.eps and law.eps * float(scaled.sum()) > EPS_COUNTS * float((root * scaled).sum()):
        return EpsEntries(root, scaled, _divided(added, root.square()), rate, law.eps, law.coupled)

    def reduced(entries: Tensor) -> Tensor:
        return legs[0].reduce(entries, legs)

    weight = reduced(root * scaled)
    decay = rate * (reduced(scaled) if law.coupled else weight)
    return ScaledEntries(weight, decay, reduced(_divided(added, root)), law.coupled, law.plain)


def decay_share(rates: Rates, config: AdaptiveConfig, law: NoiseLaw) -> float:
    """What decay takes per step: the share of the charge, or where it is coupled of the weights' squares."""
    if isinstance(config, SGDConfig):
        return decay_rate(rates.lr, rates.weight_decay, config.momentum)
    return 2 * rates.lr * rates.weight_decay if law.coupled else rates.decay_per_step


def _divided(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, 0 where both are."""
    return torch.where(b > 0, a / torch.where(b > 0, b, torch.ones_like(b)), torch.zeros_like(b))
