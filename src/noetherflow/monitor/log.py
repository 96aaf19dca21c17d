"""An append-only JSON-lines log that survives a crash: lines are whole or ignored, and a resumed run rewinds it."""

from __future__ import annotations

import json
import math
import os
import uuid
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from noetherflow.errors import DataError

LOG_NAME = "ledger.jsonl"
FORMAT = 2
KINDS = ("run", "step", "estimates", "event", "checkpoint", "end")
"""Of a log's lines; `end` is the last of a ledger that was closed, its `step` the number of steps made until then."""


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

    A write that was cut short, by a full disk or by Ctrl-C, is taken back by the next one. A file that somebody deletes
    or replaces while it is open is written again from what it held, beside the new one, with a warning.

    Args:
        run_dir: its folder, made if it is missing.
        resume: False keeps a log that has recorded steps beside, as `ledger-1.jsonl` (2, 3, ...), and begins a new one.

    Raises:
        DataError: another ledger is writing there.
    """

    def __init__(self, run_dir: str | os.PathLike[str], resume: bool | None = None) -> None:
        self.path = Path(run_dir) / LOG_NAME
        self._open(os.O_CREAT)
        try:
            if resume is False and self.steps_made() > 0:
                os.rename(self.path, self._free_name())
                self.close()
                self._open(os.O_CREAT)
        except BaseException:
            self.close()
            raise

    def _open(self, flags: int) -> None:
        """Open and lock the file, and cut off a torn last line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | flags, 0o644)
        close_in_forks(self)
        try:
            _lock(self._file, self.path)
            end = _intact_length(self.path)
            os.ftruncate(self._file, end)
        except BaseException:
            self.close()
            raise
        self._written = Written(end, 0)

    def _free_name(self) -> Path:
        return next(p for n in count(1) if not (p := self.path.with_name(f"ledger-{n}.jsonl")).exists())

    @property
    def last_number(self) -> int:
        """The number of the last line that is written for certain; see `append`."""
        return self._written.number

    def append(self, rows: Iterable[Mapping[str, Any]], number: int = 0) -> None:
        """Write whole lines and hand them to the operating system.

        Args:
            rows: the lines.
            number: what the caller calls the last of them. Where the lines end and this number are noted in one
                go, so that an interrupted caller can ask `last_number` whether they are written.

        Raises:
            OSError: they could not be written; then nothing is.
        """
        self._keep_in_place()
        data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        end = self._written.end
        os.ftruncate(self._file, end)
        try:
            self._write(data)
        except OSError:
            os.ftruncate(self._file, end)
            raise
        self._written = Written(end + len(data), max(number, self._written.number))

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]

    def _keep_in_place(self) -> None:
        """Write the lines again where the file that is open is no longer the one of that name."""
        ours = os.fstat(self._file)
        try:
            there = os.stat(self.path)
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                return
            what, path = "replaced", self._free_name()
        except FileNotFoundError:
            what, path = "deleted", self.path
        held, written, old = os.pread(self._file, self._written.end, 0), self._written, self._file
        warnings.warn(
            f"{self.path} was {what} while a ledger had it open; its rows go on in {path}", RuntimeWarning, stacklevel=2
        )
        self.path = path
        self._open(os.O_CREAT)
        os.close(old)
        self._write(held)
        self._written = written

    def steps_made(self) -> int:
        """Steps of the run as far as the log tells, recorded or not; 0 for a new log."""
        return max((steps_told(row) for row in read_lines(self.path)), default=0)

    def mark(self, step: int) -> str:
        """Append a checkpoint line, force all onto the disk, and return the line's name."""
        name = uuid.uuid4().hex
        self.append([{"kind": "checkpoint", "step": step, "name": name}])
        os.fsync(self._file)
        return name

    def rewind(self, mark: str | None) -> int:
        """Drop everything after a checkpoint line; the number of steps dropped.

        Raises:
            DataError: the line is not there: the log was not written up to that checkpoint.
        """
        offset, kept, dropped = 0, None, 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                row = parse_line(line, self.path, number)
                offset += len(line)
                dropped += kept is not None and row["kind"] == "step"
                if row["kind"] == "checkpoint" and row.get("name") == mark:
                    kept = offset
        if kept is None:
            raise DataError(
                f"{self.path} does not hold the checkpoint that is resumed, steps are missing: resume in the run_dir "
                "of that checkpoint, or begin a new log without load_state_dict"
            )
        os.ftruncate(self._file, kept)
        self._written = Written(kept, self._written.number)
        return dropped

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@dataclass(frozen=True)
class Written:
    """How far a log is certainly written: `end` in bytes, `number` as its writer counts the lines."""

    end: int
    number: int


