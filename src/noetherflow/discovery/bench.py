"""The bench of a certificate: a float64 copy of a model, run at chosen weights and inputs from one state."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noetherflow.core.copies import copy_of
from noetherflow.core.inputs import LossFn, ModelInputs
from noetherflow.core.unwrap import unwrap
from noetherflow.discovery.copies import ModelCopy, flat_outputs
from noetherflow.discovery.export import stale
from noetherflow.discovery.failures import first_line, own_failure, place
from noetherflow.discovery.outputs import floating_tensors
from noetherflow.discovery.repeat import ModelState, same_draws
from noetherflow.discovery.wide import WideFloats
from noetherflow.errors import DataError

Tensors = Mapping[str, Tensor]
REENTRANT = "None of the inputs have requires_grad=True"
"""What torch warns of when checkpointing of the older kind cuts all gradients."""
NO_REENTRANT = (
    "the model checkpoints activations with use_reentrant=True, which gives no gradients of single samples (and none "
    "of the weights inside where its inputs need none): use checkpoint(..., use_reentrant=False)"
)
PROJECTION = 20_011
"""Seed of the directions on which outputs are projected."""


@dataclass(frozen=True, eq=False)
class SampleLoss:
    """What per-sample gradients are taken of.

    Attributes:
        loss_fn: the user's loss, or None for a random projection of each sample's outputs.
        batch: what the loss is called with.
        samples: of how many samples gradients are taken.
    """

    loss_fn: LossFn | None
    batch: Any
    samples: int


@dataclass(frozen=True, eq=False)
class Trial:
    """Where and how the copy is run.

    Attributes:
        inputs: its arguments.
        weights: tensors that differ from the copy's own, by name.
        loss: what gradients are taken of.
        training: run in training mode (batch statistics) instead of evaluation mode.
        draws: seed of the random numbers that the forward draws; equal ones unless said otherwise.
    """

    inputs: ModelInputs
    loss: SampleLoss
    weights: Tensors = field(default_factory=dict)
    training: bool = False
    draws: int = 0


class Bench:
    """A float64 copy of a model that can be run in any trial, with equal random draws and without a memory.

    Attributes:
        model: the copy.
        tensors: its tensors by canonical name.
        parameters: those that gradients are taken by.
        widened: whether the code casts to narrower types; those casts are kept in float64.
        narrow: whether it does and does not run without them.
    """

    def __init__(self, source: nn.Module, example_inputs: Any, legs: Collection[str]) -> None:
        """Copy `source` and run the copy once.

        Args:
            source: the model.
            example_inputs: in float64 already (`widened`).
            legs: names of tensors that gradients are needed of besides all parameters.
        """
        copied = ModelCopy.of(source, torch.float64)
        self.model, self.tensors = copied.model, copied.tensors
        self.parameters = {
            n: t
            for n, t in self.tensors.items()
            if t.is_floating_point() and (isinstance(t, nn.Parameter) or n in legs)
        }
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        copied.copy_hooks(source)
        self._devices = tuple({t.device.index for t in self.tensors.values() if t.device.type == "cuda"})
        self.widened, self.narrow = True, False
        self._first_run(source, ModelInputs.of(example_inputs))

    def _first_run(self, source: nn.Module, inputs: ModelInputs) -> None:
        """Finds out whether casts are to be widened. Raises DataError where the copy does not run either way."""
        failures: list[Exception] = []
        for widened in (True, False):
            self.widened, self.narrow = widened, not widened
            try:
                with self._running(Trial(inputs, SampleLoss(None, None, 0))), torch.no_grad():
                    mode = WideFloats() if widened else None
                    with mode or nullcontext():
                        inputs.call(self.model)
                self.widened = mode is not None and mode.widened > 0
                break
            except (RuntimeError, TypeError, IndexError) as cause:
                failures.append(cause)
        else:
            if (own := own_failure(copy_of(source).eval(), inputs)) is not None:
                raise DataError(own) from failures[-1]
            raise DataError(_no_float64(self.model, failures[-1])) from failures[-1]
        if (why := stale(unwrap(source), self.model, inputs)) is not None:
            raise DataError(why)

    @contextmanager
    def _running(self, at: Trial) -> Iterator[None]:
        """The copy with the weights of a trial, from one state and one seed, and as it was afterwards."""
        old = {n: self.tensors[n].detach().clone() for n in at.weights}
        state = ModelState.of(self.model)
        try:
            with torch.no_grad():
                for n, value in at.weights.items():
                    self.tensors[n].copy_(value)
            self.model.train(at.training)
            with same_draws(at.draws, self._devices), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=REENTRANT)
                yield
        finally:
            state.restore()
            with torch.no_grad():
                for n, value in old.items():
                    self.tensors[n].copy_(value)

    def _casts(self) -> Any:
        return WideFloats() if self.widened else nullcontext()

    def outputs(self, at: Trial) -> Tensor:
        """All floating outputs in a trial, as one vector."""
        with self._running(at), self._casts():
            return flat_outputs(self.model, at.inputs)

    def gradients(self, at: Trial) -> tuple[dict[str, Tensor], ...]:
        """The gradients of the first samples in a trial, and that of all other samples together, by parameter name."""
        if not self.parameters:
            return ()
        with self._running(at), self._casts(), torch.enable_grad():
            found = self._differentiated(at)
        return tuple(
            {
                n: torch.zeros_like(p) if g is None else g.to(p.dtype)
                for n, p, g in zip(self.parameters, self.parameters.values(), row, strict=True)
            }
            for row in found
        )

    def _differentiated(self, at: Trial) -> list[tuple[Tensor | None, ...]]:
        """The gradients of the first samples by all parameters, and that of the sum of the others.

        Some weights act on single rows only (rows of two branches stacked, a branch chosen by data).

        Raises:
            DataError: the model checkpoints activations in torch's older way, which hides the weights inside.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=REENTRANT)
            try:
                losses = self._losses(at)
            except UserWarning as warning:
                if REENTRANT not in str(warning):
                    raise
                raise DataError(NO_REENTRANT) from warning
        leaves = list(self.parameters.values())
        first, others = losses[: at.loss.samples], losses[at.loss.samples :]
        parts = [*first, others.sum()] if len(others) else [*first]
        found: list[tuple[Tensor | None, ...]] = [
            torch.autograd.grad(part, leaves, retain_graph=True, allow_unused=True)
            for part in (parts if losses.requires_grad else ())
        ]
        if any(g is None for row in found for g in row) and _reentrant(losses):
            raise DataError(NO_REENTRANT)
        return found

    def _losses(self, at: Trial) -> Tensor:
        """One number per sample: the user's loss, or the outputs of the sample projected on fixed random directions."""
        if at.loss.loss_fn is not None:
            losses = at.loss.loss_fn(self.model, at.loss.batch)
            if losses.ndim != 1:
                raise DataError(
                    f"loss_fn must return one loss per sample, shape [batch], got shape {tuple(losses.shape)}; "
                    "use reduction='none'"
                )
            return losses
        tensors = floating_tensors(at.inputs.call(self.model))
        size = tensors[0].shape[0] if tensors[0].ndim else 1
        total = tensors[0].new_zeros(size, dtype=torch.float64)
        rng = torch.Generator("cpu").manual_seed(PROJECTION)
        for y in tensors:
            weights = torch.randn(y.shape, dtype=torch.float64, generator=rng, device="cpu").to(y.device)
            weighted = (weights * y).reshape(y.shape[0] if y.ndim else 1, -1).sum(1)
            total = total + (weighted if weighted.shape[0] == size else weighted.sum())
        return total


def _reentrant(losses: Tensor) -> bool:
    """Whether the graph of some losses holds a checkpoint of the older kind."""
    waiting, seen = [losses.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if node.name() == "CheckpointFunctionBackward":
                return True
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return False


def widened(value: Any) -> Any:
    """Inputs or a batch with floating tensors in float64; all tensors are copies, free of inference mode and graphs."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return x.clone()
        return x.detach().clone().to(torch.float64).requires_grad_(x.requires_grad)

    return pytree.tree_map(leaf, value)


def _no_float64(model: nn.Module, cause: Exception) -> str:
    return (
        f"a certificate needs float64, in which {type(model).__name__} does not run. "
        f"{_failing(model, cause)}: {first_line(cause)}{place(cause)}\n"
        "Use an operator that takes float64 there, and constants in the dtype of what they meet; for a mixture "
        "of experts of transformers: model.set_experts_implementation('batched_mm')"
    )


def _failing(model: nn.Module, error: Exception) -> str:
    """`path (class)` of the innermost module of `model` that raised `error`."""
    paths = {id(m): f"{path or 'the model'} ({type(m).__name__})" for path, m in model.named_modules()}
    owners = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((paths[owner] for owner in reversed(owners) if owner in paths), paths[id(model)])
