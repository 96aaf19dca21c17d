"""Completeness oracle: the dimension of all axis-wise linear symmetries, from a numerical null space (theory 11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.inputs import ModelInputs
from noetherflow.discovery.bench import widened
from noetherflow.discovery.copies import ModelCopy, eps_settings
from noetherflow.discovery.failures import first_line, own_failure
from noetherflow.discovery.outputs import floating_tensors
from noetherflow.discovery.raw_axes import RawAxes, generator_rows, raw_axes, touched
from noetherflow.discovery.repeat import same_draws
from noetherflow.discovery.unusable import refuse_unusable
from noetherflow.discovery.wide import WideFloats
from noetherflow.errors import DataError

MAX_UNKNOWNS = 20_000
GAP = 1e-6
"""Singular values below this fraction of the largest count as zero."""
SMALLEST_EPS = 1e-30
"""In place of 0, which a normalisation with batch statistics does not take."""
UNUSED = 1e-13
"""Entries whose gradients stay below this fraction of the largest one do not matter."""
MOST_ROWS = 64
"""Projections of the outputs of one draw of weights, at most."""


@dataclass(frozen=True)
class SymmetryCount:
    """How many axis-wise linear symmetries a model has: `symmetries = null - relations`.

    Attributes:
        symmetries: independent directions that leave the function as it is.
        null: dimension of the null space of all generators.
        relations: generators that act as nothing, a constant on one axis of a parameter against its inverse on another.
        unknowns: numbers that describe a generator.
        equations: linear equations on them.
        zero: the largest singular value that counts as zero, relative to the largest of all.
        nonzero: the smallest that does not.
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
        """The numbers by name."""
        return asdict(self)


def count_symmetries(
    model: nn.Module,
    example_inputs: Any = (),
    symmetric: bool = True,
    *,
    affine: bool = False,
    spread: float = 0.3,
    train: bool = False,
    seed: int = 0,
) -> SymmetryCount:
    """Count the generators B with `sum_pa <B_pa, unfold_a(dy/dtheta_p) unfold_a(theta_p)^T> = 0`.

    The equation is posed for every output y, at many random weights and inputs. The unknown matrices B act along the
    axes of each parameter as it is stored (`raw_axes`); nothing of this comes from `find_symmetries`, which can be
    checked against the count. Parameters and coordinates whose gradient is identically zero (unused embedding rows, key
    biases) are left out. For small models: the cost grows with the cube of the number of unknowns.

    Args:
        model: the model, wrapped or not; it is not changed.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments. Integer inputs are permuted
            and floating ones drawn anew.
        symmetric: symmetric matrices only, which carry the charges; False counts dimensions of the Lie algebra.
        affine: also count maps `theta -> B theta + c` of vectors and numbers, as of a gain `1 + weight`; every entry of
            a vector that may be shifted freely (a key's bias) then counts.
        spread: deviation of the random weights around the model's.
        train: run in training mode (batch statistics).
        seed: of all random draws.

    Returns:
        The count, with the singular values on both sides of the gap.

    Raises:
        DataError: more than 20,000 unknowns, gradients that are not finite, or weights on the meta device.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
        >>> count_symmetries(net, torch.ones(1, 2)).symmetries  # the symmetric generators of GL(3)
        6

    Source:
        theory.md section 11.
    """
    refuse_unusable(model, "count_symmetries")
    with torch.inference_mode(False), torch.enable_grad():
        copied = ModelCopy.of(model, torch.float64)
        copied.model.train(train)
        for setting in eps_settings(copied.model):
            setattr(setting.module, setting.name, SMALLEST_EPS)
        floating = {n: t for n, t in copied.tensors.items() if t.is_floating_point() and t.numel()}
        parameters = {n: t for n, t in floating.items() if isinstance(t, nn.Parameter)}
        plan = raw_axes(copied.model, parameters, affine)
        _refuse_too_many(sum(axes.unknowns(symmetric) for axes in plan.values()))
        for p in parameters.values():
            p.requires_grad_(True)
        probe = GeneratorProbe(copied.model, parameters, plan, symmetric, spread, seed)
        inputs = ModelInputs.of(widened(example_inputs))
        try:
            equations = probe.equations(inputs)
        except (RuntimeError, TypeError, IndexError) as failure:
            raise DataError(own_failure(probe.model, inputs) or first_line(failure)) from failure
        return _count(probe, equations)


def _refuse_too_many(unknowns: int) -> None:
    if unknowns > MAX_UNKNOWNS:
        raise DataError(
            f"{unknowns} unknowns are too many for a dense null space (at most {MAX_UNKNOWNS}); use a smaller model"
        )