_LOGS: weakref.WeakSet[RunLog] = weakref.WeakSet()


def close_in_forks(log: RunLog) -> None:
    """Have forked processes (DataLoader workers) close their copy of the file.

    A lock lasts as long as any process has the file open: workers that outlive a killed run would keep it.
    """
    _LOGS.add(log)
    _register_fork_handler()


@cache
def _register_fork_handler() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    for log in list(_LOGS):
        log.close()


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


OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer.safetensors")
"""What a folder holds that is the checkpoint of a run and not its log."""


CHECKPOINT = (
    ". This is a checkpoint, weights and optimiser without a log: `noetherflow flow {}` reads them; for a diagnosis "
    "of it nf.diagnose(model, loss_fn, loader, optimizer) takes the model and the optimiser with their states loaded, "
    "and some data (docs/jobs/trainer.md has the lines for a Trainer's folder)"
)
"""What a checkpoint can be asked that was taken for a log."""


def read_log(run_dir: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of a run's log; a torn last line is left out.

    Raises:
        DataError: there is no log, a line is corrupt, or its format is another one.
    """
    path = Path(run_dir) / LOG_NAME
    if not path.exists():
        checkpoint = any((path.parent / name).exists() for name in OPTIMIZER_FILES)
        raise DataError(
            f"{path} does not exist; a run directory is written by Ledger(..., run_dir=...)"
            + (CHECKPOINT.format(run_dir) if checkpoint else "")
        )
    return read_lines(path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of one log file. Raises DataError as `parse_line` does."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield parse_line(line, path, number)


def step_columns(path: Path, name: str) -> Iterator[tuple[int, float, dict[str, np.ndarray]]]:
    """`(step, lr, {field: [n]})` of every step row that has the table `name` (a level); NaN for unknown numbers.

    Raises DataError as `parse_line` does.
    """
    for row in read_lines(path):
        if row["kind"] == "step" and isinstance(row.get(name), dict):
            lr = math.nan if row.get("lr") is None else float(row["lr"])
            yield row["step"], lr, {f: np.array(v, dtype=float) for f, v in row[name].items()}


def parse_line(data: bytes, path: Path, number: int) -> dict[str, Any]:
    """One line of a log; for JSON that is no row of a log an `unreadable` event in its place, which names the line.

    Raises:
        DataError: the line is no JSON, or of another format; names it.
    """
    try:
        row: Any = json.loads(data, parse_int=_whole)
    except RecursionError:
        return unreadable(number, "it is nested too deeply")
    except ValueError as error:
        raise DataError(f"{path}, line {number} is corrupt: {error}") from error
    if isinstance(row, dict) and row.get("format", FORMAT) != FORMAT:
        raise DataError(f"{path}, line {number} has format {row['format']}, this version reads {FORMAT}")
    if not isinstance(row, dict) or row.get("kind") not in KINDS or type(row.get("step")) is not int:
        return unreadable(number, "it is no row of a ledger's log")
    return row


def steps_told(row: Mapping[str, Any]) -> int:
    """How many steps had been made at the least when this line was written: `end` and checkpoints say it exactly.

    Example:
        >>> steps_told({"kind": "step", "step": 980}), steps_told({"kind": "end", "step": 1000})
        (981, 1000)
    """
    step: int = row.get("step", 0)
    return {"step": step + 1, "checkpoint": step, "end": step}.get(row["kind"], 0)


def _whole(digits: str) -> int | float:
    """An integer of a log; a float, maybe infinite, where no float has all its digits."""
    return int(digits) if len(digits) < 16 else float(digits)


def unreadable(number: int, why: str, step: int = 0) -> dict[str, Any]:
    """The event that stands for a line that cannot be read."""
    return {"kind": "event", "event": "unreadable", "step": step, "line": number, "note": f"line {number}: {why}"}
