"""Moment rules registered from outside: used, checked against autograd, and refused where they cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.errors import MomentError
from noetherflow.moments.rules import RULES
from reference import moments_by_loop


@pytest.fixture(autouse=True)
def registry_kept() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@torch.library.custom_op("noetherflow_tests::scaled_product", mutates_args=())
def scaled_product(x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    return scale * x @ weight.T


def _backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    return ctx.scale * delta @ weight, ctx.scale * delta.flatten(0, -2).T @ x.flatten(0, -2), None


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, weight, ctx.scale = inputs
    ctx.save_for_backward(x, weight)


scaled_product.register_autograd(_backward, setup_context=_setup)
OPERATOR = torch.ops.noetherflow_tests.scaled_product.default


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 3), nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return scaled_product(torch.tanh(self.first(x)), self.weight, scale=0.5)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1)


def register(factor: float) -> None:
    @nf.extend.moment_rule(OPERATOR, signature=lambda x, weight, scale=1.0: None)
    def rule(owned: Any, function: Any, a: dict[str, Any]) -> nf.extend.Call | None:
        if owned(a["x"]):
            return None
        prepare = lambda delta, x: (delta, factor * a["scale"] * x)
        return nf.extend.Call((a["x"],), nf.extend.features_last, (nf.extend.outer(a["weight"], True, prepare),))


@pytest.mark.parametrize("shape", [(5, 4), (5, 6, 4)])
def test_a_rule_from_outside_measures_a_custom_operator(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Scaled().double(), torch.randn(shape, dtype=torch.float64)
    syms = nf.declare(model, "general_linear", [("first.weight", 0), ("first.bias", 0)], [("weight", 1)])
    before = nf.gradient_moments(model, loss, [x], syms, entries=True)
    assert before.fallback == ("weight",)
    register(1.0)
    moments, expected = (
        nf.gradient_moments(model, loss, [x], syms, entries=True),
        moments_by_loop(model, loss, [x], syms),
    )
    assert moments.fallback == ()
    for name, legs in expected.second.items():
        for leg, found in zip(legs, moments.second[name], strict=True):
            torch.testing.assert_close(found, leg, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(moments.squares["weight"], expected.squares["weight"], rtol=1e-10, atol=1e-14)


def test_a_wrong_rule_from_outside_is_caught() -> None:
    model, x = Scaled().double(), torch.randn(5, 4, dtype=torch.float64)
    register(1.01)
    with pytest.raises(MomentError, match=r"\['weight'\] summed by rule differs from autograd's at scaled_product"):
        nf.gradient_moments(model, loss, [x], nf.SymmetrySet(()), parameters=["weight"])


def test_what_cannot_be_registered_is_said() -> None:
    with pytest.raises(MomentError, match=r"\['linear'\] have a rule already; pass replace=True"):
        nf.extend.moment_rule(nn.functional.linear)
    with pytest.raises(MomentError, match="no function given"):
        nf.extend.moment_rule()
    for function in (OPERATOR, torch.lerp):
        with pytest.raises(MomentError, match="cannot be inspected; pass one"):
            nf.extend.moment_rule(function)
