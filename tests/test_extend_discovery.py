"""Gauge and shift rules registered from outside: what is refused, and that they are used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow import extend
from noetherflow.discovery.rules.base import RULES
from noetherflow.errors import DeclarationError, ExportError


@torch.library.custom_op("noethertests::half", mutates_args=())
def half(x: Tensor) -> Tensor:
    return x / 2


half.register_fake(torch.empty_like)
half.register_autograd(lambda ctx, g: g / 2)


@pytest.mark.parametrize("verb", [extend.gauge_rule, extend.shift_rule])
@pytest.mark.parametrize(
    ("operators", "message"),
    [((), "no operator given"), (("relu",), "without a namespace"), (("aten.add",), "have a rule already")],
)
def test_names_are_checked(verb, operators, message) -> None:
    with pytest.raises(DeclarationError, match=message):
        verb(*operators)


def test_a_rule_from_outside_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(half(self.first(x))))

    model, x = Net(), torch.randn(5, 3)
    before = nf.find_symmetries(model, x)
    assert [u.operator for u in before.unknown] == ["noethertests.half.default"]
    assert not len(before)
    monkeypatch.setitem(RULES, "noethertests.half", None)  # restored to absence after the test
    extend.gauge_rule("noethertests::half", replace=True)(lambda context, x: context.out(x.fields))
    after = nf.find_symmetries(model, x)
    assert not after.unknown
    assert sum(s.blocks for s in after) == 4


class Chain(nn.Module):
    """Two operators without a rule on one path, with a function of choice between them."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(half(self.between(torch.linalg.matrix_exp(torch.relu(self.first(x))))))


def unknown_of(between) -> set[str]:
    found = nf.find_symmetries(Chain(between), torch.randn(4, 4))
    assert not len(found)
    return {u.operator for u in found.unknown}


def test_every_operator_without_a_rule_on_a_path_is_listed() -> None:
    """The second one meets what the first one gave, which is trivial; it is an obstacle all the same."""
    both = {"aten.linalg_matrix_exp.default", "noethertests.half.default"}
    assert unknown_of(torch.relu) == both
    assert unknown_of(torch.tanh) == {"aten.linalg_matrix_exp.default"}, "nothing scales behind tanh, rule or no rule"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda context, x: None, r"gauge rule of noethertests.half.default must answer with a Gauge .*got None"),
        (lambda context: context.out(), "gauge rule of noethertests.half.default failed: TypeError"),
    ],
)
def test_a_faulty_rule_is_named(monkeypatch: pytest.MonkeyPatch, rule, message) -> None:
    monkeypatch.setitem(RULES, "noethertests.half", rule)
    with pytest.raises(ExportError, match=message):
        nf.find_symmetries(Chain(torch.tanh), torch.randn(4, 4))
