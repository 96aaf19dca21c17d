"""The same predictions through the generic machinery: a module, its symmetries, measured moments, the joint solver."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.sgd import SGDConfig


class LinearChain(nn.Module):
    """`x -> W_D ... W_1 x`, layers named `layers.0`, `layers.1`, ..."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        linear = [nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights]
        self.layers = nn.Sequential(*linear)
        with torch.no_grad():
            for layer, w in zip(linear, weights, strict=True):
                layer.weight.copy_(w)

    @property
    def weights(self) -> list[Tensor]:
        """`[W_1, ..., W_D]`, detached copies."""
        return [p.detach().clone() for p in self.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def product_design(product: Tensor, sigma_x: Tensor, sigma_eps: Tensor) -> tuple[Tensor, Tensor]:
    """A finite data set `(x, y)` of `4 d_x d_y` samples on which eps is exactly independent of x.

    All pairs of `x in {+- sqrt(d_x) columns of Sig_x^1/2}` and eps likewise: means 0, the given covariances, and
    therefore exactly the noise matrices of theory.md section 8 at the minimum.
    """

    def points(sigma: Tensor) -> Tensor:
        root = math.sqrt(len(sigma)) * torch.linalg.cholesky(sigma).mT
        return torch.cat([root, -root])

    x, eps = points(sigma_x), points(sigma_eps)
    pairs_x = x.repeat_interleave(len(eps), 0)
    return pairs_x, pairs_x @ product.mT + eps.repeat(len(x), 1)


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    """`||model(x) - y||^2` per sample."""
    x, y = batch
    return (model(x) - y).square().sum(-1)


def generic_equilibrium(weights: Sequence[Tensor], x: Tensor, y: Tensor, sgd: SGDConfig) -> list[Tensor]:
    """`[W_1, ..., W_D]` at the noise equilibrium of the data, without any formula for linear networks.

    find_symmetries -> gradient_moments -> noise_equilibrium -> balance_. Neighbouring GL groups meet in the middle
    layers of deeper nets, where leg Grams do not determine the joint solution: the solver then measures again on moved
    copies.
    """
    nf: Any = importlib.import_module("noetherflow")
    model = LinearChain(weights)
    syms = nf.find_symmetries(model, (x[:2],))

    def measure(moved: nn.Module) -> Any:
        return nf.gradient_moments(moved, squared_error, [(x, y)], syms, groups=1)

    remeasure = measure if len(weights) > 2 else None
    nf.balance_(model, nf.noise_equilibrium(model, syms, measure(model), sgd, remeasure=remeasure))
    return model.weights
