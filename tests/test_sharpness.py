"""Sharpness along the orbit against dense Hessians of moved models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import noetherflow as nf
from equilibrium_cases import Problem, linear, mlp, moved
from noetherflow.core.printing import MEANING
from noetherflow.equilibrium import noise_equilibrium
from noetherflow.equilibrium.curvature import (
    HessianProduct,
    curvature_moments,
    noise_curvature,
    top_eigenvalue,
    top_pair,
    trace_at,
)
from noetherflow.equilibrium.flow import noether_flow
from noetherflow.equilibrium.sharpness import Curvature, sharpness_forecast
from noetherflow.errors import DataError, MomentError
from noetherflow.moments import load_moments, merge_moments, save_moments

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
    assert exact.legs == probed.legs == {s.name: tuple(leg.label for leg in s.weight_legs)}


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
            assert got.full_batch_warmup_steps is not None
            assert got.full_batch_warmup_steps > 0
            assert "warmup over about" in str(got)
        else:
            assert got.full_batch_warmup_steps == (0 if expected == "none" else None)
        assert json.loads(json.dumps(got.to_dict()))["ratio"] == pytest.approx(got.ratio)


def steep(problem: Problem, momentum: float, left: float) -> tuple[Any, Any, Any]:
    """Flow at a learning rate that is stable once `left` of the way is left, the equilibrium, and the forecast."""
    moments, data = problem.measure(), [problem.data]
    sgd = nf.SGDConfig(0.05, 4, momentum=momentum)
    eq = noise_equilibrium(problem.model, problem.syms, moments, sgd)
    there = moved(problem.model, problem.syms, eq.elements)
    now, then = (top_eigenvalue(m, problem.loss, data) for m in (problem.model, there))
    sgd = dataclasses.replace(sgd, lr=2 * (1 + momentum) / (then + left * (now - then)))
    eq = noise_equilibrium(problem.model, problem.syms, moments, sgd)
    flow = noether_flow(problem.model, problem.syms, moments, sgd)
    return flow, eq, sharpness_forecast(problem.model, problem.loss, data, eq, flow, probes=2)


@pytest.mark.parametrize(
    ("family", "momentum", "left"), [("torus", 0.0, 0.1), ("torus", 0.5, 0.1), ("general_linear", 0.0, 1e-3)]
)
def test_warmup_is_just_long_enough(family: str, momentum: float, left: float) -> None:
    """Ramps run step by step, each step moving the charges `(lr(k) / lr)^2`: this one is stable, 0.7 of it is not."""
    if family == "torus":
        problem = mlp((4, 6, 3), (30, 0.5), samples=300)
    else:
        problem = linear((5, 3, 4), samples=300)
        with torch.no_grad():
            problem.model[0].weight *= 20
    flow, eq, got = steep(problem, momentum, left)
    times = np.unique(np.geomspace(1, 20 * max(float(r.relaxation_steps.max()) for r in flow.details), 400).astype(int))
    (name,) = eq.elements
    charges, end = flow.forecast([0, *times.tolist()]).charges[name], eq[name].charge
    if family == "general_linear":
        charges, end = torch.linalg.eigvalsh(charges), torch.linalg.eigvalsh(end)
    away = (charges - end).flatten(1).norm(dim=1).numpy()
    top = got.top_equilibrium + (got.top_now - got.top_equilibrium) * away / away[0]

    def overshoot(length: int) -> float:
        ramp = np.arange(1, length + 1) / length
        flowed = np.cumsum(ramp**2) - ramp**2
        return float((got.lr * ramp * np.interp(flowed, [0, *times], top)).max() / (2 * (1 + momentum)))

    assert got.full_batch_warmup_steps is not None
    assert overshoot(got.full_batch_warmup_steps) < 1
    assert overshoot(round(0.7 * got.full_batch_warmup_steps)) > 1


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_stability_limit_is_where_torch_diverges(settings: dict[str, Any]) -> None:
    curvature = 3.0
    for factor, grows in ((0.98, False), (1.02, True)):
        lr = factor * nf.SGDConfig(1.0, 1, **settings).stability_limit / curvature
        theta = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([theta], lr=lr, **settings)
        for _ in range(1500):
            optimizer.zero_grad()
            (curvature * theta**2 / 2).backward()
            optimizer.step()
        assert (abs(float(theta.detach())) > 1) == grows


def test_symmetries_left_out_of_the_equilibrium_are_left_out_of_the_warmup() -> None:
    problem = mlp((3, 4, 3, 2), (6, 0.5, 1), samples=30)
    first, second = problem.syms
    approximate = nf.SymmetrySet((first, dataclasses.replace(second, eps=1e-5)), shapes=problem.syms.shapes)
    eq = noise_equilibrium(problem.model, approximate, problem.measure(), SGD, approximate=False)
    there = moved(problem.model, problem.syms, eq.elements)
    tops = [top_eigenvalue(m, problem.loss, [problem.data]) for m in (problem.model, there)]
    sgd = dataclasses.replace(SGD, lr=2 / (tops[0] * tops[1]) ** 0.5)
    flow = noether_flow(problem.model, approximate, problem.measure(), sgd)
    assert (
        sharpness_forecast(problem.model, problem.loss, [problem.data], eq, flow, probes=2).full_batch_warmup_steps != 0
    )


def test_curvature_prints_hessian_traces(tmp_path: Path) -> None:
    """Not a loss and squared gradients; and still after a way through a file, and in part."""
    problem = mlp((3, 4, 2))
    curvature = curvature_moments(problem.model, problem.loss, [problem.data], problem.syms, probes=3)
    save_moments(curvature, tmp_path / "curvature")
    printed = str(load_moments(tmp_path / "curvature"))
    assert printed == str(curvature)
    assert printed.startswith("3 Hessian products in 3 groups\n")
    assert f"Hessian trace: {MEANING['Hessian trace']}" in " ".join(printed.split())
    assert "gradient" not in printed
    assert next(curvature.leave_one_out()).kind == "hessian"
    assert (curvature.to_dict()["kind"], curvature.to_dict()["loss"]) == ("hessian", None)
    assert ", mean loss " in str(problem.measure())
    with pytest.raises(MomentError, match="differ in kind"):
        merge_moments([curvature, dataclasses.replace(curvature, kind="gradient")])


def test_curvature_leaves_running_statistics_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).double().train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    problem = Problem(model, nf.SymmetrySet(()), mlp((3, 4, 2)).data)
    top_eigenvalue(model, problem.loss, [problem.data])
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


def test_flattest_point_is_not_taken_from_gradients() -> None:
    problem = mlp((3, 4, 2))
    with pytest.raises(MomentError, match="needs curvature_moments"):
        noise_equilibrium(problem.model, problem.syms, problem.measure(), objective="hessian")


def test_trace_needs_entries() -> None:
    problem = mlp((3, 4, 2))
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), SGD)
    lacking = dataclasses.replace(problem.measure(), squares={})
    with pytest.raises(MomentError, match="entries=True"):
        trace_at(problem.model, problem.syms, lacking, eq.elements)


def test_unusable_input_is_refused() -> None:
    problem = mlp((3, 4, 2))
    x, y = problem.data
    with pytest.raises(DataError, match="no batches"):
        top_eigenvalue(problem.model, problem.loss, [])
    with pytest.raises(DataError, match="per-sample losses"):
        top_eigenvalue(problem.model, lambda m, b: problem.loss(m, b).mean(), [problem.data])
    with pytest.raises(DataError, match="not finite"):
        top_eigenvalue(problem.model, problem.loss, [(x * float("nan"), y)])
    renormalising = torch.nn.Sequential(torch.nn.Embedding(3, 2, max_norm=0.1))
    with pytest.raises(DataError, match="max_norm"):
        top_eigenvalue(renormalising, problem.loss, [problem.data])
    big = mlp((100, 200, 3), samples=4)
    with pytest.raises(DataError, match="probes="):
        curvature_moments(big.model, big.loss, [big.data], big.syms)


def least_squares(d: int, samples: int = 300) -> Problem:
    """One output, squared loss, inputs of unequal sizes: every sample's Hessian is `2 x x^T`."""
    torch.manual_seed(0)
    model = torch.nn.Linear(d, 1, bias=False).double()
    x = torch.randn(samples, d, dtype=torch.float64) * torch.linspace(1, 3, d, dtype=torch.float64)
    return Problem(model, nf.SymmetrySet(()), (x, torch.randn(samples, 1, dtype=torch.float64)))


