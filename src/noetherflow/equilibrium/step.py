"""One SGD step of one charge, split exactly, without any expectation or limit (theory.md section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow.symmetry.symmetry import Symmetry


@dataclass(frozen=True, eq=False)
class StepIdentity:
    """One SGD step of one charge, split exactly: `C' - C = gradient + decay + noise + residual`, layout
    `symmetry.shape`.

    `decay = ((1 - lr w)^2 - 1) C`, `noise = lr^2 sum_legs exponent dX dX^T` (the minibatch gradient's own charge), and
    `gradient = -lr (1 - lr w) sum_legs exponent (X dX^T + dX X^T)`, zero up to rounding by invariance.
    """

    measured: Tensor
    gradient: Tensor
    decay: Tensor
    noise: Tensor
    scale: float

    @property
    def residual(self) -> Tensor:
        """`measured - decay - noise`: what an exact symmetry leaves at rounding level."""
        return self.measured - self.decay - self.noise

    @property
    def relative_residual(self) -> float:
        """`max |residual|` over the largest leg Gram entry, the size at which rounding enters."""
        return float(self.residual.abs().max()) / self.scale if self.scale else 0.0


def step_identity(
    symmetry: Symmetry,
    before: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    sgd: SGDConfig,
) -> StepIdentity:
    """Split the change of a charge over one step `theta' = theta - lr (g_B + w theta)` (theory.md section 3).

    `before`, `after`: parameters around the step; `gradients`: the minibatch gradient, all by canonical name.
    """
    eta, w = sgd.lr, sgd.weight_decay
    old, new = symmetry.grams(before), symmetry.grams(after)
    charge = symmetry.combine(old)
    shrink = 1 - eta * w
    return StepIdentity(
        measured=symmetry.combine(new) - charge,
        gradient=-eta * shrink * cross_charge(symmetry, before, gradients),
        decay=(shrink**2 - 1) * charge,
        noise=eta**2 * symmetry.charge(gradients),
        scale=max(float(k.abs().max()) for k in (*old, *new)),
    )


def cross_charge(symmetry: Symmetry, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """`sum_legs exponent (X Y^T + Y X^T)` of two sets of tensors, layout `symmetry.shape` (the polarised charge)."""
    plus = symmetry.charge({n: a[n] + b[n] for n in symmetry.parameters})
    minus = symmetry.charge({n: a[n] - b[n] for n in symmetry.parameters})
    return (plus - minus) / 2
