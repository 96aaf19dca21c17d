"""closed_form.py against stationarity, brute-force minimisation over the orbit, sampling and autograd."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from noetherflow import SGDConfig
from noetherflow_paper import closed_form as cf

F64 = torch.float64


def spd_matrix(n, rng, spread=1.0):
    a = torch.randn(n, n, dtype=F64, generator=rng)
    q, _ = torch.linalg.qr(a)
    return q @ torch.diag(torch.exp(spread * torch.randn(n, dtype=F64, generator=rng))) @ q.T


def problem(seed, dx=4, dy=3):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(dy, dx, dtype=F64, generator=rng), spd_matrix(dx, rng), spd_matrix(dy, rng), rng


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5), st.floats(0, 0.1))
def test_two_layer_is_stationary_and_keeps_the_product(seed, dx, dy, decay):
    v, sx, se, rng = problem(seed, dx, dy)
    sgd = SGDConfig(lr=0.05, batch_size=7, weight_decay=decay)
    gu, gw = cf.with_decay(cf.noise_matrices(sx, se), sgd)
    k = min(dx, dy)
    frame = torch.linalg.qr(torch.randn(k + 2, k, dtype=F64, generator=rng)).Q.T
    for u, w in (cf.two_layer(v, gu, gw), cf.two_layer(v, gu, gw, frame=frame), cf.two_layer(v, gu, gw, width=k + 1)):
        scale = (w @ gw @ w.mT).norm()
        assert (u @ w - v).norm() < 1e-12 * max(1, v.norm())
        assert cf.two_layer_residual(u, w, gu, gw).norm() < 1e-12 * scale
    with pytest.raises(ValueError, match="width"):
        cf.two_layer(v, gu, gw, width=k - 1)


def test_two_layer_minimises_phi_over_the_orbit():
    """Brute force: minimise `w~ |theta|^2 + (eta/2) E|g_B|^2` over G in GL(3) numerically."""
    v, sx, se, rng = problem(3, 3, 3)
    sgd = SGDConfig(lr=0.03, batch_size=5, weight_decay=0.02)
    gammas = cf.noise_matrices(sx, se)
    u0, w0 = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=rng)).Q, None
    w0 = torch.linalg.solve(u0, v)
    decay = sgd.weight_decay * (1 - sgd.lr * sgd.weight_decay / 2)

    def phi(g):
        u, w = u0 @ torch.linalg.inv(g), g @ w0
        noise = 4 * (cf.trace(u.T @ gammas[0] @ u) + cf.trace(w @ gammas[1] @ w.T)) / sgd.batch_size
        return decay * (u.square().sum() + w.square().sum()) + sgd.lr / 2 * noise

    def value_and_gradient(flat):
        g = torch.tensor(flat, dtype=F64).reshape(3, 3).requires_grad_()
        value = phi(g)
        value.backward()
        return float(value.detach()), g.grad.reshape(-1).numpy()

    found = minimize(
        value_and_gradient, torch.eye(3).reshape(-1).numpy(), jac=True, tol=1e-14, options={"maxiter": 2000}
    )
    g = torch.tensor(found.x, dtype=F64).reshape(3, 3)
    _, w = cf.two_layer(v, *cf.with_decay(gammas, sgd))
    assert torch.allclose((g @ w0).T @ (g @ w0), w.T @ w, rtol=1e-4, atol=1e-5)
    undecayed = cf.two_layer(v, *gammas)
    assert not torch.allclose(undecayed[1].T @ undecayed[1], w.T @ w, rtol=1e-2)


def test_noise_matrices_match_sampling():
    _, sx, se, rng = problem(5)
    error = 0.3 * torch.randn(3, 4, dtype=F64, generator=rng)
    n = 400_000
    x = torch.randn(n, 4, dtype=F64, generator=rng) @ torch.linalg.cholesky(sx).T
    r = x @ error.T - torch.randn(n, 3, dtype=F64, generator=rng) @ torch.linalg.cholesky(se).T
    for exact, (weight, z) in zip(cf.noise_matrices(sx, se, error), [(x, r), (r, x)], strict=True):
        per_sample = torch.einsum("n,ni,nj->nij", weight.square().sum(1), z, z)
        z_score = (per_sample.mean(0) - exact) / (per_sample.std(0) / math.sqrt(n))
        assert z_score.abs().max() < 4.5
        without = cf.noise_matrices(sx, se)[0 if z is r else 1]
        assert ((per_sample.mean(0) - without) / (per_sample.std(0) / math.sqrt(n))).abs().max() > 10


@pytest.mark.parametrize("loss_scale", [1.0, 0.5, 1 / 3])
def test_hessian_trace_matches_autograd(loss_scale):
    v, sx, se, rng = problem(8)
    u, w = torch.randn(3, 2, dtype=F64, generator=rng), torch.randn(2, 4, dtype=F64, generator=rng)

    def population_loss(u, w):
        e = u @ w - v
        return loss_scale * (cf.trace(e @ sx @ e.T) + cf.trace(se))

    hessian = torch.autograd.functional.hessian(population_loss, (u, w))
    exact = hessian[0][0].reshape(6, 6).trace() + hessian[1][1].reshape(8, 8).trace()
    assert torch.allclose(cf.two_layer_hessian_trace(u, w, sx, loss_scale), exact, rtol=1e-12)


@pytest.mark.parametrize("phi", [0.1, 0.5, 1.0, 1.7])
def test_identity_task(phi):
    d = 100
    sx, eye = cf.identity_covariance(phi, d), torch.eye(d, dtype=F64)
    u, w = cf.two_layer(eye, *cf.noise_matrices(sx, eye))
    assert math.isclose(float(u.square().sum() / w.square().sum()), cf.identity_norm_ratio(phi), rel_tol=1e-12)
    trace = float(cf.two_layer_hessian_trace(u, w, sx, 0.5))
    assert math.isclose(trace, cf.identity_hessian_trace(phi, d), rel_tol=1e-12)
    balanced = float(cf.two_layer_hessian_trace(*cf.norm_balanced(eye), sx, 0.5))
    assert math.isclose(balanced, 2 * d**2, rel_tol=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(2, 5), st.integers(2, 5))
def test_deep_linear_is_stationary(seed, depth, dx, dy):
    v, sx, se, _ = problem(seed, dx, dy)
    for width in (None, max(dx, dy) + 1):
        layers = cf.deep_linear(v, sx, se, depth, width)
        product = cf.prefix_products([*layers, torch.eye(dy, dtype=F64)])[0][-1]
        assert (product - v).norm() < 1e-11 * v.norm()
        grams = cf.gradient_grams(layers, sx, se)
        for residual, (rows, _) in zip(cf.deep_linear_residuals(layers, sx, se), grams[:-1], strict=True):
            assert residual.norm() < 1e-11 * rows.norm()


def test_deep_linear_agrees_with_two_layer_and_minimises_the_noise():
    v, sx, se, rng = problem(11, 3, 3)
    u, w = cf.two_layer(v, *cf.noise_matrices(sx, se))
    first, last = cf.deep_linear(v, sx, se, 2)
    assert torch.allclose(first.T @ first, w.T @ w, rtol=1e-10)
    assert torch.allclose(last @ last.T, u @ u.T, rtol=1e-10)
    layers = cf.deep_linear(v, sx, se, 4)
    best = cf.noise_trace(layers, sx, se)
    for _ in range(20):
        moved = list(layers)
        for i in range(3):
            g = torch.linalg.matrix_exp(0.2 * torch.randn(3, 3, dtype=F64, generator=rng))
            moved[i], moved[i + 1] = g @ moved[i], moved[i + 1] @ torch.linalg.inv(g)
        assert cf.noise_trace(moved, sx, se) > best * (1 + 1e-6)


def test_gradient_grams_match_per_sample_gradients():
    v, sx, se, rng = problem(13, 3, 2)
    layers = [torch.randn(4, 3, dtype=F64, generator=rng), torch.randn(3, 4, dtype=F64, generator=rng)]
    layers.append(v @ torch.linalg.pinv(layers[1] @ layers[0]))
    x_points = math.sqrt(3) * torch.cat([torch.linalg.cholesky(sx), -torch.linalg.cholesky(sx)], 1).T
    e_points = math.sqrt(2) * torch.cat([torch.linalg.cholesky(se), -torch.linalg.cholesky(se)], 1).T
    total = [torch.zeros(4, 4, dtype=F64), torch.zeros(3, 3, dtype=F64), torch.zeros(2, 2, dtype=F64)]
    count = 0
    for x in x_points:
        for e in e_points:
            ws = [w.clone().requires_grad_() for w in layers]
            loss = (ws[2] @ ws[1] @ ws[0] @ x - v @ x - e).square().sum()
            for i, g in enumerate(torch.autograd.grad(loss, ws)):
                total[i] += g @ g.T
            count += 1
    for (rows, _), measured in zip(cf.gradient_grams(layers, sx, se), total, strict=True):
        assert torch.allclose(measured / count, rows, rtol=1e-10)


def test_initial_sharpness_is_the_mean_hessian_trace():
    dx, d = 5, 8
    rng = torch.Generator().manual_seed(0)
    u = math.sqrt(0.3) * torch.randn(20_000, dx, d, dtype=F64, generator=rng)
    w = math.sqrt(0.7) * torch.randn(20_000, d, dx, dtype=F64, generator=rng)
    sx = 2.0 * torch.eye(dx, dtype=F64)
    traces = cf.two_layer_hessian_trace(u, w, sx, 0.5)
    expected = cf.initial_sharpness(dx, d, 0.3, 0.7, 10.0)
    assert abs(traces.mean() - expected) < 4 * traces.std() / math.sqrt(20_000)
    ends = cf.two_layer(torch.eye(dx, dtype=F64), *cf.noise_matrices(sx, 0.1 * torch.eye(dx, dtype=F64)))
    assert math.isclose(float(cf.two_layer_hessian_trace(*ends, sx, 0.5)), cf.equilibrium_sharpness(dx, d, 10.0))


def test_scalar_decay_rate_is_the_mean_relative_change():
    rng = torch.Generator().manual_seed(1)
    n, s, lr = 200_000, 4, 0.05
    x = 1.3 * torch.randn(n, s, dtype=F64, generator=rng)
    eps = 0.7 * torch.randn(n, s, dtype=F64, generator=rng)
    g = (-2 * eps * x).mean(1)
    u, w = 2.0, 0.5
    after = (u - lr * g * w) ** 2 - (w - lr * g * u) ** 2
    relative = 1 - after / (u**2 - w**2)
    rate = cf.scalar_decay_rate(lr, s, 1.3**2, 0.7**2)
    assert abs(relative.mean() - rate) < 4 * relative.std() / math.sqrt(n)


@pytest.mark.parametrize(("size", "momentum"), [(None, 0.0), (6, 0.0), (6, 0.5)])
def test_decay_shift_weighs_decay_against_the_noise_of_a_minibatch(size, momentum):
    """With the shift on both noise matrices the equilibrium of a two-layer net stops its charge's drift.

    Drift per step: `-eta (2 w - eta w^2) C + 4 c^2 eta^2 f (U^T Gam_U U - W Gam_W W^T)`, `C = W W^T - U^T U`, with f
    the variance of a batch's mean over that of one sample: 1/S for fresh data, for 6 samples counted over all batches.
    """
    batch, lr, w, c = 2, 0.05, 0.3, 0.7
    values = torch.tensor([0.3, -1.0, 2.0, 0.5, -0.7, 1.4], dtype=F64)
    means = torch.stack([values[list(chosen)].mean() for chosen in itertools.combinations(range(6), batch)])
    f = 1 / batch if size is None else float(means.var(correction=0) / values.var(correction=0))
    sgd = SGDConfig(lr, batch, w, momentum, dataset_size=size)
    v, sigma_x, sigma_eps, _ = problem(3)
    gam_u, gam_w = cf.noise_matrices(sigma_x, sigma_eps)
    u, w_factor = cf.two_layer(v, *cf.with_decay((gam_u, gam_w), sgd, c))
    eta = lr / (1 - momentum)
    charge = w_factor @ w_factor.mT - u.mT @ u
    noise = 4 * c**2 * eta**2 * f * (u.mT @ gam_u @ u - w_factor @ gam_w @ w_factor.mT)
    decay = -eta * (2 * w - eta * w**2) * charge
    assert charge.norm() > 0.1
    torch.testing.assert_close(noise, -decay, rtol=1e-8, atol=1e-10)
