"""Sharpness along the orbit against dense Hessians of moved models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import noetherflow as nf
from equilibrium_cases import Problem, linear, mlp, moved
from noetherflow.equilibrium import noise_equilibrium
from noetherflow.errors import DataError
from noetherflow.flow import noether_flow
from noetherflow.sharpness import (
    HessianProduct,
    curvature_moments,
    sharpness_forecast,
    top_eigenvalue,
    trace_at,
)

SGD = nf.SGDConfig(0.05, 4, weight_decay=1e-2)


def dense_hessian(problem: Problem, model: torch.nn.Module) -> Tensor:
    """The full Hessian of the mean loss by `torch.autograd.functional.hessian`, parameters in order."""
    shapes = {n: p.shape for n, p in model.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(values: Tensor) -> Tensor:
        parts = values.split([s.numel() for s in shapes.values()])
        params = {n: v.reshape(s) for (n, s), v in zip(shapes.items(), parts, strict=True)}
        out = torch.func.functional_call(model, params, (problem.data[0],))
        return (out - problem.data[1]).square().sum(1).mean()

    return torch.autograd.functional.hessian(loss, flat)


def cases() -> list[Any]:
    torus = mlp((3, 4, 4, 2), (2, 1, 0.5), samples=12)
    return [pytest.param(torus, id="torus"), pytest.param(linear((4, 2, 3)), id="gl")]


@pytest.mark.parametrize("problem", cases())
def test_products_and_top_eigenvalue(problem: Problem) -> None:
    dense = dense_hessian(problem, problem.model)
    batches = [(problem.data[0][:5], problem.data[1][:5]), (problem.data[0][5:], problem.data[1][5:])]
    product = HessianProduct(problem.model, problem.loss, batches)
    v = torch.randn(product.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.as_tensor(product.flat(v.numpy())), dense @ v, rtol=1e-9, atol=1e-10)
    top = top_eigenvalue(problem.model, problem.loss, batches)
    assert top == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-3)


@pytest.mark.parametrize("problem", cases())
def test_trace_at_the_equilibrium_is_predicted_without_moving(problem: Problem) -> None:
    curvature = curvature_moments(problem.model, problem.loss, [problem.data], problem.syms)
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    now, then = trace_at(problem.model, problem.syms, curvature, eq.elements)
    there = moved(problem.model, problem.syms, eq.elements)
    assert now == pytest.approx(float(torch.trace(dense_hessian(problem, problem.model))), rel=1e-10)
    assert then == pytest.approx(float(torch.trace(dense_hessian(problem, there))), rel=1e-10)
    assert abs(then / now - 1) > 0.01


@pytest.mark.parametrize("problem", cases())
def test_flattest_point_of_the_orbit(problem: Problem) -> None:
    """The Hessian-trace objective beats every nearby point of the orbit; the loss does not change."""
    curvature = curvature_moments(problem.model, problem.loss, [problem.data], problem.syms)
    eq = noise_equilibrium(problem.model, problem.syms, curvature, objective="hessian")
    best = float(torch.trace(dense_hessian(problem, moved(problem.model, problem.syms, eq.elements))))
    assert best < float(torch.trace(dense_hessian(problem, problem.model)))
    rng = torch.Generator().manual_seed(1)
    for _ in range(5):
        away = {s.name: s.compose(s.random_element(0.2, rng), eq[s.name].element) for s in problem.syms}
        assert float(torch.trace(dense_hessian(problem, moved(problem.model, problem.syms, away)))) > best


def test_hutchinson_is_unbiased_within_its_error() -> None:
    problem = mlp((3, 5, 2), samples=12)
    exact = curvature_moments(problem.model, problem.loss, [problem.data], problem.syms)
    probed = curvature_moments(problem.model, problem.loss, [problem.data], problem.syms, probes=300)
    (s,) = problem.syms
    for truth, estimate, leg in zip(exact.second[s.name], probed.second[s.name], range(3), strict=True):
        error = torch.stack([g.second[s.name][leg] for g in probed.groups]).std(0) / 300**0.5
        assert float(((estimate - truth).abs() / (error + 1e-12)).max()) < 4.5
    assert len(probed.groups) == 300


def test_fisher_trace_by_the_same_code() -> None:
    problem = mlp((3, 4, 4, 2), (2, 1, 0.5), samples=12)
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    now, then = trace_at(problem.model, problem.syms, problem.measure(), eq.elements)
    again = problem.measure(moved(problem.model, problem.syms, eq.elements))
    assert then == pytest.approx(sum(float(t.sum()) for t in again.squares.values()), rel=1e-10)
    assert now == pytest.approx(sum(float(t.sum()) for t in problem.measure().squares.values()), rel=1e-10)


def test_forecast_of_stable_learning_rate_and_warmup() -> None:
    problem = mlp((4, 6, 3), (30, 0.5), samples=30)
    data, moments = [problem.data], problem.measure()
    eq = noise_equilibrium(problem.model, problem.syms, moments, SGD)
    there = moved(problem.model, problem.syms, eq.elements)
    tops = [float(torch.linalg.eigvalsh(dense_hessian(problem, m))[-1]) for m in (problem.model, there)]
    assert tops[1] < 0.5 * tops[0]
    rates = {"none": 1 / tops[0], "some": 2 / (tops[0] * tops[1]) ** 0.5, "never": 3 / tops[1]}
    for expected, lr in rates.items():
        flow = noether_flow(problem.model, problem.syms, moments, nf.SGDConfig(lr, 4))
        got = sharpness_forecast(problem.model, problem.loss, data, eq, flow, probes=20)
        assert got.top_now == pytest.approx(tops[0], rel=1e-3)
        assert got.top_equilibrium == pytest.approx(tops[1], rel=1e-3)
        assert got.stable_lr_equilibrium > got.stable_lr_now
        if expected == "some":
            assert got.warmup_steps is not None
            assert got.warmup_steps > 0
            assert "warmup over about" in str(got)
        else:
            assert got.warmup_steps == (0 if expected == "none" else None)
        assert json.loads(json.dumps(got.to_dict()))["ratio"] == pytest.approx(got.ratio)


def test_unusable_input_is_refused() -> None:
    problem = mlp((3, 4, 2))
    x, y = problem.data
    with pytest.raises(DataError, match="no batches"):
        top_eigenvalue(problem.model, problem.loss, [])
    with pytest.raises(DataError, match="per-sample losses"):
        top_eigenvalue(problem.model, lambda m, b: problem.loss(m, b).mean(), [problem.data])
    with pytest.raises(DataError, match="not finite"):
        top_eigenvalue(problem.model, problem.loss, [(x * float("nan"), y)])
    big = mlp((100, 200, 3), samples=4)
    with pytest.raises(DataError, match="probes="):
        curvature_moments(big.model, big.loss, [big.data], big.syms)
