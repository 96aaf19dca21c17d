"""Free coordinates of the solution as what they move: entries on parameters and buffers, and facts about each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from noetherflow.discovery.gauges import Array, mix, rationals
from noetherflow.discovery.linear_system import TINY
from noetherflow.discovery.solve import GaugeSolution
from noetherflow.discovery.store import PASSED_ON, Store


@dataclass(frozen=True, eq=False)
class Coordinates:
    """What each free coordinate moves, entry by entry, coordinate by coordinate.

    Entry `e` says that coordinate `owner[e]` scales the rows of `atom[e]` (in `bundle[e]`) by its number to the
    `power[e]`. `starts[k]` is the first entry of coordinate `k`; the entries of a coordinate are in the order of its
    legs. `cell[e]` says with which atoms `atom[e]` may mix.

    Per coordinate: `tags` (bits of `Store.TAGS`) of everything it moves, `used` (an operator noticed it), `eps` (the
    largest constant added to something it scales, 0 if none).
    """

    owner: Array
    atom: Array
    power: Array
    bundle: Array
    cell: Array
    starts: Array
    tags: Array
    used: Array
    eps: Array

    @classmethod
    def of(cls, store: Store, solution: GaugeSolution) -> Coordinates:
        """The coordinates of a solution that move a parameter or a buffer."""
        inside, bundle = _on_bundles(store, solution)
        atom, column = solution.atom[inside], solution.column[inside]
        exponent = np.array([b.exponent for b in store.bundles])[bundle]
        power = _in_units_of_first_leg(solution.coefficient[inside] * exponent, column)
        cell = _cells(store)[atom]
        order = np.lexsort((atom, cell, -power, bundle, column))
        atom, power, bundle, cell, column = atom[order], power[order], bundle[order], cell[order], column[order]
        starts = _firsts(column)
        columns = column[starts]
        owner = np.repeat(np.arange(starts.size), np.diff(np.r_[starts, column.size]))
        tags, used = _facts(store, solution, inside)
        eps = _eps(store, solution)
        return cls(owner, atom, power, bundle, cell, starts, tags[columns], used[columns], eps[columns])

    @property
    def count(self) -> int:
        return self.starts.size

    def legs_hash(self) -> Array:
        """Per coordinate a number that is the same for coordinates with the same legs (bundles and powers)."""
        return np.asarray(np.add.reduceat(mix(mix(self.bundle) ^ mix(self._powers())), self.starts))

    def cell_hash(self) -> Array:
        """Per coordinate a number that is the same for coordinates that may mix on every leg."""
        return np.asarray(np.add.reduceat(mix(self.cell ^ mix(self._powers())), self.starts))

    def may_mix(self, store: Store) -> Array:
        """Per coordinate whether all its powers are 1 or -1 on parameters, and it meets no cell twice."""
        order = np.lexsort((self.cell, self.owner))
        cell, owner = self.cell[order], self.owner[order]
        twice = np.r_[False, (cell[1:] == cell[:-1]) & (owner[1:] == owner[:-1])][np.argsort(order)]
        plain = np.array([b.exponent == 1 for b in store.bundles])[self.bundle]
        bad = twice | (np.abs(self.power) != 1) | ~plain
        return np.asarray(np.add.reduceat(bad.astype(np.int64), self.starts) == 0)

    def one_sided(self, buffers: Array) -> Array:
        """Per coordinate whether it scales all its parameters the same way; bundles of `buffers` do not count."""
        weight = ~buffers[self.bundle]
        up = np.logical_or.reduceat(weight & (self.power > 0), self.starts)
        down = np.logical_or.reduceat(weight & (self.power < 0), self.starts)
        return np.asarray(~(up & down))

    def _powers(self) -> Array:
        return np.round(self.power * 2**20).astype(np.int64)


def _firsts(column: Array) -> Array:
    """Where each run of equal entries begins."""
    return np.flatnonzero(np.r_[True, np.diff(column) != 0]) if column.size else np.zeros(0, dtype=np.int64)


def _on_bundles(store: Store, solution: GaugeSolution) -> tuple[Array, Array]:
    """Which entries of a solution are atoms of a parameter or buffer, and the bundles of those."""
    starts = np.array([b.start for b in store.bundles], dtype=np.int64)
    if not starts.size:
        return np.zeros(solution.atom.size, dtype=bool), np.zeros(0, dtype=np.int64)
    ends = starts + np.array([b.size for b in store.bundles])
    bundle = np.searchsorted(starts, solution.atom, side="right") - 1
    inside = (bundle >= 0) & (solution.atom < ends[bundle])
    return inside, bundle[inside]


def _in_units_of_first_leg(power: Array, column: Array) -> Array:
    """Powers divided by that of the coordinate's first entry: producers are +, and count once."""
    first = _firsts(column)
    return rationals(power / np.repeat(power[first], np.diff(np.r_[first, column.size])))