@dataclass(frozen=True, eq=False)
class GeneratorProbe:
    """A model whose generators are looked for at random weights and inputs.

    Attributes:
        model: a float64 copy, whose weights are overwritten.
        parameters: its parameters by canonical name.
        plan: the generators of each.
        symmetric: unknown matrices are symmetric.
        spread: deviation of the random weights.
        seed: of all draws.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    plan: Mapping[str, RawAxes]
    symmetric: bool
    spread: float
    seed: int

    @property
    def unknowns(self) -> dict[str, int]:
        """How many numbers describe a generator, by parameter."""
        return {name: axes.unknowns(self.symmetric) for name, axes in self.plan.items()}

    def equations(self, inputs: ModelInputs) -> Equations:
        """Collect equations until there are more than unknowns.

        A vector of n entries at one choice of weights leaves matrices with `B theta = 0`, so that more than n choices
        are needed.
        """
        rng = torch.Generator("cpu").manual_seed(self.seed)
        base = {n: p.detach().clone() for n, p in self.parameters.items()}
        wanted = 1.2 * sum(self.unknowns.values()) + 32
        draws = 8 + max((a.size for axes in self.plan.values() for a in axes.axes), default=1)
        per_draw = max(1, min(MOST_ROWS, int(wanted / draws)))
        rows: list[Tensor] = []
        used = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in self.parameters.items()}
        while sum(map(len, rows)) < wanted or len(rows) < draws:
            with torch.no_grad():
                for n, p in self.parameters.items():
                    noise = torch.randn(p.shape, dtype=p.dtype, generator=rng, device="cpu")
                    p.copy_(base[n] + self.spread * noise.to(p.device))
            gradients = self._gradients(_redrawn(inputs, rng), per_draw, rng)
            largest = max((float(g.abs().max()) for g in gradients.values()), default=0.0)
            for n, g in gradients.items():
                used[n] |= (g.abs().amax(0) > UNUSED * largest).cpu()
            parts = [
                generator_rows(self.plan[n], p.detach(), gradients[n], self.symmetric).cpu()
                for n, p in self.parameters.items()
            ]
            rows.append(torch.cat(parts, dim=1))
        return Equations(torch.cat(rows), used)

    def _gradients(self, inputs: ModelInputs, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Gradients of random projections of the outputs, `[rows, *shape]` by parameter."""
        with same_draws(self.seed), WideFloats():
            outputs = [t.double().reshape(-1) for t in floating_tensors(inputs.call(self.model)) if t.requires_grad]
            if not outputs:
                raise DataError("no output depends on a parameter through autograd; the oracle has nothing to look at")
            y = torch.cat(outputs)
            count = min(count, y.numel())  # more projections of one draw would not be independent
            probes = torch.randn(count, y.numel(), dtype=torch.float64, generator=rng, device="cpu").to(y.device)
            leaves = list(self.parameters.values())
            found = [torch.autograd.grad(y, leaves, p, retain_graph=True, allow_unused=True) for p in probes]
        stacked = zip(self.parameters.items(), zip(*found, strict=True), strict=True)
        return {n: torch.stack([torch.zeros_like(p) if g is None else g for g in rows]) for (n, p), rows in stacked}


@dataclass(frozen=True, eq=False)
class Equations:
    """Linear equations on the generators of a model.

    Attributes:
        matrix: one row per equation, one column per unknown, parameter after parameter.
        used: which entries of each parameter the outputs depend on.
    """

    matrix: Tensor
    used: dict[str, Tensor]


def _count(probe: GeneratorProbe, found: Equations) -> SymmetryCount:
    kept = {n: touched(axes, found.used[n], probe.symmetric) for n, axes in probe.plan.items()}
    relations = sum(_relations(axes, found.used[n], kept[n], probe.symmetric) for n, axes in probe.plan.items())
    matrix = found.matrix[:, torch.cat(list(kept.values()))]
    if not matrix.numel() or not bool(torch.isfinite(matrix).all()):
        raise DataError("gradients are not finite at random weights; the oracle needs a smooth model")
    values = _singular_values(matrix)
    null = int((values < GAP).sum())
    zero = float(values[-null]) if null else 0.0
    nonzero = float(values[-null - 1]) if null < len(values) else 0.0
    return SymmetryCount(null - relations, null, relations, matrix.shape[1], matrix.shape[0], zero, nonzero)


def _singular_values(matrix: Tensor) -> Tensor:
    """Singular values relative to the largest, of rows and columns scaled to similar size."""
    rows = matrix / torch.linalg.vector_norm(matrix, dim=1, keepdim=True).clamp_min(1e-300)
    columns = torch.linalg.vector_norm(rows, dim=0)
    values = torch.linalg.svdvals(rows / torch.where(columns > GAP * columns.max(), columns, columns.max()))
    return values / values[0]


def _relations(axes: RawAxes, used: Tensor, kept: Tensor, symmetric: bool) -> int:
    """How many generators of one parameter act as nothing on the entries that matter.

    With one matrix along each axis these are the constants that cancel between axes. Where matrices depend on the index
    of another axis, they are counted as the null space for functions with arbitrary gradients.
    """
    if not kept.any():
        return 0
    if not axes.overlapping:
        return len(axes.axes) - 1
    rng = torch.Generator("cpu").manual_seed(0)
    rows = []
    for _ in range(8 + max(a.size for a in axes.axes)):
        theta = torch.randn(used.shape, dtype=torch.float64, generator=rng, device="cpu")
        count = 8 + int(kept.sum()) // 8
        gradients = torch.randn(count, *used.shape, dtype=torch.float64, generator=rng, device="cpu") * used
        rows.append(generator_rows(axes, theta, gradients, symmetric))
    return int((_singular_values(torch.cat(rows)[:, kept]) < GAP).sum())


def _redrawn(inputs: ModelInputs, rng: torch.Generator) -> ModelInputs:
    """New floating inputs, permuted integer ones."""

    def draw(x: Tensor) -> Tensor:
        if x.numel() < 2:
            return x
        if x.is_floating_point():
            return torch.randn(x.shape, dtype=x.dtype, generator=rng, device="cpu").to(x.device)
        order = torch.randperm(x.numel(), generator=rng, device="cpu").to(x.device)
        return x.reshape(-1)[order].reshape(x.shape)

    return inputs.map(draw)
