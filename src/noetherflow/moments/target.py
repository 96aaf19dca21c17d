"""What is wanted of one parameter's per-sample gradients, and where it accumulates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core.tensors import refuse_narrow, tensors_of
from noetherflow.errors import MomentError
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(frozen=True, eq=False)
class SideLeg:
    """Leg number `position` of a symmetry, on a vector (one side of a matrix, or a whole parameter flattened).

    `shape` `(blocks, dim, entries)`: each coordinate is carried by `entries` entries of the vector, listed in `order`;
    None if they come one coordinate after the other.
    """

    symmetry: str
    position: int
    torus: bool
    shape: tuple[int, int, int]
    order: Tensor | None

    def sums(self, values: Tensor) -> Tensor:
        """`[size]` summed over the entries of each coordinate: `[blocks * dim]`."""
        picked = values if self.order is None else values[self.order]
        return picked if self.shape[2] == 1 else picked.view(-1, self.shape[2]).sum(1)

    def unfold(self, vectors: Tensor) -> Tensor:
        """`[vectors, size]` as `[blocks, dim, vectors * entries]`."""
        picked = vectors if self.order is None else vectors[:, self.order]
        return picked.reshape(-1, *self.shape).permute(1, 2, 0, 3).reshape(*self.shape[:2], -1)

    def row_gram(self, matrices: Tensor) -> Tensor:
        """`sum_k X_k X_k^T` of the rows of matrices `[k, size, columns]`."""
        picked = matrices if self.order is None else matrices[:, self.order]
        x = picked.reshape(len(matrices), *self.shape[:2], -1)
        return (x @ x.mT).sum(0)


@dataclass(frozen=True, eq=False)
class Split:
    """Legs of a parameter read as a matrix: on its rows, on its columns, or mixing both (on all its entries)."""

    rows: tuple[SideLeg, ...]
    columns: tuple[SideLeg, ...]
    mixed: tuple[SideLeg, ...]


@dataclass(eq=False)
class Need:
    """The leg Grams wanted of one parameter, as (symmetry, position, leg, is torus), and its squares if `entries`."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    legs: tuple[tuple[str, int, Leg, bool], ...]
    entries: bool
    _splits: dict[int, Split] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of the parameter as a matrix: its first axis; a vector is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    def zeros(self) -> Tensor:
        """A sum over no sample."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def split(self, rows: int) -> Split:
        """The legs sorted by which side of the parameter, read as `[rows, columns]`, they live on."""
        if rows not in self._splits:
            found: dict[str, list[SideLeg]] = {"rows": [], "columns": [], "mixed": []}
            for symmetry, position, leg, torus in self.legs:
                side, order = _side(leg, self.shape, rows)
                size = self.shape.numel() if side == "mixed" else rows if side == "rows" else self.shape.numel() // rows
                plain = order.size == size and np.array_equal(order.reshape(-1), np.arange(size))
                index = None if plain else torch.as_tensor(order.reshape(-1), device=self.device)
                found[side].append(SideLeg(symmetry, position, torus, order.shape, index))
            self._splits[rows] = Split(*(tuple(legs) for legs in found.values()))
        return self._splits[rows]


def _side(leg: Leg, shape: torch.Size, rows: int) -> tuple[str, np.ndarray]:
    """Which side a leg lives on, and the entries of that side that carry each coordinate: `[blocks, dim, entries]`."""
    view = tuple(shape) if leg.view is None else leg.view
    axes = tuple(a % len(view) for a in leg.axes)
    for k in range(len(view) + 1):
        if prod(view[:k]) == rows:
            if all(a < k for a in axes):
                return "rows", _order(leg.index, view[:k], axes)
            if all(a >= k for a in axes):
                return "columns", _order(leg.index, view[k:], tuple(a - k for a in axes))
    return "mixed", _order(leg.index, view, axes)


def _order(index: np.ndarray, view: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """The entries of a tensor of shape `view` that carry each coordinate of a leg: `[blocks, dim, entries]`."""
    entries = np.moveaxis(np.arange(prod(view)).reshape(view), axes, range(len(axes)))
    picked: np.ndarray = entries.reshape(prod(view[a] for a in axes), -1)[index.reshape(-1)]
    return picked.reshape(*index.shape[:2], -1)


def trainable_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The named parameters of the model, all that are trainable for no name.

    Raises MomentError for an unknown, frozen, complex or eight-bit one, or one without values (meta device).
    """
    tensors = {n: t for n, t in tensors_of(model).items() if isinstance(t, nn.Parameter)}
    wanted = [*dict.fromkeys(names)] or [n for n, t in tensors.items() if t.requires_grad]
    for name in wanted:
        if name not in tensors:
            raise MomentError(f"no parameter named {name!r} in the model; it has {list(tensors)[:8]}")
        if not tensors[name].requires_grad:
            raise MomentError(
                f"parameter {name!r} {tuple(tensors[name].shape)} is frozen and has no gradient noise; "
                "drop its symmetries with syms.trainable(model)"
            )
        if tensors[name].is_meta:
            raise MomentError(
                f"parameter {name!r} {tuple(tensors[name].shape)} is on 'meta' and has no values; materialise the "
                "model first: model.to_empty(device='cpu'), then load its weights"
            )
        if tensors[name].is_complex():
            raise MomentError(
                f"parameter {name!r} is {tensors[name].dtype}, and only real ones have moments: hold its real and "
                "imaginary parts in one real parameter (torch.view_as_complex)"
            )
    refuse_narrow({n: tensors[n] for n in wanted}, "measuring gradients", MomentError)
    return {n: tensors[n] for n in wanted}


