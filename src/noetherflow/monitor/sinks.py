"""Where the ledger's rows go besides its own log: CSV, TensorBoard, Weights & Biases, MLflow.

A sink is called with every row; pass it to `Ledger(..., sinks=[...])`. `ledger.close()` closes it.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noetherflow.errors import DataError, require
from noetherflow.monitor.books import FIELDS


def scalars(row: Mapping[str, Any], prefix: str = "noether") -> dict[str, float]:
    """`prefix/level/name/field -> value` of one row; numbers that are not finite are left out."""
    out = {}
    for level, names in (("family", row["families"]), ("symmetry", row["symmetries"])):
        for field, values in row.get(level, {}).items():
            for name, value in zip(names, values, strict=True):
                if math.isfinite(value):
                    out[f"{prefix}/{level}/{name}/{field}"] = float(value)
    return out


class CSVSink:
    """One line per recorded step and family: step, family, lr, loss and the ledger's fields."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        target = Path(path)
        fresh = not target.exists() or target.stat().st_size == 0
        self._file = open(target, "a", newline="", encoding="utf-8")  # noqa: SIM115
        self._writer = csv.writer(self._file)
        if fresh:
            self._writer.writerow(["step", "family", "lr", "loss", *FIELDS])

    def __call__(self, row: Mapping[str, Any]) -> None:
        if row["kind"] != "step":
            return
        for i, family in enumerate(row["families"]):
            numbers = [repr(float(row["family"][f][i])) for f in FIELDS]
            self._writer.writerow([row["step"], family, row["lr"], row.get("loss", ""), *numbers])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars into a TensorBoard log directory, or an existing SummaryWriter."""

    def __init__(self, target: Any) -> None:
        if isinstance(target, (str, os.PathLike)):
            board: Any = require("torch.utils.tensorboard", "track")
            target = board.SummaryWriter(str(target))
        self._writer = target

    def __call__(self, row: Mapping[str, Any]) -> None:
        if row["kind"] == "event":
            self._writer.add_text("noether/events", f"{row['event']} at step {row['step']}", row["step"])
        for name, value in scalars(row).items() if row["kind"] != "event" else ():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.flush()


class WandbSink:
    """Scalars into a W&B run (any mode, also offline), against their own axis `noether/step`."""

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("noether/*", step_metric="noether/step")

    def __call__(self, row: Mapping[str, Any]) -> None:
        if row["kind"] != "event":
            self._run.log({"noether/step": row["step"], **scalars(row)})


class MLflowSink:
    """Metrics into an MLflow run: the active one, or `run_id` through `client`. Raises DataError without a run."""

    def __init__(self, client: Any = None, run_id: str | None = None) -> None:
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
        clean = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in scalars(row).items()}
        metrics = [self._metric(name, value, 0, row["step"]) for name, value in clean.items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])
