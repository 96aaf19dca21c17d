"""Shifts of parameters on their way through a model: what they move, what must be equal, what killed or absorbed them.

Every row of every parameter axis starts as a shift of its own with a *label*, an integer: for `W [3, 4]` label 2 of
axis 0 stands for `W[1, :] += c` with any `c` of four numbers. Where an operator needs neighbouring entries to be
shifted alike, their labels are *united*: after a layer norm over the three outputs of `W`, the rows move together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from noetherflow.discovery.gauges import Array, narrow

TranslationFamily = Literal["translation", "null"]
"""What absorbed a shift: `translation` a softmax or its like, `null` a normalisation that takes means away."""
STRENGTH: dict[TranslationFamily, int] = {"translation": 1, "null": 2}


@dataclass(frozen=True, eq=False)
class ShiftTerm:
    """A shift that a tensor carries: entry `e` moves by `scale` times an amount that depends on `label` and `value`.

    `label` says which shift moves an entry (0: none). Two entries with one label move alike if their `value` is equal
    too. Both broadcast to the tensor: size 1 along every axis on which they do not depend. `source` numbers the values:
    only terms of one source have comparable ones. `family` is that of what would absorb the shift.

    Example: `x @ W.T` with `x [8, 4]` and `W [3, 4]` moves by `x c` in row 1: the labels are `[1, 3]` (0, 2, 0 for that
    row's shift), the values `[8, 1]`, numbers 0 to 7, one for every sample.
    """

    label: Tensor
    value: Tensor
    source: int
    scale: float = 1.0
    family: TranslationFamily = "translation"

    def uniform(self, axes: Sequence[int]) -> bool:
        """Whether entries with one label move alike along these axes."""
        return all(self.value.shape[a] == 1 for a in axes)

    def map(self, act: Callable[[Tensor], Tensor], shape: Sequence[int]) -> ShiftTerm:
        """The term after a re-indexing operator, run on labels and values of a tensor of this shape."""
        label, value = (narrow(act(t.expand(tuple(shape)))) for t in (self.label, self.value))
        return replace(self, label=label, value=value)

    def aligned(self, ndim: int) -> ShiftTerm:
        """With leading axes of size 1, as broadcasting adds them."""
        lead = [1] * (ndim - self.label.ndim)
        label, value = (t.reshape(*lead, *t.shape) for t in (self.label, self.value))
        return replace(self, label=label, value=value)


@dataclass(frozen=True)
class ShiftedAxis:
    """The labels `start .. start + size` of the rows of one parameter along one axis."""

    leaf: str
    axis: int
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class FoundShift:
    """Blocks of rows of one parameter axis, `rows[block, i]`, that may each be shifted without changing the outputs."""

    axis: ShiftedAxis
    family: TranslationFamily
    rows: Array


class ShiftStore:
    """All shifts by label."""

    def __init__(self) -> None:
        self._axes: list[ShiftedAxis] = []
        self._size = 1
        self._dead = np.zeros(1024, dtype=bool)
        self._absorbed = np.zeros(1024, dtype=np.int8)
        self._axis_of = np.full(1024, -1, dtype=np.int64)
        self._parent = np.zeros(1024, dtype=np.int64)
        self._united: list[tuple[Array, Array]] = []
        self._members: dict[int, Array] = {}
        self._sources = 0

    def source(self) -> int:
        """A number for values that are comparable with no earlier ones."""
        self._sources += 1
        return self._sources

    def leaf_terms(self, leaf: str, shape: tuple[int, ...]) -> tuple[ShiftTerm, ...]:
        """The free shifts of a parameter: each row of each axis by an amount of its own."""
        terms = []
        for axis, size in enumerate(shape):
            if size > 1:
                start = self._new(size, len(self._axes))
                self._axes.append(ShiftedAxis(leaf, axis, start, size))
                label = torch.arange(start, start + size).reshape([size if a == axis else 1 for a in range(len(shape))])
                others = [1 if a == axis else n for a, n in enumerate(shape)]
                terms.append(ShiftTerm(label, torch.arange(int(np.prod(others))).reshape(others), self.source()))
        return tuple(terms)

    def grouped(self, term: ShiftTerm, axes: Sequence[int]) -> Tensor:
        """Labels for a sum over `axes`: where different shifts are added up, one new label for all of them together."""
        if not any(term.label.shape[a] > 1 for a in axes):
            return term.label
        rest = [a for a in range(term.label.ndim) if a not in axes]
        flat = term.label.permute(*rest, *axes).reshape(int(np.prod([term.label.shape[a] for a in rest])), -1)
        rows, which = np.unique(flat.numpy(), axis=0, return_inverse=True)
        start = self._new(len(rows), -1)
        for k, row in enumerate(rows):
            self._members[start + k] = self._leaf_labels(row)
        label = torch.from_numpy(start + which.reshape(-1))
        return label.reshape([1 if a in axes else n for a, n in enumerate(term.label.shape)])

    def kill(self, terms: Sequence[ShiftTerm]) -> None:
        """The outputs depend on these shifts."""
        for term in terms:
            self._dead[self._leaf_labels(term.label.numpy())] = True

    def alive(self, term: ShiftTerm) -> bool:
        return not bool(self._dead[self._leaf_labels(term.label.numpy())].all())

    def unite(self, term: ShiftTerm, axes: Sequence[int]) -> ShiftTerm | None:
        """Demand that the shift is the same along `axes`; the term with size 1 there, or None if that cannot be."""
        if not term.uniform(axes):
            self.kill([term])
            return None
        first = term.label
        for axis in axes:
            first = first.narrow(axis, 0, 1)
        a, b = self.find(first.expand_as(term.label).reshape(-1).numpy()), self.find(term.label.reshape(-1).numpy())
        a, b = a[a != b], b[a != b]
        possible = (self._axis_of[a] == self._axis_of[b]) & (self._axis_of[a] >= 0)
        for side in (a, b):
            self._dead[self._leaf_labels(side[~possible])] = True
        self._united.append((a[possible], b[possible]))
        self._parent[b[possible]] = a[possible]
        return replace(term, label=first)

    def absorb(self, terms: Sequence[ShiftTerm], axes: Sequence[int], family: TranslationFamily) -> None:
        """Something takes out what is equal along `axes`: united along them, these shifts do not show."""
        for term in terms:
            united = self.unite(term, axes)
            if united is not None:
                self.absorbed([replace(united, family=family)])

    def absorbed(self, terms: Sequence[ShiftTerm]) -> None:
        """These shifts were taken out by something of their terms' family."""
        for term in terms:
            labels = self._leaf_labels(term.label.numpy())
            self._absorbed[labels] = np.maximum(self._absorbed[labels], STRENGTH[term.family])

    def find(self, labels: Array) -> Array:
        """Labels with those that were united replaced by one of them."""
        out = self._parent[labels]
        while True:
            further = self._parent[out]
            if np.array_equal(further, out):
                return out
            out = further

    def same(self, a: Tensor, b: Tensor) -> bool:
        """Whether two label tensors are equal, united ones taken as equal."""
        x, y = torch.broadcast_tensors(a, b)
        return bool(np.array_equal(self.find(x.reshape(-1).numpy()), self.find(y.reshape(-1).numpy())))

    def shares_labels(self, a: Sequence[ShiftTerm], b: Sequence[ShiftTerm]) -> bool:
        """Whether one shift moves both sides."""
        left, right = (
            np.concatenate([self._leaf_labels(t.label.numpy()) for t in terms] or [np.zeros(0, dtype=np.int64)])
            for terms in (a, b)
        )
        return bool(np.isin(left, right).any())

    def found(self) -> Iterator[FoundShift]:
        """Shifts that something absorbed and nothing killed, united ones as one block, blocks of one size together."""
        component = self._components()
        dead, absorbed = (np.zeros(component.max() + 1, dtype=np.int8) for _ in range(2))
        np.maximum.at(dead, component, self._dead[: self._size].astype(np.int8))
        np.maximum.at(absorbed, component, self._absorbed[: self._size])
        for axis in self._axes:
            own = component[axis.start : axis.start + axis.size]
            good = np.flatnonzero((dead[own] == 0) & (absorbed[own] > 0))
            size = np.bincount(own[good], minlength=component.max() + 1)[own[good]]
            for family, strength in STRENGTH.items():
                for dim in np.unique(size[absorbed[own[good]] == strength]):
                    rows = good[(size == dim) & (absorbed[own[good]] == strength)]
                    rows = rows[np.argsort(own[rows], kind="stable")].reshape(-1, dim)
                    yield FoundShift(axis, family, rows[np.argsort(rows[:, 0])])

    def _new(self, count: int, axis: int) -> int:
        """The first of `count` new labels."""
        start, self._size = self._size, self._size + count
        if self._size > self._dead.size:
            room = max(self._size, 2 * self._dead.size)
            for name in ("_dead", "_absorbed", "_axis_of", "_parent"):
                old = getattr(self, name)
                grown = np.zeros(room, dtype=old.dtype)
                grown[:start] = old[:start]
                setattr(self, name, grown)
        self._axis_of[start : self._size] = axis
        self._parent[start : self._size] = np.arange(start, self._size)
        return start

    def _leaf_labels(self, labels: Array) -> Array:
        """The labels of parameter rows among these, and those behind the labels of sums."""
        unique = np.unique(labels)
        sums = [int(x) for x in unique[self._axis_of[unique] < 0] if x != 0]
        rows = unique[self._axis_of[unique] >= 0]
        return np.unique(np.concatenate([rows, *(self._members[x] for x in sums)])) if sums else rows

    def _components(self) -> Array:
        """For every label the number of its united block."""
        n = self._size
        a, b = (np.concatenate([pair[k] for pair in self._united] or [np.zeros(0, dtype=np.int64)]) for k in range(2))
        graph = sp.coo_array((np.ones(a.size, dtype=np.int8), (a, b)), shape=(n, n))
        return np.asarray(connected_components(graph, directed=False)[1])
