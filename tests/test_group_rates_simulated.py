"""Equilibria of two groups with rates of their own, against training a leaky ReLU net at its teacher (slow)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow_paper.simulate import Params, checkpoints, normal, simulate

INPUTS, HIDDEN, OUTPUTS, BATCH, SLOPE, STARTS = 6, 2, 2, 8, 0.3, 32


@dataclass(frozen=True)
class Student:
    """`||U leaky(W x) - y||^2` with labels of the teacher and noise; fresh data each step."""

    w: Tensor
    u: Tensor

    @classmethod
    def drawn(cls, seed: int) -> Student:
        rng = torch.Generator().manual_seed(seed)
        return cls(
            normal((HIDDEN, INPUTS), rng) / math.sqrt(INPUTS), normal((OUTPUTS, HIDDEN), rng) / math.sqrt(HIDDEN)
        )

    def data(self, replicas: int, samples: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal((replicas, samples, INPUTS), rng) * torch.linspace(0.3, 2.0, INPUTS, dtype=torch.float64)
        noise = normal((replicas, samples, OUTPUTS), rng) * torch.tensor([0.2, 1.0], dtype=torch.float64)
        return x, nn.functional.leaky_relu(x @ self.w.mT, SLOPE) @ self.u.mT + noise

    def minibatch_gradient(self, params: Params, rng: torch.Generator) -> Params:
        w, u = params
        x, y = self.data(len(w), BATCH, rng)
        before = x @ w.mT
        after = nn.functional.leaky_relu(before, SLOPE)
        error = (after @ u.mT - y) * (2 / BATCH)
        back = (error @ u) * torch.where(before > 0, 1.0, SLOPE)
        return [back.mT @ x, error.mT @ after]

    def model(self) -> nn.Module:
        net = nn.Sequential(
            nn.Linear(INPUTS, HIDDEN, bias=False), nn.LeakyReLU(SLOPE), nn.Linear(HIDDEN, OUTPUTS, bias=False)
        ).double()
        net.load_state_dict({"0.weight": self.w, "2.weight": self.u})
        return net

    def position(self, params: Params) -> dict[str, Tensor]:
        """Log of the factor of each hidden unit's input weights from the teacher's."""
        w, u = params
        own = w.square().sum(-1).log() - u.square().sum(-2).log()
        return {"position": (own - self.w.square().sum(-1).log() + self.u.square().sum(-2).log()) / 4}


@dataclass(frozen=True)
class Case:
    """The first layer's learning rate and weight decay, those of the second, and for how long; b2 = 0 is SGD."""

    lr: tuple[float, float]
    decay: tuple[float, float]
    steps: int
    b2: float = 0.0

    def settings(self) -> nf.SGDConfig | nf.AdamConfig:
        groups = (nf.GroupRates(("2.weight",), self.lr[1], self.decay[1]),)
        if not self.b2:
            return nf.SGDConfig(self.lr[0], BATCH, self.decay[0], groups=groups)
        return nf.AdamConfig(self.lr[0], BATCH, (0.9, self.b2), weight_decay=self.decay[0], groups=groups)

    def slower(self) -> Case:
        """All rates halved, (1 - b2) with them, the same time."""
        first, second = ((a / 2, b / 2) for a, b in (self.lr, self.decay))
        return Case(first, second, self.steps * (2 if self.b2 else 4), self.b2 and (1 + self.b2) / 2)


CASES = {
    "sgd": Case((0.02, 0.06), (0.0, 0.0), 20_000),
    "sgd-decay": Case((0.02, 0.06), (0.0, 0.02), 20_000),
    "adam": Case((0.006, 0.018), (0.0, 0.0), 40_000, 0.9995),
    "adamw": Case((0.006, 0.018), (0.0, 0.1), 40_000, 0.9995),
}


def predicted(student: Student, settings: nf.SGDConfig | nf.AdamConfig) -> tuple[Tensor, Tensor]:
    """Logs of the elements and their errors, from one measurement at the teacher."""
    net = student.model()
    syms = nf.declare(net, "diagonal", [("0.weight", 0)], [("2.weight", 1)])
    x, y = (t[0] for t in student.data(1, 100_000, torch.Generator().manual_seed(1)))
    batches = list(zip(x.split(5000), y.split(5000), strict=True))
    moments = nf.gradient_moments(net, lambda m, b: (m(b[0]) - b[1]).square().sum(1), batches, syms, entries=True)
    (settled,) = nf.noise_equilibrium(net, syms, moments, settings, errors=True)
    assert settled.log_error is not None
    return settled.element.log(), settled.log_error


def simulated(student: Student, case: Case, around: Tensor) -> Tensor:
    """Positions at the end, averaged over the last half, `[STARTS, HIDDEN]`; starts within a factor of 2."""
    rng = torch.Generator().manual_seed(2)
    away = around + (torch.rand(STARTS, HIDDEN, generator=rng, dtype=torch.float64) * 2 - 1) * math.log(2)
    start = [student.w * away.exp()[:, :, None], student.u / away.exp()[:, None, :]]

    def rates(_: int, params: Params, updates: Params) -> None:
        for i, (p, update) in enumerate(zip(params, updates, strict=True)):
            update.mul_(case.lr[i] / case.lr[0]).add_(p, alpha=case.lr[i] * case.decay[i])

    adam = (0.9, case.b2) if case.b2 else None
    marks = checkpoints(case.steps, 100)
    found = simulate(student, start, case.steps, case.lr[0], rng, student.position, at=marks, adam=adam, on_step=rates)
    return found.records["position"][len(marks) // 2 :].mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_groups_settle_where_predicted(name: str) -> None:
    """The rate extrapolated to 0, within three standard errors; one learning rate for both would be far off."""
    case, student = CASES[name], Student.drawn(6)
    target, error = predicted(student, case.settings())
    whole, half = (simulated(student, c, target) for c in (case, case.slower()))
    extrapolated = 2 * half.mean(0) - whole.mean(0)
    scatter = (4 * half.var(0) + whole.var(0)) / STARTS
    z = (extrapolated - target) / (scatter + error**2).sqrt()
    assert float(z.abs().max()) < 3, (z, extrapolated, target, scatter.sqrt(), error)
    one = Case((case.lr[0], case.lr[0]), case.decay, case.steps, case.b2)
    off = (predicted(student, one.settings())[0] - extrapolated).abs() / (scatter + error**2).sqrt()
    assert float(off.min()) > 10
