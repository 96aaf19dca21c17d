"""Forms of one batch contracted into the sums of its groups as they arrive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from noetherflow.moments.batch import Share, form_of
from noetherflow.moments.forms import Dense, Form, Outer, membership
from noetherflow.moments.layout import SampleLayout
from noetherflow.moments.origins import Source
from noetherflow.moments.packed import SMALL, ProductTensor
from noetherflow.moments.sums import Sums
from noetherflow.moments.taps import Use
from noetherflow.moments.target import Scratch, Target, Workspace

CHUNK_ENTRIES = 1 << 22


class Contraction:
    """Receives the forms of one batch: contracts those used once, keeps those whose uses must be added first."""

    def __init__(
        self, roots: dict[str, Tensor], measured: frozenset[str], once: frozenset[str], shares: Sequence[Share]
    ) -> None:
        self._roots, self._measured, self._once, self._shares = roots, measured, once, shares
        self._workspace = Workspace()
        self._lent = Workspace(), Workspace()  # for sums of one parameter that are packed before the next
        self._pending: list[tuple[Source, Form]] = []

    @property
    def pulled_back(self) -> frozenset[str]:
        """The parameters that `finish` reaches through autograd, once per sample."""
        return frozenset[str]().union(*(source.names for source, _ in self._pending if source.view_of is None))

    def receive(self, use: Use, layout: SampleLayout, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
        """Take the output gradient and the activations of one use."""
        samples = self._shares[-1].hi
        scratch = Scratch(self._workspace)
        for site, source in zip(use.sites, use.sources, strict=True):
            if not source.names.isdisjoint(self._measured):
                self._add(source, form_of(site, layout, samples, delta, saved), scratch)

    def _add(self, source: Source, form: Form, scratch: Scratch) -> None:
        """Contract the form of a parameter used once; keep any other until the batch is complete."""
        name = source.view_of
        if name in self._once and name is not None:
            whole = _as_whole(source.operand, self._roots[name], form)
            if isinstance(whole, Outer) and self._stays_product(name, whole):
                self._add_product(name, whole, scratch)
                return
            if isinstance(whole, Dense) and self._at_once(name, whole):
                self._add_vectors(name, whole.g, scratch)
                return
            if whole is not None:
                for share in self._shares:
                    if share.totals is not None:
                        share.sums.begin(name, self._lent)
                    whole.accumulate(share.sums.target(name, scratch), share.lo, share.hi)
                    share.settle([name])
                return
        self._pending.append((source, form))

    def _stays_product(self, name: str, form: Outer) -> bool:
        """Whether every group of a divided batch takes less memory as a product of factors than packed, and no gradient
        of its own is needed.
        """
        need, (m, n) = self._shares[0].sums.needs[name], form.matrix
        if not self._divided or need.entries or m * n <= SMALL or not form.leaves_gradients_out(need):
            return False
        rows = form.left[0, ..., 0].numel() * max(share.hi - share.lo for share in self._shares)
        return rows * (m + n) * need.dtype.itemsize <= m * n

    def _add_product(self, name: str, form: Outer, scratch: Scratch) -> None:
        """Contract a parameter used once whose groups keep their rows of the factors; the summed gradient is made once
        for all of them.
        """
        left, right = (t.clone() for t in form.rows(0, form.samples))
        per_sample = len(left) // form.samples
        need = self._shares[0].sums.needs[name]
        targets = [Target(need, share.sums, scratch) for share in self._shares]
        form.add_legs_by_group(targets, [(share.lo, share.hi) for share in self._shares])
        for share in self._shares:
            own = slice(share.lo * per_sample, share.hi * per_sample)
            share.sums.keep(name, ProductTensor(left[own], right[own], need.shape))
        totals, shape = self._shares[0].totals, need.shape
        assert totals is not None
        totals.take(name, (left.mT @ right).view(shape))

    @property
    def _divided(self) -> bool:
        """Whether the batch completes several groups."""
        return len(self._shares) > 1 and all(share.totals is not None for share in self._shares)

    def _at_once(self, name: str, form: Dense) -> bool:
        """Whether a parameter with one axis is summed for all groups of a divided batch in one product: no group has
        sums of it from before, no leg is general_linear, and no squares are wanted.
        """
        need = self._shares[0].sums.needs[name]
        plain = len(need.shape) == 1 and not need.entries and all(torus for *_, torus in need.legs)
        return self._divided and plain and all(name not in share.sums.gradient for share in self._shares)

    def _add_vectors(self, name: str, gradients: Tensor, scratch: Scratch) -> None:
        """Contract a parameter with one axis from gradients `[samples, entries]`, `_at_once`."""
        need, parts = self._shares[0].sums.needs[name], [(share.lo, share.hi) for share in self._shares]
        g = gradients.to(need.dtype).flatten(1)
        groups, legs = membership(parts, g), need.split(1).columns
        sums = groups @ g
        squares = groups @ scratch.square(g) if legs else sums
        for share, gradient, squared in zip(self._shares, sums, squares, strict=True):
            Target(need, share.sums, scratch).add_sums(legs, squared)
            share.sums.gradient[name] = gradient
            share.settle([name])

    def finish(self) -> None:
        """Contract the parameters used more than once: per-sample gradients are added over uses before squaring."""
        for names, items in _components(self._pending):
            wanted = sorted(names & self._measured)
            entries = sum(self._roots[n].numel() for n in names)
            step = max(1, CHUNK_ENTRIES // entries)
            for share in self._shares:
                for start in range(share.lo, share.hi, step):
                    self._add_chunk(wanted, items, start, min(start + step, share.hi), share.sums)
                share.settle(wanted)
        self._pending.clear()

    def _add_chunk(self, wanted: list[str], items: list[tuple[Source, Form]], lo: int, hi: int, sums: Sums) -> None:
        """Add samples `lo .. hi - 1` of parameters that share uses: explicit gradients, first added over their uses."""
        total: dict[str, Tensor] = {}
        for name, g in self._by_parameter(items, lo, hi):
            total[name] = total[name] + g if name in total else g
        for name in wanted:
            if name in total:
                sums.target(name).add_dense(total[name])

    def _by_parameter(self, items: list[tuple[Source, Form]], lo: int, hi: int) -> Iterator[tuple[str, Tensor]]:
        """The gradient `[hi - lo, *shape]` that each use of a parameter contributes, by the parameter's name."""
        made: dict[int, tuple[Source, Tensor]] = {}  # operands computed from parameters, each pulled back once
        for source, form in items:
            gradients = form.dense(lo, hi)
            if source.view_of is not None:
                yield source.view_of, _embed(gradients, source.operand, self._roots[source.view_of])
            else:
                held = made.get(id(source.operand))
                made[id(source.operand)] = (source, gradients if held is None else held[1] + gradients)
        for source, gradients in made.values():
            names = sorted(source.names & self._measured)
            yield from zip(names, _pull_back(source.operand, [self._roots[n] for n in names], gradients), strict=True)


