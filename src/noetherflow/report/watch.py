"""A live view of a running training in the terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from noetherflow.errors import require
from noetherflow.monitor.rundata import RunData, RunReader
from noetherflow.report.page import show
from noetherflow.report.run import NAMES, finite_mean

RECENT = 50
ROWS = 12
BARS = "▁▂▃▄▅▆▇█"


def watch(
    run_dir: str | os.PathLike[str],
    *,
    refresh: float = 1.0,
    console: Any = None,
    until: Callable[[], bool] | None = None,
) -> None:
    """Show the run as it is written, until interrupted (or `until()` is true). It may start before the run does."""
    live_module: Any = require("rich.live", "report")
    reader = RunReader(run_dir)
    try:
        with live_module.Live(view(reader.poll(), run_dir), console=console, refresh_per_second=4) as live:
            while until is None or not until():
                time.sleep(refresh)
                live.update(view(reader.poll(), run_dir))
            live.update(view(reader.poll(), run_dir))
    except KeyboardInterrupt:
        return


def view(data: RunData | None, run_dir: str | os.PathLike[str]) -> Any:
    """What `watch` shows of one state of the run, as a rich renderable."""
    rich_console: Any = require("rich.console", "report")
    text: Any = require("rich.text", "report")
    if data is None:
        return text.Text(f"waiting for the first recorded step in {run_dir} ...")
    parts = [text.Text(headline(data), style="bold"), _families(data)]
    if data.estimates:
        parts.append(_symmetries(data))
    recent = [*data.events, *data.spikes()][-5:]
    parts += [text.Text(f"step {e['step']}: {e['event']}", style="yellow") for e in recent]
    return rich_console.Group(*parts)


def headline(data: RunData) -> str:
    """Step, optimiser, learning rate, and the loss with its recent course."""
    words = [f"step {int(data.steps[-1]):,}", data.header["optimizer"], f"lr {show(float(data.lr[-1]))}"]
    losses = data.loss[np.isfinite(data.loss)]
    if losses.size:
        words.append(f"loss {show(float(losses[-1]))} {sparkline(losses[-4 * RECENT :])}")
    return "  ".join(words)


def sparkline(values: np.ndarray, width: int = 32) -> str:
    """Bin means as bars; empty for no finite value."""
    bins = [b.mean() for b in np.array_split(values, min(width, len(values))) if b.size]
    if not bins or not np.isfinite(bins).all():
        return ""
    low, high = min(bins), max(bins)
    span = (high - low) or 1.0
    return "".join(BARS[int((b - low) / span * (len(BARS) - 1))] for b in bins)


def _families(data: RunData) -> Any:
    table = _table(
        f"charges (drift over the last {RECENT} recorded steps)", "family", "charge", "per step", "main cause"
    )
    last = slice(-RECENT, None)
    for i, family in enumerate(data.families):
        means = {name: finite_mean(data.family[name][last, i]) for name in NAMES}
        cause = max(means, key=lambda name: np.nan_to_num(abs(means[name])))
        drift = finite_mean(data.family["change"][last, i])
        moved = abs(means[cause]) > 0
        cells = (show(float(data.family["charge"][-1, i])), show(drift), NAMES[cause] if moved else "none")
        table.add_row(family, *cells)
    return table


def _symmetries(data: RunData) -> Any:
    columns = [
        ("norm", "norm"),
        ("distance", "|lam*|"),
        ("steps", "steps to go"),
        ("growth", "growth/step"),
        ("angular", "angle/step"),
        ("check", "violation"),
    ]
    shown = [(k, title) for k, title in columns if k in data.estimates and np.isfinite(data.estimates[k][-1]).any()]
    table = _table(f"layers (estimates at step {int(data.estimate_steps[-1]):,})", "symmetry", *(t for _, t in shown))
    key = data.estimates.get("distance", data.estimates["growth"])[-1]
    order = np.argsort(-np.nan_to_num(np.abs(key)), kind="stable")
    for i in order[:ROWS]:
        table.add_row(data.symmetries[i], *(show(float(data.estimates[k][-1, i])) for k, _ in shown))
    if len(order) > ROWS:
        table.caption = f"{len(order) - ROWS} more"
    return table


def _table(title: str, *columns: str) -> Any:
    rich_table: Any = require("rich.table", "report")
    table = rich_table.Table(title=title, title_justify="left")
    for j, name in enumerate(columns):
        table.add_column(name, justify="left" if j == 0 or name == "main cause" else "right", overflow="fold")
    return table
