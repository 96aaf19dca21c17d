"""The completeness check: on every new way through a model, rules against autograd, and samples against each other.

Two passes over the same batch with the same random numbers. The first weights sample `i`'s loss by a random `c_i` and
lets autograd differentiate every operand as well: the rules' summed gradient must equal autograd's. In the second, the
measuring pass, the output gradient of sample `i` must come out `1 / c_i` times as large, wherever the rule takes sample
`i` to lie: that finds the sample axis, and proves that samples do not act on each other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.errors import MomentError
from noetherflow.moments.batch import Subject, buffers_kept, check_finite, forward_backward, whole_batch_total
from noetherflow.moments.distributed import over_ranks
from noetherflow.moments.layout import SampleLayout
from noetherflow.moments.taps import CallId, Recorder, Trace, Use

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


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Leave the random states (torch, NumPy, Python) as found, so that a second forward draws the same numbers."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def row_projection(layout: SampleLayout, delta: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Each sample's output gradient on one fixed direction, and the norm that sets its rounding error."""
    rows = layout.front(delta, samples).reshape(samples, -1).to(torch.float64)
    direction = torch.sin(1.0 + 7.3 * torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device))
    return rows @ direction, rows.norm(dim=1).max() * direction.norm()


def rows_of(delta: Tensor) -> Tensor:
    """A fixed projection of every feature vector: `[rows]`."""
    rows = delta.reshape(-1, delta.shape[-1]).double()
    return rows @ torch.sin(1.0 + 7.3 * torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device))


@dataclass(eq=False)
class WeightedPass:
    """What the weighted pass found."""

    shared: frozenset[CallId]
    uncovered: dict[str, str]
    weights: Tensor
    span: int
    model: nn.Module
    projections: dict[CallId, list[tuple[SampleLayout, Tensor]]] = field(default_factory=dict)
    kept: dict[CallId, SampleLayout] = field(default_factory=dict)
    still_shared: set[CallId] = field(default_factory=set)
    rows: dict[CallId, Tensor] = field(default_factory=dict)
    scattered: dict[str, str] = field(default_factory=dict)

    def locate(self, use: Use, delta: Tensor) -> SampleLayout | None:
        """The layout under which sample i's rows scale with `c_i`; None if the output is shared by the samples.

        It is kept for later batches unless the gradient is zero, which fits every layout.
        Raises MomentError when no layout fits an output that depends on the samples: they act on each other.
        """
        if use.id not in self.projections:
            raise MomentError(
                f"the loss takes another path when computed again on the same batch: {use} is new. Does the model "
                "count its calls or draw from a generator of its own? Take that out while measuring"
            )
        samples = self.weights.numel()
        for layout, weighted in self.projections[use.id]:
            plain, scale = row_projection(layout, delta, samples)
            error = (weighted - self.weights.flatten().double() * plain).abs().max()
            if error <= independence(self.model, delta.dtype) * scale:
                if bool(plain.any()):
                    self.kept[use.id] = layout
                return layout
        if use.certain and (self.span > 1 or self._gathered(use, delta)):
            self.scattered.update(dict.fromkeys(use.names, f"{use}: rows of several samples"))
            return None
        if use.certain:
            raise MomentError(
                f"samples act on each other at {use}: sample i's loss has a gradient in other samples' rows. "
                "Per-sample gradients do not describe SGD here (batch statistics, contrastive loss?); "
                "use minibatch_moments"
            )
        self.still_shared.add(use.id)
        return None

    def settled(self) -> bool:
        """After the measuring pass: whether every use was located, on all ranks."""
        self.still_shared = set(over_ranks(self.still_shared, self.model))
        self.scattered = dict(over_ranks(self.scattered.items(), self.model))
        return not self.still_shared and not self.scattered

    def _gathered(self, use: Use, delta: Tensor) -> bool:
        """Whether each row belongs to one sample, in an order of the model's own (experts): its ratio is some `c_i`."""
        weighted, plain = self.rows[use.id], rows_of(delta)
        live = plain.abs() > 1e-3 * plain.abs().max()
        ratio = (weighted / plain)[live]
        distance = (ratio.unsqueeze(1) - self.weights.flatten().double()).abs().amin(1)
        return bool((distance <= independence(self.model, delta.dtype)).all())


