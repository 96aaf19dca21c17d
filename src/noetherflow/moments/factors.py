"""Per-sample gradients of weight matrices as products of small factors, where Grams alone do not determine an orbit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.arguments import expect_measurement
from noetherflow.core.inputs import LossFn
from noetherflow.core.tensors import tensors_of
from noetherflow.core.unwrap import unwrap
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.batch import BatchPass, Subject, buffers_kept, check_finite, form_of, forward
from noetherflow.moments.forms import OneToken, Outer
from noetherflow.moments.layout import SampleLayout
from noetherflow.moments.origins import Source
from noetherflow.moments.products import Factors, joined_factors
from noetherflow.moments.taps import Recorder, Use
from noetherflow.moments.target import trainable_parameters
from noetherflow.moments.verify import Locator, WeightedPass, weigh
from noetherflow.symmetry.arguments import expect_model_and_symmetries
from noetherflow.symmetry.overlap import leg_coordinates, mixed_parameters
from noetherflow.symmetry.symmetry_set import SymmetrySet

REMEDY = "pass dense per-sample gradients as samples=, or remeasure="


def gradient_factors(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], syms: SymmetrySet
) -> dict[str, Factors]:
    """Factors of the per-sample gradients of every weight that general_linear and other symmetries move together.

    They are read off where the model multiplies by the weight, whichever way it is written: `nn.Linear`,
    `F.linear(x, weight)`, `x @ weight`, `einsum`, `nn.MultiheadAttention`. Every batch is computed twice, to find where
    its samples lie and to check the factors against autograd.

    Args:
        model: the model, which is left as it was.
        loss_fn: `loss_fn(model, batch)`, one loss per sample, `[batch]`.
        batches: the batches; their factors are kept, so take as many as fit in memory.
        syms: the symmetries; frozen parameters are left out.

    Returns:
        `Factors` by parameter, in the parameter's dtype; empty where no weight is so moved. Give them to
        `noise_equilibrium(..., samples=...)` with moments of the same samples, which checks them against these.

    Raises:
        MomentError: a weight is used otherwise than as one matrix of a product, or in a product that all samples share.
        DataError: no batches.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 4, bias=False))
        >>> x = torch.randn(8, 4)
        >>> syms = nf.find_symmetries(model, x)
        >>> factors = nf.gradient_factors(model, lambda m, b: m(b).square().sum(1), [x], syms)
        >>> {name: tuple(f.dense().shape) for name, f in factors.items()}
        {'1.weight': (8, 3, 3)}
    """
    call = "gradient_factors(model, loss_fn, batches, syms)"
    expect_model_and_symmetries(call, model, syms)
    expect_measurement(call, model, loss_fn, batches)
    tensors = tensors_of(model)
    symmetries = list(syms.trainable(model))
    coordinates = leg_coordinates(symmetries, {n: tuple(t.shape) for n, t in tensors.items()})
    wanted = trainable_parameters(model, names) if (names := list(mixed_parameters(coordinates, symmetries))) else {}
    if not wanted:
        return {}
    refuse_tensors(wanted)
    roots = {n: t for n, t in tensors.items() if t.requires_grad}
    subject = Subject(unwrap(model), loss_fn, roots, frozenset(wanted))
    found = [_one_batch(subject, batch) for batch in batches]
    if not found:
        raise DataError("no batch to measure: the iterator of batches is empty")
    return {n: f.to(wanted[n].dtype) for n, f in joined_factors(found).items()}


def refuse_tensors(wanted: Mapping[str, Tensor]) -> None:
    """Raises MomentError for a parameter that is no matrix."""
    for name, tensor in wanted.items():
        if tensor.ndim != 2:
            raise MomentError(
                f"{name} {tuple(tensor.shape)} is no matrix, so its gradient has no two factors; {REMEDY}"
            )


@dataclass(eq=False)
class FactorKeeper:
    """Keeps the factors of every use of the `wanted` parameters in one batch, as its backward comes to them."""

    wanted: frozenset[str]
    uses: dict[str, list[Outer]] = field(default_factory=dict, init=False)

    def receive(
        self,
        use: Use,
        layout: SampleLayout,
        samples: int,
        delta: Tensor,
        saved: tuple[Tensor, ...],
        roots: Mapping[str, Tensor],
    ) -> None:
        """Keep the factors of one use; `roots` are the parameters.

        Raises:
            MomentError: it is no product with the parameter as one matrix.
        """
        for site, source in zip(use.sites, use.sources, strict=True):
            if source.names.isdisjoint(self.wanted):
                continue
            form = form_of(site, layout, samples, delta, saved)
            if source.view_of is None or not isinstance(form, Outer):
                raise MomentError(
                    f"{', '.join(sorted(source.names))}: {use} is no product with it as one matrix; {REMEDY}"
                )
            whole = _of_whole(source, roots[source.view_of], form, use)
            self.uses.setdefault(source.view_of, []).append(whole)

    def factors(self, apart: Iterable[str] = ()) -> dict[str, Factors]:
        """The factors of the batch, once its backward is complete.

        Args:
            apart: parameters that a gradient reached in another way than by a use of each sample.

        Raises:
            MomentError: there are such, or a wanted parameter was not used.
        """
        lacking = sorted({*apart, *(self.wanted - self.uses.keys())})
        if lacking:
            raise MomentError(f"{lacking} is used in a product that all samples share, or by no sample alone; {REMEDY}")
        return {n: _over_uses(uses) for n, uses in self.uses.items()}


@dataclass(eq=False)
class FactorPass(BatchPass):
    """Keeps the factors of the measured parameters in one batch, after a weighted pass."""

    batch: Any
    weighted: WeightedPass
    kept: FactorKeeper = field(init=False)
    roots: dict[str, Tensor] = field(init=False)
    locator: Locator = field(init=False)

    def __post_init__(self) -> None:
        self.locator = Locator(self.weighted)
        self.kept = FactorKeeper(self.weighted.subject.measured)

    def begin(self, losses: Tensor, recorder: Recorder) -> Tensor | None:
        check_finite(losses, self.batch, self.weighted.subject.model)
        self.roots = recorder.roots
        return torch.ones_like(losses)

    def receive(self, use: Use, delta: Tensor, saved: tuple[Tensor, ...]) -> None:
        layout = self.locator.locate(use, delta)
        if layout is not None:
            self.kept.receive(use, layout, self.weighted.weights.numel(), delta, saved, self.roots)


def _one_batch(subject: Subject, batch: Any) -> dict[str, Factors]:
    """The factors of one batch, once it is known where its samples lie."""
    weighted = weigh(subject, batch, frozenset())
    if weighted.uncovered:
        why = "; ".join(f"{n}: {ops}" for n, ops in weighted.uncovered.items())
        raise MomentError(f"no rule covers a use of {sorted(weighted.uncovered)} ({why}); {REMEDY}")
    found = FactorPass(batch, weighted)
    with buffers_kept(subject.modules), forward(subject, batch, weighted.shared, leaf=False) as made:
        done = made.backward(found, sorted(subject.measured))
    missed = [] if done is None else [n for n, g in done.missed.items() if g is not None]
    apart = {*missed, *found.locator.scattered}
    return found.kept.factors(apart if found.locator.settled() else apart or subject.measured)


def _of_whole(source: Source, root: Tensor, form: Outer, use: Use) -> Outer:
    """The factors with the operand, which may be a transposed or sliced view, read as the whole matrix.

    Example: `weight[4:8]` of a packed query-key-value weight `[12, n]`: `left` gets zeros outside rows 4 to 7.
    """
    view = source.operand
    if view is root:
        return form
    whole = torch.arange(root.numel(), device="cpu").view(root.shape)
    offset = view.storage_offset() - root.storage_offset()
    if root.is_contiguous() and view.ndim == 2:
        entries = whole.as_strided(view.shape, view.stride(), offset)
        rows, columns = entries // root.shape[1], entries % root.shape[1]
        if _is_grid(rows, columns):
            return _placed(form, rows[:, 0], columns[0], root.shape)
        if _is_grid(rows.mT, columns.mT):
            return _placed(form.transposed(), rows[0], columns[:, 0], root.shape)
    raise MomentError(f"{source.view_of}: {use} reads it as another matrix, {tuple(view.shape)}; {REMEDY}")


def _is_grid(rows: Tensor, columns: Tensor) -> bool:
    """Whether entry `(i, j)` of a view is entry `(r_i, c_j)` of the whole."""
    return bool((rows == rows[:, :1]).all()) and bool((columns == columns[:1]).all())


def _placed(form: Outer, rows: Tensor, columns: Tensor, shape: Sequence[int]) -> Outer:
    """The factors of a view's gradient, put at its rows and columns of the whole."""
    left, right = (
        t.new_zeros(*t.shape[:-1], size).index_copy_(-1, where.to(t.device), t)
        for t, where, size in ((form.left, rows, shape[0]), (form.right, columns, shape[1]))
    )
    return type(form)(left, right)


def _over_uses(uses: Sequence[Outer]) -> Factors:
    """Several uses of one matrix by the same samples, one after the other along the axis of tokens."""
    sides = [
        tuple(t.unsqueeze(1) if isinstance(form, OneToken) else t for t in (form.left, form.right)) for form in uses
    ]
    return Factors(torch.cat([left for left, _ in sides], 1), torch.cat([right for _, right in sides], 1))
