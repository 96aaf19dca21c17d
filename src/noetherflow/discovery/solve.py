"""Solve the collected equations: the exponent of every atom as a combination of free coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from noetherflow.discovery.gauges import Array, rationals
from noetherflow.discovery.linear_system import TINY, Roots, solve_system, stacked
from noetherflow.discovery.store import Store


@dataclass(frozen=True, eq=False)
class GaugeSolution:
    """`log p[atom] = sum_j coefficient * free_j`: one row per nonzero entry, sorted by column, then atom.

    `root[atom]` is the atom that it equals up to sign, 0 if it is trivial.
    """

    column: Array
    atom: Array
    coefficient: Array
    free: int
    root: Array


def solve(store: Store) -> GaugeSolution:
    """The general solution of all equations in the store."""
    on_parameters = _on_parameters(store)
    # Constants of constraints stay free: their columns are long, so eliminating them would fill the matrix.
    late = np.where(on_parameters, 0, 10**9)
    roots, longer = _two_term_equations(store)
    general = solve_system(roots, longer, late)
    found = _sparser(general.combinations, on_parameters).tocoo()
    keep = np.abs(found.data) > TINY
    column, atom, value = found.col[keep], found.row[keep], rationals(found.data[keep])
    order = np.lexsort((atom, column))
    return GaugeSolution(column[order], atom[order], value[order], found.shape[1], general.roots.root)


def _two_term_equations(store: Store) -> tuple[Roots, sp.csr_array]:
    """What equations with one or two terms say at once, and the others as rows."""
    n = store.size
    atoms = np.arange(n)
    pairs = [(atoms, store.canonical(atoms), np.ones(n, dtype=np.int64))]
    zeros = [np.zeros(0, dtype=np.int64)]
    longer: list[tuple[Array, tuple[float, ...]]] = []
    for equation in store.equations:
        c, ids = equation.coefficients, equation.ids
        if len(c) == 1:
            zeros.append(ids[:, 0])
        elif len(c) == 2 and abs(c[0]) == abs(c[1]):
            pairs.append((ids[:, 0], ids[:, 1], np.full(len(ids), -1 if c[0] == c[1] else 1, dtype=np.int64)))
        else:
            longer.append((ids, c))
    a, b, relation = (np.concatenate([pair[k] for pair in pairs]) for k in range(3))
    return Roots.apart(n).joined(a, b, relation, np.concatenate(zeros)), stacked(longer, n)


def _on_parameters(store: Store) -> Array:
    """Which atoms are those of a parameter."""
    found = np.zeros(store.size, dtype=bool)
    for bundle in store.bundles:
        found[bundle.start : bundle.start + bundle.size] = True
    return found


def _sparser(combinations: sp.csr_array, counted: Array) -> sp.csr_array:
    """The same space, `[atoms, free]`: a coordinate that holds a whole shorter one in proportion gives it up.

    So a scale that is a symmetry by itself does not hide among the legs of another coordinate: `(a, b, c)` and `(c)`
    become `(a, b)` and `(c)`. Only atoms of parameters are `counted`.
    """
    while True:
        small, large, ratio = _held_in_proportion(combinations[counted])
        if not small.size:
            return combinations
        change = sp.coo_array((ratio, (small, large)), shape=(combinations.shape[1],) * 2)
        combinations = sp.csr_array(combinations - combinations @ change)
        combinations.data[np.abs(combinations.data) < TINY] = 0
        combinations.eliminate_zeros()


def _held_in_proportion(moved: sp.csr_array) -> tuple[Array, Array, Array]:
    """Pairs of a short and a longer coordinate whose entries on the short one's atoms are `ratio` times its own.

    At most one short coordinate per longer one, the longest of them.
    """
    length = np.bincount(moved.indices, minlength=moved.shape[1])
    shared = moved[np.diff(moved.indptr) > 1]
    pattern = shared.copy()
    pattern.data = np.ones_like(pattern.data)
    common = sp.coo_array(pattern.T @ pattern)
    small, large = common.row, common.col
    inside = (common.data == length[small]) & (length[small] < length[large])
    small, large = small[inside], large[inside]
    if not small.size:
        return small, large, np.zeros(0)
    product = np.asarray(sp.csr_array(shared.T @ shared)[small, large]).reshape(-1)
    squares = np.asarray(sp.csr_array(pattern.T @ (shared * shared))[small, large]).reshape(-1)
    norm = np.asarray((shared * shared).sum(0)).reshape(-1)[small]
    parallel = np.flatnonzero(np.abs(product**2 - norm * squares) < TINY * norm * squares)
    parallel = parallel[np.argsort(-length[small[parallel]], kind="stable")]
    _, first = np.unique(large[parallel], return_index=True)
    chosen = parallel[first]
    return small[chosen], large[chosen], product[chosen] / norm[chosen]
