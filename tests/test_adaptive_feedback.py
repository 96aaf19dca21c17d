"""Adam's equilibrium where `v` follows the fluctuations: against a closed form, brute force and a simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.errors import DataError


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def product_net(d: int, samples: int, seed: int = 0) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    """`y = u (w . x) + noise` at its minimum; every input with both signs of the noise, white to rounding."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(samples // 2, d, generator=rng, dtype=torch.float64)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.mT @ x / len(x))).mT
    inputs, noise = torch.cat([x, x]), torch.cat([torch.ones(len(x), 1), -torch.ones(len(x), 1)]).double()
    net = nn.Sequential(nn.Linear(d, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0] + [0.0] * (d - 1)]))
        net[1].weight.fill_(1.0)
    return net, (inputs, inputs[:, :1] + noise)


def chunks(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(250) for t in batch), strict=True))


def ratio(net: nn.Sequential, batch: tuple[Tensor, Tensor], adam: nf.AdamConfig, feedback: bool) -> float:
    """`|w| / |u|` at the equilibrium."""
    syms = nf.declare(net, "scalar", [("0.weight", 0)], [("1.weight", 0)])
    moments = nf.gradient_moments(net, squared, [batch], syms, entries=True)
    found = nf.square_feedback(net, squared, chunks(batch), syms, adam, samples=4_000) if feedback else None
    eq = nf.noise_equilibrium(net, syms, moments, adam, feedback=found)
    assert eq.converged
    element = float(eq[syms[0].name].element)
    norms = [float(p.detach().norm()) for p in net.parameters()]
    return element**2 * norms[0] / norms[1]


@pytest.mark.parametrize("speed", [0.1, 1.0, 10.0])
def test_the_worked_example_of_theory_13(speed: float) -> None:
    """`(1 - kap) |w| = (d - kap) |u|`, `kap` that of the mode that carries the fluctuations of `u w`, at lr to 0."""
    d, size, lr = 4, 8, 1e-5
    b2 = 1 - speed * lr
    net, batch = product_net(d, 4_000)
    adam = nf.AdamConfig(lr=lr, batch_size=size, betas=(0.0, b2), eps=0.0, dataset_size=4_000, replacement=True)
    assert ratio(net, batch, adam, False) == pytest.approx(d, rel=2e-3)
    found = ratio(net, batch, adam, True)
    # at |w| = r, |u| = 1: s = 2 sigma |u| and 2 sigma |w| over sqrt(S), H = 2 (|u|^2, u w; u w, |w|^2) along w
    w, u = math.sqrt(found), 1 / math.sqrt(found)
    root = 2 / math.sqrt(size) * np.array([u, w])
    hessian = 2 * np.array([[u * u, u * w], [u * w, w * w]])
    k = float(np.linalg.eigvalsh(hessian / np.sqrt(np.outer(root, root))).max())
    kap = (1 - b2) / ((1 - b2) + b2 * lr * k)
    assert found == pytest.approx((d - kap) / (1 - kap), rel=2e-3)


def brute_feedback(net: nn.Sequential, batch: tuple[Tensor, Tensor], adam: nf.AdamConfig) -> Tensor:
    """`2 theta (H S grad log s)` of every entry from dense matrices made otherwise: autograd of second moments, a
    Lyapunov solver, and the filter of `v` summed step by step.
    """
    params = dict(net.named_parameters())
    theta = torch.cat([p.detach().reshape(-1) for p in params.values()])

    def losses(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in params.values()])
        given = {n: part.reshape(p.shape) for (n, p), part in zip(params.items(), parts, strict=True)}
        return (torch.func.functional_call(net, given, (batch[0],)) - batch[1]).square().sum(1)

    jacobian = torch.func.jacrev(losses)
    single = jacobian(theta)
    noise = adam.covariance_factor * torch.cov(single.mT)
    hessian = torch.autograd.functional.hessian(lambda t: losses(t).mean(), theta)

    def logs(t: Tensor) -> Tensor:
        g = jacobian(t)
        return ((g - g.mean(0)).square().sum(0) / (len(g) - 1) * adam.covariance_factor + g.mean(0).square()).log() / 2

    slopes = torch.func.jacrev(logs)(theta)
    steps = adam.lr * torch.diag(torch.exp(-logs(theta)))
    step = (torch.eye(len(theta)) - steps @ hessian).numpy()
    kick = (steps @ noise @ steps).numpy()
    covariance = solve_discrete_lyapunov(0.9999999999 * step, kick)
    followed, power, b2 = np.zeros_like(step), np.eye(len(theta)), adam.betas[1]
    for lag in range(round(30 / (1 - b2))):
        followed += (1 - b2) * b2**lag * (power @ covariance)
        power = step @ power
    return 2 * theta * torch.from_numpy(((hessian.numpy() @ followed) * slopes.numpy()).sum(1))


