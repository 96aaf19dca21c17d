"""Sizes of activations, channel by channel: what the weights on the `-` legs of symmetries are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from noetherflow.core.arguments import BATCHES, expect
from noetherflow.core.inputs import ModelInputs
from noetherflow.core.printing import table
from noetherflow.core.torch_internals import is_python_function_of_torch, transparent
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.rules.registry import RULES
from noetherflow.symmetry.arguments import expect_model_and_symmetries
from noetherflow.symmetry.overlap import LegCoordinates, leg_coordinates
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, eq=False)
class ActivationMoments:
    """Sizes of the activations that `-` legs read, by symmetry name and channel.

    Attributes:
        largest: The largest absolute value, `[channels]`; of general_linear symmetries one number for each row of each
            block.
        second: The mean square, `[channels]`.
        values: How many numbers each channel was measured on (of the leg with the fewest).
        left: Symmetries without an entry, and why.
    """

    largest: dict[str, Tensor]
    second: dict[str, Tensor]
    values: int
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            {
                "symmetry": n,
                "channels": t.numel(),
                "largest activation": float(t.max()),
                "median of the channels": float(t.median()),
            }
            for n, t in self.largest.items()
        ]
        lines = [f"activations of {len(rows)} symmetries, {self.values} values a channel", table(rows) if rows else ""]
        return "\n".join([*lines, *(f"left out: {n}: {why}" for n, why in self.left.items())])

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        return {
            "largest": {n: t.tolist() for n, t in self.largest.items()},
            "second": {n: t.tolist() for n, t in self.second.items()},
            "values": self.values,
            "left": dict(self.left),
        }


def activation_moments(
    model: nn.Module, batches: Iterable[Any], syms: SymmetrySet, *, forward: Forward | None = None
) -> ActivationMoments:
    """Measure the activations that the weights on `-` legs are multiplied with, channel by channel.

    For a norm's gain those are the outputs of the norm, as its readers see them; for hidden units those behind the
    relu. Matrix products and convolutions with a parameter are seen, wherever in the model they are called; not those
    with something made of parameters (weight norm). Nothing is differentiated.

    Args:
        model: The model, in the mode in which it is to be measured (evaluation mode, as a rule). Only run.
        batches: What it is run on: inputs as `find_symmetries` takes them, or anything that `forward` understands.
        syms: Its symmetries.
        forward: `forward(model, batch)` runs the model on a batch, for example a `loss_fn`; by default the batch is
            the model's input.

    Returns:
        ActivationMoments, for `nf.smoothing` or to look at.

    Raises:
        DataError: No batches, or activations that are not finite.
        MomentError: None of the symmetries has a leg that a matrix product or convolution reads.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
        >>> x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
        >>> syms = nf.find_symmetries(model, x)
        >>> found = nf.activation_moments(model, [x], syms)
        >>> torch.equal(found.largest["0 -> 2"], model[:2](x).amax(0))
        True

    Source: Xiao et al., SmoothQuant, 2023, for what they are good for.
    """
    call = "activation_moments(model, batches, syms)"
    expect_model_and_symmetries(call, model, syms)
    expect(call, "batches", batches, Iterable, BATCHES)
    tensors = syms.tensors_in(model)
    wanted = dict.fromkeys(leg.parameter for s in syms for leg in s.weight_legs if leg.sign < 0)
    reading = Reading({id(tensors[n]): n for n in wanted})
    count = 0
    with torch.no_grad(), reading:
        for batch in batches:
            count += 1
            if forward is None:
                ModelInputs.of(batch).call(model)
            else:
                forward(model, batch)
    if not count:
        raise DataError("batches is empty: nothing was run")
    found = {s.name: levels for s in syms if (levels := _levels(s, reading.sums, tensors)) is not None}
    if not found:
        raise MomentError(
            "no matrix product or convolution reads a - leg of these symmetries; keep those of a family that has them, "
            "syms.filter(family='norm-gain')"
        )
    return ActivationMoments(
        {n: levels.largest for n, levels in found.items()},
        {n: levels.second for n, levels in found.items()},
        min(levels.values for levels in found.values()),
        {s.name: _why(s) for s in syms if s.name not in found},
    )


@dataclass(frozen=True, eq=False)
class Read:
    """One use of a weight: the activation with its channels last, and the channel that meets each entry of the weight
    (broadcastable to its shape).
    """

    activation: Tensor
    channels: Tensor


@dataclass(frozen=True, eq=False)
class ChannelSums:
    """Sums over everything seen, by channel of the activation that a weight is multiplied with."""

    channels: Tensor
    largest: Tensor
    squares: Tensor
    values: int

    @classmethod
    def of(cls, read: Read) -> ChannelSums:
        """Those of one use."""
        x = read.activation.detach().double().reshape(-1, read.activation.shape[-1])
        return cls(read.channels.cpu(), x.abs().amax(0).cpu(), x.square().sum(0).cpu(), len(x))

    def joined(self, other: ChannelSums) -> ChannelSums:
        """Those of both."""
        return ChannelSums(
            self.channels,
            torch.maximum(self.largest, other.largest),
            self.squares + other.squares,
            self.values + other.values,
        )


class Reading(TorchFunctionMode):
    """Sees every call that multiplies one of these weights with an activation.

    Args:
        names: canonical names of the weights by `id`.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.sums: dict[str, ChannelSums] = {}
        self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reader = READERS.get(func)
        bound = RULES[func][0].bind(args, kwargs) if reader is not None else None
        if reader is not None and bound is not None:
            weight, read = reader(bound)
            name = self._names.get(id(weight))
            if name is not None and read is not None:
                self._add(name, read)
        elif is_python_function_of_torch(func) and any(id(a) in self._names for a in (*args, *kwargs.values())):
            with self:
                return transparent(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _add(self, name: str, read: Read) -> None:
        new = ChannelSums.of(read)
        if not bool(new.largest.isfinite().all()):
            raise DataError(f"the activations that {name} reads are not finite")
        known = self.sums.get(name)
        self.sums[name] = new if known is None else known.joined(new)


Reader = Callable[[dict[str, Any]], tuple[Tensor, Read | None]]


def _linear(a: dict[str, Any]) -> tuple[Tensor, Read | None]:
    return a["weight"], _columns(a["input"], a["weight"], -1)


def _addmm(a: dict[str, Any]) -> tuple[Tensor, Read | None]:
    return a["mat2"], _columns(a["mat1"], a["mat2"], 0)


def _matmul(a: dict[str, Any]) -> tuple[Tensor, Read | None]:
    return a["other"], _columns(a["input"], a["other"], 0)


def _columns(x: Tensor, weight: Tensor, axis: int) -> Read | None:
    """An activation `[.., channels]` that meets a matrix along one of its axes."""
    if weight.ndim != 2 or not x.ndim:
        return None
    numbers = torch.arange(weight.shape[axis])
    return Read(x, numbers[:, None] if axis == 0 else numbers[None])


def _convolution(a: dict[str, Any]) -> tuple[Tensor, Read | None]:
    """`weight[o, i]` meets channel `i` of its group; groups share the outputs in order."""
    weight, x = a["weight"], a["input"]
    group = torch.arange(weight.shape[0]) // (weight.shape[0] // a["groups"])
    channels = group[:, None] * weight.shape[1] + torch.arange(weight.shape[1])
    return weight, Read(x.movedim(1 - weight.ndim, -1), channels.reshape(*channels.shape, *[1] * (weight.ndim - 2)))


def _transposed(a: dict[str, Any]) -> tuple[Tensor, Read | None]:
    """`weight[i]` meets channel `i`."""
    weight, x = a["weight"], a["input"]
    numbers = torch.arange(weight.shape[0]).reshape(-1, *[1] * (weight.ndim - 1))
    return weight, Read(x.movedim(1 - weight.ndim, -1), numbers)


READERS: dict[Callable[..., Any], Reader] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed),
}
"""How each operator reads its weight; argument names are those of the moment rules."""


