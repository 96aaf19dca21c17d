"""The registry of shift rules and what a rule sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from noetherflow.discovery.shift_store import ShiftStore, ShiftTerm, TranslationFamily

ShiftRule = Callable[..., Any]
SHIFT_RULES: dict[str, ShiftRule] = {}
"""Operator name (with or without overload) -> rule."""


@dataclass(frozen=True, eq=False)
class Shifted:
    """A tensor of this shape and the shifts it carries."""

    shape: tuple[int, ...]
    terms: tuple[ShiftTerm, ...] = ()

    @property
    def ndim(self) -> int:
        return len(self.shape)


def shift_rule(*operators: str) -> Callable[[ShiftRule], ShiftRule]:
    """Register a rule under operator names, `aten.add` for every overload or `aten.add.Tensor` for one."""

    def register(function: ShiftRule) -> ShiftRule:
        for name in operators:
            SHIFT_RULES[name] = function
        return function

    return register


def find_shift_rule(operator: str) -> ShiftRule | None:
    """The rule of `aten.add.Tensor`, else that of `aten.add`."""
    return SHIFT_RULES.get(operator) or SHIFT_RULES.get(operator.rpartition(".")[0])


@dataclass(frozen=True)
class ShiftContext:
    """What a shift rule sees besides its arguments; `shapes` are those of the outputs (None: no tensor)."""

    store: ShiftStore
    node: fx.Node
    shapes: tuple[tuple[int, ...] | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.shapes[0]
        assert shape is not None
        return shape

    def out(self, terms: Iterable[ShiftTerm] = ()) -> Shifted:
        """The first output, with the terms that nothing has killed yet."""
        return Shifted(self.shape, tuple(t for t in terms if self.store.alive(t)))

    def outs(self, terms: Iterable[ShiftTerm] = ()) -> list[Shifted]:
        """All outputs, the first one with these terms."""
        return [self.out(terms), *(Shifted(shape or ()) for shape in self.shapes[1:])]

    def first_or_all(self, terms: Iterable[ShiftTerm] = ()) -> Shifted | list[Shifted]:
        """The output of an operator that exists with and without further outputs (statistics, positions)."""
        return self.out(terms) if len(self.shapes) == 1 else self.outs(terms)

    def kill(self, *values: Any) -> Shifted:
        """The operator lets no shift of these arguments pass; a first output without shifts."""
        for x in shifted_in(values):
            self.store.kill(x.terms)
        return self.out()

    def absorb(self, x: Any, axes: Sequence[int], family: TranslationFamily) -> None:
        """The operator does not see what is equal along `axes`."""
        for tensor in shifted_in(x):
            self.store.absorb(tensor.terms, axes, family)

    def united(self, x: Shifted, axes: Sequence[int]) -> list[ShiftTerm]:
        """The terms of `x`, demanded to be equal along `axes` and of size 1 there."""
        return [t for t in (self.store.unite(term, axes) for term in x.terms) if t is not None]


def shifted_in(value: Any) -> list[Shifted]:
    """Every tensor inside nested lists, tuples and dicts."""
    if isinstance(value, Shifted):
        return [value]
    if isinstance(value, dict):
        return [x for v in value.values() for x in shifted_in(v)]
    return [x for v in value for x in shifted_in(v)] if isinstance(value, (list, tuple)) else []
