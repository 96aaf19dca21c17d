"""Where the inner products of a ledger live: leg values, and the sparse map from them to charges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Literal

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from noetherflow.symmetry.leg import Leg, accumulation_dtype
from noetherflow.symmetry.symmetry import Symmetry, Translation

Detail = Literal["family", "symmetry", "block", "coordinate"]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """`sum a b` over all entries, at least float32, without a temporary where both are contiguous."""
    a, b = accumulation_dtype(a), accumulation_dtype(b)
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return (a * b).sum()


def axis_sums(a: Tensor, b: Tensor, axes: tuple[int, ...], piece: int = 1 << 16) -> Tensor:
    """`a b` summed over all axes but `axes` (kept with length 1), without a temporary of the whole size."""
    keep = [axis % a.ndim for axis in axes]
    over = tuple(axis for axis in range(a.ndim) if axis not in keep)
    if not over:
        return a * b
    rows = max(1, piece * a.shape[0] // max(1, a.numel()))
    parts = [(x * y).sum(over, keepdim=True) for x, y in zip(a.split(rows), b.split(rows), strict=True)]
    return torch.cat(parts) if 0 in keep else torch.stack(parts).sum(0)


@dataclass(frozen=True, eq=False)
class WatchedTranslation:
    """A translation watched by the square of its linear charge, `|u^T X|^2` (theory.md section 2, the null class)."""

    translation: Translation
    kind = "shift"
    is_torus = True
    one_sided = False

    @property
    def name(self) -> str:
        return self.translation.name

    @property
    def family(self) -> str:
        return self.translation.family

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.translation.parameters

    @property
    def weight_legs(self) -> tuple[Leg, ...]:
        return (self.translation.leg,)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.translation.leg.blocks,)

    def fingerprint(self) -> str:
        """What is watched, in short, as `Symmetry.fingerprint`."""
        direction = self.translation.direction
        return f"{self.translation.leg.fingerprint()} {None if direction is None else direction.tolist()}"


Watched = Symmetry | WatchedTranslation


@dataclass(frozen=True, eq=False)
class Slot:
    """One leg's inner product of two tensors of its parameter's shape, of their projections `u^T X` for a translation.

    `total`: the trace, one number. Else row sums per coordinate (`matrix=False`: also for general_linear, the trace of
    each block) or the symmetrised block matrices `(X Y^T + Y X^T) / 2`, flattened.
    """

    leg: Leg
    shape: tuple[int, ...]
    total: bool
    matrix: bool
    shift: Translation | None = None

    @cached_property
    def whole(self) -> bool:
        """True when the leg's rows are all rows of the parameter, each once, and count as they are."""
        if self.shift is not None:
            return False
        view = self.shape if self.leg.view is None else self.leg.view
        rows = int(np.prod([view[a] for a in self.leg.axes]))
        flat = np.sort(self.leg.index.reshape(-1))
        return flat.size == rows and bool(np.array_equal(flat, np.arange(rows)))

    @cached_property
    def rows(self) -> np.ndarray:
        """The rows that the leg takes, in order."""
        return np.unique(self.leg.index)

    @property
    def size(self) -> int:
        if self.total:
            return 1
        return self.leg.blocks * (self.leg.dim**2 if self.matrix else 1)

    @property
    def key(self) -> tuple[object, ...]:
        """Slots with one key have the same values."""
        where = (
            "whole" if self.whole else (self.leg.index.tobytes(), self.leg.index.shape, self.leg.axes, self.leg.view)
        )
        layout = () if self.total else (self.leg.index.tobytes(), self.leg.index.shape, self.leg.axes, self.leg.view)
        shift = None if self.shift is None else self.shift.name
        return (self.leg.parameter, where, self.total, self.matrix, layout, shift)

    @cached_property
    def _span(self) -> tuple[int, int, int] | None:
        """`(axis, start, length)` when the rows are one run of a single axis."""
        if self.leg.view is not None or len(self.leg.axes) != 1:
            return None
        flat = np.sort(self.leg.index.reshape(-1))
        run = np.array_equal(flat, np.arange(flat[0], flat[0] + flat.size))
        return (self.leg.axes[0], int(flat[0]), flat.size) if run else None

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """The slot's values of `<a, b>`, shape `[size]`."""
        if self.shift is not None:
            x, y = (self.shift.charge({self.leg.parameter: t}) for t in (a, b))
            return (x * y).sum().reshape(1) if self.total else (x * y).sum(1)
        if self.total and self.whole:
            return dot(a, b).reshape(1)
        if self.total and self._span is not None:
            return dot(a.narrow(*self._span), b.narrow(*self._span)).reshape(1)
        a, b = accumulation_dtype(a), accumulation_dtype(b)
        if self.matrix:
            x, y = self.leg.unfold(a), self.leg.unfold(b)
            product = x @ y.mT
            return ((product + product.mT) / 2).reshape(-1)
        rows = self.leg.row_sums(axis_sums(a, b, self.leg.axes) if self.leg.view is None else a * b)
        return rows.sum().reshape(1) if self.total else rows.reshape(self.leg.blocks, -1).sum(1)


