"""Per-sample gradients of weight matrices as products of small factors, where Grams alone do not determine an orbit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.inputs import LossFn
from noetherflow.core.tensors import tensors_of
from noetherflow.errors import DataError, MomentError
from noetherflow.symmetry.overlap import leg_coordinates, mixed_parameters
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(frozen=True, eq=False)
class Factors:
    """Gradients `g_z = left_z^T right_z` of one matrix `[m, n]`: `left` `[N, T, m]`, `right` `[N, T, n]`, T uses per
    sample.
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """`[N, m, n]`."""
        return self.left.mT @ self.right


def gradient_factors(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], syms: SymmetrySet
) -> dict[str, Factors]:
    """Factors of the per-sample gradients of every weight that general_linear and other symmetries move together.

    Read off as inputs and output gradients of `nn.Linear` (and transformers' `Conv1D`) layers, in the parameters'
    dtype; the first axis of what these layers are given must be the batch. Give the result to `noise_equilibrium(...,
    samples=...)` with moments of the same samples, which checks it against them. Empty where no weight is so moved.

    Raises MomentError for a weight that is used otherwise: pass dense per-sample gradients or `remeasure=` then;
    DataError without batches.
    """
    tensors = tensors_of(model)
    symmetries = list(syms.trainable(model))
    coordinates = leg_coordinates(symmetries, {n: tuple(t.shape) for n, t in tensors.items()})
    wanted = list(mixed_parameters(coordinates, symmetries))
    if not wanted:
        return {}
    found: dict[str, list[Factors]] = {n: [] for n in wanted}
    measured = False
    for batch in batches:
        measured = True
        for name, factors in _one_batch(model, loss_fn, batch, {n: tensors[n] for n in wanted}).items():
            found[name].append(factors)
    if not measured:
        raise DataError("no batch to measure: the iterator of batches is empty")
    return {n: Factors(torch.cat([f.left for f in fs]), torch.cat([f.right for f in fs])) for n, fs in found.items()}


def _one_batch(model: nn.Module, loss_fn: LossFn, batch: Any, wanted: dict[str, Tensor]) -> dict[str, Factors]:
    uses: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in wanted}
    names = {id(t): n for n, t in wanted.items()}
    layers = {m: names[id(m.weight)] for m in model.modules() if id(getattr(m, "weight", None)) in names}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        (given,) = (*args, *kwargs.values())
        uses[layers[module]].append((given.detach(), output))

    handles = [m.register_forward_hook(keep, with_kwargs=True) for m in layers if _is_matrix_product(m)]
    try:
        losses = loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if losses.ndim != 1:
        raise DataError(f"loss_fn must return per-sample losses [batch], got shape {tuple(losses.shape)}")
    outputs = [y for n in wanted for _, y in uses[n]]
    params = list(wanted.values())
    gradients = torch.autograd.grad(losses.sum(), [*outputs, *params], materialize_grads=True)
    deltas, sums = iter(gradients[: len(outputs)]), gradients[len(outputs) :]
    result = {}
    for name, total in zip(wanted, sums, strict=True):
        pairs = [(_per_sample(x, len(losses)), _per_sample(next(deltas), len(losses))) for x, _ in uses[name]]
        if not pairs:
            raise MomentError(f"{name} is not the weight of a linear layer; pass dense samples= or remeasure=")
        a, d = torch.cat([p[0] for p in pairs], 1), torch.cat([p[1] for p in pairs], 1)
        rows_are_outputs = any(isinstance(m, nn.Linear) for m, n in layers.items() if n == name)
        factors = Factors(d, a) if rows_are_outputs else Factors(a, d)
        if not _accounts_for(factors, total):
            raise MomentError(f"{name} is also used outside its layer; pass dense samples= or remeasure=")
        result[name] = factors
    return result


def _is_matrix_product(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _per_sample(x: Tensor, samples: int) -> Tensor:
    return x.reshape(samples, -1, x.shape[-1])


def _accounts_for(factors: Factors, total: Tensor) -> bool:
    """True when the factors' summed gradient is autograd's."""
    mine = factors.left.flatten(0, 1).mT @ factors.right.flatten(0, 1)
    tolerance = 1e3 * torch.finfo(total.dtype).eps
    return float(torch.linalg.vector_norm(mine - total)) <= tolerance * float(torch.linalg.vector_norm(total)) + 1e-30
