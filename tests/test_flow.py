"""The Noether flow: exact step identity, expected drift against simulation, forecasts, time scales."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import noetherflow as nf
from equilibrium_cases import Problem, linear, mlp, moved
from noetherflow.equilibrium import Drift, noise_equilibrium
from noetherflow.equilibrium.flow import noether_flow
from noetherflow.equilibrium.step import step_identity
from noetherflow.errors import MomentError
from noetherflow.moments import gradient_factors
from noetherflow.moments.result import merge_moments
from reference import moments_by_loop, per_sample_gradients


def leaves(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in nf.tensors_of(model).items()}


@pytest.mark.parametrize("family", ["torus", "general_linear"])
def test_step_identity_over_200_steps(family: str) -> None:
    """`C' = (1 - eta w)^2 C + eta^2 g^T A g` at every one of 200 SGD steps with decay."""
    problem = mlp((6, 8, 7, 3)) if family == "torus" else linear((5, 4, 3))
    sgd = nf.SGDConfig(0.01, 8, weight_decay=0.05)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=sgd.lr, weight_decay=sgd.weight_decay)
    rng = torch.Generator().manual_seed(0)
    x, y = problem.data
    worst = gradient = drift = 0.0
    for _ in range(200):
        pick = torch.randint(len(x), (sgd.batch_size,), generator=rng)
        optimizer.zero_grad()
        problem.loss(problem.model, (x[pick], y[pick])).mean().backward()
        before = leaves(problem.model)
        gradients = {n: p.grad.clone() for n, p in problem.model.named_parameters() if p.grad is not None}
        optimizer.step()
        after = leaves(problem.model)
        for s in problem.syms:
            step = step_identity(s, before, gradients, after, sgd)
            worst = max(worst, step.relative_residual)
            gradient = max(gradient, float(step.gradient.abs().max()) / step.scale)
            drift = max(drift, float((step.decay + step.noise).abs().max()) / step.scale)
    assert worst < 1e-12
    assert gradient < 1e-12
    assert drift > 1e-5


def test_step_identity_fails_where_the_symmetry_does() -> None:
    problem = mlp((4, 5, 3))
    wrong = nf.declare(problem.model, "diagonal", [("0.weight", 0)], [("2.weight", 1)])
    sgd = nf.SGDConfig(0.1, 40)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=sgd.lr)
    problem.loss(problem.model, problem.data).mean().backward()
    before = leaves(problem.model)
    gradients = {n: p.grad.clone() for n, p in problem.model.named_parameters() if p.grad is not None}
    optimizer.step()
    step = step_identity(wrong[0], before, gradients, leaves(problem.model), sgd)
    assert step.relative_residual > 1e-4


def grouped(problem: Problem, groups: int = 8) -> nf.GradientMoments:  # type: ignore[name-defined]
    return in_groups(problem, [len(problem.data[0]) // groups] * groups)


def in_groups(problem: Problem, sizes: list[int]) -> nf.GradientMoments:  # type: ignore[name-defined]
    x, y = (v[: sum(sizes)].split(sizes) for v in problem.data)
    parts = [moments_by_loop(problem.model, problem.loss, [batch], problem.syms) for batch in zip(x, y, strict=True)]
    return dataclasses.replace(merge_moments(parts), groups=tuple(parts))


@pytest.mark.parametrize("replacement", [True, False])
def test_expected_drift_is_the_mean_of_real_steps(replacement: bool) -> None:
    """Many independent SGD steps from one point, with and without replacement: mean change within 4 standard errors."""
    problem = mlp((4, 5, 3), samples=40)
    sgd = nf.SGDConfig(0.02, 8, weight_decay=0.1, dataset_size=40, replacement=replacement)
    row = noether_flow(problem.model, problem.syms, problem.measure(), sgd).details[0]
    params = leaves(problem.model)
    s = problem.syms[0]
    x, y = problem.data
    gradient = torch.func.grad(
        lambda p, a, b: (torch.func.functional_call(problem.model, p, (a,)) - b).square().sum(1).mean()
    )
    rng = torch.Generator().manual_seed(0)
    trials = 4000
    picks = torch.stack(
        [
            torch.randint(40, (8,), generator=rng) if replacement else torch.randperm(40, generator=rng)[:8]
            for _ in range(trials)
        ]
    )
    batch = torch.func.vmap(gradient, in_dims=(None, 0, 0))(params, x[picks], y[picks])
    new = {n: params[n] - sgd.lr * (batch[n] + sgd.weight_decay * params[n]) for n in params}
    changes = torch.func.vmap(s.charge)(new) - s.charge(params)
    error = changes.std(0) / trials**0.5
    assert float(((changes.mean(0) - row.drift).abs() / error).max()) < 4
    assert float((row.noise / error).abs().max()) > 10, "the noise part must matter"
    assert float((row.decay / error).abs().max()) > 10, "so must decay"


def test_drift_with_replacement_is_the_mean_over_every_draw() -> None:
    """All `6^3` minibatches of a data set measured whole; without the data set's size the drift differs."""
    problem = mlp((3, 4, 2), samples=6)
    sgd = nf.SGDConfig(0.05, 3, weight_decay=0.1, dataset_size=6, replacement=True)
    s, params, moments = problem.syms[0], leaves(problem.model), problem.measure()
    singles = per_sample_gradients(problem.model, problem.loss, problem.data)
    draws = torch.cartesian_prod(*[torch.arange(6)] * 3)
    batch = {n: torch.stack([g[n] for g in singles])[draws].mean(1) for n in params}
    new = {n: p - sgd.lr * (batch[n] + sgd.weight_decay * p) for n, p in params.items()}
    mean = (torch.func.vmap(s.charge)(new) - s.charge(params)).mean(0)
    row = noether_flow(problem.model, problem.syms, moments, sgd).details[0]
    torch.testing.assert_close(row.drift, mean, rtol=1e-10, atol=1e-14)
    fresh = dataclasses.replace(sgd, dataset_size=None, replacement=False)
    other = noether_flow(problem.model, problem.syms, moments, fresh).details[0]
    torch.testing.assert_close(row.drift - other.drift, row.noise * 2 / 5, rtol=1e-10, atol=1e-14)


