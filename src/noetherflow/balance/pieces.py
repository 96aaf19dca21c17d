"""Move one stored tensor in place, or sum its moved squares, piece by piece: wide copies are of a small part only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noetherflow.balance import cuts
from noetherflow.balance.cuts import Cutting, PieceMove, cuttings, put, taken
from noetherflow.balance.motion import Motion
from noetherflow.core.tensors import is_narrow
from noetherflow.errors import CertificateError, CheckpointError
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Symmetry

Moves = Sequence[tuple[Symmetry, Tensor]]
"""Symmetries with their group elements, in the order in which they act."""


@dataclass(frozen=True)
class Shift:
    """What a move did to a tensor: the relative change of its norm, and the relative error of rounding the result."""

    change: float
    rounding: float


def move_in_place(motion: Motion, name: str, tensor: Tensor) -> Shift:
    """Move a stored tensor by the legs on it, in float64, rounded once to its own dtype.

    Beside the tensor there is at most one copy of it, where matrices act along both of its axes, and some pieces.

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
    for old, part, exact in _moved_parts(motion, name, tensor):
        new = part.double()
        if not bool(torch.isfinite(new).all()):
            raise CertificateError(f"balanced values of {[name]} do not fit {tensor.dtype}; use a wider dtype")
        sums += torch.stack([(new - old).square().sum(), old.square().sum(), (new - exact).square().sum(),
                             exact.square().sum()])  # fmt: skip
    change, size, error, exact_size = sums.sqrt().tolist()
    return Shift(change / size if size else 0.0, error / exact_size if exact_size else 0.0)


def _moved_parts(motion: Motion, name: str, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Write the moved tensor part by part: each as it was, as it is stored now, and as it is in float64."""
    symmetries = motion.by_parameter.get(name, [])
    found = [] if tensor.numel() <= cuts.PIECE or motion.reorderings else cuttings(symmetries, name, tensor.shape)
    if not found:
        old = tensor.to(torch.float64, copy=True)
        exact = motion.weight(name, old)
        tensor.copy_(exact)
        yield old, tensor, exact
        return
    cutting = found[0]
    offsets = tuple(s.offsets.get(name, 0.0) for s in symmetries)
    move = ready(cutting, [(s, motion.elements[s.name]) for s in symmetries], offsets, tensor, torch.float64)
    source = tensor.clone() if any(p.mixture is not None for p in cutting.pieces) else tensor
    for piece, exact in move.pieces(source):
        old = taken(source, cutting.axis, piece.rows).to(torch.float64, copy=True)
        put(tensor, cutting.axis, piece.rows, exact)
        yield old, taken(tensor, cutting.axis, piece.rows), exact


def ready(cutting: Cutting, moves: Moves, offsets: tuple[float, ...], tensor: Tensor, dtype: torch.dtype) -> PieceMove:
    """The moves made ready for pieces; symmetries of the cutting beyond them stay."""
    numbers = [
        tuple(cut.numbers(element, tensor, dtype) for cut in own)
        for (_, element), own in zip(moves, cutting.cuts, strict=False)
    ]
    empty = [()] * (len(cutting.cuts) - len(numbers))
    return PieceMove(cutting, (*numbers, *empty), offsets, dtype)


@dataclass(frozen=True, eq=False)
class MovedSums:
    """Of a moved weight the Grams of the legs asked for, in the layout of their symmetries, and the squared norm."""

    grams: tuple[Tensor, ...]
    norm: float


def moved_sums(name: str, tensor: Tensor, moves: Moves, legs: Sequence[tuple[Symmetry, Leg]]) -> MovedSums:
    """Leg Grams and norm of a weight under group elements, which is never in memory as a whole.

    Pieces are moved in float32 where the weight is stored coarser and only scaled, else in float64; sums over them are
    float64.

    Args:
        name: of the parameter.
        tensor: the weight in its stored dtype, as the file has it: offsets are added here.
        moves: what moves it first.
        legs: legs on it, with their symmetries.

    Returns:
        The sums, of the position: the weight with its offset.
    """
    involved = list({s.name: s for s, _ in [*moves, *legs]}.values())
    offset = next((s.offsets[name] for s in involved if name in s.offsets), 0.0)
    coarse = bool(moves) and tensor.element_size() < 4 and all(s.is_torus for s in involved)
    dtype = torch.float32 if coarse else torch.float64
    left, grams, norm = dict(enumerate(legs)), dict[int, Tensor](), None
    for cutting in [] if tensor.numel() <= cuts.PIECE else cuttings(involved, name, tensor.shape):
        mine = {k: pair for k, pair in left.items() if _measurable(cutting, pair)}
        if (mine or norm is None) and cutting.largest <= cutting.length:
            move = ready(cutting, moves, (0.0,) * len(involved), tensor, dtype)
            found = _summed(move, tensor, offset, list(mine.values()))
            norm = found.norm if norm is None else norm
            grams |= dict(zip(mine, found.grams, strict=True))
            left = {k: pair for k, pair in left.items() if k not in mine}
    if left or norm is None:
        theta = tensor.to(dtype, copy=True).add_(offset)
        for s, element in moves:
            theta = s.move(name, theta, element.to(dtype))
        grams |= {k: s.leg_gram(leg, theta).double() for k, (s, leg) in left.items()}
        norm = float(torch.linalg.vector_norm(theta, dtype=torch.float64) ** 2)
    return MovedSums(tuple(grams[k] for k in range(len(legs))), norm)


def _measurable(cutting: Cutting, pair: tuple[Symmetry, Leg]) -> bool:
    """Whether the pieces add up to the leg's Gram: not where its rows are too many for one piece."""
    mixtures = [p.mixture for p in cutting.pieces if p.mixture is not None]
    return not any(cutting.cuts[m.symmetry][m.leg].leg is pair[1] for m in mixtures)


def _summed(move: PieceMove, tensor: Tensor, offset: float, legs: Sequence[tuple[Symmetry, Leg]]) -> MovedSums:
    """The sums over all pieces."""
    own = [next(c for every in move.cutting.cuts for c in every if c.leg is leg) for _, leg in legs]
    grams = [torch.zeros(s.shape, dtype=torch.float64) for s, _ in legs]
    norm = 0.0
    for piece in move.cutting.pieces:
        part = move.of(tensor, piece, offset)
        for gram, cut in zip(grams, own, strict=True):
            gram.add_(cut.gram(part, piece.rows))
        norm += float(part.square().sum(dtype=torch.float64))
    return MovedSums(tuple(grams), norm)


def leg_gram_of(symmetry: Symmetry, leg: Leg, tensor: Tensor) -> Tensor:
    """`symmetry.leg_gram` of a stored weight, its offset added, from one piece of it after the other.

    Args:
        symmetry: whose leg it is.
        leg: a leg on this parameter.
        tensor: the weight in its stored dtype.

    Returns:
        The Gram in the layout of the symmetry, float64.
    """
    return moved_sums(leg.parameter, tensor, (), [(symmetry, leg)]).grams[0]
