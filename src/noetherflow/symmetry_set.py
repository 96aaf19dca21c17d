"""SymmetrySet: what was found in one model, printable, filterable and serialisable; and symmetries declared by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.errors import DeclarationError
from noetherflow.legs import Leg
from noetherflow.printing import table
from noetherflow.symmetry import Kind, Symmetry, Translation

FORMAT = 1


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by canonical name: a tied tensor appears once, under its first name."""
    seen: dict[int, str] = {}
    out: dict[str, Tensor] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        if id(tensor) not in seen:
            seen[id(tensor)] = name
            out[name] = tensor
    return out


@dataclass(frozen=True)
class UnknownOperator:
    """An operator without a rule: every gauge that meets it was set to trivial, which is safe."""

    operator: str
    node: str
    module: str
    count: int = 1


@dataclass(frozen=True, eq=False)
class SymmetrySet:
    """The continuous symmetries of one model.

    Iterates over its exponential symmetries; `translations` holds the linear families. `shapes` are the parameter
    shapes by name, `excluded` maps a symmetry left out (frozen leg, say) to the reason, `unknown` lists operators
    without a rule, `casts` the places where the model itself lowers its precision.
    """

    symmetries: tuple[Symmetry, ...]
    translations: tuple[Translation, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    unknown: tuple[UnknownOperator, ...] = ()
    casts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [item.name for item in self.all_items]
        twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise ValueError(f"symmetry names must be unique, repeated: {twice[:5]}")

    @property
    def all_items(self) -> list[Symmetry | Translation]:
        """Exponential symmetries, then translations."""
        return [*self.symmetries, *self.translations]

    def __iter__(self) -> Iterator[Symmetry]:
        return iter(self.symmetries)

    def __len__(self) -> int:
        return len(self.symmetries)

    def __getitem__(self, key: int | str) -> Symmetry:
        if isinstance(key, int):
            return self.symmetries[key]
        for symmetry in self.symmetries:
            if symmetry.name == key:
                return symmetry
        raise KeyError(f"no symmetry named {key!r}; names: {[s.name for s in self.symmetries][:20]}")

    def filter(self, family: str | None = None, module: str | None = None, parameter: str | None = None) -> SymmetrySet:
        """Keep symmetries of a family, with a leg inside a module (name prefix), or on a parameter."""

        def keep(item: Symmetry | Translation) -> bool:
            names = item.parameters
            return (
                (family is None or item.family == family)
                and (module is None or any(n == module or n.startswith(module + ".") for n in names))
                and (parameter is None or parameter in names)
            )

        return replace(
            self,
            symmetries=tuple(s for s in self.symmetries if keep(s)),
            translations=tuple(t for t in self.translations if keep(t)),
        )

    def without(self, reasons: dict[str, str]) -> SymmetrySet:
        """Drop the symmetries named in `reasons`, recording why."""
        return replace(
            self,
            symmetries=tuple(s for s in self.symmetries if s.name not in reasons),
            translations=tuple(t for t in self.translations if t.name not in reasons),
            excluded={**self.excluded, **reasons},
        )

    def tensors_in(self, model: nn.Module) -> dict[str, Tensor]:
        """`tensors_of(model)`, which hold the parameters of these symmetries.

        Raises DeclarationError when the model has no such parameters, or of other shapes.
        """
        tensors = tensors_of(model)
        other = [
            f"{n}: {tuple(tensors[n].shape)} instead of {self.shapes[n]}" if n in tensors else f"{n}: missing"
            for n in self.parameters
            if n not in tensors or tuple(tensors[n].shape) != self.shapes.get(n, tuple(tensors[n].shape))
        ]
        if other:
            raise DeclarationError(
                f"the symmetries belong to another model ({'; '.join(other[:3])}, {len(other)} in all); find them "
                "again with find_symmetries(model, example_inputs)"
            )
        return tensors

    def trainable(self, model: nn.Module) -> SymmetrySet:
        """Exclude every symmetry with a leg on a frozen parameter (`requires_grad=False`).

        Raises DeclarationError for another model's symmetries.
        """
        tensors = self.tensors_in(model)
        frozen = {n for n, t in tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad}
        reasons = {
            item.name: f"frozen parameter {next(n for n in item.parameters if n in frozen)}"
            for item in self.all_items
            if frozen.intersection(item.parameters)
        }
        return self.without(reasons)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters that carry a charge, each once."""
        return tuple(dict.fromkeys(n for s in self.symmetries for n in s.parameters))

    def n_charges(self, exclude: Sequence[str] = ("one-sided", "null", "translation")) -> int:
        """Independent Noether charges, leaving out the families in `exclude` (theory.md section 11)."""
        total = sum(s.n_charges(self.shapes or None) for s in self.symmetries if s.family not in exclude)
        return total + sum(
            t.n_charges(self.shapes[t.leg.parameter]) for t in self.translations if t.family not in exclude
        )

    def summary(self) -> list[dict[str, Any]]:
        """One row per family and group kind: how many symmetries, coordinates and charges."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for s in self.symmetries:
            group = s.kind if s.is_torus else f"GL({s.dim})"
            row = rows.setdefault(
                (s.family, group),
                {"family": s.family, "group": group, "symmetries": 0, "blocks": 0, "charges": 0},
            )
            row["symmetries"] += 1
            row["blocks"] += s.blocks
            row["charges"] += s.n_charges(self.shapes or None)
        for t in self.translations:
            row = rows.setdefault(
                (t.family, "shift"),
                {"family": t.family, "group": "shift", "symmetries": 0, "blocks": 0, "charges": 0},
            )
            row["symmetries"] += 1
            row["blocks"] += t.leg.blocks
            row["charges"] += t.n_charges(self.shapes[t.leg.parameter]) if self.shapes else t.leg.blocks
        return list(rows.values())

    def __str__(self) -> str:
        rows = self.summary()
        lines = [table(rows, "family", "blocks", "charges") if rows else self._none()]
        lines += [f"excluded: {name}: {why}" for name, why in self.excluded.items()]
        lines += [
            f"unknown operator {u.operator} at {u.module or u.node}"
            + (f" (x{u.count})" if u.count > 1 else "")
            + ": gauges that meet it are trivial"
            for u in self.unknown
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def _none(self) -> str:
        parameter = next(iter(self.shapes), "parameter")
        return f"no continuous symmetry found; nf.explain(model, example_inputs, {parameter!r}) says what breaks it"

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "symmetries": [s.to_dict() for s in self.symmetries],
            "translations": [t.to_dict() for t in self.translations],
            "shapes": {n: list(s) for n, s in self.shapes.items()},
            "excluded": dict(self.excluded),
            "unknown": [vars(u) for u in self.unknown],
            "casts": list(self.casts),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SymmetrySet:
        if data.get("format") != FORMAT:
            raise ValueError(f"symmetry file has format {data.get('format')!r}, this version reads {FORMAT}")
        return cls(
            tuple(Symmetry.from_dict(s) for s in data["symmetries"]),
            tuple(Translation.from_dict(t) for t in data["translations"]),
            {n: tuple(s) for n, s in data["shapes"].items()},
            dict(data["excluded"]),
            tuple(UnknownOperator(**u) for u in data["unknown"]),
            tuple(data["casts"]),
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> SymmetrySet:
        return cls.from_dict(json.loads(text))


def declare(
    model: nn.Module,
    kind: Kind,
    plus: Iterable[tuple[str, int]],
    minus: Iterable[tuple[str, int]] = (),
    *,
    blocks: int = 1,
    name: str | None = None,
    family: str = "declared",
) -> SymmetrySet:
    """Declare one symmetry by parameter names: `X -> G X` on `plus`, `X -> G^-T X` on `minus`.

    Each leg is `(parameter name, axis)`. For `diagonal` the axis length is the number of coordinates; for
    `general_linear` it splits into `blocks` heads of equal size; for `scalar` any axis will do.
    A longer axis whose length is a multiple of the smallest one is read as flattened channels (replicas last).

    Raises DeclarationError for an unknown name, an axis out of range, sizes that do not match, or no leg.
    Certify the result before trusting it: `nf.certify(model, syms, example_inputs)`.
    """
    tensors = tensors_of(model)
    wanted = [(*leg, 1) for leg in plus] + [(*leg, -1) for leg in minus]
    if not wanted:
        raise DeclarationError("a symmetry needs at least one leg; give plus=[(parameter, axis), ...]")
    sizes = [_axis_length(tensors, parameter, axis) for parameter, axis, _ in wanted]
    n = 1 if kind == "scalar" else min(sizes)
    if kind == "general_linear" and n % blocks:
        raise DeclarationError(f"axis of length {n} does not split into {blocks} equal blocks")
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
        legs.append(Leg(parameter, rows.reshape(shape), sign, (axis % tensors[parameter].ndim,)))
    label = name or " -> ".join(dict.fromkeys(p for p, _, _ in wanted))
    symmetry = Symmetry(label, family, kind, tuple(legs))
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    return SymmetrySet((symmetry,), shapes=shapes)


def _axis_length(tensors: dict[str, Tensor], parameter: str, axis: int) -> int:
    if parameter not in tensors:
        import difflib

        close = difflib.get_close_matches(parameter, tensors, n=3)
        hint = f"; did you mean {close}?" if close else f"; the model has {sorted(tensors)[:8]}"
        raise DeclarationError(f"no parameter named {parameter!r}{hint}")
    tensor = tensors[parameter]
    if isinstance(tensor, torch.Tensor) and not -tensor.ndim <= axis < tensor.ndim:
        raise DeclarationError(f"{parameter!r} has shape {tuple(tensor.shape)}, no axis {axis}")
    return int(tensor.shape[axis])
