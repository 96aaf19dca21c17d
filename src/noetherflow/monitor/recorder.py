"""Measures the optimiser's steps, keeps the measurements until the books are closed, and hands the rows on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.interrupts import uninterrupted
from noetherflow.core.printing import count
from noetherflow.core.ranks import SAME_SYMMETRIES, refuse_other, told_by_all
from noetherflow.core.tensors import named_tensors
from noetherflow.errors import DataError
from noetherflow.monitor.bookkeeper import Bookkeeper
from noetherflow.monitor.books import Level
from noetherflow.monitor.charge_map import ChargeMap, Watched, WatchedTranslation
from noetherflow.monitor.estimates import Estimator
from noetherflow.monitor.journal import Journal, Sink
from noetherflow.monitor.layers import LayerProbe
from noetherflow.monitor.log import FORMAT
from noetherflow.monitor.measure import Measurement, StepMeter, StepTable, one_number
from noetherflow.monitor.noted import NotedLosses, NotedRates
from noetherflow.monitor.pace import DeviceClock, Pace
from noetherflow.monitor.rule import AnyRule
from noetherflow.monitor.watching import group_settings, parameters_of
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(frozen=True)
class Place:
    """Where rows and events go; the fields are `Ledger`'s arguments."""

    run_dir: str | Path | None
    sinks: Iterable[Sink]
    resume: bool | None


@dataclass(frozen=True)
class Recording:
    """What a recorder keeps of every step, and how often it writes; most fields are `Ledger`'s arguments."""

    optimizer_name: str
    rule: AnyRule
    detail: Level
    translations: bool
    capacity: int
    estimate_every: int
    flush_every: int
    notes: Mapping[str, Any]
    place: Place


@dataclass
class _Open:
    """What is known of a step between `before` and `after`; `written` counts writes to the weights so far,
    `rate` is its learning rate, NaN where only a device knows it.
    """

    written: int
    rate: float
    measurement: Measurement | None = None
    stepped: bool = False
    found_inf: Any = None


