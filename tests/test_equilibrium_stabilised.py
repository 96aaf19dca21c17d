"""The stabilised integrator against exact solutions and against LSODA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import noetherflow as nf
from equilibrium_cases import linear, mlp
from noetherflow.equilibrium import forecast, stabilised
from noetherflow.equilibrium.orbit import measured_orbit
from noetherflow.equilibrium.potential import Drift, Potential


@pytest.mark.parametrize("fastest", [10.0, 1e3, 1e5])
def test_linear_decay_at_many_rates(fastest: float) -> None:
    """`dy/dt = -Q diag(rates) Q^T (y - end)`, solved exactly; evaluations grow with the root of `T * fastest`."""
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    rates, end, start = np.geomspace(0.1, fastest, 40), rng.normal(size=40), rng.normal(size=40)
    calls = 0

    def velocity(y: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return -q @ (rates * (q.T @ (y - end)))

    times = [0, 0.01, 1, 30]
    found = stabilised.integrate(velocity, start, times, 1e-6, np.full(40, 1e-6))
    exact = [end + q @ (np.exp(-rates * t) * (q.T @ (start - end))) for t in times]
    np.testing.assert_allclose(found, exact, atol=1e-4)
    np.testing.assert_array_equal(found[0], start)
    assert calls < 3000 + 20 * (times[-1] * fastest) ** 0.5


def test_order_two_in_the_tolerance() -> None:
    """`y' = -y^2`, `y = 1 / (1 + t)`: the error falls in proportion to tolerance^(2/3)."""
    errors = []
    for tolerance in (1e-4, 1e-7):
        (y,) = stabilised.integrate(lambda y: -(y**2), np.ones(1), [5.0], tolerance, np.full(1, tolerance))
        errors.append(abs(float(y[0]) - 1 / 6))
    assert errors[1] < errors[0] / 30
    assert errors[1] < 1e-5


@pytest.mark.parametrize(
    "problem", [mlp((4, 6, 3)), linear((5, 4, 4)), mlp((4, 6, 5, 3))], ids=["torus", "GL", "two tori"]
)
def test_forecasts_of_large_states_agree_with_the_dense_method(
    problem: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    sgd, steps = nf.SGDConfig(0.05, 4), [0, 10, 3000]
    moments = problem.measure()
    orbit = measured_orbit(problem.model, list(problem.syms), moments, Potential.of(Drift.of(sgd), moments, sgd))
    dense = forecast.orbit_forecast(orbit, steps)
    monkeypatch.setattr(forecast, "DENSE", 0)
    explicit = forecast.orbit_forecast(orbit, steps)
    for name, charge in dense.items():
        size = float(charge.abs().max())
        torch.testing.assert_close(explicit[name], charge, rtol=0, atol=5e-4 * size)
        assert float((charge[2] - charge[0]).abs().max()) > 0.1 * size


def test_no_short_enough_step_is_reported() -> None:
    with pytest.raises(ArithmeticError, match="no step is short enough"):
        stabilised.integrate(lambda y: np.where(y > 0, -1 / y, np.nan), np.ones(3), [10.0], 1e-5, np.full(3, 1e-5))
    with pytest.raises(ArithmeticError, match="not a finite number"):
        stabilised.integrate(lambda y: y * np.nan, np.ones(3), [1.0], 1e-5, np.full(3, 1e-5))


def test_an_endless_integration_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stabilised, "EVALUATIONS", 50)
    with pytest.raises(ArithmeticError, match="not done after 50 evaluations"):
        stabilised.integrate(lambda y: -1e8 * y, np.ones(3), [1e6], 1e-9, np.full(3, 1e-12))
