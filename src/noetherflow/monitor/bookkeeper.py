"""Closes a ledger's books on the steps measured so far: rows in memory, estimates, and lines for the journal."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from noetherflow.errors import DataError
from noetherflow.monitor.books import (
    LEVELS,
    Columns,
    History,
    Index,
    Level,
    Page,
    close_books,
    close_preconditioned,
    settings_arrays,
)
from noetherflow.monitor.charge_map import ChargeMap
from noetherflow.monitor.estimates import HEAD, Estimator, LegRoots, LegSquares, rotation_rows
from noetherflow.monitor.journal import Journal
from noetherflow.monitor.layers import LayerBook, LayerRow, named_rows
from noetherflow.monitor.log import FORMAT, plain, step_columns
from noetherflow.monitor.measure import Measurement
from noetherflow.monitor.noted import NotedLosses, NotedRates, noted_row, rates_row
from noetherflow.monitor.rule import AnyRule, StepSettings
from noetherflow.monitor.sums import Value, tabulate

UNEXPLAINED = 1e-3
"""A residual above this share of the entries says that something else wrote to the weights within the step."""


@dataclass(frozen=True, eq=False)
class EstimateRow:
    """The estimates of one recorded step: a column `[symmetries]` per key, what is told of the layers, and a
    column `[heads]` per key of attention heads.
    """

    step: int
    columns: Mapping[str, np.ndarray]
    layers: LayerRow | None = None
    heads: Mapping[str, np.ndarray] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        """As a line of the log."""
        line: dict[str, Any] = {"kind": "estimates", "step": self.step, "symmetry": dict(self.columns)}
        if self.layers is not None:
            line |= self.layers.line()
        return {**line, "head": dict(self.heads)} if self.heads else line


@dataclass(frozen=True, eq=False)
class LastStep:
    """The step recorded last, and the squares of the weights `[leg values]` that it left behind."""

    step: int
    weight_square: np.ndarray


class Bookkeeper:
    """What a ledger keeps in memory about one set of symmetries.

    Args:
        rule: the optimiser's rule.
        layout: the charges that are watched.
        estimator: the live estimates, None for none.
        detail: the finest level that is kept.
        capacity: recorded steps and estimates kept.
        rounding: of the measured charges, as a share of their norm.
        layers: the names of the layers that are measured beside.
    """

    def __init__(
        self,
        rule: AnyRule,
        layout: ChargeMap,
        estimator: Estimator | None,
        detail: Level,
        capacity: int,
        rounding: float,
        layers: Sequence[str] = (),
    ) -> None:
        self.rule, self.layout, self.estimator, self.detail = rule, layout, estimator, detail
        self.index = Index.of(layout)
        self._history = History(capacity)
        self._estimates: deque[EstimateRow] = deque(maxlen=capacity)
        self._last: LastStep | None = None
        self._rounding = rounding
        self.layers, self.layer_book = tuple(layers), LayerBook()

    def enter(self, pending: Sequence[Measurement], values: Mapping[str, np.ndarray], journal: Journal) -> None:
        """Close the books on some steps, given all their inner products `[steps, leg values]` by name."""
        values = {**values, "outside": self._outside([m.step for m in pending], values)}
        settings = [m.settings for m in pending]
        books = close_books(self.rule, self.layout, values, settings)
        preconditioned = close_preconditioned(self.rule, self.layout, values, settings)
        beside: dict[Level, Columns] = {} if preconditioned is None else self._levels(preconditioned)
        steps, lr = np.array([m.step for m in pending]), np.array([m.lr for m in pending])
        rows = [_row_of(m) for m in pending]
        loss = np.array([row.get("loss", np.nan) for row in rows])
        noted, rates = np.array([noted_row(row) for row in rows]), np.array([rates_row(row) for row in rows])
        page = Page(steps, lr, loss, self._levels(books), beside, noted, rates)
        self._history.add(page)
        finite, family = books.finite(), page.tables["family"]
        unexplained = family.unexplained(self._rounding) > UNEXPLAINED
        symmetry = books.mapped(self.index.to_symmetry)
        shown: dict[str, Columns] = dict(page.tables.items())
        shown |= {f"preconditioned_{level}": c for level, c in page.preconditioned.items()}
        listed = {name: columns.listed() for name, columns in shown.items()} if journal.log is not None else {}
        for t, (m, row) in enumerate(zip(pending, rows, strict=True)):
            line = plain(row) | {name: values[t] for name, values in listed.items()}
            if journal.sinks:
                row |= {name: table.row(t) for name, table in shown.items()}
            journal.emit(row, line)
            if "gradient_square" in m.blocks and finite[t]:
                self._estimate(m, symmetry.row(t), journal)
            self._warn(m.step, bool(finite[t]), bool(unexplained[t]), journal)

    def _levels(self, books: Columns) -> dict[Level, Columns]:
        """The books at every level that is kept."""
        kept = LEVELS[: LEVELS.index(self.detail) + 1]
        maps: dict[Level, Any] = {"family": self.index.to_family, "symmetry": self.index.to_symmetry}
        return {level: books.mapped(maps[level]) if level in maps else books for level in kept}

    def _outside(self, steps: Sequence[int], values: Mapping[str, np.ndarray]) -> np.ndarray:
        """What the weights' squares changed by since the end of the step before; NaN where that was not recorded."""
        before, after = values["weight_square"], values["weight_square_after"]
        last = self._last or LastStep(steps[0] - 1, before[0])
        was = np.concatenate([last.weight_square[None], after[:-1]])
        follows = np.diff([last.step, *steps]) == 1
        self._last = LastStep(steps[-1], after[-1])
        with np.errstate(invalid="ignore", over="ignore"):
            return np.where(follows[:, None], before - was, np.nan)

    def _warn(self, step: int, finite: bool, unexplained: bool, journal: Journal) -> None:
        if journal.begins("non-finite", not finite):
            journal.event("non-finite", step)
        if journal.begins("unexplained", unexplained):
            note = "the entries do not add up to the change: something else wrote to the weights within the step"
            journal.event("unexplained", step, note=note)

    def _estimate(self, m: Measurement, row: Mapping[str, np.ndarray], journal: Journal) -> None:
        assert self.estimator is not None
        settings, matrices = self._settings(m), np.array([float(c) for c in m.matrix_charges])
        squares = LegSquares(*self._legs(LegSquares, m.blocks))
        step_size = row["second_order"][: len(self.estimator.layout.symmetries)]
        columns = self.estimator.rows(m.step, squares, settings, step_size, matrices)
        layers = None if m.layers is None else self.layer_book.row(m.step, m.layers)
        self._enter_estimate(m, columns, squares.weight_square, row, layers, journal)

    def estimate_end(self, m: Measurement, layers: np.ndarray, journal: Journal) -> None:
        """One more estimate after the last step, from weights and averages alone.

        Args:
            m: weights, state and settings after the last step; `blocks` holds `weight_square` only.
            layers: the squared norm of each layer's weights, `[layers]`.
            journal: where the row goes.
        """
        assert self.estimator is not None
        matrices = np.array([float(c) for c in m.matrix_charges])
        squares = LegSquares(*self._legs(LegSquares, m.blocks)).weight_square
        if not np.isfinite(squares).all():
            return
        columns = self.estimator.weight_rows(squares, self._settings(m), matrices)
        unknown = np.full(len(self.layout.symmetries), np.nan)
        row = dict.fromkeys(("change", "residual", "second_order"), unknown)
        norm = np.concatenate([columns["norm"], unknown[len(columns["norm"]) :]])
        told = self.layer_book.so_far(m.step, layers) if self.layers else None
        self._enter_estimate(m, columns, squares, {**row, "norm": norm}, told, journal)

    def _settings(self, m: Measurement) -> StepSettings:
        """The settings of one step on the legs that are estimated."""
        assert self.estimator is not None
        return settings_arrays(self.rule, self.estimator.layout, [m.settings]).at(0)

    def _legs(self, record: type, rows: Mapping[str, list[Value]]) -> np.ndarray:
        """The fields of a record as `[fields, n_values]` on the legs that are estimated; 0 what was not measured."""
        assert self.estimator is not None
        sizes = list(self.estimator.layout.sizes.values())
        nothing: list[Value] = [0.0] * len(sizes)
        names = [f.name for f in fields(record)]
        return tabulate([[rows.get(name, nothing)[: len(sizes)]] for name in names], sizes)[:, 0]

    def _enter_estimate(
        self,
        m: Measurement,
        columns: dict[str, np.ndarray],
        weight_square: np.ndarray,
        row: Mapping[str, np.ndarray],
        layers: LayerRow | None,
        journal: Journal,
    ) -> None:
        """Complete the columns by what the optimiser's squares and the step's row tell, and keep them."""
        assert self.estimator is not None
        n = len(self.estimator.layout.symmetries)
        spread = np.ones(n)
        if self.rule.keeps_squares:
            roots = LegRoots(*self._legs(LegRoots, m.roots))
            columns = columns | self.estimator.root_rows(roots, self._settings(m))
            spread = self.estimator.spread(roots, weight_square)
        heads = {k.removeprefix(HEAD): columns.pop(k) for k in list(columns) if k.startswith(HEAD)}
        heads = heads if self.estimator.heads.symmetries else {}
        shifts = np.full(len(self.layout.symmetries) - n, np.nan)
        columns = {k: np.concatenate([v, shifts]) for k, v in columns.items()}
        columns |= rotation_rows(self.layout, self.rule, row, m.settings)
        columns["angular_predicted"] = columns["angular_predicted"] * np.concatenate([spread, shifts])
        self._estimates.append(EstimateRow(m.step, columns, layers, heads))
        journal.emit(self._estimates[-1].line())

    @property
    def last_estimate(self) -> int | None:
        """The step of the last estimate in memory, None for none."""
        return self._estimates[-1].step if self._estimates else None

    def header(self, step: int, optimizer: str, every: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The log's header from this step on, and the names of the rows' columns for the sinks."""
        header = {
            "kind": "run",
            "format": FORMAT,
            "step": step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "optimizer": optimizer,
            "rule": type(self.rule).__name__,
            "equilibrium": self.rule.has_equilibrium or self.rule.keeps_squares,
            "effective_lr": self.rule.effective_lr_words,
            "not_booked": self.rule.reason_not_booked,
            "every": every,
            "detail": self.detail,
        }
        names = {"families": self.index.families, "symmetries": self.index.symmetries, "layers": self.layers}
        heads = list(self.estimator.heads.symmetries) if self.estimator is not None else []
        return header | self.index.header(self.layout) | {"layers": list(self.layers), "heads": heads}, names

    def records(self, by: Level, preconditioned: bool = False) -> list[dict[str, Any]]:
        """See `Ledger.records`, with `preconditioned` `Ledger.preconditioned`."""
        if LEVELS.index(by) > LEVELS.index(self.detail):
            raise DataError(f"this ledger keeps detail={self.detail!r}; rows by {by!r} need Ledger(..., detail={by!r})")
        return self._labelled(by, self._history.rows(by, preconditioned))

    def _labelled(self, by: Level, found: Iterable[tuple[int, float, Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """A row per label of this level, of each step `(step, lr, {field: [labels]})`."""
        labels = self.index.labels(self.layout, by)
        return [
            {"step": step, **label, "lr": lr} | {f: float(values[i]) for f, values in row.items()}
            for step, lr, row in found
            for i, label in enumerate(labels)
        ]

    def records_since(
        self, by: Level, since: int, log: Path | None, preconditioned: bool = False
    ) -> list[dict[str, Any]]:
        """The rows of every step recorded here from `since` on: from the log where memory no longer has them.

        Raises:
            DataError: memory no longer has them and there is no log; or as `records`.
        """
        rows = self.records(by, preconditioned)
        if not self._history.lacks(since):
            return [row for row in rows if row["step"] >= since]
        if log is None:
            raise DataError(
                f"rows before step {int(self._history.pages[0].steps[0]):,} are no longer in memory; give Ledger "
                f"run_dir= or a larger capacity (it is {self._history.capacity:,})"
            )
        first = max(since, self._history.first or 0)
        name = f"preconditioned_{by}" if preconditioned else by
        return self._labelled(by, ((n, lr, columns) for n, lr, columns in step_columns(log, name) if n >= first))

    @property
    def dropped(self) -> int:
        """Recorded steps whose rows are no longer in memory."""
        return self._history.dropped

    def estimates(self) -> list[dict[str, Any]]:
        """See `Ledger.estimates`."""
        labels = self.index.labels(self.layout, "symmetry")
        return [
            {"step": e.step, **label} | {k: float(v[i]) for k, v in e.columns.items()}
            for e in self._estimates
            for i, label in enumerate(labels)
        ]

    def layer_rows(self) -> list[dict[str, Any]]:
        """See `Ledger.layers`."""
        return named_rows(self.layers, [e.layers for e in self._estimates if e.layers is not None])

    def as_log(self, header: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The rows in memory as lines of a log that begins with `header`."""
        rows, losses, noted = list(self._history.rows("family")), self._history.losses(), self._history.noted()
        rates = self._history.rates()
        beside = {step: row for step, _, row in self._history.rows("family", preconditioned=True)}
        yield {**header, "step": rows[0][0] if rows else 0}
        for step, lr, row in rows:
            line = {"kind": "step", "step": step, "lr": lr, "family": {f: v.tolist() for f, v in row.items()}}
            if step in losses:
                line["loss"] = losses[step]
            if step in noted:
                line["losses"] = noted[step]
            if step in rates:
                line["rates"] = rates[step]
            if step in beside:
                line["preconditioned_family"] = {f: v.tolist() for f, v in beside[step].items()}
            yield line
        for e in self._estimates:
            yield plain(e.line(), digits=17)

    def rewind(self, step: int) -> None:
        """Forget everything from `step` on."""
        self._history.rewind(step)
        self._last = None
        self._estimates = deque((e for e in self._estimates if e.step < step), maxlen=self._estimates.maxlen)


def _row_of(m: Measurement) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": "step", "step": m.step, "lr": m.lr}
    row |= {} if m.loss is None else {"loss": float(m.loss)}
    row |= {} if len(m.rates) < 2 else {"rates": NotedRates.of(m.rates, m.step).line()}
    alone = len(m.losses) == 1 and m.loss is not None and math.isfinite(row["loss"])
    return row if alone or not m.losses else {**row, "losses": NotedLosses.of(m.losses, m.losses_at).line()}
