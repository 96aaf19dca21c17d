"""The Noether flow of a two-layer linear net to first order in the learning rate: weights fluctuate around the orbit.

`theory.orbit_flow` puts the weights on the orbit `U W = V`. SGD keeps them at a distance of order `sqrt(eta / S)` from
it, and of every mean of squares a part of order `eta d / S` is of that distance: of the norms, of the charges, and of
`U W` itself. All of them to first order, where `V`, `Sig_x` and `Sig_eps` are diagonal, so that the mean weights are.

Source: theory.md section 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow_paper import closed_form as cf

ITERATIONS = 100
"""Far more than the mean weights need: each divides what is left by about `S / (eta d)`."""


@dataclass(frozen=True, eq=False)
class AlignedNet:
    """`||U W x - V x - eps||^2` with diagonal matrices, each given by its diagonal, `[d]`.

    Attributes:
        product: `V`.
        sigma_x: the covariance of the inputs.
        sigma_eps: that of the label noise.
        sgd: learning rate, batch size and weight decay; plain SGD on new samples.
    """

    product: Tensor
    sigma_x: Tensor
    sigma_eps: Tensor
    sgd: SGDConfig

    @property
    def shrinkage(self) -> float:
        """What decay takes from a product of two weights in a step, over `2 eta`: w, and less of order `eta w^2`."""
        return self.sgd.weight_decay * (1 - self.sgd.effective_lr * self.sgd.weight_decay / 2)

    def spread(self, u: Tensor, w: Tensor) -> Tensor:
        """Variances of `Z`, `[d, d]`, where `U = diag(u) + Z diag(w)` and `W = diag(w) + diag(u) Z`.

        Both gradients are one matrix times the other layer, so that one matrix `Z` of independent entries describes the
        fluctuation. `E = U W - V` is `(u_i^2 + w_j^2) Z_ij`, whose step is linear: a contraction and a kick. Decay adds
        `eta w` to the contraction: half of what it takes from products, because the mean gradient, which holds the mean
        weights against it, grows with them.
        """
        stiffness = _sums(u, w)
        kick = 2 * self.sgd.effective_lr * stiffness
        rate = kick * self.sigma_x + self.sgd.effective_lr * self.shrinkage
        error = (
            kick.square() * self.sigma_eps[:, None] * self.sigma_x / self.sgd.batch_size / (2 * rate - rate.square())
        )
        return error / stiffness.square()

    def mean_product(self, u: Tensor, w: Tensor) -> Tensor:
        """The diagonal of `diag(u) diag(w)`: of `V`, and of what the fluctuation takes away from it, `[d]`.

        The mean of `E` does not change when the pull on it balances the mean product of the two layers' steps and the
        mean of `dU U^T E Sig_x + E Sig_x W^T dW`, fluctuations that are correlated with the error that they multiply.
        Decay pulls the product itself towards zero.
        """
        z, x = self.spread(u, w), self.sigma_x
        pull = _sums(u, w) * x
        own = z.diagonal()
        correlated = x * (_sums(u, w) * z).sum(0) + (pull * z).sum(1) + 2 * pull.diagonal() * own
        steps = 2 * self.sgd.effective_lr * self.product * self.sigma_eps * x / self.sgd.batch_size
        error = (steps - u * w * correlated - self.shrinkage * self.product) / (pull.diagonal() + self.shrinkage)
        return (self.product + error) / (1 + own)

    def mean_weights(self, charges: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """`(u, w)` at which `W W^T - U^T U` has the mean diagonal `charges`, searched from `(u, w)`."""
        for _ in range(ITERATIONS):
            z, product = self.spread(u, w), self.mean_product(u, w)
            gap = charges - u.square() * z.sum(1) + w.square() * z.sum(0)
            total = (gap.square() + 4 * product.square()).sqrt()
            before, (u, w) = u, (((total - gap) / 2).sqrt(), ((total + gap) / 2).sqrt())
            if torch.allclose(u, before, rtol=1e-13, atol=0):
                return u, w
        raise ArithmeticError(f"no mean weights with charges {charges}: eta d / S is too large for the first order")

    def squares(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Means of `||U||^2` and `||W||^2`."""
        z = self.spread(u, w)
        return u.square().sum() + (z @ w.square()).sum(), w.square().sum() + (u.square() @ z).sum()

    def hessian_trace(self, u: Tensor, w: Tensor) -> Tensor:
        """Mean of Tr H of half the loss: `d Tr(W Sig_x W^T) + ||U||^2 Tr Sig_x`."""
        z, x = self.spread(u, w), self.sigma_x
        seen = (w.square() * x).sum() + (u.square() @ z @ x)
        return len(x) * seen + self.squares(u, w)[0] * x.sum()

    def drift(self, u: Tensor, w: Tensor) -> Tensor:
        """Mean change per step of the diagonal of `W W^T - U^T U`, `[d]`."""
        x, noise, s, z = self.sigma_x, self.sigma_eps, self.sgd.batch_size, self.spread(u, w)
        mean = u * w * (1 + z.diagonal()) - self.product
        error = _sums(u, w).square() * z + torch.diag(mean.square())
        at_u = x.sum() * (noise + error @ x) + (1 + s) * error @ x.square()
        at_w = x * (noise.sum() + (error @ x).sum()) + (1 + s) * x.square() * error.sum(0)
        of_u = u.square() * at_u + w.square() * (noise @ z) * x.sum()
        of_w = w.square() * at_w + u.square() * (z @ x) * noise.sum()
        charges = w.square() * (1 - z.sum(0)) - u.square() * (1 - z.sum(1))
        decay = 2 * self.sgd.effective_lr * self.shrinkage * charges
        return 4 * self.sgd.effective_lr**2 / s * (of_u - of_w) - decay

    def moved(self, charges: Tensor, u: Tensor, w: Tensor, steps: float, strides: int) -> tuple[Tensor, Tensor, Tensor]:
        """`(charges, u, w)` after so many steps, by the midpoint rule in equal strides."""
        h = steps / strides
        for _ in range(strides):
            u, w = self.mean_weights(charges, u, w)
            middle = self.mean_weights(charges + h / 2 * self.drift(u, w), u, w)
            charges = charges + h * self.drift(*middle)
        return charges, *self.mean_weights(charges, u, w)


