"""Per-sample gradients of one operand in factored form, and their contraction to sums, squares and leg Grams.

Every form stands for `G_i`, the gradient of sample `i` with respect to the operand, without holding all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from noetherflow.moments.target import Need, SideLeg, Target, gram, wide

# Explicit gradients are made this many entries at a time: on a CPU they should stay in cache.
CHUNK_ENTRIES, CHUNK_ENTRIES_CPU = 1 << 24, 1 << 20
# One pass over one entry of an explicit gradient, in operations of a matrix product. Measured on 2 cores:
# 0.04 to 0.06 ns (sum, row norm, square of 2^20 float32 entries), while products of 128 tokens run at 190 per ns.
PASS = 10.0
LARGE = 4096
"""Entries above which a matrix is known by its products with vectors, where the whole of it is not needed."""


def membership(parts: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """1 where a sample lies in a part `lo .. hi - 1`, else 0: `[parts, samples]`; a product with it sums by part.

    Example:
        >>> membership([(0, 1), (1, 3)], torch.zeros(3, 8))
        tensor([[1., 0., 0.],
                [0., 1., 1.]])
    """
    out = like.new_zeros(len(parts), len(like))
    for row, (lo, hi) in zip(out, parts, strict=True):
        row[lo:hi] = 1
    return out


def norm(t: Tensor) -> Tensor:
    """The Frobenius norm, a scalar tensor."""
    found: Tensor = torch.linalg.vector_norm(t)
    return found


def chunks(target: Target, entries: int, lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """Samples `lo .. hi - 1` in runs whose explicit gradients, of so many `entries` each, are held at once."""
    limit = CHUNK_ENTRIES_CPU if target.need.device.type == "cpu" else CHUNK_ENTRIES
    step = max(1, limit // max(1, entries))
    return ((i, min(i + step, hi)) for i in range(lo, hi, step))


def _wide(a: Tensor, b: Tensor) -> torch.dtype:
    """The type in which products of the two are accumulated."""
    return wide(a.dtype if a.dtype == b.dtype else torch.promote_types(a.dtype, b.dtype))


class Form(ABC):
    """The gradients `G_0 .. G_{samples - 1}` of all samples with respect to one operand."""

    samples: int

    @abstractmethod
    def dense(self, lo: int, hi: int) -> Tensor:
        """`[hi - lo, *operand shape]`: the gradients themselves."""

    @abstractmethod
    def total(self) -> Tensor:
        """`sum_i G_i`, the operand's shape."""

    @property
    def columns(self) -> int | None:
        """The columns of the operand as a matrix, if it is so large that `total_times` needs less than `total`."""
        return None

    def total_times(self, vectors: Tensor) -> Tensor:
        """`sum_i G_i` as a matrix `m x n`, times vectors `[n, k]`: `[m, k]`, in the type of the sums."""
        total = self.total()
        return total.reshape(-1, len(vectors)) @ vectors.to(total)

    def accumulate(self, target: Target, lo: int, hi: int) -> None:
        """Add samples `lo .. hi - 1` to everything the target wants; the operand is the whole parameter.

        Here by explicit gradients, which `dense` must have made afresh.
        """
        for i, j in chunks(target, target.need.shape.numel(), lo, hi):
            target.add_dense(self.dense(i, j), Tensor.square_)

    @abstractmethod
    def scale(self) -> Tensor:
        """A bound on the size of `total()` without cancellation, for tolerances."""

    def transposed(self) -> Form | None:
        """The same gradients for the transposed operand, where that is cheap."""
        return None


@dataclass(eq=False)
class Dense(Form):
    """Explicit gradients `g`, `[samples, *operand shape]`: of biases, gains and other small operands.

    `summands`: what `g` was summed from, where it was (over tokens), to tell how large rounding errors may be.
    """

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
        target.add_dense(self.g if hi - lo == self.samples else self.g[lo:hi], target.scratch.square)

    def scale(self) -> Tensor:
        terms = self.g if self.summands is None else self.summands
        return norm(terms) * sqrt(terms[0].numel())


