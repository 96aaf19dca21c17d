"""Theory twice: closed forms against find_symmetries -> gradient_moments -> noise_equilibrium."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from noetherflow import SGDConfig
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiments import rates
from noetherflow_paper.experiments.rates import RatesSetting
from noetherflow_paper.generic import (
    LinearChain,
    chain_charges,
    closed_form_gaps,
    generic_charges,
    generic_equilibrium,
    largest_gap,
    measured,
    product_design,
)
from noetherflow_paper.theory import balance, charge_drift, fall_time, finite_step_gammas, orbit_flow, stretched

F64 = torch.float64


def task(seed, dx=4, dy=3):
    rng = torch.Generator().manual_seed(seed)

    def spd(n):
        a = torch.randn(n, n, dtype=F64, generator=rng)
        return a @ a.T / n + 0.3 * torch.eye(n, dtype=F64)

    return torch.randn(dy, dx, dtype=F64, generator=rng), spd(dx), spd(dy)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_generic_machinery_finds_the_closed_form(depth):
    v, sx, se = task(depth)
    x, y = product_design(v, sx, se)
    start = cf.deep_linear(v, torch.eye(4, dtype=F64), torch.eye(3, dtype=F64), depth)
    exact = cf.deep_linear(v, sx, se, depth)
    found = generic_equilibrium(start, x, y, SGDConfig(0.01, 8))
    assert torch.allclose(LinearChain(found)(x), x @ v.T, atol=1e-9)
    for a, b, s in zip(found, exact, start, strict=True):
        assert abs(a.norm() / b.norm() - 1) < 1e-8
        assert abs(s.norm() / b.norm() - 1) > 1e-3
    assert torch.allclose(found[0].T @ found[0], exact[0].T @ exact[0], rtol=1e-7, atol=1e-9)


def test_product_design_has_exactly_the_noise_matrices_of_theory_8():
    v, sx, se = task(9)
    x, y = product_design(v, sx, se)
    r = y - x @ v.T
    gam_u, gam_w = cf.noise_matrices(sx, se)
    assert torch.allclose((x.square().sum(1)[:, None, None] * r[:, :, None] * r[:, None, :]).mean(0), gam_u)
    assert torch.allclose((r.square().sum(1)[:, None, None] * x[:, :, None] * x[:, None, :]).mean(0), gam_w)


@pytest.mark.parametrize("batch", [10, 1000])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_design_is_the_population_whatever_the_batch_size(batch, scale):
    v, sx, se = task(5)
    x, y = product_design(v, sx, se)
    u, w = cf.norm_balanced(v)
    found = measured([w, u], x, y, scale)
    (symmetry,) = found.syms
    sgd = SGDConfig(0.01, batch)
    drive = sgd.lr**2 * symmetry.combine(found.moments.batch_grams(symmetry, sgd))[0]
    exact = charge_drift(u, w, cf.noise_matrices(sx, se), sgd, scale)
    assert torch.allclose(drive, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_generic_charges_follow_the_closed_form_flow(momentum):
    v, sx, se = task(6)
    x, y = product_design(v, sx, se)
    u, w = (factor * m for factor, m in zip((1.5, 1 / 1.5), cf.norm_balanced(v), strict=True))
    sgd = SGDConfig(0.02 * (1 - momentum), 8, momentum=momentum)
    at = [0, 50, 200, 1000]
    closed = chain_charges(*orbit_flow(u, w, cf.noise_matrices(sx, se), sgd, at))
    generic = generic_charges([w, u], x, y, sgd, at)
    assert largest_gap(generic, closed) < 1e-3
    assert largest_gap(generic[-1], generic[0]) > 0.1


def test_chain_with_relu_between():
    rng = torch.Generator().manual_seed(1)
    w, u = torch.randn(5, 4, dtype=F64, generator=rng), torch.randn(3, 5, dtype=F64, generator=rng)
    x = torch.randn(6, 4, dtype=F64, generator=rng)
    assert torch.equal(LinearChain([w, u], relu=True)(x), torch.relu(x @ w.T) @ u.T)


@pytest.mark.parametrize(
    "setting", [RatesSetting(lr=0.02, batch=8, noise=1.0), RatesSetting(lr=0.01, batch=32, noise=2.0)]
)
def test_scalar_rate_is_the_one_dimensional_case_of_the_matrix_flow(setting):
    one = torch.ones(1, 1, dtype=F64)
    sgd = SGDConfig(setting.lr, setting.batch)
    at = np.array([0, 500, 2000])
    gammas = finite_step_gammas(one, setting.noise**2 * one, sgd)
    us, ws = orbit_flow(1.5 * one, one / 1.5, gammas, sgd, at.tolist())
    matrix = [float(u**2 - w**2) for u, w in zip(us, ws, strict=True)]
    assert np.allclose(rates.predicted_curve(replace(rates.SCALES["quick"], start=1.5), setting, at), matrix, rtol=1e-3)


@pytest.mark.parametrize("step", [1.0, 0.25])
def test_scalar_rate_against_sampled_steps(step):
    """`4 lr^2 E[g_B^2]` of `dl/d(uw)` where `E' = E - step k (x2 E - xe)` has been run to stationarity."""
    lr, batch, noise, k = 0.02, 4, 1.5, 0.02 * 2 * 2.5
    rng = np.random.default_rng(0)
    e, squares = np.zeros(4000), []
    substeps = round(1 / step)
    for i in range(400):
        x, eps = rng.normal(size=(2, 4000, batch))
        sample = x * (e[:, None] * x - noise * eps)
        mean, spread = e, sample.mean(1) - e
        applied = step * mean + np.sqrt(step) * spread
        e = e - k * applied
        if i >= 200:
            squares.append(substeps * (applied**2).mean())
    expected = rates.rate(RatesSetting(lr=lr, batch=batch, noise=noise), 1.5, step)
    assert 4 * lr**2 * np.mean(squares) == pytest.approx(expected, rel=0.01)


def test_fall_time_and_balance():
    steps = np.arange(0, 1001, 50)
    assert fall_time(steps, 3 * np.exp(-steps / 222), np.exp(-1)) == pytest.approx(222)
    bumpy = np.array([1.0, 0.4, 0.6, 0.1])
    assert 0 < fall_time(np.array([0, 1, 2, 3]), bumpy, 0.5) < 1
    assert np.isnan(fall_time(steps, np.ones(21), 0.5))
    u, w = stretched(torch.eye(3, dtype=F64), 2.0)
    found = balance([w, u])
    assert float(found["ratio"]) == pytest.approx(np.log(16))
    assert float(found["charge"]) == pytest.approx(3 / 4 - 12)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_generic_ratio_and_hessian_trace_are_the_closed_forms(decay):
    v, sx, se = task(7, dx=3, dy=3)
    assert np.abs(closed_form_gaps(v, sx, se, SGDConfig(0.02, 10, decay), 0.5)).max() < 1e-8
