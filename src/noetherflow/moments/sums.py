"""Sums over the samples of one group, and over all: what is complete is packed into one byte per entry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from noetherflow.moments.packed import (
    CompactTensor,
    Held,
    PackedTensors,
    ProductTensor,
    packed,
    packed_into,
    packed_sum,
)
from noetherflow.moments.result import GradientMoments, trace
from noetherflow.moments.target import Accumulators, Need, Scratch, Target
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(eq=False)
class Totals:
    """Sums of gradients and squares over the samples of all groups, exact."""

    gradient: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)

    def plus(self, gradient: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> None:
        """Add sums over further samples."""
        for mine, theirs in ((self.gradient, gradient), (self.squares, squares)):
            for name, tensor in theirs.items():
                if name in mine:
                    mine[name].add_(tensor)
                else:
                    mine[name] = tensor.clone()

    def take(self, name: str, gradient: Tensor) -> None:
        """Add a summed gradient that nobody else holds, without a copy of it."""
        if name in self.gradient:
            self.gradient[name].add_(gradient)
        else:
            self.gradient[name] = gradient


@dataclass(eq=False)
class Sums(Accumulators):
    """Running sums over the samples of one group.

    Of a parameter that is `settled` gradient and squares are packed into one byte per entry and handed to the totals
    over all groups, so that no group keeps a copy of its own: 16 groups of a layer of 10,000 entries take 160,000
    bytes, not 640,000.
    """

    samples: int = 0
    loss: float = 0.0
    packed_gradient: dict[str, Held] = field(default_factory=dict)
    packed_squares: dict[str, Held] = field(default_factory=dict)
    _traces: tuple[int, Tensor] | None = None

    @classmethod
    def zeros(cls, syms: SymmetrySet, needs: dict[str, Need]) -> Sums:
        """Sums over no sample."""
        sums = cls(needs)
        for s in syms:
            sums.second[s.name] = [
                torch.zeros(s.shape, dtype=torch.float64, device=needs[leg.parameter].device) for leg in s.weight_legs
            ]
        return sums

    @classmethod
    def of(cls, moments: GradientMoments, syms: SymmetrySet, needs: dict[str, Need]) -> Sums:
        """The sums behind moments measured before, packed, on the devices of the parameters."""
        sums, n = cls.zeros(syms, needs), moments.samples
        sums.samples, sums.loss = n, moments.loss * n
        for mine, means in ((sums.packed_gradient, moments.mean), (sums.packed_squares, moments.squares)):
            for name, held in PackedTensors.of(means).held.items():
                whole = held.times(n) if isinstance(held, CompactTensor) else held * n
                mine[name] = whole.to(needs[name].device)
        for symmetry, legs in sums.second.items():
            for leg, mean in zip(legs, moments.second[symmetry], strict=True):
                leg.copy_(mean * n)
        return sums

    def settle(self, names: Iterable[str], totals: Totals) -> None:
        """Pack what was summed of these parameters, and hand it to the totals."""
        for name in names:
            gradient = self.gradient.pop(name, None)
            if gradient is None:
                continue
            squares = self.squares.pop(name, None)
            totals.plus({name: gradient}, {} if squares is None else {name: squares})
            self.packed_gradient[name] = packed_into(self.packed_gradient.get(name), gradient)
            if squares is not None:
                self._add_torus_legs(name, squares)
                self.packed_squares[name] = packed_into(self.packed_squares.get(name), squares)

    def keep(self, name: str, gradient: ProductTensor) -> None:
        """Keep the summed gradient of a parameter as a product; what was summed of it before must be settled."""
        before = self.packed_gradient.get(name)
        self.packed_gradient[name] = gradient if before is None else packed_sum(before, gradient.unpack())

    def settle_all(self, totals: Totals) -> None:
        """`settle` of every parameter."""
        self.settle(list(self.gradient), totals)

    def plus(self, other: Sums) -> Sums:
        """These sums, with the others added in place."""
        for mine, theirs in ((self.gradient, other.gradient), (self.squares, other.squares)):
            for name, tensor in theirs.items():
                mine[name] = mine[name].add_(tensor) if name in mine else tensor
        for kept, more in (
            (self.packed_gradient, PackedTensors(other.packed_gradient)),
            (self.packed_squares, PackedTensors(other.packed_squares)),
        ):
            for name, held in more.held.items():
                kept[name] = packed_sum(kept[name], more[name]) if name in kept else held
        for name, legs in other.second.items():
            for mine_leg, leg in zip(self.second[name], legs, strict=True):
                mine_leg.add_(leg)
        self.samples += other.samples
        self.loss += other.loss
        return self

    def traces(self) -> Tensor:
        """`sum_i Tr g_i g_i^T` on every leg."""
        if self._traces is None or self._traces[0] != self.samples:
            legs = [leg for legs in self.legs().values() for leg in legs]
            self._traces = self.samples, torch.stack([trace(leg) for leg in legs])
        return self._traces[1]

    def legs(self) -> dict[str, list[Tensor]]:
        """Leg Grams, with those that are read off squares not yet settled; only to be read."""
        if not self.squares:
            return self.second
        whole = Sums(self.needs, second={name: [leg.clone() for leg in legs] for name, legs in self.second.items()})
        for name, squares in self.squares.items():
            whole._add_torus_legs(name, squares)
        return whole.second

    def _add_torus_legs(self, name: str, squares: Tensor) -> None:
        """Torus legs of a parameter from its entry-wise squares."""
        if squares.numel():
            need = self.needs[name]
            Target(need, self, Scratch()).add_torus_legs(squares.view(need.rows, -1))

    def moments_of_legs(self, fallback: tuple[str, ...], names: dict[str, tuple[str, ...]]) -> GradientMoments:
        """Means over the samples so far, of leg Grams alone; `names` of the legs."""
        n = self.samples
        return GradientMoments(
            samples=n,
            loss=self.loss / n,
            second={name: tuple(leg / n for leg in legs) for name, legs in self.legs().items()},
            mean={},
            fallback=fallback,
            legs=names,
        )

    def means(self) -> tuple[PackedTensors, PackedTensors]:
        """Mean gradients and squares over the samples so far, packed."""
        return self._means(self.packed_gradient, self.gradient, self.needs), self._means(
            self.packed_squares, self.squares, {n: need for n, need in self.needs.items() if need.entries}
        )

    def _means(self, kept: dict[str, Held], summed: dict[str, Tensor], needs: dict[str, Need]) -> PackedTensors:
        held: dict[str, Held] = {}
        for name, need in needs.items():
            if name in summed:
                held[name] = packed_sum(kept.get(name), summed[name])
            else:
                held[name] = kept[name] if name in kept else packed(need.zeros())
        n = self.samples
        return PackedTensors({k: h.times(1 / n) if isinstance(h, CompactTensor) else h / n for k, h in held.items()})


def leg_names(needs: dict[str, Need]) -> dict[str, tuple[str, ...]]:
    """The names of every symmetry's legs, in order."""
    names: dict[str, dict[int, str]] = {}
    for need in needs.values():
        for symmetry, position, leg, _ in need.legs:
            names.setdefault(symmetry, {})[position] = leg.label
    return {symmetry: tuple(legs[k] for k in sorted(legs)) for symmetry, legs in names.items()}
