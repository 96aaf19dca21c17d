"""A measuring pass as a function from tensors to tensors, which can be traced: nothing is read back on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from noetherflow.moments.measuring import KnownWay
from noetherflow.moments.products import Factors
from noetherflow.moments.sums import Totals
from noetherflow.moments.taps import Trace

SUMS = ("gradient", "squares", "second", "packed_gradient", "packed_squares")
"""What `Sums` holds in tensors."""


@dataclass(frozen=True, eq=False)
class Found:
    """What one pass found: losses by sample, whether gradients reached uses without a known layout, sums by group in
    the order of the groups, totals of complete ones, and factors.
    """

    losses: Tensor
    reached: list[Tensor]
    sums: list[dict[str, Any]]
    totals: Totals
    factors: dict[str, Factors]


def tensors_within(value: Any) -> Iterator[Tensor]:
    """The tensors in dictionaries, lists, tuples and dataclasses, in order.

    Example:
        >>> [len(t) for t in tensors_within({"a": [torch.ones(1), None], "b": (torch.ones(2),)})]
        [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors_within(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from tensors_within(v)
    elif is_dataclass(value):
        for f in fields(value):
            yield from tensors_within(getattr(value, f.name))


def refilled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same with other tensors, taken one after the other in the order of `tensors_within`.

    Example:
        >>> refilled({"a": [torch.ones(1), 7]}, iter([torch.zeros(1)]))
        {'a': [tensor([0.]), 7]}
    """
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {k: refilled(v, tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([refilled(v, tensors) for v in value])
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: refilled(getattr(value, f.name), tensors) for f in fields(value)})
    return value


@dataclass(eq=False)
class TracedWay(KnownWay):
    """A pass over a batch in which nothing is read back from the device, into sums of its own."""

    losses_of_samples: Tensor = field(init=False)

    def certain(self, trace: Trace) -> bool:
        return False

    def settled(self) -> bool:
        return True

    def read(self, losses: Tensor, parts: Sequence[tuple[int, int]]) -> list[float]:
        self.losses_of_samples = losses.detach().flatten()
        return []

    def found(self) -> Found | None:
        """Measure the batch; None if it goes a way not verified yet."""
        if not self.run():
            return None
        sums = [{kind: getattr(s, kind) for kind in SUMS} for s in self.opened.sums.values()]
        return Found(self.losses_of_samples, self.reached, sums, self.opened.totals, self.factors())


class UnknownWayError(Exception):
    """A pass that is being captured goes a way not verified yet."""


@dataclass(eq=False)
class Capturing:
    """A pass while it is captured."""

    way: TracedWay
    found: Found | None = None

    def outputs(self) -> list[Tensor]:
        """Measure the batch. Raises UnknownWayError where that is not to be done."""
        self.found = self.way.found()
        if self.found is None:
            raise UnknownWayError
        return list(tensors_within(self.found))
