"""`gradient_moments`: leg Grams of per-sample gradients over a stream of batches, in one backward pass each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.arguments import BATCHES, expect, refuse_other_losses
from noetherflow.core.inputs import LossFn
from noetherflow.core.ranks import ending_together, lost_ranks_named, told_by_all
from noetherflow.core.tensors import refuse_inference_tensors, tensors_of
from noetherflow.core.unwrap import unwrap
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.batch import (
    Share,
    Subject,
    loose_tensors_named,
    refuse_hooked,
    refuse_renormalising,
    tensors_in,
)
from noetherflow.moments.batch_statistics import refuse_batch_statistics, refuse_running_statistics
from noetherflow.moments.capture import Captured, CapturedWay, Captures
from noetherflow.moments.conditions import Conditions
from noetherflow.moments.distributed import in_step, is_sharded, ranks_of, refuse_counting_twice, refuse_sharded
from noetherflow.moments.factors import FactorKeeper
from noetherflow.moments.fallback import Fallback
from noetherflow.moments.groups import GroupSums
from noetherflow.moments.measuring import KnownWay, MeasuringPass, NewWay, Ways, verify_and_measure
from noetherflow.moments.placement import GroupPlan, Placement
from noetherflow.moments.products import Factors, joined_factors
from noetherflow.moments.purpose import Purpose, Wanted
from noetherflow.moments.result import GradientMoments, unresolved
from noetherflow.moments.sums import Sums
from noetherflow.moments.taps import CallId
from noetherflow.moments.target import needs_of, trainable_parameters
from noetherflow.moments.verify import WeightedPass
from noetherflow.symmetry.arguments import expect_model_and_symmetries
from noetherflow.symmetry.symmetry_set import SymmetrySet

CALL = "gradient_moments(model, loss_fn, batches, syms)"


def gradient_moments(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    syms: SymmetrySet,
    *,
    for_: Purpose = "flow",
    entries: bool = False,
    until: float | None = None,
    groups: int = 16,
    parameters: Iterable[str] = (),
    sample_axes: int = 1,
    resume: GradientMoments | None = None,
    process_group: Any = None,
    progress: Callable[[int, float], None] | None = None,
) -> GradientMoments:
    """Measure how the gradients of single samples scatter, as far as the symmetries need it.

    A verb for users: all that may be chosen is a keyword of its own, hence so many.

    For every leg of every symmetry the second moment `E[dX dX^T]` over samples, and the mean gradient of every
    parameter concerned; each batch costs about one ordinary forward and backward. The model, its buffers and `.grad`
    are left as they were.

    Args:
        model: the model, in the mode it is to be measured in. Under DistributedDataParallel or `fully_shard` ranks
            measure their own batches, and all get the moments of their union; under `fully_shard` every rank must have
            the same number of batches, and every measured parameter a rule.
        loss_fn: `loss_fn(model, batch)` returns one loss per sample, `[batch]`, not reduced.
        batches: the batches, for example a DataLoader.
        syms: the symmetries whose legs are measured.
        for_: `flow` measures leg Grams and mean gradients, which is what `noether_flow` needs. `equilibrium` measures
            besides what the joint `noise_equilibrium` of these symmetries needs: entries where tori meet, and where a
            general_linear leg meets another the factors of every sample's gradient (`moments.factors`), whose memory
            grows with the samples: a token of a weight `[m, n]` takes `m + n` numbers.
        entries: measure also `E[g^2]` of every entry, whether needed for that or not (Adam, Lion, the noise scale).
        until: stop when the relative standard error of each leg's `Tr E[g g^T]` is below; takes at least 4 groups.
        groups: samples are split into up to that many groups (whole batches, if there are enough) for jackknife errors;
            each costs one byte per measured entry (two with `entries`), not a copy.
        parameters: names of parameters measured beside those of `syms`.
        sample_axes: 2 if losses are `[batch, tokens]` and every entry is a sample.
        resume: go on from moments measured before; give the batches not seen yet.
        process_group: ranks that measure together, where the model does not tell.
        progress: `progress(samples, mean_loss)` is called after each batch.

    Returns:
        The moments over all samples; `.fallback` names parameters that no rule covers, which are measured more slowly.

    Raises:
        DeclarationError: the symmetries are another model's.
        DataError: a scalar or wrongly shaped loss, NaN or inf, an embedding with `max_norm` (its forward changes its
            weights), no batch, or fewer batches on some rank than on others under `fully_shard`.
        MomentError: a symmetry on a frozen, hooked or unused parameter, or one that holds with batch statistics only
            (see `minibatch_moments`); samples that act on each other, a sharded parameter without a rule, rules and
            autograd that disagree; `for_="equilibrium"` over several ranks, or where a weight has no factors.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(32, 4)
        >>> syms = nf.find_symmetries(model, x)
        >>> moments = nf.gradient_moments(model, lambda m, b: m(b).square().sum(1), [x[:16], x[16:]], syms)
        >>> moments.samples, len(moments.groups)
        (32, 16)

    Source: theory.md sections 1 and 2.
    """
    meter = Meter(model, loss_fn, syms, entries, parameters, sample_axes, for_)
    return meter.measure(
        batches, until=until, groups=groups, resume=resume, process_group=process_group, progress=progress
    )


@dataclass(eq=False)
class Meter:
    """Measures gradient moments of one model under one loss again and again, verified once.

    `gradient_moments` proves on its first batch that its rules give autograd's gradients, which costs as much as a few
    training steps. A meter keeps what it has proved about the ways through the model: `measure`, called every hundred
    training steps, then costs no more than its batches. What a later batch does differently is verified when it comes.

    With `capture=True` the pass over a batch is kept as a graph of operators once its shapes came before, and replayed
    without autograd and rules, on a GPU as a CUDA graph (not run on one yet). The first replay is compared with the
    pass itself. Replays see weights and buffers as they are by then and draw random numbers anew; any other change of
    the model is captured anew. What no graph can hold, such as `if x.sum() > 0` in the forward, is measured without,
    and `captured` says why.

    Attributes:
        model: The model, in the mode it is to be measured in.
        loss_fn: `loss_fn(model, batch)` returns one loss per sample, `[batch]`, not reduced.
        syms: The symmetries whose legs are measured.
        entries: Measure also `E[g^2]` of every entry.
        parameters: Names of parameters measured beside those of `syms`.
        sample_axes: 2 if losses are `[batch, tokens]` and every entry is a sample.
        for_: `flow`, or `equilibrium` to measure what a joint equilibrium needs, as in `gradient_moments`.
        capture: Replay the pass where batches of the same shapes come again and again.
        uncovered: Parameters that no rule covers, with the reason; the fallback measures them.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(32, 4)
        >>> meter = nf.Meter(model, lambda m, b: m(b).square().sum(1), nf.find_symmetries(model, x))
        >>> before = meter.measure(list(x.split(8)))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.mul_(0.5)  # training
        >>> after = meter.measure(list(x.split(8)))  # no verification again
        >>> before.samples, after.samples
        (32, 32)
    """

    model: nn.Module
    loss_fn: LossFn
    syms: SymmetrySet
    entries: bool = False
    parameters: Iterable[str] = ()
    sample_axes: int = 1
    for_: Purpose = "flow"
    capture: bool = False
    uncovered: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        refuse_other_losses(self.loss_fn)
        expect_model_and_symmetries(CALL, self.model, self.syms)
        self._given, self.model = self.model, unwrap(self.model)
        self._together = ranks_of(self._given, None) if is_sharded(self._given) else None
        self._wanted = Wanted.of(self.syms, self.syms.tensors_in(self.model), self.for_)
        self.entries = self.entries or self._wanted.entries
        self._ways = Ways()
        self._captures = Captures()
        self._used: set[str] = set()
        self._conditions = Conditions()
        self._prepare()

    def _prepare(self) -> None:
        """Look at the model as it is now, and begin with sums over no sample."""
        refuse_inference_tensors(self.syms.tensors_in(self.model), "gradient moments")
        wanted = trainable_parameters(self.model, [*self.syms.parameters, *self.parameters])
        self._needs = needs_of(self.syms, wanted, self.entries)
        roots = {n: t for n, t in tensors_of(self.model).items() if t.requires_grad}
        measured = frozenset(n for n, t in wanted.items() if t.numel())  # no gradient passes an empty parameter
        self._subject = Subject(self.model, self.loss_fn, roots, measured, self.sample_axes, self._together)
        self._fallback: Fallback | None = None
        # what the rules measure: everything but the parameters left to the fallback
        self._covered = replace(self._subject, measured=measured - set(self.uncovered))
        self._modules = tuple(self.model.named_modules())
        refuse_renormalising(self._modules)
        refuse_running_statistics(self.syms)
        if self._together is None:  # sharding hooks parameters of its own
            refuse_hooked(wanted)
        self._sums = GroupSums(self.syms, self._needs)
        self._factors: list[Mapping[str, Factors]] = []  # by batch

    def measure(
        self,
        batches: Iterable[Any],
        *,
        groups: int = 16,
        until: float | None = None,
        resume: GradientMoments | None = None,
        process_group: Any = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> GradientMoments:
        """Measure batches, and only these: what was measured before is not in the result.

        Args:
            batches: the batches, for example a DataLoader.
            groups: samples are split into up to that many groups (whole batches, if there are enough) for jackknife
                errors.
            until: stop when the relative standard error of each leg's `Tr E[g g^T]` is below.
            resume: go on from moments measured before; give the batches not seen yet.
            process_group: ranks that measure together, where the model does not tell.
            progress: `progress(samples, mean_loss)` is called after each batch.

        Returns:
            The moments over all samples.

        Raises:
            DataError, MomentError: as `gradient_moments`.
        """
        ranks = ranks_of(self._given, process_group)
        self._together = ranks if is_sharded(self._given) else None
        with ending_together(ranks):
            _refuse_loose_tensors(batches)
            _check_until(until, groups, ranks)
            self._refuse_ranks(ranks)
            self._prepare()
            if resume is not None:
                self.resume(resume)
        known = isinstance(batches, Sized) and until is None and resume is None
        grouping = GroupPlan(groups, len(batches) if known and isinstance(batches, Sized) else None)
        with ending_together(ranks if self._together is None else None), lost_ranks_named():
            for k, batch in enumerate(in_step(batches, self._together), len(self.groups)):
                with loose_tensors_named(batches):
                    self._place(batch, grouping.place(k))
                if progress is not None:
                    progress(self.samples, self.loss)
                if until is not None and self.noise_error() < until:
                    break
            self._sums.refuse_half_added()
        found = self._moments(ranks, spend=True)
        self._sums = GroupSums(self.syms, self._needs)
        self._factors = []
        return found

    @property
    def groups(self) -> dict[int, Sums]:
        """The sums by group of samples."""
        return self._sums.by_group

    @property
    def captured(self) -> Captured:
        """How many passes were captured, how many batches replayed, and why others were not."""
        return self._captures.captured

    @property
    def samples(self) -> int:
        return self._sums.samples

    @property
    def loss(self) -> float:
        """Mean loss so far."""
        return self._sums.loss

    def resume(self, moments: GradientMoments) -> None:
        """Go on from moments of the same symmetries. Raises MomentError if they hold anything else."""
        wanted = {"symmetries": {s.name for s in self.syms}, "parameters": set(self._needs)}
        squares = set(self._needs) if self.entries else set()
        found = {"symmetries": set(moments.second), "parameters": set(moments.mean)}
        beside = set(moments.squares) == squares and moments.factors.keys() == self._wanted.factors
        if found != wanted or not beside or moments.replicates is not None:
            raise MomentError(
                f"cannot resume: the earlier moments hold {found}, wanted {wanted} (entries={self.entries}, factors of "
                f"{sorted(self._wanted.factors)})"
            )
        shapes = {n: (tuple(moments.mean[n].shape), tuple(need.shape)) for n, need in self._needs.items()}
        other = {n: pair for n, pair in shapes.items() if pair[0] != pair[1]}
        if other:
            raise MomentError(f"cannot resume: earlier and present shapes differ: {other}")
        self._sums.restore(moments)
        self._factors = [moments.factors]
        self._used.update(moments.mean)
        self._conditions = self._conditions.joined(moments.conditions)
        self.uncovered.update(dict.fromkeys(moments.fallback, "fallback in the moments resumed from"))

    def update(self, batch: Any, groups: Iterable[int] = (0,)) -> None:
        """Measure one batch on top of what was measured before; `result()` gives the moments of all.

        Args:
            batch: as `loss_fn` takes it.
            groups: the batch's samples are divided evenly among these groups. Fill one before the next: only the group
                updated last keeps its sums as they are, the others in one byte per entry.

        Raises:
            MomentError: an earlier error left the sums with half a batch.
        """
        self._place(batch, Placement(tuple(dict.fromkeys(groups)), level=self._sums.level))

    def _place(self, batch: Any, placed: Placement) -> None:
        """Measure one batch into its groups."""
        self._sums.refuse_half_added()
        refuse_batch_statistics(self._modules)
        refuse_inference_tensors(
            {f"tensor {k} of the batch": t for k, t in enumerate(tensors_in(batch))}, "gradient moments"
        )
        with _eager():
            self._update(batch, placed)

    def _update(self, batch: Any, placed: Placement) -> None:
        """Measure a batch by the way it went before, else by a new way, once that is verified."""
        if self._ways.known:
            known = self._known_way(batch, placed)
            if known.run():
                self._count(known)
                return
        shared: frozenset[CallId] = frozenset()
        while True:
            weighted = WeightedPass(self._covered, batch, shared)
            attempt = verify_and_measure(weighted, partial(self._new_way, placed))
            shared = weighted.shared | weighted.newly_shared
            if weighted.newly_shared:
                continue
            self._conditions = self._conditions.joined(weighted.conditions)
            if self._leave_to_fallback(weighted.uncovered) or attempt.new is None:
                continue
            if attempt.measured:
                self._count(attempt.new)
                attempt.new.remember()
                self._used.update(attempt.new.reached)
                return
            self._leave_to_fallback(attempt.new.locator.scattered)
            shared = shared | attempt.new.locator.still_shared

    def _new_way(self, placed: Placement, weighted: WeightedPass) -> NewWay:
        """The pass that measures a batch after its weighted pass."""
        kept = FactorKeeper(self._wanted.factors)
        return NewWay(weighted.subject, weighted.batch, self._ways, self._sums, placed, kept, weighted)

    def _known_way(self, batch: Any, placed: Placement) -> KnownWay:
        """The pass over a batch that is expected to go a way verified before."""
        kept, ways = FactorKeeper(self._wanted.factors), self._ways
        if not self.capture:
            return KnownWay(self._covered, batch, ways, self._sums, placed, kept)
        return CapturedWay(self._covered, batch, ways, self._sums, placed, kept, self._captures, self._modules)

    def _leave_to_fallback(self, uncovered: dict[str, str]) -> bool:
        """True if any of these was measured by rules until now."""
        new = {n: why for n, why in uncovered.items() if n in self._covered.measured}
        if new:
            self.uncovered.update(new)
            self._fallback = None
            self._covered = replace(self._subject, measured=self._subject.measured - set(self.uncovered))
        return bool(new)

    def _count(self, attempt: MeasuringPass) -> None:
        """Count a batch that was measured."""
        if self.uncovered:
            self._add_fallback(attempt.batch, attempt.shares)
        factors = attempt.factors()
        attempt.count()
        self._factors.append({n: f.to(self._subject.roots[n].dtype) for n, f in factors.items()})

    def _add_fallback(self, batch: Any, shares: Sequence[Share]) -> None:
        left = tuple(n for n in self._needs if n in self.uncovered)
        refuse_sharded({n: self._subject.roots[n] for n in left}, f"no rule covers them ({self.uncovered})")
        self._fallback = self._fallback or Fallback(self._subject, left)
        self._fallback.add(batch, shares)

    def _refuse_ranks(self, ranks: Any) -> None:
        """Raises MomentError where several ranks would have to gather factors, or would count samples twice."""
        if self._wanted.factors and ranks is not None:
            raise MomentError(
                f"factors of {sorted(self._wanted.factors)[:4]} are not gathered over ranks: measure with for_='flow' "
                "and pass remeasure= to noise_equilibrium, or measure in one process"
            )
        refuse_counting_twice(self._subject.roots, ranks, is_sharded(self._given))

    def noise_error(self) -> float:
        """The largest relative standard error of any leg's `Tr E[g g^T]`, infinite with fewer than four groups."""
        return self._sums.noise_error()

    def result(self, ranks: Any = None) -> GradientMoments:
        """The moments so far, of all `ranks` if a process group is given.

        Raises:
            DataError: no sample was measured.
            MomentError: the loss never used a parameter, or an error left the sums with half a batch.
        """
        return self._moments(ranks, spend=False)

    def _moments(self, ranks: Any, spend: bool) -> GradientMoments:
        """`result`; with `spend` the sums are lost."""
        self._refuse_ranks(ranks)
        self._sums.refuse_half_added()
        of_ranks = [(self._used, set(self.uncovered))]
        if ranks is not None:
            of_ranks = told_by_all(of_ranks[0], ranks)
        used, uncovered = (set().union(*each) for each in zip(*of_ranks, strict=True))
        sums = self._sums.over_ranks(ranks)
        if not sums.by_group:
            raise DataError("no batch to measure: the iterator of batches is empty")
        reached = {*used, *uncovered, *(self._needs.keys() - self._subject.measured)}
        unused = [n for n in self._needs if n not in reached]
        if unused:
            raise MomentError(
                f"no gradient reaches {unused}: the loss does not use them. "
                "Freeze them (requires_grad_(False)) and take syms.trainable(model)"
            )
        moments = sums.moments(tuple(n for n in self._needs if n in uncovered), spend=spend)
        return replace(
            moments,
            unresolved=unresolved(moments, self.syms),
            conditions=self._conditions,
            factors=joined_factors(self._factors),
        )


def _check_until(until: float | None, groups: int, ranks: Any) -> None:
    """Raises MomentError where a measurement cannot stop by its error."""
    if until is not None and ranks is not None:
        raise MomentError("until= is for one process: ranks would stop at different batches; fix the number of batches")
    if until is not None and groups < 4:
        raise MomentError(f"until= takes its error from at least 4 groups of samples, got groups={groups}")


def _refuse_loose_tensors(batches: Any) -> None:
    """Raises DataError for what is no iterable of batches, `(x, y)` in place of `[(x, y)]` among it."""
    if isinstance(batches, Tensor | str):
        raise DataError(f"batches must be {BATCHES}, got one {type(batches).__name__}")
    expect(CALL, "batches", batches, Iterable, BATCHES)
    if isinstance(batches, tuple) and all(isinstance(b, Tensor) for b in batches):
        raise DataError("batches is an iterable of batches, got one tuple of tensors; for a single batch: [(x, y)]")


def _eager() -> AbstractContextManager[Any]:
    """Compiled models and functions run as written, so that their operators can be seen."""
    compiled = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
