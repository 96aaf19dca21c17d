"""The largest stable learning rate of Adam today and at its noise equilibrium (theory.md sections 6 and 13)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.inputs import LossFn
from noetherflow.core.printing import show
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.preconditioned import PreconditionedHessian, moved_roots, roots_of, stable_rate
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.moments.result import GradientMoments


@dataclass(frozen=True)
class AdaptiveSharpness:
    """The curvature that Adam's steps meet, `D^1/2 H D^1/2`, today and at the equilibrium of the same function.

    Attributes:
        top_now, top_equilibrium: its largest eigenvalue.
        lr: the learning rate asked about.
        memory: `b1`.
    """

    top_now: float
    top_equilibrium: float
    lr: float
    memory: float

    @property
    def stable_lr_now(self) -> float:
        """Learning rates below are stable with full batches today."""
        return stable_rate(self.top_now, self.memory)

    @property
    def stable_lr_equilibrium(self) -> float:
        """The same at the equilibrium."""
        return stable_rate(self.top_equilibrium, self.memory)

    @property
    def load_now(self) -> float:
        """The learning rate over the largest stable one; below 1 it is stable."""
        return self.lr / self.stable_lr_now

    @property
    def load_equilibrium(self) -> float:
        """The same at the equilibrium."""
        return self.lr / self.stable_lr_equilibrium

    def __str__(self) -> str:
        change = self.stable_lr_equilibrium / self.stable_lr_now
        return (
            f"largest stable lr of Adam {show(self.stable_lr_now)} -> {show(self.stable_lr_equilibrium)} at the noise "
            f"equilibrium ({show(change)} times); lr {self.lr:g} is {show(self.load_now)} -> "
            f"{show(self.load_equilibrium)} of it\nassumes: full batches, v as the gradients are at each point and "
            "standing still; loss and function stay as they are meanwhile"
        )

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """The numbers, with the stable rates and loads."""
        derived = ("stable_lr_now", "stable_lr_equilibrium", "load_now", "load_equilibrium")
        return {**asdict(self), **{n: getattr(self, n) for n in derived}}


def adaptive_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    eq: Equilibrium,
    moments: GradientMoments,
    config: AdamConfig,
) -> AdaptiveSharpness:
    """Adam's stable rate now and at `eq`: two Lanczos runs, the second on a moved copy.

    Args:
        model: where the moments were measured; left as it is.
        loss_fn: `loss_fn(model, batch)` gives one loss per sample, `[batch]`.
        batches: the data.
        eq: where the flow ends.
        moments: with `entries=True`; root mean squares move along the orbit as gradients do.
        config: Adam's settings.

    Raises:
        DataError: an unusable loss.
        MomentError: no entry-wise moments.

    Source: theory.md sections 6 and 13.
    """
    data, roots = list(batches), roots_of(moments, config)
    moved = copy.deepcopy(model)
    for s in eq.symmetries:
        s.act_(tensors_of(moved), eq[s.name].element)
    there = moved_roots(roots, eq.symmetries, eq.elements)
    return AdaptiveSharpness(
        top_now=PreconditionedHessian.of(model, loss_fn, data, roots, config).top(),
        top_equilibrium=PreconditionedHessian.of(moved, loss_fn, data, there, config).top(),
        lr=config.lr,
        memory=config.betas[0],
    )
