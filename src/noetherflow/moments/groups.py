"""Sums by group of samples, to which a batch is added whole or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from noetherflow.errors import MomentError
from noetherflow.moments.distributed import added_over_ranks
from noetherflow.moments.placement import Placement
from noetherflow.moments.result import GradientMoments, of_groups
from noetherflow.moments.statistics import noise_error
from noetherflow.moments.sums import Sums, Totals, leg_names
from noetherflow.moments.target import Need
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(frozen=True, eq=False)
class Opened:
    """Sums to measure one batch into: those of its groups, and the totals that complete groups are handed to."""

    sums: dict[int, Sums]
    totals: Totals


@dataclass(eq=False)
class GroupSums:
    """The sums of every group of samples measured so far.

    A batch is measured into what `open` gives, and counts once it is handed to `close`. Where it is certain that the
    measurement will go through, `open(in_place=True)` gives the groups' own sums, which saves a copy of each gradient;
    an error after that leaves half a batch in them, and every later call says so. `totals`: of all groups that no batch
    is being added to, whose own gradients are packed. `level`: how many batches make one group.
    """

    syms: SymmetrySet
    needs: dict[str, Need]
    by_group: dict[int, Sums] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)
    level: int = 1
    _half_added: bool = field(default=False, init=False)

    @property
    def samples(self) -> int:
        """How many samples are counted, over all groups."""
        return sum(s.samples for s in self.by_group.values())

    @property
    def loss(self) -> float:
        """Mean loss so far."""
        return sum(s.loss for s in self.by_group.values()) / max(1, self.samples)

    def restore(self, moments: GradientMoments) -> None:
        """Go on from moments measured before, with the same groups.

        Groups that hold a part of the samples only become one group with the rest.
        """
        complete = sum(g.samples for g in moments.groups) == moments.samples
        parts = moments.groups if complete and moments.groups else (moments,)
        self.by_group = {k: Sums.of(part, self.syms, self.needs) for k, part in enumerate(parts)}
        self.totals = Totals()
        for mine, means in ((self.totals.gradient, moments.mean), (self.totals.squares, moments.squares)):
            for name, mean in means.items():
                mine[name] = (mean * moments.samples).to(self.needs[name].zeros())

    def open(self, placed: Placement, in_place: bool) -> Opened:
        """Sums to measure a batch into: the groups' own, or fresh ones."""
        for k, sums in self.by_group.items():
            if k not in placed.groups and k not in placed.beside:
                sums.settle_all(self.totals)
        while self.level < placed.level:
            self._join_neighbours()
        self._half_added = in_place
        before = self.by_group if in_place else {}
        sums_of = {g: before.get(g) or Sums.zeros(self.syms, self.needs) for g in placed.groups}
        return Opened(sums_of, self.totals if in_place else Totals())

    def _join_neighbours(self) -> None:
        """Make one group of every two."""
        self.level *= 2
        joined: dict[int, Sums] = {}
        for k, sums in sorted(self.by_group.items()):
            sums.settle_all(self.totals)
            before = joined.get(k // 2)
            joined[k // 2] = sums if before is None else before.plus(sums)
        self.by_group = joined

    def close(self, opened: Opened) -> None:
        """Count a batch measured into the sums that `open` gave."""
        for g, sums in opened.sums.items():
            before = self.by_group.get(g)
            if sums.samples and sums is not before:
                self.by_group[g] = sums if before is None else before.plus(sums)
        if not self.totals.gradient:
            self.totals = opened.totals
        elif opened.totals is not self.totals:
            self.totals.plus(opened.totals.gradient, opened.totals.squares)
        self._half_added = False

    def refuse_half_added(self) -> None:
        """Raises MomentError after an error that left half a batch in the sums."""
        if self._half_added:
            raise MomentError(
                "an earlier update ended in an error with its batch half added, so these sums are lost; "
                "measure again with a new Meter"
            )

    def noise_error(self) -> float:
        """The largest relative standard error of any leg's `Tr E[g g^T]`, infinite with fewer than four groups."""
        sums = list(self.by_group.values())
        return noise_error([s.samples for s in sums], torch.stack([s.traces() for s in sums]))

    def over_ranks(self, ranks: Any) -> GroupSums:
        """These sums, those of all `ranks` if a process group is given."""
        if ranks is None:
            return self
        for sums in self.by_group.values():
            sums.settle_all(self.totals)
        by_group, totals = added_over_ranks(self.by_group, self.totals, self.syms, self.needs, ranks)
        return GroupSums(self.syms, self.needs, by_group, totals, self.level)

    def moments(self, fallback: tuple[str, ...], *, spend: bool = False) -> GradientMoments:
        """Means over all samples so far, with those of every group.

        Args:
            fallback: Parameters measured by the fallback.
            spend: The sums are not needed any more; their memory becomes the result's.
        """
        several, names = len(self.by_group) > 1, leg_names(self.needs)
        groups = []
        for _, sums in sorted(self.by_group.items()):
            legs = sums.moments_of_legs(fallback, names)
            mean, squares = sums.means() if several else ({}, {})
            groups.append(replace(legs, mean=mean, squares=squares))
        entries = [n for n, need in self.needs.items() if need.entries]
        mean = {n: self._mean("gradient", n, spend) for n in self.needs}
        return of_groups(mean, {n: self._mean("squares", n, spend) for n in entries}, groups)

    def _mean(self, kind: str, name: str, spend: bool) -> Tensor:
        """Mean gradient or squares of one parameter over all samples, exact."""
        kept = [getattr(sums, kind) for sums in (self.totals, *self.by_group.values())]
        parts: list[Tensor] = [
            (tensors.pop(name) if spend else tensors[name].clone()) for tensors in kept if name in tensors
        ]
        if not parts:
            return self.needs[name].zeros()
        for part in parts[1:]:
            parts[0].add_(part)
        return parts[0].div_(self.samples)


def edges(samples: int, groups: int) -> list[tuple[int, int]]:
    """A batch divided evenly: `(lo, hi)` of each group, empty for those that get no sample.

    Example:
        >>> edges(5, 2)
        [(0, 2), (2, 5)]
    """
    cuts = [samples * i // groups for i in range(groups + 1)]
    return list(itertools.pairwise(cuts))


def sums_over(losses: Tensor, parts: Sequence[tuple[int, int]]) -> list[float]:
    """Summed losses `lo .. hi - 1` of each part, read back from the device at once."""
    if len(parts) == 1:
        return [float(losses.sum(dtype=torch.float64))]
    totals: list[float] = torch.stack([losses[lo:hi].sum(dtype=torch.float64) for lo, hi in parts]).tolist()
    return totals