def _sums(u: Tensor, w: Tensor) -> Tensor:
    """`u_i^2 + w_j^2`, `[d, d]`."""
    return u.square()[:, None] + w.square()


def fluctuating_flow(net: AlignedNet, u: Tensor, w: Tensor, at: Sequence[int]) -> list[tuple[float, float]]:
    """Means of `||U||^2` and `||W||^2` in training that starts at `(diag(u), diag(w))`, at the steps `at`.

    The first step of `at` is 0, where nothing fluctuates yet. Between two of them the charges follow the midpoint rule
    in four strides, which is exact enough where `at` divides the relaxation time by ten or more.

    Example:
        >>> one = torch.ones(2, dtype=torch.float64)
        >>> net = AlignedNet(one, one, one, SGDConfig(0.01, batch_size=10))
        >>> [(round(a, 3), round(b, 3)) for a, b in fluctuating_flow(net, 2 * one, one / 2, [0, 1000])]
        [(8.0, 0.5), (7.433, 0.541)]
    """
    charges = w.square() - u.square()
    out, now = [(float(u.square().sum()), float(w.square().sum()))], at[0]
    for target in at[1:]:
        charges, u, w = net.moved(charges, u, w, target - now, strides=4)
        norm_u, norm_w = net.squares(u, w)
        out.append((float(norm_u), float(norm_w)))
        now = target
    return out


def fluctuation_shifts(phi: float, d: int, kick: float) -> tuple[float, float]:
    """Relative shifts of `(||U||^2/||W||^2, Tr H)` at first order in `kick = c eta / S`; `V = Sig_eps = I`, no decay.

    At fixed charge `U = U_0 + Q W_0^T + Q Q^T U_0 / 2`, `W = W_0 + U_0^T Q + W_0 Q^T Q / 2`, so that `E = U W - V` is
    `A Q + Q B + (Q Q^T + Q^T Q) / 2 + Q Q`, `A = U_0 U_0^T = Sig_x^1/2`, `B = W_0^T W_0 = A^-1`. Stationary `U U^T`:
    `<E> = -kick d B`, and `Var Q_ij = kick / (a_i + b_j)`. The charge moves until `<U^T U> = <W Sig_x W^T>`.
    """
    x = cf.identity_covariance(phi, d).diagonal().cpu().numpy()
    a, b = x**0.5, x**-0.5
    var = kick / (a[:, None] + b)
    rows, columns = var.sum(1), var.sum(0)
    mean = (-kick * d * b - (rows + columns) / 2 - var.diagonal()) / (a + b)
    of_u = 2 * mean + a * rows + b * columns
    of_w = 2 * x * mean + a * (var @ x) + b * x * columns
    norm_u, norm_w = (of_u + of_w) / 2, of_u + (of_u - of_w) / (2 * x)
    ratio = norm_u.sum() / a.sum() - norm_w.sum() / b.sum()
    return float(ratio), float((of_u + of_w).sum() / (2 * a.sum()))
