"""The batched simulator against torch.optim, one replica at a time, and against sampling."""

import math

import pytest
import torch

from noetherflow import SGDConfig
from noetherflow.errors import DataError
from noetherflow_paper import closed_form as cf
from noetherflow_paper.simulate import (
    LinearNet,
    Network,
    checkpoints,
    from_data,
    normal,
    reduced_width,
    simulate,
    squared_distance,
    wishart_factor,
)
from noetherflow_paper.theory import charge_drift, finite_step_gammas, orbit_flow

F64 = torch.float64


def covariances(rng, d, n=1):
    a = normal((n, d, d), rng)
    return a @ a.mT / d + 0.3 * torch.eye(d, dtype=F64)


def linear_problem(seed=0, replicas=3, batch=8, dx=4, dy=3, width=5):
    rng = torch.Generator().manual_seed(seed)
    net = LinearNet.of(normal((dy, dx), rng), covariances(rng, dx, replicas), covariances(rng, dy), batch, 0.5)
    return net, [0.5 * normal((replicas, width, dx), rng), 0.5 * normal((replicas, dy, width), rng)], rng


def two_layer_forward(params, x):
    return torch.relu(x @ params[0].mT) @ params[1].mT


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        ({}, lambda p, lr: torch.optim.SGD(p, lr)),
        ({"momentum": 0.9, "weight_decay": 0.1}, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1)),
        ({"adam": (0.9, 0.99)}, lambda p, lr: torch.optim.Adam(p, lr, betas=(0.9, 0.99))),
    ],
)
def test_every_replica_follows_torch_optim(ours, torchs):
    rng = torch.Generator().manual_seed(3)
    x, y = normal((1, 12, 4), rng), normal((1, 12, 2), rng)
    start = [normal((2, 5, 4), rng), normal((2, 2, 5), rng)]
    problem = Network(two_layer_forward, squared_distance, from_data(x[0], y[0]), (x, y), 12)
    rates = torch.tensor([0.01, 0.03], dtype=F64)
    run = simulate(problem, start, 20, rates, rng, lambda p: {"norm": p[0].norm(dim=(1, 2))}, at=4, method="gd", **ours)
    for r in range(2):
        params = [p[r].clone().requires_grad_() for p in start]
        optimiser = torchs(params, float(rates[r]))
        for _ in range(20):
            optimiser.zero_grad()
            squared_distance(two_layer_forward(params, x[0]), y[0]).mean().backward()
            optimiser.step()
        for mine, theirs in zip(run.params, params, strict=True):
            assert torch.allclose(mine[r], theirs, rtol=1e-10, atol=1e-12)
        assert math.isclose(float(run.records["norm"][-1, r]), float(params[0].detach().norm()), rel_tol=1e-10)
    assert run.steps == [0, 5, 10, 15, 20]
    assert not torch.equal(run.params[0], start[0])


def test_linear_mean_gradient_matches_autograd():
    net, params, _ = linear_problem()
    leaves = [p.clone().requires_grad_() for p in params]
    e = leaves[1] @ leaves[0] - net.product
    loss = 0.5 * cf.trace(e @ (net.root_x @ net.root_x.mT) @ e.mT).sum()
    for mine, theirs in zip(net.mean_gradient(params), torch.autograd.grad(loss, leaves), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10)


