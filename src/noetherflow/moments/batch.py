"""One batch: forward and backward under a recorder, forms contracted as their output gradients arrive."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from noetherflow.core.inputs import LossFn
from noetherflow.core.ranks import ending_together
from noetherflow.core.tensors import tensors_of
from noetherflow.core.torch_internals import (
    has_accumulation_hooks,
    has_gradient_hooks,
    run_backward,
    unseen_by_modes,
)
from noetherflow.errors import DataError, MomentError, NoetherflowError
from noetherflow.moments.forms import Form, Outer
from noetherflow.moments.layout import SampleLayout
from noetherflow.moments.origins import Origins, Source, distinct
from noetherflow.moments.packed import SMALL, ProductTensor
from noetherflow.moments.rules import Site
from noetherflow.moments.sums import Sums, Totals
from noetherflow.moments.taps import CallId, Receiver, Recorder, Trace, Use
from noetherflow.moments.target import Scratch, Target, Workspace

CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured: the model, its per-sample loss, all trainable parameters (`roots`), and the names `measured`.

    `sample_axes`: axes of the losses whose every entry is a sample; 1 for `[batch]`, 2 for `[batch, tokens]`.
    `together`: the process group of ranks that go forward and backward together (a sharded model's); None for a process
    that goes alone.
    """

    model: nn.Module
    loss_fn: LossFn
    roots: dict[str, Tensor]
    measured: frozenset[str]
    sample_axes: int = 1
    together: Any = None

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.model.modules())

    def checked(self, losses: Any) -> Tensor:
        """Per-sample losses. Raises DataError for a scalar, a wrong number of axes or no sample."""
        if not isinstance(losses, Tensor) or losses.ndim != self.sample_axes:
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            wanted = "[batch]" if self.sample_axes == 1 else f"{self.sample_axes} sample axes"
            raise DataError(
                f"loss_fn must return per-sample losses, {wanted}, got {got}; "
                "use reduction='none' and average over everything but the samples"
            )
        if losses.numel() == 0:
            raise DataError("loss_fn returned no loss: the batch is empty")
        refuse_constant(losses)
        return losses


def refuse_constant(losses: Tensor) -> None:
    """Raises MomentError for losses without a gradient."""
    if not losses.requires_grad:
        raise MomentError("the losses do not depend on any trainable parameter; is the forward under no_grad?")


