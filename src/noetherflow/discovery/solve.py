"""Solve the collected equations: every atom as a combination of free coordinates.

Two-term equations with equal coefficients are signed connected components (on the double cover of the atoms). What has
more terms is eliminated exactly, equations with the rarest atom first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from noetherflow.discovery.gauges import Array, mix
from noetherflow.discovery.store import Store

TINY = 1e-9


@dataclass(frozen=True, eq=False)
class GaugeSolution:
    """`log p[atom] = sum_j coefficient * free_j`: one row per nonzero entry, sorted by column, then atom."""

    column: Array
    atom: Array
    coefficient: Array
    free: int
    root: Array


def solve(store: Store) -> GaugeSolution:
    """The general solution of all equations in the store."""
    root, sign, rest = _components(store)
    roots, basis = _eliminate(rest, root, store)
    n = store.size
    atoms = np.arange(n)
    live = atoms[root != 0]
    rows = np.searchsorted(roots, root[live])
    combos = sp.csr_array(sp.diags_array(sign[live].astype(np.float64)) @ basis[rows])
    combos = _sparser(combos, _on_parameters(store)[live]).tocoo()
    keep = np.abs(combos.data) > TINY
    column, atom, value = combos.col[keep], live[combos.row[keep]], combos.data[keep]
    order = np.lexsort((atom, column))
    return GaugeSolution(column[order], atom[order], np.round(value[order], 9), basis.shape[1], root)


def _components(store: Store) -> tuple[Array, Array, sp.csr_array]:
    """Roots and signs of all atoms (root 0: trivial), and the equations with three or more terms over the roots."""
    n = store.size
    root, sign = np.arange(n), np.ones(n, dtype=np.int64)
    canon = store.canonical(np.arange(n))
    root, sign = _merge(root, sign, np.arange(n), canon, np.ones(n, dtype=np.int64), np.zeros(0, dtype=np.int64))
    edges: list[tuple[Array, Array, Array]] = []
    zeros: list[Array] = []
    blocks: list[tuple[Array, tuple[float, ...]]] = []
    for equation in store.equations:
        c = equation.coefficients
        if len(c) == 1:
            zeros.append(equation.ids[:, 0])
        elif len(c) == 2 and abs(c[0]) == abs(c[1]):
            a, b = equation.ids[:, 0], equation.ids[:, 1]
            edges.append((a, b, np.full(a.size, -1 if c[0] == c[1] else 1, dtype=np.int64)))
        else:
            blocks.append((equation.ids, c))
    none = [np.zeros(0, dtype=np.int64)]
    a, b, relation = (np.concatenate([e[k] for e in edges] or none) for k in range(3))
    root, sign = _merge(root, sign, a, b, relation, np.concatenate(zeros or none))
    rows = _rows(blocks, n)
    while True:
        rows = _reduced(rows, root, sign)
        counts = np.diff(rows.indptr)
        one, two = counts == 1, counts == 2
        first, second = rows.indptr[:-1][two], rows.indptr[:-1][two] + 1
        ratio = rows.data[second] / rows.data[first] if two.any() else np.zeros(0)
        equal = np.abs(np.abs(ratio) - 1) < TINY
        if not one.any() and not equal.any():
            return root, sign, rows
        a, b = rows.indices[first[equal]], rows.indices[second[equal]]
        relation = np.where(ratio[equal] > 0, -1, 1).astype(np.int64)
        root, sign = _merge(root, sign, a, b, relation, rows.indices[rows.indptr[:-1][one]])


def _merge(root: Array, sign: Array, a: Array, b: Array, relation: Array, zeros: Array) -> tuple[Array, Array]:
    """Join `log p[a] = relation * log p[b]` and `log p[zeros] = 0` into the given roots and signs."""
    n = root.size
    ra, rb = root[a], root[b]
    relation = relation * sign[a] * sign[b]
    # Node x is +x, node n + x is -x; atom 0 is its own negative.
    start = np.concatenate([ra, ra + n, [0], root[zeros], root[zeros] + n])
    end = np.concatenate(
        [np.where(relation > 0, rb, rb + n), np.where(relation > 0, rb + n, rb), [n], 0 * zeros, 0 * zeros]
    )
    graph = sp.coo_array((np.ones(start.size, dtype=np.int8), (start, end)), shape=(2 * n, 2 * n))
    _, label = connected_components(graph, directed=False)
    plus, minus = label[:n], label[n:]
    # Representative of a component pair: its smallest atom, taken positive.
    low = np.full(label.max() + 1, n, dtype=np.int64)
    present = _occurring(root, n)
    np.minimum.at(low, plus[present], present)
    np.minimum.at(low, minus[present], present)
    dead = plus == minus
    dead_label = np.zeros(label.max() + 1, dtype=bool)
    dead_label[plus[dead]] = True
    new_root, new_sign = low[plus], np.where(plus[np.minimum(low[plus], n - 1)] == plus, 1, -1)
    new_root[dead_label[plus]] = 0
    return new_root[root], sign * new_sign[root]


def _occurring(values: Array, n: int) -> Array:
    """The distinct values among `0 .. n - 1`, sorted."""
    seen = np.zeros(n, dtype=bool)
    seen[values] = True
    return np.flatnonzero(seen)


def _rows(blocks: list[tuple[Array, tuple[float, ...]]], n: int) -> sp.csr_array:
    """Multi-term equations as a sparse matrix over atoms."""
    row, column, value, offset = [], [], [], 0
    for ids, c in blocks:
        m, k = ids.shape
        row.append(np.repeat(np.arange(offset, offset + m), k))
        column.append(ids.reshape(-1))
        value.append(np.tile(np.asarray(c, dtype=np.float64), m))
        offset += m
    if not row:
        return sp.csr_array((0, n))
    data = (np.concatenate(value), (np.concatenate(row), np.concatenate(column)))
    return sp.coo_array(data, shape=(offset, n)).tocsr()


def _reduced(rows: sp.csr_array, root: Array, sign: Array) -> sp.csr_array:
    """The equations in terms of roots: terms collected, trivial ones dropped, no equation twice."""
    if not rows.nnz:
        return sp.csr_array((0, root.size))
    here = rows.tocoo()
    column = root[here.col]
    keep = column != 0
    data = (here.data * sign[here.col])[keep]
    out = sp.coo_array((data, (here.row[keep], column[keep])), shape=rows.shape).tocsr()
    return _distinct(out)


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
    rows.data = np.round(rows.data / np.repeat(rows.data[rows.indptr[:-1]], counts), 9)
    keys = mix(rows.indices.astype(np.int64)) * mix((rows.data * 2**20).astype(np.int64))
    _, first = np.unique(np.add.reduceat(keys, rows.indptr[:-1]), return_index=True)
    return rows[np.sort(first)]


def _eliminate(rows: sp.csr_array, root: Array, store: Store) -> tuple[Array, sp.csr_array]:
    """All roots, and each as a combination of free ones: `[roots, free]`."""
    roots = _occurring(root, store.size)
    roots = roots[roots != 0]
    rows = rows[:, roots]
    n = roots.size
    # Constants of constraints stay free: their columns are long, so eliminating them would fill the matrix.
    penalty = np.where(_on_parameters(store)[roots], 0, 10**9)
    steps: list[tuple[Array, sp.csr_array]] = []
    while rows.shape[0]:
        pivots, chosen = _pivots(rows, penalty)
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
    bound = np.zeros(n, dtype=bool)
    for pivots, _ in steps:
        bound[pivots] = True
    free = np.flatnonzero(~bound)
    basis = sp.csr_array((np.ones(free.size), (free, np.arange(free.size))), shape=(n, free.size))
    for pivots, expression in reversed(steps):
        placed = sp.csr_array((np.ones(pivots.size), (pivots, np.arange(pivots.size))), shape=(n, pivots.size))
        basis = sp.csr_array(basis + placed @ (expression @ basis))
    return roots, basis


def _on_parameters(store: Store) -> Array:
    """Which atoms are those of a parameter."""
    found = np.zeros(store.size, dtype=bool)
    for bundle in store.bundles:
        found[bundle.start : bundle.start + bundle.size] = True
    return found


def _sparser(combos: sp.csr_array, counted: Array) -> sp.csr_array:
    """The same space, `[atoms, free]`: a coordinate that holds a whole shorter one in proportion gives it up.

    So a scale that is a symmetry by itself does not hide among the legs of another coordinate. Only atoms of parameters
    are `counted`.
    """
    while True:
        moved = combos[counted]
        length = np.bincount(moved.indices, minlength=combos.shape[1])
        shared = moved[np.diff(moved.indptr) > 1]
        pattern = shared.copy()
        pattern.data = np.ones_like(pattern.data)
        common = sp.coo_array(pattern.T @ pattern)
        small, large = common.row, common.col
        inside = (common.data == length[small]) & (length[small] < length[large])
        small, large = small[inside], large[inside]
        if not small.size:
            return combos
        product, squares = (
            np.asarray(sp.csr_array(m)[small, large]).reshape(-1)
            for m in (shared.T @ shared, pattern.T @ (shared * shared))
        )
        norm = np.asarray((shared * shared).sum(0)).reshape(-1)[small]
        parallel = np.flatnonzero(np.abs(product**2 - norm * squares) < TINY * norm * squares)
        parallel = parallel[np.argsort(length[small[parallel]], kind="stable")]
        chosen = {int(large[k]): (int(small[k]), product[k] / norm[k]) for k in parallel}
        if not chosen:
            return combos
        i, ratio = zip(*chosen.values(), strict=True)
        change = sp.coo_array((ratio, (i, list(chosen))), shape=(combos.shape[1],) * 2)
        combos = sp.csr_array(combos - combos @ change)
        combos.data[np.abs(combos.data) < TINY] = 0
        combos.eliminate_zeros()


def _pivots(rows: sp.csr_array, penalty: Array) -> tuple[Array, Array]:
    """Pivot columns and their rows, so that no chosen row holds another chosen pivot."""
    counts = np.bincount(rows.indices, minlength=rows.shape[1]) + penalty
    lengths = np.diff(rows.indptr)
    owner = np.repeat(np.arange(rows.shape[0]), lengths)
    # Rarest atom of each row; among equals the latest, so that producers stay free and consumers follow.
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
