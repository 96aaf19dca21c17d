"""From measured inner products to rows: charge, measured change, entries and residual."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import scipy.sparse

from noetherflow.monitor.charge_map import ChargeMap, Watched, apply
from noetherflow.monitor.measure import StepTable
from noetherflow.monitor.noted import BROKEN, COLUMNS, RATES
from noetherflow.monitor.rule import ENTRIES, PRECONDITIONED, AnyRule, Products, StepSettings, decompose
from noetherflow.symmetry.symmetry import Symmetry

Level = Literal["family", "symmetry", "coordinate"]
LEVELS: tuple[Level, ...] = ("family", "symmetry", "coordinate")
FIELDS = ("charge", "change", *ENTRIES, "residual", "outside", "norm")
PRECONDITIONED_FIELDS = ("charge", "change", *PRECONDITIONED, "residual", "norm")
CAUSES = (*ENTRIES, "outside")
"""What adds up to the course of a charge: the entries of all steps, and what moved it between them."""


@dataclass(frozen=True, eq=False)
class Columns:
    """A table `[field, T, n]` of the `FIELDS`: charge before the step, measured change, entries, residual, `outside`,
    and `theta^T |A| theta`; or of the `PRECONDITIONED_FIELDS`.
    """

    table: np.ndarray
    fields: tuple[str, ...] = FIELDS

    def of(self, field: str) -> np.ndarray:
        """One field, `[T, n]`."""
        values: np.ndarray = self.table[self.fields.index(field)]
        return values

    def mapped(self, matrix: scipy.sparse.csr_array) -> Columns:
        """Sums of the columns: `matrix` is `[new n, n]`."""
        count, steps, n = self.table.shape
        sums = apply(matrix, self.table.reshape(count * steps, n)).reshape(count, steps, matrix.shape[0])
        return Columns(sums, self.fields)

    def cut(self, which: slice | np.ndarray) -> Columns:
        """The chosen steps only, as a copy."""
        return Columns(self.table[:, which].copy(), self.fields)

    def row(self, t: int) -> dict[str, np.ndarray]:
        return dict(zip(self.fields, self.table[:, t], strict=True))

    def unexplained(self, rounding: float) -> np.ndarray:
        """Largest share of a step's change that no entry explains, over families, `[T]`.

        `|residual|` over the sum of the entries' sizes, and over that of `residual` itself where there are none; what
        is within `rounding` of the norm counts as nothing.
        """
        residual, norm = np.abs(self.of("residual")), self.of("norm")
        entries = sum(np.abs(np.nan_to_num(self.of(name))) for name in ENTRIES)
        size = np.maximum(entries, np.abs(self.of("change")))
        told = (residual > rounding * norm) & (size > 0)
        return np.divide(residual, size, out=np.zeros_like(norm), where=told).max(axis=1, initial=0.0)

    def finite(self) -> np.ndarray:
        """Whether all charges and changes of a step are finite, `[T]`."""
        measured = np.stack([self.of(f) for f in ("charge", "change", "second_order", "norm")])
        return np.asarray(np.isfinite(measured).all(axis=(0, 2)))

    def listed(self) -> list[dict[str, list[float | None]]]:
        """All rows as plain lists, for JSON: None where a number is not finite."""
        table, unknown = self.table, ~np.isfinite(self.table)
        if unknown.any():
            table = table.astype(object)
            table[unknown] = None
        columns = table.tolist()
        return [{f: column[t] for f, column in zip(self.fields, columns, strict=True)} for t in range(table.shape[1])]


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
    zero, products = np.zeros_like(before), _products(rule, values)
    with np.errstate(invalid="ignore", over="ignore"):
        entries = decompose(rule, products, settings_arrays(rule, layout, tables), layout.reference)
        change = after - before
        columns = {"charge": before, "change": change, **dict.fromkeys(ENTRIES, zero), **entries}
        known = [np.where(np.isnan(entry), 0.0, entry) for entry in entries.values()]
        columns |= {"residual": change - sum(known), "outside": values.get("outside", zero)}
    signed = Columns(np.stack([columns[f] for f in FIELDS[:-1]])).mapped(layout.matrix).table
    norm = apply(layout.absolute, before)
    return Columns(np.concatenate([signed, norm[None]]))


def close_preconditioned(
    rule: AnyRule, layout: ChargeMap, values: Mapping[str, np.ndarray], tables: Sequence[StepTable]
) -> Columns | None:
    """The books of the preconditioned charge, arguments as for `close_books`; None for a rule without one.

    `norm` is `sum |a| d theta^2` before the step, all counted by `_rate_ratios` (theory.md section 13).
    """
    settings = settings_arrays(rule, layout, tables)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        parts = rule.preconditioned(_products(rule, values), settings)
        if parts is None:
            return None
        entries = [getattr(parts, name) for name in PRECONDITIONED]
        change = parts.after - parts.before
        table = np.stack([parts.before, change, *entries, change - sum(entries)])
        table *= _rate_ratios(np.asarray(settings.lr))
        signed = Columns(table).mapped(layout.matrix).table
        norm = apply(layout.absolute, table[0])
    return Columns(np.concatenate([signed, norm[None]]), PRECONDITIONED_FIELDS)


def _rate_ratios(lr: np.ndarray) -> np.ndarray:
    """The largest learning rate of a step over each weight's own, `[T, n_values]`.

    With learning rates of their own, legs move by `lr_i D g`, and what a step leaves alone at first order is
    `theta^T A (lr_i D)^-1 theta`. A weight whose learning rate is 0 counts nothing, unless all are 0.
    """
    largest = lr.max(axis=1, keepdims=True, initial=0.0)
    ratios = np.divide(largest, lr, out=np.zeros_like(lr), where=lr > 0)
    return np.where(largest > 0, ratios, 1.0)


def _products(rule: AnyRule, values: Mapping[str, np.ndarray]) -> Products:
    """The rule's record of what was measured; zero what was not."""
    zero = np.zeros_like(values["weight_square"])
    return rule.products(**{f.name: values.get(f.name, zero) for f in fields(rule.products)})