def test_growth_of_charge_equals_brute_force() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x = torch.randn(400, 3, dtype=torch.float64)
    y = net(x).detach() + 0.3 * torch.randn(400, 2, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = squared(net, (x, y)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    adam = nf.AdamConfig(lr=1e-3, batch_size=8, betas=(0.9, 0.97), eps=0.0)
    syms = nf.SymmetrySet((), shapes={n: tuple(p.shape) for n, p in net.named_parameters()})
    feedback = nf.square_feedback(net, squared, [(x, y)], syms, adam)
    found = torch.cat([g.reshape(-1) for g in feedback.growth_of_charge({}).values()])
    expected = brute_feedback(net, (x, y), adam)
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.02


def test_growth_elsewhere_on_the_orbit_is_that_of_the_moved_model() -> None:
    net, batch = product_net(3, 2_000)
    adam = nf.AdamConfig(lr=1e-3, batch_size=8, betas=(0.9, 0.99))
    syms = nf.declare(net, "scalar", [("0.weight", 0)], [("1.weight", 0)])
    here = nf.square_feedback(net, squared, chunks(batch), syms, adam)
    with torch.no_grad():
        net[0].weight.mul_(1.7)
        net[1].weight.div_(1.7)
    there = nf.square_feedback(net, squared, chunks(batch), syms, adam).growth_of_charge({})
    moved = here.growth_of_charge({"0.weight": torch.tensor(1.7).double(), "1.weight": torch.tensor(1 / 1.7).double()})
    for name, value in there.items():
        assert torch.allclose(moved[name], value, rtol=1e-3, atol=1e-6 * float(value.abs().max()))


def simulated(d: int, b2: float, lr: float, steps: int, start: float, copies: int) -> np.ndarray:
    """`log |w| / |u|` of Adam on `y = u (w . x) + noise`, fresh data, averaged over the last half of the run."""
    rng = np.random.default_rng(round(1e4 * b2))
    w = np.zeros((copies, d))
    w[:, 0], u = math.sqrt(start), np.full(copies, 1 / math.sqrt(start))
    size = 8
    moments = [np.zeros((copies, d)), np.zeros((copies, d)), np.zeros(copies), np.zeros(copies)]
    total = np.zeros(copies)
    for step in range(1, steps + 1):
        x, noise = rng.standard_normal((copies, size, d)), rng.standard_normal((copies, size))
        hidden = np.einsum("csd,cd->cs", x, w)
        residual = 2 * (u[:, None] * hidden - x[:, :, 0] - noise) / size
        grads = (u[:, None] * np.einsum("cs,csd->cd", residual, x), (residual * hidden).sum(1))
        updates = []
        for i, g in enumerate(grads):
            m, v = moments[2 * i], moments[2 * i + 1]
            m *= 0.9
            m += 0.1 * g
            v *= b2
            v += (1 - b2) * g * g
            updates.append(lr * (m / (1 - 0.9**step)) / np.sqrt(v / (1 - b2**step)))
        w, u = w - updates[0], u - updates[1]
        if step > steps // 2:
            total += np.log(np.linalg.norm(w, axis=1) / np.abs(u))
    return total / (steps - steps // 2)


@pytest.mark.slow
@pytest.mark.parametrize("b2", [0.999, 0.99, 0.95])
def test_three_values_of_b2_against_a_simulation(b2: float) -> None:
    """`b2` at lr 0.01, extrapolated to lr 0 at the same `(1 - b2) / lr`; SGD would be at 2, frozen `v` at 4."""
    d, speed, tiny = 4, (1 - b2) / 0.01, 1e-5
    net, batch = product_net(d, 4_000)
    adam = nf.AdamConfig(tiny, 8, (0.9, 1 - speed * tiny), eps=0.0, dataset_size=4_000, replacement=True)
    predicted = ratio(net, batch, adam, True)
    coarse = simulated(d, b2, 0.01, 30_000, predicted, 48)
    fine = simulated(d, 1 - speed * 0.005, 0.005, 100_000, predicted, 48)
    limit = 2 * fine.mean() - coarse.mean()
    error = math.hypot(2 * fine.std(ddof=1), coarse.std(ddof=1)) / len(fine) ** 0.5
    shown = [f"{math.exp(x):.3f}" for x in (coarse.mean(), fine.mean(), limit)]
    print(f"b2 {b2}: predicted {predicted:.3f}, simulated {shown}, error {error * predicted:.3f}")
    assert abs(limit - math.log(predicted)) < 3 * error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda net, adam: (net, replace(adam, lr=2e-3)), "measured for"),
        (lambda net, adam: (net.requires_grad_(True), nf.SGDConfig(1e-3, 8)), "average of squares"),
    ],
)
def test_a_feedback_of_something_else_is_refused(change: Callable[..., Any], words: str) -> None:
    net, batch = product_net(3, 200)
    adam = nf.AdamConfig(lr=1e-3, batch_size=8)
    syms = nf.declare(net, "scalar", [("0.weight", 0)], [("1.weight", 0)])
    moments = nf.gradient_moments(net, squared, [batch], syms, entries=True)
    feedback = nf.square_feedback(net, squared, [batch], syms, adam)
    model, settings = change(net, adam)
    with pytest.raises(DataError, match=words):
        nf.noise_equilibrium(model, syms, moments, settings, feedback=feedback)


def test_limits_are_said() -> None:
    net, batch = product_net(3, 200)
    adam = nf.AdamConfig(lr=1e-3, batch_size=8)
    syms = nf.declare(net, "scalar", [("0.weight", 0)], [("1.weight", 0)])
    feedback = nf.square_feedback(net, squared, [batch], syms, adam)
    moments = nf.gradient_moments(net, squared, [batch], syms, entries=True)
    assert "kap from" in str(nf.noise_equilibrium(net, syms, moments, adam, feedback=feedback))
    with pytest.raises(DataError, match="v is Adam's"):
        nf.square_feedback(net, squared, [batch], syms, nf.SGDConfig(1e-3, 8))  # type: ignore[arg-type]
    with torch.no_grad():
        net[0].weight.mul_(2)
        net[1].weight.div_(2)
    moments = nf.gradient_moments(net, squared, [batch], syms, entries=True)
    with pytest.raises(DataError, match="other weights"):
        nf.noise_equilibrium(net, syms, moments, adam, feedback=feedback)
    wide = nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 2)).double()
    with pytest.raises(DataError, match=r"2,522 trainable entries.*square_memory"):
        nf.square_feedback(wide, squared, [(torch.randn(4, 60).double(), torch.randn(4, 2).double())], syms, adam)
