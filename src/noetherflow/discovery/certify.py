"""Numerical proof of a symmetry: outputs stay, per-sample gradients move as they must (theory.md section 2)."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noetherflow.core.copies import copy_of
from noetherflow.core.inputs import LossFn, ModelInputs
from noetherflow.core.unwrap import unwrap
from noetherflow.discovery.certificate import Certificate, CertificateRow, Verdict
from noetherflow.discovery.copies import ModelCopy, eps_scaled, eps_settings, flat_outputs, floating_tensors, in_dtype
from noetherflow.discovery.export import export, first_line, own_failure, place, stale
from noetherflow.errors import DataError, ExportError
from noetherflow.symmetry.symmetry import Symmetry, Translation
from noetherflow.symmetry.symmetry_set import SymmetrySet

EXACT = 1e-12
"""Largest relative output violation of an exact symmetry in float64."""
EXACT_WITH_CASTS = 1e-7
"""The same where the model itself casts to float32."""
GRADIENT_SLACK = 1e2
"""Gradients may violate this much more than outputs: they pass the graph twice."""
EPS_FACTORS = (1.0, 1e-2, 0.0)


def certify(
    model: nn.Module,
    syms: SymmetrySet,
    example_inputs: Any,
    loss_fn: LossFn | None = None,
    batch: Any = None,
    *,
    spread: float = 0.3,
    trials: int = 2,
    samples: int = 2,
    dtypes: Sequence[torch.dtype] = (),
    seed: int = 0,
) -> Certificate:
    """Check every symmetry at random group elements `G = exp(A)`, A with entries of deviation `spread`.

    Works on a float64 copy of the model in evaluation mode. The first trial uses `example_inputs`, the others replace
    floating inputs by random ones. Per-sample gradients are those of `loss_fn(model, batch)`, shape `[batch]`; without
    it, of a random projection of each sample's outputs.

    Verdicts: `exact` below 1e-12 (1e-7 where the graph casts to float32); `approximate` when a normalisation's eps
    explains the violation, shown by varying eps; else `broken`. `dtypes` adds output violations in narrower types.

    Raises DataError when the outputs are not finite, the model has no floating output, cannot be copied or does not run
    in float64, DeclarationError for another model's symmetries.
    """
    syms.tensors_in(model)
    bench = _Bench(model, example_inputs, loss_fn, batch, trials, samples, seed)
    measured = [_measure(bench, item, spread, seed + k) for k, item in enumerate(syms.all_items)]
    casts = syms.casts
    if not casts and any(m[0] > EXACT for m in measured):
        casts = _casts(model, example_inputs)
    tolerance = EXACT_WITH_CASTS if casts else EXACT
    rows = []
    for k, (item, (outputs, gradients)) in enumerate(zip(syms.all_items, measured, strict=True)):
        exact = outputs < tolerance and gradients < GRADIENT_SLACK * tolerance
        eps = item.eps if isinstance(item, Symmetry) else None
        sizes: tuple[tuple[float, float], ...] = ()
        verdict, note = ("exact" if exact else "broken"), ""
        if eps is not None and not exact:
            sizes = _eps_sizes(bench, item, eps, spread, seed + k)
            verdict, note = _eps_verdict(outputs, sizes, tolerance)
        if exact and outputs > EXACT:
            note = "limited by the model's own float32 casts"
        narrow = tuple((str(d).removeprefix("torch."), bench.in_dtype(item, spread, seed + k, d)) for d in dtypes)
        rows.append(CertificateRow(item.name, item.family, verdict, outputs, gradients, eps, sizes, narrow, note))  # type: ignore[arg-type]
    return Certificate(tuple(rows), tolerance, casts)


def _casts(model: nn.Module, example_inputs: Any) -> tuple[str, ...]:
    try:
        return export(model, example_inputs).casts()
    except ExportError:
        return ()


def _eps_verdict(outputs: float, sizes: Sequence[tuple[float, float]], tolerance: float) -> tuple[Verdict, str]:
    shown = ", ".join(f"{v:.1e} at eps {e:.0e}" for e, v in sizes[1:])
    floor = 10 * tolerance if tolerance > EXACT else tolerance  # with eps out of the way casts may set the size
    if any(v < max(min(floor, 0.5 * outputs), 0.1 * outputs) for _, v in sizes[1:]):
        return "approximate", f"eps of a normalisation: {shown}"
    if outputs < 1e-3 and all(abs(v - outputs) <= 1e-6 * outputs for _, v in sizes[1:]):
        return "approximate", "the eps is written into the code and could not be varied"
    return "broken", f"not explained by eps: {shown}"


class _Bench:
    """A float64 copy of the model with its base outputs and per-sample gradients."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        loss_fn: LossFn | None,
        batch: Any,
        trials: int,
        samples: int,
        seed: int,
    ) -> None:
        self.source = model
        copied = ModelCopy.of(model, torch.float64)
        self.model, self.tensors = copied.model, copied.tensors
        self.rng = torch.Generator("cpu").manual_seed(seed)
        self.inputs = [in_dtype(ModelInputs.of(example_inputs), torch.float64)]
        self.inputs += [self._random_inputs(self.inputs[0]) for _ in range(trials - 1)]
        self.example = _cast(example_inputs, torch.float64)
        if (why := stale(unwrap(model), self.model, self.inputs[0])) is not None:
            raise DataError(why)
        self.loss_fn, self.batch = loss_fn, _cast(batch, torch.float64)
        self.samples = samples
        self.trainable = {n: t for n, t in self.tensors.items() if isinstance(t, nn.Parameter) and t.requires_grad}
        self.outputs = [self._given_outputs(), *(flat_outputs(self.model, x) for x in self.inputs[1:])]
        if not all(bool(torch.isfinite(y).all()) for y in self.outputs):
            raise DataError("the model's outputs on the example inputs are not finite; certify needs finite outputs")
        self.projection = torch.randn(self.outputs[0].numel(), dtype=torch.float64, generator=self.rng, device="cpu")
        self.gradients = self._gradients()

    def _given_outputs(self) -> Tensor:
        """Raises DataError where the float64 copy fails and one in the model's own precision does not."""
        try:
            return flat_outputs(self.model, self.inputs[0])
        except RuntimeError as cause:
            if own_failure(copy_of(self.source).eval(), self.inputs[0]) is not None:
                raise
            raise DataError(
                f"a certificate needs float64, in which {type(self.model).__name__} does not run. "
                f"{_failing(self.model, cause)}: {first_line(cause)}{place(cause)}\n"
                "Use an operator that takes float64 there, and constants in the dtype of what they meet; for a mixture "
                "of experts of transformers: model.set_experts_implementation('batched_mm')"
            ) from cause

    def _random_inputs(self, inputs: ModelInputs) -> ModelInputs:
        def draw(x: Tensor) -> Tensor:
            if not x.is_floating_point() or x.numel() < 2:
                return x
            noise = torch.randn(x.shape, dtype=x.dtype, generator=self.rng, device="cpu")
            return x.mean() + x.std().clamp_min(1e-3) * noise

        return inputs.map(draw)

    def _gradients(self) -> list[dict[str, Tensor]]:
        """Per-sample gradients of the first samples, by canonical name."""
        if not self.trainable:
            return []
        losses = self._losses()
        out = []
        for k in range(min(self.samples, len(losses))):
            grads = torch.autograd.grad(losses[k], list(self.trainable.values()), retain_graph=True, allow_unused=True)
            out.append(
                {
                    n: torch.zeros_like(p) if g is None else g
                    for (n, p), g in zip(self.trainable.items(), grads, strict=True)
                }
            )
        return out

    def _losses(self) -> Tensor:
        if self.loss_fn is not None:
            batch = self.example if self.batch is None else self.batch
            losses = self.loss_fn(self.model, batch)
            if losses.ndim != 1:
                raise DataError(
                    f"loss_fn must return one loss per sample, shape [batch], got shape {tuple(losses.shape)}; "
                    "use reduction='none'"
                )
            return losses
        tensors = floating_tensors(self.inputs[0].call(self.model))
        size = tensors[0].shape[0] if tensors[0].ndim else 1
        total = tensors[0].new_zeros(size)
        offset = 0
        for y in tensors:
            weights = self.projection[offset : offset + y.numel()].reshape(y.shape)
            offset += y.numel()
            weighted = (weights * y).reshape(y.shape[0] if y.ndim else 1, -1).sum(1)
            total = total + (weighted if weighted.shape[0] == size else weighted.sum())
        return total

    @contextmanager
    def moved(self, values: dict[str, Tensor]) -> Iterator[None]:
        """The copy with some tensors replaced, put back afterwards."""
        old = {n: self.tensors[n].detach().clone() for n in values}
        try:
            with torch.no_grad():
                for n, v in values.items():
                    self.tensors[n].copy_(v)
            yield
        finally:
            with torch.no_grad():
                for n, v in old.items():
                    self.tensors[n].copy_(v)

    def output_violation(self, values: dict[str, Tensor], base: Sequence[Tensor]) -> float:
        with self.moved(values):
            return max(_relative(flat_outputs(self.model, x), y) for x, y in zip(self.inputs, base, strict=True))

    def in_dtype(self, item: Symmetry | Translation, spread: float, seed: int, dtype: torch.dtype) -> float:
        """Output violation when weights and inputs are rounded to `dtype`."""
        copied = ModelCopy.of(self.source, dtype)
        inputs = in_dtype(self.inputs[0], dtype)
        base = flat_outputs(copied.model, inputs)
        wide = {n: t.detach().double() if t.is_floating_point() else t.detach() for n, t in copied.tensors.items()}
        with torch.no_grad():
            for n, v in _act(item, wide, spread, seed)[0].items():
                copied.tensors[n].copy_(v)
        return _relative(flat_outputs(copied.model, inputs), base)


