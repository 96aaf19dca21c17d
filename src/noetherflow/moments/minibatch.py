"""Moments of minibatch gradients over replicates: for samples that act on each other, and during training for free."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.arguments import expect_measurement
from noetherflow.core.inputs import LossFn
from noetherflow.core.ranks import ending_together
from noetherflow.core.settings import SGDConfig
from noetherflow.core.tensors import refuse_inference_tensors
from noetherflow.core.torch_internals import awaits_unscaling, scalers_alive
from noetherflow.core.unwrap import unwrap
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.batch import (
    buffers_kept,
    check_finite,
    loose_tensors_named,
    refuse_accumulation_hooks,
    refuse_constant,
    refuse_renormalising,
    tensors_in,
)
from noetherflow.moments.batch_statistics import refuse_evaluation
from noetherflow.moments.conditions import Conditions, random_states
from noetherflow.moments.distributed import ranks_of, refuse_sharded
from noetherflow.moments.groups import GroupSums
from noetherflow.moments.placement import GroupPlan
from noetherflow.moments.result import GradientMoments, Replicates, Sampling, unresolved
from noetherflow.moments.target import needs_of, trainable_parameters
from noetherflow.symmetry.arguments import expect_model_and_symmetries
from noetherflow.symmetry.symmetry_set import SymmetrySet


def minibatch_moments(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    syms: SymmetrySet,
    *,
    batch_size: int,
    dataset_size: int | None = None,
    sampling: Sampling | None = None,
    entries: bool = False,
    groups: int = 16,
    process_group: Any = None,
    progress: Callable[[int, float], None] | None = None,
) -> GradientMoments:
    """Measure gradient noise from the scatter of minibatch gradients, each batch one replicate.

    A verb for users: all that may be chosen is a keyword of its own, hence so many.

    This is the way where samples act on each other (batch statistics, contrastive losses), so that a sample has no
    gradient of its own. The model runs in the mode it is in, batch statistics included; buffers and `.grad` are left as
    they were. The result's `batch_grams(symmetry, sgd)` are unbiased from two replicates on, for every `sgd`, also of
    another batch size: `Sigma ~ (E[g_B g_B^T] - m) / (v_1 - v_K)` and `gbar gbar^T ~ m - v_K Sigma`, with `m` of the
    mean gradient and `v_K` by how batches were drawn (`Replicates`). Where samples act on each other, Sigma depends on
    the batch size: then keep `sgd.batch_size` at `batch_size`.

    Args:
        model: the model, in the mode it is trained in.
        loss_fn: `loss_fn(model, batch)` returns the batch's mean loss, or per-sample losses.
        batches: minibatches, all of `batch_size` samples; ranks of torch.distributed give further ones.
        syms: the symmetries whose legs are measured.
        batch_size: samples per batch.
        dataset_size: samples in the data set; None for fresh data.
        sampling: `replacement` (or fresh data); `independent` draws without replacement inside each batch; `epoch`,
            batches that partition the data. By default `epoch` if `dataset_size` is given.
        entries: measure also `E[g_B^2]` of every entry.
        groups: replicates are split into up to that many groups for jackknife errors.
        process_group: ranks that measure together, where the model does not tell.
        progress: `progress(replicates, mean_loss)` is called after each batch. (There are many parameters because each
            is an option of its own.)

    Returns:
        Moments whose "samples" are minibatches; `.replicates` says how they were drawn.

    Raises:
        DataError: NaN or inf, no batch, batches of another size than `batch_size`, more samples than the data hold, or
            an embedding with `max_norm`.
        MomentError: an unknown, frozen, unused or sharded parameter, or symmetries that hold with batch statistics only
            while the model is in evaluation mode.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 4)
        >>> syms = nf.find_symmetries(model, x)
        >>> mean_loss = lambda m, b: m(b).square().mean()
        >>> moments = nf.minibatch_moments(model, mean_loss, x.split(16), syms, batch_size=16)
        >>> moments.samples, moments.replicates.batch_size
        (4, 16)

    Source: theory.md section 1.
    """
    expect_measurement("minibatch_moments(model, loss_fn, batches, syms)", model, loss_fn, batches)
    ranks = ranks_of(model, process_group)
    with ending_together(ranks):
        meter = MinibatchMeter(model, syms, batch_size, dataset_size, sampling, entries, groups)
        conditions = _observe_all(meter, loss_fn, batches, progress)
    found = meter.result(ranks)
    return replace(at_fixed_weights(found), conditions=conditions)


def _observe_all(
    meter: MinibatchMeter, loss_fn: LossFn, batches: Iterable[Any], progress: Callable[[int, float], None] | None
) -> Conditions:
    """Observe every batch with the weights as they are; under which conditions."""
    if isinstance(batches, Sized) and len(batches):
        meter.grouping = GroupPlan(min(meter.groups, len(batches)), len(batches))
    refuse_renormalising(meter.model.named_modules())
    refuse_accumulation_hooks(meter.params)
    params, conditions, before = list(meter.params.values()), Conditions(), random_states()
    with buffers_kept(tuple(meter.model.modules())):
        for batch in batches:
            refuse_inference_tensors(
                {f"tensor {k} of the batch": t for k, t in enumerate(tensors_in(batch))}, "gradient moments"
            )
            with loose_tensors_named(batches):
                loss = _mean_loss(loss_fn(meter.model, batch), batch, meter.batch_size, meter.model)
            conditions = conditions if conditions.rounding else Conditions.of(meter.model, loss, before)
            meter.observe(float(loss.detach()), torch.autograd.grad(loss, params, allow_unused=True))
            if progress is not None:
                progress(meter.replicates, meter.loss)
    return conditions


def at_fixed_weights(moments: GradientMoments) -> GradientMoments:
    """Minibatch moments, their groups included, marked as measured while the weights stayed as they were."""
    drawn = None if moments.replicates is None else replace(moments.replicates, moving=False)
    groups = tuple(replace(group, replicates=drawn) for group in moments.groups)
    return replace(moments, replicates=drawn, groups=groups)


def _mean_loss(losses: Any, batch: Any, batch_size: int, model: nn.Module) -> Tensor:
    """Raises DataError for a loss that is no tensor, not finite or of another number of samples, MomentError for one
    without a gradient.
    """
    if not isinstance(losses, Tensor):
        raise DataError(f"loss_fn must return the batch's mean loss or per-sample losses, got {type(losses).__name__}")
    if losses.ndim and len(losses) != batch_size:
        raise DataError(
            f"a batch of {len(losses)} samples, but batch_size={batch_size}: all minibatches must have that size; "
            "leave out a shorter last one (drop_last=True)"
        )
    refuse_constant(losses)
    check_finite(losses, batch, model)
    return losses.mean()


@dataclass(eq=False)
class MinibatchMeter:
    """Accumulates the minibatch gradients of a training run at no cost.

    Call `observe(loss)` after `loss.backward()` and before `optimizer.step()`.

    Example:
        >>> model, x = nn.Linear(3, 1), torch.randn(8, 3)
        >>> meter = MinibatchMeter(model, nf.declare(model, "diagonal", [("weight", 0)]), batch_size=8)
        >>> loss = model(x).square().mean()
        >>> loss.backward()
        >>> meter.observe(float(loss.detach()))
        >>> meter.result().samples
        1
    """

    model: nn.Module
    syms: SymmetrySet
    batch_size: int
    dataset_size: int | None = None
    sampling: Sampling | None = None
    entries: bool = False
    groups: int = 16
    replicates: int = field(default=0, init=False)
    grouping: GroupPlan = field(init=False)
    _scalers: weakref.WeakSet[torch.amp.GradScaler] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        expect_model_and_symmetries("MinibatchMeter(model, syms, batch_size)", self.model, self.syms)
        self.model = unwrap(self.model)
        refuse_inference_tensors(self.syms.tensors_in(self.model), "gradient moments")
        SGDConfig(1.0, self.batch_size, dataset_size=self.dataset_size)
        self.params = trainable_parameters(self.model, self.syms.parameters)
        refuse_sharded(self.params, "minibatch gradients are then sharded too")
        self.grouping = GroupPlan(self.groups)
        self._sums = GroupSums(self.syms, needs_of(self.syms, self.params, self.entries))

    @property
    def loss(self) -> float:
        """Mean loss so far."""
        return self._sums.loss

    def observe(
        self, loss: float, gradients: Iterable[Tensor | None] | None = None, *, scale: float | None = None
    ) -> None:
        """Add one replicate.

        Args:
            loss: the batch's mean loss, for the record.
            gradients: its gradients, in the order of `params`; None takes the model's `.grad`.
            scale: what the gradients are to be divided by: `scaler.get_scale()` of a gradient scaler. None: they are
                taken as they are, and refused where a scaler seems to have scaled them.

        Raises:
            MomentError: no gradient reaches a parameter, or a gradient scaler has scaled the model's `.grad`.
        """
        refuse_evaluation(self.model, self.syms)
        if gradients is None and scale is None:
            self._refuse_scaled()
        given = [p.grad for p in self.params.values()] if gradients is None else list(gradients)
        missing = [n for n, g in zip(self.params, given, strict=True) if g is None]
        if missing:
            raise MomentError(f"no gradient reaches {missing}; freeze them and take syms.trainable(model)")
        placed = self.grouping.place(self.replicates)
        opened = self._sums.open(placed, in_place=True)
        (sums,) = opened.sums.values()
        for name, g in zip(self.params, given, strict=True):
            if g is not None:
                dense = g.detach().to_dense()
                sums.target(name).add_dense((dense if scale is None else dense / scale).unsqueeze(0))
                if placed.complete:
                    sums.settle([name], opened.totals)
        sums.samples += 1
        sums.loss += loss
        self._sums.close(opened)
        self.replicates += 1

    def _refuse_scaled(self) -> None:
        """Second moments of gradients times 65536 would be wrong by 4e9."""
        if self._scalers is None:
            self._scalers = weakref.WeakSet(scalers_alive())
        if any(awaits_unscaling(scaler) for scaler in self._scalers):
            raise MomentError(
                "a gradient scaler has scaled these gradients: call scaler.unscale_(optimizer) before observe(), or "
                "pass observe(loss, scale=scaler.get_scale()); scale=1.0 says that they are not scaled"
            )

    def result(self, ranks: Any = None) -> GradientMoments:
        """The moments so far, of all `ranks` if a process group is given.

        Raises DataError without a replicate, or for an epoch of more samples than the data hold.
        """
        sums = self._sums.over_ranks(ranks)
        if not sums.by_group:
            raise DataError("no batch to measure: the iterator of batches is empty")
        drawn = self.sampling or ("replacement" if self.dataset_size is None else "epoch")
        replicates = Replicates(self.batch_size, self.dataset_size, drawn)
        if replicates.of_mean(1) == 0:
            raise DataError(f"batches of all {self.dataset_size} samples have no noise; use smaller batches")
        count = sums.samples
        if drawn == "epoch" and self.dataset_size is not None and count * self.batch_size > self.dataset_size:
            raise DataError(
                f"{count} batches of {self.batch_size} are more than an epoch of dataset_size={self.dataset_size}: "
                "they share samples; give sampling='independent' or 'replacement', or measure one epoch"
            )
        moments = sums.moments(())
        groups = tuple(replace(group, replicates=replicates) for group in moments.groups)
        moments = replace(moments, replicates=replicates, groups=groups)
        return replace(moments, unresolved=unresolved(moments, self.syms))
