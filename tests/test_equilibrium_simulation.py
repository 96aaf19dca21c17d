"""Predicted equilibria against long simulations: momentum, Nesterov, weight decay, finite data without replacement.

`u w^T x` at the least-squares solution of its data, hundreds of seeds side by side. The theory is the limit of small
learning rates (the base point fluctuates with lr): simulations at lr, lr/2, ... are extrapolated to zero, with weight
decay in proportion, which keeps the predicted equilibrium.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf

F64 = torch.float64


@dataclass(frozen=True, eq=False)
class Data:
    """`N` samples and a factorised network at their least-squares solution, moved off the noise equilibrium."""

    x: Tensor
    y: Tensor
    model: nn.Sequential

    @classmethod
    def of(cls, samples: int) -> Data:
        rng = torch.Generator().manual_seed(5)
        x = torch.randn(samples, 3, generator=rng, dtype=F64) * torch.tensor([1.3, 0.8, 0.5], dtype=F64)
        teacher = torch.tensor([[0.5, 1.0, -0.7]], dtype=F64)
        y = x @ teacher.mT + torch.randn(samples, 1, generator=rng, dtype=F64)
        product = torch.linalg.lstsq(x, y).solution.mT
        model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        with torch.no_grad():
            model[0].weight.copy_(1.2 * product / product.norm().sqrt())
            model[1].weight.copy_(product.norm().sqrt() / 1.2)
        return cls(x, y, model)

    @property
    def syms(self) -> nf.SymmetrySet:
        return nf.declare(self.model, "general_linear", [("0.weight", 0)], [("1.weight", 1)])

    def moments(self) -> nf.GradientMoments:
        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return (model(batch[0]) - batch[1]).square().sum(1)

        return nf.gradient_moments(self.model, loss, [(self.x, self.y)], self.syms)


class Sampler:
    """Indices `[seeds, S]` of each step: with replacement, independent batches without, or epochs of disjoint ones."""

    def __init__(self, samples: int, batch: int, seeds: int, kind: str) -> None:
        self.samples, self.batch, self.seeds, self.kind = samples, batch, seeds, kind
        self.rng = torch.Generator().manual_seed(0)
        self.left: list[Tensor] = []

    def draw(self) -> Tensor:
        if self.kind == "replacement":
            return torch.randint(self.samples, (self.seeds, self.batch), generator=self.rng)
        if not self.left:
            order = torch.rand(self.seeds, self.samples, generator=self.rng).argsort(1)
            self.left = list(order.split(self.batch, dim=1))[: 1 if self.kind == "independent" else None]
        return self.left.pop()


def simulate(data: Data, sgd: nf.SGDConfig, seeds: int, steps: int, sampling: str) -> Tensor:
    """Charges `[seeds]`, averaged over the second half of `steps` steps of torch's SGD rule."""
    sampler = Sampler(len(data.x), sgd.batch_size, seeds, sampling)
    w, u = (p.detach().expand(seeds, *p.shape).clone() for p in data.model.parameters())
    buffers = [torch.zeros_like(w), torch.zeros_like(u)]
    total = torch.zeros(seeds, dtype=F64)
    for k in range(steps):
        pick = sampler.draw()
        x, y = data.x[pick], data.y[pick]
        h = x @ w.mT
        r = 2 * (h @ u.mT - y) / sgd.batch_size
        for p, b, g in zip((w, u), buffers, ((r @ u).mT @ x, r.mT @ h), strict=True):
            d = g + sgd.weight_decay * p
            b.mul_(sgd.momentum).add_(d)
            p.sub_(d + sgd.momentum * b if sgd.nesterov else b, alpha=sgd.lr)
        if k >= steps // 2:
            total += w.square().sum((1, 2)) - u.square().sum((1, 2))
    return total / (steps - steps // 2)


def predicted(data: Data, sgd: nf.SGDConfig, moments: nf.GradientMoments | None = None) -> float:
    eq = nf.noise_equilibrium(data.model, data.syms, moments or data.moments(), sgd)
    return float(eq.settled[0].charge)


EXTRAPOLATION = (1 / 3, -2.0, 8 / 3)
"""Weights of values at h, h/2, h/4 that cancel their terms in h and h^2."""


def deviation(data: Data, sgd: nf.SGDConfig, seeds: int, sampling: str) -> tuple[float, float]:
    """Simulated minus predicted equilibrium charge in the limit of small lr, and its standard error."""
    moments, off, errors = data.moments(), [], []
    for k in range(3):
        here = dataclasses.replace(sgd, lr=sgd.lr / 2**k, weight_decay=sgd.weight_decay / 2**k)
        relaxation = float(nf.noether_flow(data.model, data.syms, moments, here).details[0].relaxation_steps.max())
        charges = simulate(data, here, seeds, int(12 * relaxation), sampling)
        off.append(float(charges.mean()) - predicted(data, here, moments))
        errors.append(float(charges.std()) / seeds**0.5)
    value = sum(w * d for w, d in zip(EXTRAPOLATION, off, strict=True))
    return value, math.hypot(*(w * e for w, e in zip(EXTRAPOLATION, errors, strict=True)))


def test_momentum_with_decay_reaches_the_predicted_equilibrium() -> None:
    data, sgd = Data.of(4096), nf.SGDConfig(0.008, 2, weight_decay=2e-2, momentum=0.9)
    value, error = deviation(data, sgd, seeds=256, sampling="replacement")
    start = float(data.syms[0].charge(dict(data.model.named_parameters())).detach())
    assert abs(value) < 3 * error
    assert abs(predicted(data, sgd) - start) > 10 * error
    assert abs(predicted(data, dataclasses.replace(sgd, momentum=0.0)) - predicted(data, sgd)) > 10 * error


CASES = {
    "plain": (nf.SGDConfig(0.04, 2), 4096, "replacement"),
    "momentum": (nf.SGDConfig(0.004, 2, momentum=0.9), 4096, "replacement"),
    "nesterov": (nf.SGDConfig(0.004, 2, momentum=0.9, nesterov=True), 4096, "replacement"),
    "decay": (nf.SGDConfig(0.04, 2, weight_decay=1e-2), 4096, "replacement"),
    "momentum-decay": (nf.SGDConfig(0.004, 2, weight_decay=1e-2, momentum=0.9), 4096, "replacement"),
    "without-replacement": (nf.SGDConfig(0.06, 4, weight_decay=1e-2, dataset_size=8), 8, "independent"),
    "epochs": (nf.SGDConfig(0.06, 4, weight_decay=1e-2, dataset_size=8), 8, "epoch"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_simulated_equilibrium_tends_to_the_predicted_one(case: str) -> None:
    sgd, samples, sampling = CASES[case]
    data = Data.of(samples)
    value, error = deviation(data, sgd, seeds=128, sampling=sampling)
    print(f"{case}: predicted {predicted(data, sgd):.4f}, simulation off by {value:.4f} +- {error:.4f}")
    assert abs(value) < 3 * error
    assert error < 0.02 * predicted(data, sgd)
    if sgd.dataset_size:
        other = predicted(data, dataclasses.replace(sgd, replacement=True))
        assert abs(other - predicted(data, sgd)) > 10 * error, "the factor (N - S)/(N - 1) must matter"
