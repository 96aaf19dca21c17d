"""A live view of a running training in the terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from noetherflow.core.printing import Table, show
from noetherflow.core.terminal import rich_table
from noetherflow.errors import DataError
from noetherflow.monitor.log import LOG_NAME
from noetherflow.monitor.rundata import RunData, RunReader
from noetherflow.report.run_figures import finite_mean
from noetherflow.report.words import CAUSE_NAMES, ESTIMATES

RECENT = 50
KEPT = 4 * RECENT
ROWS = 12
BARS = "▁▂▃▄▅▆▇█"


def watch(
    run_dir: str | os.PathLike[str],
    *,
    refresh: float = 1.0,
    console: Console | None = None,
    until: Callable[[], bool] | None = None,
) -> None:
    """Show a run in the terminal while it is written, until Ctrl-C. The run's first step may come later.

    Args:
        run_dir: the `run_dir` of the ledger. Only the last `KEPT` recorded steps are looked at.
        refresh: seconds between two looks.
        console: where to draw, standard output by default.
        until: asked before every look; the view ends when it answers true.

    Raises:
        DataError: when there is no such folder, and when the log is corrupt or of another format.
    """
    if not Path(run_dir).is_dir():
        raise DataError(
            f"{run_dir} is not a folder; give the run_dir of Ledger(..., run_dir=...), made before watching"
        )
    console = console or Console()
    reader = RunReader(run_dir, keep=KEPT)
    shown = reader.poll()
    if shown is None and not console.is_terminal:
        Console(stderr=True).print(view(shown, run_dir), soft_wrap=True)
    try:
        if not console.is_terminal:
            _print_headlines(reader, console, refresh, until)
            return
        with Live(view(shown, run_dir), console=console, refresh_per_second=4) as live:
            last = False
            while not last:
                time.sleep(refresh)
                last = until is not None and until()
                data = reader.poll()
                if data is None or data is not shown:
                    live.update(view(data, run_dir))
                shown = data
    except KeyboardInterrupt:
        return


def _print_headlines(reader: RunReader, console: Console, refresh: float, until: Callable[[], bool] | None) -> None:
    """In a pipe or a file: one line for every look that found something new, and every new event."""
    told, events, last = -1, 0, False
    while True:
        data = reader.poll()
        if data is not None and int(data.steps[-1]) != told:
            told = int(data.steps[-1])
            console.print(headline(data), markup=False, soft_wrap=True)
            for event in data.events[events:]:
                console.print(f"step {event['step']}: {event['event']}", markup=False, soft_wrap=True)
            events = len(data.events)
        if last:
            return
        time.sleep(refresh)
        last = until is not None and until()


def view(data: RunData | None, run_dir: str | os.PathLike[str]) -> Text | Group:
    """What `watch` shows of one state of the run, as a rich renderable."""
    if data is None:
        path = Path(run_dir) / LOG_NAME
        lack = "holds no recorded step" if path.exists() else "does not exist"
        return Text(f"{path} {lack} yet; waiting for it (Ctrl-C stops) ...")
    parts: list[Text | RichTable] = [Text(headline(data), style="bold"), *_families(data)]
    if data.estimates:
        parts += _symmetries(data)
    recent = sorted([*data.events, *data.spikes()], key=lambda e: e["step"])[-5:]
    parts += [Text(f"step {e['step']}: {e['event']}", style="yellow") for e in recent]
    return Group(*parts)


def headline(data: RunData) -> str:
    """Step, optimiser, learning rate, and the loss with its recent course."""
    words = [f"step {int(data.steps[-1]):,}", data.header["optimizer"], f"lr {show(float(data.lr[-1]))}"]
    losses = data.loss[np.isfinite(data.loss)]
    if losses.size:
        words.append(f"loss {show(float(losses[-1]))} {sparkline(losses[-KEPT:])}")
    return "  ".join(words)


def sparkline(values: np.ndarray, width: int = 32) -> str:
    """Bin means as bars; empty for no finite value."""
    bins = [b.mean() for b in np.array_split(values, min(width, len(values))) if b.size]
    if not bins or not np.isfinite(bins).all():
        return ""
    low, high = min(bins), max(bins)
    span = (high - low) or 1.0
    return "".join(BARS[int((b - low) / span * (len(BARS) - 1))] for b in bins)


def _families(data: RunData) -> list[Text | RichTable]:
    """The charge of every family, its drift, and the main cause of the drift."""
    last = slice(-RECENT, None)
    rows = []
    for i, family in enumerate(data.families):
        means = {name: finite_mean(data.family[name][last, i]) for name in CAUSE_NAMES}
        cause = max(means, key=lambda name: np.nan_to_num(abs(means[name])))
        rows.append(
            {
                "family": family,
                "charge": float(data.family["charge"][-1, i]),
                "per step": finite_mean(data.family["change"][last, i]),
                "main cause": CAUSE_NAMES[cause] if abs(means[cause]) > 0 else "none",
            }
        )
    heading = Text(f"charges (drift over the last {RECENT} recorded steps)", style="italic")
    return [heading, rich_table(Table.of(rows))]


def _symmetries(data: RunData) -> list[Text | RichTable]:
    """The last estimates of the symmetries that are farthest from equilibrium (or grow fastest)."""
    shown = [(k, title) for k, title in ESTIMATES if k in data.estimates and np.isfinite(data.estimates[k][-1]).any()]
    key = data.estimates.get("distance", data.estimates["growth"])[-1]
    order = np.argsort(-np.nan_to_num(np.abs(key)), kind="stable")
    rows = [
        {"symmetry": data.symmetries[i], **{title: float(data.estimates[k][-1, i]) for k, title in shown}}
        for i in order[:ROWS]
    ]
    more = f"{len(order) - ROWS} more" if len(order) > ROWS else None
    heading = Text(f"layers (estimates at step {int(data.estimate_steps[-1]):,})", style="italic")
    return [heading, rich_table(Table.of(rows), more)]
