"""Moving and summing stored tensors piece by piece gives the numbers of the whole tensor, however it is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import noetherflow as nf
from noetherflow.balance.cuts import cuttings
from noetherflow.balance.motion import Motion
from noetherflow.balance.pieces import move_in_place, moved_sums
from noetherflow.balance.spill import spilled


def rows(blocks: int, dim: int = 1, replicas: int = 1, start: int = 0) -> np.ndarray:
    """Coordinates that take the rows one after the other, replica by replica."""
    return start + np.arange(blocks * replicas * dim).reshape(blocks, replicas, dim).transpose(0, 2, 1)


SHAPE = (24, 36)
LEGS = {
    "whole left": [nf.Leg("w", rows(1, 24))],
    "whole right": [nf.Leg("w", rows(1, 36), -1, (1,))],
    "heads left": [nf.Leg("w", rows(4, 6))],
    "heads right": [nf.Leg("w", rows(6, 6), -1, (1,))],
    "shuffled right": [nf.Leg("w", np.random.default_rng(0).permutation(36).reshape(3, 12, 1), -1, (1,))],
    "queries left": [nf.Leg("w", rows(2, 6, 2))],
    "half left": [nf.Leg("w", rows(2, 6))],
    "other half left": [nf.Leg("w", rows(1, 12, 1, 12), -1)],
    "both sides": [nf.Leg("w", rows(1, 24)), nf.Leg("w", rows(1, 24), -1, (1,))],
    "scales left": [nf.Leg("w", rows(24))],
    "scales right": [nf.Leg("w", rows(36), -1, (1,))],
    "pairs": [nf.Leg("w", rows(36), 1, (0, 2), (12, 2, 3, 12))],
    "gain": [nf.Leg("w", rows(36), 1, (1,), None, 1.0, False, 1.0)],
}
TORI = ("scales left", "scales right", "pairs", "gain")
TOGETHER = [
    ("whole left", "whole right"), ("heads left", "heads right"), ("whole left", "heads right"),
    ("heads left", "shuffled right"), ("queries left", "whole right"), ("half left", "other half left", "whole right"),
    ("both sides",), ("scales left", "whole left", "whole right"), ("whole left", "scales left", "whole right"),
    ("whole left", "heads left", "whole right"), ("scales left", "scales right"), ("pairs", "scales right"),
    ("whole right", "gain", "heads left"), ("whole left", "pairs", "whole right"), ("heads left", "scales right"),
]  # fmt: skip


@pytest.mark.parametrize("piece", [40, 100, 300, 10**6])
@pytest.mark.parametrize("names", TOGETHER)
def test_pieces_are_the_whole_on_both_axes(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], piece: int) -> None:
    monkeypatch.setattr("noetherflow.balance.cuts.PIECE", piece)
    symmetries = [nf.Symmetry(n, "test", "diagonal" if n in TORI else "general_linear", tuple(LEGS[n])) for n in names]
    torch.manual_seed(0)
    elements = {s.name: s.random_element() for s in symmetries}
    weight = torch.randn(SHAPE, dtype=torch.float64)
    motion = Motion(symmetries, elements)
    expected, moved = motion.weight("w", weight), weight.clone()
    shift = move_in_place(motion, "w", moved)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)
    assert shift.change == pytest.approx(float((expected - weight).norm() / weight.norm()), rel=1e-9)
    offset = 1.0 if "gain" in names else 0.0
    position = weight + offset
    moves = [(s, elements[s.name]) for s in symmetries]
    for count in range(len(moves) + 1):
        asked = [(s, leg) for s in symmetries for leg in s.weight_legs]
        sums = moved_sums("w", weight, moves[:count], asked)
        for (s, leg), gram in zip(asked, sums.grams, strict=True):
            torch.testing.assert_close(gram, s.leg_gram(leg, position), rtol=1e-11, atol=1e-11)
        assert sums.norm == pytest.approx(float(position.square().sum()), rel=1e-12)
        if count < len(moves):
            position = symmetries[count].move("w", position, moves[count][1])


def test_matrices_on_both_axes_take_pieces_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece is larger than asked for, though every row of the result depends on all rows."""
    monkeypatch.setattr("noetherflow.balance.cuts.PIECE", 100)
    both = [nf.Symmetry(n, "test", "general_linear", tuple(LEGS[n])) for n in ("whole left", "whole right")]
    for cutting in cuttings(both, "w", SHAPE):
        assert cutting.largest * 24 * 36 // SHAPE[cutting.axis] <= 100
        assert sorted(torch.cat([p.rows for p in cutting.pieces]).tolist()) == list(range(SHAPE[cutting.axis]))
        assert all(p.mixture is not None for p in cutting.pieces)


class Wide(TorchDispatchMode):
    """Records the most entries of any float64 tensor of two axes that is not square, as blocks of elements are."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.dtype == torch.float64
            and out.ndim == 2
            and out.shape[0] != out.shape[1]
        ):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("piece", [4000, 10**6])
def test_no_wide_copy_of_a_tensor_is_made(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Also where matrices act along both axes; with pieces as large as the tensor (the control) there is one."""
    monkeypatch.setattr("noetherflow.balance.cuts.PIECE", piece)
    sides = (nf.Leg("w", rows(1, 160)), nf.Leg("w", rows(1, 200), -1, (1,)))
    both = [nf.Symmetry(str(i), "test", "general_linear", (leg,)) for i, leg in enumerate(sides)]
    elements = {s.name: s.random_element() for s in both}
    weight = torch.randn(160, 200).bfloat16()
    with Wide() as seen:
        move_in_place(Motion(both, elements), "w", weight)
        moved_sums("w", weight, [(s, elements[s.name]) for s in both], [(s, s.legs[0]) for s in both])
    assert seen.largest <= 5000 if piece == 4000 else seen.largest >= 160 * 200


def test_spilled_tensors_are_the_same_and_outlive_their_file() -> None:
    given = [torch.randn(50, 100, dtype=torch.float64), torch.ones(3), torch.arange(9000), torch.randn(9000).bfloat16()]
    kept = spilled(given)
    for a, b in zip(given, kept, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert kept[1] is given[1], "small ones stay in memory"
    assert [a.data_ptr() == b.data_ptr() for a, b in zip(given, kept, strict=True)] == [False, True, False, False]
    kept[0].zero_()
    assert torch.equal(kept[2], given[2])
    assert bool(given[0].any())