def _failing(model: nn.Module, error: Exception) -> str:
    """`path (class)` of the innermost module of `model` that raised `error`."""
    paths = {id(m): f"{path or 'the model'} ({type(m).__name__})" for path, m in model.named_modules()}
    owners = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((paths[owner] for owner in reversed(owners) if owner in paths), paths[id(model)])


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def _relative(a: Tensor, b: Tensor) -> float:
    scale = float(torch.linalg.vector_norm(b))
    difference = float(torch.linalg.vector_norm(a - b))
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


def _act(
    item: Symmetry | Translation, tensors: dict[str, Tensor], spread: float, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """A random element of the group (or shift), applied; the moved tensors and the element."""
    rng = torch.Generator("cpu").manual_seed(seed)
    here = {n: t.detach() for n, t in tensors.items()}
    if isinstance(item, Symmetry):
        element = item.random_element(spread, rng)
    else:
        columns = item.leg.unfold(here[item.leg.parameter]).shape[-1]
        element = torch.randn(item.leg.blocks, columns, dtype=torch.float64, generator=rng, device="cpu")
    return item.act(here, element), element


def _measure(bench: _Bench, item: Symmetry | Translation, spread: float, seed: int) -> tuple[float, float]:
    """Output and gradient violation at one random element, the worst over inputs and samples."""
    values, element = _act(item, bench.tensors, spread, seed)
    outputs = bench.output_violation(values, bench.outputs)
    if not bench.gradients:
        return outputs, 0.0
    with bench.moved(values):
        moved = bench._gradients()
    worst = 0.0
    for before, after in zip(bench.gradients, moved, strict=True):
        known = {n: g for n, g in before.items() if n in item.parameters}
        if len(known) < len(item.parameters):
            continue
        predicted = {**before, **(item.act_on_gradients(known, element) if isinstance(item, Symmetry) else {})}
        total = _norm(predicted, before)
        for names in (before, item.parameters):
            scale = _norm(predicted, names)
            if scale > 1e-9 * total:
                difference = {n: after[n] - predicted[n] for n in names}
                worst = max(worst, _norm(difference, names) / scale)
    return outputs, worst


def _norm(tensors: dict[str, Tensor], names: Any) -> float:
    return math.sqrt(sum(float(tensors[n].square().sum()) for n in names))


def _eps_sizes(
    bench: _Bench, item: Symmetry | Translation, eps: float, spread: float, seed: int
) -> tuple[tuple[float, float], ...]:
    """Output violation with the eps of every normalisation module scaled down."""
    values, _ = _act(item, bench.tensors, spread, seed)
    settings = eps_settings(bench.model)
    sizes = []
    for factor in EPS_FACTORS:
        with eps_scaled(settings, factor):
            base = [flat_outputs(bench.model, x) for x in bench.inputs]
            violation = bench.output_violation(values, base)
        if math.isfinite(violation):
            sizes.append((factor * eps, violation))
    return tuple(sizes)
