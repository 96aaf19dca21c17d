"""Translations against what moves by hand: what absorbs a shift, what passes it on, what kills it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from noetherflow import SymmetrySet, find_symmetries
from noetherflow.discovery import count_symmetries


class Net(nn.Module):
    """A model of a function and the modules and parameters it uses by name."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def centred(x: Tensor) -> Tensor:
    """A layer norm by hand."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


def stable_softmax(x: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def log_probabilities(x: Tensor) -> Tensor:
    return x - x.logsumexp(-1, keepdim=True)


def renormalised(x: Tensor) -> Tensor:
    chosen = x.softmax(-1).topk(2, -1)[0]
    return chosen / chosen.sum(-1, keepdim=True)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]).relu()


WHOLE = {"a.weight": (1, 5), "a.bias": (1, 5)}
CONV = {"a.weight": (1, 4), "a.bias": (1, 4)}
ROUTER = {"r.weight": (1, 4), "r.bias": (1, 4)}
L, C = nn.Linear, nn.Conv2d
PASSED: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]], dict[str, tuple[int, int]]]] = {
    # name: the function, its parts, and by hand: parameter -> (independent blocks, rows of a block)
    "layer norm by hand": (lambda s, x: s.o(centred(s.a(x)).relu()), lambda: {"a": L(3, 5), "o": L(5, 2)}, WHOLE),
    "standard deviation": (lambda s, x: s.o(standardised(s.a(x)).relu()), lambda: {"a": L(3, 5), "o": L(5, 2)}, WHOLE),
    "softmax by hand": (lambda s, x: s.o(stable_softmax(s.a(x))), lambda: {"a": L(3, 5), "o": L(5, 2)}, WHOLE),
    "logsumexp": (lambda s, x: log_probabilities(s.a(x)), lambda: {"a": L(3, 5)}, WHOLE),
    "ldexp": (lambda s, x: torch.ldexp(s.a(x), torch.full((), 2)).softmax(-1), lambda: {"a": L(3, 5)}, WHOLE),
    "ldexp by a power per row": (
        lambda s, x: torch.ldexp(s.a(x), x[..., :1]).softmax(-1),
        lambda: {"a": L(3, 5)},
        WHOLE,
    ),
    "stack": (
        lambda s, x: s.o(norm(torch.stack((s.a(x), s.b(x)), 1))),
        lambda: {"a": L(3, 5), "b": L(3, 5), "o": L(5, 2)},
        WHOLE | {"b.weight": (1, 5), "b.bias": (1, 5)},
    ),
    "a norm per head": (
        lambda s, x: s.o(norm(s.a(x).unflatten(-1, (2, 3))).flatten(2)),
        lambda: {"a": L(3, 6), "o": L(6, 2)},
        {"a.weight": (2, 3), "a.bias": (2, 3)},
    ),
    "topk, then softmax": (lambda s, x: s.r(x).topk(2, -1)[0].softmax(-1), lambda: {"r": L(3, 4)}, ROUTER),
    "sort, then softmax": (lambda s, x: s.r(x).sort(-1)[0].softmax(-1), lambda: {"r": L(3, 4)}, ROUTER),
    "softmax, topk, renormalised": (lambda s, x: renormalised(s.r(x)), lambda: {"r": L(3, 4)}, ROUTER),
    "scaled by a temperature": (
        lambda s, x: (s.a(x) / 3.0 * s.t).softmax(-1),
        lambda: {"a": L(3, 5), "t": drawn(1)},
        WHOLE,
    ),
    "average pool": (
        lambda s, x: s.o(norm(F.avg_pool2d(s.a(x[:, :2, None]), 1).permute(0, 2, 3, 1))),
        lambda: {"a": C(2, 4, 1), "o": L(4, 2)},
        CONV,
    ),
    "maximum pool": (  # a maximum of different amounts is no shift: the bias alone
        lambda s, x: s.o(norm(F.max_pool2d(s.a(x[:, :2, None]), (1, 2)).permute(0, 2, 3, 1))),
        lambda: {"a": C(2, 4, 1), "o": L(4, 2)},
        {"a.bias": (1, 4)},
    ),
    "mean over space": (
        lambda s, x: s.o(norm(s.a(x[:, :2, None]).mean((2, 3)))),
        lambda: {"a": C(2, 4, 1), "o": L(4, 2)},
        CONV,
    ),
    "group norm": (
        lambda s, x: s.o(s.n(s.a(x[:, :2, None])).relu()),
        lambda: {"a": C(2, 6, 1), "n": nn.GroupNorm(3, 6), "o": C(6, 2, 1)},
        {"a.bias": (3, 2)},
    ),
}
KILLED: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "tanh before the norm": (lambda s, x: s.o(norm(s.a(x).tanh())), lambda: {"a": L(3, 5), "o": L(5, 2)}),
    "not the whole mean": (
        lambda s, x: s.o((2 * s.a(x) - s.a(x).mean(-1, keepdim=True)).relu()),
        lambda: {"a": L(3, 5), "o": L(5, 2)},
    ),
    "the mean of something else": (
        lambda s, x: s.o((s.a(x) - s.b(x).mean(-1, keepdim=True)).relu()),
        lambda: {"a": L(3, 5), "b": L(3, 5), "o": L(5, 2)},
    ),
    "on both sides of a product": (lambda s, x: (s.a @ s.a.T).softmax(-1) @ x[0, :5], lambda: {"a": drawn(5, 3)}),
    "relu between topk and softmax": (lambda s, x: s.r(x).topk(2, -1)[0].relu().softmax(-1), lambda: {"r": L(3, 4)}),
    "padding in the average": (
        lambda s, x: s.o(F.group_norm(F.avg_pool2d(s.a(x[:, :2, None]), 3, 1, 1), 1).relu()),
        lambda: {"a": C(2, 4, 1), "o": C(4, 2, 1)},
    ),
    "ldexp by different powers": (
        lambda s, x: torch.ldexp(s.a(x), torch.arange(5)).softmax(-1),
        lambda: {"a": L(3, 5)},
    ),
    "the power of an ldexp": (
        lambda s, x: torch.ldexp(x[..., :1], s.a(x)) + s.a(x).softmax(-1),
        lambda: {"a": L(3, 5)},
    ),
    "active dropout": (lambda s, x: s.o(norm(F.dropout(s.a(x), 0.5, True))), lambda: {"a": L(3, 5), "o": L(5, 2)}),
    "the stream is read besides": (
        lambda s, x: s.o(norm(s.a(x))) + s.b(s.a(x)).tanh(),
        lambda: {"a": L(3, 5), "b": L(5, 2), "o": L(5, 2)},
    ),
}


def model_of(
    function: Callable[..., Any], parts: Callable[[], dict[str, Any]]
) -> tuple[nn.Module, Tensor, SymmetrySet]:
    torch.manual_seed(0)
    model = Net(function, **parts()).double().eval()
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    return model, x, find_symmetries(model, x)


def assert_they_hold(model: nn.Module, x: Tensor, syms: SymmetrySet) -> None:
    params = {name: p.detach() for name, p in model.named_parameters()}
    before = model(x).detach()
    for t in syms.translations:
        shift = torch.randn(t.leg.blocks, 1, dtype=torch.float64)
        after = functional_call(model, {**params, **t.act(params, shift)}, (x,))
        assert float((after - before).detach().abs().max()) < 1e-10 * float(before.abs().max()), t.name


@pytest.mark.parametrize("name", PASSED)
def test_translations_by_hand(name: str) -> None:
    function, parts, expected = PASSED[name]
    model, x, syms = model_of(function, parts)
    assert {t.leg.parameter: (t.leg.blocks, t.leg.dim) for t in syms.translations} == expected
    assert_they_hold(model, x, syms)


@pytest.mark.parametrize("name", KILLED)
def test_no_translation_where_something_sees_it(name: str) -> None:
    assert not model_of(*KILLED[name])[2].translations


def test_an_average_without_padding_keeps_the_bias() -> None:
    """The control of "padding in the average", where the bias is smaller at the border."""
    _, parts = KILLED["padding in the average"]
    function = lambda s, x: s.o(F.group_norm(F.avg_pool2d(s.a(x[:, :2, None]), (1, 2), 1), 1).relu())
    model, x, syms = model_of(function, parts)
    assert {t.leg.parameter for t in syms.translations} == {"a.bias"}
    assert_they_hold(model, x, syms)


def test_the_span_of_group_means_is_what_the_oracle_counts() -> None:
    """Three groups: the bias may move along three means, 3 * 4 / 2 symmetric generators; three one-sided scales."""
    function, parts, _ = PASSED["group norm"]
    model, x, syms = model_of(function, parts)
    (bias,) = syms.translations
    assert bias.leg.blocks * (bias.leg.blocks + 1) // 2 == 6
    counted = sum(s.blocks for s in syms) + 6
    assert count_symmetries(model, x).symmetries == counted
