"""The ledger: every step's change of every charge, split into its causes, at the cost of a few dot products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import noetherflow as nf
from noetherflow.core.printing import count, show, table
from noetherflow.core.ranks import ending_together, told_by_all
from noetherflow.core.schedule import Schedule
from noetherflow.core.shown import Shown
from noetherflow.core.tensors import refuse_narrow, tensors_of
from noetherflow.core.unwrap import unwrap_optimizer
from noetherflow.errors import DataError
from noetherflow.monitor import sharding
from noetherflow.monitor.books import LEVELS, Level
from noetherflow.monitor.estimates import Estimator
from noetherflow.monitor.hooks import StepHooks
from noetherflow.monitor.joint import JointOptimizer, JointRule, as_one
from noetherflow.monitor.journal import Sink
from noetherflow.monitor.log import read_lines
from noetherflow.monitor.pace import Pace
from noetherflow.monitor.recorder import Place, Recording, StepRecorder
from noetherflow.monitor.rule import AnyRule, LedgerRule
from noetherflow.monitor.rules import rule_for
from noetherflow.monitor.rundata import RunData
from noetherflow.symmetry.arguments import expect_model_and_symmetries
from noetherflow.symmetry.symmetry_set import SymmetrySet

if TYPE_CHECKING:
    from noetherflow import Diagnosis


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
        estimate_every: training steps from one live estimate (`estimates()`) to the next, 0 for none; each is taken at
            the first recorded step from there on, and one more when the ledger is closed.
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
        """Watch `optimizer`; the parameters, one for each thing to choose, are explained by `help(nf.Ledger)`."""
        if flush_every < 1 or estimate_every < 0:
            raise DataError(f"flush_every={flush_every} must be >= 1, estimate_every={estimate_every} >= 0")
        if detail not in LEVELS:
            raise DataError(f"detail must be one of {LEVELS}, got {detail!r}")
        if not (rule is None or isinstance(rule, LedgerRule)):
            raise DataError(f"rule must be an instance of noetherflow.extend.LedgerRule, got {rule!r}")
        expect_model_and_symmetries("Ledger(model, optimizer, syms)", model, syms)
        refuse_narrow({n: t for n, t in tensors_of(model).items() if n in syms.parameters}, "Ledger")
        self.model, self.optimizer = model, as_one(optimizer, unwrap_optimizer)
        joint = isinstance(self.optimizer, JointOptimizer)
        name = self.optimizer.name if joint else type(self.optimizer).__name__
        chosen = rule or (JointRule() if joint else rule_for(self.optimizer))
        place = Place(run_dir, sinks, resume)
        how = Recording(name, chosen, detail, translations, capacity, estimate_every, flush_every, notes or {}, place)
        with ending_together(sharding.ranks_of(tensors_of(model).values())):
            self._recorder = StepRecorder(model, self.optimizer, syms, how, Pace(every, overhead, estimate_every))
        self._begin(resume)
        self._hooks = StepHooks(self.optimizer, self._recorder, self._before_step)

    def table_rows(self) -> list[dict[str, Any]]:
        """`records()`."""
        return self.records()

    def describe(self, *, verbose: bool = False, legend: bool = True) -> str:
        """How many steps are recorded, and each family's charge now; `verbose`: all events; see `Shown.describe`."""
        rows = self._recorder.books.records("family") if self._recorder.meter.sharded else self.records()
        made = f"{count(self.step, 'step', 'steps')} of {self._recorder.how.optimizer_name}"
        lines = [f"ledger of {made}, {count(len(rows), 'row', 'rows')} in memory"]
        latest = {row["family"]: row for row in rows}
        shown = ("charge", "change", "residual", "norm")
        lines += [table([{"family": f, **{k: r[k] for k in shown}} for f, r in latest.items()])] if rows else []
        told = self.events if verbose else self.events[-3:]
        lines += [f"step {show(event['step'])}: {event['event']}" for event in told]
        return "\n".join(lines)

    def _begin(self, resume: bool | None) -> None:
        """Number the step to come: one after the last that the log tells of, if that is the same run."""
        log = self._recorder.journal.log
        begun = 0 if log is None else log.steps_made()
        if self._recorder.meter.sharded:
            begun = told_by_all(begun, self._recorder.meter.ranks)[0]
        self._recorder.step = begun
        self._undecided = resume is None and begun > 0
        if not self._undecided:
            self._recorder.write_header()

    @property
    def step(self) -> int:
        """The number of the step to come."""
        return self._recorder.step

    @property
    def every(self) -> int:
        """Every how manieth step is recorded now."""
        return self._recorder.pace.every

    @property
    def detail(self) -> Level:
        """The finest level that the rows are kept at."""
        return self._recorder.how.detail

    @property
    def rule(self) -> AnyRule:
        """How the optimiser's update is split into causes."""
        return self._recorder.how.rule

    @property
    def excluded(self) -> Mapping[str, str]:
        """The symmetries that are not watched, and why."""
        return self._recorder.excluded

    @property
    def estimator(self) -> Estimator | None:
        """The live estimates' running averages; None with `estimate_every=0`."""
        return self._recorder.books.estimator

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened besides steps: skipped and non-finite steps, edits, resumptions."""
        return self._recorder.journal.events

    def replace_symmetries(self, syms: SymmetrySet) -> None:
        """Go on with another set of symmetries, after layers were added or removed. Earlier rows stay in the log.

        Raises DataError between `before_step` and `after_step`.
        """
        self.flush()
        self._recorder.watch(syms)
        self._recorder.write_header()
        self._recorder.event("symmetries replaced", parameters=len(self._recorder.books.layout.parameters))

    # -- measuring ----------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Measure what the gradients and the optimiser's state say about the step to come.

        A second call before `after_step` means that the optimiser's step did not happen; it is logged as skipped.
        Raises DataError when `run_dir` holds an earlier run, and nobody said what to do with it.
        """
        self._before_step()
        self._recorder.read_gradients()

    def _before_step(self) -> None:
        if self._undecided:
            raise DataError(
                f"the run_dir holds an earlier run, up to step {self.step - 1}: give Ledger another run_dir, or "
                "resume=True to go on with that run, or resume=False to keep its log beside and begin a new one"
            )
        self._recorder.before()

    def after_step(self, loss: Any = None) -> None:
        """Measure the charges after the step and enter it in the books; `loss` is logged along.

        When the optimiser made no step in between (gradient scaler): an event, no row.
        Raises DataError without a `before_step`.
        """
        self._recorder.after(loss)

    def note(self, loss: Any) -> None:
        """Keep the loss of the step under way. Raises DataError when it is not one number."""
        self._recorder.note(loss)

    # -- reading ------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Close the books on the steps measured so far: one transfer from the device, one write to the log.

        Where weights are sharded (`fully_shard`, tensor parallelism) every process must call it, as `close()`. What
        reads the books then does not wait for other processes: it is refused while recorded steps wait for a flush.
        """
        self._recorder.flush()

    def records(self, by: Level = "family", since: int | None = None) -> list[dict[str, Any]]:
        """One row per recorded step and family (or symmetry, or coordinate): `FIELDS`, step, lr, names.

        `charge` is before the step, `change` the measured change, `residual = change - sum of entries`, `norm` is
        `theta^T |A| theta`.

        Args:
            by: the level.
            since: None for the last `capacity` steps, which are in memory; else all steps that this ledger recorded
                from there on, read from the log in `run_dir` where memory no longer has them.

        Raises:
            DataError: `by` is finer than the ledger's `detail`, or rows asked for are neither in memory nor in a log.
        """
        self._hooks.notice_bypass()
        return self._rows(by, since)

    def _rows(self, by: Level, since: int | None, preconditioned: bool = False) -> list[dict[str, Any]]:
        self._recorder.bring_up_to_date()
        books = self._recorder.books
        if since is None:
            return books.records(by, preconditioned)
        return books.records_since(by, since, self._recorder.journal.path, preconditioned)

    @property
    def dropped(self) -> int:
        """Recorded steps that are no longer in memory (`capacity`); the log in `run_dir` has them."""
        return self._recorder.books.dropped

    @property
    def log_path(self) -> Path | None:
        """The log of this run, also after `close()`; None without `run_dir`."""
        return self._recorder.journal.path

    def preconditioned(self, by: Level = "family", since: int | None = None) -> list[dict[str, Any]]:
        """The books of the preconditioned charge `sum a d theta^2` of Adam, AdamW, RMSprop and NAdam; else no rows.

        `d` is one over the preconditioner of a step, `sqrt(v) + eps` after bias correction. This charge is what Adam
        leaves alone at first order, so that its `gradient` is zero, and `noise` and `decay` predict where it goes.

        Args:
            by: the level.
            since: as in `records`.

        Returns:
            One row per recorded step and family (or symmetry, or coordinate): step, lr, names, `charge` before the step
            with the `d` of the step before, its `change`, the entries `gradient`, `momentum`, `decay`, `noise` and
            `transport` (the change of `d`), which add up to it, `residual` and `norm` (`sum |a| d theta^2`).

        Raises:
            DataError: as `records`.

        Source: theory.md section 13.
        """
        return self._rows(by, since, preconditioned=True)

    def estimates(self) -> list[dict[str, Any]]:
        """One row per estimated step and symmetry; `docs/ledger.md` explains the columns."""
        self._recorder.bring_up_to_date()
        return self._recorder.books.estimates()

    def layers(self) -> list[dict[str, Any]]:
        """One row per estimated step and layer, and one for `all`: `norm` of its weights, `mean_share` of the mean
        gradient, and `noise_batches`, the gradient noise scale in minibatches; `docs/ledger.md` says when it is known.
        """
        self._recorder.bring_up_to_date()
        return self._recorder.books.layer_rows()

    def run_data(self) -> RunData:
        """The run as arrays: all of it where there is a log, else the steps in memory.

        Raises DataError before the first recorded step.
        """
        self._recorder.bring_up_to_date()
        path = self.log_path
        if path is not None and path.exists():
            found = RunData.of(read_lines(path), str(path.parent))
            return replace(found, steps_made=self.step, **self._since())
        header, _ = self._recorder.header(0)
        found = RunData.of([*self._recorder.books.as_log(header), *self.events], "the ledger")
        return replace(found, steps_made=self.step, dropped=self.dropped, **self._since())

    def _since(self) -> dict[str, Any]:
        """Losses and learning rates after the last recorded step, as RunData keeps them."""
        return {"since": self._recorder.losses_since, "rates_since": self._recorder.rates_since}

    def diagnose(self, steps: int | None = None, schedule: Schedule | None = None) -> Diagnosis:
        """What the run so far says in plain words (`docs/diagnosis.md`); where it goes on, `steps` of the whole run and
        the `schedule` of its learning rate, as `diagnose_run` takes them. Raises DataError before the first step.
        """
        return nf.diagnose_run(self.run_data(), steps, schedule)

    # -- state and hooks ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; everything up to here is on disk when this returns.

        Raises OSError when the log cannot be written.
        """
        return self._recorder.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint. What was logged after it is dropped: these steps will be made again.

        Raises DataError when the log does not hold the checkpoint (steps would be missing), the ledger watches other
        symmetries, or the format is another.
        """
        self._recorder.go_on(state)
        self._undecided = False

    def attach(self) -> Ledger:
        """Run before and after every `optimizer.step` by its hooks, also inside a closure passed to it.

        Raises DataError after `close()`.
        """
        self._hooks.attach()
        return self

    def detach(self) -> None:
        """Stop watching; `attach()` starts again."""
        self._hooks.detach()

    def close(self) -> None:
        """Detach, flush and close the log and the sinks; `records()` and `estimates()` stay readable.

        Raises OSError when the last rows cannot be written, RankError where shards' processes do not all close.
        """
        if self._hooks.released and self._recorder.meter.sharded:
            return
        if not self._hooks.released:
            if isinstance(self.optimizer, JointOptimizer):
                self.optimizer.finish()
            self._recorder.finish_step()
            self._hooks.notice_bypass()
        self._hooks.release()
        with self._recorder.whole():
            try:
                self.flush()
                if not self._undecided:
                    self._recorder.end()
            finally:
                self._recorder.journal.close()

    def __enter__(self) -> Ledger:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._recorder.meter.sharded:
            self._recorder.forget()  # the other processes may not come here to close the books together
            self._hooks.release()
            self._recorder.journal.close()
        else:
            self.close()
