"""Which linear maps of a parameter the oracle tries: matrices along its axes, by its shape alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RawAxis:
    """Matrices along one axis of a parameter, one for each index of another axis or one for all.

    Attributes:
        axis: the axis of the view along which the matrices act.
        view: the shape in which the parameter is seen.
        along: the axis whose index chooses the matrix, None for one matrix.

    Example:
        >>> RawAxis(1, (2, 3), None).unknowns(symmetric=True), RawAxis(1, (2, 3), 0).unknowns(symmetric=False)
        (6, 18)
    """

    axis: int
    view: tuple[int, ...]
    along: int | None = None

    @property
    def blocks(self) -> int:
        """How many matrices there are."""
        return 1 if self.along is None else self.view[self.along]

    @property
    def size(self) -> int:
        """Rows of each matrix."""
        return self.view[self.axis]

    def unknowns(self, symmetric: bool) -> int:
        """How many numbers the matrices hold."""
        return self.blocks * (self.size * (self.size + 1) // 2 if symmetric else self.size**2)

    def unfold(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as `[blocks, size, rest]`."""
        return self.unfold_rows(tensor[None])[0]

    def unfold_rows(self, tensors: Tensor) -> Tensor:
        """Several tensors of the parameter's shape, stacked in front, as `[rows, blocks, size, rest]`."""
        seen = tensors.reshape(len(tensors), *self.view)
        first = (self.axis,) if self.along is None else (self.along, self.axis)
        moved = seen.movedim([1 + a for a in first], [1 + k for k in range(len(first))])
        return moved.reshape(len(tensors), self.blocks, self.size, -1)


@dataclass(frozen=True)
class RawAxes:
    """Everything the oracle tries on one parameter.

    Attributes:
        axes: matrices along axes.
        shifts: whether constants are added too, `theta -> B theta + c`.
    """

    axes: tuple[RawAxis, ...]
    shifts: bool = False

    @property
    def entries(self) -> int:
        """Number of entries of the parameter."""
        return math.prod(self.axes[0].view)

    def unknowns(self, symmetric: bool) -> int:
        """How many numbers describe one generator."""
        return sum(axis.unknowns(symmetric) for axis in self.axes) + (self.entries if self.shifts else 0)

    @property
    def overlapping(self) -> bool:
        """Whether some matrices depend on the index of another axis, so that two axes can hold the same generator."""
        return any(axis.along is not None for axis in self.axes)


def raw_axes(model: nn.Module, parameters: Mapping[str, Tensor], affine: bool) -> dict[str, RawAxes]:
    """The axes of every parameter.

    A vector or matrix has a matrix `B` along each of its axes. In a tensor of three and more axes (stacked experts,
    heads as an axis of their own) `B` may depend on the index of an earlier axis. Convolution weights have one matrix
    along each axis, kernel axes included, and per group where there are groups.

    Args:
        model: tells which parameters are weights of convolutions.
        parameters: by canonical name.
        affine: vectors and numbers may also be shifted by constants.
    """
    groups = {
        id(parameter): module.groups
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd)
        for parameter in module.parameters()
    }
    return {name: _axes_of(tuple(p.shape), groups.get(id(p)), affine) for name, p in parameters.items()}


def _axes_of(shape: tuple[int, ...], groups: int | None, affine: bool) -> RawAxes:
    view = shape or (1,)
    long = [a for a, n in enumerate(view) if n > 1] or [0]
    alone = tuple(RawAxis(a, view) for a in long)
    if groups is not None and groups > 1 and len(shape) >= 3:
        grouped = (groups, shape[0] // groups, *shape[1:])
        return RawAxes((*alone, RawAxis(2, grouped, 0)) if shape[1] > 1 else alone)
    if groups is not None or len(long) <= 2:
        return RawAxes(alone, affine and len(long) == 1)
    first, *rest = long
    return RawAxes((RawAxis(first, view), *(RawAxis(a, view, c) for a in rest for c in long if c < a)))


def generator_rows(axes: RawAxes, theta: Tensor, gradients: Tensor, symmetric: bool) -> Tensor:
    """What each generator of a parameter does to some functions, to first order.

    Args:
        axes: the generators.
        theta: the parameter.
        gradients: of the functions by the parameter, `[rows, *theta.shape]`.
        symmetric: unknown matrices are symmetric.

    Returns:
        `[rows, unknowns]`: `<gradient, B theta>` for a basis of matrices B, then the entries of the gradient itself for
        constants.
    """
    parts = []
    for axis in axes.axes:
        products = torch.einsum("kbim,bjm->kbij", axis.unfold_rows(gradients), axis.unfold(theta))
        if symmetric:
            i, j = torch.triu_indices(axis.size, axis.size, device=theta.device)
            products = torch.where(i == j, products[..., i, j], products[..., i, j] + products[..., j, i])
        parts.append(products.reshape(len(gradients), -1))
    if axes.shifts:
        parts.append(gradients.reshape(len(gradients), -1))
    return torch.cat(parts, dim=1)


def touched(axes: RawAxes, entries: Tensor, symmetric: bool) -> Tensor:
    """Which unknowns act on entries of a parameter that matter.

    Args:
        axes: the generators.
        entries: whether the functions depend on an entry, in the parameter's shape.
        symmetric: unknown matrices are symmetric.

    Returns:
        `[unknowns]`, true for a matrix element between two rows that both hold such entries.
    """
    parts = []
    for axis in axes.axes:
        rows = axis.unfold(entries).any(-1)
        both = rows[..., :, None] & rows[..., None, :]
        if symmetric:
            i, j = torch.triu_indices(axis.size, axis.size, device=entries.device)
            both = both[..., i, j]
        parts.append(both.reshape(-1))
    if axes.shifts:
        parts.append(entries.reshape(-1))
    return torch.cat(parts)
