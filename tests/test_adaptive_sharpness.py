"""Adam's largest stable rate now and at its equilibrium, against dense Hessians and per-sample gradients there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from equilibrium_cases import mlp
from noetherflow.equilibrium.adaptive_sharpness import AdaptiveSharpness
from noetherflow.errors import DataError
from reference import per_sample_gradients


def dense_top(problem: object, model: nn.Module, config: nf.AdamConfig) -> float:
    """The largest eigenvalue of `D^1/2 H D^1/2` from a dense Hessian and single gradients at the model's weights."""
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    x, y = problem.data  # type: ignore[attr-defined]

    def loss(flat: Tensor) -> Tensor:
        parts = [v.reshape(s) for v, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        out = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,))
        return (out - y).square().sum(1).mean()

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    singles = per_sample_gradients(model, problem.loss, problem.data)  # type: ignore[attr-defined]
    scale = []
    for n in names:
        g = torch.stack([s[n] for s in singles])
        s = (config.covariance_factor * g.var(0, unbiased=False) + g.mean(0) ** 2).sqrt()
        scale.append((config.rates(n).lr / config.lr / (s + config.eps)).sqrt().reshape(-1))
    d = torch.cat(scale)
    return float(torch.linalg.eigvalsh(d[:, None] * hessian * d)[-1])


@pytest.mark.parametrize("eps", [1e-12, 0.02])
def test_stable_rates_are_those_of_the_dense_preconditioned_hessian_at_both_points(eps: float) -> None:
    problem = mlp((4, 6, 3), (30, 0.5), samples=24)
    config = nf.AdamConfig(0.01, 4, betas=(0.9, 0.999), eps=eps, weight_decay=0.1, dataset_size=24)
    moments = problem.measure()
    eq = nf.noise_equilibrium(problem.model, problem.syms, moments, config, errors=False)
    flow = nf.noether_flow(problem.model, problem.syms, moments, config)
    found = nf.sharpness_forecast(problem.model, problem.loss, [problem.data], eq, flow)
    assert isinstance(found, AdaptiveSharpness)
    there = copy.deepcopy(problem.model)
    for s in problem.syms:
        s.act_(nf.tensors_of(there), eq[s.name].element)
    now, then = dense_top(problem, problem.model, config), dense_top(problem, there, config)
    assert found.top_now == pytest.approx(now, rel=1e-3)
    assert found.top_equilibrium == pytest.approx(then, rel=1e-3)
    assert abs(then / now - 1) > 0.05, "the orbit matters"
    assert found.stable_lr_now == pytest.approx(2 * 1.9 / (0.1 * now), rel=1e-3)
    assert found.load_equilibrium == pytest.approx(0.01 * 0.1 * then / 3.8, rel=1e-3)
    assert "largest stable lr of Adam" in str(found)
    assert set(found.to_dict()) > {"top_now", "load_now", "stable_lr_equilibrium"}


def test_a_flow_of_lion_is_refused() -> None:
    problem = mlp((3, 4, 2), samples=12)
    config = nf.LionConfig(1e-3, 4, dataset_size=12)
    eq = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), config)
    flow = nf.noether_flow(problem.model, problem.syms, problem.measure(), config)
    with pytest.raises(DataError, match="Lion's steps have one size"):
        nf.sharpness_forecast(problem.model, problem.loss, [problem.data], eq, flow)