def test_momentum_coefficients_against_their_series() -> None:
    """`E[Delta C]` of heavy ball and Nesterov, by sums over the past of white and of constant gradients."""
    for m in (0.0, 0.5, 0.9):
        for nesterov in (False, True):
            drift = Drift.of(nf.SGDConfig(0.1, 1, momentum=m, nesterov=nesterov))
            powers = m ** torch.arange(2000, dtype=torch.float64)
            update = powers * m + (torch.arange(2000) == 0) if nesterov else powers
            white = _drift_of_updates(powers, update, m, nesterov, constant=False)
            steady = _drift_of_updates(powers, update, m, nesterov, constant=True)
            assert drift.noise == pytest.approx(0.01 * white, rel=1e-9)
            assert drift.mean == pytest.approx(0.01 * steady, rel=1e-9)


def _drift_of_updates(v: torch.Tensor, u: torch.Tensor, m: float, nesterov: bool, constant: bool) -> float:
    """`u^T A u + 2 m' sum_j (m^j) u^T A v`: the recursion `q' = m q - eta u^T A v` of `q = theta^T A v`, summed."""

    def product(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a.sum() * b.sum()) if constant else float((a * b).sum())

    q = -product(u, v) / (1 - m)
    first = m * m * q if nesterov else m * q
    return product(u, u) - 2 * first


