"""The noise equilibrium of Adam and Lion from moments: sums of roots, minimised by brute force and by simulation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from equilibrium_cases import Problem, linear, mlp, moved
from noetherflow.equilibrium.adaptive import adaptive_regime
from noetherflow.equilibrium.potential import Drift
from noetherflow.equilibrium.roots import NoiseLaw, charges, root_orbit
from noetherflow.errors import MomentError
from noetherflow.moments.result import merge_moments
from reference import moments_by_loop, per_sample_gradients


def batch_seconds(problem: Problem, model: nn.Module, config: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`f Sigma` and `gbar^2` of the whole data set, by a loop over samples."""
    singles = per_sample_gradients(model, problem.loss, problem.data)
    stacked = {n: torch.stack([g[n] for g in singles]) for n in singles[0]}
    noise = {n: config.covariance_factor * g.var(0, unbiased=False) for n, g in stacked.items()}
    return noise, {n: g.mean(0).square() for n, g in stacked.items()}


def psi(problem: Problem, model: nn.Module, config: nf.AdamConfig) -> float:
    """`sum (lr c (s - eps log(1 + s / eps)) + decay)` over all weights, `c` what memory makes of the mean gradient."""
    noise, steady = batch_seconds(problem, model, config)
    b1, eps, total = config.betas[0], config.eps, 0.0
    for n, p in model.named_parameters():
        lr, w, theta = config.rates(n).lr, config.rates(n).weight_decay, p.detach()
        square = noise[n] + steady[n]
        s = square.sqrt()
        c = torch.where(square > 0, (noise[n] + (1 + b1) / (1 - b1) * steady[n]) / square.clamp_min(1e-300), 0.0)
        roots = s - eps * torch.log1p(s / eps) if eps else s
        decay = w * (2 - lr * w) * (s + eps / 2) * theta**2 if config.decoupled else w * theta**2
        total += float((lr * c * roots + decay).sum())
    return total


def finite_data(problem: Problem, **settings: Any) -> nf.AdamConfig:
    return nf.AdamConfig(batch_size=4, dataset_size=len(problem.data[0]), **{"lr": 0.01, "eps": 0.0} | settings)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"betas": (0.0, 0.99)},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "eps": 0.3},
    {"weight_decay": 0.2, "decoupled": False},
    {"decoupled": False, "groups": (nf.GroupRates(("0.weight", "4.weight"), 0.01, 0.3),)},
    {"weight_decay": 0.1, "groups": (nf.GroupRates(("0.bias", "2.bias", "4.bias"), 0.03, 0.0),)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_joint_equilibrium_minimises_psi(settings: dict[str, Any]) -> None:
    """No move along any symmetry, alone or together, makes Psi of the moved model, measured again, smaller."""
    problem = mlp((4, 5, 6, 3), (1.5, 1.0, 0.6))
    config = finite_data(problem, **settings)
    eq = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), config)
    assert eq.converged
    assert eq.imbalance < 1e-10
    assert eq.imbalance_now > 0.1
    there = moved(problem.model, problem.syms, eq.elements)
    best = psi(problem, there, config)
    assert best < psi(problem, problem.model, config)
    torch.manual_seed(0)
    rises = []
    for scale in (1e-2, 0.3):
        for _ in range(4):
            moves = {
                s.name: (scale * eq[s.name].finite * torch.randn(s.shape, dtype=torch.float64)).exp()
                for s in problem.syms
            }
            rises.append(psi(problem, moved(there, problem.syms, moves), config) - best)
    assert min(rises) > 0
    assert rises[0] < 1e-3 * best, "a small move costs little: the slope is 0"


