"""Homogeneous linear equations with few terms each, solved exactly: `sum_k c_k x[i_k] = 0`.

Unknown 0 is always 0. Equations with two equal coefficients (`x = y`, `x = -y`) only say which unknowns are the same:
they are merged as connected components. What has more terms is eliminated, rarest unknown first. Nearly all equations
of gauge inference are of the first kind, which keeps it near-linear in the size of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from noetherflow.discovery.gauges import Array, mix, rationals

TINY = 1e-9


@dataclass(frozen=True, eq=False)
class Roots:
    """Every unknown as plus or minus another one: `x[i] = sign[i] * x[root[i]]`; root 0 means that it is 0."""

    root: Array
    sign: Array

    @classmethod
    def apart(cls, count: int) -> Roots:
        """No unknown is bound to another yet."""
        return cls(np.arange(count), np.ones(count, dtype=np.int64))

    def distinct(self) -> Array:
        """The roots that occur, 0 left out, sorted."""
        seen = np.zeros(self.root.size, dtype=bool)
        seen[self.root] = True
        seen[0] = False
        return np.flatnonzero(seen)

    def joined(self, a: Array, b: Array, relation: Array, zeros: Array) -> Roots:
        """The roots with `x[a] = relation * x[b]` (relation 1 or -1) and `x[zeros] = 0` added.

        Works on the double cover: node `i` stands for `+x[i]`, node `n + i` for `-x[i]`. `x[a] = -x[b]` joins `a` with
        `n + b` and `n + a` with `b`. An unknown whose two nodes meet equals its own negative, so it is 0.
        """
        n = self.root.size
        ra, rb, rz = self.root[a], self.root[b], self.root[zeros]
        same = relation * self.sign[a] * self.sign[b] > 0
        start = np.concatenate([[0], ra, ra + n, rz, rz + n])
        end = np.concatenate([[n], np.where(same, rb, rb + n), np.where(same, rb + n, rb), 0 * rz, 0 * rz])
        graph = sp.coo_array((np.ones(start.size, dtype=np.int8), (start, end)), shape=(2 * n, 2 * n))
        count, label = connected_components(graph, directed=False)
        plus, minus = label[:n], label[n:]
        first = self._first_unknown(count, plus, minus)
        zero = np.zeros(count, dtype=bool)
        zero[plus[plus == minus]] = True
        root = np.where(zero[plus], 0, first[plus])
        sign = np.where(plus[np.minimum(first[plus], n - 1)] == plus, 1, -1)
        return Roots(root[self.root], self.sign * sign[self.root])

    def _first_unknown(self, count: int, plus: Array, minus: Array) -> Array:
        """Per component of the double cover its smallest root, the one that represents it."""
        first = np.full(count, self.root.size, dtype=np.int64)
        roots = np.r_[0, self.distinct()]
        np.minimum.at(first, plus[roots], roots)
        np.minimum.at(first, minus[roots], roots)
        return first


@dataclass(frozen=True, eq=False)
class GeneralSolution:
    """All solutions: `x[i] = sum_j combinations[i, j] * x[free[j]]`, and the roots found on the way."""

    roots: Roots
    free: Array
    combinations: sp.csr_array


def solve_system(roots: Roots, rows: sp.csr_array, late: Array) -> GeneralSolution:
    """Every solution of `rows @ x = 0` and of what the roots already say.

    Args:
        roots: equalities known before.
        rows: one equation per row, one column per unknown.
        late: per unknown a penalty; those with a high one are kept free where there is a choice.

    Returns:
        The general solution, one free number per column of its combinations.
    """
    roots, rows = _merged(roots, rows)
    live = roots.distinct()
    free, basis = _eliminated(rows[:, live], late[live])
    bound = np.flatnonzero(roots.root != 0)
    place = np.searchsorted(live, roots.root[bound])
    signed = sp.diags_array(roots.sign[bound].astype(np.float64)) @ basis[place]
    spread = sp.csr_array((np.ones(bound.size), (bound, np.arange(bound.size))), shape=(roots.root.size, bound.size))
    return GeneralSolution(roots, live[free], sp.csr_array(spread @ signed))


def stacked(blocks: list[tuple[Array, tuple[float, ...]]], count: int) -> sp.csr_array:
    """Equations given as blocks `(unknowns [m, k], coefficients [k])` as one sparse matrix over `count` unknowns."""
    row, column, value, offset = [], [], [], 0
    for unknowns, coefficients in blocks:
        m, k = unknowns.shape
        row.append(np.repeat(np.arange(offset, offset + m), k))
        column.append(unknowns.reshape(-1))
        value.append(np.tile(np.asarray(coefficients, dtype=np.float64), m))
        offset += m
    if not row:
        return sp.csr_array((0, count))
    data = (np.concatenate(value), (np.concatenate(row), np.concatenate(column)))
    return sp.coo_array(data, shape=(offset, count)).tocsr()


def _merged(roots: Roots, rows: sp.csr_array) -> tuple[Roots, sp.csr_array]:
    """Move equations that have come down to one or two terms into the roots, until only longer ones are left."""
    while True:
        rows = _in_roots(rows, roots)
        counts = np.diff(rows.indptr)
        single = rows.indptr[:-1][counts == 1]
        first = rows.indptr[:-1][counts == 2]
        ratio = rows.data[first + 1] / rows.data[first] if first.size else np.zeros(0)
        equal = np.abs(np.abs(ratio) - 1) < TINY
        if not single.size and not equal.any():
            return roots, rows
        relation = np.where(ratio[equal] > 0, -1, 1).astype(np.int64)
        a, b = rows.indices[first[equal]], rows.indices[first[equal] + 1]
        roots = roots.joined(a, b, relation, rows.indices[single])


def _in_roots(rows: sp.csr_array, roots: Roots) -> sp.csr_array:
    """The equations in terms of roots: terms collected, trivial ones dropped, no equation twice."""
    if not rows.nnz:
        return sp.csr_array((0, roots.root.size))
    here = rows.tocoo()
    column = roots.root[here.col]
    keep = column != 0
    data = (here.data * roots.sign[here.col])[keep]
    return _distinct(sp.coo_array((data, (here.row[keep], column[keep])), shape=rows.shape).tocsr())


def _distinct(rows: sp.csr_array) -> sp.csr_array:
    """Rows without zeros, scaled to leading coefficient 1, each once."""
    rows.sum_duplicates()
    rows.data[np.abs(rows.data) < TINY] = 0
    rows.eliminate_zeros()
    rows.sort_indices()
    counts = np.diff(rows.indptr)
    rows = rows[counts > 0]
    counts = counts[counts > 0]
    if not counts.size:
        return rows
    rows.data = rationals(rows.data / np.repeat(rows.data[rows.indptr[:-1]], counts))
    keys = mix(rows.indices.astype(np.int64)) * mix(np.round(rows.data * 2**20).astype(np.int64))
    _, first = np.unique(np.add.reduceat(keys, rows.indptr[:-1]), return_index=True)
    return rows[np.sort(first)]


def _eliminated(rows: sp.csr_array, late: Array) -> tuple[Array, sp.csr_array]:
    """The free unknowns, and every one as a combination of them `[unknowns, free]`; many pivots are taken at a time."""
    n = rows.shape[1]
    steps: list[tuple[Array, sp.csr_array]] = []
    while rows.shape[0]:
        pivots, chosen = _pivots(rows, late)
        picked = rows[chosen]
        inverse = sp.diags_array(1 / np.asarray(picked[np.arange(pivots.size), pivots]).reshape(-1))
        picked = sp.csr_array(inverse @ picked)
        others = np.ones(rows.shape[0], dtype=bool)
        others[chosen] = False
        left = rows[others]
        rows = _distinct(sp.csr_array(left - left[:, pivots] @ picked))
        away = np.ones(n)
        away[pivots] = 0
        steps.append((pivots, sp.csr_array(-picked @ sp.diags_array(away))))
    free = np.setdiff1d(np.arange(n), np.concatenate([pivots for pivots, _ in steps] or [np.zeros(0, dtype=np.int64)]))
    basis = sp.csr_array((np.ones(free.size), (free, np.arange(free.size))), shape=(n, free.size))
    for pivots, expression in reversed(steps):
        placed = sp.csr_array((np.ones(pivots.size), (pivots, np.arange(pivots.size))), shape=(n, pivots.size))
        basis = sp.csr_array(basis + placed @ (expression @ basis))
    return free, basis


def _pivots(rows: sp.csr_array, late: Array) -> tuple[Array, Array]:
    """Unknowns to solve for next and the equations that give them, so that no chosen equation holds another of them."""
    counts = np.bincount(rows.indices, minlength=rows.shape[1]) + late
    owner = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    # Rarest unknown of each row; among equals the latest, so that producers stay free and consumers follow.
    order = np.lexsort((-rows.indices, counts[rows.indices], owner))
    best = rows.indices[order][rows.indptr[:-1]]
    pivots, chosen = np.unique(best, return_index=True)
    picked = rows[chosen]
    is_pivot = np.zeros(rows.shape[1], dtype=bool)
    is_pivot[pivots] = True
    clean = np.add.reduceat(is_pivot[picked.indices].astype(np.int64), picked.indptr[:-1]) == 1
    if not clean.any():
        clean[0] = True
    return pivots[clean], chosen[clean]
