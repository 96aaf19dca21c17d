"""The velocity along the orbit of tori, by one matrix and term by term."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.equilibrium import velocity
from noetherflow.equilibrium.orbit import measured_orbit
from noetherflow.equilibrium.potential import Drift, Potential


@pytest.mark.parametrize("convolutions", [False, True])
def test_the_matrix_of_tori_is_their_slope(monkeypatch: pytest.MonkeyPatch, convolutions: bool) -> None:
    """Columns of the matrix are what generators of one coordinate do; the velocity is the same by both ways."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    if convolutions:
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2)
        ).double()
    x = torch.randn(40, 3, 5, 5, dtype=torch.float64) if convolutions else torch.randn(40, 3, dtype=torch.float64)
    syms, sgd = nf.find_symmetries(net, x[:2]), nf.SGDConfig(0.1, 8, weight_decay=0.01)
    moments = nf.gradient_moments(net, lambda m, b: (m(b) - 1).square().sum(1), [x], syms, entries=True)
    orbit = measured_orbit(net, tuple(syms), moments, Potential.of(Drift.of(sgd), moments, sgd))
    elements = [torch.rand(s.shape, dtype=torch.float64) + 0.5 for s in syms]
    slopes = [term.slope_at(elements) for term in orbit.terms]
    blank = [torch.zeros(s.shape, dtype=torch.float64) for s in syms]
    matrix = velocity.torus_matrix(slopes, blank)
    assert matrix is not None
    columns = []
    for i, zero in enumerate(blank):
        for j in range(len(zero)):
            unit, out = [b.clone() for b in blank], [b.clone() for b in blank]
            unit[i][j] = 1.0
            for term in orbit.terms:
                term.slope(elements, unit, out)
            columns.append(torch.cat(out))
    torch.testing.assert_close(matrix, torch.stack(columns, 1), rtol=1e-12, atol=1e-13)
    assert int((matrix != 0).sum()) > len(matrix), "symmetries meet"
    fast = velocity.orbit_velocity(orbit, elements)
    monkeypatch.setattr(velocity, "DENSE", 0)
    for a, b in zip(fast, velocity.orbit_velocity(orbit, elements), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