@pytest.mark.parametrize("batch", [2, 9])
@pytest.mark.parametrize("method", ["minibatch", "gaussian"])
def test_linear_minibatch_moments_match_theory(batch, method):
    """Row Grams of E[g_B g_B^T] against theory 8 with Isserlis' terms, both below and above S = d_x."""
    net, params, rng = linear_problem(replicas=1, batch=batch)
    n = 30_000
    many = [p.expand(n, -1, -1) for p in params]
    draw = net.minibatch_gradient if method == "minibatch" else net.gaussian_noise
    w, u = params[0][0], params[1][0]
    sx, se = (r[0] @ r[0].mT for r in (net.root_x, net.root_eps))
    gu, gw = cf.noise_matrices(sx, se, u @ w - net.product[0])
    means = net.mean_gradient(params)
    grads = draw(many, rng)
    exact_w = u.mT @ gu @ u / batch  # c = 1/2: 4 c^2 = 1
    exact_u = w @ gw @ w.mT / batch
    for g, mean, exact, rows in ((grads[0], means[0], exact_w, True), (grads[1], means[1], exact_u, False)):
        gram = g @ g.mT if rows else g.mT @ g
        gbar = mean[0] @ mean[0].mT if rows else mean[0].mT @ mean[0]
        expected = exact + gbar * (1 - 1 / batch) if method == "minibatch" else exact - gbar / batch
        z = (gram.mean(0) - expected) / (gram.std(0) / math.sqrt(n))
        assert z.abs().max() < 4.5
        wrong = (gram.mean(0) - 1.15 * expected) / (gram.std(0) / math.sqrt(n))
        assert wrong.abs().max() > 6


def test_wishart_factor_has_the_right_moments():
    rng = torch.Generator().manual_seed(0)
    t = wishart_factor(40_000, 3, 5, rng)
    gram = t @ t.mT
    z = (gram.mean(0) - 5 * torch.eye(3, dtype=F64)) / (gram.std(0) / 200)
    assert z.abs().max() < 4.5
    squared = gram @ gram
    expected = 5 * (5 + 3 + 1) * torch.eye(3, dtype=F64)
    assert ((squared.mean(0) - expected) / (squared.std(0) / 200)).abs().max() < 4.5


def test_replicas_do_not_touch_each_other_and_divergence_is_reported():
    net, params, rng = linear_problem(replicas=2)
    rates = torch.tensor([0.02, 50.0], dtype=F64)
    run = simulate(net, params, 60, rates, rng)
    assert run.diverged.tolist() == [False, True]
    assert run.params[0][0].isfinite().all()


def test_step_dependent_rate_and_on_step():
    net, params, rng = linear_problem(replicas=1)
    seen = []
    simulate(
        net, params, 3, lambda t: 0.0 if t < 2 else 0.1, rng, on_step=lambda t, p, u: seen.append(float(u[0].norm()))
    )
    assert seen[0] == seen[1] == 0.0 < seen[2]
    with pytest.raises(DataError, match="method"):
        simulate(net, params, 1, 0.1, rng, method="sgdd")
    with pytest.raises(DataError, match="SDE"):
        simulate(net, params, 1, 0.1, rng, method="sde", momentum=0.9)


def test_sde_and_sgd_drive_the_charge_alike_and_gd_does_not():
    rng = torch.Generator().manual_seed(5)
    d, n, lr, batch = 3, 1500, 0.01, 6
    eye = torch.eye(d, dtype=F64)
    net = LinearNet.of(eye, eye, eye, batch)
    start = [0.5 * eye.expand(n, -1, -1), 2 * eye.expand(n, -1, -1)]
    sgd = SGDConfig(lr, batch)
    gammas = cf.noise_matrices(eye, eye)
    us, ws = orbit_flow(start[1][:1], start[0][:1], gammas, sgd, [60])
    predicted = float(cf.trace(ws[0] @ ws[0].mT - us[0].mT @ us[0])[0])
    before = 3 * (0.25 - 4)
    for method in ("sgd", "sde"):
        run = simulate(net, start, 60, lr, rng, method=method)
        charge = cf.trace(run.params[0] @ run.params[0].mT - run.params[1].mT @ run.params[1])
        mean, error = charge.mean(), charge.std() / n**0.5
        assert abs(mean - predicted) < 3 * error + 0.12 * abs(predicted - before)
        assert abs(mean - before) > 0.5 * abs(predicted - before)
    still = simulate(net, start, 60, lr, rng, method="gd").params
    assert torch.allclose(cf.trace(still[0] @ still[0].mT - still[1].mT @ still[1]), torch.tensor(before, dtype=F64))


