"""The store of everything operators demand of gauges (docs/architecture.md, 'Gauge inference').

An equation `sum_k c_k log p[a_k] = 0` is a row of atoms with coefficients. What may mix is kept in `mixing.Cells`, what
a parameter's axes have in common in `redundancy.Redundancy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from noetherflow.discovery.gauges import Array, AxisAtoms, Bundle, Equation, Field, Gauge, broadcast, narrow
from noetherflow.discovery.mixing import Cells
from noetherflow.discovery.redundancy import Redundancy

PASSED_ON = frozenset({"is added", "gets a bias"})
"""Demands that read nothing: two tensors go on as one. Coordinates that nothing reads later are no symmetries."""


class Store:
    """Atoms, their cells and tags, and the equations collected in one pass over the graph.

    `canon`, `tags`, `touched` and `wild` have one entry per atom (with room for more): an earlier atom known to be
    equal, facts that name the family, whether any operator noticed it, whether it stands for an entry of a tensor of
    zeros.
    """

    TAGS = ("relu", "gate", "gain", "score", "value")

    def __init__(self) -> None:
        self.size = 1
        self.canon = np.zeros(1024, dtype=np.int64)
        self.tags = np.zeros(1024, dtype=np.uint8)
        self.touched = np.zeros(1024, dtype=bool)
        self.wild = np.zeros(1024, dtype=bool)
        self.cells = Cells()
        self.redundancy = Redundancy()
        self.equations: list[Equation] = []
        self.approximations: list[tuple[Equation, float]] = []
        self.events: list[tuple[int, str, Array]] = []
        self._decoys: list[tuple[int, Field, str]] = []
        self._lookups: list[_Lookup] = []
        self._node = 0

    @property
    def bundles(self) -> list[Bundle]:
        """The atoms of every parameter axis, in order."""
        return self.redundancy.bundles

    @contextmanager
    def visiting(self, node: int) -> Iterator[None]:
        """Demands made inside the block are noted as made by this node: the one place that keeps where the pass is."""
        before, self._node = self._node, node
        try:
            yield
        finally:
            self._node = before

    # --- atoms ---

    def fresh(self, count: int) -> int:
        """The first of `count` new atoms, which may mix with each other."""
        start, self.size = self.size, self.size + count
        if self.size > len(self.canon):
            room = max(self.size, 2 * len(self.canon))
            for name in ("canon", "tags", "touched", "wild"):
                old = getattr(self, name)
                new = np.zeros(room, dtype=old.dtype)
                new[:start] = old[:start]
                setattr(self, name, new)
        self.canon[start : self.size] = np.arange(start, self.size)
        self.cells.together(start, count)
        return start

    def leaf(self, name: str, shape: tuple[int, ...], plan: Sequence[AxisAtoms], exponent: float = 1.0) -> Gauge:
        """The gauge of a parameter: one bundle of fresh atoms per axis of `plan`.

        A linear weight `[5, 3]` gets atoms 1-5 along axis 0 and 6-8 along axis 1: fields of shapes `[5, 1]`, `[1, 3]`.
        """
        fields: list[Field] = []
        for axis in plan:
            count = int(np.prod(axis.sizes(shape)))
            if count == 1 and (fields or any(np.prod(other.sizes(shape)) > 1 for other in plan)):
                continue  # a scalar on an axis of length 1 is a scalar on any other axis
            start = self.fresh(count)
            self.redundancy.add(Bundle(name, axis.view, axis.axes, start, count, exponent, axis.slices))
            fields.append(Field(narrow(_placed(axis, shape, start)), exponent))
        return Gauge(shape, tuple(fields), leaf=name)

    def wildcard(self, shape: tuple[int, ...]) -> Field:
        """Free atoms for the entries of a tensor of zeros."""
        count = int(np.prod(shape))
        start = self.fresh(count)
        self.wild[start : start + count] = True
        return Field(torch.arange(start, start + count).reshape(shape), 1.0)

    def decoy(self, ndim: int, why: str) -> Field:
        """A scale that stands for what an operator without a rule would pass on; `end_decoys` sets it to 1.

        Until then it travels on like any scale, so that operators without a rule further down the path meet it too and
        are listed.
        """
        field = Field(torch.full([1] * ndim, self.fresh(1)), 1.0)
        self._decoys.append((self._node, field, why))
        return field

    def end_decoys(self) -> None:
        """Demand that every decoy is 1, once the whole graph was seen."""
        for node, field, why in self._decoys:
            with self.visiting(node):
                self.demand([field], why)
        self._decoys = []

    def chosen(self, rows: Field, shape: tuple[int, ...]) -> Field:
        """New scales for rows that data choose, one for each position of this shape. Rows do not mix."""
        self.singletons([rows])
        start = self.fresh(int(np.prod(shape)))
        found = Field(torch.arange(start, self.size).reshape(*shape, 1), rows.exponent)
        self._lookups.append(_Lookup(self._node, rows, found))
        return found

    def free_lookups(self) -> frozenset[int]:
        """The nodes of those choices of which nothing was demanded: whatever the scales are, a norm takes them out."""
        demanded = np.zeros(self.size, dtype=bool)
        for equation in self.equations:
            demanded[equation.ids.reshape(-1)] = True
        return frozenset(c.node for c in self._lookups if not demanded[c.found.ids.reshape(-1).numpy()].any())

    def end_lookups(self) -> None:
        """Carry what was noticed of chosen rows over to all rows: that an operator met them, and with which eps."""
        for lookup in self._lookups:
            atoms, rows = lookup.found.ids.reshape(-1).numpy(), lookup.rows.ids.reshape(-1).numpy()
            self.touched[rows] = True
            for equation, eps in list(self.approximations):
                column = np.flatnonzero(np.isin(equation.ids[0], atoms))
                if column.size:
                    ids = np.repeat(equation.ids[:1], rows.size, axis=0)
                    ids[:, column[0]] = rows
                    self.approximations.append((replace(equation, ids=ids), eps))

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
            elif abs(out[same].exponent + f.exponent) < 1e-12:
                self.touched[ids.reshape(-1).numpy()] = True
                del out[same]
            else:
                out[same] = Field(ids, out[same].exponent + f.exponent)
        return tuple(out)

    def tag(self, fields: Iterable[Field], name: str) -> None:
        """Note a fact that names the family of whatever moves these atoms, one of `TAGS`."""
        for f in fields:
            self.tags[f.ids.reshape(-1).numpy()] |= 1 << self.TAGS.index(name)

    # --- permission to mix ---

    def notice(self, fields: Iterable[Field]) -> None:
        """Something reads a tensor with these fields, although it demands nothing of them."""
        for f in fields:
            self.touched[f.ids.reshape(-1).numpy()] = True

    def refine(self, f: Field, labels: Tensor) -> None:
        """Atoms seen with different collections of labels may no longer mix (see `Cells.refine`)."""
        self.cells.refine(f, labels)

    def separate(self, f: Field, axes: Sequence[int]) -> None:
        """Atoms may mix only with those at the same position along `axes`."""
        self.cells.separate(f, axes)

    def singletons(self, fields: Iterable[Field]) -> None:
        """No two atoms of these fields may mix: an operator acts on every coordinate by itself."""
        for f in fields:
            ids = f.ids.reshape(-1).numpy()
            self.events.append((self._node, "acts entry by entry (no mixing)", ids))
            self.cells.alone(ids)

    def varies(self, fields: Iterable[Field], shape: Sequence[int]) -> None:
        """The fields' tensor is multiplied by a tensor of this shape: coordinates along its long axes may not mix."""
        for f in fields:
            axes = [a for a in range(-1, -1 - min(f.ids.ndim, len(shape)), -1) if shape[a] > 1]
            self.separate(f, [a % f.ids.ndim for a in axes])

    def _pair(self, group: Sequence[Field]) -> None:
        """The fields of a product are paired position by position: only what commutes with that may mix."""
        if len(group) > 1 and not self.cells.pairable(group):
            self.singletons(group)

    # --- equations ---

    def demand(self, fields: Sequence[Field], why: str) -> None:
        """The product of the fields is 1 at every position; all fields have one number of axes."""
        columns = broadcast(*[f.ids for f in fields])
        coefficients = tuple(f.exponent for f in fields)
        rows = np.stack(columns, axis=1)
        if why not in PASSED_ON:
            self.touched[rows.reshape(-1)] = True
        self.equations.append(Equation(rows, coefficients, self._node, why))
        if len(fields) == 1:
            self.canon[self.canonical(columns[0])] = 0
        elif len(fields) == 2 and coefficients[0] == -coefficients[1]:
            a, b = self.canonical(columns[0]), self.canonical(columns[1])
            low, high = np.minimum(a, b), np.maximum(a, b)
            if bool((low == low[0]).all()):
                self.canon[high] = low

    def vanish(self, fields: Iterable[Field], why: str) -> None:
        """The whole product of the fields is 1 at every position.

        Factors that depend on different axes are constants: `r_i c_j s = 1` for all `i, j` means `r_i = k`, `c_j = m`
        and `k m s = 1`. A constant that a parameter's redundancy sets to 1 drops out.
        """
        fields = self.simplify(fields)
        constants = [f for f in fields if f.ids.numel() == 1]
        groups = _by_axes([f for f in fields if f.ids.numel() > 1])
        if not groups:
            if constants:
                self.demand(constants, why)
            return
        groups.sort(key=lambda group: not any(self.redundancy.fixable(f, ()) for f in group))
        for group in groups[:-1]:
            constants += self._reduce(group, (), why)
        self._fix_parameters_met_twice(groups[-1], constants, why)
        self._pair(groups[-1])
        self.demand([*groups[-1], *constants], why)

    def equal(self, a: Sequence[Field], b: Sequence[Field], why: str) -> None:
        """Two tensors must transform alike."""
        self.vanish([*a, *(replace(f, exponent=-f.exponent) for f in b)], why)

    def constant_along(self, fields: Iterable[Field], axes: Sequence[int], why: str) -> tuple[Field, ...]:
        """Demand that the product does not depend on `axes`; what remains, with size 1 there."""
        fields = self.simplify(fields)
        moving = [f for f in fields if f.spans(axes)]
        out = [f for f in fields if not f.spans(axes)]
        for group in _by_axes(moving):
            rest = tuple(a for a in range(group[0].ids.ndim) if a not in axes)
            out += self._reduce(group, rest, why)
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
            inner += summed
            outer += [f for f in side if not f.spans(axes)]
        if all(left.shape[a] == right.shape[a] == 1 for a in axes):
            outer = self._pair_depthwise(outer, kept, why)
        return self.simplify([*outer, *self.constant_along(inner, axes, why)])

    def approximately(self, fields: Sequence[Field], eps: float) -> None:
        """A constant `eps` was added to a tensor with these fields: whoever scales it is only approximate."""
        fields = self.simplify(fields)
        if fields:
            rows = np.stack(broadcast(*[f.ids for f in fields]), axis=1)
            rows = np.unique(rows, axis=0) if rows.shape[0] > 1 else rows
            equation = Equation(rows, tuple(f.exponent for f in fields), self._node, "eps")
            self.approximations.append((equation, eps))

    def _reduce(self, group: Sequence[Field], rest: tuple[int, ...], why: str) -> list[Field]:
        """Demand that a product of fields depends on the `rest` axes only; what is left of it.

        Nothing is left where a parameter's redundancy sets it to 1, one field becomes its own first entry, and several
        fields a new constant `k`: `a_i b_i = k` for all `i`.
        """
        if self.redundancy.fix(group, rest):
            self._pair(group)
            self.demand(group, why)
            return []
        if len(group) == 1:
            return [self._flattened(group[0], rest, why)]
        spanned = {a for f in group for a in f.spans(rest)}
        ndim = group[0].ids.ndim
        sizes = [max(f.ids.shape[a] for f in group) if a in spanned else 1 for a in range(ndim)]
        start = self.fresh(int(np.prod(sizes)))
        constant = Field(torch.arange(start, self.size).reshape(sizes), 1.0)
        if any(self.redundancy.fix([f], ()) for f in group if not f.spans(rest)):
            self.demand([Field(constant.ids.reshape(-1)[:1], 1.0)], why)
        self._pair(group)
        self.demand([*group, replace(constant, exponent=-1.0)], why)
        return [constant]

    def _flattened(self, f: Field, rest: tuple[int, ...], why: str) -> Field:
        """Make one field constant along every axis but `rest`."""
        axes = [a for a in range(f.ids.ndim) if a not in rest]
        first = f.ids
        for a in f.spans(axes):
            first = first.narrow(a, 0, 1)
        self.separate(f, f.spans(axes))
        self.demand([Field(f.ids, 1.0), Field(first.expand_as(f.ids), -1.0)], why)
        return Field(first, f.exponent)

    def _fix_parameters_met_twice(self, group: Sequence[Field], constants: Sequence[Field], why: str) -> None:
        """Where two axes of one parameter meet in a product, their common constant is its redundancy: set it to 1."""
        leaves = [self.redundancy.leaf_of(f) for f in [*group, *constants]]
        for f, leaf in zip(group, leaves, strict=False):
            if leaf and leaves.count(leaf) > 1 and self.redundancy.fix([f], ()):
                self.demand([Field(f.ids.reshape(-1)[:1], 1.0)], why)

    def _pair_depthwise(self, fields: list[Field], kept: Sequence[int], why: str) -> list[Field]:
        """In a sum with one term (a depthwise convolution) let the input axis of the weight undo the input's scale.

        The product `x_g w_g` scales like both. The redundancy of the weight (its input and output axis are one and the
        same) allows to say `x_g win_g = 1`, and the output scales like the output axis of the weight alone.
        """
        for f in reversed(fields):
            spanned, leaf = f.spans(kept), self.redundancy.leaf_of(f)
            partners = [g for g in fields if g.spans(kept) == spanned and self.redundancy.leaf_of(g) != leaf]
            if spanned and partners and leaf and self.redundancy.fix([f], kept):
                self.vanish([*partners, f], why)
                return [g for g in fields if g is not f and g not in partners]
        return fields


