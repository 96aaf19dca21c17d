"""From measured inner products to rows: charge, measured change, entries and residual."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import scipy.sparse

from noetherflow.monitor.charge_map import ChargeMap, apply
from noetherflow.monitor.measure import StepTable
from noetherflow.monitor.rule import ENTRIES, AnyRule, StepSettings, decompose

Level = Literal["family", "symmetry", "coordinate"]
LEVELS: tuple[Level, ...] = ("family", "symmetry", "coordinate")
FIELDS = ("charge", "change", *ENTRIES, "residual", "outside", "norm")
CAUSES = (*ENTRIES, "outside")
"""What adds up to the course of a charge: the entries of all steps, and what moved it between them."""


@dataclass(frozen=True, eq=False)
class Columns:
    """A table `[field, T, n]` of the `FIELDS`: charge before the step, measured change, entries, residual, `outside`,
    and `theta^T |A| theta`.
    """

    table: np.ndarray

    def mapped(self, matrix: scipy.sparse.csr_array) -> Columns:
        """Sums of the columns: `matrix` is `[new n, n]`."""
        fields, steps, n = self.table.shape
        return Columns(apply(matrix, self.table.reshape(fields * steps, n)).reshape(fields, steps, matrix.shape[0]))

    def row(self, t: int) -> dict[str, np.ndarray]:
        return dict(zip(FIELDS, self.table[:, t], strict=True))

    def unexplained(self) -> np.ndarray:
        """Largest `|residual| / norm` of each step, `[T]`."""
        residual, norm = np.abs(self.table[FIELDS.index("residual")]), self.table[FIELDS.index("norm")]
        return np.divide(residual, norm, out=np.zeros_like(norm), where=norm > 0).max(axis=1, initial=0.0)

    def finite(self) -> np.ndarray:
        """Whether all charges and changes of a step are finite, `[T]`."""
        measured = self.table[[FIELDS.index(f) for f in ("charge", "change", "second_order", "norm")]]
        return np.asarray(np.isfinite(measured).all(axis=(0, 2)))

    def listed(self) -> list[dict[str, list[float | None]]]:
        """All rows as plain lists, for JSON: None where a number is not finite."""
        table, unknown = self.table, ~np.isfinite(self.table)
        if unknown.any():
            table = table.astype(object)
            table[unknown] = None
        columns = table.tolist()
        return [{f: column[t] for f, column in zip(FIELDS, columns, strict=True)} for t in range(table.shape[1])]


def settings_arrays(rule: AnyRule, layout: ChargeMap, tables: Sequence[StepTable]) -> StepSettings:
    """The settings of some steps as one record of arrays `[T, n_values]`, one table per recorded step."""
    names, n_parameters = rule.step_settings.names(), len(layout.parameters)
    counts = np.array([len(table.distinct) for table in tables])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    every = np.array([[getattr(c, name) for name in names] for table in tables for c in table.distinct], dtype=float)
    picks = np.array([table.which[:n_parameters] for table in tables], dtype=int).reshape(len(tables), n_parameters)
    chosen = every[(picks + starts[:, None])[:, layout.parameter_of_value]]
    return rule.step_settings(**{name: chosen[..., k] for k, name in enumerate(names)})


def close_books(
    rule: AnyRule, layout: ChargeMap, values: Mapping[str, np.ndarray], tables: Sequence[StepTable]
) -> Columns:
    """All columns in the layout's outputs, `[T, n_out]`, from measured values `[T, n_values]` by name.

    `change = C(theta') - C(theta)` is measured; `residual = change - sum of entries` is rounding (theory.md section 3).
    An entry that the rule cannot know is NaN, and another one holds its part. `outside`, where given, is the change
    since the end of the step before: what other hands than the watched optimiser did.
    """
    before, after = values["weight_square"], values["weight_square_after"]
    zero = np.zeros_like(before)
    products = rule.products(**{f.name: values.get(f.name, zero) for f in fields(rule.products)})
    with np.errstate(invalid="ignore", over="ignore"):
        entries = decompose(rule, products, settings_arrays(rule, layout, tables), layout.reference)
        change = after - before
        columns = {"charge": before, "change": change, **dict.fromkeys(ENTRIES, zero), **entries}
        known = [np.where(np.isnan(entry), 0.0, entry) for entry in entries.values()]
        columns |= {"residual": change - sum(known), "outside": values.get("outside", zero)}
    signed = Columns(np.stack([columns[f] for f in FIELDS[:-1]])).mapped(layout.matrix).table
    norm = apply(layout.absolute, before)
    return Columns(np.concatenate([signed, norm[None]]))


@dataclass(frozen=True, eq=False)
class Page:
    """Closed books of some consecutive recorded steps: `tables[level]` for every level kept."""

    steps: np.ndarray
    lr: np.ndarray
    tables: Mapping[Level, Columns]

    def cut(self, which: slice | np.ndarray) -> Page:
        """The chosen steps only."""
        tables = {level: Columns(columns.table[:, which].copy()) for level, columns in self.tables.items()}
        return Page(self.steps[which], self.lr[which], tables)


class History:
    """The pages of the last `capacity` recorded steps."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pages: deque[Page] = deque()

    def add(self, page: Page) -> None:
        self.pages.append(page)
        surplus = sum(len(p.steps) for p in self.pages) - self.capacity
        while surplus > 0:
            first = self.pages.popleft()
            if len(first.steps) > surplus:
                self.pages.appendleft(first.cut(slice(surplus, None)))
            surplus -= len(first.steps)

    def rewind(self, step: int) -> None:
        """Forget everything from `step` on."""
        kept = [page.cut(page.steps < step) for page in self.pages]
        self.pages = deque(page for page in kept if len(page.steps))

    def rows(self, level: Level) -> Iterator[tuple[int, float, dict[str, np.ndarray]]]:
        """`(step, lr, {field: [n]})` per recorded step."""
        for page in self.pages:
            for t, (step, lr) in enumerate(zip(page.steps, page.lr, strict=True)):
                yield int(step), float(lr), page.tables[level].row(t)


