"""Losses in closed form: modules without inputs, plain functions of a dictionary, single numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.errors import DataError, DeclarationError


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.3))

    def forward(self):
        return (self.a * self.b - 1).square()


def loss(p):
    return (p["a"] * p["layer.b"] - 1) ** 2


def test_a_module_without_inputs():
    toy = Toy()
    syms = nf.find_symmetries(toy)
    assert [s.legs[0].label for s in syms] == ["+a"]
    assert nf.certify(toy, syms).rows[0].verdict == "exact"
    assert nf.count_symmetries(toy).symmetries == 1
    before = toy().item()
    nf.balance_(toy, nf.noise_equilibrium(toy, syms, objective="norm"))
    assert toy().item() == pytest.approx(before, rel=1e-5)
    assert toy.a.item() == pytest.approx(0.6**0.5, rel=1e-5)


def test_a_plain_function_of_a_dictionary():
    parameters = {"a": 2.0, "layer.b": torch.tensor(0.3)}
    (symmetry,) = nf.find_symmetries(loss, parameters)
    assert symmetry.name == "a -> layer.b"
    model = nf.FunctionModel(loss, parameters)
    assert model().item() == pytest.approx(0.16)
    assert nf.certify(model, nf.find_symmetries(model)).rows[0].verdict == "exact"


def test_the_noise_of_a_plain_function():
    """`l = (a b - z)^2 / 2`: both gradients are `(a b - z)` times the other number."""
    model = nf.FunctionModel(lambda p: p["a"] * p["b"], {"a": 2.0, "b": 0.5}).double()
    z = torch.randn(256).double()
    moments = nf.gradient_moments(model, lambda m, z: (m() - z).square() / 2, [z], nf.find_symmetries(model))
    square = float((1.0 - z).square().mean())
    plus, minus = moments.second["a -> b"]
    assert float(plus) == pytest.approx(0.25 * square, rel=1e-6)
    assert float(minus) == pytest.approx(4.0 * square, rel=1e-6)


def test_without_a_symmetry_none_is_found():
    assert len(nf.find_symmetries(lambda p: p["a"] * p["b"] + p["a"], {"a": 2.0, "b": 0.5})) == 0


def test_declared_by_hand():
    toy = Toy()
    syms = nf.declare(toy, "scalar", plus=[("a", 0)], minus=[("b", 0)])
    assert nf.certify(toy, syms).rows[0].verdict == "exact"
    moved = syms[0].act(dict(toy.named_parameters()), torch.tensor([3.0]))
    assert (moved["a"].shape, moved["a"].item(), moved["b"].item()) == ((), 6.0, pytest.approx(0.1))
    wrong = nf.declare(toy, "scalar", plus=[("a", 0), ("b", 0)])
    assert nf.certify(toy, wrong).rows[0].verdict == "broken"
    with pytest.raises(DeclarationError, match="no axis 1"):
        nf.declare(toy, "scalar", plus=[("a", 1)])


def test_what_is_no_parameter_is_named():
    with pytest.raises(DataError, match="'a' must hold floating point"):
        nf.FunctionModel(loss, {"a": 2})
    with pytest.raises(DataError, match="'a' must be a tensor"):
        nf.FunctionModel(loss, {"a": "x"})
    with pytest.raises(DataError, match="takes a function"):
        nf.find_symmetries(loss)
