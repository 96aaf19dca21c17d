"""One batch: forward and backwards under a recorder, forms contracted as their output gradients arrive."""

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
    made_by_torch_alone,
    run_backward,
    unseen_by_modes,
)
from noetherflow.errors import DataError, MomentError, NoetherflowError
from noetherflow.moments.forms import Form
from noetherflow.moments.layout import SampleLayout
from noetherflow.moments.origins import Origins, distinct
from noetherflow.moments.rules import Site
from noetherflow.moments.sums import Sums, Totals
from noetherflow.moments.taps import CallId, Receiver, Recorder, Tap, Trace


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
    """What a backward over a batch is for: `begin` sees the losses, `receive` each output gradient."""

    leaf: bool = False
    """Whether autograd differentiates every operand as well, for comparison; the forward must have been made so."""

    @abstractmethod
    def begin(self, losses: Tensor, recorder: Recorder) -> Tensor | None:
        """The weight of each loss in the backward, of the losses' shape; None to stop before the backward."""


@dataclass(frozen=True, eq=False)
class Backward:
    """What a backward left: the uses traced, and the gradients that autograd itself found.

    `missed`: of the parameters asked for, None each where the taps took all of the gradient, as they should.
    """

    trace: Trace
    missed: dict[str, Tensor | None]


@dataclass(frozen=True, eq=False)
class Forward:
    """The losses of one batch, computed under a recorder that is still active, so that they can be differentiated.

    `losses`: whatever `loss_fn` returned; a backward checks it.
    """

    subject: Subject
    losses: Any
    recorder: Recorder

    @property
    def repeatable(self) -> bool:
        """Whether several backwards can start from here, and all find the same activations.

        Not where parameters are gathered for one backward alone (`fully_shard`), nor where activations are recomputed,
        nor where a backward is somebody's own, who may overwrite what it kept. And not where a second forward may show
        that the loss is another each time: random numbers of its own, a parameter that was not used this time.
        """
        trace, plain = self.recorder.trace, self.subject.together is None and isinstance(self.losses, Tensor)
        if not plain or trace.packed or trace.generators or self.subject.measured - trace.names:
            return False
        return made_by_torch_alone(self.losses, but=(Tap,))

    def backward(self, purpose: BatchPass, asked: Sequence[str] = (), keep: bool = False) -> Backward | None:
        """Differentiate the losses.

        Args:
            purpose: what the backward is for.
            asked: parameters of which autograd is asked for what the taps left.
            keep: another backward is to come.

        Returns:
            What the backward left, None if `purpose.begin` stopped it.

        Raises:
            MomentError: reentrant checkpointing, which hides what it holds.
        """
        recorder = self.recorder
        recorder.receiver = purpose
        with unseen_by_modes(), ending_together(self.subject.together):
            weights = purpose.begin(self.subject.checked(self.losses), recorder)
        if weights is None:
            return None
        leaves = [t for u in recorder.trace.uses for t in u.leaves] if purpose.leaf else []
        inputs = [recorder.anchor, *leaves, *(recorder.roots[n] for n in asked)]
        try:
            found = run_backward(self.losses, weights, inputs, keep)
        except RuntimeError as cause:
            if "use_reentrant" not in str(cause):
                raise
            raise MomentError("reentrant checkpoints hide what they hold; use use_reentrant=False") from cause
        return Backward(recorder.trace, dict(zip(asked, found[1 + len(leaves) :], strict=True)))


@contextmanager
def forward(subject: Subject, batch: Any, shared: frozenset[CallId], leaf: bool) -> Iterator[Forward]:
    """The losses of a batch, for as long as they are differentiated.

    Args:
        subject: the model and its loss.
        batch: as `loss_fn` takes it.
        shared: calls known to give one output for all samples.
        leaf: whether a backward with `leaf` is to come.
    """
    recorder = Recorder(Origins(subject.model, subject.roots), subject.measured, shared, leaf)
    with torch.autograd.set_multithreading_enabled(False), recorder:
        losses = subject.loss_fn(subject.model, batch)
        recorder.stop()
        yield Forward(subject, losses, recorder)


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
