"""One watched parameter: its weights and optimiser state, and what is still known of them from the last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import NamedTuple

from torch import Tensor, nn

from noetherflow.monitor import sharding
from noetherflow.monitor.rule import Group, State, StepTensors
from noetherflow.monitor.sums import Value, slices


class Lasting(NamedTuple):
    """Weights and optimiser state of one parameter, where their data lie and how often they were written."""

    tensors: StepTensors
    places: list[int]
    writes: list[int]

    def lies_as(self, other: Lasting) -> bool:
        """Whether these are the same tensors with their data in the same places."""
        return self.places == other.places and all(map(is_, self.tensors.values(), other.tensors.values()))


NOTHING = Lasting({}, [], [])


class Grouping:
    """In which of the optimiser's parameter groups each watched parameter is; looked up again when these change."""

    def __init__(self, watched: Sequence[Tensor]) -> None:
        self._watched = watched
        self._held: list[Tensor] = []
        self._sizes: list[int] = []
        self._numbers: list[int | None] = [None] * len(watched)

    def of(self, groups: Sequence[Group]) -> list[int | None]:
        """The number of each watched parameter's group, None for parameters that the optimiser does not hold."""
        held, sizes = list(chain.from_iterable(g["params"] for g in groups)), [len(g["params"]) for g in groups]
        if sizes != self._sizes or not all(map(is_, held, self._held)):
            self._held, self._sizes = held, sizes
            number_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
            self._numbers = [number_of.get(p) for p in self._watched]
        return self._numbers


class WatchedParameter:
    """One parameter between steps: what was measured of it and its state, and flat views of these tensors.

    `known[q]`, measured after the last step, holds before the next one while nothing is `touched`. A write through
    `tensor.data` cannot be seen; it shows up in the residual.

    Args:
        name: its name in the model.
        parameter: the parameter.
        totals_only: only sums over all its entries are watched.
    """

    def __init__(self, name: str, parameter: nn.Parameter, totals_only: bool) -> None:
        self.name, self.parameter, self.totals_only = name, parameter, totals_only
        self._sharded = sharding.is_sharded(parameter)
        self._viewed: Lasting = NOTHING
        self._parts: list[StepTensors] | None = None
        self.forget()

    def forget(self) -> None:
        """Do not rely on what was measured after the last step."""
        self.known: Mapping[str, Value] = {}
        self._seen = NOTHING

    def lasting(self, keys: Sequence[str], state: State) -> Lasting:
        """The weights, and the tensors of these `keys` in the optimiser's state, as they are now."""
        tensors = {"weight": self.parameter}
        for key in keys:
            if (value := state.get(key)) is not None:
                tensors[key] = value
        plain = [sharding.local(t, True) for t in tensors.values()] if self._sharded else tensors.values()
        return Lasting(tensors, [t.data_ptr() for t in plain], [t._version for t in plain])

    def touched(self, lasting: Lasting) -> bool:
        """Whether these are not the tensors of the last `settle`, or were written to since."""
        return lasting.writes != self._seen.writes or not lasting.lies_as(self._seen)

    def weight_touched(self, lasting: Lasting) -> bool:
        """As `touched`, for the weights alone; False while nothing is known of them."""
        a, b = lasting, self._seen
        return bool(self.known) and (a.writes[0], a.places[0]) != (b.writes[0], b.places[0])

    def settle(self, lasting: Lasting, known: Mapping[str, Value]) -> None:
        """Remember what was measured of these tensors as they are."""
        self._seen, self.known = lasting, known

    def parts(self, lasting: Lasting, passing: StepTensors) -> list[StepTensors] | None:
        """All tensors as flat views, in slices on a CPU; None where that or single precision cannot be had.

        Views of `lasting` are made again only when these are other tensors, or lie elsewhere.
        """
        if not lasting.lies_as(self._viewed):
            self._viewed, self._parts = lasting, slices(lasting.tensors)
        if self._parts is None or not passing:
            return self._parts
        more = slices(passing)
        return None if more is None else [{**a, **b} for a, b in zip(self._parts, more, strict=True)]
