"""Adam's flow where `v` follows the fluctuations: drifts, equilibria and forecasts tell one story, and a simulation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.errors import DataError
from test_adaptive_feedback import brute_feedback, chunks, product_net, squared

Case = tuple[nn.Sequential, nf.SymmetrySet, nf.GradientMoments, nf.AdamConfig, nf.SquareFeedback]


def adam_at(lr: float, samples: int, speed: float = 5.0) -> nf.AdamConfig:
    """`(1 - b2) / lr` of 5 is b2 = 0.95 at lr 0.01."""
    return nf.AdamConfig(lr, 8, (0.0, 1 - speed * lr), eps=0.0, dataset_size=samples, replacement=True)


def measured(net: nn.Sequential, batch: tuple[Tensor, Tensor], adam: nf.AdamConfig) -> Case:
    syms = nf.declare(net, "scalar", [("0.weight", 0)], [("1.weight", 0)])
    moments = nf.gradient_moments(net, squared, [batch], syms, entries=True)
    feedback = nf.square_feedback(net, squared, [batch], syms, adam, samples=4_000)
    return net, syms, moments, adam, feedback


def product_case(start: float, lr: float, d: int = 4, samples: int = 1_000) -> tuple[tuple[Tensor, Tensor], Case]:
    """The worked example at `|w| / |u| = start`."""
    net, batch = product_net(d, samples)
    with torch.no_grad():
        net[0].weight.mul_(math.sqrt(start))
        net[1].weight.div_(math.sqrt(start))
    return batch, measured(net, batch, adam_at(lr, samples))


def flow_of(case: Case, counted: bool = True) -> nf.Flow:
    net, syms, moments, adam, feedback = case
    return nf.noether_flow(net, syms, moments, adam, feedback=feedback if counted else None)


def test_the_part_of_the_drift_equals_brute_force() -> None:
    batch, case = product_case(2.0, 1e-3, d=3)
    flow, adam = flow_of(case).details[0], case[3]
    by_entry = brute_feedback(case[0], batch, adam)
    expected = adam.lr * (by_entry[:3].sum() - by_entry[3:].sum())
    assert flow.feedback is not None
    assert float(flow.feedback) == pytest.approx(float(expected), rel=0.01)
    assert float(flow.drift) == pytest.approx(float(flow.noise + flow.step_size + flow.feedback), rel=1e-12)


def test_the_drift_stops_at_the_equilibrium_with_feedback_and_not_at_the_frozen_one() -> None:
    batch, case = product_case(2.0, 1e-3)
    net, syms, moments, adam, feedback = case
    name = syms[0].name
    for given, stops in ((feedback, True), (None, False)):
        element = nf.noise_equilibrium(net, syms, moments, adam, feedback=given)[name].element
        moved = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        with torch.no_grad():
            moved[0].weight.copy_(net[0].weight * element)
            moved[1].weight.copy_(net[1].weight / element)
        there = flow_of(measured(moved, batch, adam)).details[0]
        assert (float(there.imbalance) < 2e-3) is stops
        assert (abs(float(there.drift)) < 2e-3 * abs(float(there.noise)) + 1e-2 * abs(float(there.feedback))) is stops  # type: ignore[arg-type]


def test_equilibrium_and_imbalance_of_the_flow_are_those_of_the_solver() -> None:
    _, case = product_case(12.0, 1e-3)
    net, syms, moments, adam, feedback = case
    solved = nf.noise_equilibrium(net, syms, moments, adam, feedback=feedback)
    flow = flow_of(case).details[0]
    torch.testing.assert_close(flow.equilibrium, solved[syms[0].name].charge, rtol=1e-8, atol=0.0)
    assert float(flow.imbalance) == pytest.approx(solved.imbalance_now, rel=1e-12)
    slow = flow_of(case, counted=False).details[0]
    assert float(slow.imbalance) == pytest.approx(0.5, rel=1e-3)  # (3 - 1) / (3 + 1): |w| = 3 times where it settles
    assert float(flow.imbalance) < 0.25


def test_forecast_starts_with_the_drift_and_ends_at_the_equilibrium() -> None:
    _, case = product_case(2.0, 1e-3)
    net, syms, moments, adam, feedback = case
    name, flow = syms[0].name, flow_of(case)
    row, end = flow.details[0], nf.noise_equilibrium(net, syms, moments, adam, feedback=feedback)[name].charge
    life = float(row.relaxation_steps)
    charges = flow.forecast([0, 20 * round(life)], errors=False).charges[name].flatten()
    assert float(charges[1]) == pytest.approx(float(end), rel=1e-4)
    frozen = flow_of(case, counted=False).forecast([0, 20 * round(life)], errors=False).charges[name].flatten()
    assert abs(float(frozen[1] - end)) > 0.2 * abs(float(end))
    # the charge moves by weights and by v, which follows them: together as d C_P / d lam along the orbit
    # at frozen v the charge changes by the drift; v, which follows the weights, takes half of that back
    early = flow.forecast([0, round(life / 100)], errors=False).charges[name].flatten()
    assert float(early[1] - early[0]) == pytest.approx(float(row.drift) / 2 * round(life / 100), rel=0.03)


def test_a_small_deviation_lives_as_long_as_the_flow_says() -> None:
    batch, case = product_case(2.0, 1e-3)
    net, syms, moments, adam, feedback = case
    name = syms[0].name
    element = nf.noise_equilibrium(net, syms, moments, adam, feedback=feedback)[name].element * math.exp(0.01)
    with torch.no_grad():
        net[0].weight.mul_(element)
        net[1].weight.div_(element)
    flow = flow_of(measured(net, batch, adam))
    row = flow.details[0]
    life = round(float(row.relaxation_steps))
    now, later = flow.forecast([0, life], errors=False).charges[name].flatten()
    assert float((later - row.equilibrium) / (now - row.equilibrium)) == pytest.approx(math.exp(-1), rel=0.03)
    assert abs(life / float(flow_of(measured(net, batch, adam), counted=False).details[0].relaxation_steps) - 1) > 0.1


def test_symmetries_held_apart_do_not_see_each_other_move() -> None:
    """Not joint: each symmetry's equilibrium with feedback is what it is alone, though the other one would move too."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.5]]))
        net[1].weight.fill_(0.8)
        net[2].weight.fill_(1.25)
    x = torch.randn(1_000, 2, dtype=torch.float64)
    x, signs = torch.cat([x, x]), torch.cat([torch.ones(1_000, 1), -torch.ones(1_000, 1)]).double()
    batch, adam = (x, net(x).detach() + signs), nf.AdamConfig(1e-3, 8, (0.9, 0.99), eps=0.0)
    first = nf.declare(net, "scalar", [("0.weight", 0)], [("1.weight", 0)])
    second = nf.declare(net, "scalar", [("1.weight", 0)], [("2.weight", 0)])
    both = nf.SymmetrySet((first[0], second[0]), shapes=first.shapes)
    moments = nf.gradient_moments(net, squared, [batch], both, entries=True)
    feedback = nf.square_feedback(net, squared, [batch], both, adam)
    apart = nf.noise_equilibrium(net, both, moments, adam, feedback=feedback, joint=False)
    alone = nf.noise_equilibrium(net, first, moments, adam, feedback=feedback)
    together = nf.noise_equilibrium(net, both, moments, adam, feedback=feedback)
    name = first[0].name
    assert (apart.converged, alone.converged) == (True, True)
    torch.testing.assert_close(apart[name].element, alone[name].element, rtol=1e-6, atol=0.0)
    assert abs(float((together[name].element / alone[name].element).log())) > 1e-3


