"""From free coordinates to symmetries: which coordinates belong together, whether they mix, what they are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from noetherflow.discovery.coordinates import Coordinates
from noetherflow.discovery.gauges import Array, Bundle
from noetherflow.discovery.independent import repeated
from noetherflow.discovery.infer import Inference
from noetherflow.discovery.naming import family_of, name_of, unique_names
from noetherflow.discovery.solve import GaugeSolution
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Kind, Symmetry


@dataclass(frozen=True, eq=False)
class _Group:
    """Coordinates that become one symmetry: `blocks[b, i]` is coordinate `i` of block `b`."""

    kind: Kind
    blocks: Array

    def without(self, left_out: Array) -> _Group | None:
        """The group without some coordinates of a torus, None if nothing is left."""
        kept = self.blocks[~np.isin(self.blocks[:, 0], left_out)] if self.kind == "diagonal" else self.blocks
        return _Group(self.kind, kept) if kept.size else None


def assemble(inference: Inference, solution: GaugeSolution) -> list[Symmetry]:
    """Group coordinates with the same legs into symmetries; general_linear where no operator tells them apart."""
    store = inference.store
    coordinates = Coordinates.of(store, solution)
    if not coordinates.count:
        return []
    builder = _Builder(coordinates, store.bundles, {b.leaf for b in store.bundles} - set(inference.graph.parameters))
    cell_hash, mixes = coordinates.cell_hash(), coordinates.may_mix(store)
    groups = [group for members in _alike(coordinates) for group in _blocks(members, cell_hash, mixes)]
    left_out = builder.repeated(groups)
    found = []
    for group in (kept for g in groups if (kept := g.without(left_out)) is not None):
        for part, legs in builder.with_legs(group):
            if all(leg.buffer for leg in legs):
                continue
            first = int(part.blocks[0, 0])
            tag = int(np.bitwise_or.reduce(coordinates.tags[part.blocks.reshape(-1)]))
            family = family_of(part.kind, legs, {t for i, t in enumerate(store.TAGS) if tag >> i & 1})
            kind: Kind = "scalar" if part.kind == "diagonal" and len(part.blocks) == 1 else part.kind
            size = float(coordinates.eps[first])
            placed = tuple(replace(leg, offset=inference.offsets.of.get(leg.parameter, 0.0)) for leg in legs)
            found.append(Symmetry(name_of(legs), family, kind, placed, size or None, _note(size)))
    return unique_names(found)


def _note(eps: float) -> str:
    return f"exact up to the normalisation's eps = {eps:g}" if eps else ""


def _alike(coordinates: Coordinates) -> list[Array]:
    """Coordinates with the same legs and the same eps, in order of their first member."""
    members = np.flatnonzero(coordinates.used)
    if not members.size:
        return []
    legs, eps = coordinates.legs_hash(), coordinates.eps
    order = np.lexsort((members, eps[members], legs[members]))
    key = np.stack([legs[members[order]], eps[members[order]].view(np.uint64)])
    cuts = np.flatnonzero((np.diff(key, axis=1) != 0).any(0)) + 1
    return sorted(np.split(members[order], cuts), key=lambda group: int(group[0]))


def _blocks(members: Array, cell_hash: Array, mixes: Array) -> list[_Group]:
    """Members that share all cells form a block; blocks of one size go together, lone coordinates into one torus."""
    keys = cell_hash[members]
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(keys[order]) != 0])
    lengths = np.diff(np.r_[starts, keys.size])
    sizes = np.repeat(lengths, lengths)
    sizes[~mixes[members[order]]] = 1
    out = []
    for size in np.unique(sizes[sizes > 1]):
        blocks = members[order[sizes == size]].reshape(-1, size)
        out.append(_Group("general_linear", blocks[np.argsort(blocks[:, 0])]))
    alone = np.sort(members[order[sizes == 1]])
    if alone.size:
        out.append(_Group("diagonal", alone[:, None]))
    return out


@dataclass(frozen=True, eq=False)
class _Builder:
    """Makes legs of coordinates."""

    coordinates: Coordinates
    bundles: list[Bundle]
    buffers: set[str]

    def repeated(self, groups: Sequence[_Group]) -> Array:
        """Coordinates of tori to leave out: others give the same motion.

        Rather approximate than exact ones, rather one-sided ones than such with a counterweight, rather from small
        groups than from large ones.
        """
        buffers = np.array([b.leaf in self.buffers for b in self.bundles])
        one_sided, eps = self.coordinates.one_sided(buffers), self.coordinates.eps
        empty = [np.zeros(0, dtype=np.int64)]
        tori = [g.blocks[:, 0] for g in groups if g.kind == "diagonal"]
        torus = np.concatenate(tori or empty)
        size = np.concatenate([np.full(t.size, t.size) for t in tori] or empty)
        order = np.lexsort((-torus, size, ~one_sided[torus], eps[torus] == 0))
        mixing = np.concatenate([g.blocks.reshape(-1) for g in groups if g.kind != "diagonal"] or empty)
        return repeated(self.coordinates, self.bundles, torus[order], mixing)

    def with_legs(self, group: _Group) -> Iterator[tuple[_Group, list[Leg]]]:
        """A group with its legs; where two coordinates scale the same row, each coordinate stands alone."""
        legs = self._legs(group.blocks)
        if group.blocks.size > 1 and any(bool((np.bincount(leg.index.reshape(-1)) > 1).any()) for leg in legs):
            for coordinate in group.blocks.reshape(-1, 1, 1):
                yield _Group("diagonal", coordinate), self._legs(coordinate)
        else:
            yield group, legs

    def _legs(self, blocks: Array) -> list[Leg]:
        """One leg per (bundle, power) of the coordinates `blocks[block, coordinate]`, which all have the same.

        `index[block, coordinate, replica]` lists the rows of a leg; replicas are ordered by cell, so that they
        correspond.
        """
        c = self.coordinates
        where = c.starts[blocks]
        first = int(where[0, 0])
        size = int(np.searchsorted(c.owner, c.owner[first], side="right")) - first
        bundle, power = c.bundle[first : first + size], c.power[first : first + size]
        cuts = np.flatnonzero(np.r_[True, (np.diff(bundle) != 0) | (np.diff(power) != 0)])
        return [self._leg(where, int(low), int(high)) for low, high in zip(cuts, [*cuts[1:], size], strict=True)]

    def _leg(self, where: Array, low: int, high: int) -> Leg:
        """The leg of entries `low .. high` after each `where[block, coordinate]`."""
        c = self.coordinates
        first = int(where[0, 0]) + low
        owner, power = self.bundles[c.bundle[first]], float(c.power[first])
        index = c.atom[where[..., None] + np.arange(low, high)] - owner.start
        sign = 1 if power > 0 else -1
        return Leg(owner.leaf, index, sign, owner.axes, owner.view, abs(power), owner.leaf in self.buffers)
