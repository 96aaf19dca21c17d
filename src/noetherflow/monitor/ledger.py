"""The ledger: every step's change of every charge, split into its causes, at the cost of a few dot products."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core.tensors import named_tensors
from noetherflow.core.unwrap import unwrap_optimizer
from noetherflow.errors import DataError
from noetherflow.monitor import sharding
from noetherflow.monitor.books import (
    FIELDS,
    LEVELS,
    Columns,
    History,
    Index,
    Level,
    Page,
    close_books,
    settings_arrays,
)
from noetherflow.monitor.charge_map import ChargeMap, Watched, WatchedTranslation
from noetherflow.monitor.estimates import Estimator, LegSquares, rotation_rows
from noetherflow.monitor.journal import Journal, Sink
from noetherflow.monitor.log import FORMAT, plain
from noetherflow.monitor.measure import Measurement, StepMeter, Value, tabulate
from noetherflow.monitor.rule import AnyRule
from noetherflow.monitor.rules import rule_for
from noetherflow.monitor.watching import parameters_of, watch_closure
from noetherflow.symmetry.symmetry_set import SymmetrySet

UNEXPLAINED = 1e-3


@dataclass
class _Open:
    """What is known of a step between `before_step` and `after_step`."""

    measurement: Measurement | None = None
    stepped: bool = False
    found_inf: Any = None


class Ledger:
    """`C' - C = gradient + momentum + decay + preconditioner + second_order`, per symmetry and step (theory.md 3).

    Call `before_step()` when the gradients are final (unscaled, clipped) and `after_step()` after `optimizer.step()`;
    or let `attach()` (also `with ledger:`) do so through the optimiser's step hooks.

    - `every=k` records every k-th step; steps in between cost nothing.
    - `detail`: what is computed and stored. `family` and `symmetry` need totals only, one dot product per parameter
      and term; `coordinate` keeps every charge (matrices for general_linear).
    - `estimate_every`: recorded steps between the live estimates (`estimates()`), 0 for none.
    - `run_dir`: append-only log `ledger.jsonl`, written every `flush_every` recorded steps; resumes after a crash.
    - `translations`: watch these too, each by the square of its linear charge; one projection per tensor read.
    - `capacity`: recorded steps kept in memory for `records()`; the log keeps all.
    - `sinks`: called with every logged row (TensorBoard, W&B, MLflow, CSV: see `monitor.sinks`).

    Raises DeclarationError when a symmetry names a parameter that the model does not have, DataError for bad settings
    and for an optimiser of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        syms: SymmetrySet,
        *,
        every: int = 1,
        detail: Level = "family",
        run_dir: str | Path | None = None,
        capacity: int = 500,
        translations: bool = False,
        estimate_every: int = 50,
        flush_every: int = 50,
        sinks: Iterable[Sink] = (),
    ) -> None:
        if every < 1 or flush_every < 1 or estimate_every < 0:
            raise DataError(
                f"every={every}, flush_every={flush_every} must be >= 1, estimate_every={estimate_every} >= 0"
            )
        if detail not in LEVELS:
            raise DataError(f"detail must be one of {LEVELS}, got {detail!r}")
        self.model, self.optimizer = model, unwrap_optimizer(optimizer)
        self.every, self.detail, self.estimate_every, self.flush_every = every, detail, estimate_every, flush_every
        self.rule: AnyRule = rule_for(self.optimizer)
        self.step = 0
        self._history = History(capacity)
        self._estimates: deque[dict[str, Any]] = deque(maxlen=capacity)
        self._pending: list[Measurement] = []
        self._open: _Open | None = None
        self._handles: list[Any] = [self.optimizer.register_step_post_hook(self._stepped)]
        self._loss: Any = None
        self._closed = False
        self._translations = translations
        self._set_symmetries(syms)
        self._journal = Journal(run_dir, sinks)
        if self._journal.log is not None and (last := self._journal.log.last_step()) is not None:
            self.step = last + 1
        if self._probe.sharded:
            self.step = sharding.from_first_rank(self.step)
        self._write_header()

    def __repr__(self) -> str:
        made, rule = f"{self.step} steps", type(self.optimizer).__name__
        return f"Ledger({made} of {rule}, families {', '.join(self.index.families) or 'none'}, every={self.every})"

    def _set_symmetries(self, syms: SymmetrySet) -> None:
        watched: list[Watched] = [*syms, *(WatchedTranslation(t) for t in syms.translations if self._translations)]
        named = parameters_of(self.model, self.optimizer, [n for item in watched for n in item.parameters])
        shapes = {n: tuple(t.shape) for n, t in named.items()}
        self.layout = ChargeMap.of(watched, shapes, self.detail)
        self.index = Index.of(self.layout)
        self._probe = StepMeter(self.layout, self.rule, self.optimizer, {n: named[n] for n in self.layout.parameters})
        blocks = ChargeMap.of(tuple(syms), shapes, "block")
        self.estimator = Estimator(blocks, self.rule) if self.estimate_every else None

    def replace_symmetries(self, syms: SymmetrySet) -> None:
        """Go on with another set of symmetries, after layers were added or removed. Earlier rows stay in the log.

        Raises DataError between `before_step` and `after_step`.
        """
        if self._open is not None:
            raise DataError("replace_symmetries() in the middle of a step; call it after after_step()")
        self.flush()
        self._history.pages.clear()
        self._estimates.clear()
        self._set_symmetries(syms)
        self._write_header()
        self._event("symmetries replaced", parameters=len(self.layout.parameters))

    # -- measuring ----------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Measure what the gradients and the optimiser's state say about the step to come.

        A second call before `after_step` means that the optimiser's step did not happen; it is logged as skipped.
        """
        self._before_step()
        self._read_gradients()

    def _before_step(self) -> None:
        if self._open is not None:
            self._event("skipped")
        self._open = _Open()
        if self.step % self.every == 0:
            self._open.measurement = m = self._probe.before(self.step)
            if self.every == 1 and self._journal.begins("edited", m.edited):
                self._event("edited", note="parameters changed between steps, outside the optimiser")

    def _read_gradients(self) -> None:
        due = self.estimator is not None and (self.step // self.every) % self.estimate_every == 0
        if due and self.estimator is not None and self._open is not None and self._open.measurement is not None:
            self._open.measurement.blocks = self._probe.gradients(self.estimator.layout)

    def after_step(self, loss: Any = None) -> None:
        """Measure the charges after the step and enter it in the books. `loss` (a number or tensor) is logged along.

        When the optimiser made no step in between (gradient scaler): an event, no row.
        Raises DataError without a `before_step`.
        """
        if self._open is None:
            raise DataError(
                "after_step() without before_step(); call before_step() between backward and optimizer.step()"
            )
        now, self._open = self._open, None
        if not now.stepped or (now.found_inf is not None and float(now.found_inf) > 0):
            self._event("skipped")
            return
        if now.measurement is not None:
            self._probe.after(now.measurement)
            if self.every > 1:
                self._probe.forget()
            if loss is not None:
                self.note(loss)
            now.measurement.loss = self._loss
            self._pending.append(now.measurement)
        self._loss = None
        self.step += 1
        if len(self._pending) >= self.flush_every:
            self.flush()

    def note(self, loss: Any) -> None:
        """Keep the loss of the step under way, for `after_step` calls made by hooks."""
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss

    # -- books --------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Close the books on the steps measured so far: one transfer from the device, one write to the log.

        Under `fully_shard` every process must call it, as `records`, `estimates`, `state_dict` and `close`, which do.
        """
        pending, self._pending = self._pending, []
        if pending:
            self._close_books(pending)
        now = dict(named_tensors(self.model))
        replaced = [n for n, p in self._probe.watched.items() if now.get(n) is not p]
        if self._journal.begins("replaced", bool(replaced)):
            note = "the model has other parameters of these names; replace_symmetries() watches them"
            self._journal.event("replaced", self.step, parameters=replaced[:8], note=note)
        self._journal.write()

    def _close_books(self, pending: list[Measurement]) -> None:
        values = self._probe.gathered([m.values for m in pending])
        books = close_books(self.rule, self.layout, values, [m.settings for m in pending])
        symmetry = books.mapped(self.index.to_symmetry)
        levels: dict[Level, Columns] = {"family": books.mapped(self.index.to_family), "symmetry": symmetry}
        levels["coordinate"] = books
        tables = {level: levels[level] for level in LEVELS[: LEVELS.index(self.detail) + 1]}
        self._history.add(Page(np.array([m.step for m in pending]), np.array([m.lr for m in pending]), tables))
        finite = np.isfinite(books.table).all(axis=(0, 2))
        unexplained = levels["family"].unexplained() > UNEXPLAINED
        journal = self._journal
        listed = {level: columns.listed() for level, columns in tables.items()} if journal.log is not None else {}
        for t, m in enumerate(pending):
            row = _row_of(m)
            line = plain(row) | {level: rows[t] for level, rows in listed.items()}
            if journal.sinks:
                row |= {level: table.row(t) for level, table in tables.items()}
            journal.emit(row, line)
            if "gradient_square" in m.blocks and finite[t]:
                self._estimate(m, symmetry.row(t))
            if journal.begins("non-finite", not finite[t]):
                journal.event("non-finite", m.step)
            if journal.begins("unexplained", bool(unexplained[t])):
                note = "the entries do not add up to the change: something else wrote to the weights within the step"
                journal.event("unexplained", m.step, note=note)

    def _estimate(self, m: Measurement, row: dict[str, np.ndarray]) -> None:
        assert self.estimator is not None
        blocks = self.estimator.layout
        sizes = list(blocks.sizes.values())
        nothing: list[Value] = [0.0] * len(sizes)
        names = [f.name for f in fields(LegSquares)]
        table = tabulate([[m.blocks.get(name, nothing)[: len(sizes)]] for name in names], sizes)[:, 0]
        settings = settings_arrays(self.rule, blocks, [m.settings]).at(0)
        n = len(blocks.symmetries)
        columns = self.estimator.rows(m.step, LegSquares(*table), settings, row["second_order"][:n])
        shifts = np.full(len(self.layout.symmetries) - n, np.nan)
        columns = {k: np.concatenate([v, shifts]) for k, v in columns.items()}
        columns |= rotation_rows(self.layout, self.rule, row, m.settings)
        out = {"kind": "estimates", "step": m.step, "symmetry": columns}
        self._estimates.append(out)
        self._journal.emit(out)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened besides steps: skipped and non-finite steps, edits, resumptions."""
        return self._journal.events

    def _event(self, what: str, **details: Any) -> None:
        self.flush()
        self._journal.event(what, self.step, **details)

    def _write_header(self) -> None:
        header = {
            "kind": "run",
            "format": FORMAT,
            "step": self.step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "optimizer": type(self.optimizer).__name__,
            "rule": type(self.rule).__name__,
            "equilibrium": self.rule.has_equilibrium,
            "effective_lr": self.rule.effective_lr_words,
            "every": self.every,
            "detail": self.detail,
        }
        names = {"families": self.index.families, "symmetries": self.index.symmetries}
        self._journal.header(header | self.index.header(self.layout), names)
        self._journal.write()

    def records(self, by: Level = "family") -> list[dict[str, Any]]:
        """One row per recorded step and family (or symmetry, or coordinate): `FIELDS`, step, lr, names.

        `charge` is before the step, `change` the measured change, `residual = change - sum of entries`, `norm` is
        `theta^T |A| theta`. Raises DataError when `by` is finer than the ledger's `detail`.
        """
        if LEVELS.index(by) > LEVELS.index(self.detail):
            raise DataError(f"this ledger keeps detail={self.detail!r}; rows by {by!r} need Ledger(..., detail={by!r})")
        self.flush()
        labels = self.index.labels(self.layout, by)
        return [
            {"step": step, **label, "lr": lr} | {f: float(row[f][i]) for f in FIELDS}
            for step, lr, row in self._history.rows(by)
            for i, label in enumerate(labels)
        ]

    def estimates(self) -> list[dict[str, Any]]:
        """One row per estimated step and symmetry: see `Estimator.rows` and `rotation_rows`."""
        self.flush()
        labels = self.index.labels(self.layout, "symmetry")
        return [
            {"step": e["step"], **label} | {k: float(v[i]) for k, v in e["symmetry"].items()}
            for e in self._estimates
            for i, label in enumerate(labels)
        ]

    # -- state and hooks ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; everything up to here is on disk when this returns.

        Raises OSError when the log cannot be written.
        """
        self.flush()
        mark = self._journal.mark(self.step)
        estimates = {} if self.estimator is None else self.estimator.state_dict()
        own = {"format": FORMAT, "step": self.step, "mark": mark, "symmetries": self.index.symmetries}
        return own | {"estimates": estimates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint. What was logged after it is dropped: these steps will be made again.

        Raises DataError when the log does not hold the checkpoint (steps would be missing), the ledger watches other
        symmetries, or the format is another.
        """
        if state.get("format") != FORMAT:
            raise DataError(f"ledger state has format {state.get('format')!r}, this version reads {FORMAT}")
        if tuple(state["symmetries"]) != self.index.symmetries:
            raise DataError(
                f"the ledger state is of {len(state['symmetries'])} symmetries {list(state['symmetries'])[:3]}, this "
                f"ledger watches {len(self.index.symmetries)} {list(self.index.symmetries)[:3]}"
            )
        dropped = self._journal.rewind(state["mark"], int(state["step"]))
        self._pending, self._open = [], None
        self._probe.forget()
        self.step = int(state["step"])
        if self.estimator is not None:
            self.estimator.load_state_dict(state.get("estimates", {}))
        self._history.rewind(self.step)
        kept = [row for row in self._estimates if row["step"] < self.step]
        self._estimates.clear()
        self._estimates.extend(kept)
        if self._journal.log is not None:
            self._write_header()
            self._event("resumed", dropped=dropped)

    def attach(self) -> Ledger:
        """Run before and after every `optimizer.step` by its hooks, also inside a closure passed to it.

        Raises DataError after `close()`.
        """
        if self._closed:
            raise DataError("this ledger is closed; make a new one (with the same run_dir it continues the log)")
        if len(self._handles) == 1:
            self._handles += [
                self.optimizer.register_step_pre_hook(self._pre_hook),
                self.optimizer.register_step_post_hook(lambda *_: self.after_step()),
            ]
        return self

    def _stepped(self, *_: Any) -> None:
        """The optimiser's step ran; `found_inf` says whether a fused one left the weights alone."""
        if self._open is not None:
            self._open.stepped = True
            self._open.found_inf = getattr(self.optimizer, "found_inf", None)

    def _pre_hook(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A closure makes the gradients within the step; a rule that needs no gradients measures before it moves."""
        early = self.rule.keeps_copy
        watched = watch_closure(args, kwargs, self._read_gradients if early else self.before_step)
        if early or watched is None:
            self._before_step()
        if watched is None:
            self._read_gradients()
        return watched

    def detach(self) -> None:
        """Stop watching; `attach()` starts again."""
        for handle in self._handles[1:]:
            handle.remove()
        del self._handles[1:]
        self._probe.forget()

    def close(self) -> None:
        """Detach, flush and close the log and the sinks; `records()` and `estimates()` stay readable.

        Raises OSError when the last rows cannot be written.
        """
        self.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._closed = True
        self.flush()
        self._journal.close()

    def __enter__(self) -> Ledger:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._probe.sharded:
            self._pending = []  # the other processes may not come here, and the books are closed together
        self.close()


def _row_of(m: Measurement) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": "step", "step": m.step, "lr": m.lr}
    return row if m.loss is None else {**row, "loss": float(m.loss)}