def refuse_renormalising(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises DataError for an embedding with `max_norm`: its forward overwrites the weights that are to be measured."""
    for name, module in modules:
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise DataError(
                f"{name or type(module).__name__} has max_norm={module.max_norm:g}: its forward renormalises its "
                "weights, and a measurement must leave the model as it was. With m that module, renormalise once, with "
                "torch.no_grad(): m.weight.copy_(m.weight.renorm(m.norm_type, 0, m.max_norm)), and set m.max_norm = "
                "None while measuring"
            )


def refuse_hooked(params: Mapping[str, Tensor]) -> None:
    """Raises MomentError for parameters whose hooks change the gradient that an optimiser sees."""
    masked = [n for n, t in params.items() if has_gradient_hooks(t)]
    if masked:
        raise MomentError(
            f"{masked[:4]} have gradient hooks (register_hook: a mask, a clip), so that the optimiser does not see the "
            "gradients of the samples; remove the hooks while measuring, or use minibatch_moments, which runs them"
        )
    refuse_accumulation_hooks(params)


def refuse_accumulation_hooks(params: Mapping[str, Tensor]) -> None:
    """Raises MomentError for parameters whose `.grad` hooks may change after every backward, unseen here."""
    changed = [n for n, t in params.items() if has_accumulation_hooks(t)]
    if changed:
        raise MomentError(
            f"{changed[:4]} have hooks that run when .grad is complete (register_post_accumulate_grad_hook) and may "
            "change it; remove them while measuring, or measure in training: MinibatchMeter.observe after backward()"
        )


@contextmanager
def loose_tensors_named(batches: Any) -> Iterator[None]:
    """Raises DataError in place of the loss's own error where `[x, y]` was given for `[(x, y)]`: each tensor is then
    taken for a batch.
    """
    try:
        yield
    except (RuntimeError, IndexError, TypeError, ValueError) as cause:
        loose = isinstance(batches, list) and len(batches) > 1 and all(isinstance(b, Tensor) for b in batches)
        if not loose or isinstance(cause, NoetherflowError):
            raise
        shapes = [tuple(b.shape) for b in batches[:3]]
        raise DataError(
            f"loss_fn fails on the first of batches, a tensor ({type(cause).__name__}: {cause}); batches is a list of "
            f"tensors of shapes {shapes}, each taken for a batch: for a single batch of inputs and targets, [(x, y)]"
        ) from cause


def check_finite(losses: Tensor, batch: Any, model: nn.Module) -> None:
    """Raises DataError naming the samples whose loss is NaN or inf, and what held NaN or inf before."""
    finite = torch.isfinite(losses.detach())
    if not finite.all():
        bad = (~finite).flatten().nonzero().flatten().tolist()
        where = ["the batch itself holds NaN or inf"] if any(_not_finite(t) for t in tensors_in(batch)) else []
        broken = [n for n, t in tensors_of(model).items() if _not_finite(t)]
        where += [f"NaN or inf in the model's {broken[:4]}{' and more' if len(broken) > 4 else ''}"] if broken else []
        why = f" ({'; '.join(where)})" if where else ""
        raise DataError(f"loss is not finite for {len(bad)} of {losses.numel()} samples, first {bad[:5]}{why}")


def _not_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch made of tuples, lists, mappings and dataclasses."""
    if isinstance(batch, Tensor):
        yield batch
    elif hasattr(batch, "values") and callable(batch.values):
        for v in batch.values():
            yield from tensors_in(v)
    elif isinstance(batch, list | tuple):
        for v in batch:
            yield from tensors_in(v)
    elif is_dataclass(batch):
        yield from tensors_in(vars(batch))


@contextmanager
def buffers_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Leave the buffers as they were: those overwritten, and those another tensor was put in place of."""
    held = [(m, name, b, None if b is None else b.clone()) for m in modules for name, b in m._buffers.items()]
    try:
        yield
    finally:
        for module, name, buffer, before in held:
            module._buffers[name] = buffer
            if buffer is not None and before is not None and distinct(buffer):  # else nothing can overwrite it
                with torch.no_grad():
                    buffer.copy_(before)


class BatchPass(Receiver):
    """What one forward and backward over a batch is for: `begin` sees the losses, `receive` each output gradient."""

    leaf: bool = False
    """Whether every operand gets a gradient of its own, for comparison with autograd."""

    @abstractmethod
    def begin(self, losses: Tensor, recorder: Recorder) -> Tensor | None:
        """The weight of each loss in the backward, of the losses' shape; None to stop before the backward."""


@dataclass(frozen=True, eq=False)
class Backward:
    """What a backward left: the uses traced, and the gradients that autograd itself found.

    `leaves`: of every operand, in the order of the uses, where the pass asked for them. `missed`: of the parameters
    asked for, None each where the taps took all of the gradient, as they should.
    """

    trace: Trace
    leaves: tuple[Tensor | None, ...]
    missed: dict[str, Tensor | None]


def forward_backward(
    subject: Subject, batch: Any, purpose: BatchPass, shared: frozenset[CallId], asked: Sequence[str] = ()
) -> Backward | None:
    """The loss of a batch under a recorder, and its backward.

    Args:
        subject: the model and its loss.
        batch: as `loss_fn` takes it.
        purpose: what the pass is for.
        shared: calls known to give one output for all samples.
        asked: parameters of which autograd is asked for what the taps left.

    Returns:
        What the backward left, None if `purpose.begin` stopped it.

    Raises:
        MomentError: reentrant checkpointing, which hides what it holds.
    """
    recorder = Recorder(Origins(subject.model, subject.roots), subject.measured, purpose, shared, purpose.leaf)
    with torch.autograd.set_multithreading_enabled(False), recorder:
        losses = subject.loss_fn(subject.model, batch)
        recorder.stop()
        with unseen_by_modes(), ending_together(subject.together):
            weights = purpose.begin(subject.checked(losses), recorder)
        if weights is None:
            return None
        leaves = [t for u in recorder.trace.uses for t in u.leaves] if purpose.leaf else []
        try:
            found = run_backward(losses, weights, [recorder.anchor, *leaves, *(recorder.roots[n] for n in asked)])
        except RuntimeError as cause:
            if "use_reentrant" not in str(cause):
                raise
            raise MomentError("reentrant checkpoints hide what they hold; use use_reentrant=False") from cause
    of_leaves, missed = found[1 : 1 + len(leaves)], found[1 + len(leaves) :]
    return Backward(recorder.trace, of_leaves, dict(zip(asked, missed, strict=True)))


def form_of(site: Site, layout: SampleLayout, samples: int, delta: Tensor, saved: tuple[Tensor, ...]) -> Form:
    """Per-sample gradients of one operand, from the output gradient and the activations of its use."""
    return site.build(layout, *[layout.front(t, samples) for t in site.prepare(delta, *saved)])


def used_once(trace: Trace) -> frozenset[str]:
    """The parameters that one use alone consumes."""
    counts = Counter(n for u in trace.uses for s in u.sources for n in s.names)
    return frozenset(n for n, k in counts.items() if k == 1)


class Share(NamedTuple):
    """Samples `lo .. hi - 1` of a batch, and the sums they are added to.

    `totals`: given for the last samples of their group, whose sums go there parameter by parameter.
    """

    lo: int
    hi: int
    sums: Sums
    totals: Totals | None

    def settle(self, names: Sequence[str]) -> None:
        """Note that these parameters are measured; where `totals` are given, their sums are packed at once."""
        if self.totals is not None:
            self.sums.settle(names, self.totals)


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
        divided = len(self._shares) > 1 and all(share.totals is not None for share in self._shares)
        if not divided or need.entries or m * n <= SMALL or not form.leaves_gradients_out(need):
            return False
        rows = form.left[0, ..., 0].numel() * max(share.hi - share.lo for share in self._shares)
        return rows * (m + n) * need.dtype.itemsize <= m * n

    def _add_product(self, name: str, form: Outer, scratch: Scratch) -> None:
        """Contract a parameter used once whose groups keep their rows of the factors; the summed gradient is made once
        for all of them.
        """
        left, right = (t.clone() for t in form.rows(0, form.samples))
        per_sample = len(left) // form.samples
        for share in self._shares:
            need, own = share.sums.needs[name], slice(share.lo * per_sample, share.hi * per_sample)
            form.add_legs(Target(need, share.sums, scratch), share.lo, share.hi)
            share.sums.keep(name, ProductTensor(left[own], right[own], need.shape))
        totals, shape = self._shares[0].totals, self._shares[0].sums.needs[name].shape
        assert totals is not None
        totals.plus({name: (left.mT @ right).view(shape)}, {})

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
