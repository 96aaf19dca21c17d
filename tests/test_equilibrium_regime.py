"""The regime of a drift: share of the mean gradient, horizon, what is printed; intervals; approximate symmetries."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import noetherflow as nf
from equilibrium_cases import linear, mlp
from noetherflow.equilibrium.regime import Regime, mean_gradient_square, regime_of
from noetherflow.errors import MomentError
from noetherflow.moments.statistics import t_quantile
from reference import moments_by_loop, per_sample_gradients
from test_flow import grouped

F64 = torch.float64


def whole(samples: int, **settings: float) -> nf.SGDConfig:
    return nf.SGDConfig(**{"lr": 0.01, "batch_size": 4, "dataset_size": samples, **settings})  # type: ignore[arg-type]


def test_horizon_is_the_loss_over_what_a_step_along_the_mean_gradient_takes() -> None:
    problem = mlp((4, 5, 3), samples=40)
    moments = problem.measure()
    for momentum in (0.0, 0.9):
        regime = regime_of(tuple(problem.syms), moments, whole(40, momentum=momentum))
        for p in problem.model.parameters():
            p.grad = None
        loss = problem.loss(problem.model, problem.data).mean()
        loss.backward()
        names = list(moments.mean)
        gradients = {n: p.grad for n, p in problem.model.named_parameters() if p.grad is not None}
        square = sum(float(gradients[n].square().sum()) for n in names)
        assert regime.horizon == pytest.approx(float(loss.detach()) * (1 - momentum) / (0.01 * square), rel=1e-9)


def test_the_mean_gradients_square_leaves_out_the_noise_of_the_samples() -> None:
    """Averaged over draws of 20 of 400 samples, with entries and with leg Grams alone: the square of all of them."""
    problem = mlp((3, 4, 2), samples=400)
    singles = per_sample_gradients(problem.model, problem.loss, problem.data)
    names = problem.syms.parameters
    exact = sum(float(torch.stack([g[n] for g in singles]).mean(0).square().sum()) for n in names)
    rng, found = torch.Generator().manual_seed(0), []
    for _ in range(300):
        pick = torch.randperm(400, generator=rng)[:20]
        x, y = (v[pick] for v in problem.data)
        part = moments_by_loop(problem.model, problem.loss, [(x, y)], problem.syms)
        bare = dataclasses.replace(part, squares={}, mean={n: part.mean[n] for n in names})
        found.append(mean_gradient_square(tuple(problem.syms), bare, whole(400)))
    values = torch.tensor(found, dtype=F64)
    assert abs(float(values.mean()) - exact) < 3 * float(values.std()) / 300**0.5
    raw = sum(float(part.mean[n].square().sum()) for n in names)
    assert raw > found[-1]


def test_share_is_that_of_the_step_size_part() -> None:
    problem = mlp((4, 5, 3), samples=40)
    flow = nf.noether_flow(problem.model, problem.syms, problem.measure(), whole(40, momentum=0.9))
    noise, step = (float(v.abs().sum()) for v in (flow.details[0].noise, flow.details[0].step_size))
    assert flow.regime.mean_share == pytest.approx(step / (noise + step), rel=1e-12)
    full = nf.SGDConfig(0.01, 40, dataset_size=40)
    assert nf.noether_flow(problem.model, problem.syms, problem.measure(), full).regime.mean_share == 1
    still = regime_of((), problem.measure(), full)
    assert still.mean_share == 0


def test_no_mean_gradient_lasts_for_ever() -> None:
    problem = linear((3, 2, 3), samples=30)
    moments = problem.measure()
    at_rest = dataclasses.replace(moments, mean={n: torch.zeros_like(m) for n, m in moments.mean.items()})
    regime = regime_of(tuple(problem.syms), at_rest, whole(30))
    assert math.isinf(regime.horizon)
    assert regime.to_dict()["horizon"] is None
    assert str(regime) == "mean gradient: 0% of the drift"


def test_forecasts_beyond_the_horizon_are_marked() -> None:
    problem = mlp((4, 5, 3), samples=40)
    flow = nf.noether_flow(problem.model, problem.syms, problem.measure(), whole(40, momentum=0.9, lr=0.001))
    horizon = int(flow.regime.horizon)
    assert horizon > 2
    forecast = flow.forecast([0, horizon, 100 * horizon], errors=False)
    assert forecast.valid == (True, True, False)
    assert [r["valid"] for r in forecast.rows()] == [True, True, False]
    assert f"{100 * horizon:,}*" in str(forecast)
    assert "not valid" in str(forecast)
    assert "nf.Ledger" in str(forecast)
    assert "not valid" not in str(flow.forecast([0, 1], errors=False))
    assert forecast.to_dict()["valid"] == [True, True, False]
    eq = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), whole(40, momentum=0.9, lr=0.001))
    assert eq.regime == flow.regime
    for printed in (flow, eq, forecast):
        assert "mean gradient: " in str(printed)
        assert "of the drift, lasts about" in str(printed)
    assert nf.noise_equilibrium(problem.model, problem.syms, None, objective="norm").regime is None


@pytest.mark.parametrize("steps", [[0, 2.5], [-1, 2], [3, 3], torch.tensor([1.0, 1.5])])
def test_steps_that_are_not_whole_numbers_are_refused(steps: list[float]) -> None:
    problem = mlp((4, 5, 3))
    flow = nf.noether_flow(problem.model, problem.syms, problem.measure(), whole(40))
    with pytest.raises(ValueError, match="whole, non-negative and increasing"):
        flow.forecast(steps)  # type: ignore[arg-type]
    assert flow.forecast(torch.tensor([1.0, 2.0])).steps == (1, 2)


def test_intervals_are_those_of_students_t() -> None:
    problem = mlp((4, 5, 3), samples=40)
    moments = grouped(problem, 8)
    flow = nf.noether_flow(problem.model, problem.syms, moments, nf.SGDConfig(0.01, 4))
    (row,) = flow.details
    low, high = row.interval(0.9)
    torch.testing.assert_close(high - low, 2 * 1.894578605 * row.error, rtol=1e-8, atol=0)
    torch.testing.assert_close((low + high) / 2, row.drift, rtol=1e-12, atol=1e-18)
    forecast = flow.forecast([10])
    low, high = forecast.interval(row.name)
    torch.testing.assert_close(high - low, 2 * 2.364624252 * forecast.errors[row.name], rtol=1e-8, atol=0)
    assert t_quantile(0.95, 10**6) == pytest.approx(1.959966, rel=1e-5)
    assert "40 samples are few" in str(flow)
    assert "40 samples are few" in str(forecast)
    bare = nf.noether_flow(problem.model, problem.syms, problem.measure(), nf.SGDConfig(0.01, 4))
    assert "are few" not in str(bare)
    with pytest.raises(MomentError, match="two groups"):
        bare.details[0].interval()


def test_signed_sums_tell_the_direction_that_norms_hide() -> None:
    problem = mlp((4, 5, 3), (3, 1), samples=40)
    flow = nf.noether_flow(problem.model, problem.syms, problem.measure(), whole(40))
    (row,) = flow.rows()
    drift, charge = flow.details[0].drift, flow.details[0].charge
    assert row["drift_sum"] == pytest.approx(float(drift.sum()))
    assert row["charge_sum"] == pytest.approx(float(charge.sum()))
    assert row["charge"] == pytest.approx(float(charge.norm()))
    family = flow.families()[0]
    assert family["drift per step: sum"] == pytest.approx(float(drift.sum()))
    parts = [family[f"drift per step: {part}"] for part in ("weight decay", "noise", "step size")]
    assert sum(parts) == pytest.approx(family["drift per step: sum"])
    assert family["drift per step: norm"] == pytest.approx(float(drift.norm()))
    assert float(drift.sum()) < 0 < row["drift"]


def test_an_approximate_symmetry_is_said_to_be_one() -> None:
    """LayerNorm of width 2: eps is no small thing, and the noise measured again is not balanced."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2, eps=1e-2), nn.Linear(2, 3)).double()
    x, y = torch.randn(64, 4, dtype=F64), torch.randn(64, 3, dtype=F64)
    syms = nf.find_symmetries(model, x[:2])
    assert any(s.eps for s in syms)
    loss = lambda m, batch: (m(batch[0]) - batch[1]).square().sum(1)
    moments = nf.gradient_moments(model, loss, [(x, y)], syms, entries=True)
    eq = nf.noise_equilibrium(model, syms, moments, nf.SGDConfig(0.05, 4, weight_decay=0.02))
    assert "only approximate" in str(eq)
    assert "eps 0.01" in str(eq)
    assert any(s["eps"] == 1e-2 for s in eq.to_dict()["settled"])
    left = nf.noise_equilibrium(model, syms, moments, nf.SGDConfig(0.05, 4, weight_decay=0.02), approximate=False)
    assert "only approximate (" not in str(left).split("excluded")[0]


