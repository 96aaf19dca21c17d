"""The ledger: every step's change of every charge, split into its causes, at the cost of a few dot products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import noetherflow as nf
from noetherflow.core.printing import count, show, table
from noetherflow.core.shown import Shown
from noetherflow.core.tensors import named_tensors
from noetherflow.core.unwrap import unwrap_optimizer
from noetherflow.errors import DataError
from noetherflow.monitor import sharding
from noetherflow.monitor.bookkeeper import Bookkeeper
from noetherflow.monitor.books import (
    LEVELS,
    Level,
)
from noetherflow.monitor.charge_map import ChargeMap, Watched, WatchedTranslation
from noetherflow.monitor.estimates import Estimator
from noetherflow.monitor.interrupts import uninterrupted
from noetherflow.monitor.joint import JointOptimizer, JointRule, as_one
from noetherflow.monitor.journal import Journal, Sink
from noetherflow.monitor.log import FORMAT
from noetherflow.monitor.measure import Measurement, StepMeter, one_number
from noetherflow.monitor.pace import DeviceClock, Pace
from noetherflow.monitor.rule import AnyRule, LedgerRule
from noetherflow.monitor.rules import rule_for
from noetherflow.monitor.rundata import RunData
from noetherflow.monitor.watching import WeightStamps, group_settings, parameters_of, untraced, watch_closure
from noetherflow.symmetry.symmetry_set import SymmetrySet

if TYPE_CHECKING:
    from noetherflow import Diagnosis


@dataclass
class _Open:
    """What is known of a step between `before_step` and `after_step`; `written` counts writes to the weights so far."""

    written: int
    measurement: Measurement | None = None
    stepped: bool = False
    found_inf: Any = None


class Ledger(Shown):
    """`C' - C = gradient + momentum + decay + preconditioner + second_order`, per symmetry and step (theory.md 3).

    Call `before_step()` when the gradients are final (unscaled, clipped) and `after_step()` after `optimizer.step()`;
    or let `attach()` (also `with ledger:`) do so through the optimiser's step hooks.

    `docs/ledger.md` explains the entries, and what costs how much.

    Args:
        model: the model, wrapped or not.
        optimizer: the optimiser of its parameters; accelerate's and Lightning's are looked into. A list of several
            (Muon for matrices, AdamW for the rest) that step once each is watched as one.
        syms: the symmetries to watch.
        every: every how manieth step is recorded; steps in between cost next to nothing. None chooses it by `overhead`.
        detail: `family` and `symmetry` need totals only, one dot product per parameter and term; `coordinate` keeps
            every charge (matrices for general_linear).
        run_dir: where the append-only log `ledger.jsonl` is kept; None for none.
        capacity: recorded steps kept in memory for `records()`; the log keeps all.
        translations: watch these too, each by the square of its linear charge; one projection per tensor read.
        estimate_every: recorded steps between the live estimates (`estimates()`), 0 for none.
        flush_every: recorded steps between writes to the log.
        sinks: called with every logged row (TensorBoard, W&B, MLflow, CSV: see `monitor.sinks`).
        resume: what to do with an earlier run's log in `run_dir`: True goes on after its last step, False keeps it
            beside and begins a new one. With None the first step is refused, unless `load_state_dict` has said where
            to go on.
        overhead: the share of the training's time that the ledger may take. It records the first 50 steps, times itself
            and them, and chooses its stride, again after every 20 recorded ones; an event and the log's header tell it.
        rule: how the optimiser's update splits into causes; None takes the one registered for its class
            (`noetherflow.extend.ledger_rule`).
        notes: what the log's header should say besides the optimiser's settings, such as
            `{"schedule": "cosine", "clipping": 1.0}`; the adapters for Lightning and the Trainer fill it in. There are
            many parameters because each is one line of a training script; all but the first three can be left out.

    Raises:
        DeclarationError: a symmetry names a parameter that the model does not have.
        DataError: bad settings, an optimiser of another model, or another ledger writing to `run_dir`.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> syms = nf.find_symmetries(model, torch.randn(2, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with nf.Ledger(model, optimizer, syms) as ledger:
        ...     model(torch.randn(8, 3)).square().mean().backward()
        ...     optimizer.step()
        >>> row = ledger.records()[0]
        >>> row["family"], abs(row["residual"]) < 1e-5
        ('rescaling', True)

    Source: theory.md section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        syms: SymmetrySet,
        *,
        every: int | None = None,
        detail: Level = "family",
        run_dir: str | Path | None = None,
        capacity: int = 500,
        translations: bool = False,
        estimate_every: int = 50,
        flush_every: int = 50,
        sinks: Iterable[Sink] = (),
        resume: bool | None = None,
        overhead: float = 0.02,
        rule: AnyRule | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        if flush_every < 1 or estimate_every < 0:
            raise DataError(f"flush_every={flush_every} must be >= 1, estimate_every={estimate_every} >= 0")
        if detail not in LEVELS:
            raise DataError(f"detail must be one of {LEVELS}, got {detail!r}")
        if not (rule is None or isinstance(rule, LedgerRule)):
            raise DataError(f"rule must be an instance of noetherflow.extend.LedgerRule, got {rule!r}")
        self.model, self.optimizer = model, as_one(optimizer, unwrap_optimizer)
        self.detail, self.estimate_every, self.flush_every = detail, estimate_every, flush_every
        self._pace = Pace(every, overhead)
        joint = isinstance(self.optimizer, JointOptimizer)
        self._name = self.optimizer.name if joint else type(self.optimizer).__name__
        self.rule: AnyRule = rule or (JointRule() if joint else rule_for(self.optimizer))
        self._translations, self._capacity, self._notes = translations, capacity, dict(notes or {})
        self._pending: list[Measurement] = []
        self._open: _Open | None = None
        self._loss: Any = None
        self._stamps: WeightStamps | None = None
        self._attached = -1
        self._closed = False
        self._set_symmetries(syms)
        self._journal = Journal(run_dir, sinks, resume)
        self._begin(resume)
        self._handles: list[Any] = [self.optimizer.register_step_post_hook(untraced(self._stepped))]

    def table_rows(self) -> list[dict[str, Any]]:
        """`records()`."""
        return self.records()

    def describe(self, *, verbose: bool = False, legend: bool = True) -> str:
        """How many steps are recorded, and each family's charge now; `verbose`: all events; see `Shown.describe`."""
        rows = self.records()
        made = f"{count(self.step, 'step', 'steps')} of {self._name}"
        lines = [f"ledger of {made}, {count(len(rows), 'row', 'rows')} in memory"]
        latest = {row["family"]: row for row in rows}
        shown = ("charge", "change", "residual", "norm")
        lines += [table([{"family": f, **{k: r[k] for k in shown}} for f, r in latest.items()])] if rows else []
        told = self.events if verbose else self.events[-3:]
        lines += [f"step {show(event['step'])}: {event['event']}" for event in told]
        return "\n".join(lines)

    def _begin(self, resume: bool | None) -> None:
        """Number the step to come: one after the last in the log, if that is the same run."""
        log = self._journal.log
        last = None if log is None else log.last_step()
        begun = -1 if last is None else last
        if self._meter.sharded:
            begun = sharding.from_first_rank(begun)
        self.step = begun + 1
        self._undecided = resume is None and begun >= 0
        if not self._undecided:
            self._write_header()

    def _set_symmetries(self, syms: SymmetrySet) -> None:
        syms = syms.without_offsets("the ledger splits updates along the weight itself")
        self.excluded = syms.excluded
        watched: list[Watched] = [*syms, *(WatchedTranslation(t) for t in syms.translations if self._translations)]
        named = parameters_of(self.model, self.optimizer, [n for item in watched for n in item.parameters], syms.shapes)
        shapes = {n: tuple(t.shape) for n, t in named.items()}
        layout = ChargeMap.of(watched, shapes, self.detail)
        self._meter = StepMeter(layout, self.rule, self.optimizer, {n: named[n] for n in layout.parameters})
        blocks = ChargeMap.of(tuple(syms), shapes, "block")
        estimator = Estimator(blocks, self.rule) if self.estimate_every else None
        rounding = self._meter.rounding
        self._clock = DeviceClock(next((p.device for p in self._meter.watched.values()), torch.device("cpu")))
        self._books = Bookkeeper(self.rule, layout, estimator, self.detail, self._capacity, rounding)

    @property
    def every(self) -> int:
        """Every how manieth step is recorded now."""
        return self._pace.every

    @property
    def estimator(self) -> Estimator | None:
        """The live estimates' running averages; None with `estimate_every=0`."""
        return self._books.estimator

    def replace_symmetries(self, syms: SymmetrySet) -> None:
        """Go on with another set of symmetries, after layers were added or removed. Earlier rows stay in the log.

        Raises DataError between `before_step` and `after_step`.
        """
        if self._open is not None:
            raise DataError("replace_symmetries() in the middle of a step; call it after after_step()")
        self.flush()
        self._set_symmetries(syms)
        self._write_header()
        self._event("symmetries replaced", parameters=len(self._books.layout.parameters))

    # -- measuring ----------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Measure what the gradients and the optimiser's state say about the step to come.

        A second call before `after_step` means that the optimiser's step did not happen; it is logged as skipped.
        Raises DataError when `run_dir` holds an earlier run, and nobody said what to do with it.
        """
        self._before_step()
        self._read_gradients()

    def _whole(self) -> AbstractContextManager[None]:
        """For work that Ctrl-C must not cut in two; but sharded processes wait for each other in it."""
        return nullcontext() if self._meter.sharded else uninterrupted()

    def _before_step(self) -> None:
        if self._undecided:
            raise DataError(
                f"the run_dir holds an earlier run, up to step {self.step - 1}: give Ledger another run_dir, or "
                "resume=True to go on with that run, or resume=False to keep its log beside and begin a new one"
            )
        self._finish_step()
        start = perf_counter()
        with self._whole():
            if self._open is not None:
                self._event("skipped")
            self._open = _Open(self._written())
            if self.step % self.every == 0:
                self._clock.start()
                self._open.measurement = m = self._meter.before(self.step)
                self._clock.stop()
                if self.every == 1 and self._journal.begins("edited", m.edited):
                    self._event("edited", note="parameters changed between steps, outside the optimiser")
        self._pace.worked(start)

    def _read_gradients(self) -> None:
        start = perf_counter()
        due = self.estimator is not None and (self.step // self.every) % self.estimate_every == 0
        if due and self.estimator is not None and self._open is not None and self._open.measurement is not None:
            with self._whole():
                now, layout = self._open.measurement, self.estimator.layout
                now.blocks = self._meter.gradients(layout)
                if self.rule.keeps_squares:
                    now.roots = self._meter.roots(layout, now.settings)
                now.matrix_charges = self._meter.matrix_charges(layout.symmetries)
            self._pace.worked(start)

    def after_step(self, loss: Any = None) -> None:
        """Measure the charges after the step and enter it in the books; `loss` is logged along.

        When the optimiser made no step in between (gradient scaler): an event, no row.
        Raises DataError without a `before_step`.
        """
        if self._open is None:
            raise DataError(
                "after_step() without before_step(); call before_step() between backward and optimizer.step()"
            )
        if loss is not None:
            self.note(loss)
        now = self._open
        if not now.stepped or (now.found_inf is not None and float(now.found_inf) > 0):
            self._open = None
            self._event("skipped")
            return
        start = perf_counter()
        with self._whole():
            self._enter(now)
            if len(self._pending) >= self.flush_every:
                self.flush()
            self._pace.worked(start)
            self._pace.stepped(now.measurement is not None)
            if self._pace.due:
                self._choose_stride()

    def _choose_stride(self) -> None:
        """Keep to the budget: the books are closed, then the clock says how often the steps to come are recorded."""
        self.flush()
        chosen = self._pace.choose()
        if self._meter.sharded:
            chosen = sharding.from_first_rank(chosen)
        if chosen != self.every:
            self._pace.every = chosen
            self._meter.forget()
            note = f"every {chosen} steps are recorded now, to stay within overhead={self._pace.overhead:g}"
            self._event("stride", every=chosen, note=note)

    def _enter(self, now: _Open) -> None:
        """Count a step that is made, measure it, and have its measurement wait for the books."""
        if now.measurement is not None:
            self._clock.start()
            self._meter.after(now.measurement)
            self._clock.stop()
            if self.every > 1:
                self._meter.forget()
            now.measurement.loss = self._loss
            self._pending.append(now.measurement)
        self._open, self._loss = None, None
        self.step += 1

    def _finish_step(self) -> None:
        """Measure a step that was made, when something interrupted the ledger after it or before it could take note."""
        if self._open is not None and not self._open.stepped and self._written() != self._open.written:
            self._stepped()
        if self._open is not None and self._open.stepped:
            self.after_step()

    def _written(self) -> int:
        """How often the watched weights were written in place; 0 where they are sharded and not to be interrupted."""
        return 0 if self._meter.sharded else sum(p._version for p in self._meter.watched.values())

    def note(self, loss: Any) -> None:
        """Keep the loss of the step under way. Raises DataError when it is not one number."""
        self._loss = one_number(loss)

    # -- books --------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Close the books on the steps measured so far: one transfer from the device, one write to the log.

        Under `fully_shard` every process must call it, as `records`, `estimates`, `state_dict` and `close`, which do.
        """
        with self._whole():
            if pending := list(self._pending):
                values = self._meter.gathered([m.values for m in pending])
                self._pace.worked_on_device(self._clock.seconds())
                self._books.enter(pending, values, self._journal)
                del self._pending[: len(pending)]
        now = dict(named_tensors(self.model))
        replaced = [n for n, p in self._meter.watched.items() if now.get(n) is not p]
        if self._journal.begins("replaced", bool(replaced)):
            note = "the model has other parameters of these names; replace_symmetries() watches them"
            self._journal.event("replaced", self.step, parameters=replaced[:8], note=note)
        self._journal.write()

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened besides steps: skipped and non-finite steps, edits, resumptions."""
        return self._journal.events

    def _event(self, what: str, **details: Any) -> None:
        self.flush()
        self._journal.event(what, self.step, **details)

    def _write_header(self) -> None:
        header, names = self._books.header(self.step, self._name, self.every)
        momentum = float(self.optimizer.param_groups[0].get("momentum", 0.0))
        own = {
            "overhead": None if self._pace.fixed else self._pace.overhead,
            "excluded": self.excluded,
            "momentum": momentum,
            **group_settings(self.optimizer),
            **self._notes,
        }
        self._journal.header(header | own, names)
        self._journal.write()

    def records(self, by: Level = "family") -> list[dict[str, Any]]:
        """One row per recorded step and family (or symmetry, or coordinate): `FIELDS`, step, lr, names.

        `charge` is before the step, `change` the measured change, `residual = change - sum of entries`, `norm` is
        `theta^T |A| theta`. Raises DataError when `by` is finer than the ledger's `detail`.
        """
        self._notice_bypass()
        self.flush()
        return self._books.records(by)

    def preconditioned(self, by: Level = "family") -> list[dict[str, Any]]:
        """The books of the preconditioned charge `sum a d theta^2` of Adam and AdamW; no rows for other optimisers.

        `d` is one over the preconditioner of a step, `sqrt(v) + eps` after bias correction. This charge is what Adam
        leaves alone at first order, so that its `gradient` is zero, and `noise` and `decay` predict where it goes.

        Returns:
            One row per recorded step and family (or symmetry, or coordinate): step, lr, names, `charge` before the step
            with the `d` of the step before, its `change`, the entries `gradient`, `momentum`, `decay`, `noise` and
            `transport` (the change of `d`), which add up to it, `residual` and `norm` (`sum |a| d theta^2`).

        Raises:
            DataError: `by` is finer than the ledger's `detail`.

        Source: theory.md section 13.
        """
        self.flush()
        return self._books.records(by, preconditioned=True)

    def estimates(self) -> list[dict[str, Any]]:
        """One row per estimated step and symmetry; `docs/ledger.md` explains the columns."""
        self.flush()
        return self._books.estimates()

    def run_data(self) -> RunData:
        """The run as arrays: all of it where there is a log, else the steps in memory.

        Raises DataError before the first recorded step.
        """
        self.flush()
        if self._journal.log is not None:
            return RunData.load(self._journal.log.path.parent)
        header, _ = self._books.header(0, self._name, self.every)
        header["momentum"] = float(self.optimizer.param_groups[0].get("momentum", 0.0))
        return RunData.of([*self._books.as_log(header), *self.events], "the ledger")

    def diagnose(self, steps: int | None = None) -> Diagnosis:
        """What the run so far says in plain words (`docs/diagnosis.md`); `steps` of the whole run, where it goes on.

        Raises DataError before the first step.
        """
        return nf.diagnose_run(self.run_data(), steps)

    # -- state and hooks ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; everything up to here is on disk when this returns.

        Raises OSError when the log cannot be written.
        """
        self.flush()
        mark = self._journal.mark(self.step)
        estimates = {} if self.estimator is None else self.estimator.state_dict()
        own = {"format": FORMAT, "step": self.step, "mark": mark, "symmetries": self._books.index.symmetries}
        return own | {"every": self.every, "estimates": estimates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint. What was logged after it is dropped: these steps will be made again.

        Raises DataError when the log does not hold the checkpoint (steps would be missing), the ledger watches other
        symmetries, or the format is another.
        """
        if state.get("format") != FORMAT:
            raise DataError(f"ledger state has format {state.get('format')!r}, this version reads {FORMAT}")
        if tuple(state["symmetries"]) != self._books.index.symmetries:
            raise DataError(
                f"the ledger state is of {len(state['symmetries'])} symmetries {list(state['symmetries'])[:3]}, this "
                f"ledger watches {len(self._books.index.symmetries)} {list(self._books.index.symmetries)[:3]}"
            )
        dropped = self._journal.rewind(state["mark"], int(state["step"]))
        self._undecided = False
        self._pending, self._open = [], None
        self._meter.forget()
        self._pace.pause()
        if not self._pace.fixed:
            self._pace.every = int(state.get("every", 1))
        self.step = int(state["step"])
        if self.estimator is not None:
            self.estimator.load_state_dict(state.get("estimates", {}))
        self._books.rewind(self.step)
        if self._journal.log is not None:
            self._write_header()
            self._event("resumed", dropped=dropped)

    def attach(self) -> Ledger:
        """Run before and after every `optimizer.step` by its hooks, also inside a closure passed to it.

        Raises DataError after `close()`.
        """
        if self._closed:
            raise DataError("this ledger is closed; make a new one (with its run_dir and resume=True it goes on there)")
        if len(self._handles) == 1:
            self._handles += [
                self.optimizer.register_step_pre_hook(untraced(self._pre_hook)),
                self.optimizer.register_step_post_hook(untraced(lambda *_: self.after_step())),
            ]
            self._stamps, self._attached = WeightStamps(self._meter.watched.values()), self.step
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

    def _notice_bypass(self) -> None:
        """Say so where a training moves the weights and never calls the step of the watched optimiser."""
        unseen = self._stamps is not None and self.step == self._attached and self._stamps.trained()
        if self._journal.begins("bypassed", unseen):
            note = (
                "the weights were trained, but the step of the watched optimiser was never called: give the ledger the "
                "optimiser whose step() moves them, for SAM in two steps its base_optimizer"
            )
            self._event("bypassed", note=note)

    def detach(self) -> None:
        """Stop watching; `attach()` starts again."""
        if isinstance(self.optimizer, JointOptimizer):
            self.optimizer.finish()
        for handle in self._handles[1:]:
            handle.remove()
        del self._handles[1:]
        self._meter.forget()
        self._pace.pause()

    def close(self) -> None:
        """Detach, flush and close the log and the sinks; `records()` and `estimates()` stay readable.

        Raises OSError when the last rows cannot be written.
        """
        if not self._closed:
            if isinstance(self.optimizer, JointOptimizer):
                self.optimizer.finish()
            self._finish_step()
            self._notice_bypass()
        self.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._closed = True
        with self._whole():
            self.flush()
            self._journal.close()

    def __enter__(self) -> Ledger:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._meter.sharded:
            self._pending, self._open = [], None  # the other processes may not come here to close the books together
        self.close()