def _cells(store: Store) -> Array:
    """The cell of every atom, told apart also by what was asked of the atoms it always equals.

    What was asked of those that one demand pairs with it counts extra: where the two halves of an output are added, the
    halves of the weight's rows were told apart by the cut, and so the halves of its bias are too.
    """
    cell = store.cells.first(store.size)
    same = [e.ids for e in store.equations if len(e.coefficients) == 2 and e.coefficients[0] == -e.coefficients[1]]
    if not same:
        return cell
    pairs = np.concatenate(same)
    ones = np.ones(len(pairs), dtype=np.int8)
    graph = sp.coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(store.size, store.size))
    count, label = connected_components(graph, directed=False)
    together, partners = np.zeros(count, dtype=np.uint64), np.zeros(store.size, dtype=np.uint64)
    np.add.at(together, label, mix(cell))
    for own, other in (pairs.T, pairs.T[::-1]):
        np.add.at(partners, own, mix(cell[other]))
    return mix(mix(cell ^ together[label]) ^ partners)


def _noticed(store: Store, solution: GaugeSolution) -> Array:
    """Per root whether some operator read it. What reads a sum reads its terms, also one that it does not let move."""
    atoms = store.touched[: store.size].copy()
    roots = np.zeros(store.size, dtype=bool)
    np.logical_or.at(roots, solution.root, atoms)
    for equation in reversed(store.equations):
        if equation.why in PASSED_ON:
            ids, root = equation.ids, solution.root[equation.ids]
            read = ((atoms[ids] & (ids != 0)) | (roots[root] & (root != 0))).any(1)
            atoms[ids[read].reshape(-1)] = True
            roots[root[read].reshape(-1)] = True
    return roots


def _facts(store: Store, solution: GaugeSolution, inside: Array) -> tuple[Array, Array]:
    """Per column of the solution the tags of everything it moves, and whether any operator noticed it.

    What only reads a tensor of zeros (a weight column that meets padding) changes nothing at all and does not count.
    """
    by_root_tags = np.zeros(store.size, dtype=np.uint8)
    touched = _noticed(store, solution)
    np.bitwise_or.at(by_root_tags, solution.root, store.tags[: store.size])
    root = solution.root[solution.atom]
    tags = np.zeros(solution.free, dtype=np.uint8)
    noticed = np.zeros(solution.free, dtype=bool)
    np.bitwise_or.at(tags, solution.column, by_root_tags[root])
    np.logical_or.at(noticed, solution.column, touched[root])
    return tags, noticed & ~_reads_zeros_alone(store, solution, inside)


def _reads_zeros_alone(store: Store, solution: GaugeSolution, inside: Array) -> Array:
    """Per column whether it scales entries of a tensor of zeros, and parameters only as their readers do, inversely."""
    sign = np.sign(solution.coefficient).astype(np.int64)
    zeros = store.wild[solution.atom]
    scaled, made = (np.zeros((2, solution.free), dtype=bool) for _ in range(2))
    scaled[(sign[zeros] + 1) // 2, solution.column[zeros]] = True
    made[(sign[inside] + 1) // 2, solution.column[inside]] = True
    return np.asarray(scaled.any(0) & ~(scaled & made).any(0))


def _eps(store: Store, solution: GaugeSolution) -> Array:
    """Per column of the solution the largest constant that was added to something it scales, 0 if none."""
    out = np.zeros(solution.free)
    if not store.approximations:
        return out
    shape = (store.size, solution.free)
    combos = sp.coo_array((solution.coefficient, (solution.atom, solution.column)), shape=shape).tocsr()
    for equation, eps in store.approximations:
        m, k = equation.ids.shape
        data = (np.tile(equation.coefficients, m), (np.repeat(np.arange(m), k), equation.ids.reshape(-1)))
        scaled = sp.csr_array(sp.coo_array(data, shape=(m, store.size)).tocsr() @ combos)
        hit = np.unique(scaled.indices[np.abs(scaled.data) > TINY])
        out[hit] = np.maximum(out[hit], eps)
    return out