def test_orbit_flow_keeps_the_product_and_ends_at_the_closed_form():
    rng = torch.Generator().manual_seed(2)
    v, (sx, se) = normal((3, 3), rng), (covariances(rng, 3)[0] for _ in range(2))
    sgd = SGDConfig(0.2, 4, weight_decay=0.001)
    gammas = cf.noise_matrices(sx, se)
    u, w = cf.norm_balanced(v)
    us, ws = orbit_flow(2 * u, w / 2, gammas, sgd, [0, 4000])
    assert torch.equal(us[0], 2 * u)
    assert torch.allclose(us[1] @ ws[1], v, atol=1e-10)
    end_u, end_w = cf.two_layer(v, *cf.with_decay(gammas, sgd))
    assert torch.allclose(us[1] @ us[1].mT, end_u @ end_u.mT, atol=1e-6)
    assert charge_drift(end_u, end_w, gammas, sgd).norm() < 1e-12
    assert charge_drift(2 * u, w / 2, gammas, sgd).norm() > 1e-3


def test_reduced_width_changes_nothing():
    rng = torch.Generator().manual_seed(1)
    net, _, _ = linear_problem(replicas=1)
    wide = [0.1 * normal((1, 50, 4), rng), 0.1 * normal((1, 3, 50), rng)]
    u, w = reduced_width(wide[1], wide[0])
    assert u.shape == (1, 3, 7)
    runs = [
        simulate(net, p, 30, 0.05, torch.Generator().manual_seed(9), weight_decay=0.1).params for p in (wide, [w, u])
    ]
    for a, b in zip(*runs, strict=True):
        assert torch.allclose(a.norm(), b.norm(), rtol=1e-12)
    assert torch.allclose(runs[0][1] @ runs[0][0], runs[1][1] @ runs[1][0], atol=1e-12)
    assert reduced_width(u, w)[0] is u


def test_checkpoints_include_both_ends():
    assert checkpoints(10, 3) == [0, 3, 6, 9, 10]
    assert checkpoints(4, 100) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("isotropic", [True, False])
def test_finite_step_gammas_match_the_stationary_second_moments(isotropic):
    """R_B in the stationary state of the linearised error dynamics at fixed (U, W)."""
    rng = torch.Generator().manual_seed(4)
    d, n, lr, batch = 3, 4000, 0.04, 10
    eye = torch.eye(d, dtype=F64)
    sx = eye if isotropic else torch.diag(torch.tensor([0.4, 1.0, 1.5], dtype=F64))
    se, a = covariances(rng, d)[0], covariances(rng, d)[0]
    b = covariances(rng, d)[0] if isotropic else torch.diag(torch.tensor([1.2, 0.5, 0.9], dtype=F64))
    u, w = torch.linalg.cholesky(a), torch.linalg.cholesky(b).mT
    error, root = torch.zeros(n, d, d, dtype=F64), torch.linalg.cholesky(se)
    for _ in range(400):
        noise = root @ normal((n, d, d), rng) @ sx.sqrt() / math.sqrt(batch)
        g = 2 * (error @ sx - noise)
        error = error - lr * (u @ u.mT @ g + g @ w.mT @ w)
    gammas = finite_step_gammas(sx, se, SGDConfig(lr, batch))(u, w)
    with_error = [torch.stack(parts) for parts in zip(*(cf.noise_matrices(sx, se, e) for e in error), strict=True)]
    mean_parts = (error @ sx @ sx @ error.mT, sx @ error.mT @ error @ sx)
    for exact, at_error, mean, plain_ in zip(gammas, with_error, mean_parts, cf.noise_matrices(sx, se), strict=True):
        sample = at_error + (batch - 1) * mean
        z = (sample.mean(0) - exact) / (sample.std(0) / math.sqrt(n))
        assert z.abs().max() < 4.5
        assert (exact - plain_).norm() > 0.05 * plain_.norm()