def test_psi_is_the_mean_change_of_the_preconditioned_charge() -> None:
    """`E[C_P' - C_P] = -dPsi/dlam` (times lr) for RMSprop at frozen D, by all minibatches of two of five samples."""
    problem = mlp((3, 4, 2), samples=5)
    config = nf.AdamConfig(0.02, 2, betas=(0.0, 0.99), eps=0.05, weight_decay=0.3, dataset_size=5, replacement=True)
    singles = per_sample_gradients(problem.model, problem.loss, problem.data)
    draws = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    batch = {n: torch.stack([g[n] for g in singles])[draws].mean(1) for n in singles[0]}
    theta = problem.tensors()
    over = {n: g.square().mean(0).sqrt() + 0.05 for n, g in batch.items()}
    new = {n: (1 - 0.02 * 0.3) * theta[n] - 0.02 * g / over[n] for n, g in batch.items()}
    (s,) = problem.syms
    orbit = root_orbit(problem.model, [s], problem.measure(), config)
    (pairs,) = orbit.at([s.identity()]).pairs
    drift = sum(leg.exponent * (noise - decay) for leg, (decay, noise) in zip(s.weight_legs, pairs, strict=True))

    def charge(tensors: dict[str, Tensor]) -> Tensor:
        parts = {n: tensors[n] ** 2 * over[n] for n in s.parameters}
        return sum(leg.exponent * leg.row_sums(parts[leg.parameter]) for leg in s.weight_legs)  # type: ignore[return-value]

    changes = torch.func.vmap(charge)(new).mean(0) - charge(theta)
    torch.testing.assert_close(drift, changes, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(charges(orbit, [s.identity()])[0], charge(theta))


def test_one_sided_norm_is_held_by_decay() -> None:
    """`sum s theta^2 / sum s = lr / (2 w)` at the equilibrium; without decay the norm grows for ever."""
    torch.manual_seed(0)

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.w / self.w.norm()).T

    model = Normed()
    syms = nf.declare(model, "scalar", [("w", 0)], [])
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 4, dtype=torch.float64)
    problem = Problem(model, syms, (x, y))
    config = finite_data(problem, lr=0.01, weight_decay=0.1, betas=(0.0, 0.999))
    eq = nf.noise_equilibrium(model, syms, problem.measure(), config)
    there = moved(model, syms, eq.elements)
    noise, steady = batch_seconds(problem, there, config)
    s = (noise["w"] + steady["w"]).sqrt()
    w2 = there.w.detach() ** 2
    assert float((s * w2).sum() / s.sum()) == pytest.approx(0.01 / (2 * 0.1 * (1 - 0.01 * 0.1 / 2)), rel=1e-9)
    lion = nf.LionConfig(0.01, 4, weight_decay=0.1, dataset_size=40)
    (settled,) = nf.noise_equilibrium(model, syms, problem.measure(), lion)
    ratio = float((settled.element / eq.settled[0].element) ** 2)
    assert ratio == pytest.approx(lion.correlation_sum, rel=1e-9)
    (free,) = nf.noise_equilibrium(model, syms, problem.measure(), config, objective="noise")
    assert (free.classification, float(free.element)) == ("one-sided", 1.0)


def test_each_alone_is_the_closed_form() -> None:
    """`p^2 = (lr A_plus + 2 w B_minus) / (lr A_minus + 2 w B_plus)`, entry by entry."""
    problem = mlp((4, 5, 6, 3))
    config = finite_data(problem, weight_decay=0.1, betas=(0.0, 0.99))
    eq = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), config, joint=False)
    noise, steady = batch_seconds(problem, problem.model, config)
    s = {n: (noise[n] + steady[n]).sqrt() for n in noise}
    theta = problem.tensors()
    for symmetry, settled in zip(problem.syms, eq, strict=True):
        up, down = 0.0, 0.0
        for leg in symmetry.weight_legs:
            grow = 0.01 * leg.row_sums(s[leg.parameter])
            hold = 0.1 * (2 - 0.001) * leg.row_sums(s[leg.parameter] * theta[leg.parameter] ** 2)
            up, down = (up + grow, down + hold) if leg.sign > 0 else (up + hold, down + grow)
        assert int(settled.finite.sum()) > 3
        assert bool((settled.element[~settled.finite] == 1).all()), "a dead unit stays"
        torch.testing.assert_close(settled.element[settled.finite], (up / down).sqrt()[settled.finite])


def test_sgd_is_another_point_of_the_same_orbit() -> None:
    problem = mlp((4, 5, 6, 3))
    moments = problem.measure()
    adam = nf.noise_equilibrium(problem.model, problem.syms, moments, finite_data(problem))
    sgd = nf.noise_equilibrium(problem.model, problem.syms, moments, nf.SGDConfig(0.01, 4, dataset_size=40))
    assert (
        max(
            float((adam[s.name].element / s2.element).log().abs().max())
            for s, s2 in zip(problem.syms, sgd, strict=True)
        )
        > 0.1
    )
    for objective in ("norm", "fisher"):
        one, two = (nf.noise_equilibrium(problem.model, problem.syms, moments, c, objective=objective)
                    for c in (finite_data(problem), None))  # fmt: skip
        assert one.to_dict() == two.to_dict(), "these do not depend on the optimiser"


