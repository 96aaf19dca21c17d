"""`analyze` and `diagnose`: from a model, its loss, its data and its optimiser to numbers and to plain words."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from noetherflow.core.arguments import A_MODEL, expect
from noetherflow.core.held import moving_groups, others_frozen, peak_rate
from noetherflow.core.inputs import LossFn
from noetherflow.core.losses import chosen_loss
from noetherflow.core.optimizers import Settings, check_settings, described, optimizer_config
from noetherflow.core.printing import count, legend_lines
from noetherflow.core.progress import Stages
from noetherflow.core.schedule import Schedule
from noetherflow.core.settings import SGDConfig
from noetherflow.core.shown import Shown
from noetherflow.core.unwrap import unwrap, unwrap_optimizer
from noetherflow.diagnosis.curvature import Curvature, curvature_of, remedy, wants_curvature
from noetherflow.diagnosis.examined import Examined
from noetherflow.diagnosis.finding import Diagnosis
from noetherflow.diagnosis.of_model import diagnose_measurement
from noetherflow.diagnosis.scheduled import at_peak, planned_warmup
from noetherflow.diagnosis.unanswered import Unanswered, attempted, known
from noetherflow.discovery import Certificate
from noetherflow.equilibrium import Equilibrium, noise_equilibrium, result
from noetherflow.equilibrium import flow as flows
from noetherflow.equilibrium.charge_flow import norm_where
from noetherflow.equilibrium.flow import Flow, noether_flow
from noetherflow.equilibrium.roots import NoiseLaw
from noetherflow.errors import DataError, MomentError, SampleNumberError
from noetherflow.measured import MeasuredModel, batches_of, inputs_of, measure, samples_in
from noetherflow.moments import GradientMoments
from noetherflow.moments.batch_statistics import uses_batch_statistics
from noetherflow.symmetry import symmetry_set
from noetherflow.symmetry.symmetry_set import SymmetrySet

SAMPLES, MOST, CURVED = 2048, 65536, 128
REPLICATES, MOST_REPLICATES = 12, 256
"""Samples taken from a loader for gradients, how many at most, and of these for curvature; minibatches per
`1 - momentum` where each is one replicate (batch statistics), for which a loader is gone through again, and at most.
"""
STEPS, EPOCHS = 1000, 10
"""Length of the run looked at where none is given: so many epochs of the loader, at least so many steps."""


@dataclass(frozen=True, eq=False)
class Analysis(Shown):
    """What the symmetries of one model do under one optimiser, from one measurement.

    Attributes:
        symmetries: found, certified and measured.
        certificate: the numerical proof of each.
        moments: of the gradients.
        found_flow, found_equilibrium: how charges change per step, and where that ends; in place of each an
            `Unanswered` with the reason where the moments do not determine it. `.flow` and `.equilibrium` are the
            results themselves.
        sgd: the optimiser's settings.
        curvature: what becomes of sharpness and the stable learning rate (SGD; today's alone where the equilibrium is
            not known), or whether Adam's `v` is slow enough and its largest stable learning rate; None where it was not
            measured.
        diagnosis: what all that means, in plain words.
    """

    symmetries: SymmetrySet
    certificate: Certificate
    moments: GradientMoments
    found_flow: Flow | Unanswered
    found_equilibrium: Equilibrium | Unanswered
    sgd: Settings
    curvature: Curvature
    diagnosis: Diagnosis

    @property
    def flow(self) -> Flow:
        """How charges change per step.

        Raises:
            MomentError: the moments do not determine it; the reason and the remedy.
        """
        return known(self.found_flow)

    @property
    def equilibrium(self) -> Equilibrium:
        """Where that ends.

        Raises:
            MomentError: the moments do not determine it; the reason and the remedy.
        """
        return known(self.found_equilibrium)

    @property
    def unanswered(self) -> tuple[Unanswered, ...]:
        """What the moments do not determine, each reason once; empty where all is known."""
        parts = (self.found_flow, self.found_equilibrium)
        return tuple({str(part.cause): part for part in parts if isinstance(part, Unanswered)}.values())

    def rows(self) -> list[dict[str, Any]]:
        """`Flow.families` with the number of charges and the equilibrium charge of the joint solution; none where these
        are not known.
        """
        if self.unanswered:
            return []
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

    def table_rows(self) -> list[dict[str, Any]]:
        """`rows()`."""
        return self.rows()

    def describe(self, *, verbose: bool = False, legend: bool = True) -> str:
        """The parts one after another, the meaning of their columns once at the end; see `Shown.describe`."""
        found = f"{count(len(self.symmetries), 'symmetry', 'symmetries')} under {described(self.sgd)}: "
        first = found + (self._settling() if not self.unanswered else "where they settle is not known")
        results = (self.symmetries, self.certificate, self.found_flow, self.found_equilibrium)
        parts = [part for part in results if not isinstance(part, Unanswered)]
        below = (*symmetry_set.EXPLAINED, "outputs changed by", "gradients off by", *flows.EXPLAINED, *result.EXPLAINED)
        texts = [part.describe(verbose=verbose, legend=False) for part in parts]
        texts += [f"{part.title} Remedy: {part.advice}" for part in self.unanswered]
        texts += [str(part) for part in (self.curvature, self.diagnosis) if part is not None]
        return "\n\n".join([first, *texts, *(["\n".join(legend_lines(*dict.fromkeys(below)))] if legend else [])])

    def _settling(self) -> str:
        """How many symmetries settle, in words."""
        return f"{sum(s.classification == 'finite' for s in self.equilibrium):,} settle at a noise equilibrium"

    def to_dict(self) -> dict[str, Any]:
        flow, equilibrium = self.found_flow, self.found_equilibrium
        return {
            "families": self.rows(),
            "symmetries": self.symmetries.to_dict(),
            "certificate": self.certificate.to_dict(),
            "flow": None if isinstance(flow, Unanswered) else flow.to_dict(),
            "equilibrium": None if isinstance(equilibrium, Unanswered) else equilibrium.to_dict(),
            "unanswered": [str(part.cause) for part in self.unanswered],
            "samples": self.moments.samples,
            "curvature": None if self.curvature is None else self.curvature.to_dict(),
            "diagnosis": self.diagnosis.to_dict(),
        }


def diagnose(
    model: nn.Module,
    loss_fn: LossFn | nn.Module | None,
    loader: Iterable[Any],
    optimizer: Any,
    example_inputs: Any = None,
    *,
    steps: int | None = None,
    warmup: int | None = None,
    schedule: Schedule | None = None,
    **options: Any,
) -> Diagnosis:
    """What this model and this optimiser will do to each other, in plain words: what to change, what to watch.

    Args:
        model: the model, in the mode in which it is trained; left as it is.
        loss_fn: `loss_fn(model, batch)` with one loss per sample, a criterion such as `nn.CrossEntropyLoss()` for
            batches `(inputs, targets)`, or None for batches with `labels` (transformers).
        loader: a DataLoader, or a list of batches.
        optimizer: of torch (SGD, Adam, AdamW, RMSprop, Lion), or `nf.SGDConfig`, `nf.AdamConfig`, `nf.LionConfig`.
        example_inputs: what `find_symmetries` takes; by default the inputs of the first batch.
        steps: of training still to come; by default ten epochs, at least 1000.
        warmup: steps of learning rate warmup planned, to have their number checked.
        schedule: of the learning rate over these steps: a torch scheduler that is stepped after every optimiser step
            (it is copied and goes on from where it stands), a function from the number of the step to the rate, or the
            rates of all steps. Warmup, weight decay, and how far norms and layers get then follow it, not one rate.
        options: as in `analyze`.

    Returns:
        A Diagnosis: print it for an answer to each question, read `.changes` for what to do.

    Raises:
        ExportError, MomentError, DataError: of the stages of `analyze`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(8)]
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.5))
        >>> nf.diagnose(model, nn.CrossEntropyLoss(), data, optimizer)["memory-of-squares"].severity
        'act'

    Source: docs/diagnosis.md.
    """
    return analyze(
        model, loss_fn, loader, optimizer, example_inputs, steps=steps, warmup=warmup, schedule=schedule, **options
    ).diagnosis


def analyze(
    model: nn.Module,
    loss_fn: LossFn | nn.Module | None,
    batches: Iterable[Any],
    sgd: Any,
    example_inputs: Any = None,
    *,
    steps: int | None = None,
    warmup: int | None = None,
    schedule: Schedule | None = None,
    batch_size: int | None = None,
    samples: int | None = None,
    curvature: bool | None = None,
    approximate: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Analysis:
    """Find and certify the model's symmetries, measure the gradient noise along them, forecast, settle and diagnose.

    It chooses by itself how to measure. Symmetries on
    frozen parameters and those whose certificate says broken are excluded and listed; a model that uses batch
    statistics (BatchNorm in training mode) is measured by its minibatches, and in evaluation mode without the
    symmetries that hold with batch statistics only. Under Adam and Lion matrix symmetries count by the scale of each
    head. There are many parameters because each choice can be overruled.

    Args:
        model: the model, in the mode in which it is trained; left as it is.
        loss_fn: `loss_fn(model, batch)` with per-sample losses `[batch]`, a criterion for batches `(inputs, targets)`,
            or None for batches with `labels`.
        batches: a DataLoader, or a list of batches (all of a list is measured).
        sgd: the optimiser, or its settings (`nf.SGDConfig` and the like).
        example_inputs: what `find_symmetries` takes; by default the inputs of the first batch.
        steps: of training still to come, for the diagnosis.
        warmup: steps of warmup planned, for the diagnosis.
        schedule: of the learning rate over these steps, as in `diagnose`; the flow is that at its largest rate.
        batch_size: samples per optimiser step, where it is not the loader's (accumulation, several devices).
        samples: how many to take from a loader; by default 2,048, and as many as tell the mean gradient from noise.
        curvature: measure sharpness; by default up to two million trainable entries.
        approximate: False leaves those symmetries in place that a normalisation's eps makes approximate.
        progress: hears each stage; by default standard error does, from the third second on.

    Returns:
        An Analysis; print it, or look at `.diagnosis`, `.flow`, `.equilibrium`, `.moments.noise_scale()`.

    Raises:
        ExportError, MomentError, DataError: of the stages.
    """
    _check_call(model, loss_fn, batches, steps, warmup)
    steps = len(schedule) if steps is None and isinstance(schedule, Sized) else steps
    ahead = _steps_ahead(batches, steps, warmup)
    optimizer, course = at_peak(sgd, schedule, ahead)
    planned = planned_warmup(warmup, course)
    settings = settings_of(optimizer, batches, batch_size, model)
    wanted = max(SAMPLES, math.ceil(_told_apart(settings))) if samples is None else samples
    data = batches_of(batches, wanted, _replicates(settings) if uses_batch_statistics(model.modules()) else 1)
    loss = chosen_loss(loss_fn, model, data[0])
    inputs = inputs_of(data[0]) if example_inputs is None else example_inputs
    scales = not isinstance(settings, SGDConfig) or bool(settings.groups)
    with others_frozen(model, optimizer), Stages("analysis") if progress is None else nullcontext(progress) as say:
        measured = measure(model, loss, data, inputs, scales=scales, progress=say)
        say("integrating the Noether flow")
        flow = attempted(lambda: noether_flow(model, measured.symmetries, measured.moments.without_factors(), settings))
        say("solving for the noise equilibrium")
        eq = attempted(lambda: _settled(measured, model, settings, approximate))
        say("measuring curvature" if wants_curvature(model, curvature) else "leaving curvature out")
        found = curvature_of(measured.moments, model, loss, _some(data), flow, eq, settings, curvature)
        examined = Examined(
            model=unwrap(model),
            symmetries=measured.symmetries,
            refused=measured.certificate.refused,
            moments=measured.moments,
            flow=flow,
            equilibrium=eq,
            settings=settings,
            curvature=found,
            steps=ahead,
            warmup=planned,
            started=bool(getattr(sgd, "state", None)),
            steps_given=steps is not None,
            remedy=remedy(model, settings, curvature),
            uncertified=measured.uncertified,
            seen=measured.seen,
            course=course,
        )
        diagnosis = diagnose_measurement(examined)
    return Analysis(measured.symmetries, measured.certificate, measured.moments, flow, eq, settings, found, diagnosis)


def _check_call(model: Any, loss_fn: Any, batches: Any, steps: int | None, warmup: int | None) -> None:
    """Raises DataError for arguments of another kind, named, and for lengths that are no numbers of steps."""
    call = "analyze(model, loss_fn, batches, optimizer)"
    expect(call, "model", model, nn.Module, A_MODEL)
    expect(call, "batches", batches, Iterable, "a DataLoader or a list of batches")
    if loss_fn is not None and not callable(loss_fn):
        expect(call, "loss_fn", loss_fn, Callable, "loss_fn(model, batch), a criterion, or None")
    if isinstance(batches, Sequence) and not len(batches):
        raise DataError("there are no batches; give at least one")
    for name, given, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if given is not None and not (isinstance(given, int) and given >= least):
            raise DataError(f"{name} must be a whole number of steps, at least {least}, got {given!r}")


def _settled(measured: MeasuredModel, model: nn.Module, settings: Settings, approximate: bool) -> Equilibrium:
    """The joint equilibrium; that of each symmetry with the others held where one measurement does not determine it."""
    try:
        return noise_equilibrium(model, measured.symmetries, measured.moments, settings, approximate=approximate)
    except SampleNumberError:
        raise
    except MomentError:
        return measured.equilibrium(model, settings, approximate=approximate, joint=False)


def settings_of(optimizer: Any, batches: Iterable[Any], batch_size: int | None, model: nn.Module) -> Settings:
    """The optimiser's settings at the largest learning rate of its schedule, as far as that is written in its groups.

    Raises:
        DataError: neither settings nor an optimiser that the theory covers, or one of another model.
    """
    if not hasattr(optimizer, "param_groups"):
        check_settings(optimizer)
        settings: Settings = optimizer
        return settings
    inner = unwrap_optimizer(optimizer)
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in inner.param_groups for p in group["params"]):
        raise DataError("the optimizer holds no parameter of this model: it is another model's, or another copy's")
    size = batch_size or getattr(batches, "batch_size", None) or samples_in(next(iter(batches)))
    at_peak = copy.copy(inner)
    at_peak.param_groups = [{**g, "lr": peak_rate(g)} for g in moving_groups(inner.param_groups)]
    if not isinstance(batches, DataLoader):
        return optimizer_config(at_peak, size, model=model)
    try:
        return optimizer_config(at_peak, size, batches, model=model)
    except DataError as cause:
        if "loader draws" not in str(cause):
            raise
        return optimizer_config(at_peak, size, model=model)


def _replicates(settings: Settings) -> int:
    """How many minibatches tell noise from the mean gradient, which momentum counts `1 / (1 - m)` times as much."""
    return min(MOST_REPLICATES, round(REPLICATES / (1 - _memory(settings))))


def _told_apart(settings: Settings) -> float:
    """The samples from which on an equilibrium is not refused (`refuse_too_few`): as many minibatches as the optimiser
    counts a squared mean gradient times, at most the data set.
    """
    law = NoiseLaw.of(settings)
    needed = law.mean / law.white * settings.batch_size if law.white else math.inf
    return min(needed, settings.dataset_size or math.inf, MOST)


def _memory(settings: Settings) -> float:
    """The share of its average gradient that an optimiser keeps from step to step."""
    return settings.momentum if isinstance(settings, SGDConfig) else settings.betas[0]


def _steps_ahead(batches: Iterable[Any], steps: int | None, warmup: int | None) -> int:
    """The steps looked at: as given, else so many epochs of a loader; never fewer than the warmup asked about.

    Raises:
        DataError: the warmup given is longer than the steps given.
    """
    if steps is not None:
        if warmup is not None and warmup > steps:
            raise DataError(
                f"warmup={warmup:,} is longer than the run, steps={steps:,}: give the steps of the whole run"
            )
        return steps
    sized = isinstance(batches, DataLoader) and hasattr(batches, "__len__")
    return max(STEPS, warmup or 0, EPOCHS * len(batches) if sized else 0)  # type: ignore[arg-type]


def _some(data: Sequence[Any]) -> list[Any]:
    """The batches that curvature is measured on."""
    return list(islice(data, max(1, CURVED // max(1, samples_in(data[0])))))
