"""The slow flow with turning against automatic differentiation, closed forms and simulation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.linalg import solve_sylvester

from noetherflow.core.settings import SGDConfig
from noetherflow_paper import closed_form as cf
from noetherflow_paper.experiment import changed
from noetherflow_paper.experiments import turning as experiment
from noetherflow_paper.generic import product_design
from noetherflow_paper.theory import charge_drift
from noetherflow_paper.turning import independent_noise, residual_noise, turning_flow, velocity

F64 = torch.float64


def covariance(d: int, rng: torch.Generator) -> torch.Tensor:
    root = torch.randn(d, d + 2, generator=rng, dtype=F64)
    return root @ root.mT / d


def task(sizes: tuple[int, ...], seed: int):
    """Random layers `[h_i, h_{i-1}]` of full rank, and covariances."""
    rng = torch.Generator().manual_seed(seed)
    layers = [torch.randn(a, b, generator=rng, dtype=F64) for b, a in pairwise(sizes)]
    return layers, covariance(sizes[0], rng), covariance(sizes[-1], rng)


def by_hand(layers, x, y):
    """Inner products of every generator's tangent with the mean motion, by autograd over samples and Lyapunov."""
    shapes = [w.shape for w in layers]

    def unflattened(flat):
        return [p.reshape(s) for p, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]

    def loss(flat, x, y):
        for w in unflattened(flat):
            x = x @ w.mT
        return (x - y).square().sum(-1).mean()

    flat = torch.cat([w.flatten() for w in layers])
    hessian = torch.autograd.functional.hessian(lambda at: loss(at, x, y), flat)
    per_sample = [
        torch.autograd.functional.jacobian(lambda at, a=a, b=b: loss(at, a[None], b[None]), flat)
        for a, b in zip(x, y, strict=True)
    ]
    samples = torch.stack(per_sample)
    sigma = samples.mT @ samples / len(x)
    level = 1e-9 * float(hessian.diagonal().mean())
    padded = hessian + level * torch.eye(len(flat), dtype=F64)
    weights = torch.as_tensor(solve_sylvester(padded.numpy(), padded.numpy(), sigma.numpy()))
    found = []
    for i in range(len(layers) - 1):
        products = torch.zeros(len(layers[i]), len(layers[i]), dtype=F64)
        for k in range(products.numel()):
            generator = torch.zeros_like(products)
            generator.view(-1)[k] = 1

            def tangent(flat, i=i, generator=generator):
                moved = [torch.zeros_like(w) for w in layers]
                now = unflattened(flat)
                moved[i], moved[i + 1] = generator @ now[i], -now[i + 1] @ generator
                return torch.cat([m.flatten() for m in moved])

            action = torch.autograd.functional.jacobian(tangent, flat)
            products.view(-1)[k] = (action * (hessian @ weights)).sum()
        found.append(products)
    return found


@pytest.mark.parametrize("sizes", [(3, 2, 3), (2, 2, 2, 3)])
def test_the_motion_is_that_of_autograd_hessian_and_noise(sizes):
    layers, sigma_x, sigma_eps = task(sizes, 3)
    product = layers[0]
    for w in layers[1:]:
        product = w @ product
    x, y = product_design(product, sigma_x, sigma_eps)
    for noise in (independent_noise(sigma_x, sigma_eps), residual_noise(x, y)):
        generators = velocity(layers, sigma_x, noise)
        moved = [torch.zeros_like(w) for w in layers]
        for i, a in enumerate(generators):
            moved[i] += a @ layers[i]
            moved[i + 1] -= layers[i + 1] @ a
        for i, expected in enumerate(by_hand(layers, x, y)):
            seen = moved[i] @ layers[i].mT - layers[i + 1].mT @ moved[i + 1]
            assert torch.allclose(seen, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_charges_drift_as_they_do_without_turning():
    (w, u), sigma_x, sigma_eps = task((3, 2, 4), 5)
    (a,) = velocity([w, u], sigma_x, independent_noise(sigma_x, sigma_eps))
    found = a @ w @ w.mT + u.mT @ u @ a
    expected = charge_drift(u, w, cf.noise_matrices(sigma_x, sigma_eps), SGDConfig(1.0, 1))
    assert torch.allclose(found + found.mT, expected)


def test_isotropic_label_noise_turns_nothing_and_rests_at_the_equilibrium():
    _, sigma_x, sigma_eps = task((3, 3), 6)
    product, eye = torch.randn(3, 3, generator=torch.Generator().manual_seed(7), dtype=F64), torch.eye(3, dtype=F64)
    for label_noise, still in ((eye, True), (sigma_eps, False)):
        u, w = cf.two_layer(product, *cf.noise_matrices(sigma_x, label_noise))
        (a,) = velocity([w, u], sigma_x, independent_noise(sigma_x, label_noise))
        assert (float(a.abs().max()) < 1e-9) == still


def test_the_flow_keeps_the_product_and_comes_to_rest_turning():
    config = experiment.SCALES["quick"]
    point = experiment.points(config)[0]
    v, sigma_x, sigma_eps = experiment.task(config, point)
    noise = independent_noise(sigma_x, sigma_eps)
    w, u = turning_flow(experiment.start(config, point), sigma_x, noise, [0, 20.0])[-1]
    (a,) = velocity([w, u], sigma_x, noise)
    assert torch.allclose(u @ w, v, rtol=1e-5)
    assert float((a + a.mT).abs().max()) < 1e-4 * float(a.abs().max())
    assert abs(float(a[0, 1])) > 0.1


def test_sgd_turns_the_charge_and_rests_where_theory_says():
    """At rate 0.01 within three standard errors and one percent, the part of first order in the rate."""
    config = changed(experiment.SCALES["quick"], {"lr": 0.01, "seeds": 48, "time": 1.0})
    point = experiment.points(config)[1]
    found = experiment.compute(config, point)
    for key in ("u", "w", "angle"):
        values = np.array(found[key])[-20:].mean(0)
        expected = np.array(found[f"{key} predicted"])[-20:].mean()
        error = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - expected) < 3 * error + 0.01 * abs(expected)
    assert abs(np.array(found["angle"])[-1].mean()) > 0.2