@dataclass(eq=False)
class Outer(Form):
    """`G_i = sum_t left[i, t] right[i, t]^T` of an `m x n` operand, the sum over the tokens of a sample.

    `left` is `[samples, tokens, m]`, `right` `[samples, tokens, n]`: for a linear layer, output gradients and inputs.
    `shape` is the operand's, where it has other than two axes: `(width, heads, n)` of a weight that is read as `width x
    (heads n)`.
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.samples = self.left.shape[0]
        self.dtype = _wide(self.left, self.right)
        self.matrix = self.left.shape[-1], self.right.shape[-1]

    def _shaped(self, gradients: Tensor) -> Tensor:
        """`[.., m, n]` brought to the operand's shape."""
        if self.shape is None or self.shape == self.matrix:
            return gradients
        return gradients.reshape(*gradients.shape[:-2], *self.shape)

    def _slice(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Both factors of samples `lo .. hi - 1`, in the type of accumulation."""
        left, right = (t if hi - lo == self.samples else t[lo:hi] for t in (self.left, self.right))
        return left.to(self.dtype), right.to(self.dtype)

    def transposed(self) -> Outer:
        return Outer(self.right, self.left)

    def dense(self, lo: int, hi: int) -> Tensor:
        left, right = self._slice(lo, hi)
        return self._shaped(torch.matmul(left.mT, right))

    def total(self) -> Tensor:
        left, right = self._slice(0, self.samples)
        return self._shaped(torch.matmul(left.flatten(0, 1).mT, right.flatten(0, 1)))

    @property
    def columns(self) -> int | None:
        m, n = self.matrix
        return n if m * n > LARGE else None

    def total_times(self, vectors: Tensor) -> Tensor:
        left, right = self.rows(0, self.samples)
        return left.mT @ (right @ vectors.to(right))

    def scale(self) -> Tensor:
        return norm(self.left.to(self.dtype)) * norm(self.right.to(self.dtype))

    def rows(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """`left` `[rows, m]` and `right` `[rows, n]` whose product `left^T right` sums samples `lo .. hi - 1`."""
        left, right = self._slice(lo, hi)
        return left.flatten(0, 1), right.flatten(0, 1)

    def leaves_gradients_out(self, need: Need) -> bool:
        """Whether everything but the summed gradient comes from the factors, by `add_legs`."""
        return prefer_token_grams(need, self.left.shape[1], *self.matrix)

    def add_legs(self, target: Target, lo: int, hi: int) -> None:
        """Add the leg Grams of samples `lo .. hi - 1`, where `leaves_gradients_out`."""
        add_token_grams(target, *self._slice(lo, hi))

    def add_legs_by_group(self, targets: Sequence[Target], parts: Sequence[tuple[int, int]]) -> None:
        """`add_legs` of the samples of each part to its target."""
        for target, (lo, hi) in zip(targets, parts, strict=True):
            self.add_legs(target, lo, hi)

    def accumulate(self, target: Target, lo: int, hi: int) -> None:
        if self.leaves_gradients_out(target.need):
            target.add_product(*self.rows(lo, hi))
            self.add_legs(target, lo, hi)
            return
        (m, n), (left, right) = self.matrix, self._slice(lo, hi)
        for i, j in chunks(target, m * n, 0, hi - lo):
            out = target.scratch.workspace.empty((j - i, m, n), left)
            target.add_dense(torch.bmm(left[i:j].mT, right[i:j], out=out), Tensor.square_)


@dataclass(eq=False)
class OneToken(Outer):
    """`Outer` with one token per sample, `G_i = left[i] right[i]^T`: `left` `[samples, m]`, `right` `[samples, n]`.

    `E[G_oi^2] = sum l_o^2 r_i^2`, so that row sums are those of `left^2` weighted by `|right|^2`.
    """

    def transposed(self) -> OneToken:
        return OneToken(self.right, self.left)

    def dense(self, lo: int, hi: int) -> Tensor:
        left, right = self._slice(lo, hi)
        return self._shaped(left.unsqueeze(2) * right.unsqueeze(1))

    def total(self) -> Tensor:
        left, right = self._slice(0, self.samples)
        return self._shaped(torch.matmul(left.mT, right))

    def rows(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        return self._slice(lo, hi)

    def leaves_gradients_out(self, need: Need) -> bool:
        return True

    def add_legs(self, target: Target, lo: int, hi: int) -> None:
        """Add the leg Grams, or the squares they are read off, of samples `lo .. hi - 1`."""
        left, right = self._slice(lo, hi)
        self._add_squares(target, left, right)
        split = target.need.split(left.shape[1])
        _add_weighted_grams(target, split.rows, left, right)
        _add_weighted_grams(target, split.columns, right, left)
        for leg in split.mixed:
            if not leg.torus:
                for i in range(lo, hi):
                    target.add_leg(leg, gram(leg.unfold(self.dense(i, i + 1).reshape(1, -1))))

    def add_legs_by_group(self, targets: Sequence[Target], parts: Sequence[tuple[int, int]]) -> None:
        """... all groups in one product per side where only torus legs are wanted."""
        left, right = self._slice(0, self.samples)
        split, square = targets[0].need.split(left.shape[1]), targets[0].scratch.square
        if split.mixed or not all(leg.torus for leg in (*split.rows, *split.columns)):
            super().add_legs_by_group(targets, parts)
            return
        groups = membership(parts, left)
        for legs, own, other in ((split.rows, left, right), (split.columns, right, left)):
            if legs:
                norms = torch.linalg.vector_norm(other, dim=1).square_()
                for target, sums in zip(targets, (groups * norms) @ square(own), strict=True):
                    target.add_sums(legs, sums)

    def _add_squares(self, target: Target, left: Tensor, right: Tensor) -> None:
        """Entry-wise squares `(left^2)^T right^2`, or else the torus legs, without making them where sums suffice."""
        split, square = target.need.split(left.shape[1]), target.scratch.square
        if target.squares is not None:
            target.squares.view(left.shape[1], -1).addmm_(square(left).mT, right.square())
        elif any(leg.torus for leg in split.mixed):
            target.add_torus_legs(square(left).mT @ right.square())
        else:
            target.add_side(split.columns, lambda: _weighted(right.square(), left))
            target.add_side(split.rows, lambda: _weighted(square(left), right))


def _add_weighted_grams(target: Target, legs: tuple[SideLeg, ...], own: Tensor, other: Tensor) -> None:
    """General-linear legs on one side of `G_i = own_i other_i^T`: `G_i G_i^T = |other_i|^2 own_i own_i^T`."""
    for leg in legs:
        if not leg.torus:
            norms = torch.linalg.vector_norm(other, dim=1, keepdim=True)
            target.add_leg(leg, gram(leg.unfold(own * norms)))


def _weighted(squares: Tensor, other: Tensor) -> Tensor:
    """`sum_i squares_i |other_i|^2`."""
    return torch.mv(squares.mT, torch.linalg.vector_norm(other, dim=1).square_())


def prefer_token_grams(need: Need, tokens: int, m: int, n: int) -> bool:
    """Whether `tokens x tokens` Grams cost less than one explicit `m x n` gradient per sample.

    Both also pay `2 tokens m n` for the summed gradient. Direct: passes over the `m n` entries (one for the sum, one
    for rows, two for columns) and `2 m n dim` per general-linear leg. Token Grams: `2 tokens^2 (m + n)` per side and
    `2 tokens m dim` per linear leg, and passes over their factors.
    """
    split = need.split(m)
    if need.entries or split.mixed:
        return False
    direct, grams = PASS * m * n, 0.0
    for legs, own, passes in ((split.rows, m, 1), (split.columns, n, 2)):
        dims = [leg.shape[1] for leg in legs if not leg.torus]
        direct += 2 * m * n * sum(dims) + (PASS * passes * m * n if len(dims) < len(legs) else 0)
        grams += 2 * tokens * own * sum(dims)
        grams += (2 * tokens**2 * (m + n) + PASS * tokens * (tokens + 2 * own)) if legs else 0
    return grams < direct


def add_token_grams(target: Target, left: Tensor, right: Tensor) -> None:
    """`G = l^T r` over tokens: `G G^T = l^T (r r^T) l`, so rows need the token Gram of `right`."""
    split = target.need.split(left.shape[2])
    for legs, own, other in ((split.rows, left, right), (split.columns, right, left)):
        if legs:
            weighted = other @ other.mT @ own
            target.add_side(legs, partial(_inner, own, weighted))
            for leg in legs:
                if not leg.torus:
                    target.add_leg(leg, leg.unfold(weighted.flatten(0, 1)) @ leg.unfold(own.flatten(0, 1)).mT)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The diagonal of `a^T b`, summed over samples and tokens."""
    return (a * b).sum((0, 1))


@dataclass(eq=False)
class Lookup(Form):
    """Rows looked up by index, as in an embedding of `rows x d`.

    `G_i` has `delta[i, t]` in row `index[i, t]`; gradients of a row that a sample looks up several times add up.
    `index` is `[samples, tokens]`, `delta` `[samples, tokens, d]`.
    """

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
        return norm(self.delta) * sqrt(self.index.numel())

    def accumulate(self, target: Target, lo: int, hi: int) -> None:
        split = target.need.split(self.rows)
        if split.mixed or any(not leg.torus for leg in split.rows):
            super().accumulate(target, lo, hi)
            return
        index, per_token = self.index[lo:hi], self.delta[lo:hi].flatten(0, 1)
        target.gradient.view(self.rows, -1).index_add_(0, index.flatten(), per_token)
        tokens, merged = self._merge_repeats(index, per_token)
        squares = merged.square()
        if target.squares is not None:
            target.squares.view(self.rows, -1).index_add_(0, tokens, squares)
        else:
            target.add_side(split.rows, lambda: squares.new_zeros(self.rows).index_add_(0, tokens, squares.sum(1)))
            target.add_side(split.columns, lambda: squares.sum(0))
        for leg in split.columns:
            if not leg.torus:
                target.add_leg(leg, gram(leg.unfold(merged)))

    def _merge_repeats(self, index: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """`(row of slot, gradient of slot)`: one slot per distinct (sample, row), the unused slots zero."""
        samples = torch.arange(len(index), device=index.device).unsqueeze(1)
        keys, order = (index + self.rows * samples).flatten().sort()
        slot = torch.zeros_like(keys)
        slot[1:] = (keys[1:] != keys[:-1]).cumsum(0)
        merged = torch.zeros_like(delta).index_add_(0, slot, delta[order])
        return torch.zeros_like(keys).index_copy_(0, slot, keys % self.rows), merged


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
        dtype = _wide(self.left, self.right)
        self.left, self.right = self.left.to(dtype), self.right.to(dtype)

    def dense(self, lo: int, hi: int) -> Tensor:
        per_sample = self.left[lo:hi].permute(0, 2, 3, 1) @ self.right[lo:hi].transpose(1, 2)
        return torch.stack([self.arrange(g) for g in per_sample])

    def total(self) -> Tensor:
        left, right = self.left.flatten(0, 1), self.right.flatten(0, 1)
        return self.arrange(left.permute(1, 2, 0) @ right.transpose(0, 1))

    def scale(self) -> Tensor:
        return norm(self.left) * norm(self.right)
