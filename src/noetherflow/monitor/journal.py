"""Where a ledger's rows go: the log of the run, the sinks, and the list of events."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noetherflow.monitor import sharding
from noetherflow.monitor.log import RunLog, plain
from noetherflow.monitor.noted import NotedLosses, NotedRates

Sink = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class _Line:
    """A line that waits for the log, and its place in the order of all lines."""

    number: int
    row: Mapping[str, Any]


class Journal:
    """Rows wait in memory until `write`; nothing here stops a training run but a log that another ledger holds.

    Only the first of several processes writes. `names`: what the sinks are told of every row's columns.
    """

    def __init__(self, run_dir: str | Path | None, sinks: Iterable[Sink], resume: bool | None = None) -> None:
        first = sharding.distributed_rank() == 0
        self.sinks = list(sinks) if first else []
        self.events: list[dict[str, Any]] = []
        self.names: dict[str, Any] = {}
        self.log = RunLog(run_dir, resume) if run_dir is not None and first else None
        self._closed_log: Path | None = None
        self._lines: list[_Line] = []
        self._number = 0
        self._flags: dict[str, bool] = {}

    @property
    def path(self) -> Path | None:
        """The file of the log, also after it was closed; None where there is none."""
        return self._closed_log if self.log is None else self.log.path

    def header(self, row: Mapping[str, Any], names: dict[str, Any]) -> None:
        self.names = names
        self._add(plain(row))

    def _add(self, line: Mapping[str, Any]) -> None:
        """Have a line wait for the log, under a number of its own."""
        if self.log is not None:
            self._number += 1
            self._lines.append(_Line(self._number, line))

    def emit(self, row: Mapping[str, Any], line: Mapping[str, Any] | None = None) -> None:
        """One row to the sinks and, as `line` if that is ready for JSON already, to the log."""
        if self.log is not None:
            self._add(plain(row) if line is None else line)
        for sink in list(self.sinks):
            try:
                sink({**row, **self.names})
            except Exception as error:
                self.sinks.remove(sink)
                name, text = type(sink).__name__, f"{type(error).__name__}: {error}"
                warnings.warn(f"{name} failed and gets no more rows: {text}", RuntimeWarning, stacklevel=2)
                self.event("sink failed", row["step"], sink=name, error=text)

    def event(self, what: str, step: int, **details: Any) -> None:
        row = {"kind": "event", "step": step, "event": what, **details}
        self.events.append(row)
        self.emit(row)

    def begins(self, what: str, now: bool) -> bool:
        """True where a condition sets in, not while it lasts."""
        before, self._flags[what] = self._flags.get(what, False), now
        return now and not before

    def end(self, step: int, losses: NotedLosses | None = None, rates: NotedRates | None = None) -> None:
        """Note how many steps were made when the ledger was closed, and losses and rates of those after the last
        recorded.
        """
        if self.begins("ended", True):
            told = {name: plain(x.line()) for name, x in (("losses", losses), ("rates", rates)) if x is not None}
            self._add({"kind": "end", "step": step, **told})

    def write(self) -> None:
        """Hand the rows that wait to the operating system; where that fails they wait on, and a warning says so."""
        try:
            self._write()
        except OSError as error:
            if self.begins("unwritten", True):
                note = f"the log cannot be written ({error}); its rows stay in memory and are tried again"
                warnings.warn(note, RuntimeWarning, stacklevel=2)
        else:
            self._flags["unwritten"] = False

    def _write(self) -> None:
        """Lines leave only once the log has them; what an interruption left over is told by the log's last number."""
        if self.log is None:
            self._lines = []
            return
        waiting = [line for line in self._lines if line.number > self.log.last_number]
        if waiting:
            self.log.append([line.row for line in waiting], waiting[-1].number)
        self._lines = [line for line in self._lines if line.number > self.log.last_number]

    def mark(self, step: int) -> str | None:
        """Put everything and a checkpoint line onto the disk; the line's name. Raises OSError."""
        self._write()
        return None if self.log is None else self.log.mark(step)

    def rewind(self, mark: str | None, step: int) -> int:
        """Forget what came after a checkpoint line at `step`; the number of steps dropped. Raises DataError."""
        dropped = 0 if self.log is None else self.log.rewind(mark)
        self._lines = []
        self.events = [row for row in self.events if row["step"] < step]
        for sink in self.sinks:
            getattr(sink, "rewind", lambda step: None)(step)
        return dropped

    def close(self) -> None:
        """Write what waits and close the log and the sinks. Raises OSError when the last rows cannot be written."""
        try:
            self._write()
        finally:
            for item in (self.log, *self.sinks):
                getattr(item, "close", lambda: None)()
            self._closed_log = self.path
            self.log, self.sinks = None, []