@dataclass(frozen=True, eq=False)
class ChargeMap:
    """Leg values of all symmetries in one vector of length `n_values`, grouped by parameter, and charges from them.

    `charges = matrix @ values`, `norms = absolute @ values` (`theta^T |A| theta`). `spans[i]` is the range of output
    entries of symmetry i; `trace[j]` is 1 where output j counts towards the symmetry's total, 0 off a matrix diagonal.
    """

    symmetries: tuple[Watched, ...]
    slots: tuple[Slot, ...]
    parameters: tuple[str, ...]
    parameter_of_value: np.ndarray
    matrix: scipy.sparse.csr_array
    absolute: scipy.sparse.csr_array
    plus: scipy.sparse.csr_array
    minus: scipy.sparse.csr_array
    spans: tuple[tuple[int, int], ...]
    trace: np.ndarray
    reference: np.ndarray

    @classmethod
    def of(cls, symmetries: Sequence[Watched], shapes: Mapping[str, tuple[int, ...]], detail: Detail) -> ChargeMap:
        """Lay out the leg values of some symmetries.

        Args:
            symmetries: what is watched, translations included.
            shapes: the shapes of all parameters by name.
            detail: `family` or `symmetry`: one total per leg; `block`: one number per coordinate of a torus or block of
                a general_linear symmetry; `coordinate`: those, and matrices for general_linear.
        """
        terms = _terms(symmetries, shapes, detail)
        parameters = tuple(dict.fromkeys(term.slot.leg.parameter for term in terms))
        slots = _unique_slots(terms, parameters)
        sizes = [slot.size for slot in slots]
        ends = np.cumsum([0, *sizes]).astype(int)
        starts = {slot.key: int(start) for slot, start in zip(slots, ends, strict=False)}
        first = {term.symmetry: term.slot for term in reversed(terms)}
        stops = np.cumsum([0, *(first[i].size for i in range(len(symmetries)))]).astype(int)
        spans = tuple((int(a), int(b)) for a, b in pairwise(stops))
        standing, order = _standing(slots), {name: k for k, name in enumerate(parameters)}
        shape = (int(stops[-1]), int(ends[-1]))
        sums = partial(_matrix, terms, spans, starts, shape)
        return cls(
            symmetries=tuple(symmetries),
            slots=slots,
            parameters=parameters,
            parameter_of_value=np.repeat([order[s.leg.parameter] for s in slots], sizes).astype(np.int32),
            matrix=sums(lambda exponent: exponent),
            absolute=sums(abs),
            plus=sums(lambda exponent: float(exponent > 0)),
            minus=sums(lambda exponent: float(exponent < 0)),
            spans=spans,
            trace=_joined([_diagonal(first[i]) for i in range(len(symmetries))]),
            reference=_joined([_diagonal(slot) * (slot.key in standing) for slot in slots]),
        )

    @property
    def n_values(self) -> int:
        return len(self.parameter_of_value)

    @cached_property
    def slots_of(self) -> dict[str, tuple[Slot, ...]]:
        return {n: tuple(s for s in self.slots if s.leg.parameter == n) for n in self.parameters}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of values per parameter."""
        return {n: sum(s.size for s in slots) for n, slots in self.slots_of.items()}

    @cached_property
    def totals_only(self) -> frozenset[str]:
        """Parameters whose one value is the total over all entries."""
        return frozenset(
            n for n, slots in self.slots_of.items() if len(slots) == 1 and slots[0].total and slots[0].whole
        )

    def inner(self, parameter: str, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """All values of `<a, b>` on the legs of one parameter, `[sizes[parameter]]` per pair."""
        slots = self.slots_of[parameter]
        return {q: torch.cat([s.inner(a, b) for s in slots]) for q, (a, b) in pairs.items()}

    @cached_property
    def totals_matrix(self) -> scipy.sparse.csr_array:
        """Traces per symmetry, `[n_symmetries, n_out]`."""
        n = len(self.symmetries)
        owner = np.repeat(np.arange(n), [stop - start for start, stop in self.spans])
        return scipy.sparse.csr_array((self.trace, (owner, np.arange(len(owner)))), shape=(n, len(owner)))


def apply(matrix: scipy.sparse.csr_array, values: np.ndarray) -> np.ndarray:
    """`matrix @ values` over the last axis of `values` `[T, n_values]`."""
    return np.ascontiguousarray((matrix @ values.T).T)


@dataclass(frozen=True, eq=False)
class _Term:
    """One leg's part in the charge of the symmetry with that number: its exponent times the values of its slot."""

    symmetry: int
    exponent: float
    slot: Slot


