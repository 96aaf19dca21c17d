"""`analyze`: find, certify, measure, forecast and settle in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from noetherflow.core.inputs import LossFn
from noetherflow.core.optimizers import Settings, check_settings
from noetherflow.discovery import Certificate, certify, find_symmetries
from noetherflow.equilibrium import Equilibrium, noise_equilibrium
from noetherflow.equilibrium.charge_flow import norm_where
from noetherflow.equilibrium.flow import Flow, noether_flow
from noetherflow.moments import GradientMoments, gradient_moments, minibatch_moments
from noetherflow.moments.batch import tensors_in
from noetherflow.moments.batch_statistics import running_statistics, uses_batch_statistics
from noetherflow.symmetry.symmetry_set import SymmetrySet

BATCH_STATISTICS = "holds with batch statistics only: model.train()"


@dataclass(frozen=True, eq=False)
class Analysis:
    """What the symmetries of one model do under one optimiser, from one measurement."""

    symmetries: SymmetrySet
    certificate: Certificate
    moments: GradientMoments
    flow: Flow
    equilibrium: Equilibrium
    sgd: Settings

    def rows(self) -> list[dict[str, Any]]:
        """`Flow.families` with the number of charges and the equilibrium charge of the joint solution."""
        return [self._family(row) for row in self.flow.families()]

    def _family(self, row: dict[str, Any]) -> dict[str, Any]:
        family = row["family"]
        settled = [(self.equilibrium[r.name].charge, r.finite) for r in self.flow.details if r.family == family]
        return {
            "family": family,
            "charges": self.symmetries.filter(family=family).n_charges(exclude=()),
            **row,
            "equilibrium charge, joint": norm_where(settled),
        }

    def __str__(self) -> str:
        return "\n\n".join(str(part) for part in (self.symmetries, self.certificate, self.flow, self.equilibrium))

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        return {
            "families": self.rows(),
            "symmetries": self.symmetries.to_dict(),
            "certificate": self.certificate.to_dict(),
            "flow": self.flow.to_dict(),
            "equilibrium": self.equilibrium.to_dict(),
            "samples": self.moments.samples,
        }


def analyze(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    sgd: Settings,
    example_inputs: Any,
    *,
    approximate: bool = True,
    progress: Callable[[str], None] = lambda stage: None,
) -> Analysis:
    """Find and certify the model's symmetries, measure the gradient noise along them, forecast and solve.

    `loss_fn(model, batch)` returns per-sample losses `[batch]`; `batches` can be iterated more than once. Symmetries on
    frozen parameters and those whose certificate says broken are excluded and listed; a model that uses batch
    statistics (BatchNorm in training mode) is measured by its minibatches, and in evaluation mode without the
    symmetries that hold with batch statistics only; with `approximate=False` the
    equilibrium leaves those in place that a normalisation's eps makes approximate. `progress` hears each stage.

    Raises the errors of the stages: ExportError, MomentError, DataError.
    """
    check_settings(sgd)
    measured = measure(model, loss_fn, batches, example_inputs, progress=progress)
    progress("integrating the Noether flow")
    flow = noether_flow(model, measured.symmetries, measured.moments, sgd)
    progress("solving for the noise equilibrium")
    eq = measured.equilibrium(model, sgd, approximate=approximate)
    return Analysis(measured.symmetries, measured.certificate, measured.moments, flow, eq, sgd)


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
    progress: Callable[[str], None] = lambda stage: None,
) -> MeasuredModel:
    """The first stages of `analyze`: find and certify the symmetries, measure the gradient noise along them."""
    progress("tracing the model")
    syms = find_symmetries(model, example_inputs).trainable(model)
    progress("certifying the symmetries")
    certificate = certify(model, syms, example_inputs)
    syms = syms.without(certificate.refused)
    progress("measuring gradient moments")
    if uses_batch_statistics(model.modules()):
        again = _by_minibatch(loss_fn, batches, syms)
    else:
        syms = syms.without(dict.fromkeys(running_statistics(syms), BATCH_STATISTICS))
        again = partial(gradient_moments, loss_fn=loss_fn, batches=batches, syms=syms, entries=True)
    return MeasuredModel(syms, certificate, again(model), again)


def _by_minibatch(loss_fn: LossFn, batches: Sequence[Any], syms: SymmetrySet) -> Callable[[nn.Module], GradientMoments]:
    """`minibatch_moments` of a model, each batch a replicate; batches of another size than the first are left out."""
    sizes = [next((len(t) for t in tensors_in(batch) if t.ndim), 0) for batch in batches]
    whole = [b for b, size in zip(batches, sizes, strict=True) if size == sizes[0]]
    return partial(minibatch_moments, loss_fn=loss_fn, batches=whole, syms=syms, batch_size=sizes[0], entries=True)
