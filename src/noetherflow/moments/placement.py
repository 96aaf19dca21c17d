"""Into which groups of samples the batches of a measurement go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """The groups of one batch.

    Attributes:
        groups: The batch's samples are divided evenly among these.
        complete: No later batch goes into them.
        level: How many batches make one group by now; where that grew, neighbours among earlier groups are joined.
        beside: Further groups that go on growing, and are not packed yet.
    """

    groups: tuple[int, ...]
    complete: bool = False
    level: int = 1
    beside: tuple[int, ...] = ()


@dataclass(frozen=True)
class GroupPlan:
    """Up to `groups` groups of neighbouring batches, of which there are `batches`, None if that is not known.

    Each group is filled before the next one begins, for only the one being filled takes a copy of the parameters. With
    fewer batches than groups each batch is divided. Where the number of batches is not known, groups of one batch are
    joined in pairs whenever there are too many, and later ones take as many batches as those; two or three groups take
    batches in turns.

    Example:
        >>> [GroupPlan(4, 6).place(k).groups for k in range(6)]
        [(0,), (0,), (1,), (2,), (2,), (3,)]
        >>> [GroupPlan(4, 2).place(k).groups for k in range(2)]
        [(0, 1), (2, 3)]
        >>> [(p.groups, p.level) for p in map(GroupPlan(4, None).place, range(6))]
        [((0,), 1), ((1,), 1), ((2,), 1), ((3,), 1), ((2,), 2), ((2,), 2)]
    """

    groups: int
    batches: int | None = None

    def place(self, k: int) -> Placement:
        """The groups of batch `k`, counted from 0."""
        if self.groups <= 1:
            return Placement((0,))
        if self.batches is None and self.groups < 4:
            return Placement((k % self.groups,), beside=tuple(range(self.groups)))
        if self.batches is None:
            level = 1
            while level * self.groups <= k:
                level *= 2
            return Placement((k // level,), complete=(k + 1) % level == 0, level=level)
        first, end = (min(self.groups, j * self.groups // self.batches) for j in (k, k + 1))
        if first < end:
            return Placement(tuple(range(min(first, self.groups - 1), end)), complete=True)
        return Placement((min(first, self.groups - 1),))
