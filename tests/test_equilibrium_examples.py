"""The studies of docs/equilibrium.md at small size."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def example(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_points_of_one_orbit_differ_until_balanced(capsys: pytest.CaptureFixture[str]) -> None:
    study = example("orbit_points")
    x, y = study.digits()
    data, points, rates = (x[:100], y[:100]), (study.POINTS[0], study.POINTS[3]), (0.02, 0.05)
    before, after = study.study(study.network((64, 12, 12, 10)), data, points, rates, seeds=2, steps=150)
    for p in (*before, *after):
        assert float((p.outputs - before[0].outputs).abs().max()) < 1e-13
    assert study.spread([p.top for p in before]) > 10
    assert study.spread([p.noise for p in before]) > 10
    assert study.apart(before)[0] > 2
    for p in after:
        assert float((p.parameters - after[0].parameters).norm() / after[0].parameters.norm()) < 1e-9
    assert study.spread([p.top for p in after]) < 1 + 1e-6
    assert study.spread([p.noise for p in after]) < 1 + 1e-9
    assert study.apart(after)[0] < 1 + 1e-6
    assert "balanced" in capsys.readouterr().out


def test_a_scale_that_leaves_the_orbit_shows(capsys: pytest.CaptureFixture[str]) -> None:
    study = example("orbit_points")
    model = study.network((64, 12, 12, 10))
    x = study.digits()[0][:50]
    outputs = [study.at_point(model, scales)(x).detach() for scales in ((1, 1, 1), (8, 1, 1 / 8), (8, 1, 1 / 4))]
    assert float((outputs[1] - outputs[0]).abs().max()) < 1e-13
    assert float((outputs[2] - outputs[0]).abs().max()) > 0.01
