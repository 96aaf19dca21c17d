"""From measured inner products to rows: charge, measured change, entries and residual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
from torch import Tensor

from noetherflow.monitor.decompose import ENTRIES, Rule, decompose
from noetherflow.monitor.layout import Layout, apply

FIELDS = ("charge", "change", *ENTRIES, "residual", "norm")


@dataclass
class Measurement:
    """One recorded step: inner products `[n_values]` by name (`tt`, `tt_after`: charges), settings per parameter."""

    step: int
    values: dict[str, Tensor]
    settings: list[dict[str, float]]
    lr: float
    loss: Any = None
    blocks: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Columns:
    """`FIELDS` by name, each `[T, n]`: charge before, measured change, entries, residual, `theta^T |A| theta`."""

    columns: Mapping[str, np.ndarray]

    def mapped(self, matrix: scipy.sparse.csr_array) -> Columns:
        return Columns({name: apply(matrix, value) for name, value in self.columns.items()})

    def row(self, t: int) -> dict[str, np.ndarray]:
        return {name: value[t] for name, value in self.columns.items()}


def coefficient_arrays(rule: Rule, layout: Layout, settings: Sequence[list[dict[str, float]]]) -> dict[str, np.ndarray]:
    """`c[name]` `[T, n_values]` from one dict per recorded step and parameter."""
    table = np.array([[[c[k] for k in rule.coefficients] for c in step] for step in settings], dtype=np.float64)
    table = table.reshape(len(settings), len(layout.parameters), len(rule.coefficients))
    return {k: table[:, layout.parameter_of_value, j] for j, k in enumerate(rule.coefficients)}


def close_books(
    rule: Rule, layout: Layout, values: Mapping[str, np.ndarray], settings: Sequence[list[dict[str, float]]]
) -> Columns:
    """All columns in the layout's outputs, `[T, n_out]`, from measured values `[T, n_values]` by name.

    `change = C(theta') - C(theta)` is measured; `residual = change - sum of entries` is rounding (theory.md section 3).
    """
    c = coefficient_arrays(rule, layout, settings)
    with np.errstate(invalid="ignore", over="ignore"):
        measured = {q: values.get(q, np.zeros_like(values["tt"])) for q in rule.quantities}
        entries = decompose(rule, measured, c, layout.reference)
        out = {name: apply(layout.matrix, value) for name, value in entries.items()}
        change = apply(layout.matrix, values["tt_after"] - values["tt"])
        absent = np.zeros_like(change)
        columns = {"charge": apply(layout.matrix, values["tt"]), "change": change}
        columns |= {name: out.get(name, absent) for name in ENTRIES}
        columns["residual"] = change - sum(out.values())
    columns["norm"] = apply(layout.absolute, values["tt"])
    return Columns(columns)


@dataclass(frozen=True, eq=False)
class Index:
    """The names of the rows at each level and the sparse maps from outputs to them."""

    families: tuple[str, ...]
    symmetries: tuple[str, ...]
    family_of: tuple[str, ...]
    to_family: scipy.sparse.csr_array
    to_symmetry: scipy.sparse.csr_array

    @classmethod
    def of(cls, layout: Layout) -> Index:
        families = tuple(dict.fromkeys(s.family for s in layout.symmetries))
        family_of = tuple(s.family for s in layout.symmetries)
        member = scipy.sparse.csr_array(
            (np.ones(len(family_of)), ([families.index(f) for f in family_of], np.arange(len(family_of)))),
            shape=(len(families), len(family_of)),
        )
        totals = layout.totals_matrix
        return cls(families, tuple(s.name for s in layout.symmetries), family_of, member @ totals, totals)

    def header(self, layout: Layout) -> dict[str, Any]:
        return {
            "families": list(self.families),
            "symmetries": [
                {"name": s.name, "family": s.family, "kind": s.kind, "shape": list(s.shape), "one_sided": s.one_sided}
                | {"parameters": list(s.parameters)}
                for s in layout.symmetries
            ],
        }
