"""The rule registry: one short function per family of operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from noetherflow.discovery.gauges import Field, Gauge, narrow
from noetherflow.discovery.store import Store

GaugeRule = Callable[..., Any]
RULES: dict[str, GaugeRule] = {}
"""Operator name (with or without overload) -> rule."""
KEPT = frozenset({"softmax", "stack"})
"""Marks that survive re-indexing and casts."""


def rule(*operators: str) -> Callable[[GaugeRule], GaugeRule]:
    """Register a rule under operator names, `aten.add` for every overload or `aten.add.Tensor` for one."""

    def register(function: GaugeRule) -> GaugeRule:
        for name in operators:
            RULES[name] = function
        return function

    return register


def find_rule(operator: str) -> GaugeRule | None:
    """The rule of `aten.add.Tensor`, else that of `aten.add`."""
    return RULES.get(operator) or RULES.get(operator.rpartition(".")[0])


@dataclass(frozen=True)
class Context:
    """What a rule sees besides the gauges of its arguments.

    `shapes` are the shapes of the outputs (None for one that is no tensor), `buffer` gives a gauge to a buffer that
    moves with the weights, `stand_in(count, length)` gives positions in place of `count` unknown ones (or None),
    `known` holds the values of nodes that are constants of the code. `lookup(rows, shape)` gives the scales of rows
    that data choose, at positions of this shape, where rows may be scaled one by one (else None).
    """

    store: Store
    node: fx.Node
    shapes: tuple[tuple[int, ...] | None, ...]
    buffer: Callable[[Gauge, float], Gauge]
    stand_in: Callable[[int, int], Tensor | None]
    known: Mapping[fx.Node, Tensor]
    lookup: Callable[[Field, tuple[int, ...]], Field | None]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.shapes[0]
        assert shape is not None
        return shape

    def value_of(self, argument: Any) -> Tensor | None:
        """The value of an argument of the node (a node itself) if it is a constant of the code."""
        return self.known.get(argument) if isinstance(argument, fx.Node) else None

    def out(self, fields: Sequence[Field] = (), **facts: Any) -> Gauge:
        """The gauge of the first output: fields with its number of axes."""
        return Gauge(self.shape, self.store.simplify(fields), **facts)

    def trivial(self, *gauges: Any, why: str = "") -> None:
        """Demand that every tensor among the arguments stays as it is."""
        for gauge in gauges_in(gauges):
            self.store.vanish(gauge.fields, why or f"passes {short_name(self.node)}")


def short_name(node: fx.Node) -> str:
    """`softmax` for `aten._softmax.default`, `centre` for `mylib.centre.default`."""
    parts = str(node.target).split(".")
    return (parts[1] if len(parts) > 1 else parts[0]).strip("_")


def gauges_in(value: Any) -> list[Gauge]:
    """Every gauge inside nested lists, tuples and dicts."""
    if isinstance(value, Gauge):
        return [value]
    if isinstance(value, dict):
        return [g for v in value.values() for g in gauges_in(v)]
    if isinstance(value, (list, tuple)):
        return [g for v in value for g in gauges_in(v)]
    return []


def aligned(gauge: Gauge, ndim: int) -> tuple[Field, ...]:
    """Fields with leading axes of size 1 added, as broadcasting does."""
    return tuple(replace(f, ids=f.ids.reshape([1] * (ndim - f.ids.ndim) + list(f.ids.shape))) for f in gauge.fields)


def reshaped(fields: Sequence[Field], old: Sequence[int], new: Sequence[int]) -> tuple[Field, ...]:
    """Fields of a tensor of shape `old` after a reshape to `new`."""
    return tuple(Field(narrow(f.ids.expand(tuple(old)).reshape(*new)), f.exponent) for f in fields)


def on_ids(fields: Sequence[Field], shape: Sequence[int], act: Callable[[Tensor], Tensor]) -> tuple[Field, ...]:
    """Fields after a re-indexing operator, run on the atoms themselves."""
    return tuple(Field(narrow(act(f.ids.expand(tuple(shape)))), f.exponent) for f in fields)


def normal_axes(axes: Any, ndim: int) -> tuple[int, ...]:
    """A dim argument (int, list, or None/empty for all) as non-negative axes."""
    if axes is None or (isinstance(axes, (list, tuple)) and not axes):
        return tuple(range(ndim))
    listed = [axes] if isinstance(axes, int) else axes
    return tuple(a % max(ndim, 1) for a in listed)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat))
