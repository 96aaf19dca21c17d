"""Tensors of single groups in one byte per entry: enough for the error of an estimate, a quarter of the memory.

A jackknife error needs the mean gradient without each of 16 groups of samples. Sixteen copies in float32 take 64 bytes
per parameter; packed they take 16. An entry is kept as a whole number from -127 to 127, the square root of its size
relative to the largest of its row, so that entries down to 1/16,000 of the largest are told from zero. The rounding of
an entry is at most 1/127 of the geometric mean of itself and the largest; in a Gram of d entries it averages out to
about 1 % / sqrt(d) of the group's own share. It touches standard errors only, in their third digit: the mean over all
samples is kept exactly, and the groups are never added up to an estimate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

SMALL = 1024
"""Tensors of up to so many entries are kept as they are."""
ROW = 64
"""Rows shorter than this share the scale of their neighbours."""


class CompactTensor(ABC):
    """A tensor kept in less memory than its entries take."""

    @abstractmethod
    def times(self, factor: float) -> CompactTensor:
        """The tensor times a number."""

    @abstractmethod
    def to(self, device: torch.device) -> CompactTensor:
        """The tensor on a device."""

    @abstractmethod
    def unpack(self) -> Tensor:
        """The tensor."""


@dataclass(frozen=True, eq=False)
class ProductTensor(CompactTensor):
    """`factor * left^T right` in the given shape, exact: the summed gradient of a few samples of a linear layer.

    A group of 16 samples of a layer with 784 inputs and 512 outputs is kept in 83 kB; packed it would take 401 kB.

    Example:
        >>> kept = ProductTensor(torch.ones(2, 30), torch.ones(2, 40), torch.Size([30, 40])).times(0.5)
        >>> kept.unpack().shape, kept.bytes, float(kept.unpack().sum())
        (torch.Size([30, 40]), 560, 1200.0)
    """

    left: Tensor
    right: Tensor
    shape: torch.Size
    factor: float = 1.0

    @property
    def bytes(self) -> int:
        """What the factors take."""
        return sum(t.numel() * t.element_size() for t in (self.left, self.right))

    def times(self, factor: float) -> ProductTensor:
        return ProductTensor(self.left, self.right, self.shape, self.factor * factor)

    def to(self, device: torch.device) -> ProductTensor:
        return ProductTensor(self.left.to(device), self.right.to(device), self.shape, self.factor)

    def unpack(self) -> Tensor:
        return (self.left.mT @ self.right).mul_(self.factor).view(self.shape)


@dataclass(frozen=True, eq=False)
class PackedTensor(CompactTensor):
    """A tensor in one byte per entry, and one float32 scale per row of at least 64 entries.

    Example:
        >>> x = torch.linspace(-1, 1, 5000)
        >>> packed = PackedTensor.of(x)
        >>> packed.codes.dtype, bool((packed.unpack() - x).abs().max() < 0.01)
        (torch.int8, True)
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> PackedTensor:
        """Pack a tensor of any shape and real dtype."""
        return cls.overwriting(tensor.to(torch.float32, copy=True), tensor.dtype)

    @classmethod
    def overwriting(cls, tensor: Tensor, dtype: torch.dtype = torch.float32) -> PackedTensor:
        """Pack a float32 tensor that nobody needs any more, to be unpacked in `dtype`; saves a copy."""
        rows = _rows(tensor)
        signs = (rows.view(torch.int32) >> 31).to(torch.int8).bitwise_or_(1)  # 1 and -1
        sizes = rows.abs_()
        scales = sizes.amax(1, keepdim=True)
        steps = scales.clamp_min(torch.finfo(torch.float32).tiny).reciprocal_()
        codes = sizes.mul_(steps).sqrt_().mul_(127).round_().to(torch.int8)
        return cls(codes.mul_(signs).view(tensor.shape), scales, dtype)

    def times(self, factor: float) -> PackedTensor:
        """The tensor times a number; not rounded again."""
        return PackedTensor(self.codes, self.scales * factor, self.dtype)

    def to(self, device: torch.device) -> PackedTensor:
        """The tensor on a device."""
        return PackedTensor(self.codes.to(device), self.scales.to(device), self.dtype)

    def unpack(self) -> Tensor:
        """The tensor, rounded."""
        rows = _rows(self.codes.float())
        return rows.mul_(rows.abs()).mul_(self.scales / 127**2).view(self.codes.shape).to(self.dtype)


