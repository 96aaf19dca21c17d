"""`gradient_factors` against a loop of autograd over single samples, for every way of writing a product."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.errors import DataError, MomentError
from noetherflow.moments import gradient_factors


class Middle(nn.Module):
    """A square weight `w` between two linear layers, used as the function given says."""

    def __init__(self, use: Callable[[Tensor, nn.Parameter], Tensor], shape: tuple[int, ...] = (3, 3)) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)
        self.w = nn.Parameter(torch.randn(*shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.use(self.a(x), self.w)))


def moved_twice(model: nn.Module, name: str = "w", before: str = "a.weight", after: str = "b.weight") -> nf.SymmetrySet:
    """Declares a general_linear symmetry on either axis of a weight; they need not hold here."""
    left = nf.declare(model, "general_linear", [(before, 0)], [(name, 1)])
    right = nf.declare(model, "general_linear", [(name, 0)], [(after, 1)])
    return nf.SymmetrySet((*left.symmetries, *right.symmetries))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1)


def by_loop(model: nn.Module, weight: Tensor, x: Tensor, loss_fn: Any = loss) -> Tensor:
    """One backward per sample of the batch."""
    losses = loss_fn(model, x)
    return torch.stack([torch.autograd.grad(one, weight, retain_graph=True)[0] for one in losses])


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


USES: dict[str, Callable[[Tensor, nn.Parameter], Tensor]] = {
    "linear": lambda h, w: F.linear(h, w),
    "matmul": lambda h, w: h @ w,
    "transposed": lambda h, w: h @ w.T,
    "einsum": lambda h, w: torch.einsum("...i,oi->...o" if h.ndim < 2 else "bti,oi->bto", h, w),
    "twice": lambda h, w: F.linear(torch.tanh(F.linear(h, w)), w),
    "both_ways": lambda h, w: F.linear(torch.tanh(h @ w), w),
    "slices": lambda h, w: torch.cat([F.linear(h, w[:2]), F.linear(h, w[2:])], -1),
    "columns": lambda h, w: F.linear(h[..., 1:], w[:, 1:]) + F.linear(h[..., :1], w[:, :1]),
    "steps": lambda h, w: torch.cat([F.linear(h, w[::2]), h @ w[1::2].T], -1),
}


@pytest.mark.parametrize("use", USES)
def test_factors_are_the_gradients_of_single_samples(use: str) -> None:
    model, x = Middle(USES[use]), torch.randn(5, 6, 4)
    factors = gradient_factors(model, loss, [x[:2], x[2:]], moved_twice(model))["w"]
    torch.testing.assert_close(factors.dense(), by_loop(model, model.w, x), rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("cross", [False, True])
def test_packed_attention_weights(cross: bool) -> None:
    """Cross-attention slices the packed weight, self-attention uses it whole."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            other = torch.tanh(h[:, :2]) if cross else h
            return self.b(self.attention(h, other, other)[0])

    model, x, packed = Attention(), torch.randn(5, 3, 4), "attention.in_proj_weight"
    into = nf.declare(model, "general_linear", [("a.weight", 0)], [(packed, 1)])
    rows = nf.declare(model, "diagonal", [(packed, 0)])
    syms = nf.SymmetrySet((*into.symmetries, *rows.symmetries))
    factors = gradient_factors(model, loss, [x], syms)[packed]
    expected = by_loop(model, model.attention.in_proj_weight, x)
    torch.testing.assert_close(factors.dense(), expected, rtol=1e-12, atol=1e-12)


def test_the_projection_after_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.b = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.attention(x, x, x)[0])

    model, x, name = Attention(), torch.randn(5, 3, 4), "attention.out_proj.weight"
    into = nf.declare(model, "diagonal", [(name, 1)])
    rows = nf.declare(model, "general_linear", [(name, 0)], [("b.weight", 1)])
    factors = gradient_factors(model, loss, [x], nf.SymmetrySet((*into.symmetries, *rows.symmetries)))[name]
    expected = by_loop(model, model.attention.out_proj.weight, x)
    torch.testing.assert_close(factors.dense(), expected, rtol=1e-12, atol=1e-12)


def test_batches_of_sequences_of_unequal_length() -> None:
    model, short, long = Middle(USES["linear"]), torch.randn(2, 3, 4), torch.randn(3, 5, 4)
    factors = gradient_factors(model, loss, [short, long], moved_twice(model))["w"]
    expected = torch.cat([by_loop(model, model.w, short), by_loop(model, model.w, long)])
    torch.testing.assert_close(factors.dense(), expected, rtol=1e-12, atol=1e-12)


def test_samples_on_the_second_axis_are_found() -> None:
    model, x = Middle(USES["linear"]), torch.randn(6, 5, 4)
    columns = lambda m, b: m(b).square().sum((0, 2))
    factors = gradient_factors(model, columns, [x], moved_twice(model))["w"]
    torch.testing.assert_close(factors.dense(), by_loop(model, model.w, x, columns), rtol=1e-12, atol=1e-12)


REFUSED: dict[str, tuple[Callable[[Tensor, nn.Parameter], Tensor], tuple[int, ...], str]] = {
    "elementwise": (lambda h, w: (h.unsqueeze(-2) * w).sum(-1), (3, 3), "no product with it as one matrix"),
    "made_first": (lambda h, w: F.linear(h, torch.tanh(w)), (3, 3), "no product with it as one matrix"),
    "another_matrix": (
        lambda h, w: F.linear(torch.cat([h] * 3, -1), w.view(1, 9)) * torch.ones(3),
        (3, 3),
        "reads it",
    ),
    "no_rule": (lambda h, w: h @ torch.linalg.inv(w + h.mean() * 0), (3, 3), "no rule covers"),
    "three_axes": (lambda h, w: h @ w[0], (1, 3, 3), "is no matrix"),
}


@pytest.mark.parametrize("use", REFUSED)
def test_other_uses_are_refused_by_name_with_a_remedy(use: str) -> None:
    function, shape, why = REFUSED[use]
    model = Middle(function, shape)
    syms = (
        moved_twice(model)
        if len(shape) == 2
        else nf.SymmetrySet(
            (
                *nf.declare(model, "general_linear", [("a.weight", 0)], [("w", 2)]).symmetries,
                *nf.declare(model, "general_linear", [("w", 1)], [("b.weight", 1)]).symmetries,
            )
        )
    )
    with pytest.raises(MomentError, match=rf"{why}.*remeasure=") as refused:
        gradient_factors(model, loss, [torch.randn(5, 6, 4)], syms)
    assert re.search(r"\bw\b", str(refused.value))


def test_no_batch_and_no_such_weight() -> None:
    model = Middle(USES["linear"])
    with pytest.raises(DataError, match="no batch to measure"):
        gradient_factors(model, loss, [], moved_twice(model))
    alone = nf.declare(model, "general_linear", [("a.weight", 0)], [("w", 1)])
    assert gradient_factors(model, loss, [torch.randn(5, 4)], alone) == {}
