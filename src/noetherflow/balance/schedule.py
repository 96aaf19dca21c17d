"""Balance a model at given steps of its training, with any optimiser."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from noetherflow.balance.model import BalanceReport, balance_
from noetherflow.core.inputs import LossFn
from noetherflow.core.settings import SGDConfig
from noetherflow.core.unwrap import unwrap, unwrap_optimizer
from noetherflow.equilibrium import noise_equilibrium
from noetherflow.errors import DataError
from noetherflow.moments import GradientMoments, gradient_moments
from noetherflow.moments.distributed import ranks_of
from noetherflow.symmetry.symmetry_set import SymmetrySet


class BalanceSchedule:
    """`theta -> G* theta` after the given optimiser steps: the noise equilibrium of that moment, the function kept.

    Call `after_step(step)` after every `optimizer.step()`, before the next `backward()`; steps count from 1.

    - `batches`: measured at every balancing, in evaluation mode; `loss_fn(model, batch)` gives per-sample losses
      `[batch]` as in `gradient_moments`.
    - `steps`: a collection of steps, or a number `k` for every k-th step.
    - `sgd`: the settings whose noise is balanced. With another optimiser they say which SGD is meant; not needed for
      objectives without one (`objective="norm"`).
    - `optimizer`: one or several; their state moves with the weights, as in `balance_`.
    - `options` go to `noise_equilibrium` (`objective`, `approximate`, `tol`, ...).

    `reports` keeps the report of every balancing by step. Under DistributedDataParallel every rank measures its own
    `batches`, all move to the equilibrium of their union, and every rank must call `after_step`.

    Raises DataError for `steps` below 1 or no batch; while training the errors of `gradient_moments`,
    `noise_equilibrium` and `balance_`, the model untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        syms: SymmetrySet,
        loss_fn: LossFn,
        batches: Sequence[Any],
        steps: Collection[int] | int,
        *,
        sgd: SGDConfig | None = None,
        optimizer: Any = None,
        example_inputs: Any = None,
        **options: Any,
    ) -> None:
        wanted = [steps] if isinstance(steps, int) else list(steps)
        if not wanted or min(wanted) < 1:
            raise DataError(f"steps must be a number of at least 1 or a collection of such, got {steps!r}")
        if not batches:
            raise DataError("BalanceSchedule needs at least one batch to measure the gradient noise on")
        self.model = unwrap(model)
        self.process_group = ranks_of(model, None)
        self.syms = syms.trainable(self.model)
        self.loss_fn = loss_fn
        self.batches = batches
        self.steps = steps if isinstance(steps, int) else frozenset(steps)
        self.sgd = sgd
        given = [] if optimizer is None else optimizer if isinstance(optimizer, Sequence) else [optimizer]
        self.optimizers = [unwrap_optimizer(o) for o in given]
        self.example_inputs = example_inputs
        self.options = options
        self.reports: dict[int, BalanceReport] = {}

    def due(self, step: int) -> bool:
        """Whether the model is balanced after this step."""
        return step > 0 and step % self.steps == 0 if isinstance(self.steps, int) else step in self.steps

    def after_step(self, step: int) -> BalanceReport | None:
        """Balance if `step` is due and was not balanced before; None otherwise."""
        if not self.due(step) or step in self.reports:
            return None
        self.reports[step] = self.balance()
        return self.reports[step]

    def balance(self) -> BalanceReport:
        """Measure, solve and move now."""
        modes = {m: m.training for m in self.model.modules()}
        self.model.eval()
        try:
            moments = self._measure(self.model)
            eq = noise_equilibrium(self.model, self.syms, moments, self.sgd, remeasure=self._measure, **self.options)
            return balance_(self.model, eq, self.optimizers, example_inputs=self.example_inputs)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _measure(self, model: nn.Module) -> GradientMoments:
        moved = [leg.parameter for s in self.syms for leg in s.weight_legs]
        meeting = len(moved) > len(set(moved))
        return gradient_moments(
            model, self.loss_fn, self.batches, self.syms, entries=meeting, process_group=self.process_group
        )