def _terms(symmetries: Sequence[Watched], shapes: Mapping[str, tuple[int, ...]], detail: Detail) -> list[_Term]:
    total, matrix = detail in ("family", "symmetry"), detail == "coordinate"
    return [
        _Term(i, leg.exponent, Slot(leg, shapes[leg.parameter], total, matrix and not s.is_torus, _shift_of(s)))
        for i, s in enumerate(symmetries)
        for leg in s.weight_legs
    ]


def _unique_slots(terms: Sequence[_Term], parameters: Sequence[str]) -> tuple[Slot, ...]:
    """Each slot once, grouped by parameter."""
    unique = {term.slot.key: term.slot for term in reversed(terms)}
    first = {term.slot.key: unique[term.slot.key] for term in terms}
    order = {name: k for k, name in enumerate(parameters)}
    return tuple(sorted(first.values(), key=lambda slot: order[slot.leg.parameter]))


def _matrix(
    terms: Sequence[_Term],
    spans: Sequence[tuple[int, int]],
    starts: Mapping[tuple[object, ...], int],
    shape: tuple[int, int],
    weigh: Callable[[float], float],
) -> scipy.sparse.csr_array:
    """A sparse map from leg values to charges: every term adds its slot's values, weighed by its exponent."""
    rows = _joined([np.arange(*spans[term.symmetry]) for term in terms])
    columns = _joined([starts[term.slot.key] + np.arange(term.slot.size) for term in terms])
    weights = _joined([np.full(term.slot.size, weigh(term.exponent)) for term in terms]).astype(np.float32)
    places = (rows.astype(np.int32), columns.astype(np.int32))
    matrix = scipy.sparse.csr_array((weights, places), shape=shape)
    matrix.eliminate_zeros()
    return matrix


def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(pieces) if pieces else np.zeros(0)


def _diagonal(slot: Slot) -> np.ndarray:
    """1 on values that belong to the trace."""
    if slot.total or not slot.matrix:
        return np.ones(slot.size)
    return np.tile(np.eye(slot.leg.dim).reshape(-1), slot.leg.blocks)


def _standing(slots: Iterable[Slot]) -> set[tuple[object, ...]]:
    """Keys of slots that count every watched entry of each parameter once: the whole, or disjoint rows of one axis."""
    chosen: dict[str, list[Slot]] = {}
    for slot in sorted((s for s in slots if s.shift is None), key=lambda s: (not s.whole, s.leg.axes, s.rows[0])):
        others = chosen.setdefault(slot.leg.parameter, [])
        same_axis = all((s.leg.axes, s.leg.view) == (slot.leg.axes, slot.leg.view) for s in others)
        if same_axis and not any(np.isin(slot.rows, s.rows).any() for s in others):
            others.append(slot)
    return {s.key for picked in chosen.values() for s in picked}


def _shift_of(item: Watched) -> Translation | None:
    return item.translation if isinstance(item, WatchedTranslation) else None