def test_jackknife_errors_are_the_scatter_over_data_sets() -> None:
    """Elements from many samples of 200 drawn anew, against the error that each claims."""
    problem = mlp((3, 4, 2))
    torch.manual_seed(3)
    config = nf.AdamConfig(0.01, 4, weight_decay=0.1)
    logs, claims = [], []
    for _ in range(30):
        x = torch.randn(200, 3, dtype=torch.float64)
        y = torch.randn(200, 2, dtype=torch.float64)
        parts = [moments_by_loop(problem.model, problem.loss, [b], problem.syms)
                 for b in zip(x.split(20), y.split(20), strict=True)]  # fmt: skip
        moments = dataclasses.replace(merge_moments(parts), groups=tuple(parts))
        (settled,) = nf.noise_equilibrium(problem.model, problem.syms, moments, config, errors=True)
        logs.append(settled.element.log())
        claims.append(settled.log_error)
    ratio = torch.stack(claims).square().mean(0).sqrt() / torch.stack(logs).std(0)
    assert float(ratio.min()) > 0.6
    assert float(ratio.max()) < 1.7


def test_what_is_not_derived_is_left_out_and_says_why() -> None:
    problem = linear((5, 3, 4))
    eq = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), finite_data(problem))
    assert not eq.settled
    assert "does not commute" in str(eq)
    torus = mlp((4, 5, 3))
    moments = dataclasses.replace(torus.measure(), squares={})
    with pytest.raises(MomentError, match="entries=True"):
        nf.noise_equilibrium(torus.model, torus.syms, moments, finite_data(torus))
    with pytest.raises(MomentError, match="two groups"):
        nf.noise_equilibrium(torus.model, torus.syms, torus.measure(), finite_data(torus), errors=True)
    found = nf.noise_equilibrium(torus.model, torus.syms, torus.measure(), finite_data(torus))
    assert "slow against the fluctuations" in found.describe(verbose=True)


def test_memory_and_epochs_enter_the_noise() -> None:
    assert NoiseLaw.of(nf.AdamConfig(1e-3, 8, betas=(0.5, 0.9))).mean == pytest.approx(3)
    epochs = NoiseLaw.of(nf.AdamConfig(1e-3, 8, dataset_size=64, sampling="epoch"))
    sgd = nf.SGDConfig(1e-3, 8, momentum=0.9, dataset_size=64)
    shuffled = dataclasses.replace(sgd, sampling="epoch")
    assert epochs.white == pytest.approx(Drift.of(shuffled).noise / Drift.of(sgd).noise)
    assert NoiseLaw.of(nf.AdamConfig(1e-3, 8, betas=(0.0, 0.9), dataset_size=64, sampling="epoch")).white == 1


def test_regime_of_adam() -> None:
    """The share of the mean gradient, and the loss over what one step along it takes off, written out."""
    problem = mlp((4, 5, 3))
    config = finite_data(problem, betas=(0.5, 0.99))
    noise, steady = batch_seconds(problem, problem.model, config)
    roots = {n: (noise[n] + steady[n]).sqrt() for n in noise}
    parts = {n: (noise[n] / roots[n], 3 * steady[n] / roots[n]) for n in noise}
    (s,) = problem.syms
    white, mean = (
        sum(leg.sign * leg.row_sums(parts[leg.parameter][k].nan_to_num()) for leg in s.weight_legs).abs().sum()
        for k in (0, 1)
    )
    regime = adaptive_regime(tuple(problem.syms), problem.measure(), config)
    assert regime.mean_share == pytest.approx(float(mean / (white + mean)))
    fall = 0.01 * sum(float((steady[n] / roots[n]).nan_to_num().sum()) for n in noise)
    assert regime.horizon == pytest.approx(problem.measure().loss / fall)


def sgd_groups(**changed: Any) -> nf.SGDConfig:
    groups = (nf.GroupRates(("0.bias", "2.bias"), 0.03, 0.0), nf.GroupRates(("4.weight",), 0.005, 0.3))
    return nf.SGDConfig(0.01, 4, weight_decay=0.1, dataset_size=40, groups=groups, **changed)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_rates_of_their_own_minimises_its_potential(momentum: float) -> None:
    """`sum_i (lr_i noise_i + decay_i theta_i^2 / lr_i) / 2` of the moved model rises whichever way one goes."""
    problem = mlp((4, 5, 6, 3), (1.5, 1.0, 0.6))
    config = sgd_groups(momentum=momentum)
    eq = nf.noise_equilibrium(problem.model, problem.syms, problem.measure(), config)
    assert eq.imbalance < 1e-10
    there = moved(problem.model, problem.syms, eq.elements)
    white, held = 1 / (1 - momentum) ** 2, (1 + momentum) / (1 - momentum) ** 3

    def phi(model: nn.Module) -> float:
        noise, steady = batch_seconds(problem, model, config)
        total = 0.0
        for n, p in model.named_parameters():
            lr, w = config.rates(n).lr, config.rates(n).weight_decay
            decay = w * (2 - lr * w) / (1 - momentum) * p.detach() ** 2
            total += float((lr * (white * noise[n] + held * steady[n]) + decay).sum()) / 2
        return total

    best = phi(there)
    assert best < phi(problem.model)
    torch.manual_seed(0)
    for scale in (1e-2, 0.3):
        for _ in range(3):
            moves = {s.name: (scale * torch.randn(s.shape, dtype=torch.float64)).exp() for s in problem.syms}
            assert phi(moved(there, problem.syms, moves)) > best


