"""How many legs move an entry, and how hard: the numbers by which joint steps are shortened."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.symmetry.overlap import leg_coordinates, overlapping_parameters, stiffness
from noetherflow.symmetry.symmetry import Symmetry


def moved_entries(symmetry: Symmetry, leg: int, shape: tuple[int, ...], block: int) -> Tensor:
    """Which entries of a parameter one leg moves when only this block's element differs from 1, by moving them."""
    chosen = symmetry.weight_legs[leg]
    element = torch.ones(symmetry.blocks, dtype=torch.float64)
    element[block] = math.e
    moved = chosen.scale(torch.ones(shape, dtype=torch.float64), element)
    return moved.log()


def expected_stiffness(symmetries: list[Symmetry], shapes: dict[str, tuple[int, ...]]) -> list[Tensor]:
    """By definition: the largest sum of |exponent| over all legs that move one of the block's entries."""
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for s in symmetries:
        for (j, leg), block in itertools.product(enumerate(s.weight_legs), range(s.blocks)):
            total[leg.parameter] += moved_entries(s, j, shapes[leg.parameter], block).abs()
    out = []
    for s in symmetries:
        largest = torch.zeros(s.blocks, dtype=torch.float64)
        for (j, leg), block in itertools.product(enumerate(s.weight_legs), range(s.blocks)):
            own = moved_entries(s, j, shapes[leg.parameter], block) != 0
            largest[block] = torch.maximum(largest[block], total[leg.parameter][own].max())
        out.append(largest)
    return out


class Squared(nn.Module):
    """A square between the second layer and the third, so that exponents differ from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).square())


MODELS = {
    "mlp": (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), [2.0, 2.0]),
    "one hidden layer": (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), [1.0]),
    "square": (Squared(), [2.0, 2.0]),
}


@pytest.mark.parametrize("name", MODELS)
def test_stiffness_is_the_sum_of_exponents_over_the_legs_that_meet(name: str) -> None:
    model, by_hand = MODELS[name]
    syms = list(nf.find_symmetries(model.double(), torch.randn(2, 3)))
    shapes = {n: tuple(t.shape) for n, t in nf.tensors_of(model).items()}
    found = stiffness(leg_coordinates(syms, shapes), syms)
    for s, got, want in zip(syms, found, expected_stiffness(syms, shapes), strict=True):
        torch.testing.assert_close(got, want, msg=s.name)
    if name != "square":
        assert sorted(float(k.max()) for k in found) == by_hand


def test_only_parameters_with_entries_of_several_legs_overlap() -> None:
    model, _ = MODELS["mlp"]
    syms = list(nf.find_symmetries(model, torch.randn(2, 3)))
    shapes = {n: tuple(t.shape) for n, t in nf.tensors_of(model).items()}
    assert overlapping_parameters(leg_coordinates(syms, shapes)) == {"2.weight"}
    assert overlapping_parameters(leg_coordinates(syms[:1], shapes)) == set()