def second_moment_growth(x: torch.Tensor, sgd: nf.SGDConfig) -> float:
    """Spectral radius of what one step does to `E[z z^T]`, `z` the error and the momentum buffer, with fresh
    samples.
    """
    d, m, lr = x.shape[1], sgd.momentum, sgd.lr
    one, zero = torch.eye(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)

    def step(h: torch.Tensor, rest: torch.Tensor, kept: float) -> torch.Tensor:
        return torch.cat([torch.cat([rest - lr * h, -lr * kept * one], 1), torch.cat([h, kept * one], 1)])

    hessian = 2 * x.mT @ x / len(x)
    mean = step(hessian, one, m)
    total = torch.kron(mean, mean)
    for sample in x:
        part = step(2 * torch.outer(sample, sample) - hessian, zero, 0.0)
        total = total + torch.kron(part, part) / (len(x) * sgd.batch_size)
    return float(torch.linalg.eigvals(total).abs().max())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_load_is_where_minibatches_stop_being_stable_in_mean_square(momentum: float, batch: int) -> None:
    """Never beyond the exact limit of least squares, and not far below; full batches alone would promise more."""
    problem = least_squares(4)
    product = HessianProduct(problem.model, problem.loss, [problem.data])
    top, direction = top_pair(product)
    here = Curvature(top, noise_curvature(product, direction, draws=64))
    sgd = nf.SGDConfig(1e-6, batch, momentum=momentum)
    unit = here.load(sgd) / sgd.lr
    grows = {
        load: second_moment_growth(problem.data[0], dataclasses.replace(sgd, lr=load / unit)) for load in (0.97, 1.5)
    }
    assert grows[0.97] < 1 < grows[1.5]
    if batch == 1:
        full = dataclasses.replace(sgd, lr=0.97 * sgd.lr / here.full_batch_load(sgd))
        assert second_moment_growth(problem.data[0], full) > 1


