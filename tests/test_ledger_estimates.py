"""Live estimates against integration of the expected flow, exact equilibria and simulated rotation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import noetherflow as nf
from noetherflow.monitor.estimates import angle, distance, orbit_forces, relaxation_steps
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.realised_rules import RealisedRule, RealisedSettings
from noetherflow.monitor.rule import StepSettings
from noetherflow.monitor.rules import AdamRule, SGDRule
from test_ledger import backward, batches, mlp, mlp_symmetries

positive = st.floats(0.05, 20.0)


@settings(deadline=None, max_examples=25)
@given(
    k_plus=positive, k_minus=positive, m_plus=positive, m_minus=positive, eta=st.floats(1e-3, 0.05), w=st.floats(0, 0.1)
)
def test_relaxation_steps_equal_integration(
    k_plus: float, k_minus: float, m_plus: float, m_minus: float, eta: float, w: float
) -> None:
    """`dlam/dk = E[C' - C](lam) / (dC/dlam)` with everything moved along the orbit (theory.md sections 5 and 7)."""
    integrate = pytest.importorskip("scipy.integrate")
    decay = eta * (2 * w - eta * w * w)
    x, y = orbit_forces(*map(np.array, (decay * k_plus, decay * k_minus, eta**2 * m_plus, eta**2 * m_minus)))
    lam = float(distance(x, y))
    steps = float(relaxation_steps(np.array(k_plus), np.array(k_minus), x, y))
    assert steps > 0

    def speed(_: float, state: np.ndarray) -> list[float]:
        a = math.exp(2 * state[0])
        charge = a * k_plus - k_minus / a
        noise = m_plus / a - a * m_minus
        drift = -decay * charge + eta**2 * noise
        return [drift / (2 * (a * k_plus + k_minus / a))]

    end = integrate.solve_ivp(speed, (0, steps), [0.0], rtol=1e-10, atol=1e-13, method="LSODA").y[0, -1]
    assert end == pytest.approx(lam * (1 - math.exp(-1)), rel=1e-5, abs=1e-9)


def test_relaxation_at_the_equilibrium_is_the_limit() -> None:
    one = np.array(1.0)
    near = relaxation_steps(one, one, 0.01 * one, 0.01 * np.exp(4e-4) * one)
    exact = relaxation_steps(one, one, 0.01 * one, 0.01 * one)
    assert float(exact) == pytest.approx(float(near), rel=1e-3)
    assert float(exact) == pytest.approx(100.0)


def test_no_finite_equilibrium_is_not_a_number() -> None:
    zero, one = np.array(0.0), np.array(1.0)
    assert np.isnan(distance(zero, one))
    assert np.isnan(distance(one, zero))
    assert np.isnan(relaxation_steps(one, one, zero, one))


def test_estimates_agree_with_moments_of_the_minibatch_gradient() -> None:
    """At frozen weights the running drive tends to `sum sign E[dX dX^T]`, and distance to that of the exact forces."""
    model = mlp()
    eta, w = 1e-30, 3e-31
    optimizer = torch.optim.SGD(model.parameters(), lr=eta, weight_decay=w)
    syms = mlp_symmetries(model)
    ledger = Ledger(model, optimizer, syms, estimate_every=1, every=1)
    assert ledger.estimator is not None
    ledger.estimator.memory = 0.995
    ledger.attach()
    grams: dict[str, list[list[torch.Tensor]]] = {s.name: [] for s in syms}
    for batch in batches(600):
        optimizer.zero_grad()
        backward(model, batch)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for s in syms:
            grams[s.name].append([_diagonal(s, g) for g in s.grams(gradients)])
        optimizer.step()
    rows = {r["symmetry"]: r for r in ledger.estimates()[-len(syms) :]}
    weights = 0.995 ** torch.arange(599, -1, -1, dtype=torch.float64)
    theta = {n: p.detach() for n, p in model.named_parameters()}
    for s in syms:
        legs = [
            sum(a * g for a, g in zip(weights, series, strict=True)) / weights.sum()
            for series in zip(*grams[s.name], strict=True)
        ]
        signs = [leg.sign for leg in s.weight_legs]
        drive = sum(sign * m.sum() for sign, m in zip(signs, legs, strict=True))
        assert rows[s.name]["drive"] == pytest.approx(float(drive), rel=1e-9)
        assert rows[s.name]["check"] < 1e-13
        assert math.isnan(rows[s.name]["mean_share"])
        k = [_diagonal(s, x) for x in s.grams(theta)]
        side = lambda values, sign: sum(v for v, t in zip(values, signs, strict=True) if t == sign)  # noqa: B023
        x = w / eta * 2 * side(k, 1) + side(legs, -1)
        y = w / eta * 2 * side(k, -1) + side(legs, 1)
        lam = (0.25 * torch.log(y / x)).abs().cpu().numpy()
        assert rows[s.name]["distance"] == pytest.approx(float(np.median(lam)), rel=1e-9)
        assert rows[s.name]["distance_max"] == pytest.approx(float(lam.max()), rel=1e-9)
        assert rows[s.name]["at_infinity"] == 0


def test_the_charge_is_the_norm_over_coordinates_as_in_the_flow() -> None:
    """Torus and general_linear alike; the signed sum is `charge_sum`."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    syms = mlp_symmetries(model)
    assert {s.kind for s in syms} >= {"diagonal", "general_linear"}
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    with Ledger(model, optimizer, syms, estimate_every=1, every=1) as ledger:
        backward(model, batches(1)[0])
        optimizer.step()
    for row, s in zip(ledger.estimates(), syms, strict=True):
        charge = s.charge(theta)
        total = charge.sum() if s.is_torus else charge.diagonal(dim1=-2, dim2=-1).sum()
        assert row["charge"] == pytest.approx(float(charge.norm()), rel=1e-12)
        assert row["charge_sum"] == pytest.approx(float(total), rel=1e-9, abs=1e-12)


