"""Per-sample gradients of one operand in factored form, and their contraction to sums, squares and leg Grams.

Every form stands for `G_i`, the gradient of sample `i` with respect to the operand, without holding all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noetherflow.moments.target import SidedLeg, Target, stacked, wide

# Time of one element moved through the cache, in floating-point operations of a matrix product.
MOVE = 16.0


class Form(ABC):
    """`G_0 .. G_{samples - 1}`."""

    samples: int

    @abstractmethod
    def dense(self, lo: int, hi: int) -> Tensor:
        """`[hi - lo, *operand shape]`: the gradients themselves."""

    @abstractmethod
    def total(self) -> Tensor:
        """`sum_i G_i`, the operand's shape."""

    @abstractmethod
    def accumulate(self, target: Target, lo: int, hi: int) -> None:
        """Add samples `lo .. hi - 1` to everything the target wants; the operand is the whole parameter."""

    @abstractmethod
    def scale(self) -> Tensor:
        """A bound on the size of `total()` without cancellation, for tolerances."""

    def transposed(self) -> Form | None:
        """The same gradients for the transposed operand, where that is cheap."""
        return None


@dataclass(eq=False)
class Dense(Form):
    """Explicit gradients `g`, `[samples, *operand shape]`, sums of `summands`: biases, gains, other small operands."""

    g: Tensor
    summands: Tensor | None = None

    @property
    def samples(self) -> int:  # type: ignore[override]
        return self.g.shape[0]

    def dense(self, lo: int, hi: int) -> Tensor:
        return self.g[lo:hi]

    def total(self) -> Tensor:
        return self.g.sum(0)

    def accumulate(self, target: Target, lo: int, hi: int) -> None:
        target.add_dense(self.g[lo:hi])

    def scale(self) -> Tensor:
        terms = self.g if self.summands is None else self.summands
        return terms.norm() * terms[0].numel() ** 0.5


