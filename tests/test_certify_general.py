"""Certificates that prove nothing: dead units, zero inputs, zero weights, units that are always active."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from noetherflow import certify, declare, find_symmetries
from noetherflow.discovery.verdict import holds, rule, rule_with_eps
from noetherflow.discovery.violations import Violations

X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def net(activation: nn.Module, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8, bias), activation, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def dead(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        model[2].bias.fill_(-10.0)
    return model


def zeroed(model: nn.Sequential, *names: str) -> nn.Sequential:
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).zero_()
    return model


def always_active() -> nn.Sequential:
    """Positive weights and inputs: the ReLU is the identity on the example, and matrices pass through it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.abs_()
    return model


UNITS = ("diagonal", [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)])
NO_BIAS = ("diagonal", [("0.weight", 0)], [("2.weight", 1)])
WRONG: dict[str, tuple[Callable[[], nn.Sequential], Tensor, tuple]] = {
    "dead units behind": (lambda: dead(net(nn.Tanh())), X, UNITS),
    "inputs of zeros": (
        lambda: net(nn.Tanh(), bias=False),
        torch.zeros_like(X),
        ("diagonal", [("0.weight", 0)], [("2.weight", 1)]),
    ),
    "weights of zero": (lambda: zeroed(net(nn.Tanh()), "2.weight"), X, UNITS),
    "last layer of zeros": (lambda: zeroed(net(nn.Tanh()), "4.weight"), X, UNITS),
    "bias of zeros left out": (
        lambda: zeroed(net(nn.ReLU()), "0.bias"),
        X,
        ("diagonal", [("0.weight", 0)], [("2.weight", 1)]),
    ),
    "all units active": (
        always_active,
        X.abs(),
        ("general_linear", [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)]),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_symmetry_that_the_example_cannot_refute_is_broken(name: str) -> None:
    make, inputs, (kind, plus, minus) = WRONG[name]
    model = make()
    (symmetry,) = (syms := declare(model, kind, plus, minus))
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = model(inputs)
    symmetry.act_(
        {n: p.data for n, p in model.named_parameters()},
        symmetry.random_element(0.05, torch.Generator().manual_seed(0)),
    )
    torch.testing.assert_close(model(inputs), before, rtol=1e-12, atol=1e-12)
    model.load_state_dict(kept)
    (row,) = certify(model, syms, inputs)
    assert row.verdict == "broken"
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())


RIGHT: dict[str, tuple[Callable[[], nn.Sequential], Tensor]] = {
    "dead units behind": (lambda: dead(net(nn.ReLU())), X),
    "inputs of zeros": (lambda: net(nn.ReLU()), torch.zeros_like(X)),
    "weights of zero": (lambda: zeroed(net(nn.ReLU()), "2.weight", "0.bias"), X),
    "inputs of one value": (lambda: net(nn.ReLU()), torch.ones_like(X)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_symmetry_is_exact_all_the_same(name: str) -> None:
    make, inputs = RIGHT[name]
    model = make()
    assert [row.verdict for row in certify(model, declare(model, *UNITS), inputs)] == ["exact"]


class Gated(nn.Module):
    """A branch behind a gate that no training opens."""

    def __init__(self, activation: nn.Module, gate: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.activation, self.b, self.c = nn.Linear(6, 8), activation, nn.Linear(8, 3), nn.Linear(6, 3)
        self.register_buffer("gate", gate)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x) + self.gate * self.b(self.activation(self.a(x)))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
def test_where_weights_never_have_an_effect_nothing_is_determined(activation: nn.Module) -> None:
    model = Gated(activation, torch.zeros(1))
    syms = declare(model, "diagonal", [("a.weight", 0), ("a.bias", 0)], [("b.weight", 1)])
    certificate = certify(model, syms, X)
    (row,) = certificate
    assert row.verdict == "undetermined"
    assert "8 coordinates" in row.note
    assert certificate.refused == {row.name: "certificate: undetermined"}
    assert certificate.broken == ()
    assert "undetermined" in str(certificate)
    assert certificate.to_dict()["rows"][0]["verdict"] == "undetermined"
    opened = Gated(activation, torch.ones(1))
    assert certify(opened, syms, X)[row.name].verdict == ("broken" if isinstance(activation, nn.Tanh) else "exact")


def test_one_coordinate_without_effect_is_enough() -> None:
    masked = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), Masked(torch.tensor([1.0, 1, 0, 1])), nn.Linear(4, 3)).double()
    syms = declare(masked, "diagonal", [("0.weight", 0), ("0.bias", 0)], [("3.weight", 1)])
    (row,) = certify(masked, syms, X)
    assert row.verdict == "undetermined"
    assert "1 coordinates" in row.note


class Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def test_frozen_legs_are_judged_like_others() -> None:
    """An adapter over frozen weights: a wrong symmetry of the frozen part is broken, a right one exact."""
    for activation, verdict in ((nn.ReLU(), "exact"), (nn.Tanh(), "broken")):
        model = net(activation)
        for name in ("0.weight", "0.bias", "2.weight"):
            model.get_parameter(name).requires_grad_(False)
        assert [row.verdict for row in certify(model, declare(model, *UNITS), X)] == [verdict]


def test_running_statistics_of_a_fresh_model_do_not_hide_a_missing_leg() -> None:
    """A fresh BatchNorm has means of zero, so that leaving them out of a symmetry shows at other statistics only."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = model.double().eval()
    found = find_symmetries(model, X).filter(family="one-sided")
    (row,) = certify(model, found, X)
    assert row.verdict in ("exact", "approximate")
    assert row.mode == "training"
    (symmetry,) = found
    legs = tuple(leg for leg in symmetry.legs if not leg.parameter.endswith("running_mean"))
    assert len(legs) < len(symmetry.legs)
    wrong = replace(found, symmetries=(replace(symmetry, legs=legs),))
    assert certify(model, wrong, X).broken == (symmetry.name,)


class Branches(nn.Module):
    """The rows of one branch above those of the other."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.vstack((torch.relu(self.a(x)), torch.relu(self.b(x)))))


def test_weights_that_act_on_the_last_rows_only_are_looked_at_too():
    torch.manual_seed(0)
    model, x = Branches().double(), torch.randn(5, 3, dtype=torch.float64)
    certificate = certify(model, find_symmetries(model, x), x)
    assert [row.verdict for row in certificate] == ["exact"]
    legs = {"plus": [("a.weight", 0), ("a.bias", 0)], "minus": [("out.weight", 1)]}
    half = declare(model, "diagonal", **legs)
    assert [row.verdict for row in certify(model, half, x)] == ["broken"]


def test_what_is_no_number_proves_nothing() -> None:
    good = Violations(0.0, 0.0, 0.0, 0.0, None, 0)
    assert rule(good, 1e-12, False).verdict == "exact"
    for bad in (replace(good, outputs=math.nan), replace(good, covariance=math.nan)):
        assert not holds(bad, 1e-12, False)
        for ruling in (rule(bad, 1e-12, False), rule_with_eps(bad, (), 1e-5, 1e-12, False)):
            assert ruling.verdict == "undetermined"
            assert "not finite" in ruling.note
    assert rule(replace(good, outputs=math.inf), 1e-12, False).verdict == "broken", "outputs that were all 0"
