"""What single experiments compute and judge, against direct calculations."""

import numpy as np
import pytest
import torch

from noetherflow.reproduce.alignment import correlation, matrices, noisy_share, norm_balanced
from noetherflow.reproduce.experiment import Results
from noetherflow.reproduce.experiments import fig1, fig5, thm43

F64 = torch.float64


def test_alignment_of_norm_balanced_and_of_noise_balanced_factors():
    d, variance, width = 6, 5.0, 9
    variances = torch.ones(d, dtype=F64)
    variances[0] = variance
    rows = torch.linalg.qr(torch.randn(width, d, dtype=F64, generator=torch.Generator().manual_seed(1))).Q.mT
    balanced = [rows.mT[None], rows[None]]
    a, b = matrices(balanced, variances)
    expected = norm_balanced(d, variance)
    assert float(correlation(a, b)) == pytest.approx(expected[0], rel=1e-12)
    assert float(noisy_share(balanced, a, b)) == pytest.approx(expected[1], rel=1e-12)
    root = variances**0.25
    aligned = [(rows.mT * root)[None], (rows / root[:, None])[None]]
    a, b = matrices(aligned, variances)
    assert float(correlation(a, b)) == pytest.approx(1, rel=1e-12)
    assert float(noisy_share(aligned, a, b)) == pytest.approx(1, rel=1e-12)


def test_an_orbit_without_equilibrium_fails_its_claims_and_stops_nothing():
    config = {**thm43.SCALES["quick"], "networks": 1, "generators": 1, "samples": 8, "grid": 3, "decay": 0.0}
    lost = thm43.compute(config, {"name": "scale-invariant"})
    row = lost["rows"][0]
    assert row["root"] is None
    kept = {**lost, "rows": [{**row, "root": 0.5, "ends": [0.5, 0.51], "shifts": [1e-3, 2e-3]}]}
    results = Results(config, (({"name": "kept"}, kept), ({"name": "lost"}, lost)))
    exists, attraction = thm43.verdicts(results)[2:4]
    assert not exists.holds
    assert exists.measured == 0.5
    assert attraction.measured == pytest.approx(0.01)
    thm43.plot(results)


def test_fig5_counts_learned_directions_and_compares_starts_at_one_rate():
    points = {p["name"]: p for p in fig5.points(fig5.SCALES["quick"])}
    for name in ("sgd", "gaussian"):
        near, half = points[name + fig5.NEAR], points[name + fig5.HALF]
        assert near["start"] == half["start"]
        assert near["lr"] == points[name]["lr"] == 2 * half["lr"]
        assert near["lr"] * near["steps"] == half["lr"] * half["steps"]
    singular = np.broadcast_to([[2.0, 0.9, 0.1], [2.0, 1.1, 0.9]], (8, 2, 3)).tolist()
    data = (({"name": "theory"}, {"singular": [2.0, 1.0, 0.5]}), ({"name": "sgd"}, {"singular": singular}))
    assert fig5.learned(Results({}, data), "sgd") == 2.5


def test_fig1_orders_of_gd_growth():
    config = {**fig1.SCALES["quick"], "lrs": [0.02, 0.01]}
    found = fig1.compute(config, {"name": "orders", "method": "orders"})
    angle = torch.tensor(2.2, dtype=F64)
    for rate, step, whole in zip(config["lrs"], found["step"], found["fixed_time"], strict=True):
        theta = torch.stack([angle.cos(), angle.sin()])
        first = None
        for _ in range(round(fig1.TIME / rate)):
            unit = theta / theta.norm()
            theta = theta - rate * 2 * (unit[0] * unit - torch.tensor([1.0, 0.0], dtype=F64)) / theta.norm()
            first = first or float(theta.square().sum() - 1)
        assert step == pytest.approx(first, rel=1e-6)
        assert whole == pytest.approx(float(theta.square().sum() - 1), rel=1e-6)
