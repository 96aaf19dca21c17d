"""The oracle's own axes and generators, against dimensions counted by hand; nothing here asks the finder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from noetherflow import count_symmetries
from noetherflow.discovery.raw_axes import RawAxis, generator_rows, raw_axes
from noetherflow.errors import DataError

X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """Values and outputs of attention with heads as an axis of the weights, in both usual layouts."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = first
        self.value = nn.Parameter(torch.randn(2, 6, 3) if first else torch.randn(6, 2, 3))
        self.out = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        rule = "btd,hdk->bthk" if self.first else "btd,dhk->bthk"
        values = torch.einsum(rule, x, self.value)
        mixed = torch.stack([values[:, :, 0], values.flip(1)[:, :, 1]], 2)  # each head looks elsewhere
        return torch.einsum("bthk,hkd->btd", mixed, self.out).tanh()


@pytest.mark.parametrize("first", [True, False])
def test_heads_as_an_axis_have_a_matrix_each(first: bool) -> None:
    """GL(3) per head: 6 symmetric generators for each of 2 heads, 9 with the antisymmetric ones."""
    assert count_symmetries(Heads(first), X).symmetries == 2 * 6
    assert count_symmetries(Heads(first), X, symmetric=False).symmetries == 2 * 9


def test_scales_along_a_kernel_axis_are_counted() -> None:
    """`weight_norm(dim=2)` divides out the norm at each of 3 kernel positions; rows of g are numbers of their own."""
    torch.manual_seed(0)
    layer = weight_norm(nn.Conv1d(5, 4, 3), dim=2)
    net = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))
    assert count_symmetries(net, X).symmetries == 3


def test_grouped_convolutions_read_channels_of_their_own_group() -> None:
    """8 ReLU channels between two convolutions, the second in 2 groups: one rescaling each."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(5, 8, 1), nn.ReLU(), nn.Conv1d(8, 6, 3, groups=2), nn.Tanh())
    assert count_symmetries(net, X).symmetries == 8


class OffsetNorm(nn.Module):
    """A normalisation whose gain is `1 + weight`, then a linear map."""

    def __init__(self, offset: float, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(0.1 * torch.randn(6))
        self.head = nn.Linear(6, 3, bias=bias)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        normed = x / x.square().mean(-1, keepdim=True).sqrt()
        return self.head((self.offset + self.weight) * normed).tanh()


def test_affine_generators_find_what_acts_on_a_parameter_plus_a_constant() -> None:
    assert count_symmetries(OffsetNorm(0.0), X).symmetries == 6
    assert count_symmetries(OffsetNorm(1.0), X).symmetries == 0
    assert count_symmetries(OffsetNorm(1.0), X, affine=True).symmetries == 6
    assert count_symmetries(OffsetNorm(1.0, bias=True), X, affine=True).symmetries == 6
    assert count_symmetries(OffsetNorm(0.0), X, affine=True).symmetries == 6


def test_affine_generators_count_every_entry_that_may_be_shifted() -> None:
    """The bias in front of a LayerNorm may move along ones: u c^T is 1 linear generator and 1 constant."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Tanh())
    linear = count_symmetries(net, X).symmetries
    assert count_symmetries(net, X, affine=True).symmetries == linear + 1
    plain = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    assert count_symmetries(plain, X, affine=True).symmetries == 0


def test_generator_rows_are_first_derivatives() -> None:
    """Every column against a finite difference of `<g, theta>` along one generator written out."""
    rng = torch.Generator().manual_seed(0)
    theta = torch.randn(2, 3, 4, dtype=torch.float64, generator=rng)
    g = torch.randn(5, 2, 3, 4, dtype=torch.float64, generator=rng)
    (axes,) = raw_axes(nn.Module(), {"w": theta}, affine=False).values()
    assert [(a.axis, a.along) for a in axes.axes] == [(0, None), (1, 0), (2, 0), (2, 1)]
    rows = generator_rows(axes, theta, g, symmetric=False)
    column = 0
    for axis in axes.axes:
        for block in range(axis.blocks):
            for i in range(axis.size):
                for j in range(axis.size):
                    moved = torch.zeros_like(theta)
                    target = moved.movedim(axis.axis, 0)
                    source = theta.movedim(axis.axis, 0)
                    if axis.along is None:
                        target[i] = source[j]
                    else:
                        place = axis.along + (axis.along < axis.axis)
                        target[i].select(place - 1, block).copy_(source[j].select(place - 1, block))
                    by_hand = (g * moved).flatten(1).sum(1)
                    torch.testing.assert_close(rows[:, column], by_hand, rtol=1e-12, atol=1e-12)
                    column += 1
    assert column == rows.shape[1] == axes.unknowns(symmetric=False)


def test_axes_depend_on_shapes_and_on_nothing_else() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Linear(3, 1))
    plan = raw_axes(net, dict(net.named_parameters()), affine=True)
    assert [(a.axis, a.along, a.view) for a in plan["0.weight"].axes][-1] == (2, 0, (2, 4, 2, 3, 3))
    assert plan["1.weight"].axes == (RawAxis(1, (1, 3)),)
    assert plan["1.weight"].shifts
    assert plan["1.bias"].axes == (RawAxis(0, (1,)),)


def test_a_model_without_gradients_is_refused() -> None:
    class Stopped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(DataError, match="no output depends on a parameter"):
        count_symmetries(Stopped(6, 2), X)
