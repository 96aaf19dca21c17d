"""Units that can change places: permutations of the channels of a scalar or diagonal symmetry.

The legs of a symmetry say where a channel's scale enters and leaves. What else belongs to the channel (the gate of a
gated unit, the convolution before a batch norm) is read off gradients: with the weights that read the channel set to 0,
the gradients of everything that acts through it alone are 0 too. Outputs under a permutation are the proof.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.balance.check import OutputCheck
from noetherflow.balance.motion import Motion, Reordering
from noetherflow.core.inputs import ModelInputs
from noetherflow.core.tensors import tensors_of
from noetherflow.discovery.copies import floating_tensors
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

PROVEN = 1e-5
"""Largest relative change of outputs under a permutation that is one: above rounding in float32 inside the model."""


@dataclass(frozen=True, eq=False)
class Units:
    """Channels that can change places.

    Attributes:
        name: Of the symmetry whose channels they are.
        legs: The rows that change places together, running statistics included; `index[channel]` names them.
    """

    name: str
    legs: tuple[Leg, ...]

    @property
    def count(self) -> int:
        return self.legs[0].blocks

    def reordering(self, order: Tensor) -> Reordering:
        """Channel `i` becomes what channel `order[i]` was."""
        return Reordering(self.legs, order)


def permutable_units(model: nn.Module, syms: SymmetrySet, example_inputs: Any) -> list[Units]:
    """The units of a model that can change places without changing its function.

    Args:
        model: Only read.
        syms: Its symmetries; the diagonal ones with two sides are tried.
        example_inputs: Some samples: what gets no gradient on them is not recognised.

    Returns:
        One Units for each symmetry whose channels can be permuted. Channels of a norm's gain, for example, cannot: what
        the norm reads would have to change places too.
    """
    trial = copy.deepcopy(model).to("cpu", torch.float64).eval().requires_grad_(True)
    inputs = ModelInputs.of(example_inputs).map(lambda t: t.cpu().double() if t.is_floating_point() else t.cpu())
    found = []
    for s in syms:
        if s.kind == "diagonal" and s.blocks > 1 and not s.one_sided:
            units = Units(s.name, (*s.legs, *_companions(trial, s, syms, inputs)))
            if _proven(trial, units, inputs):
                found.append(units)
    return found


def _companions(model: nn.Module, symmetry: Symmetry, syms: SymmetrySet, inputs: ModelInputs) -> list[Leg]:
    """Rows of other parameters that belong to the channels alone, and the running statistics that go with them."""
    silent = list(_silenced_gradients(model, symmetry, inputs))
    out = []
    statistics: dict[str, Leg] = {}
    for name in silent[0]:
        for axis in range(silent[0][name].ndim):
            codes = torch.stack([_quiet_rows(gradients[name], axis) for gradients in silent])
            index = _decoded(codes, symmetry.blocks)
            if index is not None and not _on_a_leg(symmetry, name, axis):
                out.append(Leg(name, index, axes=(axis,)))
                statistics |= {b.parameter: b for b in _statistics_of(out[-1], syms)}
    return [*out, *(leg for name, leg in statistics.items() if name not in {b.parameter for b in symmetry.legs})]


def _silenced_gradients(model: nn.Module, symmetry: Symmetry, inputs: ModelInputs) -> Iterator[dict[str, Tensor]]:
    """Gradients of a random sum of outputs while the readers of a subset of the channels are 0: for each binary digit
    of the channel's number the channels where it is 1, then those where it is 0.
    """
    tensors = tensors_of(model)
    readers = [leg for leg in symmetry.weight_legs if leg.sign < 0]
    before = {leg.parameter: tensors[leg.parameter].detach().clone() for leg in readers}
    names = [n for n, t in tensors.items() if isinstance(t, nn.Parameter)]
    for silent in _subsets(symmetry.blocks):
        with torch.no_grad():
            for leg in readers:
                held = tensors[leg.parameter]
                held.copy_(leg.fold(held, leg.unfold(held) * (~silent).double().reshape(-1, 1, 1)))
        try:
            outputs = [t for t in floating_tensors(inputs.call(model)) if t.requires_grad]
            rng = torch.Generator().manual_seed(0)
            total = sum((t * torch.randn(t.shape, generator=rng, dtype=t.dtype)).sum() for t in outputs)
            gradients = torch.autograd.grad(total, [tensors[n] for n in names], allow_unused=True)  # type: ignore[arg-type]
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    tensors[name].copy_(value)
        yield {n: g for n, g in zip(names, gradients, strict=True) if g is not None}


def _subsets(channels: int) -> Iterator[Tensor]:
    """Masks of the channels by binary digit, each with its complement."""
    numbers = torch.arange(channels)
    for digit in range(max(1, math.ceil(math.log2(channels)))):
        ones = (numbers >> digit) % 2 == 1
        yield ones
        yield ~ones


def _quiet_rows(gradient: Tensor, axis: int) -> Tensor:
    """Which slices along an axis have no gradient, `[rows]`."""
    return gradient.movedim(axis, 0).reshape(gradient.shape[axis], -1).abs().amax(1) == 0


def _decoded(quiet: Tensor, channels: int) -> np.ndarray | None:
    """The rows of each channel `[channels, 1, rows each]`, from when they had no gradient, `[2 digits, rows]`.

    A row is of channel `c` if it had none just in the passes in which `c` was silent. None where there are no such
    rows, or not equally many for each channel.
    """
    ones, zeros = quiet[0::2], quiet[1::2]
    telling, never = (ones ^ zeros).all(0), quiet.all(0)
    numbers = (ones.long() * 2 ** torch.arange(len(ones))[:, None]).sum(0)
    numbers = torch.where(telling, numbers, -1)
    if bool(telling.any()) and bool(never.any()) and bool((telling | never).all()):
        numbers = _filled(numbers, channels)
    rows = [(numbers == c).nonzero().flatten().tolist() for c in range(channels)]
    each = len(rows[0])
    if not each or any(len(r) != each for r in rows):
        return None
    return np.asarray(rows, dtype=np.int64).reshape(channels, 1, each)


def _filled(numbers: Tensor, channels: int) -> Tensor:
    """Channels of rows, with those that never had a gradient (-1: dead units) by the order of the others: channel by
    channel, or all channels again and again.
    """
    each, rest = divmod(len(numbers), channels)
    rows = torch.arange(len(numbers))
    for regular in (rows // max(each, 1), rows % channels):
        if not rest and bool(((numbers == regular) | (numbers < 0)).all()):
            return regular
    return numbers


def _on_a_leg(symmetry: Symmetry, name: str, axis: int) -> bool:
    """Whether the symmetry's own legs hold these rows already, in whatever view."""
    own = [leg for leg in symmetry.legs if leg.parameter == name]
    return any(leg.view is not None or axis in leg.axes for leg in own)


