"""The same predictions through the generic machinery: a module, its symmetries, measured moments, the joint solver.

Predictions here use no formula for linear networks (only `closed_form_gaps` compares with them), and nothing in
`theory.py` measures a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.core.settings import SGDConfig
from noetherflow.equilibrium.curvature import trace_at
from noetherflow.moments.result import Replicates
from noetherflow.workloads import squared_error
from noetherflow_paper import closed_form as cf
from noetherflow_paper.verdict import Verdict


class LinearChain(nn.Module):
    """`x -> W_D f(... f(W_1 x))`, f the identity or ReLU, weights named `layers.0`, ... (two apart with f)."""

    def __init__(self, weights: Sequence[Tensor], relu: bool = False) -> None:
        super().__init__()
        linear = [nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights]
        between = [m for layer in linear[:-1] for m in (layer, nn.ReLU())] if relu else linear[:-1]
        self.layers = nn.Sequential(*between, linear[-1])
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


@dataclass(frozen=True, eq=False)
class MeasuredChain:
    """A chain, its symmetries as found, and the moments of its gradients; `measure(model)` measures a moved copy."""

    model: LinearChain
    syms: Any
    moments: Any
    measure: Callable[[nn.Module], Any]

    def equilibrium(self, sgd: SGDConfig) -> Any:
        """`noise_equilibrium`. With neighbouring GL groups leg Grams do not determine the joint solution: the solver
        then measures again on moved copies.
        """
        remeasure = self.measure if len(self.model.weights) > 2 else None
        return nf.noise_equilibrium(self.model, self.syms, self.moments, sgd, remeasure=remeasure)

    def moved(self, equilibrium: Any) -> list[Tensor]:
        """`[W_1, ..., W_D]` at the equilibrium; balances the model in place."""
        nf.balance_(self.model, equilibrium)
        return self.model.weights

    def traces(self, equilibrium: Any, x: Tensor, y: Tensor) -> tuple[float, float]:
        """`Tr H` of `||model(x) - y||^2` now and at the equilibrium, from curvature measured now."""
        curved = nf.curvature_moments(self.model, squared_error, [(x, y)], self.syms)
        now, then = trace_at(self.model, self.syms, curved, equilibrium.elements)
        return float(now), float(then)


def measured(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    loss_scale: float = 1.0,
    relu: bool = False,
    population: bool = True,
) -> MeasuredChain:
    """find_symmetries -> gradient_moments of `loss_scale ||W_D ... W_1 x - y||^2` on the data `(x, y)`.

    `population`: the samples are all there are (an epoch), while SGD draws from them with replacement: their averages
    are expectations, with no sampling error to take off. Otherwise they are a sample of endless data.
    """
    model = LinearChain(weights, relu)
    syms = nf.find_symmetries(model, (x[:2],))
    loss = lambda m, batch: loss_scale * squared_error(m, batch)

    def measure(moved: nn.Module) -> Any:
        found = nf.gradient_moments(moved, loss, [(x, y)], syms, groups=1)
        return replace(found, replicates=Replicates(1, len(x), "epoch")) if population else found

    return MeasuredChain(model, syms, measure(model), measure)


def generic_equilibrium(
    weights: Sequence[Tensor], x: Tensor, y: Tensor, sgd: SGDConfig, loss_scale: float = 1.0
) -> list[Tensor]:
    """`[W_1, ..., W_D]` at the noise equilibrium of the data: `measured` -> noise_equilibrium -> balance_."""
    found = measured(weights, x, y, loss_scale)
    return found.moved(found.equilibrium(sgd))


def generic_charges(
    weights: Sequence[Tensor], x: Tensor, y: Tensor, sgd: SGDConfig, at: Sequence[int], loss_scale: float = 1.0
) -> Tensor:
    """`C = W_1 W_1^T - W_2^T W_2` of a two-layer chain after the given steps, `[len(at), d, d]`.

    `measured` -> noether_flow -> forecast, from gradients at the start only.
    """
    found = measured(weights, x, y, loss_scale)
    flow = nf.noether_flow(found.model, found.syms, found.moments, sgd)
    (charge,) = flow.forecast(at).charges.values()
    return torch.as_tensor(charge).squeeze(1)


def closed_form_gaps(
    product: Tensor, sigma_x: Tensor, sigma_eps: Tensor, sgd: SGDConfig, loss_scale: float = 1.0
) -> tuple[float, float]:
    """How far `||U||^2/||W||^2` and `Tr H` at the equilibrium of a two-layer net are from the closed form, relative.

    The generic machinery starts from the norm-balanced solution, on `product_design`.
    """
    u, w = cf.norm_balanced(product)
    x, y = product_design(product, sigma_x, sigma_eps)
    found = measured([w, u], x, y, loss_scale)
    equilibrium = found.equilibrium(sgd)
    trace = found.traces(equilibrium, x, y)[1]
    found_w, found_u = found.moved(equilibrium)
    best = cf.two_layer(product, *cf.with_decay(cf.noise_matrices(sigma_x, sigma_eps), sgd, loss_scale))
    ratio = found_u.norm() / found_w.norm() / (best[0].norm() / best[1].norm())
    return float(ratio**2 - 1), trace / float(cf.two_layer_hessian_trace(*best, sigma_x)) - 1


def chain_charges(us: Sequence[Tensor], ws: Sequence[Tensor]) -> Tensor:
    """`W W^T - U^T U` along a path, `[len(us), ..., d, d]`."""
    return torch.stack([w @ w.mT - u.mT @ u for u, w in zip(us, ws, strict=True)])


def largest_gap(generic: Tensor, closed: Tensor) -> float:
    """`max |generic - closed| / max |closed|`."""
    return float((generic - closed).abs().max() / closed.abs().max())


def agreement(what: str, gaps: Any, tolerance: float) -> Verdict:
    """The generic machinery and the closed form give the same: the largest of the relative gaps is zero."""
    claim = f"{what}: generic machinery against closed form, largest relative difference"
    return Verdict(claim, 0, float(np.max(gaps)), tolerance=tolerance, relative=False, identity=True)