def _rows(tensor: Tensor) -> Tensor:
    """The entries in rows that share one scale: along the last axis, or several of its rows if they are short."""
    length = tensor.shape[-1]
    for size in reversed(tensor.shape[:-1]):
        if length >= ROW:
            break
        length *= size
    return tensor.reshape(-1, length)


Held = Tensor | CompactTensor
"""A tensor as it is kept: packed, or as a product, if it is large."""


def packed(tensor: Tensor) -> Held:
    """The tensor as it is kept."""
    return PackedTensor.of(tensor) if tensor.numel() > SMALL else tensor


def unpacked(held: Held) -> Tensor:
    """The tensor behind what is kept of it."""
    return held.unpack() if isinstance(held, CompactTensor) else held


def packed_sum(held: Held | None, tensor: Tensor) -> Held:
    """What is kept of a tensor with another one added."""
    if held is not None:
        return packed(unpacked(held) + tensor)
    return packed(tensor.clone() if tensor.numel() <= SMALL else tensor)


def packed_into(held: Held | None, tensor: Tensor) -> Held:
    """`packed_sum` of a tensor that nobody needs any more, which is overwritten."""
    if tensor.numel() <= SMALL or tensor.dtype != torch.float32:
        return packed_sum(held, tensor)
    return PackedTensor.overwriting(tensor if held is None else tensor.add_(unpacked(held)))


class PackedTensors(Mapping[str, Tensor]):
    """Named tensors, the large ones packed; each is unpacked when it is asked for.

    Example:
        >>> kept = PackedTensors.of({"weight": torch.ones(64, 64), "bias": torch.ones(64)})
        >>> {name: type(t).__name__ for name, t in kept.held.items()}
        {'weight': 'PackedTensor', 'bias': 'Tensor'}
        >>> kept["weight"].shape
        torch.Size([64, 64])
    """

    def __init__(self, held: Mapping[str, Held]) -> None:
        self.held = dict(held)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PackedTensors:
        """Pack all that are large; tensors packed before are taken over as they are."""
        if isinstance(tensors, PackedTensors):
            return tensors
        return cls({n: packed(t) for n, t in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return unpacked(self.held[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


@dataclass(eq=False)
class SampleSum:
    """Adds up means over disjoint samples, in float64.

    Example:
        >>> total = SampleSum()
        >>> total.add(1, {"w": torch.tensor([4.0])})
        >>> total.add(3, {"w": torch.tensor([0.0])})
        >>> total.mean()
        {'w': tensor([1.])}
    """

    samples: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def add(self, samples: int, means: Mapping[str, Tensor]) -> None:
        """Add the means over so many more samples."""
        self.samples += samples
        for name, t in means.items():
            if name in self.sums:
                self.sums[name].add_(t, alpha=samples)
            else:
                self.sums[name], self.dtypes[name] = t.double() * samples, t.dtype

    def mean(self) -> dict[str, Tensor]:
        """The means over all samples, in the types given."""
        return {n: (t / self.samples).to(self.dtypes[n]) for n, t in self.sums.items()}


class LeftOut(Mapping[str, Tensor]):
    """Means over all samples but those of one group: `(total - share * group) / (1 - share)`, when asked for.

    `share`: the group's part of the samples. In the type of the total, for no more digits are known of the group.
    """

    def __init__(self, total: Mapping[str, Tensor], group: Mapping[str, Tensor], share: float) -> None:
        self._total, self._group, self._share = total, group, share

    def __getitem__(self, name: str) -> Tensor:
        total, share = self._total[name], self._share
        held = self._group.held[name] if isinstance(self._group, PackedTensors) else self._group[name]
        rest = held.times(-share).unpack() if isinstance(held, CompactTensor) else held * -share
        return rest.to(total.dtype).add_(total).div_(1 - share)

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)