@dataclass(eq=False)
class Outer(Form):
    """`G_i = sum_t left[i, t] right[i, t]^T`, an `m x n` operand; `left` `[samples, tokens, m]`, `right` `[.., n]`."""

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        self.samples = self.left.shape[0]
        self.dtype = wide(torch.promote_types(self.left.dtype, self.right.dtype))

    def _slice(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        return self.left[lo:hi].to(self.dtype), self.right[lo:hi].to(self.dtype)

    def transposed(self) -> Outer:
        return Outer(self.right, self.left)

    def dense(self, lo: int, hi: int) -> Tensor:
        left, right = self._slice(lo, hi)
        return left.mT @ right

    def total(self) -> Tensor:
        left, right = self._slice(0, self.samples)
        return left.flatten(0, 1).mT @ right.flatten(0, 1)

    def scale(self) -> Tensor:
        return self.left.to(self.dtype).norm() * self.right.to(self.dtype).norm()

    def accumulate(self, target: Target, lo: int, hi: int) -> None:
        left, right = self._slice(lo, hi)
        tokens, m, n = left.shape[1], left.shape[2], right.shape[2]
        if tokens == 1:
            _add_rank_one(target, left[:, 0], right[:, 0])
        elif prefer_token_grams(target, tokens, m, n):
            target.gradient.view(m, n).addmm_(left.flatten(0, 1).mT, right.flatten(0, 1))
            add_token_grams(target, left, right)
        else:
            buffer = torch.empty(m, n, dtype=self.dtype, device=left.device)
            add_one_by_one(target, hi - lo, lambda i: torch.mm(left[i].mT, right[i], out=buffer))


def _add_rank_one(target: Target, left: Tensor, right: Tensor) -> None:
    """One token per sample, `G = l r^T`: `E[G_oi^2] = sum l_o^2 r_i^2`, and Grams weighted by the other side's norm."""
    m, n = left.shape[1], right.shape[1]
    target.gradient.view(m, n).addmm_(left.mT, right)
    split = target.need.split(m)
    if target.squares is not None:
        target.squares.view(m, n).addmm_(left.square().mT, right.square())
    elif split.mixed_torus:
        target.add_squares((left.square().mT @ right.square()).view(target.need.shape))
    else:
        _add_sided(target, split.torus, left, right)
    _add_sided(target, split.linear, left, right)
    if split.mixed_linear:
        for i in range(len(left)):
            gradient = torch.outer(left[i], right[i]).view(*target.need.shape, 1)
            target.add_grams(gradient, split.mixed_linear)


def _add_sided(target: Target, legs: Sequence[SidedLeg], left: Tensor, right: Tensor) -> None:
    for side, own, other in (("rows", left, right), ("columns", right, left)):
        here = [(need, leg) for need, s, leg in legs if s == side]
        if here:
            norms = torch.linalg.vector_norm(other, dim=1, keepdim=True)
            weighted = own * norms
            squares = weighted.square_().sum(0) if here[0][0].torus else weighted
            for need, leg in here:
                target.add_leg(need, leg.row_sums(squares) if need.torus else stacked(leg).gram(weighted.mT))


def prefer_token_grams(target: Target, tokens: int, m: int, n: int) -> bool:
    """Whether `tokens x tokens` Grams cost less than one explicit `m x n` gradient per sample.

    Both also pay `2 tokens m n` for the summed gradient. Direct: the elementwise passes over `m n` (gradient, square)
    and `2 m n dim` per general-linear leg. Token Grams: `2 tokens^2 (m + n)` per side, `2 tokens m dim` per linear leg.
    """
    split = target.need.split(m)
    if target.need.entries or not split.separable:
        return False
    sides = {side for _, side, _ in (*split.torus, *split.linear)}
    direct = MOVE * m * n + sum(2 * m * n * leg.dim for _, _, leg in split.linear)
    grams = 2 * tokens**2 * (m + n) * len(sides) + MOVE * tokens * (tokens + m + n)
    grams += sum(2 * tokens * (m if side == "rows" else n) * leg.dim for _, side, leg in split.linear)
    return grams < direct


def add_token_grams(target: Target, left: Tensor, right: Tensor) -> None:
    """`G = l^T r` over tokens: `G G^T = l^T (r r^T) l`, so rows need the token Gram of `right`."""
    split = target.need.split(left.shape[2])
    for side, own, other in (("rows", left, right), ("columns", right, left)):
        torus = [(need, leg) for need, s, leg in split.torus if s == side]
        linear = [(need, leg) for need, s, leg in split.linear if s == side]
        if torus or linear:
            weighted = other @ other.mT @ own
            sums = (weighted * own).sum((0, 1))
            for need, leg in torus:
                target.add_leg(need, leg.row_sums(sums))
            for need, leg in linear:
                wide_leg = stacked(leg)
                flat = (t.flatten(0, 1).mT for t in (weighted, own))
                a, b = (wide_leg.unfold(t) for t in flat)
                target.add_leg(need, a @ b.mT)


def add_one_by_one(target: Target, samples: int, gradient: Callable[[int], Tensor]) -> None:
    """One explicit gradient at a time, small enough to stay in cache."""
    shape = target.need.shape
    squares = torch.zeros_like(target.gradient) if target.squares is None else target.squares
    for i in range(samples):
        g = gradient(i).reshape(shape)
        target.gradient.add_(g)
        squares.addcmul_(g, g)
        if target.need.grams:
            target.add_grams(g.unsqueeze(-1))
    if target.squares is None:
        target.add_squares(squares)


@dataclass(eq=False)
class Lookup(Form):
    """Embedding: `G_i = sum_t onehot(index[i, t]) delta[i, t]^T`, `rows x d`; repeated indices of a sample add up."""

    index: Tensor
    delta: Tensor
    rows: int

    def __post_init__(self) -> None:
        self.samples = self.index.shape[0]
        self.delta = self.delta.to(wide(self.delta.dtype))

    def dense(self, lo: int, hi: int) -> Tensor:
        k, d = hi - lo, self.delta.shape[2]
        out = self.delta.new_zeros(k * self.rows, d)
        offset = self.rows * torch.arange(k, device=out.device).unsqueeze(1)
        return out.index_add_(0, (self.index[lo:hi] + offset).flatten(), self.delta[lo:hi].flatten(0, 1)).view(
            k, self.rows, d
        )

    def total(self) -> Tensor:
        out = self.delta.new_zeros(self.rows, self.delta.shape[2])
        return out.index_add_(0, self.index.flatten(), self.delta.flatten(0, 1))

    def scale(self) -> Tensor:
        return self.delta.norm() * self.index.numel() ** 0.5

    def accumulate(self, target: Target, lo: int, hi: int) -> None:
        split = target.need.split(self.rows)
        if split.mixed_linear or split.mixed_torus or any(side == "rows" for _, side, _ in split.linear):
            add_one_by_one(target, hi - lo, lambda i: self.dense(lo + i, lo + i + 1)[0])
            return
        index, per_token = self.index[lo:hi], self.delta[lo:hi].flatten(0, 1)
        target.gradient.index_add_(0, index.flatten(), per_token)
        tokens, merged = self._merge_repeats(index, per_token)
        squares = merged.square()
        if target.squares is not None:
            target.squares.index_add_(0, tokens, squares)
        else:
            by_row = squares.new_zeros(self.rows).index_add_(0, tokens, squares.sum(1))
            by_column = squares.sum(0)
            for need, side, leg in split.torus:
                target.add_leg(need, leg.row_sums(by_row if side == "rows" else by_column))
        for need, _, leg in split.linear:
            target.add_leg(need, stacked(leg).gram(merged.mT))

    def _merge_repeats(self, index: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """`(row of slot, gradient of slot)`: one slot per distinct (sample, row), the unused slots zero."""
        samples = torch.arange(len(index), device=index.device).unsqueeze(1)
        keys, order = (index + self.rows * samples).flatten().sort()
        slot = torch.zeros_like(keys)
        slot[1:] = (keys[1:] != keys[:-1]).cumsum(0)
        merged = torch.zeros_like(delta).index_add_(0, slot, delta[order])
        return torch.zeros_like(keys).index_copy_(0, slot, keys % self.rows), merged


@dataclass(eq=False)
class Convolution(Form):
    """N-d convolution, also grouped, dilated or transposed; `x`, `delta` `[samples, fold, channels, ...]`."""

    x: Tensor
    delta: Tensor
    weight: Tensor
    settings: tuple[list[int], list[int], list[int], bool, list[int], int]

    def __post_init__(self) -> None:
        self.samples = self.x.shape[0]
        dtype = wide(self.delta.dtype)
        self.x, self.delta, self.weight = (t.to(dtype) for t in (self.x, self.delta, self.weight))

    def _gradient(self, lo: int, hi: int) -> Tensor:
        x, delta = self.x[lo:hi].flatten(0, 1), self.delta[lo:hi].flatten(0, 1)
        return torch.ops.aten.convolution_backward(delta, x, self.weight, None, *self.settings, (False, True, False))[1]

    def dense(self, lo: int, hi: int) -> Tensor:
        return torch.stack([self._gradient(i, i + 1) for i in range(lo, hi)])

    def total(self) -> Tensor:
        return self._gradient(0, self.samples)

    def scale(self) -> Tensor:
        return self.x.norm() * self.delta.norm() * self.weight[0, 0].numel() ** 0.5

    def accumulate(self, target: Target, lo: int, hi: int) -> None:
        transposed, groups = self.settings[3], self.settings[5]
        m, n = self.weight.shape[0], self.weight[0].numel()
        tokens = self.delta.shape[1] * self.delta[0, 0, 0].numel()
        if not transposed and groups == 1 and prefer_token_grams(target, tokens, m, n):
            target.gradient.add_(self._gradient(lo, hi))
            for i in range(lo, hi):
                left = self.delta[i].flatten(2).movedim(1, 2).reshape(1, -1, m)
                add_token_grams(target, left, self._patches(self.x[i]).reshape(1, -1, n))
        else:
            add_one_by_one(target, hi - lo, lambda i: self._gradient(lo + i, lo + i + 1))

    def _patches(self, x: Tensor) -> Tensor:
        """`[fold, *output positions, channels, *kernel]`."""
        stride, padding, dilation = self.settings[:3]
        x = torch.nn.functional.pad(x, [p for size in reversed(padding) for p in (size, size)])
        nd = x.ndim - 2
        for axis in range(nd):
            reach = (self.weight.shape[2 + axis] - 1) * dilation[axis] + 1
            x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
        return x.movedim(1, 1 + nd)


@dataclass(eq=False)
class Blocks(Form):
    """`G_i[s] = sum_t left[i, t, s] right[i, t, s]^T`, one outer product per block, brought to the operand's shape.

    `left` `[samples, tokens, blocks, m]`, `right` `[samples, tokens, blocks, n]`; `arrange` takes `[blocks, m, n]`.
    """

    left: Tensor
    right: Tensor
    arrange: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        self.samples = self.left.shape[0]
        dtype = wide(torch.promote_types(self.left.dtype, self.right.dtype))
        self.left, self.right = self.left.to(dtype), self.right.to(dtype)

    def dense(self, lo: int, hi: int) -> Tensor:
        per_sample = self.left[lo:hi].permute(0, 2, 3, 1) @ self.right[lo:hi].transpose(1, 2)
        return torch.stack([self.arrange(g) for g in per_sample])

    def total(self) -> Tensor:
        left, right = self.left.flatten(0, 1), self.right.flatten(0, 1)
        return self.arrange(left.permute(1, 2, 0) @ right.transpose(0, 1))

    def scale(self) -> Tensor:
        return self.left.norm() * self.right.norm()

    def accumulate(self, target: Target, lo: int, hi: int) -> None:
        add_one_by_one(target, hi - lo, lambda i: self.dense(lo + i, lo + i + 1)[0])
