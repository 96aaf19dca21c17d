"""The cheap minibatches of the rank-one factorisation have the law of drawn ones."""

import pytest
import torch

from noetherflow_paper.rank_one import RankOneNet
from noetherflow_paper.simulate import normal

D, S, DRAWS = 3, 4, 200_000


def setting(parallel):
    rng = torch.Generator().manual_seed(3)
    a, b = (v / v.norm() for v in normal((2, D), rng))
    w, u = (2 * b if parallel else normal((D,), rng)), normal((D,), rng)
    return RankOneNet(a, b, 1.5, 0.7, S), [w.reshape(1, 1, D), u.reshape(1, D, 1)]


def flat(gradients):
    return torch.cat([g.flatten(1) for g in gradients], dim=1)


@pytest.mark.parametrize("parallel", [False, True])
def test_mean_and_covariance_are_those_of_explicit_minibatches(parallel):
    problem, params = setting(parallel)
    many = [p.expand(DRAWS, -1, -1) for p in params]
    rng = torch.Generator().manual_seed(4)
    cheap = flat(problem.minibatch_gradient(many, rng))
    x, noise = normal((DRAWS, S, D), rng), problem.noise * normal((DRAWS, S, D), rng)
    leaves = [p.clone().requires_grad_() for p in many]
    y = problem.size * (x @ problem.b)[..., None] * problem.a + noise
    loss = ((x @ leaves[0].mT) @ leaves[1].mT - y).square().sum(-1).mean(-1).sum()
    drawn = flat(torch.autograd.grad(loss, leaves))
    exact = flat(problem.mean_gradient(params))[0]
    gap = params[1] @ params[0] - problem.size * torch.outer(problem.a, problem.b)
    assert torch.allclose(problem.error(params), gap.square().sum((1, 2)))
    assert torch.allclose(exact, flat(problem.population.mean_gradient(params))[0], rtol=1e-12, atol=1e-12)
    for sample in (cheap, drawn):
        assert ((sample.mean(0) - exact).abs() < 5 * sample.std(0) / DRAWS**0.5).all()
    products = [(s[:, :, None] * s[:, None, :]).flatten(1) for s in (cheap - exact, drawn - exact)]
    error = ((products[0].var(0) + products[1].var(0)) / DRAWS).sqrt()
    gap = products[0].mean(0) - products[1].mean(0)
    assert (gap.abs() < 5 * error).all()
    assert (products[0].mean(0).abs() > 20 * error).any(), "the test would see a wrong covariance"
