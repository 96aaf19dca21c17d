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
from noetherflow.equilibrium.charge_flow import ChargeFlow
from noetherflow.equilibrium.potential import epoch_factor

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

    @staticmethod
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum(1)

    def moments(self) -> nf.GradientMoments:
        return nf.gradient_moments(self.model, self.loss, [(self.x, self.y)], self.syms)


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


class Run:
    """SGD of torch's rule on `u w^T x`, as many seeds side by side as `w` has rows; the gradient's buffer is kept."""

    def __init__(self, data: Data, sgd: nf.SGDConfig, seeds: int, sampling: str) -> None:
        self.data, self.sgd, self.sampler = data, sgd, Sampler(len(data.x), sgd.batch_size, seeds, sampling)
        self.w, self.u = (p.detach().expand(seeds, *p.shape).clone() for p in data.model.parameters())
        self.buffers = [torch.zeros_like(p) for p in (self.w, self.u)]

    def step(self) -> None:
        sgd, pick = self.sgd, self.sampler.draw()
        x, y = self.data.x[pick], self.data.y[pick]
        h = x @ self.w.mT
        r = 2 * (h @ self.u.mT - y) / sgd.batch_size
        gradients = ((r @ self.u).mT @ x, r.mT @ h)
        for p, b, g in zip((self.w, self.u), self.buffers, gradients, strict=True):
            d = g + sgd.weight_decay * p
            b.mul_(sgd.momentum).add_(d)
            p.sub_(d + sgd.momentum * b if sgd.nesterov else b, alpha=sgd.lr)

    @property
    def charge(self) -> Tensor:
        return self.w.square().sum((1, 2)) - self.u.square().sum((1, 2))


def simulate(data: Data, sgd: nf.SGDConfig, seeds: int, steps: int, sampling: str) -> Tensor:
    """Charges `[seeds]`, averaged over the second half of `steps` steps of torch's SGD rule."""
    run, total = Run(data, sgd, seeds, sampling), torch.zeros(seeds, dtype=F64)
    for k in range(steps):
        run.step()
        if k >= steps // 2:
            total += run.charge
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


def drift(data: Data, sgd: nf.SGDConfig, seeds: int, epochs: int, sampling: str) -> tuple[float, float]:
    """Mean change of the charge per step over whole epochs after the buffer has filled, and its standard error."""
    run, length = Run(data, sgd, seeds, sampling), len(data.x) // sgd.batch_size
    for _ in range(length * math.ceil(200 / length)):
        run.step()
    start = run.charge
    for _ in range(length * epochs):
        run.step()
    changes = (run.charge - start) / (length * epochs)
    return float(changes.mean()), float(changes.std()) / seeds**0.5


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("batches", [4, 8, 16, 32, 128])
def test_drift_under_momentum_and_shuffled_epochs(batches: int, nesterov: bool) -> None:
    """At a learning rate at which nothing moves: independent batches would drift several times as fast."""
    data = Data.of(2 * batches)
    sgd = nf.SGDConfig(1e-6, 2, momentum=0.9, nesterov=nesterov, dataset_size=2 * batches, sampling="epoch")
    expected = [float(_flow(data, dataclasses.replace(sgd, sampling=s)).drift) for s in ("epoch", "independent")]
    for sampling, value in zip(("epoch", "independent"), expected, strict=True):
        mean, error = drift(data, sgd, 64, math.ceil(1500 / batches), sampling)
        assert abs(mean - value) < 3 * error, sampling
        assert error < 0.05 * abs(value)
    assert abs(expected[0] - expected[1]) > 2 * error


