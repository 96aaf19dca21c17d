"""An append-only JSON-lines log that survives a crash: lines are whole or ignored, and a resumed run rewinds it."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from noetherflow.errors import DataError

LOG_NAME = "ledger.jsonl"
FORMAT = 2


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
    """`RUN_DIR/ledger.jsonl`, opened for appending. A torn last line (killed while writing) is cut off on opening.

    Args:
        run_dir: its folder, made if it is missing.
        resume: False keeps a log that has recorded steps beside, as `ledger-1.jsonl` (2, 3, ...), and begins a new one.

    Raises:
        DataError: another ledger is writing there.
    """

    def __init__(self, run_dir: str | os.PathLike[str], resume: bool | None = None) -> None:
        self.path = Path(run_dir) / LOG_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        try:
            if resume is False and self.last_step() is not None:
                self._put_aside()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Open and lock the file, and cut off a torn last line."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _lock(self._file, self.path)
            os.ftruncate(self._file, _intact_length(self.path))
        except BaseException:
            self.close()
            raise

    def _put_aside(self) -> None:
        """Rename the present log and open a new one."""
        number = next(n for n in count(1) if not self.path.with_name(f"ledger-{n}.jsonl").exists())
        os.rename(self.path, self.path.with_name(f"ledger-{number}.jsonl"))
        self.close()
        self._open()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write whole lines and hand them to the operating system. Raises OSError, with nothing written, on failure."""
        data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        size = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def last_step(self) -> int | None:
        """The last recorded step, or None for a new log."""
        return max((row["step"] for row in read_log(self.path.parent) if row["kind"] == "step"), default=None)

    def mark(self, step: int) -> str:
        """Append a checkpoint line, force all onto the disk, and return the line's name."""
        name = uuid.uuid4().hex
        self.append([{"kind": "checkpoint", "step": step, "name": name}])
        os.fsync(self._file)
        return name

    def rewind(self, mark: str | None) -> int:
        """Drop everything after a checkpoint line; the number of steps dropped.

        Raises DataError when the line is not there: the log was not written up to that checkpoint.
        """
        offset, kept, dropped = 0, None, 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                row = parse_line(line, self.path, number)
                offset += len(line)
                dropped += kept is not None and row["kind"] == "step"
                if row["kind"] == "checkpoint" and row["name"] == mark:
                    kept = offset
        if kept is None:
            raise DataError(
                f"{self.path} does not hold the checkpoint that is resumed, steps are missing: resume in the run_dir "
                "of that checkpoint, or begin a new log without load_state_dict"
            )
        os.ftruncate(self._file, kept)
        return dropped

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _lock(file: int, path: Path) -> None:
    """Held until the file is closed, also by a crash; without effect where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"another ledger is writing to {path}; close() it or choose another run_dir") from error
    except OSError:
        return


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


def read_log(run_dir: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of a run's log; a torn last line is left out.

    Raises DataError when there is no log, a line is corrupt, or its format is another one.
    """
    path = Path(run_dir) / LOG_NAME
    if not path.exists():
        raise DataError(f"{path} does not exist; a run directory is written by Ledger(..., run_dir=...)")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield parse_line(line, path, number)


def parse_line(data: bytes, path: Path, number: int) -> dict[str, Any]:
    """One line of a log. Raises DataError, naming the line, when it is corrupt or of another format."""
    try:
        row: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise DataError(f"{path}, line {number} is corrupt: {error}") from error
    if row.get("format", FORMAT) != FORMAT:
        raise DataError(f"{path}, line {number} has format {row['format']}, this version reads {FORMAT}")
    return row