def _as_whole(operand: Tensor, root: Tensor, form: Form) -> Form | None:
    """The form with the operand read as the whole parameter: itself, or transposed; None for a part or another view."""
    if operand is root:
        return form
    if not root.is_contiguous() or operand.numel() != root.numel():
        return None
    if operand.is_contiguous():
        return form
    return form.transposed() if operand.ndim == 2 and operand.mT.is_contiguous() else None


def _embed(gradients: Tensor, view: Tensor, root: Tensor) -> Tensor:
    """Gradients of a view of `root`, `[samples, *view shape]`, as gradients of `root`."""
    if view is root:
        return gradients
    offset = view.storage_offset() - root.storage_offset()
    out = [torch.empty_strided(root.shape, root.stride(), dtype=gradients.dtype, device=root.device) for _ in gradients]
    for o, g in zip(out, gradients, strict=True):
        o.zero_().as_strided(view.shape, view.stride(), offset).copy_(g)
    return torch.stack(out)


def _pull_back(made: Tensor, roots: list[Tensor], gradients: Tensor) -> list[Tensor]:
    """Gradients of a tensor made from parameters, `[samples, *shape]`, as gradients of the parameters."""
    with torch.enable_grad():
        rows = [
            torch.autograd.grad(made, roots, g.to(made.dtype), retain_graph=True, materialize_grads=True)
            for g in gradients
        ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _components(items: list[tuple[Source, Form]]) -> list[tuple[frozenset[str], list[tuple[Source, Form]]]]:
    """Items grouped so that groups share no parameter."""
    groups: list[tuple[frozenset[str], list[tuple[Source, Form]]]] = []
    for item in items:
        joined = [g for g in groups if g[0] & item[0].names]
        groups = [g for g in groups if not g[0] & item[0].names]
        names = item[0].names.union(*(g[0] for g in joined))
        groups.append((names, [i for g in joined for i in g[1]] + [item]))
    return groups
