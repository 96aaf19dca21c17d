"""Flow, equilibrium and balance of gains stored as a distance from a constant, against loops over samples."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import noetherflow as nf

D = torch.float64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 4, dtype=D), nn.Linear(4, 3, dtype=D)
        self.g = nn.Parameter(0.3 * torch.randn(4, dtype=D))

    def forward(self, x):
        return self.b(F.rms_norm(self.a(x), (4,)) * (1 + self.g))


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().sum(1)


@pytest.fixture(scope="module")
def problem():
    model = Net()
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 5, dtype=D, generator=rng), torch.randn(64, 3, dtype=D, generator=rng)
    syms = nf.find_symmetries(model, x[:2])
    gains = dataclasses.replace(syms, symmetries=tuple(s for s in syms if "g" in s.parameters))
    moments = nf.gradient_moments(model, loss, [(x, y)], gains, entries=True)
    return model, x, y, gains, moments


def gradients(model, x, y):
    """One gradient per sample, by parameter."""
    params = dict(model.named_parameters())
    losses = loss(model, (x, y))
    each = [torch.autograd.grad(one, list(params.values()), retain_graph=True) for one in losses]
    return [dict(zip(params, g, strict=True)) for g in each]


def test_charge_and_drift_are_those_of_the_sum(problem):
    model, x, y, gains, moments = problem
    sgd = nf.SGDConfig(lr=0.1, batch_size=4)
    flow = nf.noether_flow(model, gains, moments, sgd)
    (row,) = flow.details
    charge = (1 + model.g).square() - model.b.weight.square().sum(0)
    torch.testing.assert_close(row.charge, charge.detach())
    each = torch.stack([g["g"].square() - g["b.weight"].square().sum(0) for g in gradients(model, x, y)])
    mean = {n: torch.stack([g[n] for g in gradients(model, x, y)]).mean(0) for n in ("g", "b.weight")}
    steady = mean["g"].square() - mean["b.weight"].square().sum(0)
    noise = (each.mean(0) - steady) * len(x) / (len(x) - 1) / sgd.batch_size
    torch.testing.assert_close(row.noise, sgd.lr**2 * noise, rtol=1e-9, atol=1e-12)


def test_the_equilibrium_balances_the_noise_measured_again(problem):
    model, x, y, gains, moments = problem
    sgd = nf.SGDConfig(lr=0.1, batch_size=4)
    eq = nf.noise_equilibrium(model, gains, moments, sgd)
    moved, before = copy.deepcopy(model), model(x)
    nf.balance_(moved, eq, example_inputs=x)
    torch.testing.assert_close(moved(x), before, rtol=1e-11, atol=1e-11)
    again = nf.gradient_moments(moved, loss, [(x, y)], gains, entries=True)
    check = nf.noise_equilibrium(moved, gains, again, sgd)
    assert eq.imbalance_now > 0.05
    assert check.imbalance_now < 1e-9
    (settled,) = eq
    torch.testing.assert_close(settled.charge, gains[0].charge(nf.tensors_of(moved)).detach())


def test_decay_on_the_stored_weight_is_refused_with_the_reason(problem):
    model, _, _, gains, moments = problem
    sgd = nf.SGDConfig(lr=0.1, batch_size=4, weight_decay=0.01)
    for answer in (nf.noether_flow(model, gains, moments, sgd), nf.noise_equilibrium(model, gains, moments, sgd)):
        assert "weight decay pulls the stored number to 0" in str(answer)


def test_one_step_with_decay_splits_exactly(problem):
    model, x, y, gains, _ = problem
    sgd = nf.SGDConfig(lr=0.1, batch_size=64, weight_decay=0.05)
    stepped = copy.deepcopy(model)
    optimizer = torch.optim.SGD(stepped.parameters(), sgd.lr, weight_decay=sgd.weight_decay)
    loss(stepped, (x, y)).mean().backward()
    named = {n: p.grad for n, p in stepped.named_parameters()}
    optimizer.step()
    before, after = ({n: p.detach() for n, p in m.named_parameters()} for m in (model, stepped))
    step = nf.step_identity(gains[0], before, named, after, sgd)
    by_hand = (1 + after["g"]).square() - after["b.weight"].square().sum(0)
    by_hand = by_hand - ((1 + before["g"]).square() - before["b.weight"].square().sum(0))
    torch.testing.assert_close(step.measured, by_hand)
    assert step.relative_residual < 1e-14
    pulled = nf.step_identity(gains[0], before, named, after, dataclasses.replace(sgd, weight_decay=0.0))
    assert pulled.relative_residual > 1e-4, "without the decay's part the books do not close"
