"""Completeness oracle: the dimension of all axis-wise linear symmetries, from a numerical null space (theory 11)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.inputs import ModelInputs
from noetherflow.discovery.axes import axis_atoms_of
from noetherflow.discovery.copies import ModelCopy, eps_settings, in_dtype
from noetherflow.discovery.export import export
from noetherflow.discovery.gauges import AxisAtoms
from noetherflow.discovery.outputs import floating_tensors
from noetherflow.discovery.unusable import refuse_unusable
from noetherflow.errors import DataError

MAX_UNKNOWNS = 20_000
GAP = 1e-6
"""Singular values below this fraction of the largest count as zero; casts to float32 leave about 1e-8."""


@dataclass(frozen=True)
class SymmetryCount:
    """How many axis-wise linear symmetries a model has.

    `symmetries = null - relations`: the null space of all generators, less those that act as zero (a constant on one
    axis of a parameter against its inverse on another). `zero` and `nonzero` are the singular values on both sides of
    the gap, relative to the largest.
    """

    symmetries: int
    null: int
    relations: int
    unknowns: int
    equations: int
    zero: float
    nonzero: float

    def __str__(self) -> str:
        return (
            f"{self.symmetries} symmetric directions = {self.null} null - {self.relations} that act as zero; "
            f"{self.unknowns} unknowns, {self.equations} equations, "
            f"singular values {self.zero:.1e} | {self.nonzero:.1e}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def count_symmetries(
    model: nn.Module,
    example_inputs: Any,
    symmetric: bool = True,
    *,
    spread: float = 0.3,
    train: bool = False,
    seed: int = 0,
) -> SymmetryCount:
    """`sum_pa <B_pa, unfold_a(dy/dtheta_p) unfold_a(theta_p)^T> = 0` for every output y, all theta and inputs.

    Unknown matrices `B` per parameter axis, symmetric ones only (they carry the charges) unless `symmetric=False`,
    which counts Lie-algebra dimensions. Weights are redrawn around the model's with deviation `spread`, integer inputs
    permuted, floating ones redrawn; `eps` of normalisation modules is set to 1e-30. Parameters and coordinates whose
    gradient is identically zero (unused embedding rows, key biases) are left out. For small models: the cost grows with
    the cube of the number of unknowns. `train=True` runs in training mode (batch statistics).

    Raises DataError when there are more than 20,000 unknowns or the outputs are not finite.
    """
    refuse_unusable(model, "count_symmetries")
    plan = axis_atoms_of(export(model, example_inputs))
    copied = ModelCopy.of(model, torch.float64)
    copied.model.train(train)
    for setting in eps_settings(copied.model):
        setattr(setting.module, setting.name, 1e-30)
    params = {n: p for n, p in copied.tensors.items() if isinstance(p, nn.Parameter) and n in plan}
    unknowns = sum(_unknowns(tuple(p.shape), plan[n], symmetric) for n, p in params.items())
    if unknowns > MAX_UNKNOWNS:
        raise DataError(
            f"{unknowns} unknowns are too many for a dense null space (at most {MAX_UNKNOWNS}); use a smaller model"
        )
    for p in params.values():
        p.requires_grad_(True)
    rng = torch.Generator("cpu").manual_seed(seed)
    base = {n: p.detach().clone() for n, p in params.items()}
    inputs = in_dtype(ModelInputs.of(example_inputs), torch.float64)
    rows: list[Tensor] = []
    used = torch.zeros(unknowns, dtype=torch.bool)
    count = 0
    # A vector of n entries at one theta leaves matrices with B theta = 0: at least n different theta are needed.
    longest = max((_sides(tuple(params[n].shape), axis)[1] for n in params for axis in plan[n]), default=1)
    per_draw = max(1, min(64, int((1.2 * unknowns + 32) / (longest + 8))))
    while count < 1.2 * unknowns + 32 or len(rows) < longest + 8:
        with torch.no_grad():
            for n, p in params.items():
                p.copy_(base[n] + spread * torch.randn(p.shape, dtype=p.dtype, generator=rng, device="cpu"))
        equations, seen = _equations(copied.model, params, plan, _redrawn(inputs, rng), per_draw, symmetric, rng)
        rows.append(equations)
        used |= seen
        count += len(equations)
    parts = used.split([_unknowns(tuple(p.shape), plan[n], symmetric) for n, p in params.items()])
    relations = sum(_relations(plan[n]) for n, part in zip(params, parts, strict=True) if part.any())
    return _count(torch.cat(rows)[:, used], relations)


def _count(matrix: Tensor, relations: int) -> SymmetryCount:
    if not bool(torch.isfinite(matrix).all()):
        raise DataError("gradients are not finite at random weights; the oracle needs a smooth model")
    rows = matrix / torch.linalg.vector_norm(matrix, dim=1, keepdim=True).clamp_min(1e-300)
    columns = torch.linalg.vector_norm(rows, dim=0)
    values = torch.linalg.svdvals(rows / torch.where(columns > GAP * columns.max(), columns, columns.max()))
    values = values / values[0]
    null = int((values < GAP).sum())
    zero = float(values[-null]) if null else 0.0
    nonzero = float(values[-null - 1]) if null < len(values) else 0.0
    return SymmetryCount(null - relations, null, relations, matrix.shape[1], matrix.shape[0], zero, nonzero)


def _sides(shape: tuple[int, ...], axis: AxisAtoms) -> tuple[int, int]:
    """Number of separate matrices B of an axis, and their size."""
    sizes = axis.sizes(shape or (1,))
    return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def _unknowns(shape: tuple[int, ...], plan: list[AxisAtoms], symmetric: bool) -> int:
    sizes = [_sides(shape, axis) for axis in plan]
    return sum(b * (n * (n + 1) // 2 if symmetric else n * n) for b, n in sizes)


def _relations(plan: list[AxisAtoms]) -> int:
    return max(axis.slices for axis in plan) * (len(plan) - 1)


def _equations(
    model: nn.Module,
    params: dict[str, nn.Parameter],
    plan: dict[str, list[AxisAtoms]],
    inputs: ModelInputs,
    count: int,
    symmetric: bool,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """One row per random projection of the outputs: the coefficients of every unknown, and which unknowns matter."""
    y = torch.cat([t.double().reshape(-1) for t in floating_tensors(inputs.call(model)) if t.requires_grad])
    count = min(count, y.numel())  # more projections of one draw would not be independent
    probes = torch.randn(count, y.numel(), dtype=torch.float64, generator=rng, device="cpu")
    gradients = [torch.autograd.grad(y, list(params.values()), p, retain_graph=True, allow_unused=True) for p in probes]
    largest = max(float(g.abs().max()) for row in gradients for g in row if g is not None and g.numel())
    rows, seen = [], []
    for k, (name, p) in enumerate(params.items()):
        g = torch.stack([torch.zeros_like(p) if row[k] is None else row[k] for row in gradients])
        for axis in plan[name]:
            axes = axis.axes
            blocks, n = _sides(tuple(p.shape), axis)
            full = axis.view or tuple(p.shape) or (1,)
            theta = p.detach().reshape(full).movedim(axes, tuple(range(len(axes)))).reshape(blocks, n, -1)
            moved = g.reshape(count, *full).movedim([a + 1 for a in axes], list(range(1, 1 + len(axes))))
            moved = moved.reshape(count, blocks, n, -1)
            product = torch.einsum("kbim,bjm->kbij", moved, theta)
            size = moved.abs().amax(dim=(0, 3))
            used = size > 1e-13 * largest
            touched = used[..., :, None] & used[..., None, :]
            if symmetric:
                i, j = torch.triu_indices(n, n)
                product = torch.where(i == j, product[..., i, j], product[..., i, j] + product[..., j, i])
                touched = touched[..., i, j]
            rows.append(product.reshape(count, -1))
            seen.append(touched.reshape(-1))
    return torch.cat(rows, dim=1), torch.cat(seen)


def _redrawn(inputs: ModelInputs, rng: torch.Generator) -> ModelInputs:
    """New floating inputs, permuted integer ones."""

    def draw(x: Tensor) -> Tensor:
        if x.numel() < 2:
            return x
        if x.is_floating_point():
            return torch.randn(x.shape, dtype=x.dtype, generator=rng, device="cpu")
        return x.reshape(-1)[torch.randperm(x.numel(), generator=rng, device="cpu")].reshape(x.shape)

    return inputs.map(draw)
