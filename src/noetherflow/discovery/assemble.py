"""From free coordinates to symmetries: which coordinates belong together, whether they mix, what they are called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from noetherflow.discovery.gauges import Array, Bundle, mix
from noetherflow.discovery.infer import Inference
from noetherflow.discovery.solve import GaugeSolution
from noetherflow.discovery.store import Store
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Kind, Symmetry


@dataclass(frozen=True, eq=False)
class _Entries:
    """Nonzero entries of the solution on parameters: one row per (coordinate, atom), legs of a coordinate in order."""

    column: Array
    atom: Array
    power: Array
    bundle: Array
    cell: Array


def assemble(inference: Inference, solution: GaugeSolution) -> list[Symmetry]:
    """Group coordinates with the same legs into symmetries; general_linear where no operator tells them apart."""
    store = inference.store
    buffers = {b.leaf for b in store.bundles if b.leaf not in inference.graph.parameters}
    entries = _entries(store, solution)
    if not entries.column.size:
        return []
    starts = np.flatnonzero(np.r_[True, np.diff(entries.column) != 0])
    columns = entries.column[starts]
    powers = (entries.power * 2**20).astype(np.int64)
    legs_hash = np.add.reduceat(mix(mix(entries.bundle) ^ mix(powers)), starts)
    cell_hash = np.add.reduceat(mix(entries.cell ^ mix(powers)), starts)
    mixes = _may_mix(entries, starts, store)
    tags, used = _facts(store, solution, columns)
    eps = _eps(store, solution, columns)
    found = []
    for members in _alike(np.flatnonzero(used & ~_idle(entries, starts, store)), legs_hash, eps):
        size = float(eps[members[0]])
        for kind, blocks, legs in _with_legs(
            entries, starts, _blocks(members, cell_hash, mixes), store.bundles, buffers
        ):
            if all(leg.buffer for leg in legs):
                continue
            tag = int(np.bitwise_or.reduce(tags[blocks.reshape(-1)]))
            family = _family(kind, legs, {t for i, t in enumerate(store.TAGS) if tag >> i & 1})
            group: Kind = "scalar" if kind == "diagonal" and len(blocks) == 1 else kind
            found.append(Symmetry(_name(legs), family, group, tuple(legs), size or None, _note(size)))
    return _unique_names(found)


def _alike(members: Array, legs: Array, eps: Array) -> list[Array]:
    """Coordinates with the same legs and the same eps, in order of their first member."""
    if not members.size:
        return []
    order = np.lexsort((members, eps[members], legs[members]))
    key = np.stack([legs[members[order]], eps[members[order]].view(np.uint64)])
    cuts = np.flatnonzero((np.diff(key, axis=1) != 0).any(0)) + 1
    return sorted(np.split(members[order], cuts), key=lambda group: int(group[0]))


def _note(eps: float) -> str:
    return f"exact up to the normalisation's eps = {eps:g}" if eps else ""


def _entries(store: Store, solution: GaugeSolution) -> _Entries:
    starts = np.array([b.start for b in store.bundles], dtype=np.int64)
    sizes = np.array([b.size for b in store.bundles], dtype=np.int64)
    bundle = np.searchsorted(starts, solution.atom, side="right") - 1
    inside = (bundle >= 0) & (solution.atom < starts[bundle] + sizes[bundle]) if starts.size else bundle >= 0
    bundle, atom = bundle[inside], solution.atom[inside]
    column, coefficient = solution.column[inside], solution.coefficient[inside]
    exponent = np.array([b.exponent for b in store.bundles])[bundle] if starts.size else coefficient
    power = coefficient * exponent
    first = np.flatnonzero(np.r_[True, np.diff(column) != 0]) if column.size else np.zeros(0, dtype=np.int64)
    # Producers are +: a coordinate counts along its first leg, and a torus coordinate in units of it.
    lead = np.repeat(power[first], np.diff(np.r_[first, column.size])) if column.size else power
    power, cell = np.round(power / lead, 9), _cells(store)[atom]
    order = np.lexsort((atom, cell, -power, bundle, column))
    return _Entries(column[order], atom[order], power[order], bundle[order], cell[order])


def _cells(store: Store) -> Array:
    """The cell of every atom, told apart also by what was asked of the atoms it always equals."""
    cell = store.cells.first(store.size)
    same = [e.ids for e in store.equations if len(e.coefficients) == 2 and e.coefficients[0] == -e.coefficients[1]]
    if not same:
        return cell
    pairs = np.concatenate(same)
    ones = np.ones(len(pairs), dtype=np.int8)
    graph = sp.coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(store.size, store.size))
    count, label = connected_components(graph, directed=False)
    together = np.zeros(count, dtype=np.uint64)
    np.add.at(together, label, mix(cell))
    return mix(cell ^ together[label])


def _may_mix(entries: _Entries, starts: Array, store: Store) -> Array:
    """Per coordinate: unit powers on parameters, and no cell met twice."""
    order = np.lexsort((entries.cell, entries.column))
    cell, column = entries.cell[order], entries.column[order]
    twice = np.r_[False, (cell[1:] == cell[:-1]) & (column[1:] == column[:-1])]
    bad = (twice[np.argsort(order)]) | (np.abs(entries.power) != 1)
    plain = np.array([b.exponent == 1 for b in store.bundles])[entries.bundle]
    return np.add.reduceat((bad | ~plain).astype(np.int64), starts) == 0


def _facts(store: Store, solution: GaugeSolution, columns: Array) -> tuple[Array, Array]:
    """Per coordinate the tags of everything it moves, and whether any operator noticed it."""
    by_root_tags = np.zeros(store.size, dtype=np.uint8)
    touched = np.zeros(store.size, dtype=bool)
    wild = np.zeros(store.size, dtype=bool)
    np.bitwise_or.at(by_root_tags, solution.root, store.tags[: store.size])
    np.logical_or.at(touched, solution.root, store.touched[: store.size])
    np.logical_or.at(wild, solution.root, store.wild[: store.size])
    root = solution.root[solution.atom]
    tags = np.zeros(solution.free, dtype=np.uint8)
    used = np.zeros(solution.free, dtype=bool)
    np.bitwise_or.at(tags, solution.column, by_root_tags[root])
    np.logical_or.at(used, solution.column, touched[root] & ~wild[root])
    return tags[columns], used[columns]


def _idle(entries: _Entries, starts: Array, store: Store) -> Array:
    """Per coordinate whether it moves nothing: constants on axes of a parameter whose product is 1."""
    bundles = store.bundles
    slices, size = np.array([b.slices for b in bundles]), np.array([b.size for b in bundles])
    first = np.array([b.start for b in bundles])
    leaf = np.unique([b.leaf for b in bundles], return_inverse=True)[1]
    width = (size // slices)[entries.bundle]
    part = (entries.atom - first[entries.bundle]) // width
    order = np.lexsort((entries.bundle, part, leaf[entries.bundle], entries.column))
    keys = np.stack([entries.column, leaf[entries.bundle], part, entries.bundle])[:, order]
    power, width = entries.power[order], width[order]
    axis = np.flatnonzero(np.r_[True, (np.diff(keys) != 0).any(0)])
    count = np.diff(np.r_[axis, power.size])
    low, high = np.minimum.reduceat(power, axis), np.maximum.reduceat(power, axis)
    constant = (count == width[axis]) & (low == high)
    tensor = np.flatnonzero(np.r_[True, (np.diff(keys[:3, axis]) != 0).any(0)])
    cancels = np.abs(np.add.reduceat(low, tensor)) < 1e-9
    still = np.minimum.reduceat(constant, tensor) & cancels
    column = keys[0, axis][tensor]
    return np.asarray(np.minimum.reduceat(still, np.flatnonzero(np.r_[True, np.diff(column) != 0])))


def _eps(store: Store, solution: GaugeSolution, columns: Array) -> Array:
    """Per coordinate the largest constant that was added to something it scales, 0 if none."""
    out = np.zeros(solution.free)
    if not store.approximations:
        return out[columns]
    shape = (store.size, solution.free)
    combos = sp.coo_array((solution.coefficient, (solution.atom, solution.column)), shape=shape).tocsr()
    for equation, eps in store.approximations:
        m, k = equation.ids.shape
        rows = sp.coo_array(
            (np.tile(equation.coefficients, m), (np.repeat(np.arange(m), k), equation.ids.reshape(-1))),
            shape=(m, store.size),
        ).tocsr()
        scaled = sp.csr_array(rows @ combos)
        hit = np.unique(scaled.indices[np.abs(scaled.data) > 1e-9])
        out[hit] = np.maximum(out[hit], eps)
    return out[columns]


def _blocks(members: Array, cell_hash: Array, mixes: Array) -> list[tuple[Kind, Array]]:
    """Members that share all cells form a block; blocks of one size go together, lone coordinates into one torus.

    Pairs of a group kind and its coordinates, `[blocks, dim]`.
    """
    keys = cell_hash[members]
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(keys[order]) != 0])
    sizes = np.repeat(np.diff(np.r_[starts, keys.size]), np.diff(np.r_[starts, keys.size]))
    sizes[~mixes[members[order]]] = 1
    out: list[tuple[Kind, Array]] = []
    for size in np.unique(sizes[sizes > 1]):
        blocks = members[order[sizes == size]].reshape(-1, size)
        out.append(("general_linear", blocks[np.argsort(blocks[:, 0])]))
    alone = np.sort(members[order[sizes == 1]])
    if alone.size:
        out.append(("diagonal", alone[:, None]))
    return out


def _legs(entries: _Entries, where: Array, bundles: Sequence[Bundle], buffers: set[str]) -> list[Leg]:
    """One leg per (bundle, power) of the coordinates whose entries begin at `where[block, coordinate]`.

    `index[block, coordinate, replica]` lists its rows; replicas are ordered by cell, so that they correspond.
    """
    first = int(where[0, 0])
    size = int(np.searchsorted(entries.column, entries.column[first], side="right")) - first
    bundle, power = entries.bundle[first : first + size], entries.power[first : first + size]
    cuts = np.flatnonzero(np.r_[True, (np.diff(bundle) != 0) | (np.diff(power) != 0)])
    legs = []
    for low, high in zip(cuts, [*cuts[1:], size], strict=True):
        owner = bundles[bundle[low]]
        index = entries.atom[where[..., None] + np.arange(low, high)] - owner.start
        sign = 1 if power[low] > 0 else -1
        legs.append(Leg(owner.leaf, index, sign, owner.axes, owner.view, abs(float(power[low])), owner.leaf in buffers))
    return legs


def _with_legs(
    entries: _Entries,
    starts: Array,
    found: Sequence[tuple[Kind, Array]],
    bundles: Sequence[Bundle],
    buffers: set[str],
) -> Iterator[tuple[Kind, Array, list[Leg]]]:
    """Groups with their legs; where two coordinates scale the same row, each coordinate stands alone."""
    for kind, blocks in found:
        legs = _legs(entries, starts[blocks], bundles, buffers)
        if blocks.size > 1 and any(bool((np.bincount(leg.index.reshape(-1)) > 1).any()) for leg in legs):
            for coordinate in blocks.reshape(-1, 1, 1):
                yield "diagonal", coordinate, _legs(entries, starts[coordinate], bundles, buffers)
        else:
            yield kind, blocks, legs


def _family(kind: Kind, legs: Sequence[Leg], tags: set[str]) -> str:
    weight_legs = [leg for leg in legs if not leg.buffer]
    if len({leg.sign for leg in weight_legs}) == 1:
        return "one-sided"
    if "score" in tags and "gain" not in tags:
        paired = kind == "diagonal" and legs[0].blocks > 1 and any(leg.replicas > 1 for leg in weight_legs)
        return "rotary-qk" if paired else "attention-qk"
    if "value" in tags:
        return "attention-vo"
    for tag, family in (("gain", "norm-gain"), ("relu", "rescaling"), ("gate", "gated")):
        if tag in tags:
            return family
    if kind == "general_linear":
        return "linear-linear"
    return "stream" if sum(leg.sign > 0 for leg in weight_legs) > 2 else "rescaling"


def _name(legs: Sequence[Leg]) -> str:
    """`producer -> consumer` by module, with the number of further legs."""
    sides = []
    for sign in (1, -1):
        names = list(dict.fromkeys(_module(leg.parameter) for leg in legs if leg.sign == sign and not leg.buffer))
        if names:
            sides.append(names[0] + (f" (+{len(names) - 1})" if len(names) > 1 else ""))
    return " -> ".join(sides)


def _module(parameter: str) -> str:
    owner, _, name = parameter.rpartition(".")
    return owner if owner and name in ("weight", "bias") else parameter


def _unique_names(symmetries: list[Symmetry]) -> list[Symmetry]:
    from dataclasses import replace

    seen: dict[str, int] = defaultdict(int)
    out = []
    for s in symmetries:
        label = f"{s.name} [scale]" if s.family == "one-sided" else s.name
        seen[label] += 1
        out.append(replace(s, name=label if seen[label] == 1 else f"{label} #{seen[label]}"))
    return out
