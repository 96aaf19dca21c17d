"""`gradient_moments`: leg Grams of per-sample gradients over a stream of batches, in one backward pass each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.tensors import tensors_of
from noetherflow.core.unwrap import unwrap
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.batch import (
    Contraction,
    LossFn,
    Slices,
    Subject,
    buffers_kept,
    check_finite,
    forward_backward,
    refuse_renormalising,
    used_once,
)
from noetherflow.moments.distributed import (
    added_over_ranks,
    all_ranks,
    in_step,
    is_sharded,
    over_ranks,
    ranks_of,
    refuse_sharded,
)
from noetherflow.moments.fallback import Fallback
from noetherflow.moments.layout import SampleLayout
from noetherflow.moments.result import GradientMoments, merge_moments
from noetherflow.moments.statistics import noise_error
from noetherflow.moments.taps import CallId, Recorder, Trace, Use
from noetherflow.moments.target import Sums, needs_of, trainable_parameters
from noetherflow.moments.verify import WeightedPass, probe, signature
from noetherflow.symmetry.symmetry_set import SymmetrySet


def gradient_moments(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    syms: SymmetrySet,
    *,
    entries: bool = False,
    until: float | None = None,
    groups: int = 16,
    parameters: Iterable[str] = (),
    sample_axes: int = 1,
    resume: GradientMoments | None = None,
    process_group: Any = None,
    progress: Callable[[int, float], None] | None = None,
) -> GradientMoments:
    """`E_z[dX dX^T]` on every leg of `syms`, `gbar`, and with `entries` also `E_z[g^2]` (theory.md sections 1 and 2).

    `loss_fn(model, batch)` returns per-sample losses `[batch]`, not reduced; with `sample_axes=2`, losses
    `[batch, tokens]` whose every entry is a sample. `parameters`: names measured beside those of `syms`.
    `groups`: samples are split into up to that many groups (whole batches, if there are enough) for jackknife errors;
    each group holds one copy of the mean gradient. `until`: stop when the relative standard error of each leg's
    `Tr E[g g^T]` is below; that takes at least 4 groups. `resume`: go on from moments measured before; give the
    batches not seen yet.
    Under DistributedDataParallel or `fully_shard`, or with `process_group`, ranks measure their own batches and all
    get the moments of their union; under `fully_shard` every rank must have the same number of batches, and every
    measured parameter a rule. `progress(samples, loss)` is called after each batch.
    The model, its buffers and `.grad` are left as they were.

    Raises DeclarationError for another model's symmetries; DataError for a scalar or wrongly shaped loss, NaN or inf,
    an embedding with `max_norm` (its forward changes its weights), no batch, or fewer batches on some rank than on
    others under `fully_shard`; MomentError for a symmetry on a frozen or unused parameter, for samples that act on each
    other, for a sharded parameter without a rule, and where rules and autograd disagree.
    """
    ranks = ranks_of(model, process_group)
    if isinstance(batches, tuple) and all(isinstance(b, Tensor) for b in batches):
        raise DataError("batches is an iterable of batches, got one tuple of tensors; for a single batch: [(x, y)]")
    meter = Meter(model, loss_fn, syms, entries=entries, parameters=parameters, sample_axes=sample_axes)
    if resume is not None:
        meter.resume(resume)
    if until is not None and ranks is not None:
        raise MomentError("until= is for one process: ranks would stop at different batches; fix the number of batches")
    if until is not None and groups < 4:
        raise MomentError(f"until= takes its error from at least 4 groups of samples, got groups={groups}")
    splits = _splits(batches, groups)
    first = len(meter.groups) if resume is not None else 0
    for k, batch in enumerate(in_step(batches, model, ranks)):
        meter.update(batch, range(first + k * splits, first + (k + 1) * splits), groups)
        if progress is not None:
            progress(meter.samples, meter.loss)
        if until is not None and meter.noise_error() < until:
            break
    return meter.result(ranks)


def _splits(batches: Iterable[Any], groups: int) -> int:
    """Groups per batch: 1 when batches suffice or cannot be counted."""
    count = len(batches) if isinstance(batches, Sized) else groups
    return max(1, -(-groups // max(1, count)))


@dataclass(eq=False)
class Verified:
    """One kind of way through a model, `done` once verified: where samples lie in every use that a gradient reached."""

    layouts: dict[CallId, SampleLayout] = field(default_factory=dict)
    done: bool = False


@dataclass(eq=False)
class Meter:
    """Accumulates moments batch by batch; `result()` at any time."""

    model: nn.Module
    loss_fn: LossFn
    syms: SymmetrySet
    entries: bool = False
    parameters: Iterable[str] = ()
    sample_axes: int = 1
    groups: dict[int, Sums] = field(default_factory=dict, init=False)
    uncovered: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not callable(self.loss_fn) or isinstance(self.loss_fn, nn.Module):
            raise DataError(
                f"loss_fn is called as loss_fn(model, batch) and returns one loss per sample, got a "
                f"{type(self.loss_fn).__name__}; wrap a criterion with reduction='none': "
                "lambda model, batch: criterion(model(batch[0]), batch[1])"
            )
        self.model = unwrap(self.model)
        self.syms.tensors_in(self.model)
        wanted = trainable_parameters(self.model, [*self.syms.parameters, *self.parameters])
        self._needs = needs_of(self.syms, wanted, self.entries)
        self._roots = {n: t for n, t in tensors_of(self.model).items() if t.requires_grad}
        self._subject = Subject(self.model, self.loss_fn, self._roots, frozenset(wanted), self.sample_axes)
        self._covered = self._subject  # what the rules measure: everything but the parameters left to the fallback
        self._verified: dict[Any, Verified] = {}
        # the same by exact shapes, and the parameters used once: a quick look-up
        self._ways: dict[Any, tuple[Verified, frozenset[str]]] = {}
        self._shared: frozenset[CallId] = frozenset()
        self._fallback: Fallback | None = None
        self._sharded = is_sharded(self.model)
        self._modules = tuple(self.model.named_modules())
        refuse_renormalising(self._modules)
        self._used: set[str] = set()
        self._half_added = False  # in the middle of a batch; stays set when an error ends it there

    @property
    def samples(self) -> int:
        return sum(s.samples for s in self.groups.values())

    @property
    def loss(self) -> float:
        """Mean loss so far."""
        return sum(s.loss for s in self.groups.values()) / max(1, self.samples)

    def resume(self, moments: GradientMoments) -> None:
        """Go on from moments of the same symmetries. Raises MomentError if they hold anything else."""
        wanted = {"symmetries": {s.name for s in self.syms}, "parameters": set(self._needs)}
        squares = set(self._needs) if self.entries else set()
        found = {"symmetries": set(moments.second), "parameters": set(moments.mean)}
        if found != wanted or set(moments.squares) != squares or moments.replicates is not None:
            raise MomentError(
                f"cannot resume: the earlier moments hold {found}, wanted {wanted} (entries={self.entries})"
            )
        shapes = {n: (tuple(moments.mean[n].shape), tuple(need.shape)) for n, need in self._needs.items()}
        other = {n: pair for n, pair in shapes.items() if pair[0] != pair[1]}
        if other:
            raise MomentError(f"cannot resume: earlier and present shapes differ: {other}")
        parts = moments.groups or (moments,)
        self.groups = {k: Sums.of(part, self.syms, self._needs) for k, part in enumerate(parts)}
        self._used.update(moments.mean)
        self.uncovered.update(dict.fromkeys(moments.fallback, "fallback in the moments resumed from"))

    def update(self, batch: Any, groups: Iterable[int] = (0,), of: int = 1) -> None:
        """Measure one batch; its samples are divided among the given groups (taken modulo `of`).

        Raises MomentError after an error that left the sums with half a batch.
        """
        self._refuse_half_added()
        ids = list(dict.fromkeys(g % of for g in groups))
        _refuse_batch_statistics(self._modules)
        with _eager():
            self._update(batch, ids)

    def _update(self, batch: Any, ids: list[int]) -> None:
        if self._verified and self._measure(batch, ids, None):
            return
        shared: frozenset[CallId] = frozenset()
        while True:
            found = probe(self._covered, batch, shared)
            shared = found.shared
            if not self._leave_to_fallback(found.uncovered):
                if self._measure(batch, ids, found):
                    return
                self._leave_to_fallback(found.scattered)
                shared = shared | found.still_shared

    def _leave_to_fallback(self, uncovered: dict[str, str]) -> bool:
        """True if any of these was measured by rules until now."""
        new = {n: why for n, why in uncovered.items() if n in self._covered.measured}
        if new:
            self.uncovered.update(new)
            self._fallback = None
            self._covered = replace(self._subject, measured=self._subject.measured - set(self.uncovered))
        return bool(new)

    def _way(self, shared: frozenset[CallId], trace: Trace, samples: int) -> tuple[Verified, frozenset[str]]:
        """What is known of this way through the model, and the parameters used once."""
        exact = (shared, samples, *((u.id, u.out_shape) for u in trace.uses))
        if exact not in self._ways:
            kind = shared, samples == 1, signature(trace, samples, self.sample_axes)
            self._ways[exact] = self._verified.setdefault(kind, Verified()), used_once(trace)
        return self._ways[exact]

    def _measure(self, batch: Any, ids: list[int], found: WeightedPass | None) -> bool:
        """The measuring pass. Without a probe, False if this way through the model is not verified yet, or a gradient
        reaches a use that none reached when it was; with one, False if a call turned out to be shared by all samples.

        Adds to the sums in place only where it cannot come out False.
        """
        subject = self._covered
        shared = self._shared if found is None else found.shared
        sums: dict[int, Sums] = {}
        ways: list[Verified] = []
        unplaced: list[Tensor] = []
        contractions: list[Contraction] = []
        slices: list[tuple[int, int, Sums]] = []
        losses_of: list[float] = []

        def ready(losses: Tensor, recorder: Recorder) -> Tensor | None:
            trace, samples = recorder.trace, losses.numel()
            way, once = self._way(shared, trace, samples)
            known = way.done and subject.measured.isdisjoint(trace.uncovered)
            if found is None and not (all_ranks(known, self.model) if self._sharded else known):
                return None
            ways.append(way)
            afresh = found is not None or len(way.layouts) < len(trace.uses)
            for g in ids:
                before = None if afresh else self.groups.get(g)
                sums[g] = before or Sums.zeros(self.syms, self._needs)
            slices.extend(_slices(samples, sums))
            losses_of.extend(_sums_over(losses.detach().flatten(), slices))
            if not all(map(isfinite, losses_of)):
                check_finite(losses, batch)
            contractions.append(Contraction(recorder.roots, subject.measured, once, slices))
            self._half_added = not afresh
            return torch.ones_like(losses)

        def arrive(use: Use, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
            layout = ways[0].layouts.get(use.id) if found is None else found.locate(use, delta)
            if layout is not None:
                contractions[0].receive(use, layout, delta, saved)
            elif found is None:
                unplaced.append(delta.any())

        names = sorted(subject.measured)
        with buffers_kept(subject.modules):
            done = forward_backward(subject, batch, shared, False, ready, arrive, names)
            if done is None or not (self._placed(unplaced) if found is None else found.settled()):
                return False
            trace, residuals = done
            _refuse_missed([n for n, r in zip(names, residuals, strict=True) if r is not None], trace)
            if self._sharded:
                self._refuse_uneven(contractions[0].pulled_back, slices[-1][1])
            contractions[0].finish()
        if self.uncovered:
            self._add_fallback(batch, slices)
        for (lo, hi, s), loss in zip(slices, losses_of, strict=True):
            s.samples += hi - lo
            s.loss += loss
        if found is not None:
            ways[0].layouts.update(found.kept)
            ways[0].done = True
            self._shared = shared
            self._used.update(n for u in trace.uses for s in u.sources for n in s.names)
        for g in ids:
            before = self.groups.get(g)
            if sums[g].samples and sums[g] is not before:
                self.groups[g] = sums[g] if before is None else before.plus(sums[g])
        self._half_added = False
        return True

    def _add_fallback(self, batch: Any, slices: Slices) -> None:
        left = tuple(n for n in self._needs if n in self.uncovered)
        refuse_sharded({n: self._roots[n] for n in left}, f"no rule covers them ({self.uncovered})")
        self._fallback = self._fallback or Fallback(self._subject, left)
        self._fallback.add(batch, slices)

    def _placed(self, reached: list[Tensor]) -> bool:
        """Whether no gradient reached the uses whose samples lie nobody knows where, on any rank."""
        placed = not any(map(bool, reached))
        return all_ranks(placed, self.model) if self._sharded else placed

    def _refuse_uneven(self, names: frozenset[str], samples: int) -> None:
        """Raises MomentError where ranks of a sharded model would go backward unequally often, sample by sample."""
        counts = over_ranks([samples], self.model) if names else [samples]
        if len(set(counts)) > 1:
            raise MomentError(
                f"ranks have {counts} samples in one batch, and {sorted(names)}, whose use all samples share, need "
                "equal numbers under fully_shard: leave out a shorter last batch (drop_last=True)"
            )

    def _refuse_half_added(self) -> None:
        if self._half_added:
            raise MomentError(
                "an earlier update ended in an error with its batch half added, so these sums are lost; "
                "measure again with a new Meter"
            )

    def noise_error(self) -> float:
        """The largest relative standard error of any leg's `Tr E[g g^T]`, infinite with fewer than four groups."""
        sums = list(self.groups.values())
        return noise_error([s.samples for s in sums], torch.stack([s.traces() for s in sums]))

    def result(self, ranks: Any = None) -> GradientMoments:
        """The moments so far, of all `ranks` if a process group is given.

        Raises DataError without a sample, MomentError for a parameter the loss never used, or after an error that left
        the sums with half a batch.
        """
        self._refuse_half_added()
        groups = self.groups
        if ranks is not None:
            groups = added_over_ranks(groups, self.syms, self._needs, ranks)
        if not groups:
            raise DataError("no batch to measure: the iterator of batches is empty")
        unused = [n for n in self._needs if n not in self._used and n not in self.uncovered] if self.groups else []
        if unused:
            raise MomentError(
                f"no gradient reaches {unused}: the loss does not use them. "
                "Freeze them (requires_grad_(False)) and take syms.trainable(model)"
            )
        parts = [s.moments(tuple(self.uncovered)) for _, s in sorted(groups.items())]
        return replace(merge_moments(parts), groups=tuple(parts) if len(parts) > 1 else ())