@dataclass(frozen=True, eq=False)
class Page:
    """Closed books of some consecutive recorded steps: `tables[level]` for every level kept.

    `preconditioned[level]` are those of the preconditioned charge, empty where the optimiser has none. `loss` is NaN
    where nobody noted it; `noted` `[T, 7]` says what the losses since the step before were, `rates` `[T, 5]` the
    learning rates; empty where nothing does.
    """

    steps: np.ndarray
    lr: np.ndarray
    loss: np.ndarray
    tables: Mapping[Level, Columns]
    preconditioned: Mapping[Level, Columns] = field(default_factory=dict)
    noted: np.ndarray = field(default_factory=lambda: np.zeros((0, len(COLUMNS))))
    rates: np.ndarray = field(default_factory=lambda: np.zeros((0, len(RATES))))

    def cut(self, which: slice | np.ndarray) -> Page:
        """The chosen steps only."""
        tables, preconditioned = (
            {level: c.cut(which) for level, c in tables.items()} for tables in (self.tables, self.preconditioned)
        )
        noted = self.noted[which] if len(self.noted) else self.noted
        rates = self.rates[which] if len(self.rates) else self.rates
        return Page(self.steps[which], self.lr[which], self.loss[which], tables, preconditioned, noted, rates)


class History:
    """The pages of the last `capacity` recorded steps.

    `first` is the first step ever recorded here, `dropped` how many recorded steps are no longer kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pages: deque[Page] = deque()
        self.first: int | None = None
        self.dropped = 0

    def add(self, page: Page) -> None:
        self.pages.append(page)
        if self.first is None:
            self.first = int(page.steps[0])
        surplus = sum(len(p.steps) for p in self.pages) - self.capacity
        while surplus > 0:
            first = self.pages.popleft()
            if len(first.steps) > surplus:
                self.pages.appendleft(first.cut(slice(surplus, None)))
            self.dropped += min(len(first.steps), surplus)
            surplus -= len(first.steps)

    def losses(self) -> dict[int, float]:
        """The losses that were noted, by step."""
        return {int(k): float(x) for p in self.pages for k, x in zip(p.steps, p.loss, strict=True) if not np.isnan(x)}

    def noted(self) -> dict[int, dict[str, float]]:
        """The losses of several steps that a recorded one stands for, by step."""
        return {
            int(k): dict(zip(COLUMNS, row.tolist(), strict=True))
            for p in self.pages
            for k, row in zip(p.steps, p.noted, strict=False)
            if row[0] > 1 or np.isfinite(row[BROKEN])
        }

    def rates(self) -> dict[int, dict[str, float]]:
        """The learning rates of several steps that a recorded one stands for, by step."""
        return {
            int(k): dict(zip(RATES, row.tolist(), strict=True))
            for p in self.pages
            for k, row in zip(p.steps, p.rates, strict=False)
            if row[0] > 1
        }

    def lacks(self, since: int) -> bool:
        """Whether steps from `since` on were recorded and are no longer kept."""
        return self.dropped > 0 and (not self.pages or since < int(self.pages[0].steps[0]))

    def rewind(self, step: int) -> None:
        """Forget everything from `step` on."""
        kept = [page.cut(page.steps < step) for page in self.pages]
        self.pages = deque(page for page in kept if len(page.steps))

    def rows(self, level: Level, preconditioned: bool = False) -> Iterator[tuple[int, float, dict[str, np.ndarray]]]:
        """`(step, lr, {field: [n]})` per recorded step; of the preconditioned charge where the optimiser has one."""
        for page in self.pages:
            columns = (page.preconditioned if preconditioned else page.tables).get(level)
            for t, (step, lr) in enumerate(zip(page.steps, page.lr, strict=True)):
                if columns is not None:
                    yield int(step), float(lr), columns.row(t)


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
        found = zip(rows, layout.symmetries, layout.spans, strict=True)
        return [
            row | {"coordinate": j, **_place(symmetry, j, stop - start)}
            for row, symmetry, (start, stop) in found
            for j in range(stop - start)
        ]


def _place(watched: Watched, coordinate: int, coordinates: int) -> dict[str, str]:
    """Layer and part of one coordinate, as `{"layer": "h.0.attn", "part": "head 2"}`; a matrix block has several."""
    if not isinstance(watched, Symmetry):
        return {"layer": watched.parameters[0].rpartition(".")[0], "part": ""}
    block = coordinate * watched.blocks // coordinates
    return {"layer": watched.layer, "part": f"{watched.part} {block}"}
