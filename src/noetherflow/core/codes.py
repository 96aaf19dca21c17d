"""Numbers that an optimiser stores in a few bits, read and written as numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass
from torch.utils._pytree import tree_leaves

BLOCK = 256
"""Numbers in a block of bitsandbytes."""


@dataclass(frozen=True, eq=False)
class BlockCodes:
    """An average of bitsandbytes in 8 bits: each number is `values[code]` times the largest of its block.

    It has the methods of a tensor that moving a state takes, so that both are moved by the same lines.

    Attributes:
        codes: of the parameter's shape.
        values: `[256]`, ascending, from -1 or 0 to 1.
        largest: the largest absolute number of each block of 256 (the last one may be shorter).

    Source: Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, arXiv 2110.02861.
    """

    codes: Tensor
    values: Tensor
    largest: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that the codes stand for."""
        return self.values.dtype

    def dequantize(self) -> Tensor:
        """The numbers."""
        return self.values[self.codes.long()] * self._scales

    def clone(self) -> BlockCodes:
        """A copy that later writes leave as it is."""
        return replace(self, codes=self.codes.clone(), largest=self.largest.clone())

    def copy_(self, source: Tensor | BlockCodes) -> None:
        """Store other numbers, each as the code nearest to it."""
        numbers = plain(source).to(self.dtype).flatten()
        padded = torch.nn.functional.pad(numbers, (0, -len(numbers) % BLOCK))
        self.largest.copy_(padded.view(-1, BLOCK).abs().amax(1))
        scaled = numbers / self._scales.flatten().clamp(min=torch.finfo(self.dtype).tiny)
        middles = (self.values[1:] + self.values[:-1]) / 2
        self.codes.copy_(torch.bucketize(scaled, middles).view(self.shape))

    @property
    def _scales(self) -> Tensor:
        """The largest number of its block for each code."""
        return self.largest.repeat_interleave(BLOCK)[: self.codes.numel()].view(self.shape)


def is_coded(value: object) -> TypeGuard[Tensor | BlockCodes]:
    """Whether it holds codes of a few bits that stand for numbers, as torchao's `OptimState8bit` does."""
    return isinstance(value, BlockCodes) or _is_coded_tensor(value)


def is_packed(value: object) -> bool:
    """Whether it is coded with several numbers in a byte, as torchao's `OptimState4bit` does."""
    if not _is_coded_tensor(value):
        return False
    names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
    return bool(max(getattr(value, name).numel() for name in names) < value.numel())


def plain(value: Tensor | BlockCodes) -> Tensor:
    """The numbers that codes stand for; tensors without codes as they are."""
    if isinstance(value, BlockCodes) or _is_coded_tensor(value):
        return value.dequantize()
    return value


def copied(value: Tensor | BlockCodes) -> Tensor | BlockCodes:
    """A copy that later writes leave as it is; coded tensors stay coded."""
    if not _is_coded_tensor(value):
        return value.clone()
    copy: Tensor = transform_subclass(value, lambda _, inner: inner.clone())  # type: ignore[no-untyped-call]
    return copy


def numbers_in(value: object) -> int:
    """How many numbers the largest tensor in an entry of an optimiser's state holds, at any depth."""
    leaves = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor | BlockCodes))
    return max((leaf.shape.numel() for leaf in leaves), default=0)


def _is_coded_tensor(value: object) -> TypeGuard[Tensor]:
    if not is_traceable_wrapper_subclass(value):
        return False
    return getattr(type(value), "dequantize", Tensor.dequantize) is not Tensor.dequantize
