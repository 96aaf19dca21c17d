"""An append-only JSON-lines log that survives a crash: lines are whole or ignored, and a resumed run rewinds it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from noetherflow.errors import DataError

LOG_NAME = "ledger.jsonl"
FORMAT = 1


def plain(value: Any, digits: int = 9) -> Any:
    """JSON-ready: arrays to lists, numbers to `digits` significant digits, non-finite numbers to None."""
    if isinstance(value, Mapping):
        return {k: plain(v, digits) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        numbers = value.ndim == 1 and value.dtype.kind == "f"
        return [_rounded(v, digits) if numbers else plain(v, digits) for v in value.tolist()]
    if isinstance(value, (list, tuple)):
        return [plain(v, digits) for v in value]
    if isinstance(value, (float, np.floating)):
        return _rounded(float(value), digits)
    return value.item() if isinstance(value, np.generic) else value


def _rounded(value: float, digits: int) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


class RunLog:
    """`RUN_DIR/ledger.jsonl`, opened for appending. A torn last line (killed while writing) is cut off on opening."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.path = Path(run_dir) / LOG_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut(_intact_length(self.path))

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write whole lines in one call and hand them to the operating system."""
        data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        while data:
            data = data[os.write(self._file, data) :]

    def sync(self) -> None:
        """Force what was written onto the disk."""
        os.fsync(self._file)

    def last_step(self) -> int | None:
        """The last recorded step, or None for a new log."""
        return max((row["step"] for row in read_log(self.path.parent) if row["kind"] == "step"), default=None)

    def rewind(self, step: int) -> int:
        """Drop everything from the first line about a step >= `step` on; the number of steps dropped."""
        offset, dropped, cut = 0, 0, None
        with open(self.path, "rb") as file:
            for line in file:
                row = json.loads(line)
                if cut is None and row["kind"] != "run" and row["step"] >= step:
                    cut = offset
                dropped += cut is not None and row["kind"] == "step"
                offset += len(line)
        if cut is not None:
            self._cut(cut)
        return dropped

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _cut(self, length: int) -> None:
        os.ftruncate(self._file, length)


def _intact_length(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    data_end = path.stat().st_size
    with open(path, "rb") as file:
        while data_end:
            start = max(0, data_end - 65536)
            file.seek(start)
            newline = file.read(data_end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            data_end = start
    return 0


def read_log(run_dir: str | os.PathLike[str], offset: int = 0) -> Iterator[dict[str, Any]]:
    """The lines of a run's log from a byte offset on; a torn last line is left out.

    Raises DataError when there is no log or its format is another one.
    """
    path = Path(run_dir) / LOG_NAME
    if not path.exists():
        raise DataError(f"{path} does not exist; a run directory is written by Ledger(..., run_dir=...)")
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            row = json.loads(line)
            if row.get("format", FORMAT) != FORMAT:
                raise DataError(f"{path} has format {row['format']}, this version reads {FORMAT}")
            yield row