def _full_batch(options: dict[str, Any], steps: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Estimates of full-batch steps at weights that hardly move, and the solver's `|lam*|` per coordinate there."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(64, 6, dtype=torch.float64), torch.randint(3, (64,))
    syms = nf.find_symmetries(model, x[:2])
    lr, w = 1e-9, 1e-10
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=w, **options)
    with Ledger(model, optimizer, syms, estimate_every=1, every=1) as ledger:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    loss = lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")
    moments = nf.gradient_moments(model, loss, [(x, y)], syms)
    sgd = nf.SGDConfig(lr, 64, weight_decay=w, dataset_size=64, **options)
    eq = nf.noise_equilibrium(model, syms, moments, sgd, joint=False)
    return ledger.estimates(), np.concatenate([s.element.log().abs().cpu().numpy() for s in eq])


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}], ids=lambda o: "-".join(o) or "plain"
)
def test_distance_is_the_solvers_whatever_the_momentum(options: dict[str, Any]) -> None:
    """A full batch has a mean gradient and no noise: momentum counts it 19 times as much as noise at m = 0.9."""
    rows, lam = _full_batch(options, 25)
    assert rows[-1]["distance"] == pytest.approx(float(np.median(lam)), rel=1e-5)
    assert rows[-1]["distance_max"] == pytest.approx(float(lam.max()), rel=1e-5)
    if options:
        assert rows[-1]["mean_share"] == pytest.approx(1, rel=1e-6)


