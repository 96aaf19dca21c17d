"""Operators without a rule never make a false symmetry; single operators that the zoo does not reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from noetherflow.discovery import certify, find_symmetries, infer
from noetherflow.discovery.export import export, operator_name
from zoo import ZOO

MIXED = ("mlp", "cnn_batchnorm", "nanogpt", "llama", "unet", "densenet_block", "einsum_attention", "shared_layer")
OPERATORS = {
    name: sorted(
        {operator_name(n) for n in export(ZOO[name]().model, ZOO[name]().inputs).nodes if n.op == "call_function"}
    )
    for name in MIXED
}


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_opaque_operators_never_make_a_false_symmetry(data: st.DataObject) -> None:
    """Rules are taken away at random: what is still found holds on the real model."""
    name = data.draw(st.sampled_from(MIXED))
    hidden = data.draw(st.sets(st.sampled_from(OPERATORS[name]), min_size=1, max_size=4))
    case = ZOO[name]()
    everything = find_symmetries(case.model, case.inputs)
    real = infer.find_rule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer, "find_rule", lambda operator: None if operator in hidden else real(operator))
        found = find_symmetries(case.model, case.inputs)
    assert certify(case.model, found, case.inputs, trials=1).broken == ()
    assert sum(s.blocks for s in found) <= sum(s.blocks for s in everything)


@torch.library.custom_op("noetherflow_test::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(double(self.second(torch.relu(self.first(x)))))


def test_an_unknown_operator_is_named_with_its_place() -> None:
    syms = find_symmetries(_Custom(), torch.randn(2, 3))
    assert [s.name for s in syms] == ["first -> second"]
    assert [(u.operator, u.count) for u in syms.unknown] == [("noetherflow_test.double.default", 1)]
    assert "unknown operator noetherflow_test.double.default" in str(syms)


class Between(nn.Module):
    """Linear(3, 4), a function, Linear(n, 2): what does the function leave of the four hidden coordinates?"""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.first, self.second = function, nn.Linear(3, 4), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def _image(h: Tensor) -> Tensor:
    """Four channels as a `[batch, 4, 4, 4]` map that varies in space."""
    grid = torch.linspace(0.5, 2, 16, dtype=h.dtype, device=h.device).reshape(4, 4)
    return h[:, :, None, None] * grid


DIAGONAL, MIXING, NOTHING = ("diagonal", 4), ("general_linear", 1), None
SINGLE: dict[str, tuple[Callable[[Tensor], Tensor], int, Any]] = {
    "identity": (lambda h: h, 4, MIXING),
    "leaky relu": (lambda h: F.leaky_relu(h, 0.2), 4, DIAGONAL),
    "abs": (torch.abs, 4, DIAGONAL),
    "clamp at zero": (lambda h: h.clamp(min=0), 4, DIAGONAL),
    "clamp at one": (lambda h: h.clamp(max=1), 4, NOTHING),
    "maximum with zero": (lambda h: torch.maximum(h, torch.zeros_like(h)), 4, DIAGONAL),
    "square root of a square": (lambda h: h.square().sqrt(), 4, DIAGONAL),
    "product with a constant": (lambda h: 3 * h / 7, 4, MIXING),
    "sum with a constant": (lambda h: h + 1, 4, NOTHING),
    "exponential": (torch.exp, 4, NOTHING),
    "scalar in front": (lambda h: 1 / (1 + h.square()), 4, NOTHING),
    "mean over coordinates": (lambda h: h.mean(-1, keepdim=True).expand(-1, 4), 4, ("scalar", 1)),
    "softmax": (lambda h: h.softmax(-1), 4, NOTHING),
    "cumulative sum": (lambda h: h.cumsum(-1), 4, ("scalar", 1)),
    "sorting": (lambda h: h.sort(-1).values, 4, ("scalar", 1)),
    "gather": (lambda h: h.gather(1, torch.tensor([[0, 2]] * 2)), 2, MIXING),
    "gather by data": (lambda h: h.gather(1, h.argsort(1)[:, :2]), 2, ("scalar", 1)),
    "roll": (lambda h: h.roll(1, -1), 4, MIXING),
    "stack and flatten": (lambda h: torch.stack((h, h), -1).flatten(1), 8, MIXING),
    "repeat": (lambda h: h.repeat(1, 2), 8, MIXING),
    "tensor split": (lambda h: torch.cat(h.tensor_split(2, -1)[::-1], -1), 4, ("general_linear", 2)),
    "masked fill with zero": (
        lambda h: h.masked_fill(torch.eye(2, 4) > 0, 0.0),
        4,
        DIAGONAL,
    ),
    "masked fill with one": (lambda h: h.masked_fill(torch.tensor([True, False, False, False]), 1.0), 4, NOTHING),
    "where with zero": (lambda h: torch.where(h > 0, h, 0.0), 4, DIAGONAL),
    "where above one": (lambda h: torch.where(h > 1, h, 0.0), 4, NOTHING),
    "complex pairs": (
        lambda h: torch.view_as_real(torch.view_as_complex(h.reshape(2, 2, 2)) * 2).reshape(2, 4),
        4,
        MIXING,
    ),
    "l2 normalisation": (lambda h: F.normalize(h, dim=-1), 4, ("one-sided", 1)),
    "standard deviation": (lambda h: h / h.std(-1, keepdim=True), 4, ("one-sided", 1)),
    "bilinear interpolation": (lambda h: F.interpolate(_image(h), scale_factor=2).mean((2, 3)), 4, MIXING),
    "pixel shuffle": (lambda h: F.pixel_shuffle(_image(h), 2).mean((2, 3)).expand(-1, 4), 4, ("scalar", 1)),
    "adaptive max pool": (lambda h: F.adaptive_max_pool2d(_image(h), 2).flatten(1), 16, DIAGONAL),
    "instance norm": (lambda h: F.instance_norm(100 * _image(h)).flatten(1), 64, ("one-sided", 4)),
    "unfold": (lambda h: F.unfold(_image(h), 2).mean(-1), 16, MIXING),
    "index put": (
        lambda h: torch.zeros(2, 4, dtype=h.dtype).index_put((torch.tensor([1, 0]),), h),
        4,
        MIXING,
    ),
    "products of pairs": (lambda h: torch.einsum("bi,bj->bij", h, h).tril().flatten(1), 16, ("scalar", 1, 4)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_single_operators(name: str) -> None:
    function, width, expected = SINGLE[name]
    model, inputs = Between(function, width), torch.randn(2, 3)
    syms = find_symmetries(model, inputs)
    verdicts = {row.verdict for row in certify(model, syms, inputs)}
    assert verdicts <= {"exact", "approximate"}
    if expected is None:
        assert len(syms) == 0
    elif expected[0] == "one-sided":
        assert [(s.family, s.blocks) for s in syms] == [expected]
    else:
        kind, blocks, *times = expected
        assert [(s.kind, s.blocks) for s in syms] == [(kind, blocks)] * (times[0] if times else 1)
        assert verdicts == {"exact"}


class _CrossAttention(nn.Module):
    """Query and key/value from different streams through one packed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory = self.right(y)
        return self.attention(self.left(x), memory, memory, need_weights=False)[0]


def test_packed_cross_attention() -> None:
    """Both streams meet the columns of the packed weight, so their GL is one; q, k and v keep theirs per head."""
    model, inputs = _CrossAttention(), (torch.randn(2, 3, 3), torch.randn(2, 5, 2))
    syms = find_symmetries(model, inputs)
    assert certify(model, syms, inputs).broken == ()
    assert {(s.family, s.dim, s.blocks) for s in syms if not s.is_torus} == {
        ("linear-linear", 4, 1),
        ("attention-qk", 2, 2),
        ("attention-vo", 2, 2),
    }
