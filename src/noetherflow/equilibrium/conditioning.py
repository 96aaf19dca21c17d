"""Stretched factors of general_linear symmetries: Grams square their condition number, so look at the factors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noetherflow.core.tensors import tensors_of
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import positions_of

ROUNDING = 10
"""Singular values of an `n`-row factor below `ROUNDING n eps` times the largest are rounding of the weights."""


def rank_tolerance(model: nn.Module, symmetries: Sequence[Symmetry]) -> float:
    """Eigenvalues of Grams below this fraction of the largest are rounding: `10 n eps` of the dtype that sums them (at
    least float32), `eps^2` of the least precise parameter, whose rounding enters squared.
    """
    eps, n = machine_epsilon(model, symmetries), max((s.dim for s in symmetries), default=1)
    return max(10 * n * min(eps, torch.finfo(torch.float32).eps), eps**2)


def machine_epsilon(model: nn.Module, symmetries: Sequence[Symmetry]) -> float:
    """That of the least precise parameter that the symmetries move."""
    names = {n for s in symmetries for n in s.parameters}
    return max((torch.finfo(t.dtype).eps for n, t in tensors_of(model).items() if n in names), default=0.0)


@dataclass(frozen=True)
class Stretches:
    """How far the factors of each general_linear symmetry are stretched, and how far Grams can follow.

    Attributes:
        by_name: Condition numbers of the factors.
        limit: The largest one whose square Grams still resolve.
        trusted: The largest one that leaves the answer six digits in float64; `limit` in coarser dtypes.
    """

    by_name: dict[str, float]
    limit: float
    trusted: float

    @classmethod
    def of(cls, model: nn.Module, symmetries: Sequence[Symmetry]) -> Stretches:
        """Those of a model's weights."""
        if not symmetries:
            return cls({}, math.inf, math.inf)
        tensors, limit = positions_of(model, symmetries), rank_tolerance(model, symmetries) ** -0.5
        precise = machine_epsilon(model, symmetries) < 1e-10
        found = {s.name: stretch(s, tensors) for s in symmetries if not s.is_torus}
        return cls(found, limit, limit / 100 if precise else limit)

    @property
    def imprecise(self) -> set[str]:
        """Names of the symmetries whose Grams lose digits that matter."""
        return {n for n, value in self.by_name.items() if value > self.trusted}

    def advice(self, name: str) -> str:
        """What to do about a symmetry that is stretched too far."""
        return (
            f"the factors are stretched by {self.by_name[name]:.1e}, and the Grams of their gradients, its square, "
            f"resolve "
            f"up to {self.limit:.1e}; orthogonalise them, nf.balance_(model, nf.noise_equilibrium(model, syms, None, "
            "objective='norm'), example_inputs=...), and measure there, or pass remeasure="
        )


def stretch(symmetry: Symmetry, tensors: Mapping[str, Tensor]) -> float:
    """The condition number of a general_linear symmetry's factors: that of its + or - legs, whichever is larger.

    Directions that the weights do not use (singular values at rounding) do not count: a low rank is no stretch.

    Example: `W2 = B G^-1`, `W1 = G A` with well-conditioned `A`, `B` has the stretch of `G`; 1 for a torus.
    """
    if symmetry.is_torus:
        return 1.0
    return max(_condition(*_stacked(symmetry, tensors, sign)) for sign in (1, -1))


def _condition(factor: Tensor, eps: float) -> float:
    """The largest condition number of any block `[blocks, n, m]`, from its Gram where that resolves it."""
    if not factor.numel():
        return 1.0
    squares = torch.linalg.eigvalsh(factor @ factor.mT)
    resolved = max(1e-9, (ROUNDING * factor.shape[-2] * eps) ** 2)
    if bool((squares[:, 0] > resolved * squares[:, -1]).all()):
        return math.sqrt(float((squares[:, -1] / squares[:, 0]).max()))
    spectrum = _used(*_factor_svd(factor), eps)[1]
    low = torch.where(spectrum > 0, spectrum, torch.inf).amin(-1)
    return max(1.0, float((spectrum.amax(-1) / low).max()))


def orthogonalising(symmetry: Symmetry, tensors: Mapping[str, Tensor]) -> Tensor:
    """A group element that makes the + legs orthogonal (the - legs where no + leg is used), `[blocks, n, n]`.

    `F = U diag(s0 / s) U^T` from the singular value decomposition `U diag(s) V^T` of the stacked legs, `s0` the
    geometric mean of `s`, and 1 in directions that the weights do not use.
    """
    sign = 1 if any(bool(tensors[leg.parameter].any()) for leg in symmetry.weight_legs if leg.sign > 0) else -1
    factor, eps = _stacked(symmetry, tensors, sign)
    u, s = _used(*_factor_svd(factor), eps)
    used = s > 0
    logs = torch.where(used, s, torch.ones_like(s)).log()
    level = logs.sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp_min(1)
    scale = torch.where(used, sign * (level - logs), torch.zeros_like(logs)).exp()
    return (u * scale.unsqueeze(-2)) @ u.mT


def moved_copy(model: nn.Module, moves: Sequence[tuple[Symmetry, Tensor]], *, double: bool) -> nn.Module:
    """A copy of the model under group elements; `double`: in float64, for weights that nobody will run."""
    other = copy.deepcopy(model)
    other = other.double() if double else other
    for symmetry, element in moves:
        symmetry.act_(tensors_of(other), element)
    return other


def _stacked(symmetry: Symmetry, tensors: Mapping[str, Tensor], sign: int) -> tuple[Tensor, float]:
    """The legs of one sign side by side, `[blocks, n, columns]`, and the relative rounding of the weights."""
    own = [leg for leg in symmetry.weight_legs if leg.sign == sign]
    if not own:
        return torch.zeros(symmetry.blocks, symmetry.dim, 0, dtype=torch.float64), 0.0
    eps = max(torch.finfo(tensors[leg.parameter].dtype).eps for leg in own)
    return torch.cat([leg.unfold(tensors[leg.parameter].detach().double().cpu()) for leg in own], dim=-1), eps


def _factor_svd(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors `[blocks, n, n]` and values `[blocks, n]`, 0 where there are fewer columns than rows."""
    n = factor.shape[-2]
    if factor.shape[-1] > n:
        factor = torch.linalg.qr(factor.mT, mode="r").R.mT
    u, s, _ = torch.linalg.svd(factor, full_matrices=True)
    return u, torch.nn.functional.pad(s, (0, n - s.shape[-1]))


def _used(u: Tensor, s: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same with singular values at the rounding of the weights set to 0."""
    return u, torch.where(s > ROUNDING * s.shape[-1] * eps * s.amax(-1, keepdim=True), s, torch.zeros_like(s))
