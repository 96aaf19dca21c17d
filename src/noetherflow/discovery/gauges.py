"""Gauges: how a tensor transforms under the group (docs/architecture.md, 'Gauge inference').

An *atom* is an integer that stands for one positive number of the group; atom 0 stands for 1, the trivial gauge. A
tensor transforms as `T -> T * prod_f p[ids_f]^exponent_f` over its fields. What operators
demand of gauges is collected in `store.Store`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


@lru_cache(maxsize=4096)
def rational(x: float) -> float:
    """The fraction with a denominator up to 10,000 that `x` is but for rounding, else `x` to twelve digits.

    Exponents are rational numbers (a cube root's is 1/3), and sums and products of floats drift off them: `rational`
    brings `0.1 + 0.2` back to 0.3, so that equal exponents are equal and a third is the float nearest to 1/3.
    """
    near = float(Fraction(x).limit_denominator(10_000))
    return near if abs(near - x) <= 1e-12 * max(1.0, abs(x)) else round(x, 12)


def rationals(values: Array) -> Array:
    """`rational` of every entry."""
    unique, inverse = np.unique(values, return_inverse=True)
    return np.array([rational(float(x)) for x in unique])[inverse].reshape(values.shape)


@dataclass(frozen=True, eq=False)
class Field:
    """Atoms `ids` with one exponent. `ids` broadcasts to the tensor: size 1 along every axis it does not depend on."""

    ids: Tensor
    exponent: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "exponent", rational(float(self.exponent)))

    def spans(self, axes: Iterable[int]) -> tuple[int, ...]:
        return tuple(a for a in axes if self.ids.shape[a] > 1)


@dataclass(frozen=True, eq=False)
class Gauge:
    """How one tensor transforms. `zero` marks a tensor of zeros, which fits every gauge.

    `marks` are facts about the value: `data` (depends on the input), `softmax` (a probability), `stack` (weights
    chosen by data). `leaf` names the parameter or buffer that the tensor is, unchanged. `factors` are those of a
    product whose only use is a sum: nothing was demanded of them yet, the sum will do it as for a contraction.
    """

    shape: tuple[int, ...]
    fields: tuple[Field, ...] = ()
    zero: bool = False
    marks: frozenset[str] = frozenset()
    leaf: str = ""
    factors: tuple[Gauge, ...] = ()

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class AxisAtoms:
    """One axis of a parameter whose coordinates get atoms of their own.

    A linear weight `[out, in]` has two: `AxisAtoms((0,))` and `AxisAtoms((1,))`. A stack of 4 matrices `[4, out, in]`
    has `AxisAtoms((0, 1), slices=4)` and `AxisAtoms((0, 2), slices=4)`: 4 x out and 4 x in atoms. Where `view`
    is given, `axes` count in the parameter reshaped to it.
    """

    axes: tuple[int, ...]
    view: tuple[int, ...] | None = None
    slices: int = 1
    """Number of slices (matrices of a stack, groups of a convolution) with their own constants, 1 for a plain axis."""

    def sizes(self, shape: tuple[int, ...]) -> list[int]:
        """Lengths of the axes in a parameter of this shape."""
        full = shape if self.view is None else self.view
        return [full[a] for a in self.axes]


@dataclass(frozen=True, eq=False)
class Bundle:
    """The atoms of one parameter axis (or of one group of axes of a view), `start .. start + size`."""

    leaf: str
    view: tuple[int, ...] | None
    axes: tuple[int, ...]
    start: int
    size: int
    exponent: float
    slices: int
    """See `AxisAtoms.slices`."""


@dataclass(frozen=True, eq=False)
class Equation:
    """Rows of `sum_k coefficients[k] * ids[:, k] = 0`, demanded at one node for one reason."""

    ids: Array
    coefficients: tuple[float, ...]
    node: int
    why: str


def mix(x: Array) -> Array:
    """A 64-bit hash of each entry (splitmix64)."""
    x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def narrow(ids: Tensor) -> Tensor:
    """`ids` with size 1 along every axis on which it does not depend."""
    for axis, size in enumerate(ids.shape):
        if size > 1:
            first = ids.narrow(axis, 0, 1)
            if ids.stride(axis) == 0 or bool((ids == first).all()):
                ids = first
    return ids


def broadcast(*arrays: Tensor) -> list[Array]:
    """Flattened, mutually broadcast copies."""
    return [t.reshape(-1).numpy() for t in torch.broadcast_tensors(*arrays)]


def ranks(ids: Array) -> Array | None:
    """For every position how often its atom occurred before, None when no atom occurs twice."""
    if ids.size < 2 or bool((np.diff(ids) > 0).all()):
        return None
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    start = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    if start.size == ids.size:
        return None
    out = np.empty(ids.size, dtype=np.int64)
    out[order] = np.arange(ids.size) - np.repeat(start, np.diff(np.r_[start, ids.size]))
    return out
