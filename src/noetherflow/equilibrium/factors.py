"""Per-sample gradients of weight matrices as products of small factors, where Grams alone do not determine an orbit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.equilibrium.overlap import leg_coordinates, mixed_parameters
from noetherflow.equilibrium.weights import LegPair, Weights
from noetherflow.errors import DataError, MomentError
from noetherflow.legs import Leg
from noetherflow.symmetry import Symmetry
from noetherflow.symmetry_set import SymmetrySet, tensors_of


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
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any], syms: SymmetrySet
) -> dict[str, Factors]:
    """Factors of the per-sample gradients of every weight that general_linear and other symmetries move together.

    Read off as inputs and output gradients of `nn.Linear` (and transformers' `Conv1D`) layers, in the parameters'
    dtype. Give the result to `noise_equilibrium(..., samples=...)` with moments of the same samples.

    Raises MomentError for a weight that is used otherwise: pass dense per-sample gradients or `remeasure=` then.
    """
    tensors = tensors_of(model)
    symmetries = list(syms.trainable(model))
    coordinates = leg_coordinates(symmetries, {n: tuple(t.shape) for n, t in tensors.items()})
    wanted = list(mixed_parameters(coordinates, symmetries))
    found: dict[str, list[Factors]] = {n: [] for n in wanted}
    for batch in batches:
        for name, factors in _one_batch(model, loss_fn, batch, {n: tensors[n] for n in wanted}).items():
            found[name].append(factors)
    return {n: Factors(torch.cat([f.left for f in fs]), torch.cat([f.right for f in fs])) for n, fs in found.items()}


def _one_batch(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, wanted: dict[str, Tensor]
) -> dict[str, Factors]:
    uses: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in wanted}
    names = {id(t): n for n, t in wanted.items()}
    layers = {m: names[id(m.weight)] for m in model.modules() if id(getattr(m, "weight", None)) in names}

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        uses[layers[module]].append((inputs[0].detach(), output))

    handles = [m.register_forward_hook(keep) for m in layers if _is_matrix_product(m)]
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


@dataclass(frozen=True, eq=False)
class FactorTerm:
    """A weight matrix that legs on both its axes move, with its per-sample gradients as `Factors`."""

    parameter: str
    symmetries: tuple[tuple[int, Symmetry], ...]
    theta: Tensor
    factors: Factors
    mean: Tensor
    weights: Weights

    def add(self, elements: Sequence[Tensor], out: list[list[LegPair]]) -> tuple[float, float]:
        duals = {i: _dual(s, elements[i]) for i, s in self.symmetries}
        here = {i: elements[i] for i, _ in self.symmetries}
        theta, mean = self._moved(self.theta, here), self._moved(self.mean, duals)
        sides = (self.factors.left, self.factors.right)
        n, t = sides[0].shape[:2]
        moved = [self._side(sides[axis], axis, duals) for axis in (0, 1)]
        inner = [x.reshape(n, t, -1) @ x.reshape(n, t, -1).mT for x in moved]
        partner = [(inner[1 - axis] @ moved[axis].reshape(n, t, -1)).reshape(n * t, -1) for axis in (0, 1)]
        for index, position, leg, symmetry in self._legs():
            axis = leg.axes[0] % 2
            row_leg = replace(leg, axes=(0,))
            x, y = row_leg.unfold(moved[axis].mT), row_leg.unfold(partner[axis].mT)
            second = (x * y).sum((1, 2)) if symmetry.is_torus else x @ y.mT
            drive = self.weights.drive(second / n, symmetry.leg_gram(leg, mean))
            out[index][position] = (symmetry.leg_gram(leg, theta), drive)
        trace = (inner[0] * inner[1]).sum() / n
        return float(theta.square().sum()), float(self.weights.drive(trace, mean.square().sum()))

    def slope(self, elements: Sequence[Tensor], generators: Sequence[Tensor], out: list[Tensor]) -> None:
        theta = self._moved(self.theta, {i: elements[i] for i, _ in self.symmetries})
        rate = torch.zeros_like(theta)
        for index, symmetry in self.symmetries:
            rate = rate + symmetry.tangent_of(self.parameter, theta, generators[index])
        for index, _, leg, symmetry in self._legs():
            grown, shrunk = symmetry.leg_gram(leg, theta + rate), symmetry.leg_gram(leg, theta - rate)
            out[index] = out[index] + leg.exponent * (grown - shrunk) / 2

    def _legs(self) -> list[tuple[int, int, Leg, Symmetry]]:
        return [
            (index, position, leg, symmetry)
            for index, symmetry in self.symmetries
            for position, leg in enumerate(symmetry.weight_legs)
            if leg.parameter == self.parameter
        ]

    def _moved(self, matrix: Tensor, elements: dict[int, Tensor]) -> Tensor:
        """`matrix` under all legs, in float64."""
        x = matrix.double().clone()
        for index, _, leg, symmetry in self._legs():
            _apply(leg, symmetry, elements[index], x if leg.axes[0] % 2 == 0 else x.mT)
        return x

    def _side(self, factor: Tensor, axis: int, elements: dict[int, Tensor]) -> Tensor:
        """One factor, `[N * T, rows of the axis]`, under the legs on that axis."""
        x = factor.double().flatten(0, 1).clone()
        for index, _, leg, symmetry in self._legs():
            if leg.axes[0] % 2 == axis:
                _apply(leg, symmetry, elements[index], x.mT)
        return x


def _dual(symmetry: Symmetry, element: Tensor) -> Tensor:
    return symmetry.inverse(element) if symmetry.is_torus else torch.linalg.inv(element).mT


def _apply(leg: Leg, symmetry: Symmetry, element: Tensor, x: Tensor) -> None:
    """Move the rows of `x` that the leg chooses, in place."""
    rows = torch.as_tensor(leg.index.reshape(-1))
    if symmetry.is_torus:
        factors = (element**leg.exponent).repeat_interleave(leg.replicas)
        x[rows] *= factors[:, None]
        return
    g = element if leg.sign > 0 else torch.linalg.inv(element).mT
    x[rows] = (g @ x[rows].reshape(leg.blocks, leg.dim, -1)).reshape(len(rows), -1)


def fits_factors(symmetries: Sequence[Symmetry], parameter: str, shape: tuple[int, ...]) -> bool:
    """True when every leg on the parameter lies along one of its two axes as it is stored."""
    legs = [leg for s in symmetries for leg in s.weight_legs if leg.parameter == parameter]
    return len(shape) == 2 and all(leg.view in (None, shape) and len(leg.axes) == 1 for leg in legs)
