"""Per-sample gradients of convolution kernels, through the patches that the kernel sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from noetherflow.moments.forms import LARGE, Form, add_token_grams, chunks, norm, prefer_token_grams
from noetherflow.moments.target import Target, wide

# Convolutions with more entries of patches per sample go one by one on a CPU: measured on 2 cores, one by one takes
# 10 and 1.7 times as long as together at 2^9 and 2^13 entries, as long at 2^15, half as long above.
PATCHES_CPU = 1 << 14


@dataclass(eq=False)
class Convolution(Form):
    """Convolution in one to three dimensions, also grouped, dilated or transposed.

    `x` (inputs) and `delta` (output gradients) are `[samples, fold, channels, *positions]`, with `fold` images per
    sample. `settings`: stride, padding, dilation, transposed, output padding, groups, as `convolution_backward` takes
    them.
    """

    x: Tensor
    delta: Tensor
    weight: Tensor
    settings: tuple[list[int], list[int], list[int], bool, list[int], int]

    def __post_init__(self) -> None:
        self.samples = self.x.shape[0]
        dtype = wide(self.delta.dtype)
        self.x, self.delta, self.weight = (t.to(dtype) for t in (self.x, self.delta, self.weight))

    def _gradient(self, lo: int, hi: int) -> Tensor:
        """The gradient summed over samples `lo .. hi - 1`, by torch's own backward."""
        x, delta = self.x[lo:hi].flatten(0, 1), self.delta[lo:hi].flatten(0, 1)
        wanted = (False, True, False)
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            delta, x, self.weight, None, *self.settings, wanted
        )
        return found[1]

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Positions per sample (`tokens`), and the weight as a matrix `m x n`."""
        points = self.x if self.settings[3] else self.delta
        return points.shape[1] * points[0, 0, 0].numel(), self.weight.shape[0], self.weight[0].numel()

    def _pieces(self, target: Target, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        """Samples measured together, through their patches; one by one where those are many and calls are cheap."""
        tokens, m, n = self._sizes
        patches = tokens * n * self.settings[5]
        if self.x.device.type == "cpu" and patches > PATCHES_CPU:
            return ((i, i + 1) for i in range(lo, hi))
        return chunks(target, max(patches, m * n), lo, hi)

    def _gradients(self, lo: int, hi: int) -> Tensor:
        """`[hi - lo, *weight shape]`: `delta^T patches(x)`; the other way round for a transposed convolution."""
        if hi - lo == 1:
            return self._gradient(lo, hi).unsqueeze(0)
        points, image = (self.x, self.delta) if self.settings[3] else (self.delta, self.x)
        groups, (_, m, n) = self.settings[5], self._sizes
        left = points[lo:hi].flatten(3).mT.reshape(hi - lo, -1, groups, m // groups)
        right = self._patches(image[lo:hi].flatten(0, 1), points.shape[3:]).reshape(hi - lo, -1, groups, n)
        return (left.permute(0, 2, 3, 1) @ right.transpose(1, 2)).reshape(hi - lo, *self.weight.shape)

    def dense(self, lo: int, hi: int) -> Tensor:
        return torch.cat([self._gradients(i, i + 1) for i in range(lo, hi)])

    def total(self) -> Tensor:
        return self._gradient(0, self.samples)

    @property
    def columns(self) -> int | None:
        plain = not self.settings[3] and self.weight.numel() > LARGE
        return self.weight[0].numel() if plain else None

    def total_times(self, vectors: Tensor) -> Tensor:
        """`sum delta^T patches(x) v`, not of a transposed convolution; `patches(x) v` is `x` convolved with `v`."""
        stride, padding, dilation, _, _, groups = self.settings
        delta, x = self.delta.flatten(0, 1), self.x.flatten(0, 1)
        kernels = vectors.to(x).mT.reshape(-1, *self.weight.shape[1:]).repeat(groups, *[1] * (x.ndim - 1))
        seen = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3](x, kernels, None, stride, padding, dilation, groups)
        left, right = (t.reshape(len(t), groups, -1, t[0, 0].numel()) for t in (delta, seen))
        return (left @ right.mT).sum(0).reshape(-1, vectors.shape[1])

    def scale(self) -> Tensor:
        return norm(self.x) * norm(self.delta) * sqrt(self.weight[0, 0].numel())

    def accumulate(self, target: Target, lo: int, hi: int) -> None:
        tokens, m, n = self._sizes
        if not self.settings[3] and self.settings[5] == 1 and prefer_token_grams(target.need, tokens, m, n):
            target.gradient.view(self.weight.shape).add_(self._gradient(lo, hi))
            for i, j in chunks(target, tokens * n, lo, hi):
                left = self.delta[i:j].flatten(3).mT.reshape(j - i, -1, m)
                right = self._patches(self.x[i:j].flatten(0, 1), self.delta.shape[3:]).reshape(j - i, -1, n)
                add_token_grams(target, left, right)
        else:
            for i, j in self._pieces(target, lo, hi):
                target.add_dense(self._gradients(i, j), Tensor.square_)

    def _patches(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """What the kernel sees at every position: `[images, *positions, channels, *kernel]`."""
        stride, padding, dilation = self.settings[:3]
        x = torch.nn.functional.pad(x, [p for size in reversed(padding) for p in (size, size)])
        nd = x.ndim - 2
        for axis in range(nd):
            reach = (self.weight.shape[2 + axis] - 1) * dilation[axis] + 1
            x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]].narrow(2 + axis, 0, positions[axis])
        return x.movedim(1, 1 + nd)
