"""The free test of moments against symmetries: for every generator A of a symmetric loss `theta^T A gbar = 0`."""

from __future__ import annotations

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
"""For symmetries that a normalisation's eps makes approximate, half precision, and minibatches along a run."""


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

    def beyond(self, allowance: Allowance) -> Tensor:
        """Where the value is not explained by rounding."""
        return self.value.abs() > allowance.mean * self.mean + allowance.noise * self.noise


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


def refuse_other_moments(model: nn.Module, syms: SymmetrySet, moments: GradientMoments) -> None:
    """Refuse moments that are not those of a loss with these symmetries at these weights.

    Raises:
        MomentError: `theta^T A gbar` is not zero for some symmetry: the loss breaks it, the weights have changed
            since the measurement, or the moments are another model's. Names the symmetry, the number and the remedies.
    """
    tensors = tensors_of(model)
    found: list[tuple[float, Symmetry]] = []
    for s in syms:
        if s.name not in moments.second or any(leg.buffer for leg in s.legs):
            continue  # running statistics move along: the gradient at fixed ones obeys no such law
        allowed = _allowance(model, syms, s, moments)
        test = first_order(s, tensors, moments)
        beyond = test.beyond(allowed)
        if bool(beyond.any()):
            found.append((float(test.share()[beyond].max()), s))
    if found:
        share, worst = max(found, key=lambda pair: pair[0])
        raise MomentError(_refusal(share, worst, len(found)))


def _allowance(model: nn.Module, syms: SymmetrySet, symmetry: Symmetry, moments: GradientMoments) -> Allowance:
    """By the dtype of the weights; float32 where the model casts to it inside."""
    if symmetry.eps is not None or (moments.replicates is not None and moments.replicates.moving):
        return COARSE
    eps = machine_epsilon(model, (symmetry,))
    if syms.casts:
        eps = max(eps, torch.finfo(torch.float32).eps)
    return Allowance(min(60 * eps**0.5, COARSE.mean), min(8e3 * eps, COARSE.noise))


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
