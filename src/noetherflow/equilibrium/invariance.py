"""The free test of moments against symmetries: for every generator A of a symmetric loss `theta^T A gbar = 0`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.conditioning import machine_epsilon
from noetherflow.errors import MomentError
from noetherflow.moments.result import GradientMoments
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(frozen=True)
class Allowance:
    """What rounding may leave of `theta^T A gbar`: a part of `sum |theta| |gbar|` plus a part of the root of `sum
    theta^2 E[g^2]`, which counts where the mean gradient itself is small against the gradients it is the mean of.
    """

    mean: float
    noise: float


COARSE = Allowance(0.3, 0.05)
"""For symmetries that a normalisation's eps makes approximate, weights in half precision, and minibatches along a run.
"""
ROUNDINGS = 4.0
"""Times `eps` of the arithmetic, of the root of `sum theta^2 E[g^2]`. Clean networks leave 0.05 eps of it: roundings of
single products are independent. (MLPs of 1 to 8 hidden layers, linear ones, a CNN and a transformer; float32 and
bfloat16 autocast.)"""
LEAST = 1e-9
"""What is let pass in any arithmetic: no penalty that matters is as small."""


@dataclass(frozen=True, eq=False)
class FirstOrder:
    """`theta^T A gbar` for every coordinate (torus) or matrix entry (general_linear), in the symmetry's layout, with
    the two sizes that an Allowance is a part of.
    """

    value: Tensor
    mean: Tensor
    noise: Tensor

    def share(self) -> Tensor:
        """`|theta^T A gbar|` over `sum |theta| |gbar|`, 0 where both are."""
        return self.value.abs() / torch.where(self.mean > 0, self.mean, torch.ones_like(self.mean))

    def limit(self, allowance: Allowance) -> Tensor:
        """The largest value that rounding explains."""
        return allowance.mean * self.mean + allowance.noise * self.noise


def first_order(symmetry: Symmetry, tensors: Mapping[str, Tensor], moments: GradientMoments) -> FirstOrder:
    """The first-order change of a charge that the measured mean gradient would make, zero for a symmetric loss.

    For a torus one generator per coordinate, for general_linear all `n^2` matrix entries, antisymmetric parts included.

    Example: for a loss of `W2 relu(W1 x)` the sum of `W1 * gbar1` over a row equals the sum of `W2 * gbar2` over the
    matching column; a penalty on the activations adds to the first only.

    Args:
        symmetry: One of those measured.
        tensors: The weights by name.
        moments: Moments of the gradients.

    Source: theory.md section 3.
    """
    zero = torch.zeros(symmetry.shape, dtype=torch.float64)
    total = FirstOrder(zero, zero, zero)
    here = symmetry.positions({n: tensors[n].detach() for n in symmetry.parameters})
    for leg, second in zip(symmetry.weight_legs, moments.second[symmetry.name], strict=True):
        theta = here[leg.parameter].double().cpu()
        one = _of_leg(symmetry, leg, theta, moments.mean[leg.parameter].double().cpu(), second.double().cpu())
        total = FirstOrder(total.value + one.value, total.mean + one.mean, total.noise + one.noise)
    return total


def _of_leg(symmetry: Symmetry, leg: Leg, theta: Tensor, mean: Tensor, second: Tensor) -> FirstOrder:
    weight = leg.row_sums(theta.square())
    if symmetry.is_torus:
        product, factor = theta * mean, abs(leg.exponent)
        noise = factor * (weight * second.clamp_min(0)).sqrt()
        return FirstOrder(leg.exponent * leg.row_sums(product), factor * leg.row_sums(product.abs()), noise)
    x, g = leg.unfold(theta), leg.unfold(mean)
    sizes = weight.sqrt().reshape(symmetry.blocks, -1)
    noises = second.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    left, right, rows, columns = (g, x, noises, sizes) if leg.sign > 0 else (x, g, sizes, noises)
    return FirstOrder(leg.sign * left @ right.mT, left.abs() @ right.mT.abs(), rows[:, :, None] * columns[:, None, :])


def refuse_other_moments(model: nn.Module, syms: SymmetrySet, moments: GradientMoments) -> float:
    """Refuse moments that are not those of a loss with these symmetries at these weights.

    Returns:
        The smallest coefficient `c` of a penalty `c |theta|^2` inside the loss that would have been refused; infinite
        where nothing was tested. Its gradient `2 c theta` adds `2 c C` to `theta^T A gbar`.

    Raises:
        MomentError: `theta^T A gbar` is not zero for some symmetry: the loss breaks it, the weights have changed
            since the measurement, or the moments are another model's. Names the symmetry, the number and the remedies.
    """
    tensors = tensors_of(model)
    found: list[tuple[float, Symmetry]] = []
    least = math.inf
    for s in syms:
        if s.name not in moments.second or any(leg.buffer for leg in s.legs):
            continue  # running statistics move along: the gradient at fixed ones obeys no such law
        test = first_order(s, tensors, moments)
        limit = test.limit(_allowance(model, syms, s, moments))
        beyond = test.value.abs() > limit
        least = min(least, _least_penalty(s, tensors, limit))
        if bool(beyond.any()):
            found.append((float(test.share()[beyond].max()), s))
    if found:
        share, worst = max(found, key=lambda pair: pair[0])
        raise MomentError(_refusal(share, worst, len(found)))
    return least


def _least_penalty(symmetry: Symmetry, tensors: Mapping[str, Tensor], limit: Tensor) -> float:
    """The least `c` with `2 c |C|` above the limit on some coordinate."""
    here = symmetry.positions({n: tensors[n].detach().double().cpu() for n in symmetry.parameters})
    charge = 2 * symmetry.charge(here).abs()
    found = limit[charge > 0] / charge[charge > 0]
    return float(found.min()) if found.numel() else math.inf


NOTICED = 1e-5
"""A penalty in the loss of this many squared weights is noticed as a rule; where it is not, the answer says so."""


def cautions(moments: GradientMoments, least_penalty: float) -> tuple[str, ...]:
    """What takes away from an answer given by moments that were not refused, a sentence each.

    Args:
        moments: those it rests on.
        least_penalty: as `refuse_other_moments` returned it.
    """
    said = list(moments.conditions.caution)
    if NOTICED < least_penalty < math.inf:
        said.append(
            f"a penalty inside loss_fn of less than {least_penalty:.1e} |theta|^2 would not have been noticed at this "
            "precision; it breaks the symmetries and belongs in weight_decay"
        )
    return tuple(said)


def _allowance(model: nn.Module, syms: SymmetrySet, symmetry: Symmetry, moments: GradientMoments) -> Allowance:
    """By the coarsest arithmetic that the gradients went through, and the number of samples summed.

    The law `theta^T A g = 0` holds for the numbers actually computed up to the rounding of single products, which are
    parts `eps` of terms that `|theta| |g|` of each sample bounds. Sums over samples add `eps` times the root of their
    number.
    """
    if symmetry.eps is not None or (moments.replicates is not None and moments.replicates.moving):
        return COARSE
    eps = max(machine_epsilon(model, (symmetry,)), moments.conditions.rounding)
    if syms.casts:
        eps = max(eps, torch.finfo(torch.float32).eps)
    summed = max(torch.finfo(moments.mean[leg.parameter].dtype).eps for leg in symmetry.weight_legs)
    mean, noise = ROUNDINGS * summed * math.sqrt(moments.samples), max(ROUNDINGS * eps, LEAST)
    return Allowance(min(mean, COARSE.mean), min(noise, COARSE.noise))


def _refusal(share: float, symmetry: Symmetry, count: int) -> str:
    others = f" (and {count - 1} more)" if count > 1 else ""
    return (
        f"symmetry {symmetry.name!r}{others}: theta^T A gbar is {share:.2g} of sum |theta| |gbar|, and would be 0 "
        f"for a "
        "loss with this symmetry at these weights. If the weights changed after the measurement, or the moments "
        "belong to "
        "another model, measure again; if the loss breaks the symmetry (an L2 or activation penalty inside loss_fn), "
        "take "
        "the penalty out (weight decay belongs in the optimiser) or leave the symmetry out: "
        f"syms.without({{{symmetry.name!r}: 'broken by the loss'}})"
    )
