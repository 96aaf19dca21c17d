"""SymmetrySet: what was found in one model, printable, filterable and serialisable."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from noetherflow.core.printing import count, grouped, table
from noetherflow.core.shown import Shown
from noetherflow.core.tensors import check_same_model, tensors_of
from noetherflow.errors import DeclarationError
from noetherflow.symmetry.symmetry import Symmetry, Translation

FORMAT = 1
EXPLAINED = ("family", "blocks", "charges")
"""Columns of the table by family that its legend explains."""


def positions_of(model: nn.Module, symmetries: Iterable[Symmetry]) -> dict[str, Tensor]:
    """`tensors_of(model)` as the symmetries' groups see them: parameters with an offset have it added, in float64."""
    offsets = {name: offset for s in symmetries for name, offset in s.offsets.items()}
    return {n: t.detach().double() + offsets[n] if n in offsets else t for n, t in tensors_of(model).items()}


@dataclass(frozen=True)
class UnknownOperator:
    """An operator without a rule: every gauge that meets it was set to trivial, which is safe."""

    operator: str
    node: str
    module: str
    count: int = 1


@dataclass(frozen=True, eq=False)
class SymmetrySet(Shown):
    """The continuous symmetries of one model.

    Iterates over its exponential symmetries; `translations` holds the linear families. `shapes` are the parameter
    shapes by name, `excluded` maps a symmetry left out (frozen leg, say) to the reason, `unknown` lists operators
    without a rule, `casts` the places where the model itself lowers its precision. `example_inputs` are those that they
    were found with (not saved with the set): `balance_` compares outputs on them where no others are given.
    """

    symmetries: tuple[Symmetry, ...]
    translations: tuple[Translation, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    unknown: tuple[UnknownOperator, ...] = ()
    casts: tuple[str, ...] = ()
    example_inputs: Any = None

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
        remedy = "find them again with find_symmetries(model, example_inputs)"
        check_same_model(tensors, self.parameters, self.shapes, "the symmetries belong", remedy, DeclarationError)
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

    def without_offsets(self, why: str) -> SymmetrySet:
        """Exclude every symmetry that acts on a parameter plus a constant (`Symmetry.offsets`), and say `why`."""
        return self.without(
            {s.name: f"acts on {n} {o:+g}: {why}" for s in self.symmetries for n, o in list(s.offsets.items())[:1]}
        )

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

    def table_rows(self) -> list[dict[str, Any]]:
        """One row per symmetry: its family and group, its numbers, and the parameters that it moves."""
        return [
            {
                "symmetry": item.name,
                "family": item.family,
                "layer": item.parameters[0].rpartition(".")[0],
                "group": (item.kind if item.is_torus else f"GL({item.dim})") if isinstance(item, Symmetry) else "shift",
                "blocks": item.blocks if isinstance(item, Symmetry) else item.leg.blocks,
                "parameters": ", ".join(item.parameters),
            }
            for item in self.all_items
        ]

    def describe(self, *, verbose: bool = False, legend: bool = True) -> str:
        """A sentence, a table by family, what was left out, and unknown operators; see `Shown.describe`."""
        rows = self.summary()
        families = count(len({r["family"] for r in rows}), "family", "families")
        found = count(len(self.all_items), "continuous symmetry", "continuous symmetries")
        charges = count(self.n_charges(), "independent Noether charge", "independent Noether charges")
        lines = [f"{found} of {families}, with {charges}"] if rows else [self._none()]
        lines += [table(rows, *(EXPLAINED if legend else ()))] if rows else []
        lines += grouped("excluded", self.excluded, verbose)
        lines += [
            f"unknown operator {u.operator} at {u.module or u.node}"
            + (f" (x{u.count})" if u.count > 1 else "")
            + ": gauges that meet it are trivial"
            for u in self.unknown
        ]
        return "\n".join(lines)

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
