"""Small models with symmetries declared by hand, shared by the tests of the equilibrium, the flow and balancing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.moments.result import GradientMoments
from reference import moments_by_loop


@dataclass(frozen=True)
class Problem:
    model: nn.Module
    syms: nf.SymmetrySet
    data: tuple[Tensor, Tensor]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum(1)

    def measure(self, model: nn.Module | None = None) -> GradientMoments:
        return moments_by_loop(model or self.model, self.loss, [self.data], self.syms)

    def tensors(self) -> dict[str, Tensor]:
        return {n: t.detach().clone() for n, t in nf.tensors_of(self.model).items()}


def union(model: nn.Module, parts: Sequence[nf.SymmetrySet]) -> nf.SymmetrySet:
    shapes = {n: tuple(t.shape) for n, t in nf.tensors_of(model).items()}
    return nf.SymmetrySet(tuple(s for p in parts for s in p), shapes=shapes)


def mlp(
    widths: Sequence[int] = (6, 8, 7, 3), scales: Sequence[float] = (), seed: int = 0, samples: int = 40
) -> Problem:
    """A ReLU MLP in float64, layers multiplied by `scales`, with one torus per hidden layer."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for layer, scale in zip(model[::2], scales, strict=False):
            layer.weight *= scale
            layer.bias *= scale
    hidden = range(0, 2 * len(widths) - 4, 2)
    syms = [
        nf.declare(model, "diagonal", [(f"{i}.weight", 0), (f"{i}.bias", 0)], [(f"{i + 2}.weight", 1)]) for i in hidden
    ]
    x = torch.randn(samples, widths[0], dtype=torch.float64)
    y = torch.randn(samples, widths[-1], dtype=torch.float64)
    return Problem(model, union(model, syms), (x, y))


def linear(widths: Sequence[int], kind: str = "general_linear", seed: int = 0, samples: int = 60) -> Problem:
    """A linear network without biases, anisotropic data, one symmetry of `kind` per hidden layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))).double()
    syms = [
        nf.declare(model, kind, [(f"{i}.weight", 0)], [(f"{i + 1}.weight", 1)])  # type: ignore[arg-type]
        for i in range(len(widths) - 2)
    ]
    x = torch.randn(samples, widths[0], dtype=torch.float64) @ torch.randn(widths[0], widths[0], dtype=torch.float64)
    y = torch.randn(samples, widths[-1], dtype=torch.float64) * torch.rand(widths[-1], dtype=torch.float64).add(0.2)
    return Problem(model, union(model, syms), (x, y))


def moved(model: nn.Module, syms: nf.SymmetrySet, elements: dict[str, Tensor]) -> nn.Module:
    """A copy of the model under group elements."""
    import copy

    other = copy.deepcopy(model)
    for s in syms:
        if s.name in elements:
            s.act_(nf.tensors_of(other), elements[s.name])
    return other


def imbalance(problem: Problem, model: nn.Module, sgd: nf.SGDConfig) -> float:
    """Largest `|Y - X| / (X + Y)` of the whole model, from the measured drift alone: an independent reference.

    `E[C' - C] = -eta (2 w - eta w^2) C + eta^2 D`, computed leg by leg from `batch_grams`.
    """
    moments = problem.measure(model)
    params = nf.tensors_of(model)
    worst = 0.0
    for s in problem.syms:
        plus, minus = 0.0, 0.0
        decay = sgd.lr * sgd.weight_decay * (2 - sgd.lr * sgd.weight_decay)
        for leg, k, m in zip(s.weight_legs, s.grams(params), moments.batch_grams(s, sgd), strict=True):
            up, down = decay * k.detach(), sgd.lr**2 * m
            plus = plus + (up if leg.sign > 0 else down)
            minus = minus + (down if leg.sign > 0 else up)
        if s.is_torus:
            both = plus + minus
            ratio = ((plus - minus).abs() / both)[both > 0]
            worst = max(worst, float(ratio.max()))
        else:
            worst = max(worst, float((plus - minus).norm() / (plus.norm() + minus.norm())))
    return worst