def probe(subject: Subject, batch: Any, shared: frozenset[CallId]) -> WeightedPass:
    """The weighted pass, repeated until it is settled which calls have an output that all samples share.

    Raises MomentError naming the parameter and the uses seen where rules and autograd disagree, or a gradient is not
    finite.
    """
    while True:
        found = _try_probe(subject, batch, shared)
        if isinstance(found, WeightedPass):
            return found
        shared = found


def _try_probe(subject: Subject, batch: Any, shared: frozenset[CallId]) -> WeightedPass | frozenset[CallId]:
    span = subject.sample_axes
    state: list[WeightedPass] = []
    more_shared: set[CallId] = set()
    totals: dict[tuple[CallId, int], tuple[Tensor, Tensor, torch.dtype]] = {}

    def ready(losses: Tensor, recorder: Recorder) -> Tensor | None:
        trace = recorder.trace
        check_finite(losses, batch)
        uncovered = {n: ", ".join(sorted(ops)) for n, ops in trace.uncovered.items()}
        for use in trace.uses:
            if not use.layouts(losses.numel(), span):
                if use.certain:
                    uncovered.update(dict.fromkeys(use.names, f"{use}: no sample axis"))
                else:
                    more_shared.add(use.id)
        more_shared.update(over_ranks(more_shared, subject.model))
        weights = random_weights(losses)
        state.append(WeightedPass(shared, uncovered, weights, span, subject.model))
        return None if more_shared else weights

    def arrive(use: Use, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
        if use.leaves[0].requires_grad:
            found = state[0]
            samples = found.weights.numel()
            found.projections[use.id] = [
                (layout, row_projection(layout, delta, samples)[0]) for layout in use.layouts(samples, span)
            ]
            if use.certain and delta.ndim:
                found.rows[use.id] = rows_of(delta)
            for k, site in enumerate(use.sites):
                totals[use.id, k] = (*whole_batch_total(site, delta, saved), delta.dtype)

    names = sorted(subject.measured)
    with same_random_numbers(), buffers_kept(subject.modules):
        done = forward_backward(subject, batch, shared, True, ready, arrive, names)
    if done is None:
        return shared | more_shared
    trace, gradients = done
    found = state[0]
    leaves = sum(len(u.leaves) for u in trace.uses)
    for name, residual in zip(names, gradients[leaves:], strict=True):
        if residual is not None:
            found.uncovered.setdefault(name, "a use that no rule saw")
    found.uncovered = dict(over_ranks(found.uncovered.items(), subject.model))
    _compare(subject, trace, totals, gradients[:leaves], found)
    return found


def _compare(
    subject: Subject,
    trace: Trace,
    totals: dict[tuple[CallId, int], tuple[Tensor, Tensor, torch.dtype]],
    gradients: tuple[Tensor | None, ...],
    found: WeightedPass,
) -> None:
    position = iter(gradients)
    for use in trace.uses:
        for k, source in enumerate(use.sources):
            expected = next(position)
            if not source.names & (subject.measured - set(found.uncovered)):
                continue
            total = totals.get((use.id, k))
            if expected is None and total is None:
                continue
            if expected is not None:
                expected = expected.to_dense()
            if expected is not None and not bool(torch.isfinite(expected).all()):
                raise MomentError(
                    f"the gradient of {sorted(source.names)} at {use} is NaN or inf although the loss is finite; has "
                    "training diverged, or does loss_fn differentiate sqrt, log or a norm at 0?"
                )
            if expected is None or total is None or not _close(expected, *total):
                seen = [str(u) for u in trace.uses if any(s.names & source.names for s in u.sources)]
                raise MomentError(
                    f"the gradient of {sorted(source.names)} summed by rule differs from autograd's at {use}; "
                    f"uses seen: {seen}. Please report this; meanwhile freeze the parameter or leave out its symmetries"
                )


def _close(expected: Tensor, total: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
    """`dtype` is that of the output gradient: under autocast autograd multiplies in it.

    Where terms cancel, what is left may be no more than their roundings, `eps` times `scale` each.
    """
    error = (total.double() - expected.double()).norm()
    rounding = max(1e-2 * tolerance(dtype), 2 * torch.finfo(dtype).eps)
    return bool(error <= tolerance(dtype) * expected.double().norm() + rounding * scale.double())