class StepRecorder:
    """Takes one step after the other: `before`, the optimiser's step, `after`; `flush` closes the books on them.

    `step` numbers the step to come. `Ledger` calls this by hand or through the optimiser's hooks.

    Args:
        model: its parameters are only read.
        optimizer: the optimiser, or several as one, whose steps are recorded.
        syms: the symmetries whose charges are measured.
        how: what is kept of every step, and where rows and events go.
        pace: which steps are recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        syms: SymmetrySet,
        how: Recording,
        pace: Pace,
    ) -> None:
        self.model, self.optimizer, self.how, self.pace = model, optimizer, how, pace
        self.step = 0
        self._pending: list[Measurement] = []
        self._open: _Open | None = None
        self._loss: float | Tensor | None = None
        self._losses: list[float | Tensor] = []
        self._losses_at: list[int] = []
        self._rates: list[float] = []
        self._latest: StepTable | None = None
        self._left_at = 0
        self.watch(syms)
        self.journal = Journal(how.place.run_dir, how.place.sinks, how.place.resume)

    def watch(self, syms: SymmetrySet) -> None:
        """Watch these symmetries from the next step on. Raises DataError between `before` and `after`."""
        if self._open is not None:
            raise DataError("replace_symmetries() in the middle of a step; call it after after_step()")
        syms = syms.without_offsets("the ledger splits updates along the weight itself")
        self.excluded = syms.excluded
        watched: list[Watched] = [*syms, *(WatchedTranslation(t) for t in syms.translations if self.how.translations)]
        named = parameters_of(self.model, self.optimizer, [n for item in watched for n in item.parameters], syms.shapes)
        shapes = {n: tuple(t.shape) for n, t in named.items()}
        layout = ChargeMap.of(watched, shapes, self.how.detail)
        rule, self._latest = self.how.rule, None
        self.meter = StepMeter(layout, rule, self.optimizer, {n: named[n] for n in layout.parameters})
        self._refuse_other_ranks(watched)
        blocks = ChargeMap.of(tuple(syms), shapes, "block")
        estimator = Estimator(blocks, rule) if self.how.estimate_every else None
        device = next((p.device for p in self.meter.watched.values()), torch.device("cpu"))
        self._clock, self._estimate_clock = DeviceClock(device), DeviceClock(device)
        self._probe = LayerProbe(self.model, self.optimizer)
        self.books = Bookkeeper(
            rule, layout, estimator, self.how.detail, self.how.capacity, self.meter.rounding, self._probe.layers
        )

    def _refuse_other_ranks(self, watched: Sequence[Watched]) -> None:
        """Raises RankError where processes that close their books together watch other symmetries, or otherwise."""
        if not self.meter.sharded:
            return
        how = self.how
        held = {item.name: item.fingerprint() for item in watched}
        paces = how.flush_every, how.estimate_every, self.pace.every, self.pace.fixed
        held["settings"] = f"{how.detail} {paces} {type(how.rule).__name__}"
        refuse_other(held, self.meter.ranks, "symmetries or settings in their ledgers", SAME_SYMMETRIES)

    def whole(self) -> AbstractContextManager[None]:
        """For work that Ctrl-C must not cut in two; but sharded processes wait for each other in it."""
        return nullcontext() if self.meter.sharded else uninterrupted()

    # -- one step -----------------------------------------------------------------------------------------------------

    def before(self) -> None:
        """The step begins: measure what is known before the gradients are, if this step is one to record."""
        self.finish_step()
        start = perf_counter()
        with self.whole():
            if self._open is not None:
                self.event("skipped")
            self._open = _Open(self._written(), self._rate())
            if self.step % self.pace.every == 0:
                self._clock.start()
                self._open.measurement = m = self.meter.before(self.step)
                self._clock.stop()
                if self.pace.every == 1 and self.journal.begins("edited", m.edited):
                    self.event("edited", note="parameters changed between steps, outside the optimiser")
        self.pace.worked(start)

    def read_gradients(self) -> None:
        """The gradients are final: read from them what the live estimates need, where these are due."""
        start = perf_counter()
        estimator, now = self.books.estimator, self._open.measurement if self._open else None
        if estimator is None or now is None or not self.pace.estimates(self.step):
            return
        with self.whole():
            layout = estimator.layout
            self._estimate_clock.start()
            now.blocks = self.meter.gradients(layout)
            self._read_state(now, layout)
            now.layers = self._probe.read(self.step) if self._probe.layers else None
            self._estimate_clock.stop()
        self.pace.estimated(start)

    def _read_state(self, now: Measurement, layout: ChargeMap) -> None:
        """What an estimate takes from the optimiser's state and from matrix charges."""
        if self.how.rule.keeps_squares:
            now.roots = self.meter.roots(layout, now.settings)
        now.matrix_charges = self.meter.matrix_charges(layout.symmetries)

    def stepped(self, *_: Any) -> None:
        """The optimiser's step ran; `found_inf` says whether a fused one left the weights alone."""
        if self._open is not None:
            self._open.stepped = True
            self._open.found_inf = getattr(self.optimizer, "found_inf", None)

    def after(self, loss: Any = None) -> None:
        """The step is over: measure the charges. Raises DataError without `before`."""
        if self._open is None:
            raise DataError(
                "after_step() without before_step(); call before_step() between backward and optimizer.step()"
            )
        if loss is not None:
            self.note(loss)
        now = self._open
        if not now.stepped or (now.found_inf is not None and float(now.found_inf) > 0):
            self._open = None
            self.event("skipped")
            return
        start = perf_counter()
        with self.whole():
            self._enter(now)
            if len(self._pending) >= self.how.flush_every:
                self.flush()
            self.pace.worked(start)
            self.pace.stepped(now.measurement is not None)
            if self.pace.due:
                self._choose_stride()

    def _choose_stride(self) -> None:
        """Keep to the budget: the books are closed, then the clock says how often the steps to come are recorded."""
        start = perf_counter()
        self.flush()
        self.pace.booked(start)
        chosen = self.pace.choose()
        if self.meter.sharded:
            chosen = told_by_all(chosen, self.meter.ranks)[0]
        if chosen != self.pace.every:
            self.pace.every = chosen
            self.meter.forget()
            note = f"every {chosen} steps are recorded now, to stay within overhead={self.pace.overhead:g}"
            self.event("stride", every=chosen, note=note)

    def _enter(self, now: _Open) -> None:
        """Count a step that is made, measure it, and have its measurement wait for the books."""
        self._keep_loss()
        self._rates.append(now.rate)
        if now.measurement is not None:
            self._clock.start()
            self.meter.after(now.measurement)
            self._clock.stop()
            if self.pace.every > 1:
                self.meter.forget()
            now.measurement.loss, now.measurement.losses = self._loss, self._losses
            now.measurement.losses_at, now.measurement.rates = self._losses_at, self._rates
            self._losses, self._losses_at, self._rates = [], [], []
            self._pending.append(now.measurement)
            self._latest = now.measurement.settings
        self._open, self._loss = None, None
        self.step += 1
        self._left_at = self._written()

    def finish_step(self) -> None:
        """Measure a step that was made, when something interrupted the ledger after it or before it could take note."""
        if self._open is not None and not self._open.stepped and self._written() != self._open.written:
            self.stepped()
        if self._open is not None and self._open.stepped:
            self.after()

    def _written(self) -> int:
        """How often the watched weights were written in place; 0 where they are sharded and not to be interrupted."""
        return 0 if self.meter.sharded else sum(p._version for p in self.meter.watched.values())

    def _rate(self) -> float:
        """The learning rate of the first group, NaN where reading it would wait for a device."""
        rate = self.optimizer.param_groups[0].get("lr", math.nan)
        return math.nan if isinstance(rate, Tensor) and rate.device.type != "cpu" else float(rate)

    def note(self, loss: Any) -> None:
        """Keep the loss of the step under way; one noted before without a step, as where it was NaN and the step left
        out, is kept beside. Raises DataError when it is not one number.
        """
        noted = one_number(loss)
        self._keep_loss()
        self._loss = noted

    def _keep_loss(self) -> None:
        """Put the loss noted last, if any, to those of the steps since the last recorded one."""
        if self._loss is not None:
            self._losses.append(self._loss)
            self._losses_at.append(self.step)

    # -- books --------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Close the books on the steps measured so far: one transfer from the device, one write to the log."""
        with self.whole():
            if self.meter.sharded:
                steps = {f"step {m.step}": "recorded" for m in self._pending}
                refuse_other(
                    steps, self.meter.ranks, "steps to enter in the books", "call flush() on all ranks together"
                )
            if pending := list(self._pending):
                values = self.meter.gathered([m.values for m in pending])
                self.pace.worked_on_device(self._clock.seconds(), self._estimate_clock.seconds())
                self.books.enter(pending, values, self.journal)
                del self._pending[: len(pending)]
        now = dict(named_tensors(self.model))
        replaced = [n for n, p in self.meter.watched.items() if now.get(n) is not p]
        if self.journal.begins("replaced", bool(replaced)):
            note = "the model has other parameters of these names; replace_symmetries() watches them"
            self.journal.event("replaced", self.step, parameters=replaced[:8], note=note)
        self.journal.write()

    def end(self) -> None:
        """The ledger is closed: estimate once more where the last estimate is older, and note how many steps were made.

        Weights that somebody wrote to after the last step (the best checkpoint loaded, an average swapped in) are not
        what the run led to, and are not estimated.
        """
        estimator, latest, last = self.books.estimator, self._latest, self.books.last_estimate
        newer = last is None or self.step > last + 1
        if estimator is not None and latest is not None and newer and self._written() == self._left_at:
            settings, weights = self.meter.settings_at_end(latest), self.meter.weights(estimator.layout)
            now = Measurement(self.step, math.nan, settings, blocks=weights)
            self._read_state(now, estimator.layout)
            self.books.estimate_end(now, self._probe.weights(), self.journal)
        self.journal.end(self.step, self.losses_since, self.rates_since)

    @property
    def losses_since(self) -> NotedLosses | None:
        """The losses noted since the last recorded step; None without any."""
        return NotedLosses.of(self._losses, self._losses_at) if self._losses else None

    @property
    def rates_since(self) -> NotedRates | None:
        """The learning rates of the steps since the last recorded one; None without any."""
        return NotedRates.of(self._rates, self.step - 1) if self._rates else None

    def bring_up_to_date(self) -> None:
        """Close the books before they are read, which one of several sharded processes cannot do alone.

        Raises DataError where recorded steps of a sharded model wait for all processes.
        """
        if not self.meter.sharded:
            self.flush()
        elif self._pending:
            raise DataError(
                f"{count(len(self._pending), 'recorded step waits', 'recorded steps wait')} for the other ranks, which "
                "hold shards of the weights: call flush() on every rank, then read on any of them"
            )

    def event(self, what: str, **details: Any) -> None:
        """Enter an event: after the rows of the steps before it, but at once where these wait for other processes."""
        if not self.meter.sharded:
            self.flush()
        self.journal.event(what, self.step, **details)

    def forget(self) -> None:
        """Drop what is measured and not in the books: after a crash, or when the run goes on from elsewhere."""
        self._pending, self._open = [], None
        self._losses, self._losses_at, self._rates = [], [], []

    @property
    def momentum(self) -> float:
        """The momentum of the first group, 0 where the optimiser has none."""
        return float(self.optimizer.param_groups[0].get("momentum", 0.0))

    def header(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a part of the log from `step` on begins with, its charges and the optimiser's settings; and the names of
        the rows' columns for the sinks.
        """
        header, names = self.books.header(step, self.how.optimizer_name, self.pace.every)
        own = {
            "overhead": None if self.pace.fixed else self.pace.overhead,
            "excluded": self.excluded,
            "momentum": self.momentum,
            **group_settings(self.optimizer),
            **self.how.notes,
        }
        return header | own, names

    def write_header(self) -> None:
        """Begin a part of the log."""
        self.journal.header(*self.header(self.step))
        self.journal.write()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs; everything up to here is on disk when this returns."""
        self.bring_up_to_date()
        estimator = self.books.estimator
        return {
            "format": FORMAT,
            "step": self.step,
            "mark": self.journal.mark(self.step),
            "symmetries": self.books.index.symmetries,
            "every": self.pace.every,
            "estimates": {} if estimator is None else estimator.state_dict(),
            "layers": {"averages": self.books.layer_book.state_dict(), "empty_at": self._probe.empty_at},
        }

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state; later log lines are dropped. Raises DataError as `Ledger` says."""
        if state.get("format") != FORMAT:
            raise DataError(f"ledger state has format {state.get('format')!r}, this version reads {FORMAT}")
        theirs, ours = tuple(state["symmetries"]), self.books.index.symmetries
        if theirs != ours:
            raise DataError(
                f"the ledger state is of {len(theirs)} symmetries {list(theirs)[:3]}, this ledger watches {len(ours)} "
                f"{list(ours)[:3]}"
            )
        dropped = self.journal.rewind(state["mark"], int(state["step"]))
        self.forget()
        self.meter.forget()
        self.pace.pause()
        if not self.pace.fixed:
            self.pace.every = int(state.get("every", 1))
        self.step = int(state["step"])
        if self.books.estimator is not None:
            self.books.estimator.load_state_dict(state.get("estimates", {}))
        layers = state.get("layers", {})
        self.books.layer_book.load_state_dict(layers.get("averages", {}))
        self._probe.empty_at = layers.get("empty_at")
        self.books.rewind(self.step)
        if self.journal.log is not None:
            self.write_header()
            self.event("resumed", dropped=dropped)
