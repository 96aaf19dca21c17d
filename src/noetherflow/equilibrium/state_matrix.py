"""The flow of a general_linear symmetry from SGD's momentum buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noetherflow.core import spd
from noetherflow.equilibrium.averages import OptimizerAverages
from noetherflow.equilibrium.blocks import GLClasses, classify_gl
from noetherflow.equilibrium.solve import finite_gl_step
from noetherflow.equilibrium.state_estimate import FlowEstimate
from noetherflow.symmetry.leg import accumulation_dtype
from noetherflow.symmetry.symmetry import Symmetry

SINGULAR = 1e-5
"""Eigenvalues of Grams below this fraction of the largest count as zero: optimiser states are float32 or coarser."""


@dataclass(frozen=True, eq=False)
class MatrixFlow:
    """Charge `[blocks, n, n]`, what decay takes of it per step, and the flow."""

    charge: Tensor
    decay: Tensor
    estimate: FlowEstimate


@dataclass(frozen=True, eq=False)
class _LegGrams:
    """One leg: its weights, decay and noise as Grams `[blocks, n, n]`, and the variance of each entry of the noise."""

    sign: int
    weight: Tensor
    decay: Tensor
    noise: Tensor
    variance: Tensor


def matrix_flow(symmetry: Symmetry, reads: Sequence[OptimizerAverages]) -> MatrixFlow:
    """Charge, drift and equilibrium of one general_linear symmetry under SGD with momentum.

    Args:
        symmetry: a general_linear symmetry.
        reads: SGD's averages at one step of a run, or at several, whose mean is taken; the means are momentum buffers.

    Returns:
        The flow; its element is the closed form `P = X^-1 # Y` with the others held, the identity in blocks where some
        direction has no equilibrium.

    Source: theory.md sections 5 and 13.
    """
    legs = [_mean_grams([_grams(symmetry, i, read) for read in reads]) for i in range(len(symmetry.weight_legs))]
    zero = torch.zeros(symmetry.shape, dtype=torch.float64)
    x = sum((g.decay if g.sign > 0 else g.noise for g in legs), zero) / 2
    y = sum((g.noise if g.sign > 0 else g.decay for g in legs), zero) / 2
    classes = classify_gl(spd.symmetric(x), spd.symmetric(y), SINGULAR)
    finite = GLClasses.rank(classes.finite) == symmetry.dim
    element, times = symmetry.identity(), torch.zeros(symmetry.blocks, dtype=torch.float64)
    if bool(finite.any()):
        element[finite] = spd.sqrtm(finite_gl_step(classes, x, y))[finite]
        times[finite] = _relaxation([_moved(g, element) for g in legs], finite)
    noise = sum((g.sign * g.noise for g in legs), zero)
    decay = sum((g.sign * g.decay for g in legs), zero)
    size = torch.linalg.matrix_norm(x) + torch.linalg.matrix_norm(y)
    found = FlowEstimate(
        source="momentum",
        noise=noise,
        error=sum((g.variance for g in legs), zero).sqrt(),
        drift=noise - decay,
        imbalance=torch.where(size > 0, torch.linalg.matrix_norm(y - x) / size, torch.zeros_like(size)),
        finite=finite,
        element=element,
        log_error=None,
        relaxation_steps=times,
    )
    return MatrixFlow(sum((g.sign * g.weight for g in legs), zero), decay, found)


def _mean_grams(parts: Sequence[_LegGrams]) -> _LegGrams:
    """The mean over snapshots; the variance of its noise is then that of the mean, from the scatter."""
    if len(parts) == 1:
        return parts[0]
    weight, decay, noise = (torch.stack([getattr(p, n) for p in parts]) for n in ("weight", "decay", "noise"))
    return _LegGrams(parts[0].sign, weight.mean(0), decay.mean(0), noise.mean(0), noise.var(0) / len(parts))


def _grams(symmetry: Symmetry, index: int, read: OptimizerAverages) -> _LegGrams:
    """The Grams of one leg. An entry of a Gram over `n` independent columns has variance `(M_ii M_jj + M_ij^2) / n`."""
    leg, law, lr = symmetry.weight_legs[index], read.law, read.reference_lr
    averages = read.by_name[leg.parameter]
    assert averages.mean is not None
    rates = averages.rates
    weight = leg.gram(averages.theta.detach()).double().cpu() * lr / rates.lr
    buffer = leg.unfold(accumulation_dtype(averages.mean))
    noise = (buffer @ buffer.mT).double().cpu() * law.persistence * lr * rates.lr
    diagonal = noise.diagonal(dim1=-2, dim2=-1)
    columns = _independent_columns(noise)
    variance = (diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2) + noise.square()) / columns[:, None, None]
    return _LegGrams(leg.sign, weight, weight * rates.lr * law.decay_per_step(rates), noise, variance)


def _independent_columns(gram: Tensor) -> Tensor:
    """One over the mean squared cosine between different rows, `[blocks]`, at least 1."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    cosines = (gram / norms.unsqueeze(-1) / norms.unsqueeze(-2)).square()
    pairs = cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
    n = gram.shape[-1]
    return (n * (n - 1) / pairs.clamp_min(1e-12)).clamp_min(1.0) if n > 1 else torch.ones(len(gram)).to(gram)


def _moved(leg: _LegGrams, element: Tensor) -> _LegGrams:
    """The leg at the equilibrium; decay is a multiple of the weight."""
    dual = torch.linalg.inv(element).mT
    g, h = (element, dual) if leg.sign > 0 else (dual, element)
    return _LegGrams(
        leg.sign, g @ leg.weight @ g.mT, g @ leg.decay @ g.mT, h @ leg.noise @ h.mT, torch.zeros_like(leg.variance)
    )


def _relaxation(legs: list[_LegGrams], finite: Tensor) -> Tensor:
    """Steps of the slowest direction: `1 / (4 min eig(K^-1 Z))`, `4 Z` the sum of decay and noise (`flow.py`)."""
    k = torch.stack([g.weight for g in legs]).sum(0)[finite]
    z = torch.stack([g.decay + g.noise for g in legs]).sum(0)[finite] / 4
    root = spd.inv_sqrtm(z)
    slowest: Tensor = torch.linalg.eigvalsh(root @ k @ root).amax(-1)
    return slowest / 4