@dataclass(frozen=True, eq=False)
class Index:
    """The names of the rows at each level and the sparse maps from outputs to them."""

    families: tuple[str, ...]
    symmetries: tuple[str, ...]
    family_of: tuple[str, ...]
    to_family: scipy.sparse.csr_array
    to_symmetry: scipy.sparse.csr_array

    @classmethod
    def of(cls, layout: ChargeMap) -> Index:
        families = tuple(dict.fromkeys(s.family for s in layout.symmetries))
        family_of = tuple(s.family for s in layout.symmetries)
        member = scipy.sparse.csr_array(
            (np.ones(len(family_of)), ([families.index(f) for f in family_of], np.arange(len(family_of)))),
            shape=(len(families), len(family_of)),
        )
        totals = layout.totals_matrix
        return cls(families, tuple(s.name for s in layout.symmetries), family_of, member @ totals, totals)

    def header(self, layout: ChargeMap) -> dict[str, Any]:
        return {
            "families": list(self.families),
            "symmetries": [
                {"name": s.name, "family": s.family, "kind": s.kind, "shape": list(s.shape), "one_sided": s.one_sided}
                | {"parameters": list(s.parameters)}
                for s in layout.symmetries
            ],
        }

    def labels(self, layout: ChargeMap, by: Level) -> list[dict[str, Any]]:
        """What names each row of a level."""
        if by == "family":
            return [{"family": f} for f in self.families]
        rows: list[dict[str, Any]] = [
            {"family": f, "symmetry": n} for n, f in zip(self.symmetries, self.family_of, strict=True)
        ]
        if by == "symmetry":
            return rows
        spans = zip(rows, layout.spans, strict=True)
        return [row | {"coordinate": j} for row, (start, stop) in spans for j in range(stop - start)]
