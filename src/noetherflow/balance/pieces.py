"""Move one stored tensor in place, piece by piece: float64 is only ever made of a small part of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noetherflow.balance.motion import Motion
from noetherflow.core.tensors import is_narrow
from noetherflow.errors import CertificateError, CheckpointError
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry

PIECE = 1 << 20
"""Entries in a piece, of which float64 copies are made."""


@dataclass(frozen=True)
class Shift:
    """What a move did to a tensor: the relative change of its norm, and the relative error of rounding the result."""

    change: float
    rounding: float


@dataclass(frozen=True, eq=False)
class _Cut:
    """How a leg sees a piece of its parameter.

    Attributes:
        leg: the leg on the whole parameter.
        view: the shape it looks at the whole parameter in.
        axis: where in `view` the axis lies along which the parameter is cut.
    """

    leg: Leg
    view: tuple[int, ...]
    axis: int

    @property
    def along(self) -> bool:
        """Whether the leg's rows lie along the cut."""
        return self.axis in {a % len(self.view) for a in self.leg.axes}

    def on(self, length: int) -> Leg:
        """The leg on a piece of that length; only where it does not lie along the cut."""
        view = (*self.view[: self.axis], length, *self.view[self.axis + 1 :])
        return replace(self.leg, view=view)


def move_in_place(motion: Motion, name: str, tensor: Tensor) -> Shift:
    """Move a stored tensor by the legs on it, in float64, rounded once to its own dtype.

    Args:
        motion: the move.
        name: the canonical name of the parameter.
        tensor: its value; written in place.

    Raises:
        CheckpointError: the tensor is quantised, its numbers are no weights.
        CertificateError: a moved value leaves the range of the dtype.
    """
    if not tensor.is_floating_point() or is_narrow(tensor.dtype):
        raise CheckpointError(
            f"{name} is stored as {tensor.dtype}, which is quantised: its numbers cannot be scaled. Balance the "
            "checkpoint in floating point, then quantise"
        )
    sums = torch.zeros(4, dtype=torch.float64)
    for part, move in _parts(motion, name, tensor):
        old = part.to(torch.float64, copy=True)
        exact = move(old)
        part.copy_(exact)
        new = part.double()
        if not bool(torch.isfinite(new).all()):
            raise CertificateError(f"balanced values of {[name]} do not fit {tensor.dtype}; use a wider dtype")
        sums += torch.stack([(new - old).square().sum(), old.square().sum(), (new - exact).square().sum(),
                             exact.square().sum()])  # fmt: skip
    change, size, error, exact_size = sums.sqrt().tolist()
    return Shift(change / size if size else 0.0, error / exact_size if exact_size else 0.0)


def _parts(motion: Motion, name: str, tensor: Tensor) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Parts of the tensor, as views of it, with the move of each in float64; one part where nothing can be cut."""
    symmetries = motion.by_parameter.get(name, [])
    axis = next((a for a in range(tensor.ndim) if _cuts(symmetries, name, tensor, a) is not None), None)
    cuts = None if axis is None or tensor.numel() <= PIECE else _cuts(symmetries, name, tensor, axis)
    if cuts is None or axis is None:
        yield tensor, lambda part: motion.weight(name, part)
        return
    factors = _factors(motion, symmetries, cuts, tensor)
    length = max(1, PIECE * tensor.shape[axis] // tensor.numel())
    for start in range(0, tensor.shape[axis], length):
        part = tensor.narrow(axis, start, min(length, tensor.shape[axis] - start))

        def move(part: Tensor, start: int = start) -> Tensor:
            return _moved(motion, name, symmetries, cuts, factors, part, start)

        yield part, move


def _cuts(symmetries: Sequence[Symmetry], name: str, tensor: Tensor, axis: int) -> list[list[_Cut]] | None:
    """How each leg of each symmetry sees a cut along `axis`; None where one cannot be followed."""
    out = []
    for s in symmetries:
        cuts = []
        for leg in s.legs:
            if leg.parameter == name:
                cut = _cut(leg, tuple(tensor.shape), axis)
                if cut is None or (cut.along and not s.is_torus):
                    return None
                cuts.append(cut)
        out.append(cuts)
    return out


def _cut(leg: Leg, shape: tuple[int, ...], axis: int) -> _Cut | None:
    """The axis kept whole in the leg's view, None where the view splits or merges it."""
    view = shape if leg.view is None else tuple(leg.view)
    before = math.prod(shape[:axis])
    place = next((a for a in range(len(view)) if view[a] == shape[axis] and math.prod(view[:a]) == before), None)
    return None if place is None else _Cut(leg, view, place)


def _factors(
    motion: Motion, symmetries: Sequence[Symmetry], cuts: Sequence[Sequence[_Cut]], tensor: Tensor
) -> list[list[Tensor]]:
    """The numbers by which each torus leg multiplies, shaped to broadcast against its view; empty for others."""
    return [
        [cut.leg.factors(motion.elements[s.name], tensor) if s.is_torus else torch.empty(0) for cut in own]
        for s, own in zip(symmetries, cuts, strict=True)
    ]


def _moved(
    motion: Motion,
    name: str,
    symmetries: Sequence[Symmetry],
    cuts: Sequence[Sequence[_Cut]],
    factors: Sequence[Sequence[Tensor]],
    part: Tensor,
    start: int,
) -> Tensor:
    """One part, in float64, under all symmetries in turn, as `Motion.weight` moves the whole."""
    shape = part.shape
    for s, own, multipliers in zip(symmetries, cuts, factors, strict=True):
        offset = s.offsets.get(name, 0.0)
        part = part + offset if offset else part
        for cut, factor in zip(own, multipliers, strict=True):
            length = shape.numel() * cut.view[cut.axis] // math.prod(cut.view)
            if s.is_torus:
                here = factor.narrow(cut.axis, start, length) if factor.shape[cut.axis] > 1 else factor
                part = (part.reshape(cut.on(length).view or ()) * here).reshape(shape)
            else:
                element = motion.elements[s.name]
                matrices = element if cut.leg.sign > 0 else s.inverse(element).mT
                part = cut.on(length).multiply(part, matrices)
        part = part - offset if offset else part
    return part


def leg_gram_of(symmetry: Symmetry, leg: Leg, tensor: Tensor) -> Tensor:
    """`symmetry.leg_gram` of a stored weight, its offset added, in float64 of one piece of it after the other.

    Args:
        symmetry: whose leg it is.
        leg: a leg on this parameter.
        tensor: the weight in its stored dtype.

    Returns:
        The Gram in the layout of the symmetry, float64.
    """
    offset = symmetry.offsets.get(leg.parameter, 0.0)
    every = [(a, _cut(leg, tuple(tensor.shape), a)) for a in range(tensor.ndim)]
    axis, cut = next(((a, c) for a, c in every if c is not None and not c.along), (0, None))
    if tensor.numel() <= PIECE or cut is None:
        return symmetry.leg_gram(leg, tensor.double() + offset)
    length = max(1, PIECE * tensor.shape[axis] // tensor.numel())
    total = torch.zeros(symmetry.shape, dtype=torch.float64)
    for part in torch.split(tensor, length, dim=axis):
        total = total + symmetry.leg_gram(cut.on(part.shape[axis]), part.double() + offset)
    return total
