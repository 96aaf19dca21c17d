"""Sums by group of samples, to which a batch is added whole or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from noetherflow.errors import MomentError
from noetherflow.moments.distributed import added_over_ranks
from noetherflow.moments.result import GradientMoments
from noetherflow.moments.statistics import noise_error
from noetherflow.moments.target import Need, Sums
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(eq=False)
class GroupSums:
    """The sums of every group of samples measured so far.

    A batch is measured into what `open` gives, and counts once it is handed to `close`. Where it is certain that the
    measurement will go through, `open(in_place=True)` gives the groups' own sums, which saves a copy of each gradient;
    an error after that leaves half a batch in them, and every later call says so.
    """

    syms: SymmetrySet
    needs: dict[str, Need]
    by_group: dict[int, Sums] = field(default_factory=dict)
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

        Groups are kept rounded; what that lacks to the exact total is shared out among them by their samples. Groups
        that hold a part of the samples only become one group with the rest.
        """
        complete = sum(g.samples for g in moments.groups) == moments.samples
        parts = moments.groups if complete and moments.groups else (moments,)
        self.by_group = {k: Sums.of(part, self.syms, self.needs) for k, part in enumerate(parts)}
        for which, means in (("gradient", moments.mean), ("squares", moments.squares)):
            held = [(s.samples / moments.samples, getattr(s, which)) for s in self.by_group.values()]
            for name, mean in means.items():
                lacking = mean.double() * moments.samples - sum(tensors[name].double() for _, tensors in held)
                for share, tensors in held:
                    tensors[name].add_((share * lacking).to(tensors[name]))

    def open(self, groups: Iterable[int], in_place: bool) -> dict[int, Sums]:
        """Sums to measure a batch into, by group: the groups' own, or fresh ones."""
        self._half_added = in_place
        before = self.by_group if in_place else {}
        return {g: before.get(g) or Sums.zeros(self.syms, self.needs) for g in groups}

    def close(self, opened: Mapping[int, Sums]) -> None:
        """Count a batch measured into the sums that `open` gave."""
        for g, sums in opened.items():
            before = self.by_group.get(g)
            if sums.samples and sums is not before:
                self.by_group[g] = sums if before is None else before.plus(sums)
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

    def over_ranks(self, ranks: Any) -> dict[int, Sums]:
        """The sums by group, of all `ranks` if a process group is given."""
        return self.by_group if ranks is None else added_over_ranks(self.by_group, self.syms, self.needs, ranks)


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
