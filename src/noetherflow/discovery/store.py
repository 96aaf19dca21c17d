"""The store of everything operators demand of gauges (docs/architecture.md, 'Gauge inference').

An equation `sum_k c_k log p[a_k] = 0` is a row of atoms with coefficients. Permission to mix (GL) is kept as one *cell*
per atom: two atoms of a parameter axis may mix as long as no operator has told their cells apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from noetherflow.discovery.gauges import Array, AxisAtoms, Bundle, Equation, Field, Gauge, broadcast, mix, narrow, ranks


class Store:
    """Atoms, their cells and tags, and the equations collected in one pass over the graph."""

    TAGS = ("relu", "gate", "gain", "score", "value")

    def __init__(self) -> None:
        self.size = 1
        self.canon = np.zeros(1024, dtype=np.int64)
        self.cell = np.zeros(1024, dtype=np.uint64)
        self.tags = np.zeros(1024, dtype=np.uint8)
        self.touched = np.zeros(1024, dtype=bool)
        self.wild = np.zeros(1024, dtype=bool)
        self.bundles: list[Bundle] = []
        self.of_leaf: dict[str, list[Bundle]] = {}
        self.equations: list[Equation] = []
        self.approximations: list[tuple[Equation, float]] = []
        self.events: list[tuple[int, str, Array]] = []
        self.node = 0

    # --- atoms ---

    def fresh(self, count: int) -> int:
        """The first of `count` new atoms."""
        start, self.size = self.size, self.size + count
        if self.size > len(self.canon):
            room = max(self.size, 2 * len(self.canon))
            for name in ("canon", "cell", "tags", "touched", "wild"):
                old = getattr(self, name)
                new = np.zeros(room, dtype=old.dtype)
                new[:start] = old[:start]
                setattr(self, name, new)
        self.canon[start : self.size] = np.arange(start, self.size)
        self.cell[start : self.size] = mix(np.full(count, 2**40 + start))
        return start

    def leaf(
        self,
        name: str,
        shape: tuple[int, ...],
        plan: Sequence[AxisAtoms],
        exponent: float = 1.0,
    ) -> Gauge:
        """The gauge of a parameter: one bundle of fresh atoms per axis of `plan`."""
        fields: list[Field] = []
        for axis in plan:
            view, axes, slices = axis.view, axis.axes, axis.slices
            full = shape if view is None else view
            count = int(np.prod(axis.sizes(shape)))
            if count == 1 and (fields or any(np.prod(other.sizes(shape)) > 1 for other in plan)):
                continue  # a scalar on an axis of length 1 is a scalar on any other axis
            start = self.fresh(count)
            bundle = Bundle(name, view, axes, start, count, exponent, slices, np.zeros(slices, dtype=bool))
            self.bundles.append(bundle)
            self.of_leaf.setdefault(name, []).append(bundle)
            ids = torch.arange(start, start + count).reshape([n if a in axes else 1 for a, n in enumerate(full)])
            if view is not None:
                same = 0  # trailing axes of length 1 that view and shape share
                while same < len(shape) - 1 and ids.shape[-1 - same] == 1 and view[-1 - same] == shape[-1 - same]:
                    same += 1
                ones = [1] * same
                ids = ids.expand(*view[: len(view) - same], *ones).reshape(*shape[: len(shape) - same], *ones)
            fields.append(Field(narrow(ids), exponent))
        return Gauge(shape, tuple(fields), leaf=name)

    def wildcard(self, shape: tuple[int, ...]) -> Field:
        """Free atoms for the entries of a tensor of zeros."""
        count = int(np.prod(shape))
        start = self.fresh(count)
        self.wild[start : start + count] = True
        return Field(torch.arange(start, start + count).reshape(shape), 1.0)

    def canonical(self, ids: Array) -> Array:
        """Atoms with all equalities applied that are already known for certain."""
        out = self.canon[ids]
        while True:
            further = self.canon[out]
            if np.array_equal(further, out):
                return out
            out = further

    def simplify(self, fields: Iterable[Field]) -> tuple[Field, ...]:
        """The same gauge with known equalities applied, equal fields merged and trivial ones dropped."""
        out: list[Field] = []
        for f in fields:
            ids = torch.from_numpy(self.canonical(f.ids.numpy().reshape(-1))).reshape(f.ids.shape)
            ids = narrow(ids)
            if not bool(ids.any()):
                continue
            same = next((k for k, g in enumerate(out) if torch.equal(g.ids, ids)), None)
            if same is None:
                out.append(Field(ids, f.exponent))
            elif out[same].exponent + f.exponent == 0:
                self.touched[ids.reshape(-1).numpy()] = True
                del out[same]
            else:
                out[same] = Field(ids, out[same].exponent + f.exponent)
        return tuple(out)

    def tag(self, fields: Iterable[Field], name: str) -> None:
        for f in fields:
            self.tags[f.ids.reshape(-1).numpy()] |= 1 << self.TAGS.index(name)

    # --- permission to mix ---

    def refine(self, f: Field, labels: Tensor) -> None:
        """Atoms seen with different multisets of labels may no longer mix."""
        ids, marks = broadcast(f.ids, labels)
        hashes = mix(marks)
        if ids.size > 1 and not bool((np.diff(ids) > 0).all()):
            order = np.argsort(ids, kind="stable")
            ordered = ids[order]
            start = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
            ids, hashes = ordered[start], np.add.reduceat(hashes[order], start)
        self.cell[ids] = mix(self.cell[ids] ^ mix(hashes))
        self.cell[0] = 0

    def singletons(self, fields: Iterable[Field]) -> None:
        """No two atoms of these fields may mix."""
        for f in fields:
            ids = f.ids.reshape(-1).numpy()
            self.events.append((self.node, "acts entry by entry (no mixing)", ids))
            ids = np.unique(ids)
            self.cell[ids] = mix(self.cell[ids] ^ mix(ids + 2**50))

    def separate(self, f: Field, axes: Sequence[int]) -> None:
        """Atoms may mix only within one position along `axes`."""
        spanned = f.spans(axes)
        if spanned:
            sizes = [f.ids.shape[a] if a in spanned else 1 for a in range(f.ids.ndim)]
            self.refine(f, torch.arange(int(np.prod(sizes))).reshape(sizes))

    def varies(self, fields: Iterable[Field], shape: Sequence[int]) -> None:
        """The fields' tensor is multiplied by an ungauged tensor of this shape: separate along its long axes."""
        for f in fields:
            axes = [a for a in range(-1, -1 - min(f.ids.ndim, len(shape)), -1) if shape[a] > 1]
            self.separate(f, [a % f.ids.ndim for a in axes])

    def _match(self, fields: Sequence[Field]) -> None:
        """Before two fields are paired position by position: keep mixing only where it commutes with the pairing."""
        if len(fields) != 2 or any(abs(f.exponent) != 1 for f in fields):
            self.singletons(fields)
            return
        a, b = torch.broadcast_tensors(fields[0].ids, fields[1].ids)
        ra, rb = ranks(a.reshape(-1).numpy()), ranks(b.reshape(-1).numpy())
        if ra is None and rb is not None:
            self.refine(Field(a, 1.0), torch.from_numpy(rb).reshape(a.shape))
        elif rb is None and ra is not None:
            self.refine(Field(b, 1.0), torch.from_numpy(ra).reshape(b.shape))
        elif ra is not None and rb is not None and not np.array_equal(ra, rb):
            self.singletons(fields)

    # --- equations ---

    def demand(self, fields: Sequence[Field], why: str) -> None:
        """`sum of fields = 0` at every position; all fields have one number of axes."""
        columns = broadcast(*[f.ids for f in fields])
        coefficients = tuple(f.exponent for f in fields)
        rows = np.stack(columns, axis=1)
        self.touched[rows.reshape(-1)] = True
        self.equations.append(Equation(rows, coefficients, self.node, why))
        if len(fields) == 1:
            self.canon[self.canonical(columns[0])] = 0
        elif len(fields) == 2 and coefficients[0] == -coefficients[1]:
            a, b = self.canonical(columns[0]), self.canonical(columns[1])
            low, high = np.minimum(a, b), np.maximum(a, b)
            if bool((low == low[0]).all()):
                self.canon[high] = low

    def vanish(self, fields: Iterable[Field], why: str) -> None:
        """The whole product of the fields is trivial at every position."""
        fields = self.simplify(fields)
        scalars = [f for f in fields if f.ids.numel() == 1]
        groups = _by_axes([f for f in fields if f.ids.numel() > 1])
        if not groups:
            if scalars:
                self.demand(scalars, why)
            return
        # What depends on different axes is constant along each; one group can absorb all the constants.
        groups.sort(key=lambda g: not any(self.fixable(f, ()) for f in g))
        for group in groups[:-1]:
            scalars += self._constants(group, (), why)
        last = [*groups[-1], *scalars]
        for f in groups[-1]:
            # Two axes of one parameter in one product: their common constant is the parameter's redundancy.
            if any(g is not f and self._leaf_of(g) == self._leaf_of(f) != "" for g in last) and self.fix([f], ()):
                self.demand([Field(f.ids.reshape(-1)[:1], 1.0)], why)
        self._match_if_bilinear(groups[-1])
        self.demand(last, why)

    def _match_if_bilinear(self, group: Sequence[Field]) -> None:
        if len(group) > 1:
            self._match(group)

    def _constants(self, group: Sequence[Field], rest: tuple[int, ...], why: str) -> list[Field]:
        """Demand that a product of fields depends on the `rest` axes only; the fields that remain."""
        if self.fix(group, rest):
            self._match_if_bilinear(group)
            self.demand(group, why)
            return []
        if len(group) == 1:
            return [self.flatten(group[0], rest, why)]
        spanned = {a for f in group for a in f.spans(rest)}
        ndim = group[0].ids.ndim
        sizes = [max(f.ids.shape[a] for f in group) if a in spanned else 1 for a in range(ndim)]
        start = self.fresh(int(np.prod(sizes)))
        constant = Field(torch.arange(start, self.size).reshape(sizes), 1.0)
        if any(self.fix([f], ()) for f in group if not f.spans(rest)):
            self.demand([Field(constant.ids.reshape(-1)[:1], 1.0)], why)
        self._match_if_bilinear(group)
        self.demand([*group, replace(constant, exponent=-1.0)], why)
        return [constant]

    def flatten(self, f: Field, rest: tuple[int, ...], why: str) -> Field:
        """Make one field constant along every axis but `rest`."""
        axes = [a for a in range(f.ids.ndim) if a not in rest]
        first = f.ids
        for a in f.spans(axes):
            first = first.narrow(a, 0, 1)
        self.separate(f, f.spans(axes))
        self.demand([Field(f.ids, 1.0), Field(first.expand_as(f.ids), -1.0)], why)
        return Field(first, f.exponent)

    def constant_along(self, fields: Iterable[Field], axes: Sequence[int], why: str) -> tuple[Field, ...]:
        """Demand that the product does not depend on `axes`; what remains, with size 1 there."""
        fields = self.simplify(fields)
        moving = [f for f in fields if f.spans(axes)]
        out = [f for f in fields if not f.spans(axes)]
        for group in _by_axes(moving):
            rest = tuple(a for a in range(group[0].ids.ndim) if a not in axes)
            out += self._constants(group, rest, why)
        return self.simplify(out)

    def contract(self, left: Gauge, right: Gauge, axes: Sequence[int], why: str) -> tuple[Field, ...]:
        """Sum over `axes` of a product of two tensors laid out on common axes; the result has size 1 there."""
        kept = [a for a in range(left.ndim) if a not in axes]
        shared = [a for a in kept if left.shape[a] > 1 and right.shape[a] > 1]
        inner: list[Field] = []
        outer: list[Field] = []
        for side in (self.simplify(left.fields), self.simplify(right.fields)):
            summed = [f for f in side if f.spans(axes)]
            for f in side:
                self.separate(f, kept if f.spans(axes) else shared)
            if len(summed) > 1:
                self.singletons(summed)
            inner += summed
            outer += [f for f in side if not f.spans(axes)]
        if all(left.shape[a] == right.shape[a] == 1 for a in axes):
            outer = self._depthwise(outer, kept, why)
        return self.simplify([*outer, *self.constant_along(inner, axes, why)])

    def _depthwise(self, fields: list[Field], kept: Sequence[int], why: str) -> list[Field]:
        """A sum over one term per slice: the parameter's input axis still answers to the tensor it meets."""
        for f in reversed(fields):
            spanned, leaf = f.spans(kept), self._leaf_of(f)
            partners = [g for g in fields if g.spans(kept) == spanned and self._leaf_of(g) != leaf]
            if spanned and partners and leaf and self.fix([f], kept):
                self.vanish([*partners, f], why)
                return [g for g in fields if g is not f and g not in partners]
        return fields

    def equal(self, a: Sequence[Field], b: Sequence[Field], why: str) -> None:
        """Two tensors must transform alike."""
        self.vanish([*a, *(replace(f, exponent=-f.exponent) for f in b)], why)

    def approximately(self, fields: Sequence[Field], eps: float) -> None:
        """A constant `eps` was added to a tensor with these fields: whoever scales it is only approximate."""
        fields = self.simplify(fields)
        if fields:
            rows = np.stack(broadcast(*[f.ids for f in fields]), axis=1)
            rows = np.unique(rows, axis=0) if rows.shape[0] > 1 else rows
            equation = Equation(rows, tuple(f.exponent for f in fields), self.node, "eps")
            self.approximations.append((equation, eps))

    # --- redundancy: a constant on one axis of a parameter against its inverse on another acts as nothing ---

    def _slices(self, f: Field) -> tuple[Bundle, Array] | None:
        """The bundle that a field's atoms all belong to, and the slices of it that they touch."""
        low, high = int(f.ids.min()), int(f.ids.max())
        k = int(np.searchsorted([b.start for b in self.bundles], low, side="right")) - 1
        if k < 0 or high >= self.bundles[k].start + self.bundles[k].size or low < self.bundles[k].start:
            return None
        bundle = self.bundles[k]
        return bundle, np.unique((f.ids.reshape(-1).numpy() - bundle.start) // (bundle.size // bundle.slices))

    def _leaf_of(self, f: Field) -> str:
        found = self._slices(f)
        return found[0].leaf if found else ""

    def fixable(self, f: Field, rest: Sequence[int]) -> bool:
        found = self._slices(f)
        if found is None:
            return False
        bundle, slices = found
        siblings = [b for b in self.of_leaf[bundle.leaf] if b.slices == bundle.slices]
        free = sum(~b.fixed[slices] for b in siblings)
        return bool((~bundle.fixed[slices]).all() and (free >= 2).all() and (not f.spans(rest) or bundle.slices > 1))

    def fix(self, group: Sequence[Field], rest: Sequence[int]) -> bool:
        """True if a parameter in the group lets the group's constants be set to 1 without loss; uses that up."""
        spanned = {a for f in group for a in f.spans(rest)}
        for f in group:
            if set(f.spans(rest)) == spanned and self.fixable(f, rest):
                found = self._slices(f)
                assert found is not None
                found[0].fixed[found[1]] = True
                return True
        return False


def _by_axes(fields: Sequence[Field]) -> list[list[Field]]:
    """Fields grouped so that different groups depend on different axes."""
    groups: list[tuple[set[int], list[Field]]] = []
    for f in fields:
        axes = set(f.spans(range(f.ids.ndim)))
        touching = [g for g in groups if g[0] & axes]
        merged = (axes.union(*[g[0] for g in touching]), [x for g in touching for x in g[1]] + [f])
        groups = [g for g in groups if not any(g is t for t in touching)] + [merged]
    return [g[1] for g in groups]
