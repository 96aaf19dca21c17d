"""A run's log as arrays: for the report, the live view, and anyone with a notebook."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from noetherflow.errors import DataError
from noetherflow.monitor.books import FIELDS
from noetherflow.monitor.decompose import ENTRIES
from noetherflow.monitor.log import LOG_NAME, read_log

SPIKE = 10.0
USUAL = 0.9
WINDOW = 50


@dataclass(frozen=True, eq=False)
class RunData:
    """One run: `family[field]` `[T, families]` over the recorded `steps`, `estimates[field]` `[E, symmetries]`.

    `loss` and `lr` are `[T]`, NaN where unknown; `events` as logged. When the watched symmetries were replaced during
    the run, this is the part since then.
    """

    header: dict[str, Any]
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
        header: dict[str, Any] = {}
        steps: list[dict[str, Any]] = []
        estimates: list[dict[str, Any]] = []
        events: list[dict[str, Any]] = []
        for row in rows:
            if row["kind"] == "run":
                if header and row["symmetries"] != header["symmetries"]:
                    steps, estimates = [], []
                header = row
            else:
                {"step": steps, "estimates": estimates, "event": events}[row["kind"]].append(row)
        if not steps:
            raise DataError(f"{name} holds no recorded step yet")
        fields = {f for e in estimates for f in e["symmetry"]}
        return cls(
            header,
            np.array([r["step"] for r in steps]),
            _numbers([r["lr"] for r in steps]),
            _numbers([r.get("loss") for r in steps]),
            {f: _numbers([r["family"][f] for r in steps]) for f in FIELDS},
            np.array([r["step"] for r in estimates], dtype=int),
            {f: _numbers([e["symmetry"][f] for e in estimates]) for f in fields},
            tuple(events),
        )

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


class RunReader:
    """Reads a growing log incrementally; a log that was rewound by a resumed run is read again from its start."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.run_dir = Path(run_dir)
        self._rows: list[dict[str, Any]] = []
        self._offset = 0
        self._tail = b""

    def poll(self) -> RunData | None:
        """The run as far as it is written; None before its first recorded step."""
        path = self.run_dir / LOG_NAME
        if not path.exists():
            return None
        with open(path, "rb") as file:
            file.seek(self._offset - len(self._tail))
            if file.read(len(self._tail)) != self._tail:
                self._rows, self._offset, self._tail = [], 0, b""
        with open(path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._rows += [json.loads(line) for line in data.splitlines()]
        self._offset += len(data)
        self._tail = (self._tail + data)[-64:]
        return RunData.of(self._rows) if any(r["kind"] == "step" for r in self._rows) else None


def _numbers(values: list[Any]) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def _before(values: np.ndarray, quantile: float) -> np.ndarray:
    """Quantile of up to `WINDOW` values before each one; NaN at the first ten."""
    out = np.full(len(values), np.nan)
    for t in range(10, len(values)):
        known = values[max(0, t - WINDOW) : t]
        known = known[np.isfinite(known)]
        out[t] = np.quantile(known, quantile) if known.size else np.nan
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
