"""The completeness check: on every new way through a model, rules against autograd, and samples against each other.

Two backwards over the same batch, from one forward where its graph can be used twice, else from two with the same
random numbers. The first weights sample `i`'s loss by a random `c_i` and lets autograd differentiate every operand as
well: the rules' summed gradient must equal autograd's. In the second, the measuring one, the output gradient of sample
`i` must come out `1 / c_i` times as large, wherever the rule takes sample `i` to lie: that finds the sample axis, and
proves that samples do not act on each other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core.tensors import gathered
from noetherflow.core.torch_internals import unseen_by_modes
from noetherflow.errors import MomentError
from noetherflow.moments.batch import (
    Backward,
    BatchPass,
    Subject,
    buffers_kept,
    check_finite,
    form_of,
    forward,
)
from noetherflow.moments.conditions import Conditions, random_states
from noetherflow.moments.distributed import over_ranks
from noetherflow.moments.forms import Form
from noetherflow.moments.layout import WHOLE_BATCH, SampleLayout
from noetherflow.moments.origins import Source
from noetherflow.moments.result import all_finite
from noetherflow.moments.rules import Site
from noetherflow.moments.sizes import largest_row, size_of
from noetherflow.moments.taps import CallId, Recorder, Trace, Use
from noetherflow.moments.target import wide

# Other samples' share of a sample's output gradient that passes for rounding; models that cast to float32 inside are
# no more exact than that in float64.
INDEPENDENCE = {torch.float64: 1e-6, torch.float32: 2e-3}


def independence(model: nn.Module, dtype: torch.dtype) -> float:
    """The limit for an output gradient of `dtype`: no finer than the least precise parameter it may have come through
    (float32 adapters on a bfloat16 base).
    """
    dtypes = {dtype, *(p.dtype for p in model.parameters())}
    return max(INDEPENDENCE.get(d, 1e-1) for d in dtypes)


def tolerance(dtype: torch.dtype) -> float:
    """Relative rounding allowed between two ways of summing the same gradient."""
    return {torch.float64: 1e-9, torch.float32: 2e-4}.get(dtype, 5e-2)


def signature(trace: Trace, samples: int, span: int) -> tuple[Any, ...]:
    return tuple(u.key(samples, span) for u in trace.uses)


def random_weights(losses: Tensor) -> Tensor:
    """`c_i` in [0.5, 1.5], without touching the global random state."""
    rng = torch.Generator("cpu").manual_seed(0x5EED)
    return (0.5 + torch.rand(losses.shape, generator=rng, dtype=torch.float64, device="cpu")).to(losses)


@dataclass(frozen=True, eq=False)
class RandomState:
    """The states of the global random generators: Python's, NumPy's and torch's."""

    python: Any
    numpy: Any
    torch: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> RandomState:
        return cls(random.getstate(), np.random.get_state(), random_states())  # noqa: NPY002

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.torch[0])
        for device, state in enumerate(self.torch[1:]):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Leave the random states (torch, NumPy, Python) as found, so that a second forward draws the same numbers."""
    before = RandomState.now()
    try:
        yield
    finally:
        before.restore()


def _direction(size: int, like: Tensor) -> Tensor:
    """One fixed direction."""
    return torch.sin(1.0 + 7.3 * torch.arange(size, dtype=torch.float64, device=like.device)).to(like.dtype)


def _projected(rows: Tensor) -> Tensor:
    """Each row of a matrix on one fixed direction: `[rows]`, in the type of the matrix, under autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ _direction(rows.shape[1], rows)


