"""The comparison of rules with autograd on large matrices, by their products with random vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from noetherflow.moments.forms import OneToken, Outer
from noetherflow.moments.verify import ProbedTotal, Total, size_of

DTYPES = [torch.float64, torch.float32]


def product(tokens: int, dtype: torch.dtype) -> Outer:
    rng = torch.Generator().manual_seed(0)
    shape = (24, tokens) if tokens else (24,)
    left, right = (torch.randn(*shape, d, generator=rng, dtype=torch.float64).to(dtype) for d in (70, 90))
    return Outer(left, right) if tokens else OneToken(left, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_probes_pass_what_the_whole_matrix_passes(tokens: int, dtype: torch.dtype) -> None:
    form = product(tokens, dtype)
    expected = form.dense(0, form.samples).sum(0)
    for total in (ProbedTotal.of(form, form.scale(), dtype), Total(form.total(), form.scale(), dtype)):
        assert total.agrees(expected, size_of(expected))


def changes(expected: Tensor) -> dict[str, Tensor]:
    """Wrong gradients, each off by 1 % of the norm: as small as one entry, as spread as noise."""
    rng = torch.Generator().manual_seed(1)
    one, pair = torch.zeros_like(expected), torch.zeros_like(expected)
    one[3, 5] = 1.0
    pair[3, 5], pair[3, 6] = 1.0, -1.0
    noise = torch.randn(expected.shape, generator=rng, dtype=torch.float64).to(expected)
    row, rank_one = torch.zeros_like(expected), torch.outer(noise[:, 0], noise[0])
    row[7] = noise[7]
    found = {"entry": one, "opposite pair": pair, "row": row, "rank one": rank_one, "noise": noise, "factor": expected}
    return {name: 0.01 * expected.norm() * d / d.norm() for name, d in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["entry", "opposite pair", "row", "rank one", "noise", "factor"])
def test_probes_refuse_what_the_whole_matrix_refuses(kind: str, dtype: torch.dtype) -> None:
    form = product(5, dtype)
    expected = form.total()
    wrong = expected + changes(expected)[kind]
    for total in (ProbedTotal.of(form, form.scale() * 0, dtype), Total(expected, form.scale() * 0, dtype)):
        assert not total.agrees(wrong, size_of(wrong))


def test_the_distance_that_probes_see_is_the_norm_of_the_difference() -> None:
    """Within a factor of four for a difference of rank one, of 10 % for one that fills the matrix."""
    form = product(5, torch.float64)
    total, expected = ProbedTotal.of(form, form.scale(), torch.float64), form.total()
    for kind, change in changes(expected).items():
        seen = float(total.distance(expected + change) / change.norm())
        assert (0.9 < seen < 1.1) if kind == "noise" else (0.25 < seen < 4)


def test_a_number_that_is_none_is_seen() -> None:
    form = product(5, torch.float64)
    total = ProbedTotal.of(form, form.scale(), torch.float64)
    wrong = form.total()
    wrong[0, 0] = float("nan")
    assert not total.agrees(wrong, size_of(wrong))
