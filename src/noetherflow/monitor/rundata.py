"""A run's log as arrays: for the report, the live view, and anyone with a notebook."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from noetherflow.core.printing import count
from noetherflow.errors import DataError
from noetherflow.monitor.books import CAUSES, FIELDS, PRECONDITIONED_FIELDS
from noetherflow.monitor.estimates import HEAD
from noetherflow.monitor.growing import GrowingTable
from noetherflow.monitor.head_rows import heads_of_header
from noetherflow.monitor.log import LOG_NAME, parse_line, read_log, steps_told, unreadable
from noetherflow.monitor.noted import COLUMNS, HIGHEST_AT, RATES, NotedLosses, NotedRates, noted_row, rates_row
from noetherflow.monitor.row_form import wrong_form
from noetherflow.monitor.spikes import SPIKE, loss_ratios, starts, times_usual

MOST = 10_000
"""Events of one kind that are kept of a log; the others are counted."""


@dataclass(frozen=True, eq=False)
class RunData:
    """One run: `family[field]` `[T, families]` over the recorded `steps`, `estimates[field]` `[E, symmetries]`.

    `preconditioned[field]` `[T, families]` are the books of the preconditioned charge, empty where no step has them.

    `layer[field]` `[E, layers]` and `mean_share` `[E]` are what `Ledger.layers` tells, empty in logs without it.

    `head[field]` `[E, heads]` is what estimates tell of attention heads (`heads`), empty in logs without it.

    `loss` and `lr` are `[T]`; unknown numbers are NaN, also estimates that only some of the run's optimisers have.
    `events` as logged, `started` as the first header says. When the watched symmetries were replaced during the run,
    this is the part since the first step recorded after that.

    `steps_made` steps were made since the run's first (step 0), recorded or not. A log tells those after the last
    recorded one when its ledger was closed or saved; where a run ended otherwise, or goes on, they are not counted.

    `noted` `[T, 7]` are the columns of `NotedLosses`: what the losses of the steps since the recorded one before were,
    as far as they were noted; `since` those after the last recorded step. `rates` `[T, 5]` and `rates_since` are the
    same of `NotedRates`, NaN where a row stands for its own step alone or the log is of an earlier version.

    `dropped` recorded steps before these are missing, because a ledger without a log keeps the last ones only.
    """

    header: dict[str, Any]
    started: str
    steps: np.ndarray
    lr: np.ndarray
    loss: np.ndarray
    family: dict[str, np.ndarray]
    estimate_steps: np.ndarray
    estimates: dict[str, np.ndarray]
    events: tuple[dict[str, Any], ...]
    steps_made: int
    preconditioned: dict[str, np.ndarray] = field(default_factory=dict)
    layer: dict[str, np.ndarray] = field(default_factory=dict)
    mean_share: np.ndarray = field(default_factory=lambda: np.zeros(0))
    dropped: int = 0
    noted: np.ndarray = field(default_factory=lambda: np.zeros((0, len(COLUMNS))))
    since: NotedLosses | None = None
    rates: np.ndarray = field(default_factory=lambda: np.zeros((0, len(RATES))))
    rates_since: NotedRates | None = None
    head: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def load(cls, run_dir: str | os.PathLike[str]) -> RunData:
        """Read `RUN_DIR/ledger.jsonl`. Raises DataError when there is none or it holds no step."""
        return cls.of(read_log(run_dir), str(run_dir))

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]], name: str = "the log") -> RunData:
        seen = _Rows()
        for number, row in enumerate(rows, 1):
            seen.add(row, number)
        data = seen.data(last=True)
        if data is None:
            raise DataError(f"{name} holds no recorded step yet")
        return data

    @property
    def stride(self) -> np.ndarray:
        """How many steps each recorded one stands for, `[T]`."""
        return strides_of(self.steps)

    @property
    def span(self) -> str:
        """Which steps these are: `1,491 steps, 205 of them recorded`, `the last 500 of 2,000 recorded steps (1,500 to
        1,999)`.
        """
        kept = len(self.steps)
        if self.dropped:
            first, last = int(self.steps[0]), int(self.steps[-1])
            return f"the last {kept:,} of {kept + self.dropped:,} recorded steps ({first:,} to {last:,})"
        made = count(self.steps_made, "step", "steps")
        return made if kept == self.steps_made else f"{made}, {kept:,} of them recorded"

    @property
    def families(self) -> list[str]:
        return list(self.header["families"])

    @property
    def symmetries(self) -> list[str]:
        return [s["name"] for s in self.header["symmetries"]]

    @property
    def layers(self) -> list[str]:
        """The names of the layers that `layer` is about."""
        return list(self.header.get("layers", ()))

    @property
    def heads(self) -> list[tuple[str, int]]:
        """Symmetry and number of the attention heads that `head` is about."""
        return heads_of_header(self.header)

    @property
    def one_sided(self) -> np.ndarray:
        """Which symmetries have no counterweight, `[symmetries]` of bool."""
        return np.array([s["one_sided"] for s in self.header["symmetries"]], dtype=bool)

    def causes(self, family: int) -> dict[str, float]:
        """What each entry and `outside` added from the first recorded step to the last, largest first.

        Those always zero are left out. Sums where every step is recorded; else estimates: each recorded step stands for
        half of those between it and its neighbours, too (`weights_of`), so that they add up to about the change.
        """
        weights = weights_of(self.steps)
        sums = {name: float(np.nansum(weights * self.family[name][:, family])) for name in CAUSES}
        present = {name: s for name, s in sums.items() if np.any(np.nan_to_num(self.family[name][:, family]) != 0)}
        return dict(sorted(present.items(), key=lambda item: -abs(item[1])))

    def spikes(self) -> list[dict[str, Any]]:
        """Recorded steps whose charge change, and noted losses whose height above their level, is `SPIKE` times
        the 90 % quantile before them.

        What follows within 50 recorded steps belongs to the same spike.
        """
        found = [
            _spike(int(self.steps[t]), name, float(ratio[t]))
            for name, ratio in self._ratios()
            for t in starts(ratio > SPIKE)
        ]
        return sorted([*found, *self._loss_spikes()], key=lambda e: e["step"])

    def _ratios(self) -> list[tuple[str, np.ndarray]]:
        size = np.abs(self.family["change"])
        return [(f"charge of {name}", times_usual(size[:, i])) for i, name in enumerate(self.families)]

    def _loss_spikes(self) -> list[dict[str, Any]]:
        """Losses far above their level, of all steps that were noted; see `loss_ratios`."""
        nothing = np.zeros(len(self.loss))
        alone = np.stack([nothing + 1, self.loss, nothing, self.loss, self.loss, self.steps, nothing], axis=1)
        several = self.noted[:, :1] > 1 if len(self.noted) else np.zeros((len(alone), 1), dtype=bool)
        rows, at = np.where(several, self.noted if len(self.noted) else alone, alone), self.steps
        if self.since is not None:
            rows = np.vstack([rows, [list(self.since.line().values())]])
            at = np.append(at, self.steps_made - 1)
        if not np.isfinite(rows[:, 1]).any():
            return []
        ratio = loss_ratios(rows)
        steps = np.where(np.isfinite(rows[:, HIGHEST_AT]), rows[:, HIGHEST_AT], at).astype(int)
        return [_spike(int(steps[t]), "loss", float(ratio[t])) for t in starts(ratio > SPIKE)]


def _spike(step: int, where: str, times: float) -> dict[str, Any]:
    return {"kind": "event", "step": step, "event": "spike", "where": where, "times_usual": times}


def strides_of(steps: np.ndarray) -> np.ndarray:
    """How many steps each recorded one stands for: those up to the next; the last as many as that before.

    Example:
        >>> strides_of(np.array([0, 1, 5, 10])).tolist()
        [1, 4, 5, 5]
    """
    gaps = np.diff(steps)
    return np.concatenate([gaps, gaps[-1:] if gaps.size else [1]])


def weights_of(steps: np.ndarray) -> np.ndarray:
    """How many steps each recorded one stands for in a sum from the first to the last: itself, and half of those
    between it and its neighbours (the trapezoid rule).

    Example:
        >>> weights_of(np.array([0, 1, 5, 10])).tolist()
        [1.0, 2.5, 4.5, 3.0]
    """
    between = (np.diff(steps) - 1) / 2
    weights = np.ones(len(steps))
    weights[:-1] += between
    weights[1:] += between
    return weights


class _Rows:
    """A log's rows since its symmetries were last replaced: at most `keep` steps and estimates (None: all).

    Steps that are missing, come twice or out of order, and lines of the wrong form become events; a step or an
    estimate that comes twice counts once (a run that ended at a step and was resumed there estimates it again).
    """

    def __init__(self, keep: int | None = None) -> None:
        self._started = ""
        self._header: dict[str, Any] = {}
        self._latest: dict[str, Any] = {}
        self._steps, self._estimates = GrowingTable(keep), GrowingTable(keep)
        self._events: list[dict[str, Any]] = []
        self._counts: Counter[str] = Counter()
        self._last, self._made = -1, 0
        self._since: NotedLosses | None = None
        self._rates_since: NotedRates | None = None
        self._expected: int | None = None

    def add(self, row: dict[str, Any], number: int = 0) -> None:
        """Take in one line of the log."""
        why = wrong_form(row, self._latest)
        if why:
            self._event(unreadable(number, why, max(self._last, 0)))
            return
        self._made = max(self._made, steps_told(row))
        if row["kind"] == "run":
            self._begin(row)
        elif row["kind"] == "step":
            self._add_step(row)
        elif row["kind"] == "estimates":
            self._renew()
            beside = {f"layer.{k}": v for k, v in row.get("layer", {}).items()}
            beside |= {"all.mean_share": row.get("mean_share")} if beside else {}
            beside |= {f"{HEAD}{k}": v for k, v in row.get("head", {}).items()}
            if not self._estimates.has(row["step"]):
                self._estimates.add({"step": row["step"], **row["symmetry"], **beside})
        elif row["kind"] == "end":
            told, rates = noted_row(row), rates_row(row)
            self._since = NotedLosses(int(told[0]), *told[1:]) if np.isfinite(told[0]) else None
            noted, mean, highest, at, first = rates
            whole = bool(np.isfinite(rates).all())
            self._rates_since = NotedRates(int(noted), mean, highest, int(at), first) if whole else None
        elif row["kind"] == "event":
            unread = row["event"] == "unreadable"
            self._event({**row, "step": max(self._last, 0)} if unread else row)
            if row["event"] == "stride" and self._latest:
                self._change_stride(row["step"], row["every"])

    def _event(self, row: dict[str, Any]) -> None:
        """Keep an event, or count it where there are very many of its kind."""
        self._counts[row["event"]] += 1
        if self._counts[row["event"]] <= MOST:
            self._events.append(row)

    def _all_events(self) -> Iterator[dict[str, Any]]:
        yield from self._events
        for what, number in self._counts.items():
            if number > MOST:
                note = f"{number - MOST:,} more of these are not listed"
                yield {"kind": "event", "event": what, "step": max(self._last, 0), "note": note}

    def _begin(self, header: dict[str, Any]) -> None:
        self._started = self._started or header["time"]
        self._latest = header
        every = header.get("every", 1)
        first = -(-header["step"] // every) * every if "step" in header else None
        if first is not None and self._expected is not None and header["step"] > self._expected:
            self._gap(self._expected, header["step"])
        self._expected = first

    def _change_stride(self, step: int, every: int) -> None:
        """From this step on, every so manieth one is expected."""
        self._latest = {**self._latest, "every": every}
        self._expected = -(-step // every) * every

    def _renew(self) -> None:
        """Begin again where other symmetries or families are watched than before."""
        if any(self._header.get(k) != self._latest[k] for k in ("symmetries", "families")):
            self._steps.clear()
            self._estimates.clear()
        self._header = self._latest

    def _add_step(self, row: dict[str, Any]) -> None:
        step, every = row["step"], self._latest.get("every", 1)
        self._renew()
        if step <= self._last and self._steps.has(step):
            self._event({"kind": "event", "event": "doubled", "step": step, "note": "counted once"})
            return
        if step < self._last:
            self._event({"kind": "event", "event": "out of order", "step": step})
        elif self._expected is not None and step > self._expected:
            self._gap(self._expected, step)
        self._last = max(self._last, step)
        self._expected = max(self._last + every, self._expected or 0)
        unknown = [None] * len(self._latest["families"])
        family = {f"family.{f}": row["family"].get(f, unknown) for f in FIELDS}
        beside = row.get("preconditioned_family")
        if isinstance(beside, dict):
            family |= {f"preconditioned.{f}": beside.get(f, unknown) for f in PRECONDITIONED_FIELDS}
        self._since, self._rates_since = None, None
        noted = {"noted": noted_row(row), "rates": rates_row(row)}
        self._steps.add({"step": step, "lr": row.get("lr"), "loss": row.get("loss"), **noted, **family})

    def _gap(self, expected: int, found: int) -> None:
        note = f"steps from {expected} to before {found} are missing from the log"
        self._event({"kind": "event", "event": "gap", "step": expected, "note": note})

    def data(self, last: bool = False) -> RunData | None:
        """As arrays; None without a step. `last`: nothing is added afterwards, which saves half of the memory."""
        if not len(self._steps):
            return None
        steps, estimates = self._steps.arrays(last), self._estimates.arrays(last)
        number = steps["step"].astype(int)
        if np.any(np.diff(number) < 0):
            order = np.argsort(number, kind="stable")
            number, steps = number[order], {name: values[order] for name, values in steps.items()}
        layer = {k.removeprefix("layer."): estimates.pop(k) for k in list(estimates) if k.startswith("layer.")}
        head = {k.removeprefix(HEAD): estimates.pop(k) for k in list(estimates) if k.startswith(HEAD)}
        mean_share = estimates.pop("all.mean_share", np.zeros(0))
        return RunData(
            self._header,
            self._started,
            number,
            steps["lr"],
            steps["loss"],
            {f: steps[f"family.{f}"] for f in FIELDS},
            estimates.pop("step", np.zeros(0)).astype(int),
            estimates,
            tuple(self._all_events()),
            self._made,
            {f: steps[f"preconditioned.{f}"] for f in PRECONDITIONED_FIELDS if f"preconditioned.{f}" in steps},
            layer,
            mean_share,
            noted=steps["noted"],
            since=self._since,
            rates=steps["rates"],
            rates_since=self._rates_since,
            head=head,
        )


class RunReader:
    """Reads a growing log incrementally; a log that was rewound by a resumed run is read again from its start.

    `keep`: how many of the last steps and estimates `poll` returns, None for all.
    """

    def __init__(self, run_dir: str | os.PathLike[str], keep: int | None = None) -> None:
        self.path, self.keep = Path(run_dir) / LOG_NAME, keep
        self._start()

    def _start(self) -> None:
        self._rows = _Rows(self.keep)
        self._data: RunData | None = None
        self._lines, self._offset, self._tail = 0, 0, b""

    def poll(self) -> RunData | None:
        """The run as far as it is written, the same object while nothing is new; None before its first recorded step.

        Raises DataError when a line is corrupt or of another format.
        """
        if not self.path.exists():
            return None
        before = self._lines
        with open(self.path, "rb") as file:
            file.seek(self._offset - len(self._tail))
            if file.read(len(self._tail)) != self._tail:
                self._start()
                before = -1
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._lines += 1
                self._rows.add(parse_line(line, self.path, self._lines), self._lines)
                self._offset += len(line)
                self._tail = (self._tail + line)[-64:]
        if self._lines != before:
            self._data = self._rows.data()
        return self._data
