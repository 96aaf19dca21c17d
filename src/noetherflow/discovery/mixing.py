"""Which atoms may mix (GL), kept as one *cell* per atom: atoms of one parameter axis may mix while they share a cell.

Every atom of an axis starts in the axis' cell. An operator that treats coordinates differently tells them apart: after
`relu` every unit is in a cell of its own (only scales are left), after a split into two heads the coordinates of each
head share a cell (one GL per head).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from noetherflow.discovery.gauges import Array, Field, broadcast, mix, ranks


class Cells:
    """The cell of every atom, as a hash of everything that told it apart from others."""

    def __init__(self) -> None:
        self._of = np.zeros(1024, dtype=np.uint64)

    def together(self, start: int, count: int) -> None:
        """New atoms `start .. start + count` in one new cell."""
        if start + count > self._of.size:
            grown = np.zeros(max(start + count, 2 * self._of.size), dtype=np.uint64)
            grown[:start] = self._of[:start]
            self._of = grown
        self._of[start : start + count] = mix(np.full(count, 2**40 + start))

    def first(self, count: int) -> Array:
        """The cells of the atoms `0 .. count`."""
        return self._of[:count]

    def alone(self, atoms: Array) -> None:
        """Every one of these atoms in a cell of its own."""
        atoms = np.unique(atoms)
        self._of[atoms] = mix(self._of[atoms] ^ mix(atoms + 2**50))

    def refine(self, f: Field, labels: Tensor) -> None:
        """Atoms that occur with different collections of labels may no longer mix.

        `ids` (1, 1, 2, 2) with labels (0, 1, 0, 1) keeps 1 and 2 together, labels (0, 0, 1, 1) tells them apart.
        """
        ids, marks = broadcast(f.ids, labels)
        hashes = mix(marks)
        if ids.size > 1 and not bool((np.diff(ids) > 0).all()):
            order = np.argsort(ids, kind="stable")
            ordered = ids[order]
            start = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
            ids, hashes = ordered[start], np.add.reduceat(hashes[order], start)
        self._of[ids] = mix(self._of[ids] ^ mix(hashes))
        self._of[0] = 0

    def separate(self, f: Field, axes: Sequence[int]) -> None:
        """Atoms may mix only with those at the same position along `axes`."""
        spanned = f.spans(axes)
        if spanned:
            sizes = [f.ids.shape[a] if a in spanned else 1 for a in range(f.ids.ndim)]
            self.refine(f, torch.arange(int(np.prod(sizes))).reshape(sizes))

    def pairable(self, fields: Sequence[Field]) -> bool:
        """Tell atoms apart as far as fields that are multiplied position by position demand it.

        The rows of `W1` and the columns of `W2` in `W2 W1` are paired one to one and mix together. Where an atom meets
        several partners (query heads that share a key head), those with equal order of occurrence correspond. Further
        fields are coarser ones, such as one scale per head: what they tell apart may not mix. False if there is no such
        correspondence: then nothing may mix.
        """
        order = sorted(range(len(fields)), key=lambda k: len(torch.unique(fields[k].ids)))
        *coarse, first, second = (fields[k] for k in order)
        if abs(first.exponent) != 1 or abs(second.exponent) != 1:
            return False
        a, b, *others = _met(first.ids, second.ids, *(f.ids for f in coarse))
        ra, rb = ranks(a.numpy()), ranks(b.numpy())
        if ra is not None and rb is not None and not np.array_equal(ra, rb):
            return False
        position = np.zeros(a.numel(), dtype=np.int64) if ra is None and rb is None else ra if rb is None else rb
        assert position is not None
        if not others and ra is None and rb is None:
            return True
        labels = mix(position)
        for other in others:
            labels = mix(labels ^ mix(other.numpy()))
        told = torch.from_numpy(labels.astype(np.int64))
        self.refine(Field(a, 1.0), told)
        self.refine(Field(b, 1.0), told)
        for f in coarse:
            self.alone(f.ids.reshape(-1).numpy())
        return True


def _met(a: Tensor, b: Tensor, *others: Tensor) -> list[Tensor]:
    """The atoms of fields that meet at one position each time, without repetitions along axes of one of the first two.

    Two tensors joined along the batch, rows (1, 2), (1, 2) and (3, 4), meet the columns (7, 8) of one weight as 1-7,
    2-8, 3-7 and 4-8, however many rows there are of each.
    """
    shared = [n if n > 1 and m > 1 else 1 for n, m in zip(a.shape, b.shape, strict=True)]
    position = torch.arange(int(np.prod(shared))).reshape(shared)
    *columns, place = (x.reshape(-1) for x in torch.broadcast_tensors(a, b, *others, position))
    if all(n == m for n, m in zip(a.shape, b.shape, strict=True)):
        return columns
    _, first = np.unique(torch.stack([place, *columns], 1).numpy(), axis=0, return_index=True)
    kept = torch.from_numpy(np.sort(first))
    return [column[kept] for column in columns]
