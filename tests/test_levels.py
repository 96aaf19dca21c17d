"""Objectives that make levels equal, against closed forms by hand, in every kind of family."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow import extend
from noetherflow.equilibrium import objective as registry
from noetherflow.equilibrium.levels import diagonal_part
from noetherflow.errors import DataError
from zoo import ZOO

D = torch.float64


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(registry._OBJECTIVES)
    yield
    registry._OBJECTIVES.clear()
    registry._OBJECTIVES.update(before)


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    for layer in layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return nn.Sequential(*layers).double()


def data(width: int, count: int = 16) -> Tensor:
    return torch.randn(count, width, dtype=D, generator=torch.Generator().manual_seed(1))


def test_one_hidden_layer_by_hand() -> None:
    """`p = sqrt(max |column| / max |row|)`; biases do not count."""
    model = net(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].bias.mul_(100)
    x = data(4)
    a, b = model[0].weight.detach().abs().amax(1), model[2].weight.detach().abs().amax(0)
    syms, before = nf.find_symmetries(model, x), model(x).detach()
    eq = nf.noise_equilibrium(model, syms, objective="range")
    torch.testing.assert_close(eq["0 -> 2"].element, (b / a).sqrt(), rtol=1e-12, atol=0)
    worst = ((a - b).abs() / (a + b)).max()
    assert eq.converged
    assert eq.imbalance_now == pytest.approx(float(worst), rel=1e-9)
    nf.balance_(model, eq)
    torch.testing.assert_close(model[0].weight.abs().amax(1), (a * b).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(model[2].weight.abs().amax(0), (a * b).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["mlp", "cnn", "depthwise_cnn", "llama", "resnet_basic"])
def test_levels_meet_on_every_torus(name: str) -> None:
    """Looked at again in the moved model, by an own reading of legs: the mean log over the matrices of a side."""
    case = ZOO[name]().double()
    syms = nf.find_symmetries(case.model, case.inputs)
    syms = syms.without({s.name: "approximate" for s in syms if s.eps is not None})
    eq = nf.noise_equilibrium(case.model, syms, objective="range", tol=1e-8)
    assert eq.converged
    assert eq.imbalance < 1e-6 < eq.imbalance_now
    nf.balance_(case.model, eq)
    tensors = nf.tensors_of(case.model)
    for s in (diagonal_part(s) for s in syms):
        sides = []
        for sign in (1, -1):
            legs = [leg for leg in s.weight_legs if leg.sign == sign]
            own = [leg for leg in legs if tensors[leg.parameter].ndim > 1]
            rows = [leg.unfold(tensors[leg.parameter].detach()).abs().flatten(1).amax(1) for leg in own or legs]
            sides.append(torch.stack(rows).log().mean(0) if own else torch.stack(rows).amax(0).log())
        torch.testing.assert_close(sides[0], sides[1], rtol=0, atol=1e-6)


def test_the_diagonal_of_a_linear_bottleneck_moves() -> None:
    model = net(nn.Linear(5, 3), nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([[1.0], [10.0], [0.1]], dtype=D))
    a, b = model[0].weight.detach().abs().amax(1), model[1].weight.detach().abs().amax(0)
    syms = nf.find_symmetries(model, data(5))
    eq = nf.noise_equilibrium(model, syms, objective="range")
    torch.testing.assert_close(eq[syms[0].name].element[0], torch.diag((b / a).sqrt()), rtol=1e-12, atol=0)
    assert nf.balance_(model, eq).output_change < 1e-13


def test_rows_before_a_batch_norm_get_one_level() -> None:
    """All legs scale the same way: every row to the geometric mean."""
    model = net(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([[1.0], [2.0], [0.5], [3.0]], dtype=D))
    a = model[0].weight.detach().abs().amax(1)
    syms = nf.find_symmetries(model, data(5))
    eq = nf.noise_equilibrium(model, syms, objective="range")
    nf.balance_(model, eq, tolerance=1e-4)
    want = a.log().mean().exp().expand(4)
    torch.testing.assert_close(model[0].weight.detach().abs().amax(1), want, rtol=1e-12, atol=0)


def test_dead_channels_stay_and_are_named() -> None:
    model = net(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    eq = nf.noise_equilibrium(model, nf.find_symmetries(model, data(4)), objective="range")
    (settled,) = eq
    assert settled.element[1] == 1
    assert settled.finite.tolist() == [True, False, True]
    assert "1 of 3 channels" in settled.reason
    assert nf.balance_(model, eq).output_change < 1e-13


@pytest.mark.usefixtures("clean_registry")
def test_levels_of_your_own() -> None:
    @extend.level_objective("mean-size", meaning="equal mean absolute weights")
    def mean_size(rows: Tensor) -> Tensor:
        return rows.mean(1)

    model = net(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    syms = nf.find_symmetries(model, data(4))
    a, b = model[0].weight.detach().abs().mean(1), model[2].weight.detach().abs().mean(0)
    eq = nf.noise_equilibrium(model, syms, objective="mean-size")
    torch.testing.assert_close(eq["0 -> 2"].element, (b / a).sqrt(), rtol=1e-12, atol=0)
    assert eq.objective == "mean-size"
    with pytest.raises(DataError, match="exists already"):
        extend.level_objective("range", meaning="another")(mean_size)
    extend.level_objective("whole", meaning="wrong shape")(lambda rows: rows.amax())
    with pytest.raises(DataError, match="must give 6 levels"):
        nf.noise_equilibrium(model, syms, objective="whole")
    with pytest.raises(DataError, match="leave errors out"):
        nf.noise_equilibrium(model, syms, objective="range", errors=True)
    extend.level_objective("log", meaning="negative")(lambda rows: rows.amax(1).log())
    with pytest.raises(DataError, match="negative or not finite"):
        nf.noise_equilibrium(model, syms, objective="log")


def test_one_pass_is_not_called_converged_when_it_is_not() -> None:
    case = ZOO["depthwise_cnn"]().double()
    syms = nf.find_symmetries(case.model, case.inputs)
    eq = nf.noise_equilibrium(case.model, syms, objective="range", max_iterations=1)
    assert not eq.converged
    assert "NOT converged" in str(eq)
    moved = copy.deepcopy(case.model)
    assert "NOT balanced" in str(nf.balance_(moved, eq))