def test_errors_of_forecasts_are_around_the_forecast_with_feedback() -> None:
    net, batch = product_net(3, 1_000)
    adam = nf.AdamConfig(1e-3, 8, (0.0, 0.995), eps=0.0)
    syms = nf.declare(net, "scalar", [("0.weight", 0)], [("1.weight", 0)])
    moments = nf.gradient_moments(net, squared, chunks(batch), syms, entries=True)
    feedback = nf.square_feedback(net, squared, [batch], syms, adam)
    flow = nf.noether_flow(net, syms, moments, adam, feedback=feedback)
    found, plain = flow.forecast([0, 500_000]), flow.forecast([0, 500_000], errors=False)
    name = syms[0].name
    low, high = found.interval(name)
    torch.testing.assert_close(found.charges[name], plain.charges[name])
    assert float(low[1]) < float(found.charges[name][1]) < float(high[1])
    without = nf.noether_flow(net, syms, moments, adam).forecast([0, 500_000], errors=False).charges[name]
    assert not float(low[1]) < float(without[1]) < float(high[1])


def test_what_is_printed_and_stored() -> None:
    _, case = product_case(2.0, 1e-3)
    flow, plain = flow_of(case), flow_of(case, counted=False)
    row, own = flow.to_dict()["symmetries"][0], flow.details[0].feedback
    assert own is not None
    assert row["feedback"] == own.tolist()
    assert flow.rows()[0]["feedback"] == pytest.approx(float(own.abs()))
    assert "feedback of v" in str(flow)
    assert "kap from" in flow.describe(verbose=True)
    for said in (str(plain), plain.to_dict()["symmetries"][0], plain.rows()[0]):
        assert "feedback" not in said