def test_noise_curvature_against_every_samples_hessian() -> None:
    problem = mlp((3, 4, 2), samples=12)
    product = HessianProduct(problem.model, problem.loss, [problem.data])
    top, direction = top_pair(product)
    x, y = problem.data
    each = [
        dense_hessian(Problem(problem.model, problem.syms, (x[i : i + 1], y[i : i + 1])), problem.model)
        for i in range(12)
    ]
    v, mean = torch.as_tensor(direction), torch.stack(each).mean(0)
    along = sum(float((h @ v).square().sum()) for h in each) / 12 / float(v @ mean @ v)
    average = sum(float(h.square().sum()) for h in each) / 12 / float(mean.trace())
    found = noise_curvature(product, direction, draws=500)
    assert found == pytest.approx(max(along, average), rel=0.1)
    assert float(v @ mean @ v) == pytest.approx(top, rel=1e-6)


def test_the_printed_advice_is_for_minibatches_and_says_so() -> None:
    problem = mlp((4, 6, 3), (30, 0.5), samples=300)
    _, _, got = steep(problem, 0.0, 0.1)
    assert got.full_batch_warmup_steps is not None
    assert got.warmup_steps is None or got.warmup_steps > got.full_batch_warmup_steps
    assert got.load_now > got.lr / got.stable_lr_now
    assert "batches of 4: " in str(got)
    assert "full batches: linear warmup over about" in str(got)
