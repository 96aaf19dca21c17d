"""A leg: the rows of one parameter on which a symmetry's group element acts (theory.md section 2)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Leg:
    """`X -> G^(sign * power) X`, with `X` the chosen rows of a parameter.

    The parameter (reshaped to `view` when given) is unfolded along `axes` into `rows x m`. `index[b, i, r]` names the
    row that carries coordinate `i` of block `b`; the `r` axis lists replicas that share one group element (the spatial
    positions of a flattened channel, the query heads of one key/value head). Gradients go with `G^(-sign * power)`.

    `power` other than 1 (a running variance, a squared activation) and `buffer=True` (moved, but carries no charge) are
    used by diagonal and scalar groups only. The index may be any integers; a layout that is one regular stride is
    recognised and then no data is copied.

    `offset`: the group acts on `parameter + offset` instead of the parameter, as for the gain `1 + weight` of Gemma's
    norms (offset 1): `weight -> G^(sign * power) (weight + offset) - offset`. All methods here take what the group
    multiplies, weights with their offset added (`Symmetry.positions`) or gradients, and know nothing of it.
    """

    parameter: str
    index: np.ndarray
    sign: int = 1
    axes: tuple[int, ...] = (0,)
    view: tuple[int, ...] | None = None
    power: float = 1.0
    buffer: bool = False
    offset: float = 0.0

    @property
    def exponent(self) -> float:
        """`sign * power`."""
        return self.sign * self.power

    @property
    def label(self) -> str:
        """`+parameter` or `-parameter`."""
        return f"{'+' if self.sign > 0 else '-'}{self.parameter}"

    @property
    def blocks(self) -> int:
        return int(self.index.shape[0])

    @property
    def dim(self) -> int:
        return int(self.index.shape[1])

    @property
    def replicas(self) -> int:
        return int(self.index.shape[2])

    @cached_property
    def _covers_in_order(self) -> bool:
        flat = self.index.reshape(-1)
        return bool(np.array_equal(flat, np.arange(flat.size)))

    def _viewed(self, tensor: Tensor) -> Tensor:
        return tensor if self.view is None else tensor.reshape(self.view)

    def _rows(self, tensor: Tensor) -> Tensor:
        """The viewed tensor with the leg's axes first, merged: `[rows, rest...]` flattened to `[rows, m]`."""
        x = self._viewed(tensor)
        moved = x.movedim(self.axes, tuple(range(len(self.axes))))
        rows = math.prod(x.shape[a] for a in self.axes)
        return moved.reshape(rows, -1)

    def _index_on(self, tensor: Tensor) -> Tensor:
        return torch.as_tensor(self.index, device=tensor.device)

    def unfold(self, tensor: Tensor) -> Tensor:
        """`X`, shape `[blocks, dim, replicas * m]`: a view where the layout allows, else a copy."""
        rows = self._rows(tensor)
        b, d, r = self.index.shape
        picked = (
            rows if self._covers_in_order and rows.shape[0] == b * d * r else rows[self._index_on(rows).reshape(-1)]
        )
        return picked.reshape(b, d, -1)

    def fold(self, tensor: Tensor, x: Tensor) -> Tensor:
        """A copy of `tensor` whose leg rows are replaced by `x` (`[blocks, dim, replicas * m]`)."""
        viewed = self._viewed(tensor)
        shape = [viewed.shape[a] for a in self.axes]
        rest = [viewed.shape[a] for a in range(viewed.ndim) if a not in self._positive_axes(viewed)]
        rows = self._rows(tensor).clone()
        rows[self._index_on(rows).reshape(-1)] = x.reshape(self.index.size, -1).to(rows.dtype)
        back = rows.reshape(shape + rest).movedim(tuple(range(len(shape))), self.axes)
        return back.reshape(tensor.shape)

    def _positive_axes(self, viewed: Tensor) -> tuple[int, ...]:
        return tuple(a % viewed.ndim for a in self.axes)

    def row_sums(self, entries: Tensor) -> Tensor:
        """Sum an entry-wise tensor of the parameter's shape over each coordinate: `[blocks * dim]`."""
        x = self._viewed(entries)
        other = tuple(a for a in range(x.ndim) if a not in self._positive_axes(x))
        return self._by_coordinate(x, x.sum(dim=other) if other else x)

    def square_sums(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """`row_sums` of the squares of a tensor, computed in `dtype` without a copy of the whole tensor."""
        (sums,) = self.sums_by_piece(lambda piece: (piece.to(dtype).square(),), [tensor])
        return sums

    def sums_by_piece(self, entries: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> list[Tensor]:
        """`row_sums` of entry-wise functions of tensors, without a copy of a whole tensor.

        Args:
            entries: takes one piece of each tensor and gives the terms to sum, each of the shape of the piece.
            tensors: of the parameter's shape, or of its view (`factors(...)`, expanded).

        Returns:
            The sums of each term by coordinate, `[blocks * dim]`.
        """
        viewed = [self._viewed(t) for t in tensors]
        x = viewed[0]
        other = tuple(a for a in range(x.ndim) if a not in self._positive_axes(x))

        def sums(*pieces: Tensor) -> list[Tensor]:
            return [t.sum(dim=other) if other else t for t in entries(*pieces)]

        return [self._by_coordinate(x, found) for found in _piecewise(sums, viewed, 0 in other)]

    def moved_by(self, tensor: Tensor, values: Tensor) -> Tensor:
        """The factor of every entry under `scale`, in the shape of the view; it takes no memory of that size."""
        return self.factors(values.to(tensor.device), tensor).expand(self._viewed(tensor).shape)

    def _by_coordinate(self, viewed: Tensor, sums: Tensor) -> Tensor:
        """Sums over the other axes of a viewed tensor, collected by coordinate."""
        order = [sorted(self._positive_axes(viewed)).index(a) for a in self._positive_axes(viewed)]
        sums = sums.permute(order).reshape(-1)
        b, d, r = self.index.shape
        if not (self._covers_in_order and sums.numel() == self.index.size):
            sums = sums[self._index_on(sums).reshape(-1)]
        return sums.reshape(b * d, r).sum(dim=1)

    def gram(self, tensor: Tensor) -> Tensor:
        """`X X^T` per block, `[blocks, dim, dim]`, accumulated in at least float32."""
        x = self.unfold(accumulation_dtype(tensor))
        return x @ x.mT

    def factors(self, values: Tensor, tensor: Tensor) -> Tensor:
        """Per-row multipliers `values^(sign * power)`, shaped to broadcast against the viewed tensor."""
        viewed = self._viewed(tensor)
        shape = [viewed.shape[a] for a in self.axes]
        rows = values.new_ones(math.prod(shape))
        rows[self._index_on(values).reshape(-1)] = (values**self.exponent).repeat_interleave(self.replicas)
        order = sorted(range(len(self.axes)), key=lambda k: self._positive_axes(viewed)[k])
        multiplied = rows.reshape(shape).permute(order)
        full = [n if a in self._positive_axes(viewed) else 1 for a, n in enumerate(viewed.shape)]
        return multiplied.reshape(full)

    def scale(self, tensor: Tensor, values: Tensor) -> Tensor:
        """`tensor` with each coordinate's rows multiplied by `values^(sign * power)` (diagonal and scalar groups)."""
        viewed = self._viewed(tensor)
        wide = torch.promote_types(tensor.dtype, values.dtype)
        scaled = viewed.to(wide) * self.factors(values, tensor).to(wide)
        return scaled.to(tensor.dtype).reshape(tensor.shape)

    def multiply(self, tensor: Tensor, matrices: Tensor) -> Tensor:
        """`tensor` with `X -> matrices @ X` per block; `matrices` `[blocks, dim, dim]`, sign already applied."""
        wide = torch.promote_types(tensor.dtype, matrices.dtype)
        return self.fold(tensor, matrices.to(wide) @ self.unfold(tensor.to(wide)))

    def entry_coordinates(self, shape: tuple[int, ...]) -> np.ndarray:
        """For each row of the unfolded parameter the coordinate `b * dim + i` that moves it, or -1: `[rows]`."""
        view = shape if self.view is None else self.view
        coordinates = np.full(math.prod(view[a] for a in self.axes), -1, dtype=np.int64)
        b, d, r = self.index.shape
        coordinates[self.index.reshape(-1)] = np.repeat(np.arange(b * d), r)
        return coordinates

    def fingerprint(self) -> str:
        """A hash of all that says how the leg acts; legs that act alike have the same."""
        how = self.parameter, self.sign, self.axes, self.view, self.power, self.buffer, self.offset, self.index.shape
        index = np.ascontiguousarray(self.index, dtype=np.int64)
        return hashlib.sha256(repr(how).encode() + index.tobytes()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return {
            "parameter": self.parameter,
            "sign": self.sign,
            "axes": list(self.axes),
            "view": None if self.view is None else list(self.view),
            "power": self.power,
            "buffer": self.buffer,
            "offset": self.offset,
            "index": _encode_index(self.index),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Leg:
        view = data.get("view")
        return cls(
            data["parameter"],
            _decode_index(data["index"]),
            int(data["sign"]),
            tuple(data["axes"]),
            None if view is None else tuple(view),
            float(data.get("power", 1.0)),
            bool(data.get("buffer", False)),
            float(data.get("offset", 0.0)),
        )


def accumulation_dtype(tensor: Tensor) -> Tensor:
    """`tensor` in float32 if it is narrower, else as it is."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _encode_index(index: np.ndarray) -> dict[str, Any]:
    """`{shape, start, strides}` when the index is a regular lattice, else the explicit rows."""
    start = int(index.reshape(-1)[0]) if index.size else 0
    strides = [int(index.take(1, axis=a).reshape(-1)[0]) - start if n > 1 else 0 for a, n in enumerate(index.shape)]
    lattice = _lattice(index.shape, start, strides)
    if np.array_equal(lattice, index):
        return {"shape": list(index.shape), "start": start, "strides": strides}
    return {"shape": list(index.shape), "rows": index.reshape(-1).tolist()}


def _decode_index(data: dict[str, Any]) -> np.ndarray:
    shape = tuple(data["shape"])
    if "rows" in data:
        return np.asarray(data["rows"], dtype=np.int64).reshape(shape)
    return _lattice(shape, data["start"], data["strides"])


def _lattice(shape: tuple[int, ...], start: int, strides: list[int]) -> np.ndarray:
    index = np.full(shape, start, dtype=np.int64)
    for axis, (n, stride) in enumerate(zip(shape, strides, strict=True)):
        index += stride * np.arange(n).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return index


PIECE = 1 << 16
"""Entries that are worked on at a time: what fits in cache is read from memory once."""


def _piecewise(sums: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], added: bool) -> Sequence[Tensor]:
    """`sums` of the pieces of tensors along the first axis, on a processor; added up, or one after the other."""
    x = tensors[0]
    rows = max(1, PIECE * x.shape[0] // max(1, x.numel())) if x.ndim else 1
    if x.ndim == 0 or rows >= x.shape[0] or not x.is_cpu:
        return sums(*tensors)
    parts = (sums(*(t[k : k + rows] for t in tensors)) for k in range(0, x.shape[0], rows))
    if not added:
        return [torch.cat(column) for column in zip(*parts, strict=True)]
    first = next(parts)
    total = [t.double() for t in first]
    for part in parts:
        for whole, piece in zip(total, part, strict=True):
            whole += piece
    return [whole.to(t.dtype) for whole, t in zip(total, first, strict=True)]
