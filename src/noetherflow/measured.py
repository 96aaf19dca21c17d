"""A model's symmetries with one measurement of its gradient noise: the first stages of `analyze`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from noetherflow.core.inputs import LossFn
from noetherflow.core.optimizers import Settings
from noetherflow.core.tensors import tensors_of
from noetherflow.core.torch_internals import has_gradient_hooks
from noetherflow.core.unwrap import unwrap
from noetherflow.discovery import Certificate, certify, find_symmetries
from noetherflow.equilibrium import Equilibrium, noise_equilibrium
from noetherflow.moments import GradientMoments, gradient_moments, minibatch_moments
from noetherflow.moments.batch import tensors_in
from noetherflow.moments.batch_statistics import running_statistics, uses_batch_statistics
from noetherflow.symmetry.heads import with_scales
from noetherflow.symmetry.symmetry_set import SymmetrySet

BATCH_STATISTICS = "holds with batch statistics only: model.train()"


@dataclass(frozen=True, eq=False)
class MeasuredModel:
    """Symmetries, their certificate and one measurement; `again` measures at another point."""

    symmetries: SymmetrySet
    certificate: Certificate
    moments: GradientMoments
    again: Callable[[nn.Module], GradientMoments]

    def equilibrium(self, model: nn.Module, sgd: Settings, **options: Any) -> Equilibrium:
        """`noise_equilibrium` from this measurement, re-measured where that is needed; `options` go there."""
        return noise_equilibrium(model, self.symmetries, self.moments, sgd, remeasure=self.again, **options)


def measure(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    example_inputs: Any,
    *,
    scales: bool = False,
    certified: bool = True,
    progress: Callable[[str], None] = lambda stage: None,
) -> MeasuredModel:
    """The first stages of `analyze`: find and certify the symmetries, measure the gradient noise along them.

    With `scales` matrix symmetries are replaced by the scale of each block once they are certified. Without `certified`
    all that were found are measured, whether they hold or not, and the certificate has no rows.
    """
    progress("tracing the model")
    syms = find_symmetries(model, example_inputs).trainable(model)
    progress("certifying the symmetries" if certified else "leaving the certificate out")
    certificate = certify(model, syms, example_inputs) if certified else Certificate((), 0.0)
    syms = syms.without(certificate.refused)
    syms = with_scales(syms) if scales else syms
    progress("measuring gradient moments")
    if uses_batch_statistics(model.modules()):
        again = _by_minibatch(loss_fn, batches, syms)
        return MeasuredModel(syms, certificate, again(model), again)
    syms = syms.without(dict.fromkeys(running_statistics(syms), BATCH_STATISTICS))
    again = partial(gradient_moments, loss_fn=loss_fn, batches=batches, syms=syms, entries=True)
    return MeasuredModel(syms, certificate, again(model, parameters=_used(model, loss_fn, batches[0])), again)


def _used(model: nn.Module, loss_fn: LossFn, batch: Any) -> list[str]:
    """The trainable parameters that the loss of a batch depends on, but for those with hooks on their gradients."""
    named = {n: t for n, t in tensors_of(unwrap(model)).items() if t.requires_grad and not has_gradient_hooks(t)}
    if not named:
        return []
    found = torch.autograd.grad(loss_fn(model, batch).sum(), list(named.values()), allow_unused=True)
    return [n for n, g in zip(named, found, strict=True) if g is not None]


def _by_minibatch(loss_fn: LossFn, batches: Sequence[Any], syms: SymmetrySet) -> Callable[[nn.Module], GradientMoments]:
    """`minibatch_moments` of a model, each batch a replicate; batches of another size than the first are left out."""
    sizes = [samples_in(batch) for batch in batches]
    whole = [b for b, size in zip(batches, sizes, strict=True) if size == sizes[0]]
    return partial(minibatch_moments, loss_fn=loss_fn, batches=whole, syms=syms, batch_size=sizes[0], entries=True)


def samples_in(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor that has one."""
    return next((len(t) for t in tensors_in(batch) if t.ndim), 0)
