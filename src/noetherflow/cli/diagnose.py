"""`noetherflow diagnose`: what a run or a model says in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noetherflow.cli import tables
from noetherflow.cli.options import Debug, Json
from noetherflow.cli.output import emit


def diagnose(
    run_dir: Annotated[Path, typer.Argument(help="Folder given to the ledger as run_dir.")],
    steps: Annotated[int | None, typer.Option(help="Steps of the whole run, where it is still going on.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say in plain words what a training run does, what to watch and what to change, from its ledger.

    For a model before training: nf.diagnose(model, loss_fn, loader, optimizer) in Python, or `noetherflow analyze`.
    """
    from noetherflow.diagnosis.of_run import diagnose_run

    found = diagnose_run(run_dir, steps)
    if as_json:
        emit(found.to_dict())
        return
    tables.out().print(str(found), markup=False, soft_wrap=True)
