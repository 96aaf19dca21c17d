"""Forecasts of charges that are very small against others of the same symmetry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

import noetherflow as nf
from equilibrium_cases import linear, mlp
from noetherflow.equilibrium import flow as flow_module
from noetherflow.equilibrium import forecast
from noetherflow.equilibrium.forecast import orbit_forecast
from noetherflow.equilibrium.orbit import measured_orbit
from noetherflow.equilibrium.potential import Drift, Potential
from noetherflow.errors import DataError


@pytest.mark.parametrize("size", [1e-5, 1e-7])
def test_a_tiny_neuron_follows_its_own_scalar_equation(size: float) -> None:
    """`C(p) = p^2 K+ - K- / p^2`, `dC/dk = lr^2 (M+ / p^2 - p^2 M-)` of one neuron, integrated by itself."""
    problem, sgd, steps = mlp((4, 6, 3)), nf.SGDConfig(0.05, 4), [0, 50, 500]
    with torch.no_grad():
        for tensor in (problem.model[0].weight[2], problem.model[0].bias[2], problem.model[2].weight[:, 2]):
            tensor *= size
    moments, (s,) = problem.measure(), problem.syms
    *k_plus, k_minus = (k.detach()[2] for k in s.grams(problem.tensors()))
    *m_plus, m_minus = (sgd.lr**2 * m[2] for m in moments.batch_grams(s, sgd))
    a, b, up, down = (float(v) / size**2 for v in (sum(k_plus), k_minus, sum(m_plus), m_minus))

    def rate(_: float, log_p: np.ndarray) -> np.ndarray:
        p2 = np.exp(2 * log_p)
        return (up / p2 - p2 * down) / (2 * (p2 * a + b / p2))

    p2 = np.exp(2 * solve_ivp(rate, (0, 500), [0.0], t_eval=steps, rtol=1e-10, atol=1e-12).y[0])
    orbit = measured_orbit(problem.model, [s], moments, Potential.of(Drift.of(sgd), moments, sgd))
    charges = orbit_forecast(orbit, steps)[s.name][:, 2] / size**2
    np.testing.assert_allclose(charges.numpy(), p2 * a - b / p2, rtol=1e-5)
    assert abs(float(charges[2] - charges[0])) > 0.1 * abs(float(charges[0]))


def test_blocks_of_different_size_move_as_if_they_were_separate_symmetries() -> None:
    problem, sgd, steps = linear((5, 4, 4)), nf.SGDConfig(0.01, 4), [0, 20, 200]
    with torch.no_grad():
        problem.model[0].weight[2:] *= 1e-8
        problem.model[1].weight[:, 2:] *= 1e-8
    rows = torch.arange(4).reshape(2, 2, 1).numpy()

    def charges(blocks: list[list[int]]) -> torch.Tensor:
        symmetries = [
            nf.Symmetry(
                f"{i}",
                "blocks",
                "general_linear",
                (nf.Leg("0.weight", rows[i], 1, (0,)), nf.Leg("1.weight", rows[i], -1, (1,))),
            )
            for i in blocks
        ]
        moments = type(problem)(problem.model, nf.SymmetrySet(tuple(symmetries)), problem.data).measure()
        orbit = measured_orbit(problem.model, symmetries, moments, Potential.of(Drift.of(sgd), moments, sgd))
        forecast = orbit_forecast(orbit, steps)
        return torch.cat([forecast[s.name] for s in symmetries], dim=1)

    together, apart = charges([[0, 1]]), charges([[0], [1]])
    for block in (0, 1):
        torch.testing.assert_close(together[:, block], apart[:, block], rtol=1e-5, atol=0)
        change = torch.linalg.matrix_norm(apart[2, block] - apart[0, block])
        assert float(change) > 0.1 * float(torch.linalg.matrix_norm(apart[0, block]))


def test_a_forecast_ends_where_its_evaluations_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow too fast to be followed: the steps reached are those of a whole forecast, and what is missing is said."""
    model, syms, moments = _too_fast()
    flow = nf.noether_flow(model, syms, moments, nf.SGDConfig(0.05, 4))
    whole = flow.forecast([0, 1, 5, 10**9])
    monkeypatch.setattr(forecast, "EVALUATIONS", 40)
    found = flow.forecast([0, 1, 5, 10**9])
    assert found.steps == whole.steps[: len(found.steps)]
    assert 1 <= len(found.steps) < 4
    assert found.asked == 10**9
    assert not found.errors
    assert f"STOPPED at step {found.steps[-1]} of 1,000,000,000" in str(found)
    for name, charge in found.charges.items():
        torch.testing.assert_close(charge, whole.charges[name][: len(found.steps)])
    with pytest.raises(DataError, match=r"not one of the steps \[1000000000\] was reached"):
        flow.forecast([10**9])
    assert whole.asked == 0
    assert "STOPPED" not in str(whole)


def test_errors_are_left_out_where_a_group_is_too_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, syms, moments = _too_fast()
    flow = nf.noether_flow(model, syms, moments, nf.SGDConfig(0.05, 4))
    assert flow.forecast([0, 100]).errors
    monkeypatch.setattr(flow_module.Flow, "_charges", lambda self, at, m: _refused())
    assert not flow.forecast([0, 100]).errors


def _refused() -> dict[str, torch.Tensor]:
    raise forecast.TooFast


def _too_fast() -> tuple[nn.Module, nf.SymmetrySet, nf.GradientMoments]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    syms = nf.find_symmetries(model, x[:2])
    return model, syms, nf.gradient_moments(model, lambda m, b: m(b).square().sum(1), list(x.split(8)), syms)
