"""How fast v is: preconditioned curvature against a dense Hessian, and the smallest example of section 13."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from equilibrium_cases import mlp
from noetherflow.equilibrium.validity import SquareMemory, square_memory
from noetherflow.errors import DataError, MomentError
from reference import per_sample_gradients


def test_curvatures_are_those_of_the_dense_preconditioned_hessian() -> None:
    problem = mlp((3, 4, 2), samples=12)
    config = nf.AdamConfig(0.02, 4, betas=(0.5, 0.99), eps=0.01, dataset_size=12,
                           groups=(nf.GroupRates(("0.bias",), 0.04, 0.0),))  # fmt: skip
    names = [n for n, _ in problem.model.named_parameters()]
    shapes = {n: p.shape for n, p in problem.model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        parts = dict(zip(names, flat.split([shapes[n].numel() for n in names]), strict=True))
        shaped = {n: v.reshape(shapes[n]) for n, v in parts.items()}
        x, y = problem.data
        return (torch.func.functional_call(problem.model, shaped, (x,)) - y).square().sum(1).mean()

    flat = torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    moments = problem.measure()
    singles = per_sample_gradients(problem.model, problem.loss, problem.data)
    scale = []
    for n in names:
        g = torch.stack([s[n] for s in singles])
        s = (config.covariance_factor * g.var(0, unbiased=False) + g.mean(0) ** 2).sqrt() + 0.01
        rate = (2.0 if n == "0.bias" else 1.0) * (n in moments.squares)
        scale.append((rate / s).sqrt().reshape(-1))
    d = torch.cat(scale)
    dense = d[:, None] * hessian * d
    found = square_memory(problem.model, problem.loss, [problem.data], problem.measure(), config, probes=100)
    assert found.top == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-3)
    assert found.mean == pytest.approx(float(dense.trace()) / int((d > 0).sum()), rel=1e-9)
    assert found.stable_lr == pytest.approx(2 * 1.5 / (0.5 * found.top))
    some = square_memory(problem.model, problem.loss, [problem.data], problem.measure(), config, probes=8)
    assert some.mean == pytest.approx(found.mean, rel=0.5)


def test_the_stable_rate_is_where_adam_with_a_frozen_v_starts_to_grow() -> None:
    """Heavy ball with weights `(1 - b1)` on a quadratic: just below the limit it decays, just above it grows."""
    memory = SquareMemory(top=3.0, mean=1.0, lr=0.1, square_memory=0.999, memory=0.9)
    for factor, grows in ((0.99, False), (1.01, True)):
        x, m = 1.0, 0.0
        for _ in range(4000):
            m = 0.9 * m + 0.1 * 3.0 * x
            x -= factor * memory.stable_lr * m
        assert (abs(x) > 1) == grows


def test_weights_are_the_response_of_an_average_to_a_relaxing_fluctuation() -> None:
    """`kap`: the covariance of `v` with what it averages, for a fluctuation that keeps `1 - lr k` of itself a step."""
    memory = SquareMemory(top=5.0, mean=1.0, lr=0.05, square_memory=0.9, memory=0.0)
    for k in (0.1, 1.0, 5.0):
        keep = 1 - 0.05 * k
        response = sum(0.1 * 0.9**j * keep**j for j in range(5000))
        assert response == pytest.approx(memory.weight(k), rel=1e-9)
    assert memory.weight(0.0) == 1
    assert memory.least < memory.average < 1


@pytest.mark.parametrize(("b2", "verdict"), [(0.99999, "valid"), (0.9, "off")])
def test_verdicts_follow_b2(b2: float, verdict: str) -> None:
    problem = mlp((3, 4, 2), samples=12)
    config = nf.AdamConfig(0.01, 4, betas=(0.9, b2), dataset_size=12)
    found = square_memory(problem.model, problem.loss, [problem.data], problem.measure(), config)
    assert found.verdict == verdict
    assert verdict in str(found)
    assert found.to_dict()["verdict"] == verdict
    assert math.isfinite(found.stable_lr)


def test_refusals() -> None:
    problem = mlp((3, 4, 2), samples=12)
    with pytest.raises(DataError, match="AdamConfig"):
        square_memory(problem.model, problem.loss, [problem.data], problem.measure(), nf.SGDConfig(0.1, 4))  # type: ignore[arg-type]
    net = nn.Linear(3, 2).double()
    syms = nf.declare(net, "diagonal", [("weight", 0)])
    moments = nf.gradient_moments(net, problem.loss, [problem.data], syms)
    with pytest.raises(MomentError, match="entries=True"):
        square_memory(net, problem.loss, [problem.data], moments, nf.AdamConfig(0.1, 4))
