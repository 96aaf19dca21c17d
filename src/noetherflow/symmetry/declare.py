"""Symmetries declared by hand."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor, nn

from noetherflow.core.arguments import A_MODEL, expect
from noetherflow.core.tensors import tensors_of
from noetherflow.errors import DeclarationError
from noetherflow.symmetry.leg import Leg
from noetherflow.symmetry.symmetry import Kind, Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet


def declare(
    model: nn.Module,
    kind: Kind,
    plus: Iterable[tuple[str, int]],
    minus: Iterable[tuple[str, int]] = (),
    *,
    blocks: int = 1,
    name: str | None = None,
    family: str = "declared",
    offsets: Mapping[str, float] | None = None,
) -> SymmetrySet:
    """Declare one symmetry by parameter names: `X -> G X` on `plus`, `X -> G^-T X` on `minus`.

    Args:
        model: the model whose parameters are named.
        kind: `diagonal` (one positive number per coordinate of the axis), `general_linear` (a matrix per block) or
            `scalar` (one number for all; any axis will do).
        plus: legs `(parameter name, axis)` that the group multiplies. A longer axis whose length is a multiple of the
            smallest one is read as flattened channels (replicas last). A parameter that is one number has axis 0.
        minus: legs that the inverse multiplies.
        blocks: heads of equal size into which a `general_linear` axis splits.
        name: of the symmetry; the parameters' names by default.
        family: under which tables list it.
        offsets: what is added to a parameter before the group acts: `{"norm.weight": 1.0}` for a gain `1 + weight`.

    Returns:
        A set with this one symmetry. Certify it before trusting it: `nf.certify(model, syms, example_inputs)`.

    Raises:
        DeclarationError: an unknown name, an axis out of range, sizes that do not match, or no leg.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> declare(net, "diagonal", plus=[("0.weight", 0), ("0.bias", 0)], minus=[("2.weight", 1)]).n_charges()
        4
    """
    expect("declare(model, kind, plus, minus)", "model", model, nn.Module, A_MODEL)
    tensors = tensors_of(model)
    wanted = [(*leg, 1) for leg in plus] + [(*leg, -1) for leg in minus]
    if not wanted:
        raise DeclarationError("a symmetry needs at least one leg; give plus=[(parameter, axis), ...]")
    sizes = [_axis_length(tensors, parameter, axis) for parameter, axis, _ in wanted]
    n = 1 if kind == "scalar" else min(sizes)
    if kind == "general_linear" and n % blocks:
        raise DeclarationError(f"axis of length {n} does not split into {blocks} equal blocks")
    if unknown := sorted(set(offsets or ()) - {parameter for parameter, _, _ in wanted}):
        raise DeclarationError(f"offsets name {unknown}, on which no leg lies; legs: {[p for p, _, _ in wanted]}")
    if kind != "general_linear" and blocks != 1:
        raise DeclarationError(f"blocks={blocks} is for kind='general_linear', got kind={kind!r}")
    legs = []
    for (parameter, axis, sign), size in zip(wanted, sizes, strict=True):
        if size % n:
            shapes = {p: tuple(tensors[p].shape) for p, _, _ in wanted}
            raise DeclarationError(
                f"leg ({parameter!r}, axis {axis}) has length {size}, not a multiple of {n}; shapes: {shapes}"
            )
        rows = np.arange(size, dtype=np.int64)
        shape = (blocks, n // blocks, size // n) if kind == "general_linear" else (n, 1, size // n)
        offset, ndim = (offsets or {}).get(parameter, 0.0), tensors[parameter].ndim
        view = None if ndim else (1,)
        legs.append(Leg(parameter, rows.reshape(shape), sign, (axis % max(1, ndim),), view, offset=offset))
    label = name or " -> ".join(dict.fromkeys(p for p, _, _ in wanted))
    symmetry = Symmetry(label, family, kind, tuple(legs))
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    return SymmetrySet((symmetry,), shapes=shapes)


def _axis_length(tensors: dict[str, Tensor], parameter: str, axis: int) -> int:
    if parameter not in tensors:
        close = difflib.get_close_matches(parameter, tensors, n=3)
        hint = f"; did you mean {close}?" if close else f"; the model has {sorted(tensors)[:8]}"
        raise DeclarationError(f"no parameter named {parameter!r}{hint}")
    tensor = tensors[parameter]
    ndim = max(1, tensor.ndim)
    if not -ndim <= axis < ndim:
        raise DeclarationError(f"{parameter!r} has shape {tuple(tensor.shape)}, no axis {axis}")
    return int(tensor.shape[axis]) if tensor.ndim else 1