def test_the_new_users_case_measured_early_with_momentum() -> None:
    """Digits-like MLP at step 100 of momentum 0.9: the forecast is marked; measuring again along the run is right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    x = torch.randn(256, 10, dtype=F64)
    y = (x @ torch.randn(10, 4, dtype=F64)).argmax(1)
    syms = nf.find_symmetries(model, x[:2])
    loss = lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1], reduction="none")
    sgd = nf.SGDConfig(0.05, 32, momentum=0.9, dataset_size=256, sampling="epoch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rng = torch.Generator().manual_seed(0)

    def train(steps: int) -> None:
        for k in range(steps):
            if k % 8 == 0:
                order = torch.randperm(256, generator=rng)
            pick = order[k % 8 * 32 : k % 8 * 32 + 32]
            optimizer.zero_grad()
            loss(model, (x[pick], y[pick])).mean().backward()
            optimizer.step()

    train(24)
    moments = nf.gradient_moments(model, loss, [(x, y)], syms, entries=True)
    flow = nf.noether_flow(model, syms, moments, sgd)
    assert flow.regime.mean_share > 0.5
    forecast = flow.forecast([0, 400], errors=False)
    assert forecast.valid == (True, False)
    start = copy.deepcopy(model)
    charge = lambda m: syms[0].charge({n: t.detach() for n, t in nf.tensors_of(m).items()})
    with nf.Ledger(model, optimizer, syms, every=1) as ledger:
        train(400)
    change = charge(model) - charge(start)
    off = float((forecast.charges[syms[0].name][1] - charge(model)).norm())
    assert off > float(change.norm()), "the marked forecast is off by more than the change itself"
    rows = ledger.records()
    assert len(rows) == 400
    booked = sum(r["change"] for r in rows)
    assert booked == pytest.approx(float(change.sum()), rel=1e-6)
    assert isinstance(forecast.regime, Regime)


def test_a_drift_whose_mean_gradient_does_not_last_momentums_memory_is_marked() -> None:
    problem = mlp((4, 6, 3), samples=200)
    moments = problem.measure()
    early = nf.noether_flow(problem.model, problem.syms, moments, nf.SGDConfig(0.5, 4, momentum=0.9))
    assert early.regime.horizon < 10
    assert "NOT VALID as a drift: momentum remembers 10 steps" in str(early)
    for sgd in (nf.SGDConfig(1e-4, 4, momentum=0.9), nf.SGDConfig(0.5, 4)):
        assert "NOT VALID as a drift" not in str(nf.noether_flow(problem.model, problem.syms, moments, sgd))


def test_momentum_with_a_mean_gradient_that_turns_within_its_memory_is_marked_and_off_by_the_factor_named() -> None:
    """Along a stiff direction the gradient alternates, though the loss would let it last for twice the memory."""
    momentum, lr, stiff, steps = 0.9, 0.02, 60.0, 4000
    x, buffer, moved = torch.tensor(1.0, dtype=F64), torch.tensor(0.0, dtype=F64), []
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        gradient = stiff * x + torch.randn((), dtype=F64, generator=rng)
        buffer = momentum * buffer + gradient
        x = x - lr * buffer
        moved.append((float(gradient) ** 2, float(buffer) ** 2))
    squares, buffers = torch.tensor(moved[100:], dtype=F64).mean(0)
    constant = squares / (1 - momentum) ** 2
    assert buffers < constant / (2 / (1 - momentum) - 1), "a constant gradient would fill the buffer far more"
    regime = Regime(0.9, 19.0, 10.0)
    assert not regime.constant
    assert "smaller by up to 19 times" in regime.cautions[0]
    assert Regime(0.9, 100.0, 10.0).constant
    assert Regime(0.05, 1.0, 10.0).constant, "it hardly counts"
    assert Regime(0.9, 1.0).constant, "without momentum nothing is taken to be constant"


def test_forecasts_that_momentum_cannot_trust_are_marked_from_the_first_step() -> None:
    problem = mlp((4, 6, 3), samples=200)
    sgd = nf.SGDConfig(0.02, 4, momentum=0.9)
    flow = nf.noether_flow(problem.model, problem.syms, problem.measure(), sgd)
    assert 5 < flow.regime.horizon < 100
    forecast = flow.forecast([0, 1, 5], errors=False)
    assert forecast.valid == (True, False, False)
    assert "* not valid: NOT VALID as a drift" in str(forecast)


@pytest.mark.parametrize(("make", "assumed"), [(linear, True), (mlp, False)])
def test_matrix_families_alone_assume_that_noise_and_curvature_commute(make, assumed) -> None:
    """It is said of what SGD's noise settles, in flow and equilibrium; not of other points, nor of tori."""
    problem = make((4, 3, 2), samples=40)
    moments, sgd = problem.measure(), whole(40)
    flow = nf.noether_flow(problem.model, problem.syms, moments, sgd)
    eq = nf.noise_equilibrium(problem.model, problem.syms, moments, sgd)
    other = nf.noise_equilibrium(problem.model, problem.syms, moments, objective="norm")
    for shown in (flow.describe(), eq.describe(), *eq.to_dict()["assumptions"][:1]):
        assert ("noise and curvature commute" in shown) == assumed
    assert bool(eq.assumptions) == assumed
    assert other.assumptions == ()
