"""One SGD step of one charge, split exactly, without any expectation or limit (theory.md section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow.symmetry.symmetry import Symmetry


@dataclass(frozen=True, eq=False)
class StepIdentity:
    """One SGD step of one charge, split exactly: `C' - C = gradient + decay + noise`, layout `symmetry.shape`.

    Attributes:
        measured: `C' - C` of the weights before and after.
        gradient: `-2 lr (1 - lr w) theta^T A g`, zero up to rounding by invariance.
        decay: What weight decay takes, `((1 - lr w)^2 - 1) C`; where a leg has an offset, the effect of the pull on the
            stored weight.
        noise: `lr^2 g^T A g`, the minibatch gradient's own charge.
        scale: The largest entry of any leg Gram, the size at which rounding enters.
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
        """`max |residual|` over `scale`."""
        return float(self.residual.abs().max()) / self.scale if self.scale else 0.0


def step_identity(
    symmetry: Symmetry,
    before: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    sgd: SGDConfig,
) -> StepIdentity:
    """Split the change of a charge over one step `theta' = theta - lr (g_B + w theta)`.

    Args:
        symmetry: Whose charge.
        before, after: The weights around the step, by canonical name.
        gradients: The minibatch gradient `g_B`, by canonical name.
        sgd: Learning rate and weight decay (no momentum).

    Returns:
        The parts; `measured` is their sum up to rounding, whatever the loss.

    Example:
        ```
        before = {n: t.detach().clone() for n, t in nf.tensors_of(model).items()}
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        step = nf.step_identity(syms[0], before, gradients, nf.tensors_of(model), sgd)
        assert step.relative_residual < 1e-6
        ```

    Source: theory.md section 3.
    """
    lr, w = sgd.lr, sgd.weight_decay
    here, shrink = symmetry.positions(before), 1 - lr * w
    old, new = symmetry.grams(here), symmetry.grams(symmetry.positions(after))
    charge = symmetry.combine(old)
    added = {n: torch.full_like(before[n], symmetry.offsets.get(n, 0.0)) for n in symmetry.parameters}
    held = lr * w * symmetry.form(added) + shrink * cross_charge(symmetry, here, added)
    return StepIdentity(
        measured=symmetry.combine(new) - charge,
        gradient=-lr * shrink * cross_charge(symmetry, here, gradients),
        decay=(shrink**2 - 1) * charge + lr * w * (held - lr * cross_charge(symmetry, gradients, added)),
        noise=lr**2 * symmetry.form(gradients),
        scale=max(float(k.abs().max()) for k in (*old, *new)),
    )


def cross_charge(symmetry: Symmetry, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """`sum_legs exponent (X Y^T + Y X^T)` of two sets of tensors, layout `symmetry.shape` (the polarised charge)."""
    plus = symmetry.form({n: a[n] + b[n] for n in symmetry.parameters})
    minus = symmetry.form({n: a[n] - b[n] for n in symmetry.parameters})
    return (plus - minus) / 2
