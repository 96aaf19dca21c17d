"""`noetherflow report` and `noetherflow watch`: a finished or running training seen through its ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noetherflow.cli import tables
from noetherflow.cli.options import Debug, console

RunDir = Annotated[Path, typer.Argument(help="Folder given to the ledger as run_dir.")]


def report(
    run_dir: RunDir,
    out: Annotated[Path | None, typer.Option(help="Where to write the page; default RUN_DIR/report.html.")] = None,
    debug: Debug = False,
) -> None:
    """Write one self-contained interactive page about a run."""
    from noetherflow.report import write_run_report

    with console.status(f"reading {run_dir} and drawing its page"):
        path = write_run_report(run_dir, out)
    tables.out().print(f"report: {path}", markup=False, soft_wrap=True)


def watch(
    run_dir: RunDir,
    refresh: Annotated[float, typer.Option(help="Seconds between updates.")] = 1.0,
    debug: Debug = False,
) -> None:
    """Watch a running training in the terminal; stop with Ctrl-C."""
    from noetherflow.report import watch as live

    live(run_dir, refresh=refresh)