def _statistics_of(rows: Leg, syms: SymmetrySet) -> list[Leg]:
    """Running statistics of the channels whose producers these rows are, in the same order."""
    out = []
    for s in syms:
        for leg in s.weight_legs:
            if leg.parameter == rows.parameter and leg.axes == rows.axes and leg.index.shape == rows.index.shape:
                place = {tuple(r): c for c, r in enumerate(leg.index.reshape(leg.blocks, -1).tolist())}
                order = [place.get(tuple(r), -1) for r in rows.index.reshape(rows.blocks, -1).tolist()]
                if -1 not in order:
                    out += [replace(b, index=b.index[order]) for b in s.legs if b.buffer]
    return out


def _proven(model: nn.Module, units: Units, inputs: ModelInputs) -> bool:
    """Whether outputs stay when every channel takes the next one's place."""
    order = torch.roll(torch.arange(units.count), 1)
    motion = Motion((), {}, (units.reordering(order),))
    before = OutputCheck(inputs).before(model, motion, None)
    moved = copy.deepcopy(model)
    write(tensors_of(moved), motion)
    return before is not None and before.change(moved) <= PROVEN


def write(tensors: Mapping[str, Tensor], motion: Motion) -> None:
    """Move tensors in place, without any check."""
    with torch.no_grad():
        for name in motion.by_parameter:
            tensors[name].copy_(motion.weight(name, tensors[name]))


def rows_of(units: Units, tensors: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """The weights of each channel, leg by leg, `[channels, entries]`; running statistics are left out."""
    return [leg.unfold(tensors[leg.parameter]).flatten(1) for leg in units.legs if not leg.buffer]
