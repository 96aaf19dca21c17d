"""The flow under Adam from moments: its parts by brute force, time scale and forecasts by plain integration."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import noetherflow as nf
from equilibrium_cases import Problem, mlp
from noetherflow.equilibrium.flow import noether_flow
from noetherflow.errors import DataError
from noetherflow.moments.result import merge_moments
from reference import moments_by_loop, per_sample_gradients


def settings(problem: Problem, **changed: Any) -> nf.AdamConfig:
    return nf.AdamConfig(batch_size=4, dataset_size=len(problem.data[0]), **{"lr": 0.01, "eps": 0.0} | changed)


@pytest.mark.parametrize("changed", [{}, {"eps": 0.2}, {"decoupled": False}], ids=str)
def test_parts_of_the_drift_written_out(changed: dict[str, Any]) -> None:
    """Noise, step size and decay of every unit, entry by entry, with a bias group of its own rates."""
    problem = mlp((4, 5, 3))
    config = settings(problem, weight_decay=0.1, groups=(nf.GroupRates(("0.bias",), 0.005, 0.0),), **changed)
    (row,) = noether_flow(problem.model, problem.syms, problem.measure(), config).details
    singles = per_sample_gradients(problem.model, problem.loss, problem.data)
    noise, mean, decay, charge = (torch.zeros(5, dtype=torch.float64) for _ in range(4))
    for name, sign, axis in (("0.weight", 1, 1), ("0.bias", 1, None), ("2.weight", -1, 0)):
        stacked = torch.stack([g[name] for g in singles])
        white, steady = config.covariance_factor * stacked.var(0, unbiased=False), stacked.mean(0) ** 2
        s = (white + steady).sqrt()
        over, theta = s + config.eps, problem.tensors()[name]
        lr, w = (0.005, 0.0) if name == "0.bias" else (0.01, 0.1)
        held = 2 * lr * w * theta**2 if not config.decoupled else lr * w * (2 - lr * w) * theta**2 * over
        parts = [
            0.01 * lr * white / over,
            0.01 * lr * 19 * steady / over,
            held * 0.01 / lr,
            theta**2 * over * 0.01 / lr,
        ]
        sums = [(p if axis is None else p.sum(axis)).nan_to_num() * sign for p in parts]
        noise, mean, decay, charge = (a + b for a, b in zip((noise, mean, decay, charge), sums, strict=True))
    torch.testing.assert_close(row.noise, noise)
    torch.testing.assert_close(row.step_size, mean)
    torch.testing.assert_close(row.decay, -decay)
    torch.testing.assert_close(row.charge, charge)


def by_small_steps(problem: Problem, config: nf.AdamConfig, steps: int) -> Tensor:
    """The charge of a lone torus after that many steps: unit by unit, `v` entry by entry, by midpoint steps."""
    singles = per_sample_gradients(problem.model, problem.loss, problem.data)
    second, square, sign = [], [], []
    for name, a, along in (("0.weight", 1.0, 1), ("0.bias", 1.0, None), ("2.weight", -1.0, 0)):
        stacked = torch.stack([g[name] for g in singles])
        white, steady = config.covariance_factor * stacked.var(0, unbiased=False), stacked.mean(0) ** 2
        rows = [t[:, None] if along is None else t if along else t.T
                for t in (white + steady, problem.tensors()[name] ** 2, white + 3 * steady)]  # fmt: skip
        second.append((rows[0], rows[2]))
        square.append(rows[1])
        sign.append(torch.full((rows[0].shape[1],), a, dtype=torch.float64))
    s2, drive = (torch.cat([pair[i] for pair in second], 1) for i in (0, 1))
    theta2, a = torch.cat(square, 1), torch.cat(sign)
    v, lam, h = s2.clone(), torch.zeros(5, 1, dtype=torch.float64), 0.5

    def rates(v: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        over, moved = v.sqrt() + config.eps, theta2 * (2 * a * lam).exp()
        kept = config.lr * config.weight_decay * (2 - config.lr * config.weight_decay)
        drift = (a * (config.lr**2 * drive * (-2 * a * lam).exp() / over - kept * over * moved)).sum(1, keepdim=True)
        grown = drift / (2 * (over * moved).sum(1, keepdim=True))
        return (1 - config.betas[1]) * (s2 * (-2 * a * lam).exp() - v), grown

    for _ in range(round(steps / h)):
        dv, dlam = rates(v, lam)
        dv, dlam = rates(v + h / 2 * dv, lam + h / 2 * dlam)
        v, lam = v + h * dv, lam + h * dlam
    return (a * (v.sqrt() + config.eps) * theta2 * (2 * a * lam).exp()).sum(1)


@pytest.mark.parametrize("changed", [{}, {"betas": (0.5, 0.9995)}, {"eps": 0.2}], ids=str)
def test_forecast_with_v_lagging_behind(changed: dict[str, Any]) -> None:
    problem = mlp((4, 5, 3), (2.0, 0.5))
    config = settings(problem, **{"lr": 0.02, "weight_decay": 0.05, "betas": (0.5, 0.99)} | changed)
    flow = noether_flow(problem.model, problem.syms, problem.measure(), config)
    forecast = flow.forecast([0, 300, 1500])
    found = forecast.charges[flow.details[0].name]
    torch.testing.assert_close(found[0], flow.details[0].charge)
    for i, steps in ((1, 300), (2, 1500)):
        torch.testing.assert_close(found[i], by_small_steps(problem, config, steps), rtol=2e-4, atol=1e-6)
    assert float(((found[2] - found[0]) / found[0]).abs().max()) > 0.2


def test_forecast_ends_at_the_joint_equilibrium_and_starts_with_the_drift() -> None:
    problem = mlp((4, 5, 6, 3), (1.5, 1.0, 0.6))
    config = settings(problem, lr=0.02, weight_decay=0.1, betas=(0.0, 0.9))
    moments = problem.measure()
    flow = noether_flow(problem.model, problem.syms, moments, config)
    eq = nf.noise_equilibrium(problem.model, problem.syms, moments, config)
    forecast = flow.forecast([0, 1_000_000])
    for row in flow.details:
        live = row.finite
        torch.testing.assert_close(forecast.charges[row.name][1][live], eq[row.name].charge[live], rtol=1e-4, atol=1e-6)
    lion = noether_flow(problem.model, problem.syms, moments, nf.LionConfig(0.001, 4, dataset_size=40))
    first = lion.forecast([0, 1])
    for row in lion.details:
        change = first.charges[row.name][1] - first.charges[row.name][0]
        assert float(change.norm()) > 0


def test_relaxation_is_the_decay_of_a_small_deviation() -> None:
    """With `v` following at once (Lion), a unit that starts beside its equilibrium comes back by e in that time."""
    problem = mlp((4, 5, 3))
    config = nf.AdamConfig(0.02, 4, betas=(0.0, 0.0), eps=0.0, weight_decay=0.1, dataset_size=40)
    eq = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), config)
    (s,) = problem.syms
    s.act_(nf.tensors_of(problem.model), eq[s.name].element * 1.001)
    flow = noether_flow(problem.model, problem.syms, problem.measure(), config)
    (row,) = flow.details
    back = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), config)[s.name].charge
    steps = round(float(row.relaxation_steps[row.finite].median()))
    unit = int((row.relaxation_steps - steps).abs().argmin())
    charges = flow.forecast([0, steps]).charges[s.name][:, unit]
    left = float((charges[1] - back[unit]) / (charges[0] - back[unit]))
    assert left == pytest.approx(0.368, abs=0.01)


def test_errors_of_the_drift_are_its_scatter() -> None:
    problem = mlp((3, 4, 2))
    torch.manual_seed(3)
    config = nf.AdamConfig(0.01, 4, betas=(0.0, 0.99))
    drifts, claims = [], []
    for _ in range(30):
        x, y = torch.randn(200, 3, dtype=torch.float64), torch.randn(200, 2, dtype=torch.float64)
        parts = [moments_by_loop(problem.model, problem.loss, [b], problem.syms)
                 for b in zip(x.split(20), y.split(20), strict=True)]  # fmt: skip
        moments = dataclasses.replace(merge_moments(parts), groups=tuple(parts))
        (row,) = noether_flow(problem.model, problem.syms, moments, config).details
        drifts.append(row.noise + row.step_size)
        claims.append(row.error)
    ratio = torch.stack(claims).square().mean(0).sqrt() / torch.stack(drifts).std(0)
    assert float(ratio.min()) > 0.6
    assert float(ratio.max()) < 1.7


def test_one_verb_for_moments_and_for_a_run() -> None:
    problem = mlp((4, 5, 3))
    optimizer = torch.optim.AdamW(problem.model.parameters())
    problem.loss(problem.model, problem.data).mean().backward()
    optimizer.step()
    run = nf.noether_flow(problem.model, problem.syms, optimizer=optimizer)
    assert run.steps == 1
    moments = problem.measure()
    flow = nf.noether_flow(problem.model, problem.syms, moments, settings(problem))
    assert "preconditioned" in str(flow)
    assert "slow against the fluctuations" in str(flow)
    for wrong in (
        {"mom": moments, "optimizer": optimizer},
        {"mom": moments},
        {"mom": moments, "sgd": settings(problem), "lr": 0.1},
        {},
        {"mom": moments, "sgd": {"lr": 0.1}},
    ):
        with pytest.raises(DataError):
            nf.noether_flow(problem.model, problem.syms, **wrong)  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", [nf.AdamConfig, nf.LionConfig, nf.SGDConfig])
def test_charge_drift_and_forecast_are_in_one_unit_where_only_another_layer_is_faster(kind: Any) -> None:
    """Decay takes the same share of the charge of every symmetry whose own parameters have equal rates."""
    problem = mlp((4, 5, 6, 3))
    config = kind(0.01, 4, weight_decay=0.1, dataset_size=40, groups=(nf.GroupRates(("0.weight",), 0.03, 0.1),))
    flow = noether_flow(problem.model, problem.syms, problem.measure(), config)
    (inner,) = [s.name for s in problem.syms if "0.weight" not in s.parameters]
    row = flow[inner]
    assert float(row.charge.abs().max()) > 0
    torch.testing.assert_close(row.decay, -0.001 * (2 - 0.001) * row.charge)
    forecast = flow.forecast([0, 1], errors=False).charges[inner]
    torch.testing.assert_close(forecast[0], row.charge)
    others = tuple(n for n in problem.tensors() if n != "0.weight")
    turned = kind(0.03, 4, weight_decay=0.1, dataset_size=40, groups=(nf.GroupRates(others, 0.01, 0.1),))
    again = noether_flow(problem.model, problem.syms, problem.measure(), turned)[inner]
    torch.testing.assert_close(again.charge, row.charge)  # whichever of the two is the group
    torch.testing.assert_close(again.drift, row.drift)