@dataclass(frozen=True, eq=False)
class Shadow:
    """What two passes compare of an output gradient `delta`: its entries, or where no samples can lie on the last axis,
    its feature vectors projected on one direction.

    Example: of `[16, 128, 256]`, 16 samples of 128 tokens with 256 features, `thin` is `[16, 128]`.
    """

    delta: Tensor
    thin: Tensor

    @classmethod
    def of(cls, use: Use, delta: Tensor) -> Shadow:
        delta = delta.to(wide(delta.dtype))
        if delta.ndim < 2 or delta.ndim - 1 in use.axes:
            return cls(delta, delta)
        return cls(delta, _projected(delta.reshape(-1, delta.shape[-1])).view(delta.shape[:-1]))

    def by_sample(self, layout: SampleLayout, samples: int) -> Tensor:
        """Each sample's output gradient on one fixed direction: `[samples]`, float64."""
        return _projected(layout.front(self.thin, samples).reshape(samples, -1).double())

    def scale(self, layout: SampleLayout, samples: int) -> Tensor:
        """The norm that sets the rounding error of `by_sample`."""
        rows = layout.front(self.delta, samples).reshape(samples, -1)
        directions = [self.thin.numel() // samples] + ([self.delta.shape[-1]] if self.thinned else [])
        lengths = [_direction(size, self.thin).double().norm() for size in directions]
        return largest_row(rows) * torch.stack(lengths).prod()

    @property
    def thinned(self) -> bool:
        return self.thin is not self.delta

    def rows(self) -> Tensor:
        """Every feature vector on one fixed direction: `[rows]`, float64."""
        if self.thinned:
            return self.thin.flatten().double()
        return _projected(self.delta.reshape(-1, self.delta.shape[-1])).double()


PROBES = 4
"""Random vectors that a large matrix is multiplied by, in place of comparing it entry by entry."""


@dataclass(frozen=True, eq=False)
class Total:
    """The summed gradient of one operand by its rule, its size without cancellation, and the output gradient's dtype.

    Under autocast autograd multiplies in that dtype.
    """

    total: Tensor
    scale: Tensor
    dtype: torch.dtype

    def agrees(self, expected: Tensor, size: Tensor) -> bool:
        """Whether autograd's gradient, of norm `size`, is the same up to rounding.

        Where terms cancel, what is left may be no more than their roundings, `eps` times `scale` each.
        """
        rounding = max(1e-2 * tolerance(self.dtype), 2 * torch.finfo(self.dtype).eps)
        return bool(self.distance(expected) <= tolerance(self.dtype) * size + rounding * self.scale.double())

    def distance(self, expected: Tensor) -> Tensor:
        """How far the two are apart, in the Frobenius norm."""
        return size_of(self.total - expected)


@dataclass(frozen=True, eq=False)
class ProbedTotal(Total):
    """The same of a large matrix, known by its products with random vectors (Freivalds' check).

    Four Gaussian vectors scaled by 1/2 keep the norm of any difference on average, and shrink it below a thousandth of
    that with a probability of at most 2e-12: what two full matrices would show, these show too, at the price of four of
    their columns. `total` holds the products, `[m, 4]`; `probes` the vectors, `[n, 4]`.
    """

    probes: Tensor

    @classmethod
    def of(cls, form: Form, columns: int, scale: Tensor, dtype: torch.dtype) -> ProbedTotal:
        """The products of the sum over all samples of a form whose matrix has so many columns."""
        rng = torch.Generator("cpu").manual_seed(0xF1E1)
        drawn = torch.randn(columns, PROBES, generator=rng, dtype=torch.float64, device="cpu")
        total = form.total_times(drawn / PROBES**0.5)
        return cls(total, scale, dtype, (drawn / PROBES**0.5).to(total))

    def distance(self, expected: Tensor) -> Tensor:
        return size_of(self.total - expected.reshape(len(self.total), -1).to(self.total.dtype) @ self.probes)


def total_of(site: Site, delta: Tensor, saved: tuple[Tensor, ...]) -> Total:
    """What the rule of an operand makes of the gradients of all samples together, which needs no layout."""
    form = form_of(site, WHOLE_BATCH, 1, delta, saved)
    scale = form.scale() if site.cancelled is None else form.scale() + site.cancelled(delta, *saved)
    if form.columns is not None:
        return ProbedTotal.of(form, form.columns, scale, delta.dtype)
    return Total(form.total(), scale, delta.dtype)


@dataclass(frozen=True)
class Agreement:
    """What comparing an operand's gradient by rule with autograd's gave: whether autograd's has no NaN or inf, and
    whether the two agree.
    """

    finite: bool
    agrees: bool

    @classmethod
    def on(cls, expected: Tensor, total: Total | None) -> Agreement:
        """Compare autograd's gradient with the rule's; None if the rule gave none."""
        expected = gathered(expected).to_dense()
        size = size_of(expected)
        finite = bool(torch.isfinite(size)) or all_finite(expected)
        return cls(finite, total is not None and total.agrees(expected, size))


@dataclass(eq=False)
class WeightedPass(BatchPass):
    """The first pass: sample `i`'s loss is weighted by `c_i`, and autograd differentiates every operand as well.

    `uncovered`: parameters left to the fallback, with the reason. `newly_shared`: calls in whose output no axis can
    hold the samples, so that it must be one output for all of them. `projections`: by use, the weighted output gradient
    of each sample on one direction, for every way in which samples may lie. `rows`: the same of every feature vector.
    `totals`: by use and operand, the gradient summed by rule. `agreements`: likewise, how it compares with
    autograd's, taken as it arrives, so that all gradients are never held at once. `conditions`: how the model ran.
    """

    subject: Subject
    batch: Any
    shared: frozenset[CallId]
    uncovered: dict[str, str] = field(default_factory=dict)
    newly_shared: set[CallId] = field(default_factory=set)
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    projections: dict[CallId, list[tuple[SampleLayout, Tensor]]] = field(default_factory=dict)
    rows: dict[CallId, Tensor] = field(default_factory=dict)
    totals: dict[tuple[CallId, int], Total] = field(default_factory=dict)
    agreements: dict[tuple[CallId, int], Agreement] = field(default_factory=dict)
    before: tuple[Tensor, ...] = field(default_factory=random_states)
    conditions: Conditions = field(default_factory=Conditions, init=False)
    leaf: bool = field(default=True, init=False)

    def begin(self, losses: Tensor, recorder: Recorder) -> Tensor | None:
        self.conditions = Conditions.of(self.subject.model, losses, self.before)
        check_finite(losses, self.batch, self.subject.model)
        self.uncovered.update({n: ", ".join(sorted(ops)) for n, ops in recorder.trace.uncovered.items()})
        for use in recorder.trace.uses:
            if use.layouts(losses.numel(), self.subject.sample_axes):
                continue
            if use.certain:
                self.uncovered.update(dict.fromkeys(use.names, f"{use}: no sample axis"))
            else:
                self.newly_shared.add(use.id)
        self.newly_shared.update(over_ranks(self.newly_shared, self.subject.together))
        if self.newly_shared:
            return None
        for use in recorder.trace.uses:
            for k, leaf in enumerate(use.leaves):
                leaf.register_hook(partial(self._judge, (use.id, k)))  # type: ignore[no-untyped-call]
        self.weights = random_weights(losses)
        return self.weights

    def receive(self, use: Use, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
        if not use.leaves[0].requires_grad:
            return
        samples, shadow = self.weights.numel(), Shadow.of(use, delta)
        layouts = use.layouts(samples, self.subject.sample_axes)
        self.projections[use.id] = [(layout, shadow.by_sample(layout, samples)) for layout in layouts]
        if use.certain and delta.ndim:
            self.rows[use.id] = shadow.rows()
        for k, (site, source) in enumerate(zip(use.sites, use.sources, strict=True)):
            if source.names.isdisjoint(self.subject.measured):
                continue
            self.totals[use.id, k] = total_of(site, delta, saved)

    def _judge(self, operand: tuple[CallId, int], expected: Tensor) -> Tensor | None:
        """Compare autograd's gradient of an operand, and let go of it: a zero takes its place."""
        with unseen_by_modes():
            self.agreements[operand] = Agreement.on(expected, self.totals.get(operand))
            if type(expected) is not Tensor or expected.layout is not torch.strided:
                return None
            return expected.new_zeros(()).expand(expected.shape)

    def settle(self, done: Backward) -> None:
        """Raises MomentError where a rule's summed gradient is another than autograd's."""
        for name, missed in done.missed.items():
            if missed is not None:
                self.uncovered.setdefault(name, "a use that no rule saw")
        self.uncovered = dict(over_ranks(self.uncovered.items(), self.subject.together))
        compared = self.subject.measured - set(self.uncovered)
        for use in done.trace.uses:
            for k, source in enumerate(use.sources):
                agreement = self.agreements.get((use.id, k), Agreement(True, (use.id, k) not in self.totals))
                if source.names & compared:
                    _refuse(use, source, agreement, done.trace)

    @property
    def complete(self) -> bool:
        """After `settle`: whether every call has its place and every measured parameter a rule."""
        return not self.newly_shared and self.subject.measured.isdisjoint(self.uncovered)


@dataclass(eq=False)
class Locator:
    """Finds where the samples lie in each use, in the second pass, from what the weighted one found.

    `kept`: the layout of every use that a gradient reached. `still_shared`: calls found to have one output for all
    samples. `scattered`: parameters whose use mixes rows of several samples, with the reason.
    """

    weighted: WeightedPass
    kept: dict[CallId, SampleLayout] = field(default_factory=dict)
    still_shared: set[CallId] = field(default_factory=set)
    scattered: dict[str, str] = field(default_factory=dict)

    def locate(self, use: Use, delta: Tensor) -> SampleLayout | None:
        """The layout under which sample `i`'s rows scale with `c_i`; None if the output is shared by the samples.

        It is kept for later batches unless the gradient is zero, which fits every layout.

        Raises:
            MomentError: no layout fits an output that depends on the samples, so they act on each other.
        """
        projections = self.weighted.projections.get(use.id)
        if projections is None:
            raise MomentError(
                f"the loss takes another path when computed again on the same batch: {use} is new. Does the model "
                "count its calls or draw from a generator of its own? Take that out while measuring"
            )
        weights, limit, shadow = self.weighted.weights.flatten().double(), self._limit(delta), Shadow.of(use, delta)
        for layout, weighted in projections:
            plain = shadow.by_sample(layout, len(weights))
            if (weighted - weights * plain).abs().max() <= limit * shadow.scale(layout, len(weights)):
                if bool(plain.any()):
                    self.kept[use.id] = layout
                return layout
        if not use.certain:
            self.still_shared.add(use.id)
        elif self.weighted.subject.sample_axes > 1 or self._gathered(use, shadow.rows(), limit):
            self.scattered.update(dict.fromkeys(use.names, f"{use}: rows of several samples"))
        else:
            raise MomentError(
                f"samples act on each other at {use}: sample i's loss has a gradient in other samples' rows. "
                "Per-sample gradients do not describe SGD here (batch statistics, contrastive loss?); "
                "use minibatch_moments"
            )
        return None

    def settled(self) -> bool:
        """After the measuring pass: whether every use was located, on all ranks."""
        together = self.weighted.subject.together
        self.still_shared = set(over_ranks(self.still_shared, together))
        self.scattered = dict(over_ranks(self.scattered.items(), together))
        return not self.still_shared and not self.scattered

    def _limit(self, delta: Tensor) -> float:
        return independence(self.weighted.subject.model, delta.dtype)

    def _gathered(self, use: Use, plain: Tensor, limit: float) -> bool:
        """Whether each row belongs to one sample, in an order of the model's own (experts): its ratio is some `c_i`."""
        weighted = self.weighted.rows[use.id]
        live = plain.abs() > 1e-3 * plain.abs().max()
        ratio = (weighted / plain)[live]
        distance = (ratio.unsqueeze(1) - self.weighted.weights.flatten().double()).abs().amin(1)
        return bool((distance <= limit).all())


def weigh(subject: Subject, batch: Any, shared: frozenset[CallId]) -> WeightedPass:
    """The weighted pass, repeated until it is settled which calls have an output that all samples share.

    Raises:
        MomentError: rules and autograd disagree, or a gradient is not finite; names the parameter and the uses seen.
    """
    while True:
        found = WeightedPass(subject, batch, shared)
        with same_random_numbers(), buffers_kept(subject.modules), forward(subject, batch, shared, True) as made:
            done = made.backward(found, sorted(subject.measured))
        if done is not None:
            found.settle(done)
            return found
        shared = shared | found.newly_shared


def _refuse(use: Use, source: Source, agreement: Agreement, trace: Trace) -> None:
    """Raises MomentError unless an operand's gradient summed by rule is autograd's, and finite."""
    if not agreement.finite:
        raise MomentError(
            f"the gradient of {sorted(source.names)} at {use} is NaN or inf although the loss is finite; has "
            "training diverged, or does loss_fn differentiate sqrt, log or a norm at 0?"
        )
    if not agreement.agrees:
        seen = [str(u) for u in trace.uses if any(s.names & source.names for s in u.sources)]
        raise MomentError(
            f"the gradient of {sorted(source.names)} summed by rule differs from autograd's at {use}; "
            f"uses seen: {seen}. Please report this; meanwhile freeze the parameter or leave out its symmetries"
        )