def test_sgd_groups_that_agree_are_plain_sgd() -> None:
    problem = mlp((4, 5, 6, 3))
    plain = nf.SGDConfig(0.01, 4, weight_decay=0.1, momentum=0.5, dataset_size=40)
    same = dataclasses.replace(plain, groups=(nf.GroupRates(("0.weight", "0.bias"), 0.01, 0.1),))
    moments = problem.measure()
    one, two = (nf.noise_equilibrium(problem.model, problem.syms, moments, c) for c in (plain, same))
    flows = [nf.noether_flow(problem.model, problem.syms, moments, c) for c in (plain, same)]
    futures = [f.forecast([0, 500], errors=False) for f in flows]
    for s in problem.syms:
        torch.testing.assert_close(one[s.name].element, two[s.name].element, rtol=1e-6, atol=1e-9)
        for field in ("charge", "decay", "noise", "step_size", "relaxation_steps"):
            a, b = (getattr(f[s.name], field) for f in flows)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(futures[0].charges[s.name], futures[1].charges[s.name], rtol=1e-5, atol=1e-8)
    assert flows[0].regime.horizon == pytest.approx(flows[1].regime.horizon)
    assert flows[0].regime.mean_share == pytest.approx(flows[1].regime.mean_share)


def test_drift_with_rates_of_their_own_is_the_mean_over_every_draw() -> None:
    """All pairs of five samples, SGD with two groups: the mean change of `sum a (lr / lr_i) theta^2`."""
    problem = mlp((3, 4, 2), samples=5)
    groups = (nf.GroupRates(("2.weight",), 0.01, 0.5),)
    config = nf.SGDConfig(0.03, 2, weight_decay=0.2, dataset_size=5, replacement=True, groups=groups)
    singles = per_sample_gradients(problem.model, problem.loss, problem.data)
    draws = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    theta, (s,) = problem.tensors(), problem.syms
    total = torch.zeros(4, dtype=torch.float64)
    for leg in s.weight_legs:
        n, rates = leg.parameter, config.rates(leg.parameter)
        batch = torch.stack([g[n] for g in singles])[draws].mean(1)
        new = theta[n] - rates.lr * (batch + rates.weight_decay * theta[n])
        total += leg.sign * 0.03 / rates.lr * leg.row_sums((new**2).mean(0) - theta[n] ** 2)
    row = nf.noether_flow(problem.model, problem.syms, problem.measure(), config).details[0]
    cross = torch.zeros(4, dtype=torch.float64)
    for leg in s.weight_legs:
        rates, mean = config.rates(leg.parameter), problem.measure().mean[leg.parameter]
        cross += 2 * 0.03 * rates.lr * rates.weight_decay * leg.sign * leg.row_sums(theta[leg.parameter] * mean)
    torch.testing.assert_close(row.drift, total - cross, rtol=1e-9, atol=1e-14)
    assert float((cross.abs() / total.abs()).max()) < 0.2, "of order lr w, left out"


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.9), (0.0, 0.5)])
def test_gain_of_lion_is_the_answer_of_its_signs_to_a_mean(betas: tuple[float, float]) -> None:
    """Against signs of averages made step by step of white Gaussian gradients that have a small mean."""
    (b1, b2), s, mean = betas, 3.0, 0.02
    torch.manual_seed(0)
    m, steps = torch.full((200_000,), mean, dtype=torch.float64), []
    for k in range(400):
        g = mean + s * torch.randn(200_000, dtype=torch.float64)
        if k >= 390:
            steps.append((b1 * m + (1 - b1) * g).sign().mean())
        m = b2 * m + (1 - b2) * g
    shown, error = float(torch.stack(steps).mean()), 200_000**-0.5
    assert abs(shown - nf.LionConfig(1e-3, 8, betas).gain * mean / s) < 3 * error


def test_answers_about_lion_say_what_they_rest_on() -> None:
    problem = mlp()
    moments = nf.gradient_moments(problem.model, problem.loss, [problem.data], problem.syms, entries=True)
    lion = nf.LionConfig(1e-3, 4, dataset_size=40)
    for said in (
        nf.noise_equilibrium(problem.model, problem.syms, moments, lion).describe(verbose=True),
        nf.noether_flow(problem.model, problem.syms, moments, lion).describe(verbose=True),
    ):
        assert "Lion's average is short" in said
        assert "100 steps" in said
        assert "6.7 / s" in said