def needs_of(syms: SymmetrySet, params: dict[str, Tensor], entries: bool) -> dict[str, Need]:
    """The `Need` of every parameter in `params`."""
    legs: dict[str, list[tuple[str, int, Leg, bool]]] = {name: [] for name in params}
    for s in syms:
        for i, leg in enumerate(s.weight_legs):
            legs[leg.parameter].append((s.name, i, leg, s.is_torus))
    return {
        name: Need(name, p.shape, wide(p.dtype), p.device, tuple(legs[name]), entries) for name, p in params.items()
    }


def wide(dtype: torch.dtype) -> torch.dtype:
    """The accumulation type: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(eq=False, slots=True)
class Workspace:
    """Memory that the contractions of one batch use one after the other."""

    _memory: Tensor | None = None

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor, which the next call overwrites."""
        held, entries = self._memory, prod(shape)
        if held is None or held.numel() < entries or (held.dtype, held.device) != (like.dtype, like.device):
            held = self._memory = like.new_empty(entries)
        return held[:entries].view(shape)


@dataclass(eq=False, slots=True)
class Scratch:
    """What the contractions of one use share: the workspace, and squares that more than one of them asks for.

    The weight and the bias of a linear layer both want the square of the same output gradient. Made anew for every use,
    and gone with it: the use's tensors may change after that.
    """

    workspace: Workspace = field(default_factory=Workspace)
    _squares: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def square(self, t: Tensor) -> Tensor:
        """`t^2`, computed once for each tensor object."""
        for held, squared in self._squares:
            if held is t:
                return squared
        squared = t.square()
        self._squares.append((t, squared))
        return squared


@dataclass(eq=False)
class Accumulators:
    """Sums over samples that are added to: gradients and squares by parameter, leg Grams by symmetry (float64).

    Those of a parameter are made when its first gradient arrives. `second`: for each symmetry, a Gram per leg.
    """

    needs: dict[str, Need]
    gradient: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, list[Tensor]] = field(default_factory=dict)

    def begin(self, name: str, lent: tuple[Workspace, Workspace]) -> None:
        """Let the sums of a parameter without any start in lent memory, for gradient and squares."""
        need = self.needs[name]
        if name not in self.gradient:
            like = torch.empty(0, dtype=need.dtype, device=need.device)
            self.gradient[name] = lent[0].empty(tuple(need.shape), like).zero_()
            if need.entries:
                self.squares[name] = lent[1].empty(tuple(need.shape), like).zero_()

    def target(self, name: str, scratch: Scratch | None = None) -> Target:
        """Where the gradients of one parameter accumulate."""
        need = self.needs[name]
        if name not in self.gradient:
            self.gradient[name] = need.zeros()
            if need.entries:
                self.squares[name] = need.zeros()
        return Target(need, self, scratch or Scratch())