def test_a_row_says_where_one_minibatch_cannot_tell_noise_from_mean_gradient() -> None:
    rows, lam = _full_batch({"momentum": 0.9}, 30)
    unknown = [math.isnan(r["mean_share"]) for r in rows]
    assert unknown == sorted(unknown, reverse=True)
    assert 15 < sum(unknown) < 25
    assert rows[0]["distance"] != pytest.approx(float(np.median(lam)), rel=1e-2)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_distance_from_a_filled_buffer_is_that_of_the_state_identity(dampening: float) -> None:
    """Heavy ball: the charge drifts by `lr^2 (1 + m) / (1 - m) b^T A b`, however the gradients are correlated."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30, momentum=0.9, dampening=dampening)
    syms = mlp_symmetries(model)
    for batch in batches(400):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    with Ledger(model, optimizer, syms, estimate_every=1, every=1) as ledger:
        buffers = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
        optimizer.step()
    for row, s in zip(ledger.estimates(), syms, strict=True):
        push = {1: torch.tensor(0.0), -1: torch.tensor(0.0)}
        for leg, gram in zip(s.weight_legs, s.grams(buffers), strict=True):
            push[leg.sign] = push[leg.sign] + _diagonal(s, gram)
        lam = (0.25 * torch.log(push[1] / push[-1])).abs()
        expected = float(np.median(lam[lam.isfinite()].cpu().numpy()))
        assert row["distance"] == pytest.approx(expected, rel=1e-6)


def _diagonal(s: nf.Symmetry, gram: torch.Tensor) -> torch.Tensor:
    """Row sums for a torus, the trace of each block for general_linear."""
    return gram if s.is_torus else gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def test_a_dead_neuron_has_no_finite_equilibrium() -> None:
    model = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10)).double()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias.copy_(torch.tensor([-1.0, 9.0, 9.0, 9.0]))
        model[2].weight[:, 0] = 0
    syms = nf.declare(model, "diagonal", [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = Ledger(model, optimizer, syms, estimate_every=1, every=1).attach()
    backward(model, batches(1)[0])
    optimizer.step()
    (row,) = ledger.estimates()
    assert row["at_infinity"] == 0.25
    assert math.isfinite(row["distance"])


def test_angle_is_exact() -> None:
    rng = np.random.default_rng(0)
    theta, u = rng.normal(size=(2, 50))
    after = theta - 0.01 * u
    cosine = theta @ after / np.linalg.norm(theta) / np.linalg.norm(after)
    found = angle(np.array(theta @ theta), np.array(theta @ u * 0.01), np.array(u @ u * 1e-4))
    assert float(found) == pytest.approx(math.acos(cosine), rel=1e-6)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "dampening", "adamw"])
def test_rotation_settles_at_the_prediction(name: str) -> None:
    """A scale-invariant weight under pure noise: gradients orthogonal to it, of size one over its norm."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(400, dtype=torch.float64))
    model = nn.ParameterDict({"weight": weight})
    syms = nf.declare(model, "scalar", [("weight", 0)], family="one-sided")
    kinds = {
        "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.02}),
        "momentum": (torch.optim.SGD, {"lr": 0.02, "weight_decay": 0.02, "momentum": 0.9}),
        "nesterov": (torch.optim.SGD, {"lr": 0.02, "weight_decay": 0.02, "momentum": 0.9, "nesterov": True}),
        "dampening": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.02, "momentum": 0.9, "dampening": 0.5}),
        "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.99)}),
    }
    kind, options = kinds[name]
    optimizer = kind([weight], **options)
    ledger = Ledger(model, optimizer, syms, estimate_every=1, capacity=4000, every=1).attach()
    for _ in range(4000):
        noise = torch.randn_like(weight)
        w = weight.detach()
        weight.grad = (noise - w * (w @ noise) / (w @ w)) / w.norm()
        optimizer.step()
    rows = ledger.estimates()[2000:]
    measured = np.array([r["angular"] for r in rows])
    exact = 1e-2 if name == "adamw" else 1e-6  # Adam's counts how uneven its average squares are: a little, by chance
    assert rows[0]["angular_predicted"] == pytest.approx(ledger.rule.rotation(_settings(ledger)), rel=exact)
    assert measured.mean() == pytest.approx(rows[0]["angular_predicted"], rel=0.03)
    assert rows[-1]["effective_lr"] == pytest.approx(
        options["lr"] / rows[-1]["norm"] ** (0.5 if name == "adamw" else 1)
    )
    if name == "sgd":
        size = np.array([r["growth"] for r in rows]).mean()
        assert size == pytest.approx(2 * options["lr"] * options["weight_decay"], rel=0.05)


def _settings(ledger: Ledger) -> StepSettings:
    optimizer = ledger.optimizer
    return ledger.rule.settings(optimizer.param_groups[0], next(iter(optimizer.state.values()), {}), 10)


def test_rotation_is_not_predicted_where_there_is_no_formula() -> None:
    group = torch.optim.Adam([nn.Parameter(torch.ones(1))], weight_decay=0.1).param_groups[0]
    rule = AdamRule()
    assert math.isnan(rule.rotation(rule.settings(group, {}, 0)))
    assert math.isnan(RealisedRule().rotation(RealisedSettings(0.1, 0.0)))
    plain = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1).param_groups[0]
    assert SGDRule().rotation(SGDRule().settings(plain, {}, 0)) == 0