@dataclass(frozen=True, eq=False)
class Levels:
    """Levels of a symmetry's channels."""

    largest: Tensor
    second: Tensor
    values: int


def _levels(symmetry: Symmetry, sums: Mapping[str, ChannelSums], tensors: Mapping[str, Tensor]) -> Levels | None:
    """The levels over all `-` legs; None unless every one of them was seen to multiply the channels themselves."""
    shapes = {n: tuple(tensors[n].shape) for n in symmetry.parameters}
    legs = [leg for of_one in leg_coordinates([symmetry], shapes).values() for leg in of_one if leg.exponent < 0]
    names = [symmetry.weight_legs[leg.leg].parameter for leg in legs]
    if not legs or any(n not in sums for n in names):
        return None
    found = [_at(leg, sums[n], shapes[n]) for leg, n in zip(legs, names, strict=True)]
    parts = [part for part in found if part is not None]
    if len(parts) < len(found):
        return None
    largest = torch.stack([part.largest for part in parts]).amax(0)
    second = torch.stack([part.second for part in parts]).amax(0)
    return Levels(largest, second, min(part.values for part in parts))


def _at(leg: LegCoordinates, sums: ChannelSums, shape: tuple[int, ...]) -> Levels | None:
    """The levels of the channels that one leg reads, each the larger one where it reads several with one scale.

    None where the entries that meet one channel have several scales: then the leg is on what the weight makes, not on
    what it reads (the keys' side of queries and keys in one weight).
    """
    coordinates = leg.ids.expand(leg.view).reshape(shape)
    channels = sums.channels.expand(shape)
    own = coordinates >= 0
    ends = [
        torch.full(sums.largest.shape, start).scatter_reduce_(0, channels[own], coordinates[own], how)
        for start, how in ((leg.count, "amin"), (-1, "amax"))
    ]
    if bool(((ends[1] >= 0) & (ends[0] != ends[1])).any()):
        return None
    out = [torch.zeros(leg.count, dtype=torch.float64) for _ in range(2)]
    for level, found in zip(out, (sums.largest, sums.squares / sums.values), strict=True):
        level.scatter_reduce_(0, coordinates[own], found[channels[own]], "amax")
    return Levels(out[0], out[1], sums.values)


def _why(symmetry: Symmetry) -> str:
    """Why a symmetry has no levels."""
    if symmetry.one_sided:
        return "nothing reads it: all legs scale the same way"
    return "a - leg is not multiplied with the channels by a matrix product or convolution, or was not run"