def test_a_feedback_of_something_else_is_refused() -> None:
    net, syms, moments, adam, feedback = product_case(2.0, 1e-3, d=3)[1]
    with pytest.raises(DataError, match="measured for"):
        nf.noether_flow(net, syms, moments, replace(adam, lr=2e-3), feedback=feedback)
    with pytest.raises(DataError, match="average of squares"):
        nf.noether_flow(net, syms, moments, nf.SGDConfig(1e-3, 8), feedback=feedback)
    optimizer: Any = torch.optim.Adam(net.parameters())
    with pytest.raises(DataError, match="not with optimizer"):
        nf.noether_flow(net, syms, optimizer=optimizer, feedback=feedback)  # type: ignore[call-overload]
    with torch.no_grad():
        net[0].weight.mul_(2)
        net[1].weight.div_(2)
    moments = nf.gradient_moments(net, squared, [product_net(3, 1_000)[1]], syms, entries=True)
    with pytest.raises(DataError, match="other weights"):
        nf.noether_flow(net, syms, moments, adam, feedback=feedback)


def simulated_drift(lr: float, start: float, copies: int, d: int = 4, speed: float = 5.0) -> np.ndarray:
    """Mean change per step of `C_P` at the preconditioner of the start, over `lr^2`, in copies of Adam's run on
    `y = u (w . x) + noise` with fresh data, after a burn-in. What a step does at first order is averaged over its
    batch: `v` is that of the steps before, and the expected gradient is known.
    """
    rng, size, b2 = np.random.default_rng(round(1e6 * lr)), 8, 1 - speed * lr
    w, u = np.zeros((copies, d)), np.full(copies, 1 / math.sqrt(start))
    w[:, 0] = math.sqrt(start)
    s = 2 / math.sqrt(size) * np.array([1 / math.sqrt(start), math.sqrt(start)])
    v = [np.full((copies, d), s[0] ** 2), np.full(copies, s[1] ** 2)]
    total, burn, steps = np.zeros(copies), round(4 / lr), round(4 / lr)
    for step in range(burn + steps):
        x, noise = rng.standard_normal((copies, size, d)), rng.standard_normal((copies, size))
        hidden = np.einsum("csd,cd->cs", x, w)
        residual = 2 * (u[:, None] * hidden - x[:, :, 0] - noise) / size
        g = (u[:, None] * np.einsum("cs,csd->cd", residual, x), (residual * hidden).sum(1))
        miss = 2 * (u[:, None] * w - np.eye(d)[0])
        means = (u[:, None] * miss, (miss * w).sum(1))
        first = s[0] * (w * means[0] / np.sqrt(v[0])).sum(1) - s[1] * u * means[1] / np.sqrt(v[1])
        v = [b2 * old + (1 - b2) * one**2 for old, one in zip(v, g, strict=True)]
        moved = [one / np.sqrt(new) for one, new in zip(g, v, strict=True)]
        if step >= burn:
            total += s[0] * (moved[0] ** 2).sum(1) - s[1] * moved[1] ** 2 - 2 * first / lr
        w, u = w - lr * moved[0], u - lr * moved[1]
    return total / steps


@pytest.mark.slow
@pytest.mark.parametrize("start", [2.0, 12.0])
def test_the_drift_at_b2_of_095_against_a_simulation(start: float) -> None:
    """The flow on both sides of the equilibrium (5.87; 4 for a slow `v`), lr 0.002 and 0.001 extrapolated to 0 at the
    same `(1 - b2) / lr`.
    """
    coarse, fine = simulated_drift(0.002, start, 1_500), simulated_drift(0.001, start, 1_500)
    limit = 2 * fine.mean() - coarse.mean()
    error = math.hypot(2 * fine.std(ddof=1), coarse.std(ddof=1)) / math.sqrt(len(fine))
    _, case = product_case(start, 1e-5, samples=4_000)
    predicted, frozen = (float(flow_of(case, c).details[0].drift) / 1e-10 for c in (True, False))
    means = [f"{x:.4f}" for x in (coarse.mean(), fine.mean(), limit)]
    print(f"start {start}: predicted {predicted:.4f}, slow v {frozen:.4f}, simulated {means} +- {error:.4f}")
    assert abs(limit - predicted) < 3 * error
    assert abs(limit - frozen) > 10 * error