@dataclass(eq=False, slots=True)
class Target:
    """The accumulators of one parameter."""

    need: Need
    sums: Accumulators
    scratch: Scratch

    @property
    def gradient(self) -> Tensor:
        return self.sums.gradient[self.need.name]

    @property
    def squares(self) -> Tensor | None:
        """Entry-wise `sum_i g_i^2` where wanted; torus legs are then read off it at the end."""
        return self.sums.squares.get(self.need.name)

    def add_leg(self, leg: SideLeg, value: Tensor) -> None:
        """Add to a leg Gram; `value` in any shape with the symmetry's number of entries."""
        out = self.sums.second[leg.symmetry][leg.position]
        out.add_(value if value.shape == out.shape else value.view(out.shape))

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add `left^T right` to the summed gradient, the parameter as a matrix."""
        shape = left.shape[1], right.shape[1]
        gradient = self.gradient
        (gradient if gradient.shape == shape else gradient.view(shape)).addmm_(left.mT, right)

    def add_torus_legs(self, squares: Tensor) -> None:
        """Torus legs from entry-wise `sum_i g_i^2` of the parameter as a matrix."""
        split = self.need.split(len(squares))
        for legs, sums in ((split.rows, lambda: squares.sum(1)), (split.columns, lambda: squares.sum(0))):
            self.add_side(legs, sums)
        self.add_side(split.mixed, lambda: squares.reshape(-1))

    def add_side(self, legs: tuple[SideLeg, ...], squares: Callable[[], Tensor]) -> None:
        """Torus legs of one side from `sum_i g_i^2` summed over the other side, computed if there is any."""
        torus = [leg for leg in legs if leg.torus]
        if torus:
            self.add_sums(torus, squares())

    def add_sums(self, torus: Sequence[SideLeg], values: Tensor) -> None:
        """Torus legs of one side from `sum_i g_i^2` summed over the other side."""
        for leg in torus:
            self.add_leg(leg, leg.sums(values))

    def add_dense(self, gradients: Tensor, square: Callable[[Tensor], Tensor] = torch.square) -> None:
        """Add everything from explicit per-sample gradients.

        Args:
            gradients: `[samples, *parameter shape]`, or of any view of that shape.
            square: how to square them; called last, so that it may overwrite them (`Tensor.square_`) where nobody else
                needs them.
        """
        g = gradients.to(self.need.dtype)
        if len(self.need.shape) == 1:
            self._add_vectors(g if g.ndim == 2 else g.flatten(1), square)
            return
        g = g.reshape(g.shape[0], self.need.rows, -1)
        ones = g.new_ones(g.shape[0] * g.shape[1])  # in cache, a product with ones takes half the time of sum(0)
        self.gradient.view(-1).addmv_(g.reshape(len(g), -1).mT, ones[: len(g)])
        self._add_linear_legs(g)
        self._add_squares(g, square, ones)

    def _add_linear_legs(self, g: Tensor) -> None:
        """General-linear legs of matrices `[samples, rows, columns]`."""
        split = self.need.split(g.shape[1])
        for leg in split.rows:
            if not leg.torus:
                self.add_leg(leg, leg.row_gram(g))
        for leg in split.columns:
            if not leg.torus:
                self.add_leg(leg, gram(leg.unfold(g.reshape(-1, g.shape[2]))))
        for leg in split.mixed:
            if not leg.torus:
                self.add_leg(leg, gram(leg.unfold(g.reshape(len(g), -1))))

    def _add_squares(self, g: Tensor, square: Callable[[Tensor], Tensor], ones: Tensor) -> None:
        """Entry-wise squares, or else the torus legs of matrices `[samples, rows, columns]`."""
        k, m, n = g.shape
        split = self.need.split(m)
        if self.squares is not None:
            self.squares.view(m, n).add_(square(g).sum(0))
        elif any(leg.torus for leg in split.mixed):
            self.add_torus_legs(square(g).sum(0))
        else:
            self.add_side(split.rows, lambda: torch.linalg.vector_norm(g, dim=2).square_().sum(0))
            self.add_side(split.columns, lambda: torch.mv(square(g).reshape(k * m, n).mT, ones))

    def _add_vectors(self, g: Tensor, square: Callable[[Tensor], Tensor]) -> None:
        """Everything of a parameter with one axis, from `[samples, entries]`."""
        self.gradient.add_(g.sum(0))
        legs = self.need.split(1).columns
        for leg in legs:
            if not leg.torus:
                self.add_leg(leg, gram(leg.unfold(g)))
        if self.squares is not None:
            self.squares.add_(square(g).sum(0))
        else:
            self.add_side(legs, lambda: square(g).sum(0))


def gram(x: Tensor) -> Tensor:
    """`X X^T` per block."""
    return x @ x.mT