def _slices(samples: int, sums: dict[int, Sums]) -> list[tuple[int, int, Sums]]:
    """The batch divided evenly among groups."""
    k = len(sums)
    edges = [samples * i // k for i in range(k + 1)]
    return [(lo, hi, s) for lo, hi, s in zip(edges, edges[1:], sums.values(), strict=False) if hi > lo]


def _sums_over(losses: Tensor, slices: list[tuple[int, int, Sums]]) -> list[float]:
    """Summed losses of each slice, in one synchronisation."""
    if len(slices) == 1:
        return [float(losses.sum(dtype=torch.float64))]
    return torch.stack([losses[lo:hi].sum(dtype=torch.float64) for lo, hi, _ in slices]).tolist()


def _eager() -> AbstractContextManager[Any]:
    """Compiled models and functions run as written, so that their operators can be seen."""
    compiled = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _refuse_missed(names: list[str], trace: Trace) -> None:
    """Raises MomentError naming parameters that a gradient reached beside the taps."""
    if names:
        seen = [str(u) for u in trace.uses if any(s.names & set(names) for s in u.sources)]
        raise MomentError(f"a use of {names} was seen by no rule; uses seen: {seen}")


def _refuse_batch_statistics(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises MomentError for a batch norm in training mode."""
    for name, module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise MomentError(
                f"batch norm {name!r} uses batch statistics, so samples have no gradients of their own; "
                "call model.eval(), or use minibatch_moments"
            )
