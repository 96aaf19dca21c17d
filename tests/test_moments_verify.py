"""The comparison of rules with autograd on large matrices, by their products with random vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from noetherflow.moments.convolution import Convolution
from noetherflow.moments.forms import LARGE, OneToken, Outer
from noetherflow.moments.layout import SampleLayout
from noetherflow.moments.sizes import size_of
from noetherflow.moments.taps import Use
from noetherflow.moments.verify import ProbedTotal, Shadow, Total

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
    for total in (ProbedTotal.of(form, 90, form.scale(), dtype), Total(form.total(), form.scale(), dtype)):
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
    for total in (ProbedTotal.of(form, 90, form.scale() * 0, dtype), Total(expected, form.scale() * 0, dtype)):
        assert not total.agrees(wrong, size_of(wrong))


def test_the_distance_that_probes_see_is_the_norm_of_the_difference() -> None:
    """Within a factor of four for a difference of rank one, of 10 % for one that fills the matrix."""
    form = product(5, torch.float64)
    total, expected = ProbedTotal.of(form, 90, form.scale(), torch.float64), form.total()
    for kind, change in changes(expected).items():
        seen = float(total.distance(expected + change) / change.norm())
        assert (0.9 < seen < 1.1) if kind == "noise" else (0.25 < seen < 4)


def test_a_number_that_is_none_is_seen() -> None:
    form = product(5, torch.float64)
    total = ProbedTotal.of(form, 90, form.scale(), torch.float64)
    wrong = form.total()
    wrong[0, 0] = float("nan")
    assert not total.agrees(wrong, size_of(wrong))


SETTINGS = [  # axes of positions, stride, padding, dilation, groups
    (1, 1, 0, 1, 1),
    (1, 2, 3, 2, 4),
    (2, 1, 1, 1, 1),
    (2, 2, 1, 1, 1),
    (2, 1, 2, 2, 2),
    (2, 3, 0, 1, 16),
    (3, 2, 1, 1, 2),
]


def convolution(nd: int, stride: int, padding: int, dilation: int, groups: int) -> Convolution:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 16, *[9] * nd, generator=rng, dtype=torch.float64)
    weight = torch.randn(32, 16 // groups, *[3] * nd, generator=rng, dtype=torch.float64)
    points = (9 + 2 * padding - 2 * dilation - 1) // stride + 1
    delta = torch.randn(3, 2, 32, *[points] * nd, generator=rng, dtype=torch.float64)
    each = [stride] * nd, [padding] * nd, [dilation] * nd
    return Convolution(x, delta, weight, (*each, False, [0] * nd, groups))


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_total_of_a_convolution_times_vectors_needs_no_total(settings: tuple[int, int, int, int, int]) -> None:
    form = convolution(*settings)
    vectors = torch.randn(form.weight[0].numel(), 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(form.total_times(vectors), form.total().flatten(1) @ vectors)


def test_large_convolutions_are_probed_and_refused_as_matrices_are() -> None:
    form = convolution(2, 1, 1, 1, 1)
    assert form.weight.numel() > LARGE
    assert form.columns == 144
    expected, scale = form.total(), form.scale()
    total = ProbedTotal.of(form, 144, scale * 0, torch.float64)
    assert total.agrees(expected, size_of(expected))
    for change in changes(expected.flatten(1)).values():
        assert not total.agrees(expected + change.view_as(expected), size_of(expected))


def test_small_and_transposed_convolutions_are_compared_whole() -> None:
    form = convolution(1, 1, 0, 1, 4)
    assert form.columns is None
    stride, padding, dilation, _, output, groups = convolution(2, 1, 1, 1, 1).settings
    transposed = (stride, padding, dilation, True, output, groups)
    assert Convolution(form.x, form.delta, torch.ones(128, 128, 1), transposed).columns is None


LAYOUTS = [
    ((5, 3), (0,), SampleLayout(0)),
    ((5, 4, 3), (0, 1), SampleLayout(0)),
    ((4, 5, 3), (0, 1), SampleLayout(1)),
    ((20, 3), (0,), SampleLayout(0, 1, "major")),
    ((20, 3), (0,), SampleLayout(0, 1, "minor")),
    ((5, 3, 4, 4), (0,), SampleLayout(0)),
    ((3, 5), (0, 1), SampleLayout(1)),
    ((5,), (0,), SampleLayout(0)),
]


def shadow_of(delta: Tensor, axes: tuple[int, ...]) -> Shadow:
    use = Use(("linear", ("w",), 0), (), (), (), delta.shape, axes, True)
    return Shadow.of(use, delta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axes", "layout"), LAYOUTS)
def test_a_shadow_scales_with_the_samples_and_shows_a_row_that_does_not(
    shape: tuple[int, ...], axes: tuple[int, ...], layout: SampleLayout, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(2)
    delta = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
    weights = 0.5 + torch.rand(5, generator=rng, dtype=torch.float64)
    plain = shadow_of(delta, axes)
    scale, seen = plain.scale(layout, 5), plain.by_sample(layout, 5)

    weighted = delta.clone()
    rows = layout.front(weighted, 5)  # a view
    rows.mul_(weights.to(dtype).view(-1, *[1] * (rows.ndim - 1)))
    rounding = 100 * torch.finfo(dtype).eps
    assert (shadow_of(weighted, axes).by_sample(layout, 5) - weights * seen).abs().max() <= rounding * scale
    assert float(seen.abs().max()) <= (1 + rounding) * float(scale)

    rows[3] += 0.1 * layout.front(delta, 5)[1]  # sample 1's loss reaches into sample 3's row
    distance = (shadow_of(weighted, axes).by_sample(layout, 5) - weights * seen).abs()
    assert float(distance[3]) > 2e-3 * float(scale)
    assert float(distance[[0, 1, 2, 4]].max()) <= rounding * float(scale)


def test_the_scale_of_a_shadow_is_no_smaller_than_the_direction_allows() -> None:
    """The projection of a row along its own direction has the size of the scale."""
    steps = [torch.sin(1.0 + 7.3 * torch.arange(n, dtype=torch.float64)) for n in (4, 3)]
    delta = torch.outer(*steps).expand(5, 4, 3).contiguous()
    shadow = shadow_of(delta, (0,))
    torch.testing.assert_close(shadow.by_sample(SampleLayout(0), 5), shadow.scale(SampleLayout(0), 5).expand(5))
    assert shadow.rows().shape == (20,)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_shadows_keep_their_scale_where_squares_leave_the_range(size: float) -> None:
    delta = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    small = shadow_of(delta * size, (0,)).scale(SampleLayout(0), 5)
    torch.testing.assert_close(small / size, shadow_of(delta, (0,)).scale(SampleLayout(0), 5), rtol=1e-5, atol=0.0)
