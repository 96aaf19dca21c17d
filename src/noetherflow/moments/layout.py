"""Where the samples of a batch lie in an operator's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleLayout:
    """Where the samples lie in a tensor: on axes `axis .. axis + span - 1`, merged into one.

    `fold` says how that merged axis holds them. With 3 samples of 2 tokens each:
    `whole`, one entry per sample (size 3); `major`, sample index first (`s0 s0 s1 s1 s2 s2`); `minor`, sample index
    last (`s0 s1 s2 s0 s1 s2`). `none`: everything is one sample, whatever the axis.

    Example:
        >>> SampleLayout(1).front(torch.zeros(7, 3, 4), samples=3).shape
        torch.Size([3, 7, 4])
        >>> SampleLayout(0, 1, "minor").front(torch.arange(6), samples=3).tolist()
        [[0, 3], [1, 4], [2, 5]]
    """

    axis: int = 0
    span: int = 1
    fold: Literal["whole", "major", "minor", "none"] = "whole"

    def front(self, tensor: Tensor, samples: int) -> Tensor:
        """`[samples, remaining axes in order]`, a view where possible."""
        if self.fold == "none":
            return tensor.unsqueeze(0)
        if self.span > 1:
            tensor = tensor.flatten(self.axis, self.axis + self.span - 1)
        if self.fold == "whole":
            return tensor.movedim(self.axis, 0) if self.axis else tensor
        if self.fold == "major":
            return torch.unflatten(tensor, self.axis, (samples, -1)).movedim(self.axis, 0)
        return torch.unflatten(tensor, self.axis, (-1, samples)).movedim(self.axis + 1, 0)

    def rest(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape, without samples, of an operand that broadcasts along the sample axis (size 1 there)."""
        if self.fold == "none":
            return tuple(shape)
        keep = () if self.fold == "whole" else (1,)
        return (*shape[: self.axis], *keep, *shape[self.axis + self.span :])


WHOLE_BATCH = SampleLayout(fold="none")


@lru_cache(maxsize=4096)
def candidates(shape: tuple[int, ...], axes: tuple[int, ...], samples: int, span: int) -> tuple[SampleLayout, ...]:
    """Every way in which samples may lie in a tensor, most usual first.

    Args:
        shape: the tensor's shape.
        axes: the axes on which samples may lie.
        samples: how many there are.
        span: how many neighbouring axes hold them together (2 for one loss per token, `[batch, tokens]`).

    Example:
        >>> [(c.axis, c.fold) for c in candidates((5, 10, 3), (0, 1), 5, 1)]
        [(0, 'whole'), (1, 'major'), (1, 'minor')]
    """
    merged = [a for a in axes if span > 1 and all(a + k in axes for k in range(span))]
    found = [SampleLayout(a, span) for a in merged if prod(shape[a : a + span]) == samples]
    found += [SampleLayout(a) for a in axes if shape[a] == samples]
    folded = [a for a in axes if shape[a] != samples and shape[a] % samples == 0 and shape[a]]
    found += [SampleLayout(a, 1, "major") for a in folded]
    if samples > 1:
        found += [SampleLayout(a, 1, "minor") for a in folded]
    return tuple(found)
