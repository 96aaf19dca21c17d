"""A run's log as arrays: for the report, the live view, and anyone with a notebook."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from noetherflow.errors import DataError
from noetherflow.monitor.books import FIELDS
from noetherflow.monitor.log import LOG_NAME, parse_line, read_log
from noetherflow.monitor.rule import ENTRIES

SPIKE = 10.0
USUAL = 0.9
WINDOW = 50
CHUNK = 8192


@dataclass(frozen=True, eq=False)
class RunData:
    """One run: `family[field]` `[T, families]` over the recorded `steps`, `estimates[field]` `[E, symmetries]`.

    `loss` and `lr` are `[T]`; unknown numbers are NaN, also estimates that only some of the run's optimisers have.
    `events` as logged, `started` as the first header says. When the watched symmetries were replaced during the run,
    this is the part since the first step recorded after that.
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

    @classmethod
    def load(cls, run_dir: str | os.PathLike[str]) -> RunData:
        """Read `RUN_DIR/ledger.jsonl`. Raises DataError when there is none or it holds no step."""
        return cls.of(read_log(run_dir), str(run_dir))

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]], name: str = "the log") -> RunData:
        seen = _Rows()
        for row in rows:
            seen.add(row)
        data = seen.data()
        if data is None:
            raise DataError(f"{name} holds no recorded step yet")
        return data

    @property
    def families(self) -> list[str]:
        return list(self.header["families"])

    @property
    def symmetries(self) -> list[str]:
        return [s["name"] for s in self.header["symmetries"]]

    @property
    def one_sided(self) -> np.ndarray:
        """Which symmetries have no counterweight, `[symmetries]` of bool."""
        return np.array([s["one_sided"] for s in self.header["symmetries"]], dtype=bool)

    def causes(self, family: int) -> dict[str, float]:
        """Sums of each entry over the recorded steps, largest first; entries that are always zero are left out."""
        sums = {name: float(np.nansum(self.family[name][:, family])) for name in ENTRIES}
        present = {name: s for name, s in sums.items() if np.any(self.family[name][:, family] != 0)}
        return dict(sorted(present.items(), key=lambda item: -abs(item[1])))

    def spikes(self) -> list[dict[str, Any]]:
        """Recorded steps whose charge change, or loss above its level, is `SPIKE` times the 90 % quantile before them.

        What follows within `WINDOW` recorded steps belongs to the same spike.
        """
        found = [
            {
                "kind": "event",
                "step": int(self.steps[t]),
                "event": "spike",
                "where": name,
                "times_usual": float(ratio[t]),
            }
            for name, ratio in self._ratios()
            for t in _starts(ratio > SPIKE)
        ]
        return sorted(found, key=lambda e: e["step"])

    def _ratios(self) -> list[tuple[str, np.ndarray]]:
        size = np.abs(self.family["change"])
        out = [(f"charge of {name}", _times_usual(size[:, i])) for i, name in enumerate(self.families)]
        if np.isfinite(self.loss).any():
            level = _before(self.loss, 0.5)
            out.append(("loss", _times_usual(np.maximum(self.loss - level, 0), np.abs(self.loss - level))))
        return out


class _Rows:
    """A log's rows since its symmetries were last replaced: at most `keep` steps and estimates (None: all)."""

    def __init__(self, keep: int | None = None) -> None:
        self._started = ""
        self._header: dict[str, Any] = {}
        self._latest: dict[str, Any] = {}
        self._steps: deque[dict[str, Any]] = deque(maxlen=keep)
        self._estimates: deque[dict[str, Any]] = deque(maxlen=keep)
        self._events: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        if row["kind"] == "run":
            self._started = self._started or row["time"]
            self._latest = row
        elif row["kind"] == "step":
            if self._header.get("symmetries") != self._latest["symmetries"]:
                self._steps.clear()
                self._estimates.clear()
            self._header = self._latest
            self._steps.append({k: row.get(k) for k in ("step", "lr", "loss", "family")})
        elif row["kind"] == "estimates":
            self._estimates.append(row)
        elif row["kind"] == "event":
            self._events.append(row)

    def data(self) -> RunData | None:
        """As arrays; None without a step."""
        if not self._steps:
            return None
        steps, estimates = self._steps, self._estimates
        unknown = [None] * len(self._header["symmetries"])
        fields = dict.fromkeys(f for e in estimates for f in e["symmetry"])
        return RunData(
            self._header,
            self._started,
            np.array([r["step"] for r in steps]),
            _numbers([r["lr"] for r in steps]),
            _numbers([r["loss"] for r in steps]),
            {f: _numbers([r["family"][f] for r in steps]) for f in FIELDS},
            np.array([r["step"] for r in estimates], dtype=int),
            {f: _numbers([e["symmetry"].get(f, unknown) for e in estimates]) for f in fields},
            tuple(self._events),
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
                self._rows.add(parse_line(line, self.path, self._lines))
                self._offset += len(line)
                self._tail = (self._tail + line)[-64:]
        if self._lines != before:
            self._data = self._rows.data()
        return self._data


def _numbers(values: list[Any]) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def _before(values: np.ndarray, quantile: float) -> np.ndarray:
    """Quantile (linear) of the finite ones of the `WINDOW` values before each value; NaN at the first ten."""
    out = np.full(len(values), np.nan)
    finite = np.where(np.isfinite(values), values, np.nan)
    windows = sliding_window_view(np.concatenate([np.full(WINDOW, np.nan), finite]), WINDOW)
    for start in range(10, len(values), CHUNK):
        rising = np.sort(windows[start : min(start + CHUNK, len(values))], axis=1)
        last = np.maximum(np.isfinite(rising).sum(axis=1) - 1, 0)
        place = last * quantile
        low = place.astype(int)
        at = np.arange(len(rising))
        below, above = rising[at, low], rising[at, np.minimum(low + 1, last)]
        out[start : start + len(rising)] = below + (above - below) * (place - low)
    return out


def _times_usual(values: np.ndarray, usual: np.ndarray | None = None) -> np.ndarray:
    level = _before(values if usual is None else usual, USUAL)
    return np.divide(values, level, out=np.zeros(len(values)), where=level > 0)


def _starts(flags: np.ndarray) -> list[int]:
    """Positions that are set and not within `WINDOW` of the last one kept."""
    kept: list[int] = []
    for t in np.flatnonzero(flags):
        if not kept or t - kept[-1] > WINDOW:
            kept.append(int(t))
    return kept