def test_curvature_brings_the_noise_of_epochs_back_towards_that_of_independent_batches() -> None:
    """The buffer's squares of both layers: above the leading order, and below what the largest curvature would give."""
    data, lr, ratios = Data.of(64), 1e-3, []
    sgd = nf.SGDConfig(lr, 2, momentum=0.9, dataset_size=64)
    squares = {kind: _buffer_squares(data, sgd, 256, 20, kind) for kind in ("epoch", "independent")}
    for epoch, independent in zip(*squares.values(), strict=True):
        means = float(epoch.mean()), float(independent.mean())
        error = math.hypot(float(epoch.std()) / means[1], means[0] * float(independent.std()) / means[1] ** 2) / 16
        ratios.append((means[0] / means[1], error))
    top = nf.top_eigenvalue(data.model, data.loss, [(data.x, data.y)])
    low, high = (epoch_factor(0.9, 32, lr_curvature=lr * k) for k in (0.0, top))
    assert high - low > 0.1
    for ratio, error in ratios:
        assert low + 3 * error < ratio < high + 3 * error


def _buffer_squares(data: Data, sgd: nf.SGDConfig, seeds: int, epochs: int, sampling: str) -> tuple[Tensor, Tensor]:
    """The mean over whole epochs of `|b|^2` of both layers' momentum buffers, by seed."""
    run, length = Run(data, sgd, seeds, sampling), len(data.x) // sgd.batch_size
    sums = [torch.zeros(seeds, dtype=F64) for _ in run.buffers]
    for k in range(length * (epochs + 7)):
        run.step()
        if k >= 7 * length:
            sums = [total + b.square().sum((1, 2)) for total, b in zip(sums, run.buffers, strict=True)]
    return sums[0] / (epochs * length), sums[1] / (epochs * length)


def _flow(data: Data, sgd: nf.SGDConfig) -> ChargeFlow:
    return nf.noether_flow(data.model, data.syms, data.moments(), sgd).details[0]


CASES = {
    "plain": (nf.SGDConfig(0.04, 2), 4096, "replacement"),
    "momentum": (nf.SGDConfig(0.004, 2, momentum=0.9), 4096, "replacement"),
    "nesterov": (nf.SGDConfig(0.004, 2, momentum=0.9, nesterov=True), 4096, "replacement"),
    "decay": (nf.SGDConfig(0.04, 2, weight_decay=1e-2), 4096, "replacement"),
    "momentum-decay": (nf.SGDConfig(0.004, 2, weight_decay=1e-2, momentum=0.9), 4096, "replacement"),
    "without-replacement": (nf.SGDConfig(0.06, 4, weight_decay=1e-2, dataset_size=8), 8, "independent"),
    "epochs": (nf.SGDConfig(0.06, 4, weight_decay=1e-2, dataset_size=8, sampling="epoch"), 8, "epoch"),
    "epochs-momentum": (
        nf.SGDConfig(0.008, 2, weight_decay=1e-2, momentum=0.9, dataset_size=8, sampling="epoch"),
        8,
        "epoch",
    ),
    "epochs-nesterov": (
        nf.SGDConfig(0.01, 2, weight_decay=1e-2, momentum=0.9, nesterov=True, dataset_size=32, sampling="epoch"),
        32,
        "epoch",
    ),
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
        other = predicted(data, dataclasses.replace(sgd, replacement=True, sampling="independent"))
        assert abs(other - predicted(data, sgd)) > 10 * error, "the factor (N - S)/(N - 1) must matter"


EPOCHS = {4: (0.003, 1e-2), 8: (0.008, 1e-2), 32: (0.003, 2e-2), 128: (0.003, 2e-2)}
"""Learning rate and weight decay by batches an epoch; the more batches, the earlier does curvature count."""


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("batches", EPOCHS)
def test_equilibrium_under_momentum_and_shuffled_epochs(batches: int, nesterov: bool) -> None:
    lr, decay = EPOCHS[batches]
    data = Data.of(2 * batches)
    sgd = nf.SGDConfig(lr, 2, decay, momentum=0.9, nesterov=nesterov, dataset_size=2 * batches, sampling="epoch")
    value, error = deviation(data, sgd, seeds=128, sampling="epoch")
    print(f"{batches} batches: predicted {predicted(data, sgd):.4f}, simulation off by {value:.4f} +- {error:.4f}")
    assert abs(value) < 3 * error
    assert error < 0.02 * predicted(data, sgd)
    other = predicted(data, dataclasses.replace(sgd, sampling="independent"))
    assert abs(other - predicted(data, sgd)) > 5 * error, "the order of the batches must matter"