@pytest.mark.parametrize("family", ["torus", "general_linear"])
def test_forecast_starts_with_the_drift_and_ends_at_the_equilibrium(family: str) -> None:
    problem = mlp((5, 6, 6, 3), (2, 1, 0.7)) if family == "torus" else linear((5, 3, 4))
    sgd = nf.SGDConfig(0.01, 4, weight_decay=0.02)
    moments = problem.measure()
    flow = noether_flow(problem.model, problem.syms, moments, sgd)
    forecast = flow.forecast([0, 1, 300_000])
    eq = noise_equilibrium(problem.model, problem.syms, moments, sgd)
    assert forecast.joint
    for row in flow.details:
        charges = forecast.charges[row.name]
        torch.testing.assert_close(charges[0], row.charge, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(charges[1] - charges[0], row.drift, rtol=2e-2, atol=1e-7)
        if family == "torus":
            torch.testing.assert_close(charges[2], eq[row.name].charge, rtol=1e-5, atol=1e-6)
        else:
            spectrum = [torch.linalg.eigvalsh(c) for c in (charges[2], eq[row.name].charge)]
            torch.testing.assert_close(spectrum[0], spectrum[1], rtol=1e-5, atol=1e-6)


def test_forecast_of_a_lone_torus_against_scalar_integration() -> None:
    """`dlam/dk = E[C'-C] / (dC/dlam)` per coordinate, by plain Runge-Kutta steps on formulas written out here."""
    problem = mlp((4, 5, 3))
    (s,) = problem.syms
    sgd = nf.SGDConfig(0.05, 4, weight_decay=0.01)
    moments = problem.measure()
    k1, k2, k3 = s.grams(problem.tensors())
    m1, m2, m3 = moments.batch_grams(s, sgd)
    decay, noise = sgd.lr * sgd.weight_decay * (2 - sgd.lr * sgd.weight_decay), sgd.lr**2

    def slope(lam: torch.Tensor) -> torch.Tensor:
        up, down = (2 * lam).exp(), (-2 * lam).exp()
        plus, minus = (k1 + k2) * up, k3 * down
        drift = -decay * (plus - minus) + noise * ((m1 + m2) * down - m3 * up)
        return drift / (2 * (plus + minus))

    lam, h = torch.zeros(5, dtype=torch.float64), 5.0
    for _ in range(400):
        a = slope(lam)
        b = slope(lam + h / 2 * a)
        c = slope(lam + h / 2 * b)
        lam = lam + h / 6 * (a + 2 * b + 2 * c + slope(lam + h * c))
    expected = (k1 + k2) * (2 * lam).exp() - k3 * (-2 * lam).exp()
    forecast = noether_flow(problem.model, problem.syms, moments, sgd).forecast([2000])
    torch.testing.assert_close(forecast.charges[s.name][0], expected, rtol=1e-6, atol=1e-8)


class Squared(torch.nn.Module):
    """`b relu(a x)^2`: one torus with exponents 1 and -2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)).square())


def squared() -> Problem:
    torch.manual_seed(0)
    model = Squared().double()
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    rows = np.arange(5).reshape(5, 1, 1)
    legs = (nf.Leg("a.weight", rows), nf.Leg("b.weight", rows, -1, (1,), power=2.0))
    return Problem(model, nf.SymmetrySet((nf.Symmetry("hidden", "rescaling", "diagonal", legs),)), (x, y))


PROBLEMS = {"torus": lambda: mlp((4, 5, 3)), "powers": squared, "general_linear": lambda: linear((5, 3, 4))}


@pytest.mark.parametrize("family", PROBLEMS)
def test_relaxation_steps_are_the_decay_time_of_small_deviations(family: str) -> None:
    problem = PROBLEMS[family]()
    sgd = nf.SGDConfig(0.05, 4, weight_decay=0.01)
    eq = noise_equilibrium(problem.model, problem.syms, problem.measure(), sgd)
    at_rest = moved(problem.model, problem.syms, eq.elements)
    (s,) = problem.syms
    row = noether_flow(at_rest, problem.syms, problem.measure(at_rest), sgd).details[0]
    nudge = s.random_element(1e-3, torch.Generator().manual_seed(0))
    near = moved(at_rest, problem.syms, {s.name: nudge})
    flow = noether_flow(near, problem.syms, problem.measure(near), sgd)
    late = float(row.relaxation_steps.max())
    steps = [int(8 * late), int(9 * late)]
    charges = flow.forecast(steps).charges[s.name]
    if family != "general_linear":
        deviation = (charges - row.charge).abs()
        slowest = int(row.relaxation_steps.argmax())
        ratio = float(deviation[1, slowest] / deviation[0, slowest])
    else:
        spectra = torch.linalg.eigvalsh(charges) - torch.linalg.eigvalsh(row.charge)
        ratio = float(spectra[1].norm() / spectra[0].norm())
    assert ratio == pytest.approx(float(torch.tensor(-(steps[1] - steps[0]) / late).exp()), rel=0.05)


def test_phases_sort_symmetries_by_the_length_of_a_training() -> None:
    problem = mlp((4, 5, 4, 3))
    flow = noether_flow(problem.model, problem.syms, problem.measure(), nf.SGDConfig(0.05, 4, weight_decay=0.01))
    times = [r.relaxation_steps for r in flow.details]
    middle = float(times[0].median())
    assert {r["phase"] for r in flow.rows(2 * max(float(t.max()) for t in times))} == {"fast"}
    assert {r["phase"] for r in flow.rows(0.5 * min(float(t.min()) for t in times))} == {"slow"}
    assert flow.rows(middle)[0]["phase"] == "mixed"
    assert "phase" not in flow.rows()[0]


def test_directions_without_equilibrium_are_counted_and_the_forecast_stays_finite() -> None:
    problem = linear((4, 6, 3))
    sgd = nf.SGDConfig(0.01, 4, weight_decay=0.01)
    flow = noether_flow(problem.model, problem.syms, problem.measure(), sgd)
    assert flow.rows()[0]["without_equilibrium"] == 1
    assert flow.rows()[0]["relaxation_steps"] is None
    charges = flow.forecast([0, 1000, 10**6]).charges[problem.syms[0].name]
    assert bool(torch.isfinite(charges).all())
    limit = noise_equilibrium(problem.model, problem.syms, problem.measure(), sgd, recede=1e-4)
    torch.testing.assert_close(
        torch.linalg.eigvalsh(charges[2]), torch.linalg.eigvalsh(limit.settled[0].charge), rtol=1e-3, atol=1e-5
    )


def test_errors_come_from_groups_and_scale_with_the_data() -> None:
    sgd = nf.SGDConfig(0.05, 4, weight_decay=0.01)
    errors = {}
    for samples in (160, 1440):
        problem = mlp((4, 5, 3), samples=samples)
        flow = noether_flow(problem.model, problem.syms, grouped(problem), sgd)
        (row,) = flow.details
        forecast = flow.forecast([0, 500])
        assert row.error is not None
        assert float(forecast.errors[row.name][0].max()) < 1e-12
        errors[samples] = (float(row.error.norm()), float(forecast.errors[row.name][1].norm()))
    for i in range(2):
        assert 1.2 < errors[160][i] / errors[1440][i] < 8


def test_errors_know_the_sizes_of_the_groups() -> None:
    """One group of 900 samples and ten of 30: the drift's error is the deviation of single samples over `sqrt(n)`, and
    errors of forecast and equilibrium are those from 16 groups of 75."""
    problem = mlp((3, 4, 2), samples=1200)
    (s,) = problem.syms
    sgd = nf.SGDConfig(0.05, 4, weight_decay=0.01)
    found = []
    for sizes in ([900] + [30] * 10, [75] * 16):
        moments = in_groups(problem, sizes)
        flow = noether_flow(problem.model, problem.syms, moments, sgd)
        logs = noise_equilibrium(problem.model, problem.syms, moments, sgd, errors=True).settled[0].log_error
        error = flow.details[0].error
        assert error is not None
        assert logs is not None
        found.append(torch.stack([error, flow.forecast([100]).errors[s.name][0], logs]).norm(dim=1))
    singles = torch.stack([s.charge(g) for g in per_sample_gradients(problem.model, problem.loss, problem.data)])
    expected = sgd.lr**2 * sgd.covariance_factor * float(singles.std(0).norm()) / 1200**0.5
    assert float(found[0][0]) == pytest.approx(expected, rel=0.3)
    assert bool(((found[0] / found[1] - 1).abs() < 0.3).all())


def test_data_measured_whole_leave_no_error() -> None:
    """48 of 48 samples at batches of 46: nothing was sampled, though 42 samples could not tell noise from mean."""
    problem = mlp((4, 6, 3), samples=48)
    (s,) = problem.syms
    moments, sgd = in_groups(problem, [6] * 8), nf.SGDConfig(0.05, 46, weight_decay=0.01, dataset_size=48)
    flow = noether_flow(problem.model, problem.syms, moments, sgd)
    eq = noise_equilibrium(problem.model, problem.syms, moments, sgd, errors=True)
    for error in (flow.details[0].error, eq[s.name].log_error, flow.forecast([0, 9]).errors[s.name]):
        assert error is not None
        assert not bool(error.any())


def test_forecast_lasts_when_the_model_moves_on() -> None:
    """Orbits without a group of samples are formed when a forecast asks, from the parameters measured."""
    problem = mlp((3, 4, 3, 2), samples=80)
    moments, sgd = grouped(problem, 4), nf.SGDConfig(0.05, 4, weight_decay=0.01)
    flow = noether_flow(problem.model, problem.syms, moments, sgd)
    references = [noether_flow(problem.model, problem.syms, m, sgd).forecast([20]) for m in moments.leave_one_out()]
    with torch.no_grad():
        problem.model[0].weight.zero_()
    forecast = flow.forecast([20])
    assert flow.forecast([20], errors=False).errors == {}
    for name, error in forecast.errors.items():
        spread = torch.stack([r.charges[name] for r in references]).var(0, correction=0)
        torch.testing.assert_close(error, (3 * spread).sqrt(), rtol=1e-6, atol=1e-12)


def test_forecast_of_meeting_symmetries_by_factors() -> None:
    """A chain of GL symmetries moves jointly only with per-sample gradients, dense or as factors."""
    problem = linear((3, 2, 2, 3), samples=16)
    sgd = nf.SGDConfig(0.02, 4, weight_decay=0.05)
    moments = grouped(problem)
    factors = gradient_factors(problem.model, problem.loss, [problem.data], problem.syms)
    dense = {n: f.dense() for n, f in factors.items()}
    flows = [noether_flow(problem.model, problem.syms, moments, sgd, samples=s) for s in (factors, dense)]
    by_factors, by_samples = (flow.forecast([0, 1, 50]) for flow in flows)
    assert by_factors.joint
    assert by_factors.errors == {}
    for row in flows[0].details:
        charges = by_factors.charges[row.name]
        torch.testing.assert_close(charges[1] - charges[0], row.drift, rtol=5e-2, atol=1e-6)
        torch.testing.assert_close(charges, by_samples.charges[row.name], rtol=1e-6, atol=1e-8)
    alone = noether_flow(problem.model, problem.syms, moments, sgd)
    assert not alone.forecast([1]).joint
    assert alone.forecast([0, 1]).errors
    with pytest.raises(MomentError, match="carry no groups; leave errors out"):
        noise_equilibrium(problem.model, problem.syms, moments, sgd, samples=factors, errors=True)


def test_flow_prints_and_serialises() -> None:
    problem = mlp((4, 5, 4, 3))
    problem.model[0].bias.requires_grad_(False)
    moments = moments_by_loop(mlp((4, 5, 4, 3)).model, problem.loss, [problem.data], problem.syms)
    flow = noether_flow(problem.model, problem.syms, moments, nf.SGDConfig(0.05, 4))
    assert len(flow.details) == 1
    assert "excluded" in str(flow)
    assert json.loads(json.dumps(flow.to_dict()))["sgd"]["lr"] == 0.05
    assert json.loads(json.dumps(flow.forecast([0, 5]).to_dict()))["steps"] == [0, 5]
    assert flow.forecast([3]).rows()[0]["step"] == 3
    with pytest.raises(ValueError, match="increasing"):
        flow.forecast([5, 5])
    with pytest.raises(KeyError, match="no symmetry named"):
        flow["nothing"]