def test_the_last_estimate_is_of_the_weights_that_the_run_ended_with() -> None:
    """Norm and charge from the final weights; drive and distance from the gradients of steps 0 and 4 (memory 0.9)."""
    model = mlp()
    eta, w = 0.05, 0.01
    optimizer = torch.optim.SGD(model.parameters(), lr=eta, weight_decay=w)
    syms = mlp_symmetries(model)
    squares: dict[str, list[list[torch.Tensor]]] = {s.name: [] for s in syms}
    with Ledger(model, optimizer, syms, estimate_every=4, every=1) as ledger:
        for k, batch in enumerate(batches(7)):
            optimizer.zero_grad()
            backward(model, batch)
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            if k in (0, 4):
                for s in syms:
                    squares[s.name].append([_diagonal(s, g) for g in s.grams(gradients)])
            optimizer.step()
        optimizer.zero_grad()
    rows = ledger.estimates()
    assert sorted({r["step"] for r in rows}) == [0, 4, 7]
    theta = {n: p.detach() for n, p in model.named_parameters()}
    for row, s in zip(rows[-len(syms) :], syms, strict=True):
        legs = [(0.09 * a + 0.1 * b) / 0.19 for a, b in zip(*squares[s.name], strict=True)]
        weight = [_diagonal(s, x) for x in s.grams(theta)]
        signs = [leg.sign for leg in s.weight_legs]
        side = lambda values, sign: sum(v for v, t in zip(values, signs, strict=True) if t == sign)  # noqa: B023
        assert row["symmetry"] == s.name
        assert row["norm"] == pytest.approx(float(sum(x.sum() for x in weight)), rel=1e-12)
        assert row["charge_sum"] == pytest.approx(
            float((side(weight, 1) - side(weight, -1)).sum()), rel=1e-9, abs=1e-12
        )
        assert row["drive"] == pytest.approx(float((side(legs, 1) - side(legs, -1)).sum()), rel=1e-9)
        pull = w / eta * (2 - eta * w)
        x, y = pull * side(weight, 1) + side(legs, -1), pull * side(weight, -1) + side(legs, 1)
        lam = (0.25 * torch.log(y / x)).abs().cpu().numpy()
        assert row["distance"] == pytest.approx(float(np.median(lam)), rel=1e-9)
        assert all(math.isnan(row[k]) for k in ("check", "growth", "angular"))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_last_estimate_says_what_the_next_one_would(kind: Any) -> None:
    """What needs no gradient equals the estimate of one step more: norms, the rate, Adam's distance from its state."""
    rows = []
    for steps in (7, 8):
        model = mlp()
        optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0.1)
        with Ledger(model, optimizer, mlp_symmetries(model), estimate_every=7, every=1) as ledger:
            for batch in batches(steps):
                optimizer.zero_grad()
                backward(model, batch)
                optimizer.step()
        rows.append({r["symmetry"]: r for r in ledger.estimates() if r["step"] == 7})
        layers = [r for r in ledger.layers() if r["step"] == 7]
        assert len(layers) > 1
        rows[-1] |= {f"layer {r['layer']}": {"norm": r["norm"]} for r in layers}
    same = ["norm", "charge", "charge_sum", "effective_lr"]
    same += ["distance", "distance_max", "steps", "persistence"] if kind is torch.optim.AdamW else []
    assert rows[0].keys() == rows[1].keys()
    for name, ended in rows[0].items():
        for column in [k for k in same if k in ended]:
            assert ended[column] == pytest.approx(rows[1][name][column], rel=1e-9, nan_ok=True), (name, column)


def test_weights_written_to_after_the_last_step_are_not_estimated() -> None:
    """As where the best checkpoint is loaded before the ledger is closed; and nothing is added after one step."""
    for edited, steps, expected in [(False, 3, [0, 3]), (True, 3, [0]), (False, 1, [0])]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with Ledger(model, optimizer, mlp_symmetries(model), estimate_every=10, every=1) as ledger:
            for batch in batches(steps):
                backward(model, batch)
                optimizer.step()
            if edited:
                with torch.no_grad():
                    model[0].weight.mul_(2)
        assert sorted({r["step"] for r in ledger.estimates()}) == expected
