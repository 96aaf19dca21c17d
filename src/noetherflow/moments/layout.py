"""Where the samples of a batch lie in an operator's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class SampleLayout:
    """The sample axis of a tensor: axes `axis .. axis + span - 1` merged, which hold the samples.

    `whole`: one entry per sample. `major`/`minor`: samples folded with something else, sample index first or last.
    `none`: everything is one sample.
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
            return tensor.unflatten(self.axis, (samples, -1)).movedim(self.axis, 0)
        return tensor.unflatten(self.axis, (-1, samples)).movedim(self.axis + 1, 0)

    def rest(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape, without samples, of an operand that broadcasts along the sample axis (size 1 there)."""
        if self.fold == "none":
            return tuple(shape)
        keep = () if self.fold == "whole" else (1,)
        return (*shape[: self.axis], *keep, *shape[self.axis + self.span :])


WHOLE_BATCH = SampleLayout(fold="none")


def candidates(shape: Sequence[int], axes: Sequence[int], samples: int, span: int) -> Iterator[SampleLayout]:
    """Every way in which `samples` samples may lie on the eligible `axes` of a tensor, most usual first."""
    merged = [a for a in axes if span > 1 and all(a + k in axes for k in range(span))]
    yield from (SampleLayout(a, span) for a in merged if prod(shape[a : a + span]) == samples)
    yield from (SampleLayout(a) for a in axes if shape[a] == samples)
    folded = [a for a in axes if shape[a] != samples and shape[a] % samples == 0 and shape[a]]
    yield from (SampleLayout(a, 1, "major") for a in folded)
    if samples > 1:
        yield from (SampleLayout(a, 1, "minor") for a in folded)