@dataclass(frozen=True, eq=False)
class _Lookup:
    """Rows of a parameter that data choose at a node, and the scales of what was found."""

    node: int
    rows: Field
    found: Field


def _placed(axis: AxisAtoms, shape: tuple[int, ...], start: int) -> Tensor:
    """The atoms of one axis laid out on the parameter's own axes, size 1 where they do not depend on an axis."""
    full = shape if axis.view is None else axis.view
    sizes = axis.sizes(shape)
    own = torch.arange(start, start + int(np.prod(sizes))).reshape(sizes)
    own = own.permute([axis.axes.index(a) for a in sorted(axis.axes)])
    ids = own.reshape([n if a in axis.axes else 1 for a, n in enumerate(full)])
    if axis.view is None:
        return ids
    same = 0  # trailing axes of length 1 that view and shape share
    while same < len(shape) - 1 and ids.shape[-1 - same] == 1 and full[-1 - same] == shape[-1 - same]:
        same += 1
    ones = [1] * same
    return ids.expand(*full[: len(full) - same], *ones).reshape(*shape[: len(shape) - same], *ones)


def _by_axes(fields: Sequence[Field]) -> list[list[Field]]:
    """Fields grouped so that different groups depend on different axes."""
    groups: list[tuple[set[int], list[Field]]] = []
    for f in fields:
        axes = set(f.spans(range(f.ids.ndim)))
        touching = [g for g in groups if g[0] & axes]
        merged = (axes.union(*[g[0] for g in touching]), [x for g in touching for x in g[1]] + [f])
        groups = [g for g in groups if not any(g is t for t in touching)] + [merged]
    return [g[1] for g in groups]
