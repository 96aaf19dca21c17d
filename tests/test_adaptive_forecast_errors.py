"""Standard errors of forecasts under Adam, Lion and SGD with groups: the jackknife by hand, and coverage."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import noetherflow as nf
from equilibrium_cases import Problem, mlp
from noetherflow.equilibrium import forecast as forecast_module
from noetherflow.equilibrium.flow import Flow, noether_flow
from noetherflow.moments.result import GradientMoments, merge_moments
from reference import moments_by_loop

STEPS = [0, 200, 1000]
SLOWER_BIAS = (nf.GroupRates(("0.bias",), 0.005, 0.0),)
CONFIGS = {
    "Adam": nf.AdamConfig(0.02, 4, betas=(0.5, 0.99), eps=0.0, weight_decay=0.05),
    "eps": nf.AdamConfig(0.02, 4, betas=(0.5, 0.99), eps=0.2, weight_decay=0.05),
    "groups": nf.AdamConfig(0.02, 4, betas=(0.5, 0.99), weight_decay=0.05, groups=SLOWER_BIAS),
    "coupled": nf.AdamConfig(0.02, 4, betas=(0.5, 0.99), weight_decay=0.05, decoupled=False),
    "Lion": nf.LionConfig(0.001, 4),
    "SGD": nf.SGDConfig(0.02, 4, weight_decay=0.05, groups=SLOWER_BIAS),
}


def parts_of(problem: Problem, size: int) -> list[GradientMoments]:
    """Moments of every `size` samples, sample by sample."""
    x, y = problem.data
    pairs = zip(x.split(size), y.split(size), strict=True)
    return [moments_by_loop(problem.model, problem.loss, [b], problem.syms) for b in pairs]


def grouped(parts: list[GradientMoments]) -> GradientMoments:
    return dataclasses.replace(merge_moments(parts), groups=tuple(parts))


def flow_of(problem: Problem, moments: GradientMoments, config: Any) -> Flow:
    return noether_flow(problem.model, problem.syms, moments, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_errors_are_those_of_flows_without_each_group(name: str) -> None:
    """Two hidden layers move together; every flow without a group is made anew from the moments of the others."""
    problem, config = mlp((3, 4, 3, 2), (1.5, 1.0, 0.7), seed=11, samples=48), CONFIGS[name]
    parts = parts_of(problem, 12)
    found = flow_of(problem, grouped(parts), config).forecast([0, 200])
    rest = [merge_moments([p for j, p in enumerate(parts) if j != i]) for i in range(4)]
    without = [flow_of(problem, m, config).forecast([0, 200]).charges for m in rest]
    assert found.groups == 4
    for s in problem.syms:
        spread = torch.stack([w[s.name] for w in without])
        by_hand = (3 / 4 * (spread - spread.mean(0)).square().sum(0)).sqrt()
        torch.testing.assert_close(found.errors[s.name], by_hand, rtol=2e-3, atol=1e-6 * float(by_hand.max()))
        assert float(by_hand[1:].min()) > 0
        assert (float(by_hand[0].max()) > 0) == (name != "SGD"), "the preconditioned charge is measured, C is not"
    assert "+-" in str(found)


def test_errors_of_groups_of_other_sizes() -> None:
    """Pseudo-values of Busing et al., written out: one group of 24 samples and two of 12."""
    problem, config = mlp((3, 4, 2), samples=48), CONFIGS["Adam"]
    small = parts_of(problem, 12)
    parts = [merge_moments(small[:2]), *small[2:]]
    found = flow_of(problem, grouped(parts), config).forecast(STEPS)
    (s,) = problem.syms
    whole, h = found.charges[s.name], [2.0, 4.0, 4.0]
    pseudo = []
    for i in range(3):
        rest = merge_moments([p for j, p in enumerate(parts) if j != i])
        pseudo.append(h[i] * whole - (h[i] - 1) * flow_of(problem, rest, config).forecast(STEPS).charges[s.name])
    mean = torch.stack([p / k for p, k in zip(pseudo, h, strict=True)]).sum(0)
    variance = torch.stack([(p - mean).square() / (k - 1) for p, k in zip(pseudo, h, strict=True)]).mean(0)
    torch.testing.assert_close(found.errors[s.name], variance.sqrt(), rtol=2e-3, atol=1e-7)


def test_errors_last_when_the_model_moves_on() -> None:
    problem = mlp((3, 4, 2), samples=48)
    flow = flow_of(problem, grouped(parts_of(problem, 12)), CONFIGS["Adam"])
    (s,) = problem.syms
    before = flow.forecast(STEPS).errors[s.name]
    with torch.no_grad():
        for p in problem.model.parameters():
            p.mul_(3)
    assert torch.equal(flow.forecast(STEPS).errors[s.name], before)


def test_no_errors_without_groups_where_not_wanted_or_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, config = mlp((3, 4, 2), samples=48), CONFIGS["Adam"]
    moments = grouped(parts_of(problem, 12))
    flow = flow_of(problem, moments, config)
    assert flow.forecast(STEPS).errors
    legs_alone = tuple(dataclasses.replace(g, squares={}) for g in moments.groups)
    for other in (problem.measure(), dataclasses.replace(moments, groups=legs_alone)):
        assert flow_of(problem, other, config).forecast(STEPS).errors == {}
    plain = flow.forecast(STEPS, errors=False)
    assert plain.errors == {}
    assert "+-" not in str(plain)
    monkeypatch.setattr(forecast_module, "EVALUATIONS", 10)
    cut = flow.forecast([0, 1, 10**7])
    assert cut.asked == 10**7
    assert cut.errors == {}


def test_errors_are_left_out_where_a_forecast_without_a_group_ends_before(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = mlp((3, 4, 2), samples=48)
    flow = flow_of(problem, grouped(parts_of(problem, 12)), CONFIGS["Adam"])
    assert flow.groups is not None
    charges = flow.forecast(STEPS, errors=False).charges
    assert flow.groups.errors((0, 200, 1000), charges)
    monkeypatch.setattr(forecast_module, "EVALUATIONS", 10)
    assert flow.groups.errors((0, 200, 1000), charges) == {}


def test_data_measured_whole_leave_no_error() -> None:
    problem = mlp((3, 4, 2), samples=48)
    moments = grouped(parts_of(problem, 12))
    (s,) = problem.syms
    sampled, whole = (
        flow_of(problem, moments, dataclasses.replace(CONFIGS["Adam"], dataset_size=n)).forecast(STEPS).errors[s.name]
        for n in (96, 48)
    )
    assert bool((sampled > 0).all())
    assert not bool(whole.any())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Adam", "eps", "Lion"])
def test_intervals_hold_the_truth_as_often_as_they_say(name: str) -> None:
    """Forty measurements of 320 samples, against the forecast from 400,000: 95 and 50 % of the intervals."""
    problem, config = mlp((3, 4, 2), (1.5, 0.7)), CONFIGS[name]
    (s,) = problem.syms
    rng = torch.Generator().manual_seed(1)

    def forecast(samples: int, batch: int) -> nf.Forecast:
        x = torch.randn(samples, 3, dtype=torch.float64, generator=rng)
        noise = torch.randn(samples, 2, dtype=torch.float64, generator=rng)
        y = problem.model(x).detach() + 0.8 * noise
        batches = list(zip(x.split(batch), y.split(batch), strict=True))
        moments = nf.gradient_moments(problem.model, problem.loss, batches, problem.syms, entries=True, groups=8)
        return flow_of(problem, moments, config).forecast([0, 400], errors=samples < 1000)

    truth = forecast(400_000, 4000).charges[s.name]
    found = [forecast(320, 40) for _ in range(40)]

    def misses(level: float, scale: float) -> Tensor:
        """Share of intervals, `scale` times as wide, that hold the truth, minus the level, in standard errors."""
        half = [scale * (f.interval(s.name, level)[1] - f.charges[s.name]) for f in found]
        inside = [(f.charges[s.name] - truth).abs() <= h for f, h in zip(found, half, strict=True)]
        share = torch.stack(inside).double().mean(2)
        return (share.mean(0) - level) / (share.std(0) / len(found) ** 0.5)

    for level in (0.95, 0.5):
        assert float(misses(level, 1.0).abs().max()) < 3
    assert float(misses(0.95, 0.5).max()) < -5, "errors half as large would show"
    assert float(misses(0.5, 2.0).min()) > 5, "errors twice as large would show"
