"""Where the ledger's rows go besides its own log: CSV, TensorBoard, Weights & Biases, MLflow.

A sink is called with every row, in the first process only: pass it to `Ledger(..., sinks=[...])`. The ledger's
`close()` calls its `close()`, and on resuming its `rewind(step)`: rows from that step on will come again.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from noetherflow.errors import DataError, require
from noetherflow.monitor.books import FIELDS

PREFIX = "noether"


def scalars(row: Mapping[str, Any], prefix: str = PREFIX) -> dict[str, float]:
    """`prefix/level/name/field -> value` of one row; numbers that are not finite are left out."""
    out = {}
    families, symmetries = row["families"], row["symmetries"]
    levels = {"family": families, "symmetry": symmetries}
    levels |= {"preconditioned_family": families, "preconditioned_symmetry": symmetries}
    levels |= {"layer": row.get("layers", ())}
    for level, names in levels.items():
        for field, values in row.get(level, {}).items():
            for name, value in zip(names, values, strict=True):
                if math.isfinite(value):
                    out[f"{prefix}/{level}/{name}/{field}"] = float(value)
    for field in ("mean_share", "noise_batches"):
        if math.isfinite(row.get(field, math.nan)):
            out[f"{prefix}/{field}"] = float(row[field])
    return out


class CSVSink:
    """One line per recorded step and family: step, family, lr, loss and the ledger's fields."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._file: IO[str] | None = None

    def __call__(self, row: Mapping[str, Any]) -> None:
        if row["kind"] != "step":
            return
        if self._file is None:
            self.rewind(math.inf)
            self._file = open(self._path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        writer = csv.writer(self._file)
        if self._file.tell() == 0:
            writer.writerow(["step", "family", "lr", "loss", *FIELDS])
        for i, family in enumerate(row["families"]):
            numbers = [repr(float(row["family"][f][i])) for f in FIELDS]
            writer.writerow([row["step"], family, row["lr"], row.get("loss", ""), *numbers])
        self._file.flush()

    def rewind(self, step: float) -> None:
        """Cut the file off before its first line about a step >= `step`, or a torn one."""
        self.close()
        if not self._path.exists():
            return
        kept = 0
        with open(self._path, "r+b") as file:
            for line in file:
                number = line.partition(b",")[0]
                if not line.endswith(b"\n") or (number.isdigit() and int(number) >= step):
                    break
                kept += len(line)
            file.truncate(kept)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardSink:
    """Scalars into a TensorBoard log directory, or an existing SummaryWriter (which cannot be rewound).

    `prefix` begins every name: two ledgers of one run need one each, here and in the sinks below.
    """

    def __init__(self, target: Any, *, prefix: str = PREFIX) -> None:
        self._prefix = prefix
        self._folder = str(target) if isinstance(target, (str, os.PathLike)) else None
        self._writer = None if self._folder is not None else target
        self._from: int | None = None
        if self._folder is not None:
            require("torch.utils.tensorboard", "track")

    def __call__(self, row: Mapping[str, Any]) -> None:
        if self._writer is None:
            board: Any = require("torch.utils.tensorboard", "track")
            self._writer, self._from = board.SummaryWriter(self._folder, purge_step=self._from), None
        if row["kind"] == "event":
            self._writer.add_text(f"{self._prefix}/events", f"{row['event']} at step {row['step']}", row["step"])
        for name, value in scalars(row, self._prefix).items() if row["kind"] != "event" else ():
            self._writer.add_scalar(name, value, row["step"])

    def rewind(self, step: int) -> None:
        """Have TensorBoard forget the steps from `step` on."""
        if self._folder is not None:
            self.close()
            self._from = step

    def close(self) -> None:
        if self._writer is None:
            return
        self._writer.flush()
        if self._folder is not None:
            self._writer.close()
            self._writer = None


class WandbSink:
    """Scalars into a W&B run (any mode, also offline), against their own axis `noether/step` (`PREFIX/step`).

    `commit=False` leaves W&B's own step to your `run.log` calls: W&B discards a call with a `step=` that it has passed.
    Rows then join the point that your next call ends, and of several in one flush the last counts: for a point per step
    give the ledger `flush_every=1`. `commit=True` makes every row a point of its own, for a run in which nothing else
    logs with `step=`.
    """

    def __init__(self, run: Any, *, commit: bool = False, prefix: str = PREFIX) -> None:
        self._run, self._commit, self._prefix = run, commit, prefix
        run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")

    def __call__(self, row: Mapping[str, Any]) -> None:
        if row["kind"] != "event":
            self._run.log({f"{self._prefix}/step": row["step"], **scalars(row, self._prefix)}, commit=self._commit)


class MLflowSink:
    """Metrics into an MLflow run: the active one, or `run_id` through `client`. Raises DataError without a run."""

    def __init__(self, client: Any = None, run_id: str | None = None, *, prefix: str = PREFIX) -> None:
        self._prefix = prefix
        mlflow: Any = require("mlflow", "track")
        active = mlflow.active_run()
        if run_id is None and active is None:
            raise DataError("no MLflow run: call mlflow.start_run() first, or give run_id")
        self._client = client or mlflow.MlflowClient()
        self._run_id = run_id or active.info.run_id
        self._metric = mlflow.entities.Metric

    def __call__(self, row: Mapping[str, Any]) -> None:
        if row["kind"] == "event":
            return
        clean = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in scalars(row, self._prefix).items()}
        metrics = [self._metric(name, value, 0, row["step"]) for name, value in clean.items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])
