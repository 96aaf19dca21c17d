"""The structural finder against the numerical null space, architecture by architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from noetherflow import SymmetrySet
from noetherflow.discovery import count_symmetries, find_symmetries
from noetherflow.errors import DataError
from zoo import ZOO

EXPLAINED = {
    # One layer only: the patches' stream is read by one norm and then thrown away, so its scale is free of the
    # class token's; the finder ties all positions of a tensor.
    "vit": 1,
}
SLOW = ("gpt2", "whisper", "t5", "resnet_bottleneck", "gpt2_eager", "convnext")
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ZOO]


def found(syms: SymmetrySet) -> int:
    """Symmetric generators of the finder: tori, GL blocks, and those in the span of an axis' mean directions."""
    exponential = sum(s.blocks if s.is_torus else s.blocks * s.dim * (s.dim + 1) // 2 for s in syms)
    return exponential + sum(t.leg.blocks * (t.leg.blocks + 1) // 2 for t in syms.translations if t.leg.dim > 1)


@pytest.mark.parametrize("name", NAMES)
def test_finder_is_complete(name: str) -> None:
    case = ZOO[name]()
    for p in case.model.parameters():
        p.requires_grad_(True)
    normalised = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in case.model.modules())
    oracle = count_symmetries(case.model, case.inputs, train=normalised)
    assert oracle.zero < 1e-6 < 20 * 1e-6 < oracle.nonzero, "the singular values must leave a gap"
    structural = found(find_symmetries(case.model, case.inputs))
    assert oracle.symmetries == structural + EXPLAINED.get(name, 0)


@pytest.mark.parametrize(
    ("name", "dimension"),
    [
        ("deep_linear", 16 + 9),
        ("mlp", 11),
        ("llama", 16 + 4 + 6 + 24 + 1),
        ("opt", 86 + 1 + 40),
        ("t5_encoder", 87 + 9),
    ],
)
def test_lie_algebra_dimensions_of_theory_11(name: str, dimension: int) -> None:
    """T5: 87, and 9 shifts of the relative position table (9 of its rows are used, any row may drive the shift)."""
    case = ZOO[name]()
    assert count_symmetries(case.model, case.inputs, symmetric=False).symmetries == dimension


def test_rotations_are_counted_only_without_the_symmetry_restriction() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    x = torch.randn(3, 2)
    assert count_symmetries(net, x).symmetries == 6
    assert count_symmetries(net, x, symmetric=False).symmetries == 9


def test_a_nonlinear_net_without_symmetries_counts_zero() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    count = count_symmetries(net, torch.randn(4, 3))
    assert count.symmetries == 0
    assert count.relations == 2


def test_too_large_a_model_is_refused() -> None:
    with pytest.raises(DataError, match="unknowns are too many"):
        count_symmetries(nn.Linear(200, 200), torch.randn(2, 200))


def test_a_parameter_without_gradient_takes_no_direction_from_the_others() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.dead = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu()) + self.dead(torch.zeros_like(x))

    assert count_symmetries(Dead(), torch.randn(4, 3)).symmetries == 4
