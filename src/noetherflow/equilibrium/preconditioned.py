"""The Hessian as Adam's step sees it: `D^1/2 H D^1/2`, with `D` the step of each entry over the learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.inputs import LossFn
from noetherflow.equilibrium.curvature import HessianProduct
from noetherflow.equilibrium.roots import second_moments
from noetherflow.errors import MomentError
from noetherflow.moments.result import GradientMoments
from noetherflow.symmetry.symmetry_set import SymmetrySet

USUAL = 3.0
"""Root mean square of a parameter over the size of a step, from which on entries below a step are unusually small."""


def roots_of(moments: GradientMoments, config: AdamConfig) -> dict[str, Tensor]:
    """The root mean square of every entry of the minibatch gradient, which Adam's `v` converges to, by parameter.

    Raises:
        MomentError: no entry-wise moments.
    """
    if not moments.squares:
        raise MomentError("no parameter has entry-wise moments; measure with gradient_moments(..., entries=True)")
    out = {}
    for name in moments.squares:
        noise, steady = second_moments(name, moments, config)
        out[name] = (noise.clamp_min(0) + steady.clamp_min(0)).sqrt()
    return out


def moved_roots(roots: Mapping[str, Tensor], syms: SymmetrySet, elements: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same elsewhere on the orbit of scalar and diagonal symmetries: root mean squares move as gradients do."""
    out = dict(roots)
    for s in syms:
        if s.name in elements and all(n in out for n in s.parameters):
            out |= s.act_on_gradients({n: out[n] for n in s.parameters}, elements[s.name])
    return out


@dataclass(frozen=True, eq=False)
class PreconditionedHessian:
    """Products with `D^1/2 H D^1/2` on the entries whose step is known; the others stand still.

    Attributes:
        product: the Hessian.
        scales: `sqrt(lr_i / lr / (s + eps))` of every entry, 0 where its gradients are not known.
    """

    product: HessianProduct
    scales: np.ndarray

    @classmethod
    def of(
        cls, model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], roots: Mapping[str, Tensor], config: AdamConfig
    ) -> PreconditionedHessian:
        """The Hessian of the mean loss at the model's weights, preconditioned with `1 / (root + eps)`."""
        product, parts = HessianProduct(model, loss_fn, batches), []
        for name, p in product.parameters.items():
            scale = torch.zeros(p.shape, dtype=torch.float64)
            if name in roots:
                over = roots[name] + config.eps
                rate = config.rates(name).lr / config.lr
                scale = torch.where(over > 0, (rate / over.clamp_min(1e-300)).sqrt(), torch.zeros_like(over))
            parts.append(scale.reshape(-1))
        return cls(product, np.asarray(torch.cat(parts).numpy()))

    @property
    def active(self) -> np.ndarray:
        """Which entries move."""
        return self.scales > 0

    @property
    def size(self) -> int:
        """How many entries move."""
        return int(self.active.sum())

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        """The product with a flat vector of the moving entries."""
        wide = np.zeros(len(self.scales))
        wide[self.active] = self.scales[self.active] * vector
        found: np.ndarray = (self.scales * self.product.flat(wide))[self.active]
        return found

    def top(self, accuracy: float = 1e-4) -> float:
        """The algebraically largest eigenvalue, to a relative `accuracy`."""
        return self.top_pair(accuracy)[0]

    def top_pair(self, accuracy: float = 1e-4) -> tuple[float, np.ndarray]:
        """The same with its unit eigenvector, 0 on the entries that stand still. `[entries]`."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        wide = np.zeros(len(self.scales))
        if self.size == 1:
            wide[self.active] = 1.0
            return float(self(np.ones(1))[0]), wide
        start = np.random.default_rng(0).standard_normal(self.size)
        operator = LinearOperator((self.size, self.size), matvec=self.__call__, dtype=np.float64)
        values, vectors = eigsh(operator, k=1, which="LA", tol=accuracy, v0=start)
        wide[self.active] = vectors[:, 0]
        return float(values[0]), wide

    def on_small_entries(self, direction: np.ndarray, lr: float) -> float:
        """The share of a direction that lies on entries smaller than a step of size `lr`, in parameters whose entries
        are usually several times larger than that: units or heads much smaller than the others of their layer.
        """
        small = []
        for p in self.product.parameters.values():
            values = p.detach().double().abs().reshape(-1).cpu()
            usual = float(values.square().mean().sqrt()) if values.numel() else 0.0
            small.append((values < lr) if usual > USUAL * lr else torch.zeros_like(values, dtype=torch.bool))
        shares: np.ndarray = direction**2
        return float(shares[torch.cat(small).numpy()].sum())

    def trace(self, probes: int) -> float:
        """Hutchinson's estimate with random signs; exact, entry by entry, where that takes no more products."""
        if self.size <= probes:
            return sum(float(self(e)[i]) for i, e in enumerate(np.eye(self.size)))
        signs = np.random.default_rng(1).choice((-1.0, 1.0), size=(probes, self.size))
        return float(np.mean([s @ self(s) for s in signs]))


def stable_rate(top: float, memory: float) -> float:
    """The largest stable full-batch learning rate of Adam at a frozen preconditioner: `2 (1 + b1) / ((1 - b1) top)`.

    Example:
        >>> stable_rate(top=4.0, memory=0.5)
        1.5
    """
    return 2 * (1 + memory) / ((1 - memory) * top) if top > 0 else float("inf")
